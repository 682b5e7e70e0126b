"""Tournaments: schedules link everyone, and planted strengths and circles are found."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sims_lens.errors import RankerError
from sims_lens.rankers.tournament import (
    averaged_over_orders,
    bradley_terry,
    cyclic_triples,
    mean_win_rate,
    schedule,
)

SIZES = st.integers(min_value=2, max_value=9)
SEEDS = st.integers(min_value=0, max_value=2**53)


def verdicts(strengths: np.ndarray) -> np.ndarray:
    """What a judge says who obeys Bradley and Terry."""
    p = 1.0 / (1.0 + np.exp(strengths[None, :] - strengths[:, None]))
    np.fill_diagonal(p, np.nan)
    return p


def only(p: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    kept = np.full_like(p, np.nan)
    for i, j in pairs:
        kept[i, j], kept[j, i] = p[i, j], p[j, i]
    return kept


# --- schedules -------------------------------------------------------------------------------------------------------


@given(k=SIZES, share=st.floats(min_value=0.0, max_value=1.0), seed=SEEDS)
def test_a_sparse_schedule_links_everyone_evenly(k: int, share: float, seed: int) -> None:
    most = k * (k - 1) // 2
    calls = round(k - 1 + share * (most - k + 1))
    pairs = schedule(k, calls, seed)
    assert len(set(pairs)) == len(pairs) == calls
    assert all(0 <= i < j < k for i, j in pairs) and pairs == sorted(pairs)
    assert pairs == schedule(k, calls, seed)
    reached, grown = {0}, True
    while grown:
        grown = False
        for i, j in pairs:
            if (i in reached) != (j in reached):
                reached |= {i, j}
                grown = True
    assert len(reached) == k
    met = np.bincount(np.array(pairs).ravel(), minlength=k)
    assert met.max() - met.min() <= 2


@pytest.mark.parametrize("calls", [None, 6, 100])
def test_a_full_schedule_has_every_pair(calls: int | None) -> None:
    assert schedule(4, calls, 0) == list(combinations(range(4), 2))


def test_schedules_differ_by_seed_and_can_be_empty() -> None:
    assert len({tuple(schedule(6, 5, seed)) for seed in range(20)}) > 10
    assert schedule(0, None, 0) == schedule(1, None, 0) == schedule(1, 1, 0) == []


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(RankerError, match="2 pairs do not link 4 responses.*at least 3"):
        schedule(4, 2, 0)
    with pytest.raises(RankerError, match="1 pair does not"):
        schedule(4, 1, 0)


# --- both orders -----------------------------------------------------------------------------------------------------


@given(k=SIZES, seed=SEEDS, bias=st.floats(min_value=-0.2, max_value=0.2))
def test_a_preference_for_the_first_cancels(k: int, seed: int, bias: float) -> None:
    rng = np.random.default_rng(seed)
    fair = averaged_over_orders(rng.uniform(0.3, 0.7, size=(k, k)))
    np.fill_diagonal(fair, np.nan)
    np.testing.assert_allclose(averaged_over_orders(fair + bias), fair, atol=1e-12)
    off = ~np.eye(k, dtype=bool)
    np.testing.assert_allclose((fair + fair.T)[off], 1.0, atol=1e-12)


def test_a_pair_asked_in_one_order_only_counts_as_not_asked() -> None:
    matrix = np.array([[np.nan, 0.9, np.nan], [0.3, np.nan, 0.4], [0.2, 0.6, np.nan]])
    p = averaged_over_orders(torch.from_numpy(matrix))
    assert p[0, 1] == pytest.approx(0.8) and p[1, 0] == pytest.approx(0.2)
    assert np.isnan(p[0, 2]) and np.isnan(p[2, 0]) and np.isnan(np.diag(p)).all()


# --- scores ----------------------------------------------------------------------------------------------------------


def test_the_mean_win_rate_is_over_those_who_were_met() -> None:
    p = np.array(
        [[np.nan, 0.8, 0.6, np.nan], [0.2, np.nan, np.nan, np.nan], [0.4, np.nan, np.nan, np.nan], [np.nan] * 4]
    )
    np.testing.assert_allclose(mean_win_rate(p), [0.7, 0.2, 0.4, 0.5])
    filled = p.copy()
    np.fill_diagonal(filled, 0.5)  # a diagonal says nothing
    np.testing.assert_allclose(mean_win_rate(filled), mean_win_rate(p))
    np.testing.assert_allclose(mean_win_rate(torch.from_numpy(p)), mean_win_rate(p))


@given(k=SIZES, seed=SEEDS, sparse=st.booleans())
def test_bradley_terry_recovers_planted_strengths(k: int, seed: int, sparse: bool) -> None:
    strengths = np.random.default_rng(seed).uniform(-1.5, 1.5, size=k)
    strengths -= strengths.mean()
    p = verdicts(strengths)
    if sparse:
        p = only(p, schedule(k, k - 1, seed))
    found = bradley_terry(p)
    assert found.mean() == pytest.approx(0.0, abs=1e-9)
    # the prior draws in a little; more so where nine are linked by a path only
    np.testing.assert_allclose(found, strengths, atol=0.02 if not sparse else 0.3)
    if not sparse:
        assert (np.argsort(found) == np.argsort(strengths)).all()
        assert (np.argsort(mean_win_rate(p)) == np.argsort(strengths)).all()


@given(k=SIZES, seed=SEEDS)
def test_bradley_terry_stands_where_its_gradient_vanishes(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = averaged_over_orders(rng.uniform(size=(k, k)))
    s = bradley_terry(p)
    np.fill_diagonal(p, 0.0)
    chance = 1.0 / (1.0 + np.exp(s[None, :] - s[:, None]))
    off = ~np.eye(k, dtype=bool)
    np.testing.assert_allclose(((p - chance) * off).sum(1) - 0.001 * s, 0.0, atol=1e-7)


@given(k=SIZES)
def test_bradley_terry_never_diverges(k: int) -> None:
    certain = np.triu(np.ones((k, k)), 1)  # 0 beats everyone, 1 all but 0, ...
    found = bradley_terry(certain)
    assert np.isfinite(found).all() and (np.diff(found) < 0).all() and np.abs(found).max() < 40
    nobody = bradley_terry(np.full((k, k), np.nan))
    assert (nobody == 0.0).all()
    islands = np.full((4, 4), np.nan)  # 0 and 1 never met 2 and 3
    islands[0, 1], islands[1, 0], islands[2, 3], islands[3, 2] = 1.0, 0.0, 0.8, 0.2
    found = bradley_terry(islands)
    assert np.isfinite(found).all() and found[0] > found[1] and found[2] > found[3]


def test_strength_of_schedule_matters_to_bradley_terry_only() -> None:
    strengths = np.array([2.0, 1.0, -1.0, -2.0])
    p = only(verdicts(strengths), [(0, 1), (1, 2), (2, 3)])  # 2 met 3 and 1, 1 met 0 and 2
    assert mean_win_rate(p)[2] < mean_win_rate(p)[1] < mean_win_rate(p)[0]
    p = only(verdicts(strengths), [(0, 1), (2, 3), (0, 2)])  # 1 lost to the best, 2 beat the worst
    assert mean_win_rate(p)[2] > mean_win_rate(p)[1]
    assert bradley_terry(p)[1] > bradley_terry(p)[2]


def test_no_response_is_no_score() -> None:
    nothing = np.empty((0, 0))
    assert bradley_terry(nothing).shape == mean_win_rate(nothing).shape == (0,)
    assert cyclic_triples(nothing) == (0, 0)
    assert mean_win_rate(np.full((1, 1), np.nan)).tolist() == [0.5]


# --- circles ---------------------------------------------------------------------------------------------------------


@given(k=SIZES, seed=SEEDS, asked=st.floats(min_value=0.3, max_value=1.0))
def test_cyclic_triples_are_those_that_one_can_count(k: int, seed: int, asked: float) -> None:
    rng = np.random.default_rng(seed)
    p = np.full((k, k), np.nan)
    for i, j in combinations(range(k), 2):
        if rng.random() < asked:
            p[i, j] = rng.choice([0.0, 0.2, 0.5, 0.9])
            p[j, i] = 1 - p[i, j]
    total = cyclic = 0
    for i, j, m in combinations(range(k), 3):
        if not np.isnan([p[i, j], p[j, m], p[i, m]]).any():
            total += 1
            cyclic += (p[i, j] > 0.5 and p[j, m] > 0.5 and p[m, i] > 0.5) or (
                p[j, i] > 0.5 and p[m, j] > 0.5 and p[i, m] > 0.5
            )
    assert cyclic_triples(p) == (cyclic, total)


def test_a_judge_with_strengths_has_no_circle_and_a_coin_a_quarter() -> None:
    assert cyclic_triples(verdicts(np.random.default_rng(0).normal(size=8))) == (0, 56)
    rng = np.random.default_rng(0)
    tosses = np.triu(rng.integers(0, 2, size=(60, 60)).astype(float), 1)
    p = tosses + np.tril(1 - tosses.T, -1)
    cyclic, total = cyclic_triples(p)
    assert cyclic / total == pytest.approx(0.25, abs=0.02)


def test_inputs_stay_as_they_were() -> None:
    p = verdicts(np.array([0.3, -0.1, 0.7]))
    np.fill_diagonal(p, 0.5)
    before = p.copy()
    for function in (averaged_over_orders, bradley_terry, mean_win_rate, cyclic_triples):
        function(p)
        np.testing.assert_array_equal(p, before)
