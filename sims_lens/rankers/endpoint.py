"""A judge behind an OpenAI-compatible endpoint, with nothing but the standard library."""

import ipaddress
import json
import math
import os
import random
import re
import ssl
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from itertools import permutations
from threading import Event, Lock
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

import numpy as np
from jaxtyping import Float

from sims_lens.checks import check_kind, is_number, shown
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
_FIRST_WAIT: Final = 0.5  # seconds before the first retry, doubled each time
_LAST_WAIT: Final = 15.0  # the doubling ends here
_LONGEST_WAIT: Final = 120.0  # a server that asks for more has closed for the day
_MOST_BYTES: Final = 16 << 20


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
        for name, text in (("base_url", base_url), ("model", model), ("criterion", criterion), ("template", template)):
            check_kind(name, text, str, "give a text", RankerError)
        if api_key_env is not None:
            check_kind("api_key_env", api_key_env, str, "name an environment variable", RankerError)
        self.url, self._host, self._local = _address(base_url)
        lacking = sorted({"criterion", "prompt", "first", "second"} - set(_FIELD.findall(template)))
        if lacking:
            raise RankerError(f"the template lacks {', '.join(f'{{{name}}}' for name in lacking)}; put it in")
        if api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", api_key_env):
            raise RankerError(  # and doesn't say what it is: it may be the key itself
                "api_key_env is the name of an environment variable, in capitals, such as 'OPENAI_API_KEY', and never "
                "the key"
            )
        for name, value, least in (
            ("per_minute", per_minute, None),
            ("timeout", timeout, None),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
        ):
            if value is not None and not (is_number(value) and (value > 0 if least is None else value >= least)):
                raise RankerError(
                    f"{name} = {shown(value)} is not {'above 0' if least is None else f'{least} or more'}"
                )
        if body is not None:
            check_kind("body", body, Mapping, "give one such as {'temperature': 0.5}", RankerError)
        self.name = f"{model}({criterion})"
        self._request = {"model": model, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}
        self._request = {key: value for key, value in (self._request | dict(body or {})).items() if value is not None}
        try:
            self._identity = json.loads(json.dumps([self.url, self._request, criterion, template]))
        except (TypeError, ValueError) as error:
            raise RankerError(f"body holds something that JSON can't: {error}") from error
        self._criterion, self._template, self._key_name = criterion, template, api_key_env
        self._price, self._gap = price, 60 / per_minute if per_minute else 0.0
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._logprobs = "logprobs" in self._request
        self._opener = _opener(self._local)
        self._lock, self._next, self._random = Lock(), 0.0, random.Random()
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

    def _ask(self, questions: Sequence[tuple[str, str, str]]) -> list[float]:
        """P(first is better) of each question, some at the same time. One that fails stops the others."""
        if not questions:
            return []
        stop = Event()
        with ThreadPoolExecutor(min(self._concurrency, len(questions))) as pool:
            futures: list[Future[float]] = [pool.submit(self._verdict, stop, *question) for question in questions]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # an interrupt from the keyboard comes here too
                stop.set()  # no-one starts another call
                for future in futures:
                    future.cancel()
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise error
        return [future.result() for future in futures]

    def _verdict(self, stop: Event, prompt: str, first: str, second: str) -> float:
        try:
            return self._judged(stop, prompt, first, second)
        except RankerError:
            stop.set()
            raise

    def _judged(self, stop: Event, prompt: str, first: str, second: str) -> float:
        texts = {"criterion": self._criterion, "prompt": prompt, "first": first, "second": second}
        text = _FIELD.sub(lambda match: texts[match[1]], self._template)
        answer = self._call(stop, {"messages": [{"role": "user", "content": text}], **self._request})
        verdict = verdict_of(answer)
        with self._lock:
            self.count["calls"] += 1
            self.count["prefill"] += answer["prompt_tokens"]
            self.count["decode"] += answer["completion_tokens"]
            self.count["unparsable"] += verdict is None
        return 0.5 if verdict is None else verdict

    def _call(self, stop: Event, body: dict[str, Any]) -> dict[str, Any]:
        """Ask until there is an answer, or no hope of one."""
        problem = ""
        for attempt in range(self._retries + 1):
            self._wait_for_turn(stop)
            if not self._logprobs:
                body = {key: value for key, value in body.items() if key not in ("logprobs", "top_logprobs")}
            try:
                return self._send(body)
            except _FailureError as failure:
                problem, hint = failure.problem, failure.wait
                if failure.final and failure.about_logprobs and "logprobs" in body:
                    self._logprobs = False  # this server knows none: ask for a letter from now on
                    continue
                if failure.final:
                    raise RankerError(f"{self._where()} {problem}") from None
                if hint is not None and hint > _LONGEST_WAIT:
                    raise RankerError(f"{self._where()} {problem} and asks to wait {hint:.0f} s; go on then") from None
            if attempt < self._retries:
                with self._lock:
                    self.count["retries"] += 1
                    share = self._random.uniform(0.5, 1)
                own = min(_FIRST_WAIT * 2**attempt, _LAST_WAIT) * share
                self._pause(stop, own if hint is None else max(hint, own))
        raise RankerError(
            f"{self._where()} failed {self._retries + 1} times in a row; the last time it {problem}. "
            "What was judged before is kept where verdicts are cached: go on later"
        )

    def _send(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One call. What it raises says nothing about the key."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "sims_lens"}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = Request(self.url, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                data = response.read(_MOST_BYTES)
        except HTTPError as error:
            with error:
                raise _refusal(error, key) from None
        except (OSError, HTTPException) as error:  # a timeout is an OSError too
            reason = error.reason if isinstance(error, URLError) else error
            kind = type(reason).__name__
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise _FailureError(
                    f"has a certificate that isn't valid ({reason.verify_message})", final=True
                ) from None
            if isinstance(reason, TimeoutError):
                raise _FailureError(f"didn't answer within {self._timeout:g} s") from None
            raise _FailureError(f"couldn't be reached, or broke off ({kind})") from None
        answer = _answer(data)
        if answer is None:
            raise _FailureError("gave an answer that is no chat completion in JSON")
        return answer

    def _key(self) -> str:
        """The key, from the environment."""
        if self._key_name is None:
            return ""
        key = os.environ.get(self._key_name, "").strip()
        if not key and not self._local:
            raise RankerError(f"{self._where()} needs a key: set the environment variable {self._key_name}")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise RankerError(
                f"what {self._key_name} holds can't be a key: it has spaces, line breaks or odd characters"
            )
        return key

    def _where(self) -> str:
        return f"the endpoint {self.url} (model {self._request['model']!r})"

    def _wait_for_turn(self, stop: Event) -> None:
        """Keep the rate, over all threads."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        self._pause(stop, turn - now)

    def _pause(self, stop: Event, seconds: float) -> None:
        """Wait, unless another call has failed for good."""
        if stop.wait(seconds) if seconds > 0 else stop.is_set():
            raise _StoppedError(f"{self._where()}: stopped, because another call failed")


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


class _StoppedError(RankerError):
    """A call was given up because another one failed."""


class _FailureError(Exception):
    """A call failed: how, and whether it is of use to repeat it."""

    def __init__(
        self, problem: str, *, final: bool = False, wait: float | None = None, about_logprobs: bool = False
    ) -> None:
        super().__init__(problem)
        self.problem, self.final, self.wait, self.about_logprobs = problem, final, wait, about_logprobs


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would take the key to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _opener(local: bool) -> OpenerDirector:
    """No redirects; and no proxy between this machine and itself, which would read the key."""
    return build_opener(_NoRedirect(), *([ProxyHandler({})] if local else []))


def _address(base_url: str) -> tuple[str, str, bool]:
    """The address to post to, its host, and whether that is this machine."""
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise RankerError(f"base_url is no address: {error}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RankerError(
            "base_url has a user, a password, a query or a fragment; keys go into an environment variable"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise RankerError(f"base_url {base_url!r} is no address such as 'https://api.openai.com/v1'")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if parts.scheme == "http" and not local:
        raise RankerError(f"base_url {base_url!r} would send the key and the texts in the clear; use https")
    name = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{name}{'' if port is None else f':{port}'}{path}/chat/completions", host, local


def _refusal(error: HTTPError, key: str) -> _FailureError:
    """What a status other than 200 means."""
    try:
        text = error.read(1 << 16).decode("utf-8", "replace")
    except (OSError, HTTPException):
        text = ""
    problem = f"answered {error.code} {error.reason}"
    if error.code in (401, 403):  # such a message may quote the key
        return _FailureError(f"{problem}; check the key and what it may do", final=True)
    if 300 <= error.code < 400:
        return _FailureError(f"{problem}, a redirect, which isn't followed; give its own address", final=True)
    if error.code in (408, 409, 429) or (error.code >= 500 and error.code != 501):
        return _FailureError(problem, wait=_seconds(error.headers.get("Retry-After")))
    said = " ".join(text.split())[:200]
    said = said.replace(key, "...") if key else said
    about = error.code in (400, 422) and "logprob" in text
    return _FailureError(f"{problem}: {said}" if said else problem, final=True, about_logprobs=about)


def _seconds(header: str | None) -> float | None:
    """How long a Retry-After header asks to wait: seconds, or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        seconds = (date - datetime.now(timezone.utc)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _answer(data: bytes) -> dict[str, Any] | None:
    """What matters of a chat completion; None if it isn't one."""
    try:
        row = json.loads(data)
        choice = row["choices"][0]
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
        usage = row.get("usage") or {}
        return {
            "text": str(choice["message"].get("content") or ""),
            "likeliest": [(str(item["token"]), float(item["logprob"])) for item in first.get("top_logprobs") or ()],
            "prompt_tokens": int(usage.get("prompt_tokens") or 0),
            "completion_tokens": int(usage.get("completion_tokens") or 0),
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
