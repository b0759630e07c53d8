"""From outputs to tables: one pass over the frames adds up sums, and every table of a report is made from them.

The sums of parts, such as shards that were counted by several processes, merge into those of the whole without
rounding. Memory does not grow with the number of frames, beyond one number per frame for its recording.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import msgspec
import numpy as np
import pandas as pd
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from ensemble.judge import excerpt
from ensemble.judge.diversity import PAIR_MEASURES, Joint
from ensemble.judge.excerpt import Excerpt
from ensemble.judge.metrics import METRICS, Answers, Counts, Metric, get_metric
from ensemble.judge.reliability import BINS, bin_sums, calibration_error
from ensemble.judge.significance import cluster_bootstrap, percentile_ends, piles
from ensemble.outputs import LEAST, About, Cost, MemberOutputs, expect_outputs
from ensemble.outputs.arrays import numbers, singles
from ensemble.rules.fitted import Among, WeightedMean, rule_for
from ensemble.rules.pooling import mean, tie_rate
from ensemble.rules.table import FittedRule, Rule, declared

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Singles = NDArray[np.float32]

_CELLS, _BLOCK = 2**24, 4096  # probabilities and frames processed at once
_PILES = 10_000  # beyond so many recordings, they are dealt at random into piles, and piles are resampled
_COUNTS = 2**25  # numbers of frames by answer, pile and class that are kept: piles are fewer where there are more
_TOGETHER = 64  # answers that are resampled together: limits memory
_TOLERANCE = 1e-3
_FORMAT = 1  # of a tally's bytes
_UNITS = np.array([1, 2**30, 1])[:, None]  # of bins: frames, confidence, right
_ADDED = ("confusion", "bins", "clipped", "abstained", "both", "true", "some_right", "ties")  # over parts
_KEPT = ("kept", "kept_keys", "kept_logs", "kept_rows")
_ARRAYS = ("numbers", "sizes", "piles", "counts", *_ADDED, *_KEPT)


@dataclass(frozen=True)
class Judged:
    """What is judged, and on what; tallies of parts are of one whole where this is equal."""

    members: tuple[str, ...]  #: M names
    classes: tuple[str, ...]  #: C names
    rules: tuple[str, ...]  #: names
    metric: str  #: what can be resampled, beside the means over frames
    frames: Annotated[int, msgspec.Meta(ge=0)]  #: of all parts together
    recordings: Annotated[int, msgspec.Meta(ge=0)]  #: U of all parts together, numbered from 0
    fingerprint: str  #: of all these frames
    about: tuple[About, ...]  #: what is known of each member
    abstain: bool = False  #: whether members may abstain

    @property
    def answers(self) -> int:
        """A: the members, the rules, and the uniform mean."""
        return len(self.members) + len(self.rules) + 1

    @property
    def places(self) -> Integers:
        """(U,) where each recording is resampled: its own place, or the pile that it shares with others."""
        most = _PILES
        if get_metric(self.metric).of is Counts:
            most = min(_PILES, max(100, _COUNTS // (3 * self.answers * len(self.classes))))
        return piles(np.arange(self.recordings), most)[0]


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums over the frames of some recordings for A answers: the M members, then the rules, then the uniform mean.

    Whole numbers, and sums of one recording each: tallies of other recordings are merged without rounding, in any
    order, and what is read off the whole is the same however it was divided. A member that abstains on a frame (a row
    of NaN, where the outputs declare it) counts as wrong there, with the loss of equal probabilities, and is left out
    of `confusion` and `bins`.
    """

    of: Judged
    numbers: Integers  #: (R,) the recordings, ascending
    sizes: Integers  #: (R,) frames of each
    sums: dict[str, Floats]  #: metric of `Answers` -> (A, R), added up frame by frame
    piles: Integers  #: (G,) the places of the counts, ascending; none where the metric needs no counts
    counts: Integers  #: (A, G, 3, C) frames predicted rightly, predicted, and true, of each class
    confusion: Integers  #: (A, C, C) frames by true class, predicted class
    bins: Integers  #: (A, 3, BINS) frames, confidence in units of 2^-30, right
    clipped: Integers  #: (A,) frames whose true class had less than `LEAST`
    abstained: Integers  #: (A,)
    both: Integers  #: (M, M) frames where both members are right
    true: Integers  #: (C,) frames of each class
    some_right: Integers  #: (C,) frames where any member is right, by true class
    ties: Integers  #: () frames on which the members' votes tie for first place
    #: (K, 3) of the frames that an excerpt may need, by recording and in time: recording, place in it, label
    kept: Integers
    kept_keys: Floats  #: (K,) their keys in `excerpt.sampling_keys`
    kept_logs: Singles  #: (M, K, C) log-probabilities of the members there
    kept_rows: Singles  #: (R, K, C) what the rules make of it
    seconds: float = 0.0  #: duration of the passes over the frames, added up

    @classmethod
    def merge(cls, tallies: Iterable[Tally]) -> Tally:
        """One tally of the recordings of several, in whatever order these come.

        Raises:
            ValueError: none; they are not of one whole; or a recording is in two of them.
        """
        parts = [*tallies]
        if not parts:
            msg = "expected a tally or more, got none"
            raise ValueError(msg)
        of = parts[0].of
        for part in parts:
            one, other = ({**vars(each.of), "metrics": [*each.sums]} for each in (parts[0], part))
            if differing := {name: (one[name], other[name]) for name in one if one[name] != other[name]}:
                msg = f"expected tallies of one whole, got two that differ in {differing}"
                raise ValueError(msg)
        numbers = np.concatenate([part.numbers for part in parts])
        order = np.argsort(numbers, kind="stable")
        if (twice := np.flatnonzero(np.diff(numbers[order]) == 0)).size:
            msg = f"expected each recording in one tally, got recording {numbers[order][twice[0]]} in two"
            raise ValueError(msg)
        piles = np.unique(np.concatenate([part.piles for part in parts]))
        counts = np.zeros((of.answers, len(piles), 3, len(of.classes)), dtype=np.int64)
        for part in parts:
            counts[:, np.searchsorted(piles, part.piles)] += part.counts
        return cls(
            of,
            numbers[order],
            np.concatenate([part.sizes for part in parts])[order],
            {name: np.concatenate([part.sums[name] for part in parts], axis=1)[:, order] for name in parts[0].sums},
            piles,
            counts,
            **{name: np.sum([getattr(part, name) for part in parts], axis=0) for name in _ADDED},
            kept=(kept := np.concatenate([part.kept for part in parts]))[(by := np.lexsort(kept.T[1::-1]))],
            kept_keys=np.concatenate([part.kept_keys for part in parts])[by],
            kept_logs=np.concatenate([part.kept_logs for part in parts], axis=1)[:, by],
            kept_rows=np.concatenate([part.kept_rows for part in parts], axis=1)[:, by],
            seconds=math.fsum(part.seconds for part in parts),
        )._trimmed()

    def _trimmed(self) -> Tally:
        """Without the frames that no excerpt of it needs."""
        needed = np.any([*self._chosen], axis=0)
        if needed.all():
            return self
        return replace(
            self,
            kept=self.kept[needed],
            kept_keys=self.kept_keys[needed],
            kept_logs=self.kept_logs[:, needed],
            kept_rows=self.kept_rows[:, needed],
        )

    @property
    def _chosen(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Of the frames kept, those of the sample and those of whole recordings."""
        groups, places = self.kept[:, 0], self.kept[:, 1]
        sampled = excerpt.sample(self.kept_keys, groups, len(self.of.members), len(self.of.classes))
        where = np.searchsorted(self.numbers, groups)
        return sampled, excerpt.recordings(where, places, self.numbers, self.sizes)

    @property
    def excerpts(self) -> tuple[Excerpt, Excerpt]:
        """A sample of all frames, with log-probabilities that `excerpt.encode` can hold, and some whole recordings."""
        sampled, whole = self._chosen
        coded = excerpt.decode(excerpt.encode(self.kept_logs[:, sampled])).astype(np.float32)
        return self._excerpt(sampled, coded), self._excerpt(whole, self.kept_logs[:, whole])

    def _excerpt(self, chosen: NDArray[np.bool_], logs: Singles) -> Excerpt:
        groups, _, labels = self.kept[chosen].T
        outputs = MemberOutputs(
            torch.from_numpy(logs),
            self.of.members,
            self.of.classes,
            labels=torch.from_numpy(labels.copy()),
            groups=torch.from_numpy(groups.copy()),
            abstain=self.of.abstain,
            about=self.of.about,
        )
        rows = torch.from_numpy(self.kept_rows[:, chosen])
        return Excerpt(outputs, dict(zip(self.of.rules, rows, strict=True)), self.kept_keys[chosen])

    def to_bytes(self) -> bytes:
        """A safetensors document, which `from_bytes` reads."""
        head = {"format": str(_FORMAT), "of": msgspec.json.encode(self.of).decode(), "seconds": repr(self.seconds)}
        head["metrics"] = json.dumps([*self.sums])
        arrays = {name: np.array(getattr(self, name), order="C") for name in _ARRAYS}
        arrays |= {f"sums.{name}": np.array(sums, order="C") for name, sums in self.sums.items()}
        return safetensors.numpy.save(arrays, head)

    @classmethod
    def from_bytes(cls, data: bytes) -> Tally:
        """The tally that `to_bytes` wrote.

        Raises:
            ValueError: something else, a tally of another version of this program, or one that cannot be.
        """
        try:
            arrays = safetensors.numpy.load(data)
            length = int.from_bytes(data[:8], "little")
            head = json.loads(data[8 : 8 + length])["__metadata__"]
            if head["format"] != str(_FORMAT):
                msg = f"expected a tally of format {_FORMAT}, got {head['format']!r}; count again"
                raise ValueError(msg)
            of, seconds = msgspec.json.decode(head["of"], type=Judged), float(head["seconds"])
            metrics = msgspec.json.decode(head["metrics"], type=list[str])
            sums = {name: arrays.pop(f"sums.{name}") for name in metrics}
            found = cls(of, sums=sums, seconds=seconds, **{name: arrays.pop(name) for name in _ARRAYS})
        except (SafetensorError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
            msg = f"expected a tally as `Tally.to_bytes` writes it, got something else ({error})"
            raise ValueError(msg) from error
        if wrong := found._wrong([*arrays]):
            msg = f"expected a tally as `Tally.to_bytes` writes it, got {wrong}"
            raise ValueError(msg)
        return found

    def _wrong(self, further: Sequence[str]) -> str:
        """What cannot be of sums over frames; empty where all can."""
        A, M, C = self.of.answers, len(self.of.members), len(self.of.classes)
        R, G = self.numbers.size, self.piles.size
        shapes = {"numbers": (R,), "sizes": (R,), "piles": (G,), "counts": (A, G, 3, C), "confusion": (A, C, C)}
        shapes |= {"bins": (A, 3, BINS), "clipped": (A,), "abstained": (A,), "both": (M, M), "true": (C,)}
        shapes |= {"some_right": (C,), "ties": (), "kept": (K := len(self.kept_keys), 3)}
        if further or len(self.of.about) != M:
            return f"further arrays {further}" if further else f"{len(self.of.about)} descriptions of {M} members"
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.int64 or (array < 0).any():
                return f"{name} of {array.shape} {array.dtype}, not {shape} whole numbers, none below zero"
        for name, sums in self.sums.items():
            if sums.shape != (A, R) or sums.dtype != np.float64 or not np.isfinite(sums).all():
                return f"sums of {name} of {sums.shape} {sums.dtype}, not {(A, R)} finite numbers"
        rising = all((np.diff(each) > 0).all() for each in (self.numbers, self.piles))
        if not rising or (R and self.numbers[-1] >= self.of.recordings) or (self.sizes < 1).any():
            return f"numbers of recordings that do not rise from 0 to {self.of.recordings - 1}, or one without frames"
        if not self.frames == self.true.sum() <= self.of.frames:
            return f"{self.frames} frames in recordings and {self.true.sum()} in classes, of {self.of.frames}"
        if ((self.confusion.sum(axis=(1, 2)) + self.abstained) != self.frames).any():
            return f"answers to another number of frames than {self.frames}"
        return self._wrong_kept(K) or ("" if math.isfinite(self.seconds) else f"a pass of {self.seconds} seconds")

    def _wrong_kept(self, count: int) -> str:
        """What cannot be of the frames that are kept."""
        M, C = len(self.of.members), len(self.of.classes)
        wanted = {"keys": (count,), "logs": (M, count, C), "rows": (len(self.of.rules), count, C)}
        for name, shape in wanted.items():
            array = getattr(self, f"kept_{name}")
            if array.shape != shape or array.dtype != (np.float64 if name == "keys" else np.float32):
                return f"{name} of frames kept of {array.shape} {array.dtype}, not {shape} numbers"
        with np.errstate(over="ignore", invalid="ignore"):
            totals = np.concatenate([np.exp(self.kept_logs).sum(axis=2).ravel(), self.kept_rows.sum(axis=2).ravel()])
        if not ((np.abs(totals - 1) < 0.1) | (np.isnan(totals) & self.of.abstain)).all():
            return "rows of frames kept that do not sum to one"
        where = np.searchsorted(self.numbers, self.kept[:, 0])
        known = (where < self.numbers.size).all() and (self.numbers[where] == self.kept[:, 0]).all()
        if not known or not (self.kept[:, 1] < self.sizes[where]).all() or not (self.kept[:, 2] < C).all():
            return "frames kept of other recordings, or with labels of no class"
        return "" if ((self.kept_keys > 0) & (self.kept_keys < 1)).all() else "keys of frames kept not between 0 and 1"

    @property
    def frames(self) -> int:
        """Number of frames counted."""
        return int(self.sizes.sum())

    @property
    def whole(self) -> float:
        """What fractions are of: the frames, NaN without any."""
        return self.frames or math.nan

    @property
    def metric(self) -> Metric:
        """What can be resampled, beside the means over frames."""
        return get_metric(self.of.metric)

    @property
    def joint(self) -> Joint:
        """How often members are right together."""
        return Joint(self.both.astype(np.float64), self.frames)

    @cached_property
    def _piled(self) -> tuple[Floats, dict[str, Floats]]:
        """(G,) frames of each place that is resampled, and the (A, G) sums, added up in the order of recordings."""
        places = self.of.places
        groups, where = int(places.max(initial=-1)) + 1, places[self.numbers]
        sizes: Floats = np.bincount(where, self.sizes, minlength=groups).astype(np.float64)
        piled = {name: np.zeros((self.of.answers, groups)) for name in self.sums}
        for name, rows in self.sums.items():
            for answer, row in enumerate(rows):
                piled[name][answer] = np.bincount(where, row, minlength=groups)
        return sizes, piled

    def values(self, metric: Metric) -> Floats:
        """(A,) each answer's value of a metric over all frames; NaN without frames."""
        if metric.of is Answers:
            means: Floats = self._piled[1][metric.name].sum(axis=1) / self.whole
            return means
        hits = np.diagonal(self.confusion, axis1=1, axis2=2)
        values: Floats = metric.function(Counts(hits, self.confusion.sum(axis=1), self.confusion.sum(axis=2)))
        return values

    def calibration_errors(self) -> Floats:
        """(A,) each answer's expected calibration error; NaN without frames."""
        return np.array([calibration_error(each) for each in self.bins / _UNITS])

    def resampled(self, metrics: Sequence[Metric], answers: Integers, *, replicates: int, seed: int) -> list[Floats]:
        """For each metric (R, K) values of K answers, the better the higher, all on the same resamples of recordings.

        A metric of `Counts` is no mean over frames: its counts are resampled, and it is computed from them; it must be
        the one that the sums were made for.
        """
        sizes, sums = self._piled
        counted = len(answers) * 3 * len(self.of.classes)
        tables = [
            sums[each.name][answers].T
            if each.of is Answers
            else self.counts[answers].transpose(1, 0, 2, 3).reshape(len(sizes), counted)
            for each in metrics
        ]
        ends = np.cumsum([table.shape[1] for table in tables])[:-1].tolist()
        means = cluster_bootstrap(np.concatenate(tables, axis=1), sizes, replicates=replicates, seed=seed)
        found = []
        for each, part in zip(metrics, np.split(means, ends, axis=1), strict=True):
            if each.of is Counts:
                counts = part.reshape(replicates, len(answers), 3, -1)
                part = each.function(Counts(counts[:, :, 0], counts[:, :, 1], counts[:, :, 2]))
            found.append(each.goods(part))
        return found


class Counting:
    """A tally in the making: blocks of frames of some recordings are added in their order."""

    def __init__(self, of: Judged, rules: Mapping[str, FittedRule], groups: Integers) -> None:
        """`rules` over the members in their order, `groups` (n,) the recording of each frame that will come."""
        abstain = of.abstain
        A, M, C = of.answers, len(of.members), len(of.classes)
        numbers, self._where, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        self._rules = {name: declared(rule.abstaining) if abstain else rule for name, rule in rules.items()}
        self._rules[""] = WeightedMean((1.0,) * M, abstain=True) if abstain else declared(mean)
        piles, counts = np.empty(0, dtype=np.int64), 0
        self._pile = piles
        if get_metric(of.metric).of is Counts:
            piles, where = np.unique(of.places[numbers], return_inverse=True)
            self._pile, counts = where[self._where], len(piles)
        frame_by_frame = [name for name, each in METRICS.items() if each.of is Answers]
        shapes = {"confusion": (A, C, C), "bins": (A, 3, BINS), "clipped": (A,), "abstained": (A,), "both": (M, M)}
        shapes |= {"true": (C,), "some_right": (C,), "ties": ()}
        zeros: dict[str, Any] = {name: np.zeros(shapes[name], dtype=np.int64) for name in _ADDED}
        self._keep = excerpt.candidates(groups, M, C)
        self._groups, self._labels = groups, np.empty(len(self._keep), dtype=np.int64)
        # taken as a whole: what is kept of each block would lie in the way of the next one, as `singles` says
        self._kept = np.empty((M + len(rules), len(self._keep), C), dtype=np.float32)
        self.done, self._seconds = 0, 0.0  # frames, and time taken for them
        self._tally = Tally(
            of,
            numbers.astype(np.int64),
            sizes.astype(np.int64),
            {name: np.zeros((A, len(numbers))) for name in frame_by_frame},
            piles.astype(np.int64),
            np.zeros((A, counts, 3, C), dtype=np.int64),
            **zeros,
            kept=np.empty((0, 3), dtype=np.int64),
            kept_keys=np.empty(0),
            kept_logs=np.empty((M, 0, C), dtype=np.float32),
            kept_rows=np.empty((len(rules), 0, C), dtype=np.float32),
        )

    def add(self, logs: Tensor, labels: Tensor, use: slice = slice(None), probabilities: Tensor | None = None) -> None:
        """Add the next frames: of (M, b, C) log-probabilities, in one piece, those that are to be used; their labels.

        The rules are applied to all b: to the last bit, what they answer may depend on the place in a block. So
        blocks are `block_size` frames, counted from the first of the whole.

        Raises:
            ValueError: the rows of a rule are not distributions.
        """
        began, sums, truth = time.perf_counter(), self._tally, labels.numpy()
        probabilities = singles(logs).exp_() if probabilities is None else probabilities
        block = slice(self.done, self.done + len(truth))
        kept = slice(*np.searchsorted(self._keep, (block.start, block.stop)).tolist())
        keep = self._keep[kept] - block.start
        self._labels[kept] = truth[keep]
        used = probabilities[:, use]
        right = [self._answer(member, rows, truth, block) for member, rows in enumerate(used)]
        self._kept[: len(right), kept] = logs[:, use][:, torch.from_numpy(keep)].float().numpy()
        for index, (name, rule) in enumerate(self._rules.items(), start=len(right)):
            rows = rule.of_logs(logs.float()) if rule.logarithmic else rule(probabilities)
            rows = numbers(rows, f"rows from rule {name!r}").detach().cpu()
            if rows.shape != probabilities.shape[1:]:
                wanted, came = tuple(probabilities.shape[1:]), tuple(rows.shape)
                msg = f"expected rows of shape {wanted} from rule {name!r}, got {came}"
                raise ValueError(msg)
            off = ~((rows.sum(dim=1) - 1).abs() <= _TOLERANCE)
            if name and off.any():
                msg = f"expected rows that sum to one from rule {name!r}, got a sum of {float(rows[off][0].sum()):.6g}"
                raise ValueError(msg)
            rows = rows[use]
            self._answer(index, rows, truth, block)
            if name:
                self._kept[index, kept] = rows.numpy()[keep]
        sums.both[:] += Joint.of(right).both.astype(np.int64)
        sums.true[:] += np.bincount(truth, minlength=len(sums.true))
        sums.some_right[:] += np.bincount(truth[np.any(right, axis=0)], minlength=len(sums.true))
        sums.ties[...] += round(tie_rate(used) * len(truth))
        self.done = block.stop
        self._seconds += time.perf_counter() - began

    def _answer(self, index: int, rows: Tensor, labels: Integers, block: slice) -> NDArray[np.bool_]:
        """Add one answer's (b, C) rows for a block of frames; returns (b,) where it is right."""
        sums, classes, where = self._tally, rows.shape[1], self._where[block]
        guesses = rows.numpy().argmax(axis=1)  # NumPy's is five times as fast as torch's max
        confidence = rows.gather(1, torch.from_numpy(guesses)[:, None])[:, 0].double().numpy()
        answered = ~np.isnan(confidence)  # the largest of a row with NaN is NaN
        correct: NDArray[np.bool_] = (labels == guesses) & answered
        known = rows.numpy() if answered.all() else np.where(answered[:, None], rows.numpy(), 1 / classes)
        answers = Answers(known, labels, np.where(answered, guesses, -1))
        cells = np.bincount((labels * classes + guesses)[answered], minlength=classes**2)
        sums.confusion[index] += cells.reshape(classes, classes)
        for name, row in sums.sums.items():  # one frame after another, so that blocks change no bit
            np.add.at(row[index], where, np.asarray(METRICS[name].function(answers), dtype=np.float64))
        if sums.counts.size:
            flat, place = sums.counts[index].reshape(-1), self._pile[block] * 3 * classes
            for line, (chosen, column) in enumerate(answers.by_class):
                np.add.at(flat, (place + line * classes + column)[chosen], 1)
        bins = bin_sums(confidence[answered], correct[answered], unit=2.0**-30)
        sums.bins[index] += np.rint(bins * _UNITS).astype(np.int64)
        sums.clipped[index] += int((answers.true_class < LEAST).sum())
        sums.abstained[index] += int((~answered).sum())
        return correct

    def tally(self) -> Tally:
        """What was counted, once all frames are there."""
        assert self.done == len(self._where)
        if not self.done:
            return self._tally
        groups, places = self._groups[self._keep], excerpt.places_in_time(self._groups)[self._keep]
        by, M = np.lexsort((places, groups)), len(self._tally.of.members)
        values = self._kept[:, by]
        return replace(
            self._tally,
            kept=np.stack([groups, places, self._labels], axis=1)[by],
            kept_keys=excerpt.sampling_keys(self._groups)[self._keep][by],
            kept_logs=values[:M],
            kept_rows=values[M:],
            seconds=self._seconds,
        )


def expect_rules(given: object) -> None:
    """A `TypeError` for what is no mapping from names to rules."""
    if not isinstance(given, Mapping):
        msg = f"expected rules as a mapping from their names, got {type(given).__name__}: {given!r:.60}"
        raise TypeError(msg)


def tally(outputs: MemberOutputs, rules: Mapping[str, Rule], metric: Metric | str = "accuracy") -> Tally:
    """Add up the sums, of rules over the members that they name; the uniform mean is always the last answer.

    What is needed to resample `metric` is kept, beside the means over frames, which always are.

    Raises:
        ValueError: no labels; NaN that is not declared; a rule that needs a missing member, or whose rows are not
            distributions.
    """
    labels, (members, frames, classes) = outputs.require_labels(), outputs.shape
    assert outputs.groups is not None  # MemberOutputs fills them in
    distinct, groups = np.unique(outputs.groups.numpy(), return_inverse=True)
    name = metric if isinstance(metric, str) else metric.name
    known = outputs.members, outputs.classes, tuple(rules), name, frames, len(distinct), outputs.fingerprint
    of = Judged(*known, outputs.about, outputs.abstain)
    counting = Counting(of, aligned(rules, outputs.members), groups)
    for block, rows in outputs.blocks(block_size(members, classes), nan="if declared"):
        counting.add(singles(outputs.log_probabilities[:, block]), labels[block], probabilities=rows)
    return counting.tally()


def block_size(members: int, classes: int) -> int:
    """Number of frames that are processed at once, a power of two."""
    return int(min(_BLOCK, 1 << max(1, _CELLS // (members * classes)).bit_length() - 1))


def aligned(rules: Mapping[str, Rule], members: Sequence[str]) -> dict[str, FittedRule]:
    """The rules over these members in this order; a `ValueError` that names the rule where one needs another member."""
    found = {}
    for name, rule in rules.items():
        try:
            found[name] = rule_for(rule, tuple(members))
        except ValueError as error:
            msg = f"rule {name!r}: {error}"
            raise ValueError(msg) from error
    return found


def best(sums: Tally, answers: Iterable[int]) -> int:
    """Index of the best of some answers by the metric; equal ones by log-loss, or accuracy; then by their order."""
    second = METRICS["accuracy" if sums.metric.name == "log_loss" else "log_loss"]
    order = [metric.goods(sums.values(metric)) for metric in (sums.metric, second)]
    return max(answers, key=lambda index: (order[0][index], order[1][index]))


def best_member(outputs: MemberOutputs, metric: str = "accuracy") -> str:
    """The best member by a metric; of equals the one with the lower log-loss, or the more accurate one; then the first.

    A `ValueError` without labels, for an unknown metric, or where a member gives NaN that is not declared.
    """
    expect_outputs(outputs)
    return outputs.members[best(tally(outputs, {}, get_metric(metric)), range(len(outputs.members)))]


def scores(
    sums: Tally, rules: Iterable[FittedRule], parameters: Mapping[str, int], costs: Mapping[str, Cost]
) -> pd.DataFrame:
    """One row per member, then one per rule, which counts parameters and bytes of the members that can influence it.

    `parameters` stand in place of those that are known of the members. The uniform mean, which is only a yardstick, has
    none.
    """
    used = [None if rule.used is None else list(rule.used) for rule in rules]

    def with_sums(known: Sequence[int | None]) -> pd.Series[int]:
        """Of the members, then of each rule; missing where a member's is."""
        own: pd.Series[int] = pd.Series([*known], dtype="Int64")
        sums = [(own if some is None else own.iloc[some]).sum(skipna=False) for some in used]
        return pd.Series([*own, *sums], dtype="Int64")

    names = [*sums.of.members, *sums.of.rules]
    measured = [costs.get(name, Cost(math.nan)) for name in names]
    sizes = zip(sums.of.members, sums.of.about, strict=True)
    frame_by_frame, by_class = (
        {name: sums.values(metric)[:-1] for name, metric in METRICS.items() if metric.of is kind}
        for kind in (Answers, Counts)
    )
    table = {
        "name": names,
        **frame_by_frame,
        "calibration_error": sums.calibration_errors()[:-1],
        **by_class,
        "parameters": with_sums([parameters.get(name, about.parameters) for name, about in sizes]),
        "bytes": with_sums([about.size for about in sums.of.about]),
        "microseconds": [cost.microseconds for cost in measured],
        "memory": pd.Series([cost.memory for cost in measured], dtype="Int64"),
        "abstained": sums.abstained[:-1],
    }
    return pd.DataFrame(table)


def gains(sums: Tally, judged: Sequence[int], *, baseline: int, replicates: int, seed: int) -> pd.DataFrame:
    """The gains of some answers with the ends of their intervals, all from one resampling of recordings.

    `baseline` is the index of the member that gains are measured against.
    """
    if len(judged) > _TOGETHER:  # equal seeds, equal resamples
        pieces = [judged[start : start + _TOGETHER] for start in range(0, len(judged), _TOGETHER)]
        each = [gains(sums, piece, baseline=baseline, replicates=replicates, seed=seed) for piece in pieces]
        return pd.concat(each, ignore_index=True)
    answers = np.array([baseline, sums.of.answers - 1, *judged])
    both = (sums.metric, METRICS["log_loss"])
    resampled = sums.resampled(both, answers, replicates=replicates, seed=seed)
    columns: dict[str, Floats] = {}
    for name, which, other in (("gain", 0, 0), ("mean_gain", 0, 1), ("loss_gain", 1, 0)):
        whole, drawn = both[which].goods(sums.values(both[which])[answers]), resampled[which]
        columns[name] = whole[2:] - whole[other]
        columns[f"{name}_low"], columns[f"{name}_high"] = percentile_ends(drawn[:, 2:] - drawn[:, [other]])
    return pd.DataFrame(columns)


def linear_weights(members: Sequence[str], rules: Mapping[str, FittedRule]) -> dict[str, dict[str, float]]:
    """Rule -> member -> weight, of the rules that are weighted means."""
    found = {}
    for name, rule in rules.items():
        inner, places = (rule.of, rule.places) if isinstance(rule, Among) else (rule, range(len(members)))
        if isinstance(inner, WeightedMean):
            weights = dict(zip(places, inner.weights, strict=True))
            found[name] = {member: weights.get(place, 0.0) for place, member in enumerate(members)}
    return found


def pairs(members: Sequence[str], joint: Joint) -> pd.DataFrame:
    """One row per pair of members, one column per pairwise measure."""
    first, second = np.triu_indices(len(members), k=1)
    names = np.array(members, dtype=object)
    measured = {name: measure(joint)[first, second] for name, measure in PAIR_MEASURES.items()}
    return pd.DataFrame({"first": names[first], "second": names[second]} | measured)


def by_class(sums: Tally, *, baseline: int, judged: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per class, and for each class up to three rows of what it is most often taken for.

    Accuracies and shares are fractions of the class's own frames, NaN for a class without any. `baseline` is the index
    of the best single member, `judged` that of the answer whose mistakes are counted.
    """
    names, members = (np.array(each, dtype=object) for each in (sums.of.classes, sums.of.members))
    frames = sums.true
    confusion, before, own = sums.confusion[judged], sums.confusion[baseline], sums.confusion[: len(members)]
    wrong = confusion - np.diag(np.diagonal(confusion))
    # over all frames of the class, so that neither predicting a class everywhere nor abstaining pays
    f1 = 2 * np.diagonal(own, axis1=1, axis2=2) / np.maximum(own.sum(axis=1) + frames, 1)  # (M, C)
    confused = np.where(wrong.any(axis=1), names[wrong.argmax(axis=1)], None)
    trust = np.where(frames > 0, members[f1.argmax(axis=0)], None)
    with np.errstate(invalid="ignore"):
        table = {
            "name": names,
            "frames": frames,
            "baseline_accuracy": np.diagonal(before) / frames,
            "rule_accuracy": np.diagonal(confusion) / frames,
            "oracle": sums.some_right / frames,
            "confused_with": pd.Series(confused, dtype=object),  # otherwise None becomes NaN
            "confused_share": wrong.max(axis=1) / frames,
            "trust": pd.Series(trust, dtype=object),
            "trust_f1": np.where(frames > 0, f1.max(axis=0), np.nan),
        }
    order = np.argsort(-wrong, axis=1, kind="stable")[:, :3]  # the three most frequent
    true, rank = np.nonzero(np.take_along_axis(wrong, order, axis=1))
    taken = order[true, rank]
    mistakes = {
        "name": names[true],
        "taken_for": names[taken],
        "frames": wrong[true, taken],
        "share": wrong[true, taken] / frames[true],
        "baseline_share": before[true, taken] / frames[true],
    }
    return pd.DataFrame(table), pd.DataFrame(mistakes)


def reliability(sums: Tally) -> pd.DataFrame:
    """The bins behind each calibration error; NaN in a bin without frames."""
    names = [*sums.of.members, *sums.of.rules]
    frames, confidence, right = ((sums.bins / _UNITS)[: len(names), row].ravel() for row in range(3))
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "name": np.repeat(np.array(names, dtype=object), BINS),
                "low": np.tile(np.arange(BINS) / BINS, len(names)),
                "high": np.tile(np.arange(1, BINS + 1) / BINS, len(names)),
                "frames": frames.astype(np.int64),
                "confidence": confidence / frames,
                "accuracy": right / frames,
            }
        )


def trained_on(fingerprints: Iterable[str], of: MemberOutputs | Judged) -> str:
    """The members that were trained on some of these frames."""
    known = {fingerprint for fingerprint in fingerprints if fingerprint}
    pairs = zip(of.members, of.about, strict=True)
    return ", ".join(name for name, about in pairs if about.trained_on in known)


def provenance(of: MemberOutputs | Judged, rules: Mapping[str, FittedRule]) -> Iterator[str]:
    """What makes figures too good: the frames that rules were fitted on, and members trained on."""
    for name, rule in rules.items():
        if of.fingerprint in rule.fingerprints:
            yield f"{name} was fitted on these frames: its figures are optimistic"
        if members := trained_on(rule.fingerprints, of):
            yield f"{name} was fitted on training frames of {members}, which it therefore trusts too much"
        if "" in rule.fingerprints:
            yield f"{name} has numbers of unknown origin: if they were fitted here, its figures are optimistic"
    if members := trained_on([of.fingerprint], of):
        yield f"these frames are training frames of {members}: their figures and those of all rules are optimistic"
