"""From blobs back to models: a version's checkpoint and its checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from zoo._json import canonical
from zoo.checkpoint import Checkpoint, about_of, decode, tensors_of
from zoo.checkpoint.header import CheckpointError, header_at, read_header
from zoo.checkpoint.match import check_values
from zoo.checkpoint.probe import check_probe
from zoo.models.architectures import list_architectures
from zoo.registry.blobs import Blobs
from zoo.registry.entries import Entry
from zoo.registry.references import RegistryError


def known(entry: Entry) -> bool:
    """Whether this program knows the architecture, so that the model can be built."""
    return entry.architecture in list_architectures()


def checkpoint(blobs: Blobs, entry: Entry) -> Checkpoint:
    """The checkpoint of a version: bytes of the recorded size and hash, that say what the registry says.

    Raises:
        RegistryError: the blob is not what was registered.
        CheckpointError: it cannot be used by this program.
    """
    return _decoded(entry, blobs.read(entry))


def tensors(entry: Entry, data: bytearray) -> Mapping[str, Tensor]:
    """The weights in the bytes of a version, which are those of `Blobs.read`.

    All is checked that `checkpoint` checks; where the architecture is unknown, all but the fit to the model.

    Raises:
        RegistryError, CheckpointError: as `checkpoint`.
    """
    if known(entry):
        return _decoded(entry, data).tensors
    with _told_of(entry):
        header = read_header(data)
        about, found = about_of(header), tensors_of(data, header)
        check_values(found)
    _refuse_swapped(entry, about["spec"], entry.fields["spec"], about["classes"])
    return found


def _decoded(entry: Entry, data: bytearray) -> Checkpoint:
    with _told_of(entry):
        found = decode(data)
    _refuse_swapped(entry, found.spec.to_dict(), entry.spec.to_dict(), found.classes)
    return found


def _refuse_swapped(entry: Entry, spec: Any, expected: Any, classes: Sequence[str]) -> None:
    if canonical(spec) != canonical(expected) or tuple(classes) != entry.classes:
        raise RegistryError(
            "BLOB",
            f"the blob of {entry.reference} has another spec or other classes than the registry; was it swapped?",
        )


def check_header(blobs: Blobs, entry: Entry) -> None:
    """Refuse a blob of another size, or whose header is not well-formed; its data are not read.

    Raises:
        RegistryError: missing, no plain file, of another size.
        CheckpointError: malformed.
    """
    blobs.check_size(entry)
    path = blobs.path(entry.sha256)
    try:
        with _told_of(entry):
            header_at(path, follow=False)
    except OSError as error:
        raise RegistryError("DISK", f"the blob of {entry.reference} cannot be read: {error}") from error


def check_behaviour(entry: Entry, found: Checkpoint) -> None:
    """Refuse a model that says other than at its registration; one without a record passes.

    Raises:
        CheckpointError: PROBE.
    """
    recorded = entry.fields.get("probe")
    if recorded:
        with _told_of(entry):
            check_probe(recorded, found.to_module(), found.spec.inputs)


@contextmanager
def _told_of(entry: Entry) -> Iterator[None]:
    """Let an error of a checkpoint name the version."""
    try:
        yield
    except CheckpointError as error:
        bare = str(error).removesuffix(f" [{error.reason}]")
        raise CheckpointError(error.reason, f"{entry.reference}: {bare}") from error
