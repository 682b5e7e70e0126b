"""Figures of a run: what it gained, what that cost, and what the directions look like.

No free text (prompts, responses, names of models and rankers) enters a figure: Plotly reads some HTML in labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from sims_lens.checks import shown
from sims_lens.errors import RunError
from sims_lens.estimators import unit
from sims_lens.evaluate import Evaluation
from sims_lens.plots.theme import BAND, BLUE, DIVERGING, EDGE, HEIGHT, TEXT, check_result, colours, error_bars, titled
from sims_lens.run import Iteration, Run
from sims_lens.stats import Interval, null_band


def win_rate(run: Run) -> go.Figure:
    """How often a steered response scores higher than a base response, by iteration, with 95% intervals.

    The shuffled-label controls stand beside the last iteration, whose norm they share; in the band one more
    of them would lie with 95% probability (:func:`sims_lens.stats.null_band`).

    Raises:
        RunError: no iteration is finished.
    """
    check_result(run, Run)
    figure = _progress(
        run,
        lambda e: e.win_rate,
        title="Win rate against the base model",
        hover="win rate",
        number=".3f",
        reference=0.5,
        reference_text="no difference",
    )
    figure.update_yaxes(
        title_text="win rate (share of comparisons)", range=[-0.03, 1.03], tickvals=[0, 0.25, 0.5, 0.75, 1]
    )
    return figure


def effect(run: Run) -> go.Figure:
    """Mean score less that of the base model on the same prompts, by iteration, with 95% intervals.

    The band is what a vector of the same norm does that has learnt nothing: one more shuffled-label control would lie
    in it with 95% probability (:func:`sims_lens.stats.null_band`).

    Raises:
        RunError: no iteration is finished.
    """
    check_result(run, Run)
    figure = _progress(
        run,
        lambda e: e.difference,
        title="Change of the mean score against the base model",
        hover="difference",
        number="+.3g",
        reference=0.0,
        reference_text="base model",
    )
    figure.update_yaxes(title_text="paired difference (ranker's units)")
    return figure


def vector_norms(run: Run) -> go.Figure:
    """Norm of each iteration's mean difference at every layer, against the median norm of the residual stream.

    Raises:
        RunError: no iteration is finished.
    """
    check_result(run, Run)
    iterations = _finished(run)
    figure = titled(
        go.Figure(),
        "Size of the learnt directions, by layer",
        f"Mean difference of the pairs. {_steered_text(run)}",
        height=_height_with_legend(len(iterations)),
    )
    for iteration, colour in zip(iterations, colours(len(iterations)), strict=True):
        norms = iteration.vectors.float().norm(dim=-1)
        figure.add_scatter(
            x=list(range(len(norms))),
            y=_above_zero(norms),
            name=f"iteration {iteration.index}",
            mode="lines+markers",
            line={"color": colour},
            marker={"size": 4},
            hovertemplate=f"iteration {iteration.index}, layer %{{x}}<br>norm %{{y:.4g}}<extra></extra>",
        )
    median = iterations[0].tensors["median_norm"]
    figure.add_scatter(
        x=list(range(len(median))),
        y=_above_zero(median),
        name="residual stream (median)",
        mode="lines",
        line={"color": TEXT, "width": 3},
        hovertemplate="residual stream, layer %{x}<br>median norm %{y:.4g}<extra></extra>",
    )
    _mark_steered(figure, run)
    figure.update_xaxes(title_text="layer", range=[-0.5, len(median) - 0.5], dtick=_layer_step(len(median)))
    drawn = [value for curve in figure.data for value in curve.y if value is not None]
    figure.update_yaxes(
        title_text="norm (units of the residual stream)", type="log", tickvals=_log_ticks(drawn), tickformat="~g"
    )
    return figure


def layer_similarity(run: Run, iteration: int | None = None) -> go.Figure:
    """Cosine between the directions of every two layers, as fitted in one iteration.

    Args:
        run: a run with a finished iteration.
        iteration: counted from 1; None for the last.

    Raises:
        RunError: there is no such iteration.
    """
    check_result(run, Run)
    iterations = _finished(run)
    index = len(iterations) if iteration is None else iteration
    if type(index) is not int or not 1 <= index <= len(iterations):
        raise RunError(f"iteration {shown(index)} is not one of the finished ones, 1..{len(iterations)}")
    directions = unit(iterations[index - 1].vectors.float())
    cosines = (directions @ directions.T).clamp(-1, 1)
    layers = list(range(len(directions)))
    title = f"Do the layers share a direction? Iteration {index}"
    figure = titled(go.Figure(), title, _steered_text(run, mark=None), width=620, height=560)
    figure.add_heatmap(
        x=layers,
        y=layers,
        z=cosines.tolist(),
        zmin=-1,
        zmax=1,
        colorscale=DIVERGING,
        colorbar={
            "title": {"text": "cosine", "font": {"size": 13}},
            "tickvals": [-1, -0.5, 0, 0.5, 1],
            "thickness": 14,
            "outlinewidth": 0,
        },
        hovertemplate="layers %{x} and %{y}<br>cosine %{z:.3f}<extra></extra>",
    )
    edge = [-0.5, len(layers) - 0.5]
    step = _layer_step(len(layers))
    figure.update_xaxes(title_text="layer", range=edge, dtick=step, constrain="domain", showline=False)
    figure.update_yaxes(title_text="layer", range=edge, dtick=step, constrain="domain", showgrid=False, scaleanchor="x")
    figure.update_layout(margin={"b": 60})
    return figure


def iteration_similarity(run: Run) -> go.Figure:
    """Cosine at each layer between the first iteration's direction and each later one's.

    The dashed line is how well two halves of the first iteration's pairs agree: what to expect of two fits of one
    direction that differ by noise alone (each half has half of the pairs, so that it is a low estimate).

    Raises:
        RunError: no iteration is finished.
    """
    check_result(run, Run)
    iterations = _finished(run)
    figure = titled(
        go.Figure(),
        "Do later iterations find the same direction?",
        "Cosine with the direction of iteration 1; dashed: two halves of iteration 1's own pairs",
        height=_height_with_legend(len(iterations)),
    )
    first = unit(iterations[0].vectors.float())
    shades = colours(len(iterations))
    lowest = 0.0
    for iteration, colour in zip(iterations[1:], shades[1:], strict=True):
        cosines = (unit(iteration.vectors.float()) * first).sum(-1)
        lowest = min(lowest, float(cosines.min()))
        figure.add_scatter(
            x=list(range(len(cosines))),
            y=cosines.tolist(),
            name=f"iteration {iteration.index}",
            mode="lines+markers",
            line={"color": colour},
            marker={"size": 4},
            hovertemplate=f"iterations {iteration.index} and 1, layer %{{x}}<br>cosine %{{y:.3f}}<extra></extra>",
        )
    halves = [None if math.isnan(value) else value for value in iterations[0].tensors["split_half"].tolist()]
    figure.add_scatter(
        x=list(range(len(halves))),
        y=halves,
        name="halves of iteration 1",
        mode="lines",
        line={"color": TEXT, "width": 2.5, "dash": "dash"},
        hovertemplate="two halves of iteration 1, layer %{x}<br>cosine %{y:.3f}<extra></extra>",
    )
    lowest = min([lowest, *(value for value in halves if value is not None)])
    _mark_steered(figure, run)
    figure.update_xaxes(title_text="layer", range=[-0.5, len(halves) - 0.5], dtick=_layer_step(len(halves)))
    figure.update_yaxes(
        title_text="cosine", range=[min(0.0, lowest) - 0.05, 1.05], zeroline=True, zerolinecolor=TEXT, zerolinewidth=1
    )
    figure.update_layout(showlegend=True)
    return figure


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    value: Callable[[Evaluation], Interval]
    number: str = ".3g"


_PANELS = (
    _Panel("Negative log-likelihood", "nats per token", lambda e: e.nll),
    _Panel("KL from the base model", "nats per token", lambda e: e.kl),
    _Panel("Distinct word pairs", "share of all pairs", lambda e: e.distinct_2),
    _Panel("Repeated 4-grams", "share of a response", lambda e: e.repetition),
    _Panel("Length", "tokens", lambda e: e.length),
    _Panel("Ended with EOS", "share of responses", lambda e: e.ended),
)


def side_effects(run: Run) -> go.Figure:
    """What steering does to the text besides its score, by iteration, with 95% intervals; the base model dashed.

    Raises:
        RunError: no iteration is finished.
    """
    check_result(run, Run)
    iterations = _finished(run)
    figure = make_subplots(
        rows=2,
        cols=3,
        subplot_titles=[panel.title for panel in _PANELS],
        horizontal_spacing=0.14,
        vertical_spacing=0.2,
        shared_xaxes=True,
    )
    titled(figure, "Side effects of steering", "Held-out prompts, 95% intervals over prompts", height=HEIGHT + 120)
    x = [i.index for i in iterations]
    for k, panel in enumerate(_PANELS):
        row, col = divmod(k, 3)
        where = {"row": row + 1, "col": col + 1}
        intervals = [panel.value(i.evaluation) for i in iterations]
        figure.add_scatter(
            x=x,
            y=[i.estimate for i in intervals],
            error_y=error_bars(intervals, width=4),
            customdata=_ends(intervals),
            name="steered",
            showlegend=k == 0,
            mode="lines+markers",
            line={"color": BLUE},
            hovertemplate=_hover("iteration %{x}", panel.unit, panel.number),
            **where,
        )
        base = panel.value(run.base)
        edges = [0.6, x[-1] + 0.4]
        figure.add_scatter(
            x=edges,
            y=[base.estimate] * 2,
            customdata=_ends([base] * 2),
            name="base model",
            showlegend=k == 0,
            mode="lines",
            line={"color": TEXT, "dash": "dash"},
            hovertemplate=_hover("base model", panel.unit, panel.number),
            **where,
        )
        figure.update_xaxes(**_ticks(x), range=edges, showticklabels=True, **where)
        figure.update_yaxes(title_text=panel.unit, nticks=5, range=_room([*intervals, base]), **where)
    figure.update_xaxes(title_text="iteration", row=2)
    figure.update_layout(margin={"t": 112})
    figure.update_annotations(font={"size": 13})
    return figure


def _progress(
    run: Run,
    value: Callable[[Evaluation], Interval],
    *,
    title: str,
    hover: str,
    number: str,
    reference: float,
    reference_text: str,
) -> go.Figure:
    """A figure of one quantity by iteration, with the controls in a column of their own after the last."""
    iterations = _finished(run)
    intervals = [value(i.evaluation) for i in iterations]
    controls = [value(control) for control in run.controls]
    x = [i.index for i in iterations]
    band = null_band([c.estimate for c in controls])
    subtitle = f"{len(run.indices('heldout'))} held-out prompts, 95% intervals over prompts" + (
        "; in the band one more plan that learnt nothing would lie (95%)" if band else ""
    )
    if any(not i.kept for i in iterations):
        subtitle += "; hollow: rolled back"
    figure = titled(go.Figure(), title, subtitle)
    figure.add_scatter(
        x=x,
        y=[i.estimate for i in intervals],
        error_y=error_bars(intervals),
        customdata=_ends(intervals),
        name="steered",
        mode="lines+markers",
        line={"color": BLUE, "width": 2.5},
        marker={"size": 9, "symbol": ["circle" if i.kept else "circle-open" for i in iterations]},
        hovertemplate=_hover("iteration %{x}", hover, number),
    )
    start, end = x[0] - 0.5, x[-1] + 0.5
    ticks = _ticks(x)
    if controls:
        width = max(1.0, 0.12 * len(x))
        column = x[-1] + width
        end = column + 0.5 * width
        share = [k / max(1, len(controls) - 1) - 0.5 for k in range(len(controls))] if len(controls) > 1 else [0.0]
        figure.add_scatter(
            x=[column + 0.5 * width * s for s in share],
            y=[c.estimate for c in controls],
            error_y=error_bars(controls, width=3),
            customdata=[[*ends, k] for k, ends in enumerate(_ends(controls), start=1)],
            name="shuffled labels, same norm",
            mode="markers",
            marker={"color": TEXT, "size": 7, "symbol": "diamond"},
            hovertemplate=_hover("shuffled labels %{customdata[2]}", hover, number),
        )
        if band is not None:
            figure.add_shape(
                type="rect",
                x0=x[-1] - 0.4,
                x1=end,
                y0=band.low,
                y1=band.high,
                fillcolor=BAND,
                line={"color": EDGE, "width": 1},
                layer="below",
                name="null band",
            )
        ticks = {"tickvals": [*ticks["tickvals"], column], "ticktext": [*ticks["ticktext"], "shuffled<br>labels"]}
    figure.add_scatter(
        x=[start, end],
        y=[reference, reference],
        name=reference_text,
        mode="lines",
        line={"color": TEXT, "width": 1.5, "dash": "dot"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="iteration", range=[start, end], **ticks)
    return figure


def _finished(run: Run) -> tuple[Iteration, ...]:
    if not run.iterations:
        raise RunError(
            f"{run.path} has no finished iteration to draw; call improve(..., out={str(run.path)!r}) to go on"
        )
    return run.iterations


def _ends(intervals: Sequence[Interval]) -> list[list[float]]:
    return [[i.low, i.high] for i in intervals]


def _hover(head: str, what: str, number: str) -> str:
    ends = f"[%{{customdata[0]:{number}}}, %{{customdata[1]:{number}}}]"
    return f"{head}<br>{what} %{{y:{number}}} {ends}<extra></extra>"


def _ticks(x: Sequence[int]) -> dict[str, list[float] | list[str]]:
    """Ticks at iterations, the last one among them, at most about ten."""
    shown = x[:: -math.ceil(len(x) / 10)][::-1]
    return {"tickvals": [float(i) for i in shown], "ticktext": [str(i) for i in shown]}


def _room(intervals: Sequence[Interval]) -> list[float]:
    """An axis range that holds the intervals; one of some height where they are all a single value."""
    low, high = min(i.low for i in intervals), max(i.high for i in intervals)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return [low - pad, high + pad]


def _height_with_legend(entries: int) -> int:
    """The usual height, and more where a legend has many rows of three."""
    return HEIGHT + 20 * max(0, math.ceil(entries / 3) - 2)


def _layer_step(layers: int) -> int:
    """Layers between two ticks, so that there are at most about a dozen.

    >>> _layer_step(12), _layer_step(30), _layer_step(80)
    (1, 5, 10)
    """
    return next((step for step in (1, 2, 5, 10) if layers <= 12 * step), 20)


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Ticks at 1, 2 and 5 in each decade, or at the decades alone where there are many.

    >>> _log_ticks([3.0, 60.0])
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    """
    low, high = math.log10(min(values, default=1.0)), math.log10(max(values, default=1.0))
    steps = (1.0, 2.0, 5.0) if high - low < 3.5 else (1.0,)
    ticks = [step * 10.0**decade for decade in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [tick for tick in ticks if low - 0.5 < math.log10(tick) < high + 0.5]


def _above_zero(values: Float[Tensor, " layer"]) -> list[float | None]:
    """Values for a log axis: zeros have no place there."""
    return [value if value > 0 else None for value in values.tolist()]


def _steered_text(run: Run, mark: str | None = "dotted") -> str:
    layers = run.plan.layers
    if not layers:
        return "Steered: no layer, every iteration was rolled back"
    text = f"Steered: layer{'' if len(layers) == 1 else 's'} {', '.join(str(layer) for layer in layers)}"
    return f"{text} ({mark})" if mark else text


def _mark_steered(figure: go.Figure, run: Run) -> None:
    for layer in run.plan.layers:
        figure.add_vline(x=layer, line={"color": TEXT, "width": 1.5, "dash": "dot"}, layer="below")


__all__ = ["effect", "iteration_similarity", "layer_similarity", "side_effects", "vector_norms", "win_rate"]
