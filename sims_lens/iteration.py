"""One turn of the loop, without the disk: capture, fit, compose.

Notation. For layer l and iteration t, d_t is the mean difference of the pairs' activations, u_t = d_t / |d_t| its
direction, m the median norm of the base model's responses at the site. The vector that is added after iteration t is

    s_t = m * sum over i <= t of c_i * u_i

with a coefficient c_i for each iteration so far. With a fixed total strength c and T iterations they are

    accumulate:  c_i = c / T
    replace:     c_t = c, all others 0

and with strength "auto" they have the same proportions and are scaled so that s_t spends a budget of KL divergence:
kl * t / T when accumulating (a trust region of kl / T for each iteration), kl when replacing. An iteration that was
rolled back has c_i = 0.

The paper (SIMS, arXiv 2507.08967) leaves open how transforms are composed across iterations. Accumulating makes each
iteration a step from where the last one stood, because its pairs were drawn from the model as steered so far; the
dose grows with t, so a rise over iterations alone is no evidence for the method: look at the norm-matched controls.
Replacing keeps the dose constant and throws away what earlier iterations found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import capture
from sims_lens.adapter import adapt
from sims_lens.config import SIMSConfig, SteeringConfig
from sims_lens.contrast import Contrast
from sims_lens.errors import TooFewPairsError
from sims_lens.estimators import mean_difference, shuffled_mean_differences, split_half_cosine, unit
from sims_lens.hooks import steering
from sims_lens.plan import Provenance, SteeringPlan
from sims_lens.sampling import Readings

FIRST_GUESS = 0.2
"""Total strength from which "auto" starts to look for the right one, in units of the median norm."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What one iteration learnt, at every layer.

    Args:
        mean_difference: d_t.
        shuffled: mean differences of the same pairs under shuffled labels, the null controls.
        median_norm: median norm of the responses' stream, per layer.
        split_half: split-half cosine of the direction, per layer.
    """

    mean_difference: Float[Tensor, "layer d_model"]
    shuffled: Float[Tensor, "control layer d_model"]
    median_norm: Float[Tensor, " layer"]
    split_half: Float[Tensor, " layer"]


def fit_contrast(
    model: Any,
    prompts: Sequence[str],
    contrast: Contrast,
    plan: SteeringPlan,
    config: SIMSConfig,
    *,
    seed: int,
    readings: Readings | None = None,
) -> Fit:
    """Capture the pairs' activations in one pass over all layers and fit the mean difference at each.

    Both responses of a pair are read with ``plan`` attached, averaged over response tokens: under one plan, so that a
    constant addition at the site drops out of the difference.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        prompts: those that the pairs count.
        contrast: the pairs.
        plan: what they are read under.
        config: the choices.
        seed: of the shuffled labels and the split halves.
        readings: what was read of the very samples while they were drawn under ``plan``; then no pass is needed.

    Raises:
        TooFewPairsError: fewer than two pairs are left.
    """
    if len(contrast.pairs) < 2:
        raise TooFewPairsError(
            f"only {len(contrast.pairs)} contrast pairs are left (dropped: {contrast.dropped}); the ranker hardly "
            "tells the responses apart. Give more prompts or responses, or a smaller min_margin"
        )
    chosen = [(pair.prompt, sample) for pair in contrast.pairs for sample in (pair.best, pair.worst)]
    if readings is not None:
        means, norms = readings.select([(prompt, sample.draw) for prompt, sample in chosen])
        median_norm = norms.median(dim=0).values
    else:
        adapter = adapt(model)
        encoded = {prompt: adapter.encode(prompts[prompt]) for prompt, _ in chosen}
        with steering(model, plan):
            read = capture(model, [(encoded[prompt], s.tokens) for prompt, s in chosen], site=config.steering.site)
        means, median_norm = read.means, read.median_norm
    best, worst = means[0::2], means[1::2]
    return Fit(
        mean_difference=mean_difference(best, worst),
        shuffled=shuffled_mean_differences(best, worst, count=config.evaluation.controls, seed=seed),
        median_norm=median_norm,
        split_half=split_half_cosine(best, worst, seed=seed),
    )


def step_coefficients(kept: Sequence[float], settings: SteeringConfig, iterations: int) -> list[float]:
    """Coefficients after one more iteration, in units of the median norm; those that "auto" scales.

    Args:
        kept: of the iterations so far.
        settings: of the run.
        iterations: T.

    >>> step_coefficients([0.25, 0.0], SteeringConfig(strength=0.75), 3)
    [0.25, 0.0, 0.25]
    """
    strength = FIRST_GUESS if settings.strength == "auto" else float(settings.strength)
    if settings.compose == "replace":
        return [0.0] * len(kept) + [strength]
    mean = [c for c in kept if c]
    if settings.strength == "auto" and mean:  # as much of each direction that was kept; all are scaled after that
        return [*kept, sum(mean) / len(mean)]
    return [*kept, strength / iterations]


def compose(
    directions: Sequence[Float[Tensor, "layer d_model"]],
    coefficients: Sequence[float],
    layers: Sequence[int],
    norms: Float[Tensor, " layer"],
    settings: SteeringConfig,
    provenance: Provenance,
) -> SteeringPlan:
    """The plan that adds some of each direction. Equations at the top of this module.

    Args:
        directions: one per iteration so far.
        coefficients: how much of each, in units of the median norm.
        layers: where to steer.
        norms: median norm, per layer.
        settings: site and scope.
        provenance: what made it.
    """
    vectors = _composed(directions, coefficients, layers, norms)
    return _as_plan(vectors, norms, settings, provenance)


def compose_control(
    shuffled: Sequence[Float[Tensor, "layer d_model"]],
    coefficients: Sequence[float],
    real: SteeringPlan,
    norms: Float[Tensor, " layer"],
    settings: SteeringConfig,
    provenance: Provenance,
) -> SteeringPlan:
    """A shuffled-label plan composed like the real one and scaled to its norm at every site."""
    wanted = {layer: vector.norm() for (layer, _), vector in real.vectors().items()}
    vectors = _composed(shuffled, coefficients, list(wanted), norms)
    vectors = {layer: unit(vector) * wanted[layer] for layer, vector in vectors.items()}
    return _as_plan(vectors, norms, settings, provenance)


def _composed(
    directions: Sequence[Float[Tensor, "layer d_model"]],
    coefficients: Sequence[float],
    layers: Sequence[int],
    norms: Float[Tensor, " layer"],
) -> dict[int, Float[Tensor, " d_model"]]:
    total = torch.stack([c * unit(d) for d, c in zip(directions, coefficients, strict=True)]).sum(0)
    return {layer: total[layer] * norms[layer] for layer in layers}


def _as_plan(
    vectors: Mapping[int, Float[Tensor, " d_model"]],
    norms: Float[Tensor, " layer"],
    steering_config: SteeringConfig,
    provenance: Provenance,
) -> SteeringPlan:
    plans = [
        SteeringPlan.addition(
            {layer: vector},
            coefficient=float(vector.norm() / norms[layer]),
            units="residual_norm",
            site=steering_config.site,
            scope=steering_config.scope,
            residual_norms={layer: float(norms[layer])},
            provenance=provenance,
        )
        for layer, vector in vectors.items()
    ]
    return SteeringPlan(tuple(i for plan in plans for i in plan.interventions), provenance)


def candidate_layers(fractions: Sequence[float], n_layers: int) -> list[int]:
    """Layers at fractions of the depth, each once.

    >>> candidate_layers((0.6, 0.75, 0.9), 30)
    [17, 22, 26]
    """
    return sorted({min(n_layers - 1, int(round(fraction * (n_layers - 1)))) for fraction in fractions})
