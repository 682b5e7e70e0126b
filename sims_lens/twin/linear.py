"""Linear layers for a CPU: weights laid out once as the matrix product reads them."""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

ROWS = 64
"""The number of rows that the layout is chosen for; any number can be run."""

_TOLERANCE = 1e-4


class PackedLinear(nn.Module):
    """A linear layer with a packed copy of its weight, through oneDNN.

    Without it every call brings the weight into the kernel's layout anew. Measured on two cores of an AMD EPYC with
    AVX-512 (``benchmarks/speed.py limits``), a matrix product of 8 rows runs 1.6 times as fast, one of 64 rows 1.15
    times, and onto a vocabulary of 49,152 even 1.4 times. A row's result does not depend on the other rows, from two
    rows on; on some machines from one row on (:func:`one_row_will_do`).
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        kind = (*weight.shape, weight.dtype)
        if kind not in _ONE_ROW:
            values = torch.linspace(-1, 1, 3 * weight.shape[1]).sin().view(3, -1).to(weight.dtype)
            together = self(values)
            _ONE_ROW[kind] = all(torch.equal(self(values[row : row + 1])[0], together[row]) for row in range(3))

    def forward(self, values: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """``values @ weight.T + bias``."""
        found: Tensor = _product()(values, self.packed, self.bias, "none", [], "")
        return found


@functools.cache
def _product() -> Callable[..., Tensor]:
    """The product itself: to look for it, and to flatten a batch that it takes as it is, costs as much as a small one
    of one row does."""
    return torch.ops.mkldnn._linear_pointwise.default


_ONE_ROW: dict[tuple[object, ...], bool] = {}
"""By shape and dtype, whether a product of one row is, to the bit, what it is among others."""


def one_row_will_do() -> bool:
    """Whether products of one row are what they are among others, for all weights that were packed so far."""
    return all(_ONE_ROW.values())


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
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    expected = functional.linear(values, sample)
    slack = _TOLERANCE if weight.dtype == torch.float32 else 0.05
    return bool((found - expected).abs().max() <= slack * expected.abs().max().clamp(min=1.0))
