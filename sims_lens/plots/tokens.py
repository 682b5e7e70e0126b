"""The figure of a text's scores: every layer at every token, unsteered and steered."""

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from sims_lens.analysis.tokens import TokenScores
from sims_lens.errors import ConfigError, PlanError
from sims_lens.plots.theme import BLUE, DIVERGING, TEXT, VERMILLION, check_result, plotly_text, titled

SHOWN = 48
"""Tokens in the figure, at most: more have no room for their names."""
_BEFORE = 8
"""Of a longer text, tokens shown before the response."""


def token_heatmap(scores: TokenScores, *, layer: int | None = None, start: int | None = None) -> go.Figure:
    """Projection on the direction at every token: a heat-map of layers by tokens, or bars where one layer is shown.

    Two panels, unsteered and steered. The first position is left blank: its massive activations say little.

    Args:
        scores: of :func:`sims_lens.analysis.tokens.token_scores`.
        layer: show this one alone, as bars; all of them where None.
        start: of a text of more than 48 tokens, the first that is shown; by default a few before the response.

    Raises:
        PlanError: that layer wasn't scored.
        ConfigError: there is no token at ``start``.
    """
    check_result(scores, TokenScores)
    count = len(scores.tokens)
    if start is not None and (type(start) is not int or not 0 <= start < count):
        raise ConfigError(f"start must be a token in 0..{count - 1}, got {start!r}")
    if layer is not None and layer not in scores.layers:
        raise PlanError(f"layer {layer!r} was not scored; {scores.name} has layers {list(scores.layers)}")
    response = scores.regions.index("response") if "response" in scores.regions else 0
    begin = start if start is not None else min(max(0, response - _BEFORE), max(0, count - SHOWN))
    end = min(count, begin + SHOWN)
    if layer is None and len(scores.layers) == 1:
        layer = scores.layers[0]
    shown = scores.layers if layer is None else (layer,)
    names = list(scores.at())
    values = {name: torch.stack([scores.at(at)[name] for at in shown]) for name in names}
    limit = max(scores.limit(at) for at in shown) if layer is not None else _limit(values)
    figure = make_subplots(
        rows=len(names),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.07,
        subplot_titles=names if len(names) > 1 else [],
    )
    cut = "" if end - begin == count else f" Tokens {begin} to {end - 1} of {count}."
    where = f"layer {layer}" if layer is not None else "every layer"
    titled(
        figure,
        f"Where the text lies along the direction, {where}",
        f"{_escaped(scores.name, 40)}: projection of each token's stream at {scores.site}.{cut}",
        height=190 + len(names) * (150 if layer is not None else 60 + max(90, 6 * len(shown))),
    )
    x = list(range(begin, end))
    hover = [_escaped(scores.tokens[k].label, 40) for k in x]
    for row, name in enumerate(names, start=1):
        rows = [[None if k == 0 else float(line[k]) for k in x] for line in values[name]]
        if layer is None:
            figure.add_heatmap(
                x=x,
                y=list(shown),
                z=rows,
                zmin=-limit,
                zmax=limit,
                colorscale=DIVERGING,
                showscale=row == 1,
                customdata=[hover] * len(shown),
                hoverongaps=False,
                colorbar={
                    "title": {"text": "projection (× median residual norm)", "font": {"size": 12}, "side": "right"},
                    "thickness": 12,
                    "outlinewidth": 0,
                },
                hovertemplate=f"%{{customdata}}<br>{name}, layer %{{y}}: %{{z:+.3f}}<extra></extra>",
                row=row,
                col=1,
            )
        else:
            figure.add_bar(
                x=x,
                y=rows[0],
                marker={"color": [VERMILLION if (value or 0.0) > 0 else BLUE for value in rows[0]], "opacity": 0.85},
                customdata=hover,
                showlegend=False,
                hovertemplate=f"%{{customdata}}<br>{name}: %{{y:+.3f}}<extra></extra>",
                row=row,
                col=1,
            )
        if begin < response < end:
            figure.add_vline(x=response - 0.5, line={"color": TEXT, "width": 1.5, "dash": "dash"}, row=row, col=1)
    if layer is None:
        figure.update_yaxes(title_text="layer", showgrid=False, range=[shown[0] - 0.5, shown[-1] + 0.5])
    else:
        low = min(0.0, *(float(v[0, begin:end][1 if begin == 0 else 0 :].min()) for v in values.values()))
        high = max(0.0, *(float(v[0, begin:end][1 if begin == 0 else 0 :].max()) for v in values.values()))
        room = 0.06 * max(high - low, 1e-9)
        figure.update_yaxes(zeroline=True, zerolinecolor=TEXT, range=[low - room, high + room])
        figure.update_yaxes(title_text="projection<br>(× residual norm)")
    figure.update_xaxes(range=[begin - 0.5, end - 0.5], showline=False, ticks="")
    figure.update_xaxes(
        tickmode="array",
        tickvals=x,
        ticktext=[_escaped(scores.tokens[k].label, 14) for k in x],
        tickangle=-90,
        tickfont={"size": 11 if len(x) <= 36 else 10},
        row=len(names),
        col=1,
    )
    if begin < response < end:
        figure.update_xaxes(title_text="token (dashed: the response begins)", row=len(names), col=1)
    else:
        figure.update_xaxes(title_text="token", row=len(names), col=1)
    figure.update_annotations(font_size=13)
    figure.update_layout(margin={"t": 104, "b": 40, "r": 20})
    return figure


def _limit(values: dict[str, torch.Tensor]) -> float:
    """Where the colours of several layers end: the 98th percentile of the magnitudes, first position left out."""
    every = torch.cat([v[:, 1:].flatten() for v in values.values()]).abs()
    return max(float(every.quantile(0.98)), 1e-9) if len(every) else 1.0


def _escaped(text: str, width: int) -> str:
    shown = text if len(text) <= width else text[: width - 1] + "…"
    return plotly_text(shown)


__all__ = ["SHOWN", "token_heatmap"]
