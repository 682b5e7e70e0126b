"""The model is left as it was found: however a call ends, at whatever line, in whatever order and thread."""

import ast
import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from common import KINDS, SITES, difference, everything, fingerprint, plan_of, random_rows, random_tokens, vector
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor

import sims_lens as sims
from sims_lens.data import Sample
from sims_lens.errors import ModelError
from sims_lens.evaluate import side_effects
from sims_lens.hooks import attach, check_unsteered, steering, steerings
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.twin import twin_of

PACKAGE = str(Path(sims.__file__).parent)
TOKENS = random_tokens()
PROMPTS = ["Say a.", "Say bc.", "Go on."]
PAIRS = [("Say a.", "ee", "oo"), ("Say b.", "eee", "o"), ("Say c.", "ae", "uo"), ("Say d.", "e", "xx")]
SHORT = sims.SamplingConfig(max_new_tokens=4, top_k=None)
PLAN = plan_of(0, 2, scope="generation")


def share_of_e(_prompt: str, responses: Sequence[str]) -> list[float]:
    return [r.count("e") / max(1, len(r)) for r in responses]


# --- calls that touch a model; each gives something that can be compared ---------------------------------------------

CALLS: dict[str, Callable[[Any], Any]] = {}


def call(made: Callable[[Any], Any]) -> Callable[[Any], Any]:
    CALLS[made.__name__] = made
    return made


@call
def steered(model: Any) -> Any:
    with steering(model, plan_of(0, 1)) as outer, outer.prompt(3), steering(model, plan_of(1, site="attn_out")):
        return model(TOKENS).tolist()


@call
def in_units(model: Any) -> Any:
    plan = SteeringPlan.addition({1: vector(1)}, coefficient=0.3, units="residual_norm")
    with steering(model, plan):
        return model.generate(TOKENS, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False).tolist()


@call
def sampled(model: Any) -> Any:
    return sorted((s.prompt, s.tokens) for s in sims.LocalSampler(model, SHORT).sample(PROMPTS, n=2, plan=PLAN, seed=1))


@call
def sampled_and_read(model: Any) -> Any:
    found = sims.LocalSampler(model, SHORT).sample_and_read(PROMPTS, n=1, plan=PLAN, seed=1)
    return sorted((s.prompt, s.tokens, r.mean.tolist() if r else None) for s, r in found)


@call
def sampled_and_measured(model: Any) -> Any:
    found = sims.LocalSampler(model, SHORT).sample_and_measure(PROMPTS, n=1, plan=PLAN, seed=1)
    return sorted((s.prompt, s.tokens, s.nll, s.kl) for s in found)


@call
def sampled_slowly(model: Any) -> Any:
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda value, hook: value)]):
        return sampled(model)


@call
def captured(model: Any) -> Any:
    with steering(model, PLAN):
        return sims.capture(model, random_rows([(4, 3), (5, 2)])).means.tolist()


@call
def measured(model: Any) -> Any:
    samples = [Sample(i, 0, (20 + i, 21, 22), "abc", False) for i in range(2)]
    return [(s.nll, s.kl) for s in side_effects(model, PROMPTS[:2], samples, PLAN)]


@call
def calibrated(model: Any) -> Any:
    plan = SteeringPlan.addition({1: vector(1)}, coefficient=0.3, units="residual_norm")
    options: dict[str, Any] = {"factors": (0.5, 1.0), "refine": 0, "sampling": SHORT, "progress": False}
    return sims.calibrate(
        model, plan, prompts=[f"Say {c}." for c in "abcdefgh"], ranker=share_of_e, **options
    ).coefficient


@call
def swept(model: Any) -> Any:
    options: dict[str, Any] = {"coefficients": (0.2,), "layers": (0, 2), "progress": False}
    found = sims.layer_sweep(model, {0: vector(0), 2: vector(2)}, behaviour=PAIRS, **options)
    return [cell.effect.estimate for cell in found.cells]


@call
def left_out(model: Any) -> Any:
    return sims.leave_one_out(model, PLAN, PAIRS, controls=1, progress=False).table().to_csv()


@call
def attributed(model: Any) -> Any:
    return sims.component_effects(model, PLAN, PAIRS[:2], exact=2, progress=False).table().to_csv()


# --- an error at every line ------------------------------------------------------------------------------------------


@cache
def cleaning_up(file: str) -> frozenset[int]:
    """Lines of a file that undo something: an interrupt in there can't be undone by anybody, and takes microseconds to
    miss."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.Try):
            parts = [*node.finalbody, *(line for handler in node.handlers for line in handler.body)]
            lines |= {number for part in parts for number in range(part.lineno, (part.end_lineno or part.lineno) + 1)}
            lines.add(
                node.lineno
            )  # a bare "try:" does nothing, so that only a tracer can raise there; no `with` sees it
    return frozenset(lines)


def is_cleaning_up(frame: FrameType | None) -> bool:
    """Whether what runs is called from a cleanup; that of ``steering`` is looked into, for it starts anew."""
    top = True
    while frame is not None:
        code = frame.f_code
        looked_into = not top and code.co_name == "steering" and code.co_filename.endswith("hooks.py")
        if code.co_filename.startswith(PACKAGE) and not looked_into and frame.f_lineno in cleaning_up(code.co_filename):
            return True
        frame, top = frame.f_back, False
    return False


def traced(run: Callable[[], Any], at: tuple[str, int] | None = None, error: type[BaseException] = SystemExit) -> Any:
    """Run, and give the package's lines that ran; with ``at``, raise the first time that one is reached."""
    lines: dict[tuple[str, int], None] = {}
    armed = True

    def local(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal armed
        where = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and armed and (at is None or where == at) and not is_cleaning_up(frame):
            lines[where] = None
            if at is not None:
                armed = False
                raise error("injected")
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if armed and frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        run()
    finally:
        sys.settrace(before)
    return list(lines)


def check_interrupted(model: Any, name: str, *, most: int, error: type[BaseException]) -> int:
    made = CALLS[name]
    expected, before = made(model), everything(model)
    assert made(model) == expected and everything(model) == before
    lines = traced(lambda: made(model))
    chosen = lines[:: max(1, -(-len(lines) // most))]
    assert chosen
    for line in chosen:
        with suppress(error):
            traced(lambda: made(model), line, error)
        gc.collect(0)
        assert everything(model) == before, line
    assert made(model) == expected  # and nothing half made is used
    return len(chosen)


QUICK = ("steered", "sampled", "captured")


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.cases(2)
def test_an_interrupt_at_some_lines_leaves_the_model(llama: Any, name: str) -> None:
    assert check_interrupted(llama, name, most=25, error=KeyboardInterrupt) > 10


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_every_line_leaves_the_model(llama: Any, name: str, error: type[BaseException]) -> None:
    assert check_interrupted(llama, name, most=10_000, error=error) > 40


def test_making_the_twin_can_be_interrupted(fresh: Callable[..., Any]) -> None:
    for kind in KINDS:
        model = fresh("llama", kind)
        model(TOKENS)
        before = fingerprint(model)
        for line in traced(lambda: twin_of(fresh("llama", kind)))[::25]:  # noqa: B023
            with suppress(KeyboardInterrupt):  # what is done once for all models isn't done again
                traced(lambda: twin_of(model), line, KeyboardInterrupt)  # noqa: B023
            assert fingerprint(model) == before, line
        assert not isinstance(twin_of(model), str)


# --- an error of the user's own hooks --------------------------------------------------------------------------------


def firing(model: Any, run: Callable[[], Any], stop: int, error: type[BaseException]) -> int:
    """Run with a hook at every site that raises at firing number ``stop``; gives how often they fired."""
    fired = 0

    def hook(value: Any, hook: Any) -> None:
        nonlocal fired
        fired += 1
        if fired == stop:
            raise error("injected")

    names = [f"blocks.{layer}.hook_{site}" for layer in range(3) for site in SITES]
    with model.hooks(fwd_hooks=[(name, hook) for name in names]):
        run()
    return fired


@pytest.mark.parametrize("name", ["steered", "sampled", "captured", "measured"])
@pytest.mark.cases(4)
def test_a_hook_of_the_users_may_raise_at_any_firing(llama: Any, name: str) -> None:
    before, run = everything(llama), lambda: CALLS[name](llama)
    total = firing(llama, run, 0, KeyboardInterrupt)
    for number in {1, 2, 3, *range(4, total, max(1, total // 12)), total}:
        for error in (KeyboardInterrupt, ValueError):
            with pytest.raises(error, match="injected"):
                firing(llama, run, number, error)
            assert everything(llama) == before, number


# --- generators that nobody finishes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sample", "sample_and_read", "sample_and_measure"])
@pytest.mark.cases(2)
def test_a_samplers_iterator_can_be_dropped(llama: Any, method: str) -> None:
    expected, before = sampled(llama), everything(llama)
    for taken in (0, 1, 3):
        iterator = getattr(sims.LocalSampler(llama, SHORT), method)(PROMPTS, n=2, plan=PLAN, seed=1)
        for _ in range(taken):
            next(iterator)
        assert everything(llama) == before  # also while it waits
        del iterator
        gc.collect()
        assert everything(llama) == before
    assert sampled(llama) == expected


def test_a_stream_that_is_dropped_outlives_the_block(llama: Any) -> None:
    if not hasattr(llama, "generate_stream"):
        pytest.skip("this kind of model has no stream")
    before, base = everything(llama), llama(TOKENS)
    with steering(llama, PLAN):
        stream = llama.generate_stream(TOKENS, max_new_tokens=6, max_tokens_per_yield=1, verbose=False)
        next(stream)
    assert torch.equal(llama(TOKENS), base)
    next(stream)  # goes on, unsteered
    del stream
    gc.collect()
    before["random state"] = everything(llama)["random state"]  # TransformerLens draws from the global generator
    assert everything(llama) == before


def test_a_with_block_in_a_generator_that_is_dropped(llama: Any) -> None:
    before = everything(llama)

    def generator() -> Iterator[Tensor]:
        with steering(llama, PLAN), torch.inference_mode():
            while True:
                yield llama(TOKENS)

    made = generator()
    next(made)
    made.close()
    assert everything(llama) == before


# --- threads ---------------------------------------------------------------------------------------------------------


def elsewhere(run: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        return pool.submit(run).result()


def logits(model: Any, plan: SteeringPlan) -> Tensor:
    with steering(model, plan):
        return model(TOKENS)


def test_a_second_thread_cannot_attach_but_may_run_the_model(llama: Any) -> None:
    before, base = everything(llama), llama(TOKENS)
    with steering(llama, PLAN):
        expected = llama(TOKENS)
        with pytest.raises(ModelError, match=r"thread 'MainThread' is steering tiny-llama.*'other_0' can't attach"):
            elsewhere(lambda: attach(llama, plan_of(1)))
        assert torch.equal(llama(TOKENS), expected)
        assert torch.equal(elsewhere(lambda: llama(TOKENS)), expected)
        copied = copy.deepcopy(llama)
        for each in steerings(copied):
            each.detach()
        assert torch.equal(elsewhere(lambda: logits(copied, NOTHING)), base)
    assert torch.equal(elsewhere(lambda: logits(llama, PLAN)), expected)
    assert everything(llama) == before


def test_a_thread_that_has_ended_holds_nothing(llama: Any) -> None:
    left = elsewhere(lambda: attach(llama, PLAN))
    with steering(llama, plan_of(1)):
        both = llama(TOKENS)
    left.detach()
    with steering(llama, PLAN + plan_of(1)):
        assert difference(llama(TOKENS), both) < 1e-5


def test_threads_with_plans_of_their_own_get_theirs_or_an_error(llama: Any) -> None:
    """Never a mixture."""
    before = everything(llama)
    plans = [plan_of(0, seed=3), plan_of(1, seed=5), plan_of(2, seed=7)]
    expected = [logits(llama, plan) for plan in plans]

    def run(index: int) -> int:
        refused = 0
        for _ in range(15):
            try:
                found = logits(llama, plans[index])
            except ModelError:
                refused += 1
            else:
                assert torch.equal(found, expected[index])
        return refused

    with ThreadPoolExecutor(3) as pool:
        refused = list(pool.map(run, range(3)))
    assert max(refused) < 15 or sum(refused) < 45
    assert everything(llama) == before


def test_two_threads_with_two_models(zoo: Callable[..., Any]) -> None:
    models = [zoo("llama", KINDS[0]), zoo("qwen2", KINDS[-1])]
    expected = [sampled(model) for model in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert list(pool.map(sampled, models)) == expected


@pytest.mark.parametrize("plan", [NOTHING, PLAN], ids=["plain", "steered"])
def test_nobody_attaches_while_another_thread_draws(llama: Any, plan: SteeringPlan) -> None:
    inside, tried = threading.Event(), threading.Event()

    def wait(value: Tensor, hook: Any) -> None:
        inside.set()
        assert tried.wait(20)

    def draw() -> list[Any]:
        return list(sims.LocalSampler(llama, SHORT).sample(PROMPTS, n=1, plan=plan, seed=1))

    with ThreadPoolExecutor(1) as pool, llama.hooks(fwd_hooks=[("blocks.1.hook_resid_post", wait)]):
        future = pool.submit(draw)
        try:
            assert inside.wait(20)
            with pytest.raises(ModelError, match=r"is steering tiny-llama or drawing from it"):
                attach(llama, plan_of(1))
        finally:
            tried.set()
        drawn = future.result()
    assert [s.tokens for s in drawn] == [s.tokens for s in draw()]


def test_a_plan_that_comes_between_two_draws_is_refused(llama: Any) -> None:
    before = everything(llama)
    config = sims.SamplingConfig(max_new_tokens=2, top_k=None, batch_rows=1)
    for outer, inner in ((NOTHING, PLAN), (PLAN, plan_of(1))):
        iterator = sims.LocalSampler(llama, config).sample(PROMPTS, n=20, plan=outer, seed=1)
        next(iterator)
        with steering(llama, inner), pytest.raises(ModelError, match="a plan was attached to tiny-llama, or detached"):
            list(iterator)
    assert everything(llama) == before


def test_what_another_thread_runs_is_not_read(llama: Any) -> None:
    rows = random_rows([(4, 3), (5, 2)])
    expected = sims.capture(llama, rows).means
    done = threading.Event()

    def other() -> None:
        while not done.is_set():
            llama(random_tokens(3, 7, seed=5))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        found = [sims.capture(llama, rows).means for _ in range(5)]
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(each, expected) for each in found)


# --- inside a hook, and copies ---------------------------------------------------------------------------------------


def test_steering_within_a_hook(llama: Any) -> None:
    """Re-entrant: the inner pass has both plans, the outer one goes on as it began."""
    seen = []

    def hook(value: Tensor, hook: Any) -> None:
        if not seen:
            seen.append(None)
            with steering(llama, plan_of(2, seed=4)):
                seen.append(llama(TOKENS))

    plan = plan_of(1, scope="response")
    with steering(llama, plan) as outer, outer.prompt(4):
        expected = llama(TOKENS)
        with steering(llama, plan_of(2, seed=4)):
            both = llama(TOKENS)
        found = llama.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_resid_pre", hook)])
    assert torch.equal(found, expected) and torch.equal(seen[1], both)


@torch.no_grad()
def test_a_copy_made_inside_can_be_freed_of_its_plans(llama: Any) -> None:
    before, base = everything(llama), llama(TOKENS)
    with steering(llama, PLAN), steering(llama, plan_of(1)):
        expected = llama(TOKENS)
        copied = copy.deepcopy(llama)
    assert everything(llama) == before and torch.equal(copied(TOKENS), expected)
    for each in steerings(copied):
        each.detach()
    check_unsteered(copied)
    assert torch.equal(copied(TOKENS), base)
    assert {name for name in copied.hook_dict} == set(llama.hook_dict)
    assert "generate" not in vars(copied) and everything(llama) == before


# --- gradients, dtypes, memory ---------------------------------------------------------------------------------------


def by_hand(*layers: int, seed: int = 0, coefficient: float = 2.0) -> list[Any]:
    """What ``plan_of`` does at every token, as hooks of TransformerLens'."""

    def adding(layer: int) -> Callable[..., Tensor]:
        return lambda value, hook: value + (coefficient * vector(seed + layer)).to(value.dtype)

    return [(f"blocks.{layer}.hook_resid_post", adding(layer)) for layer in layers]


def test_gradients_are_those_of_a_hand_written_addition(llama: Any) -> None:
    def gradients(run: Callable[[], Tensor]) -> dict[str, Tensor]:
        run()[:, -1, 7].sum().backward()
        found = {name: p.grad for name, p in llama.named_parameters() if p.grad is not None}
        llama.zero_grad(set_to_none=True)
        return found

    with steering(llama, plan_of(0, 2)):
        steered = gradients(lambda: llama(TOKENS))
        names = {name for name, _ in llama.named_parameters()}
        with torch.no_grad():
            assert not llama(TOKENS).requires_grad
            with torch.enable_grad():
                assert llama(TOKENS).requires_grad
        with torch.inference_mode():
            assert llama(TOKENS).is_inference()
        assert not any(buffer.requires_grad or buffer.grad is not None for _, buffer in llama.named_buffers())
    expected = gradients(lambda: llama.run_with_hooks(TOKENS, fwd_hooks=by_hand(0, 2)))
    assert set(steered) == set(expected) <= names and expected
    for name, value in expected.items():
        torch.testing.assert_close(steered[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_change_its_dtype_inside(fresh: Callable[..., Any], kind: str) -> None:
    model = fresh("llama", kind)
    with steering(model, plan_of(1, coefficient=1.7)):
        model.to(torch.bfloat16)
        found = model(TOKENS)
        model.train()
        assert all(m.training for m in model.modules())
        model.eval()
    with steering(model, plan_of(1, coefficient=1.7)):
        assert torch.equal(model(TOKENS), found)
    assert not any("steer" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_steered_is_freed(fresh: Callable[..., Any], kind: str) -> None:
    model = fresh("llama", kind)
    for name in ("steered", "sampled", "sampled_and_measured", "captured", "swept"):
        CALLS[name](model)
    twin = twin_of(model)
    assert not isinstance(twin, str)
    ends = [weakref.ref(model), weakref.ref(twin)]
    del model, twin
    gc.collect()
    assert [end() for end in ends] == [None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_still_steered_is_freed(fresh: Callable[..., Any], kind: str) -> None:
    model = fresh("llama", kind)
    attach(model, PLAN)
    end = weakref.ref(model)
    del model
    gc.collect()
    assert end() is None


# --- anything, in any order ------------------------------------------------------------------------------------------

PLANS = [plan_of(0), plan_of(1, 2, seed=5), plan_of(1, seed=9, coefficient=-1.0), NOTHING]
BY_HAND = [by_hand(0), by_hand(1, 2, seed=5), by_hand(1, seed=9, coefficient=-1.0), []]


def machine(model: Any) -> type[RuleBasedStateMachine]:
    """Plans come and go in any order; at every step the model is what hand-written hooks make of it."""
    before, plain = fingerprint(model), copy.deepcopy(model)

    class Machine(RuleBasedStateMachine):
        @initialize()
        def start(self) -> None:
            self.on: list[tuple[Any, int]] = []
            self.dropped: list[tuple[Any, int]] = []
            self.users = 0

        def expected(self) -> Tensor:
            hooks = [hook for _, index in self.on for hook in BY_HAND[index]]
            return plain.run_with_hooks(TOKENS, fwd_hooks=hooks + self.users * by_hand(0, seed=20))

        @precondition(lambda self: len(self.on) + len(self.dropped) < 4)
        @rule(index=st.integers(0, len(PLANS) - 1))
        def enter(self, index: int) -> None:
            self.on.append((attach(model, PLANS[index]), index))

        @precondition(lambda self: self.on or self.dropped)
        @rule(data=st.data())
        def leave(self, data: st.DataObject) -> None:
            both = self.on + self.dropped
            each = both[data.draw(st.integers(0, len(both) - 1))]
            each[0].detach()
            self.on, self.dropped = ([e for e in part if e is not each] for part in (self.on, self.dropped))

        @rule()
        def forward(self) -> None:
            assert difference(model(TOKENS), self.expected()) < 1e-4

        @rule()
        def generate(self) -> None:
            found = model.generate(TOKENS, max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False)
            assert torch.equal(found[:, TOKENS.shape[1]], self.expected()[:, -1].argmax(-1))

        @precondition(lambda self: self.users < 2)
        @rule()
        def hook(self) -> None:
            ((name, adding),) = by_hand(0, seed=20)
            model.add_hook(name, adding)
            self.users += 1

        @rule()
        def reset(self) -> None:
            model.reset_hooks()
            self.users = 0

        @rule()
        def reset_fully(self) -> None:
            model.reset_hooks(including_permanent=True)
            self.on, self.dropped, self.users = [], self.on + self.dropped, 0

        @rule()
        def fail(self) -> None:
            with pytest.raises(ZeroDivisionError), steering(model, PLANS[1]):
                model(TOKENS)
                raise ZeroDivisionError

        @precondition(lambda self: not self.users)
        @rule()
        def deepcopy(self) -> None:
            copied = copy.deepcopy(model)
            assert difference(copied(TOKENS), self.expected()) < 1e-4
            for each in steerings(copied):
                each.detach()
            assert set(copied.hook_dict) == set(before["hooks"])
            assert difference(copied(TOKENS), plain(TOKENS)) < 1e-6

        def teardown(self) -> None:
            for each, _ in [*getattr(self, "on", []), *getattr(self, "dropped", [])]:
                each.detach()
            model.reset_hooks()
            assert fingerprint(model) == before

    return Machine


@torch.no_grad()
def test_anything_in_any_order(llama: Any) -> None:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    wanted = settings(max_examples=12, stateful_step_count=14, deadline=None, suppress_health_check=slow, database=None)
    run_state_machine_as_test(machine(llama), settings=wanted)
