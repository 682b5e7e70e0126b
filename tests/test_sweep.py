"""Cells are what slow references give, the race finds what the full sweep finds, and nothing is done twice."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import KINDS, vector

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.analysis.directions import directions_of
from sims_lens.analysis.sweep import COEFFICIENTS, LayerSweep, SweepCell, layer_sweep, measuring
from sims_lens.analysis.sweep.race import Race, _quantile, _student
from sims_lens.behaviour import logprob_margin
from sims_lens.calibration import FluencyBudget
from sims_lens.errors import ConfigError, DamagedError, ModelError, PlanError, PromptError, RankerError, RunError
from sims_lens.estimators import MeanDifference
from sims_lens.evaluate import evaluate, perplexity_ratio, side_effects
from sims_lens.plan import NOTHING, Provenance, SteeringPlan
from sims_lens.plots import TEMPLATE
from sims_lens.plots.sweep import frontier
from sims_lens.plots.sweep import layer_sweep as draw
from sims_lens.rankers import as_ranker, rank
from sims_lens.stats import Interval, bootstrap_mean

UNLIMITED = FluencyBudget(math.inf, math.inf)
PAIRS = [(f"Say {letter}.", f"ee{letter}e", f"oo{letter}") for letter in "abcdfghijklmnpqrstuvwx"]
SHARED = [*PAIRS[:3], (PAIRS[0][0], "e", "oxo"), (PAIRS[0][0], "eeeeeee", "oo"), *PAIRS[5:8]]
PROMPTS = [f"Say {letter}{letter}." for letter in "abcdfghijklmnpqr"]
SAMPLING = sims.SamplingConfig(max_new_tokens=6, top_k=None)


def vectors(seed: int = 0) -> dict[int, torch.Tensor]:
    return {layer: vector(seed + layer) for layer in range(3)}


def planted(model: Any) -> dict[int, torch.Tensor]:
    """Random directions, but for the last layer's: what the unembedding reads "e" less "o" from."""
    adapter = adapt(model)
    e, o = (adapter.encode_response(text)[0] for text in "eo")
    return vectors() | {2: (model.W_U[:, e] - model.W_U[:, o]).detach()}


def share_of_e(_prompt: str, responses: Sequence[str]) -> list[float]:
    return [r.count("e") / max(1, len(r)) for r in responses]


def vowels(_prompt: str, responses: Sequence[str]) -> list[float]:
    return [sum(c in "aeiou" for c in r) / (1 + len(r)) + 1e-3 * len(set(r)) for r in responses]


def swept(model: Any, source: Any = None, **options: Any) -> LayerSweep:
    options = {"progress": False, "coefficients": (0.1, 0.4)} | options
    if "ranker" not in options and "behaviour" not in options:
        options["behaviour"] = PAIRS
    return layer_sweep(model, vectors() if source is None else source, **options)


# Against slow references


@pytest.mark.parametrize("scope", ["generation", "all"])
@pytest.mark.cases(8)
def test_effects_are_changes_of_the_margin(model: Any, scope: str) -> None:
    sweep = swept(model, behaviour=SHARED, scope=scope, adaptive=False, coefficients=(0.0, -0.3, 0.3))
    base = logprob_margin(model, SHARED)
    assert [(c.layer, c.coefficient) for c in sweep.cells] == [(k, c) for k in range(3) for c in (-0.3, 0.0, 0.3)]
    for cell in sweep.cells:
        change = logprob_margin(model, SHARED, sweep.plan_of(cell)) - base
        assert cell.effect.estimate == pytest.approx(float(change.mean()), abs=1e-4)
        assert cell.win_rate.estimate == pytest.approx(
            float((change > 0).float().mean() + 0.5 * (change == 0).float().mean())
        )
        assert cell.count == len(SHARED) and cell.effect.low <= cell.effect.estimate <= cell.effect.high
        assert sweep.plan_of(cell).interventions[0].scope.name == scope
    nothing = sweep.at(0, 0.0)
    assert (nothing.effect, nothing.kl) == (Interval(0.0, 0.0, 0.0), Interval(0.0, 0.0, 0.0))
    assert (nothing.win_rate.estimate, nothing.perplexity_ratio.estimate) == (0.5, 1.0)


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out"])
def test_other_sites(llama: Any, site: str) -> None:
    sweep = swept(llama, sites=(site,), layers=(1, 2), adaptive=False, coefficients=(0.5,), behaviour=SHARED)
    assert {(c.site, c.layer) for c in sweep.cells} == {(site, 1), (site, 2)}
    base = logprob_margin(llama, SHARED)
    for cell in sweep.cells:
        change = logprob_margin(llama, SHARED, sweep.plan_of(cell)) - base
        assert (
            cell.effect.estimate == pytest.approx(float(change.mean()), abs=1e-4) and abs(cell.effect.estimate) > 1e-3
        )


def slow(model: Any, text: tuple[str, str], plan: SteeringPlan) -> tuple[float, float]:
    """Rise of the NLL and mean KL of one text by plain forward passes, in float64."""
    adapter = adapt(model)
    prompt, response = adapter.encode(text[0]), adapter.encode_response(text[1])
    tokens = torch.tensor([[*prompt, *response]])
    found = []
    for each in (NOTHING, plan):
        with sims.steering(model, each) as steered, torch.no_grad(), steered.prompt(len(prompt)):
            logits = adapt(model).logits(tokens, torch.ones_like(tokens, dtype=torch.bool), keep=len(response) + 1)
        found.append(logits[0, :-1].double().log_softmax(-1))
    base, steered = found
    picked = [log_p[range(len(response)), response].mean() for log_p in found]
    return float(picked[0] - picked[1]), float((steered.exp() * (steered - base)).sum(-1).mean())


def test_fluency_is_that_of_plain_forward_passes(llama: Any) -> None:
    sweep = swept(llama, behaviour=SHARED, adaptive=False)
    for cell in sweep.cells:
        texts = [(prompt, text) for prompt, *both in SHARED for text in both]
        rises, divergences = zip(*(slow(llama, text, sweep.plan_of(cell)) for text in texts), strict=True)
        assert math.log(cell.perplexity_ratio.estimate) == pytest.approx(float(np.mean(rises)), abs=1e-4)
        assert cell.kl.estimate == pytest.approx(float(np.mean(divergences)), abs=1e-4)
        assert cell.kl.estimate > 1e-3


def test_intervals_are_the_bootstraps_over_prompts(llama: Any) -> None:
    cell = swept(llama, adaptive=False, seed=4).cells[1]
    plan = SteeringPlan.addition({0: vector(0)}, coefficient=0.4, units="residual_norm")
    change = (logprob_margin(llama, PAIRS, plan) - logprob_margin(llama, PAIRS)).double().numpy()
    for ours, theirs in (
        (cell.effect, bootstrap_mean(change, seed=4)),
        (cell.win_rate, bootstrap_mean((change > 0).astype(float), seed=4)),
    ):
        assert ours.to_json() == pytest.approx(theirs.to_json(), abs=1e-4)
    one_prompt = swept(llama, behaviour=[("Say it.", f"e{k}", f"o{k}") for k in "abcd"], adaptive=False).cells[0]
    assert one_prompt.count == 4 and one_prompt.effect.low == one_prompt.effect.high  # four pairs, one cluster


def test_generation_mode_is_evaluate_of_the_same_samples(llama: Any) -> None:
    options = {"prompts": PROMPTS, "samples": 2, "sampling": SAMPLING, "seed": 3}
    sweep = swept(llama, ranker=share_of_e, adaptive=False, layers=(1, 2), coefficients=(0.8,), **options)
    sampler = sims.LocalSampler(llama, SAMPLING)
    assert sweep.unit == "prompt" and sweep.samples == 2
    for cell in sweep.cells:
        both = []
        for plan in (sweep.plan_of(cell), NOTHING):
            drawn = list(sampler.sample(PROMPTS, n=2, plan=plan, seed=3))
            drawn = [
                s if s.tokens else replace(s, nll=None, kl=None) for s in side_effects(llama, PROMPTS, drawn, plan)
            ]
            both.append(rank(as_ranker(share_of_e), PROMPTS, drawn))
        expected = evaluate(*both, seed=3)
        for ours, theirs in (
            (cell.effect, expected.difference),
            (cell.win_rate, expected.win_rate),
            (cell.kl, expected.kl),
            (cell.perplexity_ratio, perplexity_ratio(*both, seed=3)),
        ):
            assert ours.to_json() == pytest.approx(theirs.to_json(), abs=1e-5)
        assert cell.count == len(PROMPTS) and cell.kl.estimate > 0


# What is found


def test_the_planted_layer_is_found_and_brute_force_agrees(llama: Any) -> None:
    source = planted(llama)
    before = {layer: v.clone() for layer, v in source.items()}
    sweep = swept(llama, source, coefficients=COEFFICIENTS)
    assert sweep.best is not None and sweep.best.layer == 2 and sweep.best.win_rate.estimate == 1.0
    base = logprob_margin(llama, PAIRS)
    effects = {
        c: float((logprob_margin(llama, PAIRS, sweep.plan_of(c)) - base).mean()) for c in sweep.cells if sweep.allows(c)
    }
    assert max(effects, key=effects.__getitem__) == sweep.best
    change = logprob_margin(llama, PAIRS, sweep.plan) - base
    assert float(change.mean()) == pytest.approx(sweep.best.effect.estimate, abs=1e-4)
    assert all(torch.equal(source[layer], v) for layer, v in before.items())
    profile = sweep.layer_profile().set_index("layer")
    assert list(profile.index) == [0, 1, 2] and profile.effect.idxmax() == 2 and profile.within.all()


def test_the_race_spends_less_and_chooses_the_same(llama: Any) -> None:
    source = planted(llama)
    options: dict[str, Any] = {"coefficients": COEFFICIENTS}
    full, raced = swept(llama, source, adaptive=False, **options), swept(llama, source, **options)
    assert {c.count for c in full.cells} == {len(PAIRS)}
    assert full.best is not None and raced.best is not None
    assert (full.best.layer, full.best.coefficient) == (raced.best.layer, raced.best.coefficient)
    assert raced.best.effect.to_json() == pytest.approx(full.best.effect.to_json(), abs=1e-5)
    assert sum(c.count for c in raced.cells) < 0.75 * sum(c.count for c in full.cells)
    assert {c.count for c in raced.cells} <= {4, 8, 16, len(PAIRS)} and raced.best.count == len(PAIRS)
    k = COEFFICIENTS.index(raced.best.coefficient)
    near = [(1, COEFFICIENTS[k]), *((2, COEFFICIENTS[j]) for j in (k - 1, k + 1) if 0 <= j < len(COEFFICIENTS))]
    assert all(raced.at(*where).count == len(PAIRS) for where in near)
    for cell in raced.cells:  # who fell out is weaker or broken, by the figures of everything
        if cell.count < len(PAIRS):
            whole = full.at(cell.layer, cell.coefficient)
            assert whole.effect.estimate < full.best.effect.estimate or not full.allows(whole)


def test_a_cell_that_fell_out_comes_back_beside_the_best() -> None:
    places = [("d", "resid_post", layer) for layer in range(4)]
    race = Race(places, [(k, 1.0) for k in range(4)], np.arange(8), UNLIMITED)
    noise = np.array([0.1, -0.1, 0.05, -0.05])
    for cell, effect in enumerate((-1.0, 0.5, 1.0, -1.0)):
        race.found[cell, :4] = np.stack([effect + noise, noise, noise, np.zeros(4)], axis=1)
        race.seen[cell, :4] = True
        race.done.add((cell, 0))
    assert race.going() == {1, 2, 3}  # 2 leads; its neighbours go on though they can't win
    race.found[2, 4:], race.found[1, 4:] = -1.0, 0.6
    race.seen[1:3, 4:] = True
    race.done |= {(1, 1), (2, 1)}
    assert {0, 1, 2} <= race.going() and race.behind({0, 1, 2}, 1) == {1: [0]}
    broken = Race(places, [(k, 1.0) for k in range(4)], np.arange(4), FluencyBudget(1.5, 0.5))
    broken.found[:] = np.array([1.0, 1.0, 2.0, 5.0])
    assert broken.going() == set()


def test_cells_are_compared_pair_by_pair() -> None:
    places = [("d", "resid_post", layer) for layer in range(4)]
    race = Race(places, [(k, 1.0) for k in range(4)], np.arange(8), UNLIMITED)
    hard = np.linspace(-3.0, 5.0, 8)  # how far a pair moves at all: far more than the cells differ
    for cell, behind in enumerate((0.2, 0.2, 0.1, 0.0)):
        race.found[cell] = np.stack([hard - behind, hard, 0 * hard, 0 * hard], axis=1)
    assert race.going() == {2, 3}  # the leader and its neighbour, though all intervals overlap
    race.found[0, :, 0] += np.linspace(-1.0, 1.0, 8)  # now it may well be ahead
    assert race.going() == {0, 2, 3}


def test_student_intervals_hold_for_few() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (3, 7, 15, 63):
        assert _quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.01)
    values = np.array([1.0, 2.0, 4.0, 3.0])
    mean, low, high = _student(values, np.ones(4))
    half = stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=0.02)
    assert _student(np.empty(0), np.empty(0)) == (math.inf,) * 3


def test_nothing_is_chosen_where_nothing_helps(llama: Any) -> None:
    tight = swept(llama, budget=FluencyBudget(1.0001, 1e-6))
    assert tight.best is None and "nothing is within the budget" in repr(tight)
    with pytest.raises(PlanError, match="no cell was chosen: nothing is within the budget"):
        _ = tight.plan
    source = {2: -planted(llama)[2]}
    worse = swept(llama, source, budget=UNLIMITED)
    assert worse.best is None and "cells within the budget raises" in repr(worse)
    turned = swept(llama, source, coefficients=(-0.4, -0.1), budget=UNLIMITED).best
    assert turned is not None and turned.coefficient == -0.4


# What can be swept


def test_several_by_name_and_what_is_no_addition(llama: Any) -> None:
    fitted = sims.fit(llama, PAIRS[:8], estimator=MeanDifference())
    turning = SteeringPlan.of({1: sims.Rotation(vector(7)), 2: sims.Ablation(vector(8))})
    source = {"fit": fitted, "turn": turning, "hand": vectors(), "deep": {"er": {2: vector(9)}}}
    sweep = swept(llama, source, behaviour=SHARED, adaptive=False)
    assert sweep.panels == tuple((name, "resid_post") for name in ("fit", "turn", "hand", "er"))[:3] + (
        sweep.panels[3],
    )
    assert sweep.panels[3][0] == directions_of(source)[-1].name and sweep.units == "mixed"
    base = logprob_margin(llama, SHARED)
    for cell in sweep.cells:
        change = logprob_margin(llama, SHARED, sweep.plan_of(cell)) - base
        assert cell.effect.estimate == pytest.approx(float(change.mean()), abs=1e-4)
    (own,) = fitted.plan(2, coefficient=0.4).interventions
    (ours,) = sweep.plan_of(sweep.at(2, 0.4, direction="fit")).interventions
    assert (ours.coefficient, ours.units, ours.residual_norm) == (own.coefficient, own.units, own.residual_norm)
    torch.testing.assert_close(ours.transform.tensors()["vector"], own.transform.tensors()["vector"])
    kinds = {
        layer: sweep.plan_of(sweep.at(layer, 0.4, direction="turn")).interventions[0].transform.kind for layer in (1, 2)
    }
    assert kinds == {1: "rotation", 2: "ablation"}
    assert swept(llama, turning, behaviour=SHARED).units == "strength"
    (listed,) = swept(llama, [replace(directions_of(fitted)[0], name="x")], behaviour=SHARED).panels
    assert listed == ("x", "resid_post")


def test_absolute_units_take_the_vector_as_it_is(llama: Any) -> None:
    sweep = swept(llama, {1: 3.0 * vector(1)}, units="absolute", behaviour=SHARED, adaptive=False, coefficients=(0.5,))
    expected = SteeringPlan.addition({1: 3.0 * vector(1)}, coefficient=0.5)
    change = logprob_margin(llama, SHARED, expected) - logprob_margin(llama, SHARED)
    assert sweep.cells[0].effect.estimate == pytest.approx(float(change.mean()), abs=1e-4)


def test_of_a_run(fresh: Any, tmp_path: Path) -> None:
    model = fresh("llama", KINDS[-1])
    config = sims.SIMSConfig(
        iterations=2,
        sampling=sims.SamplingConfig(responses=3, max_new_tokens=6, top_k=None),
        steering=sims.SteeringConfig(layers=(1,)),
        ranking=sims.RankingConfig(audit="off"),
        evaluation=sims.EvaluationConfig(samples=2, controls=0),
    )
    run = sims.improve(model, PROMPTS, ranker=vowels, config=config, out=tmp_path / "run", progress=False)
    sweep = swept(model, run, behaviour=None, adaptive=False)
    assert sweep.panels == (("iteration 2", "resid_post"),) and sweep.total == len(run.text_pairs())
    change = logprob_margin(model, run.text_pairs(), sweep.plan_of(sweep.cells[0])) - logprob_margin(
        model, run.text_pairs()
    )
    assert sweep.cells[0].effect.estimate == pytest.approx(float(change.mean()), abs=1e-4)
    both = swept(model, {"mine": run, "hand": vectors()}, layers=(1,))
    assert [name for name, _ in both.panels] == ["mine", "hand"]
    drawn = swept(model, run, ranker=vowels, sampling=SAMPLING, layers=(1,), coefficients=(0.4,), adaptive=False)
    assert drawn.total == len(run.indices("heldout"))


# Going on


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """The forced runs, counted; the one after so many is interrupted."""
    calls = [0, after]
    whole = measuring._against

    def counted(*args: Any) -> Any:
        if calls[0] == calls[1]:
            raise KeyboardInterrupt
        calls[0] += 1
        return whole(*args)

    monkeypatch.setattr(measuring, "_against", counted)
    return calls


def test_goes_on_with_the_same_result_and_does_nothing_twice(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "BATCH_TOKENS", 40)
    source = planted(llama)
    calls = interrupted(monkeypatch, -1)
    whole = swept(llama, source, coefficients=COEFFICIENTS)
    needed = calls[0]
    out = tmp_path / "sweep"
    calls[:] = [0, 7]
    for stop in (7, 31, needed):
        calls[1] = stop
        if stop < needed:
            with pytest.raises(KeyboardInterrupt):
                swept(llama, source, coefficients=COEFFICIENTS, out=out)
    resumed = swept(llama, source, coefficients=COEFFICIENTS, out=out)
    assert resumed == whole and calls[0] == needed  # bitwise, and no run was repeated
    calls[1] = calls[0]
    assert swept(llama, source, coefficients=COEFFICIENTS, out=str(out)) == whole
    data, plan = json.loads((out / "result.json").read_text()), SteeringPlan.load(out / "directions.safetensors")
    read = LayerSweep.from_json(data, plan=plan)
    assert read == whole
    for ours, theirs in zip(read.plan.interventions, whole.plan.interventions, strict=True):
        assert ours.strength == theirs.strength
        torch.testing.assert_close(ours.transform.tensors(), theirs.transform.tensors())


def test_generation_goes_on_too(llama: Any, tmp_path: Path) -> None:
    calls = [0, 10**6]

    def ranker(prompt: str, responses: Sequence[str]) -> list[float]:
        if calls[0] == calls[1]:
            raise KeyboardInterrupt
        calls[0] += 1
        return share_of_e(prompt, responses)

    ranker.settings = "share of e"  # type: ignore[attr-defined]  # its counts change, what it says does not
    options: dict[str, Any] = {"ranker": ranker, "prompts": PROMPTS, "sampling": SAMPLING, "layers": (1, 2)}
    whole = swept(llama, planted(llama), **options)
    needed = calls[0]
    calls[:] = [0, 20]
    with pytest.raises(KeyboardInterrupt):
        swept(llama, planted(llama), out=tmp_path / "s", **options)
    calls[1] = 10**6
    assert swept(llama, planted(llama), out=tmp_path / "s", **options) == whole
    assert calls[0] == needed + 20 % 8  # of the cell that was interrupted, half a round of prompts


def test_a_folder_holds_one_sweep(llama: Any, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    swept(llama, out=out, behaviour=SHARED)
    for change, key in (
        ({"coefficients": (0.1, 0.2)}, "coefficients"),
        ({"seed": 1}, "seed"),
        ({"behaviour": PAIRS}, "pairs"),
        ({"scope": "all"}, "scope"),
        ({"source": vectors(5)}, "directions"),
        ({"layers": (1,)}, "directions"),
        ({"adaptive": False}, "adaptive"),
        ({"budget": UNLIMITED}, "budget"),
    ):
        with pytest.raises(RunError, match=f"holds a sweep with other {key}; use the same to go on"):
            swept(llama, **({"out": out, "behaviour": SHARED} | change))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and holds no sweep"):
        swept(llama, out=tmp_path / "other")
    file = next((out / "figures").iterdir())
    file.write_text('{"0": [[1.0]]}')
    with pytest.raises(DamagedError, match="is damaged .* delete it and go on"):
        swept(llama, out=out, behaviour=SHARED)


def times(factor: float) -> Any:
    return lambda prompt, responses: [factor * score for score in share_of_e(prompt, responses)]


class Opaque:
    """A ranker with a state that nothing is known about."""

    name = "opaque"

    def __init__(self) -> None:
        self.state = torch.nn.Linear(2, 2)

    def __call__(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return share_of_e(prompt, responses)


def test_a_folder_is_for_one_ranker(llama: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": PROMPTS[:4], "sampling": SAMPLING, "layers": (1,), "coefficients": (0.4,)}
    options["out"] = tmp_path / "sweep"
    first = swept(llama, ranker=times(1.0), **options)
    assert swept(llama, ranker=times(1.0), **options) == first
    others: list[Any] = [times(2.0), lambda _prompt, responses: [float(len(r)) for r in responses]]
    for ranker in others:
        assert ranker.__name__ == "<lambda>"
        with pytest.raises(RunError, match="holds a sweep with other ranker"):
            swept(llama, ranker=ranker, **options)
    with pytest.raises(RankerError, match="'opaque' .*give it an attribute settings .*or leave out= away"):
        swept(llama, ranker=Opaque(), **options)
    told = Opaque()
    told.settings = 1  # type: ignore[attr-defined]
    options["out"] = tmp_path / "told"
    assert swept(llama, ranker=told, **options).cells == swept(llama, ranker=Opaque(), **options | {"out": None}).cells


def test_a_damaged_header_says_what_to_do(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(RunError, match="is damaged .*; delete the file and start the same again"):
        swept(llama, out=tmp_path, behaviour=SHARED)


# What is refused


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_swept(llama: Any) -> None:
    turn = SteeringPlan.of({1: sims.Rotation(vector())})
    foreign = SteeringPlan.addition({1: vector()}, provenance=Provenance(model="another"))
    generation = {"ranker": share_of_e, "prompts": PROMPTS}
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "needs one of behaviour= .* got neither", {"behaviour": None}),
        (ConfigError, "got both", {"behaviour": PAIRS, "ranker": share_of_e}),
        (ConfigError, "ranker= needs prompts=", {"ranker": share_of_e}),
        (ConfigError, "prompts= are for ranker=", {"behaviour": PAIRS, "prompts": PROMPTS}),
        (ConfigError, "behaviour must be a PairBehaviour .* got str", {"behaviour": "margin"}),
        (ConfigError, "samples must be an integer of at least 1, got 0", {**generation, "samples": 0}),
        (ConfigError, "finite number, got nan", {"coefficients": (0.1, math.nan)}),
        (ConfigError, "finite number, got True", {"coefficients": (0.1, True)}),
        (ConfigError, "different numbers", {"coefficients": (0.1, 0.1)}),
        (ConfigError, "different numbers", {"coefficients": (0.0,)}),
        (ConfigError, "units must be", {"units": "norms"}),
        (ConfigError, "name at least one each", {"layers": ()}),
        (ConfigError, r"layers must be a list, such as \[17\], got 17", {"layers": 17}),
        (ConfigError, r"sites must be a list, such as \[.resid_post.\], got .*resid_post", {"sites": "resid_post"}),
        (ConfigError, r"coefficients must be a list, such as \[0.1, 0.2\], got 0.2", {"coefficients": 0.2}),
        (ConfigError, "coefficients must be a list", {"coefficients": torch.ones(2, 2)}),
        (ConfigError, r"budget must be a FluencyBudget, such as FluencyBudget\(1.5, 0.5\), got 1.5", {"budget": 1.5}),
        (ConfigError, "seed must be an integer from 0 up, got 'a'", {"seed": "a"}),
        (ConfigError, "seed must be an integer from 0 up, got -1", {"seed": -1}),
        (PlanError, "layer 7 is not in 0..2", {"layers": (7,)}),
        (PlanError, "site 'resid_mid' is not one of", {"sites": ("resid_mid",)}),
        (PlanError, "vectors has layers .2., none of .1.", {"source": {2: vector()}, "layers": (1,)}),
        (PlanError, "vectors is zero at layer 1", {"source": {1: torch.zeros(32)}}),
        (PlanError, "has 5 entries", {"source": {1: vector(size=5)}}),
        (PlanError, "layer 9 is not in", {"source": {9: vector()}}),
        (PlanError, "two directions are called 'a'", {"source": [replace(directions_of(vectors())[0], name="a")] * 2}),
        (PlanError, "directions come from", {"source": 3}),
        (PlanError, "is not alone there", {"source": 2 * turn + turn}),
        (PlanError, "made for 'another'", {"source": foreign}),
        (PromptError, "pair 0 is not", {"behaviour": [("a", "b")]}),
    ]
    for error, message, options in refused:
        with pytest.raises(error, match=message):
            swept(llama, **options)
    with sims.steering(llama, turn), pytest.raises(ModelError, match="a plan is attached"):
        swept(llama)


def test_coefficients_may_be_an_array(llama: Any) -> None:
    options: dict[str, Any] = {"layers": [1], "behaviour": SHARED}
    expected = swept(llama, coefficients=[0.25, 0.5], **options)
    for given in (np.array([0.25, 0.5], dtype=np.float32), torch.tensor([0.5, 0.25]), list(np.array([0.25, 0.5]))):
        assert swept(llama, coefficients=given, **options) == expected


# What is shown


def cell_of(layer: int, coefficient: float, *, name: str = "a <b>", count: int = 40, **figures: float) -> SweepCell:
    def around(value: float) -> Interval:
        return Interval(value, value - 0.02, value + 0.03)

    shown = {
        "effect": coefficient * (1 + layer),
        "win_rate": 0.7,
        "perplexity_ratio": 1 + coefficient,
        "kl": 2 * coefficient,
    }
    return SweepCell(
        name, "resid_post", layer, coefficient, count=count, **{k: around(v) for k, v in (shown | figures).items()}
    )


def result(*cells: SweepCell, **changes: Any) -> LayerSweep:
    made = cells or tuple(cell_of(layer, c) for layer in (0, 2, 5) for c in (0.1, 0.2, 0.4))
    options: dict[str, Any] = {
        "units": "residual_norm",
        "scope": "generation",
        "samples": 0,
        "adaptive": True,
        "seed": 0,
    }
    options |= {"mode": "teacher-forced", "measure": "rise of the log-probability margin (nats per token)"}
    options |= {"model": "m", "behaviour": "<i>tone</i>", "budget": FluencyBudget(1.5, 0.5), "total": 40}
    return LayerSweep(cells=tuple(made), **(options | changes))


def test_table_text_and_json() -> None:
    sweep = result()
    assert sweep.best == cell_of(5, 0.2)
    table = sweep.table()
    assert len(table) == 9 and list(table[table.best].layer) == [5]
    assert set(table[~table.within].coefficient) == {0.4}
    assert (table.effect_low < table.effect).all() and (table.kl < table.kl_high).all() and (table["count"] == 40).all()
    assert LayerSweep.from_json(json.loads(json.dumps(sweep.to_json()))) == sweep
    text = repr(result(*sweep.cells[:-1], cell_of(5, 0.4, count=4)))
    assert "+1.200 *" in text and "(+2.400)~" in text and "measured on fewer pairs" in text
    assert "Best: a <b>, layer 5 resid_post, coefficient 0.2: effect 1.200 [1.180, 1.230]" in text
    assert "a <b>" not in sweep._repr_html_() and "a &lt;b&gt;" in sweep._repr_html_()
    assert "<i>tone" not in sweep._repr_html_()
    with pytest.raises(PlanError, match="JSON holds no plan"):
        _ = LayerSweep.from_json(sweep.to_json()).plan
    with pytest.raises(RunError, match="no cell at layer 4"):
        sweep.at(4, 0.1)


def test_the_frontier_is_what_no_cell_beats() -> None:
    cells = [
        cell_of(k, 0.1, kl=kl, effect=e) for k, (kl, e) in enumerate([(0.1, 0.5), (0.2, 0.4), (0.3, 0.9), (0.05, -1.0)])
    ]
    assert [c.layer for c in result(*cells).frontier()] == [0, 2]


def test_the_map_shows_every_cell() -> None:
    sweep = result(*result().cells[:-1], cell_of(5, 0.4, count=4))
    figure = draw(sweep)
    (heat,) = (t for t in figure.data if t.type == "heatmap")
    expected = [[sweep.at(layer, c).effect.estimate for layer in (0, 2, 5)] for c in (0.1, 0.2, 0.4)]
    assert np.array(heat.z, dtype=float).tolist() == expected
    assert list(figure.layout.xaxis.ticktext) == ["0", "2", "5"] and list(figure.layout.yaxis.ticktext) == [
        "0.1",
        "0.2",
        "0.4",
    ]
    assert "residual norm" in figure.layout.yaxis.title.text and figure.layout.xaxis.title.text == "layer"
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmid, axis.cmax) == pytest.approx((-1.2, 0.0, 1.2))  # of what is within the budget
    text = heat.text[2][2]
    assert "effect +2.4 [+2.38, +2.43]" in text and "4 of 40 pairs, beyond the budget" in text
    assert "win rate 0.7 [0.68, 0.73]" in text and "a &lt;b&gt;" in text
    contours = {t.name: t for t in figure.data if t.type == "contour"}
    assert set(contours) == {"KL 0.5", "perplexity ratio 1.5"}
    assert np.array(contours["KL 0.5"].z)[:, 0].tolist() == pytest.approx(
        [math.log(2 * c / 0.5) for c in (0.1, 0.2, 0.4)]
    )
    (target,) = (t for t in figure.data if t.name == "best within the budget")
    assert (target.x[0], target.y[0]) == (2, 1)
    (dots,) = (t for t in figure.data if t.name == "on all 40 pairs")
    assert len(dots.x) == 7
    assert figure.layout.template.layout.font == TEMPLATE.layout.font and "<i>" not in figure.layout.title.subtitle.text
    assert draw(sweep, value="win_rate").layout.coloraxis.cmid == 0.5
    assert draw(sweep, value="kl").layout.coloraxis.cmax == pytest.approx(0.8)
    assert draw(sweep, value="perplexity_ratio").layout.coloraxis.cmin == 1.0


def test_a_coefficient_counts_in_the_norm_at_its_site() -> None:
    at_attn = tuple(replace(cell, site="attn_out") for cell in result().cells)
    for sweep in (result(*at_attn), result(*result().cells, *at_attn)):
        assert "coefficient: x median norm at the site; on" in repr(sweep) and "residual norm" not in repr(sweep)
        assert "at the site)" in draw(sweep).layout.yaxis.title.text
    for stream in (result(), result(*(replace(cell, site="resid_pre") for cell in result().cells))):
        assert "coefficient: x median residual norm; on" in repr(stream)
        assert draw(stream).layout.yaxis.title.text == "coefficient<br>(× residual norm)"


def test_small_multiples_and_what_is_odd() -> None:
    other = tuple(replace(cell, direction="other", site="attn_out") for cell in result().cells[:6])
    sweep = result(*result().cells, *other)
    figure = draw(sweep)
    assert [a.text for a in figure.layout.annotations] == ["a &lt;b&gt;, resid_post", "other, attn_out"]
    lower = [t for t in figure.data if t.type == "heatmap"][1]
    assert lower.z[0][2] is None  # this direction has no layer 5
    assert sum(bool(t.showlegend) for t in figure.data if t.name == "KL 0.5") == 1
    assert len([t for t in draw(sweep, direction="other").data if t.type == "heatmap"]) == 1
    assert len([t for t in draw(sweep, site="resid_post").data if t.type == "heatmap"]) == 1
    one = draw(result(cell_of(0, 0.1, effect=0.0), budget=UNLIMITED))
    assert not [t for t in one.data if t.type == "contour"]
    lost = draw(result(cell_of(0, 0.1), cell_of(0, 0.4, perplexity_ratio=math.inf, kl=math.inf)), value="kl")
    assert lost.data[0].z[1][0] is None
    with pytest.raises(RunError, match="no direction 'x' at site None; it has a <b>, resid_post; other, attn_out"):
        draw(sweep, direction="x")
    with pytest.raises(ConfigError, match="value must be one of effect, win_rate"):
        draw(sweep, value="nll")


def test_the_frontiers_figure() -> None:
    sweep = result(*result().cells, cell_of(0, 0.8, effect=-50.0, kl=9.0))
    figure = frontier(sweep)
    points = figure.data[0]
    assert list(points.x) == [c.kl.estimate for c in sweep.cells] and list(points.y) == [
        c.effect.estimate for c in sweep.cells
    ]
    assert list(points.error_y.array) == pytest.approx([0.03] * 10) and list(
        points.error_x.arrayminus
    ) == pytest.approx([0.02] * 10)
    assert list(points.marker.color) == [c.layer for c in sweep.cells]
    assert [s == "circle" for s in points.marker.symbol] == [sweep.allows(c) for c in sweep.cells]
    (line,) = (t for t in figure.data if t.name == "beaten by none")
    assert [(x, y) for x, y in zip(line.x, line.y, strict=True)] == [
        (c.kl.estimate, c.effect.estimate) for c in sweep.frontier()
    ]
    assert [a.text for a in figure.layout.annotations] == ["1 cell below the frame"] and figure.layout.yaxis.range[
        0
    ] > -50
    assert 0.5 in [s.x0 for s in figure.layout.shapes] and figure.layout.xaxis.type == "log"
    (target,) = (t for t in figure.data if t.name == "best within the budget")
    assert (target.x[0], target.y[0]) == (0.4, pytest.approx(1.2))
    several = frontier(result(*sweep.cells, *(replace(c, direction="other") for c in sweep.cells)))
    assert [t.name for t in several.data[:2]] == ["a &lt;b&gt;, resid_post", "other, resid_post"]
    assert not [s for s in frontier(result(budget=UNLIMITED)).layout.shapes if s.line.dash == "dash"]
    with pytest.raises(RunError, match="no cell with a KL above 0"):
        frontier(result(cell_of(0, 0.1, kl=0.0)))
