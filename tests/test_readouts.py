"""What directions write: planted tokens are read out first, and the model's own logits bear it out."""

import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from common import D_MODEL, KINDS, vector

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.analysis.directions import Directions
from sims_lens.analysis.readouts import RANDOM_DIRECTIONS, Readout, logit_effects, readout
from sims_lens.errors import ConfigError, ModelError, PlanError, PromptError
from sims_lens.plots import TEMPLATE
from sims_lens.plots import readouts as plots

TEXTS = [("Hi", "Well then."), ("Tell me of rain.", "It rains."), ("And?", "No more.")]


def column(model: Any, token: int) -> torch.Tensor:
    """The direction that the unembedding and the final norm's gain turn into this token."""
    with torch.no_grad():
        x = torch.eye(D_MODEL)[None] * math.sqrt(D_MODEL)
        zero = model.unembed(torch.zeros(1, 1, D_MODEL))
        weights = (model.unembed(x) - zero)[0] / math.sqrt(D_MODEL)  # d_model d_vocab
    weights = weights - weights.mean(-1, keepdim=True)
    return weights[:, token].float()


def gain(model: Any) -> torch.Tensor:
    """Of the final norm, by a finite difference along each axis at a stream that is at right angles to it."""
    found = []
    with torch.no_grad():
        for axis in range(D_MODEL):
            x = torch.zeros(1, 1, D_MODEL, dtype=torch.float32)
            x[..., (axis + 1) % D_MODEL], x[..., (axis + 2) % D_MODEL] = 4.0, -4.0
            up, down = x.clone(), x.clone()
            up[..., axis] += 0.5
            down[..., axis] -= 0.5
            found.append((model.ln_final(up) - model.ln_final(down))[0, 0, axis])
    return torch.stack(found)


def last_stream(model: Any, seed: int = 3) -> torch.Tensor:
    tokens = torch.randint(10, 250, (1, 7), generator=torch.Generator().manual_seed(seed))
    name = f"blocks.{tiny.N_LAYERS - 1}.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return cache[name][0, -1].detach()


def tail(model: Any, stream: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.unembed(model.ln_final(stream[None, None]))[0, 0]


def test_a_planted_token_comes_first(model: Any) -> None:
    for token in (40, 97, 200):
        direction = column(model, token) / gain(model)  # what the gain turns into the token's column
        found = readout(model, {0: vector(1), 2: direction}, top=5)
        first = found.reading(2).promoted[0]
        assert first.token_id == token
        flipped = readout(model, {2: -direction}, top=5).reading(2).suppressed[0]
        assert flipped.token_id == token and flipped.z == pytest.approx(-first.z, rel=1e-4)


def test_agrees_with_the_models_own_tail(model: Any) -> None:
    stream = last_stream(model)
    for seed in range(3):
        v = vector(seed)
        centred = stream - (stream.mean() if str(model.cfg.normalization_type).startswith("LN") else 0.0)
        v = v - (v @ centred) / (centred @ centred) * centred  # then the norm's divisor is held to first order
        step = 0.02 * stream.norm() * v / v.norm()
        change = tail(model, stream + step) - tail(model, stream - step)
        change = change - change.mean()
        z = logit_effects(model, v[None])[0]
        assert z.mean() == pytest.approx(0.0, abs=1e-5) and z.std(correction=0) == pytest.approx(1.0, rel=1e-4)
        assert float(torch.corrcoef(torch.stack([change, z]))[0, 1]) > 0.9999
        assert change.topk(5).indices.tolist() == z.topk(5).indices.tolist()


def test_along_the_stream_itself_the_divisor_takes_the_effect_away(llama: Any) -> None:
    stream = last_stream(llama)
    change = tail(llama, 1.01 * stream) - tail(llama, stream)
    assert float(change.abs().max()) < 1e-4 < float(logit_effects(llama, stream[None]).abs().max())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_read_the_same(fresh: Any, architecture: str, kind: str) -> None:
    model = fresh(architecture, kind)
    directions = torch.stack([vector(seed) for seed in range(4)])
    before = logit_effects(model, directions)
    if kind == "hooked":
        model.load_and_process_state_dict(
            model.state_dict(), fold_ln=True, center_writing_weights=False, fold_value_biases=False
        )
    else:
        model.enable_compatibility_mode(disable_warnings=True)
    assert str(model.cfg.normalization_type).endswith("Pre") or kind == "bridge"
    torch.testing.assert_close(logit_effects(model, directions), before, atol=2e-3, rtol=1e-3)


def test_both_kinds_agree(pair: tuple[Any, Any]) -> None:
    directions = torch.stack([vector(seed) for seed in range(4)])
    torch.testing.assert_close(*(logit_effects(model, directions) for model in pair), atol=1e-4, rtol=1e-4)


def test_agrees_with_transformer_lens(zoo: Any) -> None:
    module = pytest.importorskip("transformer_lens.tools.analysis.logit_lens")
    directions = torch.stack([vector(seed) for seed in range(4)])
    for architecture in ("llama", "qwen3", "gpt2"):
        model = zoo(architecture, "bridge")
        both = [module.logit_readout(model, sign * directions).values.float() for sign in (8.0, -8.0)]
        odd = both[0] - both[1]  # theirs has the biases of the norm and the unembedding in it
        ours = logit_effects(model, directions)
        if architecture == "llama":  # which has none
            assert both[0].topk(5).indices.tolist() == ours.topk(5).indices.tolist()
        odd = odd - odd.mean(-1, keepdim=True)
        torch.testing.assert_close(odd / odd.std(-1, keepdim=True, correction=0), ours, atol=1e-3, rtol=1e-3)


def test_what_chance_gives_is_what_random_directions_give(llama: Any) -> None:
    found = readout(llama, {1: vector(5)}, seed=7)
    tops = logit_effects(llama, torch.stack([vector(1000 + k) for k in range(400)])).amax(-1)
    assert found.chance.top_z == pytest.approx(float(tops.quantile(0.95)), rel=0.1)
    assert found.chance.directions == RANDOM_DIRECTIONS
    share = float((tops >= found.reading(1).top_z).float().mean())
    assert found.reading(1).random_share == pytest.approx(share, abs=0.08)
    assert 0.0 < found.chance.cosine < 1.0 and found.chance == readout(llama, {2: vector(6)}, seed=7).chance


def iterations() -> dict[str, Directions]:
    first = torch.stack([vector(1), vector(2)])
    vectors = [first, 3.0 * first, torch.stack([vector(1) + 0.8 * vector(9), -vector(2)])]
    return {
        f"iteration {k}": Directions(f"iteration {k}", (0, 2), v, iteration=k) for k, v in enumerate(vectors, start=1)
    }


def test_drift_is_nothing_where_only_the_length_changes(llama: Any) -> None:
    found = readout(llama, iterations())
    drift = found.drift().set_index(["name", "against", "layer"]).sort_index()
    for against in ("previous iteration", "first iteration"):
        same = drift.loc[("iteration 2", against)]
        assert same["cosine"].tolist() == pytest.approx([1.0, 1.0], abs=1e-5) and same["overlap"].tolist() == [1.0, 1.0]
        assert drift.loc[("iteration 3", against, 2), "cosine"] == pytest.approx(-1.0, abs=1e-5)
        assert drift.loc[("iteration 3", against, 2), "overlap"] == 0.0
    turned = drift.loc[("iteration 3", "first iteration", 0)]
    a, b = logit_effects(llama, torch.stack([vector(1), vector(1) + 0.8 * vector(9)]))
    assert turned["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-5)
    mine, theirs = (set(x.topk(10).indices.tolist()) for x in (a, b))
    assert turned["overlap"] == pytest.approx(len(mine & theirs) / len(mine | theirs)) and turned["overlap"] < 1.0
    assert (drift["chance_cosine"] == found.chance.cosine).all()
    below = drift.loc[("iteration 1", "previous layer", 2)]
    assert below["other"] == "0" and abs(below["cosine"]) < 0.9
    assert "previous iteration" not in set(
        readout(llama, {"a": {0: vector(1)}, "b": {0: vector(2)}}).drift()["against"]
    )


def test_shuffled_fits_are_read_out_beside_the_direction(llama: Any) -> None:
    shuffled = torch.stack([torch.stack([vector(10), vector(11)]), torch.stack([vector(12), torch.zeros(D_MODEL)])])
    directions = Directions("a", (0, 2), torch.stack([vector(1), vector(2)]), shuffled=shuffled)
    expected = [logit_effects(llama, v).max().item() for v in (shuffled[:, 0], shuffled[:1, 1])]
    assert readout(llama, directions).summary()["shuffled_z"].tolist() == pytest.approx(expected, rel=1e-5)
    assert readout(llama, directions, layers=[2]).reading().shuffled_z == pytest.approx(expected[1], rel=1e-5)


def test_at_the_last_layer_steering_bears_the_readout_out(model: Any) -> None:
    found = readout(model, {0: vector(1), 2: vector(2)}, texts=TEXTS, coefficient=0.05, progress=False)
    early, late = (found.reading(layer).measured for layer in (0, 2))
    assert early is not None and late is not None
    assert (
        late.correlation.estimate > 0.6 and late.correlation.low <= late.correlation.estimate <= late.correlation.high
    )
    assert late.correlation.estimate > early.correlation.estimate
    assert set(found.measured_table()["layer"]) == {0, 2}


def test_the_measured_change_is_that_of_a_run_by_hand(llama: Any) -> None:
    adapter = adapt(llama)
    plan = sims.SteeringPlan.addition({1: vector(4)}, coefficient=0.5, units="residual_norm")
    changes = []
    for prompt, response in TEXTS:
        ids = [adapter.encode(prompt), adapter.encode_response(response)]
        tokens = torch.tensor([[*ids[0], *ids[1][:-1]]])
        mask, keep = torch.ones_like(tokens, dtype=torch.bool), len(ids[1])
        with torch.no_grad():
            base = adapter.logits(tokens, mask, keep=keep).log_softmax(-1)
            with sims.steering(llama, plan) as steered, steered.prompt(len(ids[0])):
                changes.append((adapter.logits(tokens, mask, keep=keep).log_softmax(-1) - base)[0].mean(0))
    mean = torch.stack(changes).mean(0)
    measured = readout(llama, {1: vector(4)}, texts=TEXTS, progress=False).reading().measured
    assert measured is not None
    assert [effect.token_id for effect in measured.promoted] == mean.topk(10).indices.tolist()
    z = logit_effects(llama, vector(4)[None])[0]
    expected = float(torch.corrcoef(torch.stack([mean, z]))[0, 1])
    assert measured.correlation.estimate == pytest.approx(expected, abs=1e-4)


def test_the_table_and_what_is_shown(llama: Any) -> None:
    plan = sims.SteeringPlan.addition({0: vector(1), 1: vector(2)})
    found = readout(llama, {"<b>one</b>": plan, "two": {2: vector(3)}}, top=4)
    table = found.table()
    assert list(table.columns) == ["name", "iteration", "layer", "sign", "rank", "token", "token_id", "z"]
    assert len(table) == 3 * 2 * 4
    promoted = table[(table["name"] == "two") & (table["sign"] == "promoted")]
    assert promoted["z"].is_monotonic_decreasing and promoted["rank"].tolist() == [1, 2, 3, 4]
    assert found.tokens(2, "two") == promoted["token"].tolist() == found.tokens()
    assert readout(llama, plan).reading().layer == 0 and readout(llama, plan).steered == (0, 1)
    assert "<b>one" not in found._repr_html_() and "&lt;b&gt;one" in found._repr_html_()
    assert "layer  2" in repr(found) and len(found.summary()) == 3


def hostile(llama: Any) -> Readout:
    found = readout(llama, iterations(), texts=TEXTS, progress=False, top=4)
    bad = tuple(replace(e, token=t) for e, t in zip(found.readings[0].promoted, BAD, strict=True))
    measured = found.readings[0].measured
    assert measured is not None
    changed: dict[str, Any] = {"promoted": bad, "suppressed": bad, "measured": replace(measured, promoted=bad)}
    return replace(found, readings=tuple(replace(r, name=f"{r.name}<img>", **changed) for r in found.readings))


BAD = ("<script>alert(1)</script>", '"><img onerror=alert(1)>', " happy\n", "<a href='javascript:x'>")


def test_tokens_are_text_in_pages_and_figures(llama: Any) -> None:
    found = hostile(llama)
    page = found._repr_html_()
    assert "␣happy⏎" in page and "␣happy⏎" in repr(found)
    figures = [plots.readout(found), plots.readout_layers(found), plots.readout_measured(found)]
    for text in (page, *(str(figure.to_dict()) for figure in figures)):
        assert not any(tag in text for tag in ("<script", "<img", "<a "))


def test_figures(llama: Any) -> None:
    found = readout(llama, iterations(), texts=TEXTS, progress=False)
    reading = found.reading(0, "iteration 3")
    figure = plots.readout(found, layer=0, name="iteration 3")
    assert list(figure.data[0].x[:10]) == [effect.z for effect in reading.promoted]
    assert figure.layout.shapes[0].x1 == found.chance.top_z
    drift = plots.readout_drift(found)
    assert [t.name for t in drift.data] == ["iteration 2", "iteration 2", "iteration 3", "iteration 3"]
    one = plots.readout_drift(readout(llama, iterations(), layers=[2]))
    assert one.layout.xaxis2.title.text == "iteration" and len(one.data) == 4
    by_layer = plots.readout_drift(readout(llama, {0: vector(1), 1: vector(2)}))
    assert by_layer.layout.xaxis2.title.text == "layer"
    assert len(plots.readout_layers(found).data[0].y) == 2
    assert list(plots.readout_measured(found).data[0].x) == [0, 2]
    assert drift.layout.template.layout.font == TEMPLATE.layout.font
    with pytest.raises(PlanError, match="neither"):
        plots.readout_drift(readout(llama, {1: vector(2)}))
    with pytest.raises(PlanError, match="texts="):
        plots.readout_measured(readout(llama, {1: vector(2)}))


def test_inputs_are_left_alone(llama: Any) -> None:
    given = {1: vector(4), 2: vector(5)}
    kept = {layer: v.clone() for layer, v in given.items()}
    readout(llama, given, texts=TEXTS, progress=False)
    assert all(torch.equal(given[layer], v) for layer, v in kept.items())


def test_one_direction_writes_and_a_steered_model_is_refused(llama: Any) -> None:
    v = {1: vector(1)}
    assert repr(readout(llama, v)).startswith("What 1 direction writes into the logits of")
    assert repr(readout(llama, v | {2: vector(2)})).startswith("What 2 directions write into the logits of")
    with sims.steering(llama, sims.SteeringPlan.addition(v)), pytest.raises(ModelError, match="a plan is attached"):
        readout(llama, v)


def test_refusals(llama: Any, unchecked: None) -> None:
    v = {1: vector(1)}
    with pytest.raises(ConfigError, match="top must be"):
        readout(llama, v, top=0)
    with pytest.raises(ConfigError, match="coefficient"):
        readout(llama, v, coefficient=float("nan"))
    with pytest.raises(PlanError, match="layers is empty"):
        readout(llama, v, layers=[])
    with pytest.raises(PlanError, match="no direction at layer 2"):
        readout(llama, v, layers=[2])
    with pytest.raises(PlanError, match="d_model = 32"):
        readout(llama, {1: torch.ones(8)})
    with pytest.raises(PlanError, match="layer 7"):
        readout(llama, {7: vector(1)})
    with pytest.raises(PlanError, match="zero"):
        readout(llama, {1: torch.zeros(D_MODEL)})
    with pytest.raises(PlanError, match="share a name"):
        readout(llama, {"a, b": v, "a": {"b": v, "c": v}})
    with pytest.raises(PromptError, match="not \\(prompt, response\\)"):
        readout(llama, v, texts=["hi"])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="texts must be"):
        readout(llama, v, texts=[])
    found = readout(llama, v)
    with pytest.raises(PlanError, match="no readout of 'x'"):
        found.tokens(1, "x")
    with pytest.raises(PlanError, match="at layer 9"):
        found.tokens(9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_that_the_norm_takes_off_is_refused(zoo: Any, kind: str) -> None:
    with pytest.raises(PlanError, match="no effect on the logits"):
        logit_effects(zoo("gpt2", kind), torch.ones(1, D_MODEL))


def test_a_model_with_more_after_its_last_block_is_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(adapt(llama))
    original = kind.logits
    monkeypatch.setattr(kind, "logits", lambda *args, **kwargs: original(*args, **kwargs).roll(1, -1))
    with pytest.raises(ModelError, match="more to the last block's stream"):
        readout(llama, {1: vector(1)})
