"""Selection under a budget, against brute force."""

from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from conftest import some_outputs

import ensemble
from ensemble import fit_simplex_weights, select
from ensemble.outputs import About, Cost
from ensemble.selection import pareto_front


def brute_force(P, costs, budget, most):
    subsets = (c for k in range(1, most + 1) for c in combinations(range(len(P)), k))
    return min(fit_simplex_weights(P[list(c)]).loss for c in subsets if costs[list(c)].sum() <= budget)


def test_the_parameters_that_outputs_know_are_the_costs():
    """Without `parameters`; given ones take their place."""
    good, fair = [[0.9, 0.1], [0.8, 0.2]], [[0.6, 0.4], [0.6, 0.4]]
    about = {"good": About(parameters=20), "fair": About(parameters=5)}
    outputs = ensemble.MemberOutputs.from_probabilities({"good": good, "fair": fair}, labels=[0, 0], about=about)
    assert select(outputs, 10).members == ("fair",)
    assert select(outputs, 10, {"good": 1, "fair": 1}).members == ("good",)
    assert [found.members for found in pareto_front(outputs)] == [("good",), ("fair",)]


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_optimum_is_that_of_brute_force(seed):
    """Every subset fitted, for up to eight members and random costs."""
    generator = np.random.default_rng(seed)
    M = int(generator.integers(2, 9))
    outputs = some_outputs(M, seed=seed)
    costs, most = generator.integers(1, 10, M).astype(float), int(generator.integers(1, M + 1))
    budget = float(costs.min() + generator.integers(0, 15))
    found = select(outputs, budget, dict(zip(outputs.members, costs, strict=True)), max_members=most)
    best = brute_force(outputs.true_class().numpy(), costs, budget, most)
    assert found.loss == pytest.approx(best, abs=2e-6)
    assert found.bound <= best + 1e-9
    assert found.proven
    assert found.cost <= budget
    assert len(found.members) <= most


def random_limits(seed, M):
    """Parameters, bytes and times of M members, two kinds of which share a cost, and limits that some subset meets."""
    generator = np.random.default_rng(seed)
    parameters, size = generator.integers(1, 10, M), generator.integers(1, 10, M)
    each, first = generator.uniform(0.5, 3, M), generator.uniform(0, 3, M)
    kinds = generator.integers(0, 3, M)
    each, first = each[kinds], first[kinds]  # members of a kind cost the same
    about = {f"m{m}": About(parameters=int(parameters[m]), size=int(size[m])) for m in range(M)}
    costs = {f"m{m}": Cost(each[m], alone=each[m] + first[m], kind=int(kinds[m])) for m in range(M)}
    inside = generator.integers(0, 2, M).astype(bool)
    inside[generator.integers(M)] = True
    slack = 1 + seed % 3  # where it is large, time is what limits
    limits = {"max_parameters": float(slack * parameters[inside].sum()), "max_bytes": float(slack * size[inside].sum())}
    limits |= {"max_microseconds": time_of(np.flatnonzero(inside), costs), "max_members": int(slack * inside.sum())}
    return about, costs, limits


def time_of(members, costs):
    """The slow obvious sum: what each costs more, and of each kind once what the first costs more than that."""
    chosen = [costs[f"m{m}"] for m in members]
    return sum(c.microseconds for c in chosen) + sum({c.kind: c.alone - c.microseconds for c in chosen}.values())


@pytest.mark.parametrize(
    ("metric", "seed"), [*product(["log_loss"], range(12)), *product(["brier"], range(4)), ("accuracy", 0)]
)
def test_several_limits_hold_at_once_as_in_brute_force(metric, seed):
    """Every subset that meets all of them is fitted: none is below the bound, and the proof finds the best."""
    M = int(np.random.default_rng(seed).integers(3, 8))
    about, costs, limits = random_limits(seed, M)
    outputs = replace(some_outputs(M, N=150, seed=seed), about=tuple(about.values()))
    found = select(outputs, **limits, costs=costs, metric=metric)

    def met(members):
        return (
            sum(about[f"m{m}"].parameters for m in members) <= limits["max_parameters"]
            and sum(about[f"m{m}"].size for m in members) <= limits["max_bytes"]
            and time_of(members, costs) <= limits["max_microseconds"] * (1 + 1e-9)
            and len(members) <= limits["max_members"]
        )

    places = [int(name[1:]) for name in found.members]
    assert met(places)
    assert found.cost == sum(about[f"m{m}"].parameters for m in places)
    assert found.size == sum(about[f"m{m}"].size for m in places)
    assert found.microseconds == pytest.approx(time_of(places, costs))
    subsets = [c for k in range(1, M + 1) for c in combinations(range(M), k) if met(c)]
    losses = [ensemble.fit_weights(outputs.subset([f"m{m}" for m in c]), metric, tolerance=1e-9).loss for c in subsets]
    assert found.bound <= min(losses) + 1e-9
    if metric != "accuracy":
        assert found.proven
        assert found.loss == pytest.approx(min(losses), abs=2e-6)


def test_of_equal_members_each_stays_that_a_limit_may_need():
    """One copy is small and slow, one large and fast: either may be the one that fits."""
    outputs = some_outputs(3)
    rows = {name: outputs.probabilities[m] for m, name in enumerate(outputs.members)} | {
        "copy": outputs.probabilities[0]
    }
    about = {"m0": About(size=9), "m1": About(size=1), "m2": About(size=1), "copy": About(size=1)}
    doubled = ensemble.MemberOutputs.from_probabilities(rows, labels=outputs.labels, about=about)
    costs = {"m0": Cost(1.0), "m1": Cost(1.0), "m2": Cost(1.0), "copy": Cost(9.0)}
    everything = select(doubled, np.inf).loss
    for limits, left_out in (({"max_bytes": 3}, "m0"), ({"max_microseconds": 3}, "copy")):
        found = select(doubled, np.inf, **limits, costs=costs)
        assert found.loss == pytest.approx(everything, abs=2e-6)
        assert left_out not in found.members


def test_what_a_limit_needs_must_be_known():
    """The message tells how it becomes known; a limit that nothing meets is named, and so are limits that clash."""
    outputs = some_outputs(3)
    with pytest.raises(ValueError, match="expected the bytes of every member, got none for"):
        select(outputs, np.inf, max_bytes=10)
    with pytest.raises(ValueError, match=r"microseconds of every member.* costs=ensemble.run.measure_costs"):
        select(outputs, np.inf, max_microseconds=10, costs={"m0": Cost(1.0)})
    costs = {"m0": Cost(1.0, alone=5.0), "m1": Cost(2.0), "m2": Cost(3.0)}
    with pytest.raises(ValueError, match=r"within 0\.5, got costs of 2 and more microseconds"):
        select(outputs, np.inf, max_microseconds=0.5, costs=costs)
    with pytest.raises(ValueError, match="a member within 5 parameters and 2 microseconds at once"):
        select(outputs, 5, {"m0": 1, "m1": 9, "m2": 1}, max_microseconds=2, costs=costs)
    with pytest.raises(ValueError, match="got nan for 'm1'"):
        select(outputs, np.inf, costs=costs | {"m1": Cost(np.nan)})


@pytest.mark.parametrize("by", ["bytes", "microseconds"])
def test_a_front_by_another_cost_keeps_the_limits(by):
    """Each point is the best of its cost within the other limits."""
    about, costs, limits = random_limits(3, 6)
    outputs = replace(some_outputs(6, N=150, seed=3), about=tuple(about.values()))
    front = pareto_front(outputs, by=by, costs=costs, **limits)
    values = [point.size if by == "bytes" else point.microseconds for point in front]
    assert all(a > b for a, b in pairwise(values))
    assert all(a.loss < b.loss for a, b in pairwise(front))
    for point, value in zip(front, values, strict=True):
        again = select(outputs, **limits | {f"max_{by}": value}, costs=costs)
        assert point.loss == pytest.approx(again.loss, abs=2e-6)
    with pytest.raises(ValueError, match="no cost to draw a front by named 'time'"):
        pareto_front(outputs, by="time")


def test_without_limits_selection_is_the_plain_fit():
    """Nothing to pay, nothing to leave out."""
    outputs = some_outputs()
    found, fit = select(outputs, np.inf), ensemble.fit_weights(outputs)
    assert found.loss == pytest.approx(fit.loss, abs=1e-6)
    assert found.proven


def test_of_equal_members_the_cheaper_is_taken_then_the_first():
    """A dear copy of the best member is never chosen."""
    outputs = some_outputs(3)
    rows = {name: outputs.probabilities[m] for m, name in enumerate(outputs.members)}
    rows |= {"cheap copy": rows["m0"], "second copy": rows["m0"]}
    doubled = ensemble.MemberOutputs.from_probabilities(rows, labels=outputs.labels)
    costs = {"m0": 5.0, "m1": 4.0, "m2": 4.0, "cheap copy": 3.0, "second copy": 3.0}
    found = select(doubled, 100, costs)
    assert "m0" not in found.members
    assert "second copy" not in found.members


def test_giving_up_early_leaves_an_honest_bound():
    """One node is not a proof: the bound stays below the optimum, the loss above."""
    outputs = some_outputs(8, seed=5)
    costs = dict.fromkeys(outputs.members, 1.0)
    short, full = select(outputs, 2, costs, max_nodes=1), select(outputs, 2, costs)
    assert short.bound <= full.loss <= short.loss + 1e-9
    assert not short.proven


def test_selection_drops_and_counts_frames_without_a_positive_probability():
    """They are infinite whatever is chosen; where there are no others, that is an error."""
    rows = {"a": [[0.6, 0.4], [0.3, 0.7], [1, 0]], "b": [[0.7, 0.3], [0.4, 0.6], [1, 0]]}
    outputs = ensemble.MemberOutputs.from_probabilities(rows, labels=[0, 1, 1])
    found = select(outputs, np.inf)
    assert found.dropped == 1
    assert found.loss == pytest.approx(select(outputs.at(torch.tensor([0, 1])), np.inf).loss, abs=1e-6)
    with pytest.raises(ValueError, match="got 1 frames of zeros"):
        select(outputs.at(torch.tensor([2])), np.inf)


@pytest.mark.parametrize(
    ("costs", "budget", "words"),
    [
        ({"m0": 1, "m1": 1}, 5, r"none for \['m2'\]"),
        (None, 5, "parameters of every member"),
        ({"m0": 9, "m1": 9, "m2": 9}, 5, "expected a member within 5"),
        ({"m0": -1, "m1": 1, "m2": 1}, 5, "-1 for 'm0'"),
    ],
)
def test_costs_that_do_not_serve_are_refused(costs, budget, words):
    """With the member's name."""
    with pytest.raises(ValueError, match=words):
        select(some_outputs(3), budget, costs)


def test_costs_are_those_that_the_outputs_know_unless_others_are_given():
    """Numbers of parameters come with the outputs; a cost that is given stands in for them."""
    outputs = some_outputs(4, seed=1)
    about = tuple(ensemble.outputs.About(parameters=10 * (m + 1)) for m in range(4))
    known, plain = replace(outputs, about=about), {f"m{m}": 10 * (m + 1) for m in range(4)}
    assert select(known, 60).cost == select(outputs, 60, plain).cost > 0
    assert [one.cost for one in pareto_front(known)] == [one.cost for one in pareto_front(outputs, plain)]
    assert select(known, 4, dict.fromkeys(plain, 1)).members == select(outputs, np.inf).members
    some = replace(outputs, about=(*about[:3], ensemble.outputs.About()))
    assert select(some, np.inf).cost == 0
    with pytest.raises(ValueError, match=r"none for \['m3'\]"):
        select(some, 60)


def test_the_front_falls_in_cost_and_rises_in_loss_and_each_point_is_optimal():
    """No point is matched by a cheaper one; brute force agrees with each."""
    outputs = some_outputs(5, seed=2)
    costs = dict(zip(outputs.members, [3.0, 1.0, 4.0, 1.5, 5.0], strict=True))
    front = pareto_front(outputs, costs)
    assert all(a.cost > b.cost and a.loss < b.loss for a, b in pairwise(front))
    P, numbers = outputs.true_class().numpy(), np.array(list(costs.values()))
    for point in front:
        assert point.loss == pytest.approx(brute_force(P, numbers, point.cost + 1e-9, 5), abs=4e-6)


def test_a_front_with_no_member_within_the_limit_is_refused():
    """As in a selection: an empty list would hide it."""
    with pytest.raises(ValueError, match="expected a member within 5, got costs of 10 and more"):
        pareto_front(some_outputs(2), {"m0": 10, "m1": 20}, max_parameters=5)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_subset_by_brier_score_is_that_of_brute_force(seed):
    """Every subset fitted; equal members take part once."""
    generator = np.random.default_rng(seed)
    outputs = some_outputs(5, seed=seed)
    rows = dict(zip(outputs.members, outputs.probabilities, strict=True))
    outputs = ensemble.MemberOutputs.from_probabilities(rows | {"twin": rows["m0"]}, labels=outputs.labels)
    costs = dict(zip(outputs.members, generator.integers(1, 10, 6).astype(float), strict=True))
    budget, most = min(costs.values()) + 8, int(generator.integers(1, 4))
    found = select(outputs, budget, costs, metric="brier", max_members=most)
    subsets = [c for k in range(1, most + 1) for c in combinations(outputs.members, k)]
    losses = [
        ensemble.fit_weights(outputs.subset(c), "brier").loss for c in subsets if sum(map(costs.get, c)) <= budget
    ]
    assert found.loss == pytest.approx(min(losses), abs=2e-6)
    assert found.bound <= min(losses) + 1e-9
    assert found.proven
    assert ensemble.judge.score(found.rule(outputs.subset(found.members).probabilities), outputs.labels, "brier") == (
        pytest.approx(found.loss, abs=1e-6)
    )


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_decisions_are_picked_within_the_limits(metric):
    """At least as good as the best member that fits; the bound holds for all that fit."""
    outputs = some_outputs(6, N=100)
    costs = dict(zip(outputs.members, [4.0, 3.0, 2.0, 6.0, 1.0, 9.0], strict=True))
    found = select(outputs, 8, costs, metric=metric, max_members=3)
    assert found.cost <= 8
    assert len(found.members) <= 3
    single = {
        name: ensemble.judge.score(outputs.subset([name]).probabilities[0], outputs.labels, metric) for name in costs
    }
    assert found.loss <= 1 - max(value for name, value in single.items() if costs[name] <= 8) + 1e-9
    pools = [ensemble.greedy(outputs.subset(c), metric=metric).value for k in (1, 2, 3) for c in combinations(costs, k)]
    assert found.bound <= 1 - max(pools) + 1e-12
    assert (found.metric, found.nodes, found.proven) == (metric, 0, False)
    front = pareto_front(outputs, costs, metric=metric)
    assert all(a.cost > b.cost and a.loss < b.loss for a, b in pairwise(front))


def test_a_proof_for_decisions_needs_a_bound_that_is_reached():
    """Always right is the best there is."""
    rows = {"good": [[0.9, 0.1], [0.2, 0.8]], "fair": [[0.6, 0.4], [0.6, 0.4]]}
    outputs = ensemble.MemberOutputs.from_probabilities(rows, labels=[0, 1])
    found = select(outputs, np.inf, metric="accuracy")
    assert (found.members, found.loss, found.proven) == (("good",), 0.0, True)
    with pytest.raises(ValueError, match="no metric named 'nll'"):
        select(outputs, np.inf, metric="nll")
    for limit in (-1, np.nan):
        with pytest.raises(ValueError, match=f"limit of bytes of at least 0, got {limit}"):
            select(outputs, np.inf, max_bytes=limit)
    with pytest.raises(ValueError, match="a member within 1, got costs of 2 and more"):
        select(outputs, 1, dict.fromkeys(rows, 2), metric="macro_f1")
