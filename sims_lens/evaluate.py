"""Measuring a plan on held-out prompts against the base model: the effect, and its side effects.

Every figure is an :class:`Interval` over prompts. The base model's responses and the steered model's are drawn with
the same uniform numbers, so that differences between them are those of the plan.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sims_lens.adapter import adapt
from sims_lens.data import Sample, by_prompt
from sims_lens.hooks import steering
from sims_lens.plan import SteeringPlan
from sims_lens.stats import (
    Interval,
    bootstrap_mean,
    distinct_ratio,
    length_controlled_win_rate,
    sign_flip_p,
    win_probability,
)
from sims_lens.twin import response_logits
from sims_lens.typed import read_as


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a plan does to a ranker's scores.

    Args:
        score: mean score.
        difference: mean score less that of the base model on the same prompts.
        win_rate: probability that a steered response scores higher than a base response to the same prompt, ties
            half.
        length_controlled: the win rate that is expected between responses of equal length
            (:func:`~sims_lens.stats.length_controlled_win_rate`); None where lengths play no part.
        p: of no difference, two-sided, by sign flips over prompts; None in a run of an earlier version.
    """

    score: Interval
    difference: Interval
    win_rate: Interval
    length_controlled: Interval | None = None
    p: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Each figure as ``[estimate, low, high]``."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "independent"}
        return {name: value.to_json() if isinstance(value, Interval) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Effect":
        """The inverse of :meth:`to_json`; what an earlier version did not write is None.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, data)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Effect):
    """One plan on the held-out prompts, each figure with its 95% interval clustered by prompt.

    Args:
        score, difference, win_rate: see :class:`Effect`; by the ranker that the loop learns from.
        nll: see :class:`sims_lens.data.Sample`.
        perplexity: exp of ``nll``.
        kl: see :class:`sims_lens.data.Sample`.
        kl_95: see :class:`sims_lens.data.Sample`; None in a run of an earlier version.
        distinct_2: distinct word bigrams over all word bigrams of the responses.
        repetition: share of a response's word 4-grams that stood in it before.
        length: tokens of a response.
        ended: share of responses that the model ended itself (EOS) within the limit.
        independent: the effect by a second ranker that the loop never learns from, where there is one.
    """

    nll: Interval
    perplexity: Interval
    kl: Interval
    distinct_2: Interval
    repetition: Interval
    length: Interval
    ended: Interval
    kl_95: Interval | None = None
    independent: Effect | None = None

    def to_json(self) -> dict[str, Any]:
        """Each figure as ``[estimate, low, high]``, those of the independent ranker nested."""
        return {**super().to_json(), "independent": self.independent.to_json() if self.independent else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Evaluation":
        """The inverse of :meth:`to_json`.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, data)  # type: ignore[no-any-return]


def evaluate(samples: Sequence[Sample], base: Sequence[Sample], *, seed: int = 0) -> Evaluation:
    """Put figures and intervals on the samples of a plan.

    Args:
        samples: of the plan, with scores, and some of each prompt with side effects.
        base: of the base model on the same prompts, with scores.
        seed: of the bootstrap.
    """
    groups, base_groups = by_prompt(samples), by_prompt(base)

    def over_prompts(value: Callable[[Sample], float | None]) -> Interval:
        per_prompt = [[v for s in group if (v := value(s)) is not None] for group in groups]
        return bootstrap_mean(np.array([np.mean(values) for values in per_prompt if values]), seed=seed)

    nll = over_prompts(lambda s: s.nll)
    effect = _effect(groups, base_groups, lambda s: s.score, seed)
    judged_twice = all(s.independent is not None for s in (*samples, *base))
    return Evaluation(
        score=effect.score,
        difference=effect.difference,
        win_rate=effect.win_rate,
        length_controlled=effect.length_controlled,
        p=effect.p,
        independent=_effect(groups, base_groups, lambda s: s.independent, seed) if judged_twice else None,
        nll=nll,
        perplexity=nll.map(math.exp),
        kl=over_prompts(lambda s: s.kl),
        kl_95=over_prompts(lambda s: s.kl_95) if any(s.kl_95 is not None for s in samples) else None,
        distinct_2=distinct_2(samples),
        repetition=over_prompts(lambda s: _repetition(s.text)),
        length=over_prompts(lambda s: len(s.tokens)),
        ended=over_prompts(lambda s: float(s.ended)),
    )


def _effect(
    groups: Sequence[Sequence[Sample]],
    base_groups: Sequence[Sequence[Sample]],
    score: Callable[[Sample], float | None],
    seed: int,
) -> Effect:
    ours = [np.array([score(s) for s in group], dtype=float) for group in groups]
    theirs = [np.array([score(s) for s in group], dtype=float) for group in base_groups]
    paired = list(zip(ours, theirs, strict=True))
    differences = np.array([a.mean() - b.mean() for a, b in paired])
    return Effect(
        score=bootstrap_mean(np.array([a.mean() for a in ours]), seed=seed),
        difference=bootstrap_mean(differences, seed=seed),
        win_rate=bootstrap_mean(np.array([win_probability(a, b) for a, b in paired]), seed=seed),
        length_controlled=_length_controlled(groups, base_groups, paired, seed),
        p=sign_flip_p(differences, seed=seed),
    )


def distinct_2(samples: Sequence[Sample]) -> Interval:
    """Distinct word bigrams over all word bigrams of responses. It falls with their number."""
    return distinct_ratio([[_ngrams(s.text, 2) for s in group] for group in by_prompt(samples)])


def score_changes(samples: Sequence[Sample], base: Sequence[Sample]) -> Float[np.ndarray, " prompt"]:
    """Mean score of each prompt's samples less that of the base model's."""
    paired = zip(by_prompt(samples), by_prompt(base), strict=True)
    return np.array([np.mean([s.score for s in a]) - np.mean([s.score for s in b]) for a, b in paired], dtype=float)


def _length_controlled(
    groups: Sequence[Sequence[Sample]],
    base_groups: Sequence[Sequence[Sample]],
    scores: Sequence[tuple[np.ndarray, np.ndarray]],
    seed: int,
) -> Interval:
    wins, longer, prompts = [], [], []
    for index, (ours, theirs, (a, b)) in enumerate(zip(groups, base_groups, scores, strict=True)):
        gap = np.subtract.outer([len(s.tokens) for s in ours], [len(s.tokens) for s in theirs])
        margin = np.subtract.outer(a, b)
        wins.append(((margin > 0) + 0.5 * (margin == 0)).ravel())
        longer.append(gap.ravel().astype(float))
        prompts += [index] * gap.size
    return length_controlled_win_rate(np.concatenate(wins), np.concatenate(longer), prompts, seed=seed)


def perplexity_ratio(samples: Sequence[Sample], base: Sequence[Sample], *, seed: int = 0) -> Interval:
    """Perplexity of some responses over that of others to the same prompts, both under the unsteered model.

    It is exp of the mean difference in negative log-likelihood per token, paired by prompt, so a ratio of geometric
    means. Prompts where either side has no text are left out; where none is left the ratio is infinite.

    Args:
        samples: with ``nll``.
        base: with ``nll``, on the same prompts.
        seed: of the bootstrap.
    """

    def nll(group: Sequence[Sample]) -> list[float]:
        return [s.nll for s in group if s.tokens and s.nll is not None]

    paired = zip(by_prompt(samples), by_prompt(base), strict=True)
    differences = [np.mean(nll(a)) - np.mean(nll(b)) for a, b in paired if nll(a) and nll(b)]
    if not differences:
        return Interval(math.inf, math.inf, math.inf)
    return bootstrap_mean(np.array(differences), seed=seed).map(math.exp)


def side_effects(
    model: Any,
    prompts: Sequence[str],
    samples: Sequence[Sample],
    plan: SteeringPlan,
    *,
    asked: Sequence[str] | None = None,
    tuned: Any = None,
    batch_rows: int = 32,
) -> list[Sample]:
    """The samples with ``nll`` and ``kl``: they run teacher-forced through the base model and, where there is a plan,
    through the steered one. Perplexity and KL share the base pass, samples of one prompt share its prefill.

    Args:
        model: unsteered.
        prompts: those that ``Sample.prompt`` counts.
        samples: responses drawn under ``plan``.
        plan: what they were drawn under; an empty plan gives KL 0.
        asked: what the samples answer, where that isn't the prompt itself but one with an instruction, say. The base
            model is still asked the prompt.
        tuned: the model that wrote the samples, where that isn't the base model itself but one with other weights and
            the same tokenizer; ``plan`` acts on it.
        batch_rows: samples in one forward pass, about.
    """
    adapter = adapt(model)
    groups = by_prompt(samples)
    encoded = {group[0].prompt: adapter.encode(prompts[group[0].prompt]) for group in groups}
    answered = encoded if asked is None else {i: adapter.encode(asked[i]) for i in encoded}
    groups.sort(key=lambda group: len(encoded[group[0].prompt]))
    size = max(1, batch_rows // max(len(group) for group in groups))
    found: dict[tuple[int, int], Sample] = {}
    for start in range(0, len(groups), size):
        batch = groups[start : start + size]
        rows = [(index, sample) for index, group in enumerate(batch) for sample in group]
        heads = [encoded[group[0].prompt] for group in batch]
        others = [answered[group[0].prompt] for group in batch]
        forced = [(index, sample.tokens) for index, sample in rows]
        with torch.inference_mode():
            base = response_logits(model, heads, forced).float().log_softmax(-1)
            targets = torch.zeros(base.shape[:2], dtype=torch.long)
            for row, (_, tokens) in enumerate(forced):
                targets[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            lengths = torch.tensor([len(tokens) for _, tokens in forced])
            counted = (torch.arange(base.shape[1])[None] < lengths[:, None]).to(base.device)
            nll = _per_row(-base.gather(-1, targets.to(base.device)[..., None])[..., 0], counted)
            each = torch.zeros_like(base[..., 0])
            if plan.interventions or asked is not None or tuned is not None:
                writer = model if tuned is None else tuned
                with steering(writer, plan):
                    steered = response_logits(writer, others, forced).float().log_softmax(-1)
                each = kl_divergence(steered, base)
            kl = _per_row(each, counted)
        for row, (_, sample) in enumerate(rows):
            own = each[row, : len(sample.tokens)].double().cpu()
            found[sample.prompt, sample.draw] = replace(
                sample,
                nll=float(nll[row]),
                kl=float(kl[row]),
                kl_95=float(own.quantile(0.95)) if len(own) else None,
            )
    return [found[sample.prompt, sample.draw] for sample in samples]


def kl_divergence(
    log_p: Float[Tensor, "batch pos d_vocab"], log_q: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch pos"]:
    """KL(p || q) in nats from log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _per_row(values: Float[Tensor, "batch pos"], counted: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    weights = counted.to(values.dtype)
    return torch.where(counted, values, 0.0).sum(-1) / weights.sum(-1).clamp(min=1)


def _words(text: str) -> list[str]:
    return text.lower().split()


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = _words(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _repetition(text: str) -> float:
    grams = _ngrams(text, 4)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


__all__ = [
    "Effect",
    "Evaluation",
    "distinct_2",
    "evaluate",
    "kl_divergence",
    "perplexity_ratio",
    "score_changes",
    "side_effects",
]
