import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from common import random_rows
from torch import Tensor

import sims_lens as sims
from sims_lens import supervised
from sims_lens.activations import capture, capture_tokens
from sims_lens.adapter import adapt
from sims_lens.errors import FitError, PlanError, PromptError
from sims_lens.estimators import HouseholderRotation, MeanDifference, fit_layers, fit_quality, split_half_cosine
from sims_lens.plan import NOTHING
from sims_lens.supervised import aligned, fit_rows
from sims_lens.transforms import HPR, Addition, Transform

PAIRS = [
    ("Say something.", "yes yes", "no"),
    ("Is it so?", "yes, it is", "no, never"),
    ("Again?", "yes!", "no no no"),
    ("Really?", "oh yes", "oh no"),
    ("Why?", "yes because", "no reason"),
]


@pytest.fixture(scope="module")
def fitted(zoo: Any) -> Iterator[sims.SteeringFit]:
    yield sims.fit(zoo("llama", "bridge"), PAIRS)


def test_it_is_the_mean_difference_of_the_responses(llama: Any) -> None:
    adapter = adapt(llama)
    found = sims.fit(llama, PAIRS)
    for layer in range(adapter.n_layers):
        means = []
        for prompt, *texts in PAIRS:
            for text in texts:
                ids, response = adapter.encode(prompt), adapter.encode_response(text)
                _, cache = llama.run_with_cache(torch.tensor([[*ids, *response]]))
                means.append(cache[f"blocks.{layer}.hook_resid_post"][0, len(ids) :].mean(0))
        expected = (torch.stack(means[0::2]) - torch.stack(means[1::2])).mean(0)
        transform = found.transform(layer)
        assert isinstance(transform, Addition)
        torch.testing.assert_close(transform.vector, expected, atol=1e-4, rtol=1e-4)
        norms = torch.cat([torch.stack(means[k::2]) @ transform.direction for k in (0, 1)]).reshape(2, -1).mean(1)
        torch.testing.assert_close(found.positive_projection[layer], norms[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.negative_projection[layer], norms[1], atol=1e-4, rtol=1e-4)


def many(count: int) -> tuple[list[Any], list[Any]]:
    """Pairs that share prompts, whose positive and negative responses are of different tokens."""
    rows = random_rows([(12 + k % 7, 1 + k % 5) for k in range(2 * count)])
    prompts = [prompt for prompt, _ in rows[: count // 3]]
    up = [(prompts[k % len(prompts)], [40 + token % 9 for token in rows[k][1]]) for k in range(count)]
    down = [(prompts[k % len(prompts)], rows[count + k][1]) for k in range(count)]
    return up, down


@pytest.mark.parametrize("count", [2, 3, 4, 41])
def test_what_is_streamed_is_what_all_activations_give(llama: Any, count: int) -> None:
    positive, negative = many(count) if count > 4 else ([row for row in r[:count]] for r in many(9))
    found = fit_rows(llama, positive, negative, seed=3)
    read = capture(llama, [*positive, *negative])
    best, worst = read.means[:count], read.means[count:]
    close = {"atol": 1e-4, "rtol": 1e-4}
    for got, wanted in zip(found.transforms, fit_layers(MeanDifference(), best, worst), strict=True):
        torch.testing.assert_close(got.vector, wanted.vector, **close)
    directions = torch.stack([t.direction for t in found.transforms])
    torch.testing.assert_close(found.positive_projection, (best.mean(0) * directions).sum(-1), **close)
    torch.testing.assert_close(found.negative_projection, (worst.mean(0) * directions).sum(-1), **close)
    torch.testing.assert_close(found.residual_norm, read.median_norm, **close)
    expected = fit_quality(MeanDifference(), best, worst, seed=3)
    assert found.quality.judged == expected.judged == (count if count >= 4 else 0)
    pd.testing.assert_frame_equal(found.quality.table(), expected.table(), rtol=1e-3, atol=1e-4)


def test_of_many_pairs_some_are_kept_to_be_judged(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    positive, negative = many(41)
    whole = fit_rows(llama, positive, negative)
    kept: list[int] = []
    streamed = supervised.capture_moments

    def watched(*args: Any, keep: Any, **options: Any) -> Any:
        kept.extend(keep)
        return streamed(*args, keep=keep, **options)

    monkeypatch.setattr(supervised, "JUDGED_PAIRS", 20)
    monkeypatch.setattr(supervised, "capture_moments", watched)
    monkeypatch.delattr(supervised, "capture")
    some = fit_rows(llama, positive, negative)
    assert len(kept) == len(set(kept)) == some.quality.judged == 20
    assert same_directions(whole, some) and some.quality.split_half == whole.quality.split_half
    assert whole.quality.judged == whole.quality.pairs == some.quality.pairs == some.pairs == 41

    # Each is projected on the direction of all pairs but those of its fold.
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    means = capture(llama, [*positive, *negative]).means
    difference = means[:41] - means[41:]
    wins = []
    for held in order.tensor_split(5):
        others = torch.tensor([k for k in range(41) if k not in held])
        axis = difference[others].mean(0)
        wins.append(((difference[held[:4]] * axis).sum(-1) > 0).double())
    expected = torch.cat(wins).mean(0)
    assert [a.estimate for a in some.quality.accuracy] == pytest.approx(expected.tolist())
    assert "20 pairs drawn at random" in repr(some) and "drawn at random" not in repr(whole)
    assert "(20 of them drawn to be judged)" in repr(some.quality)
    assert some.quality.accuracy[0].high - some.quality.accuracy[0].low > 0.1  # an interval of 20


def same_directions(one: sims.SteeringFit, other: sims.SteeringFit) -> bool:
    return all(torch.equal(a.vector, b.vector) for a, b in zip(one.transforms, other.transforms, strict=True))


def test_the_split_half_cosine_is_the_estimators(llama: Any) -> None:
    positive, negative = many(41)
    means = capture(llama, [*positive, *negative]).means
    found = fit_rows(llama, positive, negative, seed=1).quality.split_half
    rough = split_half_cosine(means[:41], means[41:], seed=8, splits=200)
    assert found == pytest.approx(rough.tolist(), abs=0.1)


def test_a_bar_is_shown_where_it_takes_long(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    few, many_rows = many(4), many(40)
    fit_rows(llama, *few)
    fit_rows(llama, *many_rows, progress=False)
    assert capsys.readouterr().err == ""
    fit_rows(llama, *many_rows)
    assert "reading contrast pairs: 100%" in capsys.readouterr().err


def test_activations_that_are_not_finite_are_refused(llama: Any) -> None:
    positive, negative = many(4)
    with (
        llama.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: value * torch.inf)]),
        pytest.raises(FitError, match="positive activations are NaN or infinite.* layers 1, 2 of the 3 given"),
    ):
        fit_rows(llama, positive, negative)


def test_both_kinds_of_model_agree(pair: tuple[Any, Any]) -> None:
    hooked, bridge = (sims.fit(model, PAIRS, seed=1) for model in pair)
    for a, b in zip(hooked.transforms, bridge.transforms, strict=True):
        torch.testing.assert_close(a.direction, b.direction, atol=2e-3, rtol=2e-3)
    assert hooked.layers == bridge.layers and hooked.read == bridge.read


def test_the_forms_of_a_pair(llama: Any) -> None:
    adapter = adapt(llama)
    triples = sims.fit(llama, PAIRS)
    mappings = sims.fit(llama, [dict(zip(("prompt", "positive", "negative"), p, strict=True)) for p in PAIRS])
    ids = [(adapter.encode(p), adapter.encode_response(a), adapter.encode_response(b)) for p, a, b in PAIRS]
    assert same(triples, mappings) and same(triples, sims.fit(llama, ids))

    whole = sims.fit(llama, [(a, b) for _, a, b in PAIRS])
    assert whole.read.name == "last_prompt"
    last = [torch.tensor([adapter.encode(text)]) for _, a, b in PAIRS for text in (a, b)]
    ends = torch.stack([llama.run_with_cache(t)[1]["blocks.1.hook_resid_post"][0, -1] for t in last])
    torch.testing.assert_close(whole.transform(1).vector, (ends[0::2] - ends[1::2]).mean(0), atol=1e-4, rtol=1e-4)


def same(one: sims.SteeringFit, other: sims.SteeringFit) -> bool:
    return one.table().equals(other.table()) and all(
        torch.equal(a.vector, b.vector) for a, b in zip(one.transforms, other.transforms, strict=True)
    )


def test_read_as_the_model_is_steered_now(llama: Any) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    plan = sims.SteeringPlan.addition({0: vector}, coefficient=5.0, scope="all")
    plain = sims.fit(llama, PAIRS)
    with sims.steering(llama, plan):
        steered = sims.fit(llama, PAIRS)
    torch.testing.assert_close(plain.transform(0).vector, steered.transform(0).vector, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain.transform(2).vector, steered.transform(2).vector, atol=1e-2)


def test_some_layers_and_another_site(llama: Any) -> None:
    every = sims.fit(llama, PAIRS, site="mlp_out", scope="all")
    some = sims.fit(llama, PAIRS, site="mlp_out", scope="all", layers=(2, 0))
    assert some.layers == (2, 0) and every.layers == (0, 1, 2)
    for layer in (0, 2):
        assert torch.equal(some.transform(layer).vector, every.transform(layer).vector)
        assert some.table().loc[layer].equals(every.table().loc[layer])
    assert some.plan(2).interventions[0].site == "mlp_out"
    with pytest.raises(PlanError, match=r"layer 1 was not fitted; mean_difference has layers \[2, 0\]"):
        some.plan(1)


def test_the_plan(llama: Any, fitted: sims.SteeringFit) -> None:
    plan = fitted.plan()
    (one,) = plan.interventions
    assert (one.units, one.coefficient, one.scope.name) == ("residual_norm", 0.2, "generation")
    assert one.residual_norm == pytest.approx(float(fitted.residual_norm[one.layer]))
    assert plan.provenance.source == "fit, mean_difference, 5 pairs" and plan.provenance.n_layers == 3
    norm = next(iter(plan.vectors().values())).norm()
    assert float(norm) == pytest.approx(0.2 * float(fitted.residual_norm[one.layer]), rel=1e-5)
    two = fitted.plan((0, 2), coefficient=-0.1, scope="all", half_life=3.0)
    assert two.layers == (0, 2)
    assert {(i.coefficient, i.scope.name, i.half_life) for i in two.interventions} == {(-0.1, "all", 3.0)}
    with sims.steering(llama, two):
        llama.generate("Hello", max_new_tokens=2, verbose=False)
    with pytest.raises(PlanError, match="layers is empty"):
        fitted.plan(())


def test_of_equally_accurate_layers_the_one_at_three_quarters_of_the_depth(fitted: sims.SteeringFit) -> None:
    accuracy = fitted.table()["accuracy"]
    top = accuracy[accuracy == accuracy.max()].index
    assert fitted.best() == (min(top, key=lambda layer: abs(layer - 1.5)),)
    assert fitted.best(2) == tuple(sorted(fitted.best(2))) and fitted.best()[0] in fitted.best(2)
    assert fitted.best(9) == (0, 1, 2)


def test_the_table_and_the_repr(fitted: sims.SteeringFit) -> None:
    table = fitted.table()
    assert isinstance(table, pd.DataFrame) and list(table.index) == [0, 1, 2] and table.index.name == "layer"
    assert {"accuracy", "auc_low", "effect_size", "split_half", "residual_norm"} <= set(table.columns)
    text = repr(fitted)
    assert "SteeringFit by mean_difference to 5 contrast pairs of" in text and "best layer" in text
    assert "<table" in fitted._repr_html_()


def test_any_estimator_of_a_users(llama: Any) -> None:
    class Second:
        name, reads = "second", "mean"

        def fit(self, positive: Tensor, negative: Tensor) -> Transform:
            return sims.Ablation(positive[1] - negative[1])

    found = sims.fit(llama, PAIRS, estimator=Second())
    plan = found.plan(1)
    assert plan.interventions[0].transform.kind == "ablation"
    assert (plan.interventions[0].coefficient, plan.interventions[0].units) == (1.0, "absolute")
    assert found.plan().layers == (0, 1, 2)  # the best five, of three


def test_hpr_reads_tokens_side_by_side(llama: Any) -> None:
    rows = random_rows([(4, 6), (4, 4), (5, 3), (5, 5), (3, 7), (3, 2), (6, 4), (6, 4)])
    estimator = HouseholderRotation(epochs=1)
    found = fit_rows(llama, rows[0::2], rows[1::2], estimator=estimator, layers=(0, 2))
    tokens = capture_tokens(llama, [*rows[0::2], *rows[1::2]], layers=(0, 2))
    positive, negative = aligned(tokens[:4], tokens[4:])
    assert positive.shape == negative.shape == (4 + 3 + 2 + 4, 2, 32)
    expected = estimator.fit_layers(positive, negative)
    for got, wanted in zip(found.transforms, expected, strict=True):
        assert isinstance(got, HPR) and torch.equal(got.probe, wanted.probe)
    assert found.plan(2).interventions[0].transform.kind == "hpr"
    assert found.estimator == "hpr" and found.pairs == 4
    with sims.steering(llama, found.plan((0, 2))):
        llama.generate("Hello", max_new_tokens=2, verbose=False)


def test_tokens_average_to_the_mean(llama: Any) -> None:
    rows = random_rows([(4, 6), (2, 3), (7, 1)])
    tokens = capture_tokens(llama, rows, batch_rows=2)
    means = capture(llama, rows, batch_rows=2).means
    assert [t.shape for t in tokens] == [(6, 3, 32), (3, 3, 32), (1, 3, 32)]
    torch.testing.assert_close(torch.stack([t.mean(0) for t in tokens]), means, atol=1e-5, rtol=1e-5)
    assert not any(t.is_inference() for t in tokens)
    with pytest.raises(PlanError, match=r"layer 3 is not in 0\.\.2"):
        capture_tokens(llama, rows, layers=(3,))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "two or more .prompt, positive, negative., got 0 of them"),
        ([PAIRS[0]], "got 1 of them"),
        ("text", "got 4 of them|a list of two or more"),
        ([PAIRS[0], ("a",)], "pair 1 is .*; a pair is"),
        ([PAIRS[0], ("a", "b")], "pair 1 has 2 parts, those before it have another number"),
        ([PAIRS[0], ("a", 3, "b")], "pair 1 is "),
        ([PAIRS[0], {"prompt": "a", "positive": "b"}], "pair 1 lacks 'negative'; a mapping has the keys"),
        ([PAIRS[0], ("a", "", "b")], "the positive of pair 1 is empty; leave the pair out"),
        ([PAIRS[0], ("a", [], "b")], "the positive of pair 1 is empty"),
        ([("a", "same", "same")] * 3, "same mean, so there is nothing to fit"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_pairs_that_cannot_be_used(llama: Any, pairs: Any, message: str) -> None:
    with pytest.raises(FitError, match=message) as caught:
        sims.fit(llama, pairs)
    assert "\n" not in str(caught.value)


def test_layers_and_sites_that_are_not_there(llama: Any) -> None:
    with pytest.raises(PlanError, match=r"layer 3 is not in 0\.\.2"):
        sims.fit(llama, PAIRS, layers=(3,))
    with pytest.raises(PlanError, match="layers is empty"):
        sims.fit(llama, PAIRS, layers=())
    with pytest.raises(PlanError, match="nowhere"):
        sims.fit(llama, PAIRS, site="nowhere")
    with pytest.raises(FitError, match="1 positive and 1 negative texts"):
        fit_rows(llama, [([1], [2])], [([1], [3])])


def test_too_few_pairs_to_know_a_best_layer(llama: Any) -> None:
    few = sims.fit(llama, PAIRS[:2])
    assert "best layer" not in repr(few)
    with pytest.raises(FitError, match=r"2 pairs are too few to hold any out.*name layers of \[0, 1, 2\]"):
        few.plan()
    assert few.plan(1).layers == (1,)


def test_special_tokens_in_a_response_stay_text(llama: Any) -> None:
    adapter = adapt(llama)
    ids = adapter.encode_response("a</s>b")
    assert adapter.tokenizer.eos_token_id not in ids and len(ids) == len("a</s>b")
    with pytest.raises(PromptError, match="has no tokens"):
        adapter.encode_response("")


def test_files_of_pairs(tmp_path: Path) -> None:
    keys = ("prompt", "positive", "negative")
    lines = [json.dumps(dict(zip(keys, pair, strict=True)) | {"more": 1}) for pair in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8-sig")
    pd.DataFrame(PAIRS, columns=list(keys)).to_csv(tmp_path / "pairs.csv", index=False)
    assert sims.read_pairs(tmp_path / "pairs.jsonl") == PAIRS == sims.read_pairs(str(tmp_path / "pairs.csv"))
    for name, content, message in (
        ("a.jsonl", '{"prompt": "a", "positive": "b"}', r"line 1: a pair has strings under .*this has \['positive'"),
        ("b.jsonl", '\n{"prompt": "a", "positive": 1, "negative": "c"}', "line 2: a pair has strings"),
        ("c.jsonl", "[1]", "line 1: .*this has list"),
        ("d.jsonl", "{", "is not valid jsonl"),
        ("e.jsonl", "", "has no pairs in it"),
        ("f.txt", "a", r"ends in '.txt'; pairs are read from .jsonl and .csv"),
        ("g.csv", "prompt,positive\na,b\n", "line 2: a pair has strings"),
        ("h.jsonl", "[" * 100_000, "is not valid jsonl"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(FitError, match=message) as caught:
            sims.read_pairs(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    for name in ("latin.jsonl", "missing.jsonl"):
        with pytest.raises(FitError, match="cannot be read as UTF-8 text"):
            sims.read_pairs(tmp_path / name)


def test_a_plan_of_a_fit_steers_towards_the_positive(embedded: Any) -> None:
    asked = sims.everyday(10)
    pairs = [(prompt, "What a wonderful, lovely day!", "What a terrible, awful day.") for prompt in asked[:6]]
    plan = sims.fit(embedded, pairs, layers=(20,)).plan(20)
    unseen = [(prompt, "I am so happy and glad.", "I am so sad and angry.") for prompt in asked[6:]]
    margin = sims.PairBehaviour(unseen).measure
    towards, base, away = (margin(embedded, p) for p in (plan, NOTHING, -plan))
    assert bool((towards > base).all()) and bool((base > away).all())
