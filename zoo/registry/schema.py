"""What the parsed text of a registry must hold: sections, names, fields and their types, references.

Names and collisions are judged first, then the fields of each thing, then whether what is pointed at is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from zoo._json import depth
from zoo.registry.references import RegistryError, check_digest, check_name, is_id

SECTIONS = ("models", "ensembles", "aliases")
_DEEPEST = 64
_LAST = 999_999_999  # the highest number that a reference can name
_VERSION = {"n": int, "spec": dict, "classes": list, "blob": str, "bytes": int, "parameters": int, "created": str}
_VERSION_ALL = {
    **_VERSION,
    "metrics": dict,
    "recipe": dict,
    "parents": list,
    "kind": str,
    "trained_on": str,
    "note": str,
    "tags": list,
    "software": dict,
    "probe": dict,
}
_MODEL = {"versions": dict}
_MODEL_ALL = {**_MODEL, "last": int}
_ENSEMBLE = {"members": list, "rule": dict, "classes": list, "created": str}
_ENSEMBLE_ALL = {**_ENSEMBLE, "weights": list, "temperatures": list, "fitted_on": str, "note": str, "tags": list}
_KINDS = {"trained", "averaged", "imported"}
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)


def check_top(table: Any, name: str, newest: int) -> None:
    """Refuse what is no registry, or one of another schema, or with other keys."""
    if not isinstance(table, dict) or table.get("format") != name:
        got = table.get("format") if isinstance(table, dict) else table
        _refuse("NOT_A_REGISTRY", f"expected a registry with the format {name!r}, got {str(got)[:60]!r}")
    schema = table.get("schema")
    if type(schema) is not int or schema < 1:
        _refuse("SCHEMA_TYPE", f"expected the schema as an integer of at least 1, got {schema!r}")
    if schema > newest:
        _refuse(
            "SCHEMA_TOO_NEW", f"the registry has schema {schema}, this program knows up to {newest}: update the program"
        )
    known = {"format", "schema", *SECTIONS}
    unknown = sorted(key for key in table if key not in known and not key.startswith("x-"))
    if unknown:
        _refuse("UNKNOWN_KEY", f"expected the keys {sorted(known)} and keys that begin with 'x-', got {unknown}")
    missing = sorted(known - set(table))
    if missing:
        _refuse("MISSING_KEY", f"expected the keys {sorted(known)}, {missing} are missing")
    deep = [key for key in table if key.startswith("x-") and depth(table[key]) > _DEEPEST]
    if deep:
        _refuse("REGISTRY_DEPTH", f"expected at most {_DEEPEST} levels in {deep[0]!r}")


def check_sections(table: Mapping[str, Any]) -> None:
    """Refuse names, fields and references that cannot be."""
    for section in SECTIONS:
        if not isinstance(table[section], dict):
            _refuse("FIELD_TYPE", f"expected {section!r} as an object, got {str(table[section])[:60]}")
    _check_names(table)
    for name, model in table["models"].items():
        if type(model) is not dict or len(model) > 1 or type(model.get("versions")) is not dict:  # most have only these
            _check_fields(f"the model {name!r}", model, _MODEL, _MODEL_ALL)
            _check_depth(f"the model {name!r}", {key: model[key] for key in model if key != "versions"})
    ids = {version for model in table["models"].values() for version in model["versions"]}
    strange = [version for version in ids if not is_id(version)]
    if strange:
        name = next(name for name, model in table["models"].items() if strange[0] in model["versions"])
        _refuse("ID", f"expected ids of 12 hex digits in {name!r}, got {strange[0][:40]!r}")
    for name, fields in table["ensembles"].items():
        check_ensemble(name, fields)
        lost = [member for member in fields["members"] if member not in ids]
        if lost:
            _refuse("DANGLING", f"the ensemble {name!r} holds {lost}, which the registry does not have")
    for name, fields in table["aliases"].items():
        _check_alias(name, fields, table)


def _check_names(table: Mapping[str, Any]) -> None:
    names = [name for section in SECTIONS for name in table[section]]
    for name in names:
        check_name(name)
    if len({name.casefold() for name in names}) == len(names):
        return
    taken: dict[str, tuple[str, str]] = {}
    for section in SECTIONS:
        for name in table[section]:
            other, where = taken.setdefault(name.casefold(), (name, section))
            if (other, where) != (name, section):
                msg = f"{name!r} in {section} has the name of {other!r} in {where}; capitals do not tell apart"
                _refuse("NAME_COLLISION", msg)


def check_versions(models: Mapping[str, Any]) -> None:
    """Refuse versions whose fields cannot be, and numbers that are not each their own."""
    for name, model in models.items():
        numbers = set()
        for key, fields in model["versions"].items():
            if isinstance(fields, dict) or not isinstance(fields, Mapping):  # else it checks itself
                check_version(f"{name}@{key}", fields, deep=_DEEPEST + 1)
            numbers.add(fields["n"])
        if len(numbers) != len(model["versions"]) or (numbers and not 1 <= min(numbers) <= max(numbers) <= _LAST):
            _refuse("VERSION_NUMBER", f"expected different numbers from 1 for the versions of {name!r}, got others")
        if "last" in model and not max(numbers, default=0) < model["last"] <= _LAST:
            _refuse("VERSION_NUMBER", f"expected 'last' of {name!r} beyond its versions, got {model['last']}")


def check_version(what: str, fields: Any, *, deep: int) -> None:
    """Refuse a version whose fields are missing, unknown, or of another type.

    Args:
        what: its name in messages.
        fields: the parsed line.
        deep: brackets in its text; more than `_DEEPEST` levels need as many.
    """
    _check_fields(what, fields, _VERSION, _VERSION_ALL)
    check_digest(fields["blob"])
    if fields["bytes"] < 1 or fields["parameters"] < 0:
        _refuse(
            "FIELD_TYPE", f"expected sizes of {what}, got {fields['bytes']} bytes, {fields['parameters']} parameters"
        )
    _check_strings(what, "classes", fields["classes"])
    for key in ("tags", "parents"):
        if key in fields:
            _check_strings(what, key, fields[key])
    if "kind" in fields and fields["kind"] not in _KINDS:
        _refuse("FIELD_TYPE", f"expected a kind of {sorted(_KINDS)} for {what}, got {fields['kind']!r}")
    _check_time(what, fields["created"])
    if deep > _DEEPEST:
        _check_depth(what, fields)
    _check_metrics(what, fields.get("metrics", {}))
    if "probe" in fields:
        _check_probe(what, fields["probe"])


def check_ensemble(name: str, fields: Any) -> None:
    """Refuse an ensemble whose fields are missing, unknown, of another type or length."""
    what = f"the ensemble {name!r}"
    _check_fields(what, fields, _ENSEMBLE, _ENSEMBLE_ALL)
    _check_time(what, fields["created"])
    for key in ("members", "classes", "tags"):
        _check_strings(what, key, fields.get(key, []))
    members = fields["members"]
    if not members or len(set(members)) != len(members) or not all(map(is_id, members)):
        _refuse("FIELD_TYPE", f"expected different ids as members of {what}, got {str(members)[:80]}")
    for key, length in (("weights", len(members)), ("temperatures", len(members))):
        numbers = fields.get(key)
        if numbers is not None and (len(numbers) != length or not all(type(n) in (int, float) for n in numbers)):
            _refuse("FIELD_TYPE", f"expected one number per member as {key} of {what}, got {str(numbers)[:80]}")
    _check_depth(what, fields)


def _check_alias(name: str, fields: Any, table: Mapping[str, Any]) -> None:
    what = f"the alias {name!r}"
    _check_fields(what, fields, _place(fields), {**_place(fields), "before": list})
    _check_depth(what, fields)
    for place in (fields, *fields.get("before", ())):
        if place is not fields:
            _check_fields(what, place, _place(place), _place(place))
        model = table["models"].get(place.get("model"), {"versions": {}})
        there = {_number(version) for version in model["versions"].values()}
        if not (place.get("ensemble") in table["ensembles"] or place.get("version") in there):
            _refuse("DANGLING", f"{what} points to {place}, which the registry does not have")


def _place(fields: Any) -> dict[str, type]:
    return {"ensemble": str} if isinstance(fields, dict) and "ensemble" in fields else {"model": str, "version": int}


def _number(fields: Any) -> int | None:
    number = fields.get("n") if isinstance(fields, Mapping) else None
    return number if type(number) is int else None


def _check_fields(what: str, fields: Any, needed: Mapping[str, type], kinds: Mapping[str, type]) -> None:
    if not isinstance(fields, dict):
        _refuse("FIELD_TYPE", f"expected {what} as an object, got {str(fields)[:60]}")
    if not needed.keys() <= fields.keys():
        missing = [key for key in needed if key not in fields]
        _refuse("MISSING_KEY", f"expected {list(needed)} in {what}, {missing} are missing")
    wrong = [key for key, value in fields.items() if kinds.get(key) is not type(value) and not key.startswith("x-")]
    for key in wrong:
        if key not in kinds:
            _refuse("UNKNOWN_KEY", f"expected {list(kinds)} in {what}, got {key[:60]!r}")
        _refuse("FIELD_TYPE", f"expected {key!r} of {what} as {kinds[key].__name__}, got {str(fields[key])[:60]}")


def _check_depth(what: str, value: Any) -> None:
    if depth(value, _DEEPEST) > _DEEPEST:
        _refuse("REGISTRY_DEPTH", f"expected at most {_DEEPEST} levels in {what}")


def _check_strings(what: str, key: str, values: list[Any]) -> None:
    if {*map(type, values)} - {str}:
        _refuse("FIELD_TYPE", f"expected {key!r} of {what} as strings, got {str(values)[:60]}")


def _check_time(what: str, text: str) -> None:
    try:
        known = _TIME.fullmatch(text) and datetime.fromisoformat(text)
    except ValueError:  # a day or an hour that is none
        known = None
    if not known:
        _refuse("FIELD_TYPE", f"expected the time {what} was made as 2026-01-31T12:00:00Z, got {text[:40]!r}")


def _check_metrics(what: str, metrics: Mapping[str, Any]) -> None:
    for key, metric in metrics.items():
        if not isinstance(metric, dict) or type(metric.get("value")) not in (int, float):
            _refuse("FIELD_TYPE", f"expected metric {key!r} of {what} with a number as 'value', got {str(metric)[:60]}")
        parts = (metric.get("unit", ""), metric.get("n", 0), metric.get("frames", ""))
        if tuple(map(type, parts)) != (str, int, str):
            _refuse("FIELD_TYPE", f"expected 'unit', 'n' and 'frames' of {key!r} as text, integer, text, got {parts}")


def _check_probe(what: str, probe: Mapping[str, Any]) -> None:
    values = probe.get("values")
    if type(probe.get("digest")) is not str or type(values) is not list or {*map(type, values)} - {int, float}:
        _refuse("FIELD_TYPE", f"expected the probe of {what} as a digest and numbers, got {str(probe)[:60]}")


def _refuse(reason: str, message: str) -> NoReturn:
    raise RegistryError(reason, message)
