"""Does the cost model of ``sims_lens.planning`` foretell what sampling takes? Random weights, one thread, CPU time.

The machine's numbers are measured by themselves, before each size: the rate of packed matrix products of 64 rows, and
of copying memory; and what starting a block and drawing a token take, by two models of no width to speak of. Nothing
of the grid enters the prediction. Sizes take turns; each runs in a process of its own, forked, so that its memory is
its own.

``python benchmarks/scaling.py --out docs/data/scaling.json`` (a round takes three CPU minutes).
"""

import argparse
import json
import os
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.data import Sample
from sims_lens.models import embedded_path
from sims_lens.plan import NOTHING
from sims_lens.planning import Drawing, Machine, Shape, drawing_seconds
from sims_lens.twin.linear import PackedLinear

VOCABULARY = 49152  # the embedded model's, whose tokenizer is used
SIZES = (
    Shape("12M", 8, 192, 3, 1, 64, 512, VOCABULARY, tied=True),
    Shape("38M", 12, 384, 6, 2, 64, 1024, VOCABULARY, tied=True),
    Shape("135M", 30, 576, 9, 3, 64, 1536, VOCABULARY, tied=True),
    Shape("362M", 32, 960, 15, 5, 64, 2560, VOCABULARY, tied=True),
)
FLAT = tuple(Shape(f"flat{n}", n, 64, 1, 1, 64, 64, VOCABULARY, tied=True) for n in (4, 24))
WORKLOADS = ((8, 4, 16), (16, 4, 16), (8, 8, 16), (8, 4, 48))
"""Prompts, responses to each, tokens of each."""
LARGEST = ((8, 4, 16), (8, 8, 16))


@dataclass(frozen=True)
class Job:
    """A model and what it draws."""

    shape: Shape
    prompts: int
    responses: int
    tokens: int

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.shape.name}, {self.prompts} x {self.responses} x {self.tokens}"


def checkpoint(shape: Shape, folder: Path) -> Path:
    """A model of a shape with random weights."""
    config = LlamaConfig(
        vocab_size=shape.d_vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_key_value_heads,
        head_dim=shape.d_head,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path()).save_pretrained(folder)
    return folder


def prompts_of_one_length(model: Any, count: int) -> list[str]:
    """Prompts whose tokens are as many in each: what a mean hides is not what is measured here."""
    adapter, by_length = adapt(model), dict[int, list[str]]()
    for text in sims.everyday():
        by_length.setdefault(len(adapter.encode(text)), []).append(text)
    return max(by_length.values(), key=len)[:count]


def resident(field: str = "VmRSS") -> int:
    """Bytes that this process takes: now, or at most (VmHWM) since it was asked to forget."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} on this system")


def calibrate() -> dict[str, float]:
    """The machine's two numbers, by CPU time."""
    rows, width = 64, 2048
    layer, values = PackedLinear(torch.randn(width, width), None), torch.randn(rows, width)
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)

    def seconds(run: Any, times: int) -> float:
        run()
        start = time.process_time()
        for _ in range(times):
            run()
        return (time.process_time() - start) / times

    with torch.inference_mode():
        product = seconds(lambda: layer(values), 40)
        copy = seconds(lambda: target.copy_(source), 2)
    return {"flops": 2 * rows * width * width / product, "bandwidth": 2 * 4 * source.numel() / copy}


def sampled(model: Any, texts: Sequence[str], job: Job) -> tuple[Any, list[Sample], float]:
    """What a job takes once the model has been run before."""
    sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=job.tokens))
    list(sampler.sample(texts[:1], n=1, plan=NOTHING, seed=9))
    sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=job.tokens))
    start = time.process_time()
    samples = list(sampler.sample(texts, n=job.responses, plan=NOTHING, seed=1))
    return sampler.count, samples, time.process_time() - start


def forked(run: Any) -> Any:
    """What a function gives in a process of its own, as JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writer, "w") as pipe:
                json.dump(run(), pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("a job died; see above")
    return json.loads(text)


def measured(jobs: Sequence[Job], folder: Path) -> list[dict[str, Any]]:
    """Tokens, CPU time and memory of jobs on one model."""
    before = resident()
    model = sims.load(folder, kind="bridge")
    return [measured_on(model, job, before) for job in jobs]


def measured_on(model: Any, job: Job, before: int) -> dict[str, Any]:
    """A job's tokens, CPU time and memory."""
    texts = prompts_of_one_length(model, job.prompts)
    Path("/proc/self/clear_refs").write_text("5")  # forget what was taken at most until now
    count, samples, seconds = sampled(model, texts, job)
    return {
        "prompt_tokens": len(adapt(model).encode(texts[0])),
        "prompts": len(texts),
        "count": asdict(count),
        "flops": adapt(model).arithmetic.flops(count),
        "parameters": sum(p.numel() for p in model.parameters()),
        "ended": sum(s.ended for s in samples),
        "written": sum(len(s.tokens) for s in samples),
        "seconds": seconds,
        "memory": resident("VmHWM") - before,
    }


def started(folders: dict[str, Path], machine: Machine) -> Machine:
    """The machine with what models of no width take beyond their products: by block and step, and by drawn token."""
    beyond, drawing = [], Drawing(8, 4, 1, 24)
    for shape in FLAT:
        (found,) = forked(lambda shape=shape: measured([Job(shape, 8, 4, 24)], folders[shape.name]))
        drawing = Drawing(8, 4, found["prompt_tokens"], found["written"] / 32, kept=True)
        beyond.append(found["seconds"] - drawing_seconds(shape, machine, drawing, 128))
    few, many = FLAT
    block = (beyond[1] - beyond[0]) / (drawing.steps * (many.n_layers - few.n_layers))
    drawn = (beyond[0] - block * few.n_layers * drawing.steps) / (drawing.rows * drawing.steps * VOCABULARY)
    return replace(machine, overhead=max(0.0, block), choosing=max(0.0, drawn))


def predicted(job: Job, machine: Machine, found: dict[str, Any]) -> dict[str, Any]:
    """What the cost model says, given how long prompts and responses are."""
    rows = found["prompts"] * job.responses
    drawing = Drawing(
        found["prompts"],
        job.responses,
        found["prompt_tokens"],
        found["written"] / rows,
        ended=found["ended"] / rows,
        kept=True,
    )
    count, shape = drawing.count(), job.shape
    # The model, its matrices in the layout of the products, and what the rows leave behind.
    packed = shape.block_parameters + shape.d_model * shape.d_vocab
    memory = 4 * (shape.parameters + packed)
    memory += rows * (shape.kept(4) * job.tokens + 16 * shape.d_vocab)
    memory += found["prompts"] * shape.kept(4) * found["prompt_tokens"]
    return {
        "count": asdict(count),
        "flops": shape.arithmetic.flops(count),
        "parameters": shape.parameters,
        "seconds": drawing_seconds(shape, machine, drawing, 128),
        "memory": memory,
    }


def sample_bytes(tokens: Sequence[int] = (40, 200), count: int = 300) -> dict[str, list[float]]:
    """Memory that samples take in Python and on the disk: of each, and for each of its tokens."""
    tokenizer, random = AutoTokenizer.from_pretrained(embedded_path()), np.random.default_rng(0)
    held, written = [], []
    for length in tokens:
        tracemalloc.start()
        samples = []
        for draw in range(count):
            ids = tuple(int(i) for i in random.integers(500, VOCABULARY, length))
            samples.append(Sample(prompt=draw, draw=0, tokens=ids, text=tokenizer.decode(ids), ended=True, score=0.5))
        held.append(tracemalloc.get_traced_memory()[0] / count)
        tracemalloc.stop()
        written.append(float(np.mean([len(json.dumps(asdict(sample))) for sample in samples])))

    def line(values: list[float]) -> list[float]:
        slope = (values[1] - values[0]) / (tokens[1] - tokens[0])
        return [values[0] - slope * tokens[0], slope]

    return {"memory": line(held), "disk": line(written)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=[shape.name for shape in SIZES])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, results, machines = time.monotonic(), dict[str, list[dict[str, Any]]](), []
    with tempfile.TemporaryDirectory() as temporary:
        shapes = [shape for shape in SIZES if shape.name in given.sizes]
        folders = {shape.name: checkpoint(shape, Path(temporary) / shape.name) for shape in (*shapes, *FLAT)}
        # Before anything is forked: what is imported and made once is nobody's memory.
        measured([Job(FLAT[0], 2, 1, 2)], folders[FLAT[0].name])
        for number in range(given.rounds):
            for shape in shapes:
                machine = started(folders, Machine("here", **calibrate(), memory=0.0, width=4))
                machines.append({key: getattr(machine, key) for key in ("flops", "bandwidth", "overhead", "choosing")})
                print(f"round {number + 1}  {shape.name}: {machines[-1]}", flush=True)
                jobs = [Job(shape, *work) for work in (LARGEST if shape.name == "362M" else WORKLOADS)]
                for job, found in zip(
                    jobs, forked(lambda jobs=jobs, shape=shape: measured(jobs, folders[shape.name])), strict=True
                ):
                    said = predicted(job, machine, found)
                    results.setdefault(job.name, []).append({"measured": found, "predicted": said})
                    ratio = said["seconds"] / found["seconds"]
                    print(
                        f"round {number + 1}  {job.name:22} {found['seconds']:7.2f} s  foretold {said['seconds']:7.2f} "
                        f"({ratio:.2f})  memory {found['memory'] / 1e9:.2f} GB ({said['memory'] / found['memory']:.2f})"
                        f"  tokens {'same' if said['count'] == found['count'] else 'DIFFER'}",
                        flush=True,
                    )
                if given.out:  # as far as it has come: a round takes minutes
                    write(given.out, results, machines, given.rounds)
    ratios = [row["ratio"] for row in summary(results)]
    print(
        f"seconds foretold to measured: {min(ratios):.2f} to {max(ratios):.2f}; {time.monotonic() - start:.0f} s in all"
    )


def summary(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each job, what was foretold to what was measured: within a round, medians over rounds."""

    def ratios(rounds: list[dict[str, Any]], key: str) -> list[float]:
        return [r["predicted"][key] / r["measured"][key] for r in rounds]

    return [
        {
            "job": name,
            "parameters": rounds[0]["measured"]["parameters"],
            "seconds": float(np.median([r["measured"]["seconds"] for r in rounds])),
            "foretold": float(np.median([r["predicted"]["seconds"] for r in rounds])),
            "ratio": float(np.median(ratios(rounds, "seconds"))),
            "memory": float(np.median([r["measured"]["memory"] for r in rounds])),
            "memory_ratio": float(np.median(ratios(rounds, "memory"))),
            "flops_ratio": float(np.median(ratios(rounds, "flops"))),
            "tokens_same": all(r["predicted"]["count"] == r["measured"]["count"] for r in rounds),
        }
        for name, rounds in results.items()
    ]


def write(out: Path, results: dict[str, list[dict[str, Any]]], machines: list[dict[str, float]], rounds: int) -> None:
    """Everything as JSON."""
    about = {"processor": processor(), "torch": torch.__version__, "rounds": rounds, "date": time.strftime("%F")}
    data = {
        "about": about,
        "machine": {key: float(np.median([m[key] for m in machines])) for key in machines[0]},
        "jobs": summary(results),
        "sample_bytes": sample_bytes(),
        "raw": results,
    }
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """What it calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
