"""Rules with numbers, and rules made of rules: cases worked out by hand, identities, members by name."""

import functools

import numpy as np
import pytest
import torch
from conftest import random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import ensemble
from ensemble.rules.fitted import Among, BayesVote, Chain, ClasswiseMean, LogPool, Stacked, Temperature


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3))
def test_weighted_mean_is_the_sum_it_says(weights: list[float]) -> None:
    """Any scale of weights gives the normalised sum; lists, arrays and tensors alike."""
    p = random_rows(len(weights), 7, 3)
    expected = np.tensordot(np.array(weights) / sum(weights), p.numpy(), 1)
    for given_as in (weights, np.array(weights), torch.tensor(weights, dtype=torch.float64)):
        np.testing.assert_allclose(ensemble.WeightedMean(given_as)(p).numpy(), expected, rtol=1e-9, atol=1e-15)


def test_weighted_mean_obeys_the_identities() -> None:
    """Equal weights are the mean; a copy is a doubled weight; weight 0 is absence."""
    p = random_rows(3, 20, 4)
    same = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    same(ensemble.WeightedMean([2, 2, 2])(p), ensemble.mean(p))
    same(ensemble.WeightedMean([2, 1, 1])(p), ensemble.WeightedMean([1, 1, 1, 1])(p[[0, 0, 1, 2]]))
    same(ensemble.WeightedMean([1, 0, 3])(p), ensemble.WeightedMean([1, 3])(p[[0, 2]]))


def test_a_zero_is_no_veto_in_a_log_linear_pool() -> None:
    """It counts as 1e-30: to the power of a tenth a thousandth."""
    p = torch.tensor([[[0.0, 1.0]], [[0.9, 0.1]]], dtype=torch.float64)
    expected = torch.tensor([[1e-3 * 0.9**2, 0.1**2]], dtype=torch.float64)
    torch.testing.assert_close(LogPool([0.1, 2])(p), expected / expected.sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(LogPool([0, 1])(p), p[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [ensemble.WeightedMean, LogPool])
def test_a_member_of_weight_zero_never_poisons(kind: type[ensemble.WeightedMean] | type[LogPool]) -> None:
    """NaN from a member without weight has no effect, not even where the others contradict each other."""
    p = random_rows(3, 20, 4)
    p[0, 0], p[2, 0] = torch.eye(4)[0], torch.eye(4)[1]
    p[1] = torch.nan
    torch.testing.assert_close(kind([1, 0, 2])(p), kind([1, 2])(p[[0, 2]]), rtol=1e-9, atol=0)


def test_abstaining_members_are_left_out_frame_by_frame() -> None:
    """The rest is renormalised; where all members abstain, all classes are equal."""
    p = torch.tensor([[[0.8, 0.2]] * 3, [[0.2, 0.8]] * 3])
    p[0, 1] = p[:, 2] = torch.nan
    rows = ensemble.WeightedMean([3, 1], abstain=True)(p)
    torch.testing.assert_close(rows, torch.tensor([[0.65, 0.35], [0.2, 0.8], [0.5, 0.5]]))
    assert ensemble.rules.abstentions(p).tolist() == [2, 1]
    assert ensemble.WeightedMean([3, 1])(p)[1].isnan().all()


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1], [[1, 2]]])
def test_weights_that_are_none_are_refused(weights: object) -> None:
    """Empty, negative, not finite, all zero or nested weights do not make a rule."""
    with pytest.raises(ValueError, match=r"expected .*weights"):
        ensemble.WeightedMean(weights)  # type: ignore[arg-type]


def test_the_number_of_members_must_fit() -> None:
    """Two weights cannot pool three members."""
    with pytest.raises(ValueError, match="probabilities of 2 members, as many as the rule has, got 3"):
        ensemble.WeightedMean([1, 1])(random_rows(3, 4, 2))


def test_log_pool_with_equal_weights_is_the_table_rule() -> None:
    """Weights 1/M are `log_mean`, weights 1 are `product`."""
    p = random_rows(4, 20, 3)
    torch.testing.assert_close(LogPool([0.25] * 4)(p), ensemble.log_mean(p), rtol=1e-9, atol=0)
    torch.testing.assert_close(LogPool([1] * 4)(p), ensemble.product(p), rtol=1e-9, atol=0)


def test_temperature_divides_logits() -> None:
    """On softmax outputs it is the softmax of the logits over the value, per member too."""
    logits = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = logits.softmax(-1)
    torch.testing.assert_close(Temperature(2.5)(p), (logits / 2.5).softmax(-1))
    each = (logits / torch.tensor([0.5, 3.0])[:, None, None]).softmax(-1)
    torch.testing.assert_close(Temperature((0.5, 3.0))(p), each)
    with pytest.raises(ValueError, match="positive temperatures, got"):
        Temperature(0.0)


def test_a_chain_is_a_rule() -> None:
    """Steps run in order, and the fingerprint is that of the first fitted one."""
    p = random_rows(2, 9, 4)
    chain = Chain((Temperature((0.5, 2.0), fingerprint="x"), ensemble.mean, Temperature(0.8)))
    by_hand = Temperature(0.8)(ensemble.mean(Temperature((0.5, 2.0))(p)))
    torch.testing.assert_close(chain(p), by_hand)
    assert chain.fingerprint == "x"


def test_bayes_vote_by_hand() -> None:
    """Predictions 0 with likelihoods .9 and .2, and 1 with .3 and .6, equal priors: .27 to .12."""
    tables = np.log([[[0.9, 0.2], [0.1, 0.8]], [[0.7, 0.4], [0.3, 0.6]]])
    rule = BayesVote(tables, np.log([0.5, 0.5]))  # type: ignore[arg-type]
    p = torch.tensor([[[0.6, 0.4]], [[0.1, 0.9]]], dtype=torch.float64)
    torch.testing.assert_close(rule(p), torch.tensor([[0.27, 0.12]], dtype=torch.float64) / 0.39)


def test_classwise_mean_by_hand() -> None:
    """The common pool predicts 0, 1, 1; class 0 takes the first member, class 1 the second threefold."""
    p = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]], [[0.4, 0.6], [0.4, 0.6], [0.0, 1.0]]])
    expected = torch.tensor([[0.9, 0.1], [0.35, 0.65], [0.1, 0.9]])
    torch.testing.assert_close(ClasswiseMean([1, 1], [[5, 0], [1, 3]])(p), expected)
    p[1, 0] = torch.nan
    torch.testing.assert_close(ClasswiseMean([1, 0], [[1, 0], [1, 3]])(p)[0], expected[0])


def test_classwise_mean_with_equal_rows_is_the_weighted_mean() -> None:
    """The same weights for every class leave nothing that depends on the class."""
    p = random_rows(3, 20, 4)
    rule = ClasswiseMean([1, 1, 1], [[1, 2, 5]] * 4)
    torch.testing.assert_close(rule(p), ensemble.WeightedMean([1, 2, 5])(p), rtol=1e-12, atol=0)


def test_classwise_weights_must_fit() -> None:
    """Each class has as many weights as there are members, and each class of the members has a row."""
    with pytest.raises(ValueError, match=r"row of 2 weights for each class, got rows of \[2, 3\]"):
        ClasswiseMean([1, 1], [[1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="probabilities of 2 classes, as many as the rule has, got 3"):
        ClasswiseMean([1, 1], [[1, 1]] * 2)(random_rows(2, 4, 3))


def test_stacked_by_hand() -> None:
    """Identity coefficients on one of two members return that member."""
    eye = np.zeros((3, 2, 3))
    eye[:, 1] = np.eye(3)
    p = random_rows(2, 9, 3)
    torch.testing.assert_close(Stacked(eye, [0, 0, 0])(p), p[1], rtol=1e-6, atol=1e-9)  # type: ignore[arg-type]


def test_tables_of_the_wrong_shape_are_refused() -> None:
    """The wanted shape is in the message."""
    with pytest.raises(ValueError, match=r"log likelihoods of shape \('M', 2, 2\), got shape \(2, 2\)"):
        BayesVote([[0, 0], [0, 0]], [0, 0])  # type: ignore[arg-type,list-item]


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
def test_members_without_influence_can_be_left_out(rule: ensemble.rules.FittedRule) -> None:
    """`used` lists the members that matter; the rule restricted to these gives the same rows."""
    p, used = random_rows(2, 20, 3), list(rule.used or range(2))
    torch.testing.assert_close(rule.restricted(used)(p[used]), rule(p))


def test_an_idle_member_is_left_out_of_every_kind_of_weights() -> None:
    """Weight 0 is absence, also inside a chain and among others."""
    p = random_rows(4, 20, 3)
    kinds = [
        ensemble.WeightedMean([1, 0, 3]),
        LogPool([1, 0, 3]),
        ClasswiseMean([1, 0, 1], [[1, 0, 0], [1, 0, 1], [0, 0, 1]]),
        Chain((Temperature((1.0, 2.0, 3.0)), ensemble.WeightedMean([1, 0, 3]), Temperature(2.0))),
    ]
    for rule in kinds:
        assert rule.used == (0, 2)
        torch.testing.assert_close(rule.restricted((0, 2))(p[[0, 2]]), rule(p[:3]), rtol=1e-9, atol=0)
        among = ensemble.rules.Among(rule, (3, 1, 0))
        assert among.used == (3, 0)
        torch.testing.assert_close(among.restricted((0, 3))(p[[0, 3]]), among(p), rtol=1e-9, atol=0)


def test_a_rule_finds_its_members_by_name() -> None:
    """In another order, among others, or with an idle one missing; a member that it needs is missed by name."""
    p = random_rows(4, 10, 3)
    rule = Chain((Temperature((2.0, 1.0, 0.5)), ensemble.WeightedMean([1, 0, 3], members=("a", "b", "c"))))
    for names, places in (("cab", [1, 2, 0]), ("dcab", [2, 3, 1])):
        found = ensemble.rules.rule_for(rule, list(names))
        torch.testing.assert_close(found(p[: len(names)]), rule(p[places]))
    torch.testing.assert_close(ensemble.rules.rule_for(rule, ["c", "a"])(p[:2]), rule(p[[1, 1, 0]]))
    with pytest.raises(ValueError, match=r"fitted on, \['a', 'b', 'c'\], got none named \['c'\] among \['a', 'b'\]"):
        ensemble.rules.rule_for(rule, ["a", "b"])
    bare = ensemble.WeightedMean([1, 2])
    assert ensemble.rules.rule_for(bare, ["x", "y"]) is bare
    with pytest.raises(ValueError, match="same members in one order"):
        Chain((Temperature((2.0, 1.0), members=("b", "a")), ensemble.WeightedMean([1, 3], members=("a", "b"))))
    with pytest.raises(ValueError, match="2 distinct names of members"):
        ensemble.WeightedMean([1, 3], members=("a", "a"))


# Probabilities that underflow: log-probabilities decide

LOW = torch.tensor([[0.0, -160.0, -200.0], [-300.0, -150.0, 0.0], [-180.0, 0.0, -170.0]])[:, None]  # (M, 1, C)
OF_SCORES = {  # a rule -> the scores whose softmax it is, from log-probabilities in float64
    ensemble.product: lambda logs: logs.sum(dim=0),
    ensemble.log_mean: lambda logs: logs.mean(dim=0),
    ensemble.minimum: lambda logs: logs.amin(dim=0),
    functools.partial(ensemble.rules.power_mean, power=0.01): lambda logs: (0.01 * logs).exp().mean(dim=0).log() / 0.01,
    Chain((Temperature((2.0, 1.0, 4.0)), ensemble.product)): lambda logs: (
        (logs / torch.tensor([2.0, 1.0, 4.0]).double()[:, None, None]).log_softmax(-1).sum(0)
    ),
    Chain((Temperature(50.0), ensemble.product)): lambda logs: (logs / 50).log_softmax(-1).sum(0),
    Chain((ensemble.product, Temperature(30.0))): lambda logs: logs.sum(0) / 30,
    Among(ensemble.product, (0, 2)): lambda logs: logs[[0, 2]].sum(0),
    Among(Chain((ensemble.log_mean, Temperature(30.0))), (2, 0)): lambda logs: logs[[0, 2]].mean(0) / 30,
    ensemble.abstaining(ensemble.product): lambda logs: logs.sum(0),
}


@pytest.mark.parametrize("rule", OF_SCORES)
def test_logarithmic_rules_lose_nothing_to_underflow(rule: ensemble.Rule) -> None:
    """The class of the summed logarithms, although every class has a member whose probability is zero in float32."""
    logs = LOW.log_softmax(dim=-1)
    declared = ensemble.rules.declared(rule)
    assert declared.logarithmic
    expected = OF_SCORES[rule](logs.double()).softmax(dim=-1)
    torch.testing.assert_close(declared.of_logs(logs).double(), expected, rtol=1e-4, atol=1e-6)
    outputs = ensemble.MemberOutputs(logs, ("a", "b", "c"), ("x", "y", "z"), torch.tensor([int(expected.argmax())]))
    assert ensemble.evaluate(outputs, {"rule": rule}, baseline="a").rules.accuracy.tolist() == [1.0]


def test_where_nothing_underflows_both_ways_agree() -> None:
    """Every rule of the table, and every rule with numbers."""
    p = random_rows(3, 20, 4)
    fitted = [LogPool([0.5, 1.0, 0.2]), Temperature((0.5, 1.0, 2.0)), ensemble.WeightedMean([1, 2, 3])]
    for rule in [*map(ensemble.get_rule, ensemble.list_rules()), *fitted, *OF_SCORES]:
        declared = ensemble.rules.declared(rule)
        torch.testing.assert_close(declared.of_logs(p.log()), rule(p), rtol=1e-9, atol=1e-12)


def test_members_that_abstain_are_left_out_of_logarithms_too() -> None:
    """The product of those that answer; with weights, the mean of those that answer in place of the others."""
    logs = LOW.log_softmax(dim=-1).clone()
    logs[1] = torch.nan
    product = ensemble.rules.declared(ensemble.abstaining(ensemble.product))
    torch.testing.assert_close(product.of_logs(logs), logs[[0, 2]].sum(dim=0).softmax(dim=-1))
    pool = LogPool([1.0, 1.0, 1.0])
    filled = ensemble.rules.declared(ensemble.abstaining(pool)).of_logs(logs)
    mean = torch.stack([logs[0], logs[0].exp().add(logs[2].exp()).div(2).log(), logs[2]])
    torch.testing.assert_close(filled, pool.of_logs(mean))
    assert product.of_logs(torch.full((3, 1, 3), torch.nan)).tolist() == [[pytest.approx(1 / 3)] * 3]


@pytest.mark.parametrize("rule", [ensemble.mean, ensemble.log_mean, LogPool([1.0, 0.5, 0.0])])
def test_a_rule_is_combined_block_by_block(rule: ensemble.Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that cover the frames once, with the rows of the rule over all of them."""
    monkeypatch.setattr("ensemble.rules.fitted._CELLS", 36)  # three frames
    p = random_rows(3, 7, 4)
    outputs = ensemble.MemberOutputs(p.log(), ("a", "b", "c"), ("w", "x", "y", "z"))
    blocks = list(ensemble.rules.combined(rule, outputs))
    assert [(where.start, where.stop) for where, _, _ in blocks] == [(0, 3), (3, 6), (6, 7)]
    torch.testing.assert_close(torch.cat([members for _, members, _ in blocks], dim=1), p.float())
    torch.testing.assert_close(torch.cat([rows for _, _, rows in blocks]), rule(p.float()))


def test_combined_gives_logarithms_to_logarithmic_rules() -> None:
    """Of exponentials that underflow, only the members' mean would be left."""
    far = ensemble.MemberOutputs(torch.tensor([[[0.0, -200.0]], [[-150.0, 0.0]]]), ("a", "b"), ("w", "x"))
    rows = next(ensemble.rules.combined(ensemble.log_mean, far))[2]
    torch.testing.assert_close(rows, torch.tensor([[0.0, -25.0]]).softmax(-1), rtol=1e-5, atol=0)


def test_combined_leaves_out_members_that_abstain() -> None:
    """Where the outputs declare it."""
    p = {"a": [[0.9, 0.1]], "b": [[np.nan, np.nan]]}
    outputs = ensemble.MemberOutputs.from_probabilities(p, abstain=True)
    torch.testing.assert_close(next(ensemble.rules.combined(ensemble.mean, outputs))[2], torch.tensor([[0.9, 0.1]]))
