"""What a file is, told by its first bytes: never by its name, which people change."""

from __future__ import annotations

import re

from npllama.checkpoint.source import Source
from npllama.errors import EmptyFileError, NotACheckpointError, NpllamaError, UnsupportedError

_HEAD = 512
_LARGEST_JSON_HEADER = 100_000_000
_FETCH_AGAIN = "Download it again."

#: (position, bytes) -> what the file is, for kinds that are known and not read.
_KNOWN: tuple[tuple[int, bytes, type[NpllamaError], str, str], ...] = (
    (
        0,
        bytes.fromhex("80028a0a6cfc9c46f9206aa850192e"),
        UnsupportedError,
        "a checkpoint in the format of torch before 1.6",
        "Load it with torch 1.6 or later and save it again.",
    ),
    (0, b"PYTORCH1", UnsupportedError, "a checkpoint of a torch pre-release", "Save it again with torch 1.6 or later."),
    (257, b"ustar", UnsupportedError, "a tar archive", "Unpack it; name the checkpoint inside."),
    (0, b"\x1f\x8b", UnsupportedError, "gzip-compressed", "Decompress it with gunzip."),
    (0, b"\x93NUMPY", UnsupportedError, "a .npy array", "Name a checkpoint, or the folder of a converted model."),
)
_WEB_PAGE = re.compile(rb"\s*<(\?xml|!doctype|html)", re.IGNORECASE)
_LFS_POINTER = b"version https://git-lfs"


def detect(source: Source) -> str:
    """Tell the format of a checkpoint file.

    Parameters
    ----------
    source : Source
        The file; its first 512 bytes are read.

    Returns
    -------
    str
        "pth" (a zip archive), "gguf" or "safetensors".

    Raises
    ------
    EmptyFileError
        The file has no bytes.
    NotACheckpointError
        A web page, a git-lfs pointer, zeros, or nothing known; the message says which.
    UnsupportedError
        A known format that is not read: torch's older ones, tar, gzip, .npy.
    """
    if source.size == 0:
        raise EmptyFileError("the file has 0 bytes", file=source.path, remedy=_FETCH_AGAIN)
    head = source.read(0, min(_HEAD, source.size))
    if head.startswith(b"PK\x03\x04"):
        return "pth"
    for position, magic, error, what, remedy in _KNOWN:
        if head[position : position + len(magic)] == magic:
            raise error(f"this is {what}", file=source.path, remedy=remedy)
    if head.startswith(b"GGUF"):
        return "gguf"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_JSON_HEADER:
        return "safetensors"
    raise _explain(head, source.path)


def _explain(head: bytes, path: str) -> NotACheckpointError:
    """Build the error for a file that is no checkpoint at all."""
    if head.startswith(_LFS_POINTER):
        size = re.search(rb"^size ([0-9]{1,18})$", head, re.MULTILINE)
        what = f" for an object of {int(size[1]) / 1e9:.1f} GB" if size else ""
        return NotACheckpointError(f"this is a git-lfs pointer{what}", file=path, remedy="Run git lfs pull.")
    if _WEB_PAGE.match(head):
        line = head.strip().splitlines()[0][:60].decode("utf-8", "replace")
        return NotACheckpointError(
            f"this is a web page (first line {line!r})",
            file=path,
            remedy="The download link has expired, or needs a login; ask for a new one.",
        )
    if not any(head):
        return NotACheckpointError(
            f"the first {len(head)} bytes are zeros: an incomplete download", file=path, remedy=_FETCH_AGAIN
        )
    return NotACheckpointError(
        f"no checkpoint format begins with the bytes {head[:16].hex(' ')}",
        file=path,
        remedy="A .pth of torch 1.6 or later, .safetensors or .gguf file is expected.",
    )
