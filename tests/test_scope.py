"""Token scope: the same tokens are steered with a KV cache, without one and teacher-forced, alone and in a batch."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from common import KINDS, difference, log_probs, plan_of, random_rows, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sims_lens import TokenScope
from sims_lens.activations import capture
from sims_lens.adapter import adapt, left_pad
from sims_lens.errors import PlanError
from sims_lens.hooks import attach, steering
from sims_lens.scope import Region, left_padded_regions

SCOPES = ("all", "prompt", "last_prompt", "response", "generation")
WIDTH, NEW = 7, 6
TOKENS = random_tokens(2, WIDTH)
DELTA = "blocks.1.steer_resid_post.hook_delta"

LENGTHS = [(4, 3), (1, 5), (9, 2), (6, 4)]  # of prompts and responses

scopes = pytest.mark.parametrize("scope", SCOPES)


# --- scopes and regions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("all", [0, 0, 1, 1, 1, 1, 1]),
        ("prompt", [0, 0, 1, 1, 1, 0, 0]),
        ("last_prompt", [0, 0, 0, 0, 1, 0, 0]),
        ("response", [0, 0, 0, 0, 0, 1, 1]),
        ("generation", [0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_named_scopes_hold_what_they_say(scope: str, expected: list[int]) -> None:
    regions = left_padded_regions([3], [5], 7)
    assert TokenScope.of(scope).mask(regions).tolist() == [[bool(value) for value in expected]]
    assert TokenScope.of(scope).name == scope
    assert TokenScope.of(TokenScope.of(scope)) is TokenScope.of(scope)


def test_scopes_are_sets() -> None:
    assert TokenScope.of("last_prompt") | TokenScope.of("response") == TokenScope.of("generation")
    odd = TokenScope(prompt=True) | TokenScope(response=True)
    assert odd.name == "prompt+response" and repr(odd) == "TokenScope('prompt+response')"
    assert TokenScope(**odd.to_json()) == odd
    assert not any(TokenScope.of(scope).holds(Region.PAD) for scope in SCOPES)
    assert len({TokenScope.of(scope) for scope in SCOPES}) == len(SCOPES)


def test_a_scope_that_is_none_is_named() -> None:
    with pytest.raises(PlanError, match="scope 'answer' is not one of all, prompt, last_prompt, response, generation"):
        TokenScope.of("answer")
    with pytest.raises(PlanError, match="at least one of prompt, last_prompt, response"):
        TokenScope()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4), st.integers(0, 2))
def test_regions_of_left_padded_rows(rows: list[tuple[int, int]], extra: int) -> None:
    width = max(prompt + response for prompt, response in rows) + extra
    regions = left_padded_regions([prompt for prompt, _ in rows], [sum(row) for row in rows], width)
    for (prompt, response), row in zip(rows, regions.tolist(), strict=True):
        start = [Region.PROMPT] * (prompt - 1) + [Region.LAST_PROMPT] * (prompt > 0)
        assert row == [Region.PAD] * (width - prompt - response) + start + [Region.RESPONSE] * response


# --- the same tokens by every way of running -------------------------------------------------------------------------


def generated(model: Any, tokens: Any = TOKENS, **options: Any) -> tuple[Tensor, Tensor]:
    """Sequences and the log-probabilities of each new token, by the model's own greedy ``generate``."""
    arguments = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False} | options
    result = model.generate(tokens, output_logits=True, return_dict_in_generate=True, **arguments)
    # clones: HookedTransformer generates in inference mode
    return result.sequences.clone(), log_probs(torch.stack(tuple(result.logits), dim=1)).clone()


@scopes
def test_with_a_cache_without_one_and_teacher_forced(model: Any, scope: str) -> None:
    with steering(model, plan_of(0, 1, scope=scope)) as steered:
        tokens, cached = generated(model)
        same, uncached = generated(model, use_past_kv_cache=False)
        with steered.prompt(WIDTH):
            forced = log_probs(model(tokens))[:, WIDTH - 1 : -1]
        assert torch.equal(same, tokens)
        assert cached.shape == (2, NEW, model.cfg.d_vocab)
        torch.testing.assert_close(uncached, cached, atol=1e-4, rtol=0)
        torch.testing.assert_close(forced, cached, atol=1e-4, rtol=0)


def test_the_scopes_differ(model: Any) -> None:
    """Or the test above would compare nothing."""
    tokens = random_tokens(2, WIDTH + NEW)
    results = [model(tokens)[:, WIDTH:]]
    for scope in SCOPES:
        with steering(model, plan_of(0, 1, scope=scope)) as steered, steered.prompt(WIDTH):
            results.append(model(tokens)[:, WIDTH:])
    assert min(difference(left, right) for left, right in combinations(results, 2)) > 1e-3


@scopes
def test_a_left_padded_batch_is_its_rows(model: Any, scope: str) -> None:
    adapter = adapt(model)
    rows = random_rows(LENGTHS)
    with steering(model, plan_of(0, 1, scope=scope)) as steered, torch.no_grad():
        tokens, mask = left_pad([[*prompt, *response] for prompt, response in rows], adapter.device)
        with steered.prompt([tokens.shape[1] - len(response) for _, response in rows]):
            batched = adapter.logits(tokens, mask, keep=tokens.shape[1])
        for (prompt, response), together in zip(rows, batched, strict=True):
            with steered.prompt(len(prompt)):
                alone = model(torch.tensor([[*prompt, *response]]))[0]
            assert difference(together[-len(alone) :], alone) < 1e-4


@scopes
def test_texts_generate_alike_alone_and_in_a_batch(model: Any, scope: str) -> None:
    texts = ["A longer text, of many bytes", "short", "of middling length"]
    with steering(model, plan_of(0, 1, scope=scope)):
        tokens, batched = generated(model, texts)
        for text, row, together in zip(texts, tokens, batched, strict=True):
            (alone,), expected = generated(model, text)
            assert torch.equal(row[-NEW:], alone[-NEW:])
            torch.testing.assert_close(together[None], expected, atol=1e-4, rtol=0)


def test_a_plain_pass_is_all_prompt(model: Any) -> None:
    base, cached = model(TOKENS), {}
    for scope in SCOPES:
        with steering(model, plan_of(1, scope=scope)):
            logits, cache = model.run_with_cache(TOKENS)
            cached[scope] = cache[DELTA].abs().sum(-1) > 0
            assert torch.equal(logits, base) is (scope == "response")
    assert not cached["response"].any()
    assert cached["all"].all() and cached["prompt"].all()
    assert cached["last_prompt"].tolist() == cached["generation"].tolist() == [[False] * (WIDTH - 1) + [True]] * 2


@scopes
def test_decoding_by_hand_with_the_adapter(model: Any, scope: str) -> None:
    adapter = adapt(model)
    tokens = random_tokens(3, WIDTH + 3, seed=4)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with steering(model, plan_of(0, 1, scope=scope)) as steered, torch.no_grad():
        with steered.prompt(WIDTH):
            whole = adapter.logits(tokens, mask, keep=4)
        cache = adapter.new_cache(3)
        steps = [adapter.logits(tokens[:, :WIDTH], mask[:, :WIDTH], keep=1, cache=cache)]
        for column in range(WIDTH, WIDTH + 3):
            model(random_tokens(1, 20))  # other passes in between change nothing
            steps.append(adapter.logits(tokens[:, column : column + 1], mask[:, : column + 1], keep=1, cache=cache))
    assert difference(torch.cat(steps, dim=1), whole) < 1e-4


def test_what_goes_on_from_a_cache_is_response(llama: Any) -> None:
    """Also when the prompt was run before the plan was attached, and when another prompt was run in between."""
    adapter = adapt(llama)
    tokens, mask = random_tokens(1, 12), torch.ones(1, 12, dtype=torch.bool)
    cache = adapter.new_cache(1)
    with torch.no_grad():
        adapter.logits(tokens[:, :5], mask[:, :5], keep=1, cache=cache)
        for scope, steers in (("response", True), ("prompt", False), ("last_prompt", False)):
            with steering(llama, plan_of(1, scope=scope)):
                adapter.logits(random_tokens(1, 30), torch.ones(1, 30, dtype=torch.bool), keep=1)
                rows = adapter.select_rows(cache, torch.tensor([0]))
                steered = adapter.logits(tokens[:, 5:8], mask[:, :8], keep=3, cache=rows)
            rows = adapter.select_rows(cache, torch.tensor([0]))
            plain = adapter.logits(tokens[:, 5:8], mask[:, :8], keep=3, cache=rows)
            assert (difference(steered, plain) > 0.01) is steers


# --- generate and its relatives --------------------------------------------------------------------------------------


def stream_of(model: Any, **options: Any) -> Any:
    arguments = {"max_new_tokens": NEW, "max_tokens_per_yield": 2, "do_sample": False, "stop_at_eos": False}
    return model.generate_stream(TOKENS, verbose=False, **(arguments | options))


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@scopes
def test_a_stream_is_steered_as_generate_is(llama: Any, scope: str, cached: bool) -> None:
    unsteered, _ = generated(llama)
    with steering(llama, plan_of(0, 1, scope=scope)):
        expected, _ = generated(llama)
        whole = torch.cat(list(stream_of(llama, use_past_kv_cache=cached)), dim=1)
    assert torch.equal(whole[:, -NEW:], expected[:, -NEW:])
    assert not torch.equal(expected, unsteered)


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_passes_between_the_pieces_of_a_stream_are_not_part_of_it(llama: Any, cached: bool) -> None:
    with steering(llama, plan_of(0, 1, scope="response")):
        base, expected = llama(random_tokens(1, 20)), torch.cat(list(stream_of(llama)), dim=1)
        pieces = []
        stream = stream_of(llama, use_past_kv_cache=cached)
        for piece in stream:
            pieces.append(piece)
            assert torch.equal(llama(random_tokens(1, 20)), base)  # all prompt
            generated(llama, max_new_tokens=2)
        assert torch.equal(torch.cat(pieces, dim=1)[:, -NEW:], expected[:, -NEW:])

        abandoned = stream_of(llama, use_past_kv_cache=cached)
        next(abandoned)
        assert torch.equal(llama(random_tokens(1, 20)), base)
        abandoned.close()


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_hf_generate_is_steered(zoo: Callable[..., Any], cached: bool) -> None:
    model = zoo("llama", "bridge")
    for scope in SCOPES:
        with steering(model, plan_of(0, 1, scope=scope)):
            expected, _ = generated(model)
            options = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False}
            found = model.hf_generate(TOKENS, use_past_kv_cache=cached, use_cache=cached, **options)
            assert torch.equal(found[:, : expected.shape[1]], expected)


def test_each_generation_has_a_prompt_of_its_own(llama: Any) -> None:
    with steering(llama, plan_of(0, 1, scope="response")):
        expected = generated(llama)
        generated(llama, random_tokens(3, 15, seed=5))
        llama(random_tokens(1, 30))
        again = generated(llama)
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])


def test_a_prompt_can_be_declared_to_generate(llama: Any) -> None:
    """A prefilled answer: the last columns of the prompt are the response's beginning."""
    with steering(llama, plan_of(0, 1, scope="response")) as steered, steered.prompt(WIDTH - 3):
        tokens, cached = generated(llama)
        forced = log_probs(llama(tokens))[:, WIDTH - 1 : -1]
        torch.testing.assert_close(forced, cached, atol=1e-4, rtol=0)
    with steering(llama, plan_of(0, 1, scope="response")):
        assert not torch.equal(generated(llama)[1][:, 0], cached[:, 0])


@pytest.mark.parametrize("stops", [1, 3])
def test_an_interrupted_generation_leaves_no_state(llama: Any, stops: int) -> None:
    class Stop(BaseException):
        pass

    steps = iter(range(stops))

    def stop(value: Tensor, hook: Any) -> None:
        if next(steps, None) is None:
            raise Stop

    with steering(llama, plan_of(0, 1, scope="response")):
        base, expected = llama(TOKENS), generated(llama)
        with pytest.raises(Stop), llama.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", stop)]):
            generated(llama)
        assert torch.equal(llama(TOKENS), base)
        assert torch.equal(generated(llama)[1], expected[1])


# --- saying where the prompt ends ------------------------------------------------------------------------------------


def steered_columns(model: Any, tokens: Tensor = TOKENS, **options: Any) -> list[list[int]]:
    _, cache = model.run_with_cache(tokens, names_filter=DELTA, **options)
    return [row.nonzero()[:, 0].tolist() for row in cache[DELTA].abs().sum(-1) > 0]


def test_the_prompt_is_declared_for_all_rows_or_for_each(llama: Any) -> None:
    with steering(llama, plan_of(1, scope="response")) as steered:
        with steered.prompt(4):
            assert steered_columns(llama) == [[4, 5, 6]] * 2
            with steered.prompt([2, 6]):  # the inner one counts
                assert steered_columns(llama) == [[2, 3, 4, 5, 6], [6]]
            with steered.prompt(torch.tensor([0, 9])):
                assert steered_columns(llama) == [[0, 1, 2, 3, 4, 5, 6], []]
            assert steered_columns(llama) == [[4, 5, 6]] * 2
            assert steered_columns(llama, random_tokens(1, 5)) == [[4]]
        assert steered_columns(llama) == [[], []]
        with pytest.raises(ZeroDivisionError), steered.prompt(4):
            raise ZeroDivisionError
        assert steered_columns(llama) == [[], []]


def test_nested_plans_share_what_was_declared(llama: Any) -> None:
    with (
        steering(llama, plan_of(0, scope="prompt")) as outer,
        steering(llama, plan_of(1, scope="response")),
        outer.prompt(4),
    ):
        assert steered_columns(llama) == [[4, 5, 6]] * 2
        late = attach(llama, plan_of(1, scope="last_prompt"))
        _, cache = llama.run_with_cache(TOKENS)
        late.detach()
    name = "blocks.1.steer_resid_post_2.hook_delta"
    assert (cache[name].abs().sum(-1) > 0).nonzero().tolist() == [[0, 3], [1, 3]]


@pytest.mark.parametrize("columns", [-1, [2, -1], True, [[1, 2]], [1.5, 2.0]], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_columns_that_are_no_counts_are_refused(llama: Any, columns: Any) -> None:
    with (
        steering(llama, plan_of(1)) as steered,
        pytest.raises(PlanError, match=r"prompt\(columns\) needs a count"),
        steered.prompt(columns),
    ):
        pass


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1]], ids=["two", "one"])
def test_columns_for_another_batch_are_refused(llama: Any, tokens: Tensor) -> None:
    with steering(llama, plan_of(1, scope="response")) as steered, steered.prompt([3, 3, 3]):
        with pytest.raises(PlanError, match=f"3 numbers for a batch of {len(tokens)} rows"):
            llama(tokens)
        assert steered_columns(llama, random_tokens(3, 5)) == [[3, 4]] * 3


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
def test_passes_that_begin_at_a_later_layer(zoo: Callable[..., Any]) -> None:
    model = zoo("llama", "hooked")
    stream = model(TOKENS, stop_at_layer=1)
    with steering(model, plan_of(1, scope="last_prompt")) as steered:
        expected = model(TOKENS)
        generated(model)
        for rows in (2, 1):  # another batch than in the pass before
            assert difference(model(stream[:rows], start_at_layer=1), expected[:rows]) < 1e-5
        model(random_tokens(1, 20))
        assert difference(model(stream, start_at_layer=1), expected) < 1e-5
        with steered.prompt(3):
            expected = model(TOKENS)
            model(random_tokens(1, 20))
            assert difference(model(stream, start_at_layer=1), expected) < 1e-5


# --- the same object for reading -------------------------------------------------------------------------------------


@scopes
def test_capture_reads_the_very_tokens_that_are_steered(model: Any, scope: str) -> None:
    """A plan that adds v to its scope moves the captured mean of the same scope by v, and its complement's not."""
    chosen, plan = TokenScope.of(scope), plan_of(2, scope=scope)
    rows = random_rows(LENGTHS[2:])
    regions = TokenScope(prompt=True), TokenScope(last_prompt=True), TokenScope(response=True)
    others = [region for region in regions if region | chosen != chosen]
    before = [capture(model, rows, scope=s).means for s in (chosen, *others)]
    with steering(model, plan):
        inside, *outside = [capture(model, rows, scope=s).means for s in (chosen, *others)]
    moved = plan.vectors()[2, "resid_post"]
    torch.testing.assert_close(inside[:, 2], before[0][:, 2] + moved, atol=1e-4, rtol=0)
    assert all(torch.equal(now, then) for now, then in zip(outside, before[1:], strict=True))
