"""How near an export comes to the native run: the largest difference between two runs' logits.

The steered model answers a few prompts greedily, and both runs are teacher-forced through prompts and answers. Logits
are compared at every token, each position's mean taken off: a constant shift of all logits, as TransformerLens' weight
processing makes it, changes no probability.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sims_lens.adapter import Adapter, adapt, left_pad
from sims_lens.checks import check_number, check_path
from sims_lens.errors import ExportError
from sims_lens.hooks import resolve, steering
from sims_lens.plan import NOTHING, Intervention, SteeringPlan
from sims_lens.scope import ALL, TRACKER
from sims_lens.sites import hook_name
from sims_lens.transforms import Addition, label

TOLERANCE = 1e-3
"""Largest difference between logits that passes for the same model, for float32 weights."""

PROMPTS = ("What makes a good neighbour?", "Explain in a few words how rain forms.", "Tell me about a city by the sea.")
RESPONSE_TOKENS = 16


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the steered model.

    Args:
        path: the file or folder.
        format: what it is.
        error: the largest difference between its logits, as read back, and those of the steered model.
        tokens: how many positions were compared.
    """

    path: Path
    format: str
    error: float
    tokens: int

    def __repr__(self) -> str:
        return (
            f"Exported({self.format} at {self.path}: logits within {self.error:.2g} of the steered model's "
            f"at {self.tokens} tokens)"
        )


@dataclass(frozen=True)
class Nearest:
    """The plan that a format can hold, and what is lost on the way to it.

    Args:
        plan: what is left.
        lost: hook point of an intervention that isn't held as it is, and why.
    """

    plan: SteeringPlan
    lost: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reference:
    """The native run: a left-padded batch of prompts with their answers, and the logits at its real tokens."""

    tokens: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    prompt: int
    logits: Float[Tensor, "token d_vocab"]

    def error(self, model: Any, plan: SteeringPlan = NOTHING) -> float:
        """The largest difference between these logits and those of a model under a plan."""
        return float((_run(model, plan, self.tokens, self.mask, self.prompt) - self.logits).abs().max())


def prepare(model: Any, plan: SteeringPlan) -> SteeringPlan:
    """The plan resolved for an export.

    Raises:
        ExportError: it is empty, or another plan is attached to the model.
        PlanError: it doesn't fit the model.
    """
    adapt(model).check_runs()
    if TRACKER in model.__dict__:
        raise ExportError("another plan is attached to this model; detach it, or export the sum of the two plans")
    plan = resolve(model, plan)
    if not plan.interventions:
        raise ExportError("the plan steers nothing, so there is nothing to export")
    return plan


@torch.no_grad()
def reference(model: Any, plan: SteeringPlan) -> Reference:
    """Run the steered model: greedy answers to :data:`PROMPTS`, and the logits at every token."""
    adapter = adapt(model)
    prompts = [adapter.encode(text)[: adapter.n_ctx // 2] for text in PROMPTS]
    tokens, mask = left_pad(prompts, adapter.device)
    new, prompt, cache = tokens, tokens.shape[1], adapter.new_cache(len(prompts))
    with steering(model, plan) as steered, steered.prompt(prompt):
        for _ in range(min(RESPONSE_TOKENS, adapter.n_ctx - prompt)):
            new = adapter.logits(new, mask, keep=1, cache=cache)[:, -1:].argmax(-1)
            tokens, mask = torch.cat([tokens, new], dim=1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return Reference(tokens, mask, prompt, _run(model, plan, tokens, mask, prompt))


@torch.no_grad()
def _run(
    model: Any, plan: SteeringPlan, tokens: Int[Tensor, "row pos"], mask: Bool[Tensor, "row pos"], prompt: int
) -> Float[Tensor, "token d_vocab"]:
    with steering(model, plan) as steered, steered.prompt(prompt):
        logits = adapt(model).logits(tokens, mask, keep=tokens.shape[1])[mask].float().cpu()
    return logits - logits.mean(-1, keepdim=True)


def restriction(i: Intervention) -> str | None:
    """What a format that acts on every token alike makes of an intervention that doesn't."""
    if i.scope != ALL:
        return f"acts on {i.scope.name!r}, there on every token (export plan.on('all') if that is meant)"
    if i.half_life is not None:
        return "decays over generated tokens, there it can't (export plan.decaying(None) if that is meant)"
    return None


def block_output(adapter: Adapter, i: Intervention) -> int | None:
    """The block at whose output an addition is the same as at the intervention's site; None where there is none."""
    if i.site in ("resid_post", "mlp_out") or (i.site == "attn_out" and adapter.cfg.parallel_attn_mlp):
        return i.layer  # the stream after the block is a sum that these are part of
    if i.site == "resid_pre" and i.layer > 0:
        return i.layer - 1
    return None


def block_additions(model: Any, plan: SteeringPlan, *, first_layer: int = 0) -> Nearest:
    """One constant vector per block output at every token: all that most formats can hold.

    Args:
        model: what the plan is for.
        plan: resolved.
        first_layer: the lowest block that the format can name.
    """
    adapter = adapt(model)
    vectors: dict[int, Tensor] = {}
    lost = []
    for i in plan.interventions:
        layer = block_output(adapter, i)
        if not isinstance(i.transform, Addition):
            reason: str | None = f"{label(i.transform)}, there only additions have a place (keep it native)"
        elif layer is None:
            reason = "not a block's output, the only place there (fit the plan at resid_post)"
        elif layer < first_layer:
            reason = f"the output of block {layer}, there block {first_layer} is the first (steer a later one)"
        else:
            reason = restriction(i)
            delta = i.strength * i.transform.vector
            vectors[layer] = vectors[layer] + delta if layer in vectors else delta
        if reason:
            lost.append((hook_name(i.layer, i.site), reason))
    return Nearest(SteeringPlan.addition(vectors, scope=ALL) if vectors else NOTHING, tuple(lost))


def refuse_losses(model: Any, native: Reference, nearest: Nearest, what: str) -> None:
    """Raise :class:`ExportError` if anything is lost, with the difference in logits that it makes."""
    if not nearest.lost:
        return
    by_reason: dict[str, list[str]] = {}
    for place, reason in nearest.lost:
        by_reason.setdefault(reason, []).append(place)
    described = "; ".join(
        f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {reason}"
        for reason, places in by_reason.items()
    )
    raise ExportError(
        f"a {what} can't hold this plan. {described}. What it can hold differs by up to "
        f"{native.error(model, nearest.plan):.2g} from the steered model's logits"
    )


def accept(error: float, tolerance: float, what: str) -> None:
    """Raise :class:`ExportError` unless a measured difference is within the tolerance."""
    check_number("tolerance", tolerance, 0.0, error=ExportError)
    if not error <= tolerance:  # so that NaN is refused too
        raise ExportError(
            f"a {what} was not made: read back, it differs by up to {error:.2g} from the steered model's logits, more "
            f"than {tolerance:g}; if the weights have less precision than float32, pass a larger tolerance"
        )


def placed(path: str | Path) -> Path:
    """The path, if the folder that it is in exists.

    Raises:
        ExportError: not so.
    """
    path = check_path(path, ExportError)
    if not path.parent.is_dir():
        raise ExportError(f"folder {path.parent} does not exist; create it first")
    return path


def writable(path: str | Path) -> Path:
    """The path of a file, if its folder exists and no folder has its name.

    Raises:
        ExportError: not so.
    """
    path = placed(path)
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a file")
    return path


def write_file(
    model: Any,
    plan: SteeringPlan,
    path: str | Path,
    *,
    what: str,
    nearest: Callable[[SteeringPlan], Nearest],
    write: Callable[[SteeringPlan, Path], None],
    read: Callable[[Path], SteeringPlan],
    tolerance: float,
) -> Exported:
    """Write a plan in a format, read it back, compare the two runs, and only then give the file its name.

    Args:
        model: what the plan is for.
        plan: any.
        path: of the file.
        what: the format, in words.
        nearest: the plan that the format can hold.
        write: writes such a plan.
        read: reads it back.
        tolerance: largest difference between logits.

    Raises:
        ExportError: something is lost, or the difference is too large.
    """
    path, plan = writable(path), prepare(model, plan)
    native, held = reference(model, plan), nearest(plan)
    refuse_losses(model, native, held, what)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(held.plan, temporary)
        error = native.error(model, read(temporary))
        accept(error, tolerance, what)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, what, error, len(native.logits))


def read_bytes(path: str | Path, what: str, *, limit: int = 1 << 28) -> bytes:
    """The bytes of a stranger's file, if it is not absurdly large.

    Raises:
        ExportError: it is missing, unreadable, or larger than ``limit``.
    """
    path = check_path(path, ExportError)
    if not path.is_file():
        raise ExportError(f"there is no {what} at {path}")
    try:
        if (size := path.stat().st_size) > limit:
            raise ExportError(f"{path} has {size} bytes, more than any {what} ({limit}); is it a model?")
        return path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path} can't be read ({error.strerror or error})") from error
