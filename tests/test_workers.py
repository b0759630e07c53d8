"""Workers: whoever does the items, the same comes out; those that are killed are replaced."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from sent import dying, failing, locks, squares, threads, unable

from zoo.workers import Processes, carry_out

pytestmark = pytest.mark.usefixtures("processes")


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


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_worker_is_replaced_and_its_item_alone_done_again(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The result is that of no accident, also of the only worker; one line says what happened."""
    found = dict(carry_out(partial(dying, tmp_path, 1), items(6), Processes(count)))
    assert found == {f"number {n}": n * n for n in range(6)}
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "3", "4", "5"]
    (line,) = caplog.messages
    assert re.fullmatch(r"work was done again where workers ended early: process \d \(signal 9\) at number 3", line)


def test_an_item_that_kills_every_worker_is_an_error(tmp_path: Path) -> None:
    """After three of them, with what it was."""
    with pytest.raises(RuntimeError, match=r"live through number 3, got .*signal 9.*memory enough") as failed:
        dict(carry_out(partial(dying, tmp_path, 99), items(4), Processes(2)))
    assert str(failed.value).count("signal 9") == 3


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


def test_threads_are_divided_among_processes() -> None:
    """Each has one at least."""
    torch.set_num_threads(5)
    try:
        assert [[*dict(carry_out(threads, items(1), Processes(count))).values()] for count in (2, 9)] == [[2], [1]]
    finally:
        torch.set_num_threads(1)


def test_what_cannot_be_sent_is_told() -> None:
    """A job, an item, and a result, whose process lives on to tell."""
    with pytest.raises(TypeError, match=r"what another process can be sent, got: .*define it in a module"):
        dict(carry_out(lambda: int, items(1), Processes(1)))
    with pytest.raises(TypeError, match="what another process can be sent, got: "):
        dict(carry_out(squares, {"odd": lambda: lambda: 0}, Processes(1)))
    with pytest.raises(RuntimeError, match=r"what another process can be sent, got: .*lock"):
        dict(carry_out(locks, items(1), Processes(1)))
