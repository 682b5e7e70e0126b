"""Folding a plan into weights: the steered model as an ordinary checkpoint, at no cost per token, for any engine.

Three kinds of place write to the residual stream: the embedding, each attention's output projection and each MLP's.
What is written there is W h + b, so a transform of it that is affine, x -> x + g (x·û) û + t, has a place in the
weights: W <- W + g û (ûᵀ W), and b likewise and + t::

    addition    g = 0     t = s v              ablation   g = -s    t = 0
    clamp       g = -s    t = s value û        amplify    g = s     t = 0

At resid_post, which is a sum of all that was written before, only t has a place: the bias of the last MLP projection.
A direction that nothing writes is ablated everywhere: :func:`ablation_everywhere` makes that plan.

Reference: for the orthogonalised weights, Arditi et al. 2024, "Refusal in language models is mediated by a single
    direction" (arXiv 2406.11717, section 4.1, ``W_out <- W_out - r̂ r̂ᵀ W_out``); biases are treated alike here.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sims_lens.adapter import adapt
from sims_lens.errors import ExportError, ModelError
from sims_lens.export.check import (
    TOLERANCE,
    Exported,
    Nearest,
    accept,
    placed,
    prepare,
    reference,
    refuse_losses,
    restriction,
)
from sims_lens.models import checkpoint_of, load, read_checkpoint, write_checkpoint
from sims_lens.plan import Intervention, SteeringPlan
from sims_lens.scope import ALL
from sims_lens.sites import hook_name
from sims_lens.transforms import Ablation, Addition, Amplification, Clamp, label

_WHAT = "baked checkpoint"

# Names in Hugging Face blocks; what fits none of them is refused.
_MLPS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")
_ATTENTIONS = ("self_attn.o_proj", "attn.c_proj", "attention.dense")
_NORMS_AFTER = ("post_feedforward_layernorm", "post_mlp_layernorm", "ln2_post")  # Gemma 2, GLM-4, TransformerLens
_POSITIONS = ("wpe", "embed_positions")


class _Place(NamedTuple):
    """Where something is written to the stream: tensors with the axis that is d_model, and what takes a constant."""

    linear: tuple[tuple[Tensor, int], ...]
    constant: Tensor | None
    no_constant: str = ""


_Find = Callable[[int, str, bool], "_Place | str"]
"""Layer, site, and whether a constant will be added: the place, or why there is none."""


def ablation_everywhere(model: Any, direction: Float[Tensor, " d_model"], *, coefficient: float = 1.0) -> SteeringPlan:
    """The plan that ablates a direction wherever the stream is written to, on all tokens: its weights orthogonalised.

    Args:
        model: what the plan is for.
        direction: any norm but zero.
        coefficient: 1 takes the direction out, less projects it out in part.

    Returns:
        A plan for :func:`sims_lens.steering` and for :func:`bake`, which do the same with it.
    """
    adapter = adapt(model)
    sites = [(0, "resid_pre")] + [
        (layer, site) for layer in range(adapter.n_layers) for site in ("attn_out", "mlp_out")
    ]
    ablation = Ablation(direction)
    return SteeringPlan(
        tuple(Intervention(layer, site, ablation, coefficient, scope=ALL) for layer, site in sites),
        adapter.provenance,
    )


def bake(model: Any, plan: SteeringPlan, folder: str | Path, *, tolerance: float = TOLERANCE) -> Exported:
    """Write the steered model as a Hugging Face checkpoint that needs no steering.

    The checkpoint is the one that ``model`` was loaded from, with the plan in its weights: constants in the biases of
    output projections (``mlp_bias`` and ``attention_bias`` are switched on where a config has them), ablations in the
    projections themselves. Where the embedding changes, it is untied from the unembedding.

    Args:
        model: of either kind, loaded with :func:`sims_lens.load`.
        plan: on all tokens; additions at resid_post, additions, ablations, clamps and amplifications at attn_out,
            mlp_out and the resid_pre of block 0.
        folder: to be made.
        tolerance: largest difference between logits.

    Raises:
        ExportError: the weights can't hold the plan, or the folder exists, or what was written isn't the same model.
        PlanError: the plan doesn't fit the model.
        ModelError: the model's checkpoint isn't known.
    """
    folder, source = placed(folder), checkpoint_of(model)
    if folder.exists():
        raise ExportError(f"{folder} exists; choose another folder, or remove it")
    plan = prepare(model, plan)
    native, adapter = reference(model, plan), adapt(model)
    weights = read_checkpoint(source, dtype=adapter.cfg.dtype)
    refuse_losses(model, native, _fold(plan, _Checkpoint(weights, adapter.n_layers).place), _WHAT)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / "baked"
        write_checkpoint(weights, made, tokenizer_of=source)
        again = load(made, kind="bridge", device=str(adapter.device), dtype=adapter.cfg.dtype)
        error = native.error(again)
        accept(error, tolerance, _WHAT)
        made.replace(folder)
    return Exported(folder, _WHAT, error, len(native.logits))


def folded(model: Any, plan: SteeringPlan, *, tolerance: float = TOLERANCE) -> Any:
    """A copy of a ``HookedTransformer`` with a plan in its weights: constants in ``b_out``, ablations in ``W_out``, ...

    Args:
        model: a ``HookedTransformer``; a bridge's weights are those of a checkpoint, see :func:`bake`.
        plan: as for :func:`bake`.
        tolerance: largest difference between logits.

    Raises:
        ExportError: the weights can't hold the plan, or the copy isn't the same model.
        PlanError: the plan doesn't fit the model.
        ModelError: the model is a bridge.
    """
    if adapt(model).kind != "HookedTransformer":
        raise ModelError("the weights of a TransformerBridge are folded into a checkpoint: bake(model, plan, folder)")
    plan = prepare(model, plan)
    native, made = reference(model, plan), copy.deepcopy(model)
    refuse_losses(model, native, _fold(plan, _hooked_places(made)), "folded copy")
    accept(native.error(made), tolerance, "folded copy")
    return made


def _affine(i: Intervention) -> tuple[Tensor, float, Tensor] | None:
    """Axis, gain and constant of an intervention that is affine."""
    transform, strength = i.transform, i.strength
    if isinstance(transform, Addition):
        return torch.zeros_like(transform.vector), 0.0, strength * transform.vector
    if isinstance(transform, Clamp):
        return transform.axis, -strength, strength * transform.value * transform.axis
    if isinstance(transform, Ablation):
        return transform.axis, -strength, torch.zeros_like(transform.axis)
    if isinstance(transform, Amplification):
        return transform.axis, strength, torch.zeros_like(transform.axis)
    return None


def _fold(plan: SteeringPlan, find: _Find) -> Nearest:
    """Write what can be written of a plan into the weights that ``find`` finds, and say what can't."""
    held, lost = [], []
    # Within a block the MLP's own output is transformed before the sum that it becomes part of.
    for i in sorted(
        plan.interventions, key=lambda i: i.site.startswith("resid") and (i.layer, i.site) != (0, "resid_pre")
    ):
        reason = _fold_one(i, find)
        if reason is None:
            held.append(i)
            reason = restriction(i)
        if reason:
            lost.append((hook_name(i.layer, i.site), reason))
    everywhere = SteeringPlan(tuple(held)).on(ALL).decaying(None)
    return Nearest(everywhere, tuple(lost))


@torch.no_grad()
def _fold_one(i: Intervention, find: _Find) -> str | None:
    """Write one intervention into the weights, or say why it has no place there."""
    affine = _affine(i)
    if affine is None:
        return f"{label(i.transform)}, there only what is affine in the stream has a place (keep it native)"
    axis, gain, constant = affine
    layer, site = i.layer, i.site
    if site == "resid_post" or (site == "resid_pre" and layer > 0):
        if gain:
            return (
                f"{label(i.transform)} of all that blocks before have written, there only of what a block writes "
                "(act at attn_out and mlp_out, see sims_lens.export.ablation_everywhere)"
            )
        layer, site = (layer, "mlp_out") if site == "resid_post" else (layer - 1, "mlp_out")
    needs_constant = bool(constant.any())
    place = find(layer, site, needs_constant)
    if isinstance(place, str):
        return place
    if needs_constant and place.constant is None:
        return place.no_constant
    for tensor, out in place.linear if gain else ():
        wide = tensor.double().movedim(out, 0)
        along = torch.tensordot(axis.double().to(wide.device), wide, dims=1)
        update = gain * torch.tensordot(axis.double().to(wide.device), along, dims=0)
        tensor.copy_((wide + update).movedim(0, out))
    if needs_constant and place.constant is not None:
        wide = place.constant.double()
        place.constant.copy_(wide + constant.double().to(wide.device))
    return None


class _Checkpoint:
    """The places of a plain Hugging Face model."""

    def __init__(self, model: Any, n_layers: int) -> None:
        self.model, self.base, self.config = model, model.base_model, model.config
        lists = [m for m in self.base.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        self.blocks: Any = lists[0] if lists else []

    def place(self, layer: int, site: str, constant: bool) -> "_Place | str":
        """See :data:`_Find`. Changes the model where a bias or an untied unembedding is needed."""
        if site == "resid_pre":
            return self._embedding()
        names, switch = (_MLPS, "mlp_bias") if site == "mlp_out" else (_ATTENTIONS, "attention_bias")
        block = self.blocks[layer] if len(self.blocks) else nn.Module()
        if any(_child(block, name) is not None for name in _NORMS_AFTER):
            return f"behind a norm in {type(block).__name__}, where weights have no say (keep it native)"
        projection = next((found for name in names if (found := _child(block, name)) is not None), None)
        if projection is None:
            return f"no one projection of {type(block).__name__} writes this (keep it native)"
        if constant and projection.bias is None and getattr(self.config, switch, None) is False:
            self._switch_on(switch, names)
        out = 1 if type(projection).__name__ == "Conv1D" else 0
        linear = [(projection.weight, out)] + ([] if projection.bias is None else [(projection.bias, 0)])
        reason = (
            f"needs a bias, for which {type(self.config).__name__} has no setting (keep it native, or export a GGUF)"
        )
        return _Place(tuple(linear), projection.bias, reason)

    def _embedding(self) -> _Place:
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is not None and head.weight is table.weight:
            self.config.tie_word_embeddings = False
            head.weight = nn.Parameter(table.weight.detach().clone())
        positions = [m.weight for name in _POSITIONS if (m := _child(self.base, name)) is not None]
        return _Place(tuple((weight, 1) for weight in (table.weight, *positions)), table.weight)

    def _switch_on(self, switch: str, names: tuple[str, ...]) -> None:
        """A setting gives a bias to all projections of all blocks: those are zero."""
        setattr(self.config, switch, True)
        for block in self.blocks:
            parent = _child(block, next(name for name in names if _child(block, name) is not None).rpartition(".")[0])
            for child in parent.children():
                if isinstance(child, nn.Linear) and child.bias is None:
                    child.bias = nn.Parameter(child.weight.new_zeros(child.out_features))


def _child(module: Any, name: str) -> Any:
    """A module by its dotted name, None where there is none."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _hooked_places(model: Any) -> _Find:
    """The places of a ``HookedTransformer``, which has every bias."""

    def place(layer: int, site: str, _constant: bool) -> "_Place | str":
        if site == "resid_pre":
            tables = [model.embed.W_E] + ([model.pos_embed.W_pos] if hasattr(model, "pos_embed") else [])
            return _Place(tuple((table, 1) for table in tables), model.embed.W_E)
        block = model.blocks[layer]
        if any(_child(block, name) is not None for name in _NORMS_AFTER):
            return "behind a norm, where weights have no say (keep it native)"
        weight, bias = ("W_out", "b_out") if site == "mlp_out" else ("W_O", "b_O")
        owner = block.mlp if site == "mlp_out" else block.attn
        if getattr(owner, weight, None) is None:
            return f"no one projection of {type(owner).__name__} writes this (keep it native)"
        matrix, constant = getattr(owner, weight), getattr(owner, bias)
        return _Place(((matrix, matrix.ndim - 1), (constant, 0)), constant)

    return place
