"""The loop beside what it has to beat, on the same prompts, with the same rankers, seeds, and dose.

For each seed the loop runs as :func:`sims_lens.improve` runs it, on held-out prompts that are the same for all seeds.
Then every baseline is measured on those prompts:

=====================  ================================================================================================
loop                   the plan after each iteration
one-shot               the mean difference of the unsteered model's own best and worst responses, as many in all as the
                       loop had drawn by then; at the loop's KL divergence, and at its norm
supervised pairs       contrastive activation addition on pairs that were given, at the loop's KL divergence
DPO                    the weights trained on all pairs that the loop had contrasted, where it is asked for
instruction            the unsteered model, told in its prompt what is wanted
best of N              the best of N responses of the unsteered model, N so that as many tokens are drawn as the loop
                       takes to learn and to answer; and smaller N
rejection              the first of those that is good enough
random direction       at the loop's KL divergence
shuffled labels        the loop's own controls, of its norm
=====================  ================================================================================================

The layer is the loop's; so all that is steered is steered at one place with one dose; what differs is the direction.
KL is measured on the unsteered model's responses when doses are matched, and on each method's own when it is reported.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sims_lens.bank import MemoryBank, select_pairs
from sims_lens.checks import check_folder, check_kind, check_list, check_seed
from sims_lens.comparison.choosing import best_of, rejection
from sims_lens.comparison.dpo import DPOConfig, check_dpo, tune
from sims_lens.comparison.result import Comparison, Method, Spent
from sims_lens.config import GuardConfig, SIMSConfig
from sims_lens.cost import Cost, TokenCount, forced_count
from sims_lens.data import ContrastPair, Sample, by_prompt
from sims_lens.errors import ConfigError, RunError
from sims_lens.evaluate import distinct_2, evaluate, score_changes, side_effects
from sims_lens.guard import best_iteration
from sims_lens.hooks import check_unsteered
from sims_lens.iteration import compose, fit_contrast
from sims_lens.loop import improve
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import quote
from sims_lens.rankers import bound_ranker, rank
from sims_lens.run import Iteration, Run
from sims_lens.sampling import LocalSampler, Sampler
from sims_lens.stats import win_probability
from sims_lens.store import Folder
from sims_lens.strength import Divergence, find_strength
from sims_lens.supervised import fit
from sims_lens.transforms import Addition
from sims_lens.workbench import Workbench, compares, derive_seed, rank_beside


def compare(
    model: Any,
    prompts: Sequence[str],
    *,
    ranker: object,
    evaluator: object | None = None,
    instruction: str = "",
    pairs: Sequence[object] = (),
    dpo: Sequence[DPOConfig] = (),
    seeds: Sequence[int] = (0, 1, 2),
    config: SIMSConfig | None = None,
    out: str | Path | None = None,
    sampler: Sampler | None = None,
    progress: bool = True,
) -> Comparison:
    """Run the loop and what it has to beat, with the same prompts, rankers and seeds, at matched dose and budget.

    What each method is, and what is matched, is said at the top of this module. Best of N has as many tokens to draw as
    the loop takes to learn *and* to answer the held-out prompts once: the more answers a plan gives, the smaller the
    share of its learning, and the better it compares.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        prompts: unlabelled prompts, split by ``config.evaluation``; the held-out ones are the same for all seeds.
        ranker: as in :func:`sims_lens.improve`; best of N and rejection sampling choose by it.
        evaluator: a second ranker that nothing learns from or chooses by.
        instruction: what is wanted, in words, for the plain instruction; it follows the prompt after an empty line. "":
            that method is left out.
        pairs: contrast pairs, as :func:`sims_lens.fit` takes them, for supervised steering; left out where empty.
        dpo: trainings of a copy's weights on the pairs that the loop contrasted, each a method: ``[DPOConfig()]``. They
            need ``pip install "sims-lens[dpo]"`` and a model of :func:`sims_lens.load`.
        seeds: of the runs, each the whole procedure; three at least, if anything is to be said of other seeds.
        config: of the loop. ``seed`` is replaced by each of ``seeds``. By default the guard only reports: one that acts
            chooses the loop's plan on the very prompts that all is measured on.
        out: a folder; what is there is not computed again. None makes a temporary one.
        sampler: another engine; the model itself, in this process, by default.
        progress: show progress bars.

    Raises:
        ConfigError: no seed, or one twice; or the instruction is no text; or DPO isn't installed.
        ModelError: DPO is asked for, and the model's checkpoint isn't known.
        SimsError: what :func:`sims_lens.improve` raises.

    >>> from sims_lens.comparison.choosing import best_of_kl
    >>> round(best_of_kl(2), 2)  # nats that choosing the better of two responses takes
    0.19
    """
    check_unsteered(model)
    config = SIMSConfig(guard=GuardConfig(mode="report")) if config is None else config
    check_kind("config", config, SIMSConfig, "make one, as SIMSConfig(iterations=3)")
    numbers = tuple(check_seed(seed, "a seed") for seed in check_list("seeds", seeds, "[0, 1, 2]"))
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"seeds must be distinct numbers, at least one, got {quote(repr(seeds))}")
    if not isinstance(instruction, str) or (instruction and not instruction.strip()):
        raise ConfigError(f'the instruction must be a text such as "Be cheerful.", got {instruction!r}')
    trainings = check_dpo(model, dpo)
    folder = check_folder(out, RunError) if out is not None else Path(tempfile.mkdtemp(prefix="sims-comparison-"))
    shares = config.evaluation
    split_seed = config.seed if shares.split_seed is None else shares.split_seed
    benches = []
    with ExitStack() as stack:
        for seed in numbers:
            own = replace(config, seed=seed, evaluation=replace(shares, split_seed=split_seed))
            path = folder / f"seed_{seed}"
            given = {"ranker": ranker, "evaluator": evaluator, "config": own, "out": path, "sampler": sampler}
            run = improve(model, prompts, **given, progress=progress)  # type: ignore[arg-type]
            bench = _Bench.begin(model, prompts, **given)  # type: ignore[arg-type]
            bench.run = run
            stack.enter_context(bench.opened())
            benches.append(bench)
        most = max(2, round(float(np.mean([bench.budget for bench in benches]))))  # one N for all seeds
        found = [bench.methods(instruction, pairs, trainings, most, show=progress) for bench in benches]
    controls = [control.difference.estimate for bench in benches for control in bench.run.controls]
    names = [name for name in found[0] if all(name in others for others in found)]
    comparison = Comparison(
        methods=tuple(_method(name, [measured[name] for measured in found]) for name in names),
        seeds=numbers,
        heldout=len(run.indices("heldout")),
        answers=shares.samples,
        ranker=run.ranker,
        evaluator=run.evaluator,
        controls=tuple(controls),
        comparable=not compares(bound_ranker(ranker, model)),
        path=folder,
    )
    comparison.save(folder / "comparison.json")
    return comparison


@dataclass(frozen=True)
class _Measured:
    """A method with one seed; of ``plans`` plans together, each with as many responses to a prompt."""

    family: str
    dose: str
    samples: Sequence[Sample]
    base: Sequence[Sample]
    learning: Spent
    answering: Spent
    norm: float = math.nan
    plans: int = 1

    def distinct_2(self) -> float:
        """Averaged over plans: the more responses are looked at together, the more of what they say has been said."""
        count = max(s.draw for s in self.samples) // self.plans + 1
        parts = [[s for s in self.samples if s.draw // count == k] for k in range(self.plans)]
        return float(np.mean([distinct_2(part).estimate for part in parts]))


def _method(name: str, seeds: Sequence[_Measured]) -> Method:
    """The figures of a method from its samples with every seed."""

    def each(value: Callable[[_Measured], Any]) -> Float[np.ndarray, "seed prompt"]:
        return np.array([value(m) for m in seeds], dtype=float)

    def over(value: Callable[[Sample], float | None]) -> Callable[[_Measured], list[float]]:
        def means(measured: _Measured) -> list[float]:
            kept = [[v for s in group if (v := value(s)) is not None] for group in by_prompt(measured.samples)]
            whole = float(np.mean([v for values in kept for v in values]))
            return [float(np.mean(values)) if values else whole for values in kept]  # one without text tells nothing

        return means

    def wins(score: Callable[[Sample], float | None]) -> Callable[[_Measured], list[float]]:
        def rates(measured: _Measured) -> list[float]:
            both = zip(by_prompt(measured.samples), by_prompt(measured.base), strict=True)
            return [win_probability(*(np.array([score(s) for s in g], dtype=float) for g in pair)) for pair in both]

        return rates

    def second(measured: _Measured) -> list[float]:
        other = [[replace(s, score=s.independent) for s in side] for side in (measured.samples, measured.base)]
        return score_changes(*other).tolist()  # type: ignore[no-any-return]

    twice = all(s.independent is not None for m in seeds for s in (*m.samples, *m.base))
    evaluations = [evaluate(m.samples, m.base) for m in seeds]
    count = len(seeds)
    return Method(
        name=name,
        family=seeds[0].family,
        dose=seeds[0].dose,
        changes=each(lambda m: score_changes(m.samples, m.base)),
        wins=each(wins(lambda s: s.score)),
        independent_changes=each(second) if twice else None,
        independent_wins=each(wins(lambda s: s.independent)) if twice else None,
        kl=each(over(lambda s: s.kl)),
        kl_response=each(over(lambda s: None if s.kl is None else s.kl * len(s.tokens))),
        nll=each(over(lambda s: s.nll if s.tokens else None)),
        scores=np.array([[[s.score for s in group] for group in by_prompt(m.samples)] for m in seeds], dtype=float),
        even=tuple(e.length_controlled.estimate if e.length_controlled else math.nan for e in evaluations),
        distinct_2=tuple(m.distinct_2() for m in seeds),
        norm=tuple(m.norm for m in seeds),
        learning=sum((m.learning for m in seeds), Spent()) * (1 / count),
        answering=sum((m.answering for m in seeds), Spent()) * (1 / count),
    )


class _Bench(Workbench):
    """The baselines of one run, measured on its held-out prompts and kept in its folder ``compared``."""

    run: Run

    @cached_property
    def kept(self) -> Folder:
        """Where all that is measured here is kept."""
        return self.store.folder("compared")

    @cached_property
    def base_samples(self) -> list[Sample]:
        """The unsteered model on the held-out prompts."""
        return self.run.samples(0)

    @cached_property
    def first(self) -> list[Sample]:
        """The unsteered model's training responses."""
        return self.run.samples(1, "train")

    @cached_property
    def layers(self) -> list[int]:
        """Where the loop steers."""
        return sorted({layer for i in self.run.iterations for layer, _ in i.plan.vectors()})

    @cached_property
    def norms(self) -> Float[torch.Tensor, " layer"]:
        """Median norm of the stream."""
        return self.run.iterations[0].tensors["median_norm"]

    @cached_property
    def divergence(self) -> Divergence:
        """How far a plan moves the model, on its own first responses, as the loop measures it."""
        return Divergence(self.model, self.prompts, self.first)

    @cached_property
    def steps(self) -> list[Iteration | None]:
        """What the loop's plan was taken from after each turn."""
        return [_after(self.run, t) for t in range(1, self.run.config.iterations + 1)]

    @cached_property
    def budget(self) -> float:
        """Responses of the unsteered model for each answer that take as many tokens as the loop in all."""
        loop = list(self.loop(self.run, self.steps))[-1][1]
        answers = len(self.base_samples)
        tokens = loop.learning.tokens + answers * loop.answering.tokens
        return tokens / (answers * self.answering(self.base_samples).tokens)

    @cached_property
    def wanted(self) -> dict[int, float]:
        """KL of the loop's plans, by iteration, where it was asked for."""
        return {}

    def methods(
        self, instruction: str, pairs: Sequence[object], dpo: Sequence[DPOConfig], most: int, *, show: bool
    ) -> dict[str, _Measured]:
        """Every method by name; ``most`` is the largest N."""
        run, steps = self.run, self.steps
        turns = len(steps)
        plans = 1 + (turns + 1) * (turns > 1) + bool(pairs) + len(dpo) + bool(instruction) + most
        train = len(self.indices("train")) * self.config.sampling.responses * turns
        with Progress(train + plans * len(self.base_samples), show=show) as self.bar:
            found = dict(self.loop(run, steps))
            found |= self.one_shot(steps)
            if pairs:
                found |= self.supervised(pairs, steps[-1])
            for training in dpo:
                found |= self.trained(training)
            if instruction:
                found |= self.instructed(instruction)
            found |= self.random(steps[-1])
            loop = list(found.values())[len(steps) - 1]
            found |= self.shuffled(run, loop)
            found |= self.chosen(most)
        self.kept.finish()
        return found

    # What things take

    def spent(self, samples: Sequence[Sample], *, judged: bool = True, asked: Sequence[str] | None = None) -> Spent:
        """What it took to sample these; each prompt was read once."""
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(s.prompt for s in samples))}
        heads = [self.encoded[i] if asked is None else self.adapter.encode(asked[i]) for i in places]
        count = forced_count(heads, [(places[s.prompt], s.tokens) for s in samples])
        return Spent(
            responses=float(len(samples)),
            tokens=float(sum(len(s.tokens) for s in samples)),
            judged=float(len(samples) if judged else 0),
            flops=float(self.adapter.arithmetic.flops(count)),
        )

    def answering(self, samples: Sequence[Sample], asked: Sequence[str] | None = None) -> Spent:
        """What one response takes."""
        return self.spent(samples, judged=False, asked=asked) * (1 / len(samples))

    def choosing(self) -> Spent:
        """What it took to choose the layer: all that is steered uses it."""
        folder = self.store.folder("choice")
        if not folder.complete:
            return Spent()
        names = sorted(p.stem for p in folder.path.glob("layer_*.jsonl") if ".base" not in p.name)
        drawn = [folder.read_samples(name) for name in names]
        drawn.append(self.store.folder("base").read_samples("validation"))
        other = Spent(flops=sum(c.flops for phase, c in folder.costs().items() if phase == "strength"))
        return sum((self.spent(samples) for samples in drawn), other)

    def fitting(self, cost: Mapping[str, Cost]) -> Spent:
        """What reading the stream and finding the strength took."""
        return Spent(flops=sum(cost[phase].flops for phase in ("capture", "strength") if phase in cost))

    # The methods

    def loop(self, run: Run, steps: Sequence[Iteration | None]) -> Iterator[tuple[str, _Measured]]:
        learning = self.choosing()
        for t, step in enumerate(steps, start=1):
            if t <= len(run.iterations):
                learning += self.spent(run.samples(t, "train")) + self.fitting(self.store.iteration(t).costs())
            samples, base = self.base_samples, self.base_samples
            if step is not None:
                folder = self.store.iteration(step.index)
                samples = run.samples(step.index)
                base = self.beside(folder, "heldout" if step.tries == 1 else f"heldout_{step.tries}", base)
            norm = self.norm(step.plan) if step else 0.0
            yield (
                f"loop, {t} iteration{'s' if t > 1 else ''}",
                _Measured("loop", "", samples, base, learning, self.answering(samples), norm),
            )

    def one_shot(self, steps: Sequence[Iteration | None]) -> dict[str, _Measured]:
        """The unsteered model's responses, as many as the loop had drawn; the first ones are the loop's own. Where the
        loop had stopped before its last turn they are fewer than the name says."""
        each, done = self.config.sampling.responses, len(self.run.iterations)
        if len(steps) == 1:  # with one iteration the loop is one-shot
            return {}
        seed, what = derive_seed(self.config.seed, "train", 1), "one-shot: training responses"
        pool = self.ranked(self.kept, "pool", "train", NOTHING, n=each * done, seed=seed, what=what)
        found: dict[str, _Measured] = {}
        for t, step in enumerate(steps, start=1):
            if step is None or t == 1:
                continue
            count, drawn = each * t, each * min(t, done)
            samples = [s for s in pool if s.draw < drawn]
            if compares(self.ranker):
                samples = rank(self.ranker, self.prompts, samples)
            learning = self.choosing() + self.spent(samples)
            usual = self.config.contrast.per_prompt
            wanted = {f"one-shot, {count} responses a prompt": usual}
            if t == len(steps):
                wanted[f"one-shot, {count} responses, {t} pairs a prompt"] = t * usual
            for name, per_prompt in wanted.items():
                label = f"one_shot_{drawn}_{per_prompt}"
                direction = self.direction(label, samples, per_prompt)
                found |= self.steered(name, "one-shot", label, direction, step, learning)
                if t == len(steps) and per_prompt == usual:
                    found |= self.steered(name, "one-shot", label, direction, step, learning, dose="norm")
        return found

    def direction(self, label: str, samples: Sequence[Sample], per_prompt: int) -> Float[torch.Tensor, "layer d_model"]:
        """The mean difference of the unsteered model's own best and worst responses."""
        contrast, seed = self.config.contrast, derive_seed(self.config.seed, "train", 1)

        def made() -> dict[str, torch.Tensor]:
            chosen = select_pairs(
                MemoryBank().add(samples, iteration=1),
                policy=contrast.policy,
                size=None if contrast.size is None else contrast.size * per_prompt // contrast.per_prompt,
                per_prompt=per_prompt,
                min_margin=contrast.min_margin,
                length=contrast.length,
                seed=derive_seed(self.config.seed, "pairs", 1),
            )
            settings = replace(self.config, evaluation=replace(self.config.evaluation, controls=0))
            readings = self.readings(self.kept)
            fitted = fit_contrast(self.model, self.prompts, chosen, NOTHING, settings, seed=seed, readings=readings)
            return {"direction": fitted.mean_difference}

        return self.kept.tensors(label, made)["direction"]

    def supervised(self, pairs: Sequence[object], step: Iteration | None) -> dict[str, _Measured]:
        """Contrastive activation addition at the loop's layers. Reading the pairs, once, is not counted."""
        if step is None:
            return {}

        def made() -> dict[str, torch.Tensor]:
            self.bar.phase(f"supervised: fitting to {len(pairs)} pairs")
            site = self.config.steering.site
            fitted = fit(self.model, pairs, layers=self.layers, site=site, progress=False)
            directions = torch.zeros(self.adapter.n_layers, self.adapter.d_model)
            for layer in self.layers:
                transform = fitted.transform(layer)
                assert isinstance(transform, Addition)
                directions[layer] = transform.direction.detach().float().cpu()
            return {"direction": directions}

        label = f"supervised_{_digest(pairs)}"
        direction = self.kept.tensors(label, made)["direction"]
        name = f"supervised, {len(pairs)} pairs"
        return self.steered(name, "supervised", label, direction, step, self.choosing())

    @cached_property
    def contrasted(self) -> list[ContrastPair]:
        """Every pair that the loop has fitted to, as it was drawn."""
        drawn = {
            (i.index, s.prompt, s.draw): s for i in self.run.iterations for s in self.run.samples(i.index, "train")
        }
        found = []
        for i in self.run.iterations:
            for row in self.store.iteration(i.index).read_rows("pairs"):
                prompt, sides = row["prompt"], (row["best_iteration"] or i.index, row["worst_iteration"] or i.index)
                best, worst = drawn[sides[0], prompt, row["best"]], drawn[sides[1], prompt, row["worst"]]
                found.append(ContrastPair(prompt, best, worst, *sides))
        return found

    def trained(self, config: DPOConfig) -> dict[str, _Measured]:
        """The weights trained on the loop's pairs. All that the loop did before its last fit was needed for them."""
        kept, label, shares = self.kept, f"dpo_{_digest(config)}", self.config.evaluation

        def draw() -> list[Sample]:
            self.bar.phase(f"{config.name}: training on {len(self.contrasted)} pairs")
            seed = derive_seed(self.config.seed, "dpo")
            tuned, training = tune(self.model, self.prompts, self.contrasted, config, seed=seed)
            kept.json(f"{label}.training", lambda: asdict(training))
            kept.spend("train", Cost(seconds=training.seconds, flops=training.flops))
            self.bar.phase(f"{config.name}: sampling, perplexity and KL")
            places, sampler = self.indices("heldout"), LocalSampler(tuned, self.config.sampling)
            texts, seed = [self.prompts[i] for i in places], derive_seed(self.config.seed, "heldout")
            with self.spending(kept, "sample", sampler):
                found = list(sampler.sample(texts, n=shares.samples, plan=NOTHING, seed=seed))
            samples = sorted((replace(s, prompt=places[s.prompt]) for s in found), key=lambda s: (s.prompt, s.draw))
            first = [s for s in samples if s.draw < shares.measured]
            with self.spending(kept, "measure") as meter:
                known = side_effects(self.model, self.prompts, first, NOTHING, tuned=tuned)
                at = {prompt: place for place, prompt in enumerate(places)}
                for _ in range(2):
                    meter.add(
                        forced_count([self.encoded[i] for i in places], [(at[s.prompt], s.tokens) for s in first])
                    )
            return known + [s for s in samples if s.draw >= shares.measured]

        if not kept.has(f"{label}.jsonl"):
            kept.samples(f"{label}.scored.responses", draw)
        samples, base = self.measure(kept, label, "heldout", NOTHING, config.name, self.base_samples)
        learning = self.choosing() if len(self.run.iterations) > 1 else Spent()
        for i in self.run.iterations:
            learning += self.spent(self.run.samples(i.index, "train"))
            if i.index < len(self.run.iterations):
                learning += self.fitting(self.store.iteration(i.index).costs())
        took = kept.read_json(f"{label}.training")
        learning += Spent(flops=float(took["flops"]), training_seconds=float(took["seconds"]))
        return {config.name: _Measured("DPO", "", samples, base, learning, self.answering(samples))}

    def random(self, step: Iteration | None) -> dict[str, _Measured]:
        """A direction that nobody has fitted."""
        if step is None:
            return {}
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "random direction"))
        direction = torch.randn(self.adapter.n_layers, self.adapter.d_model, generator=generator)
        return self.steered("random direction", "random", "random", direction, step, Spent())

    def shuffled(self, run: Run, loop: _Measured) -> dict[str, _Measured]:
        """The controls of the run, all together as one method."""
        folder, found = self.store.folder("controls"), []
        base: list[Sample] = []
        count = self.config.evaluation.samples
        for k in range(len(run.controls)):
            name = f"heldout_{k + 1}"
            found += [replace(s, draw=k * count + s.draw) for s in folder.read_samples(name)]
            base += [replace(s, draw=k * count + s.draw) for s in self.beside(folder, name, self.base_samples)]
        if not found:
            return {}
        answering = self.answering(found)
        norm, plans = self.norm(run.plan), len(run.controls)
        measured = _Measured("shuffled", "norm", found, base, loop.learning, answering, norm, plans)
        return {"shuffled labels": measured}

    def steered(
        self,
        name: str,
        family: str,
        label: str,
        direction: torch.Tensor,
        step: Iteration,
        learning: Spent,
        *,
        dose: str = "KL",
    ) -> dict[str, _Measured]:
        """A direction at the layers of one of the loop's plans, at its KL or norm."""
        settings, kept = self.config.steering, self.kept
        label = f"{label}_{dose.lower()}_{step.index}"
        about = self.provenance(f"compare, {name}")
        norm = self.norm(step.plan)
        unit = compose([direction], [norm], self.layers, self.norms, settings, about)

        def factor() -> dict[str, float]:
            self.bar.phase(f"{name}: finding the strength")
            divergence = self.divergence
            if step.index not in self.wanted:
                self.wanted[step.index] = divergence.of(step.plan)
            divergence.count = TokenCount()  # what was matched is no cost of this method
            with self.spending(kept, f"strength {label}") as meter:
                found = find_strength(divergence, unit, kl=self.wanted[step.index])
                meter.add(divergence.count)
            return asdict(found)

        plan = unit.scaled(float(kept.json(f"{label}.strength", factor)["factor"])) if dose == "KL" else unit
        if not kept.has(f"{label}.plan.safetensors"):
            kept.write(f"{label}.plan.safetensors", plan.to_bytes())
        learning += Spent(flops=kept.costs().get(f"strength {label}", Cost()).flops)
        samples, base = self.measure(kept, label, "heldout", plan, name, self.base_samples)
        shown = name if dose == "KL" else f"{name}, at its norm"
        return {shown: _Measured(family, dose, samples, base, learning, self.answering(samples), self.norm(plan))}

    def instructed(self, instruction: str) -> dict[str, _Measured]:
        """The unsteered model, told what is wanted."""
        asked = [f"{prompt}\n\n{instruction}" for prompt in self.prompts]
        label = f"instruction_{_digest(instruction)}"
        samples, base = self.measure(
            self.kept, label, "heldout", NOTHING, "instruction", self.base_samples, asked=asked
        )
        return {"instruction": _Measured("instruction", "", samples, base, Spent(), self.answering(samples, asked))}

    def chosen(self, most: int) -> dict[str, _Measured]:
        """Best of N, for N up to the budget of the loop, and rejection sampling."""
        answers = self.config.evaluation.samples
        seed, name = derive_seed(self.config.seed, "best of"), f"best_of_{most}"
        pool, _ = self.measure(
            self.kept, name, "heldout", NOTHING, f"best of {most}", n=most * answers, seed=seed, measured=most * answers
        )
        found: dict[str, _Measured] = {}
        numbers = sorted({n for n in (2, 4, 8, 16, 32) if n < most} | {most})
        for n in numbers:
            picked = best_of(pool, n, count=answers)
            samples, base = self.again(f"best_of_{n}_of_{most}", picked)
            spent = self.answering(pool) * n + Spent(judged=float(n))
            found[f"best of {n}"] = _Measured("best of N", "", samples, base, Spent(), spent)
        if not compares(self.ranker):
            scores = [s.score for s in self.first if s.score is not None]
            threshold = float(np.quantile(scores, 1 - 1 / most))
            picked, tries = rejection(pool, most, threshold=threshold, count=answers)
            samples, base = self.again(f"rejection_{most}", picked)
            spent = self.answering(pool) * tries + Spent(judged=tries)
            learning = self.spent(self.first)  # where the threshold is from
            found[f"rejection, at most {most}"] = _Measured("rejection", "", samples, base, learning, spent)
        return found

    def again(self, name: str, picked: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Chosen responses, ranked beside the base model's where scores hold only among those ranked together."""
        base = list(self.base_samples)
        for ranker, key in ((self.ranker, "score"), (self.evaluator, "independent")):
            if ranker is None or not compares(ranker):
                continue

            def asked(ranker: Any = ranker, picked: list[Sample] = picked) -> list[list[float]]:
                ours, theirs = rank_beside(ranker, self.prompts, picked, self.base_samples)
                return [[float(s.score or 0.0) for s in side] for side in (ours, theirs or [])]

            ours, theirs = self.kept.json(f"{name}.{key}", asked)
            picked = [replace(s, **{key: v}) for s, v in zip(picked, ours, strict=True)]
            base = [replace(s, **{key: v}) for s, v in zip(base, theirs, strict=True)]
        return picked, base

    def norm(self, plan: SteeringPlan) -> float:
        """Of what a plan adds, in units of the median norm, averaged over layers."""
        shares = [float(v.norm() / self.norms[layer]) for (layer, _), v in plan.vectors().items()]
        return float(np.mean(shares)) if shares else 0.0


def _digest(given: object) -> str:
    """A name for what was given, so that what was computed of something else is not taken for it."""
    return hashlib.sha256(repr(given).encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _after(run: Run, t: int) -> Iteration | None:
    """The iteration that the run's plan would be taken from, had it ended after t."""
    done = run.iterations[:t]
    acts = run.config.guard.mode == "act"
    best = best_iteration(
        [i.decision if acts else None for i in done], [i.evaluation.difference.estimate for i in done]
    )
    return None if best is None else done[best]
