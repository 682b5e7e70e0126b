"""Attaching a plan to a model: hook points for activation addition, and the ``with`` block that owns them.

Each steered site gets one small module in its block, with three HookPoints of its own::

    blocks.14.steer_resid_post.hook_pre      the stream as it came
    blocks.14.steer_resid_post.hook_delta    what is added to it
    blocks.14.steer_resid_post.hook_post     the stream as it goes on

They are listed in ``model.hook_dict`` and behave like any of TransformerLens' own: cache them, patch them, ablate
them. The stream that goes on is ``hook_pre + hook_delta``, so a zeroed ``hook_delta`` is bitwise the unsteered
model. Everything is undone when the block ends, however it ends.

A plan acts on whoever runs the model. One thread at a time can attach plans to a model (:mod:`sims_lens.holders`);
others may run it meanwhile, steered.
"""

import html
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sims_lens.activations import residual_norms
from sims_lens.adapter import Adapter, adapt, cached_length
from sims_lens.errors import ModelError, PlanError
from sims_lens.holders import hold, release
from sims_lens.plan import Intervention, SteeringPlan
from sims_lens.scope import TRACKER, Region, TokenScope, regions_at
from sims_lens.sites import check_layer, steer_name
from sims_lens.transforms import Strength

_GENERATORS = ("generate", "generate_stream", "hf_generate")


class _Pass(threading.local):
    """What a thread's forward pass is about. A copy of a model begins with what the copying thread knows."""

    def __init__(self) -> None:
        self.paused = False
        self.generating = False
        self.declared: int | Int[Tensor, " batch"] | None = None
        self.boundary: int | Int[Tensor, " batch"] | None = None
        self.columns = (0, 0)
        self.before: Sequence[int] | None = None
        self.masks: dict[TokenScope, bool | Bool[Tensor, "batch pos"]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Pass, (), dict(self.__dict__)


class TokenTracker:
    """Knows, at every forward pass, which region each token of the batch is in.

    A hook sees only a tensor. The tracker listens to the first block, where the shape of the batch and the length
    of the KV cache tell the absolute columns, and to the model's ``generate``, where the first pass is the prompt.
    Outside of ``generate`` a pass without a cache is all prompt, unless :meth:`prompt` says where the prompt ends;
    tokens that go on from a cache are response. Each thread has its own pass: several may run the model at once.
    """

    def __init__(self) -> None:
        self.users: list[Steering] = []
        self._handle: Any = None
        self._now = _Pass()

    @property
    def boundary(self) -> int | Int[Tensor, " batch"] | None:
        """The column at which the response begins, where it is known."""
        return self._now.boundary

    def before_block(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the first block: one forward pass begins."""
        stream = args[0] if args else kwargs["hidden_states"]
        self._begin(cached_length(kwargs.get, [*args, *kwargs.values()]), stream.shape[1])

    def _begin(self, offset: int, width: int) -> None:
        if self._now.declared is not None:
            self._now.boundary = self._now.declared
        elif not self._now.generating:
            self._now.boundary = offset or width
        elif self._now.boundary is None:
            self._now.boundary = offset + width
        self._now.columns, self._now.masks, self._now.before = (offset, width), {}, None

    def expect(self, width: int, boundary: int, *, offset: int = 0, before: Sequence[int] | None = None) -> None:
        """Say what the next forward pass is about, where no block of the model runs to tell (:mod:`sims_lens.twin`).

        Args:
            width: columns that are run.
            boundary: the column at which a response begins.
            offset: of the first column that is run.
            before: for each row, response tokens before the first column, where they differ.
        """
        now = self._now
        now.boundary, now.columns, now.masks, now.before = boundary, (offset, width), {}, before

    def mask(self, scope: TokenScope, stream: Float[Tensor, "batch pos d_model"]) -> "bool | Tensor":
        """Which tokens of ``stream`` are in scope: a mask, or one bool where it is the same for all of them."""
        if self._now.paused:
            return False
        if self._now.columns[1] != stream.shape[1]:  # a pass that skipped the first block
            self._begin(0, stream.shape[1])
        if scope not in self._now.masks:
            self._now.masks[scope] = self._compute(scope, stream)
        return self._now.masks[scope]

    def _compute(self, scope: TokenScope, stream: Tensor) -> "bool | Tensor":
        (offset, width), boundary = self._now.columns, self._now.boundary
        assert boundary is not None
        if scope.prompt and scope.last_prompt and scope.response:
            return True
        if isinstance(boundary, int) and offset >= boundary:
            return scope.holds(Region.RESPONSE)
        if isinstance(boundary, Tensor) and len(boundary) != len(stream):
            raise PlanError(f"prompt(columns) was given {len(boundary)} numbers for a batch of {len(stream)} rows")
        columns = torch.arange(offset, offset + width, device=stream.device)[None]
        edge = torch.as_tensor(boundary, device=stream.device).reshape(-1, 1)
        return scope.mask(regions_at(columns.expand(len(edge), -1), edge))

    def age(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "_rows pos"]:
        """How many generated tokens there are up to each token of ``stream``: 0 in the prompt, 1 at the first one.

        To be called after :meth:`mask`, for the same stream.
        """
        (offset, width), boundary = self._now.columns, self._now.boundary
        if self._now.before is not None:
            offset, boundary = 0, [-count for count in self._now.before]  # type: ignore[assignment]
        columns = torch.arange(offset, offset + width, device=stream.device)[None]
        edge = torch.as_tensor(boundary, device=stream.device).reshape(-1, 1)
        return (columns - edge + 1).clamp(min=0).to(torch.float32)

    @contextmanager
    def prompt(self, columns: "int | Sequence[int] | Int[Tensor, ' batch']") -> Iterator[None]:
        """Inside, the first ``columns`` columns of every batch (padding included) are the prompt."""
        counts = torch.as_tensor(columns)
        if counts.ndim > 1 or counts.is_floating_point() or counts.dtype == torch.bool or bool((counts < 0).any()):
            raise PlanError(f"prompt(columns) needs a count of columns, or one per row of the batch; got {columns!r}")
        before, self._now.declared = self._now.declared, counts if counts.ndim else int(counts)
        try:
            yield
        finally:
            self._now.declared, self._now.columns = before, (0, 0)

    @contextmanager
    def generation(self, boundary: "int | Tensor | None" = None) -> Iterator[None]:
        """Inside, the first pass is the prompt and whatever lies beyond it is response, with or without a cache.

        Args:
            boundary: where the prompt ends, when a generation that was begun before goes on.
        """
        before = self._now.generating, self._now.boundary
        self._now.generating, self._now.boundary = True, boundary
        try:
            yield
        finally:
            (self._now.generating, self._now.boundary), self._now.columns = before, (0, 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no token is in scope: the model acts as if it were not steered."""
        before, self._now.paused = self._now.paused, True
        try:
            yield
        finally:
            self._now.paused = before

    # One tracker per model, kept with the hooks that feed it

    def attach(self, user: "Steering", adapter: Adapter) -> None:
        """Start listening for the first user; nested plans share it."""
        self.users.append(user)
        if len(self.users) > 1:
            return
        self._handle = adapter.block(0).register_forward_pre_hook(self.before_block, with_kwargs=True)
        own = adapter.model.__dict__
        for name in _GENERATORS:
            if hasattr(type(adapter.model), name):
                own[name] = _Generation(getattr(adapter.model, name), self, replaces=own.get(name))

    def detach(self, user: "Steering", adapter: Adapter) -> None:
        """Stop listening when the last user leaves."""
        if all(each is user for each in self.users):
            if self._handle is not None:
                self._handle.remove()
            own = adapter.model.__dict__
            for name in _GENERATORS:
                if isinstance(own.get(name), _Generation) and own[name].tracker is self:
                    replaced = own[name].replaces
                    if replaced is None:
                        del own[name]
                    else:
                        own[name] = replaced
            if own.get(TRACKER) is self:
                del own[TRACKER]
        if user in self.users:
            self.users.remove(user)


class _Generation:
    """``model.generate`` with the tracker told. An object, not a closure: ``copy.deepcopy(model)`` then copies the
    reference to the model too."""

    def __init__(self, call: Callable[..., Any], tracker: TokenTracker, *, replaces: Any) -> None:
        self.call, self.tracker, self.replaces = call, tracker, replaces

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.tracker.generation():
            result = self.call(*args, **kwargs)
        return self._stream(result) if isinstance(result, Generator) else result

    def _stream(self, stream: Iterator[Any]) -> Iterator[Any]:
        """The stream, generating only while it computes: what the user runs between two pieces is not part of it."""
        boundary = None
        while True:
            with self.tracker.generation(boundary):
                try:
                    piece = next(stream)
                except StopIteration:
                    return
                boundary = self.tracker.boundary
            yield piece


def _buffer(name: str, index: int) -> str:
    """Where a module keeps a transform's tensor; buffers may have no dot in their names."""
    return f"{name.replace('.', '__')}_{index}"


class SteeringModule(nn.Module):
    """What steers one site: the interventions of one plan there, in order, between three HookPoints."""

    def __init__(self, interventions: Sequence[Intervention], tracker: TokenTracker) -> None:
        from transformer_lens.hook_points import HookPoint

        super().__init__()
        self.hook_pre, self.hook_delta, self.hook_post = HookPoint(), HookPoint(), HookPoint()
        self.tracker = tracker
        self.interventions = tuple(interventions)
        for index, intervention in enumerate(interventions):
            for name, tensor in intervention.transform.tensors().items():
                self.register_buffer(_buffer(name, index), tensor.clone(), persistent=False)

    def forward(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The stream as it goes on: ``hook_pre + hook_delta``."""
        stream = self.hook_pre(stream)
        total = torch.zeros_like(stream)
        for index, intervention in enumerate(self.interventions):
            mask = self.tracker.mask(intervention.scope, stream)
            if mask is False:
                continue
            names = intervention.transform.tensors()
            tensors = {name: getattr(self, _buffer(name, index)) for name in names}
            strength: Strength = intervention.strength
            if intervention.half_life is not None:
                strength = strength * (-self.tracker.age(stream) / intervention.half_life).exp2()[..., None]
            delta = intervention.transform.delta(stream + total if index else stream, tensors, strength)
            if mask is not True:
                delta = torch.where(mask[..., None], delta, 0.0)
            total = total + delta
        return self.hook_post(stream + self.hook_delta(total))  # type: ignore[no-any-return]

    def at_point(self, point: Any, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of TransformerLens' HookPoint at the site; honours the point's layout conversion."""
        conversion = getattr(point, "hook_conversion", None)
        if conversion is None:
            return self(output)  # type: ignore[no-any-return]
        return conversion.revert(self(conversion.convert(output)))  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SteeringModule":
        """The vectors go where the model goes, and stay what they are: ``model.to(torch.bfloat16)`` inside the block
        gives what attaching to a bfloat16 model gives."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call,no-any-return]

    def extra_repr(self) -> str:
        """The interventions, for ``print(model)``."""
        return "; ".join(i.describe() for i in self.interventions)


class Steering:
    """A plan attached to a model. Made by :func:`attach` and :func:`steering`; undone by :meth:`detach`."""

    def __init__(self, model: Any, plan: SteeringPlan) -> None:
        self.plan = plan
        self.attached = False
        self._adapter = adapt(model)
        self._tracker = TokenTracker()
        self._sites: list[tuple[int, str, Any, Any]] = []

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The names that the plan added to ``model.hook_dict``, for instance ``...steer_resid_post.hook_delta``."""
        return tuple(
            f"blocks.{layer}.{name}.{child}"
            for layer, name, _, _ in self._sites
            for child in ("hook_pre", "hook_delta", "hook_post")
        )

    def prompt(self, columns: "int | Sequence[int] | Tensor") -> Any:
        """``with steering.prompt(columns):``: say where the prompt ends in teacher-forced forward passes.

        Args:
            columns: how many columns from the left belong to the prompt, padding included: one number, or one per
                row. Inside ``generate`` nothing need be said.
        """
        return self._tracker.prompt(columns)

    def detach(self) -> None:
        """Take the plan off again: names, hooks and logits are as before. A second call does nothing; after one that
        was interrupted it does the rest."""
        if not self.attached:
            return
        while self._sites:
            layer, name, point, handle = self._sites[-1]
            if handle.hook is not None:
                handle.hook.remove()
            point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]
            self._adapter.unregister(layer, name)
            self._sites.pop()
        self._tracker.detach(self, self._adapter)
        release(self._adapter.model, id(self))
        self.attached = False

    def _attach(self) -> None:
        from transformer_lens.hook_points import LensHandle

        model = self._adapter.model
        self.attached = True
        hold(model, id(self), name=self._adapter.name)  # first: whoever looks through the model must not see it change
        self.plan = resolve(model, self.plan)
        grouped: dict[tuple[int, str], list[Intervention]] = {}
        for intervention in self.plan.interventions:
            grouped.setdefault((intervention.layer, intervention.site), []).append(intervention)
        points = {where: self._adapter.point(*where) for where in grouped}
        self._tracker = model.__dict__.setdefault(TRACKER, self._tracker)
        self._tracker.attach(self, self._adapter)
        for (layer, site), interventions in grouped.items():
            block = self._adapter.block(layer)
            depth = 1
            while steer_name(site, depth) in block._modules:
                depth += 1
            name = steer_name(site, depth)
            module = SteeringModule(interventions, self._tracker).train(self._adapter.model.training)
            module.to(next(block.parameters()).device)
            point = points[layer, site]
            handle = LensHandle(None, is_permanent=True)
            self._sites.append((layer, name, point, handle))  # first, so that half a registration is undone too
            handle.hook = point.register_forward_hook(module.at_point)
            point.fwd_hooks.append(handle)
            self._adapter.register(layer, name, module)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"Steering ({state}) of {self._adapter.name} by\n{self.plan!r}"

    def _repr_html_(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"<p><b>Steering</b> ({state}) of {html.escape(self._adapter.name)}</p>{self.plan._repr_html_()}"


def attach(model: Any, plan: SteeringPlan) -> Steering:
    """Attach a plan until ``detach()`` is called on what is returned. See :func:`steering`."""
    steered = Steering(model, plan)
    try:
        steered._attach()
    except BaseException:
        steered.detach()
        raise
    return steered


def steerings(model: Any) -> tuple[Steering, ...]:
    """The plans that are attached to a model now, outermost first.

    A copy that was made with ``copy.deepcopy`` inside a ``with`` block has steering of its own, which no block ends:
    ``for each in steerings(model): each.detach()``.
    """
    tracker: TokenTracker | None = model.__dict__.get(TRACKER)
    return () if tracker is None else tuple(tracker.users)


@contextmanager
def steering(model: Any, plan: SteeringPlan) -> Iterator[Steering]:
    """Steer a model inside a ``with`` block; any TransformerLens call in it is steered.

    ``model.reset_hooks()`` inside keeps the plan and drops the user's hooks; with ``including_permanent=True`` it drops
    the plan's too, until the block ends.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        plan: what to do. Several plans: nest the blocks (each gets hook points of its own, the inner one counted
            from ``steer_resid_post_2``), or compose them first with ``plan_a + plan_b`` (one set of hook points).
            Both act in that order and agree.

    Yields:
        The attached :class:`Steering`, whose ``prompt(columns)`` says where the prompt ends in teacher-forced
        passes.

    Raises:
        PlanError: the plan is for another model, another width, or a layer or site that the model has not.
        ModelError: the model is of an unknown kind, or another thread has a plan attached to it or is drawing from it.
    """
    steered = Steering(model, plan)
    try:  # nothing between attaching and here that Ctrl-C could hit
        steered._attach()
        yield steered
    finally:
        try:
            steered.detach()
        except BaseException:  # or in here
            steered.detach()
            raise


def resolve(model: Any, plan: SteeringPlan) -> SteeringPlan:
    """The plan checked against a model, with every residual norm that it needs measured.

    Raises:
        PlanError: the plan does not fit the model.
    """
    if not isinstance(plan, SteeringPlan):
        makes_one = isinstance(getattr(type(plan), "plan", None), property)
        has = "its plan is .plan" if makes_one else "make one with .plan(layer)" if hasattr(plan, "plan") else ""
        raise PlanError(
            f"expected a SteeringPlan, got {type(plan).__name__}; {has or 'see SteeringPlan.addition({layer: vector})'}"
        )
    check_fits(adapt(model), plan)
    if all(i.units == "absolute" or i.residual_norm is not None for i in plan.interventions):
        return plan
    sites = sorted({i.site for i in plan.interventions if i.residual_norm is None})
    tracker: TokenTracker | None = model.__dict__.get(TRACKER)
    with tracker.paused() if tracker else nullcontext():  # the unit is the unsteered model's, also when plans nest
        measured = {site: residual_norms(model, site=site) for site in sites}
    return replace(
        plan,
        interventions=tuple(
            replace(i, residual_norm=measured[i.site][i.layer])
            if i.units == "residual_norm" and i.residual_norm is None
            else i
            for i in plan.interventions
        ),
    )


def check_unsteered(model: Any) -> None:
    """Raise :class:`ModelError` where a plan is attached: what compares with the unsteered model needs it unsteered."""
    adapter = adapt(model)
    if model.__dict__.get(TRACKER) is not None:
        raise ModelError(
            f"a plan is attached to {adapter.name}, and this compares with the unsteered model: leave its `with` "
            "block, or detach it, first"
        )


def check_fits(adapter: Adapter, plan: SteeringPlan) -> None:
    """Raise :class:`PlanError` unless the plan's model, layers, sites and width are the model's."""
    wanted = plan.provenance
    if wanted.model and wanted.model != adapter.name:
        raise PlanError(
            f"this plan was made for {wanted.model!r}, the model is {adapter.name!r}; "
            "if you know that it fits, attach plan.unbound()"
        )
    now = adapter.provenance.revision
    if wanted.model and wanted.revision and now and wanted.revision != now:  # often just another README
        warnings.warn(
            f"this plan was made on revision {wanted.revision} of {adapter.name}, the model is revision {now}; load "
            "that revision if the weights have changed",
            stacklevel=4,
        )
    for i in plan.interventions:
        check_layer(i.layer, adapter.n_layers, adapter.name)
        adapter.point(i.layer, i.site)
        width = getattr(i.transform, "d_model", adapter.d_model)
        if width != adapter.d_model:
            raise PlanError(
                f"the direction of {i.describe()} has {width} entries, {adapter.name} has d_model = {adapter.d_model}"
            )
    _check_centred(adapter, plan)
    devices = {p.device.type for p in adapter.block(0).parameters()}
    if "meta" in devices:
        raise ModelError(f"{adapter.name} is on the meta device and has no weights; load them first")


def _check_centred(adapter: Adapter, plan: SteeringPlan) -> None:
    """Raise :class:`PlanError` where a plan reads projections that the model's weight processing has moved."""
    made, now = plan.provenance.weight_processing, adapter.provenance.weight_processing
    if not made or made == now or not str(adapter.cfg.normalization_type).startswith("LN"):
        return
    reading = [i for i in plan.interventions if getattr(i.transform, "reads_projection", False)]
    if reading and not SteeringPlan(tuple(reading)).is_centred:
        raise PlanError(
            f"{reading[0].describe()} reads projections on a direction that is not centred, made on weights with "
            f"processing {made!r}; {adapter.name} has LayerNorm and processing {now!r}, so the streams differ by their "
            "mean. Attach plan.centred()"
        )
