"""Rankers made worse on purpose. Each wraps another ranker, and is one itself: give it to ``sims.improve``.

All of them score a response without looking at the others wherever the ranker inside does, so that steered and base
responses, which are ranked apart, can still be compared.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sims_lens.checks import check_number, is_number, shown
from sims_lens.errors import ConfigError
from sims_lens.rankers import CheckedRanker, as_ranker, bound_ranker
from sims_lens.rankers.fingerprint import settings_of

UNIT_WORDS = 10
"""Words that :class:`LengthBiased` counts as one unit of length: about the spread of replies of 40 tokens."""

_Self = TypeVar("_Self", bound="_Worse")


@dataclass(frozen=True)
class _Worse:
    """What the rankers of this module share: they pass on what the ranker inside says about itself."""

    ranker: object

    @property
    def inner(self) -> CheckedRanker:
        """The ranker inside, checked."""
        return as_ranker(self.ranker)

    @property
    def pointwise(self) -> bool:
        """Whether a response's score depends on no other response, as by the ranker inside."""
        said = getattr(self.inner, "pointwise", None)
        return not hasattr(self.inner, "matrix") if said is None else bool(said)

    @property
    def steered(self) -> bool:
        """Whether the ranker inside judges with the steered model."""
        return bool(getattr(self.inner, "steered", False))

    def bind(self: _Self, model: Any) -> _Self:
        """The same fault in the ranker inside, once that judges with this model."""
        return replace(self, ranker=bound_ranker(self.ranker, model))

    def _settings(self, *own: Any) -> list[Any]:
        return [self.inner.name, settings_of(self.inner), *own]


@dataclass(frozen=True)
class Noisy(_Worse):
    """A ranker that is wrong about a share of the prompts: there its ranking is turned round, best against worst.

    Which prompts, is drawn from the prompt's text and the seed, so that asking again gives the same answer, whatever
    the responses are: as a judge who misunderstands a question does. The scores of such a prompt change their sign.
    Contrast pairs of one iteration are then swapped with probability ``epsilon``, independently of each other, as the
    theory of :func:`sims_lens.lab.oracle_noise` has it. Noise that is drawn anew in every iteration averages out over
    iterations; this does not.

    Args:
        ranker: any that ``sims.improve`` accepts.
        epsilon: probability, 0 to 1. At 0.5 nothing can be learnt, at 1 it is :class:`Reversed`.
        seed: of the draw.

    Raises:
        ConfigError: ``epsilon`` is not in 0..1.

    >>> from sims_lens.rankers import ReadingEase
    >>> worse, texts = Noisy(ReadingEase(), 1.0), ["We met.", "Ubiquitous contentment."]
    >>> worse.rank("Say.", texts) == tuple(-score for score in ReadingEase().rank("Say.", texts))
    True
    """

    epsilon: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.epsilon) or not 0.0 <= self.epsilon <= 1.0:
            raise ConfigError(f"epsilon must be a probability from 0 to 1, got {shown(self.epsilon)}")

    @property
    def name(self) -> str:
        """In reports."""
        return f"{self.inner.name}, noisy {self.epsilon:g}"

    @property
    def settings(self) -> list[Any]:
        """What the scores depend on."""
        return self._settings(self.epsilon, self.seed)

    def flips(self, prompt: str) -> bool:
        """Whether the ranking of the responses to a prompt is turned round."""
        digest = hashlib.sha256(f"noisy\0{self.seed}\0{prompt}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.epsilon * 2**64

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """The scores of the ranker inside, or their negatives. See :class:`~sims_lens.rankers.Ranker`."""
        sign = -1.0 if self.flips(prompt) else 1.0
        return tuple(sign * score for score in self.inner.rank(prompt, responses))


@dataclass(frozen=True)
class Reversed(_Worse):
    """An adversary: the best response is called the worst.

    Args:
        ranker: any that ``sims.improve`` accepts.
    """

    @property
    def name(self) -> str:
        """In reports."""
        return f"{self.inner.name}, reversed"

    @property
    def settings(self) -> list[Any]:
        """What the scores depend on."""
        return self._settings()

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """The negative scores of the ranker inside. See :class:`~sims_lens.rankers.Ranker`."""
        return tuple(-score for score in self.inner.rank(prompt, responses))


@dataclass(frozen=True)
class LengthBiased(_Worse):
    """A ranker that likes long responses: to each score it adds ``weight`` for every :data:`UNIT_WORDS` words.

    The unit of length is fixed, so that the score of a response does not hang on the ones it is shown with.

    Args:
        ranker: any that ``sims.improve`` accepts.
        weight: in the ranker's units; a negative one likes short responses.

    Raises:
        ConfigError: ``weight`` is not a finite number.
    """

    weight: float

    def __post_init__(self) -> None:
        _finite("weight", self.weight)

    @property
    def name(self) -> str:
        """In reports."""
        return f"{self.inner.name}, length {self.weight:+g}"

    @property
    def settings(self) -> list[Any]:
        """What the scores depend on."""
        return self._settings(self.weight)

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """Score plus weight times length. See :class:`~sims_lens.rankers.Ranker`."""
        honest = self.inner.rank(prompt, responses)
        return tuple(s + self.weight * len(r.split()) / UNIT_WORDS for s, r in zip(honest, responses, strict=True))


@dataclass(frozen=True)
class Loophole(_Worse):
    """A ranker with a known loophole: something worthless that it pays for.

    Args:
        ranker: any that ``sims.improve`` accepts.
        loophole: a phrase, paid for each time that it occurs (whatever its case), or a function from a response to how
            often it is to be paid.
        bonus: for each occurrence, in the ranker's units.

    Raises:
        ConfigError: the phrase is empty, or ``bonus`` is not a finite number.

    >>> from sims_lens.rankers import ReadingEase
    >>> cheated = Loophole(ReadingEase(), "!", bonus=5.0)
    >>> a, b = cheated.rank("Say.", ["We met!!", "We met."])
    >>> round(a - b, 6)
    10.0
    """

    loophole: str | Callable[[str], float]
    bonus: float

    def __post_init__(self) -> None:
        _finite("bonus", self.bonus)
        if not self.loophole or not (isinstance(self.loophole, str) or callable(self.loophole)):
            raise ConfigError(f"loophole must be a phrase, or a function of a response; got {self.loophole!r}")

    @property
    def name(self) -> str:
        """In reports."""
        what = self.loophole if isinstance(self.loophole, str) else getattr(self.loophole, "__name__", "function")
        return f"{self.inner.name}, loophole {what}"

    @property
    def settings(self) -> list[Any]:
        """What the scores depend on; of a function its name only."""
        return self._settings(self.name, self.bonus)

    def uses(self, response: str) -> float:
        """How often a response uses the loophole."""
        if isinstance(self.loophole, str):
            return float(response.casefold().count(self.loophole.casefold()))
        return float(self.loophole(response))

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """Score plus bonus times use of the loophole. See :class:`~sims_lens.rankers.Ranker`."""
        honest = self.inner.rank(prompt, responses)
        return tuple(s + self.bonus * self.uses(r) for s, r in zip(honest, responses, strict=True))


def _finite(name: str, value: object) -> None:
    check_number(name, value)


__all__ = ["UNIT_WORDS", "LengthBiased", "Loophole", "Noisy", "Reversed"]
