"""Canonical JSON: one text per value, and a reader that accepts nothing ambiguous.

Python's own reader takes NaN, 1e400, repeated keys and lone surrogates, which other readers refuse or read in another
way; where two readers disagree about a file, the file can deceive one of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, Self

_LEAST, _MOST = -(2**63), 2**63 - 1
_SURE = 19  # a number of fewer characters fits 64 bits
_DEEPEST = 64
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class RefusalError(ValueError):
    """What is refused and why: `reason` says it in one word, `message` is the text without that word."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # as they were given, so that another process can hand it on
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]"

    def about(self, place: object, way_out: str = "") -> Self:
        """The same refusal, whose message begins with the file or the version that it is about."""
        return type(self)(self.reason, f"{place}: {self.message}{way_out}")


class TextError(RefusalError):
    """A text that is not strict JSON: SYNTAX, DEPTH, DUPLICATE_KEY, NUMBER_RANGE, NOT_INTEGER, SURROGATE."""

    def __str__(self) -> str:
        return self.message  # which becomes a part of other messages


def canonical(value: Any) -> str:
    """The one text of plain data: keys sorted, no spaces, no line breaks; NaN and infinity have none.

    Raises:
        ValueError: a number is not finite; half of a surrogate pair, which no file can hold.
        TypeError: not plain data.

    Example:
        >>> canonical({"b": [1, 2.5], "a": "é"})
        '{"a":"é","b":[1,2.5]}'
    """
    text = _ENCODER.encode(value)
    if half := None if text.isascii() else _SURROGATE.search(text):
        near = text[max(half.start() - 20, 0) : half.end() + 20]
        raise TextError("SURROGATE", f"expected text, got half of a surrogate pair in {near!r}")
    return text


def parse_strictly(text: str) -> Any:
    """The value of a JSON text, read strictly.

    Raises:
        TextError: not JSON, nested beyond the stack, a key twice in one object (escapes resolved), a number
            that no 64-bit integer or float holds.

    Example:
        >>> parse_strictly('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        zoo._json.TextError: the key 'a' appears twice in one object
    """
    return _read(text, _integer, _float)


def parse_integers(text: str) -> Any:
    """As `parse_strictly`; also refuses (NOT_INTEGER) floats, and -0, which some readers take for a float."""
    return _read(text, _whole, _no_float)


def _read(text: str, integer: Callable[[str], int], real: Callable[[str], float]) -> Any:
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=integer, parse_float=real, parse_constant=_float)
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        raise TextError("SYNTAX", f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise TextError("DEPTH", "nested too deep to be read") from None


def depth(value: Any, most: int = _DEEPEST) -> int:
    """How many levels of lists and objects a value has, counted up to `most` + 1.

    Example:
        >>> depth([{"a": []}]), depth(1)
        (3, 0)
    """
    level, count = [value], 0
    while count <= most:
        inner = [item for item in level if isinstance(item, dict | list)]
        if not inner:
            return count
        count += 1
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    return count


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which no UTF-8 file can."""
    return _SURROGATE.search(text) is not None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise TextError("DUPLICATE_KEY", f"the key {key!r} appears twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits) < _SURE:
        return int(digits)
    if len(digits) > 20 or not _LEAST <= int(digits) <= _MOST:
        raise TextError("NUMBER_RANGE", f"expected integers of 64 bits, got {digits[:24]}")
    return int(digits)


def _whole(digits: str) -> int:
    if digits == "-0":
        _no_float(digits)
    return _integer(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise TextError("NUMBER_RANGE", f"expected finite numbers, got {digits[:24]}")
    return value


def _no_float(digits: str) -> NoReturn:
    raise TextError("NOT_INTEGER", f"expected integers only, got {digits[:24]}")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
