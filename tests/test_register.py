"""What is registered of a model, and a lost registry rebuilt from its blobs."""

from __future__ import annotations

import pytest
from conftest import SMALL, checkpoint
from torch import nn

import zoo
from zoo.registry import Registry, RegistryError
from zoo.registry.register import prepare


@pytest.fixture
def registry(two_models: Registry) -> Registry:
    """A registry of two models."""
    return two_models


def test_a_lost_registry_is_rebuilt_from_its_blobs(registry):
    """Names, ids, weights and metrics come back; a damaged blob and a foreign file do not."""
    registry.register("model-0", checkpoint(7), metrics={"valid/accuracy": 0.5}, note="second")
    before = [(entry.reference, entry.id, entry.sha256, entry.metrics, entry.note) for entry in registry.entries()]
    registry.path.unlink()
    (registry.blobs.folder / f"{'0' * 64}.safetensors").write_bytes(b"no checkpoint")
    with pytest.warns(UserWarning, match=r"could not be recovered:\n0{64}\.safetensors.*BLOB_DIGEST"):
        registry.recover()
    assert [(e.reference, e.id, e.sha256, e.metrics, e.note) for e in registry.entries()] == before
    assert registry.verify(probe=True) == []


def test_all_that_can_be_is_recovered_and_the_rest_is_listed(registry):
    """The same weights with other classes, a name that is taken: their blobs are named, all others come back."""
    first = checkpoint(0)
    others = [
        prepare("model-0", zoo.Checkpoint(SMALL, first.tensors, ("yes", "no"))),
        prepare("MODEL-1", checkpoint(1)),
        prepare("model-0", zoo.Checkpoint(SMALL, first.tensors, ("no", "yes"), note="again")),
    ]
    for blob in others:
        registry.blobs.put(blob.data)
    registry.path.unlink()
    with pytest.warns(UserWarning, match="could not be recovered") as warned:
        found = registry.recover()
    assert sorted(entry.reference for entry in found) == ["model-0@1", "model-1@1"]
    message = str(warned[0].message)
    assert message.count(".safetensors: ") == 2
    assert f"{others[0].record.blob.removeprefix('sha256:')}.safetensors" in message
    assert "[CLASSES]" in message
    assert f"{others[1].record.blob.removeprefix('sha256:')}.safetensors" in message
    assert "[NAME_COLLISION]" in message


def test_the_same_weights_under_changed_code_are_refused(tmp_path, monkeypatch):
    """They would be the version that is registered, and answer otherwise."""
    monkeypatch.setattr("zoo.models.architectures.ARCHITECTURES", {})
    activation = [nn.ReLU()]

    def edited(inputs: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 8), *activation, nn.Linear(8, classes))

    zoo.architecture(edited)
    registry = Registry(tmp_path / "registry.json")
    spec = zoo.Spec("edited", features=2, context=0, classes=2)
    kept = zoo.Checkpoint.from_module(zoo.build(spec, seed=0), spec, ["no", "yes"])
    first = registry.register("a", kept)
    assert registry.register("a", kept).id == first.id
    activation[0] = nn.Tanh()
    with pytest.raises(zoo.CheckpointError, match=r"a@1: expected .* got .*the code computes otherwise.*another name"):
        registry.register("a", kept)
    assert [problem.reason for problem in registry.verify(probe=True)] == ["PROBE"]


def test_a_damaged_registry_is_to_be_moved_away_before_it_is_rebuilt(registry):
    """The way out that the refusal names is one that works."""
    registry.path.write_bytes(registry.path.read_bytes()[:-9])
    with pytest.raises(RegistryError, match="move it away and rebuild it with `zoo recover`"):
        registry.recover()
    registry.path.rename(registry.path.with_name("damaged"))
    assert len(registry.recover()) == 2
