"""Workers: whoever does the items, the same comes out; those that are killed are replaced."""

import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from zoo.workers import Processes, carry_out


def squares(folder: Path | None = None) -> Callable[[int], int]:
    """A job: the square of a number; every start of a worker and of an item leaves a file."""

    def square(number: int) -> int:
        if folder is not None:
            (folder / f"{number}-{time.monotonic_ns()}").touch()
        return number * number

    return square


def mortal(folder: Path, deaths: int) -> Callable[[int], int]:
    """The same, but item 3 kills its worker some times."""
    square = squares(folder)

    def work(number: int) -> int:
        found = square(number)
        if number == 3 and len([*folder.glob("3-*")]) <= deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return work


def unable() -> Callable[[int], int]:
    """A job that cannot begin."""
    msg = "expected something, got nothing"
    raise ValueError(msg)


def failing() -> Callable[[int], int]:
    """A job whose items have an error."""

    def work(number: int) -> int:
        msg = f"expected a smaller number than {number}"
        raise KeyError(msg) if number == 2 else ValueError(msg)

    return work


def items(count: int) -> dict[str, Callable[[], int]]:
    return {f"number {n}": partial(int, n) for n in range(count)}


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_all_items_are_done_whoever_does_them(workers: int | None) -> None:
    """Here, by one process or by several."""
    crew = None if workers is None else Processes(workers)
    found = dict(carry_out(squares, items(7), crew))
    assert found == {f"number {n}": n * n for n in range(7)}


def test_nothing_to_do_starts_nobody() -> None:
    """No job begins."""
    assert [*carry_out(unable, {})] == [*carry_out(unable, {}, Processes(2))] == []


def test_a_killed_worker_is_replaced_and_its_item_alone_done_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The result is that of no accident; one line says what happened."""
    found = dict(carry_out(partial(mortal, tmp_path, 1), items(6), Processes(2)))
    assert found == {f"number {n}": n * n for n in range(6)}
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "3", "4", "5"]
    (line,) = caplog.messages
    assert re.fullmatch(r"work was done again where workers ended early: process \d \(signal 9\) at number 3", line)


def test_an_item_that_kills_every_worker_is_an_error(tmp_path: Path) -> None:
    """After three of them, with what it was."""
    with pytest.raises(RuntimeError, match=r"live through number 3, got .*signal 9.*memory enough"):
        dict(carry_out(partial(mortal, tmp_path, 99), items(4), Processes(2)))


@pytest.mark.parametrize("workers", [None, 2])
def test_errors_are_those_of_the_items(workers: int | None) -> None:
    """Of a job that cannot begin, and of an item: the same class and words as without processes."""
    crew = None if workers is None else Processes(workers)
    with pytest.raises(ValueError, match="expected something, got nothing"):
        dict(carry_out(unable, items(2), crew))
    with pytest.raises(KeyError, match="a smaller number than 2"):
        dict(carry_out(failing, {"two": partial(int, 2)}, crew))


def test_a_number_of_processes_is_positive() -> None:
    with pytest.raises(ValueError, match="one process or more, got 0"):
        Processes(0)
