"""`collect`: members over frames, to `MemberOutputs`, in memory or in a store."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

import zoo
from ensemble.outputs import MemberOutputs
from ensemble.outputs.arrays import class_indices, numbers
from ensemble.outputs.store import DTYPES, Contents, Pieces, Store, StoreError
from ensemble.rules.table import FittedRule
from ensemble.run._engine import Batch
from ensemble.run._engine.batch import count_rows, take_rows
from ensemble.run.members import Members, class_order, content_digest, preparation
from zoo.logs import Progress, silent

_log = logging.getLogger("ensemble")
_CHECKED = 4  # frames that are computed again before a stored row is believed
_GATHERED = 16  # steps of frames among which those that are not settled are gathered into steps again
_HELD = 2**28  # bytes: fewer steps where their outputs take more
_ROUNDED = 1000  # a probability's part in a member's identity is a whole number of so many

Inputs = zoo.FrameSet | Any | Mapping[str, zoo.FrameSet | Any]
"""Frames, or (N, ...) rows as a tensor, array or table; or member name -> its own."""


class Feed(Protocol):
    """How members run over frames or inputs."""

    def __call__(self, start: int, stop: int, among: Tensor | None = None, /) -> Iterator[tuple[slice, Tensor]]:
        """From a first frame up to a last: slices of them, and their (M, b, C) log-probabilities on the device.

        Where positions of frames are given, `among`, ascending and on the CPU, these are counted instead of all.
        """


def collect(
    members: Members,
    x: Inputs | Iterable[object],
    cache: str | Path | None = None,
    *,
    dtype: str = "float32",
    progress: Progress | None = None,
    fill: Callable[[Members, Store, Mapping[str, str]], object] | None = None,
) -> MemberOutputs:
    """Every member's probabilities for every frame, in the order of the members.

    Args:
        members: M models.
        x: frames; or (N, ...) inputs, a tensor, an array, or a table for members that take one; or a mapping of member
            name to frames or inputs, for members that take different ones of the same N rows; or batches, each of them
            inputs, (inputs,) or (inputs, labels).
        cache: a folder for a store of outputs over one set of frames. Outputs are then mapped from there instead of
            held in memory, a run that was killed is continued, and only members not in the store are computed. Some
            frames are computed again and compared before a stored row is believed. A member that cannot be identified
            by its content, such as a function outside torch, is not stored, with a warning.
        dtype: "float32" or "float16", type of the log-probabilities in the store.
        progress: shows how many frames, or shards of the store, are done.
        fill: computes what the store lacks of these members, whose rows in it have these names; as
            `ensemble.run.shards.filling` does with several processes. Here, if None.

    Returns:
        (M, N, C) log-probabilities with the labels, groups and fingerprint of the frames.

    Raises:
        TypeError: batches or inputs of another form.
        ValueError: a member cannot take these inputs, is not believed (`zoo.checkpoint.examine` asks each some rows of
            the input) or returns NaN, the classes of the frames are not the members', or the store holds outputs of
            something else.

    Example:
        >>> from ensemble import from_modules
        >>> members = from_modules({"a": torch.nn.Linear(3, 2)}, classes=["no", "yes"])
        >>> collect(members, torch.zeros(5, 3)).shape
        (1, 5, 2)
    """
    shown = progress or silent
    if not (isinstance(x, zoo.FrameSet | Mapping) or hasattr(x, "shape")):
        if cache is not None:
            msg = "expected frames or inputs where a cache is used, got batches, which have no fingerprint"
            raise ValueError(msg)
        if isinstance(x, str) or not isinstance(x, Iterable):
            msg = f"expected frames, inputs (N, ...) as a tensor, array or table, or batches, got {type(x).__name__}"
            raise TypeError(msg)
        if _is_one_batch(x):
            msg = "expected inputs, or batches of them, got one pair of inputs and labels; give it as a batch: [(x, y)]"
            raise TypeError(msg)
        return _from_batches(members, x)
    x = inputs_of(members, x)
    labels, groups, fingerprint = known_of(members, x)

    def outputs(of: Members, values: Tensor) -> MemberOutputs:
        return MemberOutputs(values, of.names, of.classes, labels, groups, fingerprint, about=of.about)

    if cache is None:
        return outputs(members, _in_memory(members, x, shown))
    checks = _Checks.of(members, x)
    known = members if len(checks.keys) == len(members) else None
    if known is None:
        opaque = [name for name in members.names if name not in checks.keys]
        _log.warning("%s are not stored in %s: what decides their outputs cannot be read off them", opaque, cache)
        if len(opaque) == len(members):
            return outputs(members, _in_memory(members, x, shown))
        known = members.subset([*checks.keys])
    store = Store(Path(cache), Contents(fingerprint, count_inputs(x), members.classes, members.precision, dtype))
    if fill is not None:
        store.add([checks.keys[name] for name in known.names])
        fill(known, store, checks.keys)
    values = _in_store(known, x, store, checks.keys, shown)
    checks.refuse_stale(known, values, store)
    store.present(outputs(known, values), [*checks.keys.values()])
    if known is members:
        return outputs(members, values)
    whole = values.new_empty(len(members), *values.shape[1:])
    rest = members.subset(opaque)
    for part, rows in ((known, values), (rest, _in_memory(rest, x, shown))):
        whole[[members.names.index(name) for name in part.names]] = rows.to(whole.dtype)
    return outputs(members, whole)


def inputs_of(members: Members, x: Inputs) -> Inputs:
    """The inputs, of a mapping only those of the members.

    Raises:
        TypeError: neither frames nor an array or table.
        ValueError: no input for a member, or inputs of different lengths.
    """
    if isinstance(x, Mapping):
        if missing := [name for name in members.names if name not in x]:
            msg = f"expected a mapping with an input for each member, got none for {missing}; there are {[*x]}"
            raise ValueError(msg)
        x = {name: inputs_of(members, x[name]) for name in members.names}
        counts = {name: count_inputs(each) for name, each in x.items()}
        if len(set(counts.values())) > 1:
            msg = f"expected inputs of one length for all members, got {counts}"
            raise ValueError(msg)
    elif isinstance(x, Tensor) and (x.layout is not torch.strided or x.is_meta):
        return numbers(x, "inputs")  # dense, or refused
    elif not isinstance(x, zoo.FrameSet) and not getattr(x, "shape", None):
        msg = f"expected frames, or inputs (N, ...) as a tensor, array or table, got {type(x).__name__}"
        raise TypeError(msg)
    return x


def count_inputs(x: Inputs) -> int:
    """Number of frames or rows, N."""
    if isinstance(x, Mapping):
        return count_inputs(next(iter(x.values())))
    return len(x) if isinstance(x, zoo.FrameSet) else count_rows(x)


def predictions(members: Members, x: Inputs) -> Iterator[Tensor]:
    """Every member's outputs, piece by piece: (M, b, C) log-probabilities on the members' device.

    Memory is that of one piece, however many frames there are.

    Raises:
        TypeError, ValueError: as `collect`.
    """
    x = inputs_of(members, x)
    for frames, values in feed_of(members, x)(0, count_inputs(x)):
        refuse_nan(members, values, frames.start)
        yield values


def answers(members: Members, x: Inputs, rule: FittedRule) -> Iterator[tuple[Tensor, Tensor]]:
    """What a rule makes of the members, piece by piece: (b, C) probabilities, and (b,) how many members it asked.

    Of a sparing rule, the frames about which further members are asked are gathered into full steps.

    Args:
        members: M models.
        x: as in `collect`, without batches.
        rule: over these members, by position.

    Raises:
        TypeError, ValueError: as `collect`.
    """
    x = inputs_of(members, x)
    if isinstance(x, zoo.FrameSet):
        x = x.to(members.device)
    size, tolerance = members.step, 0.0
    if rule.sparing:
        step = len(members) * members.step * len(members.classes) * 4  # bytes
        size *= max(1, min(_GATHERED, _HELD // step))
        tolerance = members.tolerance
    feeds: dict[tuple[str, ...], tuple[Members, Feed]] = {}
    for start in range(0, count := count_inputs(x), size):
        stop = min(start + size, count)

        def ask(positions: Sequence[int], frames: Tensor | None, start: int = start, stop: int = stop) -> Tensor:
            names = tuple(members.names[position] for position in positions)
            if names not in feeds:
                team = members.part(names)
                feeds[names] = team, feed_of(team, x)
            team, feed = feeds[names]
            pieces = feed(start, stop) if frames is None else feed(0, len(frames), frames + start)
            found = []
            for where, values in pieces:
                refuse_nan(team, values, start if frames is None else int(frames[where.start]) + start)
                found.append(values)
            return torch.cat(found, dim=1) if len(found) > 1 else found[0]

        yield rule.ask(ask, len(members), tolerance=tolerance)


def feed_of(
    members: Members, x: Inputs, dtype: torch.dtype = torch.float32, memory: Callable[..., Tensor] = torch.empty
) -> Feed:
    """How these members run over these frames or inputs: results of this type, on a CPU in memory that `memory` gives.

    Raises:
        ValueError: a member has no spec, or wants another number of features than the frames have.
    """
    if members.device.type != "cpu":
        memory = partial(torch.empty, device=members.device)
    if isinstance(x, Mapping):
        return _joined(members, x, dtype, memory)
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

    def feed(start: int, stop: int, among: Tensor | None = None, /) -> Iterator[tuple[slice, Tensor]]:
        for first in range(start, stop, members.step):
            frames = slice(first, min(first + members.step, stop))
            some = None if among is None else among[frames]
            if not isinstance(x, zoo.FrameSet):
                yield frames, members.log_probabilities(take_rows(x, frames if some is None else some)).to(dtype)
                continue
            out = memory((len(members), frames.stop - first, len(members.classes)), dtype=dtype)
            begin, end = (first, frames.stop) if some is None else (int(some[0]), int(some[-1]) + 1)
            for spec in members.widest:
                way = spec.context, spec.normalisation, spec.padding
                piece = zoo.data.stretch(x, *way, start=begin, stop=end)
                if some is not None:
                    piece = replace(piece, firsts=piece.firsts[(some - begin).to(piece.firsts.device)])
                members.write(Batch.of(piece), spec, out)
            yield frames, out

    return feed


def _joined(members: Members, x: Mapping[str, Any], dtype: torch.dtype, memory: Callable[..., Tensor]) -> Feed:
    """Members that take different inputs: those that share one, and its preparation, run as one."""
    teams: dict[tuple[Any, ...], list[int]] = {}
    for place, member in enumerate(members):
        given = x[member.name]
        way = None if isinstance(given, zoo.FrameSet) else preparation(member.spec)
        teams.setdefault((id(given), way), []).append(place)
    names = [tuple(members.names[place] for place in places) for places in teams.values()]
    feeds = [feed_of(members.part(some), x[some[0]], dtype) for some in names]

    def feed(start: int, stop: int, among: Tensor | None = None, /) -> Iterator[tuple[slice, Tensor]]:
        for pieces in zip(*(each(start, stop, among) for each in feeds), strict=True):
            frames = pieces[0][0]
            out = memory((len(members), frames.stop - frames.start, len(members.classes)), dtype=dtype)
            for places, (_, values) in zip(teams.values(), pieces, strict=True):
                out[places] = values
            yield frames, out

    return feed


def _in_memory(members: Members, x: Inputs, progress: Progress) -> Tensor:
    count = count_inputs(x)
    out = torch.empty(len(members), count, len(members.classes))
    with progress("frames", total=count) as advance:
        for frames, values in on_cpu(members.device, feed_of(members, x)(0, count)):
            out[:, frames] = values
            advance(values.shape[1])
    refuse_nan(members, out)
    return out


def on_cpu(device: torch.device, pieces: Iterator[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
    """Pieces on the CPU, each good until the one after the next is asked for.

    From a CUDA device they come through pinned memory, so that one is copied while the next is computed; a copy into a
    part of the results would be waited for.
    """
    if device.type != "cuda":
        yield from pieces
        return
    memory: list[Tensor] = [torch.empty(0)] * 3  # copied to, given out, and given out before
    coming: tuple[slice, Tensor, torch.cuda.Event] | None = None
    for number, (frames, values) in enumerate(pieces):
        place, size = number % len(memory), values.numel()
        if memory[place].dtype != values.dtype or len(memory[place]) < size:
            memory[place] = torch.empty(size, dtype=values.dtype, pin_memory=True)
        held = memory[place][:size].view(values.shape)
        with torch.cuda.device(device):
            held.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        if coming is not None:
            coming[2].synchronize()
            yield coming[:2]
        coming = frames, held, arrived
    if coming is not None:
        coming[2].synchronize()
        yield coming[:2]


def _in_store(members: Members, x: Inputs, store: Store, keys: Mapping[str, str], progress: Progress) -> Tensor:
    store.add([keys[name] for name in members.names])
    teams: dict[tuple[str, ...], tuple[Members, Feed]] = {}
    with progress("shards", total=store.shards) as advance, ThreadPoolExecutor(1) as disk:
        pending: Future[None] = disk.submit(lambda: None)
        for shard in range(store.shards):
            lacking = tuple(name for name in members.names if store.lacks(keys[name], shard))
            if lacking:
                if lacking not in teams:
                    team = members if lacking == members.names else members.subset(lacking)
                    teams[lacking] = team, feed_of(team, x, DTYPES[store.contents.dtype], Pieces())
                team, feed = teams[lacking]
                rows = [keys[name] for name in lacking]
                for frames, values in on_cpu(members.device, feed(*store.frames(shard))):
                    refuse_nan(team, values, frames.start)
                    pending.result()  # a piece is written while the next is computed, in the memory of the one before
                    pending = disk.submit(store.put, rows, frames.start, values)
                pending.result()
                pending = disk.submit(store.finish, rows, shard)
            advance()
        pending.result()
    return store.read([keys[name] for name in members.names])


@dataclass(frozen=True, eq=False)
class _Checks:
    """What tells whether a row of a store is of a member as it is now."""

    names: tuple[str, ...]  # of M members
    keys: dict[str, str]  # name -> identity in a store; without the members of which it cannot be told
    frames: list[int]  # some of N, on which every member was asked alone
    probabilities: Tensor  # (M, k, C), what they answered
    tolerances: list[float]  # how far a stored probability may be from that

    @classmethod
    def of(cls, members: Members, x: Inputs) -> Self:
        """Ask every member a few frames, one by one.

        A member from a registry is identified by its checkpoint. Any other also by its answers, for its code may differ
        where its weights do not, and by its own input where members have different ones.
        """
        count = count_inputs(x)
        frames = sorted({place * (count - 1) // (_CHECKED - 1) for place in range(_CHECKED)}) if count else []
        alone = Members([*members], device=members.device, plan="loop", classes=members.classes)
        feed = feed_of(alone, x)
        answers = [values.cpu() for frame in frames for _, values in feed(frame, frame + 1)]
        probabilities = torch.cat(answers or [torch.empty(len(members), 0, len(members.classes))], dim=1).exp()
        keys, tolerances = {}, [0.0] * len(members)
        for member, rows in zip(members, probabilities, strict=True):
            key = member.digest
            if key and not member.sha256:
                answer = (rows.double() * _ROUNDED).round().long()
                key = hashlib.sha256(f"{key} {answer.tolist()}".encode()).hexdigest()
            if key and isinstance(x, Mapping):
                key = hashlib.sha256(f"{key} {_fingerprint(x[member.name])}".encode()).hexdigest()
            if key:
                keys[member.name] = key
        for group, places in alone.groups:
            for place in places:
                tolerances[place] = 2e-2 if members.precision == "auto" or group.dtype.itemsize < 4 else 1e-3
        return cls(members.names, keys, frames, probabilities, tolerances)

    def refuse_stale(self, members: Members, values: Tensor, store: Store) -> None:
        """Refuse (StoreError) stored outputs (M, N, C) that are not what the members, of those asked, answer now."""
        now = dict(zip(self.names, zip(self.probabilities, self.tolerances, strict=True), strict=True))
        for name, row in zip(members.names, values, strict=True):
            answers, tolerance = now[name]
            moved = (row[self.frames].float().exp() - answers).abs().flatten()
            if len(moved) and not moved.max() <= tolerance:
                msg = f"{store.folder} holds outputs of {name!r} that it no longer gives (a probability moved by "
                way_out = "its code, or that of its architecture, has changed; use another folder"
                raise StoreError(f"{msg}{float(moved.max()):.2g}): {way_out}")


def known_of(members: Members, x: Inputs) -> tuple[Tensor | None, Tensor | None, str]:
    """Labels in the order of the members' classes and recordings, where frames have them; and the fingerprint."""
    given = {id(each): each for each in (x.values() if isinstance(x, Mapping) else [x])}
    framed = [each for each in given.values() if isinstance(each, zoo.FrameSet)]
    if not framed:
        prints = sorted(_fingerprint(each) for each in given.values())
        return None, None, prints[0] if len(prints) == 1 else hashlib.sha256(" ".join(prints).encode()).hexdigest()
    known = []
    for frames in framed:
        wanted = "frames with the members' classes"
        order = class_order(members.classes, frames.classes, wanted, "the members", "the frames")
        labels = None if frames.labels is None else frames.labels.cpu()
        known.append(labels if order is None or labels is None else order[labels])
        if not torch.equal(frames.groups, framed[0].groups) or not _equal(known[-1], known[0]):
            msg = "expected frames of the same recordings with the same labels for all members, got different ones"
            raise ValueError(msg)
    return known[0], framed[0].groups, framed[0].fingerprint


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _from_batches(members: Members, batches: Iterable[object]) -> MemberOutputs:
    values, labels, number = [torch.empty(len(members), 0, len(members.classes))], [], 0
    for number, batch in enumerate(batches, 1):
        inputs, target = _parts(members, batch, number - 1)
        count = count_inputs(inputs)
        values += [piece.cpu() for _, piece in feed_of(members, inputs)(0, count)]
        if target is not None:
            if len(target) != count:
                msg = f"expected {count} labels, one per row of batch {number - 1}, got {len(target)}"
                raise ValueError(msg)
            labels.append(class_indices(target, members.classes, len(members.classes), frames=count))
    if labels and len(labels) < number:
        msg = f"expected labels with every batch or with none, got {len(labels)} of {number} with labels"
        raise ValueError(msg)
    out = torch.cat(values, dim=1)
    refuse_nan(members, out)
    truth = torch.cat(labels) if labels else None
    return MemberOutputs(out, members.names, members.classes, truth, about=members.about)


def _is_one_batch(x: object) -> bool:
    """Whether a pair is (inputs, labels): the second part has one axis, and the first is no such array."""
    axes = [len(getattr(part, "shape", ())) for part in x] if isinstance(x, tuple) and len(x) == 2 else []
    return bool(axes) and axes[1] == 1 != axes[0]


def _parts(members: Members, batch: object, number: int) -> tuple[Inputs, Any]:
    """Inputs and labels of a batch; labels are None where it has none."""
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    inputs = parts[0] if 1 <= len(parts) <= 2 else None
    named = isinstance(inputs, Mapping) and all(name in inputs for name in members.names)
    if named or (not isinstance(inputs, Mapping) and getattr(inputs, "shape", None)):
        return inputs_of(members, inputs), parts[1] if len(parts) == 2 else None
    came = type(batch).__name__
    if isinstance(batch, tuple | list):
        came = f"a {came} of {len(parts)} ({', '.join(type(part).__name__ for part in parts)})"
    elif isinstance(batch, Mapping):
        came = f"a {came} with {[*batch]}"
    wanted = "batches of inputs, or of (inputs,) or (inputs, labels), as tensors, arrays or tables"
    msg = f"expected {wanted}, got {came} as batch {number}; pick them in a generator"
    raise TypeError(msg)


def refuse_nan(members: Members, values: Tensor, start: int = 0) -> None:
    """A `ValueError` where a member gives NaN; the first of these frames has the number `start`."""
    sums = values.sum(dim=(1, 2))  # (M,), NaN where any is
    for name, row, total in zip(members.names, values, sums.tolist(), strict=True):
        if total != total:
            frame = start + int(row.isnan().any(dim=-1).nonzero()[0])
            msg = f"expected probabilities from member {name!r}, got NaN at frame {frame}; check its weights and inputs"
            raise ValueError(msg)


def _fingerprint(x: Any) -> str:
    """Of frames, and of inputs by their content; a TypeError where that cannot be read."""
    if isinstance(x, zoo.FrameSet):
        return x.fingerprint
    columns = getattr(x, "columns", None)  # a member may look for them by name
    try:
        x = numbers(x, "inputs")
    except (TypeError, ValueError):  # tables of text and numbers, text, sparse matrices
        if not (found := content_digest(x)):
            msg = f"expected inputs as a tensor, array or table, got {type(x).__name__}"
            raise TypeError(msg) from None
        return found
    digest = hashlib.sha256(f"{tuple(x.shape)} {x.dtype}{'' if columns is None else [*columns]}".encode())
    for block in torch.split(x, 65_536):
        digest.update(block.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
