"""Running a group in one form: from a batch to pieces of logits.

Every function yields `(members, frames, logits)`: a slice of the members, a slice of the frames, and their
(m, b, C) logits, which are only good until the next piece. What is larger than a piece is never held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ensemble.run._engine.batch import Batch
from ensemble.run._engine.dense import Dense
from ensemble.run._engine.overlap import Overlap
from ensemble.run._engine.prepacked import Layouts
from ensemble.run.stack import Stack

Piece = tuple[slice, slice, Tensor]


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


def folded(dense: Dense, batch: Batch, tile: int, dtype: torch.dtype) -> Iterator[Piece]:
    """The first layer as one wide product over the shared input, the others as batched products."""
    for frames in _tiles(batch.count, tile):
        logits = dense(batch.windows[frames].to(dtype))
        yield slice(0, len(logits)), frames, logits


def prepacked(layouts: Layouts, batch: Batch, tile: int, dtype: torch.dtype) -> Iterator[Piece]:
    """As `folded`, with layers laid out for the tile; the rest is filled up to whole quarters of it."""
    quarter = max(1, tile // 4)
    for frames in _tiles(batch.count, tile):
        x = batch.windows[frames].to(dtype)
        missing = -len(x) % quarter
        logits = layouts(len(x) + missing)(pad(x, (0, 0, 0, missing)) if missing else x)
        yield slice(0, len(logits)), frames, logits[:, : len(x)]


class Replay:
    """A step of the folded form as a CUDA graph: recorded once, replayed for every tile of its shape.

    Args:
        dense: the members.
        x: (b, inputs), an example.
    """

    def __init__(self, dense: Dense, x: Tensor) -> None:
        self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries allocate on first use, which no graph may
            dense(self.x)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self.graph):
            self.logits = dense(self.x)

    def __call__(self, x: Tensor) -> Tensor:
        """(b, inputs) -> (M, b, C) logits, overwritten by the next call."""
        self.x.copy_(x)
        self.graph.replay()
        return self.logits


def replayed(dense: Dense, batch: Batch, tile: int, dtype: torch.dtype, known: dict[int, Replay]) -> Iterator[Piece]:
    """As `folded`, by CUDA graphs; `known` keeps them by size of the tile."""
    for frames in _tiles(batch.count, tile):
        x = batch.windows[frames].to(dtype)
        if len(x) == tile and tile not in known:
            known[tile] = Replay(dense, x)
        logits = known[tile](x) if len(x) == tile else dense(x)  # the rest is not worth a graph of its own
        yield slice(0, len(logits)), frames, logits


def overlapped(layouts: Layouts, batch: Batch, tile: int) -> Iterator[Piece]:
    """As `prepacked`, with the first layer over rows instead of windows; gaps between recordings are dropped last."""
    first, rows, firsts = layouts.dense.first, batch.rows, batch.firsts
    assert isinstance(first, Overlap)
    assert rows is not None
    assert firsts is not None
    most = max(1, tile // first.hop)
    quarter = max(1, most // 4)
    for some in _tiles(first.blocks(len(rows) - first.span + 1), most):
        start, stop = some.start * first.hop, some.stop * first.hop
        begin, end = torch.searchsorted(firsts, torch.tensor([start, stop], device=firsts.device)).tolist()
        if begin < end:
            size = -(-(some.stop - some.start) // quarter) * quarter * first.hop
            piece = rows[start : start + size + first.span - 1]
            logits = layouts(size)(pad(piece, (0, 0, 0, size + first.span - 1 - len(piece))))
            yield slice(0, len(logits)), slice(begin, end), logits.index_select(1, firsts[begin:end] - start)


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
