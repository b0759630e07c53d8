"""From blobs back to models: a version's checkpoint and its checks."""

from __future__ import annotations

from zoo.canonical import canonical
from zoo.checkpoint import Checkpoint, CheckpointError, decode, header_at
from zoo.checkpoint.probe import check_probe
from zoo.registry.blobs import Blobs
from zoo.registry.entries import Entry
from zoo.registry.references import RegistryError


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


def _bare(error: CheckpointError) -> str:
    return str(error).removesuffix(f" [{error.reason}]")
