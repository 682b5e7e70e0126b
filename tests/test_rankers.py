"""Rankers: what is accepted as one, what is refused, and the two oracles."""

import functools
import math
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sims_lens.errors import RankerError, SimsError
from sims_lens.rankers import (
    RANKERS,
    CheckedRanker,
    Ranker,
    ReadingEase,
    Vader,
    as_ranker,
    get_ranker,
    oracles,
    reading_ease,
)
from sims_lens.rankers.oracles import EASIEST, HARDEST, sentences, syllables

# --- shapes ----------------------------------------------------------------------------------------------------------


def lengths(prompt: str, responses: Sequence[str]) -> list[int]:
    return [len(prompt) + len(response) for response in responses]


class Method:
    def rank(self, prompt: str, responses: Sequence[str]) -> list[int]:
        return lengths(prompt, responses)


@dataclass(frozen=True)
class Named(Method):
    name: str = "by length"


class Callable_:
    def __call__(self, prompt: str, responses: Sequence[str]) -> list[int]:
        return lengths(prompt, responses)


def reward(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    assert not kwargs
    return [float(len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)]


def reward_keyword_only(*, completions: list[str], prompts: list[str], scale: int = 1) -> list[int]:
    return [scale * (len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)]


def reward_of_completions(completions: list[str], **kwargs: list[str]) -> list[int]:
    return [len(p) + len(c) for p, c in zip(kwargs["prompts"], completions, strict=True)]


class RewardMethod:
    def rank(self, prompts: list[str], completions: list[str]) -> list[float]:
        return reward(prompts, completions)


@pytest.mark.parametrize(
    ("ranker", "name"),
    [
        (lengths, "lengths"),
        (lambda prompt, responses: lengths(prompt, responses), "<lambda>"),
        (lambda *args: lengths(*args), "<lambda>"),
        (Method(), "Method"),
        (Named(), "by length"),
        (Named("other"), "other"),
        (Callable_(), "Callable_"),
        (Method().rank, "rank"),
        (functools.partial(lengths), "partial"),
        (reward, "reward"),
        (reward_keyword_only, "reward_keyword_only"),
        (reward_of_completions, "reward_of_completions"),
        (functools.partial(reward_keyword_only, scale=1), "partial"),
        (RewardMethod(), "RewardMethod"),
    ],
)
def test_every_shape_is_accepted(ranker: object, name: str) -> None:
    checked = as_ranker(ranker)
    assert checked.name == name
    scores = checked.rank("ab", ("c", "def"))
    assert scores == (3.0, 5.0)
    assert all(type(score) is float for score in scores)
    assert isinstance(checked, Ranker)
    assert as_ranker(checked) is checked


def test_a_reward_function_gets_lists_of_equal_length() -> None:
    seen: list[object] = []

    def spy(prompts: list[str], completions: list[str]) -> list[int]:
        seen.append((prompts, completions))
        return [0] * len(completions)

    as_ranker(spy).rank("p", ("a", "b", "a"))
    assert seen == [(["p", "p", "p"], ["a", "b", "a"])]


def test_the_protocol_asks_for_a_name_and_a_method() -> None:
    assert isinstance(Named(), Ranker)
    assert isinstance(ReadingEase(), Ranker)
    assert not isinstance(Method(), Ranker)
    assert not isinstance(lengths, Ranker)


@pytest.mark.parametrize(
    ("ranker", "message"),
    [
        (None, "None is neither"),
        (3, "3 is neither"),
        ("vader", r"get_ranker\('vader'\)"),
        (Method, r"Method is a class; pass an instance of it, such as Method\(\)"),
        (lambda response: 1.0, "too many positional arguments.*make it f"),
        (lambda prompt, responses, extra: [], "missing a required argument: 'extra'"),
        (lambda prompts, completions, answers: [], "missing a required argument: 'answers'.*default"),
        (lambda completions: [], "make it f"),
    ],
)
def test_other_things_are_refused_before_they_are_used(ranker: object, message: str) -> None:
    with pytest.raises(RankerError, match=message):
        as_ranker(ranker)


def test_an_async_function_is_refused() -> None:
    async def later(prompt: str, responses: Sequence[str]) -> list[float]:
        return [0.0 for _ in (prompt, *responses)]

    with pytest.raises(RankerError, match="async"):
        as_ranker(later)


def test_a_checked_ranker_travels_to_other_processes() -> None:
    for ranker in (lengths, reward, Named(), ReadingEase(), Vader()):
        checked = as_ranker(ranker)
        copy = pickle.loads(pickle.dumps(checked))
        assert copy.name == checked.name
        assert copy.rank("ab", ["good", "bad"]) == checked.rank("ab", ["good", "bad"])


# --- scores ----------------------------------------------------------------------------------------------------------


def returning(result: object) -> CheckedRanker:
    def fixed(prompt: str, responses: Sequence[str]) -> object:
        return result

    return as_ranker(fixed)


@pytest.mark.parametrize(
    "result",
    [
        [1, 2],
        (1.0, 2.0),
        deque([1, 2]),
        np.array([1.0, 2.0], dtype=np.float32),
        np.array([1, 2]),
        [np.float32(1), np.int64(2)],
        [np.array(1.0), 2],
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0], requires_grad=True),
        [torch.tensor(1.0, requires_grad=True), torch.tensor(2)],
        [Fraction(1), 2],
    ],
)
def test_numbers_of_every_kind_become_floats(result: object) -> None:
    scores = returning(result).rank("p", ["a", "b"])
    assert scores == (1.0, 2.0)
    assert all(type(score) is float for score in scores)


def test_truth_values_count_as_numbers() -> None:
    assert as_ranker(lambda prompt, responses: [r == prompt for r in responses]).rank("a", ["a", "b"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], r"returned 1 score for 2 responses: \[1.0\]"),
        ([1.0, 2.0, 3.0], "returned 3 scores for 2 responses"),
        ([], "returned 0 scores"),
        ([1.0, math.nan], "returned nan for response 1, which is not finite"),
        ([-math.inf, 0], "returned -inf for response 0, which is not finite"),
        ([0, 10**400], "response 1, which is not finite"),
        (torch.tensor([float("nan"), 1.0]), "returned nan for response 0"),
        (["0.5", 1], "returned '0.5' for response 0, which is not a number"),
        ([1, None], "returned None for response 1, which is not a number"),
        ([1, 2j], "returned 2j for response 1"),
        (np.zeros((2, 1)), r"returned \[0.0\] for response 0, which is not a number"),
        (torch.zeros(2, 2), "which is not a number"),
        (0.5, "returned 0.5, which is not a list"),
        (torch.tensor(0.5), "which is not a list"),
        (None, "returned None, which is not a list"),
        ("12", "returned '12', which is not a list"),
        (b"12", "which is not a list"),
        ({0: 1.0, 1: 2.0}, "which is not a list"),
        ({1.0, 2.0}, "which is not a list"),
        (iter([1.0, 2.0]), "which is not a list"),
    ],
)
def test_bad_scores_are_refused(result: object, message: str) -> None:
    with pytest.raises(RankerError, match=message) as caught:
        returning(result).rank("What now?", ["a", "b"])
    for part in ("ranker 'fixed'", "'What now?'", "return one finite number per response"):
        assert part in str(caught.value)


def test_messages_are_short_even_if_everything_is_long() -> None:
    with pytest.raises(RankerError) as caught:
        returning(list(range(10_000))).rank("word " * 1000, ["a"])
    assert len(str(caught.value)) < 300


def test_an_exception_in_a_ranker_names_it_and_its_prompt() -> None:
    def broken(prompt: str, responses: Sequence[str]) -> list[float]:
        raise KeyError("lexicon")

    with pytest.raises(
        RankerError, match="ranker 'broken' on the prompt 'Why\\?' raised KeyError: 'lexicon'"
    ) as caught:
        as_ranker(broken).rank("Why?", ["a"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_ranker_error_of_the_rankers_own_is_left_alone() -> None:
    own = RankerError("install this")

    def broken(prompt: str, responses: Sequence[str]) -> list[float]:
        raise own

    with pytest.raises(RankerError) as caught:
        as_ranker(broken).rank("Why?", ["a"])
    assert caught.value is own


def test_no_response_needs_no_call() -> None:
    def never(prompt: str, responses: Sequence[str]) -> list[float]:
        raise AssertionError

    assert as_ranker(never).rank("p", []) == ()


def test_bare_string_responses_are_refused() -> None:
    with pytest.raises(RankerError, match="bare string 'one answer'; wrap it in a list"):
        as_ranker(lengths).rank("p", "one answer")


def test_a_ranker_cannot_change_the_callers_list() -> None:
    def greedy(prompt: str, responses: list[str]) -> list[float]:
        responses.clear()
        return [1.0, 2.0]

    mine = ["a", "b"]
    assert as_ranker(greedy).rank("p", mine) == (1.0, 2.0)
    assert mine == ["a", "b"]


def test_ranker_errors_are_value_errors_and_ours() -> None:
    assert issubclass(RankerError, ValueError)
    assert issubclass(RankerError, SimsError)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RANKERS))
def test_every_known_name_makes_a_ranker_of_that_name(name: str) -> None:
    ranker = get_ranker(name)
    assert ranker.name.startswith(name)
    if hasattr(ranker, "bind"):
        with pytest.raises(RankerError, match="no model to ask"):
            ranker.rank("Hi?", ["Good."])
    else:
        assert len(ranker.rank("Hi?", ["Good.", "", "Awful!"])) == 3


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "sims_test_rankers"
    (tmp_path / f"{name}.py").write_text(
        "def brevity(prompt, responses):\n    return [-len(r) for r in responses]\n"
        "class Brevity:\n    name = 'short'\n    rank = staticmethod(brevity)\n"
        "class Needy:\n    def __init__(self, model): pass\n"
        "instance = Brevity()\nnumber = 3\n"
    )
    (tmp_path / "sims_test_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


@pytest.mark.parametrize(
    ("path", "name"),
    [("brevity", "brevity"), ("Brevity", "short"), ("instance", "short"), ("instance.rank", "brevity")],
)
def test_a_ranker_is_imported_by_its_path(own_module: str, path: str, name: str) -> None:
    ranker = get_ranker(f"{own_module}:{path}")
    assert ranker.name == name
    assert ranker.rank("p", ["aa"]) == (-2.0,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vadr", "no ranker is called 'vadr'; there are reading-ease, self, vader, and your own as package.module"),
        ("", "no ranker is called ''"),
        ("module:", "no ranker is called 'module:'"),
        (":function", "no ranker is called ':function'"),
        ("no_such_module:f", "importing 'no_such_module' raised ModuleNotFoundError.*PYTHONPATH"),
        (".relative:f", "importing '.relative' raised TypeError"),
        ("sims_test_broken:f", "importing 'sims_test_broken' raised ZeroDivisionError"),
        ("sims_test_rankers:nothing", "sims_test_rankers has no 'nothing'"),
        ("sims_test_rankers:Needy", r"Needy\(\) raised TypeError.*'model'"),
        ("sims_test_rankers:number", "3 is neither"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_a_wrong_name_is_refused_clearly(name: str, message: str) -> None:
    with pytest.raises(RankerError, match=message):
        get_ranker(name)


# --- syllables -------------------------------------------------------------------------------------------------------

KNOWN = {
    1: """the a I cat dog house time make whole smile clothes walked jumped played tried laughed changed used called
        through strength eye years league tongue school rhyme world don't you've knight breathe caught scratched isle
        she'll boxed rules""",
    2: """table happy garden people movement useful useless lovely kindness something someone homework didn't wanted
        needed handled opened houses boxes changes watches places trying flying being create quiet science lion poem
        ocean question nation special ancient patient friendly prism rhythm beyond player evening business Wednesday
        language machine village lettuce it'll awesome agree acre centre argue genre bureau naïve café Church's
        would've pipeline software careless basement peaceful simple simply gently guitar reply July moment comment
        unless gorgeous precious""",
    3: """banana beautiful wonderful happiness completely together video radio area idea museum period audience easier
        happiest various serious violin piano tomato potato company animal holiday yesterday tomorrow remember
        important example recipe expected excitement everywhere carefully vegetable tourism telephone excellent
        understand continue ideas fiancé delicious curious courageous everyone policeman improvement government
        implement happily""",
    4: """information education experience society variety material January February situation biology reality
        appreciate television community responsible necessary catastrophe apostrophe watermelon ceremony particular
        supermarket helicopter calculator economy algorithm hyperbole environment geography cooperate spontaneous
        obedient""",
    5: """university opportunity refrigerator imagination communication curiosity international electricity possibility
        vocabulary personality mathematician individual simultaneous""",
    6: "responsibility encyclopedia autobiography biodiversity",
}
WORDS = [(word, count) for count, words in KNOWN.items() for word in words.split()]


def test_syllables_of_known_words() -> None:
    assert len(WORDS) >= 200
    assert len({word for word, _ in WORDS}) == len(WORDS)
    wrong = [(word, count, syllables(word)) for word, count in WORDS if syllables(word) != count]
    assert len(wrong) <= 0.05 * len(WORDS), wrong


def test_most_long_words_are_counted_right_too() -> None:
    long = [(word, count) for word, count in WORDS if count >= 3]
    wrong = [word for word, count in long if syllables(word) != count]
    assert len(wrong) <= 0.05 * len(long), wrong


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("", 0),
        ("?!", 0),
        ("😀", 0),
        ("17", 1),
        ("3.14", 1),
        ("1,000,000", 1),
        ("21st-century", 4),
        ("well-known", 2),
        ("hmm", 1),
        ("TIME", 1),
        ("O’Brien", 3),
        ("rock'n'roll", 3),
        ("o'clock", 2),
        ("cafe\u0301", 2),
        ("smørgås", 2),
        ("сад", 2),
        ("中文中文", 2),
    ],
)
def test_syllables_of_odd_words(word: str, count: int) -> None:
    assert syllables(word) == count


@given(st.text(max_size=30))
def test_syllables_is_a_count(word: str) -> None:
    count = syllables(word)
    assert count >= any(char.isalnum() and char.isascii() for char in word)
    assert count == syllables(word.upper()) or not word.isascii()


@pytest.mark.parametrize(
    "word", ["ly", "every", "less", "aeiou", "ia", "b", "a", "a'", "a-", "tionly", "é", "中", "1."]
)
def test_very_long_words_are_quick(word: str) -> None:
    start = time.perf_counter()
    assert syllables(word * 20_000) >= 1
    assert time.perf_counter() - start < 5


# --- sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("", []),
        ("... !!! ?", []),
        ("One", [1]),
        ("One two. Three", [2, 1]),
        ("Really?! Yes... No.", [1, 1, 1]),
        ("No way!!! Stop", [2, 1]),
        ("Well... maybe not.", [3]),
        ("Dr. Who met Mrs. Hill at St. Ives.", [8]),
        ("Bring fruit, e.g. apples, i.e. food. Thanks.", [6, 1]),
        ("Apples, pears, etc. are here. Plums, etc. Go.", [5, 2, 1]),
        ("J. R. R. Tolkien wrote it. So did I. Then we slept.", [6, 3, 3]),
        ("The U.S. Army left at 5 p.m. today. It came at 6 p.m. They slept.", [8, 5, 2]),
        ("It costs 3.50 in version 1.2. Visit example.com now.", [6, 3]),
        ('"Really?" she asked. "Yes." He left.', [3, 1, 2]),
        ("(It rained.) We stayed.", [2, 2]),
        ("**Bold.** Plain.", [1, 1]),
        ("it is late. i am tired! go home", [3, 3, 2]),
        ("A title\n\nThe text\ngoes on. End.", [2, 4, 1]),
        ("Steps:\n1. Wash it.\n2) Dry it\n- Fold it", [1, 2, 2, 2]),
        ("# Heading\nText under it.", [1, 3]),
        ("A well-known fact, isn't it — 1,000 times & more.", [8]),
        ("Wait…what? No。 Yes！ Oh", [2, 1, 1, 1]),
    ],
)
def test_sentences(text: str, counts: list[int]) -> None:
    assert [len(words) for words in sentences(text)] == counts, sentences(text)


# --- reading ease ----------------------------------------------------------------------------------------------------


def test_reading_ease_is_the_formula() -> None:
    assert reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    assert reading_ease("The happy cat sat. It was on the table.") == pytest.approx(
        206.835 - 1.015 * 9 / 2 - 84.6 * 11 / 9
    )


def test_an_unfinished_last_sentence_counts() -> None:
    assert reading_ease("We ran. We hid") == reading_ease("We ran. We hid.") > reading_ease("We ran and we hid.")


def test_reading_ease_orders_texts_as_people_do() -> None:
    texts = [
        "The sun is hot. We can see it in the day. It keeps us warm.",
        "The sun gives us light and heat, and without it nothing on the planet could grow.",
        "Solar radiation provides the energy that sustains photosynthesis and regulates atmospheric circulation.",
        "Thermonuclear interactions continuously transform gravitationally compressed hydrogen, consequently "
        "generating electromagnetic radiation characterized by extraordinary luminosity.",
    ]
    scores = [reading_ease(text) for text in texts]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 100
    assert scores[-1] == HARDEST


def test_reading_ease_agrees_with_a_count_by_hand() -> None:
    text = (
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
        "Liberty, and dedicated to the proposition that all men are created equal."
    )
    words, syllables_by_hand = 30, 48
    assert reading_ease(text) == pytest.approx(206.835 - 1.015 * words - 84.6 * syllables_by_hand / words)


@pytest.mark.parametrize("text", ["", " \n", "?!", "😀 🎉", "—", "***"])
def test_text_without_words_gets_the_worst_score(text: str) -> None:
    assert reading_ease(text) == HARDEST


def test_extremes_are_clipped() -> None:
    assert reading_ease("Go.") == EASIEST
    assert reading_ease("ba" * 60) == HARDEST
    assert reading_ease("word " * 500) == HARDEST
    assert reading_ease("中文" * 20) == HARDEST


def test_markup_does_not_change_the_score() -> None:
    assert reading_ease("**The cat** sat on the *mat*.") == reading_ease("The cat sat on the mat.")


@given(st.text())
def test_reading_ease_is_finite_for_any_text(text: str) -> None:
    score = reading_ease(text)
    assert HARDEST <= score <= EASIEST
    assert reading_ease(text) == score


@given(st.lists(st.sampled_from(["Mr.", "a", "The", "etc.", "?", "\n", "-", "1.", "U.S.", "...", '"', ".)", "über"])))
def test_sentences_keep_every_word_in_order(pieces: list[str]) -> None:
    for words in sentences(" ".join(pieces)):
        assert words
        assert all(any(char.isalnum() for char in word) for word in words)


@pytest.mark.parametrize(
    "piece", [".", "\n", " ", "a. ", ".)", "a", "a.", "\n- ", "e.g. ", "!a", "1,", "a'", "\r\n ", '."']
)
def test_reading_ease_is_quick_on_long_text(piece: str) -> None:
    start = time.perf_counter()
    reading_ease(piece * 20_000)
    assert time.perf_counter() - start < 5


def test_the_reading_ease_ranker() -> None:
    ranker = ReadingEase()
    assert ranker.name == "reading-ease"
    assert ranker.rank("anything", ["Go on.", ""]) == (reading_ease("Go on."), HARDEST)
    assert ranker.rank("anything", []) == ()
    assert ranker == ReadingEase()
    with pytest.raises(FrozenInstanceError):
        ranker.name = "other"  # type: ignore[misc]


# --- vader -----------------------------------------------------------------------------------------------------------


def test_vader_prefers_the_positive() -> None:
    good, neutral, empty, bad = Vader().rank(
        "How was it?", ["I loved it!", "It was on Monday.", "", "It was horrible."]
    )
    assert 1 >= good > neutral == empty == 0 > bad >= -1


@given(st.text())
def test_vader_scores_any_text(text: str) -> None:
    (score,) = as_ranker(Vader()).rank("p", [text])
    assert -1 <= score <= 1


def test_a_missing_vader_is_said_when_the_ranker_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    oracles._vader_scores.cache_clear()
    with pytest.raises(RankerError, match=r'pip install "sims-lens\[vader\]"') as caught:
        get_ranker("vader")
    assert isinstance(caught.value.__cause__, ImportError)
    oracles._vader_scores.cache_clear()


def test_importing_the_rankers_does_not_import_vader() -> None:
    code = "import sys, sims_lens.rankers; print([name for name in sys.modules if 'vader' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what survives the check -----------------------------------------------------------------------------------------


class Rich:
    """A ranker with everything that one may have."""

    name = "rich"
    pointwise = True
    steered = False
    settings = {"of": "it"}

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.count = {"prefill": 0, "decode": 0}
        self.asked: list[int] = []

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return [self.factor * len(response) for response in responses]

    def rank_all(self, items: Sequence[tuple[str, Sequence[str]]]) -> np.ndarray | list[list[float]]:
        self.asked.append(len(items))
        return [self.rank(prompt, responses) for prompt, responses in items]

    def matrix(self, prompt: str, responses: Sequence[str]) -> np.ndarray:
        return np.full((len(responses), len(responses)), 0.5)

    def bind(self, factor: float) -> "Rich":
        return Rich(factor)

    def uncached(self) -> "Rich":
        return self


def test_what_a_ranker_has_beside_scores_survives_the_check() -> None:
    mine = Rich()
    checked = as_ranker(mine)
    assert checked.pointwise is True and checked.steered is False and checked.settings == {"of": "it"}
    assert checked.count is mine.count
    assert checked.matrix("p", ["a", "b"]).shape == (2, 2)
    assert checked.uncached() is mine
    bound = checked.bind(3.0)
    assert isinstance(bound, CheckedRanker) and bound.rank("p", ["ab"]) == (6.0,)


def test_what_a_ranker_lacks_it_lacks_when_checked() -> None:
    for ranker in (lengths, reward, Named()):
        checked = as_ranker(ranker)
        for name in ("bind", "count", "matrix", "pointwise", "settings", "steered", "uncached", "factor"):
            assert not hasattr(checked, name), name
    assert not hasattr(as_ranker(Rich()), "factor")


def test_the_oracles_score_a_response_by_itself() -> None:
    for ranker in (ReadingEase(), Vader()):
        checked = as_ranker(ranker)
        assert checked.pointwise is True and checked.settings


def test_a_function_can_carry_a_flag() -> None:
    def flagged(prompt: str, responses: Sequence[str]) -> list[int]:
        return [0] * len(responses)

    flagged.pointwise = True  # type: ignore[attr-defined]
    assert as_ranker(flagged).pointwise is True


def test_a_bind_that_returns_nothing_has_bound_the_ranker_itself() -> None:
    class Mutable(Method):
        bound = False

        def bind(self, model: object) -> None:
            self.bound = True

    mine = Mutable()
    assert as_ranker(mine).bind("model").inner is mine and mine.bound


ITEMS = [("p", ["a", "bb"]), ("q", []), ("r", ["ccc"])]


def test_many_prompts_are_ranked_in_one_go_where_the_ranker_can() -> None:
    mine = Rich()
    assert as_ranker(mine).rank_all(ITEMS) == [(1.0, 2.0), (), (3.0,)]
    assert mine.asked == [2]  # the prompt without responses isn't asked
    assert as_ranker(mine).rank_all([("q", [])]) == [()] and as_ranker(mine).rank_all([]) == []
    assert mine.asked == [2]


def test_many_prompts_are_ranked_one_by_one_otherwise() -> None:
    assert as_ranker(lengths).rank_all(ITEMS) == [(2.0, 3.0), (), (4.0,)]
    assert as_ranker(reward).rank_all(ITEMS) == [(2.0, 3.0), (), (4.0,)]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([[1.0, 2.0]], r"on 2 prompts returned \[\[1.0, 2.0\]\]; return one list of scores per prompt"),
        (None, "on 2 prompts returned None"),
        ("ab", "on 2 prompts returned 'ab'"),
        ([[1.0], [1.0]], "on the prompt 'p' returned 1 score for 2 responses"),
        ([[1.0, 2.0], [math.nan]], "on the prompt 'r' returned nan for response 0, which is not finite"),
    ],
)
def test_bad_scores_of_many_prompts_are_refused(result: object, message: str) -> None:
    class Bad(Method):
        def rank_all(self, items: object) -> object:
            return result

    with pytest.raises(RankerError, match=message):
        as_ranker(Bad()).rank_all(ITEMS)


def test_an_exception_over_many_prompts_is_the_rankers_failure() -> None:
    class Broken(Method):
        def rank_all(self, items: object) -> object:
            raise MemoryError("no room")

    with pytest.raises(RankerError, match="ranker 'Broken' on 2 prompts raised MemoryError: no room"):
        as_ranker(Broken()).rank_all(ITEMS)
    with pytest.raises(RankerError, match="bare string 'one'"):
        as_ranker(Broken()).rank_all([("p", "one")])
