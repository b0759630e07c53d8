"""`Entry` and `EnsembleEntry`: what the registry knows of a version and of an ensemble, without its blobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo._names import unknown
from zoo.registry.document import Document, extensions
from zoo.registry.notes import texts_of
from zoo.registry.references import RegistryError, check_name, is_id, parse_reference
from zoo.registry.schema import check_ensemble

if TYPE_CHECKING:
    from zoo.models.spec import Spec


class _Described:
    """What a version and an ensemble have in common."""

    fields: Mapping[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.fields["classes"])

    @property
    def created(self) -> str:
        """When it was registered, UTC."""
        return str(self.fields["created"])

    @property
    def note(self) -> str:
        """Free text."""
        return str(self.fields.get("note", ""))

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags, sorted."""
        return tuple(self.fields.get("tags", ()))


@dataclass(frozen=True)
class Entry(_Described):
    """One version of one model. Made by the registry; reading its fields touches no blob.

    Args:
        name: the model's name.
        id: 12 hex digits of its content: name, spec and weights.
        fields: the version's line, as plain data.
    """

    name: str
    id: str
    fields: Mapping[str, Any] = field(repr=False, hash=False)

    @property
    def number(self) -> int:
        """The version's number, from 1; never used again."""
        return int(self.fields["n"])

    @property
    def reference(self) -> str:
        """`name@number`."""
        return f"{self.name}@{self.number}"

    @property
    def spec(self) -> Spec:
        """What the model computes.

        Raises:
            RegistryError: SPEC, such as an architecture that is not in the table of this program.
        """
        from zoo.models.spec import Spec  # torch comes only with a model

        try:
            return Spec.from_dict(self.fields["spec"])
        except (ValueError, TypeError) as error:
            raise RegistryError("SPEC", f"the spec of {self.reference} cannot be used: {error}") from error

    @property
    def architecture(self) -> str:
        """The architecture's name."""
        return str(self.fields["spec"].get("architecture", ""))

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return int(self.fields["parameters"])

    @property
    def sha256(self) -> str:
        """Hash of the blob's bytes, 64 hex digits."""
        return str(self.fields["blob"].removeprefix("sha256:"))

    @property
    def bytes(self) -> int:
        """Size of the blob."""
        return int(self.fields["bytes"])

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Name -> `{"value", "unit", "n", "frames"}`, as far as they are known."""
        return {name: dict(metric) for name, metric in self.fields.get("metrics", {}).items()}

    @property
    def recipe(self) -> dict[str, Any] | None:
        """`Recipe.to_dict()` of the training, or None."""
        return dict(self.fields["recipe"]) if "recipe" in self.fields else None

    @property
    def parents(self) -> tuple[str, ...]:
        """Ids of what it was averaged or distilled from."""
        return tuple(self.fields.get("parents", ()))

    @property
    def kind(self) -> str:
        """trained, averaged or imported."""
        return str(self.fields.get("kind", "trained"))

    @property
    def trained_on(self) -> str:
        """Fingerprint of the training frames, or ""."""
        return str(self.fields.get("trained_on", ""))

    @property
    def software(self) -> dict[str, str]:
        """Versions of what registered it."""
        return dict(self.fields.get("software", {}))

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {"name": self.name, "number": self.number, "id": self.id, **_without(self.fields, "n")}


@dataclass(frozen=True)
class EnsembleEntry(_Described):
    """An ensemble as plain data: which versions, and how they decide together.

    Args:
        name: its name.
        fields: `members` (ids), `rule` (JSON), `classes`, and where known `weights`, `temperatures`,
            `fitted_on` (fingerprint of the frames that the weights were fitted on), `note`, `tags`.
    """

    name: str
    fields: Mapping[str, Any] = field(repr=False, hash=False)

    @property
    def members(self) -> tuple[str, ...]:
        """Ids of the members, in order; each is a reference."""
        return tuple(self.fields["members"])

    @property
    def rule(self) -> dict[str, Any]:
        """The rule as plain data."""
        return dict(self.fields["rule"])

    @property
    def weights(self) -> tuple[float, ...] | None:
        """One per member, or None."""
        return tuple(self.fields["weights"]) if "weights" in self.fields else None

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """One per member, or None."""
        return tuple(self.fields["temperatures"]) if "temperatures" in self.fields else None

    @property
    def fitted_on(self) -> str:
        """Fingerprint of the frames that the weights were fitted on, or ""."""
        return str(self.fields.get("fitted_on", ""))

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {"name": self.name, **self.fields}


def entries(document: Document) -> list[Entry]:
    """All versions, by name and number."""
    found = [Entry(name, version, fields) for name, version, fields in document.versions()]
    return sorted(found, key=lambda entry: (entry.name, entry.number))


def rows(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """One row per version: what it is, a column per metric, when it was made."""
    metrics = sorted({name for entry in found for name in entry.metrics})
    return [
        {
            "name": entry.name,
            "number": entry.number,
            "id": entry.id,
            "architecture": entry.architecture,
            "parameters": entry.parameters,
            **{name: entry.metrics.get(name, {}).get("value") for name in metrics},
            "created": entry.created,
        }
        for entry in found
    ]


def pointed(fields: Mapping[str, Any]) -> str:
    """Where an alias points, as a reference."""
    return str(fields.get("ensemble") or f"{fields['model']}@{fields['version']}")


def resolve(document: Document, reference: str) -> Entry:
    """The version that a reference points to.

    Args:
        document: the registry's content.
        reference: `name` (its newest version), `name@3`, `name@id`, an id alone, or an alias.

    Raises:
        RegistryError: UNKNOWN, with the names that come near; NAME or ARGUMENT for what is no reference.
    """
    wanted = parse_reference(reference)
    if is_id(reference) and (exact := _by_id(document, reference)):  # a name may not stand in the way of an id
        return exact
    if wanted.name in document.aliases and reference == wanted.name:
        fields = document.aliases[wanted.name]
        if "ensemble" in fields:
            raise RegistryError(
                "UNKNOWN", f"{reference!r} is an alias of the ensemble {fields['ensemble']!r}, not of a model"
            )
        wanted = parse_reference(f"{fields['model']}@{fields['version']}")
    versions = document.models.get(wanted.name, {"versions": {}})["versions"]
    if not versions:
        raise RegistryError("UNKNOWN", _unknown_name(document, wanted.name))
    for version, fields in versions.items():
        if version == wanted.id or fields["n"] == wanted.number:
            return Entry(wanted.name, version, fields)
    if wanted.id or wanted.number:
        numbers = ", ".join(str(number) for number in sorted(fields["n"] for fields in versions.values()))
        raise RegistryError(
            "UNKNOWN", f"{wanted.name!r} has no version {reference.partition('@')[2]}; it has {numbers}"
        )
    newest = max(versions, key=lambda version: versions[version]["n"])
    return Entry(wanted.name, newest, versions[newest])


def version(document: Document, name: str, id: str) -> Entry:
    """A version that is known to be there."""
    return Entry(name, id, document.models[name]["versions"][id])


def resolve_ensemble(document: Document, name: str) -> EnsembleEntry:
    """The ensemble of a name or an alias.

    Raises:
        RegistryError: UNKNOWN, NAME.
    """
    check_name(name)
    name = document.aliases.get(name, {}).get("ensemble", name)
    if name not in document.ensembles:
        have = ", ".join(sorted(document.ensembles)) or "(there are none)"
        raise RegistryError("UNKNOWN", f"unknown ensemble {name!r}; expected one of {have}")
    return EnsembleEntry(name, document.ensembles[name])


def _by_id(document: Document, wanted: str) -> Entry | None:
    for name, version, fields in document.versions():
        if version == wanted:
            return Entry(name, version, fields)
    return None


def _unknown_name(document: Document, name: str) -> str:
    if name in document.ensembles:
        return f"{name!r} is an ensemble, expected a model"
    if is_id(name):
        return f"no version has the id {name!r}"
    return unknown("model", name, [*document.aliases, *(name for name, m in document.models.items() if m["versions"])])


def _numbers(key: str, given: Iterable[Any]) -> list[float]:
    try:
        return [float(number) for number in given]
    except (TypeError, ValueError):
        raise RegistryError("ARGUMENT", f"expected {key} as numbers, got {str(given)[:80]}") from None


def _without(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}


def select(document: Document, pattern: str) -> list[Entry]:
    """The version of a reference, or with `name@*` all versions of a model.

    Raises:
        RegistryError: UNKNOWN, NAME, ARGUMENT.
    """
    name, _, version = pattern.partition("@")
    if version != "*":
        return [resolve(document, pattern)]
    resolve(document, name)
    return [entry for entry in entries(document) if entry.name == name]


def pinned(document: Document, target: str) -> str:
    """What an alias is to point to, in words that never name another later: an ensemble, `name@id`, or ""."""
    if not target or target in document.ensembles:
        return target
    entry = resolve(document, target)
    return f"{entry.name}@{entry.id}"


def all_pinned(document: Document, reference: str) -> list[str]:
    """All that is to be removed, likewise: an alias, an ensemble, or versions as of `select`."""
    if reference in document.aliases or reference in document.ensembles:
        return [reference]
    return [f"{entry.name}@{entry.id}" for entry in select(document, reference)]


def place(document: Document, target: str) -> dict[str, Any]:
    """Where an alias points: `{"model", "version"}`, `{"ensemble"}`, or `{}` for "".

    Raises:
        RegistryError: UNKNOWN, NAME, ARGUMENT.
    """
    if not target:
        return {}
    if target in document.ensembles:
        return {"ensemble": target}
    entry = resolve(document, target)
    return {"model": entry.name, "version": entry.number}


def ensemble_fields(document: Document, data: Mapping[str, Any], created: str) -> dict[str, Any]:
    """The fields of a new ensemble: members by id, classes in order, the numbers as plain lists.

    Raises:
        RegistryError: ARGUMENT: something is missing or cannot be kept; UNKNOWN member.
    """
    members = [resolve(document, member) for member in texts_of("members", data.get("members", ()))]
    if not members or "rule" not in data:
        raise RegistryError("ARGUMENT", f"expected an ensemble with 'members' and 'rule', got {sorted(data)}")
    rule = data["rule"] if isinstance(data["rule"], Mapping) else {"rule": str(data["rule"])}
    fields: dict[str, Any] = {
        "members": [entry.id for entry in members],
        "rule": dict(rule),
        "classes": texts_of("classes", data.get("classes") or members[0].classes),
        "created": created,
        **extensions(data),
    }
    for key in ("weights", "temperatures"):
        if data.get(key) is not None:
            fields[key] = _numbers(key, data[key])
    more = {key: data[key] for key in ("fitted_on", "note", "tags") if data.get(key)}
    unknown_keys = sorted(set(data) - {*fields, *more, "name", "weights", "temperatures", "fitted_on", "note", "tags"})
    if unknown_keys:
        raise RegistryError("ARGUMENT", f"expected an ensemble's fields, got {unknown_keys} among them")
    check_ensemble(str(data.get("name", "")), {**fields, **more})
    return {**fields, **more}
