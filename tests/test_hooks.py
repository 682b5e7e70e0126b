"""Steering: hook points that behave like TransformerLens' own, plans that compose, a model left as it was."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import tiny
import torch
from common import D_MODEL, KINDS, SITES, difference, fingerprint, plan_of, random_tokens, vector
from torch import Tensor

import sims_lens as sims
from sims_lens.activations import capture
from sims_lens.adapter import BridgeAdapter, HookedAdapter, adapt
from sims_lens.errors import ModelError, PlanError
from sims_lens.hooks import attach, resolve, steering
from sims_lens.plan import NOTHING, Intervention, Provenance, SteeringPlan
from sims_lens.prompts import everyday
from sims_lens.scope import ALL
from sims_lens.transforms import Addition

TOKENS = random_tokens()
PRE, DELTA, POST = (f"blocks.1.steer_resid_post.hook_{child}" for child in ("pre", "delta", "post"))


def zeros(value: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(value)


def zeros_in_place(value: Tensor, hook: Any) -> None:
    value.zero_()


# --- hook points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_a_steered_site_gains_three_named_hook_points(model: Any, site: str) -> None:
    before = set(model.hook_dict)
    names = [f"blocks.{layer}.steer_{site}.hook_{child}" for layer in (0, 2) for child in ("pre", "delta", "post")]
    with steering(model, plan_of(0, 2, site=site)) as steered:
        assert set(model.hook_dict) == before | set(names)
        assert list(steered.hook_names) == names
        assert [model.hook_dict[name].name for name in names] == names
        assert "blocks.0" in repr(steered) and "attached" in repr(steered)
    assert "detached" in repr(steered)


@pytest.mark.parametrize("site", SITES)
def test_the_cache_holds_the_vector_where_the_scope_says(model: Any, site: str) -> None:
    plan = plan_of(1, site=site, coefficient=-1.5, scope="response")
    point, name = f"blocks.1.hook_{site}", f"blocks.1.steer_{site}.hook_"
    _, base = model.run_with_cache(TOKENS)
    with steering(model, plan) as steered, steered.prompt(4):
        _, cache = model.run_with_cache(TOKENS)
        _, filtered = model.run_with_cache(TOKENS, names_filter=name + "delta")
    delta = cache[name + "delta"]
    assert torch.equal(delta[:, 4:], (-1.5 * vector(1)).expand(2, 5, D_MODEL))
    assert torch.equal(delta[:, :4], torch.zeros(2, 4, D_MODEL))
    assert torch.equal(cache[name + "pre"], base[point])
    assert torch.equal(cache[name + "post"], base[point] + delta)
    assert torch.equal(cache[point], cache[name + "post"])
    assert torch.equal(filtered[name + "delta"], delta)
    assert not torch.equal(cache["blocks.2.hook_resid_post"], base["blocks.2.hook_resid_post"])


ROUTES: dict[str, Callable[..., Tensor]] = {}


def route(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    ROUTES[call.__name__] = call
    return call


@route
def run_with_hooks(model: Any, hook: Callable[..., Any]) -> Tensor:
    return model.run_with_hooks(TOKENS, fwd_hooks=[(DELTA, hook)])


@route
def hooks(model: Any, hook: Callable[..., Any]) -> Tensor:
    with model.hooks(fwd_hooks=[(DELTA, hook)]):
        return model(TOKENS)


@route
def hooks_by_a_filter(model: Any, hook: Callable[..., Any]) -> Tensor:
    with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_delta"), hook)]):
        return model(TOKENS)


@route
def run_with_cache_in_hooks(model: Any, hook: Callable[..., Any]) -> Tensor:
    with model.hooks(fwd_hooks=[(DELTA, hook)]):
        logits, _ = model.run_with_cache(TOKENS)
    return logits


@route
def add_hook(model: Any, hook: Callable[..., Any]) -> Tensor:
    model.add_hook(DELTA, hook)
    try:
        return model(TOKENS)
    finally:
        model.reset_hooks()


@route
def add_hook_to_the_point(model: Any, hook: Callable[..., Any]) -> Tensor:
    model.hook_dict[DELTA].add_hook(hook)
    try:
        return model(TOKENS)
    finally:
        model.hook_dict[DELTA].remove_hooks()


@pytest.mark.parametrize("way", ROUTES)
def test_an_ablated_delta_is_bitwise_the_unsteered_model_by_every_route(model: Any, way: str) -> None:
    base = model(TOKENS)
    with steering(model, plan_of(1)):
        steered = model(TOKENS)
        assert difference(steered, base) > 0.01
        assert torch.equal(ROUTES[way](model, zeros), base)
        assert torch.equal(ROUTES[way](model, zeros_in_place), base)
        assert torch.equal(model(TOKENS), steered)


@pytest.mark.parametrize("way", ROUTES)
def test_a_patched_delta_is_bitwise_another_plan(llama: Any, way: str) -> None:
    with steering(llama, plan_of(1, seed=7)):
        other = llama(TOKENS)
    with steering(llama, plan_of(1)):
        patched = ROUTES[way](llama, lambda value, hook: (2.0 * vector(8)).expand_as(value))
    assert torch.equal(patched, other)


def test_pre_and_post_can_be_patched(model: Any) -> None:
    base = model(TOKENS)
    with steering(model, plan_of(1)):
        moved = model.run_with_hooks(TOKENS, fwd_hooks=[(POST, lambda value, hook: value - 2.0 * vector(1))])
        replaced = model.run_with_hooks(TOKENS, fwd_hooks=[(PRE, zeros)])
        expected = model.run_with_hooks(TOKENS, fwd_hooks=[(POST, lambda v, hook: (2.0 * vector(1)).expand_as(v))])
    assert difference(moved, base) < 1e-4
    assert torch.equal(replaced, expected)


@pytest.mark.parametrize("site", SITES)
def test_a_zero_coefficient_is_bitwise_nothing(model: Any, site: str) -> None:
    base = model(TOKENS)
    with steering(model, plan_of(0, 1, 2, site=site, coefficient=0.0)):
        assert torch.equal(model(TOKENS), base)


def test_the_empty_plan_attaches_nothing(model: Any) -> None:
    before, base = set(model.hook_dict), model(TOKENS)
    with steering(model, NOTHING) as steered:
        assert set(model.hook_dict) == before and steered.hook_names == ()
        assert torch.equal(model(TOKENS), base)


def test_gradients_reach_the_vector_and_the_delta(model: Any) -> None:
    learned = vector(1).requires_grad_()
    plan = SteeringPlan.addition({1: learned}, coefficient=-1.5, scope="response")
    seen = []

    def keep(value: Tensor, hook: Any) -> None:
        value.retain_grad()
        seen.append(value)

    with steering(model, plan) as steered, steered.prompt(4):
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[(DELTA, keep)])
        logits[:, -1, 7].sum().backward()
    (delta,) = seen
    assert learned.grad is not None and delta.grad is not None and learned.grad.abs().max() > 1e-4
    torch.testing.assert_close(learned.grad, -1.5 * delta.grad[:, 4:].sum((0, 1)), atol=1e-5, rtol=1e-4)
    model.zero_grad()

    step = 1e-2 * learned.grad / learned.grad.norm()  # and it is the slope: a step along it goes up as it says
    with torch.no_grad():
        changed = []
        for sign in (1, -1):
            moved = SteeringPlan.addition({1: learned + sign * step}, coefficient=-1.5, scope="response")
            with steering(model, moved) as steered, steered.prompt(4):
                changed.append(model(TOKENS)[:, -1, 7].sum())
    assert float(changed[0] - changed[1]) == pytest.approx(2e-2 * float(learned.grad.norm()), rel=0.05)


def test_stopping_at_a_layer_gives_the_steered_stream(model: Any) -> None:
    with steering(model, plan_of(1)):
        _, cache = model.run_with_cache(TOKENS)
        assert torch.equal(model(TOKENS, stop_at_layer=2), cache[POST])
        _, short = model.run_with_cache(TOKENS, stop_at_layer=2)
    assert torch.equal(short[DELTA], cache[DELTA])


@pytest.mark.parametrize("kind", KINDS)
def test_the_delta_is_computed_in_float32_and_cast_once(fresh: Callable[..., Any], kind: str) -> None:
    model = fresh("llama", kind, dtype=torch.bfloat16)
    base = model(TOKENS)
    with steering(model, plan_of(1, coefficient=1.7)):
        logits, cache = model.run_with_cache(TOKENS)
        assert torch.equal(run_with_hooks(model, zeros), base)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(cache[DELTA][0, 0], (1.7 * vector(1)).bfloat16())


def test_inference_mode(model: Any) -> None:
    with steering(model, plan_of(1)):
        expected = model(TOKENS)
    with torch.inference_mode():
        plan = plan_of(1)
        with steering(model, plan):
            inside = model(TOKENS)
    assert torch.equal(inside, expected)
    with steering(model, plan):  # made in inference mode, used outside of it
        assert torch.equal(model(TOKENS), expected)


def test_the_mode_is_the_models(llama: Any) -> None:
    try:
        llama.train()
        with steering(llama, plan_of(1)):
            module = llama.blocks[1].steer_resid_post
            assert module.training and module.hook_delta.training and llama.training
            llama.eval()
            assert not module.training
            llama.train()
        assert llama.training
    finally:
        llama.eval()
    with steering(llama, plan_of(1)):
        assert not any(module.training for module in llama.modules())


class Doubled:
    """A layout of a hook point's own, as TransformerLens gives one where a model's tensors are shaped otherwise."""

    def convert(self, value: Tensor) -> Tensor:
        return 2 * value

    def revert(self, value: Tensor) -> Tensor:
        return value / 2


def test_a_hook_points_own_layout_is_honoured(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(TOKENS[0].tolist(), [])]
    plain = capture(llama, rows, scope="all").means[0, 1]
    with steering(llama, plan_of(1, coefficient=1.0)):
        expected = llama(TOKENS)
    monkeypatch.setattr(llama.hook_dict["blocks.1.hook_resid_post"], "hook_conversion", Doubled())
    with steering(llama, plan_of(1, coefficient=2.0)):
        assert torch.equal(llama(TOKENS), expected)
    torch.testing.assert_close(capture(llama, rows, scope="all").means[0, 1], 2 * plain)


def test_nothing_that_is_added_is_saved_with_the_model(model: Any) -> None:
    before, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    with steering(model, plan_of(0, 1, 2)):
        assert list(model.state_dict()) == before
        assert [name for name, _ in model.named_parameters()] == parameters


@pytest.mark.parametrize("kind", KINDS)
def test_weights_can_be_loaded_into_a_steered_model(fresh: Callable[..., Any], kind: str) -> None:
    model = fresh("llama", kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with steering(model, plan_of(1)):
        expected = model(TOKENS)
        torch.nn.init.zeros_(next(model.parameters()))
        model.load_state_dict(state)
        assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("site", SITES)
def test_both_kinds_are_steered_alike(pair: tuple[Any, Any], site: str) -> None:
    hooked, bridge = pair
    plan = plan_of(0, 1, 2, site=site, coefficient=1.0, scope="generation")
    logits = []
    for model in pair:
        with steering(model, plan) as steered, steered.prompt(4):
            logits.append(model(TOKENS))
    assert difference(*logits) < 1e-4
    assert difference(logits[0], hooked(TOKENS)) > 0.01


# --- leaving ---------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Not an ``Exception``: like Ctrl-C, it passes every ``except Exception``."""


def raising(value: Tensor, hook: Any) -> None:
    raise Stop


def raising_at(step: int) -> Callable[..., None]:
    calls = iter(range(step))

    def hook(value: Tensor, hook: Any) -> None:
        if next(calls, None) is None:
            raise Stop

    return hook


def leave_normally(model: Any, plan: SteeringPlan) -> None:
    with steering(model, plan) as steered, steered.prompt(3):
        model(TOKENS)


def leave_by_an_exception(model: Any, plan: SteeringPlan) -> None:
    with steering(model, plan):
        model(TOKENS)
        raise Stop


def leave_from_a_hook(model: Any, plan: SteeringPlan) -> None:
    with steering(model, plan):
        model.run_with_hooks(TOKENS, fwd_hooks=[(DELTA, raising)])


def leave_from_a_hook_before_the_site(model: Any, plan: SteeringPlan) -> None:
    with steering(model, plan) as steered, steered.prompt(3):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_resid_post", raising)])


def leave_from_generate(model: Any, plan: SteeringPlan) -> None:
    with steering(model, plan), model.hooks(fwd_hooks=[(DELTA, raising_at(3))]):
        model.generate(TOKENS, max_new_tokens=5, stop_at_eos=False, verbose=False)


def leave_from_an_inner_plan(model: Any, plan: SteeringPlan) -> None:
    with steering(model, plan), steering(model, plan_of(1, 2)):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.steer_resid_post_2.hook_pre", raising)])


def leave_after_detaching(model: Any, plan: SteeringPlan) -> None:
    with steering(model, plan) as steered:
        steered.detach()
        raise Stop


def leave_after_a_full_reset(model: Any, plan: SteeringPlan) -> None:
    with steering(model, plan):
        model.reset_hooks(including_permanent=True)


LEAVING = {name: call for name, call in globals().items() if name.startswith("leave_")}


@pytest.mark.parametrize("how", LEAVING)
def test_leaving_restores_the_model(model: Any, how: str) -> None:
    before, base = fingerprint(model), model(TOKENS)
    try:
        LEAVING[how](model, plan_of(0, 1) + plan_of(1, site="attn_out") + plan_of(2, site="resid_pre"))
        raised = False
    except Stop:
        raised = True
    assert raised is (how not in ("leave_normally", "leave_after_a_full_reset"))
    assert fingerprint(model) == before
    assert torch.equal(model(TOKENS), base)


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_an_attachment_that_fails_midway_leaves_nothing(
    llama: Any, monkeypatch: pytest.MonkeyPatch, fails_at: int, done: bool
) -> None:
    before, base = fingerprint(llama), llama(TOKENS)
    calls = iter(range(fails_at))
    for kind in (HookedAdapter, BridgeAdapter):

        def register(self: Any, *arguments: Any, original: Any = kind.register) -> None:
            last = next(calls, None) is None
            if done or not last:
                original(self, *arguments)
            if last:
                raise Stop

        monkeypatch.setattr(kind, "register", register)
    with pytest.raises(Stop):
        attach(llama, plan_of(0, 1, 2))
    assert fingerprint(llama) == before
    assert torch.equal(llama(TOKENS), base)


@pytest.mark.parametrize("outer", [NOTHING, plan_of(0)], ids=["plain", "steered"])
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(3), r"layer 3 is not in 0\.\.2 of tiny-llama; see model\.cfg\.n_layers"),
        (plan_of(1) + plan_of(99), r"layer 99 is not in 0\.\.2 of tiny-llama"),
        (SteeringPlan.addition({1: torch.ones(31)}), r"blocks\.1.* has 31 entries, tiny-llama has d_model = 32"),
        (plan_of(1, provenance=Provenance(model="tiny-gpt2")), r"for 'tiny-gpt2', the model is 'tiny-llama'.*unbound"),
    ],
    ids=["layer", "second layer", "width", "model"],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_attached(
    llama: Any, plan: SteeringPlan, message: str, outer: SteeringPlan
) -> None:
    with steering(llama, outer):
        before = fingerprint(llama)
        with pytest.raises(PlanError, match=message):
            attach(llama, plan)
        assert fingerprint(llama) == before


def test_a_plan_for_another_model_fits_unbound(llama: Any) -> None:
    plan = plan_of(1, provenance=Provenance(model="tiny-gpt2"))
    with steering(llama, plan.unbound()):
        unbound = llama(TOKENS)
    with steering(llama, plan_of(1, provenance=Provenance(model="tiny-llama"))):
        assert torch.equal(llama(TOKENS), unbound)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_plan_and_what_is_no_model(llama: Any) -> None:
    with pytest.raises(PlanError, match=r"expected a SteeringPlan, got dict; see SteeringPlan\.addition"):
        attach(llama, {1: vector()})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"not Linear; use sims_lens\.load"):
        attach(torch.nn.Linear(2, 2), plan_of(1))
    with pytest.raises(ModelError, match="not LlamaForCausalLM"):
        attach(tiny.model("llama"), plan_of(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_weights_is_refused(fresh: Callable[..., Any], kind: str) -> None:
    model = fresh("llama", kind)
    torch.nn.Module.to(model, "meta")
    with pytest.raises(ModelError, match="tiny-llama is on the meta device"):
        attach(model, plan_of(1))


# --- together with the user's own hooks ------------------------------------------------------------------------------


def test_reset_hooks_keeps_the_steering_and_a_full_reset_drops_it(model: Any) -> None:
    base = model(TOKENS)
    with steering(model, plan_of(1)):
        steered = model(TOKENS)
        model.add_hook(DELTA, zeros)
        assert torch.equal(model(TOKENS), base)
        model.reset_hooks()
        assert torch.equal(model(TOKENS), steered)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(TOKENS), base)
    assert torch.equal(model(TOKENS), base)


def test_hooks_from_before_go_on_and_see_the_unsteered_stream(model: Any) -> None:
    point = "blocks.1.hook_resid_post"
    _, base = model.run_with_cache(TOKENS)
    seen: dict[str, list[Tensor]] = {"before": [], "within": []}
    model.add_hook(point, lambda value, hook: seen["before"].append(value.clone()))
    with steering(model, plan_of(1)):
        model.add_hook(point, lambda value, hook: seen["within"].append(value.clone()))
        steered = model(TOKENS)
    after = model(TOKENS)
    model.reset_hooks()
    assert difference(steered, after) > 0.01
    assert all(torch.equal(value, base[point]) for value in (*seen["before"], seen["within"][1]))
    assert torch.equal(seen["within"][0], base[point] + 2.0 * vector(1))
    assert len(seen["before"]) == len(seen["within"]) == 2


def test_steering_inside_of_the_users_hooks(model: Any) -> None:
    """An additive hook of the user's and a plan give the same as two plans; the order of nesting is free."""
    user = [("blocks.0.hook_resid_post", lambda value, hook: value + 2.0 * vector(5))]
    with model.hooks(fwd_hooks=user), steering(model, plan_of(1)):
        inside = model(TOKENS)
    with steering(model, plan_of(1)), model.hooks(fwd_hooks=user):
        outside = model(TOKENS)
    with steering(model, plan_of(0, seed=5) + plan_of(1)):
        composed = model(TOKENS)
    assert torch.equal(inside, outside)
    assert difference(inside, composed) < 1e-5


def test_the_models_own_generate_is_back_and_so_is_the_users(llama: Any) -> None:
    def generate(*arguments: Any, **options: Any) -> str:
        return "the user's own"

    with steering(llama, plan_of(1)):
        pass
    assert "generate" not in vars(llama)
    vars(llama)["generate"] = generate
    try:
        with steering(llama, plan_of(1)):
            assert llama.generate(TOKENS) == "the user's own"
        assert llama.generate is generate
    finally:
        del vars(llama)["generate"]


# --- composing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (plan_of(1), plan_of(1, seed=3)),
        (plan_of(1), plan_of(0, seed=3)),
        (plan_of(0, 1, scope="response"), plan_of(1, 2, site="mlp_out", scope="prompt")),
        (plan_of(1, scope="response"), plan_of(1, seed=3, scope="last_prompt")),
    ],
    ids=["one site", "two layers", "overlapping", "one site, two scopes"],
)
def test_nested_plans_agree_with_their_sum(model: Any, left: SteeringPlan, right: SteeringPlan) -> None:
    with steering(model, left + right) as steered, steered.prompt(4):
        composed = model(TOKENS)
    with steering(model, left) as outer, outer.prompt(4):
        alone = model(TOKENS)
        with steering(model, right):
            nested = model(TOKENS)
        assert torch.equal(model(TOKENS), alone)
    assert difference(nested, composed) < 1e-4
    assert difference(nested, alone) > 0.01


def test_nested_plans_at_a_site_have_hook_points_of_their_own(model: Any) -> None:
    base = model(TOKENS)
    with steering(model, plan_of(1)), steering(model, plan_of(1, seed=3)) as inner:
        assert inner.hook_names[1] == "blocks.1.steer_resid_post_2.hook_delta"
        _, cache = model.run_with_cache(TOKENS)
        assert torch.equal(cache[DELTA][0, 0], 2.0 * vector(1))
        assert torch.equal(cache["blocks.1.steer_resid_post_2.hook_delta"][0, 0], 2.0 * vector(4))
        assert torch.equal(cache["blocks.1.steer_resid_post_2.hook_pre"], cache[POST])
        ablated = [(DELTA, zeros), ("blocks.1.steer_resid_post_2.hook_delta", zeros)]
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=ablated), base)


@dataclass(frozen=True)
class Rescale:
    """A transform from outside of the package, whose result depends on what acted before it."""

    kind: ClassVar[str] = "rescale"

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def delta(stream: Tensor, tensors: Mapping[str, Tensor], strength: float) -> Tensor:
        return (strength - 1) * stream


@pytest.mark.parametrize("nested", [False, True], ids=["sum", "nested"])
def test_order_is_kept_and_transforms_can_come_from_outside(llama: Any, nested: bool) -> None:
    add = plan_of(1)
    double = SteeringPlan((Intervention(1, "resid_post", Rescale(), 2.0, scope=ALL),))
    _, base = llama.run_with_cache(TOKENS)
    stream = base["blocks.1.hook_resid_post"]
    added = 2.0 * vector(1)
    for first, second, expected in ((add, double, 2 * (stream + added)), (double, add, 2 * stream + added)):
        plans = (first, second) if nested else (first + second, NOTHING)
        with steering(llama, plans[0]), steering(llama, plans[1]):
            _, cache = llama.run_with_cache(TOKENS)
        torch.testing.assert_close(cache["blocks.1.hook_resid_post"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_plans_can_be_detached_in_any_order(llama: Any, order: tuple[int, ...]) -> None:
    before, base = fingerprint(llama), llama(TOKENS)
    plans = [plan_of(1), plan_of(1, 2, seed=3), plan_of(0, 1, seed=6, site="mlp_out")]
    attached = [attach(llama, plan) for plan in plans]
    left = set(range(3))
    for index in order:
        attached[index].detach()
        assert not attached[index].attached and attached[index].hook_names == ()
        left -= {index}
        total = sum((plans[i] for i in sorted(left)), NOTHING)
        remaining = llama(TOKENS)
        if left:
            others = {name for i in left for name in attached[i].hook_names}
            assert {name for name in llama.hook_dict if ".steer_" in name} == others
        assert difference(remaining, expected_of(llama, total, attached, left)) < 1e-5
    attached[0].detach()  # a second time does nothing
    assert fingerprint(llama) == before
    assert torch.equal(llama(TOKENS), base)


def expected_of(model: Any, total: SteeringPlan, attached: list[Any], left: set[int]) -> Tensor:
    """Logits of the plans that are left, attached as one plan, with theirs zeroed."""
    ablated = [(name, zeros) for i in left for name in attached[i].hook_names if name.endswith("hook_delta")]
    with steering(model, total):
        return model.run_with_hooks(TOKENS, fwd_hooks=ablated)


def test_a_plan_can_be_used_again_and_within_itself(model: Any) -> None:
    plan = plan_of(1)
    results = []
    for _ in range(2):
        with steering(model, plan):
            results.append(model(TOKENS))
    assert torch.equal(*results)
    with steering(model, plan), steering(model, plan):
        twice = model(TOKENS)
    with steering(model, plan.scaled(2.0)):
        assert difference(model(TOKENS), twice) < 1e-5


def test_two_models_do_not_meet(zoo: Callable[..., Any]) -> None:
    one, other = zoo("llama", KINDS[0]), zoo("qwen2", KINDS[-1])
    base = other(TOKENS)
    with steering(one, plan_of(1, scope="response")) as steered, steered.prompt(3):
        assert torch.equal(other(TOKENS), base)
        expected = one(TOKENS)
        with steering(other, plan_of(1, scope="response")) as second, second.prompt(8):
            other(random_tokens(1, 12))
            assert torch.equal(one(TOKENS), expected)
        assert torch.equal(other(TOKENS), base)


# --- copies ----------------------------------------------------------------------------------------------------------


def can_be_copied(model: Any) -> bool:
    try:
        copy.deepcopy(model)
    except (RuntimeError, TypeError, RecursionError):
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_a_deep_copy_has_steering_of_its_own(fresh: Callable[..., Any], architecture: str, kind: str) -> None:
    model = fresh(architecture, kind)  # a bridge of GPT-2 or NeoX can't be copied any more after a pass with gradients
    assert can_be_copied(model)
    base = model(TOKENS)
    with steering(model, plan_of(1, scope="generation")) as steered:
        expected = model(TOKENS)
        generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(TOKENS), expected)

        twin.add_hook(DELTA, zeros)  # ablated in the copy only, and the other way round
        assert torch.equal(twin(TOKENS), base) and torch.equal(model(TOKENS), expected)
        twin.reset_hooks()
        model.add_hook(DELTA, zeros)
        assert torch.equal(model(TOKENS), base) and torch.equal(twin(TOKENS), expected)
        model.reset_hooks()

        with steered.prompt(2):  # the copy counts its own tokens
            assert torch.equal(twin(TOKENS), expected) and not torch.equal(model(TOKENS), expected)
        again = twin.generate(TOKENS, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
        assert torch.equal(again, generated)
    assert torch.equal(model(TOKENS), base)
    assert torch.equal(twin(TOKENS), expected)
    twin.reset_hooks(including_permanent=True)
    assert torch.equal(twin(TOKENS), base)


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@pytest.mark.cases(12)
def test_units_of_the_residual_norm_are_measured_on_attaching(model: Any, site: str) -> None:
    norms = []
    for prompt in everyday(16):
        tokens = torch.tensor([adapt(model).encode(prompt)])
        _, cache = model.run_with_cache(tokens, names_filter=f"blocks.1.hook_{site}")
        norms.append(cache[f"blocks.1.hook_{site}"][0, 1:].norm(dim=-1))
    median = torch.cat(norms).median()

    plan = SteeringPlan.addition({1: 5 * vector(1)}, coefficient=0.3, units="residual_norm", site=site, scope="all")
    with steering(model, plan) as steered:
        _, cache = model.run_with_cache(TOKENS)
        assert steered.plan.interventions[0].residual_norm == pytest.approx(float(median), rel=1e-5)
    delta = cache[f"blocks.1.steer_{site}.hook_delta"][1, 2]
    torch.testing.assert_close(delta, 0.3 * median * vector(1) / vector(1).norm(), rtol=1e-5, atol=1e-6)
    assert plan.interventions[0].residual_norm is None  # the plan itself is as it was
    assert resolve(model, plan).interventions[0].residual_norm == pytest.approx(float(median), rel=1e-5)


def test_known_norms_are_not_measured_again(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sims_lens.hooks.residual_norms", lambda *_, **__: pytest.fail("measured"))
    plan = SteeringPlan.addition({1: vector(1)}, coefficient=0.5, units="residual_norm", residual_norms={1: 8.0})
    assert resolve(llama, plan) is plan
    with steering(llama, plan):
        _, cache = llama.run_with_cache(TOKENS)
    torch.testing.assert_close(cache[DELTA][0, -1].norm(), torch.tensor(4.0))


def test_norms_are_those_of_the_unsteered_model(model: Any) -> None:
    """Nested or summed, the unit is the same: what another plan does doesn't change what a coefficient means."""
    plan = SteeringPlan.addition({2: vector(1)}, coefficient=0.3, units="residual_norm", scope="all")
    expected = resolve(model, plan).interventions[0].residual_norm
    with steering(model, plan_of(0, coefficient=30.0)):
        steered = model(TOKENS)
        assert resolve(model, plan).interventions[0].residual_norm == expected
        assert torch.equal(model(TOKENS), steered)
        with pytest.raises(ZeroDivisionError), steering(model, plan):
            raise ZeroDivisionError
        assert torch.equal(model(TOKENS), steered)


def test_the_users_tensor_and_plan_are_not_written_to(llama: Any) -> None:
    mine = vector(1)
    plan = SteeringPlan.addition({1: mine}, scope="all")
    with steering(llama, plan):
        expected = llama(TOKENS)
        mine.zero_()  # a later write to it
        assert torch.equal(llama(TOKENS), expected)
        llama.run_with_hooks(TOKENS, fwd_hooks=[(DELTA, zeros_in_place)])
        llama.run_with_hooks(TOKENS, fwd_hooks=[(PRE, lambda value, hook: value.mul_(3))])
        llama.blocks[1].steer_resid_post.vector_0.mul_(2)  # to the module's own copy
    transform = plan.interventions[0].transform
    assert isinstance(transform, Addition) and torch.equal(transform.vector, vector(1))
    with steering(llama, plan):
        assert torch.equal(llama(TOKENS), expected)


def test_the_embedded_model_is_steered_in_its_own_units(embedded: Any) -> None:
    """The one real model here: a stronger push moves it further, and an ablated one not at all."""
    text, ablated = "The sea at night", [("blocks.14.steer_resid_post.hook_delta", zeros)]
    direction = {14: vector(1, size=embedded.cfg.d_model)}
    plan = resolve(embedded, SteeringPlan.addition(direction, coefficient=0.05, units="residual_norm", scope="all"))
    norm = plan.interventions[0].residual_norm
    assert norm is not None and 100 < norm < 250  # and not the 25,000 of the first position
    base = embedded(text, prepend_bos=False)
    moved = [0.0]
    for factor in (1.0, 2.0, 4.0):
        with steering(embedded, plan.scaled(factor)):
            moved.append(difference(embedded(text, prepend_bos=False), base))
    assert all(less < more for less, more in pairwise(moved))
    with steering(embedded, plan):
        assert torch.equal(embedded.run_with_hooks(text, prepend_bos=False, fwd_hooks=ablated), base)


def test_another_revision_of_the_model_is_a_warning(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "sims_source", {**llama.sims_source, "revision": "bbb"})
    made = replace(plan_of(1), provenance=Provenance(model=llama.sims_source["model"], revision="aaa"))
    with pytest.warns(UserWarning, match="made on revision aaa of tiny-llama, the model is revision bbb; load"):
        resolve(llama, made)
    for known in (replace(made.provenance, revision="bbb"), replace(made.provenance, revision="")):
        resolve(llama, replace(made, provenance=known))  # warnings are errors


def test_a_vector_of_zeros_can_be_attached(llama: Any) -> None:
    base = llama(TOKENS)
    with steering(llama, sims.SteeringPlan.addition({1: torch.zeros(32)})):
        assert torch.equal(llama(TOKENS), base)


def test_projections_on_uncentred_directions_need_the_same_weights(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo("gpt2", "bridge")
    source = {**model.sims_source, "weight_processing": "folded"}
    direction = vector(0)
    plan = sims.SteeringPlan.of({1: sims.Ablation(direction)}, provenance=adapt(model).provenance)
    monkeypatch.setattr(model, "sims_source", source)
    with pytest.raises(PlanError, match=r"reads projections on a direction that is not centred.*Attach plan\.centred"):
        resolve(model, plan)
    resolve(model, plan.centred())
    resolve(model, plan.using(sims.Addition))  # an addition reads nothing
    resolve(model, plan.unbound())
