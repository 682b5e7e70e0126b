"""Intervals cover what they say they cover, and the ratios are those of their definitions."""

import numpy as np
import pytest

from sims_lens.stats import (
    Interval,
    bootstrap_mean,
    crossed_mean,
    distinct_ratio,
    interval_from,
    length_controlled_win_rate,
    null_band,
    win_probability,
)


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


# --- more than means -----------------------------------------------------------------------------------------------


def test_skewed_values_have_a_skewed_interval_and_equal_ones_none() -> None:
    values = np.random.default_rng(0).exponential(size=40)
    interval = bootstrap_mean(values)
    assert interval.high - interval.estimate > 1.1 * (interval.estimate - interval.low)
    mirrored = bootstrap_mean(-values)
    assert mirrored.low == pytest.approx(-interval.high, rel=0.02)
    equal = bootstrap_mean(np.full(9, 0.1))
    assert equal.low == equal.high == equal.estimate == pytest.approx(0.1)
    assert bootstrap_mean(np.array([2.0])) == Interval(2.0, 2.0, 2.0)
    two = bootstrap_mean(np.array([0.0, 1.0]))
    assert (two.low, two.high) == (0.0, 1.0)


def test_the_interval_is_that_of_scipy_save_for_few_prompts() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).gamma(1.0, size=2000)
    ours = bootstrap_mean(values, draws=9999)
    theirs = bootstrap((values,), np.mean, method="BCa", n_resamples=9999, random_state=0).confidence_interval
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)


def test_what_is_detectable_is_detected_in_80_of_100_data_sets() -> None:
    rng, found, seen = np.random.default_rng(0), [], 0
    for seed in range(300):
        found.append(bootstrap_mean(rng.normal(size=50), seed=seed, draws=300).detectable)
    change = float(np.mean(found))
    assert change == pytest.approx(2.8 / np.sqrt(50), rel=0.06)
    for seed in range(300):
        seen += bootstrap_mean(rng.normal(change, 1.0, size=50), seed=seed, draws=300).low > 0
    assert 0.73 <= seen / 300 <= 0.87


def test_a_plan_that_has_learnt_nothing_is_beyond_the_null_band_once_in_twenty_times() -> None:
    rng = np.random.default_rng(0)
    outside = largest = 0
    for _ in range(4000):
        effect, *controls = rng.normal(3.0, 2.0, size=6)
        band = null_band(controls)
        assert band is not None
        outside += not band.low <= effect <= band.high
        largest += effect > max(controls)
    assert 0.04 <= outside / 4000 <= 0.06
    assert 0.14 <= largest / 4000 <= 0.19  # what the band is there to replace
    assert null_band([1.0]) is None and null_band([]) is None


def test_length_control_takes_away_what_length_brings_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(80), 4)
    lengths = rng.normal(10, 8, size=320)
    by_length = (rng.random(320) < 1 / (1 + np.exp(-3 * np.tanh(lengths / 8)))).astype(float)
    found = length_controlled_win_rate(by_length, lengths, prompts.tolist())
    assert by_length.mean() > 0.75 and found.low < 0.5 < found.high
    by_merit = (rng.random(320) < 0.7).astype(float)
    found = length_controlled_win_rate(by_merit, lengths, prompts.tolist())
    assert found.low < 0.7 < found.high
    same = length_controlled_win_rate(by_merit, np.zeros(320), prompts.tolist())
    assert same.estimate == pytest.approx(by_merit.mean(), abs=0.005)
    assert length_controlled_win_rate(np.ones(40), rng.normal(size=40), list(range(40))).estimate > 0.9
    assert length_controlled_win_rate(by_merit, lengths, prompts.tolist()) == length_controlled_win_rate(
        by_merit, lengths, prompts.tolist()
    )


def test_length_control_is_scikit_learns_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    lengths, wins = rng.normal(2, 5, size=200), (rng.random(200) < 0.6).astype(float)
    x = np.stack([np.ones(200), np.tanh(lengths / lengths.std())], axis=1)
    fitted = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10).fit(x, wins)
    expected = fitted.predict_proba([[1.0, 0.0]])[0, 1]
    assert length_controlled_win_rate(wins, lengths, list(range(200))).estimate == pytest.approx(expected, abs=1e-5)


def test_a_mean_over_prompts_and_seeds_knows_both() -> None:
    rng = np.random.default_rng(0)
    prompts, rest = rng.normal(size=(1, 60)), 0.1 * rng.normal(size=(3, 60))
    near = crossed_mean(prompts + rest)
    far = crossed_mean(prompts + rest + np.array([[-1.0], [0.0], [1.0]]))
    assert near.interval.estimate == pytest.approx(far.interval.estimate) == pytest.approx(near.prompts.estimate)
    assert near.seed_sd is not None and near.seed_sd < 0.1 and far.seed_sd == pytest.approx(1.0, abs=0.05)
    width = [c.interval.high - c.interval.low for c in (near, far)]
    assert width[0] == pytest.approx(near.prompts.high - near.prompts.low, rel=0.15)
    assert width[1] == pytest.approx(2 * 4.303 / np.sqrt(3), rel=0.05)  # Student's t of two degrees of freedom

    one = crossed_mean(prompts)
    assert one.seed_sd is None and one.interval == one.prompts == bootstrap_mean(prompts[0])
    same = crossed_mean(np.ones((3, 5)))
    assert same.interval == Interval(1.0, 1.0, 1.0) and same.seed_sd == 0.0
    rate = crossed_mean(np.array([[1.0, 1.0], [0.0, 0.0]]), low=0.0, high=1.0)
    assert rate.interval == Interval(0.5, 0.0, 1.0)


def test_the_interval_over_prompts_and_seeds_covers_what_it_says() -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        values = 0.1 * rng.normal(size=(3, 1)) + 0.5 * rng.normal(size=(1, 50)) + rng.normal(size=(3, 50))
        interval = crossed_mean(values).interval
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / 1000 <= 0.975
