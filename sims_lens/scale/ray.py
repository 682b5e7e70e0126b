"""Sampling, judging and capture over a Ray cluster: ``pip install 'sims-lens[ray]'``.

Each actor loads its model by name or path; plans travel as safetensors bytes, and what is drawn comes back in batches,
each a shard with checksums under a key made of its content (:mod:`sims_lens.scale.actors`). A sample depends on its
prompt, draw, plan and seed, and not on what is drawn beside it: it is bit for bit the local sampler's, whichever actor
draws it and however often. What an actor or a node had not given back when it was lost is asked of another one;
whatever arrives is counted and compared with what was asked for.

There are two ways to spread, and ``pool=`` takes either:

- :class:`KeptActors`: actors that live as long as the sampler. A loop draws a dozen times, and a model that takes a
  minute to load should be loaded once.
- :class:`DataActors`: Ray Data's ``map_batches`` over an actor pool, made anew each time that something is asked: for
  one long pass, where the pipeline should be one that Ray's own tools show.

Reference: Ray 2.60, ``ray.data.Dataset.map_batches`` and the fault tolerance of actors.
"""

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sims_lens.auditing import is_judge
from sims_lens.checks import check_choice, check_integer, check_kind, check_list, check_seed, one_line
from sims_lens.config import SamplingConfig, SIMSConfig
from sims_lens.cost import TokenCount
from sims_lens.data import Sample
from sims_lens.errors import ConfigError, ModelError, PromptError, RankerError, SamplerError, SimsError
from sims_lens.hooks import check_plan
from sims_lens.moments import PairMoments
from sims_lens.plan import NOTHING, Provenance, SteeringPlan
from sims_lens.rankers import as_ranker
from sims_lens.rankers.base import Item
from sims_lens.rankers.fingerprint import settings_of
from sims_lens.sampling import Drawn, Reading
from sims_lens.scale.actors import (
    About,
    Actor,
    Actors,
    Answer,
    Batch,
    Judge,
    ModelActor,
    ModelSpec,
    Pool,
    RankerActor,
    Reads,
    answered,
    batches,
    merged,
    pair_questions,
)
from sims_lens.scope import RESPONSE, TokenScope
from sims_lens.token_rows import Row

logger = logging.getLogger("sims_lens")

_AHEAD = 2
"""Questions that an actor has at once: one that it works on, and one for when it is done."""

_PATIENCE = 60.0
"""Seconds without news after which the log says what is waited for."""

_WINDOW = 4096
"""Questions in one pipeline of Ray Data: the driver holds so many."""

_ROWS = 128
"""Responses in a batch."""

_PAIRS = 32
"""Contrast pairs in a question."""

_ITEMS = 4
"""Prompts that a ranker is asked about at once."""

_DTYPES = ("float32", "bfloat16", "float16")


@runtime_checkable
class MakePool(Protocol):
    """Makes a pool of actors: :class:`KeptActors`, :class:`DataActors`."""

    def __call__(self, make: Callable[[], Actor], actors: Actors) -> Pool:
        """A pool that makes its actors with ``make``."""
        ...


def _started() -> Any:
    """Ray, connected: to the cluster that was connected to before, or that ``RAY_ADDRESS`` names, or to one that is
    started on this machine and ends with this process.

    Raises:
        SamplerError: Ray isn't installed, or doesn't start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is run here is nobody else's business
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do anyway, and warns of
    try:
        import ray
    except ImportError as error:
        raise SamplerError(f"Ray isn't installed here ({one_line(error)}); pip install 'sims-lens[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # Ray raises bare exceptions here
            raise SamplerError(
                f"Ray didn't start ({one_line(error)}); on a busy machine its agents may miss its own limit of 15 s: "
                "try again, or start it yourself with ray.init() first"
            ) from error
    return ray


class _Host:
    """What Ray holds: the actor is made in a call of its own, so that its error is one that can be read."""

    def __init__(self, make: Callable[[], Actor]) -> None:
        self._make = make
        self._actor: Actor | None = None

    def start(self) -> int:
        self._actor = self._make()
        return os.getpid()

    def answer(self, question: Any) -> Answer:
        assert self._actor is not None
        return self._actor.answer(question)


class KeptActors:
    """A pool of Ray actors that are kept until :meth:`close`. One that is lost is replaced.

    Args:
        make: makes an actor, in its process.
        actors: how many, and what each takes.

    Attributes:
        lost: actors that were lost so far.
        pids: processes of those that are up now, on their machines.
    """

    def __init__(self, make: Callable[[], Actor], actors: Actors) -> None:
        self._make, self._actors = make, actors
        self._up: dict[Any, int] = {}
        self._starting: dict[Any, Any] = {}
        self._early = 0
        self.lost = 0

    @property
    def pids(self) -> list[int]:
        """See the class."""
        return sorted(self._up.values())

    def ask(self, questions: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """See :class:`~sims_lens.scale.actors.Pool`.

        Raises:
            SamplerError: a question brought down its actor as often as it was tried; or an actor can't start.
            SimsError: what an actor says is wrong with a question.
        """
        fresh = ((number, question, 1) for number, question in enumerate(questions))
        again: deque[tuple[int, Any, int]] = deque()
        running: dict[Any, tuple[Any, tuple[int, Any, int]]] = {}

        def following() -> tuple[int, Any, int] | None:
            return again.popleft() if again else next(fresh, None)

        if (task := following()) is None:
            return
        ray = _started()
        self._check(ray)
        self._fill(ray)
        while True:
            task = task or following()
            while task is not None and (free := self._free(running)) is not None:
                running[free.answer.remote(task[1])] = free, task
                task = following()
            if task is None and not running:
                return
            done, _ = ray.wait([*running, *self._starting], num_returns=1, timeout=_PATIENCE)
            if not done and not self._up:
                logger.warning(
                    "no actor has started yet; of the cluster's %s CPUs %s are free, and each is to have %s",
                    *(there.get("CPU", 0) for there in (ray.cluster_resources(), ray.available_resources())),
                    self._actors.cpus,
                )
            for ref in done:
                if ref in self._starting:
                    self._began(ray, ref)
                    continue
                actor, (number, question, tries) = running.pop(ref)
                try:
                    answer = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise _reason(error) from error
                except ray.exceptions.RayError as error:  # the actor, its node, or what it had answered is gone
                    self._gone(ray, actor)
                    if tries >= self._actors.tries:
                        raise SamplerError(
                            f"batch {number} lost its actor {tries} times ({one_line(error)}): make batches "
                            "smaller, or give each actor more memory"
                        ) from error
                    again.append((number, question, tries + 1))
                else:
                    yield number, answer

    def close(self) -> None:
        """See :class:`~sims_lens.scale.actors.Pool`."""
        held = [*self._up, *self._starting.values()]
        self._up, self._starting = {}, {}
        if held:
            import ray

            for actor in held:
                with suppress(Exception):  # Ray may have ended before
                    ray.kill(actor)

    def _check(self, ray: Any) -> None:
        """Raise where not even one actor finds room in the cluster: it would be waited for without end."""
        there = ray.cluster_resources()
        for name, wanted in (("CPU", self._actors.cpus), ("GPU", self._actors.gpus)):
            if wanted > there.get(name, 0):
                raise SamplerError(
                    f"each actor is to have {wanted:g} {name}, and the cluster has {there.get(name, 0):g} in all; ask "
                    "for less with actors=Actors(...), or on a cluster that grows start a first node"
                )

    def _fill(self, ray: Any) -> None:
        """Start as many actors as are missing."""
        for _ in range(self._actors.number - len(self._up) - len(self._starting)):
            # What is lost is asked again here, and not by Ray, so that no actor is waited for while others are free.
            remote = ray.remote(_Host).options(
                num_cpus=self._actors.cpus, num_gpus=self._actors.gpus, max_restarts=0, max_task_retries=0
            )
            actor = remote.remote(self._make)
            self._starting[actor.start.remote()] = actor

    def _began(self, ray: Any, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            self._up[actor] = ray.get(ref)
            self._early = 0
        except ray.exceptions.RayTaskError as error:
            self.close()
            raise _reason(error) from error
        except ray.exceptions.RayError as error:
            self.lost, self._early = self.lost + 1, self._early + 1
            if self._early >= self._actors.tries * self._actors.number:
                self.close()
                raise SamplerError(
                    f"{self._early} actors were lost while they started ({one_line(error)}); is there memory for "
                    "the model?"
                ) from error
            self._fill(ray)

    def _gone(self, ray: Any, actor: Any) -> None:
        if self._up.pop(actor, None) is not None:
            self.lost += 1
            with suppress(Exception):  # where only its answer was lost, it may be up still
                ray.kill(actor)
            self._fill(ray)

    def _free(self, running: dict[Any, tuple[Any, Any]]) -> Any:
        """The actor that has least to do, if it may have more."""
        load = dict.fromkeys(self._up, 0)
        for actor, _ in running.values():
            if actor in load:
                load[actor] += 1
        least = min(load, key=lambda actor: load[actor], default=None)
        return None if least is None or load[least] >= _AHEAD else least


class _Stage:
    """What Ray Data's actors hold. An error of ours is an answer: Ray Data would pack it into several of its own."""

    def __init__(self, make: Callable[[], Actor]) -> None:
        self._actor: Actor | None = None
        self._error: SimsError | None = None
        try:
            self._actor = make()
        except SimsError as error:
            self._error = error

    def __call__(self, batch: Any) -> Any:
        return batch.assign(question=None, answer=[self._answer(question) for question in batch["question"]])

    def _answer(self, question: Any) -> Answer | SimsError:
        if self._actor is None:
            assert self._error is not None
            return self._error
        try:
            return self._actor.answer(question)
        except SimsError as error:
            return error


class DataActors:
    """Ray Data's ``map_batches`` over a pool of actors, which are started for each call of :meth:`ask`.

    Ray restarts an actor that is lost, and asks it, or another one, again.

    Args:
        make: makes an actor, in its process.
        actors: how many, and what each takes.

    Attributes:
        lost: not known here: Ray does not tell.
    """

    def __init__(self, make: Callable[[], Actor], actors: Actors) -> None:
        self._make, self._actors = make, actors
        self.lost = 0

    def ask(self, questions: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """See :class:`~sims_lens.scale.actors.Pool`.

        Raises:
            SamplerError: a question brought down its actor as often as it was tried, or an actor can't start.
            SimsError: what an actor says is wrong with a question.
        """
        numbered = enumerate(questions)
        while window := list(itertools.islice(numbered, _WINDOW)):
            for row in self._rows(window):
                if isinstance(row["answer"], SimsError):
                    raise row["answer"]
                yield int(row["number"]), row["answer"]

    def _rows(self, window: Sequence[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
        from pandas import DataFrame

        ray = _started()
        from ray import data

        context = data.DataContext.get_current()
        context.enable_progress_bars = False  # the run has one of its own
        context.print_on_execution_start = False
        # As frames, which hold whatever objects there are; Ray's other blocks are Arrow's.
        frames = [DataFrame({"number": [number], "question": [question]}) for number, question in window]
        lasting = {"max_restarts": -1, "max_task_retries": self._actors.tries - 1}
        answers = data.from_pandas(frames).map_batches(
            _Stage,
            fn_constructor_args=(self._make,),
            batch_size=1,
            batch_format="pandas",
            compute=data.ActorPoolStrategy(
                size=min(self._actors.number, len(frames)), max_tasks_in_flight_per_actor=_AHEAD
            ),
            num_cpus=self._actors.cpus,
            num_gpus=self._actors.gpus,
            ray_remote_args_fn=lambda: lasting,
        )
        try:
            yield from answers.iter_rows()
        except ray.exceptions.RayTaskError as error:
            raise _reason(error) from error
        except ray.exceptions.RayError as error:
            raise SamplerError(f"Ray gave up on a batch ({one_line(error)}); sample again") from error

    def close(self) -> None:
        """See :class:`~sims_lens.scale.actors.Pool`: nothing is kept."""


def _reason(error: BaseException) -> SimsError:
    """The error of ours that an actor's is about; or one that says what it was."""
    found = error
    while isinstance(
        cause := getattr(found, "cause", None), BaseException
    ):  # Ray's own stand-ins for an error have one
        found = cause
    if isinstance(found, SimsError):
        return found
    return SamplerError(f"an actor failed: {type(found).__name__}: {one_line(found, 300)}")


class RaySampler:
    """Samples with actors on a Ray cluster, or on this machine; see :mod:`sims_lens.scale.ray`.

    The samples are those of :class:`~sims_lens.LocalSampler`, bit for bit, on processors of one kind.

    Args:
        model: name or path, as for :func:`sims_lens.load`; a path must be one that every machine of the cluster has.
        config: how responses are drawn; that of the run, where it samples for one.
        actors: how many, with a core each; or :class:`~sims_lens.scale.Actors`, which says what each takes.
        threads: of torch in each actor.
        batch_rows: responses in a batch: what is lost with an actor.
        kind: of model; see :func:`sims_lens.load`.
        revision: see there.
        device: see there.
        dtype: "float32", "bfloat16" or "float16"; see there.
        pool: :class:`~sims_lens.scale.KeptActors`, :class:`~sims_lens.scale.DataActors`, or a pool of your own.

    Attributes:
        count: tokens that the actors computed.

    Raises:
        ConfigError: a setting is out of range.

    Examples:
        A loop whose responses are drawn by four actors::

            with sims.RaySampler("embedded", config.sampling, actors=4) as sampler:
                run = sims.improve(model, prompts, ranker=judge, config=config, sampler=sampler)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        config: SamplingConfig | None = None,
        *,
        actors: int | Actors = 2,
        threads: int = 1,
        batch_rows: int = _ROWS,
        kind: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        pool: MakePool = KeptActors,
    ) -> None:
        check_kind("model", model, (str, os.PathLike), "give a name or a path: each actor loads it", ModelError)
        self.config = SamplingConfig() if config is None else config
        check_kind("config", self.config, SamplingConfig, "make one, as SamplingConfig()")
        check_integer("threads", threads)
        self._batch_rows = check_integer("batch_rows", batch_rows)
        if dtype is not None:
            check_choice("dtype", dtype, _DTYPES)
        self._spec = ModelSpec(os.fspath(model), self.config, kind, revision, device, dtype, threads)
        self._pool = pool(partial(ModelActor, self._spec), _actors(actors))
        self._reads: dict[tuple[bytes, str], bool] = {}
        self._about: Provenance | None = None
        self.count = TokenCount()

    def __enter__(self) -> "RaySampler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def lost(self) -> int:
        """Actors that were lost so far, where the pool knows."""
        return self._pool.lost

    def close(self) -> None:
        """End the actors. Sampling starts others."""
        self._pool.close()

    @property
    def provenance(self) -> Provenance:
        """What the model is: an actor is started, where there is none, and asked."""
        if self._about is None:
            self._about = self._one(About())
        return self._about

    def check(self, config: SIMSConfig) -> None:
        """Say before a run begins that it would not draw as its config says.

        Raises:
            ConfigError: ``config.sampling`` is not this sampler's.
        """
        if replace(self._spec, sampling=config.sampling).to_json() != self._spec.to_json():
            raise ConfigError(
                "the sampler's config is not the run's config.sampling; make it RaySampler(model, config.sampling)"
            )

    def reads(self, plan: SteeringPlan, site: str = "resid_post") -> bool:
        """See :meth:`LocalSampler.reads`: the actors are asked."""
        check_plan(plan)
        key = plan.to_bytes(), site
        if key not in self._reads:
            self._reads = {key: bool(self._one(Reads(*key)))}
        return self._reads[key]

    def sample(
        self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int, skip: Drawn = ()
    ) -> Iterator[Sample]:
        """Yield the samples, batch by batch as they are finished. See :meth:`LocalSampler.sample`.

        Raises:
            SamplerError: an actor failed, or what came is not what was asked for.
        """
        for sample, _ in self._sample(prompts, n=n, plan=plan, seed=seed, skip=skip):
            yield sample

    def sample_and_read(
        self,
        prompts: Sequence[str],
        *,
        n: int,
        plan: SteeringPlan,
        seed: int,
        site: str = "resid_post",
        skip: Drawn = (),
    ) -> Iterator[tuple[Sample, Reading | None]]:
        """See :meth:`LocalSampler.sample_and_read`."""
        yield from self._sample(prompts, n=n, plan=plan, seed=seed, site=site, skip=skip)

    def sample_and_measure(
        self,
        prompts: Sequence[str],
        *,
        n: int,
        plan: SteeringPlan,
        seed: int,
        measured: int | None = None,
        skip: Drawn = (),
    ) -> Iterator[Sample]:
        """See :meth:`LocalSampler.sample_and_measure`."""
        sides = n if measured is None else measured
        for sample, _ in self._sample(prompts, n=n, plan=plan, seed=seed, measured=sides, skip=skip):
            yield sample

    def sample_shards(
        self, shards: Iterable[Sequence[str]], *, n: int, plan: SteeringPlan, seed: int
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the number and the samples of each shard of prompts, in any order; see :func:`sims_lens.stream`.

        The shards are taken as they are needed, a few more than there are actors.
        """
        template = self._template(plan, n, seed)
        asked: dict[int, Batch] = {}

        def questions() -> Iterator[Batch]:
            for number, prompts in enumerate(shards):
                (asked[number],) = batches(prompts, n, template, rows=len(prompts) * n)
                yield asked[number]

        for number, answer in self._pool.ask(questions()):
            self.count.take(answer.count)
            yield number, [sample for sample, _ in answered(asked.pop(number), self._spec, answer.value)]

    def capture_moments(
        self,
        positive: Sequence[Row],
        negative: Sequence[Row],
        *,
        plan: SteeringPlan = NOTHING,
        sites: Sequence[str] = ("resid_post",),
        layers: Sequence[int] | None = None,
        scope: TokenScope | str = RESPONSE,
        weights: Float[Tensor, "group pair"] | None = None,
        batch_pairs: int = _PAIRS,
    ) -> dict[str, PairMoments]:
        """The moments of :func:`sims_lens.capture_moments`, read over the actors and merged, by site.

        They are merged in the order of the pairs, so that they are the same, bit for bit, whichever actor is faster;
        those of one process differ by the rounding of float64. Medians of norms, which can't be merged, and single
        pairs are not read.

        Args:
            positive: see :func:`sims_lens.capture_moments`, as for what isn't named here.
            negative: see there.
            plan: what steers meanwhile.
            sites: see there.
            layers: see there.
            scope: see there.
            weights: see there.
            batch_pairs: that an actor reads at once.
        """
        check_integer("batch_pairs", batch_pairs)
        for texts in (positive, negative):
            check_list("rows", texts, "[([1, 2], [3])]", PromptError)
        check_plan(plan)
        questions = pair_questions(
            positive,
            negative,
            size=batch_pairs,
            plan=plan.to_bytes(),
            sites=sites,
            layers=layers,
            scope=scope,
            weights=weights,
        )
        return merged((number, answer.value) for number, answer in self._pool.ask(questions))

    def _sample(
        self,
        prompts: Sequence[str],
        *,
        n: int,
        plan: SteeringPlan,
        seed: int,
        site: str | None = None,
        measured: int | None = None,
        skip: Drawn = (),
    ) -> Iterator[tuple[Sample, Reading | None]]:
        texts = check_list("prompts", prompts, "['Hello.']", PromptError)
        template = replace(self._template(plan, n, seed), site=site, measured=measured)
        asked = list(batches(texts, n, template, rows=self._batch_rows, skip=frozenset(skip)))
        for number, answer in self._pool.ask(asked):
            self.count.take(answer.count)
            yield from answered(asked[number], self._spec, answer.value)

    def _template(self, plan: SteeringPlan, n: int, seed: int) -> Batch:
        check_plan(plan)
        check_integer("n, the responses to each prompt,", n, 0)
        check_seed(seed)
        return Batch((), (), plan.to_bytes(), seed)

    def _one(self, question: Any) -> Any:
        ((_, answer),) = self._pool.ask([question])
        return answer.value


class RayRanker:
    """A ranker whose prompts are shared out to actors; each holds a copy of it.

    Scores are those of the ranker, as long as a prompt's do not depend on the other prompts. Where it judges with a
    model, name one in ``judge``: each actor loads it, and the loop's own model is not given to it.

    Args:
        ranker: of any shape; it is copied to the actors, so that it must be one that pickle can hold.
        actors: how many, with a core each; or :class:`~sims_lens.scale.Actors`.
        judge: name or path of the model that the ranker is bound to; None for a ranker that needs none.
        threads: of torch in each actor.
        batch_prompts: that an actor is asked about at once.
        pool: as for :class:`RaySampler`.

    Attributes:
        name: the ranker's.
        count: tokens that the actors computed.

    Examples:
        The unsteered embedded model as a judge, in two processes::

            ranker = sims.RayRanker(sims.SelfJudge(), judge="embedded", actors=2)
    """

    def __init__(
        self,
        ranker: object,
        *,
        actors: int | Actors = 2,
        judge: str | None = None,
        threads: int = 1,
        batch_prompts: int = _ITEMS,
        pool: MakePool = KeptActors,
    ) -> None:
        check_integer("threads", threads)
        self._batch = check_integer("batch_prompts", batch_prompts)
        if judge is not None:
            check_kind("judge", judge, str, "name a model: each actor loads it", ModelError)
        self._inner, self._judge = as_ranker(ranker), judge
        if getattr(self._inner, "steered", False):
            raise RankerError(
                f"{self._inner.name!r} judges with the steered model, which the actors don't have; let the unsteered "
                "one judge"
            )
        if judge is None and hasattr(self._inner, "bind"):
            raise RankerError(f"{self._inner.name!r} judges with a model; name it: RayRanker(..., judge='embedded')")
        self.name = self._inner.name
        self._pool = pool(partial(RankerActor, ranker, judge, threads), _actors(actors))
        self.count = TokenCount()

    def __enter__(self) -> "RayRanker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def settings(self) -> Any:
        """What the scores depend on."""
        found = settings_of(self._inner)
        return found if self._judge is None else {"ranker": found, "judge": self._judge}

    @property
    def pointwise(self) -> bool:
        """Whether a response's score depends on no other response."""
        known = getattr(self._inner, "pointwise", None)
        return not hasattr(self._inner, "matrix") if known is None else bool(known)

    @property
    def judges(self) -> bool:
        """Whether its verdicts are a judge's."""
        return is_judge(self._inner)

    @property
    def lost(self) -> int:
        """Actors that were lost so far, where the pool knows."""
        return self._pool.lost

    def close(self) -> None:
        """End the actors. Ranking starts others."""
        self._pool.close()

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """Score the responses to one prompt."""
        return self.rank_all([(prompt, responses)])[0]

    def rank_all(self, items: Sequence[Item]) -> list[tuple[float, ...]]:
        """Score the responses to many prompts, over the actors.

        Raises:
            RankerError: the ranker failed, or an actor did.
        """
        questions = [
            Judge(tuple((prompt, tuple(responses)) for prompt, responses in items[start : start + self._batch]))
            for start in range(0, len(items), self._batch)
        ]
        found: dict[int, list[tuple[float, ...]]] = {}
        try:
            for number, answer in self._pool.ask(questions):
                self.count.take(answer.count)
                found[number] = answer.value
        except SamplerError as error:
            raise RankerError(f"ranker {self.name!r}: {error}") from error
        return [scores for _, some in sorted(found.items()) for scores in some]


def _actors(actors: int | Actors) -> Actors:
    if isinstance(actors, Actors):
        return actors
    return Actors(number=check_integer("actors", actors))


__all__ = ["DataActors", "KeptActors", "MakePool", "RayRanker", "RaySampler"]
