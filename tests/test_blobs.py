"""Blobs that are not what they were, and the garbage collection of the store."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import checkpoint

import zoo
from zoo import _files
from zoo.registry import Registry, RegistryError


@pytest.fixture
def registry(two_models: Registry) -> Registry:
    """A registry of two models."""
    return two_models


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
    """A pipe that has no writer."""
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
def test_registering_the_same_weights_again_repairs_a_damaged_blob(registry, prepared, damage):
    """The version stays the same, its bytes are whole again."""
    before = registry.get("model-0")
    damage(registry.blobs.path(before.sha256), registry.blobs.path(registry.get("model-1").sha256))
    assert registry.add("model-0", prepared[0]) == before
    assert registry.verify() == []


def test_a_blob_that_contradicts_the_registry_is_refused(registry):
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


def test_garbage_collection_keeps_what_another_registry_of_the_folder_holds(registry, prepared):
    """They share the store; one that cannot be read stops everything."""
    other = Registry(registry.path.with_name("other.json"))
    other.add("model-2", prepared[2])
    loose = registry.blobs.path(registry.blobs.put(prepared[3].data))
    (registry.path.parent / "notes.json").write_text('{"name": "zoo-registry"}')
    os.mkfifo(registry.path.parent / "pipe")
    text = registry.path.read_text()
    registry.path.write_text(f"\n{text[:-9]}")
    with pytest.raises(RegistryError, match=r"registry\.json.*nothing was removed"):
        other.collect_garbage(older_than=-60)
    registry.path.write_text(text)
    assert other.collect_garbage(older_than=-60) == [loose]
    assert registry.verify() == other.verify() == []


def test_garbage_collection_goes_on_past_what_it_cannot_remove(registry, prepared, monkeypatch):
    """A folder is no blob; a file that cannot be removed is named when all others are gone; a missing one is fine."""
    (registry.blobs.folder / f"{'0' * 64}.safetensors").mkdir()
    loose = sorted(registry.blobs.path(registry.blobs.put(prepared[index].data)) for index in (2, 3))
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


def test_garbage_collection_keeps_what_is_young_or_held(registry, prepared):
    """A day's grace, a dry run that only tells, and nothing touched where the registry does not parse."""
    loose = registry.blobs.path(registry.blobs.put(prepared[2].data))
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
