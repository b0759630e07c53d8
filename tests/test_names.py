"""Wildcards, the help for a mistyped name, tables of names, devices."""

from collections.abc import Callable

import pytest
import torch
from pretend_cuda import PretendedCuda

import zoo
from zoo._names import enter, find, matching, unknown, usable_device


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
