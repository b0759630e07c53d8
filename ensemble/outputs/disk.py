"""Large rows into a file, past the page cache where the system can.

What is written once and read much later need not be copied into the cache first: that costs a core as long as
the disk itself takes, while both cores compute.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PAGE = 4096  # bytes; what begins at a multiple of it, in memory and in the file, can go past the cache
Bytes = NDArray[np.uint8]


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


def write_rows(path: Path, rows: Iterable[tuple[int, Bytes]]) -> None:
    """Write each row of bytes at its place; nothing is on the disk for certain before an fsync.

    Args:
        path: a file that is there.
        rows: place in the file, and bytes.

    Raises:
        OSError: what the system said.
    """
    with path.open("r+b", buffering=0) as file, _past_the_cache(path) as direct:
        for place, row in rows:
            done = 0
            if direct is not None and place % PAGE == 0 and row.ctypes.data % PAGE == 0:
                with suppress(OSError):  # what is not done is written the ordinary way, or fails there
                    done = _write(direct, place, row[: len(row) // PAGE * PAGE])
            _write(file.fileno(), place + done, row[done:])


def _write(file: int, place: int, row: Bytes) -> int:
    """How many bytes were written: all of them."""
    done = 0
    while done < len(row):
        done += os.pwrite(file, row[done:].data, place + done)
    return done


@contextmanager
def _past_the_cache(path: Path) -> Iterator[int | None]:
    """A descriptor whose writes do not go through the cache; None where there is no such thing."""
    try:
        file = os.open(path, os.O_RDWR | os.O_DIRECT)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield file
    finally:
        os.close(file)
