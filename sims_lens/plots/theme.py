"""The one Plotly template of all figures, and the colours and shapes that they share.

Figures are transparent, and their text and lines are of a grey with about the same contrast against white as against
near-black, so that one picture serves a light and a dark page. Colours are those of Okabe & Ito ("Color universal
design", 2008), which most colour-blind readers can tell apart; their black and yellow are left out, because each
vanishes on one of the two backgrounds.
"""

import html
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from sims_lens.stats import Interval

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
TEXT = "#7A7D82"
GRID = "rgba(122, 125, 130, 0.22)"
BAND = "rgba(122, 125, 130, 0.20)"
EDGE = "rgba(122, 125, 130, 0.55)"
DIVERGING = ((0.0, BLUE), (0.5, "#F4F4F2"), (1.0, VERMILLION))
WIDTH, HEIGHT = 750, 420

_AXIS = {
    "automargin": True,
    "gridcolor": GRID,
    "linecolor": TEXT,
    "tickcolor": TEXT,
    "ticks": "outside",
    "ticklen": 4,
    "title": {"standoff": 10, "font": {"size": 13}},
    "tickfont": {"size": 12},
    "zeroline": False,
}

TEMPLATE = go.layout.Template(
    layout={
        "colorway": PALETTE,
        "colorscale": {"diverging": DIVERGING, "sequential": "Viridis"},
        "font": {"family": "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif", "size": 13, "color": TEXT},
        "hoverlabel": {"align": "left", "bgcolor": "#26282C", "bordercolor": TEXT, "font": {"color": "#F4F4F2"}},
        "legend": {
            "orientation": "h",
            "x": 0.0,
            "xanchor": "left",
            "y": 0.0,
            "yanchor": "bottom",
            "yref": "container",
        },
        "margin": {"l": 72, "r": 24, "t": 84, "b": 88},
        "modebar": {"activecolor": BLUE, "bgcolor": "rgba(0,0,0,0)", "color": TEXT},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "title": {
            "font": {"size": 17},
            "subtitle": {"font": {"size": 13, "color": TEXT}},
            "x": 0.012,
            "xanchor": "left",
            "xref": "container",
            "y": 0.96,
            "yanchor": "top",
        },
        "xaxis": {**_AXIS, "showgrid": False, "showline": True},
        "yaxis": _AXIS,
    }
)
"""The template that every figure carries."""


def titled(figure: go.Figure, title: str, subtitle: str, *, width: int = WIDTH, height: int = HEIGHT) -> go.Figure:
    """The figure with the template, a title and a size.

    Args:
        figure: it is changed in place, and returned.
        title: what is seen.
        subtitle: how to read it.
        width: in pixels.
        height: in pixels.
    """
    return figure.update_layout(
        template=TEMPLATE, title={"text": title, "subtitle": {"text": subtitle}}, width=width, height=height
    )


def plotly_text(text: str) -> str:
    """Plain text for Plotly's labels and cells, which read some HTML and, where MathJax is there, LaTeX.

    >>> plotly_text("<b>5 & 6</b> for $7")
    '&lt;b&gt;5 &amp; 6&lt;/b&gt; for &#36;7'
    """
    text = html.escape(text, quote=False)  # Plotly does not decode &quot;
    return text.replace("$", "&#36;").replace("%{", "&#37;{")  # the latter is a placeholder in what hovers


def colours(count: int) -> list[str]:
    """One colour per line: the palette where it suffices, otherwise steps of Viridis without its darkest part.

    >>> colours(2)
    ['#0072B2', '#E69F00']
    """
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return list(sample_colorscale("Viridis", [0.25 + 0.65 * i / (count - 1) for i in range(count)]))


def error_bars(intervals: Sequence[Interval], *, width: int = 6) -> dict[str, object]:
    """``error_y`` from the intervals' ends, which need not lie evenly around the estimates.

    Args:
        intervals: estimates with their ends.
        width: of the caps, in pixels.
    """
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.estimate for i in intervals],
        "arrayminus": [i.estimate - i.low for i in intervals],
        "thickness": 1.6,
        "width": width,
    }


__all__ = [
    "BAND",
    "BLUE",
    "DIVERGING",
    "EDGE",
    "GREEN",
    "GRID",
    "HEIGHT",
    "ORANGE",
    "PALETTE",
    "PURPLE",
    "SKY",
    "TEMPLATE",
    "TEXT",
    "VERMILLION",
    "WIDTH",
    "colours",
    "error_bars",
    "plotly_text",
    "titled",
]
