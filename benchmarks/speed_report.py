"""What ``speed.py`` measured, as ratios, a markdown page and a figure: pure functions of its JSON."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

REFERENCE = {"sampling": "HF generate", "extraction": "steering-vectors, batch 8", "growth": "HF generate"}


class Ratio(NamedTuple):
    """A median over rounds, with the smallest and the largest."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        if self.rounds == 1:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(record: Mapping[str, Any], reference: Mapping[str, Any]) -> Ratio | None:
    """How many times as fast as the reference, round by round: only rounds that both took part in count.

    Args:
        record: ``{"rounds": [{"seconds": ..., "units": ...} or None, ...]}``; units are tokens, or pairs.
        reference: the same of the one that is 1.

    Returns:
        None where they share no round.
    """
    pairs = zip(record["rounds"], reference["rounds"], strict=True)
    ratios = [rate(ours) / rate(theirs) for ours, theirs in pairs if ours and theirs]
    return Ratio(median(ratios), min(ratios), max(ratios), len(ratios)) if ratios else None


def rate(turn: Mapping[str, Any]) -> float:
    """Units per second of one turn."""
    return float(turn["units"] / turn["seconds"])


def median_rate(record: Mapping[str, Any]) -> float | None:
    """Units per second, the median over rounds; None where there is none."""
    rates = [rate(turn) for turn in record["rounds"] if turn]
    return median(rates) if rates else None


def rows(cell: Mapping[str, Any], reference: str) -> Iterator[tuple[str, float | None, Ratio | None, str | None]]:
    """Name, median rate, ratio and error of every contestant of a cell."""
    records = {record["name"]: record for record in cell["records"]}
    base = records.get(reference)
    for name, record in records.items():
        found = ratio(record, base) if base else None
        yield name, median_rate(record), found, record.get("error")


# Markdown


def page(results: Mapping[str, Any]) -> str:
    """Everything as markdown."""
    parts = results["parts"]
    writers = {
        "sampling": _rates,
        "extraction": _rates,
        "memory": _memory,
        "limits": _limits,
        "growth": _growth,
    }
    return "\n\n".join(
        f"### {name}\n\n{_machine(parts[name])}\n\n{write(name, parts)}"
        for name, write in writers.items()
        if name in parts
    )


def _machine(part: Mapping[str, Any]) -> str:
    machine = part["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({machine['capability']}), {machine['device']}; {versions}; "
        f"Python {machine['python']}; commit {machine['commit']}, {machine['when']}; "
        f"load {machine['load']} at the start; {part['settings']}."
    )


def _table(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _rates(name: str, parts: Mapping[str, Any]) -> str:
    unit = "tokens" if name == "sampling" else "pairs"
    tables = []
    for title, cell in parts[name]["cells"].items():
        body = [
            [who, "" if speed is None else f"{speed:.1f}", found or "", error or ""]
            for who, speed, found, error in rows(cell, REFERENCE[name])
        ]
        head = ["", f"{unit} per CPU second", f"against {REFERENCE[name]}", ""]
        if not any(line[-1] for line in body):
            head, body = head[:-1], [line[:-1] for line in body]
        tables.append(f"**{title}** ({cell['about']}{_fill(cell)})\n\n{_table(head, body)}")
    return "\n\n".join(tables)


def _fill(cell: Mapping[str, Any]) -> str:
    """How long responses were, where they could end by themselves."""
    job, turns = (
        cell.get("job", {"stops": []}),
        [turn for record in cell["records"] for turn in record["rounds"] if turn],
    )
    if not job["stops"] or not turns:
        return ""
    longest = job["prompts"] * job["n"] * job["tokens"]
    return f"; responses were {100 * median(turn['units'] for turn in turns) / longest:.0f}% as long as they could be"


def _memory(name: str, parts: Mapping[str, Any]) -> str:
    tables = []
    for title, cell in parts[name]["cells"].items():
        body = [
            [r["name"], *(f"{r[key]:.0f}" if key in r else "" for key in ("held", "extra", "peak")), r.get("error", "")]
            for r in cell["records"]
        ]
        head = ["MiB", "after a tiny job", "extra at the peak", "peak", ""]
        tables.append(f"**{title}** ({cell['about']})\n\n{_table(head, body)}")
    return "\n\n".join(tables)


def _limits(name: str, parts: Mapping[str, Any]) -> str:
    found = parts[name]["limits"]
    body = [
        [
            p["dtype"],
            p["rows"],
            f"{p['plain_ms']:.0f}",
            f"{p['prepacked_ms']:.0f}" if "prepacked_ms" in p else "",
            f"{p['gflops']:.0f}",
            f"{p['tokens_per_second']:.0f}",
            f"{p['bandwidth_tokens_per_second']:.0f}",
        ]
        for p in found["products"]
    ]
    head = ["dtype", "rows", "plain, ms", "prepacked, ms", "GFLOP/s", "tokens/s by products", "tokens/s by bandwidth"]
    text = [
        f"Memory is read at {found['bandwidth_gb_per_second']:.1f} GB/s; all products of one step:",
        _table(head, body),
    ]
    shares = list(_shares(parts))
    if shares:
        text += ["Of what the products allow (prompts run once each, then every step):"]
        text += [_table(["cell", "", "allowed, tokens/s", "reached", "share"], shares)]
    for who, profile in parts[name]["profiles"].items():
        if "error" in profile:
            text += [f"Profile of {who}: {profile['error']}"]
            continue
        groups = ", ".join(f"{group} {100 * share:.0f}%" for group, share in profile["shares"].items())
        longest = ", ".join(f"{op} {100 * share:.0f}%" for op, share in profile["longest"].items())
        text += [f"Profile of {who}: {groups}. Longest: {longest}."]
    return "\n\n".join(text)


def _shares(parts: Mapping[str, Any]) -> Iterator[list[str]]:
    """What part of the time is the matrix products' own, if the prompts are run once and every step is full."""
    products = {(p["dtype"], p["rows"]): p for p in parts["limits"]["limits"]["products"]}
    for title, cell in parts.get("sampling", {"cells": {}})["cells"].items():
        job = cell["job"]
        count = job["prompts"] * job["n"]
        if job["stops"] or ("float32", count) not in products:
            continue
        prefill_rows = max(r for _, r in products)
        for who, speed, _, _ in rows(cell, REFERENCE["sampling"]):
            kind = "bfloat16" if "bfloat16" in who else "float32"
            shown = who.startswith("HF") or (who.startswith("ours") and who.endswith(("plain", "8 layers")))
            if speed is None or not shown:
                continue
            prefill = job["prompt_tokens"] / products[kind, prefill_rows]["tokens_per_second"]
            steps = (job["tokens"] - 1) * count / products[kind, count]["tokens_per_second"]
            allowed = count * job["tokens"] / (prefill + steps)
            yield [title, who, f"{allowed:.0f}", f"{speed:.0f}", f"{100 * speed / allowed:.0f}%"]


def _growth(name: str, parts: Mapping[str, Any]) -> str:
    body = []
    for axis, points in parts[name]["axes"].items():
        for point in points:
            for who, speed, found, error in rows(point["cell"], REFERENCE["growth"]):
                cost = "" if speed is None else f"{1000 * point['tokens'] / speed:.0f}"
                body.append([axis, point["value"], who, cost, found or "", error or ""])
    return _table(["axis", "value", "", "CPU ms per sample", "against HF", ""], body)


# Figures


def figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """By name: bars against the neighbours, and how the cost of a sample grows, as far as they were measured."""
    parts = results["parts"]
    drawn = {}
    if "sampling" in parts or "extraction" in parts:
        drawn["speed"] = _against_others(results)
    if "growth" in parts:
        drawn["speed_growth"] = _growing(parts["growth"]["axes"])
    return drawn


def _colour(name: str) -> str:
    from sims_lens.plots.theme import BLUE, ORANGE, PURPLE, TEXT

    if not name.startswith("ours"):
        return TEXT
    return PURPLE if "hook at" in name else ORANGE if "bfloat16" in name else BLUE


def _against_others(results: Mapping[str, Any]) -> Any:
    """Ratios of the first cell of sampling and of extraction."""
    from plotly.subplots import make_subplots

    from sims_lens.plots.theme import GRID, TEXT, titled

    bars = [sorted(_bars(results, part), key=lambda bar: bar[1].median) for part in ("sampling", "extraction")]
    drawn = make_subplots(
        rows=2,
        cols=1,
        row_heights=[max(1, len(found)) for found in bars],
        vertical_spacing=0.08,
        subplot_titles=[
            f"sampling: tokens per second, {REFERENCE['sampling']} (unsteered, float32) = 1",
            f"reading contrast pairs: pairs per second, {REFERENCE['extraction']} = 1",
        ],
    )
    for row, found in enumerate(bars, start=1):
        drawn.add_bar(
            orientation="h",
            y=[f"{name}: {r.median:.2f}" for name, r in found],
            x=[r.median for _, r in found],
            marker={"color": [_colour(name) for name, _ in found]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [r.high - r.median for _, r in found],
                "arrayminus": [r.median - r.low for _, r in found],
                "thickness": 1.4,
                "width": 4,
                "color": "#333333",
            },
            showlegend=False,
            row=row,
            col=1,
        )
        drawn.add_vline(x=1, line={"color": TEXT, "dash": "dot"}, row=row, col=1)
    titled(
        drawn,
        "Speed of sampling and of reading, against the neighbours",
        "one thread, medians over interleaved rounds, whiskers from the slowest to the fastest<br>"
        "blue: ours in float32, orange: in bfloat16, purple: with a hook of the user's, grey: others",
        width=1100,
        height=260 + 22 * sum(len(found) for found in bars),
    )
    drawn.update_xaxes(rangemode="tozero", showgrid=True, gridcolor=GRID)
    return drawn.update_layout(margin={"t": 150, "b": 40}, title={"y": 0.98})


def _growing(axes: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """The cost of a sample along each axis."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from sims_lens.plots.theme import titled

    drawn = make_subplots(rows=1, cols=len(axes), subplot_titles=list(axes), horizontal_spacing=0.05)
    named: set[str] = set()
    for column, points in enumerate(axes.values(), start=1):
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            for who, speed, _, _ in rows(point["cell"], REFERENCE["growth"]):
                if speed is not None:
                    lines.setdefault(who, []).append((point["value"], point["tokens"] / speed))
        for who, line in lines.items():
            x, y = zip(*line, strict=True)
            look = {"mode": "lines+markers", "line": {"color": _colour(who)}, "showlegend": who not in named}
            drawn.add_trace(go.Scatter(x=x, y=y, name=who, **look), row=1, col=column)
            named.add(who)
        drawn.update_xaxes(tickvals=[point["value"] for point in points], row=1, col=column)
    drawn.update_yaxes(rangemode="tozero")
    drawn.update_yaxes(title_text="seconds per sample", row=1, col=1)
    titled(
        drawn,
        "What a sample costs",
        "one axis varied at a time, one thread; ours steered, HF generate unsteered",
        width=1300,
        height=420,
    )
    return drawn.update_layout(margin={"t": 120})


def _bars(results: Mapping[str, Any], part: str) -> list[tuple[str, Ratio]]:
    cells = results["parts"].get(part, {"cells": {}})["cells"]
    first = next(iter(cells.values()), None)
    found = rows(first, REFERENCE[part]) if first else ()
    return [(name, ratio) for name, _, ratio, _ in found if ratio]
