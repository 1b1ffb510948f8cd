"""Mistakes with learned positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, decodes, shown, where
from npllama.check.rerun import Rerun
from npllama.dtypes import Tensor


def positions(place: Callable[[Array], Array], *, decoding: bool = False) -> Plant:
    """Look up ``place(positions)`` (T,) in the table; no mistake in a run that reaches its last row."""

    def plant(run: Rerun) -> Rerun | None:
        embed, table = run.ops.embed, run.weights.pos_embeddings
        assert table is not None

        def look_up(ids: Array, rows: Tensor, dtype: np.dtype[Any]) -> Array:
            x: Array = embed(place(ids) if rows is table else ids, rows, dtype)
            return x

        late = len(run.tokens) >= table.shape[0]
        return None if late or (decoding and not decodes(run)) else run.with_ops(embed=look_up)

    return where("learned", plant)


FIRST = "pos_embeddings"

ENTRIES = (
    Mistake(
        "learned-positions-missing",
        "The table of positions is not added to the embeddings.",
        "embeddings equals tok_embeddings, or is no tap at all.",
        "Add row p of the table to the embedding of the token at position p.",
        (Way("", "embeddings", where("learned", shown(embeddings=lambda x, seen: seen["tok_embeddings"]))),),
    ),
    Mistake(
        "learned-positions-shifted",
        "The table of positions is read in the wrong rows.",
        "pos_embeddings holds the rows of other positions.",
        "The first token is at position 0; a decode step is at the position that equals the number of cached ones.",
        (
            Way("one ahead", FIRST, positions(lambda p: p + 1)),
            *(
                Way(f"{label} while decoding", FIRST, positions(place, decoding=True), step=1)
                for label, place in (
                    ("one ahead", lambda p: p + (p[0] > 0)),
                    ("one behind", lambda p: p - (p[0] > 0)),
                    ("from zero again", lambda p: p - p[0]),
                )
            ),
        ),
    ),
)
