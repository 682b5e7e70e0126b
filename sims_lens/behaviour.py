"""A behaviour without sampling: by how much a model prefers one given text to another, teacher-forced.

For a prompt x with a positive text p and a negative text n, the margin is

    m = mean_k log P(p_k | x, p_<k) - mean_k log P(n_k | x, n_<k)

in nats per token, so that the longer text has no advantage. Fixed texts need no random numbers: a difference of two
margins is the plan's alone.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import Adapter, adapt
from sims_lens.errors import PromptError
from sims_lens.hooks import steering
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.prompts import quote

TextPair = tuple[str, str, str]
"""A prompt, a text that shows the behaviour, and one that does not."""


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
        pairs = tuple(tuple(pair) if isinstance(pair, (tuple, list)) else pair for pair in self.pairs)
        if not pairs:
            raise PromptError("a behaviour needs pairs of texts, [(prompt, positive, negative), ...]; there are none")
        for index, pair in enumerate(pairs):
            if not (isinstance(pair, tuple) and len(pair) == 3 and all(isinstance(t, str) and t.strip() for t in pair)):
                raise PromptError(f"pair {index} is not (prompt, positive text, negative text): {quote(repr(pair))}")
            if pair[1] == pair[2]:
                raise PromptError(f"pair {index} has one text twice, {quote(pair[1])}; give texts that differ")
        object.__setattr__(self, "pairs", pairs)

    def measure(self, model: Any, plan: SteeringPlan = NOTHING) -> Float[Tensor, " pair"]:
        """Each pair's margin under a plan, see :func:`logprob_margin`."""
        return logprob_margin(model, self.pairs, plan)


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
            logits = adapter.response_logits([prompts[prompt] for prompt in asked], forced)
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


__all__ = ["PairBehaviour", "TextPair", "encode_pairs", "logprob_margin"]
