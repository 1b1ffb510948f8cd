"""Meta's ``tokenizer.model`` of Llama 3: 128,000 lines of base64 bytes and rank, and 256 special tokens by convention.

The special tokens are not in the file. Their ids are the same in every release, their reserved names are not, so ids
are what the rest of the project relies on.
"""

from __future__ import annotations

import base64
import binascii
from typing import Literal

from npllama.errors import EmptyFileError, ParameterError, TokenizerError
from npllama.text.byte_level import ByteLevel, RunLimits
from npllama.text.vocabulary import Special, Vocabulary

Release = Literal["3", "3.1"]

N_RANKS = 128_000
N_SPECIAL = 256

#: Splits text into words; the pattern of Meta's llama3/tokenizer.py.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: Meta cuts text so before tiktoken sees it; token ids depend on it, and "space" is what ``str.isspace`` says.
META_LIMITS = RunLimits(piece=400_000, pattern=r"\s|\S", run=25_000)

#: Release -> position among the special tokens -> name, for those that have one; the others are reserved.
_NAMED: dict[str, dict[int, str]] = {
    "3": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    },
    "3.1": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        5: "<|step_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
        11: "<|image|>",
    },
}

#: Release -> names after which an answer is complete (``eom``: the model waits for a tool's result).
_STOPS: dict[str, tuple[str, ...]] = {
    "3": ("<|end_of_text|>", "<|eot_id|>"),
    "3.1": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
}


def special_tokens(version: Release) -> dict[str, int]:
    """Return the 256 special tokens of a release, name -> id, in the order of their ids.

    Parameters
    ----------
    version : {"3", "3.1"}
        "3" is Llama 3.0; "3.1" stands for 3.1 and everything later.
    """
    if version not in _NAMED:
        raise ParameterError(
            f"there is no table of special tokens for Llama {version!r}",
            remedy=f"Choose one of {', '.join(map(repr, _NAMED))}.",
        )
    named, reserved, table = _NAMED[version], 0, {}
    for position in range(N_SPECIAL):
        name = named.get(position)
        if name is None:
            name, reserved = f"<|reserved_special_token_{reserved}|>", reserved + 1
        table[name] = N_RANKS + position
    return table


def read_ranks(data: bytes, source: str) -> dict[bytes, int]:
    """Parse the ranks of a ``tokenizer.model`` strictly.

    One lost line would shift the id of every special token, so nothing is skipped or repaired.

    Parameters
    ----------
    data : bytes
        Content of the file.
    source : str
        Its name, for messages.

    Returns
    -------
    dict of bytes to int
        Exactly 128,000 tokens; the line with rank r stands r-th.

    Raises
    ------
    EmptyFileError
        No content.
    TokenizerError
        Anything that is not one line per rank, in order; the message has the line number.
    """
    if not data:
        raise EmptyFileError("the file is empty", file=source, remedy="Fetch tokenizer.model again.")
    ranks: dict[bytes, int] = {}
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, 1):
        token = _parse_line(line, number, source)
        if token in ranks:
            raise _line_error(f"the token of line {ranks[token] + 1} again", number, source)
        ranks[token] = number - 1
    if len(ranks) != N_RANKS:
        raise TokenizerError(
            f"{len(ranks):,} tokens, expected {N_RANKS:,}",
            file=source,
            remedy="The file is incomplete or belongs to another model; fetch it again.",
        )
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise TokenizerError(
            f"the byte {missing[0]} has no token, expected one for each of the 256 bytes",
            file=source,
            remedy="The file is damaged; fetch it again.",
        )
    return ranks


def read_meta_model(data: bytes, source: str, version: Release = "3.1") -> Vocabulary:
    """Turn a ``tokenizer.model`` into a vocabulary; same errors as `read_ranks`."""
    ranks = read_ranks(data, source)
    special = special_tokens(version)
    return Vocabulary(
        encoder=ByteLevel(LLAMA3_PATTERN, ranks, range(N_RANKS)),
        tokens={rank: token for token, rank in ranks.items()},
        special=Special(ids=special),
        cut=META_LIMITS.cut,
        bos=special["<|begin_of_text|>"],
        adds_bos=True,
        stop_ids=frozenset(special[name] for name in _STOPS[version]),
    )


def _line_error(what: str, number: int, source: str) -> TokenizerError:
    return TokenizerError(
        what,
        file=source,
        record=f"line {number}",
        remedy="Each line must hold the base64 form of a token, one space and its rank, counting up from 0; "
        "fetch the file again.",
    )


def _parse_line(line: bytes, number: int, source: str) -> bytes:
    """Return the token of line ``number`` (from 1), whose rank must be ``number - 1``."""
    if line.endswith(b"\r"):
        raise _line_error("the line ends in CR LF: something rewrote the file's line ends", number, source)
    encoded, space, rank = line.partition(b" ")
    if not space:
        raise _line_error(f"no token and rank in {line[:40]!r}", number, source)
    try:
        token = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise _line_error(f"{encoded[:40]!r} is not base64", number, source) from None
    if not token:
        raise _line_error("an empty token", number, source)
    if rank != b"%d" % (number - 1):
        raise _line_error(f"rank {rank[:40].decode('ascii', 'replace')}, expected {number - 1}", number, source)
    return token
