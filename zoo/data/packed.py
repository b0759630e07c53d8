"""A partition of a corpus in one file, made once and memory-mapped from then on.

It is a safetensors file of `starts` (U + 1,) int64, `labels` (T,) int64 where there are any, and `features` (T, F)
float32. Its metadata has a digest of what it was made of, and the fingerprint of the frames, which were checked then.
So that nothing has to be read to trust them, the file gets a time of its last change that is also in its metadata: any
change gives it another one, and all of it is then compared with the fingerprint. What is outdated or damaged is made
anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo import _files
from zoo.data.frames import FrameSet

SUFFIX = ".frames.safetensors"
Memory = Callable[[Tensor, int, bool], tuple[Tensor, Tensor | None]]
"""Starts, number of features, whether there are labels -> features (T, F) float32 and labels (T,) int64, to fill."""

_FORMAT = "zoo frames 1"
_PAGE = 4096  # bytes; the data begins at a multiple of it
_TICK = 2 * 10**9  # nanoseconds between times of change, as coarse as a file system may round them
_PATIENCE = 3600.0  # seconds to wait for another process that makes the same file
_TYPES = {"starts": ("I64", np.int64), "labels": ("I64", np.int64), "features": ("F32", np.float32)}
_log = logging.getLogger("zoo")


def source_of(files: Iterable[str], classes: Iterable[str]) -> str:
    """A digest of the names, sizes and times of files, and of the classes that they are read with."""
    digest = hashlib.sha256(json.dumps([*classes]).encode())
    for file in files:
        status, name = os.stat(file), file.rpartition("/")[2]  # noqa: PTH116  # ten thousands of files
        digest.update(f"{name}/{status.st_size}/{status.st_mtime_ns}/".encode(errors="surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class Packed:
    """The file of frames that are read from others."""

    path: Path
    source: str  # what `source_of` says of the others now
    classes: tuple[str, ...]
    names: tuple[str, ...]  # of the recordings

    def frames(self, read: Callable[[Memory], FrameSet]) -> FrameSet:
        """The frames, mapped; `read` fills the file where there is none, or not one of these frames.

        Raises:
            OSError: the file cannot be written; there is nothing of it then.
        """
        if (found := self._found()) is not None:
            return found
        _files.make_folders(self.path.parent)
        temporary = self.path.with_name(f".{self.path.name}{_files.TEMPORARY}")
        with _files.locked(temporary, timeout=_PATIENCE):
            try:
                if (found := self._found(quiet=True)) is None:  # else another process has made it meanwhile
                    self._write(temporary, read)
            finally:
                temporary.unlink(missing_ok=True)
        return found or self._mapped()[0]

    def _found(self, *, quiet: bool = False) -> FrameSet | None:
        """The frames, if the file holds them; a warning says what is wrong with a file that does not."""
        if not self.path.is_file():
            return None
        try:
            frames, about = self._mapped()
            if about["source"] != self.source:
                wrong = "outdated: the corpus, or the classes that it is read with, are others"
            elif self.path.stat().st_mtime_ns == int(about["changed"]) or self._verified(frames, about):
                return frames
            else:
                wrong = "damaged: its content is not what was written"
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            wrong = f"damaged: {error}"
        if not quiet:
            _log.warning("%s is made anew, since it is %s", self.path, wrong)
        return None

    def _mapped(self) -> tuple[FrameSet, dict[str, str]]:
        """The frames in the file as it is, and its metadata."""
        with safe_open(self.path, "pt") as file:
            about = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        if about.get("format") != _FORMAT:
            msg = f"expected a file of the format {_FORMAT!r}, got {about.get('format')!r}"
            raise ValueError(msg)
        parts = {"labels": None, **parts, "starts": parts["starts"].clone()}
        fingerprint = about["fingerprint"]
        again = partial(replace(self, path=self.path.absolute()).again, fingerprint)
        return FrameSet.known(fingerprint, again=again, classes=self.classes, names=self.names, **parts), about

    def again(self, fingerprint: str) -> FrameSet:
        """The frames of this fingerprint, mapped in another process.

        Raises:
            ValueError: the file is not there, or not as it was.
        """
        try:
            frames = self._mapped()[0]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            msg = f"expected mapped frames in {self.path}, got: {error}; all workers must see that file"
            raise ValueError(msg) from error
        if frames.fingerprint != fingerprint:
            msg = f"expected the frames that were shared out in {self.path}, got others: it was made anew meanwhile"
            raise ValueError(msg)
        return frames

    def _verified(self, frames: FrameSet, about: dict[str, str]) -> bool:
        """Whether a file that something has touched has its content still; it gets its time back then."""
        again = FrameSet(frames.features, frames.labels, frames.starts, frames.classes, frames.names, mapped=True)
        if right := again.fingerprint == about["fingerprint"]:
            with _files.if_offered():
                changed = int(about["changed"])
                _files.system.touch(self.path, ns=(changed, changed))
        return right

    def _write(self, path: Path, read: Callable[[Memory], FrameSet]) -> None:
        """Fill a file and put it in the place of the one that is wanted, both on the disk at the end."""
        changed = time.time_ns() // _TICK * _TICK
        file = _files.system.open(path, os.O_RDWR | os.O_TRUNC)
        try:
            new = _New(path, file, {"format": _FORMAT, "source": self.source, "changed": str(changed)})
            new.seal(read(new.memory).fingerprint)
            _files.system.sync(file)
            _files.system.touch(path, ns=(changed, changed))
            _files.system.sync(file)
            _files.replace(path, self.path)
        finally:
            _files.system.close(file)
        _files.sync_folder(self.path.parent)


class _New:
    """A file that is about to be filled through a mapping of it; `about` is its metadata but for the fingerprint."""

    def __init__(self, path: Path, file: int, about: Mapping[str, str]) -> None:
        self.path, self.file, self.about = path, file, about
        self.shapes: dict[str, tuple[int, ...]] = {}

    def memory(self, starts: Tensor, width: int, labelled: bool) -> tuple[Tensor, Tensor | None]:
        """The file's features and labels, to be filled."""
        frames = int(starts[-1])
        self.shapes = {
            "starts": starts.shape,
            **({"labels": (frames,)} if labelled else {}),
            "features": (frames, width),
        }
        place = len(self.header())
        _files.reserve(self.file, place + sum(_bytes(name, shape) for name, shape in self.shapes.items()))
        parts = {}
        for name, shape in self.shapes.items():
            mapped = np.memmap(self.path, _TYPES[name][1], "r+", place, shape)
            parts[name], place = torch.from_numpy(mapped), place + mapped.nbytes
        parts["starts"].copy_(starts)
        return parts["features"], parts.get("labels")

    def header(self, fingerprint: str = "0" * 64) -> bytes:
        """What stands before the data, always of the same length."""
        table: dict[str, Any] = {"__metadata__": {**self.about, "fingerprint": fingerprint}}
        place = 0
        for name, shape in self.shapes.items():
            place, start = place + _bytes(name, shape), place
            table[name] = {"dtype": _TYPES[name][0], "shape": shape, "data_offsets": (start, place)}
        text = json.dumps(table).encode()
        length = -(-(8 + len(text)) // _PAGE) * _PAGE - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    def seal(self, fingerprint: str) -> None:
        """Write what says that the data is whole."""
        os.lseek(self.file, 0, os.SEEK_SET)
        _files.system.write(self.file, memoryview(self.header(fingerprint)))


def _bytes(name: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * np.dtype(_TYPES[name][1]).itemsize
