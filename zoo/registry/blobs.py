"""The store of blobs: `checkpoints/sha256/<64 hex digits>.safetensors` beside the registry.

A blob's name is the hash of its bytes, so a blob is never changed, only there or not there. It is read
once, into memory, and the bytes that were hashed are the bytes that are used.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from zoo import _files
from zoo.registry.entries import Entry
from zoo.registry.references import RegistryError

_BLOB = re.compile(r"([0-9a-f]{64})\.safetensors", re.ASCII)


class Blobs:
    """The blobs beside one registry."""

    def __init__(self, registry: Path) -> None:
        self.folder = registry.parent / "checkpoints" / "sha256"

    def path(self, sha256: str) -> Path:
        """Where the blob of a hash lies, or would."""
        return self.folder / f"{sha256}.safetensors"

    def put(self, data: bytes) -> str:
        """Make a blob durable under its hash, and return the hash; one that is there and whole stays.

        Raises:
            RegistryError: DISK; nothing is left of it.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256)
        try:
            _files.make_folders(self.folder)
            if self._holds(path, sha256, len(data)):
                _files.renew(path)  # garbage collection keeps what is young
                _files.sync_folder(self.folder)
            else:
                _files.write(path, data)
        except OSError as error:
            raise RegistryError("DISK", f"cannot write the blob {path}: {error}; nothing has changed") from error
        return sha256

    def put_back(self, sha256: str, data: bytes) -> None:
        """Make a blob durable again that was put, where it was collected as garbage meanwhile.

        Raises:
            RegistryError: as `put`; MISSING where its bytes were let go, as in a long transaction.
        """
        if os.access(f"{self.folder}/{sha256}.safetensors", os.F_OK):  # a Path costs four times as much, per model
            return
        if not data:
            msg = f"the blob {self.path(sha256)} was collected as garbage before the transaction ended"
            raise RegistryError("MISSING", f"{msg}; nothing has changed, register its model again")
        self.put(data)

    def read(self, entry: Entry) -> bytearray:
        """The bytes of a version, of the size and hash that the registry recorded.

        Raises:
            RegistryError: MISSING, NOT_A_FILE, BLOB_SIZE, BLOB_DIGEST or DISK, naming the version and both hashes.
        """
        self.check_size(entry)
        try:
            data = _files.read(self.path(entry.sha256), size=entry.bytes, follow=False)
        except OSError as error:
            raise self._refusal("DISK", entry, f"it cannot be read: {error}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            raise self._refusal("BLOB_DIGEST", entry, f"expected sha256 {entry.sha256}, got {found}")
        return data

    def check_size(self, entry: Entry) -> None:
        """Refuse a blob that is missing, no plain file, or of another size, without reading it.

        Raises:
            RegistryError: MISSING, NOT_A_FILE, BLOB_SIZE or DISK.
        """
        path = self.path(entry.sha256)
        try:
            status = path.lstat()
        except FileNotFoundError:
            raise self._refusal("MISSING", entry, f"expected it with sha256 {entry.sha256}, got none") from None
        except OSError as error:
            raise self._refusal("DISK", entry, f"it cannot be looked at: {error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise self._refusal("NOT_A_FILE", entry, "expected a plain file, got a link, folder, pipe or device")
        if status.st_size != entry.bytes:
            raise self._refusal(
                "BLOB_SIZE",
                entry,
                f"expected {entry.bytes:,} bytes with sha256 {entry.sha256}, got {status.st_size:,} bytes"
                f"{self._hash_of(path, status.st_size, entry.bytes)}",
            )

    def files(self) -> Iterator[tuple[Path, str, float]]:
        """Every file in the store, its hash, "" for a temporary file, and its time; what is neither is left alone."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            match = _BLOB.fullmatch(path.name)
            if match or path.name.endswith(_files.TEMPORARY):
                modified = modified_at(path)
                if modified is not None:
                    yield path, match[1] if match else "", modified

    def _holds(self, path: Path, sha256: str, size: int) -> bool:
        with suppress(OSError):
            return hashlib.sha256(_files.read(path, size=size, follow=False)).hexdigest() == sha256
        return False

    def _hash_of(self, path: Path, size: int, expected: int) -> str:
        """The hash of a blob of the wrong size, where reading it costs no more than reading the right one."""
        with suppress(OSError):
            if size <= expected + 2**20:
                found = hashlib.sha256(_files.read(path, size=size, follow=False)).hexdigest()
                return f" with sha256 {found}"
        return ""

    def _refusal(self, reason: str, entry: Entry, what: str) -> RegistryError:
        return RegistryError(
            reason,
            f"the blob of {entry.name!r} version {entry.number} ({self.path(entry.sha256)}): {what}; "
            f"restore it from a copy, or register the model again",
        )


def modified_at(path: Path) -> float | None:
    """When a file was last changed, in seconds of the clock; None for a folder, and where it has gone meanwhile."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return None if stat.S_ISDIR(status.st_mode) else status.st_mtime
