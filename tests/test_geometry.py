"""Norms against a slow loop, planted rotations found, chance and noise as large as stated, p-values that are ones."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from common import D_MODEL, KINDS, plan_of, vector
from torch import Tensor

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.analysis.axes import model_axes, stream_directions, unembedding
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.analysis.norms import VectorNorms, encode_texts, vector_norms
from sims_lens.analysis.permutation import pair_differences, permutation_p, run_differences
from sims_lens.analysis.similarity import (
    DirectionSimilarity,
    ceiling,
    direction_similarity,
    principal_angles,
    random_cosine,
)
from sims_lens.errors import ConfigError, FitError, ModelError, PlanError, PromptError, RunError
from sims_lens.plots import geometry
from sims_lens.stats import holm

TEXTS = [("Say a.", " yes and"), ("Say a.", " no"), ("A longer prompt, this.", " sure, indeed"), ("Why?", " so")]


def axes(count: int, *, size: int = D_MODEL, seed: int = 0) -> Tensor:
    """Orthonormal rows."""
    drawn = torch.randn(size, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].T


def turned(degrees: float, *, size: int = D_MODEL, seed: int = 0) -> Tensor:
    """A unit vector at an angle from the first axis, in the plane of the first two."""
    one, two = axes(2, size=size, seed=seed)
    angle = math.radians(degrees)
    return (math.cos(angle) * one + math.sin(angle) * two).float()


def named(name: str, vectors: Any, **known: Any) -> Directions:
    return Directions(name=name, layers=tuple(range(len(vectors))), vectors=torch.stack(list(vectors)).float(), **known)


# Norms


def slow_stream(model: Any, row: tuple[Sequence[int], Sequence[int]], layer: int) -> Tensor:
    """One sequence on its own, from TransformerLens' own cache."""
    tokens = torch.tensor([[*row[0], *row[1]]])
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens)
    return cache[f"blocks.{layer}.hook_resid_post"][0].clone().double()


@pytest.mark.parametrize("scope", [None, "all"])
def test_norms_are_those_of_a_loop_over_single_rows(model: Any, scope: str | None) -> None:
    vectors = {0: 3.0 * vector(1), 2: vector(2)}
    found = vector_norms(model, vectors, texts=TEXTS, scope=scope, batch_rows=3, progress=False)
    rows, _ = encode_texts(adapt(model), TEXTS)
    for d, stream in zip(found.directions, found.residual, strict=True):
        axis = vectors[d.layer].double() / vectors[d.layer].double().norm()
        tokens, first, means = [], [], []
        for row in rows:
            whole = slow_stream(model, row, d.layer)
            kept = whole[1:] if scope == "all" else whole[len(row[0]) :]
            tokens.append(kept)
            first.append(whole[0].norm())
            means.append(float((kept @ axis).mean()))
        norms = torch.cat(tokens).norm(dim=-1)
        assert stream.mean == pytest.approx(float(norms.mean()), rel=1e-4)
        assert stream.median == pytest.approx(float(norms.median()), rel=1e-4)
        assert stream.first_position == pytest.approx(float(torch.stack(first).median()), rel=1e-4)
        assert d.norm == pytest.approx(float(vectors[d.layer].norm()), rel=1e-6)
        by_prompt = [(means[0] + means[1]) / 2, means[2], means[3]]
        assert d.projection.estimate == pytest.approx(np.mean(by_prompt), rel=1e-3, abs=1e-4)
        assert min(by_prompt) - 1e-4 <= d.projection.low <= d.projection.high <= max(by_prompt) + 1e-4
        assert d.projection_sd == pytest.approx(float((torch.cat(tokens) @ axis).std(correction=0)), rel=1e-3)
        assert math.isnan(d.gap.estimate)
    assert found.tokens == sum(len(t) for t in tokens) and found.texts == 4
    row = found.table().iloc[0]
    assert row["relative_to_median"] == pytest.approx(row["norm"] / row["residual_median"])
    assert row["norm_in_sd"] == pytest.approx(row["norm"] / row["projection_sd"])


def test_the_first_position_is_in_its_own_figure_only(llama: Any) -> None:
    point = adapt(llama).point(1, "resid_post")

    def massive(_point: Any, _args: Any, output: Tensor) -> Tensor:
        new = output.clone()
        new[:, 0] = 1e4
        return new

    before = vector_norms(llama, {1: vector()}, texts=["Hello there."], progress=False)
    handle = point.register_forward_hook(massive)  # a single text: no padding, column 0 is its first position
    try:
        after = vector_norms(llama, {1: vector()}, texts=["Hello there."], progress=False)
    finally:
        handle.remove()
    assert after.residual[0].first_position == pytest.approx(1e4 * math.sqrt(D_MODEL))
    assert replace(after.residual[0], first_position=0.0) == replace(before.residual[0], first_position=0.0)
    assert after.directions[0].projection.estimate == before.directions[0].projection.estimate


def test_a_steered_model_is_read_as_it_is_steered(llama: Any) -> None:
    added = 5.0 * vector(3)
    plan = sims.SteeringPlan.addition({1: added}, coefficient=1.0, units="absolute", scope="response")
    before = model_axes(llama, texts=TEXTS, components=0)["mean stream"].at(1)
    with sims.steering(llama, plan):
        after = model_axes(llama, texts=TEXTS, components=0)["mean stream"].at(1)
    assert torch.allclose(after - before, added, atol=1e-3)


def test_what_compares_with_the_unsteered_model_refuses_a_steered_one(llama: Any) -> None:
    with sims.steering(llama, plan_of(1)):
        with pytest.raises(ModelError, match="a plan is attached"):
            vector_norms(llama, {1: vector()}, texts=TEXTS, progress=False)
        with pytest.raises(ModelError, match="a plan is attached"):
            direction_similarity({1: vector()}, {1: vector(1)}, model=llama)
        assert direction_similarity({1: vector()}, {1: vector(1)}).pairs  # needs no model


def test_unit_directions_have_a_projection_and_no_norm(llama: Any) -> None:
    pairs = [(f"Say {w}.", f" yes {w}", f" no {w}") for w in "abcdef"]
    fitted = sims.fit(llama, pairs, layers=[1], estimator=sims.HouseholderRotation(epochs=1))
    turn = sims.SteeringPlan.of({0: sims.Rotation(vector(7)), 2: sims.Addition(2.0 * vector(8))})
    source = {"fit": fitted, "turn": turn, "added": {1: 3.0 * vector(1)}}
    found = vector_norms(llama, source, texts=TEXTS, progress=False)
    table = found.table().set_index(["name", "layer"])
    lengths = ["norm", "relative_to_median", "relative_to_mean", "norm_in_sd"]
    for where in (("fit", 1), ("turn", 0)):
        assert table.loc[where, lengths].isna().all() and math.isfinite(table.loc[where, "projection_relative"])
    assert table.loc[("added", 1), "norm"] == pytest.approx(float(3 * vector(1).norm()))
    assert table.loc[("turn", 2), lengths].notna().all()
    lines = {line.split()[0]: line for line in repr(found).splitlines()[2:]}
    assert "unit direction" in lines["fit"] and "unit direction" not in lines["turn"] + lines["added"]
    names = [trace.name for trace in geometry.norm_profile(found).data]
    assert "fit (unit direction)" in names and "turn" in names


def test_one_text_has_no_interval_and_no_plural(llama: Any) -> None:
    found = vector_norms(llama, {1: vector()}, texts=["Hello there."], progress=False)
    p = found.directions[0].projection
    assert math.isfinite(p.estimate) and math.isnan(p.low) and math.isnan(p.high)
    assert ": 1 text, " in repr(found) and "[one prompt]" in repr(found)
    subtitle = geometry.projection_profile(found).layout.title.subtitle.text
    assert subtitle.startswith("1 text, ")
    twice = vector_norms(llama, {1: vector()}, texts=TEXTS[:2], progress=False)  # of one prompt
    assert math.isnan(twice.directions[0].projection.low) and ": 2 texts, " in repr(twice)


def test_norms_refuse_what_does_not_fit(llama: Any, unchecked: None) -> None:
    with pytest.raises(PlanError, match=r"layer 7 is not in 0\.\.2"):
        vector_norms(llama, {7: vector()})
    with pytest.raises(PlanError, match="d_model 5"):
        vector_norms(llama, {0: torch.ones(5)})
    with pytest.raises(PromptError, match="a list of prompts"):
        vector_norms(llama, {0: vector()}, texts="Hello")
    with pytest.raises(PromptError, match="text 0 is"):
        vector_norms(llama, {0: vector()}, texts=[("a", "b", "c")])
    with pytest.raises(PromptError, match="the context 128"):
        vector_norms(llama, {0: vector()}, texts=["a" * 200])
    with pytest.raises(PromptError, match="no token of the 1 text is in scope 'response'"):
        vector_norms(llama, {0: vector()}, texts=["Hello"], scope="response", progress=False)
    with pytest.raises(PromptError, match="text 1 is empty: ''; leave it out"):
        vector_norms(llama, {0: vector()}, texts=["Hello", ""])
    for rows in (0, 1.5):
        with pytest.raises(ConfigError, match=f"batch_rows must be an integer of at least 1, got {rows}"):
            vector_norms(llama, {0: vector()}, texts=["Hello"], batch_rows=rows)  # type: ignore[arg-type]
    found = vector_norms(llama, {0: vector()}, texts=["Hello"], progress=False)
    with pytest.raises(PlanError, match="no direction 'x'; there are 'vectors'"):
        found.of("x")
    with pytest.raises(PlanError, match="not measured at resid_post of layer 2"):
        found.stream("resid_post", 2)


# A planted rotation


def test_similarity_finds_the_rotation() -> None:
    """Iteration t at layer l is turned by 10 t + 3 l degrees in one plane; lengths differ."""
    sizes = [2.0, 0.5, 7.0]
    iterations = {
        f"iteration {t}": torch.stack([sizes[layer] * turned(10 * t + 3 * layer) for layer in range(3)])
        for t in range(1, 4)
    }
    found = direction_similarity(iterations)
    for first, second, angle in (("iteration 1", "iteration 2", 10.0), ("iteration 1", "iteration 3", 20.0)):
        between = found.between(first, second)
        assert between.angle.tolist() == pytest.approx([angle] * 3, abs=1e-4)
        assert between.cosine.tolist() == pytest.approx([math.cos(math.radians(angle))] * 3, abs=1e-6)
    layers = found.across_layers("iteration 2").double().arccos().rad2deg()
    assert layers[0].tolist() == pytest.approx([0, 3, 6], abs=0.05)
    path = found.trajectory(1)
    assert path.turn.tolist()[1:] == pytest.approx([5.0, 5.0], abs=1e-4) and path.turn.isnan()[0]
    assert path.total_turn.tolist() == pytest.approx([0.0, 5.0, 10.0], abs=1e-4)
    assert path.norm.tolist() == pytest.approx([0.5] * 3)
    assert path.with_previous.tolist()[1:] == pytest.approx([math.cos(math.radians(10))] * 2, abs=1e-6)
    assert sum(path.explained) == pytest.approx(1.0)  # the plane holds them all, so that angles can be seen in it
    assert path.path[-1].norm() == pytest.approx(
        float(sum(turned(10 * t + 3).double() for t in (1, 2, 3)).norm()) / 3, abs=1e-6
    )
    assert found.shared_subspace().explained[2:].abs().max() < 1e-9
    # The two span the same plane, whatever the rotation in it.
    assert found.principal_angles("iteration 1", "iteration 3").degrees.tolist() == pytest.approx([0, 0], abs=1e-4)


def test_principal_angles_are_planted_ones_and_scipys() -> None:
    basis = axes(6)
    angles = [0.001, 4.0, 30.0]
    first = basis[:3]
    second = torch.stack(
        [math.cos(math.radians(a)) * basis[k] + math.sin(math.radians(a)) * basis[3 + k] for k, a in enumerate(angles)]
    )
    assert principal_angles(first, second).tolist() == pytest.approx(angles, abs=1e-7)
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = direction_similarity({"a": mix @ first, "b": second.float()}).principal_angles("a", "b")
    assert found.degrees[1:].tolist() == pytest.approx(angles[1:], abs=1e-4)
    assert found.overlap == pytest.approx(np.mean(np.cos(np.radians(angles)) ** 2), abs=1e-5)
    loose = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(2)).double()
    theirs = np.degrees(scipy.linalg.subspace_angles(first.T.numpy(), loose.T.numpy()))[::-1]
    ours = direction_similarity({"a": first, "b": loose.float()}).principal_angles("a", "b")
    assert ours.degrees.tolist() == pytest.approx(theirs.tolist(), abs=1e-4)
    inside = (ours.random_low <= ours.degrees) & (ours.degrees <= ours.random_high)
    assert inside.all() and ours.random_overlap == 5 / D_MODEL and len(ours.table()) == 3


# Chance and noise


@pytest.mark.parametrize("size", [2, 3, 32, 576, 8192])
def test_the_random_band_is_exact(size: int) -> None:
    expected = math.sqrt(scipy.special.betaincinv(0.5, (size - 1) / 2, 0.95))
    assert random_cosine(size) == pytest.approx(expected, rel=1e-5)


def test_random_directions_are_inside_the_band_at_the_stated_rate() -> None:
    drawn = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    found = direction_similarity(drawn)
    upper = torch.triu_indices(400, 400, offset=1)
    rate = float((found.cosines[upper[0], upper[1]].abs() < found.random).float().mean())
    assert rate == pytest.approx(0.95, abs=0.005)
    shared = direction_similarity(drawn[:40]).shared_subspace()
    assert (shared.explained - shared.random).abs().max() < 0.01 and shared.explained[0] < shared.random_high[0] * 1.05
    assert shared.participation_ratio == pytest.approx(shared.random_participation_ratio, rel=0.05)
    assert shared.effective_rank == pytest.approx(shared.random_effective_rank, rel=0.05)


def test_the_ceiling_is_what_independent_noisy_fits_give() -> None:
    generator = torch.Generator().manual_seed(0)
    size, truth = 512, vector(0, size=512)
    truth = truth / truth.norm()
    cosines, expected = [], []
    for _ in range(60):
        fits, halves = [], []
        for pairs, noise in ((40, 0.15), (24, 0.25)):
            rows = truth + noise * torch.randn(pairs, size, generator=generator)
            fits.append(rows.mean(0))
            half = pairs // 2
            halves.append(torch.cosine_similarity(rows[:half].mean(0), rows[half:].mean(0), dim=0)[None])
        cosines.append(float(torch.cosine_similarity(*fits, dim=0)))
        expected.append(float(ceiling(*halves)))
    assert 0.4 < np.mean(cosines) < 0.8  # far from where any formula is right
    assert np.mean(expected) == pytest.approx(np.mean(cosines), abs=0.015)
    unknown, half, bad = torch.tensor([torch.nan]), torch.tensor([0.5]), torch.tensor([-0.2])
    assert ceiling(unknown, unknown).isnan() and ceiling(half, bad) == 0
    assert ceiling(half, unknown) == pytest.approx(math.sqrt(2 / 3))
    found = direction_similarity(
        named("a", [turned(0)], split_half=half), named("b", [turned(60)], split_half=half)
    ).between("a", "b")
    assert found.ceiling.item() == pytest.approx(2 / 3) and found.corrected.item() == pytest.approx(0.75)


def test_draws_of_the_stream_have_its_covariance(llama: Any) -> None:
    texts = [prompt for prompt, _ in TEXTS]
    drawn = stream_directions(llama, texts=texts, draws=4000, seed=1)[:, 1].double()
    rows, _ = encode_texts(adapt(llama), texts)
    tokens = torch.cat([slow_stream(llama, row, 1)[1:] for row in rows])
    expected = torch.cov(tokens.T, correction=0)
    assert (torch.cov(drawn.T) - expected).norm() < 0.1 * expected.norm()
    band = direction_similarity({1: vector()}, {1: vector(1)}, model=llama).stream_band
    assert band["resid_post", 1] > random_cosine(D_MODEL)  # a stream is not isotropic
    assert direction_similarity({1: vector()}, model=llama, seed=0).stream_band == band


# p-values


def test_p_values_are_uniform_where_there_is_nothing_and_small_where_something_is() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.randn(24, 24, generator=generator)  # correlated coordinates: the test does not assume otherwise
    differences = torch.randn(16, 400, 24, generator=generator) @ shape
    reference = torch.randn(400, 24, generator=generator)
    found = permutation_p(differences, reference, permutations=199)
    for p in (found.one_sided, found.two_sided):
        for level in (0.05, 0.25, 0.5, 0.75):
            assert float((p <= level).float().mean()) == pytest.approx(level, abs=3.3 * math.sqrt(level / 400))
    assert float((found.cosine.abs() < found.band).float().mean()) == pytest.approx(0.95, abs=0.035)
    planted = permutation_p(differences + 6.0 * reference, reference, permutations=999)
    assert planted.two_sided.median() == pytest.approx(1e-3) and planted.one_sided.median() == pytest.approx(1e-3)
    against = permutation_p(differences - 6.0 * reference, reference, permutations=999)
    assert against.two_sided.median() == pytest.approx(1e-3) and against.one_sided.median() > 0.99


def test_permutations_are_sign_flips_counted_by_hand() -> None:
    differences, reference = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)), vector(4, size=10)
    reference = reference.reshape(2, 5)
    found = permutation_p(differences, reference, permutations=4000, seed=3)
    cosines = []
    for code in range(8):
        signs = torch.tensor([1.0 if code >> k & 1 else -1.0 for k in range(3)])
        mean = (signs[:, None, None] * differences).mean(0)
        cosines.append(torch.cosine_similarity(mean, reference, dim=-1))
    every = torch.stack(cosines)
    assert torch.allclose(found.cosine, every[7], atol=1e-6)
    one = (every >= every[7] - 1e-6).float().mean(0)
    two = (every.abs() >= every[7].abs() - 1e-6).float().mean(0)
    assert torch.allclose(found.one_sided, one, atol=0.03) and torch.allclose(found.two_sided, two, atol=0.03)
    assert holm([0.5, 0.01, 0.5]) == [1.0, 0.03, 1.0]


def test_shuffled_fits_stand_in_for_pairs_and_pairs_come_first() -> None:
    controls = torch.stack([torch.stack([turned(90 + 10 * k)]) for k in range(4)])
    a = named("a", [turned(0)], shuffled=controls)
    result = direction_similarity(a, {"b": {0: turned(20)}}, permutations=50)
    test = result.test("b", "a")  # either order: what can be shuffled is
    assert test.permutations == 4 and test.two_sided.item() == pytest.approx(1 / 5)
    assert result.table()["p_holm"].tolist() == pytest.approx([1 / 5])
    rows = turned(0)[None, None].repeat(12, 1, 1)
    known = direction_similarity(a, {"b": {0: turned(20)}}, permutations=500, differences={"a": rows})
    assert known.test("a", "b").permutations == 500 and known.test("a", "b").one_sided.item() > 0.4  # signs only
    assert "smallest Holm p" in repr(known)


# A run, and the model's own axes


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    model = zoo("llama", request.param)
    config = sims.SIMSConfig(
        iterations=2,
        sampling=sims.SamplingConfig(max_new_tokens=6, responses=3, temperature=2.0),
        evaluation=sims.EvaluationConfig(heldout=0.4, samples=2, controls=2),
        steering=sims.SteeringConfig(layers=(1,)),
        ranking=sims.RankingConfig(audit="off"),
        contrast=sims.ContrastConfig(memory=None),
    )
    prompts = [f"Say {letter}{letter}." for letter in "abcdefghij"]
    out = tmp_path_factory.mktemp("runs") / "run"

    def vowels(_prompt: str, responses: list[str]) -> list[float]:
        return [float(sum(c in "aeiou" for c in r)) + len(r) / 100 for r in responses]

    return sims.improve(model, prompts, ranker=vowels, config=config, out=out, progress=False), model


def test_a_runs_pairs_are_read_again_as_the_loop_read_them(run: tuple[Any, Any], zoo: Any) -> None:
    turns, model = run
    for iteration in (1, 2):
        again = run_differences(model, turns, iteration)
        assert torch.allclose(again.mean(0), turns.iterations[iteration - 1].vectors, atol=1e-4)
        assert len(again) == turns.iterations[iteration - 1].pairs.pairs
    result = direction_similarity(turns, model=model, permutations=99)
    assert set(result.differences) == {"iteration 1", "iteration 2"}
    assert result.test("iteration 1", "iteration 2").permutations == 99
    assert {"p_one_sided", "p_two_sided", "p_holm", "stream"} <= set(result.table().columns)
    both = direction_similarity({"x": turns, "y": {1: vector()}}, model=model, permutations=9, layers=[1])
    assert {name: rows.shape[1] for name, rows in both.differences.items()} == {
        "x, iteration 1": 1,
        "x, iteration 2": 1,
    }
    with pytest.raises(RunError, match="does not give the activations of the run"):
        run_differences(zoo("gemma2", KINDS[0]), turns, 1)
    with pytest.raises(RunError, match="iteration 3 is not one of the finished ones"):
        run_differences(model, turns, 3)


def test_a_runs_held_out_responses_are_the_default(run: tuple[Any, Any]) -> None:
    turns, model = run
    found = vector_norms(model, turns, progress=False)
    samples = [s for s in turns.samples(0) if s.tokens]
    texts = [(turns.prompts[s.prompt], s.tokens) for s in samples]
    assert found.texts == len(samples) and found.scope == "response" and found.names == ("iteration 1", "iteration 2")
    d = found.of("iteration 2")[1]
    axis = turns.iterations[1].vectors[1].double() / turns.iterations[1].vectors[1].double().norm()
    rows = [(adapt(model).encode(prompt), tokens) for prompt, tokens in texts]
    means = [float((slow_stream(model, row, 1)[len(row[0]) :] @ axis).mean()) for row in rows]
    gaps = []
    for prompt in sorted({s.prompt for s in samples}):
        scored = sorted((s.score or 0.0, m) for s, m in zip(samples, means, strict=True) if s.prompt == prompt)
        gaps += [scored[-1][1] - scored[0][1]] if scored[-1][0] > scored[0][0] else []
    assert gaps and d.gap.estimate == pytest.approx(np.mean(gaps), rel=1e-3, abs=1e-4)
    named_run = vector_norms(model, {"mine": turns}, progress=False)
    assert named_run.texts == len(samples) and named_run.names[0] == "mine, iteration 1"


def test_the_models_own_axes_are_those_of_a_plain_computation(llama: Any) -> None:
    texts = [prompt for prompt, _ in TEXTS]
    found = model_axes(llama, tokens=["e", 40], texts=texts, components=2, layers=[2, 0])
    assert list(found)[:4] == ["mean stream", "component 1", "component 2", "unembed 'e'"]
    rows, _ = encode_texts(adapt(llama), texts)
    for layer in (0, 2):
        tokens = torch.cat([slow_stream(llama, row, layer)[1:] for row in rows])
        assert torch.allclose(found["mean stream"].at(layer).double(), tokens.mean(0), atol=1e-3)
        values, vectors = torch.linalg.eigh(torch.cov(tokens.T, correction=0))
        for k in (1, 2):
            axis = found[f"component {k}"].at(layer).double()
            assert axis.norm() == pytest.approx(float(values[-k].sqrt()), rel=1e-3)
            assert abs(float(axis @ vectors[:, -k]) / axis.norm()) == pytest.approx(1.0, abs=1e-4)
            assert float(axis @ tokens.mean(0)) >= 0
    result = direction_similarity({1: vector(), 2: vector(1)}, found)  # usable as it is
    assert len(result.pairs) == 5 and result.between("vectors", "unembed 'e'").layers == (2,)


def test_the_unembedding_direction_raises_its_token(model: Any) -> None:
    adapter = adapt(model)
    token = adapter.encode_response("e")[0]
    direction = unembedding(model, token)
    last = adapter.n_layers - 1

    def lead(shift: float) -> float:
        handle = adapter.point(last, "resid_post").register_forward_hook(lambda _p, _a, out: out + shift * direction)
        try:
            with torch.inference_mode():
                logits = adapter.logits(torch.tensor([[11, 12, 13]]), torch.ones(1, 3).bool(), keep=1)[0, 0]
        finally:
            handle.remove()
        return float(logits[token] - logits.mean())

    assert lead(0.0) < lead(1.0) < lead(5.0)
    # To first order, less what the norm's own scale does, the logit rises along it as fast as along any direction.
    gradient = torch.zeros(D_MODEL)
    norm = model.ln_final
    stream = 5 * vector(9)
    stream = stream - stream.mean()
    with torch.inference_mode():
        for k in range(D_MODEL):
            ends = [
                (norm((stream + step * torch.eye(D_MODEL)[k])[None, None])[0, 0] @ model.W_U.float())
                for step in (-1e-2, 1e-2)
            ]
            leads = [float(end[token] - end.mean()) for end in ends]
            gradient[k] = (leads[1] - leads[0]) / 2e-2
    # The norm's scale takes the part along the stream itself off.
    flat = direction - (direction @ stream) / (stream @ stream) * stream
    assert torch.cosine_similarity(gradient, flat, dim=0) > 0.999


def test_both_kinds_have_the_same_axes(pair: tuple[Any, Any]) -> None:
    hooked, bridge = (model_axes(model, tokens=["e"], texts=["Hello there."], components=1) for model in pair)
    for name in hooked:
        assert torch.allclose(hooked[name].vectors, bridge[name].vectors, rtol=1e-3, atol=1e-3), name


def test_differences_of_pairs_are_best_less_worst(llama: Any) -> None:
    pairs = [("Say a.", " yes", " no"), ("Why?", " so it is", " but")]
    found = pair_differences(llama, pairs)
    adapter = adapt(llama)
    for k, (prompt, *both) in enumerate(pairs):
        rows = [(adapter.encode(prompt), adapter.encode_response(text)) for text in both]
        best, worst = (slow_stream(llama, row, 2)[len(row[0]) :].mean(0) for row in rows)
        assert torch.allclose(found[k, 2].double(), best - worst, atol=1e-3)
    with pytest.raises(PromptError, match="no pairs"):
        pair_differences(llama, [])


def test_similarity_refuses_what_cannot_be_compared(llama: Any, unchecked: None) -> None:
    one = {0: vector()}
    with pytest.raises(PlanError, match="one size"):
        direction_similarity(one, {0: torch.ones(5)})
    with pytest.raises(PlanError, match="is zero at layer 0"):
        direction_similarity({"a": {0: torch.zeros(4)}})
    with pytest.raises(PlanError, match="none of layers"):
        direction_similarity(one, layers=[2])
    with pytest.raises(ConfigError, match="permutations"):
        direction_similarity(one, permutations=-1)
    with pytest.raises(PlanError, match="'b', which is no direction"):
        direction_similarity(one, differences={"b": torch.ones(2, 1, D_MODEL)})
    with pytest.raises(ConfigError, match=r"shape \[pair, 1, 32\]"):
        direction_similarity(one, differences={"vectors": torch.ones(2, 3, D_MODEL)})
    with pytest.raises(PlanError, match="layer 9 is not in"):
        direction_similarity({9: vector()}, model=llama)
    with pytest.raises(FitError, match="are needed"):
        permutation_p(torch.ones(2, 3, 4), torch.ones(2, 4))
    with pytest.raises(ConfigError, match="at least 1"):
        permutation_p(torch.ones(2, 3, 4), torch.ones(3, 4), permutations=0)
    result = direction_similarity(one, {1: vector()})
    assert result.names == ("vectors", "vectors (other)") and result.pairs == ()
    assert "see .across_layers('vectors', 'vectors (other)')" in repr(result)
    assert len(repr(result).splitlines()) == 2 and "&#x27;vectors (other)&#x27;" in result._repr_html_()
    assert result.across_layers("vectors", "vectors (other)").shape == (1, 1)
    with pytest.raises(PlanError, match=r"no two directions share a layer .*across_layers"):
        result.table()
    alone = direction_similarity(one)
    assert "1 direction of 32 values" in repr(alone) and "there is one direction, 'vectors': give other=" in repr(alone)
    plan = plan_of(1)
    fitted = sims.fit(llama, [("Say a.", " b", " c"), ("Say d.", " e", " f")], layers=[1])
    for source in ({"a": plan, "b": one}, {"a": fitted, "b": plan}):
        with pytest.raises(ConfigError, match="permutations=9, but .* give a Run with model=, or differences="):
            direction_similarity(source, permutations=9)
    with pytest.raises(PlanError, match="share none"):
        result.between("vectors", "vectors (other)")
    with pytest.raises(PlanError, match="there is no direction 'x'"):
        result.get("x")
    with pytest.raises(PlanError, match="has labels to shuffle"):
        direction_similarity(one, {0: vector(1)}).test("vectors", "vectors (other)")
    with pytest.raises(PlanError, match="no direction has layer 7"):
        result.at_layer(7)
    with pytest.raises(PlanError, match="no direction has layer 7"):
        result.trajectory(7)
    with pytest.raises(PromptError, match="not 1"):
        model_axes(llama, tokens=["two tokens"])
    with pytest.raises(ConfigError, match=r"tokens must be a list, such as \[' happy'\], got ' happy'"):
        model_axes(llama, tokens=" happy")
    with pytest.raises(PromptError, match="token 9999"):
        model_axes(llama, tokens=[9999])
    with pytest.raises(PromptError, match="principal components"):
        model_axes(llama, texts=["a"], components=500)


def test_inputs_are_left_as_they_were() -> None:
    source = {"a": torch.stack([turned(0), turned(5)]), "b": torch.stack([turned(9), turned(1)])}
    before = {name: rows.clone() for name, rows in source.items()}
    result = direction_similarity(source, layers=[1], differences={"a": torch.ones(3, 2, D_MODEL)})
    assert all(torch.equal(source[name], before[name]) for name in source)
    assert result.differences["a"].shape == (3, 1, D_MODEL) and result.labels == (("a", 1), ("b", 1))
    assert directions_of(source)[0].layers == (0, 1)


# Figures


def test_figures_say_what_was_measured(llama: Any) -> None:
    source = {
        "<b>i</b> 1": named("", torch.stack([turned(0), turned(9)]), split_half=torch.tensor([0.5, 0.6])),
        "iteration 2": named("", torch.stack([turned(20), turned(20)]), split_half=torch.tensor([0.4, 0.6])),
    }
    norms: VectorNorms = vector_norms(llama, source, texts=TEXTS, progress=False)
    result: DirectionSimilarity = direction_similarity(source, model=llama)
    profile = geometry.norm_profile(norms)
    assert list(profile.data[0].y) == pytest.approx([1.0, 1.0])
    assert list(profile.data[-1].y) == [r.first_position for r in norms.residual]
    assert list(geometry.projection_profile(norms).data[0].y) == pytest.approx(
        norms.table()["projection_relative"][:2].tolist()
    )
    heat = geometry.similarity(result)
    assert np.allclose(heat.data[0].z, result.cosines) and "0.34" in heat.layout.title.subtitle.text
    assert np.allclose(geometry.similarity(result, "iteration 2").data[0].z, 1.0)
    assert np.allclose(geometry.similarity(result, layer=1).data[0].z, result.at_layer(1)[1])
    curves = {trace.name: trace for trace in geometry.similarity_profile(result).data}
    name = "&lt;b&gt;i&lt;/b&gt; 1 | iteration 2"
    assert list(curves[name].y) == pytest.approx([math.cos(math.radians(20)), math.cos(math.radians(11))], abs=1e-6)
    assert list(curves[f"ceiling, {name}"].y) == pytest.approx(
        result.between("<b>i</b> 1", "iteration 2").ceiling.tolist()
    )
    path = geometry.trajectory(result, 0).data[0]
    assert len(path.x) == 3 and (path.x[0], path.y[0]) == (0.0, 0.0)
    assert list(geometry.shared_subspace(result).data[0].y) == pytest.approx(
        result.shared_subspace().explained.tolist()
    )
    for figure in (profile, heat, geometry.similarity_profile(result), geometry.trajectory(result, 0)):
        assert "<b>i</b>" not in figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")
        assert figure.layout.template == sims.plots.TEMPLATE
    for shown in (norms, result):
        assert "<b>i</b>" in repr(shown) and "<b>i</b>" not in shown._repr_html_()
    for refused in (lambda: geometry.similarity(result, "iteration 2", layer=0), lambda: geometry.trajectory(result)):
        with pytest.raises(PlanError):
            refused()
    with pytest.raises(PlanError, match="there is one direction"):
        geometry.similarity_profile(direction_similarity({0: vector()}))


def test_a_plan_at_several_sites_is_read_at_each(llama: Any) -> None:
    plan = plan_of(1, coefficient=1.0) + plan_of(2, site="attn_out", coefficient=1.0)
    found = vector_norms(llama, plan, texts=TEXTS, progress=False)
    assert {(r.site, r.layer) for r in found.residual} == {("resid_post", 1), ("attn_out", 2)}
    assert len(geometry.norm_profile(found).data) == 2 * 2 + 2 * 3
