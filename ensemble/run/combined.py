"""`Ensemble`: members and the rule that combines them, as one classifier that can be kept in a registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import zoo
from ensemble.rules.fitted import rule_for
from ensemble.rules.table import Rule, rule_from_json, rule_to_json
from ensemble.run.collecting import predictions
from ensemble.run.loading import load
from ensemble.run.members import Members

Inputs = zoo.FrameSet | Tensor | NDArray[Any]


class Ensemble:
    """Members that answer with one voice, in scikit-learn's conventions.

    It is complete when made: there is nothing to fit, so there is no `fit`.

    Args:
        members: M models with one set of classes.
        rule: (M, N, C) probabilities -> (N, C), such as `mean` or `WeightedMean(weights)`.

    Attributes:
        members: as given.
        rule: as given.
        classes_: (C,) names of the classes, in the order of the columns of `predict_proba`.

    Example:
        >>> from ensemble import from_modules, mean
        >>> members = from_modules({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2)}, classes=["no", "yes"])
        >>> final = Ensemble(members, mean)
        >>> final.predict_proba(torch.zeros(5, 3)).shape, final.classes_.tolist()
        ((5, 2), ['no', 'yes'])
    """

    def __init__(self, members: Members, rule: Rule) -> None:
        self.members = members
        self.rule = rule
        self._applied = rule_for(rule, members.names)
        self.classes_: NDArray[np.str_] = np.array(members.classes)
        self._combine(torch.full((len(members), 1, len(self.classes_)), 1 / len(self.classes_)))

    def predict_proba(self, x: Inputs) -> NDArray[np.float32]:
        """(N, C) probabilities of the classes for N frames, or for (N, inputs) windows.

        Memory beyond the result is that of one piece of the frames, however many there are.
        """
        inputs = torch.as_tensor(x) if isinstance(x, np.ndarray) else x
        out = torch.empty(len(inputs), len(self.classes_))
        at = 0
        for spoken in predictions(self.members, inputs):
            rows = self._combine(spoken.exp())
            out[at : at + len(rows)] = rows
            at += len(rows)
        return out.numpy()

    def predict(self, x: Inputs) -> NDArray[np.str_]:
        """(N,) names of the most probable classes; of equals the first in `classes_`."""
        names: NDArray[np.str_] = self.classes_[self.predict_proba(x).argmax(axis=1)]
        return names

    def score(self, x: Inputs, y: Sequence[Any] | NDArray[Any] | Tensor | None = None) -> float:
        """Accuracy, a fraction.

        Args:
            x: frames or windows.
            y: (N,) class names, or indices into `classes_`; None takes the labels of the frames.

        Raises:
            ValueError: no truth, as many labels as there are not frames, or a label that is no class.
        """
        truth = self._truth(x, y)
        predicted = self.predict(x)
        if len(truth) != len(predicted):
            msg = f"expected {len(predicted)} labels, one per frame, got {len(truth)}"
            raise ValueError(msg)
        return float((predicted == truth).mean())

    def to_json(self) -> dict[str, Any]:
        """What a registry keeps: the members' references, the rule with its numbers, the order of the classes.

        Raises:
            ValueError: a member does not come from a registry, or the rule has no name.
        """
        foreign = [member.name for member in self.members if not member.about.reference]
        if foreign:
            msg = f"expected members from a registry, but {foreign} come from elsewhere; register them first"
            raise ValueError(msg)
        data = {
            "members": [member.about.reference for member in self.members],
            "rule": rule_to_json(self._applied),
            "classes": list(self.members.classes),
        }
        fingerprint = self._applied.fingerprint
        return data | ({"fitted_on": fingerprint} if fingerprint else {})

    def _combine(self, probabilities: Tensor) -> Tensor:
        rows = self._applied(probabilities)
        if rows.shape != probabilities.shape[1:]:
            msg = f"expected rows of shape {tuple(probabilities.shape[1:])} from the rule, got {tuple(rows.shape)}"
            raise ValueError(msg)
        return rows

    def _truth(self, x: Inputs, y: Sequence[Any] | NDArray[Any] | Tensor | None) -> NDArray[Any]:
        if y is None:
            if not isinstance(x, zoo.FrameSet) or x.labels is None:
                msg = "expected labels y, or frames that have labels, got neither"
                raise ValueError(msg)
            y = np.array(x.classes)[x.labels.numpy()]
        given = np.asarray(y)
        if given.dtype.kind in "iu":
            if given.size and not 0 <= given.min() <= given.max() < len(self.classes_):
                msg = f"expected labels from 0 to {len(self.classes_) - 1}, got {given.min()} to {given.max()}"
                raise ValueError(msg)
            names: NDArray[np.str_] = self.classes_[given]
            return names
        strange = sorted(set(given.tolist()) - set(self.classes_.tolist()))
        if strange:
            msg = f"expected labels among {self.classes_.tolist()}, got {strange}"
            raise ValueError(msg)
        return given


def load_ensemble(registry: zoo.Registry, name: str, **options: Any) -> Ensemble:
    """An ensemble from a registry, every member's hash checked.

    Args:
        registry: where it was registered.
        name: of an ensemble, or an alias of one.
        options: `device`, `precision`, `plan` as in `load`.

    Raises:
        ValueError: unknown name, a blob that is not what was registered, or a rule that is not in the table.
    """
    entry = registry.get_ensemble(name)
    return Ensemble(load(registry, entry.members, **options), rule_from_json(entry.rule))
