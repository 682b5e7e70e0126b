"""Heads and MLPs of blocks: recording what they give, giving something else in its place, and gradients there.

A component's output is taken where it leaves the component: a head's at ``attn.hook_z``, before the output projection,
an MLP's at ``hook_mlp_out``. What a plan adds at the same hook point comes after it: a steered ``mlp_out`` counts as
steering, not as the MLP's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sims_lens.activations import Row
from sims_lens.adapter import Adapter, adapt
from sims_lens.behaviour import TextPair, encode_pairs
from sims_lens.errors import ModelError
from sims_lens.forced import ForcedBatch
from sims_lens.hooks import Steering

HEAD, MLP = "head", "mlp"

_ORDER = {"resid_pre": 0, "attn_out": 2, "mlp_out": 4, "resid_post": 5}
"""When, within a block, what is added at a site is there; attention reads the stream at 1, the MLP at 3."""


@dataclass(frozen=True, order=True)
class Component:
    """One attention head, or one MLP.

    Args:
        layer: its block.
        kind: "head" or "mlp".
        head: its number; -1 for an MLP.

    >>> Component(3, "head", 2), Component(3, "mlp")
    (L3H2, L3 MLP)
    """

    layer: int
    kind: str
    head: int = -1

    def __repr__(self) -> str:
        return f"L{self.layer}H{self.head}" if self.kind == HEAD else f"L{self.layer} MLP"


@dataclass(eq=False)
class Outputs:
    """What the components of some layers gave at every column of a run, by layer."""

    heads: dict[int, Float[Tensor, "row column head d_head"]] = field(default_factory=dict)
    mlps: dict[int, Float[Tensor, "row column d_model"]] = field(default_factory=dict)

    def kind(self, kind: str) -> dict[int, Tensor]:
        """Those of all heads, or of all MLPs, by layer."""
        return self.heads if kind == HEAD else self.mlps

    def of(self, component: Component) -> Float[Tensor, "row column width"]:
        """One component's."""
        if component.kind == HEAD:
            return self.heads[component.layer][:, :, component.head]
        return self.mlps[component.layer]

    @property
    def components(self) -> list[Component]:
        """All that are held: by layer, the heads before the MLP."""
        heads = [Component(layer, HEAD, h) for layer, z in self.heads.items() for h in range(z.shape[2])]
        return sorted([*heads, *(Component(layer, MLP) for layer in self.mlps)])


@dataclass(eq=False)
class Record:
    """A run: its logits, what its components gave, and the stream after each of its blocks."""

    logits: Float[Tensor, "row pos d_vocab"]
    outputs: Outputs
    streams: dict[int, Float[Tensor, "row column d_model"]]


Visit = Callable[[str, int, Tensor], Tensor | None]
"""``visit(kind, layer, output)``: what goes on in the output's place; None leaves it."""


def check_components(adapter: Adapter) -> None:
    """Raise :class:`ModelError` unless every block has attention heads and an MLP where they are looked for."""
    for layer in range(adapter.n_layers):
        for name in (_point(layer, HEAD), _point(layer, MLP)):
            if name not in adapter.model.hook_dict:
                raise ModelError(f"{adapter.name} has no hook point {name}: its heads and MLPs can't be told apart")


def check_readers(adapter: Adapter) -> None:
    """Raise :class:`ModelError` unless attention and MLP of every block read the stream through a norm of their own."""
    for layer in range(adapter.n_layers):
        for name in ("ln1", "ln2"):
            if not hasattr(adapter.block(layer), name):
                raise ModelError(
                    f"block {layer} of {adapter.name} has no {name}: attention and MLP share what they read, so who "
                    "reads a direction can't be told; use component_effects"
                )


@contextmanager
def visiting(
    adapter: Adapter, layers: Sequence[int], visit: Visit, *, kinds: Sequence[str] = (HEAD, MLP)
) -> Iterator[None]:
    """Call ``visit`` with what the heads and the MLP of each layer give, before anything else that is attached there.

    Outputs have their canonical layout on both kinds of model: ``[row column head d_head]`` and
    ``[row column d_model]``.
    """
    with ExitStack() as stack:
        for layer in layers:
            for kind in kinds:

                def hook(point: Any, _args: Any, output: Tensor, kind: str = kind, layer: int = layer) -> Any:
                    conversion = getattr(point, "hook_conversion", None)
                    new = visit(kind, layer, output if conversion is None else conversion.convert(output))
                    return new if new is None or conversion is None else conversion.revert(new)

                point = adapter.model.hook_dict[_point(layer, kind)]
                stack.callback(point.register_forward_hook(hook, prepend=True).remove)
        yield


@contextmanager
def reading_without(
    adapter: Adapter, layers: Sequence[int], deltas: Mapping[tuple[int, str], Tensor]
) -> Iterator[None]:
    """Attention and MLP of these layers read the stream without what was added to it below them.

    The stream itself keeps it. Keys and values too are made of the input without.

    Args:
        adapter: of the model.
        layers: whose.
        deltas: what was added, by layer and site.
    """
    with ExitStack() as stack:
        for layer in layers:
            for kind, name in ((HEAD, "ln1"), (MLP, "ln2")):
                total = added_below(adapter, deltas, layer, kind)
                if total is not None:
                    stack.callback(_less(getattr(adapter.block(layer), name), total).remove)
        yield


@contextmanager
def unembedding_without(adapter: Adapter, deltas: Mapping[tuple[int, str], Tensor]) -> Iterator[None]:
    """The last norm, and so the logits, read the stream without what was added to it."""
    handle = _less(adapter.model.ln_final, sum(deltas.values(), torch.zeros(())))
    try:
        yield
    finally:
        handle.remove()


def _less(norm: Any, total: Tensor) -> Any:
    def hook(_norm: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] - total[:, -args[0].shape[1] :], *args[1:])  # some models norm only the columns that are kept

    return norm.register_forward_pre_hook(hook)


def added_below(
    adapter: Adapter, deltas: Mapping[tuple[int, str], Tensor], layer: int, kind: str
) -> Float[Tensor, "row column d_model"] | None:
    """What sites below a layer's attention, or its MLP, have added to what that reads; None where there are none."""
    parallel = bool(getattr(adapter.cfg, "parallel_attn_mlp", False))
    reads = (layer, 1 if kind == HEAD or parallel else 3)
    below = [delta for (at, site), delta in deltas.items() if (at, _ORDER[site]) < reads]
    return torch.stack(below).sum(0) if below else None


def record(batch: ForcedBatch, layer: int, *, change: Visit | None = None, stream: Tensor | None = None) -> Record:
    """Run a batch from a layer on, as the model is now, and keep what every component gives.

    Args:
        batch: of :func:`~sims_lens.forced.force`.
        layer: the first block that is run.
        change: what goes on in an output's place; what it returns is not what is kept.
        stream: what the block below gave, see :meth:`~sims_lens.forced.ForcedBatch.run`.
    """
    adapter = adapt(batch.model)
    outputs, streams = Outputs(), {}
    layers = range(layer, adapter.n_layers)

    def visit(kind: str, at: int, output: Tensor) -> Tensor | None:
        outputs.kind(kind)[at] = output.detach()
        return None if change is None else change(kind, at, output)

    with ExitStack() as stack:
        for at in layers:

            def keep(_block: Any, _args: Any, output: Any, at: int = at) -> None:
                streams[at] = output[0] if isinstance(output, tuple) else output

            stack.callback(adapter.block(at).register_forward_hook(keep).remove)
        stack.enter_context(visiting(adapter, layers, visit))
        logits = batch.run(layer=layer, stream=stream)
    return Record(logits, outputs, streams)


def run_with(
    batch: ForcedBatch,
    component: Component,
    outputs: Outputs,
    *,
    stream: Tensor | None,
) -> Float[Tensor, "row pos d_vocab"]:
    """Logits of a run as the model is now, one component's output being taken from another run.

    Args:
        batch: of :func:`~sims_lens.forced.force`.
        component: whose output; the run starts at its layer.
        outputs: where it is taken from.
        stream: what the block below gave in the run that is changed; that of the unsteered model where None.
    """

    def swap(_kind: str, _layer: int, output: Tensor) -> Tensor:
        if component.kind == MLP:
            return outputs.of(component)
        changed = output.clone()
        changed[:, :, component.head] = outputs.of(component)
        return changed

    with visiting(adapt(batch.model), [component.layer], swap, kinds=[component.kind]):
        return batch.run(layer=component.layer, stream=stream)


def frozen(outputs: Outputs) -> Visit:
    """For :func:`record` and :func:`visiting`: every component gives what it gave in another run."""
    return lambda kind, layer, _output: outputs.kind(kind)[layer]


def gradients(batch: ForcedBatch, layer: int) -> Outputs:
    """Gradient of each pair's margin with respect to what each component gives, in a run as the model is now.

    A component's gradient holds all that comes of it further up. Rows don't mix, so one backward pass of the sum of
    the margins serves all pairs. No parameter gets a gradient.
    """
    seen: dict[tuple[str, int], Tensor] = {}

    def node(kind: str, at: int, output: Tensor) -> Tensor:
        seen[kind, at] = (output if output.requires_grad else output.detach().requires_grad_()).clone()
        return seen[kind, at]

    with torch.enable_grad():
        with visiting(adapt(batch.model), range(layer, adapt(batch.model).n_layers), node):
            score = margins(batch, batch.run(layer=layer)).sum()
        found = torch.autograd.grad(score, list(seen.values()))
    outputs = Outputs()
    for (kind, at), gradient in zip(seen, found, strict=True):
        outputs.kind(kind)[at] = gradient
    return outputs


def attribute(
    batch: ForcedBatch, gradient: Outputs, change: Outputs, start: Outputs
) -> Float[Tensor, "component pair"]:
    """First-order change of each pair's margin when each component's output goes from ``start`` to ``change``."""
    real = real_columns(batch)
    found = []
    for component in start.components:
        step = (change.of(component) - start.of(component)).float() * gradient.of(component).float()
        per_row = torch.where(real[..., None], step, 0.0).sum((1, 2))
        found.append(per_row[0::2] + per_row[1::2])
    return torch.stack(found)


def differs(batch: ForcedBatch, component: Component, a: Outputs, b: Outputs) -> bool:
    """Whether a component gave something else in one run than in another, at any real token."""
    real = real_columns(batch)
    return not torch.equal(a.of(component)[real], b.of(component)[real])


def real_columns(batch: ForcedBatch) -> Bool[Tensor, "row column"]:
    """The real tokens among the columns that are run."""
    return batch.mask[:, batch.start :]


def margins(batch: ForcedBatch, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, " pair"]:
    """Each pair's log-probability margin, nats per token; rows 2k and 2k + 1 are the texts of a pair."""
    means = batch.mean(batch.logprobs(logits))
    return means[0::2] - means[1::2]


def pair_rows(adapter: Adapter, pairs: Sequence[TextPair]) -> list[Row]:
    """Token ids of each pair's positive and negative text after its prompt, one behind the other."""
    prompts, texts = encode_pairs(adapter, pairs)
    return [(prompts[prompt], texts[text]) for prompt, *both in pairs for text in both]


@contextmanager
def listening_deltas(model: Any, steered: Steering) -> Iterator[dict[tuple[int, str], Tensor]]:
    """A dict that a run inside fills with what the plan adds, by layer and site."""
    deltas: dict[tuple[int, str], Tensor] = {}
    with ExitStack() as stack:
        for where, point in _delta_points(model, steered):

            def hook(_point: Any, _args: Any, output: Tensor, where: tuple[int, str] = where) -> None:
                deltas[where] = output.detach()

            stack.callback(point.register_forward_hook(hook).remove)
        yield deltas


def _delta_points(model: Any, steered: Steering) -> list[tuple[tuple[int, str], Any]]:
    found = []
    for name in steered.hook_names:
        _, layer, module, child = name.split(".")
        if child == "hook_delta":
            site = next(site for site in _ORDER if module.startswith(f"steer_{site}"))  # nested plans count from _2
            found.append(((int(layer), site), model.hook_dict[name]))
    return found


def _point(layer: int, kind: str) -> str:
    return f"blocks.{layer}.attn.hook_z" if kind == HEAD else f"blocks.{layer}.hook_mlp_out"


__all__ = [
    "HEAD",
    "MLP",
    "Component",
    "Outputs",
    "Record",
    "added_below",
    "attribute",
    "check_components",
    "check_readers",
    "differs",
    "frozen",
    "gradients",
    "listening_deltas",
    "margins",
    "pair_rows",
    "reading_without",
    "real_columns",
    "record",
    "run_with",
    "unembedding_without",
    "visiting",
]
