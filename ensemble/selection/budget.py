"""The best subset of members within limits of its cost, by branch and bound; and the front of loss against cost.

Outputs, costs, limits and a metric go in; a `Selection` comes out. The law that proves it right: a relaxation (some
members chosen, some open, limits aside) is convex, so its certified bound holds for every subset between;
`Selection.bound` is the least bound of the parts that are open or were closed. A part is left out only where a `Limit`
is passed, and since no further member makes a total smaller, it is then passed by every subset of that part; so any
number of limits may hold at once. The tests compare all of it with brute force. Metrics of decisions, which are not
convex, are left to greedy picks within the limits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ensemble.fit._solver import at_least_zero, first_equal, labelled, refit, refuse_nan
from ensemble.fit._solver.newton import Numbers, Rows
from ensemble.fit.greedy import GreedySelection as GreedySelection
from ensemble.fit.greedy import greedy as greedy
from ensemble.fit.greedy import residual_products
from ensemble.fit.weights import explained_matrix, least_loss, least_quadratic, weights_in_words
from ensemble.judge.metrics import METRICS, get_metric
from ensemble.outputs import Cost, MemberOutputs, expect_outputs
from ensemble.rules.fitted import WeightedMean
from ensemble.rules.table import no_such
from zoo._notebook import Table, html

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
#: members (M,) that may take part and weights to start from -> best weights, their loss, a bound of all such weights'
Relaxation = Callable[[Mask, Array], tuple[Array, float, float]]


@dataclass(frozen=True, eq=False)
class Selection:
    """The members chosen, with their weights, and what is known of every other choice."""

    members: tuple[str, ...]  #: names with a positive weight, in the outputs' order
    weights: Array  #: (len(members),) non-negative, summing to one
    #: of their pool on the frames kept: log-loss in nats, Brier score, or one minus a metric of decisions
    loss: float
    bound: float  #: no subset within the limits has a loss below this, whatever its weights
    proven: bool  #: whether `loss - bound` is within the requested tolerance
    nodes: int  #: number of convex problems solved; 0 for decisions
    cost: float  #: number of parameters, or the sum of the costs that were given in their place; 0 if unknown
    fingerprint: str = ""  #: of the frames
    dropped: int = 0  #: frames left out because every member, chosen or not, gave the true class exactly zero
    metric: str = "log_loss"  #: that they were chosen by
    size: float = np.nan  #: bytes of their checkpoints; NaN if unknown
    microseconds: float = np.nan  #: per frame that they need together; NaN if it was not measured

    @property
    def value(self) -> float:
        """The metric that `loss` stands for: one minus it where more is better."""
        return 1 - self.loss if METRICS[self.metric].higher else self.loss

    @property
    def rule(self) -> WeightedMean:
        """The weighted mean of the members chosen."""
        return WeightedMean(tuple(self.weights.tolist()), self.fingerprint, members=self.members)

    @property
    def conclusion(self) -> str:
        """One sentence: whether it is proven that no other subset is better."""
        excess, proof = max(self.loss - self.bound, 0), "proven" if self.proven else "not proven"
        solved = f" ({self.nodes} problems solved)" if self.nodes else ""
        nats = METRICS[self.metric].nats
        return f"{proof}: no ensemble within the limits is better by more than {excess:.1e}{nats}{solved}"

    @property
    def totals(self) -> str:
        """What the members cost together and what they reach, in words."""
        parameters = f"{self.cost:,.0f} parameters, " if self.cost else ""
        size = "" if np.isnan(self.size) else f"{self.size:,.0f} bytes, "
        duration = "" if np.isnan(self.microseconds) else f"{self.microseconds:.2f} microseconds per frame, "
        return parameters + size + duration + METRICS[self.metric].words(self.value)

    def __repr__(self) -> str:
        chosen = weights_in_words(self.members, self.weights)
        return f"Selection of {len(self.members)} members: {self.totals}\n{self.conclusion}\nweights: {chosen}"

    def _repr_html_(self) -> str:
        pairs = zip(self.members, self.weights.tolist(), strict=True)
        rows = [{"member": name, "weight": weight} for name, weight in pairs]
        lines = [self.totals, self.conclusion]
        return html(f"Selection of {len(self.members)} members", lines, [Table(rows, formats={"weight": ".4f"})])


def select(
    outputs: MemberOutputs,
    max_parameters: float = 20_000_000,
    parameters: Mapping[str, float] | None = None,
    *,
    metric: str = "log_loss",
    max_members: int | None = None,
    max_bytes: float = np.inf,
    max_microseconds: float = np.inf,
    costs: Mapping[str, Cost] | None = None,
    tolerance: float = 1e-6,
    max_nodes: int = 2000,
) -> Selection:
    """The subset of members within all limits whose optimally weighted pool has the least loss.

    Log-loss and Brier score: branch and bound. Without the limits the problem is convex and its certified bound holds
    for every subset; the search splits on a member until the convex optimum itself satisfies the limits. See Land and
    Doig, "An automatic method of solving discrete programming problems", Econometrica 28, 1960.

    Accuracy and macro F1, which are not convex: greedy picks among the members that still fit (see `greedy`). The
    result is at least as good as the best single member within the limits; `bound`, of frames that are wrong whatever
    the weights, is loose, so that `proven` is rare.

    Args:
        outputs: with labels.
        max_parameters: limit of the total number of parameters.
        parameters: each member's cost, of any kind, in place of the numbers of parameters that the outputs know
            (`outputs.about`).
        metric: what the subset is best by: a name in `ensemble.judge.METRICS`; your own if it is of `Counts`.
        max_members: limit of the number of members, or None.
        max_bytes: limit of the total size of the checkpoints, which the outputs know.
        max_microseconds: limit of the time per frame that the members need together, or milliseconds per 1,000 frames.
        costs: member -> what it costs, as `ensemble.run.measure_costs` measured it. The time of a subset is that of
            one member of each kind by itself, and what each further member of a kind adds.
        tolerance: the loss may exceed the bound by this much and still count as proven.
        max_nodes: number of convex problems to solve before giving up the proof.

    Raises:
        ValueError: no labels, NaN, no usable frame, an unknown metric, a member of unknown cost where its limit is
            finite, a negative cost, or no member within the limits.

    Example:
        >>> good, fair = [[0.9, 0.1], [0.8, 0.2]], [[0.6, 0.4], [0.6, 0.4]]
        >>> outputs = MemberOutputs.from_probabilities({"good": good, "fair": fair}, labels=[0, 0])
        >>> select(outputs, max_parameters=10, parameters={"good": 20, "fair": 5}).members
        ('fair',)
    """
    expect_outputs(outputs)
    most = {"parameters": max_parameters, "bytes": max_bytes, "microseconds": max_microseconds}
    limits = _limits(outputs, parameters, costs, most, max_members)
    return _select(outputs, limits, metric=metric, tolerance=tolerance, max_nodes=max_nodes)


def _select(
    outputs: MemberOutputs, limits: Mapping[str, Limit], *, metric: str, tolerance: float, max_nodes: int
) -> Selection:
    at_least_zero(tolerance=tolerance)
    get_metric(metric)
    held, M, dropped, nodes = [*limits.values()], len(outputs.members), 0, 0
    nothing = np.zeros(M, dtype=bool)
    if not _affordable(nothing, held).any():
        reasons = [limit.out_of_reach for limit in held if not limit.room(nothing).any()]
        together = " and ".join(f"{limit.most:g} {limit.unit}" for limit in held if np.isfinite(limit.most))
        msg = f"expected a member within {reasons[0] if reasons else f'{together} at once, got none'}; raise the limit"
        raise ValueError(msg)
    if metric in ("log_loss", "brier"):
        relax, same, dropped = (_log_loss if metric == "log_loss" else _brier)(outputs)
        search = _Search(relax, held, M)
        search.run(_undominated(first_equal(same), held), tolerance, max_nodes)
        weights, loss, bound, nodes = search.weights, search.loss, search.bound, search.nodes
    else:
        picked = greedy(outputs, metric=metric, allowed=lambda chosen: _affordable(chosen, held))
        weights, loss, bound = picked.weights, 1 - picked.value, least_loss(outputs, metric)
    kept = weights > 0
    names = tuple(name for name, chosen in zip(outputs.members, kept, strict=True) if chosen)
    found = {name: limit.total(kept) for name, limit in limits.items()}
    known = loss, bound, not loss > bound + tolerance, nodes, found.get("parameters", 0.0)
    more = outputs.fingerprint, dropped, metric, found.get("bytes", np.nan), found.get("microseconds", np.nan)
    return Selection(names, weights[kept], *known, *more)


def _log_loss(outputs: MemberOutputs) -> tuple[Relaxation, Numbers, int]:
    """The relaxation for the log-loss, numbers that are equal where members are, and the frames dropped."""
    P, log_scale, alive = explained_matrix(outputs)
    rows, offset = Rows(P), -float(log_scale[alive].mean())

    def relax(allowed: Mask, start: Array) -> tuple[Array, float, float]:
        view = refit(rows, start=start, allowed=allowed)
        loss = view.loss + offset
        return view.weights, loss, loss if np.isinf(loss) else loss - view.gap(allowed)

    return relax, rows.values, int((~alive).sum())


def _brier(outputs: MemberOutputs) -> tuple[Relaxation, Numbers, int]:
    """The same for the Brier score, which drops none."""
    R = residual_products(outputs, np.ones(len(labelled(outputs))))
    refuse_nan(outputs, np.diag(R)[:, None])

    def relax(allowed: Mask, start: Array) -> tuple[Array, float, float]:
        among = np.flatnonzero(allowed)
        own, _, gap = least_quadratic(R[np.ix_(among, among)])
        weights = np.zeros(len(R))
        weights[among] = own
        loss = float(weights @ R @ weights)
        return weights, loss, loss - gap

    return relax, outputs.log_probabilities.flatten(1).float().numpy(), 0


def pareto_front(
    outputs: MemberOutputs,
    parameters: Mapping[str, float] | None = None,
    *,
    by: Literal["parameters", "bytes", "microseconds"] = "parameters",
    metric: str = "log_loss",
    max_parameters: float = np.inf,
    max_members: int | None = None,
    max_bytes: float = np.inf,
    max_microseconds: float = np.inf,
    costs: Mapping[str, Cost] | None = None,
    tolerance: float = 1e-6,
    max_nodes: int = 2000,
) -> list[Selection]:
    """The selections that no cheaper one matches in loss, from the most to the least expensive.

    Each is the best under a limit just below the cost of the one before. Arguments and errors are those of `select`,
    but what the front is `by` must be known of every member; the limits hold for all selections, and `max_nodes` for
    each.
    """
    expect_outputs(outputs)
    most = {"parameters": max_parameters, "bytes": max_bytes, "microseconds": max_microseconds}
    if by not in most:
        raise ValueError(no_such("cost to draw a front by", by, most))
    everything = np.ones(len(outputs.members), dtype=bool)
    limits = _limits(outputs, parameters, costs, most, max_members, needed=by)
    limits[by] = replace(limits[by], most=min(float(most[by]), limits[by].total(everything)))
    front: list[Selection] = []
    while not front or _affordable(~everything, [*limits.values()]).any():
        found = _select(outputs, limits, metric=metric, tolerance=tolerance, max_nodes=max_nodes)
        while front and found.loss <= front[-1].loss + tolerance:  # as good and cheaper
            front.pop()
        front.append(found)
        cost = {"parameters": found.cost, "bytes": found.size, "microseconds": found.microseconds}[by]
        limits[by] = replace(limits[by], most=float(np.nextafter(cost * (1 - 2e-12), -np.inf)))
    return front


@dataclass(frozen=True, eq=False)
class Limit:
    """A limit of a total that no further member makes smaller.

    Every member adds its own cost; each kind of which there is a member adds the largest extra among them, as members
    that run as one share what the first of them costs beyond its own.
    """

    unit: str  #: what is counted
    most: float  #: infinite where the total is only counted
    own: Array  #: (M,) at least 0
    extra: Array  #: (M,) at least 0
    kinds: NDArray[np.intp]  #: (M,) below M

    def total(self, members: Mask) -> float:
        """Of some members, (M,)."""
        return float(self.own[members].sum() + self._extras(members).sum())

    def room(self, chosen: Mask) -> Mask:
        """(M,) those of which one more fits beside the members chosen."""
        more = np.maximum(self.extra - self._extras(chosen)[self.kinds], 0) + np.where(chosen, 0, self.own)
        fits: Mask = self.total(chosen) + more <= self.most * (1 + 1e-12)
        return fits

    def _extras(self, members: Mask) -> Array:
        """(M,) of each kind."""
        extras = np.zeros(len(self.own))
        np.maximum.at(extras, self.kinds[members], self.extra[members])
        return extras

    @property
    def out_of_reach(self) -> str:
        """For messages, where no member fits."""
        return f"{self.most:g}, got costs of {(self.own + self.extra).min():g} and more {self.unit}"

    def replaces(self, other: int, one: int) -> bool:
        """Whether no total grows where a member is replaced by the other."""
        alike = self.kinds[other] == self.kinds[one] and self.extra[other] <= self.extra[one]
        return bool(self.own[other] + (0 if alike else self.extra[other]) <= self.own[one])


def _affordable(chosen: Mask, limits: Sequence[Limit]) -> Mask:
    """(M,) the members chosen, and those of which one more fits all limits beside them."""
    more: Mask = np.all([limit.room(chosen) for limit in limits], axis=0)
    return chosen | more


def _undominated(first: NDArray[np.intp], limits: Sequence[Limit]) -> Mask:
    """(M,) members without an equal that may take their place in every subset; `first` is the first equal of each.

    Of members that may replace each other the cheapest stays, then the first.
    """
    stay, places = np.ones(len(first), dtype=bool), np.arange(len(first))
    rank = np.lexsort([places, *(limit.own for limit in reversed(limits))]).argsort()
    held = [limit for limit in limits if np.isfinite(limit.most)]
    for one in places.tolist():
        for other in places[(first == first[one]) & (places != one)].tolist():
            if all(limit.replaces(other, one) for limit in held):
                stay[one] &= rank[other] > rank[one] and all(limit.replaces(one, other) for limit in held)
    return stay


class _Search:
    """The relaxation and the limits; the open parts of the search, least bound first; the best subset so far.

    A part is a pair of masks (M,): `chosen` members are paid for, `open` ones may still join.
    """

    def __init__(self, relax: Relaxation, limits: Sequence[Limit], members: int) -> None:
        self.relax, self.limits = relax, limits
        shares = [limit.own / limit.most for limit in limits if 0 < limit.most < np.inf]
        dear = np.max([np.zeros(members), *shares], axis=0)
        self.dear = np.maximum(dear, 1e-12 * dear.max() + 1e-300)  # (M,) the part of a limit that a member uses up
        self.weights, self.loss, self.nodes = np.zeros(members), np.inf, 0
        self.closed = self.bound = np.inf  # the least bound of the closed parts, and of all
        self.tried: set[bytes] = set()
        self.queue: list[tuple[float, int, Mask, Mask, Array]] = []
        self.pushed = count()  # of parts with equal bounds the first comes first

    def run(self, distinct: Mask, tolerance: float, max_nodes: int) -> None:
        """Search until no open part may hold a better subset, or the nodes are used up.

        Only `distinct` members take part.
        """
        nothing = np.zeros(len(distinct), dtype=bool)
        self._push(nothing, distinct, np.ones(len(distinct)) / len(distinct), -np.inf)
        while self.queue and self.queue[0][0] < self.loss - tolerance and self.nodes < max_nodes:
            bound, _, chosen, open_, weights = heapq.heappop(self.queue)
            if self._fits(chosen | (weights > 0)):
                self.closed = min(self.closed, bound)
                continue
            subset = self._rounded(chosen, weights)
            if subset.tobytes() not in self.tried:  # the subset that the weights suggest
                self.tried.add(subset.tobytes())
                self._relaxed(subset, weights)
            m = int(np.where(open_ & (weights > 0), weights * self.dear, -1.0).argmax())
            without, with_m = open_.copy(), chosen.copy()
            without[m], with_m[m] = False, True
            for taken in (chosen, with_m):
                self._push(taken, without, weights, bound)
        if np.isinf(self.loss):  # every subset gives some frame zero: return the members that cost least
            cheap = self._rounded(nothing, distinct / self.dear)
            self.weights = cheap / cheap.sum()
        self.bound = min([self.closed, self.loss, *(entry[0] for entry in self.queue)])

    def _push(self, chosen: Mask, open_: Mask, start: Array, least: float) -> None:
        """Queue a part with the open members that the limits leave room for, unless nothing within them is left."""
        left: Mask = open_ & _affordable(chosen, self.limits)
        if (chosen | left).any() and self._fits(chosen):
            weights, bound = self._relaxed(chosen | left, start)
            heapq.heappush(self.queue, (max(bound, least), next(self.pushed), chosen, left, weights))

    def _relaxed(self, allowed: Mask, start: Array) -> tuple[Array, float]:
        """Weights over the allowed members without the limits, and a bound for the loss of all such weights."""
        self.nodes += 1
        weights, loss, bound = self.relax(allowed, start)
        if loss < self.loss and self._fits(weights > 0):
            self.weights, self.loss = weights, loss
        return weights, bound

    def _fits(self, members: Mask) -> bool:
        return all(limit.total(members) <= limit.most * (1 + 1e-12) for limit in self.limits)

    def _rounded(self, chosen: Mask, weights: Array) -> Mask:
        """A subset within the limits: the chosen members, then others by weight as long as they fit."""
        taken = chosen.copy()
        for m in np.argsort(-weights, kind="stable"):
            taken[m] |= bool(weights[m] > 0)
            if not self._fits(taken):
                taken[m] = False
        return taken


def _limits(
    outputs: MemberOutputs,
    parameters: Mapping[str, float] | None,
    costs: Mapping[str, Cost] | None,
    most: Mapping[str, float],
    max_members: int | None,
    *,
    needed: str = "",
) -> dict[str, Limit]:
    """Each limit by what it counts, also where it is infinite, as long as the costs of all members are known.

    Raises:
        ValueError: a limit below zero or NaN; a negative or infinite cost; no members allowed; a cost that is unknown
            where its limit is finite, or it is `needed`.
    """
    if max_members is not None and max_members < 1:
        msg = f"expected at least one member, got max_members={max_members}"
        raise ValueError(msg)
    if unbounded := next((unit for unit, limit in most.items() if not limit >= 0), ""):
        msg = f"expected a limit of {unbounded} of at least 0, got {most[unbounded]}"
        raise ValueError(msg)
    names, measured = outputs.members, costs or {}
    sizes = {name: about.size for name, about in zip(names, outputs.about, strict=True) if about.size is not None}
    own: dict[str, Mapping[str, float]] = {"parameters": outputs.parameters if parameters is None else parameters}
    own |= {"bytes": sizes, "microseconds": {name: cost.microseconds for name, cost in measured.items()}}
    way_out = {
        "parameters": "pass parameters={name: count}",
        "bytes": "members from a registry, and torch modules, know theirs",
        "microseconds": "pass costs=ensemble.run.measure_costs(members, frames)",
    }
    M, found = len(names), dict[str, Limit]()
    for unit, known in own.items():
        missing = [name for name in names if name not in known]
        if missing and (np.isfinite(most[unit]) or unit == needed or (unit == "parameters" and parameters is not None)):
            msg = f"expected the {unit} of every member, got none for {missing}; {way_out[unit]}"
            raise ValueError(msg)
        if missing:
            continue
        if wrong := [name for name in names if not 0 <= known[name] < np.inf]:
            msg = f"expected finite {unit} of at least zero, got {known[wrong[0]]} for {wrong[0]!r}"
            raise ValueError(msg)
        extra, kinds = np.zeros(M), np.arange(M)
        if unit == "microseconds":
            alone = [max(measured[name].alone - measured[name].microseconds, 0.0) for name in names]
            extra = np.nan_to_num(alone)
            kinds = np.array([_kind(place, [measured[name].kind for name in names]) for place in range(M)])
        found[unit] = Limit(unit, float(most[unit]), np.array([float(known[name]) for name in names]), extra, kinds)
    if max_members is not None:
        found["members"] = Limit("members", max_members, np.ones(M), np.zeros(M), np.arange(M))
    return found


def _kind(place: int, kinds: Sequence[int | None]) -> int:
    """The first member of the kind of the one at this place; one without a kind is its own."""
    return place if kinds[place] is None else kinds.index(kinds[place])
