"""The command `ensemble`: combine members, and judge whether the combination is better."""

from __future__ import annotations

import sys

from cyclopts import App

import zoo
from ensemble.cli import choosing, predicting, verdicts

app = App(name="ensemble", help="Run trained models as one, combine them, and judge whether it is really better.")
verdicts.add_to(app)
choosing.add_to(app)
predicting.add_to(app)


def main() -> None:
    """Entry point of the command."""
    sys.exit(zoo.run_app(app))
