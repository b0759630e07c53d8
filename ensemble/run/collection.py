"""`collect`: members over frames, to `MemberOutputs`, in memory or in a store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import zoo
from ensemble.outputs import MemberOutputs
from ensemble.outputs.store import DTYPES, Contents, Pieces, Store
from ensemble.run._engine import Batch
from ensemble.run.members import Members, class_order
from zoo.logs import Progress, silent

Feed = Callable[[int, int], Iterator[tuple[slice, Tensor]]]
"""From a first frame up to a last: slices of them, and their (M, b, C) log-probabilities on the members' device."""


def collect(
    members: Members,
    x: zoo.FrameSet | Tensor | Iterable[object],
    cache: str | Path | None = None,
    *,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> MemberOutputs:
    """Every member's probabilities for every frame, in the order of the members.

    Args:
        members: M models.
        x: frames; or (N, inputs) inputs; or batches, each of them inputs, (inputs,) or (inputs, labels).
        cache: a folder for a store of outputs over one set of frames. Outputs are then mapped from there instead of
            held in memory, a run that was killed is continued, and only members not in the store are computed.
        dtype: "float32" or "float16", type of the log-probabilities in the store.
        progress: shows how many frames, or shards of the store, are done.

    Returns:
        (M, N, C) log-probabilities with the labels, groups and fingerprint of the frames.

    Raises:
        ValueError: a member cannot take these inputs or returns NaN, the classes of the frames are
            not the members', or the store holds outputs of something else.

    Example:
        >>> from ensemble import from_modules
        >>> members = from_modules({"a": torch.nn.Linear(3, 2)}, classes=["no", "yes"])
        >>> collect(members, torch.zeros(5, 3)).shape
        (1, 5, 2)
    """
    if not isinstance(x, zoo.FrameSet | Tensor):
        if cache is not None:
            msg = "expected a FrameSet or a tensor where a cache is used, got batches, which have no fingerprint"
            raise ValueError(msg)
        return _from_batches(members, x)
    if isinstance(x, zoo.FrameSet):
        wanted = "frames with the members' classes"
        order = class_order(members.classes, x.classes, wanted, "the members", "the frames")
        labels = x.labels if order is None or x.labels is None else order[x.labels]
        groups, fingerprint = x.groups, x.fingerprint
    else:
        labels, groups, fingerprint = None, None, _fingerprint(x)
    contents = Contents(fingerprint, len(x), members.classes, members.precision, dtype)
    store = None if cache is None else Store(Path(cache), contents)
    shown = progress or silent
    values = _in_memory(members, x, shown) if store is None else _in_store(members, x, store, shown)
    outputs = MemberOutputs(values, members.names, members.classes, labels, groups, fingerprint, about=members.about)
    if store is not None:
        store.present(outputs, members.digests)
    return outputs


def predictions(members: Members, x: zoo.FrameSet | Tensor) -> Iterator[Tensor]:
    """Every member's outputs, piece by piece: (M, b, C) log-probabilities on the members' device.

    Memory is that of one piece, however many frames there are.

    Raises:
        ValueError: as `collect`.
    """
    for frames, values in feed_of(members, x)(0, len(x)):
        _refuse_nan(members, values, frames.start)
        yield values


def feed_of(
    members: Members,
    x: zoo.FrameSet | Tensor,
    dtype: torch.dtype = torch.float32,
    memory: Callable[..., Tensor] = torch.empty,
) -> Feed:
    """How these members run over these frames or inputs: results of this type, on a CPU in memory that `memory` gives.

    Raises:
        ValueError: a member has no spec, or wants another number of features than the frames have.
    """
    if isinstance(x, zoo.FrameSet):
        found = x.features.shape[1]
        for name, spec in [(member.name, member.spec) for member in members]:
            if spec is None:
                msg = f"expected a spec for member {name!r} to prepare frames by, got none: give `specs`, or windows"
                raise ValueError(msg)
            if spec.features != found:
                msg = f"expected frames of {spec.features} features for member {name!r}, got {found}"
                raise ValueError(msg)
        x = x.to(members.device)
    if members.device.type != "cpu":
        memory = partial(torch.empty, device=members.device)

    def feed(start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        for first in range(start, stop, members.step):
            frames = slice(first, min(first + members.step, stop))
            if isinstance(x, Tensor):
                yield frames, members.log_probabilities(x[frames]).to(dtype)
                continue
            out = memory((len(members), frames.stop - first, len(members.classes)), dtype=dtype)
            for spec in members.widest:
                way = spec.context, spec.normalisation, spec.padding
                members.write(Batch.of(zoo.data.stretch(x, *way, start=first, stop=frames.stop)), spec, out)
            yield frames, out

    return feed


def _in_memory(members: Members, x: zoo.FrameSet | Tensor, progress: Progress) -> Tensor:
    on_gpu = members.device.type == "cuda"
    out = torch.empty(len(members), len(x), len(members.classes), pin_memory=on_gpu)
    with progress("frames", total=len(x)) as advance:
        for frames, values in feed_of(members, x)(0, len(x)):
            out[:, frames].copy_(values, non_blocking=on_gpu)
            advance(values.shape[1])
    if on_gpu:
        torch.cuda.synchronize()
    _refuse_nan(members, out)  # once at the end: a look at each piece would wait for the GPU
    return out


def _in_store(members: Members, x: zoo.FrameSet | Tensor, store: Store, progress: Progress) -> Tensor:
    store.add(members.digests)
    teams: dict[tuple[str, ...], tuple[Members, Feed]] = {}
    with progress("shards", total=store.shards) as advance, ThreadPoolExecutor(1) as disk:
        pending: Future[None] = disk.submit(lambda: None)
        for shard in range(store.shards):
            lacking = tuple(member.name for member in members if store.lacks(member.digest, shard))
            if lacking:
                if lacking not in teams:
                    team = members if lacking == members.names else members.subset(lacking)
                    teams[lacking] = team, feed_of(team, x, DTYPES[store.contents.dtype], Pieces())
                team, feed = teams[lacking]
                for frames, values in feed(*store.frames(shard)):
                    _refuse_nan(team, values, frames.start)
                    pending.result()  # a piece is written while the next is computed, in the memory of the one before
                    pending = disk.submit(store.put, team.digests, frames.start, values)
                pending.result()
                pending = disk.submit(store.finish, team.digests, shard)
            advance()
        pending.result()
    return store.read(members.digests)


def _from_batches(members: Members, batches: Iterable[object]) -> MemberOutputs:
    values, labels = [torch.empty(len(members), 0, len(members.classes))], []
    for number, batch in enumerate(batches):
        inputs, target = _parts(batch, number)
        values.append(members.log_probabilities(inputs).cpu())
        labels += [] if target is None else [target]
    if labels and len(labels) < len(values) - 1:
        msg = f"expected labels with every batch or with none, got {len(labels)} of {len(values) - 1} with labels"
        raise ValueError(msg)
    out = torch.cat(values, dim=1)
    _refuse_nan(members, out)
    truth = torch.cat(labels) if labels else None
    return MemberOutputs(out, members.names, members.classes, truth, about=members.about)


def _parts(batch: object, number: int) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels of a batch."""
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if not 1 <= len(parts) <= 2 or not isinstance(parts[0], Tensor):
        came = type(batch).__name__
        if isinstance(batch, tuple | list):
            came = f"a {came} of {len(parts)} ({', '.join(type(part).__name__ for part in parts)})"
        elif isinstance(batch, dict):
            came = f"a {came} with {[*batch]}"
        wanted = "batches of inputs, or of (inputs,) or (inputs, labels), as tensors"
        msg = f"expected {wanted}, got {came} as batch {number}; pick them in a generator"
        raise TypeError(msg)
    inputs, target = parts[0], parts[1] if len(parts) == 2 else None
    if target is None:
        return inputs, None
    labels = torch.as_tensor(target).detach().cpu()
    if labels.shape != inputs.shape[:1]:
        msg = f"expected {len(inputs)} labels, one per row of batch {number}, got {tuple(labels.shape)}"
        raise ValueError(msg)
    return inputs, labels


def _refuse_nan(members: Members, values: Tensor, start: int = 0) -> None:
    sums = values.sum(dim=(1, 2))  # (M,), NaN where any is
    for name, row, total in zip(members.names, values, sums.tolist(), strict=True):
        if total != total:
            frame = start + int(row.isnan().any(dim=-1).nonzero()[0])
            msg = f"expected probabilities from member {name!r}, got NaN at frame {frame}; check its weights and inputs"
            raise ValueError(msg)


def _fingerprint(x: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(x.shape)} {x.dtype}".encode())
    for block in torch.split(x, 65_536):
        digest.update(block.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
