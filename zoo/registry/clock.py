"""The time as the registry writes it."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """The present in UTC, to the second.

    Example:
        >>> len(now()), now()[-1]
        (20, 'Z')
    """
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
