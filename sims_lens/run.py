"""A run, read back from its directory: what was learnt, with intervals."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from sims_lens.auditing import Audit, PairAudit
from sims_lens.bank import PairDiagnostics
from sims_lens.checks import check_integer, check_path, shown
from sims_lens.config import SIMSConfig
from sims_lens.cost import Cost, cost_text
from sims_lens.data import Sample, by_prompt
from sims_lens.errors import DamagedError, ResultError, RunError, SimsError
from sims_lens.evaluate import Effect, Evaluation
from sims_lens.guard import Decision, best_iteration
from sims_lens.plan import NOTHING, Provenance, SteeringPlan
from sims_lens.stats import Interval, holm, null_band
from sims_lens.store import Folder, RunStore
from sims_lens.typed import read_as

if TYPE_CHECKING:
    import pandas as pd


_MOST_TRIES = 1000
_FEW = " With so few the band is wide: five or more (evaluation.controls) tell more."


@dataclass(frozen=True)
class Iteration:
    """One finished turn of the loop.

    Args:
        index: counted from 1.
        plan: what the model is steered with after it.
        evaluation: of that plan on the held-out prompts, against the base model.
        pairs: how many contrast pairs were fitted, their margins, turnover, and length gap.
        dropped: how many prompts gave no pair, by reason.
        audit: what the ranker says when it is asked about the pairs again; None where it was not.
        decision: what the guard decided, and why; None where it was off, or in a run of an earlier version.
        kept: whether the loop went on from it: it does where the guard only reports.
        coefficients: how much of the direction of each iteration so far is in the plan, in units of the median norm.
        tries: how often it was measured: once more for each time that the guard made its step smaller.
        path: its folder.
    """

    index: int
    plan: SteeringPlan
    evaluation: Evaluation
    pairs: PairDiagnostics
    dropped: dict[str, int]
    audit: PairAudit | None
    decision: Decision | None
    kept: bool
    coefficients: tuple[float, ...]
    tries: int
    path: Path = field(repr=False)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """``mean_difference`` [layer, d_model], ``shuffled`` [control, layer, d_model], ``median_norm`` [layer] and
        ``split_half`` [layer], as fitted in this iteration at every layer."""
        found = Folder(self.path).read_tensors("vectors")
        _check_tensors(found, self.path / "vectors.safetensors")
        return found

    @property
    def vectors(self) -> Float[Tensor, "layer d_model"]:
        """The mean difference of this iteration's pairs at every layer, in units of the residual stream."""
        return self.tensors["mean_difference"]


@dataclass(frozen=True)
class Run:
    """A run of the loop: what :func:`sims_lens.improve` returns and :func:`sims_lens.open_run` reads.

    Args:
        path: its directory.
        config: the choices that made it.
        model: the model that it was made on.
        ranker: the name of the ranker that the loop learnt from.
        evaluator: the name of the independent ranker, "" where there was none.
        prompts: every prompt.
        split: "train", "validation" or "heldout" for each prompt.
        base: the unsteered model on the held-out prompts.
        iterations: the finished ones.
        controls: norm-matched shuffled-label plans on the held-out prompts; empty until the run is complete.
        audit: how far the ranker can be trusted, by the first responses; None where it was not asked.
        choice: for each layer that "auto" tried, its evaluation on the validation prompts; empty otherwise.
        cost: what each phase took.
        stopped: why the run ended before its last iteration; "" where it didn't.
    """

    path: Path
    config: SIMSConfig
    model: Provenance
    ranker: str
    evaluator: str
    prompts: tuple[str, ...] = field(repr=False)
    split: tuple[str, ...] = field(repr=False)
    base: Evaluation
    iterations: tuple[Iteration, ...]
    controls: tuple[Evaluation, ...]
    audit: Audit | None
    choice: dict[int, Evaluation]
    cost: dict[str, Cost]
    stopped: str

    @property
    def best(self) -> Iteration | None:
        """The iteration that the run's plan is taken from: of those that the guard accepted the one with the largest
        effect; where it accepted none, the last one that the loop went on from; where it did not act, the last one.
        None where all were rolled back, or none is finished yet."""
        acts = self.config.guard.mode == "act"
        decisions = [i.decision if acts else None for i in self.iterations]
        index = best_iteration(decisions, [i.evaluation.difference.estimate for i in self.iterations])
        return None if index is None else self.iterations[index]

    @property
    def _count(self) -> int:
        return len(self.iterations)

    @property
    def plan(self) -> SteeringPlan:
        """The plan of :attr:`best`; one that steers nothing where the guard rolled all iterations back.

        Raises:
            RunError: no iteration is finished yet.
        """
        if not self.iterations:
            raise RunError(f"{self.path} has no finished iteration yet; call improve(..., out={str(self.path)!r})")
        return self.best.plan if self.best else NOTHING

    def before(self, iteration: int) -> SteeringPlan:
        """The plan that an iteration, counted from 1, drew its responses under."""
        check_integer("iteration", iteration, 1, error=RunError)
        kept = [i for i in self.iterations[: iteration - 1] if i.kept]
        return kept[-1].plan if kept else NOTHING

    @property
    def complete(self) -> bool:
        """Whether every iteration that was to come and every control is there."""
        ended = self._count == self.config.iterations or bool(self.stopped)
        wanted = self.config.evaluation.controls if self.best else 0
        return ended and len(self.controls) == wanted

    @property
    def null_band(self) -> Interval | None:
        """Where the effect of a plan that has learnt nothing would lie with 95% probability, by the shuffled-label
        controls (:func:`sims_lens.stats.null_band`); None with fewer than two. They have the norm of the run's plan."""
        return null_band([control.difference.estimate for control in self.controls])

    @property
    def beats_controls(self) -> bool | None:
        """Whether the effect of the run's plan lies above the null band; None where there is none."""
        if self.null_band is None or self.best is None:
            return None
        return self.best.evaluation.difference.estimate > self.null_band.high

    def adjusted_p(self) -> list[float] | None:
        """For each iteration p of no effect on the held-out prompts, by sign flips, adjusted for their number (Holm).

        It says whether *this* plan has an effect, not whether that was learnt: for that, see :attr:`null_band`. None
        in a run of an earlier version.
        """
        found = [i.evaluation.p for i in self.iterations]
        return None if any(p is None for p in found) else holm([p for p in found if p is not None])

    def indices(self, split: str) -> list[int]:
        """Indices of the prompts of a split."""
        return [i for i, s in enumerate(self.split) if s == split]

    def samples(self, iteration: int, split: str = "heldout") -> list[Sample]:
        """The samples of an iteration; iteration 0 is the base model.

        Args:
            iteration: 0 to the last finished one.
            split: "heldout": drawn with the plan *after* the iteration; "train": the scored responses that it learnt
                from, drawn with the plan *before* it.
        """
        store = RunStore(self.path)
        if iteration == 0 and split == "heldout":
            return store.folder("base").read_samples("heldout")
        known = type(iteration) is int and 1 <= iteration <= len(self.iterations)
        if not known or split not in ("heldout", "train"):
            raise RunError(
                f"there are no {split} samples of iteration {shown(iteration)}; "
                f"finished iterations are 1..{len(self.iterations)}, splits are 'heldout' and 'train'"
            )
        tries = self.iterations[iteration - 1].tries
        heldout = "heldout" if tries == 1 else f"heldout_{tries}"
        return store.iteration(iteration).read_samples("samples" if split == "train" else heldout)

    def text_pairs(self, split: str = "heldout") -> list[tuple[str, str, str]]:
        """(prompt, best text, worst text) of each prompt, by the ranker's scores: what a
        :class:`~sims_lens.behaviour.PairBehaviour` measures the behaviour on without sampling.

        Args:
            split: "heldout": responses of the base model, which no direction was fitted to; "train": the responses
                that iteration 1 was fitted to. Prompts whose responses all score the same are left out.

        Raises:
            RunError: no prompt has two responses that differ in score.
        """
        groups = by_prompt(self.samples(0) if split == "heldout" else self.samples(1, split))
        pairs = []
        for group in groups:
            scored = sorted((s for s in group if s.tokens and s.score is not None), key=lambda s: s.score or 0.0)
            if len(scored) > 1 and scored[0].score != scored[-1].score:
                pairs.append((self.prompts[group[0].prompt], scored[-1].text, scored[0].text))
        if not pairs:
            raise RunError(f"no {split} prompt of {self.path} has two responses that differ in score; name other pairs")
        return pairs

    def table(self) -> "pd.DataFrame":
        """One row per plan, one column per figure of :class:`Evaluation` (estimate, and ``_low`` / ``_high``; ``p`` is
        not adjusted for the number of plans)."""
        import pandas as pd

        rows = []
        for plan, evaluation in self.rows():
            row: dict[str, Any] = {"plan": plan}
            for f in fields(Evaluation):
                value = getattr(evaluation, f.name)
                parts = {f.name: value}
                if isinstance(value, Effect):
                    parts = {f"{f.name}_{g.name}": getattr(value, g.name) for g in fields(Effect)}
                for name, figure in parts.items():
                    if isinstance(figure, Interval):
                        row |= {name: figure.estimate, f"{name}_low": figure.low, f"{name}_high": figure.high}
                    elif figure is not None:
                        row[name] = figure
            rows.append(row)
        return pd.DataFrame(rows).set_index("plan")

    def rows(self) -> list[tuple[str, Evaluation]]:
        """Every plan that was measured on the held-out prompts, with its name: base, iterations, controls."""
        return [
            ("base", self.base),
            *((f"iteration {i.index}", i.evaluation) for i in self.iterations),
            *((f"shuffled {k}", control) for k, control in enumerate(self.controls, start=1)),
        ]

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text: its head, then a row for each of :meth:`rows`."""
        twice = bool(self.evaluator)
        head = ["held-out prompts", "score", "difference [95%]", "win rate [95%]", "at equal length"]
        head += [f"{self.evaluator} difference", f"{self.evaluator} win rate"] if twice else []
        head += ["NLL", "KL", "distinct-2", "repeated", "length", "EOS"]
        cells = [tuple(head)]
        for name, e in self.rows():
            base = name == "base"
            effects: list[Effect] = [e, *([e.independent] if twice and e.independent else [])]
            row = [name, f"{e.score.estimate:.3g}"]
            for effect in effects:
                d, w = effect.difference, effect.win_rate
                row += (
                    ["", ""]
                    if base
                    else [
                        f"{d.estimate:+.3g} [{d.low:+.3g}, {d.high:+.3g}]",
                        f"{w.estimate:.3f} [{w.low:.3f}, {w.high:.3f}]",
                    ]
                )
            even = e.length_controlled
            row.insert(4, "" if base or even is None else f"{even.estimate:.3f} [{even.low:.3f}, {even.high:.3f}]")
            row += [f"{e.nll.estimate:.2f}", "" if base else f"{e.kl.estimate:.2f}", f"{e.distinct_2.estimate:.2f}"]
            row += [f"{e.repetition.estimate:.3f}", f"{e.length.estimate:.1f}", f"{100 * e.ended.estimate:.0f}%"]
            cells.append(tuple(row))
        return cells

    def verdict(self) -> str:
        """What was learnt, in one or two plain sentences."""
        if not self.iterations:
            return "No iteration is finished yet."
        guard = "" if self.best is self.iterations[-1] and not self.stopped else f" {self.guard_text()}"
        if self.best is None:
            return f"Every iteration was rolled back: the run's plan steers nothing.{guard}"
        best, count = self.best.evaluation, self.best.index
        turns = "1 iteration" if count == 1 else f"{count} iterations"
        text = (
            f"After {turns} a steered response scores higher than a base response in "
            f"{100 * best.win_rate.estimate:.0f}% of cases "
            f"[{100 * best.win_rate.low:.0f}, {100 * best.win_rate.high:.0f}] on "
            f"{len(self.indices('heldout'))} held-out prompts ({self.ranker})."
        )
        adjusted = self.adjusted_p()
        if adjusted is not None:
            tested = "1 iteration" if self._count == 1 else f"{self._count} iterations"
            text += (
                f" p of no effect, adjusted for {tested}: {p_text(adjusted[count - 1])}; "
                f"these prompts show a change of {best.win_rate.detectable:.2f} in win rate with 80% power."
            )
        band, effect = self.null_band, best.difference.estimate
        if band is None:
            return text + self._independent_verdict(best) + guard
        relation = "lies above" if self.beats_controls else "does NOT lie above"
        return (
            f"{text} Its effect, {effect:+.3g}, {relation} the null band [{band.low:+.3g}, {band.high:+.3g}]: there "
            f"lie 19 of 20 plans of this norm that learnt nothing, by {len(self.controls)} shuffled-label controls."
            f"{_FEW if len(self.controls) < 5 else ''}{self._independent_verdict(best)}{guard}"
        )

    def guard_text(self) -> str:
        """What the guard decided about each iteration, in a sentence each; "" where it was off."""
        made = [f"Iteration {i.index}: {i.decision.reason}" for i in self.iterations if i.decision is not None]
        told = self.stopped and not any(self.stopped in sentence for sentence in made)
        only = ["It only reports, every iteration was kept."] if made and self.config.guard.mode == "report" else []
        return " ".join([*only, *made, *([self.stopped] if told else [])])

    def _independent_verdict(self, best: Evaluation) -> str:
        last = best.independent
        if last is None:
            return ""
        band = null_band([c.independent.difference.estimate for c in self.controls if c.independent])
        null = "" if band is None else f"; the null band there is [{band.low:+.3g}, {band.high:+.3g}]"
        return (
            f" By {self.evaluator}, which the loop never saw, the effect is {last.difference.estimate:+.3g} "
            f"[{last.difference.low:+.3g}, {last.difference.high:+.3g}] and the win rate {last.win_rate}{null}."
        )

    def strength_text(self) -> str:
        """How strongly the run's plan steers, and what that was chosen by."""
        strengths = {i.coefficient for i in self.plan.interventions} if self.iterations else set()
        spent = ", ".join(f"{strength:.3g}" for strength in sorted(strengths))
        chosen, steer = "", self.config.steering
        if steer.strength == "auto":
            chosen = f" (auto: {steer.kl:g} nats of KL per token)"
        elif not spent:
            spent = f"{steer.strength:g}"
        return f"strength {spent} x median residual norm{chosen}" if spent else f"strength not found yet{chosen}"

    def __repr__(self) -> str:
        counts = {name: len(self.indices(name)) for name in ("train", "validation", "heldout")}
        layers = ", ".join(str(layer) for layer in self.plan.layers) if self.iterations else "none yet"
        guard = self.guard_text()
        lines = [
            f"Run at {self.path} ({'complete' if self.complete else 'not finished'})",
            f"  {self.model.model}, ranker {self.ranker}, seed {self.config.seed}"
            + (f", judged independently by {self.evaluator}" if self.evaluator else ""),
            f"  prompts: {counts['train']} training, {counts['validation']} validation, {counts['heldout']} held-out",
            f"  steered: layer {layers}, {self.config.steering.site}, {self.config.steering.compose}, "
            f"{self.strength_text()}",
            "",
            table_text(self.cells()),
            "",
            f"  {self.verdict()}",
            *([f"  Guard: {guard}"] if guard and guard not in self.verdict() else []),
            *([f"  Audit of {self.ranker}: {self.audit.verdict} ({self.audit.reason})."] if self.audit else []),
            f"  {cost_text(self.cost)}",
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        titles, *body = self.cells()
        rows = "".join(
            "<tr><td>" + "</td><td>".join(html.escape(cell) for cell in cells) + "</td></tr>" for cells in body
        )
        head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
        return (
            f"<p><b>Run</b> at <code>{html.escape(str(self.path))}</code><br>{html.escape(self.model.model)}, ranker "
            f"{html.escape(self.ranker)}, seed {self.config.seed}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            f"<p>{html.escape(self.verdict())}<br>{html.escape(cost_text(self.cost))}</p>"
        )


def p_text(p: float) -> str:
    """A p-value as it is printed: not more exact than its 10,000 sign flips.

    >>> p_text(0.0001)
    'below 0.001'
    """
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


def table_text(cells: Sequence[Sequence[str]]) -> str:
    """A run's table for a terminal."""
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = []
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def open_run(path: str | Path) -> Run:
    """Read a run directory: the same object that :func:`sims_lens.improve` returned.

    Raises:
        RunError: there is no run, or a newer sims_lens wrote it.
        DamagedError: it is not what was written.
    """
    path = check_path(path, RunError)
    try:
        run = _opened(path)
        _check(run)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, SimsError) and not isinstance(error, ResultError):
            raise
        raise DamagedError(
            f"the run at {path} is damaged ({type(error).__name__}: {error}); start the same again in another folder"
        ) from error
    return run


def _check_tensors(found: Mapping[str, Tensor], file: Path) -> None:
    """Raise :class:`DamagedError` unless a run's vectors are all there, and of one model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    layers = shapes.get("mean_difference", ())
    good = len(layers) == 2 and all(t.is_floating_point() for t in found.values())
    good = good and shapes.get("shuffled", ())[1:] == layers
    if not good or any(shapes.get(name) != layers[:1] for name in ("median_norm", "split_half")):
        raise DamagedError(f"{file} is damaged (it holds {shapes}); start the same again in another folder")


def _check(run: Run) -> None:
    """Raise :class:`ResultError` where a figure is of another type than its field."""
    read_as(tuple[str, str], [run.ranker, run.evaluator], "ranker, evaluator")
    read_as(tuple[str, ...], run.prompts, "prompts")
    read_as(tuple[Literal["train", "validation", "heldout"], ...], run.split, "split")
    for i in run.iterations:
        read_as(dict[str, int], i.dropped, f"dropped in iteration {i.index}")
        read_as(tuple[float, ...], i.coefficients, f"coefficients of iteration {i.index}")
        if not 1 <= i.tries <= 1 + _MOST_TRIES:
            raise ResultError(f"iteration {i.index} was tried {i.tries} times")


def _opened(path: str | Path) -> Run:
    store = RunStore(path)
    header = store.header()
    config = SIMSConfig.from_json(header["config"])
    prompts = store.root.read_rows("prompts")
    base = store.folder("base")
    if not base.complete:
        raise RunError(f"{path} has not measured the base model yet; call improve(..., out={str(path)!r}) to go on")
    iterations: list[Iteration] = []
    while store.iteration(len(iterations) + 1).complete:
        folder = store.iteration(len(iterations) + 1)
        metrics = folder.read_json("metrics")
        plan = folder.path / "plan.safetensors"
        folder.read(plan.name)  # its checksum
        decision = Decision.from_json(metrics["guard"]) if metrics.get("guard") else None
        iterations.append(
            Iteration(
                index=len(iterations) + 1,
                plan=SteeringPlan.load(plan),
                evaluation=Evaluation.from_json(metrics["evaluation"]),
                pairs=PairDiagnostics.from_json(metrics["diagnostics"]),
                dropped=metrics["dropped"],
                audit=PairAudit.from_json(metrics["audit"]) if metrics["audit"] else None,
                decision=decision,
                kept=decision is None or decision.kept or config.guard.mode != "act",
                coefficients=tuple(metrics.get("coefficients") or _coefficients(config, len(iterations) + 1)),
                tries=int(metrics.get("tries", 1)),
                path=folder.path,
            )
        )
    controls, choice, audit = store.folder("controls"), store.folder("choice"), store.folder("audit")
    folders = [audit, base, choice, *(store.iteration(i.index) for i in iterations), controls]
    cost: dict[str, Cost] = {}
    for folder in folders:
        for phase, spent in folder.costs().items():
            cost[phase] = cost.get(phase, Cost()) + spent
    return Run(
        path=store.path,
        config=config,
        model=Provenance(**header["model"]),
        ranker=header["ranker"],
        evaluator=header.get("evaluator", ""),
        prompts=tuple(row["prompt"] for row in prompts),
        split=tuple(row["split"] for row in prompts),
        base=Evaluation.from_json(base.read_json("metrics")["evaluation"]),
        iterations=tuple(iterations),
        controls=tuple(Evaluation.from_json(e) for e in controls.read_json("metrics")["controls"])
        if controls.complete
        else (),
        audit=Audit.from_json(audit.read_json("audit")) if audit.complete else None,
        choice={int(layer): Evaluation.from_json(e) for layer, e in choice.read_json("metrics")["layers"].items()}
        if choice.complete
        else {},
        cost=cost,
        stopped=store.stopped,
    )


def _coefficients(config: SIMSConfig, count: int) -> list[float]:
    """Those of a run of an earlier version, which had one fixed strength."""
    if config.steering.compose == "replace":
        return [0.0] * (count - 1) + [float(config.steering.strength)]
    return [float(config.steering.strength) / config.iterations] * count
