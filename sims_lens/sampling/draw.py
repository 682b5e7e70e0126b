"""Choosing the next token: filters and inverse-CDF sampling, pure functions of logits and uniform numbers.

Each sample brings its own uniform numbers, made from the seed, its prompt and its draw. So a sample does not
depend on which batch it was decoded in, and no global random state is touched.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_FIRST = 1024
"""Tokens that are looked at first for a ``top_p``: nearly always they hold that much probability."""

_BLOCK = 256
"""Tokens whose probabilities are summed first, so that the running sum over a whole vocabulary is short."""


def uniforms(seed: int, prompt: str, draw: int, length: int) -> Float[Tensor, " length"]:
    """The uniform numbers in [0, 1) of one sample, one per token. A longer request begins with a shorter one's."""
    key = hashlib.sha256(f"{seed}\0{draw}\0{prompt}".encode("utf-8", "surrogatepass")).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(generator.random(length))


def choose(
    logits: Float[Tensor, "batch d_vocab"],
    uniform: Float[Tensor, " batch"],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Int[Tensor, " batch"]:
    """Sample a token per row by inverting the cumulative distribution over tokens in the order of the vocabulary.

    That order, and not the one by probability, because then a rounding difference in the logits moves a boundary by a
    millionth and never swaps two tokens.

    Args:
        logits: any float dtype; computed in float32.
        uniform: one number in [0, 1) per row.
        temperature: divides the logits; above 0.
        top_k: only the k most probable tokens; None for all.
        top_p: only the most probable tokens that reach this probability together; at least one is kept.
        min_p: only tokens at least this probable, as a share of the most probable one's.

    The filters act in this order, each on what the one before has left.
    """
    size = logits.shape[-1]
    if top_k is None and top_p >= 1.0:
        probability = (logits.float() / temperature).softmax(-1)
        if min_p > 0:
            probability = probability * (probability >= min_p * probability.amax(-1, keepdim=True))
        return _invert(probability, uniform)
    wanted = min(size, _FIRST if top_k is None else top_k)
    values, tokens = logits.topk(wanted, dim=-1)
    scaled = values.float() / temperature
    # Where the vocabulary was not cut to them, probabilities are of the whole of it.
    total = scaled.logsumexp(-1) if top_k is not None else (logits.float() / temperature).logsumexp(-1)
    probability = (scaled - total[:, None]).exp()
    if top_p < 1.0:
        before = probability.cumsum(-1) - probability
        if wanted < size and top_k is None and bool((before[:, -1] < top_p).any()):
            values, tokens = logits.sort(dim=-1, descending=True)
            probability = (values.float() / temperature - total[:, None]).exp()
            before = probability.cumsum(-1) - probability
        probability = torch.where(before < top_p, probability, 0.0)
    probability = torch.where(probability >= min_p * probability[:, :1], probability, 0.0)
    tokens, order = tokens.sort(dim=-1)
    index = _invert(probability.gather(-1, order), uniform)
    return tokens.gather(-1, index[:, None])[:, 0]


def cut_at(stops: Sequence[str], decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> int | None:
    """How many tokens there are before the first of some strings in their text; None where none of these is in it.

    A token that a string begins in is left out whole.
    """
    text = decode(tokens)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        return None
    kept = len(tokens)
    while kept and len(decode(tokens[:kept])) > min(places):
        kept -= 1
    return kept


def _invert(probability: Float[Tensor, "batch token"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The first token whose cumulative probability exceeds the uniform number's share of the total."""
    rows, size = probability.shape
    if size <= 2 * _BLOCK:
        return _first_above(probability, uniform.to(probability)[:, None])
    blocks = functional.pad(probability, (0, -size % _BLOCK)).view(rows, -1, _BLOCK)
    sums = blocks.sum(-1)
    block = _first_above(sums, uniform.to(sums)[:, None])
    before = (sums.cumsum(-1) - sums).gather(-1, block[:, None])
    inside = blocks[torch.arange(rows, device=block.device), block]
    rest = uniform.to(sums)[:, None] * sums.cumsum(-1)[:, -1:] - before
    within = _first_above(inside, (rest / inside.cumsum(-1)[:, -1:]).clamp(0.0, 1.0))
    return block * _BLOCK + within


def _first_above(weight: Float[Tensor, "batch n"], share: Float[Tensor, "batch 1"]) -> Int[Tensor, " batch"]:
    """Index of the first entry whose running sum exceeds ``share`` of the total; never one of weight 0."""
    running = weight.cumsum(-1)
    index = (running <= share * running[:, -1:]).sum(-1)
    last = weight.shape[-1] - 1 - (weight.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)
