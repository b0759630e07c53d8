"""Weights of a linear pool, fitted on validation frames, each with a certificate."""

from ensemble.weights.fit import WeightFit, fit_weights
from ensemble.weights.simplex import SimplexFit, fit_simplex_weights

__all__ = ["SimplexFit", "WeightFit", "fit_simplex_weights", "fit_weights"]
