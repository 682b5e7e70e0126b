"""A steered model as an evaluation harness sees it: log-likelihoods of continuations, and continuations of texts.

Tokens as the harness' own Hugging Face model would make them (no chat template, a BOS only where the checkpoint's
tokenizer adds one), so that without a plan the figures are those that everybody else reports.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sims_lens.adapter import Adapter, adapt
from sims_lens.checks import shown
from sims_lens.config import SamplingConfig
from sims_lens.data import Sample
from sims_lens.errors import CapabilityError, ModelError
from sims_lens.hooks import check_unsteered, resolve, steering
from sims_lens.models import checkpoint_of
from sims_lens.plan import SteeringPlan
from sims_lens.sampling import LocalSampler
from sims_lens.twin import response_logits

Request = tuple[Sequence[int], Sequence[int]]
"""A context and its continuation, as token ids."""

RESPONSE_TOKENS = 512
"""Continuation positions in one batch, as far as rows of different lengths allow: their logits take 100 MB with a
vocabulary of 50,000."""

PROMPT_TOKENS = 8192
"""Context tokens in one batch."""


class SteeredTexts:
    """A model under a plan, for text that is not a conversation with it.

    What is the plan's prompt is the context here, and its response the continuation: with the scope ``"generation"``
    the last context token and the continuation are steered, the question and the examples before it are not.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered. It is steered only while it computes.
        plan: what steers; :data:`sims_lens.plan.NOTHING` for the base model.
        add_bos: whether a text begins with a BOS. None: as the checkpoint's own tokenizer does it, where the model was
            loaded with :func:`sims_lens.load`; else as the model's tokenizer does. (TransformerLens adds a BOS to
            nearly every model's text, whether the model was trained with one or not.)
        batch_rows: continuations side by side, at most.

    Raises:
        ModelError: a plan is attached to the model, or it has no tokenizer.
        PlanError: the plan doesn't fit the model.
    """

    def __init__(
        self, model: Any, plan: SteeringPlan, *, add_bos: bool | None = None, batch_rows: int | None = None
    ) -> None:
        if batch_rows is not None and (type(batch_rows) is not int or batch_rows < 1):
            raise CapabilityError(f"batch_rows = {shown(batch_rows)}: one row or more is needed; None takes what fits")
        check_unsteered(model)
        self.model = model
        self.plan = resolve(model, plan)
        self.batch_rows = batch_rows
        self.add_bos = add_bos
        self._adapter = adapt(model)
        self.tokenizer = _own_tokenizer(self._adapter)

    @property
    def context_tokens(self) -> int:
        """Longest text, in tokens."""
        return self._adapter.n_ctx

    @property
    def start(self) -> int:
        """The token that a text without a context follows: BOS, or EOS where there is none.

        Raises:
            CapabilityError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise CapabilityError(f"the tokenizer of {self._adapter.name} has neither a BOS nor an EOS token; set one")

    @property
    def end(self) -> int:
        """EOS.

        Raises:
            CapabilityError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise CapabilityError(f"the tokenizer of {self._adapter.name} has no EOS token; set one")
        return int(self.tokenizer.eos_token_id)

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Token ids of a text; special tokens written out in it (a chat template's) are special.

        Args:
            text: of any length; "" has no tokens but a BOS.
            special: whether a BOS is added. None: as :attr:`add_bos` says, and none where the text begins with one.
        """
        if special is None:
            bos = self.tokenizer.bos_token
            special = False if bos and text.startswith(bos) else self.add_bos
        if special is None:
            return [int(i) for i in self.tokenizer.encode(text)]
        ids = [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]
        bos_id = self.tokenizer.bos_token_id
        return [int(bos_id), *ids] if special and bos_id is not None else ids

    def log_likelihoods(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is what greedy decoding would say.

        Contexts that are too long lose their beginning. A context that several continuations share is run once.

        Args:
            requests: token ids, at least one of each.

        Returns:
            Nats, summed over the continuation's tokens; True where each of them is the most probable one.

        Raises:
            CapabilityError: a context or continuation is empty, or a continuation doesn't fit the model's context.
        """
        cut = [self._fitting(context, continuation) for context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(cut)
        with torch.inference_mode(), steering(self.model, self.plan):
            for batch in self._batches(cut):
                contexts = list(dict.fromkeys(cut[i][0] for i in batch))
                rows = [(contexts.index(cut[i][0]), cut[i][1]) for i in batch]
                logits = response_logits(self.model, contexts, rows)
                for row, index in enumerate(batch):
                    wanted = torch.tensor(cut[index][1], device=logits.device)
                    # One row at a time: in float32 the log-softmax of a whole batch would take as much room again.
                    log_probs = logits[row, : len(wanted)].float().log_softmax(-1)
                    nats = float(log_probs.gather(-1, wanted[:, None]).double().sum())
                    found[index] = nats, bool((log_probs.argmax(-1) == wanted).all())
        return found

    def complete(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Continue each text, up to the first stop string or the end of the model's own.

        Texts that leave no room for ``max_new_tokens`` lose their beginning.

        Args:
            texts: any; an empty one is continued from :attr:`start`.
            max_new_tokens: longest continuation.
            stop: strings that end a continuation; they are not part of it.
            temperature: 0 takes the most probable token.
            top_k: only the k most probable tokens; None for all.
            top_p: the smallest set of tokens with this much probability.
            seed: of the draws, where the temperature isn't 0.

        Raises:
            CapabilityError: the context has no room for so many new tokens.
        """
        room = self.context_tokens - max_new_tokens
        if room < 1:
            raise CapabilityError(
                f"max_new_tokens = {max_new_tokens} leaves no room for a text in the {self.context_tokens} tokens of "
                f"{self._adapter.name}; ask for fewer (gen_kwargs max_gen_toks)"
            )
        drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature > 0 else _GREEDY
        config = SamplingConfig(
            max_new_tokens=max_new_tokens, stop=tuple(s for s in stop if s), batch_rows=self.batch_rows, **drawn
        )
        tokens = [(self.encode(text) or [self.start])[-room:] for text in texts]
        done = _Completions(self.model, config).complete(texts, tokens, plan=self.plan, seed=seed)
        completed: dict[int, Sample] = {sample.prompt: sample for sample in done}
        return [_before(completed[index].text, config.stop) for index in range(len(texts))]

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not context or not continuation:
            what = "continuation" if context else "context"
            raise CapabilityError(f"a request has an empty {what}; give both at least one token")
        # The last token is predicted, not read.
        room = self.context_tokens + 1 - len(continuation)
        if room < 1:
            raise CapabilityError(
                f"a continuation of {len(continuation)} tokens doesn't fit the {self.context_tokens} tokens of "
                f"{self._adapter.name}; shorten it"
            )
        return tuple(context[-room:]), tuple(continuation)

    def _batches(self, requests: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Iterator[list[int]]:
        """Indices of requests that are run together: those of one context side by side, long ones first."""

        def key(index: int) -> tuple[int, tuple[int, ...], int]:
            context, continuation = requests[index]
            return -len(context), context, -len(continuation)

        batch: list[int] = []
        contexts: set[tuple[int, ...]] = set()
        longest, widest = 0, 0
        for index in sorted(range(len(requests)), key=key):
            context, continuation = requests[index]
            count = len(contexts | {context})
            long, wide = max(longest, len(context)), max(widest, len(continuation))
            full = (len(batch) + 1) * wide > RESPONSE_TOKENS or count * long > PROMPT_TOKENS
            if batch and (full or len(batch) == self.batch_rows):
                yield batch
                batch, contexts, long, wide = [], set(), len(context), len(continuation)
            batch.append(index)
            contexts.add(context)
            longest, widest = long, wide
        if batch:
            yield batch


_GREEDY: dict[str, Any] = {"temperature": 1.0, "top_k": 1, "top_p": 1.0}


class _Completions(LocalSampler):
    """Keeps the token in which a stop string begins: the text before it may be a part of that token."""

    def _cut(self, adapter: Adapter) -> Callable[[Sequence[int]], int | None]:
        stops = self.config.stop

        def cut(tokens: Sequence[int]) -> int | None:
            text = adapter.decode(tokens)
            return len(tokens) if any(stop in text for stop in stops) else None

        return cut if stops else lambda _tokens: None


def _before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of some strings.

    >>> _before("4. So it is. Q:", ["Q:", "So"])
    '4. '
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _own_tokenizer(adapter: Adapter) -> Any:
    """The checkpoint's own tokenizer where it is at hand, not the one that TransformerLens made of it."""
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    try:
        folder: Path = checkpoint_of(adapter.model)
    except ModelError:
        return adapter.tokenizer
    return auto.from_pretrained(folder, trust_remote_code=False)
