"""Which known mistake is behind a difference: the truth is run with one mistake at a time until one reproduces it.

A candidate that differs from the model is held against a float64 run of that model in which one mistake of
`npllama.check.mistakes` was made, operation by operation, each on the candidate's own inputs. A wrong guess departs
from the candidate at the first operation that either of the two mistakes touches, mostly in the first layer, and is
given up there. Whoever reaches the end is judged by the noise that rounding causes *with that mistake made*: without
its scale, a softmax is more sensitive than a sound one. Mistakes that explain a candidate about equally well are all
reported, and none is the diagnosis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from npllama.check.mistakes import DICTIONARY, Mistake
from npllama.check.pursuit import Case, Guess
from npllama.check.rerun import Rerun
from npllama.check.trace import TraceLike
from npllama.engine import Model
from npllama.errors import ParameterError
from npllama.rounding import with_rounded_inputs

Verdict = Literal["named", "no match", "too noisy to say"]

#: A mistake is named if all else, "no mistake" included, is this many times further off somewhere.
CLEAR = 10.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is behind a difference, as far as the dictionary knows.

    Attributes
    ----------
    verdict : str
        "named", "no match" or "too noisy to say".
    name : str or None
        Name of the mistake; None unless it is named.
    mistake : Mistake or None
        Its entry in the dictionary.
    way : str
        The way in which it was made, where there are several.
    margin : float or None
        How many times further off the next best explanation is where it is worst (squared error, at least); None
        without a best one.
    sentence : str
        The answer for a person.
    ranking : tuple of Guess
        Every guess: those that explain the candidate first, then the others in the order of how far they got.
    """

    verdict: Verdict
    name: str | None
    mistake: Mistake | None
    way: str
    margin: float | None
    sentence: str
    ranking: tuple[Guess, ...]


def diagnose(
    model: Model,
    candidate: TraceLike,
    reference: TraceLike | None = None,
    *,
    dictionary: Sequence[Mistake] = DICTIONARY,
    progress: Callable[[str, int, int], None] | None = None,
) -> Diagnosis:
    """Find the mistake that turns a model into a candidate.

    Parameters
    ----------
    model : Model
        The model as it should be, with the "float64" backend.
    candidate : TraceLike
        A run that differs from it. All its taps are used; the more there are, the sooner and the surer the answer.
    reference : TraceLike, optional
        What the candidate should have been: its tokens are run. By default those that the candidate names.
    dictionary : sequence of Mistake
        What to look for.
    progress : callable, optional
        Called as ``progress(what, done, total)``.

    Returns
    -------
    Diagnosis

    Raises
    ------
    ParameterError
        The model is not in float64, or does not have the tokens.
    ContextOverflowError
        There are more tokens than the model's context holds.
    """
    if model.backend != "float64":
        raise ParameterError(
            f"a diagnosis was asked of a model with the {model.backend} backend, expected float64",
            remedy='Load it with backend="float64".',
        )
    case = Case(candidate, _right_run(model, candidate, candidate if reference is None else reference))
    clean = case.clean
    guesses: list[Guess] = []
    ways = [(mistake, way) for mistake in dictionary for way in mistake.ways]
    for done, (mistake, way) in enumerate([] if clean.explains else ways):
        if progress:
            progress("Trying mistakes", done, len(ways))
        guess = case.pursue(mistake, way)
        if guess is not None:
            guesses.append(guess)
    if progress:
        progress("Trying mistakes", len(ways), len(ways))
    return _conclude(clean, sorted(guesses, key=_rank))


def _right_run(model: Model, candidate: TraceLike, given: TraceLike) -> Rerun:
    """Return the clean run of the right tokens, for as many decode steps as the candidate has."""
    tokens = tuple(given.tokens[: given.prefill + candidate.steps])
    outside = [token for token in tokens if not 0 <= token < model.config.vocab_size]
    if outside:
        raise ParameterError(
            f"the trace has token {outside[0]}, which is outside the model's vocabulary of {model.config.vocab_size}",
            remedy="Name the model that was run.",
        )
    run = Rerun.of(model, tokens, given.prefill)
    return run if candidate.dtype != "int8" else replace(run, ops=with_rounded_inputs(run.ops, "int8"))


def _rank(guess: Guess) -> tuple[float, int]:
    return guess.ratio, -guess.reach


def _conclude(clean: Guess, guesses: Sequence[Guess]) -> Diagnosis:
    """Draw the answer from guesses in their order."""
    everything = tuple(sorted([clean, *guesses], key=_rank))
    explaining = [guess for guess in guesses if guess.explains]
    if clean.explains:
        return _unnamed(
            "no match", None, "Every operation of the candidate is the model's, up to rounding.", everything
        )
    if not explaining:
        return _unnamed("no match", None, f"No known mistake explains this.{_hint(clean, guesses)}", everything)
    best = explaining[0]
    leads = {guess.label: best.lead_over(guess) for guess in everything if guess.name != best.name}
    margin = min(leads.values())
    rivals = [label for label, lead in leads.items() if lead < CLEAR]
    if rivals:
        sentence = (
            f"Too close to call between {', '.join([best.label, *rivals])}. "
            "Record more taps, or let the candidate compute in float32."
        )
        return _unnamed("too noisy to say", margin, sentence, everything)
    mistake, way = best.mistake, best.way
    assert mistake is not None
    assert way is not None
    sentence = f"{best.label}: {mistake.what} {mistake.shows} {mistake.fix}"
    return Diagnosis("named", mistake.name, mistake, way.label, margin, sentence, everything)


def _unnamed(verdict: Verdict, margin: float | None, sentence: str, ranking: tuple[Guess, ...]) -> Diagnosis:
    return Diagnosis(verdict, None, None, "", margin, sentence, ranking)


def _hint(clean: Guess, guesses: Sequence[Guess]) -> str:
    """Name the guess that agrees with the candidate beyond the first difference, if there is just one."""
    further = [guess for guess in guesses if guess.reach > clean.reach]
    names = {guess.name for guess in further}
    if len(names) != 1 or further[0].until is None:
        return ""
    tap, step = further[0].until
    return f" It agrees with {further[0].label} up to {tap} of step {step}: there may be a second mistake."
