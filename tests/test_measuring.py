"""What is measured while sampling is what separate passes measure: side effects here, streams in test_sampling.py."""

from typing import Any

import pytest
import tiny
import torch

import sims_lens as sims
from sims_lens.errors import ModelError
from sims_lens.evaluate import side_effects
from sims_lens.plan import NOTHING, SteeringPlan

PROMPTS = ["Hi", "Tell me of rain.", "A", "What is a long question about?", "B"]
CASES = [
    ("generation", 1, "resid_post"),
    ("all", 2, "mlp_out"),
    ("response", 0, "resid_pre"),
    ("prompt", 1, "attn_out"),
]


@pytest.fixture(scope="module", params=[(a, k) for a in tiny.ARCHITECTURES for k in ("hooked", "bridge")], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    architecture, kind = request.param
    if kind == "hooked":
        pytest.importorskip("transformer_lens.HookedTransformer")
    return sims.load(str(tiny.write(architecture, tmp_path_factory.mktemp("m") / architecture)), kind=kind)


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(seed))


def check(model: Any, plan: SteeringPlan) -> None:
    config = sims.SamplingConfig(max_new_tokens=7, top_k=None, batch_rows=6)
    found = list(sims.LocalSampler(model, config).sample_and_measure(PROMPTS, n=3, plan=plan, seed=0))
    plain = list(sims.LocalSampler(model, config).sample(PROMPTS, n=3, plan=plan, seed=0))
    by_key = {(s.prompt, s.draw): s for s in found}
    assert {k: s.tokens for k, s in by_key.items()} == {(s.prompt, s.draw): s.tokens for s in plain}
    drawn = [s for s in found if s.tokens]
    for expected in side_effects(model, PROMPTS, drawn, plan):
        sample = by_key[expected.prompt, expected.draw]
        assert sample.nll == pytest.approx(expected.nll, abs=2e-4)
        assert sample.kl == pytest.approx(expected.kl, abs=2e-4)
    if plan.interventions:
        assert max(s.kl or 0.0 for s in drawn) > 1e-3


@pytest.mark.parametrize(("scope", "layer", "site"), CASES)
@pytest.mark.cases(12)
def test_side_effects_are_those_of_separate_passes(model: Any, scope: str, layer: int, site: str) -> None:
    check(model, SteeringPlan.addition({layer: vector()}, coefficient=1.0, scope=scope, site=site))


@pytest.mark.cases(4)
def test_several_layers_decay_and_no_plan_at_all(model: Any) -> None:
    plan = SteeringPlan.addition({2: vector()}) + SteeringPlan.addition({1: vector(1)}, coefficient=2.0).decaying(3.0)
    check(model, plan)
    check(model, NOTHING)


def test_a_plan_that_is_attached_already_is_no_base(model: Any) -> None:
    sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=3))
    with (
        sims.steering(model, SteeringPlan.addition({1: vector()})),
        pytest.raises(ModelError, match="detach the plan that is attached"),
    ):
        list(sampler.sample_and_measure(PROMPTS[:1], n=1, plan=NOTHING, seed=0))
