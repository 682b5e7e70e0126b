"""How a model will be run: on its twin, or by itself and why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import adapt
from sims_lens.scope import TRACKER
from sims_lens.twin.attached import attached
from sims_lens.twin.base import Points, Twin
from sims_lens.twin.making import twin_of
from sims_lens.twin.passes import run_responses


@dataclass(frozen=True, eq=False)
class Road:
    """How a model will be run.

    Args:
        twin: the fast road; None where there is none.
        points: HookPoints that something is attached to, which the twin fires.
        reason: why there is no twin, else "".
        watched: whether somebody else's hooks are among ``points``, not only a plan's.
        spares_prompts: whether nothing attached acts on prompts or looks at them, save at their last tokens.
    """

    twin: Twin | None
    points: Points
    reason: str
    watched: bool = False
    spares_prompts: bool = False


def road(model: Any, dtype: torch.dtype | None = None, *, twin: Twin | None = None, solo: bool = False) -> Road:
    """The fast road for a model as it is now, with what is attached to it; or why there is none.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        dtype: to run in; the model's own where None.
        twin: the model's twin, where it is known and no weight can have changed since; saves reading all weights.
        solo: for one row at a time: see :func:`twin_of`.
    """
    now = attached(model)
    if now.strange:
        return Road(None, {}, now.strange)
    if model.training:
        return Road(None, {}, "the model is in training mode; call model.eval()")
    if torch.is_autocast_enabled(adapt(model).device.type):
        return Road(None, {}, "autocast is on, under which the fast road is not the model")
    found = twin_of(model, dtype, solo=solo) if twin is None else twin
    if isinstance(found, str):
        return Road(None, {}, found)
    for name in now.points:
        if name not in found.fires:
            return Road(None, {}, f"something is attached to {name}, which the fast road does not pass")
        if name in found.refused:
            return Road(None, {}, f"something is attached to {name}, where the fast road {found.refused[name]}")
    apart, together = sorted(now.theirs & found.by_length), sorted(now.theirs - found.by_length)
    if apart and together:  # a hook at one may go by what a hook at the other saw
        shown = f"hooks are attached to {apart[0]} and to {together[0]}"
        return Road(None, {}, f"{shown}, which the fast road would show different rows at a time")
    return Road(found, now.points, "", now.watched, now.spares_prompts)


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


__all__ = ["Road", "response_logits", "road", "telling"]
