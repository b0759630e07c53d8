"""`Ensemble`: one classifier, in scikit-learn's conventions, kept in a registry."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.calibration import CalibrationDisplay
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

import ensemble
import zoo


class AnyLength(nn.Module):
    """Logits from the mean of a row of any length."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-slope, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, anything) -> (B, 4)."""
        return x.float().mean(1, keepdim=True) * self.scale


def linear() -> ensemble.Ensemble:
    """Two models of two inputs and two classes."""
    torch.manual_seed(0)
    modules = {name: nn.Linear(2, 2) for name in "ab"}
    return ensemble.Ensemble(ensemble.from_modules(modules, classes=["no", "yes"]), ensemble.mean)


def any_length() -> ensemble.Ensemble:
    """Two models of four classes that take rows of any length."""
    modules = {"a": AnyLength(1.0), "b": AnyLength(2.0)}
    return ensemble.Ensemble(ensemble.from_modules(modules, classes=[*"abcd"]), ensemble.WeightedMean([1, 1]))


NAMES = "predictions are the members' class names, which the check compares with its own labels or as numbers"
FROZEN = {
    "check_do_not_raise_errors_in_init_or_set_params": "an ensemble is complete and consistent when it is made",
    "check_n_features_in_after_fitting": "the members decide what length the inputs have, not the data",
    "check_n_features_in": "the length of the inputs is known before fit",
    "check_classifiers_one_label": NAMES,
    "check_classifiers_classes": NAMES,
    "check_supervised_y_2d": NAMES,
    "check_classifiers_train": NAMES,
    "check_estimators_pickle": NAMES,
    "check_methods_sample_order_invariance": NAMES,
    "check_methods_subset_invariance": NAMES,
    "check_classifier_data_not_an_array": NAMES,
    "check_fit_idempotent": NAMES,
}


@parametrize_with_checks(
    [any_length()],
    expected_failed_checks=lambda estimator: FROZEN,
    xfail_strict=True,
)
def test_it_is_a_classifier_of_scikit_learn(estimator: ensemble.Ensemble, check: Any) -> None:
    """All of scikit-learn's own checks, but those that a classifier with frozen members cannot pass."""
    check(estimator)


def test_inputs_are_checked_as_scikit_learn_checks_them() -> None:
    """Another length, NaN, one row without its axis; arrays of more axes are the models' own business."""
    final = linear()
    assert final.n_features_in_ == 2
    with pytest.raises(ValueError, match="X has 3 features, but Ensemble is expecting 2 features as input"):
        final.predict(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="X has 3 features, but Ensemble is expecting 2 features as input"):
        final.fit(np.zeros((4, 3)), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="Input X contains NaN"):
        final.predict([[0.0, np.nan]])
    with pytest.raises(ValueError, match="Reshape your data"):
        final.predict(np.zeros(2))
    assert not hasattr(any_length(), "n_features_in_")
    images = {name: nn.Sequential(nn.Flatten(), nn.Linear(6, 2)) for name in "ab"}
    members = ensemble.from_modules(images, classes=["no", "yes"])
    assert ensemble.Ensemble(members, ensemble.mean).predict(np.zeros((4, 3, 2))).shape == (4,)


def test_fitting_changes_nothing() -> None:
    """`fit` checks labels as `score` does, and returns the ensemble as it was; a clone has the same members."""
    final, x = linear(), np.random.default_rng(0).normal(size=(6, 2))
    before = final.predict_proba(x)
    check_is_fitted(final)
    assert final.fit(x, final.predict(x)) is final
    copy = clone(final)
    assert copy is not final
    assert copy.get_params() == {"members": final.members, "rule": ensemble.mean}
    np.testing.assert_array_equal(copy.fit(x, [0] * 6).predict_proba(x), before)
    with pytest.raises(ValueError, match=r"expected labels among .* got \['perhaps'\]"):
        final.fit(x, ["perhaps"] * 6)
    with pytest.raises(ValueError, match="expected 6 labels, one per frame, got 2"):
        final.fit(x, ["no", "yes"])


def test_what_scikit_learn_does_with_classifiers() -> None:
    """Cross-validation scores the frozen members, a search chooses a rule, a display draws the calibration."""
    final, x = linear(), np.random.default_rng(0).normal(size=(60, 2))
    y = np.where(np.arange(60) % 4 == 0, final.predict(x)[::-1], final.predict(x))
    scores = cross_val_score(final, x, y, cv=3)
    assert scores.mean() == pytest.approx(final.score(x, y))
    weights = np.arange(60.0)
    assert final.score(x, y, weights) == pytest.approx(np.average(final.predict(x) == y, weights=weights))
    first = ensemble.WeightedMean([1, 0])
    found = GridSearchCV(final, {"rule": [ensemble.mean, first]}, cv=2).fit(x, final.set_params(rule=first).predict(x))
    assert found.best_params_ == {"rule": first}
    display = CalibrationDisplay.from_estimator(final, x, y, n_bins=3)
    assert len(display.y_prob) == 60


def test_only_an_ensemble_waits_for_scikit_learn() -> None:
    """It takes a second to import; members, outputs, rules and fits do without."""
    names = "collect, ensemble.load, ensemble.evaluate, ensemble.fit_weights, ensemble.select"
    code = f"import sys, ensemble; ensemble.{names}; print('sklearn' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_it_can_be_sent_to_another_process(final: ensemble.Ensemble, frames: zoo.FrameSet) -> None:
    """As joblib does; members from a registry and fitted rules included."""
    again = pickle.loads(pickle.dumps(final))
    np.testing.assert_allclose(again.predict_proba(frames), final.predict_proba(frames), atol=1e-6)


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
    outputs = ensemble.collect(final.members, frames).probabilities
    expected = (outputs * torch.tensor([1, 2, 3]).view(3, 1, 1) / 6).sum(0).numpy()
    np.testing.assert_allclose(final.predict_proba(frames), expected, atol=1e-6)
    assert final.predict(frames).tolist() == [frames.classes[i] for i in expected.argmax(1)]
    assert final.classes_.tolist() == list(frames.classes)


def test_its_score_is_the_accuracy_of_names_indices_or_frames(final: ensemble.Ensemble, frames: zoo.FrameSet) -> None:
    """Three ways to give the labels."""
    names = np.array(frames.classes)[frames.labels.numpy()]
    share = float((final.predict(frames) == names).mean())
    assert final.score(frames) == final.score(frames, names) == final.score(frames, frames.labels) == share


def test_labels_that_do_not_fit_are_refused(final: ensemble.Ensemble, frames: zoo.FrameSet) -> None:
    """None, too few, unknown names, indices outside."""
    unlabelled = zoo.FrameSet(frames.features, None, frames.starts, frames.classes)
    with pytest.raises(ValueError, match="expected labels y"):
        final.score(unlabelled)
    with pytest.raises(ValueError, match="expected 138 labels, one per frame, got 2"):
        final.score(frames, ["a", "b"])
    with pytest.raises(ValueError, match=r"expected labels among .* got \['z'\]"):
        final.score(frames, ["z"] * 138)
    with pytest.raises(ValueError, match="labels from 0 to 3, got 7 to 7"):
        final.score(frames, [7] * 138)


def test_it_survives_the_registry(
    final: ensemble.Ensemble, registry: zoo.Registry, frames: zoo.FrameSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members by id, rule with its numbers and the frames it was fitted on; also by an alias, in one reading."""
    fitted = ensemble.Ensemble(final.members, ensemble.WeightedMean([1, 2, 3], fingerprint="ab" * 32))
    entry = registry.register_ensemble("final", fitted)
    registry.alias("best", "final")
    snapshot, reads = zoo.Registry.snapshot, []
    monkeypatch.setattr(zoo.Registry, "snapshot", lambda self: reads.append(1) or snapshot(self))
    again = ensemble.load_ensemble(registry, "best")
    assert len(reads) == 1
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


def test_a_fitted_rule_finds_its_members_by_name() -> None:
    """In another order each weight still meets its member; a member that the rule needs is missed by name."""
    torch.manual_seed(1)
    modules, x = {name: nn.Linear(2, 2) for name in "abc"}, torch.randn(5, 2)
    rule = ensemble.WeightedMean([3, 0, 1], members=("a", "b", "c"))
    straight, turned, fewer = (
        ensemble.Ensemble(ensemble.from_modules({n: modules[n] for n in names}, classes=["no", "yes"]), rule)
        for names in ("abc", "cba", "ca")
    )
    np.testing.assert_allclose(turned.predict_proba(x), straight.predict_proba(x), rtol=1e-6)
    np.testing.assert_allclose(fewer.predict_proba(x), straight.predict_proba(x), rtol=1e-6)
    with pytest.raises(ValueError, match=r"got none named \['c'\] among \['a', 'b'\]"):
        ensemble.Ensemble(ensemble.from_modules({n: modules[n] for n in "ab"}, classes=["no", "yes"]), rule)


def test_a_logarithmic_rule_takes_the_members_logarithms() -> None:
    """Every class has a member whose probability is zero in float32: the class of the summed logits is predicted."""
    logits = torch.tensor([[0.0, -160.0, -200.0], [-300.0, -150.0, 0.0], [-180.0, 0.0, -170.0]])
    modules = {}
    for name, row in zip("abc", logits, strict=True):
        modules[name] = torch.nn.Linear(2, 3)
        modules[name].weight.data.zero_()
        modules[name].bias.data.copy_(row)
    members = ensemble.from_modules(modules, classes=["x", "y", "z"])
    final = ensemble.Ensemble(members, ensemble.product)
    assert final.predict(torch.zeros(1, 2)).tolist() == ["xyz"[int(logits.sum(dim=0).argmax())]]
