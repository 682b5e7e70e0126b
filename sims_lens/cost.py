"""What something took: seconds, tokens, floating-point operations, memory.

A multiply and an add count as two operations. Only matrix products are counted, those of the weights and those of
attention: of a transformer's forward pass they are all but a percent or two (``tests/test_cost.py`` holds the count
against PyTorch's own). Peak memory is that of the whole process since it began, weights and libraries included.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sims_lens.typed import known_fields, read_as


@dataclass
class TokenCount:
    """Tokens that an engine has processed.

    Args:
        prefill: of prompts.
        decode: of responses.
        attended: positions that those tokens looked back at, themselves included.
        logits: distributions over the vocabulary that were computed; 0 where an engine doesn't count them.
        beside: what was run again without the plan, beside the pass with it, in tokens through all blocks.
    """

    prefill: int = 0
    decode: int = 0
    attended: int | float = 0
    logits: int = 0
    beside: int | float = 0

    def take(self, other: "TokenCount") -> None:
        """Add another one's to these; it begins anew."""
        for f in fields(TokenCount):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
            setattr(other, f.name, 0)

    @staticmethod
    def forced(lengths: Iterable[int], *, logits: int = 0) -> "TokenCount":
        """Of forward passes over whole sequences of these lengths, each token looking back at all before it."""
        every = list(lengths)
        return TokenCount(prefill=sum(every), attended=sum(n * (n + 1) // 2 for n in every), logits=logits)


def forced_count(prompts: Sequence[Sequence[int]], responses: Sequence[tuple[int, Sequence[int]]]) -> TokenCount:
    """Of a teacher-forced pass over responses to prompts that are run once each, with a distribution before each token.

    Args:
        prompts: token ids.
        responses: index of the prompt, and response token ids.
    """
    count = TokenCount.forced([len(prompt) for prompt in prompts])
    for index, tokens in responses:
        own = max(0, len(tokens) - 1)  # nothing is asked after the last token
        rest = TokenCount.forced([own], logits=len(tokens))
        rest.attended += own * len(prompts[index])
        count.take(rest)
    return count


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of a model's forward pass.

    Args:
        blocks: of the weights of all blocks, per token.
        attention: of scores and mixing at all blocks, per token and position that it looks at.
        unembed: per distribution over the vocabulary.
    """

    blocks: float
    attention: float
    unembed: float

    def flops(self, count: TokenCount) -> float:
        """What tokens took. Where an engine has not counted distributions, there was one per response token."""
        tokens = count.prefill + count.decode + count.beside
        logits = count.logits or count.decode
        return self.blocks * tokens + self.attention * count.attended + self.unembed * logits


@dataclass(frozen=True)
class Cost:
    """What something took.

    Args:
        calls: lists of responses that were ranked, and matrices, where a ranker was asked.
        seconds: of wall-clock time.
        prefill, decode: tokens that were read and written, where they are counted; 0 otherwise.
        flops: floating-point operations of the model; none of a judge that is another model.
        peak: bytes of memory that the process had taken at most by the end.
    """

    calls: int = 0
    seconds: float = 0.0
    prefill: int = 0
    decode: int = 0
    flops: float = 0.0
    peak: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)}
        return Cost(**values | {"peak": max(self.peak, other.peak)})

    def __str__(self) -> str:
        parts = [f"{self.calls} calls"] if self.calls else []
        parts.append(f"{self.seconds:.0f} s" if self.seconds >= 10 else f"{self.seconds:.1f} s")
        tokens = self.prefill + self.decode
        if tokens:
            each = f" ({tokens / self.calls:.0f} a call)" if self.calls else ""
            parts.append(f"{self.prefill:,} prefill and {self.decode:,} decode tokens{each}")
        if self.flops:
            parts.append(flops_text(self.flops))
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """What is not 0."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Cost":
        """The inverse of :meth:`to_json`; what an earlier version did not write is 0.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, known_fields(cls, data))  # type: ignore[no-any-return]


JUDGING = ("audit", "rank", "evaluator")
"""Phases in which the tokens are a judge's."""


def total(cost: Mapping[str, Cost]) -> Cost:
    """All phases together."""
    return sum(cost.values(), Cost())


def judge_tokens(cost: Mapping[str, Cost]) -> int:
    """Tokens that judges have read and written."""
    return sum(cost[phase].prefill + cost[phase].decode for phase in JUDGING if phase in cost)


def cost_text(cost: Mapping[str, Cost]) -> str:
    """What a run took, in one line: in all, then by phase.

    >>> cost_text({"sample": Cost(seconds=12.0, prefill=100, decode=2000, flops=5e11)})
    'Cost: 12 s; 100 prefill, 2,000 decode and 0 judge tokens; 0.50 TFLOP. By phase: sample 12 s.'
    """
    if not cost:
        return "Cost: nothing yet"
    whole = total(cost)
    own = total({phase: spent for phase, spent in cost.items() if phase not in JUDGING})
    parts = [
        f"Cost: {whole.seconds:.0f} s",
        f"{own.prefill:,} prefill, {own.decode:,} decode and {judge_tokens(cost):,} judge tokens",
        *([flops_text(whole.flops)] if whole.flops else []),
        *([f"at most {whole.peak / 1e9:.1f} GB of memory"] if whole.peak else []),
    ]
    return f"{'; '.join(parts)}. By phase: {', '.join(f'{phase} {c.seconds:.0f} s' for phase, c in cost.items())}."


def flops_text(flops: float) -> str:
    """Floating-point operations as they are printed.

    >>> flops_text(2.7e13)
    '27.0 TFLOP'
    """
    return f"{flops / 1e15:.2f} PFLOP" if flops >= 1e15 else f"{flops / 1e12:.{1 if flops >= 1e13 else 2}f} TFLOP"


_KEEP_SECONDS = 5.0  # a crash loses the account of at most so many


class Meter:
    """What happens in its ``with`` block.

    Args:
        count: what counts tokens there: a :class:`TokenCount`, or a mapping as a ranker's ``count``.
        arithmetic: of the model; it counts where ``count`` is a :class:`TokenCount`, as of this model's tokens.
        keep: is given what was spent since the last time, at the end and at some calls of :meth:`tick`.
    """

    def __init__(
        self,
        count: object = None,
        arithmetic: Arithmetic | None = None,
        keep: Callable[[Cost], None] | None = None,
    ) -> None:
        self._count, self._arithmetic, self._keep = count, arithmetic, keep
        self._more = TokenCount()
        self.cost = Cost()
        """Of the block, once it has ended."""

    def add(self, count: TokenCount) -> None:
        """Tokens that nobody else has counted."""
        self._more.take(count)

    def tick(self) -> None:
        """Some of it is done: every few seconds, what it took is kept, for a crash may follow."""
        if self._keep is not None and time.perf_counter() - self._start > _KEEP_SECONDS:
            self._lap()

    def __enter__(self) -> "Meter":
        self._start, self._before = time.perf_counter(), counted(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._lap()

    def _lap(self) -> None:
        now, spent = counted(self._count), TokenCount()
        own = self._count is None or isinstance(self._count, TokenCount)
        for f in fields(TokenCount):
            setattr(spent, f.name, getattr(now, f.name) - getattr(self._before, f.name) + getattr(self._more, f.name))
        self._more = TokenCount()
        cost = Cost(
            seconds=time.perf_counter() - self._start,
            prefill=spent.prefill,
            decode=spent.decode,
            flops=float(self._arithmetic.flops(spent)) if own and self._arithmetic else 0.0,
            peak=peak_memory(),
        )
        self._start, self._before = self._start + cost.seconds, now
        self.cost += cost
        if self._keep is not None:
            self._keep(cost)


def counted(count: object) -> TokenCount:
    """A copy of what has been counted so far.

    Args:
        count: a :class:`TokenCount`; a mapping with ``prefill`` or ``tokens``, and ``decode``, or with such mappings
            inside, as an ensemble's; anything else has counted nothing.
    """
    if not isinstance(count, Mapping):
        prefill, decode = (int(_number(getattr(count, name, 0))) for name in ("prefill", "decode"))
        attended, logits, beside = (_number(getattr(count, name, 0)) for name in ("attended", "logits", "beside"))
        return TokenCount(prefill, decode, attended, int(logits), beside)
    found = TokenCount(
        prefill=int(_number(count.get("prefill", 0)) + _number(count.get("tokens", 0))),
        decode=int(_number(count.get("decode", 0))),
    )
    for entry in count.values():
        if not isinstance(entry, int | float):
            found.take(counted(entry))
    return found


def _number(value: object) -> int | float:
    return value if isinstance(value, int | float) else 0


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the machine or of a device.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 GB."))
    True
    """
    import torch

    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def peak_memory() -> int:
    """Bytes that this process has taken at most so far, in main memory and on a CUDA device; 0 where it isn't told."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        most += torch.cuda.max_memory_allocated()
    return int(most)


__all__ = [
    "JUDGING",
    "Arithmetic",
    "Cost",
    "Meter",
    "TokenCount",
    "cost_text",
    "counted",
    "flops_text",
    "forced_count",
    "judge_tokens",
    "out_of_memory",
    "peak_memory",
    "total",
]
