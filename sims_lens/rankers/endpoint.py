"""A judge behind an OpenAI-compatible endpoint."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import permutations
from threading import Event, Lock
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from sims_lens.client import Client, in_parallel
from sims_lens.errors import RankerError

TEMPLATE: Final = """Here are a prompt and two responses to it. Which response is {criterion}?

[Prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}

Answer with one letter, A or B, and nothing else."""
"""What the judge is asked, unless told otherwise."""

_FIELD: Final = re.compile(r"\{(criterion|prompt|first|second)\}")
_LETTER: Final = re.compile(r"[\s\W]*([AB])[\s\W]*")  # "A", "(B)", "**A**."; not "A is better": it may be "A good ..."


class EndpointJudge:
    """Asks a chat model behind an OpenAI-compatible endpoint which of two responses is better.

    Each pair is asked in both orders. Where the server gives log-probabilities, a verdict is P(A) / (P(A) + P(B)) of
    the first token; a letter that isn't among the likeliest tokens counts with the most that it can have, the
    probability of the least likely of them or what they leave. Otherwise the answer has to be one letter. An answer
    that is none says nothing (0.5), and is counted as ``unparsable``. A response's score is its mean win rate.

    Calls that fail with 408, 409, 429 or a server's error (500 and above), that time out or whose answer is broken,
    are repeated: after 0.5, 1, 2, ... 15 seconds, less a random part of it, or when the server says. A redirect isn't
    followed. Only ``https`` is spoken, or ``http`` with this machine.

    The key is read from the environment for each call and sent in its header, and goes nowhere else.

    Args:
        base_url: such as "https://api.openai.com/v1" or "http://localhost:8000/v1".
        model: the model's name there.
        criterion: what "better" means, as it follows "which response is".
        api_key_env: the environment variable that holds the key; None for a server that asks for none. On this machine
            the variable needn't be set.
        template: what is asked, with the placeholders {criterion}, {prompt}, {first} and {second}.
        price: of a million prompt tokens and of a million completion tokens, in any currency.
        per_minute: calls per minute, at most, repeated ones included.
        concurrency: calls at the same time.
        timeout: seconds that a call may stand still.
        retries: how often a call is repeated.
        body: more fields of the request, or other values for them; None takes one out, as
            ``{"max_tokens": None, "max_completion_tokens": 2000}``.

    Attributes:
        name: model and criterion.
        count: what was spent so far: ``calls`` answered, ``retries``, ``unparsable`` answers, ``prefill`` (prompt) and
            ``decode`` (completion) tokens as the server counts them.

    Raises:
        RankerError: the address isn't a safe one, the template lacks a placeholder, or a number is out of range.

    Reference:
        L. Zheng et al., "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena", NeurIPS 2023, for both orders; Y. Wu
        et al., "Self-play preference optimization", 2024, for the mean win rate.
    """

    pointwise = False
    judges = True

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        criterion: str = "more helpful",
        api_key_env: str | None = "OPENAI_API_KEY",
        template: str = TEMPLATE,
        price: tuple[int | float, int | float] | None = None,
        per_minute: int | float | None = None,
        concurrency: int = 4,
        timeout: int | float = 60,
        retries: int = 12,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        client = Client(
            base_url,
            "/chat/completions",
            error=RankerError,
            about=f"(model {model!r})",
            api_key_env=api_key_env,
            per_minute=per_minute,
            timeout=timeout,
            retries=retries,
        )
        lacking = sorted({"criterion", "prompt", "first", "second"} - set(_FIELD.findall(template)))
        if lacking:
            raise RankerError(f"the template lacks {', '.join(f'{{{name}}}' for name in lacking)}; put it in")
        if concurrency < 1:
            raise RankerError(f"concurrency = {concurrency} is not 1 or more")
        self.name = f"{model}({criterion})"
        self._request = {"model": model, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}
        self._request = {key: value for key, value in (self._request | dict(body or {})).items() if value is not None}
        try:
            self._identity = json.loads(json.dumps([client.url, self._request, criterion, template]))
        except (TypeError, ValueError) as error:
            raise RankerError(f"body holds something that JSON can't: {error}") from error
        self.url, self._client = client.url, client
        self._criterion, self._template = criterion, template
        self._price, self._concurrency = price, concurrency
        self._logprobs, self._lock = "logprobs" in self._request, Lock()
        self._known: Mapping[str, float] = {}
        self._tell: Callable[[str, float], None] | None = None
        self.count = {"calls": 0, "retries": 0, "unparsable": 0, "prefill": 0, "decode": 0}

    def __repr__(self) -> str:
        return f"EndpointJudge({self.url!r}, {self.name!r})"

    @property
    def settings(self) -> Any:
        """What the scores depend on, beside the texts: all but the key and how calls are made."""
        return self._identity

    @property
    def cost(self) -> float | None:
        """What the calls so far cost, in the currency of ``price``; None where there is no price."""
        if self._price is None:
            return None
        return (self.count["prefill"] * self._price[0] + self.count["decode"] * self._price[1]) / 1e6

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """Score the responses to one prompt by all pairs in both orders.

        Args:
            prompt: what was asked.
            responses: what was answered.

        Returns:
            The mean win rate, 0 to 1, of each response; 0.5 for a single one.

        Raises:
            RankerError: the endpoint refused, or failed each time.
        """
        from sims_lens.rankers.tournament import averaged_over_orders, mean_win_rate

        return tuple(float(rate) for rate in mean_win_rate(averaged_over_orders(self.matrix(prompt, responses))))

    def matrix(self, prompt: str, responses: Sequence[str]) -> Float[np.ndarray, "response response"]:
        """Every verdict as it was given, for an audit of the judge.

        Args:
            prompt: what was asked.
            responses: what was answered.

        Returns:
            P(i better than j | i shown first) in row i, column j; NaN on the diagonal, 0.5 for an unparsable answer.

        Raises:
            RankerError: the endpoint refused, or failed each time.
        """
        found = np.full((len(responses), len(responses)), np.nan)
        pairs = list(permutations(range(len(responses)), 2))
        verdicts = self._ask([(prompt, responses[i], responses[j]) for i, j in pairs])
        for pair, verdict in zip(pairs, verdicts, strict=True):
            found[pair] = verdict
        return found

    @contextmanager
    def keep(self, known: Mapping[str, float], tell: Callable[[str, float], None]) -> Iterator[None]:
        """A ``with`` block inside which every answer is told as it comes, so that a crash loses none of a matrix.

        Args:
            known: P(first is better) by the question's key; these are not asked for.
            tell: is called with a key and an answer, by one thread at a time.
        """
        self._known, self._tell = known, tell
        try:
            yield
        finally:
            self._known, self._tell = {}, None

    def _ask(self, questions: Sequence[tuple[str, str, str]]) -> list[float]:
        """P(first is better) of each question, some at the same time. One that fails stops the others."""
        concurrency = min(self._concurrency, max(1, len(questions)))
        found = dict(in_parallel(self._verdict, questions, concurrency=concurrency))
        return [found[number] for number in range(len(questions))]

    def _verdict(self, stop: Event, question: tuple[str, str, str]) -> float:
        key = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16]
        if key in self._known:
            return float(self._known[key])
        verdict = self._judged(stop, *question)
        with self._lock:
            if self._tell is not None:
                self._tell(key, verdict)
        return verdict

    def _judged(self, stop: Event, prompt: str, first: str, second: str) -> float:
        texts = {"criterion": self._criterion, "prompt": prompt, "first": first, "second": second}
        text = _FIELD.sub(lambda match: texts[match[1]], self._template)
        body = {"messages": [{"role": "user", "content": text}], **self._request}
        try:
            answer = self._client.post(
                body if self._logprobs else _without_logprobs(body),
                _answer,
                what="chat completion",
                stop=stop,
                amend=self._for_a_letter,
            )
        finally:
            with self._lock:
                self.count["retries"] = self._client.repeated
        verdict = verdict_of(answer)
        with self._lock:
            self.count["calls"] += 1
            self.count["prefill"] += answer["prompt_tokens"]
            self.count["decode"] += answer["completion_tokens"]
            self.count["unparsable"] += verdict is None
        return 0.5 if verdict is None else verdict

    def _for_a_letter(self, said: str, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Where a server knows no log-probabilities, it is asked for a letter from then on."""
        if "logprob" not in said or "logprobs" not in body:
            return None
        self._logprobs = False
        return _without_logprobs(body)


def verdict_of(answer: Mapping[str, Any]) -> float | None:
    """P(A) from an answer, by its first token's log-probabilities, else by its text.

    Args:
        answer: ``text``, and ``likeliest``: pairs of a token and its log-probability, where the server gave them.

    Returns:
        0 to 1, exactly 0 or 1 by text; None if there is neither a letter among the tokens nor one alone in the text.

    Examples:
        >>> verdict_of({"text": "B.", "likeliest": []})
        0.0
        >>> round(verdict_of({"text": "A", "likeliest": [("A", math.log(0.6)), (" B", math.log(0.2))]}), 6)
        0.75
        >>> verdict_of({"text": "Both are fine", "likeliest": [("Both", -0.1)]})
    """
    likely = [(token.strip(), math.exp(min(logprob, 0.0))) for token, logprob in answer["likeliest"]]
    letters = {letter: [p for token, p in likely if token == letter] for letter in "AB"}
    if any(letters.values()):
        least = max(min(1 - sum(p for _, p in likely), *(p for _, p in likely)), 0.0)
        a, b = (sum(letters[letter]) or least for letter in "AB")
        if a + b > 0:
            return a / (a + b)
    found = _LETTER.fullmatch(answer["text"])
    return None if found is None else float(found[1] == "A")


def _without_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("logprobs", "top_logprobs")}


def _log(value: Any) -> float:
    """A log-probability; minus infinity is one."""
    if math.isnan(found := float(value)):
        raise ValueError("a log-probability that is no number")
    return found


def _answer(row: Any) -> dict[str, Any]:
    """What matters of a chat completion."""
    choice = row["choices"][0]
    first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
    usage = row.get("usage") or {}
    return {
        "text": str(choice["message"].get("content") or ""),
        "likeliest": [(str(item["token"]), _log(item["logprob"])) for item in first.get("top_logprobs") or ()],
        "prompt_tokens": int(usage.get("prompt_tokens") or 0),
        "completion_tokens": int(usage.get("completion_tokens") or 0),
    }
