"""Studies: successive halving worked out by hand, optuna under a budget, and the freeing of dead trials."""

import errno
import fcntl
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sent import some_frames

import zoo
from zoo import Checkpoint, FrameSet, Recipe, Spec, count_parameters
from zoo.logs import silent
from zoo.search import free_dead, halving, optuna_study, optuna_trials
from zoo.search.study import one_by_one
from zoo.workers import Processes

RECIPE = Recipe(epochs=9, batch_size=64, learning_rate=0.01)


def spec(width: int) -> Spec:
    """A small model."""
    return Spec("cylinder", features=6, context=0, classes=4, options={"width": width, "depth": 1})


def pretend(specs: Sequence[Spec], recipe: Recipe, train: FrameSet, valid: FrameSet) -> list[Checkpoint | None]:
    """A trainer for which wider is better, and the widest diverges."""
    trained: list[Checkpoint | None] = []
    for one in specs:
        width = one.options["width"]
        figures = {"valid/accuracy": {"value": width / 100}, "valid/loss": {"value": 1.0}}
        plain = Checkpoint.from_module(zoo.build(one, seed=0), one, "abcd")
        trained.append(None if width == 9 else replace(plain, metrics=figures))
    return trained


def test_halving_keeps_a_third_and_trains_it_three_times_as_long(frames: FrameSet) -> None:
    """Nine specs for one epoch, the best three for three, the best one for nine; the diverged one is last."""
    trials = halving([spec(width) for width in range(1, 10)], RECIPE, frames, frames, trainer=pretend)
    assert [(t.spec.options["width"], t.epochs) for t in trials] == [
        (8, 9), (7, 3), (6, 3), (5, 1), (4, 1), (3, 1), (2, 1), (1, 1), (9, 1)
    ]  # fmt: skip
    row = trials[0].row()
    assert row["accuracy"] == 0.08
    assert row["parameters"] == count_parameters(spec(8))


def test_halving_trains_for_real(frames: FrameSet) -> None:
    """The plain trainer: its best is a checkpoint of the last round."""
    best = halving([spec(1), spec(16), spec(8)], replace(RECIPE, epochs=3), frames, frames)[0]
    assert best.epochs == 3
    assert best.checkpoint is not None
    assert best.accuracy == best.checkpoint.metrics["valid/accuracy"]["value"] > 0.5


def test_halving_needs_specs(frames: FrameSet) -> None:
    """And a factor that leaves some out."""
    with pytest.raises(ValueError, match="got 0 specs and factor 3"):
        halving([], RECIPE, frames, frames)
    with pytest.raises(ValueError, match="factor of at least 2"):
        halving([spec(1)], RECIPE, frames, frames, factor=1)


def test_optunas_trials_respect_the_budget_and_share_a_journal(frames: FrameSet, tmp_path: Path) -> None:
    """The trials of two runs in one study, each built model within the budget."""
    pytest.importorskip("optuna")
    recipe = replace(RECIPE, epochs=2)
    for seed in (0, 1):
        study = optuna_study(
            recipe, frames, frames, budget=2000, trials=2, contexts=(0, 2), journal=tmp_path / "j.log", seed=seed
        )
    trials = optuna_trials(study)
    assert len(study.trials) == 4
    assert all(count_parameters(trial.spec) <= 2000 for trial in trials)
    assert trials[0].accuracy == study.best_value


def test_a_journal_needs_no_links_and_is_refused_without_locks(frames, tmp_path, monkeypatch) -> None:
    """A link or file that lies there as a lock would outlive its process, or be taken from a living one."""
    pytest.importorskip("optuna")

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", refused)
    (tmp_path / "j.log.lock").touch()  # as optuna leaves where a process was killed
    settings = {"budget": 2000, "trials": 1, "contexts": (0,), "journal": tmp_path / "j.log"}
    assert len(optuna_study(RECIPE, frames, frames, **settings).trials) == 1
    monkeypatch.setattr(fcntl, "flock", refused)
    before = (tmp_path / "j.log").read_bytes()
    with pytest.raises(ValueError, match=r"offers no locks .*use a folder on another file system"):
        optuna_study(RECIPE, frames, frames, **settings)
    assert (tmp_path / "j.log").read_bytes() == before


def test_the_trial_of_a_dead_process_is_freed(frames: FrameSet, tmp_path: Path) -> None:
    """It is marked as failed and its settings are tried next; the trial of a live process is left alone."""
    optuna = pytest.importorskip("optuna")
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    study = optuna.create_study(direction="maximize")
    for process in (finished.pid, os.getpid()):
        trial = study.ask({"depth": optuna.distributions.IntDistribution(1, 6)})
        trial.set_user_attr("worker", f"{socket.gethostname()}:{process}")
    assert free_dead(study) == 1
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING", "WAITING"]
    assert study.ask({"depth": optuna.distributions.IntDistribution(1, 6)}).params == study.trials[0].params


@pytest.mark.usefixtures("processes")
def test_trials_are_trained_by_processes_with_the_same_bits(tmp_path: Path) -> None:
    """And kept in a folder, from which a study that is started again goes on; also those that diverged."""
    frames, folder, totals = some_frames(300), tmp_path / "run", list[object]()
    specs = [zoo.Spec("cylinder", 5, 1, 3, options={"width": width, "depth": 1}) for width in (4, 8, 8)]
    recipe = zoo.Recipe(epochs=1)
    plain = one_by_one(specs, recipe, frames, frames)
    zoo.write_corpus(frames, tmp_path / "corpus", "train")
    mapped = zoo.read_corpus(tmp_path / "corpus", "train", classes=frames.classes, mapped=tmp_path)

    def progress(title: str, total: float | None = None) -> Any:
        totals.append(total)
        return silent(title)

    for how in ({"workers": Processes(2)}, {"workers": Processes(2), "folder": folder}, {"folder": folder}):
        given = mapped if "folder" in how else frames
        for one, other in zip(plain, one_by_one(specs, recipe, given, given, **how, progress=progress), strict=True):
            assert one.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
            assert one.metrics == other.metrics
    assert totals == [2, 2, 0]  # equal specs are trained once
    times = {file: file.stat().st_mtime_ns for file in folder.glob("[!r]*")}
    wild = zoo.Recipe(epochs=1, batch_size=32, optimiser="sgd", learning_rate=1e6, l2=1e6)
    for _ in range(2):
        assert one_by_one(specs[:1], wild, frames, frames, folder=folder) == [None]
    assert len([*folder.glob("[!r]*")]) == 3
    assert times == {file: file.stat().st_mtime_ns for file in times}


def test_mapped_frames_are_mapped_by_each_worker(tmp_path: Path) -> None:
    """Neither a part of them, which each would hold, nor a file that is no more as it was."""
    frames = zoo.sample_corpus("train").select(torch.arange(6))
    zoo.write_corpus(frames, tmp_path, "train")
    mapped = zoo.read_corpus(tmp_path, "train", mapped=tmp_path)
    assert len(pickle.dumps(mapped)) < mapped.features.nbytes / 10
    again = pickle.loads(pickle.dumps(mapped))
    assert again.mapped
    assert torch.equal(again.features, frames.features)
    some = zoo.Spec("cylinder", 27, 0, 40, options={"width": 4, "depth": 1})
    with pytest.raises(ValueError, match="all frames of a mapped file, to send to workers, got a part"):
        one_by_one([some], Recipe(), mapped.select(torch.arange(3)), frames, workers=Processes(1))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"expected mapped frames in .*train\.frames\.safetensors, got: "):
        one_by_one([some], Recipe(), mapped, frames, workers=Processes(1))
