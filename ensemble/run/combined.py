"""`Ensemble`: members and the rule that combines them, as one scikit-learn classifier that a registry can keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, column_or_1d, validate_data
from torch import Tensor

import zoo
from ensemble.outputs.arrays import class_indices, numbers
from ensemble.rules.fitted import rule_for
from ensemble.rules.table import Rule, rule_from_json
from ensemble.run.collection import Inputs, answers, count_inputs, inputs_of
from ensemble.run.members import Members, load
from zoo._names import checked
from zoo.onnx import Exported

Labels = Sequence[Any] | NDArray[Any] | Tensor


class Ensemble(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Members and the rule that combines them, as one classifier.

    It is a scikit-learn classifier whose members are frozen: `clone` shares them, and `fit` checks its arguments and
    changes nothing. So `cross_val_score`, `CalibrationDisplay.from_estimator` and `check_is_fitted` work, and
    `GridSearchCV(final, {"rule": [mean, majority]})` chooses a rule.

    Args:
        members: M models with one set of classes.
        rule: (M, N, C) probabilities -> (N, C), such as `mean` or `fit.rule`; one that knows the names of the members
            it was fitted on finds them among these, in any order.

    Attributes:
        classes_: (C,) names of the classes, in the order of the columns of `predict_proba`.
        n_features_in_: length of one input vector; there is no such attribute where the members do not declare it.

    Raises:
        ValueError: a member that the rule needs is missing, or the rule does not return rows (N, C).

    Example:
        >>> from ensemble import from_modules, mean
        >>> members = from_modules({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2)}, classes=["no", "yes"])
        >>> final = Ensemble(members, mean)
        >>> final.predict_proba(torch.zeros(5, 3)).shape, final.classes_.tolist()
        ((5, 2), ['no', 'yes'])
    """

    @checked
    def __init__(self, members: Members, rule: Rule) -> None:
        self.members = members
        self.rule = rule
        logs = torch.full((len(members), 1, len(members.classes)), -math.log(len(members.classes)))
        rows = rule_for(rule, members.names).of_logs(logs)
        if rows.shape != logs.shape[1:]:
            msg = f"expected rows of shape {tuple(logs.shape[1:])} from the rule, got {tuple(rows.shape)}"
            raise ValueError(msg)

    @property
    def classes_(self) -> NDArray[np.str_]:
        """(C,) names of the classes."""
        return np.array(self.members.classes)

    @property
    def n_features_in_(self) -> int:
        """Length of one input vector."""
        if self.members.inputs is None:
            msg = "members that declare no length of their inputs have no n_features_in_"
            raise AttributeError(msg)
        return self.members.inputs

    def fit(self, x: Inputs, y: Labels | None = None) -> Self:
        """Check inputs, at least one, and labels as in `score`; neither the members nor the rule change.

        Raises:
            ValueError: inputs that the members do not take, or labels that `score` would refuse.
        """
        inputs = self._inputs(x, least=1)
        if y is not None:
            check_classification_targets(np.asarray(y.cpu() if isinstance(y, Tensor) else y))
        self._truth(inputs, y)
        return self

    def predict_proba(self, x: Inputs) -> NDArray[np.float32]:
        """(N, C) probabilities of the classes for N frames, or for (N, inputs) windows.

        Memory beyond the result is that of one piece of the frames, however many there are.
        """
        return self.ask(x)[0]

    def ask(self, x: Inputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """`predict_proba`, and (N,) how many members were asked about each frame.

        All of them, unless the rule is an `ensemble.rules.Cascade`; the probabilities are then those of the members
        that were asked.
        """
        inputs = self._inputs(x)
        out = torch.empty(count := count_inputs(inputs), len(self.members.classes))
        asked = torch.empty(count, dtype=torch.int64)
        start = 0
        for rows, counts in answers(self.members, inputs, rule_for(self.rule, self.members.names)):
            some = slice(start, start + len(rows))
            out[some], asked[some] = rows, counts
            start = some.stop
        return out.numpy(), asked.numpy()

    def predict(self, x: Inputs) -> NDArray[np.str_]:
        """(N,) names of the most probable classes; of equally probable ones the first in `classes_`."""
        names: NDArray[np.str_] = self.classes_[self.predict_proba(x).argmax(axis=1)]
        return names

    def score(self, x: Inputs, y: Labels | None = None, sample_weight: NDArray[Any] | None = None) -> float:
        """Accuracy, a fraction.

        Args:
            x: frames or inputs.
            y: (N,) class names, or indices into `classes_`; None takes the labels of the frames.
            sample_weight: (N,) weight of each frame in the mean; None weighs all alike.

        Raises:
            ValueError: no labels, not one label per frame, or a label that is no class.
        """
        inputs = self._inputs(x)
        truth = self._truth(inputs, y)
        return float(np.average(self.predict(inputs) == truth, weights=sample_weight))

    def to_json(self) -> dict[str, Any]:
        """Plain data for a registry: the members' references, the rule with its numbers, the order of the classes.

        Raises:
            ValueError: a member does not come from a registry, or the rule has no name.
        """
        if outside := [member.name for member in self.members if member.outside]:
            msg = f"expected members whose weights a registry can keep, but {outside} are no torch modules"
            raise ValueError(msg)
        if foreign := [member.name for member in self.members if not member.about.reference]:
            msg = f"expected members from a registry, but {foreign} come from elsewhere; register them first"
            raise ValueError(msg)
        rule = rule_for(self.rule, self.members.names)
        references = [about.reference for about in self.members.about]
        data = {"members": references, "rule": rule.to_json(), "classes": list(self.members.classes)}
        return data | ({"fitted_on": rule.fingerprint} if rule.fingerprint else {})

    def to_onnx(
        self,
        path: str | Path,
        *,
        with_windows: bool = False,
        each: bool = False,
        precision: str = "float32",
        frames: zoo.FrameSet | None = None,
        most_changed: float = 0.01,
    ) -> Exported:
        """Write members and rule as one ONNX file, with a JSON file beside it, `PATH.json`.

        Its outputs are `probabilities` (N, C), `class` (N,) and, where asked, `members` (M, N, C). Members that have
        no influence on the rule are left out.

        Args:
            path: the file, whole or not there; its name ends in `.onnx`.
            with_windows: the file takes the raw features (T, F) of one recording, and normalises and cuts windows by
                itself; otherwise it takes windows (N, inputs) of the largest context.
            each: whether the file gives each member's probabilities too.
            precision: "float32"; "float16", half the bytes; "int8", weights as 8-bit integers, a quarter.
            frames: frames on which the file is compared with the ensemble; required for float16 and int8.
            most_changed: refuse a file that gives more than this fraction of the frames another class.

        Raises:
            ValueError: members or a rule that cannot be exported, or a file that does not agree with them.
            ImportError: the extra `ship` is not installed.
        """
        from ensemble.run.folded import export

        return export(
            self.members,
            self.rule,
            path,
            with_windows=with_windows,
            each=each,
            precision=precision,
            frames=frames,
            most_changed=most_changed,
        )

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags

    def _inputs(self, x: Inputs, *, least: int = 0) -> Inputs:
        """Frames, tensors and mappings as they are, and what members outside torch are to get.

        Any other array is checked as scikit-learn does, with at least so many rows.
        """
        if isinstance(x, zoo.FrameSet | Tensor | Mapping):
            return inputs_of(self.members, x)
        if any(member.outside for member in self.members):
            return inputs_of(self.members, x if hasattr(x, "shape") else np.asarray(x))
        wanted = {"dtype": "numeric", "allow_nd": True, "ensure_min_samples": least}
        flat = np.ndim(x) <= 2  # else its second axis is not that of features
        array = validate_data(self, x, reset=False, **wanted) if flat else check_array(x, **wanted)
        return numbers(array, "inputs")

    def _truth(self, x: Inputs, y: Labels | None) -> NDArray[Any]:
        """(N,) class names from names or indices, one per frame."""
        if y is None:
            if not isinstance(x, zoo.FrameSet) or x.labels is None:
                why = "Ensemble requires y to be passed, but the target y is None"  # scikit-learn's words
                msg = f"expected labels y, or frames that have labels: {why}"
                raise ValueError(msg)
            y = np.array(x.classes)[x.labels.cpu().numpy()]
        given: NDArray[Any] = column_or_1d(np.asarray(y.cpu() if isinstance(y, Tensor) else y), warn=True)
        count, classes = count_inputs(x), self.members.classes
        if len(given) != count:
            msg = f"expected {count} labels, one per frame, got {len(given)}"
            raise ValueError(msg)
        truth: NDArray[Any] = self.classes_[class_indices(given, classes, len(classes), frames=count).numpy()]
        return truth


@checked
def load_ensemble(registry: zoo.Registry, name: str, **options: Any) -> Ensemble:
    """The ensemble of this name or alias, with the hash of every member checked; `options` are those of `load`.

    Raises:
        ValueError: an unknown name, a blob that is not what was registered, or a rule that is not in the table.
    """
    known = registry.snapshot()
    entry = known.get_ensemble(name)
    members = load(registry, [known.get(member) for member in entry.members], **options)
    return Ensemble(members, rule_from_json(entry.rule))
