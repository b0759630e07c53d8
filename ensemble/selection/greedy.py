"""Greedy selection with replacement for accuracy (Caruana et al.), exact and incremental."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.outputs import MemberOutputs

Array = NDArray[np.float64]
Floats = NDArray[np.float32]

_SLACK = 1e-5  # rows this close to flipping are looked at in full: more than rounding can do


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
    """The unnormalised sum of the picks, each frame's margin, and how far each member can move it."""

    def __init__(self, outputs: MemberOutputs) -> None:
        self.labels = outputs.require_labels().numpy()
        M, N, C = outputs.shape
        self.P = np.empty((M, N, C), dtype=np.float32)
        self.lowest, self.highest = np.empty((M, N), np.float32), np.empty((M, N), np.float32)
        self.truth = np.empty((M, N))
        for where, block in outputs.blocks(8192):
            self._measure(where, block.numpy())
        if np.isnan(self.truth).any():
            names = [outputs.members[m] for m in np.flatnonzero(np.isnan(self.truth).any(axis=1))]
            msg = f"expected numbers from every member, got NaN from {names}; leave them out"
            raise ValueError(msg)
        self.least, self.most = self.lowest.min(axis=0), self.highest.max(axis=0)
        self.sum = np.zeros((N, C))
        self.margin = np.zeros(N)
        self.picked = 0

    def _measure(self, where: slice, p: Floats) -> None:
        labels = self.labels[where]
        rows = np.arange(len(labels))
        self.P[:, where] = p
        truth = p[:, rows, labels]  # (M, b)
        self.truth[:, where] = truth
        others = p.copy()
        others[:, rows, labels] = -np.inf
        self.lowest[:, where] = truth - others.max(axis=2)
        others[:, rows, labels] = np.inf
        self.highest[:, where] = truth - others.min(axis=2)

    def best(self) -> tuple[int, int, float]:
        """The member to add, how many frames are right with it, and the log-loss then."""
        hits = self._hits()
        level = [m for m, hit in enumerate(hits) if hit == max(hits)]
        losses = [self._loss(m) for m in level]
        first = min(range(len(level)), key=losses.__getitem__)
        return level[first], max(hits), losses[first]

    def add(self, m: int) -> None:
        self.sum += self.P[m]
        self.picked += 1
        rows = np.arange(len(self.labels))
        truth = self.sum[rows, self.labels]
        self.sum[rows, self.labels] = -np.inf
        self.margin = truth - self.sum.max(axis=1)
        self.sum[rows, self.labels] = truth

    def _hits(self) -> list[int]:
        """For each member, how many frames are right once it joins."""
        sure = self.margin + self.least > _SLACK
        open_ = np.flatnonzero(~sure & (self.margin + self.most >= -_SLACK))  # somebody can flip these
        base, margin, labels, total = int(sure.sum()), self.margin[open_], self.labels[open_], self.sum[open_]
        hits = []
        for m, p in enumerate(self.P):
            kept = margin + self.lowest[m, open_] > _SLACK
            flips = np.flatnonzero(~kept & (margin + self.highest[m, open_] >= -_SLACK))
            changed = total[flips] + p[open_[flips]]
            hits.append(base + int(kept.sum()) + int((changed.argmax(axis=1) == labels[flips]).sum()))
        return hits

    def _loss(self, m: int) -> float:
        with np.errstate(divide="ignore"):
            truth = self.sum[np.arange(len(self.labels)), self.labels] + self.truth[m]
            return float(-np.log(truth / (self.picked + 1)).mean())
