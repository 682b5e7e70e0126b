"""Directions are found in whatever has some."""

from typing import Any

import pytest
import torch
from common import D_MODEL, plan_of, vector

import sims_lens as sims
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.errors import PlanError


def test_of_vectors_a_tensor_and_several_by_name() -> None:
    by_layer = {2: vector(2), 0: vector(0)}
    (found,) = directions_of(by_layer)
    assert found.layers == (0, 2) and torch.equal(found.at(2), vector(2)) and found.site == "resid_post"
    (rows,) = directions_of(torch.stack([vector(0), vector(1)]), "rows")
    assert rows.name == "rows" and rows.layers == (0, 1)
    named = directions_of({"a": by_layer, "b": plan_of(1)})
    assert [d.name for d in named] == ["a", "b"]
    assert directions_of(found) == (found,) and directions_of(found, "other")[0].name == "other"


def test_of_a_plan_adds_up_what_acts_at_a_site() -> None:
    plan = plan_of(1) + plan_of(1, 2, seed=7) + plan_of(0, site="attn_out")
    found = {d.name: d for d in directions_of(plan)}
    assert set(found) == {"plan at resid_post", "plan at attn_out"}
    torch.testing.assert_close(found["plan at resid_post"].at(1), 2 * vector(1) + 2 * vector(8))
    (ablated,) = directions_of(sims.SteeringPlan.of({1: sims.Ablation(vector(3))}))
    torch.testing.assert_close(ablated.at(1), vector(3) / vector(3).norm())


def test_of_a_fit(llama: Any) -> None:
    pairs = [(f"Say {k}.", f"good {k}", f"bad {k}!") for k in range(6)]
    fitted = sims.fit(llama, pairs, layers=[2, 0])
    (found,) = directions_of(fitted)
    assert found.name == "mean_difference" and found.layers == (0, 2)
    transform = fitted.transform(2)
    assert isinstance(transform, sims.Addition) and torch.equal(found.at(2), transform.vector)
    assert found.split_half is not None and found.residual_norm is not None
    assert float(found.residual_norm[1]) == float(fitted.residual_norm[0])


@pytest.mark.parametrize(
    "source", [None, {}, "run", {1.5: 3}, torch.zeros(3), {0: torch.zeros(3), 1: torch.zeros(4)}, {"a": {}}]
)
def test_refuses_what_has_none(source: Any) -> None:
    with pytest.raises(PlanError):
        directions_of(source)


def test_names_what_is_missing() -> None:
    with pytest.raises(PlanError, match="layer 5"):
        directions_of({2: vector(0)})[0].at(5)
    with pytest.raises(PlanError, match="ascending"):
        Directions("x", (2, 1), torch.zeros(2, D_MODEL))
