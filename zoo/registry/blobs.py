"""The store of blobs: `checkpoints/sha256/<64 hex digits>.safetensors` beside the registry; and its garbage collection.

A blob's name is the hash of its bytes, so a blob is never changed: it is there, or it is not. It is read once, into
memory, and the bytes that were hashed are the bytes that are used. What a blob holds is read in `load`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from zoo import _files
from zoo.registry.transaction import check_there, disk_errors, lock_path, locked, read_snapshot
from zoo.registry.types import Entry, RegistryError

_FORMAT = re.compile(rb'"format"\s*:\s*"zoo-registry"')
_START = 64  # bytes in which a registry's text begins, after a byte order mark or empty lines
_BLOB = re.compile(r"([0-9a-f]{64})\.safetensors", re.ASCII)


class Blobs:
    """The blobs beside one registry."""

    def __init__(self, registry: Path) -> None:
        self.folder = registry.parent / "checkpoints" / "sha256"

    def path(self, sha256: str) -> Path:
        """Where the blob with this hash is, or would be."""
        return self.folder / f"{sha256}.safetensors"

    def put(self, data: bytes) -> str:
        """Make a blob durable under its hash, and return the hash; a whole one that is already there is kept.

        A RegistryError (DISK) leaves no part of it behind.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256)
        with disk_errors(f"cannot write the blob {path}", "; nothing has changed"):
            _files.make_folders(self.folder)
            if _hash_of(path, len(data)) == sha256:
                with _files.if_offered():
                    _files.system.touch(path)  # garbage collection keeps what is young
                _files.sync_folder(self.folder)
            else:
                _files.write(path, data)
        return sha256

    def put_back(self, sha256: str, data: bytes) -> None:
        """Restore a blob that has been collected as garbage since it was put; MISSING where `data` is empty."""
        if os.access(f"{self.folder}/{sha256}.safetensors", os.F_OK):  # a Path costs four times as much, per model
            return
        if not data:
            msg = f"the blob {self.path(sha256)} was collected as garbage before the transaction ended"
            raise RegistryError("MISSING", f"{msg}; nothing has changed, register its model again")
        self.put(data)

    def read(self, entry: Entry) -> bytearray:
        """The bytes of a version, checked against the size and hash that the registry recorded.

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
        """Refuse (MISSING, NOT_A_FILE, BLOB_SIZE, DISK) a blob by its status, without reading it."""
        path = self.path(entry.sha256)
        try:
            status = path.lstat()
        except FileNotFoundError:
            raise self._refusal("MISSING", entry, f"expected a file with sha256 {entry.sha256}, got none") from None
        except OSError as error:
            raise self._refusal("DISK", entry, f"its status cannot be read: {error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise self._refusal("NOT_A_FILE", entry, "expected a plain file, got a link, folder, pipe or device")
        if status.st_size != entry.bytes:
            what = f"expected {entry.bytes:,} bytes with sha256 {entry.sha256}, got {status.st_size:,} bytes"
            if status.st_size <= entry.bytes + 2**20 and (found := _hash_of(path, status.st_size)):
                what += f" with sha256 {found}"  # unless reading it costs much more than reading the right one
            raise self._refusal("BLOB_SIZE", entry, what)

    def files(self) -> Iterator[tuple[Path, str, float]]:
        """Every blob and temporary file of the store: path, hash ("" for a temporary file), time of its last change."""
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            match, modified = _BLOB.fullmatch(path.name), _modified_at(path)
            if modified is not None and (match or path.name.endswith(_files.TEMPORARY)):
                yield path, match[1] if match else "", modified

    def _refusal(self, reason: str, entry: Entry, what: str) -> RegistryError:
        blob = f"the blob of {entry.name!r} version {entry.number} ({self.path(entry.sha256)})"
        return RegistryError(reason, f"{blob}: {what}; restore it from a copy, or register the model again")


def _hash_of(path: Path, size: int) -> str:
    """The hash of a plain file of this size, or "" where it cannot be read."""
    with suppress(OSError):
        return hashlib.sha256(_files.read(path, size=size, follow=False)).hexdigest()
    return ""


def _modified_at(path: Path) -> float | None:
    """When a file was last changed, in seconds since the epoch; None for a folder or a file that is gone by now."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return None if stat.S_ISDIR(status.st_mode) else status.st_mtime


def collect_garbage(path: Path, blobs: Blobs, *, timeout: float, dry_run: bool, older_than: float) -> list[Path]:
    """Remove what no registry in the folder refers to; see `Registry.collect_garbage`."""
    check_there(path)  # or the lock would make the folder of a mistyped path
    with locked(path, timeout=timeout):
        ours = (path.name, lock_path(path).name)
        others = [file for file in sorted(path.parent.iterdir()) if file.name not in ours]
        kept = _referred(path)
        for beside in others:  # other registries in the folder share the store
            if not beside.name.endswith(_files.TEMPORARY) and _is_registry(beside):
                kept |= _referred(beside)
        limit = time.time() - older_than
        found = [file for file, sha256, modified in blobs.files() if sha256 not in kept and modified <= limit]
        temporary = sorted(path.parent.glob(f".{path.name}.*{_files.TEMPORARY}"))  # of a process that died
        found += [file for file in temporary if (_modified_at(file) or limit + 1) <= limit]
        if not dry_run:
            failed = []
            for file in found:
                try:
                    with suppress(FileNotFoundError):
                        _files.system.remove(file)
                except OSError as error:
                    failed.append(f"{file}: {error}")
            if failed:
                msg = f"cannot remove {'; '.join(failed)}; everything else that nothing refers to is removed"
                raise RegistryError("DISK", msg)
        return found


def _referred(path: Path) -> set[str]:
    """Hashes of the blobs that a registry refers to."""
    try:
        return {entry.sha256 for entry in read_snapshot(path).versions()}
    except RegistryError as error:
        raise error.about(path, "; nothing was removed") from None


def _is_registry(file: Path) -> bool:
    if not file.is_file():  # a pipe would never end
        return False
    try:
        with file.open("rb") as opened:
            start = opened.read(_START).lstrip(b"\xef\xbb\xbf \t\r\n")
            return start.startswith((b"{", b"<<<<<<<")) and _FORMAT.search(start + opened.read()) is not None
    except FileNotFoundError:
        return False
    except OSError as error:
        msg = f"cannot read {file}, which may be a registry of the same store: {error}; nothing was removed"
        raise RegistryError("DISK", msg) from error
