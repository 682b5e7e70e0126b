"""One good example of everything that sims_lens reads, and what reads it: what `fuzz.py` mutates."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import sims_lens as sims
from sims_lens import export, plots
from sims_lens.auditing.result import MEASURES, Audit, MarginBand, PairAudit
from sims_lens.bank import MemoryBank, diagnose
from sims_lens.calibration import Calibration, FluencyBudget, Point
from sims_lens.capture_store import FILE as TOKENS
from sims_lens.capture_store import StoredTokens, writing
from sims_lens.comparison.result import Comparison, Method, Spent, open_comparison
from sims_lens.cost import Cost
from sims_lens.data import Sample, by_prompt
from sims_lens.evaluate import Evaluation, evaluate
from sims_lens.guard import Checks, Decision
from sims_lens.hub import model_card
from sims_lens.plan import Provenance, SteeringPlan
from sims_lens.rankers.cache import JOURNAL, CachedRanker
from sims_lens.report import write_report
from sims_lens.stats import Interval
from sims_lens.store import Folder, RunStore, read_json
from sims_lens.supervised import read_pairs

LAYERS, D_MODEL, STEERED, PROMPTS = 4, 8, 2, 3


@dataclass(frozen=True)
class Artifact:
    """A kind of file.

    Args:
        name: of the kind.
        file: what the file is called; its ending says how it is mutated.
        data: of the good example.
        read: reads it.
        look: looks at all that was read, as a user would: tables, text, figures, pages. Slow, so at some of the cases.
        share: of the cases, relative to the others; less of what is slow.
    """

    name: str
    file: str
    data: bytes
    read: Callable[[Path], object]
    look: Callable[[object], object] = repr
    share: float = 1.0


def artifacts(folder: Path) -> list[Artifact]:
    """Every kind, with its good example; ``folder`` is for making them."""
    texts = ["Tell me about the sea.", 'Was ist "Zeit"?', "日本, שלום 🙂"]
    pairs = [{"prompt": text, "positive": "Good, yes.", "negative": "No."} for text in texts]
    answers = export.Responses(tuple(texts), ("One.", "Two,\nthree.", "Four"))
    write_tokens(folder)
    journal(folder / "journal")
    json_results = {
        "evaluation": (evaluation(1.0), Evaluation.from_json),
        "audit": (audit(), Audit.from_json),
        "calibration": (calibration(), Calibration.from_json),
        "sweep": (sweep(), sims.analysis.LayerSweep.from_json),
    }
    found = [
        Artifact("plan", "plan.safetensors", saved(folder, plan()), SteeringPlan.load, look_at_plan, 3),
        Artifact("plan, all", "plan.safetensors", saved(folder, every_transform()), SteeringPlan.load, look_at_plan, 3),
        Artifact(
            "vectors", "vectors.safetensors", tensors(folder), lambda p: Folder(p.parent).read_tensors(p.stem), share=2
        ),
        Artifact("tokens", TOKENS, (folder / TOKENS).read_bytes(), StoredTokens, list, share=2),
        Artifact("prompts, text", "p.txt", "\n".join(texts).encode(), sims.read_prompts),
        Artifact("prompts, lines", "p.jsonl", jsonl(texts[:1] + [{"prompt": t} for t in texts[1:]]), sims.read_prompts),
        Artifact("prompts, JSON", "p.json", json.dumps(texts).encode(), sims.read_prompts),
        Artifact("prompts, table", "p.csv", csv_of(pairs), sims.read_prompts),
        Artifact("pairs, lines", "pairs.jsonl", jsonl(pairs), read_pairs),
        Artifact("pairs, table", "pairs.csv", csv_of(pairs), read_pairs),
        Artifact("config", "config.json", as_json(sims.SIMSConfig().to_json()), read_config, share=2),
        Artifact(
            "bank",
            "bank.jsonl",
            jsonl(bank().to_rows()),
            lambda p: MemoryBank.from_rows(rows_of(p)),
            share=2,
        ),
        Artifact("samples", "heldout.jsonl", jsonl([asdict(s) for s in samples(0.0)]), read_samples, share=2),
        *(
            Artifact(name, "result.json", as_json(made.to_json()), lambda p, f=read: f(read_json(p)), look_at_result)
            for name, (made, read) in json_results.items()
        ),
        Artifact(
            "comparison", "comparison.json", as_json(comparison(folder).to_json()), open_comparison, look_at_result
        ),
        Artifact("verdicts", JOURNAL, (folder / "journal" / JOURNAL).read_bytes(), read_journal),
        Artifact("gguf", "v.gguf", gguf(), export.from_gguf, share=2),
        Artifact("steerkit", "probe.safetensors", steerkit(folder), export.from_steerkit, share=2),
        Artifact("vllm", "specs.json", vllm(), export.from_vllm),
        Artifact("alpaca-eval", "a.json", alpaca(folder, answers), export.from_alpaca_eval),
        Artifact("arena-hard", "m.jsonl", arena(folder, answers), export.from_arena_hard),
        Artifact("arena-hard questions", "q.jsonl", questions(folder, texts), read_questions(answers)),
        Artifact("answer of a judge", "answer.json", as_json(judge_answer()), read_judge_answer),
    ]
    run = write_run(folder / "run")
    for file in sorted(p for p in run.rglob("*") if p.is_file()):
        inside = str(file.relative_to(run))
        found.append(Artifact(f"run: {inside}", inside, file.read_bytes(), read_run, look_at_run, 0.1))
    return found


# --- reading, and looking at what was read ----------------------------------------------------------------------------


def look_at_plan(found):
    return repr(found), found._repr_html_(), model_card(found), found.scaled(2.0).layers


def look_at_result(found):
    drawn = [] if isinstance(found, Evaluation) else plots.figures(found)
    shown = repr(found), found.to_json(), [figure.to_html(include_plotlyjs=False) for figure in drawn]
    return shown, [getattr(found, name)() for name in ("_repr_html_", "table") if hasattr(found, name)]


def read_tensors(path):
    return Folder(path.parent).read_tensors(path.stem)


def rows_of(path):
    return Folder(path.parent).read_rows(path.stem)


def read_config(path):
    config = sims.SIMSConfig.from_json(read_json(path))
    return config, config.digest


def read_samples(path):
    return by_prompt(Folder(path.parent).read_samples(path.stem))


def read_journal(path):
    ranker = CachedRanker(length, path.parent)
    return ranker.rank_all([("a", ["b", "cc"]), ("d", ["e"])])


def read_questions(answers):
    return lambda path: export.to_arena_hard(answers, path.parent / "answers.jsonl", questions=path)


def read_judge_answer(path):
    from sims_lens.client import _read
    from sims_lens.rankers.endpoint import _answer, verdict_of

    answer = _read(path.read_bytes(), _answer)
    verdict = None if answer is None else verdict_of(answer)
    assert verdict is None or 0.0 <= verdict <= 1.0, f"a verdict of {verdict}"


def read_run(path):
    """The run folder around one file, with its table."""
    run = sims.open_run(next(parent for parent in path.parents if parent.name == "run"))
    return run, run.table(), [i.vectors.shape for i in run.iterations]


def look_at_run(found):
    run, *_ = found
    shown = repr(run), run._repr_html_(), run.verdict(), run.strength_text(), run.best
    return shown, [i.plan.layers for i in run.iterations], write_report(run, run.path.parent / "report.html")


# --- the good examples ------------------------------------------------------------------------------------------------


def vector(seed: int) -> torch.Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def provenance() -> Provenance:
    return Provenance("tiny", "main", "none", LAYERS, D_MODEL, "fuzz", "0" * 12)


def plan() -> SteeringPlan:
    return SteeringPlan.addition(
        {1: vector(1), STEERED: vector(2)}, coefficient=0.2, units="residual_norm", provenance=provenance()
    )


def every_transform() -> SteeringPlan:
    made = [
        sims.Ablation(vector(0)),
        sims.Amplification(vector(1)),
        sims.Clamp(vector(2), 1.5),
        sims.Rotation(vector(3)),
        sims.Gated(sims.Addition(vector(4)), vector(5), 0.5),
        sims.HPR(vector(6), (torch.ones(4, D_MODEL), torch.ones(1, 4)), (torch.zeros(4), torch.zeros(1))),
    ]
    return sum(
        (SteeringPlan.of({1: t}, half_life=8.0, provenance=provenance()) for t in made[1:]),
        SteeringPlan.of({0: made[0]}),
    )


def saved(folder: Path, found: SteeringPlan) -> bytes:
    return found.save(folder / "plan.safetensors").read_bytes()


def tensors(folder: Path) -> bytes:
    made = Folder(folder / "made")
    made.write_tensors("v", {"a": torch.ones(2, 3), "b": torch.zeros(5)}, {"of": "fuzz"})
    return made.read("v.safetensors")


def write_tokens(folder: Path) -> None:
    counts = [2, 0, 3]
    with writing(folder, counts, layers=[0, 1], d_model=4, limit_bytes=1 << 20, site="resid_post", model="m") as file:
        for row, count in enumerate(counts):
            file.write(row, torch.ones(count, 2, 4))


def length(_prompt, responses):
    return [float(len(response)) for response in responses]


def journal(folder: Path) -> None:
    CachedRanker(length, folder).rank_all([("a", ["b", "cc"]), ("d", ["e"])])


def samples(effect: float) -> list[Sample]:
    noise = np.random.default_rng(int(10 * effect)).normal(size=(PROMPTS, 2, 3)).tolist()
    return [
        Sample(
            prompt=i,
            draw=draw,
            tokens=tuple(range(4 + i + draw)),
            text=f"It is {i} and {draw} <b> of four words",
            ended=bool(draw),
            score=5 + effect + noise[i][draw][0],
            independent=noise[i][draw][1],
            nll=1.5 + 0.1 * noise[i][draw][2],
            kl=0.1 * abs(effect),
            kl_95=0.3 * abs(effect),
        )
        for i in range(PROMPTS)
        for draw in range(2)
    ]


def evaluation(effect: float) -> Evaluation:
    return evaluate(samples(effect), samples(0.0))


def bank() -> MemoryBank:
    return MemoryBank(model="m", ranker="r", prompts="p").add(samples(0.0), iteration=1).add(samples(1.0), iteration=2)


def interval(middle: float) -> Interval:
    return Interval(middle, middle - 0.1, middle + 0.1)


def audit() -> Audit:
    measures = {measure.field: interval(0.8) for measure in MEASURES}
    cost = Cost(calls=3, seconds=1.0, prefill=10)
    counts = {measure.field: 12 for measure in MEASURES}
    bands = tuple(MarginBand(k, k + 1.0, interval(0.7)) for k in (0.0, 1.0, 2.0))
    about = {"ranker": "r", "kind": "judge", "reference": "other", "prompts": 4, "responses": 12}
    return Audit(**about, **measures, reference_by_margin=bands, comparisons=counts, cost=cost)


def calibration() -> Calibration:
    points = tuple(Point("a", f, 0.2 * f, evaluation(f), interval(1.1)) for f in (0.5, 1.0))
    cost = {"sample": Cost(seconds=1.0)}
    return Calibration("m", "r", "residual_norm", FluencyBudget(), points, points[0], (4, 4), 2, 0, cost)


def sweep() -> object:
    from sims_lens.analysis import LayerSweep, SweepCell

    cells = tuple(
        SweepCell("a", "resid_post", layer, c, interval(c), interval(0.6), interval(1.1), interval(0.1), 4)
        for layer in (1, 2)
        for c in (0.1, 0.2)
    )
    return LayerSweep(
        "m", "tone", "rise", "teacher-forced", "residual_norm", "all", FluencyBudget(), cells, 4, 0, True, 0
    )


def comparison(folder: Path) -> Comparison:
    random = np.random.default_rng(0)

    def method(name: str, family: str, dose: str = "KL") -> Method:
        made = {n: random.random((2, 3)) for n in ("changes", "wins", "kl", "kl_response", "nll")}
        judged = {n: random.random((2, 3)) for n in ("independent_changes", "independent_wins")}
        seeds = {"even": (0.5, 0.6), "distinct_2": (0.8, 0.9), "norm": (0.2, float("nan"))}
        spent = {"learning": Spent(1.0, 2.0, 3.0, 4.0), "answering": Spent(1.0, 2.0, 3.0, 4.0)}
        return Method(name, family, dose, **made, **judged, scores=random.random((2, 3, 2)), **seeds, **spent)

    methods = (method("loop", "loop"), method("best of 4", "best of N"), method("instruction", "instruction", ""))
    return Comparison(methods, (0, 1), 3, 2, "r", "e", (0.1, 0.2, 0.0), True, folder)


def gguf() -> bytes:
    from sims_lens.export.gguf import _encode

    return _encode({1: vector(1), 2: vector(2)}, hint="llama", model_name="m")


def steerkit(folder: Path) -> bytes:
    from sims_lens.export.vectors import _write_probe

    found = SteeringPlan.addition({1: vector(1)}, scope="all", provenance=provenance())
    _write_probe(provenance(), found, folder / "probe.safetensors")
    return (folder / "probe.safetensors").read_bytes()


def vllm() -> bytes:
    return as_json({f"blocks.{k}.hook_out": {"op": "add", "value": vector(k).tolist()} for k in (1, 2)})


def alpaca(folder: Path, answers: object) -> bytes:
    return export.to_alpaca_eval(answers, folder / "a.json").read_bytes()


def arena(folder: Path, answers: object) -> bytes:
    return export.to_arena_hard(answers, folder / "m.jsonl").read_bytes()


def questions(folder: Path, texts: list[str]) -> bytes:
    return export.arena_hard_questions(texts, folder / "q.jsonl").read_bytes()


def judge_answer() -> dict:
    likely = [{"token": "A", "logprob": -0.4}, {"token": " B", "logprob": -1.5}]
    choice = {"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": likely}]}}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}


def write_run(path: Path) -> Path:
    """A finished run of two iterations with every kind of file in it, of made-up figures."""
    config = sims.SIMSConfig(
        iterations=2,
        steering=sims.SteeringConfig(strength=0.2),
        evaluation=sims.EvaluationConfig(controls=2, samples=2),
    )
    split = ["heldout"] * PROMPTS + ["validation"] * 2 + ["train"] * PROMPTS
    header = {"config": config.to_json(), "model": asdict(provenance()), "ranker": "r", "evaluator": "e"}
    rows = [{"prompt": f"Prompt {i}?", "split": name} for i, name in enumerate(split)]
    store = RunStore(path)
    store.begin({**header, "versions": {"python": "3.11"}}, rows)

    def finish(folder: Folder, metrics: object) -> None:
        folder.json("metrics", lambda: metrics)
        folder.spend("sample", Cost(seconds=1.0, prefill=1000, decode=2345, flops=3e12, peak=2 * 10**9))
        folder.finish()

    folder = store.folder("audit")
    folder.json("audit", lambda: audit().to_json())
    folder.finish()
    folder = store.folder("base")
    folder.samples("heldout", lambda: samples(0.0))
    finish(folder, {"evaluation": evaluation(0.0).to_json()})
    tried = {str(layer): evaluation(layer / 4).to_json() for layer in (1, STEERED)}
    finish(store.folder("choice"), {"chosen": STEERED, "layers": tried})
    for t in (1, 2):
        folder = store.iteration(t)
        made = torch.stack([vector(10 * t + layer) for layer in range(LAYERS)])
        shuffled, norms = torch.randn(2, LAYERS, D_MODEL), torch.linspace(4, 7, LAYERS)
        held = {"mean_difference": made, "shuffled": shuffled, "median_norm": norms}
        folder.tensors("vectors", lambda held=held: {**held, "split_half": torch.linspace(0.3, 0.8, LAYERS)})
        folder.write(
            "plan.safetensors", SteeringPlan.addition({STEERED: made[STEERED]}, provenance=provenance()).to_bytes()
        )
        folder.samples("heldout", lambda t=t: samples(float(t)))
        folder.write_samples("samples", samples(t / 2))
        checks = Checks(interval(1.0), interval(0.5), interval(0.4), interval(1.2), 0.9, 0.3, 0.8)
        metrics = {
            "evaluation": evaluation(float(t)).to_json(),
            "diagnostics": replace(diagnose((), iteration=t), pairs=3, margin=2.0).to_json(),
            "dropped": {"empty": 0, "margin": 0, "tie": 1},
            "audit": PairAudit("r", "e", 3, interval(0.9), interval(0.9)).to_json(),
            "guard": Decision("accept", "It has an effect.", False, checks).to_json(),
            "coefficients": [0.1] * t,
            "tries": 1,
        }
        finish(folder, metrics)
    finish(store.folder("controls"), {"controls": [evaluation(0.1 * k).to_json() for k in (1, 2)]})
    store.stop("Two iterations in a row gained nothing.", after=2)
    return path


def as_json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_of(pairs: list[dict[str, str]]) -> bytes:
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "positive", "negative"])
    writer.writeheader()
    writer.writerows(pairs)
    return text.getvalue().encode()
