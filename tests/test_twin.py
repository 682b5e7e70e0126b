"""The fast road gives what the model itself gives, with every plan and hook; or the log says why it is not taken."""

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from common import KINDS, difference, random_tokens, vector
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.plan import NOTHING, Intervention, SteeringPlan
from sims_lens.scope import TRACKER
from sims_lens.sites import SITES, STEERING
from sims_lens.transforms import Ablation, Addition, Clamp, Rotation
from sims_lens.twin import Prefixes, PromptMemory, Twin, response_logits, road, run_responses, telling, twin_of

SCOPES = ("all", "prompt", "last_prompt", "response", "generation")
PROMPTS = ["Hi", "Tell me of rain.", "A", "What is a long question about?"]
LENGTHS = [5, 9, 1, 5]
"""Of prompts as token ids."""

REPLIES = [(0, 4), (1, 1), (1, 7), (3, 2), (2, 5)]
"""Responses as (prompt, length)."""

NEW = 6


def everywhere(transform: Any = None, *, coefficient: float = 1.0, **options: Any) -> SteeringPlan:
    """One transform at each of the four sites: where one of them were lost, the result would differ."""
    return SteeringPlan(
        tuple(
            Intervention(
                layer=index % 3,
                site=site,
                transform=Addition(0.7 * vector(index)) if transform is None else transform,
                coefficient=coefficient,
                **options,
            )
            for index, site in enumerate(SITES)
        )
    )


PLANS: dict[str, SteeringPlan] = {
    "unsteered": NOTHING,
    **{scope: everywhere(scope=sims.TokenScope.of(scope)) for scope in SCOPES},
    "half-life": everywhere(half_life=1.5),
    "ablation": everywhere(Ablation(vector(7))),
    "clamp": everywhere(Clamp(vector(7), 1.5)),
    "rotation": everywhere(Rotation(vector(7)), coefficient=0.4),
}


def texts() -> tuple[list[list[int]], list[tuple[int, list[int]]]]:
    """Prompts and responses of different lengths, as token ids."""
    prompts = [random_tokens(1, length, seed=i)[0].tolist() for i, length in enumerate(LENGTHS)]
    return prompts, [(of, random_tokens(1, length, seed=50 + i)[0].tolist()) for i, (of, length) in enumerate(REPLIES)]


def gap(found: Tensor, expected: Tensor, replies: Sequence[tuple[int, list[int]]]) -> float:
    """The largest difference of log-probabilities at a token of a response."""
    rows = enumerate(replies)
    return max(difference(found[i, : len(reply)], expected[i, : len(reply)]) for i, (_, reply) in rows)


@torch.no_grad()
def agreement(model: Any) -> float:
    """How far the twin is from the model as it is now, with everything attached; fails where there is no twin."""
    prompts, replies = texts()
    way = road(model)
    assert way.twin is not None, way.reason
    adapter = adapt(model)
    found = run_responses(way.twin, prompts, replies, device=adapter.device, points=way.points, before=telling(model))
    return gap(found, adapter.response_logits(prompts, replies), replies)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """By the model itself."""
    return adapt(model).response_logits(*texts())


def drawn(
    model: Any, prompts: Sequence[str] = PROMPTS, plan: SteeringPlan = NOTHING, n: int = 1, **settings: Any
) -> tuple[dict[str, tuple[int, ...]], str]:
    """Nearly greedy samples, and the road that they came by."""
    config = sims.SamplingConfig(**{"max_new_tokens": NEW, "temperature": 1e-4, "top_k": None} | settings)
    sampler = sims.LocalSampler(model, config)
    samples = list(sampler.sample(prompts, n=n, plan=plan, seed=0))
    assert len(samples) == n * len(prompts)
    return {prompts[s.prompt]: s.tokens for s in samples}, sampler.road


def check_greedy(model: Any, found: dict[str, tuple[int, ...]], plan: SteeringPlan = NOTHING) -> None:
    """Every token is the most probable one after those before it, by one full forward pass without a cache."""
    adapter = adapt(model)
    for prompt, tokens in found.items():
        ids = adapter.encode(prompt)
        with sims.steering(model, plan) as steered, steered.prompt(len(ids)), torch.no_grad():
            after = model(torch.tensor([[*ids, *tokens]]))[0, len(ids) - 1 :]
        for at, token in enumerate(tokens):
            assert after[at, token] >= after[at].max() - 1e-3, (prompt, at)
        if len(tokens) < NEW:
            assert int(after[len(tokens)].argmax()) in adapter.stop_ids


# --- with plans ------------------------------------------------------------------------------------------------------


@pytest.mark.cases(6)
def test_nearly_greedy_samples_are_the_models_own(model: Any) -> None:
    start = tiny.ARCHITECTURES.index(adapt(model).name.removeprefix("tiny-"))
    for name in ("unsteered", SCOPES[start % 5], SCOPES[(start + 2) % 5], "half-life"):  # every scope on some of them
        found, way = drawn(model, plan=PLANS[name])
        assert way == "twin"
        check_greedy(model, found, PLANS[name])
    single = {prompt: drawn(model, [prompt], plan=PLANS["half-life"])[0][prompt] for prompt in PROMPTS}
    assert single == found
    free, _ = drawn(model)
    assert free != found  # or the plans would do nothing
    ids = adapt(model).encode(PROMPTS[1])
    options = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False}
    own = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    assert own[: len(free[PROMPTS[1]])] == list(free[PROMPTS[1]])


@pytest.mark.cases(6)
def test_teacher_forced_logits_are_the_adapters(model: Any) -> None:
    prompts, replies = texts()
    base, before = logits(model), []
    for name, plan in PLANS.items():
        with sims.steering(model, plan), torch.no_grad():
            expected = logits(model)
            found = response_logits(model, prompts, replies)
            one_each = [(of, reply[:1]) for of, reply in replies]
            first = response_logits(model, prompts, one_each)
        assert gap(found, expected, replies) < 1e-4, name
        assert first.shape[1] == 1 and gap(first, expected, one_each) < 1e-4, name
        assert name == "unsteered" or all(gap(expected, other, replies) > 1e-3 for other in [base, *before]), name
        before.append(expected)


def test_nested_plans_act_as_on_the_model(llama: Any) -> None:
    inner, outer = PLANS["clamp"], everywhere(scope=sims.TokenScope.of("all"), half_life=3.0)
    with sims.steering(llama, outer):
        alone = logits(llama)
        with sims.steering(llama, inner):
            assert gap(logits(llama), alone, texts()[1]) > 1e-2
            assert agreement(llama) < 1e-4
        found, way = drawn(llama, plan=inner)
        assert way == "twin"
    check_greedy(llama, found, outer + inner)


@pytest.mark.cases(6)
def test_every_point_that_the_twin_fires_acts_as_on_the_model(model: Any) -> None:
    """Not only what a point shows, but also what an edit of it does."""
    twin = twin_of(model)
    assert isinstance(twin, Twin), twin
    known, idle = dict(model.hook_dict), []
    names = sorted(name for name in twin.fires - set(twin.refused) if name in known)
    names = [name for name in names if not name.startswith(("blocks.0.", "blocks.2."))]
    assert {"blocks.1.hook_in", "blocks.1.hook_out"} <= set(names) or "blocks.1.hook_resid_post" in names
    noise = {size: torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in range(1, 400)}
    prompts, replies = texts()
    two, one = (prompts[:2], replies[:3]), ([prompts[1]], [(0, reply) for of, reply in replies if of == 1])
    adapter = adapt(model)

    def edit(value: Any, hook: Any) -> Any:
        return 0.7 * value + 0.3 * noise[value.shape[-1]] if value.is_floating_point() else value

    with torch.no_grad():
        bases = {len(prompts): adapter.response_logits(prompts, replies) for prompts, replies in (two, one)}
        for name in names:
            prompts, replies = one if name in twin.by_length else two  # there a column is a token of its row
            known[name].add_hook(edit)
            try:
                way = road(model)
                assert way.twin is twin and way.watched and way.reason == ""
                found = run_responses(
                    twin, prompts, replies, device=adapter.device, points=way.points, before=telling(model)
                )
                expected = adapter.response_logits(prompts, replies)
            finally:
                known[name].remove_hooks()
            assert gap(found, expected, replies) < 1e-3, name
            if gap(expected, bases[len(prompts)], replies) < 1e-3:
                idle.append(name)
    unused = ("embed.hook_in", "hook_result", "hook_mlp_in")  # token ids; what the settings leave out
    assert all(name.endswith(unused) or "rotary" in name for name in idle)


# --- with somebody's hooks -------------------------------------------------------------------------------------------


def add_noise(value: Tensor, hook: Any) -> Tensor:
    return value + vector(5, size=value.shape[-1])


def hook_names(kind: str) -> list[str]:
    inside = ["attn.hook_z", "mlp.hook_post"] if kind == "HookedTransformer" else []
    return ["hook_resid_post", "hook_attn_out", "hook_mlp_out", *inside]


@pytest.mark.parametrize("plan", ["unsteered", "generation"])
def test_hooks_act_on_the_fast_road(llama: Any, plan: str) -> None:
    plain, _ = drawn(llama, plan=PLANS[plan])
    for name in hook_names(adapt(llama).kind):
        with llama.hooks(fwd_hooks=[(f"blocks.1.{name}", add_noise)]):
            found, way = drawn(llama, plan=PLANS[plan])
            assert way == "twin" and found != plain, name
            check_greedy(llama, found, PLANS[plan])
    assert drawn(llama, plan=PLANS[plan])[0] == plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_at_the_pattern(zoo: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def weaker(pattern: Tensor, hook: Any) -> Tensor:
        return 0.3 * pattern

    llama = zoo("llama", kind)
    plain, _ = drawn(llama)
    with llama.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", weaker)]):
        with caplog.at_level(logging.WARNING, "sims_lens"):
            found, way = drawn(llama)
        if kind == "hooked":
            assert way == "twin"
        else:
            assert way.startswith("the model itself, because") and "hook_pattern" in way
            assert any("slow road" in r.message and "hook_pattern" in r.getMessage() for r in caplog.records)
        assert found != plain
        check_greedy(llama, found)
    assert drawn(llama) == (plain, "twin")


def one_head_less(value: Tensor, hook: Any) -> Tensor:
    return value.index_fill(2, torch.tensor([1]), 0.0)


def not_the_first_token(pattern: Tensor, hook: Any) -> Tensor:
    pattern[..., 0] = 0.0
    return pattern


def not_itself(scores: Tensor, hook: Any) -> Tensor:
    edited = scores.clone()
    edited[..., -1] = -torch.inf  # at a prompt's first token every key is hidden then
    return edited


def noise_in_place(value: Tensor, hook: Any) -> None:
    value += vector(3, size=value.shape[-1])


def turned_round(value: Tensor, hook: Any) -> Tensor:
    return -value  # the same addition to every key would cancel in the softmax


def turned_in_place(value: Tensor, hook: Any) -> None:
    value *= -1.0  # what is kept for the tokens to come must be as it was


EDITS = {
    "hook_q": add_noise,
    "hook_k": turned_round,
    "hook_v": noise_in_place,
    "hook_rot_q": add_noise,
    "hook_rot_k": turned_in_place,
    "hook_attn_scores": not_itself,
    "hook_pattern": not_the_first_token,
    "hook_z": one_head_less,
    "hook_result": one_head_less,
}


def generated(model: Any, prompts: Sequence[str], new: int = NEW) -> dict[str, tuple[int, ...]]:
    """By the model's own ``generate``, greedily: prompts of one length."""
    ids = [adapt(model).encode(prompt) for prompt in prompts]
    options = {"max_new_tokens": new, "do_sample": False, "stop_at_eos": False, "verbose": False}
    rows = model.generate(torch.tensor(ids), **options)[:, len(ids[0]) :]
    return {prompt: tuple(row.tolist()) for prompt, row in zip(prompts, rows, strict=True)}


def check_generated(found: dict[str, tuple[int, ...]], own: dict[str, tuple[int, ...]]) -> None:
    """The same tokens, up to where a response has ended."""
    assert any(found.values())
    assert found == {prompt: own[prompt][: len(tokens)] for prompt, tokens in found.items()}


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.cases(2)
def test_edits_inside_the_attention_act_as_in_generate(fresh: Any, architecture: str) -> None:
    model = fresh(architecture, "hooked")
    model.set_use_attn_result(True)
    plain, moved = drawn(model, [*PROMPTS, "Ho"])[0], set()
    for name, edit in EDITS.items():
        points = [f"blocks.{layer}.attn.{name}" for layer in (0, 2)]
        if points[0] not in model.hook_dict:
            assert architecture == "gpt2" and "rot" in name
            continue
        with model.hooks(fwd_hooks=[(point, edit) for point in points]):
            found, way = drawn(model, [*PROMPTS, "Ho"])
            assert way == "twin", (name, way)
            for prompt in PROMPTS:  # each by itself
                check_generated({prompt: found[prompt]}, generated(model, [prompt])) if found[prompt] else None
            pair = ["Hi", "Ho"]  # and side by side
            check_generated({prompt: found[prompt] for prompt in pair}, generated(model, pair))
            few, _ = drawn(model, [*PROMPTS, "Ho"], batch_rows=2)  # rows come and go
            assert few == found, name
        moved |= {name} if found != plain else set()
    assert moved == {name for name in EDITS if f"blocks.0.attn.{name}" in model.hook_dict}


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_hooks_inside_the_attention_see_what_generate_shows_them(fresh: Any, architecture: str) -> None:
    """The same HookPoints in the same order, with the same shapes and values, in every pass."""
    model = fresh(architecture, "hooked")
    model.set_use_attn_result(True)
    names = [f"blocks.{layer}.attn.{name}" for layer in (0, 1) for name in EDITS]
    names = [name for name in names if name in model.hook_dict]
    seen: list[tuple[str, Tensor]] = []

    def look(value: Tensor, hook: Any) -> None:
        seen.append((hook.name, value.clone()))

    inner = [name for name in names if name.endswith(("hook_rot_k", "hook_attn_scores", "hook_pattern"))]
    for some in (inner, [name for name in names if name not in inner]):
        for prompts in (["What is a long question about?"], ["Hi", "Ho"]):
            with model.hooks(fwd_hooks=[(name, look) for name in some]):
                seen.clear()
                found, way = drawn(model, prompts)
                assert way == "twin" and all(len(tokens) == NEW for tokens in found.values())
                ours = list(seen)
                seen.clear()
                check_generated(found, generated(model, prompts))
            assert [name for name, _ in ours] == [name for name, _ in seen] and len(ours) >= NEW
            for (name, mine), (_, own) in zip(ours, seen, strict=True):
                assert mine.shape == own.shape and mine.dtype == own.dtype, name
                hidden = own.isinf()
                assert torch.equal(mine.isinf(), hidden), name
                apart, most = (mine - own)[~hidden].abs().max(), own[~hidden].abs().max()
                assert apart <= 1e-5 * max(1.0, float(most)), name


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.slow
def test_edits_inside_the_attention_of_the_embedded_model() -> None:
    model = sims.load("embedded", kind="hooked")
    prompts = sims.everyday(3)
    assert len({len(adapt(model).encode(prompt)) for prompt in prompts}) > 1
    plain, _ = drawn(model, prompts, max_new_tokens=8)
    for name in ("hook_z", "hook_pattern"):
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.{name}", EDITS[name]) for layer in (3, 10)]):
            found, way = drawn(model, prompts, max_new_tokens=8)
            assert way == "twin" and found != plain
            for prompt in prompts:
                check_generated({prompt: found[prompt]}, generated(model, [prompt], 8))


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
def test_hooks_that_would_see_different_rows_take_the_slow_road(zoo: Any) -> None:
    llama = zoo("llama", "hooked")
    hooks = [("blocks.1.attn.hook_pattern", not_the_first_token), ("blocks.1.attn.hook_z", one_head_less)]
    with llama.hooks(fwd_hooks=hooks):
        found, way = drawn(llama, ["Hi", "Ho"])
        assert "hook_pattern" in way and "hook_z" in way and "different rows" in way
        check_generated(found, generated(llama, ["Hi", "Ho"]))
    with llama.hooks(fwd_hooks=[hooks[0], ("blocks.2.attn.hook_attn_scores", not_itself)]):
        found, way = drawn(llama, ["Hi", "Ho"])
        assert way == "twin"
        check_generated(found, generated(llama, ["Hi", "Ho"]))


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
def test_a_plan_beside_a_hook_inside_the_attention(zoo: Any) -> None:
    llama = zoo("llama", "hooked")
    with llama.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", not_the_first_token)]):
        alone, _ = drawn(llama)
        found, way = drawn(llama, plan=PLANS["half-life"])
        assert way == "twin" and found != alone
        check_greedy(llama, found, PLANS["half-life"])


Undo = Callable[[], Any]


def forward_hook(model: Any) -> Undo:
    return model.blocks[1].register_forward_hook(lambda _module, _args, output: output).remove


def pre_hook(model: Any) -> Undo:
    return model.blocks[1].mlp.register_forward_pre_hook(lambda _module, args: None).remove


def backward_hook(model: Any) -> Undo:
    return model.blocks[1].register_full_backward_hook(lambda *_: None).remove


def backward_hook_on_a_point(model: Any) -> Undo:
    point = next(p for name, p in model.hook_dict.items() if name.endswith("hook_resid_post"))
    point.add_hook(lambda value, hook: None, dir="bwd")
    return lambda: point.remove_hooks("bwd")


def global_hook(model: Any) -> Undo:
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def training(model: Any) -> Undo:
    model.train()
    return model.eval


def one_part_in_training(model: Any) -> Undo:
    model.blocks[1].mlp.train()
    return model.blocks[1].mlp.eval


def another_forward(model: Any) -> Undo:
    part = model.blocks[1].mlp
    old = part.forward
    part.__dict__["forward"] = lambda *args, **kwargs: 0.5 * old(*args, **kwargs)
    return lambda: part.__dict__.pop("forward")


def autocast(model: Any) -> Undo:
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("attach", "reason"),
    [
        (forward_hook, "which is no HookPoint"),
        (pre_hook, "which is no HookPoint"),
        (backward_hook, "backward hook"),
        (backward_hook_on_a_point, "backward hook"),
        (global_hook, "all modules of PyTorch"),
        (training, "training mode"),
        (one_part_in_training, "training mode"),
        (another_forward, "forward method of a"),
        (autocast, "autocast"),
    ],
)
def test_what_no_twin_can_honour_takes_the_slow_road(llama: Any, attach: Callable[[Any], Undo], reason: str) -> None:
    assert road(llama).twin is not None
    undo = attach(llama)
    try:
        found, way = drawn(llama, max_new_tokens=2)
        assert reason in way and way.startswith("the model itself") and len(found) == len(PROMPTS)
        if attach is another_forward:
            check_greedy_start(llama, found)
    finally:
        undo()
    assert drawn(llama, max_new_tokens=2)[1] == "twin"


def check_greedy_start(model: Any, found: dict[str, tuple[int, ...]]) -> None:
    for prompt, tokens in found.items():
        with torch.no_grad():
            assert not tokens or int(model(torch.tensor([adapt(model).encode(prompt)]))[0, -1].argmax()) == tokens[0]


def test_a_hook_sees_prompts_as_they_are(llama: Any) -> None:
    """Nothing but the prompts, those of one length together, so that ``[:, -1]`` is the last prompt token."""
    ids = [adapt(llama).encode(prompt) for prompt in [*PROMPTS, "Ho"]]
    seen: list[Tensor] = []

    def at_last(value: Tensor, hook: Any) -> Tensor:
        seen.append(value.clone())
        edit = torch.zeros_like(value)
        edit[:, -1] = vector(9)
        return value + edit

    with llama.hooks(fwd_hooks=[("blocks.1.hook_resid_post", at_last)]):
        found, way = drawn(llama, [*PROMPTS, "Ho"], max_new_tokens=1)
        assert way == "twin"
        shapes = sorted((len(value), value.shape[1]) for value in seen)
        lengths = [len(row) for row in ids]
        assert shapes == sorted((lengths.count(length), length) for length in set(lengths))
        for prompt, row in zip([*PROMPTS, "Ho"], ids, strict=True):
            with torch.no_grad():
                token = int(llama(torch.tensor([row]))[0, -1].argmax())
            assert found[prompt] == (token,) or token in adapt(llama).stop_ids
        seen.clear()
        drawn(llama, ["Hi", "Ho", "Hello there"], max_new_tokens=4, batch_rows=2)
        assert all(len(value) <= 2 for value in seen)
        seen.clear()
        drawn(llama, ["Hi"], max_new_tokens=3)
        assert all(len(value) == 1 for value in seen)  # no copies beside it


def test_hooks_that_come_and_go_while_samples_are_drawn(llama: Any) -> None:
    prompts = [f"{i}. Say {word}" for word in ("sea", "sky") for i in range(35)]
    expected, _ = drawn(llama, prompts, max_new_tokens=3)
    constant = vector(11)

    def one_answer(value: Tensor, hook: Any) -> Tensor:
        seen.append(len(value))
        return constant.expand_as(value)  # of the last block: what is kept of a prompt stays as it was

    seen: list[int] = []
    sampler = sims.LocalSampler(llama, sims.SamplingConfig(max_new_tokens=3, temperature=1e-4, batch_rows=2))
    samples = sampler.sample(prompts, n=1, plan=PLANS["unsteered"], seed=0)
    phases: list[list[Any]] = []
    for _ in range(3):
        phases.append([next(samples)])
        if len(phases) == 1:
            llama.hook_dict["blocks.2.hook_resid_post"].add_hook(one_answer)
        elif len(phases) == 2:
            llama.hook_dict["blocks.2.hook_resid_post"].remove_hooks()
        phases[-1] += [next(samples) for _ in range(15)]  # those are drawn already
    rest = [*phases.pop(), *samples]
    plain, hooked = phases
    assert all(s.tokens == expected[prompts[s.prompt]] for s in plain)
    assert seen and set(seen) <= {1, 2}
    late = [s.tokens for s in hooked[2:]]  # two were under way
    assert len(set(late)) == 1 and len(set(late[0])) == 1
    assert all(s.tokens == expected[prompts[s.prompt]] for s in rest[2:]) and len(rest) == 70 - 32


def test_the_model_is_itself_between_samples(llama: Any) -> None:
    tokens = random_tokens()
    plain, names = llama(tokens).detach(), list(llama.hook_dict)
    sampler = sims.LocalSampler(llama, sims.SamplingConfig(max_new_tokens=3, batch_rows=4))
    for count, _ in enumerate(sampler.sample(PROMPTS, n=10, plan=PLANS["all"], seed=0)):
        if count % 8 == 0:
            assert TRACKER not in llama.__dict__ and list(llama.hook_dict) == names
            assert torch.equal(llama(tokens).detach(), plain) and not torch.is_inference_mode_enabled()
    abandoned = sampler.sample(PROMPTS, n=10, plan=PLANS["all"], seed=0)
    next(abandoned)
    abandoned.close()
    assert torch.equal(llama(tokens).detach(), plain)


def test_a_model_that_changes_while_it_is_sampled_from_is_noticed(llama: Any) -> None:
    config = sims.SamplingConfig(max_new_tokens=2, batch_rows=16)
    samples = sims.LocalSampler(llama, config).sample(PROMPTS, n=8, plan=NOTHING, seed=0)
    next(samples)
    llama.train()
    try:
        with pytest.raises(sims.SimsError, match="changed while it was sampled from: the model is in training mode"):
            list(samples)
    finally:
        llama.eval()


# --- weights ---------------------------------------------------------------------------------------------------------


def weight(model: Any, layer: int = 1) -> nn.Parameter:
    """A square matrix of the model, ``[32, 32]``, or heads of one."""
    names = dict(model.named_parameters())
    found = [name for name in names if f".{layer}." in name and ("W_O" in name or "o_proj" in name)]
    return names[found[0]]


def in_place(model: Any) -> None:
    with torch.no_grad():
        weight(model).mul_(-1.0)


def through_data(model: Any) -> None:
    weight(model).data.add_(0.5)


def new_data(model: Any) -> None:
    weight(model).data = weight(model).data.flip(0).clone()


def two_rows_of_data_swapped(model: Any) -> None:
    data = weight(model).data
    data[..., [0, 1], :] = data[..., [1, 0], :]


def two_columns_of_data_swapped(model: Any) -> None:
    data = weight(model).data
    data[..., [2, 5]] = data[..., [5, 2]]


def loaded(model: Any) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = next(n for n, value in state.items() if value.shape == weight(model).shape and value.equal(weight(model)))
    state[name] = state[name] * -1.0
    model.load_state_dict(state)


def another_activation(model: Any) -> None:
    if adapt(model).kind == "HookedTransformer":
        model.blocks[1].mlp.act_fn = torch.tanh
    else:
        model.original_model.model.layers[1].mlp.act_fn = nn.Tanh().eval()


def another_epsilon(model: Any) -> None:
    for part in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(vars(part).get(name), float):
                setattr(part, name, 1.0)


def another_scale(model: Any) -> None:
    for part in model.modules():
        for name in ("attn_scale", "scaling"):
            if isinstance(vars(part).get(name), float):
                setattr(part, name, 3.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        in_place,
        through_data,
        new_data,
        two_rows_of_data_swapped,
        two_columns_of_data_swapped,
        loaded,
        another_activation,
        another_epsilon,
        another_scale,
    ],
)
@pytest.mark.cases(8)
def test_a_changed_model_is_sampled_as_it_is_now(fresh: Any, kind: str, change: Callable[[Any], None]) -> None:
    model = fresh("llama", kind)
    before, base = drawn(model, PROMPTS[:2]), logits(model)
    twin = twin_of(model)
    assert agreement(model) < 1e-4 and twin_of(model) is twin  # kept
    change(model)
    assert gap(logits(model), base, texts()[1]) > 1e-2
    found, way = drawn(model, PROMPTS[:2])
    check_greedy(model, found)
    if way == "twin":
        assert agreement(model) < 1e-4
    else:
        assert "differ from the model's" in way  # a bridge's twin is built from the configuration
    assert before[1] == "twin"


@pytest.mark.parametrize("kind", KINDS)
def test_a_parametrized_weight_takes_the_slow_road(fresh: Any, kind: str) -> None:
    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 0.5 * value

    model = fresh("llama", kind)
    assert road(model).twin is not None
    owner, name = next(
        (part, name)
        for part in model.modules()
        for name in ("W_out", "weight")
        if isinstance(part._parameters.get(name), nn.Parameter)
        and part._parameters[name].shape in ((128, 32), (32, 128))
    )
    parametrize.register_parametrization(owner, name, Half().eval())
    assert "parametrized" in road(model).reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_half_precision_has_a_twin_in_it(fresh: Any, kind: str) -> None:
    model = fresh("llama", kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)  # or rounding alone would move tokens
    drawn(model)
    model.to(torch.bfloat16)
    way = road(model)
    assert way.twin is not None and way.twin.dtype == torch.bfloat16, way.reason
    assert agreement(model) < 0.5
    assert drawn(model)[1] == "twin"


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_does_not_keep_its_model_alive(fresh: Any, kind: str) -> None:
    model = fresh("llama", kind)
    drawn(model, plan=PLANS["all"])
    twin, gone = weakref.ref(twin_of(model)), weakref.ref(model)
    assert twin() is not None
    del model
    gc.collect()
    assert gone() is None and twin() is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_a_twin_of_its_own(fresh: Any, kind: str) -> None:
    model = fresh("llama", kind)
    expected, twin = drawn(model), twin_of(model)
    other = copy.deepcopy(model)
    assert drawn(other) == expected and twin_of(other) is not twin
    in_place(model)
    assert drawn(other) == expected != drawn(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_in_inference_mode_has_a_twin(fresh: Any, kind: str) -> None:
    with torch.inference_mode():
        model = fresh("llama", kind)
    assert drawn(model) == drawn(fresh("llama", kind))


def test_memory_that_runs_out_while_a_twin_is_made_is_no_lasting_reason(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh("llama", "bridge")

    def failing(*args: Any, **options: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 GB.")

    with monkeypatch.context() as patched:
        patched.setattr("sims_lens.twin.making._build", failing)
        with pytest.raises(RuntimeError, match="can't allocate"):
            twin_of(model)
    assert isinstance(twin_of(model), Twin)


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
def test_settings_that_change_what_points_show_are_noticed(fresh: Any) -> None:
    model = fresh("llama", "hooked")
    assert drawn(model)[1] == "twin"
    model.set_ungroup_grouped_query_attention(True)
    assert "ungroup_grouped_query_attention" in road(model).reason


def test_compatibility_mode_is_noticed(fresh: Any) -> None:
    model = fresh("llama", "bridge")
    drawn(model)
    model.enable_compatibility_mode(disable_warnings=True)
    for name in hook_names("TransformerBridge"):
        with model.hooks(fwd_hooks=[(f"blocks.1.{name}", add_noise)]):
            check_greedy(model, drawn(model)[0])


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
def test_a_model_can_be_trained_after_long_texts_were_sampled() -> None:
    """Sampling lengthens a HookedTransformer's rotation tables; in inference mode they would be of no use any more."""
    model = small(n_ctx=4096, positional_embedding_type="rotary", rotary_dim=8)
    prompts, replies = [random_tokens(1, 2100)[0].tolist()], [(0, [20, 30])]
    with torch.inference_mode():
        assert isinstance(twin_of(model), Twin)
        response_logits(model, prompts, replies)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(random_tokens()).sum().backward()
    assert gap(response_logits(model, prompts, replies), adapt(model).response_logits(prompts, replies), replies) < 1e-3


def test_room_for_prompts_is_made_once() -> None:
    def memory(prompts: int, length: int) -> PromptMemory:
        made = PromptMemory()
        made.keys, made.values = [torch.randn(prompts, 2, length, 4)], [torch.randn(prompts, 2, length, 4)]
        return made

    prefixes, parts = Prefixes(), [memory(2, 5), memory(1, 20)]
    prefixes.reserve(3, 20)
    slots = prefixes.add(parts[:1])
    block = prefixes.keys[0]
    slots += prefixes.add(parts[1:])
    assert slots == [0, 1, 2] and prefixes.lengths == [5, 5, 20] and prefixes.keys[0] is block
    assert torch.equal(block[:2, :, :5], parts[0].keys[0]) and torch.equal(block[2:, :, :20], parts[1].keys[0])
    prefixes.free(1)
    prefixes.reserve(2, 3)
    assert prefixes.add([memory(2, 3)]) == [1, 3] and torch.equal(prefixes.keys[0][[0, 2]], block[[0, 2]])


# --- other architectures ---------------------------------------------------------------------------------------------


def long_texts() -> tuple[list[list[int]], list[tuple[int, list[int]]]]:
    """Longer than any window, and than the text on which a twin is compared."""
    prompts = [random_tokens(1, length, seed=i)[0].tolist() for i, length in enumerate((40, 3, 11))]
    return prompts, [
        (of, random_tokens(1, length, seed=9 + i)[0].tolist())
        for i, (of, length) in enumerate([(0, 30), (1, 50), (2, 1), (1, 9)])
    ]


@torch.no_grad()
def check_long(model: Any) -> None:
    prompts, replies = long_texts()
    found = response_logits(model, prompts, replies)
    for row, (of, reply) in zip(found, replies, strict=True):
        own = model(torch.tensor([[*prompts[of], *reply]]))[0, len(prompts[of]) - 1 : -1]
        assert difference(row[: len(reply)], own) < 1e-3
    sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=40, temperature=1e-4, top_k=None))
    for sample in sampler.sample(PROMPTS, n=1, plan=NOTHING, seed=0):
        ids = adapt(model).encode(PROMPTS[sample.prompt])
        after = model(torch.tensor([[*ids, *sample.tokens]]))[0, len(ids) - 1 :]
        for at, token in enumerate(sample.tokens):
            assert after[at, token] >= after[at].max() - 1e-3
    assert sampler.road == "twin"


@pytest.mark.parametrize("kind", KINDS)
def test_texts_longer_than_the_window(zoo: Any, kind: str) -> None:
    assert road(zoo("gemma2", kind)).twin is not None  # its window is 8 tokens, at every other layer, with softcaps
    check_long(zoo("gemma2", kind))


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_OLD_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}


def foreign(folder: Path, architecture: str, kind: str, **sizes: Any) -> Any:
    """A tiny random model of an architecture that ``tiny`` has not."""
    text = tiny.tokenizer("llama")
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config: Any = CONFIG_MAPPING[architecture](vocab_size=len(text), **ids, **sizes)  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        built: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        for parameter in built.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.3 * noise)
    built.save_pretrained(folder)
    text.save_pretrained(folder)
    return sims.load(folder, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("mistral", _SIZES | {"sliding_window": 4, "head_dim": 8}),
        ("gemma3_text", _SIZES | {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8}),
        ("phi3", _SIZES | {"sliding_window": None}),
    ],
)
def test_other_architectures_have_twins(tmp_path: Path, kind: str, architecture: str, sizes: dict[str, Any]) -> None:
    model = foreign(tmp_path, architecture, kind, **sizes)
    assert road(model).reason == ""
    assert agreement(model) < 1e-4
    check_long(model)


@pytest.mark.parametrize(
    ("architecture", "sizes", "reason"),
    [
        ("gptj", _OLD_SIZES | {"rotary_dim": 4}, "fails on a"),
        ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, "fails on a"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "fails on a"),
        ("llama", _SIZES | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "longest row of a batch"),
    ],
)
def test_a_bridge_that_has_no_twin_says_why(
    tmp_path: Path, architecture: str, sizes: dict[str, Any], reason: str
) -> None:
    model = foreign(tmp_path, architecture, "bridge", **sizes)
    assert reason in road(model).reason
    if architecture != "mamba":  # which has no cache that the slow road knows
        found, way = drawn(model)
        assert reason in way
        check_greedy(model, found)


def small(**changes: Any) -> Any:
    """A HookedTransformer by its configuration."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    text = tiny.tokenizer("llama")
    settings = {"n_layers": 3, "d_model": 32, "n_ctx": 64, "d_head": 8, "n_heads": 4, "d_mlp": 64, "act_fn": "gelu"}
    config = HookedTransformerConfig(**{**settings, "d_vocab": len(text), "seed": 0, "init_weights": True} | changes)
    model = HookedTransformer(config)
    model.tokenizer = text
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.3 * noise)
    return model.eval()


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_only": True}, "attn_only = True"),
        ({"act_fn": "solu_ln"}, "is_layer_norm_activation = True"),
        ({"num_experts": 4, "experts_per_token": 2}, "has "),
        ({"positional_embedding_type": "shortformer"}, "positional_embedding_type = 'shortformer'"),
        ({"normalization_type": None}, "normalization_type = None"),
        ({}, ""),
        ({"normalization_type": "LNPre"}, ""),
        ({"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"}, ""),
        ({"positional_embedding_type": "rotary", "rotary_dim": 4, "parallel_attn_mlp": True}, ""),
        ({"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global", "local"]}, ""),
        ({"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0}, ""),
        ({"n_key_value_heads": 2, "use_attn_scale": False}, ""),
        ({"scale_attn_by_inverse_layer_idx": True}, ""),
    ],
)
def test_hooked_transformers_by_configuration(changes: dict[str, Any], reason: str) -> None:
    model = small(**changes)
    found, way = drawn(model)
    assert (reason in way and way.startswith("the model itself")) if reason else way == "twin", way
    check_greedy(model, found)
    if not reason:
        assert agreement(model) < 1e-4


def test_steering_points_are_not_taken_for_somebodys(llama: Any) -> None:
    with sims.steering(llama, PLANS["all"]):
        way = road(llama)
        assert way.twin is not None and not way.watched and not any(STEERING in name for name in way.points)
        name = next(name for name in llama.hook_dict if name.endswith("steer_resid_post.hook_delta"))
        base = logits(llama)
        with llama.hooks(fwd_hooks=[(name, lambda value, hook: 3.0 * value)]):
            assert road(llama).watched
            assert gap(logits(llama), base, texts()[1]) > 1e-2
            assert agreement(llama) < 1e-4


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    assert not nn.modules.module._global_forward_hooks
