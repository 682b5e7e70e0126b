"""A small Llama whose weights are set by hand, so that one path alone carries a steered direction to the logits.

Every token's stream is about the same large vector ``c``, so that the norms hardly change. What matters beside it::

    v, added after block 0  ->  one head of block 1 reads v at its own token and writes d1  ->
    the MLP of block 2 reads d1 and writes u  ->  u raises the logit of "Y" and lowers that of "N"

Everything else has weights that are small and random. The head shares its keys and values with another one, which
carries the same v and writes next to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sims_lens as sims

N_LAYERS, D_MODEL, N_HEADS, N_KEY_VALUE_HEADS, D_HEAD, D_MLP = 4, 32, 4, 2, 8, 16
STEERED, HEAD_LAYER, HEAD, MLP_LAYER = 0, 1, 2, 2
NOISE = 0.02


@dataclass(frozen=True)
class Truth:
    """What was planted.

    ``v`` works when it is added to the stream after block ``STEERED`` (or before block ``HEAD_LAYER``) and not further
    up; ``d1`` works from after the attention of block ``HEAD_LAYER`` up to before the MLP of block ``MLP_LAYER``; ``u``
    from there to the end.
    """

    v: Tensor
    d1: Tensor
    u: Tensor
    steered: int
    layer: int
    head: int
    mlp_layer: int
    pairs: Sequence[tuple[str, str, str]]

    def plan(self, layer: int = STEERED, *, coefficient: float = 2.0, scope: str = "generation") -> sims.SteeringPlan:
        """Adds ``v`` after a block."""
        return sims.SteeringPlan.addition({layer: self.v}, coefficient=coefficient, scope=scope)


PAIRS = (("ab", "YY", "NN"), ("abcde", "YYY", "NN"), ("qrs", "Y", "N"), ("xyzw", "YY", "NNNN"))


def planted(folder: Path, kind: str) -> tuple[Any, Truth]:
    """The model, written to a folder and loaded as either kind, and what is in it."""
    truth = _truth()
    checkpoint = folder / "planted"
    if not checkpoint.exists():
        _model(truth).save_pretrained(checkpoint)
        text = tiny.tokenizer("llama")
        text.chat_template = None
        text.save_pretrained(checkpoint)
    return sims.load(checkpoint, kind=kind), truth


def _truth() -> Truth:
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=generator)).Q.T
    v, d1, u = basis[1], basis[2], basis[3]
    return Truth(v, d1, u, STEERED, HEAD_LAYER, HEAD, MLP_LAYER, PAIRS)


def _model(truth: Truth) -> Any:
    text = tiny.tokenizer("llama")
    config = LlamaConfig(
        vocab_size=len(text),
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KEY_VALUE_HEADS,
        head_dim=D_HEAD,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    built = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(8)
    basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(7))).Q.T
    c = basis[0]
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.copy_(NOISE * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.fill_(1.0)
        embedding = built.model.embed_tokens.weight
        embedding += 40.0 * c + 0.05 * torch.randn(embedding.shape, generator=generator)
        attention = built.model.layers[truth.layer].self_attn
        first, shared = truth.head * D_HEAD, truth.head // (N_HEADS // N_KEY_VALUE_HEADS) * D_HEAD
        for row in (0, 1):  # rotary pairs of two frequencies: a token attends to itself
            attention.q_proj.weight[first + row] += 1.5 * c
            attention.k_proj.weight[shared + row] += 1.5 * c
        attention.v_proj.weight[shared] = truth.v  # without noise: nothing of c gets through
        attention.o_proj.weight[:, first] += 16.0 * truth.d1
        mlp = built.model.layers[truth.mlp_layer].mlp
        mlp.gate_proj.weight[0] = c  # open: the MLP is linear in d1
        mlp.up_proj.weight[0] = truth.d1
        mlp.down_proj.weight[:, 0] += 1.4 * truth.u
        vocabulary = text.get_vocab()
        built.lm_head.weight[vocabulary["Y"]] += 1.5 * truth.u
        built.lm_head.weight[vocabulary["N"]] -= 1.5 * truth.u
    return built
