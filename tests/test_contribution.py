"""Contributions of members, against their definition."""

from itertools import permutations

import numpy as np
import pytest
from conftest import some_outputs

import ensemble
from ensemble import fit_simplex_weights
from ensemble.selection import contributions
from ensemble.selection.contribution import Pool


@pytest.mark.parametrize("pool", ["mean", "weighted"])
def test_shapley_is_the_mean_over_all_orders_of_joining(pool):
    """By definition, for four members; the sum is what all of them take off together."""
    outputs = some_outputs(4)
    P = outputs.true_class().numpy()

    def loss(subset):
        rows = P[sorted(subset)]
        if not subset:
            return np.log(4)
        return -np.log(rows.mean(axis=0)).mean() if pool == "mean" else fit_simplex_weights(rows).loss

    orders = list(permutations(range(4)))
    value = np.zeros(4)
    for order in orders:
        for k, m in enumerate(order):
            value[m] += (loss(set(order[:k])) - loss(set(order[: k + 1]))) / len(orders)
    found = contributions(outputs, pool=pool)
    np.testing.assert_allclose(found.shapley, value, atol=3e-6)
    assert found.shapley.sum() == pytest.approx(np.log(4) - loss({0, 1, 2, 3}), abs=3e-6)
    np.testing.assert_allclose(
        found.leave_one_out, [loss({0, 1, 2, 3} - {m}) - loss({0, 1, 2, 3}) for m in range(4)], atol=3e-6
    )


def test_sampled_shapley_values_still_add_up_and_state_their_error():
    """Beyond ten members orders are drawn; each order's gains telescope."""
    outputs = some_outputs(11, N=60)
    found = contributions(outputs, permutations=50)
    whole = np.log(4) + np.log(outputs.true_class().numpy().mean(axis=0)).mean()
    assert found.shapley.sum() == pytest.approx(whole, abs=1e-9)
    assert (found.error > 0).all()
    with pytest.raises(ValueError, match="'mean' or 'weighted'"):
        contributions(outputs, pool="median")


@pytest.mark.parametrize("pool", ["mean", "weighted"])
@pytest.mark.parametrize("last", [[0.0, 1.0], [1.0, 0.0]])
def test_contributions_are_finite_where_a_member_says_zero(pool: Pool, last: list[float]) -> None:
    """Zero counts as 2^-52, as in `evaluate`, also where all members give it; the values still add up."""
    p = {"a": [[1.0, 0.0], [1.0, 0.0], last], "b": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]}
    outputs = ensemble.MemberOutputs.from_probabilities(p, labels=[0, 1, 1])
    found = contributions(outputs, pool=pool)
    judged = ensemble.evaluate(outputs, {"mean": ensemble.mean})
    assert np.isfinite(found.leave_one_out).all()
    if pool == "mean":
        whole = judged.rules["log_loss"][0]
        assert found.shapley.sum() == pytest.approx(np.log(2) - whole, rel=1e-9)
        assert found.leave_one_out[1] == pytest.approx(judged.members["log_loss"][0] - whole, rel=1e-9)
    else:
        assert np.isfinite(found.shapley).all()


@pytest.mark.parametrize("pool", ["mean", "weighted"])
def test_contributions_need_frames(pool: Pool) -> None:
    """None is an error, not NaN."""
    empty = ensemble.MemberOutputs.from_probabilities({"a": np.ones((0, 2)), "b": np.ones((0, 2))}, labels=[])
    with pytest.raises(ValueError, match="expected frames to fit on, got none"):
        contributions(empty, pool=pool)
