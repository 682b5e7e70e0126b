"""Side effects agree with a slow reference; figures are those of their definitions."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.data import Sample
from sims_lens.evaluate import Evaluation, evaluate, kl_divergence, side_effects
from sims_lens.plan import NOTHING

PROMPTS = ["Hi", "Tell me of rain.", "A longer prompt than those."]


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "hooked":
        pytest.importorskip("transformer_lens.HookedTransformer")
    return sims.load(str(tiny.write("qwen3", tmp_path_factory.mktemp("m") / "small")), kind=request.param)


def test_nll_and_kl_are_those_of_single_unpadded_forward_passes(model: Any) -> None:
    adapter = adapt(model)
    plan = sims.SteeringPlan.addition({1: torch.linspace(-1.0, 1.0, adapter.d_model)}, coefficient=0.8)
    sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=7, top_k=None))
    samples = list(sampler.sample(PROMPTS, n=2, plan=plan, seed=0))
    samples[0] = replace(samples[0], tokens=samples[0].tokens[:3])  # rows of different length
    samples.append(Sample(prompt=1, draw=2, tokens=(), text="", ended=True))
    measured = side_effects(model, PROMPTS, samples, plan, batch_rows=4)
    assert [(s.prompt, s.draw, s.tokens) for s in measured] == [(s.prompt, s.draw, s.tokens) for s in samples]
    for sample in measured[:-1]:
        ids = adapter.encode(PROMPTS[sample.prompt])
        whole = torch.tensor([[*ids, *sample.tokens]])
        with torch.no_grad():
            base = model(whole)[0, len(ids) - 1 : -1].log_softmax(-1)
            with sims.steering(model, plan) as steered, steered.prompt(len(ids)):
                other = model(whole)[0, len(ids) - 1 : -1].log_softmax(-1)
        nll = -base[torch.arange(len(sample.tokens)), list(sample.tokens)].mean()
        kl = (other.exp() * (other - base)).sum(-1).mean()
        assert sample.nll == pytest.approx(float(nll), abs=2e-5)
        assert sample.kl == pytest.approx(float(kl), abs=2e-5) and sample.kl > 0
    assert measured[-1].nll == 0.0
    assert all(s.kl == 0.0 for s in side_effects(model, PROMPTS, samples, NOTHING))


def test_figures_are_those_of_their_definitions() -> None:
    def sample(prompt: int, draw: int, score: float, text: str) -> Sample:
        words = tuple(range(len(text.split())))
        return Sample(prompt, draw, words, text, ended=draw == 0, score=score, nll=1.0 + prompt, kl=0.5)

    base = [sample(0, 0, 1.0, "a b"), sample(0, 1, 3.0, "a b"), sample(1, 0, 0.0, "c d"), sample(1, 1, 0.0, "e f")]
    ours = [
        sample(0, 0, 2.0, "a b c a b c a b c"),
        sample(0, 1, 4.0, "x y"),
        sample(1, 0, 0.0, "a b"),
        sample(1, 1, 2.0, "q r"),
    ]
    found = evaluate(ours, base)
    assert found.score.estimate == 2.0 and found.difference.estimate == 1.0
    assert found.win_rate.estimate == pytest.approx(np.mean([3 / 4, (0.5 + 0.5 + 1 + 1) / 4]))
    assert found.nll.estimate == 1.5 and found.perplexity.estimate == pytest.approx(math.exp(1.5))
    assert found.kl.estimate == 0.5 and found.ended.estimate == 0.5
    assert found.length.estimate == np.mean([9, 2, 2, 2])
    assert found.distinct_2.estimate == pytest.approx(5 / 11)  # ab bc ca | xy | (ab) | qr of 8 + 3
    assert found.repetition.estimate == pytest.approx(np.mean([1 - 3 / 6, 0, 0, 0]))
    assert Evaluation.from_json(found.to_json()) == found
    itself = evaluate(base, base)
    assert itself.win_rate.estimate == 0.5 and itself.difference.estimate == 0.0


def test_kl_of_equal_distributions_is_zero_and_positive_otherwise() -> None:
    p, q = torch.randn(2, 3, 7).log_softmax(-1), torch.randn(2, 3, 7).log_softmax(-1)
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros(2, 3))
    assert (kl_divergence(p, q) > 0).all()
