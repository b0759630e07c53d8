"""What a registry holds: names and references, typed records of the file's lines, and a snapshot of all of them.

References are `cylinder-a` (a model's newest version, an ensemble, or an alias), `cylinder-a@3` (version number 3),
`cylinder-a@1f2e3d4c5b6a` and `1f2e3d4c5b6a` (the version with this content). How records are read and written is in
`text`; what changes them in `transaction`. Nothing here imports torch.
"""

from __future__ import annotations

import builtins  # for `builtins.list`, since Snapshot has a method of that name
import re
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from zoo._json import RefusalError
from zoo._names import Patterns, matching, unknown
from zoo._notebook import Table, html

if TYPE_CHECKING:
    import pandas

    from zoo.models.spec import Spec

MOST_LETTERS = 96
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?", re.ASCII)
_RESERVED = re.compile(  # by references, and by Windows, which can make no file of a device's name
    r"(?:latest|none|null|sha256|v[0-9]+)\Z|(?:con|prn|aux|nul|(?:com|lpt)[0-9])(?:\.|\Z)", re.ASCII
)
_NUMBER = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_ID = "[0-9a-f]{12}"
_DIGEST = "sha256:[0-9a-f]{64}"
LAST_NUMBER = 999_999_999  # the highest that a reference can name
_MOST = 2**63 - 1


class RegistryError(RefusalError):
    """A refusal of the registry; `reason` says in one word what is wrong, `message` is the text without it.

    The text of the file: REGISTRY_ENCODING, REGISTRY_JSON, REGISTRY_DEPTH, DUPLICATE_KEY, NUMBER_RANGE,
    CONTROL_CHARACTER, NOT_A_REGISTRY, SCHEMA_TYPE, SCHEMA_TOO_NEW, UNKNOWN_KEY, MISSING_KEY, FIELD_TYPE, NAME,
    NAME_COLLISION, ID, DIGEST, VERSION_NUMBER, DANGLING.
    The request: UNKNOWN, SPEC, EXISTS, HELD, CLASSES, ARGUMENT, CONFLICT, LOCKED, NO_REGISTRY, LINK.
    The disk: DISK (nothing has changed), NOT_DURABLE (changed, but a power cut may undo it).
    A blob: MISSING, NOT_A_FILE, BLOB_SIZE, BLOB_DIGEST, BLOB, PROBE.
    """


# ---- names and references


@dataclass(frozen=True)
class Reference:
    """A reference split into its parts: a name, and the number or the id of a version, or neither."""

    name: str
    number: int | None = None
    id: str | None = None


def check_name(name: object) -> None:
    """Refuse (NAME) what cannot be the name of a model, an ensemble or an alias, on this system or another.

    Example:
        >>> check_name("cylinder-a")
        >>> check_name("../x")
        Traceback (most recent call last):
        zoo.registry.types.RegistryError: expected a name of ASCII letters, digits, '.', '_' and '-', at most \
96, that begins and ends with a letter or digit, got '../x' [NAME]
    """
    text = name if isinstance(name, str) else f"{name!r}, which is not a string"
    if not _NAME.fullmatch(text) or ".." in text:
        expected = f"expected a name of ASCII letters, digits, '.', '_' and '-', at most {MOST_LETTERS}"
        raise RegistryError("NAME", f"{expected}, that begins and ends with a letter or digit, got {text[:120]!r}")
    if _RESERVED.match(text.casefold()):
        raise RegistryError("NAME", f"the name {text!r} is reserved; choose another, such as {'my-' + text!r}")


def check_digest(digest: object) -> None:
    """Refuse (DIGEST) what is not `sha256:` and 64 lower-case hex digits."""
    if not isinstance(digest, str) or not re.fullmatch(_DIGEST, digest):
        raise RegistryError("DIGEST", f"expected 'sha256:' and 64 hex digits, got {str(digest)[:90]!r}")


is_id = re.compile(_ID).fullmatch  # of a text: whether it has the form of a version's id


def parse_reference(text: str) -> Reference:
    """The parts of a reference; RegistryError (NAME, ARGUMENT) where it is none.

    Example:
        >>> parse_reference("cylinder-a@3")
        Reference(name='cylinder-a', number=3, id=None)
    """
    name, at, version = str(text).partition("@")
    check_name(name)
    if is_id(version):
        return Reference(name, id=version)
    if not at or _NUMBER.fullmatch(version):
        return Reference(name, number=int(version) if at else None)
    raise RegistryError("ARGUMENT", f"expected NAME, NAME@NUMBER or NAME@ID (12 hex digits), got {str(text)[:120]!r}")


# ---- records: the lines of the file

Extensions = Annotated[dict[str, Raw], Meta(min_length=1, max_length=0)]  # not read as a field
Id = Annotated[str, Meta(pattern=rf"^{_ID}\Z", title="ID", description="12 hex digits")]
Digest = Annotated[str, Meta(pattern=rf"^{_DIGEST}\Z", title="DIGEST", description="'sha256:' and 64 hex digits")]
Number = Annotated[
    int, Meta(ge=1, le=LAST_NUMBER, title="VERSION_NUMBER", description=f"a number from 1 to {LAST_NUMBER:,}")
]
Integer = Annotated[int, Meta(ge=-(2**63), le=_MOST)]
Strings = tuple[str, ...]
Object = Annotated[Raw, dict[str, Any]]


class Metric(Struct, kw_only=True):
    """One recorded metric; it may have further fields."""

    frames: str | UnsetType = UNSET
    n: Integer | UnsetType = UNSET
    unit: str | UnsetType = UNSET
    value: int | float


class Probe(Struct):
    """A model's recorded answer to the probe batch; see `zoo.checkpoint.exam`."""

    digest: str
    values: list[float]


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all records share: keys that begin with `x-`, which are read apart and written behind the others.

    The fields are in the order of the file; absent ones are UNSET. Their types say what a value must be: where a
    limit has a title, this is the reason with which the registry refuses what is beyond it. Parts that the registry
    only carries remain JSON text (`Raw`), so that every number comes back as it was written; the type beside `Raw` is
    that of the value.
    """

    extensions: Extensions | UnsetType = UNSET


class VersionRecord(Record, frozen=True, kw_only=True, gc=False):
    """One version of a model, as its line in the file."""

    blob: Digest
    bytes: Annotated[int, Meta(ge=1, le=_MOST)]
    classes: Annotated[Raw, list[str]]
    created: str
    kind: Literal["trained", "averaged", "imported", "distilled"] | UnsetType = UNSET
    licence: str | UnsetType = UNSET
    metrics: Annotated[Raw, dict[str, Metric]] | UnsetType = UNSET
    n: Number
    note: str | UnsetType = UNSET
    parameters: Annotated[int, Meta(ge=0, le=_MOST)]
    parents: Strings | UnsetType = UNSET
    probe: Annotated[Raw, Probe] | UnsetType = UNSET
    recipe: Object | UnsetType = UNSET
    software: Object | UnsetType = UNSET
    spec: Object
    tags: Strings | UnsetType = UNSET
    trained_on: str | UnsetType = UNSET


class ModelRecord(Record, frozen=True, kw_only=True):
    """A model: its versions by id, and the last number used where the versions that had it were removed."""

    last: Number | UnsetType = UNSET
    versions: dict[Id, VersionRecord]

    @property
    def last_number(self) -> int:
        """The highest number that the model's versions ever had, removed ones included."""
        return max([self.last or 0, *(version.n for version in self.versions.values())])


NO_MODEL = ModelRecord(versions={})


class EnsembleRecord(Record, frozen=True, kw_only=True):
    """An ensemble: its members' ids and how they are combined."""

    classes: Strings
    created: str
    fitted_on: str | UnsetType = UNSET
    licence: str | UnsetType = UNSET
    members: tuple[Id, ...]
    note: str | UnsetType = UNSET
    rule: Object
    tags: Strings | UnsetType = UNSET
    temperatures: Annotated[Raw, list[float]] | UnsetType = UNSET
    weights: Annotated[Raw, list[float]] | UnsetType = UNSET


class Target(Record, frozen=True, kw_only=True):
    """What an alias points to: an ensemble, or a version of a model by its number."""

    ensemble: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    version: Integer | UnsetType = UNSET

    def __str__(self) -> str:
        return str(self.ensemble) if self.ensemble is not UNSET else f"{self.model}@{self.version}"


class AliasRecord(Record, frozen=True, kw_only=True):
    """An alias: what it points to, and what it pointed to before, latest first."""

    before: tuple[Target, ...] | UnsetType = UNSET
    ensemble: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    version: Integer | UnsetType = UNSET

    @property
    def target(self) -> Target:
        """What it points to now."""
        return Target(ensemble=self.ensemble, model=self.model, version=self.version)


T = TypeVar("T")
R = TypeVar("R", bound=Record)
_encode = msgspec.json.Encoder().encode


def encoded(record: Record) -> bytes:
    """The record's JSON, keys sorted, without spaces; those that begin with `x-` come last in that order anyway."""
    changed: dict[str, Any] = {}
    if isinstance(record, AliasRecord) and record.before:
        changed["before"] = [Raw(encoded(target)) for target in record.before]
    if record.extensions is UNSET and not changed:
        return _encode(record)
    text = _encode(msgspec.structs.replace(record, extensions=UNSET, **changed))
    return text[:-1] + extension_text(record.extensions or {}) + b"}"


def extension_text(extensions: Extensions) -> bytes:
    """The last keys of a record's JSON, each after a comma."""
    return b"".join(b",%b:%b" % (_encode(key), bytes(raw)) for key, raw in sorted(extensions.items()))


def plain(record: VersionRecord | EnsembleRecord) -> dict[str, Any]:
    """The record as plain data."""
    found: dict[str, Any] = msgspec.json.decode(encoded(record))
    return found


# ---- entries: records with their names


def _of_record(key: str, default: T, meaning: str) -> T:
    """A property with this meaning: a field of `record` as plain data, or the default where it is absent."""

    def read(self: Entry | EnsembleEntry) -> Any:
        value = getattr(self.record, key)
        found = msgspec.json.decode(value) if isinstance(value, Raw) else value
        return copy(default) if found is UNSET else tuple(found) if isinstance(found, list) else found

    return cast("T", property(read, doc=meaning))


_STRINGS: tuple[str, ...] = ()
_NUMBERS: tuple[float, ...] | None = None
_MAPPING: dict[str, Any] = {}
_MAPPING_OR_NONE: dict[str, Any] | None = None


class _Described(Struct, frozen=True):
    """What versions and ensembles are described by."""

    classes = _of_record("classes", _STRINGS, "Names of the classes, in the order of the logits.")
    created = _of_record("created", "", "When it was registered, UTC.")
    licence = _of_record("licence", "", "Under which licence it may be used, such as Apache-2.0.")
    note = _of_record("note", "", "Free text.")
    tags = _of_record("tags", _STRINGS, "Short words, sorted.")


class Entry(_Described, frozen=True):
    """One version of one model. Made by the registry; reading its fields touches no blob.

    Args:
        name: the model's name.
        id: 12 hex digits of its content: name, spec and weights.
        record: the version's line.
    """

    name: str
    id: str
    record: VersionRecord

    number = _of_record("n", 0, "The version's number, from 1; never used again.")
    bytes = _of_record("bytes", 0, "Size of the blob.")
    kind = _of_record("kind", "trained", "One of trained, averaged, imported, distilled.")
    metrics = _of_record("metrics", _MAPPING, 'Name -> `{"value", "unit", "n", "frames"}`, as far as they are known.')
    parameters = _of_record("parameters", 0, "Number of trainable parameters.")
    parents = _of_record("parents", _STRINGS, "Ids of the versions it was averaged or distilled from.")
    probe = _of_record("probe", _MAPPING_OR_NONE, "The model's answer to the probe batch at registration, or None.")
    recipe = _of_record("recipe", _MAPPING_OR_NONE, "`Recipe.to_dict()` of the training, or None.")
    software = _of_record("software", _MAPPING, "Versions of the software that registered it.")
    spec_data = _of_record("spec", _MAPPING, "The spec as plain data, also of an architecture unknown to this program.")
    trained_on = _of_record("trained_on", "", 'Fingerprint of the training frames, or "".')

    def __hash__(self) -> int:
        return hash((self.name, self.id))

    def __repr__(self) -> str:
        return f"Entry({self.reference!r}, id={self.id!r})"

    @property
    def reference(self) -> str:
        """`name@number`."""
        return f"{self.name}@{self.number}"

    @property
    def sha256(self) -> str:
        """Hash of the blob's bytes, 64 hex digits."""
        return self.record.blob.removeprefix("sha256:")

    @property
    def spec(self) -> Spec:
        """What the model computes.

        Raises:
            RegistryError: SPEC, such as an architecture that is not in this program's table.
        """
        from zoo.models.spec import Spec  # torch comes only with a model

        try:
            return Spec.from_dict(self.spec_data)
        except (ValueError, TypeError) as error:
            raise RegistryError("SPEC", f"the spec of {self.reference} cannot be used: {error}") from error

    @property
    def architecture(self) -> str:
        """The architecture's name."""
        return str(self.spec_data.get("architecture", ""))

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        fields = plain(self.record)
        return {"name": self.name, "number": fields.pop("n"), "id": self.id, **fields}


def _shown(frame: pandas.DataFrame, formats: Mapping[str, str]) -> str:
    """A table of versions in a notebook, as it is now."""
    rows: list[dict[str, Any]] = [
        {str(key): None if cell is None or cell != cell else cell for key, cell in row.items()}  # NaN is no metric
        for row in frame.to_dict("records")
    ]
    return html(f"{len(rows):,} versions", tables=[Table(rows, formats=formats)])


class EnsembleEntry(_Described, frozen=True):
    """An ensemble as plain data: which versions, and how they decide together.

    Args:
        name: its name.
        record: its line.
    """

    name: str
    record: EnsembleRecord

    members = _of_record("members", _STRINGS, "Ids of the members, in order; each is a reference.")
    rule = _of_record("rule", _MAPPING, "The rule as plain data.")
    weights = _of_record("weights", _NUMBERS, "One per member, or None.")
    temperatures = _of_record("temperatures", _NUMBERS, "One per member, or None.")
    fitted_on = _of_record("fitted_on", "", 'Fingerprint of the frames that the weights were fitted on, or "".')

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"EnsembleEntry({self.name!r}, members={self.members})"

    @property
    def reference(self) -> str:
        """Its name."""
        return self.name

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {"name": self.name, **plain(self.record)}


class Problem(Struct, frozen=True):
    """What is wrong with one version: `reason` is one word, as of the errors, `message` what is expected and there."""

    entry: Entry
    reason: str
    message: str


# ---- the content


@dataclass
class Snapshot:
    """A registry's content at one moment. It is never changed once handed out; changes are made to a `copy`.

    Args:
        models: name -> record.
        ensembles: name -> record.
        pointers: alias -> record.
        extensions: keys of the file that begin with `x-` -> the JSON text of the value, kept as it is written.
    """

    models: dict[str, ModelRecord] = field(default_factory=dict)
    ensembles: dict[str, EnsembleRecord] = field(default_factory=dict)
    pointers: dict[str, AliasRecord] = field(default_factory=dict)
    extensions: Extensions = field(default_factory=dict)
    _by_id: dict[str, str] | None = field(default=None, compare=False, repr=False)
    _folded: dict[str, str] | None = field(default=None, compare=False, repr=False)

    def copy(self) -> Snapshot:
        """Another with the same records, to be changed."""
        return Snapshot({**self.models}, {**self.ensembles}, {**self.pointers}, {**self.extensions})

    def get(self, reference: str) -> Entry:
        """The version that a reference points to; RegistryError (UNKNOWN, NAME, ARGUMENT) where there is none."""
        wanted = parse_reference(reference)
        if is_id(reference) and (name := self.model_of(reference)):  # a name must not hide an id
            return self.entry(name, reference)
        pointer = self.pointers.get(reference)
        if pointer is not None:
            if pointer.ensemble is not UNSET:
                msg = f"{reference!r} is an alias of the ensemble {pointer.ensemble!r}, not of a model"
                raise RegistryError("UNKNOWN", msg)
            wanted = parse_reference(str(pointer.target))
        model = self.models.get(wanted.name)
        if model is None or not model.versions:
            if wanted.name in self.ensembles:
                raise RegistryError("UNKNOWN", f"{wanted.name!r} is an ensemble, expected a model")
            if is_id(wanted.name):
                raise RegistryError("UNKNOWN", f"no version has the id {wanted.name!r}")
            raise RegistryError("UNKNOWN", unknown("name", wanted.name, [*self.pointers, *self.list()]))
        for id, version in model.versions.items():
            if id == wanted.id or version.n == wanted.number:
                return Entry(wanted.name, id, version)
        if wanted.id or wanted.number:
            numbers = ", ".join(map(str, sorted(version.n for version in model.versions.values())))
            after = reference.partition("@")[2]
            raise RegistryError("UNKNOWN", f"{wanted.name!r} has no version {after}; it has {numbers}")
        return self.entry(wanted.name, max(model.versions, key=lambda id: model.versions[id].n))

    def entry(self, name: str, id: str) -> Entry:
        """A version that is known to be there."""
        return Entry(name, id, self.models[name].versions[id])

    def get_ensemble(self, name: str) -> EnsembleEntry:
        """The ensemble of a name or an alias; RegistryError (UNKNOWN, NAME) where there is none."""
        check_name(name)
        pointer = self.pointers.get(name)
        name = name if pointer is None else pointer.ensemble or name
        if name not in self.ensembles:
            have = ", ".join(sorted(self.ensembles)) or "(there are none)"
            raise RegistryError("UNKNOWN", f"unknown ensemble {name!r}; expected one of {have}")
        return EnsembleEntry(name, self.ensembles[name])

    def find(self, reference: str) -> Entry | EnsembleEntry:
        """The ensemble that a name or an alias stands for, otherwise the version, as `get`."""
        pointer = self.pointers.get(reference)
        name = reference if pointer is None else pointer.ensemble
        return self.get_ensemble(reference) if name in self.ensembles else self.get(reference)

    def list(self, include: Patterns = "*", exclude: Patterns = ()) -> builtins.list[str]:
        """Sorted names of the models; shell wildcards, one or several, in both."""
        return matching(sorted(name for name, model in self.models.items() if model.versions), include, exclude)

    def entries(self, include: Patterns = "*", exclude: Patterns = ()) -> builtins.list[Entry]:
        """All versions of the models whose names match, by name and number."""
        return [
            Entry(name, id, version)
            for name in self.list(include, exclude)
            for id, version in sorted(self.models[name].versions.items(), key=lambda item: item[1].n)
        ]

    def list_ensembles(self, include: Patterns = "*", exclude: Patterns = ()) -> builtins.list[str]:
        """Sorted names of the ensembles."""
        return matching(sorted(self.ensembles), include, exclude)

    def aliases(self) -> dict[str, str]:
        """Alias -> what it points to: `name@number`, or the name of an ensemble."""
        return {name: str(pointer.target) for name, pointer in sorted(self.pointers.items())}

    def table(self, include: Patterns = "*", exclude: Patterns = ()) -> pandas.DataFrame:
        """One row per version: name, number, id, architecture, parameters, a column per metric, created."""
        import pandas

        head = ["name", "number", "id", "architecture", "parameters"]
        found = [(entry, entry.metrics) for entry in self.entries(include, exclude)]
        names = sorted({name for _, metrics in found for name in metrics})
        rows = [
            [*(getattr(entry, key) for key in head), *(metrics.get(m, {}).get("value") for m in names), entry.created]
            for entry, metrics in found
        ]
        frame = pandas.DataFrame(rows, columns=[*head, *names, *(["created"] if rows else [])])
        formats = {"parameters": ",d"} | dict.fromkeys(names, ".4f")
        object.__setattr__(frame, "_repr_html_", partial(_shown, frame, formats))  # of this one: copies are plain
        return frame

    def versions(self) -> Iterator[Entry]:
        """Every version, in no particular order."""
        for name, model in self.models.items():
            for id, version in model.versions.items():
                yield Entry(name, id, version)

    def model_of(self, id: str) -> str | None:
        """The name of the model that has the version of an id, or None."""
        if self._by_id is None:
            self._by_id = {id: name for name, model in reversed(self.models.items()) for id in model.versions}
        return self._by_id.get(id)

    def there(self, target: Target) -> bool:
        """Whether what an alias points to is in the registry."""
        if target.ensemble is not UNSET:
            return target.ensemble in self.ensembles
        model = self.models.get(target.model or "")
        return model is not None and any(version.n == target.version for version in model.versions.values())

    def namesake(self, name: str) -> str | None:
        """The name that is taken, of whatever kind, and differs from this one by capitals at most; or None."""
        if self._folded is None:
            every = (self.models, self.ensembles, self.pointers)
            self._folded = {name.casefold(): name for section in every for name in section}
        return self._folded.get(name.casefold())

    def put(self, name: str, model: ModelRecord) -> None:
        """Add or replace a model of a copy; a batch of a thousand does not count the names a thousand times."""
        self.models[name] = model
        self._by_id = None
        if self._folded is not None:
            self._folded[name.casefold()] = name

    def set(self, **sections: dict[str, Any]) -> None:
        """Replace whole sections of a copy."""
        for section, records in sections.items():
            setattr(self, section, records)
        self._folded = self._by_id = None
