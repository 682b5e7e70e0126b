"""Direct logit attribution of a steered model: who writes the answer, with the steering delta as a component.

The residual stream at a position is a sum: the embedding, what every attention and every MLP wrote, and every steering
delta. With x_i a part, x = sum_i x_i, and the final norm held at this run's scale s, each part has a share of the logit
difference of two tokens that is linear in it:

    logit(a) - logit(b) = sum_i  x_i · g / s  +  bias,     g = gain * (W_U[:, a] - W_U[:, b])

with g centred for a LayerNorm, and the bias that of the norm and the unembedding. Between the steered run (x, s) and
the unsteered one (y, r) the difference splits exactly into what the parts wrote and what the norm's scale did:

    sum_i (x_i - y_i) · g * (1/s + 1/r) / 2   +   (x + y) · g / 2 * (1/s - 1/r)

Both halves treat the runs alike (the Shapley values of "parts" and "scale"). TransformerLens' own functions leave the
delta out and ask for folded weights; here the sum is checked in every run, on the weights as they are.

Reference: Elhage et al. 2021, "A mathematical framework for transformer circuits"; nostalgebraist 2020, "interpreting
    GPT: the logit lens"; Wang et al. 2022, "Interpretability in the wild" (arXiv 2211.00593), for logit differences.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import Adapter, adapt
from sims_lens.checks import shown
from sims_lens.errors import ConfigError, ModelError, PromptError
from sims_lens.hooks import check_unsteered, resolve, steering
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.prompts import quote
from sims_lens.sites import SITES, hook_name, steer_name

if TYPE_CHECKING:
    import pandas as pd

Parts = Literal["component", "head"]

_SHOWN = 14
"""Rows of a result's text."""

_CHANGE = (
    "The change of a row is not steered less unsteered: it is at one scale of the final norm for both runs; the change "
    "of the scale is the row 'final norm'."
)


@dataclass(frozen=True)
class Component:
    """One term of the residual stream, or of a logit.

    Args:
        kind: "embed", "pos_embed", "attn", "head", "attn_bias", "mlp" and "steer" write to the stream; "bias" is that
            of the final norm and the unembedding, "final_norm" the change of its scale, "soft_cap" what a cap on the
            logits takes off.
        layer: the block, None outside of them.
        head: of the attention, for a "head".
        site: where a "steer" acts.
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    site: str = ""

    @property
    def name(self) -> str:
        """As in :func:`~sims_lens.analysis.component_effects`, for instance "L14 MLP", "L14H3"; and "L14 attn",
        "L14 steer resid_post"."""
        if self.kind == "head":
            return f"L{self.layer}H{self.head}"
        words = [f"L{self.layer}"] if self.layer is not None else []
        words.append("MLP" if self.kind == "mlp" else self.kind.replace("_", " "))
        return " ".join([*words, self.site] if self.site else words)


@dataclass(frozen=True, eq=False)
class ResidualComponents:
    """The residual stream after the last block at one position, as a sum; made by :func:`residual_components`.

    Args:
        components: what each row of ``parts`` is, in the order of the forward pass.
        parts: what each wrote, float64.
        residual: the stream itself, float64, as the model had it.
        scale: what the final norm divides by there.
        logits: the model's logits there.
    """

    components: tuple[Component, ...]
    parts: Float[Tensor, "component d_model"] = field(repr=False)
    residual: Float[Tensor, " d_model"] = field(repr=False)
    scale: float
    logits: Float[Tensor, " d_vocab"] = field(repr=False)

    @property
    def error(self) -> float:
        """Norm of the residual less the sum of the parts, over the residual's norm: rounding."""
        return float((self.residual - self.parts.sum(0)).norm() / self.residual.norm().clamp(min=1e-30))


@dataclass(frozen=True)
class Contribution:
    """What one component writes on the logit (difference).

    Args:
        component: which.
        steered: in the steered run, with the final norm at that run's scale.
        unsteered: in the unsteered one, at its own scale.
        change: between the two, with one scale for both, so not ``steered - unsteered``: the change of the scale is a
            row of its own, "final norm". See the top of this module.
    """

    component: Component
    steered: float
    unsteered: float
    change: float


@dataclass(frozen=True)
class LogitAttribution:
    """Who writes a logit (difference), steered and unsteered; made by :func:`logit_attribution`.

    The columns ``steered`` and ``unsteered`` each add up to the model's own logit (difference) in that run, and
    ``change`` to the difference of the two. The ``change`` of one row is not its ``steered - unsteered``: it is at one
    scale of the final norm for both runs, and the change of that scale has a row of its own.

    Args:
        contributions: in the order of the forward pass.
        answer: the token.
        versus: the token whose logit is subtracted, "" for none.
        token: the token at the position.
        position: counted from the first token of the prompt.
        steered: the model's logit (difference) in the steered run.
        unsteered: in the unsteered one.
        residual_error: relative rounding of the sum of the residual stream, the larger of the two runs.
    """

    contributions: tuple[Contribution, ...]
    answer: str
    versus: str
    token: str
    position: int
    steered: float
    unsteered: float
    residual_error: float

    @property
    def total(self) -> float:
        """The steered logit (difference) less the unsteered one."""
        return self.steered - self.unsteered

    @property
    def direct(self) -> float:
        """Of the change, what the steering deltas at this position write themselves."""
        return self._of("steer")

    @property
    def downstream(self) -> float:
        """Of the change, what attention and MLPs write differently because of the steering, here or earlier."""
        return self._of("embed", "pos_embed", "attn", "head", "attn_bias", "mlp")

    @property
    def norm(self) -> float:
        """Of the change, what is due to the scale of the final norm."""
        return self._of("final_norm")

    @property
    def soft_cap(self) -> float:
        """Of the change, what a cap on the logits takes off; 0 where the model has none."""
        return self._of("soft_cap")

    def _of(self, *kinds: str) -> float:
        return math.fsum(c.change for c in self.contributions if c.component.kind in kinds)

    def table(self) -> "pd.DataFrame":
        """One row per component, in the order of the forward pass."""
        import pandas as pd

        rows = [
            {
                "component": c.component.name,
                "kind": c.component.kind,
                "layer": c.component.layer,
                "head": c.component.head,
                "steered": c.steered,
                "unsteered": c.unsteered,
                "change": c.change,
            }
            for c in self.contributions
        ]
        return pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})

    @property
    def measure(self) -> str:
        """What is attributed, in words."""
        return f"logit of {quote(self.answer)}" + (f" less that of {quote(self.versus)}" if self.versus else "")

    def verdict(self) -> str:
        """Where the change comes from, in one sentence."""
        parts = [
            f"the steering delta writes {self.direct:+.3g} itself",
            f"attention and MLPs add {self.downstream:+.3g}",
            f"the final norm's scale {self.norm:+.3g}",
            *([f"the cap on the logits {self.soft_cap:+.3g}"] if self.soft_cap else []),
        ]
        return f"Of the change, {self.total:+.3g}, {', '.join(parts[:-1])} and {parts[-1]}."

    def _head(self) -> str:
        return (
            f"{self.measure} at position {self.position} ({quote(self.token)}): "
            f"{self.unsteered:+.3f} unsteered, {self.steered:+.3f} steered"
        )

    def _cells(self, count: int) -> list[tuple[str, ...]]:
        ranked = sorted(self.contributions, key=lambda c: -abs(c.change))
        rows: list[tuple[str, ...]] = [
            (c.component.name, f"{c.unsteered:+.3f}", f"{c.steered:+.3f}", f"{c.change:+.3f}") for c in ranked[:count]
        ]
        if rest := ranked[count:]:
            sums = [
                math.fsum(values) for values in zip(*((c.unsteered, c.steered, c.change) for c in rest), strict=True)
            ]
            rows.append((f"{len(rest)} more", *(f"{value:+.3f}" for value in sums)))
        total = (f"{self.unsteered:+.3f}", f"{self.steered:+.3f}", f"{self.total:+.3f}")
        return [("component", "unsteered", "steered", "change"), *rows, ("sum", *total)]

    def __repr__(self) -> str:
        cells = self._cells(_SHOWN)
        widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
        lines = [
            "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
        return "\n".join([f"LogitAttribution: {self._head()}", *lines, _CHANGE, self.verdict()])

    def _repr_html_(self) -> str:
        head, *rows = self._cells(_SHOWN)
        top = "".join(f"<th>{cell}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return (
            f"<p><b>LogitAttribution</b>: {html.escape(self._head())}</p><table><tr>{top}</tr>{body}</table>"
            f"<p>{html.escape(_CHANGE)}<br>{html.escape(self.verdict())}</p>"
        )


def logit_attribution(
    model: Any,
    text: str | tuple[str, str],
    plan: SteeringPlan,
    *,
    answer: str | int,
    versus: str | int | None = None,
    position: int = -1,
    by: str = "component",
) -> LogitAttribution:
    """Attribute a logit, or the difference of two, to the parts of the residual stream: steered, unsteered, change.

    Two forward passes. A delta at *this* position is a component of its own; what deltas at earlier positions do
    arrives through attention, and is part of ``downstream``. Give ``versus`` where you can: a logit by itself has no
    fixed zero, because a constant on all logits changes nothing. ``change`` is not ``steered - unsteered`` row by row,
    see :class:`LogitAttribution`.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        text: a prompt, or (prompt, response); the plan's scope sees them as such.
        plan: what steers the model.
        answer: the token whose logit is attributed: an id, or a text that is one token.
        versus: the token whose logit is subtracted.
        position: whose next token is meant, counted over prompt and response; -1 is the last.
        by: "component": one row per attention and MLP; "head": one row per attention head, and its output bias. Where a
            norm comes after the attention (Gemma 2) its scale in this run is held fixed.

    Raises:
        PromptError: a token's text is not one token, or there is no such position.
        ModelError: the model's blocks are not sums of these parts, or a plan is attached to it.
        PlanError: the plan does not fit the model.
        ConfigError: ``by`` is neither of the two, or ``versus`` is the answer.

    >>> model = sims.load("embedded")  # doctest: +SKIP
    >>> sims.logit_attribution(model, "How was it?", run.plan, answer=" great", versus=" bad")  # doctest: +SKIP
    """
    check_unsteered(model)
    adapter = adapt(model)
    tokens = [_token_id(adapter, answer, "answer")] + (
        [_token_id(adapter, versus, "versus")] if versus is not None else []
    )
    if len(set(tokens)) < len(tokens):
        raise ConfigError(f"answer and versus are both {quote(_token_text(adapter, tokens[0]))}; give another versus")
    ids, boundary = _encoded(adapter, text)
    at = _checked_position(position, len(ids))
    runs = [_decompose(adapter, ids, boundary, at, wanted, by) for wanted in (resolve(model, plan), NOTHING)]
    readout = _Readout(adapter, tokens)
    for run in runs:
        readout.check(run)
    steered, unsteered = runs
    shares = [dict(zip(run.components, (run.parts @ readout.direction).tolist(), strict=True)) for run in runs]
    inverse = 1 / steered.scale, 1 / unsteered.scale
    order = {**dict.fromkeys(steered.components), **dict.fromkeys(unsteered.components)}
    rows = [
        Contribution(
            component,
            steered=(mine := shares[0].get(component, 0.0)) * inverse[0],
            unsteered=(base := shares[1].get(component, 0.0)) * inverse[1],
            change=(mine - base) * sum(inverse) / 2,
        )
        for component in order
    ]
    both = math.fsum(value for share in shares for value in share.values())
    rows.append(Contribution(Component("final_norm"), 0.0, 0.0, both / 2 * (inverse[0] - inverse[1])))
    rows.append(Contribution(Component("bias"), readout.bias, readout.bias, 0.0))
    logits = [readout.logit(run.logits) for run in runs]
    if readout.cap > 0:
        cut = [
            found - math.fsum(getattr(row, name) for row in rows)
            for found, name in zip(logits, ("steered", "unsteered"), strict=True)
        ]
        rows.append(Contribution(Component("soft_cap"), cut[0], cut[1], cut[0] - cut[1]))
    return LogitAttribution(
        contributions=tuple(rows),
        answer=_token_text(adapter, tokens[0]),
        versus=_token_text(adapter, tokens[1]) if versus is not None else "",
        token=_token_text(adapter, ids[at]),
        position=at,
        steered=logits[0],
        unsteered=logits[1],
        residual_error=max(run.error for run in runs),
    )


def residual_components(
    model: Any, text: str | tuple[str, str], plan: SteeringPlan = NOTHING, *, position: int = -1, by: str = "component"
) -> ResidualComponents:
    """The residual stream after the last block as the sum of what wrote it, steering deltas included.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        text: a prompt, or (prompt, response).
        plan: what steers the model; nothing by default.
        position: counted over prompt and response; -1 is the last.
        by: "component" or "head", see :func:`logit_attribution`.

    Raises:
        PromptError: there is no such position.
        ModelError: the stream is not the sum of these parts, or a plan is attached to the model.
        PlanError: the plan does not fit the model.
        ConfigError: ``by`` is neither of the two.
    """
    check_unsteered(model)
    adapter = adapt(model)
    ids, boundary = _encoded(adapter, text)
    return _decompose(adapter, ids, boundary, _checked_position(position, len(ids)), resolve(model, plan), by)


def _decompose(
    adapter: Adapter, ids: Sequence[int], boundary: int, position: int, plan: SteeringPlan, by: str
) -> ResidualComponents:
    if by not in get_args(Parts):
        raise ConfigError(f"by must be 'component' or 'head', got {by!r}")
    model, column = adapter.model, position - len(ids)
    tokens = torch.tensor([list(ids)], device=adapter.device)
    with torch.no_grad(), steering(model, plan) as steered, steered.prompt(boundary):
        points = model.hook_dict
        with _reading(points, _wanted(adapter, points, by), column) as seen:
            logits = adapter.logits(tokens, torch.ones_like(tokens, dtype=torch.bool), keep=-column)[0, 0]
        terms = dict(_terms(adapter, seen, by))
    parts = torch.stack(list(terms.values()))
    norm = seen.get("ln_final.hook_scale")
    found = ResidualComponents(
        components=tuple(terms),
        parts=parts,
        residual=seen[hook_name(adapter.n_layers - 1, "resid_post")],
        scale=1.0 if norm is None else float(norm),
        logits=logits.double().cpu(),
    )
    if not found.error < _tolerance(adapter):
        remedy = "use by='component'" if by == "head" else "its blocks can't be taken apart like this"
        raise ModelError(
            f"the parts of {adapter.name} miss its residual stream by {found.error:.2g} of its norm; {remedy}"
        )
    return found


def _wanted(adapter: Adapter, points: Mapping[str, Any], by: str) -> list[str]:
    """The hook points that a decomposition reads: those that are needed, and those of the rest that there are."""
    names = [hook_name(layer, site) for layer in range(adapter.n_layers) for site in ("attn_out", "mlp_out")]
    names += [hook_name(0, "resid_pre"), hook_name(adapter.n_layers - 1, "resid_post")]
    if by == "head":
        names += [f"blocks.{layer}.attn.hook_z" for layer in range(adapter.n_layers)]
    if missing := [name for name in names if name not in points]:
        raise ModelError(f"{adapter.name} has no hook point {missing[0]}, so its stream can't be taken apart like this")
    optional = ["hook_embed", "hook_pos_embed", "ln_final.hook_scale"]
    optional += [f"blocks.{layer}.ln1_post.hook_scale" for layer in range(adapter.n_layers)]
    optional += [name for name in points if ".steer_" in name]
    return names + [name for name in optional if name in points]


@contextmanager
def _reading(points: Mapping[str, Any], names: Sequence[str], column: int) -> Iterator[dict[str, Tensor]]:
    """What passes through hook points at one column, counted from the right: filled while the block is open."""
    seen: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:

            def hook(point: Any, _args: Any, output: Tensor, name: str = name) -> None:
                conversion = getattr(point, "hook_conversion", None)
                value = output if conversion is None or name.endswith("hook_z") else conversion.convert(output)
                seen[name] = value[0, column].double().cpu()

            handles.append(points[name].register_forward_hook(hook))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _terms(adapter: Adapter, seen: Mapping[str, Tensor], by: str) -> Iterator[tuple[Component, Tensor]]:
    """Each component with what it wrote, in the order of the forward pass."""
    embed, start = seen.get("hook_embed"), _written(seen, 0, "resid_pre")
    learned = seen.get("hook_pos_embed")
    together = None if embed is None else (embed if learned is None else embed + learned)
    if embed is None or together is None or not _close(together, start, _tolerance(adapter)):
        yield Component("embed"), start  # the model does more to its embeddings than to add positions
    else:
        yield Component("embed"), embed
        if learned is not None:
            yield Component("pos_embed"), learned
    for layer in range(adapter.n_layers):
        yield from _deltas(seen, layer, "resid_pre")
        if by == "head":
            yield from _heads(adapter, seen, layer)
        else:
            yield Component("attn", layer), _written(seen, layer, "attn_out")
        yield from _deltas(seen, layer, "attn_out")
        yield Component("mlp", layer), _written(seen, layer, "mlp_out")
        yield from _deltas(seen, layer, "mlp_out")
        yield from _deltas(seen, layer, "resid_post")


def _written(seen: Mapping[str, Tensor], layer: int, site: str) -> Tensor:
    """What the model itself has at a site, before anything steers there."""
    before = seen.get(f"blocks.{layer}.{steer_name(site)}.hook_pre")
    return seen[hook_name(layer, site)] if before is None else before


def _deltas(seen: Mapping[str, Tensor], layer: int, site: str) -> Iterator[tuple[Component, Tensor]]:
    """The steering deltas at a site, as one: nested plans each have hook points of their own."""
    assert site in SITES
    found: list[Tensor] = []
    while (delta := seen.get(f"blocks.{layer}.{steer_name(site, len(found) + 1)}.hook_delta")) is not None:
        found.append(delta)
    if found:
        yield Component("steer", layer, site=site), torch.stack(found).sum(0)


def _heads(adapter: Adapter, seen: Mapping[str, Tensor], layer: int) -> Iterator[tuple[Component, Tensor]]:
    """What each head writes, and the bias of the attention's output, through a norm that may come after it."""
    block = adapter.block(layer)
    weight = adapter.floats(f"W_O of block {layer}", block.attn.W_O).double().cpu()  # type: ignore[union-attr,arg-type]
    bias = getattr(block.attn, "b_O", None)
    written = torch.einsum("hd,hdm->hm", seen[f"blocks.{layer}.attn.hook_z"].reshape(weight.shape[:2]), weight)
    factor = torch.ones(adapter.d_model, dtype=torch.float64)
    scale = seen.get(f"blocks.{layer}.ln1_post.hook_scale")
    if scale is not None:
        factor = _gain(adapter, block.ln1_post) / scale
    for head, value in enumerate(written):
        yield Component("head", layer, head), value * factor
    if bias is not None and bool(bias.any()):
        yield Component("attn_bias", layer), bias.detach().double().cpu() * factor


class _Readout:
    """How the stream after the last block becomes the logit (difference) of tokens, once the norm's scale is known.

    Args:
        adapter: of the model.
        tokens: the answer, and the token that is subtracted if there is one.
    """

    def __init__(self, adapter: Adapter, tokens: Sequence[int]) -> None:
        model = adapter.model
        self.name, self.tokens, self.tolerance = adapter.name, list(tokens), _tolerance(adapter)
        self.cap = float(getattr(adapter.cfg, "output_logits_soft_cap", None) or 0.0)
        normed = adapter.cfg.normalization_type is not None
        unembedding = adapter.floats("W_U", model.W_U)[:, self.tokens].double().cpu()
        each = unembedding * (_gain(adapter, model.ln_final) if normed else torch.ones(1)).reshape(-1, 1)
        if _is_layernorm(adapter):
            each = each - each.mean(0)
        constant = getattr(model, "b_U", None)
        biases = (
            torch.zeros(len(tokens)).double() if constant is None else constant.detach()[self.tokens].double().cpu()
        )
        shift = getattr(model.ln_final, "b", None) if normed and _is_layernorm(adapter) else None
        if isinstance(shift, Tensor):
            biases = biases + shift.detach().double().cpu() @ unembedding
        self._each, self._biases = each, biases
        self._signs = torch.tensor([1.0, -1.0][: len(tokens)]).double()
        self.direction: Tensor = each @ self._signs
        self.bias = float(biases @ self._signs)

    def logit(self, logits: Float[Tensor, " d_vocab"]) -> float:
        """The logit (difference) that the model gives."""
        return float(logits[self.tokens] @ self._signs)

    def check(self, run: ResidualComponents) -> None:
        """Raise :class:`ModelError` unless the stream read out like this gives the model's logits."""
        found = run.residual @ self._each / run.scale + self._biases
        if self.cap > 0:
            found = self.cap * torch.tanh(found / self.cap)
        wanted = run.logits[self.tokens]
        if not bool(((found - wanted).abs() <= self.tolerance * (1 + run.logits.abs().max())).all()):
            raise ModelError(
                f"the stream of {self.name} through its final norm and unembedding gives logits {found.tolist()}, the "
                f"model {wanted.tolist()}: its readout is of a kind that can't be attributed"
            )


def _gain(adapter: Adapter, norm: Any) -> Float[Tensor, " d_model"]:
    """What a norm multiplies by after dividing; ones where it is folded into the weights."""
    weight = getattr(norm, "w", None)
    if not isinstance(weight, Tensor):
        return torch.ones(adapter.d_model, dtype=torch.float64)
    gain: Tensor = weight.detach().double().cpu()
    if adapter.kind == "TransformerBridge" and getattr(adapter.cfg, "rmsnorm_uses_offset", False):
        gain = 1 + gain
    return gain


def _is_layernorm(adapter: Adapter) -> bool:
    return str(adapter.cfg.normalization_type).startswith("LN")


def _tolerance(adapter: Adapter) -> float:
    """Relative error that rounding explains: the stream is a sum of some hundred terms in the model's dtype."""
    return max(1e-4, 8 * float(torch.finfo(adapter.dtype).eps))


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


def _encoded(adapter: Adapter, text: str | tuple[str, str]) -> tuple[list[int], int]:
    """Token ids, and how many of them are the prompt's."""
    if not (isinstance(text, str) or (isinstance(text, tuple) and [isinstance(t, str) for t in text] == [True, True])):
        raise PromptError(f"a text is a prompt or (prompt, response), got {shown(text)}")
    prompt, response = (text, "") if isinstance(text, str) else text
    ids = adapter.encode(prompt)
    whole = ids + (adapter.encode_response(response) if response else [])
    if len(whole) > adapter.n_ctx:
        raise PromptError(f"the text has {len(whole)} tokens, the context {adapter.n_ctx}: shorten {shown(text)}")
    return whole, len(ids)


def _checked_position(position: int, length: int) -> int:
    if type(position) is not int or not -length <= position < length:
        raise PromptError(f"position {position!r} is not in {-length}..{length - 1}: the text has {length} tokens")
    return position % length


def _token_id(adapter: Adapter, token: str | int, what: str) -> int:
    if isinstance(token, str):
        ids = adapter.encode_response(token)
        if len(ids) > 1:
            pieces = ", ".join(quote(adapter.decode([i])) for i in ids[:6])
            raise PromptError(f"{what} {quote(token)} is {len(ids)} tokens ({pieces}); give one of them, or its id")
        return ids[0]
    size = int(adapter.cfg.d_vocab)
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
        raise PromptError(f"{what} must be a text of one token or an id in 0..{size - 1}, got {token!r}")
    return token


def _token_text(adapter: Adapter, token: int) -> str:
    return str(adapter.tokenizer.decode([token]))


__all__ = [
    "Component",
    "Contribution",
    "LogitAttribution",
    "ResidualComponents",
    "logit_attribution",
    "residual_components",
]
