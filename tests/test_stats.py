"""Intervals cover what they say they cover, and the ratios are those of their definitions."""

import numpy as np
import pytest

from sims_lens.stats import Interval, bootstrap_mean, distinct_ratio, interval_from, win_probability


def test_bootstrap_covers_the_mean_in_about_95_of_100_data_sets() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        interval = bootstrap_mean(rng.normal(0.3, 1.0, size=50), seed=seed, draws=500)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


def test_bootstrap_is_seeded_and_narrows_with_more_prompts() -> None:
    values = np.random.default_rng(1).normal(size=200)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    few, many = bootstrap_mean(values[:20]), bootstrap_mean(values)
    assert many.high - many.low < few.high - few.low


def test_win_probability_counts_ties_half() -> None:
    assert win_probability(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    assert win_probability(np.array([2.0, 0.0]), np.array([1.0])) == 0.5
    assert win_probability(np.array([2.0, 3.0]), np.array([1.0, 2.5])) == 0.75


def test_distinct_ratio_is_of_the_whole_corpus() -> None:
    same = [[["a b"]], [["a b"]], [["a b"]], [["a b"]]]
    assert distinct_ratio(same).estimate == 0.25  # within each prompt all are distinct
    different = [[["a"], ["b"]], [["c"], ["d"]]]
    assert distinct_ratio(different) == Interval(1.0, 1.0, 1.0)
    assert distinct_ratio([[[]], [[]]]) == Interval(0.0, 0.0, 0.0)
    mixed = distinct_ratio([[["a", "b"]], [["a", "c"]], [["d", "e"]]])
    assert mixed.estimate == pytest.approx(5 / 6) and mixed.low < mixed.estimate < mixed.high


def test_interval_round_trip() -> None:
    interval = Interval(0.5, 0.25, 0.75)
    assert interval_from(interval.to_json()) == interval
    assert interval.map(lambda x: 2 * x) == Interval(1.0, 0.5, 1.5)
