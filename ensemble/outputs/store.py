"""Members' outputs in a folder: memory-mapped, written shard by shard, continued after a crash.

A folder is about *one* set of frames. It holds

- `outputs.bin`: per member a row of (N, C) log-probabilities, each of which begins at a page,
- `outputs.json`: what the rows are, how many shards of each are complete, and the names of the members last collected,
- `labels.npy` and `groups.npy`: the true class and the recording of each frame.

A shard counts as complete once its bytes are on the disk; the description is replaced whole. So a run that is
killed repeats at most one shard, and a new member costs only its own row. Two older forms are still read: folders
without names, which a collection completes, and `<partition>.safetensors` beside `members.json`.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ensemble.outputs import About, MemberOutputs

PAGE = 4096  # bytes; what begins at a multiple of it, in memory and in the file, can bypass the page cache
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}

_FORMAT = 2
_SHARD = 32_768  # frames
UNFINISHED = "shards"  # folder in that of a store which several processes fill
_DESCRIPTION, _DATA = "outputs.json", "outputs.bin"
_ARRAYS = ("labels", "groups")


class StoreError(ValueError):
    """A folder that holds outputs of something else, or is damaged."""


@dataclass(frozen=True)
class Contents:
    """What a store is about; it takes no outputs of anything else."""

    fingerprint: str  # of the frames
    frames: Annotated[int, msgspec.Meta(ge=0)]  # N
    classes: tuple[str, ...]  # C names in order
    precision: str  # at which the members ran; "" if unknown
    dtype: str  # of the stored log-probabilities, a name in `DTYPES`


class _Row(msgspec.Struct):
    """One row of the data: which weights it is of, and how many of its shards are complete."""

    digest: str
    shards: int


class _Member(msgspec.Struct):
    """One member of the outputs that a folder presents: its name, its row, and what is known of it."""

    name: str
    digest: str
    about: About


class _Collected(msgspec.Struct):
    """The outputs that a folder presents."""

    members: list[_Member]
    labels: bool
    abstain: bool


class _Description(msgspec.Struct):
    """The content of `outputs.json`."""

    format: int
    contents: Contents
    shard: Annotated[int, msgspec.Meta(ge=1)]
    members: list[_Row]
    collected: _Collected | None = None


class Store:
    """A folder of outputs, opened, or made where there is none.

    Args:
        contents: what the folder has to be about.
        shard: frames per shard, for a new store.

    Raises:
        StoreError: the folder is about other frames, classes, precision or type (the message names the
            folder and both), or its files do not fit together.
        ValueError: a type that is not in `DTYPES`.
    """

    def __init__(self, folder: Path, contents: Contents, *, shard: int = _SHARD) -> None:
        if contents.dtype not in DTYPES:
            msg = f"expected outputs of type {', '.join(DTYPES)}, got {contents.dtype!r}"
            raise ValueError(msg)
        self.folder, self.contents, self.shard = folder, contents, shard
        self._data, self._dtype = folder / _DATA, DTYPES[contents.dtype]
        size = contents.frames * len(contents.classes) * self._dtype.itemsize
        self._row = -(-size // PAGE) * PAGE  # bytes from one row to the next
        self._done: dict[str, int] = {}  # digest of a member, in the order of the rows -> complete shards
        self._collected: _Collected | None = None
        if (folder / _DESCRIPTION).exists():
            self._continue(_described(folder))
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                way_out = "name another folder"
                raise StoreError(f"expected a folder {folder}, but a file is in its place; {way_out}") from error
            self._save()

    def _continue(self, found: _Description) -> None:
        """Take over the rows that are there, if they are of the same contents."""
        wanted = asdict(self.contents)
        for name, value in asdict(found.contents).items():
            if value != wanted[name]:
                difference = f"holds outputs with {name} {value}, and {wanted[name]} was asked for"
                raise StoreError(f"{self.folder} {difference}; use another folder")
        if found.format != _FORMAT:
            raise StoreError(f"{self.folder} was written by another version of this program; use another folder")
        self.shard, self._collected = found.shard, found.collected
        self._done = {row.digest: row.shards for row in found.members}
        if len(self._done) < len(found.members):
            raise StoreError(f"{self.folder / _DESCRIPTION} is damaged (a digest twice); remove {self.folder}")
        expected = len(self._done) * self._row
        size = self._data.stat().st_size if self._data.exists() else 0
        if size < expected:
            raise StoreError(f"expected {expected:,} bytes in {self._data}, got {size:,}; remove {self.folder}")

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
        if new := [digest for digest in digests if digest not in self._done]:
            self._done |= dict.fromkeys(new, 0)
            with self._writing(), self._data.open("ab") as file:
                file.truncate(len(self._done) * self._row)
            self._save()

    def put(self, digests: Sequence[str], start: int, log_probabilities: Tensor) -> None:
        """Write (m, b, C) of these members from frame `start` on; they count once `finish` is called."""
        values = log_probabilities.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy()
        first = start * len(self.contents.classes) * self._dtype.itemsize
        rows = list(self._done)
        places = [rows.index(digest) * self._row + first for digest in digests]
        with self._writing():
            write_rows(self._data, zip(places, values.reshape(len(values), -1), strict=True))

    def flush(self) -> None:
        """Return once all bytes are on the disk."""
        with self._writing(), self._data.open("r+b") as file:
            os.fsync(file.fileno())

    def finish(self, digests: Sequence[str], shard: int) -> None:
        """Mark the shards of these members up to this one as complete, once their bytes are on the disk."""
        self.flush()
        self._done |= dict.fromkeys(digests, shard + 1)
        self._save()

    def read(self, digests: Sequence[str]) -> Tensor:
        """(M, N, C) of these members: mapped where they are neighbours in the store, otherwise copied into memory.

        A `StoreError` where one is not there, or not complete.
        """
        if unfinished := [digest for digest in digests if self._done.get(digest, 0) < self.shards]:
            raise StoreError(f"{self.folder} holds no complete outputs of {unfinished}")
        rows, frames, classes = list(self._done), self.contents.frames, len(self.contents.classes)
        if not frames:
            return torch.empty(len(digests), 0, classes, dtype=self._dtype)
        step = self._row // self._dtype.itemsize
        data = torch.from_file(str(self._data), shared=False, size=len(rows) * step, dtype=self._dtype)
        whole = data.as_strided((len(rows), frames, classes), (step, classes, 1))
        places = [rows.index(digest) for digest in digests]
        first, last = places[0], places[0] + len(places)
        return whole[first:last] if places == list(range(first, last)) else whole[places]

    def present(self, outputs: MemberOutputs, digests: Sequence[str]) -> None:
        """Make these the outputs that `read_outputs` gives; their rows are complete here, under these digests."""
        for name in _ARRAYS:
            if (values := getattr(outputs, name)) is not None:
                np.save(data := io.BytesIO(), values.numpy())
                with self._writing():
                    _replace(self.folder / f"{name}.npy", data.getvalue())
        members = [_Member(*each) for each in zip(outputs.members, digests, outputs.about, strict=True)]
        self._collected = _Collected(members, labels=outputs.labels is not None, abstain=outputs.abstain)
        self._save()

    def outputs(self) -> MemberOutputs:
        """The outputs last collected, mapped where possible; a `StoreError` for none, or files that do not fit."""
        if self._collected is None:
            way_out = "collect into it again"
            raise StoreError(f"{self.folder} holds rows without names, unfinished or of an older version; {way_out}")
        members = self._collected.members
        values = self.read([member.digest for member in members])
        labels, groups = self._array("labels") if self._collected.labels else None, self._array("groups")
        try:
            return MemberOutputs(
                values,
                tuple(member.name for member in members),
                self.contents.classes,
                labels=labels,
                groups=groups,
                fingerprint=self.contents.fingerprint,
                abstain=self._collected.abstain,
                about=tuple(member.about for member in members),
            )
        except ValueError as error:
            raise StoreError(f"{self.folder} is damaged ({error}); collect again into another folder") from error

    def _array(self, name: str) -> Tensor:
        path = self.folder / f"{name}.npy"
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{path} is damaged ({error}); collect again into another folder") from error

    def _save(self) -> None:
        rows = [_Row(*row) for row in self._done.items()]
        text = msgspec.json.encode(_Description(_FORMAT, self.contents, self.shard, rows, self._collected))
        with self._writing():
            _replace(self.folder / _DESCRIPTION, msgspec.json.format(text, indent=1))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An error of the disk says what was to be written, and that nothing finished is lost."""
        try:
            yield
        except OSError as error:
            size = len(self._done) * self._row
            msg = f"{error.strerror or error}: expected to write {size:,} bytes of outputs"
            way_out = "make room, and the same call goes on from the shards that are complete, or use another folder"
            raise OSError(error.errno, f"{msg}; {way_out}", str(self.folder)) from error


def read_outputs(path: str | Path) -> MemberOutputs:
    """The outputs that `write_outputs`, `collect` with a cache, or `ensemble collect` left.

    Args:
        path: the folder; for one partition of `ensemble collect FOLDER`, that is FOLDER/PARTITION. Where
            there is only the file FOLDER/PARTITION.safetensors of an earlier version, that is read.

    Raises:
        ValueError: nothing is there (the message lists the partitions that are), or it is damaged.
    """
    path = Path(path)
    if (path / _DESCRIPTION).exists():
        return Store(path, _described(path).contents).outputs()
    packed = path.with_name(f"{path.name}.safetensors")
    if packed.is_file():
        return _unpacked(packed)
    there = {file.stem for file in path.parent.glob("*.safetensors")}
    there |= {file.parent.name for file in path.parent.glob(f"*/{_DESCRIPTION}")}
    listed = ", ".join(sorted(there)) or "none"
    msg = f"expected members' outputs in {path}; partitions in {path.parent}: {listed}; `ensemble collect` writes them"
    raise ValueError(msg)


def write_outputs(folder: str | Path, outputs: MemberOutputs) -> None:
    """Write outputs of any origin into a folder, in place of those that are there."""
    folder, (_, frames, _) = Path(folder), outputs.shape
    dtype = str(outputs.log_probabilities.dtype).removeprefix("torch.")
    remove_outputs(folder)
    store = Store(folder, Contents(outputs.fingerprint, frames, outputs.classes, "", dtype))
    digests = [f"name:{name}" for name in outputs.members]  # the digest of no weights
    try:
        store.add(digests)
        for shard in range(store.shards):
            start, stop = store.frames(shard)
            store.put(digests, start, outputs.log_probabilities[:, start:stop])
            store.finish(digests, shard)
        store.present(outputs, digests)
    except OSError:
        remove_outputs(folder)
        raise


def remove_outputs(folder: str | Path) -> None:
    """Remove the files of a store, the description first; other files of the folder, and mapped outputs, stay."""
    for name in (_DESCRIPTION, _DATA, *(f"{name}.npy" for name in _ARRAYS)):
        (Path(folder) / name).unlink(missing_ok=True)
    shutil.rmtree(Path(folder) / UNFINISHED, ignore_errors=True)


def _described(folder: Path) -> _Description:
    try:
        return msgspec.json.decode((folder / _DESCRIPTION).read_bytes(), type=_Description)
    except (OSError, msgspec.MsgspecError) as error:
        raise StoreError(f"{folder / _DESCRIPTION} is damaged ({error}); remove {folder}") from error


def _replace(path: Path, data: bytes) -> None:
    """Write a file beside its place, and put it there once its bytes are on the disk; nothing is left otherwise."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# Files of an earlier version: one safetensors document per partition, and what is known of the members beside them


def _unpacked(path: Path) -> MemberOutputs:
    beside = path.with_name("members.json")
    try:
        with safe_open(path, "pt") as file:
            head = json.loads(file.metadata()["member-outputs"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        names, references = head["members"], head.get("references", {})
        outputs = MemberOutputs(
            tensors["log_probabilities"],
            names,
            head["classes"],
            labels=tensors.get("labels"),
            groups=tensors["groups"],
            fingerprint=head["fingerprint"],
            abstain=head.get("abstain", False),
        )
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        msg = f"expected members' outputs as `ensemble collect` writes them in {path}, got something else ({error})"
        raise ValueError(msg) from error
    try:
        known = json.loads(beside.read_text(encoding="utf-8"))
        about = [
            About(known[name]["parameters"], known[name]["trained_on"], references.get(name, "")) for name in names
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"expected what is known of {names} in {beside}, got: {error!r}; collect again"
        raise ValueError(msg) from error
    return replace(outputs, about=tuple(about))


# Large rows into a file, bypassing the page cache where the system can. What is written once and read much later need
# not be copied into the cache first: that costs a core as long as the disk itself takes, while both cores compute.


class Pieces:
    """Memory for two pieces in turn, which begins at a page: one is written while the other is filled."""

    def __init__(self) -> None:
        self._kept = [torch.empty(0, dtype=torch.uint8)] * 2

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Contents are undefined; good until the call after the next."""
        size = math.prod(shape) * dtype.itemsize
        mine, other = self._kept
        if mine.numel() < size:
            mine = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        self._kept = [other, mine]
        return mine[:size].view(dtype).view(*shape)


def write_rows(path: Path, rows: Iterable[tuple[int, NDArray[np.uint8]]]) -> None:
    """Write rows of bytes at their places in an existing file; nothing is on the disk for certain before an fsync."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("r+b", buffering=0)).fileno()
        direct = None
        with suppress(AttributeError, OSError):  # not in this system, or not on this disk
            direct = os.open(path, os.O_RDWR | os.O_DIRECT)
            stack.callback(os.close, direct)
        for place, row in rows:
            done = 0
            if direct is not None and place % PAGE == 0 and row.ctypes.data % PAGE == 0:
                pages = len(row) // PAGE * PAGE
                with suppress(OSError):  # what is not done is written the ordinary way, or fails there
                    while done < pages:
                        done += os.pwrite(direct, row[done:pages].data, place + done)
            while done < len(row):
                done += os.pwrite(file, row[done:].data, place + done)
