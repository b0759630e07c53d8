"""The order of a registration, from top to bottom.

The blob comes first, with no lock held, and is durable before the registry speaks of it:

    1. write a temporary file in the store, flush it                    `Blobs.put`
    2. rename it to its hash; one that is there and whole is kept       `_files.write`
    3. flush the folder

Then the registry, under its lock:

    4. take the lock; a waiter is told in the end who holds it          `locked`
    5. read the file, remember its bytes, parse it strictly             `commit`
    6. change the content, a pure function; nothing changed: done
    7. print each new line and read it back, write the whole text, parse that again: it must say the same
    8. write a temporary file beside it with the old permissions, flush it
    9. read the file once more: changed meanwhile (an editor, git)? then from 5 again, three times in all
    10. rename, flush the folder, release the lock

Before the rename in 10 an error leaves the old state and no temporary file; after it, the new state. A
process that dies leaves one of the two and perhaps a temporary file or a blob that nobody points to, which
`collect_garbage` removes. Readers take no lock: the file they open is whole, before or after.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from zoo import _files
from zoo.registry.changes import Change
from zoo.registry.document import Document, parse, read, uncollected, write
from zoo.registry.references import RegistryError

Snapshot = tuple[bytes, Document]
NOTHING: Snapshot = b"", Document()
_ATTEMPTS = 3
_POLL = 0.01  # seconds between two looks at the lock


def commit(path: Path, change: Change, *, timeout: float, create: bool, seen: Snapshot = NOTHING) -> Snapshot:
    """Make one change _files, or change nothing.

    Args:
        path: the registry's file.
        change: from the content as it is to the content as it shall be.
        timeout: seconds to wait for the lock.
        create: whether a missing file counts as an empty registry.
        seen: what was read before; used where the disk still has the same bytes.

    Returns:
        The bytes now on the disk and what they say.

    Raises:
        RegistryError: what `change` and the file's text refuse; LOCKED, CONFLICT, LINK; DISK: nothing has
            changed; NOT_DURABLE: all has changed, but may not survive a power cut.
    """
    if create:
        with _disk_errors(path):
            _files.make_folders(path.parent)
    else:
        check_there(path)
    with locked(path, timeout=timeout), uncollected():
        for _ in range(_ATTEMPTS):
            raw = read_raw(path, create=create)
            old = Document() if raw is None else snapshot(raw, seen)[1]
            new = change(old)
            if new is old and raw is not None:
                return raw, old
            new = new.settled()
            text = write(new)
            if text == raw:
                return raw, old
            written = read(text, known=new)
            if written != new:
                raise RegistryError("ARGUMENT", "the change cannot be written such that reading gives it back")
            if _replace(path, raw, text):
                return text, written
    raise RegistryError(
        "CONFLICT", f"{path} was changed {_ATTEMPTS} times by a program that takes no lock; nothing was written"
    )


def snapshot(raw: bytes, seen: Snapshot = NOTHING) -> Snapshot:
    """A registry's bytes and what they say; what was seen before is not read again."""
    return seen if raw and raw == seen[0] else (raw, read(raw, known=seen[1]))


def read_document(path: Path) -> Document:
    """The content of a registry, all of it checked; no lock is taken.

    Raises:
        RegistryError: NO_REGISTRY, DISK, or what the text is refused for.
    """
    return parse(read_raw(path, create=False) or b"")


def check_there(path: Path) -> None:
    """Refuse a registry that is missing, before its lock makes a file in its folder.

    Raises:
        RegistryError: as `read_raw`.
    """
    if not path.exists():
        read_raw(path, create=False)


def read_raw(path: Path, *, create: bool) -> bytes | None:
    """The bytes of a registry; None where it is missing and may be made.

    Raises:
        RegistryError: NO_REGISTRY, which says how to make one; DISK.
    """
    try:
        return bytes(_files.read(path))
    except FileNotFoundError:
        if create:
            return None
        raise RegistryError(
            "NO_REGISTRY",
            f"there is no registry at {path}; registering a model there makes one (`zoo register`, `zoo train`), "
            f"`zoo recover` rebuilds a lost one, --registry or ZOO_REGISTRY names another",
        ) from None
    except OSError as error:
        raise RegistryError("DISK", f"cannot read the registry {path}: {error}") from error


@contextmanager
def locked(path: Path, *, timeout: float) -> Iterator[None]:
    """Hold the registry's lock; the lock file stays, since removing it would split those who wait.

    The system releases the lock of a process that dies; one that is stopped keeps it.

    Raises:
        RegistryError: LOCKED after `timeout` seconds, naming who holds it; DISK.
    """
    lock = FileLock(lock_path(path), timeout=timeout, poll_interval=_POLL)
    with _disk_errors(path):
        try:
            _files.system.lock(lock)
        except Timeout:
            raise RegistryError(
                "LOCKED",
                f"waited {timeout:g} s for the registry {path}, which is held by {_holder(path)}; "
                f"let it finish, or end it: the lock is then free at once",
            ) from None
    try:
        with suppress(OSError):  # who holds it is told as a courtesy
            lock_path(path).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _replace(path: Path, raw: bytes | None, text: bytes) -> bool:
    """Steps 8 to 10; False where the file is no longer what was read."""
    with _disk_errors(path):
        if path.is_symlink():
            raise RegistryError(
                "LINK",
                f"{path} is a symbolic link, which writing would cut off; name the file itself: {path.resolve()}",
            )
        mode = None if raw is None else stat.S_IMODE(path.stat().st_mode)
        with _files.staged(path, text, mode=mode) as temporary:
            if read_raw(path, create=True) != raw:
                return False
            _files.system.rename(temporary, path)
    try:
        _files.sync_folder(path.parent)
    except OSError as error:
        raise RegistryError(
            "NOT_DURABLE", f"{path} was changed, but a power cut may undo it: {error}; check the disk"
        ) from error
    return True


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RegistryError("DISK", f"cannot write the registry {path}: {error}; nothing has changed") from error


def lock_path(path: Path) -> Path:
    """The file that is locked while the registry changes."""
    return path.with_name(f"{path.name}.lock")


def _holder(path: Path) -> str:
    with suppress(OSError):
        return lock_path(path).read_text(encoding="utf-8").strip() or "another process"
    return "another process"
