"""Whole files: what a power cut may leave behind, by a model of the disk, and what is read without hanging."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from textwrap import dedent

import pytest

import zoo
from zoo import _files
from zoo.exchange import export, import_folder
from zoo.registry import Registry, RegistryError
from zoo.registry.register import Prepared, prepare
from zoo.registry.text import parse

Operation = tuple[str, Path, object]
Disk = dict[Path, bytes]


class Recorder(_files.System):
    """Does what it is asked, and records each change of the disk."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.files: dict[int, Path] = {}

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        """Open, and note a new name."""
        file = super().open(path, flags, mode)
        self.files[file] = path
        if flags & os.O_CREAT:
            self.operations.append(("create", path, None))
        return file

    def write(self, file: int, data: memoryview) -> int:
        """Write, and note the bytes."""
        count = super().write(file, data)
        self.operations.append(("write", self.files[file], bytes(data[:count])))
        return count

    def sync(self, file: int) -> None:
        """Flush, and note of what."""
        super().sync(file)
        path = self.files[file]
        self.operations.append(("flush names" if path.is_dir() else "flush", path, None))

    def rename(self, source: Path, target: Path) -> None:
        """Rename, and note it."""
        super().rename(source, target)
        self.operations.append(("rename", source, target))

    def make_folder(self, path: Path) -> None:
        """Make, and note it."""
        super().make_folder(path)
        self.operations.append(("folder", path, None))


def states_after_power_cut(before: Disk, operations: list[Operation]) -> Iterator[Disk]:
    """Every state that the disk may be left in when the power goes after these operations.

    Names in a folder reach the disk in the order in which they were changed, some or all of those since the
    last flush of the folder; a file's bytes since its own last flush not at all, as a first half, or all.
    """
    held = {path: (data, b"") for path, data in before.items()}  # inode -> durable and loose bytes
    inodes: dict[Path, Path] = {path: path for path in before}  # as a program sees the names
    safe = dict(inodes)  # names that are on the disk for sure
    loose: dict[Path, list[tuple[Path, Path | None]]] = {}  # folder -> changes of names since its flush
    for number, (what, path, more) in enumerate(operations):
        inode = inodes.get(path, path)
        if what == "create":
            inode = path.with_name(f"{path.name}#{number}")
            inodes[path], held[inode] = inode, (b"", b"")
            loose.setdefault(path.parent, []).append((path, inode))
        elif what == "write":
            held[inode] = (held[inode][0], held[inode][1] + bytes(more))  # type: ignore[arg-type]
        elif what == "flush":
            held[inode] = (held[inode][0] + held[inode][1], b"")
        elif what == "rename":
            inodes[Path(more)] = inodes.pop(path)  # type: ignore[arg-type]
            loose.setdefault(path.parent, []).extend([(Path(more), inode), (path, None)])  # type: ignore[arg-type]
        elif what == "flush names":
            for name, target in loose.pop(path, []):
                _set(safe, name, target)
    folders = list(loose)
    for counts in product(*(range(len(loose[folder]) + 1) for folder in folders)):
        names = dict(safe)
        for folder, count in zip(folders, counts, strict=True):
            for name, target in loose[folder][:count]:
                _set(names, name, target)
        there = sorted(set(names.values()))
        for parts in product(*(({0, len(held[i][1]) // 2, len(held[i][1])}) for i in there)):
            data = {i: held[i][0] + held[i][1][:part] for i, part in zip(there, parts, strict=True)}
            yield {name: data[target] for name, target in names.items()}


def _set(names: dict[Path, Path], name: Path, target: Path | None) -> None:
    if target is None:
        names.pop(name, None)
    else:
        names[name] = target


def violation(registry: Path, state: Disk, allowed: list[bytes | None]) -> str:
    """What is wrong with a state of the disk: a torn registry, or one that points to what is not there."""
    raw = state.get(registry)
    if raw not in allowed:
        return "neither the old registry nor the new one"
    if raw is None:
        return ""
    folder = registry.parent / "checkpoints" / "sha256"
    for entry in parse(raw).versions():
        blob = state.get(folder / f"{entry.sha256}.safetensors", b"")
        if len(blob) != entry.bytes:
            return f"the blob of {entry.name} is torn or missing"
    return ""


def recorded(
    folder: Path, prepared: list[Prepared], monkeypatch: pytest.MonkeyPatch
) -> tuple[Registry, Disk, list[Operation]]:
    """A second registration: the disk before it, and its operations."""
    registry = Registry(folder / "registry.json")
    registry.add("first", prepared[0])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}
    recorder = Recorder()
    monkeypatch.setattr(_files, "system", recorder)
    registry.add("second", prepared[1])
    return registry, before, recorder.operations


def violations(registry: Registry, before: Disk, operations: list[Operation]) -> list[str]:
    """What power cuts at every moment of some operations may leave behind that must not be."""
    old, new = before[registry.path], registry.path.read_bytes()
    found = []
    for count in range(len(operations) + 1):
        allowed = [old, new] if count < len(operations) else [new]  # done is done
        states = states_after_power_cut(before, operations[:count])
        found += [violated for state in states if (violated := violation(registry.path, state, allowed))]
    return found


@pytest.fixture(scope="module")
def two() -> list[Prepared]:
    """What the registration of two models puts on the disk."""
    spec = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})
    models = [zoo.Checkpoint.from_module(zoo.build(spec, seed=seed), spec, ["no", "yes"]) for seed in (0, 1)]
    return [prepare(name, model) for name, model in zip(("first", "second"), models, strict=True)]


def test_a_power_cut_at_any_moment_leaves_the_old_or_the_new_registry(tmp_path, two, monkeypatch):
    """Whatever of the loose names and bytes survives, the registry is whole and its blobs are there."""
    registry, before, operations = recorded(tmp_path, two, monkeypatch)
    assert len(operations) > 8
    assert violations(registry, before, operations) == []


def without_flushes(operations: list[Operation]) -> list[Operation]:
    """Write and rename, as most programs do."""
    return [operation for operation in operations if operation[0] != "flush"]


def without_folder_flushes(operations: list[Operation]) -> list[Operation]:
    """Names are left to reach the disk some time."""
    return [operation for operation in operations if operation[0] != "flush names"]


def renamed_before_flushed(operations: list[Operation]) -> list[Operation]:
    """The right calls in the wrong order."""
    changed = list(operations)
    for index, operation in enumerate(operations):
        if operation[0] == "flush":
            at = next(i for i, later in enumerate(changed) if i > index and later[0] == "rename")
            source, target = changed[at][1:]
            changed[index], changed[at] = changed[at], ("flush", target, source)
    return changed


@pytest.mark.parametrize("wrong", [without_flushes, without_folder_flushes, renamed_before_flushed])
def test_the_model_of_power_cuts_finds_wrong_orders(
    tmp_path, two, monkeypatch, wrong: Callable[[list[Operation]], list[Operation]]
):
    """The checker that finds nothing wrong in the protocol finds what others do wrong."""
    registry, before, operations = recorded(tmp_path, two, monkeypatch)
    assert violations(registry, before, wrong(operations))


def test_the_model_of_power_cuts_finds_a_file_written_in_place(tmp_path, two, monkeypatch):
    """A file that is emptied and written again may be found half written, also when it is flushed after."""
    registry, before, _ = recorded(tmp_path, two, monkeypatch)
    new = registry.path.read_bytes()
    states = states_after_power_cut({registry.path: b""}, [("write", registry.path, new)])
    violated = [violation(registry.path, state, [before[registry.path], new]) for state in states]
    assert violated.count("neither the old registry nor the new one") == 2


def test_written_bytes_are_there_and_nothing_else(tmp_path):
    """A file is replaced, and no temporary file stays."""
    path = tmp_path / "a.bin"
    _files.write(path, b"old")
    _files.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_umask_decides_the_permissions(tmp_path):
    """Others may read a blob where the umask lets them, unlike a usual temporary file."""
    path, mask = tmp_path / "a.bin", os.umask(0o022)
    try:
        _files.write(path, b"data")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    """A full disk changes nothing."""
    path = tmp_path / "a.bin"
    _files.write(path, b"old")

    class Full(_files.System):
        def write(self, file: int, data: memoryview) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files, "system", Full())
    with pytest.raises(OSError, match="No space left") as full:
        _files.write(path, b"new")
    assert full.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_plain_file_is_refused_without_reading(tmp_path):
    """A pipe would hang, a device never end, a link lead elsewhere."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), (tmp_path, "folder"), (Path("/dev/zero"), "device")):
        with pytest.raises(_files.NotRegularError, match=kind):
            _files.read(path)
    with pytest.raises(_files.NotRegularError, match="symbolic link"):
        _files.read(tmp_path / "link", follow=False)


def test_a_sparse_terabyte_is_refused_without_reading(tmp_path):
    """The size alone says no."""
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(OSError, match="expected at most"):
        _files.read(path)
    with pytest.raises(OSError, match="expected 7 bytes"):
        _files.read(path, size=7)


def test_a_registry_that_is_a_link_is_not_written(tmp_path, two):
    """A rename would cut the link off and leave the file it points to as it was."""
    registry = Registry(tmp_path / "real.json")
    registry.add("first", two[0])
    (tmp_path / "registry.json").symlink_to(tmp_path / "real.json")
    with pytest.raises(RegistryError, match="symbolic link"):
        Registry(tmp_path / "registry.json").add("second", two[1])
    assert registry.list() == ["first"]


def test_reading_into_several_places_goes_on_after_a_short_read(tmp_path, monkeypatch):
    """A call of the system need not fill what it was given; the end of the file is reported."""

    class Bites(_files.System):
        def read_into(self, file: int, *targets: memoryview) -> int:
            return super().read_into(file, targets[0][:3])

    path = tmp_path / "file"
    path.write_bytes(bytes(range(20)))
    for system in (_files.System(), Bites()):
        monkeypatch.setattr(_files, "system", system)
        for sizes, whole in (((7, 0, 1, 12), True), ((7, 14), False)):
            places = [bytearray(size) for size in sizes]
            with _files.opened(path) as (file, _):
                assert _files.read_each(file, [memoryview(place) for place in places]) is whole
            assert b"".join(places)[:20] == path.read_bytes()


def test_what_cannot_be_written_is_named_as_it_was_asked_for(tmp_path: Path) -> None:
    """Not by the temporary name beside it."""
    with pytest.raises(FileNotFoundError) as caught:
        _files.write(tmp_path / "no" / "r.html", b"")
    assert str(caught.value).endswith(f"{str(tmp_path / 'no' / 'r.html')!r}")


REFUSALS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES]


class Lacking(_files.System):
    """A file system that answers with an error number to what it does not offer."""

    def __init__(self, code: int, *lacks: str) -> None:
        self.code, self.lacks = code, lacks

    def refuse(self, what: str) -> None:
        """Raise, if it is that which is lacking."""
        if what in self.lacks:
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        """Some let no folder be opened."""
        if path.is_dir():
            self.refuse("open folder")
        return super().open(path, flags, mode)

    def sync(self, file: int) -> None:
        """Some flush no folder."""
        if stat.S_ISDIR(os.fstat(file).st_mode):
            self.refuse("sync folder")
        super().sync(file)

    def chmod(self, file: int, mode: int) -> None:
        """Some have no permissions."""
        self.refuse("chmod")
        super().chmod(file, mode)

    def touch(self, path: Path) -> None:
        """Some let only an owner, or nobody, set times."""
        self.refuse("touch")
        super().touch(path)

    def lock(self, file: int) -> None:
        """Some have no locks."""
        self.refuse("lock")
        super().lock(file)

    def rename(self, source: Path, target: Path) -> None:
        """Some replace no file that is there."""
        if target.exists():
            self.refuse("replace")
        super().rename(source, target)


@pytest.mark.parametrize("lack", ["open folder", "sync folder", "chmod", "touch"])
@pytest.mark.parametrize("code", [*REFUSALS, errno.EBADF, errno.EISDIR, 524])
def test_what_endangers_nothing_is_done_without(tmp_path, two, frames, monkeypatch, lack: str, code: int) -> None:
    """Every way in which something is written, on a file system that lacks a part of the protocol."""
    monkeypatch.setattr(_files, "system", Lacking(code, lack))
    registry = Registry(tmp_path / "new" / "registry.json")
    for _ in range(2):  # the second time, what is there is kept and replaced
        for name, prepared in zip(("first", "second"), two, strict=True):
            registry.add(name, prepared)
    registry.alias("best", "first")
    assert registry.verify() == []
    assert registry.collect_garbage(older_than=-60) == []
    folder = export(registry, "best", tmp_path / "exported")
    assert import_folder(Registry(tmp_path / "other.json"), folder).id == registry.get("first").id
    spec = zoo.Spec("mlp", features=6, context=0, classes=4, options={"widths": [4]})
    for epochs in (1, 2):
        zoo.train(spec, zoo.Recipe(epochs=epochs, batch_size=64), frames, frames, directory=tmp_path / f"run {epochs}")
    assert not [*tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ENOENT])
def test_a_broken_disk_is_not_one_that_lacks_something(tmp_path: Path, monkeypatch, code: int) -> None:
    """Its errors are raised, whichever step they meet."""
    for lack in ("open folder", "sync folder", "chmod", "replace"):
        monkeypatch.setattr(_files, "system", Lacking(code, lack))
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=os.strerror(code)):
            _files.write(tmp_path / "file", b"new", mode=0o600)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_file_is_never_readable_by_more_than_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a moment, nor where permissions cannot be set."""
    for lacks in ((), ("chmod",)):
        monkeypatch.setattr(_files, "system", Lacking(errno.EPERM, *lacks))
        with _files.staged(tmp_path / "secret", b"data", mode=0o600) as temporary:
            assert temporary.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, 524])
def test_without_locks_nothing_is_changed_and_the_way_out_is_named(tmp_path, two, monkeypatch, code: int) -> None:
    """Before anything is written or trained; reading works as ever."""
    registry = Registry(tmp_path / "registry.json")
    registry.add("first", two[0])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(_files, "system", Lacking(code, "lock"))
    changes: list[Callable[[], object]] = [
        lambda: registry.add("second", two[1]),
        lambda: registry.check_nameable("second"),
        lambda: registry.alias("best", "first"),
        lambda: registry.annotate("first", note="x"),
        lambda: registry.remove("first"),
        lambda: registry.collect_garbage(older_than=-60),
    ]
    for change in changes:
        with pytest.raises(RegistryError, match=r"offers no locks .*use a folder on another file system") as caught:
            change()
        assert caught.value.reason == "DISK"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert registry.list() == ["first"]
    assert not registry.load("first").training


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EBUSY, *REFUSALS])
def test_where_no_file_replaces_another_the_old_one_stays(tmp_path, two, monkeypatch, code: int) -> None:
    """To remove the old one first would leave none if the process dies; so it is refused, with the way out."""
    registry = Registry(tmp_path / "registry.json")
    registry.add("first", two[0])
    before = registry.path.read_bytes()
    monkeypatch.setattr(_files, "system", Lacking(code, "replace"))
    with pytest.raises(RegistryError, match=r"cannot be replaced; keep it in a folder where .* local disk"):
        registry.add("second", two[1])
    assert registry.path.read_bytes() == before
    assert not [*tmp_path.rglob("*.tmp")]


def test_a_user_without_a_name_or_a_home_can_train(tmp_path: Path) -> None:
    """As in a container that runs as a number: torch would ask for the name before the first step."""
    code = """
    import getpass, os, pathlib, pwd
    def nobody(*_):
        raise KeyError("getpwuid(): uid not found: 12345")
    pwd.getpwuid = nobody
    import torch, zoo
    frames = zoo.FrameSet(torch.randn(8, 2), torch.arange(8) % 2, torch.tensor([0, 8]), ("a", "b"))
    spec = zoo.Spec("mlp", features=2, context=0, classes=2, options={"widths": [2]})
    zoo.Registry().register("a", zoo.train(spec, zoo.Recipe(epochs=1, batch_size=8), frames, frames))
    """
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run([sys.executable, "-c", dedent(code)], cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert done.stderr == ""
    assert Registry(tmp_path / "registry.json").list() == ["a"]


def test_a_lock_is_held_until_it_is_given_back_or_its_process_dies(tmp_path: Path) -> None:
    """However long that takes: age says nothing. A lock file that is merely there is no lock."""
    path = tmp_path / "lock"
    path.write_text("process 1 on elsewhere\n")
    os.utime(path, (0, 0))
    code = f"import sys; from pathlib import Path; from zoo import _files; lock = _files.locked(Path({str(path)!r}), "
    code += "timeout=10); lock.__enter__(); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    os.utime(path, (0, 0))
    with pytest.raises(TimeoutError, match=r"has held the lock for 0\.3 s"), _files.locked(path, timeout=0.3):
        pass
    _files.check_locks(path)  # locks are offered, whoever has this one
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with _files.locked(path, timeout=10), pytest.raises(TimeoutError), _files.locked(path, timeout=0):
        pass
    assert time.monotonic() - started < 5


def test_a_lock_file_that_somebody_removes_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of a file that has no name any more would keep nobody out."""
    path = tmp_path / "lock"

    class Removed(_files.System):
        removals = 0

        def lock(self, file: int) -> None:
            if self.removals < 2:
                self.removals += 1
                path.unlink()
            super().lock(file)

    monkeypatch.setattr(_files, "system", Removed())
    with _files.locked(path, timeout=10):
        assert path.exists()


def test_a_folder_is_held_by_one_caller_and_whatever_it_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by another thread, until it is free; one that cannot be written to is not locked."""
    folder = tmp_path / "new" / "folder"

    def held(patience: float = 0) -> bool:
        with _files.held(folder, patience=patience):
            return True

    with ThreadPoolExecutor(1) as other:
        with _files.held(folder):
            assert held()
            with pytest.raises(ValueError, match=f"held by process {os.getpid()} on"):
                other.submit(held).result()
            waiting = other.submit(held, 60)
        assert waiting.result()
    with _files.held(None):
        monkeypatch.setattr(os, "access", lambda *_: False)
        (folder / "run.lock").unlink()
        assert held()
        assert not [*folder.iterdir()]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_without_locks_no_folder_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As with a registry."""
    monkeypatch.setattr(_files, "system", Lacking(code, "lock"))
    with pytest.raises(ValueError, match=r"offers no locks .*use a folder"), _files.held(tmp_path):
        pass
