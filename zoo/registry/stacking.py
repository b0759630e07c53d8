"""Many versions of one spec as one set of stacked tensors, each blob read straight into its place.

The bytes that are hashed are the bytes that stay: nothing is copied in between. Whatever is not as it was
registered is read again in the ordinary way, which says what is wrong.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from zoo import _files
from zoo.checkpoint import about_of
from zoo.checkpoint.header import CheckpointError, Header, header_of
from zoo.checkpoint.match import check_fit, check_values, template
from zoo.registry import reading
from zoo.registry.blobs import Blobs
from zoo.registry.entries import Entry

Head = tuple[bytes, Sequence[str]]  # the bytes before the data, and the names in the order of the data
_READERS = 4
_ALIGNED = 64  # bytes


def stacked(blobs: Blobs, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """The tensors of M versions of one spec by name, each (M, ...).

    Raises:
        RegistryError: a blob is not what was registered.
        CheckpointError: one cannot be used by this program, or has another spec.
    """
    expected = template(entries[0].spec)
    state = _room(expected, len(entries))
    raw = {name: tensor.reshape(len(entries), -1).view(torch.uint8).numpy() for name, tensor in state.items()}
    heads = [_head(blobs, entry, expected) for entry in entries]  # apart: it would hold Python's lock from the readers

    def fill(row: int) -> None:
        rows = {name: memoryview(array[row]) for name, array in raw.items()}
        if not _straight(blobs, entries[row], heads[row], rows):
            found = reading.checkpoint(blobs, entries[row]).tensors
            check_fit(expected, found)
            for name, tensor in found.items():
                state[name][row].copy_(tensor)

    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(entries))))
    try:
        check_values(state)
    except CheckpointError:
        for entry in entries:
            reading.checkpoint(blobs, entry)  # names the version
        raise
    return state


def _room(expected: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Tensors (count, ...) in one piece of memory: NumPy asks for huge pages, which saves a third of the time."""
    sizes = [-(-count * like.nbytes // _ALIGNED) * _ALIGNED for like in expected.values()]
    pieces = torch.split(torch.from_numpy(np.empty(sum(sizes), dtype=np.uint8)), sizes)
    return {
        name: piece[: count * like.nbytes].view(like.dtype).reshape(count, *like.shape)
        for (name, like), piece in zip(expected.items(), pieces, strict=True)
    }


def _head(blobs: Blobs, entry: Entry, expected: Mapping[str, Tensor]) -> Head | None:
    """What stands before a blob's data and where its tensors lie; None where anything is not as expected."""
    try:
        with _files.opened(blobs.path(entry.sha256), follow=False) as (file, size):
            head, header = header_of(file, size)
            if size == entry.bytes and _fits(header, entry, expected):
                return head, sorted(header.pieces, key=lambda name: header.pieces[name].start)
    except (OSError, CheckpointError):
        pass
    return None


def _straight(blobs: Blobs, entry: Entry, head: Head | None, rows: Mapping[str, memoryview]) -> bool:
    """Read a blob's data into the rows; False where its hash is another, and the rows are rubbish."""
    if head is None:
        return False
    digest = hashlib.sha256(head[0])
    try:
        with _files.opened(blobs.path(entry.sha256), follow=False) as (file, _):
            if _files.read_some(file, len(head[0])) != head[0]:
                return False
            data = [rows[name] for name in head[1]]
            if not _files.read_each(file, data):
                return False
    except OSError:
        return False
    for row in data:
        digest.update(row)
    return digest.hexdigest() == entry.sha256


def _fits(header: Header, entry: Entry, expected: Mapping[str, Tensor]) -> bool:
    """Whether a blob says what the registry says of it, and its tensors are those of the spec."""
    about, pieces = about_of(header), header.pieces
    return (
        about["spec"] == entry.fields["spec"]
        and about["classes"] == entry.fields["classes"]
        and pieces.keys() == expected.keys()
        and all((pieces[n].shape, pieces[n].dtype) == (t.shape, t.dtype) for n, t in expected.items())
        and not any(piece.dtype is torch.bool for piece in pieces.values())  # whose bytes only a whole read checks
    )
