"""`MemberOutputs`: every member's probabilities for every frame, and what is known of the members.

Models come before it; after it there is array arithmetic only, without any model or accelerator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import lazy_loader  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ensemble.outputs.arrays import (
    Aligned,
    class_indices,
    class_names,
    distributions,
    group_indices,
    indices,
    numbers,
    singles,
)
from zoo._notebook import Table, html, shortened

__getattr__ = lazy_loader.attach(__name__, ["predictions", "store"])[0]

LEAST = 2.0**-52  # the least probability of the true class that a log-loss counts with, as in scikit-learn


@dataclass(frozen=True)
class About:
    """What is known of one member besides its outputs; the defaults mean unknown."""

    parameters: int | None = None  #: number of trainable parameters
    trained_on: str = ""  #: fingerprint of the frames it was trained on, comparable with `MemberOutputs.fingerprint`
    reference: str = ""  #: its version in a registry, `name@id`
    size: int | None = None  #: bytes of its checkpoint, or of its parameters and buffers where it has none


@dataclass(frozen=True)
class Cost:
    """What running one member or one rule costs on the machine where it was measured; see `ensemble.run.costs`."""

    #: per frame; of a member, by how much it lengthens the run of all members; of a rule, from frames to its rows, with
    #: the members that it uses
    microseconds: float
    alone: float = math.nan  #: microseconds per frame of a member that runs by itself; of a rule, without its members
    memory: int | None = None  #: most bytes held at a time while it runs, beside weights and inputs; None if unknown
    kind: int | None = None  #: members of one kind run as one, and the first of them costs `alone`


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
        put = object.__setattr__
        put(self, "log_probabilities", numbers(self.log_probabilities, "log-probabilities").detach().cpu())
        put(self, "members", tuple(self.members))
        put(self, "classes", class_names(self.classes))
        shape, M, C = tuple(self.log_probabilities.shape), len(self.members), len(self.classes)
        put(self, "about", tuple(self.about) or (About(),) * M)
        if len(shape) != 3 or (shape[0], shape[2]) != (M, C):
            wanted = f"(M, N, C) = ({M}, N, {C}) for {M} members and {C} classes"
            msg = f"expected log-probabilities of shape {wanted}, got {shape}"
            raise ValueError(msg)
        if strange := [name for name in self.members if not isinstance(name, str)]:
            msg = f"expected names of members as text, got {strange}"
            raise TypeError(msg)
        for what, names in (("member", self.members), ("class", self.classes)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                msg = f"expected distinct {what} names, got {twice} more than once"
                raise ValueError(msg)
        total = self.log_probabilities[:, :1].float().logsumexp(dim=-1)  # (M, 1), a look that costs nothing
        if not self.log_probabilities.is_floating_point() or (total.abs() > 0.1).any():
            msg = "expected log-probabilities, whose exponentials sum to one, got other numbers at frame 0"
            raise ValueError(f"{msg}; for logits take log_softmax(-1), for probabilities use from_probabilities")
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
        classes: Sequence[Any] | None = None,
        fingerprint: str = "",
        abstain: bool = False,
        about: Mapping[str, About] | None = None,
        renormalise: bool = False,
    ) -> Self:
        """Outputs from arrays you already have, of any origin.

        Args:
            probabilities: member name -> (N, C) array, tensor, list or table, rows summing to one within 1e-3; rows of
                float16 and bfloat16, which cannot do so exactly, are divided by their sum. Tables are aligned: their
                columns by the names of the classes, their rows by their index.
            labels: (N,) names of classes, or indices of them; what can be both is refused. Names are text, or numbers
                where `classes` are numbers. Where tables have an index, labels with an index are aligned too, and so
                are groups.
            groups: (N,) recording of each frame: integers, which are kept, or anything hashable.
            classes: C names; if None, the names of a table's columns, or "0", "1", ..., which labels cannot name.
            fingerprint: as for the class, and so is `abstain`.
            about: member -> what is known of it; members that are left out are unknown.
            renormalise: divide each row by its sum; for probabilities that were rounded, per cent, or counts.

        Raises:
            TypeError: `probabilities` is not a mapping, or a member's are not numbers.
            ValueError: see the class; or a row is no distribution (the message names the member and a frame, and tells
                the likely cause), tables do not fit together, or a name in `about` is not a member's.

        Example:
            >>> p = [[0.9, 0.1], [0.2, 0.8]]
            >>> MemberOutputs.from_probabilities({"a": p, "b": p}, labels=[0, 1]).shape
            (2, 2, 2)
        """
        if not isinstance(probabilities, Mapping):
            shape = getattr(probabilities, "shape", None)
            came = type(probabilities).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
            msg = f"expected a mapping of member name to (N, C) probabilities, got {came}; give dict(zip(names, array))"
            raise TypeError(msg)
        if not probabilities:
            msg = "expected at least one member, got an empty mapping of probabilities"
            raise ValueError(msg)
        tables = Aligned(probabilities, classes)
        arrays = {}
        for name, given in tables.arrays.items():
            rows = distributions(given, f"from member {name!r}", dtype=None, abstain=abstain, renormalise=renormalise)
            arrays[name] = rows.log().float()  # in this order: what float64 holds may be zero in float32
        first, shape = next((name, rows.shape) for name, rows in arrays.items())
        for name, rows in arrays.items():
            if rows.shape != shape:
                came = f"{tuple(shape)} from {first!r} and {tuple(rows.shape)} from {name!r}"
                msg = f"expected one shape from all members, got {came}"
                raise ValueError(msg)
        known, (frames, count) = dict(about or {}), shape
        names = class_names(range(count) if tables.classes is None else tables.classes)
        if len(names) != count:
            msg = f"expected a column for each of {len(names)} classes from member {first!r}, got {count} columns"
            raise ValueError(msg)
        if unknown := sorted(set(known) - set(arrays)):
            msg = f"expected only members {list(arrays)} in `about`, got {unknown}"
            raise ValueError(msg)
        truth = None if labels is None else tables.by_row(labels, "the labels")
        recordings = None if groups is None else tables.by_row(groups, "the groups")
        return cls(
            torch.stack(list(arrays.values())),
            tuple(arrays),
            names,
            labels=None if truth is None else class_indices(truth, tables.classes, count, frames=frames),
            groups=None if recordings is None else group_indices(recordings, frames),
            fingerprint=fingerprint,
            abstain=abstain,
            about=tuple(known.get(name, About()) for name in arrays),
        )

    def _summary(self) -> str:
        """Sizes in words; no probability is read."""
        (M, N, C), labels = self.shape, "labels" if self.labels is not None else "no labels"
        assert self.groups is not None  # filled in when made
        recordings = len(torch.unique(torch.unique_consecutive(self.groups)))
        return f"{M} members, {N:,} frames of {recordings:,} recordings, {C} classes, {labels}"

    def __repr__(self) -> str:
        return f"MemberOutputs: {self._summary()}\nmembers: {shortened(self.members)}"

    def _repr_html_(self) -> str:
        rows = [
            {
                "member": name,
                "parameters": about.parameters,
                "bytes": about.size,
                "version": about.reference or None,
                "trained on": about.trained_on[:12] or None,
            }
            for name, about in zip(self.members, self.about, strict=True)
        ]
        lines = [self._summary(), f"classes: {shortened(self.classes)}", f"frames {self.fingerprint[:12]}"]
        return html("Outputs of members", lines, [Table(rows, formats={"parameters": ",d", "bytes": ",d"})])

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
            block = singles(self.log_probabilities[:, where]).exp_()
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


def expect_outputs(given: object) -> None:
    """A `TypeError` that says how outputs are made, for anything that is no `MemberOutputs`."""
    if not isinstance(given, MemberOutputs):
        shape = getattr(given, "shape", None)
        came = type(given).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
        msg = f"expected MemberOutputs, got {came}; they are made by collect(members, frames) or by from_probabilities"
        raise TypeError(msg)
