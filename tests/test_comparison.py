"""The comparison: what each method is, what is matched, what it costs, and what is said of it."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import sims_lens as sims
from sims_lens.comparison import Comparison
from sims_lens.comparison.choosing import best_of, best_of_kl, rejection, rejection_kl
from sims_lens.data import Sample
from sims_lens.errors import ConfigError, DamagedError, RunError
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.store import Folder
from sims_lens.strength import Divergence

PROMPTS = [f"Say {a} {b}." for a, b in itertools.product(("sea", "sky", "sun", "rain"), ("now", "then", "why", "so"))]


def vowels(prompt: str, responses: Sequence[str]) -> list[float]:
    return [sum(c in "aeiou" for c in r) / (1 + len(r)) + 1e-3 * len(set(r)) for r in responses]


def length(prompt: str, responses: Sequence[str]) -> list[float]:
    return [float(len(r)) for r in responses]


CONFIG = sims.SIMSConfig(
    iterations=2,
    sampling=sims.SamplingConfig(responses=3, max_new_tokens=8, top_k=None),
    steering=sims.SteeringConfig(layers=(1,), kl=0.2),
    evaluation=sims.EvaluationConfig(samples=2, controls=2, validation=0.0),
    guard=sims.GuardConfig(mode="report"),
)
PAIRS = [("Say it.", "yes yes", "no no"), ("Do it.", "a e i", "x y z"), ("Try.", "good", "bad"), ("Go.", "on", "off")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sims.load(str(tiny.write("llama", tmp_path_factory.mktemp("models") / "small")), kind="bridge")


def compare(model: Any, out: Path, **changes: Any) -> Comparison:
    given: dict[str, Any] = {"ranker": vowels, "evaluator": length, "instruction": "Use vowels.", "pairs": PAIRS}
    given |= {"seeds": (0, 1), "config": CONFIG} | changes
    return sims.compare(model, PROMPTS, out=out, progress=False, **given)


@pytest.fixture(scope="module")
def found(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(model, tmp_path_factory.mktemp("comparisons") / "whole")


def scored(scores: Sequence[float], prompt: int = 0) -> list[Sample]:
    return [Sample(prompt, k, (1, 2), f"r{k}", True, score=float(s)) for k, s in enumerate(scores)]


def test_best_of_n_takes_the_best_of_each_n() -> None:
    samples = scored([1, 5, 3, 2, 9, 0, 7]) + scored([4, 3, 2, 1, 0, 1, 2], prompt=3)
    picked = best_of(samples, 3, count=5)
    assert [(s.prompt, s.draw, s.score) for s in picked] == [(0, 0, 5), (0, 1, 9), (3, 0, 4), (3, 1, 1)]
    assert all(s.kl == pytest.approx(best_of_kl(3) / 2) for s in picked)
    assert len(best_of(samples, 3, count=1)) == 2


@pytest.mark.parametrize(("n", "accepted"), [(1, 0.3), (2, 0.5), (4, 0.25), (8, 0.1), (3, 0.9)])
def test_the_divergences_of_choosing_are_those_of_their_densities(n: int, accepted: float) -> None:
    """Against the integral of the density of the chosen quantile, by simulation and by quadrature."""
    u = (np.arange(200_000) + 0.5) / 200_000
    best = n * u ** (n - 1)
    assert best_of_kl(n) == pytest.approx(float((best * np.log(best)).mean()), abs=1e-4)
    q = 1 - accepted
    first = np.where(u > q, (1 - q**n) / accepted, best)
    assert first.mean() == pytest.approx(1.0, abs=1e-4)  # it is a density
    assert rejection_kl(accepted, n) == pytest.approx(float((first * np.log(first)).mean()), abs=1e-4)

    rng = np.random.default_rng(0)
    draws = rng.random((100_000, n))
    good = draws > q
    taken = np.where(good.any(1), draws[np.arange(len(draws)), good.argmax(1)], draws.max(1))
    assert (taken > q).mean() == pytest.approx(1 - q**n, abs=0.01)


def test_rejection_stops_at_the_first_that_will_do() -> None:
    samples = scored([1, 6, 9, 2, 3, 1])
    picked, tries = rejection(samples, 3, threshold=5.0, count=2)
    assert [s.score for s in picked] == [6, 3] and tries == (2 + 3) / 2
    never, most = rejection(samples, 3, threshold=99.0, count=2)
    assert [s.score for s in never] == [9, 3] and most == 3
    assert never[0].kl == pytest.approx(best_of_kl(3) / 2)


def test_every_method_is_there_on_the_same_prompts_with_every_seed(found: Comparison) -> None:
    families = {m.family for m in found.methods}
    assert families == {
        "loop", "one-shot", "supervised", "instruction", "best of N", "rejection", "random", "shuffled"
    }  # fmt: skip
    assert len(found.family("loop")) == 2 and found.seeds == (0, 1)
    runs = [sims.open_run(found.path / f"seed_{seed}") for seed in found.seeds]
    assert runs[0].split == runs[1].split and runs[0].samples(1, "train") != runs[1].samples(1, "train")
    for method in found.methods:
        assert method.changes.shape == method.wins.shape == method.kl.shape == (2, found.heldout)
        assert np.isfinite(method.changes).all() and ((method.wins >= 0) & (method.wins <= 1)).all()
        assert method.independent_changes is not None and method.independent_changes.shape == method.changes.shape
    for run, row, wins in zip(runs, found["loop, 2 iterations"].changes, found["loop, 2 iterations"].wins, strict=True):
        assert row.mean() == pytest.approx(run.iterations[1].evaluation.difference.estimate)
        assert wins.mean() == pytest.approx(run.iterations[1].evaluation.win_rate.estimate)
    assert len(found.controls) == 4 and found.null_band is not None


def test_the_dose_is_matched_and_the_samples_are(found: Comparison, model: Any) -> None:
    run = sims.open_run(found.path / "seed_0")
    divergence = Divergence(model, run.prompts, run.samples(1, "train"))
    wanted = divergence.of(run.iterations[1].plan)
    kept = found.path / "seed_0" / "compared"
    plans = {p.name.split(".")[0]: SteeringPlan.load(p) for p in kept.glob("*.plan.safetensors")}
    by_kl = [name for name in plans if "_kl_" in name]
    assert len(by_kl) == 4  # one-shot twice, supervised, random
    for name in by_kl:
        assert divergence.of(plans[name]) == pytest.approx(wanted, rel=0.1), name
    (by_norm,) = [plan for name, plan in plans.items() if "_norm_" in name]
    norms = [float(p.vectors()[1, "resid_post"].norm()) for p in (by_norm, run.iterations[1].plan)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)

    loop, shot = found["loop, 2 iterations"], found["one-shot, 6 responses a prompt"]
    assert loop.learning.responses == shot.learning.responses == 6 * len(run.indices("train"))
    pool = {(s["prompt"], s["draw"]): s["tokens"] for s in Folder(kept).read_rows("pool")}
    first = run.samples(1, "train")
    assert all(pool[s.prompt, s.draw] == list(s.tokens) for s in first)  # the loop's own first responses
    assert len(pool) == 2 * len(first)
    drawn = shot.learning.flops - found["one-shot, 6 responses a prompt, at its norm"].learning.flops
    assert 0 < drawn < 0.5 * shot.learning.flops  # finding the strength


def test_what_it_costs_is_what_was_drawn(found: Comparison) -> None:
    run = sims.open_run(found.path / "seed_0")
    other = sims.open_run(found.path / "seed_1")
    tokens = [sum(len(s.tokens) for t in (1, 2) for s in r.samples(t, "train")) for r in (run, other)]
    loop = found["loop, 2 iterations"]
    assert loop.learning.tokens == pytest.approx(np.mean(tokens))
    assert loop.learning.judged == loop.learning.responses
    base = np.mean([len(s.tokens) for r in (run, other) for s in r.samples(0)])
    best = found.family("best of N")[-1]
    n = int(best.name.rsplit(" ", 1)[1])
    assert best.learning.tokens == 0 and best.answering.responses == pytest.approx(n) == best.answering.judged
    assert best.answering.tokens == pytest.approx(n * base, rel=0.2)
    budget = [
        r.config.sampling.responses * 2 * len(r.indices("train")) / (found.heldout * found.answers)
        for r in (run, other)
    ]
    assert n == pytest.approx(1 + np.mean(budget), abs=1.0)
    total = found.total(best)
    assert total.flops == pytest.approx(best.answering.flops * found.heldout * found.answers)
    answers = found.break_even("loop, 2 iterations", best.name)
    assert loop.learning.flops + answers * loop.answering.flops == pytest.approx(answers * best.answering.flops)
    assert found.break_even(best.name, "loop, 2 iterations") == 0
    asked = found["instruction"].answering.flops / found["instruction"].answering.tokens
    assert asked > loop.answering.flops / loop.answering.tokens  # a longer prompt to read
    rejected = found.family("rejection")[0]
    assert 1 <= rejected.answering.responses <= n


def test_best_of_n_is_measured_by_its_formula_and_the_instruction_by_the_model(found: Comparison, model: Any) -> None:
    best = found.family("best of N")[0]
    assert best.kl_response == pytest.approx(np.full_like(best.kl_response, best_of_kl(2)), rel=1e-6)
    told = found["instruction"]
    run = sims.open_run(found.path / "seed_0")
    (file,) = (found.path / "seed_0" / "compared").glob("instruction_*.jsonl")
    sample = next(s for s in map(json.loads, file.read_text().splitlines()) if s["nll"] is not None and s["tokens"])
    plain, asked = (
        _log_probs(model, text, sample["tokens"])
        for text in (run.prompts[sample["prompt"]], f"{run.prompts[sample['prompt']]}\n\nUse vowels.")
    )
    assert sample["nll"] == pytest.approx(
        -float(plain.gather(-1, torch.tensor(sample["tokens"])[:, None]).mean()), rel=1e-3
    )
    assert sample["kl"] == pytest.approx(float((asked.exp() * (asked - plain)).sum(-1).mean()), rel=1e-3)
    assert told.kl.mean() > 0 and math.isnan(told.norm[0])


def _log_probs(model: Any, prompt: str, tokens: list[int]) -> torch.Tensor:
    head = sims.adapter.adapt(model).encode(prompt)  # type: ignore[attr-defined]
    with torch.inference_mode():
        logits = model(torch.tensor([[*head, *tokens]]))[0, len(head) - 1 : -1]
    return logits.float().log_softmax(-1)


def test_one_method_against_another(found: Comparison) -> None:
    gap, wins = found.between("loop, 2 iterations", "random direction")
    a, b = found["loop, 2 iterations"], found["random direction"]
    assert gap.interval.estimate == pytest.approx(float((a.changes - b.changes).mean()))
    assert wins is not None
    back, against = found.between("random direction", "loop, 2 iterations")
    assert back.interval.estimate == pytest.approx(-gap.interval.estimate)
    assert against is not None and against.interval.estimate == pytest.approx(1 - wins.interval.estimate)
    same, even = found.between("random direction", "random direction")
    assert same.interval.estimate == 0 and even is not None and even.interval.estimate == 0.5
    with pytest.raises(RunError, match="there is no method 'magic'"):
        found["magic"]


def test_it_says_what_it_found(found: Comparison) -> None:
    text = repr(found)
    assert all(m.name in text for m in found.methods) and "null band" in found.verdict()
    assert len(found.head_to_head()) == sum(m.family not in ("loop", "shuffled") for m in found.methods)
    table = found.table()
    assert list(table.index) == [m.name for m in found.methods]
    row = table.loc["loop, 2 iterations"]
    assert row["effect_low"] <= row["effect"] <= row["effect_high"] and row["win_rate_seed_sd"] >= 0
    page = replace(found, ranker="<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    (figure,) = sims.plots.figures(found)
    assert {trace.name for trace in figure.data} >= {"loop", "one-shot, equal KL", "best of N", "instruction"}
    assert all(np.isfinite(np.array(trace.x, dtype=float)).all() for trace in figure.data)
    assert [s.type for s in figure.layout.shapes].count("rect") == 2  # the null band, in both panels


def test_it_is_read_back_and_nothing_is_computed_twice(found: Comparison, model: Any, monkeypatch: Any) -> None:
    again = sims.open_comparison(found.path)
    assert repr(again) == repr(found)
    assert np.allclose(again["instruction"].changes, found["instruction"].changes, rtol=1e-5)
    from sims_lens.sampling import LocalSampler

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("sampled again")

    with monkeypatch.context() as patch:
        patch.setattr(LocalSampler, "_sample", never)
        assert repr(compare(model, found.path)) == repr(found)
    # what was said or given is not taken for what is said or given now
    other = compare(model, found.path, instruction="Never use a vowel.", pairs=PAIRS[:2])
    assert not np.array_equal(other["instruction"].scores, found["instruction"].scores)
    assert "supervised, 2 pairs" in repr(other) and "supervised, 4 pairs" not in repr(other)
    turned = compare(model, found.path, pairs=[(p, b, a) for p, a, b in PAIRS])
    assert not np.array_equal(turned["supervised, 4 pairs"].changes, found["supervised, 4 pairs"].changes)
    assert np.array_equal(turned["instruction"].scores, found["instruction"].scores)


def test_one_seed_says_nothing_of_others_and_a_judge_of_pairs_is_not_compared(model: Any, tmp_path: Path) -> None:
    class Pairs:
        name = "pairs"
        pointwise = False

        def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
            scores = vowels(prompt, responses)
            return [sum(a > b for b in scores) / len(scores) for a in scores]

        def matrix(self, prompt: str, responses: Sequence[str]) -> Any:
            scores = np.array(vowels(prompt, responses))
            return (scores[:, None] > scores[None]) + 0.5 * (scores[:, None] == scores[None])

    config = replace(CONFIG, ranking=sims.RankingConfig(audit="off"))
    found = compare(model, tmp_path / "one", ranker=Pairs(), evaluator=None, pairs=(), seeds=(3,), config=config)
    assert not found.comparable and found.between("random direction", "instruction")[1] is None
    assert "says nothing of other seeds" in found.verdict() and not found.family("rejection")
    best = found.family("best of N")[0]
    assert best.win_rate.interval.estimate > 0.5 and best.effect.seed_sd is None
    assert found["instruction"].independent_win_rate is None


def test_dpo_without_trl_is_refused_in_one_line(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sims_lens.comparison.dpo.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'^DPO needs the package trl: pip install "sims-lens\[dpo\]" \(Python 3.11'):
        compare(model, tmp_path / "dpo", dpo=[sims.DPOConfig()])
    assert not any(tmp_path.iterdir())


def test_wrong_input_is_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seeds must be distinct .* got '\[1, 1\]'"):
        compare(model, tmp_path, seeds=[1, 1])
    with pytest.raises(ConfigError, match="at least one"):
        compare(model, tmp_path, seeds=[])
    with pytest.raises(ConfigError, match="instruction must be a text"):
        compare(model, tmp_path, instruction="  ")
    (tmp_path / "comparison.json").write_text('{"format": "other"}')
    with pytest.raises(RunError, match="no comparison"):
        sims.open_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"format": "sims_lens.comparison", "version": 2, "methods": []}')
    with pytest.raises(RunError, match="a newer sims_lens \\(format 2\\); update it"):
        sims.open_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"format": "sims_lens.comparison", "version": 1, "methods": [{}]}')
    with pytest.raises(DamagedError, match="damaged"):
        sims.open_comparison(tmp_path)
    assert NOTHING.vectors() == {}
