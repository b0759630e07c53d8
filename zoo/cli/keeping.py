"""Commands that keep models: list, show, register, verify."""

from __future__ import annotations

from cyclopts import App


def add_to(app: App) -> None:
    """Add these commands to `app`."""
