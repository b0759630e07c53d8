"""Probabilities that mean what they say: how far off they are, and what maps them to better ones.

`reliability` measures, `temperature` fits one number per member or pool, `fusion` fits rules with more numbers.
All fits are made on frames that judge nothing; each remembers which.
"""

from ensemble.calibration.fusion import fit_bayes_vote, fit_stacked
from ensemble.calibration.reliability import (
    BINS,
    Murphy,
    bin_sums,
    brier_score,
    calibration_error,
    expected_calibration_error,
    murphy,
)
from ensemble.calibration.temperature import (
    PoolTemperatures,
    TemperatureFit,
    fit_pool_temperatures,
    fit_temperature,
)

__all__ = [
    "BINS",
    "Murphy",
    "PoolTemperatures",
    "TemperatureFit",
    "bin_sums",
    "brier_score",
    "calibration_error",
    "expected_calibration_error",
    "fit_bayes_vote",
    "fit_pool_temperatures",
    "fit_stacked",
    "fit_temperature",
    "murphy",
]
