"""The judge behind an endpoint, against a server on this machine that behaves, and misbehaves, as told."""

import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sims_lens.client import Client, _body, _read
from sims_lens.errors import RankerError
from sims_lens.files import Journal
from sims_lens.rankers import CachedRanker, EndpointJudge, RecordedRanker, as_ranker
from sims_lens.rankers.endpoint import _answer

KEY = "sk-verysecret-0123456789"
ENV = "SIMS_TEST_KEY"

Reply = tuple[int, dict[str, str], str]
RESPONSES = ["a", "bbb", "cc"]
PARTS = re.compile(
    r"better by length.*\[Prompt\]\n(.*)\n\n\[Response A\]\n(.*)\n\n\[Response B\]\n(.*)\n\nAnswer", re.DOTALL
)


def completion(text: str, likeliest: dict[str, float] | None = None) -> Reply:
    """A chat completion with a verdict, and the probabilities of its first token."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if likeliest is not None:
        top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in likeliest.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage})


def by_length(body: dict[str, Any], probabilities: bool = True) -> Reply:
    """The longer response, with a liking for the first one."""
    found = PARTS.search(body["messages"][0]["content"])
    assert found is not None
    a = 1 / (1 + math.exp(len(found[3]) - len(found[2]) - 0.5))
    text = "A" if a > 0.5 else "B"
    return completion(text, {"A": 0.9 * a, "B": 0.9 * (1 - a), " the": 0.1}) if probabilities else completion(text)


def expected_matrix() -> np.ndarray:
    sizes = np.array([len(response) for response in RESPONSES])
    found = 1 / (1 + np.exp(sizes[None] - sizes[:, None] - 0.5))
    np.fill_diagonal(found, np.nan)
    return found


@dataclass
class Server:
    """Answers as ``reply(body, number of the call)`` says."""

    reply: Callable[[dict[str, Any], int], Reply]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    url: str = ""
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv(ENV, KEY)
    monkeypatch.setattr("sims_lens.client._FIRST_WAIT", 0.002)
    started: list[ThreadingHTTPServer] = []

    def start(reply: Callable[[dict[str, Any], int], Reply]) -> Server:
        server = Server(reply)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_POST(self) -> None:  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
                    server.times.append(time.monotonic())
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    status, headers, text = server.reply(body, number)
                finally:
                    with server.lock:
                        server.at_once -= 1
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the client has gone

            def log_message(self, format: str, *args: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append(http)
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        return server

    yield start
    for http in started:
        http.shutdown()
        http.server_close()


def judge(server: Server, **options: Any) -> EndpointJudge:
    return EndpointJudge(server.url, "tiny", **{"criterion": "better by length", "api_key_env": ENV, **options})


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_each_pair_is_asked_in_both_orders_and_read_off_the_probabilities(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, number: by_length(body))
    ranker = judge(server)
    matrix = ranker.matrix("How long?", RESPONSES)
    np.testing.assert_allclose(matrix, expected_matrix(), atol=1e-6)
    assert len(server.bodies) == 6
    symmetric = (matrix + 1 - matrix.T) / 2
    scores = as_ranker(ranker).rank("How long?", RESPONSES)
    assert scores == pytest.approx(np.nanmean(symmetric, axis=1)) and scores[1] > scores[2] > scores[0]
    assert ranker.count == {"calls": 12, "retries": 0, "unparsable": 0, "prefill": 1200, "decode": 24}
    body = server.bodies[0]
    assert {k: v for k, v in body.items() if k != "messages"} == {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert server.headers[0]["authorization"] == f"Bearer {KEY}" and server.headers[0]["path"] == "/v1/chat/completions"


def test_nothing_is_asked_where_there_is_nothing_to_compare(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, number: by_length(body))
    assert judge(server).rank("p", ["one"]) == (0.5,) and judge(server).rank("p", []) == ()
    assert server.bodies == []


def test_without_probabilities_one_letter_is_read(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, number: by_length(body, probabilities=False))
    matrix = judge(server).matrix("p", RESPONSES)
    np.testing.assert_array_equal(matrix, np.where(np.isnan(expected_matrix()), np.nan, expected_matrix() > 0.5))


@pytest.mark.parametrize(
    ("text", "likeliest", "verdict"),
    [
        ("A", None, 1.0),
        (" (B).\n", None, 0.0),
        ("**A**", None, 1.0),
        ("A is better", None, None),
        ("a", None, None),
        ("A or B", None, None),
        ("", None, None),
        ("Response A", None, None),
        ("A", {"A": 0.9, " B": 0.1}, 0.9),
        ("A", {"A": 0.5, " A": 0.1, "B": 0.2, "C": 0.2}, 0.75),
        ("A", {"A": 0.99}, 0.99),  # the other letter has no more than what is left
        ("A", {"A": 0.9, "the": 0.05, "a": 0.01}, 0.9 / 0.91),  # or than the last one listed
        ("The", {"The": 0.9, "A": 0.002, "x": 0.001}, 2 / 3),
        ("A", {"The": 0.9}, 1.0),  # no letter among the tokens: the text counts
        ("The", {"The": 0.9}, None),
    ],
)
def test_an_answer_is_read_strictly(
    serve: Callable[..., Server], text: str, likeliest: dict[str, float] | None, verdict: float | None
) -> None:
    server = serve(lambda body, number: completion(text, likeliest))
    ranker = judge(server)
    matrix = ranker.matrix("p", ["x", "y"])
    expected = 0.5 if verdict is None else verdict
    assert matrix[0, 1] == pytest.approx(expected) and matrix[1, 0] == pytest.approx(expected)
    assert ranker.count["unparsable"] == (2 if verdict is None else 0)
    assert ranker.rank("p", ["x", "y"]) == pytest.approx(
        (0.5, 0.5)
    )  # a judge that always likes the first is worth nothing


def test_a_server_without_log_probabilities_is_asked_for_a_letter(serve: Callable[..., Server]) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        if "logprobs" in body or "top_logprobs" in body:
            return 400, {}, '{"error": {"message": "logprobs is not supported with this model"}}'
        return by_length(body, probabilities=False)

    server = serve(reply)
    ranker = judge(server, concurrency=1, retries=0 + 1)
    ranker.rank("p", RESPONSES)
    assert ranker.count["calls"] == 6 and len(server.bodies) == 7


def test_the_request_can_be_changed(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, number: completion("B"))
    template = "{criterion}|{prompt}|{first}|{second}|{not} {{this}}"
    body = {"max_tokens": None, "max_completion_tokens": 99, "logprobs": None, "top_logprobs": None, "temperature": 1}
    ranker = judge(server, template=template, body=body, concurrency=1, criterion="kinder")
    ranker.matrix("{first}", ["{second}", "y"])
    assert server.bodies[0] == {
        "model": "tiny",
        "temperature": 1,
        "max_completion_tokens": 99,
        "messages": [{"role": "user", "content": "kinder|{first}|{second}|y|{not} {{this}}"}],
    }
    assert ranker.name == "tiny(kinder)"


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_an_endpoint_that_fails_half_of_its_calls_works(serve: Callable[..., Server]) -> None:
    failing = [
        (500, {}, "oops"),
        (503, {}, ""),
        (429, {"Retry-After": "0"}, "slow down"),
        (200, {}, '{"choices": ['),
        (200, {}, "[]"),
    ]

    def reply(body: dict[str, Any], number: int) -> Reply:
        return by_length(body) if number % 2 else failing[number // 2 % len(failing)]

    server = serve(reply)
    ranker = judge(server)
    np.testing.assert_allclose(ranker.matrix("p", RESPONSES), expected_matrix(), atol=1e-6)
    assert ranker.count["calls"] == 6 and ranker.count["retries"] == len(server.bodies) - 6 >= 5
    assert ranker.count["prefill"] == 600


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((503, {}, f"key {KEY}"), "failed 3 times in a row; the last time it answered 503 Service Unavailable"),
        ((429, {}, f"key {KEY}"), "failed 3 times in a row; the last time it answered 429 Too Many Requests"),
        ((200, {}, "no json"), "the last time it gave an answer that is no chat completion in JSON"),
        ((200, {}, '{"choices": []}'), "no chat completion"),
        ((200, {}, '{"choices": [{"message": "A"}]}'), "no chat completion"),
        ((401, {}, f"Incorrect API key {KEY}"), "answered 401 Unauthorized; check the key"),
        ((404, {}, f"no model for {KEY}"), "answered 404 Not Found: no model for ...$"),
        ((400, {}, ""), "answered 400 Bad Request$"),
        ((302, {"Location": "http://127.0.0.1:1/"}, ""), "answered 302 Found, a redirect, which isn't followed"),
        ((429, {"Retry-After": "3600"}, ""), "answered 429 Too Many Requests and asks to wait 3600 s; go on then"),
    ],
)
def test_an_endpoint_that_keeps_failing_is_named_and_the_key_is_not(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture, reply: Reply, message: str
) -> None:
    server = serve(lambda body, number: reply)
    ranker = judge(server, retries=2)
    with caplog.at_level(logging.DEBUG), pytest.raises(RankerError, match=message) as caught:
        as_ranker(ranker).rank("p", ["x", "y"])
    chain: BaseException | None = caught.value
    text = caplog.text
    while chain is not None:
        text += repr(chain)
        chain = chain.__cause__ or chain.__context__
    assert f"{server.url}/chat/completions (model 'tiny')" in str(caught.value)
    assert KEY not in text and KEY not in repr(ranker) and KEY not in json.dumps(ranker.settings)
    assert KEY not in repr(vars(ranker))


def test_a_server_says_when_to_come_back(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        if number == 0:
            return 429, {"Retry-After": "0.3"}, ""
        if number == 1:
            return 503, {"Retry-After": formatdate(time.time() - 100, usegmt=True)}, ""
        return (503, {"Retry-After": "soon"}, "") if number == 2 else by_length(body)

    server = serve(reply)
    ranker = judge(server, concurrency=1)
    ranker.matrix("p", ["x", "y"])
    assert server.times[1] - server.times[0] >= 0.3 and server.times[3] - server.times[1] < 0.3
    assert ranker.count["retries"] == 3


def test_waits_grow_and_are_random_in_part(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("sims_lens.client._FIRST_WAIT", 0.5)
    monkeypatch.setattr(Client, "_pause", lambda self, stop, seconds: waits.append(seconds))
    server = serve(lambda body, number: (500, {}, ""))
    with pytest.raises(RankerError, match="failed 9 times"):
        judge(server, retries=8)._client.post({}, dict, what="answer")
    longest = [0.5, 1, 2, 4, 8, 15, 15, 15]
    waits = [wait for wait in waits if wait > 0]
    assert len(waits) == 8 and all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert len({wait / most for wait, most in zip(waits, longest, strict=True)}) == 8


def test_a_slow_server_is_asked_again(serve: Callable[..., Server]) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        if number == 0:
            time.sleep(0.5)
        return by_length(body)

    ranker = judge(serve(reply), timeout=0.15, concurrency=1)
    ranker.matrix("p", ["x", "y"])
    assert ranker.count["retries"] == 1

    def slow(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.3)
        return by_length(body)

    with pytest.raises(RankerError, match=r"failed 2 times in a row; the last time it didn't answer within 0.1 s"):
        judge(serve(slow), timeout=0.1, retries=1).rank("p", ["x", "y"])


def test_an_answer_comes_to_an_end(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sims_lens.client._MOST_BYTES", 5000)
    with pytest.raises(RankerError, match="gave an answer of more than"):
        judge(serve(lambda body, number: (200, {}, "x" * 6000))).rank("p", ["x", "y"])

    class Dripping:
        def read1(self, _size: int) -> bytes:
            time.sleep(0.01)
            return b"x"

    with pytest.raises(Exception, match="didn't come to an end with its answer"):
        _body(Dripping(), time.monotonic() + 0.05)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"choices": 3}', "1" * 5000, '{"choices": [{"message": {}}]}' * 2])
def test_an_answer_that_is_none_is_asked_for_again(text: str) -> None:
    assert _read(text.encode(), _answer) is None


def test_a_probability_that_is_no_number_is_no_verdict() -> None:
    likely = [{"token": "A", "logprob": float("nan")}, {"token": "B", "logprob": -1.0}]
    choice = {"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": likely}]}}
    assert _read(json.dumps({"choices": [choice]}).encode(), _answer) is None
    likely[0]["logprob"] = float("-inf")
    found = _read(json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1}}).encode(), _answer)
    assert found is not None and found["likeliest"][0] == ("A", float("-inf"))
    endless = {"choices": [choice], "usage": {"prompt_tokens": float("inf")}}
    assert _read(json.dumps(endless).encode(), _answer) is None


def test_nobody_there(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, number: by_length(body))
    gone = EndpointJudge("http://127.0.0.1:9", "tiny", api_key_env=None, retries=2)
    with pytest.raises(RankerError, match=r"127.0.0.1:9/chat/.* couldn't be reached, or broke off \(ConnectionRefused"):
        gone.rank("p", ["x", "y"])
    assert server.bodies == []


def test_one_failure_for_good_stops_the_other_calls(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sims_lens.client._FIRST_WAIT", 30.0)

    def reply(body: dict[str, Any], number: int) -> Reply:
        if number == 3:
            time.sleep(0.1)
            return 404, {}, "no such model"
        return 500, {}, ""  # those wait for half a minute before they ask again

    server = serve(reply)
    start = time.monotonic()
    with pytest.raises(RankerError, match="404 Not Found: no such model"):
        judge(server).rank("p", ["x", "y", "z"])
    assert time.monotonic() - start < 5 and len(server.bodies) == 4


def test_a_run_that_goes_on_asks_for_the_rest_only(serve: Callable[..., Server], tmp_path: Path) -> None:
    broken = threading.Event()
    server = serve(lambda body, number: (500, {}, "") if broken.is_set() else by_length(body))
    items = [(f"p{i}", ["x", "yy"]) for i in range(4)]
    cached = CachedRanker(judge(server, retries=1), tmp_path)
    first = cached.rank_all(items[:2])
    broken.set()
    with pytest.raises(RankerError, match="500"):
        cached.rank_all(items)
    broken.clear()
    before = len(server.bodies)
    resumed = CachedRanker(judge(server, concurrency=1, timeout=9.0), tmp_path)  # how calls are made doesn't matter
    assert resumed.rank_all(items)[:2] == first and len(server.bodies) - before == 4
    assert KEY not in (tmp_path / "verdicts.jsonl").read_text()


def test_a_matrix_that_was_broken_off_asks_for_the_rest_only(serve: Callable[..., Server], tmp_path: Path) -> None:
    broken = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Reply:
        return (500, {}, "") if broken.is_set() and number >= 8 else by_length(body)

    server = serve(reply)
    asked = ["x", "yy", "zzz", "vvvv"]
    with Journal(tmp_path / "whole").open() as journal:
        whole = RecordedRanker(as_ranker(judge(server)), journal).rank("p", asked)
    server.bodies.clear()
    broken.set()
    cached = as_ranker(CachedRanker(judge(server, retries=0, concurrency=2), tmp_path / "verdicts"))
    with Journal(tmp_path / "j").open() as journal, pytest.raises(RankerError, match="500"):
        RecordedRanker(cached, journal).rank("p", asked)
    answered = len(Journal(tmp_path / "j").read())
    assert answered == 8
    broken.clear()
    server.bodies.clear()
    with Journal(tmp_path / "j").open() as journal:
        assert RecordedRanker(cached, journal).rank("p", asked) == whole
    assert len(server.bodies) == 12 - answered
    assert KEY not in (tmp_path / "j").read_text()


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_rate_is_kept_over_all_threads(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, number: by_length(body))
    judge(server, per_minute=60 / 0.05).rank("p", RESPONSES)
    assert server.times[-1] - server.times[0] >= 5 * 0.05 - 0.03


def test_calls_at_the_same_time_are_limited(serve: Callable[..., Server]) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.03)
        return by_length(body)

    server = serve(reply)
    judge(server, concurrency=2).rank("p", [*RESPONSES, "dddd"])
    assert server.most_at_once == 2


def test_cost_is_counted(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, number: by_length(body))
    ranker = judge(server, price=(2.5, 10.0))
    assert ranker.cost == 0.0 and judge(server).cost is None
    ranker.rank("p", RESPONSES)
    assert ranker.cost == pytest.approx((600 * 2.5 + 12 * 10) / 1e6)


# --- keys and addresses ----------------------------------------------------------------------------------------------


def test_the_key_is_read_when_it_is_needed(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(lambda body, number: by_length(body))
    ranker = judge(server)
    monkeypatch.setenv(ENV, "another")
    ranker.rank("p", ["x", "y"])
    assert server.headers[-1]["authorization"] == "Bearer another"
    monkeypatch.delenv(ENV)
    ranker.rank("p", ["x", "y"])  # a server on this machine may need none
    assert "authorization" not in server.headers[-1]
    with pytest.raises(RankerError, match=f"api.example.org.* set the environment variable {ENV}"):
        EndpointJudge("https://api.example.org/v1", "m", api_key_env=ENV).rank("p", ["x", "y"])


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "tab\t", "smart’quote"])
def test_a_key_that_no_header_can_carry_is_not_shown(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    server = serve(lambda body, number: by_length(body))
    monkeypatch.setenv(ENV, f"x{key}x")
    with pytest.raises(RankerError, match=f"what {ENV} holds can't be a key") as caught:
        judge(server).rank("p", ["x", "y"])
    assert key not in str(caught.value) and server.bodies == []


@pytest.mark.parametrize("name", [KEY, "sk_lower", "", "A B"])
def test_a_key_in_the_place_of_its_variable_is_not_shown(name: str) -> None:
    with pytest.raises(RankerError, match="api_key_env is the name of an environment variable") as caught:
        EndpointJudge("https://api.example.org/v1", "m", api_key_env=name)
    assert not name or name not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://api.example.org/v1", "in the clear; use https"),
        ("http://10.0.0.1/v1", "in the clear"),
        ("http://localhost.example.org/v1", "in the clear"),
        ("http://127.0.0.1.example.org", "in the clear"),
        ("http://0.0.0.0:8000", "in the clear"),
        ("ftp://localhost/v1", "is no address such as"),
        ("file:///etc/passwd", "is no address"),
        ("localhost:8000", "is no address"),
        ("https://", "is no address"),
        ("https://host:port/v1", "base_url is no address: Port could not"),
        (f"https://user:{KEY}@example.org/v1", "a user, a password, a query or a fragment"),
        (f"https://example.org/v1?key={KEY}", "a user, a password, a query or a fragment"),
    ],
)
def test_an_unsafe_address_is_refused(url: str, message: str) -> None:
    with pytest.raises(RankerError, match=message) as caught:
        EndpointJudge(url, "m")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://api.example.org/v1", "https://api.example.org/v1/chat/completions"),
        ("https://api.example.org/v1/", "https://api.example.org/v1/chat/completions"),
        ("https://api.example.org/v1/chat/completions", "https://api.example.org/v1/chat/completions"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1/chat/completions"),
        ("http://[::1]:8000", "http://[::1]:8000/chat/completions"),
        ("http://127.8.8.8", "http://127.8.8.8/chat/completions"),
    ],
)
def test_a_safe_address_is_completed(url: str, address: str) -> None:
    assert EndpointJudge(url, "m").url == address


def test_this_machine_is_not_asked_through_a_proxy(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(lambda body, number: completion("A"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    server = serve(lambda body, number: by_length(body))
    judge(server).rank("p", ["x", "y"])
    assert len(server.bodies) == 2 and proxy.bodies == []


def test_a_redirect_does_not_take_the_key_along(serve: Callable[..., Server]) -> None:
    other = serve(lambda body, number: completion("A"))
    server = serve(lambda body, number: (307, {"Location": other.url}, ""))
    with pytest.raises(RankerError, match="redirect"):
        judge(server).rank("p", ["x", "y"])
    assert other.headers == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{prompt} {first}"}, r"the template lacks \{criterion\}, \{second\}"),
        ({"per_minute": 0.0}, "per_minute = 0.0 is not above 0"),
        ({"timeout": math.inf}, "timeout = inf is not above 0"),
        ({"concurrency": 0}, "concurrency = 0 is not 1 or more"),
        ({"retries": -1}, "retries = -1 is not 0 or more"),
        ({"body": {"x": object()}}, "body holds something that JSON can't"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RankerError, match=message):
        EndpointJudge("https://api.example.org/v1", "m", **options)


def test_what_the_scores_depend_on_is_said() -> None:
    def settings(**options: Any) -> Any:
        return EndpointJudge("https://api.example.org/v1", "m", **options).settings

    assert settings() == settings(retries=3, concurrency=1, api_key_env=None, price=(1.0, 2.0))
    for options in (
        {"criterion": "kinder"},
        {"body": {"temperature": 1}},
        {"template": "{criterion}{prompt}{first}{second}"},
    ):
        assert settings(**options) != settings()
