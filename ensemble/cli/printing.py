"""Figures as a command shows them, where there may be none: for programs, and for people."""

from __future__ import annotations

import math
from typing import Any

from zoo import _console


def print_json(data: Any) -> None:
    """One JSON document on stdout; what is not a finite number becomes null."""
    _console.print_json(_plain(data))


def interval(low: float, high: float) -> str:
    """The ends of an interval, or that there is none.

    Example:
        >>> interval(-0.01, 0.02), interval(math.nan, math.nan)
        ('-0.0100 .. +0.0200', 'no interval')
    """
    return "no interval" if math.isnan(low) else f"{low:+.4f} .. {high:+.4f}"


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
