"""Two registries that grew from one, merged: what git asks for when both sides added models.

A version, an ensemble, an alias that only one side changed is taken from that side; both sides' changes of
one thing are taken together where they touch different fields, and are a conflict where they do not. What of an
ensemble was made for one another, its members, rule and numbers, is one field. Versions that both sides gave one
number are renumbered on theirs, in the order in which they were made; ids stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo import _files
from zoo._json import parse_strictly
from zoo.registry import protocol
from zoo.registry.changes import last_number
from zoo.registry.document import Document, extensions, parse, write
from zoo.registry.references import RegistryError

Fields = Mapping[str, Any]
_NOWHERE: Fields = {}
_FITTED = ("members", "rule", "weights", "temperatures", "classes", "fitted_on")
_AS_ONE = "fitted"  # no field of an ensemble has this name


def merge(base: Document, ours: Document, theirs: Document) -> Document:
    """The registry that holds both sides' changes since `base`.

    Raises:
        RegistryError: CONFLICT, naming everything that both sides changed differently; DANGLING where one side
            removed what the other points to.
    """
    conflicts: list[str] = []
    names = sorted({*base.models, *ours.models, *theirs.models})
    models, moved = {}, {}
    for name in names:
        sides = (_versions(base, name), _versions(ours, name), _versions(theirs, name))
        models[name], moved[name] = _model(name, sides, conflicts)
    ensembles = _ensembles([side.ensembles for side in (base, ours, theirs)], conflicts)
    renumbered = {name: _renumber(fields, moved) for name, fields in theirs.aliases.items()}
    aliases = _section("alias", base.aliases, ours.aliases, renumbered, conflicts, whole=True)
    extensions = _texts([side.extensions for side in (base, ours, theirs)], conflicts)
    if conflicts:
        raise RegistryError("CONFLICT", f"both sides changed {'; '.join(conflicts)}: decide there, then merge again")
    merged = Document(models, ensembles, aliases, extensions)
    return parse(write(merged))  # refuses what now points to nothing, and names taken twice


def _model(
    name: str, sides: tuple[Fields, Fields, Fields], conflicts: list[str]
) -> tuple[dict[str, Any], dict[int, int]]:
    """One model merged, and which of their numbers became which."""
    base, ours, theirs = sides
    plain = [{key: _without(fields, "n") for key, fields in side["versions"].items()} for side in sides]
    merged = _section(f"version of {name!r}", plain[0], plain[1], plain[2], conflicts)
    known = {**base["versions"], **ours["versions"]}
    numbers = {key: known[key]["n"] for key in merged if key in known}
    last = max(last_number(base), last_number(ours))
    for key in sorted(merged.keys() - numbers.keys(), key=lambda key: int(theirs["versions"][key]["n"])):
        last = numbers[key] = max(theirs["versions"][key]["n"], last + 1)
    moved = {fields["n"]: numbers[key] for key, fields in theirs["versions"].items() if key in numbers}
    last = max(last, last_number(theirs))  # also where theirs gave a version we have another number
    kept = [extensions(side) for side in sides]
    model = _section(f"key of {name!r}", kept[0], kept[1], kept[2], conflicts, whole=True)
    model["versions"] = {key: {**fields, "n": numbers[key]} for key, fields in merged.items()}
    return {**model, **({"last": last} if last > max(numbers.values(), default=0) else {})}, moved


def _texts(sides: Sequence[Mapping[str, str]], conflicts: list[str]) -> dict[str, str]:
    """What others keep at the top, merged by what it says; each as it stands on the side that it comes from."""
    base, ours, theirs = ({key: parse_strictly(text) for key, text in side.items()} for side in sides)
    merged = _section("key", base, ours, theirs, conflicts, whole=True)
    return {key: sides[1 if ours.get(key) == value else 2][key] for key, value in merged.items()}


def _ensembles(sides: Sequence[Mapping[str, Fields]], conflicts: list[str]) -> dict[str, Any]:
    """Ensembles merged; members, rule, weights, temperatures and classes come from one side."""
    base, ours, theirs = ({name: _bound(fields) for name, fields in side.items()} for side in sides)
    merged = _section("ensemble", base, ours, theirs, conflicts)
    return {name: {**_without(fields, _AS_ONE), **fields[_AS_ONE]} for name, fields in merged.items()}


def _bound(fields: Fields) -> dict[str, Any]:
    fitted = {key: fields[key] for key in _FITTED if key in fields}
    return {**_without(fields, *_FITTED), _AS_ONE: fitted}


def _section(
    what: str,
    base: Mapping[str, Any],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    conflicts: list[str],
    *,
    whole: bool = False,
) -> dict[str, Any]:
    """Three-way merge by key; `whole` things are not merged field by field."""
    merged = {}
    for key in sorted({*base, *ours, *theirs}):
        sides = base.get(key), ours.get(key), theirs.get(key)
        chosen = _choose(*sides, inner=None if whole else _fields)
        if chosen is _CONFLICT:
            conflicts.append(f"the {what} {key!r}")
        elif chosen is not None:
            merged[key] = chosen
    return merged


_CONFLICT: Any = object()


def _choose(base: Any, ours: Any, theirs: Any, inner: Callable[[Any, Any, Any], Any] | None) -> Any:
    """The side that changed; None is "not there"."""
    if ours == theirs or theirs == base:
        return ours
    if ours == base:
        return theirs
    if inner is None or ours is None or theirs is None:
        return _CONFLICT
    return inner(base or _NOWHERE, ours, theirs)


def _fields(base: Fields, ours: Fields, theirs: Fields) -> Any:
    """One thing's fields; the same thing made twice was made when it was first made."""
    merged = {}
    for key in {*base, *ours, *theirs}:
        chosen = _choose(base.get(key), ours.get(key), theirs.get(key), inner=None)
        if chosen is _CONFLICT and key == "created":
            chosen = min(ours[key], theirs[key])
        if chosen is _CONFLICT:
            return _CONFLICT
        if chosen is not None:
            merged[key] = chosen
    return merged


def _versions(document: Document, name: str) -> Fields:
    return document.models.get(name, {"versions": {}})


def _without(fields: Fields, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in keys}


def _renumber(alias: Fields, moved: Mapping[str, Mapping[int, int]]) -> dict[str, Any]:
    def place(fields: Fields) -> dict[str, Any]:
        if "model" not in fields:
            return dict(fields)
        number = moved.get(fields["model"], {}).get(fields["version"], fields["version"])
        return {**fields, "version": number}

    changed = place(alias)
    if "before" in alias:
        changed["before"] = [place(fields) for fields in alias["before"]]
    return changed


def merge_files(base: Path, ours: Path, theirs: Path) -> None:
    """Merge three files and put the result in place of `ours`; an empty base stands for no registry.

    Raises:
        RegistryError: as `merge`, and where a text is refused; nothing is then written.
    """
    raw = protocol.read_raw(base, create=False) or b""
    before = parse(raw) if raw.strip() else Document()
    sides = [protocol.read_document(path) for path in (ours, theirs)]
    text = write(merge(before, *sides))
    try:
        _files.write(ours, text)
    except OSError as error:
        raise RegistryError("DISK", f"cannot write {ours}: {error}") from error
