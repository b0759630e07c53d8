"""`FITTERS`: rules by the names that a command line gives them, fitted on validation outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from ensemble.fit.fusion import fit_bayes_vote, fit_stacked
from ensemble.fit.temperature import fit_temperature
from ensemble.fit.weights import fit_log_linear, fit_weights
from ensemble.outputs import MemberOutputs
from ensemble.rules.fitted import WeightedMean
from ensemble.rules.pooling import mean
from ensemble.rules.table import RULES, FittedRule, declared, enter

Fitter = Callable[[MemberOutputs], FittedRule]

FITTERS: dict[str, Fitter] = {}

_F = TypeVar("_F", bound=Fitter)


def fitter(function: _F) -> _F:
    """Enter a function from outputs to a fitted rule into the table `FITTERS` under its own name.

    Raises:
        ValueError: another function has that name already.
    """
    enter(function.__name__, function, FITTERS, RULES)
    return function


@fitter
def weighted(outputs: MemberOutputs) -> FittedRule:
    """The mean with weights of least log-loss."""
    return fit_weights(outputs).rule


@fitter
def calibrated(outputs: MemberOutputs) -> FittedRule:
    """The weighted mean, then one temperature."""
    return fit_temperature(outputs, rule=weighted(outputs)).rule


@fitter
def log_pool(outputs: MemberOutputs) -> FittedRule:
    """The weighted geometric mean."""
    return fit_log_linear(outputs).rule


@fitter
def bayes_vote(outputs: MemberOutputs) -> FittedRule:
    """Votes weighed by each member's confusion matrix."""
    return fit_bayes_vote(outputs)


@fitter
def stacked(outputs: MemberOutputs) -> FittedRule:
    """Logistic regression on the members' log-probabilities."""
    return fit_stacked(outputs)


@fitter
def auto(outputs: MemberOutputs) -> FittedRule:
    """The simplest of single member, mean and weighted mean within one standard error of the best.

    Weights are fitted on half of the recordings and the choice is made on the other half; the chosen rule
    is then fitted on all recordings.

    Raises:
        ValueError: no labels, or fewer than two recordings.
    """
    from ensemble.judge.report import choose  # it needs pandas, which commands that name rules do not wait for

    assert outputs.groups is not None  # filled in when made
    distinct, number = np.unique(outputs.groups.numpy(), return_inverse=True)
    if len(distinct) < 2:
        msg = f"expected validation frames of two recordings or more for 'auto', got {len(distinct)}; name a rule"
        raise ValueError(msg)
    odd = torch.from_numpy(number) % 2 == 1  # every other recording
    choice = choose(outputs.at(odd), {"mean": mean, "weighted": weighted(outputs.at(~odd))})
    if choice.name == "weighted":
        return weighted(outputs)
    if choice.name in outputs.members:
        one = tuple(float(name == choice.name) for name in outputs.members)
        return WeightedMean(one, outputs.fingerprint, members=outputs.members)
    return declared(choice.rule)
