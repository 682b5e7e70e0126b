"""A behaviour, one value for each independent unit."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sims_lens.adapter import Adapter, adapt
from sims_lens.behaviour import Behaviour, PairBehaviour, encode_pairs
from sims_lens.errors import ConfigError
from sims_lens.forced import ForcedBatch, force
from sims_lens.hooks import steering
from sims_lens.plan import SteeringPlan
from sims_lens.scope import GENERATION

Values = Float[np.ndarray, " unit"]


def rows_of(adapter: Adapter, behaviour: PairBehaviour) -> list[tuple[list[int], list[int]]]:
    """The texts of the pairs, the positive one of each first."""
    prompts, texts = encode_pairs(adapter, behaviour.pairs)
    return [(prompts[pair[0]], texts[text]) for pair in behaviour.pairs for text in pair[1:]]


class UnitMeter:
    """Measures a behaviour, one value per independent unit: pairs of one prompt are averaged.

    Pairs of texts are run teacher-forced, what the plans leave alone only once; that gives their NLL as well.

    Args:
        model: unsteered.
        behaviour: what is measured.
        plans: every plan that will be measured.
    """

    def __init__(self, model: Any, behaviour: Behaviour, plans: Iterable[SteeringPlan]) -> None:
        self.model, self.behaviour, self.unit = model, behaviour, behaviour.unit
        self._groups: list[list[int]] = []
        self._batches: list[ForcedBatch] = []
        if isinstance(behaviour, PairBehaviour):
            prompts: dict[str, list[int]] = {}
            for index, (prompt, _, _) in enumerate(behaviour.pairs):
                prompts.setdefault(prompt, []).append(index)
            if 1 < len(prompts) < len(behaviour.pairs):
                self._groups, self.unit = list(prompts.values()), "prompt"
            self._prepare(behaviour, [plan for plan in plans if plan.interventions])

    def _prepare(self, behaviour: PairBehaviour, plans: Sequence[SteeringPlan]) -> None:
        scopes = {i.scope for plan in plans for i in plan.interventions}
        rows = rows_of(adapt(self.model), behaviour)
        replayed = any(plan.layers[0] for plan in plans)
        self._base = torch.empty(len(rows), dtype=torch.float64)
        for batch in force(self.model, rows, scope=reduce(or_, scopes, GENERATION), together=2):
            self._base[list(batch.rows)] = batch.mean(batch.logprobs(batch.logits)).double().cpu()
            # What no run needs is let go: the unsteered logits of all texts may take gigabytes.
            streams = batch.streams if replayed else ()
            self._batches.append(replace(batch, logits=batch.logits[..., :0].clone(), streams=streams))

    def __call__(self, plan: SteeringPlan) -> Values:
        """The behaviour under a plan."""
        return self.with_nll(plan)[0]

    def with_nll(self, plan: SteeringPlan) -> tuple[Values, Values | None]:
        """The behaviour under a plan, and the mean NLL of both texts of a pair; None where there are no texts."""
        if not self._batches:
            return self._reduced(self.behaviour.measure(self.model, plan).double().cpu().numpy()), None
        means = self._base
        if plan.interventions:
            means = torch.empty_like(self._base)
            with torch.no_grad(), steering(self.model, plan):
                for batch in self._batches:
                    logprobs = batch.logprobs(batch.run(layer=plan.layers[0]))
                    means[list(batch.rows)] = batch.mean(logprobs).double().cpu()
        pairs = means.reshape(-1, 2).numpy()
        return self._reduced(pairs[:, 0] - pairs[:, 1]), self._reduced(-pairs.mean(1))

    def _reduced(self, values: Float[np.ndarray, " value"]) -> Values:
        found = np.array([values[group].mean() for group in self._groups]) if self._groups else values
        if len(found) < 2:
            raise ConfigError(f"an interval needs two units of the behaviour or more, got {len(found)} {self.unit}")
        return found


def checked_behaviour(behaviour: object, controls: int, seed: int) -> Behaviour:
    """The behaviour, if all three are what they should be."""
    if isinstance(behaviour, (list, tuple)):
        behaviour = PairBehaviour(behaviour)
    if not isinstance(behaviour, Behaviour):
        raise ConfigError(
            f"expected a behaviour such as sims.PairBehaviour([(prompt, positive, negative), ...]), got "
            f"{type(behaviour).__name__}"
        )
    for name, value in (("controls", controls), ("seed", seed)):
        if type(value) is not int or value < 0:
            raise ConfigError(f"{name} must be an integer from 0 up, got {value!r}")
    return behaviour


__all__ = ["UnitMeter", "Values", "checked_behaviour", "rows_of"]
