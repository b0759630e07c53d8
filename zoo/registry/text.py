"""The text of a registry, in and out: read strictly, written canonically.

    {
    "aliases":{
    "best":{"before":[],"model":"cylinder-a","version":2}
    },
    "ensembles":{

    },
    "format":"zoo-registry",
    "models":{
    "cylinder-a":{"versions":{
    "1f2e3d4c5b6a":{"blob":"sha256:...","bytes":1234,...},
    "9a8b7c6d5e4f":{"blob":"sha256:...","bytes":1234,...}
    }}
    },
    "schema":1
    }

One version is one line, keys are sorted, and models stand in the order of a hash of their names, so that two branches
of a project that each add a model rarely touch neighbouring lines.

Bytes go in, a `Snapshot` comes out, and the other way round; the whole file is checked at every reading. There are two
readers. The fast one decodes typed records, encodes them again and compares: equal bytes prove that the text is the
canonical one, so that no key appears twice and nothing is ambiguous. Where it stops, for whatever reason, the strict
one decides: it says what is wrong and where, or accepts a text that is only laid out differently, which the next
change rewrites. The law: the fast reader accepts nothing that the strict one refuses, and both give the same content.
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any, NoReturn, get_args

import msgspec
from msgspec import UNSET, Raw

from zoo._json import TextError, canonical, depth, parse_strictly
from zoo.registry.types import (
    CARRIED,
    LAST_NUMBER,
    AliasRecord,
    EnsembleRecord,
    Metric,
    ModelRecord,
    Probe,
    R,
    RegistryError,
    Snapshot,
    Target,
    VersionRecord,
    check_digest,
    check_name,
    encoded,
    extension_text,
    is_id,
)

Bytes = bytes | bytearray
_FORMAT, _SCHEMA = "zoo-registry", 1
_SECTIONS = ("models", "ensembles", "aliases")
_KEYS = {"format", "schema", *_SECTIONS}
_DEEPEST = 64
_TOGETHER = 200  # carried texts that are checked at once
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)
_UGLY = re.compile("[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # terminal controls, reversed text
_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u([0-9a-fA-F]{4})")
_RESCUE = "take it back from version control, or move it away and rebuild it with `zoo recover`"


# ---- writing


def write(snapshot: Snapshot) -> bytes:
    """The one text of a snapshot, UTF-8, LF, a newline at the end.

    Raises:
        RegistryError: ARGUMENT: half of a surrogate pair in a text, or an integer of more than 64 bits.
    """
    try:
        return b"".join(_pieces(snapshot))
    except (ValueError, OverflowError) as error:
        raise RegistryError("ARGUMENT", f"expected what a registry can hold: {error}") from error


def _pieces(snapshot: Snapshot) -> list[bytes]:
    """The text in pieces, which are compared with another without a copy."""
    sections = {
        "aliases": _lines(snapshot.pointers),
        "ensembles": _lines(snapshot.ensembles),
        "format": [canonical(_FORMAT).encode()],
        "models": _models(snapshot.models),
        "schema": [canonical(_SCHEMA).encode()],
        **{key: [bytes(raw)] for key, raw in sorted(snapshot.extensions.items())},
    }
    pieces: list[bytes] = []
    for key, section in sections.items():
        pieces += (b",\n" if pieces else b"{\n", canonical(key).encode(), b":", *section)
    return [*pieces, b"\n}\n"]


def _models(models: Mapping[str, ModelRecord]) -> list[bytes]:
    pieces: list[bytes] = []
    between = "{\n"
    for name in sorted(models, key=_spread):
        model = models[name]
        last = "" if model.last is UNSET else f'"last":{model.last},'
        between += f'"{name}":{{{last}"versions":{{\n'
        for id in sorted(model.versions):
            pieces += (f'{between}"{id}":'.encode(), encoded(model.versions[id]))
            between = ",\n"
        more = "" if model.extensions is UNSET else extension_text(model.extensions).decode()
        between = f"{'' if model.versions else between}\n}}{more}}},\n"
    return [*pieces, between.removesuffix(",\n").encode(), b"\n}"]


def _lines(records: Mapping[str, EnsembleRecord | AliasRecord]) -> list[bytes]:
    """An object of one record per line."""
    lines = [b'"%b":%b' % (key.encode(), encoded(one)) for key, one in sorted(records.items())]
    return [b"{\n", b",\n".join(lines), b"\n}"]


@lru_cache(maxsize=2**15)  # one change orders the names three times
def _spread(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


# ---- reading


def parse(raw: Bytes) -> Snapshot:
    """The content of a registry's bytes, all of it checked.

    Raises:
        RegistryError: the first thing that is wrong, by its `reason`.

    Example:
        >>> parse(b'{"format":"zoo-registry","schema":1,"models":{},"ensembles":{},"aliases":{}}').models
        {}
    """
    with collector_off():
        try:
            return _fast(raw)
        except _NOT_CANONICAL:
            return _strict(raw)


def write_checked(snapshot: Snapshot) -> bytes:
    """As `write`, and the text is read again: it must give the same content.

    Raises:
        RegistryError: ARGUMENT; what `parse` refuses.
    """
    text = write(snapshot)
    with collector_off():
        try:
            found = _typed(text)  # where it equals the snapshot, its one text is this one
        except _NOT_CANONICAL:
            found = _strict(text)
    if found != snapshot:
        raise RegistryError("ARGUMENT", "the change cannot be written such that reading gives it back")
    return text


@contextmanager
def collector_off() -> Iterator[None]:
    """For many new objects, none of them garbage: the collector would walk all of them, and torch, for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _OtherTextError(ValueError):
    """The text is not the canonical one; the strict reader decides."""


_NOT_CANONICAL = (ValueError, KeyError, OverflowError, RecursionError)  # also what msgspec and the checks raise
_decode_top = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_models = msgspec.json.Decoder(dict[str, ModelRecord]).decode
_decode_ensembles = msgspec.json.Decoder(dict[str, EnsembleRecord]).decode
_decode_aliases = msgspec.json.Decoder(dict[str, AliasRecord]).decode


class _ExactMetric(Metric, forbid_unknown_fields=True):
    """Without further fields, which would be skipped and not checked."""


class _ExactProbe(Probe, forbid_unknown_fields=True):
    """Likewise."""


_decode_carried: dict[str, Any] = {
    key: msgspec.json.Decoder(list[kind]).decode  # type: ignore[valid-type]  # made of the table
    for key, kind in {**CARRIED, "metrics": dict[str, _ExactMetric], "probe": _ExactProbe}.items()
}
_LONG = re.compile(rb"[\[:,]-?[0-9]{19,}[],}]")  # an integer that may need more than 64 bits
_DIGITS, _ZEROS = bytes.maketrans(b"123456789", b"0" * 9), b"0" * 19
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


def _fast(raw: Bytes) -> Snapshot:
    """The snapshot of a canonical text; any other raises one error or another."""
    found, place = _typed(raw), 0
    for piece in _pieces(found):
        if not raw.startswith(piece, place):
            raise _OtherTextError
        place += len(piece)
    if place != len(raw):
        raise _OtherTextError
    return found


def _typed(raw: Bytes) -> Snapshot:
    """The snapshot of typed records, checked; whether its text is the canonical one is not."""
    if not raw.isascii() or b"\\" in raw or b"\x7f" in raw:
        _check_characters(raw.decode("utf-8"))
    top = _decode_top(raw)
    aliases, ensembles, models = (top.pop(key) for key in ("aliases", "ensembles", "models"))
    if b"\r" in raw:
        raise _OtherTextError
    _check_top({**dict.fromkeys(_SECTIONS), **{key: _strictly(bytes(value).decode()) for key, value in top.items()}})
    extensions = {key: value for key, value in top.items() if key not in _KEYS}
    found = Snapshot(_decode_models(models), _decode_ensembles(ensembles), _decode_aliases(aliases), extensions)
    versions = [version for model in found.models.values() for version in model.versions.values()]
    for key in ("spec", "classes", "recipe", "metrics", "probe", "software"):
        _check_carried(key, versions)
    for key in ("rule", "weights", "temperatures"):
        _check_carried(key, found.ensembles.values())
    _check_names(found.models, found.ensembles, found.pointers)
    _check(found)
    return found


def _check_carried(key: str, records: Iterable[Any]) -> None:
    """Refuse carried parts of another type, or whose text is not the canonical one; equal ones are checked once."""
    found = [*{*map(bytes, filter(None, map(attrgetter(key), records)))}]  # without those that are UNSET
    if any(len(text) > 2 * _DEEPEST and text.count(b"{") + text.count(b"[") > _DEEPEST for text in found):
        raise _OtherTextError
    for start in range(0, len(found), _TOGETHER):
        together = b"[%b]" % b",".join(found[start : start + _TOGETHER])
        if _ZEROS in together.translate(_DIGITS) and _LONG.search(together):
            raise _OtherTextError
        again = _encode_sorted(_decode_carried[key](together))
        short = together.replace(b"e-0", b"e-").replace(b"e+", b"e")  # as msgspec writes 1e-08
        if again not in (together, short) and _encode_sorted(_decode_literally(together)) != together:
            raise _OtherTextError


_decode_literally = msgspec.json.Decoder(float_hook=Raw).decode  # every number as it is written


def _strict(raw: Bytes) -> Snapshot:
    """The snapshot of any text that has one meaning, read slowly; every refusal names what is refused."""
    if not raw:
        _refuse("REGISTRY_JSON", f"expected a registry, got an empty file; {_RESCUE}")
    if not raw.strip(b"\0"):
        _refuse("REGISTRY_ENCODING", f"expected a registry, got {len(raw):,} zeros; {_RESCUE}")
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:4]:
        _refuse("REGISTRY_ENCODING", "expected UTF-8 without a byte order mark; save the file again in that encoding")
    try:
        table = _strictly(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RegistryError("REGISTRY_ENCODING", f"expected UTF-8: {error}; {_RESCUE}") from None
    _check_top(table)
    for section in _SECTIONS:
        if not isinstance(table[section], dict):
            _refuse("FIELD_TYPE", f"expected {section!r} as an object, got {str(table[section])[:60]}")
    models, ensembles, aliases = (table[section] for section in _SECTIONS)
    _check_names(models, ensembles, aliases)
    top = _decode_top(raw)  # keys of other programs keep their text, line ends apart
    found = Snapshot(
        {name: _model_record(name, fields) for name, fields in models.items()},
        {name: record(EnsembleRecord, f"the ensemble {name!r}", fields) for name, fields in ensembles.items()},
        {name: record(AliasRecord, f"the alias {name!r}", fields) for name, fields in aliases.items()},
        {key: Raw(bytes(top[key]).replace(b"\r\n", b"\n")) for key in table if key not in _KEYS},
    )
    _check(found)
    return found


def _model_record(name: str, fields: Any) -> ModelRecord:
    what = f"the model {name!r}"
    versions = fields.get("versions") if isinstance(fields, dict) else None
    if not isinstance(versions, dict):  # before its lines are read one by one, which name the version
        return record(ModelRecord, what, fields)
    _check_ids(name, versions)
    lines = {id: record(VersionRecord, f"{name}@{id}", line) for id, line in versions.items()}
    return msgspec.structs.replace(record(ModelRecord, what, {**fields, "versions": {}}), versions=lines)


def new_record(kind: type[R], what: str, fields: Mapping[str, Any]) -> R:
    """The record of plain data, as if it were read from a file: `record`, and the characters are checked.

    Raises:
        RegistryError: what no file can hold, or what `record` refuses; ARGUMENT where it is not plain data.
    """
    try:
        found = _strictly(canonical(dict(fields)))
        if found != fields:
            raise TypeError("lists, not tuples, and keys that are strings")
    except RegistryError:
        raise
    except (ValueError, TypeError) as error:
        raise RegistryError("ARGUMENT", f"expected plain data for {what}: {error}") from error
    return record(kind, what, found)


def record(kind: type[R], what: str, fields: Any) -> R:
    """The record of parsed JSON; messages call it `what`.

    Raises:
        RegistryError: FIELD_TYPE, MISSING_KEY, UNKNOWN_KEY, REGISTRY_DEPTH.
    """
    if not isinstance(fields, dict):
        _refuse("FIELD_TYPE", f"expected {what} as an object, got {str(fields)[:60]}")
    known = [one for one in msgspec.structs.fields(kind) if one.encode_name != "x-"]
    types = {one.encode_name: one.type for one in known}
    needed = [one.encode_name for one in known if one.required]
    if missing := [key for key in needed if key not in fields]:
        _refuse("MISSING_KEY", f"expected {needed} in {what}, {missing} are missing")
    if unknown := [key for key in fields if key not in types and not key.startswith("x-")]:
        _refuse("UNKNOWN_KEY", f"expected {sorted(types)} in {what}, got {unknown[0][:60]!r}")
    extensions = {key: _raw(value) for key, value in fields.items() if key.startswith("x-")}
    values = {key: _value(what, key, value, types[key]) for key, value in fields.items() if key in types}
    if depth(fields) > _DEEPEST:
        _refuse("REGISTRY_DEPTH", f"expected at most {_DEEPEST} levels in {what}")
    return kind(**values, extensions=extensions or UNSET)


def _value(what: str, key: str, value: Any, kind: Any) -> Any:
    if key == "before" and isinstance(value, list):  # of an alias; each may have keys that begin with `x-`
        return tuple(record(Target, what, target) for target in value)
    carried = Raw in (kind, *get_args(kind))
    try:
        converted = msgspec.convert(value, CARRIED[key] if carried else kind)
    except msgspec.ValidationError as error:
        _refuse("FIELD_TYPE", f"{key!r} of {what} is wrong: {error}; got {str(value)[:60]}")
    return _raw(value) if carried else converted


def _raw(value: Any) -> Raw:
    return Raw(canonical(value).encode())


# ---- checks that need more than one field


def _check_top(table: Any) -> None:
    """Refuse what is no registry, or one of another schema, or with other keys."""
    if not isinstance(table, dict) or table.get("format") != _FORMAT:
        got = table.get("format") if isinstance(table, dict) else table
        _refuse("NOT_A_REGISTRY", f"expected a registry with the format {_FORMAT!r}, got {str(got)[:60]!r}")
    schema = table.get("schema")
    if type(schema) is not int or schema < 1:
        _refuse("SCHEMA_TYPE", f"expected the schema as an integer of at least 1, got {schema!r}")
    if schema > _SCHEMA:
        msg = f"the registry has schema {schema}, this program knows up to {_SCHEMA}: update the program"
        _refuse("SCHEMA_TOO_NEW", msg)
    if unknown := sorted(key for key in table if key not in _KEYS and not key.startswith("x-")):
        _refuse("UNKNOWN_KEY", f"expected the keys {sorted(_KEYS)} and keys that begin with 'x-', got {unknown}")
    if missing := sorted(_KEYS - set(table)):
        _refuse("MISSING_KEY", f"expected the keys {sorted(_KEYS)}, {missing} are missing")
    if deep := [key for key in table if key.startswith("x-") and depth(table[key]) > _DEEPEST]:
        _refuse("REGISTRY_DEPTH", f"expected at most {_DEEPEST} levels in {deep[0]!r}")


def _check_names(*sections: Mapping[str, Any]) -> None:
    """Refuse invalid names, and names that differ only in capitals."""
    names = [name for section in sections for name in section]
    for name in names:
        check_name(name)
    if len({name.casefold() for name in names}) == len(names):
        return
    taken: dict[str, tuple[str, str]] = {}
    for where, section in zip(_SECTIONS, sections, strict=True):
        for name in section:
            other, place = taken.setdefault(name.casefold(), (name, where))
            if (other, place) != (name, where):
                also = f"{name!r} in {where} has the name of {other!r} in {place}"
                _refuse("NAME_COLLISION", f"{also}; names must differ in more than capitals")


def _check(snapshot: Snapshot) -> None:
    """Refuse invalid ids, digests, sizes, times and numbers, and references to what is not in the registry."""
    for name, model in snapshot.models.items():
        numbers = [version.n for version in model.versions.values()]
        if len(numbers) > 1 and len({*numbers}) < len(numbers):
            _refuse("VERSION_NUMBER", f"expected different numbers for the versions of {name!r}, got {sorted(numbers)}")
        if model.last is not UNSET and not max(numbers, default=0) < model.last <= LAST_NUMBER:
            _refuse("VERSION_NUMBER", f"expected 'last' of {name!r} beyond its versions, got {model.last}")
        _check_ids(name, model.versions)
        for id, version in model.versions.items():
            check_digest(version.blob)
            if not 1 <= version.n <= LAST_NUMBER:
                expected = f"expected the number of {name}@{id} from 1 to {LAST_NUMBER:,}"
                _refuse("VERSION_NUMBER", f"{expected}, got {version.n}")
            if version.bytes < 1 or version.parameters < 0:
                sizes = f"{version.bytes} bytes, {version.parameters} parameters"
                _refuse("FIELD_TYPE", f"expected sizes of {name}@{id}, got {sizes}")
            if not _is_time(version.created):
                _refuse_time(f"{name}@{id}", version.created)
    for name, ensemble in snapshot.ensembles.items():
        check_ensemble(name, ensemble)
        if lost := [member for member in ensemble.members if snapshot.model_of(member) is None]:
            _refuse("DANGLING", f"the ensemble {name!r} holds {lost}, which the registry does not have")
    for name, alias in snapshot.pointers.items():
        _check_alias(name, alias, snapshot)


def _check_ids(name: str, ids: Iterable[str]) -> None:
    for id in ids:
        if not is_id(id):
            _refuse("ID", f"expected ids of 12 hex digits in {name!r}, got {id[:40]!r}")


def check_ensemble(name: str, ensemble: EnsembleRecord) -> None:
    """Refuse (FIELD_TYPE) an ensemble with an invalid time, members or numbers."""
    what, members = f"the ensemble {name!r}", ensemble.members
    if not _is_time(ensemble.created):
        _refuse_time(what, ensemble.created)
    if not members or len(set(members)) != len(members) or not all(map(is_id, members)):
        _refuse("FIELD_TYPE", f"expected different ids as members of {what}, got {str(members)[:80]}")
    for key, raw in (("weights", ensemble.weights), ("temperatures", ensemble.temperatures)):
        numbers = members if raw is UNSET else msgspec.json.decode(raw)
        if len(numbers) != len(members):
            _refuse("FIELD_TYPE", f"expected one number per member as {key} of {what}, got {numbers}")


def _check_alias(name: str, alias: AliasRecord, snapshot: Snapshot) -> None:
    what = f"the alias {name!r}"
    for target in (alias.target, *(alias.before or ())):
        version = (target.model, target.version)
        if target.ensemble is UNSET and UNSET in version:
            _refuse("MISSING_KEY", f"expected 'ensemble', or 'model' and 'version', in {what}, got {target}")
        if target.ensemble is not UNSET and version != (UNSET, UNSET):
            _refuse("UNKNOWN_KEY", f"expected either 'ensemble', or 'model' and 'version', in {what}, got both")
        if not snapshot.there(target):
            _refuse("DANGLING", f"{what} points to {target}, which the registry does not have")


@lru_cache(maxsize=1024)
def _is_time(text: str) -> bool:
    try:
        return _TIME.fullmatch(text) is not None and datetime.fromisoformat(text) is not None
    except ValueError:  # a day or an hour that is none
        return False


def _refuse_time(what: str, text: str) -> NoReturn:
    _refuse("FIELD_TYPE", f"expected the time {what} was made as 2026-01-31T12:00:00Z, got {text[:40]!r}")


# ---- strict JSON


def _strictly(text: str) -> Any:
    try:
        value = parse_strictly(text)
    except TextError as error:
        if "\n<<<<<<< " in text or text.startswith("<<<<<<< "):
            msg = f"the registry holds the conflict markers of a merge ({error}); merge it with `zoo merge`"
            raise RegistryError("REGISTRY_JSON", msg) from None
        if error.reason == "SYNTAX" and "control character" in str(error):
            raise RegistryError("CONTROL_CHARACTER", f"the registry is {error}") from None
        reason = {"SYNTAX": "REGISTRY_JSON", "DEPTH": "REGISTRY_DEPTH"}.get(error.reason, error.reason)
        raise RegistryError(reason, f"the registry is {error}; correct it, or {_RESCUE}") from None
    _check_characters(text)
    return value


def _check_characters(text: str) -> None:
    """Refuse what a terminal would obey rather than show, and halves of surrogate pairs."""
    if ugly := None if text.isascii() and "\x7f" not in text else _UGLY.search(text):
        _refuse("CONTROL_CHARACTER", f"the registry holds the control character {ugly[0]!r}")
    if "\\" not in text:
        return
    high: re.Match[str] | None = None  # the half that the next escape must complete
    for match in _ESCAPE.finditer(text):
        code = int(match[1], 16)
        if (0xDC00 <= code <= 0xDFFF) != (high is not None and high.end() == match.end() - 6):
            raise _half(high or match)
        high = match if 0xD800 <= code <= 0xDBFF else None
        if (code < 0x20 and code not in (0x09, 0x0A)) or _UGLY.match(chr(code)):
            _refuse("CONTROL_CHARACTER", f"the registry holds the control character \\u{match[1]}")
    if high is not None:
        raise _half(high)
    if backspace := re.search(r"(?<!\\)(?:\\\\)*\\[bfr]", text):
        _refuse("CONTROL_CHARACTER", f"the registry holds the control character {backspace[0][-2:]}")


def _half(match: re.Match[str]) -> RegistryError:
    return RegistryError("REGISTRY_ENCODING", f"the registry holds half a surrogate pair, \\u{match[1]}")


def _refuse(reason: str, message: str) -> NoReturn:
    raise RegistryError(reason, message)
