"""Keeping the store in order: checking blobs, removing what nobody points to."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zoo import durable
from zoo.registry import protocol
from zoo.registry.blobs import Blobs
from zoo.registry.entries import Entry
from zoo.registry.references import RegistryError


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


def verified(
    blobs: Blobs, entries: Iterable[Entry], *, fast: bool, probe: bool
) -> Iterator[tuple[Entry, Problem | None]]:
    """Each version with what is wrong with it, or None."""
    for entry in entries:
        yield entry, problem_of(blobs, entry, fast=fast, probe=probe)


def problem_of(blobs: Blobs, entry: Entry, *, fast: bool = False, probe: bool = False) -> Problem | None:
    """What is wrong with a version's blob; `fast` looks at its size and header only."""
    try:
        from zoo.registry import reading  # torch comes only with a model

        if fast:
            reading.check_header(blobs, entry)
            return None
        found = reading.checkpoint(blobs, entry)
        if probe:
            reading.check_behaviour(entry, found)
    except ValueError as error:
        return Problem(entry, getattr(error, "reason", "BLOB"), str(error))
    return None


def collect_garbage(path: Path, blobs: Blobs, *, timeout: float, dry_run: bool, older_than: float) -> list[Path]:
    """Remove what the registry does not point to; see `Registry.collect_garbage`."""
    with protocol.locked(path, timeout=timeout):
        document = protocol.read_document(path)
        kept = {str(fields["blob"]).removeprefix("sha256:") for _, _, fields in document.versions()}
        limit = time.time() - older_than
        found = [file for file, sha256 in blobs.names() if sha256 not in kept and file.lstat().st_mtime <= limit]
        found += [file for file in _temporary(path) if file.lstat().st_mtime <= limit]
        if not dry_run:
            _remove(found)
        return found


def _temporary(path: Path) -> list[Path]:
    """What a registration that died left beside the registry."""
    pattern = f".{path.name}.*{durable.TEMPORARY}"
    return sorted(path.parent.glob(pattern))


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        try:
            with suppress(FileNotFoundError):
                durable.system.remove(file)
        except OSError as error:
            raise RegistryError("DISK", f"cannot remove {file}: {error}") from error
