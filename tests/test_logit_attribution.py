"""The stream and the logits of a steered model as sums: exact, on every architecture and kind, with planted parts."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from common import KINDS, plan_of, vector

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.analysis.circuits import component_effects
from sims_lens.analysis.logit_attribution import (
    Component,
    LogitAttribution,
    logit_attribution,
    residual_components,
)
from sims_lens.errors import ConfigError, ModelError, PlanError, PromptError
from sims_lens.plan import NOTHING
from sims_lens.plots.ablation import logit_attribution as figure_of
from sims_lens.scope import GENERATION

TEXT = ("The rain", " falls.")


def everywhere() -> sims.SteeringPlan:
    """Every site, two transforms at one of them, and a delta that depends on the stream."""
    plan = plan_of(0, site="resid_pre", seed=1) + plan_of(1, site="attn_out", seed=2) + plan_of(1, site="mlp_out")
    return plan + plan_of(2) + sims.SteeringPlan.of({2: sims.Rotation(vector(9))}, coefficient=0.5)


def final(
    model: Any, text: tuple[str, str], plan: sims.SteeringPlan, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final residual and logits at a position, read in the plain way."""
    adapter = adapt(model)
    prompt = adapter.encode(text[0])
    tokens = torch.tensor([prompt + adapter.encode_response(text[1])])
    seen: list[torch.Tensor] = []
    with sims.steering(model, plan) as steered, torch.no_grad(), steered.prompt(len(prompt)):
        handle = adapter.point(2, "resid_post").register_forward_hook(lambda _p, _a, out: seen.append(out.clone()))
        try:
            logits = model(tokens)
        finally:
            handle.remove()
    return seen[0][0, position].double(), logits[0, position].double()


@pytest.mark.parametrize("by", ["component", "head"])
@pytest.mark.cases(8)
def test_the_parts_add_up_to_the_stream_and_the_logits(model: Any, by: str) -> None:
    plan = everywhere()
    for position in (-1, 4):
        residual, logits = final(model, TEXT, plan, position)
        found = residual_components(model, TEXT, plan, position=position, by=by)
        torch.testing.assert_close(found.parts.sum(0), residual, rtol=1e-5, atol=1e-5 * float(residual.norm()))
        assert found.error < 1e-5
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
        _, plain = final(model, TEXT, NOTHING, position)
        for versus in (101, None):
            a = logit_attribution(model, TEXT, plan, answer=100, versus=versus, position=position, by=by)
            wanted = [float(one[100] - (0.0 if versus is None else one[101])) for one in (logits, plain)]
            assert [a.steered, a.unsteered] == pytest.approx(wanted, abs=1e-4)
            table = a.table()
            assert table["steered"].sum() == pytest.approx(a.steered, abs=1e-4)
            assert table["unsteered"].sum() == pytest.approx(a.unsteered, abs=1e-4)
            assert table["change"].sum() == pytest.approx(a.total, abs=1e-4)
            assert a.direct + a.downstream + a.norm + a.soft_cap == pytest.approx(a.total, abs=1e-4)


def test_the_deltas_are_what_the_plan_adds(model: Any) -> None:
    plan = plan_of(0, site="resid_pre") + plan_of(1, site="attn_out", seed=5) + plan_of(2, seed=7)
    found = residual_components(model, TEXT, plan)
    shown = dict(zip(found.components, found.parts, strict=True))
    for (layer, site), wanted in plan.vectors().items():
        torch.testing.assert_close(shown[Component("steer", layer, site=site)].float(), wanted, rtol=1e-5, atol=1e-5)
    base = dict(zip((b := residual_components(model, TEXT)).components, b.parts, strict=True))
    assert len(shown) == len(base) + 3
    for upstream in (Component("embed"),):
        assert torch.equal(shown[upstream], base[upstream])


def test_the_heads_add_up_to_their_attention(model: Any) -> None:
    plan = plan_of(0, 1)
    whole, split = (residual_components(model, TEXT, plan, by=by) for by in ("component", "head"))
    for layer in range(3):
        (attention,) = (p for c, p in zip(whole.components, whole.parts, strict=True) if c == Component("attn", layer))
        pieces = [
            p
            for c, p in zip(split.components, split.parts, strict=True)
            if c.kind in ("head", "attn_bias") and c.layer == layer
        ]
        assert len(pieces) >= tiny.N_HEADS
        torch.testing.assert_close(torch.stack(pieces).sum(0), attention, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_an_ablated_part_takes_its_share_with_it(zoo: Any, architecture: str) -> None:
    """Independently: without the last MLP, at the same final scale, the linear logit falls by what the row says."""
    model = zoo(architecture, "bridge")
    found = residual_components(model, TEXT)
    a = logit_attribution(model, TEXT, NOTHING, answer=100, versus=101)
    (row,) = (c for c in a.contributions if c.component == Component("mlp", 2))
    mlp = found.parts[found.components.index(Component("mlp", 2))]
    epsilon = 1e-3  # a small piece of it hardly moves the scale; what it moves is subtracted to first order
    with torch.no_grad():
        streams = torch.stack([found.residual, found.residual - epsilon * mlp]).float()[None]
        normed = model.ln_final(streams)
        raw = model.unembed(normed)[0].double()
    linear = (raw[:, 100] - raw[:, 101]).tolist()
    x = found.residual - found.residual.mean() if architecture in ("gpt2", "gpt_neox") else found.residual
    m = mlp - mlp.mean() if architecture in ("gpt2", "gpt_neox") else mlp
    of_scale = float(x @ m) / (x.numel() * found.scale**2)
    bias = math.fsum(c.steered for c in a.contributions if c.component.kind == "bias")
    expected = (linear[0] - linear[1]) / epsilon + (linear[0] - bias) * of_scale
    assert row.steered == pytest.approx(expected, abs=0.05 + 0.02 * abs(expected))


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_agrees_with_transformer_lens(fresh: Any, architecture: str) -> None:
    """TransformerLens on its own terms: folded weights, unsteered."""
    from transformer_lens import HookedTransformer
    from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

    model = fresh(architecture, "hooked")
    folded = HookedTransformer(model.cfg.to_dict() | {"device": "cpu"}, tokenizer=model.tokenizer)
    folded.load_and_process_state_dict(
        {k: v.clone() for k, v in model.state_dict().items()},
        fold_ln=True,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    tokens = torch.tensor([adapt(model).encode(TEXT[0])])
    theirs = direct_logit_attribution(folded, tokens, 100, 101)
    wanted = dict(zip(theirs.labels, theirs.attribution.flatten().tolist(), strict=True))
    for one in (model, folded):
        ours = logit_attribution(one, TEXT[0], NOTHING, answer=100, versus=101)
        rows = {c.component: c.unsteered for c in ours.contributions}
        for layer in range(3):
            assert rows[Component("attn", layer)] == pytest.approx(wanted[f"{layer}_attn_out"], abs=1e-3)
            assert rows[Component("mlp", layer)] == pytest.approx(wanted[f"{layer}_mlp_out"], abs=1e-3)
        assert rows[Component("embed")] == pytest.approx(wanted["embed"], abs=1e-3)


def test_a_delta_at_the_last_block_is_all_there_is(llama: Any) -> None:
    plan = plan_of(2)
    a = logit_attribution(llama, TEXT, plan, answer="a", versus="b")
    assert a.downstream == pytest.approx(0.0, abs=1e-4)
    found = residual_components(llama, TEXT, plan), residual_components(llama, TEXT)
    direction = (llama.W_U[:, a_id(llama, "a")] - llama.W_U[:, a_id(llama, "b")]).double() * llama.ln_final.w.double()
    written = float(plan.vectors()[2, "resid_post"].double() @ direction.detach())
    assert a.direct == pytest.approx(written * (1 / found[0].scale + 1 / found[1].scale) / 2, rel=1e-4)
    assert a.direct + a.norm == pytest.approx(a.total, abs=1e-4)


def test_an_earlier_delta_is_not_direct(llama: Any) -> None:
    """Steered in the prompt only, the response's last token has no delta of its own."""
    plan = plan_of(0, scope="prompt")
    a = logit_attribution(llama, TEXT, plan, answer=100, versus=101)
    assert a.direct == 0.0 and abs(a.downstream) > 0.01
    before = [c for c in a.contributions if c.component in (Component("embed"), Component("attn", 0))]
    assert [c.change for c in before] == pytest.approx([0.0, 0.0], abs=1e-6)
    on_prompt = logit_attribution(llama, TEXT, plan.on(GENERATION), answer=100, versus=101, position=2)
    assert on_prompt.total == pytest.approx(0.0, abs=1e-6)


def test_nothing_changes_nothing(llama: Any) -> None:
    a = logit_attribution(llama, TEXT[0], NOTHING, answer=100)
    assert {c.change for c in a.contributions} == {0.0} and a.versus == ""


def test_a_steered_model_is_refused(llama: Any) -> None:
    with sims.steering(llama, plan_of(1)):
        with pytest.raises(ModelError, match="a plan is attached"):
            residual_components(llama, TEXT[0], plan_of(2))
        with pytest.raises(ModelError, match="a plan is attached"):
            logit_attribution(llama, TEXT[0], plan_of(2), answer=100)


def test_names_are_those_of_component_effects(llama: Any) -> None:
    plan = plan_of(0)
    effects = component_effects(llama, plan, [("So", "a", "b"), ("Why", "c", "d")], exact=1, progress=False).table()
    heads = logit_attribution(llama, TEXT, plan, answer=100, versus=101, by="head").table().set_index("component")
    assert set(effects.index) - set(heads.index) == set()
    joined = effects.join(heads.add_suffix("_written"))
    assert (joined["layer"] == joined["layer_written"]).all() and (joined["kind"] == joined["kind_written"]).all()
    assert (joined["head"].dropna() == joined["head_written"].dropna()).all()


def test_the_embedded_model(embedded: Any) -> None:
    plan = sims.SteeringPlan.addition({20: vector(size=embedded.cfg.d_model)}, coefficient=2.0)
    a = logit_attribution(embedded, "How was the film?", plan, answer="The", versus="I", by="head")
    assert a.residual_error < 1e-5
    assert a.table()["change"].sum() == pytest.approx(a.total, abs=1e-3)
    assert a.table()["steered"].sum() == pytest.approx(a.steered, abs=1e-3)


def a_id(model: Any, text: str) -> int:
    (found,) = adapt(model).encode_response(text)
    return found


@pytest.fixture(scope="module")
def found(zoo: Any) -> LogitAttribution:
    return logit_attribution(zoo("gemma2", "bridge"), TEXT, everywhere(), answer="<", versus="b")


def test_table_and_text(found: LogitAttribution) -> None:
    table = found.table()
    assert list(table.columns) == ["component", "kind", "layer", "head", "steered", "unsteered", "change"]
    assert list(table["component"])[:3] == ["embed", "L0 steer resid_pre", "L0 attn"]
    assert list(table["kind"])[-3:] == ["final_norm", "bias", "soft_cap"]
    text = repr(found)
    for each in (text, found._repr_html_()):
        assert "The change of a row is not steered less unsteered" in each
    shown = [float(line.split()[-1]) for line in text.splitlines()[2:-3] if "more" not in line]
    assert [abs(x) for x in shown[:-1]] == sorted((abs(x) for x in shown[:-1]), reverse=True)
    assert "logit of '<' less that of 'b' at position" in text and "the cap on the logits" in text
    assert "'<'" not in found._repr_html_() and "&lt;" in found._repr_html_()


def test_the_figure(found: LogitAttribution) -> None:
    figure = figure_of(found)
    bars = sum(sum(bar.y) for bar in figure.data if bar.type == "bar")
    assert bars == pytest.approx(found.total, abs=1e-4)
    (line,) = (trace for trace in figure.data if trace.type == "scatter")
    assert line.y[-1] == pytest.approx(found.total, abs=1e-4)
    (steer,) = (bar for bar in figure.data if bar.name == "steering delta")
    assert sum(steer.y) == pytest.approx(found.direct, abs=1e-6)
    assert "'<'" not in figure.layout.title.subtitle.text


@pytest.mark.usefixtures("unchecked")
def test_refusals(llama: Any) -> None:
    def asked(**options: Any) -> Any:
        return logit_attribution(llama, TEXT, plan_of(1), **{"answer": 100, **options})

    with pytest.raises(PromptError, match=r"answer 'ab' is 2 tokens \('a', 'b'\); give one of them"):
        asked(answer="ab")
    with pytest.raises(PromptError, match=r"versus must be a text of one token or an id in 0\.\.258, got 999"):
        asked(versus=999)
    with pytest.raises(ConfigError, match="answer and versus are both 'a'; give another versus"):
        asked(answer="a", versus=a_id(llama, "a"))
    with pytest.raises(PromptError, match=r"position 400 is not in"):
        asked(position=400)
    with pytest.raises(ConfigError, match="by must be 'component' or 'head', got 'layer'"):
        asked(by="layer")
    with pytest.raises(PlanError, match="layer 9"):
        logit_attribution(llama, TEXT, plan_of(9), answer=1)
    with pytest.raises(PromptError, match=r"522 tokens, the context 128: shorten \('a', 'b"):
        logit_attribution(llama, ("a", "b" * 500), plan_of(1), answer=1)


def test_a_model_of_another_kind_is_refused(fresh: Any, tmp_path: Path) -> None:
    """Where the blocks scale what they write, the parts don't add up: said, not shown."""
    model = fresh("llama", "bridge")
    handle = model.blocks[1].register_forward_hook(
        lambda _m, _a, out: (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out
    )
    with pytest.raises(ModelError, match="miss its residual stream by"):
        residual_components(model, TEXT)
    handle.remove()
    assert residual_components(model, TEXT).error < 1e-5
