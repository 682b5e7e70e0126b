"""Teacher-forced runs that share a prefix and start at a layer agree with rows run whole, one by one."""

from typing import Any

import pytest
import torch
from common import plan_of, random_rows

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.errors import PromptError
from sims_lens.forced import force

ROWS = random_rows([(5, 4), (9, 7), (3, 2), (12, 7)])


def alone(model: Any, row: tuple[list[int], list[int]], plan: sims.SteeringPlan) -> torch.Tensor:
    prompt, response = row
    tokens = torch.tensor([[*prompt, *response]])
    with sims.steering(model, plan) as steered, torch.no_grad(), steered.prompt(len(prompt)):
        logits = adapt(model).logits(tokens, torch.ones_like(tokens, dtype=torch.bool), keep=len(response) + 1)
    return logits[0, :-1].log_softmax(-1)[range(len(response)), response]


@pytest.mark.parametrize("scope", ["generation", "response", "all"])
def test_agrees_with_rows_by_themselves(model: Any, scope: str) -> None:
    seen = []
    for batch in force(model, ROWS, scope=scope, batch_tokens=14):
        seen += batch.rows
        for layer in range(3):
            plan = plan_of(layer, scope=scope)
            with sims.steering(model, plan), torch.no_grad():
                found = batch.logprobs(batch.run(layer=layer))
            for row, index in enumerate(batch.rows):
                expected = alone(model, ROWS[index], plan)
                torch.testing.assert_close(found[row, : len(expected)], expected, atol=1e-4, rtol=1e-4)
    assert sorted(seen) == list(range(len(ROWS)))


def test_runs_again_and_again_alike(llama: Any) -> None:
    (batch,) = force(llama, ROWS)
    with torch.no_grad():
        assert torch.equal(batch.run(), batch.logits) and torch.equal(batch.run(), batch.logits)
        assert torch.equal(batch.run(layer=2), batch.logits)


def test_pairs_stay_together_and_a_prompt_of_one_token_is_run_whole(llama: Any) -> None:
    rows = random_rows([(4, 1), (4, 9), (1, 3), (1, 3)])
    batches = list(force(llama, rows, together=2, batch_tokens=4))
    assert [batch.rows for batch in batches] == [(2, 3), (0, 1)]
    assert batches[0].start == 0 and batches[1].start == 3
    for batch in batches:
        torch.testing.assert_close(
            batch.logprobs(batch.logits)[0][batch.counted[0]],
            alone(llama, rows[batch.rows[0]], plan_of(0, coefficient=0.0)),
            atol=1e-4,
            rtol=1e-4,
        )


def test_gradients_reach_the_blocks_that_run(llama: Any) -> None:
    (batch,) = force(llama, ROWS)
    with sims.steering(llama, plan_of(1, scope="generation")), torch.enable_grad():
        seen: list[torch.Tensor] = []
        handle = adapt(llama).point(2, "mlp_out").register_forward_hook(lambda _p, _a, out: seen.append(out))
        try:
            score = batch.mean(batch.logprobs(batch.run(layer=1))).sum()
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(score, seen)
    assert batch.columns(gradient).shape == (*batch.targets.shape, 32) and float(gradient.abs().max()) > 0


def test_an_error_leaves_the_model_whole(llama: Any) -> None:
    (batch,) = force(llama, ROWS)
    with pytest.raises(RuntimeError, match="stop"), adapt(llama).replaying(2, batch.streams[1]):
        raise RuntimeError("stop")
    with torch.no_grad():
        assert torch.equal(batch.run(), batch.logits)


@pytest.mark.parametrize("row", [([], [5]), ([5], []), ([5] * 100, [5] * 100)])
def test_refuses_rows_that_cannot_be_run(llama: Any, row: tuple[list[int], list[int]]) -> None:
    with pytest.raises(PromptError, match="row 0"):
        list(force(llama, [row]))
