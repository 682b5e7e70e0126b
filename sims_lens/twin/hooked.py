"""The twin of a ``HookedTransformer``: the same decoder, written for speed.

A ``HookedTransformer`` brings its weights into another layout at every forward pass, rotates every cached key anew at
every step, and calls some two hundred HookPoints. This runs the same weights without; it fires the HookPoints that
something is attached to, in the same order and with tensors of the same shapes. Scores, weights and rotated keys are
worked out where somebody looks at them, and shown for rows of one length at a time
(:class:`~sims_lens.twin.attention.Inside`).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sims_lens.twin.attention import Inside, Memory
from sims_lens.twin.base import Cut, Points, Twin, Unsupported, linear, worth_a_copy

_PLAIN = {
    "positional_embedding_type": ("standard", "rotary"),
    "attention_dir": ("causal",),
    "normalization_type": ("LN", "LNPre", "RMS", "RMSPre"),
    "final_rms": (True, False),
    **dict.fromkeys(
        (
            "attn_only",
            "clip_qkv",
            "experts_per_token",
            "is_layer_norm_activation",
            "load_in_4bit",
            "num_experts",
            "post_embedding_ln",
            "ungroup_grouped_query_attention",
            "use_attention_sinks",
            "use_attn_in",
            "use_dynamic_ntk_rope",
            "use_hook_tokens",
            "use_logn_attn",
            "use_split_qkv_input",
        ),
        (None, False, 0),
    ),
}
"""Settings under which this decoder is the model's, and their values."""

_OWN_FORMS = ("Olmo", "Bert", "T5", "Mixtral", "GptOss")
"""Architectures whose blocks ``HookedTransformer`` treats as cases of their own."""

_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")

_INSIDE = ("attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern")
"""HookPoints of a block that are shown rows of one length at a time, in the order of the arguments of ``Inside``."""

_BLOCK = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    *_INSIDE,
    "attn.hook_z",
    "attn.hook_result",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
    *(f"{norm}.{point}" for norm in _NORMS for point in ("hook_scale", "hook_normalized")),
)


class HookedTwin(Twin):
    """See the top of this module.

    Raises:
        Unsupported: the model has a part that this decoder lacks.
    """

    def __init__(self, model: Any, dtype: torch.dtype, *, packed: bool) -> None:
        super().__init__(dtype, packed=packed)
        cfg = self.cfg = model.cfg
        for name, wanted in _PLAIN.items():
            value = getattr(cfg, name, None)
            value = value() if callable(value) else value
            if value not in wanted:
                raise Unsupported(f"the model's configuration has {name} = {value!r}")
        if any(str(cfg.original_architecture).startswith(own) for own in _OWN_FORMS):
            raise Unsupported(f"{cfg.original_architecture} has blocks of another form")
        self.embedding = model.embed.W_E.detach().to(dtype)
        self.positions = None
        if cfg.positional_embedding_type == "standard":
            self.positions = model.pos_embed.W_pos.detach().to(dtype)
        self.blocks = [_Block(block, index, dtype, packed=packed) for index, block in enumerate(model.blocks)]
        self.norm = _Norm(model.ln_final, dtype, "ln_final")
        self.unembed = linear(model.unembed.W_U.T, model.unembed.b_U, dtype, packed=packed, unembedding=True)

    @property
    def fires(self) -> frozenset[str]:
        """See :attr:`Twin.fires`."""
        inside = {f"blocks.{i}.{name}" for i in range(len(self.blocks)) for name in _BLOCK}
        return frozenset({"hook_embed", "hook_pos_embed", *self.norm.points} | inside)

    @property
    def by_length(self) -> frozenset[str]:
        """See :attr:`Twin.by_length`."""
        return frozenset(f"blocks.{i}.{name}" for i in range(len(self.blocks)) for name in _INSIDE)

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
        """See :meth:`Twin.logits`."""
        blocks = self.blocks
        if cut is not None and cut.stream is not None:
            stream, blocks = cut.stream, blocks[cut.block :]
        else:
            stream = _at(points, "hook_embed", self.embedding[tokens])
            if self.positions is not None:
                stream = stream + _at(points, "hook_pos_embed", self.positions[positions])
        turns: dict[str, tuple[Tensor, Tensor]] = {}
        for block in blocks:
            if cut is not None and cut.block == block.index:
                cut.stream = stream
            stream = block(stream, positions, memory, points, turns)
        first = stream.shape[1] - keep
        shown = self.norm.shown(points)  # all columns, then
        kept = self.norm(stream, points)[:, first:] if shown else self.norm(stream[:, first:])
        logits: Tensor = self.unembed(kept)
        cap = self.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits


class _Block:
    """One block of the decoder."""

    def __init__(self, block: Any, index: int, dtype: torch.dtype, *, packed: bool) -> None:
        self.cfg, self.index, self.attn, self.dtype = block.cfg, index, block.attn, dtype
        self.name = {name: f"blocks.{index}.{name}" for name in _BLOCK}
        attn, mlp = block.attn, block.mlp
        self.grouped = self.cfg.n_key_value_heads is not None
        self.inner_names = [self.name[name] for name in _INSIDE]

        def heads(name: str) -> tuple[Tensor, Tensor]:
            own = getattr(attn, f"_W_{name}" if self.grouped and name != "Q" else f"W_{name}")
            bias = getattr(attn, f"_b_{name}" if self.grouped and name != "Q" else f"b_{name}")
            return own.transpose(1, 2).flatten(0, 1), bias.flatten()

        self.qkv = _Joined([heads(name) for name in "QKV"], dtype, packed=packed)
        self.out = linear(attn.W_O.permute(2, 0, 1).flatten(1), attn.b_O, dtype, packed=packed)
        if hasattr(mlp, "W_gate"):
            self.into = _Joined([(mlp.W_gate.T, None), (mlp.W_in.T, None)], dtype, packed=packed)
            self.inner_bias = mlp.b_in.detach().to(dtype) if bool(mlp.b_in.any()) else None
        else:
            self.into = _Joined([(mlp.W_in.T, mlp.b_in)], dtype, packed=packed)
            self.inner_bias = None
        self.plain_mlp = mlp
        self.back = linear(mlp.W_out.T, mlp.b_out, dtype, packed=packed)
        self.norms = {
            name: _Norm(getattr(block, name), dtype, f"blocks.{index}.{name}")
            for name in _NORMS
            if hasattr(block, name)
        }
        self.q_norm, self.k_norm = (
            None if (norm := getattr(attn, name, None)) is None else _Norm(norm, dtype) for name in ("q_norm", "k_norm")
        )

    def __call__(
        self, stream: Tensor, positions: Tensor, memory: Memory, points: Points, turns: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        name, norms = self.name, self.norms
        stream = _at(points, name["hook_resid_pre"], stream)
        attn_out = self.attention(norms["ln1"](stream, points), positions, memory, points, turns)
        if "ln1_post" in norms:
            attn_out = norms["ln1_post"](attn_out, points)
        attn_out = _at(points, name["hook_attn_out"], attn_out)
        if self.cfg.parallel_attn_mlp:
            middle, mlp_in = stream + attn_out, stream
        else:
            middle = mlp_in = _at(points, name["hook_resid_mid"], stream + attn_out)
        if self.cfg.use_hook_mlp_in and name["hook_mlp_in"] in points:
            mlp_in = _at(points, name["hook_mlp_in"], mlp_in.clone())
        mlp_out = self.mlp(norms["ln2"](mlp_in, points), points)
        if "ln2_post" in norms:
            mlp_out = norms["ln2_post"](mlp_out, points)
        return _at(points, name["hook_resid_post"], middle + _at(points, name["hook_mlp_out"], mlp_out))

    def attention(
        self, values: Tensor, positions: Tensor, memory: Memory, points: Points, turns: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        shape = (*values.shape[:2], -1, self.cfg.d_head)
        query, key, value = (part.view(shape) for part in self.qkv(values))
        query = _at(points, self.name["attn.hook_q"], query)
        key = _at(points, self.name["attn.hook_k"], key)
        value = _at(points, self.name["attn.hook_v"], value)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.cfg.positional_embedding_type == "rotary":
            kind = self.attn.attn_type
            if kind not in turns:
                turns[kind] = self.turn(positions)
            query, key = (self.rotated(part, *turns[kind]) for part in (query, key))
            query = _at(points, self.name["attn.hook_rot_q"], query)
        found: Tensor = memory.attend(
            self.index,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale=1 / self.attn.attn_scale,
            window=self.cfg.window_size if self.attn.attn_type == "local" else None,
            softcap=cap if (cap := self.cfg.attn_scores_soft_cap) > 0 else None,
            inside=self.inside(points),
        )
        mixed = _at(points, self.name["attn.hook_z"], found.transpose(1, 2))
        if self.cfg.use_attn_result and self.name["attn.hook_result"] in points:
            each = torch.einsum("bphd,hdm->bphm", mixed, self.attn.W_O.detach().to(self.dtype))
            bias: Tensor = self.attn.b_O.detach().to(self.dtype)
            result: Tensor = _at(points, self.name["attn.hook_result"], each)
            return result.sum(2) + bias
        out: Tensor = self.out(mixed.flatten(2))
        return out

    def inside(self, points: Points) -> Inside | None:
        """What is attached inside the attention; None where nothing is."""
        looking = [points.get(name) for name in self.inner_names] if points else []
        return Inside(*looking) if any(point is not None for point in looking) else None

    def mlp(self, values: Tensor, points: Points) -> Tensor:
        parts = self.into(values)
        hidden = self.plain_mlp.act_fn(_at(points, self.name["mlp.hook_pre"], parts[0]))
        if len(parts) > 1:
            hidden = hidden * _at(points, self.name["mlp.hook_pre_linear"], parts[1])
            if self.inner_bias is not None:
                hidden = hidden + self.inner_bias
        return self.back(_at(points, self.name["mlp.hook_post"], hidden))  # type: ignore[no-any-return]

    def turn(self, positions: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotation at positions, from the model's own table."""
        furthest = int(positions.max()) + 1
        if furthest > len(self.attn.rotary_cos):
            with torch.inference_mode(False):  # the table stays with the model, which may be trained
                self.attn._extend_rotary_embeddings(min(self.cfg.n_ctx, max(furthest, 2 * len(self.attn.rotary_cos))))
        tables = (self.attn.rotary_cos, self.attn.rotary_sin)
        cos, sin = (table[positions].to(self.dtype)[:, :, None] for table in tables)
        return cos, sin

    def rotated(self, values: Float[Tensor, "batch pos head d_head"], cos: Tensor, sin: Tensor) -> Tensor:
        size = self.cfg.rotary_dim
        turning, rest = values[..., :size], values[..., size:]
        if self.cfg.rotary_adjacent_pairs:
            crossed = torch.stack([-turning[..., 1::2], turning[..., ::2]], dim=-1).flatten(-2)
        else:
            crossed = torch.cat([-turning[..., size // 2 :], turning[..., : size // 2]], dim=-1)
        turned = torch.addcmul(turning * cos, crossed, sin)
        return turned if size == values.shape[-1] else torch.cat([turned, rest], dim=-1)


class _Joined:
    """Linear layers that read the same input: one product where they are packed copies."""

    def __init__(self, parts: list[tuple[Tensor, Tensor | None]], dtype: torch.dtype, *, packed: bool) -> None:
        self.sizes = [len(weight) for weight, _ in parts]
        if packed and len(parts) > 1 and worth_a_copy(max(self.sizes), parts[0][0].shape[1], dtype):
            biases = [bias for _, bias in parts if bias is not None]
            bias = torch.cat(biases) if biases else None
            parts = [(torch.cat([weight for weight, _ in parts]), bias)]
        self.layers = [linear(weight, bias, dtype, packed=packed) for weight, bias in parts]

    def __call__(self, values: Tensor) -> tuple[Tensor, ...]:
        if len(self.layers) == len(self.sizes):
            return tuple(layer(values) for layer in self.layers)
        return self.layers[0](values).split(self.sizes, dim=-1)  # type: ignore[no-any-return]


class _Norm:
    """LayerNorm or RMSNorm, with or without weights, in one kernel, which sums in float32 at least; where somebody is
    attached to its HookPoints, by the model's own module."""

    def __init__(self, norm: Any, dtype: torch.dtype, name: str = "") -> None:
        self.points = (f"{name}.hook_scale", f"{name}.hook_normalized")
        kind = type(norm).__name__
        if kind not in ("LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"):
            raise Unsupported(f"the model has a norm of the kind {kind}")
        self.centred, self.norm, self.dtype = kind.startswith("Layer"), norm, dtype
        weight, bias = getattr(norm, "w", None), getattr(norm, "b", None)
        self.weight = None if weight is None else weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def shown(self, points: Points) -> bool:
        """Whether somebody is attached to it."""
        return bool(points) and any(name in points for name in self.points)

    def __call__(self, values: Tensor, points: Points | None = None) -> Tensor:
        if points and self.shown(points):
            found: Tensor = self.norm(values.to(self.norm.cfg.dtype))
            return found.to(self.dtype)
        size = values.shape[-1:]
        if self.centred:
            return functional.layer_norm(values, size, self.weight, self.bias, self.norm.eps)
        return functional.rms_norm(values, size, self.weight, self.norm.eps)


def _at(points: Points, name: str, values: Tensor) -> Tensor:
    point = points.get(name) if points else None
    return values if point is None else point(values)


__all__ = ["HookedTwin"]
