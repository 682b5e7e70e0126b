"""Files are whole or absent, steps are computed once, damage is named."""

from pathlib import Path

import pytest
import torch

from sims_lens.cost import Cost
from sims_lens.data import Sample
from sims_lens.errors import RunError
from sims_lens.store import Folder, RunStore, read_jsonl, write_bytes, write_json, write_jsonl


def sample(text: str = "x", score: float | None = 0.1 + 0.2) -> Sample:
    return Sample(prompt=3, draw=1, tokens=(5, 6), text=text, ended=True, score=score, nll=1 / 3)


def test_samples_round_trip_exactly_and_are_made_once(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a")
    odd = [sample("naïve 🙂 \u2028 line\nbreak \x00 \ud800"), sample(score=None), sample(score=1e-300)]
    assert folder.samples("s", lambda: odd) == odd
    assert folder.samples("s", lambda: pytest.fail("made twice")) == odd
    folder.finish()
    assert folder.complete and folder.read_samples("s") == odd
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_tensors_round_trip_bit_for_bit(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a")
    tensors = {"v": torch.randn(2, 3).T, "n": torch.tensor([1.5])}
    back = folder.tensors("t", lambda: tensors)
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a")

    def half() -> list[Sample]:
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        folder.samples("s", half)
    assert not list(tmp_path.rglob("*.*jsonl*"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    write_bytes(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_cost_adds_up_over_interruptions(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a")
    folder.spend("sample", Cost(seconds=1.0, decode=10, peak=7))
    folder.spend("sample", Cost(seconds=2.0, peak=5))
    assert folder.json("cost", dict) == {"sample": {"seconds": 3.0, "decode": 10, "peak": 7}}
    assert folder.costs() == {"sample": Cost(seconds=3.0, decode=10, peak=7)}


@pytest.mark.parametrize("content", ['{"prompt": 1', '{"prompt": 1}\n', "[1]\n", '"x"\n'])
def test_damaged_samples_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/s.jsonl").write_text(content)
    with pytest.raises(RunError, match=r"s\.jsonl is damaged"):
        Folder(tmp_path / "a").read_samples("s")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read .*s\.jsonl"):
        Folder(tmp_path / "a").read_samples("s")
    (tmp_path / "t.safetensors").write_bytes(b"garbage")
    with pytest.raises(RunError, match=r"t\.safetensors"):
        Folder(tmp_path / "x").tensors("t", dict)  # makes an empty file, which is a valid one
        (tmp_path / "x.partial/t.safetensors").write_bytes(b"garbage")
        Folder(tmp_path / "x").tensors("t", dict)


def test_a_header_of_something_else_or_of_the_future_is_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    write_json(tmp_path / "run.json", {"format": "other"})
    with pytest.raises(RunError, match="not of a sims_lens run"):
        store.header()
    write_json(tmp_path / "run.json", {"format": "sims_lens.run", "version": 99})
    with pytest.raises(RunError, match="newer sims_lens"):
        store.header()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        store.header()


def test_jsonl_survives_any_line_separator_in_text(tmp_path: Path) -> None:
    rows = ["a\u2028b", "c\x85d", "e\x0bf", "g\r\nh"]
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert read_jsonl(tmp_path / "r.jsonl") == rows
