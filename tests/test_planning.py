"""What a run will take: token counts against the sampler's own, sizes against real models, and sums that add up."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.cli import main
from sims_lens.errors import ConfigError
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.planning import (
    MACHINES,
    SHAPES,
    Drawing,
    Shape,
    Workload,
    drawing_seconds,
    drawings,
    forecast,
    split_sizes,
    step_seconds,
)
from sims_lens.workbench import split_prompts

PROMPTS = ["Say sea.", "Say sky.", "Say sun."]  # of one length each
SMALL = Shape("small", 3, 32, 4, 2, 8, 128, 259)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sims.load(tiny.write("llama", tmp_path_factory.mktemp("models") / "small"), kind="bridge")


def steered(scope: str) -> SteeringPlan:
    from common import plan_of

    return plan_of(1, scope=scope, coefficient=0.1)


@pytest.mark.parametrize("scope", ["all", "generation"])
def test_tokens_are_those_that_the_sampler_counts(model: Any, scope: str) -> None:
    adapter = adapt(model)
    length, sampler = len(adapter.encode(PROMPTS[0])), sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=6))
    keeps = scope == "generation"
    for plan, known, beside in ((NOTHING, False, 0), (steered(scope), True, 2), (steered(scope), True, 0)):
        seen = replace(sampler.count)
        if beside:
            samples = list(sampler.sample_and_measure(PROMPTS, n=3, plan=plan, seed=0, measured=beside))
        else:
            samples = list(sampler.sample(PROMPTS, n=3, plan=plan, seed=0))
        assert len({len(s.tokens) for s in samples}) == 1 and not any(s.ended for s in samples)
        foretold = Drawing(
            3, 3, length, 6, known=float(known and keeps), kept=keeps or plan is NOTHING, beside=beside, share=2 / 3
        ).count()
        assert sampler.count.prefill - seen.prefill == foretold.prefill
        assert sampler.count.decode - seen.decode == foretold.decode == 9 * 5
        assert sampler.count.attended - seen.attended == pytest.approx(foretold.attended)
        assert sampler.count.beside - seen.beside == pytest.approx(foretold.beside)
        assert sampler.count.logits - seen.logits == foretold.logits


def test_sizes_are_the_models(model: Any) -> None:
    folder = Path(model.sims_source["folder"])
    found = Shape.of(str(folder))
    assert found == replace(SMALL, name="small", tied=found.tied, d_vocab=found.d_vocab)
    assert found.arithmetic == adapt(model).arithmetic
    with pytest.raises(ConfigError, match="has no 'num_attention_heads'"):
        Shape.of_config({"hidden_size": 3})
    with pytest.raises(ConfigError, match="model size 'big' is neither a number such as '8B' nor a folder"):
        Shape.of("big")


@pytest.mark.parametrize("size", ["20M", "135M", "500M", "3B", "8B", "30B", "70B", "400B"])
def test_a_size_is_met(size: str) -> None:
    wanted = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert Shape.of(size).parameters == pytest.approx(wanted, rel=0.06)
    assert (Shape.of(size) in SHAPES) == (size in ("135M", "8B", "70B"))


@pytest.mark.parametrize("count", [20, 125, 1001])
@pytest.mark.parametrize("layers", ["auto", (1,)])
def test_prompts_are_split_as_a_run_splits_them(count: int, layers: Any) -> None:
    config = sims.SIMSConfig(steering=sims.SteeringConfig(layers=layers))
    split = split_prompts(count, config)
    assert split_sizes(count, config) == tuple(split.count(name) for name in ("train", "validation", "heldout"))


def test_a_run_draws_what_its_forecast_says(model: Any, tmp_path: Path) -> None:
    config = sims.SIMSConfig(
        iterations=2,
        sampling=sims.SamplingConfig(responses=3, max_new_tokens=6),
        steering=sims.SteeringConfig(layers=(1,), strength=0.05),
        evaluation=sims.EvaluationConfig(samples=2, controls=1),
        ranking=sims.RankingConfig(audit="off"),
        guard=sims.GuardConfig(mode="off"),
    )
    prompts = [f"Say {word}." for word in ("sea", "sky", "sun", "ice", "oak", "fox", "bee", "ash", "elm", "cod")]
    run = sims.improve(
        model,
        prompts,
        ranker=lambda prompt, responses: [sum(map(ord, r)) / 1e3 for r in responses],
        config=config,
        out=tmp_path / "run",
        progress=False,
    )
    length = len(adapt(model).encode(prompts[0]))
    drawn = [s for t in (0, 1, 2) for s in run.samples(t)] + [s for t in (1, 2) for s in run.samples(t, "train")]
    if any(s.ended for s in drawn):
        pytest.skip("a random model ended a response, so that their lengths differ")
    work = Workload(Shape.of(model.sims_source["folder"]), len(prompts), prompt_tokens=float(length), config=config)
    found = next(p for p in forecast(work, MACHINES["cpu"]).phases if p.name == "sample")
    cost = run.cost["sample"]
    assert (found.prefill, found.decode) == (cost.prefill, cost.decode)
    assert found.flops == pytest.approx(cost.flops, rel=0.02)
    assert sum(d.rows for d in drawings(work)) == 2 * (6 * 3 + 4 * 2) + 2 * 4 * 2


def test_a_step_is_bound_by_memory_for_few_rows_and_by_products_for_many() -> None:
    shape, machine = Shape.of("8B"), replace(MACHINES["h100"], overhead=0.0)
    one, two = (step_seconds(shape, machine, rows, 100) for rows in (1, 2))
    assert one == pytest.approx(two, rel=0.01)
    assert one == pytest.approx(2 * shape.parameters / (0.6 * 3.35e12), rel=0.1)
    many, more = (step_seconds(shape, machine, rows, 100) for rows in (4000, 8000))
    assert more == pytest.approx(2 * many, rel=0.05)
    assert step_seconds(shape, machine, 64, 100, gpus=2) == pytest.approx(step_seconds(shape, machine, 64, 100) / 2)


def test_more_of_anything_takes_longer() -> None:
    shape, machine, base = Shape.of("135M"), MACHINES["cpu"], Drawing(8, 4, 30, 16)
    seconds = drawing_seconds(shape, machine, base, 32)
    for change in ({"prompts": 16}, {"responses": 8}, {"prompt_tokens": 60}, {"response_tokens": 32}):
        assert drawing_seconds(shape, machine, replace(base, **change), 32) > 1.05 * seconds  # type: ignore[arg-type]
    assert drawing_seconds(Shape.of("360M"), machine, base, 32) > 1.5 * seconds
    assert drawing_seconds(shape, machine, replace(base, beside=4, share=0.5), 32) == pytest.approx(
        1.5 * seconds, rel=0.1
    )


def test_a_judge_that_compares_grows_with_the_square_of_k() -> None:
    def calls(k: int) -> float:
        config = sims.SIMSConfig(sampling=sims.SamplingConfig(responses=k))
        found = forecast(Workload(Shape.of("8B"), 1000, config=config, judge="endpoint"), MACHINES["h100"])
        return next(p.calls for p in found.phases if p.name == "rank")

    train, _, _ = split_sizes(1000, sims.SIMSConfig())
    assert calls(8) - calls(4) == 3 * train * (8 * 7 - 4 * 3)


def test_money_is_of_machines_and_judges_and_unknown_where_a_price_is() -> None:
    work = Workload(Shape.of("8B"), 1000, judge="endpoint", judge_price=(1.0, 2.0), judge_per_second=1e6)
    found = forecast(work, MACHINES["h100"], gpus=2)
    judged = next(p for p in found.phases if p.name == "rank")
    machines = 2 * found.seconds / 3600 * 3.0
    assert found.dollars == pytest.approx(machines + (judged.prefill + 2 * judged.decode) / 1e6)
    assert forecast(replace(work, judge_price=None), MACHINES["h100"]).dollars is None
    assert forecast(work, MACHINES["l4"]).dollars is None and "$" not in repr(forecast(work, MACHINES["l4"]))


def test_bottlenecks_are_named() -> None:
    work = Workload(Shape.of("70B"), 10**6, 100.0, 256.0, judge="endpoint", sampler="vllm")
    text = repr(forecast(work, MACHINES["h100"], gpus=2))
    for part in ("the judge takes", "judge calls", "keys and values leave room for", "the driving process holds"):
        assert part in text
    with pytest.raises(ConfigError, match="141.1 GB of weights, more than 1 x NVIDIA H100 .* give at least 2"):
        forecast(work, MACHINES["h100"])
    assert forecast(Workload(Shape.of("135M"), 100), MACHINES["cpu"]).bottlenecks == (
        "drawing responses takes 100% of the time",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": 0}, "prompts = 0 is not 1 or more"),
        ({"judge": "oracle"}, "judge 'oracle' is not one of function, self"),
        ({"sampler": "ray"}, "sampler 'ray' is not one of local, vllm"),
        ({"ended": 1.5}, "ended = 1.5 is not from 0 to 1"),
        ({"response_tokens": math.nan}, "response_tokens = nan is not from 1 to inf"),
    ],
)
def test_workloads_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(Workload(SMALL, 10), **change)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", "--model-size", "8B", "--prompts", "1000", "--hardware", "h100", "--gpus", "4"]
    assert main([*arguments, "--judge", "self", "--dollars-per-hour", "2", "--json", str(file)]) == 0
    said, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "1,000 prompts on Llama-3.1-8B (8.03B parameters), 4 x NVIDIA H100" in said and "not measured" in said
    assert found["dollars"] == pytest.approx(4 * found["seconds"] / 3600 * 2) and set(found["phases"]) == {
        "sample",
        "rank",
    }
    assert main(["plan", "--prompts", "10", "--hardware", "tpu"]) == 2
    assert "hardware 'tpu' is not one of h100, a100, l4, cpu" in capsys.readouterr().err
