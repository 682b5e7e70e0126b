"""The sampler draws from the right distribution, repeats, and does not depend on batch neighbours."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.plan import NOTHING
from sims_lens.sampling.draw import choose, uniforms

PROMPTS = ["Hi", "Tell me of rain.", "A", "What is a long question about?"]
KINDS = ["bridge", "hooked"]


@pytest.fixture(scope="module", params=[(a, k) for a in ("llama", "gpt2", "gemma2") for k in KINDS], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    architecture, kind = request.param
    if kind == "hooked":
        pytest.importorskip("transformer_lens.HookedTransformer")
    return sims.load(str(tiny.write(architecture, tmp_path_factory.mktemp("m") / architecture)), kind=kind)


def draw(model: Any, prompts: list[str], n: int = 3, plan: Any = NOTHING, seed: int = 0, **settings: Any) -> Any:
    settings = {"max_new_tokens": 6, "top_k": None, "temperature": 1.0} | settings
    sampler = sims.LocalSampler(model, sims.SamplingConfig(**settings))
    return {(prompts[s.prompt], s.draw): s.tokens for s in sampler.sample(prompts, n=n, plan=plan, seed=seed)}


def test_a_sample_depends_on_its_prompt_draw_and_seed_only(model: Any) -> None:
    together = draw(model, PROMPTS, batch_rows=64)
    assert draw(model, PROMPTS, batch_rows=3) == together
    assert draw(model, PROMPTS[::-1], batch_rows=6) == together
    assert draw(model, PROMPTS[1:2]) == {k: v for k, v in together.items() if k[0] == PROMPTS[1]}
    assert draw(model, PROMPTS, seed=1) != together
    short = draw(model, PROMPTS, max_new_tokens=4)
    assert all(together[k][: len(v)] == v for k, v in short.items())


def test_nearly_greedy_sampling_is_greedy_decoding_by_full_forward_passes(model: Any) -> None:
    adapter = adapt(model)
    vector = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(0))
    plan = sims.SteeringPlan.addition({1: vector}, coefficient=0.7)
    found = draw(model, PROMPTS, n=1, plan=plan, temperature=1e-4)
    for prompt in PROMPTS:
        ids = adapter.encode(prompt)
        expected: list[int] = []
        for _ in range(6):
            with sims.steering(model, plan) as steered, steered.prompt(len(ids)), torch.no_grad():
                token = int(model(torch.tensor([[*ids, *expected]]))[0, -1].argmax())
            if token in adapter.stop_ids:
                break
            expected.append(token)
        assert found[prompt, 0] == tuple(expected)


def test_finished_rows_leave_and_the_rest_is_unchanged(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = draw(model, PROMPTS, n=4)
    counts = torch.bincount(torch.tensor([t for row in free.values() for t in row]))
    stop = int(counts.argmax())
    monkeypatch.setattr(type(adapt(model)), "stop_ids", (stop,))
    stopped = draw(model, PROMPTS, n=4)
    assert any(len(row) < 6 for row in stopped.values())
    for key, row in stopped.items():
        assert stop not in row and free[key][: len(row)] == row
        assert len(row) == 6 or free[key][len(row)] == stop


def test_uniforms_are_seeded_by_content() -> None:
    a = uniforms(0, "x", 0, 8)
    assert torch.equal(a, uniforms(0, "x", 0, 8)) and torch.equal(a[:4], uniforms(0, "x", 0, 4))
    for other in (uniforms(1, "x", 0, 8), uniforms(0, "y", 0, 8), uniforms(0, "x", 1, 8)):
        assert not torch.equal(a, other)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (3, 1.0), (None, 0.7), (4, 0.8)])
def test_choose_follows_the_filtered_distribution(top_k: int | None, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    n = 40_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = choose(logits.expand(n, -1), grid, temperature=0.9, top_k=top_k, top_p=top_p)
    found = np.bincount(tokens.numpy(), minlength=6) / n
    p = (logits / 0.9).softmax(-1).numpy()
    keep = 6 if top_k is None else top_k
    expected = np.where(np.arange(6) < keep, p, 0.0)
    expected /= expected.sum()
    if top_p < 1.0:
        expected = np.where(np.cumsum(expected) - expected < top_p, expected, 0.0)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=2e-4)


def test_choose_stays_in_the_vocabulary_at_the_edges() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    for edge in (0.0, 1.0 - 1e-12):
        token = choose(logits, torch.tensor([edge], dtype=torch.float64), temperature=1.0, top_k=None)
        assert int(token) in (0, 2)


def test_tokens_are_counted(model: Any) -> None:
    sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=5, top_k=None))
    drawn = list(sampler.sample(PROMPTS[:2], n=3, plan=NOTHING, seed=0))
    assert sampler.count.prefill == sum(len(adapt(model).encode(p)) for p in PROMPTS[:2])
    assert sampler.count.decode == sum(max(0, len(s.tokens) - (not s.ended)) for s in drawn)


def test_the_sampler_leaves_the_random_state_and_the_model_alone(model: Any) -> None:
    state = torch.get_rng_state()
    names = set(model.hook_dict)
    draw(model, PROMPTS, plan=sims.SteeringPlan.addition({0: torch.ones(adapt(model).d_model)}))
    assert torch.equal(torch.get_rng_state(), state) and set(model.hook_dict) == names
