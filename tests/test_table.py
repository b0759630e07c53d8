"""What a rule is: tables, JSON there and back, what rules declare, members that abstain."""

import functools
import json
import runpy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ensemble
from ensemble.rules.fitted import BayesVote, Chain, ClasswiseMean, LogPool, Stacked, Temperature
from ensemble.rules.table import RULES, declared

NAMES = ensemble.list_rules()


KUNCHEVA = torch.tensor([[0.1, 0.5, 0.4], [0.0, 0.0, 1.0], [0.4, 0.3, 0.4], [0.2, 0.7, 0.1], [0.1, 0.8, 0.2]])[:, None]


def test_an_unknown_rule_names_the_nearest() -> None:
    """A slip of the finger is answered with the right name."""
    with pytest.raises(ValueError, match="no rule named 'medain'; did you mean 'median'"):
        ensemble.get_rule("medain")


@pytest.mark.parametrize("strange", [None, "mean", 5, [ensemble.mean], np.zeros((2, 3)), {}])
def test_what_is_no_rule_is_refused_by_name(strange: object) -> None:
    """Also where it has no hash."""
    with pytest.raises(TypeError, match=r"expected a rule, such as ensemble\.mean or the rule of a fit, got "):
        declared(strange)  # type: ignore[arg-type]


@dataclass
class Sharpest:
    """A rule that can be changed, and so has no hash."""

    place: int = 0

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """(N, C) of one member."""
        return probabilities[self.place]


def test_a_rule_without_a_hash_is_a_rule() -> None:
    """It is judged like any other."""
    outputs = ensemble.MemberOutputs.from_probabilities({"a": [[0.9, 0.1]], "b": [[0.2, 0.8]]}, labels=[1])
    assert ensemble.evaluate(outputs, {"own": Sharpest(1)}).rules["accuracy"].tolist() == [1.0]


def test_a_rule_of_ones_own_enters_the_table_once() -> None:
    """`@rule` keeps the name and refuses to shadow a built-in rule."""

    @ensemble.rule
    def first(probabilities: Tensor) -> Tensor:
        return probabilities[0]

    def mean(probabilities: Tensor) -> Tensor:
        return probabilities[0]

    try:
        assert ensemble.get_rule("first") is first
        assert ensemble.rules.rule_to_json(first) == {"rule": "first"}
        with pytest.raises(ValueError, match="new name for a rule, got 'mean'"):
            ensemble.rule(mean)
    finally:
        del RULES["first"]


def with_abstentions(p: Tensor, *, seed: int = 0) -> Tensor:
    """About a third of the rows replaced by NaN; frame 0 whole, on frame 1 all members abstain."""
    generator = torch.Generator().manual_seed(seed)
    absent = torch.rand(p.shape[:2], generator=generator) < 0.35
    absent[:, 0], absent[:, 1] = False, True
    return p.masked_fill(absent[..., None], torch.nan)


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_combines_the_members_that_do_not_abstain(name: str) -> None:
    """Frame by frame the rule over the members that do not abstain; equal classes where all do."""
    p = with_abstentions(random_rows(5, 40, 4))
    rows = ensemble.abstaining(RULES[name])(p)
    torch.testing.assert_close(rows[1], torch.full((4,), 0.25, dtype=torch.float64))
    for frame in (0, *range(2, 40)):
        present = ~p[:, frame].isnan().any(dim=-1)
        alone = RULES[name](p[present, frame][:, None])[0] if present.any() else rows[1]
        torch.testing.assert_close(rows[frame], alone, rtol=1e-12, atol=0)


def test_where_no_member_abstains_nothing_changes() -> None:
    """Rules of the table and rules with numbers, bit by bit."""
    p = random_rows(2, 20, 3)
    for rule in (*RULES.values(), *(rule for rule in FITTED if not isinstance(rule, Temperature))):
        torch.testing.assert_close(ensemble.abstaining(rule)(p), rule(p), rtol=1e-12, atol=0)


def test_rules_with_numbers_take_the_mean_for_a_member_that_abstains() -> None:
    """All but the weighted mean, which has weights to renormalise; a chain prepares each of its steps."""
    p, filled = random_rows(2, 20, 3), random_rows(2, 20, 3)
    p[1, 4:] = torch.nan
    filled[1, 4:] = filled[0, 4:]
    for rule in FITTED:
        if isinstance(rule, LogPool | ClasswiseMean | BayesVote | Stacked):
            torch.testing.assert_close(ensemble.abstaining(rule)(p), rule(filled))
    chain = Chain((Temperature((2.0, 0.5)), ensemble.WeightedMean([1, 3]), Temperature(1.5)))
    expected = Temperature(1.5)(Temperature(2.0)(p[0, 4:]))
    torch.testing.assert_close(ensemble.abstaining(chain)(p)[4:], expected)


def test_a_rule_prepared_for_abstentions_is_written_like_any_other() -> None:
    """Through JSON and back; it knows where it was fitted; preparing it twice is preparing it once."""
    for rule in (ensemble.median, functools.partial(ensemble.rules.power_mean, power=2.0), *FITTED):
        prepared = ensemble.abstaining(rule)
        back = ensemble.rules.rule_from_json(json.loads(json.dumps(ensemble.rules.rule_to_json(prepared))))
        p = random_rows(2, 5, 3)
        torch.testing.assert_close(back(p), prepared(p))
        assert ensemble.rules.declared(prepared).fingerprint == ensemble.rules.declared(rule).fingerprint
        assert ensemble.abstaining(prepared) == prepared


FITTED = [
    ensemble.WeightedMean([1, 3], fingerprint="abc"),
    LogPool([0.5, 0.7]),
    ClasswiseMean([1, 3], [[1, 0], [2, 6], [1, 1]], fingerprint="abc"),
    Temperature(1.5),
    Chain((Temperature((1.5, 0.5)), ensemble.mean, Temperature(1.1))),
    BayesVote(np.zeros((2, 3, 3)), np.zeros(3)),  # type: ignore[arg-type]
    Stacked(np.ones((3, 2, 3)), np.zeros(3), fingerprint="abc"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("rule", FITTED, ids=lambda rule: type(rule).__name__)
def test_fitted_rules_come_back_equal(rule: ensemble.Rule) -> None:
    """Through JSON text and back, a rule is equal and hashes alike."""
    back = ensemble.rules.rule_from_json(json.loads(json.dumps(ensemble.rules.rule_to_json(rule))))
    assert back == rule
    assert hash(back) == hash(rule)


@pytest.mark.parametrize("name", NAMES)
def test_table_rules_come_back_as_themselves(name: str) -> None:
    """A name in the table is all there is to write."""
    assert ensemble.rules.rule_to_json(RULES[name]) == {"rule": name}
    assert ensemble.rules.rule_from_json({"rule": name}) is RULES[name]


def test_settings_of_a_table_rule_are_kept() -> None:
    """A bound keyword goes through JSON."""
    back = ensemble.rules.rule_from_json(
        ensemble.rules.rule_to_json(functools.partial(ensemble.rules.power_mean, power=2.0))
    )
    torch.testing.assert_close(back(KUNCHEVA), ensemble.rules.power_mean(KUNCHEVA, power=2.0))


def test_what_cannot_be_written_or_read_is_refused() -> None:
    """Functions outside the table, unknown names, unknown fields."""
    with pytest.raises(ValueError, match=r"not in the table; put @ensemble\.rule above"):
        ensemble.rules.rule_to_json(lambda p: p[0])
    with pytest.raises(ValueError, match=r"no rule named 'os\.system'"):
        ensemble.rules.rule_from_json({"rule": "os.system"})
    with pytest.raises(ValueError, match=r"WeightedMean with some of .*, got {'wights': \[1\]}"):
        ensemble.rules.rule_from_json({"rule": "WeightedMean", "wights": [1]})
    with pytest.raises(ValueError, match=r"power_mean with some of \['power'\], got {'powr': 2}"):
        ensemble.rules.rule_from_json({"rule": "power_mean", "powr": 2})


NO_RULES = [None, 1, [], {}, {"rule": None}, {"rule": "Chain"}, {"rule": "Abstaining"}, {"rule": "mean", "of": 1}]


@pytest.mark.parametrize("data", NO_RULES + [{"rule": "Chain", "steps": [data]} for data in NO_RULES], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_data_that_is_no_rule_is_refused_by_one_kind_of_error(data: object, wrapped: bool) -> None:
    """Whatever a file holds in place of a rule, also inside another."""
    with pytest.raises(ValueError, match="rule"):
        ensemble.rules.rule_from_json({"rule": "Abstaining", "of": data} if wrapped else data)  # type: ignore[arg-type]


def test_rules_declare_whether_they_have_numbers_and_where_they_come_from() -> None:
    """A function has none; bare weights come from nowhere that is known; a chain knows each of its origins."""
    assert not ensemble.rules.declared(ensemble.mean).has_numbers
    assert not ensemble.rules.declared(functools.partial(ensemble.rules.power_mean, power=2)).fingerprints
    bare = ensemble.rules.declared(ensemble.WeightedMean([1, 2]))
    assert (bare.has_numbers, bare.fingerprint, bare.members, bare.used) == (True, "", (), (0, 1))
    chain = Chain((ensemble.WeightedMean([0, 2]), Temperature(2.0, "x")))
    assert (chain.fingerprints, chain.fingerprint, chain.used) == (("", "x"), "x", (1,))


def test_names_of_members_are_written_where_they_are_known() -> None:
    """What the version before wrote is read as it was; its fields stand as they did."""
    before = {"rule": "WeightedMean", "weights": [0.25, 0.75], "fingerprint": "f", "abstain": False}
    back = ensemble.rules.rule_from_json(before)
    assert back == ensemble.WeightedMean([1, 3], "f")
    assert ensemble.rules.rule_to_json(back) == before
    named = ensemble.WeightedMean([1, 3], "f", members=("a", "b"))
    assert ensemble.rules.rule_to_json(named) == {**before, "members": ["a", "b"]}
    assert ensemble.rules.rule_from_json({**before, "members": ["a", "b"]}) == named
    assert named.restricted((0, 1)) == back


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=9).filter(lambda w: sum(w) > 1e-3))
def test_weights_come_back_bit_by_bit(weights: list[float]) -> None:
    """They are normalised once, when made, and not again when read."""
    rule = ensemble.WeightedMean(weights)
    assert ensemble.rules.rule_from_json(ensemble.rules.rule_to_json(rule)) == rule


MODULE = """
from dataclasses import dataclass

import ensemble


@ensemble.rule
def last(probabilities):
    return probabilities[-1]


@ensemble.rules.fitted_rule
@dataclass(frozen=True)
class Favourite(ensemble.rules.FittedRule):
    position: int
    fingerprint: str = ""
    members: tuple[str, ...] = ()

    def _combine(self, probabilities):
        return probabilities[self.position]
"""


def test_a_rule_and_a_fitted_rule_are_one_file_each(tmp_path: Path) -> None:
    """Through the public decorators they are found by name, read back and applied, also where members abstain."""
    (tmp_path / "mine.py").write_text(MODULE)
    space = runpy.run_path(str(tmp_path / "mine.py"))
    try:
        p = random_rows(3, 20, 4)
        fitted = space["Favourite"](1, "f", ("a", "b", "c"))
        for rule in (space["last"], fitted):
            torch.testing.assert_close(rule(p).sum(-1), torch.ones(20, dtype=torch.float64))
            back = ensemble.rules.rule_from_json(json.loads(json.dumps(ensemble.rules.rule_to_json(rule))))
            torch.testing.assert_close(back(p), rule(p))
            rows = ensemble.abstaining(rule)(with_abstentions(p))
            torch.testing.assert_close(rows.sum(-1), torch.ones(20, dtype=torch.float64))
        assert ensemble.get_rule("last") is space["last"]
        with pytest.raises(
            ValueError, match="a rule that can leave members out, got Favourite, which needs all of them"
        ):
            fitted.restricted((0, 1))
        torch.testing.assert_close(
            ensemble.rules.rule_for(fitted, ["b", "x", "a", "c"])(random_rows(4, 5, 2)), random_rows(4, 5, 2)[0]
        )
    finally:
        RULES.pop("last", None)
        ensemble.rules.FITTED_RULES.pop("Favourite", None)
