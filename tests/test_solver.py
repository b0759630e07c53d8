"""The solver of weights: exact cases, certificates, invariances, oracles, and traps of arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from ensemble import fit_simplex_weights
from ensemble.fit._solver.newton import Rows, look


def some_problem(generator, kind):
    M, N = int(generator.integers(1, 13)), int(generator.integers(1, 200))
    match kind:
        case 0:
            return generator.random((M, N))
        case 1:
            return generator.beta(0.3, 0.3, (M, N))
        case 2:  # exact zeros
            return generator.beta(0.5, 0.2, (M, N)) * (generator.random((M, N)) > 0.2)
        case 3:  # twelve orders of magnitude
            return 10.0 ** generator.uniform(-12, 0, (M, N))
        case 4:  # near duplicates
            P = generator.random((M, N))
            P[M // 2 :] = P[: M - M // 2] * (1 + 1e-9 * generator.random((M - M // 2, N)))
            return P
        case _:
            return generator.random((M, N)) * 10.0 ** generator.uniform(-20, 20, N)


def test_one_member_gets_everything():
    """M = 1 has one answer."""
    fit = fit_simplex_weights([[0.3, 0.5]])
    assert fit.weights.tolist() == [1.0]
    assert fit.gap == 0.0
    assert fit.loss == pytest.approx(-np.log([0.3, 0.5]).mean(), rel=1e-12)


@pytest.mark.parametrize("e", [0.0, 1e-12, 0.1, 0.9])
def test_opposed_members_share_equally(e):
    """[[1, e], [e, 1]] is symmetric."""
    np.testing.assert_allclose(fit_simplex_weights([[1, e], [e, 1]]).weights, [0.5, 0.5], atol=1e-6)


def test_two_members_agree_with_a_root_in_one_dimension():
    """The slope along the only free direction vanishes."""
    P = np.random.default_rng(1).random((2, 50))
    root = brentq(lambda a: ((P[0] - P[1]) / (a * P[0] + (1 - a) * P[1])).sum(), 0, 1)
    np.testing.assert_allclose(fit_simplex_weights(P, tolerance=1e-12).weights, [root, 1 - root], atol=1e-6)


def test_disjoint_specialists_get_their_frequencies():
    """One-hot specialists: the weight is the share of frames a member knows."""
    P = np.eye(3)[:, [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]]
    np.testing.assert_allclose(fit_simplex_weights(P, tolerance=1e-12).weights, [0.5, 0.3, 0.2], atol=1e-6)


def test_a_member_that_is_always_right_takes_all():
    """The optimum is that vertex."""
    P = np.vstack([np.random.default_rng(0).random((3, 40)), np.ones(40)])
    np.testing.assert_allclose(fit_simplex_weights(P).weights, [0, 0, 0, 1], atol=1e-6)


def test_identical_members_cost_nothing_and_the_first_is_kept():
    """Loss of the single one, gap 0, all weight on the first."""
    p = np.random.default_rng(0).random(30)
    fit = fit_simplex_weights(np.stack([p, p, p]))
    assert fit.weights.tolist() == [1.0, 0.0, 0.0]
    assert fit.gap == pytest.approx(0.0, abs=1e-15)
    assert fit.loss == pytest.approx(-np.log(p).mean(), rel=1e-12)


def test_four_hundred_random_problems_are_certified_to_a_billionth():
    """No miss among zeros, near duplicates and wild scales; the certificate is recomputed here."""
    generator = np.random.default_rng(7)
    for i in range(400):
        P = some_problem(generator, i % 6)
        fit = fit_simplex_weights(P, tolerance=1e-9)
        P = P[:, P.max(axis=0) > 0]
        P = P / P.max(axis=0)
        d = (P / (fit.weights @ P)).mean(axis=1)
        assert fit.gap <= 1e-9, (i, P.shape, fit.gap)
        assert np.log(d.max()) <= 1e-9 + 1e-12, (i, P.shape)
        assert fit.weights.min() >= 0
        assert fit.weights.sum() == pytest.approx(1.0, abs=1e-12)


def test_multipliers_satisfy_the_optimality_conditions():
    """D is 1 on the support, at most 1 off it, and w . d = 1."""
    P = np.random.default_rng(2).beta(0.5, 0.3, (12, 300))
    fit = fit_simplex_weights(P, tolerance=1e-12)
    np.testing.assert_allclose(fit.multipliers, (P / (fit.weights @ P)).mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(fit.multipliers[list(fit.support)], 1.0, atol=1e-6)
    assert fit.multipliers.max() <= 1 + 1e-9
    assert fit.weights @ fit.multipliers == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_problems_in_either_precision_agree_with_scipy(dtype):
    """The float32 walks, the sample and the blocks end where SLSQP on float64 ends; the gap is a true bound."""
    generator = np.random.default_rng(3)
    P = (1 / (1 + np.exp(-generator.normal(1.0, 2.0, (10, 20_000)) - generator.normal(0, 1, 20_000)))).astype(dtype)
    P[3] = P[1]
    P[4, ::50] = 0
    fit, exact = fit_simplex_weights(P), P.astype(np.float64)
    found = minimize(
        lambda w: (-np.log(w @ exact).mean(), -(exact / (w @ exact)).mean(axis=1)),
        np.full(10, 0.1),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * 10,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert fit.loss == pytest.approx(found.fun, abs=1e-6)
    assert fit.gap <= 1e-6
    assert fit.passes <= 5
    assert np.log((exact / (fit.weights @ exact)).mean(axis=1).max()) == pytest.approx(fit.gap, abs=1e-11)


def test_a_member_that_only_a_few_of_many_frames_need_keeps_its_weight():
    """Curvature is taken from a part of the frames; the rare ones that hang on one member still count."""
    generator = np.random.default_rng(10)
    P = (0.1 + 0.9 * generator.random((4, 300_000))).astype(np.float32)
    P[:3, [5, 150_000, 299_999]] = 1e-6
    P[3] = 1e-4
    P[3, [5, 150_000, 299_999]] = 1.0
    fit, exact = fit_simplex_weights(P), P.astype(np.float64)
    assert 0.5e-5 < fit.weights[3] < 2e-5
    assert fit.gap <= 1e-6
    assert np.log((exact / (fit.weights @ exact)).mean(axis=1).max()) == pytest.approx(fit.gap, abs=1e-11)
    assert fit.passes <= 6


def test_negative_zeros_are_zeros():
    """Frames are checked by their bits, where -0 looks like a large number."""
    P = np.random.default_rng(11).random((3, 50))
    P[1, 7] = 0.0
    Q = P.copy()
    Q[1, 7] = -0.0
    np.testing.assert_array_equal(fit_simplex_weights(Q).weights, fit_simplex_weights(P).weights)


@pytest.mark.parametrize("spread", [20, 300])
def test_scaling_frames_does_not_move_the_weights(spread):
    """Even frames scaled by 1e-300 count as much as before, and the loss shows it."""
    generator = np.random.default_rng(4)
    P, power = generator.random((6, 200)) + 0.1, generator.uniform(-spread, 0, 200)
    plain = fit_simplex_weights(P, tolerance=1e-11)
    scaled = fit_simplex_weights(P * 10.0**power, tolerance=1e-11)
    np.testing.assert_allclose(scaled.weights, plain.weights, atol=1e-6)
    assert scaled.loss == pytest.approx(plain.loss - np.log(10) * power.mean(), rel=1e-9)


def test_integer_sample_weights_are_repeated_frames():
    """Weight 3 is three times the frame, weight 0 its absence."""
    generator = np.random.default_rng(5)
    P, times = generator.random((5, 80)), generator.integers(0, 4, 80)
    weighted = fit_simplex_weights(P, sample_weights=times, tolerance=1e-11)
    repeated = fit_simplex_weights(np.repeat(P, times, axis=1), tolerance=1e-11)
    np.testing.assert_allclose(weighted.weights, repeated.weights, atol=1e-6)
    assert weighted.loss == pytest.approx(repeated.loss, rel=1e-9)


def test_fractional_sample_weights_are_counted_in_float64_whatever_the_frames_are():
    """Rounded to float32 they would be the weights of another problem, and no small gap could be certified."""
    generator = np.random.default_rng(12)
    P, times = generator.random((6, 30_000)).astype(np.float32), generator.random(30_000) + 0.01
    fit, exact = fit_simplex_weights(P, sample_weights=times, tolerance=1e-10), P.astype(np.float64)
    assert fit.gap <= 1e-10
    d = (exact / (fit.weights @ exact)) @ times / times.sum()
    assert np.log(d.max()) == pytest.approx(fit.gap, abs=1e-12)


def test_shrinking_is_exact_pseudo_frames_and_ends_at_equal_weights():
    """Alpha N spread over M frames that one member each explains; a huge alpha leaves equal weights."""
    generator = np.random.default_rng(6)
    P = generator.random((4, 100))
    fit = fit_simplex_weights(P, alpha=0.2, tolerance=1e-11)
    explicit = fit_simplex_weights(
        np.hstack([P, np.eye(4)]), sample_weights=[1.0] * 100 + [0.2 * 100 / 4] * 4, tolerance=1e-11
    )
    np.testing.assert_allclose(fit.weights, explicit.weights, atol=1e-6)
    np.testing.assert_allclose(fit_simplex_weights(P, alpha=1e6).weights, 0.25, atol=1e-4)


def test_warm_start_lets_members_at_zero_return():
    """A start at a wrong vertex ends at the same optimum."""
    P = np.random.default_rng(8).random((5, 200))
    cold, warm = (fit_simplex_weights(P, start=s, tolerance=1e-11).weights for s in (None, [1, 0, 0, 0, 0]))
    np.testing.assert_allclose(warm, cold, atol=1e-5)
    cold, warm = (fit_simplex_weights(P, start=s, alpha=0.1, tolerance=1e-11).weights for s in (None, [1, 0, 0, 0, 0]))
    np.testing.assert_allclose(warm, cold, atol=1e-5)


def test_stopping_early_still_certifies_in_float64():
    """After one pass the gap is large, but it is the true one."""
    P = np.random.default_rng(9).random((6, 30_000)).astype(np.float32)
    fit = fit_simplex_weights(P, max_passes=1)
    exact = P.astype(np.float64)
    assert fit.gap == pytest.approx(np.log((exact / (fit.weights @ exact)).mean(axis=1).max()), abs=1e-11)
    assert fit.loss == pytest.approx(-np.log(fit.weights @ exact).mean(), abs=1e-11)


def test_frames_without_a_positive_probability_are_dropped_and_counted():
    """All zeros is infinite for every weight; the rest is fitted."""
    P = np.array([[0.5, 0.0, 0.2], [0.1, 0.0, 0.9]])
    fit = fit_simplex_weights(P)
    assert fit.dropped == 1
    np.testing.assert_allclose(fit.weights, fit_simplex_weights(P[:, [0, 2]]).weights, atol=1e-9)
    with pytest.raises(ValueError, match="got 3 frames of zeros"):
        fit_simplex_weights(np.zeros((2, 3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_numbers_that_are_no_probabilities_are_refused_by_place(bad):
    """The message names member and frame."""
    P = np.full((3, 5), 0.5)
    P[1, 4] = bad
    with pytest.raises(ValueError, match="from member 1 at frame 4"):
        fit_simplex_weights(P)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"P": [0.5, 0.5]}, "shape"),
        ({"P": [[0.5]], "sample_weights": [-1.0]}, "sample weights"),
        ({"P": [[0.5]], "start": [1.0, 1.0]}, "1 weights to start from"),
        ({"P": [[0.5]], "alpha": -1.0}, "alpha"),
        ({"P": [[0.5, 0.2], [0.1, 0.3]], "tolerance": -1}, "tolerance of at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    """Each with what was expected."""
    with pytest.raises(ValueError, match=words):
        fit_simplex_weights(**arguments)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 10_000))
def test_the_optimum_is_below_every_member_and_the_mean(M, N, seed):
    """Simplex loss <= any vertex, <= equal weights, whatever the data."""
    P = np.random.default_rng(seed).random((M, N)) + 1e-6
    fit = fit_simplex_weights(P)
    assert fit.loss - fit.gap <= -np.log(P).mean(axis=1).min() + 1e-12
    assert fit.loss <= -np.log(P).mean(axis=1).min() + fit.gap + 1e-12
    assert fit.loss <= -np.log(P.mean(axis=0)).mean() + fit.gap + 1e-12


@pytest.mark.parametrize("members", [8, 64])
def test_sums_in_float32_are_bounded_from_above(members):
    """Members far from the support are summed in float32; the certificate takes what that can hide at most."""
    P = np.random.default_rng(11).random((members, 100_000)).astype(np.float32)
    rows, w = Rows(P), np.eye(members)[0]
    view = look(rows, w, np.array([1]), np.zeros(members), precise=True, curved=False)
    exact = (P.astype(np.float64) / P[0].astype(np.float64)).mean(axis=1)
    assert (view.bound >= exact * (1 - 1e-12)).all()
    assert (view.bound <= exact * 1.005).all()
    np.testing.assert_allclose(view.d, exact, rtol=1e-4)
    np.testing.assert_allclose(view.d[:2], exact[:2], rtol=1e-12)
