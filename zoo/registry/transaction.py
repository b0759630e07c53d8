"""The order in which a change of the registry reaches the disk.

The blob comes first, with no lock held, and is durable before the registry refers to it:

    1. write a temporary file in the store, flush it                    `Blobs.put`
    2. rename it to its hash; one that is there and whole is kept       `_files.write`
    3. flush the folder

Then the registry's file, under its lock, in `RegistryFile.commit`:

    4. take the lock; a waiter whose time runs out learns who holds it  `locked`
    5. read the file, remember its bytes, parse it strictly
    6. change a copy of the content; nothing has changed: done
    7. write the whole text and parse it again: it must give the same content
    8. write a temporary file beside it with the old permissions, flush it
    9. read the file once more: changed meanwhile (an editor, git)? then from 5 again, three times in all
    10. rename, flush the folder, release the lock

Before the rename in 10 an error leaves the old state and no temporary file; after it, the new state. A process that
dies leaves one of the two, and perhaps a temporary file or a blob that nothing points to, which `collect_garbage`
removes. Readers take no lock: the file that they open is whole, before or after.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from zoo import _files
from zoo.registry.changes import Change
from zoo.registry.text import Bytes, collector_off, parse, write_checked
from zoo.registry.types import RegistryError, Snapshot

_ATTEMPTS = 3


class RegistryFile:
    """One registry's file, read as it is now, and changed at once or within a transaction; `timeout` in seconds."""

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self.timeout = timeout
        self._seen: tuple[Bytes, Snapshot] = (b"", Snapshot())  # compared with the disk, never trusted
        self._pending: tuple[Snapshot, list[tuple[Change, Change]]] | None = None

    @property
    def collecting(self) -> bool:
        """Whether a transaction is open."""
        return self._pending is not None

    def snapshot(self, *, create: bool = False) -> Snapshot:
        """The content of the file now, or within a transaction as it will be; the errors of `read_snapshot`.

        With `create` a missing file counts as an empty registry.
        """
        if self._pending is not None:
            return self._pending[0].copy()
        return self._parsed(read_bytes(self.path, missing=create))

    def commit(self, change: Change, *, create: bool = False, ensure: Change = lambda draft: None) -> Snapshot:
        """Make one change durable, or change nothing; within a transaction, note it for the end.

        Args:
            change: alters the content that it is given.
            create: whether a missing file counts as an empty registry.
            ensure: called under the lock with the new content before it is written; raise to abort.

        Returns:
            The new content.

        Raises:
            RegistryError: what `change`, `ensure` and the text refuse; LOCKED, CONFLICT, LINK; DISK: nothing has
                changed; NOT_DURABLE: all has changed, but may not survive a power cut.
        """
        if self._pending is not None:
            change(self._pending[0])
            self._pending[1].append((change, ensure))
            return self._pending[0]
        if create:
            with _writing(self.path):
                _files.make_folders(self.path.parent)
        else:
            check_there(self.path)
        with locked(self.path, timeout=self.timeout), collector_off():
            for _ in range(_ATTEMPTS):
                raw = read_bytes(self.path, missing=create)
                old = self._parsed(raw)
                draft = old.copy()
                change(draft)
                ensure(draft)
                if draft == old and raw is not None:
                    return old
                text = write_checked(draft)
                if text == raw:
                    return old
                if _replace(self.path, raw, text):
                    self._seen = (text, draft)
                    return draft
        msg = f"{self.path} was changed {_ATTEMPTS} times by a program that takes no lock; nothing was written"
        raise RegistryError("CONFLICT", msg)

    def check_changeable(self) -> None:
        """Refuse (DISK) a registry that cannot be locked, before work that would be lost; makes its folder."""
        if self._pending is not None and self._pending[1]:  # asked before the first change of the transaction
            return
        with _writing(self.path):
            _files.make_folders(self.path.parent)
            _files.check_locks(lock_path(self.path))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """As `Registry.transaction`."""
        if self._pending is not None:
            raise RegistryError("ARGUMENT", "a transaction is open already; transactions do not nest")
        known = self.snapshot(create=True)
        self._pending = (known.copy(), [])
        try:
            yield
            pending, collected = self._pending
        finally:
            self._pending = None

        def change(draft: Snapshot) -> None:
            if draft == known:
                draft.set(models=pending.models, ensembles=pending.ensembles, pointers=pending.pointers)
                return
            for one, _ in collected:  # others have committed meanwhile
                one(draft)

        def ensure(draft: Snapshot) -> None:
            for _, one in collected:
                one(draft)

        if collected:
            self.commit(change, create=True, ensure=ensure)

    def _parsed(self, raw: Bytes | None) -> Snapshot:
        """The content of the file's bytes, None where it is missing; the same bytes as before are not parsed again."""
        if raw is None:
            return Snapshot()
        if not raw or raw != self._seen[0]:
            self._seen = (raw, parse(raw))
        return self._seen[1]


def read_snapshot(path: Path) -> Snapshot:
    """The content of a registry, read without a lock; RegistryError as of `read_bytes` and `parse`."""
    return parse(read_bytes(path) or b"")


def check_there(path: Path) -> None:
    """Refuse a registry that is missing, as `read_bytes` does, before its lock makes a file in its folder."""
    if not path.exists():
        read_bytes(path)


def read_bytes(path: Path, *, missing: bool = False) -> Bytes | None:
    """The bytes of a registry; None where it is missing and may be; RegistryError (NO_REGISTRY, DISK)."""
    try:
        return _files.read(path)
    except FileNotFoundError:
        if missing:
            return None
        raise RegistryError(
            "NO_REGISTRY",
            f"there is no registry at {path}; name another with --registry or ZOO_REGISTRY, or make one with "
            "`zoo train` or `zoo register`; `zoo recover` rebuilds a lost one",
        ) from None
    except OSError as error:
        raise RegistryError("DISK", f"cannot read the registry {path}: {error}") from error


@contextmanager
def locked(path: Path, *, timeout: float) -> Iterator[None]:
    """Hold the registry's lock; the lock file is never removed, since that would split the processes that wait.

    The system releases the lock of a process that dies; one that is stopped keeps it.

    Raises:
        RegistryError: LOCKED after `timeout` seconds, naming who holds it; DISK.
    """
    with ExitStack() as stack, _writing(path):
        try:
            stack.enter_context(_files.locked(lock_path(path), timeout=timeout))
        except TimeoutError:
            holder = _files.holder_of(lock_path(path))
            msg = f"waited {timeout:g} s for the registry {path}, which is held by {holder}; "
            raise RegistryError("LOCKED", f"{msg}let it finish, or end it: the lock is then free at once") from None
        held = stack.pop_all()
    with held:
        _files.name_holder(lock_path(path))
        yield


def lock_path(path: Path) -> Path:
    """The file that is locked while the registry changes."""
    return path.with_name(f"{path.name}.lock")


def _replace(path: Path, raw: Bytes | None, text: bytes) -> bool:
    """Steps 8 to 10; False where the file is no longer what was read."""
    with _writing(path):
        if path.is_symlink():
            msg = f"{path} is a symbolic link, which writing would replace; name the file itself: {path.resolve()}"
            raise RegistryError("LINK", msg)
        mode = None if raw is None else stat.S_IMODE(path.stat().st_mode)
        with _files.staged(path, text, mode=mode) as temporary:
            if read_bytes(path, missing=True) != raw:
                return False
            _files.replace(temporary, path)
    try:
        _files.sync_folder(path.parent)
    except OSError as error:
        msg = f"{path} was changed, but a power cut may undo it: {error}; check the disk"
        raise RegistryError("NOT_DURABLE", msg) from error
    return True


@contextmanager
def disk_errors(what: str, so: str = "") -> Iterator[None]:
    """Turn an error of the disk into a RegistryError (DISK): what failed, the system's reason, and what follows."""
    try:
        yield
    except OSError as error:
        raise RegistryError("DISK", f"{what}: {error}{so}") from error


def _writing(path: Path) -> AbstractContextManager[None]:
    return disk_errors(f"cannot write the registry {path}", "; nothing has changed")
