"""DPO as a baseline: trained on the loop's own pairs, measured as every other method, and the model left as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from common import KINDS, fingerprint
from test_comparison import CONFIG, PROMPTS, compare

import sims_lens as sims
from sims_lens.comparison import Comparison
from sims_lens.comparison.dpo import DPOConfig, check_dpo, training_flops, tune
from sims_lens.cost import Arithmetic
from sims_lens.data import ContrastPair, Sample
from sims_lens.errors import ConfigError, ModelError
from sims_lens.evaluate import side_effects
from sims_lens.plan import NOTHING
from sims_lens.store import Folder

pytest.importorskip("trl", reason='DPO needs pip install "sims-lens[dpo]"')
pytest.importorskip("peft", reason='LoRA needs pip install "sims-lens[dpo]"')

LORA = DPOConfig(learning_rate=2e-2, epochs=2, rank=4)
WHOLE = DPOConfig(learning_rate=2e-3, epochs=2, rank=None)
FEW: dict[str, Any] = {
    "pairs": (),
    "instruction": "",
    "seeds": (0,),
    "config": replace(CONFIG, evaluation=replace(CONFIG.evaluation, samples=1, controls=0)),
}
GOOD, BAD = (65, 66, 67), (68, 69, 70)
PAIRS = [ContrastPair(p, Sample(p, 0, GOOD, "ABC", False, 1.0), Sample(p, 1, BAD, "DEF", False, 0.0)) for p in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("llama", tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return sims.load(str(folder), kind="bridge")


@pytest.fixture(scope="module")
def found(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("comparisons") / "dpo"
    return compare(model, out, dpo=[LORA, WHOLE], **FEW)


def log_probs(model: Any, prompt: str, tokens: tuple[int, ...]) -> float:
    """Of a whole response."""
    head = sims.adapter.adapt(model).encode(prompt)  # type: ignore[attr-defined]
    with torch.inference_mode():
        logits = model(torch.tensor([[*head, *tokens]]))[0, len(head) - 1 : -1]
    return float(logits.float().log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).sum())


@pytest.mark.cases(2)
@pytest.mark.parametrize("config", [LORA, WHOLE], ids=["lora", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_better_response_gains_and_the_model_stays(folder: Path, kind: str, config: DPOConfig) -> None:
    model = sims.load(str(folder), kind=kind)
    log_probs(model, PROMPTS[0], GOOD)  # a bridge adds hooks of its own in its first pass
    before, pad = fingerprint(model), model.tokenizer.pad_token
    tuned, training = tune(model, PROMPTS, PAIRS, config, seed=3)
    assert type(tuned) is type(model) and tuned is not model
    assert fingerprint(model) == before and model.tokenizer.pad_token == pad

    def gain(tokens: tuple[int, ...]) -> float:
        return sum(log_probs(tuned, p, tokens) - log_probs(model, p, tokens) for p in PROMPTS[:8]) / 8

    margin = LORA.beta * (gain(GOOD) - gain(BAD))
    assert margin > 0.05 and training.accuracy == 1.0 and training.loss < np.log(2) and training.pairs == 8
    assert not any(p.grad is not None for p in tuned.parameters()) and not tuned.training


def test_it_is_seeded_and_draws_no_random_number_of_others(model: Any) -> None:
    # Python's own can't be looked at here: beartype draws from it.
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    runs = [tune(model, PROMPTS, PAIRS, LORA, seed=seed)[0] for seed in (1, 1, 2)]
    values = [log_probs(tuned, PROMPTS[0], GOOD) for tuned in runs]
    assert values[0] == values[1] != values[2]
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [LORA, WHOLE], ids=["lora", "whole"])
def test_the_operations_are_those_of_pytorch(model: Any, config: DPOConfig) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _, training = tune(model, ["Say the very same thing to everybody here."] * 8, PAIRS, config, seed=0)
    # PyTorch counts attention to later tokens too: half of what it counts there.
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] / 2
    assert training.flops == pytest.approx(counter.get_total_flops() - attention, rel=0.05)


def test_it_is_a_method_like_the_others(found: Comparison, model: Any) -> None:
    assert [m.name for m in found.family("DPO")] == [LORA.name, WHOLE.name]
    run = sims.open_run(found.path / "seed_0")
    loop, lora = found["loop, 2 iterations"], found[LORA.name]
    assert lora.learning.responses == loop.learning.responses and lora.learning.tokens == loop.learning.tokens
    file = min((found.path / "seed_0" / "compared").glob("dpo_*.training.json"))
    took = Folder(file.parent).read_json(file.stem)
    contrasted = sum(len((Path(i.path) / "pairs.jsonl").read_text().splitlines()) for i in run.iterations)
    assert took["pairs"] == contrasted
    shown = found.cells()
    seconds = [row[shown[0].index("seconds of training")] for row in shown]
    assert [bool(cell) for cell in seconds[1:]] == [m.family == "DPO" for m in found.methods]
    assert lora.learning.flops > loop.learning.flops and lora.learning.training_seconds > 0
    assert np.isfinite(lora.kl).all() and (lora.kl > 0).all() and np.isfinite(lora.nll).all()
    assert lora.independent_changes is not None and np.isnan(lora.norm[0])
    again = sims.open_comparison(found.path)
    assert repr(again) == repr(found) and any(LORA.name in line for line in again.head_to_head())
    (figure,) = sims.plots.figures(found)
    assert "DPO" in {trace.name for trace in figure.data}


def test_what_it_says_is_measured_against_the_base_model(model: Any) -> None:
    tuned, _ = tune(model, PROMPTS, PAIRS, LORA, seed=0)
    (sample,) = side_effects(model, PROMPTS, [Sample(0, 0, GOOD, "ABC", False)], NOTHING, tuned=tuned)
    assert sample.nll == pytest.approx(-log_probs(model, PROMPTS[0], GOOD) / 3, rel=1e-4)
    (own,) = side_effects(model, PROMPTS, [sample], NOTHING)
    assert sample.kl is not None and sample.kl > 0 and own.kl == 0 and own.nll == pytest.approx(sample.nll)


def test_nothing_is_trained_twice(found: Comparison, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr("sims_lens.comparison.running.tune", never)
    again = compare(model, found.path, dpo=[LORA, WHOLE], **FEW)
    assert repr(again) == repr(found)
    with pytest.raises(AssertionError, match="trained again"):
        compare(model, found.path, dpo=[replace(LORA, epochs=1)], **FEW)


def test_what_cannot_be_trained_is_said_before_anything_is_run(
    folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (LORA, "dpo", [3], [LORA, LORA]):
        with pytest.raises(ConfigError, match="dpo"):
            check_dpo(model, wrong)
    for name, value in (("beta", 0.0), ("learning_rate", -1.0), ("epochs", 0), ("batch", 0), ("rank", 0)):
        with pytest.raises(ConfigError, match=name):
            DPOConfig(**{name: value})  # type: ignore[arg-type]
    other = sims.load(str(folder), kind="bridge")
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    with pytest.raises(ModelError, match="not what the checkpoint holds"):
        tune(other, PROMPTS, PAIRS, LORA, seed=0)
    del other.sims_source["folder"]
    with pytest.raises(ModelError, match=r"load the model with sims_lens\.load"):
        compare(other, tmp_path / "none", dpo=[LORA])
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr("sims_lens.comparison.dpo.find_spec", lambda name: None if name == "peft" else 1)
    with pytest.raises(ConfigError, match=r'the package peft: pip install "sims-lens\[dpo\]", or train every weight'):
        check_dpo(model, [LORA])
    assert check_dpo(model, [WHOLE]) == (WHOLE,) and check_dpo(other, ()) == ()


def test_every_weight_takes_three_passes_and_lora_two() -> None:
    arithmetic = Arithmetic(blocks=1.0, attention=0.0, unembed=0.1)
    rows = [(3, 2), (3, 5)]
    assert training_flops(arithmetic, rows, epochs=2, adapters=None) == pytest.approx(13 * (1 + 2 * 3) * 1.1)
    assert training_flops(arithmetic, rows, epochs=2, adapters=10) == pytest.approx(
        13 * (1 + 2 * 2) + 1.3 * (1 + 2 * 3) + 6 * 10 * 13 * 2
    )
