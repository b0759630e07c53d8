"""The fault table, row by row: processes that die or wait, disks that refuse, blobs that are not what they were."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

import zoo
from zoo import _files
from zoo.registry import Registry, RegistryError, changes
from zoo.registry.register import Prepared, prepare
from zoo.registry.text import parse
from zoo.registry.transaction import RegistryFile, locked

SPEC = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})
CALLS = ("open", "write", "read_into", "chmod", "sync", "close", "rename", "touch", "lock", "make_folder")


def checkpoint(seed: int) -> zoo.Checkpoint:
    """A small model."""
    return zoo.Checkpoint.from_module(zoo.build(SPEC, seed=seed), SPEC, ["no", "yes"])


@pytest.fixture(scope="module")
def parcels() -> list[Prepared]:
    """What the registrations of six models put on the disk."""
    return [prepare(f"model-{seed}", checkpoint(seed)) for seed in range(6)]


@pytest.fixture
def registry(tmp_path: Path, parcels: list[Prepared]) -> Registry:
    """A registry of two models."""
    registry = Registry(tmp_path / "registry.json")
    for index in (0, 1):
        registry.add(f"model-{index}", parcels[index])
    return registry


class Counting(_files.System):
    """Calls `act` before the call of a given number; 0 never comes."""

    def __init__(self, number: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self.count, self.number, self.act = 0, number, act

    def __getattribute__(self, name: str):
        if name in CALLS:
            self.count += 1
            if self.count == self.number:
                self.act()
        return super().__getattribute__(name)


def calls_of(tmp_path: Path, parcels: list[Prepared], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many system calls the third registration makes."""
    registry = Registry(tmp_path / "counted" / "registry.json")
    for index in (0, 1):
        registry.add(f"model-{index}", parcels[index])
    counting = Counting()
    with monkeypatch.context() as patch:
        patch.setattr(_files, "system", counting)
        registry.add("model-2", parcels[2])
    return counting.count


def in_child(act: Callable[[], None]) -> int:
    """Run something in another process; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(registry: Registry) -> dict[str, str]:
    """Names and the hashes of their blobs, all of them read."""
    assert registry.verify() == []
    return {entry.name: entry.sha256 for entry in registry.entries()}


def refusal(act: Callable[[], object]) -> RegistryError | None:
    """The typed error that something ends in, or None; any other error goes on."""
    try:
        act()
    except RegistryError as error:
        return error
    return None


def leftovers(folder: Path) -> list[Path]:
    """Temporary files anywhere."""
    return sorted(folder.rglob("*.tmp"))


def test_kill_before_any_system_call_leaves_old_or_new_state(tmp_path, registry, parcels, monkeypatch):
    """Registered or not, nothing else; the next registration works, and garbage collection tidies up."""
    count = calls_of(tmp_path, parcels, monkeypatch)
    old, text = state(registry), registry.path.read_bytes()
    new = {**old, "model-2": parcels[2].sha256}
    seen = set()
    for number in range(1, count + 1):

        def act(number: int = number) -> None:
            _files.system = Counting(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            registry.add("model-2", parcels[2])

        assert in_child(act) == -signal.SIGKILL
        now = state(Registry(registry.path))
        assert now in (old, new), f"call {number}"
        seen.add(now == new)
        registry.add("model-3", parcels[3])
        assert state(registry) == {**now, "model-3": parcels[3].sha256}
        registry.collect_garbage(older_than=-60)
        blobs = {path.name for path in registry.blobs.folder.iterdir()}
        assert blobs == {f"{sha256}.safetensors" for sha256 in state(registry).values()}
        assert leftovers(tmp_path) == []
        registry.path.write_bytes(text)
        registry.collect_garbage(older_than=-60)
    assert seen == {True, False}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_any_system_call_changes_nothing(tmp_path, registry, parcels, monkeypatch, code):
    """One typed error with the cause; the old state and no temporary file, or, from the last flush on, the new."""
    count = calls_of(tmp_path, parcels, monkeypatch)
    old, text = state(registry), registry.path.read_bytes()
    reasons = []
    for number in range(1, count + 1):

        def act() -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(_files, "system", Counting(number, act))
            error = refusal(lambda: registry.add("model-2", parcels[2]))
        reason = "" if error is None else error.reason
        reasons.append(reason)
        assert (registry.path.read_bytes() == text) is (reason == "DISK"), f"call {number}: {error}"
        assert error is None or (os.strerror(code) in str(error) and str(tmp_path) in str(error))
        assert leftovers(tmp_path) == []
        registry.path.write_bytes(text)
        assert state(registry) == old
        registry.collect_garbage(older_than=-60)
    assert set(reasons) == {"", "DISK", "NOT_DURABLE"}
    assert reasons.count("") < 3  # a look whether the blob is there already, which may fail


def test_eight_writers_lose_nothing_and_a_reader_sees_no_torn_file(tmp_path, parcels):
    """8 processes x 25 registrations: 200 of 200, each number once; every look at the file finds it whole."""
    registry = Registry(tmp_path / "registry.json")
    registry.add("model-0", parcels[0])

    def write(writer: int) -> None:
        for index in range(25):
            data = f"{writer} {index}".encode().ljust(64)
            identity = f"{writer:06x}{index:06x}"
            name = "shared" if index % 5 == 0 else f"of-{writer}-{index}"
            sha256 = registry.blobs.put(data)
            line = msgspec.structs.replace(parcels[0].record, blob=f"sha256:{sha256}", bytes=len(data))
            RegistryFile(registry.path, timeout=120).commit(
                lambda draft, n=name, i=identity, r=line: changes.add_version(draft, n, i, r)
            )

    children = []
    for writer in range(8):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                write(writer)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    looks, last = 0, 0
    while children:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            children.remove(done)
        found = sum(1 for _ in parse(registry.path.read_bytes()).versions())
        assert found >= last
        looks, last = looks + 1, found
    assert last == 201
    assert looks > 10
    shared = [entry.number for entry in registry.entries("shared")]
    assert shared == list(range(1, 41))
    assert leftovers(tmp_path) == []


def held_elsewhere(registry: Registry) -> int:
    """Another process that holds the lock and does nothing more."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(registry.path, timeout=10):
            os.write(done, b"x")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    return child


def test_a_stopped_holder_keeps_the_lock_and_is_named(registry, parcels):
    """Nothing is stolen: the waiter learns who holds it."""
    child = held_elsewhere(registry)
    os.kill(child, signal.SIGSTOP)
    impatient = Registry(registry.path, timeout=0.1)
    with pytest.raises(RegistryError, match=f"held by process {child} on"):
        impatient.add("model-2", parcels[2])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert registry.list() == ["model-0", "model-1"]


def test_a_killed_holder_frees_the_lock_at_once(registry, parcels):
    """The system gives the lock back, whatever the dead process wanted."""
    child = held_elsewhere(registry)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    started = time.monotonic()
    registry.add("model-2", parcels[2])
    assert time.monotonic() - started < 5
    assert "model-2" in registry.list()


def missing(blob: Path, other: Path) -> None:
    """Gone."""
    blob.unlink()


def truncated(blob: Path, other: Path) -> None:
    """Cut short."""
    os.truncate(blob, blob.stat().st_size - 1)


def longer(blob: Path, other: Path) -> None:
    """One byte more."""
    with blob.open("ab") as file:
        file.write(b"x")


def flipped(blob: Path, other: Path) -> None:
    """One bit of a weight."""
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)


def swapped(blob: Path, other: Path) -> None:
    """The blob of another model, of the same size or not."""
    blob.write_bytes(other.read_bytes())


def link(blob: Path, other: Path) -> None:
    """A link to a copy of itself."""
    copy = blob.with_name("copy")
    blob.rename(copy)
    blob.symlink_to(copy)


def device(blob: Path, other: Path) -> None:
    """A link to a file without end."""
    blob.unlink()
    blob.symlink_to("/dev/zero")


def folder(blob: Path, other: Path) -> None:
    """A folder."""
    blob.unlink()
    blob.mkdir()


def pipe(blob: Path, other: Path) -> None:
    """A pipe that nobody writes to."""
    blob.unlink()
    os.mkfifo(blob)


def sparse(blob: Path, other: Path) -> None:
    """A terabyte of nothing."""
    os.truncate(blob, 2**40)


DAMAGES = [missing, truncated, longer, flipped, swapped, link, device, folder, pipe, sparse]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_blob_is_refused_by_name_and_listed_as_before(registry, damage):
    """Loading names the model and the expected hash, listing works, verifying counts it, fast or not."""
    entry = registry.get("model-0")
    damage(registry.blobs.path(entry.sha256), registry.blobs.path(registry.get("model-1").sha256))
    with pytest.raises(RegistryError, match="'model-0' version 1") as caught:
        registry.load("model-0")
    assert entry.sha256 in str(caught.value)
    assert caught.value.reason in ("MISSING", "NOT_A_FILE", "BLOB_SIZE", "BLOB_DIGEST")
    with pytest.raises(RegistryError) as together:
        registry.stacked(["model-1", "model-0"])
    assert str(together.value) == str(caught.value)
    assert registry.list() == ["model-0", "model-1"]
    assert [problem.entry.name for problem in registry.verify()] == ["model-0"]
    fast = [problem.entry.name for problem in registry.verify(fast=True)]
    assert fast == ([] if damage in (flipped, swapped) else ["model-0"])


@pytest.mark.parametrize("damage", [missing, truncated, longer, flipped, swapped], ids=lambda damage: damage.__name__)
def test_registering_the_same_weights_again_mends_a_damaged_blob(registry, parcels, damage):
    """The version stays the same, its bytes are whole again."""
    before = registry.get("model-0")
    damage(registry.blobs.path(before.sha256), registry.blobs.path(registry.get("model-1").sha256))
    assert registry.add("model-0", parcels[0]) == before
    assert registry.verify() == []


def test_a_blob_that_says_other_than_the_registry_is_refused(registry):
    """A line that was made to point to another model's whole blob does not load that model."""
    first, second = registry.get("model-0"), registry.register("other", checkpoint(9), note="wider")
    wider = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 5, "depth": 1})
    third = registry.register("wider", zoo.build(wider, seed=0), spec=wider, classes=["no", "yes"])
    text = registry.path.read_text().replace(first.sha256, third.sha256)
    text = text.replace(f'"bytes":{first.bytes}', f'"bytes":{third.bytes}')
    registry.path.write_text(text)
    with pytest.raises(RegistryError, match="another spec or other classes"):
        registry.load("model-0")
    with pytest.raises(RegistryError, match="another spec or other classes"):
        registry.stacked(["other", "model-0"])
    assert registry.load("other") is not None
    assert second.note == "wider"


def test_an_editor_that_changes_the_file_meanwhile_loses_nothing(registry, parcels, monkeypatch):
    """What somebody saved without the lock is read again and kept."""

    class Editor(_files.System):
        edits = 0

        def sync(self, file: int) -> None:
            super().sync(file)
            name = str(Path(f"/proc/self/fd/{file}").readlink())
            if "registry.json" in name and self.edits < self.most:
                Editor.edits += 1
                registry.path.write_text(
                    registry.path.read_text().replace('"schema":1', f'"schema":1,\n"x-{self.edits}":1')
                )

        most = 1

    monkeypatch.setattr(_files, "system", Editor())
    registry.add("model-2", parcels[2])
    assert registry.list() == ["model-0", "model-1", "model-2"]
    assert {key: bytes(raw) for key, raw in registry.snapshot().extensions.items()} == {"x-1": b"1"}
    Editor.most = 99
    with pytest.raises(RegistryError, match="changed 3 times") as caught:
        registry.add("model-3", parcels[3])
    assert caught.value.reason == "CONFLICT"
    assert "model-3" not in registry.list()
    assert leftovers(registry.path.parent) == []


def test_a_lost_registry_is_rebuilt_from_its_blobs(registry):
    """Names, ids, weights and metrics come back; a damaged blob and a foreign file do not."""
    registry.register("model-0", checkpoint(7), metrics={"valid/accuracy": 0.5}, note="second")
    before = [(entry.reference, entry.id, entry.sha256, entry.metrics, entry.note) for entry in registry.entries()]
    registry.path.unlink()
    (registry.blobs.folder / f"{'0' * 64}.safetensors").write_bytes(b"no checkpoint")
    with pytest.warns(UserWarning, match=r"was left out:\n0{64}\.safetensors.*BLOB_DIGEST"):
        registry.recover()
    assert [(e.reference, e.id, e.sha256, e.metrics, e.note) for e in registry.entries()] == before
    assert registry.verify(probe=True) == []


def test_all_that_can_be_is_recovered_and_the_rest_is_told(registry):
    """The same weights with other classes, a name that is taken: their blobs are named, all others come back."""
    first = checkpoint(0)
    others = [
        prepare("model-0", zoo.Checkpoint(SPEC, first.tensors, ("yes", "no"))),
        prepare("MODEL-1", checkpoint(1)),
        prepare("model-0", zoo.Checkpoint(SPEC, first.tensors, ("no", "yes"), note="again")),
    ]
    for blob in others:
        registry.blobs.put(blob.data)
    registry.path.unlink()
    with pytest.warns(UserWarning, match="was left out") as told:
        found = registry.recover()
    assert sorted(entry.reference for entry in found) == ["model-0@1", "model-1@1"]
    message = str(told[0].message)
    assert message.count(".safetensors: ") == 2
    assert f"{others[0].sha256}.safetensors" in message
    assert "[CLASSES]" in message
    assert f"{others[1].sha256}.safetensors" in message
    assert "[NAME_COLLISION]" in message


def test_a_damaged_registry_is_to_be_moved_away_before_it_is_rebuilt(registry):
    """The way out that the refusal names is one that works."""
    registry.path.write_bytes(registry.path.read_bytes()[:-9])
    with pytest.raises(RegistryError, match="move it away and rebuild it with `zoo recover`"):
        registry.recover()
    registry.path.rename(registry.path.with_name("damaged"))
    assert len(registry.recover()) == 2


def test_garbage_collection_keeps_what_another_registry_of_the_folder_holds(registry, parcels):
    """They share the store; one that cannot be read stops everything."""
    other = Registry(registry.path.with_name("other.json"))
    other.add("model-2", parcels[2])
    loose = registry.blobs.path(registry.blobs.put(parcels[3].data))
    (registry.path.parent / "notes.json").write_text('{"name": "zoo-registry"}')
    os.mkfifo(registry.path.parent / "pipe")
    text = registry.path.read_text()
    registry.path.write_text(f"\n{text[:-9]}")
    with pytest.raises(RegistryError, match=r"registry\.json.*nothing was removed"):
        other.collect_garbage(older_than=-60)
    registry.path.write_text(text)
    assert other.collect_garbage(older_than=-60) == [loose]
    assert registry.verify() == other.verify() == []


def test_garbage_collection_goes_on_past_what_it_cannot_remove(registry, parcels, monkeypatch):
    """A folder is no blob; a file that the system keeps is named when all else is gone; one that has gone is fine."""
    (registry.blobs.folder / f"{'0' * 64}.safetensors").mkdir()
    loose = sorted(registry.blobs.path(registry.blobs.put(parcels[index].data)) for index in (2, 3))
    gone = registry.blobs.folder / f".{'1' * 64}.safetensors.x.tmp"
    gone.touch()
    lstat = Path.lstat

    def late(self: Path) -> os.stat_result:
        self.unlink(missing_ok=True) if self == gone else None
        return lstat(self)

    class Keeping(_files.System):
        def remove(self, path: Path) -> None:
            if path == loose[0]:
                raise PermissionError(errno.EPERM, "not permitted", str(path))
            super().remove(path)

    monkeypatch.setattr(Path, "lstat", late)
    with monkeypatch.context() as patch:
        patch.setattr(_files, "system", Keeping())
        with pytest.raises(RegistryError, match=rf"cannot remove {loose[0]}.*everything else"):
            registry.collect_garbage(older_than=-60)
    assert registry.collect_garbage(older_than=-60) == [loose[0]]
    assert registry.recover() == registry.entries()


def test_looking_for_a_registry_in_a_mistyped_folder_makes_nothing(tmp_path):
    """Neither the folder nor a lock."""
    registry = Registry(tmp_path / "typo" / "registry.json")
    for act in (registry.collect_garbage, lambda: registry.alias_back("best"), lambda: registry.remove("a")):
        with pytest.raises(RegistryError, match="there is no registry"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_garbage_collection_keeps_what_is_young_or_held(registry, parcels):
    """A day's grace, a dry run that only tells, and nothing touched where the registry does not parse."""
    loose = registry.blobs.path(registry.blobs.put(parcels[2].data))
    assert registry.collect_garbage() == []
    os.utime(loose, (time.time() - 90_000,) * 2)
    assert registry.collect_garbage(dry_run=True) == [loose]
    text = registry.path.read_text()
    registry.path.write_text(text[:-10])
    with pytest.raises(RegistryError, match="not JSON"):
        registry.collect_garbage()
    registry.path.write_text(text)
    assert registry.collect_garbage() == [loose]
    assert registry.verify() == []


def test_weights_on_the_disk_may_change_without_touching_a_loaded_model(registry):
    """A loaded model lives in memory: truncating its blob neither kills nor changes it."""
    model = registry.load("model-0")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    os.truncate(registry.blobs.path(registry.get("model-0").sha256), 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
