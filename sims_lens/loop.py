"""The SIMS loop: sample, rank, contrast, capture, fit, steer, evaluate, and round again."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sims_lens.auditing import Audit, audit, audit_pairs
from sims_lens.auditing.agreement import pair_signs, same_verdict
from sims_lens.bank import MemoryBank, diagnose, plan_digest, select_pairs
from sims_lens.config import SIMSConfig
from sims_lens.cost import TokenCount
from sims_lens.course import Course, Memory, Turn
from sims_lens.data import Sample, by_prompt
from sims_lens.errors import RankerError, RunError, TooFewPairsError
from sims_lens.evaluate import Evaluation, evaluate, perplexity_ratio, score_changes
from sims_lens.guard import Checks, Decision, decide
from sims_lens.hooks import steering
from sims_lens.iteration import candidate_layers, compose, compose_control, fit_contrast, step_coefficients
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.rankers import as_ranker
from sims_lens.run import Run, open_run
from sims_lens.sampling import Sampler
from sims_lens.selection import allocate, shrunk_spread
from sims_lens.stats import bootstrap_mean
from sims_lens.store import Folder
from sims_lens.strength import Divergence, find_strength
from sims_lens.workbench import Workbench, compares, derive_seed


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
    loop = _Loop.begin(model, prompts, ranker=ranker, evaluator=evaluator, config=config, out=out, sampler=sampler)
    with loop.opened(), Progress(loop.total(), show=progress) as bar:
        loop.run(bar)
    return open_run(loop.store.path)


@dataclass
class _Loop(Workbench):
    """The steps. Each reads what is on the disk already and computes the rest."""

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
        course, memory = Course(), Memory()
        for t in range(1, self.config.iterations + 1):
            folder = self.store.iteration(t)
            if self.store.ends_before(t):
                break
            try:
                fitted, pairs = self.learn(folder, t, course.plan, memory)
            except TooFewPairsError as error:
                if t == 1 or self.config.guard.mode != "act":
                    raise
                self.store.stop(f"Stopped in iteration {t}, which is left out: {error}.", after=t - 1)
                break
            if t == 1:
                course.norms = fitted["median_norm"]
                course.layers = self.choose(fitted["mean_difference"], course.norms)
            course.directions.append(fitted["mean_difference"])
            course.shuffled.append(fitted["shuffled"])
            decision = self.finish(folder, t, course, base, pairs)
            if decision is not None and decision.stop and self.config.guard.mode == "act":
                self.store.stop(decision.reason, after=t)
                break
        if course.chosen is not None:
            self.control(course, course.chosen, base)

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
        return Evaluation.from_json(self.store.folder("base").read_json("metrics")["evaluation"])

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
            with self.spending(folder, "audit", self.ranker), self.recorded(folder, "audit", self.ranker) as ranker:
                found = audit(
                    ranker,
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
        if folder.has("samples.jsonl"):
            return folder.read_samples("samples")
        seed, what = derive_seed(self.config.seed, "train", 1), f"iteration 1/{self.config.iterations}"
        return self.responses(folder, "samples", "train", NOTHING, n=n, seed=seed, what=what)

    def learn(
        self, folder: Folder, t: int, plan: SteeringPlan, memory: Memory
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Sample, rank, contrast, capture and fit; also says which pairs it learnt from."""
        config, name = self.config, f"iteration {t}/{self.config.iterations}"
        seed = derive_seed(config.seed, "train", t)
        n: int | dict[int, int] = config.sampling.responses
        if config.sampling.allocation == "spread" and t > 1:
            n = allocate(shrunk_spread(memory.samples), budget=config.sampling.responses * len(self.indices("train")))
        judging = steering(self.model, plan) if getattr(self.ranker, "steered", False) else nullcontext()
        samples = self.ranked(folder, "samples", "train", plan, n=n, seed=seed, what=name, judging=judging)
        if config.sampling.allocation == "spread":
            memory.samples += samples
        bank = memory.add(samples, t, plan_digest(plan), config.contrast.memory)
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
        if not folder.has("pairs.jsonl"):
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
            folder.write_rows("pairs", rows)

        def asked_again() -> dict[str, Any]:
            self.bar.phase(f"{name}: auditing {self.ranker.name} on {len(contrast.pairs)} pairs")
            with self.spending(folder, "audit", self.ranker), self.recorded(folder, "audit", self.ranker) as ranker:
                return audit_pairs(ranker, self.prompts, contrast.pairs).to_json()

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
        about = {**asdict(self.provenance(f"improve, iteration {t}")), "site": config.steering.site}
        vectors = folder.tensors("vectors", make, about)
        return vectors, figures

    def reranked(self, folder: Folder, bank: MemoryBank, name: str) -> MemoryBank:
        """A bank whose responses of all iterations were ranked together: a judge that compares responses with each
        other gives scores that hold only among those which it saw."""
        groups = bank.by_prompt()

        def make() -> list[list[float]]:
            self.bar.phase(f"{name}: ranking {len(bank)} responses of all iterations")
            with self.spending(folder, "rank", self.ranker), self.recorded(folder, "bank", self.ranker) as ranker:
                asked = [(self.prompts[i], [e.sample.text for e in entries]) for i, entries in groups.items()]
                return [list(scores) for scores in ranker.rank_all(asked)]

        scores = folder.json("bank_scores", make)
        found = {
            id(entry): score
            for entries, given in zip(groups.values(), scores, strict=True)
            for entry, score in zip(entries, given, strict=True)
        }
        return bank.rescored([found[id(entry)] for entry in bank.entries])

    def scaled(
        self, folder: Folder, name: str, course: Course, coefficients: Sequence[float], kl: float
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

    def composed(self, course: Course, coefficients: Sequence[float], source: str) -> SteeringPlan:
        """The plan that adds some of each direction."""
        about = self.provenance(f"improve, {source}")
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
            alone = Course(directions=[direction], layers=[layer], norms=norms)
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
        self, folder: Folder, t: int, course: Course, base: list[Sample], pairs: Mapping[str, Any]
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
        if not folder.has("plan.safetensors"):
            folder.write("plan.safetensors", plan.to_bytes())
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

    def steps(self, folder: Folder, t: int, course: Course) -> list[float]:
        """Coefficients of the directions so far, the newest with its whole step."""
        settings, turns = self.config.steering, self.config.iterations
        whole = step_coefficients(course.coefficients, settings, turns)
        share = t / turns if settings.compose == "accumulate" else 1.0
        return self.scaled(folder, "strength", course, whole, settings.kl * share)

    def checks(
        self,
        folder: Folder,
        t: int,
        course: Course,
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
            fresh = getattr(self.ranker, "uncached", None)
            asked = as_ranker(fresh()) if callable(fresh) else self.ranker
            lists = [(self.prompts[group[0].prompt], [s.text for s in group]) for group in first]
            with self.spending(folder, "audit", self.ranker), self.recorded(folder, "again", asked) as ranker:
                return [list(scores) for scores in ranker.rank_all(lists)]

        again = folder.json("first_verdicts_again", make)
        stands = []
        for group, scores in zip(first, again, strict=True):
            before = pair_signs([s.score for s in group if s.score is not None])
            stands += same_verdict(before, pair_signs(scores))[before != 0].tolist()
        return float(np.mean(stands)) if stands else None

    def control(self, course: Course, real: Turn, base: list[Sample]) -> None:
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
                self.provenance(name),
            )
            if not folder.has(f"plan_{k + 1}.safetensors"):
                folder.write(f"plan_{k + 1}.safetensors", null.to_bytes())
            samples, beside = self.measure(folder, f"heldout_{k + 1}", "heldout", null, f"control: {name}", base)
            found.append(evaluate(samples, beside))
        self.evaluated(folder, "metrics", lambda: {"controls": [e.to_json() for e in found]})


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
