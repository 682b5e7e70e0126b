"""Other tools' formats: round trips, what the tools make of the files, and files that nobody should trust."""

import json
import math
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from common import KINDS, difference, plan_of, random_tokens, vector
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sims_lens import SteeringPlan
from sims_lens.errors import ExportError, PlanError, SimsError
from sims_lens.export import (
    from_gguf,
    from_layers,
    from_lm_eval,
    from_steerkit,
    from_vllm,
    to_gguf,
    to_layers,
    to_lm_eval,
    to_steerkit,
    to_vllm,
)
from sims_lens.hooks import steering
from sims_lens.transforms import Ablation, Clamp

TOKENS = random_tokens(2, 12)
KIND = KINDS[0]


def read_lm_eval(path: Path) -> SteeringPlan:
    return from_lm_eval(torch.load(path, weights_only=True))


FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., SteeringPlan]]] = {
    "gguf": (to_gguf, from_gguf),
    "json": (to_vllm, from_vllm),
    "pt": (to_lm_eval, read_lm_eval),
    "safetensors": (to_steerkit, from_steerkit),
}


def plain(model: Any) -> Any:
    """The checkpoint that a model came from, as the other tools load it."""
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(model.sims_source["folder"]).eval().requires_grad_(False)


def steered(model: Any, plan: SteeringPlan) -> torch.Tensor:
    with torch.no_grad(), steering(model, plan):
        return model(TOKENS)  # type: ignore[no-any-return]


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_written_is_read_back(llama: Any, suffix: str, tmp_path: Path) -> None:
    write, read = FORMATS[suffix]
    plan = plan_of(2, seed=3) + plan_of(2, site="mlp_out", coefficient=-0.5)
    if suffix != "safetensors":
        plan = plan + plan_of(2, site="resid_pre")
    done = write(llama, plan, tmp_path / f"steer.{suffix}")
    assert done.path == tmp_path / f"steer.{suffix}" and done.error < 1e-4 and done.tokens > 100
    assert [path.name for path in tmp_path.iterdir()] == [f"steer.{suffix}"]
    again = read(done.path)
    assert again.layers == ((2,) if suffix == "safetensors" else (1, 2))
    assert all(i.scope.name == "all" and i.site == "resid_post" for i in again.interventions)
    wanted = {(2, "resid_post"): 2 * vector(5) - 0.5 * vector(2), (1, "resid_post"): 2 * vector(2)}
    for where, found in again.vectors().items():
        torch.testing.assert_close(found, wanted[where])
    assert (
        difference(steered(llama, again), steered(llama, plan))
        < 1e-4
        < 0.1
        < difference(steered(llama, again), llama(TOKENS))
    )
    write(llama, plan, done.path)  # over an older one


def test_layers_are_read_back_from_every_holder(llama: Any) -> None:
    plan = plan_of(0, 2) + plan_of(2, site="resid_pre")
    layers = to_layers(llama, plan)
    assert list(layers) == [0, 1, 2] and torch.equal(layers[2], 2 * vector(2))
    arrays = {layer: found.numpy() for layer, found in layers.items()}
    for holder in (
        layers,
        SimpleNamespace(model_type="llama", directions=arrays),
        SimpleNamespace(layer_activations=layers, layer_type="decoder_block"),
    ):
        again = from_layers(holder)
        assert all(torch.equal(found, layers[layer]) for (layer, _), found in again.vectors().items())
        assert {i.scope.name for i in again.interventions} == {"all"}
    assert torch.equal(from_layers(layers, coefficient=-3.0).vectors()[1, "resid_post"], -3 * layers[1])
    inside = from_layers(SimpleNamespace(layer_activations=layers, layer_type="self_attn"))
    assert {i.site for i in inside.interventions} == {"attn_out"}


def test_lm_eval_clamps_as_we_do(llama: Any, tmp_path: Path) -> None:
    plan = (
        SteeringPlan.of({0: Clamp(vector(4), 3.0)}, scope="all")
        + SteeringPlan.of({2: Ablation(vector(5))}, scope="all", site="resid_pre")
        + plan_of(2)
    )
    done = to_lm_eval(llama, plan, tmp_path / "steer.pt")
    entries = torch.load(done.path, weights_only=True)
    assert {name: entry["action"] for name, entry in entries.items()} == {
        "layers.0": "clamp",
        "layers.1": "clamp",
        "layers.2": "add",
    }
    assert [entries[f"layers.{layer}"]["steering_coefficient"] for layer in (0, 1)] == [3.0, 0.0]
    assert difference(steered(llama, from_lm_eval(entries)), steered(llama, plan)) < 1e-5
    # a bias is taken off before the clamp and put back after it
    x, bias, direction = vector(1), vector(2), vector(3) / vector(3).norm()
    entry = {"steering_vector": direction, "steering_coefficient": 2.0, "action": "clamp", "bias": bias}
    clamp = from_lm_eval({"h.0": entry}).interventions[0].transform
    delta = clamp.delta(x[None, None], clamp.tensors(), 1.0)[0, 0]
    torch.testing.assert_close(x + delta, (x - bias) + (2.0 - (x - bias) @ direction) * direction + bias)


# --- what other tools make of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_modules_that_lm_eval_hooks_are_the_blocks(zoo: Any, name: str, tmp_path: Path) -> None:
    model, plan = zoo(name, KIND), plan_of(0, 2)
    entries = torch.load(to_lm_eval(model, plan, tmp_path / "steer.pt").path, weights_only=True)
    theirs = plain(model)

    def add(entry: Any, _module: Any, _args: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        new = stream + entry["steering_coefficient"] * entry["steering_vector"]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    for module, entry in entries.items():
        theirs.base_model.get_submodule(module).register_forward_hook(partial(add, entry))
    assert difference(theirs(TOKENS).logits, steered(model, plan)) < 1e-4


def test_the_gguf_package_reads_what_we_write_and_we_what_it_writes(zoo: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    plan = plan_of(1, 2)
    reader = gguf.GGUFReader(to_gguf(zoo("llama", KIND), plan, tmp_path / "ours.gguf").path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
        "sims_lens.model": "tiny-llama",
    }
    for tensor in reader.tensors:
        layer = int(tensor.name.removeprefix("direction."))
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.data_offset % 32 == 0
        np.testing.assert_array_equal(tensor.data, plan.vectors()[layer, "resid_post"].numpy())
    assert len(reader.tensors) == 2

    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_custom_alignment(64)
    writer.add_array("tags", ["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float64("scale", 0.5)
    for layer in (1, 2):
        writer.add_tensor(f"direction.{layer}", vector(layer).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = from_gguf(tmp_path / "theirs.gguf", coefficient=2.0)
    assert all(torch.equal(found, 2 * vector(layer)) for (layer, _), found in theirs.vectors().items())
    assert theirs.layers == (1, 2) and theirs.provenance.model == ""


def test_vllm_specs_are_plain(zoo: Any, tmp_path: Path) -> None:
    specs = json.loads(to_vllm(zoo("llama", KIND), plan_of(0, 2), tmp_path / "specs.json").path.read_text())
    assert list(specs) == ["blocks.0.hook_out", "blocks.2.hook_out"]
    for layer in (0, 2):
        assert specs[f"blocks.{layer}.hook_out"] == {"op": "add", "value": (2 * vector(layer)).tolist()}


def test_a_steerkit_probe_has_what_its_loader_wants(zoo: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    done = to_steerkit(zoo("llama", KIND), plan_of(1), tmp_path / "probe.safetensors")
    with safe_open(done.path, framework="pt") as file:
        metadata, direction = file.metadata(), file.get_tensor("direction.diff_of_means")
    assert metadata["hook_name"] == "blocks.1.hook_resid_post" and metadata["hook_site"] == "resid_post"
    assert (metadata["layer"], metadata["n_total_layers"], metadata["model_id"]) == ("1", "3", "tiny-llama")
    assert math.isclose(float(metadata["auto_alpha"]), 2 * float(vector(1).norm()), rel_tol=1e-6)
    torch.testing.assert_close(direction, vector(1) / vector(1).norm())
    assert all(json.loads(metadata[name]) is not None for name in ("bias_json", "metrics_json", "extras_json"))
    assert from_steerkit(done.path, coefficient=0.5).interventions[0].strength == 0.5


# --- plans that a format can't hold ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "plan", "message"),
    [
        *((s, plan_of(1, scope="generation"), r"hook_resid_post: acts on 'generation', there on") for s in FORMATS),
        *((s, plan_of(1).decaying(2.0), "decays over generated tokens") for s in FORMATS),
        *((s, plan_of(1, site="attn_out"), "not a block's output, the only place there") for s in FORMATS),
        *((s, plan_of(0, site="resid_pre"), "not a block's output, the only place there") for s in FORMATS),
        *(
            (
                s,
                SteeringPlan.of({1: Ablation(vector())}, coefficient=0.5, scope="all"),
                "ablation.*there only additions",
            )
            for s in FORMATS
        ),
        ("gguf", plan_of(0, 1), "the output of block 0, there block 1 is the first"),
        ("gguf", plan_of(1, site="resid_pre"), "hook_resid_pre: the output of block 0"),
        ("safetensors", plan_of(0, 1, 2), r"hook_resid_post and 1 more: a second block beside 2.*plan\.restrict"),
        ("pt", SteeringPlan.of({1: Ablation(vector())}, scope="all", site="mlp_out"), "not a block's output"),
        ("pt", plan_of(1) + SteeringPlan.of({1: Ablation(vector())}, scope="all"), "a second action at one block's"),
        ("pt", SteeringPlan.of({1: Ablation(vector())}, scope="all") + plan_of(1), "a second action at one block's"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_refusals_say_what_is_lost_and_by_how_much(
    zoo: Any, suffix: str, plan: SteeringPlan, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message + r".*differs by up to (\d|0\.[0-9])") as raised:
        FORMATS[suffix][0](zoo("llama", KIND), plan, tmp_path / f"steer.{suffix}")
    assert float(str(raised.value).partition("by up to ")[2].split()[0]) > 0.02
    assert not list(tmp_path.iterdir())


def test_layers_are_refused_the_same_way(zoo: Any) -> None:
    with pytest.raises(ExportError, match=r"vector per block can't hold.*acts on 'response'.*differs by up to \d"):
        to_layers(zoo("llama", KIND), plan_of(1, scope="response"))


def test_a_parallel_blocks_attention_is_part_of_its_output(zoo: Any) -> None:
    layers = to_layers(zoo("gpt_neox", KIND), plan_of(1, site="attn_out"))
    assert torch.equal(layers[1], 2 * vector(1))


def test_the_wrong_model_and_the_wrong_path_are_noticed(zoo: Any, tmp_path: Path) -> None:
    llama, path = zoo("llama", KIND), tmp_path / "steer.gguf"
    plan = from_gguf(to_gguf(llama, plan_of(1), path).path)
    with (
        pytest.raises(PlanError, match="made for 'tiny-llama', the model is 'tiny-gpt2'"),
        steering(zoo("gpt2", KIND), plan),
    ):
        pass
    with pytest.raises(PlanError, match="d_model = 32"):
        to_gguf(llama, SteeringPlan.addition({1: torch.ones(16)}), path)
    with pytest.raises(ExportError, match="does not exist; create it first"):
        to_gguf(llama, plan_of(1), tmp_path / "no" / "steer.gguf")
    with pytest.raises(ExportError, match="'steer.bin': lm-eval takes the file for something else"):
        to_lm_eval(llama, plan_of(1), tmp_path / "steer.bin")
    with pytest.raises(ExportError, match="holds a unit direction, and the vector at block 1 is zero"):
        to_steerkit(llama, plan_of(1) - plan_of(1), tmp_path / "zero.safetensors")
    assert path.is_file() and [p.name for p in tmp_path.iterdir()] == ["steer.gguf"]
    for read in (from_gguf, from_vllm, from_steerkit):
        with pytest.raises(ExportError, match="there is no .* at .*missing"):
            read(tmp_path / "missing")
        with pytest.raises(ExportError, match="there is no .* at"):
            read(tmp_path)


# --- files that nobody should trust ----------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def number_key(name: str, value: int) -> bytes:
    return text(name) + struct.pack("<II", 4, value)


def info(name: str | bytes = "direction.1", *, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_file(
    *infos: bytes,
    keys: tuple[bytes, ...] = (),
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    data: bytes = np.ones(16, dtype="<f4").tobytes(),
) -> bytes:
    head = magic + struct.pack("<IQQ", version, *(counts or (len(infos), len(keys)))) + b"".join((*keys, *infos))
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


HUGE = 2**63

BAD_GGUF = {
    "empty": (b"", "cut off: 4 bytes wanted at 0 of 0"),
    "magic": (gguf_file(info(), magic=b"GGML"), "doesn't begin with 'GGUF'"),
    "version": (gguf_file(info(), version=1), "version 1, not 2 or 3"),
    "big-endian": (gguf_file(info(), version=3 << 24), "a big-endian file is not read"),
    "no tensors": (gguf_file(), "has no tensors"),
    "layer 0": (gguf_file(info("direction.0")), "direction.0, which llama.cpp refuses"),
    "a model": (gguf_file(info("token_embd.weight", shape=(4, 4))), "'token_embd.weight' is not called direction.N"),
    "no number": (gguf_file(info("direction.x")), "'direction.x' is not called direction.N"),
    "negative": (gguf_file(info("direction.-1")), "is not called direction.N"),
    "huge layer": (gguf_file(info("direction.99999999999")), "is not called direction.N"),
    "other digits": (gguf_file(info("direction.\u0663")), "is not called direction.N"),
    "not utf-8": (gguf_file(info(b"direction.\xff")), "is not UTF-8"),
    "half": (gguf_file(info(kind=1)), "is of type 1, not float32"),
    "2-d": (gguf_file(info(shape=(2, 2))), r"has shape \[2, 2\]"),
    "0-d": (gguf_file(info(shape=())), r"has shape \[\]"),
    "no entries": (gguf_file(info(shape=(0,))), r"has shape \[0\]"),
    "many axes": (gguf_file(info(shape=(1,) * 9)), "is of type|has shape"),
    "two widths": (gguf_file(info(), info("direction.2", shape=(3,))), r"must have one size, got \[3, 4\]"),
    "twice": (gguf_file(info(), info()), "two directions for one block"),
    "too long": (gguf_file(info(shape=(17,))), "direction.1 lies beyond"),
    "huge": (gguf_file(info(shape=(HUGE,))), "direction.1 lies beyond"),
    "far away": (gguf_file(info(offset=HUGE)), "direction.1 lies beyond"),
    "huge count": (gguf_file(info(), counts=(HUGE, 0)), "cut off|not called"),
    "huge keys": (gguf_file(info(), counts=(1, HUGE)), "cut off|unknown type"),
    "huge name": (gguf_file(struct.pack("<Q", HUGE)), "cut off"),
    "huge string": (gguf_file(info(), keys=(text("a") + struct.pack("<IQ", 8, HUGE),)), "cut off"),
    "huge array": (gguf_file(info(), keys=(text("a") + struct.pack("<IIQ", 9, 4, HUGE),)), "cut off"),
    "huge strings": (gguf_file(info(), keys=(text("a") + struct.pack("<IIQ", 9, 8, HUGE),)), "cut off"),
    "nested array": (gguf_file(info(), keys=(text("a") + struct.pack("<IIQ", 9, 9, 1),)), "of unknown type 9"),
    "unknown type": (gguf_file(info(), keys=(text("a") + struct.pack("<I", 99),)), "of unknown type 99"),
    "alignment": (gguf_file(info(), keys=(number_key("general.alignment", 3),)), "alignment 3 is not a power of two"),
    "alignment 0": (gguf_file(info(), keys=(number_key("general.alignment", 0),)), "alignment 0 is not a power"),
    "alignment text": (
        gguf_file(info(), keys=(text("general.alignment") + struct.pack("<I", 8) + text("32"),)),
        "alignment '32' is not a power",
    ),
    "huge alignment": (gguf_file(info(), keys=(number_key("general.alignment", 2**31),)), "lies beyond"),
    "nan": (gguf_file(info(), data=np.full(16, np.nan, "<f4").tobytes()), "has 4 NaN or infinite entries of 4"),
    "infinite": (gguf_file(info(), data=np.full(16, -np.inf, "<f4").tobytes()), "has 4 NaN or infinite entries of 4"),
}


@pytest.mark.parametrize("name", BAD_GGUF)
def test_bad_control_vectors_give_one_clear_error(name: str, tmp_path: Path) -> None:
    data, message = BAD_GGUF[name]
    (tmp_path / "bad.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ExportError, match=message) as raised:
            from_gguf(tmp_path / "bad.gguf")
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert "bad.gguf" in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_the_helper_of_these_tests_writes_good_ones(tmp_path: Path) -> None:
    for version in (2, 3):
        path = tmp_path / f"{version}.gguf"
        path.write_bytes(gguf_file(info(), info("direction.12", offset=32), version=version))
        assert from_gguf(path).layers == (1, 12)


def test_an_absurdly_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.gguf").open("wb") as file:
        file.truncate(1 << 34)  # sparse
    with pytest.raises(ExportError, match="17179869184 bytes, more than any GGUF control vector"):
        from_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("suffix", sorted(FORMATS.keys() - {"pt"}))  # which is never read from a file
def test_truncated_and_mutated_files_are_refused_or_read_never_worse(zoo: Any, suffix: str, tmp_path: Path) -> None:
    write, read = FORMATS[suffix]
    good = write(zoo("llama", KIND), plan_of(2), tmp_path / f"good.{suffix}").path.read_bytes()
    rng, path, refused, start = random.Random(0), tmp_path / f"bad.{suffix}", 0, time.monotonic()

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            found = read(path)
        except ExportError as error:
            assert "\n" not in str(error)
            return False
        assert all(bool(v.isfinite().all()) for v in found.vectors().values())
        return True

    assert attempt(good)
    for length in range(0, len(good), max(1, len(good) // 60)):
        assert not attempt(good[:length]), length
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            where = rng.randrange(len(data) if rng.random() < 0.3 else min(len(data), 300))
            kind = rng.random()
            if kind < 0.6:
                data[where] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            elif kind < 0.8:
                del data[where : where + rng.randrange(1, 9)]
            else:
                data[where:where] = bytes(rng.choices((0, 1, 255), k=rng.randrange(1, 9)))
        refused += not attempt(bytes(data))
    assert refused > 60 and time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[]", "holds no intervention specs"),
        ("{}", "holds no intervention specs"),
        ('{"blocks.1.hook_resid_post": {"op": "add", "value": [1.0]}}', "'blocks.1.hook_resid_post' is not the output"),
        ('{"blocks.x.hook_out": {"op": "add", "value": [1.0]}}', "is not the output of a block"),
        ('{"blocks.1.hook_out": {"op": "scale", "factor": 2.0}}', "the spec at blocks.1.hook_out is not"),
        ('{"blocks.1.hook_out": {"op": "add", "value": [1.0], "pos": 0}}', "the spec at blocks.1.hook_out is not"),
        ('{"blocks.1.hook_out": 3}', "the spec at blocks.1.hook_out is not"),
        ('{"blocks.1.hook_out": {"op": "add", "value": 3.0}}', "is not a list of numbers"),
        ('{"blocks.1.hook_out": {"op": "add", "value": ["1", true]}}', "is not a list of numbers"),
        ('{"blocks.1.hook_out": {"op": "add", "value": [[1.0]]}}', "is not a list of numbers"),
        ('{"blocks.1.hook_out": {"op": "add", "value": []}}', r"must have shape \[d_model\], got \[0\]"),
        ('{"blocks.1.hook_out": {"op": "add", "value": [NaN, 1.0]}}', "has 1 NaN or infinite entries of 2"),
        ('{"blocks.1.hook_out": {"op": "add", "value": [1e999]}}', "has 1 NaN or infinite entries"),
        ('{"blocks.1.hook_out": {"op": "add", "value": [1' + "0" * 400 + "]}}", "too large|infinite entries"),
        ('{"blocks.1.hook_out": {"op": "add", "value": [1' + "0" * 5000 + "]}}", "is not JSON"),
        (
            '{"blocks.1.hook_out": {"op": "add", "value": [1, 2]}, "blocks.2.hook_out": {"op": "add", "value": [1]}}',
            "must have one size",
        ),
    ],
    ids=range(19),
)
def test_bad_specs_give_one_clear_error(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "specs.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ExportError, match=message) as raised:
        from_vllm(path)
    assert len(str(raised.value)) < 400


PROBE = {"layer": "1", "hook_site": "resid_post", "default_method": "logistic", "auto_alpha": "2.0", "model_id": "m"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": None}, r"not a steerkit probe with what was asked for \('layer'\); it has \['logistic'\]"),
        ({"layer": "one"}, "not a steerkit probe with what was asked for"),
        ({"layer": "-1"}, "not a site of a block|layer must be an integer from 0 up"),
        ({"default_method": "mass_mean"}, r"'direction.mass_mean'\); it has \['logistic'\]"),
        ({"auto_alpha": ""}, "has no calibrated strength; pass coefficient="),
        ({"auto_alpha": "inf"}, "has no calibrated strength"),
        ({"hook_site": "resid_mid"}, "is for 'resid_mid', not a site of a block"),
        ({"hook_name": "ln_final.hook_normalized"}, "is for 'ln_final.hook_normalized', not a site of a block"),
        ({"vector": torch.full((4,), math.nan)}, "has 4 NaN or infinite entries of 4"),
        ({"vector": torch.ones(2, 2)}, r"must have shape \[d_model\], got \[2, 2\]"),
        ({"vector": torch.ones(4, dtype=torch.int64)}, "must hold floats"),
    ],
    ids=range(11),
)
@pytest.mark.usefixtures("unchecked")
def test_bad_probes_give_one_clear_error(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    metadata = {k: v for k, v in {**PROBE, **change}.items() if isinstance(v, str)}
    tensor = change.get("vector", torch.tensor([3.0, 0.0, 4.0, 0.0]) / 5)
    save_file({"direction.logistic": tensor}, tmp_path / "probe", metadata=metadata)
    with pytest.raises(ExportError, match=message):
        from_steerkit(tmp_path / "probe")


def test_a_probe_of_steerkits_own_is_read(tmp_path: Path) -> None:
    both = {"direction.logistic": torch.eye(4)[0].clone(), "direction.mass_mean": torch.eye(4)[1].clone()}
    save_file(both, tmp_path / "probe", metadata=PROBE)
    plan = from_steerkit(tmp_path / "probe")
    assert torch.equal(plan.vectors()[1, "resid_post"], 2 * torch.eye(4)[0]) and plan.provenance.model == "m"
    plan = from_steerkit(tmp_path / "probe", method="mass_mean", coefficient=-1.0)
    assert torch.equal(plan.vectors()[1, "resid_post"], -torch.eye(4)[1])
    (tmp_path / "junk").write_bytes(b"\x80\x04junk" * 9)
    with pytest.raises(ExportError, match="not a readable safetensors file"):
        from_steerkit(tmp_path / "junk")


GOOD = {"steering_vector": vector(), "steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "must map module names to entries"),
        ([GOOD], "must map module names to entries"),
        ({"layers": GOOD}, "'layers' of a steering file for lm-eval|module 'layers'"),
        ({3: GOOD}, "module 3"),
        ({"layers.1": None}, "needs a steering_vector and an action"),
        ({"layers.1": {"action": "add"}}, "needs a steering_vector and an action"),
        ({"layers.1": {**GOOD, "action": "rotate"}}, "got action 'rotate'"),
        ({"layers.1": {**GOOD, "bias": vector()}}, "must add, without a bias"),
        ({"layers.1": {**GOOD, "head_index": 2}}, "is for attention head 2"),
        ({"layers.1": {**GOOD, "steering_coefficient": "2"}}, "must be a number, got '2'"),
        ({"layers.1": {**GOOD, "steering_coefficient": math.nan}}, "coefficient must be finite"),
        ({"layers.1": {**GOOD, "steering_vector": [1.0]}}, "steering_vector at layers.1 must be a torch tensor"),
        ({"layers.1": {**GOOD, "steering_vector": torch.full((3,), math.inf)}}, "has 3 NaN or infinite entries"),
        ({"layers.1": {**GOOD, "action": "clamp", "steering_vector": torch.zeros(3)}}, "is zero: it has no direction"),
        ({"layers.1": {**GOOD, "action": "clamp", "bias": torch.ones(3)}}, "bias at layers.1 has 3 entries"),
    ],
    ids=range(15),
)
@pytest.mark.usefixtures("unchecked")
def test_bad_lm_eval_entries_give_one_clear_error(entries: Any, message: str) -> None:
    with pytest.raises(SimsError, match=message):
        from_lm_eval(entries)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (object(), "expected vectors by layer number, .* got object"),
        ({"1": vector()}, "expected vectors by layer number"),
        ({True: vector()}, "expected vectors by layer number"),
        (
            SimpleNamespace(layer_activations={1: vector()}, layer_type="input_layernorm"),
            "layer_type 'input_layernorm'",
        ),
        (SimpleNamespace(directions={1: np.array([math.nan])}), "has 1 NaN or infinite entries"),
        (SimpleNamespace(directions={1: np.arange(3)}), "must hold floats"),
        (SimpleNamespace(directions={1: "junk"}), "must be a torch tensor"),
        ({1: vector(), 2: vector(size=3)}, "must have one size"),
        ({}, "vectors must map layers"),
        ({-1: vector()}, "layer must be an integer from 0 up"),
    ],
    ids=range(10),
)
@pytest.mark.usefixtures("unchecked")
def test_bad_holders_give_one_clear_error(source: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        from_layers(source)
