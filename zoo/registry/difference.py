"""How two versions differ: what was asked for, what came out, and which weights moved by how much."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.registry import reading
from zoo.registry.blobs import Blobs
from zoo.registry.entries import Entry

_TOLD = ("kind", "trained_on", "parents", "note", "tags", "software")


def difference(blobs: Blobs, first: Entry, second: Entry) -> dict[str, Any]:
    """What differs between two versions; a part that is equal is empty.

    Returns:
        `about`, `spec`, `recipe`: name -> [first, second], flat; `classes`: likewise, or empty; `metrics`:
        name -> [first, second, second - first], None where unknown; `tensors`: one row for each that
        differs, with `name`, both shapes, and where these agree the largest and the relative change,
        |a - b| / |a| in Euclidean norm.
    """
    a, b = (reading.tensors(entry, blobs.read(entry)) for entry in (first, second))
    about = _changed({key: first.fields.get(key) for key in _TOLD}, {key: second.fields.get(key) for key in _TOLD})
    specs = [{**spec, **spec["options"], "options": None} for spec in map(_spec, (first, second))]
    return {
        "first": first.reference,
        "second": second.reference,
        "about": about,
        "spec": _changed(*specs),
        "recipe": _changed(first.recipe or {}, second.recipe or {}),
        "classes": _changed({"classes": list(first.classes)}, {"classes": list(second.classes)}),
        "metrics": _metrics(first, second),
        "tensors": [row for name in sorted({*a, *b}) for row in _row(name, a.get(name), b.get(name))],
    }


def _spec(entry: Entry) -> dict[str, Any]:
    """With the options that have come since, where this program knows them."""
    return entry.spec.to_dict() if reading.known(entry) else dict(entry.fields["spec"])


def _changed(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


def _metrics(first: Entry, second: Entry) -> dict[str, list[float | None]]:
    values = [{name: float(metric["value"]) for name, metric in entry.metrics.items()} for entry in (first, second)]
    told: dict[str, list[float | None]] = {}
    for name in sorted({*values[0], *values[1]}):
        a, b = values[0].get(name), values[1].get(name)
        if a != b:
            told[name] = [a, b, None if a is None or b is None else b - a]
    return told


def _row(name: str, a: Tensor | None, b: Tensor | None) -> list[dict[str, Any]]:
    if a is not None and b is not None and a.shape == b.shape and torch.equal(a, b):
        return []
    shapes = {"first": _shape(a), "second": _shape(b)}
    if a is None or b is None or a.shape != b.shape:
        return [{"name": name, **shapes, "largest": None, "relative": None}]
    moved, scale = (a.double() - b.double()), float(a.double().norm())
    relative = float(moved.norm()) / scale if scale else None
    return [{"name": name, **shapes, "largest": float(moved.abs().max()), "relative": relative}]


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
