"""What an estimator is: activations of contrast pairs in, a transform out. Pure, float32, no model in sight."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sims_lens.checks import shown
from sims_lens.errors import FitError
from sims_lens.transforms import Addition, Transform

_NO_PART = 1e-6
"""A direction that carries less than this share of the mean difference doesn't separate the class means."""


@runtime_checkable
class Estimator(Protocol):
    """The seam for a new way to find what to steer with.

    Besides these it may have ``fit_layers(positive, negative)``, which fits all layers ``[pair, layer, d_model]`` at
    once; :func:`fit_layers` finds it.
    """

    @property
    def name(self) -> str:
        """What tables and plans call it."""
        ...

    @property
    def reads(self) -> str:
        """``"mean"``: a row is a response, averaged over its tokens. ``"tokens"``: a row is a token, and the row of
        the same index is its counterpart in the other response of the pair.
        """
        ...

    def fit(self, positive: Float[Tensor, "pair d_model"], negative: Float[Tensor, "other_pair d_model"]) -> Transform:
        """The transform that makes a stream like the negative activations more like the positive ones."""
        ...


class DirectionEstimator(ABC):
    """An estimator of one steering vector per layer: a subclass says what :meth:`vectors` are, and no more."""

    reads = "mean"

    @property
    @abstractmethod
    def name(self) -> str:
        """What tables and plans call it."""

    @property
    def paired(self) -> bool:
        """Whether row k of the negative activations must be the counterpart of row k of the positive ones."""
        return False

    @abstractmethod
    def vectors(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "other_pair layer d_model"],
    ) -> Float[Tensor, "layer d_model"]:
        """The steering vectors of valid, float32 activations."""

    def fit(self, positive: Float[Tensor, "pair d_model"], negative: Float[Tensor, "other_pair d_model"]) -> Addition:
        """Fit one site.

        Args:
            positive: activations of the better responses.
            negative: those of the worse ones; as many, pair by pair, where the estimator is ``paired``.

        Raises:
            FitError: see :func:`checked`; or the direction that was found does not separate the class means.
        """
        positive, negative = checked(positive, negative, paired=self.paired, dimensions=2)
        return self.fit_layers(positive[:, None], negative[:, None])[0]

    def fit_layers(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "other_pair layer d_model"],
    ) -> tuple[Addition, ...]:
        """:meth:`fit` at every layer."""
        positive, negative = checked(positive, negative, paired=self.paired)
        vectors = self.vectors(positive, negative)
        part = vectors.norm(dim=-1) / mean_gap(positive, negative).norm(dim=-1)
        refuse(~(part > _NO_PART), f"{self.name} found no direction that separates the class means at")
        return tuple(Addition(vector) for vector in vectors)


def fit_layers(
    estimator: Estimator,
    positive: Float[Tensor, "pair layer d_model"],
    negative: Float[Tensor, "other_pair layer d_model"],
) -> tuple[Transform, ...]:
    """Fit any estimator at every layer: by its own ``fit_layers`` where it has one, else layer by layer.

    Raises:
        FitError: the activations can't be fitted; see :func:`checked`.
    """
    check_estimator(estimator)
    at_once: Callable[[Tensor, Tensor], tuple[Transform, ...]] | None = getattr(estimator, "fit_layers", None)
    if at_once is not None:
        return tuple(at_once(positive, negative))
    positive, negative = checked(positive, negative, paired=getattr(estimator, "paired", True))
    return tuple(estimator.fit(p, n) for p, n in zip(positive.unbind(1), negative.unbind(1), strict=True))


def check_estimator(estimator: object) -> None:
    """Raise :class:`FitError` unless something can fit: an object, not its class or its name."""
    if isinstance(estimator, type):
        raise FitError(f"the estimator {estimator.__name__} is a class; give an object of it, {estimator.__name__}()")
    if not isinstance(estimator, Estimator):
        raise FitError(
            f"an estimator has a name, reads and fit(positive, negative), as sims_lens.MeanDifference() has; "
            f"{shown(estimator)} has not"
        )


def checked(
    positive: Tensor, negative: Tensor, *, paired: bool, dimensions: int = 3
) -> tuple[Float[Tensor, "pair *layer d_model"], Float[Tensor, "other_pair *layer d_model"]]:
    """Both classes in float32, without their gradients.

    Args:
        positive: ``[pair, layer, d_model]``, or ``[pair, d_model]`` where ``dimensions`` is 2.
        negative: the same, of as many pairs or of others.
        paired: whether there must be as many of one as of the other.
        dimensions: 2 or 3.

    Raises:
        FitError: another shape, not floats, fewer than two rows of a class, values that are not finite, or a layer
            where both classes have the same mean.
    """
    wanted = "[pair, layer, d_model]" if dimensions == 3 else "[pair, d_model]"
    for what, rows in (("positive", positive), ("negative", negative)):
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise FitError(f"{what} activations must be a tensor of floats, got {got}")
        if rows.is_meta:
            raise FitError(f"{what} activations are on the meta device and hold no values; capture them on another")
        if rows.ndim != dimensions or rows[0:1].numel() == 0:
            raise FitError(f"{what} activations must have shape {wanted}, got {list(rows.shape)}")
    shapes = f"got {list(positive.shape)} positive and {list(negative.shape)} negative"
    if positive.shape[1:] != negative.shape[1:]:
        raise FitError(f"both classes need the same layers and d_model; {shapes}")
    if paired and len(positive) != len(negative):
        raise FitError(f"this estimator is fitted to pairs, one negative for each positive; {shapes}")
    if min(len(positive), len(negative)) < 2:
        raise FitError(f"a fit needs two pairs or more; {shapes}")
    positive, negative = positive.detach().float(), negative.detach().float()
    check_means(positive.mean(0, dtype=torch.float64), negative.mean(0, dtype=torch.float64))
    return positive, negative


def check_means(positive: Float[Tensor, "*layer d_model"], negative: Float[Tensor, "*layer d_model"]) -> None:
    """Raise :class:`FitError` where the class means, in float64, are not finite or the same."""
    for what, mean in (("positive", positive), ("negative", negative)):
        bad = ~mean.isfinite().all(-1)
        refuse(bad, f"{what} activations are NaN or infinite; capture them in float32, or leave out")
    same = (positive - negative).float().norm(dim=-1) == 0
    refuse(same, "positive and negative activations have the same mean, so there is nothing to fit; leave out")


def refuse(bad: Bool[Tensor, "*layer"], what: str) -> None:
    """Raise an error that ends in the layers where ``bad`` is true, if there are any."""
    if not bool(bad.any()):
        return
    if bad.ndim == 0:
        raise FitError(f"{what} the site given")
    found = [str(layer) for layer in bad.nonzero()[:, 0].tolist()]
    shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    raise FitError(f"{what} layer{'s' if len(found) > 1 else ''} {shown} of the {len(bad)} given")


def mean_gap(
    positive: Float[Tensor, "pair *layer d_model"], negative: Float[Tensor, "other_pair *layer d_model"]
) -> Float[Tensor, "*layer d_model"]:
    """The class means' difference, of paired and of unpaired activations."""
    # In float64, because what the classes have in common can be far larger than what they differ by.
    return (positive.mean(0, dtype=torch.float64) - negative.mean(0, dtype=torch.float64)).float()


def along(
    directions: Float[Tensor, "*layer d_model"], difference: Float[Tensor, "*layer d_model"]
) -> Float[Tensor, "*layer d_model"]:
    """The part of the mean difference along each direction, ``(u·d) u`` with u at norm 1.

    So every estimator's vector is as long as the class means are apart along it, and its sign is that of the data: it
    doesn't depend on the sign, or the length, of ``directions``.

    >>> along(torch.tensor([-2.0, 0.0]), torch.tensor([3.0, 4.0])).tolist()
    [3.0, -0.0]
    """
    axis = unit(directions)
    return (axis * difference).sum(-1, keepdim=True) * axis


def unit(vector: Float[Tensor, "*site d_model"]) -> Float[Tensor, "*site d_model"]:
    """The vector at norm 1; a zero vector stays zero.

    >>> unit(torch.tensor([3.0, 4.0])).norm().item()
    1.0
    """
    norm = vector.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, vector / norm.clamp(min=torch.finfo(torch.float32).tiny), vector)
