"""JSON over HTTPS with nothing but the standard library: safe addresses, keys from the environment, calls repeated.

Only ``https`` is spoken, or ``http`` with this machine; a redirect isn't followed. The key is read from the environment
for each call and sent in its header, and goes nowhere else. Calls that fail with 408, 409, 429 or a server's error (500
and above), that time out or whose answer is broken, are repeated: after 0.5, 1, 2, ... 15 seconds, less a random part
of it, or when the server says.
"""

import ipaddress
import json
import math
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from itertools import islice
from threading import Event, Lock
from typing import Any, Final, NoReturn, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from sims_lens.checks import check_kind, is_number, shown
from sims_lens.errors import SimsError

_FIRST_WAIT: Final = 0.5  # seconds before the first retry, doubled each time
_LAST_WAIT: Final = 15.0  # the doubling ends here
_LONGEST_WAIT: Final = 120.0  # a server that asks for more has closed for the day
_MOST_BYTES: Final = 16 << 20
_LONGEST_CALLS: Final = 10  # timeouts that an answer may take in all: one that drips never stands still

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Client:
    """Posts to one address of a server until there is an answer, or no hope of one.

    Args:
        base_url: such as "https://api.openai.com/v1" or "http://localhost:8000/v1".
        path: of what is asked there, such as "/chat/completions"; ``base_url`` may end in it already.
        error: what is raised when a call fails.
        about: said of the endpoint in messages, such as "(model 'x')".
        api_key_env: the environment variable that holds the key; None for a server that asks for none. On this machine
            the variable needn't be set.
        per_minute: calls per minute, at most, repeated ones included.
        timeout: seconds that a call may stand still.
        retries: how often a call is repeated.

    Attributes:
        url: what is posted to.
        repeated: calls that were repeated so far.

    Raises:
        SimsError: of the kind ``error``: the address isn't a safe one, or a number is out of range.
    """

    def __init__(
        self,
        base_url: str,
        path: str,
        *,
        error: type[SimsError],
        about: str = "",
        api_key_env: str | None = None,
        per_minute: int | float | None = None,
        timeout: int | float = 60,
        retries: int = 12,
    ) -> None:
        self._error = error
        self.url, self._local = self._address(base_url, path)
        if api_key_env is not None:
            check_kind("api_key_env", api_key_env, str, "name an environment variable", error)
        if api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", api_key_env):
            raise error(  # and doesn't say what it is: it may be the key itself
                "api_key_env is the name of an environment variable, in capitals, such as 'OPENAI_API_KEY', and never "
                "the key"
            )
        for name, value, least in (
            ("per_minute", per_minute, None),
            ("timeout", timeout, None),
            ("retries", retries, 0),
        ):
            if value is not None and not (is_number(value) and (value > 0 if least is None else value >= least)):
                raise error(f"{name} = {shown(value)} is not {'above 0' if least is None else f'{least} or more'}")
        self._where = f"the endpoint {self.url}{f' {about}' if about else ''}"
        self._key_name, self._gap = api_key_env, 60 / per_minute if per_minute else 0.0
        self._timeout, self._retries = timeout, retries
        self._opener = _opener(self._local)
        self._lock, self._next, self._random = Lock(), 0.0, random.Random()
        self.repeated = 0

    def post(
        self,
        body: Mapping[str, Any],
        read: Callable[[Any], Answer | None],
        *,
        what: str,
        stop: Event | None = None,
        amend: Callable[[str, Mapping[str, Any]], Mapping[str, Any] | None] = lambda _said, _body: None,
    ) -> Answer:
        """Ask until there is an answer.

        Args:
            body: of the request.
            read: what matters of the answer's JSON; None, or an error of a wrong shape, if it isn't one.
            what: such an answer in words, for the message where it isn't one.
            stop: once it is set, no call is begun, and no wait is waited for.
            amend: gives another body for one that the server has refused with 400 or 422, by what it said; or None.

        Raises:
            SimsError: of the client's kind: the server refused, or failed each time.
        """
        stop, problem = stop or Event(), ""
        for attempt in range(self._retries + 1):
            self._wait_for_turn(stop)
            try:
                return self._send(body, read, what)
            except _FailureError as failure:
                problem, hint = failure.problem, failure.wait
                if failure.final:
                    other = amend(failure.said, body) if failure.said else None
                    if other is None:
                        raise self._error(f"{self._where} {problem}") from None
                    body = other
                    continue
                if hint is not None and hint > _LONGEST_WAIT:
                    raise self._error(f"{self._where} {problem} and asks to wait {hint:.0f} s; go on then") from None
            if attempt < self._retries:
                with self._lock:
                    self.repeated += 1
                    share = self._random.uniform(0.5, 1)
                own = min(_FIRST_WAIT * 2**attempt, _LAST_WAIT) * share
                self._pause(stop, own if hint is None else max(hint, own))
        raise self._error(
            f"{self._where} failed {self._retries + 1} times in a row; the last time it {problem}. "
            "What was done before is kept: go on later"
        )

    def _send(self, body: Mapping[str, Any], read: Callable[[Any], Answer | None], what: str) -> Answer:
        """One call. What it raises says nothing about the key."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "sims_lens"}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = Request(self.url, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                data = _body(response, time.monotonic() + _LONGEST_CALLS * self._timeout)
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
        if (answer := _read(data, read)) is None:
            raise _FailureError(f"gave an answer that is no {what} in JSON")
        return answer

    def _key(self) -> str:
        """The key, from the environment."""
        if self._key_name is None:
            return ""
        key = os.environ.get(self._key_name, "").strip()
        if not key and not self._local:
            raise self._error(f"{self._where} needs a key: set the environment variable {self._key_name}")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise self._error(
                f"what {self._key_name} holds can't be a key: it has spaces, line breaks or odd characters"
            )
        return key

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
            raise _StoppedError(f"{self._where}: stopped, because another call failed")

    def _address(self, base_url: str, path: str) -> tuple[str, bool]:
        """The address to post to, and whether that is this machine."""

        def refuse(why: str) -> NoReturn:
            raise self._error(why) from None

        try:
            parts = urlsplit(base_url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            refuse(f"base_url is no address: {error}")
        if "@" in parts.netloc or parts.query or parts.fragment:
            refuse("base_url has a user, a password, a query or a fragment; keys go into an environment variable")
        if parts.scheme not in ("http", "https") or not host:
            refuse(f"base_url {base_url!r} is no address such as 'https://api.openai.com/v1'")
        try:
            local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = False
        if parts.scheme == "http" and not local:
            refuse(f"base_url {base_url!r} would send the key and the texts in the clear; use https")
        name = f"[{host}]" if ":" in host else host
        base = parts.path.rstrip("/").removesuffix(path)
        return f"{parts.scheme}://{name}{'' if port is None else f':{port}'}{base}{path}", local


def in_parallel(
    call: Callable[[Event, Item], Answer], items: Iterable[Item], *, concurrency: int
) -> Iterator[tuple[int, Answer]]:
    """Call for each item, some at the same time, and yield the answers with their item's number as they come.

    One that fails stops the others; what was answered meanwhile is yielded before the error is raised. No more items
    are taken than are worked on.

    Args:
        call: of an event, which is set when the others have stopped, and an item.
        items: any number of them.
        concurrency: calls at the same time.
    """
    stop = Event()

    def one(item: Item) -> Answer:
        try:
            return call(stop, item)
        except BaseException:
            stop.set()
            raise

    waiting, errors = enumerate(items), list[BaseException]()
    with ThreadPoolExecutor(concurrency) as pool:
        live: dict[Future[Answer], int] = {}
        try:
            while True:
                if not stop.is_set():
                    more = islice(waiting, 2 * concurrency - len(live))
                    live |= {pool.submit(one, item): number for number, item in more}
                if not live:
                    break
                done, _ = wait(live, return_when=FIRST_COMPLETED)
                if stop.is_set():
                    done |= {future for future in live if future.cancel()}
                for future in done:
                    number = live.pop(future)
                    if future.cancelled():
                        continue
                    if error := future.exception():
                        errors.append(error)
                    else:
                        yield number, future.result()
        finally:  # an interrupt from the keyboard comes here too
            stop.set()
            for future in live:
                future.cancel()
    for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
        raise error


class _StoppedError(SimsError):
    """A call was given up because another one failed."""


class _FailureError(Exception):
    """A call failed: how, and whether it is of use to repeat it; ``said`` is a server's word about a bad request."""

    def __init__(self, problem: str, *, final: bool = False, wait: float | None = None, said: str = "") -> None:
        super().__init__(problem)
        self.problem, self.final, self.wait, self.said = problem, final, wait, said


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would take the key to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _opener(local: bool) -> OpenerDirector:
    """No redirects; and no proxy between this machine and itself, which would read the key."""
    return build_opener(_NoRedirect(), *([ProxyHandler({})] if local else []))


def _body(response: Any, end: float) -> bytes:
    """What an answer holds, if it isn't too long and doesn't take too long."""
    data = b""
    while block := response.read1(1 << 16):
        data += block
        if len(data) > _MOST_BYTES:
            raise _FailureError(f"gave an answer of more than {_MOST_BYTES >> 20} MiB", final=True)
        if time.monotonic() > end:
            raise _FailureError("didn't come to an end with its answer")
    return data


def _read(data: bytes, read: Callable[[Any], Answer | None]) -> Answer | None:
    """What is read from an answer in JSON; None if it isn't one, or of another shape."""
    try:
        return read(json.loads(data))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        return None


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
    return _FailureError(
        f"{problem}: {said}" if said else problem, final=True, said=text if error.code in (400, 422) else ""
    )


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


__all__ = ["Client", "in_parallel"]
