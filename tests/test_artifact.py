"""The plan's file: every transform comes back bit for bit, and no file, however damaged or hostile, does anything but
load to a valid plan or say in one line why not."""

import json
import random
import stat
import struct
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sims_lens import TokenScope
from sims_lens.errors import PlanError
from sims_lens.plan import FORMAT, FORMAT_VERSION, Intervention, Provenance, SteeringPlan
from sims_lens.transforms import (
    HPR,
    TRANSFORMS,
    Ablation,
    Addition,
    Amplification,
    Clamp,
    Gated,
    Rotation,
    Transform,
    dump,
)

D = 8
DATA = Path(__file__).parent / "data"
ORIGIN = Provenance("org/tiny", "5f2c", "folded", 4, D, 'improve, “iteration” 3 | "a"\n`b`', "c0ffee")


def direction(k: int) -> Tensor:
    """Numbers that every machine makes the same."""
    return ((torch.arange(D) * (2 * k + 3)) % 7 - 3) / 4


NET = (torch.stack([direction(k) for k in (1, 2, 4, 5)]), direction(6)[None, :4]), (torch.arange(4) / 8, torch.ones(1))
EXAMPLES: dict[str, Transform] = {
    "addition": Addition(direction(0)),
    "ablation": Ablation(direction(1)),
    "amplification": Amplification(direction(2)),
    "clamp": Clamp(direction(4), -2.625),
    "rotation": Rotation(direction(5)),
    "hpr": HPR(direction(6), *NET),
    "gated": Gated(Clamp(direction(7), 1 / 3), direction(8), 0.1, above=False),
}
EVERYTHING = SteeringPlan(
    tuple(
        Intervention(
            k % 4,
            ("resid_pre", "resid_post", "attn_out", "mlp_out")[k % 4],
            transform,
            0.1 - k,
            scope=TokenScope(prompt=k % 2 == 0, last_prompt=k % 3 == 0, response=True),
            half_life=None if k % 2 else 7.5 + k,
        )
        for k, transform in enumerate(EXAMPLES.values())
    ),
    ORIGIN,
) + SteeringPlan.addition({1: direction(3)}, coefficient=0.2, units="residual_norm", residual_norms={1: 12.1})


def content(plan: SteeringPlan) -> list[Any]:
    """All that a plan holds, tensors as their bits."""
    found: list[Any] = [asdict(plan.provenance)]
    for i in plan.interventions:
        what, tensors = dump(i.transform, "")
        bits = {name: (list(t.shape), t.view(torch.int32).tolist()) for name, t in tensors.items()}
        found.append((what, bits, {f.name: getattr(i, f.name) for f in fields(i) if f.name != "transform"}))
    return found


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_every_transform_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    plan = SteeringPlan.of({3: EXAMPLES[kind]}, coefficient=-0.1, scope="prompt", half_life=12.5, provenance=ORIGIN)
    back = SteeringPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert content(back) == content(plan)
    stream = torch.linspace(-3, 5, 2 * D).reshape(1, 2, D)
    steered = [p.interventions[0].transform for p in (plan, back)]
    before, after = (t.delta(stream, t.tensors(), 0.7) for t in steered)
    assert torch.equal(before, after) and bool(before.any())


def test_a_plan_of_everything_comes_back_and_is_written_the_same_again(tmp_path: Path) -> None:
    first = EVERYTHING.save(tmp_path / "first")
    back = SteeringPlan.load(first)
    assert content(back) == content(EVERYTHING)
    assert back.save(tmp_path / "second").read_bytes() == first.read_bytes()


def test_files_of_every_version_are_read(tmp_path: Path) -> None:
    files = {int(path.stem.removeprefix("plan_v")): path for path in DATA.glob("plan_v*.safetensors")}
    assert sorted(files) == list(range(1, FORMAT_VERSION + 1)), "keep a file of each version: plan.save(...)"
    for version, path in files.items():
        assert File(path.read_bytes()).plan["version"] == version
        plan = SteeringPlan.load(path)
        assert (
            content(SteeringPlan.load(plan.save(tmp_path / "again"))) == content(plan) and len(plan.interventions) > 2
        )


# --- writing ----------------------------------------------------------------------------------------------------------


def test_saves_at_once_leave_one_of_the_plans_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plans = [SteeringPlan.addition({k: direction(k)}) for k in range(4)]
    allowed = [content(plan) for plan in plans]
    plans[0].save(path)
    with ThreadPoolExecutor(4) as pool:
        saving = [pool.submit(plans[k % 4].save, path) for k in range(40)]
        while not all(job.done() for job in saving):
            assert content(SteeringPlan.load(path)) in allowed
        assert [job.result() for job in saving] == [path] * 40
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("disk full")])
def test_a_save_that_fails_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise error

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(type(error), match="disk full"):
        SteeringPlan.addition({0: direction(0)}).save(tmp_path / "plan.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    saved = EVERYTHING.save(tmp_path / "plan")
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    small = SteeringPlan.addition({0: torch.ones(4)})
    for plan, message in (
        (SteeringPlan.addition({0: torch.ones(D)}) + small, r"must have one size, got \[4, 8\]"),
        (replace(small, provenance=ORIGIN), "have 4 entries, but the provenance says d_model = 8"),
        (SteeringPlan.addition({4: direction(0)}, provenance=ORIGIN), r"layer 4 is not in 0\.\.3"),
    ):
        with pytest.raises(PlanError, match=message):
            plan.save(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []
    assert SteeringPlan.load(SteeringPlan.addition({0: torch.zeros(D)}).save(tmp_path / "zero")).layers == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "model of a provenance must be a string, got None; leave it out"),
        ({"config": 3}, "config of a provenance must be a string, got 3"),
        ({"n_layers": -1}, "n_layers of a provenance must be an integer from 0 up, got -1"),
        ({"d_model": True}, "d_model of a provenance must be an integer from 0 up, got True"),
        ({"d_model": 8.0}, "d_model of a provenance must be an integer from 0 up, got 8.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_provenance_of_the_wrong_types_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Provenance(**options)


# --- hostile files ----------------------------------------------------------------------------------------------------


class File:
    """A safetensors file in parts that can be set to anything: the plan's JSON, the table of tensors, their bytes."""

    def __init__(self, data: bytes) -> None:
        size = struct.unpack("<Q", data[:8])[0]
        self.table: dict[str, Any] = json.loads(data[8 : 8 + size])
        self.plan: Any = json.loads(self.table.pop("__metadata__")[FORMAT])
        self.body = bytearray(data[8 + size :])

    def bytes(self) -> bytes:
        plan = self.plan if isinstance(self.plan, str) else json.dumps(self.plan)
        table = json.dumps({"__metadata__": {FORMAT: plan}, **self.table}).encode()
        return struct.pack("<Q", len(table)) + table + bytes(self.body)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return EVERYTHING.save(tmp_path_factory.mktemp("good") / "plan").read_bytes()


def refusal(path: Path, data: bytes) -> str | None:
    """What is said about a file that is refused; None for one that gives a valid plan."""
    path.unlink(missing_ok=True)  # some file systems flush a file that is cut and written again: 3 ms each
    path.write_bytes(data)
    try:
        plan = SteeringPlan.load(path)
    except PlanError as error:
        said = str(error)
        assert said.startswith(str(path)) and said.isprintable() and len(said) < 600, said
        return said.removeprefix(str(path))
    for i in plan.interventions:
        assert all(bool(t.isfinite().all()) and t.dtype == torch.float32 for t in i.transform.tensors().values())
    again = plan.save(path.with_name("again"))
    assert content(SteeringPlan.load(again)) == content(plan)
    again.unlink()
    return None


def _entry(change: Callable[[dict[str, Any]], Any], index: int = 0) -> Callable[[File], Any]:
    return lambda f: change(f.plan["interventions"][index])


def _retyped(dtype: str, width: float) -> Callable[[File], None]:
    """The first tensor stored as another type."""

    def change(f: File) -> None:
        first = min(f.table, key=lambda name: f.table[name]["data_offsets"])
        f.table[first] |= {"dtype": dtype, "shape": [int(4 * D / width)]}

    return change


def _many_users(f: File) -> None:
    f.plan["interventions"] *= 100


def _extra_tensor(f: File) -> None:
    f.table["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(f.body), len(f.body) + 4]}
    f.body += bytes(4)


def _endless(f: File) -> None:
    f.table["extra"] = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [len(f.body)] * 2}


def _claim(f: File) -> None:
    first = max(f.table, key=lambda name: f.table[name]["data_offsets"])
    f.table[first] |= {"shape": [25 * 10**9], "data_offsets": [f.table[first]["data_offsets"][0], 10**11]}


def _zero_axis(f: File) -> None:
    start, end = f.table["1.axis"]["data_offsets"]
    f.body[start:end] = bytes(end - start)


HOSTILE: dict[str, tuple[Callable[[File], Any], str]] = {
    "100 GB claimed": (_claim, "not a readable safetensors file"),
    "overlapping tensors": (lambda f: f.table["1.axis"].update(data_offsets=[0, 32]), "not a readable safetensors"),
    "negative offset": (lambda f: f.table["1.axis"].update(data_offsets=[-1, 31]), "not a readable safetensors"),
    "an extra tensor": (_extra_tensor, "no intervention names tensor 'extra'"),
    "one tensor for many": (_many_users, "two interventions name one tensor"),
    "int64": (_retyped("I64", 8), "must hold floats, got torch.int64"),
    "bool": (_retyped("BOOL", 1), "must hold floats, got torch.bool"),
    "complex": (_retyped("C64", 8), "must hold floats, got torch.complex64"),
    "float8": (_retyped("F8_E4M3", 1), "must hold floats, got torch.float8_e4m3fn"),
    "float4": (_retyped("F4", 0.5), "KeyError: 'F4'"),
    "an endless empty tensor": (_endless, "RuntimeError: Stride calculation overflowed"),
    "float64 of another size": (_retyped("F64", 8), r"must have one size, got \[4, 8\]"),
    "zero axis": (_zero_axis, "the direction of the ablation is zero"),
    "all NaN": (lambda f: f.body.__setitem__(slice(None), b"\xff" * len(f.body)), "has 8 NaN or infinite entries of 8"),
    "2-d": (lambda f: f.table["0.vector"].update(shape=[2, 4]), r"must have shape \[d_model\], got \[2, 4\]"),
    "a flipped bit": (lambda f: f.body.__setitem__(1, f.body[1] ^ 1), "its tensors are not those that were saved"),
    "deep nesting": (lambda f: setattr(f, "plan", "[" * 100_000), "RecursionError"),
    "deep parameters": (
        _entry(lambda e: e.update(parameters=json.loads('{"a":{"tensors":{},"parameters":' * 300 + "{}" + "}}" * 300))),
        "KeyError: 'transform'",
    ),
    "no object": (lambda f: setattr(f, "plan", "3"), "TypeError"),
    "version true": (lambda f: f.plan.update(version=True), "format version True is not one that"),
    "version 0": (lambda f: f.plan.update(version=0), "format version 0"),
    "version 1 of a later plan": (lambda f: f.plan.update(version=1), "which format version 1 does not know"),
    "no list": (lambda f: f.plan.update(interventions={}), "interventions must be a list, got a dict"),
    "no parameters": (_entry(lambda e: e.pop("parameters"), 6), "KeyError: 'parameters'"),
    "no half-life": (_entry(lambda e: e.pop("half_life")), "KeyError: 'half_life'"),
    "an entry too many": (_entry(lambda e: e.update(hook="os.system")), "has 'hook', which format version 2"),
    "layer -1": (_entry(lambda e: e.update(layer=-1)), "layer must be an integer from 0 up, got -1"),
    "layer true": (_entry(lambda e: e.update(layer=True)), "layer must be an integer from 0 up, got True"),
    "layer beyond": (_entry(lambda e: e.update(layer=4)), r"layer 4 is not in 0\.\.3: the provenance says 4 layers"),
    "coefficient true": (_entry(lambda e: e.update(coefficient=True)), "coefficient must be a number, got True"),
    "coefficient of a list": (_entry(lambda e: e.update(coefficient=[1])), r"coefficient must be a number, got \[1\]"),
    "coefficient infinite": (_entry(lambda e: e.update(coefficient=float("inf"))), "coefficient must be finite"),
    "coefficient huge": (_entry(lambda e: e.update(coefficient=10**400)), "coefficient must be finite, got 1000"),
    "coefficient of 5000 digits": (lambda f: setattr(f, "plan", "1" * 5000), "ValueError: Exceeds the limit"),
    "norm true": (_entry(lambda e: e.update(residual_norm=True)), "residual_norm must be a positive number, got True"),
    "half-life true": (_entry(lambda e: e.update(half_life=True)), "half_life must be a positive number"),
    "scope of numbers": (_entry(lambda e: e["scope"].update(prompt=2)), "a scope must hold true or false"),
    "scope unknown": (_entry(lambda e: e["scope"].update({"a\n\x1b[31m": True})), "TypeError.*keyword argument"),
    "no scope": (_entry(lambda e: e.update(scope={})), "a token scope must hold at least one"),
    "site of a list": (_entry(lambda e: e.update(site=["resid_post"])), r"site \['resid_post'\] is not one of"),
    "a long site": (_entry(lambda e: e.update(site="x" * 10**6)), "site 'xxx.*… is not one of"),
    "kind of a list": (_entry(lambda e: e.update(transform=["addition"])), "TypeError"),
    "a tensor's name of a list": (_entry(lambda e: e.update(tensors={"vector": [["0.vector"]]})), "TypeError"),
    "value true": (_entry(lambda e: e["parameters"].update(value=True), 3), "value of a clamp must be a finite number"),
    "value nan": (_entry(lambda e: e["parameters"].update(value=float("nan")), 3), "must be a finite number, got nan"),
    "above 1": (_entry(lambda e: e["parameters"].update(above=1), 6), "above must be True or False, got 1"),
    "a gate in a gate": (
        _entry(lambda e: e["parameters"]["inner"]["parameters"].update(value={"transform": "clamp", "tensors": {}}), 6),
        "within a transform can't hold another one",
    ),
    "a net of another shape": (_entry(lambda e: e["tensors"]["weights"].reverse(), 5), "layer 0 of an HPR's angle net"),
    "a net without biases": (_entry(lambda e: e["tensors"].update(biases=[]), 5), "needs one bias per weight"),
    "model of a number": (lambda f: f.plan["provenance"].update(model=1), "model of a provenance must be a string"),
    "width contradicted": (
        lambda f: f.plan["provenance"].update(d_model=16),
        "have 8 entries, but the provenance says",
    ),
    "layers of a string": (lambda f: f.plan["provenance"].update(n_layers="4"), "n_layers of a provenance must be an"),
    "provenance of a list": (lambda f: f.plan.update(provenance=[]), "AttributeError"),
    "another digest": (lambda f: f.plan.update(sha256=[]), "its tensors are not those that were saved"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("unchecked")
def test_hostile_files_are_refused_with_the_reason(name: str, good: bytes, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    file = File(good)
    assert refusal(tmp_path / "plan", file.bytes()) is None  # taking it apart is no damage
    change(file)
    with pytest.raises(PlanError, match=message):
        (tmp_path / "plan").write_bytes(file.bytes())
        SteeringPlan.load(tmp_path / "plan")
    assert refusal(tmp_path / "plan", file.bytes()) is not None


@pytest.mark.parametrize("length", [0, 2, 10**6, 10**9, 2**63, 2**64 - 1])
def test_header_lengths_that_lie_are_refused(length: int, good: bytes, tmp_path: Path) -> None:
    said = refusal(tmp_path / "plan", struct.pack("<Q", length) + good[8:])
    assert said is not None and "is not a readable safetensors file" in said


@pytest.mark.usefixtures("unchecked")
def test_tensors_of_other_float_types_are_read_in_float32(tmp_path: Path) -> None:
    file = File(SteeringPlan.addition({0: direction(0)}).save(tmp_path / "plan").read_bytes())
    del file.plan["sha256"]
    file.table["0.vector"] = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
    for value, said in ((0.1, None), (1e300, "has 1 NaN or infinite entries of 1")):
        file.body = bytearray(struct.pack("<d", value))
        found = refusal(tmp_path / "plan", file.bytes())
        assert found is None if said is None else said in str(found)


@pytest.mark.usefixtures("unchecked")
def test_a_flipped_bit_in_any_tensor_is_noticed(good: bytes, tmp_path: Path) -> None:
    start = len(good) - len(File(good).body)
    for place in range(start, len(good), 3):
        flipped = bytearray(good)
        flipped[place] ^= 1 << place % 8
        assert refusal(tmp_path / "plan", bytes(flipped)) is not None, place - start


@pytest.mark.usefixtures("unchecked")
def test_small_files_cannot_ask_for_much_memory(good: bytes, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    claimed = File(good)
    _claim(claimed)
    wide = SteeringPlan.addition({0: torch.ones(2**20)}).save(tmp_path / "plan").read_bytes()  # 4 MB
    shared = File(wide)
    shared.plan["interventions"] *= 500  # 2 GB if each got a copy
    megabyte = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (claimed.bytes(), shared.bytes()):
        assert refusal(tmp_path / "plan", data) is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * megabyte


# --- 10,000 mutated files ---------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**63, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *(
        "",
        "addition",
        "gated",
        "resid_pre",
        "residual_norm",
        "0.vector",
        "\x00\n\x1b[2J",
        "\ud800",
        "\u202e",
        "x" * 500,
    ),
    *([], [1], ["0.vector", "0.vector"], [[[]]], {}, {"": None}, {"transform": "addition", "tensors": {}}),
)


def flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[place:]


def cut(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.choice((1, 2, 8, 100)) :]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data))
    with_this = rng.choice((b"\0", b"\xff", b'"', b"}", b",")) * rng.choice((1, 8))
    return data[:place] + with_this + data[place + len(with_this) :]


def header_length(rng: random.Random, data: bytes) -> bytes:
    return struct.pack("<Q", rng.choice((rng.randrange(2 * len(data)), rng.getrandbits(64)))) + data[8:]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with every key that it has."""
    found: list[tuple[Any, Any]] = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


def edit(rng: random.Random, root: Any) -> None:
    """One value replaced, dropped, exchanged with another one, or a name changed."""
    holder, key = rng.choice(places(root))
    other, other_key = rng.choice(places(root))
    action = rng.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1:
        holder[key], other[other_key] = deepcopy((other[other_key], holder[key]))
    elif action == 2 and isinstance(holder, dict):
        holder[rng.choice((key + "s", key.upper(), "", "extra"))] = holder.pop(key)
    elif action == 3 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = deepcopy(rng.choice(VALUES))


def header(rng: random.Random, data: bytes) -> bytes:
    file = File(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        if file.plan:
            edit(rng, file.plan)
    return file.bytes()


def table(rng: random.Random, data: bytes) -> bytes:
    file = File(data)
    edit(rng, file.table)
    return file.bytes()


def retype(rng: random.Random, data: bytes) -> bytes:
    file = File(data)
    tensor = file.table[rng.choice(list(file.table))]
    tensor["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E5M2", "F4", "C64"))
    size = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F4": 0.5}.get(tensor["dtype"], 1)
    entries = int((tensor["data_offsets"][1] - tensor["data_offsets"][0]) / size)
    tensor["shape"] = rng.choice(([entries], [1, entries], [entries, 1], [entries, 0], []))
    return file.bytes()


def numbers(rng: random.Random, data: bytes) -> bytes:
    """Other numbers, without the digest that would tell."""
    file = File(data)
    file.plan.pop("sha256", None)
    start = 4 * rng.randrange(len(file.body) // 4)
    value = rng.choice((float("nan"), float("inf"), 0.0, 1e-45, 3e38, -1.5))
    count = rng.choice((1, 8, 1000))
    file.body[start : start + 4 * count] = (struct.pack("<f", value) * count)[: len(file.body) - start]
    return file.bytes()


WAYS = (flip, truncate, insert, cut, overwrite, header_length, header, header, table, retype, numbers)


@pytest.mark.usefixtures("unchecked")
def test_ten_thousand_mutated_files_load_or_are_refused_in_one_line(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # the survivors are saved again
    seeds = [good, (DATA / "plan_v1.safetensors").read_bytes()]
    rng = random.Random(0)
    outcomes: Counter[tuple[str, bool]] = Counter()
    for _ in range(10_000):
        way = rng.choice(WAYS)
        outcomes[way.__name__, refusal(tmp_path / "plan", way(rng, rng.choice(seeds))) is not None] += 1
    for way in {way.__name__ for way in WAYS}:
        assert outcomes[way, True] > 100, way
    assert sum(count for (_, refused), count in outcomes.items() if not refused) > 100  # what is harmless still loads
