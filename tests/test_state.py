"""The folder of a run: what is kept in it, and which runs can be resumed from it."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ensemble
from zoo import FrameSet, Recipe, Spec, _files, checkpoint, train

SPEC = Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 2, "dropout": 0.2})
QUICK = Recipe(epochs=3, batch_size=32, learning_rate=0.01)


class StopError(Exception):
    """Raised from on_epoch to stop a run."""


def interrupted(recipe: Recipe, frames: FrameSet, directory: Path, after: int) -> None:
    """Train, and stop after some epochs."""

    def report(record: Any) -> None:
        if record["epoch"] == after:
            raise StopError

    with pytest.raises(StopError):
        train(SPEC, recipe, frames, frames, directory=directory, on_epoch=report)


class FullDisk(_files.System):
    """A disk that is full from some file on."""

    def __init__(self, files: int) -> None:
        self.left = files

    def write(self, file: int, data: memoryview) -> int:
        """Refuse when no file is left."""
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file, data)


def test_a_full_disk_leaves_the_epoch_before(frames: FrameSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says so, and with room again the run ends like an uninterrupted one."""
    monkeypatch.setattr(_files, "system", FullDisk(3))
    with pytest.raises(OSError, match=r"cannot write epoch 2 .*No space left.*resumed from epoch 1"):
        train(SPEC, QUICK, frames, frames, directory=tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp"))
    resumed = train(SPEC, QUICK, frames, frames, directory=tmp_path)
    assert resumed.digest == train(SPEC, QUICK, frames, frames).digest


def test_epochs_are_pruned_and_logged(frames: FrameSet, tmp_path: Path) -> None:
    """The newest `keep` stay; the log has a line of settings and one an epoch, also after a resumption."""
    interrupted(replace(QUICK, keep=2), frames, tmp_path, 2)
    train(SPEC, replace(QUICK, keep=2), frames, frames, directory=tmp_path)
    assert [path.name[6:10] for path in sorted(tmp_path.glob("epoch-*"))] == ["0002", "0003"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["config"]["recipe"]["keep"] == 2
    assert [line["step"] for line in lines[1:]] == [1, 2, 3]


def test_another_runs_directory_is_refused(frames: FrameSet, tmp_path: Path) -> None:
    """The message says in which field they differ; a damaged state is refused too."""
    train(SPEC, QUICK, frames, frames, directory=tmp_path)
    with pytest.raises(ValueError, match=r"another run.*learning_rate: 0\.01 there, 0\.02 now"):
        train(SPEC, replace(QUICK, learning_rate=0.02), frames, frames, directory=tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="remove it to start anew"):
        train(SPEC, QUICK, frames, frames, directory=tmp_path)


def rewritten(directory: Path, recipe: dict[str, Any], members: list[list[Any]]) -> None:
    """Write a run's identity in its former shape: one recipe, and lists of the values that members had of their own."""
    path = directory / "state.safetensors"
    data = path.read_bytes()
    header = checkpoint.verify_bytes(data)
    about = json.loads(header.metadata["run"])
    del about["identity"]["recipes"]
    about["identity"] |= {"recipe": recipe, "members": members}
    path.write_bytes(checkpoint.pack(checkpoint.tensors_of(data, header), {"run": json.dumps(about)}))


def test_a_folder_of_the_version_before_is_resumed(frames: FrameSet, tmp_path: Path) -> None:
    """That of a single model, and that of members with seeds, orders, rates and decays of their own."""
    whole = train(SPEC, QUICK, frames, frames)
    interrupted(QUICK, frames, tmp_path, 2)
    rewritten(tmp_path, QUICK.to_dict(), [[0], [], [], []])
    assert train(SPEC, QUICK, frames, frames, directory=tmp_path).digest == whole.digest
    seeds, rates, decays = [3, 5], [0.01, 0.02], [0.0, 0.1]
    for own_order in (False, True):
        folder = tmp_path / str(own_order)
        some = {"seeds": seeds, "own_order": own_order, "learning_rates": rates, "weight_decays": decays, "together": 2}
        before = ensemble.cotrain(SPEC, QUICK, frames, frames, directory=folder, **some)
        rewritten(folder / "members-000", QUICK.to_dict(), [seeds, seeds if own_order else [0], rates, decays])
        again = ensemble.cotrain(SPEC, QUICK, frames, frames, directory=folder, **some)
        assert [one.digest for one in again] == [one.digest for one in before]
        with pytest.raises(ValueError, match=r"another run \(weight_decay: 0\.1 there, 0\.2 now\)"):
            ensemble.cotrain(SPEC, QUICK, frames, frames, directory=folder, **some | {"weight_decays": [0.0, 0.2]})
