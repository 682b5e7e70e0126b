"""Do the intervals cover what they say, and does the null band let nothing through? Synthetic data with a known truth.

Of 1,000 data sets of each shape and size, the share whose 95% interval holds the true mean: by the percentile
bootstrap, and by ours (:func:`sims_lens.stats.bootstrap_mean`). And of 10,000 plans that have learnt nothing the share
that lies above the null band, or above the largest, of k controls. ``python benchmarks/coverage.py`` prints the tables
of ``docs/statistics.md``; about two CPU minutes.
"""

import argparse
from collections.abc import Callable

import numpy as np

from sims_lens.stats import DRAWS, bootstrap_mean, crossed_mean, length_controlled_win_rate, null_band

Draw = Callable[[np.random.Generator, int], np.ndarray]
SHAPES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "win rates, three draws a prompt": (lambda rng, n: rng.binomial(9, rng.beta(0.8, 0.4, size=n)) / 9, 0.8 / 1.2),
    "rare events, three draws a prompt": (lambda rng, n: rng.binomial(3, rng.beta(0.3, 5.0, size=n)) / 3, 0.3 / 5.3),
    "exponential (KL, lengths)": (lambda rng, n: rng.exponential(size=n), 1.0),
    "log-normal, sigma 1 (heavy tail)": (lambda rng, n: rng.lognormal(0.0, 1.0, size=n), float(np.exp(0.5))),
}

CROSSED = [
    (3, 100, 0.0, 0.5),
    (3, 100, 0.05, 0.5),
    (3, 100, 0.2, 0.5),
    (3, 100, 0.2, 0.1),
    (3, 100, 1.0, 0.5),
    (3, 20, 0.1, 0.5),
    (5, 100, 0.1, 0.5),
]
"""Seeds, prompts, and standard deviations beside 1 of a single value."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1000, help="data sets of each shape and size")
    given = parser.parse_args()
    rng = np.random.default_rng(0)

    print("| shape of the values | prompts | percentile | ours |\n|---|---|---|---|")
    for name, (draw, truth) in SHAPES.items():
        for n in (20, 50, 100):
            ours = plain = 0
            for seed in range(given.sets):
                values = draw(rng, n)
                interval = bootstrap_mean(values, seed=seed)
                ours += interval.low <= truth <= interval.high
                drawn = values[rng.integers(0, n, size=(DRAWS, n))].mean(axis=1)
                low, high = np.percentile(drawn, [2.5, 97.5])
                plain += low <= truth <= high
            print(f"| {name} | {n} | {100 * plain / given.sets:.1f}% | {100 * ours / given.sets:.1f}% |", flush=True)

    covered, sets = 0, given.sets // 4
    # what is wanted is the rate at equal length, averaged over prompts
    truth = float((1 / (1 + np.exp(-0.8 - np.random.default_rng(1).normal(size=200_000)))).mean())
    for seed in range(sets):
        lengths = rng.normal(10, 8, size=200)
        merit = 1 / (1 + np.exp(-0.8 - rng.normal(0, 1, size=50).repeat(4) - 1.5 * np.tanh(lengths / 8)))
        wins = (rng.random(200) < merit).astype(float)
        found = length_controlled_win_rate(wins, lengths, np.arange(50).repeat(4).tolist(), seed=seed)
        covered += found.low <= truth <= found.high
    print(f"\nlength-controlled win rate, 50 prompts x 4: {100 * covered / sets:.1f}% of {sets} data sets covered")

    print("\n| seeds | prompts | sd of seeds | sd of prompts | covered |\n|---|---|---|---|---|")
    for seeds, prompts, by_seed, by_prompt in CROSSED:
        covered = 0
        for _ in range(given.sets):
            values = rng.normal(0, by_seed, (seeds, 1)) + rng.normal(0, by_prompt, (1, prompts))
            found = crossed_mean(values + rng.normal(size=(seeds, prompts))).interval
            covered += found.low <= 0 <= found.high
        print(f"| {seeds} | {prompts} | {by_seed} | {by_prompt} | {100 * covered / given.sets:.1f}% |", flush=True)

    print(
        "\n| controls | beyond the band, either side | above the band | above the largest control |\n|---|---|---|---|"
    )
    for k in (3, 5, 10):
        effects = rng.normal(1.0, 2.0, size=(10_000, k + 1))
        bands = [null_band(row[1:].tolist()) for row in effects]
        above = np.mean([e > b.high for e, b in zip(effects[:, 0], bands, strict=True) if b])
        below = np.mean([e < b.low for e, b in zip(effects[:, 0], bands, strict=True) if b])
        largest = np.mean(effects[:, 0] > effects[:, 1:].max(axis=1))
        print(f"| {k} | {100 * (above + below):.1f}% | {100 * above:.1f}% | {100 * largest:.1f}% |")


if __name__ == "__main__":
    main()
