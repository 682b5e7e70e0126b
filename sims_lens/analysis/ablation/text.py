"""Intervals, counts and tables in words."""

import html
from collections.abc import Sequence

import numpy as np

from sims_lens.stats import Interval


def extremes(values: "Sequence[float] | np.ndarray") -> tuple[float, float]:
    """The smallest and the largest."""
    return float(np.min(values)), float(np.max(values))


def holds_zero(interval: Interval) -> bool:
    """Whether nothing may have happened."""
    return interval.low <= 0 <= interval.high


def columns_of(name: str, interval: Interval | None) -> dict[str, float]:
    """Estimate and ends of an interval as columns of a table; NaN where it is not known."""
    found = Interval(np.nan, np.nan, np.nan) if interval is None else interval
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def spanned(values: Sequence[float], digits: int = 3) -> str:
    """``-0.2 to +0.1``."""
    ends = [f"{end:+.{digits}g}" for end in extremes(values)]
    return " to ".join(dict.fromkeys(ends))


def plain(interval: Interval) -> str:
    """``0.300 [0.100, 0.500]``."""
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def signed(interval: Interval, *, flip: bool = False) -> str:
    """``+0.3 [+0.1, +0.5]``; flipped, a fall as a positive number."""
    if flip:
        return f"{-interval.estimate:.3g} [{-interval.high:.3g}, {-interval.low:.3g}]"
    return f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def percent(interval: Interval) -> str:
    """``30% [10, 50]``."""
    return f"{100 * interval.estimate:.0f}% [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def counted(number: int, what: str) -> str:
    """``1 prompt``, ``2 prompts``."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} (each by itself)"


def text_table(head: str, cells: Sequence[Sequence[str]], below: Sequence[str]) -> str:
    """A table for a terminal, the first row its titles."""
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    rows = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([head, *rows, *below])


def html_table(head: str, cells: Sequence[Sequence[str]], below: Sequence[str]) -> str:
    """The same for a notebook, escaped."""
    titles, *rows = cells
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    end = "<br>".join(html.escape(line) for line in below)
    return f"<p>{html.escape(head)}</p><table><tr>{top}</tr>{body}</table><p>{end}</p>"


__all__ = [
    "columns_of",
    "counted",
    "extremes",
    "holds_zero",
    "listed",
    "percent",
    "plain",
    "signed",
    "spanned",
    "html_table",
    "text_table",
]
