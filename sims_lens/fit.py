"""Fitting a direction to contrast pairs: pure, float32, all layers at once, no model in sight."""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor


def mean_difference(
    positive: Float[Tensor, "pair *site d_model"], negative: Float[Tensor, "pair *site d_model"]
) -> Float[Tensor, "*site d_model"]:
    """Mean of the positive activations less the mean of the negative ones.

    Reference: Marks & Tegmark 2023 (difference in means); Rimsky et al. 2024 (CAA, arXiv 2312.06681).

    >>> mean_difference(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).tolist()
    [2.0, -1.0]
    """
    difference: Tensor = reduce(positive.float() - negative.float(), "pair ... -> ...", "mean")
    return difference


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


def unit(vector: Float[Tensor, "*site d_model"]) -> Float[Tensor, "*site d_model"]:
    """The vector at norm 1; a zero vector stays zero.

    >>> unit(torch.tensor([3.0, 4.0])).norm().item()
    1.0
    """
    norm = vector.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, vector / norm.clamp(min=torch.finfo(torch.float32).tiny), vector)
