"""Reading the stream: the means are those of a computation by hand, whatever the batch, the padding and the kind."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import SITES, fingerprint, plan_of, random_rows, random_tokens, vector
from safetensors import safe_open
from torch import Tensor

from sims_lens import SteeringPlan, TokenScope, activations
from sims_lens.activations import (
    Row,
    capture,
    capture_moments,
    capture_tokens,
    masked_mean,
    masked_sum,
    residual_norms,
)
from sims_lens.adapter import adapt
from sims_lens.capture_store import FILE, StoredTokens
from sims_lens.errors import ConfigError, ModelError, PlanError
from sims_lens.hooks import steering
from sims_lens.prompts import everyday
from sims_lens.scope import left_padded_regions

ROWS = random_rows([(4, 3), (1, 5), (9, 2), (6, 4), (3, 1)])
SCOPES = ("all", "prompt", "last_prompt", "response", "generation", TokenScope(prompt=True, response=True))


def ids(length: int, seed: int) -> list[int]:
    return random_tokens(1, length, seed=seed)[0].tolist()


def alike(kind: str) -> list[Row]:
    """Nine rows, with which a beginning, or the prompts, or both are shared."""
    start = ids(20, 100) if kind != "prompts" else []
    if kind == "beginning":
        return [([*start, *ids(3 + k, k)], ids(1 + k % 4, 50 + k)) for k in range(9)]
    ends = [ids(length, length) for length in ((12, 15, 9) if start else (30, 17, 40))]
    return [([*start, *ends[k % 3]], ids(1 + k % 5, 50 + k)) for k in range(9)]


SHARED = ("beginning", "prompts", "both")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens have been run, padding included, pass by pass."""
    sizes: list[int] = []
    before = activations._run

    def counting(adapter: Any, tokens: Tensor, *others: Any) -> None:
        sizes.append(tokens.numel())
        before(adapter, tokens, *others)

    monkeypatch.setattr(activations, "_run", counting)
    yield sizes


def alone(model: Any, rows: list[Row], **options: Any) -> list[activations.Activations]:
    """Every row in a pass of its own, which shares nothing."""
    return [capture(model, [row], **options) for row in rows]


def streams(model: Any, site: str = "resid_post") -> list[Tensor]:
    """TransformerLens' own cache of each row, alone and without padding: ``[layer, pos, d_model]``."""
    names = [f"blocks.{layer}.hook_{site}" for layer in range(model.cfg.n_layers)]
    caches = [model.run_with_cache(torch.tensor([[*prompt, *response]]))[1] for prompt, response in ROWS]
    return [torch.stack([cache[name][0] for name in names]).detach() for cache in caches]


def by_hand(rows: list[Tensor], scope: TokenScope | str) -> tuple[Tensor, Tensor]:
    """Means and median norms."""
    means, norms = [], []
    for (prompt, response), stream in zip(ROWS, rows, strict=True):
        length = len(prompt) + len(response)
        mask = TokenScope.of(scope).mask(left_padded_regions([len(prompt)], [length], length))[0]
        means.append(stream[:, mask].mean(1))
        norms.append(stream[:, 1:][:, mask[1:]].norm(dim=-1))
    ordered = torch.cat(norms, dim=1).sort(dim=1).values
    return torch.stack(means), ordered[:, (ordered.shape[1] - 1) // 2]


@pytest.mark.parametrize("site", SITES)
def test_means_and_norms_are_those_of_a_computation_by_hand(model: Any, site: str) -> None:
    rows = streams(model, site)
    for scope in SCOPES:
        read = capture(model, ROWS, site=site, scope=scope, batch_rows=3)
        means, norms = by_hand(rows, scope)
        assert read.means.dtype == torch.float32 and not read.means.requires_grad
        torch.testing.assert_close(read.means, means, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(read.median_norm, norms, atol=1e-4, rtol=1e-4)


def test_rows_keep_their_order_whatever_the_batches(llama: Any) -> None:
    sizes: list[int] = []
    expected = capture(llama, ROWS, advance=sizes.append)
    assert sizes == [5]
    for batch_rows in (1, 2, 4):
        read = capture(llama, ROWS, batch_rows=batch_rows, advance=sizes.append)
        torch.testing.assert_close(read.means, expected.means, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(read.median_norm, expected.median_norm, atol=1e-4, rtol=1e-4)
    assert sizes == [5, 1, 1, 1, 1, 1, 2, 2, 1, 4, 1]


def test_both_kinds_read_alike(pair: tuple[Any, Any]) -> None:
    for site in SITES:
        hooked, bridge = (capture(model, ROWS, site=site, scope="generation") for model in pair)
        assert torch.cosine_similarity(hooked.means, bridge.means, dim=-1).min() > 0.9999
        torch.testing.assert_close(hooked.median_norm, bridge.median_norm, rtol=1e-4, atol=1e-4)
        assert torch.cosine_similarity(hooked.means[0], hooked.means[1], dim=-1).max() < 0.99  # not all the same


def test_the_first_position_is_no_part_of_the_norm(llama: Any) -> None:
    """A huge value there, as real models have, moves the mean but not the unit."""

    def enlarge(value: Tensor, hook: Any) -> Tensor:
        first = torch.arange(value.shape[1])[None] == (value.shape[1] - lengths[: len(value)])[:, None]
        return torch.where(first[..., None], 1e4 * value, value)

    rows = ROWS[:4]
    lengths = torch.tensor(sorted(len(prompt) + len(response) for prompt, response in rows))
    plain = capture(llama, rows, scope="all")
    with llama.hooks(fwd_hooks=[("blocks.2.hook_resid_post", enlarge)]):
        read = capture(llama, rows, scope="all")
    assert torch.equal(read.median_norm, plain.median_norm)
    assert (read.means[:, 2].norm(dim=-1) > 100 * plain.means[:, 2].norm(dim=-1)).all()

    alone = capture(llama, [([20], [])], scope="all")  # nothing but a first position
    assert all(math.isnan(norm) for norm in alone.median_norm.tolist())
    assert alone.means.isfinite().all()


def test_within_steering_the_steered_stream_is_read(model: Any) -> None:
    plain = capture(model, ROWS, scope="response")
    with steering(model, plan_of(1)):
        steered = capture(model, ROWS, scope="response")
        expected, _ = by_hand(streams(model), "response")
    torch.testing.assert_close(steered.means, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(steered.means[:, 1], plain.means[:, 1] + 2.0 * vector(1), atol=1e-4, rtol=1e-4)
    assert torch.equal(steered.means[:, 0], plain.means[:, 0])
    assert (steered.means[:, 2] - plain.means[:, 2]).norm(dim=-1).min() > 0.1


def test_a_declared_prompt_ends_where_each_row_says(llama: Any) -> None:
    plain = capture(llama, ROWS, site="resid_pre", scope="generation")
    with steering(llama, plan_of(2, site="resid_pre", scope="response")):
        read = capture(llama, ROWS, site="resid_pre", scope="generation", batch_rows=2)
    shares = torch.tensor([len(response) / (len(response) + 1) for _, response in ROWS])  # one token is the prompt's
    moved = 2.0 * vector(2) * shares[:, None]
    torch.testing.assert_close(read.means[:, 2], plain.means[:, 2] + moved, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "scope"),
    [
        ([([20, 21], [22]), ([20], [])], "response"),
        ([([20, 21], [22]), ([], [])], "all"),
        ([([20, 21], [22]), ([], [20])], "prompt"),
        ([([20, 21], [22]), ([], [20])], "last_prompt"),
        ([([20, 21], [22]), ([20], [])], TokenScope(prompt=True)),
    ],
    ids=["no response", "nothing", "no prompt", "no last token", "only a last token"],
)
def test_a_row_without_tokens_in_scope_is_named(llama: Any, rows: Any, scope: TokenScope | str) -> None:
    name = TokenScope.of(scope).name
    with pytest.raises(ModelError, match=rf"row 1, \(.*\), has no token in scope '{name}'; leave"):
        capture(llama, rows, scope=scope)


def test_no_rows_give_no_means(llama: Any) -> None:
    assert capture(llama, []).means.shape == (0, 3, 32)


def test_a_failed_capture_leaves_no_hooks(llama: Any) -> None:
    class Stop(BaseException):
        pass

    def stop(value: Tensor, hook: Any) -> None:
        raise Stop

    before = fingerprint(llama)
    with pytest.raises(Stop), llama.hooks(fwd_hooks=[("blocks.1.hook_resid_post", stop)]):
        capture(llama, ROWS)
    with pytest.raises(PlanError, match="has no hook point blocks.0.hook_nothing"):
        capture(llama, ROWS, site="nothing")
    with pytest.raises(PlanError, match="scope 'answers' is not one of"):
        capture(llama, ROWS, scope="answers")
    assert fingerprint(llama) == before


def test_residual_norms_are_measured_on_prompts_as_the_model_sees_them(model: Any) -> None:
    adapter, texts = adapt(model), ["One prompt.", "Another, longer one?"]
    norms = residual_norms(model, site="attn_out", prompts=texts)
    expected = capture(model, [(adapter.encode(text), ()) for text in texts], site="attn_out", scope="all").median_norm
    assert norms == pytest.approx(dict(enumerate(expected.tolist())))
    packaged = capture(model, [(adapter.encode(text), ()) for text in everyday(16)], scope="prompt").median_norm
    assert residual_norms(model) == pytest.approx(dict(enumerate(packaged.tolist())))


def decaying(scope: str) -> SteeringPlan:
    """A plan that steers those tokens, less and less."""
    (one,) = plan_of(1, scope=scope).interventions
    return SteeringPlan((replace(one, half_life=2.0),))


@pytest.mark.cases(4)
def test_what_rows_share_changes_nothing(model: Any, run: list[int]) -> None:
    for shared in SHARED:
        rows = alike(shared)
        with steering(model, decaying("generation")):
            for scope in ("all", "response"):
                found = capture(model, rows, scope=scope)
                expected = torch.cat([one.means for one in alone(model, rows, scope=scope)])
                torch.testing.assert_close(found.means, expected, atol=1e-4, rtol=1e-4)
    assert bool(run) is ("gemma" not in adapt(model).name)  # it has windows


@pytest.mark.parametrize("steered", ["all", "prompt", "last_prompt", "generation", "response"])
@pytest.mark.cases(4)
def test_whatever_is_steered_and_read(llama: Any, steered: str) -> None:
    for shared in SHARED:
        rows = alike(shared)
        with steering(llama, decaying(steered)):
            every = capture_tokens(llama, rows, scope="all", batch_rows=1)
            for scope in (*SCOPES, TokenScope(prompt=True)):
                expected = [
                    t[TokenScope.of(scope).mask(left_padded_regions([len(p)], [len(t)], len(t)))[0]].mean(0)
                    for t, (p, _) in zip(every, rows, strict=True)
                ]
                found = capture(llama, rows, scope=scope).means
                torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", SHARED)
def test_what_rows_share_is_run_once(llama: Any, shared: str, run: list[int]) -> None:
    rows = alike(shared)
    tokens = sum(len(prompt) + len(response) for prompt, response in rows)
    for scope in ("response", "all"):
        run.clear()
        found = capture(llama, rows, scope=scope)
        assert sum(run) < 0.7 * tokens
        every = torch.cat([t.norm(dim=-1)[first:] for t, first in norms_of(llama, rows, scope)])
        torch.testing.assert_close(found.median_norm, every.median(0).values, atol=1e-4, rtol=1e-4)
    run.clear()
    capture(llama, rows, scope="last_prompt")
    assert sum(run) <= sum(len(prompt) for prompt, _ in rows)  # no response


def norms_of(model: Any, rows: list[Row], scope: str) -> list[tuple[Tensor, int]]:
    """Tokens of each row, read alone, and how many of them are first positions."""
    return [(capture_tokens(model, [row], scope=scope)[0], int(scope == "all")) for row in rows]


@pytest.mark.parametrize("shared", SHARED)
def test_every_token_of_rows_that_share(llama: Any, shared: str) -> None:
    rows = alike(shared)
    for scope in ("all", "generation", "response", TokenScope(prompt=True, response=True)):
        found = capture_tokens(llama, rows, scope=scope, layers=(2, 0))
        for row, tokens in zip(rows, found, strict=True):
            (expected,) = capture_tokens(llama, [row], scope=scope, layers=(2, 0))
            torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_hooks_of_others_see_whole_rows(llama: Any, run: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "BATCH_TOKENS", 1024)
    rows, seen = alike("both"), []
    with llama.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: seen.append(value.shape))]):
        read = capture(llama, rows, scope="response")
    assert seen == [(9, max(len(p) + len(r) for p, r in rows), 32)] and not run
    torch.testing.assert_close(read.means, capture(llama, rows, scope="response").means, atol=1e-4, rtol=1e-4)

    def see(_module: Any, _args: Any, output: Any) -> None:
        seen.append(())

    handle = llama.blocks[1].register_forward_hook(see)
    capture(llama, rows, scope="response")
    handle.remove()
    assert not [size for size in run if size == 9] and len(seen) == 2


def test_a_batch_holds_so_many_tokens(llama: Any, run: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows([(3 + k % 20, 1 + k % 7) for k in range(60)])
    whole = capture(llama, rows)
    monkeypatch.setattr(activations, "BATCH_TOKENS", 64)
    run.clear()
    done: list[int] = []
    parts = capture(llama, rows, advance=done.append)
    assert max(run) <= 64 and len(run) > 15 and sum(done) == 60
    torch.testing.assert_close(parts.means, whole.means, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", SHARED)
def test_streamed_pairs_have_the_moments_of_what_capture_reads(
    llama: Any, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "_BLOCK_PAIRS", 3)
    rows = alike(shared)
    positive, negative = [*rows[:4], *rows[1:5]], [*rows[4:8], *rows[5:9]]
    weights = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    found = capture_moments(
        llama,
        positive,
        negative,
        sites=("resid_post", "attn_out"),
        layers=(2, 0),
        scope="generation",
        weights=weights,
        keep=(6, 1),
        advance=done.append,
    )
    assert sum(done) == 16 and set(found) == {"resid_post", "attn_out"}
    for site, read in found.items():
        whole = capture(llama, [*positive, *negative], site=site, scope="generation")
        best, worst = whole.means[:, [2, 0]].double().tensor_split(2)
        close = {"atol": 1e-4, "rtol": 1e-4}
        moments = read.moments
        assert read.layers == (2, 0) and moments.positive.count == moments.difference.count == 8
        torch.testing.assert_close(moments.positive.mean, best.mean(0), **close)
        torch.testing.assert_close(moments.negative.variance, worst.var(0), **close)
        torch.testing.assert_close(moments.difference.variance, (best - worst).var(0), **close)
        torch.testing.assert_close(moments.sums, torch.einsum("gp,pld->gld", weights.double(), best - worst), **close)
        for kept, wanted in ((read.kept_positive, best[[6, 1]]), (read.kept_negative, worst[[6, 1]])):
            assert kept.dtype == torch.float32
            rounding = 2**-11 * wanted.abs().amax(-1, keepdim=True)
            assert ((kept - wanted).abs() <= rounding + 1e-4).all()
        torch.testing.assert_close(read.median_norm, whole.median_norm[[2, 0]], **close)


def test_the_median_of_very_many_tokens_is_that_of_some(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows([(2, 30) for _ in range(40)])
    exact = capture_moments(llama, rows[:20], rows[20:])["resid_post"].median_norm
    monkeypatch.setattr(activations, "_NORM_TOKENS", 320)
    one, other = (capture_moments(llama, rows[:20], rows[20:])["resid_post"].median_norm for _ in range(2))
    assert torch.equal(one, other) and not torch.equal(one, exact)
    torch.testing.assert_close(one, exact, rtol=0.1, atol=0)


def test_pairs_that_cannot_be_streamed(llama: Any) -> None:
    before = fingerprint(llama)
    with pytest.raises(ModelError, match="2 positive and 3 negative texts"):
        capture_moments(llama, ROWS[:2], ROWS[:3])
    with pytest.raises(ModelError, match="a column for each of 2 pairs, got"):
        capture_moments(llama, ROWS[:2], ROWS[2:4], weights=torch.ones(1, 4))
    with pytest.raises(ModelError, match=r"row 3, \(\[20\], \[\]\), has no token in scope 'response'"):
        capture_moments(llama, ROWS[:2], [ROWS[2], ([20], [])])
    with pytest.raises(PlanError, match=r"layer 3 is not in 0\.\.2"):
        capture_moments(llama, ROWS[:2], ROWS[2:4], layers=(3,))
    with pytest.raises(PlanError, match="has no hook point blocks.0.hook_nothing"):
        capture_moments(llama, ROWS[:2], ROWS[2:4], sites=("nothing",))
    assert fingerprint(llama) == before
    assert capture_moments(llama, [], [])["resid_post"].moments.difference.count == 0


@pytest.mark.parametrize("shared", SHARED)
def test_tokens_on_disk_are_those_in_memory(llama: Any, tmp_path: Path, shared: str) -> None:
    rows = alike(shared)
    expected = capture_tokens(llama, rows, layers=(2, 0), scope="generation")
    found = capture_tokens(llama, rows, layers=(2, 0), scope="generation", out=tmp_path / "new")
    assert isinstance(found, StoredTokens) and len(found) == len(rows)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [t.shape for t in found[1:3]] == [t.shape for t in expected[1:3]] and torch.equal(found[-1], expected[-1])
    assert (found.layers, found.site) == ((2, 0), "resid_post") and "9 rows" in repr(found)
    with pytest.raises(IndexError):
        found[9]

    whole = torch.cat(list(expected))
    with safe_open(str(found.path), "pt") as file:  # any reader of safetensors
        assert torch.equal(file.get_tensor("tokens"), whole)
        starts = file.get_tensor("starts").tolist()
        assert torch.equal(file.get_slice("tokens")[starts[3] : starts[4]], expected[3])
    assert found.nbytes == whole.numel() * 4 and list((tmp_path / "new").iterdir()) == [found.path]

    row = StoredTokens(tmp_path / "new")[0]
    row += 1.0  # the file stays as it is
    assert torch.equal(StoredTokens(found.path)[0], expected[0])


def test_the_size_of_what_goes_to_disk_is_known_before_it_is_run(
    llama: Any, tmp_path: Path, run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(response) for _, response in ROWS) * 3 * 32 * 4
    with pytest.raises(
        ConfigError, match=r"15 tokens at 3 layers take 0\.0 MiB, limit_bytes is .*; capture fewer rows"
    ):
        capture_tokens(llama, ROWS, out=tmp_path, limit_bytes=size - 1)
    assert not run and not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10})())
    with pytest.raises(ConfigError, match=r"has 0\.0 MiB free"):
        capture_tokens(llama, ROWS, out=tmp_path, limit_bytes=size)
    monkeypatch.undo()
    assert capture_tokens(llama, ROWS, out=tmp_path, limit_bytes=size).nbytes == size


def test_a_file_is_whole_or_absent(llama: Any, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(count: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        capture_tokens(llama, ROWS, out=tmp_path, advance=stop)
    assert not list(tmp_path.iterdir())
    before = capture_tokens(llama, ROWS, out=tmp_path, layers=(1,))
    with pytest.raises(Stop):
        capture_tokens(llama, ROWS, out=tmp_path, advance=stop)
    assert list(tmp_path.iterdir()) == [before.path] and StoredTokens(tmp_path).layers == (1,)


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*No such file"):
        StoredTokens(tmp_path / "missing")
    header = json.dumps({"__metadata__": {"sims_lens.tokens": "{}"}}).encode()
    for content in (b"", b"\xff" * 100, len(header).to_bytes(8, "little") + header, b"\x02" + bytes(7) + b"[]"):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ConfigError, match="is not a file of captured tokens"):
            StoredTokens(tmp_path)


def test_a_file_that_was_cut_short(llama: Any, tmp_path: Path) -> None:
    found = capture_tokens(llama, ROWS, out=tmp_path)
    found.path.write_bytes(found.path.read_bytes()[:-4])
    with pytest.raises(ConfigError, match="its length is not what its header says"):
        StoredTokens(tmp_path)


def test_a_masked_mean_leaves_out_what_is_masked() -> None:
    stream = torch.tensor([[[1.0], [2.0], [torch.inf]]])
    mask = torch.tensor([[True, True, False]])
    assert masked_mean(stream, mask).tolist() == [[1.5]] and masked_sum(stream, mask).tolist() == [[3.0]]


def test_the_input_is_not_changed(llama: Any) -> None:
    rows = [(list(prompt), list(response)) for prompt, response in ROWS]
    capture(llama, rows)
    assert rows == ROWS
    tuples = [(tuple(prompt), tuple(response)) for prompt, response in ROWS]
    assert torch.equal(capture(llama, tuples).means, capture(llama, rows).means)
    assert random_tokens(1, 4).tolist() == random_tokens(1, 4).tolist()
