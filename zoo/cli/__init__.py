"""The command `zoo`: make and keep single models."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from zoo._console import make_app, run_app
from zoo.cli import entries, search, train, transfer, upkeep, views

COMMANDS = (
    *(views.list_, views.show, views.diff),
    *(entries.register, entries.alias, entries.tag, entries.note, entries.remove),
    *(upkeep.verify, upkeep.load, upkeep.gc, upkeep.recover),
    *(transfer.export, transfer.import_, transfer.push, transfer.pull, transfer.merge),
    *(train.train, train.average, train.runs),
    *(search.search, search.picture, search.study),
)
RENAMED = {  # former spelling -> what to write now
    "search --budget": "--max-parameters",
    "search --draw-seed": "--seed",
    "search --picture": "`zoo picture FILE`",
    "search --samples": "`zoo picture FILE --samples`",
    "search --register": "`zoo study --save NAME`",
    **dict.fromkeys((f"search --{flag}" for flag in ("study", "optuna", "journal", "best")), "`zoo study`"),
    **dict.fromkeys((f"search --{flag}" for flag in ("recipe", "corpus", "train", "valid")), "`zoo study`"),
    "train --name": "`zoo train NAME`",
    "import --name": "--save",
    "pull --name": "--save",
    "verify --partition": "--valid",
}

app = make_app("zoo", "Make and keep trained frame classifiers: train, search, register, verify.", COMMANDS)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process, and return its exit code."""
    return run_app(app, arguments, renamed=RENAMED)


def main() -> None:
    """Entry point of the command."""
    sys.exit(run())
