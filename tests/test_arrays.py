"""The one door for arrays: what just works, what is refused with its cause, and that nothing is guessed."""

import inspect
import itertools
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

import ensemble
from ensemble.judge import brier_score, expected_calibration_error, murphy
from ensemble.outputs.arrays import class_indices, distributions, group_indices, numbers

make = ensemble.MemberOutputs.from_probabilities
ROWS = np.array([[0.125, 0.25, 0.625], [0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.75, 0.125, 0.125]])
LABELS = [2, 0, 1, 1]


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


class ArrayLike:
    """A library's own type that can only be read as an array."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "list": lambda p: p.tolist(),
    "float32": lambda p: p.astype(np.float32),
    "float16": lambda p: p.astype(np.float16),
    "longdouble": lambda p: p.astype(np.longdouble),
    "big endian": lambda p: p.astype(">f8"),
    "big endian float32": lambda p: p.astype(">f4"),
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "negative strides": lambda p: p[::-1, ::-1].copy()[::-1, ::-1],
    "every other": lambda p: np.repeat(np.repeat(p, 2, 0), 2, 1)[::2, ::2],
    "unaligned": lambda p: np.frombuffer(b"x" + p.tobytes(), np.uint8)[1:].view(np.float64).reshape(p.shape),
    "broadcast": lambda p: np.broadcast_to(p[None], (1, *p.shape))[0],
    "objects": lambda p: p.astype(object),
    "Decimal": lambda p: [[Decimal(str(x)) for x in row] for row in p],
    "Fraction": lambda p: [[Fraction(x) for x in row] for row in p],
    "mixed objects": lambda p: [[int(x) if x in (0, 1) else x for x in row] for row in p],
    "masked, nothing masked": lambda p: np.ma.array(p, mask=False),
    "memory": lambda p: memoryview(np.ascontiguousarray(p)),
    "array-like": ArrayLike,
    "tensor": torch.from_numpy,
    "tensor with gradient": lambda p: torch.tensor(p, requires_grad=True),
    "parameter": lambda p: torch.nn.Parameter(torch.tensor(p)),
    "bfloat16": lambda p: torch.tensor(p).bfloat16(),
    "transposed tensor": lambda p: torch.tensor(p.swapaxes(0, 1).copy()).transpose(0, 1),
    "sparse tensor": lambda p: torch.tensor(p).to_sparse(),
    "negated tensor": lambda p: torch._neg_view(-torch.tensor(p)),
    "list of tensors": lambda p: list(torch.tensor(p)),
    "list of tensors with gradients": lambda p: list(torch.tensor(p, requires_grad=True)),
    "tuple of arrays": lambda p: tuple(p),
    "table": pd.DataFrame,
    "table of float32": lambda p: pd.DataFrame(p.astype(np.float32)),
    "nullable table": lambda p: pd.DataFrame(p).convert_dtypes(),
    "table of objects": lambda p: pd.DataFrame(p, dtype=object),
    "records": lambda p: np.array([tuple(row) for row in p], dtype=[(name, "f8") for name in "abc"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_any_form_just_work(form: str) -> None:
    """The same outputs whatever holds the numbers, and what came is left as it was."""
    given = FORMS[form](ROWS)
    outputs = make({"a": given}, labels=LABELS)
    torch.testing.assert_close(outputs.probabilities[0].double(), torch.tensor(ROWS), rtol=0, atol=1e-6)
    assert outputs.log_probabilities.device.type == "cpu"
    assert not outputs.log_probabilities.requires_grad
    if form != "records":
        again = given if not isinstance(given, memoryview) else np.asarray(given)
        np.testing.assert_allclose(numbers(again).detach().float(), ROWS, rtol=0, atol=1e-6)
        assert brier_score(given, LABELS) == pytest.approx(brier_score(ROWS, LABELS), abs=1e-6)


FLAT = {"records", "table", "table of float32", "nullable table", "table of objects", "sparse tensor"}


@pytest.mark.parametrize("form", [form for form in FORMS if form not in FLAT])
def test_rules_take_numbers_of_any_form(form: str) -> None:
    """(M, N, C) as an array of members."""
    stacked = np.stack([ROWS, ROWS[:, ::-1]])
    if form in ("Decimal", "Fraction", "mixed objects"):
        given: Any = [FORMS[form](rows) for rows in stacked]
    else:
        given = FORMS[form](stacked) if form not in ("negative strides", "every other") else stacked[::-1][::-1]
    for rule in (ensemble.mean, ensemble.product, ensemble.WeightedMean([1, 3])):
        np.testing.assert_allclose(
            torch.as_tensor(rule(given)).detach().float(), rule(torch.tensor(stacked)).float(), rtol=0, atol=4e-3
        )


def test_negative_strides_are_taken_by_every_entry() -> None:
    """Outputs, labels, scores, temperatures, rules."""
    p, y = np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([0, 1])
    np.testing.assert_allclose(make({"a": p[:, ::-1]}).probabilities[0], p[:, ::-1], rtol=0, atol=1e-6)
    assert make({"a": p}, labels=y[::-1], groups=y[::-1]).require_labels().tolist() == [1, 0]
    for score in (expected_calibration_error, brier_score):
        assert score(p[::-1], y[::-1]) == pytest.approx(score(p[::-1].copy(), y[::-1].copy()))
    assert murphy(p, y[::-1]) == murphy(p, [1, 0])
    assert ensemble.fit.fit_temperature(p[::-1], y).value == ensemble.fit.fit_temperature(p[::-1].copy(), y).value
    assert ensemble.fit_simplex_weights(p[:, ::-1]).loss == ensemble.fit_simplex_weights(p[:, ::-1].copy()).loss
    assert ensemble.mean(p[None, ::-1]).tolist() == p[::-1].tolist()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([["0.5", "0.5"]], "probabilities from member 'a', got text"),
        (np.array([["a", 0.5]], dtype=object), "with text, 'a'"),
        (np.array([[0.5 + 0j, 0.5]]), "complex"),
        (torch.tensor([[0.5 + 0j, 0.5]]), "complex"),
        (torch.empty(1, 2, device="meta"), "without data"),
        (np.array([["2020-01-01"]], dtype="M8[D]"), "dates"),
        ({"x": [0.5], "y": [0.5]}, "got dict; give an array"),
        (None, "got NoneType; give an array"),
        ((row for row in ROWS), "got generator; give an array"),
        ([[object(), object()]], "no number"),
        ([(0.5, "x")], "text"),
    ],
)
def test_what_holds_no_numbers_is_a_type_error(given: Any, words: str) -> None:
    """In our words, with the member's name."""
    with pytest.raises(TypeError, match=words):
        make({"a": given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[0.5, 0.5], [1.0]], "as an array, got list"),
        (np.ma.array(ROWS, mask=ROWS == 0), "masked entries; fill them"),
        (ROWS[0], r"\(N, C\) from member 'a', got \(3,\); one column is not enough"),
        (ROWS[None], "one array per member"),
        (np.zeros((3, 0)), "there must be a class"),
        ([[0.2], [0.7]], "two columns, 1 - p and p"),
        (torch.randn(1000, 40, generator=torch.manual_seed(0)).softmax(-1).numpy().round(3), "were rounded"),
        (torch.randn(1000, 40, generator=torch.manual_seed(0)).softmax(-1).bfloat16().float(), "half precision"),
        (np.array([[1 + 1e-7, -1e-7]], np.float32), "rounding left numbers below zero"),
        (100 * ROWS, "per cent: divide them by 100"),
        (np.log(ROWS[:2]), "logarithms of probabilities: exponentiate"),
        (torch.randn(5, 3, generator=torch.manual_seed(0)), "apply softmax to logits first"),
        ([[2.0, 1.0, 3.0]], "for logits, apply softmax"),
        ([[0.7, 0.6, 0.1]], "scores of classes that are judged one by one"),
        ([[0.0, 0.0], [0.5, 0.5]], "all zero"),
        ([[0.5, np.nan], [0.5, 0.5]], "part of a row is NaN"),
        ([[np.nan, np.nan], [0.5, 0.5]], "declare abstain=True"),
        ([[np.inf, 0.0]], "infinite"),
        ([[-0.5, 1.5]], "softmax"),
        (np.array([[1 + 1e-4, -1e-4]]), "below zero"),
    ],
)
def test_rows_that_are_no_distributions_are_told_their_cause(given: Any, words: str) -> None:
    """One cause each, and the way out."""
    with pytest.raises(ValueError, match=words):
        make({"a": given})


def test_what_is_declared_to_abstain_does_so_by_whole_rows() -> None:
    """Half a row of NaN is told apart from logits."""
    with pytest.raises(ValueError, match="part of a row is NaN, which is no abstention"):
        make({"a": [[0.5, np.nan]]}, abstain=True)
    assert make({"a": [[np.nan, np.nan], [25, 75]]}, abstain=True, renormalise=True).probabilities[0, 1, 1] == 0.75


def test_renormalising_is_done_on_purpose() -> None:
    """Rounded rows, per cent, counts and tiny negative numbers; logits and NaN stay refused."""
    exact = torch.randn(1000, 40, generator=torch.manual_seed(0)).softmax(-1)
    outputs = make({"a": exact.numpy().round(3)}, renormalise=True)
    torch.testing.assert_close(outputs.probabilities[0], exact, rtol=0, atol=2e-3)
    torch.testing.assert_close(outputs.probabilities.sum(-1), torch.ones(1, 1000), rtol=0, atol=1e-6)
    assert make({"a": [[25, 75]]}, renormalise=True).probabilities.tolist() == [[[0.25, 0.75]]]
    assert make({"a": [[1.0, -1e-7]]}, renormalise=True).probabilities.tolist() == [[[1.0, 0.0]]]
    for rows in ([[1.0, -1.0]], [[0.0, 0.0]], [[np.nan, 1.0]], [[np.inf, 1.0]]):
        with pytest.raises(ValueError, match="from member 'a'"):
            make({"a": rows}, renormalise=True)


def test_what_is_zero_in_float32_keeps_its_logarithm() -> None:
    """Of float64 probabilities, and with the gradient left behind."""
    outputs = make({"a": np.array([[1.0, 1e-60], [1e-200, 1.0]])})
    assert outputs.log_probabilities[0, 0, 1] == pytest.approx(np.log(1e-60))
    assert outputs.log_probabilities[0, 1, 0] == pytest.approx(np.log(1e-200))


def test_outputs_end_on_the_cpu_without_a_gradient() -> None:
    """Also where they are made from log-probabilities, NumPy's own among them."""
    logs = torch.tensor(np.log(ROWS[:2])[None], requires_grad=True)
    for given in (logs, logs.detach().numpy(), logs.detach().numpy().astype(">f8")):
        outputs = ensemble.MemberOutputs(given, ("a",), ("x", "y", "z"), labels=np.array([1, 0])[::-1])
        assert not outputs.log_probabilities.requires_grad
        assert outputs.require_labels().tolist() == [0, 1]
        assert ensemble.evaluate(outputs, {"mean": ensemble.mean}).frames == 2


# Labels

NAMES = ["no", "yes", "maybe"]
LABEL_FORMS: dict[str, tuple[Any, Any]] = {  # classes, and labels that mean 2, 0, 1, 1
    "indices": (NAMES, [2, 0, 1, 1]),
    "indices without classes": (None, [2, 0, 1, 1]),
    "whole floats": (NAMES, [2.0, 0.0, 1.0, 1.0]),
    "objects": (NAMES, np.array([2, 0, 1, 1], dtype=object)),
    "big endian": (NAMES, np.array([2, 0, 1, 1], dtype=">i4")),
    "tensor": (NAMES, torch.tensor([2, 0, 1, 1], dtype=torch.uint8)),
    "tensors": (NAMES, [torch.tensor(i) for i in [2, 0, 1, 1]]),
    "half": (NAMES, torch.tensor([2, 0, 1, 1]).bfloat16()),
    "names": (NAMES, ["maybe", "no", "yes", "yes"]),
    "NumPy's strings": (np.array(NAMES), np.array(["maybe", "no", "yes", "yes"])),
    "list of NumPy's strings": (NAMES, list(np.array(["maybe", "no", "yes", "yes"]))),
    "bytes": (NAMES, np.array([b"maybe", b"no", b"yes", b"yes"])),
    "bytes as objects": ([b"no", b"yes", b"maybe"], [b"maybe", b"no", b"yes", b"yes"]),
    "objects of text": (NAMES, np.array(["maybe", "no", "yes", "yes"], dtype=object)),
    "StringDType": (NAMES, np.array(["maybe", "no", "yes", "yes"], dtype=np.dtypes.StringDType())),
    "categorical": (NAMES, pd.Series(["maybe", "no", "yes", "yes"], dtype="category")),
    "categorical in another order": (NAMES, pd.Categorical(["maybe", "no", "yes", "yes"], ["yes", "maybe", "no"])),
    "Series": (pd.Index(NAMES), pd.Series(["maybe", "no", "yes", "yes"])),
    "nullable": (NAMES, pd.Series([2, 0, 1, 1], dtype="Int64")),
    "digits as text": (["10", "2", "9"], ["9", "10", "2", "2"]),
    "integer names": ([3, 5, 7], [7, 3, 5, 5]),
    "integer names that could be indices": ([2, 0, 1], [1, 2, 0, 0]),
    "integer names as NumPy's": (np.array([2, 0, 1]), np.array([1, 2, 0, 0])),
    "integers that are names as text": (["3", "5", "7"], [7, 3, 5, 5]),
    "negative names": ([-1, 0, 1], [1, -1, 0, 0]),
    "whole floats that are names": (["3", "5", "7"], [7.0, 3.0, 5.0, 5.0]),
    "indices beside names as text": (["3", "5", "7"], [2, 0, 1, 1]),
    "fractions as names": ([0.5, 1.5, 2.5], [2.5, 0.5, 1.5, 1.5]),
    "both readings agree": (["0", "1", "2"], [2, 0, 1, 1]),
}


@pytest.mark.parametrize("form", LABEL_FORMS)
def test_labels_are_names_or_indices_by_membership(form: str) -> None:
    """Whatever their type; classes may be numbers too."""
    classes, labels = LABEL_FORMS[form]
    outputs = make({"a": ROWS}, labels=labels, classes=classes)
    assert outputs.require_labels().tolist() == [2, 0, 1, 1]
    assert outputs.require_labels().dtype == torch.int64
    assert all(type(name) is str for name in outputs.classes)


def test_booleans_are_the_names_false_and_true() -> None:
    """Or, where the classes have no names, 0 and 1; which of two other names True means is not guessed."""
    p, truth = [[0.9, 0.1], [0.2, 0.8]], np.array([True, False])
    assert make({"a": p}, labels=truth).require_labels().tolist() == [1, 0]
    for classes in ([False, True], ["False", "True"]):
        assert make({"a": p}, labels=truth, classes=classes).require_labels().tolist() == [1, 0]
    assert make({"a": p}, labels=truth, classes=[True, False]).require_labels().tolist() == [0, 1]
    assert make({"a": p}, labels=[1, 0], classes=[True, False]).require_labels().tolist() == [0, 1]
    with pytest.raises(ValueError, match="got True and False; give names, or 0 and 1"):
        make({"a": p}, labels=truth, classes=["yes", "no"])


@pytest.mark.parametrize(
    ("classes", "labels", "words"),
    [
        (
            None,
            ["2", "0", "1", "1"],
            r"or classes= \(--classes\) that names the columns in order, got labels .* as text",
        ),
        (None, [b"2", b"0", b"1", b"1"], "classes="),
        (NAMES, ["2", "0", "1", "1"], "if they are indices, convert them to integers"),
        (["1", "2", "3"], [1, 2, 1, 1], "which can be both; give names as text"),
        (["1", "2", "3"], [1.0, 2.0, 1.0, 1.0], "which can be both"),
        (["2", "0", "1"], [0, 1, 2, 2], "which can be both"),
        ([3, 5, 7], [0, 1, 2, 2], r"among the classes \[3, 5, 7\], got \[0, 1, 2\]; indices need classes as text"),
        ([1, 2, 3], [0, 1, 2, 2], r"got \[0\]"),
        (NAMES, [1, 2, 3, 3], "labels from 0 to 2, got 1 to 3, or names among the classes"),
        (NAMES, [-1, 0, 1, 1], "labels from 0 to 2, got -1 to 1"),
        (NAMES, ["maybe", "No", "yes", "yes"], r"got \['No'\]"),
        (NAMES, ["maybe", " no", "yes", "yes"], r"got \[' no'\]"),
        (NAMES, ["maybe", 0, "yes", "yes"], r"of one type, got \[0\] beside text"),
        (NAMES, ["maybe", None, "yes", "yes"], "labels of every frame, got None at frame 1"),
        (NAMES, ["maybe", np.nan, "yes", "yes"], "got nan at frame 1"),
        (NAMES, [2.0, np.nan, 1.0, 1.0], "got nan at frame 1"),
        (NAMES, pd.Series(["maybe", pd.NA, "yes", "yes"], dtype="string"), "at frame 1"),
        (NAMES, pd.Series([2, None, 1, 1], dtype="Int64"), "at frame 1"),
        (NAMES, pd.Categorical(["maybe", None, "yes", "yes"]), "at frame 1"),
        (NAMES, np.ma.array([2, 0, 1, 1], mask=[0, 1, 0, 0]), "at frame 1"),
        (NAMES, [2.5, 0.0, 1.0, 1.0], r"whole numbers, got \[2.5\]"),
        (NAMES, np.eye(3)[[2, 0, 1, 1]], "one-hot rows take their argmax"),
        (NAMES, [[2], [0], [1], [1]], "one value per frame|argmax"),
        (NAMES, [2, 0, 1], r"labels of shape \(4,\) .*, got \(3,\)"),
        (NAMES, [(1, 2), (0, 1), (0, 1), (0, 1)], "names or indices of classes"),
        (NAMES, "maybe", r"labels of shape \(4,\)"),
        (NAMES, np.array(["2020-01-01"] * 4, dtype="M8[D]"), "names or indices"),
    ],
)
def test_labels_that_are_no_classes_or_ambiguous_are_refused(classes: Any, labels: Any, words: str) -> None:
    """With what came and the way out."""
    with pytest.raises(ValueError, match=words):
        make({"a": ROWS}, labels=labels, classes=classes)


def test_classes_come_in_an_order() -> None:
    """From any sequence, and an iterator is read once; a set has none, and members have names."""
    for classes in (dict.fromkeys(NAMES).keys(), iter(NAMES), (name for name in NAMES), tuple(NAMES)):
        outputs = make({"a": ROWS, "b": ROWS}, classes=classes, labels=["maybe", "no", "yes", "yes"])
        assert outputs.classes == tuple(NAMES)
    for strange in (set(NAMES), dict.fromkeys(NAMES), b"abc", 3, [None, "a", "b"], [["a"], ["b"], ["c"]]):
        with pytest.raises(TypeError, match="expected classes as"):
            make({"a": ROWS}, classes=strange)
    with pytest.raises(TypeError, match=r"names of members as text, got \[1\]"):
        make({1: ROWS})
    with pytest.raises(TypeError, match="a mapping of member name"):
        make([("a", ROWS)])


def test_more_than_ten_classes_as_text_are_not_taken_for_indices() -> None:
    """Sorted as text, "10" comes before "2": a perfect model would have an accuracy of zero."""
    names = sorted(map(str, range(11)))
    truth = ["10", "2", "9"]
    p = np.eye(11)[[names.index(name) for name in truth]]
    with pytest.raises(ValueError, match="classes="):
        make({"a": p}, labels=truth)
    outputs = make({"a": p}, labels=truth, classes=names)
    assert ensemble.evaluate(outputs, {}).members.accuracy.tolist() == [1.0]


def test_scores_take_the_names_that_a_table_has() -> None:
    """And refuse text where the columns have no names."""
    table = pd.DataFrame(ROWS, columns=NAMES)
    assert brier_score(table, ["maybe", "no", "yes", "yes"]) == brier_score(ROWS, LABELS)
    with pytest.raises(ValueError, match="classes="):
        brier_score(ROWS, ["maybe", "no", "yes", "yes"])


# Groups


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([5, 5, 7, 5], [5, 5, 7, 5]),
        (torch.tensor([5, 5, 7, 5], dtype=torch.int16), [5, 5, 7, 5]),
        (["b", "b", "a", "b"], [1, 1, 0, 1]),
        ([b"b", b"b", b"a", b"b"], [1, 1, 0, 1]),
        ([2.5, 2.5, 0.5, 2.5], [1, 1, 0, 1]),
        (np.array([2**64 - 1, 2**64 - 1, 1, 2**64 - 1], dtype=np.uint64), [1, 1, 0, 1]),
        ([True, True, False, True], [1, 1, 0, 1]),
        ([("s", 2), ("s", 2), ("s", 1), ("s", 2)], [1, 1, 0, 1]),
        ([frozenset("b"), frozenset("b"), frozenset("a"), frozenset("b")], [0, 0, 1, 0]),
        (["b", "b", 1, "b"], [0, 0, 1, 0]),
        (pd.Series(["b", "b", "a", "b"], dtype="category"), [1, 1, 0, 1]),
        (pd.to_datetime(["2021-01-01", "2021-01-01", "2020-01-01", "2021-01-01"]), [1, 1, 0, 1]),
        (pd.MultiIndex.from_tuples([("s", 2), ("s", 2), ("s", 1), ("s", 2)]), [1, 1, 0, 1]),
    ],
)
def test_groups_are_anything_hashable(groups: Any, expected: list[int]) -> None:
    """Integers are kept, others counted in sorted order, or in their own where they cannot be sorted."""
    found = make({"a": ROWS}, groups=groups).groups
    assert found is not None
    if expected[0] == 0:  # sets are sorted by inclusion: any numbering that tells them apart
        assert [value == found[0] for value in found] == [value == 0 for value in expected]
    else:
        assert found.tolist() == expected


@pytest.mark.parametrize(
    "groups",
    [
        ["a", None, "b", "b"],
        ["a", np.nan, "b", "b"],
        [1.0, np.nan, 2.0, 2.0],
        pd.Series(["a", pd.NA, "b", "b"]),
        pd.to_datetime(["2021-01-01", None, "2020-01-01", "2021-01-01"]),
    ],
)
def test_a_missing_group_is_refused(groups: Any) -> None:
    """Frames without one would all be one recording, or one each."""
    with pytest.raises(ValueError, match=r"groups of every frame, got .* at frame 1"):
        make({"a": ROWS}, groups=groups)


def test_groups_that_are_no_single_value_are_refused() -> None:
    """Lists, and tables of two columns."""
    with pytest.raises(ValueError, match="one value per frame"):
        group_indices([["a"], ["b"], [], []], 4)
    with pytest.raises(ValueError, match=r"groups of shape \(4,\)"):
        make({"a": ROWS}, groups=pd.DataFrame({"x": [1] * 4, "y": [2] * 4}))


# Tables

TABLE = pd.DataFrame({"x": [0.7, 0.2, 0.1], "y": [0.2, 0.7, 0.1], "z": [0.1, 0.1, 0.8]}, index=["f1", "f2", "f3"])
CLASSES = ["x", "y", "z"]


@pytest.mark.parametrize("classes", [CLASSES, None])
def test_tables_are_aligned_by_their_names(classes: Any) -> None:
    """Columns by class, rows by index, labels and groups by theirs."""
    shuffled = TABLE.loc[["f2", "f3", "f1"], ["z", "x", "y"]]
    labels, groups = pd.Series(["z", "x", "y"], index=["f3", "f1", "f2"]), pd.Series([7, 8, 8], ["f2", "f3", "f1"])
    given = {"a": TABLE, "columns": TABLE[["z", "x", "y"]], "rows": TABLE.loc[["f2", "f3", "f1"]], "both": shuffled}
    outputs = make(given, labels=labels, groups=groups, classes=classes)
    assert outputs.classes == ("x", "y", "z")
    for rows in outputs.probabilities:
        torch.testing.assert_close(rows, torch.tensor(TABLE.to_numpy()).float())
    assert outputs.require_labels().tolist() == [0, 1, 2]
    assert outputs.groups is not None
    assert outputs.groups.tolist() == [8, 7, 8]


def test_one_table_takes_the_order_that_is_asked_for() -> None:
    """Of the classes; arrays beside tables in one order are taken by position."""
    outputs = make({"a": TABLE, "b": TABLE.to_numpy()[:, ::-1]}, classes=["z", "y", "x"], labels=["z", "y", "x"])
    assert torch.equal(outputs.probabilities[0], outputs.probabilities[1])
    assert outputs.require_labels().tolist() == [0, 1, 2]
    assert make({"a": TABLE, "b": TABLE.to_numpy()}).classes == ("x", "y", "z")


def test_integer_columns_name_integer_classes() -> None:
    """As scikit-learn's `classes_` do."""
    table = pd.DataFrame(ROWS, columns=[3, 5, 7])
    outputs = make({"a": table, "b": table[[7, 3, 5]]}, labels=[7, 3, 5, 5])
    assert outputs.classes == ("3", "5", "7")
    assert torch.equal(outputs.probabilities[0], outputs.probabilities[1])
    assert outputs.require_labels().tolist() == [2, 0, 1, 1]


COUNTED = pd.DataFrame(TABLE.to_numpy())


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ({"a": TABLE}, {"classes": ["x", "y", "w"]}, r"without \['w'\]; with the further columns \['z'\]"),
        ({"a": TABLE.assign(fold=1)}, {"classes": CLASSES}, r"with the further columns \['fold'\]"),
        ({"a": TABLE[["x", "y", "z", "z"]]}, {"classes": CLASSES}, r"twice \['z'\]"),
        ({"a": TABLE, "b": TABLE.rename(index={"f1": "f9"})}, {}, r"\['f9'\] only in member 'b' and \['f1'\]"),
        ({"a": TABLE, "b": TABLE.loc[["f2", "f1", "f1"]]}, {}, r"\['f3'\] only in member 'a'"),
        ({"a": TABLE.loc[["f1", "f1", "f2"]], "b": TABLE.loc[["f1", "f2", "f2"]]}, {}, "more than once"),
        ({"a": TABLE, "b": TABLE.loc[["f2", "f3", "f1"]], "c": TABLE.to_numpy()}, {}, r"an index, \['c'\]"),
        ({"a": TABLE.to_numpy(), "b": TABLE, "c": TABLE[["z", "x", "y"]]}, {}, r"also from \['a'\]"),
        ({"a": COUNTED, "b": COUNTED.iloc[[1, 2, 0]]}, {}, "counts rows and one in another order"),
        ({"a": COUNTED, "b": COUNTED[[1, 2, 0]]}, {}, r"also from \['a'\]"),
        ({"a": COUNTED}, {"classes": ["2", "0", "1"]}, "counted from 0, which can be names or not"),
        ({"a": TABLE, "b": TABLE.reset_index(drop=True)}, {}, "only in member 'b'"),
        ({"a": TABLE, "b": TABLE.loc[["f2", "f3", "f1"]]}, {"labels": [0, 1, 2]}, "labels with an index"),
        ({"a": TABLE}, {"labels": pd.Series([0, 1, 2], index=["f1", "f2", "f9"])}, r"\['f9'\] only in the labels"),
        ({"a": COUNTED}, {"labels": pd.Series([0, 1, 2], index=[2, 0, 1])}, r"reset_index\(drop=True\)"),
        ({"a": TABLE}, {"groups": pd.Series([0, 1, 2], index=["f1", "f2", "f9"])}, r"\['f9'\] only in the groups"),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(given: Any, options: Any, words: str) -> None:
    """By name, with the way out; an order that could be meant in two ways is not guessed."""
    with pytest.raises(ValueError, match=words):
        make(given, **options)


def test_one_index_everywhere_may_repeat() -> None:
    """As the recording of each frame does."""
    table = TABLE.set_axis(["u1", "u1", "u2"])
    outputs = make({"a": table, "b": table}, labels=pd.Series([0, 1, 2], index=table.index), groups=table.index)
    assert outputs.groups is not None
    assert outputs.groups.tolist() == [0, 0, 1]


class Polars:
    """A table with named columns and without an index."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.columns, self._table = list(table.columns), table

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._table.to_numpy()


def test_tables_of_other_libraries_have_columns_too() -> None:
    """Those without an index are taken row by row."""
    outputs = make({"a": Polars(TABLE), "b": Polars(TABLE[["z", "x", "y"]])}, labels=["x", "y", "z"])
    assert torch.equal(outputs.probabilities[0], outputs.probabilities[1])
    records = TABLE[["z", "x", "y"]].to_records(index=False)
    assert torch.equal(make({"a": records}, classes=CLASSES).probabilities[0], outputs.probabilities[0])


# The door against a slow, obvious reference


def slow_indices(labels: list[Any], classes: list[Any] | None, count: int) -> list[int] | None:
    """One label after another by its readings; None where that must be refused."""
    names = [str(i) for i in range(count)] if classes is None else [str(name) for name in classes]
    if any(isinstance(label, str) for label in labels):
        fits = classes is not None and all(isinstance(label, str) and label in names for label in labels)
        return [names.index(label) for label in labels] if fits else None
    numeric = classes is not None and not any(isinstance(name, str) for name in classes)
    by_name = [names.index(str(int(label))) if str(int(label)) in names else None for label in labels]
    by_index = [int(label) if 0 <= label < count else None for label in labels]
    readings = []
    if classes is not None and None not in by_name:
        readings.append(by_name)
    if not numeric and None not in by_index:
        readings.append(by_index)
    return readings[0] if readings and all(reading == readings[0] for reading in readings) else None  # type: ignore[return-value]


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Any], Any, Any, np.ndarray, list[Any]]:
    """Members in random forms, classes, labels in a random form, and the plain rows and labels behind them."""
    count, frames = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["text", "digits", "integers", "none"]))
    if kind == "text":
        classes: list[Any] | None = draw(st.permutations(["a", "b", "c", "d"]))[:count]
    else:
        digits = draw(st.lists(st.integers(-1, 5), min_size=count, max_size=count, unique=True))
        classes = {"digits": [*map(str, digits)], "integers": digits, "none": None}[kind]
    pool: list[Any] = [*range(-1, 5)] if draw(st.booleans()) or classes is None else list(classes)
    labels = draw(st.lists(st.sampled_from(pool), min_size=frames, max_size=frames))
    weights = draw(
        st.lists(st.lists(st.integers(1, 8), min_size=count, max_size=count), min_size=frames, max_size=frames)
    )
    rows = np.array(weights) / np.array(weights).sum(axis=1, keepdims=True)
    members: dict[str, Any] = {}
    for name in "pq"[: draw(st.integers(1, 2))]:
        counted = classes is not None and sorted(map(str, classes)) == [*map(str, range(count))]
        away = {"records", "float16", "bfloat16"} | (FLAT if counted else set())  # counted columns might be names
        form = draw(st.sampled_from([form for form in FORMS if form not in away]))
        members[name] = FORMS[form](rows)
        if classes is not None and draw(st.booleans()):
            order = draw(st.permutations(range(count)))
            members[name] = pd.DataFrame(rows[:, order], columns=pd.Index([classes[i] for i in order]))
    wrap = draw(st.sampled_from([list, np.array, tuple, pd.Series, lambda y: np.array(y, dtype=object)[::-1][::-1]]))
    return members, classes, wrap(labels), rows, labels


@settings(max_examples=150, deadline=None)
@hypothesis.given(problems())
def test_the_door_agrees_with_a_slow_reference(problem: tuple[dict[str, Any], Any, Any, np.ndarray, list[Any]]) -> None:
    """The same rows whatever the form; the same labels, or a refusal exactly where there are no or two readings."""
    members, classes, labels, rows, plain = problem
    expected = slow_indices(plain, classes, rows.shape[1])
    if expected is None:
        with pytest.raises(ValueError, match="labels"):
            make(members, labels=labels, classes=classes)
        return
    outputs = make(members, labels=labels, classes=classes)
    assert expected == outputs.require_labels().tolist()
    for found in outputs.probabilities.double():
        np.testing.assert_allclose(found, rows, rtol=0, atol=1e-6)


@settings(max_examples=100, deadline=None)
@hypothesis.given(st.data())
def test_no_rows_of_any_kind_raise_anything_raw(data: st.DataObject) -> None:
    """Numbers of any size and sign: distributions, or one of our errors with a cause."""
    shape = data.draw(st.tuples(st.integers(0, 4), st.integers(1, 4)))
    cells = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.sampled_from([0.0, 0.5, 1.0, 100.0, -1e-7])
    causes: list[str] = []
    rows = np.array(data.draw(st.lists(cells, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))
    for renormalise in (False, True):
        try:
            found = distributions(rows.reshape(shape), "from member 'a'", renormalise=renormalise)
        except ValueError as error:
            causes.append(str(error).partition("; ")[2])
            continue
        assert ((found.sum(dim=1) - 1).abs() <= 1e-3 + 1e-6).all()
        assert (found >= 0).all()
    assert all(causes)


@pytest.mark.parametrize("frames", [0, 3])
def test_no_labels_at_all_are_no_labels(frames: int) -> None:
    """An empty list for no frames."""
    if frames:
        with pytest.raises(ValueError, match="of shape"):
            class_indices([], None, 2, frames=frames)
    else:
        assert class_indices([], ["a", "b"], 2, frames=0).tolist() == []
        assert group_indices([], 0).tolist() == []


OUTPUTS = make({"a": ROWS, "b": ROWS[:, [1, 2, 0]], "c": ROWS[:, [2, 0, 1]]}, labels=LABELS, groups=[0, 0, 1, 1])
RIGHT = np.array([[True, True, False, True], [True, False, False, True], [False, True, True, True]])
GAINS, COUNTS, TIMES = np.array([1.0, 0.5, -1.0, 0.25]), np.array([[3, 2], [1, 4]]), np.array([1, 2, 0, 1])
MIX, TRUTH = np.array([0.5, 0.25, 0.25]), np.array(LABELS)
ENTRIES: dict[str, tuple[Callable[..., Any], list[Any]]] = {  # public function -> a call of it, and plain arrays for it
    "bonferroni": (ensemble.judge.bonferroni, [MIX]),
    "holm": (ensemble.judge.holm, [MIX]),
    "bootstrap_interval": (ensemble.judge.bootstrap_interval, [GAINS, TIMES]),
    "t_interval": (ensemble.judge.t_interval, [GAINS, TIMES]),
    "cluster_bootstrap": (ensemble.judge.cluster_bootstrap, [np.array([[1.0, 2], [3, 4]]), np.array([3, 4])]),
    "cochran_q": (ensemble.judge.cochran_q, [RIGHT]),
    "right_and_wrong": (ensemble.judge.right_and_wrong, [RIGHT[0], RIGHT[1]]),
    "mcnemar": (ensemble.judge.mcnemar, [COUNTS]),
    "mcnemar_exact": (ensemble.judge.mcnemar_exact, [COUNTS]),
    "brier_score": (brier_score, [ROWS, TRUTH]),
    "expected_calibration_error": (expected_calibration_error, [ROWS, TRUTH]),
    "murphy": (murphy, [ROWS, TRUTH]),
    "score": (lambda *given: [ensemble.judge.score(*given, name) for name in ensemble.judge.METRICS], [ROWS, TRUTH]),
    "uncertainty": (lambda p: ensemble.judge.uncertainty(p).total.detach(), [np.stack([ROWS, ROWS])]),
    "fit_simplex_weights": (
        lambda P, t, w, s: ensemble.fit_simplex_weights(P, alpha=0.5, towards=t, sample_weights=w, start=s).weights,
        [ROWS.T, np.array([1, 2, 1]), TIMES, MIX],
    ),
    "fit_weights": (lambda w, s: ensemble.fit_weights(OUTPUTS, sample_weights=w, start=s).weights, [TIMES, MIX]),
    "greedy": (lambda w: ensemble.greedy(OUTPUTS, 5, sample_weights=w).weights, [TIMES]),
    "fit_temperature": (lambda *given: ensemble.fit.fit_temperature(*given).after, [np.stack([ROWS, ROWS]), TRUTH]),
    "fit_log_linear": (lambda s: ensemble.fit.fit_log_linear(OUTPUTS, start=s).weights, [MIX]),
    "fit_pool_temperatures": (lambda w: ensemble.fit.fit_pool_temperatures(OUTPUTS, w).each, [MIX]),
}
ENTRIES |= {
    name: (each, [RIGHT]) for name, each in (ensemble.judge.PAIR_MEASURES | ensemble.judge.CROWD_MEASURES).items()
}
EVERYWHERE: dict[str, Callable[[np.ndarray], Any]] = {  # forms of any number of axes
    form: FORMS[form]
    for form in ("list", "float32", "float16", "longdouble", "big endian", "read-only", "Fortran order", "objects")
} | {
    "masked, nothing masked": FORMS["masked, nothing masked"],
    "array-like": ArrayLike,
    "negative strides": lambda p: p[..., ::-1].copy()[..., ::-1],
    "every other": lambda p: np.repeat(p, 2, -1)[..., ::2],
    "tensor with gradient": lambda p: torch.tensor(p, dtype=torch.float64, requires_grad=True),
    "bfloat16": lambda p: torch.tensor(p).bfloat16(),
    "table": lambda p: pd.Series(p) if p.ndim == 1 else pd.DataFrame(p) if p.ndim == 2 else p,
}


def flat(found: Any) -> np.ndarray:
    """The numbers of any result."""
    fields = found.__dict__.values() if hasattr(found, "__dataclass_fields__") else found
    return np.concatenate([np.ravel(each) for each in fields]) if not np.isscalar(fields) else np.array([fields])


@pytest.mark.parametrize("form", EVERYWHERE)
@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_takes_numbers_of_any_form(name: str, form: str) -> None:
    """The same as for plain arrays, to the bit or to the order of a sum; what came is left as it was."""
    ask, plain = ENTRIES[name]
    given = [EVERYWHERE[form](each) for each in plain]
    np.testing.assert_allclose(flat(ask(*given)), flat(ask(*plain)), rtol=1e-6, atol=1e-6)
    for each, before in zip(given, plain, strict=True):
        np.testing.assert_array_equal(numbers(each).detach().double(), before)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_refuses_what_holds_no_numbers(name: str) -> None:
    """One clear error, whichever argument it is."""
    ask, plain = ENTRIES[name]
    for place, wrong in itertools.product(
        range(len(plain)), (None, object(), {"a": 1}, 1 + 2j, torch.tensor([1 + 2j]))
    ):
        if wrong is None and name not in ("holm", "cochran_q", "brier_score"):
            continue  # None is a default of some
        given: list[Any] = [*plain]
        given[place] = wrong
        with pytest.raises((ValueError, TypeError), match=r"expected|no "):
            ask(*given)


def test_no_public_function_with_arrays_is_left_out() -> None:
    """By their annotations; what takes functions, outputs and splitters has no arrays of its own."""
    found = set()
    for package in (ensemble.judge, ensemble.fit, ensemble.selection):
        for name in package.__all__:
            function = getattr(package, name)
            if inspect.isfunction(function):
                kinds = " ".join(str(each.annotation) for each in inspect.signature(function).parameters.values())
                if re.search(r"ArrayLike|Tensor|object|Sequence\[float\]|\bAny\b(?!\])", kinds):
                    found.add(name)
    assert found - {"cross_fit"} <= set(ENTRIES)
