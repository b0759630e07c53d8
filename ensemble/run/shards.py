"""Shards: whole recordings, over which workers run the members; what they give back makes the same whole to the bit.

A shard is about a million frames, and which frames it has follows from the recordings alone. Members run over it in the
same batches, in the same forms, as they would over all frames. It leaves a `Tally`, or rows in a store; so memory is
that of the members and of one batch, however many frames and members there are.

Results are files in a run folder, written whole. A run that is started again goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import zoo
from ensemble.judge.excerpt import sampling_keys
from ensemble.judge.metrics import METRICS, Metric, get_metric
from ensemble.judge.tables import Counting, Judged, Tally, aligned, block_size
from ensemble.outputs import MemberOutputs
from ensemble.outputs.arrays import singles
from ensemble.outputs.store import UNFINISHED, Contents, Store
from ensemble.rules.table import FittedRule, Rule
from ensemble.run import collection
from ensemble.run._engine import Form, Plan, overlapping, size_of
from ensemble.run.collection import feed_of, on_cpu, refuse_nan
from ensemble.run.members import Members, class_order, content_digest
from zoo import _files
from zoo.data.normalisation import NORMALISATIONS
from zoo.logs import Progress
from zoo.workers import Processes, Ray, Workers, carry_out

__all__ = ["Processes", "Ray", "Shard", "filling", "judge", "sample", "shards", "tally"]

Integers = NDArray[np.int64]
Forms = list[tuple[tuple[str, ...], list[tuple[int, bool, Form]]]]
"""Of each group of members, by their names: the form for each size of batch, with or without overlaps."""

_MOST = 2**20  # frames of a shard
_SAMPLE = 2_000_000  # frames that rules are fitted on
_HELD = 2**28  # numbers of outputs that are held in memory, a GiB; more are mapped from a file
_FORMAT = 1  # of a run folder
_RUN = "run.json"


@dataclass(frozen=True)
class Shard:
    """Whole recordings that are done at a time."""

    number: int
    first: int  #: recording
    last: int  #: the recording behind it
    start: int  #: frame
    stop: int  #: the frame behind it

    def __str__(self) -> str:
        return f"shard {self.number}"


def shards(starts: Tensor, most: int) -> list[Shard]:
    """As many recordings as have at most so many frames together, in order; a longer one is a shard of its own.

    Args:
        starts: (U + 1,) int64, the first frame of each recording, then the number of frames.
        most: frames.
    """
    edges, found, first = starts.cpu().numpy(), list[Shard](), 0
    while first < len(edges) - 1:
        last = max(first + 1, int(np.searchsorted(edges, edges[first] + most, side="right")) - 1)
        found.append(Shard(len(found), first, last, int(edges[first]), int(edges[last])))
        first = last
    return found


@dataclass(frozen=True)
class _Part:
    """What a worker needs to know of a shard: its frames, and those around them that are in the same batches."""

    shard: Shard
    frames: zoo.FrameSet
    offset: int  # of these frames in all
    recordings: int  # before them
    start: int  # where the batches begin, a frame of all, and where they end
    stop: int
    chosen: Integers | None  # the frames that are wanted, ascending; all of the shard if None
    place: int  # of the first of them in the store

    def run(self, members: Members) -> Iterator[tuple[int, slice, Tensor]]:
        """(M, b, C) log-probabilities, the number of their first frame, and which of them are of the shard."""
        feed = feed_of(members, self.frames)
        for frames, values in on_cpu(members.device, feed(self.start - self.offset, self.stop - self.offset)):
            begin = frames.start + self.offset
            refuse_nan(members, values, begin)
            low, high = max(begin, self.shard.start), min(frames.stop + self.offset, self.shard.stop)
            yield begin, slice(low - begin, high - begin), values


def _part(
    members: Members, frames: zoo.FrameSet, shard: Shard, chosen: Integers | None = None, place: int = 0
) -> _Part:
    step, specs, starts = members.step, members.widest, frames.starts.cpu()
    start, stop = shard.start // step * step, min(-(-shard.stop // step) * step, len(frames))
    context = max(spec.context for spec in specs)
    low, high = max(0, start - context), min(len(frames), stop + context)
    first, last = (torch.searchsorted(starts, torch.tensor([low, high - 1]), right=True) - 1).tolist()
    some = frames.part(first, last + 1, {spec.normalisation for spec in specs})
    return _Part(shard, some, int(starts[first]), first, start, stop, chosen, place)


Adding = tuple[Callable[[int, slice, Tensor], None], Callable[[], Tally | None]]
"""What takes the pieces of a shard, as `_Part.run` gives them, and what gives the result behind the last."""


@dataclass(frozen=True)
class _Count:
    """Counts the answers on a shard."""

    of: Judged
    rules: Mapping[str, FittedRule]

    def begin(self, members: Members, part: _Part) -> Adding:
        order = class_order(members.classes, part.frames.classes, "the members' classes", "the members", "the frames")
        assert part.frames.labels is not None
        labels = part.frames.labels.cpu()
        labels = labels if order is None else order[labels]
        groups = (part.frames.groups + part.recordings).numpy()
        counting = Counting(self.of, self.rules, groups[part.shard.start - part.offset : part.shard.stop - part.offset])
        size = block_size(len(members), len(members.classes))

        def add(begin: int, use: slice, values: Tensor) -> None:
            for at in range(0, values.shape[1], size):
                low, high = max(at, use.start), min(at + size, use.stop)
                if low < high:
                    known = labels[begin + low - part.offset : begin + high - part.offset]
                    counting.add(singles(values[:, at : at + size]), known, slice(low - at, high - at))

        return add, counting.tally


@dataclass(frozen=True)
class _Fill:
    """Writes the outputs on a shard, or on some of its frames, into rows of a store."""

    folder: Path
    contents: Contents
    rows: Sequence[str]

    def begin(self, members: Members, part: _Part) -> Adding:
        store, place = Store(self.folder, self.contents), part.place

        def add(begin: int, use: slice, values: Tensor) -> None:
            nonlocal place
            if part.chosen is None:
                values = values[:, use]
            else:
                low, high = np.searchsorted(part.chosen, (begin + use.start, begin + use.stop))
                values = values[:, torch.from_numpy(part.chosen[low:high] - begin)]
            if values.shape[1]:
                store.put(self.rows, place, values)
                place += values.shape[1]

        return add, store.flush


def _do(members: Members, tasks: Sequence[_Count | _Fill], part: _Part) -> Tally | None:
    """All tasks on a shard, in one run of the members over it."""
    begun = [task.begin(members, part) for task in tasks]
    for begin, use, values in part.run(members):
        for add, _ in begun:
            add(begin, use, values)
    return next((found for found in [end() for _, end in begun] if found is not None), None)


@dataclass(frozen=True)
class _Work:
    """The job of a worker."""

    members: Members | Callable[[], Members]
    step: int  # frames of a batch
    forms: Forms
    metrics: Mapping[str, Metric]  # those of the one that shares the work out, some of which may be its own
    normalisations: Mapping[str, Any]
    tasks: Sequence[_Count | _Fill]
    folder: Path

    def __call__(self) -> Callable[[_Part], None]:
        METRICS.update({**self.metrics, **METRICS})
        NORMALISATIONS.update({**self.normalisations, **NORMALISATIONS})
        members = self.members if isinstance(self.members, Members) else self.members()
        members.step = self.step
        _set_forms(members, self.forms)

        def work(part: _Part) -> None:
            found = _do(members, self.tasks, part)
            _files.write(_result(self.folder, part.shard), b"" if found is None else found.to_bytes())

        return work


def _result(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.number:06d}.shard"


def _set_forms(members: Members, forms: Forms) -> None:
    known = dict(forms)
    for group, _ in members.groups:
        for size, overlaps, form in known.get(tuple(group.names), ()):
            group.plans.setdefault((size, overlaps), Plan(form, "chosen where the work was shared out"))


def _forms(members: Members, frames: zoo.FrameSet) -> Forms:
    """Choose the forms for all kinds of batches that there are, by running the first of each kind."""
    starts, step, N = frames.starts.cpu().numpy(), members.step, len(frames)
    edges = np.append(np.arange(0, N, step), N)
    counts = np.diff(edges)
    gaps = np.diff(np.searchsorted(starts, [edges[:-1], edges[1:] - 1], side="right"), axis=0)[0]
    kinds: dict[tuple[Any, ...], int] = {}
    for number, (count, gap) in enumerate(zip(counts.tolist(), gaps.tolist(), strict=True)):
        ways = [(count, count + gap * (spec.padding == "recording") * spec.context) for spec in members.widest]
        kinds.setdefault((size_of(count), *(overlapping(*way) for way in ways)), number)
    for number in kinds.values():
        batch = Shard(0, 0, 0, int(edges[number]), int(edges[number + 1]))
        for _ in _part(members, frames, batch).run(members):
            pass
    return [
        (tuple(group.names), [(size, overlaps, plan.form) for (size, overlaps), plan in group.plans.items()])
        for group, _ in members.groups
    ]


class _Run:
    """A run folder: what it is of, the forms that were chosen, and the results that there are."""

    def __init__(self, folder: Path, about: Mapping[str, Any], forms: Callable[[], Forms]) -> None:
        self.folder, about = folder, {"format": _FORMAT, **about}
        _files.make_folders(folder)
        if (path := folder / _RUN).exists():
            try:
                found = json.loads(path.read_bytes())
                there, self.forms = found["about"], _read_forms(found["forms"])
            except (ValueError, KeyError, TypeError) as error:
                msg = f"expected a run of this program in {path}, got something else ({error!r}); use another folder"
                raise ValueError(msg) from error
            for name in {**about, **there}:
                if about.get(name) != there.get(name):
                    came, now = (json.dumps(each.get(name))[:100] for each in (there, about))
                    msg = f"{folder} holds a run with other {name}: {came}, now {now}"
                    raise ValueError(f"{msg}; use another folder, or remove it")
            return
        if any(folder.iterdir()):
            msg = f"expected an empty folder for a run, or one with a run to go on with, got others' files in {folder}"
            raise ValueError(msg)
        self.forms = forms()
        plain = [[names, [[*way[:2], *vars(way[2]).values()] for way in ways]] for names, ways in self.forms]
        _files.write(path, json.dumps({"about": about, "forms": plain}, indent=1).encode())


def _read_forms(given: Any) -> Forms:
    return [(tuple(names), [(size, lap, Form(*form)) for size, lap, *form in ways]) for names, ways in given]


def _carry_out(
    members: Members,
    frames: zoo.FrameSet,
    tasks: Sequence[_Count | _Fill],
    parts: Sequence[tuple[Shard, Integers | None, int]],
    *,
    about: Callable[[], Mapping[str, Any]],
    workers: Workers | None,
    folder: Path | None,
    progress: Progress | None,
) -> Iterator[Tally | None]:
    """The results of shards; in a folder, those that are there already are not made again."""
    feed_of(members, zoo.FrameSet(frames.features[:1], None, torch.tensor([0, 1]), frames.classes))  # or an error
    todo = {
        f"{shard} (recordings {frames.names[shard.first]} to {frames.names[shard.last - 1]})": (shard, chosen, place)
        for shard, chosen, place in parts
    }
    items = {name: partial(_part, members, frames, *what) for name, what in todo.items()}
    if workers is None and folder is None:
        for _, found in carry_out(lambda: partial(_do, members, tasks), items, title="shards", progress=progress):
            yield found
        return
    with ExitStack() as stack:
        home = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ensemble-")))
        identity = {
            "members": [[member.name, member.digest or uuid4().hex] for member in members],
            "classes": [*members.classes],
            "precision": f"{members.precision} {members.forced} {members.device.type} {members.step}",
            "frames": frames.fingerprint,
            "shards": hashlib.sha256(str([(each.start, each.stop) for each, *_ in parts]).encode()).hexdigest(),
            **about(),
        }
        counted = any(isinstance(task, _Count) for task in tasks)
        run = _Run(home, identity, lambda: _forms(members, frames))
        _set_forms(members, run.forms)
        sent = members if workers is None or workers.afar or members.again is None else members.again
        job = _Work(sent, members.step, run.forms, dict(METRICS), dict(NORMALISATIONS), tasks, home.absolute())
        lacking = {name: make for name, make in items.items() if not _result(home, todo[name][0]).exists()}
        for name, _ in carry_out(job, lacking, workers, title="shards", progress=progress):
            if not _result(home, todo[name][0]).exists():
                msg = f"expected the result of {name} in {home}, got none: all machines must see that folder"
                raise ValueError(f"{msg}; name one that they share")
        for shard, *_ in todo.values():
            yield _read(_result(home, shard)) if counted else None


def tally(
    members: Members,
    frames: zoo.FrameSet,
    rules: Mapping[str, Rule],
    *,
    metric: str = "accuracy",
    workers: Workers | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Tally:
    """What `evaluate` needs to know of members and rules on these frames, without their outputs in memory.

    `evaluate(tally, rules, ...)` is `evaluate(collect(members, frames), rules, ...)` to the bit, whoever does the work.

    Args:
        members: M models with specs.
        frames: with labels.
        rules: name -> rule over the members, or over those that it names.
        metric: what gains will be of, a name in `METRICS`.
        workers: `Processes` or `Ray`; if None, the shards are done here, one after another.
        folder: where the shards' results are kept, so that a run that is started again goes on from them. All machines
            must see it. A temporary one if None.
        progress: shows how many shards are done.

    Raises:
        ValueError: as `collect` and `evaluate`; the folder holds another run; a recording's features are damaged.
        RuntimeError: a shard ends every worker that begins it.
    """
    settings: dict[str, Any] = {"workers": workers, "folder": None if folder is None else Path(folder)}
    count, about = _counting(members, frames, rules, metric)
    parts = [(shard, None, 0) for shard in shards(frames.starts, _MOST)]
    found = _carry_out(members, frames, [count], parts, about=about, progress=progress, **settings)
    return Tally.merge(each for each in found if each is not None)


def _counting(
    members: Members, frames: zoo.FrameSet, rules: Mapping[str, Rule], metric: str
) -> tuple[_Count, Callable[[], dict[str, Any]]]:
    """The task, and what its results depend on beside members and frames."""
    if frames.labels is None:
        msg = "expected frames with labels to judge on, got none: use a corpus with transcripts"
        raise ValueError(msg)
    judged, own = get_metric(metric), aligned(rules, members.names)
    known = members.names, members.classes, tuple(rules), metric, len(frames), frames.recordings, frames.fingerprint

    def about() -> dict[str, Any]:
        digests = {name: content_digest(rule) or uuid4().hex for name, rule in own.items()}
        measured = [metric, content_digest(judged.function)]
        return {"task": "tally", "rules": digests, "metric": measured, "metrics": [*METRICS]}

    return _Count(Judged(*known, members.about), own), about


def _read(path: Path) -> Tally:
    try:
        return Tally.from_bytes(bytes(_files.read(path)))
    except ValueError as error:
        msg = f"{path} is damaged: {error}; remove it, and start the run again"
        raise ValueError(msg) from error


def filling(
    frames: zoo.FrameSet, *, workers: Workers | None = None, progress: Progress | None = None
) -> Callable[[Members, Store, Mapping[str, str]], None]:
    """What `collect` takes as `fill`, to have workers compute over these frames what its store lacks.

    Until the store is complete, the folder `shards` in it tells what a run that is started again need not do.
    Arguments are those of `tally`.
    """

    def fill(members: Members, store: Store, keys: Mapping[str, str]) -> None:
        lacking = tuple(name for name in members.names if store.lacks(keys[name], store.shards - 1))
        if not lacking or not len(frames):
            return
        rows, some = [keys[name] for name in lacking], members.part(lacking)
        parts = [(shard, None, shard.start) for shard in shards(frames.starts, _MOST)]
        about = {"task": "outputs", "rows": rows, "type": store.contents.dtype}
        settings: dict[str, Any] = {"workers": workers, "folder": store.folder / UNFINISHED, "progress": progress}
        task = _Fill(store.folder.absolute(), store.contents, rows)
        for _ in _carry_out(some, frames, [task], parts, about=lambda: about, **settings):
            pass
        store.finish(rows, store.shards - 1)
        shutil.rmtree(store.folder / UNFINISHED)

    return fill


def sample(
    members: Members,
    frames: zoo.FrameSet,
    *,
    most: int = _SAMPLE,
    workers: Workers | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> MemberOutputs:
    """The members' outputs to fit on: on all frames, or on a sample where these are more than `most`.

    The sample has the same share of each recording, in frames that a hash picks (`sampling_keys`); it is about as many
    frames as `most`, and always the same ones. The fingerprint is that of all frames.

    Args:
        members: M models with specs.
        frames: N frames.
        most: number of frames.
        workers, folder, progress: as for `tally`. Outputs are mapped from the folder, which is a temporary one where
            there is none and they take more than a GiB.

    Raises:
        ValueError: as `tally`.
    """
    held = len(members) * len(frames) * len(members.classes) <= _HELD
    if len(frames) <= most and held and workers is None and folder is None:
        return collection.collect(members, frames, progress=progress)
    return _run(members, frames, None, most=most, workers=workers, folder=folder, progress=progress)[1]


def judge(
    members: Members,
    frames: zoo.FrameSet,
    rules: Mapping[str, Rule],
    *,
    metric: str = "accuracy",
    most: int = _SAMPLE,
    workers: Workers | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Tally, MemberOutputs]:
    """What `tally` and what `sample` give, in one run of the members; arguments and errors are theirs."""
    count = _counting(members, frames, rules, metric)
    sums, outputs = _run(members, frames, count, most=most, workers=workers, folder=folder, progress=progress)
    return Tally.merge(sums), outputs


def _run(
    members: Members,
    frames: zoo.FrameSet,
    count: tuple[_Count, Callable[[], dict[str, Any]]] | None,
    *,
    most: int,
    workers: Workers | None,
    folder: str | Path | None,
    progress: Progress | None,
) -> tuple[list[Tally], MemberOutputs]:
    """The tallies of shards, if there is anything to count, and the outputs on a sample, mapped from the folder."""
    if most < 1:
        msg = f"expected one frame or more in a sample, got {most}"
        raise ValueError(msg)
    parts, place, starts = list[tuple[Shard, Integers | None, int]](), 0, frames.starts.cpu()
    for shard in shards(starts, _MOST):
        chosen = None if len(frames) <= most else _sampled(starts, shard, most / len(frames))
        parts.append((shard, chosen, place))
        place += shard.stop - shard.start if chosen is None else len(chosen)
    labels, recordings, fingerprint = collection.known_of(members, frames)
    if len(frames) > most:
        at = torch.from_numpy(np.concatenate([chosen for _, chosen, _ in parts if chosen is not None]))
        labels, recordings = (None if each is None else each[at] for each in (labels, recordings))
    with ExitStack() as stack:
        home = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="ensemble-")))
        digest = hashlib.sha256(f"{fingerprint} {place}".encode()).hexdigest()
        contents = Contents(digest, place, members.classes, members.precision, "float32")
        rows = [f"member:{number}" for number in range(len(members))]
        if not (home / "outputs").exists():  # then no shard of it is done
            shutil.rmtree(home / "shards", ignore_errors=True)
        store = Store(home / "outputs", contents)
        store.add(rows)
        fill, counting = _Fill(store.folder.absolute(), contents, rows), [] if count is None else [count[0]]

        def about() -> dict[str, Any]:
            return {"task": "sample", "most": most} | ({} if count is None else count[1]())

        settings: dict[str, Any] = {"workers": workers, "folder": home / "shards", "progress": progress}
        found = [*_carry_out(members, frames, [*counting, fill], parts, about=about, **settings)]
        store.finish(rows, store.shards - 1)
        values = store.read(rows)
    outputs = MemberOutputs(
        values, members.names, members.classes, labels, recordings, fingerprint, about=members.about
    )
    return [each for each in found if each is not None], outputs


def _sampled(starts: Tensor, shard: Shard, share: float) -> Integers:
    """The frames of a shard that are in a sample of so large a share."""
    lengths = starts[shard.first : shard.last + 1].diff()
    recordings = torch.repeat_interleave(torch.arange(shard.first, shard.last), lengths).numpy()
    return np.flatnonzero(sampling_keys(recordings) < share) + shard.start
