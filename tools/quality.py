"""What storage formats cost: how well a model predicts a text when its matrices are stored in each of them.

Every format's numbers run through the same engine, so only the numbers differ: npllama's own formats as they are
stored; those of GGUF by encoding the float32 matrices with the ``gguf`` package and decoding them again, or from a
GGUF file that llama.cpp's quantiser wrote. The measures, over the tokens of the text:

- perplexity, and by how much it exceeds that of float32;
- KL, the mean of ``sum_v p(v) ln(p(v) / q(v))`` in nats, where p are the probabilities with float32 weights;
- the share of tokens for which the most probable successor is the same;
- SQNR, the signal-to-noise ratio of Gaussian weights in that format, in dB. (A model that was published in 4 bits says
  little about 4-bit formats: one that happens to contain its own is exact.)

With ``--activations`` the inputs of products are rounded, too, but for those of the exact model.

    python tools/quality.py smollm2.gguf --file Q4_K_M=smollm2.Q4_K_M.gguf
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import npllama
from npllama.checkpoint.audit import Error
from npllama.checkpoint.convert import convert_checkpoint
from npllama.checkpoint.open import open_checkpoint
from npllama.checkpoint.quantize import quantize
from npllama.checkpoint.store import Store
from npllama.checkpoint.tensor import Checkpoint, TensorRef
from npllama.dtypes import PACKINGS, Array, Tensor, narrow, widen
from npllama.engine import Model
from npllama.rounding import ACTIVATIONS

TEXT = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "alice.txt"
_WINDOW = 512
#: npllama's formats: what `npllama.convert` calls them, and what they are.
_OWN = {"f32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}
_GGUF = ("Q8_0", "Q4_0", "Q4_1")


@dataclass(frozen=True)
class Quality:
    """A row of the table.

    Attributes
    ----------
    format : str
    bits : float
        For each weight, all tensors counted.
    perplexity : float
    excess, error : float
        Of the perplexity over float32's, in percent, and its standard error.
    kl : float
        Mean over the tokens, in nats.
    same : float
        Share of tokens with the same most probable successor, in percent.
    sqnr : float or None
        Of Gaussian weights, in dB; None for a format that is only known from a file.
    """

    format: str
    bits: float
    perplexity: float
    excess: float
    error: float
    kl: float
    same: float
    sqnr: float | None


def windows(tokens: Sequence[int]) -> Iterator[Array]:
    """Cut tokens into windows; the first token of each is context only."""
    for start in range(0, len(tokens) - 1, _WINDOW - 1):
        yield np.array(tokens[start : start + _WINDOW])


def measure(name: str, bits: float, sqnr: float | None, exact: Model, model: Model, tokens: Sequence[int]) -> Quality:
    """Compare a model's predictions with those of the exact one."""
    scores: list[Array] = []
    reference: list[Array] = []
    kl: list[Array] = []
    same: list[Array] = []
    for window in windows(tokens):
        p, q = (_log_softmax(one.forward(window)[:-1]) for one in (exact, model))  # (T - 1, V)
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
        for found, logits in ((reference, p), (scores, q)):
            found.append(logits[np.arange(len(logits)), window[1:]])
    lost = np.concatenate(reference) - np.concatenate(scores)
    return Quality(
        name,
        bits,
        math.exp(-float(np.concatenate(scores).mean())),
        100 * math.expm1(float(lost.mean())),
        100 * float(lost.std()) / math.sqrt(lost.size),
        float(np.concatenate(kl).mean()),
        100 * float(np.concatenate(same).mean()),
        sqnr,
    )


def _log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def gaussian_sqnr(there_and_back: Callable[[Array], Array]) -> float | None:
    """Signal-to-noise ratio of Gaussian weights, in dB."""
    weights = (np.random.default_rng(0).normal(size=(512, 2048)) * 0.02).astype(np.float32)
    wide = weights.astype(np.float64)
    lost = wide - there_and_back(weights)
    return Error(squared=float(np.square(lost).sum()), signal=float(np.square(wide).sum())).sqnr


def own(dtype: str) -> Callable[[Array], Array]:
    """Return the function that stores numbers in one of npllama's dtypes and reads them again."""

    def there_and_back(values: Array) -> Array:
        if dtype not in PACKINGS:
            return widen(narrow(values, dtype), dtype)
        data, scales, *minima = quantize(values, dtype)
        return Tensor(data, dtype, scales, minima[0] if minima else None, values.shape[-1]).numbers()

    return there_and_back


def ggml(kind: str) -> Callable[[Array], Array]:
    """Return the same for one of GGUF's formats."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    return lambda values: gguf.quants.dequantize(gguf.quants.quantize(values, number), number)


def ggml_bits(kind: str) -> float:
    """Bits of a number in one of GGUF's formats."""
    import gguf

    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return 8 * int(size) / int(numbers)


def through(checkpoint: Checkpoint, there_and_back: Callable[[Array], Array]) -> Checkpoint:
    """Return a checkpoint whose matrices are read by way of another format."""

    def changed(ref: TensorRef) -> TensorRef:
        def read_rows(start: int, stop: int) -> Array:
            return there_and_back(widen(ref.read_rows(start, stop), ref.dtype))

        return ref if len(ref.shape) < 2 else replace(ref, dtype="float32", read_rows=read_rows)

    return replace(checkpoint, tensors={name: changed(ref) for name, ref in checkpoint.tensors.items()})


def bits_of(tensors: Iterable[tuple[tuple[int, ...], float]]) -> float:
    """Bits for each number, given the tensors' shapes and bytes."""
    shapes, sizes = zip(*tensors, strict=True)
    return 8 * sum(sizes) / sum(math.prod(shape) for shape in shapes)


def candidates(
    checkpoint: Checkpoint, folder: Path, files: Mapping[str, str]
) -> Iterator[tuple[str, float, float | None, Path]]:
    """Yield name, bits, SQNR and model folder of every format; each folder lives until the next."""

    def converted(source: Checkpoint, dtype: str) -> Path:
        return convert_checkpoint(source, folder / "model", dtype=dtype, force=True)

    for name, dtype in _OWN.items():
        store = Store.open(converted(checkpoint, name))
        bits = bits_of((entry.shape, entry.data_bytes) for entry in store.entries.values())
        yield name, bits, None if dtype == "float32" else gaussian_sqnr(own(dtype)), store.path
    for kind in _GGUF:
        yield kind, ggml_bits(kind), gaussian_sqnr(ggml(kind)), converted(through(checkpoint, ggml(kind)), "f32")
    for name, file in files.items():
        other = open_checkpoint(file)
        bits = bits_of((ref.shape, ref.nbytes) for ref in other.tensors.values())
        yield name, bits, None, converted(other, "f32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("checkpoint", help="the model, in the best numbers that there are")
    parser.add_argument("--text", type=Path, default=TEXT, help="text to predict (default: %(default)s)")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=GGUF", help="one more format, as a file")
    parser.add_argument("--activations", choices=ACTIVATIONS, default="float32", help="what inputs are rounded to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON, too")
    options = parser.parse_args(arguments)
    checkpoint = open_checkpoint(options.checkpoint)
    rows: list[Quality] = []
    print(f"{'format':10}{'bits':>7}{'perplexity':>12}{'excess %':>10}{'±':>7}{'KL':>10}{'same %':>9}{'SQNR dB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        exact = npllama.load(convert_checkpoint(checkpoint, Path(folder, "exact"), dtype="f32"))
        tokens = exact.tokenizer.encode(options.text.read_text(encoding="utf-8"))
        files = dict(pair.split("=", 1) for pair in options.file)
        for name, bits, sqnr, store in candidates(checkpoint, Path(folder), files):
            row = measure(name, bits, sqnr, exact, npllama.load(store, activations=options.activations), tokens)
            rows.append(row)
            shown = "" if sqnr is None else f"{sqnr:9.1f}"
            print(
                f"{name:10}{bits:7.2f}{row.perplexity:12.3f}{row.excess:10.3f}{row.error:7.3f}{row.kl:10.5f}{row.same:9.2f}{shown}"
            )
    print(f"{len(tokens)} tokens, in windows of {_WINDOW}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
