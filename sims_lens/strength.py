"""How strong may a plan be? The strength at which it spends a budget of KL divergence, found by forward passes alone.

A coefficient says little: the dose that moves one layer breaks another. KL(steered || base) of the next-token
distributions says how far the model was moved, in a unit that is the same for every layer, direction and model. For a
small addition it grows with the square of the coefficient, so that one or two passes tell the strength.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sims_lens.adapter import adapt
from sims_lens.cost import TokenCount, forced_count
from sims_lens.data import Sample
from sims_lens.evaluate import kl_divergence
from sims_lens.hooks import steering
from sims_lens.plan import SteeringPlan
from sims_lens.twin import response_logits

RESPONSES = 8
"""Responses that the divergence is measured on, to different prompts: a strength need not be known to a percent."""

TOKENS = 40
"""Of each response, at most: a distribution over the vocabulary is held for each of them."""

NEAR = 4.0
"""Within this factor of the budget the square law is trusted: on SmolLM2-135M-Instruct, at three layers and over three
iterations, what it foretold was within 4% of what was measured there."""

PASSES = 8

logger = logging.getLogger(__name__)


class Divergence:
    """Mean KL(steered || base) of plans on given responses, nats per token; the base model is run once.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        prompts: those that ``Sample.prompt`` counts.
        samples: responses of the unsteered model; the first :data:`TOKENS` tokens of the first one to each of the
            first :data:`RESPONSES` prompts are used.
    """

    def __init__(self, model: Any, prompts: Sequence[str], samples: Sequence[Sample]) -> None:
        adapter = adapt(model)
        first = {s.prompt: s for s in reversed(samples) if s.tokens}
        chosen = [first[prompt] for prompt in list(dict.fromkeys(s.prompt for s in samples if s.tokens))[:RESPONSES]]
        self.model = model
        self.prompts = [adapter.encode(prompts[s.prompt]) for s in chosen]
        self.rows = [(index, s.tokens[:TOKENS]) for index, s in enumerate(chosen)]
        lengths = torch.tensor([len(tokens) for _, tokens in self.rows])
        self.counted = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).to(adapter.device)
        self.count = TokenCount()
        self.base = self._log_probs()

    def _log_probs(self) -> torch.Tensor:
        self.count.take(forced_count(self.prompts, self.rows))
        with torch.inference_mode():
            return response_logits(self.model, self.prompts, self.rows).float().log_softmax(-1)

    def of(self, plan: SteeringPlan) -> float:
        """The divergence of a plan."""
        with steering(self.model, plan):
            steered = self._log_probs()
        with torch.inference_mode():
            return float(kl_divergence(steered, self.base)[self.counted].double().mean())


@dataclass(frozen=True)
class Strength:
    """A strength that was found.

    Args:
        factor: what the plan's coefficients are to be multiplied by.
        kl: mean KL(steered || base) there, nats per token: measured, or foretold from no further than :data:`NEAR`.
        passes: steered forward passes that it took.
    """

    factor: float
    kl: float
    passes: int


def find_strength(divergence: Divergence, plan: SteeringPlan, *, kl: float) -> Strength:
    """Scale a plan to a mean KL(steered || base).

    Args:
        divergence: what measures it.
        plan: it must move the model.
        kl: the budget, nats per token.
    """
    return solve(lambda factor: divergence.of(plan.scaled(factor)), kl)


def solve(divergence: Callable[[float], float], wanted: float) -> Strength:
    """The factor at which a divergence, which rises with it, is what is wanted.

    The square law leads from one factor to the next; the first one that comes near foretells the result.

    Args:
        divergence: of a factor.
        wanted: above 0.

    Returns:
        The strength. Where :data:`PASSES` do not come near, the nearest that was measured, with a warning.

    >>> solve(lambda factor: 0.05 * factor**2, 0.2)
    Strength(factor=2.0, kl=0.2, passes=1)
    """
    factor, low, high = 1.0, 0.0, math.inf
    seen: list[tuple[float, float]] = []
    for passes in range(1, PASSES + 1):
        found = divergence(factor)
        if math.isfinite(found) and wanted / NEAR <= found <= wanted * NEAR:
            return Strength(factor * math.sqrt(wanted / found), wanted, passes)
        seen.append((factor, found if math.isfinite(found) else math.inf))
        if seen[-1][1] > wanted:
            high = min(high, factor)
            leap = max(0.1, math.sqrt(wanted / found)) if math.isfinite(found) else 0.1
        else:
            low = max(low, factor)
            leap = min(10.0, math.sqrt(wanted / found)) if found > 0 else 10.0
        factor *= leap
        if not low < factor < high:  # between what is too small and what is too large
            factor = math.sqrt(low * high)
    factor, found = min(seen, key=lambda point: abs(math.log(max(point[1], 1e-12) / wanted)))
    logger.warning("no strength was found that spends %g nats of KL per token; the nearest spends %.3g", wanted, found)
    return Strength(factor, found, PASSES)


__all__ = ["RESPONSES", "TOKENS", "Divergence", "Strength", "find_strength", "solve"]
