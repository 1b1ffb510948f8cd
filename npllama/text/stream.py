"""Text from a stream of token ids, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Iterable

from npllama.text.vocabulary import AddedSpace


class StreamDecoder:
    """Turns token ids into text as they come.

    A character can be spread over several tokens: what is incomplete is held back until it is whole. The pieces
    together are what `Tokenizer.decode` gives for all ids at once.

    Parameters
    ----------
    decode_bytes : callable
        Token id -> its bytes.
    added_space : {"none", "first", "each"}
        Where the tokenizer puts a space that is no part of the text; it is left out again.
    special : container of int
        Ids of the special tokens.
    bos : int or None
        Id of the one that begins a text.
    after : iterable of int
        Ids that came before: the text goes on behind them.
    """

    def __init__(
        self,
        decode_bytes: Callable[[int], bytes],
        *,
        added_space: AddedSpace = "none",
        special: Container[int] = frozenset(),
        bos: int | None = None,
        after: Iterable[int] = (),
    ) -> None:
        self._decode_bytes = decode_bytes
        self._added_space = added_space
        self._special = special
        self._bos = bos
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begins = added_space != "none"
        for token in after:
            self._next_bytes(token)

    def feed(self, token: int) -> str:
        """Take the next id; return the text that it completes, which may be empty."""
        return self._decoder.decode(self._next_bytes(token))

    def finish(self) -> str:
        """Return what was still held back (U+FFFD for half a character), ready for another text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._begins = self._added_space != "none"
        return rest

    def _next_bytes(self, token: int) -> bytes:
        """Return a token's bytes, without the space that the tokenizer put before the text that it begins."""
        found = self._decode_bytes(token)
        if token in self._special:
            self._begins = self._added_space == "each" or (self._begins and token == self._bos)
        elif found and self._begins:
            self._begins = False
            return found.removeprefix(b" ")
        return found
