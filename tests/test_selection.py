"""K goes where scores spread, as far as the budget reaches and no further."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sims_lens.data import Sample
from sims_lens.errors import ConfigError
from sims_lens.selection import allocate, expected_range, rank_prompts, shrunk_spread, spread

QUICK = settings(deadline=None, max_examples=60)  # a busy machine is no failure


def samples_of(scores: "dict[int, list[float]]") -> list[Sample]:
    return [Sample(i, k, (1,), "x", True, s) for i, row in scores.items() for k, s in enumerate(row)]


def test_spread_is_the_standard_deviation_within_prompts() -> None:
    samples = samples_of({3: [1.0, 2.0, 3.0], 0: [5.0, 5.0], 7: [1.0]})
    samples += [Sample(7, 1, (), "", True, 9.0), Sample(7, 2, (1,), "x", True)]  # empty; not ranked
    assert spread(samples) == {0: 0.0, 3: 1.0, 7: 0.0}
    assert rank_prompts(samples) == [3, 0, 7]


@QUICK
@given(st.dictionaries(st.integers(0, 20), st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1))
def test_shrinking_draws_spreads_together_and_keeps_their_order_at_equal_counts(scores: dict[int, list[float]]) -> None:
    raw, shrunk = spread(samples_of(scores)), shrunk_spread(samples_of(scores))
    assert set(raw) == set(shrunk)
    pooled = [v for v in shrunk_spread(samples_of(scores), prior=1e12).values()]
    assert max(pooled) - min(pooled) <= 1e-3 * max(pooled) + 1e-9
    low, high = min([*raw.values(), *pooled]), max([*raw.values(), *pooled])
    assert all(low - 1e-6 <= v <= high + 1e-6 for v in shrunk.values())
    assert shrunk_spread(samples_of(scores), prior=0.0) == pytest.approx(raw, abs=1e-9)
    for a in scores:
        for b in scores:
            if len(scores[a]) == len(scores[b]) and raw[a] < raw[b]:
                assert shrunk[a] <= shrunk[b] + 1e-9


def test_the_expected_range_is_that_of_normal_draws() -> None:
    drawn = np.random.default_rng(0).normal(size=(40_000, 16))
    for k in (2, 5, 16):
        assert expected_range(k) == pytest.approx(float(np.ptp(drawn[:, :k], axis=1).mean()), abs=0.02)
    steps = np.diff([expected_range(k) for k in range(1, 40)])
    assert (steps > 0).all() and (np.diff(steps) < 0).all()  # concave: this is why greedy is optimal


spreads = st.dictionaries(st.integers(0, 50), st.just(0.0) | st.floats(1e-3, 100), min_size=1, max_size=12)


@QUICK
@given(spreads=spreads, extra=st.integers(0, 60), k_min=st.integers(1, 3), k_more=st.integers(0, 8))
def test_the_budget_is_spent_exactly_and_spread_prompts_come_first(
    spreads: dict[int, float], extra: int, k_min: int, k_more: int
) -> None:
    k_max = k_min + k_more
    budget = k_min * len(spreads) + extra
    given_ = allocate(spreads, budget=budget, k_min=k_min, k_max=k_max)
    assert set(given_) == set(spreads)
    assert sum(given_.values()) == min(budget, k_max * len(spreads))
    assert all(k_min <= k <= k_max for k in given_.values())
    assert all(given_[a] >= given_[b] for a in spreads for b in spreads if spreads[a] > spreads[b])
    assert given_ == allocate(dict(reversed(spreads.items())), budget=budget, k_min=k_min, k_max=k_max)
    assert given_ == allocate({i: 7.0 * s for i, s in spreads.items()}, budget=budget, k_min=k_min, k_max=k_max) or any(
        not math.isfinite(7.0 * s) for s in spreads.values()
    )


@QUICK
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=3), st.integers(0, 8))
def test_greedy_is_optimal(sds: list[float], extra: int) -> None:
    budget = 2 * len(sds) + extra
    found = allocate(dict(enumerate(sds)), budget=budget, k_max=10)

    def worth(ks: tuple[int, ...]) -> float:
        return sum(sd * expected_range(k) for sd, k in zip(sds, ks, strict=True))

    every = [ks for ks in np.ndindex(*(11,) * len(sds)) if sum(ks) == budget and min(ks) >= 2]
    assert worth(tuple(found.values())) == pytest.approx(max(worth(ks) for ks in every))


def test_prompts_alike_get_alike() -> None:
    assert allocate(dict.fromkeys(range(5), 0.0), budget=17) == {0: 4, 1: 4, 2: 3, 3: 3, 4: 3}
    assert set(allocate(dict.fromkeys(range(10), 2.5), budget=40).values()) == {4}


@QUICK
@given(
    prompts=st.dictionaries(
        st.integers(0, 9), st.tuples(st.floats(0, 10), st.integers(5, 200)), min_size=1, max_size=8
    ),
    extra=st.integers(0, 3000),
)
def test_a_budget_of_tokens_is_not_overdrawn_and_not_wasted(prompts: dict[int, tuple[float, int]], extra: int) -> None:
    cost = {i: float(c) for i, (_, c) in prompts.items()}
    budget = 2 * sum(cost.values()) + extra
    found = allocate({i: s for i, (s, _) in prompts.items()}, budget=budget, cost=cost)
    left = budget - sum(k * cost[i] for i, k in found.items())
    assert left >= 0
    assert all(cost[i] > left for i, k in found.items() if k < 16)


def test_what_cannot_be_allocated_says_why() -> None:
    with pytest.raises(ConfigError, match=r"budget of 5 does not pay for 2 responses to each of 3 prompts \(6\)"):
        allocate({0: 1.0, 1: 1.0, 2: 1.0}, budget=5)
    with pytest.raises(ConfigError, match="k_min and k_max"):
        allocate({0: 1.0}, budget=5, k_min=4, k_max=3)
    with pytest.raises(ConfigError, match="cost of a response to prompt 1"):
        allocate({0: 1.0, 1: 1.0}, budget=50, cost={0: 1.0})
    with pytest.raises(ConfigError, match="spread of prompt 0"):
        allocate({0: math.nan}, budget=50)
    with pytest.raises(ConfigError, match="prior"):
        shrunk_spread([], prior=-1.0)
    assert allocate({}, budget=0) == {} and spread([]) == {} and rank_prompts([]) == []


def test_shrinking_costs_nothing_where_prompts_are_alike_and_gains_where_they_are_not() -> None:
    """The simulation that the module's docstring reports, smaller."""
    rng = np.random.default_rng(0)
    prompts, draws, repeats = 60, 4, 20

    def gain(sigma: float, shrink: bool) -> float:
        """Mean margin with an adaptive K, over that with an even one."""
        found = []
        for _ in range(repeats):
            true = np.exp(sigma * rng.normal(size=prompts))
            scores = rng.normal(size=(prompts, draws)) * true[:, None]
            samples = samples_of({i: row.tolist() for i, row in enumerate(scores)})
            ks = allocate(shrunk_spread(samples) if shrink else spread(samples), budget=draws * prompts)
            found.append(sum(true[i] * expected_range(k) for i, k in ks.items()) / (true.sum() * expected_range(draws)))
        return float(np.mean(found))

    assert gain(0.25, shrink=False) < 0.985 < 0.99 < gain(0.25, shrink=True)
    assert gain(0.8, shrink=True) > 1.04
