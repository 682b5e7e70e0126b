"""How strongly to steer, and where: the largest effect that leaves the text fluent.

Each candidate plan is scaled by factors of a geometric grid, upwards, until the text is surely beyond a fluency budget;
then the factor is refined between the best one so far and the next one above it. The candidate and factor with the
largest effect within the budget are chosen on the *calibration* split of the prompts, where the choice makes them look
better than they are; the figures to quote are those of the *report* split, on which nothing was chosen.

Unsteered and steered responses, at every factor, are drawn with the same uniform numbers.
"""

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sims_lens.adapter import adapt, check_lengths
from sims_lens.behaviour import PairBehaviour, encode_pairs
from sims_lens.config import SamplingConfig
from sims_lens.cost import Cost, Meter, cost_text, forced_count
from sims_lens.data import Sample, by_prompt
from sims_lens.errors import ConfigError, PlanError, PromptError
from sims_lens.evaluate import Effect, Evaluation, evaluate, perplexity_ratio, side_effects
from sims_lens.hooks import check_unsteered, resolve
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import check_prompts
from sims_lens.rankers import CheckedRanker, bound_ranker
from sims_lens.sampling import LocalSampler
from sims_lens.stats import Interval, bootstrap_mean
from sims_lens.typed import known_fields, read_as

if TYPE_CHECKING:
    import pandas as pd

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
MIN_PROMPTS = 4
"""Prompts that each split needs, at the least; an interval worth having needs about 30."""


@dataclass(frozen=True)
class FluencyBudget:
    """How much fluency may be spent.

    Two limits, because each is blind to something: text that repeats itself has a low perplexity, and a divergence
    says nothing about where the distribution went. The defaults allow about what the demo's own strength costs (on
    SmolLM2-135M-Instruct a ratio of 1.5 and 0.28 nats, ``docs/results.md``) and stop well short of a ratio of 2.8, at
    which its text broke.

    Args:
        perplexity_ratio: perplexity of the steered text under the *unsteered* model over that of the unsteered text;
            above 1, ``math.inf`` for no limit.
        kl: mean KL(steered || unsteered) of the next-token distributions on steered text, nats per token; above 0,
            ``math.inf`` for no limit.

    >>> FluencyBudget(kl=1.0)
    FluencyBudget(perplexity_ratio=1.5, kl=1.0)
    """

    perplexity_ratio: float = 1.5
    kl: float = 0.5

    def __post_init__(self) -> None:
        for name, floor in (("perplexity_ratio", 1.0), ("kl", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > floor:
                raise ConfigError(f"{name} must be a number above {floor:g} (math.inf for no limit), got {value!r}")

    def allows(self, point: "Point") -> bool:
        """Whether both estimates are within the limits."""
        return all(interval.estimate <= limit for interval, limit in self._against(point))

    def excludes(self, point: "Point") -> bool:
        """Whether one of the figures is beyond its limit with its whole interval."""
        return any(interval.low > limit for interval, limit in self._against(point))

    def is_sure_of(self, point: "Point") -> bool:
        """Whether no interval reaches across its limit."""
        return self.excludes(point) or all(interval.high <= limit for interval, limit in self._against(point))

    def _against(self, point: "Point") -> tuple[tuple[Interval, float], ...]:
        return (point.perplexity_ratio, self.perplexity_ratio), (point.evaluation.kl, self.kl)


@dataclass(frozen=True)
class Point:
    """A candidate at one strength, against the unsteered model on the same prompts.

    Args:
        candidate: its name.
        factor: what the candidate's coefficients were multiplied by.
        coefficient: the coefficient that this gives; of a plan with several, the largest in magnitude.
        evaluation: effect and side effects with 95% intervals over prompts. Calibrated by a behaviour, ``score`` is
            the steered margin, ``difference`` its change, and ``win_rate`` the share of pairs whose margin rises.
            Responses without a token have no ``nll`` and ``kl``.
        perplexity_ratio: exp of the mean difference in ``nll``, paired by prompt; infinite where steering leaves no
            text to measure.
    """

    candidate: str
    factor: float
    coefficient: float
    evaluation: Evaluation
    perplexity_ratio: Interval

    @property
    def effect(self) -> Interval:
        """What is maximised: ``evaluation.difference``."""
        return self.evaluation.difference

    def to_json(self) -> dict[str, Any]:
        """A plain dict; the inverse of :meth:`from_json`."""
        return {
            "candidate": self.candidate,
            "factor": self.factor,
            "coefficient": self.coefficient,
            "evaluation": self.evaluation.to_json(),
            "perplexity_ratio": self.perplexity_ratio.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Point":
        """The point that :meth:`to_json` described.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, data)  # type: ignore[no-any-return]


def best_within(points: Sequence[Point], budget: FluencyBudget) -> Point | None:
    """The point with the largest effect within the budget; None where nothing there is better than not steering."""
    allowed = [p for p in points if budget.allows(p) and p.effect.estimate > 0]
    return max(allowed, key=lambda p: p.effect.estimate, default=None)


def search(
    measure: Callable[[float], Point], factors: Sequence[float], budget: FluencyBudget, *, refine: int
) -> tuple[Point, ...]:
    """Measure one candidate along a grid of factors, then more closely above the best.

    A refinement measures the geometric mean of the best factor and the next one above it. Where effect and cost rise
    with the factor, that is a bisection of where the budget ends.

    Args:
        measure: a point for a factor.
        factors: positive, in any order. The ascent ends after the first one that is surely beyond the budget.
        budget: what counts as fluent.
        refine: how many more factors to measure, at most.

    Returns:
        Every point that was measured, by factor.
    """
    found: list[Point] = []
    for factor in sorted(factors):
        found.append(measure(factor))
        if budget.excludes(found[-1]):
            break
    for _ in range(refine):
        best = best_within(found, budget)
        above = [p.factor for p in found if best is not None and p.factor > best.factor]
        if best is None or not above:
            break
        found.append(measure(math.sqrt(best.factor * min(above))))
    return tuple(sorted(found, key=lambda p: p.factor))


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found. ``found.plan`` steers; ``print(found)`` shows the curve and why.

    Args:
        model: name of the model.
        objective: name of the ranker or behaviour.
        units: of the coefficients: "residual_norm", "absolute", or "mixed".
        budget: the limits.
        curve: every point measured on the calibration split, candidate by candidate, by factor.
        report: the chosen point on the report split; None where none was chosen.
        prompts: how many prompts each split has, calibration first.
        responses: to each prompt, at each point.
        seed: of the splits and of sampling.
        cost: what each phase took.
        steering: the chosen plan; None where none was chosen, or where this was read from JSON without it.
    """

    model: str
    objective: str
    units: str
    budget: FluencyBudget
    curve: tuple[Point, ...]
    report: Point | None
    prompts: tuple[int, int]
    responses: int
    seed: int
    cost: dict[str, Cost]
    steering: SteeringPlan | None = field(default=None, repr=False, compare=False)

    @property
    def chosen(self) -> Point | None:
        """The point of the curve with the largest effect within the budget; None where nothing there beats not
        steering."""
        return best_within(self.curve, self.budget)

    @property
    def plan(self) -> SteeringPlan:
        """The chosen candidate, scaled.

        Raises:
            PlanError: none was chosen, or the calibration was read from JSON without its plan.
        """
        if self.chosen is None:
            raise PlanError(f"no plan was chosen: {self.reason}")
        if self.steering is None:
            raise PlanError("JSON holds no plan; load its file and pass it: Calibration.from_json(data, plan=...)")
        return self.steering

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the candidates, in the order in which they were given."""
        return tuple(dict.fromkeys(p.candidate for p in self.curve))

    @property
    def reason(self) -> str:
        """Why this point was chosen, or none."""
        allowed = [p for p in self.curve if self.budget.allows(p)]
        if not allowed:
            smallest = min(p.factor for p in self.curve)
            return (
                f"nothing is within the budget, not even a factor of {smallest:g}; give smaller factors or a larger "
                "budget"
            )
        chosen = self.chosen
        if chosen is None:
            return (
                f"none of the {len(allowed)} points within the budget raises the score; turn the plan round (-plan), "
                "or try another layer or direction"
            )
        text = (
            f"{chosen.candidate} at factor {chosen.factor:.3g} (coefficient {chosen.coefficient:.3g}) has the largest "
            f"effect, {_signed(chosen.effect)}, of {len(allowed)} points within the budget ({len(self.curve)} tried)"
        )
        if not self.budget.is_sure_of(chosen):
            text += "; its interval reaches beyond the budget"
        if chosen.factor == max(p.factor for p in self.curve if p.candidate == chosen.candidate):
            text += "; it is the largest factor tried, a larger one may do better"
        return text

    @property
    def verdict(self) -> str:
        """What the report split says about the choice."""
        if self.report is None:
            return "Nothing was measured on the report split."
        point, found = self.report, self.report.evaluation
        within = "within the budget" if self.budget.allows(point) else "NOT within the budget"
        sure = "" if self.budget.is_sure_of(point) else ", by the estimates; an interval reaches across a limit"
        return (
            f"On the {self.prompts[1]} prompts of the report split: effect {_signed(point.effect)}, win rate "
            f"{found.win_rate}, perplexity ratio {point.perplexity_ratio}, KL {found.kl}: {within}{sure}."
        )

    def table(self) -> "pd.DataFrame":
        """One row per point, those of the curve and the one of the report split, with every interval."""
        import pandas as pd

        rows = []
        for split, point in self._points():
            row: dict[str, Any] = {
                "split": split,
                "candidate": point.candidate,
                "factor": point.factor,
                "coefficient": point.coefficient,
            }
            found = point.evaluation
            figures = {"effect": point.effect, "win_rate": found.win_rate, "nll": found.nll}
            figures |= {"perplexity_ratio": point.perplexity_ratio, "kl": found.kl, "length": found.length}
            for name, interval in figures.items():
                row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
            rows.append({**row, "within": self.budget.allows(point), "chosen": self._is_chosen(point)})
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """A plain dict without the plan, which ``found.plan.save(path)`` writes."""
        return {
            "model": self.model,
            "objective": self.objective,
            "units": self.units,
            "budget": {"perplexity_ratio": self.budget.perplexity_ratio, "kl": self.budget.kl},
            "curve": [p.to_json() for p in self.curve],
            "report": self.report.to_json() if self.report else None,
            "prompts": list(self.prompts),
            "responses": self.responses,
            "seed": self.seed,
            "cost": {phase: spent.to_json() for phase, spent in self.cost.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, plan: SteeringPlan | None = None) -> "Calibration":
        """The inverse of :meth:`to_json`.

        Args:
            data: what that returned.
            plan: the chosen plan, for instance ``SteeringPlan.load(path)``.

        Raises:
            ResultError: it is no such thing.
        """
        return replace(read_as(cls, {**known_fields(cls, data), "steering": None}), steering=plan)  # type: ignore[no-any-return]

    def _is_chosen(self, point: Point) -> bool:
        chosen = self.chosen
        return chosen is not None and (point.candidate, point.factor) == (chosen.candidate, chosen.factor)

    def _points(self) -> list[tuple[str, Point]]:
        report = [("report", self.report)] if self.report else []
        return [*(("calibration", p) for p in self.curve), *report]

    def _cells(self) -> list[tuple[str, ...]]:
        """The table as text: its head, then a row for each point."""
        head = "split", "candidate", "factor", "coefficient", "effect [95%]", "win rate [95%]", "NLL"
        cells: list[tuple[str, ...]] = [(*head, "perplexity ratio [95%]", "KL [95%]", "budget")]
        for split, p in self._points():
            found = p.evaluation
            strength = split, p.candidate, f"{p.factor:.3g}", f"{p.coefficient:+.3g}"
            effect = _signed(p.effect), str(found.win_rate)
            fluency = f"{found.nll.estimate:.2f}", str(p.perplexity_ratio), str(found.kl)
            standing = "within" if self.budget.allows(p) else "beyond"
            marks = ("" if self.budget.is_sure_of(p) else "?") + (" <- chosen" if self._is_chosen(p) else "")
            cells.append((*strength, *effect, *fluency, standing + marks))
        return cells

    def _about(self) -> list[str]:
        many = f"{len(self.candidates)} candidates" if len(self.candidates) > 1 else "a plan"
        unit = {"residual_norm": "x median residual norm", "absolute": "absolute"}.get(self.units, "of mixed units")
        return [
            f"Calibration of {many} on {self.model} by {self.objective}, seed {self.seed}",
            f"budget: perplexity ratio up to {self.budget.perplexity_ratio:g}, KL up to {self.budget.kl:g} nats per "
            f"token; coefficients: {unit}",
            f"prompts: {self.prompts[0]} to calibrate on, {self.prompts[1]} to report on, {self.responses} responses "
            "to each",
        ]

    def _conclusion(self) -> list[str]:
        reason = self.reason if self.chosen else f"none; {self.reason}"
        return [f"Chosen: {reason}.", self.verdict, cost_text(self.cost)]

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        head, *about = self._about()
        return "\n".join([head, *(f"  {line}" for line in [*about, "", *rows, "", *self._conclusion()])])

    def _repr_html_(self) -> str:
        head, *about = map(html.escape, self._about())
        titles, *body = [[html.escape(cell) for cell in row] for row in self._cells()]
        rows = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in body)
        return (
            f"<p><b>{head}</b><br>{'<br>'.join(about)}</p><table><thead><tr><th>{'</th><th>'.join(titles)}</th></tr>"
            f"</thead><tbody>{rows}</tbody></table><p>{'<br>'.join(map(html.escape, self._conclusion()))}</p>"
        )


def calibrate(
    model: Any,
    plan: SteeringPlan | Sequence[SteeringPlan] | Mapping[str, SteeringPlan],
    *,
    prompts: Sequence[str],
    ranker: object | None = None,
    behaviour: PairBehaviour | None = None,
    budget: FluencyBudget | None = None,
    factors: Sequence[float] = FACTORS,
    refine: int = 2,
    report: float = 0.5,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Find the strength, and of several plans the one, with the largest effect under a fluency budget.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        plan: what to scale: one plan; or candidates in a list or by name, for instance one per layer.
        prompts: on which responses are drawn, none of them used to fit the plan; split by ``seed``.
        ranker: what the effect is measured by: mean score of steered less unsteered responses. Any shape that
            ``improve`` takes; one that has ``bind`` is bound to the model. A prompt's unsteered responses are ranked
            with each lot of steered ones; put a pointwise ranker that costs much into a ``CachedRanker``.
        behaviour: instead of a ranker, the rise of the log-probability margin on pairs of texts, which are split too;
            fluency is still that of responses to ``prompts``.
        budget: how much fluency may be spent.
        factors: what each plan's coefficients are multiplied by, smallest first; see :func:`search`.
        refine: factors to try between those of the grid, at most, for each candidate.
        report: share of the prompts (and pairs) kept for the report.
        sampling: how responses are drawn, ``responses`` to each prompt; two by default.
        seed: of the split, of sampling and of the intervals.
        progress: show a progress bar.

    Returns:
        The curve, the choice with its reason, and the figures of the report split. Where nothing within the budget
        beats not steering, ``chosen`` is None and ``plan`` raises.

    Raises:
        ConfigError: not exactly one of ranker and behaviour, or a setting is out of range.
        PlanError: a plan does not fit the model, or has nothing to scale.
        PromptError: prompts are empty, duplicate, too few, or longer than the context.
        RankerError: the ranker failed.
    """
    check_unsteered(model)
    if (ranker is None) == (behaviour is None):
        given = "both" if ranker is not None else "neither"
        raise ConfigError(f"calibrate needs one of ranker= and behaviour=, got {given}")
    if behaviour is not None and not isinstance(behaviour, PairBehaviour):
        raise ConfigError(f"behaviour must be a PairBehaviour, got {type(behaviour).__name__}; a ranker is ranker=")
    grid = _checked_grid(factors, refine, report)
    sampling = sampling or SamplingConfig(responses=2)
    limits = budget or FluencyBudget()
    judge = None if ranker is None else bound_ranker(ranker, model)
    texts = check_prompts(prompts)
    first, second = _split(texts, report, seed, "prompts")
    pairs: tuple[PairBehaviour | None, PairBehaviour | None] = (None, None)
    if behaviour is not None:
        asked = tuple(dict.fromkeys(prompt for prompt, _, _ in behaviour.pairs))
        halves = _split(asked, report, seed, "prompts of the behaviour's pairs")
        first_pairs, second_pairs = (tuple(p for p in behaviour.pairs if p[0] in set(half)) for half in halves)
        pairs = replace(behaviour, pairs=first_pairs), replace(behaviour, pairs=second_pairs)
        encode_pairs(adapt(model), behaviour.pairs)  # what is too long is said before anything is drawn
    check_lengths(adapt(model), texts, sampling.max_new_tokens)
    plans = {name: resolve(model, _scalable(name, each)) for name, each in _named(plan).items()}

    cost: dict[str, Cost] = {}
    most = len(grid) + refine
    total = sampling.responses * (len(first) * (1 + len(plans) * most) + 2 * len(second))
    with Progress(total, show=progress) as bar:
        bench = _Bench(model, first, judge, pairs[0], sampling, seed, bar, cost)
        curve: list[Point] = []
        for name, each in plans.items():
            found = search(lambda factor: bench.point(name, each, factor), grid, limits, refine=refine)  # noqa: B023
            bar.advance((most - len(found)) * sampling.responses * len(first))
            curve += found
        chosen = best_within(curve, limits)
        reported = None
        if chosen is not None:
            held = _Bench(model, second, judge, pairs[1], sampling, seed, bar, cost)
            reported = held.point(chosen.candidate, plans[chosen.candidate], chosen.factor)
    units = {i.units for each in plans.values() for i in each.interventions}
    return Calibration(
        model=adapt(model).name,
        objective=judge.name if judge is not None else behaviour.name if behaviour is not None else "",
        units=units.pop() if len(units) == 1 else "mixed",
        budget=limits,
        curve=tuple(curve),
        report=reported,
        prompts=(len(first), len(second)),
        responses=sampling.responses,
        seed=seed,
        cost=cost,
        steering=None if chosen is None else plans[chosen.candidate].scaled(chosen.factor),
    )


class _Bench:
    """One split of the prompts with what is measured on it; the unsteered model is measured first, once."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[str],
        ranker: CheckedRanker | None,
        behaviour: PairBehaviour | None,
        sampling: SamplingConfig,
        seed: int,
        bar: Progress,
        cost: dict[str, Cost],
    ) -> None:
        self.model, self.prompts, self.ranker, self.behaviour = model, prompts, ranker, behaviour
        self.sampling, self.seed, self.bar, self.cost = sampling, seed, bar, cost
        self.adapter, self.sampler = adapt(model), LocalSampler(model, sampling)
        self.encoded = [self.adapter.encode(prompt) for prompt in prompts]
        bar.phase("unsteered")
        self.base = self.drawn(NOTHING)
        if not any(s.tokens for s in self.base):
            raise PromptError(
                f"the unsteered model answers none of {len(prompts)} prompts with a single token: there is no text to "
                "compare with; give other prompts"
            )
        self.margins = self.measured(NOTHING)

    def point(self, name: str, plan: SteeringPlan, factor: float) -> Point:
        """A candidate at one factor."""
        scaled = plan.scaled(factor)
        self.bar.phase(f"{name} x {factor:.3g}")
        samples = self.drawn(scaled)
        samples, base = self.scored(samples)
        evaluation = evaluate(samples, base, seed=self.seed)
        if self.behaviour is not None:
            effect = self.margin_effect(self.measured(scaled))
            evaluation = replace(evaluation, score=effect.score, difference=effect.difference, win_rate=effect.win_rate)
        return Point(
            candidate=name,
            factor=factor,
            coefficient=max((i.coefficient for i in scaled.interventions), key=abs),
            evaluation=evaluation,
            perplexity_ratio=perplexity_ratio(samples, base, seed=self.seed),
        )

    def drawn(self, plan: SteeringPlan) -> list[Sample]:
        """Responses under a plan with their fluency."""
        samples = []
        with self.spending("sample", self.sampler):
            for sample in self.sampler.sample(self.prompts, n=self.sampling.responses, plan=plan, seed=self.seed):
                samples.append(sample)
                self.bar.advance(1)
        with self.spending("measure") as meter:
            samples = side_effects(self.model, self.prompts, samples, plan)
            for _ in range(2 if plan.interventions else 1):
                meter.add(forced_count(self.encoded, [(s.prompt, s.tokens) for s in samples]))
        if not any(s.tokens for s in samples):
            return samples
        return [s if s.tokens else replace(s, nll=None, kl=None) for s in samples]

    def scored(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Steered and unsteered samples with scores that may be compared: a prompt's are ranked together."""
        groups, base_groups = by_prompt(samples), by_prompt(self.base)
        both = [[*ours, *theirs] for ours, theirs in zip(groups, base_groups, strict=True)]
        if self.ranker is None:  # the effect is the behaviour's; these scores are not looked at
            scores: list[tuple[float, ...]] = [(0.0,) * len(group) for group in both]
        else:
            with self.spending("rank", self.ranker):
                asked = [(self.prompts[group[0].prompt], [s.text for s in group]) for group in both]
                scores = self.ranker.rank_all(asked)
        split = [
            [replace(s, score=score) for s, score in zip(group, given, strict=True)]
            for group, given in zip(both, scores, strict=True)
        ]
        sizes = [len(ours) for ours in groups]
        return (
            [s for group, size in zip(split, sizes, strict=True) for s in group[:size]],
            [s for group, size in zip(split, sizes, strict=True) for s in group[size:]],
        )

    def measured(self, plan: SteeringPlan) -> np.ndarray:
        """The behaviour's margins under a plan; none without a behaviour."""
        if self.behaviour is None:
            return np.empty(0)
        with self.spending("behaviour"):
            return self.behaviour.measure(self.model, plan).double().numpy()

    def margin_effect(self, margins: np.ndarray) -> Effect:
        """Margins against the unsteered ones, pairs of one prompt averaged first."""
        assert self.behaviour is not None
        rows: dict[str, list[int]] = {}
        for index, (prompt, _, _) in enumerate(self.behaviour.pairs):
            rows.setdefault(prompt, []).append(index)

        def over_prompts(values: np.ndarray) -> Interval:
            return bootstrap_mean(np.array([values[index].mean() for index in rows.values()]), seed=self.seed)

        change = margins - self.margins
        return Effect(
            score=over_prompts(margins),
            difference=over_prompts(change),
            win_rate=over_prompts((change > 0) + 0.5 * (change == 0)),
        )

    @contextmanager
    def spending(self, phase: str, counts: object = None) -> Iterator[Meter]:
        """Add what a phase took; ``counts`` is what counts its tokens, a sampler or a ranker."""
        meter = Meter(getattr(counts, "count", None), self.adapter.arithmetic)
        try:
            with meter:
                yield meter
        finally:
            self.cost[phase] = self.cost.get(phase, Cost()) + meter.cost


def _checked_grid(factors: Sequence[float], refine: int, report: float) -> tuple[float, ...]:
    grid = tuple(factors)
    if not grid or len(set(grid)) < len(grid):
        raise ConfigError(f"factors must be different positive numbers, such as {FACTORS}, got {factors!r}")
    for factor in grid:
        if not _is_number(factor) or not (math.isfinite(factor) and factor > 0):
            raise ConfigError(f"a factor must be a positive number, got {factor!r}; for the other sign calibrate -plan")
    if type(refine) is not int or refine < 0:
        raise ConfigError(f"refine must be an integer from 0 up, got {refine!r}")
    if not _is_number(report) or not 0 < report < 1:
        raise ConfigError(f"report must be a share of the prompts, between 0 and 1, got {report!r}")
    return tuple(float(factor) for factor in grid)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _named(plan: object) -> dict[str, SteeringPlan]:
    """The candidates by name: that of their layers, or a number where two have the same."""
    if isinstance(plan, Mapping):
        plans = {str(name): each for name, each in plan.items()}
    else:
        each = list(plan) if isinstance(plan, Sequence) else [plan]
        names = [
            f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
            for layers in (getattr(p, "layers", ()) for p in each)
        ]
        if len(set(names)) < len(names):
            names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
        plans = dict(zip(names, each, strict=True))
    if not plans:
        raise PlanError("there are no plans to calibrate; give a SteeringPlan, or several")
    return plans


def _scalable(name: str, plan: SteeringPlan) -> SteeringPlan:
    """The plan, unless every coefficient is zero. What is no plan is left to :func:`resolve`."""
    if isinstance(plan, SteeringPlan) and not any(i.coefficient for i in plan.interventions):
        raise PlanError(f"candidate {name!r} has no coefficient other than 0: there is nothing to scale")
    return plan


def _split(items: Sequence[str], report: float, seed: int, what: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The items for calibration and for the report, by a seeded shuffle; each in the order given."""
    held = round(len(items) * report)
    if min(held, len(items) - held) < MIN_PROMPTS:
        raise PromptError(
            f"{len(items)} {what} give {len(items) - held} to calibrate on and {held} to report on; at least "
            f"{MIN_PROMPTS} of each are needed (about 30 for an interval worth having): give more"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(items))[:held].tolist())
    return (
        tuple(item for index, item in enumerate(items) if index not in chosen),
        tuple(item for index, item in enumerate(items) if index in chosen),
    )


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


__all__ = [
    "FACTORS",
    "Calibration",
    "FluencyBudget",
    "Point",
    "best_within",
    "calibrate",
    "search",
]
