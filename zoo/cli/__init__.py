"""The command `zoo`: keep and breed single models."""

from __future__ import annotations

import sys

from cyclopts import App

from zoo._console import run_app
from zoo.cli import breeding, keeping, looking, moving

app = App(name="zoo", help="Keep a zoo of trained frame classifiers: register, verify, train, search.")
looking.add_to(app)
keeping.add_to(app)
moving.add_to(app)
breeding.add_to(app)


def main() -> None:
    """Entry point of the command."""
    sys.exit(run_app(app))
