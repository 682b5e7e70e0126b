"""A ranker whose verdicts are written down as they come, so that a crash in the middle of a step loses none."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Final

import numpy as np

from sims_lens.files import Journal
from sims_lens.rankers.base import KEPT, CheckedRanker, Item, as_ranker

CHUNK: Final = 32
"""Prompts that a ranker with a ``rank_all`` of its own is asked about before their verdicts are written down."""


class RecordedRanker(CheckedRanker):
    """A ranker with a journal for one step of a run.

    Asked the same again in another process, it answers from the journal, and asks only from where that ends. A step
    that asks the same twice, to see whether the ranker is stable, has two verdicts there, and gets both in turn.

    Where a verdict takes many answers of a judge, as of an endpoint's that are paid for one by one, each of those is
    written down too. What is asked in one go stays so: scores of a model that judges in batches may depend, in their
    last bits, on the batch.

    Args:
        ranker: the ranker that is asked.
        journal: open for writing.
    """

    def __init__(self, ranker: CheckedRanker, journal: Journal) -> None:
        super().__init__(ranker.name, ranker.score, ranker.inner)
        self._become(ranker, journal, "rank", {})
        for row in journal.rows():
            if "part" in row:
                self._parts.setdefault(row["key"], {})[row["part"]] = row["answer"]
            else:
                self._answers.setdefault(row["key"], deque()).append(row["answer"])
                self._parts.pop(row["key"], None)

    def _become(self, ranker: CheckedRanker, journal: Journal, kind: str, answers: "dict[str, deque[Any]]") -> None:
        found = {"_ranker": ranker, "_journal": journal, "_kind": kind, "_answers": answers, "_parts": {}}
        for name, value in found.items():
            object.__setattr__(self, name, value)  # the class that it stands in for is frozen

    def __getattr__(self, name: str) -> Any:
        if name not in KEPT:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self._ranker, name)
        return {"matrix": self._matrix, "uncached": self._uncached}.get(name, found)

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """See :meth:`CheckedRanker.rank`."""
        (scores,) = self._answered([(prompt, responses)], lambda: [self._ranker.rank(prompt, responses)])
        return tuple(scores)

    def rank_all(self, items: Sequence[Item]) -> list[tuple[float, ...]]:
        """See :meth:`CheckedRanker.rank_all`."""
        step = CHUNK if callable(getattr(self.inner, "rank_all", None)) else 1
        found: list[tuple[float, ...]] = []
        for start in range(0, len(items), step):
            some = items[start : start + step]
            found += [tuple(scores) for scores in self._answered(some, partial(self._ranker.rank_all, some))]
        return found

    def _matrix(self, prompt: str, responses: Sequence[str]) -> Any:
        answer = self._answered(
            [(prompt, responses)], lambda: np.asarray(self._ranker.matrix(prompt, responses)).tolist(), "matrix"
        )
        return np.array(answer, dtype=np.float64)

    def _uncached(self) -> "RecordedRanker":
        """The ranker that answers anew, with a part of the journal of its own."""
        ranker = as_ranker(self._ranker.uncached())
        fresh = RecordedRanker.__new__(RecordedRanker)
        CheckedRanker.__init__(fresh, ranker.name, ranker.score, ranker.inner)
        fresh._become(ranker, self._journal, "fresh", self._answers)
        object.__setattr__(fresh, "_parts", self._parts)
        return fresh

    def _answered(self, items: Sequence[Item], ask: Callable[[], Any], what: str = "scores") -> Any:
        """The journal's next answer to a question; where there is none, the ranker's, which is written down."""
        text = json.dumps([self._kind, what, [[prompt, list(responses)] for prompt, responses in items]])
        key = hashlib.sha256(text.encode()).hexdigest()
        if known := self._answers.get(key):
            return known.popleft()
        keep = getattr(self._ranker, "keep", None)

        def tell(part: str, answer: Any) -> None:
            self._journal.append({"key": key, "part": part, "answer": answer})

        with keep(self._parts.pop(key, {}), tell) if callable(keep) else nullcontext():
            answer = ask()
        self._journal.append({"key": key, "answer": answer})
        return answer
