"""Strength from a budget of divergence: the search, and the divergence it is held to."""

import logging
import math
from typing import Any

import numpy as np
import pytest
from common import vector

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.data import Sample
from sims_lens.evaluate import side_effects
from sims_lens.strength import NEAR, PASSES, Divergence, find_strength, solve

PROMPTS = ["Say sea.", "Say rain and wind.", "Say a.", "Say nothing."]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("wanted", [0.01, 0.3])
def test_the_square_law_is_solved_wherever_one_starts(scale: float, wanted: float) -> None:
    found = solve(lambda factor: scale * factor**2, wanted)
    assert scale * found.factor**2 == pytest.approx(wanted) and found.passes <= 4


@pytest.mark.parametrize(
    "law",
    [
        lambda f: 9.0 * (1 - math.exp(-((3 * f) ** 2))),  # saturates
        lambda f: 0.2 * f**2 + 4 * f**4,  # breaks early
        lambda f: math.inf if f > 0.3 else 2 * f**2,  # breaks at once
        lambda f: math.nan if f > 0.5 else f**2,
    ],
)
def test_other_laws_are_followed_until_the_square_law_is_near(law: Any) -> None:
    found = solve(law, 0.1)
    assert 0.1 / NEAR <= law(found.factor) <= 0.1 * NEAR and found.passes < PASSES


def test_what_can_not_be_reached_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = solve(lambda factor: 1e-9 * min(factor, 1.0), 0.3)
    assert "spends 0.3 nats" in caplog.text and found.kl <= 1e-9 and found.passes == PASSES


def test_the_divergence_is_that_of_an_evaluation(llama: Any) -> None:
    sampler = sims.LocalSampler(llama, sims.SamplingConfig(max_new_tokens=6))
    samples = sorted(sampler.sample(PROMPTS, n=2, plan=sims.SteeringPlan(()), seed=0), key=lambda s: (s.prompt, s.draw))
    plan = sims.SteeringPlan.addition({1: vector()}, coefficient=1.0, units="absolute", scope="generation")
    first = [s for s in samples if s.draw == 0 and s.tokens]
    measured = side_effects(llama, PROMPTS, first, plan)
    tokens = np.array([len(s.tokens) for s in measured])
    mean = float(np.average([s.kl for s in measured if s.kl is not None], weights=tokens))
    divergence = Divergence(llama, PROMPTS, samples)
    assert divergence.of(plan) == pytest.approx(mean, rel=1e-3) and divergence.of(sims.SteeringPlan(())) == 0.0
    ran = sum(len(adapt(llama).encode(PROMPTS[s.prompt])) + len(s.tokens) - 1 for s in first)
    assert divergence.count.prefill == 3 * ran  # the base model once, then each plan
    found = find_strength(divergence, plan, kl=0.05)
    assert divergence.of(plan.scaled(found.factor)) == pytest.approx(0.05, rel=0.5)
    empty = [Sample(0, 0, (), "", True), *samples]
    assert Divergence(llama, PROMPTS, empty).rows[0][1] == first[0].tokens
