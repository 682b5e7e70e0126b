"""Making a model's twin, comparing it with the model, and noticing when it is stale."""

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from sims_lens.adapter import adapt
from sims_lens.cost import out_of_memory
from sims_lens.sites import STEERING
from sims_lens.twin.attached import unhooked
from sims_lens.twin.attention import Prefixes, PromptMemory, ResponseMemory
from sims_lens.twin.base import Points, Twin, Unsupported

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


def twin_of(model: Any, dtype: torch.dtype | None = None, *, solo: bool = False) -> "Twin | str":
    """A model's twin, compared with the model; or why it has none.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``; what is attached to it does not matter.
        dtype: of the twin; the model's own where None. Another one means a copy of the weights.
        solo: for one row at a time. In float32 its weights are the model's own then, where packed copies take longer:
            one row waits for memory, and oneDNN's kernel of an AVX2 machine reads it at 5 to 6 GB/s, a plain
            matrix-vector product at 6 to 9.
    """
    weights = dict(model.named_parameters())
    own = adapt(model).dtype
    dtype = own if dtype is None else dtype
    kept = _TWINS.setdefault(model, {})
    mark = _fingerprint(model, weights)
    kind = (dtype, solo and own == dtype == torch.float32)
    if kind not in kept or kept[kind][0] != mark:
        kept.pop(kind, None)  # first, so that there are never two
        kept[kind] = (mark, _made(model, weights, own, dtype, packed=not kind[1]))
    return kept[kind][1]


_TWINS: "WeakKeyDictionary[Any, dict[tuple[torch.dtype, bool], tuple[Any, Twin | str]]]" = WeakKeyDictionary()


def _made(
    model: Any, weights: dict[str, Tensor], own: torch.dtype, dtype: torch.dtype, *, packed: bool
) -> "Twin | str":
    places = {weight.device for weight in weights.values()}
    types = {weight.dtype for weight in weights.values()}
    whole = next((weight.dtype for weight in weights.values() if not weight.is_floating_point()), None)
    if whole is not None:
        return f"the model is quantised: it has weights of {str(whole).removeprefix('torch.')}"
    if len(places) > 1 or len(types) > 1:
        return f"the weights are on {len(places)} devices and of {len(types)} dtypes"
    try:
        twin = _build(model, own, packed=packed and dtype == own and _room(weights, dtype))
        fault = _compared(model, twin, own)
        if not fault and dtype != own:  # the same model with rounded weights: there is nothing to compare it with
            rounded = _build(model, dtype, packed=_room(weights, dtype))
            rounded.refused = twin.refused
            twin = rounded
    except Unsupported as error:
        return str(error)
    except Exception as error:  # of any architecture, at whatever place it differs: the model itself still runs
        if out_of_memory(error):  # for now: were it remembered, the same run would take another road the next time
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
        # one after the other: where somebody looks inside attention it is worked out in another way
        outer = {name: point for name, point in firing.items() if name not in twin.by_length}
        inner = {name: point for name, point in firing.items() if name in twin.by_length}
        found, own_streams = _recorded(outer, lambda: _in_steps(twin, tokens, outer))
        if inner:
            own_streams |= _recorded(inner, lambda: _in_steps(twin, tokens, inner))[1]
    twin.compared()
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
            elif not torch.equal(a.isinf(), b.isinf()):
                twin.refused[name] = "hides other keys"
            elif not _distance(a, b) <= (_HALF_STREAM if half else _STREAM[own]) * _distance(a):
                twin.refused[name] = "has other values"
    return ""


def _in_steps(twin: Twin, tokens: Tensor, points: Points) -> Tensor:
    """Logits of every column, in the three ways in which a twin is run: a prompt, two tokens at once, then one each."""
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device)[None]
    start = max(1, length - 6)
    prompt = PromptMemory()
    parts = [twin.logits(tokens[:, :start], positions[:, :start], prompt, keep=start, points=points)]
    prefixes = Prefixes()
    slots = prefixes.add([prompt])
    memory = ResponseMemory(prefixes, slots, length)
    at = start
    while at < length:
        width = 2 if at == start and at + 2 <= length else 1
        memory.step([at - start], width)
        some = slice(at, at + width)
        parts.append(twin.logits(tokens[:, some], positions[:, some], memory, keep=width, points=points))
        at += width
    return torch.cat(parts, dim=1)


def _recorded(points: Points, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``run`` gives, and what the first row of every HookPoint was meanwhile, all passes side by side."""
    seen: dict[str, list[Tensor]] = {}

    def at(name: str) -> Callable[..., None]:
        return lambda _point, _args, output: seen.setdefault(name, []).append(output[:1].clone())

    handles = []
    try:
        for name, point in points.items():
            handles.append(point.register_forward_hook(at(name)))
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return result, {name: _side_by_side(name, parts) for name, parts in seen.items()}


def _distance(a: Tensor, b: Tensor | None = None) -> float:
    """Between two streams, or of one from zero; what is infinite does not count."""
    a = a.masked_fill(a.isinf(), 0.0)
    return float((a if b is None else a - b.masked_fill(b.isinf(), 0.0)).norm())


def _side_by_side(name: str, parts: list[Tensor]) -> Tensor:
    """All passes' columns; where the second dimension is not the column, the first pass, which has the wrong shape."""
    if name.endswith(("hook_attn_scores", "hook_pattern")):  # [batch head query key], later passes with more keys
        most, hidden = max(part.shape[-1] for part in parts), -torch.inf if name.endswith("scores") else 0.0
        return torch.cat([functional.pad(part, (0, most - part.shape[-1]), value=hidden) for part in parts], dim=-2)
    if name.endswith("hook_rot_k"):  # every pass shows all keys so far
        return parts[-1]
    fits = len({(*part.shape[:1], *part.shape[2:]) for part in parts}) == 1 and parts[0].ndim > 1
    return torch.cat(parts, dim=1) if fits else parts[0]


__all__ = ["twin_of"]
