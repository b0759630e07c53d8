"""Greedy selection with replacement for accuracy (Caruana et al.), exact and incremental.

Outputs go in; a `GreedySelection` comes out. The law that proves it right: its picks are those of the plain loop over
all members and frames, since only frames whose prediction provably cannot change are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble.fit.weights import labelled, refuse_nan
from ensemble.outputs import MemberOutputs
from ensemble.rules.fitted import WeightedMean

Array = NDArray[np.float64]

_BLOCK = 16384  # frames read together
_PART = 1024  # frames counted together, over all members that may still be the best
_SLACK = 1e-5  # frames this close to flipping are computed in full: more than rounding can change
_ROUNDED = 1e-7  # and this much per round: a margin in float32 is off by 3e-8 at most
_LEFT = 0.8  # settled frames are dropped once no more than this share is open
_PER_FRAME = ("frames", "labels", "least", "most", "low", "high", "rival", "sum")


@dataclass(frozen=True, eq=False)
class GreedySelection:
    """Members picked one by one, each to make the mean of the picks most accurate.

    Accuracy and loss are computed from the sum of the picks. `rule` rounds differently, so a frame where two classes
    tie exactly may go the other way there.
    """

    picks: tuple[str, ...]  #: names in the order of picking, all rounds, with repeats
    accuracies: Array  #: (rounds,) accuracy of the mean of the picks so far
    #: (M,) shares of the picks up to the best round (highest accuracy, then lowest log-loss, then fewest picks)
    weights: Array
    accuracy: float  #: of these weights on the frames
    loss: float  #: of these weights, in nats; infinite where all picks give a frame's true class zero
    members: tuple[str, ...]  #: M names, in the order of the weights
    fingerprint: str = ""  #: of the frames

    @property
    def rule(self) -> WeightedMean:
        """The weighted mean of the members with these weights."""
        return WeightedMean(tuple(self.weights.tolist()), self.fingerprint, members=self.members)


def greedy(outputs: MemberOutputs, rounds: int = 50) -> GreedySelection:
    """Pick a member per round, repeats allowed, so that the mean of all picks is most accurate.

    Ties go to the lower log-loss, then to the first member; within a frame, to the first class. The picks are
    those of the plain loop over all members and frames, but only frames that a member can flip are computed.
    Weights for accuracy may have a poor log-loss: recalibrate, or use `fit_weights`.
    See Caruana et al., "Ensemble selection from libraries of models", ICML 2004.

    Args:
        outputs: with labels.
        rounds: number of picks.

    Raises:
        ValueError: no labels, no frames, NaN, or no round.

    Example:
        >>> p, q = [[0.9, 0.1], [0.2, 0.8]], [[0.4, 0.6], [0.4, 0.6]]
        >>> greedy(MemberOutputs.from_probabilities({"p": p, "q": q}, labels=[0, 1]), rounds=2).picks
        ('p', 'p')
    """
    if rounds < 1:
        msg = f"expected at least one round, got {rounds}"
        raise ValueError(msg)
    state, found = _State(outputs, rounds), []
    for _ in range(rounds):
        found.append(state.best())
        state.add(found[-1][0])
    picks, hits, losses = zip(*found, strict=True)
    best = max(range(rounds), key=lambda k: (hits[k], -losses[k], -k))
    counts = np.bincount(picks[: best + 1], minlength=len(outputs.members))
    names, shares, frames = tuple(outputs.members[m] for m in picks), counts / counts.sum(), outputs.shape[1]
    judged = hits[best] / frames, losses[best]
    return GreedySelection(names, np.array(hits) / frames, shares, *judged, outputs.members, outputs.fingerprint)


class _State:
    """The unnormalised sum of the picks and, for each frame, bounds of its margin.

    The margin is the sum for the true class minus the largest other one, the rival's. A member moves it by at
    least its own margin, and by at most what it gives the true class beyond the rival: frames that stay on their
    side either way need no computation. Probabilities are computed where they are needed, never all together, and
    only for frames that some member gets wrong: the others are right whatever is picked.
    """

    def __init__(self, outputs: MemberOutputs, rounds: int) -> None:
        labels = labelled(outputs)
        self.table = _Table(outputs.log_probabilities)
        self.truth, margins = self.table.margins(labels)
        refuse_nan(outputs, margins)
        _, N, C = outputs.shape
        self.true_sum = np.zeros(N)
        self.slack = _SLACK + _ROUNDED * rounds
        self.frames = np.flatnonzero(margins.min(axis=0) <= self.slack)
        self.always = N - len(self.frames)  # frames that every member gets right
        self.labels, self.margins = labels.numpy()[self.frames], margins.take(self.frames, axis=1)
        self.least, self.most = self.margins.min(axis=0), self.truth.max(axis=0)[self.frames]
        self.sum = np.zeros((len(self.frames), C))
        self.low, self.high = np.zeros(len(self.frames)), np.zeros(len(self.frames))  # bounds of the margin
        self.rival = np.where(self.labels > 0, 0, C - 1)
        self.given = np.full_like(self.margins, np.nan)  # what members give the rival, as far as computed
        self.picked, self.left = 0, rounds

    def best(self) -> tuple[int, int, float]:
        """The member to add, how many frames are right with it, and the log-loss then."""
        self._settle()
        sure, open_ = self._open()
        if self.picked:
            self._measure(open_)  # exact margins where the bounds left a frame open; often that settles it
            sure, open_ = self._open()
        kept, whose, rows = self._bounded(open_)
        starts = np.searchsorted(whose, np.arange(len(kept) + 1)).tolist()
        bounds = self.always + int(sure.sum()) + kept + np.diff(starts)
        hits = self._raced(bounds, [rows[begin:end] for begin, end in pairwise(starts)])
        most = max(hits.values())
        level = sorted(m for m, hit in hits.items() if hit == most)
        with np.errstate(divide="ignore"):
            losses = [float(-np.log((self.true_sum + self.truth[m]) / (self.picked + 1)).mean()) for m in level]
        first = min(range(len(level)), key=losses.__getitem__)
        return level[first], most, losses[first]

    def add(self, m: int) -> None:
        for begin in range(0, len(self.frames), _BLOCK):
            part = slice(begin, begin + _BLOCK)
            self.sum[part] += self.table.probabilities(m, self.frames[part])
        self.true_sum += self.truth[m]
        self.picked, self.left = self.picked + 1, self.left - 1
        self.low += self.margins[m]
        self.high += self.truth[m, self.frames]

    def _raced(self, most: NDArray[np.intp], open_: list[NDArray[np.intp]]) -> dict[int, int]:
        """The exact numbers out of the bounds `most`: first for the likely best, for others while they may win."""
        first = int(most.argmax())
        hits: dict[int, int] = {}
        for members in ([first], [m for m in range(len(most)) if m != first]):
            done = 0
            while members := [m for m in members if most[m] >= max(hits.values(), default=0)]:
                part = slice(done, done := done + max(1, _PART // len(members)))
                rows, sizes = np.concatenate([open_[m][part] for m in members]), [len(open_[m][part]) for m in members]
                changed = self.sum.take(rows, axis=0)
                changed += self.table.probabilities(np.repeat(members, sizes), self.frames[rows])
                wrong = changed.argmax(axis=1) != self.labels[rows]
                most[members] -= np.bincount(np.repeat(np.arange(len(members)), sizes), wrong, len(members)).astype(int)
                counted = [m for m in members if len(open_[m]) <= done]
                hits |= {m: int(most[m]) for m in counted}
                members = [m for m in members if m not in counted]
        return hits

    def _bounded(self, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """(M,) numbers of frames surely right once a member joins; and members with frames they may make right."""
        margins, high = self.margins.take(rows, axis=1), self.high[rows]
        if not self.picked:
            whose, row = np.divmod(np.flatnonzero(np.abs(margins) <= self.slack), len(rows))
            return (margins > self.slack).sum(axis=1), whose, rows[row]
        # float32 is exact enough: where it rounds by more than a fraction of the slack, no member can flip the frame
        kept = margins > (self.slack - self.low[rows]).astype(np.float32)
        truth = self.truth.take(self.frames[rows], axis=1)
        pairs = np.flatnonzero(~kept & (truth >= (-self.slack - high).astype(np.float32)))
        whose, row = np.divmod(pairs, len(rows))
        given = self.given[whose, rows[row]]  # what members give the rivals, remembered until a frame's rival changes
        new = np.flatnonzero(np.isnan(given))
        m, at = whose[new], rows[row[new]]
        given[new] = self.given[m, at] = self.table.probabilities(m, self.frames[at], self.rival[at])
        flips = high[row] + (truth.ravel()[pairs] - given) >= -self.slack
        return kept.sum(axis=1), whose[flips], rows[row[flips]]

    def _open(self, left: int = 1) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
        """Frames that stay right whichever members are picked next, and frames that some member can flip."""
        sure = self.low + left * self.least > self.slack
        return sure, np.flatnonzero(~sure & (self.high + left * self.most >= -self.slack))

    def _settle(self) -> None:
        """Drop the frames that no remaining picks can flip, once there are many."""
        sure, open_ = self._open(self.left)
        if len(open_) > _LEFT * len(self.frames):
            return
        self.always += int(sure.sum())
        for name in _PER_FRAME:
            setattr(self, name, getattr(self, name).take(open_, axis=0))
        self.margins, self.given = self.margins.take(open_, axis=1), self.given.take(open_, axis=1)

    def _measure(self, rows: NDArray[np.intp]) -> None:
        """Compute the exact margins of some frames."""
        others, every = self.sum.take(rows, axis=0), np.arange(len(rows))
        others[every, self.labels[rows]] = -np.inf
        rival = others.argmax(axis=1)
        self.given[:, rows[rival != self.rival[rows]]] = np.nan
        self.rival[rows] = rival
        self.low[rows] = self.high[rows] = self.true_sum[self.frames[rows]] - others[every, rival]


class _Table:
    """Probabilities of (M, N, C) logarithms, computed where they are needed; nothing is copied as a whole."""

    def __init__(self, logs: torch.Tensor) -> None:
        self.logs = logs if logs.stride(2) == 1 else logs.contiguous()
        sizes = zip(self.logs.shape, self.logs.stride(), strict=True)
        # all numbers as they lie in memory, with the gaps that a store leaves between members
        self.numbers = self.logs.as_strided((1 + sum((size - 1) * stride for size, stride in sizes),), (1,))
        self.rows = self.numbers.unfold(0, logs.shape[2], 1)

    def probabilities(
        self, m: NDArray[np.intp] | int, frames: NDArray[np.intp], c: NDArray[np.intp] | None = None
    ) -> NDArray[np.float32]:
        """(frames, C) of one member, or of one member per frame; (frames,) where there is one class per frame too."""
        of_member, of_frame, _ = self.logs.stride()
        places = torch.from_numpy(m * of_member + frames * of_frame)
        table, places = (self.rows, places) if c is None else (self.numbers, places + torch.from_numpy(c))
        found: NDArray[np.float32] = table.index_select(0, places).float().exp_().numpy()
        return found

    def margins(self, labels: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(M, N) each: the true class's probability, and its margin over the largest other one."""
        M, N, _ = self.logs.shape
        truth, others = torch.empty(M, N), torch.empty(M, N)
        for m, begin in product(range(M), range(0, N, _BLOCK)):
            where = slice(begin, begin + _BLOCK)
            block, index = self.logs[m, where].to(torch.float32, copy=True), labels[where].unsqueeze(-1)
            truth[m, where] = block.gather(-1, index).squeeze(-1)
            others[m, where] = block.scatter_(-1, index, -torch.inf).amax(dim=-1)
        return truth.exp_().numpy(), truth.sub(others.exp_()).numpy()
