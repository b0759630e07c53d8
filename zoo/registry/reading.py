"""From blobs back to models: a version's checkpoint, its checks, and a lost registry rebuilt."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from zoo import durable
from zoo.canonical import canonical
from zoo.checkpoint import Checkpoint, CheckpointError, decode, header_at
from zoo.checkpoint.probe import check_probe
from zoo.registry import changes, intake
from zoo.registry.blobs import Blobs
from zoo.registry.document import Document
from zoo.registry.entries import Entry
from zoo.registry.references import RegistryError, check_name

Found = list[tuple[tuple[str, str], changes.Change]]


def checkpoint(blobs: Blobs, entry: Entry) -> Checkpoint:
    """The checkpoint of a version: bytes of the recorded size and hash, that say what the registry says.

    Raises:
        RegistryError: the blob is not what was registered.
        CheckpointError: it cannot be used by this program.
    """
    data = blobs.read(entry)
    try:
        found = decode(data)
    except CheckpointError as error:
        raise CheckpointError(error.reason, f"{entry.reference}: {_bare(error)}") from error
    if canonical(found.spec.to_dict()) != canonical(entry.spec.to_dict()) or found.classes != entry.classes:
        raise RegistryError(
            "BLOB",
            f"the blob of {entry.reference} has another spec or other classes than the registry; was it swapped?",
        )
    return found


def check_header(blobs: Blobs, entry: Entry) -> None:
    """Refuse a blob of another size, or whose header is not well-formed; its data are not read.

    Raises:
        RegistryError: missing, no plain file, of another size.
        CheckpointError: malformed.
    """
    blobs.check_size(entry)
    path = blobs.path(entry.sha256)
    try:
        header_at(path, follow=False)
    except CheckpointError as error:
        raise CheckpointError(error.reason, f"{entry.reference}: {_bare(error)}") from error
    except OSError as error:
        raise RegistryError("DISK", f"the blob of {entry.reference} cannot be read: {error}") from error


def check_behaviour(entry: Entry, found: Checkpoint) -> None:
    """Refuse a model that says other than at its registration; one without a record passes.

    Raises:
        CheckpointError: PROBE.
    """
    recorded = entry.fields.get("probe")
    if recorded:
        try:
            check_probe(recorded, found.to_module(), found.spec.inputs)
        except CheckpointError as error:
            raise CheckpointError(error.reason, f"{entry.reference}: {_bare(error)}") from error


def recovered(blobs: Blobs) -> Found:
    """What the whole blobs in the store say: name and id, and the change that registers it, by age."""
    found: Found = []
    for path, sha256 in sorted(blobs.names(), key=lambda item: (item[0].lstat().st_mtime_ns, item[1])):
        if sha256:
            found += _recovered(path, sha256)
    return found


def _recovered(path: Path, sha256: str) -> Found:
    """One blob's, or nothing where it is damaged or not ours."""
    try:
        data = durable.read(path, follow=False)
        if hashlib.sha256(data).hexdigest() != sha256:
            return []
        name, model = intake.named(data)
        check_name(name)
    except (OSError, ValueError):
        return []
    parcel = intake.parcel(name, model)
    made = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    fields = {**parcel.fields, "created": made}

    def change(document: Document) -> Document:
        return changes.add_version(document, name, parcel.id, fields)

    return [((name, parcel.id), change)]


def _bare(error: CheckpointError) -> str:
    return str(error).removesuffix(f" [{error.reason}]")
