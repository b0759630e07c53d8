"""`FITTERS`: rules by the names that a command line gives them, fitted on validation outputs.

Also the fits of rules with more numbers than one weight per member, Bayes votes and stacking, and of cascades.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.optimize import minimize

from ensemble.fit._solver import Array, labelled, positive
from ensemble.fit.temperature import fit_temperature
from ensemble.fit.weights import fit_log_linear, fit_weights
from ensemble.judge.significance import Interval, t_interval
from ensemble.outputs import Cost, MemberOutputs, expect_outputs
from ensemble.rules.cascade import Cascade, known, margin
from ensemble.rules.fitted import BayesVote, Stacked, WeightedMean, rule_for
from ensemble.rules.pooling import mean
from ensemble.rules.table import RULES, FittedRule, Rule, declared, enter

Fitter = Callable[[MemberOutputs], FittedRule]

_CELLS = 2**21  # probabilities processed together
_THRESHOLDS = 64  # that a cascade is tried with

FITTERS: dict[str, Fitter] = {}

_F = TypeVar("_F", bound=Fitter)


def fitter(function: _F) -> _F:
    """Enter a function from outputs to a fitted rule into the table `FITTERS` under its own name.

    Raises:
        ValueError: another function has that name already.
    """
    enter(function, function, FITTERS, RULES)
    return function


@fitter
def weighted(outputs: MemberOutputs) -> FittedRule:
    """The mean with weights of least log-loss."""
    return fit_weights(outputs).rule


@fitter
def weighted_accuracy(outputs: MemberOutputs) -> FittedRule:
    """The mean with weights for accuracy, picked greedily."""
    return fit_weights(outputs, "accuracy").rule


@fitter
def weighted_brier(outputs: MemberOutputs) -> FittedRule:
    """The mean with weights of least Brier score."""
    return fit_weights(outputs, "brier").rule


@fitter
def weighted_macro_f1(outputs: MemberOutputs) -> FittedRule:
    """The mean with weights for macro F1, picked greedily."""
    return fit_weights(outputs, "macro_f1").rule


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
def cascade(outputs: MemberOutputs) -> FittedRule:
    """The weighted mean of as many members as each frame needs, for a loss of at most .1 point of accuracy."""
    return fit_cascade(outputs, weighted(outputs)).rule


@fitter
def auto(outputs: MemberOutputs) -> FittedRule:
    """The simplest of single member, mean and weighted mean within one standard error of the best.

    Weights are fitted on half of the recordings and the choice is made on the other half; the chosen rule
    is then fitted on all recordings.

    Raises:
        ValueError: no labels, or fewer than two recordings.
    """
    expect_outputs(outputs)
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


def fit_bayes_vote(outputs: MemberOutputs, *, smoothing: float = 1.0) -> BayesVote:
    """Count how often each member predicts each class, for each true class.

    Args:
        outputs: with labels; read in blocks.
        smoothing: positive; smoothing / C is added to each count, so that nothing unseen becomes impossible.

    Raises:
        ValueError: no labels, no frames, a member that abstains, or a smoothing that is not positive.
    """
    expect_outputs(outputs)
    positive("smoothing", smoothing)
    labels, (members, _, classes) = labelled(outputs), outputs.shape
    counts = np.zeros((members, classes * classes))
    for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes)), nan="refuse"):
        cells = probabilities.argmax(dim=-1) * classes + labels[block]  # (M, b), predicted then true
        for member, row in enumerate(cells.numpy()):
            counts[member] += np.bincount(row, minlength=classes * classes)
    tables = counts.reshape(members, classes, classes) + smoothing / classes
    priors = np.bincount(labels.numpy(), minlength=classes) + smoothing / classes
    likelihoods: Any = np.log(tables / tables.sum(axis=1, keepdims=True))
    log_priors: Any = np.log(priors / priors.sum())
    return BayesVote(likelihoods, log_priors, outputs.fingerprint, outputs.members)


def fit_stacked(
    outputs: MemberOutputs, *, strength: float = 0.1, floor: float = 1e-6, max_iterations: int = 300
) -> Stacked:
    """Multinomial logistic regression on all log-probabilities, held near the members' geometric mean by a ridge.

    Needs (N, M C) numbers in memory at once: fit on some tens of thousands of frames. Classes that do not
    occur in the labels get an intercept that rules them out.

    Args:
        outputs: with labels of two classes or more.
        strength: strength of the ridge, positive, in nats per frame: strength / 2 times the squared distance of the
            coefficients from those of `log_mean` is added to the log-loss. It means the same for any number of
            frames; as it grows, the rule becomes `log_mean` with intercepts. The default is the best power of
            ten for the bundled members, judged on validation recordings that were left out of the fit.
        floor: probabilities below this positive number count as this number.
        max_iterations: limit for L-BFGS.

    Raises:
        ValueError: no labels, fewer than two classes among them, a member that abstains, or a strength or floor
            that is not positive.

    Warns:
        RuntimeWarning: the iterations did not suffice; the rule is usable but less exact.
    """
    expect_outputs(outputs)
    positive("strength", strength)
    positive("floor", floor)
    labels, (members, frames, classes) = labelled(outputs), outputs.shape
    present, targets = np.unique(labels.numpy(), return_inverse=True)
    if len(present) < 2:
        msg = f"expected labels of two classes or more to stack on, got only {outputs.classes[int(present[0])]!r}"
        raise ValueError(msg)
    table = torch.empty(frames, members * classes)  # log-probabilities
    for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes)), nan="refuse"):
        table[block] = probabilities.clamp(min=floor).log().transpose(0, 1).flatten(1)
    centre = torch.eye(classes)[:, present].repeat(members, 1) / members  # (M C, present)
    truth = torch.from_numpy(targets)[:, None]  # (N, 1)

    def objective(flat: Array) -> tuple[float, Array]:
        """Log-loss with the ridge, and its gradient: slopes (M C, present) and intercepts without a penalty, flat."""
        numbers = torch.from_numpy(flat).float().reshape(-1, len(present))
        slopes, intercepts = numbers[:-1], numbers[-1]
        logs = torch.addmm(intercepts, table, slopes).log_softmax(dim=-1)
        away = slopes - centre
        loss = -logs.gather(1, truth).double().mean() + strength / 2 * away.double().square().sum()
        wrong = logs.exp_().scatter_add_(1, truth, torch.full(truth.shape, -1.0)) / frames  # (N, present)
        gradient = torch.cat([table.T @ wrong + strength * away, wrong.sum(dim=0, keepdim=True)])
        return float(loss), gradient.double().numpy().ravel()

    start = np.append(centre.numpy().ravel(), np.zeros(len(present)))
    settings: Any = {"maxiter": max_iterations, "ftol": 1e-7, "gtol": 1e-5}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=settings)
    if found.nit >= max_iterations:
        msg = f"stacking on {frames} frames stopped after {max_iterations} iterations: raise max_iterations or strength"
        warnings.warn(msg, RuntimeWarning, stacklevel=2)
    slopes, intercepts = found.x[: centre.numel()].reshape(centre.shape).T, found.x[centre.numel() :]
    coefficients: Any = np.zeros((classes, members, classes))
    offsets: Any = np.full(classes, intercepts.min() - 50.0 - np.abs(slopes).sum() * abs(np.log(floor)))
    coefficients[present], offsets[present] = slopes.reshape(-1, members, classes), intercepts
    return Stacked(coefficients, offsets, floor, outputs.fingerprint, outputs.members)


@dataclass(frozen=True)
class CascadeFit:
    """A cascade, with what it loses and saves on some frames, against asking all members about all of them."""

    rule: Cascade
    #: the accuracy of the rule over all members minus that of the cascade, a fraction, with its 95 % interval over
    #: recordings; NaN for the ends where there is only one
    loss: Interval
    changed: float  #: fraction of the frames whose class is another
    asked: tuple[float, ...]  #: for each of the M members, the fraction of the frames about which it is asked

    @property
    def share(self) -> float:
        """Fraction of the members asked about a frame, on average, of those that have influence."""
        return float(sum(self.asked) / len(self.rule.asked_in(len(self.asked))))


def fit_cascade(
    outputs: MemberOutputs, rule: Rule, *, loss: float | None = 0.001, costs: Mapping[str, Cost] | None = None
) -> CascadeFit:
    """A cascade that loses at most so much accuracy against the rule over all members.

    The threshold is lowered step by step for as long as the upper end of the loss's 95 % interval over recordings
    stays within what is accepted. One frame in a recording of its own is counted as lost besides, so that where few
    frames lose nothing, this is not taken for certainty.

    Args:
        outputs: with labels; for a threshold, of two recordings or more. Judge the result on others.
        rule: over all members.
        loss: the accepted loss, a fraction: 0.001 is .1 point. None makes the cascade exact.
        costs: member -> what it costs, as `ensemble.run.measure_costs` measured it. Members are asked by their weight
            in the rule, where there are costs per microsecond that they take alone, the largest first; of equal ones
            the most accurate first.

    Raises:
        ValueError: no labels, one recording, a negative loss, a cost that is missing or not positive; an exact cascade
            of a rule that has none, or a rule that cannot leave members out.

    References:
        Angelopoulos, Bates, Candes, Jordan, Lei, "Learn then test: calibrating predictive algorithms to achieve risk
        control", Annals of Applied Statistics 19(2), 2025, of testing in a fixed sequence.
    """
    expect_outputs(outputs)
    labels, (members, frames, classes) = outputs.require_labels(), outputs.shape
    if loss is not None and not 0 <= loss < 1:
        msg = f"expected an accepted loss of accuracy, such as 0.001, or None for an exact cascade, got {loss}"
        raise ValueError(msg)
    costs = dict.fromkeys(outputs.members, Cost(1.0, 1.0)) if costs is None else costs
    if bad := [name for name in outputs.members if not isinstance(costs.get(name), Cost) or not costs[name].alone > 0]:
        msg = f"expected the positive time of each member alone in costs, got none of {bad}"
        raise ValueError(msg)
    whole = rule_for(rule, outputs.members)
    sums = whole.sums(members)
    weights = np.ones(members) if sums is None else sums.largest.numpy()
    worth = weights / [costs[name].alone for name in outputs.members]
    right = [float((row.argmax(dim=-1) == labels).double().mean()) for row in outputs.log_probabilities]
    used = range(members) if whole.used is None else whole.used
    order = tuple(sorted(used, key=lambda place: (-worth[place], -right[place])))
    of = whole if declared(rule).members else rule
    made = Cascade(of, order, None if loss is None else 1.0, outputs.fingerprint, outputs.members)
    if loss is None:
        return judge_cascade(outputs, made)
    assert outputs.groups is not None  # filled in when made
    if len(np.unique(outputs.groups.numpy())) < 2:
        msg = "expected validation frames of two recordings or more for the interval of a loss, got one"
        raise ValueError(msg)
    stages = (made.abstaining if outputs.abstain else made).stages(members)
    leads, correct = (np.ones((len(stages), frames), kind) for kind in (np.float32, np.int8))
    for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes)), nan="if declared"):
        logs = outputs.log_probabilities[:, block].float()
        for stage, (places, some) in enumerate(stages):
            rows = some.of_logs(logs[places]) if some.logarithmic else some(probabilities[places])
            leads[stage, block] = margin(rows)
            correct[stage, block] = rows.argmax(dim=-1) == labels[block]
    leads[-1] = np.inf  # there is nobody else to ask
    groups = outputs.groups.numpy()
    recordings = np.append(groups, groups.max() + 1)
    threshold, steps = 1.0, np.linspace(0, 1, _THRESHOLDS)
    lowered = np.quantile(leads[:-1], steps) if len(stages) > 1 else np.empty(0)  # a single member is asked anyway
    for candidate in map(float, np.unique(lowered)[::-1].clip(0, 1)):
        stage = (leads > candidate).argmax(axis=0)  # (N,), the first at which a frame is settled
        lost = correct[-1].astype(float) - np.take_along_axis(correct, stage[None], axis=0)[0]
        if not t_interval(np.append(lost, 1.0), recordings).high <= loss:
            break
        threshold = candidate
    return judge_cascade(outputs, replace(made, threshold=threshold))


def judge_cascade(outputs: MemberOutputs, rule: Cascade) -> CascadeFit:
    """What a cascade loses and saves on outputs with labels; on those that it was fitted on it looks better."""
    expect_outputs(outputs)
    if not isinstance(rule, Cascade):
        msg = f"expected a Cascade, as fit_cascade makes it, got {type(rule).__name__}"
        raise TypeError(msg)
    outputs = outputs.subset(rule.members) if rule.members else outputs
    labels, (members, frames, classes) = outputs.require_labels(), outputs.shape
    able = rule.abstaining if outputs.abstain else rule
    whole, order = declared(able.of), rule.asked_in(members)
    lost, changed, asked = np.empty(frames), np.empty(frames, bool), np.empty(frames, int)
    for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes)), nan="if declared"):
        logs, truth = outputs.log_probabilities[:, block].float(), labels[block]
        by_all = (whole.of_logs(logs) if whole.logarithmic else whole(probabilities)).argmax(dim=-1)
        rows, counts = able.ask(known(logs), members)
        by_some = torch.where(counts == len(order), by_all, rows.argmax(dim=-1))
        lost[block] = (by_all == truth).double() - (by_some == truth).double()
        changed[block], asked[block] = by_all != by_some, counts
    assert outputs.groups is not None  # filled in when made
    shares = [float((asked > order.index(place)).mean()) if place in order else 0.0 for place in range(members)]
    return CascadeFit(rule, t_interval(lost, outputs.groups), float(changed.mean()), tuple(shares))
