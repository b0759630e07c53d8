"""Greedy selection with replacement for accuracy (Caruana et al.), exact and incremental."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble.outputs import MemberOutputs

Array = NDArray[np.float64]

_BLOCK = 512  # frames read together
_PART = 512  # frames whose sums are made before looking whether a member can still be the best
_KEPT = 2**23  # probabilities of members picked before that are kept at most
_SLACK = 1e-5  # frames this close to flipping are looked at in full: more than rounding can do


@dataclass(frozen=True, eq=False)
class GreedySelection:
    """Members picked one by one, each to make the mean of the picks most accurate.

    Attributes:
        picks: names in the order picked, repeats included, all rounds.
        accuracies: (rounds,) accuracy of the mean of the picks so far.
        weights: (M,) shares of the picks up to the best round (highest accuracy, then lowest log-loss, then
            fewest), in the order of `members`.
        accuracy, loss: of these weights on the frames.
        members: M names.
        fingerprint: of the frames.
    """

    picks: tuple[str, ...]
    accuracies: Array
    weights: Array
    accuracy: float
    loss: float
    members: tuple[str, ...]
    fingerprint: str = ""


def greedy(outputs: MemberOutputs, rounds: int = 50) -> GreedySelection:
    """Pick a member per round, repeats allowed, so that the mean of all picks is most accurate.

    Ties fall to the lower log-loss, then to the first member; within a frame, to the first class. The picks are
    those of the plain loop over all members and frames; only frames that a member can flip are looked at.
    Accuracy weights may have a poor log-loss: recalibrate, or use `fit_weights`.

    Args:
        outputs: with labels.
        rounds: number of picks.

    Raises:
        ValueError: no labels, NaN, or no round.

    Example:
        >>> p, q = [[0.9, 0.1], [0.2, 0.8]], [[0.4, 0.6], [0.4, 0.6]]
        >>> greedy(MemberOutputs.from_probabilities({"p": p, "q": q}, labels=[0, 1]), rounds=2).picks
        ('p', 'p')

    References:
        Caruana et al., "Ensemble selection from libraries of models", ICML 2004.
    """
    if rounds < 1:
        msg = f"expected at least one round, got {rounds}"
        raise ValueError(msg)
    state = _State(outputs)
    counts = np.zeros(len(outputs.members))
    picks, hits, losses = [], [], []
    for _ in range(rounds):
        m, right, loss = state.best()
        state.add(m)
        picks.append(m)
        hits.append(right)
        losses.append(loss)
    best = max(range(rounds), key=lambda k: (hits[k], -losses[k], -k))
    np.add.at(counts, picks[: best + 1], 1.0)
    frames = outputs.shape[1]
    return GreedySelection(
        tuple(outputs.members[m] for m in picks),
        np.array(hits) / frames,
        counts / counts.sum(),
        hits[best] / frames,
        losses[best],
        outputs.members,
        outputs.fingerprint,
    )


class _State:
    """The unnormalised sum of the picks and, for each frame, between what bounds its margin lies.

    The margin is the sum for the true class minus the largest other one, the rival's. A member moves it by at
    least its own margin, and by at most what it gives the truth beyond the rival: frames that stay on their
    side either way need no look. Probabilities are made where they are looked at, never all together, and all
    this only for frames that some member gets wrong: the others are right whatever is picked.
    """

    def __init__(self, outputs: MemberOutputs) -> None:
        self.labels = outputs.require_labels().numpy()
        self.logs = outputs.log_probabilities
        M, N, C = outputs.shape
        self.truth, self.margins = np.empty((M, N), np.float32), np.empty((M, N), np.float32)
        for begin in range(0, N, _BLOCK):
            self._read(slice(begin, begin + _BLOCK))
        if np.isnan(self.margins).any():
            names = [outputs.members[m] for m in np.flatnonzero(np.isnan(self.margins).any(axis=1))]
            msg = f"expected numbers from every member, got NaN from {names}; leave them out"
            raise ValueError(msg)
        self.true_sum = np.zeros(N)
        self.frames = np.flatnonzero(self.margins.min(axis=0) <= _SLACK)
        self.always = N - len(self.frames)  # frames that every member gets right
        self.index = torch.from_numpy(self.frames)
        self.labels, self.margins = self.labels[self.frames], self.margins.take(self.frames, axis=1)
        self.least, self.most = self.margins.min(axis=0), self.truth.max(axis=0)[self.frames]
        self.sum = np.zeros((len(self.frames), C))
        self.low, self.high = np.zeros(len(self.frames)), np.zeros(len(self.frames))  # bounds of the margin
        self.rival = np.where(self.labels > 0, 0, C - 1)
        self.given = np.full_like(self.margins, np.nan)  # what members give the rival, as far as it was asked for
        self.picked = 0
        self.kept: dict[int, NDArray[np.float32]] = {}

    def _read(self, where: slice) -> None:
        logs = self.logs[:, where].float()
        index = torch.from_numpy(self.labels[where]).expand(len(logs), -1).unsqueeze(-1)
        truth = logs.gather(-1, index).squeeze(-1).exp()
        others = logs.scatter(-1, index, -torch.inf).amax(dim=-1).exp()
        self.truth[:, where] = truth.numpy()
        self.margins[:, where] = (truth - others).numpy()

    def best(self) -> tuple[int, int, float]:
        """The member to add, how many frames are right with it, and the log-loss then."""
        hits = self._hits()
        most = max(hits.values())
        level = sorted(m for m, hit in hits.items() if hit == most)
        losses = [self._loss(m) for m in level]
        first = min(range(len(level)), key=losses.__getitem__)
        return level[first], most, losses[first]

    def add(self, m: int) -> None:
        if m not in self.kept and (len(self.kept) + 1) * self.sum.size <= _KEPT:
            self.kept[m] = self._probabilities(m, slice(None))  # who was picked is looked at and picked again
        self.sum += self._probabilities(m, slice(None))
        self.true_sum += self.truth[m]
        self.picked += 1
        self.low += self.margins[m]
        self.high += self.truth[m, self.frames]

    def _hits(self) -> dict[int, int]:
        """How many frames are right once a member joins, for every member that may be the best."""
        sure, open_ = self._open()
        if self.picked:
            self._measure(open_)  # what the bounds left open, exactly; often that closes it
            sure, open_ = self._open()
        kept, flips = self._bounded(open_)
        least = self.always + int(sure.sum()) + kept.sum(axis=1)
        most = least + flips.sum(axis=1)
        hits: dict[int, int] = {}
        for m in np.argsort(-most, kind="stable").tolist():
            best = max(hits.values(), default=0)
            if most[m] < best:
                break
            hits[m] = self._right(m, open_[flips[m]], int(most[m]), best)
        return hits

    def _right(self, m: int, rows: NDArray[np.intp], most: int, best: int) -> int:
        """How many frames are right once a member joins, `most` less those of `rows` that are not.

        Counted in parts, and no further than where `best` is out of reach.
        """
        for part in np.array_split(rows, 1 + len(rows) // _PART):
            changed = self.sum.take(part, axis=0)
            changed += self._probabilities(m, part)
            most -= int((changed.argmax(axis=1) != self.labels[part]).sum())
            if most < best:
                break
        return most

    def _bounded(self, rows: NDArray[np.intp]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(M, rows) whether a frame is surely right once a member joins, and whether it may be."""
        margins, high = self.margins.take(rows, axis=1), self.high[rows]
        if not self.picked:
            return margins > _SLACK, np.abs(margins) <= _SLACK
        # float32 is exact enough: where it rounds by more than a fraction of the slack no member reaches
        kept = margins > (_SLACK - self.low[rows]).astype(np.float32)
        truth = self.truth.take(self.frames[rows], axis=1)
        flips = ~kept & (truth >= (-_SLACK - high).astype(np.float32))
        given = self._given(rows, flips)
        return kept, flips & (high + (truth - given) >= -_SLACK)

    def _given(self, rows: NDArray[np.intp], wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """(M, rows) what members give the rivals, where wanted; kept until a frame's rival is another."""
        m, row = np.nonzero(wanted & np.isnan(self.given.take(rows, axis=1)))
        where = np.ravel_multi_index((m, self.frames[rows[row]], self.rival[rows[row]]), self.logs.shape)
        self.given[m, rows[row]] = self.logs.take(torch.from_numpy(where)).float().exp_().numpy()
        return self.given.take(rows, axis=1)

    def _open(self) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
        """Frames that are right whoever joins, and the frames that somebody can flip."""
        sure = self.low + self.least > _SLACK
        return sure, np.flatnonzero(~sure & (self.high + self.most >= -_SLACK))

    def _measure(self, rows: NDArray[np.intp]) -> None:
        """The margins of some frames as they are."""
        others, every = self.sum.take(rows, axis=0), np.arange(len(rows))
        others[every, self.labels[rows]] = -np.inf
        rival = others.argmax(axis=1)
        self.given[:, rows[rival != self.rival[rows]]] = np.nan
        self.rival[rows] = rival
        self.low[rows] = self.high[rows] = self.true_sum[self.frames[rows]] - others[every, rival]

    def _probabilities(self, m: int, rows: NDArray[np.intp] | slice) -> NDArray[np.float32]:
        """(rows, C) of a member."""
        if m in self.kept:
            return self.kept[m][rows]
        found: NDArray[np.float32] = self.logs[m].index_select(0, self.index[rows]).float().exp_().numpy()
        return found

    def _loss(self, m: int) -> float:
        with np.errstate(divide="ignore"):
            return float(-np.log((self.true_sum + self.truth[m]) / (self.picked + 1)).mean())
