"""What was measured, and the table that it makes.

Results are plain JSON: ``machine``, ``shape``, ``prompt``, ``decode``; ``engines``, by key, each with what its worker
said or why it is ``unavailable``; ``rounds``, each by key with ``prefill`` and ``decode`` in tokens per second and
``read`` in bytes per second, measured one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median
from typing import Any

from tools.peers.engines import ENGINES, OWN, Engine

Results = dict[str, Any]

_PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Row:
    """One engine in the table.

    Attributes
    ----------
    prefill, decode : float or None
        Tokens per second, median over the rounds.
    prefill_ratio, decode_ratio : float or None
        npllama at as many bits by this engine: above 1 npllama is faster. Median over the rounds that had both.
    rounded_prefill_ratio, rounded_decode_ratio : float or None
        The same for npllama with rounded activations: in bfloat16 or int8, whichever was faster.
    share : float or None
        Of the memory bandwidth that decoding took, median over the rounds.
    agreement : float or None
        Correlation of its logits with those of npllama in the most exact format that was run.
    unavailable : str or None
        Why there are no figures.
    """

    engine: Engine
    prefill: float | None
    decode: float | None
    prefill_ratio: float | None
    decode_ratio: float | None
    rounded_prefill_ratio: float | None
    rounded_decode_ratio: float | None
    share: float | None
    agreement: float | None
    unavailable: str | None


def rows(results: Results) -> list[Row]:
    """Return a row for every engine that was asked for, in the order of the table of engines."""
    own = {engine.bits: key for key, engine in ENGINES.items() if engine.name == OWN and not engine.rounds}
    rounding: dict[int, list[str]] = {}
    for key, engine in ENGINES.items():
        if engine.rounds:
            rounding.setdefault(engine.bits, []).append(key)
    reference = _reference(results)
    return [
        Row(
            engine,
            *(_typical(entry[key][phase] for entry in results["rounds"] if key in entry) for phase in _PHASES),
            *(_ratio(results, own[engine.bits], key, phase) for phase in _PHASES),
            *(_best_ratio(results, rounding.get(engine.bits, ()), key, phase) for phase in _PHASES),
            _share(results, key),
            _correlation(reference, results["engines"][key].get("logits")),
            results["engines"][key].get("unavailable"),
        )
        for key, engine in ENGINES.items()
        if key in results["engines"]
    ]


def merged(old: Results, new: Results) -> Results:
    """Return results with the rounds of both; what is known of an engine is what was said last.

    Raises
    ------
    ValueError
        They are of different machines, models or sizes.
    """
    for name in ("machine", "shape", "prompt", "decode"):
        if old[name] != new[name]:
            raise ValueError(f"{name} was {old[name]}, and now is {new[name]}")
    return {**new, "engines": {**old["engines"], **new["engines"]}, "rounds": [*old["rounds"], *new["rounds"]]}


def as_json(results: Results) -> dict[str, Any]:
    """Return the table with all that it was made of."""
    table = [
        {"engine": row.engine.name, "format": row.engine.format, "bits": row.engine.bits}
        | {name: getattr(row, name) for name in Row.__dataclass_fields__ if name != "engine"}
        for row in rows(results)
    ]
    engines = {
        key: {name: value for name, value in known.items() if name != "logits"}
        for key, known in results["engines"].items()
    }
    return {**results, "engines": engines, "bandwidth": _bandwidth(results), "table": table}


def as_text(results: Results) -> str:
    """Return the table in Markdown, with a line on the machine above it and the engines' versions below."""
    machine = results["machine"]
    bandwidth = _bandwidth(results)
    phases = " | ".join(f"{phase} tok/s | npllama is | rounded" for phase in _PHASES)
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads"
        + (f", reading memory at {bandwidth / 1e9:.1f} GB/s" if bandwidth else "")
        + f"; {results['shape']}, {results['prompt']} tokens of prompt, {len(results['rounds'])} rounds",
        "",
        f"| engine | weights | {phases} | bandwidth | logits |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows(results)),
        "",
    ]
    versions = {entry["version"]: None for entry in results["engines"].values() if "version" in entry}
    return "\n".join([*lines, *(f"- {version}" for version in versions)])


def _line(row: Row) -> str:
    head = f"| {row.engine.name} | {row.engine.format} |"
    if row.unavailable is not None:
        return f"{head} not available: {row.unavailable} | | | | | | | |"
    ratios = [
        "" if ratio is None or row.engine.name == OWN else f"{ratio:.2f} x"
        for ratio in (
            row.prefill_ratio,
            row.rounded_prefill_ratio,
            row.decode_ratio,
            row.rounded_decode_ratio,
        )
    ]
    cells = (
        _speed(row.prefill),
        *ratios[:2],
        _speed(row.decode),
        *ratios[2:],
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.agreement is None else f"{row.agreement:.4f}",
    )
    return f"{head} {' | '.join(cells)} |"


def _speed(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def _typical(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def _ratio(results: Results, own: str, key: str, phase: str) -> float | None:
    both = (entry for entry in results["rounds"] if own in entry and key in entry)
    return _typical(entry[own][phase] / entry[key][phase] for entry in both)


def _best_ratio(results: Results, own: Iterable[str], key: str, phase: str) -> float | None:
    return max(filter(None, (_ratio(results, mine, key, phase) for mine in own)), default=None)


def _share(results: Results, key: str) -> float | None:
    known: Mapping[str, Any] = results["engines"][key]
    if "weight_bytes" not in known:
        return None
    positions = results["prompt"] + (results["decode"] + 1) / 2
    size = known["weight_bytes"] + known["position_bytes"] * positions
    return _typical(size * entry[key]["decode"] / entry[key]["read"] for entry in results["rounds"] if key in entry)


def _bandwidth(results: Results) -> float | None:
    return _typical(sample["read"] for entry in results["rounds"] for sample in entry.values())


def _reference(results: Results) -> list[float] | None:
    own = sorted((engine for engine in ENGINES.values() if engine.name == OWN), key=lambda engine: -engine.bits)
    known = (results["engines"].get(engine.key, {}).get("logits") for engine in own)
    return next((logits for logits in known if logits), None)


def _correlation(a: list[float] | None, b: list[float] | None) -> float | None:
    if not a or not b:
        return None
    mean_a, mean_b = fmean(a), fmean(b)
    product = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return product / sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
