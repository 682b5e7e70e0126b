"""What a comparison found: a table, a verdict, one method held against another."""

import html
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sims_lens.checks import check_path
from sims_lens.cost import flops_text
from sims_lens.errors import DamagedError, RunError
from sims_lens.stats import Crossed, Interval, crossed_mean, null_band, win_probability
from sims_lens.store import read_json, write_bytes
from sims_lens.typed import read_as

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "sims_lens.comparison"
FORMAT_VERSION = 1
_PER_PROMPT = ("changes", "wins", "independent_changes", "independent_wins", "kl", "kl_response", "nll")


@dataclass(frozen=True)
class Spent:
    """What learning, or one response, takes; the mean over seeds.

    Args:
        responses: sampled.
        tokens: sampled.
        judged: responses that the ranker gave a score.
        flops: floating-point operations of the model; none of a judge.
        training_seconds: of wall-clock time that went into training weights; 0 where none are trained.
    """

    responses: float = 0.0
    tokens: float = 0.0
    judged: float = 0.0
    flops: float = 0.0
    training_seconds: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, factor: int | float) -> "Spent":
        return Spent(*(factor * value for value in _values(self)))


def _values(spent: Spent) -> tuple[float, ...]:
    return tuple(float(getattr(spent, f.name)) for f in fields(Spent))


@dataclass(frozen=True, eq=False)
class Method:
    """One way to change what a model says, as measured with every seed on the same held-out prompts.

    Args:
        name: of it.
        family: "loop", "one-shot", "supervised", "DPO", "instruction", "best of N", "rejection", "random" or
            "shuffled".
        dose: what was matched: "KL", "norm", or "" where the method has no dose.
        changes: mean score less that of the base model.
        wins: probability that a response scores higher than one of the base model, ties half.
        independent_changes, independent_wins: the same by the evaluator, where there is one.
        kl: KL(method || base), nats per token; of best of N and rejection by their formulas.
        kl_response: the same, nats per response.
        nll: negative log-likelihood of the responses under the base model, nats per token.
        scores: of each response; compared between methods by :meth:`Comparison.between`.
        even: win rate at equal length, per seed.
        distinct_2: distinct word bigrams over all, per seed.
        norm: of what is added, in units of the residual stream's median norm, per seed; NaN where nothing is.
        learning: what it took to learn, once.
        answering: what one response takes after that.
    """

    name: str
    family: str
    dose: str
    changes: Float[np.ndarray, "seed prompt"]
    wins: Float[np.ndarray, "seed prompt"]
    independent_changes: Float[np.ndarray, "seed prompt"] | None
    independent_wins: Float[np.ndarray, "seed prompt"] | None
    kl: Float[np.ndarray, "seed prompt"]
    kl_response: Float[np.ndarray, "seed prompt"]
    nll: Float[np.ndarray, "seed prompt"]
    scores: Float[np.ndarray, "seed prompt response"]
    even: tuple[float, ...]
    distinct_2: tuple[float, ...]
    norm: tuple[float, ...]
    learning: Spent
    answering: Spent

    @property
    def effect(self) -> Crossed:
        """Change of the mean score, over prompts and seeds."""
        return crossed_mean(self.changes)

    @property
    def win_rate(self) -> Crossed:
        """Against the base model, over prompts and seeds."""
        return crossed_mean(self.wins, low=0.0, high=1.0)

    @property
    def independent_win_rate(self) -> Crossed | None:
        """By the evaluator."""
        found = self.independent_wins
        return None if found is None else crossed_mean(found, low=0.0, high=1.0)

    @property
    def divergence(self) -> Crossed:
        """KL in nats per response, over prompts and seeds."""
        return crossed_mean(self.kl_response)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What :func:`compare` returns.

    Args:
        methods: in the order of the table.
        seeds: of the runs.
        heldout: held-out prompts, the same for every seed.
        answers: responses to each of them, of each method that isn't bound to fewer.
        ranker: that all learn from and are measured by.
        evaluator: that none learns from; "" where there was none.
        controls: effect of each shuffled-label control, all seeds.
        comparable: whether scores of different methods can be compared with each other. Those of a judge that compares
            responses hold only among what it saw together.
        path: the folder.
    """

    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    heldout: int
    answers: int
    ranker: str
    evaluator: str
    controls: tuple[float, ...]
    comparable: bool
    path: Path = field(repr=False)

    def __getitem__(self, name: str) -> Method:
        for method in self.methods:
            if method.name == name:
                return method
        raise RunError(f"there is no method {name!r}; there are {', '.join(m.name for m in self.methods)}")

    def family(self, name: str) -> tuple[Method, ...]:
        """The methods of a family, in the table's order."""
        return tuple(method for method in self.methods if method.family == name)

    @property
    def null_band(self) -> Interval | None:
        """Where one more shuffled-label control of the loop's norm would lie with 95% probability."""
        return null_band(self.controls)

    def between(self, ours: str, theirs: str) -> tuple[Crossed, Crossed | None]:
        """One method held against another on the same prompts and seeds.

        Args:
            ours: name of a method.
            theirs: name of another.

        Returns:
            The difference of their effects; and the probability that a response of ours scores higher than one of
            theirs, ties half: None where scores can't be compared.
        """
        a, b = self[ours], self[theirs]
        gap = crossed_mean(a.changes - b.changes)
        if not self.comparable:
            return gap, None
        wins = [
            [win_probability(x, y) for x, y in zip(p, q, strict=True)] for p, q in zip(a.scores, b.scores, strict=True)
        ]
        return gap, crossed_mean(np.array(wins), low=0.0, high=1.0)

    def total(self, method: Method) -> Spent:
        """What it takes to learn and to answer all held-out prompts."""
        return method.learning + method.answering * (self.heldout * self.answers)

    def break_even(self, ours: str, theirs: str) -> float:
        """Answers after which one method has taken no more operations than another, its learning included.

        Args:
            ours: name of the method that learns.
            theirs: name of the one that takes more for each answer.

        Returns:
            Answers; 0 where ours never takes more, infinity where it always does.
        """
        a, b = self[ours], self[theirs]
        ahead, each = a.learning.flops - b.learning.flops, b.answering.flops - a.answering.flops
        if ahead <= 0:
            return 0.0
        return ahead / each if each > 0 else math.inf

    def table(self) -> "pd.DataFrame":
        """One row per method, a column per figure; ``_low`` and ``_high`` are its 95% interval."""
        import pandas as pd

        rows = []
        for method in self.methods:
            row: dict[str, Any] = {"method": method.name, "family": method.family, "dose": method.dose}
            for name, values in (
                ("effect", method.changes),
                ("win_rate", method.wins),
                ("independent_effect", method.independent_changes),
                ("independent_win_rate", method.independent_wins),
                ("kl", method.kl),
                ("kl_response", method.kl_response),
                ("nll", method.nll),
            ):
                if values is None:
                    continue
                rate = name.endswith("win_rate")
                found = crossed_mean(values, low=0.0, high=1.0) if rate else crossed_mean(values)
                row |= {
                    name: found.interval.estimate,
                    f"{name}_low": found.interval.low,
                    f"{name}_high": found.interval.high,
                }
                if name in ("effect", "win_rate"):
                    row[f"{name}_seed_sd"] = math.nan if found.seed_sd is None else found.seed_sd
            row |= {
                "win_rate_even": float(np.mean(method.even)),
                "distinct_2": float(np.mean(method.distinct_2)),
                "norm": float(np.mean(method.norm)),
                **{f"learning_{f.name}": getattr(method.learning, f.name) for f in fields(Spent)},
                **{f"answering_{f.name}": getattr(method.answering, f.name) for f in fields(Spent)},
                "total_flops": self.total(method).flops,
            }
            rows.append(row)
        return pd.DataFrame(rows).set_index("method")

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text: its head, then a row for each method."""
        head = ["method", "dose", "effect [95%]", "win rate [95%]", "per seed", "at equal length"]
        head += [f"{self.evaluator} win rate [95%]"] if self.evaluator else []
        head += [
            "KL/token",
            "KL/response",
            "norm",
            "NLL",
            "distinct-2",
            "tokens to learn",
            "tokens a response",
            "FLOPs in all",
        ]
        trains = any(m.learning.training_seconds for m in self.methods)
        head += ["seconds of training"] if trains else []
        cells = [tuple(head)]
        for m in self.methods:
            e, w = m.effect.interval, m.win_rate.interval
            row = [m.name, f"equal {m.dose}" if m.dose else ""]
            row += [f"{e.estimate:+.3g} [{e.low:+.3g}, {e.high:+.3g}]", str(w)]
            row += [" ".join(f"{v:.2f}" for v in m.wins.mean(axis=1)), f"{np.mean(m.even):.3f}"]
            if self.evaluator:
                row.append(str(m.independent_win_rate or ""))
            norm = float(np.mean(m.norm))
            row += [f"{m.kl.mean():.2f}", f"{m.kl_response.mean():.2f}", "" if math.isnan(norm) else f"{norm:.2f}"]
            row += [f"{m.nll.mean():.2f}", f"{np.mean(m.distinct_2):.2f}", f"{m.learning.tokens:,.0f}"]
            row += [f"{m.answering.tokens:.0f}", flops_text(self.total(m).flops)]
            seconds = m.learning.training_seconds
            row += [f"{seconds:.0f}" if seconds else ""] if trains else []
            cells.append(tuple(row))
        return cells

    def head_to_head(self) -> list[str]:
        """The loop's last plan against every other method, in a sentence each."""
        ours = self.family("loop")[-1]
        found = []
        for other in self.methods:
            if other.family in ("loop", "shuffled"):
                continue
            gap, wins = self.between(ours.name, other.name)
            i = gap.interval
            word = "gains more than" if i.low > 0 else "gains less than" if i.high < 0 else "can't be told from"
            text = f"{ours.name} {word} {other.name}{' at equal KL' if other.dose == 'KL' else ''}: "
            text += f"{i.estimate:+.3g} [{i.low:+.3g}, {i.high:+.3g}]"
            found.append(text + (f", head to head {wins}" if wins is not None else "") + ".")
        return found

    def verdict(self) -> str:
        """Does the loop pay? In a few plain sentences."""
        ours = self.family("loop")[-1]
        band, effect = self.null_band, ours.effect.interval
        above = ""
        if band is not None:
            relation = "above" if effect.estimate > band.high else "not above"
            above = (
                f" It lies {relation} the null band [{band.low:+.3g}, {band.high:+.3g}] of {len(self.controls)} "
                "shuffled-label controls of its norm."
            )
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed, which says nothing of other seeds"
        return (
            f"By {self.ranker}, on {self.heldout} held-out prompts, {seeds}: {ours.name} changes the score by "
            f"{effect.estimate:+.3g} [{effect.low:+.3g}, {effect.high:+.3g}], win rate {ours.win_rate}.{above} "
            + " ".join(self.head_to_head())
        )

    def __repr__(self) -> str:
        from sims_lens.run import table_text

        return f"Comparison of {len(self.methods)} methods\n{table_text(self.cells())}\n{self.verdict()}"

    def _repr_html_(self) -> str:
        head, *rows = self.cells()
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<p>{html.escape(self.verdict())}</p><table><tr>{cells}</tr>{body}</table>"

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain JSON."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("methods", "path")},
            "methods": [_method_json(method) for method in self.methods],
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; :func:`open_comparison` reads it."""
        write_bytes(Path(path), json.dumps(self.to_json(), separators=(",", ":")).encode())
        return Path(path)


def _method_json(method: Method) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return [plain(row) for row in value] if value.ndim > 1 else [float(f"{v:.6g}") for v in value]
        if isinstance(value, tuple):
            return [None if isinstance(v, float) and math.isnan(v) else v for v in value]
        return asdict(value) if isinstance(value, Spent) else value

    return {f.name: plain(getattr(method, f.name)) for f in fields(method)}


def open_comparison(path: str | Path) -> Comparison:
    """Read a comparison.

    Args:
        path: the folder that :func:`compare` wrote, or the JSON file of :meth:`Comparison.save`.

    Raises:
        RunError: there is none, or a newer sims_lens wrote it.
        DamagedError: it is not what was written.
    """
    file = check_path(path, RunError)
    file = file / "comparison.json" if file.is_dir() else file
    data = read_json(file)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RunError(f"{file} is no comparison")
    if type(data.get("version")) is not int or data["version"] > FORMAT_VERSION:
        raise RunError(f"{file} was written by a newer sims_lens (format {data.get('version')!r:.40}); update it")
    try:
        found = Comparison(
            methods=tuple(_method_from(row) for row in data["methods"]),
            **{f.name: read_as(f.type, data[f.name], f.name) for f in fields(Comparison)[1:-1]},
            path=file.parent,
        )
        _check_shapes(found)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"{file} is damaged ({type(error).__name__}: {error}); run the comparison again") from error
    return found


def _method_from(row: Mapping[str, Any]) -> Method:
    arrays = {
        name: None if row[name] is None else np.array(row[name], dtype=float) for name in (*_PER_PROMPT, "scores")
    }
    several = {
        name: tuple(math.nan if v is None else float(v) for v in row[name]) for name in ("even", "distinct_2", "norm")
    }
    spent = {name: read_as(Spent, row[name], name) for name in ("learning", "answering")}
    texts = {name: read_as(str, row[name], name) for name in ("name", "family", "dose")}
    return Method(**texts, **arrays, **several, **spent)  # type: ignore[arg-type]


def _check_shapes(found: Comparison) -> None:
    """Raise ``ValueError`` unless every figure is there for each seed and prompt, and the loop among the methods."""
    seeds, heldout = len(found.seeds), found.heldout
    for method in found.methods:
        for name in (*_PER_PROMPT, "scores"):
            values = getattr(method, name)
            if values is None and name.startswith("independent"):
                continue
            if values is None or values.shape[:2] != (seeds, heldout) or values.ndim != 2 + (name == "scores"):
                raise ValueError(f"{name} of {method.name} is not of {seeds} seeds and {heldout} prompts")
        if any(len(getattr(method, name)) != seeds for name in ("even", "distinct_2", "norm")):
            raise ValueError(f"a figure of {method.name} is not there for each of {seeds} seeds")
    if not (seeds and heldout and found.family("loop")):
        raise ValueError("it has no seed, no prompt or no loop")
