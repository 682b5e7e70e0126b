"""A recorded ranker answers from its journal, in turn, and asks only from where that ends."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sims_lens.errors import RankerError
from sims_lens.files import Journal
from sims_lens.rankers import RecordedRanker, as_ranker


class Spy:
    """Never says the same twice."""

    name = "spy"

    def __init__(self, most: int = 10**9) -> None:
        self.asked: list[str] = []
        self.most = most

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        if len(self.asked) >= self.most:
            raise ConnectionError("gone")
        self.asked.append(prompt)
        return [len(self.asked) + i / 3 for i, _ in enumerate(responses)]

    def matrix(self, prompt: str, responses: Sequence[str]) -> np.ndarray:
        return np.array([[np.nan, self.rank(prompt, "a")[0]], [0.1 + 0.2, np.nan]])

    def uncached(self) -> "Spy":
        return self


class Together(Spy):
    def rank_all(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        return [self.rank(prompt, responses) for prompt, responses in items]


ITEMS = [(f"p{i % 3}", ["a", "b"]) for i in range(5)]


def session(spy: Spy, path: Path) -> list[object]:
    with Journal(path).open() as journal:
        ranker = RecordedRanker(as_ranker(spy), journal)
        found: list[object] = [ranker.rank("p0", ["a", "b"]), *ranker.rank_all(ITEMS), ranker.rank("p0", ["a", "b"])]
        found.append(np.nan_to_num(ranker.matrix("q", ["a", "b"])).tolist())
        return [*found, ranker.uncached().rank("p0", ["a", "b"])]


@pytest.mark.parametrize("kind", [Spy, Together])
@pytest.mark.parametrize("most", range(10))
def test_a_step_that_is_broken_off_ends_with_the_same_verdicts(kind: type[Spy], most: int, tmp_path: Path) -> None:
    whole = session(kind(), tmp_path / "whole")
    broken = kind(most)
    if most < 9:
        with pytest.raises((RankerError, ConnectionError), match="gone"):
            session(broken, tmp_path / "j")
    kept = len(Journal(tmp_path / "j").read())
    broken.most = 10**9
    if kind is Spy:  # what is asked in one go comes in one go
        assert kept == most * (most < 9)
        assert session(broken, tmp_path / "j") == whole and len(broken.asked) == 9
    again = kind(0)
    assert session(again, tmp_path / "whole") == whole and again.asked == []


def test_many_prompts_in_one_go_are_written_down_some_at_a_time(tmp_path: Path) -> None:
    items = [(f"p{i}", ["a"]) for i in range(80)]
    with Journal(tmp_path / "j").open() as journal, pytest.raises(RankerError, match="gone"):
        RecordedRanker(as_ranker(Together(70)), journal).rank_all(items)
    spy = Together()
    with Journal(tmp_path / "j").open() as journal:
        RecordedRanker(as_ranker(spy), journal).rank_all(items)
    assert len(spy.asked) == 16
