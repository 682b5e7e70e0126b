"""What an actor does: it holds a model or a ranker, and answers questions about it. Nothing here knows Ray.

A question is frozen and small: texts, and a plan as the bytes of its safetensors file. It says all that its answer
depends on, so that any actor can be asked it, and asked again when the first one is lost. What is drawn travels back as
a shard: lines with checksums, under a key made of the content of the question, that are whole or not there. The same
bytes are what :func:`sims_lens.stream` keeps on a disk.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import capture_moments
from sims_lens.adapter import adapt
from sims_lens.bank import plan_digest
from sims_lens.checks import check_integer, check_number, one_line, shown
from sims_lens.config import SamplingConfig
from sims_lens.cost import TokenCount
from sims_lens.data import Sample
from sims_lens.errors import ConfigError, DamagedError, SamplerError
from sims_lens.files import line, parsed
from sims_lens.hooks import steering
from sims_lens.models import load
from sims_lens.moments import PairMoments
from sims_lens.plan import SteeringPlan
from sims_lens.prompts import Chat
from sims_lens.rankers import as_ranker, bound_ranker
from sims_lens.sampling import LocalSampler, Reading
from sims_lens.scope import RESPONSE, TokenScope
from sims_lens.store import sample_from
from sims_lens.token_rows import Row

SHARD = "sims_lens.shard"
SHARD_VERSION = 1

_REMEDY = "delete it, and start the same again"

_BESIDE = frozenset(["responses", "allocation", "batch_rows"])
"""Of a sampling config, what a sample does not depend on."""


def drawn_by(sampling: SamplingConfig) -> dict[str, Any]:
    """Of a sampling config, what a sample depends on."""
    return {name: value for name, value in asdict(sampling).items() if name not in _BESIDE}


@dataclass(frozen=True)
class ModelSpec:
    """How an actor loads its model, and draws.

    Args:
        model: what :func:`sims_lens.load` takes: a name, or a folder that every actor's machine has.
        sampling: how responses are drawn.
        kind: see :func:`sims_lens.load`.
        revision: see there.
        device: see there.
        dtype: of the weights, by name; see there.
        threads: of torch in the actor's process; None leaves them alone.
    """

    model: str
    sampling: SamplingConfig
    kind: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What a sample depends on."""
        named = {name: getattr(self, name) for name in ("model", "kind", "revision", "device", "dtype")}
        return {**named, "sampling": drawn_by(self.sampling)}


@dataclass(frozen=True)
class Actors:
    """How many actors there are, and what each of them takes.

    Args:
        number: of actors.
        cpus: cores that a cluster sets aside for each.
        gpus: GPUs, or a share of one.
        tries: how often a batch is begun: one that brings down its actor each time, for want of memory perhaps, must
            not do so for ever.

    >>> Actors(number=0)
    Traceback (most recent call last):
    sims_lens.errors.ConfigError: number must be an integer of at least 1, got 0
    """

    number: int = 2
    cpus: int | float = 1
    gpus: int | float = 0
    tries: int = 4

    def __post_init__(self) -> None:
        check_integer("number", self.number)
        check_number("cpus", self.cpus, 0.0)
        check_number("gpus", self.gpus, 0.0)
        check_integer("tries", self.tries)


@dataclass(frozen=True)
class About:
    """What is the model?"""


@dataclass(frozen=True)
class Reads:
    """Can it be measured under a plan while responses are drawn? See :meth:`LocalSampler.reads`."""

    plan: bytes
    site: str


@dataclass(frozen=True)
class Batch:
    """Draw some responses.

    Args:
        prompts: that are answered here.
        rows: the responses: the prompt, counted among these, and the draw.
        plan: what steers, as a safetensors file.
        seed: of the draws.
        site: whose stream is read meanwhile; None for none.
        measured: of each prompt's draws, how many have their side effects measured meanwhile; None for none.
        places: of the prompts among those that were asked for. The key does not depend on them.
    """

    prompts: tuple[str, ...]
    rows: tuple[tuple[int, int], ...]
    plan: bytes
    seed: int
    site: str | None = None
    measured: int | None = None
    places: tuple[int, ...] = ()

    def key(self, spec: ModelSpec) -> str:
        """Of the answer: 64 hex digits that change when anything does that the answer depends on."""
        texts = [prompt.turns if isinstance(prompt, Chat) else prompt for prompt in self.prompts]
        plan = plan_digest(SteeringPlan.from_bytes(self.plan))
        content = [SHARD_VERSION, spec.to_json(), texts, self.rows, plan, self.seed, self.site, self.measured]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Pairs:
    """Read the stream over contrast pairs, and give its moments.

    Args:
        positive: prompt and response token ids of each pair's positive text.
        negative: those of its negative text.
        plan: what steers meanwhile.
        sites: see :func:`sims_lens.capture_moments`, as for the others.
        layers: see there.
        scope: see there.
        weights: the columns of these pairs.
    """

    positive: tuple[Row, ...]
    negative: tuple[Row, ...]
    plan: bytes
    sites: tuple[str, ...]
    layers: tuple[int, ...] | None
    scope: TokenScope | str
    weights: Float[Tensor, "group pair"]


@dataclass(frozen=True)
class Judge:
    """Score the responses to some prompts."""

    items: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, eq=False)
class Answer:
    """What an actor says.

    Args:
        value: the answer.
        count: tokens that it took.
    """

    value: Any
    count: TokenCount


@runtime_checkable
class Actor(Protocol):
    """Holds something, and answers questions about it, each as if it were the first."""

    def answer(self, question: Any) -> Answer:
        """The answer."""
        ...


@runtime_checkable
class Pool(Protocol):
    """Actors that share questions."""

    lost: int

    def ask(self, questions: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Yield each question's number and answer once, in any order. Questions are taken as they are needed."""
        ...

    def close(self) -> None:
        """End the actors. Asking starts others."""
        ...


class ModelActor:
    """Holds a model: draws from it, and reads its stream.

    Args:
        spec: which model, and how responses are drawn.
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        dtype = None if spec.dtype is None else getattr(torch, spec.dtype)
        model = load(spec.model, kind=spec.kind, revision=spec.revision, device=spec.device, dtype=dtype)
        self._spec, self._sampler = spec, LocalSampler(model, spec.sampling, solo=False)
        self._plan, self._digest = SteeringPlan(()), b""

    def answer(self, question: About | Reads | Batch | Pairs) -> Answer:
        """See :class:`Actor`."""
        if isinstance(question, About):
            return Answer(adapt(self._sampler.model).provenance, TokenCount())
        plan = self._plan_of(question.plan)
        if isinstance(question, Reads):
            return Answer(self._sampler.reads(plan, question.site), TokenCount())
        value = self._drawn(question, plan) if isinstance(question, Batch) else self._moments(question, plan)
        count = TokenCount()
        count.take(self._sampler.count)
        return Answer(value, count)

    def _plan_of(self, data: bytes) -> SteeringPlan:
        """The plan, read once and not for each batch."""
        digest = hashlib.sha256(data).digest()
        if digest != self._digest:
            self._plan, self._digest = SteeringPlan.from_bytes(data), digest
        return self._plan

    def _drawn(self, batch: Batch, plan: SteeringPlan) -> bytes:
        n = 1 + max(draw for _, draw in batch.rows)
        wanted = frozenset(batch.rows)
        skip = {(i, k) for i in range(len(batch.prompts)) for k in range(n)} - wanted
        sampler = self._sampler
        common: dict[str, Any] = {"n": n, "plan": plan, "seed": batch.seed, "skip": skip}
        found: Iterable[tuple[Sample, Reading | None]]
        if batch.site is not None:
            found = sampler.sample_and_read(batch.prompts, **common, site=batch.site)
        elif batch.measured is not None:
            measured = sampler.sample_and_measure(batch.prompts, **common, measured=batch.measured)
            found = ((sample, None) for sample in measured)
        else:
            found = ((sample, None) for sample in sampler.sample(batch.prompts, **common))
        return shard(batch.key(self._spec), found)

    def _moments(self, question: Pairs, plan: SteeringPlan) -> dict[str, PairMoments]:
        model = self._sampler.model
        with steering(model, plan) if plan.interventions else nullcontext():
            found = capture_moments(
                model,
                question.positive,
                question.negative,
                sites=question.sites,
                layers=question.layers,
                scope=question.scope,
                weights=question.weights,
            )
        return {site: read.moments for site, read in found.items()}


class RankerActor:
    """Holds a ranker.

    Args:
        ranker: of any shape that :func:`~sims_lens.rankers.as_ranker` takes.
        judge: the model of a ranker that judges with one: what :func:`sims_lens.load` takes; None for none.
        threads: of torch in the actor's process; None leaves them alone.
    """

    def __init__(self, ranker: object, judge: str | None = None, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._ranker = as_ranker(ranker) if judge is None else bound_ranker(ranker, load(judge))

    def answer(self, question: Judge) -> Answer:
        """See :class:`Actor`."""
        spent = getattr(self._ranker, "count", None)
        before = _tokens(spent)
        scores = self._ranker.rank_all(question.items)
        after = _tokens(spent)
        return Answer(scores, TokenCount(**{name: after[name] - before[name] for name in after}))


def _tokens(count: object) -> dict[str, Any]:
    """What has been counted so far; a ranker's counter has the fields that its engine can tell."""
    return {name: getattr(count, name, 0) for name in asdict(TokenCount())}


class InProcess:
    """A pool of one actor in this process: what the others are held against.

    Args:
        make: makes the actor.
        actors: not used here.
    """

    def __init__(self, make: Callable[[], Actor], actors: Actors | None = None) -> None:  # noqa: ARG002 - a pool's shape
        self._make = make
        self._actor: Actor | None = None
        self.lost = 0

    def ask(self, questions: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """See :class:`Pool`."""
        for number, question in enumerate(questions):
            if self._actor is None:
                self._actor = self._make()
            yield number, self._actor.answer(question)

    def close(self) -> None:
        """See :class:`Pool`."""
        self._actor = None


# Batches and shards


def batches(
    prompts: Sequence[str], n: int, template: Batch, *, rows: int, skip: Collection[tuple[int, int]] = ()
) -> Iterator[Batch]:
    """Cut what is to be drawn into batches: those of short prompts first, so that few tokens are padding.

    Args:
        prompts: texts.
        n: responses to each.
        template: a batch with whatever else is the same for all.
        rows: responses in a batch, at most.
        skip: prompt and draw of responses that are there already.

    >>> template = Batch((), (), b"", 0)
    >>> [batch.rows for batch in batches(["bb", "a"], 2, template, rows=3)]
    [((0, 0), (0, 1), (1, 0)), ((0, 1),)]
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    wanted = [(index, draw) for index in order for draw in range(n) if (index, draw) not in skip]
    for start in range(0, len(wanted), rows):
        some = wanted[start : start + rows]
        places = tuple(dict.fromkeys(index for index, _ in some))
        local = {index: at for at, index in enumerate(places)}
        yield replace(
            template,
            prompts=tuple(prompts[index] for index in places),
            rows=tuple((local[index], draw) for index, draw in some),
            places=places,
        )


def shard(key: str, found: Iterable[tuple[Sample, Reading | None]], about: Mapping[str, Any] | None = None) -> bytes:
    """Samples as bytes: a line that says what they are, and one for each, all with checksums.

    Args:
        key: made of what they depend on.
        found: the samples, with what was read meanwhile.
        about: more to be said in the first line.
    """
    rows = [{**asdict(sample), "reading": read.to_json() if read else None} for sample, read in found]
    head = {**(about or {}), "format": SHARD, "version": SHARD_VERSION, "key": key, "rows": len(rows)}
    return b"".join(line(row) for row in [head, *rows])


def read_shard(data: bytes, where: str, *, key: str) -> list[tuple[Sample, Reading | None]]:
    """What :func:`shard` made bytes of.

    Args:
        data: the bytes.
        where: they came from, for the message of an error.
        key: that they must have.

    Raises:
        DamagedError: they are not whole, or another key's.

    >>> sample = Sample(prompt=0, draw=1, tokens=(5,), text="a", ended=True)
    >>> [found for found, _ in read_shard(shard("k", [(sample, None)]), "here", key="k")] == [sample]
    True
    """
    head = shard_head(data, where)
    try:
        if (head["rows"], head["key"]) != (data.count(b"\n") - 1, key):
            raise ValueError(f"{shown(head['rows'])} rows of {shown(head['key'])} were to be there")
        rows = [parsed(each) for each in data.splitlines(keepends=True)[1:]]
        readings = [Reading.from_json(row["reading"]) if row.get("reading") else None for row in rows]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{where} is no whole shard ({one_line(error)}); {_REMEDY}") from error
    return [(sample_from(row, Path(where)), reading) for row, reading in zip(rows, readings, strict=True)]


def shard_head(data: bytes, where: str) -> Mapping[str, Any]:
    """The first line of a shard.

    Raises:
        DamagedError: there is none.
    """
    try:
        head = parsed(data[: data.index(b"\n") + 1])
        if not isinstance(head, dict) or (head.get("format"), head.get("version")) != (SHARD, SHARD_VERSION):
            raise ValueError(f"it begins with {shown(head)}")
    except ValueError as error:
        raise DamagedError(f"{where} is no whole shard ({one_line(error)}); {_REMEDY}") from error
    return head


def answered(batch: Batch, spec: ModelSpec, data: bytes) -> list[tuple[Sample, Reading | None]]:
    """The samples of a batch, with their prompts' places: each that was asked for, once.

    Raises:
        SamplerError: there are others.
        DamagedError: the shard is not whole, or another batch's.
    """
    found = read_shard(data, "an actor's answer", key=batch.key(spec))
    check_rows(batch.rows, [sample for sample, _ in found])
    return [(replace(sample, prompt=batch.places[sample.prompt]), reading) for sample, reading in found]


def check_rows(wanted: Collection[tuple[int, int]], samples: Sequence[Sample]) -> None:
    """Raise unless the samples are those that were wanted, each once.

    Raises:
        SamplerError: one is missing, there twice, or another.

    >>> check_rows([(0, 0), (0, 1)], [Sample(0, 0, (), "", True)])
    Traceback (most recent call last):
    sims_lens.errors.SamplerError: 2 samples were asked for and 1 came: 1 missing, 0 not asked for or twice
    """
    found = [(sample.prompt, sample.draw) for sample in samples]
    missing = len(set(wanted) - set(found))
    other = len(found) - len(set(found) & set(wanted))
    if missing or other:
        raise SamplerError(
            f"{len(wanted)} samples were asked for and {len(found)} came: {missing} missing, {other} not asked for or "
            "twice"
        )


# Moments


def pair_questions(
    positive: Sequence[Row],
    negative: Sequence[Row],
    *,
    size: int,
    plan: bytes,
    sites: Sequence[str] = ("resid_post",),
    layers: Sequence[int] | None = None,
    scope: TokenScope | str = RESPONSE,
    weights: Float[Tensor, "group pair"] | None = None,
) -> Iterator[Pairs]:
    """Cut contrast pairs into questions of ``size`` pairs; the other arguments are those of :class:`Pairs`."""
    if len(positive) != len(negative):
        raise ConfigError(f"{len(positive)} positive and {len(negative)} negative texts; give one of each per pair")
    columns = torch.zeros(0, len(positive)) if weights is None else weights
    if columns.ndim != 2 or columns.shape[1] != len(positive):
        raise ConfigError(
            f"weights must be a tensor [group, pair] with a column for each of {len(positive)} pairs, got "
            f"{list(columns.shape)}"
        )
    for start in range(0, len(positive), size):
        some = slice(start, start + size)
        yield Pairs(
            tuple(positive[some]),
            tuple(negative[some]),
            plan,
            tuple(sites),
            None if layers is None else tuple(layers),
            scope,
            columns[:, some].clone(),
        )


def merged(answers: Iterable[tuple[int, Mapping[str, PairMoments]]]) -> dict[str, PairMoments]:
    """Moments of all pairs from those of the parts, merged in the order of their numbers, however they arrive: so that
    the last bits do not depend on which actor was faster."""
    total: dict[str, PairMoments] = {}
    waiting: dict[int, Mapping[str, PairMoments]] = {}
    following = 0
    for number, part in answers:
        waiting[number] = part
        while following in waiting:
            for site, moments in waiting.pop(following).items():
                total[site] = total[site].merge(moments) if site in total else moments
            following += 1
    return total


__all__ = [
    "About",
    "Actor",
    "Actors",
    "Answer",
    "Batch",
    "InProcess",
    "Judge",
    "ModelActor",
    "ModelSpec",
    "Pairs",
    "Pool",
    "RankerActor",
    "Reads",
    "answered",
    "batches",
    "check_rows",
    "drawn_by",
    "merged",
    "pair_questions",
    "read_shard",
    "shard",
    "shard_head",
]
