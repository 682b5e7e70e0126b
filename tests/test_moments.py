"""Streamed statistics are those of two passes over all rows, however the rows come."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sims_lens.errors import FitError
from sims_lens.estimators import shuffled_mean_differences, split_half_cosine
from sims_lens.moments import Moments, PairMoments, PairStream


def rows_of(count: int, *, seed: int = 0, offset: float = 300.0) -> Tensor:
    """Rows as a stream has them: what they have in common is far larger than what they differ by."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 1e-2, 50.0, 1.0])
    return (torch.randn(count, 3, 4, generator=generator) * scale + offset).float()


def streamed(rows: Tensor, sizes: Sequence[int]) -> Moments:
    moments = Moments.empty(3, 4)
    for part in rows.split(list(sizes)):
        moments = moments.update(part)
    return moments


@pytest.mark.parametrize("sizes", [[500], [1] * 500, [7, 0, 493], [250, 250]])
def test_they_are_those_of_two_passes(sizes: list[int]) -> None:
    rows = rows_of(500)
    moments = streamed(rows, sizes)
    exact = rows.double()
    assert moments.count == 500 and moments.mean.dtype == torch.float64
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, exact.var(0), rtol=1e-9, atol=0)


def test_a_small_difference_of_large_means_survives_a_million_additions() -> None:
    """A float32 sum of as many rows has lost it."""
    up, down = rows_of(1000, offset=4000.0), rows_of(1000, offset=4000.0) - 1e-3
    one, other = Moments.empty(3, 4), Moments.empty(3, 4)
    for _ in range(100):
        one, other = one.update(up), other.update(down)
    wanted = (up.double() - down.double()).mean(0)
    torch.testing.assert_close(one.mean - other.mean, wanted, rtol=1e-6, atol=1e-9)
    in_float = sum((up.sum(0) for _ in range(100)), torch.zeros(3, 4)) / 1e5
    in_float = in_float - sum((down.sum(0) for _ in range(100)), torch.zeros(3, 4)) / 1e5
    assert not torch.allclose(in_float.double(), wanted, rtol=1e-2)


def test_merging_is_the_same_in_any_order() -> None:
    rows = rows_of(90)
    parts = [Moments.of(part) for part in rows.split([1, 30, 59])]
    a, b, c = parts
    for whole in (a.merge(b).merge(c), c.merge(a).merge(b), a.merge(b.merge(c))):
        assert whole.count == 90
        torch.testing.assert_close(whole.mean, rows.double().mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(whole.squares / 89, rows.double().var(0), rtol=1e-9, atol=0)
    none = Moments.empty(3, 4)
    assert torch.equal(none.merge(a).mean, a.mean) and torch.equal(a.merge(none).squares, a.squares)


def test_nothing_that_was_given_changes() -> None:
    rows = rows_of(5)
    before, first = rows.clone(), Moments.of(rows[:2])
    mean = first.mean.clone()
    second = first.update(rows[2:])
    assert torch.equal(rows, before) and torch.equal(first.mean, mean) and first.count == 2 and second.count == 5


def test_no_rows_and_one() -> None:
    none, one = Moments.empty(2), Moments.of(torch.tensor([[1.0, 2.0]]))
    assert none.count == 0 and none.mean.tolist() == [0.0, 0.0] and bool(none.variance.isnan().all())
    assert one.mean.tolist() == [1.0, 2.0] and bool(one.variance.isnan().all())
    assert Moments.of(torch.empty(0, 3, 4)).mean.shape == (3, 4)


def test_rows_of_another_shape_are_refused() -> None:
    with pytest.raises(FitError, match=r"shape \[2\] and \[3\] can't be merged"):
        Moments.empty(2).merge(Moments.empty(3))


def test_pairs_have_all_that_is_linear_in_their_differences() -> None:
    best, worst = rows_of(101, seed=1), rows_of(101, seed=2)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(101, generator=generator)
    half = torch.zeros(1, 101).index_fill(1, order[:50], 1.0)
    signs = torch.randint(0, 2, (3, 101), generator=torch.Generator().manual_seed(7)).float() * 2 - 1
    weights = torch.cat([half, signs])
    found = PairMoments.empty(4, 3, 4)
    for some in torch.randperm(101).split(17):
        found = found.update(best[some], worst[some], weights[:, some])
    exact = best.double() - worst.double()
    assert found.positive.count == found.negative.count == found.difference.count == 101
    torch.testing.assert_close(found.positive.mean, best.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.negative.variance, worst.double().var(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.difference.mean, exact.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.difference.variance, exact.var(0), rtol=1e-9, atol=0)

    first, second = found.sums[0], found.difference.mean * 101 - found.sums[0]
    cosine = torch.cosine_similarity(first, second, dim=-1)
    torch.testing.assert_close(cosine.float(), split_half_cosine(best, worst, seed=5, splits=1), rtol=1e-3, atol=1e-5)
    shuffled = shuffled_mean_differences(best, worst, count=3, seed=7)
    torch.testing.assert_close((found.sums[1:] / 101).float(), shuffled, rtol=1e-4, atol=1e-4)


def test_a_stream_of_pairs_is_the_same_at_every_layer() -> None:
    best, worst = rows_of(40, seed=1), rows_of(40, seed=2)
    weights = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    stream, whole = PairStream(3, 3, 4), PairMoments.empty(3, 3, 4).update(best, worst, weights)
    assert stream.moments.difference.count == 0
    for some in torch.arange(40).split(9):
        stream.update(best[some], worst[some], weights[:, some])
    found = stream.moments
    assert found.positive.count == found.negative.count == found.difference.count == 40
    for one, other in ((found.positive, whole.positive), (found.negative, whole.negative)):
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(one.squares, other.squares, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.difference.squares, whole.difference.squares, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.sums, whole.sums, rtol=1e-9, atol=1e-9)
