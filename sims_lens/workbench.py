"""The workbench: responses are drawn, ranked and measured under plans, each step once, and kept in a run directory.

The loop works on it, and so does whatever is measured beside the loop on the same prompts.
"""

import hashlib
import inspect
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sims_lens.adapter import Adapter, adapt, check_lengths
from sims_lens.auditing import is_judge
from sims_lens.config import SIMSConfig
from sims_lens.cost import Meter, forced_count
from sims_lens.data import Sample
from sims_lens.errors import PromptError
from sims_lens.evaluate import side_effects
from sims_lens.plan import Provenance, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import check_prompts
from sims_lens.rankers import CachedRanker, CheckedRanker, RecordedRanker, as_ranker, bound_ranker, rank
from sims_lens.sampling import Drawn, LocalSampler, Reading, Readings, ReadingSampler, Sampler
from sims_lens.sites import check_layer
from sims_lens.store import Folder, RunStore, sample_from

READINGS_LIMIT = 1 << 30
"""Bytes that the stream of an iteration's responses, averaged over each one's tokens, may take in memory and on the
disk until it is fitted to; where it would be more, the pairs are run again instead."""


def compares(ranker: CheckedRanker) -> bool:
    """Whether a ranker's scores hold only among the responses that it saw together, as those of a tournament do."""
    pointwise = getattr(ranker, "pointwise", None)
    return hasattr(ranker, "matrix") if pointwise is None else not pointwise


def split_prompts(count: int, config: SIMSConfig) -> tuple[str, ...]:
    """A split, "train", "validation" or "heldout", for each of ``count`` prompts, by a seeded shuffle.

    Raises:
        PromptError: too few prompts for the shares that the config asks for.
    """
    shares = config.evaluation
    heldout = round(count * shares.heldout)
    validation = round(count * shares.validation) if config.steering.layers == "auto" else 0
    train = count - heldout - validation
    if min(heldout, train) < 2 or (config.steering.layers == "auto" and validation < 2):
        raise PromptError(
            f"{count} prompts give {train} for training, {validation} for validation and {heldout} held out; at least "
            "2 of each are needed (about 100 in all for an interval worth having): give more prompts"
        )
    names = ["heldout"] * heldout + ["validation"] * validation + ["train"] * train
    seed = config.seed if shares.split_seed is None else shares.split_seed
    order = np.random.default_rng(seed).permutation(count)
    split = [""] * count
    for position, index in enumerate(order):
        split[index] = names[position]
    return tuple(split)


def check_config(adapter: Adapter, config: SIMSConfig) -> None:
    """Raise unless the layers and the site exist in the model."""
    if config.steering.layers != "auto":
        for layer in config.steering.layers:
            check_layer(layer, adapter.n_layers, adapter.name)
    adapter.point(0, config.steering.site)


def derive_seed(seed: int, *labels: object) -> int:
    """A seed of its own for each use, from the run's seed.

    >>> derive_seed(0, "train", 1) == derive_seed(0, "train", 2)
    False
    """
    digest = hashlib.sha256("\0".join(map(str, (seed, *labels))).encode()).digest()
    return int.from_bytes(digest[:6], "little")


Bench = TypeVar("Bench", bound="Workbench")


@dataclass
class Workbench:
    """What every step of a run needs, and how responses come about."""

    model: Any
    prompts: tuple[str, ...]
    split: tuple[str, ...]
    ranker: CheckedRanker
    evaluator: CheckedRanker | None
    config: SIMSConfig
    store: RunStore
    sampler: Sampler

    def __post_init__(self) -> None:
        self.adapter = adapt(self.model)
        self.encoded = [self.adapter.encode(prompt) for prompt in self.prompts]
        self.bar = Progress(0, show=False)
        self._drawn: set[tuple[Path, str]] = set()

    @classmethod
    def begin(
        cls: type[Bench],
        model: Any,
        prompts: Sequence[str],
        *,
        ranker: object,
        evaluator: object | None = None,
        config: SIMSConfig | None = None,
        out: str | Path | None = None,
        sampler: Sampler | None = None,
    ) -> Bench:
        """Check what was given; the arguments are those of :func:`sims_lens.improve`. Then comes :meth:`opened`."""
        config = config or SIMSConfig()
        adapter = adapt(model)
        checked = bound_ranker(ranker, model)
        second = None if evaluator is None else bound_ranker(evaluator, model)
        texts = check_prompts(prompts)
        check_config(adapter, config)
        check_lengths(adapter, texts, config.sampling.max_new_tokens)
        getattr(sampler, "check", lambda _config: None)(config)  # what an engine can't do is said before it is asked
        split = split_prompts(len(texts), config)
        store = RunStore(out if out is not None else tempfile.mkdtemp(prefix="sims-run-"))
        engine = sampler or LocalSampler(model, config.sampling, solo=False)
        return cls(model, texts, split, checked, second, config, store, engine)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A ``with`` block inside which the run directory is ours: begun, or the same run, with damage set aside.

        Raises:
            RunError: another process writes there, it holds something else, or it can't be written to.
        """
        with self.store.locked():
            self.store.begin(
                {
                    "config": self.config.to_json(),
                    "model": asdict(self.adapter.provenance),
                    "ranker": self.ranker.name,
                    "evaluator": self.evaluator.name if self.evaluator else "",
                    "versions": _versions(self.adapter),
                },
                [{"prompt": text, "split": name} for text, name in zip(self.prompts, self.split, strict=True)],
            )
            if is_judge(self.ranker) and not getattr(self.ranker, "steered", False):
                # An opinion costs tokens or money: what was asked in one step isn't asked again in another.
                self.ranker = as_ranker(CachedRanker(self.ranker, self.store.path / "verdicts"))
            yield

    def indices(self, split: str) -> list[int]:
        """Of the prompts of a split."""
        return [i for i, name in enumerate(self.split) if name == split]

    def reads(self, folder: Folder, n: int | Mapping[int, int]) -> bool:
        """Whether the stream is to be read while training responses are drawn: the pairs will all be of this iteration,
        so that it is the plan at hand that they are read under; and it finds room."""
        only_these = self.config.contrast.memory == 1 or folder.final == self.store.iteration(1).final
        count = n * len(self.indices("train")) if isinstance(n, int) else sum(n.values())
        size = 4 * count * self.adapter.n_layers * (self.adapter.d_model + self.config.sampling.max_new_tokens)
        return only_these and size <= READINGS_LIMIT

    def readings(self, folder: Folder) -> Readings | None:
        """What was read while the responses of an iteration were drawn; None where that was not done."""
        return Readings(**folder.read_tensors("readings")) if folder.has("readings.safetensors") else None

    def responses(
        self,
        folder: Folder,
        name: str,
        split: str,
        plan: SteeringPlan,
        *,
        n: int | Mapping[int, int],
        seed: int,
        what: str,
        asked: Sequence[str] | None = None,
        measured: int | None = None,
    ) -> list[Sample]:
        """Responses to a split. Each is in a journal on the disk as soon as it is drawn: neither a crash nor a ranker
        that fails loses any.

        Args:
            folder: where they are kept.
            name: under which name.
            split: the prompts that they answer.
            plan: what steers.
            n: responses to each prompt, or to each by its index.
            seed: of the draws.
            what: this step in words, for the progress bar.
            asked: what the model is asked in place of each prompt, an instruction added, say.
            measured: of each prompt's responses, how many have their side effects measured while they are drawn, where
                that can be done; ``evaluation.measured`` where None, and none of the training prompts'.
        """
        groups: dict[int, list[int]] = {}
        for index in self.indices(split):
            groups.setdefault(n if isinstance(n, int) else n[index], []).append(index)

        site = self.config.steering.site
        texts = self.prompts if asked is None else asked
        measured = self.config.evaluation.measured if measured is None else measured
        able = self.sampler if isinstance(self.sampler, ReadingSampler) and self.sampler.reads(plan, site) else None
        reading = able is not None and split == "train" and self.reads(folder, n)
        skips = "skip" in inspect.signature(self.sampler.sample).parameters
        journal = folder.journal(f"{name}.responses")
        drawn: dict[tuple[int, int], tuple[Sample, Reading | None]] = {}

        def sampled(chosen: Sequence[str], count: int, skip: Drawn) -> Iterator[tuple[Sample, Reading | None]]:
            common: dict[str, Any] = {"n": count, "plan": plan, "seed": seed}
            if able is not None and reading:
                yield from able.sample_and_read(chosen, **common, site=site, skip=skip)
            elif able is not None and split != "train" and asked is None:
                for sample in able.sample_and_measure(chosen, **common, measured=measured, skip=skip):
                    yield sample, None
            else:
                for sample in self.sampler.sample(chosen, **common | ({"skip": skip} if skips else {})):
                    yield sample, None

        def draw() -> list[Sample]:
            self.bar.phase(f"{what}: sampling")
            self._drawn.add((folder.final, name))
            for row in journal.rows():
                sample = sample_from(row, journal.path)
                read = Reading.from_json(row["reading"]) if row.get("reading") else None
                if read is not None or not reading or not sample.tokens:
                    drawn[sample.prompt, sample.draw] = sample, read
            self.bar.advance(len(drawn))
            with self.spending(folder, "sample", self.sampler) as meter, journal.open():
                for count, indices in sorted(groups.items()):
                    left = [i for i in indices if any((i, k) not in drawn for k in range(count))]
                    place = {index: at for at, index in enumerate(left)}
                    skip = {(place[i], k) for i, k in drawn if i in place}
                    for found, read in sampled([texts[i] for i in left], count, skip) if left else ():
                        sample = replace(found, prompt=left[found.prompt])
                        if (sample.prompt, sample.draw) in drawn:  # of a sampler that can't leave any out
                            continue
                        journal.append({**asdict(sample), "reading": read.to_json() if read else None})
                        drawn[sample.prompt, sample.draw] = sample, read
                        self.bar.advance(1)
                        meter.tick()
            if reading:  # before the samples, which say that this step is done
                readings = {key: read for key, (_, read) in drawn.items() if read is not None}
                folder.write_tensors("readings", asdict(Readings.of(readings)))
            return [sample for _, (sample, _) in sorted(drawn.items())]

        return folder.samples(f"{name}.responses", draw)

    @contextmanager
    def recorded(self, folder: Folder, name: str, ranker: CheckedRanker) -> Iterator[CheckedRanker]:
        """A ranker that writes down each verdict as it comes, and asks for none again that a crash left there."""
        with folder.journal(f"{name}.verdicts").open() as journal:
            yield RecordedRanker(ranker, journal)

    def ranked(
        self,
        folder: Folder,
        name: str,
        split: str,
        plan: SteeringPlan,
        *,
        n: int | Mapping[int, int],
        seed: int,
        what: str,
        judging: AbstractContextManager[Any] | None = None,
        base: Sequence[Sample] = (),
        asked: Sequence[str] | None = None,
        measured: int | None = None,
    ) -> list[Sample]:
        """Scored samples of a split; ``base`` are those of the base model that they will be held against."""
        there = any(folder.has(f"{name}{end}") for end in (".jsonl", ".responses.jsonl"))
        if there and (folder.final, name) not in self._drawn:
            self.bar.advance(len(self.indices(split)) * n if isinstance(n, int) else sum(n.values()))

        def score() -> list[Sample]:
            drawn = self.responses(folder, name, split, plan, n=n, seed=seed, what=what, asked=asked, measured=measured)
            self.bar.phase(f"{what}: ranking with {self.ranker.name}")
            with (
                self.spending(folder, "rank", self.ranker),
                judging or nullcontext(),
                self.recorded(folder, name, self.ranker) as ranker,
            ):
                scored, beside = rank_beside(ranker, self.prompts, drawn, base)
            if beside is not None:
                folder.write_samples(f"{name}.base", beside)
            return scored

        return folder.samples(name, score)

    def measure(
        self,
        folder: Folder,
        name: str,
        split: str,
        plan: SteeringPlan,
        what: str,
        base: Sequence[Sample] = (),
        *,
        n: int | None = None,
        seed: int | None = None,
        asked: Sequence[str] | None = None,
        measured: int | None = None,
    ) -> tuple[list[Sample], list[Sample]]:
        """Samples of a split with scores and side effects, drawn with the same random numbers for every plan; and
        those of the base model, with scores that can be compared with theirs.

        Args:
            folder: see :meth:`responses`, as for all that isn't named otherwise.
            name: see there.
            split: see there.
            plan: see there.
            what: see there.
            base: the base model's samples that these will be held against.
            n: ``evaluation.samples`` where None.
            seed: of the draws; None for the same as every other plan's.
            asked: see there.
            measured: see there.
        """
        count = self.config.evaluation.samples if n is None else n
        sides = self.config.evaluation.measured if measured is None else measured

        def make() -> list[Sample]:
            scored = self.ranked(
                folder,
                f"{name}.scored",
                split,
                plan,
                n=count,
                seed=derive_seed(self.config.seed, split) if seed is None else seed,
                what=what,
                base=base,
                asked=asked,
                measured=sides,
            )
            beside = self.beside(folder, f"{name}.scored", base)
            self.bar.phase(f"{what}: perplexity and KL")
            first = [s for s in scored if s.draw < sides and s.nll is None]
            with self.spending(folder, "measure") as meter:
                known = side_effects(self.model, self.prompts, first, plan, asked=asked) if first else []
                places = {prompt: place for place, prompt in enumerate(dict.fromkeys(s.prompt for s in first))}
                for _ in range(2 if plan.interventions or asked is not None else 1):
                    rows = [(places[s.prompt], s.tokens) for s in first]
                    meter.add(forced_count([self.encoded[prompt] for prompt in places], rows))
            found = {(s.prompt, s.draw): s for s in known}
            whole = [found.get((s.prompt, s.draw), s) for s in scored]
            if self.evaluator is not None:
                self.bar.phase(f"{what}: judging with {self.evaluator.name}")
                with (
                    self.spending(folder, "evaluator", self.evaluator),
                    self.recorded(folder, f"{name}.evaluator", self.evaluator) as evaluator,
                ):
                    second, again = rank_beside(evaluator, self.prompts, whole, base)
                whole = _judged(whole, second)
                if again is not None:
                    beside = _judged(beside, again)
            if any(a is not b for a, b in zip(beside, base, strict=True)):
                folder.write_samples(f"{name}.base", beside)
            return whole

        if folder.has(f"{name}.jsonl"):
            self.bar.advance(len(self.indices(split)) * count)
        samples = folder.samples(name, make)
        return samples, self.beside(folder, name, base)

    def beside(self, folder: Folder, name: str, base: Sequence[Sample]) -> list[Sample]:
        """The base model's samples, as they were scored together with others where scores hold only among those."""
        own = f"{name}.base"
        return folder.read_samples(own) if folder.has(f"{own}.jsonl") else list(base)

    def evaluated(self, folder: Folder, name: str, make: Callable[[], Any]) -> None:
        """Write a folder's figures and call it complete."""
        if not folder.complete:
            folder.json(name, make)
            folder.finish()

    @contextmanager
    def spending(self, folder: Folder, phase: str, counts: object = None) -> Iterator[Meter]:
        """Write down what a phase took; ``counts`` is what counts its tokens, a sampler or a ranker."""
        with Meter(getattr(counts, "count", None), self.adapter.arithmetic, partial(folder.spend, phase)) as meter:
            yield meter

    def provenance(self, source: str) -> Provenance:
        """Where a plan of this run comes from."""
        return replace(
            self.adapter.provenance, source=f"{source}, config {self.config.digest}", config=self.config.digest
        )


def rank_beside(
    ranker: CheckedRanker, prompts: Sequence[str], samples: Sequence[Sample], base: Sequence[Sample]
) -> tuple[list[Sample], list[Sample] | None]:
    """Samples with scores; and, where the ranker's scores hold only among the responses that it saw together, the base
    model's, scored together with them. Otherwise None: the scores that they have will do."""
    if not base or not compares(ranker):
        return rank(ranker, prompts, samples), None
    first = 1 + max(s.draw for s in samples)
    both = rank(ranker, prompts, [*samples, *(replace(s, draw=first + s.draw) for s in base)])
    scores = {(s.prompt, s.draw): s.score for s in both}
    return (
        [replace(s, score=scores[s.prompt, s.draw]) for s in samples],
        [replace(s, score=scores[s.prompt, first + s.draw]) for s in base],
    )


def _judged(samples: Sequence[Sample], second: Sequence[Sample]) -> list[Sample]:
    scores = {(s.prompt, s.draw): s.score for s in second}
    return [replace(s, independent=scores[s.prompt, s.draw]) for s in samples]


def _versions(adapter: Adapter) -> dict[str, str]:
    found = {"python": platform.python_version(), "model_kind": adapter.kind}
    for package in ("sims-lens", "transformer-lens", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
