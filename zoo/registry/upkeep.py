"""Keeping the store in order: checking blobs, mending them, removing what nobody points to."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo import _files
from zoo.registry import changes, protocol
from zoo.registry.blobs import Blobs, modified_at
from zoo.registry.document import Document
from zoo.registry.entries import Entry, version
from zoo.registry.references import RegistryError, is_id

_FORMAT = re.compile(rb'"format"\s*:\s*"zoo-registry"')
_START = 64  # bytes in which a registry's text begins, after a byte order mark or empty lines


@dataclass(frozen=True)
class Problem:
    """What is wrong with one version.

    Args:
        entry: the version.
        reason: one word, as of the errors.
        message: what was expected and what is there.
    """

    entry: Entry
    reason: str
    message: str


def deposited(document: Document, blobs: Blobs, name: str, id: str, fields: Mapping[str, Any]) -> Document:
    """With a version that was deposited; one that is there with a damaged blob is pointed to the new blob.

    Raises:
        RegistryError: as `changes.add_version`; NAME for a new name that has the form of an id.
    """
    if is_id(name):
        changes.check_nameable(document, name)
    new = changes.add_version(document, name, id, fields)
    if new is document and problem_of(blobs, version(document, name, id)):
        return changes.point_to_blob(document, name, id, fields)
    return new


def ensure_blob(document: Document, blobs: Blobs, name: str, id: str, sha256: str, data: bytes) -> None:
    """Put a deposited blob back that was collected meanwhile; one that no version points to by now may be gone.

    Raises:
        RegistryError: as `Blobs.put_back`.
    """
    if id in document.models.get(name, {"versions": ()})["versions"]:
        blobs.put_back(sha256, data)


def verified(
    blobs: Blobs, entries: Iterable[Entry], *, fast: bool, probe: bool
) -> Iterator[tuple[Entry, Problem | None]]:
    """Each version with what is wrong with it, or None."""
    for entry in entries:
        yield entry, problem_of(blobs, entry, fast=fast, probe=probe)


def problem_of(blobs: Blobs, entry: Entry, *, fast: bool = False, probe: bool = False) -> Problem | None:
    """What is wrong with a version's blob; `fast` looks at its size and header only.

    A model of an architecture that this program does not know is not built: its bytes are checked, not its fit.
    """
    try:
        from zoo.registry import reading  # torch comes only with a model

        if fast:
            reading.check_header(blobs, entry)
            return None
        if not reading.known(entry):
            reading.tensors(entry, blobs.read(entry))
            return None
        found = reading.checkpoint(blobs, entry)
        if probe:
            reading.check_behaviour(entry, found)
    except ValueError as error:
        return Problem(entry, getattr(error, "reason", "BLOB"), str(error))
    return None


def collect_garbage(path: Path, blobs: Blobs, *, timeout: float, dry_run: bool, older_than: float) -> list[Path]:
    """Remove what no registry in the folder points to; see `Registry.collect_garbage`."""
    protocol.check_there(path)  # or the lock would make the folder of a name that was mistyped
    with protocol.locked(path, timeout=timeout):
        kept = _held(path)
        for beside in _registries_beside(path):
            kept |= _held(beside)
        limit = time.time() - older_than
        found = [file for file, sha256, modified in blobs.files() if sha256 not in kept and modified <= limit]
        found += [file for file in _temporary(path) if (modified_at(file) or limit + 1) <= limit]
        if not dry_run:
            _remove(found)
        return found


def _held(path: Path) -> set[str]:
    """Hashes of the blobs that a registry points to."""
    try:
        document = protocol.read_document(path)
    except RegistryError as error:
        message = str(error).removesuffix(f" [{error.reason}]")
        raise RegistryError(error.reason, f"{path}: {message}; nothing was removed") from error
    return {str(fields["blob"]).removeprefix("sha256:") for _, _, fields in document.versions()}


def _registries_beside(path: Path) -> list[Path]:
    """Other files in the folder that say they are registries: they share the store."""
    ours = (path.name, protocol.lock_path(path).name)
    others = [file for file in sorted(path.parent.iterdir()) if file.name not in ours]
    return [file for file in others if not file.name.endswith(_files.TEMPORARY) and _says_registry(file)]


def _says_registry(file: Path) -> bool:
    if not file.is_file():  # a pipe would never end
        return False
    try:
        with file.open("rb") as opened:
            start = opened.read(_START).lstrip(b"\xef\xbb\xbf \t\r\n")
            return start.startswith((b"{", b"<<<<<<<")) and _FORMAT.search(start + opened.read()) is not None
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RegistryError(
            "DISK", f"cannot read {file}, which may be a registry of the same store: {error}; nothing was removed"
        ) from error


def _temporary(path: Path) -> list[Path]:
    """What a registration that died left beside the registry."""
    pattern = f".{path.name}.*{_files.TEMPORARY}"
    return sorted(path.parent.glob(pattern))


def _remove(files: Iterable[Path]) -> None:
    """Remove all that can be; then tell what could not."""
    failed = []
    for file in files:
        try:
            with suppress(FileNotFoundError):
                _files.system.remove(file)
        except OSError as error:
            failed.append(f"{file}: {error}")
    if failed:
        raise RegistryError("DISK", f"cannot remove {'; '.join(failed)}; all else that nothing points to is removed")
