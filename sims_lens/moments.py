"""Statistics of activations that are seen a batch at a time: what is kept does not grow with their number.

Sums are kept in float64. What two classes have in common can be thousands of times what they differ by, and the sum of
some thousand float32 rows has lost the digits of that difference; a float32 sum with compensation would take the same
eight bytes and more steps. They live on the CPU, as some accelerators have no float64.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.errors import FitError


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and spread of rows.

    Args:
        count: rows so far.
        mean: of each entry, float64; zero where there are no rows.
        squares: sum over the rows of the squared deviation of each entry from its mean, float64.

    Reference: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    >>> rows = torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    >>> moments = Moments.empty(2).update(rows[:1]).update(rows[1:])
    >>> moments.count, moments.mean.tolist(), moments.variance.tolist()
    (3, [4.0, 5.0], [13.0, 0.0])
    """

    count: int
    mean: Float[Tensor, "*site d_model"]
    squares: Float[Tensor, "*site d_model"]

    @classmethod
    def empty(cls, *shape: int) -> "Moments":
        """Of no rows, each of which would have that shape."""
        return cls(0, torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))

    @classmethod
    def of(cls, rows: Float[Tensor, "row *site d_model"]) -> "Moments":
        """Of these rows."""
        if not len(rows):
            return cls.empty(*rows.shape[1:])
        variance, mean = torch.var_mean(rows.detach().to("cpu", torch.float64), dim=0, correction=0)
        return cls(len(rows), mean, variance * len(rows))

    def update(self, rows: Float[Tensor, "row *site d_model"]) -> "Moments":
        """With more rows."""
        return self.merge(Moments.of(rows))

    def merge(self, other: "Moments") -> "Moments":
        """Of the rows of both.

        Raises:
            FitError: their rows have different shapes.
        """
        if self.mean.shape != other.mean.shape:
            raise FitError(
                f"moments of rows of shape {list(self.mean.shape)} and {list(other.mean.shape)} can't be merged; "
                "read both at the same layers of the same model"
            )
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        gap = other.mean - self.mean
        return Moments(
            count,
            self.mean + gap * (other.count / count),
            self.squares + other.squares + gap.square() * (self.count * other.count / count),
        )

    @property
    def variance(self) -> Float[Tensor, "*site d_model"]:
        """Of each entry, with the count less one; NaN with fewer than two rows."""
        return self.squares / (self.count - 1) if self.count > 1 else torch.full_like(self.squares, torch.nan)


@dataclass(frozen=True, eq=False)
class PairMoments:
    """Moments of both classes of contrast pairs, of their differences, and weighted sums of the differences.

    Whatever is linear in the pairs' differences comes of the sums: a row of weights that is 1 on half of the pairs and
    0 on the others gives the half's mean difference, one of signs that of shuffled labels.

    Args:
        positive: of the positive activations.
        negative: of the negative ones.
        difference: of positive less negative, pair by pair.
        sums: for each row of weights w, the sum over the pairs of ``w * (positive - negative)``, float64.
    """

    positive: Moments
    negative: Moments
    difference: Moments
    sums: Float[Tensor, "group *site d_model"]

    @classmethod
    def empty(cls, groups: int, *shape: int) -> "PairMoments":
        """Of no pairs, with that many rows of weights."""
        none = Moments.empty(*shape)
        return cls(none, none, none, torch.zeros((groups, *shape), dtype=torch.float64))

    def _at(self, site: int) -> "PairMoments":
        """At one of several sites, the same memory."""
        one, other, between = (
            Moments(each.count, each.mean[site], each.squares[site])
            for each in (self.positive, self.negative, self.difference)
        )
        return PairMoments(one, other, between, self.sums[:, site])

    def update(
        self,
        positive: Float[Tensor, "pair *site d_model"],
        negative: Float[Tensor, "pair *site d_model"],
        weights: Float[Tensor, "group pair"],
    ) -> "PairMoments":
        """With more pairs.

        Args:
            positive: their positive activations.
            negative: their negative ones.
            weights: each group's weights of these pairs.
        """
        positive, negative = (rows.detach().to("cpu", torch.float64) for rows in (positive, negative))
        difference = positive - negative
        return self.merge(
            PairMoments(
                Moments.of(positive),
                Moments.of(negative),
                Moments.of(difference),
                torch.tensordot(weights.to("cpu", torch.float64), difference, dims=1),
            )
        )

    def merge(self, other: "PairMoments") -> "PairMoments":
        """Of the pairs of both."""
        return PairMoments(
            self.positive.merge(other.positive),
            self.negative.merge(other.negative),
            self.difference.merge(other.difference),
            self.sums + other.sums,
        )


class PairStream:
    """Moments of pairs at several layers, that grow in place: what is kept is allocated once, ahead of the short-lived
    tensors of forward passes, whose memory it would tear apart; and only one layer is in float64 at a time.

    Args:
        groups: rows of weights.
        layers: how many.
        d_model: width.
    """

    def __init__(self, groups: int, layers: int, d_model: int) -> None:
        self._sums = torch.zeros(groups, layers, d_model, dtype=torch.float64)
        self._means = torch.zeros(3, layers, d_model, dtype=torch.float64)
        self._squares = torch.zeros(3, layers, d_model, dtype=torch.float64)
        self._count = 0

    @property
    def moments(self) -> PairMoments:
        """As they are now."""
        one, other, between = (Moments(self._count, *kept) for kept in zip(self._means, self._squares, strict=True))
        return PairMoments(one, other, between, self._sums)

    def update(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "pair layer d_model"],
        weights: Float[Tensor, "group pair"],
    ) -> None:
        """Add pairs; see :meth:`PairMoments.update`."""
        before = self.moments
        for layer, (one, other) in enumerate(zip(positive.unbind(1), negative.unbind(1), strict=True)):
            new = before._at(layer).update(one, other, weights)
            for index, each in enumerate((new.positive, new.negative, new.difference)):
                self._means[index, layer] = each.mean
                self._squares[index, layer] = each.squares
            self._sums[:, layer] = new.sums
        self._count += len(positive)
