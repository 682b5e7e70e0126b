"""Null controls: what is found where there is nothing to find."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.estimators.base import DirectionEstimator, Estimator, checked, fit_layers, mean_gap, unit
from sims_lens.estimators.directions import MeanDifference
from sims_lens.transforms import Transform


def shuffled_mean_differences(
    positive: Float[Tensor, "pair *site d_model"],
    negative: Float[Tensor, "pair *site d_model"],
    *,
    count: int,
    seed: int,
) -> Float[Tensor, "control *site d_model"]:
    """The null control: mean differences of the same pairs with best and worst swapped at random in each.

    Args:
        positive: activations of the best responses.
        negative: activations of the worst responses.
        count: how many shuffles.
        seed: of the swaps.
    """
    generator = torch.Generator().manual_seed(seed)
    difference = positive.float() - negative.float()
    signs = torch.randint(0, 2, (count, len(difference)), generator=generator).float() * 2 - 1
    sums: Tensor = torch.tensordot(signs, difference, dims=1)
    return sums / len(difference)


@dataclass(frozen=True)
class RandomDirection(DirectionEstimator):
    """A random direction, another one at each layer, as long as the mean difference there.

    Args:
        seed: of the directions, their signs included.
    """

    name = "random_direction"
    seed: int = 0

    def vectors(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "other_pair layer d_model"],
    ) -> Float[Tensor, "layer d_model"]:
        """Random directions; the activations give their lengths."""
        gap = mean_gap(positive, negative)
        drawn = torch.randn(gap.shape, generator=torch.Generator().manual_seed(self.seed)).to(gap.device)
        length: Tensor = gap.norm(dim=-1, keepdim=True)
        return unit(drawn) * length


@dataclass(frozen=True)
class ShuffledLabels:
    """Another estimator, fitted to pairs whose positive and negative are swapped at random.

    Where that estimator takes unpaired activations, all labels are permuted instead.

    Args:
        estimator: what is fitted.
        seed: of the swaps; they are the same at every layer.
    """

    estimator: Estimator = field(default_factory=MeanDifference)
    seed: int = 0

    @property
    def name(self) -> str:
        """``shuffled_``, and what is fitted."""
        return f"shuffled_{self.estimator.name}"

    @property
    def reads(self) -> str:
        """What the estimator reads."""
        return self.estimator.reads

    @property
    def paired(self) -> bool:
        """Whether the estimator needs pairs; one that doesn't say so does."""
        return bool(getattr(self.estimator, "paired", True))

    def fit(self, positive: Float[Tensor, "pair d_model"], negative: Float[Tensor, "other_pair d_model"]) -> Transform:
        """The estimator's transform under shuffled labels.

        Raises:
            FitError: see :func:`sims_lens.estimators.base.checked`.
        """
        positive, negative = checked(positive, negative, paired=self.paired, dimensions=2)
        return self.estimator.fit(*self._shuffled(positive, negative))

    def fit_layers(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "other_pair layer d_model"],
    ) -> tuple[Transform, ...]:
        """:meth:`fit` at every layer."""
        positive, negative = checked(positive, negative, paired=self.paired)
        return fit_layers(self.estimator, *self._shuffled(positive, negative))

    def _shuffled(self, positive: Tensor, negative: Tensor) -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        if self.paired:
            kept = torch.randint(0, 2, (len(positive),), generator=generator).bool().to(positive.device)
            kept = kept.reshape(-1, *[1] * (positive.ndim - 1))
            return torch.where(kept, positive, negative), torch.where(kept, negative, positive)
        rows = torch.cat([positive, negative])
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        return rows[order[: len(positive)]], rows[order[len(positive) :]]
