"""Logs of experiments, the comparison of their runs, and the interface of a progress display.

Logs are JSON lines by default; Weights & Biases and TensorBoard need the extra `logs`.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zoo._notebook import Displays, gauge

if TYPE_CHECKING:
    import pandas as pd

Metrics = Mapping[str, Any]
_BETWEEN = 0.2  # seconds from one change of a bar to the next
_DISPLAYS = Displays()


class Advance(Protocol):
    """Reports progress to a display that is open."""

    def __call__(self, steps: float = 1, note: str = "") -> None:
        """Add to the steps that are done, and show a note beside them."""


class Progress(Protocol):
    """A way to show the progress of long work: `bar`, or `silent`, which shows nothing; the commands have their own."""

    def __call__(self, title: str, /, total: float | None = None) -> AbstractContextManager[Advance]:
        """Open a display for work of `total` steps; None if their number is not known."""


@contextmanager
def silent(title: str, total: float | None = None) -> Iterator[Advance]:
    """The `Progress` without a display."""
    yield lambda steps=1, note="": None


@contextmanager
def bar(title: str, total: float | None = None) -> Iterator[Advance]:
    """The `Progress` of notebooks: a bar below the cell while the work lasts, for whatever takes `progress`.

    In a terminal it is a line of text on stderr; elsewhere nothing is shown.

    Example:
        >>> with bar("frames", total=2) as advance:
        ...     advance()
        ...     advance(note="the last one")
    """
    began = shown = time.monotonic()
    done, place = 0.0, _DISPLAYS.open()

    def show(note: str) -> None:
        passed = time.monotonic() - began
        left = f", {passed * (total - done) / done:.0f} s left" if total and done else ""
        of = "" if total is None else f"of {total:,.0f}"
        words = " ".join(part for part in (f"{done:,.0f}", of, f"in {passed:.0f} s{left}", note) if part)
        if place is not None:
            place[0](gauge(title, done, total, words))
        elif sys.stderr.isatty():
            print(f"\r\x1b[K{title} {words}", end="", file=sys.stderr, flush=True)

    def advance(steps: float = 1, note: str = "") -> None:
        nonlocal done, shown
        done += steps
        if (now := time.monotonic()) - shown > _BETWEEN:
            shown = now
            show(note)

    try:
        yield advance
    finally:
        if place is not None:
            place[1]()
        elif sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Log(Protocol):
    """An experiment tracker. A resumed run calls `init` and logs its past epochs again.

    An exception in it, of any kind but an interruption, becomes a warning: it does not end the training.
    """

    def init(self, run: str, config: Mapping[str, Any]) -> None:
        """Begin a run of this name with all its settings; `config["id"]` is its own, and a resumed run keeps it."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Add the figures at the end of epoch `step`; one that is not finite is None."""

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
    """Several logs as one, called in their order; without any, a log that writes nothing.

    One that fails is named in a warning, the first time, and does not stop the others.
    """

    def __init__(self, *logs: Log) -> None:
        self._logs = logs
        self._failed = set[int]()

    def init(self, run: str, config: Mapping[str, Any]) -> None:
        """Begin the run in all logs."""
        self._each(lambda log: log.init(run, {**config}))

    def log(self, metrics: Metrics, step: int) -> None:
        """Add the figures to all logs."""
        self._each(lambda log: log.log({**metrics}, step))

    def finish(self) -> None:
        """End the run in all logs."""
        self._each(lambda log: log.finish())

    def _each(self, call: Callable[[Log], object]) -> None:
        for index, log in enumerate(self._logs):
            try:
                call(log)
            except Exception as error:  # a tracker may raise anything
                if index not in self._failed:
                    what = f"{type(log).__name__} failed with {type(error).__name__}: {error}"
                    warnings.warn(f"{what}; its log is incomplete, the run goes on", stacklevel=3)
                self._failed.add(index)


class Wandb:
    """A log to Weights & Biases; set WANDB_MODE=offline to keep everything on this machine.

    `settings` are further keywords of `wandb.init`, such as `entity` or `dir`, or a `name` or an `id` of your own in
    place of the run's.
    """

    def __init__(self, project: str, **settings: Any) -> None:
        with _extra("wandb"):
            import wandb
        self._wandb, self._settings = wandb, {"project": project, **settings}

    def init(self, run: str, config: Mapping[str, Any]) -> None:
        """Open the run, or resume the one of that id."""
        own = re.sub(r"[^A-Za-z0-9_.-]", "-", config.get("id", run))[-64:]  # what wandb takes as an id
        settings = {"name": run, "id": own, "resume": "allow"} | self._settings
        self._wandb.init(**settings | {"config": {**config, **self._settings.get("config", {})}})

    def log(self, metrics: Metrics, step: int) -> None:
        """Send the finite figures; wandb itself ignores steps that it already has."""
        self._wandb.log({name: value for name, value in metrics.items() if value is not None}, step=step)

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
        self._writer = self._open(str(self._folder / config.get("id", run)))
        self._writer.add_text("config", json.dumps(dict(config), indent=1))

    def log(self, metrics: Metrics, step: int) -> None:
        """Write one scalar per finite figure."""
        assert self._writer is not None, "call init first"
        for name, value in metrics.items():
            if value is not None:
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
    """One row per run, or member of a group, with a `log.jsonl` under `folder`, best validation accuracy first.

    Columns: run, done (epochs), best, at (its epoch) and the last loss; then every setting in which the runs
    differ, so none for a single run. An incomplete last line, left by a killed run, is ignored. A folder without logs
    raises ValueError.
    """
    import pandas as pd  # takes half a second, which training itself does not need

    paths = sorted(Path(folder).rglob("log.jsonl"))
    if not paths:
        msg = f"expected logs (log.jsonl) under {folder}, found none; zoo train --directory writes them"
        raise ValueError(msg)
    table = pd.DataFrame([row for path in paths for row in _rows(path)])
    same = [key for key in table.columns[5:] if table[key].astype(str).nunique(dropna=False) == 1]  # settings
    return table.drop(columns=same).sort_values("best", ascending=False, ignore_index=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The figures of one log, a row for each member, then the settings of recipe and spec by their own names."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    head, *epochs = lines or [{"run": path.parent.name, "config": {}}]
    settings: dict[str, Any] = {}
    for key, value in head["config"].items():
        settings |= value if isinstance(value, dict) else {key: value}
    settings.pop("id", None)
    members = settings.pop("members", [{}])  # what those of a group have of their own
    return [
        _row(head["run"], epochs, settings | own, f"/{m}" if len(members) > 1 else "") for m, own in enumerate(members)
    ]


def _row(run: str, epochs: list[dict[str, Any]], settings: Mapping[str, Any], member: str) -> dict[str, Any]:
    """One member's figures, whose names end in `member`, and settings."""
    accuracies = [line.get(f"valid/accuracy{member}") for line in epochs]
    scored = [(value, -index) for index, value in enumerate(accuracies) if value is not None]
    best, at = max(scored, default=(None, 0))
    row = {
        "run": f"{run}{member}",
        "done": len(epochs),
        "best": best,
        "at": epochs[-at].get("step") if scored else None,
        "loss": epochs[-1].get(f"valid/loss{member}") if epochs else None,
    }
    plain = {name: str(value) if isinstance(value, dict | list) else value for name, value in settings.items()}
    return row | plain
