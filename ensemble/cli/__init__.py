"""The command `ensemble`: combine members, and judge whether the combination is better."""

from __future__ import annotations

import sys

from cyclopts import App

from ensemble.cli import choosing, predicting, verdicts
from zoo import _console, _names

app = App(
    name="ensemble",
    help="Run trained models as one, combine them, and judge whether it is really better.",
    version=_names.own_version,
)
verdicts.add_to(app)
choosing.add_to(app)
predicting.add_to(app)


def main() -> None:
    """Entry point of the command."""
    sys.exit(_console.run_app(app))
