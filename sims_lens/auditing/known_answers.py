"""Pairs whose better half is known without anyone's annotation: a real response against a spoilt one.

They are easier than what a ranker is for (two real responses to one prompt): who fails here cannot be trusted there,
and who passes here may still fail there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

KINDS: Final = ("shuffled", "other prompt", "truncated")
"""How a response is spoilt: its words in another order; an answer to another prompt, as long as it; its first third."""

PER_KIND: Final = 2
"""Pairs of each kind for a prompt: one is shown with the real response first, the other with it second, so that a
preference for a position cancels within every prompt."""

MIN_WORDS: Final = 5
"""A response with fewer words is not spoilt surely enough ("Yes, please!" reads well in any order)."""

MIN_LETTERS: Final = 10
"""A response with fewer words than :data:`MIN_WORDS` but as many letters is spoilt by its letters: a single long word,
or a language without spaces."""


@dataclass(frozen=True)
class KnownPair:
    """A real response, and what is certainly worse.

    Args:
        prompt: index of the prompt.
        kind: one of :data:`KINDS`.
        real: a response to the prompt.
        spoilt: the other one.
        real_first: whether the real one is shown first.
    """

    prompt: int
    kind: str
    real: str
    spoilt: str
    real_first: bool

    @property
    def shown(self) -> tuple[str, str]:
        """The two texts in the order in which a ranker gets them."""
        return (self.real, self.spoilt) if self.real_first else (self.spoilt, self.real)


def known_pairs(responses: Sequence[Sequence[str]], *, seed: int = 0) -> list[KnownPair]:
    """Make :data:`PER_KIND` pairs of each kind for every prompt whose responses are long enough.

    Args:
        responses: for each prompt, its responses.
        seed: of the choice of responses and of the shuffles.
    """
    rng = np.random.default_rng(seed)
    fit = [sorted({text for text in texts if _units(text) is not None}) for texts in responses]
    everyone = [(index, text) for index, texts in enumerate(fit) for text in texts]
    pairs: list[KnownPair] = []
    for index, texts in enumerate(fit):
        others = [text for other, text in everyone if other != index and text not in responses[index]]
        for kind in KINDS:
            chosen = [texts[i] for i in rng.permutation(len(texts))[:PER_KIND]]
            chosen = (chosen * PER_KIND)[:PER_KIND]  # a single response stands in both orders
            first = bool(rng.integers(2))
            for place, real in enumerate(chosen):
                spoilt = _spoil(kind, real, others, rng)
                if spoilt is not None:
                    pairs.append(KnownPair(index, kind, real, spoilt, first == (place % 2 == 0)))
    return pairs


def shuffled(text: str, rng: np.random.Generator) -> str | None:
    """The text with its words in another order, its white space where it was; None where that makes no other text."""
    found = _units(text)
    if found is None:
        return None
    units, gaps = found
    for _ in range(10):
        result = _joined([units[i] for i in rng.permutation(len(units))], gaps)
        if result != text:
            return result
    return None


def truncated(text: str) -> str | None:
    """The first third of the text's words; None for a text that is too short."""
    found = _units(text)
    if found is None:
        return None
    units, gaps = found
    kept = len(units) // 3
    return _joined(units[:kept], [*gaps[:kept], ""])


def nearest_in_length(text: str, others: Sequence[str], rng: np.random.Generator) -> str | None:
    """The other text that is closest to this one in length, so that length is no clue; of several, any."""
    if not others:
        return None
    gaps = np.array([abs(len(other) - len(text)) for other in others])
    return others[int(rng.choice(np.flatnonzero(gaps == gaps.min())))]


def _spoil(kind: str, real: str, others: Sequence[str], rng: np.random.Generator) -> str | None:
    if kind == "shuffled":
        return shuffled(real, rng)
    return truncated(real) if kind == "truncated" else nearest_in_length(real, others, rng)


def _units(text: str) -> tuple[list[str], list[str]] | None:
    """Words, or letters where there are few words, and the white space around them; None for a text too short."""
    words = re.findall(r"\S+", text)
    if len(words) >= MIN_WORDS:
        return words, re.split(r"\S+", text)
    letters = list(text.strip())
    return (letters, [""] * (len(letters) + 1)) if len(letters) >= MIN_LETTERS else None


def _joined(units: Sequence[str], gaps: Sequence[str]) -> str:
    return "".join(gap + unit for gap, unit in zip(gaps, units, strict=False)) + gaps[-1]
