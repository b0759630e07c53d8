"""The ways of running a group: from a batch to pieces of logits.

A `Form` names one; the functions here make the `Runner` for it, which holds the weights as that form needs them. A
runner yields `(members, frames, logits)`: a slice of the members, a slice of the frames, and their (m, b, C) logits,
valid only until the next piece. Nothing larger than a piece is ever held.

`prepacked` has weights that oneDNN has laid out for one size of batch, with bias and activation as part of the product.
All members are one grouped convolution over "images" of one pixel per frame, so that activations stay (B, M * width) in
memory from the first layer to the last. The operators are those that torch's own compiler emits for frozen weights. On
a batch of another size the results are the same, but oneDNN may lay the weights out anew at every call, which is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ensemble.run._engine.batch import Batch, Overlap
from ensemble.run._engine.dense import Affine, Dense, Operation, Step
from ensemble.run.stack import Stack
from zoo.models.blocks import activation_of

Piece = tuple[slice, slice, Tensor]
Runner = Callable[[Batch, int], Iterator[Piece]]
"""Runs the members over a batch, in steps of a tile of frames."""

LAYOUTS = 4  # sizes of batch that weights are laid out for at a time: a tile and its quarters
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "tf32": torch.float32}
_NO_PADDING, _ONE = [0, 0], [1, 1]


@dataclass(frozen=True)
class Form:
    """One way of running M members.

    Args:
        kind: "loop": the modules as they are, one by one. "stack": all at once by vmap. "folded": by
            `Dense`. "prepacked": the same with weights laid out by oneDNN. "replay": the same by CUDA graphs.
            "overlap": with the first layer in the frequency domain.
        tile: frames per step.
        precision: "float32", "bfloat16" or "tf32".
    """

    kind: str
    tile: int
    precision: str = "float32"


def loop(modules: Sequence[nn.Module], dtype: torch.dtype) -> Runner:
    """The modules one by one, as everybody writes it, in the type of their weights."""

    def run(batch: Batch, tile: int) -> Iterator[Piece]:
        for frames in _tiles(batch.count, tile):
            x = _typed(batch.windows[frames], dtype)
            for index, module in enumerate(modules):
                yield slice(index, index + 1), frames, module(x).unsqueeze(0)

    return run


def stacked(stack: Stack, dtype: torch.dtype) -> Runner:
    """All members at once by vmap, in the type of their weights."""
    return lambda batch, tile: _windowed(lambda x: stack(_typed(x, dtype)), batch, tile)


def folded(dense: Dense, dtype: torch.dtype) -> Runner:
    """The first layer as one wide product over the shared input, the others as batched products."""
    ready = dense.to(dtype)
    return lambda batch, tile: _windowed(lambda x: ready(x.to(dtype)), batch, tile)


def prepacked(dense: Dense, dtype: torch.dtype) -> Runner:
    """As `folded`, with weights laid out for the tile; the last, smaller step is filled up to quarters of a tile."""
    laid_out = layouts(dense.to(dtype))

    def step(x: Tensor, *, quarter: int) -> Tensor:
        missing = -len(x) % quarter
        x = x.to(dtype)
        return laid_out(len(x) + missing)(pad(x, (0, 0, 0, missing)) if missing else x)[:, : len(x)]

    return lambda batch, tile: _windowed(partial(step, quarter=max(1, tile // 4)), batch, tile)


def replayed(dense: Dense, dtype: torch.dtype) -> Runner:
    """As `folded`, with each whole tile as a CUDA graph, recorded when it first occurs."""
    ready = dense.to(dtype)
    replays: dict[int, Replay] = {}

    def step(x: Tensor, *, tile: int) -> Tensor:
        x = x.to(dtype)
        if len(x) != tile:
            return ready(x)  # the rest is not worth a graph of its own
        if tile not in replays:
            replays[tile] = Replay(ready, x)
        return replays[tile](x)

    return lambda batch, tile: _windowed(partial(step, tile=tile), batch, tile)


WINDOWED = {"folded": folded, "prepacked": prepacked, "replay": replayed}


def overlapped(dense: Dense, dtype: torch.dtype, features: int, device: torch.device) -> Runner:
    """The first layer over rows instead of windows; later layers prepacked where that is possible.

    Positions in the gaps between recordings are computed too, and dropped at the end.
    """
    first = Overlap(dense.first, features, dtype)
    ready = Dense((replace(dense.steps[0], operation=first), *dense.to(dtype).steps[1:]))
    laid_out = layouts(ready) if available(device) else lambda frames: ready

    def run(batch: Batch, tile: int) -> Iterator[Piece]:
        rows, firsts = batch.rows, batch.firsts
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
                logits = laid_out(size)(pad(piece, (0, 0, 0, size + first.span - 1 - len(piece))))
                yield slice(0, len(logits)), slice(begin, end), logits.index_select(1, firsts[begin:end] - start)

    return run


def _windowed(step: Callable[[Tensor], Tensor], batch: Batch, tile: int) -> Iterator[Piece]:
    """All members at once: `step` maps (b, ...) inputs to (M, b, C) logits."""
    for frames in _tiles(batch.count, tile):
        logits = step(batch.windows[frames])
        yield slice(0, len(logits)), frames, logits


def _typed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs in the type of a model's weights; integers stay integers."""
    return x.to(dtype) if x.is_floating_point() else x


def _tiles(count: int, tile: int) -> Iterator[slice]:
    for start in range(0, count, tile):
        yield slice(start, min(start + tile, count))


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


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let CUDA's float32 products use TF32 internally, if that is the precision asked for."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def available(device: torch.device) -> bool:
    """Whether this build of torch has oneDNN's operators for that device."""
    wanted = ("_convolution_pointwise", "_reorder_convolution_weight")
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in wanted)
    )


def layouts(dense: Dense) -> Callable[[int], Dense]:
    """The same models laid out for batches of so many frames; the last few are kept, each a copy of all weights."""
    return lru_cache(LAYOUTS)(partial(prepack, dense))


def prepack(dense: Dense, frames: int) -> Dense:
    """The same models with prepacked layers, for batches of `frames`; a first layer of another kind stays."""
    layers = {step.target for step in dense.steps if isinstance(step.operation, Affine)}
    behind = {
        step.sources[0]: step
        for step in dense.steps
        if _name(step) and step.sources[0] in layers and step.sources[0] in step.dead
    }
    steps: list[Step] = []
    for step in [step for step in dense.steps if step not in behind.values()]:
        if isinstance(step.operation, Affine):
            after = behind.get(step.target)
            packed = _packed(step.operation, frames, after, shared=not steps)
            step = replace(step, operation=packed, target=after.target if after else step.target)
        steps.append(step)
    return Dense(tuple(steps))


def _packed(layer: Affine, frames: int, behind: Step | None, *, shared: bool) -> Operation:
    """A layer, and the activation step behind it, laid out for batches of `frames`; `shared`: all read one input."""
    members, outputs, inputs = layer.weight.shape
    groups, bias = 1 if shared else members, layer.bias.flatten()
    name = _name(behind) if behind else "none"
    algorithm = getattr(behind.operation, "approximate", "none") if behind and name == "gelu" else ""
    weight = torch.ops.mkldnn._reorder_convolution_weight(
        layer.weight.reshape(members * outputs, inputs, 1, 1),
        _NO_PADDING,
        _ONE,
        _ONE,
        groups,
        [1, groups * inputs, frames, 1],
    )

    def product(x: Tensor) -> Tensor:
        """(M, B, inputs), or (B, inputs) that all members share -> (M, B, outputs)."""
        if x.ndim == 3:
            x = x.transpose(0, 1).flatten(1)  # copies nothing of what such a layer returns
        image = x.reshape(1, len(x), 1, -1).permute(0, 3, 1, 2)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            image, weight, bias, _NO_PADDING, _ONE, _ONE, groups, name, [], algorithm
        )
        return result.permute(0, 2, 3, 1).reshape(len(x), members, -1).transpose(0, 1)

    return product


def _name(step: Step) -> str:
    """OneDNN's name of a step's operation; empty for what it cannot fuse with a product."""
    activation = activation_of(step.operation)
    return (activation and activation.onednn) or ""
