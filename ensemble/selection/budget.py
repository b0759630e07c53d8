"""The best subset of members within a total cost, by branch and bound; and the front of loss against cost.

Outputs, costs and limits go in; a `Selection` comes out. The law that proves it right: a relaxation (some members
chosen, some open, limits aside) is convex, so its certified bound holds for every subset between; `Selection.bound` is
the least bound of the parts that are open or were closed. The tests compare all of it with brute force.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ensemble.fit._solver import at_least_zero, first_equal, refit
from ensemble.fit._solver.rows import Rows
from ensemble.fit.weights import explained_matrix
from ensemble.outputs import MemberOutputs
from ensemble.rules.fitted import WeightedMean

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Selection:
    """The members chosen, with their weights, and what is known of every other choice.

    Attributes:
        members: names with a positive weight, in the outputs' order.
        weights: (len(members),) non-negative, summing to one.
        loss: log-loss of their pool on the frames kept, in nats.
        bound: no subset within the limits has a loss below this, whatever its weights.
        proven: whether `loss - bound` is within the requested tolerance.
        nodes: number of convex problems solved.
        cost: sum of the members' costs.
        fingerprint: of the frames.
        dropped: frames left out because every member, chosen or not, gave the true class exactly zero.
    """

    members: tuple[str, ...]
    weights: Array
    loss: float
    bound: float
    proven: bool
    nodes: int
    cost: float
    fingerprint: str = ""
    dropped: int = 0

    @property
    def rule(self) -> WeightedMean:
        """The weighted mean of the members chosen."""
        return WeightedMean(tuple(self.weights.tolist()), self.fingerprint, members=self.members)


@dataclass(frozen=True)
class _Node:
    """A part of the search: `chosen` members are paid for, `open` ones may still join."""

    chosen: Mask
    open: Mask

    @property
    def allowed(self) -> Mask:
        return self.chosen | self.open


class _Problem:
    """The frames, the costs and the limits; solves relaxations."""

    def __init__(self, rows: Rows, costs: Array, budget: float, most: int, offset: float) -> None:
        self.rows, self.costs, self.budget, self.most, self.offset = rows, costs, budget, most, offset
        self.nodes = 0

    def relaxed(self, allowed: Mask, start: Array) -> tuple[Array, float, float]:
        """Weights over the allowed members without the limits; their loss, and a bound for all such weights."""
        self.nodes += 1
        view = refit(self.rows, start=start, allowed=allowed)
        loss = view.loss + self.offset
        return view.weights, loss, loss if np.isinf(loss) else loss - view.gap(allowed)

    def fits(self, members: Mask) -> bool:
        return bool(self.costs[members].sum() <= self.budget * (1 + 1e-12) and members.sum() <= self.most)

    def narrowed(self, node: _Node) -> _Node:
        """The part without the open members that the limits leave no room for."""
        left = self.budget * (1 + 1e-12) - self.costs[node.chosen].sum()
        room = int(node.chosen.sum()) < self.most
        return _Node(node.chosen, node.open & (self.costs <= left) & room)

    def rounded(self, node: _Node, weights: Array) -> Mask:
        """A subset within the limits: members by weight, largest first, as long as they fit."""
        taken = node.chosen.copy()
        for m in np.argsort(-weights, kind="stable"):
            taken[m] |= bool(weights[m] > 0)
            if not self.fits(taken):
                taken[m] = False
        return taken


def select(
    outputs: MemberOutputs,
    max_parameters: float = 20_000_000,
    parameters: Mapping[str, float] | None = None,
    *,
    max_members: int | None = None,
    tolerance: float = 1e-6,
    max_nodes: int = 2000,
) -> Selection:
    """The subset of members within a total cost whose optimally weighted pool has the least log-loss.

    Branch and bound: without the limits the problem is convex and its certified bound holds for every subset;
    the search splits on a member until the convex optimum itself satisfies the limits.

    Args:
        outputs: with labels.
        max_parameters: limit of the total cost.
        parameters: each member's cost, in whatever unit: parameters, bytes, milliseconds. If None, the numbers of
            parameters that the outputs know (`outputs.about`).
        max_members: limit of the number of members, or None.
        tolerance: the loss may exceed the bound by this much, in nats, and still count as proven.
        max_nodes: number of convex problems to solve before giving up the proof.

    Raises:
        ValueError: no labels, NaN, no usable frame, a member of unknown cost where `max_parameters` is finite, a
            negative cost, or no member within the limits.

    Example:
        >>> good, fair = [[0.9, 0.1], [0.8, 0.2]], [[0.6, 0.4], [0.6, 0.4]]
        >>> outputs = MemberOutputs.from_probabilities({"good": good, "fair": fair}, labels=[0, 0])
        >>> select(outputs, max_parameters=10, parameters={"good": 20, "fair": 5}).members
        ('fair',)

    References:
        Land and Doig, "An automatic method of solving discrete programming problems", Econometrica 28, 1960.
    """
    at_least_zero("tolerance", tolerance)
    problem = _problem(outputs, max_parameters, parameters, max_members)
    return _search(problem, outputs, tolerance=tolerance, max_nodes=max_nodes)


def pareto_front(
    outputs: MemberOutputs,
    parameters: Mapping[str, float] | None = None,
    *,
    max_parameters: float = np.inf,
    max_members: int | None = None,
    tolerance: float = 1e-6,
    max_nodes: int = 2000,
) -> list[Selection]:
    """The selections that no cheaper one matches in loss, from the most to the least expensive.

    Each is the best under a limit just below the cost of the one before.

    Args:
        outputs: with labels.
        parameters: see `select`; the cost of every member must be known.
        max_parameters: limit of the most expensive selection.
        max_members: see `select`.
        tolerance: see `select`.
        max_nodes: see `select`; for each selection.

    Raises:
        ValueError: as `select`.
    """
    costs = _costs(outputs, parameters)
    front: list[Selection] = []
    limit = min(float(max_parameters), sum(costs))
    while not front or limit >= min(costs):
        found = select(outputs, limit, parameters, max_members=max_members, tolerance=tolerance, max_nodes=max_nodes)
        while front and found.loss <= front[-1].loss + tolerance:  # as good and cheaper
            front.pop()
        front.append(found)
        limit = float(np.nextafter(found.cost * (1 - 2e-12), -np.inf))
    return front


def _search(problem: _Problem, outputs: MemberOutputs, *, tolerance: float, max_nodes: int) -> Selection:
    root = _root(problem)
    tree = _Tree(problem, root)
    while tree.promises(tolerance) and problem.nodes < max_nodes:
        tree.look()
    if np.isinf(tree.loss):  # every subset gives some frame zero: return the members that cost least
        cheap = problem.rounded(root, root.open / np.maximum(problem.costs, 1e-300))
        tree.weights = cheap / cheap.sum()
    kept = np.flatnonzero(tree.weights)
    return Selection(
        tuple(outputs.members[m] for m in kept),
        tree.weights[kept],
        tree.loss,
        tree.bound,
        not tree.loss > tree.bound + tolerance,
        problem.nodes,
        float(problem.costs[kept].sum()),
        outputs.fingerprint,
        problem.rows.dropped,
    )


def _root(problem: _Problem) -> _Node:
    """All members, of equal ones only the cheapest, then the first."""
    M = problem.rows.members
    distinct = first_equal(problem.rows.values, np.argsort(problem.costs, kind="stable")) == np.arange(M)
    root = problem.narrowed(_Node(np.zeros(M, dtype=bool), distinct))
    if not root.open.any():
        least = problem.costs.min()
        msg = f"expected a member within {problem.budget:g}, got costs of {least:g} and more; raise the limit"
        raise ValueError(msg)
    return root


class _Tree:
    """The open parts of the search, least bound first, and the best subset within the limits so far."""

    def __init__(self, problem: _Problem, root: _Node) -> None:
        self.problem = problem
        self.weights, self.loss = np.zeros(problem.rows.members), np.inf
        self.closed = np.inf  # the least bound of the closed parts
        self.tried: set[bytes] = set()
        self.queue: list[tuple[float, int, _Node, Array]] = []
        self.pushed = count()  # of parts with equal bounds the first comes first
        self._open([root], np.ones(problem.rows.members) / problem.rows.members, -np.inf)

    @property
    def bound(self) -> float:
        """No subset has a loss below this."""
        return min([self.closed, self.loss, *(entry[0] for entry in self.queue)])

    def promises(self, tolerance: float) -> bool:
        """Whether an open part may hold a better subset."""
        return bool(self.queue) and self.queue[0][0] < self.loss - tolerance

    def look(self) -> None:
        """Close the most promising part, or split it and try the subset that its weights suggest."""
        bound, _, node, weights = heapq.heappop(self.queue)
        if self.problem.fits(node.chosen | (weights > 0)):
            self.closed = min(self.closed, bound)
            return
        subset = self.problem.rounded(node, weights)
        if subset.tobytes() not in self.tried:
            self.tried.add(subset.tobytes())
            found, loss, _ = self.problem.relaxed(subset, weights)
            self._improve(found, loss)
        self._open(_split(self.problem, node, weights), weights, bound)

    def _open(self, nodes: Sequence[_Node], start: Array, least: float) -> None:
        for node in nodes:
            weights, loss, bound = self.problem.relaxed(node.allowed, start)
            if self.problem.fits(weights > 0):
                self._improve(weights, loss)
            heapq.heappush(self.queue, (max(bound, least), next(self.pushed), node, weights))

    def _improve(self, weights: Array, loss: float) -> None:
        if loss < self.loss:
            self.weights, self.loss = weights, loss


def _split(problem: _Problem, node: _Node, weights: Array) -> list[_Node]:
    """The parts without and with the open member whose weight times cost is largest."""
    support = node.open & (weights > 0)
    share = np.where(support, weights * np.maximum(problem.costs, 1e-12 * problem.costs.max() + 1e-300), -1.0)
    m = int(share.argmax())
    without, chosen = node.open.copy(), node.chosen.copy()
    without[m] = False
    chosen[m] = True
    children = [problem.narrowed(_Node(node.chosen, without)), problem.narrowed(_Node(chosen, without))]
    return [child for child in children if child.allowed.any() and problem.fits(child.chosen)]


def _problem(
    outputs: MemberOutputs, budget: float, parameters: Mapping[str, float] | None, most: int | None
) -> _Problem:
    costs = np.array(_costs(outputs, parameters, needed=np.isfinite(budget)), dtype=np.float64)
    if most is not None and most < 1:
        msg = f"expected at least one member, got max_members={most}"
        raise ValueError(msg)
    P, log_scale, alive = explained_matrix(outputs)
    return _Problem(Rows(P), costs, float(budget), most or len(costs), -float(log_scale[alive].mean()))


def _costs(outputs: MemberOutputs, parameters: Mapping[str, float] | None, *, needed: bool = True) -> list[float]:
    """M costs; zeros where some are unknown but not needed."""
    known: Mapping[str, float] = outputs.parameters if parameters is None else parameters
    missing = [name for name in outputs.members if name not in known]
    if missing and parameters is None and not needed:
        return [0.0] * len(outputs.members)
    if missing:
        msg = f"expected the parameters of every member, got none for {missing}; pass parameters={{name: count}}"
        raise ValueError(msg)
    wrong = [name for name in outputs.members if not 0 <= known[name] < np.inf]
    if wrong:
        msg = f"expected finite costs of at least zero, got {known[wrong[0]]} for {wrong[0]!r}"
        raise ValueError(msg)
    return [float(known[name]) for name in outputs.members]
