"""Contributions where there is little to go by: no probability for the truth, no frames."""

import numpy as np
import pytest

import ensemble
from ensemble.selection import contributions
from ensemble.selection.contribution import Pool


@pytest.mark.parametrize("pool", ["mean", "weighted"])
@pytest.mark.parametrize("last", [[0.0, 1.0], [1.0, 0.0]])
def test_contributions_are_finite_where_a_member_says_zero(pool: Pool, last: list[float]) -> None:
    """Zero counts as 2^-52, as `evaluate` has it, also where everybody says it; the values still add up."""
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
    with pytest.raises(ValueError, match="expected frames to judge contributions on, got none"):
        contributions(empty, pool=pool)
