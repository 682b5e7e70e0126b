"""What is done to the residual stream at a site: pure functions of its value, no model in sight.

A transform returns the *delta* that it wants added, not the new value. So deltas of several transforms compose by
running each on the stream as the ones before it left it, an activation addition is bitwise the vector it was
given, and a zero delta is bitwise nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.errors import PlanError


@runtime_checkable
class Transform(Protocol):
    """The seam for a new way to steer: a name, its tensors, and the delta that it adds."""

    kind: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the transform, float32, by name: what is saved and what moves to a device."""
        ...

    @staticmethod
    def delta(
        stream: Float[Tensor, "batch pos d_model"], tensors: Mapping[str, Tensor], strength: float
    ) -> Float[Tensor, "batch pos d_model"]:
        """What to add to ``stream``, in its dtype. ``tensors`` are those of :meth:`tensors`, on its device."""
        ...


@dataclass(frozen=True, eq=False)
class Addition:
    """Activation addition: the stream gets ``strength * vector`` at every token in scope.

    Reference: Turner et al. 2023, "Activation Addition" (arXiv 2308.10248).

    Args:
        vector: the steering vector, any finite 1-d float tensor; kept as a float32 copy.

    >>> Addition(torch.ones(3)).delta(torch.zeros(1, 1, 3), {"vector": torch.ones(3)}, 2.0).tolist()
    [[[2.0, 2.0, 2.0]]]
    """

    kind: ClassVar[str] = "addition"
    vector: Float[Tensor, " d_model"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", checked_vector(self.vector, "a steering vector"))

    def tensors(self) -> dict[str, Tensor]:
        """The steering vector."""
        return {"vector": self.vector}

    @staticmethod
    def delta(
        stream: Float[Tensor, "batch pos d_model"], tensors: Mapping[str, Tensor], strength: float
    ) -> Float[Tensor, "batch pos d_model"]:
        """``strength * vector``, computed in float32 and cast once."""
        return (strength * tensors["vector"]).to(stream.dtype).expand_as(stream)


def checked_vector(vector: Tensor, what: str) -> Float[Tensor, " d_model"]:
    """A float32 copy of a finite 1-d vector; gradients flow through the copy.

    Raises:
        PlanError: not a tensor, not 1-d, not a float tensor, or with NaN or infinite entries.
    """
    if not isinstance(vector, Tensor):
        raise PlanError(f"{what} must be a torch tensor, got {type(vector).__name__}; use torch.tensor(...)")
    if vector.ndim != 1 or vector.numel() == 0:
        raise PlanError(f"{what} must have shape [d_model], got {list(vector.shape)}")
    if not vector.is_floating_point():
        raise PlanError(f"{what} must hold floats, got {vector.dtype}; use .float()")
    if not bool(torch.isfinite(vector).all()):
        count = int((~torch.isfinite(vector)).sum())
        raise PlanError(f"{what} has {count} NaN or infinite entries of {vector.numel()}; fit it again")
    return vector.to(dtype=torch.float32, device="cpu", copy=True)


# How a saved plan finds its transforms again. A new transform is one class here and one line below.
TRANSFORMS: dict[str, type[Addition]] = {Addition.kind: Addition}
