"""Whatever is given: a result, or one line that names the value and the remedy; never another exception.

The calls and what may be wrong with their arguments are in ``bad_input.py``.
"""

import inspect
import json
import shutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import tiny
import torch
from bad_input import ENTRIES, MADE, Lab
from common import KINDS, fingerprint, plan_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.errors import ModelError, PromptError, SimsError

PUBLIC = ("sims_lens", *(f"sims_lens.{name}" for name in sims._NAMESPACES))
LONGEST = 400
SLOW = {
    "improve": 3,
    "compare": 2,
    "capability": 1,
    "calibrate": 6,
    "interaction": 6,
    "lab.misled": 2,
    "lab.reward_hacking": 2,
}
EXAMPLES = 6


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def on_meta(model: Any) -> Any:
    """The model without its weights, as ``accelerate`` leaves what is on a disk."""
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = nn.Parameter(weight.to("meta"))
    return model


def in_two_types(model: Any) -> Any:
    for weight in model.blocks[2].parameters():
        weight.data = weight.data.double()
    return model


def without_tokenizer(model: Any) -> Any:
    model.tokenizer = None
    return model


def without_ends(model: Any) -> Any:
    model.tokenizer.eos_token = model.tokenizer.pad_token = None
    return model


@pytest.fixture(scope="module")
def lab(fresh: Any, zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    kind = KINDS[0]
    steered = fresh("llama", kind)
    sims.attach(steered, plan_of(0))
    others = {
        "training": fresh("gpt2", "bridge").train(),
        "meta": on_meta(fresh("llama", kind)),
        "no tokenizer": without_tokenizer(fresh("llama", kind)),
        "no ends": without_ends(fresh("gpt2", kind)),
        "half": fresh("llama", kind, dtype=torch.bfloat16),
        "mixed": in_two_types(fresh("llama", kind)),
        "steered": steered,
    }
    folder = tmp_path_factory.mktemp("lab")
    tiny.write("llama", folder / "tiny-llama")
    (folder / "own.txt").write_text("a\nb\n")
    (folder / "own.jsonl").write_text('{"prompt": "a", "positive": "b", "negative": "c"}\n')
    two = [{"role": "user", "content": "a"}]
    preferences = [{"prompt": "a", "chosen": [*two, answer("b")], "rejected": [*two, answer("c")]}]
    (folder / "preferences.json").write_text(json.dumps(preferences))
    made = Lab(zoo("llama", kind), others, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield made
    shutil.rmtree(folder, ignore_errors=True)


def spellings(value: Any, depth: int = 0) -> list[str]:
    """How a message may name a value: the start of it, or its type; or one of the things in it."""
    found = [repr(value)[:12].strip("'\""), str(value)[:12].strip(), type(value).__name__]
    if isinstance(value, (list, tuple)) and depth < 2:
        found += [spelling for item in value for spelling in spellings(item, depth + 1)]
    return [spelling for spelling in found if spelling]


def is_plain(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or (
        isinstance(value, str) and bool(value.strip())
    )


def check_message(error: SimsError, value: Any) -> None:
    said = str(error)
    assert "\n" not in said and len(said) <= LONGEST, said
    if is_plain(value):
        assert any(spelling in said for spelling in spellings(value)), said


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ENTRIES)
def test_bad_input_is_one_line_with_the_value(name: str, lab: Lab) -> None:
    entry = ENTRIES[name]
    good = entry.good(lab)
    before = fingerprint(lab.model)

    @settings(
        max_examples=SLOW.get(name, EXAMPLES),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        argument = data.draw(st.sampled_from(entry.arguments))
        values = entry.values(lab, argument)
        value = values[data.draw(st.integers(0, len(values) - 1), label=argument)]
        try:
            entry.call(**{**good, argument: value})
        except SimsError as error:
            check_message(error, value)

    if entry.arguments:
        run()
    assert fingerprint(lab.model) == before


def public() -> dict[str, Any]:
    """Every public callable of this package, under the name that it is called by first."""
    found: dict[int, tuple[str, Any]] = {}
    for module in PUBLIC:
        prefix = "" if module == "sims_lens" else module.removeprefix("sims_lens.") + "."
        for name in import_module(module).__all__:
            value = getattr(import_module(module), name)
            if callable(value) and str(getattr(value, "__module__", "")).startswith("sims_lens"):
                found.setdefault(id(value), (prefix + name, value))
    return dict(found.values())


def test_every_public_callable_has_an_entry() -> None:
    names = set(public())
    assert not (missing := sorted(names - set(ENTRIES) - set(MADE))), f"write in bad_input.py what {missing} takes"
    assert not (gone := sorted(set(MADE) - names)), f"{gone} are public no more"


@pytest.mark.parametrize("name", ENTRIES)
def test_every_argument_can_be_wrong_or_is_left_out_on_purpose(name: str, lab: Lab) -> None:
    from bad_input import BAD, LEFT_OUT

    entry = ENTRIES[name]
    for argument in inspect.signature(entry.call).parameters:
        known = argument in entry.bad or argument in BAD or argument in entry.skip or argument in LEFT_OUT
        assert known, f"say in bad_input.py what may be wrong with {argument} of {name}"


# Models in a state that matters


def test_a_model_whose_dropout_acts_is_refused(fresh: Any) -> None:
    model = fresh("gpt2", "bridge").train()
    with pytest.raises(ModelError, match=r"tiny-gpt2 is in training mode, and the dropout in .*; call model\.eval\(\)"):
        sims.residual_norms(model, prompts=["Say a."])
    model.eval()
    assert sims.residual_norms(model, prompts=["Say a."])


def test_a_model_in_training_mode_without_dropout_gives_the_same(fresh: Any) -> None:
    model = fresh("llama", "bridge")
    before = sims.residual_norms(model, prompts=["Say a."])
    assert sims.residual_norms(model.train(), prompts=["Say a."]) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_weights_or_in_two_types_is_refused(kind: str, fresh: Any) -> None:
    with pytest.raises(ModelError, match="is on the meta device and has no weights"):
        sims.fit(on_meta(fresh("llama", kind)), sims.tone_pairs(4))
    if kind == "hooked":  # a HookedTransformer casts what it reads
        return
    with pytest.raises(ModelError, match=r"are in float32 and float64, and it can't be run .*torch\.float32"):
        sims.fit(in_two_types(fresh("llama", kind)), sims.tone_pairs(4))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_no_pad_or_end_token_work(kind: str, fresh: Any) -> None:
    config = sims.SamplingConfig(max_new_tokens=4)
    for model in (fresh("llama", kind, dtype=torch.bfloat16), without_ends(fresh("gpt2", kind))):
        drawn = list(sims.LocalSampler(model, config).sample(["Say a."], n=2, plan=plan_of(1), seed=0))
        assert len(drawn) == 2 and all(len(sample.tokens) == 4 or sample.ended for sample in drawn)


def test_what_compares_refuses_a_steered_model_and_what_reads_takes_it(llama: Any) -> None:
    plain = sims.residual_norms(llama, prompts=["Say a."])
    with sims.steering(llama, plan_of(0)):
        assert sims.residual_norms(llama, prompts=["Say a."]) != plain
        for call in (
            lambda: sims.improve(llama, ["a", "b"], ranker=sims.ReadingEase()),
            lambda: sims.compare(llama, ["a", "b"], ranker=sims.ReadingEase()),
            lambda: sims.calibrate(llama, plan_of(1), prompts=["a"], ranker=sims.ReadingEase()),
        ):
            with pytest.raises(ModelError, match="a plan is attached to tiny-llama"):
                call()


# Special tokens in a prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@settings(max_examples=10, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_special_tokens_in_a_prompt_stay_text(architecture: str, kind: str, zoo: Any, data: st.DataObject) -> None:
    adapter = adapt(zoo(architecture, kind))
    special = adapter._special
    texts = st.text(st.characters(codec="utf-8"), max_size=8)
    parts = data.draw(st.lists(st.one_of(st.sampled_from(sorted(special.values())), texts), min_size=1, max_size=5))
    prompt = "".join(parts) + "x"
    harmless = adapter.encode("x")
    found = adapter.encode(prompt)
    assert [i for i in found if i in special] == [i for i in harmless if i in special]
    assert not set(adapter.encode_response(prompt)) & set(special)
    assert prompt in adapter.tokenizer.decode(found)


@settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=20))
def test_any_text_is_encoded_or_refused_in_one_line(text: str, zoo: Any) -> None:
    adapter = adapt(zoo("llama", KINDS[0]))
    try:
        adapter.encode(text)
    except PromptError as error:
        check_message(error, None)
        assert any("\ud800" <= c <= "\udfff" for c in text)
