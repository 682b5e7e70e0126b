"""Cost: operations against PyTorch's own count, tokens against what was drawn, sums over phases and interruptions."""

from typing import Any

import pytest
import torch
from common import random_tokens, vector
from torch.utils.flop_counter import FlopCounterMode

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.cost import Arithmetic, Cost, Meter, TokenCount, cost_text, counted, forced_count, judge_tokens, total
from sims_lens.sampling import LocalSampler

PROMPTS = ["Say sea.", "Say rain and wind.", "Say a."]


def test_operations_are_those_that_pytorch_counts(model: Any) -> None:
    batch, width = 3, 9
    tokens = random_tokens(batch, width)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(tokens)
    # a plain forward pass scores every position against every other one, causal or not
    count = TokenCount(prefill=batch * width, attended=batch * width * width, logits=batch * width)
    assert adapt(model).arithmetic.flops(count) == pytest.approx(counter.get_total_flops(), rel=0.02)


def drawn(
    model: Any, plan: sims.SteeringPlan, *, measured: int = 0, responses: int = 3
) -> tuple[TokenCount, list[Any]]:
    sampler = LocalSampler(model, sims.SamplingConfig(max_new_tokens=6, responses=responses))
    if measured:
        samples = list(sampler.sample_and_measure(PROMPTS, n=responses, plan=plan, seed=0, measured=measured))
    else:
        samples = list(sampler.sample(PROMPTS, n=responses, plan=plan, seed=0))
    return sampler.count, samples


def test_a_sampler_counts_what_it_runs(llama: Any) -> None:
    plan = sims.SteeringPlan.addition({2: vector()}, coefficient=0.1, units="absolute", scope="all")
    count, samples = drawn(llama, plan)
    lengths = [len(adapt(llama).encode(prompt)) for prompt in PROMPTS]
    assert count.prefill == sum(lengths) and count.beside == 0
    # a row runs each of its tokens but the one after which it is done
    ran = [len(s.tokens) - (not s.ended) for s in samples]
    assert count.decode == sum(ran)
    looked = sum(lengths[s.prompt] + k + 1 for s, n in zip(samples, ran, strict=True) for k in range(n))
    assert count.attended == sum(n * (n + 1) // 2 for n in lengths) + looked
    assert count.logits == len(PROMPTS) + sum(ran)


def test_what_runs_beside_counts_by_its_share_of_the_blocks(llama: Any) -> None:
    plan = sims.SteeringPlan.addition({2: vector()}, coefficient=0.1, units="absolute", scope="all")
    alone, samples = drawn(llama, plan)
    both, _ = drawn(llama, plan, measured=3)
    share = 1 - 2 / adapt(llama).n_layers
    assert (both.prefill, both.decode) == (alone.prefill, alone.decode)
    assert both.beside == pytest.approx(share * (alone.prefill + alone.decode))
    assert both.attended == pytest.approx((1 + share) * alone.attended) and both.logits == 2 * alone.logits
    some, _ = drawn(llama, plan, measured=1)
    assert alone.beside < some.beside < both.beside and len(samples) == 9


def test_both_roads_count_the_same(llama: Any) -> None:
    plan = sims.SteeringPlan.addition({1: vector()}, coefficient=0.1, units="absolute", scope="all")
    fast, samples = drawn(llama, plan)
    sampler = LocalSampler(llama, sims.SamplingConfig(max_new_tokens=6, responses=3))
    noise = [sims_rows(sampler, llama, plan)]
    slow = sampler.count
    assert noise == [sorted((s.prompt, s.tokens) for s in samples)]
    assert (slow.prefill, slow.attended, slow.logits) == (fast.prefill, fast.attended, fast.logits)
    assert slow.decode == fast.decode


def sims_rows(sampler: LocalSampler, model: Any, plan: sims.SteeringPlan) -> list[tuple[int, tuple[int, ...]]]:
    from sims_lens.sampling.decode import Row
    from sims_lens.sampling.draw import uniforms

    adapter = adapt(model)
    encoded = [adapter.encode(prompt) for prompt in PROMPTS]
    rows = [Row(i, k, uniforms(0, PROMPTS[i], k, 6).tolist()) for i in range(len(PROMPTS)) for k in range(3)]
    return sorted((row.prompt, tuple(row.tokens)) for row in sampler._slowly(adapter, encoded, rows, plan, ()))


def test_a_forced_pass_counts_a_prompt_once() -> None:
    count = forced_count([[1] * 5, [1] * 3], [(0, [1, 2, 3]), (0, [1]), (1, [])])
    assert count.prefill == 5 + 3 + 2 and count.logits == 3 + 1
    assert count.attended == 15 + 6 + (6 + 7)


def test_what_a_judge_counts_is_found() -> None:
    assert counted(TokenCount(prefill=3, decode=4)) == TokenCount(prefill=3, decode=4)
    assert counted({"calls": 9, "prefill": 3, "decode": 4}) == TokenCount(prefill=3, decode=4)
    assert counted({"tokens": 5, "member": {"prefill": 1}, "other": TokenCount(decode=2)}) == TokenCount(6, 2)
    assert counted(None) == counted("nothing") == TokenCount()


def test_a_meter_counts_its_block() -> None:
    arithmetic = Arithmetic(blocks=10.0, attention=1.0, unembed=100.0)
    count = TokenCount(prefill=7, decode=7, attended=7, logits=7)
    with Meter(count, arithmetic) as meter:
        count.take(TokenCount(prefill=2, decode=3, attended=4, logits=1, beside=0.5))
        meter.add(TokenCount(prefill=1))
    assert (meter.cost.prefill, meter.cost.decode) == (3, 3)
    assert meter.cost.flops == 10.0 * (3 + 3 + 0.5) + 4 + 100
    assert meter.cost.seconds > 0 and meter.cost.peak > 1e7
    with pytest.raises(KeyError), Meter({"decode": 1}, arithmetic) as other:
        raise KeyError
    assert other.cost.flops == 0 and other.cost.seconds > 0  # another model's tokens are not this one's work
    assert arithmetic.flops(TokenCount(decode=2)) == 2 * 10 + 2 * 100  # an engine that counts no distributions


def test_costs_add_up_and_are_read_back() -> None:
    a, b = Cost(2, 1.5, 10, 20, 1e12, 500), Cost(seconds=1.0, decode=1, flops=1e12, peak=300)
    assert a + b == Cost(2, 2.5, 10, 21, 2e12, 500)
    assert Cost.from_json(a.to_json()) == a and Cost.from_json({"seconds": 1, "later": 3}) == Cost(seconds=1.0)
    cost = {"sample": a, "rank": b}
    assert total(cost) == a + b and judge_tokens(cost) == 1
    assert "10 prefill, 20 decode and 1 judge tokens; 2.00 TFLOP" in cost_text(cost)
