"""How long the directions are, and how the stream lies along them, beside the residual stream's own size.

The stream is read once, block by block and batch by batch. Of each token only its norm is kept, and of each text its
mean projection on each direction, so that no activation outlives its batch.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sims_lens.activations import Row, listening
from sims_lens.adapter import Adapter, adapt, left_pad
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.errors import ConfigError, PlanError, PromptError
from sims_lens.estimators import unit
from sims_lens.hooks import check_unsteered
from sims_lens.plan import SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import everyday, quote
from sims_lens.run import Run
from sims_lens.scope import TRACKER, TokenScope, left_padded_regions
from sims_lens.sites import check_layer
from sims_lens.stats import Interval, bootstrap_mean
from sims_lens.supervised import SteeringFit
from sims_lens.transforms import Addition

if TYPE_CHECKING:
    import pandas as pd

StreamText: TypeAlias = str | tuple[str, str]
"""A prompt alone, or a prompt and a response to it."""

_EVERYDAY = 16
_UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class ResidualNorm:
    """How large the residual stream is at a site; norms in its own units.

    Args:
        site: where in the block.
        layer: of which block.
        mean: of the norms of the tokens in scope, first position left out.
        median: of the same.
        first_position: median norm at the first position of the texts, in scope or not. Massive activations there make
            it a hundred times the others in many models.
    """

    site: str
    layer: int
    mean: float
    median: float
    first_position: float


@dataclass(frozen=True)
class DirectionNorm:
    """A direction of one layer: its length, and the stream along it.

    Args:
        name: of the direction.
        iteration: of a run, counted from 1; 0 where there is none.
        site: where in the block.
        layer: of which block.
        norm: of the vector, in units of the residual stream; NaN where there is only a unit direction, that of a
            transform other than an addition.
        projection: of the tokens in scope on the *unit* direction, in units of the residual stream: the mean over
            prompts of the mean over a prompt's texts, with its 95% interval over prompts; its ends are NaN where there
            is one prompt.
        projection_sd: standard deviation of the projections over tokens.
        gap: of a run's held-out responses, the projection of a prompt's best response less that of its worst one, with
            its 95% interval over prompts, likewise; NaN where responses have no scores.
    """

    name: str
    iteration: int
    site: str
    layer: int
    norm: float
    projection: Interval
    projection_sd: float
    gap: Interval


@dataclass(frozen=True)
class VectorNorms:
    """Lengths of directions beside the residual stream's; made by :func:`vector_norms`.

    Args:
        model: its name.
        scope: which tokens were read.
        texts: how many.
        tokens: how many of them, over all texts, first positions left out.
        residual: the stream at every site and layer that has a direction.
        directions: in the order given, by layer.
    """

    model: str
    scope: str
    texts: int
    tokens: int
    residual: tuple[ResidualNorm, ...] = field(repr=False)
    directions: tuple[DirectionNorm, ...] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the directions, each once."""
        return tuple(dict.fromkeys(d.name for d in self.directions))

    def of(self, name: str) -> tuple[DirectionNorm, ...]:
        """The directions of a name, by layer.

        Raises:
            PlanError: there are none.
        """
        found = tuple(d for d in self.directions if d.name == name)
        if not found:
            raise PlanError(f"there is no direction {name!r}; there are {', '.join(map(repr, self.names))}")
        return found

    def stream(self, site: str, layer: int) -> ResidualNorm:
        """The residual stream at a site.

        Raises:
            PlanError: no direction lies there, so that it was not measured.
        """
        for found in self.residual:
            if (found.site, found.layer) == (site, layer):
                return found
        raise PlanError(f"the stream was not measured at {site} of layer {layer}: no direction lies there")

    def table(self) -> "pd.DataFrame":
        """One row per direction and layer.

        ``relative_to_median`` and ``relative_to_mean`` are the norm over that of the stream; ``projection_relative``
        and ``sd_relative`` the mean projection and its spread over the stream's median norm; ``norm_in_sd`` and
        ``gap_in_sd`` count in standard deviations of the projections.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for d in self.directions:
            stream = self.stream(d.site, d.layer)
            row: dict[str, Any] = {
                "name": d.name,
                "iteration": d.iteration,
                "site": d.site,
                "layer": d.layer,
                "norm": d.norm,
                "relative_to_median": _over(d.norm, stream.median),
                "relative_to_mean": _over(d.norm, stream.mean),
                "residual_median": stream.median,
                "residual_mean": stream.mean,
                "first_position": stream.first_position,
            }
            for name, interval in (("projection", d.projection), ("gap", d.gap)):
                row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
            rows.append(
                row
                | {
                    "projection_sd": d.projection_sd,
                    "projection_relative": _over(d.projection.estimate, stream.median),
                    "sd_relative": _over(d.projection_sd, stream.median),
                    "norm_in_sd": _over(d.norm, d.projection_sd),
                    "gap_in_sd": _over(d.gap.estimate, d.projection_sd),
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        head, *rows = self._cells()
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        lines = [
            "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in (head, *rows)
        ]
        return "\n".join([self._head(), *lines])

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<p>{html.escape(self._head())}</p><table><tr>{top}</tr>{body}</table>"

    def _head(self) -> str:
        read = f"{counted(self.texts, 'text')}, {counted(self.tokens, 'token')} of scope {self.scope}"
        return f"VectorNorms on {self.model}: {read}, first position left out; see .table() for every layer"

    def _cells(self) -> list[tuple[str, ...]]:
        """For each name the layer where it is largest beside the stream."""
        cells: list[tuple[str, ...]] = [
            (
                "largest beside the stream",
                "layer",
                "norm",
                "x median",
                "x first position",
                "projection [95%]",
                "token sd",
            )
        ]
        for name in self.names:
            # A unit direction has no length to be large by: its first layer stands for it.
            found = [d for d in self.of(name) if not math.isnan(d.norm)] or self.of(name)[:1]
            d = max(found, key=lambda d: _over(d.norm, self.stream(d.site, d.layer).median))
            stream = self.stream(d.site, d.layer)
            p = d.projection
            ends = "one prompt" if math.isnan(p.low) else f"{p.low:+.3g}, {p.high:+.3g}"
            bare = math.isnan(d.norm)
            cells.append(
                (
                    name,
                    str(d.layer),
                    "unit direction" if bare else f"{d.norm:.3g}",
                    "-" if bare else f"{_over(d.norm, stream.median):.3f}",
                    "-" if bare else f"{_over(d.norm, stream.first_position):.2g}",
                    f"{p.estimate:+.3g} [{ends}]",
                    f"{d.projection_sd:.3g}",
                )
            )
        return cells


def vector_norms(
    model: Any,
    source: Any,
    *,
    texts: Sequence[StreamText] | None = None,
    scope: TokenScope | str | None = None,
    seed: int = 0,
    batch_rows: int = 32,
    progress: bool = True,
) -> VectorNorms:
    """Norms of directions, absolute and beside the residual stream's, and the stream's projection on them.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        source: anything that :func:`~sims_lens.analysis.directions.directions_of` takes. Where it is a transform other
            than an addition, its unit direction has a projection and no norm.
        texts: on which the stream is read: (prompt, response) pairs, or prompts alone. By default the held-out
            responses of the unsteered model where ``source`` is a run (or holds one), else the packaged everyday
            prompts.
        scope: which tokens; by default the response, or of prompts alone all tokens. The first position of a text is
            left out of every figure but its own.
        seed: of the bootstrap.
        batch_rows: texts in one forward pass.
        progress: show a progress bar.

    Returns:
        A figure for each direction and layer. Memory grows by one number per token and layer.

    Raises:
        PlanError: the source has no directions, or they don't fit the model.
        PromptError: there are no texts, one is empty or longer than the context, or no token but first ones is in
            scope.
        ConfigError: ``batch_rows`` is no number of texts.
        ModelError: a plan is attached to the model.
    """
    check_unsteered(model)
    if type(batch_rows) is not int or batch_rows < 1:
        raise ConfigError(f"batch_rows must be an integer of at least 1, got {batch_rows!r}")
    directions, bare = directions_of(source), _bare(source)
    adapter = adapt(model)
    check_fit(directions, adapter)
    run = held_by(source)
    scores: list[float | None] | None = None
    if texts is None and run is not None:
        samples = [s for s in run.samples(0) if s.tokens]
        encoded = {s.prompt: adapter.encode(run.prompts[s.prompt]) for s in samples}
        rows: list[Row] = [(encoded[s.prompt], s.tokens) for s in samples]
        groups: list[Any] = [s.prompt for s in samples]
        scores = [s.score for s in samples]
    else:
        rows, groups = encode_texts(adapter, texts)
    chosen = scope_for(rows, scope)
    residual: list[ResidualNorm] = []
    measured: dict[tuple[int, int], tuple[Tensor, float]] = {}
    tokens = 0
    sites = tuple(dict.fromkeys(d.site for d in directions))
    with Progress(len(rows) * len(sites), show=progress) as bar:
        bar.phase("reading the stream")
        for site in sites:
            here = [k for k, d in enumerate(directions) if d.site == site]
            axes = {
                layer: [(k, unit(directions[k].at(layer).float())) for k in here if layer in directions[k].layers]
                for layer in sorted({layer for k in here for layer in directions[k].layers})
            }
            reader = _Reader(axes, len(rows))
            read_stream(model, rows, reader.read, site=site, scope=chosen, batch_rows=batch_rows, advance=bar.advance)
            tokens = reader.tokens
            if not tokens:
                raise PromptError(
                    f"no token of the {counted(len(rows), 'text')} is in scope {chosen.name!r} after the first one"
                )
            residual += [reader.norm(site, layer) for layer in axes]
            measured |= {(k, layer): reader.along(layer, at) for layer in axes for at, (k, _) in enumerate(axes[layer])}
    found = []
    for k, d in enumerate(directions):
        for layer, vector in zip(d.layers, d.vectors, strict=True):
            means, sd = measured[k, layer]
            found.append(
                DirectionNorm(
                    name=d.name,
                    iteration=d.iteration,
                    site=d.site,
                    layer=layer,
                    norm=math.nan if layer in bare[k] else float(vector.double().norm()),
                    projection=_over_prompts(means, groups, seed),
                    projection_sd=sd,
                    gap=_gap(means, groups, scores, seed),
                )
            )
    return VectorNorms(
        model=adapter.name,
        scope=chosen.name,
        texts=len(rows),
        tokens=tokens,
        residual=tuple(residual),
        directions=tuple(found),
    )


@dataclass(frozen=True, eq=False)
class SeenBatch:
    """What a batch's streams are of, in :func:`read_stream`.

    Args:
        rows: index of each row.
        wanted: tokens in scope, first position left out.
        first: the first position of each row.
    """

    rows: list[int]
    wanted: Bool[Tensor, "batch pos"]
    first: Bool[Tensor, "batch pos"]


def read_stream(
    model: Any,
    rows: Sequence[Row],
    read: Callable[[int, Float[Tensor, "batch pos d_model"], SeenBatch], None],
    *,
    site: str = "resid_post",
    scope: TokenScope | str = "all",
    batch_rows: int = 32,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Run rows through the model as it is now and hand each block's stream to ``read(layer, stream, batch)``.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        rows: token ids of prompts and responses. Those of about a length are run together.
        read: called in a hook, with a float32 stream that it must not change.
        site: where in every block.
        scope: which tokens are ``wanted``.
        batch_rows: rows in one forward pass.
        advance: called with the number of rows after each pass.
    """
    adapter, scope = adapt(model), TokenScope.of(scope)
    sizes = [len(prompt) + len(response) for prompt, response in rows]
    order = sorted(range(len(rows)), key=sizes.__getitem__)
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        tokens, mask = left_pad([[*rows[i][0], *rows[i][1]] for i in batch], adapter.device)
        width = tokens.shape[1]
        lengths = [sizes[i] for i in batch]
        first = torch.arange(width)[None] == (width - torch.tensor(lengths))[:, None]
        wanted = scope.mask(left_padded_regions([len(rows[i][0]) for i in batch], lengths, width)) & ~first
        seen = SeenBatch(batch, wanted.to(adapter.device), first.to(adapter.device))

        def at(layer: int, stream: Tensor, seen: SeenBatch = seen) -> None:
            read(layer, stream.float(), seen)

        tracker = model.__dict__.get(TRACKER)  # a plan that is attached must know where the prompts end
        boundary = [width - len(rows[i][1]) for i in batch]
        declared = tracker.prompt(boundary) if tracker is not None else nullcontext()
        with torch.inference_mode(), listening(adapter, site, at), declared:
            adapter.logits(tokens, mask, keep=1)
        if advance is not None:
            advance(len(batch))


class _Reader:
    """Norms of the stream and projections on axes by layer, one batch at a time."""

    def __init__(self, axes: Mapping[int, Sequence[tuple[int, Tensor]]], rows: int) -> None:
        self.axes = {layer: torch.stack([axis for _, axis in found]) for layer, found in axes.items()}
        self.norms: dict[int, list[Tensor]] = {layer: [] for layer in axes}
        self.first: dict[int, list[Tensor]] = {layer: [] for layer in axes}
        self.means = {layer: torch.full((rows, len(found)), torch.nan) for layer, found in axes.items()}
        self.sums = {layer: torch.zeros(2, len(found), dtype=torch.float64) for layer, found in axes.items()}
        self.origin: dict[int, Tensor] = {}

    def read(self, layer: int, stream: Float[Tensor, "batch pos d_model"], seen: SeenBatch) -> None:
        if layer not in self.axes:
            return
        norms = stream.norm(dim=-1)
        self.norms[layer].append(norms[seen.wanted].cpu())
        self.first[layer].append(norms[seen.first].cpu())
        along = (stream @ self.axes[layer].to(stream.device).T).double().cpu()
        wanted = seen.wanted.cpu()
        counts = wanted.sum(-1, keepdim=True)
        total = torch.where(wanted[..., None], along, 0.0).sum(1)
        self.means[layer][seen.rows] = torch.where(counts > 0, total / counts, torch.nan).float()
        tokens = along[wanted]
        if len(tokens):
            # About the first token's projection, so that the sum of squares loses no digits to a large mean.
            beyond = tokens - self.origin.setdefault(layer, tokens[0].clone())
            self.sums[layer] += torch.stack([beyond.sum(0), beyond.square().sum(0)])

    @property
    def tokens(self) -> int:
        return sum(len(norms) for norms in next(iter(self.norms.values())))

    def norm(self, site: str, layer: int) -> ResidualNorm:
        norms, first = torch.cat(self.norms[layer]).double(), torch.cat(self.first[layer]).double()
        return ResidualNorm(site, layer, float(norms.mean()), float(norms.median()), float(first.median()))

    def along(self, layer: int, at: int) -> tuple[Float[Tensor, " row"], float]:
        """Mean projection of each row on an axis, and the standard deviation over all tokens."""
        total, squares = (self.sums[layer][:, at] / self.tokens).tolist()
        return self.means[layer][:, at], math.sqrt(max(0.0, squares - total**2))


def check_fit(directions: Sequence[Directions], adapter: Adapter) -> None:
    """Raise :class:`PlanError` unless the model has the directions' layers and width."""
    for d in directions:
        for layer in d.layers:
            check_layer(layer, adapter.n_layers, adapter.name)
        if d.vectors.shape[1] != adapter.d_model:
            raise PlanError(f"{d.name} has d_model {d.vectors.shape[1]}, {adapter.name} has {adapter.d_model}")


def _bare(source: Any) -> list[set[int]]:
    """For each of :func:`directions_of` a source, the layers where there is only a unit direction."""
    if isinstance(source, SteeringFit):
        fitted = zip(source.layers, source.transforms, strict=True)
        return [{layer for layer, transform in fitted if not isinstance(transform, Addition)}]
    if isinstance(source, SteeringPlan):
        found: dict[str, set[int]] = {}
        for i in source.interventions:
            found.setdefault(i.site, set()).update(() if isinstance(i.transform, Addition) else (i.layer,))
        return list(found.values())
    if isinstance(source, Mapping) and all(isinstance(key, str) for key in source):
        return [layers for value in source.values() for layers in _bare(value)]
    return [set() for _ in directions_of(source)]


def counted(count: int, what: str) -> str:
    """A number of things, in words.

    >>> counted(1, "text"), counted(2, "text")
    ('1 text', '2 texts')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def held_by(source: Any) -> Run | None:
    """The run that a source is, or the first of those that it holds by name."""
    if isinstance(source, Mapping):
        return next((found for value in source.values() if (found := held_by(value)) is not None), None)
    return source if isinstance(source, Run) else None


def encode_texts(adapter: Adapter, texts: Sequence[StreamText] | None) -> tuple[list[Row], list[str]]:
    """Token ids of texts, and the prompt of each; of the packaged everyday prompts where None.

    Raises:
        PromptError: there are none, one is no text or no pair of texts, empty, or longer than the context.
    """
    texts = everyday(_EVERYDAY) if texts is None else texts
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence) or not len(texts):
        raise PromptError(f"texts must be a list of prompts or of (prompt, response) pairs, got {quote(repr(texts))}")
    rows: list[Row] = []
    groups = []
    for index, text in enumerate(texts):
        parts = (text,) if isinstance(text, str) or not isinstance(text, (tuple, list)) else tuple(text)
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
            raise PromptError(f"text {index} is {quote(repr(text))}; give a prompt, or (prompt, response)")
        if not any(part.strip() for part in parts):
            raise PromptError(f"text {index} is empty: {text!r}; leave it out")
        row = (adapter.encode(parts[0]), adapter.encode_response(parts[1]) if len(parts) == 2 else [])
        if len(row[0]) + len(row[1]) > adapter.n_ctx:
            raise PromptError(f"text {index} has {len(row[0]) + len(row[1])} tokens, the context {adapter.n_ctx}")
        rows.append(row)
        groups.append(parts[0])
    return rows, groups


def scope_for(rows: Sequence[Row], scope: TokenScope | str | None) -> TokenScope:
    """The scope asked for; by default the response where every row has one, else everything."""
    if scope is not None:
        return TokenScope.of(scope)
    return TokenScope.of("response" if all(len(response) for _, response in rows) else "all")


def _over(value: float, unit: float) -> float:
    return value / unit if unit else math.nan


def _over_prompts(means: Float[Tensor, " row"], groups: Sequence[Any], seed: int) -> Interval:
    of: dict[Any, list[float]] = {}
    for group, value in zip(groups, means.tolist(), strict=True):
        if not math.isnan(value):
            of.setdefault(group, []).append(value)
    return _interval([float(np.mean(values)) for values in of.values()], seed)


def _interval(values: Sequence[float], seed: int) -> Interval:
    """Mean over prompts; of one prompt, how another would differ is not known."""
    if len(values) == 1:
        return Interval(values[0], math.nan, math.nan)
    return bootstrap_mean(np.array(values), seed=seed)


def _gap(
    means: Float[Tensor, " row"], groups: Sequence[Any], scores: Sequence[float | None] | None, seed: int
) -> Interval:
    """Mean over prompts of the best text's projection less the worst's; prompts whose texts score alike left out."""
    if scores is None:
        return _UNKNOWN
    of: dict[Any, list[tuple[float, float]]] = {}
    for group, value, score in zip(groups, means.tolist(), scores, strict=True):
        if score is not None and not math.isnan(value):
            of.setdefault(group, []).append((score, value))
    gaps = []
    for found in of.values():
        worst, best = min(found, key=lambda pair: pair[0]), max(found, key=lambda pair: pair[0])
        if best[0] > worst[0]:
            gaps.append(best[1] - worst[1])
    return _interval(gaps, seed) if gaps else _UNKNOWN


__all__ = ["DirectionNorm", "ResidualNorm", "VectorNorms", "vector_norms"]
