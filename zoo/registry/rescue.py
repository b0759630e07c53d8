"""A lost registry rebuilt from what its blobs say of themselves, as far as they can be believed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from zoo import _files
from zoo.registry import changes, entries, intake
from zoo.registry.blobs import Blobs
from zoo.registry.document import Document
from zoo.registry.entries import Entry
from zoo.registry.references import RegistryError, check_name


def rebuild(blobs: Blobs, commit: Callable[[changes.Change], Document]) -> tuple[list[Entry], list[str]]:
    """The versions of the blobs, each once, by age, now in the registry; and what was left out, with the reason."""
    found, left_out = _found(blobs)
    refused: dict[str, str] = {}
    document = commit(lambda document: _added(document, found, refused))
    places = {(entry.name, entry.id): None for blob, entry in found.items() if blob not in refused}
    told = [f"{blob}: {why}" for blob, why in sorted({**left_out, **refused}.items())]
    return [entries.version(document, name, id) for name, id in places], told


def _found(blobs: Blobs) -> tuple[dict[str, Entry], dict[str, str]]:
    """What the blobs in the store say of themselves, by age: the versions, without numbers, and what is wrong.

    Returns:
        Name of a blob -> version, for those that are whole and ours; name of a blob -> reason, for all others.
    """
    found, damaged = {}, {}
    for path, sha256, modified in sorted(blobs.files(), key=lambda file: (file[2], file[1])):
        try:
            if sha256:
                found[path.name] = _version(path, sha256, modified)
        except (OSError, ValueError) as error:
            damaged[path.name] = str(error)
    return found, damaged


def _version(path: Path, sha256: str, modified: float) -> Entry:
    data = _files.read(path, follow=False)
    if (got := hashlib.sha256(data).hexdigest()) != sha256:
        raise RegistryError("BLOB_DIGEST", f"expected the sha256 that it is named by, got {got}")
    name, model = intake.named(data)
    check_name(name)
    parcel = intake.parcel(name, model)
    made = datetime.fromtimestamp(modified, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Entry(name, parcel.id, {**parcel.fields, "created": made})


def _added(document: Document, found: Mapping[str, Entry], refused: dict[str, str]) -> Document:
    """With all versions that can be there, numbered in their order.

    Args:
        document: what there is.
        found: name of a blob -> version, without a number.
        refused: where the blobs of the others are put, with the reason.
    """
    refused.clear()
    for blob, entry in found.items():
        try:
            document = changes.add_version(document, entry.name, entry.id, entry.fields)
        except RegistryError as error:
            refused[blob] = str(error)
    return document
