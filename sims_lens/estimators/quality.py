"""How good a fitted direction is, on pairs that it was not fitted to, and how well two halves agree on it."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sims_lens.checks import check_integer, check_seed
from sims_lens.errors import FitError
from sims_lens.estimators.base import Estimator, checked, fit_layers
from sims_lens.stats import Interval
from sims_lens.transforms import Transform

if TYPE_CHECKING:
    import pandas as pd

LEAST_PAIRS = 4
"""Two to fit to and two to hold out; with fewer, quality is unknown."""

_SPLITS = 5
_NONE = 1e-12
"""A variance that is rounding: all pairs have the same share in the AUC."""

_SHOWN = 8


def split_half_cosine(
    positive: Float[Tensor, "pair *site d_model"],
    negative: Float[Tensor, "pair *site d_model"],
    *,
    seed: int,
    splits: int = 20,
) -> Float[Tensor, "*site"]:
    """How well two halves of the pairs agree on the direction: cosine of their mean differences, averaged over
    random splits. Near 0 the direction is noise. With fewer than two pairs it is undefined (NaN).
    """
    difference = positive.float() - negative.float()
    if len(difference) < 2:
        return torch.full(difference.shape[1:-1], torch.nan)
    generator = torch.Generator().manual_seed(seed)
    half = len(difference) // 2
    total = torch.zeros(difference.shape[1:-1])
    for _ in range(splits):
        order = torch.randperm(len(difference), generator=generator)
        first, second = difference[order[:half]].mean(0), difference[order[half:]].mean(0)
        total += torch.nn.functional.cosine_similarity(first, second, dim=-1)
    return total / splits


@dataclass(frozen=True)
class FitQuality:
    """How good a fit is at each layer; made by :func:`fit_quality`.

    Every figure but ``length`` is of pairs that were held out of the fit. With fewer than :data:`LEAST_PAIRS` pairs it
    is NaN.

    Args:
        estimator: its name.
        pairs: how many.
        accuracy: per layer, share of pairs whose positive projects higher than its own negative; chance is 0.5.
        auc: per layer, probability that a positive projects higher than the negative of another pair; chance is 0.5.
            Lower than ``accuracy`` where pairs differ more from each other than within.
        effect_size: per layer, Cohen's d: distance of the class means in standard deviations within a class.
        split_half: per layer, cosine of the directions fitted to two halves of the pairs, averaged over random splits.
        length: per layer, norm of the vector fitted to all pairs; NaN where a transform has none.
        judged: pairs that accuracy, AUC and effect size are of. All, or a random few of many, so that what is kept of
            the others need not grow with their number; their directions were fitted to all pairs of the other folds.
    """

    estimator: str
    pairs: int
    accuracy: tuple[Interval, ...]
    auc: tuple[Interval, ...]
    effect_size: tuple[float, ...]
    split_half: tuple[float, ...]
    length: tuple[float, ...]
    judged: int = 0

    def best(self, count: int = 1) -> tuple[int, ...]:
        """The layers with the highest held-out accuracy, best first; of equal ones that with the higher AUC, then
        that with the larger effect. They count from 0 in the order in which they were given.

        Raises:
            FitError: there were too few pairs to know.
        """
        if self.pairs < LEAST_PAIRS:
            raise FitError(
                f"{self.pairs} pairs can't tell which layer is best; name one, or give {LEAST_PAIRS} pairs or more"
            )

        def worth(layer: int) -> tuple[float, float, float]:
            return self.accuracy[layer].estimate, self.auc[layer].estimate, self.effect_size[layer]

        return tuple(sorted(range(len(self.accuracy)), key=worth, reverse=True)[:count])

    def table(self) -> "pd.DataFrame":
        """One row per layer; an interval's limits stand beside its estimate, in ``_low`` and ``_high``."""
        import pandas as pd

        columns: dict[str, Sequence[float]] = {}
        for name, intervals in (("accuracy", self.accuracy), ("auc", self.auc)):
            columns[name] = [i.estimate for i in intervals]
            columns[f"{name}_low"] = [i.low for i in intervals]
            columns[f"{name}_high"] = [i.high for i in intervals]
        columns |= {"effect_size": self.effect_size, "split_half": self.split_half, "length": self.length}
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self.accuracy), name="layer"))

    def __repr__(self) -> str:
        layers = self._by_worth()[:_SHOWN]
        head = ["layer", "accuracy", "AUC", "effect", "split-half", "length"]
        cells = [head, *(self._cells(layer) for layer in layers)]
        widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
        lines = ["  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        more = len(self.accuracy) - len(layers)
        return "\n".join([self._about(), *lines, *([f"  {more} more layers: see .table()"] if more else [])])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{n}</th>" for n in ("layer", "accuracy", "AUC", "effect", "split-half", "length"))
        body = "".join(
            f"<tr>{''.join(f'<td>{cell}</td>' for cell in self._cells(layer))}</tr>" for layer in self._by_worth()
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<p>{html.escape(self._about())}</p>{table}"

    def _about(self) -> str:
        if self.pairs < LEAST_PAIRS:
            return f"FitQuality of {self.estimator}: {self.pairs} pairs are too few to hold any out"
        some = f" ({self.judged} of them drawn to be judged)" if self.judged < self.pairs else ""
        return (
            f"FitQuality of {self.estimator}: {self.pairs} pairs, each held out of its own fit{some}; best layers first"
        )

    def _by_worth(self) -> tuple[int, ...]:
        layers = range(len(self.accuracy))
        return self.best(len(layers)) if self.pairs >= LEAST_PAIRS else tuple(layers)

    def _cells(self, layer: int) -> list[str]:
        numbers = f"{self.effect_size[layer]:.2f}", f"{self.split_half[layer]:.2f}", f"{self.length[layer]:.3g}"
        return [str(layer), str(self.accuracy[layer]), str(self.auc[layer]), *numbers]


def fit_quality(
    estimator: Estimator,
    positive: Float[Tensor, "pair layer d_model"],
    negative: Float[Tensor, "pair layer d_model"],
    *,
    seed: int = 0,
    folds: int = 5,
) -> FitQuality:
    """Cross-fit an estimator over pairs: each is projected on directions that were fitted without it.

    Both activations of a pair are held out together, and projections are compared within a fold only, since each fold
    has a direction of its own. Intervals are Wilson's; that of the AUC has the effective number of comparisons
    ``n* = A (1 - A) / var(A)``, the variance by the pairs' shares in it, at most two per pair. Unlike a
    bootstrap they don't close to a point at 1. They are for these directions on new pairs, and take rows as independent
    of each other, which tokens of one response are not. In simulations of a mean difference they cover the truth in
    86 to 99 of 100 samples; where there is nothing to find, in 80 to 93 (folds share what they were fitted to, so that
    chance favours or disfavours them together): there the shuffled-label control says more than the interval.

    Args:
        estimator: any whose transforms have a ``direction``.
        positive: activations of the better responses, one row per pair.
        negative: those of the worse ones, pair by pair.
        seed: of folds and splits.
        folds: how many; fewer where a fold would hold less than two pairs.

    Raises:
        FitError: the activations can't be fitted, ``folds`` is less than 2, or a transform has no direction.

    Reference: Wilson 1927; Sen 1960 (variance of a U statistic by its components).
    """
    positive, negative = checked(positive, negative, paired=True)

    def refit(chosen: Int[Tensor, " pair"]) -> Sequence[Transform]:
        return fit_layers(estimator, positive[chosen], negative[chosen])

    fitted = fit_layers(estimator, positive, negative)
    return held_out(estimator.name, fitted, refit, positive, negative, seed=seed, folds=folds)


def held_out(
    name: str,
    fitted: Sequence[Transform],
    refit: Callable[[Int[Tensor, " pair"]], Sequence[Transform]],
    positive: Float[Tensor, "pair layer d_model"],
    negative: Float[Tensor, "pair layer d_model"],
    *,
    seed: int = 0,
    folds: int = 5,
    splits: int = _SPLITS,
) -> FitQuality:
    """:func:`fit_quality` of what is fitted to something else than the rows that are projected, HPR's tokens say.

    Args:
        name: of the estimator.
        fitted: one transform per layer, fitted to all pairs.
        refit: fits to some of the pairs, given their indices.
        positive: what is projected, one row per pair.
        negative: the same, pair by pair.
        seed: of folds and splits.
        folds: how many; fewer where a fold would hold less than two pairs.
        splits: random halvings for ``split_half``; without any it is NaN.
    """
    check_integer("folds", folds, 2, error=FitError)
    check_seed(seed)
    pairs = len(positive)
    length = tuple(_length(transform) for transform in fitted)
    if pairs < LEAST_PAIRS:
        return unknown_quality(name, pairs, length)

    def directions(chosen: Int[Tensor, " pair"]) -> Float[Tensor, "layer d_model"]:
        return _directions(refit(chosen)).to(positive.device)

    parts, halves = divided(pairs, seed=seed, folds=folds, splits=splits)
    order = torch.cat(parts)
    projections = []
    for held in parts:
        axes = directions(order[~torch.isin(order, held)])
        up, down = (torch.einsum("pld,ld->lp", rows[held], axes).double().cpu() for rows in (positive, negative))
        projections.append((up, down))
    total = torch.zeros(positive.shape[1], device=positive.device)
    for first, second in halves:
        total += (directions(first) * directions(second)).sum(-1)
    split_half = tuple((total / splits).tolist()) if splits else (math.nan,) * len(total)
    return judged(name, pairs, projections, split_half, length)


def divided(
    pairs: int, *, seed: int, folds: int = 5, splits: int = _SPLITS
) -> tuple[list[Int[Tensor, " _held"]], list[tuple[Int[Tensor, " half"], Int[Tensor, " other_half"]]]]:
    """Pairs in folds, in random order, and in random halves, one after another of the same generator."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randperm(pairs, generator=generator).tensor_split(min(folds, pairs // 2))
    orders = [torch.randperm(pairs, generator=generator) for _ in range(splits)]
    return list(parts), [(order[: pairs // 2], order[pairs // 2 :]) for order in orders]


def judged(
    name: str,
    pairs: int,
    projections: Sequence[tuple[Float[Tensor, "layer _held"], Float[Tensor, "layer _held"]]],
    split_half: Sequence[float],
    length: Sequence[float],
) -> FitQuality:
    """The figures of held-out projections.

    Args:
        name: of the estimator.
        pairs: how many it was fitted to.
        projections: of the positive and of the negative activations of each fold's pairs, or of some of them, on the
            directions that were fitted to the other folds; float64, on the CPU.
        split_half: see :class:`FitQuality`.
        length: see there.
    """
    wins, shares, gaps, squares = [], [], [], []
    for up, down in projections:
        held = up.shape[1]
        above = torch.sign(up[:, :, None] - down[:, None, :]) / 2 + 0.5  # [layer, positive, negative], ties half
        own = above.diagonal(dim1=1, dim2=2)
        wins.append(own)
        shares.append(((above.sum(1) + above.sum(2)) / 2 - own) / (held - 1))
        gaps.append(up - down)
        squares.append((up.var(1) + down.var(1)) * (held - 1))
    share = torch.cat(shares, 1)
    count = share.shape[1]
    auc, variance = share.mean(1), 4 * share.var(1) / count
    deviation = (torch.stack(squares).sum(0) / (2 * (count - len(projections)))).sqrt()
    return FitQuality(
        estimator=name,
        pairs=pairs,
        accuracy=tuple(_wilson(p, float(count)) for p in torch.cat(wins, 1).mean(1).tolist()),
        auc=tuple(
            _wilson(p, min(2.0 * count, p * (1 - p) / v) if v > _NONE else float(count))
            for p, v in zip(auc.tolist(), variance.tolist(), strict=True)
        ),
        effect_size=tuple((torch.cat(gaps, 1).mean(1) / deviation).tolist()),
        split_half=tuple(split_half),
        length=tuple(length),
        judged=count,
    )


def unknown_quality(name: str, pairs: int, length: Sequence[float]) -> FitQuality:
    """That of a fit to too few pairs to hold any out."""
    unknown = (Interval(math.nan, math.nan, math.nan),) * len(length)
    blank = (math.nan,) * len(length)
    return FitQuality(name, pairs, unknown, unknown, blank, blank, tuple(length))


def _directions(transforms: Sequence[Transform]) -> Float[Tensor, "layer d_model"]:
    found = [getattr(transform, "direction", None) for transform in transforms]
    if missing := [t.kind for t, direction in zip(transforms, found, strict=True) if not isinstance(direction, Tensor)]:
        raise FitError(f"a transform of kind {missing[0]!r} has no direction to project on, so its quality is unknown")
    return torch.stack([direction for direction in found if isinstance(direction, Tensor)])


def _length(transform: Transform) -> float:
    vector = getattr(transform, "vector", None)
    return float(vector.norm()) if isinstance(vector, Tensor) else math.nan


def _wilson(share: float, count: float) -> Interval:
    """The 95% score interval of a share of ``count`` independent trials."""
    w = 1.96**2 / count
    middle = (share + w / 2) / (1 + w)
    half = 1.96 / (1 + w) * math.sqrt(share * (1 - share) / count + w / (4 * count))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))
