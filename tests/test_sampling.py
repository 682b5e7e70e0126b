"""The sampler draws from the right distribution, repeats, and does not depend on batch neighbours."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import sims_lens as sims
from sims_lens.activations import capture_tokens
from sims_lens.adapter import adapt
from sims_lens.data import Sample
from sims_lens.errors import ModelError, RankerError
from sims_lens.plan import NOTHING
from sims_lens.sampling.decode import Decoder
from sims_lens.sampling.draw import choose, uniforms
from sims_lens.twin import Twin, road, twin_of

PROMPTS = ["Hi", "Tell me of rain.", "A", "What is a long question about?"]
KINDS = ["bridge", "hooked"]


@pytest.fixture(scope="module", params=[(a, k) for a in ("llama", "gpt2", "gemma2") for k in KINDS], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    architecture, kind = request.param
    if kind == "hooked":
        pytest.importorskip("transformer_lens.HookedTransformer")
    return sims.load(str(tiny.write(architecture, tmp_path_factory.mktemp("m") / architecture)), kind=kind)


def draw(model: Any, prompts: list[str], n: int = 3, plan: Any = NOTHING, seed: int = 0, **settings: Any) -> Any:
    settings = {"max_new_tokens": 6, "top_k": None, "temperature": 1.0} | settings
    sampler = sims.LocalSampler(model, sims.SamplingConfig(**settings))
    return {(prompts[s.prompt], s.draw): s.tokens for s in sampler.sample(prompts, n=n, plan=plan, seed=seed)}


def test_a_sample_depends_on_its_prompt_draw_and_seed_only(model: Any) -> None:
    together = draw(model, PROMPTS, batch_rows=64)
    assert draw(model, PROMPTS, batch_rows=3) == together
    assert draw(model, PROMPTS[::-1], batch_rows=6) == together
    assert draw(model, PROMPTS[1:2]) == {k: v for k, v in together.items() if k[0] == PROMPTS[1]}
    assert draw(model, PROMPTS, seed=1) != together
    assert draw(model, PROMPTS[:1], n=1) == {k: v for k, v in together.items() if k == (PROMPTS[0], 0)}
    short = draw(model, PROMPTS, max_new_tokens=4)
    assert all(together[k][: len(v)] == v for k, v in short.items())


def test_nearly_greedy_sampling_is_greedy_decoding_by_full_forward_passes(model: Any) -> None:
    adapter = adapt(model)
    vector = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(0))
    plan = sims.SteeringPlan.addition({1: vector}, coefficient=0.7)
    found = draw(model, PROMPTS, n=1, plan=plan, temperature=1e-4)
    for prompt in PROMPTS:
        ids = adapter.encode(prompt)
        expected: list[int] = []
        for _ in range(6):
            with sims.steering(model, plan) as steered, steered.prompt(len(ids)), torch.no_grad():
                token = int(model(torch.tensor([[*ids, *expected]]))[0, -1].argmax())
            if token in adapter.stop_ids:
                break
            expected.append(token)
        assert found[prompt, 0] == tuple(expected)


def test_finished_rows_leave_and_the_rest_is_unchanged(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = draw(model, PROMPTS, n=4)
    counts = torch.bincount(torch.tensor([t for row in free.values() for t in row]))
    stop = int(counts.argmax())
    monkeypatch.setattr(type(adapt(model)), "stop_ids", (stop,))
    stopped = draw(model, PROMPTS, n=4)
    assert any(len(row) < 6 for row in stopped.values())
    for key, row in stopped.items():
        assert stop not in row and free[key][: len(row)] == row
        assert len(row) == 6 or free[key][len(row)] == stop


def test_uniforms_are_seeded_by_content() -> None:
    a = uniforms(0, "x", 0, 8)
    assert torch.equal(a, uniforms(0, "x", 0, 8)) and torch.equal(a[:4], uniforms(0, "x", 0, 4))
    for other in (uniforms(1, "x", 0, 8), uniforms(0, "y", 0, 8), uniforms(0, "x", 1, 8)):
        assert not torch.equal(a, other)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (3, 1.0), (None, 0.7), (4, 0.8)])
def test_choose_follows_the_filtered_distribution(top_k: int | None, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    n = 40_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = choose(logits.expand(n, -1), grid, temperature=0.9, top_k=top_k, top_p=top_p)
    found = np.bincount(tokens.numpy(), minlength=6) / n
    p = (logits / 0.9).softmax(-1).numpy()
    keep = 6 if top_k is None else top_k
    expected = np.where(np.arange(6) < keep, p, 0.0)
    expected /= expected.sum()
    if top_p < 1.0:
        expected = np.where(np.cumsum(expected) - expected < top_p, expected, 0.0)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=2e-4)


def test_choose_stays_in_the_vocabulary_at_the_edges() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    for edge in (0.0, 1.0 - 1e-12):
        token = choose(logits, torch.tensor([edge], dtype=torch.float64), temperature=1.0, top_k=None)
        assert int(token) in (0, 2)


def test_tokens_are_counted(model: Any) -> None:
    sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=5, top_k=None))
    drawn = list(sampler.sample(PROMPTS[:2], n=3, plan=NOTHING, seed=0))
    assert sampler.count.prefill == sum(len(adapt(model).encode(p)) for p in PROMPTS[:2])
    assert sampler.count.decode == sum(max(0, len(s.tokens) - (not s.ended)) for s in drawn)


def test_the_sampler_leaves_the_random_state_and_the_model_alone(model: Any) -> None:
    state = torch.get_rng_state()
    names = set(model.hook_dict)
    draw(model, PROMPTS, plan=sims.SteeringPlan.addition({0: torch.ones(adapt(model).d_model)}))
    assert torch.equal(torch.get_rng_state(), state) and set(model.hook_dict) == names


# --- independence of batch neighbours, to the bit --------------------------------------------------------------------

LONG = [*PROMPTS, "B", "many words in a row " * 4]


def record(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[tuple[int, ...], int, int], torch.Tensor]:
    """The logits that every token is drawn from, by prompt, draw and step."""
    seen: dict[tuple[tuple[int, ...], int, int], torch.Tensor] = {}
    original = Decoder._draw

    def spy(self: Decoder, rows: Sequence[Any], logits: torch.Tensor, *others: Any) -> None:
        for row, values in zip(rows, logits, strict=True):
            seen[tuple(self.job.prompts[row.prompt]), row.draw, len(row.tokens)] = values.clone()
        original(self, rows, logits, *others)

    monkeypatch.setattr(Decoder, "_draw", spy)
    return seen


def check_bits(
    model: Any, prompts: list[str], monkeypatch: pytest.MonkeyPatch, *, plan: Any, sizes: Sequence[int], **settings: Any
) -> None:
    twin = twin_of(model)
    if not isinstance(twin, Twin) or not twin.packed:
        pytest.skip("only where weights are packed")
    seen = record(monkeypatch)
    tokens = draw(model, prompts, plan=plan, batch_rows=64, **settings)
    together = dict(seen)
    assert len(together) == sum(min(len(t) + 1, settings["max_new_tokens"]) for t in tokens.values())
    for turn, size in enumerate(sizes):
        order = prompts[::-1] if turn % 2 else prompts[turn % len(prompts) :] + prompts[: turn % len(prompts)]
        seen.clear()
        assert draw(model, order, plan=plan, batch_rows=size, **settings) == tokens
        assert seen.keys() == together.keys()
        assert all(torch.equal(together[key], values) for key, values in seen.items()), size
    for prompt in prompts:
        seen.clear()
        assert draw(model, [prompt], plan=plan, batch_rows=64, **settings).items() <= tokens.items()
        assert all(torch.equal(together[key], values) for key, values in seen.items()), prompt


@pytest.mark.parametrize("scope", ["all", "generation", None])
@pytest.mark.cases(6)
def test_a_response_alone_is_that_in_a_larger_request_to_rounding(
    model: Any, scope: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it is run on the model's own weights, with its tokens behind its prompt's."""
    vector = torch.randn(adapt(model).d_model, generator=torch.Generator().manual_seed(0))
    plan = sims.SteeringPlan.addition({1: vector}, coefficient=0.7, scope=scope) if scope else NOTHING
    seen, settings = record(monkeypatch), {"max_new_tokens": 24, "temperature": 0.5}  # beyond a window of 8 tokens
    tokens = draw(model, LONG, plan=plan, **settings)
    together = dict(seen)
    for prompt in LONG:
        seen.clear()
        alone = draw(model, [prompt], n=1, plan=plan, **settings)
        assert alone == {(prompt, 0): tokens[prompt, 0]}
        assert len(seen) == min(len(tokens[prompt, 0]) + 1, 24)
        for key, values in seen.items():
            assert (values.log_softmax(-1) - together[key].log_softmax(-1)).abs().max() < 1e-4
    twin = twin_of(model, solo=True)
    assert isinstance(twin, Twin) and not twin.packed


def test_one_who_cuts_a_request_gets_the_same_bits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = twin_of(model)
    if not isinstance(twin, Twin) or not twin.packed:
        pytest.skip("only where weights are packed")
    seen = record(monkeypatch)
    draw(model, LONG)
    together = dict(seen)
    seen.clear()
    sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=6, top_k=None, temperature=1.0), solo=False)
    list(sampler.sample(LONG[-1:], n=1, plan=NOTHING, seed=0))
    assert seen and all(torch.equal(together[key], values) for key, values in seen.items())


@pytest.mark.cases(2)
def test_logits_are_the_same_to_the_bit_whatever_stands_beside(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    often(model, monkeypatch)
    vector = torch.randn(adapt(model).d_model, generator=torch.Generator().manual_seed(0))
    plan = sims.SteeringPlan.addition({1: vector}, coefficient=0.7, scope="all").decaying(3.0)
    check_bits(model, LONG, monkeypatch, plan=plan, sizes=(1, 2, 3, 7), max_new_tokens=12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steered", [False, True])
def test_so_are_those_of_a_real_model(kind: str, steered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "hooked":
        pytest.importorskip("transformer_lens.HookedTransformer")
    model = sims.load("embedded", kind=kind)
    prompts = [
        "Hi",
        "Tell me a story.",
        "What is rain?",
        "Write a poem about iron.",
        "List: " + "one, two, three, " * 60,
    ]
    vector = torch.randn(adapt(model).d_model, generator=torch.Generator().manual_seed(0))
    plan = sims.SteeringPlan.addition({8: vector}, coefficient=0.5) if steered else NOTHING
    check_bits(model, [*prompts, "Why?"], monkeypatch, plan=plan, sizes=(1, 7), n=4, max_new_tokens=12)


# --- continuous batching ---------------------------------------------------------------------------------------------


def often(model: Any, monkeypatch: pytest.MonkeyPatch, many: int = 20) -> None:
    """Make frequent tokens end responses, at different times."""
    free = draw(model, PROMPTS, n=8)
    common = Counter(token for row in free.values() for token in row).most_common(many)
    monkeypatch.setattr(type(adapt(model)), "stop_ids", tuple(token for token, _ in common))


@pytest.mark.parametrize(("count", "n"), [(4, 3), (12, 1)])
def test_places_are_taken_at_once_and_prompts_run_once(
    llama: Any, monkeypatch: pytest.MonkeyPatch, count: int, n: int
) -> None:
    often(llama, monkeypatch)
    prompts = [*PROMPTS, *(f"{i} and {'more ' * i}" for i in range(8))][:count]
    steps: list[tuple[int, int]] = []
    decoders: set[Decoder] = set()
    widths: list[int] = []
    step, logits = Decoder._step, type(twin_of(llama)).logits

    def spy(self: Decoder, *args: Any) -> None:
        decoders.add(self)
        steps.append((sum(row is not None for row in self.live), len(self.waiting)))
        assert len(self.prefixes.lengths) <= 4 and len(self.live) <= 4
        step(self, *args)

    def spy_on_logits(self: Twin, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        widths.append(len(tokens))
        return logits(self, tokens, *args, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(Decoder, "_step", spy)
    monkeypatch.setattr(type(twin_of(llama)), "logits", spy_on_logits)
    sampler = sims.LocalSampler(llama, sims.SamplingConfig(max_new_tokens=8, top_k=None, batch_rows=4))
    samples = list(sampler.sample(prompts, n=n, plan=NOTHING, seed=0))
    assert len(samples) == 12 and any(s.ended for s in samples) and len({len(s.tokens) for s in samples}) > 2
    assert max(widths) == 4 and sampler.count.prefill == sum(len(adapt(llama).encode(p)) for p in prompts)
    assert all(live == 4 for live, waiting in steps if waiting)
    (decoder,) = decoders
    assert set(decoder.prefixes.lengths) == {0} and not decoder.slot and not decoder.first


# --- choosing --------------------------------------------------------------------------------------------------------


def reference(logits: Any, temperature: float, top_k: int | None, top_p: float, min_p: float) -> Any:
    """The filtered distribution, in double precision, filter by filter."""
    scaled = logits / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if top_k is not None:
        p[np.argsort(-p, kind="stable")[top_k:]] = 0.0
        p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    if top_p < 1.0:
        p[order[before >= top_p]] = 0.0
    p[p < min_p * p.max()] = 0.0
    return p / p.sum()


FILTERS = [
    (None, 1.0, 0.0),
    (None, 1.0, 0.03),
    (None, 0.9, 0.0),
    (None, 0.6, 0.05),
    (20, 1.0, 0.0),
    (600, 0.8, 0.0),
    (40, 0.7, 0.1),
    (10**6, 0.999, 0.001),
]


@pytest.mark.parametrize("size", [40, 700, 50_000])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_choose_is_the_inverse_of_the_reference(size: int, top_k: int | None, top_p: float, min_p: float) -> None:
    rng = np.random.default_rng(size)
    rows = 12 if size > 1000 else 60
    logits = 2.5 * rng.standard_normal((rows, size))
    logits[:, ::7] = -np.inf
    logits[: rows // 2, : size // 2] = -np.inf  # whole blocks of nothing
    uniform = rng.random(rows)
    uniform[:4], uniform[-4:] = (0.0, 1.0 - 1e-16, 0.0, 1.0 - 1e-16), (0.0, 1.0 - 1e-16, 0.0, 1.0 - 1e-16)
    tokens = choose(
        torch.tensor(logits, dtype=torch.float32),
        torch.tensor(uniform),
        temperature=0.8,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    for row, token, share in zip(logits.astype(np.float32).astype(float), tokens.tolist(), uniform, strict=True):
        p = reference(row, 0.8, top_k, top_p, min_p)
        assert p[token] > 0.0
        if share == 0.0:
            assert token == np.flatnonzero(p)[0]
        elif share > 1.0 - 1e-12:
            assert p[token + 1 :].sum() < 1e-6  # the last one, but for what float32 rounds away
        else:
            end = p[: token + 1].sum()
            assert end - p[token] - 1e-4 <= share <= end + 1e-4


@pytest.mark.parametrize("size", [30, 3000])
@pytest.mark.parametrize("top_k", [None, 5])
def test_choose_among_equals(size: int, top_k: int | None) -> None:
    n = 600
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = choose(torch.zeros(n, size), uniform, temperature=1.0, top_k=top_k)
    wanted = size if top_k is None else top_k
    assert len(set(tokens.tolist())) == min(n, wanted)
    assert torch.equal(tokens, tokens.sort().values)
    if top_k is None:
        assert (tokens - uniform * size).abs().max() <= 1.001
    one = torch.full((n, size), -torch.inf)
    one[:, size // 2] = 3.0
    assert set(choose(one, uniform, temperature=1.0, top_k=top_k).tolist()) == {size // 2}


@pytest.mark.parametrize(("size", "top_k", "top_p", "min_p"), [(3000, None, 1.0, 0.0), (3000, 200, 0.95, 0.002)])
def test_choose_draws_from_the_distribution(size: int, top_k: int | None, top_p: float, min_p: float) -> None:
    n, bins = 20_000, 20
    logits = 2.0 * torch.randn(size, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options: dict[str, Any] = {"temperature": 1.1, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    parts = [choose(logits.expand(len(some), -1), some, **options) for some in uniform.split(2000)]
    p = reference(logits.double().numpy(), 1.1, top_k, top_p, min_p)
    group = np.minimum((np.cumsum(p) * bins).astype(int), bins - 1)
    expected = n * np.bincount(group, p, minlength=bins)
    found = np.bincount(group[torch.cat(parts).numpy()], minlength=bins)
    full = expected > 0
    assert ((found[full] - expected[full]) ** 2 / expected[full]).sum() < 43.8  # 99.9% with 19 degrees of freedom


# --- stop strings, dtypes, memory ------------------------------------------------------------------------------------


@contextmanager
def slow_road(model: Any) -> Iterator[None]:
    """Something is attached that changes nothing and that no twin can honour."""
    handle = model.blocks[1].register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def samples_of(model: Any, n: int = 3, **settings: Any) -> dict[tuple[int, int], Sample]:
    settings = {"max_new_tokens": 24, "top_k": None} | settings
    sampler = sims.LocalSampler(model, sims.SamplingConfig(**settings))
    found = list(sampler.sample(PROMPTS, n=n, plan=NOTHING, seed=0))
    assert len({(s.prompt, s.draw) for s in found}) == len(found) == n * len(PROMPTS)
    return {(s.prompt, s.draw): s for s in found}


def test_stop_strings_end_a_response(llama: Any) -> None:
    adapter, free = adapt(llama), samples_of(llama)
    pairs = Counter(s.text[i : i + 2] for s in free.values() for i in range(len(s.text) - 1))
    plain = [pair for pair, _ in pairs.most_common() if pair.isascii() and pair.isprintable()]
    stop = (plain[0], plain[1])  # a token is a byte, so that a stop string lies across two
    found = samples_of(llama, stop=stop)
    with slow_road(llama):
        assert samples_of(llama, stop=stop) == found
    cut = 0
    for key, sample in found.items():
        assert sample.text == adapter.decode(sample.tokens) and not any(text in sample.text for text in stop)
        assert free[key].tokens[: len(sample.tokens)] == sample.tokens
        places = [free[key].text.find(text) for text in stop if text in free[key].text]
        if places:
            cut += 1
            assert sample.ended and sample.text == free[key].text[: min(places)]
        else:
            assert sample == free[key]
    assert 0 < cut < len(found)


def test_a_token_that_a_stop_string_begins_in_is_left_out(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_adapter: Any, tokens: Sequence[int]) -> str:
        return "".join(("ab", "c\n", "\nd", "e")[token] for token in tokens)

    monkeypatch.setattr(type(adapt(llama)), "decode", decode)
    cut = sims.LocalSampler(llama, sims.SamplingConfig(stop=("\n\n", "zz")))._cut(adapt(llama))
    assert cut([0, 1]) is None and cut([0, 3, 0, 1]) is None
    assert cut([0, 1, 2]) == 1 and cut([1, 2]) == 0 and cut([0, 3, 1, 2]) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_both_kinds(llama: Any, dtype: str) -> None:
    greedy = draw(llama, PROMPTS, n=1, temperature=1e-4, max_new_tokens=1)
    half = draw(llama, PROMPTS, n=1, temperature=1e-4, max_new_tokens=1, dtype=dtype)
    assert sum(half[key] == greedy[key] for key in greedy) >= 3
    assert len(draw(llama, PROMPTS, n=2, dtype=dtype, plan=sims.SteeringPlan.addition({1: torch.ones(32)}))) == 8
    assert next(llama.parameters()).dtype == torch.float32
    assert draw(llama, PROMPTS, n=1, temperature=1e-4, max_new_tokens=1) == greedy


@pytest.mark.parametrize("native", [True, False])
def test_the_log_says_where_bfloat16_is_the_slower_choice(
    native: bool, llama: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sims_lens.sampling.local._multiplies_bfloat16", lambda: native)
    with caplog.at_level(logging.WARNING, "sims_lens"):
        draw(llama, PROMPTS[:1], n=1)
        assert not caplog.records
        draw(llama, PROMPTS[:1], n=1, dtype="bfloat16")
    assert [record.message for record in caplog.records] == (
        [] if native else ["this CPU has no bfloat16 products, so that float32 is faster on it"]
    )


def test_out_of_memory_makes_the_batch_smaller_and_loses_nothing(
    llama: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    often(llama, monkeypatch)
    expected = samples_of(llama, max_new_tokens=8, n=6)
    kind, left, calls = type(twin_of(llama)), Counter[tuple[int, int]](), [0]
    logits, leave = kind.logits, Decoder._leave

    def scarce(self: Twin, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        if len(tokens) > limit[0] and calls[0] > 8:  # some rows are done by then
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return logits(self, tokens, *args, **kwargs)  # type: ignore[no-any-return]

    def count(self: Decoder, row: Any) -> None:
        left[row.prompt, row.draw] += 1
        leave(self, row)

    limit = [2]
    monkeypatch.setattr(kind, "logits", scarce)
    monkeypatch.setattr(Decoder, "_leave", count)
    with caplog.at_level(logging.WARNING, "sims_lens"):
        assert samples_of(llama, max_new_tokens=8, n=6, batch_rows=12) == expected
    sizes = [record.args for record in caplog.records if "out of memory" in record.message]
    assert sizes == [(12, 6), (6, 3), (3, 1)]
    assert set(left.values()) == {1}  # none was finished twice
    limit[0], calls[0] = 0, 0
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        samples_of(llama, max_new_tokens=8, batch_rows=4)
    limit[0], calls[0] = 0, -10  # with one row too, but only after some are done
    sampler, got = sims.LocalSampler(llama, sims.SamplingConfig(max_new_tokens=3, top_k=None, batch_rows=2)), []
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        for sample in sampler.sample(PROMPTS, n=6, plan=NOTHING, seed=0):
            got.append(sample)
    assert 0 < len(got) < 6 * len(PROMPTS)
    monkeypatch.setattr(kind, "logits", logits)
    assert samples_of(llama, max_new_tokens=8, n=6) == expected


def test_so_it_does_on_the_slow_road(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = samples_of(llama, max_new_tokens=5)
    kind = type(adapt(llama))
    logits, limit = kind.logits, [2]

    def scarce(self: Any, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(tokens) > limit[0]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return logits(self, tokens, *args, **kwargs)  # type: ignore[no-any-return]

    assert road(llama).twin is not None
    monkeypatch.setattr(kind, "logits", scarce)
    with slow_road(llama):
        assert samples_of(llama, max_new_tokens=5) == expected
        limit[0] = 0
        with pytest.raises(RuntimeError, match="out of memory"):
            samples_of(llama, max_new_tokens=5)
        monkeypatch.setattr(kind, "logits", lambda *_args, **_kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            samples_of(llama, max_new_tokens=5)


# --- reading along ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (3, 4), (5, 64)])
@pytest.mark.parametrize("site", ["resid_post", "attn_out"])
def test_what_is_read_along_is_what_capture_reads(
    llama: Any, monkeypatch: pytest.MonkeyPatch, n: int, rows: int, site: str
) -> None:
    often(llama, monkeypatch)
    adapter = adapt(llama)
    vector = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(0))
    plan = sims.SteeringPlan.addition({1: vector}, coefficient=2.0).decaying(4.0)
    sampler = sims.LocalSampler(llama, sims.SamplingConfig(max_new_tokens=7, top_k=None, batch_rows=rows))
    assert sampler.reads(plan, site)
    found = list(sampler.sample_and_read(PROMPTS, n=n, plan=plan, seed=1, site=site))
    plain = {(s.prompt, s.draw): s for s in sampler.sample(PROMPTS, n=n, plan=plan, seed=1)}
    assert {(s.prompt, s.draw): s for s, _ in found} == plain and len(found) == len(plain)
    assert all((reading is None) == (not s.tokens) for s, reading in found)
    full = [(s, reading) for s, reading in found if reading is not None]
    assert n == 1 or (any(s.ended for s, _ in full) and any(len(s.tokens) == 7 for s, _ in full))
    texts = [(adapter.encode(PROMPTS[s.prompt]), s.tokens) for s, _ in full]
    with sims.steering(llama, plan):
        expected = sims.capture(llama, texts, site=site, scope="response").means
        tokens = capture_tokens(llama, texts, site=site, scope="response")
    for (_, reading), mean, stream in zip(full, expected, tokens, strict=True):
        assert (reading.mean - mean).norm() < 1e-5 * mean.norm()
        torch.testing.assert_close(reading.norms, stream.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_nothing_is_read_where_it_cannot_be(llama: Any) -> None:
    sampler = sims.LocalSampler(llama, sims.SamplingConfig(max_new_tokens=2))
    with slow_road(llama):
        assert not sampler.reads(NOTHING)
        with pytest.raises(ModelError, match="which is no HookPoint"):
            list(sampler.sample_and_read(PROMPTS, n=1, plan=NOTHING, seed=0))
    stopping = sims.LocalSampler(llama, sims.SamplingConfig(max_new_tokens=2, stop=("x",)))
    assert sampler.reads(NOTHING) and not stopping.reads(NOTHING)
    with pytest.raises(ModelError, match="stop strings"):
        list(stopping.sample_and_read(PROMPTS, n=1, plan=NOTHING, seed=0))
    llama.add_hook("blocks.1.hook_resid_post", lambda stream, hook: stream)
    try:
        with pytest.raises(ModelError, match="somebody else's hooks"):
            list(sampler.sample_and_measure(PROMPTS, n=1, plan=NOTHING, seed=0))
    finally:
        llama.reset_hooks()


class PlainSampler:
    """A sampler that reads nothing along."""

    def __init__(self, model: Any, config: sims.SamplingConfig) -> None:
        self.inner = sims.LocalSampler(model, config)
        self.count, self.sample = self.inner.count, self.inner.sample


def letters(prompt: str, responses: Sequence[str]) -> list[float]:
    return [sum(c in "aeiou" for c in r) / (1 + len(r)) + 1e-3 * len(set(r)) for r in responses]


def test_the_loop_learns_the_same_with_and_without_reading_along(llama: Any, tmp_path: Path) -> None:
    words = [f"Say {word}." for word in ("sea", "sky", "sun", "rain", "snow", "wind", "tree", "leaf", "root", "bird")]
    config = sims.SIMSConfig(
        iterations=2,
        sampling=sims.SamplingConfig(responses=3, max_new_tokens=6, top_k=None),
        ranking=sims.RankingConfig(audit="off"),
        steering=sims.SteeringConfig(layers=(1,)),
        evaluation=sims.EvaluationConfig(heldout=0.4, validation=0.0, samples=2, controls=0),
    )
    options: dict[str, Any] = {"config": config, "progress": False}
    run = sims.improve(llama, words, ranker=letters, out=tmp_path / "a", **options)
    plain = PlainSampler(llama, config.sampling)
    other = sims.improve(llama, words, ranker=letters, out=tmp_path / "b", sampler=plain, **options)
    assert run.samples(1, "train") == other.samples(1, "train")
    for mine, theirs in zip(run.iterations, other.iterations, strict=True):
        for name, tensor in mine.tensors.items():
            assert (tensor - theirs.tensors[name]).norm() <= 1e-4 * tensor.norm(), name
    assert not list(tmp_path.rglob("readings*"))

    calls = [0]

    def failing(prompt: str, responses: Sequence[str]) -> list[float]:
        calls[0] += 1
        if calls[0] in (4 + 3, 7 + 6 + 4 + 3):  # after the base model's 4 prompts, in the 6 of iteration 1; and of 2
            raise ValueError("out of credit")
        return letters(prompt, responses)

    failing.__name__ = letters.__name__
    for iteration in ("01", "02"):
        with pytest.raises(RankerError, match="out of credit"):
            sims.improve(llama, words, ranker=failing, out=tmp_path / "c", **options)
        (left,) = (tmp_path / "c").rglob("readings.safetensors")
        assert iteration in left.parent.name
    resumed = sims.improve(llama, words, ranker=failing, out=tmp_path / "c", **options)
    for mine, theirs in zip(run.iterations, resumed.iterations, strict=True):
        assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in mine.tensors.items())
    assert not list(tmp_path.rglob("readings*"))
