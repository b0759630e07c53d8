"""Running a group in one form: from a batch to pieces of logits.

Every function yields `(members, frames, logits)`: a slice of the members, a slice of the frames, and their
(m, b, C) logits, which are only good until the next piece. What is larger than a piece is never held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensemble.engine.batch import Batch
from ensemble.engine.dense import Dense
from ensemble.engine.overlap import Overlap
from ensemble.stack import Stack

Piece = tuple[slice, slice, Tensor]


@dataclass(frozen=True)
class Part:
    """Some of the members in the folded form, ready to run.

    Args:
        members: which.
        dense: their layers.
        overlap: the first layer of *all* members in the frequency domain, or None.
    """

    members: slice
    dense: Dense
    overlap: Overlap | None = None


def loop(modules: Sequence[nn.Module], batch: Batch, tile: int) -> Iterator[Piece]:
    """The modules one by one, as everybody writes it."""
    for frames in _tiles(batch.count, tile):
        x = batch.windows[frames]
        for index, module in enumerate(modules):
            yield slice(index, index + 1), frames, module(x).unsqueeze(0)


def stacked(stack: Stack, batch: Batch, tile: int) -> Iterator[Piece]:
    """All members at once by vmap."""
    for frames in _tiles(batch.count, tile):
        yield slice(0, len(stack)), frames, stack(batch.windows[frames])


def folded(parts: Sequence[Part], batch: Batch, tile: int) -> Iterator[Piece]:
    """The first layer as one wide product over the shared input, the others as batched products."""
    dtype = parts[0].dense.first.weight.dtype
    for frames in _tiles(batch.count, tile):
        x = batch.windows[frames].to(dtype).t()  # (inputs, b)
        for part in parts:
            yield part.members, frames, _folded_step(part.dense, x)


class Replay:
    """A step of the folded form as a CUDA graph: recorded once, replayed for every tile of its shape.

    Args:
        part: the members.
        x: (inputs, b), an example.
    """

    def __init__(self, part: Part, x: Tensor) -> None:
        self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries allocate on first use, which no graph may
            _folded_step(part.dense, self.x)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self.graph):
            self.logits = _folded_step(part.dense, self.x)

    def __call__(self, x: Tensor) -> Tensor:
        """(inputs, b) -> (m, b, C) logits, overwritten by the next call."""
        self.x.copy_(x)
        self.graph.replay()
        return self.logits


def replayed(parts: Sequence[Part], batch: Batch, tile: int, known: dict[tuple[int, int], Replay]) -> Iterator[Piece]:
    """As `folded`, by CUDA graphs; `known` keeps them by place of the part and size of the tile."""
    dtype = parts[0].dense.first.weight.dtype
    for frames in _tiles(batch.count, tile):
        x = batch.windows[frames].to(dtype).t()
        for place, part in enumerate(parts):
            if x.shape[1] < tile:  # the rest is not worth a graph of its own
                yield part.members, frames, _folded_step(part.dense, x)
                continue
            if (place, tile) not in known:
                known[place, tile] = Replay(part, x)
            yield part.members, frames, known[place, tile](x)


def overlapped(parts: Sequence[Part], batch: Batch, tile: int) -> Iterator[Piece]:
    """As `folded`, with the first layer over rows instead of windows; gaps between recordings are dropped last."""
    first, rows, firsts = parts[0].overlap, batch.rows, batch.firsts
    assert first is not None
    assert rows is not None
    assert firsts is not None
    for places in _tiles(len(rows) - first.span + 1, min(tile, first.step)):
        begin, end = torch.searchsorted(
            firsts, torch.tensor([places.start, places.stop], device=firsts.device)
        ).tolist()
        if begin == end:
            continue
        spectra = first.spectra(rows[places.start : places.stop + first.span - 1])
        wanted = firsts[begin:end] - places.start
        for part in parts:
            affine = part.dense.first
            count, width = affine.weight.shape[:2]
            product = first(spectra, slice(part.members.start * width, part.members.stop * width))
            logits = part.dense.finish(product.view(count, width, -1).add_(affine.bias))
            yield part.members, slice(begin, end), logits.index_select(1, wanted)


def _folded_step(dense: Dense, x: Tensor) -> Tensor:
    weight = dense.first.weight
    product = torch.mm(weight.flatten(0, 1), x).view(*weight.shape[:2], -1)
    return dense.finish(product.add_(dense.first.bias))


def _tiles(count: int, tile: int) -> Iterator[slice]:
    for start in range(0, count, tile):
        yield slice(start, min(start + tile, count))


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let CUDA's float32 products use TF32 inside, if that is the precision asked for."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
