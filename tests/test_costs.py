"""What members and rules cost: the parts that can be worked out by hand, and the laws of what is measured."""

import math

import numpy as np
import pytest
import torch

import ensemble
import zoo
from ensemble.rules import declared
from ensemble.run import measure_costs
from ensemble.run.costs import _Held, _measured
from zoo.logs import silent

CLASSES = ("a", "b", "c", "d")


def some_members(*depths: int) -> ensemble.Members:
    """One small member per depth; equal depths run as one."""
    specs = {
        f"m{place}": zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": depth})
        for place, depth in enumerate(depths)
    }
    modules = {name: zoo.build(spec, seed=place) for place, (name, spec) in enumerate(specs.items())}
    return ensemble.from_modules(modules, classes=CLASSES, specs=specs)


def test_every_member_and_rule_has_its_cost(frames: zoo.FrameSet) -> None:
    """In order; members of equal structure cost the same, and another of them no more than the first."""
    rules = {"mean": ensemble.mean, "some": ensemble.WeightedMean([0.0, 0.0, 1.0])}
    costs = measure_costs(some_members(1, 2, 1), frames, rules, repeats=2)
    assert [*costs] == ["m0", "m1", "m2", "mean", "some"]
    assert costs["m0"] == costs["m2"]
    assert [costs[name].kind for name in costs] == [0, 1, 0, None, None]
    for name, cost in costs.items():
        assert cost.memory is not None
        assert cost.memory > 0
        assert 0 <= cost.microseconds <= cost.alone or name in rules
    for name in rules:
        assert 0 < costs[name].alone < costs[name].microseconds
    assert costs["mean"].memory >= 3 * len(frames) * 4 * 4  # the outputs of three members in float32


def test_a_machine_that_slows_down_slows_down_all_alike() -> None:
    """Three rounds of which the last two take three times and twice as long: shares stay, the duration is a median."""

    class Timed:
        def __init__(self, *seconds: float) -> None:
            self.own, self.rounds = seconds, iter((1.0, 3.0, 2.0))
            self.rules = {f"rule {number}": declared(ensemble.mean) for number in range(len(seconds) - 1)}

        def seconds(self) -> list[float]:
            slower = next(self.rounds)
            return [slower * each for each in self.own]

    found = _measured([Timed(1.0), Timed(2.0, 0.5)], 3, silent)  # type: ignore[list-item]
    np.testing.assert_allclose(np.concatenate(found), [2.0, 4.0, 1.0])
    assert [len(each) for each in found] == [1, 2]


def test_memory_is_the_most_that_is_held_at_a_time() -> None:
    """Two tensors of four million bytes; what is let go of counts no longer, views and changes in place add none."""
    before = torch.zeros(1000)
    with _Held() as held:
        first = torch.zeros(1000, 1000)
        first.add_(1)
        first.view(-1)[:10].zero_()
        before.add_(1)
        assert held.most == 4_000_000
        second = first + 1
        del first
        third = second * 2
        del second
        del third
        torch.zeros(10)
    assert held.most == 8_000_000


def test_a_cascade_costs_what_it_asks(frames: zoo.FrameSet) -> None:
    """Its members run about the frames that need them: one that is always settled first costs one member."""
    members = some_members(1, 2, 3)
    first = ensemble.rules.Cascade(ensemble.WeightedMean([0.98, 0.01, 0.01]), threshold=0.0)
    asked = ensemble.Ensemble(members, first).ask(frames)[1]
    assert asked.tolist() == [1] * len(frames)
    costs = measure_costs(members, frames, {"mean": ensemble.mean, "first": first}, repeats=1)
    assert [*costs] == ["m0", "m1", "m2", "mean", "first"]
    assert costs["first"].memory < costs["mean"].memory  # the outputs of one member, not of three
    assert math.isnan(costs["first"].alone)
    assert costs["first"].microseconds > 0


def test_costs_go_into_reports_and_limits(frames: zoo.FrameSet) -> None:
    """A report shows them, and a selection keeps to them: one member by itself costs less than all."""
    members = some_members(1, 2, 3)
    outputs = ensemble.collect(members, frames)
    costs = measure_costs(members, frames, {"mean": ensemble.mean}, repeats=1)
    report = ensemble.evaluate(outputs, {"mean": ensemble.mean}, costs=costs)
    assert report.members["microseconds"].tolist() == [costs[name].microseconds for name in members.names]
    assert report.rules["memory"].tolist() == [costs["mean"].memory]
    limit = min(costs[name].alone for name in members.names)
    found = ensemble.select(outputs, max_microseconds=limit, costs=costs)
    assert len(found.members) == 1
    assert found.microseconds == pytest.approx(limit)
    assert found.size == outputs.subset(found.members).about[0].size


def test_inputs_and_members_of_any_kind_are_measured() -> None:
    """Rows, an input for each member, and a member outside torch, whose memory is unknown."""
    modules = ensemble.from_modules({"net": torch.nn.Linear(3, 2)}, classes=["0", "1"])
    both = modules + ensemble.from_callables(
        {"half": lambda x: np.full((len(x), 2), 0.5)}, classes=["0", "1"], returns="probabilities"
    )
    costs = measure_costs(
        both, {"net": torch.zeros(7, 3), "half": np.zeros((7, 2))}, {"mean": ensemble.mean}, repeats=1
    )
    assert costs["net"].memory
    assert costs["half"].memory is None
    assert costs["mean"].memory is None
    assert all(math.isfinite(cost.microseconds) for cost in costs.values())


@pytest.mark.parametrize(
    ("rows", "rules", "repeats", "words"),
    [
        (0, {}, 1, "at least one frame and one round to measure, got 0 and 1"),
        (5, {}, 0, "got 5 and 0"),
        (5, {"m": ensemble.mean}, 1, r"names for rules that no member has, got \['m'\]"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    rows: int, rules: dict[str, ensemble.Rule], repeats: int, words: str
) -> None:
    """Nothing to run, or a name that would mean two things."""
    members = ensemble.from_modules({"m": torch.nn.Linear(3, 2)}, classes=["0", "1"])
    with pytest.raises(ValueError, match=words):
        measure_costs(members, torch.zeros(rows, 3), rules, repeats=repeats)
