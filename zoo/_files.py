"""Files that appear whole or not at all, even if the power fails.

Every call that changes or reads the disk goes through `system`, one object of thin functions, so that whatever can
fail is in one place, and a test can put another object there.

The order that is safe: write a new file beside the old one, flush it, rename it over the old one, flush the folder.
Without the first flush the new name can point to an empty file; without the second the rename itself can be lost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from filelock import BaseFileLock

Buffer = bytes | bytearray | memoryview
TEMPORARY = ".tmp"
MOST_BYTES = 64 * 2**30  # a checkpoint beyond this is a mistake or a sparse file
_STEP = 64 * 2**20
_MOST_TARGETS = 512  # the system takes 1,024
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


class System:
    """The system calls; `touch` sets the time of a file's last change to now."""

    write = staticmethod(os.write)
    chmod = staticmethod(os.fchmod)
    sync = staticmethod(os.fsync)
    close = staticmethod(os.close)
    rename = staticmethod(os.replace)
    remove = staticmethod(os.unlink)
    touch = staticmethod(os.utime)
    make_folder = staticmethod(os.mkdir)

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        """Open a file that child processes do not inherit."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def read_into(self, file: int, *targets: memoryview) -> int:
        """Read some bytes into the targets, one after another; returns how many, 0 at the end of the file."""
        return os.readv(file, targets)

    def lock(self, lock: BaseFileLock) -> None:
        """Wait for a lock."""
        lock.acquire()


system = System()


class NotRegularError(OSError):
    """A link, folder, pipe or device where a plain file is expected."""


def write(path: Path, data: Buffer, *, mode: int | None = None) -> None:
    """Write a file durably and as a whole: on any error nothing has changed.

    Args:
        path: the file; one that is there is replaced.
        data: its content.
        mode: its permissions; None leaves them to the umask.

    Raises:
        OSError: disk full, read-only, ...; after the rename only the last flush can raise it, and the new content
            is then visible but may not survive a power cut.
    """
    with staged(path, data, mode=mode) as temporary:
        system.rename(temporary, path)
    sync_folder(path.parent)


@contextmanager
def staged(path: Path, data: Buffer, *, mode: int | None = None) -> Iterator[Path]:
    """A flushed temporary file beside `path` that holds `data`; removed at the end unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY}")
    try:
        try:
            file = system.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            if error.filename is not None:
                error.filename = str(path)  # the one that the caller asked for
            raise
        try:
            if mode is not None:
                system.chmod(file, mode)
            rest = memoryview(data).cast("B")
            while rest:
                rest = rest[system.write(file, rest[:_STEP]) :]
            system.sync(file)
        finally:
            system.close(file)
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folders(path: Path) -> None:
    """Create a folder and those above it durably."""
    missing = takewhile(lambda folder: not folder.exists(), (path, *path.parents))
    for folder in reversed([*missing]):
        with suppress(FileExistsError):  # another process may have been quicker
            system.make_folder(folder)
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    file = system.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        system.sync(file)
    finally:
        system.close(file)


def read(path: Path, *, size: int | None = None, follow: bool = True) -> bytearray:
    """The bytes of a plain file, read once into memory of our own.

    Args:
        path: the file. A pipe or a device is refused without reading it, so nothing hangs.
        size: the expected number of bytes; a file of another size is refused without reading it.
        follow: whether the path may be a symbolic link.

    Raises:
        NotRegularError: not a plain file.
        OSError: missing, unreadable, of another size, or changed while it was read.
    """
    with opened(path, follow=follow) as (file, found):
        if found > MOST_BYTES or size not in (None, found):
            expected = f"at most {MOST_BYTES:,}" if size in (None, found) else f"{size:,}"
            msg = f"expected {expected} bytes at {path}, got {found:,}"
            raise OSError(msg)
        data = bytearray(found)
        if read_all(file, memoryview(data)) != found:
            msg = f"{path} became shorter while it was read; try again"
            raise OSError(msg)
        return data


@contextmanager
def opened(path: Path, *, follow: bool = True) -> Iterator[tuple[int, int]]:
    """A plain file opened for reading, and its size."""
    try:
        file = system.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if path.is_symlink() and not follow:
            msg = f"expected a plain file at {path}, got a symbolic link"
            raise NotRegularError(msg) from error
        raise
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            msg = f"expected a plain file at {path}, got a {_KINDS.get(stat.S_IFMT(status.st_mode), 'special file')}"
            raise NotRegularError(msg)
        yield file, status.st_size
    finally:
        system.close(file)


def read_some(file: int, count: int) -> bytes:
    """The next `count` bytes of an opened file, or fewer at its end."""
    data = bytearray(count)
    return bytes(data[: read_all(file, memoryview(data))])


def read_all(file: int, target: memoryview) -> int:
    """Read the next bytes of an opened file into `target`; returns how many, fewer at the end of the file."""
    count = 0
    while count < len(target):
        step = system.read_into(file, target[count : count + _STEP])
        if step == 0:
            break
        count += step
    return count


def read_each(file: int, targets: Sequence[memoryview]) -> bool:
    """Read the next bytes of an opened file into several targets; False where it ends before the last is full."""
    for first in range(0, len(targets), _MOST_TARGETS):
        some = targets[first : first + _MOST_TARGETS]
        done = system.read_into(file, *some)
        for target in some:  # usually nothing is left; but one call may read less than it was asked for
            rest = target[min(done, len(target)) :]
            done -= len(target) - len(rest)
            if rest and read_all(file, rest) != len(rest):
                return False
    return True
