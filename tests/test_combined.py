"""`Ensemble`: one classifier, in scikit-learn's conventions, kept in a registry."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ensemble
import zoo


@pytest.fixture
def registry(tmp_path: Path, frames: zoo.FrameSet) -> zoo.Registry:
    """Three untrained models over two contexts."""
    registry = zoo.Registry(tmp_path / "registry.json")
    for seed, (name, context) in enumerate([("a", 1), ("b", 2), ("c", 1)]):
        spec = zoo.Spec("cylinder", features=6, context=context, classes=4, options={"width": 8, "depth": 1})
        registry.register(name, zoo.build(spec, seed=seed), spec=spec, classes=frames.classes)
    return registry


@pytest.fixture
def final(registry: zoo.Registry) -> ensemble.Ensemble:
    """All three, weighted."""
    return ensemble.Ensemble(ensemble.load(registry, "*"), ensemble.WeightedMean([1, 2, 3]))


def test_its_probabilities_are_the_rule_of_the_members(final: ensemble.Ensemble, frames: zoo.FrameSet) -> None:
    """`predict_proba` = rule over the loop of single models; `predict` its best class by name."""
    spoken = ensemble.collect(final.members, frames).probabilities
    expected = (spoken * torch.tensor([1, 2, 3]).view(3, 1, 1) / 6).sum(0).numpy()
    np.testing.assert_allclose(final.predict_proba(frames), expected, atol=1e-6)
    assert final.predict(frames).tolist() == [frames.classes[i] for i in expected.argmax(1)]
    assert final.classes_.tolist() == list(frames.classes)


def test_its_score_is_the_accuracy_of_names_indices_or_frames(final: ensemble.Ensemble, frames: zoo.FrameSet) -> None:
    """Three ways to say the truth."""
    names = np.array(frames.classes)[frames.labels.numpy()]
    share = float((final.predict(frames) == names).mean())
    assert final.score(frames) == final.score(frames, names) == final.score(frames, frames.labels) == share


def test_labels_that_do_not_fit_are_refused(final: ensemble.Ensemble, frames: zoo.FrameSet) -> None:
    """None, too few, unknown names, indices outside."""
    silent = zoo.FrameSet(frames.features, None, frames.starts, frames.classes)
    with pytest.raises(ValueError, match="expected labels y"):
        final.score(silent)
    with pytest.raises(ValueError, match="expected 138 labels, one per frame, got 2"):
        final.score(frames, ["a", "b"])
    with pytest.raises(ValueError, match=r"expected labels among .* got \['z'\]"):
        final.score(frames, ["z"] * 138)
    with pytest.raises(ValueError, match="labels from 0 to 3, got 7 to 7"):
        final.score(frames, [7] * 138)


def test_it_survives_the_registry(final: ensemble.Ensemble, registry: zoo.Registry, frames: zoo.FrameSet) -> None:
    """Members by id, rule with its numbers and the frames it was fitted on; also through an alias."""
    fitted = ensemble.Ensemble(final.members, ensemble.WeightedMean([1, 2, 3], fingerprint="ab" * 32))
    entry = registry.register_ensemble("final", fitted)
    registry.alias("best", "final")
    again = ensemble.load_ensemble(registry, "best")
    assert again.rule == fitted.rule
    assert entry.fitted_on == "ab" * 32
    np.testing.assert_array_equal(again.predict_proba(frames), final.predict_proba(frames))


def test_an_ensemble_keeps_its_versions_when_a_name_moves_on(
    final: ensemble.Ensemble, registry: zoo.Registry, frames: zoo.FrameSet
) -> None:
    """A newer version of a member's name does not change what was registered."""
    registry.register_ensemble("final", final)
    before = final.predict_proba(frames)
    spec = registry.get("a").spec
    registry.register("a", zoo.build(spec, seed=99), spec=spec, classes=frames.classes)
    assert registry.get("a").number == 2
    np.testing.assert_array_equal(ensemble.load_ensemble(registry, "final").predict_proba(frames), before)


def test_members_from_elsewhere_are_not_registered_by_reference(registry: zoo.Registry) -> None:
    """They have to be registered first."""
    members = ensemble.from_modules({"x": torch.nn.Linear(3, 2)}, classes=["no", "yes"])
    with pytest.raises(ValueError, match=r"\['x'\] come from elsewhere; register them first"):
        registry.register_ensemble("final", ensemble.Ensemble(members, ensemble.mean))


def test_a_rule_of_another_size_is_refused_at_once(final: ensemble.Ensemble) -> None:
    """An ensemble is complete and consistent when it is made."""
    with pytest.raises(ValueError, match="2 members"):
        ensemble.Ensemble(final.members, ensemble.WeightedMean([1, 2]))
    with pytest.raises(ValueError, match="expected rows of shape"):
        ensemble.Ensemble(final.members, lambda p: p[0, :, :2])


def test_any_module_and_numpy_inputs_will_do() -> None:
    """Foreign members, plain arrays, and no frames at all."""
    members = ensemble.from_modules({n: torch.nn.Linear(3, 2) for n in "ab"}, classes=["no", "yes"])
    final = ensemble.Ensemble(members, ensemble.mean)
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    assert final.predict_proba(x).shape == (7, 2)
    assert final.predict_proba(x[:0]).shape == (0, 2)
    assert set(final.predict(x)) <= {"no", "yes"}
