"""The planted circuit under every lens: the sweep finds the layer, similarity the rotation, ablation the parts."""

from pathlib import Path
from typing import Any

import circuit
import pytest
import torch
from common import KINDS

import sims_lens as sims


@pytest.fixture(scope="module", params=KINDS)
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tmp_path_factory.mktemp("circuit")
    return circuit.planted(folder, request.param)


def test_the_sweep_finds_the_layer(planted: tuple[Any, Any]) -> None:
    model, truth = planted
    sweep = sims.layer_sweep(
        model,
        {layer: truth.v for layer in range(4)},
        coefficients=(1.0, 2.0),
        units="absolute",
        behaviour=truth.pairs,
        budget=sims.FluencyBudget(perplexity_ratio=1e9, kl=1e9),
        adaptive=False,
        progress=False,
    )
    assert sweep.best is not None and (sweep.best.layer, sweep.best.coefficient) == (truth.steered, 2.0)
    elsewhere = [cell.effect.estimate for cell in sweep.cells if cell.layer != truth.steered]
    assert sweep.best.effect.estimate > 1 and max(map(abs, elsewhere)) < 0.01


def test_similarity_finds_the_rotation(planted: tuple[Any, Any]) -> None:
    """The head turns v into d1, the MLP d1 into u: each a quarter turn from the one before."""
    model, truth = planted
    there = {"v": {0: truth.v}, "d1": {0: truth.d1}, "u": {0: truth.u}}
    found = sims.direction_similarity(there)
    for first, second in (("v", "d1"), ("d1", "u")):
        assert abs(float(found.between(first, second).table()["cosine"].iloc[0])) < 1e-5
        assert float(found.principal_angles(first, second).degrees[0]) == pytest.approx(90.0, abs=1e-3)


def test_ablation_finds_the_head_and_the_mlp(planted: tuple[Any, Any]) -> None:
    model, truth = planted
    found = sims.component_effects(model, truth.plan(), truth.pairs, progress=False)
    first, second = found.top(2)
    assert {repr(first.component), repr(second.component)} == {
        f"L{truth.layer}H{truth.head}",
        f"L{truth.mlp_layer} MLP",
    }
    readers = sims.direction_readers(model, truth.plan(), truth.pairs, progress=False)
    (reader,) = readers.top(1)
    assert repr(reader.component) == f"L{truth.layer}H{truth.head}"


def test_the_direction_carries_what_the_plan_does(planted: tuple[Any, Any]) -> None:
    """With d1 taken out of the stream where the head has written it, steering with v does nothing any more."""
    model, truth = planted
    behaviour = sims.PairBehaviour(truth.pairs)

    def effect(direction: torch.Tensor) -> torch.Tensor:
        """Of the plan, with a direction taken out after the block that holds the head, steered or not."""
        out = sims.SteeringPlan.of({truth.layer: sims.Ablation(direction)}, scope="all")
        return behaviour.measure(model, truth.plan() + out) - behaviour.measure(model, out)

    whole = behaviour.measure(model, truth.plan()) - behaviour.measure(model)
    other = torch.linalg.qr(torch.stack([truth.v, truth.d1, truth.u, torch.ones(len(truth.v))], dim=1)).Q[:, 3]
    assert float(whole.mean()) > 1
    assert float(effect(truth.d1).abs().max()) < 0.02
    assert float(effect(other).mean()) > 0.5 * float(whole.mean())
