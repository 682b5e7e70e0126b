"""The loop on tiny models of a real architecture: what it writes, that it repeats, resumes and refuses."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open

import sims_lens as sims
from sims_lens.errors import ConfigError, PlanError, PromptError, RankerError, RunError
from sims_lens.iteration import candidate_layers, compose, compose_control
from sims_lens.loop import choose_layer
from sims_lens.plan import Provenance, SteeringPlan
from sims_lens.sampling import TokenCount
from sims_lens.workbench import split_prompts

WORDS = [
    "sea",
    "sky",
    "sun",
    "rain",
    "snow",
    "wind",
    "tree",
    "leaf",
    "root",
    "bird",
    "fish",
    "stone",
    "sand",
    "fire",
    "iron",
    "gold",
    "salt",
    "milk",
    "bread",
    "wine",
]
PROMPTS = [f"Say {word}." for word in WORDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("llama", tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return sims.load(str(folder), kind="bridge")


def vowels(prompt: str, responses: Sequence[str]) -> list[float]:
    return [sum(c in "aeiou" for c in r) / (1 + len(r)) + 1e-3 * len(set(r)) for r in responses]


def config(**changes: Any) -> sims.SIMSConfig:
    steering = {"layers": (1,), "strength": 0.3} | changes.pop("steering", {})
    evaluation = {"samples": 2, "controls": 2} | changes.pop("evaluation", {})
    return sims.SIMSConfig(
        iterations=changes.pop("iterations", 2),
        sampling=sims.SamplingConfig(responses=3, max_new_tokens=8, top_k=None, batch_rows=16),
        steering=sims.SteeringConfig(**steering),
        evaluation=sims.EvaluationConfig(**evaluation),
        **changes,
    )


def improve(model: Any, out: Path | None, ranker: object = vowels, **settings: Any) -> sims.Run:
    settings = {"config": config()} | settings
    return sims.improve(model, settings.pop("prompts", PROMPTS), ranker=ranker, out=out, progress=False, **settings)


def same_vectors(a: sims.Run, b: sims.Run) -> bool:
    return all(
        all(torch.equal(x.tensors[name], y.tensors[name]) for name in x.tensors)
        for x, y in zip(a.iterations, b.iterations, strict=True)
    )


@pytest.fixture(scope="module")
def run(model: Any, tmp_path_factory: pytest.TempPathFactory) -> sims.Run:
    return improve(model, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_says_what_its_effect_is_worth(run: sims.Run, tmp_path: Path) -> None:
    band, adjusted = run.null_band, run.adjusted_p()
    assert band is not None and adjusted is not None
    effects = [c.difference.estimate for c in run.controls]
    assert band.low < min(effects) <= max(effects) < band.high
    assert run.beats_controls == (run.iterations[-1].evaluation.difference.estimate > band.high)
    plain = [i.evaluation.p for i in run.iterations]
    assert min(adjusted) == pytest.approx(min(1.0, 2 * min(p for p in plain if p is not None)))
    text = run.verdict()
    assert f"[{band.low:+.3g}, {band.high:+.3g}]" in text and "with 80% power" in text
    assert {"p", "length_controlled", "length_controlled_low"} <= set(run.table().columns)

    old = Path(shutil.copytree(run.path, tmp_path / "old"))  # as it was written before these figures were there
    for file in old.rglob("checksums.jsonl"):
        file.unlink()
    for file in (*old.glob("iterations/*/metrics.json"), old / "base/metrics.json"):
        data = json.loads(file.read_text())
        del data["evaluation"]["p"], data["evaluation"]["length_controlled"]
        file.write_text(json.dumps(data))
    before = sims.open_run(old)
    assert before.adjusted_p() is None and before.null_band == band and "power" not in before.verdict()
    assert before.iterations[0].evaluation.win_rate == run.iterations[0].evaluation.win_rate and repr(before)


def test_a_run_holds_what_it_promises(run: sims.Run) -> None:
    assert run.complete and len(run.iterations) == 2 and len(run.controls) == 2
    for name in ("samples.jsonl", "pairs.jsonl", "vectors.safetensors", "plan.safetensors", "heldout.jsonl"):
        assert (run.path / "iterations" / "02" / name).is_file(), name
    assert not list(run.path.rglob("*.partial")) and not list(run.path.rglob("*.tmp"))
    header = json.loads((run.path / "run.json").read_text())
    assert header["config"]["iterations"] == 2 and header["versions"]["transformer-lens"]
    assert {"sample", "capture", "measure", "rank"} <= set(run.cost)
    assert run.cost["sample"].decode > 0 and run.cost["measure"].prefill == 0  # measured while sampling
    train = run.samples(1, "train")
    assert len(train) == 3 * len(run.indices("train")) and all(s.score is not None for s in train)
    assert {s.prompt for s in train} == set(run.indices("train"))
    assert {s.prompt for s in run.samples(2)} == set(run.indices("heldout"))
    assert not set(run.indices("train")) & set(run.indices("heldout"))


def test_vectors_say_where_they_came_from(run: sims.Run) -> None:
    with safe_open(run.path / "iterations/01/vectors.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["sims_lens.run"])
    assert about["model"] == "small" and about["site"] == "resid_post" and about["weight_processing"] == "none"
    assert about["d_model"] == run.iterations[0].vectors.shape[1] and "iteration 1" in about["source"]


def test_scores_are_the_rankers_and_pairs_are_best_against_worst(run: sims.Run) -> None:
    by_prompt: dict[int, list[Any]] = {}
    for sample in run.samples(1, "train"):
        assert sample.score == pytest.approx(vowels("", [sample.text])[0])
        by_prompt.setdefault(sample.prompt, []).append(sample)
    rows = [json.loads(line) for line in (run.path / "iterations/01/pairs.jsonl").read_text().splitlines()]
    assert len(rows) == run.iterations[0].pairs.pairs
    for row in rows:
        scores = {s.draw: s.score for s in by_prompt[row["prompt"]] if s.tokens}
        assert scores[row["best"]] == max(scores.values()) and scores[row["worst"]] == min(scores.values())


def test_open_run_gives_back_the_same_object(run: sims.Run) -> None:
    again = sims.open_run(run.path)
    assert again.base == run.base and again.controls == run.controls and again.config == run.config
    assert [i.evaluation for i in again.iterations] == [i.evaluation for i in run.iterations]
    assert same_vectors(run, again)
    assert repr(again) == repr(run)


def test_repr_and_notebook_view(run: sims.Run) -> None:
    assert "held-out prompts" in repr(run) and "shuffled 2" in repr(run) and "tokens" in repr(run)
    assert run._repr_html_().count("<tr>") == 1 + 1 + 2 + 2
    assert list(run.table().index) == ["base", "iteration 1", "iteration 2", "shuffled 1", "shuffled 2"]


def test_the_same_config_gives_the_same_run_bit_for_bit(model: Any, run: sims.Run, tmp_path: Path) -> None:
    again = improve(model, tmp_path / "again")
    assert same_vectors(run, again)
    assert again.samples(2) == run.samples(2) and again.samples(1, "train") == run.samples(1, "train")
    assert again.base == run.base and again.controls == run.controls
    other = improve(model, tmp_path / "other", config=config(seed=1))
    assert other.samples(0) != run.samples(0)


def test_both_kinds_learn_the_same_vectors(folder: Path, run: sims.Run, tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens.HookedTransformer")
    hooked = improve(sims.load(str(folder), kind="hooked"), tmp_path / "hooked")
    assert [s.tokens for s in hooked.samples(0)] == [s.tokens for s in run.samples(0)]
    cosine = torch.nn.functional.cosine_similarity(hooked.iterations[0].vectors, run.iterations[0].vectors, dim=-1)
    assert cosine.min() > 0.9999


@pytest.mark.parametrize("calls", [1, 5, 11, 25, 40])
@pytest.mark.cases(2)
def test_a_failing_ranker_loses_nothing(model: Any, run: sims.Run, tmp_path: Path, calls: int) -> None:
    out = tmp_path / "resumed"
    left = [calls]

    def failing(prompt: str, responses: Sequence[str]) -> list[float]:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("out of credit")
        return vowels(prompt, responses)

    failing.__name__ = "vowels"
    with pytest.raises(RankerError, match="out of credit"):
        improve(model, out, failing)
    drawn = sum(len(f.read_text().splitlines()) for f in out.rglob("*responses.jsonl"))
    assert drawn > 0  # responses that were waiting to be ranked are on the disk
    before = {f: f.read_bytes() for f in out.rglob("*.jsonl") if f.name != "checksums.jsonl"}
    resumed = improve(model, out)
    for file, content in before.items():
        place = Path(str(file).replace(".partial", ""))
        assert not place.is_file() or place.read_bytes() == content
    assert same_vectors(run, resumed)
    assert resumed.samples(2) == run.samples(2) and resumed.controls == run.controls


def test_resuming_draws_only_what_is_missing(model: Any, run: sims.Run, tmp_path: Path) -> None:
    class Counting(sims.LocalSampler):
        drawn = 0

        def sample(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            for sample in super().sample(*args, **kwargs):
                self.drawn += 1
                yield sample

    whole = Counting(model, config().sampling)
    improve(model, tmp_path / "a", sampler=whole)
    partly = Counting(model, config().sampling)

    def stop_at_iteration_two(prompt: str, responses: Sequence[str]) -> list[float]:
        if (tmp_path / "b/iterations/01").is_dir():
            raise KeyboardInterrupt
        return vowels(prompt, responses)

    stop_at_iteration_two.__name__ = "vowels"
    with pytest.raises(KeyboardInterrupt):
        improve(model, tmp_path / "b", stop_at_iteration_two, sampler=partly)
    resumed = improve(model, tmp_path / "b", sampler=partly)
    assert partly.drawn == whole.drawn
    assert same_vectors(run, resumed)
    finished = Counting(model, config().sampling)
    assert improve(model, tmp_path / "b", sampler=finished).complete and finished.drawn == 0


class NoSampler:
    """Fails as soon as it is asked: what must be refused is refused before any compute."""

    count = TokenCount()

    def sample(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        raise AssertionError("sampled")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prompts": []}, PromptError, "empty|no prompt"),
        ({"prompts": [*PROMPTS, PROMPTS[3]]}, PromptError, "Say rain"),
        ({"prompts": [*PROMPTS, "  "]}, PromptError, "20"),
        ({"prompts": [*PROMPTS, "x" * 200]}, PromptError, "prompt 20 .* tokens.*context of 128"),
        ({"prompts": PROMPTS[:3]}, PromptError, "3 prompts"),
        ({"prompts": "Say sea."}, PromptError, "list"),
        ({"config": config(steering={"layers": (7,)})}, PlanError, r"layer 7 is not in 0\.\.2 of small"),
        ({"config": config(evaluation={"heldout": 0.01})}, PromptError, "held out"),
        ({"ranker": 3}, RankerError, "3"),
    ],
)
def test_wrong_input_is_refused_before_any_compute(
    model: Any, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings = {"ranker": vowels, "prompts": PROMPTS, "config": config()} | settings
    with pytest.raises(error, match=message):
        sims.improve(
            model, settings.pop("prompts"), out=tmp_path / "run", sampler=NoSampler(), progress=False, **settings
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sims.SamplingConfig(responses=1), r"responses \(K\) must be an integer of at least 2, got 1"),
        (lambda: sims.SamplingConfig(temperature=0.0), "temperature .* got 0.0"),
        (lambda: sims.SamplingConfig(temperature=float("nan")), "temperature"),
        (lambda: sims.SamplingConfig(max_new_tokens=True), "got True"),
        (lambda: sims.SteeringConfig(site="resid_mid"), "resid_mid.*attn_out"),
        (lambda: sims.SteeringConfig(scope="answer"), "'answer' is not one of all, prompt"),
        (lambda: sims.SteeringConfig(layers=(-1,)), "a layer .* got -1"),
        (lambda: sims.SteeringConfig(layers=(2, 2)), "twice"),
        (lambda: sims.SteeringConfig(compose="add"), "accumulate, replace, got 'add'"),
        (lambda: sims.EvaluationConfig(heldout=0.9, validation=0.2), "leave prompts"),
        (lambda: sims.SIMSConfig(iterations=0), "iterations .* got 0"),
        (lambda: sims.SIMSConfig.from_json({"iteration": 3}), "unknown setting 'iteration'"),
    ],
)
def test_wrong_settings_name_the_value_and_the_remedy(make: Any, message: str) -> None:
    with pytest.raises((ConfigError, PlanError), match=message):
        make()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda r: [float("nan")] * len(r), "nan"),
        (lambda r: [1.0], "1"),
        (lambda r: [float("inf")] * len(r), "inf"),
        (lambda r: None, "None"),
    ],
)
@pytest.mark.cases(2)
def test_bad_scores_are_refused_and_the_run_goes_on_later(
    model: Any, tmp_path: Path, scores: Any, message: str
) -> None:
    def vowels_of_late(prompt: str, responses: Sequence[str]) -> Any:
        return scores(responses) if (tmp_path / "run/base").is_dir() else vowels(prompt, responses)

    vowels_of_late.__name__ = "vowels"
    with pytest.raises(RankerError, match=message):
        improve(model, tmp_path / "run", vowels_of_late)
    assert sims.open_run(tmp_path / "run").base.score.estimate > 0
    assert improve(model, tmp_path / "run").complete


def test_a_ranker_that_sees_no_difference_says_so(model: Any, tmp_path: Path) -> None:
    def blind(prompt: str, responses: Sequence[str]) -> list[float]:
        return [1.0] * len(responses)

    with pytest.raises(RankerError, match="no better than chance: all responses .* the same score"):
        improve(model, tmp_path / "stopped", blind)
    go_on = config(ranking=sims.RankingConfig(audit="report"))
    with pytest.raises(RunError, match="0 contrast pairs .*'tie': 12"):
        improve(model, tmp_path / "run", blind, config=go_on)


def test_the_audit_stops_a_ranker_that_is_noise(model: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(prompt: str, responses: Sequence[str]) -> list[float]:
        return torch.rand(len(responses), generator=generator).tolist()

    with pytest.raises(RankerError, match="'noise' is no better than chance: .*when asked again"):
        improve(model, tmp_path / "run", noise)
    with pytest.raises(RankerError, match="no better than chance"):  # read from the disk, not asked again
        improve(model, tmp_path / "run", noise)
    unwatched = improve(model, tmp_path / "off", noise, config=config(ranking=sims.RankingConfig(audit="off")))
    assert unwatched.audit is None and unwatched.iterations[0].audit is None and unwatched.complete


def test_the_audit_is_kept_in_the_run(run: sims.Run) -> None:
    assert run.audit is not None and run.audit.verdict == "usable" and run.audit.kind == "oracle"
    for iteration in run.iterations:
        assert iteration.audit is not None and iteration.audit.pairs == iteration.pairs.pairs
    assert "Audit of vowels: usable" in repr(run)


def test_contrast_sampling_pairs_across_iterations(model: Any, run: sims.Run, tmp_path: Path) -> None:
    remembered = improve(model, tmp_path / "bank", config=config(contrast=sims.ContrastConfig(memory=None)))
    first, second = remembered.iterations
    assert torch.equal(first.vectors, run.iterations[0].vectors)  # one iteration: the same pairs
    assert first.pairs.cross_share == 0 and second.pairs.cross_share > 0
    assert second.pairs.margin > run.iterations[1].pairs.margin
    scores = {
        (t, s.prompt, s.draw): s.score for t in (1, 2) for s in remembered.samples(t, "train") if s.score is not None
    }
    rows = [json.loads(line) for line in (tmp_path / "bank/iterations/02/pairs.jsonl").read_text().splitlines()]
    for row in rows:
        best = scores[row["best_iteration"], row["prompt"], row["best"]]
        worst = scores[row["worst_iteration"], row["prompt"], row["worst"]]
        assert row["margin"] == pytest.approx(best - worst)
        assert best == max(v for (_, prompt, _), v in scores.items() if prompt == row["prompt"])
    some = config(contrast=sims.ContrastConfig(memory=None, policy="top_margin", size=5))
    assert [i.pairs.pairs for i in improve(model, tmp_path / "top", config=some).iterations] == [5, 5]


def test_responses_are_spent_where_scores_spread(model: Any, tmp_path: Path) -> None:
    base = config()
    settings = sims.SIMSConfig(
        iterations=2,
        sampling=replace(base.sampling, allocation="spread"),
        steering=base.steering,
        evaluation=base.evaluation,
    )

    def louder(prompt: str, responses: Sequence[str]) -> list[float]:
        return [(10.0 if prompt < "Say m" else 0.1) * score for score in vowels(prompt, responses)]

    spread = improve(model, tmp_path / "spread", louder, config=settings)
    counts = [Counter(s.prompt for s in spread.samples(t, "train")) for t in (1, 2)]
    assert set(counts[0].values()) == {3} and len(set(counts[1].values())) > 1
    assert sum(counts[1].values()) == sum(counts[0].values()) and min(counts[1].values()) >= 2
    again = improve(model, tmp_path / "spread", louder, config=settings)
    assert again.samples(2, "train") == spread.samples(2, "train")


def test_an_independent_evaluator_is_reported_beside_the_ranker(model: Any, run: sims.Run, tmp_path: Path) -> None:
    judged = improve(model, tmp_path / "run", evaluator=sims.ReadingEase())
    assert same_vectors(judged, run)  # the loop never learns from it
    assert judged.evaluator == "reading-ease" and run.evaluator == ""
    for evaluation in [judged.base, *(i.evaluation for i in judged.iterations), *judged.controls]:
        assert evaluation.independent is not None
    sample = judged.samples(2)[0]
    assert sample.independent == sims.ReadingEase().rank("", [sample.text])[0]
    assert judged.iterations[1].evaluation.difference == run.iterations[1].evaluation.difference
    assert "reading-ease win rate" in repr(judged) and "which the loop never saw" in judged.verdict()
    assert "independent_win_rate_low" in judged.table().columns


@pytest.mark.parametrize("memory", [1, None])
@pytest.mark.parametrize(("form", "steered"), [("likelihood", False), ("pairwise", False), ("likelihood", True)])
@pytest.mark.cases(2)
def test_the_model_can_judge_itself(model: Any, tmp_path: Path, form: str, steered: bool, memory: int | None) -> None:
    short = "{prompt} {first} {second} {criterion}" if form == "pairwise" else None  # for a context of 128
    judge = sims.SelfJudge("more cheerful", form=form, steered=steered, template=short)
    settings = config(
        ranking=sims.RankingConfig(audit="report", audit_prompts=3), contrast=sims.ContrastConfig(memory=memory)
    )
    judged = improve(model, tmp_path / "run", judge, config=settings)
    assert judged.complete and judged.audit is not None and judged.audit.kind == "judge"
    assert judged.ranker == judge.name
    assert (tmp_path / "run/verdicts").is_dir() is not steered
    again = improve(model, tmp_path / "again", judge, config=settings)
    assert same_vectors(judged, again)


def test_a_folder_with_another_run_is_refused(model: Any, run: sims.Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config: seed = 0 there, 5 here"):
        improve(model, run.path, config=config(seed=5))
    with pytest.raises(RunError, match="other prompts"):
        improve(model, run.path, prompts=[p.upper() for p in PROMPTS])
    with pytest.raises(RunError, match="another ranker"):
        improve(model, run.path, sims.ReadingEase())
    other = sims.load(str(tiny.write("llama", tmp_path / "stranger", seed=3)), kind="bridge")
    with pytest.raises(RunError, match="'small' there, 'stranger' here"):
        improve(other, run.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds no run"):
        improve(model, tmp_path / "full")
    with pytest.raises(RunError, match="no run at"):
        sims.open_run(tmp_path)


def test_auto_chooses_a_layer_on_the_validation_prompts(model: Any, tmp_path: Path) -> None:
    chosen = improve(
        model,
        tmp_path / "auto",
        config=config(
            iterations=1,
            steering={"layers": "auto", "candidates": (0.0, 1.0)},
            evaluation={"validation": 0.2, "controls": 0},
        ),
    )
    assert set(chosen.choice) == {0, 2} and len(chosen.indices("validation")) == 4
    limit = chosen.config.steering.max_nll_increase
    assert chosen.plan.layers == (json.loads((chosen.path / "choice/metrics.json").read_text())["chosen"],)
    assert limit > 0 and chosen.beats_controls is None


def test_split_is_seeded_and_complete() -> None:
    settings = sims.SIMSConfig()
    split = split_prompts(125, settings)
    assert {name: split.count(name) for name in set(split)} == {"heldout": 50, "validation": 19, "train": 56}
    assert split == split_prompts(125, settings) != split_prompts(125, sims.SIMSConfig(seed=1))


def test_compose_is_the_equation_in_the_docstring() -> None:
    directions = [torch.randn(3, 8), torch.randn(3, 8)]
    norms = torch.tensor([2.0, 3.0, 4.0])
    unit = [d / d.norm(dim=-1, keepdim=True) for d in directions]
    accumulated = compose(directions, [0.15, 0.15], [1, 2], norms, config().steering, Provenance())
    expected = (unit[0] + unit[1]) * 0.3 / 2
    for layer in (1, 2):
        torch.testing.assert_close(accumulated.vectors()[layer, "resid_post"], expected[layer] * norms[layer])
    first = compose(directions[:1], [0.15], [1], norms, config().steering, Provenance())
    torch.testing.assert_close(first.vectors()[1, "resid_post"], unit[0][1] * 0.15 * 3.0)
    replaced = compose(directions, [0.0, 0.3], [1], norms, config().steering, Provenance())
    torch.testing.assert_close(replaced.vectors()[1, "resid_post"], unit[1][1] * 0.3 * 3.0)


def test_controls_have_the_norm_of_the_real_plan() -> None:
    norms = torch.tensor([2.0, 3.0, 4.0])
    shares, settings = [0.15, 0.1], config().steering
    real = compose([torch.randn(3, 8)] * 2, shares, [0, 2], norms, settings, Provenance())
    null = compose_control([torch.randn(3, 8), torch.randn(3, 8)], shares, real, norms, settings, Provenance())
    for where, vector in real.vectors().items():
        torch.testing.assert_close(null.vectors()[where].norm(), vector.norm())
        assert torch.nn.functional.cosine_similarity(null.vectors()[where], vector, dim=0).abs() < 0.999


def test_choose_layer_takes_the_best_fluent_one(run: sims.Run) -> None:
    from sims_lens.stats import Interval

    def outcome(win_rate: float, nll: float) -> Any:
        point = Interval(win_rate, win_rate, win_rate)
        return replace(run.base, win_rate=point, nll=Interval(nll, nll, nll))

    found = {3: outcome(0.7, 1.5), 5: outcome(0.8, 1.9), 7: outcome(0.95, 3.0)}
    assert choose_layer(found, 2.0) == 5
    assert choose_layer(found, 1.0) == 3


def test_candidate_layers_stay_in_the_model() -> None:
    assert candidate_layers((0.0, 0.5, 1.0), 2) == [0, 1]


def test_the_runs_plan_steers(model: Any, run: sims.Run) -> None:
    tokens = torch.arange(5)[None] + 10
    base = model(tokens)
    with sims.steering(model, run.plan):
        assert not torch.equal(model(tokens), base)
    assert torch.equal(model(tokens), base)
    assert isinstance(SteeringPlan.load(run.path / "iterations/02/plan.safetensors"), SteeringPlan)
    assert run.plan.provenance.model == "small" and run.config.digest in run.plan.provenance.source


class Relative:
    """Scores hold only among the responses that it sees together: places, with a mean of 0 in every list."""

    name = "relative"
    pointwise = False

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        scores = vowels(prompt, responses)
        return [sum(score > other for other in scores) - sum(score < other for other in scores) for score in scores]


def test_steered_and_unsteered_responses_are_ranked_together(model: Any, run: sims.Run, tmp_path: Path) -> None:
    """Each list by itself would have a mean of 0, whatever the steering does."""
    other = improve(model, tmp_path / "run", Relative(), evaluator=Relative())
    assert same_vectors(run, other)
    for ours, theirs in zip(other.rows()[1:], run.rows()[1:], strict=True):
        assert ours[1].win_rate == theirs[1].win_rate, ours[0]
        assert ours[1].independent is not None and ours[1].independent.win_rate == ours[1].win_rate
    again = improve(model, tmp_path / "run", Relative(), evaluator=Relative())
    assert [e for _, e in again.rows()] == [e for _, e in other.rows()]
