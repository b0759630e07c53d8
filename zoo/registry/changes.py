"""Changes of a registry's content: from a document to another, no disk.

A change that is already made returns the very document it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zoo.registry.document import Document, extensions
from zoo.registry.entries import Entry, pinned, place, pointed, resolve
from zoo.registry.notes import Notes
from zoo.registry.references import RegistryError, check_name, is_id

Change = Callable[[Document], Document]
_MOST_REMEMBERED = 10
_NOTHING: tuple[Any, ...] = ("", [], {}, None)


def all_of(document: Document, collected: Iterable[Change]) -> Document:
    """One change after another."""
    for change in collected:
        document = change(document)
    return document


def add_version(document: Document, name: str, id: str, fields: Mapping[str, Any]) -> Document:
    """With a new version, numbered next; the same content again changes nothing.

    Raises:
        RegistryError: NAME, NAME_COLLISION; CLASSES where the same weights are there with other class names.
    """
    model = document.models.get(name)
    if model is None:
        _check_free(document, name)
        model = {"versions": {}}
    there = model["versions"].get(id)
    if there is not None:
        if there["classes"] != fields["classes"]:
            msg = f"{name!r} has these weights already, with the classes {there['classes']}, got {fields['classes']}"
            raise RegistryError("CLASSES", msg)
        return document
    number = 1 + last_number(model)
    versions = {**model["versions"], id: {"n": number, **fields}}
    return document.with_model(name, {**extensions(model), "versions": versions})


def point_to_blob(document: Document, name: str, id: str, fields: Mapping[str, Any]) -> Document:
    """With a version of the same content in another blob, whose fields those are."""
    blob = {key: fields[key] for key in ("blob", "bytes")}
    return change_version(document, resolve(document, f"{name}@{id}"), blob)


def change_version(document: Document, entry: Entry, fields: Mapping[str, Any]) -> Document:
    """With some fields of a version replaced; empty ones are dropped.

    Raises:
        RegistryError: UNKNOWN, where it was removed meanwhile.
    """
    now = resolve(document, f"{entry.name}@{entry.id}").fields
    merged = {key: value for key, value in {**now, **fields}.items() if key.startswith("x-") or value not in _NOTHING}
    if merged == now:
        return document
    model = document.models[entry.name]
    versions = {**model["versions"], entry.id: merged}
    return document.with_model(entry.name, {**model, "versions": versions})


def annotate(document: Document, entry: Entry, said: Notes) -> Document:
    """With more said of a version than is said now.

    Raises:
        RegistryError: UNKNOWN, where it was removed meanwhile.
    """
    now = resolve(document, f"{entry.name}@{entry.id}")
    return change_version(document, entry, said.fields(now))


def remove(document: Document, gone: Sequence[str], *, force: bool) -> Document:
    """Without what was pinned: an alias, an ensemble, or versions.

    Args:
        document: what there is.
        gone: as `entries.all_pinned` gives it.
        force: also without what holds it.

    Raises:
        RegistryError: UNKNOWN, where it was removed meanwhile; HELD, naming what holds it, unless `force`.
    """
    gone = _still(document, gone)
    held = holders(document, gone)
    if held and not force:
        what = gone if gone[0] in document.ensembles else [resolve(document, reference).reference for reference in gone]
        raise RegistryError("HELD", f"{', '.join(what)} is held by {', '.join(held)}; remove these first, or force")
    if gone[0] in document.aliases:
        return _without(document, "aliases", gone)
    if gone[0] in document.ensembles:
        return _without_lost_aliases(_without(document, "ensembles", gone))
    return _without_versions(document, [resolve(document, reference) for reference in gone])


def holders(document: Document, gone: Sequence[str]) -> list[str]:
    """The ensembles and aliases that point to what was pinned; nothing holds an alias."""
    gone = _still(document, gone)
    if gone[0] in document.aliases:
        return []
    found = [] if gone[0] in document.ensembles else [resolve(document, reference) for reference in gone]
    ids = {entry.id for entry in found}
    places: list[dict[str, Any]] = [{"model": entry.name, "version": entry.number} for entry in found]
    places.append({"ensemble": gone[0]})
    held = [f"the ensemble {name!r}" for name, fields in document.ensembles.items() if ids & set(fields["members"])]
    return held + [f"the alias {name!r}" for name, fields in document.aliases.items() if _target(fields) in places]


def _still(document: Document, gone: Sequence[str]) -> Sequence[str]:
    """Of what was pinned, what nobody has removed meanwhile; all of it where nothing is left, to be told."""
    places = {reference: reference.partition("@") for reference in gone}
    left = [
        reference
        for reference, (name, at, id) in places.items()
        if not at or id in document.models.get(name, {"versions": ()})["versions"]
    ]
    return left or gone


def add_ensemble(document: Document, name: str, fields: Mapping[str, Any]) -> Document:
    """With an ensemble; the same again changes nothing.

    Raises:
        RegistryError: NAME, NAME_COLLISION; EXISTS where another ensemble has the name; CLASSES where a member
            has other class names, or the same in another order.
    """
    there = document.ensembles.get(name)
    if there is None:
        _check_new(document, name)
    elif {**there, "created": ""} == {**fields, "created": ""}:
        return document
    else:
        raise RegistryError(
            "EXISTS", f"another ensemble has the name {name!r}; remove it first, or choose another name"
        )
    for member in fields["members"]:
        classes = list(resolve(document, member).classes)
        if classes != list(fields["classes"]):
            what = (
                f"the classes {fields['classes']} in this order, got {classes} of {resolve(document, member).reference}"
            )
            raise RegistryError("CLASSES", f"expected members of {name!r} with {what}")
    return replace(document, ensembles={**document.ensembles, name: fields})


def set_alias(document: Document, name: str, target: Mapping[str, Any], expected: Mapping[str, Any] | None) -> Document:
    """With an alias that points to `target` and remembers where it pointed before.

    Args:
        document: what there is.
        name: of the alias.
        target: `{"model", "version"}` or `{"ensemble"}`.
        expected: what it must point to now; an empty mapping where it must not exist yet; None: anything.

    Raises:
        RegistryError: NAME, NAME_COLLISION; CONFLICT where it does not point to what is expected.
    """
    there = document.aliases.get(name)
    if there is None:
        _check_new(document, name)
    now = _target(there) if there else {}
    _check_expected(name, now, expected)
    if now == target:
        return document
    before = [now, *there.get("before", [])][:_MOST_REMEMBERED] if there else []
    fields = {**extensions(there or {}), **target, "before": before}
    return replace(document, aliases={**document.aliases, name: fields})


def alias_back(document: Document, name: str, expected: Mapping[str, Any] | None = None) -> Document:
    """With an alias that points again to what it pointed to before.

    Raises:
        RegistryError: UNKNOWN: no such alias, or nothing before; CONFLICT as `set_alias`.
    """
    fields = document.aliases.get(name, {})
    _check_expected(name, _target(fields), expected)
    if not fields.get("before"):
        what = "it remembers nothing" if fields else f"it has {sorted(document.aliases)}"
        raise RegistryError("UNKNOWN", f"expected an alias {name!r} with something before; {what}")
    first, *rest = fields["before"]
    fields = {**extensions(fields), **first, "before": rest}
    return replace(document, aliases={**document.aliases, name: fields})


def move_alias(known: Document, name: str, target: str, expect: str | None) -> Change:
    """The change that `set_alias` makes, of references as they are known now.

    Raises:
        RegistryError: ARGUMENT for an empty target; UNKNOWN, NAME.
    """
    if not target:
        raise RegistryError("ARGUMENT", f"expected what the alias {name!r} shall point to, got nothing; see `remove`")
    to, wanted = pinned(known, target), _pinned(known, expect)
    return lambda document: set_alias(document, name, place(document, to), _place(document, wanted))


def move_alias_back(known: Document, name: str, expect: str | None) -> Change:
    """The change that `alias_back` makes, likewise."""
    wanted = _pinned(known, expect)
    return lambda document: alias_back(document, name, _place(document, wanted))


def _pinned(document: Document, expect: str | None) -> str | None:
    return None if expect is None else pinned(document, expect)


def _place(document: Document, wanted: str | None) -> dict[str, Any] | None:
    return None if wanted is None else place(document, wanted)


def _check_expected(name: str, now: Mapping[str, Any], expected: Mapping[str, Any] | None) -> None:
    if expected is not None and now != expected:
        msg = f"expected the alias {name!r} to point to {_told(expected)}, it points to {_told(now)}; it was not moved"
        raise RegistryError("CONFLICT", msg)


def _without_versions(document: Document, gone: Sequence[Entry]) -> Document:
    """Without versions and what holds them; their numbers are never used again."""
    models = dict(document.models)
    for entry in gone:
        model = models[entry.name]
        rest = {key: fields for key, fields in model["versions"].items() if key != entry.id}
        last = last_number(model)
        keep_last = last > max((fields["n"] for fields in rest.values()), default=0)
        models[entry.name] = {**extensions(model), "versions": rest, **({"last": last} if keep_last else {})}
    ids = {entry.id for entry in gone}
    broken = [name for name, fields in document.ensembles.items() if ids & set(fields["members"])]
    return _without_lost_aliases(_without(replace(document, models=models), "ensembles", broken))


def _without(document: Document, section: str, names: Sequence[str]) -> Document:
    rest = {name: fields for name, fields in getattr(document, section).items() if name not in names}
    return replace(document, **{section: rest})


def _without_lost_aliases(document: Document) -> Document:
    """Aliases and their memory, without what is no longer there."""

    def there(place: Mapping[str, Any]) -> bool:
        if "ensemble" in place:
            return place["ensemble"] in document.ensembles
        versions = document.models.get(place["model"], {"versions": {}})["versions"]
        return any(fields["n"] == place["version"] for fields in versions.values())

    aliases = {
        name: {**fields, "before": [place for place in fields.get("before", []) if there(place)]}
        for name, fields in document.aliases.items()
        if there(fields)
    }
    return replace(document, aliases=aliases)


def check_nameable(document: Document, name: str) -> None:
    """Refuse a name under which no version could be registered, as long as nothing is changed.

    Raises:
        RegistryError: NAME, also where it could be taken for a version's id; NAME_COLLISION.
    """
    if name not in document.models:
        _check_new(document, name)


def _check_new(document: Document, name: str) -> None:
    if is_id(name):
        msg = f"expected a name, got {name!r}, which has the form of a version's id; choose another"
        raise RegistryError("NAME", msg)
    _check_free(document, name)


def _check_free(document: Document, name: str) -> None:
    """Refuse a name that cannot be or that is taken."""
    check_name(name)
    other = document.folded.get(name.casefold())
    if other is not None:
        msg = f"the name {name!r} is taken by {other!r}; models, ensembles and aliases share one name space"
        raise RegistryError("NAME_COLLISION", msg)


def last_number(model: Mapping[str, Any]) -> int:
    """The highest number that a model's versions ever had, those removed among them."""
    newest = max((fields["n"] for fields in model["versions"].values()), default=0)
    return int(max(newest, model.get("last", 0)))


def _target(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in ("ensemble", "model", "version") if key in fields}


def _told(place: Mapping[str, Any]) -> str:
    return repr(pointed(place)) if place else "nothing"
