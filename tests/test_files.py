"""Files are whole or absent; of a journal, at most the last line is lost, and nothing false is read."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sims_lens.errors import RunError
from sims_lens.files import Journal, line, write_bytes

ROWS: list[Any] = [{"a": 1}, ["\n", "\ud800", 1e-300], "x" * 100_000, None, {"b": {"c": [True]}}]


def written(path: Path, rows: list[Any]) -> Journal:
    journal = Journal(path)
    with journal.open():
        for row in rows:
            journal.append(row)
    return journal


def test_what_is_appended_is_read_back_over_sessions(tmp_path: Path) -> None:
    assert Journal(tmp_path / "j").read() == []
    written(tmp_path / "deep/j", ROWS)
    assert written(tmp_path / "deep/j", ROWS).read() == ROWS * 2


@settings(deadline=None)  # it fsyncs
@given(st.data())
def test_a_journal_that_was_cut_off_anywhere_goes_on(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = written(Path(folder) / "j", ROWS)
        size = data.draw(st.integers(0, journal.path.stat().st_size))
        os.truncate(journal.path, size)
        ends = [len(line(row)) for row in ROWS]
        whole = sum(sum(ends[: i + 1]) <= size for i in range(len(ROWS)))
        assert journal.read() == ROWS[:whole]
        assert written(journal.path, ["new"]).read() == [*ROWS[:whole], "new"]


@settings(deadline=None)  # it fsyncs
@given(st.integers(0, 1000), st.integers(1, 255))
def test_a_changed_byte_costs_its_line_and_nothing_false_is_read(place: int, change: int) -> None:
    rows = [{"number": i} for i in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        journal = written(Path(folder) / "j", rows)
        data = bytearray(journal.path.read_bytes())
        data[place % len(data)] ^= change
        journal.path.write_bytes(data)
        found = journal.read()
        assert [row for row in rows if row in found] == found and len(found) >= len(rows) - 2


def test_a_line_that_fails_half_way_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path / "j"), os.write
    with journal.open():
        journal.append(1)
        with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left"):
            calls = iter([True, False])

            def half(descriptor: int, data: Any) -> int:
                if next(calls):
                    return write(descriptor, data[:4])
                raise OSError(28, "No space left on device")

            patch.setattr("os.write", half)
            journal.append(2)
        journal.append(3)
    assert journal.read() == [1, 3]


def test_short_writes_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr("os.write", lambda descriptor, data: write(descriptor, data[:7]))
    write_bytes(tmp_path / "f", b"0123456789" * 10)
    assert (tmp_path / "f").read_bytes() == b"0123456789" * 10
    assert written(tmp_path / "j", ROWS[:2]).read() == ROWS[:2]


def test_a_journal_is_not_led_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "j").symlink_to(tmp_path / "mine")
    with pytest.raises(RunError, match="it is a link"), Journal(tmp_path / "j").open():
        pass
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_files_get_the_rights_that_others_have(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_bytes(tmp_path / "f", b"")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode
