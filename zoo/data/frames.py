"""`FrameSet`: features and labels of frames, and their context windows.

Features stay as they were computed. Normalising and windowing happen per batch, so that members with different
normalisations and contexts share one copy of the frames in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo._names import checked, find, unknown, usable_device
from zoo.data.normalisation import NORMALISATIONS, Affine, Normalisation, affine_of

PADDINGS = ("recording", "corpus")
_BLOCK = 65_536  # frames normalised or hashed at a time, so that no second copy of a corpus is needed

_PINNED = 2**24  # bytes that are copied through pinned memory at most, which the process keeps from then on

Windows = Callable[[Tensor | slice], Tensor]
"""Indices of b frames, or a slice of them -> their windows (b, (2K+1) * F)."""


@dataclass(frozen=True, eq=False)
class FrameSet:
    """Frames of one or more recordings, one after another.

    A `ValueError` where the parts do not fit together or a feature is not finite.
    """

    features: Tensor  #: (T, F) float32, raw, on the CPU or a CUDA device
    labels: Tensor | None  #: (T,) int64 indices into `classes`, or None
    starts: Tensor  #: (U + 1,) int64, the first frame of each recording, then T; no recording is empty
    classes: tuple[str, ...]  #: the class names, in order
    names: tuple[str, ...] = ()  #: U names of the recordings; "0", "1", ... if empty
    mapped: bool = False  #: features are those of a file, too many to prepare at once: windows are made batch by batch

    def __post_init__(self) -> None:
        for name, part in (("features", self.features), ("labels", self.labels), ("starts", self.starts)):
            if not (isinstance(part, Tensor) or (part is None and name == "labels")):
                msg = f"expected a tensor of {name}, got {type(part).__name__}; take torch.as_tensor"
                raise TypeError(msg)
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "names", tuple(self.names) or tuple(map(str, range(self.recordings))))
        if misfit := self._misfit():
            msg = f"expected {misfit}"
            raise ValueError(msg)

    def _misfit(self) -> str:
        """What was expected of the first part that does not fit, and what came; empty if all fit."""
        features, labels, starts, frames = self.features, self.labels, self.starts, len(self.features)
        if features.ndim != 2 or features.dtype != torch.float32 or not frames:
            return f"features (T, F) float32 with at least one frame, got {tuple(features.shape)} {features.dtype}"
        if features.device.type not in ("cpu", "cuda"):
            return f"features on the CPU or a CUDA device, got {features.device}"
        if features.numel() and not torch.stack(features.aminmax()).isfinite().all():  # no mask as large as they are
            frame = int(features.isfinite().all(dim=1).logical_not().nonzero()[0])
            return f"finite features, got NaN or infinity at frame {frame}"
        steps = starts.diff() if starts.ndim == 1 and starts.dtype == torch.int64 and len(starts) > 1 else None
        if steps is None or int(starts[0]) != 0 or int(starts[-1]) != frames or int(steps.min()) < 1:
            return f"starts (U + 1,) int64 rising from 0 to {frames} frames, got {starts}"
        if len(self.names) != self.recordings:
            return f"{self.recordings} recording names, got {len(self.names)}"
        if labels is None:
            return ""
        if labels.shape != (frames,) or labels.dtype != torch.int64:
            return f"labels ({frames},) int64, got {tuple(labels.shape)} {labels.dtype}"
        low, high = map(int, labels.aminmax())
        inside = 0 <= low <= high < len(self.classes)
        return "" if inside else f"labels from 0 to {len(self.classes) - 1}, got {low} to {high}"

    @classmethod
    def known(cls, fingerprint: str, *, again: Callable[[], Self] | None = None, **parts: object) -> Self:
        """Mapped frames as a file holds them that was written of checked frames of this fingerprint: nothing is read.

        `parts` are all fields but `mapped`, each as it was checked; `again` maps them in another process.
        """
        frames = object.__new__(cls)
        vars(frames).update(parts, mapped=True, fingerprint=fingerprint, _again=again)
        return frames

    def __len__(self) -> int:
        return len(self.features)  # T

    @property
    def recordings(self) -> int:
        """Number of recordings, U."""
        return len(self.starts) - 1

    @cached_property
    def groups(self) -> Tensor:
        """(T,) int64, the index of each frame's recording."""
        return _groups(self.starts.cpu(), 0, len(self))

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that change with any feature, label, class name or boundary between recordings."""
        digest = hashlib.sha256(repr((tuple(self.features.shape), self.classes)).encode())
        for tensor in (self.features, self.starts, self.labels):
            for block in () if tensor is None else torch.split(tensor, _BLOCK):
                digest.update(block.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """The same frames with features on `device`, if this machine has it; labels and starts stay where they are.

        Mapped features are copied to another device as a whole.
        """
        wanted = usable_device(device)
        if self.features.device == wanted:
            return self
        moved = replace(self, features=self.features.to(wanted), mapped=False)
        vars(moved).update({name: value for name, value in vars(self).items() if name == "fingerprint"})
        return moved

    def select(self, recordings: Tensor) -> Self:
        """The frames of these recordings alone, in this order; recordings: (n,) int64 indices.

        Neighbours in their order, as shards of a corpus are, share the memory of these frames, or their file.
        """
        frames: slice | Tensor
        if neighbours := len(recordings) > 0 and bool((recordings.diff() == 1).all()):
            frames = slice(int(self.starts[recordings[0]]), int(self.starts[recordings[-1] + 1]))
        else:
            pieces = [torch.arange(int(self.starts[u]), int(self.starts[u + 1])) for u in recordings.tolist()]
            frames = torch.cat([torch.arange(0), *pieces])
        return replace(
            self,
            features=self.features[frames],
            labels=None if self.labels is None else self.labels[frames],
            starts=pad(self.starts.diff()[recordings].cumsum(0), (1, 0)),
            names=tuple(self.names[u] for u in recordings.tolist()),
            mapped=self.mapped and neighbours,
        )

    def part(self, first: int, last: int, normalisations: Iterable[str] = ()) -> Self:
        """The recordings from `first` up to `last` without a copy, which are looked at now where these are mapped.

        Args:
            first: index of a recording.
            last: that of the one behind the last of the part.
            normalisations: those that are needed; one for all recordings together is that of all these frames.

        Raises:
            ValueError: a feature is not finite; the message names the recording.
        """
        start, stop = (int(self.starts[u]) for u in (first, last))
        common = {}
        for name in normalisations if self.recordings > 1 else ():
            scale = (self.select(torch.arange(2)).affine(name) or (None,))[0]
            if scale is not None and len(scale) == 1:
                common[NORMALISATIONS[name]] = self.affine(name)
        features = self.features[start:stop]
        for u in range(first, last) if not torch.stack(features.aminmax()).isfinite().all() else ():
            if not self.features[self.starts[u] : self.starts[u + 1]].isfinite().all():
                msg = f"expected finite features in the recording {self.names[u]!r}, got NaN or infinity"
                raise ValueError(f"{msg}: its file is damaged")
        found = replace(
            self,
            features=features,
            labels=None if self.labels is None else self.labels[start:stop],
            starts=self.starts[first : last + 1] - start,
            names=self.names[first:last],
            mapped=False,
        )
        vars(found)["_affine"] = common
        return found

    def __getstate__(self) -> dict[str, Any]:
        """As arrays, which reach another process as bytes, and not through memory that the system may lack.

        Mapped frames that know their file are mapped there again.
        """
        if (again := vars(self).get("_again")) is not None:
            return {"_again": again}
        known = {name: value for name, value in vars(self).items() if name not in ("groups", "_affine")}
        affine = vars(self).get("_affine", {})
        pairs = {f: pair and tuple(x.cpu().numpy() for x in pair) for f, pair in affine.items()}
        arrays = {name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in known.items()}
        return arrays | {"_affine": pairs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (again := state.get("_again")) is not None:
            vars(self).update(vars(again()))
            return
        pairs = {f: pair and tuple(map(torch.from_numpy, pair)) for f, pair in state.pop("_affine").items()}
        tensors = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in state.items()}
        vars(self).update(tensors, _affine=pairs)

    def affine(self, normalisation: str) -> Affine | None:
        """Scale and shift of a normalisation, `features * scale + shift`: each (U, F), or (1, F) for all recordings.

        Computed once per normalisation and kept; None leaves the features as they are.
        """
        function = find(NORMALISATIONS, "normalisation", normalisation)
        cache: dict[Normalisation, Affine | None] = self.__dict__.setdefault("_affine", {})
        if function not in cache:
            cache[function] = affine_of(function, self.features, self.starts)
        return cache[function]


def require_sendable(*sets: FrameSet) -> None:
    """Refuse mapped frames of which other processes would get a copy each, as those that were selected of others."""
    for frames in sets:
        if frames.mapped and vars(frames).get("_again") is None:
            msg = "expected frames in memory, or all frames of a mapped file, to send to workers, got a part of a file"
            raise ValueError(f"{msg}; a copy in each would fill the memory")


@checked
def windows(
    frames: FrameSet, centres: Tensor, context: int, normalisation: str = "mean_std", padding: str = "recording"
) -> Tensor:
    """Normalised context windows: row b has the frames centres[b]-K .. centres[b]+K, concatenated.

    Args:
        frames: T frames of F features.
        centres: (B,) int64, from 0 to T - 1, in any order.
        context: K frames on each side.
        normalisation: a name in `NORMALISATIONS`.
        padding: "recording" puts zeros (after normalising) beyond the ends of each recording; "corpus" only beyond
            the ends of the whole frame set, so that windows run on into the neighbouring recording.

    Returns:
        (B, (2 * context + 1) * F) float32 on the device of the features.

    Raises:
        ValueError: unknown normalisation or padding, a negative context.
        IndexError: a centre is outside the frames.
    """
    _check_window(context, padding)
    low, high = map(int, centres.aminmax()) if len(centres) else (0, 0)
    if not 0 <= low <= high < len(frames):
        msg = f"expected centres from 0 to {len(frames) - 1}, got {low} to {high}"
        raise IndexError(msg)
    device, affine, starts = frames.features.device, frames.affine(normalisation), frames.starts.cpu()
    around = centres.cpu()[:, None] + torch.arange(-context, context + 1)  # (B, 2K+1)
    groups = _groups_of(starts, centres.cpu())[:, None]  # (B, 1)
    inside = around.clamp(starts[groups], starts[groups + 1] - 1)
    rows = frames.features.index_select(0, sent_to(inside.flatten(), device))  # (B * (2K+1), F)
    _normalise(rows.view(*inside.shape, rows.shape[1]), affine, groups)
    beyond = (around != inside).flatten().nonzero().squeeze(1)  # the few rows outside the recording of their centre
    rows.index_fill_(0, sent_to(beyond, device), 0)
    if padding == "corpus":
        others = around.flatten()[beyond]
        beyond, others = (x[(others >= 0) & (others < len(frames))] for x in (beyond, others))
        raw = frames.features.index_select(0, sent_to(others, device))
        rows.index_copy_(0, sent_to(beyond, device), _normalise(raw, affine, _groups_of(starts, others)))
    return rows.view(len(centres), (2 * context + 1) * rows.shape[1])


@dataclass(frozen=True, eq=False)
class Stretch:
    """Neighbouring frames, normalised and padded, so that every window is contiguous in memory.

    The rows are K zeros or real neighbours, the first recording, K zeros, the next recording, and so
    on. Overlapping windows share them, so that they take no more memory than the frames and the gaps.
    """

    rows: Tensor  #: (R, F) float32
    firsts: Tensor  #: (B,) int64, the row at which the window of each frame begins
    context: int  #: K

    @property
    def view(self) -> Tensor:
        """(R - 2K, (2K+1) * F): the windows that begin at every row, those in gaps included, without a copy."""
        count, features = self.rows.shape
        span = 2 * self.context + 1
        return self.rows.as_strided((max(count - span + 1, 0), span * features), (features, 1))

    def windows(self, which: Tensor | slice = slice(None)) -> Tensor:
        """(b, (2K+1) * F): the windows of some of the B frames, in any order, by one gather."""
        return self.view.index_select(0, self.firsts[which])


@checked
def stretch(
    frames: FrameSet,
    context: int,
    normalisation: str = "mean_std",
    padding: str = "recording",
    *,
    start: int = 0,
    stop: int | None = None,
) -> Stretch:
    """The frames from `start` up to `stop`, prepared for fast windows that equal those of `windows`.

    It needs memory for its own frames only, so that a long corpus can be processed in several stretches.

    Raises:
        ValueError: unknown normalisation or padding, a negative context, or bounds outside the frames.
    """
    stop = len(frames) if stop is None else stop
    _check_window(context, padding)
    if not 0 <= start <= stop <= len(frames):
        msg = f"expected a stretch within 0 to {len(frames)} frames, got {start} to {stop}"
        raise ValueError(msg)
    device, affine, starts = frames.features.device, frames.affine(normalisation), frames.starts.cpu()
    if start == stop:
        return Stretch(frames.features[:0], torch.arange(0, device=device), context)
    first, last = _groups_of(starts, torch.tensor([start, stop - 1])).tolist()
    low, high = (0, len(frames)) if padding == "corpus" else (int(starts[first]), int(starts[last + 1]))
    low, high = max(low, start - context), min(high, stop + context)
    groups = _groups(starts, low, high)
    gaps = (groups - first) * (context if padding == "recording" else 0)
    places = sent_to(torch.arange(low - start + context, high - start + context) + gaps, device)
    rows = frames.features.new_zeros(stop - start + 2 * context + int(gaps[stop - low - 1]), frames.features.shape[1])
    for at in range(low, high, _BLOCK):
        some = slice(at, min(at + _BLOCK, high))
        normal = _normalise(frames.features[some].clone(), affine, groups[at - low : some.stop - low])
        rows.index_copy_(0, places[at - low : some.stop - low], normal)
    return Stretch(rows, places[start - low : stop - low] - context, context)


def prepared(frames: FrameSet, context: int, normalisation: str = "mean_std", padding: str = "recording") -> Windows:
    """The windows of any of the frames, in any order: from a stretch of all of them, made once.

    Of mapped frames they are made anew each time, with the same bits and in the memory of a batch.

    Raises:
        ValueError: as `stretch`.
    """
    way = context, normalisation, padding
    if not frames.mapped:
        return stretch(frames, *way).windows
    stretch(frames, *way, stop=0)  # a wrong name is an error now

    def made(which: Tensor | slice) -> Tensor:
        if isinstance(which, Tensor):
            return windows(frames, which, *way)
        start, stop, _ = which.indices(len(frames))
        return stretch(frames, *way, start=start, stop=stop).windows()

    return made


def _groups(starts: Tensor, low: int, high: int) -> Tensor:
    """The recordings of the frames from `low` up to `high`; starts (U + 1,) on the CPU."""
    return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.clamp(low, high).diff())


def _groups_of(starts: Tensor, frames: Tensor) -> Tensor:
    """The recordings of these frames, on the CPU."""
    return torch.searchsorted(starts, frames, right=True) - 1


def _normalise(rows: Tensor, affine: Affine | None, groups: Tensor) -> Tensor:
    """Apply the scale and shift of each row's recording in place; rows (..., F), groups (...)."""
    if affine is None:
        return rows
    scale, shift = affine
    if len(scale) == 1:
        return rows.mul_(scale[0]).add_(shift[0])
    groups = sent_to(groups, rows.device)
    return torch.addcmul(shift[groups], rows, scale[groups], out=rows)


def sent_to(values: Tensor, device: torch.device) -> Tensor:
    """Values from the CPU on a device, for which the host does not wait unless they are many."""
    if device.type != "cuda" or values.device.type != "cpu" or values.nbytes > _PINNED:
        return values.to(device)
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values).to(device, non_blocking=True)


def _check_window(context: int, padding: str) -> None:
    if context < 0:
        msg = f"expected a context of at least 0 frames, got {context}"
        raise ValueError(msg)
    if padding not in PADDINGS:
        raise ValueError(unknown("padding", padding, PADDINGS))
