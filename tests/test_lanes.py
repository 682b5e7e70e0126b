"""Decoders side by side draw, read and measure what one alone does; nothing stays behind."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

import sims_lens as sims
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.sampling import lanes, local
from sims_lens.sampling.decode import Decoder, Row
from sims_lens.twin import Twin

PROMPTS = ["Hi", "Tell me of rain.", "A", "What is a long question about?", "B", "And why?"]


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "hooked":
        pytest.importorskip("transformer_lens.HookedTransformer")
    return sims.load(str(tiny.write("llama", tmp_path_factory.mktemp("m") / "llama")), kind=request.param)


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three cores, and lanes of whatever few rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(local, "LANE_ROWS", 2)
    yield
    torch.set_num_threads(before)


PLANS = {
    "nothing": NOTHING,
    "generation": SteeringPlan.addition({1: torch.ones(tiny.D_MODEL)}, coefficient=2.0),
    "decaying": SteeringPlan.addition({0: torch.ones(tiny.D_MODEL)}, coefficient=2.0).decaying(2.0),
    "all": SteeringPlan.addition({1: torch.ones(tiny.D_MODEL)}, coefficient=2.0, scope="all"),
}


def sampler(model: Any, rows: int | None = None) -> sims.LocalSampler:
    return sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=6, top_k=None, batch_rows=rows))


def threads_used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the threads in which decoders run from now on."""
    run, used = Decoder.run, set()

    def noted(self: Decoder, *args: Any) -> None:
        used.add(threading.current_thread().name)
        run(self, *args)

    monkeypatch.setattr(Decoder, "run", noted)
    return used


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.cases(4)
def test_lanes_change_nothing(model: Any, name: str, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, used, found = PLANS[name], threads_used(monkeypatch), []
    for count in (1, 3):
        torch.set_num_threads(count)
        engine = sampler(model, rows)
        read = list(engine.sample_and_read(PROMPTS, n=3, plan=plan, seed=0))
        found.append(
            (
                {(s.prompt, s.draw): s for s in engine.sample(PROMPTS, n=3, plan=plan, seed=0)},
                {(s.prompt, s.draw): s for s in engine.sample_and_measure(PROMPTS, n=3, plan=plan, seed=0, measured=2)},
                {(s.prompt, s.draw): (s, None if r is None else r.mean.tolist()) for s, r in read},
            )
        )
        assert torch.get_num_threads() == count
        assert len(used) == (1 if count == 1 else 4)
    assert found[0] == found[1]
    measured = found[0][1].values()
    assert [s.nll is not None for s in measured] == [s.draw < 2 for s in measured]


def test_prompts_that_were_run_before_change_nothing_and_cost_one_token(model: Any) -> None:
    plan = PLANS["generation"]
    engine = sampler(model)
    first = sorted(engine.sample_and_measure(PROMPTS, n=3, plan=plan, seed=0), key=lambda s: (s.prompt, s.draw))
    spent, engine.count.prefill = engine.count.prefill, 0
    again = sorted(engine.sample_and_measure(PROMPTS, n=3, plan=plan, seed=0), key=lambda s: (s.prompt, s.draw))
    assert again == first
    assert engine.count.prefill == len(PROMPTS) < spent
    for prompt in range(len(PROMPTS)):
        alone = sampler(model).sample_and_measure([PROMPTS[prompt]], n=3, plan=plan, seed=0)
        expected = {s.draw: (s.tokens, s.nll, s.kl) for s in first if s.prompt == prompt}
        assert {s.draw: (s.tokens, s.nll, s.kl) for s in alone} == expected
    engine.count.prefill = 0
    list(engine.sample(PROMPTS, n=1, plan=PLANS["all"], seed=0))  # which acts on prompts, so that nothing can be kept
    assert engine.count.prefill == spent
    with torch.no_grad():
        weight = next(iter(model.parameters()))
        before = weight.clone()
        weight.mul_(1.5)
    try:
        changed = sorted(engine.sample_and_measure(PROMPTS, n=3, plan=plan, seed=0), key=lambda s: (s.prompt, s.draw))
        fresh = sampler(model).sample_and_measure(PROMPTS, n=3, plan=plan, seed=0)
        assert changed == sorted(fresh, key=lambda s: (s.prompt, s.draw)) != first
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_what_fails_in_one_lane_loses_nothing_of_the_others(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(sampler(model).sample(PROMPTS, n=3, plan=NOTHING, seed=0))
    extend = Decoder._extend

    def failing(self: Decoder, *args: Any) -> None:
        if any(row is not None and row.prompt == 1 and len(row.tokens) > 3 for row in self.live):
            raise ValueError("a lane fails")
        extend(self, *args)

    monkeypatch.setattr(Decoder, "_extend", failing)
    got = []
    with pytest.raises(ValueError, match="a lane fails"):
        for sample in sampler(model).sample(PROMPTS, n=3, plan=NOTHING, seed=0):
            got.append(sample)
    assert 0 < len(got) < len(whole)
    assert all(sample in whole for sample in got)
    assert torch.get_num_threads() == 3
    assert not any(thread.name.startswith("sims_lens") for thread in threading.enumerate())


def test_out_of_memory_in_a_lane_draws_the_rest_anew(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {(s.prompt, s.draw): s for s in sampler(model).sample(PROMPTS, n=3, plan=NOTHING, seed=0)}
    kind = next(k for k in Twin.__subclasses__() if (k.__name__ == "HookedTwin") == ("Hooked" in type(model).__name__))
    logits = kind.logits

    def scarce(self: Twin, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return logits(self, tokens, *args, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(kind, "logits", scarce)
    found = [(s.prompt, s.draw, s) for s in sampler(model, 12).sample(PROMPTS, n=3, plan=NOTHING, seed=0)]
    assert len(found) == len(expected)
    assert {(prompt, draw): sample for prompt, draw, sample in found} == expected


def test_an_interrupt_ends_all_lanes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(futures: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lanes, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(sampler(model).sample(PROMPTS, n=3, plan=PLANS["generation"], seed=0))
    assert torch.get_num_threads() == 3
    assert not any(thread.name.startswith("sims_lens") for thread in threading.enumerate())
    assert not any("steer_" in name for name in model.hook_dict)


def test_who_looks_on_is_called_from_one_thread_only(model: Any) -> None:
    seen = set()
    handle = model.hook_dict["blocks.1.hook_resid_post" if "blocks.1.hook_resid_post" in model.hook_dict else
                             "blocks.1.hook_out"].register_forward_hook(
        lambda *_: seen.add(threading.current_thread().name)
    )  # fmt: skip
    try:
        list(sampler(model).sample(PROMPTS, n=3, plan=NOTHING, seed=0))
    finally:
        handle.remove()
    assert seen == {threading.current_thread().name}


def test_threads_steer_one_model_side_by_side_each_on_its_own(model: Any) -> None:
    plan = PLANS["generation"]
    tokens = torch.arange(2, 10)[None]
    with sims.steering(model, plan) as steered, torch.no_grad():
        with steered.prompt(3):
            expected = model(tokens)
            found: list[torch.Tensor] = []

            def other() -> None:
                with torch.no_grad(), steered.prompt(6):
                    found.append(model(tokens))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert torch.equal(model(tokens), expected)
        with steered.prompt(6):
            assert torch.equal(model(tokens), found[0])
    assert not torch.equal(found[0], expected)


def test_a_limit_on_rows_holds_for_all_lanes_together(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, widest = Decoder._step, [0]

    def noted(self: Decoder, *args: Any) -> None:
        widest[0] = max(widest[0], len(self.live))
        logits(self, *args)

    monkeypatch.setattr(Decoder, "_step", noted)
    used = threads_used(monkeypatch)
    list(sampler(model, 6).sample(PROMPTS, n=3, plan=NOTHING, seed=0))
    assert len(used) >= 3 and widest[0] == 2  # the last lane that is left runs in the main thread
    used.clear()
    list(sampler(model, 3).sample(PROMPTS, n=3, plan=NOTHING, seed=0))
    assert used == {threading.current_thread().name} and widest[0] == 3


def test_what_ends_python_ends_the_sampler_too(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_args: Any) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(Decoder, "_extend", leave)
    with pytest.raises(SystemExit):
        list(sampler(model).sample(PROMPTS, n=3, plan=NOTHING, seed=0))


def test_a_steered_model_can_be_copied_and_the_copy_has_a_pass_of_its_own(model: Any) -> None:
    tokens = torch.arange(2, 10)[None]
    with sims.steering(model, PLANS["generation"]) as steered, torch.no_grad(), steered.prompt(3):
        expected, copied = model(tokens), copy.deepcopy(model)
        with steered.prompt(6):
            assert torch.equal(copied(tokens), expected) and not torch.equal(model(tokens), expected)


def test_prompts_are_dealt_out_whole() -> None:
    rows = [Row(prompt, draw, ()) for prompt in (4, 1, 3) for draw in range(2)]
    parts = lanes.split(rows, 2)
    assert [[row.prompt for row in part] for part in parts] == [[4, 4, 3, 3], [1, 1]]
    assert len(lanes.split(rows, 8)) == 3
