"""Does the steering do on other prompts what it does on those like the ones that it was learnt on?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sims_lens.config import SamplingConfig
from sims_lens.errors import ConfigError
from sims_lens.evaluate import Evaluation, evaluate, perplexity_ratio, score_changes
from sims_lens.hooks import check_unsteered, resolve
from sims_lens.lab.drawing import base_and_steered, check_count, ranked
from sims_lens.lab.failures import FailureLedger, failures
from sims_lens.lab.shown import Shown, columns, relation, signed
from sims_lens.plan import SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import GROUPS, check_prompts, everyday, group
from sims_lens.rankers import bound_ranker
from sims_lens.stats import DRAWS, Interval, bca

if TYPE_CHECKING:
    import pandas as pd

EVERYDAY = 24
"""Everyday prompts in the default groups: the last ones, which the first do not overlap."""


@dataclass(frozen=True, repr=False)
class OutOfDistribution(Shown):
    """A plan's effect on groups of prompts; made by :func:`out_of_distribution`.

    Args:
        ranker: by which.
        evaluations: of each group, against the base model on the same prompts.
        perplexity: of the steered text over that of the base model's, in each group.
        ledgers: what went wrong in each group, against the base model.
        gaps: effect in each group but the first less that in the first; prompts of both resampled.
        prompts: how many in each group.
        samples: responses to each.
    """

    ranker: str
    evaluations: Mapping[str, Evaluation]
    perplexity: Mapping[str, Interval]
    ledgers: Mapping[str, FailureLedger]
    gaps: Mapping[str, Interval]
    prompts: Mapping[str, int]
    samples: int

    @property
    def reference(self) -> str:
        """The group that the others are held against."""
        return next(iter(self.evaluations))

    def table(self) -> "pd.DataFrame":
        """One row per group: effect, win rate, gap, perplexity ratio with their intervals, and KL."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for name, e in self.evaluations.items():
            row: dict[str, Any] = {"group": name, "prompts": self.prompts[name], "base": _base(e)}
            row |= columns(effect=e.difference, win_rate=e.win_rate, gap=self.gaps.get(name))
            broken = self.ledgers[name]["any"]
            row |= columns(perplexity_ratio=self.perplexity[name], kl=e.kl)
            rows.append(row | columns(failures=broken.steered, base_failures=broken.base))
        return pd.DataFrame(rows).set_index("group")

    def head(self) -> str:
        """One line."""
        return f"Effect by {self.ranker} on {len(self.evaluations)} groups of prompts, {self.samples} responses to each"

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text."""
        rows: list[tuple[str, ...]] = [
            (
                "group",
                "prompts",
                "base",
                "effect [95%]",
                "win rate",
                f"less {self.reference}",
                "perplexity x",
                "KL",
                "failures (base)",
            )
        ]
        for name, e in self.evaluations.items():
            figures = (f"{_base(e):.3g}", signed(e.difference), str(e.win_rate), signed(self.gaps.get(name)))
            ratio, broken = self.perplexity[name], self.ledgers[name]["any"]
            failed = f"{100 * broken.steered.estimate:.0f}% ({100 * broken.base.estimate:.0f}%)"
            rows.append(
                (name, f"{self.prompts[name]}", *figures, f"{ratio.estimate:.2f}", f"{e.kl.estimate:.2f}", failed)
            )
        return rows

    def verdict(self) -> str:
        """In which groups it works, and where it is shown to be weaker or stronger."""
        by = {word: [n for n, e in self.evaluations.items() if relation(e.difference) == word] for word in _WORDS}
        parts = [f"{_WORDS[word]} in {', '.join(names)}" for word, names in by.items() if names]
        text = f"The score {'; '.join(parts)}."
        weaker = [name for name, gap in self.gaps.items() if gap.high < 0]
        stronger = [name for name, gap in self.gaps.items() if gap.low > 0]
        for names, what in ((weaker, "smaller"), (stronger, "larger")):
            if names:
                text += f" The effect is {what} than in {self.reference} in {', '.join(names)}."
        if not weaker and not stronger and self.gaps:
            text += f" No group's effect is shown to differ from that in {self.reference}."
        for name, ledger in self.ledgers.items():
            text += f" In {name} there is more of: {', '.join(ledger.more)}." if ledger.more else ""
        return text


_WORDS = {"rises": "rises", "falls": "falls", "is not shown to change": "is not shown to change"}


def out_of_distribution(
    model: Any,
    plan: SteeringPlan,
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    ranker: object,
    samples: int = 2,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> OutOfDistribution:
    """Measure a plan on groups of prompts, each against the base model at the same random numbers.

    Args:
        model: unsteered.
        plan: what steers.
        groups: prompts by name; the first group is what the others are held against, so prompts like those that the
            plan was learnt on, but none of them. None: the last 24 everyday prompts, and three groups of 14 that come
            with the package: code and maths, very short ones, other languages.
        ranker: any that ``sims.improve`` accepts. One that means little in a group says little there: reading ease is
            made for English.
        samples: responses to each prompt.
        sampling: how they are drawn.
        seed: of the sampling and the intervals.
        progress: show a progress bar.

    Raises:
        ConfigError: there are fewer than two groups, or ``samples`` is no count.
        PromptError: prompts of a group are empty or duplicate, or there are fewer than two.
    """
    check_unsteered(model)
    check_count("samples", samples)
    named = default_groups() if groups is None else groups
    if not isinstance(named, Mapping) or len(named) < 2:
        raise ConfigError(
            "give two or more groups of prompts by name, the first like those that the plan was learnt on"
        )
    texts = {name: check_prompts(prompts) for name, prompts in named.items()}
    if small := [name for name, prompts in texts.items() if len(prompts) < 2]:
        raise ConfigError(
            f"the group {small[0]!r} has one prompt; give two or more, a dozen for an interval worth having"
        )
    plan, judge = resolve(model, plan), bound_ranker(ranker, model)
    evaluations, ratios, ledgers, changes = {}, {}, {}, {}
    with Progress(2 * samples * sum(map(len, texts.values())), show=progress) as bar:
        for name, prompts in texts.items():
            bar.phase(name)
            base, steered = base_and_steered(model, prompts, plan, n=samples, seed=seed, sampling=sampling, bar=bar)
            ours, theirs = ranked(judge, prompts, steered, base)
            evaluations[name] = evaluate(ours, theirs, seed=seed)
            ratios[name] = perplexity_ratio(ours, theirs, seed=seed)
            ledgers[name] = failures(ours, theirs, prompts, seed=seed)
            changes[name] = score_changes(ours, theirs)
    reference, *others = changes
    return OutOfDistribution(
        ranker=judge.name,
        evaluations=evaluations,
        perplexity=ratios,
        ledgers=ledgers,
        gaps={name: difference_of_means(changes[name], changes[reference], seed=seed) for name in others},
        prompts={name: len(prompts) for name, prompts in texts.items()},
        samples=samples,
    )


def default_groups() -> dict[str, list[str]]:
    """The groups that come with the package, the everyday ones first."""
    return {"everyday": everyday()[-EVERYDAY:], **{name.replace("_", " "): group(name) for name in GROUPS}}


def difference_of_means(
    first: Float[np.ndarray, " prompt"], second: Float[np.ndarray, " other_prompt"], *, seed: int = 0
) -> Interval:
    """Mean of one group of prompts less that of another, both resampled; BCa as in :func:`sims_lens.stats.bca`.

    >>> difference_of_means(np.ones(3), np.zeros(4)).estimate
    1.0
    """
    rng = np.random.default_rng(seed)
    drawn = [values[rng.integers(0, len(values), size=(DRAWS, len(values)))].mean(axis=1) for values in (first, second)]
    influence = np.concatenate([(first - first.mean()) / len(first), (second.mean() - second) / len(second)])
    return bca(float(first.mean() - second.mean()), drawn[0] - drawn[1], influence)


def _base(e: Evaluation) -> float:
    """The base model's mean score."""
    return e.score.estimate - e.difference.estimate


__all__ = ["EVERYDAY", "OutOfDistribution", "default_groups", "difference_of_means", "out_of_distribution"]
