"""Logs of runs, three calls each, and their comparison."""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ensemble
import zoo
from zoo import FrameSet, read_runs
from zoo.logs import Advance, JsonLines, TensorBoard, Wandb


def write(folder: Path, name: str, rate: float, accuracies: list[float]) -> None:
    """The log of a run."""
    (folder / name).mkdir()
    log = JsonLines(folder / name / "log.jsonl")
    log.init(name, {"recipe": {"learning_rate": rate, "epochs": 3}, "spec": {"options": {"width": 8}}})
    for step, accuracy in enumerate(accuracies, start=1):
        log.log({"valid/accuracy": accuracy, "valid/loss": 1 - accuracy}, step)
    log.finish()


def test_runs_are_compared_by_their_best_and_by_what_differs(tmp_path: Path) -> None:
    """Best first; equal settings are left out."""
    write(tmp_path, "slow", 0.1, [0.2, 0.5, 0.4])
    write(tmp_path, "fast", 0.5, [0.3, 0.6])
    table = read_runs(tmp_path)
    assert table.to_dict("list") == {
        "run": ["fast", "slow"],
        "done": [2, 3],
        "best": [0.6, 0.5],
        "at": [2, 2],
        "loss": [0.4, 0.6],
        "learning_rate": [0.5, 0.1],
    }


def test_a_setting_that_only_one_run_has_tells_it_from_the_others(tmp_path: Path) -> None:
    """As after a new option: the runs before it have none."""
    for name, recipe in (("old", {"epochs": 3}), ("new", {"epochs": 3, "patience": 2})):
        (tmp_path / name).mkdir()
        JsonLines(tmp_path / name / "log.jsonl").init(name, {"recipe": recipe})
    assert list(read_runs(tmp_path).columns[5:]) == ["patience"]


def test_a_single_run_differs_in_nothing(tmp_path: Path) -> None:
    """Its figures only."""
    write(tmp_path, "only", 0.1, [0.2, 0.5])
    assert list(read_runs(tmp_path).columns) == ["run", "done", "best", "at", "loss"]


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    """The epochs before it count."""
    write(tmp_path, "run", 0.1, [0.2, 0.5])
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "valid/acc')
    assert read_runs(tmp_path)["done"].tolist() == [2]


def test_a_folder_without_logs_is_refused(tmp_path: Path) -> None:
    """It names the folder and the option."""
    with pytest.raises(ValueError, match="--directory writes them"):
        read_runs(tmp_path)


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    """Read back with tensorboard itself."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoard(tmp_path)
    log.init("trial", {"epochs": 1})
    log.log({"valid/accuracy": 0.5}, step=1)
    log.finish()
    events = EventAccumulator(str(tmp_path / "trial"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("valid/accuracy")] == [(1, 0.5)]


def test_wandb_takes_a_whole_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings and figures are in its local files; no network is touched."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = Wandb("tests", dir=str(tmp_path))
    log.init("trial", {"epochs": 1})
    log.log({"valid/accuracy": 0.5}, step=1)
    assert wandb.run.config["epochs"] == 1
    log.finish()

    def written() -> bool:
        return any(b"valid/accuracy" in path.read_bytes() for path in tmp_path.rglob("*.wandb"))

    deadline = time.monotonic() + 30  # its own process writes, on a busy machine a moment after `finish`
    while not written():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Recorder:
    """A log that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def init(self, run: str, config: object) -> None:
        """Note the name of the run."""
        self.calls.append(f"init {run}")

    def log(self, metrics: object, step: int) -> None:
        """Note the epoch."""
        self.calls.append(f"log {step}")

    def finish(self) -> None:
        """Note the end."""
        self.calls.append("finish")


SPEC = zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 1})


def test_training_calls_its_log(frames: zoo.FrameSet) -> None:
    """The three calls come in order, also if training ends with an error."""
    log = Recorder()

    def stop(record: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.train(SPEC, zoo.Recipe(batch_size=32), frames, frames, log=log, on_epoch=stop)
    assert log.calls == ["init cylinder", "log 1", "finish"]


def test_a_log_gets_what_the_file_gets(frames: zoo.FrameSet, tmp_path: Path) -> None:
    """So runs with a tracker can be compared with those without."""
    log = Recorder()
    zoo.train(SPEC, zoo.Recipe(batch_size=32, epochs=2), frames, frames, log=log, directory=tmp_path / "run")
    assert log.calls == ["init run", "log 1", "log 2", "finish"]
    assert read_runs(tmp_path)["done"].tolist() == [2]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_log_that_fails_does_not_end_the_run(where: str, frames: FrameSet, tmp_path: Path) -> None:
    """One warning, however often it fails; the checkpoint and the other log are as without it."""

    class Broken(Recorder):
        def fail(self, *args: object, **settings: object) -> None:
            raise RuntimeError("no network")

    log = Broken()
    setattr(log, where, log.fail)
    recipe = zoo.Recipe(batch_size=32, epochs=3)
    with pytest.warns(UserWarning, match="Broken failed with RuntimeError: no network; its log is incomplete") as seen:
        found = zoo.train(SPEC, recipe, frames, frames, log=log, directory=tmp_path)
    assert len(seen) == 1
    assert found.digest == zoo.train(SPEC, recipe, frames, frames).digest
    assert read_runs(tmp_path)["done"].tolist() == [3]


def test_a_figure_that_is_not_finite_is_left_out_or_null(tmp_path: Path) -> None:
    """TensorBoard takes no None; in the file it is null, and the best epoch is one that has a figure."""
    pytest.importorskip("tensorboard")
    for log in (TensorBoard(tmp_path), JsonLines(tmp_path / "log.jsonl")):
        log.init("trial", {})
        for step, value in enumerate((None, 0.5, None), start=1):
            log.log({"valid/accuracy": value, "valid/loss": value}, step)
        log.finish()
    [row] = read_runs(tmp_path).to_dict("records")
    assert (row["done"], row["best"], row["at"], row["loss"]) == (3, 0.5, 2, None)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every `wandb.init`, by a package that does nothing else."""
    calls: list[dict[str, Any]] = []
    package = ModuleType("wandb")
    vars(package).update(
        init=lambda **settings: calls.append(settings), log=lambda *figures, **step: None, finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    return calls


def test_every_run_has_an_id_of_its_own_and_keeps_it(
    opened: list[dict[str, Any]], frames: FrameSet, tmp_path: Path
) -> None:
    """Other seeds, the same run again, folders of one name; a resumed run is the same run."""
    recipe = zoo.Recipe(batch_size=32, epochs=1)
    for seed in (0, 0, 1):
        zoo.train(SPEC, replace(recipe, seed=seed), frames, frames, log=Wandb("p"))
    for folder in ("a/run 1", "b/run 1", "a/run 1"):
        zoo.train(SPEC, recipe, frames, frames, log=Wandb("p"), directory=tmp_path / folder)
    ids = [call["id"] for call in opened]
    assert len({*ids}) == 5
    assert ids[3] == ids[5]
    assert [call["name"] for call in opened] == ["cylinder"] * 3 + ["run 1"] * 3
    assert all(re.fullmatch(r"(cylinder|run-1)-[0-9a-f]{12}", one) for one in ids)


def test_a_run_of_an_older_version_keeps_the_id_that_it_had(
    opened: list[dict[str, Any]], frames: FrameSet, tmp_path: Path
) -> None:
    """The name of its folder."""
    recipe, path = zoo.Recipe(batch_size=32, epochs=1), tmp_path / "run" / "state.safetensors"
    zoo.train(SPEC, recipe, frames, frames, directory=tmp_path / "run")
    header = zoo.checkpoint.verify_bytes(path.read_bytes())
    about = json.loads(header.metadata["run"])
    del about["plain"]["id"]
    tensors = zoo.checkpoint.tensors_of(path.read_bytes(), header)
    path.write_bytes(zoo.checkpoint.pack(tensors, {"run": json.dumps(about)}))
    zoo.train(SPEC, recipe, frames, frames, directory=tmp_path / "run", log=Wandb("p"))
    assert opened[0]["id"] == "run"


def test_ones_own_settings_are_honoured(opened: list[dict[str, Any]], frames: FrameSet) -> None:
    """An id, a name, and further entries of the configuration."""
    log = Wandb("p", id="mine", name="first try", config={"room": 7}, entity="us")
    zoo.train(SPEC, zoo.Recipe(batch_size=32, epochs=1), frames, frames, log=log)
    [call] = opened
    assert (call["id"], call["name"], call["entity"]) == ("mine", "first try", "us")
    assert (call["config"]["room"], call["config"]["recipe"]["epochs"]) == (7, 1)


def test_runs_of_one_name_have_folders_of_their_own(frames: FrameSet, tmp_path: Path) -> None:
    """In TensorBoard, where the folder is the run."""
    pytest.importorskip("tensorboard")
    for seed in (0, 1):
        zoo.train(SPEC, zoo.Recipe(batch_size=32, epochs=1, seed=seed), frames, frames, log=TensorBoard(tmp_path))
    assert len(list(tmp_path.glob("cylinder-*"))) == 2


def test_members_of_a_group_are_compared_one_by_one(frames: FrameSet, tmp_path: Path) -> None:
    """A row for each, by its number in the group, with what it has of its own."""
    recipe = zoo.Recipe(batch_size=32, epochs=2)
    ensemble.cotrain(SPEC, recipe, frames, frames, seeds=[3, 4], together=2, directory=tmp_path)
    table = read_runs(tmp_path).sort_values("run")
    assert table["run"].tolist() == ["members-000/0", "members-000/1"]
    assert table["seed"].tolist() == [3, 4]
    assert table["best"].notna().all()


def test_training_shows_how_far_each_epoch_has_come(frames: FrameSet) -> None:
    """A display is opened for each epoch with its frames as the total, and all of them are reported."""
    shown: dict[str, list[float]] = {}

    @contextmanager
    def record(title: str, total: float | None = None) -> Iterator[Advance]:
        shown[title] = []
        yield lambda steps=1, note="": shown[title].append(steps)
        assert sum(shown[title]) == total

    spec = zoo.Spec("cylinder", features=6, context=0, classes=4, options={"width": 4})
    zoo.train(spec, zoo.Recipe(epochs=2, batch_size=4), frames, frames, progress=record)
    assert list(shown) == ["epoch 1/2", "epoch 2/2"]
    assert all(len(steps) > 1 for steps in shown.values())
