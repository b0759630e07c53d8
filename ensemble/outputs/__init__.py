"""`MemberOutputs`: every member's probabilities for every frame, and what is known of the members.

Models come before it; after it there is array arithmetic only, without any model or accelerator. The one check of
arrays that come from outside stands here too: rows that are distributions, and indices that are in range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import lazy_loader  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

__getattr__ = lazy_loader.attach(__name__, ["store"])[0]

LEAST = 2.0**-52  # the least probability of the true class that a log-loss counts with, as in scikit-learn
_TOLERANCE = 1e-3  # rows whose sum is further from one than this are refused


@dataclass(frozen=True)
class About:
    """What is known of one member besides its outputs; the defaults mean unknown."""

    parameters: int | None = None  #: number of trainable parameters
    trained_on: str = ""  #: fingerprint of the frames it was trained on, comparable with `MemberOutputs.fingerprint`
    reference: str = ""  #: its version in a registry, `name@id`


@dataclass(frozen=True, eq=False)
class MemberOutputs:
    """Log-probabilities of M members for N frames and C classes, with what is needed to judge them.

    A `ValueError` where shapes, names or labels do not fit together.
    """

    log_probabilities: Tensor  #: (M, N, C) floating, natural logarithms; each row's exponentials sum to one
    members: tuple[str, ...]  #: M distinct names, in the order of the first axis
    classes: tuple[str, ...]  #: C names, in the order of the last axis
    labels: Tensor | None = None  #: (N,) int64 indices into `classes`, or None where the truth is unknown
    #: (N,) int64, the recording a frame belongs to; frames of one recording are correlated, so intervals resample
    #: groups. Defaults to every frame being its own group.
    groups: Tensor | None = None
    #: identifies the frames and labels, as `FrameSet.fingerprint` does; computed from labels and groups if empty
    fingerprint: str = ""
    #: members may abstain on a frame, by a row of NaN: they are then left out there (see `ensemble.abstaining`) and
    #: counted. Without this declaration NaN is refused wherever it is found.
    abstain: bool = False
    about: tuple[About, ...] = ()  #: what is known of each member, in the order of `members`; nothing if left out

    def __post_init__(self) -> None:
        put, shape = object.__setattr__, tuple(self.log_probabilities.shape)
        M, C = len(self.members), len(self.classes)
        put(self, "members", tuple(self.members))
        put(self, "classes", tuple(self.classes))
        put(self, "about", tuple(self.about) or (About(),) * M)
        if len(shape) != 3 or (shape[0], shape[2]) != (M, C):
            wanted = f"(M, N, C) = ({M}, N, {C}) for {M} members and {C} classes"
            msg = f"expected log-probabilities of shape {wanted}, got {shape}"
            raise ValueError(msg)
        for what, names in (("member", self.members), ("class", self.classes)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                msg = f"expected distinct {what} names, got {twice} more than once"
                raise ValueError(msg)
        if len(self.about) != M:
            msg = f"expected what is known of {M} members in `about`, got {len(self.about)} items"
            raise ValueError(msg)
        frames = shape[1]
        if self.labels is not None:
            put(self, "labels", indices(self.labels, "labels", frames, below=C))
        put(self, "groups", indices(torch.arange(frames) if self.groups is None else self.groups, "groups", frames))
        if not self.fingerprint:
            digest = hashlib.sha256(str(frames).encode())
            for tensor in (self.labels, self.groups):
                digest.update(b"none" if tensor is None else tensor.numpy().tobytes())
            put(self, "fingerprint", digest.hexdigest())

    @classmethod
    def from_probabilities(
        cls,
        probabilities: Mapping[str, Any],
        *,
        labels: Any | None = None,
        groups: Any | None = None,
        classes: Sequence[str] | None = None,
        fingerprint: str = "",
        abstain: bool = False,
        about: Mapping[str, About] | None = None,
    ) -> Self:
        """Outputs from arrays you already have, of any origin.

        Args:
            probabilities: member name -> (N, C) array or tensor, rows summing to one within 1e-3; rows of float16 and
                bfloat16, which cannot do so exactly, are divided by their sum.
            labels: (N,) class indices, or class names where `classes` is given.
            groups: (N,) recording of each frame: integers, or any sortable names.
            classes: C names; "0", "1", ... if None.
            fingerprint: as for the class, and so is `abstain`.
            about: member -> what is known of it; members that are left out are unknown.

        Raises:
            TypeError: `probabilities` is not a mapping.
            ValueError: see the class; or a row is no distribution (the message names the member and a frame), or a name
                in `about` is not a member's.

        Example:
            >>> p = [[0.9, 0.1], [0.2, 0.8]]
            >>> MemberOutputs.from_probabilities({"a": p, "b": p}, labels=[0, 1]).shape
            (2, 2, 2)
        """
        if not isinstance(probabilities, Mapping):
            came = f"{type(probabilities).__name__} of shape {np.shape(probabilities)}"
            msg = f"expected a mapping of member name to (N, C) probabilities, got {came}; give dict(zip(names, array))"
            raise TypeError(msg)
        if not probabilities:
            msg = "expected at least one member, got an empty mapping of probabilities"
            raise ValueError(msg)
        given = probabilities.items()
        arrays = {name: distributions(rows, f"from member {name!r}", abstain=abstain) for name, rows in given}
        first, shape = next((name, rows.shape) for name, rows in arrays.items())
        for name, rows in arrays.items():
            if rows.shape != shape:
                came = f"{tuple(shape)} from {first!r} and {tuple(rows.shape)} from {name!r}"
                msg = f"expected one shape from all members, got {came}"
                raise ValueError(msg)
        known = dict(about or {})
        if unknown := sorted(set(known) - set(arrays)):
            msg = f"expected only members {list(arrays)} in `about`, got {unknown}"
            raise ValueError(msg)
        names = tuple(classes) if classes is not None else tuple(map(str, range(shape[-1])))
        recordings = None if groups is None else np.asarray(groups)
        if recordings is not None and recordings.dtype.kind not in "iu":  # names
            recordings = np.unique(recordings, return_inverse=True)[1]
        return cls(
            torch.stack(list(arrays.values())).log_(),
            tuple(arrays),
            names,
            labels=None if labels is None else _class_indices(labels, names),
            groups=None if recordings is None else torch.as_tensor(recordings),
            fingerprint=fingerprint,
            abstain=abstain,
            about=tuple(known.get(name, About()) for name in arrays),
        )

    @property
    def parameters(self) -> dict[str, int]:
        """Member -> number of trainable parameters, for the members where it is known."""
        known = zip(self.members, self.about, strict=True)
        return {name: about.parameters for name, about in known if about.parameters is not None}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, C)."""
        M, N, C = self.log_probabilities.shape
        return M, N, C

    @property
    def probabilities(self) -> Tensor:
        """(M, N, C) float32, computed at each call; for large N use `blocks` instead."""
        return self.log_probabilities.float().exp()

    def true_class(self) -> Tensor:
        """(M, N) float64: each member's probability of the true class; a `ValueError` where there are no labels."""
        labels = self.require_labels()
        index = labels.expand(len(self.members), -1)[..., None]  # (M, N, 1)
        return self.log_probabilities.gather(-1, index).squeeze(-1).double().exp()

    def require_labels(self) -> Tensor:
        """(N,) labels; a `ValueError` where there are none."""
        if self.labels is None:
            msg = "expected outputs with labels, got none: collect over a corpus with transcripts"
            raise ValueError(msg)
        return self.labels

    def blocks(
        self, frames: int = 65_536, *, nan: Literal["accept", "if declared", "refuse"] = "accept"
    ) -> Iterator[tuple[slice, Tensor]]:
        """Iterate over the frames: pairs of a slice and its (M, b, C) float32 probabilities.

        Args:
            frames: per block.
            nan: whether members may give NaN: always, only where abstentions are declared, or never.

        Raises:
            ValueError: a member gives NaN and may not; the message names it and a frame.
        """
        for start in range(0, self.shape[1], frames):
            where = slice(start, min(start + frames, self.shape[1]))
            block = self.log_probabilities[:, where].float().exp()
            refused = nan == "refuse" or (nan == "if declared" and not self.abstain)
            if refused and block.sum().isnan():
                m, b = block.isnan().any(dim=2).nonzero()[0].tolist()
                came = f"{self.members[m]!r}, got NaN at frame {start + b}"
                declare = "if it abstains there, declare abstain=True"
                way_out = "use frames where no member abstains" if self.abstain else declare
                msg = f"expected probabilities from member {came}; {way_out}"
                raise ValueError(msg)
            yield where, block

    def at(self, frames: Tensor) -> Self:
        """The same members on some frames only, by index (K,) or by mask (N,); they get a fingerprint of their own."""
        assert self.groups is not None  # filled in when made
        return replace(
            self,
            log_probabilities=self.log_probabilities[:, frames],
            labels=None if self.labels is None else self.labels[frames],
            groups=self.groups[frames],
            fingerprint="",
        )

    def subset(self, members: Sequence[str]) -> Self:
        """The same frames for these members only, in this order; a `ValueError` where one is not among the members."""
        if missing := [name for name in members if name not in self.members]:
            msg = f"no member named {missing}; there are {list(self.members)}"
            raise ValueError(msg)
        rows = [self.members.index(name) for name in members]
        return replace(
            self,
            log_probabilities=self.log_probabilities[rows],
            members=tuple(members),
            about=tuple(self.about[row] for row in rows),
        )


def _class_indices(labels: Any, classes: tuple[str, ...]) -> Tensor:
    """(N,) from indices, or from names of classes."""
    array = np.asarray(labels)
    if array.dtype.kind not in "UO":
        return torch.as_tensor(array)
    table, names = {name: index for index, name in enumerate(classes)}, list(map(str, array.tolist()))
    if unknown := sorted(set(names) - set(table)):
        msg = f"expected labels among the classes {list(classes)}, got {unknown}"
        raise ValueError(msg)
    return torch.tensor([table[name] for name in names])


def distributions(values: Any, whose: str = "", *, dtype: torch.dtype = torch.float32, abstain: bool = False) -> Tensor:
    """(N, C) rows on the CPU, checked; not to be written to. An error names `whose` they are: "from member 'a'".

    Args:
        values: array or tensor of any number type. The sums of float16 and bfloat16 rows may be off by the machine
            epsilon of their type; these rows are divided by their sum.
        dtype: of the rows returned.
        abstain: accept rows that are all NaN.

    Raises:
        ValueError: another shape, or a row that is no distribution: its sum is further from one than 1e-3 (logits,
            scores), or it holds a negative number or NaN.
    """
    given = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    rows = given.to(dtype)
    whose = f" {whose}" if whose else ""
    if rows.ndim != 2:
        msg = f"expected probabilities of shape (N, C){whose}, got {tuple(rows.shape)}"
        raise ValueError(msg)
    sums, half = rows.sum(dim=1), given.dtype in (torch.float16, torch.bfloat16)
    tolerance = max(_TOLERANCE, torch.finfo(given.dtype).eps) if half else _TOLERANCE
    bad = ~((sums - 1).abs() <= tolerance) | (rows < 0).any(dim=1)
    if abstain:
        bad &= ~rows.isnan().all(dim=1)
    if bad.any():
        frame = int(bad.nonzero()[0])
        row, way_out = rows[frame], "apply softmax to logits first"
        if row.isnan().all():
            way_out = "if it abstains there, declare abstain=True to MemberOutputs, or leave those frames out"
        came = f"a row with sum {float(row.sum()):.6g} and minimum {float(row.min()):.6g} at frame {frame}"
        msg = f"expected rows of probabilities that sum to one{whose}, got {came} ({bad.sum()} such rows); {way_out}"
        raise ValueError(msg)
    return rows / sums[:, None] if half else rows


def indices(values: Any, what: str, frames: int, *, below: int | None = None) -> Tensor:
    """(N,) int64 on the CPU, from an array or tensor of N = `frames` integers of any type, from 0 to `below` - 1.

    Raises:
        ValueError: another shape or type, or a value out of range.
    """
    tensor = torch.as_tensor(values).detach().cpu()
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    if tensor.shape != (frames,) or (frames and not whole):
        came = f"{tuple(tensor.shape)} {tensor.dtype}"
        msg = f"expected {what} of shape ({frames},) and an integer type, got {came}"
        raise ValueError(msg)
    tensor = tensor.long()  # first, because torch has no minimum of small unsigned types
    if below is not None and frames and not 0 <= int(tensor.min()) <= int(tensor.max()) < below:
        msg = f"expected {what} from 0 to {below - 1}, got {int(tensor.min())} to {int(tensor.max())}"
        raise ValueError(msg)
    return tensor
