"""Several behaviours at once: does each plan still do what it does alone, and does one do the work of another?"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch.nn.functional import cosine_similarity

from sims_lens.checks import check_mapping, check_seed
from sims_lens.config import SamplingConfig
from sims_lens.data import Sample
from sims_lens.errors import ConfigError
from sims_lens.evaluate import Evaluation, evaluate, side_effects
from sims_lens.hooks import check_unsteered, resolve
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import check_prompts
from sims_lens.rankers import bound_ranker, rank
from sims_lens.sampling import LocalSampler
from sims_lens.stats import Interval, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

TOGETHER = "together"
"""The name of all plans attached at once, in the order that they were given in."""


@dataclass(frozen=True)
class Interaction:
    """What plans do alone and together, by every ranker; made by :func:`interaction`.

    Args:
        plans: the plans by name.
        evaluations: for each ranker, for each plan and ``"together"``, the evaluation against the base model.
        interaction: for each ranker, the effect of all plans together less the sum of their effects alone, in the
            ranker's units, paired by prompt. 0: they add up; a negative one: they get in each other's way, or the
            score saturates.
        cosines: of the steered directions of two plans, for each layer and site that they share.
        prompts: how many.
        samples: responses to each prompt, of each plan.
    """

    plans: dict[str, SteeringPlan] = field(repr=False)
    evaluations: dict[str, dict[str, Evaluation]]
    interaction: dict[str, Interval]
    cosines: dict[tuple[str, str], dict[tuple[int, str], float]]
    prompts: int
    samples: int

    def table(self) -> "pd.DataFrame":
        """One row per ranker and plan: effect and win rate with their intervals, NLL and KL; and the interaction."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for ranker, found in self.evaluations.items():
            for plan, e in found.items():
                row: dict[str, Any] = {"ranker": ranker, "plan": plan}
                shown = {"effect": e.difference, "win_rate": e.win_rate, "nll": e.nll, "kl": e.kl}
                for name, interval in shown.items():
                    row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
                rows.append(row)
            term = self.interaction[ranker]
            rows.append(
                {
                    "ranker": ranker,
                    "plan": "interaction",
                    "effect": term.estimate,
                    "effect_low": term.low,
                    "effect_high": term.high,
                }
            )
        return pd.DataFrame(rows).set_index(["ranker", "plan"])

    def __repr__(self) -> str:
        head, *rows = self._cells()
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        lines = [self._head()]
        for row in (head, *rows):
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return "\n".join([*lines, *self._overlaps()])

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        below = "<br>".join(html.escape(line) for line in self._overlaps())
        return f"<p>{html.escape(self._head())}</p><table><tr>{top}</tr>{body}</table><p>{below}</p>"

    def _head(self) -> str:
        return f"Interaction of {' and '.join(self.plans)}, {self.prompts} prompts x {self.samples} samples"

    def _cells(self) -> list[tuple[str, ...]]:
        names = [*self.plans, TOGETHER]
        cells = [("effect by [95%]", *names, "together less the sum")]
        for ranker, found in self.evaluations.items():
            shown = [_signed(found[name].difference) for name in names]
            cells.append((ranker, *shown, _signed(self.interaction[ranker])))
        first = next(iter(self.evaluations.values()))
        cells.append(("NLL", *(f"{first[name].nll.estimate:.2f}" for name in names), ""))
        cells.append(("KL", *(f"{first[name].kl.estimate:.2f}" for name in names), ""))
        return cells

    def _overlaps(self) -> list[str]:
        lines = []
        for (a, b), found in self.cosines.items():
            at = ", ".join(f"layer {layer} {site}: {cosine:+.2f}" for (layer, site), cosine in found.items())
            lines += [f"cosine of {a} and {b} at {at}"] if at else []
        return lines


def interaction(
    model: Any,
    plans: Mapping[str, SteeringPlan],
    rankers: Mapping[str, object],
    prompts: Sequence[str],
    *,
    samples: int = 2,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Interaction:
    """Measure plans alone and together, by every ranker, with the same random numbers.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        plans: two or more, by name, for instance ``{"cheerful": a, "plain": b}``. Together they are attached as
            ``a + b``, in this order.
        rankers: one for each behaviour that is of interest, by name; any that ``sims.improve`` accepts.
        prompts: on which to measure; not those that the plans were fitted on.
        samples: responses to each prompt, of each plan.
        sampling: how responses are drawn.
        seed: of the sampling and the bootstrap.
        progress: show a progress bar.

    Raises:
        ConfigError: fewer than two plans, no rankers, or a plan called "together".
        PlanError: a plan does not fit the model, or plans were made for different models.
    """
    check_unsteered(model)
    check_mapping("plans", plans, "{'a': plan, 'b': other}")
    check_mapping("rankers", rankers, "{'cheerful': sims.Vader()}")
    check_seed(seed)
    if len(plans) < 2 or TOGETHER in plans:
        raise ConfigError(f"give two or more plans by name, none of them called {TOGETHER!r}; got {sorted(plans)}")
    if not rankers:
        raise ConfigError("give at least one ranker by name, such as {'cheerful': sims.Vader()}")
    if type(samples) is not int or samples < 1:
        raise ConfigError(f"samples must be an integer of at least 1, got {samples!r}")
    texts = check_prompts(prompts)
    judges = {name: bound_ranker(ranker, model) for name, ranker in rankers.items()}
    known = {name: resolve(model, plan) for name, plan in plans.items()}
    everything = NOTHING
    for plan in known.values():
        everything = everything + plan
    engine = LocalSampler(model, sampling)
    drawn: dict[str, list[Sample]] = {}
    with Progress((len(plans) + 2) * len(texts) * samples, show=progress) as bar:
        for name, plan in {"base": NOTHING, **known, TOGETHER: everything}.items():
            bar.phase(f"sampling: {name}")
            drawn[name] = []
            for sample in engine.sample(texts, n=samples, plan=plan, seed=seed):
                drawn[name].append(sample)
                bar.advance()
            drawn[name] = side_effects(model, texts, drawn[name], plan)
    scored = {
        name: {plan: rank(judge, texts, found) for plan, found in drawn.items()} for name, judge in judges.items()
    }
    return Interaction(
        plans=dict(plans),
        evaluations={
            name: {plan: evaluate(by_plan[plan], by_plan["base"], seed=seed) for plan in (*plans, TOGETHER)}
            for name, by_plan in scored.items()
        },
        interaction={
            name: bootstrap_mean(_beyond_the_sum({plan: _per_prompt(s) for plan, s in by_plan.items()}), seed=seed)
            for name, by_plan in scored.items()
        },
        cosines={(a, b): _cosines(known[a], known[b]) for a, b in combinations(known, 2)},
        prompts=len(texts),
        samples=samples,
    )


def _beyond_the_sum(scores: Mapping[str, Float[np.ndarray, " prompt"]]) -> Float[np.ndarray, " prompt"]:
    """Effect together less the sum of the effects alone, for each prompt.

    >>> _beyond_the_sum({k: np.array([v]) for k, v in {"base": 1.0, "a": 2.0, "b": 3.0, "together": 3.5}.items()})
    array([-0.5])
    """
    alone = sum(scores[name] - scores["base"] for name in scores if name not in ("base", TOGETHER))
    beyond: Float[np.ndarray, " prompt"] = scores[TOGETHER] - scores["base"] - alone
    return beyond


def _per_prompt(samples: Sequence[Sample]) -> Float[np.ndarray, " prompt"]:
    groups: dict[int, list[float]] = {}
    for sample in samples:
        assert sample.score is not None
        groups.setdefault(sample.prompt, []).append(sample.score)
    return np.array([np.mean(groups[prompt]) for prompt in sorted(groups)])


def _cosines(a: SteeringPlan, b: SteeringPlan) -> dict[tuple[int, str], float]:
    """Cosine of the directions at each layer and site where both plans have exactly one."""
    found = {}
    for i in a.interventions:
        for j in b.interventions:
            if (i.layer, i.site) == (j.layer, j.site):
                first, second = (getattr(k.transform, "direction", None) for k in (i, j))
                if first is not None and second is not None:
                    sign = 1.0 if i.coefficient * j.coefficient > 0 else -1.0
                    found[i.layer, i.site] = sign * float(cosine_similarity(first, second, dim=0))
    return found


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"
