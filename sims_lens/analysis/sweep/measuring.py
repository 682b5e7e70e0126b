"""What a cell is measured on: fixed pairs of texts, or responses."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import adapt, check_lengths
from sims_lens.analysis.sweep.ledger import Ledger
from sims_lens.behaviour import PairBehaviour, encode_pairs
from sims_lens.config import SamplingConfig
from sims_lens.data import Sample, by_prompt
from sims_lens.errors import ConfigError, RankerError
from sims_lens.evaluate import side_effects
from sims_lens.forced import BATCH_TOKENS, ForcedBatch, force
from sims_lens.hooks import steering
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.prompts import check_prompts
from sims_lens.rankers import CheckedRanker, bound_ranker
from sims_lens.rankers.fingerprint import canonical
from sims_lens.sampling import LocalSampler
from sims_lens.scope import TokenScope
from sims_lens.stats import win_probability


class _Forced:
    """Fixed pairs of texts, teacher-forced.

    What this and :class:`_Sampled` have in common: ``prompt_of`` says of which prompt each unit is, ``chunks`` which
    units are measured together, and ``measure`` how.
    """

    mode, unit, responses = "teacher-forced", "pair", 2

    def __init__(self, model: Any, behaviour: PairBehaviour, scope: TokenScope) -> None:
        self.model, self.behaviour, self.scope = model, behaviour, scope
        self.name, self.measure_name = behaviour.name, f"rise of the {behaviour.measure_name}"
        prompts, texts = encode_pairs(adapt(model), behaviour.pairs)
        self.rows = [(prompts[prompt], texts[text]) for prompt, *both in behaviour.pairs for text in both]
        known = {prompt: index for index, prompt in enumerate(prompts)}
        self.prompt_of = np.array([known[prompt] for prompt, _, _ in behaviour.pairs])
        self.ledger = Ledger(None, {})
        self._last: tuple[tuple[int, ...], ForcedBatch, Tensor, Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, beside the model and the directions."""
        return {"mode": self.mode, "pairs": _hash(self.rows), "behaviour": self.name, "batch_tokens": BATCH_TOKENS}

    def chunks(self, units: Sequence[int]) -> list[list[int]]:
        """Pairs of about one length, so many that their texts fill a batch of :func:`force`."""

        def width(pair: int) -> int:
            return max(len(self.rows[2 * pair][1]), len(self.rows[2 * pair + 1][1]))

        found: list[list[int]] = []
        for pair in sorted(units, key=lambda pair: (width(pair), pair)):
            if not found or width(pair) * 2 * (len(found[-1]) + 1) > BATCH_TOKENS:
                found.append([])
            found[-1].append(pair)
        return found

    def measure(
        self, chunk: tuple[int, ...], plans: Mapping[int, SteeringPlan]
    ) -> Iterator[tuple[int, Float[np.ndarray, "unit figure"]]]:
        """For each cell: effect, win, rise of the NLL and KL of each unit.

        The unsteered model's figures are kept for the next call on the same pairs.
        """
        with torch.no_grad():
            if self._last is None or self._last[0] != chunk:
                self._last = None  # its memory is needed for the next one
                rows = [self.rows[2 * pair + text] for pair in chunk for text in (0, 1)]
                (batch,) = force(self.model, rows, scope=self.scope, together=2, batch_tokens=10**9)
                self._last = chunk, batch, batch.logits.float().logsumexp(-1), batch.mean(batch.logprobs(batch.logits))
            _, batch, normaliser, base = self._last
            order = [batch.rows.index(row) for row in range(len(batch.rows))]
            for cell, plan in plans.items():
                with steering(self.model, plan):
                    logits = batch.run(layer=plan.layers[0])
                means, kl = _against(batch, logits, normaliser)
                change, kl = (means - base)[order].double().cpu(), kl[order].double().cpu()
                positive, negative = change[0::2], change[1::2]
                effect = positive - negative
                win = (effect > 0) + 0.5 * (effect == 0)
                yield cell, torch.stack([effect, win, -(positive + negative) / 2, (kl[0::2] + kl[1::2]) / 2], 1).numpy()


def _against(
    batch: ForcedBatch, logits: Float[Tensor, "row pos d_vocab"], normaliser: Float[Tensor, "row pos"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Mean log-probability of each row's tokens, and mean KL from the unsteered model, nats per token.

    Row by row, so that what a row needs stays in the processor's cache and padding costs nothing. With s and b the two
    models' logits, KL = sum_v p(v) (s_v - b_v) - logsumexp s + logsumexp b: one softmax, and no log-probabilities.

    Args:
        batch: the rows, with the unsteered model's logits.
        logits: the steered model's.
        normaliser: logsumexp of the unsteered model's.
    """
    means, divergences = [], []
    for row, length in enumerate(batch.counted.sum(-1).tolist()):
        steered, base = logits[row, :length].float(), batch.logits[row, :length].float()
        total = steered.logsumexp(-1)
        chosen = steered.gather(-1, batch.targets[row, :length, None])[:, 0] - total
        moved = torch.linalg.vecdot(steered.softmax(-1), steered - base)
        means.append(chosen.mean())
        divergences.append((moved - total + normaliser[row, :length]).clamp(min=0).mean())
    return torch.stack(means), torch.stack(divergences)


class _Sampled:
    """Responses to prompts, scored by a ranker."""

    mode, unit = "generation", "prompt"

    def __init__(
        self,
        model: Any,
        ranker: CheckedRanker,
        prompts: Sequence[str],
        samples: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> None:
        self.model, self.ranker, self.prompts, self.seed = model, ranker, list(prompts), seed
        self.responses, self.sampling, self.sampler = samples, sampling, LocalSampler(model, sampling)
        self.name, self.measure_name = ranker.name, f"rise of the mean score ({ranker.name}'s units)"
        self.prompt_of = np.arange(len(self.prompts))
        self.ledger = Ledger(None, {})
        self._last: tuple[tuple[int, ...], list[list[Sample]]] | None = None

    def settings(self) -> dict[str, Any]:
        """See :class:`_Forced`."""
        try:
            ranker = canonical(self.ranker)
        except RankerError as error:
            raise RankerError(
                f"{error}; or leave out= away: a folder is for one ranker, by what it depends on"
            ) from error
        return {
            "mode": self.mode,
            "prompts": _hash(self.prompts),
            "ranker": ranker,
            "samples": self.responses,
            "sampling": asdict(self.sampling),
        }

    def chunks(self, units: Sequence[int]) -> list[list[int]]:
        """The sampler makes its own batches."""
        return [sorted(units)]

    def measure(
        self, chunk: tuple[int, ...], plans: Mapping[int, SteeringPlan]
    ) -> Iterator[tuple[int, Float[np.ndarray, "unit figure"]]]:
        """See :class:`_Forced`; NaN where a prompt's responses have no text."""
        asked = [self.prompts[unit] for unit in chunk]
        if self._last is None or self._last[0] != chunk:
            base = self.ledger.samples(chunk, lambda: self._drawn(asked, NOTHING))
            self._last = chunk, by_prompt(base)
        theirs = self._last[1]
        for cell, plan in plans.items():
            ours = by_prompt(self._drawn(asked, plan))
            together = [[s.text for s in (*a, *b)] for a, b in zip(ours, theirs, strict=True)]
            scores = self.ranker.rank_all(list(zip(asked, together, strict=True)))
            rows = []
            for a, b, given in zip(ours, theirs, scores, strict=True):
                won, lost = np.array(given[: len(a)]), np.array(given[len(a) :])
                rise = _mean([s.nll for s in a]) - _mean([s.nll for s in b])
                rows.append([won.mean() - lost.mean(), win_probability(won, lost), rise, _mean([s.kl for s in a])])
            yield cell, np.array(rows)

    def _drawn(self, asked: Sequence[str], plan: SteeringPlan) -> list[Sample]:
        """Responses with their fluency; one without a token has none."""
        drawn = list(self.sampler.sample(asked, n=self.responses, plan=plan, seed=self.seed))
        found = side_effects(self.model, asked, drawn, plan)
        return [s if s.tokens else replace(s, nll=None, kl=None) for s in found]


Bench: TypeAlias = _Forced | _Sampled


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def bench_for(
    model: Any,
    behaviour: object,
    ranker: object,
    prompts: Sequence[str] | None,
    samples: int,
    sampling: SamplingConfig | None,
    scope: TokenScope,
    seed: int,
) -> Bench:
    """What the cells are measured on.

    Raises:
        SimsError: what was given is not enough for either, or is for both.
    """
    if (behaviour is None) == (ranker is None):
        given = "neither" if ranker is None else "both"
        raise ConfigError(f"layer_sweep needs one of behaviour= (pairs of texts) and ranker=, got {given}")
    if behaviour is not None:
        if prompts is not None:
            raise ConfigError("prompts= are for ranker=; a behaviour brings its own")
        if isinstance(behaviour, (list, tuple)):
            behaviour = PairBehaviour(behaviour)
        if not isinstance(behaviour, PairBehaviour):
            raise ConfigError(
                f"behaviour must be a PairBehaviour or a list of (prompt, positive, negative), got "
                f"{type(behaviour).__name__}; what is sampled goes into ranker= and prompts="
            )
        return _Forced(model, behaviour, scope)
    if prompts is None:
        raise ConfigError("ranker= needs prompts= to draw responses to")
    if type(samples) is not int or samples < 1:
        raise ConfigError(f"samples must be an integer of at least 1, got {samples!r}")
    texts, how = check_prompts(prompts), sampling or SamplingConfig()
    check_lengths(adapt(model), texts, how.max_new_tokens)
    return _Sampled(model, bound_ranker(ranker, model), texts, samples, how, seed)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogatepass")).hexdigest()


__all__ = ["Bench", "bench_for"]
