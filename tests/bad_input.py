"""What may be wrong with an argument, by its name, and a call that works of every public function.

A test takes such a call, replaces one argument by a bad value, and sees what comes of it. An argument means the same in
every function (``layers``, ``site``, ``prompts``), so what may be wrong with it is written down once, here.
"""

import functools
import inspect
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from common import D_MODEL, vector
from test_plots import write_run
from torch import nn

import sims_lens as sims
from sims_lens.data import Sample
from sims_lens.plan import NOTHING

N_CTX = tiny.N_CTX
PROMPTS = [f"Say {word}." for word in ("sea", "sky", "sun", "rain", "snow", "wind", "tree", "leaf")]
PAIRS = [(prompt, f"yes {k}", f"no, {k}") for k, prompt in enumerate(PROMPTS)]
ROWS = [([10, 11, 12], [13, 14]), ([10, 15], [16, 17, 18]), ([19, 20], [21]), ([22], [23, 24])]
SAMPLES = [
    Sample(prompt=p, draw=d, tokens=(65 + d, 66), text="AB"[d:], ended=False, score=float(d))
    for p in (0, 1)
    for d in (0, 1)
]
SMALL = sims.SamplingConfig(responses=2, max_new_tokens=4)
CONFIG = sims.SIMSConfig(
    iterations=1,
    sampling=SMALL,
    ranking=sims.RankingConfig(audit="off"),
    steering=sims.SteeringConfig(layers=(1,), strength=0.3),
    evaluation=sims.EvaluationConfig(samples=2, controls=1),
    guard=sims.GuardConfig(mode="report"),
)


def letters(prompt: str, responses: Sequence[str]) -> list[float]:
    """A ranker that random text differs in."""
    return [float(sum(map(ord, response)) % 101) for response in responses]


class Silent:
    """A sampler that says nothing."""

    count = None

    def sample(self, prompts: Sequence[str], *, n: int, plan: Any, seed: int) -> list[Sample]:
        """Samples without a token."""
        return [Sample(index, draw, (), "", True) for index in range(len(prompts)) for draw in range(n)]


class Lab:
    """What the calls are made on: tiny models, a plan for them, a run, results of analyses; each made once.

    Args:
        model: the model that the calls get.
        others: models in a state that they can't be used in, or must be used with care, by what it is.
        folder: for files.
    """

    def __init__(self, model: Any, others: Mapping[str, Any], folder: Path) -> None:
        self.model, self.others, self.folder = model, others, folder
        self.plan = sims.SteeringPlan.addition({1: vector(1)}, coefficient=2.0, scope="all")
        self.constant = sims.SteeringPlan.addition({1: vector(1)}, coefficient=0.1, scope="all")
        self.behaviour = sims.PairBehaviour(PAIRS[:3])
        self.named = {"a": {0: vector(0), 1: vector(1)}, "b": {0: vector(2), 1: vector(3)}}
        self.rows = torch.randn(8, 3, D_MODEL, generator=torch.Generator().manual_seed(0))
        self.other_rows = self.rows + torch.randn(8, 3, D_MODEL, generator=torch.Generator().manual_seed(1))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "not-utf-8.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
        (folder / "empty.jsonl").write_text("")
        (folder / "empty.txt").write_text("")
        (folder / "empty.csv").write_text("")
        (folder / "list.json").write_text("[1, 2]")
        (folder / "object.json").write_text("{}")
        (folder / "null.jsonl").write_text("null\n")
        (folder / "deep.json").write_text("[" * 100_000)
        (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 4)
        (folder / "noise.gguf").write_bytes(b"GGUF" + bytes(range(256)))
        (folder / "folder.jsonl").mkdir(exist_ok=True)
        (folder / "folder.safetensors").mkdir(exist_ok=True)
        (folder / "run-without-json").mkdir(exist_ok=True)
        damaged = folder / "damaged-run"
        damaged.mkdir(exist_ok=True)
        (damaged / "run.json").write_text("{}")

    @functools.cached_property
    def run(self) -> sims.Run:
        """A finished run of another model, with figures to draw."""
        return write_run(self.folder / "run", iterations=2, heldout=6, controls=2)

    @functools.cached_property
    def own_run(self) -> sims.Run:
        """A finished run of this model."""
        prompts = [
            f"Say {word}." for word in ["sea", "sky", "sun", "rain", "snow", "wind", "tree", "leaf", "root", "bird"]
        ]
        return sims.improve(self.model, prompts, ranker=letters, config=CONFIG, out=self.folder / "own", progress=False)

    @functools.cached_property
    def fitted(self) -> sims.SteeringFit:
        """A fit."""
        return sims.fit(self.model, PAIRS, progress=False)

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """Results to draw, by the name of the function that makes them."""
        model, pairs, plan = self.model, self.behaviour, self.plan
        named, quiet = self.named, {"progress": False}
        scored = [replace(s, score=1.0) for s in SAMPLES]
        return {
            "fit": self.fitted,
            "sweep": sims.layer_sweep(model, named, coefficients=(0.1, 0.2), behaviour=pairs, **quiet),
            "norms": sims.vector_norms(model, named, **quiet),
            "similarity": sims.direction_similarity(named),
            "readout": sims.readout(model, named, **quiet),
            "scores": sims.token_scores(model, PAIRS[0][:2], self.plan, layer=1),
            "leave_one_out": sims.leave_one_out(model, plan, pairs, controls=1, **quiet),
            "ablation": sims.directional_ablation(model, named["a"], pairs, layer=1, controls=1, **quiet),
            "effects": sims.component_effects(model, plan, pairs, exact=2, **quiet),
            "readers": sims.direction_readers(model, plan, pairs, exact=2, **quiet),
            "attribution": sims.logit_attribution(model, PAIRS[0][:2], plan, answer="y"),
            "interaction": sims.interaction(
                model, {"a": plan, "b": -plan}, {"r": letters}, PROMPTS, sampling=SMALL, **quiet
            ),
            "calibration": sims.calibrate(
                model, plan, prompts=PROMPTS, ranker=letters, factors=(0.5, 1.0), refine=0, sampling=SMALL, **quiet
            ),
            "audit": sims.audit(letters, PROMPTS[:3], [["a", "b"], ["c", "d"], ["e", "f"]], repeats=1),
            "failures": sims.lab.failures(scored, scored, PROMPTS[:2]),
            "steerability": sims.lab.steerability(model, plan, pairs, coefficients=(-1.0, 0.0, 1.0), **quiet),
        }

    def written(self, export: str, name: str) -> Path:
        """The constant plan in another tool's format."""
        if not (path := self.folder / name).exists():
            getattr(sims.export, export)(self.model, self.constant, path)
        return path

    def path(self, name: str) -> Path:
        """A path to write to that is not there yet."""
        return self.folder / name


# What may be wrong with an argument

nan, inf = math.nan, math.inf
_TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[31mred\x07",
    "\r\n\t",
    "\ud800 half a pair",
    "a\u202ebc",
    "שלום עולם, مرحبا بالعالم",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301" * 20,
    "<s>[user] a</s>[assistant] b</s>",
    "</s>",
    "x" * (N_CTX - 20),
    "x" * N_CTX,
    "x" * 5000,
)
_NO_TEXT = (None, 3, b"bytes", ["a list"], nan)
_INTS = (-1, 0, 1.5, nan, inf, "2", None, True, [1])
_NUMBERS = (nan, inf, -inf, -1.0, 0.0, 1e30, 1e-30, 1e300, 10**400, "1", None, True, [0.5])
_TENSORS = (
    torch.full((D_MODEL,), nan),
    torch.full((D_MODEL,), inf),
    torch.zeros(D_MODEL),
    torch.ones(D_MODEL + 1),
    torch.ones(0),
    torch.ones(2, 2, 2, 2),
    torch.tensor(1.0),
    torch.ones(D_MODEL, dtype=torch.long),
    torch.ones(D_MODEL, dtype=torch.bfloat16),
    torch.ones(D_MODEL, device="meta"),
    torch.ones(D_MODEL, dtype=torch.complex64),
    torch.ones(D_MODEL).to_sparse(),
    [1.0] * D_MODEL,
    np.ones(D_MODEL),
    None,
    "vector",
)


def _lists_of(items: Sequence[Any], good: Any = None) -> tuple[Any, ...]:
    """Lists with one bad item, and things that are no list."""
    return (
        *((good, item) if good is not None else (item,) for item in items),
        [],
        17,
        "ab",
        None,
        {1: 2},
        {3},
        b"ab",
        [None],
    )


def _rankers() -> tuple[Any, ...]:
    def returning(value: Any) -> Callable[..., Any]:
        return lambda _prompt, responses: [value] * len(responses)

    def raising(_prompt: str, _responses: Sequence[str]) -> list[float]:
        raise ZeroDivisionError("on\npurpose\x1b")

    return (
        returning(nan),
        returning(inf),
        returning(1.0),
        returning("1"),
        returning(None),
        returning(10**400),
        returning([1.0]),
        lambda _prompt, _responses: [],
        lambda _prompt, responses: [1.0] * (len(responses) + 1),
        lambda _prompt, responses: torch.rand(len(responses), 2),
        lambda _prompt, _responses: 1.0,
        lambda _prompt: [1.0],
        raising,
        None,
        "reading-ease",
        3,
        sims.ReadingEase,
        object(),
    )


_LAYERS = (-1, 3, 17, 2**70, 1.5, nan, "1", True, None, [1])
_PATHS = (
    "missing",
    "missing/folder/x.safetensors",
    "missing.jsonl",
    "not-utf-8.jsonl",
    "empty.jsonl",
    "empty.txt",
    "empty.csv",
    "list.json",
    "object.json",
    "null.jsonl",
    "deep.json",
    "noise.safetensors",
    "noise.gguf",
    "folder.jsonl",
    "folder.safetensors",
    "run-without-json",
    "damaged-run",
    ".",
    "",
    "a\x00b",
    "x" * 300,
    "\ud800.jsonl",
    None,
    3,
)


def _plans(lab: Lab) -> tuple[Any, ...]:
    at = sims.SteeringPlan.addition
    return (
        sims.SteeringPlan(()),
        at({3: vector(1)}),
        at({10**9: vector(1)}),
        at({1: torch.ones(D_MODEL + 1)}),
        at({1: torch.zeros(D_MODEL)}),
        at({1: vector(1) * 1e30}),
        at({1: vector(1)}, coefficient=0.0),
        at({1: vector(1)}, units="residual_norm", coefficient=-0.5),
        at({1: vector(1)}, provenance=sims.plan.Provenance(model="another/model")),
        sims.SteeringPlan.of({1: sims.Ablation(vector(1))}),
        sims.SteeringPlan.of({1: sims.Clamp(vector(1), 3.0)}, scope="last_prompt"),
        lab.plan * 1e30,
        None,
        "plan.safetensors",
        {1: vector(1)},
        [],
        lab.fitted,
        lab.run,
    )


def _directions(lab: Lab) -> tuple[Any, ...]:
    return (
        *_plans(lab),
        {},
        {1: torch.zeros(D_MODEL)},
        {-1: vector(1)},
        {3: vector(1)},
        {1: vector(1), 2: torch.ones(D_MODEL + 1)},
        {"a": {1: vector(1)}, "b": {1: torch.ones(D_MODEL + 1)}},
        {"a": None},
        {True: vector(1)},
        {1.5: vector(1)},
        vector(1),
        torch.full((3, D_MODEL), nan),
        torch.zeros(3, D_MODEL),
        torch.zeros(0, D_MODEL),
        torch.ones(40, D_MODEL),
        np.ones((3, D_MODEL)),
        sims.Vader,
    )


def _pairs(lab: Lab) -> tuple[Any, ...]:
    texts = [(text, "yes", "no") for text in _TEXTS] + [("Say a.", text, "no") for text in (*_TEXTS, *_NO_TEXT)]
    odd = [
        ("a",),
        ("a", "b"),
        ("a", "b", "c", "d"),
        {},
        {"prompt": "a"},
        ([], [], []),
        ([1], [2], [10**9]),
        ([1], [-1], [2]),
    ]
    return (
        *([*PAIRS[:4], pair] for pair in (*texts, *odd, None, 3, "abc")),
        PAIRS[:1],
        [PAIRS[0]] * 4,
        [(p, "same", "same") for p in PROMPTS],
        [],
        None,
        3,
        "abc",
        {"a": 1},
        lab.behaviour,
    )


def _results(lab: Lab) -> tuple[Any, ...]:
    return (None, 3, "run", lab.plan, lab.run, lab.fitted, lab.model, {}, [], *list(lab.results.values())[:6])


def _folders(lab: Lab) -> tuple[Any, ...]:
    return tuple(lab.folder / p if isinstance(p, str) else p for p in _PATHS)


def _matrices(lab: Lab) -> tuple[Any, ...]:
    rows = lab.rows
    return (
        rows * nan,
        rows * inf,
        rows * 1e30,
        torch.zeros_like(rows),
        lab.other_rows,
        rows[:0],
        rows[:1],
        rows[:3],
        rows[..., :4],
        rows[:, :0],
        rows[:, 0],
        rows[0, 0],
        rows.long(),
        rows.half(),
        rows.to("meta"),
        rows.numpy(),
        rows.tolist(),
        None,
        3,
        "rows",
    )


def _rows_of_tokens(_lab: Lab) -> tuple[Any, ...]:
    odd: list[Any] = [
        ([], []),
        ([], [1]),
        ([1], []),
        ([1], [-1]),
        ([1], [10**9]),
        ([1], [2**70]),
        ([1], [1.5]),
        ([1], ["a"]),
        ([1] * (N_CTX + 1), [1]),
        ([1] * N_CTX, [1]),
        ([1],),
        ("ab", "cd"),
        None,
        3,
    ]
    return (*([*ROWS, row] for row in odd), [], None, 3, "rows", {1: 2})


def _models(lab: Lab) -> tuple[Any, ...]:
    return (*lab.others.values(), None, "gpt2", 3, nn.Linear(2, 2), lab.plan)


Bad = Callable[[Lab], Sequence[Any]]


def _just(values: Sequence[Any]) -> Bad:
    return lambda _lab: values


def _files(*names: str) -> Bad:
    del names
    return _folders


BAD: dict[str, Bad | None] = {
    "model": _models,
    "plan": _plans,
    "source": _directions,
    "other": _directions,
    "layers": _just(_lists_of(_LAYERS, 1)),
    "layer": _just(_LAYERS),
    "site": _just(("resid_mid", "", "blocks.0.hook_resid_post", None, 3, ["resid_post"])),
    "sites": _just(_lists_of(("resid_mid", "", None, 3), "resid_post")),
    "scope": _just(("some", "", None, 3, ["all"], "ALL")),
    "seed": _just((-1, 2**63, 2**70, 1.5, nan, "0", None, True)),
    "progress": None,
    "advance": None,
    "prompts": _just(_lists_of((*_TEXTS, *_NO_TEXT, "Say a."), "Say a.")),
    "texts": _just(_lists_of((*_TEXTS, *_NO_TEXT, ("a", ""), ("", "a"), ("a",), ("a", "b", "c")), "Say a.")),
    "text": _just((*_TEXTS, *_NO_TEXT, ("a", ""), ("", "a"), ("a",), ("a", "b", "c"), (), ("a", "x" * N_CTX))),
    "pairs": _pairs,
    "behaviour": _pairs,
    "ranker": lambda _lab: _rankers(),
    "honest": lambda _lab: _rankers(),
    "evaluator": lambda _lab: _rankers(),
    "reference": lambda _lab: _rankers(),
    "rankers": lambda _lab: (*({"a": r} for r in _rankers()), {}, None, 3, [], {1: letters}),
    "oracles": lambda _lab: (*({"a": r} for r in _rankers()), {}, None, 3, [], {1: letters}),
    "plans": lambda lab: (
        *({"a": lab.plan, "b": p} for p in _plans(lab)),
        {},
        None,
        3,
        [],
        {"a": lab.plan},
        {1: lab.plan},
    ),
    "coefficient": _just(_NUMBERS),
    "coefficients": _just(_lists_of(_NUMBERS, 0.5)),
    "factors": _just(_lists_of(_NUMBERS, 0.5)),
    "epsilons": _just(_lists_of((*_NUMBERS, 0.6, 1.1), 0.25)),
    "effect_at": _just(_lists_of((*_NUMBERS, 0.6, 1.1), 0.25)),
    "shares": _just(_lists_of((*_NUMBERS, 1.1), 0.25)),
    "samples": _just(_INTS),
    "batch_rows": _just(_INTS),
    "batch_tokens": _just(_INTS),
    "controls": _just(_INTS),
    "permutations": _just(_INTS),
    "repeats": _just(_INTS),
    "components": _just(_INTS),
    "draws": _just(_INTS),
    "folds": _just(_INTS),
    "splits": _just(_INTS),
    "count": _just(_INTS),
    "fits": _just(_INTS),
    "turns": _just(_INTS),
    "refine": _just(_INTS),
    "heldout": _just(_INTS),
    "limit": _just(_INTS),
    "shots": _just(_INTS),
    "n": _just(_INTS),
    "top": _just(_INTS),
    "iteration": _just(_INTS),
    "n_layers": _just(_INTS),
    "d_model": _just(_INTS),
    "limit_bytes": _just(_INTS),
    "start": _just(_INTS),
    "position": _just((-1000, 1000, 2**70, 1.5, "1", None, nan)),
    "exact": _just((*_INTS, "some", "")),
    "answer": _just(("", "two tokens", -1, 10**9, 2**70, 1.5, None, "\ud800", [1])),
    "versus": _just(("", "two tokens", -1, 10**9, 2**70, 1.5, "\ud800", [1])),
    "token": _just((-1, 10**9, 2**70, 1.5, None, "a", nan)),
    "tokens": _just(_lists_of(("", "two tokens", -1, 10**9, 2**70, 1.5, None, "\ud800"), "a")),
    "by": _just(("", "neuron", 3, [])),
    "units": _just(("", "parsecs", None, 3)),
    "kind": _just(("", "gguf", 3, "hookedtransformer")),
    "device": _just(("", "abacus", "cuda:99", "meta", 3)),
    "dtype": _just(("float8", "", 3, torch.int64)),
    "revision": _just(("", "main", 3)),
    "name": _just(("", "nowhere/at all", "a/b/c/d", "missing", "\x00", None, 3, "x" * 300)),
    "split": _just(("", "some", 3)),
    "path": _folders,
    "file": _folders,
    "folder": _folders,
    "out": _folders,
    "include_path": _folders,
    "questions": _folders,
    "tolerance": _just(_NUMBERS),
    "share": _just(_NUMBERS),
    "report": _just(_NUMBERS),
    "bonus": _just(_NUMBERS),
    "spread": _just(_NUMBERS),
    "weight": _just(_NUMBERS),
    "epsilon": _just((*_NUMBERS, 0.6)),
    "value": _just((*_NUMBERS, "")),
    "threshold": _just(_NUMBERS),
    "vector": _just(_TENSORS),
    "axis": _just(_TENSORS),
    "probe": _just(_TENSORS),
    "direction": _just(_TENSORS),
    "vectors": _just((*_TENSORS, torch.ones(2, D_MODEL + 1), torch.full((2, D_MODEL), nan), torch.zeros(2, D_MODEL))),
    "first": _just((*_TENSORS, torch.full((2, D_MODEL), nan), torch.zeros(2, D_MODEL))),
    "second": _just((*_TENSORS, torch.full((2, D_MODEL), nan), torch.zeros(2, D_MODEL))),
    "positive": _matrices,
    "negative": _matrices,
    "differences": _matrices,
    "clean": lambda lab: [
        np.ones((8, D_MODEL)),
        np.ones((2, D_MODEL)),
        np.ones(8),
        np.ones((8, 2, 2)),
        None,
        3,
        "rows",
        lab.rows,
    ],
    "corrupted": lambda lab: [np.ones((8, 3, D_MODEL)), np.ones((8, 3, 5)), np.ones((2, 2)), None, 3, "rows", lab.rows],
    "weights": _matrices,
    "rows": _rows_of_tokens,
    "keep": _just(_lists_of(_INTS)),
    "result": _results,
    "found": _results,
    "run": _results,
    "sweep": _results,
    "norms": _results,
    "audit": _results,
    "scores": _results,
    "analyses": lambda lab: (*([r] for r in _results(lab)), None, 3, "abc"),
    "interventions": lambda lab: ((None,), (3,), None, 3, "abc", (lab.plan,), lab.plan.interventions * 2),
    "budget": _just((3, 0.5, "all", {"kl": 0.5})),
    "sampling": _just((3, "all", {"temperature": 0.5}, CONFIG)),
    "config": _just((3, "all", {"iterations": 1}, SMALL)),
    "sampler": _just((3, "local", object())),
    "estimator": _just((3, "mean_difference", sims.MeanDifference, object(), None)),
    "seeds": _just(_lists_of((-1, 0, 2**70, 1.5, "0"), 0)),
    "instruction": _just((*_TEXTS, 3)),
    "flip": _just(("", "none", 3)),
    "groups": _just(({}, {"a": []}, {"a": [""]}, {"a": "bare"}, {1: PROMPTS[:2]}, [], 3, {"a": ["x" * 5000]})),
    "conversations": _just(_lists_of((*((t, "b") for t in _TEXTS), (), "bare", 3), ("a", "b"))),
    "loophole": _just(("", 3, None, lambda _text: nan, lambda _text: 1 / 0)),
}
"""By the argument's name: values that may be wrong; None for what is shown or called, not used."""


@dataclass(frozen=True)
class Entry:
    """A public function with a call that works.

    Args:
        call: the function, or one that makes an object and uses it.
        good: its arguments.
        bad: what may be wrong with an argument where its name doesn't tell.
        skip: arguments that are not replaced.
    """

    call: Callable[..., Any]
    good: Callable[[Lab], dict[str, Any]] = lambda _lab: {}
    bad: Mapping[str, Bad] = field(default_factory=dict)
    skip: tuple[str, ...] = ()

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """Those that can be bad."""
        named = inspect.signature(self.call).parameters
        return tuple(n for n in named if n not in self.skip and (n in self.bad or BAD.get(n) is not None))

    def values(self, lab: Lab, argument: str) -> Sequence[Any]:
        """What may be wrong with one of them."""
        bad = self.bad.get(argument) or BAD[argument]
        assert bad is not None
        return bad(lab)


def _first(stream: Any) -> Any:
    return next(iter(stream), None)


def _sample(model: Any, prompts: Any, samples: Any = 2, plan: Any = NOTHING, seed: Any = 0) -> Any:
    return _first(sims.LocalSampler(model, SMALL).sample(prompts, n=samples, plan=plan, seed=seed))


def _fitting(estimator: Callable[[], Any]) -> Callable[..., Any]:
    return lambda positive, negative: estimator().fit(positive, negative)


def _baked(model: Any, plan: Any, tolerance: Any, lab: Lab) -> None:
    folder = lab.path("baked")
    sims.export.bake(model, plan, folder, tolerance=tolerance)
    shutil.rmtree(folder)


def _steer(model: Any, plan: Any) -> Any:
    with sims.steering(model, plan):
        return model(torch.tensor([[10, 11, 12]]))


def _attach(model: Any, plan: Any) -> None:
    sims.attach(model, plan).detach()


def _ranked(ranker: Any) -> Any:
    return sims.rankers.as_ranker(ranker).rank("Say a.", ["a", "b"])


quiet: dict[str, Any] = {"progress": False}
A, E, L, P = sims.analysis, sims.export, sims.lab, sims.plots
CIRCUIT = lambda lab: {"model": lab.model, "plan": lab.plan, "pairs": PAIRS[:2], "exact": 2, **quiet}  # noqa: E731

CHOICES = (
    nan,
    inf,
    -1,
    0,
    0.5,
    2**70,
    10**400,
    "",
    "some",
    None,
    True,
    (),
    (-1,),
    ("a",),
    [1.5],
    {"a": 1},
    3,
    object(),
)
"""For a setting whose kind its name doesn't tell."""


PLOTTED: dict[str, Bad] = {
    "tokens": lambda _lab: _INTS,
    "prompts": lambda _lab: ([], [-1], [10**9], ["a"], 17, "ab", None),
    "pairs": lambda _lab: ([], [("a", "no")], [("a",)], [("a", "b", "c")], [None], 17, "ab"),
    "value": lambda _lab: ("", "some", 3, None, nan),
    "direction": lambda _lab: ("", "some", 3, nan),
}
"""Arguments that mean something else in a figure."""


def _every(call: Callable[..., Any], values: Sequence[Any]) -> dict[str, Bad]:
    return {name: _just(values) for name in inspect.signature(call).parameters}


def _streamed(lab: Lab) -> Path:
    return sims.stream(Silent(), PROMPTS, lab.path("to-read"), progress=False).path  # type: ignore[arg-type]


ENTRIES: dict[str, Entry] = {
    # The model and what steers it
    "steering": Entry(_steer, lambda lab: {"model": lab.model, "plan": lab.plan}),
    "attach": Entry(_attach, lambda lab: {"model": lab.model, "plan": lab.plan}),
    "resolve": Entry(sims.resolve, lambda lab: {"model": lab.model, "plan": lab.plan}),
    "restride": Entry(sims.restride, lambda lab: {"model": lab.model}),
    "load": Entry(sims.load, lambda lab: {"name": lab.folder / "tiny-llama", "kind": "bridge"}, skip=("model",)),
    "residual_norms": Entry(sims.residual_norms, lambda lab: {"model": lab.model, "prompts": PROMPTS[:2]}),
    "capture": Entry(sims.capture, lambda lab: {"model": lab.model, "rows": ROWS}),
    "capture_tokens": Entry(sims.capture_tokens, lambda lab: {"model": lab.model, "rows": ROWS}),
    "capture_moments": Entry(
        sims.capture_moments,
        lambda lab: {"model": lab.model, "positive": ROWS, "negative": ROWS[::-1]},
        {"positive": _rows_of_tokens, "negative": _rows_of_tokens},
    ),
    "StoredTokens": Entry(sims.StoredTokens, lambda lab: {"path": lab.folder}),
    "LocalSampler": Entry(_sample, lambda lab: {"model": lab.model, "prompts": PROMPTS[:2], "plan": lab.plan}),
    "VLLMSampler": Entry(
        sims.VLLMSampler,
        lambda lab: {"model": lab.model},
        {"config": _just((3, "greedy", {})), "concurrency": _just(_INTS), "tolerance": _just((-1, nan, "0", None))},
        skip=("serve", "bridge"),  # objects of the user's own
    ),
    "RaySampler": Entry(
        sims.RaySampler,
        lambda lab: {"model": lab.folder / "tiny-llama"},
        {
            "model": _just((None, 3, b"model", ["a"])),
            "config": _just((3, "greedy", {})),
            "actors": _just(_INTS),
            "threads": _just(_INTS),
            "batch_rows": _just(_INTS),
            "dtype": _just(("int8", "", 3, ["float32"])),
        },
        skip=("kind", "revision", "device", "pool"),  # what loads the model looks at them, in an actor
    ),
    "stream": Entry(
        sims.stream,
        lambda lab: {"sampler": Silent(), "prompts": PROMPTS, "out": lab.path("streamed"), "progress": False},
        {
            "sampler": _just((None, 3, "local", object())),
            "n": _just(_INTS),
            "shard_prompts": _just(_INTS),
            "out": _folders,
        },
    ),
    "read_stream": Entry(lambda path: list(sims.read_stream(path)), lambda lab: {"path": _streamed(lab)}),
    # The loop and its measures
    "improve": Entry(
        sims.improve, lambda lab: {"model": lab.model, "prompts": PROMPTS, "ranker": letters, "config": CONFIG, **quiet}
    ),
    "compare": Entry(
        sims.compare,
        lambda lab: {
            "model": lab.model,
            "prompts": PROMPTS,
            "ranker": letters,
            "config": CONFIG,
            "seeds": (0,),
            **quiet,
        },
        {"dpo": _just((3, "yes", None, [3], [None], {"beta": 0.1}, sims.DPOConfig()))},
    ),
    "calibrate": Entry(
        sims.calibrate,
        lambda lab: {
            "model": lab.model,
            "plan": lab.plan,
            "prompts": PROMPTS,
            "ranker": letters,
            "factors": (0.5, 1.0),
            "refine": 0,
            "sampling": SMALL,
            **quiet,
        },
    ),
    "fit": Entry(sims.fit, lambda lab: {"model": lab.model, "pairs": PAIRS, **quiet}),
    "fit_quality": Entry(
        sims.fit_quality,
        lambda lab: {"estimator": sims.MeanDifference(), "positive": lab.rows, "negative": lab.other_rows},
    ),
    "audit": Entry(
        sims.audit,
        lambda lab: {"ranker": letters, "prompts": PROMPTS[:2], "responses": [["a", "b"], ["c", "d"]], "repeats": 1},
        {
            "responses": _just(
                (
                    [],
                    [["a"]],
                    [["a", "b"], "cd"],
                    [["a", 3], ["b", "c"]],
                    None,
                    3,
                    [["", ""], ["", ""]],
                    [["\ud800", "a"], ["b", "c"]],
                )
            )
        },
    ),
    "capability": Entry(
        sims.capability,
        lambda lab: {"model": lab.model, "plan": lab.plan, "tasks": "sims_plain_words", "limit": 2},
        {"tasks": _just(("", "no such task", [], None, 3, [3]))},
    ),
    "lm_eval_model": Entry(sims.lm_eval_model, lambda lab: {"model": lab.model, "plan": lab.plan}),
    "bootstrap_mean": Entry(
        sims.bootstrap_mean,
        lambda lab: {"values": np.arange(4.0)},
        {
            "values": _just(
                (
                    np.full(3, nan),
                    np.full(3, inf),
                    np.zeros(0),
                    np.zeros((2, 2)),
                    np.zeros(1),
                    [1.0],
                    None,
                    "abc",
                    np.array(["a"]),
                )
            )
        },
    ),
    "PairBehaviour": Entry(sims.PairBehaviour, lambda lab: {"pairs": PAIRS[:2]}),
    "SampledBehaviour": Entry(sims.SampledBehaviour, lambda lab: {"ranker": letters, "prompts": PROMPTS[:2]}),
    # Reading and writing
    "read_prompts": Entry(sims.read_prompts, lambda lab: {"path": lab.folder / "own.txt"}),
    "read_pairs": Entry(sims.read_pairs, lambda lab: {"path": lab.folder / "own.jsonl"}),
    "load_prompts": Entry(sims.load_prompts, lambda lab: {"name": "rho_sycophancy", "limit": 2}),
    "load_pairs": Entry(
        sims.load_pairs, lambda lab: {"name": "ultrafeedback", "file": lab.folder / "preferences.json", "limit": 1}
    ),
    "everyday": Entry(sims.everyday, lambda lab: {"n": 2}),
    "tone_pairs": Entry(sims.tone_pairs, lambda lab: {"n": 2}),
    "open_run": Entry(sims.open_run, lambda lab: {"path": lab.run.path}),
    "open_comparison": Entry(sims.open_comparison, lambda lab: {"path": lab.folder / "missing"}),
    "write_report": Entry(sims.write_report, lambda lab: {"run": lab.run, "path": lab.path("page.html")}),
    "SteeringPlan.load": Entry(
        sims.SteeringPlan.load, lambda lab: {"path": lab.plan.save(lab.path("own.safetensors"))}
    ),
    "SteeringPlan.save": Entry(
        lambda plan, path: plan.save(path),
        lambda lab: {"plan": lab.plan, "path": lab.path("own.safetensors")},
        skip=("plan",),
    ),
    "from_hub": Entry(
        sims.from_hub,
        lambda lab: {"repo_id": "a/b"},
        {"repo_id": _just(("", "a/b/c", "a b", "\x00", None, 3, "x" * 300))},
    ),
    "push_to_hub": Entry(
        sims.push_to_hub,
        lambda lab: {"plan": lab.plan, "repo_id": "a/b"},
        {"repo_id": _just(("", "a/b/c", "a b", "\x00", None, 3))},
    ),
    "model_card": Entry(sims.model_card, lambda lab: {"plan": lab.plan}),
    # Plans
    "SteeringPlan": Entry(sims.SteeringPlan, lambda lab: {"interventions": lab.plan.interventions}),
    "SteeringPlan.addition": Entry(
        sims.SteeringPlan.addition,
        lambda lab: {"vectors": {1: vector(1)}},
        {
            "vectors": lambda lab: (
                *({1: t} for t in _TENSORS),
                {},
                {-1: vector(1)},
                {1.5: vector(1)},
                {"a": vector(1)},
                None,
                3,
                [vector(1)],
                {2**70: vector(1)},
                {0: vector(0), "a": vector(1)},
            )
        },
    ),
    "SteeringPlan.of": Entry(
        sims.SteeringPlan.of,
        lambda lab: {"transforms": {1: sims.Ablation(vector(1))}},
        {
            "transforms": lambda lab: (
                {},
                {1: vector(1)},
                {1: None},
                {-1: sims.Ablation(vector(1))},
                {"a": sims.Ablation(vector(1))},
                None,
                3,
                {0: sims.Ablation(vector(1)), "a": sims.Ablation(vector(1))},
            )
        },
    ),
    "SteeringPlan.scaled": Entry(
        lambda plan, coefficient: plan.scaled(coefficient),
        lambda lab: {"plan": lab.plan, "coefficient": 1.0},
        skip=("plan",),
    ),
    "SteeringPlan.on": Entry(
        lambda plan, scope: plan.on(scope), lambda lab: {"plan": lab.plan, "scope": "all"}, skip=("plan",)
    ),
    "SteeringPlan.decaying": Entry(
        lambda plan, coefficient: plan.decaying(coefficient),
        lambda lab: {"plan": lab.plan, "coefficient": 1.0},
        skip=("plan",),
    ),
    "SteeringPlan.restrict": Entry(
        lambda plan, layers: plan.restrict(layers), lambda lab: {"plan": lab.plan, "layers": [1]}, skip=("plan",)
    ),
    "SteeringPlan.orthogonal_to": Entry(
        lambda plan, other: plan.orthogonal_to(other),
        lambda lab: {"plan": lab.plan, "other": lab.plan},
        {"other": _plans},
        skip=("plan",),
    ),
    "SteeringPlan.using": Entry(
        lambda plan, transform, coefficient: plan.using(transform, coefficient),
        lambda lab: {"plan": lab.plan, "transform": sims.Ablation, "coefficient": 1.0},
        {"transform": _just((None, 3, "ablation", lambda _d: None))},
        skip=("plan",),
    ),
    "SteeringFit.plan": Entry(
        lambda fit, layers, coefficient, scope: fit.plan(layers, coefficient=coefficient, scope=scope),
        lambda lab: {"fit": lab.fitted, "layers": [1], "coefficient": 1.0, "scope": "all"},
        skip=("fit",),
    ),
    "SteeringFit.best": Entry(
        lambda fit, count: fit.best(count), lambda lab: {"fit": lab.fitted, "count": 1}, skip=("fit",)
    ),
    "SteeringFit.transform": Entry(
        lambda fit, layer: fit.transform(layer), lambda lab: {"fit": lab.fitted, "layer": 1}, skip=("fit",)
    ),
    "Run.samples": Entry(
        lambda run, iteration, split: run.samples(iteration, split),
        lambda lab: {"run": lab.run, "iteration": 1, "split": "heldout"},
        skip=("run",),
    ),
    "Run.before": Entry(
        lambda run, iteration: run.before(iteration), lambda lab: {"run": lab.run, "iteration": 1}, skip=("run",)
    ),
    "Run.indices": Entry(
        lambda run, split: run.indices(split), lambda lab: {"run": lab.run, "split": "heldout"}, skip=("run",)
    ),
    "Run.text_pairs": Entry(
        lambda run, split: run.text_pairs(split), lambda lab: {"run": lab.run, "split": "heldout"}, skip=("run",)
    ),
    "TokenScope.of": Entry(sims.TokenScope.of, lambda lab: {"scope": "all"}),
    "TokenScope": Entry(
        sims.TokenScope,
        lambda lab: {"prompt": True},
        {"prompt": _just((False, None)), "response": _just((False, None))},
    ),
    # Transforms and estimators
    "Addition": Entry(sims.Addition, lambda lab: {"vector": vector(1)}),
    "Ablation": Entry(sims.Ablation, lambda lab: {"axis": vector(1)}),
    "Amplification": Entry(sims.Amplification, lambda lab: {"axis": vector(1)}),
    "Clamp": Entry(sims.Clamp, lambda lab: {"axis": vector(1), "value": 1.0}),
    "Rotation": Entry(sims.Rotation, lambda lab: {"axis": vector(1)}),
    "Gated": Entry(
        sims.Gated,
        lambda lab: {"inner": sims.Addition(vector(1)), "axis": vector(2), "threshold": 0.0},
        {"inner": _just((None, 3, vector(1)))},
    ),
    "HPR": Entry(
        sims.HPR,
        lambda lab: {"probe": vector(1), "weights": (torch.ones(1, D_MODEL),), "biases": (torch.zeros(1),)},
        {
            "weights": _just(((), (None,), (torch.ones(1, 2),), None, 3, (torch.full((1, D_MODEL), nan),))),
            "biases": _just(((), (None,), (torch.ones(2),), None, 3, (torch.full((1,), nan),))),
        },
    ),
    **{
        name: Entry(
            _fitting(getattr(sims, name)),
            lambda lab: {"positive": lab.rows[:, 0], "negative": lab.other_rows[:, 0]},
        )
        for name in (
            "MeanDifference",
            "PCA",
            "LogisticProbe",
            "MassMean",
            "WhitenedMeanDifference",
            "RandomDirection",
            "ShuffledLabels",
        )
    },
    # The microscope
    "layer_sweep": Entry(
        sims.layer_sweep,
        lambda lab: {
            "model": lab.model,
            "source": lab.named,
            "coefficients": (0.1, 0.5),
            "behaviour": PAIRS[:3],
            **quiet,
        },
    ),
    "leave_one_out": Entry(
        sims.leave_one_out,
        lambda lab: {"model": lab.model, "source": lab.plan, "behaviour": PAIRS[:3], "controls": 1, **quiet},
    ),
    "vector_norms": Entry(
        sims.vector_norms, lambda lab: {"model": lab.model, "source": lab.named, "texts": PROMPTS[:2], **quiet}
    ),
    "direction_similarity": Entry(
        sims.direction_similarity,
        lambda lab: {"source": lab.named},
        {
            "differences": lambda lab: (
                {"a": lab.rows},
                {"c": lab.rows},
                {"a": lab.rows[:, :1]},
                {"a": lab.rows * nan},
                {"a": None},
                3,
                [],
            )
        },
    ),
    "readout": Entry(sims.readout, lambda lab: {"model": lab.model, "source": lab.named["a"], "top": 3, **quiet}),
    "token_scores": Entry(
        sims.token_scores, lambda lab: {"model": lab.model, "text": "Say a.", "source": lab.named["a"]}
    ),
    "component_effects": Entry(sims.component_effects, CIRCUIT),
    "direction_readers": Entry(sims.direction_readers, CIRCUIT),
    "directional_ablation": Entry(
        sims.directional_ablation,
        lambda lab: {
            "model": lab.model,
            "source": lab.named["a"],
            "behaviour": PAIRS[:3],
            "layer": 1,
            "controls": 1,
            **quiet,
        },
    ),
    "logit_attribution": Entry(
        sims.logit_attribution,
        lambda lab: {"model": lab.model, "text": ("Say a.", "yes"), "plan": lab.plan, "answer": "y"},
    ),
    "interaction": Entry(
        sims.interaction,
        lambda lab: {
            "model": lab.model,
            "plans": {"a": lab.plan, "b": -lab.plan},
            "rankers": {"r": letters},
            "prompts": PROMPTS[:2],
            "samples": 1,
            "sampling": SMALL,
            **quiet,
        },
    ),
    "model_axes": Entry(sims.model_axes, lambda lab: {"model": lab.model, "texts": PROMPTS[:2]}),
    "analysis.ablation_plan": Entry(
        A.ablation_plan,
        lambda lab: {"n_layers": 3, "direction": vector(1)},
        {"where": _just(((9, "resid_post"), (1, "resid_mid"), (1,), 3, "ab", ()))},
    ),
    "analysis.ceiling": Entry(A.ceiling, lambda lab: {"first": torch.ones(3), "second": torch.ones(3)}),
    "analysis.directions_of": Entry(A.directions_of, lambda lab: {"source": lab.named}),
    "analysis.logit_effects": Entry(
        A.logit_effects, lambda lab: {"model": lab.model, "vectors": torch.stack([vector(1), vector(2)])}
    ),
    "analysis.pair_differences": Entry(A.pair_differences, lambda lab: {"model": lab.model, "pairs": PAIRS[:3]}),
    "analysis.parts_of": Entry(A.parts_of, lambda lab: {"source": lab.plan + lab.plan}),
    "analysis.permutation_p": Entry(
        A.permutation_p,
        lambda lab: {"differences": lab.rows, "reference": lab.rows[0], "permutations": 8},
        {"reference": _matrices},
    ),
    "analysis.principal_angles": Entry(A.principal_angles, lambda lab: {"first": lab.rows[0], "second": lab.rows[1]}),
    "analysis.random_cosine": Entry(A.random_cosine, lambda lab: {"d_model": 8}),
    "analysis.residual_components": Entry(
        A.residual_components, lambda lab: {"model": lab.model, "text": "Say a.", "plan": lab.plan}
    ),
    "analysis.run_differences": Entry(
        A.run_differences, lambda lab: {"model": lab.model, "run": lab.own_run, "iteration": 1}
    ),
    "analysis.stream_directions": Entry(
        A.stream_directions, lambda lab: {"model": lab.model, "texts": PROMPTS[:2], "draws": 2}
    ),
    "analysis.unembedding": Entry(A.unembedding, lambda lab: {"model": lab.model, "token": 10}),
    "analysis.Directions": Entry(
        A.Directions, lambda lab: {"name": "a", "layers": (0, 1), "vectors": torch.stack([vector(0), vector(1)])}
    ),
    # Other tools
    "export.ablation_everywhere": Entry(
        E.ablation_everywhere, lambda lab: {"model": lab.model, "direction": vector(1)}
    ),
    "export.arena_hard_questions": Entry(
        E.arena_hard_questions, lambda lab: {"prompts": PROMPTS, "path": lab.path("q.jsonl")}
    ),
    "export.bake": Entry(
        _baked, lambda lab: {"model": lab.model, "plan": lab.constant, "tolerance": 1e-3, "lab": lab}, skip=("lab",)
    ),
    "export.folded": Entry(E.folded, lambda lab: {"model": lab.model, "plan": lab.constant}),
    **{
        f"export.{name}": Entry(
            getattr(E, name),
            lambda lab, name=name: {
                "model": lab.model,
                "plan": lab.constant,
                "path": lab.path("out.pt" if name == "to_lm_eval" else "out.gguf"),
            },
        )
        for name in ("to_gguf", "to_lm_eval", "to_steerkit", "to_vllm")
    },
    "export.to_layers": Entry(E.to_layers, lambda lab: {"model": lab.model, "plan": lab.constant}),
    **{
        f"export.{name}": Entry(getattr(E, name), lambda lab: {"path": lab.folder / "missing"})
        for name in ("from_alpaca_eval", "from_arena_hard", "from_vllm")
    },
    "export.from_gguf": Entry(E.from_gguf, lambda lab: {"path": lab.written("to_gguf", "in.gguf")}),
    "export.from_steerkit": Entry(E.from_steerkit, lambda lab: {"path": lab.written("to_steerkit", "in.safetensors")}),
    "export.from_layers": Entry(E.from_layers, lambda lab: {"source": {1: vector(1)}}),
    "export.from_lm_eval": Entry(
        E.from_lm_eval,
        lambda lab: {"entries": {}},
        {"entries": _just(({}, {"a": {}}, {"layers.1": {"steering_vector": None}}, None, 3, [], {"a": None}, {1: 2}))},
    ),
    "export.run_responses": Entry(E.run_responses, lambda lab: {"run": lab.run}),
    "export.to_alpaca_eval": Entry(
        E.to_alpaca_eval, lambda lab: {"responses": lab.run, "path": lab.path("a.json")}, {"responses": _results}
    ),
    "export.to_arena_hard": Entry(
        E.to_arena_hard, lambda lab: {"responses": lab.run, "path": lab.path("a.jsonl")}, {"responses": _results}
    ),
    "responses_of": Entry(
        sims.responses_of, lambda lab: {"model": lab.model, "plan": lab.plan, "prompts": PROMPTS[:2], "sampling": SMALL}
    ),
    # The laboratory
    "lab.LengthBiased": Entry(
        lambda ranker, weight: _ranked(L.LengthBiased(ranker, weight)), lambda lab: {"ranker": letters, "weight": 1.0}
    ),
    "lab.Loophole": Entry(
        lambda ranker, loophole, bonus: _ranked(L.Loophole(ranker, loophole, bonus)),
        lambda lab: {"ranker": letters, "loophole": "!", "bonus": 1.0},
    ),
    "lab.Noisy": Entry(
        lambda ranker, epsilon, seed: _ranked(L.Noisy(ranker, epsilon, seed)),
        lambda lab: {"ranker": letters, "epsilon": 0.1, "seed": 0},
    ),
    "lab.Reversed": Entry(lambda ranker: _ranked(L.Reversed(ranker)), lambda lab: {"ranker": letters}),
    "lab.corruption_curve": Entry(
        L.corruption_curve, lambda lab: {"clean": lab.rows[:, 0].double().numpy(), "epsilons": (0.0, 0.5), "repeats": 2}
    ),
    "lab.default_groups": Entry(L.default_groups),
    "lab.failures": Entry(
        L.failures,
        lambda lab: {"samples": lab.run},
        {"samples": lambda lab: (*_results(lab), SAMPLES), "prompts": _just(([], None, 3, "ab"))},
    ),
    "lab.misled": Entry(
        L.misled,
        lambda lab: {
            "model": lab.model,
            "prompts": PROMPTS,
            "oracles": {"r": letters},
            "honest": letters,
            "config": CONFIG,
            **quiet,
        },
    ),
    "lab.multi_turn": Entry(
        L.multi_turn,
        lambda lab: {
            "model": lab.model,
            "plan": lab.plan,
            "conversations": [("a", "b"), ("c", "d")],
            "ranker": letters,
            "turns": 2,
            "samples": 1,
            "sampling": SMALL,
            **quiet,
        },
    ),
    "lab.oracle_noise": Entry(
        L.oracle_noise,
        lambda lab: {"model": lab.model, "source": PAIRS, "repeats": 2, "epsilons": (0.0, 0.5), "layer": 1, **quiet},
        {"source": _pairs},
    ),
    "lab.out_of_distribution": Entry(
        L.out_of_distribution,
        lambda lab: {
            "model": lab.model,
            "plan": lab.plan,
            "groups": {"a": PROMPTS[:2], "b": PROMPTS[2:4]},
            "ranker": letters,
            "samples": 1,
            "sampling": SMALL,
            **quiet,
        },
    ),
    "lab.poisoned_negatives": Entry(
        L.poisoned_negatives,
        lambda lab: {
            "model": lab.model,
            "source": PAIRS,
            "texts": ["bad one", "bad two"],
            "repeats": 2,
            "shares": (0.0, 0.5),
            "layer": 1,
            **quiet,
        },
        {"source": _pairs},
    ),
    "lab.reward_hacking": Entry(
        L.reward_hacking,
        lambda lab: {
            "model": lab.model,
            "prompts": PROMPTS,
            "ranker": letters,
            "bonus": 10.0,
            "config": CONFIG,
            **quiet,
        },
    ),
    "lab.steerability": Entry(
        L.steerability,
        lambda lab: {
            "model": lab.model,
            "plan": lab.plan,
            "behaviour": lab.behaviour,
            "coefficients": (-1.0, 0.0, 1.0),
            **quiet,
        },
    ),
    "lab.wrong_oracles": Entry(
        lambda ranker, spread, seed: [_ranked(r) for r in L.wrong_oracles(ranker, spread=spread, seed=seed).values()],
        lambda lab: {"ranker": letters, "spread": 1.0, "seed": 0},
    ),
    # Rankers
    "rankers.as_ranker": Entry(_ranked, lambda lab: {"ranker": letters}),
    "RayRanker": Entry(
        sims.RayRanker,
        lambda lab: {"ranker": letters},
        {
            "actors": _just(_INTS),
            "threads": _just(_INTS),
            "batch_prompts": _just(_INTS),
            "judge": _just((3, ["a"], b"model")),
        },
        skip=("pool",),
    ),
    "CachedRanker": Entry(
        lambda ranker, folder: _ranked(sims.CachedRanker(ranker, folder)),
        lambda lab: {"ranker": letters, "folder": lab.path("verdicts")},
    ),
    "Ensemble": Entry(
        lambda rankers: _ranked(sims.Ensemble(rankers)),
        lambda lab: {"rankers": {letters: 1.0}},
        {
            "rankers": _just(
                (
                    {},
                    [],
                    {letters: 0.0},
                    {letters: -1.0},
                    {letters: nan},
                    {letters: "1"},
                    None,
                    3,
                    [(letters,)],
                    [(letters, 1.0, 2.0)],
                    {None: 1.0},
                )
            )
        },
    ),
    "rankers.get_ranker": Entry(
        sims.rankers.get_ranker,
        lambda lab: {"name": "vader"},
        {
            "name": _just(
                (
                    "",
                    "taste",
                    "a:b",
                    "json:no",
                    "json:",
                    ":",
                    "os:sep",
                    "a.b.c:d",
                    ".:x",
                    "\x00:x",
                    "no such:x",
                    "json:__file__",
                )
            )
        },
    ),
    # Figures
    **{
        f"plots.{name}": Entry(
            getattr(P, name),
            lambda lab, of=of: {
                next(iter(inspect.signature(getattr(P, of[0])).parameters)): lab.run
                if of[1] == "run"
                else lab.results[of[1]]
            },
            PLOTTED,
        )
        for name, of in {
            **{
                n: (n, "run")
                for n in (
                    "effect",
                    "iteration_similarity",
                    "layer_similarity",
                    "sample_browser",
                    "side_effects",
                    "vector_norms",
                    "win_rate",
                )
            },
            "attribution_check": ("attribution_check", "effects"),
            "calibration": ("calibration", "calibration"),
            "component_effects": ("component_effects", "effects"),
            "direction_readers": ("direction_readers", "readers"),
            "directional_ablation": ("directional_ablation", "ablation"),
            "failures": ("failures", "failures"),
            "figures": ("figures", "sweep"),
            "fit_quality": ("fit_quality", "fit"),
            "frontier": ("frontier", "sweep"),
            "interaction": ("interaction", "interaction"),
            "layer_sweep": ("layer_sweep", "sweep"),
            "leave_one_out": ("leave_one_out", "leave_one_out"),
            "logit_attribution": ("logit_attribution", "attribution"),
            "norm_profile": ("norm_profile", "norms"),
            "projection_profile": ("projection_profile", "norms"),
            "readout": ("readout", "readout"),
            "readout_drift": ("readout_drift", "readout"),
            "readout_layers": ("readout_layers", "readout"),
            "readout_measured": ("readout_measured", "readout"),
            "reliability_card": ("reliability_card", "audit"),
            "shared_subspace": ("shared_subspace", "similarity"),
            "similarity": ("similarity", "similarity"),
            "similarity_profile": ("similarity_profile", "similarity"),
            "steerability": ("steerability", "steerability"),
            "token_heatmap": ("token_heatmap", "scores"),
            "trajectory": ("trajectory", "similarity"),
            # of results that no test here makes
            "capability": ("capability", "sweep"),
            "comparison": ("comparison", "sweep"),
            "corrupted_pairs": ("corrupted_pairs", "sweep"),
            "misled": ("misled", "sweep"),
            "multi_turn": ("multi_turn", "sweep"),
            "out_of_distribution": ("out_of_distribution", "sweep"),
        }.items()
    },
    "plots.pair_selection": Entry(P.pair_selection, lambda lab: {"diagnostics": []}, {"diagnostics": _results}),
    "plots.slider": Entry(
        P.slider,
        lambda lab: {"figures": {"a": P.win_rate(lab.run)}},
        {"figures": _just(({}, None, 3, [], {"a": None}, {1: 2}))},
    ),
    "widgets.Console": Entry(sims.widgets.Console, lambda lab: {"model": lab.model, "source": lab.plan}),
    # Choices
    **{
        name: Entry(getattr(sims, name), bad={f.name: _just(CHOICES) for f in fields(getattr(sims, name))})
        for name in (
            "ContrastConfig",
            "DPOConfig",
            "EvaluationConfig",
            "FluencyBudget",
            "GuardConfig",
            "HouseholderRotation",
            "RankingConfig",
            "SIMSConfig",
            "SamplingConfig",
            "SteeringConfig",
        )
    },
    "SelfJudge": Entry(sims.SelfJudge, bad=_every(sims.SelfJudge, CHOICES)),
    "EndpointJudge": Entry(
        sims.EndpointJudge,
        lambda lab: {"base_url": "http://localhost:9", "model": "tiny", "api_key_env": None},
        _every(sims.EndpointJudge, CHOICES),
    ),
    "PairRM": Entry(sims.PairRM, lambda lab: {"path": lab.folder / "missing"}, skip=("revision", "batch", "device")),
    "RewardModel": Entry(
        sims.RewardModel, lambda lab: {"path_or_id": lab.folder / "missing"}, {"path_or_id": _folders}, skip=("device",)
    ),
    "ReadingEase": Entry(sims.ReadingEase, skip=("name",)),
    "Vader": Entry(sims.Vader, skip=("name",)),
    "export.Responses": Entry(E.Responses, lambda lab: {"prompts": ("a", "b"), "texts": ("c", "d")}),
    "prompts.check_prompts": Entry(sims.prompts.check_prompts, lambda lab: {"prompts": PROMPTS}),
}

MADE: dict[str, str] = dict.fromkeys(
    (
        "Calibration",
        "Capability",
        "Comparison",
        "Evaluation",
        "LayerSweep",
        "Run",
        "Steering",
        "SteeringFit",
        "analysis.AblatedControl",
        "analysis.ComponentEffect",
        "analysis.ComponentEffects",
        "analysis.DirectionReaders",
        "analysis.DirectionSimilarity",
        "analysis.DirectionalAblation",
        "analysis.Interaction",
        "analysis.LeaveOneOut",
        "analysis.LogitAttribution",
        "analysis.Part",
        "analysis.PermutationTest",
        "analysis.Readout",
        "analysis.ResidualComponents",
        "analysis.SweepCell",
        "analysis.TokenScores",
        "analysis.VectorNorms",
        "export.Exported",
        "lab.CorruptedEffect",
        "lab.CorruptedPairs",
        "lab.Curve",
        "lab.Failure",
        "lab.FailureLedger",
        "lab.Misled",
        "lab.MisledIteration",
        "lab.MisledRun",
        "lab.Moments",
        "lab.MultiTurn",
        "lab.OutOfDistribution",
        "lab.Steerability",
        "widgets.ConsoleView",
        "widgets.console",
    ),
    "a result, made by the function of its name",
) | {
    "SimsError": "what is raised",
}
"""Public classes that a user is given and doesn't make."""

LEFT_OUT = (
    *("advance", "fit", "maker", "self", "args", "kwargs"),
    *("adaptive", "add_bos", "above", "chat", "everywhere", "last_prompt", "private"),  # yes or no
    *("category", "dataset", "generator", "label", "license", "message", "method", "order", "results", "subcategory"),
    *("base", "provenance", "repo_id", "residual_norm", "residual_norms", "half_life", "shuffled", "split_half"),
    *("batch", "source_max_length", "candidate_max_length", "max_length"),  # of what is not there
)
"""Arguments of the calls above that nobody passes."""
