"""Text to token ids and back, with the vocabulary of the checkpoint.

One class serves every kind of file: each is turned into a `Vocabulary` first, whose encoder makes ids of ordinary text.
Special tokens are found here, so that text becomes one of them only where that was asked for.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from npllama.errors import (
    ConfigMismatchError,
    FileAccessError,
    NotACheckpointError,
    ParameterError,
    ResourceLimitError,
    TokenizerError,
)
from npllama.text.meta_model import Release, read_meta_model
from npllama.text.piece_files import ADDED_TOKENS, read_piece_files
from npllama.text.piece_model import is_piece_model
from npllama.text.settings import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER_CONFIG, with_settings
from npllama.text.stream import StreamDecoder
from npllama.text.tokenizer_json import read_tokenizer_json
from npllama.text.vocabulary import Vocabulary

_MODEL = "tokenizer.model"
_JSON = "tokenizer.json"
_MAX_BYTES = 256 << 20

#: Every file that says something about a tokenizer.
FILES: tuple[str, ...] = (_MODEL, _JSON, ADDED_TOKENS, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE)

#: Unicode's White_Space, which a special token can take with it. (Python's own idea of space has U+001C to U+001F too.)
_SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


class Tokenizer:
    """A checkpoint's tokenizer, with a user's own special tokens after its vocabulary.

    Parameters
    ----------
    vocabulary : Vocabulary
        What the checkpoint's files say.
    special_tokens : sequence of str
        Own special tokens; they get the ids from the vocabulary's end on, in this order.

    Attributes
    ----------
    n_vocab : int
        One more than the highest id, special tokens included.
    special_tokens : dict of str to int
        Text of every special token -> its id.
    bos_id : int or None
        Id of the token that begins a text.
    adds_bos : bool
        Whether the checkpoint's own tokenizer begins every text with it.
    stop_ids : frozenset of int
        Ids after which an answer is complete.
    chat_template : str or None
        Jinja source of the checkpoint's chat template.
    template_names : dict of str to str
        ``bos_token`` and the like, for the chat template.

    Raises
    ------
    TokenizerError
        An own special token is empty or in the vocabulary already.
    """

    def __init__(self, vocabulary: Vocabulary, *, special_tokens: Sequence[str] = ()) -> None:
        known = max([*vocabulary.tokens, *vocabulary.special.ids.values()], default=-1) + 1
        self.special_tokens = {**vocabulary.special.ids, **_own_tokens(vocabulary, special_tokens, known)}
        self.n_vocab = known + len(special_tokens)
        self.bos_id = vocabulary.bos
        self.adds_bos = vocabulary.adds_bos
        self.stop_ids = vocabulary.stop_ids
        self.chat_template = vocabulary.chat_template
        self.template_names = dict(vocabulary.template_names)
        self._tokens = {
            **vocabulary.tokens,
            **{index: text.encode("utf-8", "replace") for text, index in self.special_tokens.items()},
        }
        self._vocabulary = vocabulary
        self._special_ids = frozenset(self.special_tokens.values())
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def from_path(cls, path: str | os.PathLike[str], *, special_tokens: Sequence[str] = ()) -> Tokenizer:
        """Read a tokenizer from disk.

        Parameters
        ----------
        path : path-like
            A converted model, a folder with tokenizer files, a ``tokenizer.model`` (Meta's or SentencePiece's) or a
            ``tokenizer.json``; the files beside it are read too.
        special_tokens : sequence of str
            Own special tokens, appended after the vocabulary.

        Raises
        ------
        FileAccessError
            Missing or unreadable.
        NotACheckpointError, TokenizerError, UnsupportedError
            See `from_files`.
        """
        place = Path(path)
        if place.is_dir():
            inner = place / "tokenizer"
            folder = inner if inner.is_dir() else place
            names = FILES
        else:
            folder = place.parent
            names = tuple(name for name in FILES if name != (_JSON if place.name == _MODEL else _MODEL))
        files = {name: _read(folder / name) for name in names if (folder / name).is_file()}
        if not place.is_dir() and place.name not in files:
            content = _read(place)
            files.pop(_JSON, None)
            files[_JSON if content[:1] in (b"{", b"[") else _MODEL] = content
        return cls.from_files(files, special_tokens=special_tokens, source=str(place))

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, bytes],
        *,
        special_tokens: Sequence[str] = (),
        source: str = "tokenizer",
        version: Release = "3.1",
    ) -> Tokenizer:
        """Make a tokenizer from the content of its files.

        Parameters
        ----------
        files : mapping of str to bytes
            File name (see ``FILES``) -> content. A ``tokenizer.json`` goes before a ``tokenizer.model``: it says what
            its makers run, added tokens and places of spaces included, where the other leaves that to further files.
        special_tokens : sequence of str
            Own special tokens, appended after the vocabulary.
        source : str
            Where the files are from, for messages.
        version : {"3", "3.1"}
            Which names the special tokens of Meta's ``tokenizer.model`` have, since it does not say; "3.1" stands for
            everything later too.

        Raises
        ------
        NotACheckpointError
            Neither ``tokenizer.json`` nor ``tokenizer.model`` is there.
        TokenizerError
            A file is damaged.
        UnsupportedError
            A kind of tokenizer that npllama does not read, or that needs a library that is not installed; named.
        """
        if _JSON in files:
            vocabulary = with_settings(read_tokenizer_json(files[_JSON], f"{source}:{_JSON}"), files, source)
        elif _MODEL in files and is_piece_model(files[_MODEL]):
            vocabulary = with_settings(read_piece_files(files[_MODEL], files, source), files, source)
        elif _MODEL in files:
            vocabulary = read_meta_model(files[_MODEL], source, version)
        else:
            raise NotACheckpointError(
                f"no tokenizer here; expected {_JSON} or {_MODEL}",
                file=source,
                remedy="Name the tokenizer's file or its folder.",
            )
        return cls(vocabulary, special_tokens=special_tokens)

    def encode(self, text: str, *, bos: bool | None = None, allow_special: bool = False) -> list[int]:
        """Turn text into token ids.

        Parameters
        ----------
        text : str
            Any text. A lone surrogate becomes U+FFFD.
        bos : bool, optional
            Whether the BOS token comes first; by default what the checkpoint's tokenizer says.
        allow_special : bool
            Whether text that spells a special token becomes that token. By default text is text.

        Raises
        ------
        ParameterError
            ``text`` is no string, or BOS is asked for and there is none.
        """
        if not isinstance(text, str):
            raise ParameterError(f"text is {type(text).__name__}, expected str", remedy="Decode bytes first.")
        parts = self._vocabulary.cut(text)
        pieces = chain.from_iterable(map(self.split_special, parts)) if allow_special else parts
        return self._leading(bos) + self.encode_pieces(pieces)

    def encode_pieces(self, pieces: Iterable[str | int]) -> list[int]:
        """Turn one text into ids that comes as ordinary pieces and, between them, special tokens as ids."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._vocabulary.encoder.encode(piece, first=not ids)
        return ids

    def split_special(self, text: str) -> Iterator[str | int]:
        """Yield the ordinary pieces of a text as they are, and the special tokens between them as ids.

        Of special tokens that begin at the same place the longest counts. White space that a token takes with it is
        in no piece.
        """
        special, done = self._vocabulary.special, 0
        for found in self._special.finditer(text):
            before, behind = found.span()
            if found[0] in special.take_before:
                before = done + len(text[done:before].rstrip(_SPACES))
            if found[0] in special.take_behind:
                behind = next((at for at in range(behind, len(text)) if text[at] not in _SPACES), len(text))
            if done < before:
                yield text[done:before]
            yield self.special_tokens[found[0]]
            done = behind
        if done < len(text):
            yield text[done:]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text.

        Bytes that are not UTF-8 become U+FFFD, special tokens are spelled out, and a space that encoding put before
        the text is left out again.
        """
        stream = self.stream()
        return "".join([*map(stream.feed, ids), stream.finish()])

    def decode_bytes(self, token: int) -> bytes:
        """Return the bytes of a token; none for an id without a token, which padded embeddings have.

        Raises
        ------
        ParameterError
            The id is negative or no integer.
        """
        try:
            index = operator.index(token)
        except TypeError:
            raise ParameterError(f"token id {token!r}: expected an integer") from None
        if index < 0:
            raise ParameterError(f"token id {index}: expected 0 or more")
        return self._tokens.get(index, b"")

    def token_piece(self, token: int) -> str:
        r"""Return a token for display: its text, with bytes that are only part of a character as ``\xf0``."""
        return self.decode_bytes(token).decode("utf-8", "backslashreplace")

    def stream(self, *, after: Iterable[int] = ()) -> StreamDecoder:
        """Return a decoder for ids that come one by one.

        Parameters
        ----------
        after : iterable of int
            Ids that came before. Behind a text a first space belongs to what follows; at its beginning a SentencePiece
            tokenizer may have put it there, and `decode` leaves it out.
        """
        return StreamDecoder(
            self.decode_bytes,
            added_space=self._vocabulary.added_space,
            special=self._special_ids,
            bos=self.bos_id,
            after=after,
        )

    def check_model_rows(self, n_rows: int) -> None:
        """Check that a model's embedding has a row for every id.

        A model may have more rows than there are tokens: many are padded.

        Raises
        ------
        ConfigMismatchError
            It has fewer.
        """
        if n_rows < self.n_vocab:
            own = len(self.special_tokens) - len(self._vocabulary.special.ids)
            raise ConfigMismatchError(
                f"the tokenizer has {self.n_vocab} ids ({own} of them own special tokens), "
                f"the model's embedding has {n_rows} rows",
                remedy="Use the tokenizer that belongs to the model, or a model whose embedding was extended.",
            )

    def _leading(self, bos: bool | None) -> list[int]:
        if not (self.adds_bos if bos is None else bos):
            return []
        if self.bos_id is None:
            raise ParameterError("bos=True, but this tokenizer has no BOS token", remedy="Leave bos out.")
        return [self.bos_id]


def _own_tokens(vocabulary: Vocabulary, texts: Sequence[str], first: int) -> dict[str, int]:
    """Give ids to a user's own special tokens, from ``first`` on."""
    ordinary = set(vocabulary.tokens.values()) if texts else set()
    own: dict[str, int] = {}
    for text in texts:
        taken = text in own or text in vocabulary.special.ids or text.encode("utf-8", "replace") in ordinary
        if not text or taken:
            raise TokenizerError(
                f"own special token {text!r} " + ("is in the vocabulary already" if text else "is empty"),
                remedy="Give texts that are not tokens yet, each once.",
            )
        own[text] = first + len(own)
    return own


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ResourceLimitError(f"more than {_MAX_BYTES} bytes; no tokenizer's file is that long", file=path)
        if not path.is_file():
            raise FileAccessError("not a regular file", file=path, remedy="Name the tokenizer's file or its folder.")
        return path.read_bytes()
    except OSError as problem:
        raise FileAccessError(
            f"cannot read: {problem.strerror or problem}", file=path, remedy="Check the path."
        ) from None
