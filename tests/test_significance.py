"""Significance: published cases, SciPy and slow loops as oracles, coverage by simulation."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import ensemble
from ensemble.judge.significance import percentile_ends, sums_by_group


def test_matrix_form_equals_index_form() -> None:
    """Multinomial counts times sums is what drawing recordings and pooling their frames gives."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(7), [3, 1, 4, 1, 5, 9, 2])
    values = rng.random((25, 3))
    sums, sizes = sums_by_group(values, groups)
    means = ensemble.judge.cluster_bootstrap(sums, sizes, replicates=300, seed=5)
    again, left = np.random.default_rng(5), 300
    drawn = []
    while left:
        rows = min(256, left)
        drawn.append(again.integers(7, size=(rows, 7)))
        left -= rows
    for mean, picks in zip(means, np.concatenate(drawn), strict=True):
        frames = np.concatenate([values[groups == pick] for pick in picks])
        np.testing.assert_allclose(mean, frames.mean(axis=0), rtol=1e-12)


def test_equal_seeds_equal_numbers() -> None:
    """Only the generator is random; more replicates begin with the same ones."""
    sums, sizes = sums_by_group(np.arange(12.0), np.arange(12) // 3)
    first = ensemble.judge.cluster_bootstrap(sums, sizes, replicates=50, seed=1)
    np.testing.assert_array_equal(ensemble.judge.cluster_bootstrap(sums, sizes, replicates=50, seed=1), first)
    assert (ensemble.judge.cluster_bootstrap(sums, sizes, replicates=50, seed=2) != first).any()


def test_differences_are_paired() -> None:
    """Two columns that differ by a constant differ by it in every replicate."""
    values = np.random.default_rng(0).random(60)
    sums, sizes = sums_by_group(np.stack([values, values + 0.25], axis=1), np.arange(60) // 6)
    means = ensemble.judge.cluster_bootstrap(sums, sizes, replicates=100)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 0.25, rtol=1e-12)


def test_groups_may_be_any_integers_in_any_order() -> None:
    """Names of recordings carry no meaning."""
    values, groups = np.arange(6.0), np.array([9, -3, 9, 40, -3, 9])
    sums, sizes = sums_by_group(values, groups)
    assert sums[:, 0].tolist() == [5.0, 7.0, 3.0]
    assert sizes.tolist() == [2.0, 3.0, 1.0]


def test_t_interval_with_equal_recordings_is_the_textbook_one() -> None:
    """Recordings of one length: Student's interval of the recordings' means, as SciPy has it."""
    values = np.random.default_rng(0).normal(size=(12, 5))
    found = ensemble.judge.t_interval(values.ravel(), np.repeat(np.arange(12), 5))
    means = values.mean(axis=1)
    low, high = stats.t.interval(0.95, 11, means.mean(), stats.sem(means))
    np.testing.assert_allclose([found.estimate, found.low, found.high], [means.mean(), low, high], rtol=1e-9)


@pytest.mark.parametrize("method", [ensemble.judge.bootstrap_interval, ensemble.judge.t_interval])
def test_too_few_recordings_are_nan(method: Callable[..., ensemble.judge.Interval]) -> None:
    """One recording has no spread; none has no mean either."""
    one = method([1.0, 0.0], [7, 7])
    assert one.estimate == 0.5
    assert np.isnan([one.low, one.high]).all()
    none = method([], [])
    assert np.isnan([none.estimate, none.low, none.high]).all()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (
            lambda: ensemble.judge.t_interval([1, 0], [0, 1], level=95),
            "level between 0 and 1, for instance 0.95, got 95",
        ),
        (lambda: ensemble.judge.bootstrap_interval([1, 0], [0, 1], level=-0.5), "level between 0 and 1, .* got -0.5"),
        (lambda: ensemble.judge.bootstrap_interval([1, 0], [0, 1], replicates=0), "one replicate or more, got 0"),
        (
            lambda: ensemble.judge.bootstrap_interval([1, 0, 1, 1], [0, 0, 1]),
            r"groups of shape \(4,\) as there are frames, got \(3,\)",
        ),
        (
            lambda: ensemble.judge.cluster_bootstrap([[1.0], [0.0]], [1.0]),
            r"\(G, K\) and \(G,\), got \(2, 1\) and \(1,\)",
        ),
        (lambda: ensemble.judge.right_and_wrong([[1], [0], [1]], [1, 0, 1]), r"\(N,\), got \(3, 1\) and \(3,\)"),
        (lambda: ensemble.judge.right_and_wrong([1, 0], [1]), r"\(N,\), got \(2,\) and \(1,\)"),
        (lambda: ensemble.judge.mcnemar([[0.4, 0.3], [0.1, 0.2]]), r"table of counts, got \[\[0.4"),
        (lambda: ensemble.judge.mcnemar([[np.nan, 3], [1, 2]]), "table of counts, got"),
    ],
)
def test_what_makes_no_sense_is_refused(ask: Callable[[], object], words: str) -> None:
    """Each setting with what was expected and what was given."""
    with pytest.raises(ValueError, match=words):
        ask()


@pytest.mark.parametrize("method", ["bootstrap", "t"])
def test_intervals_by_recording_cover_and_frame_wise_ones_do_not(method: str) -> None:
    """Where frames of a recording are alike, intervals by recording cover 95 %, those by frame far less."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 25)

    def covers(values: np.ndarray, labels: np.ndarray) -> bool:
        if method == "t":
            found = ensemble.judge.t_interval(values, labels)
        else:
            found = ensemble.judge.bootstrap_interval(values, labels, replicates=200)
        return found.low <= 0 <= found.high

    hits = np.zeros(2)
    for _ in range(200):
        values = rng.normal(size=40)[groups] + rng.normal(size=1000)
        hits += covers(values, groups), covers(values, np.arange(1000))
    by_recording, by_frame = hits / 200
    assert 0.89 <= by_recording <= 0.985  # 95 % within four standard errors, the bootstrap a little narrow
    assert by_frame < 0.6


def test_percentile_ends_hold_the_middle() -> None:
    """Of 0 to 100, 90 % lie from 5 to 95."""
    np.testing.assert_allclose(percentile_ends(np.arange(101.0), level=0.9), [5, 95])


def test_mcnemar_published_case() -> None:
    """121 against 59 discordant: chi-squared 20.672 with Edwards' correction."""
    found = ensemble.judge.mcnemar([[101, 121], [59, 33]])
    assert found.statistic == pytest.approx(61**2 / 180, rel=1e-12)
    assert found.p_value == pytest.approx(stats.chi2.sf(61**2 / 180, 1), rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(b=st.integers(0, 40), c=st.integers(0, 40))
def test_mcnemar_exact_is_the_binomial_test(b: int, c: int) -> None:
    """SciPy's two-sided binomial test with probability one half."""
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert ensemble.judge.mcnemar_exact([[3, b], [c, 5]]).p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_discordance_is_one() -> None:
    """No frame on which one is right alone."""
    assert ensemble.judge.mcnemar([[5, 0], [0, 5]]).p_value == 1
    assert ensemble.judge.mcnemar_exact([[5, 0], [0, 5]]).p_value == 1
    assert ensemble.judge.mcnemar([[5, 1], [1, 5]]).statistic == 0  # the correction never makes it negative


def test_right_and_wrong_counts_frames() -> None:
    """Both, only first; only second, neither."""
    table = ensemble.judge.right_and_wrong([1, 1, 0, 0, 1], [1, 0, 1, 0, 0])
    assert table.tolist() == [[1, 2], [1, 1]]
    with pytest.raises(ValueError, match=r"\(2, 2\) table of counts, got \[1.0, 2.0\]"):
        ensemble.judge.mcnemar([1, 2])


def test_cochran_q_by_hand() -> None:
    """Members right 4, 3, 1 of 5; frames 3, 2, 2, 1, 0 right: Q = 2 (3 x 26 - 64) / (24 - 18) = 14/3."""
    right = [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    found = ensemble.judge.cochran_q(right)
    assert found.statistic == pytest.approx(14 / 3, rel=1e-12)
    assert found.p_value == pytest.approx(stats.chi2.sf(14 / 3, 2), rel=1e-9)


def test_cochran_q_of_two_is_mcnemar_uncorrected() -> None:
    """For two members Q is (b - c)^2 / (b + c)."""
    right = np.random.default_rng(0).random((2, 300)) < [[0.7], [0.8]]
    (_, b), (c, _) = ensemble.judge.right_and_wrong(*right)
    assert ensemble.judge.cochran_q(right).statistic == pytest.approx((b - c) ** 2 / (b + c), rel=1e-12)
    assert ensemble.judge.cochran_q(right[[0, 0]]).p_value == 1
    with pytest.raises(ValueError, match=r"two members or more, got \(1, 300\)"):
        ensemble.judge.cochran_q(right[:1])


def test_corrections_by_hand() -> None:
    """Holm steps down and never decreases; Bonferroni multiplies; neither exceeds one."""
    p = [0.04, 0.01, 0.6, 0.02]
    np.testing.assert_allclose(ensemble.judge.holm(p), [0.08, 0.04, 0.6, 0.06], rtol=1e-12)
    np.testing.assert_allclose(ensemble.judge.bonferroni(p), [0.16, 0.04, 1.0, 0.08], rtol=1e-12)
    assert len(ensemble.judge.holm([])) == 0


@settings(max_examples=50, deadline=None)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_raw_and_bonferroni(p: list[float]) -> None:
    """Never below the raw p-value, never above Bonferroni's, and in the same order."""
    adjusted = ensemble.judge.holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= ensemble.judge.bonferroni(p) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_cochran_q_with_frames_worth_nothing() -> None:
    """Frames on which all are right, or none, change neither statistic nor p-value."""
    right = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=bool)
    padded = np.concatenate([right, np.ones((3, 9), dtype=bool), np.zeros((3, 4), dtype=bool)], axis=1)
    assert ensemble.judge.cochran_q(padded).statistic == pytest.approx(
        ensemble.judge.cochran_q(right).statistic, rel=1e-12
    )
