"""Rules without numbers: laws over the whole table, and cases worked out by hand."""

import numpy as np
import pytest
import torch
from conftest import random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import ensemble
from ensemble.rules.table import RULES

NAMES = ensemble.list_rules()


KEEPS_THE_ORDER_ONLY = {"majority", "borda"}  # of one member's classes; all others return its very row


GROWS_SURER = {"product"}  # a second copy is a second witness


KUNCHEVA = torch.tensor([[0.1, 0.5, 0.4], [0.0, 0.0, 1.0], [0.4, 0.3, 0.4], [0.2, 0.7, 0.1], [0.1, 0.8, 0.2]])[:, None]


shapes = st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 5))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), hard=st.booleans())
def test_rows_sum_to_one(name: str, shape: tuple[int, int, int], seed: int, hard: bool) -> None:
    """Every rule returns distributions, also from members that rule classes out entirely."""
    p = random_rows(*shape, seed=seed)
    if hard:
        p = torch.nn.functional.one_hot(p.argmax(-1), shape[2]).double()
    rows = RULES[name](p)
    assert rows.shape == p.shape[1:]
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(-1), torch.ones(shape[1], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_members_does_not_matter(name: str) -> None:
    """A permutation of the members changes nothing but rounding."""
    p = random_rows(5, 40, 4)
    torch.testing.assert_close(RULES[name](p[[3, 0, 4, 1, 2]]), RULES[name](p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_classes_is_carried_along(name: str) -> None:
    """A permutation of the classes permutes the columns."""
    p, order = random_rows(5, 40, 4), [2, 0, 3, 1]
    torch.testing.assert_close(RULES[name](p[..., order]), RULES[name](p)[:, order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_member_is_itself(name: str) -> None:
    """A single member's row comes back, or at least its order of classes."""
    p = random_rows(1, 40, 4)
    rows = RULES[name](p)
    torch.testing.assert_close(rows.argmax(-1), p[0].argmax(-1))
    if name not in KEEPS_THE_ORDER_ONLY:
        torch.testing.assert_close(rows, p[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_all_members_change_no_decision(name: str) -> None:
    """Every member twice decides as every member once; means even give the same rows."""
    p = random_rows(5, 60, 4)
    once, twice = RULES[name](p), RULES[name](torch.cat([p, p]))
    torch.testing.assert_close(once.argmax(-1), twice.argmax(-1))
    if name not in KEEPS_THE_ORDER_ONLY | GROWS_SURER:
        torch.testing.assert_close(once, twice, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_agreement_is_kept(name: str) -> None:
    """Where all members put one class first with the same row, the rule does too."""
    p = random_rows(1, 40, 4).expand(5, -1, -1)
    torch.testing.assert_close(RULES[name](p).argmax(-1), p[0].argmax(-1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_follows_the_input(name: str, dtype: torch.dtype) -> None:
    """Rules compute in the precision they are given and lose no row to it."""
    rows = RULES[name](random_rows(4, 10, 5).to(dtype))
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.double().sum(-1), torch.ones(10, dtype=torch.float64), rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_numpy_in_numpy_out(name: str) -> None:
    """Arrays are answered with arrays of the same numbers."""
    p = random_rows(3, 10, 4)
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
    p = random_rows(4, 30, 5)
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
    p = random_rows(7, 200, 4)
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
    p = random_rows(4, 50, 3)
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


def test_ties_fall_to_the_mean_in_half_precision() -> None:
    """One vote for each class; the mean is higher for the second, by less than bfloat16 holds beside a vote."""
    p = torch.tensor([[[0.6, 0.4]], [[0.39, 0.61]]]).bfloat16()
    assert ensemble.majority(p).argmax(dim=-1).item() == 1


@pytest.mark.parametrize("power", [1e-2, 1e-4, 1e-6, 1e-8, 1e-30, 1e-300])
def test_small_powers_tend_to_the_geometric_mean(power: float) -> None:
    """Cube roots of .09 and .04, normalised, also where single precision rounds x^power to one."""
    p = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]], [[0.2, 0.8]]])
    first, second = 0.09 ** (1 / 3), 0.04 ** (1 / 3)
    found = ensemble.rules.power_mean(p, power=power)
    assert found.dtype == torch.float32
    assert found[0, 0].item() == pytest.approx(first / (first + second), abs=power + 1e-6)
    exact = ensemble.rules.power_mean(p.double(), power=power)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
    veto = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    assert ensemble.rules.power_mean(veto, power=power)[0].tolist() == [1.0, pytest.approx(0, abs=1e-12)]
