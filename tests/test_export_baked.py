"""Plans in the weights: the same logits without hooks, nothing else changed, and refusals that say by how much."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from common import D_MODEL, KINDS, difference, fingerprint, log_probs, plan_of, random_tokens, vector
from transformers import AutoModelForCausalLM, AutoTokenizer

import sims_lens as sims
from sims_lens import SteeringPlan
from sims_lens.errors import ExportError, ModelError, PlanError
from sims_lens.export import ablation_everywhere, bake, folded
from sims_lens.export.check import reference
from sims_lens.hooks import steering
from sims_lens.plan import NOTHING
from sims_lens.transforms import Ablation, Addition, Amplification, Clamp, Gated, Rotation

TOKENS = random_tokens(2, 12)
AXIS = vector(7) / vector(7).norm()

hooked_only = pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")


@pytest.fixture(params=[f"{name}-{kind}" for name in tiny.ARCHITECTURES for kind in KINDS])
def model(request: pytest.FixtureRequest, zoo: Any) -> Iterator[Any]:
    """Every architecture as every kind, to be left as it was."""

    def state() -> dict[str, Any]:
        found = fingerprint(zoo(*request.param.split("-")))
        found["attributes"].pop(
            "_block_alias_cache", None
        )  # TransformerLens makes it anew when another model is loaded
        return found

    before = state()
    yield zoo(*request.param.split("-"))
    assert state() == before


def architecture(model: Any) -> str:
    return str(model.cfg.model_name).removeprefix("tiny-")


def plain(folder: Path) -> Any:
    """The checkpoint as anyone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)  # type: ignore[no-untyped-call]


def steered(model: Any, plan: SteeringPlan) -> torch.Tensor:
    with torch.no_grad(), steering(model, plan):
        return log_probs(model(TOKENS))


def everything(direction: torch.Tensor) -> SteeringPlan:
    """Every affine transform at every place that has weights, two that do not commute at one of them."""
    return (
        SteeringPlan.addition({0: vector(1)}, site="resid_pre", scope="all")
        + SteeringPlan.of({0: Clamp(direction, 2.0)}, site="resid_pre", coefficient=0.7, scope="all")
        + SteeringPlan.addition({1: vector(2)}, site="resid_post", scope="all")
        + SteeringPlan.addition({1: 3 * vector(3)}, site="mlp_out", scope="all")
        + SteeringPlan.of({1: Ablation(direction)}, site="mlp_out", scope="all")
        + SteeringPlan.addition({1: direction}, site="mlp_out", scope="all")
        + SteeringPlan.addition({2: vector(4)}, site="resid_pre", scope="all")
        + SteeringPlan.of({2: Amplification(direction)}, site="attn_out", coefficient=1.5, scope="all")
    )


def test_constants_become_biases(model: Any, tmp_path: Path) -> None:
    plan = plan_of(0, 1) + plan_of(2, site="resid_pre", seed=5) + plan_of(2, site="mlp_out", seed=9)
    reason = {
        "qwen2": "needs a bias, for which Qwen2Config has no setting",
        "qwen3": "needs a bias, for which Qwen3Config has no setting",
        "gemma2": "behind a norm in Gemma2DecoderLayer",
    }.get(architecture(model))
    if reason:
        with pytest.raises(ExportError, match=rf"blocks\.2\.hook_mlp_out and 3 more: {reason}.*differs by up to \d"):
            bake(model, plan, tmp_path / "baked")
        assert not list(tmp_path.iterdir())
        return
    done = bake(model, plan, tmp_path / "baked")
    assert done.path == tmp_path / "baked" and done.error <= 1e-4 and done.tokens > 100
    assert "baked checkpoint at" in repr(done) and list(tmp_path.iterdir()) == [done.path]
    with torch.no_grad():
        logits = plain(done.path)(TOKENS).logits
        assert difference(logits, steered(model, plan)) < 1e-4
        assert difference(logits, model(TOKENS)) > 0.1
    tokenizer: Any = AutoTokenizer
    read, kept = tokenizer.from_pretrained(done.path), tokenizer.from_pretrained(model.sims_source["folder"])
    assert read.init_kwargs.get("add_bos_token") == kept.init_kwargs.get("add_bos_token")
    assert read("a b").input_ids == kept("a b").input_ids and read.chat_template == kept.chat_template


def test_a_llama_gets_its_mlp_bias_and_nothing_else(llama: Any, tmp_path: Path) -> None:
    before = plain(llama.sims_source["folder"])
    after = plain(bake(llama, plan_of(1), tmp_path / "baked").path)
    config = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert config["mlp_bias"] is True and not config["attention_bias"]
    weights, old = after.state_dict(), before.state_dict()
    assert all(torch.equal(weights[name], old[name]) for name in old)
    new = {name: value for name, value in weights.items() if name not in old}
    torch.testing.assert_close(new.pop("model.layers.1.mlp.down_proj.bias"), 2 * vector(1))
    assert len(new) == 8 and all(name.endswith("bias") and not value.any() for name, value in new.items())


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "gpt_neox"])
def test_constants_inside_a_block_become_the_attentions_bias(zoo: Any, name: str, tmp_path: Path) -> None:
    model, plan = zoo(name, "bridge"), plan_of(1, site="attn_out")
    if name == "qwen2":
        with pytest.raises(ExportError, match=r"blocks\.1\.hook_attn_out: needs a bias, for which Qwen2Config"):
            bake(model, plan, tmp_path / "baked")
    else:
        assert bake(model, plan, tmp_path / "baked").error <= 1e-4


def test_orthogonalised_weights_are_the_ablation_everywhere(model: Any, tmp_path: Path) -> None:
    coefficient = 0.4 if architecture(model) in ("gpt_neox", "qwen2") else 1.0
    plan = ablation_everywhere(model, 3 * AXIS, coefficient=coefficient)
    assert len(plan.interventions) == 7 and plan.provenance.model == model.cfg.model_name
    if architecture(model) == "gemma2":
        with pytest.raises(ExportError, match="hook_attn_out and 5 more: behind a norm in Gemma2DecoderLayer"):
            bake(model, plan, tmp_path / "baked")
        return
    done = bake(model, plan, tmp_path / "baked")
    made, source = plain(done.path), plain(model.sims_source["folder"])
    assert done.error <= 1e-4 and difference(made(TOKENS).logits, steered(model, plan)) < 1e-4
    written, before = made.get_input_embeddings().weight @ AXIS, source.get_input_embeddings().weight @ AXIS
    torch.testing.assert_close(written, (1 - coefficient) * before, atol=1e-5, rtol=0)
    assert torch.equal(made.get_output_embeddings().weight, source.get_output_embeddings().weight)  # tied or not
    if coefficient == 1.0:  # and so the stream never has it, at any block
        states = made(TOKENS, output_hidden_states=True).hidden_states[:-1]
        assert max(float((state @ AXIS).abs().max()) for state in states) < 1e-4


def test_every_affine_transform_has_a_place(llama: Any, tmp_path: Path) -> None:
    plan = everything(vector(11))
    done = bake(llama, plan, tmp_path / "baked")
    assert done.error <= 1e-4 and difference(plain(done.path)(TOKENS).logits, steered(llama, plan)) < 1e-4


@hooked_only
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3"])
def test_a_hooked_transformer_is_folded_in_a_copy(zoo: Any, name: str) -> None:
    model = zoo(name, "hooked")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for plan in (everything(vector(11)), ablation_everywhere(model, AXIS)):
        made = folded(model, plan)
        with torch.no_grad():
            assert difference(made(TOKENS), steered(model, plan)) < 1e-4
        assert torch.equal(made.W_U, model.W_U) and all(
            torch.equal(v, before[k]) for k, v in model.state_dict().items()
        )
    torch.testing.assert_close(folded(model, plan_of(1)).blocks[1].mlp.b_out, model.blocks[1].mlp.b_out + 2 * vector(1))


@hooked_only
def test_a_norm_after_the_block_is_in_the_way_of_a_copy_too(zoo: Any) -> None:
    with pytest.raises(ExportError, match=r"a folded copy can't hold.*behind a norm.*differs by up to"):
        folded(zoo("gemma2", "hooked"), plan_of(1))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(1, 2, scope="generation"), r"hook_resid_post and 1 more: acts on 'generation', .*plan\.on\('all'\)"),
        (plan_of(1).decaying(3.0), r"decays over generated tokens, .*plan\.decaying\(None\)"),
        (SteeringPlan.of({1: Ablation(AXIS)}, scope="all"), "ablation of all that blocks before.*ablation_everywhere"),
        (SteeringPlan.of({1: Clamp(AXIS, 2.0)}, scope="all", site="resid_pre"), r"clamp\(value=2\) of all that blocks"),
        (SteeringPlan.of({1: Rotation(AXIS)}, scope="all", site="mlp_out"), "rotation, there only what is affine"),
        (
            SteeringPlan.of({1: Gated(Addition(vector()), AXIS, 0.0)}, scope="all"),
            r"gated\(addition, threshold=0\), there only what is affine",
        ),
        (plan_of(1) + SteeringPlan.of({1: Ablation(AXIS)}, scope="all"), r"hook_resid_post: ablation of all"),
    ],
    ids=["scope", "decay", "ablation", "clamp", "rotation", "gate", "one of two"],
)
def test_what_weights_cannot_hold_is_refused_with_its_cost(
    zoo: Any, plan: SteeringPlan, message: str, tmp_path: Path
) -> None:
    model = zoo("llama", "bridge")
    with pytest.raises(ExportError, match=message) as raised:
        bake(model, plan, tmp_path / "baked")
    measured = re.search(r"differs by up to ([\d.e+-]+) from", str(raised.value))
    assert measured and float(measured[1]) > 0.05 and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_cost_is_the_difference_to_the_plan_that_is_left(zoo: Any, tmp_path: Path) -> None:
    model, plan = zoo("llama", "bridge"), plan_of(1, scope="response")
    with pytest.raises(ExportError) as raised:
        bake(model, plan, tmp_path / "baked")
    native = reference(model, plan)
    assert f"by up to {native.error(model, plan.on('all')):.2g} from" in str(raised.value)
    assert native.error(model, plan) == 0.0 < native.error(model, plan.on("generation"))
    assert native.error(model) != native.error(model, plan.on("all"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_not_its_checkpoint_any_more_is_noticed(fresh: Any, kind: str, tmp_path: Path) -> None:
    model = fresh("llama", kind)
    with torch.no_grad():
        for parameter in model.blocks[2].mlp.parameters():
            parameter.mul_(1.05)
    with pytest.raises(ExportError, match=r"was not made: read back, it differs by up to \d.*more than 0\.001"):
        bake(model, plan_of(1), tmp_path / "baked")
    assert not list(tmp_path.iterdir())
    assert bake(model, plan_of(1), tmp_path / "loose", tolerance=100.0).error > 1e-3


def test_a_run_that_breaks_is_no_match(zoo: Any, tmp_path: Path) -> None:
    model = zoo("llama", "bridge")
    with pytest.raises(ExportError, match="by up to nan"):
        bake(model, plan_of(1, coefficient=3e38), tmp_path / "baked")


def test_other_mistakes_are_named(fresh: Any, tmp_path: Path) -> None:
    model, plan = fresh("llama", "bridge"), plan_of(1)

    def refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
        with pytest.raises(error, match=message):
            call()

    (tmp_path / "there").mkdir()
    refused(ExportError, "there exists; choose another folder", lambda: bake(model, plan, tmp_path / "there"))
    refused(ExportError, "folder .* does not exist; create it", lambda: bake(model, plan, tmp_path / "no" / "baked"))
    refused(ExportError, "the plan steers nothing", lambda: bake(model, NOTHING, tmp_path / "baked"))
    refused(PlanError, r"layer 9 is not in 0\.\.2", lambda: bake(model, plan_of(9), tmp_path / "baked"))
    refused(PlanError, "d_model = 32", lambda: ablate_all(model, torch.ones(D_MODEL + 1), tmp_path / "baked"))
    refused(ModelError, r"bake\(model, plan, folder\)", lambda: folded(model, plan))
    with steering(model, plan):
        refused(ExportError, "another plan is attached", lambda: bake(model, plan, tmp_path / "baked"))
    source = model.sims_source
    model.sims_source = {**source, "folder": str(tmp_path / "gone")}
    refused(ModelError, "gone, the checkpoint .* is gone", lambda: bake(model, plan, tmp_path / "baked"))
    del model.sims_source
    refused(ModelError, "load the model with sims_lens.load", lambda: bake(model, plan, tmp_path / "baked"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def ablate_all(model: Any, direction: torch.Tensor, folder: Path) -> Any:
    return bake(model, ablation_everywhere(model, direction), folder)


@pytest.mark.slow
def test_the_embedded_model_can_be_baked(embedded: Any, tmp_path: Path) -> None:
    direction = vector(3, size=embedded.cfg.d_model)
    plan = SteeringPlan.addition({20: direction}, coefficient=0.2, units="residual_norm", scope="all")
    done = bake(embedded, plan, tmp_path / "baked")
    assert done.error <= 1e-4
    assert sims.load(done.path, kind="bridge").original_model.config.tie_word_embeddings
