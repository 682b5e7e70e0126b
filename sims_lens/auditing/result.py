"""What an audit found, and the rule that makes a verdict of it.

**Judges and oracles.** A ranker that says ``judges = True`` about itself holds opinions about something outside of it
(a model as a judge, a reward model): it may be wrong, and has to show that it is better than a coin. Any other ranker
is an oracle: its score *is* what is meant by good. Reading ease cannot tell an answer from an answer to another
prompt, and need not: it only has to give the same verdict again. With a reference, a ranker of either kind has to agree
with that.

**The verdict** rests on intervals, never on estimates. What decides is

- with a reference: how often it agrees that the best response is better than the worst, which is all that a contrast
  pair uses of a ranking;
- for a judge without one: how often it is right on known-answer pairs of equal length (a response against its own words
  shuffled, and against an answer to another prompt). Truncated responses are measured but don't decide: a ranker that
  knows nothing but length gets all of them right;
- for an oracle without one: nothing; see below.

*No better than chance*: the interval of what decides does not lie above 1/2. The burden of proof is on the judge: what
has shown nothing, or not yet, is not to be learnt from. An oracle has to be shown to be noise: asked again, or in the
other order, it agrees with itself no better than a coin would (the interval holds 1/2, and ends below 2/3). A ranker of
either kind is, if the responses to every prompt tie.

*Usable*: what decides, its agreement with itself when asked again, and that in the other order, all lie surely (with
the whole interval) at 2/3 or above; a judge without a reference is surely better than a coin on each of the two kinds
of pair alone; it isn't sure that the responses tie on more than half of the prompts, nor that as many of its verdicts
go round in circles as a coin's (1/4).

*Weak*: anything in between. A run may go on, and its report should say so.

Why 2/3: labels that are right with probability a leave 2a - 1 of the mean difference (E[v] = (1 - 2 eps) v_0), so that
1 / (2a - 1)^2 as many pairs are needed for a direction as clear as a perfect ranker's. At 2/3 a third of it is left,
and nine times the pairs; at 0.6 it would be 25 times. The bound is one of usefulness, not of significance.

Even of a perfect ranker this needs 7 prompts to tell it from a coin, and 11 to call it usable; 20 to 30 are a good
number.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from sims_lens.auditing.agreement import rate_interval
from sims_lens.cost import Cost
from sims_lens.stats import Interval
from sims_lens.typed import known_fields, read_as

if TYPE_CHECKING:
    import pandas as pd

Verdict: TypeAlias = Literal["usable", "weak", "no better than chance"]

COIN: Final = 0.5
SURE: Final = 2 / 3
CIRCLES: Final = 0.25
HABIT: Final = 0.6
"""A habit (first shown, longer) is mentioned where it surely decides six pairs of ten, 1.5 times as many as not."""


@dataclass(frozen=True)
class Measure:
    """What a figure of an audit means.

    Args:
        field: its name in :class:`Audit`.
        label: in words.
        scale: "rate" in [0, 1], "correlation" in [-1, 1], or "units" of the ranker.
        chance: what a coin would get; None where a coin means nothing.
        good: on which side of chance a good ranker lies; "chance" for a bias.
        absent: why it may be missing.
    """

    field: str
    label: str
    scale: Literal["rate", "correlation", "units"]
    chance: float | None
    good: Literal["high", "low", "chance"]
    absent: str


def _rate(name: str, label: str, absent: str) -> Measure:
    return Measure(name, label, "rate", COIN, "high", absent)


_SHORT: Final = "no response is long enough to be spoilt"
_SAME: Final = "no prompt has two different responses"
_REFERENCE: Final = "no reference, or nothing to agree on"
_MATRIX: Final = "does not apply: it gives scores, no single verdicts on pairs"

MEASURES: Final = (
    _rate("reference_accuracy", "reference agrees: best over worst", _REFERENCE),
    Measure("reference_tau", "Kendall's tau with the reference", "correlation", 0.0, "high", _REFERENCE),
    _rate("known_equal_length", "right on known answers of equal length", _SHORT),
    _rate("known_shuffled", "… against its words shuffled", _SHORT),
    _rate("known_other", "… against another prompt's answer", _SHORT),
    _rate("known_truncated", "right against its own first third", _SHORT),
    _rate("known_pooled", "right on all known answers", _SHORT),
    _rate("repetition_stability", "same verdict when asked again", "it was asked once (repeats = 1)"),
    _rate("position_consistency", "same verdict in the other order", _SAME),
    _rate("single_order_consistency", "same single verdict in the other order", _MATRIX),
    Measure("first_wins", "the first one shown wins", "rate", COIN, "chance", _SAME),
    Measure("cyclic_triples", "triples that go round in a circle", "rate", CIRCLES, "low", _MATRIX),
    Measure("length_tau", "Kendall's tau with length", "correlation", 0.0, "chance", "the lengths or the scores tie"),
    Measure("all_tied", "prompts whose responses all tie", "rate", None, "low", _SAME),
    Measure("spread", "SD of scores within a prompt", "units", None, "high", _SAME),
)
"""Every measure of :class:`Audit`, in the order of tables and of the reliability card."""


@dataclass(frozen=True)
class MarginBand:
    """Agreement with the reference on a third of the contrast pairs.

    Args:
        low, high: the smallest and the largest margin among them, in the ranker's units.
        accuracy: how often the reference agrees that the best is better than the worst.
    """

    low: float
    high: float
    accuracy: Interval


@dataclass(frozen=True)
class Audit:
    """How far a ranker can be trusted; made by :func:`sims_lens.auditing.audit`. A measure that does not apply is None.

    All intervals are 95%, clustered by prompt; rates and correlations have Wilson-type ones
    (:func:`sims_lens.auditing.agreement.rate_interval`). Ties count half. "The same verdict" is over all pairs of a
    prompt's responses: 1 for the same winner, or a tie both times; 0 for opposite winners; 1/2 where one is a tie.

    Args:
        ranker: its name.
        kind: "judge" or "oracle", see :mod:`sims_lens.auditing.result`.
        reference: the name of the reference ranker, if one was given.
        prompts: how many prompts.
        responses: how many different responses in all.
        reference_accuracy: how often the reference agrees that the best response is better than the worst.
        reference_tau: Kendall's tau-b with the reference within a prompt, mean over the prompts where it is defined.
        reference_by_margin: the same as ``reference_accuracy``, by thirds of the margin, small ones first.
        known_equal_length: how often it is right on known-answer pairs of equal length (the next two kinds).
        known_shuffled: ... on a response against itself with its words shuffled.
        known_other: ... on a response against one to another prompt, the nearest in length.
        known_truncated: ... on a response against its first third.
        known_pooled: ... on all three kinds.
        repetition_stability: the same verdict when asked again.
        position_consistency: the same verdict when the list is given in reverse order.
        single_order_consistency: of pairwise rankers, the same verdict of single questions in both orders. Where both
            orders are averaged, as they should be, this may be poor while ``position_consistency`` is perfect.
        first_wins: how often the response shown earlier wins, over both orders, of single verdicts where there are
            some: 1/2 is no bias.
        cyclic_triples: of pairwise rankers, triples of responses that go round in a circle.
        length_tau: Kendall's tau-b of the scores with the length in characters.
        all_tied: prompts whose responses all get the same score, which give no contrast pair.
        spread: standard deviation of the scores within a prompt, in the ranker's units.
        comparisons: how many comparisons are behind each measure that is there.
        cost: of asking the ranker (not the reference).
    """

    ranker: str
    kind: Literal["judge", "oracle"]
    reference: str | None
    prompts: int
    responses: int
    reference_accuracy: Interval | None
    reference_tau: Interval | None
    reference_by_margin: tuple[MarginBand, ...]
    known_equal_length: Interval | None
    known_shuffled: Interval | None
    known_other: Interval | None
    known_truncated: Interval | None
    known_pooled: Interval | None
    repetition_stability: Interval | None
    position_consistency: Interval | None
    single_order_consistency: Interval | None
    first_wins: Interval | None
    cyclic_triples: Interval | None
    length_tau: Interval | None
    all_tied: Interval | None
    spread: Interval | None
    comparisons: dict[str, int]
    cost: Cost

    @property
    def verdict(self) -> Verdict:
        """One of "usable", "weak" and "no better than chance", by the rule in :mod:`sims_lens.auditing.result`."""
        return _verdict(self)[0]

    @property
    def reason(self) -> str:
        """Why, in plain words with the figures that decided."""
        return _verdict(self)[1]

    def table(self) -> "pd.DataFrame":
        """One row per measure: label, estimate, low, high, chance, comparisons, and why it is missing if it is."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for measure in MEASURES:
            interval: Interval | None = getattr(self, measure.field)
            figure = Interval(math.nan, math.nan, math.nan) if interval is None else interval
            rows.append(
                {
                    "measure": measure.field,
                    "label": measure.label,
                    "estimate": figure.estimate,
                    "low": figure.low,
                    "high": figure.high,
                    "chance": math.nan if measure.chance is None else measure.chance,
                    "comparisons": self.comparisons.get(measure.field, 0),
                    "note": measure.absent if interval is None else "",
                }
            )
        return pd.DataFrame(rows).set_index("measure")

    def to_json(self) -> dict[str, Any]:
        """Plain data: intervals as ``[estimate, low, high]`` or None; with the verdict and its reason, for a reader."""
        bands = [{"low": b.low, "high": b.high, "accuracy": b.accuracy.to_json()} for b in self.reference_by_margin]
        rest = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {"verdict": self.verdict, "reason": self.reason, **rest, "reference_by_margin": bands}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Audit":
        """The inverse of :meth:`to_json`; the verdict is worked out anew.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, known_fields(cls, data))  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        head = f"Audit of {self.ranker} ({self.kind}): {self.verdict}"
        lines = [head, *(f"  {line}" for line in self._about()), "", as_text(_HEAD, self._cells()), ""]
        return "\n".join([*lines, *(f"  {line}" for line in self._absent())]).rstrip()

    def _repr_html_(self) -> str:
        head = f"<b>Audit</b> of {html.escape(self.ranker)} ({self.kind}): <b>{self.verdict}</b>"
        about = "<br>".join(html.escape(line) for line in self._about())
        absent = "<br>".join(html.escape(line) for line in self._absent())
        return f"<p>{head}<br>{about}</p>{as_html(_HEAD, self._cells())}<p>{absent}</p>"

    def _about(self) -> list[str]:
        against = f", reference {self.reference}" if self.reference else ""
        asked = f"{self.prompts} prompts, {self.responses} different responses{against}; {self.cost}"
        return [f"{self.reason[:1].upper()}{self.reason[1:]}.", asked]

    def _cells(self) -> list[tuple[str, ...]]:
        cells: list[tuple[str, ...]] = []
        for measure in MEASURES:
            interval: Interval | None = getattr(self, measure.field)
            if interval is None:
                continue
            chance = "" if measure.chance is None else f"{measure.chance:g}"
            count = str(self.comparisons[measure.field])
            cells.append((measure.label, figure(interval, measure.scale), chance, count))
            if measure.field == "reference_accuracy":
                for band in self.reference_by_margin:
                    label = f"… margins {band.low:.3g} to {band.high:.3g}"
                    cells.append((label, figure(band.accuracy, "rate"), f"{COIN:g}", ""))
        return cells

    def _absent(self) -> list[str]:
        """What was not measured, by reason."""
        missing: dict[str, list[str]] = {}
        for measure in MEASURES:
            if getattr(self, measure.field) is None:
                missing.setdefault(measure.absent, []).append(measure.label.removeprefix("… "))
        return [f"Not measured: {', '.join(labels)} ({reason})" for reason, labels in missing.items()]


_HEAD: Final = ("measure", "estimate [95%]", "chance", "comparisons")


@dataclass(frozen=True)
class PairAudit:
    """How the ranker stands by the contrast pairs of one iteration; made by :func:`sims_lens.auditing.audit_pairs`.

    Args:
        ranker: its name.
        reference: the name of the reference ranker, if one was given.
        pairs: how many pairs; without any, every figure is None.
        position_consistency: the same verdict whichever of the two is shown first.
        upheld: asked about the two alone, in either order, the best is again the better one. The best and the worst of
            K are extremes: noise is among what made them so, and shows here as a rate below 1.
        length_gap: tokens of the best less those of the worst.
        reference_accuracy: how often the reference agrees that the best is better than the worst.
        cost: of asking the ranker (not the reference).
    """

    ranker: str
    reference: str | None
    pairs: int
    position_consistency: Interval | None = None
    upheld: Interval | None = None
    length_gap: Interval | None = None
    reference_accuracy: Interval | None = None
    cost: Cost = field(default_factory=Cost)

    def to_json(self) -> dict[str, Any]:
        """Plain data: intervals as ``[estimate, low, high]`` or None."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PairAudit":
        """The inverse of :meth:`to_json`.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, data)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{self._about()}\n{as_text(_HEAD[:2], self._cells())}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._about())}</p>{as_html(_HEAD[:2], self._cells())}"

    def _about(self) -> str:
        against = f", reference {self.reference}" if self.reference else ""
        return f"PairAudit of {self.ranker}: {self.pairs} contrast pairs{against}; {self.cost}"

    def _cells(self) -> list[tuple[str, ...]]:
        there = [(label, getattr(self, name), scale) for name, label, scale in _PAIR_FIGURES]
        return [(label, figure(interval, scale)) for label, interval, scale in there if interval is not None]


_PAIR_FIGURES: Final = (
    ("position_consistency", "same verdict in the other order", "rate"),
    ("upheld", "best over worst again, asked alone", "rate"),
    ("length_gap", "tokens of the best less the worst", "units"),
    ("reference_accuracy", "reference agrees: best over worst", "rate"),
)


# --- the verdict -----------------------------------------------------------------------------------------------------


def _verdict(audit: Audit) -> tuple[Verdict, str]:
    """The rule at the top of this module."""
    position, tied = audit.position_consistency, audit.all_tied
    if position is None or tied is None:
        return "no better than chance", "no prompt has two different responses, so there was nothing to tell apart"
    if tied.estimate == 1:
        return "no better than chance", "all responses to a prompt get the same score, so there is nothing to learn"
    habits = _habits(audit)
    decides, says = _decisive(audit)
    if decides is None and says:
        return "no better than chance", says
    if decides is not None and decides.low <= COIN:
        worse = " (worse: is its scale upside down?)" if decides.high < COIN else ""
        return "no better than chance", f"{says}, where a coin gets 50%{worse}{habits}"
    itself = [
        (interval, how)
        for interval, how in ((audit.repetition_stability, "when asked again"), (position, "in the other order"))
        if interval is not None
    ]
    if decides is None:
        for interval, how in itself:
            if interval.low <= COIN and interval.high < SURE:
                says = f"it gives the same verdict {how} in {percent(interval)} of comparisons, as a coin would"
                return "no better than chance", f"{says}{habits}"
    faults = _faults(audit, decides, says, itself)
    if faults:
        few = rate_interval([1.0] * audit.prompts, [1] * audit.prompts).low < SURE
        more = f"; {audit.prompts} prompts are too few to be sure even of a perfect ranker, take 11 or more"
        although = f"{says}, but " if decides is not None and decides.low >= SURE else ""
        return "weak", f"{although}{'; '.join(faults[:2])}{habits}{more if few else ''}"
    agrees = [f"{how} in {percent(interval)}" for interval, how in itself]
    good = [says] if says else []
    good.append(f"it gives the same verdict {' and '.join(agrees)} of comparisons")
    return "usable", f"{', and '.join(good)}{habits}"


def _decisive(audit: Audit) -> tuple[Interval | None, str]:
    """The measure that decides, in words; None and "" for an oracle, None and the reason where it is missing."""
    if audit.reference is not None:
        interval = audit.reference_accuracy
        if interval is None:
            return None, "there is no pair on which the reference could agree"
        return interval, f"the reference agrees with its best over worst on {percent(interval)} of pairs"
    if audit.kind == "oracle":
        return None, ""
    interval = audit.known_equal_length
    if interval is None:
        return None, "no response is long enough for a pair with a known answer: give longer responses or a reference"
    return interval, f"it is right on {percent(interval)} of known-answer pairs of equal length"


def _faults(audit: Audit, decides: Interval | None, says: str, itself: Sequence[tuple[Interval, str]]) -> list[str]:
    """What keeps a ranker that is better than chance from being usable."""
    faults = []
    if decides is not None and decides.low < SURE:
        faults.append(f"{says}: better than a coin, but not surely right in two cases of three")
    if audit.reference is None and audit.kind == "judge":
        for interval, what in ((audit.known_shuffled, "shuffled words"), (audit.known_other, "other prompts' answers")):
            if interval is not None and interval.low <= COIN:
                faults.append(f"against {what} alone it is not surely better than a coin, {percent(interval)}")
    for interval, how in itself:
        if interval.low < SURE:
            faults.append(f"it does not surely give the same verdict {how} in two cases of three, {percent(interval)}")
    if audit.all_tied is not None and audit.all_tied.low > COIN:
        faults.append(f"all responses tie on {percent(audit.all_tied)} of prompts")
    if audit.cyclic_triples is not None and audit.cyclic_triples.low >= CIRCLES:
        faults.append(f"{percent(audit.cyclic_triples)} of triples go round in a circle, of a coin's 25%")
    return faults


def _habits(audit: Audit) -> str:
    """What it seems to go by instead, in words that go on from a reason."""
    habits = []
    if audit.first_wins is not None and (audit.first_wins.low > HABIT or audit.first_wins.high < 1 - HABIT):
        where, first = ("first", 1) if audit.first_wins.estimate > COIN else ("last", 0)
        share = audit.first_wins.estimate if first else 1 - audit.first_wins.estimate
        habits.append(f"it prefers what is shown {where}, in {100 * share:.0f}% of pairs")
    concordant = 2 * HABIT - 1
    if audit.length_tau is not None and (audit.length_tau.low > concordant or audit.length_tau.high < -concordant):
        which = "longer" if audit.length_tau.estimate > 0 else "shorter"
        habits.append(f"it prefers {which} responses, tau {audit.length_tau.estimate:+.2f}")
    return "".join(f"; {habit}" for habit in habits)


# --- text ------------------------------------------------------------------------------------------------------------


def percent(interval: Interval) -> str:
    """A rate in percent.

    >>> percent(Interval(0.5, 0.25, 0.75))
    '50% [25, 75]'
    """
    return f"{100 * interval.estimate:.0f}% [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def figure(interval: Interval, scale: str) -> str:
    """An interval with as many digits as its scale (see :class:`Measure`) deserves.

    >>> figure(Interval(0.5, 0.25, 0.75), "correlation")
    '+0.50 [+0.25, +0.75]'
    """
    number = {"rate": ".2f", "correlation": "+.2f", "units": ".3g"}[scale]
    return f"{interval.estimate:{number}} [{interval.low:{number}}, {interval.high:{number}}]"


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    return "\n".join("  " + "  ".join(cells).rstrip() for cells in padded)


def as_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a notebook."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.to_json()
    return value.to_json() if isinstance(value, Cost) else value
