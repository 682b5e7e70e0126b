"""Best against worst, with every prompt that gives no pair counted, and a planted length bias removed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sims_lens.contrast import (
    best_against_worst,
    extremes,
    length_gap,
    length_slope,
    match_length,
    regress_out_length,
)
from sims_lens.data import ContrastPair, Sample, by_prompt
from sims_lens.errors import ConfigError
from sims_lens.stats import Interval

QUICK = settings(deadline=None, max_examples=60)  # a busy machine is no failure


def sample(prompt: int, draw: int, score: float, tokens: tuple[int, ...] = (1,)) -> Sample:
    return Sample(prompt=prompt, draw=draw, tokens=tokens, text="x", ended=False, score=score)


def test_pairs_and_reasons() -> None:
    samples = [
        *[sample(0, k, s) for k, s in enumerate((0.1, 0.9, 0.5))],
        *[sample(1, k, 0.5) for k in range(3)],
        *[sample(2, k, s) for k, s in enumerate((0.5, 0.55, 0.5))],
        sample(3, 0, 1.0),
        sample(3, 1, 0.0, tokens=()),
    ]
    contrast = best_against_worst(samples, min_margin=0.1)
    assert [(p.prompt, p.best.draw, p.worst.draw) for p in contrast.pairs] == [(0, 1, 0)]
    assert contrast.dropped == {"tie": 1, "margin": 1, "empty": 1}
    assert contrast.pairs[0].margin == 0.8


def test_ties_for_best_take_the_first_draw() -> None:
    contrast = best_against_worst([sample(0, k, s) for k, s in enumerate((1.0, 1.0, 0.0, 0.0))])
    assert (contrast.pairs[0].best.draw, contrast.pairs[0].worst.draw) == (0, 2)


def test_by_prompt_orders_prompts_and_draws() -> None:
    groups = by_prompt([sample(2, 1, 0.0), sample(0, 0, 0.0), sample(2, 0, 0.0)])
    assert [[(s.prompt, s.draw) for s in g] for g in groups] == [[(0, 0)], [(2, 0), (2, 1)]]


# Length


def planted(prompts: int = 200, draws: int = 6, *, bias: float = 0.3, seed: int = 0) -> list[Sample]:
    """Scores of a quality (standard deviation 1) and ``bias`` a token. The first token says the quality, in hundredths,
    so that it can be read off a pair; responses of some prompts are longer than those of others."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt in range(prompts):
        usual = int(rng.integers(20, 60))
        for k in range(draws):
            length, quality = usual + int(rng.integers(-8, 9)), float(rng.normal())
            tokens = (round(100 * quality), *range(length - 1))
            found.append(sample(prompt, k, quality + bias * length + 0.5 * usual, tokens))
    return found


def quality_gap(pairs: Sequence[ContrastPair]) -> float:
    return float(np.mean([p.best.tokens[0] - p.worst.tokens[0] for p in pairs])) / 100


def within_correlation(samples: Sequence[Sample]) -> float:
    """Correlation of score and length, both less their prompt's mean."""
    groups = by_prompt(samples)
    scores = np.concatenate([np.array([s.score for s in g]) - np.mean([s.score or 0 for s in g]) for g in groups])
    lengths = np.concatenate(
        [np.array([len(s.tokens) for s in g]) - np.mean([len(s.tokens) for s in g]) for g in groups]
    )
    return float(np.corrcoef(scores, lengths)[0, 1])


def test_a_planted_length_bias_is_reported_and_removed() -> None:
    samples = planted()
    plain = best_against_worst(samples)
    assert length_gap(plain.pairs).low > 8
    for length in ("match", "regress"):
        found = best_against_worst(samples, length=length)
        gap = length_gap(found.pairs)
        assert abs(gap.estimate) < 0.2 * length_gap(plain.pairs).estimate, length
        assert quality_gap(found.pairs) > 1.2 * quality_gap(plain.pairs), length
        assert set(found.dropped) >= {"tie", "margin", "empty"}
    assert length_gap(best_against_worst(samples, length="regress").pairs).low < 1


def test_match_holds_its_tolerance_and_counts_what_it_drops() -> None:
    samples = planted(draws=3)
    for tolerance in (0.0, 0.05, 0.1):
        found = match_length(samples, tolerance=tolerance)
        for p in found.pairs:
            longer = max(len(p.best.tokens), len(p.worst.tokens))
            assert abs(len(p.best.tokens) - len(p.worst.tokens)) <= tolerance * longer
        assert len(found.pairs) + sum(found.dropped.values()) == 200 and found.dropped["length"] > 0
    assert match_length(samples, tolerance=1.0).pairs == best_against_worst(samples).pairs


def test_match_takes_the_largest_margin_within_the_tolerance() -> None:
    rows = ((0.0, 10), (5.0, 30), (2.0, 11), (1.0, 11), (6.0, 31))
    (pair,) = match_length([sample(0, k, score, (1,) * length) for k, (score, length) in enumerate(rows)]).pairs
    assert (pair.best.draw, pair.worst.draw) == (2, 0)


def test_regressed_scores_do_not_correlate_with_length_and_keep_the_prompts_means() -> None:
    samples = planted()
    before = list(samples)
    assert length_slope(by_prompt(samples)) == pytest.approx(0.3, abs=0.03)
    regressed = regress_out_length(samples)
    assert within_correlation(samples) > 0.5 and abs(within_correlation(regressed)) < 1e-10
    assert length_slope(by_prompt(regressed)) == pytest.approx(0.0, abs=1e-12)
    for old, new in zip(by_prompt(samples), by_prompt(regressed), strict=True):
        assert np.mean([s.score or 0 for s in new]) == pytest.approx(np.mean([s.score or 0 for s in old]))
        assert [s.tokens for s in new] == [s.tokens for s in old]
    assert samples == before


def test_without_a_bias_hardly_anything_is_removed() -> None:
    samples = planted(bias=0.0)
    assert abs(length_slope(by_prompt(samples))) < 0.03
    plain, regressed = best_against_worst(samples), best_against_worst(samples, length="regress")
    assert quality_gap(regressed.pairs) == pytest.approx(quality_gap(plain.pairs), rel=0.03)


def test_equal_lengths_and_unranked_or_empty_responses_are_left_as_they_are() -> None:
    level = [sample(0, k, float(k), (1, 2)) for k in range(3)]
    assert regress_out_length(level) == level and length_slope([level]) == 0.0
    odd = [Sample(0, 3, (1,) * 9, "x", False), sample(1, 0, 1.0, ())]
    assert regress_out_length([*level, *odd])[3:] == odd


def test_what_a_ranker_did_not_tell_apart_is_no_pair_after_the_regression_either() -> None:
    samples = [*planted(prompts=20), sample(99, 0, 1.0, (1,) * 10), sample(99, 1, 1.0, (1,) * 30)]
    found = best_against_worst(samples, length="regress")
    assert 99 not in {p.prompt for p in found.pairs} and found.dropped["tie"] == 1


def test_length_gap_takes_the_mean_of_a_prompts_pairs_first() -> None:
    def pair(prompt: int, best: int, worst: int) -> ContrastPair:
        return ContrastPair(prompt, sample(prompt, 0, 1.0, (1,) * best), sample(prompt, 1, 0.0, (1,) * worst))

    gap = length_gap([pair(0, 10, 4), pair(0, 10, 8), pair(1, 5, 5)])
    assert gap.estimate == 2.0 and gap.low == 0.0 and gap.high == 4.0
    assert length_gap([]) == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": "shorten"}, "report, match, regress, got 'shorten'"), ({"tolerance": -0.1}, "tolerance")],
)
def test_a_length_control_that_is_none_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        best_against_worst(planted(prompts=2), **options)


scores = st.integers(-8, 8).map(float) | st.floats(-1e6, 1e6)


@QUICK
@given(
    st.lists(st.tuples(scores, st.integers(1, 12)), max_size=9), st.integers(1, 5), st.sampled_from([None, 0.0, 0.2])
)
def test_extremes_are_disjoint_with_falling_margins(
    rows: list[tuple[float, int]], count: int, tolerance: float | None
) -> None:
    samples = [sample(0, k, score, (1,) * length) for k, (score, length) in enumerate(rows)]
    found = extremes(samples, count=count, tolerance=tolerance)
    assert len(found) <= count and len({i for pair in found for i in pair}) == 2 * len(found)
    margins = [rows[b][0] - rows[w][0] for b, w in found]
    assert margins == sorted(margins, reverse=True) and all(m > 0 for m in margins)
    if tolerance is None and found:
        values = [score for score, _ in rows]
        assert found[0] == (values.index(max(values)), values.index(min(values)))
