"""The frames that a report keeps, with what members and rules answer there: a sample of all, and whole recordings.

Which frames these are follows from the recordings' numbers and the places of frames in their recordings, never from
the order in which recordings come: parts of a corpus that are judged apart keep the frames that the whole would keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensemble.outputs import MemberOutputs
from ensemble.rules.table import FittedRule, declared

Integers = NDArray[np.int64]

_SAMPLE, _FEWEST, _ANSWERS, _CELLS = 3_000, 500, 2**16, 2**24  # frames; frames; frames x members; x classes
_WHOLE = 1_600  # frames of whole recordings


@dataclass(frozen=True, eq=False)
class Excerpt:
    """Some of the judged frames: what the members say there, and what the rules make of it."""

    outputs: MemberOutputs  #: of the members, recording by recording in the order of the judged frames
    rules: dict[str, Tensor]  #: rule -> its (N, C) rows on these frames


def sample(outputs: MemberOutputs, rules: Mapping[str, FittedRule]) -> Excerpt:
    """At most 3,000 frames, from every recording in proportion to its length; fewer for more than 21 members."""
    M, _, C = outputs.shape
    size = min(_SAMPLE, max(_FEWEST, _ANSWERS // M), max(1, _CELLS // (M * C)))
    keys = sampling_keys(_groups(outputs))
    return _excerpt(outputs, rules, np.sort(np.argsort(keys, kind="stable")[:size]))


def recordings(outputs: MemberOutputs, rules: Mapping[str, FittedRule]) -> Excerpt:
    """Some recordings as a whole, chosen by a hash of their numbers: at most 1,600 frames, the start of a longer one.

    Recordings of one frame each, which is what outputs without recordings have, show no course of time: none is kept.
    """
    groups = _groups(outputs)
    numbers, where, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(_hash(numbers), kind="stable")
    order = order[sizes[order] > 1]
    chosen = order[: max(1, int((np.cumsum(sizes[order]) <= _WHOLE).sum()))]
    frames = np.flatnonzero(np.isin(where, chosen))
    return _excerpt(outputs, rules, frames[np.argsort(where[frames], kind="stable")][:_WHOLE])


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
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(groups), dtype=np.int64)
    order = np.argsort(where, kind="stable")
    rank[order] = np.arange(len(groups)) - starts[where[order]]  # place in time
    order = np.lexsort((_hash(_hash(groups) + rank.astype(np.uint64)), where))
    rank[order] = np.arange(len(groups)) - starts[where[order]]  # place by hash
    u = (_hash(numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54
    return np.asarray((rank + u[where]) / sizes[where])


def _hash(numbers: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 bits of each number, which look random: splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _groups(outputs: MemberOutputs) -> Integers:
    assert outputs.groups is not None  # MemberOutputs fills them in
    groups: Integers = outputs.groups.numpy()
    return groups


def _excerpt(outputs: MemberOutputs, rules: Mapping[str, FittedRule], frames: Integers) -> Excerpt:
    """The outputs at some frames, and the rules' rows there."""
    some = outputs.at(torch.from_numpy(frames))
    logs, rows = some.log_probabilities.float(), some.probabilities
    applied = {name: declared(rule.abstaining) if outputs.abstain else rule for name, rule in rules.items()}
    return Excerpt(
        some, {name: rule.of_logs(logs) if rule.logarithmic else rule(rows) for name, rule in applied.items()}
    )
