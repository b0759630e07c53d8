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

Bytes go in, a `Snapshot` comes out, and the other way round; the whole file is checked at every reading, against the
types of the records in `types`. There are two readers. The fast one decodes records, encodes them again and compares:
equal bytes prove that no key appears twice and nothing is ambiguous; only line breaks may be elsewhere. Where it
stops, for whatever reason, the strict one decides: it says what is wrong and where, or accepts a text that is only laid
out differently, which the next change rewrites. The law: the fast reader accepts nothing that the strict one refuses,
and both give the same content.
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from zoo._json import TextError, canonical, depth, parse_strictly
from zoo.registry.types import (
    AliasRecord,
    EnsembleRecord,
    ModelRecord,
    R,
    Record,
    RegistryError,
    Snapshot,
    VersionRecord,
    check_name,
    encoded,
    extension_text,
)

Bytes = bytes | bytearray
_FORMAT, _SCHEMA = "zoo-registry", 1
_SECTIONS = ("models", "ensembles", "aliases")
_DEEPEST = 64
_TOGETHER = 200  # carried texts that are checked at once
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)
_UGLY = re.compile("[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # terminal controls, reversed text
_ESCAPE = re.compile(r"\\(u[0-9a-f]{4}|[bfr])")
_ASCII = bytes(range(0x7F))
_RESCUE = "take it back from version control, or move it away and rebuild it with `zoo recover`"


# ---- writing


def write(snapshot: Snapshot) -> bytes:
    """The one text of a snapshot, UTF-8, LF, a newline at the end.

    Raises:
        RegistryError: ARGUMENT: half of a surrogate pair in a text, or an integer of more than 64 bits.
    """
    models, ensembles, aliases = snapshot.models, snapshot.ensembles, snapshot.pointers
    try:
        sections = {
            "aliases": _lines({name: [encoded(aliases[name])] for name in sorted(aliases)}),
            "ensembles": _lines({name: [encoded(ensembles[name])] for name in sorted(ensembles)}),
            "format": [_encode(_FORMAT)],
            "models": _lines({name: _model_text(models[name]) for name in sorted(models, key=_spread)}),
            "schema": [_encode(_SCHEMA)],
        }
        more = {key: [bytes(raw)] for key, raw in sorted(snapshot.extensions.items())}
        return b"".join([*_lines({**sections, **more}), b"\n"])
    except (ValueError, OverflowError) as error:
        raise RegistryError("ARGUMENT", f"expected what a registry can hold: {error}") from error


def _lines(texts: Mapping[str, list[bytes]]) -> list[bytes]:
    """An object with one line per key, in pieces that are joined once."""
    pieces: list[bytes] = []
    for key, text in texts.items():
        pieces += (b"%b%b:" % (b",\n" if pieces else b"{\n", _encode(key)), *text)
    return [*(pieces or [b"{\n"]), b"\n}"]


def _model_text(model: ModelRecord) -> list[bytes]:
    last = b"" if model.last is UNSET else b'"last":%d,' % model.last
    versions = _lines({id: [encoded(model.versions[id])] for id in sorted(model.versions)})
    return [b'{%b"versions":' % last, *versions, extension_text(model.extensions or {}) + b"}"]


_encode = msgspec.json.Encoder().encode


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
    found = parse(text)
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


class _File(Record, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The file; keys that begin with `x-` are skipped."""

    aliases: dict[str, AliasRecord]
    ensembles: dict[str, EnsembleRecord]
    format: Literal["zoo-registry"]
    models: dict[str, ModelRecord]
    schema: Literal[1]


_NOT_CANONICAL = (ValueError, OverflowError, RecursionError)  # also what msgspec and the checks raise
_decode_file = msgspec.json.Decoder(_File).decode
_decode_top = msgspec.json.Decoder(dict[str, Raw]).decode
_decode = msgspec.json.Decoder().decode
_decode_literally = msgspec.json.Decoder(float_hook=Raw).decode  # every number as it is written
_encode_sorted = msgspec.json.Encoder(order="sorted").encode
_LONG = re.compile(rb"[\[:,]-?[0-9]{19,}[],}]")  # an integer that may need more than 64 bits
_DIGITS, _ZEROS = bytes.maketrans(b"123456789", b"0" * 9), b"0" * 19


def _fast(raw: Bytes) -> Snapshot:
    """The snapshot of a canonical text, whose line breaks may be elsewhere; any other raises one error or another."""
    _check_characters(raw)
    file = _decode_file(raw)
    again, text = _encode(file), raw.replace(b"\n", b"")  # no string holds a line break
    extensions: dict[str, Raw] = {}
    if again != text:  # keys that begin with `x-` come last
        extensions = {key: value for key, value in _decode_top(raw).items() if key not in _fields(_File)}
        if again[:-1] + extension_text(extensions).replace(b"\n", b"") + b"}" != text or b"\r" in text:
            raise _OtherTextError
        for key, value in extensions.items():
            if not key.startswith("x-") or depth(_strictly(bytes(value).decode())) > _DEEPEST:
                raise _OtherTextError
    found = Snapshot(file.models, file.ensembles, file.aliases, extensions)
    _check_carried(VersionRecord, [one for model in found.models.values() for one in model.versions.values()])
    _check_carried(EnsembleRecord, [*found.ensembles.values()])
    _check_names({"models": found.models, "ensembles": found.ensembles, "aliases": found.pointers})
    _check(found)
    return found


def _check_carried(kind: type[Record], records: list[Any]) -> None:
    """Refuse carried parts of another type, or whose text is not the canonical one; equal ones are checked once."""
    for key, declared in _fields(kind).items():
        plain, beside, _ = _parts(declared)
        found = [*{*map(bytes, filter(None, map(attrgetter(key), records)))}] if plain is Raw else []
        if any(len(text) > 2 * _DEEPEST and text.count(b"{") + text.count(b"[") > _DEEPEST for text in found):
            raise _OtherTextError
        for start in range(0, len(found), _TOGETHER):
            together = b"[%b]" % b",".join(found[start : start + _TOGETHER])  # without those that are UNSET
            msgspec.convert(_decode(together), list[beside])  # type: ignore[valid-type]  # made of the field's type
            if _encode_sorted(_decode_literally(together)) != together:
                raise _OtherTextError
            if _ZEROS in together.translate(_DIGITS) and _LONG.search(together):
                raise _OtherTextError


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
    _check_names({key: table[key] for key in _SECTIONS if isinstance(table.get(key), dict)})
    file, top = record(_File, "", table), _decode_top(raw)  # keys of other programs keep their text, line ends apart
    extensions = {key: Raw(bytes(top[key]).replace(b"\r\n", b"\n")) for key in file.extensions or {}}
    found = Snapshot(file.models, file.ensembles, file.aliases, extensions)
    _check(found)
    return found


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


def record(kind: type[R], place: str, fields: Any) -> R:
    """The record of parsed JSON, and the records in it, each by the same law.

    Args:
        kind: the type of the record, whose fields say what they must be.
        place: where it is in the file, for messages, such as `/models/a/versions/1f2e3d4c5b6a`.
        fields: the parsed JSON.

    Raises:
        RegistryError: FIELD_TYPE, MISSING_KEY, UNKNOWN_KEY, REGISTRY_DEPTH, and the titles of limits in the types.
    """
    where = place or "the top of the registry"
    if not isinstance(fields, dict):
        _refuse("FIELD_TYPE", f"expected an object at {where}, got {str(fields)[:60]}")
    known = _fields(kind)
    needed = [key for key, declared in known.items() if UnsetType not in get_args(declared)]
    if missing := [key for key in needed if key not in fields]:
        _refuse("MISSING_KEY", f"expected {needed} at {where}, {missing} are missing")
    if unknown := [key for key in fields if key not in known and not key.startswith("x-")]:
        _refuse(
            "UNKNOWN_KEY", f"expected {sorted(known)} or keys that begin with 'x-' at {where}, got {unknown[0][:60]!r}"
        )
    values = {key: _value(f"{place}/{key}", fields[key], known[key]) for key in fields if key in known}
    extensions = {key: _raw(f"{place}/{key}", fields[key]) for key in fields if key not in known}
    return kind(**values, extensions=extensions or UNSET)


def _value(place: str, value: Any, declared: Any) -> Any:
    """The value of a field that is declared with this type."""
    plain, beside, inner = _parts(declared)
    if inner and get_origin(plain) is dict and isinstance(value, dict):
        names = get_args(plain)[0]
        return {_value(place, name, names): record(inner, f"{place}/{name}", one) for name, one in value.items()}
    if inner and get_origin(plain) is tuple and isinstance(value, list):
        return tuple(record(inner, f"{place}/{index}", one) for index, one in enumerate(value))
    try:
        converted = msgspec.convert(value, beside if plain is Raw else declared)
    except msgspec.ValidationError as error:
        if isinstance(beside, Meta) and beside.title and type(value) is plain:
            _refuse(beside.title, f"expected {beside.description} at {place}, got {str(value)[:90]!r}")
        _refuse("FIELD_TYPE", f"the value at {place} is wrong: {error}; got {str(value)[:60]}")
    return _raw(place, value) if plain is Raw else converted


def _raw(place: str, value: Any) -> Raw:
    if depth(value) > _DEEPEST:
        _refuse("REGISTRY_DEPTH", f"expected at most {_DEEPEST} levels at {place}")
    return Raw(canonical(value).encode())


@lru_cache
def _fields(kind: type[Record]) -> dict[str, Any]:
    """The fields of a record and their types, without the keys of other programs."""
    return {one.name: one.type for one in msgspec.structs.fields(kind) if one.name != "extensions"}


@lru_cache
def _parts(declared: Any) -> tuple[Any, Any, type[Record] | None]:
    """A declared type without UNSET: the plain type, what `Annotated` puts beside it, the records that it holds."""
    (plain,) = {*get_args(declared)} - {UnsetType} if UnsetType in get_args(declared) else (declared,)
    if get_origin(plain) is Annotated:
        return plain.__origin__, plain.__metadata__[0], None
    inner = [one for one in get_args(plain) if isinstance(one, type) and issubclass(one, Record)]
    return plain, None, inner[0] if inner else None


# ---- checks that need more than one field


def _check_top(table: Any) -> None:
    """Refuse what is no registry, or one of another schema, or with keys that a newer one may have."""
    if not isinstance(table, dict) or table.get("format") != _FORMAT:
        got = table.get("format") if isinstance(table, dict) else table
        _refuse("NOT_A_REGISTRY", f"expected a registry with the format {_FORMAT!r}, got {str(got)[:60]!r}")
    schema = table.get("schema")
    if type(schema) is not int or schema < 1:
        _refuse("SCHEMA_TYPE", f"expected the schema as an integer of at least 1, got {schema!r}")
    if schema > _SCHEMA:
        msg = f"the registry has schema {schema}, this program knows up to {_SCHEMA}: update the program"
        _refuse("SCHEMA_TOO_NEW", msg)
    if unknown := sorted(key for key in table if key not in _fields(_File) and not key.startswith("x-")):
        msg = f"expected {sorted(_fields(_File))} and keys that begin with 'x-', got {unknown}"
        _refuse("UNKNOWN_KEY", msg)


def _check_names(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse invalid names, and names that differ only in capitals."""
    taken: dict[str, tuple[str, str]] = {}
    for where, section in sections.items():
        for name in section:
            check_name(name)
            here = (name, where)
            first = taken.setdefault(name.casefold(), here)
            if first is not here:
                also = f"{name!r} in {where} has the name of {first[0]!r} in {first[1]}"
                _refuse("NAME_COLLISION", f"{also}; names must differ in more than capitals")


def _check(snapshot: Snapshot) -> None:
    """Refuse numbers and times that cannot be, and references to what is not in the registry."""
    for name, model in snapshot.models.items():
        numbers = [version.n for version in model.versions.values()]
        if len(numbers) > 1 and len({*numbers}) < len(numbers):
            _refuse("VERSION_NUMBER", f"expected different numbers for the versions of {name!r}, got {sorted(numbers)}")
        if model.last is not UNSET and model.last <= max(numbers, default=0):
            _refuse("VERSION_NUMBER", f"expected 'last' of {name!r} beyond its versions, got {model.last}")
        for id, version in model.versions.items():
            if not _is_time(version.created):
                _refuse_time(f"{name}@{id}", version.created)
    for name, ensemble in snapshot.ensembles.items():
        check_ensemble(name, ensemble)
        if lost := [member for member in ensemble.members if snapshot.model_of(member) is None]:
            _refuse("DANGLING", f"the ensemble {name!r} holds {lost}, which the registry does not have")
    for name, alias in snapshot.pointers.items():
        _check_alias(name, alias, snapshot)


def check_ensemble(name: str, ensemble: EnsembleRecord) -> None:
    """Refuse (FIELD_TYPE) an ensemble with an invalid time, members or numbers."""
    what, members = f"the ensemble {name!r}", ensemble.members
    if not _is_time(ensemble.created):
        _refuse_time(what, ensemble.created)
    if not members or len(set(members)) != len(members):
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
    if "\\" in text or not text.isascii() or "\x7f" in text:
        try:
            _check_characters(canonical(value).encode())
        except TextError as error:
            raise RegistryError("REGISTRY_ENCODING", f"the registry holds {error}") from None
    return value


def _check_characters(text: Bytes) -> None:
    """Refuse what a terminal would obey rather than show; every escape of a character by its number is refused."""
    odd = "" if text.isascii() and b"\x7f" not in text else text.translate(None, _ASCII).decode()
    escapes = text.replace(b"\\\\", b"").decode() if b"\\" in text else ""
    if found := _UGLY.search(odd) or _ESCAPE.search(escapes):
        _refuse("CONTROL_CHARACTER", f"the registry holds the control character {found[0]!r}")


def _refuse(reason: str, message: str) -> NoReturn:
    raise RegistryError(reason, message)
