"""What a twin is: a plain, fast model with a TransformerLens model's weights, which fires that model's HookPoints."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sims_lens.twin.attention import Memory
from sims_lens.twin.linear import PackedLinear, PlainLinear, SharedLinear, packs

Points = Mapping[str, Any]
"""HookPoints that something is attached to, by their own names: the only ones that a twin need fire."""


@dataclass
class Cut:
    """Where a forward pass is cut in two, so that its lower part can be run once for several upper ones.

    Args:
        block: the first block of the upper part.
        stream: what enters it. None: the whole pass is run, and it is put down here; otherwise only the upper part is
            run, on it.
    """

    block: int
    stream: Float[Tensor, "batch pos d_model"] | None = None


class Unsupported(Exception):
    """This model can't have a twin; the message says why."""


class Twin(ABC):
    """A plain model with the weights of a TransformerLens model.

    Args:
        dtype: of its weights and activations.
        packed: whether its matrices are packed copies; otherwise they are the model's own.
    """

    def __init__(self, dtype: torch.dtype, *, packed: bool) -> None:
        self.dtype, self.packed = dtype, packed
        self.refused: dict[str, str] = {}
        """HookPoints of the model that this does not fire as the model does, and why; names as they call themselves."""

    @property
    @abstractmethod
    def fires(self) -> frozenset[str]:
        """Names of the HookPoints that it can fire."""

    @property
    def by_length(self) -> frozenset[str]:
        """Of :attr:`fires`, those that are shown rows of one length at a time: see :class:`Inside`."""
        return frozenset()

    def compared(self) -> None:  # noqa: B027 - most have nothing to do then
        """It was compared with its model at every HookPoint; from now on few are asked for."""

    @abstractmethod
    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"],
        memory: Memory,
        *,
        keep: int,
        points: Points,
        cut: Cut | None = None,
    ) -> Float[Tensor, "batch keep d_vocab"]:
        """Logits of the last ``keep`` columns.

        Args:
            tokens: new tokens.
            positions: of each, from 0.
            memory: keeps keys and values, and attends to them.
            keep: columns, counted from the right.
            points: of these HookPoints, those in :attr:`fires` are fired.
            cut: see :class:`Cut`.
        """


def linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, packed: bool, unembedding: bool = False
) -> nn.Module:
    """A linear layer on a weight ``[out, in]``: a packed copy, or the weight itself where its dtype is right."""
    weight = weight.detach().to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    if not packed or not packs(weight):
        return PlainLinear(weight, bias)
    shared = weight.is_contiguous() and (unembedding or not worth_a_copy(len(weight), weight.shape[1], dtype))
    return SharedLinear(weight, bias) if shared and dtype == torch.float32 else PackedLinear(weight, bias)


def worth_a_copy(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether a weight is packed.

    In float32 the unembedding and matrices with no more outputs than inputs are not: they hold three fifths of a small
    model, and gain the least per byte (a product of 128 rows 2 to 4%). In half precision, where the product itself is
    faster, all are.
    """
    return dtype != torch.float32 or outputs > inputs


__all__ = ["Cut", "Points", "Twin", "Unsupported", "linear", "worth_a_copy"]
