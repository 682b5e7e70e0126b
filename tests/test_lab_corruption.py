"""Corrupted pairs: theory against simulation, on pairs whose truth is planted."""

import math
from typing import Any

import numpy as np
import pytest

from sims_lens.errors import ConfigError, TooFewPairsError
from sims_lens.lab.corruption import Curve, Moments, Z, _moments, corruption_curve
from sims_lens.lab.noise import corrupt

EPSILONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
WIDTH = 48
MEAN = np.zeros(WIDTH)
MEAN[10] = 1.5
SCALE = np.linspace(0.5, 1.5, WIDTH)
TRUTH = Moments.of_population(MEAN, np.diag(SCALE**2))


def pairs(n: int, seed: int, *, mean: Any = MEAN) -> Any:
    return mean + np.random.default_rng(seed).normal(size=(n, WIDTH)) * SCALE


def curve(seed: int = 0, *, n: int = 50, **options: Any) -> Curve:
    return corruption_curve(pairs(n, seed), **{"epsilons": EPSILONS, "repeats": 60, "seed": seed, **options})


def test_the_mean_and_covariance_of_a_noisy_fit() -> None:
    """E = (1 - 2 eps) d, Cov = (Sigma + 4 eps (1 - eps) d d') / n, by brute force."""
    n, epsilon, times = 20, 0.3, 4000
    rng = np.random.default_rng(0)
    x = MEAN + rng.normal(size=(times, n, WIDTH)) * SCALE
    fits = (x * np.where(rng.random((times, n, 1)) < epsilon, -1.0, 1.0)).mean(1)
    assert fits.mean(0) == pytest.approx((1 - 2 * epsilon) * MEAN, abs=5 * SCALE.max() / math.sqrt(n * times))
    expected = (np.diag(SCALE**2) + 4 * epsilon * (1 - epsilon) * np.outer(MEAN, MEAN)) / n
    assert np.diag(np.cov(fits.T)) == pytest.approx(np.diag(expected), rel=0.15)
    # The length is nearly all noise, and theory's moments know it.
    length = (1 - 2 * epsilon) ** 2 * TRUTH.signal + np.trace(expected)
    assert (fits**2).sum(1).mean() == pytest.approx(length, rel=0.02)


def test_projection_null_and_break_even_by_brute_force() -> None:
    """Fits on fresh pairs, references from other fresh pairs: nothing of the measuring code is used."""
    a, b, times, epsilon = 25, 25, 3000, 0.2
    rng = np.random.default_rng(1)

    def draw(n: int) -> Any:
        return MEAN + rng.normal(size=(times, n, WIDTH)) * SCALE

    reference = draw(b).mean(1)
    unit = reference / np.linalg.norm(reference, axis=1, keepdims=True)
    along = np.einsum("tnd,td->tn", draw(a), unit)
    noisy = (along * np.where(rng.random((times, a)) < epsilon, -1, 1)).mean(1)
    shuffled = (along * rng.choice([-1, 1], (times, a))).mean(1)
    assert noisy.mean() == pytest.approx(TRUTH.projection(epsilon, reference=b), rel=0.03)
    assert Z * shuffled.std() == pytest.approx(TRUTH.null_edge(pairs=a, reference=b), rel=0.05)
    even = TRUTH.break_even(pairs=a, reference=b)
    signal = along.mean()
    assert (1 - 2 * even) * signal == pytest.approx(Z * shuffled.std(), rel=0.05)
    # At break-even one noisy fit in two lies beyond the null's edge.
    at = (along * np.where(rng.random((times, a)) < even, -1, 1)).mean(1)
    assert (at > Z * shuffled.std()).mean() == pytest.approx(0.5, abs=0.06)


def test_the_known_limit_of_break_even() -> None:
    """With the direction known and spherical noise it is (1 - z sqrt((1 + s^2/|d|^2) / n)) / 2."""
    moments = Moments.of_population(MEAN, np.eye(WIDTH) * 0.81)
    expected = 0.5 * (1 - Z * math.sqrt((1 + 0.81 / 2.25) / 40))
    assert moments.break_even(pairs=40) == pytest.approx(expected)
    assert moments.break_even(pairs=40, reference=10**9) == pytest.approx(expected, abs=1e-6)
    assert moments.break_even(pairs=40, reference=40) < expected


def test_moments_of_pairs_are_unbiased() -> None:
    found = [_moments(pairs(20, seed) @ pairs(20, seed).T, 20, 0) for seed in range(150)]
    for name in ("signal", "length", "along", "spread"):
        values = [getattr(m, name) for m in found]
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - getattr(TRUTH, name)) < 4 * error, name
    naive = np.mean([(pairs(20, seed).mean(0) ** 2).sum() for seed in range(150)])
    assert naive > 1.5 * TRUTH.signal  # what the U-statistics are for


def test_measured_and_expected_agree_with_the_truth() -> None:
    """The planted break-even lies in the measured interval in about 95% of data sets, and theory in its own."""
    true = TRUTH.break_even(pairs=25, reference=25)
    found = [curve(seed) for seed in range(60)]
    inside = np.mean([c.break_even.low <= true <= c.break_even.high for c in found])
    theory = np.mean([c.expected_break_even.low <= true <= c.expected_break_even.high for c in found])
    assert inside >= 0.88 and theory >= 0.85  # 0.95, less three standard errors of 60 data sets
    assert np.mean([c.agrees for c in found]) >= 0.95
    assert np.mean([c.gap.low <= 0 <= c.gap.high for c in found]) >= 0.88
    assert np.mean([c.break_even.estimate for c in found]) == pytest.approx(true, abs=0.02)
    for k in range(len(EPSILONS)):
        for name in ("cosine", "independent", "projection"):
            measured = np.mean([getattr(c, name)[k].estimate for c in found])
            expected = np.mean([getattr(c, f"expected_{name}")[k] for c in found])
            assert measured == pytest.approx(expected, abs=0.03), (name, k)


def test_corruption_of_any_kind_follows_its_moments() -> None:
    """Pairs that become others of another mean: the general formula, not that of flips."""
    rng = np.random.default_rng(3)
    other = 0.4 * MEAN
    other[20] = 0.8
    measured, expected, evens = [], [], []
    for seed in range(25):
        bad = other + rng.normal(size=(50, 2, WIDTH)) * SCALE
        c = corruption_curve(pairs(50, seed), bad, epsilons=(0.0, 0.5, 1.0), repeats=60, seed=seed)
        measured.append([[i.estimate for i in getattr(c, n)] for n in ("cosine", "independent", "projection")])
        names = ("expected_cosine", "expected_independent", "expected_projection")
        expected.append([getattr(c, n) for n in names])
        evens.append((c.break_even.estimate, c.expected_break_even.estimate))
    assert np.mean(measured, axis=0) == pytest.approx(np.mean(expected, axis=0), abs=0.04)
    true = Moments(TRUTH.signal, TRUTH.length, float(MEAN @ other), 0.0, 0.0, TRUTH.along, TRUTH.spread)
    assert np.median(evens, axis=0) == pytest.approx([true.break_even(pairs=25, reference=25)] * 2, abs=0.25)


def test_without_a_common_direction_there_is_no_break_even() -> None:
    c = corruption_curve(pairs(40, 5, mean=0.0), epsilons=EPSILONS, repeats=40)
    assert not 0 < c.break_even.estimate < 0.5 and c.break_even.low < 0


def test_the_same_seed_gives_the_same_and_inputs_stay_as_they_are() -> None:
    x = pairs(20, 0)
    before = x.copy()
    a, b = (corruption_curve(x, epsilons=EPSILONS, repeats=20, seed=4) for _ in range(2))
    assert a.cosine == b.cosine and a.break_even == b.break_even and np.array_equal(x, before)
    assert corruption_curve(x, epsilons=EPSILONS, repeats=20, seed=5).independent != a.independent


def test_corrupted_differences() -> None:
    clean, other = np.arange(6.0).reshape(3, 2), np.full((3, 2, 2), 9.0)
    bad = np.array([True, False, True])
    assert corrupt(clean, None, bad, np.zeros(3)).tolist() == [[0.0, -1.0], [2.0, 3.0], [-4.0, -5.0]]
    other[:, 1] = 7.0
    chosen = corrupt(clean, other, bad, np.array([0.0, 0.0, 0.9]))
    assert chosen.tolist() == [[9.0, 9.0], [2.0, 3.0], [7.0, 7.0]]


@pytest.mark.parametrize("epsilons", [(0.0,), (0.5, 0.1), (0.0, 1.5), (-0.1, 0.5)])
def test_what_cannot_be_corrupted(epsilons: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="rising probabilities"):
        corruption_curve(pairs(10, 0), epsilons=epsilons)
    with pytest.raises(TooFewPairsError, match="5 contrast pairs are too few"):
        corruption_curve(pairs(5, 0), epsilons=EPSILONS)
