"""Every failure that input can cause, one class for each kind.

A message says what was found, what was expected and what to do. Errors about a file begin with the place:
``file:record@offset``. The command line prints ``ClassName: message`` and leaves with the class's exit code.
"""

from __future__ import annotations

import os


class NpllamaError(Exception):
    """Base of every error that npllama raises for something outside its own code.

    Parameters
    ----------
    message : str
        What is wrong: what was found and what was expected.
    remedy : str, optional
        What the reader can do about it, as a sentence.
    file : path-like, optional
        The file at fault.
    record : str, optional
        The part of the file: a zip record, a tensor, a key, a line.
    offset : int, optional
        Byte offset in the file (or in the record, when one is given).

    Attributes
    ----------
    exit_code : int
        What the command line returns: 2 usage, 3 bad input, 4 unsupported, 5 disk or I/O, 6 incomplete or locked.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        file: str | os.PathLike[str] | None = None,
        record: str | None = None,
        offset: int | None = None,
    ) -> None:
        self.message = message
        self.remedy = remedy
        self.file = None if file is None else os.fspath(file)
        self.record = record
        self.offset = offset
        super().__init__(self._compose())

    def _compose(self) -> str:
        place = ":".join(part for part in (self.file, self.record) if part)
        if self.offset is not None:
            place += f"@{self.offset}"
        text = f"{place}: {self.message}" if place else self.message
        if not self.remedy:
            return text
        return f"{text.rstrip('.')}. {self.remedy}"


# --- bad input: exit code 3 -------------------------------------------------------------------------------------


class NotACheckpointError(NpllamaError):
    """The file is something else: a web page, a git-lfs pointer, zeros, an unknown format."""


class EmptyFileError(NotACheckpointError):
    """The file has no bytes."""


class TruncatedFileError(NpllamaError):
    """The file ends before what it promises."""


class CorruptDataError(NpllamaError):
    """The bytes contradict themselves: a checksum, a size, an offset, a duplicate, a NaN in a weight."""


class UnsafeFileError(NpllamaError):
    """The file asks for something that no checkpoint needs: an import, a path outside its folder."""


class ResourceLimitError(NpllamaError):
    """The file would cost more memory or time than any real one."""


class SourceChangedError(NpllamaError):
    """A source file changed while it was being read."""


class ShardError(NpllamaError):
    """The shards of a checkpoint are incomplete or do not fit together."""


class ConfigError(NpllamaError):
    """A configuration value is missing, unknown, of the wrong type or out of range."""


class ConfigMismatchError(NpllamaError):
    """Configuration, weights and tokenizer disagree."""


class TokenizerError(NpllamaError):
    """The tokenizer's file is damaged, or a token id or text cannot be handled."""


class ChatTemplateError(NpllamaError):
    """A chat template cannot be rendered, or a dialog does not have the form that it asks for."""


class ContextOverflowError(NpllamaError):
    """More positions are asked for than the cache or the model holds."""


class TapError(NpllamaError):
    """A tap pattern names nothing, or a tapped tensor breaks the tap table's contract."""


class TraceError(NpllamaError):
    """A folder is not a trace, its ``trace.json`` is wrong, or a file of it is not what that says."""


# --- usage: exit code 2 -----------------------------------------------------------------------------------------


class ParameterError(NpllamaError):
    """An argument is out of its range."""

    exit_code = 2


class DestinationExistsError(NpllamaError):
    """The output is already there, and replacing it was not asked for."""

    exit_code = 2


# --- unsupported: exit code 4 -----------------------------------------------------------------------------------


class UnsupportedError(NpllamaError):
    """A known format, data type or model family that npllama does not read."""

    exit_code = 4


class VersionError(UnsupportedError):
    """The model folder was written by a newer npllama."""


class BackendError(UnsupportedError):
    """The chosen backend cannot run here."""


# --- disk and I/O: exit code 5 ----------------------------------------------------------------------------------


class FileAccessError(NpllamaError):
    """The operating system refused: missing, unreadable, not a regular file, an I/O error."""

    exit_code = 5


class DiskSpaceError(FileAccessError):
    """The disk is too small or full."""


class DownloadError(FileAccessError):
    """The package index could not be reached or does not hold the file."""


# --- incomplete or locked: exit code 6 --------------------------------------------------------------------------


class IncompleteConversionError(NpllamaError):
    """The model folder is unfinished: its conversion was interrupted."""

    exit_code = 6


class LockedError(NpllamaError):
    """Another process is converting to the same folder."""

    exit_code = 6
