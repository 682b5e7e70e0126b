"""Files that survive a crash: written whole or not at all, and journals, of which at most the last line is lost."""

import errno
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from sims_lens.errors import RunError

TEMPORARY: Final = ".tmp"
"""What the name of a file ends with while it is being written; one that a crash left behind can be deleted."""

_NO_LINKS: Final = getattr(os, "O_NOFOLLOW", 0)  # a link could lead a journal out of its folder

_SYNC_SECONDS = 1.0
"""How often a journal is flushed to the disk: a killed process loses nothing of it, a power cut this much."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: beside its place first, flushed to the disk, then renamed. A failure leaves the old file.

    Raises:
        OSError: it can't be written there.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY}")  # no other process or thread writes to it
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder to the disk, so that what was renamed in it has its name after a power cut too."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows does not open folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't
            raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    """All of it: a single call may write less than it was given."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


_REMEDIES: Final = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for more",
    errno.ELOOP: "it is a link: put the file in its place",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say which file can't be written, and what to do.

    Raises:
        RunError: in place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "see to the disk")
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; {remedy}, then start the same again: nothing is lost"
        ) from error


class Journal:
    """A file that only grows: one line for each thing that was computed, read back after a crash.

    A line is a CRC-32 in hexadecimal, a blank and a JSON value. A line that a crash left unfinished, or that is
    damaged, is skipped: what it held is computed anew.

    Args:
        path: the file; made with the first line, and its folder too.

    >>> import tempfile
    >>> journal = Journal(Path(tempfile.mkdtemp()) / "j")
    >>> with journal.open():
    ...     journal.append({"a": 1})
    >>> journal.read()
    [{'a': 1}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._end, self._synced = 0, 0.0

    def read(self) -> list[Any]:
        """What whole lines hold, in their order.

        Raises:
            OSError: the file can't be read.
        """
        return list(self.rows())

    def rows(self) -> Iterator[Any]:
        """What :meth:`read` gives, one by one."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            for data in file:
                with suppress(ValueError):
                    if data.endswith(b"\n"):
                        yield parsed(data)

    @contextmanager
    def open(self) -> Iterator["Journal"]:
        """A ``with`` block inside which lines are added; what a crash left of the last one is cut off first.

        Raises:
            RunError: the file can't be written.
        """
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o666)
        try:
            with explained(self.path):
                self._end = _whole(self._descriptor)
                os.ftruncate(self._descriptor, self._end)
                os.lseek(self._descriptor, self._end, os.SEEK_SET)
            yield self
            with explained(self.path):
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def append(self, row: Any) -> None:
        """Add a line: it is there once this returns, and on the disk a second later.

        Raises:
            RunError: it can't be written; the lines before it are whole.
        """
        assert self._descriptor is not None, "a journal is written inside its `with journal.open()` block"
        data = line(row)
        with explained(self.path):
            try:
                _write_all(self._descriptor, data)
            except BaseException:  # a second try must not begin in the middle of a line
                os.ftruncate(self._descriptor, self._end)
                os.lseek(self._descriptor, self._end, os.SEEK_SET)
                raise
            self._end += len(data)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()


def line(row: Any) -> bytes:
    """A line of a journal."""
    text = json.dumps(row).encode()
    return _checksum(text) + b" " + text + b"\n"


def parsed(data: bytes) -> Any:
    """What a line of a journal holds.

    Raises:
        ValueError: it is not whole.
    """
    checksum, blank, text = data.rstrip(b"\n").partition(b" ")
    if not blank or checksum != _checksum(text):
        raise ValueError("the line is not whole")
    return json.loads(text)


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def _whole(descriptor: int) -> int:
    """Bytes up to the end of the last line that has one."""
    size, step = os.fstat(descriptor).st_size, 1 << 16
    end = size
    while end > 0:
        start = max(0, end - step)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
