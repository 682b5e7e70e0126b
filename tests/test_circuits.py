"""A planted circuit is found, exactly; every number agrees with a slow reference; gradients agree with differences."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from circuit import HEAD, HEAD_LAYER, MLP_LAYER, Truth, planted
from common import KINDS, fingerprint, plan_of, random_rows

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.analysis.circuits import (
    ComponentEffects,
    DirectionReaders,
    component_effects,
    direction_readers,
)
from sims_lens.analysis.patching import Component, gradients, margins, record
from sims_lens.behaviour import PairBehaviour, SampledBehaviour, logprob_margin
from sims_lens.errors import ConfigError, ModelError, PlanError, PromptError
from sims_lens.forced import force
from sims_lens.plan import NOTHING
from sims_lens.plots.circuits import attribution_check
from sims_lens.plots.circuits import component_effects as draw
from sims_lens.plots.circuits import direction_readers as draw_readers

PAIRS = (("ab", "yes", "no"), ("ab", "well", "off"), ("what", "a", "bcd"))


@pytest.fixture(scope="module", params=KINDS)
def circuit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Truth]:
    return planted(tmp_path_factory.mktemp("circuit"), request.param)


@pytest.fixture(scope="module")
def effects(circuit: tuple[Any, Truth]) -> ComponentEffects:
    model, truth = circuit
    return component_effects(model, truth.plan(), truth.pairs, progress=False)


@pytest.fixture(scope="module")
def readers(circuit: tuple[Any, Truth]) -> DirectionReaders:
    model, truth = circuit
    return direction_readers(model, truth.plan(), truth.pairs, exact="all", progress=False)


# The planted circuit


def test_finds_the_head_and_the_mlp_and_nothing_else(effects: ComponentEffects) -> None:
    assert effects.effect.low > 1.0
    planted_ones = {f"L{HEAD_LAYER}H{HEAD}", f"L{MLP_LAYER} MLP"}
    for each in effects.components:
        assert each.lost is not None and each.restored is not None
        expected = 1.0 if repr(each.component) in planted_ones else 0.0
        for amount in (each.lost, each.restored):
            assert amount.share.estimate == pytest.approx(expected, abs=0.03), each
            assert amount.nats.estimate == pytest.approx(expected * effects.effect.estimate, abs=0.05)
    assert {repr(each.component) for each in effects.top(2)} == planted_ones
    assert effects.direct.share.estimate == pytest.approx(0.0, abs=0.03)


def test_the_gradient_finds_them_too(circuit: tuple[Any, Truth], effects: ComponentEffects) -> None:
    model, truth = circuit
    fast = component_effects(model, truth.plan(), truth.pairs, exact=2, progress=False)
    patched = [repr(each.component) for each in fast.components if each.lost is not None and each.active]
    assert patched == [f"L{HEAD_LAYER}H{HEAD}", f"L{MLP_LAYER} MLP"]
    for name in patched:
        assert fast.of(name) == effects.of(name)
    assert math.isnan(fast.agreement.estimate) and effects.agreement.estimate > 0.3


def test_the_head_reads_the_direction_and_the_mlp_does_not(readers: DirectionReaders) -> None:
    for each in readers.components:
        assert each.lost is not None and each.restored is None
        expected = 1.0 if repr(each.component) == f"L{HEAD_LAYER}H{HEAD}" else 0.0
        assert each.lost.share.estimate == pytest.approx(expected, abs=0.05), each
    assert repr(readers.top(1)[0].component) == f"L{HEAD_LAYER}H{HEAD}"
    assert abs(readers.direct.share.estimate) < 0.05


def test_the_mlp_reads_what_the_head_writes(circuit: tuple[Any, Truth]) -> None:
    model, truth = circuit
    plan = sims.SteeringPlan.addition({HEAD_LAYER: truth.d1}, coefficient=4.0)
    found = direction_readers(model, plan, truth.pairs, exact=1, progress=False)
    assert [repr(each.component) for each in found.top()] == [f"L{MLP_LAYER} MLP"]
    assert found.top()[0].lost.share.estimate == pytest.approx(1.0, abs=0.05)  # type: ignore[union-attr]
    straight = sims.SteeringPlan.addition({MLP_LAYER: truth.u}, coefficient=4.0)
    both = component_effects(model, straight, truth.pairs, progress=False)
    assert both.direct.share.estimate == pytest.approx(1.0, abs=0.03)
    assert all(abs(each.lost.share.estimate) < 0.03 for each in both.components)  # type: ignore[union-attr]
    straight_readers = direction_readers(model, straight, truth.pairs, exact=1, progress=False)
    assert straight_readers.direct.share.estimate == pytest.approx(1.0, abs=0.03)


def test_the_circuit_is_what_it_says(circuit: tuple[Any, Truth]) -> None:
    model, truth = circuit

    def effect(plan: sims.SteeringPlan, also: sims.SteeringPlan = NOTHING) -> float:
        steered, base = (logprob_margin(model, truth.pairs, each) for each in (plan + also, also))
        return float((steered - base).mean())

    whole = effect(truth.plan())
    assert whole > 1.0
    assert all(abs(effect(truth.plan(layer))) < 0.03 * whole for layer in range(HEAD_LAYER, 4))
    for direction, layers in ((truth.v, [0]), (truth.d1, [1]), (truth.u, [2, 3])):
        for layer in range(4):
            left = effect(truth.plan() + sims.SteeringPlan.of({layer: sims.Ablation(direction)}, scope="all"))
            gone = layer in layers
            assert abs(left / whole - (not gone)) < 0.06, (layer, layers, left / whole)


# Against slow references


@pytest.mark.parametrize(
    ("site", "scope"),
    [("resid_pre", "all"), ("attn_out", "generation"), ("mlp_out", "all"), ("resid_post", "generation")],
)
@pytest.mark.cases(12)
def test_losses_agree_with_hooks_of_transformer_lens(model: Any, site: str, scope: str) -> None:
    """Rows one by one, no cache, no replay, TransformerLens' own hooks."""
    plan = plan_of(1, site=site, scope=scope)
    found = component_effects(model, plan, PAIRS, progress=False)
    steered = _slow(model, plan)
    base = _slow(model, None)
    assert found.effect.estimate == pytest.approx(np.mean(steered.margins - base.margins), abs=2e-5)
    for name in ("L1H2", "L1 MLP", "L2H0", "L2 MLP"):
        each = found.of(name)
        lost = steered.margins - _slow(model, plan, patch=(each.component, base)).margins
        restored = _slow(model, None, patch=(each.component, steered)).margins - base.margins
        assert each.lost is not None and each.restored is not None
        assert each.lost.nats.estimate == pytest.approx(lost.mean(), abs=2e-5), name
        assert each.restored.nats.estimate == pytest.approx(restored.mean(), abs=2e-5), name
        assert each.active == (
            site == "resid_pre"
            or each.component.layer == 2
            or (site, name) == ("attn_out", "L1 MLP")
            and not _parallel(model)
        )
    assert adapt(model).n_layers * 5 - 5 == len(found.components)


def _parallel(model: Any) -> bool:
    return bool(model.cfg.parallel_attn_mlp)


class _Run:
    def __init__(self) -> None:
        self.margins = np.empty(0)
        self.kept: dict[tuple[int, Component], torch.Tensor] = {}


def _slow(model: Any, plan: sims.SteeringPlan | None, *, patch: tuple[Component, _Run] | None = None) -> _Run:
    run, texts = _Run(), [(p, t) for p, *both in PAIRS for t in both]
    adapter = adapt(model)
    scores = []
    for row, (prompt, text) in enumerate(texts):
        ids, answer = adapter.encode(prompt), adapter.encode_response(text)
        tokens = torch.tensor([[*ids, *answer]])
        hooks: list[tuple[str, Any]] = []
        for layer in range(1, adapter.n_layers):
            for name, kind in ((f"blocks.{layer}.attn.hook_z", "head"), (f"blocks.{layer}.hook_mlp_out", "mlp")):

                def hook(value: Any, hook: Any, layer: int = layer, kind: str = kind, row: int = row) -> Any:
                    value = value.clone()
                    for head in range(value.shape[2]) if kind == "head" else (-1,):
                        where = Component(layer, kind, head)
                        part = value[:, :, head] if kind == "head" else value
                        if patch is not None and patch[0] == where:
                            part.copy_(patch[1].kept[row, where])
                        run.kept[row, where] = part.clone()
                    return value

                hooks.append((name, hook))
        # Hooks of TransformerLens that are there before the plan act before it.
        with model.hooks(fwd_hooks=hooks), torch.no_grad():
            if plan is None:
                logits = model(tokens)
            else:
                with sims.steering(model, plan) as attached, attached.prompt(len(ids)):
                    logits = model(tokens)
        log_p = logits[0, len(ids) - 1 : -1].log_softmax(-1)
        scores.append(float(log_p[range(len(answer)), answer].mean()))
    run.margins = np.array(scores[0::2]) - np.array(scores[1::2])
    return run


def test_gradients_agree_with_differences(model: Any) -> None:
    """A component's small change changes the margin by the gradient's share of it."""
    rows = random_rows([(5, 3), (5, 4), (3, 2), (3, 2)])
    plan = plan_of(0, scope="generation", coefficient=0.5)
    for batch in force(model, rows, together=2):
        with sims.steering(model, plan):
            gradient = gradients(batch, 0)
            with torch.no_grad():
                before = record(batch, 0)
                moved = {}
                for component in (Component(1, "head", 3), Component(1, "mlp"), Component(2, "mlp")):
                    step = torch.randn(before.outputs.of(component).shape, generator=torch.Generator().manual_seed(0))

                    def nudge(kind: str, layer: int, output: Any, c: Any = component, step: Any = step) -> Any:
                        if (kind, layer) != (c.kind, c.layer):
                            return None
                        output = output.clone()
                        output[(slice(None), slice(None), c.head) if kind == "head" else ...] += 1e-2 * step
                        return output

                    change = margins(batch, record(batch, 0, change=nudge).logits) - margins(batch, before.logits)
                    predicted = (gradient.of(component) * 1e-2 * step).sum((1, 2))
                    moved[component] = predicted[0::2] + predicted[1::2], change
        for component, (predicted, change) in moved.items():
            torch.testing.assert_close(predicted, change, rtol=0.1, atol=2e-4, msg=str((component, predicted, change)))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("site", ["attn_out", "resid_post"])
@pytest.mark.cases(8)
def test_a_reader_is_one_whose_input_alone_is_changed(model: Any, site: str) -> None:
    plan = plan_of(1, site=site, scope="all")
    found = direction_readers(model, plan, PAIRS, exact="all", progress=False)
    for name, norm in (("L2H1", "ln1"), ("L2 MLP", "ln2"), ("L1 MLP", "ln2")):
        each = found.of(name)
        assert each.lost is not None
        if not each.active:
            assert name == "L1 MLP" and (site == "resid_post" or _parallel(model))
            continue
        assert each.lost.nats.estimate == pytest.approx(_read_slowly(model, plan, each.component, norm), abs=2e-5), name


def _read_slowly(model: Any, plan: sims.SteeringPlan, component: Component, norm: str) -> float:
    """Lost where a component's norm reads without the delta, by hand; for a head, the others' z are put back."""
    adapter, lost = adapt(model), []
    delta = plan.interventions[0].strength * plan.interventions[0].transform.vector  # type: ignore[attr-defined]
    for row, (prompt, text) in enumerate((p, t) for p, *both in PAIRS for t in both):
        ids, answer = adapter.encode(prompt), adapter.encode_response(text)
        tokens, scores = torch.tensor([[*ids, *answer]]), []
        z: dict[str, Any] = {}
        point = f"blocks.{component.layer}.attn.hook_z"

        def keep(value: Any, hook: Any, z: dict[str, Any] = z) -> None:
            z["steered"] = value.clone()

        def put_back(value: Any, hook: Any, z: dict[str, Any] = z) -> Any:
            return torch.where((torch.arange(value.shape[2]) == component.head)[:, None], value, z["steered"])

        for changed in (False, True):
            hooks = [(point, put_back if changed else keep)] if component.kind == "head" else []
            module = getattr(adapter.block(component.layer), norm)
            handle = module.register_forward_pre_hook(lambda _m, args: (args[0] - delta,)) if changed else None
            try:
                with sims.steering(model, plan), model.hooks(fwd_hooks=hooks), torch.no_grad():
                    logits = model(tokens)
            finally:
                if handle is not None:
                    handle.remove()
            log_p = logits[0, len(ids) - 1 : -1].log_softmax(-1)
            scores.append(float(log_p[range(len(answer)), answer].mean()))
        lost.append((scores[0] - scores[1]) * (1 if row % 2 == 0 else -1))
    return sum(lost) / len(PAIRS)


def test_agrees_with_transformer_lens_attribution(llama: Any) -> None:
    """Its node scores, metric by metric, where the corrupt run is the steered one; it knows bridges only."""
    library = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    if adapt(llama).kind != "TransformerBridge":
        pytest.skip("TransformerLens' attribution patching is for bridges")
    plan = plan_of(0, scope="all")
    prompt, positive, negative = PAIRS[0]
    found = component_effects(llama, plan, [PAIRS[0], PAIRS[0]], exact=1, progress=False)
    adapter, total = adapt(llama), {}
    for text, sign in ((positive, 1.0), (negative, -1.0)):
        ids, answer = adapter.encode(prompt), adapter.encode_response(text)
        tokens = torch.tensor([[*ids, *answer[:-1]]])

        def metric(logits: Any, answer: Any = answer, ids: Any = ids, sign: float = sign) -> Any:
            log_p = logits[0, len(ids) - 1 :].log_softmax(-1)
            return sign * log_p[range(len(answer)), answer].mean()

        clean = library.cache_activation_and_gradient(llama, tokens, metric, compute_gradient=False)
        with sims.steering(llama, plan):
            corrupt = library.cache_activation_and_gradient(llama, tokens, metric)
        for node in library.enumerate_nodes(llama, corrupt):
            if node.kind != "embed":
                step = clean.activations[node.hook_name] - corrupt.activations[node.hook_name]
                product = (step * corrupt.gradients[node.hook_name])[0, node.position]
                score = product.sum() if node.head is None else product[node.head].sum()
                where = Component(
                    node.layer, "mlp" if node.head is None else "head", -1 if node.head is None else node.head
                )
                total[where] = total.get(where, 0.0) + float(score)
    for each in found.components:
        assert each.gradient.nats.estimate == pytest.approx(-total[each.component], abs=1e-5)


# Plans, pairs and results


def test_several_sites_and_decays(llama: Any) -> None:
    plan = plan_of(1, 2, scope="generation").decaying(2.0) + plan_of(1, site="attn_out", scope="response")
    found = component_effects(llama, plan, PAIRS, progress=False)
    margin = logprob_margin(llama, PAIRS, plan) - logprob_margin(llama, PAIRS)
    assert found.effect.estimate == pytest.approx(float(margin.mean()), abs=1e-5)
    assert found.sites == ((1, "attn_out"), (1, "resid_post"), (2, "resid_post"))
    assert [repr(each.component) for each in found.components if not each.active] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert all(each.lost.nats.estimate == 0 for each in found.components if not each.active)  # type: ignore[union-attr]
    read = direction_readers(llama, plan, PAIRS, exact=2, progress=False)
    assert len(read.top()) == 2 and read.components[-1].component == Component(2, "mlp")
    ablated = component_effects(llama, plan.restrict([2]).using(sims.Ablation), PAIRS, exact=3, progress=False)
    assert not any(each.active for each in ablated.components)
    assert ablated.direct.nats.estimate == pytest.approx(ablated.effect.estimate, abs=1e-6)


def test_the_last_layer_has_only_the_way_straight_to_the_logits(llama: Any) -> None:
    found = component_effects(llama, plan_of(2), PAIRS, progress=False)
    assert not any(each.active for each in found.components)
    assert found.direct.nats.estimate == pytest.approx(found.effect.estimate, abs=1e-6)
    assert math.isnan(found.agreement.estimate)
    assert "0 of 5 components give something else" in repr(found) and not found.top()


def test_results_do_not_depend_on_how_pairs_are_batched(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = component_effects(llama, plan_of(1), PAIRS, progress=False).table()
    monkeypatch.setattr("sims_lens.analysis.circuits.force", lambda *a, **k: force(*a, **{**k, "batch_tokens": 2}))
    parts = component_effects(llama, plan_of(1), PAIRS, progress=False).table()
    np.testing.assert_allclose(
        whole.filter(regex="^(lost|restored|gradient)$"), parts.filter(regex="^(lost|restored|gradient)$"), atol=1e-5
    )


def test_nothing_is_left_on_the_model_after_an_error(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(llama)

    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("stop")

    for place in ("run_with", "attribute", "differs", "reading_without"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sims_lens.analysis.circuits.{place}", broken)
            analysis = direction_readers if place == "reading_without" else component_effects
            with pytest.raises(RuntimeError, match="stop"):
                analysis(llama, plan_of(1), PAIRS, progress=False)
        assert fingerprint(llama) == before


def test_the_plan_is_left_alone(llama: Any) -> None:
    plan = plan_of(1)
    vector = plan.interventions[0].transform.vector  # type: ignore[attr-defined]
    kept = vector.clone()
    component_effects(llama, plan, PairBehaviour(PAIRS, name="<b>tone</b>"), exact=1, progress=False)
    assert torch.equal(vector, kept)


@pytest.mark.parametrize("exact", [0, -1, 1.5, "some", True])
def test_refuses_a_count_that_is_none(llama: Any, exact: Any, unchecked: None) -> None:
    with pytest.raises(ConfigError, match="exact must be 'all'"):
        component_effects(llama, plan_of(1), PAIRS, exact=exact, progress=False)


def test_refuses_one_pair_and_a_steered_model(llama: Any) -> None:
    for analysis in (component_effects, direction_readers):
        for pairs in (PAIRS[:1], PairBehaviour(PAIRS[:1])):
            with pytest.raises(ConfigError, match="need two or more, got 1; give more"):
                analysis(llama, plan_of(1), pairs, progress=False)
        with sims.steering(llama, plan_of(0)), pytest.raises(ModelError, match="a plan is attached"):
            analysis(llama, plan_of(1), PAIRS, progress=False)


@pytest.mark.parametrize("analysis", [component_effects, direction_readers])
def test_an_effect_that_may_be_zero_has_no_shares(llama: Any, analysis: Any) -> None:
    """Each pair with its opposite: the effects cancel, and their interval holds zero."""
    pairs = [*PAIRS, *((prompt, negative, positive) for prompt, positive, negative in PAIRS)]
    found = analysis(llama, plan_of(1), pairs, exact="all", progress=False)
    assert found.effect.low < 0 < found.effect.high
    assert found.direct.share is None
    assert all(each.gradient.share is None for each in found.components)
    assert any(abs(each.lost.nats.low) > 0 for each in found.components)
    table = found.table()
    assert table.filter(like="_share").isna().all().all() and table["lost"].notna().all()
    assert "%" not in repr(found).replace("[95%]", "") and "there are no shares of it" in repr(found)
    figure = draw(found) if analysis is component_effects else draw_readers(found)
    assert np.isfinite(np.array(figure.data[0].z, dtype=float)).all()  # nats instead
    assert figure.data[0].colorbar.title.text == "nats per<br>token"
    assert "%" not in figure.layout.title.subtitle.text and "%" not in str(figure.data[0].text)


@pytest.mark.parametrize("exact", [4, 5])
def test_few_components_are_not_ranked(llama: Any, exact: int) -> None:
    found = component_effects(llama, plan_of(0), PAIRS, exact=exact, progress=False)
    few = exact < 5
    assert math.isnan(found.agreement.estimate) == few
    assert ("too few components to rank" in repr(found)) == few and "nan" not in repr(found)
    assert ("Spearman" in repr(found)) != few
    subtitle = attribution_check(found).layout.title.subtitle.text
    assert ("too few to rank" in subtitle) == few and "nan" not in subtitle
    one = component_effects(llama, plan_of(0), PAIRS, exact=1, progress=False)
    assert "1 was patched" in repr(one) and attribution_check(one).layout.title.subtitle.text.startswith("1 component:")


def test_refuses_what_has_no_margin(llama: Any, unchecked: None) -> None:
    sampled = SampledBehaviour(lambda _p, responses: [0.0] * len(responses), ["a", "b"])
    for pairs in (sampled, "text"):
        with pytest.raises(ConfigError, match="PairBehaviour"):
            component_effects(llama, plan_of(1), pairs, progress=False)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="pair 0"):
        direction_readers(llama, plan_of(1), [("a", "b", "b")], progress=False)
    with pytest.raises(PlanError, match="no interventions"):
        direction_readers(llama, sims.SteeringPlan(()), PAIRS, progress=False)


def test_refuses_blocks_without_norms_of_their_own(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sims_lens.adapter.Adapter.block", lambda self, layer: torch.nn.Module())
    with pytest.raises(ModelError, match="block 0 of .* has no ln1"):
        direction_readers(llama, plan_of(1), PAIRS, progress=False)


# Tables and figures


def test_the_table_has_every_component_and_the_text_names_the_planted(effects: ComponentEffects, readers: Any) -> None:
    table = effects.table()
    assert len(table) == len(effects.components) == 4 * 5
    row = table.loc[f"L{HEAD_LAYER}H{HEAD}"]
    assert row["lost_low"] <= row["lost"] <= row["lost_high"] and row["lost_share"] == pytest.approx(1, abs=0.03)
    assert table["head"].isna().sum() == 4
    assert f"L{HEAD_LAYER}H{HEAD}" in repr(effects) and "steered at layer 0 resid_post, on 4 pairs" in repr(effects)
    assert "DirectionReaders" in repr(readers) and "restored" not in readers.table()
    with pytest.raises(PlanError, match="'L9H9' is none of the components, L0H0 to L3 MLP"):
        effects.of("L9H9")


def test_html_is_escaped(llama: Any) -> None:
    found = component_effects(llama, plan_of(1), PairBehaviour(PAIRS, name="<b>tone</b>"), exact=3, progress=False)
    assert "<b>" not in found._repr_html_() and "&lt;b&gt;tone" in found._repr_html_()
    assert "<b>" not in draw(found).to_json() and "<b>" not in attribution_check(found).to_json()


def test_the_map_shows_every_value(effects: ComponentEffects) -> None:
    for value in ("lost", "restored", "gradient"):
        for share in (True, False):
            figure = draw(effects, value=value, share=share)
            heads, mlps = figure.data[0], figure.data[1]
            assert np.shape(heads.z) == (4, 4) and np.shape(mlps.z) == (4, 1)
            amount = getattr(effects.of(f"L{HEAD_LAYER}H{HEAD}"), value)
            shown = amount.share if share else amount.nats
            assert heads.z[list(heads.y).index(HEAD_LAYER)][HEAD] == pytest.approx(shown.estimate)
            amount = getattr(effects.of(f"L{MLP_LAYER} MLP"), value)
            shown = amount.share if share else amount.nats
            assert mlps.z[list(mlps.y).index(MLP_LAYER)][0] == pytest.approx(shown.estimate)
            assert heads.zmax == -heads.zmin == mlps.zmax
    with pytest.raises(ConfigError, match="value 'found'"):
        draw(effects, value="found")


def test_the_check_shows_the_patched_ones(effects: ComponentEffects, circuit: tuple[Any, Truth]) -> None:
    figure = attribution_check(effects)
    drawn = sum(len(trace.x) for trace in figure.data if trace.mode == "markers")
    assert drawn == sum(each.active and each.lost is not None for each in effects.components)
    assert f"{effects.agreement.estimate:.2f}" in figure.layout.title.subtitle.text


def test_readers_are_drawn_like_components(readers: DirectionReaders) -> None:
    figure = draw_readers(readers)
    assert list(figure.data[0].z[list(figure.data[0].y).index(HEAD_LAYER)])[HEAD] > 0.8
