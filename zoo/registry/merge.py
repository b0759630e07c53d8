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
from msgspec import UNSET

from zoo import _files
from zoo.registry.text import parse, write
from zoo.registry.transaction import read_bytes, read_snapshot
from zoo.registry.types import (
    NO_MODEL,
    AliasRecord,
    EnsembleRecord,
    ModelRecord,
    R,
    RegistryError,
    Snapshot,
    Target,
    VersionRecord,
)

Fields = Mapping[str, Any]
_FITTED = ("members", "rule", "weights", "temperatures", "classes", "fitted_on")
_AS_ONE = "fitted"  # no field of an ensemble has this name
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
    ensembles = [{name: _as_one(record) for name, record in side.ensembles.items()} for side in sides]
    aliases = [dict(side.pointers) for side in sides]
    aliases[2] = {name: _renumbered(alias, moved) for name, alias in theirs.pointers.items()}
    meanings = [{key: msgspec.json.decode(raw) for key, raw in side.extensions.items()} for side in sides]
    kept = _section("key", meanings, conflicts, whole=True)
    merged = Snapshot(
        models,
        {n: _record(EnsembleRecord, f | f[_AS_ONE]) for n, f in _section("ensemble", ensembles, conflicts).items()},
        _section("alias", aliases, conflicts, whole=True),
        {k: (ours if meanings[1].get(k) == value else theirs).extensions[k] for k, value in kept.items()},
    )
    if conflicts:
        raise RegistryError("CONFLICT", f"both sides changed {'; '.join(conflicts)}: decide there, then merge again")
    return parse(write(merged))  # refuses what now points to nothing, and names taken twice


def _model(name: str, sides: Sequence[ModelRecord], conflicts: list[str]) -> tuple[ModelRecord, dict[int, int]]:
    """One model merged, and their numbers -> the numbers that their versions have now."""
    base, ours, theirs = sides
    lines = [{id: _fields(one, "n") for id, one in side.versions.items()} for side in sides]
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
        versions={id: _record(VersionRecord, {**fields, "n": numbers[id]}) for id, fields in merged.items()},
        extensions=_section(f"key of {name!r}", extensions, conflicts, whole=True) or UNSET,
    )
    return model, moved


def _section(
    what: str, sides: Sequence[Mapping[str, Any]], conflicts: list[str], *, whole: bool = False
) -> dict[str, Any]:
    """Three-way merge by key; `whole` things are not merged field by field."""
    merged = {}
    for key in sorted({key for side in sides for key in side}):
        base, ours, theirs = (side.get(key) for side in sides)
        chosen = _choose(base, ours, theirs)
        if chosen is _CONFLICT and not whole and ours is not None and theirs is not None:
            chosen = _choose_fields(base or {}, ours, theirs)
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


def _choose_fields(base: Fields, ours: Fields, theirs: Fields) -> Any:
    """One thing's fields; the same thing made twice was made when it was first made."""
    merged = {}
    for key in {*base, *ours, *theirs}:
        chosen = _choose(base.get(key), ours.get(key), theirs.get(key))
        if chosen is _CONFLICT and key == "created":
            chosen = min(ours[key], theirs[key])
        if chosen is _CONFLICT:
            return _CONFLICT
        if chosen is not None:
            merged[key] = chosen
    return merged


def _fields(record: VersionRecord | EnsembleRecord, *omitted: str) -> dict[str, Any]:
    """The fields that a record has, by name, keys that begin with `x-` among them, and none of the omitted ones."""
    found = {key: getattr(record, key) for key in record.__struct_fields__ if key not in omitted}
    found |= found.pop("extensions") or {}
    return {key: value for key, value in found.items() if value is not UNSET}


def _record(kind: type[R], fields: Fields) -> R:
    """The record that has these fields."""
    own = {key: fields[key] for key in kind.__struct_fields__ if key in fields}
    extensions = {key: value for key, value in fields.items() if key.startswith("x-")}
    return kind(**own, extensions=extensions or UNSET)


def _as_one(ensemble: EnsembleRecord) -> dict[str, Any]:
    """An ensemble's fields, those that were fitted together as one."""
    apart = _fields(ensemble, *_FITTED)
    return {**apart, _AS_ONE: {key: value for key, value in _fields(ensemble).items() if key not in apart}}


def _renumbered(alias: AliasRecord, moved: Mapping[str, Mapping[int, int]]) -> AliasRecord:
    """Their alias, with the numbers that their versions now have."""

    def renumbered(target: Target) -> Target:
        if target.model is UNSET or target.version is UNSET:
            return target
        return msgspec.structs.replace(target, version=moved.get(target.model, {}).get(target.version, target.version))

    changed = alias.moved(renumbered(alias.target), map(renumbered, alias.before or ()))
    return alias if (alias.target, alias.before or ()) == (changed.target, changed.before) else changed


def merge_files(base: Path, ours: Path, theirs: Path) -> None:
    """Merge three files and put the result in place of `ours`; an empty base stands for no registry.

    Raises:
        RegistryError: as `merge`, and where a text is refused; nothing is then written.
    """
    raw = read_bytes(base) or b""
    before = parse(raw) if raw.strip() else Snapshot()
    text = write(merge(before, read_snapshot(ours), read_snapshot(theirs)))
    try:
        _files.write(ours, text)
    except OSError as error:
        raise RegistryError("DISK", f"cannot write {ours}: {error}") from error
