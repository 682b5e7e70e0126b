"""A model with quantised weights is steered and read like any other; what reads weights says that it can't."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from common import D_MODEL, difference, fingerprint, plan_of, random_rows, vector
from torch import Tensor, nn

import sims_lens as sims
from sims_lens.activations import capture
from sims_lens.adapter import adapt
from sims_lens.analysis import logit_attribution, readout, unembedding
from sims_lens.config import SamplingConfig, SteeringConfig
from sims_lens.errors import ModelError
from sims_lens.hooks import steering
from sims_lens.plan import NOTHING
from sims_lens.sampling.local import LocalSampler
from sims_lens.twin.road import road


class Int8Linear(nn.Module):
    """What bitsandbytes and torchao do to a linear layer: integers and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, Int8Linear(child))
        else:
            quantise(child)


def length(_prompt: str, responses: Sequence[str]) -> list[float]:
    return [float(len(r)) for r in responses]


@pytest.fixture(scope="module")
def int8(fresh: Any) -> Any:
    model = fresh("llama", "bridge")
    quantise(model.original_model)
    model.eval()
    return model


def test_it_is_nearly_the_model_that_it_was(int8: Any, zoo: Any) -> None:
    tokens, mask = torch.arange(9)[None], torch.ones(1, 9, dtype=torch.bool)
    whole = adapt(zoo("llama", "bridge"))
    assert 0.01 < difference(adapt(int8).logits(tokens, mask, keep=9), whole.logits(tokens, mask, keep=9)) < 1.0
    assert adapt(int8).dtype == torch.float32


def test_it_is_steered_and_captured(int8: Any) -> None:
    before, rows, plan = fingerprint(int8), random_rows([(3, 4), (2, 5)]), plan_of(1, coefficient=2.0)
    plain = capture(int8, rows).means[:, 1]
    with steering(int8, plan):
        steered = capture(int8, rows).means[:, 1]
    torch.testing.assert_close(steered - plain, (2.0 * vector(1)).expand_as(plain), rtol=1e-4, atol=1e-4)
    assert fingerprint(int8) == before


def test_it_runs_by_itself_and_says_why(int8: Any) -> None:
    assert road(int8).reason == "the model is quantised: it has weights of int8"
    sampler = LocalSampler(int8, SamplingConfig(max_new_tokens=4))

    def drawn(plan: sims.SteeringPlan) -> list[tuple[int, ...]]:
        return [tuple(s.tokens) for s in sampler.sample(["good morning"], n=2, plan=plan, seed=3)]

    assert drawn(plan_of(1)) == drawn(plan_of(1)) != drawn(NOTHING)


def test_the_loop_runs_on_it(int8: Any) -> None:
    prompts = [f"say {a}{b}" for a in "abcdef" for b in "xyz"]
    config = sims.SIMSConfig(
        sampling=SamplingConfig(responses=3, max_new_tokens=4),
        steering=SteeringConfig(layers=(1,), strength=0.3),
        iterations=1,
    )
    run = sims.improve(int8, prompts, ranker=length, config=config, progress=False)
    assert run.plan.layers == (1,)


def test_what_reads_weights_says_that_it_cannot(int8: Any) -> None:
    a = adapt(int8).encode_response("a")[0]
    with pytest.raises(ModelError, match=r"W_U of .* is quantised \(int8\) and can't be read; load the model without"):
        unembedding(int8, a)
    with pytest.raises(ModelError, match="is quantised"):
        logit_attribution(int8, ("good", "morning"), plan_of(1), answer=a)
    assert readout(int8, {1: torch.ones(D_MODEL)}).layers == (1,)  # runs the unembedding, doesn't read it
