"""What is attached to a model: which HookPoints, by whom, and what no twin can honour."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from sims_lens.scope import TRACKER
from sims_lens.sites import STEERING


def _of_the_bridge(module: nn.Module, hook: Any) -> bool:
    """Whether a hook is part of how a bridge works, on something that is no HookPoint: one of TransformerLens' own, or
    one of those with which transformers collects outputs, and which stay when they have been asked for once."""
    own = str(getattr(hook, "__module__", "")).startswith(("transformer_lens.", "transformers."))
    return own and type(module).__name__ != "HookPoint"


@dataclass(frozen=True, eq=False)
class Attached:
    """What is attached to a model.

    Args:
        points: the HookPoints that something is attached to, by name.
        watched: whether it is somebody else's, not only a plan's or a reader's.
        theirs: names of the HookPoints that somebody else's hooks are attached to.
        strange: what no twin can honour, else "".
        spares_prompts: whether it is only plans that leave prompts alone, save their last token.
    """

    points: dict[str, Any]
    watched: bool
    strange: str
    spares_prompts: bool = False
    theirs: frozenset[str] = frozenset()


def attached(model: Any) -> Attached:
    """What is attached to a model now."""
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        return _strange("a hook is attached to all modules of PyTorch")
    tracker = model.__dict__.get(TRACKER)
    points: dict[str, Any] = {}
    theirs: set[str] = set()
    spares = True
    for module in model.modules():
        kind = type(module).__name__
        if module._backward_hooks or module._backward_pre_hooks:
            return _strange(f"a backward hook is attached to a {kind}")
        if "forward" in module.__dict__:
            return _strange(f"the forward method of a {kind} was replaced")
        if is_parametrized(module):
            return _strange(f"a weight of a {kind} is parametrized")
        if module.training and not model.training and kind != "HookPoint":
            return _strange(f"a {kind} is in training mode; call model.eval()")
        hooks = [hook for hook in _hooks(module) if tracker is None or getattr(hook, "__self__", None) is not tracker]
        if not hooks or all(_of_the_bridge(module, hook) for hook in hooks):
            continue
        if kind != "HookPoint":
            return _strange(f"a hook is attached to a {kind}, which is no HookPoint")
        if not all(_ours(hook) for hook in hooks):
            theirs.add(str(module.name))
        spares = spares and all(_spares_prompts(hook) for hook in hooks)
        if STEERING not in str(module.name):  # those of a plan are fired by its own module
            points[str(module.name)] = module
    return Attached(points, bool(theirs), "", spares, frozenset(theirs))


def _strange(why: str) -> Attached:
    return Attached({}, True, why)


def _spares_prompts(hook: Any) -> bool:
    interventions = getattr(getattr(hook, "__self__", None), "interventions", None)
    return interventions is not None and not any(i.scope.prompt for i in interventions)


def _hooks(module: Any) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _ours(hook: Any) -> bool:
    """Whether a hook is a plan's or a reader's of this package, which know where a prompt ends."""
    return str(getattr(hook, "__module__", "")).startswith("sims_lens.") or hasattr(
        getattr(hook, "__self__", None), "interventions"
    )


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


__all__ = ["attached", "unhooked"]
