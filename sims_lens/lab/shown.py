"""How results of the laboratory show themselves: a head, a table, a verdict, as text and as HTML."""

import html
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sims_lens.stats import CONFIDENCE, Interval, bootstrap_mean

Cells = Sequence[tuple[str, ...]]


class Shown(ABC):
    """A result that shows its head, its cells and its verdict."""

    @abstractmethod
    def head(self) -> str:
        """One line: what was measured, on how much."""

    @abstractmethod
    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, its head first."""

    @abstractmethod
    def verdict(self) -> str:
        """What was found, in plain sentences."""

    def __repr__(self) -> str:
        cells = self.cells()
        widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([self.head(), *("  " + row for row in rows), *textwrap.wrap(self.verdict(), 110)])

    def _repr_html_(self) -> str:
        head, *rows = self.cells()
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return (
            f"<p>{html.escape(self.head())}</p><table><tr>{top}</tr>{body}</table><p>{html.escape(self.verdict())}</p>"
        )


def rate(values: Float[np.ndarray, " prompt"], *, seed: int = 0) -> Interval:
    """The mean of shares over prompts, with its interval.

    A bootstrap of what was never seen says [0, 0], and of what was seen once hardly more. So the interval reaches at
    least as far as that of Clopper and Pearson for none of as many trials: 0 of 40 prompts leave room for 9%.

    >>> str(rate(np.zeros(40)))
    '0.000 [0.000, 0.088]'
    """
    found = bootstrap_mean(values, seed=seed)
    reach = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(values))
    return Interval(found.estimate, min(found.low, 1 - reach), max(found.high, reach))


def rate_difference(values: Float[np.ndarray, " prompt"], *, seed: int = 0) -> Interval:
    """The mean of differences of shares over prompts; of none at all as far to both sides as :func:`rate` says."""
    if values.any():
        return bootstrap_mean(values, seed=seed)
    reach = rate(values, seed=seed).high
    return Interval(0.0, -reach, reach)


def signed(interval: Interval | None) -> str:
    """An estimate with its interval and signs, for a cell; "" of None."""
    return "" if interval is None else f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def share(interval: Interval) -> str:
    """A share with its interval, in percent."""
    return f"{100 * interval.estimate:.0f}% [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def columns(**intervals: Interval | None) -> dict[str, Any]:
    """An interval as three columns of a table: estimate, ``_low``, ``_high``."""
    row: dict[str, Any] = {}
    for name, i in intervals.items():
        if i is not None:
            row |= {name: i.estimate, f"{name}_low": i.low, f"{name}_high": i.high}
    return row


def relation(interval: Interval, zero: float = 0.0) -> str:
    """Where an interval lies against no effect: "rises", "falls", or "not shown to change"."""
    if interval.low > zero:
        return "rises"
    return "falls" if interval.high < zero else "is not shown to change"


__all__ = ["Cells", "Shown", "columns", "rate", "rate_difference", "relation", "share", "signed"]
