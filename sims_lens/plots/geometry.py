"""Figures of directions: how long they are, how the stream lies along them, and how they lie to each other."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from sims_lens.analysis.norms import VectorNorms, counted
from sims_lens.analysis.similarity import DirectionSimilarity, SharedSubspace, Trajectory
from sims_lens.checks import check_integer, check_list, one_line
from sims_lens.errors import ConfigError, PlanError
from sims_lens.plots.theme import (
    BAND,
    BLUE,
    DIVERGING,
    EDGE,
    HEIGHT,
    ORANGE,
    TEXT,
    check_result,
    colours,
    error_bars,
    plotly_text,
    titled,
)
from sims_lens.stats import Interval

_LONG = 28
"""Characters of a name that a label has room for."""

_APART = 0.12
"""Layers between the marks of two directions, so that their error bars don't cover each other; less for many."""


def norm_profile(norms: VectorNorms) -> go.Figure:
    """Norm of the directions at every layer, against that of the residual stream; below, as a share of its median.

    Args:
        norms: of :func:`sims_lens.vector_norms`.
    """
    check_result(norms, VectorNorms)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)
    titled(
        figure,
        "How long the directions are, by layer",
        "Grey: the residual stream; its first position, with massive activations, is left out of mean and median",
        height=_height(HEIGHT + 160, len(norms.names) + 3),
    )
    drawn: list[float] = []
    for name, colour in zip(norms.names, colours(len(norms.names)), strict=True):
        found = norms.of(name)
        style = _line(name, colour, len(found))
        values = [d.norm for d in found]
        if all(map(math.isnan, values)):
            style["name"] = f"{style['name']} (unit direction)"
        shares = [d.norm / norms.stream(d.site, d.layer).median for d in found]
        x = [d.layer for d in found]
        figure.add_scatter(
            x=x,
            y=_above_zero(values),
            hovertemplate=f"{_short(name)}, layer %{{x}}<br>norm %{{y:.4g}}<extra></extra>",
            **style,
            row=1,
            col=1,
        )
        figure.add_scatter(
            x=x,
            y=shares,
            hovertemplate=f"{_short(name)}, layer %{{x}}<br>%{{y:.1%}} of the median residual norm<extra></extra>",
            **{**style, "showlegend": False},
            row=2,
            col=1,
        )
        drawn += values
    sites = tuple(dict.fromkeys(r.site for r in norms.residual))
    for site in sites:
        stream = [r for r in norms.residual if r.site == site]
        where = f" at {site}" if len(sites) > 1 else ""
        for what, values, line in (
            ("median", [r.median for r in stream], {"width": 3}),
            ("mean", [r.mean for r in stream], {"width": 1.5, "dash": "dash"}),
            ("first position", [r.first_position for r in stream], {"width": 1.5, "dash": "dot"}),
        ):
            figure.add_scatter(
                x=[r.layer for r in stream],
                y=_above_zero(values),
                name=f"stream{where}, {what}",
                mode="lines" if len(stream) > 1 else "markers",
                line={"color": TEXT, **line},
                marker={"color": TEXT, "symbol": "line-ew-open", "size": 14},
                hovertemplate=f"residual stream{where}, layer %{{x}}<br>{what} norm %{{y:.4g}}<extra></extra>",
                row=1,
                col=1,
            )
            drawn += values
    ticks = _log_ticks(drawn)
    figure.update_yaxes(title_text="norm (units of the stream)", type="log", tickvals=ticks, tickformat="~g", row=1)
    figure.update_yaxes(title_text="share of the median", tickformat=".0%", rangemode="tozero", row=2)
    _layer_axis(figure, [d.layer for d in norms.directions], row=2)
    return figure


def projection_profile(norms: VectorNorms) -> go.Figure:
    """The stream's projection on each unit direction, by layer: its mean, its spread over tokens, and how far a
    prompt's best response lies from its worst one where that is known.

    Args:
        norms: of :func:`sims_lens.vector_norms`.
    """
    check_result(norms, VectorNorms)
    gaps = any(not math.isnan(d.gap.estimate) for d in norms.directions)
    figure = make_subplots(rows=3 if gaps else 2, cols=1, shared_xaxes=True, vertical_spacing=0.05)
    read = f"{counted(norms.texts, 'text')}, {counted(norms.tokens, 'token')} of scope {plotly_text(norms.scope)}"
    titled(
        figure,
        "Where the stream lies along the directions",
        f"{read}; 95% intervals over prompts",
        height=_height(HEIGHT + (260 if gaps else 120), len(norms.names)),
    )
    for at, (name, colour) in enumerate(zip(norms.names, colours(len(norms.names)), strict=True)):
        found = norms.of(name)
        style = _line(name, colour, len(found))
        shift = min(_APART, 0.6 / len(norms.names)) * (at - (len(norms.names) - 1) / 2)
        x = [d.layer + shift for d in found]
        medians = [norms.stream(d.site, d.layer).median for d in found]
        means = [_over(d.projection, median) for d, median in zip(found, medians, strict=True)]
        spread = [d.projection_sd / m for d, m in zip(found, medians, strict=True)]
        rows = [(1, [i.estimate for i in means], error_bars(means, width=0), "mean projection / median norm")]
        rows += [(2, spread, {}, "spread over tokens / median norm")]
        if gaps:
            inner = [_over(d.gap, d.projection_sd) for d in found]
            rows += [(3, [i.estimate for i in inner], error_bars(inner, width=0), "best − worst, in token sd")]
        for row, y, bars, what in rows:
            figure.add_scatter(
                x=x,
                y=y,
                error_y={**bars, "thickness": 1.2} if bars else None,
                customdata=[d.layer for d in found],
                hovertemplate=f"{_short(name)}, layer %{{customdata}}<br>{what} %{{y:.3g}}<extra></extra>",
                **{**style, "showlegend": row == 1},
                row=row,
                col=1,
            )
    figure.update_yaxes(title_text="mean / median norm", row=1)
    figure.update_yaxes(title_text="token sd / median norm", rangemode="tozero", row=2)
    for row, title in ((1, "mean / median norm"), (3, "best − worst (token sd)")):
        if row == 1 or gaps:
            figure.update_yaxes(title_text=title, row=row)
            figure.add_hline(y=0.0, line={"color": TEXT, "width": 1.5, "dash": "dot"}, layer="below", row=row, col=1)
    _layer_axis(figure, [d.layer for d in norms.directions], row=3 if gaps else 2)
    return figure


def similarity(result: DirectionSimilarity, name: str | None = None, *, layer: int | None = None) -> go.Figure:
    """Cosine between every two directions: of all names and layers, of the layers of one name, or of the names at one
    layer.

    Args:
        result: of :func:`sims_lens.direction_similarity`.
        name: only its directions, layer by layer.
        layer: only the directions of this layer, name by name.

    Raises:
        PlanError: there is no such name or layer, or both are given.
    """
    check_result(result, DirectionSimilarity)
    if name is not None and layer is not None:
        raise PlanError("give a name or a layer; with both there is a single direction")
    if name is not None:
        cosines, labels = result.across_layers(name), [(name, at) for at in result.get(name).layers]
        title, by_name = f"Do the layers share a direction? {_short(name)}", False
    elif layer is not None:
        names, cosines = result.at_layer(layer)
        labels, title, by_name = [(each, layer) for each in names], f"Do the directions of layer {layer} agree?", True
    else:
        cosines, labels = result.cosines, list(result.labels)
        by_name = len(result.names) > 1
        title = "Do the directions agree?" if by_name else f"Do the layers share a direction? {_short(result.names[0])}"
    count = len(labels)
    text = f"Random directions: |cosine| below {result.random:.2f} in 95% of cases"
    if by_name and layer is None:
        text += "; in each block by layer"
    if name is None and (known := _ceilings(result, layer)):
        text += (
            f"<br>Two noisy fits of one direction, from their split halves: {sum(known) / len(known):.2f} on average"
        )
    figure = titled(go.Figure(), title, text, width=680, height=620)
    place = list(range(count))
    figure.add_heatmap(
        x=place,
        y=place,
        z=cosines.tolist(),
        zmin=-1,
        zmax=1,
        colorscale=DIVERGING,
        customdata=[[f"{_label(a)} and {_label(b)}" for b in labels] for a in labels],
        colorbar={
            "title": {"text": "cosine", "font": {"size": 13}},
            "tickvals": [-1, -0.5, 0, 0.5, 1],
            "thickness": 14,
            "outlinewidth": 0,
        },
        hovertemplate="%{customdata}<br>cosine %{z:.3f}<extra></extra>",
    )
    edge = [-0.5, count - 0.5]
    axis: dict[str, object] = {"range": edge, "constrain": "domain", "showgrid": False}
    if by_name:
        axis |= _blocks(figure, labels)
    else:
        step = _layer_step(count)
        axis |= {
            "tickvals": place[::step],
            "ticktext": [str(at) for _, at in labels[::step]],
            "title": {"text": "layer"},
        }
    figure.update_xaxes(**axis, showline=False)
    figure.update_yaxes(**axis, scaleanchor="x")
    if by_name:
        figure.update_xaxes(tickangle=-35 if max(len(_short(n)) for n, _ in labels) > 12 else 0)
    if count <= 8:
        figure.update_traces(texttemplate="%{z:.2f}", textfont={"color": "#26282C", "size": 13})
    figure.update_layout(margin={"t": 106, "b": 60})
    return figure


def similarity_profile(result: DirectionSimilarity, pairs: Sequence[tuple[str, str]] | None = None) -> go.Figure:
    """Cosine at every layer between directions of two names, with what chance and what noise would give.

    Args:
        result: of :func:`sims_lens.direction_similarity`.
        pairs: which names; by default those of the source with the others, or, where there are none, the first with
            each later one.

    Raises:
        PlanError: there is nothing to compare, or no such name.
    """
    check_result(result, DirectionSimilarity)
    for pair in () if pairs is None else check_list("pairs", pairs, "[('a', 'b')]"):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
            raise ConfigError(f"a pair is two names of directions, got {one_line(repr(pair), 60)}")
    chosen = pairs
    if chosen is None:
        first = result.names[0]
        chosen = result.pairs if result.others else [pair for pair in result.pairs if pair[0] == first]
    if not chosen:
        raise PlanError("there is one direction, or no two share a layer; give other=, or see similarity(result)")
    figure = titled(
        go.Figure(),
        "Do the directions agree, layer by layer?",
        "Shaded: 95% of random directions"
        + ("; grey lines: of random ones with the stream's covariance" if result.stream_band else "")
        + "<br>Dashed: what two noisy fits of one direction would give, from their split halves",
        height=_height(HEIGHT + 60, len(chosen) + 2),
    )
    found = [result.between(a, b) for a, b in chosen]
    layers = sorted({layer for c in found for layer in c.layers})
    edge = [layers[0] - 0.5, layers[-1] + 0.5]
    figure.add_shape(
        type="rect",
        x0=edge[0],
        x1=edge[1],
        y0=-result.random,
        y1=result.random,
        fillcolor=BAND,
        line_width=0,
        layer="below",
        name="random",
    )
    if result.stream_band:
        site = result.get(chosen[0][0]).site
        bands = [result.stream_band[site, layer] for layer in layers]
        for sign in (1, -1):
            figure.add_scatter(
                x=layers,
                y=[sign * band for band in bands],
                name="random, as the stream",
                showlegend=sign == 1,
                legendgroup="stream",
                mode="lines",
                line={"color": EDGE, "width": 2},
                hovertemplate="random, as the stream, layer %{x}<br>|cosine| below %{y:.3f} in 95%<extra></extra>",
            )
    lowest = -max(result.random, *result.stream_band.values()) if result.stream_band else -result.random
    shades = colours(len(found))
    for comparison, colour in zip(found, shades, strict=True):
        name = f"{_short(comparison.first)} | {_short(comparison.second)}"
        figure.add_scatter(
            x=list(comparison.layers),
            y=comparison.cosine.tolist(),
            name=name,
            legendgroup=name,
            mode="lines+markers",
            line={"color": colour},
            marker={"color": colour, "size": 5},
            customdata=comparison.angle.tolist(),
            hovertemplate=f"{name}, layer %{{x}}<br>cosine %{{y:.3f}}, %{{customdata:.1f}}°<extra></extra>",
        )
        lowest = min(lowest, float(comparison.cosine.min()))
        if not bool(comparison.ceiling.isnan().all()):
            figure.add_scatter(
                x=list(comparison.layers),
                y=_numbers(comparison.ceiling),
                name=f"ceiling, {name}",
                legendgroup=name,
                showlegend=False,
                mode="lines",
                line={"color": colour, "width": 1.5, "dash": "dash"},
                hovertemplate=f"ceiling of {name}, layer %{{x}}<br>cosine %{{y:.3f}}<extra></extra>",
            )
    _layer_axis(figure, layers)
    figure.update_yaxes(title_text="cosine", range=[lowest - 0.06, 1.05], zeroline=True, zerolinecolor=TEXT)
    figure.update_layout(showlegend=True, margin={"t": 106})
    return figure


def trajectory(result: DirectionSimilarity | Trajectory, layer: int | None = None) -> go.Figure:
    """A direction over iterations: where its cumulative sum goes, in the plane of the iterations' two largest
    components, and its cosines with the first one and the one before.

    Args:
        result: of :func:`sims_lens.direction_similarity`, or its ``trajectory(...)``.
        layer: which; of a trajectory, none.

    Raises:
        PlanError: the layer is missing or unknown.
    """
    check_result(result, (DirectionSimilarity, Trajectory))
    if isinstance(result, DirectionSimilarity):
        if layer is None:
            raise PlanError("name the layer whose trajectory is drawn")
        result = result.trajectory(layer)
    share = sum(result.explained)
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.5, 0.5],
        horizontal_spacing=0.14,
        subplot_titles=["path of the cumulative direction", "cosine and turn"],
    )
    titled(
        figure,
        f"A direction over iterations, layer {result.layer}",
        f"Left: the sum of the unit directions so far, over their number; the plane holds {share:.0%} of them",
        height=HEIGHT + 60,
    )
    count = len(result.names)
    path = [[0.0, 0.0], *result.path.tolist()]
    names = ["start", *(_short(name) for name in result.names)]
    figure.add_scatter(
        x=[p[0] for p in path],
        y=[p[1] for p in path],
        mode="lines+markers",
        line={"color": BLUE, "width": 2},
        marker={"color": [TEXT, *colours(count)] if count > 1 else [TEXT, BLUE], "size": 10},
        text=names,
        showlegend=False,
        hovertemplate="%{text}<br>(%{x:.3f}, %{y:.3f})<extra></extra>",
        row=1,
        col=1,
    )
    number = [str(k) for k in range(1, count + 1)]
    for k in range(count):
        figure.add_annotation(
            x=path[k + 1][0], y=path[k + 1][1], text=number[k], showarrow=False, yshift=14, row=1, col=1
        )
    x = list(range(1, count + 1))
    turns = [f"{float(t):.1f}°" if not math.isnan(float(t)) else "" for t in result.turn]
    for name, values, colour, dash in (
        ("with the first", result.with_first, BLUE, "solid"),
        ("with the one before", result.with_previous, ORANGE, "dash"),
    ):
        figure.add_scatter(
            x=x,
            y=_numbers(values),
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            marker={"color": colour, "size": 8},
            customdata=[[n, t] for n, t in zip(names[1:], turns, strict=True)],
            hovertemplate=f"%{{customdata[0]}}<br>cosine {name} %{{y:.3f}}<br>"
            "the sum turns by %{customdata[1]}<extra></extra>",
            row=1,
            col=2,
        )
    figure.add_shape(
        type="rect",
        x0=0.5,
        x1=count + 0.5,
        y0=-result.random,
        y1=result.random,
        fillcolor=BAND,
        line_width=0,
        layer="below",
        name="random",
        row=1,
        col=2,
    )
    drawn = [v for v in (*_numbers(result.with_first), *_numbers(result.with_previous)) if v is not None]
    low = min(-result.random, *drawn) - 0.06
    step = -(-count // 10)
    ticks = x[::-step][::-1]
    figure.update_xaxes(
        title_text="iteration (below: turn of the sum)",
        tickvals=ticks,
        ticktext=[f"{k}<br>{turns[k - 1]}" for k in ticks],
        range=[0.5, count + 0.5],
        row=1,
        col=2,
    )
    figure.update_yaxes(title_text="cosine", range=[low, 1.06], row=1, col=2)
    reach = [max(abs(p[at]) for p in path) for at in (0, 1)]
    height = max(reach[1], 0.35 * max(reach[0], 0.1)) * 1.35
    across = [min(0.0, *(p[0] for p in path)) - 0.06, max(p[0] for p in path) + 0.1]
    figure.update_xaxes(title_text=f"component 1 ({result.explained[0]:.0%})", range=across, row=1, col=1)
    figure.update_yaxes(
        title_text=f"component 2 ({result.explained[1]:.0%})", range=[-height, height], zeroline=True, row=1, col=1
    )
    figure.update_yaxes(zerolinecolor=TEXT, row=1, col=1)
    figure.update_annotations(font_size=13)
    figure.update_layout(margin={"t": 112, "b": 112})
    return figure


def shared_subspace(result: DirectionSimilarity | SharedSubspace, *, components: int = 12) -> go.Figure:
    """Share of the unit directions along each principal component, against that of as many random directions.

    Args:
        result: of :func:`sims_lens.direction_similarity`, or its ``shared_subspace(...)``.
        components: how many to show.
    """
    check_result(result, (DirectionSimilarity, SharedSubspace))
    check_integer("components", components)
    if isinstance(result, DirectionSimilarity):
        result = result.shared_subspace()
    shown = min(components, len(result.explained))
    x = list(range(1, shown + 1))
    figure = titled(
        go.Figure(),
        f"How few dimensions hold {len(result.labels)} directions",
        f"Participation ratio {result.participation_ratio:.1f}, of random directions "
        f"{result.random_participation_ratio:.1f}; effective rank {result.effective_rank:.1f}, of random ones "
        f"{result.random_effective_rank:.1f}",
    )
    figure.add_bar(
        x=x,
        y=result.explained[:shown].tolist(),
        name="directions",
        marker={"color": BLUE, "opacity": 0.85},
        customdata=result.explained.cumsum(0)[:shown].tolist(),
        hovertemplate="component %{x}<br>%{y:.1%}, with those before %{customdata:.1%}<extra></extra>",
    )
    figure.add_scatter(
        x=x,
        y=result.random[:shown].tolist(),
        name="random directions (mean, to 97.5%)",
        error_y={
            "type": "data",
            "symmetric": False,
            "array": (result.random_high - result.random)[:shown].tolist(),
            "arrayminus": [0.0] * shown,
            "thickness": 1.6,
            "width": 4,
        },
        mode="lines+markers",
        line={"color": ORANGE, "width": 2},
        marker={"color": ORANGE, "size": 7},
        hovertemplate="component %{x}<br>random directions %{y:.1%}<extra></extra>",
    )
    figure.update_xaxes(title_text="principal component", tickvals=x[:: -(-shown // 20)], range=[0.4, shown + 0.6])
    figure.update_yaxes(title_text="share of the directions", tickformat=".0%", rangemode="tozero")
    return figure


def _line(name: str, colour: str, points: int) -> dict[str, object]:
    return {
        "name": _short(name),
        "legendgroup": plotly_text(name),
        "mode": "lines+markers",
        "line": {"color": colour},
        "marker": {"color": colour, "size": 4 if points > 1 else 9},
    }


def _short(name: str) -> str:
    """A name as plain text, Plotly reading some HTML; its end cut off where it is long."""
    return plotly_text(name if len(name) <= _LONG else f"{name[: _LONG - 1]}…")


def _label(label: tuple[str, int]) -> str:
    return f"{_short(label[0])}, layer {label[1]}"


def _blocks(figure: go.Figure, labels: Sequence[tuple[str, int]]) -> dict[str, object]:
    """One tick per name, in the middle of its directions, and a line between two names."""
    starts = [k for k, (name, _) in enumerate(labels) if k == 0 or labels[k - 1][0] != name]
    ends = [*starts[1:], len(labels)]
    if len(labels) > len(starts):
        for start in starts[1:]:
            for axis in ("x", "y"):
                across = "y" if axis == "x" else "x"
                line = {f"{axis}0": start - 0.5, f"{axis}1": start - 0.5}
                line |= {f"{across}0": -0.5, f"{across}1": len(labels) - 0.5}
                figure.add_shape(type="line", **line, line={"color": "#26282C", "width": 1})
    return {
        "tickvals": [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)],
        "ticktext": [_short(labels[start][0]) for start in starts],
    }


def _over(interval: Interval, unit: float) -> Interval:
    return interval.map(lambda value: value / unit if unit else math.nan)


def _ceilings(result: DirectionSimilarity, layer: int | None) -> list[float]:
    """Where the noise of both directions is known."""
    found = [result.between(*pair) for pair in result.pairs if all(result.get(n).split_half is not None for n in pair)]
    values = [(at, float(v)) for c in found for at, v in zip(c.layers, c.ceiling, strict=True)]
    return [value for at, value in values if layer in (None, at) and not math.isnan(value)]


def _height(base: int, entries: int) -> int:
    """More where a legend has many rows of two."""
    return base + 20 * max(0, math.ceil(entries / 2) - 2)


def _layer_axis(figure: go.Figure, layers: Sequence[int], *, row: int | None = None) -> None:
    low, high = min(layers), max(layers)
    figure.update_xaxes(range=[low - 0.5, high + 0.5], dtick=_layer_step(high - low + 1), tick0=0)
    figure.update_xaxes(title_text="layer", **({} if row is None else {"row": row}))


def _layer_step(layers: int) -> int:
    """Layers between two ticks, so that there are at most about a dozen."""
    return next((step for step in (1, 2, 5, 10) if layers <= 12 * step), 20)


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Ticks at 1, 2 and 5 in each decade, or at the decades alone where there are many.

    >>> _log_ticks([3.0, 60.0])
    [2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    """
    shown = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(shown)), math.log10(max(shown))
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    decades = range(math.floor(low) - 1, math.ceil(high) + 1)
    ticks = [round(step * 10.0**decade, 12) for decade in decades for step in steps]
    return [tick for tick in ticks if low - 0.3 < math.log10(tick) < high + 0.3]


def _above_zero(values: Sequence[float]) -> list[float | None]:
    """Values for a log axis: zeros have no place there."""
    return [value if value > 0 else None for value in values]


def _numbers(values: Float[Tensor, " layer"]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


__all__ = [
    "norm_profile",
    "projection_profile",
    "shared_subspace",
    "similarity",
    "similarity_profile",
    "trajectory",
]
