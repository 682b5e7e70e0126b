"""Linear layers for a CPU: through oneDNN, whose products of a row do not depend on the other rows.

That holds from two rows on, for a weight that was laid out beforehand as the product reads it (:class:`PackedLinear`)
and for one that lies as it does in the model (:class:`SharedLinear`), and both give the same bits. A copy takes memory
and saves the laying out at each call: measured on one thread of an AMD EPYC with AVX2, float32, a product of 8 rows
takes 0.65 to 0.8 of the time with it, one of 64 rows 0.88 to 1.0, one of 128 rows 0.95 to 0.98.
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

ROWS = 64
"""The number of rows that the layout is chosen for; any number can be run."""

_TOLERANCE = 1e-4


class SharedLinear(nn.Module):
    """A linear layer through oneDNN on a weight that belongs to somebody else, and lies as ``[out, in]`` in memory.

    Where a product of one row is another kernel's, which adds in another order, the row is taken twice.
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self.bias, self.operand, self.one_row = bias, self.laid_out(weight), True
        kind = (type(self), *weight.shape, weight.dtype)
        if kind not in _ONE_ROW:
            values = torch.linspace(-1, 1, 3 * weight.shape[1]).sin().view(3, -1).to(weight.dtype)
            together = self(values)
            _ONE_ROW[kind] = all(torch.equal(self(values[row : row + 1])[0], together[row]) for row in range(3))
        self.one_row = _ONE_ROW[kind]

    def laid_out(self, weight: Float[Tensor, "out in"]) -> Tensor:
        """The weight as oneDNN is given it."""
        return weight

    def forward(self, values: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """``values @ weight.T + bias``."""
        alone = not self.one_row and values.numel() == values.shape[-1]
        rows = torch.cat([values, values]) if alone else values
        found: Tensor = _product()(rows, self.operand, self.bias, "none", [], "")
        return found[: len(values)] if alone else found


class PackedLinear(SharedLinear):
    """A linear layer with a packed copy of its weight."""

    def laid_out(self, weight: Float[Tensor, "out in"]) -> Tensor:
        """A copy in the layout of oneDNN's kernel."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        return packed


@functools.cache
def _product() -> Callable[..., Tensor]:
    """The product itself: to look for it, and to flatten a batch that it takes as it is, costs as much as a small one
    of one row does."""
    return torch.ops.mkldnn._linear_pointwise.default


_ONE_ROW: dict[tuple[object, ...], bool] = {}
"""By kind of layer, shape and dtype, whether a product of one row is, to the bit, what it is among others."""


class PlainLinear(nn.Module):
    """A linear layer on a weight that belongs to somebody else."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, values: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """``values @ weight.T + bias``."""
        return functional.linear(values, self.weight, self.bias)


def packs(weight: Float[Tensor, "out in"]) -> bool:
    """Whether this torch can pack such weights on such a device, and gives the right products then."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    sample = weight[:32].detach().contiguous()
    values = torch.linspace(-1, 1, 2 * sample.shape[1]).view(2, -1).to(sample.dtype)
    try:
        found = PackedLinear(sample, None)(values)
        shared = SharedLinear(sample, None)(values)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    expected = functional.linear(values, sample)
    slack = _TOLERANCE if weight.dtype == torch.float32 else 0.05
    most = slack * expected.abs().max().clamp(min=1.0)
    return bool((found - expected).abs().max() <= most and (shared - expected).abs().max() <= most)
