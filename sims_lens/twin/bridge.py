"""The twin of a ``TransformerBridge``: the Hugging Face model that it wraps, without the wrapping.

The same class is built without weights and given the bridge's own; its attention is ours, so that prompts are shared.
The bridge's HookPoints at the entrance and the exit of a component are fired from the component's counterpart.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sims_lens.twin.attention import Memory
from sims_lens.twin.base import Cut, Points, Twin, Unsupported, linear

_NAME = "sims_lens"
"""Of our attention among transformers' implementations."""

_WRAPPED = "_original_component."


class _Pass(threading.local):
    """What a thread's forward pass is about: the parts of the twin look here."""

    def __init__(self) -> None:
        self.memory: Memory | None = None
        self.points: Points = {}
        self.cut: Cut | None = None


class BridgeTwin(Twin):
    """See the top of this module. Several threads may run it at once.

    Raises:
        Unsupported: the model can't be built anew, has other weights then, or its attention can't be replaced.
    """

    def __init__(self, model: Any, dtype: torch.dtype, *, packed: bool) -> None:
        super().__init__(dtype, packed=packed)
        original = model.original_model
        self.module = _plain(original).eval()
        if dtype != original.dtype:
            self.module = self.module.to(dtype)
        _linears(self.module, dtype, packed=packed)
        self._now = _Pass()
        _register(self.module, self._now)
        self._keeps = _accepts(self.module, "logits_to_keep")
        self._places = _places(model, self.module)
        self._heard: dict[str, RemovableHandle] = {}
        self._lock = threading.Lock()
        self._cuttable = False

    @property
    def fires(self) -> frozenset[str]:
        """See :attr:`Twin.fires`."""
        return frozenset(self._places)

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
        with self._lock:
            self._listen(points)
            if cut is not None and not self._cuttable:
                self._make_cuttable()  # twice does no harm, after Ctrl-C in its midst
                self._cuttable = True
        now = self._now
        now.memory, now.points, now.cut = memory, points, cut
        try:
            kept = {"logits_to_keep": keep} if self._keeps else {}
            out = self.module(input_ids=tokens, position_ids=positions, use_cache=False, **kept)
        finally:
            now.memory, now.points, now.cut = None, {}, None
        return out.logits[:, -keep:]  # type: ignore[no-any-return]

    def _listen(self, points: Points) -> None:
        """From now on these HookPoints are fired, in passes that ask for it."""
        for name in points:
            if name in self._heard or name not in self._places:
                continue
            module, entrance = self._places[name]
            fire, handle = partial(_fire, self._now, name), None
            try:  # Ctrl-C in here must not leave a point that is never fired, or fired twice
                if entrance:
                    handle = module.register_forward_pre_hook(_entering(fire), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(_leaving(fire))
                self._heard[name] = handle
            finally:
                if name not in self._heard and handle is not None:
                    handle.remove()

    def compared(self) -> None:
        """See :meth:`Twin.compared`: a hook that fires nothing costs a tenth of a step of one row all the same."""
        with self._lock:
            while self._heard:
                self._heard.popitem()[1].remove()

    def _make_cuttable(self) -> None:
        index = 0
        while (name := f"blocks.{index}.hook_in") in self._places:
            block = self._places[name][0]
            block.__dict__["forward"] = partial(_unless_below, self._now, index, block.forward)
            enter = partial(_enter, self._now, index)
            block.register_forward_pre_hook(_entering(enter), with_kwargs=True, prepend=True)
            index += 1


def _fire(now: _Pass, name: str, stream: Tensor) -> Tensor:
    point = now.points.get(name)
    return stream if point is None else point(stream)


def _enter(now: _Pass, index: int, stream: Tensor) -> Tensor:
    """The stream enters a block: put it down, or take what was put down, where the pass is cut there."""
    cut = now.cut
    if cut is None or cut.block != index:
        return stream
    if cut.stream is None:
        cut.stream = stream
    return cut.stream


def _unless_below(
    now: _Pass, index: int, forward: Callable[..., Any], stream: Tensor, *args: Any, **others: Any
) -> Any:
    """A block's forward, unless only the blocks above are to be run."""
    if now.cut is not None and now.cut.stream is not None and index < now.cut.block:
        return stream
    return forward(stream, *args, **others)


def _plain(original: Any) -> Any:
    """The model's class on the model's own weights."""
    config = copy.deepcopy(original.config)
    try:
        with torch.device("meta"):
            made = type(original)._from_config(config, dtype=original.dtype, attn_implementation="eager")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise Unsupported(f"a {type(original).__name__} can't be built from its configuration ({error})") from error
    weights = {name.replace(_WRAPPED, ""): value for name, value in original.named_parameters(remove_duplicate=False)}
    buffers = {name.replace(_WRAPPED, ""): value for name, value in original.named_buffers(remove_duplicate=False)}
    for what, names, given in (
        ("weight", [name for name, _ in made.named_parameters(remove_duplicate=False)], weights),
        ("buffer", [name for name, _ in made.named_buffers(remove_duplicate=False)], buffers),
    ):
        for name in names:
            if name not in given:
                raise Unsupported(f"the wrapped {type(original).__name__} has no {what} {name}")
            owner, _, last = name.rpartition(".")
            kept = getattr(made.get_submodule(owner), last)
            if kept.shape != given[name].shape:
                raise Unsupported(f"{what} {name} has shape {list(given[name].shape)}, not {list(kept.shape)}")
            if what == "weight":
                own = nn.Parameter(given[name].detach(), requires_grad=False)
                setattr(made.get_submodule(owner), last, own)
            else:
                made.get_submodule(owner)._buffers[last] = given[name]
    return made


def _linears(module: Any, dtype: torch.dtype, *, packed: bool) -> None:
    """Put layers of ours in the place of linear layers."""
    if not packed:
        return
    from transformers.pytorch_utils import Conv1D

    unembed = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                last = child is unembed
                setattr(parent, name, linear(child.weight, child.bias, dtype, packed=True, unembedding=last))
            elif type(child) is Conv1D:
                weight, bias = child.weight, child.bias
                assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
                setattr(parent, name, linear(weight.T, bias, dtype, packed=True))


def _register(module: Any, now: _Pass) -> None:
    """Make our attention the module's; it looks for the memory in the pass at hand."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: Any = ALL_ATTENTION_FUNCTIONS
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    found.register(_NAME, _attention)
    masks.register(_NAME, _no_mask)
    attending = [part for part in module.modules() if hasattr(part, "layer_idx")]
    if not attending:
        raise Unsupported(f"the attention of a {type(module).__name__} can't be replaced")
    if any(getattr(part, "rope_type", "") == "dynamic" for part in module.modules()):
        raise Unsupported("its rotation depends on the longest row of a batch")
    for part in attending:
        part.__dict__["_sims_lens_now"] = now
    for part in module.modules():
        if hasattr(part, "config") and hasattr(part.config, "_attn_implementation"):
            part.config._attn_implementation = _NAME


_IGNORED = ("dropout", "position_ids", "use_cache", "is_causal", "cache_position", "output_attentions", "mask_type")


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the memory knows what is seen
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface."""
    strange = [name for name, value in others.items() if value is not None and name not in _IGNORED]
    if strange:
        raise Unsupported(f"its attention takes {', '.join(strange)}")
    found = module._sims_lens_now.memory.attend(
        module.layer_idx,
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return found.transpose(1, 2).contiguous(), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


def _accepts(module: nn.Module, name: str) -> bool:
    import inspect

    return name in inspect.signature(module.forward).parameters


def _places(model: Any, module: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """By HookPoint, the part of the twin at whose entrance (True) or exit it is."""
    paths = {id(part): name.replace(_WRAPPED, "") for name, part in model.original_model.named_modules()}
    parts = dict(module.named_modules())
    found = {}
    points = set(model.hook_dict)
    owners = {f"{name}." if name else "": part for name, part in _components(model)}
    for prefix, component in owners.items():
        place = parts.get(paths.get(id(component), ""))
        if place is None or place is module:
            continue
        for end, entrance in (("hook_in", True), ("hook_out", False)):
            if f"{prefix}{end}" in points:
                found[f"{prefix}{end}"] = (place, entrance)
    return found


def _components(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The bridge's components by the names that their HookPoints have."""
    named = {id(point): name for name, point in model.hook_dict.items() if name.endswith((".hook_in", ".hook_out"))}
    for part in model.modules():
        for end in ("hook_in", "hook_out"):
            name = named.get(id(getattr(part, end, None)))
            if name is not None:
                yield name.removesuffix(f".{end}"), part
                break


def _entering(point: Any) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (point(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": point(kwargs["hidden_states"])}

    return hook


def _leaving(point: Any) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (point(output[0]), *output[1:]) if isinstance(output, tuple) else point(output)

    return hook


__all__ = ["BridgeTwin"]
