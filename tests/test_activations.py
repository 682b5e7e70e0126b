"""Reading the stream: the means are those of a computation by hand, whatever the batch, the padding and the kind."""

import math
from typing import Any

import pytest
import torch
from common import SITES, fingerprint, plan_of, random_rows, random_tokens, vector
from torch import Tensor

from sims_lens import TokenScope
from sims_lens.activations import capture, masked_mean, residual_norms
from sims_lens.adapter import adapt
from sims_lens.errors import ModelError, PlanError
from sims_lens.hooks import steering
from sims_lens.prompts import everyday
from sims_lens.scope import left_padded_regions

ROWS = random_rows([(4, 3), (1, 5), (9, 2), (6, 4), (3, 1)])
SCOPES = ("all", "prompt", "last_prompt", "response", "generation", TokenScope(prompt=True, response=True))


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
    with pytest.raises(ModelError, match=f"row 1 has no token in scope '{name}'"):
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


def test_a_masked_mean_leaves_out_what_is_masked() -> None:
    stream = torch.tensor([[[1.0], [2.0], [torch.inf]]])
    mask = torch.tensor([[True, True, False]])
    assert masked_mean(stream, mask).tolist() == [[1.5]]


def test_the_input_is_not_changed(llama: Any) -> None:
    rows = [(list(prompt), list(response)) for prompt, response in ROWS]
    capture(llama, rows)
    assert rows == ROWS
    tuples = [(tuple(prompt), tuple(response)) for prompt, response in ROWS]
    assert torch.equal(capture(llama, tuples).means, capture(llama, rows).means)
    assert random_tokens(1, 4).tolist() == random_tokens(1, 4).tolist()
