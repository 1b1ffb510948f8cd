"""Typed access to the tokenizer in a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np

from npllama.dtypes import Array
from npllama.errors import TokenizerError, UnsupportedError

_T = TypeVar("_T")

_PREFIX = "tokenizer.ggml."
_CHAT_TEMPLATE = "tokenizer.chat_template"
_ARCHITECTURE = "general.architecture"


class TokenType(IntEnum):
    """What a token is; unused ones only fill the vocabulary up to the embedding's rows."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class TokenList:
    """Tokens by id, their types, and the id of every token that is in use."""

    tokens: Sequence[str]
    types: Sequence[int]
    ids: dict[str, int]


class TokenizerMetadata:
    """Typed access to the tokenizer's metadata."""

    def __init__(self, metadata: Mapping[str, Any], file: str) -> None:
        self._metadata = metadata
        self._file = file

    @property
    def architecture(self) -> Any:
        """The model's architecture, as the file names it."""
        return self._metadata.get(_ARCHITECTURE)

    def error(self, key: str, message: str) -> TokenizerError:
        """Make the error that says that a key's value is wrong."""
        return TokenizerError(
            message, file=self._file, record=_PREFIX + key, remedy="The file is damaged; fetch it again."
        )

    def unsupported(self, message: str, remedy: str) -> UnsupportedError:
        """Make the error that says that this kind of tokenizer is not read."""
        return UnsupportedError(message, file=self._file, remedy=remedy)

    def holds(self, key: str) -> bool:
        """Tell whether the file has a key."""
        return _PREFIX + key in self._metadata

    def optional(self, key: str, wanted: type[_T]) -> _T | None:
        """Return a single value, None where there is none."""
        value = self._metadata.get(_PREFIX + key)
        if value is not None and type(value) is not wanted:
            raise self.error(key, f"found {type(value).__name__}, expected {wanted.__name__}")
        return value

    def chat_template(self) -> str | None:
        """Return the chat template, if there is one."""
        value = self._metadata.get(_CHAT_TEMPLATE)
        return value if isinstance(value, str) else None

    def strings(self, key: str) -> list[str]:
        """Return an array of strings."""
        value = self._metadata.get(_PREFIX + key)
        if not isinstance(value, list):
            raise self.error(key, "missing, or not an array of strings")
        return value

    def vocabulary(self) -> TokenList:
        """Return tokens and types; a token in use has one id."""
        tokens = self.strings("tokens")
        types = self._types(len(tokens))
        ids = {token: index for index, token in enumerate(tokens) if types[index] != TokenType.UNUSED}
        if len(ids) != len(types) - types.count(TokenType.UNUSED):
            twice = next(t for i, t in enumerate(tokens) if types[i] != TokenType.UNUSED and ids[t] != i)
            raise self.error("tokens", f"the token {twice!r} has two ids")
        return TokenList(tokens, types, ids)

    def _types(self, count: int) -> list[int]:
        value = self._metadata.get(_PREFIX + "token_type")
        if value is None:
            return [1] * count
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != count:
            raise self.error("token_type", f"expected an integer for each of {count} tokens")
        types: list[int] = value.tolist()
        return types

    def scores(self, count: int) -> Array:
        """Return a score for each token, float32."""
        value = self._metadata.get(_PREFIX + "scores")
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or len(value) != count:
            raise self.error("scores", f"expected a number for each of {count} tokens")
        if not np.isfinite(value).all():
            raise self.error("scores", "a score is NaN or infinite")
        return value

    def merges(self, ids: Mapping[str, int]) -> list[str]:
        """Return the merges, each of two tokens that make up a third."""
        merges = self.strings("merges")
        for index, merge in enumerate(merges):
            left, space, right = merge.partition(" ")
            if not space or left not in ids or right not in ids or left + right not in ids:
                raise self.error("merges", f"merge {index} is {merge!r}, expected two tokens that make up a third")
        return merges

    def token_id(self, name: str, vocabulary: TokenList) -> int | None:
        """Return the id of BOS, EOS or another named token, if the file says it."""
        key = f"{name}_token_id"
        index = self.optional(key, int)
        if index is None:
            return None
        if not 0 <= index < len(vocabulary.tokens):
            raise self.error(key, f"the id is {index}, but there are {len(vocabulary.tokens)} tokens")
        return index

    def added_ends(self, vocabulary: TokenList, *, adds_bos: bool) -> dict[str, int]:
        """Return the ids of the tokens that are put before ("bos") and after ("eos") a text.

        ``adds_bos`` is whether BOS is where the file does not say.
        """
        ends = {}
        for name, default in (("bos", adds_bos), ("eos", False)):
            wanted = self.optional(f"add_{name}_token", bool)
            index = self.token_id(name, vocabulary)
            if index is not None and (default if wanted is None else wanted):
                ends[name] = index
        return ends
