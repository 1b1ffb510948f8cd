"""Text from a stream of token ids, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Turns token ids into text as they come.

    A character can be spread over several tokens: what is incomplete is held back until it is whole. The pieces
    together are what `Tokenizer.decode` gives for all ids at once.

    Parameters
    ----------
    decode_bytes : callable
        Token id -> its bytes.
    """

    def __init__(self, decode_bytes: Callable[[int], bytes]) -> None:
        self._decode_bytes = decode_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Take the next id; return the text that it completes, which may be empty."""
        return self._decoder.decode(self._decode_bytes(token))

    def finish(self) -> str:
        """Return what was still held back (U+FFFD for half a character), ready for another stream."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
