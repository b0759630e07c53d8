"""Rules: laws over the whole table, cases worked out by hand, and rules there and back through JSON."""

import functools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ensemble
from ensemble.rules.fitted import BayesVote, Chain, ClasswiseMean, LogPool, Stacked, Temperature
from ensemble.rules.table import RULES

NAMES = ensemble.list_rules()
KEEPS_THE_ORDER_ONLY = {"majority", "borda"}  # of one member's classes; all others return its very row
GROWS_SURER = {"product"}  # a second copy is a second witness
KUNCHEVA = torch.tensor([[0.1, 0.5, 0.4], [0.0, 0.0, 1.0], [0.4, 0.3, 0.4], [0.2, 0.7, 0.1], [0.1, 0.8, 0.2]])[:, None]


def said(members: int, frames: int, classes: int, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    """(M, N, C) random distributions in float64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(members, frames, classes, generator=generator, dtype=torch.float64) * scale).softmax(-1)


shapes = st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 5))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), hard=st.booleans())
def test_rows_sum_to_one(name: str, shape: tuple[int, int, int], seed: int, hard: bool) -> None:
    """Every rule returns distributions, also from members that rule classes out entirely."""
    p = said(*shape, seed=seed)
    if hard:
        p = torch.nn.functional.one_hot(p.argmax(-1), shape[2]).double()
    rows = RULES[name](p)
    assert rows.shape == p.shape[1:]
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(-1), torch.ones(shape[1], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_members_does_not_matter(name: str) -> None:
    """A permutation of the members changes nothing but rounding."""
    p = said(5, 40, 4)
    torch.testing.assert_close(RULES[name](p[[3, 0, 4, 1, 2]]), RULES[name](p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_classes_is_carried_along(name: str) -> None:
    """A permutation of the classes permutes the columns."""
    p, order = said(5, 40, 4), [2, 0, 3, 1]
    torch.testing.assert_close(RULES[name](p[..., order]), RULES[name](p)[:, order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_member_is_itself(name: str) -> None:
    """A single member's row comes back, or at least its order of classes."""
    p = said(1, 40, 4)
    rows = RULES[name](p)
    torch.testing.assert_close(rows.argmax(-1), p[0].argmax(-1))
    if name not in KEEPS_THE_ORDER_ONLY:
        torch.testing.assert_close(rows, p[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_all_members_change_no_decision(name: str) -> None:
    """Every member twice decides as every member once; means even give the same rows."""
    p = said(5, 60, 4)
    once, twice = RULES[name](p), RULES[name](torch.cat([p, p]))
    torch.testing.assert_close(once.argmax(-1), twice.argmax(-1))
    if name not in KEEPS_THE_ORDER_ONLY | GROWS_SURER:
        torch.testing.assert_close(once, twice, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_agreement_is_kept(name: str) -> None:
    """Where all members put one class first with the same row, the rule does too."""
    p = said(1, 40, 4).expand(5, -1, -1)
    torch.testing.assert_close(RULES[name](p).argmax(-1), p[0].argmax(-1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_follows_the_input(name: str, dtype: torch.dtype) -> None:
    """Rules compute in the precision they are given and lose no row to it."""
    rows = RULES[name](said(4, 10, 5).to(dtype))
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.double().sum(-1), torch.ones(10, dtype=torch.float64), rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_numpy_in_numpy_out(name: str) -> None:
    """Arrays are answered with arrays of the same numbers."""
    p = said(3, 10, 4)
    rows = RULES[name](p.numpy())
    assert isinstance(rows, np.ndarray)
    np.testing.assert_array_equal(rows, RULES[name](p).numpy())


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_is_checked_at_the_door(name: str) -> None:
    """A flat array is refused with its shape in the message."""
    with pytest.raises(ValueError, match=r"shape \(members, frames, classes\), got \(4, 3\)"):
        RULES[name](torch.ones(4, 3))


def test_frames_stand_alone_in_every_rule() -> None:
    """A frame's answer does not depend on the frames beside it, so blocks give what the whole gives."""
    p = said(4, 30, 5)
    for name in NAMES:
        halves = torch.cat([RULES[name](p[:, :11]), RULES[name](p[:, 11:])])
        torch.testing.assert_close(halves, RULES[name](p), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "winner"), [("mean", 1), ("product", 2), ("maximum", 2), ("minimum", 2), ("median", 1)]
)
def test_the_published_example(name: str, winner: int) -> None:
    """Kuncheva's five members and three classes, "Combining pattern classifiers", 2004, section 5.2."""
    assert int(RULES[name](KUNCHEVA).argmax()) == winner


def test_published_means() -> None:
    """The same example's averages, medians and trimmed means, by eye: (.16, .46, .42) and (.1, .5, .4)."""
    torch.testing.assert_close(ensemble.mean(KUNCHEVA), torch.tensor([[0.16, 0.46, 0.42]]))
    torch.testing.assert_close(ensemble.median(KUNCHEVA), torch.tensor([[0.1, 0.5, 0.4]]))
    torch.testing.assert_close(
        ensemble.rules.trimmed_mean(KUNCHEVA, trim=0.2), torch.tensor([[0.4, 1.5, 1.0]]) / 2.9, rtol=1e-6, atol=0
    )


def test_majority_counts_votes_first() -> None:
    """Two lukewarm votes beat one certain one: (2 + .4) / 4 against (1 + .6) / 4."""
    p = torch.tensor([[[0.6, 0.4]], [[0.6, 0.4]], [[0.0, 1.0]]])
    torch.testing.assert_close(ensemble.majority(p), torch.tensor([[0.6, 0.4]]))


def test_majority_breaks_ties_by_the_mean() -> None:
    """One vote each: the surer member decides, not the lower index."""
    p = torch.tensor([[[0.6, 0.4]], [[0.1, 0.9]]])
    torch.testing.assert_close(ensemble.majority(p), torch.tensor([[1.35, 1.65]]) / 3)
    assert ensemble.rules.tie_rate(p) == 1.0


def test_tie_rate_counts_only_the_top() -> None:
    """A tie for second place is none: 2, 1, 1 votes."""
    p = torch.eye(3)[[0, 0, 1, 2]][:, None]
    assert ensemble.rules.tie_rate(p) == 0.0
    assert ensemble.rules.tie_rate(p[1:]) == 1.0
    assert ensemble.rules.tie_rate(p[:, :0]) == 0.0


def test_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    """.1, .3, .5, .9 have .4, and .9, .7, .5, .1 have .6."""
    first = torch.tensor([0.5, 0.1, 0.9, 0.3], dtype=torch.float64)
    p = torch.stack([first, 1 - first], dim=-1)[:, None]
    torch.testing.assert_close(ensemble.median(p), torch.tensor([[0.4, 0.6]], dtype=torch.float64))


def test_who_abstains_has_no_vote() -> None:
    """One vote against a row of NaN is no tie."""
    p = torch.tensor([[[0.2, 0.8]], [[torch.nan, torch.nan]]])
    assert ensemble.rules.tie_rate(p) == 0.0


def test_majority_equals_the_loop() -> None:
    """The slow obvious vote, frame by frame."""
    p = said(7, 200, 4)
    for frame in range(200):
        votes = torch.bincount(p[:, frame].argmax(-1), minlength=4)
        expected = (votes + p[:, frame].mean(0)) / 8
        torch.testing.assert_close(ensemble.majority(p)[frame], expected, rtol=1e-12, atol=0)


def test_maximum_follows_the_surest_member_and_the_first_on_a_tie() -> None:
    """Its whole row is taken over."""
    p = torch.tensor([[[0.5, 0.3, 0.2]], [[0.2, 0.1, 0.7]], [[0.7, 0.2, 0.1]]])
    torch.testing.assert_close(ensemble.maximum(p), p[1])


def test_borda_by_hand() -> None:
    """Ranks 2, 1, 0 and 0, 1.5, 1.5 make 2, 2.5, 1.5 points of 6, plus half the mean."""
    p = torch.tensor([[[0.7, 0.2, 0.1]], [[0.2, 0.4, 0.4]]], dtype=torch.float64)
    expected = (torch.tensor([2, 2.5, 1.5]) + torch.tensor([0.45, 0.3, 0.25], dtype=torch.float64) / 2) / 6.5
    torch.testing.assert_close(ensemble.rules.borda(p)[0], expected, rtol=1e-6, atol=0)


def test_product_and_log_mean_by_hand() -> None:
    """.9 x .4 to .1 x .6 is 6 to 1; its root is the geometric mean's odds."""
    p = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]], dtype=torch.float64)
    torch.testing.assert_close(ensemble.product(p)[0, 0].item(), 6 / 7)
    torch.testing.assert_close(ensemble.log_mean(p)[0, 0].item(), 6**0.5 / (6**0.5 + 1))


def test_product_of_many_members_does_not_underflow() -> None:
    """500 members that agree on .5001 against .4999: 1e-150 each, yet the odds are (.5001/.4999)^500."""
    p = torch.tensor([0.5001, 0.4999], dtype=torch.float64).expand(500, 1, 2)
    odds = (0.5001 / 0.4999) ** 500
    torch.testing.assert_close(ensemble.product(p)[0, 0].item(), odds / (1 + odds))


@pytest.mark.parametrize("name", ["product", "log_mean", "minimum", "median"])
def test_where_every_class_is_ruled_out_the_mean_decides(name: str) -> None:
    """Certain members that contradict each other leave no NaN."""
    p = torch.eye(3)[:, None]
    torch.testing.assert_close(RULES[name](p), torch.full((1, 3), 1 / 3))


def test_power_mean_runs_from_geometric_to_maximum() -> None:
    """Power 1 is the mean, a tiny power the geometric mean, a large one the largest probability."""
    p = said(4, 50, 3)
    torch.testing.assert_close(ensemble.rules.power_mean(p, power=1), ensemble.mean(p), rtol=1e-9, atol=0)
    torch.testing.assert_close(ensemble.rules.power_mean(p, power=1e-6), ensemble.log_mean(p), rtol=1e-4, atol=0)
    highest = p.amax(0) / p.amax(0).sum(-1, keepdim=True)
    torch.testing.assert_close(ensemble.rules.power_mean(p, power=4000), highest, rtol=1e-3, atol=0)


def test_settings_outside_their_range_are_refused() -> None:
    """Ranges are named in the message."""
    with pytest.raises(ValueError, match=r"trim in \[0, 0.5\), got 0.5"):
        ensemble.rules.trimmed_mean(KUNCHEVA, trim=0.5)
    with pytest.raises(ValueError, match="positive power, got 0"):
        ensemble.rules.power_mean(KUNCHEVA, power=0)


def test_an_unknown_rule_names_the_nearest() -> None:
    """A slip of the finger is answered with the right name."""
    with pytest.raises(ValueError, match="no rule named 'medain'; did you mean 'median'"):
        ensemble.get_rule("medain")


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


# Rules with numbers


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3))
def test_weighted_mean_is_the_sum_it_says(weights: list[float]) -> None:
    """Any scale of weights gives the normalised sum; lists, arrays and tensors alike."""
    p = said(len(weights), 7, 3)
    expected = np.tensordot(np.array(weights) / sum(weights), p.numpy(), 1)
    for given_as in (weights, np.array(weights), torch.tensor(weights, dtype=torch.float64)):
        np.testing.assert_allclose(ensemble.WeightedMean(given_as)(p).numpy(), expected, rtol=1e-9, atol=1e-15)


def test_weighted_mean_obeys_the_identities() -> None:
    """Equal weights are the mean; a copy is a doubled weight; weight 0 is absence."""
    p = said(3, 20, 4)
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
    p = said(3, 20, 4)
    p[0, 0], p[2, 0] = torch.eye(4)[0], torch.eye(4)[1]
    p[1] = torch.nan
    torch.testing.assert_close(kind([1, 0, 2])(p), kind([1, 2])(p[[0, 2]]), rtol=1e-9, atol=0)


def test_abstaining_members_are_left_out_frame_by_frame() -> None:
    """The rest is renormalised; where nobody speaks, all classes are equal."""
    p = torch.tensor([[[0.8, 0.2]] * 3, [[0.2, 0.8]] * 3])
    p[0, 1] = p[:, 2] = torch.nan
    rows = ensemble.WeightedMean([3, 1], abstain=True)(p)
    torch.testing.assert_close(rows, torch.tensor([[0.65, 0.35], [0.2, 0.8], [0.5, 0.5]]))
    assert ensemble.rules.abstentions(p).tolist() == [2, 1]
    assert ensemble.WeightedMean([3, 1])(p)[1].isnan().all()


def with_silence(p: Tensor, *, seed: int = 0) -> Tensor:
    """About a third of the rows replaced by NaN; frame 0 whole, on frame 1 nobody speaks."""
    generator = torch.Generator().manual_seed(seed)
    silent = torch.rand(p.shape[:2], generator=generator) < 0.35
    silent[:, 0], silent[:, 1] = False, True
    return p.masked_fill(silent[..., None], torch.nan)


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_combines_those_who_speak(name: str) -> None:
    """Frame by frame the rule on the members that speak; equal classes where none does."""
    p = with_silence(said(5, 40, 4))
    rows = ensemble.abstaining(RULES[name])(p)
    torch.testing.assert_close(rows[1], torch.full((4,), 0.25, dtype=torch.float64))
    for frame in (0, *range(2, 40)):
        speakers = ~p[:, frame].isnan().any(dim=-1)
        alone = RULES[name](p[speakers, frame][:, None])[0] if speakers.any() else rows[1]
        torch.testing.assert_close(rows[frame], alone, rtol=1e-12, atol=0)


def test_where_all_speak_the_declaration_changes_nothing() -> None:
    """Rules of the table and rules with numbers, bit by bit."""
    p = said(2, 20, 3)
    for rule in (*RULES.values(), *(rule for rule in FITTED if not isinstance(rule, Temperature))):
        torch.testing.assert_close(ensemble.abstaining(rule)(p), rule(p), rtol=1e-12, atol=0)


def test_rules_with_numbers_hear_the_mean_in_a_silent_members_place() -> None:
    """All but the weighted mean, which has weights to renormalise; a chain prepares each of its steps."""
    p, filled = said(2, 20, 3), said(2, 20, 3)
    p[1, 4:] = torch.nan
    filled[1, 4:] = filled[0, 4:]
    for rule in FITTED:
        if isinstance(rule, LogPool | ClasswiseMean | BayesVote | Stacked):
            torch.testing.assert_close(ensemble.abstaining(rule)(p), rule(filled))
    chain = Chain((Temperature((2.0, 0.5)), ensemble.WeightedMean([1, 3]), Temperature(1.5)))
    expected = Temperature(1.5)(Temperature(2.0)(p[0, 4:]))
    torch.testing.assert_close(ensemble.abstaining(chain)(p)[4:], expected)


def test_a_rule_that_hears_abstentions_is_kept_like_any_other() -> None:
    """Through JSON and back; it says where it was fitted; preparing it twice is preparing it once."""
    for rule in (ensemble.median, functools.partial(ensemble.rules.power_mean, power=2.0), *FITTED):
        heard = ensemble.abstaining(rule)
        back = ensemble.rules.rule_from_json(json.loads(json.dumps(ensemble.rules.rule_to_json(heard))))
        p = said(2, 5, 3)
        torch.testing.assert_close(back(p), heard(p))
        assert getattr(heard, "fingerprint", "") == getattr(rule, "fingerprint", "")
        assert ensemble.abstaining(heard) == heard


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1], [[1, 2]]])
def test_weights_that_are_none_are_refused(weights: object) -> None:
    """Empty, negative, not finite, all zero or nested weights do not make a rule."""
    with pytest.raises(ValueError, match=r"expected .*weights"):
        ensemble.WeightedMean(weights)  # type: ignore[arg-type]


def test_the_number_of_members_must_fit() -> None:
    """Two weights cannot pool three members."""
    with pytest.raises(ValueError, match="probabilities of 2 members, as many as the rule has, got 3"):
        ensemble.WeightedMean([1, 1])(said(3, 4, 2))


def test_log_pool_with_equal_weights_is_the_table_rule() -> None:
    """Weights 1/M are `log_mean`, weights 1 are `product`."""
    p = said(4, 20, 3)
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
    """Steps run in order, and the first fitted one says where it was fitted."""
    p = said(2, 9, 4)
    chain = Chain((Temperature((0.5, 2.0), fingerprint="x"), ensemble.mean, Temperature(0.8)))
    by_hand = Temperature(0.8)(ensemble.mean(Temperature((0.5, 2.0))(p)))
    torch.testing.assert_close(chain(p), by_hand)
    assert chain.fingerprint == "x"


def test_bayes_vote_by_hand() -> None:
    """Says 0 with likelihoods .9 and .2, says 1 with .3 and .6, priors equal: .27 to .12."""
    tables = np.log([[[0.9, 0.2], [0.1, 0.8]], [[0.7, 0.4], [0.3, 0.6]]])
    rule = BayesVote(tables, np.log([0.5, 0.5]))  # type: ignore[arg-type]
    p = torch.tensor([[[0.6, 0.4]], [[0.1, 0.9]]], dtype=torch.float64)
    torch.testing.assert_close(rule(p), torch.tensor([[0.27, 0.12]], dtype=torch.float64) / 0.39)


def test_classwise_mean_by_hand() -> None:
    """The common pool says 0, 1, 1; class 0 listens to the first member, class 1 three times more to the second."""
    p = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]], [[0.4, 0.6], [0.4, 0.6], [0.0, 1.0]]])
    expected = torch.tensor([[0.9, 0.1], [0.35, 0.65], [0.1, 0.9]])
    torch.testing.assert_close(ClasswiseMean([1, 1], [[5, 0], [1, 3]])(p), expected)
    p[1, 0] = torch.nan
    torch.testing.assert_close(ClasswiseMean([1, 0], [[1, 0], [1, 3]])(p)[0], expected[0])


def test_classwise_mean_with_equal_rows_is_the_weighted_mean() -> None:
    """The same weights for every class leave nothing that depends on the class."""
    p = said(3, 20, 4)
    rule = ClasswiseMean([1, 1, 1], [[1, 2, 5]] * 4)
    torch.testing.assert_close(rule(p), ensemble.WeightedMean([1, 2, 5])(p), rtol=1e-12, atol=0)


def test_classwise_weights_must_fit() -> None:
    """Each class has as many weights as there are members, and each class of the members has a row."""
    with pytest.raises(ValueError, match=r"row of 2 weights for each class, got rows of \[2, 3\]"):
        ClasswiseMean([1, 1], [[1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="probabilities of 2 classes, as many as the rule has, got 3"):
        ClasswiseMean([1, 1], [[1, 1]] * 2)(said(2, 4, 3))


def test_stacked_by_hand() -> None:
    """Identity coefficients on one of two members return that member."""
    eye = np.zeros((3, 2, 3))
    eye[:, 1] = np.eye(3)
    p = said(2, 9, 3)
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


# What rules declare


def test_rules_declare_whether_they_have_numbers_and_where_they_come_from() -> None:
    """A function has none; bare weights come from nowhere that is known; a chain knows each of its origins."""
    assert not ensemble.rules.declared(ensemble.mean).has_numbers
    assert not ensemble.rules.declared(functools.partial(ensemble.rules.power_mean, power=2)).fingerprints
    bare = ensemble.rules.declared(ensemble.WeightedMean([1, 2]))
    assert (bare.has_numbers, bare.fingerprint, bare.members, bare.used) == (True, "", (), (0, 1))
    chain = Chain((ensemble.WeightedMean([0, 2]), Temperature(2.0, "x")))
    assert (chain.fingerprints, chain.fingerprint, chain.used) == (("", "x"), "x", (1,))


@pytest.mark.parametrize("rule", FITTED, ids=lambda rule: type(rule).__name__)
def test_members_without_influence_can_be_left_out(rule: ensemble.rules.FittedRule) -> None:
    """`used` tells who matters, and the rule restricted to these gives the same rows."""
    if rule.used is None:
        with pytest.raises(ValueError, match="expected a rule that can leave members out"):
            ensemble.rules.FittedRule.restricted(rule, [0])
        return
    p = said(2, 20, 3)
    torch.testing.assert_close(rule.restricted(rule.used)(p[list(rule.used)]), rule(p))


def test_an_idle_member_is_left_out_of_every_kind_of_weights() -> None:
    """Weight 0 is absence, also inside a chain and among others."""
    p = said(4, 20, 3)
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
    p = said(4, 10, 3)
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


def test_names_of_members_are_written_where_they_are_known() -> None:
    """What the version before wrote is read as it was; its fields stand as they did."""
    before = {"rule": "WeightedMean", "weights": [0.25, 0.75], "fingerprint": "f", "abstain": False}
    back = ensemble.rules.rule_from_json(before)
    assert back == ensemble.WeightedMean([1, 3], "f")
    assert ensemble.rules.rule_to_json(back) == before
    named = ensemble.WeightedMean([1, 3], "f", members=("a", "b"))
    assert ensemble.rules.rule_to_json(named) == {**before, "members": ["a", "b"]}
    assert ensemble.rules.rule_from_json({**before, "members": ["a", "b"]}) == named
    assert named.by_position == back


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

    def __call__(self, probabilities):
        return probabilities[self.position]
"""


def test_a_rule_and_a_fitted_rule_are_one_file_each(tmp_path: Path) -> None:
    """Through the public decorators they are found by name, read back, judged, told apart, and may abstain."""
    (tmp_path / "mine.py").write_text(MODULE)
    space = runpy.run_path(str(tmp_path / "mine.py"))
    try:
        p = said(3, 20, 4)
        fitted = space["Favourite"](1, "f", ("a", "b", "c"))
        for rule in (space["last"], fitted):
            torch.testing.assert_close(rule(p).sum(-1), torch.ones(20, dtype=torch.float64))
            back = ensemble.rules.rule_from_json(json.loads(json.dumps(ensemble.rules.rule_to_json(rule))))
            torch.testing.assert_close(back(p), rule(p))
            rows = ensemble.abstaining(rule)(with_silence(p))
            torch.testing.assert_close(rows.sum(-1), torch.ones(20, dtype=torch.float64))
        assert ensemble.get_rule("last") is space["last"]
        torch.testing.assert_close(
            ensemble.rules.rule_for(fitted, ["b", "x", "a", "c"])(said(4, 5, 2)), said(4, 5, 2)[0]
        )
    finally:
        RULES.pop("last", None)
        ensemble.rules.FITTED_RULES.pop("Favourite", None)
