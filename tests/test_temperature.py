"""Temperatures: SciPy and slow loops as oracles; fits recover what made the data."""

import math

import numpy as np
import pytest
import torch
from conftest import nats, overconfident_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

import ensemble
from ensemble.rules.fitted import Chain, Temperature


def test_temperature_of_honest_logits_sharpened_by_two_is_two() -> None:
    """Labels drawn from softmax(z), probabilities softmax(2 z): the fit finds two within sampling error."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40_000, 5, generator=generator)
    labels = torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0]
    fit = ensemble.fit.fit_temperature((2 * z).softmax(-1), labels)
    assert fit.value == pytest.approx(2.0, rel=0.03)
    assert fit.after < fit.before


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.2, 5))
def test_temperature_equals_a_general_minimiser(seed: int, scale: float) -> None:
    """SciPy's bounded search on the log-loss ends at the same temperature and loss."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(80, 3, generator=generator, dtype=torch.float64) * scale
    labels = torch.multinomial(z.div(scale).softmax(-1), 1, generator=generator)[:, 0]
    fit = ensemble.fit.fit_temperature(z.softmax(-1), labels)
    logs = z.log_softmax(-1)
    found = minimize_scalar(
        lambda x: nats((logs / math.exp(x)).softmax(-1), labels),
        bounds=(math.log(0.01), math.log(100)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert fit.after == pytest.approx(found.fun, abs=1e-9)
    if 0.02 < fit.value < 50:
        assert fit.value == pytest.approx(math.exp(found.x), rel=1e-4)


def test_temperature_is_stationary() -> None:
    """At the fit, the mean logarithm expected equals the mean logarithm of the truth, to 1e-9."""
    o = overconfident_outputs(1)
    value = ensemble.fit.fit_temperature(o).value
    assert isinstance(value, tuple)
    logs = o.log_probabilities[0].double()
    p = (logs / value[0]).softmax(-1)
    expected = (p * logs).sum(-1).mean()
    assert expected.item() == pytest.approx(logs[torch.arange(600), o.require_labels()].mean().item(), abs=1e-6)


def test_members_are_fitted_each_for_itself() -> None:
    """All members in one walk give what one at a time gives, from outputs and from arrays."""
    o = overconfident_outputs()
    fit = ensemble.fit.fit_temperature(o)
    assert isinstance(fit.value, tuple)
    for row, value in zip(o.probabilities, fit.value, strict=True):
        assert ensemble.fit.fit_temperature(row, o.labels).value == pytest.approx(value, rel=1e-8)
    assert ensemble.fit.fit_temperature(o.probabilities, o.labels).value == pytest.approx(fit.value, rel=1e-8)
    assert fit.rule.fingerprint == o.fingerprint


def test_a_rule_gets_one_temperature() -> None:
    """After pooling: the fit of what the rule returns."""
    o = overconfident_outputs()
    fit = ensemble.fit.fit_temperature(o, rule=ensemble.mean)
    alone = ensemble.fit.fit_temperature(ensemble.mean(o.probabilities), o.labels)
    assert fit.value == pytest.approx(alone.value, rel=1e-6)
    cooled = Temperature(fit.value)(ensemble.mean(o.probabilities))
    assert nats(cooled, o.require_labels()) == pytest.approx(fit.after, abs=1e-6)


def test_without_a_minimum_the_search_still_ends() -> None:
    """Always right asks for ever colder, until nothing changes; always wrong for the hottest."""
    rows = torch.tensor([[0.9, 0.1]] * 3)
    assert ensemble.fit.fit_temperature(rows, [0, 0, 0]).after < 1e-12  # type: ignore[operator]
    assert ensemble.fit.fit_temperature(rows, [1, 1, 1]).value == pytest.approx(100)


def test_zeros_do_not_stop_the_fit() -> None:
    """A certain mistake is finite and makes the fit hotter."""
    fit = ensemble.fit.fit_temperature([[1.0, 0.0]] * 9 + [[0.0, 1.0]], [0] * 10)
    assert math.isfinite(fit.after)
    assert fit.value > 1


def test_what_cannot_be_fitted_is_refused() -> None:
    """No frames, no labels, or an argument that would count for nothing."""
    with pytest.raises(ValueError, match="no labels beside outputs, which have labels of their own"):
        ensemble.fit.fit_temperature(overconfident_outputs(), [0] * 600)
    with pytest.raises(ValueError, match=r"for an array fit on rule\(array\)"):
        ensemble.fit.fit_temperature(torch.ones(2, 3, 4) / 4, [0, 1, 2], rule=ensemble.mean)
    with pytest.raises(ValueError, match="expected frames to fit a temperature on, got none"):
        ensemble.fit.fit_temperature(torch.empty(0, 3), [])
    with pytest.raises(ValueError, match=r"got \(2, 3\) and None"):
        ensemble.fit.fit_temperature(torch.ones(2, 3) / 3)


def test_pool_temperatures_are_what_their_chain_gives() -> None:
    """The reported losses are the rule's own; together beats either alone."""
    o = overconfident_outputs()
    labels, p = o.require_labels(), o.probabilities.double()
    fit = ensemble.fit.fit_pool_temperatures(o, [0.5, 0.3, 0.2])
    pool = ensemble.WeightedMean([0.5, 0.3, 0.2])
    chain = fit.rule
    assert nats(chain(p), labels) == pytest.approx(fit.after, abs=1e-7)
    assert nats(pool(p), labels) == pytest.approx(fit.before, abs=1e-7)  # rows are float32's
    each = ensemble.fit.fit_temperature(o)
    assert fit.after <= nats(Chain((Temperature(each.value), pool))(p), labels) + 1e-9
    assert fit.after <= float(ensemble.fit.fit_temperature(o, rule=pool).after) + 1e-9  # type: ignore[arg-type]


def test_pool_temperatures_are_found_where_sure_members_hide_the_slope() -> None:
    """Of rows of zeros and ones small changes change nothing; trusting the one that is always right does."""
    rows = {"a": [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], "b": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]}
    o = ensemble.MemberOutputs.from_probabilities(rows, labels=[0, 1, 0])
    fit = ensemble.fit.fit_pool_temperatures(o)
    assert fit.before == pytest.approx(2 / 3 * math.log(2))
    assert fit.after < 1e-6


def test_pool_temperatures_are_a_minimum_to_a_billionth() -> None:
    """No single temperature can be moved for the better."""
    o = overconfident_outputs(4, 400, seed=3)
    fit, p = ensemble.fit.fit_pool_temperatures(o), o.probabilities.double()
    for k in range(5):
        for factor in (0.9, 0.99, 1.01, 1.1):
            moved = [*fit.each, fit.pool]
            moved[k] = min(max(moved[k] * factor, 0.01), 100.0)
            chain = Chain((Temperature(tuple(moved[:4])), ensemble.mean, Temperature(moved[4])))
            assert nats(chain(p), o.require_labels()) >= fit.after - 1e-9


def test_members_that_are_no_distributions_are_refused_by_number() -> None:
    """(M, N, C): the second one's logits."""
    rows = np.array([[[0.5, 0.5]], [[3.0, -1.0]]])
    with pytest.raises(ValueError, match=r"from member 1, got a row with sum 2 .* at frame 0"):
        ensemble.fit.fit_temperature(rows, [0])


@pytest.mark.parametrize("weights", [[0, 0], [math.nan, 1], [-1, 2], [1], [1, 2, 3]])
def test_weights_of_a_pool_that_are_none_are_refused(weights: list[float]) -> None:
    """Before anything is fitted."""
    with pytest.raises(ValueError, match="weights"):
        ensemble.fit.fit_pool_temperatures(overconfident_outputs(2), weights)
