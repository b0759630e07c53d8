"""`measure_costs`: the time and the memory that each member and each rule needs on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo
from ensemble.outputs import Cost
from ensemble.rules.fitted import rule_for
from ensemble.rules.table import FittedRule, Rule
from ensemble.run._engine.batch import take_rows
from ensemble.run.collection import Inputs, answers, count_inputs, feed_of, inputs_of
from ensemble.run.members import Members
from zoo._names import checked
from zoo.logs import Progress, silent


@checked
def measure_costs(
    members: Members,
    x: Inputs,
    rules: Mapping[str, Rule] | None = None,
    *,
    repeats: int = 5,
    progress: Progress | None = None,
) -> dict[str, Cost]:
    """Name -> what the member, or the rule with the members it uses, costs on this machine.

    What is compared is run in turn, again and again, so that a machine that slows down meanwhile slows down all alike:
    each time is the median of its share of a round, of the median duration of a round. Members of equal structure run
    as one and cost the same: one of them is measured by itself, and all of them together.

    Args:
        members: M models, on their device, in their precision.
        x: frames or inputs as for `collect`, at least one; the first ones are used, as many as the members run at a
            time.
        rules: name -> rule to measure, such as those given to `evaluate`.
        repeats: number of rounds.
        progress: shows how many rounds are done.

    Returns:
        A `Cost` for each member and each rule. A member's `microseconds` are per frame what it adds to the run of
        another one of its kind, `alone` what it takes by itself. A rule's are from frames to its rows, `alone` without
        the members; a cascade runs the members that it asks, and its `alone` is NaN. `memory` is what torch holds at
        most beside weights and inputs; None with a member outside torch.

    Raises:
        ValueError: no frames, no rounds, a rule with the name of a member, or as `collect`.

    Example:
        >>> from ensemble import from_modules, mean
        >>> members = from_modules({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2)}, classes=["no", "yes"])
        >>> costs = measure_costs(members, torch.zeros(5, 3), {"mean": mean})
        >>> [*costs], costs["a"].microseconds <= costs["a"].alone
        (['a', 'b', 'mean'], True)
    """
    wanted, x = dict(rules or {}), inputs_of(members, x)
    frames = min(count_inputs(x), members.step)
    if not frames or repeats < 1:
        msg = f"expected at least one frame and one round to measure, got {frames} and {repeats}"
        raise ValueError(msg)
    if taken := [name for name in wanted if name in members.names]:
        msg = f"expected names for rules that no member has, got {taken}"
        raise ValueError(msg)
    kinds = [[members.names[place] for place in places] for _, places in members.groups]
    runs: dict[tuple[str, ...], _Run] = {}

    def run_of(names: Sequence[str]) -> _Run:
        if (key := tuple(names)) not in runs:
            runs[key] = _Run.of(members if key == members.names else members.subset(key), x, frames)
        return runs[key]

    for names in kinds:
        run_of(names[:1])
        run_of(names)
    users: dict[str, tuple[str, ...]] = {}
    for name, rule in wanted.items():
        whole = rule_for(rule, members.names)
        if whole.sparing:
            users[name] = (name,)  # a key of its own: which members run about which frames is up to the rule
            runs[name,] = _Run.sparing(members, x, frames, whole)
            continue
        used = range(len(members)) if whole.used is None else whole.used
        users[name] = tuple(members.names[place] for place in used)
        run_of(users[name]).rules[name] = whole if whole.used is None else whole.restricted(whole.used)
    seconds = _measured([*runs.values()], repeats, progress or silent)
    per_frame = {key: each * 1e6 / runs[key].frames for key, each in zip(runs, seconds, strict=True)}
    found: dict[str, Cost] = {}
    for number, names in enumerate(kinds):
        one, all_of_them = float(per_frame[tuple(names[:1])][0]), float(per_frame[tuple(names)][0])
        more = one if len(names) == 1 else min(max((all_of_them - one) / (len(names) - 1), 0.0), one)
        memory = runs[tuple(names[:1])].memory()
        found |= dict.fromkeys(names, Cost(more, one, memory, number))
    ordered = {name: found[name] for name in members.names}
    for name, key in users.items():
        run, times = runs[key], per_frame[key].tolist()
        own = times[1 + [*run.rules].index(name)] if name in run.rules else math.nan
        ordered[name] = Cost(times[0] + np.nan_to_num(own), own, run.memory(run.rules.get(name)))
    return ordered


@dataclass(eq=False)
class _Run:
    """Some members over the frames, and the rules that use exactly these."""

    values: Callable[[], list[Tensor]]  # the members' log-probabilities, piece by piece
    frames: int
    members: Members
    rules: dict[str, FittedRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values()  # what is decided before the first frames have run is decided here

    @classmethod
    def of(cls, members: Members, x: Inputs, frames: int) -> _Run:
        """A run of all these members."""
        feed = feed_of(members, inputs_of(members, x))
        return cls(lambda: [values for _, values in feed(0, frames)], frames, members)

    @classmethod
    def sparing(cls, members: Members, x: Inputs, frames: int, rule: FittedRule) -> _Run:
        """A run of a rule that asks some members about some frames, which are whole recordings here."""
        if isinstance(x, zoo.FrameSet):
            x = x.select(torch.arange(int((x.starts[:-1] < frames).sum())))
        elif not isinstance(x, Mapping):
            x = take_rows(x, slice(0, frames))
        return cls(lambda: [rows for rows, _ in answers(members, x, rule)], count_inputs(x), members)

    def seconds(self) -> list[float]:
        """Of the members, then of each rule."""
        values, duration = self._timed(self.values)
        durations = [duration]
        for rule in self.rules.values():
            _, own = self._timed(partial(_combined, rule, values))
            durations.append(own)
        return durations

    def _timed(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], float]:
        self._finish()
        began = time.perf_counter()
        result = work()
        self._finish()
        return result, time.perf_counter() - began

    def _finish(self) -> None:
        if self.members.device.type == "cuda":
            torch.cuda.synchronize(self.members.device)

    def memory(self, rule: FittedRule | None = None) -> int | None:
        """Most bytes that torch holds at a time for these members, and for a rule, beside what it held before."""
        if any(member.outside for member in self.members):
            return None

        def work() -> None:
            for values in self.values():
                if rule is not None:
                    rule.of_logs(values)

        if (device := self.members.device).type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            work()
            return torch.cuda.max_memory_allocated(device) - before
        held = _Held()
        with held:
            work()
        return held.most


class _Held(TorchDispatchMode):
    """The bytes of the tensors that operations make, as long as something holds them, and their maximum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what is alive."""
        given = {storage.cdata for storage, _ in map(_storage, tree_leaves((args, kwargs))) if storage}
        result = func(*args, **(kwargs or {}))
        made = [(storage, size) for storage, size in map(_storage, tree_leaves(result)) if storage]
        self._made = {place: held for place, held in self._made.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
        self._made |= {storage.cdata: (storage, size) for storage, size in made if storage.cdata not in given}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result


def _combined(rule: FittedRule, values: Sequence[Tensor]) -> list[Tensor]:
    """The rule's rows, piece by piece."""
    return [rule.of_logs(each) for each in values]


def _storage(value: object) -> tuple[StorageWeakRef | None, int]:
    """The memory of a dense tensor, and its bytes; None for anything else."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        return None, 0
    storage = value.untyped_storage()
    return StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]


def _measured(runs: Sequence[_Run], repeats: int, progress: Progress) -> list[NDArray[np.float64]]:
    """For each run the seconds of its members, then of each of its rules; see `measure_costs`."""
    rounds = []
    with progress("measuring costs", total=repeats) as advance:
        for number in range(repeats):
            found: dict[int, list[float]] = {}
            for place in np.roll(np.arange(len(runs)), -number).tolist():  # none is always the one after another
                found[place] = runs[place].seconds()
            rounds.append(np.concatenate([found[place] for place in range(len(runs))]))
            advance()
    table = np.stack(rounds)  # (repeats, all times of a round)
    durations = table.sum(axis=1, keepdims=True)
    typical = np.median(table / durations, axis=0) * np.median(durations)
    return np.split(typical, np.cumsum([1 + len(run.rules) for run in runs])[:-1])
