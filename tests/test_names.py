"""Wildcards, the help for a mistyped name, tables of names, devices, and arguments of wrong types."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import some_outputs
from pretend_cuda import PretendedCuda

import ensemble
import zoo
from zoo._names import checked, enter, find, matching, unknown, usable_device


def test_a_string_and_an_iterable_of_patterns_mean_the_same() -> None:
    """`include` and `exclude` take one pattern or several."""
    names = ["diamond", "cylinder", "mlp"]
    assert matching(names, "*d*") == matching(names, ["*d*"]) == ["diamond", "cylinder"]
    assert matching(names, "*", "*d*") == matching(names, ["*"], ["*d*"]) == ["mlp"]


def test_excluding_works_on_what_was_included_and_case_counts() -> None:
    """Exclude wins over include; `A*` does not match `alpha`."""
    assert matching(["alpha", "beta"], ["a*", "b*"], "b*") == ["alpha"]
    assert matching(["alpha"], "A*") == []
    assert matching([], "*") == []


def test_a_mistyped_name_is_answered_with_the_nearest() -> None:
    """Far from everything, all names are listed."""
    assert unknown("rule", "meen", ["mean", "median"]).endswith("did you mean 'mean' or 'median'?")
    assert unknown("rule", "zzz", ["mean", "median"]).endswith("expected one of mean, median")


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool, device: str) -> None:
    """Otherwise cpu."""
    with_cuda(monkeypatch, there)
    assert usable_device("auto").type == device


def with_cuda(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    """Let torch find so many CUDA devices."""
    PretendedCuda(monkeypatch, devices=devices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)


def test_a_device_of_this_machine_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's device."""
    with_cuda(monkeypatch, 2)
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("device", "devices", "message"),
    [
        ("moon", 0, "expected a device such as 'cpu'"),
        ("cuda", 0, "got 'cuda', but torch finds no CUDA device; use 'cpu'"),
        ("cuda:2", 2, "2 CUDA devices, got 'cuda:2'; use 'cuda'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    device: str, devices: int, message: str, frames: zoo.FrameSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the way out; before frames are moved there."""
    with_cuda(monkeypatch, devices)
    with pytest.raises(ValueError, match=message):
        frames.to(device)


def test_a_name_in_a_table_belongs_to_one_function() -> None:
    """The same definition may run again; another function of that name is refused, and so is an unknown name."""
    table: dict[str, int] = {}

    def define() -> Callable[[], None]:
        def once() -> None: ...

        return once

    def other() -> None: ...

    other.__name__ = "once"
    enter(table, "test entry", define(), 1)
    enter(table, "test entry", define(), 2)
    assert find(table, "test entry", "once") == 2
    with pytest.raises(
        ValueError, match=r"test entry 'once' is already registered by .*define\.<locals>\.once; choose"
    ):
        enter(table, "test entry", other, 3)
    with pytest.raises(ValueError, match="unknown test entry 'onc'; did you mean 'once'"):
        find(table, "test entry", "onc")


FRAMES = zoo.FrameSet(torch.eye(60, 6), torch.arange(60) % 4, torch.tensor([0, 20, 60]), (*"abcd",))
SPEC = zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 1})
MEMBERS = ensemble.from_modules({"a": zoo.build(SPEC, seed=0).eval()}, classes="abcd", specs={"a": SPEC})
CHECKPOINT = zoo.Checkpoint.from_module(zoo.build(SPEC, seed=0), SPEC, [*"abcd"])
RIGHT: list[tuple[str, object]] = [  # what an annotation begins with -> something that fits it
    ("Sequence[Checkpoint]", [CHECKPOINT, CHECKPOINT]),
    ("Sequence[zoo.Checkpoint]", [CHECKPOINT, CHECKPOINT]),
    ("tuple[Recipe", (zoo.Recipe(),)),
    ("MemberOutputs", some_outputs(M=2, N=40)),
    ("zoo.FrameSet FrameSet", FRAMES),
    ("zoo.Spec Spec", SPEC),
    ("zoo.Recipe Recipe", zoo.Recipe(epochs=1)),
    ("Checkpoint", CHECKPOINT),
    ("Members", MEMBERS),
    ("Ensemble", ensemble.Ensemble(MEMBERS, ensemble.mean)),
    ("Rule Callable", ensemble.mean),
    ("Mapping", {}),
    ("Tensor", torch.arange(3)),
    ("tuple[str", (*"abcd",)),
    ("str", "accuracy"),
    ("int", 1),
    ("float", 0.5),
]
LEFT_OUT = {  # public function, or one of its arguments -> why it is not asked
    "ensemble.MemberOutputs-members": "tuple() says what it cannot take",
    "ensemble.from_pretrained": "a text is the name of a repository on the hub",
    "ensemble.run.from_pretrained": "likewise",
    "ensemble.rules.no_such": "writes a message",
    "ensemble.rules.rule_for": "takes the names of members that exist",
    "zoo.Checkpoint-classes": "tuple() says what it cannot take",
    "zoo.FrameSet-classes": "likewise",
    "zoo.from_pretrained": "a text is the name of a repository on the hub",
    "zoo.pull": "likewise",
    "zoo.mfcc": "torch.as_tensor says what it cannot take",
    "zoo.search.free_dead": "takes what optuna makes",
    "zoo.search.optuna_study": "optuna, which is loaded by it alone, stands in its annotations",
    "zoo.search.optuna_trials": "takes what optuna makes",
}
PACKAGES = [zoo, zoo.data, zoo.models, zoo.search, zoo.training, ensemble]
PACKAGES += [ensemble.fit, ensemble.judge, ensemble.rules, ensemble.run, ensemble.selection]
# classes that people make; others are records, which are made by functions, and errors
CLASSES = [zoo.Checkpoint, zoo.FrameSet, zoo.Spec, ensemble.Ensemble, ensemble.MemberOutputs, ensemble.Members]
CLASSES += [ensemble.Stack, ensemble.run.Processes, ensemble.WeightedMean, ensemble.rules.Temperature]


def needed(door: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that have no default."""
    parameters = inspect.signature(door).parameters
    return {name: one for name, one in parameters.items() if one.default is one.empty and one.kind < one.VAR_KEYWORD}


def fitting(parameter: inspect.Parameter) -> object:
    """A right value for an argument, by what its annotation begins with."""
    hint = str(parameter.annotation)
    return next((value for kinds, value in RIGHT if any(map(hint.startswith, kinds.split()))), None)


def doors() -> list[Any]:
    """The functions of all public lists, and these classes, with each argument that they need."""
    named = {f"{package.__name__}.{name}": getattr(package, name) for package in PACKAGES for name in package.__all__}
    asked = {
        door: title for title, door in reversed(named.items()) if inspect.isfunction(door) or inspect.isclass(door)
    }
    return [
        pytest.param(door, name, id=f"{title}-{name}")
        for door, title in sorted(asked.items(), key=lambda pair: pair[1])
        if inspect.isfunction(door) or door in CLASSES
        for name in needed(door)
        if not {title, f"{title}-{name}"} & {*LEFT_OUT}
    ]


@pytest.mark.parametrize(("door", "name"), doors())
def test_every_public_function_says_what_it_expected(
    door: Callable[..., Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, text, a number or an empty list where something else belongs: an error of use, or they can be used."""
    monkeypatch.chdir(tmp_path)
    parameters = needed(door)
    for wrong in (None, "text", 3, []):
        given = {each: wrong if each == name else fitting(one) for each, one in parameters.items()}
        own = [given.pop(each) for each, one in parameters.items() if one.kind < one.KEYWORD_ONLY]
        answer = "expected"
        with suppress(ImportError):
            try:
                door(*own, **given)
            except (ValueError, TypeError, FileNotFoundError) as error:
                answer = str(error)
        assert re.search(r"expected|unknown|no \w+ named|fits into|reserved|unhashable", answer), answer


def test_types_are_told_by_what_is_declared() -> None:
    """Each kind of annotation, with values that fit and values that do not."""

    @checked
    def ask(
        number: float = 1,
        whole: int | None = 1,
        texts: Sequence[str] = (),
        numbers: Iterable[float] = (),
        table: Mapping[str, Sequence[int]] | None = None,
        call: Callable[[int], int] = abs,
        path: str | Path = "",
        *more: int,
        **options: Any,
    ) -> str:
        return "asked"

    right: list[dict[str, Any]] = [
        {"number": 3, "whole": np.int64(3), "texts": "abc"},
        {"number": torch.tensor(2.0), "whole": None, "texts": (each for each in "abc"), "other": 3},
        {
            "number": np.float32(1),
            "numbers": np.ones(2),
            "texts": ["a"],
            "table": {"a": [1, 2], "b": np.arange(3)},
            "path": Path(),
        },
    ]
    for given in right:
        assert ask(**given) == "asked"
    wrong: list[dict[str, Any]] = [{"number": "3"}, {"whole": 1.5}, {"texts": 3}, {"numbers": "123"}, {"call": 3}]
    wrong += [{"table": [1]}, {"path": 3}, {"number": None}, {"whole": [1]}]
    for given in wrong:
        (name,) = given
        with pytest.raises(TypeError, match=rf"expected .* as the {name} of test_.*ask\(\), got "):
            ask(**given)
    with pytest.raises(TypeError, match="multiple values for argument 'number'"):
        ask(1, number=1)
    assert (ask.__name__, [*inspect.signature(ask).parameters][:2]) == ("ask", ["number", "whole"])
