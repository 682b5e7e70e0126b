"""Who can still win: which cells are measured on more, and what is then known of each."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from sims_lens.analysis.sweep.measuring import Bench
from sims_lens.analysis.sweep.result import FIGURES, SweepCell
from sims_lens.calibration import FluencyBudget
from sims_lens.stats import DRAWS, Interval, bca

_FIRST = {"pair": 4, "prompt": 8}
"""Units in the first round: few, because most cells are out after it, but enough for a Student interval to be of use.
Decoding for 4 prompts takes about as long as for 8."""


def rounds_of(bench: Bench, adaptive: bool, seed: int) -> list[list[int]]:
    """The units of each round: a seeded order of the prompts, cut at 4 (8), 8, 16, ... of them."""
    prompts = np.unique(bench.prompt_of)
    if not adaptive:
        return [list(range(len(bench.prompt_of)))]
    order = np.random.default_rng(seed).permutation(prompts)
    ends = [min(_FIRST[bench.unit], len(order))]
    while ends[-1] < len(order):
        ends.append(min(2 * ends[-1], len(order)))
    rounds = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [np.flatnonzero(np.isin(bench.prompt_of, each)).tolist() for each in rounds]


class Race:
    """What has been measured, and who can still win.

    Args:
        places: direction, site and layer of each candidate.
        cells: candidate and coefficient of each cell.
        prompt_of: the prompt of each unit.
        budget: what counts as fluent.
    """

    def __init__(
        self,
        places: Sequence[tuple[str, str, int]],
        cells: Sequence[tuple[int, float]],
        prompt_of: Int[np.ndarray, " unit"],
        budget: FluencyBudget,
    ) -> None:
        self.cells, self.prompt_of, self.budget = list(cells), prompt_of, budget
        self.found = np.full((len(cells), len(prompt_of), len(FIGURES)), np.nan)
        self.seen = np.zeros((len(cells), len(prompt_of)), dtype=bool)
        self.done: set[tuple[int, int]] = set()  # cell and round
        self.neighbours = _neighbours(places, cells)

    def going(self) -> set[int]:
        """The cells that can still be the best within the budget, and the best one so far with its neighbours."""
        every = range(len(self.cells))
        effect, rise, kl = (np.array([_student(*self.sums(self.found[c, :, k])) for c in every]) for k in (0, 2, 3))
        limits = (rise, math.log(self.budget.perplexity_ratio)), (kl, self.budget.kl)
        within = np.logical_and.reduce([value[:, 0] <= limit for value, limit in limits])
        beyond = np.logical_or.reduce([value[:, 1] > limit for value, limit in limits])
        hopeful = (effect[:, 2] >= 0) & ~beyond
        leading = np.where(within & (effect[:, 0] > 0), effect[:, 0], -np.inf)
        if not np.isfinite(leading).any():
            return set(np.flatnonzero(hopeful).tolist())
        best = int(leading.argmax())
        behind = self.found[:, :, 0] - self.found[best, :, 0]  # on the units that both have
        reaches = np.array([_student(*self.sums(behind[c]))[2] >= 0 for c in every])
        return {*np.flatnonzero(hopeful & reaches).tolist(), best, *self.neighbours[best]}

    def behind(self, going: set[int], level: int) -> dict[int, list[int]]:
        """For each round up to this one, the cells among ``going`` that have not had it."""
        missing = {k: [cell for cell in sorted(going) if (cell, k) not in self.done] for k in range(level + 1)}
        return {k: cells for k, cells in missing.items() if cells}

    def sums(
        self, values: Float[np.ndarray, " unit"]
    ) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
        """Sum of values over each prompt's units, and their number, for the prompts that have any."""
        known = ~np.isnan(values)
        sizes = np.bincount(self.prompt_of[known], minlength=int(self.prompt_of.max()) + 1)
        sums = np.bincount(self.prompt_of[known], weights=values[known], minlength=len(sizes))
        return sums[sizes > 0], sizes[sizes > 0].astype(float)


def _neighbours(places: Sequence[tuple[str, str, int]], cells: Sequence[tuple[int, float]]) -> list[list[int]]:
    """Of each cell, those at the next layer and the next coefficient of the same direction and site."""
    index = {(*places[place], coefficient): k for k, (place, coefficient) in enumerate(cells)}
    grid = sorted({coefficient for _, coefficient in cells})
    layers: dict[tuple[str, str], list[int]] = {}
    for name, site, layer in places:
        layers.setdefault((name, site), []).append(layer)
    found = []
    for place, coefficient in cells:
        name, site, layer = places[place]
        column, row = sorted(layers[name, site]), grid.index(coefficient)
        at = column.index(layer)
        near = [(name, site, column[k], coefficient) for k in (at - 1, at + 1) if 0 <= k < len(column)]
        near += [(name, site, layer, grid[k]) for k in (row - 1, row + 1) if 0 <= k < len(grid)]
        found.append([index[place] for place in near])
    return found


def cells_of(
    race: Race, places: Sequence[tuple[str, str, int]], grid: Sequence[float], seed: int
) -> tuple[SweepCell, ...]:
    """Every cell with its figures; coefficient 0 is known without measuring."""
    index = {cell: k for k, cell in enumerate(race.cells)}
    found = []
    for place, where in enumerate(places):
        for coefficient in grid:
            if not coefficient:
                nothing, half, one = (Interval(value, value, value) for value in (0.0, 0.5, 1.0))
                found.append(SweepCell(*where, 0.0, nothing, half, one, nothing, len(race.prompt_of)))
                continue
            cell = index[place, coefficient]
            effect, win, rise, kl = (_bootstrap(*race.sums(race.found[cell, :, k]), seed) for k in range(len(FIGURES)))
            count = int(race.seen[cell].sum())
            found.append(SweepCell(*where, coefficient, effect, win, rise.map(_exp), kl, count))
    return tuple(found)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _student(sums: Float[np.ndarray, " prompt"], sizes: Float[np.ndarray, " prompt"]) -> tuple[float, float, float]:
    """Mean over units with its Student interval, clustered by prompt; infinite where there are no units.

    The bootstrap's interval is too narrow for a handful of prompts; this one holds for few, too.
    """
    if not len(sums):
        return math.inf, math.inf, math.inf
    mean = float(sums.sum() / sizes.sum())
    if len(sums) == 1:
        return mean, -math.inf, math.inf
    error = math.sqrt(len(sums) / (len(sums) - 1) * float(((sums - mean * sizes) ** 2).sum())) / float(sizes.sum())
    half = _quantile(len(sums) - 1) * error
    return mean, mean - half, mean + half


def _quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t: Abramowitz & Stegun 26.7.5, within 1% from 3 degrees of freedom on.

    >>> round(_quantile(10), 2)
    2.23
    """
    z, n = 1.959964, degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def _bootstrap(sums: Float[np.ndarray, " prompt"], sizes: Float[np.ndarray, " prompt"], seed: int) -> Interval:
    """:func:`~sims_lens.stats.bootstrap_mean` of units that come in prompts: the prompts are what is drawn."""
    if not len(sums):
        return Interval(math.inf, math.inf, math.inf)
    drawn = _draws(len(sums), seed)
    mean = float(sums.sum() / sizes.sum())
    return bca(mean, (drawn @ sums) / (drawn @ sizes), sums - mean * sizes)


@lru_cache(maxsize=32)
def _draws(count: int, seed: int) -> Float[np.ndarray, "draw prompt"]:
    """How often each prompt is in each bootstrap sample: the same samples as ``bootstrap_mean`` draws."""
    chosen = np.random.default_rng(seed).integers(0, count, size=(DRAWS, count))
    flat = (chosen + count * np.arange(DRAWS)[:, None]).ravel()
    return np.bincount(flat, minlength=DRAWS * count).reshape(DRAWS, count).astype(float)


__all__ = ["Race", "cells_of", "rounds_of"]
