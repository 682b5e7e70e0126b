"""Figures of ablation studies: what is lost without a part, without a direction, and who writes the answer."""

import math
from collections.abc import Sequence
from typing import Final

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.analysis.ablation import DirectionalAblation, LeaveOneOut
from sims_lens.analysis.logit_attribution import Contribution, LogitAttribution
from sims_lens.plots.theme import (
    BAND,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    TEXT,
    VERMILLION,
    check_result,
    plotly_text,
    titled,
)
from sims_lens.stats import Interval

_ROW: Final = 54
"""Pixels for each part or condition."""

_KINDS: Final[dict[str, tuple[str, str]]] = {
    "embed": ("embedding", PURPLE),
    "pos_embed": ("embedding", PURPLE),
    "attn": ("attention", BLUE),
    "head": ("attention", BLUE),
    "attn_bias": ("attention", BLUE),
    "mlp": ("MLP", SKY),
    "steer": ("steering delta", VERMILLION),
    "final_norm": ("final norm's scale", GREEN),
    "soft_cap": ("cap on the logits", ORANGE),
}


def leave_one_out(found: LeaveOneOut) -> go.Figure:
    """What each part of a plan adds: the loss without it, its effect alone, and the loss with a random direction.

    Args:
        found: of :func:`sims_lens.analysis.leave_one_out`.
    """
    check_result(found, LeaveOneOut)
    names = [_short(part.name) for part in found.parts]
    figure = titled(
        go.Figure(),
        f"What is lost without each {'part' if found.by in ('plan', 'intervention') else found.by}",
        "95% intervals, paired. A part whose direction matters loses as much to a random one of its norm (diamonds).",
        height=210 + _ROW * max(2, len(names)),
    )
    rows = [float(row) for row in range(len(names))]
    figure.add_vline(x=0, line={"color": TEXT, "width": 1}, layer="below")
    figure.add_vline(x=found.effect.estimate, line={"color": TEXT, "width": 2, "dash": "dash"}, layer="below")
    if found.controls:
        ranges = [p.replaced_range for p in found.parts if p.replaced_range is not None]
        for row, (low, high) in enumerate(ranges):
            figure.add_shape(
                type="rect", x0=low, x1=high, y0=row + 0.14, y1=row + 0.34, fillcolor=BAND, line_width=0, layer="below"
            )
        figure.add_scatter(
            **_points([p.replaced for p in found.parts if p.replaced is not None], [r + 0.24 for r in rows], names),
            name="lost if its direction is random"
            + (f" (mean and range of {found.controls})" if found.controls > 1 else ""),
            mode="markers",
            marker={"color": ORANGE, "size": 9, "symbol": "diamond"},
        )
    figure.add_scatter(
        **_points([p.lost for p in found.parts], rows, names),
        name="lost without it",
        mode="markers",
        marker={"color": BLUE, "size": 11},
    )
    figure.add_scatter(
        **_points([p.alone for p in found.parts], [r - 0.24 for r in rows], names),
        name="effect of it alone",
        mode="markers",
        marker={"color": GREEN, "size": 9, "symbol": "circle-open", "line": {"width": 2}},
    )
    figure.add_annotation(
        x=found.effect.estimate, y=1, yref="paper", yanchor="bottom", text="whole plan", showarrow=False
    )
    figure.update_yaxes(tickvals=rows, ticktext=names, range=[len(names) - 0.5, -0.5], showgrid=False)
    ends = [end for p in found.parts for i in (p.lost, p.alone, p.replaced) if i is not None for end in (i.low, i.high)]
    ends += [0.0, found.effect.estimate, *(end for p in found.parts for end in p.replaced_range or ())]
    room = 0.05 * (max(ends) - min(ends) or 1.0)
    figure.update_xaxes(range=[min(ends) - room, max(ends) + room])
    figure.update_xaxes(title_text=f"change of {plotly_text(found.measure_name)}", showgrid=True)
    figure.update_layout(legend={"traceorder": "reversed"}, margin={"b": 118, "t": 104})
    return figure


def directional_ablation(found: DirectionalAblation) -> go.Figure:
    """The behaviour of the unsteered model, without the direction, and without random ones; and what it costs.

    Args:
        found: of :func:`sims_lens.analysis.directional_ablation`.
    """
    check_result(found, DirectionalAblation)
    kinds = [kind for kind in ("random", "matched") if found.of_kind(kind)]
    words = {"random": "random<br>directions", "matched": "random, of the<br>same variance"}
    labels = ["nothing", _short(found.name), *(words[kind] for kind in kinds)]
    texts = found.nll is not None
    where = "every layer" if found.everywhere else f"layer {found.layer}"
    figure = make_subplots(
        rows=1,
        cols=2 if texts else 1,
        shared_yaxes=True,
        column_widths=[0.66, 0.34] if texts else None,
        horizontal_spacing=0.05,
    )
    titled(
        figure,
        f"The unsteered model without the direction of layer {found.layer}",
        f"Taken out at {where}, {plotly_text(found.scope)} tokens. 95% intervals over {found.units} "
        f"{plotly_text(found.unit)}s; dashed: nothing taken out.",
        height=220 + _ROW * len(labels) + 10 * max([0, *(len(found.of_kind(kind)) - 4 for kind in kinds)]),
    )
    groups: list[tuple[float, str, Interval, Interval | None]] = [
        (0.0, TEXT, found.baseline, None),
        (1.0, VERMILLION, found.ablated, found.nll),
    ]
    for row, kind in enumerate(kinds, start=2):
        controls = found.of_kind(kind)
        for k, control in enumerate(controls):
            offset = 0.0 if len(controls) == 1 else 0.66 * (k / (len(controls) - 1) - 0.5)
            groups.append((row + offset, BLUE if kind == "random" else ORANGE, control.value, control.nll))
    names = [labels[0], labels[1], *(words[c.kind].replace("<br>", " ") for kind in kinds for c in found.of_kind(kind))]
    for (y, colour, value, nll), name in zip(groups, names, strict=True):
        for column, interval in ((1, value), (2, nll)):
            if interval is None or (column == 2 and not texts):
                continue
            figure.add_scatter(
                **_points([interval], [y], [name]),
                mode="markers",
                marker={"color": colour, "size": 10 if y <= 1 else 6},
                showlegend=False,
                row=1,
                col=column,
            )
    figure.add_vline(
        x=found.baseline.estimate, line={"color": TEXT, "width": 1.6, "dash": "dash"}, layer="below", row=1, col=1
    )
    if texts:
        figure.add_vline(x=0, line={"color": TEXT, "width": 1.6, "dash": "dash"}, layer="below", row=1, col=2)
        figure.update_yaxes(ticks="", row=1, col=2)
        figure.update_xaxes(title_text="rise of NLL<br>(nats per token)", nticks=5, row=1, col=2)
    figure.update_xaxes(showgrid=True)
    figure.update_xaxes(title_text=plotly_text(found.measure_name), nticks=7, row=1, col=1)
    figure.update_yaxes(range=[len(labels) - 0.5, -0.5], showgrid=False)
    figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=labels, title_text="taken out", row=1, col=1)
    figure.update_layout(margin={"b": 72})
    return figure


def logit_attribution(found: LogitAttribution) -> go.Figure:
    """Who writes the change of a logit (difference): bars by layer, and their sum from the embedding upwards.

    Heads of a layer are added up. The line ends at the whole change.

    Args:
        found: of :func:`sims_lens.analysis.logit_attribution`.
    """
    check_result(found, LogitAttribution)
    layers = sorted({c.component.layer for c in found.contributions if c.component.layer is not None})
    ticks = ["embed", *(str(layer) for layer in layers), "norm"]
    if any(c.component.kind == "soft_cap" for c in found.contributions):
        ticks.append("cap")
    places = {name: place for place, name in enumerate(ticks)}

    def place(c: Contribution) -> int:
        if c.component.layer is not None:
            return places[str(c.component.layer)]
        return places[{"final_norm": "norm", "soft_cap": "cap"}.get(c.component.kind, "embed")]

    shown = [c for c in found.contributions if c.component.kind in _KINDS]
    figure = titled(
        go.Figure(),
        "Who writes the change that steering makes",
        f"{plotly_text(_capital(found.measure))}: {found.unsteered:+.2f} unsteered, {found.steered:+.2f} steered.",
        height=460,
    )
    legend = dict.fromkeys(label for label, _ in _KINDS.values())
    for label in legend:
        colour = next(c for name, c in _KINDS.values() if name == label)
        mine = [c for c in shown if _KINDS[c.component.kind][0] == label]
        if not mine:
            continue
        at = sorted({place(c) for c in mine})
        figure.add_bar(
            x=at,
            y=[math.fsum(c.change for c in mine if place(c) == x) for x in at],
            name=label,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"{label}, %{{customdata}}: %{{y:+.3g}}<extra></extra>",
            customdata=[f"layer {ticks[x]}" if ticks[x].isdigit() else ticks[x] for x in at],
        )
    sums = [math.fsum(c.change for c in shown if place(c) <= x) for x in range(len(ticks))]
    figure.add_scatter(
        x=list(range(len(ticks))),
        y=sums,
        name="sum so far",
        mode="lines+markers",
        line={"color": TEXT, "width": 1.6, "shape": "hvh"},
        marker={"size": 4},
        hovertemplate="sum so far: %{y:+.3g}<extra></extra>",
    )
    figure.add_hline(y=found.total, line={"color": TEXT, "width": 1.4, "dash": "dot"}, layer="below")
    for here in sorted({place(c) for c in shown if c.component.kind == "steer"}):
        figure.add_vline(x=here, line={"color": VERMILLION, "width": 1.2, "dash": "dot"}, layer="below")
    step = max(1, math.ceil(len(layers) / 12))
    if step > 1:  # a number beside a word would touch it
        layers = [layer for layer in layers[1:-1] if layer % step == 0]
    kept = [x for name, x in places.items() if not name.isdigit() or int(name) in layers]
    figure.update_xaxes(
        title_text="layer (dotted: steered here)",
        tickvals=kept,
        ticktext=["<br>cap" if ticks[x] == "cap" else ticks[x] for x in kept],
        tickangle=0,
        range=[-0.7, len(ticks) - 0.3],
    )
    figure.update_yaxes(title_text="change (logits)", zeroline=True, zerolinecolor=TEXT)
    figure.update_layout(barmode="relative", bargap=0.25, margin={"b": 112})
    return figure


def _points(intervals: Sequence[Interval], rows: Sequence[float], names: Sequence[str]) -> dict[str, object]:
    """Estimates along x with their intervals, and what is said when the mouse is over them."""
    return {
        "x": [i.estimate for i in intervals],
        "y": list(rows),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [i.high - i.estimate for i in intervals],
            "arrayminus": [i.estimate - i.low for i in intervals],
            "thickness": 1.6,
            "width": 3,
        },
        "customdata": [[name, i.low, i.high] for name, i in zip(names, intervals, strict=True)],
        "hovertemplate": "%{customdata[0]}: %{x:.3g} [%{customdata[1]:.3g}, %{customdata[2]:.3g}]<extra></extra>",
    }


def _short(name: str, width: int = 34) -> str:
    return plotly_text(name if len(name) <= width else f"{name[: width - 1]}…")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


__all__ = ["directional_ablation", "leave_one_out", "logit_attribution"]
