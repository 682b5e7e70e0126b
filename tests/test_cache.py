"""Cached verdicts: never asked twice, in one process or several, and never mixed up."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sims_lens.errors import RankerError
from sims_lens.files import parsed
from sims_lens.rankers import CachedRanker, Ensemble, ReadingEase, Vader, as_ranker
from sims_lens.rankers.base import CheckedRanker
from sims_lens.rankers.cache import JOURNAL
from sims_lens.rankers.fingerprint import canonical


class Spy:
    """Scores by length, and remembers what it was asked."""

    name = "spy"

    def __init__(self, *, pointwise: bool = False, factor: float = 1.0, settings: object = "as made") -> None:
        self.pointwise, self.factor, self.settings = pointwise, factor, settings
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        self.asked.append((prompt, tuple(responses)))
        return [self.factor * len(response) / 3 for response in responses]

    def matrix(self, prompt: str, responses: Sequence[str]) -> str:
        return "asked anew"


class Together(Spy):
    def rank_all(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        return [self.rank(prompt, responses) for prompt, responses in items]


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    spy = Spy()
    cached = CachedRanker(spy, tmp_path)
    first = cached.rank("p", ["a", "bbb"])
    assert first == (1 / 3, 1.0)
    assert cached.rank("p", ["a", "bbb"]) == first and len(spy.asked) == 1
    assert (cached.hits, cached.misses) == (1, 1)
    again = CachedRanker(spy, tmp_path)  # a resumed run
    assert again.rank("p", ["a", "bbb"]) == first and len(spy.asked) == 1
    assert (again.hits, again.misses) == (1, 0)


def test_a_group_is_known_as_a_whole_and_in_its_order(tmp_path: Path) -> None:
    spy = Spy()
    cached = CachedRanker(spy, tmp_path)
    for prompt, group in (("p", ["a", "b"]), ("p", ["b", "a"]), ("p", ["a"]), ("q", ["a", "b"]), ("pa", ["b"])):
        cached.rank(prompt, group)
    assert len(spy.asked) == 5 and cached.misses == 5


def test_a_pointwise_ranker_is_known_by_single_responses(tmp_path: Path) -> None:
    spy = Spy(pointwise=True)
    cached = CachedRanker(spy, tmp_path)
    assert cached.rank("p", ["a", "bb", "a"]) == (1 / 3, 2 / 3, 1 / 3)
    assert spy.asked == [("p", ("a", "bb"))] and (cached.hits, cached.misses) == (1, 2)
    assert cached.rank("p", ["ccc", "bb"]) == (1.0, 2 / 3)
    assert spy.asked[1:] == [("p", ("ccc",))]


@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("kind", [Spy, Together])
def test_many_prompts_are_scored_like_one_by_one(tmp_path: Path, kind: type[Spy], pointwise: bool) -> None:
    items = [(f"p{i % 40}", ["a" * (i % 7), "b" * (i % 3)]) for i in range(60)] + [("none", [])]
    spy = kind(pointwise=pointwise)
    cached = CachedRanker(spy, tmp_path)
    expected = [as_ranker(kind()).rank(*item) for item in items]
    assert as_ranker(cached).rank_all(items) == expected
    asked = len(spy.asked)
    assert cached.rank_all(items) == expected and len(spy.asked) == asked
    assert sorted(as_ranker(CachedRanker(spy, tmp_path)).rank_all(items)) == sorted(expected)
    assert len(spy.asked) == asked


@pytest.mark.parametrize("kind", [Spy, Together])
def test_a_failure_loses_little(tmp_path: Path, kind: type[Spy]) -> None:
    class Failing(kind):  # type: ignore[misc, valid-type]
        left = 50

        def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
            if self.left == 0:
                raise ConnectionError("gone")
            self.left -= 1
            found: list[float] = super().rank(prompt, responses)
            return found

    items = [(f"p{i}", ["a", "b"]) for i in range(64)]
    with pytest.raises(RankerError, match="ConnectionError: gone"):
        CachedRanker(Failing(), tmp_path).rank_all(items)
    spy = kind()
    CachedRanker(spy, tmp_path).rank_all(items)
    assert len(spy.asked) == (14 if kind is Spy else 32)


# --- the journal -----------------------------------------------------------------------------------------------------


def test_a_line_that_a_crash_cut_off_is_skipped_and_swallows_nothing(tmp_path: Path) -> None:
    spy = Spy()
    cached = CachedRanker(spy, tmp_path)
    cached.rank("p", ["a"])
    cached.rank("q", ["bb"])
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    resumed = CachedRanker(spy, tmp_path)
    assert resumed.rank("p", ["a"]) == (1 / 3,) and len(spy.asked) == 2
    assert resumed.rank("q", ["bb"]) == (2 / 3,) and len(spy.asked) == 3
    third = CachedRanker(spy, tmp_path)
    third.rank_all([("p", ["a"]), ("q", ["bb"])])
    assert len(spy.asked) == 3 and (third.hits, third.misses) == (2, 0)


def test_a_journal_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    spy = Spy()
    CachedRanker(spy, tmp_path).rank("p", ["a"])
    (row,) = map(parsed, (tmp_path / JOURNAL).read_bytes().splitlines())
    ((key, scores),) = row["verdicts"].items()
    (tmp_path / JOURNAL).write_text(json.dumps({"key": key, "ranker": row["ranker"], "scores": scores}) + "\n")
    assert CachedRanker(spy, tmp_path).rank("p", ["a"]) == (1 / 3,) and len(spy.asked) == 1


def test_a_verdict_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    spy = Spy()
    CachedRanker(spy, tmp_path).rank("p", ["a"])
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes().replace(b"0.333", b"0.433"))
    assert CachedRanker(spy, tmp_path).rank("p", ["a"]) == (1 / 3,) and len(spy.asked) == 2


@pytest.mark.parametrize("line", ["", "{}", "[]", "null", '{"key": "k", "scores": 3}', '{"key": "k"', "\x00\xff", "7"])
def test_lines_that_are_no_verdicts_are_skipped(tmp_path: Path, line: str) -> None:
    spy = Spy()
    CachedRanker(spy, tmp_path).rank("p", ["a"])
    journal = tmp_path / JOURNAL
    journal.write_bytes(line.encode() + b"\n" + journal.read_bytes())
    assert CachedRanker(spy, tmp_path).rank("p", ["a"]) == (1 / 3,) and len(spy.asked) == 1


def test_the_journal_has_no_text_in_it(tmp_path: Path) -> None:
    CachedRanker(Spy(), tmp_path).rank("secret prompt", ["secret response \ud800"])
    (row,) = map(parsed, (tmp_path / JOURNAL).read_bytes().splitlines())
    assert sorted(row) == ["ranker", "verdicts"] and "secret" not in json.dumps(row)


def test_what_another_process_writes_is_seen(tmp_path: Path) -> None:
    one, two = Spy(), Spy()
    first, second = CachedRanker(one, tmp_path), CachedRanker(two, tmp_path)
    first.rank("p", ["a"])
    assert second.rank("p", ["a"]) == (1 / 3,) and two.asked == []


def _fill(folder: str, start: int) -> int:
    spy = Spy()
    cached = CachedRanker(spy, folder)
    for i in range(40):
        cached.rank(f"p{(start + i) % 60}", ["a" * i])
        cached.rank("shared", ["x" * (i % 10)])
    return len(spy.asked)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    code = "import sys, test_cache; test_cache._fill(sys.argv[1], int(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen([*command, start], cwd=Path(__file__).parent) for start in ("0", "20")]
    _fill(str(tmp_path), 40)
    assert [process.wait(timeout=100) for process in started] == [0, 0]
    rows = [parsed(line) for line in (tmp_path / JOURNAL).read_bytes().splitlines()]
    assert len({key for row in rows for key in row["verdicts"]}) == 3 * 40 + 10
    assert _fill(str(tmp_path), 20) == 0


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RankerError, match="verdicts can't be kept in .*file"):
        CachedRanker(Spy(), tmp_path / "file" / "folder")
    cached = CachedRanker(Spy(), tmp_path)
    (tmp_path / JOURNAL).mkdir()
    with pytest.raises(RankerError, match=f"{JOURNAL} can't be written"):
        cached.rank("p", ["a"])
    with pytest.raises(RankerError, match="bare string 'one'|are a bare string"):
        cached.rank("p", "one")


def test_a_lock_that_is_held_is_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr("sims_lens.rankers.cache._PATIENCE", 0.1)
    with FileLock(tmp_path / f"{JOURNAL}.lock"), pytest.raises(RankerError, match="locked by another process"):
        CachedRanker(Spy(), tmp_path).rank("p", ["a"])


# --- what scores depend on -------------------------------------------------------------------------------------------


def test_another_name_or_setting_is_another_ranker(tmp_path: Path) -> None:
    class Other(Spy):
        name = "other"

    for spy in (Spy(), Spy(settings={"factor": 2}), Other()):
        CachedRanker(spy, tmp_path).rank("p", ["a"])
        assert len(spy.asked) == 1
    changing = Spy(settings={"plan": 1})
    cached = CachedRanker(changing, tmp_path)
    for plan in (1, 2, 1):
        changing.settings = {"plan": plan}
        cached.rank("p", ["a"])
    assert len(changing.asked) == 2
    given = Spy()
    CachedRanker(given, tmp_path, settings="mine").rank("p", ["a"])
    CachedRanker(given, tmp_path, settings="mine").rank("p", ["a"])
    assert len(given.asked) == 1


def make(factor: float) -> Callable[[str, Sequence[str]], list[float]]:
    def closed(prompt: str, responses: Sequence[str]) -> list[float]:
        return [factor * len(response) for response in responses]

    return closed


def with_default(prompt: str, responses: Sequence[str], *, factor: float = 1.0) -> list[float]:
    return [factor * len(response) for response in responses]


@dataclass(frozen=True)
class Weighted:
    factor: float = 1.0

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return [self.factor * len(response) for response in responses]


class Plain:
    LIMIT = 3

    def __call__(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return [self._one(response) for response in responses]

    def _one(self, response: str) -> float:
        return float(min(len(response), self.LIMIT))


class Wider(Plain):
    LIMIT = 4


class Rewritten(Plain):
    def _one(self, response: str) -> float:
        return -float(len(response))


SET = {"one", "two", "three"}


def chooses(prompt: str, responses: Sequence[str]) -> list[float]:
    return [float(response in {"one", "two", "three"}) for response in responses]


RANKERS = [
    make(1.0),
    make(2.0),
    with_default,
    functools.partial(with_default, factor=3.0),
    Weighted(),
    Weighted(2.0),
    Weighted().rank,
    Plain(),
    Wider(),
    Rewritten(),
    chooses,
    lambda prompt, responses: [1.0 for _ in responses],
    lambda prompt, responses: [2.0 for _ in responses],
    ReadingEase(),
    Vader(),
    Ensemble([(Weighted(), 1.0), (chooses, 1.0)]),
    Ensemble([(Weighted(), 1.0), (chooses, 2.0)]),
]


def test_rankers_that_differ_are_told_apart_and_others_are_not() -> None:
    found = [canonical(as_ranker(ranker)) for ranker in RANKERS]
    assert len(set(found)) == len(found)
    assert found == [canonical(as_ranker(ranker)) for ranker in RANKERS]
    assert canonical(as_ranker(make(1.0))) == found[0] and canonical(as_ranker(Weighted(2.0))) == found[5]


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = "from test_cache import *; print(json.dumps([canonical(as_ranker(ranker)) for ranker in RANKERS]))"
    command = [sys.executable, "-c", code]
    seed = {**os.environ, "PYTHONHASHSEED": "7"}  # sets have another order there
    done = subprocess.run(command, cwd=Path(__file__).parent, env=seed, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [canonical(as_ranker(ranker)) for ranker in RANKERS]


class Slotted:
    __slots__ = ("factor",)

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return [0.0]


class Holding:
    def __init__(self, held: object) -> None:
        self.held = held

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return [0.0 for _ in responses]


@pytest.mark.parametrize(
    ("ranker", "message"),
    [
        (Slotted(), "it is a test_cache.Slotted, whose state is hidden"),
        (Holding(object()), "it holds a builtins.object"),
        (Holding(Holding(1)), "it holds a test_cache.Holding"),
        (make(object()), "it holds a builtins.object"),  # type: ignore[arg-type]
        (Spy(settings=object()), "the settings of the ranker 'spy' don't fit into JSON"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_ranker_with_a_hidden_state_is_refused(tmp_path: Path, ranker: object, message: str) -> None:
    with pytest.raises(RankerError, match=message):
        CachedRanker(ranker, tmp_path)
    CachedRanker(ranker, tmp_path, settings={"version": 1})


def test_a_steered_judge_is_refused(tmp_path: Path) -> None:
    class Steered(Spy):
        steered = True

    for ranker in (Steered(), Ensemble([(Steered(), 1.0)])):
        with pytest.raises(RankerError, match="judges with the steered model and the plan changes"):
            CachedRanker(ranker, tmp_path, settings="mine")


# --- in the place of the ranker --------------------------------------------------------------------------------------


class Unbound(Holding):
    """Knows nothing before it is bound."""

    def bind(self, model: str) -> Spy:
        return Spy(settings={"model": model})


def test_a_judge_that_is_still_to_be_bound_is_bound_later(tmp_path: Path) -> None:
    cached = CachedRanker(Unbound(object()), tmp_path)
    bound = cached.bind("model")
    assert bound.rank("p", ["a"]) == (1 / 3,) and bound.settings == {"model": "model"}
    spy = Spy()
    same = CachedRanker(spy, tmp_path)
    assert same.bind("model") is same


def test_it_stands_for_the_ranker(tmp_path: Path) -> None:
    spy = Spy(pointwise=True)
    checked = as_ranker(CachedRanker(spy, tmp_path))
    assert checked.name == "spy" and checked.pointwise is True and checked.matrix("p", ["a"]) == "asked anew"
    assert not hasattr(checked, "count") and not hasattr(checked, "steered")
    checked.rank("p", ["a"])
    fresh = checked.uncached()
    assert isinstance(fresh, CheckedRanker)
    fresh.rank("p", ["a"])
    assert len(spy.asked) == 2
