"""Commands that breed models: train, search, average."""

from __future__ import annotations

from cyclopts import App


def add_to(app: App) -> None:
    """Add these commands to `app`."""
