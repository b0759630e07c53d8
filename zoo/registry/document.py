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
    "1f2e3d4c5b6a":{"n":1,"spec":{...},...},
    "9a8b7c6d5e4f":{"n":2,"spec":{...},...}
    }}
    },
    "schema":1
    }

One version is one line, keys are sorted, and models stand in the order of a hash of their names, so that
two branches of a project that each add a model rarely touch neighbouring lines. A version's line that is
not changed is written back as it was read.

A small file is checked whole whenever it is read. Of a large one the frame is, and each version's line when
it is first used, where most of the time would go; a line that nobody uses is carried over as it stands,
byte for byte. Garbage collection and merging check every line, whatever the size.
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, cast

from zoo._json import TextError, canonical, parse_printed, parse_strictly, values_of
from zoo.registry.layered import added, plain
from zoo.registry.references import RegistryError
from zoo.registry.schema import check_sections, check_top, check_version, check_versions

_SECOND = re.compile(r'\}[ \t\r]*,[ \t\r]*"[0-9a-f]{12}"')  # what may be another version on one line
_VERSION_LINE = re.compile(r'^("[0-9a-f]{12}":)(\{.*\})(?=,?$)', re.MULTILINE)
_MARK, _MARKED = r"\u0001", "\x01"  # of a line that is read later, as JSON and as read: no text may hold it
_UGLY = re.compile("[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # terminal controls, reversed text
_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u([0-9a-fA-F]{4})")
_FORMAT, SCHEMA = "zoo-registry", 1
_SMALL = 2**18  # bytes: some 250 versions, 5 ms
_TOGETHER = 50  # lines read back at once
_NO_VERSIONS: Mapping[str, Any] = {"versions": {}}


class Line(Mapping[str, Any]):
    """A version's fields as read: its text, parsed and checked when they are first asked for."""

    __slots__ = ("_fields", "_name", "text")

    def __init__(self, name: str, text: str) -> None:
        self.text = text
        self._name = name
        self._fields: dict[str, Any] | None = None

    def fields(self) -> dict[str, Any]:
        """All fields, not to be changed; RegistryError where the line is refused."""
        if self._fields is None:
            self._fields = self.checked(_strictly(self.text))
        return self._fields

    def checked(self, fields: Any) -> dict[str, Any]:
        """What the text was read as; RegistryError where it is refused."""
        check_version(self._name, fields, deep=self.text.count("{") + self.text.count("["))
        return cast("dict[str, Any]", fields)

    def __getitem__(self, key: str) -> Any:
        return self.fields()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields())

    def __len__(self) -> int:
        return len(self.fields())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Line):
            return other.text == self.text or other.fields() == self.fields()
        return self.fields() == other

    __hash__ = None  # type: ignore[assignment]  # as a dict


@dataclass(frozen=True)
class Document:
    """A registry's content as plain data. Functions that change it make another.

    Args:
        models: name -> `{"versions": {id: fields}}`, and `"last"` where the newest numbers were removed.
        ensembles: name -> fields.
        aliases: name -> fields.
        extensions: keys beginning with `x-` -> the JSON text of the value, kept as it stands.
    """

    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ensembles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    extensions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def folded(self) -> Mapping[str, str]:
        """Every name without its capitals -> the name: models, ensembles and aliases share one name space."""
        return {name.casefold(): name for section in (self.models, self.ensembles, self.aliases) for name in section}

    def with_model(self, name: str, model: Mapping[str, Any]) -> Document:
        """With a model added or replaced."""
        changed = Document(added(self.models, name, model), self.ensembles, self.aliases, self.extensions)
        folded = self.folded if name in self.models else added(self.folded, name.casefold(), name)
        changed.__dict__["folded"] = folded  # a batch of a thousand would count the names a thousand times
        return changed

    def settled(self) -> Document:
        """With plain tables, and each new version as the line it is written as, read back and checked.

        Raises:
            RegistryError: what a line is refused for; ARGUMENT where reading it gives something else.
        """
        models = {**plain(self.models)}
        new = {(name, key): fields for name, key, fields in self.versions() if type(fields) is not Line}
        lines = printed(new)
        for name in {name: None for name, _ in new}:
            versions = {key: lines.get((name, key), fields) for key, fields in models[name]["versions"].items()}
            models[name] = {**models[name], "versions": versions}
        return replace(self, models=models)

    def versions(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Name, id and fields of every version."""
        for name, model in plain(self.models).items():
            for version, fields in model["versions"].items():
                yield name, version, fields


def printed(new: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[tuple[str, str], Line]:
    """The lines of new versions, by name and id, read back at once.

    Raises:
        RegistryError: what a line is refused for; ARGUMENT where reading it gives something else.
    """
    lines = {place: Line("@".join(place), _text(fields)) for place, fields in new.items()}
    places = list(lines)
    for begin in range(0, len(places), _TOGETHER):
        part = places[begin : begin + _TOGETHER]
        found = _strictly(f"[{','.join([lines[place].text for place in part])}]", parse_printed)
        for place, fields in zip(part, found, strict=True):
            if lines[place].checked(fields) != new[place]:
                raise RegistryError("ARGUMENT", f"expected plain data of {'@'.join(place)}: lists, and keys of strings")
    return lines


def _text(fields: Any, *, ordered: bool = True) -> str:
    try:
        return canonical(fields, ordered=ordered)
    except (ValueError, TypeError) as error:
        raise RegistryError("ARGUMENT", f"expected what a registry can hold: {error}") from error


def extensions(table: Mapping[str, Any]) -> dict[str, Any]:
    """What somebody else keeps there: keys that begin with `x-`, of a model or an alias."""
    return {key: value for key, value in table.items() if key.startswith("x-")}


def read(raw: bytes, known: Document | None = None) -> Document:
    """As `parse` for a small file, as `frame` for a large one."""
    return parse(raw, known) if len(raw) < _SMALL else frame(raw, known)


def parse(raw: bytes, known: Document | None = None) -> Document:
    """The document of a registry's bytes, every line of it checked.

    Args:
        raw: the whole file.
        known: a document whose versions need not be read again where their lines are the same.

    Raises:
        RegistryError: the first thing that is wrong, by its `reason`.

    Example:
        >>> parse(b'{"format":"zoo-registry","schema":1,"models":{},"ensembles":{},"aliases":{}}').models
        {}
    """
    with uncollected():
        text = _decoded(raw)
        document = _framed(text, known)
        try:
            check_versions(document.models)
        except RegistryError as error:
            if error.reason != "REGISTRY_JSON":
                raise
            document = _document(_strictly(text), text)  # a line that is no version: the whole text decides
            check_versions(document.models)
        return document


def frame(raw: bytes, known: Document | None = None) -> Document:
    """As `parse`, but versions that stand on a line of their own are checked when they are first used."""
    with uncollected():
        return _framed(_decoded(raw), known)


def write(document: Document) -> bytes:
    """The one text of a document, UTF-8, LF, a newline at the end."""
    models = document.models
    sections = {
        "aliases": _section([f'"{name}":{_text(fields)}' for name, fields in sorted(document.aliases.items())]),
        "ensembles": _section([f'"{name}":{_text(fields)}' for name, fields in sorted(document.ensembles.items())]),
        "format": [canonical(_FORMAT)],
        "models": _section([_model(name, models[name]) for name in sorted(models, key=_spread)]),
        "schema": [canonical(SCHEMA)],
        **{key: [text] for key, text in sorted(document.extensions.items())},
    }
    pieces = [piece for key, section in sections.items() for piece in (",\n", canonical(key), ":", *section)]
    return "".join(["{\n", *pieces[1:], "\n}\n"]).encode()


def _section(lines: list[str]) -> list[str]:
    """In pieces, since a large one takes long to copy."""
    return ["{\n", ",\n".join(lines), "\n}"]


def _model(name: str, model: Mapping[str, Any]) -> str:
    fields = [
        _versions(value) if key == "versions" else f"{canonical(key)}:{_text(value, ordered=False)}"
        for key, value in sorted(model.items())
    ]
    return f'"{name}":{{{",".join(fields)}}}'


def _versions(versions: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ",\n".join([f'"{key}":{_line(fields)}' for key, fields in sorted(versions.items())])
    return f'"versions":{{\n{lines}\n}}'


def _line(fields: Mapping[str, Any]) -> str:
    return fields.text if isinstance(fields, Line) else _text(fields)


@contextmanager
def uncollected() -> Iterator[None]:
    """For many new objects, none of them garbage: the collector would walk all of them, and torch, for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@lru_cache(maxsize=200_000)
def _spread(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _decoded(raw: bytes) -> str:
    if not raw:
        raise RegistryError("REGISTRY_JSON", f"expected a registry, got an empty file; {_RESCUE}")
    if not raw.strip(b"\0"):
        raise RegistryError("REGISTRY_ENCODING", f"expected a registry, got {len(raw):,} zeros; {_RESCUE}")
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:4]:
        raise RegistryError(
            "REGISTRY_ENCODING", "expected UTF-8 without a byte order mark; save the file again in that encoding"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RegistryError("REGISTRY_ENCODING", f"expected UTF-8: {error}; {_RESCUE}") from None


_RESCUE = "take it back from version control, or move it away and rebuild it with `zoo recover`"


def _framed(text: str, known: Document | None) -> Document:
    """With each version's line apart, to be kept, and read later; all of it checked where it is laid out otherwise."""
    frame, keys, lines = (parts := _VERSION_LINE.split(text))[::3], parts[1::3], parts[2::3]
    around = "".join(frame)
    if lines and _MARK not in around and not _SECOND.search(text):
        places = enumerate(zip(frame, keys, strict=False))
        marked = [f'{before}{key}"{_MARK}{index}"' for index, (before, key) in places]
        outside = "".join([*marked, frame[-1]])
        with suppress(TextError):  # which the whole text tells better
            table = parse_strictly(outside)
            for line in [line for line in lines if '"versions":' in line]:  # another model could begin in it
                parse_strictly(line)
            if _put_back(table, lines, {} if known is None else known.models):
                _check_characters(around)
                return _document(table, outside)
    document = _document(_strictly(text), text)
    check_versions(document.models)
    return document


def _document(table: Any, text: str) -> Document:
    """Of a parsed text, its names and references checked, its versions not."""
    check_top(table, _FORMAT, SCHEMA)
    check_sections(table)
    kept = {key for key in table if key.startswith("x-")}
    texts = {key: value for key, value in values_of(text) if key in kept} if kept else {}
    return Document(table["models"], table["ensembles"], table["aliases"], texts)


def _strictly(text: str, parse: Callable[[str], Any] = parse_strictly) -> Any:
    try:
        value = parse(text)
    except TextError as error:
        raise _refusal(error, text) from None
    _check_characters(text)
    return value


def _put_back(table: Any, found: list[str], known: Mapping[str, Any]) -> bool:
    """Replace the marks of lines by the lines; False where some stand elsewhere than versions do.

    What was read before is kept where it says the same: it need not be parsed again.
    """
    models = table.get("models") if isinstance(table, dict) else None
    if not isinstance(models, dict):
        return False
    count = 0
    for name, model in models.items():
        versions = model.get("versions") if isinstance(model, dict) else None
        if not isinstance(versions, dict):
            return False
        before = known.get(name, _NO_VERSIONS)["versions"]
        for key, mark in versions.items():
            if count == len(found) or mark != f"{_MARKED}{count}":
                return False
            old, text = before.get(key), found[count]
            versions[key] = old if isinstance(old, Line) and old.text == text else Line(f"{name}@{key}", text)
            count += 1
    return count == len(found)


def _refusal(error: TextError, text: str) -> RegistryError:
    if "\n<<<<<<< " in text or text.startswith("<<<<<<< "):
        return RegistryError(
            "REGISTRY_JSON", f"the registry holds the conflict markers of a merge ({error}); merge it with `zoo merge`"
        )
    if error.reason == "SYNTAX" and "control character" in str(error):
        return RegistryError("CONTROL_CHARACTER", f"the registry is {error}")
    reason = {"SYNTAX": "REGISTRY_JSON", "DEPTH": "REGISTRY_DEPTH"}.get(error.reason, error.reason)
    return RegistryError(reason, f"the registry is {error}; correct it, or {_RESCUE}")


def _check_characters(text: str) -> None:
    """Refuse what a terminal would obey rather than show, and halves of surrogate pairs."""
    if not text.isascii() or "\x7f" in text:
        ugly = _UGLY.search(text)
        if ugly:
            raise RegistryError("CONTROL_CHARACTER", f"the registry holds the control character {ugly[0]!r}")
    if "\\" not in text:
        return
    high: re.Match[str] | None = None  # the half that the next escape must complete
    for match in _ESCAPE.finditer(text):
        code = int(match[1], 16)
        if (0xDC00 <= code <= 0xDFFF) != (high is not None and high.end() == match.end() - 6):
            raise _half(high or match)
        high = match if 0xD800 <= code <= 0xDBFF else None
        if (code < 0x20 and code not in (0x09, 0x0A)) or _UGLY.match(chr(code)):
            raise RegistryError("CONTROL_CHARACTER", f"the registry holds the control character \\u{match[1]}")
    if high is not None:
        raise _half(high)
    backspace = re.search(r"(?<!\\)(?:\\\\)*\\[bfr]", text)
    if backspace:
        raise RegistryError("CONTROL_CHARACTER", f"the registry holds the control character {backspace[0][-2:]}")


def _half(match: re.Match[str]) -> RegistryError:
    return RegistryError("REGISTRY_ENCODING", f"the registry holds half a surrogate pair, \\u{match[1]}")
