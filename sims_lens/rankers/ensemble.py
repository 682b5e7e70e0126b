"""Several rankers as one, with weights."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sims_lens.checks import check_list, shown
from sims_lens.errors import RankerError
from sims_lens.rankers.base import CheckedRanker, Item, as_ranker
from sims_lens.rankers.fingerprint import settings_of

Weighted = Mapping[Any, int | float] | Sequence[tuple[Any, int | float]]


class Ensemble:
    """Scores each response by the weighted mean of several rankers' standardised scores.

    Rankers have units of their own, so within each prompt's group of responses every ranker's scores are standardised
    first: mean 0, standard deviation 1. A ranker that sees no difference within a group has no say there. Hence a
    score says where a response stands among the others of its group, and can't be compared between prompts.

    Args:
        rankers: each ranker, of any shape that :func:`as_ranker` takes, with its weight: a mapping, or a sequence of
            pairs for rankers that can't be keys. Weights count relative to each other; a negative one makes a ranker's
            taste a distaste.
        name: by default made of the rankers' names and weights.

    Attributes:
        members: the checked rankers with their weights.
        count: what the members have spent so far, added up.

    Raises:
        RankerError: there is no ranker, or its weight is not a finite number other than 0.

    Reference:
        s_i = sum_r w_r (x_ri - mean_i x_ri) / sd_i(x_ri) / sum_r |w_r|, sd over the group (dividing by its size).

    Examples:
        >>> def short(prompt, responses):
        ...     return [-len(response) for response in responses]
        >>> def polite(prompt, responses):
        ...     return ["please" in response for response in responses]
        >>> ensemble = Ensemble([(short, 1), (polite, 3)])
        >>> ensemble.rank("Ask.", ["Come, please.", "Come."]), ensemble.name
        ((0.5, -0.5), 'ensemble(0.25 short + 0.75 polite)')
    """

    pointwise = False

    def __init__(self, rankers: Weighted, *, name: str | None = None) -> None:
        if isinstance(rankers, Mapping):
            pairs = list(rankers.items())
        else:
            pairs = list(check_list("rankers", rankers, "[(ranker, 1.0)]", RankerError))
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise RankerError(f"an ensemble is of (ranker, weight), got {shown(pairs)}")
        if not pairs:
            raise RankerError("an ensemble of no rankers; give at least one")
        self.members: tuple[tuple[CheckedRanker, float], ...] = tuple(
            (as_ranker(ranker), _weight(ranker, weight)) for ranker, weight in pairs
        )
        self._total = sum(abs(weight) for _, weight in self.members)
        self._name = name
        terms = " + ".join(f"{weight / self._total:.3g} {ranker.name}" for ranker, weight in self.members)
        self.name = name or f"ensemble({terms})"
        self.count = _Total([ranker for ranker, _ in self.members])

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores depend on, beside the texts."""
        return {"members": [[ranker.name, settings_of(ranker), weight] for ranker, weight in self.members]}

    @property
    def steered(self) -> bool:
        """Whether a member judges with the steered model."""
        return any(bool(getattr(ranker, "steered", False)) for ranker, _ in self.members)

    def bind(self, *args: Any, **kwargs: Any) -> "Ensemble":
        """Bind the members that can be bound; see :data:`sims_lens.rankers.base.KEPT`."""
        bound = [
            (ranker.bind(*args, **kwargs) if hasattr(ranker, "bind") else ranker, weight)
            for ranker, weight in self.members
        ]
        return Ensemble(bound, name=self._name)

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """Score the responses to one prompt.

        Args:
            prompt: what was asked.
            responses: what was answered.

        Returns:
            One score for each response; they add up to 0, and a single response has 0.
        """
        return self.rank_all([(prompt, responses)])[0]

    def rank_all(self, items: Sequence[Item]) -> list[tuple[float, ...]]:
        """Score the responses to many prompts, each member in one go where it can.

        Args:
            items: pairs of a prompt and the responses to it.

        Returns:
            The scores of each item's responses.
        """
        totals = [np.zeros(len(responses)) for _, responses in items]
        for ranker, weight in self.members:
            for total, scores in zip(totals, ranker.rank_all(items), strict=True):
                total += weight / self._total * standardised(np.array(scores))
        return [tuple(float(score) for score in total) for total in totals]


class _Total(Mapping[str, int]):
    """The sum of the members' counts, always up to date."""

    def __init__(self, rankers: Sequence[CheckedRanker]) -> None:
        self._rankers = rankers

    def _sum(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for ranker in self._rankers:
            spent = getattr(ranker, "count", {})
            total.update(spent if isinstance(spent, Mapping) else vars(spent))
        return dict(total)

    def __getitem__(self, key: str) -> int:
        return self._sum()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sum())

    def __len__(self) -> int:
        return len(self._sum())


def standardised(scores: Float[np.ndarray, " response"]) -> Float[np.ndarray, " response"]:
    """The scores with mean 0 and standard deviation 1; all 0 where they don't differ.

    Args:
        scores: one group's scores.

    Returns:
        A new array.
    """
    if len(scores) == 0:
        return scores.copy()
    scale = np.abs(scores).max()
    if scale == 0:
        return np.zeros_like(scores)
    centred = scores / scale - (scores / scale).mean()  # scaled first: squares of huge scores would overflow
    deviation = centred.std()
    return centred / deviation if deviation > 1e-12 else np.zeros_like(scores)


def _weight(ranker: object, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight == 0:
        raise RankerError(
            f"the weight of {as_ranker(ranker).name!r} is {weight!r}; make it a finite number other than 0, "
            "or leave the ranker out"
        )
    return float(weight)
