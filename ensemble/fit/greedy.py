"""Greedy selection with replacement (Caruana et al.), exact and incremental.

Outputs go in; a `GreedySelection` comes out. The law that proves it right: its picks are those of the plain loop over
all members and frames, since only frames whose predicted class provably cannot change are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble.fit._solver import Array, checked_weights, labelled, refuse_nan
from ensemble.judge.metrics import Counts, Metric, get_metric
from ensemble.outputs import LEAST, MemberOutputs, expect_outputs
from ensemble.rules.fitted import WeightedMean

Mask = NDArray[np.bool_]

_CELLS = 2**21  # probabilities processed together
_BLOCK = 16384  # frames read together
_PART = 1024  # frames counted together, over all members that may still be the best
_PAIRS = 8192  # pairs of a member and a frame computed together
_SLACK = 1e-5  # frames this close to flipping are computed in full: more than rounding can change
_ROUNDED = 1e-7  # and this much per round: a margin in float32 is off by 3e-8 at most
_LEFT = 0.8  # settled frames are dropped once no more than this share is open
_PER_FRAME = ("frames", "labels", "times", "guess", "low", "least", "sum")
_PER_MEMBER = ("tops", "peaks", "seconds", "margins")


@dataclass(frozen=True, eq=False)
class GreedySelection:
    """Members picked one by one, each to make the mean of the picks best by a metric.

    Values and loss are computed from the sum of the picks. `rule` rounds differently, so a frame where two classes
    tie exactly may go the other way there.
    """

    picks: tuple[str, ...]  #: names in the order of picking, all rounds, with repeats
    values: Array  #: (rounds,) the metric of the mean of the picks so far
    #: (M,) shares of the picks up to the best round (best metric, then lowest log-loss, then fewest picks)
    weights: Array
    value: float  #: the metric of these weights on the frames
    loss: float  #: log-loss of these weights, in nats; infinite where all picks give a frame's true class zero
    members: tuple[str, ...]  #: M names, in the order of the weights
    fingerprint: str = ""  #: of the frames
    metric: str = "accuracy"

    @property
    def rule(self) -> WeightedMean:
        """The weighted mean of the members with these weights."""
        return WeightedMean(tuple(self.weights.tolist()), self.fingerprint, members=self.members)

    @property
    def accuracies(self) -> Array:
        """`values`, where the metric is accuracy."""
        return self.values if self.metric == "accuracy" else np.full_like(self.values, np.nan)

    @property
    def accuracy(self) -> float:
        """`value`, where the metric is accuracy."""
        return self.value if self.metric == "accuracy" else float("nan")


def greedy(
    outputs: MemberOutputs,
    rounds: int = 50,
    *,
    metric: str = "accuracy",
    sample_weights: object | None = None,
    allowed: Callable[[Mask], Mask] | None = None,
) -> GreedySelection:
    """Pick a member per round, repeats allowed, so that the mean of all picks is best by a metric.

    Ties go to the lower log-loss, then to the first member; within a frame, to the first class. The picks are
    those of the plain loop over all members and frames, but only frames that a member can flip are computed.
    Nothing is known of how much better other weights would be; for the log-loss and the Brier score `fit_weights` finds
    the best ones. Weights for decisions (accuracy, macro F1) may have a poor log-loss: recalibrate.
    See Caruana et al., "Ensemble selection from libraries of models", ICML 2004.

    Args:
        outputs: with labels.
        rounds: number of picks.
        metric: a name in `ensemble.judge.METRICS`; your own if it is computed from `Counts`.
        sample_weights: (N,) non-negative; integers act as repeated frames.
        allowed: from the members picked so far, (M,) bool, to those that may be picked next, of which there is always
            one. If None, all.

    Raises:
        ValueError: no labels, no frames, NaN, no round, or an unknown metric.

    Example:
        >>> p, q = [[0.9, 0.1], [0.2, 0.8]], [[0.4, 0.6], [0.4, 0.6]]
        >>> greedy(MemberOutputs.from_probabilities({"p": p, "q": q}, labels=[0, 1]), rounds=2).picks
        ('p', 'p')
    """
    expect_outputs(outputs)
    if rounds < 1:
        msg = f"expected at least one round, got {rounds}"
        raise ValueError(msg)
    judged, (M, N, _) = get_metric(metric), outputs.shape
    labelled(outputs)
    times = np.ones(N) if sample_weights is None else checked_weights(sample_weights, N)
    state: _Accuracy | _Decisions | _Scores
    if metric == "accuracy" and sample_weights is None:
        state = _Accuracy(outputs, rounds)
    elif metric == "accuracy" or judged.of is Counts:
        state = _Decisions(outputs, rounds, judged, times)
    elif metric in ("log_loss", "brier"):
        state = _Scores(outputs, judged, times)
    else:
        msg = f"expected accuracy, log_loss, brier, or a metric of Counts to pick by, got {metric!r}"
        raise ValueError(msg)
    found, chosen = [], np.zeros(M, dtype=bool)
    for _ in range(rounds):
        found.append(state.best(np.ones(M, dtype=bool) if allowed is None else allowed(chosen)))
        state.add(found[-1][0])
        chosen[found[-1][0]] = True
    picks, goods, losses = zip(*found, strict=True)
    best = max(range(rounds), key=lambda k: (goods[k], -losses[k], -k))
    shares, names = np.bincount(picks[: best + 1], minlength=M) / (best + 1), tuple(outputs.members[m] for m in picks)
    values = judged.goods(np.array(goods))  # a sign turned twice
    known = outputs.members, outputs.fingerprint, metric
    return GreedySelection(names, values, shares, float(values[best]), losses[best], *known)


class _Accuracy:
    """For accuracy: the unnormalised sum of the picks and, for each frame, bounds of its margin.

    The margin is the sum for the true class minus the largest other one, the rival's. A member moves it by at
    least its own margin, and by at most what it gives the true class beyond the rival: frames that stay on their
    side either way need no computation. Probabilities are computed where they are needed, never all together, and
    only for frames that some member gets wrong: the others are right whatever is picked.
    """

    def __init__(self, outputs: MemberOutputs, rounds: int) -> None:
        self.table, labels = _Table(outputs.log_probabilities), outputs.require_labels()
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

    def best(self, allowed: Mask) -> tuple[int, float, float]:
        """The allowed member to add, the accuracy with it, and the log-loss then."""
        self._settle()
        sure, open_ = self._open()
        if self.picked:
            self._measure(open_)  # exact margins where the bounds left a frame open; often that settles it
            sure, open_ = self._open()
        kept, whose, rows = self._bounded(open_)
        starts = np.searchsorted(whose, np.arange(len(kept) + 1)).tolist()
        bounds = np.where(allowed, self.always + int(sure.sum()) + kept + np.diff(starts), -1)
        hits = self._raced(bounds, [rows[begin:end] for begin, end in pairwise(starts)])
        most = max(hits.values())
        level = sorted(m for m, hit in hits.items() if hit == most)
        with np.errstate(divide="ignore"):
            losses = [float(-np.log((self.true_sum + self.truth[m]) / (self.picked + 1)).mean()) for m in level]
        first = min(range(len(level)), key=losses.__getitem__)
        return level[first], most / len(self.true_sum), losses[first]

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

    def _open(self, left: int = 1) -> tuple[Mask, NDArray[np.intp]]:
        """Frames that stay right whichever members are picked next, and frames that some member can flip."""
        sure = self.low + left * self.least > self.slack
        return sure, np.flatnonzero(~sure & (self.high + left * self.most >= -self.slack))

    def _settle(self) -> None:
        """Drop the frames that no remaining picks can flip, once there are many."""
        sure, open_ = self._open(self.left)
        if len(open_) > _LEFT * len(self.frames):
            return
        self.always += int(sure.sum())
        for name in ("frames", "labels", "least", "most", "low", "high", "rival", "sum"):
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


class _Decisions:
    """The sum of the picks, the class that it predicts on each frame, and a bound of that class's margin.

    The margin is the sum for the predicted class minus the largest other one. A member moves it by at least its own
    margin for that class: where the two together stay positive, the prediction stays, and nothing is computed. Frames
    on which all members predict the same class are settled from the start, others once no picks left can flip them.
    It serves every metric of decisions with weighted frames, at three times the cost of `_Accuracy`.
    """

    def __init__(self, outputs: MemberOutputs, rounds: int, metric: Metric, times: Array) -> None:
        labels = labelled(outputs)
        self.metric, self.classes = metric, len(outputs.classes)
        self.table = _Table(outputs.log_probabilities)
        self.slack = _SLACK + _ROUNDED * rounds
        self.truth, self.tops, self.peaks, self.seconds = self.table.tops(labels)
        refuse_nan(outputs, self.peaks)
        self.every, self.true_sum = times, np.zeros(len(times))
        self.margins = self.peaks - self.seconds
        for m, margins in enumerate(self.margins):  # the logarithms of equal probabilities may differ
            close = np.flatnonzero(margins <= self.slack)
            self.tops[m, close] = self.table.probabilities(m, close).argmax(axis=1)
        self.labels, self.times, N = labels.numpy(), times, len(times)
        self.true = np.bincount(self.labels, times, self.classes)
        self.guess, self.low, self.least = self.tops[0], np.zeros(N), self.margins.min(axis=0)
        self.frames, self.sum = np.arange(N), np.zeros((N, 0))
        self.picked, self.left = 0, rounds
        counted = [self._counted(tops, self.labels, times) for tops in self.tops]
        self.hits, self.predicted = (np.stack(each) for each in zip(*counted, strict=True))  # (M, C), of single members
        self._keep((times > 0) & ~((self.tops == self.tops[0]).all(axis=0) & (self.least > self.slack)))
        self.sum = np.zeros((len(self.frames), self.classes))

    def best(self, allowed: Mask) -> tuple[int, float, float]:
        """The allowed member to add, the metric with it (the higher the better), and the log-loss then."""
        hits, predicted = self._tried(allowed) if self.picked else (self.hits, self.predicted)
        counts = Counts(hits, predicted, self.true)
        values = self.metric.function(counts) if self.metric.of is Counts else hits.sum(axis=1) / self.true.sum()
        values = np.where(allowed, values, -np.inf)
        level = np.flatnonzero(values == values.max())
        with np.errstate(divide="ignore"):
            pools = [(self.true_sum + self.truth[m]) / (self.picked + 1) for m in level]
            losses = [
                -float(np.average(np.log(pool[self.every > 0]), weights=self.every[self.every > 0])) for pool in pools
            ]
        first = int(np.argmin(losses))
        return int(level[first]), float(values[level[first]]), losses[first]

    def add(self, m: int) -> None:
        for begin in range(0, len(self.frames), _BLOCK):
            part = slice(begin, begin + _BLOCK)
            self.sum[part] += self.table.probabilities(m, self.frames[part])
        self.true_sum += self.truth[m]
        self.picked, self.left = self.picked + 1, self.left - 1
        if self.picked == 1:
            self.guess, self.hits, self.predicted = self.tops[m].copy(), self.hits[m], self.predicted[m]
            self._aim(np.arange(len(self.frames)))
        self.low += self.margins[m]

    def _tried(self, allowed: Mask) -> tuple[Array, Array]:
        """(M, C) hits and predictions by class, with each member added."""
        self._measure(np.flatnonzero(self.low + np.minimum(self.least, 0) <= self.slack))
        open_ = self.low + self.left * np.minimum(self.least, 0) <= self.slack
        rows = np.flatnonzero(self.low + self.least <= self.slack)
        close = (self.margins[:, rows] + self.low[rows] <= self.slack) & allowed[:, None]
        whose, row = np.divmod(np.flatnonzero(close), max(len(rows), 1))
        row = rows[row]
        hits, predicted = (np.tile(each, (len(allowed), 1)) for each in (self.hits, self.predicted))
        for begin in range(0, len(row), _PAIRS):
            m, at = whose[begin : begin + _PAIRS], row[begin : begin + _PAIRS]
            changed = self.sum.take(at, axis=0)
            changed += self.table.probabilities(m, self.frames[at])
            for sign, guess in ((1, changed.argmax(axis=1)), (-1, self.guess[at])):
                right = self.times[at] * (guess == self.labels[at])
                for counts, amounts in ((hits, right), (predicted, self.times[at])):
                    counts += sign * np.bincount(m * self.classes + guess, amounts, counts.size).reshape(counts.shape)
        if open_.sum() <= _LEFT * len(open_):
            self._keep(open_)
        return hits, predicted

    def _measure(self, rows: NDArray[np.intp]) -> None:
        """Compute what the sum predicts on some frames, and its exact margin."""
        sums, every = self.sum.take(rows, axis=0), np.arange(len(rows))
        guess = sums.argmax(axis=1)
        top = sums[every, guess]
        sums[every, guess] = -np.inf
        self.low[rows] = top - sums.max(axis=1)
        moved = guess != self.guess[rows]
        rows, guess = rows[moved], guess[moved]
        for sign, classes in ((1, guess), (-1, self.guess[rows])):
            hits, predicted = self._counted(classes, self.labels[rows], self.times[rows])
            self.hits, self.predicted = self.hits + sign * hits, self.predicted + sign * predicted
        self.guess[rows] = guess
        self._aim(rows)

    def _aim(self, rows: NDArray[np.intp]) -> None:
        """Compute the members' margins for what the sum predicts on some frames."""
        guess = self.guess[rows]
        for m in range(len(self.tops)):
            given, peak = self.table.probabilities(m, self.frames[rows], guess), self.peaks[m, rows]
            self.margins[m, rows] = given - np.where(self.tops[m, rows] == guess, self.seconds[m, rows], peak)
        self.least[rows] = self.margins[:, rows].min(axis=0)

    def _counted(self, guess: NDArray[np.intp], labels: NDArray[np.intp], times: Array) -> tuple[Array, Array]:
        """(C,) each: hits and predictions by class."""
        hits, predicted = (np.bincount(guess, each, self.classes) for each in (times * (guess == labels), times))
        return hits.astype(np.float64), predicted.astype(np.float64)

    def _keep(self, open_: Mask) -> None:
        """Go on with these frames only: the others keep their predictions."""
        for name in _PER_FRAME:
            setattr(self, name, getattr(self, name)[open_])
        for name in _PER_MEMBER:
            setattr(self, name, getattr(self, name)[:, open_])


class _Scores:
    """For log-loss and Brier score: what the picks give the true class, and how often each member was picked."""

    def __init__(self, outputs: MemberOutputs, metric: Metric, times: Array) -> None:
        kept = times > 0
        self.truth, self.times = outputs.true_class().numpy()[:, kept], times[kept]
        refuse_nan(outputs, self.truth)
        self.products = residual_products(outputs, times) if metric.name == "brier" else None
        self.true_sum, self.counts = np.zeros(len(self.times)), np.zeros(len(self.truth))

    def best(self, allowed: Mask) -> tuple[int, float, float]:
        """As for `_Decisions`."""
        pools, share = (self.true_sum + self.truth) / (self.counts.sum() + 1), self.times / self.times.sum()
        with np.errstate(divide="ignore"):
            losses = -np.log(pools) @ share
        if self.products is None:
            values = np.log(np.maximum(pools, LEAST)) @ share  # as the metric counts
        else:
            R, c = self.products, self.counts
            values = -(c @ R @ c + 2 * R @ c + np.diag(R)) / (c.sum() + 1) ** 2
        values = np.where(allowed, values, -np.inf)
        m = min(np.flatnonzero(allowed), key=lambda m: (-values[m], losses[m]))
        return int(m), float(values[m]), float(losses[m])

    def add(self, m: int) -> None:
        self.true_sum += self.truth[m]
        self.counts[m] += 1


def residual_products(outputs: MemberOutputs, times: Array) -> Array:
    """(M, M) mean inner products of the members' residuals (probabilities - one-hot) over weighted frames.

    With these R, the Brier score of a pool is w' R w, since the residual of a pool is the pool of the residuals.
    """
    labels, (M, _, C) = labelled(outputs), outputs.shape
    R: Array = np.zeros((M, M))
    for where, block in outputs.blocks(max(1, _CELLS // (M * C))):
        residual = block.double().numpy().copy()
        residual[:, np.arange(residual.shape[1]), labels[where].numpy()] -= 1.0
        residual *= np.sqrt(times[where])[None, :, None]
        flat = residual.reshape(M, -1)
        R += flat @ flat.T
    R /= times.sum()
    return R


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

    def tops(self, labels: torch.Tensor) -> tuple[NDArray[Any], ...]:
        """(M, N) each: the true class's probability, the top class, its probability, and the largest other one."""
        M, N, _ = self.logs.shape
        truth, peaks, seconds = torch.empty(3, M, N)
        tops = np.empty((M, N), dtype=np.int32)
        for m, begin in product(range(M), range(0, N, _BLOCK)):
            where = slice(begin, begin + _BLOCK)
            block, index = self.logs[m, where].to(torch.float32, copy=True), labels[where].unsqueeze(-1)
            truth[m, where] = block.gather(-1, index).squeeze(-1)
            tops[m, where] = block.numpy().argmax(axis=1)
            index = torch.from_numpy(tops[m, where, None]).long()
            peaks[m, where] = block.gather(-1, index).squeeze(-1)
            seconds[m, where] = block.scatter_(-1, index, -torch.inf).amax(dim=-1)
        return truth.exp_().numpy(), tops, peaks.exp_().numpy(), seconds.exp_().numpy()
