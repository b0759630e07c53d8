"""Logs of experiments, the comparison of their runs, and the interface of a progress display.

Logs are JSON lines by default; Weights & Biases and TensorBoard need the extra `logs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pandas as pd

Metrics = Mapping[str, Any]


class Advance(Protocol):
    """Reports progress to a display that is open."""

    def __call__(self, steps: float = 1, note: str = "") -> None:
        """Add to the steps that are done, and show a note beside them."""


class Progress(Protocol):
    """A way to show the progress of long work; the commands pass a bar on stderr, and `silent` shows nothing."""

    def __call__(self, title: str, /, total: float | None = None) -> AbstractContextManager[Advance]:
        """Open a display for work of `total` steps; None if their number is not known."""


@contextmanager
def silent(title: str, total: float | None = None) -> Iterator[Advance]:
    """The `Progress` without a display."""
    yield lambda steps=1, note="": None


class Log(Protocol):
    """An experiment tracker. A resumed run calls `init` and logs its past epochs again."""

    def init(self, run: str, config: Mapping[str, Any]) -> None:
        """Begin a run with all its settings."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Add the figures at the end of epoch `step`."""

    def finish(self) -> None:
        """End the run, also after an error."""


class JsonLines:
    """One line of JSON with the settings, then one for each epoch; the file is whole after every line.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> log = JsonLines(folder / "log.jsonl")
        >>> log.init("trial", {"epochs": 1})
        >>> log.log({"valid/accuracy": 0.5}, step=1)
        >>> log.finish()
        >>> (folder / "log.jsonl").read_text().splitlines()[1]
        '{"step": 1, "valid/accuracy": 0.5}'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def init(self, run: str, config: Mapping[str, Any]) -> None:
        """Start the file over with the settings."""
        self.path.write_text(json.dumps({"run": run, "config": dict(config)}) + "\n", encoding="utf-8")

    def log(self, metrics: Metrics, step: int) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def finish(self) -> None:
        """Do nothing: the file is complete."""


class Several:
    """Several logs as one, called in their order; without any, a log that writes nothing."""

    def __init__(self, *logs: Log) -> None:
        self._logs = logs

    def init(self, run: str, config: Mapping[str, Any]) -> None:
        """Begin the run in all logs."""
        for log in self._logs:
            log.init(run, config)

    def log(self, metrics: Metrics, step: int) -> None:
        """Add the figures to all logs."""
        for log in self._logs:
            log.log(metrics, step)

    def finish(self) -> None:
        """End the run in all logs."""
        for log in self._logs:
            log.finish()


class Wandb:
    """A log to Weights & Biases; set WANDB_MODE=offline to keep everything on this machine.

    `settings` are further keywords of `wandb.init`, such as `entity` or `dir`.
    """

    def __init__(self, project: str, **settings: Any) -> None:
        with _extra("wandb"):
            import wandb
        self._wandb, self._settings = wandb, {"project": project, **settings}

    def init(self, run: str, config: Mapping[str, Any]) -> None:
        """Open the run, or resume the one of that name."""
        self._wandb.init(name=run, id=run, resume="allow", config=dict(config), **self._settings)

    def log(self, metrics: Metrics, step: int) -> None:
        """Send the figures; wandb itself ignores steps that it already has."""
        self._wandb.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._wandb.finish()


class TensorBoard:
    """A log to event files for TensorBoard; each run has its own folder under `folder`."""

    def __init__(self, folder: str | Path) -> None:
        with _extra("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._open, self._folder = SummaryWriter, Path(folder)
        self._writer: SummaryWriter | None = None

    def init(self, run: str, config: Mapping[str, Any]) -> None:
        """Open the run's folder and write the settings as text."""
        self._writer = self._open(str(self._folder / run))
        self._writer.add_text("config", json.dumps(dict(config), indent=1))

    def log(self, metrics: Metrics, step: int) -> None:
        """Write one scalar per figure."""
        assert self._writer is not None, "call init first"
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write the rest and close the files."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def _extra(package: str) -> Iterator[None]:
    """Name the extra that has a missing package."""
    try:
        yield
    except ImportError as error:
        msg = f"expected the package {package} for this log: pip install 'zoo-ensemble[logs]'"
        raise ImportError(msg) from error


def read_runs(folder: str | Path) -> pd.DataFrame:
    """One row per run with a `log.jsonl` under `folder`, best validation accuracy first.

    Columns: run, done (epochs), best, at (its epoch) and the last loss; then every setting in which the runs
    differ, so none for a single run. An incomplete last line, left by a killed run, is ignored. A folder without logs
    raises ValueError.
    """
    import pandas as pd  # takes half a second, which training itself does not need

    paths = sorted(Path(folder).rglob("log.jsonl"))
    if not paths:
        msg = f"expected logs (log.jsonl) under {folder}, found none; zoo train --directory writes them"
        raise ValueError(msg)
    table = pd.DataFrame([_row(path) for path in paths])
    same = [key for key in table.columns[5:] if table[key].astype(str).nunique(dropna=False) == 1]  # settings
    return table.drop(columns=same).sort_values("best", ascending=False, ignore_index=True)


def _row(path: Path) -> dict[str, Any]:
    """The figures of one log, then its settings; those of the recipe and the spec have their own names."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    head, *epochs = lines or [{"run": path.parent.name, "config": {}}]
    best: dict[str, Any] = max(epochs, key=lambda line: line.get("valid/accuracy", float("-inf")), default={})
    row = {
        "run": head["run"],
        "done": len(epochs),
        "best": best.get("valid/accuracy"),
        "at": best.get("step"),
        "loss": epochs[-1].get("valid/loss") if epochs else None,
    }
    for key, value in head["config"].items():
        for name, setting in (value if isinstance(value, dict) else {key: value}).items():
            row[name] = str(setting) if isinstance(setting, dict | list) else setting
    return row
