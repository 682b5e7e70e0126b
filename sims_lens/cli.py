"""The command line: ``sims-lens demo | improve | plan | fit | generate | export | report``.

Exit codes: 0 done, 2 something that was given can't be used (one line says what and what to do), 130 interrupted; an
interrupted run goes on when the same command is given again. What ``--json`` writes is JSON as the standard has it: a
number that is not finite is null.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

from sims_lens.checks import check_integer, check_number, check_path, check_seed
from sims_lens.config import GuardConfig, SamplingConfig, SIMSConfig
from sims_lens.errors import ConfigError, ExportError, FitError, PlanError, SimsError
from sims_lens.terminal import plain, say

if TYPE_CHECKING:
    from sims_lens.plan import SteeringPlan
    from sims_lens.run import Run

DEMO_PROMPTS = 125  # 56 to train on, 19 to choose the layer, 50 held out


@dataclass(frozen=True)
class Demo:
    """The whole loop on the embedded model, offline: it learns to write more readable text (or more cheerful text,
    with --ranker vader) from unlabelled prompts, in four to eight minutes on two cores."""

    ranker: str = "reading-ease"
    """What the loop is to improve: reading-ease, vader, self (the model judges itself), or package.module:function."""
    criterion: str = "more helpful"
    """What the model judges by, with --ranker self. The embedded model is no judge of every one: the audit says so."""
    evaluator: str | None = None
    """A second ranker that the loop never learns from, reported beside the first; vader with --ranker self."""
    out: Path = Path("runs/demo")
    """The run directory; one that holds this run already is gone on with."""
    kind: str = "bridge"
    """hooked or bridge; a TransformerBridge decodes faster."""
    iterations: int = 3
    """Turns of the loop."""
    seed: int = 0
    """Of everything that is random."""
    json: Path | None = None
    """Write a machine-readable result here."""

    def run(self) -> dict[str, Any]:
        """Run the demo and show it."""
        from sims_lens.prompts import everyday

        config = SIMSConfig(iterations=self.iterations, seed=self.seed)
        judges = _Judges(self.ranker, self.criterion, self.evaluator or ("vader" if self.ranker == "self" else None))
        return _improve("embedded", None, self.kind, everyday(DEMO_PROMPTS), judges, config, self.out)


@dataclass(frozen=True)
class Improve:
    """Let a model improve its own steering on your prompts."""

    prompts: Path
    """Unlabelled prompts: .jsonl, .json, .txt (one per line) or .csv."""
    model: str = "embedded"
    """Hub id, local folder, or "embedded"."""
    revision: str | None = None
    """Hub revision to pin."""
    kind: str | None = None
    """hooked or bridge; by default HookedTransformer where the installed TransformerLens has it."""
    ranker: str = "reading-ease"
    """reading-ease, vader, self (the model judges itself), or package.module:function for one of your own."""
    criterion: str = "more helpful"
    """What the model judges by, with --ranker self."""
    evaluator: str | None = None
    """A second ranker that the loop never learns from, reported beside the first."""
    out: Path = Path("runs/improve")
    """The run directory; one that holds this run already is gone on with."""
    config: Annotated[SIMSConfig, arg(name="")] = field(default_factory=SIMSConfig)
    json: Path | None = None
    """Write a machine-readable result here."""

    def run(self) -> dict[str, Any]:
        """Run the loop and show what came out."""
        from sims_lens.prompts import read_prompts

        prompts = read_prompts(self.prompts)
        judges = _Judges(self.ranker, self.criterion, self.evaluator)
        return _improve(self.model, self.revision, self.kind, prompts, judges, self.config, self.out)


@dataclass(frozen=True)
class Plan:
    """What a run would take, before it starts: time, memory, money, and what will hurt first. docs/scaling.md."""

    prompts: int
    """How many."""
    model_size: str = "135M"
    """Parameters, such as 8B, or a folder with a config.json."""
    hardware: str = "cpu"
    """h100, a100, l4 or cpu (one thread)."""
    gpus: int = 1
    """How many of it."""
    prompt_tokens: float = 60.0
    """Of a prompt, chat template included, on average."""
    response_tokens: float | None = None
    """Of a response, on average; by default max-new-tokens."""
    judge: str = "function"
    """function, self (the model), reward-model (one of the model's size) or endpoint."""
    judge_per_second: float = 4.0
    """Calls that an endpoint answers per second."""
    judge_price: tuple[float, float] | None = None
    """Dollars for a million tokens that an endpoint reads, and that it writes."""
    dollars_per_hour: float | None = None
    """Of one GPU, where yours isn't the default's."""
    sampler: str = "local"
    """local or vllm."""
    config: Annotated[SIMSConfig, arg(name="")] = field(default_factory=SIMSConfig)
    json: Path | None = None
    """Write a machine-readable result here."""

    def run(self) -> dict[str, Any]:
        """Foretell, and say it."""
        from sims_lens.planning import MACHINES, Shape, Workload, forecast

        if self.hardware not in MACHINES:
            raise ConfigError(f"hardware {self.hardware!r} is not one of {', '.join(MACHINES)}")
        machine = MACHINES[self.hardware]
        if self.dollars_per_hour is not None:
            machine = replace(machine, dollars_per_hour=self.dollars_per_hour)
        work = Workload(
            Shape.of(self.model_size),
            self.prompts,
            prompt_tokens=self.prompt_tokens,
            response_tokens=self.response_tokens,
            config=self.config,
            judge=self.judge,
            judge_price=self.judge_price,
            judge_per_second=self.judge_per_second,
            sampler=self.sampler,
        )
        found = forecast(work, machine, gpus=self.gpus)
        say(found)
        say(f"  machine: {machine.source}")
        return found.to_json()


@dataclass(frozen=True)
class Compare:
    """Run the loop beside what it has to beat: best of N, one-shot, an instruction, supervised pairs, at equal dose."""

    prompts: Path
    """Unlabelled prompts: .jsonl, .json, .txt (one per line) or .csv."""
    instruction: str = ""
    """What is wanted, in words: the model is told so in its prompt. Left out by default."""
    pairs: Path | None = None
    """Contrast pairs for supervised steering, .jsonl or .csv. Left out by default."""
    dpo: bool = False
    """Train the weights on the loop's pairs too, with LoRA; needs pip install "sims-lens[dpo]"."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs, each the whole procedure on the same held-out prompts."""
    model: str = "embedded"
    """Hub id, local folder, or "embedded"."""
    revision: str | None = None
    """Hub revision to pin."""
    kind: str | None = None
    """hooked or bridge; by default HookedTransformer where the installed TransformerLens has it."""
    ranker: str = "reading-ease"
    """reading-ease, vader, self (the model judges itself), or package.module:function for one of your own."""
    criterion: str = "more helpful"
    """What the model judges by, with --ranker self."""
    evaluator: str | None = None
    """A second ranker that nothing learns from or chooses by."""
    out: Path = Path("runs/compare")
    """A folder; what is there is not computed again."""
    config: Annotated[SIMSConfig, arg(name="")] = field(
        default_factory=lambda: SIMSConfig(guard=GuardConfig(mode="report"))
    )
    html: Path | None = None
    """Write the figure as a page here."""
    json: Path | None = None
    """Write a machine-readable result here."""

    def run(self) -> dict[str, Any]:
        """Compare, and show the table."""
        from sims_lens.comparison import DPOConfig, compare
        from sims_lens.models import load
        from sims_lens.prompts import read_prompts
        from sims_lens.supervised import read_pairs

        _check_file(self.html, "--html")
        prompts = read_prompts(self.prompts)
        pairs = () if self.pairs is None else read_pairs(self.pairs)
        ranker, evaluator = _Judges(self.ranker, self.criterion, self.evaluator).load()
        say(f"loading {self.model} ...", file=sys.stderr)
        found = compare(
            load(self.model, revision=self.revision, kind=self.kind),
            prompts,
            ranker=ranker,
            evaluator=evaluator,
            instruction=self.instruction,
            pairs=pairs,
            dpo=[DPOConfig()] if self.dpo else (),
            seeds=self.seeds,
            config=self.config,
            out=self.out,
        )
        say(found)
        if self.html is not None:
            _page(self.html, found)
        return found.to_json()


@dataclass(frozen=True)
class Fit:
    """Fit a steering plan to contrast pairs that you have, without the loop."""

    pairs: Path
    """Contrast pairs, .jsonl or .csv, with "prompt", "positive" and "negative"."""
    out: Path
    """The plan file to write (.safetensors)."""
    model: str = "embedded"
    """Hub id, local folder, or "embedded"."""
    revision: str | None = None
    """Hub revision to pin."""
    kind: str | None = None
    """hooked or bridge; by default HookedTransformer where the installed TransformerLens has it."""
    estimator: str = "mean_difference"
    """mean_difference, pca, pca_classes, logistic_probe, mass_mean, whitened_mean_difference, hpr, or a null control:
    random_direction, shuffled_mean_difference."""
    layers: tuple[int, ...] = ()
    """Where to steer; by default where positive and negative are told apart best on held-out pairs."""
    site: str = "resid_post"
    """resid_pre, resid_post, attn_out or mlp_out."""
    coefficient: float | None = None
    """Of an addition in units of the median residual norm, 0.2 by default; of any other transform its strength, 1."""
    scope: str = "generation"
    """The tokens that are steered: all, prompt, last_prompt, response or generation."""
    seed: int = 0
    """Of the held-out splits."""
    json: Path | None = None
    """Write a machine-readable result here."""

    def run(self) -> dict[str, Any]:
        """Fit, save and show."""
        from sims_lens.estimators import ESTIMATORS
        from sims_lens.models import load
        from sims_lens.scope import TokenScope
        from sims_lens.supervised import fit, read_pairs

        if self.estimator not in ESTIMATORS:
            raise FitError(f"estimator {self.estimator!r} is not one of {', '.join(ESTIMATORS)}")
        scope = TokenScope.of(self.scope)
        pairs = read_pairs(self.pairs)
        _check_file(self.out, "--out")
        say(f"loading {self.model} ...", file=sys.stderr)
        model = load(self.model, revision=self.revision, kind=self.kind)
        found = fit(model, pairs, estimator=ESTIMATORS[self.estimator](), site=self.site, seed=self.seed)
        plan = found.plan(self.layers or None, coefficient=self.coefficient, scope=scope)
        plan.save(self.out)
        say(found)
        say(f"\n{plan}\n\nsaved: {self.out}")
        say(f'try it:  sims-lens generate --run {self.out} --prompt "Tell me about the sea."')
        return {
            "plan": str(self.out),
            "layers": list(plan.layers),
            "quality": found.table().reset_index().to_dict("list"),
        }


@dataclass(frozen=True)
class Export:
    """Write a run's plan, or a plan file, for another tool; refused where that tool would steer differently. Or write
    a run's held-out responses for a public judge: alpaca-eval, arena-hard."""

    run_dir: Annotated[Path, arg(name="run")]
    """A run directory, or a plan file (.safetensors)."""
    to: str
    """baked (a checkpoint folder for any engine), gguf (llama.cpp), lm-eval, steerkit or vllm; or, of a run's
    responses, alpaca-eval (FILE.json) or arena-hard (MODEL.jsonl)."""
    out: Path
    """The file or folder to write."""
    all_tokens: bool = False
    """Export the plan as it would act on every token: most formats can't hold any other scope."""
    iteration: int | None = None
    """For responses: of which iteration, 0 for the base model; by default that of the run's plan."""
    questions: Path | None = None
    """For arena-hard: the benchmark's question.jsonl, whose ids are taken; by default ids are made of the prompts."""
    model: str | None = None
    """Hub id, local folder or "embedded"; by default the model that the plan was made on."""
    kind: str | None = None
    """hooked or bridge."""
    json: Path | None = None
    """Write a machine-readable result here."""

    def run(self) -> dict[str, Any]:
        """Export and say how near it is to the native run."""
        from sims_lens import export

        formats = {
            "baked": export.bake,
            "gguf": export.to_gguf,
            "lm-eval": export.to_lm_eval,
            "steerkit": export.to_steerkit,
            "vllm": export.to_vllm,
        }
        if self.to in ("alpaca-eval", "arena-hard"):
            return self._responses()
        if self.to not in formats:
            raise ExportError(f"format {self.to!r} is not one of {', '.join(formats)}, alpaca-eval, arena-hard")
        plan, model = _planned(self.run_dir, self.model, self.kind)
        done = formats[self.to](model, plan.on("all") if self.all_tokens else plan, self.out)
        say(done)
        return {"path": str(done.path), "format": done.format, "error": done.error, "tokens": done.tokens}

    def _responses(self) -> dict[str, Any]:
        from sims_lens import export
        from sims_lens.run import open_run

        if not self.run_dir.is_dir():
            raise ExportError(f"{self.run_dir} is no run directory; only a run holds responses")
        found = export.run_responses(open_run(self.run_dir), self.iteration)
        if self.to == "alpaca-eval":
            path = export.to_alpaca_eval(found, self.out)
        else:
            path = export.to_arena_hard(found, self.out, questions=self.questions)
        say(f"{len(found.prompts)} responses for {self.to} at {path}")
        return {"path": str(path), "format": self.to, "responses": len(found.prompts)}


@dataclass(frozen=True)
class Generate:
    """Answer prompts with the base model and the steered one, side by side."""

    run_dir: Annotated[Path, arg(name="run")]
    """A run directory, or a plan file (.safetensors)."""
    prompt: tuple[str, ...]
    """One prompt or several."""
    model: str | None = None
    """Hub id, local folder or "embedded"; by default the model that the run was made on."""
    kind: str | None = None
    """hooked or bridge."""
    samples: int = 1
    """Responses to each prompt."""
    scale: float = 1.0
    """Multiplies the plan's coefficients; a negative one steers the other way."""
    max_new_tokens: int = 60
    """Longest response."""
    seed: int = 0
    """Of the sampling."""
    json: Path | None = None
    """Write a machine-readable result here."""

    def run(self) -> dict[str, Any]:
        """Sample and print."""
        from sims_lens.plan import NOTHING
        from sims_lens.prompts import check_prompts
        from sims_lens.sampling import LocalSampler

        prompts = check_prompts(self.prompt)
        sampling = SamplingConfig(max_new_tokens=self.max_new_tokens)
        check_integer("--samples", self.samples)
        check_number("--scale", self.scale)
        check_seed(self.seed, "--seed")
        plan, model = _planned(self.run_dir, self.model, self.kind)
        sampler = LocalSampler(model, sampling)
        answers = {
            label: sorted(
                sampler.sample(prompts, n=self.samples, plan=p, seed=self.seed), key=lambda s: (s.prompt, s.draw)
            )
            for label, p in (("base", NOTHING), ("steered", plan.scaled(self.scale)))
        }
        rows = [
            {"prompt": prompts[base.prompt], "draw": base.draw, "base": base.text, "steered": steered.text}
            for base, steered in zip(answers["base"], answers["steered"], strict=True)
        ]
        for row in rows:
            say(f"\n{plain(str(row['prompt']))}")
            say(f"  base     {plain(str(row['base']))}\n  steered  {plain(str(row['steered']))}")
        return {"plan": repr(plan), "scale": self.scale, "seed": self.seed, "responses": rows}


@dataclass(frozen=True)
class Sweep:
    """Where to steer, and how strongly: every layer at every coefficient, with effect, fluency and intervals."""

    run_dir: Annotated[Path, arg(name="run")]
    """A run directory, or a plan file (.safetensors)."""
    pairs: Path | None = None
    """Contrast pairs to measure on, .jsonl or .csv, not those that the plan was fitted to; by default the best and the
    worst of the base model's held-out responses, where a run directory is given."""
    ranker: str | None = None
    """Measure sampled responses by this ranker instead: reading-ease, vader, or package.module:function."""
    prompts: Path | None = None
    """Prompts for --ranker; a run's held-out prompts by default."""
    coefficients: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    """In median residual norms."""
    layers: tuple[int, ...] = ()
    """All that there are directions for by default."""
    out: Path | None = None
    """A folder for what is finished: the same command goes on where it stopped."""
    html: Path | None = None
    """Write the heat-map and the frontier as one page here."""
    model: str | None = None
    """Hub id, local folder or "embedded"; by default the model that the run was made on."""
    kind: str | None = None
    """hooked or bridge."""
    seed: int = 0
    """Of the order of the pairs and of sampling."""
    json: Path | None = None
    """Write a machine-readable result here."""

    def run(self) -> dict[str, Any]:
        """Sweep, and show the table."""
        from sims_lens.analysis import layer_sweep
        from sims_lens.prompts import read_prompts
        from sims_lens.run import open_run
        from sims_lens.supervised import read_pairs

        if self.pairs is not None and self.ranker is not None:
            raise PlanError("give --pairs or --ranker, not both")
        if self.run_dir.is_file() and self.pairs is None and self.ranker is None:
            raise PlanError("give --pairs or --ranker: a plan file holds no texts to measure on")
        _check_file(self.html, "--html")
        ranker = None if self.ranker is None else _ranker(self.ranker)
        pairs = None if self.pairs is None else read_pairs(self.pairs)
        prompts = None if self.prompts is None else read_prompts(self.prompts)
        plan, model = _planned(self.run_dir, self.model, self.kind)
        found = layer_sweep(
            model,
            plan if self.run_dir.is_file() else open_run(self.run_dir),
            coefficients=self.coefficients,
            layers=self.layers or None,
            behaviour=pairs,
            ranker=ranker,
            prompts=prompts,
            out=self.out,
            seed=self.seed,
        )
        say(found)
        if self.html is not None:
            _page(self.html, found)
        return found.to_json()


@dataclass(frozen=True)
class Report:
    """Write a run as one self-contained HTML page."""

    run_dir: Positional[Annotated[Path, arg(name="run")]]
    """A run directory."""
    out: Path | None = None
    """Where to write; report.html in the run directory by default."""
    microscope: bool = False
    """Also load the model and look at the directions: layer sweep, norms, similarity and what they write. Minutes."""
    model: str | None = None
    """For --microscope: hub id, local folder or "embedded"; by default the model that the run was made on."""
    json: Path | None = None
    """Write a machine-readable result here."""

    def run(self) -> dict[str, Any]:
        """Write the page."""
        from sims_lens.report import write_report
        from sims_lens.run import open_run

        run = open_run(self.run_dir)
        path = write_report(run, self.out, analyses=_microscope(run, self.model) if self.microscope else ())
        say(f"report: {path}")
        return {**summary(run), "report": str(path)}


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": Demo,
    "improve": Improve,
    "plan": Plan,
    "compare": Compare,
    "fit": Fit,
    "generate": Generate,
    "sweep": Sweep,
    "export": Export,
    "report": Report,
}


def _microscope(run: "Run", name: str | None) -> list[object]:
    """What the report shows of a run's directions."""
    from sims_lens import analysis

    _, model = _planned(run.path, name, None)
    return [
        analysis.layer_sweep(model, run),
        analysis.vector_norms(model, run),
        analysis.direction_similarity(run, model=model),
        analysis.readout(model, run),
    ]


def _planned(path: Path, name: str | None, kind: str | None) -> tuple["SteeringPlan", Any]:
    """The plan of a run directory or a file, and the model to steer: the one given, or that it was made on."""
    from sims_lens.models import EMBEDDED, load
    from sims_lens.plan import SteeringPlan
    from sims_lens.run import open_run

    if not check_path(path).exists():
        raise PlanError(f"there is no plan or run at {path}")
    plan = SteeringPlan.load(path) if path.is_file() else open_run(path).plan
    if not plan.interventions:
        raise PlanError(f"the plan at {path} steers nothing: it has no interventions; give another one")
    name = name or plan.provenance.model
    return plan, load("embedded" if name in (EMBEDDED, "") else name, kind=kind)


def _check_file(path: Path | None, option: str) -> None:
    """Raise unless a file can be written there: told before anything is computed."""
    if path is None:
        return
    check_path(path)
    if not path.parent.is_dir():
        raise PlanError(f"folder {path.parent} of {option} {path} does not exist; create it first")
    if path.is_dir():
        raise PlanError(f"{option} {path} is a folder; name a file in it")


def _finite(value: Any) -> Any:
    """The same with null for each number that JSON has not."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(path: Path, result: object) -> None:
    """The figures of a result as one page."""
    from sims_lens.plots import figures
    from sims_lens.report import write_figures

    say(f"figures: {write_figures(figures(result), path, title=f'{type(result).__name__} by sims_lens')}")


def _ranker(name: str) -> object:
    """A ranker by its name. A module of the user's is looked for in the folder at hand too, and there last: a file that
    lies there, with a run from a stranger, must not be taken for an installed package."""
    from sims_lens.rankers import get_ranker

    if ":" in name and "" not in sys.path:
        sys.path.append("")
    return get_ranker(name)


@dataclass(frozen=True)
class _Judges:
    """The rankers that were asked for, by name."""

    ranker: str
    criterion: str
    evaluator: str | None

    def load(self) -> tuple[object, object | None]:
        """The ranker and the evaluator."""
        from sims_lens.rankers.self_judge import SelfJudge

        ranker = SelfJudge(self.criterion) if self.ranker == "self" else _ranker(self.ranker)
        return ranker, None if self.evaluator is None else _ranker(self.evaluator)


def _improve(
    model: str,
    revision: str | None,
    kind: str | None,
    prompts: Sequence[str],
    judges: _Judges,
    config: SIMSConfig,
    out: Path,
) -> dict[str, Any]:
    """What ``demo`` and ``improve`` share. The rankers are looked up first: they are the cheapest to get wrong."""
    ranker, evaluator = judges.load()
    say(f"loading {model} ...", file=sys.stderr)
    from sims_lens.loop import improve
    from sims_lens.models import load
    from sims_lens.report import write_report

    loaded = load(model, revision=revision, kind=kind)
    if (out / "run.json").is_file():
        say(f"{out} holds this run already: going on where it stopped", file=sys.stderr)
    run = improve(loaded, prompts, ranker=ranker, evaluator=evaluator, config=config, out=out)
    say(run)
    say(f"\n{examples(run)}\n")
    say(f"report: {write_report(run)}")
    say(f'try it:  sims-lens generate --run {out} --prompt "Tell me about the sea."')
    return summary(run)


def examples(run: "Run", count: int = 3) -> str:
    """The first draws to a few held-out prompts, base and steered."""
    base = {s.prompt: s for s in run.samples(0) if s.draw == 0}
    steered = {s.prompt: s for s in run.samples(run.best.index if run.best else 0) if s.draw == 0}
    parts = []
    for index in run.indices("heldout")[:count]:
        parts.append(
            f"{plain(run.prompts[index])}\n"
            f"  base     ({base[index].score:6.1f})  {plain(base[index].text)}\n"
            f"  steered  ({steered[index].score:6.1f})  {plain(steered[index].text)}"
        )
    return "\n".join(parts)


def summary(run: "Run") -> dict[str, Any]:
    """A run as plain JSON: what the table shows, and how it was made."""
    return {
        "path": str(run.path),
        "complete": run.complete,
        "model": run.model.model,
        "ranker": run.ranker,
        "config": run.config.to_json(),
        "layers": list(run.plan.layers) if run.iterations else [],
        "base": run.base.to_json(),
        "iterations": [i.evaluation.to_json() for i in run.iterations],
        "controls": [e.to_json() for e in run.controls],
        "null_band": run.null_band.to_json() if run.null_band else None,
        "beats_controls": run.beats_controls,
        "adjusted_p": run.adjusted_p(),
        "best": run.best.index if run.best else None,
        "stopped": run.stopped,
        "guard": [i.decision.to_json() if i.decision else None for i in run.iterations],
        "cost": {phase: spent.to_json() for phase, spent in run.cost.items()},
        "verdict": run.verdict(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="sims-lens",
            description="Self-improving model steering for TransformerLens.",
            args=arguments,
        )
        _check_file(command.json, "--json")
        result = command.run()
        if command.json is not None:
            text = json.dumps(_finite(result), indent=2, default=str, allow_nan=False)
            command.json.write_text(text + "\n", encoding="utf-8")
    except SimsError as error:
        say(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # what reads the output has seen enough, as `| head` does
        sys.stdout = None
        return 141
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        said = plain(where + (error.strerror or str(error)))
        print(f"error: {said}; check the path, its rights and the room on the disk", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("\ninterrupted; give the same command again to go on", file=sys.stderr)
        return 130
    return 0
