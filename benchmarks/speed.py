"""How fast are sampling and reading, against the neighbours and against what the machine allows?

Contestants live in processes of their own (peers in environments of their own, made on first use) and take turns,
one thread each, timed by CPU time; everything is a ratio within a round, so a slower hour cancels out.

``python benchmarks/speed.py`` runs all parts and writes ``speed.json`` after each cell, figures and a page of
markdown at the end; ``--only memory`` measures one part anew and keeps the rest; ``--quick`` is for a first look.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from environments import PEERS, ROOT, environment
from peers import PERSONAS, ROLES, contrast_texts
from speed_machine import facts
from speed_report import figures, page

WORKER = Path(__file__).with_name("speed_worker.py")
LAYERS = 8  # steered, unless said
BAKED = "baked"  # the folder of the checkpoint with all layers' vectors in its weights
BRIEFLY = " Answer in one short sentence."
SIZES = {  # billions of parameters: width, blocks, width of the MLP; heads of 64, a key for every four
    0.5: (1024, 28, 4096),
    1.0: (1536, 27, 6144),
    1.5: (2048, 23, 8192),
}


@dataclass(frozen=True)
class Setup:
    """A process: a tool with a model loaded. Contestants with the same setup share it."""

    tool: str
    kind: str = ""
    dtype: str = "float32"
    strides: str = ""
    folder: str = ""
    threads: int = 1


@dataclass(frozen=True)
class Contestant:
    """Who takes turns: ``options`` are the fields of its job that differ from the others'. The core is in every round
    of every cell; the rest is in one round of the first."""

    name: str
    setup: Setup
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    core: bool = False


@dataclass(frozen=True)
class Cell:
    """A size of job."""

    prompts: int
    n: int
    tokens: int
    rounds: int
    natural: bool = False

    @property
    def about(self) -> str:
        """In words."""
        end = "ends where the model ends it, useful tokens count" if self.natural else "no end before"
        count = f"{self.rounds} round{'s' * (self.rounds > 1)}"
        return f"{self.prompts} prompts x K = {self.n} x {self.tokens} new tokens, {end}; {count}"


def sampling_contestants() -> list[Contestant]:
    """Everybody who generates."""
    made = [
        Contestant("HF generate", Setup("huggingface"), core=True),
        Contestant("HF generate, bfloat16", Setup("huggingface", dtype="bfloat16"), core=True),
    ]
    for kind in ("hooked", "bridge"):
        for dtype in ("float32", "bfloat16"):
            setup = Setup("ours", kind, dtype)
            for count in (0, 1, LAYERS, 30):
                what = f"{count} layer{'s' * (count > 1)}" if count else "plain"
                core = count == LAYERS or (count == 0 and kind == "hooked")
                made.append(Contestant(f"ours, {kind}, {dtype}, {what}", setup, {"layers": count}, core))
            if kind == "bridge":  # TransformerLens' conversion to a HookedTransformer loses the biases
                made.append(Contestant(f"ours, {kind}, {dtype}, baked", replace(setup, folder=BAKED)))
    hooked, layers = Setup("ours", "hooked"), {"layers": LAYERS}
    for point in ("hook_resid_post", "attn.hook_pattern"):
        name = f"blocks.3.{point}"
        made.append(Contestant(f"ours, hooked, float32, user's hook at {name}", hooked, {**layers, "hook": name}))
    made += [
        Contestant("ours, hooked, bfloat16 by config", hooked, {**layers, "dtype": "bfloat16"}),
        Contestant("HookedTransformer.generate", Setup("transformer-lens", "hooked", strides="own"), core=True),
        Contestant("HookedTransformer.generate, re-strided", Setup("transformer-lens", "hooked")),
        Contestant("TransformerBridge.generate", Setup("transformer-lens", "bridge")),
        *(Contestant(f"{peer}, 30 layers", Setup(peer), {"layers": 30}) for peer in ("repeng", "steering-vectors")),
        Contestant("steerkit, 30 layers, one by one", Setup("steerkit"), {"layers": 30, "samples": 1}),
    ]
    return made


def extraction_contestants() -> list[Contestant]:
    """Everybody who reads contrast pairs, at its default batch size and at others."""

    def ours(kind: str, dtype: str, batch: int, core: bool = True) -> Contestant:
        return Contestant(f"ours, {kind}, {dtype}, batch {batch}", Setup("ours", kind, dtype), {"batch": batch}, core)

    def peer(name: str, batch: int, core: bool = False, what: str = "", **options: Any) -> Contestant:
        return Contestant(f"{name}{what}, batch {batch}", Setup(name), {"batch": batch, **options}, core)

    return [
        *(ours(kind, dtype, 32) for kind in ("hooked", "bridge") for dtype in ("float32", "bfloat16")),
        ours("hooked", "float32", 8, core=False),
        peer("steering-vectors", 8, core=True),
        peer("steering-vectors", 1),
        peer("steering-vectors", 32),
        peer("repeng", 32, core=True),
        peer("repeng", 8),
        peer("repeng", 8, what=", reading alone", reading=True),
        peer("steerkit", 8),
    ]


FULL: dict[str, Any] = {
    "cells": {
        "64 tokens": Cell(16, 8, 64, rounds=3),
        "16 tokens": Cell(16, 8, 16, rounds=3),
        "256 tokens": Cell(4, 8, 256, rounds=1),
        "natural end": Cell(16, 8, 64, rounds=2, natural=True),
        "batch 1": Cell(1, 1, 64, rounds=3),
    },
    "pairs": (4, 64),  # rounds, and pairs in each
    "memory": {"sampling": Cell(16, 8, 64, 1), "dtypes": ("float32", "bfloat16"), "pairs": 256, "growth": (256, 4096)},
    "limits": {"rows": [1, 8, 32, 64, 128], "seconds": 1.0},
    "profile": Cell(16, 8, 16, 1),
    "growth": {
        "base": Cell(4, 4, 16, rounds=2),
        "K": (1, 2, 4, 8, 16),
        "prompts": (4, 16, 64),
        "response tokens": (16, 64, 256),
        "steered layers": (0, 1, 8, 30),
        "billion parameters": (0.13, *SIZES),
    },
}
QUICK: dict[str, Any] = {
    "cells": {
        "8 tokens": Cell(4, 4, 8, rounds=1),
        "natural end": Cell(4, 4, 16, rounds=1, natural=True),
        "batch 1": Cell(1, 1, 8, rounds=1),
    },
    "pairs": (1, 8),
    "memory": {"sampling": Cell(4, 4, 8, 1), "dtypes": ("float32",), "pairs": 16, "growth": (16, 128)},
    "limits": {"rows": [1, 16, 128], "seconds": 0.1},
    "profile": Cell(4, 4, 8, 1),
    "growth": {
        "base": Cell(2, 2, 4, rounds=1),
        "K": (1, 4),
        "prompts": (2, 8),
        "response tokens": (4, 16),
        "steered layers": (0, 30),
        "billion parameters": (0.13,),
    },
}


class RefusedError(Exception):
    """A contestant can't: its message is what it raised."""


class Worker:
    """A process that answers one line of JSON with another."""

    def __init__(self, setup: Setup, folder: Path, device: str) -> None:
        try:
            python = environment(setup.tool) if setup.tool in PEERS else Path(sys.executable)
        except subprocess.CalledProcessError as error:
            raise RefusedError(f"can't be installed: {error.stderr.strip()[-300:]}") from error
        threads = {name: str(setup.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        given = {**os.environ, **threads, **quiet, "PYTHONPATH": str(ROOT)}
        command = [str(python), "-W", "ignore", str(WORKER)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=given
        )
        made = {**vars(setup), "folder": str(folder), "device": device}
        self.ready = self._say(made)

    def ask(self, **job: Any) -> dict[str, Any]:
        """Have a job done.

        Raises:
            RefusedError: it raised.
        """
        return self._say(job)

    def _say(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline() or '{"error": "its process died"}')
        except BrokenPipeError:
            answer = {"error": "its process died"}
        if "error" in answer:
            raise RefusedError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        self.process.wait()


class Benchmark:
    """What all parts share: processes that stay alive, prompts, and where results go."""

    def __init__(self, given: argparse.Namespace, temporary: Path) -> None:
        from transformers import AutoTokenizer

        from sims_lens.models import embedded_path

        self.device, self.lanes, self.thorough = given.device, given.lanes, given.thorough
        self.settings = dict(QUICK if given.quick else FULL)
        if given.cells:
            self.settings["cells"] = {name: self.settings["cells"][name] for name in given.cells}
        self.folders = {"": embedded_path(), BAKED: temporary / BAKED}
        self.temporary = temporary
        self.tokenizer = AutoTokenizer.from_pretrained(self.folders[""])
        self.workers: dict[Setup, Worker] = {}
        self.locks: defaultdict[Setup, threading.Lock] = defaultdict(threading.Lock)
        self.baking = threading.Lock()

    def job(self, cell: Cell, **options: Any) -> dict[str, Any]:
        """The message for a cell, with what a contestant wants otherwise."""
        from sims_lens.prompts import everyday

        prompts = [prompt + BRIEFLY * cell.natural for prompt in everyday(cell.prompts)]
        job = {"do": "sample", "memory": False, "n": cell.n, "tokens": cell.tokens, "temperature": 0.8, "top_k": 50}
        job |= {"stops": [self.tokenizer.eos_token_id] if cell.natural else [], "seed": 0}
        job |= {"layers": 0, "hook": None, "dtype": None, **options}
        if samples := job.pop("samples", None):  # so slow that a few must do
            prompts, job["n"] = prompts[:samples], 1
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return {**job, "prompts": prompts, "texts": texts}

    def start(self, setup: Setup) -> Worker:
        """A new process."""
        with self.baking:
            if setup.folder == BAKED and not self.folders[BAKED].exists():
                self.bake()
        return Worker(setup, self.folders.get(setup.folder) or Path(setup.folder), self.device)

    def ask(self, setup: Setup, job: Mapping[str, Any]) -> dict[str, Any]:
        """Have a job done by the process with this setup, started on first use.

        Raises:
            RefusedError: it can't be, or it raised.
        """
        with self.locks[setup]:
            if setup not in self.workers:
                self.workers[setup] = self.start(setup)
            return self.workers[setup].ask(**job)

    def bake(self) -> None:
        """Make the checkpoint with all layers' vectors in its weights."""
        worker = Worker(Setup("ours", "bridge"), self.folders[""], self.device)
        worker.ask(do="bake", layers=30, folder=str(self.folders[BAKED]), memory=False)
        worker.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def turns(
        self,
        contestants: Sequence[Contestant],
        jobs: Sequence[Callable[[Mapping[str, Any]], dict[str, Any]]],
        warm: Callable[[Mapping[str, Any]], dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """Let contestants take turns.

        Args:
            contestants: who.
            jobs: one for each round: a contestant's options to its message.
            warm: what each does first, untimed.

        Returns:
            A record of each: its turns by round, None where it wasn't in; and why it gave up, if it did.
        """
        records = {c.name: {"name": c.name, "rounds": [None] * len(jobs), "error": None} for c in contestants}

        def turn(contestant: Contestant, round_: int | None) -> None:
            record = records[contestant.name]
            if record["error"]:
                return
            try:
                job = (warm if round_ is None else jobs[round_])(contestant.options)
                answer = self.ask(contestant.setup, job)
                units = len(job["pairs"]) if job["do"] == "extract" else sum(answer["result"])
                if job["do"] == "sample" and not job["stops"]:  # or it would have less to do than the others
                    whole = len(job["prompts"]) * job["n"] * job["tokens"]
                    if units != whole:
                        raise RefusedError(f"gave {units} tokens where {whole} were asked for")
            except RefusedError as error:
                record["error"] = str(error)
                print(f"  {contestant.name}: {error}", flush=True)
                return
            if round_ is not None:
                record["rounds"][round_] = {"units": units, "seconds": answer["seconds"], "wall": answer["wall"]}
                print(
                    f"  round {round_ + 1}: {contestant.name}: {units / answer['seconds']:.1f} per second "
                    f"({answer['wall']:.1f} s)",
                    flush=True,
                )

        order = random.Random(0)
        with ThreadPoolExecutor(self.lanes) as lanes:
            list(lanes.map(turn, contestants, [None] * len(contestants)))
        for round_ in range(len(jobs)):
            there = [c for i, c in enumerate(contestants) if c.core or self.thorough or i % len(jobs) == round_]
            order.shuffle(there)
            with ThreadPoolExecutor(self.lanes) as lanes:
                list(lanes.map(turn, there, [round_] * len(there)))
        return list(records.values())

    def sample(self, cell: Cell, contestants: Sequence[Contestant]) -> dict[str, Any]:
        """A cell of sampling: records with what it was."""
        small = replace(cell, tokens=2, natural=False)  # as many rows: what is kept between calls is made now
        jobs = [lambda options, seed=k: self.job(cell, **options, seed=seed) for k in range(cell.rounds)]
        records = self.turns(contestants, jobs, lambda options: self.job(small, **options))
        plain = self.job(cell)
        tokens = sum(len(self.tokenizer(text, add_special_tokens=False).input_ids) for text in plain["texts"])
        job = {"prompts": cell.prompts, "n": cell.n, "tokens": cell.tokens, "stops": plain["stops"]}
        return {"about": cell.about, "job": {**job, "prompt_tokens": tokens}, "records": records}


Save = Callable[[Mapping[str, Any]], None]


def sampling(bench: Benchmark, save: Save) -> None:
    """Tokens per second of everybody."""
    cells: dict[str, Any] = {}
    everybody = sampling_contestants()
    for place, (name, cell) in enumerate(bench.settings["cells"].items()):
        print(f"sampling, {name}: {cell.about}", flush=True)
        there = everybody if place == 0 else [c for c in everybody if c.core]
        cells[name] = bench.sample(cell, there)
        save({"cells": cells})


def extraction(bench: Benchmark, save: Save) -> None:
    """Contrast pairs per second."""
    rounds, size = bench.settings["pairs"]
    pairs = contrast_texts(bench.tokenizer, rounds * size)

    def job(part: Sequence[tuple[str, str]]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        return lambda options: {"do": "extract", "memory": False, "reading": False, "pairs": part, **options}

    about = f"{rounds * size} pairs of whole texts, {size} in a round; mean difference at the last token, all layers"
    print(f"extraction: {about}", flush=True)
    jobs = [job(pairs[k * size : (k + 1) * size]) for k in range(rounds)]
    records = bench.turns(extraction_contestants(), jobs, job(pairs[:2]))
    save({"cells": {f"{rounds * size} pairs": {"about": about, "records": records}}})


def short_pairs(count: int) -> list[tuple[str, str]]:
    """Many pairs of a few tokens, for how memory grows with their number."""
    return [tuple(f"{persona} {ROLES[k % len(ROLES)]} {k}" for persona in PERSONAS) for k in range(count)]  # type: ignore[misc]


def memory(bench: Benchmark, save: Save) -> None:
    """Peak memory, each in a fresh process, with all cores: threads change time, not memory."""
    settings = bench.settings["memory"]
    cells: dict[str, Any] = {}

    def measure(name: str, about: str, contestants: Sequence[tuple[Contestant, Mapping[str, Any]]]) -> None:
        print(f"memory, {name}: {about}", flush=True)
        records = []
        for contestant, job in contestants:
            try:
                worker = bench.start(replace(contestant.setup, threads=os.cpu_count() or 1))
                try:
                    worker.ask(**{**job, **_tiny(job)})
                    answer = worker.ask(**job)
                finally:
                    worker.close()
                record = {"name": contestant.name, **{key: answer[key] for key in ("held", "extra", "peak")}}
            except RefusedError as error:
                record = {"name": contestant.name, "error": str(error)}
            print(f"  {record}", flush=True)
            records.append(record)
        cells[name] = {"about": about, "records": records}
        save({"cells": cells})

    cell = settings["sampling"]
    everybody = [c for c in sampling_contestants() if c.setup.dtype in settings["dtypes"]]
    generating = [c for c in everybody if c.setup.tool == "huggingface" or c.name.endswith(f"{LAYERS} layers")]
    measure("sampling", cell.about, [(c, bench.job(cell, **{**c.options, "memory": True})) for c in generating])

    def extract(contestant: Contestant, pairs: Sequence[tuple[str, str]]) -> tuple[Contestant, dict[str, Any]]:
        job = {"do": "extract", "memory": True, "reading": False, "pairs": pairs}
        return contestant, {**job, **contestant.options}

    everybody = [c for c in extraction_contestants() if c.setup.dtype in settings["dtypes"]]
    reading = [c for c in everybody if c.core or c.setup.tool == "steerkit"]
    whole = contrast_texts(bench.tokenizer, settings["pairs"])
    measure("extraction", f"{len(whole)} pairs of whole texts", [extract(c, whole) for c in reading])
    plain = [c for c in reading if c.setup.tool == "ours" and c.setup.dtype == "float32"]
    for count in settings["growth"]:
        jobs = [extract(c, short_pairs(count)) for c in plain]
        measure(f"extraction, {count} short pairs", "about ten tokens a text", jobs)


def _tiny(job: Mapping[str, Any]) -> dict[str, Any]:
    """The warm-up of a job, after which modules are imported and weights, which are mapped from a file, are read."""
    return {"pairs": job["pairs"][:2]} if job["do"] == "extract" else {"n": 2, "tokens": 2}


def limits(bench: Benchmark, save: Save) -> None:
    """What the machine allows, and where our time goes."""
    print("limits", flush=True)
    worker = bench.start(Setup("machine"))
    found = worker.ask(do="limits", memory=False, settings=bench.settings["limits"])["result"]
    worker.close()
    profiles: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        who = f"ours, hooked, {dtype}, {LAYERS} layers"
        job = bench.job(bench.settings["profile"], layers=LAYERS)
        try:
            setup = Setup("ours", "hooked", dtype)
            bench.ask(setup, {**job, "tokens": 2})
            profiles[who] = bench.ask(setup, {**job, "do": "profile"})["result"]
        except RefusedError as error:
            profiles[who] = {"error": str(error)}
    save({"limits": found, "profiles": profiles})


def growth(bench: Benchmark, save: Save) -> None:
    """The cost of a sample along one axis at a time, from a base."""
    settings = dict(bench.settings["growth"])
    base: Cell = settings.pop("base")
    steered = {"layers": LAYERS}
    everybody = [
        Contestant("HF generate", Setup("huggingface"), core=True),
        Contestant("ours, float32", Setup("ours", "hooked"), steered, core=True),
        Contestant("ours, bfloat16", Setup("ours", "hooked", "bfloat16"), steered, core=True),
    ]
    changed = {"K": "n", "prompts": "prompts", "response tokens": "tokens"}
    axes: dict[str, list[dict[str, Any]]] = {}
    for axis, values in settings.items():
        axes[axis] = []
        for value in values:
            print(f"growth, {axis} {value}", flush=True)
            cell, there = base, everybody
            if axis in changed:
                cell = replace(base, **{changed[axis]: value})
            elif axis == "steered layers":
                there = [replace(c, options={"layers": value}) if c.options else c for c in everybody]
            else:
                bench.close()
                folder = random_model(bench, value)
                there = [replace(c, setup=replace(c.setup, kind="bridge", folder=folder)) for c in everybody]
            axes[axis].append({"value": value, "tokens": cell.tokens, "cell": bench.sample(cell, there)})
            save({"axes": axes})
    bench.close()


def random_model(bench: Benchmark, billions: float) -> str:
    """A checkpoint of that size with random weights; the embedded model for the smallest."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if billions not in SIZES:
        return ""
    width, blocks, inner = SIZES[billions]
    folder = bench.temporary / "random"
    config = LlamaConfig(
        vocab_size=len(bench.tokenizer),
        hidden_size=width,
        num_hidden_layers=blocks,
        intermediate_size=inner,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=bench.tokenizer.bos_token_id,
        eos_token_id=bench.tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    bench.tokenizer.save_pretrained(folder)
    return str(folder)


PARTS = {"sampling": sampling, "extraction": extraction, "memory": memory, "limits": limits, "growth": growth}


@contextmanager
def benchmark(given: argparse.Namespace) -> Iterator[Benchmark]:
    """A benchmark whose processes end with the block."""
    with tempfile.TemporaryDirectory() as temporary:
        bench = Benchmark(given, Path(temporary))
        try:
            yield bench
        finally:
            bench.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny jobs, one round: does everything run?")
    parser.add_argument("--thorough", action="store_true", help="everybody in every round of the first cell")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure anew")
    parser.add_argument("--cells", nargs="+", choices=FULL["cells"], help="of sampling only these; for another --out")
    parser.add_argument("--lanes", type=int, default=1, help="contestants at a time, each with a core of its own")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: wall time then")
    parser.add_argument("--out", type=Path, default=Path("docs/data"), help="folder of speed.json")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"), help="folder of the figures")
    parser.add_argument("--report", action="store_true", help="only print and draw what is in speed.json")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "speed.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    if not given.report:
        with benchmark(given) as bench:
            for name in given.only:
                about = {"machine": facts(given.device), "settings": describe(given)}

                def save(part: Mapping[str, Any], name: str = name, about: Mapping[str, Any] = about) -> None:
                    results["parts"][name] = {**about, **part}
                    path.write_text(json.dumps(results, indent=1) + "\n")

                PARTS[name](bench, save)
    print(page(results))
    given.figures.mkdir(parents=True, exist_ok=True)
    for name, drawn in figures(results).items():
        drawn.update_layout(paper_bgcolor="white").write_image(given.figures / f"{name}.png", scale=2)


def describe(given: argparse.Namespace) -> str:
    """How it was run."""
    time = "CPU time" if given.device == "cpu" else "wall time"
    lanes = "one process at a time" if given.lanes == 1 else f"{given.lanes} processes at a time"
    return f"{time}, one thread each, {lanes}{', quick' if given.quick else ''}"


if __name__ == "__main__":
    main()
