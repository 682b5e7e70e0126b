"""Where a plan's effect runs: a map of heads and MLPs, and how far a gradient may be trusted with it.

Names of models and behaviours stay out of the figures: Plotly reads some HTML in labels.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.analysis.circuits import Amount, ComponentEffect, ComponentEffects, DirectionReaders
from sims_lens.analysis.patching import HEAD, MLP
from sims_lens.checks import check_choice
from sims_lens.plots.theme import BLUE, DIVERGING, PURPLE, TEXT, VERMILLION, check_result, titled
from sims_lens.stats import Interval

_VALUES: Final = {
    "lost": "Effect lost when one component is as if unsteered",
    "restored": "Effect that one component brings into the unsteered run",
    "gradient": "Effect carried by each component, to first order",
}

_LINES: Final = {"resid_pre": -0.5, "attn_out": 0.0, "mlp_out": 0.25, "resid_post": 0.5}
"""Where a steered site lies in its layer's row."""

_NAMED = 5
"""Components that are named in the scatter."""


def component_effects(found: ComponentEffects, *, value: str = "lost", share: bool = True) -> go.Figure:
    """Head by layer map of what each component carries, the MLPs in a column of their own.

    Dashed lines mark the steered sites. What was not patched is left empty; a component that gives the same in both
    runs is an exact 0.

    Args:
        found: of :func:`sims_lens.analysis.component_effects`.
        value: "lost", "restored" or "gradient".
        share: as a share of the plan's whole effect; in nats per token where False, and where the interval of the
            effect reaches 0.

    Raises:
        ConfigError: there is no such value.
    """
    check_result(found, ComponentEffects)
    check_choice("value", value, tuple(_VALUES))
    figure = _map(found, value, share)
    direct = found.direct
    straight = f"{direct.nats.estimate:+.3g}" if direct.share is None else f"{direct.share.estimate:.0%} of it"
    subtitle = f"{_whole(found)}; {straight} goes straight to the logits."
    return titled(figure, _VALUES[value], subtitle, height=_height(found))


def direction_readers(found: DirectionReaders, *, share: bool = True) -> go.Figure:
    """Head by layer map of who reads what the plan adds: the first-order estimate, with a dot on those checked exactly.

    Args:
        found: of :func:`sims_lens.analysis.direction_readers`.
        share: as a share of the plan's whole effect; in nats per token where False, and where the interval of the
            effect reaches 0.
    """
    check_result(found, DirectionReaders)
    figure = _map(found, "gradient", share)
    for column, kind in ((1, HEAD), (2, MLP)):
        checked = [
            e.component for e in found.components if e.lost is not None and e.active and e.component.kind == kind
        ]
        figure.add_scatter(
            x=[c.head if kind == HEAD else 0 for c in checked],
            y=[c.layer for c in checked],
            mode="markers",
            marker={"color": TEXT, "size": 5},
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=column,
        )
    subtitle = (
        "Lost when it alone reads the stream without what was added, to first order. "
        f"Dots: checked ({_ranked(found, ends=False)})."
    )
    return titled(figure, "Who reads the direction", subtitle, height=_height(found))


def attribution_check(found: ComponentEffects | DirectionReaders) -> go.Figure:
    """What a gradient predicts against what patching finds, one point per patched component, with the identity line.

    Args:
        found: of :func:`sims_lens.analysis.component_effects` or :func:`sims_lens.analysis.direction_readers`.
    """
    check_result(found, (ComponentEffects, DirectionReaders))
    figure = go.Figure()
    named = {repr(e.component) for e in found.top(_NAMED)}
    patched = [e for e in found.components if e.lost is not None and e.active]
    exact = [e.lost.nats.estimate for e in patched if e.lost is not None]
    ends = [*exact, *(e.gradient.nats.estimate for e in patched), 0.0]
    low, high = min(ends), max(ends)
    around = 0.06 * (high - low) or 1.0
    line = [low - around, high + around]
    figure.add_scatter(
        x=line, y=line, mode="lines", line={"color": TEXT, "width": 1.3, "dash": "dot"}, name="equal", hoverinfo="skip"
    )
    for kind, name, colour, symbol in ((HEAD, "heads", BLUE, "circle"), (MLP, "MLPs", VERMILLION, "diamond")):
        own = [e for e in patched if e.component.kind == kind]
        if not own:
            continue
        figure.add_scatter(
            x=[e.lost.nats.estimate for e in own if e.lost is not None],
            y=[e.gradient.nats.estimate for e in own],
            mode="markers",
            marker={"color": colour, "size": 8, "symbol": symbol, "opacity": 0.8},
            text=[_hover(e) for e in own],
            hovertemplate="%{text}<extra></extra>",
            name=name,
        )
    _name(figure, [e for e in patched if repr(e.component) in named], 350 / (line[1] - line[0]))
    figure.update_xaxes(title_text="lost, by exact patching (nats per token)", range=line)
    figure.update_yaxes(title_text="lost, by gradient (nats per token)", range=line)
    count = f"{len(patched)} component{'' if len(patched) == 1 else 's'}"
    subtitle = f"{count}: {_ranked(found)}."
    return titled(figure, "Gradient against exact patching", subtitle, height=520)


def _name(figure: go.Figure, named: Sequence[ComponentEffect], pixels: float) -> None:
    """Names beside their points, on the side away from the line, pushed up where they would overlap."""
    ends = {True: -1e9, False: -1e9}
    for each in sorted(named, key=lambda e: e.gradient.nats.estimate):
        assert each.lost is not None
        x, y = each.lost.nats.estimate, each.gradient.nats.estimate
        above = y >= x
        height = max(y * pixels, ends[above] + 14)
        ends[above] = height
        figure.add_annotation(
            x=x,
            y=y,
            text=repr(each.component),
            showarrow=False,
            font={"size": 11, "color": TEXT},
            xanchor="right" if above else "left",
            xshift=-8 if above else 8,
            yshift=height - y * pixels,
        )


def _ranked(found: ComponentEffects | DirectionReaders, *, ends: bool = True) -> str:
    """How far gradient and patching agree, in words."""
    agreement = found.agreement
    if np.isnan(agreement.estimate):
        return "too few to rank"
    text = f"Spearman {agreement.estimate:.2f}"
    return f"{text} [{agreement.low:.2f}, {agreement.high:.2f}], interval over pairs of texts" if ends else text


def _map(found: ComponentEffects | DirectionReaders, value: str, share: bool) -> go.Figure:
    share = share and found.direct.share is not None
    layers = sorted({e.component.layer for e in found.components})
    heads = found.n_heads
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, column_widths=[0.88, 0.12], horizontal_spacing=0.02)
    shown = {(e.component.layer, e.component.head): e for e in found.components}

    def grid(columns: Sequence[int]) -> tuple[np.ndarray, list[list[str]]]:
        cells = [[shown[layer, head] for head in columns] for layer in layers]
        values = [[_estimate(getattr(e, value), share) for e in row] for row in cells]
        return np.array(values), [[_hover(e) for e in row] for row in cells]

    panels = [grid(range(heads)), grid([-1])]
    limit = max((float(abs(z[np.isfinite(z)]).max(initial=0.0)) for z, _ in panels), default=0.0) or 1.0
    for column, (z, text) in enumerate(panels, start=1):
        figure.add_heatmap(
            x=list(range(z.shape[1])),
            y=layers,
            z=z,
            text=text,
            hovertemplate="%{text}<extra></extra>",
            colorscale=DIVERGING,
            zmin=-limit,
            zmax=limit,
            xgap=1.5,
            ygap=1.5,
            showscale=column == 1,
            colorbar={
                "title": {"text": "share of<br>the effect" if share else "nats per<br>token", "font": {"size": 12}},
                "tickformat": ".0%" if share else "+.2g",
                "thickness": 12,
                "outlinewidth": 0,
                "tickfont": {"size": 11},
            },
            row=1,
            col=column,
        )
        for layer, site in found.sites:
            figure.add_hline(
                y=layer + _LINES[site], line={"color": PURPLE, "width": 3, "dash": "dash"}, row=1, col=column
            )
    figure.add_annotation(
        text="steered",
        x=0.0,
        xref="x domain",
        y=found.sites[0][0] + _LINES[found.sites[0][1]],
        yref="y",
        xanchor="left",
        yanchor="top" if _LINES[found.sites[0][1]] > 0 else "bottom",
        showarrow=False,
        font={"size": 11, "color": TEXT},
    )
    step = max(1, -(-heads // 16))
    figure.update_xaxes(
        title_text="attention head", tickvals=list(range(0, heads, step)), range=[-0.5, heads - 0.5], col=1
    )
    figure.update_xaxes(tickvals=[0], ticktext=["MLP"], range=[-0.5, 0.5], col=2)
    figure.update_yaxes(range=[layers[0] - 0.6, layers[-1] + 0.6], tickvals=layers[:: max(1, -(-len(layers) // 16))])
    figure.update_yaxes(title_text="layer", col=1)
    figure.update_xaxes(showline=False, ticks="")
    figure.update_yaxes(showgrid=False, ticks="")
    return figure.update_layout(margin={"l": 72, "r": 24, "t": 84, "b": 58})


def _height(found: ComponentEffects | DirectionReaders) -> int:
    rows = len({e.component.layer for e in found.components})
    return int(142 + min(640, max(170, 26 * rows)))


def _whole(found: ComponentEffects | DirectionReaders) -> str:
    return f"The whole effect: {_signed(found.effect)} nats per token"


def _estimate(amount: Amount | None, share: bool) -> float:
    interval = None if amount is None else amount.share if share else amount.nats
    return float("nan") if interval is None else interval.estimate


def _hover(each: ComponentEffect) -> str:
    lines = [repr(each.component)]
    if not each.active:
        return "<br>".join([*lines, "the same in both runs"])
    for name in ("lost", "restored", "gradient"):
        amount: Amount | None = getattr(each, name)
        if amount is not None:
            share = amount.share
            part = "" if share is None else f", {share.estimate:.0%} [{share.low:.0%}, {share.high:.0%}]"
            lines.append(f"{name} {_signed(amount.nats)}{part}")
    return "<br>".join(lines)


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


__all__ = ["attribution_check", "component_effects", "direction_readers"]
