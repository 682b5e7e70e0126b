"""The fast road: a plain twin of a TransformerLens model, which shares its weights and fires its HookPoints.

A TransformerLens model lets one look into every corner, and pays for it at every forward pass. Where nobody looks, a
plain model with the same weights does the same work in a half to a quarter of the time. :func:`twin_of` makes one,
compares it with the model (log-probabilities, and the stream at every HookPoint that it fires), and says why there is
none where there is none. A twin is derived from its model, kept beside it as long as the model lives, and made anew
when a weight has changed.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sims_lens.adapter import adapt
from sims_lens.scope import TRACKER
from sims_lens.sites import STEERING
from sims_lens.twin.attention import Memory, Prefixes, PromptMemory, ResponseMemory
from sims_lens.twin.base import Cut, Points, Twin, Unsupported
from sims_lens.twin.passes import Beside, run_prompts, run_responses

logger = logging.getLogger("sims_lens")

_TOKENS = 12
"""Length of the text on which a twin is compared with its model."""

_LOGPROB = {torch.float32: 2e-3, torch.float64: 1e-6}
"""Nats by which a log-probability may differ."""

_HALF_KL = 0.1
"""Nats by which next-token distributions may differ in half precision. Log-probabilities of improbable tokens differ by
more from batch to batch: those of the embedded model by up to 5 nats, where its distributions differ by 0.015."""

_STREAM = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Share of a stream's norm by which it may differ."""

_HALF_STREAM = 0.3
_PACKED_SHARE = 0.25
"""Of the free memory that packed copies of the weights may take."""

_WIDTH = 1000
"""Whole numbers of 8 bytes in a row of a checksum; no power of two, as the rows of weights often are."""


@dataclass(frozen=True, eq=False)
class Road:
    """How a model will be run.

    Args:
        twin: the fast road; None where there is none.
        points: HookPoints that something is attached to, which the twin fires.
        reason: why there is no twin, else "".
        watched: whether somebody else's hooks are among ``points``, not only a plan's.
    """

    twin: Twin | None
    points: Points
    reason: str
    watched: bool = False


def road(model: Any, dtype: torch.dtype | None = None, *, twin: Twin | None = None) -> Road:
    """The fast road for a model as it is now, with what is attached to it; or why there is none.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        dtype: to run in; the model's own where None.
        twin: the model's twin, where it is known and no weight can have changed since; saves reading all weights.
    """
    points, watched, strange = _attached(model)
    if strange:
        return Road(None, {}, strange)
    if model.training:
        return Road(None, {}, "the model is in training mode; call model.eval()")
    if torch.is_autocast_enabled(adapt(model).device.type):
        return Road(None, {}, "autocast is on, under which the fast road is not the model")
    found = twin_of(model, dtype) if twin is None else twin
    if isinstance(found, str):
        return Road(None, {}, found)
    for name in points:
        if name not in found.fires:
            return Road(None, {}, f"something is attached to {name}, which the fast road does not pass")
        if name in found.refused:
            return Road(None, {}, f"something is attached to {name}, where the fast road {found.refused[name]}")
    return Road(found, points, "", watched)


def twin_of(model: Any, dtype: torch.dtype | None = None) -> "Twin | str":
    """A model's twin, compared with the model; or why it has none.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``; what is attached to it does not matter.
        dtype: of the twin; the model's own where None. Another one means a copy of the weights.
    """
    weights = dict(model.named_parameters())
    own = next(iter(weights.values())).dtype
    dtype = own if dtype is None else dtype
    kept = _TWINS.setdefault(model, {})
    mark = _fingerprint(model, weights)
    if dtype not in kept or kept[dtype][0] != mark:
        kept.pop(dtype, None)  # first, so that there are never two
        kept[dtype] = (mark, _made(model, weights, own, dtype))
    return kept[dtype][1]


_TWINS: "WeakKeyDictionary[Any, dict[torch.dtype, tuple[Any, Twin | str]]]" = WeakKeyDictionary()


def _made(model: Any, weights: dict[str, Tensor], own: torch.dtype, dtype: torch.dtype) -> "Twin | str":
    places = {weight.device for weight in weights.values()}
    types = {weight.dtype for weight in weights.values()}
    if len(places) > 1 or len(types) > 1:
        return f"the weights are on {len(places)} devices and of {len(types)} dtypes"
    try:
        twin = _build(model, own, packed=dtype == own and _room(weights, dtype))
        fault = _compared(model, twin, own)
        if not fault and dtype != own:  # the same model with rounded weights: there is nothing to compare it with
            rounded = _build(model, dtype, packed=_room(weights, dtype))
            rounded.refused = twin.refused
            twin = rounded
    except Unsupported as error:
        return str(error)
    except MemoryError:
        raise
    except Exception as error:  # of any architecture, at whatever place it differs: the model itself still runs
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.debug("no fast road", exc_info=True)
        text = " ".join(str(error).split())[:200]
        return f"the fast road fails on a {adapt(model).name} ({type(error).__name__}: {text})"
    return fault or twin


def _build(model: Any, dtype: torch.dtype, *, packed: bool) -> Twin:
    from sims_lens.twin.bridge import BridgeTwin
    from sims_lens.twin.hooked import HookedTwin

    kind = HookedTwin if adapt(model).kind == "HookedTransformer" else BridgeTwin
    with torch.no_grad():
        return kind(model, dtype, packed=packed)


def _room(weights: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether packed copies of the weights take a small part of the free memory."""
    import psutil

    if next(iter(weights.values())).device.type != "cpu":
        return False
    size = sum(weight.numel() for weight in weights.values()) * torch.empty(0, dtype=dtype).element_size()
    return bool(size <= _PACKED_SHARE * psutil.virtual_memory().available)


def _fingerprint(model: Any, weights: dict[str, Tensor]) -> tuple[Any, ...]:
    """Changes when a weight is replaced or written to, a part is replaced, or a setting: copies would be stale."""
    parts = tuple(
        (name, id(part), *(value for value in vars(part).values() if isinstance(value, float)))
        for name, part in model.named_modules()
        if STEERING not in f".{name}"
    )
    settings = repr(sorted(vars(model.cfg).items(), key=str))
    # a HookedTransformer's tables of positions grow by themselves, and are read where they are
    tables = {} if adapt(model).kind == "HookedTransformer" else dict(model.named_buffers())
    kept = [*weights.items(), *((name, table) for name, table in tables.items() if STEERING not in f".{name}")]
    marks = tuple((name, *_mark(tensor)) for name, tensor in kept)
    with torch.no_grad():
        sums = tuple(_checksum(weight) for weight in weights.values())
    return parts, settings, marks, sums


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    written = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), written, tensor.dtype, tuple(tensor.shape)


def _checksum(weight: Tensor) -> tuple[int, ...]:
    """Of the bytes, as they lie in memory: exact, and a permutation changes the sums of rows or those of columns."""
    flat = weight.permute(sorted(range(weight.ndim), key=weight.stride, reverse=True)).reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # or it could not be read as whole numbers
    row = 8 * _WIDTH // flat.element_size()
    whole = len(flat) // row * row
    grid = flat[:whole].view(torch.int64).view(-1, _WIDTH)
    rest = flat[whole:].cpu().contiguous().view(torch.uint8)
    return _weighted(grid.sum(0)), _weighted(grid.sum(1)), hash(rest.numpy().tobytes())


def _weighted(sums: Int[Tensor, " n"]) -> int:
    """With an odd factor for each place, modulo 2**64: no single change is lost."""
    return int((sums * (2 * torch.arange(len(sums), device=sums.device) + 1)).sum())


def response_logits(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[tuple[int, Sequence[int]]]
) -> Float[Tensor, "row pos d_vocab"]:
    """What :meth:`Adapter.response_logits` gives, on the fast road where there is one.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, with whatever is attached to it.
        prompts: token ids.
        responses: index of the prompt, and response token ids.

    Returns:
        Column k predicts token k of the row's response; columns beyond a response mean nothing.
    """
    adapter, way = adapt(model), road(model)
    if way.twin is None or way.watched:
        return adapter.response_logits(prompts, responses)
    return run_responses(way.twin, prompts, responses, device=adapter.device, points=way.points, before=telling(model))


def telling(model: Any) -> Callable[[int, bool], None]:
    """Tells a model's token tracker, where a plan is attached, of a pass of some width over prompts or responses."""
    tracker = model.__dict__.get(TRACKER)

    def before(width: int, prompt: bool) -> None:
        if tracker is not None and prompt:
            tracker.expect(width, width)
        elif tracker is not None:
            tracker.expect(width, 1, offset=1)

    return before


# Comparing a twin with its model


def _compared(model: Any, twin: Twin, own: torch.dtype) -> str:
    """Why the twin is not the model's, or "". HookPoints that differ are put down in ``twin.refused``."""
    adapter = adapt(model)
    length = min(_TOKENS, adapter.n_ctx)
    vocabulary = int(getattr(adapter.cfg, "d_vocab", 0)) or 64
    tokens = ((torch.arange(length, device=adapter.device) * 7 + 1) % vocabulary)[None]
    half = own not in _LOGPROB
    known = dict(model.hook_dict)
    firing = {name: known[name] for name in sorted(twin.fires & set(known))}
    firing = {name: point for name, point in firing.items() if STEERING not in name}
    with torch.inference_mode(), unhooked(model):
        mask = torch.ones_like(tokens, dtype=torch.bool)
        expected, streams = _recorded(firing, lambda: adapter.logits(tokens, mask, keep=length))
        found, own_streams = _recorded(firing, lambda: _in_steps(twin, tokens, firing))
    log_p, log_q = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    gap = float((log_p - log_q).abs().max())
    apart = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    if not half and not gap <= _LOGPROB[own]:
        return f"the fast road's log-probabilities differ from the model's by {gap:.2g} nats"
    if not apart <= _HALF_KL:
        return f"the fast road's next-token distributions differ from the model's by {apart:.2g} nats"
    for name in firing:
        if (name in streams) != (name in own_streams):
            twin.refused[name] = "does not fire as the model does"
        elif name in streams:
            a, b = streams[name].float(), own_streams[name].float()
            if a.shape != b.shape:
                twin.refused[name] = f"has tensors of another shape, {list(b.shape)} for {list(a.shape)}"
            elif not float((a - b).norm()) <= (_HALF_STREAM if half else _STREAM[own]) * float(a.norm()):
                twin.refused[name] = "has other values"
    return ""


def _in_steps(twin: Twin, tokens: Tensor, points: Points) -> Tensor:
    """Logits of every column, in the three ways in which a twin is run: a prompt, two tokens at once, then one each."""
    rows, length = twin.least_rows, tokens.shape[1]
    positions = torch.arange(length, device=tokens.device)[None]
    start = max(1, length - 6)
    prompt = PromptMemory()
    parts = [twin.logits(tokens[:, :start], positions[:, :start], prompt, keep=start, points=points)]
    prefixes = Prefixes()
    slots = prefixes.add(prompt)
    memory = ResponseMemory(prefixes, slots * rows, length)
    at = start
    while at < length:
        width = 2 if at == start and at + 2 <= length else 1
        memory.step([at - start] * rows, width)
        some = slice(at, at + width)
        parts.append(
            twin.logits(
                tokens[:, some].expand(rows, -1), positions[:, some].expand(rows, -1), memory, keep=width, points=points
            )[:1]
        )
        at += width
    return torch.cat(parts, dim=1)


def _recorded(points: Points, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``run`` gives, and what the first row of every HookPoint was meanwhile, all passes side by side."""
    seen: dict[str, list[Tensor]] = {}

    def at(name: str) -> Callable[..., None]:
        return lambda _point, _args, output: seen.setdefault(name, []).append(output[:1].clone())

    handles = [point.register_forward_hook(at(name)) for name, point in points.items()]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return result, {name: _side_by_side(parts) for name, parts in seen.items()}


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """All passes' columns; where the second dimension is not the column, the first pass, which has the wrong shape."""
    fits = len({(*part.shape[:1], *part.shape[2:]) for part in parts}) == 1 and parts[0].ndim > 1
    return torch.cat(parts, dim=1) if fits else parts[0]


# What is attached to a model


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Inside, no forward hook fires that somebody has attached; outside they are as before."""
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    before = [(m._forward_hooks, m._forward_pre_hooks) for m in hooked]
    try:
        for m in hooked:
            m._forward_hooks, m._forward_pre_hooks = (
                OrderedDict((key, hook) for key, hook in hooks.items() if _of_the_bridge(m, hook))
                for hooks in (m._forward_hooks, m._forward_pre_hooks)
            )
        yield
    finally:
        for m, (hooks, pre_hooks) in zip(hooked, before, strict=True):
            m._forward_hooks, m._forward_pre_hooks = hooks, pre_hooks


def _of_the_bridge(module: nn.Module, hook: Any) -> bool:
    """Whether a hook is part of how a bridge works, on something that is no HookPoint: one of TransformerLens' own, or
    one of those with which transformers collects outputs, and which stay when they have been asked for once."""
    own = str(getattr(hook, "__module__", "")).startswith(("transformer_lens.", "transformers."))
    return own and type(module).__name__ != "HookPoint"


def _attached(model: Any) -> tuple[dict[str, Any], bool, str]:
    """The HookPoints that something is attached to, whether it is somebody else's, and what no twin can honour."""
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        return {}, True, "a hook is attached to all modules of PyTorch"
    tracker = model.__dict__.get(TRACKER)
    points: dict[str, Any] = {}
    watched = False
    for module in model.modules():
        kind = type(module).__name__
        if module._backward_hooks or module._backward_pre_hooks:
            return {}, True, f"a backward hook is attached to a {kind}"
        if "forward" in module.__dict__:
            return {}, True, f"the forward method of a {kind} was replaced"
        if is_parametrized(module):
            return {}, True, f"a weight of a {kind} is parametrized"
        if module.training and not model.training and kind != "HookPoint":
            return {}, True, f"a {kind} is in training mode; call model.eval()"
        hooks = [hook for hook in _hooks(module) if tracker is None or getattr(hook, "__self__", None) is not tracker]
        if not hooks or all(_of_the_bridge(module, hook) for hook in hooks):
            continue
        if kind != "HookPoint":
            return {}, True, f"a hook is attached to a {kind}, which is no HookPoint"
        watched = watched or not all(_ours(hook) for hook in hooks)
        if STEERING not in str(module.name):  # those of a plan are fired by its own module
            points[str(module.name)] = module
    return points, watched, ""


def _hooks(module: Any) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _ours(hook: Any) -> bool:
    """Whether a hook is a plan's or a reader's of this package, which know where a prompt ends."""
    return str(getattr(hook, "__module__", "")).startswith("sims_lens.") or hasattr(
        getattr(hook, "__self__", None), "interventions"
    )


__all__ = [
    "Beside",
    "Cut",
    "Memory",
    "Points",
    "Prefixes",
    "PromptMemory",
    "ResponseMemory",
    "Road",
    "Twin",
    "Unsupported",
    "response_logits",
    "road",
    "run_prompts",
    "run_responses",
    "telling",
    "twin_of",
    "unhooked",
]
