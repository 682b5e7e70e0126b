"""Files are whole or absent, steps are computed once, damage is named."""

from pathlib import Path

import pytest
import torch

from sims_lens.cost import Cost
from sims_lens.data import Sample
from sims_lens.errors import DamagedError, RunError
from sims_lens.store import CHECKSUMS, Folder, RunStore, write_bytes, write_json


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
    with pytest.raises(RunError, match=r"cannot write .*f: No space left on device; free some space, then start"):
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
    with pytest.raises(DamagedError, match=r"s\.jsonl is damaged"):
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
    with pytest.raises(DamagedError, match="damaged"):
        store.header()


def test_jsonl_survives_any_line_separator_in_text(tmp_path: Path) -> None:
    rows = ["a\u2028b", "c\x85d", "e\x0bf", "g\r\nh"]
    folder = Folder(tmp_path / "a")
    folder.write_rows("r", rows)
    assert folder.read_rows("r") == rows


@pytest.mark.parametrize("change", [b"", b"{}", b'{"value": 2}\n'])
def test_a_file_that_is_not_what_was_written_is_named(tmp_path: Path, change: bytes) -> None:
    folder = Folder(tmp_path / "a")
    folder.json("m", lambda: {"value": 1})
    folder.json("n", lambda: {"value": 1})
    (folder.path / "m.json").write_bytes(change)
    with pytest.raises(DamagedError, match=r"m\.json is damaged .*start the same run again"):
        folder.read_json("m")
    assert folder.damaged() == ["m.json"] and folder.read_json("n") == {"value": 1}


def test_a_file_has_its_checksum_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path / "a")
    folder.write("f.json", b"1")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        folder.write("f.json", b"2")
    assert folder.read("f.json") == b"1"  # two are known, the old one is there
    folder.write("f.json", b"3")
    folder.finish()
    assert len((folder.path / CHECKSUMS).read_text().splitlines()) == 1 and folder.read("f.json") == b"3"


def test_what_a_step_was_made_from_stays_until_the_folder_is_complete(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a")
    with folder.journal("s").open() as journal:
        journal.append({"x": 1})
    folder.write_rows("s.responses", [1])
    assert folder.has("s.responses.jsonl") and folder.has("s.journal")
    folder.finish()
    assert [p.name for p in folder.path.iterdir()] == [CHECKSUMS]


def test_a_run_folder_is_one_process_s(tmp_path: Path) -> None:
    busy = pytest.raises(RunError, match="is being written by another process; wait for it")
    with RunStore(tmp_path).locked(), busy, RunStore(tmp_path).locked():
        pass
    with RunStore(tmp_path).locked():
        pass


def test_a_begun_run_that_lost_its_header_to_a_crash_can_begin(tmp_path: Path) -> None:
    header = {"config": {}, "model": {}, "ranker": "r", "evaluator": "", "versions": {}}
    prompts = [{"prompt": "p", "split": "train"}]
    RunStore(tmp_path).begin(header, prompts)
    (tmp_path / "run.json").unlink()
    RunStore(tmp_path).begin(header, prompts)
    assert RunStore(tmp_path).header()["ranker"] == "r"
    (tmp_path / "run.json").write_text("{")
    RunStore(tmp_path).begin(header, prompts)  # what is to be written is what was written
    assert RunStore(tmp_path).header()["ranker"] == "r"
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DamagedError, match=r"run\.json is damaged; put a copy back"):
        RunStore(tmp_path).begin(header | {"ranker": "other"}, prompts)
