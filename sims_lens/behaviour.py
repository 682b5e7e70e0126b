"""What is measured of a model: a behaviour is one number for each of some units, pairs of texts or prompts.

Two kinds. :class:`PairBehaviour` is teacher-forced: by how much a model prefers one given text to another. For a
prompt x with a positive text p and a negative text n, the margin is

    m = mean_k log P(p_k | x, p_<k) - mean_k log P(n_k | x, n_<k)

in nats per token, so that the longer text has no advantage. Fixed texts need no random numbers: a difference of two
margins is the plan's alone. It is cheap, and says what the model would rather say, not what it says.

:class:`SampledBehaviour` is what the model says: the mean score that a ranker gives to responses drawn for each prompt,
with the same random numbers whatever the plan.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import Adapter, adapt
from sims_lens.config import SamplingConfig
from sims_lens.data import by_prompt
from sims_lens.errors import ConfigError, PromptError
from sims_lens.hooks import steering
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.prompts import check_prompts, quote
from sims_lens.rankers import bound_ranker, rank
from sims_lens.sampling import LocalSampler
from sims_lens.twin import response_logits

TextPair = tuple[str, str, str]
"""A prompt, a text that shows the behaviour, and one that does not."""


@runtime_checkable
class Behaviour(Protocol):
    """What can be measured of a model under a plan. The units are the same from call to call, so that plans are
    compared unit by unit.

    ``unit`` says what a value is of, "pair" or "prompt"; ``name`` and ``measure_name`` are for reports and axes.
    """

    @property
    def name(self) -> str:
        """In reports."""
        ...

    @property
    def unit(self) -> str:
        """What a value is of: "pair" or "prompt"."""
        ...

    @property
    def measure_name(self) -> str:
        """What a value is, with its unit, for an axis."""
        ...

    def measure(self, model: Any, plan: SteeringPlan = NOTHING) -> Float[Tensor, " unit"]:
        """One value per unit under a plan, higher for more of the behaviour."""
        ...


@dataclass(frozen=True)
class PairBehaviour:
    """The log-probability margin on fixed pairs of texts.

    Args:
        pairs: ``(prompt, positive text, negative text)``, all with text in them; several may share a prompt. For a
            model without a chat template a text starts where the prompt ends: give it its leading space.
        name: in reports.

    Raises:
        PromptError: there are no pairs, or one is not of that form.

    >>> PairBehaviour([("Is it so?", "Yes.", "No.")], name="agreement").pairs
    (('Is it so?', 'Yes.', 'No.'),)
    """

    pairs: Sequence[TextPair]
    name: str = "log-probability margin"

    def __post_init__(self) -> None:
        if not isinstance(self.pairs, Sequence) or isinstance(self.pairs, (str, bytes)):
            raise PromptError(
                f"a behaviour needs a list of pairs, [(prompt, positive, negative), ...]; got {quote(repr(self.pairs))}"
            )
        pairs = tuple(tuple(pair) if isinstance(pair, (tuple, list)) else pair for pair in self.pairs)
        if not pairs:
            raise PromptError("a behaviour needs pairs of texts, [(prompt, positive, negative), ...]; there are none")
        for index, pair in enumerate(pairs):
            if not (isinstance(pair, tuple) and len(pair) == 3 and all(isinstance(t, str) and t.strip() for t in pair)):
                raise PromptError(f"pair {index} is not (prompt, positive text, negative text): {quote(repr(pair))}")
            if pair[1] == pair[2]:
                raise PromptError(f"pair {index} has one text twice, {quote(pair[1])}; give texts that differ")
        object.__setattr__(self, "pairs", pairs)

    @property
    def unit(self) -> str:
        """See :class:`Behaviour`."""
        return "pair"

    @property
    def measure_name(self) -> str:
        """See :class:`Behaviour`."""
        return "log-probability margin (nats per token)"

    def measure(self, model: Any, plan: SteeringPlan = NOTHING) -> Float[Tensor, " pair"]:
        """Each pair's margin under a plan, see :func:`logprob_margin`."""
        return logprob_margin(model, self.pairs, plan)


@dataclass(frozen=True)
class SampledBehaviour:
    """The mean score of sampled responses to each prompt.

    Args:
        ranker: any that ``sims.improve`` accepts. One that compares responses sees those of one plan at a time: give
            one that scores each response by itself.
        prompts: none of them used to fit the plans.
        samples: responses to each prompt.
        sampling: how they are drawn.
        seed: of the sampling; the same random numbers serve every plan.
        name: in reports; the ranker's where "".

    Raises:
        PromptError: prompts are empty or duplicate.
        ConfigError: samples is not an integer of at least 1.
    """

    ranker: object
    prompts: Sequence[str]
    samples: int = 2
    sampling: SamplingConfig | None = None
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(check_prompts(self.prompts)))
        if type(self.samples) is not int or self.samples < 1:
            raise ConfigError(f"samples must be an integer of at least 1, got {self.samples!r}")
        if not self.name:
            label = getattr(self.ranker, "name", "") or getattr(self.ranker, "__name__", "") or "score"
            object.__setattr__(self, "name", str(label))

    @property
    def unit(self) -> str:
        """See :class:`Behaviour`."""
        return "prompt"

    @property
    def measure_name(self) -> str:
        """See :class:`Behaviour`."""
        return f"mean score ({self.name}'s units)"

    def measure(self, model: Any, plan: SteeringPlan = NOTHING) -> Float[Tensor, " prompt"]:
        """Mean score of the responses to each prompt under a plan."""
        drawn = LocalSampler(model, self.sampling).sample(self.prompts, n=self.samples, plan=plan, seed=self.seed)
        scored = rank(bound_ranker(self.ranker, model), self.prompts, list(drawn))
        means = [np.mean([s.score for s in group if s.score is not None]) for group in by_prompt(scored)]
        return torch.tensor(means, dtype=torch.float32)


def logprob_margin(
    model: Any, pairs: Sequence[TextPair], plan: SteeringPlan = NOTHING, *, batch_rows: int = 32
) -> Float[Tensor, " pair"]:
    """Mean log-probability per token of each positive text less that of the negative one, given the prompt.

    Texts of one prompt share its prefill. What the plan calls prompt and response are the prompt and the texts.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        pairs: ``(prompt, positive text, negative text)``.
        plan: steers the model meanwhile; nothing by default.
        batch_rows: texts in one forward pass.

    Returns:
        One margin per pair, nats per token, float32, on the CPU.

    Raises:
        PromptError: a prompt and its text are longer than the context, or a text has no tokens.
        PlanError: the plan does not fit the model.
    """
    adapter = adapt(model)
    prompts, texts = encode_pairs(adapter, pairs)
    # Neighbours of one prompt share its prefill, those of one length need little padding.
    order = sorted(range(len(pairs)), key=lambda i: (len(prompts[pairs[i][0]]), pairs[i][0], len(texts[pairs[i][1]])))
    margins = torch.empty(len(pairs))
    size = max(1, batch_rows // 2)
    with torch.inference_mode(), steering(model, plan) if plan.interventions else nullcontext():
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            asked = list(dict.fromkeys(pairs[i][0] for i in batch))
            forced = [(asked.index(pairs[i][0]), texts[text]) for i in batch for text in pairs[i][1:]]
            logits = response_logits(model, [prompts[prompt] for prompt in asked], forced)
            means = _mean_logprob(logits, [tokens for _, tokens in forced]).cpu()
            margins[batch] = means[0::2] - means[1::2]
    return margins


def encode_pairs(adapter: Adapter, pairs: Sequence[TextPair]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Token ids of the prompts and of the texts of pairs.

    Raises:
        PromptError: a prompt and its text are longer than the context, or a text has no tokens.
    """
    prompts = {prompt: adapter.encode(prompt) for prompt, _, _ in pairs}
    texts = {text: adapter.encode_response(text) for pair in pairs for text in pair[1:]}
    for prompt, *both in pairs:
        for text in both:
            length = len(prompts[prompt]) + len(texts[text])
            if length > adapter.n_ctx:
                raise PromptError(
                    f"the prompt {quote(prompt, 40)} and the text {quote(text, 40)} have {length} tokens, the context "
                    f"{adapter.n_ctx}: shorten them"
                )
    return prompts, texts


def _mean_logprob(
    logits: Float[Tensor, "row pos d_vocab"], responses: Sequence[Sequence[int]]
) -> Float[Tensor, " row"]:
    log_p = logits.float().log_softmax(-1)
    return torch.stack([log_p[row, range(len(tokens)), list(tokens)].mean() for row, tokens in enumerate(responses)])


__all__ = ["Behaviour", "PairBehaviour", "SampledBehaviour", "TextPair", "encode_pairs", "logprob_margin"]
