"""Ensembles: standardised within the group, then weighted."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sims_lens.errors import RankerError
from sims_lens.rankers import Ensemble, ReadingEase, Vader, as_ranker
from sims_lens.rankers.ensemble import standardised


def short(prompt: str, responses: Sequence[str]) -> list[float]:
    return [-float(len(response)) for response in responses]


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    return [1000.0 * completion.count("a") for completion in completions]


class Whole:
    """Ranks many prompts in one go, and counts."""

    def __init__(self, name: str = "whole") -> None:
        self.name, self.calls = name, 0
        self.count = {"prefill": 0, "decode": 1}
        self.settings = {"of": name}

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return [float(len(response) % 3) for response in responses]

    def rank_all(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        self.calls += 1
        self.count["prefill"] += len(items)
        return [self.rank(*item) for item in items]

    def bind(self, name: str) -> "Whole":
        return Whole(name)


RESPONSES = ["aaa", "ba", "c", "dddd"]


def z(scores: Sequence[float]) -> np.ndarray:
    values = np.array(scores)
    return (values - values.mean()) / values.std()


def test_scores_are_standardised_within_the_group_and_weighted() -> None:
    ensemble = Ensemble([(short, 1.0), (reward, 3.0)])
    expected = 0.25 * z(short("p", RESPONSES)) + 0.75 * z(reward([], RESPONSES))
    assert as_ranker(ensemble).rank("p", RESPONSES) == pytest.approx(list(expected))
    assert ensemble.name == "ensemble(0.25 short + 0.75 reward)"
    assert Ensemble({short: 1, reward: 3}).rank("p", RESPONSES) == pytest.approx(list(expected))
    assert Ensemble([(short, 1)], name="mine").name == "mine"


def test_units_do_not_matter_and_a_negative_weight_turns_a_ranker_round() -> None:
    def scaled(prompt: str, responses: Sequence[str]) -> list[float]:
        return [1e6 * score - 7 for score in short(prompt, responses)]

    assert Ensemble([(scaled, 2.0)]).rank("p", RESPONSES) == pytest.approx(
        Ensemble([(short, 1.0)]).rank("p", RESPONSES)
    )
    turned = Ensemble([(short, -1.0)]).rank("p", RESPONSES)
    assert turned == pytest.approx([-score for score in Ensemble([(short, 1.0)]).rank("p", RESPONSES)])


def test_a_ranker_that_sees_no_difference_has_no_say() -> None:
    def flat(prompt: str, responses: Sequence[str]) -> list[float]:
        return [0.1] * len(responses)

    assert Ensemble([(flat, 1.0)]).rank("p", RESPONSES) == (0.0,) * 4
    mixed = Ensemble([(flat, 1.0), (short, 1.0)]).rank("p", RESPONSES)
    assert mixed == pytest.approx(list(0.5 * z(short("p", RESPONSES))))
    assert Ensemble([(short, 1.0)]).rank("p", ["one"]) == (0.0,) and Ensemble([(short, 1.0)]).rank("p", []) == ()


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=8))
def test_standardised_scores_are_finite_whatever_comes(scores: list[float]) -> None:
    found = standardised(np.array(scores))
    assert np.isfinite(found).all() and abs(found.mean()) < 1e-6
    assert found.std() == pytest.approx(1) or (found == 0).all()


def test_each_member_ranks_many_prompts_in_one_go() -> None:
    whole = Whole()
    ensemble = Ensemble([(whole, 1.0), (short, 1.0)])
    items = [("p", RESPONSES), ("q", []), ("r", ["a", "bb"])]
    found = as_ranker(ensemble).rank_all(items)
    assert whole.calls == 1
    assert found == [pytest.approx(list(ensemble.rank(*item))) for item in items]


def test_it_says_what_its_scores_depend_on_and_what_was_spent() -> None:
    ensemble = Ensemble([(Whole("a"), 1.0), (Whole("b"), 2.0), (ReadingEase(), 1.0)])
    assert json.dumps(ensemble.settings) == json.dumps(ensemble.settings)
    assert ensemble.settings != Ensemble([(Whole("a"), 1.0), (Whole("b"), 3.0), (ReadingEase(), 1.0)]).settings
    assert dict(ensemble.count) == {"prefill": 0, "decode": 2}
    count = ensemble.count
    ensemble.rank("p", RESPONSES)
    assert count["prefill"] == 2 and len(count) == 2 and ensemble.count is count
    assert dict(Ensemble([(short, 1.0)]).count) == {}


def test_binding_binds_whom_it_concerns() -> None:
    bound = Ensemble([(Whole(), 1.0), (short, 1.0)], name="mine").bind("model")
    assert [ranker.name for ranker, _ in bound.members] == ["model", "short"] and bound.name == "mine"

    class Steered(Whole):
        steered = True

    assert Ensemble([(Steered(), 1.0), (short, 1.0)]).steered and not bound.steered
    assert as_ranker(Ensemble([(Vader(), 1.0)])).pointwise is False


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf, "1", True, None])
@pytest.mark.usefixtures("unchecked")
def test_a_weight_is_a_finite_number_other_than_zero(weight: object) -> None:
    with pytest.raises(RankerError, match="the weight of 'short' is .*; make it a finite number other than 0"):
        Ensemble([(short, weight)])  # type: ignore[list-item]


def test_nobody_is_no_ensemble() -> None:
    with pytest.raises(RankerError, match="no rankers"):
        Ensemble([])
    with pytest.raises(RankerError, match="3 is neither"):
        Ensemble([(3, 1.0)])
