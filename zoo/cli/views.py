"""Commands that show what a registry holds and change nothing: list, show, diff."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import zoo
from zoo._console import Answer, Table
from zoo.cli.options import RegistryFile


def list_(*names: str, registry: RegistryFile = None) -> Answer:
    """List models with their versions and metrics, and ensembles.

    Example: zoo list 'cyl*'

    Args:
        names: names or wildcards; everything if left out.
    """
    home = zoo.Registry(registry)
    now = home.snapshot()
    entries, aliases = now.entries(names or "*"), now.aliases()
    ensembles = [now.get_ensemble(name) for name in now.list_ensembles(names or "*")]
    metrics = sorted({name for entry in entries for name in entry.metrics})
    rows = [version_row(entry, metrics, aliases) for entry in entries]
    combined = [
        {
            "name": entry.name,
            "rule": str(entry.rule.get("rule", "")),
            "members": " ".join(now.get(member).reference for member in entry.members),
            "created": entry.created,
        }
        for entry in ensembles
    ]
    shown: list[Table | str] = [
        Table(rows, formats={"parameters": ",", **dict.fromkeys(metrics, ".4f")}),
        Table(combined, title="\nensembles" if rows else "ensembles"),
    ]
    if not rows and not combined:
        shown = [f"nothing matches {' '.join(names) or '*'} in {home.path}"]
    data = {
        "models": [entry.to_json() for entry in entries],
        "ensembles": [entry.to_json() for entry in ensembles],
        "aliases": aliases,
    }
    return Answer(data, shown)


def show(reference: str, /, *, registry: RegistryFile = None) -> Answer:
    """Show everything recorded about a version or an ensemble.

    Example: zoo show cylinder-a@2

    Args:
        reference: NAME, NAME@NUMBER, NAME@ID, an alias, or an ensemble.
    """
    now = zoo.Registry(registry).snapshot()
    try:
        return described(now.get_ensemble(reference))
    except zoo.RegistryError:  # not an ensemble
        return described(now.get(reference))


def diff(first: str, second: str, /, *, registry: RegistryFile = None) -> Answer:
    """Compare two versions: their fields, their metrics, and each tensor that differs; exit code 1 if they differ.

    Example: zoo diff cylinder-a@1 cylinder-a@2

    Args:
        first: a version.
        second: another version.
    """
    found = zoo.Registry(registry).diff(first, second)
    names = found["first"], found["second"]
    pairs = [
        {"part": part, "field": field, names[0]: as_text(values[0]), names[1]: as_text(values[1])}
        for part in ("about", "spec", "recipe", "classes", "metrics")
        for field, values in found[part].items()
    ]
    tensors = [{**row, "first": as_text(row["first"]), "second": as_text(row["second"])} for row in found["tensors"]]
    if not pairs and not tensors:
        return Answer(found, [f"{names[0]} and {names[1]} are equal"])
    return Answer(found, [Table(pairs), Table(tensors)], code=1)


def version_row(entry: zoo.Entry, metrics: Sequence[str] = (), aliases: dict[str, str] | None = None) -> dict[str, Any]:
    """A version as a row of a table, with these of its metrics."""
    return {
        "name": entry.name,
        "number": entry.number,
        "id": entry.id,
        "architecture": entry.architecture,
        "parameters": entry.parameters,
        **{name: entry.metrics.get(name, {}).get("value") for name in metrics},
        "created": entry.created,
        "aliases": " ".join(name for name, target in (aliases or {}).items() if target == entry.reference),
        "tags": " ".join(entry.tags),
    }


def described(entry: zoo.Entry | zoo.EnsembleEntry) -> Answer:
    """Everything in an entry, one row for each field, nested fields by dotted names."""
    rows = []
    for key, value in entry.to_json().items():
        nested = value if isinstance(value, dict) and value else {}
        pairs = [(f"{key}.{name}", item) for name, item in nested.items()] or [(key, value)]
        rows += [{"field": name, "value": as_text(item)} for name, item in pairs]
    return Answer(entry.to_json(), [Table(rows)])


def as_text(value: Any) -> str:
    """A value in a cell: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
