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

from zoo import _files
from zoo.registry import Registry, RegistryError, changes
from zoo.registry.register import Prepared
from zoo.registry.text import parse
from zoo.registry.transaction import RegistryFile, locked

CALLS = ("open", "write", "read_into", "chmod", "sync", "close", "rename", "touch", "lock", "make_folder")


@pytest.fixture
def registry(two_models: Registry) -> Registry:
    """A registry of two models."""
    return two_models


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


def calls_of(tmp_path: Path, prepared: list[Prepared], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many system calls the third registration makes."""
    registry = Registry(tmp_path / "counted" / "registry.json")
    for index in (0, 1):
        registry.add(f"model-{index}", prepared[index])
    counting = Counting()
    with monkeypatch.context() as patch:
        patch.setattr(_files, "system", counting)
        registry.add("model-2", prepared[2])
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


def test_kill_before_any_system_call_leaves_old_or_new_state(tmp_path, registry, prepared, monkeypatch):
    """Registered or not, nothing else; the next registration works, and garbage collection tidies up."""
    count = calls_of(tmp_path, prepared, monkeypatch)
    old, text = state(registry), registry.path.read_bytes()
    new = {**old, "model-2": prepared[2].record.blob.removeprefix("sha256:")}
    seen = set()
    for number in range(1, count + 1):

        def act(number: int = number) -> None:
            _files.system = Counting(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            registry.add("model-2", prepared[2])

        assert in_child(act) == -signal.SIGKILL
        now = state(Registry(registry.path))
        assert now in (old, new), f"call {number}"
        seen.add(now == new)
        registry.add("model-3", prepared[3])
        assert state(registry) == {**now, "model-3": prepared[3].record.blob.removeprefix("sha256:")}
        registry.collect_garbage(older_than=-60)
        blobs = {path.name for path in registry.blobs.folder.iterdir()}
        assert blobs == {f"{sha256}.safetensors" for sha256 in state(registry).values()}
        assert leftovers(tmp_path) == []
        registry.path.write_bytes(text)
        registry.collect_garbage(older_than=-60)
    assert seen == {True, False}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_any_system_call_changes_nothing(tmp_path, registry, prepared, monkeypatch, code):
    """One typed error with the cause; the old state and no temporary file, or, from the last flush on, the new."""
    count = calls_of(tmp_path, prepared, monkeypatch)
    old, text = state(registry), registry.path.read_bytes()
    reasons = []
    for number in range(1, count + 1):

        def act() -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(_files, "system", Counting(number, act))
            error = refusal(lambda: registry.add("model-2", prepared[2]))
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


def test_eight_writers_lose_nothing_and_a_reader_sees_no_torn_file(tmp_path, prepared):
    """8 processes x 25 registrations: 200 of 200, each number once; every look at the file finds it whole."""
    registry = Registry(tmp_path / "registry.json")
    registry.add("model-0", prepared[0])

    def write(writer: int) -> None:
        for index in range(25):
            data = f"{writer} {index}".encode().ljust(64)
            identity = f"{writer:06x}{index:06x}"
            name = "shared" if index % 5 == 0 else f"of-{writer}-{index}"
            sha256 = registry.blobs.put(data)
            line = msgspec.structs.replace(prepared[0].record, blob=f"sha256:{sha256}", bytes=len(data))
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


def test_a_stopped_holder_keeps_the_lock_and_is_named(registry, prepared):
    """Nothing is stolen: the waiter learns who holds it."""
    child = held_elsewhere(registry)
    os.kill(child, signal.SIGSTOP)
    impatient = Registry(registry.path, timeout=0.1)
    with pytest.raises(RegistryError, match=f"held by process {child} on"):
        impatient.add("model-2", prepared[2])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert registry.list() == ["model-0", "model-1"]


def test_a_killed_holder_frees_the_lock_at_once(registry, prepared):
    """The system gives the lock back, whatever the dead process wanted."""
    child = held_elsewhere(registry)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    started = time.monotonic()
    registry.add("model-2", prepared[2])
    assert time.monotonic() - started < 5
    assert "model-2" in registry.list()


def test_an_editor_that_changes_the_file_meanwhile_loses_nothing(registry, prepared, monkeypatch):
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
    registry.add("model-2", prepared[2])
    assert registry.list() == ["model-0", "model-1", "model-2"]
    assert {key: bytes(raw) for key, raw in registry.snapshot().extensions.items()} == {"x-1": b"1"}
    Editor.most = 99
    with pytest.raises(RegistryError, match="changed 3 times") as caught:
        registry.add("model-3", prepared[3])
    assert caught.value.reason == "CONFLICT"
    assert "model-3" not in registry.list()
    assert leftovers(registry.path.parent) == []


def test_looking_for_a_registry_in_a_mistyped_folder_makes_nothing(tmp_path):
    """Neither the folder nor a lock."""
    registry = Registry(tmp_path / "typo" / "registry.json")
    for act in (registry.collect_garbage, lambda: registry.alias_back("best"), lambda: registry.remove("a")):
        with pytest.raises(RegistryError, match="there is no registry"):
            act()
    assert list(tmp_path.iterdir()) == []
