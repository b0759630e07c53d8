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

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ensemble.run._engine.batch import Batch, Overlap
from ensemble.run._engine.dense import Affine, Dense, Operation
from ensemble.run._engine.dense import Step as DenseStep
from zoo.models.blocks import activation_of

Piece = tuple[slice, slice, Tensor]
Runner = Callable[[Batch, int], Iterator[Piece]]  # over a batch, a tile of frames at a time
Step = Callable[[Tensor, int], Tensor]  # (b, ...) inputs and the frames of a whole tile -> (m, b, C) logits

LAYOUTS = 4  # sizes of batch that weights are laid out for at a time: a tile and its quarters
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Form:
    """One way of running M members.

    Kinds: "loop", the modules as they are, one by one; "stack", all at once by vmap; "folded", by `Dense`; "prepacked",
    the same with weights laid out by oneDNN; "replay", the same as CUDA graphs; "overlap", with the first layer in the
    frequency domain.
    """

    kind: str
    tile: int  # frames per step
    precision: str = "float32"  # or another in `DTYPES`


def windowed(steps: Sequence[Step], cast: Callable[[Tensor], Tensor]) -> Runner:
    """Tiles of windows, in the type that is wanted, through steps that have the members in order, some or all each."""

    def run(batch: Batch, tile: int) -> Iterator[Piece]:
        for start in range(0, batch.count, tile):
            x = cast(batch.windows[start : start + tile])
            frames = slice(start, start + len(x))
            first = 0
            for step in steps:
                logits = step(x, tile)
                yield slice(first, first + len(logits)), frames, logits
                first += len(logits)

    return run


def keeping_nan(run: Runner) -> Runner:
    """Rows with NaN give NaN, as in the loop: an activation that oneDNN fuses would make numbers of them.

    Only inputs can hold NaN; frames cannot.
    """

    def guarded(batch: Batch, tile: int) -> Iterator[Piece]:
        for members, frames, logits in run(batch, tile):
            if batch.stretch is None:
                lost = batch.windows[frames].flatten(1).sum(dim=1).isnan()
                logits = logits.masked_fill(lost[:, None], torch.nan) if lost.any() else logits
            yield members, frames, logits

    return guarded


def outside(module: Callable[[Any], Tensor]) -> Runner:
    """All rows as they came through one member that is no torch module."""
    return lambda batch, tile: iter([(slice(0, 1), slice(0, batch.count), module(batch.rows).unsqueeze(0))])


def prepacked(dense: Dense) -> Step:
    """Weights laid out for the tile; the last, smaller tile is filled up to quarters of one."""
    laid_out = layouts(dense)

    def step(x: Tensor, tile: int) -> Tensor:
        missing = -len(x) % max(1, tile // 4)
        return laid_out(len(x) + missing)(pad(x, (0, 0, 0, missing)) if missing else x)[:, : len(x)]

    return step


def replayed(dense: Dense) -> Step:
    """Each whole tile as a CUDA graph, recorded when it first occurs; the logits are overwritten by the next call."""
    recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def record(x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(x.device):  # what is captured is the work of the current device
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries allocate on first use, which no graph may
                dense(x)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):  # other threads may go on
                logits = dense(x)
        return graph, x, logits

    def step(x: Tensor, tile: int) -> Tensor:
        if len(x) != tile:
            return dense(x)  # the rest is not worth a graph of its own
        if tile not in recorded:
            recorded[tile] = record(x.clone())
        graph, inputs, logits = recorded[tile]
        inputs.copy_(x)
        graph.replay()
        return logits

    return step


@contextmanager
def products(*, tf32: bool) -> Iterator[None]:
    """CUDA's float32 products in TF32, or not; the user's own setting comes back exactly as it was.

    The older `allow_tf32` cannot be read where the newer setting is in use.
    """
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):  # before torch 2.9
        kept = matmul.allow_tf32
        matmul.allow_tf32 = tf32
        try:
            yield
        finally:
            matmul.allow_tf32 = kept
        return
    if (matmul.fp32_precision == "tf32") == tf32:
        yield
        return
    before = _own_setting()
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _own_setting() -> str:
    """What is set for products themselves: "none" where they follow the setting of CUDA or that of all backends."""
    general: Any = torch.backends  # a module with a property
    cuda = torch.backends.cudnn
    kept, kept_cuda = general.fp32_precision, _own(cuda, general)
    found = _own(torch.backends.cuda.matmul, cuda)
    cuda.fp32_precision, general.fp32_precision = kept_cuda, kept
    return found


def _own(setting: Any, followed: Any) -> str:
    """A setting itself; reading it gives the one that it follows while it is none, which is changed to find out."""
    seen = []
    for value in ("ieee", "tf32"):
        followed.fp32_precision = value
        seen.append(str(setting.fp32_precision))
    return seen[0] if seen[0] == seen[1] else "none"


FOLDED: dict[str, Callable[[Dense], Step]] = {
    "folded": lambda dense: lambda x, tile: dense(x),
    "prepacked": prepacked,
    "replay": replayed,
}


def overlapped(dense: Dense, dtype: torch.dtype, features: int, device: torch.device) -> Runner:
    """The first layer over rows instead of windows; later layers prepacked where that is possible.

    Positions in the gaps between recordings are computed too, and dropped at the end.
    """
    first = Overlap(dense.first, features, dtype)
    ready = Dense((replace(dense.steps[0], operation=first), *dense.to(dtype).steps[1:]))
    laid_out = layouts(ready) if available(device) else lambda frames: ready

    def run(batch: Batch, tile: int) -> Iterator[Piece]:
        assert batch.stretch is not None
        rows, firsts = batch.stretch.rows, batch.stretch.firsts
        most = max(1, tile // first.hop)
        quarter = max(1, most // 4)
        blocks = first.blocks(len(rows))
        edges = [*range(0, blocks, most), blocks]
        bounds = torch.tensor([block * first.hop for block in edges], device=firsts.device)
        places = torch.searchsorted(firsts, bounds).tolist()
        for block, begin, end in zip(edges, places, places[1:], strict=False):
            some = min(most, blocks - block)
            start = block * first.hop
            if begin < end:
                size = math.ceil(some / quarter) * quarter * first.hop
                piece = rows[start : start + size + first.span - 1]
                logits = laid_out(size)(pad(piece, (0, 0, 0, size + first.span - 1 - len(piece))))
                yield slice(0, len(logits)), slice(begin, end), logits.index_select(1, firsts[begin:end] - start)

    return run


def available(device: torch.device) -> bool:
    """Whether this build of torch has oneDNN's operators for that device."""
    built = device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    wanted = ("_convolution_pointwise", "_reorder_convolution_weight")
    return built and all(hasattr(torch.ops.mkldnn, name) for name in wanted)


def layouts(dense: Dense) -> Callable[[int], Dense]:
    """The same models laid out for batches of so many frames; the last few are kept, each a copy of all weights."""
    return lru_cache(LAYOUTS)(partial(prepack, dense))


def prepack(dense: Dense, frames: int) -> Dense:
    """The same models with prepacked layers, for batches of `frames`; a first layer of another kind stays."""
    after = {step.sources[0]: step for step in dense.steps if _fusible(step) and step.sources[0] in step.dead}
    steps: list[DenseStep] = []
    fused: list[DenseStep | None] = []
    for step in dense.steps:
        if isinstance(step.operation, Affine):
            behind = after.get(step.target)
            packed = _packed(step.operation, frames, behind, shared=not steps)
            steps.append(replace(step, operation=packed, target=behind.target if behind else step.target))
            fused.append(behind)
        elif step not in fused:
            steps.append(step)
    return Dense(tuple(steps))


def _packed(layer: Affine, frames: int, behind: DenseStep | None, *, shared: bool) -> Operation:
    """A layer, and the activation step behind it, laid out for batches of `frames`; `shared`: all read one input."""
    members, outputs, inputs = layer.weight.shape
    groups, bias = 1 if shared else members, layer.bias.flatten()
    name = _fusible(behind) if behind else "none"
    algorithm = getattr(behind.operation, "approximate", "none") if behind and name == "gelu" else ""
    window = [0, 0], [1, 1], [1, 1], groups  # padding, stride, dilation
    weight = layer.weight.reshape(members * outputs, inputs, 1, 1)
    weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *window, [1, groups * inputs, frames, 1])

    def product(x: Tensor) -> Tensor:
        """(M, B, inputs), or (B, inputs) that all members share -> (M, B, outputs)."""
        if x.ndim == 3:
            x = x.transpose(0, 1).flatten(1)  # copies nothing of what such a layer returns
        image = x.reshape(1, len(x), 1, -1).permute(0, 3, 1, 2)
        result: Tensor
        result = torch.ops.mkldnn._convolution_pointwise(image, weight, bias, *window, name, [], algorithm)
        return result.permute(0, 2, 3, 1).reshape(len(x), members, -1).transpose(0, 1)

    return product


def _fusible(step: DenseStep) -> str:
    """OneDNN's name of a step's operation; empty for what it cannot fuse with a product."""
    known = activation_of(step.operation)
    return (known and known.onednn) or ""
