"""A steered model for lm-evaluation-harness."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from sims_lens.adapter import adapt
from sims_lens.errors import CapabilityError
from sims_lens.harness.texts import SteeredTexts
from sims_lens.plan import NOTHING, SteeringPlan

MAX_NEW_TOKENS = 256
"""Longest continuation where a task doesn't say; as in lm-eval's Hugging Face model."""

_KNOWN = ("until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks")
"""Of a task's generation_kwargs, what is acted on once lm-eval has normalised them."""


def lm_eval_model(
    model: Any,
    plan: SteeringPlan = NOTHING,
    *,
    add_bos: bool | None = None,
    batch_rows: int | None = None,
    seed: int = 0,
) -> Any:
    """A steered model that lm-evaluation-harness can evaluate: an ``lm_eval.api.model.TemplateLM``.

    Where a plan acts on ``"generation"``, the context's last token and the continuation are steered; on ``"all"``, the
    context too. In rolling log-likelihoods (perplexity of a document) the document is the continuation: a plan that
    acts on responses steers all of it, one that acts on prompts only steers no more than the token before each window.
    Without a plan the figures are those of lm-eval's own Hugging Face model (``tests/test_harness.py`` compares).

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered. It is steered only while it computes.
        plan: what steers; by default nothing.
        add_bos: whether a text begins with a BOS; None: as the checkpoint's own tokenizer does it
            (:class:`~sims_lens.harness.texts.SteeredTexts`).
        batch_rows: sequences side by side, at most; None takes what fits.
        seed: of the draws, in tasks that sample.

    Raises:
        CapabilityError: lm-eval isn't installed.
        ModelError: a plan is attached to the model already.
        PlanError: the plan doesn't fit the model.

    Reference: Gao et al., EleutherAI/lm-evaluation-harness 0.4.13, ``lm_eval/api/model.py``.
    """
    check_installed()
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    texts = SteeredTexts(model, plan, add_bos=add_bos, batch_rows=batch_rows)
    tokenizer_of_model = texts.tokenizer

    # Made here, because lm-eval is no dependency of ours: nothing of it is imported before it is wanted.
    class SteeredLM(TemplateLM):  # type: ignore[misc]
        """A model under a plan."""

        tokenizer = tokenizer_of_model

        @property
        def eot_token_id(self) -> int:
            return texts.end

        @property
        def prefix_token_id(self) -> int:
            return texts.start

        @property
        def max_length(self) -> int:
            return texts.context_tokens

        @property
        def device(self) -> Any:
            return adapt(model).device

        @property
        def tokenizer_name(self) -> str:
            return adapt(model).name.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
            return texts.encode(string, special=add_special_tokens)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return str(texts.tokenizer.chat_template or "") if chat_template else ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if not texts.tokenizer.chat_template:
                raise CapabilityError(f"{adapt(model).name} has no chat template; leave apply_chat_template=False")
            text = texts.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return str(text)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_options: Any
        ) -> list[tuple[float, bool]]:
            del disable_tqdm
            found = texts.log_likelihoods([(context, continuation) for _, context, continuation in requests])
            for (key, _, _), answer in zip(requests, found, strict=True):
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            del disable_tqdm
            windows: list[tuple[list[int], list[int]]] = []
            owner: list[int] = []
            for index, request in enumerate(requests):
                (text,) = request.args
                cut = get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for context, continuation in map(make_disjoint_window, cut):
                    windows.append((context, continuation))
                    owner.append(index)
            totals = [0.0] * len(requests)
            for index, (nats, _) in zip(owner, texts.log_likelihoods(windows), strict=True):
                totals[index] += nats
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            del disable_tqdm
            answers: list[str] = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(repr(request.args[1]), []).append(index)
            for indices in groups.values():
                asked = dict(normalize_gen_kwargs(requests[indices[0]].args[1], MAX_NEW_TOKENS))
                if unknown := sorted(set(asked) - set(_KNOWN)):
                    raise CapabilityError(
                        f"the task asks for generation_kwargs {', '.join(unknown)}, which a steered model doesn't "
                        f"act on; it knows {', '.join(_KNOWN)}: leave them out of the task"
                    )
                done = texts.complete(
                    [requests[i].args[0] for i in indices],
                    max_new_tokens=int(asked["max_gen_toks"]),
                    stop=asked.get("until", []),
                    temperature=float(asked.get("temperature", 1.0)) if asked.get("do_sample") else 0.0,
                    top_k=asked.get("top_k") or None,
                    top_p=float(asked.get("top_p") or 1.0),
                    seed=seed,
                )
                for i, answer in zip(indices, done, strict=True):
                    answers[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
            return answers

    return SteeredLM()


def check_installed() -> None:
    """Raise :class:`CapabilityError` where lm-eval isn't installed."""
    if find_spec("lm_eval") is None:
        raise CapabilityError("this needs lm-evaluation-harness; pip install 'sims-lens[lm-eval]'")
