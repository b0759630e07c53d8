"""Pooling in single precision, by hand."""

import pytest
import torch

import ensemble


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
