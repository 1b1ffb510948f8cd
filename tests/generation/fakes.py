"""Stand-ins for a trained model: a tokenizer of bytes, and models whose every logit is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npllama.cache import KVCache
from npllama.dtypes import Array
from npllama.text.byte_level import ByteLevel
from npllama.text.tokenizer import Tokenizer
from npllama.text.vocabulary import Special, Vocabulary
from tests.fixtures.loud import loud_config

BOS, EOS, USER, ASSISTANT, SYSTEM = range(256, 261)
VOCABULARY = 264  # three rows more than tokens, as padded embeddings have

_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, adds_bos: bool = True, chat_template: str | None = _TEMPLATE) -> Tokenizer:
    """Return a tokenizer with one token for each byte, and BOS, EOS and three roles behind them."""
    return Tokenizer(
        Vocabulary(
            encoder=ByteLevel(r"[\s\S]", {bytes([value]): value for value in range(256)}, range(256)),
            tokens={value: bytes([value]) for value in range(256)},
            special=Special(
                ids={"<bos>": BOS, "<eos>": EOS, "<user>": USER, "<assistant>": ASSISTANT, "<system>": SYSTEM}
            ),
            bos=BOS,
            adds_bos=adds_bos,
            stop_ids=frozenset({EOS}),
            chat_template=chat_template,
        )
    )


class FakeModel:
    """A model whose logits are a function of all tokens so far.

    Parameters
    ----------
    logits : callable
        ``logits(tokens)`` -> (V,) logits of the token behind them.
    tokenizer : Tokenizer or None
        By default one of bytes.
    max_seq_len : int
        The context.

    Attributes
    ----------
    calls : list of list of int
        Tokens of every forward pass.
    """

    backend = "fake"
    threads = 1
    cache_dtype = "float32"
    notice: str | None = None
    nbytes_per_token = 1000

    def __init__(
        self,
        logits: Callable[[Sequence[int]], Array],
        *,
        tokenizer: Tokenizer | None = None,
        max_seq_len: int = 1024,
    ) -> None:
        self.config = loud_config(vocab_size=VOCABULARY, max_seq_len=max_seq_len)
        self.tokenizer = tokenizer
        self.calls: list[list[int]] = []
        self._logits = logits
        self._seen: dict[int, list[int]] = {}  # by cache: the tokens behind it

    def prepare(self, progress: object = None) -> None:
        """There is nothing to compile."""

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.config, capacity, self.cache_dtype)

    def forward(self, tokens: Any, cache: KVCache | None = None, *, last: bool = False) -> Array:
        ids = [int(token) for token in tokens]
        self.calls.append(ids)
        before: list[int] = []
        if cache is not None:
            before = self._seen.setdefault(id(cache), [])[: cache.length]
            cache.advance(len(ids))
            cache.remember(np.array(ids))
            self._seen[id(cache)] = before + ids
        ends = range(len(ids), len(ids) + 1) if last else range(1, len(ids) + 1)
        return np.array([self._logits(before + ids[:end]) for end in ends], dtype=np.float32)

    def forward_many(self, sequences: Any, caches: Any, *, last: bool = False) -> list[Array]:
        return [self.forward(tokens, cache, last=last) for tokens, cache in zip(sequences, caches, strict=True)]


def one_hot(token: int) -> Array:
    """Return logits that give one token a probability of nearly 1."""
    logits = np.zeros(VOCABULARY, dtype=np.float32)
    logits[token] = 30.0
    return logits


def writes(text: str | bytes, *, after: int = 0, **settings: Any) -> Any:
    """Return a model that writes a text and EOS from position ``after`` on, whatever the tokens are."""
    script = [*(text.encode() if isinstance(text, str) else text)]

    def logits(tokens: Sequence[int]) -> Array:
        place = len(tokens) - after
        return one_hot(script[place] if 0 <= place < len(script) else EOS)

    settings.setdefault("tokenizer", byte_tokenizer())
    return FakeModel(logits, **settings)


def bigram(seed: int = 0, **settings: Any) -> tuple[Any, Array]:
    """Return a model that looks at the last token only, and its table (V, V) of logits."""
    table = np.random.default_rng(seed).normal(0, 2, (VOCABULARY, VOCABULARY)).astype(np.float32)
    settings.setdefault("tokenizer", byte_tokenizer())
    return FakeModel(lambda tokens: table[tokens[-1]], **settings), table
