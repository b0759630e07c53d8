"""The best subset of members within a total cost, by branch and bound; and the front of loss against cost.

Outputs, costs, limits and a metric go in; a `Selection` comes out. The law that proves it right: a relaxation (some
members chosen, some open, limits aside) is convex, so its certified bound holds for every subset between;
`Selection.bound` is the least bound of the parts that are open or were closed. The tests compare all of it with brute
force. Metrics of decisions, which are not convex, are left to greedy picks within the limits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble.fit._solver import at_least_zero, first_equal, labelled, refit, refuse_nan
from ensemble.fit._solver.newton import Numbers, Rows
from ensemble.fit.greedy import GreedySelection as GreedySelection
from ensemble.fit.greedy import greedy as greedy
from ensemble.fit.greedy import residual_products
from ensemble.fit.weights import explained_matrix, least_loss, least_quadratic
from ensemble.judge.metrics import METRICS, get_metric
from ensemble.outputs import MemberOutputs
from ensemble.rules.fitted import WeightedMean

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
    cost: float  #: sum of the members' costs
    fingerprint: str = ""  #: of the frames
    dropped: int = 0  #: frames left out because every member, chosen or not, gave the true class exactly zero
    metric: str = "log_loss"  #: that they were chosen by

    @property
    def value(self) -> float:
        """The metric that `loss` stands for: one minus it where more is better."""
        return 1 - self.loss if METRICS[self.metric].higher else self.loss

    @property
    def rule(self) -> WeightedMean:
        """The weighted mean of the members chosen."""
        return WeightedMean(tuple(self.weights.tolist()), self.fingerprint, members=self.members)


def select(
    outputs: MemberOutputs,
    max_parameters: float = 20_000_000,
    parameters: Mapping[str, float] | None = None,
    *,
    metric: str = "log_loss",
    max_members: int | None = None,
    tolerance: float = 1e-6,
    max_nodes: int = 2000,
) -> Selection:
    """The subset of members within a total cost whose optimally weighted pool has the least loss.

    Log-loss and Brier score: branch and bound. Without the limits the problem is convex and its certified bound holds
    for every subset; the search splits on a member until the convex optimum itself satisfies the limits. See Land and
    Doig, "An automatic method of solving discrete programming problems", Econometrica 28, 1960.

    Accuracy and macro F1, which are not convex: greedy picks among the members that still fit (see `greedy`). The
    result is at least as good as the best single member within the limits; `bound`, of frames that are wrong whatever
    the weights, is loose, so that `proven` is rare.

    Args:
        outputs: with labels.
        max_parameters: limit of the total cost.
        parameters: each member's cost, in whatever unit: parameters, bytes, milliseconds. If None, the numbers of
            parameters that the outputs know (`outputs.about`).
        metric: what the subset is best by: a name in `ensemble.judge.METRICS`; your own if it is of `Counts`.
        max_members: limit of the number of members, or None.
        tolerance: the loss may exceed the bound by this much and still count as proven.
        max_nodes: number of convex problems to solve before giving up the proof.

    Raises:
        ValueError: no labels, NaN, no usable frame, an unknown metric, a member of unknown cost where
            `max_parameters` is finite, a negative cost, or no member within the limits.

    Example:
        >>> good, fair = [[0.9, 0.1], [0.8, 0.2]], [[0.6, 0.4], [0.6, 0.4]]
        >>> outputs = MemberOutputs.from_probabilities({"good": good, "fair": fair}, labels=[0, 0])
        >>> select(outputs, max_parameters=10, parameters={"good": 20, "fair": 5}).members
        ('fair',)
    """
    at_least_zero(tolerance=tolerance)
    costs = np.array(_costs(outputs, parameters, needed=np.isfinite(max_parameters)), dtype=np.float64)
    if max_members is not None and max_members < 1:
        msg = f"expected at least one member, got max_members={max_members}"
        raise ValueError(msg)
    get_metric(metric)
    if costs.min() > (limit := float(max_parameters)) * (1 + 1e-12):
        msg = f"expected a member within {limit:g}, got costs of {costs.min():g} and more; raise the limit"
        raise ValueError(msg)
    most, dropped, nodes = max_members or len(costs), 0, 0
    if metric in ("log_loss", "brier"):
        relax, same, dropped = (_log_loss if metric == "log_loss" else _brier)(outputs)
        search = _Search(relax, costs, limit, most)
        search.run(first_equal(same, np.argsort(costs, kind="stable")) == np.arange(len(costs)), tolerance, max_nodes)
        weights, loss, bound, nodes = search.weights, search.loss, search.bound, search.nodes
    else:
        picked = greedy(outputs, metric=metric, allowed=lambda chosen: _affordable(chosen, costs, limit, most))
        weights, loss, bound = picked.weights, 1 - picked.value, least_loss(outputs, metric)
    kept = np.flatnonzero(weights)
    names, cost = tuple(outputs.members[m] for m in kept), float(costs[kept].sum())
    known = loss, bound, not loss > bound + tolerance, nodes, cost, outputs.fingerprint, dropped, metric
    return Selection(names, weights[kept], *known)


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
    metric: str = "log_loss",
    max_parameters: float = np.inf,
    max_members: int | None = None,
    tolerance: float = 1e-6,
    max_nodes: int = 2000,
) -> list[Selection]:
    """The selections that no cheaper one matches in loss, from the most to the least expensive.

    Each is the best under a limit just below the cost of the one before. Arguments and errors are those of `select`,
    but the cost of every member must be known; `max_parameters` is the limit of the most expensive selection, and
    `max_nodes` holds for each.
    """
    costs = _costs(outputs, parameters)
    front: list[Selection] = []
    how: Any = {"tolerance": tolerance, "max_nodes": max_nodes}
    limit = min(float(max_parameters), sum(costs))
    while not front or limit >= min(costs):
        found = select(outputs, limit, parameters, metric=metric, max_members=max_members, **how)
        while front and found.loss <= front[-1].loss + tolerance:  # as good and cheaper
            front.pop()
        front.append(found)
        limit = float(np.nextafter(found.cost * (1 - 2e-12), -np.inf))
    return front


class _Search:
    """The relaxation, costs and limits; the open parts of the search, least bound first; the best subset so far.

    A part is a pair of masks (M,): `chosen` members are paid for, `open` ones may still join.
    """

    def __init__(self, relax: Relaxation, costs: Array, budget: float, most: int) -> None:
        self.relax, self.costs, self.budget, self.most = relax, costs, budget, most
        self.weights, self.loss, self.nodes = np.zeros(len(costs)), np.inf, 0
        self.closed = self.bound = np.inf  # the least bound of the closed parts, and of all
        self.tried: set[bytes] = set()
        self.queue: list[tuple[float, int, Mask, Mask, Array]] = []
        self.pushed = count()  # of parts with equal bounds the first comes first

    def run(self, distinct: Mask, tolerance: float, max_nodes: int) -> None:
        """Search until no open part may hold a better subset, or the nodes are used up.

        Only `distinct` members take part: of equal ones the cheapest, then the first.
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
            share = weights * np.maximum(self.costs, 1e-12 * self.costs.max() + 1e-300)
            m = int(np.where(open_ & (weights > 0), share, -1.0).argmax())
            without, with_m = open_.copy(), chosen.copy()
            without[m], with_m[m] = False, True
            for taken in (chosen, with_m):
                self._push(taken, without, weights, bound)
        if np.isinf(self.loss):  # every subset gives some frame zero: return the members that cost least
            cheap = self._rounded(nothing, distinct / np.maximum(self.costs, 1e-300))
            self.weights = cheap / cheap.sum()
        self.bound = min([self.closed, self.loss, *(entry[0] for entry in self.queue)])

    def _push(self, chosen: Mask, open_: Mask, start: Array, least: float) -> None:
        """Queue a part with the open members that the limits leave room for, unless nothing within them is left."""
        left: Mask = open_ & _affordable(chosen, self.costs, self.budget, self.most)
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
        return bool(self.costs[members].sum() <= self.budget * (1 + 1e-12) and members.sum() <= self.most)

    def _rounded(self, chosen: Mask, weights: Array) -> Mask:
        """A subset within the limits: the chosen members, then others by weight as long as they fit."""
        taken = chosen.copy()
        for m in np.argsort(-weights, kind="stable"):
            taken[m] |= bool(weights[m] > 0)
            if not self._fits(taken):
                taken[m] = False
        return taken


def _affordable(chosen: Mask, costs: Array, budget: float, most: int) -> Mask:
    """(M,) the members chosen, and those of which one more fits the limits beside them."""
    room = budget * (1 + 1e-12) - costs[chosen].sum()
    more: Mask = (costs <= room) & (int(chosen.sum()) < most)
    return chosen | more


def _costs(outputs: MemberOutputs, parameters: Mapping[str, float] | None, *, needed: bool = True) -> list[float]:
    """M costs; zeros where some are unknown but not needed."""
    known: Mapping[str, float] = outputs.parameters if parameters is None else parameters
    missing = [name for name in outputs.members if name not in known]
    if missing and parameters is None and not needed:
        return [0.0] * len(outputs.members)
    if missing:
        msg = f"expected the parameters of every member, got none for {missing}; pass parameters={{name: count}}"
        raise ValueError(msg)
    if wrong := [name for name in outputs.members if not 0 <= known[name] < np.inf]:
        msg = f"expected finite costs of at least zero, got {known[wrong[0]]} for {wrong[0]!r}"
        raise ValueError(msg)
    return [float(known[name]) for name in outputs.members]
