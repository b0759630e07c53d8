"""What people say of models, checked and as it is kept: metrics, tags, lists of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from zoo.registry.references import RegistryError

if TYPE_CHECKING:
    from zoo.registry.entries import Entry

_METRIC = {"value": float, "unit": str, "n": int, "frames": str}


@dataclass(frozen=True)
class Notes:
    """What is to be said of a version from now on; what is None or empty stays.

    Args:
        note: in place of its note; "" takes it off.
        tags: in place of its tags.
        add: tags to put on.
        drop: tags to take off.
        metrics: to add, or in place of those of the same name.
    """

    note: str | None = None
    tags: Sequence[str] | None = None
    add: Sequence[str] = ()
    drop: Sequence[str] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def fields(self, entry: Entry) -> dict[str, Any]:
        """The fields of a version that change by it."""
        found: dict[str, Any] = {} if self.note is None else {"note": self.note}
        if self.tags is not None or self.add or self.drop:
            found["tags"] = sorted({*(entry.tags if self.tags is None else self.tags), *self.add}.difference(self.drop))
        if self.metrics:
            found["metrics"] = {**entry.metrics, **self.metrics}
        return found


def texts_of(what: str, given: Iterable[str]) -> list[str]:
    """A list of texts, as tags, classes, parents and members are; a single one would become its letters.

    Raises:
        RegistryError: ARGUMENT: a single string, or what is no collection of strings.
    """
    texts = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise RegistryError("ARGUMENT", f"expected {what} as a list of strings, got {str(given)[:80]!r}")
    return [*map(str, texts)]


def tags_of(given: Iterable[str]) -> list[str]:
    """Tags as they are kept: sorted, each once; RegistryError as of `texts_of`."""
    return sorted({*texts_of("tags", given)})


def metrics_of(given: Mapping[str, Any] | None) -> dict[str, dict[str, Any]] | None:
    """Metrics as they are kept: a bare number becomes `{"value": number}`, None stays.

    Raises:
        RegistryError: ARGUMENT: no mapping, not a finite number, or an unknown field.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RegistryError("ARGUMENT", f"expected metrics as name -> number, got {str(given)[:80]!r}")
    return {str(key): _metric(str(key), value) for key, value in given.items()}


def _metric(key: str, value: Any) -> dict[str, Any]:
    fields = dict(value) if isinstance(value, Mapping) else {"value": value}
    try:
        number = float(fields["value"])
    except (KeyError, TypeError, ValueError):
        number = float("nan")
    fields["value"] = number
    if not isfinite(number) or any(_METRIC.get(name) is not type(field) for name, field in fields.items()):
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in _METRIC.items())
        msg = f"expected metric {key!r} as a finite number, or with the fields {expected}, got {str(value)[:80]}"
        raise RegistryError("ARGUMENT", msg)
    return fields


def json_of(given: Any) -> Mapping[str, Any]:
    """What an object's `to_json()` says.

    Raises:
        RegistryError: ARGUMENT: it has none.
    """
    if not callable(getattr(given, "to_json", None)):
        raise RegistryError("ARGUMENT", f"expected plain data or an object with to_json(), got {str(given)[:80]!r}")
    found: Mapping[str, Any] = given.to_json()
    return found
