"""`Cascade`: a rule that asks members one after the other, and about each frame no more of them than it has to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ensemble.rules.table import Ask, FittedRule, Rule, Sums, declared, fitted_rule, members_first, take_over

_STAGES = 8  # of an exact cascade after the first: more of them would ask fewer members, in smaller batches


@fitted_rule
@dataclass(frozen=True)
class Cascade(FittedRule):
    """Ask the members in stages, and after each stage only about the frames whose class is not settled.

    Without a threshold it is exact: a class is settled when the members that are left cannot change it, whatever they
    say. So it is the class of the rule over all members, on every frame; where its lead is within rounding, all members
    are asked. With a threshold, a class is settled when it leads by more than that in the rule over the members asked
    so far: fewer are asked, and some classes change. `fit_cascade` finds the threshold for a loss of accuracy.

    The probabilities are those of the rule over the members that were asked. An `Ensemble` with this rule runs only
    those; outputs that are there already can be judged with it.

    Args:
        of: the rule over all members. Exact cascades take `mean`, `majority`, `WeightedMean`, `BayesVote`, each also
            with a temperature after it, and rules of your own that declare their `sums`.
        order: positions of the members in the order in which they are asked, all that have influence; () is by weight,
            the largest first, and of equal weights as they come.
        threshold: from 0 to 1, between the probabilities of the two most probable classes; None is exact.

    Raises:
        ValueError: an exact cascade of a rule whose class can depend on every member to the last; a threshold outside 0
            to 1, or an order that is none.

    References:
        Hernandez-Lobato, Martinez-Munoz, Suarez, "Statistical instance-based pruning in ensembles of independent
        classifiers", IEEE TPAMI 31(2), 2009. Wang et al., "Wisdom of committees", ICLR 2022.

    Example:
        >>> from ensemble import majority
        >>> Cascade(majority)(torch.tensor([[[0.9, 0.1]], [[0.7, 0.3]], [[0.2, 0.8]]]))  # two votes of three decide
        tensor([[0.9333, 0.0667]])
    """

    of: Rule
    order: tuple[int, ...] = ()
    threshold: float | None = None
    fingerprint: str = ""
    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fingerprint, members, order = self.fingerprint, tuple(self.members), tuple(self.order)
        take_over(self, (self.of,))
        if self.members and members not in ((), self.members):
            msg = f"expected the members of the rule in its order, {list(self.members)}, got {list(members)}"
            raise ValueError(msg)
        if any(not isinstance(place, int | np.integer) or place < 0 for place in order) or len(set(order)) < len(order):
            msg = f"expected the order of the members as distinct positions, got {list(order)}"
            raise ValueError(msg)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            msg = f"expected a threshold from 0 to 1, or None for an exact cascade, got {self.threshold}"
            raise ValueError(msg)
        self.put(
            order=tuple(map(int, order)), members=self.members or members, fingerprint=fingerprint or self.fingerprint
        )
        if self.threshold is None:
            self._sums(self.count or len(self.members) or 1)

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        result = self._known(members_first(probabilities), logs=False)
        return cast(Tensor, result.numpy()) if isinstance(probabilities, np.ndarray) else result

    def of_logs(self, logs: Tensor, /) -> Tensor:
        """Combine (M, N, C) log-probabilities into (N, C) probabilities."""
        return self._known(logs, logs=True)

    def log_scores(self, logs: Tensor, /) -> Tensor:
        """The logarithms of those."""
        return self.of_logs(logs).log()

    def _known(self, given: Tensor, *, logs: bool) -> Tensor:
        """(N, C) of answers that are there; where all are asked, the very bits of the rule over all frames at once."""
        rows, counts = self._ask(known(given), len(given), logs=logs)
        whole, all_asked = declared(self.of), counts == len(self.asked_in(len(given)))
        return torch.where(all_asked.to(rows.device)[:, None], whole.of_logs(given) if logs else whole(given), rows)

    def ask(self, answers: Ask, members: int, *, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
        """Combine what the members answer that are asked; see `FittedRule.ask`."""
        return self._ask(answers, members, logs=True, tolerance=tolerance)

    def _ask(self, answers: Ask, members: int, *, logs: bool, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
        """`ask`, where the answers are log-probabilities, or probabilities."""
        order = self.asked_in(members)
        lead = _Lead(self._sums(members), order, tolerance) if self.threshold is None else None
        out, counts, left, found, before = torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0), 0
        for places, rule in self.stages(members):
            fresh = answers(order[before : len(places)], left if before else None)
            found = torch.cat([found, fresh]) if before else fresh  # (m, n, C), in the order asked
            left = left if before else torch.arange(found.shape[1])
            settled = torch.ones(len(left), dtype=torch.bool)
            if lead is not None and len(places) < len(order):
                lead.add(order[before : len(places)], fresh.exp() if logs else fresh)
                settled = lead.decides(order[len(places) :])
            combined = found if lead is None else found[:, settled.to(found.device)]
            combined = combined[[order.index(place) for place in places]]
            rows = rule.of_logs(combined) if logs else rule(combined)
            if lead is None and len(places) < len(order):
                settled = margin(rows) > cast(float, self.threshold)
                rows = rows[settled]
            if not before:
                out, counts = rows.new_empty(len(left), rows.shape[-1]), torch.empty(len(left), dtype=torch.int64)
            settled, before = settled.cpu(), len(places)
            out[left[settled]], counts[left[settled]] = rows, before
            left, rest = left[~settled], (~settled).nonzero().flatten().to(found.device)
            if not len(left):
                break
            found = found[:, rest]
            if lead is not None:
                lead.keep(rest)
        return out, counts

    def asked_in(self, members: int) -> list[int]:
        """Positions of the members that have influence, among so many, in the order in which they are asked.

        A `ValueError` where the rule is one of another number of members, or the order leaves some out.
        """
        rule = declared(self.of)
        if rule.count not in (None, members):
            msg = f"expected probabilities of {rule.count} members, as many as the rule has, got {members}"
            raise ValueError(msg)
        used = list(range(members) if rule.used is None else rule.used)
        if self.order and sorted(self.order) != used:
            msg = f"expected an order of the members at {used}, got {list(self.order)}"
            raise ValueError(msg)
        sums = rule.sums(members)
        if self.order or sums is None:
            return list(self.order) or used
        largest = sums.largest.tolist()
        return sorted(used, key=lambda place: -largest[place])

    def stages(self, members: int) -> list[tuple[list[int], FittedRule]]:
        """For each stage, of so many members: the positions, ascending, of those asked by its end; the rule over them.

        An exact cascade begins with those without which nothing can be settled, another one with a single member; it
        then doubles their number.
        """
        order = self.asked_in(members)
        if self.threshold is not None:
            counts = [1 << power for power in range((len(order) - 1).bit_length())]
        else:
            largest = self._sums(members).largest[order]
            first = int((2 * largest.cumsum(0) <= largest.sum()).sum()) + 1
            counts = [*range(first, len(order), max(1, math.ceil((len(order) - first) / _STAGES)))]
        asked = [sorted(order[:count]) for count in (*counts, len(order))]
        return [(places, declared(_restricted(self.of, places))) for places in asked]

    def _sums(self, members: int) -> Sums:
        """Those of the rule, which an exact cascade needs."""
        sums = declared(self.of).sums(members)
        if sums is None:
            wanted = "a rule whose class is a largest sum over members, such as mean or majority"
            msg = f"expected {wanted}, got {declared(self.of).title}: "
            remedy = "give a threshold, as fit_cascade finds it, or --cascade 0.001"
            raise ValueError(f"{msg}any member can change its class to the last; {remedy}")
        return sums

    @property
    def logarithmic(self) -> bool:
        """As the rule over all members."""
        return declared(self.of).logarithmic

    @property
    def count(self) -> int | None:
        """As the rule over all members."""
        return declared(self.of).count

    @property
    def used(self) -> tuple[int, ...] | None:
        """As the rule over all members."""
        return declared(self.of).used

    @property
    def sparing(self) -> bool:
        """It is."""
        return True

    @property
    def continuous(self) -> bool:
        """Its probabilities are of other members where the lead is a little larger."""
        return False

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Those of the rule over all members, and that of the frames that the threshold was fitted on."""
        own = () if self.threshold is None else (self.fingerprint,)
        return tuple(dict.fromkeys((*declared(self.of).fingerprints, *own)))

    @property
    def abstaining(self) -> Cascade:
        """The cascade of the rule for members that may abstain."""
        return replace(self, of=declared(self.of).abstaining)

    def restricted(self, positions: Sequence[int]) -> Cascade:
        """The cascade of the rule over these members, in the same order."""
        order = [list(positions).index(place) for place in self.order if place in positions]
        return replace(self, of=_restricted(self.of, positions), order=tuple(order), members=())


class _Lead:
    """By how much a class leads every other one in the sums over the members asked so far."""

    def __init__(self, sums: Sums, order: Sequence[int], tolerance: float) -> None:
        self.sums, self.tolerance, self.members = sums, tolerance, len(order)
        self.largest = sums.largest
        self.reach = float(self.largest[list(order)].sum())
        self.totals = self.doubt = torch.empty(0)

    def add(self, positions: Sequence[int], rows: Tensor) -> None:
        """The next members' (m, n, C) probabilities."""
        if not len(self.totals):
            start = torch.as_tensor(self.sums.start, dtype=torch.float64).to(rows.device)
            self.totals = start.expand(rows.shape[1:]).clone()
            self.doubt = self.totals.new_zeros(len(self.totals))
        rounding = 4 * (self.members + 4) * max(torch.finfo(torch.float32).eps, torch.finfo(rows.dtype).eps)
        self.slack = self.sums.stretch * self.reach * (4 * self.tolerance + rounding)
        for position, row in zip(positions, rows, strict=True):
            self.totals += self.sums.add(position, row)
            if self.sums.votes:  # another way of running the member might choose another class
                near = row >= row.amax(dim=-1, keepdim=True) - 4 * self.tolerance
                self.doubt += 2 * float(self.largest[position]) * (near.sum(dim=-1) > 1)

    def decides(self, rest: Sequence[int]) -> Tensor:
        """(n,) bool: where it is more than the members that are left can make up for."""
        classes = self.totals.shape[-1]
        swing = self.sums.swings[list(rest)].sum(dim=0).to(self.totals.device).expand(classes, classes)
        first = self.totals.argmax(dim=-1, keepdim=True)  # (n, 1)
        lead = self.totals.gather(-1, first) - self.totals - swing[first.squeeze(-1)]
        return lead.scatter_(-1, first, torch.inf).amin(dim=-1) > self.slack + self.doubt

    def keep(self, which: Tensor) -> None:
        """Go on with some of the frames."""
        self.totals, self.doubt = self.totals[which], self.doubt[which]


def _restricted(rule: Rule, positions: Sequence[int]) -> Rule:
    """A rule over some of its members; a function, which knows no members, is one over any."""
    return declared(rule).restricted(positions) if declared(rule).has_numbers else rule


def known(rows: Tensor) -> Ask:
    """Answers that are there already, (M, N, C)."""

    def answers(positions: Sequence[int], frames: Tensor | None) -> Tensor:
        some = rows[list(positions)]
        return some if frames is None else some[:, frames]

    return answers


def margin(rows: Tensor) -> Tensor:
    """(N,): between the two most probable classes of each row."""
    best = rows.topk(min(2, rows.shape[-1]), dim=-1).values
    return best[:, 0] - best[:, 1] if rows.shape[-1] > 1 else best[:, 0]
