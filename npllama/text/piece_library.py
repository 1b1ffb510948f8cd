"""SentencePiece models that need more than merging: unigram vocabularies, and text that is normalised before.

The sentencepiece library encodes for these. It is an extra: no model of the Llama, Mistral or Phi-3 families needs it.
"""

from __future__ import annotations

from npllama.errors import TokenizerError
from npllama.text.extras import import_extra
from npllama.text.shield import without_surrogates
from npllama.text.vocabulary import AddedSpace

#: A message behind another overrides its fields: here ``normalizer_spec.add_dummy_prefix = false``.
_WITHOUT_SPACE = b"\x1a\x02\x18\x00"


class PieceLibrary:
    """The encoder.

    Parameters
    ----------
    data : bytes
        Content of ``tokenizer.model``.
    added_space : {"none", "first", "each"}
        Where a space that is no part of the text is put.
    source : str
        The file's name, for messages.

    Raises
    ------
    UnsupportedError
        The library is not installed; the message says how to install it.
    TokenizerError
        The library refuses the file.
    """

    def __init__(self, data: bytes, added_space: AddedSpace, source: str) -> None:
        library = import_extra("sentencepiece", "sentencepiece", "this SentencePiece model", source)
        try:
            with_space = library.SentencePieceProcessor(model_proto=data)
            without = library.SentencePieceProcessor(model_proto=data + _WITHOUT_SPACE)
        except RuntimeError as problem:
            raise TokenizerError(
                f"sentencepiece refuses the model: {problem}", file=source, remedy="Fetch the file again."
            ) from None
        self._first = without if added_space == "none" else with_space
        self._later = with_space if added_space == "each" else without

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Turn ordinary text into ids; see `npllama.text.vocabulary.Encoder`."""
        ids: list[int] = (self._first if first else self._later).encode(without_surrogates(text))
        return ids
