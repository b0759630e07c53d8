"""`Store`: members' outputs in a folder: memory-mapped, written shard by shard, continued after a crash.

A folder holds what was said about *one* set of frames: `outputs.bin`, (N, C) log-probabilities per row, each
of which begins at a page, and `outputs.json`, which says what they are and how many shards of each row are done.
A shard counts as done once its bytes are on the disk; the description is replaced whole. So a run that is
killed does at most one shard again, and a new member costs only its own row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble.outputs.disk import PAGE, write_rows

DTYPES = {"float16": torch.float16, "float32": torch.float32}
_FORMAT = 2
_SHARD = 32_768  # frames


class StoreError(ValueError):
    """A folder that holds outputs of something else, or is damaged."""


@dataclass(frozen=True)
class Contents:
    """What a store is about; outputs of anything else do not go into it.

    Args:
        fingerprint: of the frames.
        frames: N.
        classes: C names in order.
        precision: in which the members ran.
        dtype: "float16" or "float32", of the stored log-probabilities.
    """

    fingerprint: str
    frames: int
    classes: tuple[str, ...]
    precision: str
    dtype: str


class Store:
    """A folder of outputs, opened, or made where there is none.

    Args:
        folder: made if need be.
        contents: what it shall be about.
        shard: frames per shard, for a new store.

    Raises:
        StoreError: the folder is about other frames, classes, precision or type (the message names the
            folder and both), or its files do not fit together.
        ValueError: a type that is not in `DTYPES`.
    """

    def __init__(self, folder: Path, contents: Contents, *, shard: int = _SHARD) -> None:
        if contents.dtype not in DTYPES:
            msg = f"expected outputs of type {' or '.join(DTYPES)}, got {contents.dtype!r}"
            raise ValueError(msg)
        self.folder, self.contents, self.shard = folder, contents, shard
        self._done: dict[str, int] = {}  # digest of a member, in the order of the rows -> shards that are done
        if self._description.exists():
            self._open()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._save()

    @property
    def shards(self) -> int:
        """Number of shards of a row."""
        return -(-self.contents.frames // self.shard)

    def frames(self, shard: int) -> tuple[int, int]:
        """First frame of a shard, and the first after it."""
        return shard * self.shard, min((shard + 1) * self.shard, self.contents.frames)

    def lacks(self, digest: str, shard: int) -> bool:
        """Whether this shard of a member has still to be computed."""
        return self._done.get(digest, 0) <= shard

    def add(self, digests: Sequence[str]) -> None:
        """Make room for the members that are not there yet, in this order."""
        new = [digest for digest in digests if digest not in self._done]
        if not new:
            return
        self._done |= dict.fromkeys(new, 0)
        with self._data.open("ab") as file:
            file.truncate(len(self._done) * self._row)
        self._save()

    def put(self, digests: Sequence[str], start: int, log_probabilities: Tensor) -> None:
        """Write (m, b, C) of these members from frame `start` on; it counts once `finish` is called."""
        values = log_probabilities.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy()
        first = start * len(self.contents.classes) * self._dtype.itemsize
        places = [self._place(digest) * self._row + first for digest in digests]
        write_rows(self._data, zip(places, values.reshape(len(values), -1), strict=True))

    def finish(self, digests: Sequence[str], shard: int) -> None:
        """The shard of these members is written."""
        with self._data.open("r+b") as file:
            os.fsync(file.fileno())
        self._done |= dict.fromkeys(digests, shard + 1)
        self._save()

    def read(self, digests: Sequence[str]) -> Tensor:
        """(M, N, C) of these members; mapped, not read, where they follow each other in the store.

        In another order they are copied into memory.

        Raises:
            StoreError: a member is not there, or not complete.
        """
        unfinished = [digest for digest in digests if self._done.get(digest, 0) < self.shards]
        if unfinished:
            raise StoreError(f"{self.folder} holds no complete outputs of {unfinished}")
        rows, (frames, classes) = len(self._done), (self.contents.frames, len(self.contents.classes))
        if not frames:
            return torch.empty(len(digests), 0, classes, dtype=self._dtype)
        row = self._row // self._dtype.itemsize
        whole = torch.from_file(str(self._data), shared=False, size=rows * row, dtype=self._dtype)
        places = [self._place(digest) for digest in digests]
        whole = whole.as_strided((rows, frames, classes), (row, classes, 1))
        follow = places == list(range(places[0], places[0] + len(places)))
        return whole[places[0] : places[0] + len(places)] if follow else whole[places]

    @property
    def _description(self) -> Path:
        return self.folder / "outputs.json"

    @property
    def _data(self) -> Path:
        return self.folder / "outputs.bin"

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.contents.dtype]

    @property
    def _row(self) -> int:
        """Bytes from one row to the next."""
        size = self.contents.frames * len(self.contents.classes) * self._dtype.itemsize
        return -(-size // PAGE) * PAGE

    def _place(self, digest: str) -> int:
        return list(self._done).index(digest)

    def _open(self) -> None:
        try:
            found = json.loads(self._description.read_text(encoding="utf-8"))
            kept = Contents(**{**found["contents"], "classes": tuple(found["contents"]["classes"])})
            form, self.shard, members = found["format"], int(found["shard"]), found["members"]
            self._done = {str(member["digest"]): int(member["shards"]) for member in members}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{self._description} is damaged ({error}); remove {self.folder}") from error
        if form != _FORMAT or kept != self.contents:
            raise StoreError(f"{self.folder} {_difference(asdict(kept), asdict(self.contents))}; use another folder")
        size = self._data.stat().st_size if self._data.exists() else 0
        if self.shard < 1 or size < len(self._done) * self._row:
            expected = len(self._done) * self._row
            raise StoreError(f"expected {expected:,} bytes in {self._data}, got {size:,}; remove {self.folder}")

    def _save(self) -> None:
        members = [{"digest": digest, "shards": shards} for digest, shards in self._done.items()]
        text = {"format": _FORMAT, "contents": asdict(self.contents), "shard": self.shard, "members": members}
        part = self._description.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(text, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._description)


def _difference(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    for name, value in kept.items():
        if value != wanted[name]:
            return f"holds outputs with {name} {value}, and {wanted[name]} was asked for"
    return "was written by another version of this program"
