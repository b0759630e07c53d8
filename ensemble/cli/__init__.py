"""The command `ensemble`: combine trained models, and judge whether the combination is better."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ensemble.cli import evaluate, fit, predict, select
from zoo._console import make_app, run_app

COMMANDS = (
    *(evaluate.evaluate, evaluate.compare),
    fit.fit,
    *(select.select, select.diversity),
    *(predict.predict, predict.collect, predict.plan),
)
RENAMED = {"predict --partition": "--test"}  # former spelling -> what to write now

app = make_app("ensemble", "Run trained models as one, combine them, and judge whether it is really better.", COMMANDS)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process, and return its exit code."""
    return run_app(app, arguments, renamed=RENAMED)


def main() -> None:
    """Entry point of the command."""
    sys.exit(run())
