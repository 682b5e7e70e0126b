"""From a ranker's answers to figures: the whole audit, and the light one for the pairs of an iteration."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from sims_lens.auditing.agreement import (
    correlation_interval,
    cyclic_share,
    kendall_tau,
    pair_signs,
    rate_interval,
    same_verdict,
)
from sims_lens.auditing.ask import Asker
from sims_lens.auditing.known_answers import known_pairs
from sims_lens.auditing.result import MEASURES, Audit, MarginBand, PairAudit
from sims_lens.checks import check_integer, check_list, check_seed, shown
from sims_lens.contrast import length_gap
from sims_lens.data import ContrastPair
from sims_lens.errors import PromptError
from sims_lens.prompts import check_prompts, quote
from sims_lens.stats import Interval, bootstrap_mean

# An underscore frees an axis: the arrays of a list are of different lengths, one for each prompt.
_Signs: TypeAlias = Float[np.ndarray, " _pair"]
_Outcomes: TypeAlias = Float[np.ndarray, " _comparison"]
_Matrix: TypeAlias = Float[np.ndarray, "_response _response"]
_Found: TypeAlias = tuple[Interval | None, int]
"""An interval, and how many comparisons are behind it."""


def audit(
    ranker: object,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    reference: object = None,
    seed: int = 0,
    repeats: int = 2,
) -> Audit:
    """Measure how far a ranker can be trusted, on prompts and responses without any annotation.

    For P prompts with K responses each, the ranker gets P lists of K ``repeats + 1`` times, 6 P lists of two and, where
    it gives single verdicts on pairs, P matrices. Responses to a prompt that are the same text count once.

    Beside its scores, an object may offer the following; each is optional:

    - ``judges``: True for a judge, see :mod:`sims_lens.auditing.result`;
    - ``matrix(prompt, responses)``: single verdicts, in row i and column j the probability that response i is better
      where i is shown first and j second; NaN where nobody asked;
    - ``uncached()``: the same ranker without its memory of verdicts, which is asked for the repetitions;
    - ``rank_all`` and ``count``, see :mod:`sims_lens.rankers.base`.

    Args:
        ranker: what :func:`~sims_lens.rankers.as_ranker` accepts.
        prompts: distinct, as the ranker will see them.
        responses: for each prompt, real responses of the model that is to be improved.
        reference: a ranker to compare with, for instance an oracle of what the judge is asked about.
        seed: of the known-answer pairs, and of the bootstrap of ``spread``.
        repeats: how often each list is asked in the same order; 1 leaves stability out.

    Returns:
        The measures, with their intervals, the cost and the verdict.

    Raises:
        PromptError: the prompts, or the lists of responses, are not of the right form.
        ConfigError: ``repeats`` is less than 1.
        RankerError: a ranker raised, or did not return one finite score per response.

    Reference: position consistency and repetition stability as in Shi et al. 2024, "Judging the Judges" (arXiv
        2406.07791), ties half. Known-answer pairs are in the spirit of LLMBar (Zeng et al. 2024), built from the
        responses themselves instead of by annotators.
    """
    texts = check_prompts(prompts)
    groups = _distinct(texts, responses)
    check_integer("repeats, how often the ranker is asked,", repeats)
    check_seed(seed)
    asker, compared = Asker(ranker), None if reference is None else Asker(reference)
    items = [(text, group) for text, group in zip(texts, groups, strict=True) if len(group) > 1]
    size = [len(group) - 1 for _, group in items]
    scores = asker.rank(items)
    signs = _signs(scores)
    again = [_signs(asker.rank(items, fresh=True)) for _ in range(repeats - 1)]
    turned = asker.rank([(text, group[::-1]) for text, group in items])
    backward = _signs([given[::-1] for given in turned])
    found: dict[str, _Found] = {
        "repetition_stability": _stability([signs, *again], size),
        "position_consistency": _rates([same_verdict(a, b) for a, b in zip(signs, backward, strict=True)], size),
        "first_wins": _rates([(2 + a - b) / 4 for a, b in zip(signs, backward, strict=True)], size),
        "length_tau": _taus(signs, _signs([[float(len(text)) for text in group] for _, group in items]), size),
        "all_tied": _rates([np.array([0.0 if s.any() else 1.0]) for s in signs], [1] * len(items)),
        "spread": _spread(scores, seed),
        **_known_answers(asker, texts, groups, seed),
        **_single_verdicts(asker.matrices(items)),
    }
    bands: tuple[MarginBand, ...] = ()
    if compared is not None:
        theirs = compared.rank(items)
        found["reference_tau"] = _taus(signs, _signs(theirs), size)
        found["reference_accuracy"], bands = _best_over_worst(scores, theirs)
    measures: dict[str, Any] = {measure.field: found.get(measure.field, (None, 0))[0] for measure in MEASURES}
    return Audit(
        ranker=asker.name,
        kind="judge" if asker.judges else "oracle",
        reference=None if compared is None else compared.name,
        prompts=len(texts),
        responses=sum(len(group) for group in groups),
        reference_by_margin=bands,
        comparisons={name: count for name, (interval, count) in found.items() if interval is not None},
        cost=asker.cost(),
        **measures,
    )


def audit_pairs(
    ranker: object,
    prompts: Sequence[str],
    pairs: Sequence[ContrastPair],
    *,
    reference: object = None,
    seed: int = 0,
) -> PairAudit:
    """Ask the ranker again about the pairs that are about to be learnt from: two lists of two for each.

    Args:
        ranker: what :func:`~sims_lens.rankers.as_ranker` accepts.
        prompts: those that ``ContrastPair.prompt`` counts.
        pairs: of any number of prompts, several of one prompt among them if need be.
        reference: a ranker to compare with.
        seed: of the bootstrap of the length gap.

    Raises:
        RankerError: a ranker raised, or did not return one finite score per response.
    """
    asker, compared = Asker(ranker), None if reference is None else Asker(reference)
    name = None if compared is None else compared.name
    if not pairs:
        return PairAudit(asker.name, name, 0)
    shown = [(prompts[pair.prompt], (pair.best.text, pair.worst.text)) for pair in pairs]
    forward = _first_better(asker.rank(shown, fresh=True))
    backward = [1 - rate for rate in _first_better(asker.rank([(p, r[::-1]) for p, r in shown], fresh=True))]
    where = [pair.prompt for pair in pairs]
    both = list(zip(forward, backward, strict=True))
    agreed = None if compared is None else _rates_by_prompt(where, _first_better(compared.rank(shown)))[0]
    return PairAudit(
        ranker=asker.name,
        reference=name,
        pairs=len(pairs),
        position_consistency=_rates_by_prompt(where, [1 - abs(a - b) for a, b in both])[0],
        upheld=_rates_by_prompt(where, [(a + b) / 2 for a, b in both])[0],
        length_gap=length_gap(pairs, seed=seed),
        reference_accuracy=agreed,
        cost=asker.cost(),
    )


def _distinct(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    check_list("responses", responses, "[['yes', 'no']]", PromptError)
    if len(responses) != len(prompts):
        raise PromptError(f"{len(responses)} lists of responses for {len(prompts)} prompts; give one list for each")
    for prompt, group in zip(prompts, responses, strict=True):
        if isinstance(group, str) or not isinstance(group, Sequence) or not all(isinstance(t, str) for t in group):
            raise PromptError(
                f"the responses to the prompt {quote(prompt)} are not a list of strings; give one, got {shown(group)}"
            )
    return [tuple(dict.fromkeys(group)) for group in responses]


def _signs(scores: Sequence[Sequence[float]]) -> list[_Signs]:
    return [pair_signs(given) for given in scores]


def _first_better(scores: Sequence[Sequence[float]]) -> list[float]:
    """For lists of two: 1 where the first scores higher, 1/2 for a tie."""
    return [float(1 + pair_signs(given)[0]) / 2 for given in scores]


def _rates(outcomes: Sequence[_Outcomes], free: Sequence[int]) -> _Found:
    """The interval of a rate from the outcomes of every prompt's comparisons; prompts without any are left out."""
    there = [(values, size) for values, size in zip(outcomes, free, strict=True) if len(values)]
    if not there:
        return None, 0
    count = sum(len(values) for values, _ in there)
    return rate_interval([float(values.mean()) for values, _ in there], [size for _, size in there]), count


def _rates_by_prompt(prompts: Sequence[int], outcomes: Sequence[float]) -> _Found:
    groups: dict[int, list[float]] = {}
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        groups.setdefault(prompt, []).append(outcome)
    return _rates([np.array(group) for group in groups.values()], [len(group) for group in groups.values()])


def _taus(ours: Sequence[_Signs], theirs: Sequence[_Signs], free: Sequence[int]) -> _Found:
    found = [(kendall_tau(a, b), size, len(a)) for a, b, size in zip(ours, theirs, free, strict=True)]
    there = [(tau, size, count) for tau, size, count in found if not math.isnan(tau)]
    if not there:
        return None, 0
    interval = correlation_interval([tau for tau, _, _ in there], [size for _, size, _ in there])
    return interval, sum(count for _, _, count in there)


def _stability(rounds: Sequence[Sequence[_Signs]], free: Sequence[int]) -> _Found:
    """Agreement of every two rounds of the same questions."""
    if len(rounds) < 2:
        return None, 0
    two = [(a, b) for k, a in enumerate(rounds) for b in rounds[k + 1 :]]
    return _rates([np.concatenate([same_verdict(a[i], b[i]) for a, b in two]) for i in range(len(free))], free)


def _spread(scores: Sequence[Sequence[float]], seed: int) -> _Found:
    if not scores:
        return None, 0
    deviations = np.array([np.std(given) for given in scores])
    return bootstrap_mean(deviations, seed=seed), sum(len(given) for given in scores)


def _known_answers(
    asker: Asker, prompts: Sequence[str], groups: Sequence[tuple[str, ...]], seed: int
) -> dict[str, _Found]:
    pairs = known_pairs(groups, seed=seed)
    first = _first_better(asker.rank([(prompts[pair.prompt], pair.shown) for pair in pairs]))
    right = [rate if pair.real_first else 1 - rate for pair, rate in zip(pairs, first, strict=True)]

    def over(*kinds: str) -> _Found:
        chosen = [(pair.prompt, rate) for pair, rate in zip(pairs, right, strict=True) if pair.kind in kinds]
        return _rates_by_prompt([prompt for prompt, _ in chosen], [rate for _, rate in chosen])

    return {
        "known_equal_length": over("shuffled", "other prompt"),
        "known_shuffled": over("shuffled"),
        "known_other": over("other prompt"),
        "known_truncated": over("truncated"),
        "known_pooled": over("shuffled", "other prompt", "truncated"),
    }


def _single_verdicts(matrices: Sequence[_Matrix]) -> dict[str, _Found]:
    """Consistency, position bias and circles of single verdicts; nothing where there are none."""
    consistent, first, circles, triples = [], [], [], 0
    for matrix in matrices:
        i, j = np.triu_indices(len(matrix), k=1)
        forward, backward = np.sign(matrix[i, j] - 0.5), np.sign(matrix[j, i] - 0.5)
        consistent.append(_asked(same_verdict(forward, -backward)))
        first.append(_asked((1 + np.concatenate([forward, backward])) / 2))
        share, count = cyclic_share((matrix + 1 - matrix.T) / 2)  # both orders averaged, as a tournament has them
        circles.append(_asked(np.array([share])))
        triples += count
    size = [len(matrix) - 1 for matrix in matrices]
    found = {
        "single_order_consistency": _rates(consistent, size),
        "cyclic_triples": (_rates(circles, size)[0], triples),
    }
    return {**found, "first_wins": _rates(first, size)} if matrices else found


def _asked(outcomes: Float[np.ndarray, " comparison"]) -> Float[np.ndarray, " asked"]:
    asked: Float[np.ndarray, " asked"] = outcomes[~np.isnan(outcomes)]
    return asked


def _best_over_worst(
    scores: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> tuple[_Found, tuple[MarginBand, ...]]:
    """Whether the reference agrees that the best is over the worst: on all pairs, and by thirds of the margin."""
    agreed: list[tuple[float, float]] = []
    for ours, others in zip(scores, theirs, strict=True):
        best, worst = int(np.argmax(ours)), int(np.argmin(ours))
        if pair_signs([ours[best], ours[worst]])[0] > 0:
            agreed.append((ours[best] - ours[worst], _first_better([[others[best], others[worst]]])[0]))
    agreed.sort(key=lambda pair: pair[0])
    found = _rates([np.array([rate]) for _, rate in agreed], [1] * len(agreed))
    if len(agreed) < 6:  # fewer than two pairs in a third
        return found, ()
    bands = []
    for third in np.array_split(np.arange(len(agreed)), 3):
        rates = [agreed[i][1] for i in third]
        bands.append(MarginBand(agreed[third[0]][0], agreed[third[-1]][0], rate_interval(rates, [1] * len(rates))))
    return found, tuple(bands)
