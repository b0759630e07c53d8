"""Bayes votes and stacking: counts by hand, automatic differentiation as an oracle."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import ensemble


def overconfident_outputs(
    members: int = 3, frames: int = 600, classes: int = 4, *, seed: int = 0
) -> ensemble.MemberOutputs:
    """Members that know something and are too sure of it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (frames,), generator=generator)
    hint = torch.nn.functional.one_hot(labels, classes) * 2.0
    rows = (torch.randn(members, frames, classes, generator=generator) * 2 + hint).softmax(-1)
    return ensemble.MemberOutputs.from_probabilities({f"m{i}": row for i, row in enumerate(rows)}, labels=labels)


def nats(rows: Tensor, labels: Tensor) -> float:
    """Mean log-loss."""
    return -rows[torch.arange(len(labels)), labels].double().log().mean().item()


def test_bayes_vote_counts_by_hand() -> None:
    """One member predicts 0, 0, 1 where the truth is 0, 1, 1: with half a count added everywhere."""
    rows = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]
    o = ensemble.MemberOutputs.from_probabilities({"a": rows}, labels=[0, 1, 1])
    rule = ensemble.fit.fit_bayes_vote(o)
    expected = [[1.5 / 2, 1.5 / 3], [0.5 / 2, 1.5 / 3]]  # predicted, then true
    np.testing.assert_allclose(np.exp(rule.log_likelihoods[0]), expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(rule.log_priors), [1.5 / 4, 2.5 / 4], rtol=1e-12)


def test_bayes_vote_learns_whom_to_believe() -> None:
    """A member that swaps two classes is as good as one that does not."""
    o = overconfident_outputs(1, 500, 3)
    swapped = o.probabilities[0][:, [1, 0, 2]]
    wrong = ensemble.MemberOutputs.from_probabilities({"a": swapped}, labels=o.labels)
    straight, turned = ensemble.fit.fit_bayes_vote(o), ensemble.fit.fit_bayes_vote(wrong)
    torch.testing.assert_close(straight(o.probabilities), turned(wrong.probabilities))


@pytest.mark.parametrize("classes", [2, 4])
def test_stacking_finds_the_least_that_autograd_finds(classes: int) -> None:
    """The objective written out, in doubles: log-loss plus half the strength times the distance from `log_mean`."""
    o = overconfident_outputs(2, 300, classes)
    labels, logs = o.require_labels(), o.probabilities.double().log()
    centre = torch.eye(classes, dtype=torch.float64).expand(2, -1, -1) / 2  # (M, C given, C)
    slopes, intercepts = centre.clone().requires_grad_(), torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([slopes, intercepts], max_iter=200, line_search_fn="strong_wolfe")

    def rows() -> Tensor:
        return (torch.einsum("mnc,mck->nk", logs, slopes) + intercepts).softmax(-1)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -rows()[torch.arange(300), labels].log().mean() + 0.3 / 2 * (slopes - centre).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    found = ensemble.fit.fit_stacked(o, strength=0.3)(o.probabilities.double())
    torch.testing.assert_close(found, rows().detach(), rtol=0, atol=1e-2)  # it stops at 1e-7 of the loss


def test_stacking_on_few_frames_is_no_worse_than_the_members_together() -> None:
    """Fewer frames than coefficients; a ridge a thousand times weaker fails here."""
    fitted, fresh = overconfident_outputs(8, 400, 10, seed=1), overconfident_outputs(8, 4000, 10, seed=2)
    labels = fresh.require_labels()
    loss = nats(ensemble.fit.fit_stacked(fitted)(fresh.probabilities), labels)
    assert loss < nats(ensemble.mean(fresh.probabilities), labels)
    assert loss < nats(ensemble.log_mean(fresh.probabilities), labels)


def test_the_strength_of_stacking_does_not_depend_on_the_number_of_frames() -> None:
    """Every frame twice gives the same rule; without end, it gives the geometric mean of balanced classes."""
    o = overconfident_outputs(2, 300)
    twice = o.at(torch.arange(300).repeat(2))
    p = o.probabilities
    torch.testing.assert_close(ensemble.fit.fit_stacked(twice)(p), ensemble.fit.fit_stacked(o)(p), rtol=0, atol=1e-3)
    slopes = torch.tensor(ensemble.fit.fit_stacked(o, strength=1e6).coefficients)  # (C, M, C)
    torch.testing.assert_close(slopes, (torch.eye(4) / 2)[:, None].expand(-1, 2, -1), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="positive strength, got -1"):
        ensemble.fit.fit_stacked(o, strength=-1)


def test_stacking_says_when_it_stopped_early() -> None:
    """A note that names the way out, instead of another library's; none where the iterations suffice."""
    o = overconfident_outputs(2, 100)
    with pytest.warns(RuntimeWarning, match="on 100 frames stopped after 2 iterations: raise max_iterations or stren"):
        ensemble.fit.fit_stacked(o, max_iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble.fit.fit_stacked(o)


def test_stacking_rules_out_classes_never_seen() -> None:
    """Labels 0 and 2 of three: class 1 gets nothing."""
    o = overconfident_outputs(2, 200, 3)
    labels = torch.where(o.require_labels() == 1, 2, o.require_labels())
    seen = ensemble.MemberOutputs.from_probabilities(dict(zip("ab", o.probabilities, strict=True)), labels=labels)
    rows = ensemble.fit.fit_stacked(seen)(o.probabilities)
    assert rows[:, 1].max() < 1e-12
    assert ((rows.argmax(-1) == labels).double().mean() > 0.6).item()


@pytest.mark.parametrize("fit", [ensemble.fit.fit_bayes_vote, ensemble.fit.fit_stacked])
def test_fits_need_frames(fit: object) -> None:
    """Nothing is fitted on nothing."""
    empty = ensemble.MemberOutputs.from_probabilities({"a": torch.empty(0, 2)}, labels=torch.empty(0).long())
    with pytest.raises(ValueError, match="expected frames to fit on, got none"):
        fit(empty)  # type: ignore[operator]


def test_stacking_needs_two_classes() -> None:
    """With one class there is nothing to decide."""
    o = ensemble.MemberOutputs.from_probabilities({"a": [[0.5, 0.5]]}, labels=[1], classes=["x", "y"])
    with pytest.raises(ValueError, match="two classes or more to stack on, got only 'y'"):
        ensemble.fit.fit_stacked(o)
