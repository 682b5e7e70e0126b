"""Sampling with vLLM: what is asked of it, against a server on this machine that answers from the very checkpoint.

The server reads the checkpoint that it is given as anyone would, with transformers, and draws as the request says. No
vLLM runs here, but for one slow test that does with one: SIMS_LENS_VLLM="/opt/vllm/bin/vllm serve".
"""

import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from common import plan_of, vector
from transformers import AutoModelForCausalLM, AutoTokenizer

import sims_lens as sims
from sims_lens import SteeringPlan
from sims_lens.adapter import adapt
from sims_lens.data import Sample
from sims_lens.errors import ConfigError, SamplerError
from sims_lens.export.vllm import specs
from sims_lens.plan import NOTHING
from sims_lens.sampling import Sampler
from sims_lens.scale import VLLMSampler, VLLMServer
from sims_lens.scale.vllm import Completion, finisher
from sims_lens.transforms import Ablation, Addition, Gated, Rotation

PROMPTS = ["Say sea.", "Say a longer word.", "Sky?"]
GREEDY = sims.SamplingConfig(max_new_tokens=10, top_k=1)


class Stub:
    """Has checkpoints served, and remembers which, and what was asked of them."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.dtypes: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.open = 0
        self.change = lambda answer: answer
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, checkpoint: Path, dtype: str) -> Iterator[str]:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()  # type: ignore[no-untyped-call]
        AutoTokenizer.from_pretrained(checkpoint)  # type: ignore[no-untyped-call]
        stub, name = self, checkpoint.name

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_POST(self) -> None:  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                known = self.path == "/v1/completions" and body["model"] == name
                with stub._lock:  # transformers' forward passes are not of interest side by side
                    stub.bodies.append(body)
                    answer = stub.change(answer_from(model, body)) if known else {"error": "no such model"}
                self.send_response(200 if known else 404)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        with self.started(Handler, name, dtype) as port:
            yield f"http://127.0.0.1:{port}/v1"

    @contextmanager
    def started(self, handler: type[BaseHTTPRequestHandler], name: str, dtype: str) -> Iterator[int]:
        self.folders.append(name)
        self.dtypes.append(dtype)
        self.open += 1
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield http.server_address[1]
        finally:
            http.shutdown()
            http.server_close()
            self.open -= 1


@torch.no_grad()
def answer_from(model: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Draw one response as a request says, with a seed of its own; tokens include the one that ends it, as vLLM's."""
    generator = torch.Generator().manual_seed(body["seed"])
    prompt, tokens, finish = list(body["prompt"]), list[int](), "length"
    while len(tokens) < body["max_tokens"]:
        logits = model(torch.tensor([prompt + tokens])).logits[0, -1].float() / body["temperature"]
        if body["top_k"] > 0:
            logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
        tokens.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        if tokens[-1] in body["stop_token_ids"]:
            finish = "stop"
            break
    return {
        "choices": [{"index": 0, "text": "", "finish_reason": finish, "token_ids": tokens}],
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(tokens), "prompt_tokens_details": None},
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sims.load(tiny.write("llama", tmp_path_factory.mktemp("models") / "small"), kind="bridge")


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    yield made
    assert made.open == 0, "a server was left running"


def drawn(sampler: Sampler, plan: SteeringPlan = NOTHING, *, n: int = 1, seed: int = 0) -> list[Sample]:
    found = list(sampler.sample(PROMPTS, n=n, plan=plan, seed=seed))
    return sorted(found, key=lambda sample: (sample.prompt, sample.draw))


def greedy(model: Any, plan: SteeringPlan) -> list[Sample]:
    return drawn(sims.LocalSampler(model, GREEDY), plan)


def of_both(model: Any) -> SteeringPlan:
    """What weights can hold and specs can't: an ablation beside additions."""
    return plan_of(1) + SteeringPlan.of({2: Ablation(vector(5))}, site="mlp_out", scope="all")


# --- weights behind a server -----------------------------------------------------------------------------------------


def test_greedy_responses_from_baked_weights_are_those_under_the_plan(model: Any, stub: Stub) -> None:
    with VLLMSampler(model, GREEDY, serve=stub) as sampler:
        assert isinstance(sampler, Sampler)
        for plan in (NOTHING, plan_of(1), of_both(model)):
            assert drawn(sampler, plan) == greedy(model, plan) and sampler.road == "weights"
            assert drawn(sampler, plan) == greedy(model, plan)  # by the same server
    assert drawn(sims.LocalSampler(model, GREEDY), plan_of(1)) != drawn(sims.LocalSampler(model, GREEDY))
    assert stub.folders[0] == "small" and len(stub.folders) == len(set(stub.folders)) == 3
    assert stub.dtypes == ["float32"] * 3


def test_a_request_says_everything_about_how_to_draw(model: Any, stub: Stub) -> None:
    config = sims.SamplingConfig(max_new_tokens=3, temperature=0.7, top_k=None, top_p=0.9, min_p=0.05)
    with VLLMSampler(model, config, serve=stub, concurrency=2) as sampler:
        drawn(sampler, n=2)
    adapter = adapt(model)
    assert len(stub.bodies) == 6 and len({body["seed"] for body in stub.bodies}) == 6
    assert sorted(body.pop("prompt") for body in stub.bodies) == sorted(2 * [adapter.encode(p) for p in PROMPTS])
    assert all(0 <= body.pop("seed") < 2**63 for body in stub.bodies)
    assert stub.bodies == 6 * [
        {
            "model": "small",
            "return_token_ids": True,
            "n": 1,
            "max_tokens": 3,
            "temperature": 0.7,
            "top_k": -1,
            "top_p": 0.9,
            "min_p": 0.05,
            "stop": [],
            "stop_token_ids": list(adapter.stop_ids),
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
    ]


def test_a_sample_depends_on_its_prompt_draw_plan_and_seed_only(model: Any, stub: Stub) -> None:
    config = sims.SamplingConfig(max_new_tokens=6, top_k=None)
    with VLLMSampler(model, config, serve=stub) as sampler:
        three = drawn(sampler, n=3)
        assert drawn(sampler, n=2) == [sample for sample in three if sample.draw < 2]
        alone = list(sampler.sample(PROMPTS[1:2], n=1, plan=NOTHING, seed=0))
        assert alone[0].tokens == next(s.tokens for s in three if (s.prompt, s.draw) == (1, 0))
        assert len({sample.tokens for sample in three}) == 9 and drawn(sampler, seed=1) != drawn(sampler)
        assert list(sampler.sample([], n=2, plan=NOTHING, seed=0)) == []


def test_what_ends_a_response_is_no_part_of_it(model: Any) -> None:
    adapter = adapt(model)
    stop, said = adapter.stop_ids[0], adapter.encode_response("ab\n\nc")
    finish = finisher(adapter, sims.SamplingConfig())
    assert finish(Completion((*said, stop), "stop", 3)) == (tuple(said), True)
    assert finish(Completion(tuple(said), "length", 3)) == (tuple(said), False)
    stopping = finisher(adapter, sims.SamplingConfig(stop=("\n\n",)))
    assert stopping(Completion(tuple(said[:4]), "stop", 3)) == (tuple(said[:2]), True)
    assert stopping(Completion(tuple(said[:3]), "length", 3)) == (tuple(said[:3]), False)
    with pytest.raises(SamplerError, match="gave up on a response: its finish_reason is 'abort'"):
        finish(Completion((), "abort", 3))


def test_tokens_are_counted_as_the_sampler_in_this_process_counts_them(model: Any, stub: Stub) -> None:
    local = sims.LocalSampler(model, GREEDY)
    with VLLMSampler(model, GREEDY, serve=stub) as sampler:
        assert drawn(sampler, plan_of(1)) == drawn(local, plan_of(1))
    assert sampler.count == local.count
    whole, cached = Completion((1, 2), "length", 10), Completion((1, 2), "length", 10, cached=8)
    assert whole.count().prefill == 10 and cached.count().prefill == 2
    assert cached.count().attended == 9 + 10 + 11 and whole.count().attended == 55 + 11


def test_the_loop_runs_on_it(model: Any, stub: Stub, tmp_path: Path) -> None:
    def vowels(prompt: str, responses: Sequence[str]) -> list[float]:
        return [sum(c in "aeiou" for c in r) / (1 + len(r)) + 1e-3 * len(set(r)) for r in responses]

    config = sims.SIMSConfig(
        iterations=1,
        sampling=sims.SamplingConfig(responses=3, max_new_tokens=6, top_k=None),
        steering=sims.SteeringConfig(layers=(1,), strength=0.3, scope="all"),
        evaluation=sims.EvaluationConfig(samples=2, controls=1),
        ranking=sims.RankingConfig(audit="off"),
        guard=sims.GuardConfig(mode="report"),
    )
    prompts = [f"Say {word}." for word in ("sea", "sky", "sun", "rain", "snow", "wind", "tree", "leaf", "root", "bird")]
    with VLLMSampler(model, config.sampling, serve=stub) as sampler:
        run = sims.improve(
            model, prompts, ranker=vowels, config=config, sampler=sampler, out=tmp_path / "run", progress=False
        )
    assert run.complete and len(run.iterations) == 1 and run.cost["sample"].decode > 0
    assert stub.folders[0] == "small" and len(set(stub.folders)) == len(stub.folders) == 3  # base, plan, control
    evaluation = run.iterations[0].evaluation
    assert evaluation.kl_95.estimate > 0 and run.samples(1)[0].nll is not None  # measured here


# --- what can't be done is said --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.on("generation"), "acts on 'generation', there on every token"),
        (lambda plan: plan.decaying(4.0), "decays over generated tokens"),
        (lambda plan: plan.using(lambda v: Rotation(v)), "only what is affine in the stream has a place"),
        (lambda plan: plan.using(lambda v: Gated(Addition(v), v, 0.0)), "only what is affine in the stream"),
        (lambda plan: plan.using(Ablation), "there only of what a block writes"),
    ],
)
def test_plans_that_weights_cannot_hold_are_refused(model: Any, stub: Stub, change: Any, message: str) -> None:
    with VLLMSampler(model, GREEDY, serve=stub) as sampler:
        drawn(sampler, plan_of(1))
        with pytest.raises(SamplerError, match=f"vLLM can't sample under this plan: .*{message}"):
            drawn(sampler, change(plan_of(1)))
    assert len(stub.folders) == 1


def test_settings_that_vllm_cannot_honour_are_refused(model: Any, stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="temperature = 0.001 is below 0.01"):
        VLLMSampler(model, sims.SamplingConfig(temperature=0.001))
    with pytest.raises(ConfigError, match="concurrency .* 0"):
        VLLMSampler(model, concurrency=0)
    with pytest.raises(ConfigError, match="scope = 'generation': vLLM steers every token alike"):
        sims.improve(
            model,
            [f"Say {i}." for i in range(20)],
            ranker=lambda prompt, responses: [float(len(r)) for r in responses],
            sampler=VLLMSampler(model, serve=stub),
            config=sims.SIMSConfig(sampling=sims.SamplingConfig(max_new_tokens=8)),
            out=tmp_path / "run",
        )
    assert not stub.folders and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: answer["choices"][0].pop("token_ids") and answer, "no completion with token ids"),
        (lambda answer: answer["usage"].update(prompt_tokens=99) or answer, "counted 99 prompt tokens where"),
    ],
)
def test_a_server_that_answers_otherwise_is_refused(
    model: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    monkeypatch.setattr("sims_lens.client._FIRST_WAIT", 0.0)
    stub.change = change
    with VLLMSampler(model, GREEDY, serve=stub) as sampler, pytest.raises(SamplerError, match=message):
        drawn(sampler)


def test_a_server_of_another_checkpoint_is_refused(model: Any, stub: Stub, tmp_path: Path) -> None:
    other = tiny.write("llama", tmp_path / "other")

    @contextmanager
    def serve(checkpoint: Path, dtype: str) -> Iterator[str]:
        with stub(other, dtype) as url:
            yield url

    with VLLMSampler(model, GREEDY, serve=serve) as sampler, pytest.raises(SamplerError, match="404 .*no such model"):
        drawn(sampler)


# --- starting a server -----------------------------------------------------------------------------------------------

SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *args): pass
open(sys.argv[1], "w").write(json.dumps(sys.argv[2:]))
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_server_is_started_for_a_checkpoint_and_ended(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    server = VLLMServer((sys.executable, "-c", SERVER, str(told)), ("--tensor-parallel-size", "2"), patience=60)
    with server(tmp_path / "plan-1", "bfloat16") as url:
        arguments = json.loads(told.read_text())
        port = url.removeprefix("http://127.0.0.1:").removesuffix("/v1")
        assert arguments == [
            *(str(tmp_path / "plan-1"), "--served-model-name", "plan-1", "--host", "127.0.0.1", "--port", port),
            *("--dtype", "bfloat16", "--generation-config", "vllm", "--enable-prompt-tokens-details"),
            *("--tensor-parallel-size", "2"),
        ]
    with pytest.raises(SamplerError, match="didn't answer within 0 s"), server_again(port)(tmp_path, "float32"):
        pass


def server_again(port: str) -> VLLMServer:
    """One that never answers: that port is free again only if the server before has ended."""
    code = f"import socket, time; s = socket.socket(); s.bind(('127.0.0.1', {port})); time.sleep(60)"
    return VLLMServer((sys.executable, "-c", code), patience=0)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    dying = VLLMServer((sys.executable, "-c", "raise SystemExit('no GPU here')"), patience=60)
    with pytest.raises(SamplerError, match="ended with code 1 before it served: no GPU here"), dying(tmp_path, "auto"):
        pass
    with (
        pytest.raises(SamplerError, match=r"'/nowhere/vllm' can't be started .*VLLMServer\(command="),
        VLLMServer(("/nowhere/vllm",))(tmp_path, "auto"),
    ):
        pass


# --- specs in a running engine ---------------------------------------------------------------------------------------


class FakeEngine:
    """Does to TransformerLens' model what a vLLM worker with TransformerLens' extension is told to do to its own."""

    def __init__(self, model: Any) -> None:
        self.model, self.specs, self.calls = model, dict[str, Any](), list[str]()

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        self.calls.append(method)
        (self.specs,) = args

    def generate(self, prompts: Sequence[Any], params: Sequence[Any], *, use_tqdm: bool) -> list[Any]:
        self.calls.append("generate")
        vectors = {int(name.split(".")[1]): torch.tensor(spec["value"]) for name, spec in self.specs.items()}
        plan = SteeringPlan.addition(vectors, scope="all") if vectors else NOTHING
        found = []
        for prompt, given in zip(prompts, params, strict=True):
            assert given.detokenize is False and given.top_k == 1 and given.n == 1
            sampler = sims.LocalSampler(self.model, sims.SamplingConfig(max_new_tokens=given.max_tokens, top_k=1))
            ids = prompt["prompt_token_ids"]
            sample = next(sampler.complete(["x"], [ids], plan=plan, seed=0))
            tokens = [*sample.tokens, *given.stop_token_ids[:1]] if sample.ended else list(sample.tokens)
            output = SimpleNamespace(token_ids=tokens, finish_reason="stop" if sample.ended else "length")
            found.append(SimpleNamespace(outputs=[output], prompt_token_ids=ids, num_cached_tokens=None))
        return found


@pytest.fixture
def engine(model: Any, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = ModuleType("vllm")
    fake.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return FakeEngine(model)


def bridge_of(engine: Any, **driver: Any) -> Any:
    shape = SimpleNamespace(n_layers=tiny.N_LAYERS, d_model=tiny.D_MODEL)
    return SimpleNamespace(_driver=SimpleNamespace(_llm=engine, **driver), cfg=shape)


def test_specs_steer_a_running_engine(model: Any, engine: FakeEngine) -> None:
    sampler = VLLMSampler(model, GREEDY, bridge=bridge_of(engine))
    for plan in (plan_of(1), plan_of(0, 2) + plan_of(2, seed=7), NOTHING):
        assert drawn(sampler, plan) == greedy(model, plan) and sampler.road == "specs"
        assert engine.specs == specs(plan)
    assert engine.calls == 3 * ["tl_set_interventions", "generate"] and engine.specs == {}


def test_stop_strings_are_looked_for_in_what_the_engine_drew(model: Any, engine: FakeEngine) -> None:
    whole = greedy(model, NOTHING)[0]
    stop = whole.text[3]
    cut = VLLMSampler(model, sims.SamplingConfig(max_new_tokens=10, top_k=1, stop=(stop,)), bridge=bridge_of(engine))
    found = drawn(cut)[0]
    assert found.text == whole.text[: whole.text.index(stop)] and found.ended


def test_the_road_follows_from_the_plan(model: Any, engine: FakeEngine, stub: Stub) -> None:
    with VLLMSampler(model, GREEDY, serve=stub, bridge=bridge_of(engine)) as sampler:
        roads = [drawn(sampler, plan) and sampler.road for plan in (plan_of(1), of_both(model), NOTHING)]
    assert roads == ["specs", "weights", "specs"] and len(stub.folders) == 1
    alone = VLLMSampler(model, GREEDY, bridge=bridge_of(engine))
    with pytest.raises(SamplerError, match=r"specs can't hold this plan. blocks.2.*only additions.*serve=VLLMServer"):
        drawn(alone, of_both(model))
    with pytest.raises(SamplerError, match="acts on 'response', there on every token"):
        drawn(alone, plan_of(1, scope="response"))


def test_a_bridge_of_another_kind_is_refused(model: Any, engine: FakeEngine) -> None:
    with pytest.raises(SamplerError, match="SimpleNamespace has no vLLM engine; use RemoteBridge.boot_vllm"):
        VLLMSampler(model, bridge=SimpleNamespace())
    with pytest.raises(SamplerError, match="booted with enable_batching"):
        VLLMSampler(model, bridge=bridge_of(engine, _enable_batching=True))
    other = bridge_of(engine)
    other.cfg.n_layers = 99
    with pytest.raises(SamplerError, match="the bridge has 99 layers of width 32, small has 3 of 32"):
        VLLMSampler(model, bridge=other)


# --- a real vLLM -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("SIMS_LENS_VLLM" not in os.environ, reason="set SIMS_LENS_VLLM to vLLM's command")
def test_a_real_vllm_says_what_the_steered_model_says() -> None:
    embedded = sims.load("embedded", kind="bridge")
    plan = sims.SteeringPlan.addition({14: vector(3, size=576)}, coefficient=3.0, scope="all")
    command = tuple(shlex.split(os.environ["SIMS_LENS_VLLM"]))
    options = ("--max-model-len", "256", "--enforce-eager")
    greedy = sims.SamplingConfig(max_new_tokens=24, top_k=1)
    began, local = time.monotonic(), sims.LocalSampler(embedded, greedy)
    with VLLMSampler(embedded, greedy, serve=VLLMServer(command, options)) as sampler:
        for asked in (plan, NOTHING):
            theirs, ours = drawn(sampler, asked, n=2), drawn(local, asked, n=2)
            same = [a.tokens == b.tokens and a.ended == b.ended for a, b in zip(theirs, ours, strict=True)]
            print(f"{sum(same)} of {len(same)} the same, {time.monotonic() - began:.0f} s; {theirs[0].text!r}")
            assert sum(same) >= len(same) - 1  # a tie between two tokens may be decided by rounding
            assert 0 < sampler.count.prefill <= local.count.prefill * 2
