"""Logs of runs, three calls each, and their comparison."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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
