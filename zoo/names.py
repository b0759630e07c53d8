"""Names: selecting them by shell wildcards, and helping somebody who mistyped one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

Patterns = str | Iterable[str]


def matching(names: Iterable[str], include: Patterns = "*", exclude: Patterns = ()) -> list[str]:
    """The names that any `include` pattern matches and no `exclude` pattern does, in their order.

    Patterns are shell wildcards (`*`, `?`, `[abc]`), case counts, a string stands for one pattern.

    Example:
        >>> matching(["diamond", "cylinder", "mlp"], include=["*d*"], exclude="cyl*")
        ['diamond']
    """
    wanted, unwanted = _as_list(include), _as_list(exclude)
    return [name for name in names if _any(name, wanted) and not _any(name, unwanted)]


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest names first, else all of them.

    Example:
        >>> unknown("architecture", "cylindr", ["cylinder", "mlp"])
        "unknown architecture 'cylindr'; did you mean 'cylinder'?"
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"unknown {what} {name!r}; did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {what} {name!r}; expected one of {', '.join(known) or '(there are none)'}"


def _as_list(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _any(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
