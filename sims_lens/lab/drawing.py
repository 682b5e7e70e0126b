"""The responses that an experiment compares, steered and base, at the same random numbers: drawn, measured, ranked."""

from collections.abc import Sequence
from typing import Any

from sims_lens.config import SamplingConfig
from sims_lens.data import Sample
from sims_lens.errors import ConfigError
from sims_lens.evaluate import side_effects
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.rankers import CheckedRanker, rank
from sims_lens.sampling import LocalSampler
from sims_lens.workbench import rank_beside


def draw(
    model: Any,
    prompts: Sequence[str],
    plan: SteeringPlan,
    *,
    n: int,
    seed: int,
    sampling: SamplingConfig | None = None,
    bar: Progress | None = None,
) -> list[Sample]:
    """Responses under a plan with their likelihood and divergence, in order; measured while drawn where that works."""
    engine = LocalSampler(model, sampling)
    measures = engine.reads(plan)
    stream = (engine.sample_and_measure if measures else engine.sample)(prompts, n=n, plan=plan, seed=seed)
    found = []
    for sample in stream:
        found.append(sample)
        if bar is not None:
            bar.advance()
    found.sort(key=lambda s: (s.prompt, s.draw))
    return found if measures else side_effects(model, prompts, found, plan)


def base_and_steered(
    model: Any,
    prompts: Sequence[str],
    plan: SteeringPlan,
    *,
    n: int,
    seed: int,
    sampling: SamplingConfig | None = None,
    bar: Progress | None = None,
) -> tuple[list[Sample], list[Sample]]:
    """Responses of the unsteered model, and of the steered one at the same random numbers."""
    base = draw(model, prompts, NOTHING, n=n, seed=seed, sampling=sampling, bar=bar)
    return base, draw(model, prompts, plan, n=n, seed=seed, sampling=sampling, bar=bar)


def ranked(
    ranker: CheckedRanker, prompts: Sequence[str], steered: Sequence[Sample], base: Sequence[Sample]
) -> tuple[list[Sample], list[Sample]]:
    """Steered and base samples with scores that can be compared: ranked in one list where they hold only there."""
    ours, theirs = rank_beside(ranker, prompts, steered, base)
    return ours, rank(ranker, prompts, base) if theirs is None else theirs


def check_count(name: str, value: object, low: int = 1) -> None:
    """Raise :class:`ConfigError` unless a count is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")


__all__ = ["base_and_steered", "check_count", "draw", "ranked"]
