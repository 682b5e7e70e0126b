"""What a run will take, before it starts: tokens, operations, time, memory and money from sizes alone.

Tokens follow from the settings: how many responses each step draws, and how often each is run again. Operations follow
from tokens (:class:`~sims_lens.cost.Arithmetic`). Time is a roofline: each part of a pass takes as long as its
operations or its bytes, whichever takes longer, on a machine of which two numbers are known, the rate of its matrix
products and of its memory; and what starting a block takes. ``docs/scaling.md`` holds all of it against measurements.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sims_lens.config import SIMSConfig
from sims_lens.cost import Arithmetic, TokenCount, flops_text
from sims_lens.errors import ConfigError

_STREAMED = 26
"""Numbers per unit of d_model that a token's norms, rotations, sums and copies read and write in a block."""
_STREAMED_MLP = 5
"""The same per unit of d_mlp: the gate and its product."""

_SAMPLE_BYTES = (95, 54)
"""Of memory that a sample takes in Python, and for each of its tokens: measured by benchmarks/scaling.py."""
_ROW_BYTES = (139, 13.7)
"""Of a sample's line in samples.jsonl, and for each of its tokens: measured there, too."""
_JUDGE_TEMPLATE = 60
"""Tokens of a judge's question beside the prompt and the responses, about."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder.

    Args:
        name: of the model.
        n_layers: blocks.
        d_model: width of the stream.
        n_heads: of queries.
        n_key_value_heads: of keys and values.
        d_head: width of a head.
        d_mlp: width inside the MLP.
        d_vocab: tokens.
        gated: whether the MLP has a gate.
        tied: whether the embedding is the unembedding.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    gated: bool = True
    tied: bool = False

    @property
    def block_parameters(self) -> int:
        """Entries of all blocks' matrices."""
        attention = self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_key_value_heads)
        return self.n_layers * (attention + self.d_model * self.d_mlp * (3 if self.gated else 2))

    @property
    def parameters(self) -> int:
        """All weights but norms and biases."""
        return self.block_parameters + self.d_model * self.d_vocab * (1 if self.tied else 2)

    @property
    def arithmetic(self) -> Arithmetic:
        """Operations of a forward pass."""
        return Arithmetic(
            blocks=2.0 * self.block_parameters,
            attention=4.0 * self.n_layers * self.n_heads * self.d_head,
            unembed=2.0 * self.d_model * self.d_vocab,
        )

    def kept(self, width: int) -> int:
        """Bytes of keys and values that a token leaves behind, at ``width`` bytes a number."""
        return 2 * self.n_layers * self.n_key_value_heads * self.d_head * width

    @classmethod
    def of_config(cls, config: Mapping[str, Any], name: str = "") -> "Shape":
        """The shape that a Hugging Face ``config.json`` of a Llama-like model describes.

        Raises:
            ConfigError: it lacks a size.
        """
        try:
            heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
            return cls(
                name=name or str(config.get("_name_or_path") or config.get("model_type") or ""),
                n_layers=int(config["num_hidden_layers"]),
                d_model=width,
                n_heads=heads,
                n_key_value_heads=int(config.get("num_key_value_heads") or heads),
                d_head=int(config.get("head_dim") or width // heads),
                d_mlp=int(config["intermediate_size"]),
                d_vocab=int(config["vocab_size"]),
                gated=config.get("model_type") not in ("gpt_neox", "phi", "opt"),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise ConfigError(
                f"this config has no {error}, so that the model's sizes aren't known; give a size such as '8B'"
            ) from error

    @classmethod
    def of(cls, name: str) -> "Shape":
        """The shape of a model by name: a size such as "8B", or a folder with a ``config.json``.

        A size that no known model has gets the proportions of the nearest one that is known.

        Raises:
            ConfigError: it is neither.

        >>> round(Shape.of("8B").parameters / 1e9, 1)
        8.0
        >>> round(Shape.of("3B").parameters / 1e9, 1)
        3.0
        """
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", name.strip(), re.IGNORECASE):
            return _sized(float(found[1]) * {"M": 1e6, "B": 1e9}[found[2].upper()], name.strip())
        folder = Path(name).expanduser()
        if (folder / "config.json").is_file():
            return cls.of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder.name)
        raise ConfigError(f"model size {name!r} is neither a number such as '8B' nor a folder with a config.json")


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, tied=True),
    Shape("SmolLM2-360M", 32, 960, 15, 5, 64, 2560, 49152, tied=True),
    Shape("SmolLM2-1.7B", 24, 2048, 32, 32, 64, 8192, 49152, tied=True),
    Shape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256),
    Shape("Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256),
)
"""Known models, by their ``config.json``."""


def _sized(parameters: int | float, name: str) -> Shape:
    """A shape of so many parameters: that of the nearest known model, or its proportions with other widths."""
    if not 1e6 <= parameters <= 1e13:
        raise ConfigError(f"model size {name!r} is not from 1M to 10000B")
    near = min(SHAPES, key=lambda shape: abs(math.log(shape.parameters / parameters)))
    if abs(near.parameters / parameters - 1) < 0.06:
        return near

    def scaled(factor: int | float) -> Shape:
        heads = max(1, round(near.n_heads * factor))
        return replace(
            near,
            name=name,
            n_layers=max(2, round(near.n_layers * factor**0.5)),
            d_model=max(8, round(near.d_model * factor)),
            n_heads=heads,
            n_key_value_heads=max(1, min(heads, round(near.n_key_value_heads * factor))),
            d_mlp=max(8, round(near.d_mlp * factor)),
        )

    low, high = 0.01, 10.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if scaled(middle).parameters < parameters else (low, middle)
    # Depth moves in whole blocks: the width makes up for it.
    found = scaled(high)
    per_width = found.parameters / found.d_mlp
    return replace(found, d_mlp=max(8, round(found.d_mlp + (parameters - found.parameters) / per_width)))


@dataclass(frozen=True)
class Machine:
    """What a processor can do.

    Args:
        name: what it is.
        flops: operations per second of matrix products.
        bandwidth: bytes per second between memory and processor.
        memory: bytes.
        flops_share: of ``flops``, what a run of many rows reaches.
        bandwidth_share: of ``bandwidth``, the same.
        overhead: seconds that starting a block takes in each pass, beside its products.
        choosing: seconds that drawing a token takes, for each entry of the vocabulary.
        rows: sequences side by side, at most.
        width: bytes of a number there: 2 in half precision.
        dollars_per_hour: of one; None where no price is known.
        source: where these come from, and when.
    """

    name: str
    flops: int | float
    bandwidth: int | float
    memory: int | float
    flops_share: int | float = 1.0
    bandwidth_share: int | float = 1.0
    overhead: int | float = 0.0
    choosing: int | float = 0.0
    rows: int = 128
    width: int = 2
    dollars_per_hour: int | float | None = None
    source: str = ""


_SHARES: dict[str, Any] = {"flops_share": 0.4, "bandwidth_share": 0.6, "overhead": 3e-6, "choosing": 5e-12, "rows": 256}
_RENT = "rent: middle of what specialised clouds ask, comparison page of May 2026; yours will differ"
MACHINES: Mapping[str, Machine] = {
    "h100": Machine(
        "NVIDIA H100 SXM 80 GB", 989e12, 3.35e12, 80e9, **_SHARES, dollars_per_hour=3.0,
        source=f"data sheet, bfloat16 without sparsity; shares are assumed, not measured; {_RENT}",
    ),
    "a100": Machine(
        "NVIDIA A100 SXM 80 GB", 312e12, 2.039e12, 80e9, **_SHARES, dollars_per_hour=1.3,
        source=f"data sheet, bfloat16 without sparsity; shares are assumed, not measured; {_RENT}",
    ),
    "l4": Machine(
        "NVIDIA L4 24 GB", 121e12, 0.3e12, 24e9, **_SHARES,
        source="data sheet, bfloat16 without sparsity; shares are assumed, not measured; no price was looked up",
    ),
    "cpu": Machine(
        "one thread of an AMD EPYC with AVX2", 45e9, 10e9, 24e9, overhead=2.7e-3, choosing=9e-9, width=4,
        source="float32, CPU seconds, as docs/data/scaling.json has it; measured on a busy machine",
    ),
}  # fmt: skip
"""Machines by the name that ``sims-lens plan --hardware`` takes."""

JUDGES: Mapping[str, str] = {
    "function": "a function of the text: no tokens",
    "self": "the model itself, on the same machine: each pair in both orders",
    "reward-model": "a reward model of the model's size, on the same machine: each response once",
    "endpoint": "a chat model behind an endpoint: each pair in both orders",
}


@dataclass(frozen=True)
class Workload:
    """What a run is asked to do.

    Args:
        shape: of the model.
        prompts: how many.
        prompt_tokens: of each, chat template included, on average.
        response_tokens: of each, on average; None for ``max_new_tokens`` of the config.
        ended: share of responses that end before the limit.
        config: of the run.
        judge: one of :data:`JUDGES`.
        judge_price: dollars for a million tokens that an endpoint reads, and that it writes; None where not known.
        judge_per_second: calls that an endpoint answers per second.
        sampler: "local", the sampler of this package, or "vllm".
        tries: evaluations of an iteration's plan: more than 1 where the guard makes steps smaller.

    Raises:
        ConfigError: a value is out of range.
    """

    shape: Shape
    prompts: int
    prompt_tokens: int | float = 60.0
    response_tokens: int | float | None = None
    ended: int | float = 0.0
    config: SIMSConfig = field(default_factory=SIMSConfig)
    judge: str = "function"
    judge_price: tuple[int | float, int | float] | None = None
    judge_per_second: int | float = 4.0
    sampler: str = "local"
    tries: int | float = 1.0

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ConfigError(f"prompts = {self.prompts} is not 1 or more")
        if self.judge not in JUDGES:
            raise ConfigError(f"judge {self.judge!r} is not one of {', '.join(JUDGES)}")
        if self.sampler not in ("local", "vllm"):
            raise ConfigError(f"sampler {self.sampler!r} is not one of local, vllm")
        for name, value, low, high in (
            ("prompt_tokens", self.prompt_tokens, 1.0, math.inf),
            ("response_tokens", self.length, 1.0, math.inf),
            ("ended", self.ended, 0.0, 1.0),
            ("judge_per_second", self.judge_per_second, 1e-9, math.inf),
            ("tries", self.tries, 1.0, math.inf),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} = {value} is not from {low:g} to {high:g}")

    @property
    def length(self) -> float:
        """Tokens of a response, on average."""
        return float(self.config.sampling.max_new_tokens if self.response_tokens is None else self.response_tokens)


@dataclass(frozen=True)
class Drawing:
    """Responses that are drawn together, under one plan.

    Args:
        prompts: how many are asked.
        responses: to each.
        prompt_tokens: of each prompt.
        response_tokens: of each response.
        ended: share of the responses that end before the limit.
        known: share of the prompts whose body the sampler has kept: of those only the last token is run.
        kept: whether the bodies of the others will be kept, which takes one more distribution each.
        whole: whether the last token of a response at the limit is run too, because it is read.
        beside: responses to each prompt that are also run without the plan.
        share: of the blocks, those in which the two differ.
    """

    prompts: int | float
    responses: int | float
    prompt_tokens: int | float
    response_tokens: int | float
    ended: int | float = 0.0
    known: int | float = 0.0
    kept: bool = False
    whole: bool = False
    beside: int | float = 0.0
    share: int | float = 0.0

    @property
    def rows(self) -> float:
        """Responses in all."""
        return float(self.prompts * self.responses)

    @property
    def steps(self) -> float:
        """Tokens of a response that are run: what comes after the last one is asked only where it ended, or is read."""
        return float(self.response_tokens if self.whole else self.response_tokens - 1 + self.ended)

    def count(self) -> TokenCount:
        """Tokens, as the sampler counts them."""
        p, s, new = self.prompt_tokens, self.steps, self.prompts * (1 - self.known)
        prefill = new * p + (self.prompts - new)
        attended = new * p * (p + 1) / 2 + (self.prompts - new) * p
        looked = s * p + s * (s + 1) / 2
        logits = self.prompts + (new if self.kept else 0.0) + self.rows * s
        beside = self.prompts * self.beside
        if beside and self.share:
            first = self.prompts if self.kept or self.known else self.prompts * p
            once = self.prompts * (p if self.kept or self.known else p * (p + 1) / 2)
            extra = self.share * (first + beside * s)
            attended += self.share * (once + beside * looked)
            logits += self.prompts + beside * s
        else:
            extra = 0.0
        return TokenCount(round(prefill), round(self.rows * s), attended + self.rows * looked, round(logits), extra)


@dataclass(frozen=True)
class Phase:
    """What one part of a run takes.

    Args:
        name: as a run's own table of costs has it.
        seconds: on all machines together.
        prefill, decode: tokens that are read and written.
        flops: operations.
        calls: of an endpoint.
    """

    name: str
    seconds: int | float
    prefill: int | float = 0.0
    decode: int | float = 0.0
    flops: int | float = 0.0
    calls: int | float = 0.0


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Args:
        workload: what was asked.
        machine: where.
        gpus: how many of it.
        phases: by what takes the most.
        memory: bytes, by what they hold: of each machine, then of the process that drives them.
        disk: bytes of the run directory.
        dollars: of machines and judge; None where a price isn't known.
        bottlenecks: what will hurt first, in words.
    """

    workload: Workload
    machine: Machine
    gpus: int
    phases: tuple[Phase, ...]
    memory: Mapping[str, float]
    disk: int | float
    dollars: float | None
    bottlenecks: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of the whole run, one phase after the other."""
        return sum(phase.seconds for phase in self.phases)

    def __repr__(self) -> str:
        work, whole = self.workload, self.phases
        head = (
            f"{work.prompts:,} prompts on {work.shape.name} ({_number(work.shape.parameters)} parameters), "
            f"{self.gpus} x {self.machine.name}: {_duration(self.seconds)}, "
            f"{flops_text(sum(p.flops for p in whole))}" + ("" if self.dollars is None else f", ${self.dollars:,.2f}")
        )
        lines = [
            f"  {p.name:<10}{_duration(p.seconds):>11}  {_number(p.prefill):>7} read {_number(p.decode):>7} written"
            + (f"  {_number(p.calls)} calls" if p.calls else "")
            for p in whole
        ]
        memory = ", ".join(f"{what} {_bytes(size)}" for what, size in self.memory.items())
        said = [f"  ! {text}" for text in self.bottlenecks]
        return "\n".join([head, *lines, f"  memory: {memory}", f"  disk: {_bytes(self.disk)}", *said])

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {
            "model": self.workload.shape.name,
            "parameters": self.workload.shape.parameters,
            "machine": self.machine.name,
            "gpus": self.gpus,
            "seconds": self.seconds,
            "dollars": self.dollars,
            "phases": {p.name: {f.name: getattr(p, f.name) for f in fields(p)[1:]} for p in self.phases},
            "memory": dict(self.memory),
            "disk": self.disk,
            "bottlenecks": list(self.bottlenecks),
        }


def split_sizes(count: int, config: SIMSConfig) -> tuple[int, int, int]:
    """How many prompts a run trains on, chooses the layer with, and holds out."""
    heldout = round(count * config.evaluation.heldout)
    validation = round(count * config.evaluation.validation) if config.steering.layers == "auto" else 0
    return count - heldout - validation, validation, heldout


def drawings(work: Workload) -> tuple[Drawing, ...]:
    """Everything that a run draws, in the order in which it does: see ``loop.py``."""
    config = work.config
    train, validation, heldout = split_sizes(work.prompts, config)
    local, evaluation = work.sampler == "local", config.evaluation
    # The sampler keeps what comes before a prompt's last token, where no plan acts on it.
    kept = local and config.steering.scope in ("generation", "last_prompt", "response")
    known = 1.0 if kept else 0.0
    layers, blocks = config.steering.layers, work.shape.n_layers
    tries = len(config.steering.candidates) if layers == "auto" and len(config.steering.candidates) > 1 else 0
    lowest = (
        (config.steering.candidates[len(config.steering.candidates) // 2] * blocks) if layers == "auto" else min(layers)
    )
    share = 1.0 - lowest / blocks

    def drawing(prompts: int, responses: int | float, **more: Any) -> Drawing:
        return Drawing(prompts, responses, work.prompt_tokens, work.length, work.ended, kept=kept, **more)

    beside = min(evaluation.measured, evaluation.samples) if local else 0
    found = [drawing(heldout, evaluation.samples)]
    if tries:
        found.append(drawing(validation, evaluation.samples))
    for turn in range(config.iterations):
        found.append(
            drawing(train, config.sampling.responses, known=known if turn else 0.0, whole=local and _reads(work, turn))
        )
        if tries and not turn:
            found += tries * [drawing(validation, evaluation.samples, known=known, beside=beside, share=share)]
        steered = drawing(heldout, evaluation.samples, known=known, beside=beside, share=share)
        found.append(replace(steered, prompts=heldout * work.tries))
    found += evaluation.controls * [drawing(heldout, evaluation.samples, known=known, beside=beside, share=share)]
    return tuple(found)


def _reads(work: Workload, turn: int) -> bool:
    """Whether the stream is read while training responses are drawn: all pairs are of this iteration, and it has room
    (1 GiB, ``workbench.READINGS_LIMIT``)."""
    train, _, _ = split_sizes(work.prompts, work.config)
    count = train * work.config.sampling.responses
    size = 4 * count * work.shape.n_layers * (work.shape.d_model + work.config.sampling.max_new_tokens)
    return (work.config.contrast.memory == 1 or turn == 0) and size <= 1 << 30


def forecast(work: Workload, machine: Machine, *, gpus: int = 1) -> Forecast:
    """What a run will take on some machines.

    Args:
        work: what it is asked to do.
        machine: one of :data:`MACHINES`, or your own.
        gpus: how many; the model is spread over as many as it needs, and copied where there are more.

    Raises:
        ConfigError: the weights don't fit into their memory.
    """
    if gpus < 1:
        raise ConfigError(f"gpus = {gpus} is not 1 or more")
    shape, width, weights = work.shape, machine.width, work.shape.parameters * machine.width
    if weights > 0.9 * gpus * machine.memory:
        raise ConfigError(
            f"{shape.name} has {_bytes(weights)} of weights, more than {gpus} x {machine.name} hold; give at least "
            f"{math.ceil(weights / (0.9 * machine.memory))}"
        )
    copies = max(1, int(0.9 * gpus * machine.memory // (1.25 * weights)))
    copies = min(copies, gpus)
    each = shape.kept(width) * (work.prompt_tokens + work.length) + 16 * shape.d_vocab
    room = 0.9 * gpus * machine.memory - copies * weights
    rows = max(1, min(machine.rows * copies, int(room / each)))
    phases = [_sampling(work, machine, gpus, rows, copies), *_judging(work, machine, gpus)]
    if (read := _reading(work, machine)) is not None:
        phases.append(read)
    phases.sort(key=lambda phase: -phase.seconds)
    train, _, heldout = split_sizes(work.prompts, work.config)
    drawn = sum(d.rows for d in drawings(work))
    # Training responses of all iterations stay with the memory bank; held-out ones beside those of the base model.
    alive = train * work.config.sampling.responses * work.config.iterations
    alive += 2 * heldout * work.config.evaluation.samples
    driver = alive * (_SAMPLE_BYTES[0] + _SAMPLE_BYTES[1] * work.length) + 36 * work.prompts * work.prompt_tokens
    vectors = work.config.iterations * 4 * shape.n_layers * shape.d_model * (2 + work.config.evaluation.controls)
    disk = drawn * (_ROW_BYTES[0] + _ROW_BYTES[1] * work.length) + vectors
    memory = {"weights": copies * weights / gpus, "keys and values": rows * each / gpus, "driver": driver}
    dollars = None
    if machine.dollars_per_hour is not None:
        hours = sum(p.seconds for p in phases) / 3600  # machines wait while a judge far away is asked
        dollars = gpus * hours * machine.dollars_per_hour
    if work.judge == "endpoint":
        judged = next(p for p in phases if p.name == "rank")
        price = work.judge_price
        asked = None if price is None else (judged.prefill * price[0] + judged.decode * price[1]) / 1e6
        dollars = None if dollars is None or asked is None else dollars + asked
    found = Forecast(work, machine, gpus, tuple(phases), memory, disk, dollars, ())
    return replace(found, bottlenecks=_bottlenecks(found, rows, copies))


def step_seconds(shape: Shape, machine: Machine, rows: int | float, context: int | float, *, gpus: int = 1) -> float:
    """How long a decoding step of some rows takes, each looking back at ``context`` positions."""
    flops, moved = gpus * machine.flops * machine.flops_share, gpus * machine.bandwidth * machine.bandwidth_share
    work, width = shape.arithmetic, machine.width
    products = max(work.blocks * rows / flops, shape.block_parameters * width / moved)
    unembedding = max(work.unembed * rows / flops, shape.d_model * shape.d_vocab * width / moved)
    attention = max(work.attention * rows * context / flops, rows * context * shape.kept(width) / moved)
    streamed = shape.n_layers * (_STREAMED * shape.d_model + _STREAMED_MLP * shape.d_mlp) * width
    drawn = rows * shape.d_vocab * machine.choosing / gpus
    return products + unembedding + attention + rows * streamed / moved + drawn + shape.n_layers * machine.overhead


def drawing_seconds(
    shape: Shape, machine: Machine, drawing: Drawing, rows: int | float, *, gpus: int = 1, copies: int = 1
) -> float:
    """How long some responses take to draw, ``rows`` of them side by side on ``copies`` of the model."""
    count, side_by_side = drawing.count(), max(1.0, min(rows, drawing.rows))
    passes = drawing.rows * drawing.steps / side_by_side
    context = drawing.prompt_tokens + drawing.steps / 2
    step = step_seconds(shape, machine, side_by_side / copies, context, gpus=max(1, gpus // copies))
    beside = count.beside / max(1.0, drawing.rows * drawing.steps)
    return (1 + beside) * passes * step + passes_seconds(shape, machine, count.prefill, gpus=gpus)


def passes_seconds(shape: Shape, machine: Machine, tokens: int | float, *, gpus: int = 1) -> float:
    """How long it takes to read tokens, many at a time."""
    flops, moved = gpus * machine.flops * machine.flops_share, gpus * machine.bandwidth * machine.bandwidth_share
    streamed = shape.n_layers * (_STREAMED * shape.d_model + _STREAMED_MLP * shape.d_mlp) * machine.width
    return tokens * (shape.arithmetic.blocks / flops + streamed / moved)


def _sampling(work: Workload, machine: Machine, gpus: int, rows: int, copies: int) -> Phase:
    whole, seconds = TokenCount(), 0.0
    for drawing in drawings(work):
        whole.take(drawing.count())
        seconds += drawing_seconds(work.shape, machine, drawing, rows, gpus=gpus, copies=copies)
    return Phase("sample", seconds, whole.prefill, whole.decode, work.shape.arithmetic.flops(whole))


def _lists(work: Workload) -> list[tuple[int | float, int]]:
    """How many lists are ranked, and of how many responses each: compared responses are ranked beside the base's."""
    config, compared = work.config, work.judge in ("self", "endpoint")
    train, validation, heldout = split_sizes(work.prompts, config)
    samples = config.evaluation.samples
    beside = 2 * samples if compared else samples
    tries = len(config.steering.candidates) if validation and len(config.steering.candidates) > 1 else 0
    return [
        (heldout + (validation if tries else 0), samples),
        (config.iterations * train, config.sampling.responses),
        (tries * validation + heldout * (work.tries * config.iterations + config.evaluation.controls), beside),
    ]


def _judging(work: Workload, machine: Machine, gpus: int) -> list[Phase]:
    """What the ranker takes; its audit, of a few prompts, is left out."""
    if work.judge == "function":
        return []
    if work.judge == "reward-model":
        tokens = sum(lists * n for lists, n in _lists(work)) * (work.prompt_tokens + work.length)
        seconds = passes_seconds(work.shape, machine, tokens, gpus=gpus)
        return [Phase("rank", seconds, tokens, 0.0, work.shape.arithmetic.blocks * tokens)]
    calls = sum(lists * n * (n - 1) for lists, n in _lists(work))
    tokens = calls * (_JUDGE_TEMPLATE + work.prompt_tokens + 2 * work.length)
    if work.judge == "self":
        seconds = passes_seconds(work.shape, machine, tokens, gpus=gpus)
        return [Phase("rank", seconds, tokens, 0.0, work.shape.arithmetic.blocks * tokens)]
    return [Phase("rank", calls / work.judge_per_second, tokens, 2 * calls, calls=calls)]


def _reading(work: Workload, machine: Machine) -> Phase | None:
    """Pairs whose stream was not read while they were drawn, and side effects that were not measured then."""
    config = work.config
    train, validation, heldout = split_sizes(work.prompts, config)
    whole, tokens = work.prompt_tokens + work.length, 0.0
    for turn in range(config.iterations):
        pairs = train if config.contrast.size is None else min(train, config.contrast.size)
        tokens += 0 if work.sampler == "local" and _reads(work, turn) else 2 * pairs * whole
    if work.sampler == "vllm":
        measured = min(config.evaluation.measured, config.evaluation.samples)
        tries = len(config.steering.candidates) if validation and len(config.steering.candidates) > 1 else 0
        plans = heldout * (work.tries * config.iterations + config.evaluation.controls) + tries * validation
        tokens += measured * whole * (2 * plans + heldout + (validation if tries else 0))
    if not tokens:
        return None
    seconds = passes_seconds(work.shape, machine, tokens)  # TransformerLens, in one process
    return Phase("capture", seconds, tokens, 0.0, work.shape.arithmetic.blocks * tokens)


def _bottlenecks(found: Forecast, rows: int, copies: int) -> tuple[str, ...]:
    """What will hurt first."""
    work, machine = found.workload, found.machine
    said = []
    first = found.phases[0]
    names = {"sample": "drawing responses", "rank": "the judge", "capture": "reading with TransformerLens"}
    said.append(f"{names[first.name]} takes {first.seconds / found.seconds:.0%} of the time")
    if work.judge == "endpoint":
        calls = next(p.calls for p in found.phases if p.name == "rank")
        said.append(
            f"{_number(calls)} judge calls, because pairs grow with the square of K: at {work.judge_per_second:g} a "
            f"second they take {_duration(calls / work.judge_per_second)}"
        )
    weights = work.shape.parameters * machine.width
    if any(p.name == "capture" for p in found.phases) and weights > 0.9 * machine.memory:
        said.append(
            f"TransformerLens reads with the whole model, {_bytes(weights)} of weights: more than one {machine.name} "
            "holds, so that it must be spread over several"
        )
    if rows < machine.rows * copies:
        said.append(f"keys and values leave room for {rows} rows where {machine.rows * copies} would run side by side")
    if found.memory["driver"] > 8e9:
        said.append(
            f"the driving process holds {_bytes(found.memory['driver'])} of samples: those of all iterations stay there"
        )
    if found.disk > 50e9:
        said.append(f"the run directory takes {_bytes(found.disk)}; a step's samples are written in one file")
    if work.sampler == "local" and found.gpus > 1:
        said.append("the local sampler uses one device; this forecast spreads its work evenly, as sharding would")
    return tuple(said)


def _number(value: int | float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _bytes(value: int | float) -> str:
    for size, unit in ((1e12, "TB"), (1e8, "GB")):
        if value >= size:
            return f"{value / (size if unit == 'TB' else 1e9):.1f} {unit}"
    return f"{value / 1e6:.1f} MB"


def _duration(seconds: int | float) -> str:
    """Seconds as they are said.

    >>> _duration(90), _duration(5e5)
    ('1.5 min', '5.8 days')
    """
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


__all__ = [
    "JUDGES",
    "MACHINES",
    "SHAPES",
    "Drawing",
    "Forecast",
    "Machine",
    "Phase",
    "Shape",
    "Workload",
    "drawing_seconds",
    "drawings",
    "forecast",
    "passes_seconds",
    "split_sizes",
    "step_seconds",
]
