"""Two registries that grew from one, merged: what git asks for when both sides added models.

A version, an ensemble, an alias that only one side changed is taken from that side; both sides' changes of
one thing are taken together where they touch different fields, and are a conflict where they do not. The parts of an
ensemble that were made for one another, its members, rule and numbers, count as one field. Where both sides gave one
number to different versions, theirs are renumbered in the order in which they were made; ids do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from zoo import _files
from zoo.registry.text import parse, record, write
from zoo.registry.transaction import disk_errors, read_bytes, read_snapshot
from zoo.registry.types import (
    NO_MODEL,
    AliasRecord,
    EnsembleRecord,
    ModelRecord,
    RegistryError,
    Snapshot,
    Target,
    VersionRecord,
    encoded,
)

_FITTED = ("members", "rule", "weights", "temperatures", "classes", "fitted_on")
_AS_ONE = "fitted"  # no record has a field of this name
_CONFLICT: Any = object()


def merge(base: Snapshot, ours: Snapshot, theirs: Snapshot) -> Snapshot:
    """The registry that holds both sides' changes since `base`.

    Raises:
        RegistryError: CONFLICT, naming everything that both sides changed differently; DANGLING where one side
            removed what the other points to.
    """
    conflicts: list[str] = []
    sides = (base, ours, theirs)
    models, moved = {}, {}
    for name in sorted({*base.models, *ours.models, *theirs.models}):
        models[name], moved[name] = _model(name, [side.models.get(name, NO_MODEL) for side in sides], conflicts)
    followed = {name: _renumbered(alias, moved) for name, alias in theirs.pointers.items()}
    meanings = [{key: msgspec.json.decode(raw) for key, raw in side.extensions.items()} for side in sides]
    kept = _section("key", meanings, conflicts)
    merged = Snapshot(
        models,
        _section("ensemble", [side.ensembles for side in sides], conflicts),
        _section("alias", [base.pointers, ours.pointers, followed], conflicts),
        {k: (ours if meanings[1].get(k) == value else theirs).extensions[k] for k, value in kept.items()},
    )
    if conflicts:
        raise RegistryError("CONFLICT", f"both sides changed {'; '.join(conflicts)}: decide there, then merge again")
    return parse(write(merged))  # refuses what now points to nothing, and names taken twice


def _model(name: str, sides: Sequence[ModelRecord], conflicts: list[str]) -> tuple[ModelRecord, dict[int, int]]:
    """One model merged, and their numbers -> the numbers that their versions have now."""
    base, ours, theirs = sides
    replace = msgspec.structs.replace
    lines = [{id: replace(one, n=1) for id, one in side.versions.items()} for side in sides]  # numbers come after
    merged = _section(f"version of {name!r}", lines, conflicts)
    known = {**base.versions, **ours.versions}
    numbers = {id: known[id].n for id in merged if id in known}
    last = max(base.last_number, ours.last_number)
    for id in sorted(merged.keys() - numbers.keys(), key=lambda id: theirs.versions[id].n):
        last = numbers[id] = max(theirs.versions[id].n, last + 1)
    moved = {one.n: numbers[id] for id, one in theirs.versions.items() if id in numbers}
    last = max(last, theirs.last_number)  # also where theirs gave a version we have another number
    extensions = [{} if side.extensions is UNSET else side.extensions for side in sides]
    model = ModelRecord(
        last=last if last > max(numbers.values(), default=0) else UNSET,
        versions={id: replace(one, n=numbers[id]) for id, one in merged.items()},
        extensions=_section(f"key of {name!r}", extensions, conflicts) or UNSET,
    )
    return model, moved


def _section(what: str, sides: Sequence[Mapping[str, Any]], conflicts: list[str]) -> dict[str, Any]:
    """Three-way merge by key; versions and ensembles that both sides changed are merged field by field."""
    merged = {}
    for key in sorted({key for side in sides for key in side}):
        base, ours, theirs = (side.get(key) for side in sides)
        chosen = _choose(base, ours, theirs)
        if chosen is _CONFLICT and isinstance(ours, VersionRecord | EnsembleRecord) and theirs is not None:
            chosen = _choose_fields(base, ours, theirs)
        if chosen is _CONFLICT:
            conflicts.append(f"the {what} {key!r}")
        elif chosen is not None:
            merged[key] = chosen
    return merged


def _choose(base: Any, ours: Any, theirs: Any) -> Any:
    """The side that changed; None is "not there"."""
    if ours == theirs or theirs == base:
        return ours
    return theirs if ours == base else _CONFLICT


def _choose_fields(*records: VersionRecord | EnsembleRecord | None) -> Any:
    """One record from the fields of three; the same thing made twice was made when it was first made."""
    base, ours, theirs = map(_fields, records)
    merged: dict[str, Any] = {}
    for key in {*base, *ours, *theirs}:
        chosen = _choose(base.get(key), ours.get(key), theirs.get(key))
        if chosen is _CONFLICT and key == "created":
            chosen = min(ours[key], theirs[key], key=bytes)
        if chosen is _CONFLICT:
            return _CONFLICT
        if chosen is not None:
            merged[key] = chosen
    fields = msgspec.json.decode(msgspec.json.encode(merged | merged.pop(_AS_ONE)))
    return record(VersionRecord if "blob" in fields else EnsembleRecord, "what both sides changed", fields)


def _fields(record: VersionRecord | EnsembleRecord | None) -> dict[str, Any]:
    """The text of each field that a record has; those that were fitted together count as one."""
    found: dict[str, Any] = {} if record is None else msgspec.json.decode(encoded(record), type=dict[str, Raw])
    fitted = {key: found.pop(key) for key in _FITTED if key in found}
    return {**found, _AS_ONE: fitted}


def _renumbered(alias: AliasRecord, moved: Mapping[Any, Mapping[Any, int]]) -> AliasRecord:
    """Their alias, with the numbers that their versions now have."""

    def version(of: AliasRecord | Target) -> Any:
        return moved.get(of.model, {}).get(of.version, of.version)

    before = alias.before and tuple(msgspec.structs.replace(one, version=version(one)) for one in alias.before)
    return msgspec.structs.replace(alias, version=version(alias), before=before)


def merge_files(base: Path, ours: Path, theirs: Path) -> None:
    """Merge three files and put the result in place of `ours`; an empty base stands for no registry.

    Raises:
        RegistryError: as `merge`, and where a text is refused; nothing is then written.
    """
    raw = read_bytes(base) or b""
    before = parse(raw) if raw.strip() else Snapshot()
    text = write(merge(before, read_snapshot(ours), read_snapshot(theirs)))
    with disk_errors(f"cannot write {ours}"):
        _files.write(ours, text)
