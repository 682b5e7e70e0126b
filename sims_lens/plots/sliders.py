"""Several figures of one kind as one, with a slider that works in a static page.

A step of the slider replaces what differs between the figures and nothing else (Plotly's ``update``). Plotly's frames
are not used: ``show()`` and ``write_html()`` play a figure that has some as soon as it opens.
"""

import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go

from sims_lens.checks import shown
from sims_lens.errors import ConfigError
from sims_lens.plots.theme import BAND, BLUE, EDGE, HEIGHT, TEMPLATE, TEXT, plotly_text

_ROOM: Final = 76
"""Height of the slider with its labels, in pixels."""

_APPEARANCE: Final = {"template", "sliders", "width", "height", "margin", "legend"}
"""What all steps share, as parts of the layout: that of the first figure, with room for the largest."""

_LINE: Final = 16
"""Height of a line of a subtitle, in pixels."""

_PAD: Final = 0.05


def slider(figures: Mapping[str, go.Figure], *, label: str = "layer") -> go.Figure:
    """One figure that steps through others of its kind: a heat-map per iteration, the bars of each layer, and so on.

    Titles, data, marks, ticks and categories change with the step. Axes and colour scales stay, wide enough for all
    figures, so that what is seen to move has moved. It needs no kernel, and nothing plays by itself.

    Args:
        figures: by what the slider calls them, in order; plain text. They are left as they are.
        label: what the slider steps through, for instance "layer" or "coefficient"; plain text.

    Returns:
        The first figure with the slider; a single figure gets none.

    Raises:
        ConfigError: there are no figures, or they differ in their number or kinds of traces.
    """
    if not isinstance(figures, Mapping) or not figures:
        raise ConfigError(f"slider needs figures by name, for instance {{'14': figure}}; got {shown(figures)}")
    for name, figure in figures.items():
        if not isinstance(figure, go.Figure):
            raise ConfigError(f"slider needs figures; {name!r} is a {type(figure).__name__}: draw it first")
    names = [str(name) for name in figures]
    steps = [_plain(figure.to_plotly_json()) for figure in figures.values()]
    _check_kinds(names, steps)
    for step in steps:
        for trace in step["data"]:
            trace.pop("uid", None)
    _share_ranges(steps)
    _share_colours(steps)
    first = steps[0]
    traces, layout = _changes([s["data"] for s in steps]), _layout_changes([s["layout"] for s in steps])
    figure = go.Figure(first)
    if len(steps) == 1:
        return figure
    made = [
        {
            "label": plotly_text(name),
            "method": "update",
            "args": [{key: values[k] for key, values in traces.items()}, {key: v[k] for key, v in layout.items()}],
        }
        for k, name in enumerate(names)
    ]
    below = _make_room(figure, [s["layout"] for s in steps])
    return figure.update_layout(sliders=[_control(made, plotly_text(label), below)])


def _control(steps: Sequence[Mapping[str, Any]], label: str, below: float | int) -> dict[str, Any]:
    """The slider itself, ``below`` pixels above the plot area."""
    return {
        "active": 0,
        "steps": list(steps),
        "x": 0.0,
        "len": 1.0,
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"t": 0, "b": below, "l": 0, "r": 0},
        "currentvalue": {"prefix": f"{label}: ", "font": {"size": 13, "color": TEXT}, "offset": 8},
        "font": {"size": 11, "color": TEXT},
        "bgcolor": BAND,
        "activebgcolor": BLUE,
        "bordercolor": EDGE,
        "borderwidth": 1,
        "tickcolor": TEXT,
        "ticklen": 4,
        "minorticklen": 3,
        "transition": {"duration": 0},
    }


def _make_room(figure: go.Figure, layouts: Sequence[Mapping[str, Any]]) -> float:
    """Size and margins of the largest figure, higher by the slider, which comes between the subtitle and the plot.

    There it is in nobody's way: at the bottom are the legend and axis labels, whose height is only known when they are
    drawn. What a figure has set aside at the top for more than a subtitle, such as titles of small multiples, stays
    below the slider: returns that height, in pixels.
    """
    usual = TEMPLATE.layout.margin.to_plotly_json()
    margin = {side: max(of.get("margin", {}).get(side, usual[side]) for of in layouts) for side in ("l", "r", "t", "b")}
    before = max(of.get("height", HEIGHT) for of in layouts)
    figure.update_layout(height=before + _ROOM, margin=margin | {"t": margin["t"] + _ROOM})
    if widths := [of["width"] for of in layouts if "width" in of]:
        figure.update_layout(width=max(widths))
    title = TEMPLATE.layout.title.y if figure.layout.title.y is None else figure.layout.title.y
    figure.update_layout(title_y=1 - (1 - title) * before / (before + _ROOM))
    lines = max(str((of.get("title", {}).get("subtitle") or {}).get("text")).count("<br>") for of in layouts)
    return float(max(0, margin["t"] - usual["t"] - _LINE * lines) + 8)


# What differs


def _plain(value: Any) -> Any:
    """A copy with arrays as lists, so that values can be compared."""
    if isinstance(value, Mapping) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]).newbyteorder("<"))
        return array.reshape([int(n) for n in str(value.get("shape", len(array))).split(",")]).tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _check_kinds(names: Sequence[str], steps: Sequence[Mapping[str, Any]]) -> None:
    kinds = [[trace.get("type", "scatter") for trace in step["data"]] for step in steps]
    for name, found in zip(names, kinds, strict=True):
        if found != kinds[0]:
            raise ConfigError(
                f"figure {name!r} has the traces {_counted(found)}, figure {names[0]!r} has {_counted(kinds[0])}; "
                "a slider needs the same traces in every figure"
            )


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every attribute that is no object, by its name as Plotly writes it: ``("marker.color", ...)``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield ".".join(path), value


def _changes(steps: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[list[Any]]]:
    """Attributes that differ in any trace: for each step the value of each trace, None for the default."""
    flat = [[dict(_leaves(trace)) for trace in traces] for traces in steps]
    found: dict[str, list[list[Any]]] = {}
    for index in range(len(flat[0])):
        of_trace = [traces[index] for traces in flat]
        for key in dict.fromkeys(key for trace in of_trace for key in trace):
            if any(trace.get(key) != of_trace[0].get(key) for trace in of_trace):
                found[key] = [[trace.get(key) for trace in traces] for traces in flat]
    return found


def _layout_changes(layouts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Attributes of the layout that differ: for each step the value, None for the default."""
    flat = [dict(_leaves({k: v for k, v in layout.items() if k not in _APPEARANCE})) for layout in layouts]
    found = {}
    for key in dict.fromkeys(key for layout in flat for key in layout):
        default: Any = [] if key in ("annotations", "shapes", "images") else None
        values = [layout.get(key, default) for layout in flat]
        if any(value != values[0] for value in values):
            found[key] = values
    return found


# What stays: axes and colour scales


def _share_ranges(steps: Sequence[dict[str, Any]]) -> None:
    """Give every axis one range over all steps, and category axes the order of each step's own categories."""
    template = TEMPLATE.layout.to_plotly_json()
    for group in _axes(steps[0]):
        way = group[0][0]
        settings = [[step["layout"].setdefault(_name(axis), {}) for axis in group] for step in steps]
        kinds = {chosen.get("type") for chosens in settings for chosen in chosens} - {None, "-"}
        if "category" in kinds or (not kinds and any(_words(step, group) for step in steps)):
            _share_categories(steps, group, settings)
        elif not kinds & {"date", "multicategory"}:
            log = (kinds or {template.get(f"{way}axis", {}).get("type")}) == {"log"}
            values = [value for step in steps for value in _extent(step, group)]
            bars = any(_is_length(trace, way) for step in steps for trace in _on(step, group))
            _share_range([c for chosens in settings for c in chosens], values, log=log, bars=bars)


def _name(axis: str) -> str:
    """``"x2"`` is ``xaxis2`` in a layout."""
    return f"{axis[0]}axis{axis[1:]}"


def _axes(step: Mapping[str, Any]) -> list[list[str]]:
    """The axes that traces are drawn on, those that match one another together; tables and the like have none."""
    drawn = [trace for trace in step["data"] if {"x", "y", "z"} & trace.keys()]
    groups: dict[str, list[str]] = {}
    for axis in dict.fromkeys(trace.get(f"{way}axis") or way for trace in drawn for way in "xy"):
        groups.setdefault(step["layout"].get(_name(axis), {}).get("matches") or axis, []).append(axis)
    return list(groups.values())


def _on(step: Mapping[str, Any], axes: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """The step's visible traces on some axes."""
    for trace in step["data"]:
        if trace.get("visible", True) is not False and (trace.get(f"{axes[0][0]}axis") or axes[0][0]) in axes:
            yield trace


def _words(step: Mapping[str, Any], axes: Sequence[str]) -> bool:
    """Whether an axis without a type is one of categories: it has texts that are no numbers."""
    return any(isinstance(v, str) and not _reads_as_number(v) for t in _on(step, axes) for v in t.get(axes[0][0]) or ())


def _share_categories(
    steps: Sequence[Mapping[str, Any]], axes: Sequence[str], settings: Sequence[Sequence[dict[str, Any]]]
) -> None:
    """As many places as the step with the most categories has; each step's own come in their order."""
    most, longest = 0, 0
    for step, chosens in zip(steps, settings, strict=True):
        drawn = [v for trace in _on(step, axes) for v in trace.get(axes[0][0]) or () if v is not None]
        for chosen in chosens:
            categories = list(dict.fromkeys([*(chosen.get("categoryarray") or ()), *drawn]))
            most = max(most, len(categories))
            longest = max([longest, *(len(html.unescape(str(category))) for category in categories)])
            chosen["type"] = "category"
            if chosen.get("categoryorder", "array") in ("trace", "array"):
                chosen |= {"categoryorder": "array", "categoryarray": categories}
    every = [chosen for chosens in settings for chosen in chosens]
    asked = [c["range"] for c in every if None not in (c.get("range") or [None])]
    backwards = every[0].get("autorange") == "reversed" or any(a > b for a, b in asked)
    ends = [min(min(r) for r in asked), max(max(r) for r in asked)] if asked else [-0.5, most - 0.5]
    for chosen in every:
        chosen.pop("autorange", None)
        chosen["range"] = ends[::-1] if backwards else list(ends)
    if axes == ["y"]:  # or the plot would jump sideways with the length of its labels
        for step in steps:
            margin = step["layout"].setdefault("margin", {})
            margin["l"] = max(margin.get("l", 0), min(260, 40 + 7 * longest))


def _share_range(settings: Sequence[dict[str, Any]], values: Sequence[float | int], *, log: bool, bars: bool) -> None:
    """The widest range that any step asks for; where one leaves an end open, that end is of the data."""
    given = [list(s.get("range") or (None, None)) for s in settings]
    backwards = settings[0].get("autorange") == "reversed" or any(None not in r and r[0] > r[1] for r in given)
    if backwards:
        given = [r[::-1] for r in given]
    kept = [math.log10(v) for v in values if v > 0] if log else list(values)
    if not kept and any(None in r for r in given):
        return
    low, high = (min(kept), max(kept)) if kept else (0.0, 0.0)
    pad = _PAD * (high - low) or _PAD * abs(high) or _PAD
    bars = bars and not log
    low, high = (low if bars and low == 0 else low - pad), (high if bars and high == 0 else high + pad)
    if not log and any(s.get("rangemode") in ("tozero", "nonnegative") for s in settings):
        low, high = min(low, 0.0), max(high, 0.0)
    ends = [
        min(low if r[0] is None else r[0] for r in given),
        max(high if r[1] is None else r[1] for r in given),
    ]
    for chosen in settings:
        chosen.pop("autorange", None)
        chosen["range"] = ends[::-1] if backwards else list(ends)


def _is_length(trace: Mapping[str, Any], way: str) -> bool:
    """Whether a trace has bars that begin at zero along ``way``."""
    return trace.get("type") == "bar" and way == ("x" if trace.get("orientation") == "h" else "y")


def _extent(step: Mapping[str, Any], axes: Sequence[str]) -> Iterator[float | int]:
    """Every number that the step draws on some axes, ends of error bars, of bars and of cells included."""
    way = axes[0][0]
    other = "y" if way == "x" else "x"
    stacked = step["layout"].get("barmode") in ("stack", "relative")
    piles: dict[tuple[str, Any, bool], float] = {}
    for trace in _on(step, axes):
        kind = trace.get("type", "scatter")
        if kind in ("heatmap", "contour"):
            yield from _cells(trace, way)
            continue
        held = trace.get(way)
        places = list(range(len(trace.get(other) or ()))) if held is None and kind != "box" else held or []
        values = [v for v in places if _is_number(v)]
        yield from values
        if kind == "box" and way == "y":
            yield from (v for part in _FENCES for v in trace.get(part) or () if _is_number(v))
        bars = trace.get(f"error_{way}") or {}
        for part, sign in (("array", 1), ("arrayminus" if "arrayminus" in bars else "array", -1)):
            pairs = zip(places, bars.get(part) or (), strict=False)
            yield from (v + sign * error for v, error in pairs if _is_number(v) and _is_number(error))
        if _is_length(trace, way):
            yield 0.0
            for where, value in zip(trace.get(other) or range(len(places)), places, strict=False):
                if stacked and _is_number(value):
                    pile = trace.get(f"{way}axis") or way, where, value > 0
                    piles[pile] = piles.get(pile, 0.0) + value
        elif kind in ("bar", "box") and values:
            yield from (min(values) - 0.5, max(values) + 0.5)
    yield from piles.values()


_FENCES: Final = ("lowerfence", "q1", "median", "q3", "upperfence")


def _cells(trace: Mapping[str, Any], way: str) -> Iterator[float | int]:
    """Both outer edges of a heat-map."""
    rows = trace.get("z") or [[]]
    count = len(rows[0]) if way == "x" else len(rows)
    places = [v for v in trace.get(way) or range(count) if _is_number(v)]
    if places:
        half = (max(places) - min(places)) / (len(places) - 1) / 2 if len(places) > 1 else 0.5
        yield from (min(places) - half, max(places) + half)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _share_colours(steps: Sequence[Mapping[str, Any]]) -> None:
    """One colour scale over all steps for each trace (its ``z``, or its ``marker``), and for shared colour axes."""
    for index in range(len(steps[0]["data"])):
        traces = [step["data"][index] for step in steps]
        _share_ends(traces, "z", [v for trace in traces for v in _numbers(trace.get("z"))])
        markers = [trace.get("marker") for trace in traces]
        if all(isinstance(marker, dict) for marker in markers):
            _share_ends(markers, "c", [v for m in markers for v in _numbers(m.get("color"))])
    for axis in dict.fromkeys(key for step in steps for key in step["layout"] if key.startswith("coloraxis")):
        drawn = [t for step in steps for t in step["data"]]
        values = [v for t in drawn if t.get("coloraxis") == axis for v in _numbers(t.get("z"))]
        marks = [t.get("marker") or {} for t in drawn]
        values += [v for m in marks if m.get("coloraxis") == axis for v in _numbers(m.get("color"))]
        _share_ends([step["layout"].setdefault(axis, {}) for step in steps], "c", values)


def _share_ends(holders: Sequence[Any], letter: str, values: Sequence[float | int]) -> None:
    """Set ``zmin`` and ``zmax`` (or ``cmin`` and ``cmax``) of all holders to the widest that any has, or that the
    values need."""
    low, middle, high = f"{letter}min", f"{letter}mid", f"{letter}max"
    ends = {}
    for name, pick in ((low, min), (high, max)):
        asked = [h[name] for h in holders if h.get(name) is not None]
        if len(asked) < len(holders) and values:
            asked.append(pick(values))
        if not asked:
            return
        ends[name] = pick(asked)
    if (centre := holders[0].get(middle)) is not None:
        half = max(ends[high] - centre, centre - ends[low])
        ends = {low: centre - half, high: centre + half}
    for holder in holders:
        holder |= ends


def _numbers(value: Any) -> Iterator[float | int]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif _is_number(value):
        yield value


__all__ = ["slider"]
