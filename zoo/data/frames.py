"""`FrameSet`: features and labels of frames, and their context windows.

Features stay as they were computed. Normalising and windowing happen per batch, so that members with different
normalisations and contexts share one copy of the frames in memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from zoo._names import find, unknown, usable_device
from zoo.data.normalisation import NORMALISATIONS, Affine, Normalisation

PADDINGS = ("recording", "corpus")
_BLOCK = 65_536  # frames normalised at a time, so that preparing a corpus does not need a second copy of it


@dataclass(frozen=True, eq=False)
class FrameSet:
    """Frames of one or more recordings, one after another.

    Args:
        features: (T, F) float32, raw, on any device.
        labels: (T,) int64 indices into `classes`, or None.
        starts: (U + 1,) int64, the first frame of each recording, then T; no recording is empty.
        classes: the class names, in order.
        names: U names of the recordings; "0", "1", ... if empty.

    Raises:
        ValueError: the parts do not fit together, or a feature is not finite.
    """

    features: Tensor
    labels: Tensor | None
    starts: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        names = tuple(self.names) or tuple(map(str, range(len(self.starts) - 1)))
        object.__setattr__(self, "names", names)
        _check_features(self.features)
        _check_starts(self.starts, len(self.features), len(names))
        if self.labels is not None:
            _check_labels(self.labels, len(self.features), len(self.classes))

    def __len__(self) -> int:
        """Number of frames, T."""
        return len(self.features)

    @property
    def recordings(self) -> int:
        """Number of recordings, U."""
        return len(self.starts) - 1

    @cached_property
    def groups(self) -> Tensor:
        """(T,) int64, the index of each frame's recording."""
        return torch.repeat_interleave(torch.arange(self.recordings), self.starts.diff().cpu())

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that change with any feature, label, class name or boundary between recordings."""
        digest = hashlib.sha256(repr((tuple(self.features.shape), self.classes)).encode())
        for tensor in (self.features, self.starts, self.labels):
            digest.update(b"" if tensor is None else tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """The same frames with features on `device`; labels and starts stay where they are.

        Raises:
            ValueError: this machine has no such device.
        """
        wanted = usable_device(device)
        if self.features.device == wanted:
            return self
        return type(self)(self.features.to(wanted), self.labels, self.starts, self.classes, self.names)

    def select(self, recordings: Tensor) -> Self:
        """The frames of these recordings alone, in this order; recordings: (n,) int64 indices."""
        pieces = [torch.arange(int(self.starts[u]), int(self.starts[u + 1])) for u in recordings.tolist()]
        frames = torch.cat(pieces) if pieces else torch.arange(0)
        lengths = torch.tensor([0] + [len(piece) for piece in pieces])
        return type(self)(
            self.features[frames],
            None if self.labels is None else self.labels[frames],
            lengths.cumsum(0),
            self.classes,
            tuple(self.names[u] for u in recordings.tolist()),
        )

    def affine(self, normalisation: str) -> Affine | None:
        """Scale and shift of a normalisation, `features * scale + shift`: each (U, F), or (1, F) for all recordings.

        Computed once per normalisation and kept; None leaves the features as they are.

        Raises:
            ValueError: unknown normalisation.
        """
        function = find(NORMALISATIONS, "normalisation", normalisation)
        cache: dict[Normalisation, Affine | None] = self.__dict__.setdefault("_affine", {})
        if function not in cache:
            cache[function] = function(self.features, self.starts)
        return cache[function]


def windows(
    frames: FrameSet,
    centres: Tensor,
    context: int,
    normalisation: str = "mean_std",
    padding: str = "recording",
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
    _check_centres(centres, len(frames))
    device, centres = frames.features.device, centres.cpu()
    around = centres[:, None] + torch.arange(-context, context + 1)  # (B, 2K+1)
    if padding == "recording":
        starts, groups = frames.starts.cpu(), frames.groups[centres][:, None]  # (B, 1)
        inside = torch.clamp(around, starts[groups], starts[groups + 1] - 1)
    else:
        inside = around.clamp(0, len(frames) - 1)
        groups = frames.groups[inside]
    rows = frames.features.index_select(0, inside.flatten().to(device))
    rows = rows.view(*inside.shape, frames.features.shape[1])  # (B, 2K+1, F)
    rows = _normalise(rows, frames.affine(normalisation), groups.to(device))
    return rows.masked_fill_((around != inside).to(device).unsqueeze(-1), 0).flatten(1)


@dataclass(frozen=True, eq=False)
class Stretch:
    """Neighbouring frames, normalised and padded, so that every window is contiguous in memory.

    The rows are K zeros or real neighbours, the first recording, K zeros, the next recording, and so
    on. Overlapping windows share them, so that they take no more memory than the frames and the gaps.

    Args:
        rows: (R, F) float32.
        firsts: (B,) int64, the row at which the window of each frame begins.
        context: K.
    """

    rows: Tensor
    firsts: Tensor
    context: int

    @property
    def view(self) -> Tensor:
        """(R - 2K, (2K+1) * F): the windows that begin at every row, those in gaps included, without a copy."""
        count, features = self.rows.shape
        span = 2 * self.context + 1
        return self.rows.as_strided((max(count - span + 1, 0), span * features), (features, 1))

    def windows(self, which: Tensor | slice = slice(None)) -> Tensor:
        """(b, (2K+1) * F): the windows of some of the B frames, in any order, by one gather."""
        return self.view.index_select(0, self.firsts[which])


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
    device = frames.features.device
    if start == stop:
        return Stretch(frames.features[:0], torch.arange(0, device=device), context)
    first, last = int(frames.groups[start]), int(frames.groups[stop - 1])
    low, high = (0, len(frames)) if padding == "corpus" else (int(frames.starts[first]), int(frames.starts[last + 1]))
    low, high = max(low, start - context), min(high, stop + context)
    gaps = (frames.groups[low:high] - first) * (context if padding == "recording" else 0)
    places = (torch.arange(low - start + context, high - start + context) + gaps).to(device)
    rows = frames.features.new_zeros(stop - start + 2 * context + int(gaps[stop - low - 1]), frames.features.shape[1])
    for at in range(low, high, _BLOCK):
        some = slice(at, min(at + _BLOCK, high))
        normal = _normalise(frames.features[some], frames.affine(normalisation), frames.groups[some].to(device))
        rows.index_copy_(0, places[at - low : some.stop - low], normal)
    return Stretch(rows, places[start - low : stop - low] - context, context)


def _normalise(rows: Tensor, affine: Affine | None, groups: Tensor) -> Tensor:
    """Apply the scale and shift of each row's recording; rows (..., F), groups (...)."""
    if affine is None:
        return rows
    scale, shift = affine
    if len(scale) == 1:
        return rows * scale[0] + shift[0]
    return torch.addcmul(shift[groups], rows, scale[groups])


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or features.dtype != torch.float32 or not len(features):
        msg = f"expected features (T, F) float32 with at least one frame, got {tuple(features.shape)} {features.dtype}"
        raise ValueError(msg)
    if not torch.isfinite(features).all():
        frame = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        msg = f"expected finite features, got NaN or infinity at frame {frame}"
        raise ValueError(msg)


def _check_starts(starts: Tensor, frames: int, names: int) -> None:
    steps = starts.diff() if starts.ndim == 1 and starts.dtype == torch.int64 and len(starts) > 1 else None
    if steps is None or int(starts[0]) != 0 or int(starts[-1]) != frames or int(steps.min()) < 1:
        msg = f"expected starts (U + 1,) int64 rising from 0 to {frames} frames, got {starts}"
        raise ValueError(msg)
    if names != len(starts) - 1:
        msg = f"expected {len(starts) - 1} recording names, got {names}"
        raise ValueError(msg)


def _check_labels(labels: Tensor, frames: int, classes: int) -> None:
    if labels.shape != (frames,) or labels.dtype != torch.int64:
        msg = f"expected labels ({frames},) int64, got {tuple(labels.shape)} {labels.dtype}"
        raise ValueError(msg)
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        msg = f"expected labels from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        raise ValueError(msg)


def _check_window(context: int, padding: str) -> None:
    if context < 0:
        msg = f"expected a context of at least 0 frames, got {context}"
        raise ValueError(msg)
    if padding not in PADDINGS:
        raise ValueError(unknown("padding", padding, PADDINGS))


def _check_centres(centres: Tensor, frames: int) -> None:
    if len(centres) and not 0 <= int(centres.min()) <= int(centres.max()) < frames:
        msg = f"expected centres from 0 to {frames - 1}, got {int(centres.min())} to {int(centres.max())}"
        raise IndexError(msg)
