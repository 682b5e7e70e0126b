"""The SIMS loop: sample, rank, contrast, capture, fit, steer, evaluate, and round again."""

import hashlib
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import Adapter, adapt, check_lengths
from sims_lens.auditing import Audit, audit, audit_pairs, is_judge
from sims_lens.auditing.agreement import pair_signs, same_verdict
from sims_lens.bank import MemoryBank, diagnose, plan_digest, select_pairs
from sims_lens.config import SIMSConfig
from sims_lens.cost import Meter, TokenCount, forced_count
from sims_lens.data import ContrastPair, Sample, by_prompt
from sims_lens.errors import PromptError, RankerError, RunError, TooFewPairsError
from sims_lens.evaluate import Evaluation, evaluate, perplexity_ratio, score_changes, side_effects
from sims_lens.guard import Checks, Decision, best_iteration, decide, gained
from sims_lens.hooks import steering
from sims_lens.iteration import candidate_layers, compose, compose_control, fit_contrast, step_coefficients
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import check_prompts
from sims_lens.rankers import CachedRanker, CheckedRanker, as_ranker, bound_ranker, rank
from sims_lens.run import Run, open_run
from sims_lens.sampling import LocalSampler, Reading, Readings, ReadingSampler, Sampler
from sims_lens.selection import allocate, shrunk_spread
from sims_lens.sites import check_layer
from sims_lens.stats import bootstrap_mean
from sims_lens.store import Folder, RunStore, read_json, read_tensors, write_jsonl, write_tensors
from sims_lens.strength import Divergence, find_strength

READINGS_LIMIT = 1 << 30
"""Bytes that the stream of an iteration's responses, averaged over each one's tokens, may take in memory and on the
disk until it is fitted to; where it would be more, the pairs are run again instead."""


def improve(
    model: Any,
    prompts: Sequence[str],
    *,
    ranker: object,
    evaluator: object | None = None,
    config: SIMSConfig | None = None,
    out: str | Path | None = None,
    sampler: Sampler | None = None,
    progress: bool = True,
) -> Run:
    """Let a model improve its own steering on unlabelled prompts.

    Per iteration: sample K responses to each training prompt from the model as steered so far, rank them, contrast
    the best with the worst, capture the residual stream of both at all layers, fit the mean difference, compose it
    with what came before, and measure the new plan on held-out prompts against the base model. At the end
    norm-matched shuffled-label controls are measured on the same prompts.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        prompts: unlabelled prompts, at least about 20; they are split by ``config.evaluation``.
        ranker: ``f(prompt, responses) -> scores`` (higher is better), an object with ``rank``, or a reward function
            ``f(prompts=, completions=)``. One that has ``bind``, as ``SelfJudge``, is bound to the model.
        evaluator: a second ranker that the loop never learns from, reported beside the first on held-out prompts.
        config: the choices; the defaults are reasoned in ``docs/method.md``.
        out: the run directory. One that holds the same run is gone on with after its last finished step; None makes
            a temporary one, named in ``run.path``.
        sampler: another engine; the model itself, in this process, by default.
        progress: show a progress bar.

    Returns:
        The run; its ``plan`` steers like the last iteration.

    Raises:
        PromptError: prompts are empty, duplicate, too few, or longer than the context.
        ConfigError: a setting does not fit the model.
        RankerError: the ranker raised or returned something else than one finite score per response. The run keeps
            what it has: mend the ranker and call again with the same ``out``.
        RunError: ``out`` holds another run, or something else.

    Reference: Zhu et al. 2025, "Self-Improving Model Steering" (arXiv 2507.08967), Algorithm 1. Where the paper
        leaves a choice open, ``docs/method.md`` says what we chose and why.
    """
    config = config or SIMSConfig()
    adapter = adapt(model)
    checked = bound_ranker(ranker, model)
    second = None if evaluator is None else bound_ranker(evaluator, model)
    texts = check_prompts(prompts)
    check_config(adapter, config)
    check_lengths(adapter, texts, config.sampling.max_new_tokens)
    split = split_prompts(len(texts), config)
    store = RunStore(out if out is not None else tempfile.mkdtemp(prefix="sims-run-"))
    store.begin(
        {
            "config": config.to_json(),
            "model": asdict(adapter.provenance),
            "ranker": checked.name,
            "evaluator": second.name if second else "",
            "versions": _versions(adapter),
        },
        [{"prompt": text, "split": name} for text, name in zip(texts, split, strict=True)],
    )
    if is_judge(checked) and not getattr(checked, "steered", False):
        # An opinion costs tokens or money: a run that goes on never asks for it twice.
        checked = as_ranker(CachedRanker(checked, store.path / "verdicts"))
    engine = sampler or LocalSampler(model, config.sampling)
    loop = _Loop(model, texts, split, checked, second, config, store, engine)
    with Progress(loop.total(), show=progress) as bar:
        loop.run(bar)
    return open_run(store.path)


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
    order = np.random.default_rng(config.seed).permutation(count)
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


@dataclass
class _Memory:
    """What an iteration knows of those before it; made anew from the disk when a run goes on."""

    bank: MemoryBank = field(default_factory=MemoryBank)
    samples: list[Sample] = field(default_factory=list)
    pairs: tuple[ContrastPair, ...] = ()

    def recent(self, t: int, iterations: int | None) -> MemoryBank:
        """The bank without what is older than ``iterations`` turns."""
        oldest = 1 if iterations is None else t - iterations + 1
        kept = tuple(entry for entry in self.bank.entries if entry.iteration >= oldest)
        return replace(self.bank, entries=kept)


@dataclass(frozen=True, eq=False)
class _Turn:
    """An iteration as it was measured in the end."""

    decision: Decision | None
    plan: SteeringPlan
    coefficients: tuple[float, ...]
    changes: Float[np.ndarray, " prompt"]


@dataclass
class _Course:
    """Where the steering stands: what was fitted, and how much of it was kept."""

    directions: list[Tensor] = field(default_factory=list)
    shuffled: list[Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    norms: Tensor = field(default_factory=lambda: torch.empty(0))
    turns: list[_Turn] = field(default_factory=list)
    trust: float = 1.0
    idle: int = 0

    @property
    def kept(self) -> int | None:
        """The newest iteration that the loop went on from, counted from 0; None where it starts from the base model."""
        kept = [i for i, turn in enumerate(self.turns) if turn.decision is None or turn.decision.kept]
        return kept[-1] if kept else None

    @property
    def plan(self) -> SteeringPlan:
        """What the next responses are drawn under."""
        return NOTHING if self.kept is None else self.turns[self.kept].plan

    @property
    def coefficients(self) -> list[float]:
        """Of the directions so far, in that plan."""
        given = () if self.kept is None else self.turns[self.kept].coefficients
        return [*given, *[0.0] * (len(self.turns) - len(given))]

    @property
    def newest(self) -> Tensor | None:
        """The newest direction that was kept."""
        return None if self.kept is None else self.directions[self.kept]

    @property
    def before(self) -> str:
        """What the loop goes back to, in words."""
        return "the base model" if self.kept is None else f"iteration {self.kept + 1}"

    @property
    def best(self) -> Float[np.ndarray, " prompt"] | None:
        """Changes of the mean score, by prompt, in the best iteration that was kept."""
        kept = [t.changes for t in self.turns if t.decision is None or t.decision.kept]
        return max(kept, key=lambda changes: float(changes.mean())) if kept else None

    @property
    def chosen(self) -> _Turn | None:
        """The iteration that the run's plan is taken from."""
        best = best_iteration([t.decision for t in self.turns], [float(t.changes.mean()) for t in self.turns])
        return None if best is None else self.turns[best]

    def take(
        self,
        decision: Decision | None,
        plan: SteeringPlan,
        coefficients: Sequence[float],
        changes: Float[np.ndarray, " prompt"],
    ) -> None:
        """Add an iteration that was measured."""
        self.turns.append(_Turn(decision, plan, tuple(coefficients), changes))
        self.idle = 0 if decision is None or gained(decision) else self.idle + 1


@dataclass
class _Loop:
    """What every step of a run needs, and the steps."""

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

    def indices(self, split: str) -> list[int]:
        return [i for i, name in enumerate(self.split) if name == split]

    def candidates(self) -> list[int]:
        """The layers that "auto" tries; empty where the layers are given."""
        if self.config.steering.layers != "auto":
            return []
        return candidate_layers(self.config.steering.candidates, self.adapter.n_layers)

    def total(self) -> int:
        """Responses that a whole run draws."""
        config = self.config
        measured = config.evaluation.samples
        heldout = len(self.indices("heldout")) * measured
        validation = len(self.indices("validation")) * measured
        train = len(self.indices("train")) * config.sampling.responses
        tries = len(self.candidates()) if len(self.candidates()) > 1 else 0
        chosen = (tries + 1) * validation if tries else 0
        return config.iterations * (train + heldout) + heldout + chosen + config.evaluation.controls * heldout

    def run(self, bar: Progress) -> None:
        self.bar = bar
        self.audit()
        base = self.base()
        course, memory = _Course(), _Memory()
        for t in range(1, self.config.iterations + 1):
            folder = self.store.iteration(t)
            if self.store.stopped and not folder.complete:
                break
            try:
                fitted, pairs = self.learn(folder, t, course.plan, memory)
            except TooFewPairsError as error:
                if t == 1 or self.config.guard.mode != "act":
                    raise
                self.store.stop(f"Stopped in iteration {t}, which is left out: {error}.")
                break
            if t == 1:
                course.norms = fitted["median_norm"]
                course.layers = self.choose(fitted["mean_difference"], course.norms)
            course.directions.append(fitted["mean_difference"])
            course.shuffled.append(fitted["shuffled"])
            decision = self.finish(folder, t, course, base, pairs)
            if decision is not None and decision.stop and self.config.guard.mode == "act":
                self.store.stop(decision.reason)
                break
        if course.chosen is not None:
            self.control(course, course.chosen, base)

    # The steps. Each reads what is on the disk already and computes the rest.

    def base(self) -> list[Sample]:
        """The unsteered model on the held-out prompts (and on the validation prompts, where a layer is chosen)."""
        folder = self.store.folder("base")
        heldout, _ = self.measure(folder, "heldout", "heldout", NOTHING, "base model, held-out prompts")
        if len(self.candidates()) > 1:
            self.measure(folder, "validation", "validation", NOTHING, "base model, validation prompts")
        self.evaluated(folder, "metrics", lambda: {"evaluation": evaluate(heldout, heldout).to_json()})
        return heldout

    def base_evaluation(self) -> Evaluation:
        """The unsteered model's own figures."""
        return Evaluation.from_json(read_json(self.store.folder("base").path / "metrics.json")["evaluation"])

    def audit(self) -> None:
        """Ask whether the ranker can be trusted, on the first responses that it will have to rank."""
        wanted = self.config.ranking
        if wanted.audit == "off":
            return
        folder = self.store.folder("audit")

        def make() -> dict[str, Any]:
            groups = [group for group in by_prompt(self.first_responses()) if len({s.text for s in group}) > 1]
            if not groups:
                raise RunError(
                    "every response to a prompt is the same text: there is nothing to rank; raise temperature"
                )
            groups = groups[: wanted.audit_prompts]
            self.bar.phase(f"auditing {self.ranker.name} on {len(groups)} prompts")
            with self.spending(folder, "audit", self.ranker):
                found = audit(
                    self.ranker,
                    [self.prompts[group[0].prompt] for group in groups],
                    [[s.text for s in group] for group in groups],
                    seed=self.config.seed,
                )
            return found.to_json()

        found = Audit.from_json(folder.json("audit", make))
        if not folder.complete:
            folder.finish()
        if found.verdict == "no better than chance" and wanted.audit == "stop":
            raise RankerError(
                f"the ranker {self.ranker.name!r} is no better than chance: {found.reason}. The loop would learn "
                f'noise; mend the ranker, or set RankingConfig(audit="report") to go on all the same'
            )

    def first_responses(self) -> list[Sample]:
        """The training responses of iteration 1, not ranked yet where they are needed before that."""
        folder, n = self.store.iteration(1), self.config.sampling.responses
        if (folder.path / "samples.jsonl").is_file():
            return folder.read_samples("samples")
        seed, what = derive_seed(self.config.seed, "train", 1), f"iteration 1/{self.config.iterations}"
        return self.responses(folder, "samples", "train", NOTHING, n=n, seed=seed, what=what)

    def learn(
        self, folder: Folder, t: int, plan: SteeringPlan, memory: "_Memory"
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Sample, rank, contrast, capture and fit; also says which pairs it learnt from."""
        config, name = self.config, f"iteration {t}/{self.config.iterations}"
        seed = derive_seed(config.seed, "train", t)
        n: int | dict[int, int] = config.sampling.responses
        if config.sampling.allocation == "spread" and t > 1:
            n = allocate(shrunk_spread(memory.samples), budget=config.sampling.responses * len(self.indices("train")))
        judging = steering(self.model, plan) if getattr(self.ranker, "steered", False) else nullcontext()
        samples = self.ranked(folder, "samples", "train", plan, n=n, seed=seed, what=name, judging=judging)
        memory.samples += samples
        memory.bank = memory.bank.add(samples, iteration=t, plan=plan_digest(plan))
        bank = memory.recent(t, config.contrast.memory)
        if len({e.iteration for e in bank.entries}) > 1 and compares(self.ranker):
            bank = self.reranked(folder, bank, name)
        contrast = select_pairs(
            bank,
            policy=config.contrast.policy,
            size=config.contrast.size,
            per_prompt=config.contrast.per_prompt,
            min_margin=config.contrast.min_margin,
            length=config.contrast.length,
            seed=derive_seed(config.seed, "pairs", t),
        )
        chosen = diagnose(contrast.pairs, iteration=t, previous=memory.pairs)
        memory.pairs = contrast.pairs
        if not (folder.path / "pairs.jsonl").is_file():
            rows = [
                {
                    "prompt": p.prompt,
                    "best": p.best.draw,
                    "best_iteration": p.best_iteration,
                    "worst": p.worst.draw,
                    "worst_iteration": p.worst_iteration,
                    "margin": p.margin,
                }
                for p in contrast.pairs
            ]
            write_jsonl(folder.path / "pairs.jsonl", rows)

        def asked_again() -> dict[str, Any]:
            self.bar.phase(f"{name}: auditing {self.ranker.name} on {len(contrast.pairs)} pairs")
            with self.spending(folder, "audit", self.ranker):
                return audit_pairs(self.ranker, self.prompts, contrast.pairs).to_json()

        def make() -> Mapping[str, Tensor]:
            self.bar.phase(f"{name}: reading {2 * len(contrast.pairs)} responses at {self.adapter.n_layers} layers")
            with self.spending(folder, "capture") as meter:
                readings = self.readings(folder)
                fit = fit_contrast(self.model, self.prompts, contrast, plan, config, seed=seed, readings=readings)
                if readings is None:
                    read = [(p.prompt, s.tokens) for p in contrast.pairs for s in (p.best, p.worst)]
                    meter.add(TokenCount.forced(len(self.encoded[prompt]) + len(tokens) for prompt, tokens in read))
            return asdict(fit)

        audited = folder.json("audit", asked_again) if config.ranking.audit != "off" and contrast.pairs else None
        figures = {"diagnostics": chosen.to_json(), "dropped": contrast.dropped, "audit": audited}
        about = {**asdict(self._provenance(f"improve, iteration {t}")), "site": config.steering.site}
        vectors = folder.tensors("vectors", make, about)
        folder.remove("readings.safetensors")
        return vectors, figures

    def reads(self, folder: Folder, n: int | Mapping[int, int]) -> bool:
        """Whether the stream is to be read while training responses are drawn: the pairs will all be of this iteration,
        so that it is the plan at hand that they are read under; and it finds room."""
        only_these = self.config.contrast.memory == 1 or folder.final == self.store.iteration(1).final
        count = n * len(self.indices("train")) if isinstance(n, int) else sum(n.values())
        size = 4 * count * self.adapter.n_layers * (self.adapter.d_model + self.config.sampling.max_new_tokens)
        return only_these and size <= READINGS_LIMIT

    def readings(self, folder: Folder) -> Readings | None:
        """What was read while the responses of an iteration were drawn; None where that was not done."""
        file = folder.path / "readings.safetensors"
        return Readings(**read_tensors(file)) if file.is_file() else None

    def reranked(self, folder: Folder, bank: MemoryBank, name: str) -> MemoryBank:
        """A bank whose responses of all iterations were ranked together: a judge that compares responses with each
        other gives scores that hold only among those which it saw."""
        groups = bank.by_prompt()

        def make() -> list[list[float]]:
            self.bar.phase(f"{name}: ranking {len(bank)} responses of all iterations")
            with self.spending(folder, "rank", self.ranker):
                asked = [(self.prompts[i], [e.sample.text for e in entries]) for i, entries in groups.items()]
                return [list(scores) for scores in self.ranker.rank_all(asked)]

        scores = folder.json("bank_scores", make)
        found = {
            id(entry): score
            for entries, given in zip(groups.values(), scores, strict=True)
            for entry, score in zip(entries, given, strict=True)
        }
        return bank.rescored([found[id(entry)] for entry in bank.entries])

    def scaled(
        self, folder: Folder, name: str, course: "_Course", coefficients: Sequence[float], kl: float
    ) -> list[float]:
        """With strength "auto", the coefficients at which the plan spends that much KL divergence; else as they are."""
        if self.config.steering.strength != "auto":
            return list(coefficients)

        def make() -> dict[str, float]:
            self.bar.phase(f"finding the strength that spends {kl:.2g} nats of KL per token")
            with self.spending(folder, "strength") as meter:
                divergence = self.divergence
                found = find_strength(divergence, self.composed(course, coefficients, "strength"), kl=kl)
                meter.add(divergence.count)
            return asdict(found)

        factor = float(folder.json(name, make)["factor"])
        return [factor * c for c in coefficients]

    @cached_property
    def divergence(self) -> Divergence:
        """What measures how far a plan moves the model, on its first responses."""
        return Divergence(self.model, self.prompts, self.first_responses())

    def composed(self, course: "_Course", coefficients: Sequence[float], source: str) -> SteeringPlan:
        """The plan that adds some of each direction."""
        about = self._provenance(f"improve, {source}")
        return compose(course.directions, coefficients, course.layers, course.norms, self.config.steering, about)

    def choose(self, direction: Tensor, norms: Tensor) -> list[int]:
        """The layers to steer: those given, or the best of the candidates on the validation prompts."""
        if self.config.steering.layers != "auto":
            return list(self.config.steering.layers)
        candidates = self.candidates()
        if len(candidates) == 1:
            return candidates
        folder = self.store.folder("choice")
        base = self.store.folder("base").read_samples("validation")
        steer = self.config.steering
        found: dict[int, Evaluation] = {}
        for layer in candidates:
            alone = _Course(directions=[direction], layers=[layer], norms=norms)
            full = self.scaled(folder, f"strength_{layer:02d}", alone, step_coefficients([], steer, 1), steer.kl)
            plan = self.composed(alone, full, "layer choice")
            what = f"trying layer {layer}"
            samples, beside = self.measure(folder, f"layer_{layer:02d}", "validation", plan, what, base)
            found[layer] = evaluate(samples, beside)
        chosen = choose_layer(found, evaluate(base, base).nll.estimate + self.config.steering.max_nll_increase)
        self.evaluated(
            folder,
            "metrics",
            lambda: {"chosen": chosen, "layers": {str(layer): e.to_json() for layer, e in found.items()}},
        )
        return [chosen]

    def finish(
        self, folder: Folder, t: int, course: "_Course", base: list[Sample], pairs: Mapping[str, Any]
    ) -> Decision | None:
        """Compose the plan of an iteration, measure it on the held-out prompts, and let the guard decide; a step that
        is over budget is tried again, smaller."""
        settings, guard = self.config.steering, self.config.guard
        kept = [*course.coefficients, 0.0] if settings.compose == "accumulate" else [0.0] * t
        wanted = [k + course.trust * (c - k) for k, c in zip(kept, self.steps(folder, t, course), strict=True)]
        tries = 1
        while True:
            plan = self.composed(course, wanted, f"iteration {t}")
            name = "heldout" if tries == 1 else f"heldout_{tries}"
            what = f"iteration {t}/{self.config.iterations}, held-out prompts"
            samples, beside = self.measure(folder, name, "heldout", plan, what, base)
            found = evaluate(samples, beside)
            if guard.mode == "off":
                decision = None
                break
            checks = self.checks(folder, t, course, samples, beside, found)
            decision = decide(checks, guard, tries=tries, idle=course.idle, before=course.before)
            if decision.shrink == 1.0 or guard.mode == "report":
                break
            wanted = [k + decision.shrink * (c - k) for k, c in zip(kept, wanted, strict=True)]
            course.trust *= decision.shrink
            tries += 1
            self.bar.more(len(samples))
        file = folder.path / "plan.safetensors"
        if not file.is_file():
            plan.save(file)
        figures = {
            "evaluation": found.to_json(),
            "guard": decision.to_json() if decision else None,
            "coefficients": wanted,
            "tries": tries,
            **pairs,
        }
        self.evaluated(folder, "metrics", lambda: figures)
        course.take(decision if guard.mode == "act" else None, plan, wanted, score_changes(samples, beside))
        return decision

    def steps(self, folder: Folder, t: int, course: "_Course") -> list[float]:
        """Coefficients of the directions so far, the newest with its whole step."""
        settings, turns = self.config.steering, self.config.iterations
        whole = step_coefficients(course.coefficients, settings, turns)
        share = t / turns if settings.compose == "accumulate" else 1.0
        return self.scaled(folder, "strength", course, whole, settings.kl * share)

    def checks(
        self,
        folder: Folder,
        t: int,
        course: "_Course",
        samples: Sequence[Sample],
        base: Sequence[Sample],
        found: Evaluation,
    ) -> Checks:
        """What the guard looks at."""
        change = score_changes(samples, base)
        turn = None
        if course.newest is not None:
            both = course.directions[-1][course.layers], course.newest[course.layers]
            turn = float(torch.cosine_similarity(*both, dim=-1).mean())
        distinct = self.base_evaluation().distinct_2.estimate
        return Checks(
            effect=found.difference,
            gain=None if course.best is None else bootstrap_mean(change - course.best),
            kl_95=found.kl_95,
            perplexity_ratio=perplexity_ratio(samples, base),
            diversity=found.distinct_2.estimate / distinct if distinct else 1.0,
            turn=turn,
            agreement=self.agreement(folder, t),
        )

    def agreement(self, folder: Folder, t: int) -> float | None:
        """Share of comparisons in which the ranker, asked again, stands by what it said about the first responses.
        None where it isn't asked, or told none of them apart."""
        if self.config.ranking.audit == "off":
            return None
        first = by_prompt(self.store.iteration(1).read_samples("samples"))[: self.config.ranking.audit_prompts]

        def make() -> list[list[float]]:
            self.bar.phase(f"iteration {t}: asking {self.ranker.name} again about its first verdicts")
            with self.spending(folder, "audit", self.ranker):
                fresh = getattr(self.ranker, "uncached", None)
                asked = as_ranker(fresh()) if callable(fresh) else self.ranker
                lists = [(self.prompts[group[0].prompt], [s.text for s in group]) for group in first]
                return [list(scores) for scores in asked.rank_all(lists)]

        again = folder.json("first_verdicts_again", make)
        stands = []
        for group, scores in zip(first, again, strict=True):
            before = pair_signs([s.score for s in group if s.score is not None])
            stands += same_verdict(before, pair_signs(scores))[before != 0].tolist()
        return float(np.mean(stands)) if stands else None

    def control(self, course: "_Course", real: "_Turn", base: list[Sample]) -> None:
        """Measure the norm-matched shuffled-label controls of the run's plan."""
        folder = self.store.folder("controls")
        found: list[Evaluation] = []
        for k in range(self.config.evaluation.controls):
            name = f"shuffled {k + 1}/{self.config.evaluation.controls}"
            null = compose_control(
                [shuffled[k] for shuffled in course.shuffled[: len(real.coefficients)]],
                real.coefficients,
                real.plan,
                course.norms,
                self.config.steering,
                self._provenance(name),
            )
            file = folder.path / f"plan_{k + 1}.safetensors"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                null.save(file)
            samples, beside = self.measure(folder, f"heldout_{k + 1}", "heldout", null, f"control: {name}", base)
            found.append(evaluate(samples, beside))
        self.evaluated(folder, "metrics", lambda: {"controls": [e.to_json() for e in found]})

    # What the steps are made of

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
    ) -> list[Sample]:
        """Responses to a split. They are on the disk before they are ranked: a ranker that fails loses none."""
        groups: dict[int, list[int]] = {}
        for index in self.indices(split):
            groups.setdefault(n if isinstance(n, int) else n[index], []).append(index)

        site, measured = self.config.steering.site, self.config.evaluation.measured
        able = self.sampler if isinstance(self.sampler, ReadingSampler) and self.sampler.reads(plan, site) else None
        reading = split == "train" and self.reads(folder, n)
        found: dict[tuple[int, int], Reading] = {}

        def sampled(texts: Sequence[str], count: int) -> Iterator[tuple[Sample, Reading | None]]:
            if able is not None and reading:
                yield from able.sample_and_read(texts, n=count, plan=plan, seed=seed, site=site)
            elif able is not None and split != "train":
                for sample in able.sample_and_measure(texts, n=count, plan=plan, seed=seed, measured=measured):
                    yield sample, None
            else:
                for sample in self.sampler.sample(texts, n=count, plan=plan, seed=seed):
                    yield sample, None

        def draw() -> Iterator[Sample]:
            self.bar.phase(f"{what}: sampling")
            self._drawn.add((folder.final, name))
            with self.spending(folder, "sample", self.sampler):
                for count, indices in sorted(groups.items()):
                    for sample, read in sampled([self.prompts[i] for i in indices], count):
                        self.bar.advance(1)
                        if read is not None:
                            found[indices[sample.prompt], sample.draw] = read
                        yield replace(sample, prompt=indices[sample.prompt])
                if found:  # before the samples, which say that this step is done
                    write_tensors(folder.path / "readings.safetensors", asdict(Readings.of(found)))

        return folder.samples(f"{name}.responses", draw)

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
    ) -> list[Sample]:
        """Scored samples of a split; ``base`` are those of the base model that they will be held against."""
        there = any((folder.path / f"{name}{end}").is_file() for end in (".jsonl", ".responses.jsonl"))
        if there and (folder.final, name) not in self._drawn:
            self.bar.advance(len(self.indices(split)) * n if isinstance(n, int) else sum(n.values()))

        def score() -> list[Sample]:
            drawn = self.responses(folder, name, split, plan, n=n, seed=seed, what=what)
            self.bar.phase(f"{what}: ranking with {self.ranker.name}")
            with self.spending(folder, "rank", self.ranker), judging or nullcontext():
                scored, beside = rank_beside(self.ranker, self.prompts, drawn, base)
            if beside is not None:
                write_jsonl(folder.path / f"{name}.base.jsonl", [asdict(sample) for sample in beside])
            return scored

        samples = folder.samples(name, score)
        folder.remove(f"{name}.responses.jsonl")
        return samples

    def measure(
        self,
        folder: Folder,
        name: str,
        split: str,
        plan: SteeringPlan,
        what: str,
        base: Sequence[Sample] = (),
    ) -> tuple[list[Sample], list[Sample]]:
        """Samples of a split with scores and side effects, drawn with the same random numbers for every plan; and
        those of the base model, with scores that can be compared with theirs."""

        def make() -> list[Sample]:
            scored = self.ranked(
                folder,
                f"{name}.scored",
                split,
                plan,
                n=self.config.evaluation.samples,
                seed=derive_seed(self.config.seed, split),
                what=what,
                base=base,
            )
            beside = self.beside(folder, f"{name}.scored", base)
            self.bar.phase(f"{what}: perplexity and KL")
            first = [s for s in scored if s.draw < self.config.evaluation.measured and s.nll is None]
            with self.spending(folder, "measure") as meter:
                measured = side_effects(self.model, self.prompts, first, plan) if first else []
                places = {prompt: place for place, prompt in enumerate(dict.fromkeys(s.prompt for s in first))}
                for _ in range(2 if plan.interventions else 1):
                    rows = [(places[s.prompt], s.tokens) for s in first]
                    meter.add(forced_count([self.encoded[prompt] for prompt in places], rows))
            found = {(s.prompt, s.draw): s for s in measured}
            whole = [found.get((s.prompt, s.draw), s) for s in scored]
            if self.evaluator is not None:
                self.bar.phase(f"{what}: judging with {self.evaluator.name}")
                with self.spending(folder, "evaluator", self.evaluator):
                    second, again = rank_beside(self.evaluator, self.prompts, whole, base)
                whole = _judged(whole, second)
                if again is not None:
                    beside = _judged(beside, again)
            if any(a is not b for a, b in zip(beside, base, strict=True)):
                write_jsonl(folder.path / f"{name}.base.jsonl", [asdict(sample) for sample in beside])
            return whole

        if (folder.path / f"{name}.jsonl").is_file():
            self.bar.advance(len(self.indices(split)) * self.config.evaluation.samples)
        samples = folder.samples(name, make)
        folder.remove(f"{name}.scored.jsonl")
        folder.remove(f"{name}.scored.base.jsonl")
        return samples, self.beside(folder, name, base)

    def beside(self, folder: Folder, name: str, base: Sequence[Sample]) -> list[Sample]:
        """The base model's samples, as they were scored together with others where scores hold only among those."""
        own = f"{name}.base"
        return folder.read_samples(own) if (folder.path / f"{own}.jsonl").is_file() else list(base)

    def evaluated(self, folder: Folder, name: str, make: Callable[[], Any]) -> None:
        """Write a folder's figures and call it complete."""
        if not folder.complete:
            folder.json(name, make)
            folder.finish()

    @contextmanager
    def spending(self, folder: Folder, phase: str, counts: object = None) -> Iterator[Meter]:
        """Write down what a phase took; ``counts`` is what counts its tokens, a sampler or a ranker."""
        meter = Meter(getattr(counts, "count", None), self.adapter.arithmetic)
        try:
            with meter:
                yield meter
        finally:
            folder.spend(phase, meter.cost)

    def _provenance(self, source: str) -> Any:
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


def choose_layer(found: Mapping[int, Evaluation], max_nll: float) -> int:
    """The layer with the highest win rate whose text is fluent; the most fluent one where none is.

    Args:
        found: evaluation of each candidate.
        max_nll: the largest mean negative log-likelihood that counts as fluent, nats per token.
    """
    fluent = {layer: e for layer, e in found.items() if e.nll.estimate <= max_nll}
    if not fluent:
        return min(found, key=lambda layer: found[layer].nll.estimate)
    return max(fluent, key=lambda layer: fluent[layer].win_rate.estimate)


def _versions(adapter: Adapter) -> dict[str, str]:
    found = {"python": platform.python_version(), "model_kind": adapter.kind}
    for package in ("sims-lens", "transformer-lens", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
