"""Files that appear whole or not at all, even if the power fails.

Every call that changes or reads the disk goes through `system`, one object of thin functions, so that whatever can
fail is in one place, and a test can put another object there.

The order that is safe: write a new file beside the old one, flush it, rename it over the old one, flush the folder.
Without the first flush the new name can point to an empty file; without the second the rename itself can be lost.

Shared drives and mounted buckets do not offer all of this. What cannot be had there and endangers nothing else is done
without: the flush of a folder, permissions, the time of a change. Without locks, or without a rename that replaces the
old file, the content itself would be in danger: these are refused.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from itertools import takewhile
from pathlib import Path
from tempfile import gettempdir
from uuid import uuid4

Buffer = bytes | bytearray | memoryview
TEMPORARY = ".tmp"
MOST_BYTES = 64 * 2**30  # a checkpoint beyond this is a mistake or a sparse file
_STEP = 64 * 2**20
_MOST_TARGETS = 512  # the system takes 1,024
_POLL = 0.01  # seconds between two attempts to take a lock
_HELD = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES})  # a lock, by another process
_NOT_OFFERED = frozenset(  # what file systems answer when asked for something that they do not have
    {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOLCK, errno.EINVAL, errno.EBADF}
    | {errno.EPERM, errno.EACCES, errno.EISDIR, 524}  # 524 is ENOTSUPP, the kernel's own, which some let out
)
_NOT_REPLACED = _NOT_OFFERED | {errno.EEXIST, errno.EBUSY, errno.EXDEV}  # by a rename; a mounted file is busy
_HOLDING: ContextVar[tuple[Path, ...]] = ContextVar("holding", default=())  # folders, by whoever calls
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

    def reserve(self, file: int, size: int) -> None:
        """Have the space of a file on the disk."""
        os.posix_fallocate(file, 0, size)

    def read_into(self, file: int, *targets: memoryview) -> int:
        """Read some bytes into the targets, one after another; returns how many, 0 at the end of the file."""
        return os.readv(file, targets)

    def lock(self, file: int) -> None:
        """Take the lock of an opened file, or raise BlockingIOError at once where another process has it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


system = System()


class NotRegularError(OSError):
    """A link, folder, pipe or device where a plain file is expected."""


class NoLocksError(OSError, ValueError):
    """A file system that offers no locks."""


class HeldError(OSError, ValueError):
    """A folder to which another process is writing."""


@contextmanager
def if_offered() -> Iterator[None]:
    """Do without what a file system does not offer; a full, broken or read-only disk is an error as ever."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise


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
        replace(temporary, path)
    sync_folder(path.parent)


def replace(source: Path, target: Path) -> None:
    """Rename a file, in place of another one if that is there."""
    try:
        system.rename(source, target)
    except OSError as error:
        if error.errno not in _NOT_REPLACED or not target.exists():
            raise
        remedy = "keep it in a folder where a renamed file may replace another, such as one on the local disk"
        raise OSError(error.errno, f"{error.strerror}: it cannot be replaced; {remedy}", str(target)) from error


@contextmanager
def staged(path: Path, data: Buffer, *, mode: int | None = None) -> Iterator[Path]:
    """A flushed temporary file beside `path` that holds `data`; removed at the end unless it was renamed.

    Where permissions cannot be set, it has at most those of `mode`.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY}")
    try:
        try:
            file = system.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        except OSError as error:
            if error.filename is not None:
                error.filename = str(path)  # the one that the caller asked for
            raise
        try:
            if mode is not None:
                with if_offered():
                    system.chmod(file, mode)
            rest = memoryview(data).cast("B")
            while rest:
                rest = rest[system.write(file, rest[:_STEP]) :]
            system.sync(file)
        except OSError as error:  # such as a full disk, which names no file
            error.filename = error.filename or str(path)
            raise
        finally:
            system.close(file)
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def reserve(file: int, size: int) -> None:
    """Give a new file its size, and its space on the disk: a mapping that finds none ends the process by a signal."""
    with suppress(AttributeError), if_offered():  # macOS has no such call
        system.reserve(file, size)
        return
    zeros = memoryview(bytes(_STEP))
    while size:
        size -= system.write(file, zeros[:size])


def make_folders(path: Path) -> None:
    """Create a folder and those above it durably; a NotADirectoryError where something else is in the place of one."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        msg = f"expected a folder {path}, but {there} is none; name another folder, or move what is there"
        raise NotADirectoryError(msg)
    missing = takewhile(lambda folder: not folder.exists(), (path, *path.parents))
    for folder in reversed([*missing]):
        with suppress(FileExistsError):  # another process may have been quicker
            system.make_folder(folder)
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, where the file system can."""
    with if_offered():
        file = system.open(path, os.O_RDONLY)
        try:
            system.sync(file)
        finally:
            system.close(file)


def name_compiler_cache() -> None:
    """Name the cache folder of torch's compiler for a user without a name, as in a container.

    torch asks for the name as soon as it makes an optimiser or exports a model, even where it compiles nothing.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{gettempdir()}/torchinductor_{os.getuid()}")


@contextmanager
def locked(path: Path, *, timeout: float) -> Iterator[None]:
    """Hold the lock of a file, which is made where there is none, and never removed: that would split those who wait.

    The system releases the lock of a process that dies, and nothing else does. A file that is merely there is no lock,
    so where the file system offers none, none is taken.

    Raises:
        TimeoutError: another process has held it for `timeout` seconds.
        NoLocksError: the file system offers no locks.
        OSError: the file cannot be made or opened.
    """
    end = time.monotonic() + timeout
    while (file := _attempt(path)) is None:
        if time.monotonic() > end:
            raise TimeoutError(errno.ETIMEDOUT, f"another process has held the lock for {timeout:g} s", str(path))
        time.sleep(_POLL)
    try:
        yield
    finally:
        os.close(file)


@contextmanager
def held(folder: Path | None, *, patience: float = 0) -> Iterator[None]:
    """Be the only one that writes to a folder, which is made where there is none; without a folder, nothing happens.

    What is called meanwhile may hold the same folder. One that cannot be written to is not locked: it is only read.

    Raises:
        HeldError: another process, or another thread, has held it for `patience` seconds.
        OSError: as `locked`.
    """
    if folder is not None:
        make_folders(folder)
    if folder is None or not os.access(folder, os.W_OK) or folder.resolve() in _HOLDING.get():
        yield
        return
    path = folder / "run.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout=patience))
        except TimeoutError as error:
            msg = (
                f"expected a folder that nothing else writes to, but {folder} is held by {holder_of(path)}; wait until"
            )
            raise HeldError(f"{msg} it has finished, or end it, or choose another folder") from error
        name_holder(path)
        stack.callback(_HOLDING.reset, _HOLDING.set((*_HOLDING.get(), folder.resolve())))
        yield


def name_holder(path: Path) -> None:
    """Write into a lock file who holds it, which is only a courtesy."""
    with suppress(OSError):
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")


def holder_of(path: Path) -> str:
    """Who holds this lock file."""
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8").strip() or "another process"
    return "another process"


def check_locks(path: Path) -> None:
    """As `locked`, but only a look whether locks are offered, whoever holds this one."""
    if (file := _attempt(path)) is not None:
        os.close(file)


def _attempt(path: Path) -> int | None:
    """The file, opened and locked; None where another process has the lock, or has removed the file."""
    file = system.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    kept = False
    try:
        system.lock(file)
        kept = os.fstat(file).st_nlink > 0
    except OSError as error:
        if error.errno in _HELD:
            return None
        if error.errno not in _NOT_OFFERED:
            raise
        msg = f"the file system of {path.absolute().parent} offers no locks ({error.strerror}), without which"
        remedy = (
            "processes could undo each other's changes; use a folder on another file system, such as the local disk"
        )
        raise NoLocksError(error.errno, f"{msg} {remedy}") from error
    finally:
        if not kept:
            os.close(file)
    return file if kept else None


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
