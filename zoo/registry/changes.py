"""Changes of a registry's content: each alters a copy that it is given, or raises and leaves it as it was; no disk.

A change may be made twice: once when it is asked for within a transaction, and again on what others have committed by
the end of it. So what it is about is pinned by ids beforehand (`pinned`), not by names that may mean something else
by then. Metrics, tags and other arguments that describe models are checked here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import Any

import msgspec
from msgspec import UNSET

from zoo.registry.text import check_ensemble, new_record
from zoo.registry.types import (
    NO_MODEL,
    AliasRecord,
    EnsembleRecord,
    Entry,
    Metric,
    RegistryError,
    Snapshot,
    Target,
    VersionRecord,
    check_name,
    is_id,
    plain,
)

Change = Callable[[Snapshot], object]
_MOST_REMEMBERED = 10
_NOWHERE = Target()


# ---- versions


def add_version(draft: Snapshot, name: str, id: str, record: VersionRecord) -> bool:
    """Add a version, numbered next, and return whether it is new: the same content again changes nothing.

    Raises:
        RegistryError: NAME, NAME_COLLISION; CLASSES where the same weights are there with other class names.
    """
    model = draft.models.get(name, NO_MODEL)
    if name not in draft.models:
        _check_free(draft, name)
    known = model.versions.get(id)
    if known is None:
        _set_version(draft, name, id, msgspec.structs.replace(record, n=1 + model.last_number))
    elif known.classes != record.classes:
        old, new = (msgspec.json.decode(one.classes) for one in (known, record))
        raise RegistryError("CLASSES", f"{name!r} has these weights already, with the classes {old}, got {new}")
    return known is None


def change_blob(draft: Snapshot, name: str, id: str, record: VersionRecord) -> None:
    """Make a version refer to another blob with the same content, which `record` describes."""
    known = draft.models[name].versions[id]
    _set_version(draft, name, id, msgspec.structs.replace(known, blob=record.blob, bytes=record.bytes))


def _set_version(draft: Snapshot, name: str, id: str, record: VersionRecord) -> None:
    model = draft.models.get(name, NO_MODEL)
    last = UNSET if model.last is UNSET or record.n > model.last else model.last
    draft.put(name, msgspec.structs.replace(model, last=last, versions={**model.versions, id: record}))


def annotate(
    draft: Snapshot,
    name: str,
    id: str,
    *,
    note: str | None,
    licence: str | None,
    tags: Sequence[str] | None,
    add: Sequence[str],
    drop: Sequence[str],
    metrics: Mapping[str, Any],
) -> None:
    """Change a version, or where `id` is "" an ensemble, as `Registry.annotate`; UNKNOWN where it was removed."""
    entry = draft.get(f"{name}@{id}") if id else draft.get_ensemble(name)
    new: dict[str, Any] = {key: text for key, text in (("note", note), ("licence", licence)) if text is not None}
    if tags is not None or add or drop:
        new["tags"] = sorted({*(entry.tags if tags is None else tags), *add}.difference(drop))
    if metrics:
        if not isinstance(entry, Entry):
            raise RegistryError("ARGUMENT", f"expected no metrics for {name!r}, an ensemble, got {sorted(metrics)}")
        new["metrics"] = {**entry.metrics, **metrics}
    if new:
        fields = {**plain(entry.record), **new}
        kept = {key: value for key, value in fields.items() if key.startswith("x-") or value not in ("", [], {}, None)}
        if id:
            _set_version(draft, name, id, new_record(VersionRecord, f"{name}@{id}", kept))
        else:
            draft.set(ensembles={**draft.ensembles, name: new_record(EnsembleRecord, name, kept)})


def remove(draft: Snapshot, removed: Sequence[str], *, force: bool) -> list[str]:
    """Remove, as `Registry.remove` does, what the stable references of `pinned_all` name.

    Those that others removed meanwhile are left out; where that is all of them, RegistryError (UNKNOWN).
    """
    first = removed[0]
    parts = {reference: reference.partition("@") for reference in removed}
    there = [one for one, (name, at, id) in parts.items() if not at or id in draft.models.get(name, NO_MODEL).versions]
    named = first in draft.ensembles or first in draft.pointers
    entries = [] if named else [draft.get(reference) for reference in there or removed]
    ids = {entry.id for entry in entries}
    targets = [Target(model=entry.name, version=entry.number) for entry in entries] or [Target(ensemble=first)]
    held = [f"the ensemble {name!r}" for name, record in draft.ensembles.items() if ids & set(record.members)]
    held += [f"the alias {name!r}" for name, alias in draft.pointers.items() if alias.target in targets]
    if held and not force:
        what = ", ".join([entry.reference for entry in entries] or [first])
        raise RegistryError("HELD", f"{what} is held by {', '.join(held)}; remove these first, or force")
    for entry in entries:
        model = draft.models[entry.name]
        rest = {id: version for id, version in model.versions.items() if id != entry.id}
        newest = max((version.n for version in rest.values()), default=0)
        last = model.last_number if model.last_number > newest else UNSET
        draft.put(entry.name, msgspec.structs.replace(model, versions=rest, last=last))
    kept = {name: e for name, e in draft.ensembles.items() if name != first and not ids & set(e.members)}
    draft.set(ensembles=kept)  # before what points to nothing now is sought
    draft.set(
        pointers={
            name: msgspec.structs.replace(alias, before=alias.before and tuple(filter(draft.there, alias.before)))
            for name, alias in draft.pointers.items()
            if name != first and draft.there(alias.target)
        }
    )
    return held


# ---- ensembles


def ensemble_record(known: Snapshot, data: Mapping[str, Any]) -> EnsembleRecord:
    """The record of an ensemble as `Registry.register_ensemble` takes it: members by id, classes in order."""
    members = [known.get(member) for member in strings_of("members", data.get("members", ()))]
    if not members or "rule" not in data:
        raise RegistryError("ARGUMENT", f"expected an ensemble with 'members' and 'rule', got {sorted(data)}")
    absent = {key for key in ("fitted_on", "licence", "note", "tags") if not data.get(key)}
    absent |= {key for key in ("weights", "temperatures") if data.get(key) is None}
    fields = {key: value for key, value in data.items() if key not in ("name", *absent)} | {
        "members": [entry.id for entry in members],
        "rule": dict(data["rule"]) if isinstance(data["rule"], Mapping) else {"rule": str(data["rule"])},
        "classes": strings_of("classes", data.get("classes") or members[0].classes),
        "created": now(),
    }
    for key in {"weights", "temperatures"} - absent:
        try:
            fields[key] = [float(number) for number in data[key]]
        except (TypeError, ValueError):
            raise RegistryError("ARGUMENT", f"expected {key} as numbers, got {str(data[key])[:80]}") from None
    name = str(data.get("name", ""))
    record = new_record(EnsembleRecord, f"the ensemble {name!r}", fields)
    check_ensemble(name, record)
    return record


def add_ensemble(draft: Snapshot, name: str, record: EnsembleRecord) -> None:
    """Add an ensemble; the same again changes nothing.

    Raises:
        RegistryError: NAME, NAME_COLLISION; EXISTS where another ensemble has the name; CLASSES where a member
            has other class names, or the same in another order.
    """
    known = draft.ensembles.get(name)
    if known is None:
        check_new(draft, name)
    elif msgspec.structs.replace(known, created=record.created) == record:
        return
    else:
        msg = f"another ensemble has the name {name!r}; remove it first, or choose another name"
        raise RegistryError("EXISTS", msg)
    for member in map(draft.get, record.members):
        if member.classes != record.classes:
            what = f"the classes {list(record.classes)} in this order, got {list(member.classes)} of {member.reference}"
            raise RegistryError("CLASSES", f"expected members of {name!r} with {what}")
    draft.set(ensembles={**draft.ensembles, name: record})


# ---- aliases


def move_alias(known: Snapshot, name: str, target: str | None, expect: str | None) -> Change:
    """The change of `Registry.alias`, and with None as target of `alias_back`.

    References are understood by the content now, `known`; the change raises NAME_COLLISION, CONFLICT, and UNKNOWN
    where there is nothing before.
    """
    if target == "":
        raise RegistryError("ARGUMENT", f"expected a target for the alias {name!r}, got nothing; see `remove`")
    to, wanted = (None if reference is None else pinned(known, reference) for reference in (target, expect))

    def change(draft: Snapshot) -> None:
        alias = draft.pointers.get(name)
        if alias is None and to is not None:
            check_new(draft, name)
        now = _NOWHERE if alias is None else alias.target
        if wanted is not None and now != (expected := _target_of(draft, wanted)):
            words = [repr(str(one)) if one != _NOWHERE else "nothing" for one in (expected, now)]
            msg = f"expected the alias {name!r} to point to {words[0]}, it points to {words[1]}; it was not moved"
            raise RegistryError("CONFLICT", msg)
        before = [] if alias is None else [now, *(alias.before or ())]
        if to is not None:
            new, before = _target_of(draft, to), before[:_MOST_REMEMBERED]
        elif len(before) > 1:
            _, new, *before = before
        else:
            what = "there is no alias" if alias is None else "nothing to go back to: no earlier target of the alias"
            raise RegistryError("UNKNOWN", f"{what} {name!r}")
        if to is None or new != now:
            fields = {"ensemble": new.ensemble, "model": new.model, "version": new.version, "before": tuple(before)}
            draft.set(pointers={**draft.pointers, name: msgspec.structs.replace(alias or AliasRecord(), **fields)})

    return change


def _target_of(draft: Snapshot, reference: str) -> Target:
    """The target of a stable reference."""
    if not reference:
        return _NOWHERE
    if reference in draft.ensembles:
        return Target(ensemble=reference)
    entry = draft.get(reference)
    return Target(model=entry.name, version=entry.number)


# ---- references and names


def pinned(known: Snapshot, target: str) -> str:
    """A stable reference to what an alias is to point to: an ensemble's name, `name@id`, or "" for nothing."""
    if not target or target in known.ensembles:
        return target
    entry = known.get(target)
    return f"{entry.name}@{entry.id}"


def pinned_all(known: Snapshot, reference: str) -> list[str]:
    """Stable references of everything that `reference`, as of `Registry.remove`, would remove."""
    if reference in known.pointers or reference in known.ensembles:
        return [reference]
    name, _, version = reference.partition("@")
    if version != "*":
        return [pinned(known, reference)]
    name = known.get(name).name
    return [f"{name}@{id}" for id in known.models[name].versions]


def check_new(known: Snapshot, name: str) -> None:
    """Refuse (NAME, NAME_COLLISION) a new name that is invalid or taken, or could be taken for a version's id."""
    if is_id(name):
        msg = f"expected a name, got {name!r}, which has the form of a version's id; choose another"
        raise RegistryError("NAME", msg)
    _check_free(known, name)


def _check_free(known: Snapshot, name: str) -> None:
    """Refuse a name that is invalid or taken."""
    check_name(name)
    other = known.namesake(name)
    if other is not None:
        msg = f"the name {name!r} is taken by {other!r}; models, ensembles and aliases share one name space"
        raise RegistryError("NAME_COLLISION", msg)


# ---- arguments that describe models


def now() -> str:
    """The present as the registry writes it: UTC, to the second."""
    return written(datetime.now(UTC))


def written(time: datetime) -> str:
    """A time in UTC as the registry writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def strings_of(what: str, given: Iterable[str]) -> list[str]:
    """A list of strings, such as tags or classes; RegistryError (ARGUMENT) for a single string or anything else."""
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [None]
    if not all(isinstance(text, str) for text in found):
        raise RegistryError("ARGUMENT", f"expected {what} as a list of strings, got {str(given)[:80]!r}")
    return [*map(str, found)]


def tags_of(given: Iterable[str]) -> list[str]:
    """Tags as they are recorded: sorted, each once; RegistryError as for `strings_of`."""
    return sorted({*strings_of("tags", given)})


def metrics_of(given: Mapping[str, Any] | None) -> dict[str, dict[str, Any]] | None:
    """Metrics as they are recorded: a bare number becomes `{"value": number}`; RegistryError (ARGUMENT)."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RegistryError("ARGUMENT", f"expected metrics as name -> number, got {str(given)[:80]!r}")
    found: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        fields = found[str(key)] = dict(value) if isinstance(value, Mapping) else {"value": value}
        try:
            fields["value"] = float(fields["value"])
            msgspec.convert(fields, Metric)
            usable = isfinite(fields["value"]) and {*fields} <= {*Metric.__struct_fields__}
        except (KeyError, TypeError, ValueError):
            usable = False
        if not usable:
            expected = f"a finite number, or with the fields {', '.join(Metric.__struct_fields__)}"
            raise RegistryError("ARGUMENT", f"expected metric {str(key)!r} as {expected}, got {str(value)[:80]}")
    return found
