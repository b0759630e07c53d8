"""`Layered`: a table with a few entries more, which shares all the others with the table it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MOST = 100  # entries added before all are copied


class Layered(Mapping[str, Any]):
    """Entries over a base that nobody writes to; a thousand changes do not copy a thousand entries each.

    Args:
        added: entries that hide those of the base.
        base: all others.

    Example:
        >>> table = added({"a": 1}, "b", 2)
        >>> table["a"], table["b"], "c" in table, plain(table)
        (1, 2, False, {'a': 1, 'b': 2})
    """

    __slots__ = ("added", "base")

    def __init__(self, added: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self.added = added
        self.base = base

    def __getitem__(self, key: str) -> Any:
        return self.added[key] if key in self.added else self.base[key]

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        return self.added[key] if key in self.added else self.base.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self.added or key in self.base

    def __iter__(self) -> Iterator[str]:
        return iter(plain(self))

    def __len__(self) -> int:
        return len(plain(self))


def added(table: Mapping[str, Any], key: str, value: Any) -> Mapping[str, Any]:
    """With one entry more, or replaced; all are copied once in a hundred times."""
    if not isinstance(table, Layered):
        return Layered({key: value}, table)
    if len(table.added) < _MOST:
        return Layered({**table.added, key: value}, table.base)
    return {**plain(table), key: value}


def plain(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same entries in one dict."""
    return {**table.base, **table.added} if isinstance(table, Layered) else table
