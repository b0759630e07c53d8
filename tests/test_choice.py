"""The choice of a rule: the simplest within one standard error of the best."""

import math

import pytest
import torch

import ensemble

RULES = {"majority": ensemble.majority, "mean": ensemble.mean, "weighted": ensemble.WeightedMean([4, 2, 1, 0])}


def some_outputs(members: int = 4, frames: int = 400, classes: int = 5, *, seed: int = 0) -> ensemble.MemberOutputs:
    """Members of falling strength over twenty or more recordings; the last class never occurs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - 1, (frames,), generator=generator)
    hint = torch.nn.functional.one_hot(labels, classes)
    rows = [
        (torch.randn(frames, classes, generator=generator, dtype=torch.float64) + hint * (2.5 - 0.3 * i)).softmax(-1)
        for i in range(members)
    ]
    return ensemble.MemberOutputs.from_probabilities(
        {f"m{i}": row for i, row in enumerate(rows)}, labels=labels, groups=torch.arange(frames) // 11
    )


def test_the_simplest_within_one_standard_error_is_chosen() -> None:
    """Candidates that differ by chance fall back to the single member; a real gain is taken."""
    o = some_outputs()
    copies = {"copy": ensemble.WeightedMean([1, 0, 0, 0]), "weak": ensemble.WeightedMean([0, 0, 0, 1])}
    single = ensemble.choose(o, copies)
    assert single.name == "m0"
    torch.testing.assert_close(single.rule(o.probabilities), o.probabilities[0])
    pooled = ensemble.choose(o, {"mean": ensemble.mean, "log_mean": ensemble.log_mean})
    assert pooled.name == "mean"
    assert pooled.rule is ensemble.mean
    assert pooled.behind["m0"] > pooled.error["m0"]


def test_the_choice_is_the_definition() -> None:
    """Best minus candidate, and the standard deviation of the resampled distance."""
    o = some_outputs()
    labels, p = o.require_labels(), o.probabilities
    choice = ensemble.choose(o, RULES, by="log_loss", replicates=200, seed=4)
    frame = torch.arange(len(labels))
    best = min([p[0], *(rule(p) for rule in RULES.values())], key=lambda rows: -rows[frame, labels].log().mean())
    distance = (best[frame, labels].double().log() - p[0][frame, labels].double().log()).numpy()
    sums, sizes = ensemble.judge.significance.sums_by_group(distance, o.groups)
    resampled = ensemble.judge.cluster_bootstrap(sums, sizes, replicates=200, seed=4)
    assert choice.behind["m0"] == pytest.approx(distance.mean(), abs=1e-6)
    assert choice.error["m0"] == pytest.approx(resampled.std(), rel=1e-4)


def test_one_recording_is_too_little_to_leave_the_single_member() -> None:
    """No spread, no standard error: the rule that is ahead by accident is not chosen."""
    o = some_outputs(frames=11)
    found = ensemble.choose(o, {"mean": ensemble.mean}, by="log_loss")
    assert found.name in o.members
    assert all(math.isnan(error) for error in found.error.values())


def test_a_choice_that_makes_no_sense_is_refused() -> None:
    """An unknown measure, and a rule with a member's name."""
    with pytest.raises(ValueError, match="by 'accuracy' or 'log_loss', got 'nonsense'"):
        ensemble.choose(some_outputs(), {"mean": ensemble.mean}, by="nonsense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"names for rules that no member has, got \['m1'\]"):
        ensemble.choose(some_outputs(), {"mean": ensemble.mean, "m1": ensemble.mean})


def test_a_choice_needs_frames() -> None:
    """Nothing is chosen on nothing."""
    o = ensemble.MemberOutputs.from_probabilities({"a": torch.empty(0, 2)}, labels=torch.empty(0).long())
    with pytest.raises(ValueError, match="expected frames to choose on, got none"):
        ensemble.choose(o, {})
