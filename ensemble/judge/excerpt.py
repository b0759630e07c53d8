"""The frames that a report keeps, with what members and rules answer there: a sample of all, and whole recordings.

Which frames these are follows from the recordings' numbers and the places of frames in their recordings, never from
the order in which recordings come: parts of a corpus that are judged apart keep the frames that the whole would keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensemble.outputs import LEAST, MemberOutputs

Integers = NDArray[np.int64]

_SAMPLE, _FEWEST, _ANSWERS, _CELLS = 2_500, 500, 2**16, 2**24  # frames; frames; frames x members; x classes
_WHOLE = 1_600  # frames of whole recordings

ZERO, ABSENT = 65_534, 65_535  # codes of a probability of `LEAST` or less, and of a member that abstains
FINEST = 0.5  # nats: codes are finest for probabilities above exp(-FINEST)
PER_LOG = (ZERO - 1) / math.log1p(-math.log(LEAST) / FINEST)


@dataclass(frozen=True, eq=False)
class Excerpt:
    """Some of the judged frames: what the members say there, and what the rules make of it."""

    outputs: MemberOutputs  #: of the members, recording by recording, each in time
    rules: dict[str, Tensor]  #: rule -> its (N, C) rows on these frames
    keys: NDArray[np.float64]  #: (N,) of these frames, as `sampling_keys` gives them among all frames

    def first(self, count: int) -> Excerpt:
        """The frames with the least keys, so many: of a sample, the sample of this size."""
        chosen = np.sort(np.argsort(self.keys, kind="stable")[:count])
        frames = torch.from_numpy(chosen)
        rules = {name: rows[frames] for name, rows in self.rules.items()}
        return Excerpt(self.outputs.at(frames), rules, self.keys[chosen])

    @property
    def recordings(self) -> tuple[Integers, Integers, Integers]:
        """The recordings' numbers in ascending order; of each frame, which of them it is from; their frames here."""
        assert self.outputs.groups is not None  # MemberOutputs fills them in
        numbers, where, sizes = np.unique(self.outputs.groups.numpy(), return_inverse=True, return_counts=True)
        return numbers, where.astype(np.int64), sizes.astype(np.int64)


def candidates(groups: Integers, members: int, classes: int) -> Integers:
    """The positions, ascending, of the frames that `sample` or `recordings` can choose once these are all there are.

    What is chosen of the frames of several parts is among the candidates of each.

    Args:
        groups: (N,) the number of each frame's recording; recordings are whole.
        members: M, and C classes: of many, fewer frames are kept.
    """
    numbers, where, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    keys, places = sampling_keys(groups), places_in_time(groups)
    return np.flatnonzero(sample(keys, groups, members, classes) | recordings(where, places, numbers, sizes))


def sample(keys: NDArray[np.float64], groups: Integers, members: int, classes: int) -> NDArray[np.bool_]:
    """Whether a frame is among 2,500, from every recording in proportion to its length; fewer for many members."""
    size = min(_SAMPLE, max(_FEWEST, _ANSWERS // members), max(1, _CELLS // (members * classes)))
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[np.lexsort((groups, keys))[:size]] = True
    return chosen


def recordings(where: Integers, places: Integers, numbers: Integers, sizes: Integers) -> NDArray[np.bool_]:
    """Whether a frame is in one of some whole recordings: at most 1,600 frames, the start of a longer one.

    Recordings of one frame each, which is what outputs without recordings have, show no course of time: none is kept.

    Args:
        where: (K,) the recording of a frame, as an index into those that there are, and its place in it, `places`.
        numbers: (R,) of the recordings that there are, by a hash of which they are chosen, and their lengths, `sizes`.
    """
    order = np.argsort(_hash(numbers), kind="stable")
    order = order[sizes[order] > 1]
    chosen = order[: max(1, int((np.cumsum(sizes[order]) <= _WHOLE).sum()))]
    return np.isin(where, chosen) & (places < _WHOLE)


def places_in_time(groups: Integers) -> Integers:
    """(N,) the place of each frame in its recording, from 0."""
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    places = np.empty(len(groups), dtype=np.int64)
    places[order] = np.arange(len(groups)) - np.repeat(starts, sizes)
    return places


def sampling_keys(groups: Integers) -> NDArray[np.float64]:
    """(N,) numbers above zero, of which the K smallest are a sample of K frames, stratified by recording.

    Of the n frames of a recording, in an order given by a hash, the one at place k has the key (k + u) / n; u, between
    0 and 1, is a hash of the recording's number. Any threshold is therefore below the keys of an equal share of each
    recording, to the frame, and the keys of one recording depend on no other: this is systematic sampling (Cochran,
    "Sampling techniques", 1977, chapter 8).

    Args:
        groups: (N,) the number of each frame's recording.
    """
    numbers, where, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    starts, rank = np.cumsum(sizes) - sizes, places_in_time(groups)
    order = np.lexsort((_hash(_hash(groups) + rank.astype(np.uint64)), where))
    rank[order] = np.arange(len(groups)) - starts[where[order]]  # place by hash
    u = (_hash(numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54
    return np.asarray((rank + u[where]) / sizes[where])


def encode(logs: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Log-probabilities as 16 bits, the higher the less probable; NaN, an abstention, as `ABSENT`.

    Steps are even in log(1 + nats / FINEST): .00004 nats from the next at a probability of one, .0003 at .05, .003 at
    `LEAST`, below which there is `ZERO`.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.round(PER_LOG * np.log1p(np.maximum(-logs.astype(np.float64), 0) / FINEST))
    return np.where(np.isnan(logs), ABSENT, np.minimum(np.nan_to_num(steps), ZERO)).astype(np.uint16)


def decode(codes: NDArray[np.uint16]) -> NDArray[np.float64]:
    """The log-probabilities that `encode` rounds to."""
    logs = -FINEST * np.expm1(codes / PER_LOG)
    return np.where(codes == ABSENT, np.nan, np.where(codes == ZERO, -np.inf, logs))


def _hash(numbers: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 bits of each number, which look random: splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
