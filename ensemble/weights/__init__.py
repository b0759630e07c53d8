"""Weights of pools of members, fitted on validation frames, each with a certificate of how good they are."""

from ensemble.weights.classwise import ClasswiseFit, fit_class_weights
from ensemble.weights.fit import Objective, WeightFit, explained_matrix, fit_weights, labelled, true_class_matrix
from ensemble.weights.loglinear import LogLinearFit, fit_log_linear
from ensemble.weights.resampling import CrossFit, WeightIntervals, bootstrap_weights, cross_fit
from ensemble.weights.rows import Rows
from ensemble.weights.simplex import SimplexFit, at_least_zero, first_equal, fit_simplex_weights, refit, settle

__all__ = [
    "ClasswiseFit",
    "CrossFit",
    "LogLinearFit",
    "Objective",
    "Rows",
    "SimplexFit",
    "WeightFit",
    "WeightIntervals",
    "at_least_zero",
    "bootstrap_weights",
    "cross_fit",
    "explained_matrix",
    "first_equal",
    "fit_class_weights",
    "fit_log_linear",
    "fit_simplex_weights",
    "fit_weights",
    "labelled",
    "refit",
    "settle",
    "true_class_matrix",
]
