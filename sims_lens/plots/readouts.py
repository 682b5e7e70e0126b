"""Figures of what directions write: the tokens, how they change, and how much of it steering bears out."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.analysis.readouts import Reading, Readout, TokenEffect
from sims_lens.analysis.tokens import visible
from sims_lens.checks import check_integer
from sims_lens.errors import PlanError
from sims_lens.plots.theme import (
    BAND,
    BLUE,
    EDGE,
    ORANGE,
    TEXT,
    VERMILLION,
    check_result,
    colours,
    error_bars,
    plotly_text,
    titled,
)

_PALE = "#F4F4F2"
_CELLS = 6
"""Tokens in a row of the table: more are too narrow to read at 750 px."""


def readout(found: Readout, *, layer: int | None = None, name: str | None = None) -> go.Figure:
    """The tokens that one direction promotes and suppresses most, against what random directions reach.

    Args:
        found: of :func:`sims_lens.analysis.readouts.readout`.
        layer: None for the first steered layer, else the last.
        name: of the source; None for the last.

    Raises:
        PlanError: there is no such readout.
    """
    check_result(found, Readout)
    r = found.reading(layer, name)
    effects = [*r.promoted, *reversed(r.suppressed)]
    z = [effect.z for effect in effects]
    rows = list(range(len(effects)))
    figure = titled(
        go.Figure(),
        f"What the direction of layer {r.layer} writes",
        f"{_text(r.name, 40)}: direct effect on the logits, without the blocks above. Grey: the largest of the whole "
        "vocabulary<br>stays in there for 95% of random directions.",
        height=160 + 19 * len(effects),
    )
    limit = found.chance.top_z
    figure.add_shape(
        type="rect", x0=-limit, x1=limit, yref="paper", y0=0, y1=1, fillcolor=BAND, line={"width": 0}, layer="below"
    )
    figure.add_bar(
        x=z,
        y=rows,
        orientation="h",
        marker={"color": [VERMILLION if value > 0 else BLUE for value in z], "opacity": 0.85},
        customdata=[[_text(effect.token, 60), effect.token_id] for effect in effects],
        hovertemplate="%{customdata[0]} (token %{customdata[1]})<br>z %{x:+.2f}<extra></extra>",
        showlegend=False,
    )
    edge = 1.06 * max(limit, *(abs(value) for value in z))
    figure.update_xaxes(
        title_text="direct effect (standard deviations over the vocabulary)",
        range=[-edge, edge],
        zeroline=True,
        zerolinecolor=TEXT,
    )
    figure.update_yaxes(
        tickmode="array",
        tickvals=rows,
        ticktext=[_text(effect.token, 22) for effect in effects],
        range=[len(rows) - 0.4, -0.6],
        showgrid=False,
    )
    figure.update_layout(margin={"t": 96, "b": 56}, bargap=0.25)
    return figure


def readout_layers(found: Readout, *, name: str | None = None, tokens: int = _CELLS) -> go.Figure:
    """The tokens that a source's directions promote most, layer by layer, as a table coloured by z.

    Args:
        found: of :func:`sims_lens.analysis.readouts.readout`.
        name: of the source; None for the last.
        tokens: in a row.

    Raises:
        PlanError: there is no such source.
    """
    check_result(found, Readout)
    check_integer("tokens", tokens)
    source = found.reading(None, name).name
    readings = [r for r in found.readings if r.name == source]
    count = min(tokens, found.top)
    figure = titled(
        go.Figure(),
        "What the direction writes, layer by layer",
        f"{_text(source, 40)}: most promoted tokens, the direct effect alone. At early layers it says little: "
        "the blocks<br>above rewrite the direction. Chance: what 95% of random directions stay below.",
        height=190 + 21 * len(readings),
    )
    rows = list(range(len(readings)))
    chance = found.chance.top_z
    highest = max(1.5 * chance, *(r.top_z for r in readings))
    figure.add_heatmap(
        x=list(range(1, count + 1)),
        y=rows,
        z=[[effect.z for effect in r.promoted[:count]] for r in readings],
        text=[[_text(effect.token, 13) for effect in r.promoted[:count]] for r in readings],
        customdata=[[[_text(effect.token, 60), r.layer] for effect in r.promoted[:count]] for r in readings],
        texttemplate="%{text}",
        textfont={"size": 11},
        zmin=0.0,
        zmax=highest,
        colorscale=[
            [0.0, "#F4F4F2"],
            [0.5 * chance / highest, "#F4F4F2"],
            [chance / highest, "#F6DFCC"],
            [1.0, ORANGE],
        ],
        xgap=1,
        ygap=1,
        colorbar={
            "title": {"text": "z", "font": {"size": 13}},
            "tickvals": [0, chance, highest],
            "ticktext": ["0", f"{chance:.1f}, chance", f"{highest:.1f}"],
            "thickness": 12,
            "outlinewidth": 0,
        },
        hovertemplate="%{customdata[0]}<br>layer %{customdata[1]}, rank %{x}, z %{z:.2f}<extra></extra>",
    )
    figure.update_traces(textfont_color="#26282C")
    figure.update_xaxes(title_text="rank of the token", dtick=1, showline=False, ticks="")
    figure.update_yaxes(
        title_text="layer",
        tickmode="array",
        tickvals=rows,
        ticktext=[f"<b>{r.layer}</b>" if r.layer in found.steered else str(r.layer) for r in readings],
        range=[-0.5, len(rows) - 0.5],
        showgrid=False,
        ticks="",
    )
    figure.update_layout(margin={"t": 96, "b": 56, "r": 12})
    return figure


def readout_drift(found: Readout) -> go.Figure:
    """Whether readouts stay the same: over iterations where there are several, else over layers.

    Two panels: cosine of the effects over the whole vocabulary, and overlap of the promoted tokens. With several layers
    there is a line for each later iteration, against the first; with one layer, a line against the first and one
    against the previous iteration.

    Args:
        found: of :func:`sims_lens.analysis.readouts.readout`.

    Raises:
        PlanError: there is but one direction, or none that follow each other.
    """
    check_result(found, Readout)
    iterations = any(d.against == "first iteration" for d in found.drifts)
    if not found.drifts:
        raise PlanError("a drift needs directions of several iterations or layers; the readout has neither")
    by_layer = len(found.layers) > 1
    if not iterations:
        title, x_title = "Do neighbouring layers write the same tokens?", "layer"
        lines = {name: [d for d in found.drifts if d.name == name] for name in found.names}
    elif by_layer:
        title, x_title = "Do later iterations write the same tokens as the first?", "layer"
        drifts = [d for d in found.drifts if d.against == "first iteration"]
        lines = {name: [d for d in drifts if d.name == name] for name in found.names}
    else:
        title, x_title = f"Do later iterations write the same tokens? Layer {found.layers[0]}", "iteration"
        lines = {a: [d for d in found.drifts if d.against == a] for a in ("first iteration", "previous iteration")}
    lines = {name: drifts for name, drifts in lines.items() if drifts}
    against = "" if iterations else ", each layer against the one below"
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1, row_heights=[0.55, 0.45])
    titled(
        figure,
        title,
        f"Direct effects on the logits{against}. Grey: 95% of pairs of random directions",
        height=480 + 20 * (len(lines) // 4),
    )
    chance = (found.chance.cosine, found.chance.overlap)
    lowest = 0.0
    for (name, drifts), colour in zip(lines.items(), colours(len(lines)), strict=True):
        label = _text(name, 30) if name in found.names else f"against the {name}"
        x = [d.layer if x_title == "layer" else d.iteration for d in drifts]
        for row, values in enumerate(([d.cosine for d in drifts], [d.overlap for d in drifts]), start=1):
            lowest = min(lowest, *values)
            what = ("cosine", "overlap")[row - 1]
            figure.add_scatter(
                x=x,
                y=values,
                name=label,
                legendgroup=label,
                showlegend=row == 1 and len(lines) > 1,
                mode="lines+markers",
                line={"color": colour, "dash": "dot" if name == "previous iteration" else "solid"},
                marker={"size": 6 if x_title == "iteration" else 4},
                customdata=[_text(d.other, 30) for d in drifts],
                hovertemplate=f"{label}, {x_title} %{{x}}, against %{{customdata}}<br>{what} %{{y:.3f}}<extra></extra>",
                row=row,
                col=1,
            )
    for row, limit in enumerate(chance, start=1):
        figure.add_hrect(
            y0=-limit if row == 1 else 0.0, y1=limit, fillcolor=BAND, line_width=0, layer="below", row=row, col=1
        )
    figure.update_yaxes(title_text="cosine", range=[min(lowest, -chance[0]) - 0.05, 1.05], row=1, col=1)
    figure.update_yaxes(title_text=f"overlap of {found.top} tokens", range=[-0.05, 1.05], row=2, col=1)
    figure.update_yaxes(zeroline=True, zerolinecolor=TEXT, zerolinewidth=1)
    figure.update_xaxes(title_text=x_title, row=2, col=1)
    if x_title == "iteration":
        figure.update_xaxes(dtick=1)
    return figure


def readout_measured(found: Readout) -> go.Figure:
    """How well the direct readout foretells what steering does to the next token, by layer, with 95% intervals.

    Args:
        found: of :func:`sims_lens.analysis.readouts.readout`, called with ``texts``.

    Raises:
        PlanError: it was called without.
    """
    check_result(found, Readout)
    lines: dict[str, list[Reading]] = {}
    for r in found.readings:
        if r.measured is not None:
            lines.setdefault(r.name, []).append(r)
    if not lines:
        raise PlanError("nothing was measured; call readout(..., texts=[(prompt, response), ...])")
    figure = titled(
        go.Figure(),
        "How much of what steering does is in the direct readout?",
        "Correlation over the vocabulary with the measured change of log-probabilities, 95% intervals over texts",
        height=420 + 20 * (len(lines) // 4),
    )
    lowest = 0.0
    for (name, readings), colour in zip(lines.items(), colours(len(lines)), strict=True):
        intervals = [r.measured.correlation for r in readings if r.measured is not None]
        lowest = min(lowest, *(i.low for i in intervals))
        figure.add_scatter(
            x=[r.layer for r in readings],
            y=[i.estimate for i in intervals],
            error_y={**error_bars(intervals, width=3), "color": EDGE},
            name=_text(name, 30),
            showlegend=len(lines) > 1,
            mode="lines+markers",
            line={"color": colour},
            customdata=[[i.low, i.high, _tokens(r)] for r, i in zip(readings, intervals, strict=True)],
            hovertemplate=f"{_text(name, 30)}, layer %{{x}}<br>correlation %{{y:.2f}} [%{{customdata[0]:.2f}}, "
            "%{customdata[1]:.2f}]<br>steering promotes %{customdata[2]}<extra></extra>",
        )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="correlation", range=[lowest - 0.05, 1.05], zeroline=True, zerolinecolor=TEXT)
    if len(lines) == 1:
        figure.update_layout(margin={"b": 56})
    return figure


def _tokens(reading: Reading) -> str:
    effects: Sequence[TokenEffect] = reading.measured.promoted[:5] if reading.measured is not None else ()
    return ", ".join(_text(effect.token, 20) for effect in effects)


def _text(text: str, width: int) -> str:
    """Text for a figure: visible, short, and nothing that Plotly would take for markup."""
    shown = visible(text) if text != text.strip() or not text.isprintable() else text
    shown = shown if len(shown) <= width else shown[: width - 1] + "…"
    return plotly_text(shown)


__all__ = ["readout", "readout_drift", "readout_layers", "readout_measured"]
