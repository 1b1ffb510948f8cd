"""Libraries that only some tokenizers need, and that are not installed with npllama."""

from __future__ import annotations

import importlib
from typing import Any

from npllama.errors import UnsupportedError


def import_extra(module: str, extra: str, what: str, source: str) -> Any:
    """Import a library.

    Parameters
    ----------
    module : str
        Its name.
    extra : str
        The extra of npllama that installs it.
    what : str
        What needs it, for the message.
    source : str
        The file that is read.

    Raises
    ------
    UnsupportedError
        It is not installed, or cannot be imported; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise UnsupportedError(
            f"{what} needs the library {module}, which cannot be imported: {problem}",
            file=source,
            remedy=f'Install it: pip install "npllama[{extra}]"',
        ) from None
