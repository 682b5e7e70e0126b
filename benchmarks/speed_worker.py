"""A process of ``speed.py``'s: loads one model with one tool, then does the jobs that come as lines of JSON.

Runs in any of the environments, ours or a peer's, so what a tool needs is imported where it is used. Each tool is a
class: ``sample(job)`` gives the number of useful tokens of every response, ``extract(job)`` reads contrast pairs.
"""

import ctypes
import gc
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from speed_machine import clock, limits, profiled

BATCH_ROWS = 128
STRENGTH = 0.02  # of the residual norm: steered text stays like unsteered text, so that it ends alike


def spread(count: int, n_layers: int) -> list[int]:
    """``count`` layers, evenly spread; one is that at three fifths of the depth."""
    return [n_layers * 3 // 5] if count == 1 else [k * n_layers // count for k in range(count)]


def vectors(layers: list[int], d_model: int, norm: float = 1.0) -> dict[int, torch.Tensor]:
    """A random direction per layer."""
    generator = torch.Generator().manual_seed(0)
    drawn = {layer: torch.randn(d_model, generator=generator) for layer in layers}
    return {layer: norm * vector / vector.norm() for layer, vector in drawn.items()}


class HuggingFace:
    """transformers' ``generate``, the reference: unsteered, with ``num_return_sequences`` for K."""

    def __init__(self, setup: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = setup["device"]
        self.tokenizer = AutoTokenizer.from_pretrained(setup["folder"])
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        kind = getattr(torch, setup["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(setup["folder"], dtype=kind, attn_implementation="sdpa")
        self.model = self.model.eval().to(self.device)

    @contextmanager
    def steered(self, count: int) -> Iterator[Any]:
        """Inside, ``count`` layers are steered; gives what is to generate."""
        assert count == 0, "transformers doesn't steer"
        yield self.model

    def sample(self, job: dict[str, Any]) -> list[int]:
        """Generate."""
        inputs = _left_padded(self.tokenizer, job["texts"], self.device)
        ends = {"eos_token_id": job["stops"]} if job["stops"] else {"min_new_tokens": job["tokens"]}
        with self.steered(job["layers"]) as model:
            rows = model.generate(
                **inputs,
                **ends,
                max_new_tokens=job["tokens"],
                num_return_sequences=job["n"],
                do_sample=True,
                temperature=job["temperature"],
                top_k=job["top_k"],
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return _useful(rows[:, inputs["input_ids"].shape[1] :].tolist(), job["stops"])


class SteeringVectors(HuggingFace):
    """steering-vectors: hooks on the Hugging Face model."""

    @contextmanager
    def steered(self, count: int) -> Iterator[Any]:
        """See above."""
        from steering_vectors import SteeringVector

        config = self.model.config
        drawn = vectors(spread(count, config.num_hidden_layers), config.hidden_size)
        with SteeringVector({k: v.to(self.device) for k, v in drawn.items()}).apply(self.model):
            yield self.model

    def extract(self, job: dict[str, Any]) -> None:
        """Read contrast pairs."""
        from steering_vectors import train_steering_vector

        self.tokenizer.padding_side = "right"
        pairs = [tuple(pair) for pair in job["pairs"]]
        train_steering_vector(self.model, self.tokenizer, pairs, read_token_index=-1, batch_size=job["batch"])


class Repeng(HuggingFace):
    """repeng: wrapped blocks of the Hugging Face model."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import numpy as np

        np.float_ = np.float64  # it names a type that numpy 2 dropped
        super().__init__(setup)

    @contextmanager
    def steered(self, count: int) -> Iterator[Any]:
        """See above."""
        from repeng import ControlModel

        config = self.model.config
        drawn = vectors(spread(count, config.num_hidden_layers), config.hidden_size)
        control = ControlModel(self.model, list(drawn))
        try:
            control.set_raw_control(drawn)
            yield control
        finally:
            control.unwrap()

    def extract(self, job: dict[str, Any]) -> None:
        """Read contrast pairs."""
        from repeng import ControlVector, DatasetEntry
        from repeng.extract import batched_get_hiddens

        self.tokenizer.padding_side = "right"
        layers = list(range(self.model.config.num_hidden_layers))
        if job["reading"]:
            texts = [text for pair in job["pairs"] for text in pair]
            batched_get_hiddens(self.model, self.tokenizer, texts, layers, job["batch"])
            return
        entries = [DatasetEntry(positive=p, negative=n) for p, n in job["pairs"]]
        given = {"hidden_layers": layers, "method": "pca_diff", "batch_size": job["batch"]}
        ControlVector.train(self.model, self.tokenizer, entries, **given)


class TransformerLens:
    """A TransformerLens model's own ``generate``: it has no K, so each prompt is repeated, in batches of 128 rows."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.device, self.kind = setup["device"], setup["kind"]
        self.model = _loaded(setup)
        self.tokenizer = self.model.tokenizer
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if setup["strides"] == "own":  # as TransformerLens leaves them: sims.load has changed them
            for parameter in self.model.parameters():
                parameter.data = parameter.data.contiguous()

    def sample(self, job: dict[str, Any]) -> list[int]:
        """Generate."""
        repeated = [text for text in job["texts"] for _ in range(job["n"])]
        return [
            length
            for start in range(0, len(repeated), BATCH_ROWS)
            for length in self._batch(repeated[start : start + BATCH_ROWS], job)
        ]

    def _batch(self, texts: list[str], job: dict[str, Any]) -> list[int]:
        inputs = _left_padded(self.tokenizer, texts, self.device)
        masked = {"attention_mask": inputs["attention_mask"]} if self.kind == "bridge" else {"prepend_bos": False}
        rows = self.model.generate(
            inputs["input_ids"],
            max_new_tokens=job["tokens"],
            stop_at_eos=bool(job["stops"]),
            do_sample=True,
            temperature=job["temperature"],
            top_k=job["top_k"],
            return_type="tokens",
            padding_side="left",
            verbose=False,
            **masked,
        )
        return _useful(rows[:, inputs["input_ids"].shape[1] :].tolist(), job["stops"])


class Steerkit:
    """steerkit: a ``HookedTransformer`` (its own way of loading refuses this model, so we hand it one), batch 1."""

    def __init__(self, setup: dict[str, Any]) -> None:
        from steerkit import ModelHandle

        self.inner = TransformerLens({**setup, "kind": "hooked", "strides": "own"})
        self.model = ModelHandle(self.inner.model, setup["folder"])

    def sample(self, job: dict[str, Any]) -> list[int]:
        """Generate."""
        from steerkit import Probe, compose

        cfg = self.inner.model.cfg
        common = {"bias": {}, "metrics": {}, "model_id": self.model.model_id, "hook_site": "resid_post"}
        common |= {"default_method": "logistic", "n_total_layers": cfg.n_layers}
        drawn = vectors(spread(job["layers"], cfg.n_layers), cfg.d_model)
        probes = [
            Probe(directions={"logistic": v}, layer=k, hook_name=f"blocks.{k}.hook_resid_post", **common)
            for k, v in drawn.items()
        ]
        own = self.inner.model.generate
        if not job["stops"]:
            self.inner.model.generate = lambda *args, **given: own(*args, **given, stop_at_eos=False)
        try:
            texts = [
                compose(probes).steer(
                    self.model,
                    prompt,
                    alphas=[1.0] * len(probes),
                    max_new_tokens=job["tokens"],
                    temperature=job["temperature"],
                )
                for prompt in job["prompts"]
                for _ in range(job["n"])
            ]
        finally:
            self.inner.model.generate = own
        counted = [len(self.inner.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        return counted if job["stops"] else [job["tokens"]] * len(texts)

    def extract(self, job: dict[str, Any]) -> None:
        """Read contrast pairs."""
        from steerkit import ContrastPair, extract_activations

        def tokens(_prompt: str, text: str) -> torch.Tensor:  # whole texts, as for the others
            return self.inner.tokenizer(text, return_tensors="pt").input_ids

        self.model.format_chat = tokens
        pairs = [ContrastPair("", p, n) for p, n in job["pairs"]]
        read = extract_activations(pairs, self.model, include_boundaries=False, batch_size=job["batch"])
        for acts in read.values():
            (acts[:, 0] - acts[:, 1]).mean(0)


class Ours:
    """``sims_lens``: :class:`LocalSampler` and :func:`fit`."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.model = _loaded(setup)
        self.plans: dict[int, Any] = {}

    def plan(self, count: int) -> Any:
        """Random directions at ``count`` layers on all tokens, measured and checked once."""
        import sims_lens as sims
        from sims_lens.plan import NOTHING

        if count not in self.plans:
            cfg = self.model.cfg
            drawn = vectors(spread(count, cfg.n_layers), cfg.d_model) if count else {}
            made = {"coefficient": STRENGTH, "units": "residual_norm", "scope": "all"}
            plan = sims.SteeringPlan.addition(drawn, **made) if drawn else NOTHING
            self.plans[count] = sims.resolve(self.model, plan)
        return self.plans[count]

    def sample(self, job: dict[str, Any]) -> list[int]:
        """Generate."""
        import sims_lens as sims

        chosen = {"dtype": job["dtype"]} if job["dtype"] else {}
        config = sims.SamplingConfig(
            max_new_tokens=job["tokens"],
            temperature=job["temperature"],
            top_k=job["top_k"],
            **chosen,
        )
        sampler = sims.LocalSampler(self.model, config)
        hooks = [(job["hook"], lambda value, hook: value)] if job["hook"] else []  # noqa: ARG005 - TransformerLens' name
        attached = self.model.hooks(fwd_hooks=hooks) if hooks else nullcontext()
        with nullcontext() if job["stops"] else _endless(self.model), attached:
            drawn = sampler.sample(job["prompts"], n=job["n"], plan=self.plan(job["layers"]), seed=job["seed"])
            return [len(sample.tokens) for sample in drawn]

    def extract(self, job: dict[str, Any]) -> None:
        """Read contrast pairs."""
        import sims_lens as sims

        sims.fit(self.model, _Encoded(self.model.tokenizer, job["pairs"]), batch_rows=job["batch"])

    def bake(self, job: dict[str, Any]) -> None:
        """Fold a plan into a checkpoint."""
        import sims_lens as sims

        sims.export.bake(self.model, self.plan(job["layers"]), job["folder"])

    def profile(self, job: dict[str, Any]) -> dict[str, Any]:
        """Where the time of :meth:`sample` goes."""
        return profiled(lambda: self.sample(job))


class _Encoded(Sequence[Any]):
    """Pairs of whole texts as token ids, made when they are asked for, as the others make them batch by batch."""

    def __init__(self, tokenizer: Any, pairs: list[list[str]]) -> None:
        self.tokenizer, self.pairs = tokenizer, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self.tokenizer(text).input_ids for text in self.pairs[index])


class Machine:
    """No model: what the machine can do."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.folder, self.device = Path(setup["folder"]), setup["device"]

    def limits(self, job: dict[str, Any]) -> dict[str, Any]:
        """See :func:`speed_machine.limits`."""
        return limits(json.loads((self.folder / "config.json").read_text()), device=self.device, **job["settings"])


TOOLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "huggingface": HuggingFace,
    "steering-vectors": SteeringVectors,
    "repeng": Repeng,
    "transformer-lens": TransformerLens,
    "steerkit": Steerkit,
    "ours": Ours,
    "machine": Machine,
}


def _loaded(setup: dict[str, Any]) -> Any:
    import sims_lens as sims

    kind = getattr(torch, setup["dtype"])
    return sims.load(setup["folder"], kind=setup["kind"], dtype=kind, device=setup["device"])


@contextmanager
def _endless(model: Any) -> Iterator[None]:
    """Inside, nothing ends a response of ours: the sampler is told of no stop tokens."""
    from sims_lens.adapter import adapt

    kind = type(adapt(model))
    own = kind.__dict__.get("stop_ids")
    kind.stop_ids = property(lambda _: ())
    try:
        yield
    finally:
        if own is None:
            del kind.stop_ids
        else:
            kind.stop_ids = own


def _left_padded(tokenizer: Any, texts: list[str], device: str) -> Any:
    tokenizer.padding_side = "left"
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)


def _useful(rows: list[list[int]], stops: list[int]) -> list[int]:
    """Tokens of each row before the first that ends it."""
    return [next((k for k, token in enumerate(row) if token in stops), len(row)) for row in rows]


def _memory(device: str, *, reset: bool) -> tuple[float, float]:
    """Memory held and its peak since the last reset, in MiB."""
    if device != "cpu":
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    if reset:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    held, peak = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmRSS", "VmHWM"))
    return held, peak


def _read(tool: Any) -> None:
    """Look at all weights once: those that are mapped from a file count as memory from then on, and whoever unembeds
    has looked at them before he is measured."""
    model = getattr(tool, "model", None)
    for module in (model, getattr(model, "model", None)):  # of what wraps a model, the model
        if isinstance(module, torch.nn.Module):
            for parameter in module.parameters():
                parameter.sum()


def _answer(tool: Any, message: dict[str, Any], device: str) -> dict[str, Any]:
    """Do a job; what it gave, with its time (CPU seconds of all threads, or wall seconds on a GPU) and its memory."""
    held, _ = _memory(device, reset=True) if message["memory"] else (0.0, 0.0)
    start, wall = clock(device), time.perf_counter()
    given = getattr(tool, message["do"])(message)
    spent = {"seconds": clock(device) - start, "wall": time.perf_counter() - wall}
    if message["memory"]:
        peak = _memory(device, reset=False)[1]
        spent |= {"held": held, "peak": peak, "extra": peak - held}
    return {"result": given, **spent}


def _failure(error: Exception) -> dict[str, str]:
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the tools print is no answer
    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    try:
        tool = TOOLS[setup["tool"]](setup)
        _read(tool)
    except Exception as error:  # whatever a peer raises is its result here, and below
        print(json.dumps(_failure(error)), file=answers)
        return
    print(json.dumps({"result": "ready"}), file=answers)
    for line in sys.stdin:
        try:
            answer = _answer(tool, json.loads(line), setup["device"])
        except Exception as error:
            answer = _failure(error)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
