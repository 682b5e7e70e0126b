"""Choosing the next token: filters and inverse-CDF sampling, pure functions of logits and uniform numbers.

Each sample brings its own uniform numbers, made from the seed, its prompt and its draw. So a sample does not
depend on which batch it was decoded in, and no global random state is touched.
"""

import hashlib

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


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
) -> Int[Tensor, " batch"]:
    """Sample a token per row by inverting the cumulative distribution over tokens ordered by probability.

    Args:
        logits: any float dtype; computed in float32.
        uniform: one number in [0, 1) per row.
        temperature: divides the logits; above 0.
        top_k: only the k most probable tokens; None for all.
        top_p: only the most probable tokens that reach this probability together; at least one is kept.
    """
    size = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    values, tokens = (logits.float() / temperature).topk(size, dim=-1)
    probability = values.softmax(-1)
    cumulative = probability.cumsum(-1)
    last = (probability > 0).sum(-1, keepdim=True) - 1
    if top_p < 1.0:
        last = torch.minimum(last, (cumulative < top_p).sum(-1, keepdim=True))
    target = uniform.to(cumulative)[:, None] * cumulative.gather(-1, last)
    index = torch.minimum((cumulative <= target).sum(-1, keepdim=True), last)
    return tokens.gather(-1, index)[:, 0]
