"""Sampling with vLLM, on two roads: steered weights behind a server, or specs in a running engine.

**Weights.** A plan that acts on every token alike is baked into a checkpoint (:func:`sims_lens.export.bake`, which
compares the two first), and an unmodified vLLM serves it. Nothing is left of steering but biases: it runs at the speed
of the plain model. Another plan needs another checkpoint and another start of the server.

**Specs.** Additions at block outputs go to a running engine as TransformerLens' intervention specs
(:mod:`sims_lens.export.vllm`): no checkpoint and no restart. The engine is a ``RemoteBridge.boot_vllm`` of
TransformerLens 4.3 or later.

Prompts travel as token ids, so that chat templates are the same as everywhere here; each response is a request with a
seed of its own, made from the run's seed, its prompt and its draw, so that it does not depend on what is drawn beside
it, but for rounding: vLLM's sums, unlike ours, change with the batch. vLLM draws by its own random numbers: the same
seed does not give the responses of :class:`~sims_lens.sampling.LocalSampler`. Where both ``min_p`` and ``top_p`` are
set, it cuts by ``min_p`` first. What is captured and measured is run by TransformerLens, in this process.

Reference: vLLM 0.32, ``entrypoints/openai/completion`` and ``sampling_params.py``; TransformerLens 4.3.0,
    ``model_bridge/sources/vllm``.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from sims_lens.adapter import Adapter, adapt
from sims_lens.bank import plan_digest
from sims_lens.checks import check_integer, check_kind, check_number
from sims_lens.client import Client, in_parallel
from sims_lens.config import SamplingConfig, SIMSConfig
from sims_lens.cost import TokenCount
from sims_lens.data import Sample
from sims_lens.errors import ConfigError, ExportError, SamplerError
from sims_lens.export.baked import bake
from sims_lens.export.check import TOLERANCE, block_additions, prepare
from sims_lens.export.vllm import specs
from sims_lens.models import checkpoint_of
from sims_lens.plan import SteeringPlan
from sims_lens.sampling.draw import cut_at
from sims_lens.scale.serving import Serve, VLLMServer

_LEAST_TEMPERATURE = 0.01
"""vLLM takes what is below, and isn't 0, for this."""

_AT_ONCE = 1024
"""Requests that an engine in this process is given together."""


@dataclass(frozen=True)
class Completion:
    """What an engine gave for a request.

    Args:
        tokens: as they were drawn, with the one that ended the response.
        finish: why it ended: "stop" or "length".
        prompt: tokens of the prompt, as the engine counted them.
        cached: of those, how many it did not compute.
    """

    tokens: tuple[int, ...]
    finish: str
    prompt: int
    cached: int = 0

    def count(self) -> TokenCount:
        """What was computed for it."""
        steps = max(0, len(self.tokens) - 1)  # the last token is not run
        attended = self.prompt * (self.prompt + 1) // 2 - self.cached * (self.cached + 1) // 2
        attended += steps * self.prompt + steps * (steps + 1) // 2
        return TokenCount(self.prompt - self.cached, steps, attended, len(self.tokens))


@runtime_checkable
class Engine(Protocol):
    """Answers requests."""

    def complete(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Completion]]:
        """Yield the completions of requests, each with its request's number, in any order."""
        ...


class VLLMSampler:
    """Samples with vLLM; see :mod:`sims_lens.scale.vllm` for the two roads.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge`` of the same weights, loaded with :func:`sims_lens.load`.
        config: how responses are drawn. ``batch_rows`` is vLLM's own affair.
        serve: has a checkpoint served; None for vLLM's own command, or for none at all where there is a ``bridge``.
        bridge: a ``RemoteBridge.boot_vllm`` of the same checkpoint, booted without ``enable_batching``. It is used for
            the plans that its specs can express.
        concurrency: requests at the same time, to a server.
        tolerance: of logits, between a steered model and its checkpoint: more for weights in half precision.

    Attributes:
        road: what the last sample was drawn on, in words.
        count: tokens that vLLM computed: those that it took from its cache are left out where it tells them.

    Raises:
        ConfigError: a setting that vLLM can't honour.

    Examples:
        Plans must act on every token, because vLLM knows no prompts and responses::

            config = sims.SIMSConfig(steering=sims.SteeringConfig(scope="all"))
            with VLLMSampler(model, config.sampling) as sampler:
                run = sims.improve(model, prompts, ranker=judge, config=config, sampler=sampler)
    """

    def __init__(
        self,
        model: Any,
        config: SamplingConfig | None = None,
        *,
        serve: Serve | None = None,
        bridge: Any = None,
        concurrency: int = 64,
        tolerance: float = TOLERANCE,
    ) -> None:
        adapt(model)
        self.model, self.config = model, SamplingConfig() if config is None else config
        check_kind("config", self.config, SamplingConfig, "make one, as SamplingConfig()")
        check_integer("concurrency", concurrency)
        check_number("tolerance", tolerance, 0.0)
        self.count, self.road = TokenCount(), "not run yet"
        self._serve = serve or (None if bridge is not None else VLLMServer())
        self._bridge = None if bridge is None else _InProcess(bridge, adapt(model))
        if self.config.temperature < _LEAST_TEMPERATURE and self.config.top_k != 1:
            raise ConfigError(
                f"temperature = {self.config.temperature} is below {_LEAST_TEMPERATURE}, which vLLM would take for "
                f"{_LEAST_TEMPERATURE}; set top_k=1 for greedy responses"
            )
        self._concurrency, self._tolerance = concurrency, tolerance
        self._open, self._at = ExitStack(), ""
        self._engine: Engine | None = None

    def __enter__(self) -> "VLLMSampler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server that was started, and remove its checkpoint. Sampling starts another one."""
        self._engine, self._at = None, ""
        self._open.close()

    def check(self, config: SIMSConfig) -> None:
        """Say before a run begins what it would end with once it has a plan.

        Raises:
            ConfigError: its plans can't be sampled under here.
        """
        if config.steering.scope != "all":
            raise ConfigError(
                f"scope = {config.steering.scope!r}: vLLM steers every token alike, prompts too; set "
                'SteeringConfig(scope="all"), or sample with LocalSampler'
            )

    def sample(self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int) -> Iterator[Sample]:
        """Yield the samples as they finish. See :class:`~sims_lens.sampling.Sampler`.

        Raises:
            SamplerError: neither road can express the plan, with the reasons; or vLLM failed.
        """
        adapter, config = adapt(self.model), self.config
        encoded = [adapter.encode(prompt) for prompt in prompts]
        rows = [(index, draw) for index in range(len(prompts)) for draw in range(n)]
        if not rows:
            return
        fixed = parameters(config, adapter.stop_ids)
        requests = (
            {"prompt": encoded[index], **fixed, "seed": seed_of(seed, prompts[index], draw)} for index, draw in rows
        )
        finish = finisher(adapter, config)
        for number, completion in self._engine_for(plan).complete(requests):
            index, draw = rows[number]
            self.count.take(completion.count())
            tokens, ended = finish(completion)
            yield Sample(prompt=index, draw=draw, tokens=tokens, text=adapter.decode(tokens), ended=ended)

    def _engine_for(self, plan: SteeringPlan) -> Engine:
        """The engine that samples under a plan, by the road that can express it."""
        whole = prepare(self.model, plan) if plan.interventions else plan
        why = ""
        if self._bridge is not None:
            held = block_additions(self.model, whole)
            if not held.lost:
                self.road = "specs"
                self._bridge.steer(specs(held.plan) if held.plan.interventions else {})
                return self._bridge
            why = "; ".join(f"{place}: {reason}" for place, reason in held.lost)
        if self._serve is None:
            raise SamplerError(f"vLLM's intervention specs can't hold this plan. {why}. Or give serve=VLLMServer()")
        self.road = "weights"
        if self._engine is None or self._at != plan_digest(whole):
            self._engine = self._served(whole)
            self._at = plan_digest(whole)
        return self._engine

    def _served(self, plan: SteeringPlan) -> Engine:
        """A server of the steered checkpoint; the one before is ended first: it holds the memory."""
        assert self._serve is not None
        self.close()
        folder = checkpoint_of(self.model)
        with ExitStack() as stack:
            if plan.interventions:
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="sims-lens-vllm-"))
                folder = Path(scratch) / f"plan-{plan_digest(plan)}"
                try:
                    bake(self.model, plan, folder, tolerance=self._tolerance)
                except ExportError as error:
                    raise SamplerError(f"vLLM can't sample under this plan: {error}") from error
            dtype = self.config.dtype or str(adapt(self.model).cfg.dtype).removeprefix("torch.")
            url = stack.enter_context(self._serve(folder, dtype))
            engine = _Served(url, folder.name, self._concurrency)
            self._open = stack.pop_all()
        return engine


def parameters(config: SamplingConfig, stop_ids: Sequence[int]) -> dict[str, Any]:
    """What a request says about how to draw, all of it: what is left out, a server may fill in from a file.

    >>> parameters(SamplingConfig(top_k=None), [2])["top_k"]
    -1
    """
    return {
        "n": 1,
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_k": -1 if config.top_k is None else config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "stop": list(config.stop),
        "stop_token_ids": list(stop_ids),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def seed_of(seed: int, prompt: str, draw: int) -> int:
    """The seed of one response, 0 to 2^63 - 1.

    >>> seed_of(0, "a", 0) == seed_of(0, "a", 1)
    False
    """
    digest = hashlib.sha256(f"{seed}\0{draw}\0{prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def finisher(adapter: Adapter, config: SamplingConfig) -> Callable[[Completion], tuple[tuple[int, ...], bool]]:
    """What makes a response of a completion: its tokens without the one that ended it, and whether it has ended."""
    stops = frozenset(adapter.stop_ids)
    cut = partial(cut_at, config.stop, adapter.decode)

    def finish(completion: Completion) -> tuple[tuple[int, ...], bool]:
        tokens, ended = completion.tokens, completion.finish == "stop"
        if completion.finish not in ("stop", "length"):
            raise SamplerError(f"vLLM gave up on a response: its finish_reason is {completion.finish!r}; sample again")
        if ended and tokens and tokens[-1] in stops:
            tokens = tokens[:-1]
        if config.stop and (kept := cut(tokens)) is not None:
            tokens, ended = tokens[:kept], True
        return tokens, ended

    return finish


class _Served:
    """An OpenAI-compatible server that gives token ids, as vLLM's does."""

    def __init__(self, base_url: str, model: str, concurrency: int) -> None:
        self._model, self._concurrency = model, concurrency
        self._client = Client(
            base_url,
            "/completions",
            error=SamplerError,
            about=f"(model {model!r})",
            api_key_env="VLLM_API_KEY",
            timeout=3600,  # a request waits for its turn there
        )

    def complete(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Completion]]:
        """See :class:`Engine`."""
        return in_parallel(self._one, requests, concurrency=self._concurrency)

    def _one(self, stop: Event, request: Mapping[str, Any]) -> Completion:
        body = {"model": self._model, "return_token_ids": True, **request}
        found = self._client.post(body, completion_of, what="completion with token ids (vLLM gives them)", stop=stop)
        if found.prompt != len(request["prompt"]):
            raise SamplerError(
                f"{self._client.url} counted {found.prompt} prompt tokens where {len(request['prompt'])} were sent: it "
                "adds some of its own, so that it would be asked something else"
            )
        return found


def completion_of(answer: Any) -> Completion:
    """A completion from a server's JSON."""
    choice, usage = answer["choices"][0], answer["usage"]
    details = usage.get("prompt_tokens_details") or {}
    return Completion(
        tokens=tuple(int(token) for token in choice["token_ids"]),
        finish=str(choice["finish_reason"]),
        prompt=int(usage["prompt_tokens"]),
        cached=int(details.get("cached_tokens") or 0),
    )


class _InProcess:
    """The engine behind a ``RemoteBridge``: its specs are in force at every token until others are."""

    def __init__(self, bridge: Any, adapter: Adapter) -> None:
        driver = getattr(bridge, "_driver", None)  # TransformerLens 4.3 has no public name for it
        self._llm = getattr(driver, "_llm", None)
        if self._llm is None:
            raise SamplerError(
                f"{type(bridge).__name__} has no vLLM engine; use RemoteBridge.boot_vllm of 4.3 or later"
            )
        if getattr(driver, "_enable_batching", False):
            raise SamplerError(
                "this bridge was booted with enable_batching, so that it keeps the activations of all tokens; boot it "
                "without"
            )
        shape = (int(bridge.cfg.n_layers), int(bridge.cfg.d_model))
        if shape != (adapter.n_layers, adapter.d_model):
            raise SamplerError(
                f"the bridge has {shape[0]} layers of width {shape[1]}, {adapter.name} has {adapter.n_layers} of "
                f"{adapter.d_model}; boot it from the same checkpoint"
            )

    def steer(self, found: Mapping[str, Any]) -> None:
        """Put specs into force, in place of those before."""
        assert self._llm is not None
        self._llm.collective_rpc("tl_set_interventions", args=(dict(found),))

    def complete(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Completion]]:
        """See :class:`Engine`. Stop strings are looked for afterwards: the engine has no tokenizer."""
        from vllm import SamplingParams

        assert self._llm is not None
        numbered = enumerate(requests)
        while batch := list(islice(numbered, _AT_ONCE)):
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(request["prompt"])} for _, request in batch],
                [
                    SamplingParams(
                        **{k: v for k, v in request.items() if k not in ("prompt", "stop")}, detokenize=False
                    )
                    for _, request in batch
                ],
                use_tqdm=False,
            )
            for (number, _), output in zip(batch, outputs, strict=True):
                first = output.outputs[0]
                yield (
                    number,
                    Completion(
                        tokens=tuple(int(token) for token in first.token_ids),
                        finish=str(first.finish_reason),
                        prompt=len(output.prompt_token_ids),
                        cached=int(getattr(output, "num_cached_tokens", None) or 0),
                    ),
                )


__all__ = ["Completion", "Engine", "VLLMSampler", "completion_of", "finisher", "parameters", "seed_of"]
