"""Asking a ranker for an audit: past its memory where need be, with what it offers beside scores, and with a meter."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float

from sims_lens.cost import Cost, counted
from sims_lens.errors import RankerError
from sims_lens.prompts import quote
from sims_lens.rankers.base import CheckedRanker, Item, as_ranker
from sims_lens.rankers.cache import CachedRanker
from sims_lens.rankers.ensemble import Ensemble


class Asker:
    """A ranker that is being audited.

    Args:
        ranker: what :func:`~sims_lens.rankers.as_ranker` accepts.
    """

    def __init__(self, ranker: object) -> None:
        self.checked = as_ranker(ranker)
        self.name = self.checked.name
        self.judges = is_judge(self.checked)
        uncached = getattr(self.checked, "uncached", None)
        self.fresh = as_ranker(uncached()) if callable(uncached) else self.checked
        self.calls, self.seconds = 0, 0.0
        self.before = self._tokens()

    def rank(self, items: Sequence[Item], *, fresh: bool = False) -> list[tuple[float, ...]]:
        """The scores of each list; asked anew, past a cache, where ``fresh``."""
        with self._metered(len(items)):
            return (self.fresh if fresh else self.checked).rank_all(items)

    def matrices(self, items: Sequence[Item]) -> list[Float[np.ndarray, "_response _response"]]:
        """The single verdicts on each list, NaN where there is none; nothing for a ranker without a matrix."""
        matrix = getattr(self.checked, "matrix", None)
        if not callable(matrix):
            return []
        found = []
        for prompt, responses in items:
            where = f"ranker {self.name!r} on the prompt {quote(prompt)}"
            try:
                with self._metered(1):
                    given = matrix(prompt, list(responses))
            except RankerError:
                raise
            except Exception as error:  # whatever a user's function raises is reported as the ranker's failure
                raise RankerError(f"{where}: matrix raised {type(error).__name__}: {error}") from error
            found.append(_checked_matrix(where, given, len(responses)))
        return found

    def cost(self) -> Cost:
        """What was asked so far."""
        prefill, decode = (now - before for now, before in zip(self._tokens(), self.before, strict=True))
        return Cost(self.calls, self.seconds, prefill, decode)

    @contextmanager
    def _metered(self, calls: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.calls += calls
            self.seconds += time.perf_counter() - start

    def _tokens(self) -> tuple[int, int]:
        spent = counted(getattr(self.checked, "count", None))
        return spent.prefill, spent.decode


def is_judge(ranker: object) -> bool:
    """Whether a ranker, or one inside of it, says ``judges = True`` about itself."""
    said = getattr(ranker, "judges", None)
    if said is not None:
        return bool(said)
    if isinstance(ranker, CheckedRanker):
        return is_judge(ranker.inner)
    if isinstance(ranker, CachedRanker):
        return is_judge(ranker.ranker)
    return isinstance(ranker, Ensemble) and any(is_judge(member) for member, _ in ranker.members)


def _checked_matrix(where: str, given: Any, count: int) -> Float[np.ndarray, "response response"]:
    try:
        values = np.array(given.tolist() if hasattr(given, "tolist") else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RankerError(f"{where}: matrix returned something that is no matrix of numbers ({error})") from error
    if values.shape != (count, count):
        raise RankerError(
            f"{where}: matrix has the shape {values.shape} for {count} responses; return one row for each"
        )
    np.fill_diagonal(values, np.nan)  # a response against itself says nothing
    if ((values < 0) | (values > 1)).any():
        raise RankerError(f"{where}: matrix has entries outside 0..1; return P(row better | row shown first)")
    return values
