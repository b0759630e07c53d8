"""What this program is: its version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Of the distribution that both packages belong to; "source" where it is run from a folder."""
    try:
        return version("zoo-ensemble")
    except PackageNotFoundError:
        return "source"
