"""Members that are no torch modules: fitted estimators with `predict_proba`, and functions of your own.

They take rows as they came (arrays, tables, text), run one by one, and have no weights that a registry could keep.
Everything behind `Members` treats them like any other member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ensemble.outputs.arrays import Aligned, class_names, distributions, numbers
from ensemble.run._engine.batch import count_rows
from ensemble.run.members import Member, Members, named_classes
from zoo._names import checked

Returns = Literal["probabilities", "logits"]


@checked
def from_estimators(estimators: Mapping[str, Any]) -> Members:
    """Members from fitted classifiers of scikit-learn's kind: anything with `predict_proba` and `classes_`.

    Classes are named after `classes_`, as text, and aligned by name. Join them with models of torch by `+`. Inputs are
    what the estimators were fitted on, as arrays or tables; where members take different ones, give `collect`,
    `Ensemble.predict_proba` and the like a mapping of member name to input.

    Their numbers of parameters are unknown. In a store of outputs they are identified by their content and by their
    answers to some rows; an estimator whose content Python cannot read is computed anew each time, with a warning.

    Args:
        estimators: name -> fitted estimator; the objects themselves, which must not be fitted again.

    Raises:
        TypeError: something without `predict_proba`.
        ValueError: an estimator that is not fitted, has several outputs, or has other classes than the others.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> fitted = LogisticRegression().fit([[0.0], [1.0]], ["no", "yes"])
        >>> from_estimators({"linear": fitted}).classes
        ('no', 'yes')
    """
    members = []
    for name, estimator in estimators.items():
        if isinstance(estimator, type) or not callable(getattr(estimator, "predict_proba", None)):
            came = f"the class {estimator.__name__}" if isinstance(estimator, type) else type(estimator).__name__
            way_out = "give a fitted estimator that predicts probabilities, a module to from_modules, or a function to "
            msg = f"expected a classifier with predict_proba for {name!r}, got {came}; {way_out}from_callables"
            raise TypeError(msg)
        found = getattr(estimator, "classes_", None)
        if found is None:
            msg = f"expected a fitted estimator for {name!r}, got {type(estimator).__name__} without classes_; fit it"
            raise ValueError(msg)
        if isinstance(found, list) and any(hasattr(each, "shape") and each.shape for each in found):
            msg = f"expected an estimator of one output for {name!r}, got {len(found)}; make one member of each output"
            raise ValueError(msg)
        classes = class_names(found)
        answers = _Answers(estimator, "predict_proba", name, classes, "probabilities")
        members.append(Member(name, classes, partial(_itself, answers), outside=True))
    return Members(members)


@checked
def from_callables(
    functions: Mapping[str, Callable[[Any], Any]],
    *,
    classes: Sequence[str] | Mapping[str, Sequence[str]],
    returns: Returns | Mapping[str, Returns],
) -> Members:
    """Members from any functions of rows, such as models of another library or a service.

    A function gets the rows as you gave them, at most 4096 at a time, and must answer each row by itself. In a store of
    outputs it is identified by its code, what it holds (defaults, closure, attributes of an object) and its answers to
    some rows, not by what it reads elsewhere; where that cannot be read it is computed anew each time, with a warning.

    Args:
        functions: name -> function; rows -> (b, C) numbers as an array, tensor or table.
        classes: names of the C columns, in order; or function -> names, where the orders differ.
        returns: what the numbers are, "probabilities" or "logits"; or function -> that. It is never guessed.

    Raises:
        TypeError: something that cannot be called.
        ValueError: as in `from_modules`, or another word in `returns`.

    Example:
        >>> import numpy as np
        >>> uniform = lambda rows: np.full((len(rows), 2), 0.5)
        >>> members = from_callables({"uniform": uniform}, classes=["no", "yes"], returns="probabilities")
        >>> members.log_probabilities(np.zeros((3, 4))).exp().tolist()
        [[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]]
    """
    named = named_classes(functions, classes)
    kinds = returns if isinstance(returns, Mapping) else dict.fromkeys(functions, returns)
    members = []
    for name, function in functions.items():
        if not callable(function):
            msg = f"expected a function for {name!r}, got {type(function).__name__}"
            raise TypeError(msg)
        kind = kinds.get(name)
        if kind not in ("probabilities", "logits"):
            msg = f"expected returns= 'probabilities' or 'logits' for {name!r}, got {kind!r}"
            raise ValueError(msg)
        answers = _Answers(function, "", name, named[name], kind)
        members.append(Member(name, named[name], partial(_itself, answers), outside=True))
    return Members(members)


def _itself(module: nn.Module) -> nn.Module:
    return module  # a partial of it can be sent to another process


class _Answers(nn.Module):
    """Rows as they came -> (b, C) logarithms of probabilities, or logits, of something outside torch."""

    def __init__(self, source: Any, method: str, name: str, classes: tuple[str, ...], kind: Returns) -> None:
        super().__init__()
        self.source, self.method, self.name, self.classes, self.kind = source, method, name, classes, kind

    def forward(self, rows: Any) -> Tensor:
        """Asked on rows of its own, so that nobody else's change."""
        if isinstance(rows, Tensor):
            rows = rows.detach().clone()
            if self.method:  # of an estimator, which takes arrays
                rows = (rows.float() if rows.dtype == torch.bfloat16 else rows).cpu().numpy()
        elif hasattr(rows, "copy"):
            rows = rows.copy()
        count, whose = count_rows(rows), f"from {self.name!r}"
        ask = getattr(self.source, self.method) if self.method else self.source
        try:
            answer = ask(rows)
        except Exception as error:
            msg = f"expected {self.kind} {whose} for {count} rows, got {type(error).__name__}: {error}"
            raise ValueError(msg) from error
        values = Aligned({self.name: answer}, self.classes).arrays[self.name]
        given = numbers(values, f"{self.kind} {whose}")
        if given.shape != (wanted := (count, len(self.classes))):
            msg = f"expected {self.kind} {wanted} {whose}, a row for each input and a column for each class, got "
            raise ValueError(f"{msg}{tuple(given.shape)}")
        if self.kind == "logits":
            return given.detach().cpu().double()
        return distributions(given, f"from member {self.name!r}", dtype=torch.float64).log()
