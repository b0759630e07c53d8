"""What both commands share: exit codes, one line per error, tables, JSON, progress."""

import importlib
import json
import math
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from zoo._console import Answer, Table, command_line, print_json, progress, show


def act(*arguments: str, error: BaseException | None = None, code: int = 0) -> int:
    """Exit code of a program with one command, `act`, that raises or answers something."""

    def act(*, times: int = 1) -> Answer:
        if error is not None:
            raise error
        return Answer({"times": times}, [Table([]), "done", Table([{"times": times}])], code)

    return command_line("demo", "A demo.", [act], {"act --often": "--times"})(arguments or ["act"])


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_answers_by_its_exit_code(code: int) -> None:
    """0 is fine, 1 is "no"."""
    assert act(code=code) == code


def test_an_answer_is_shown_to_people_or_given_to_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines and tables, of which an empty one is left out; or one JSON document."""
    act("act", "--times", "3")
    assert capsys.readouterr().out.split() == ["done", "times", "3"]
    act("--json", "act", "--times", "3")
    assert json.loads(capsys.readouterr().out) == {"times": 3}


def test_what_a_library_prints_is_no_part_of_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json it goes to stderr."""

    def act() -> Answer:
        print("a node of the cluster is lost")
        return Answer({"times": 3}, [])

    assert command_line("demo", "A demo.", [act], {})(["--json", "act"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"times": 3}, "a node of the cluster is lost\n")


def test_a_former_spelling_is_answered_with_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    """With the value behind it or after an equals sign."""
    for arguments in (["act", "--often", "3"], ["act", "--often=3"]):
        assert act(*arguments) == 2
        assert capsys.readouterr().err == "error: --often has a new name: use --times\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("expected this,\n  got that"), "error: expected this, got that\n"),
        (OSError(28, "No space left on device", "a.json"), "error: [Errno 28] No space left on device: 'a.json'\n"),
        (TimeoutError(), "error: TimeoutError\n"),
        (MemoryError(), "error: MemoryError\n"),
        (RecursionError("deep"), "error: expected plain data, got something nested too deep\n"),
    ],
)
def test_an_error_is_one_line_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    """On stderr, without a traceback, line breaks folded."""
    assert act(error=error) == 2
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("arguments", [["at"], ["act", "--tims", "3"], ["act", "--times", "three"]])
def test_wrong_usage_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """An unknown command, an unknown option, a value of another type."""
    assert act(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_of_ours_is_not_hidden() -> None:
    """What is no error of use keeps its traceback."""
    with pytest.raises(AttributeError, match="ours"):
        act(error=AttributeError("ours"))


def test_an_interrupt_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 130, one line."""
    assert act(error=KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.startswith("error: interrupted")


@pytest.mark.parametrize("tool", ["zoo", "ensemble"])
@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("library", ["cyclopts", "torch"])
def test_an_interrupt_during_imports_says_no_more(tool: str, installed: bool, library: str, tmp_path: Path) -> None:
    """Exit code 130 and at most one line: before the command runs as after, by its script as by `python -m`."""
    interrupted = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsignal.raise_signal(signal.SIGINT)\n"
    )
    (tmp_path / f"{library}.py").write_text(interrupted)  # a shell may have started the tests with SIGINT ignored
    targets = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = targets["scripts"][tool].partition(":")
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    way, path = ["-c", script] if installed else ["-m", tool], os.pathsep.join([str(tmp_path), *sys.path])
    line = [sys.executable, *way, *("search" if tool == "zoo" else "evaluate",)]
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr in ("", "error: interrupted; what was finished before is saved\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in `zoo list | head -1`: no traceback, nothing on stderr."""
    code = """
import sys
from zoo._console import Answer, command_line
def act():
    return Answer(None, ["line"] * 100_000)
sys.exit(command_line("demo", "", [act], {})(["act"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_a_table_has_aligned_columns_and_no_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers to the right in their format, None as an empty cell, nothing folded in a pipe."""
    rows = [{"name": "a" * 200, "share": 0.12345, "note": None}, {"name": "b", "share": 10, "note": None}]
    show([Table(rows, formats={"share": ".2f"})])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["name", "share", "note"], ["a" * 200, "0.12"], ["b", "10.00"]]
    assert lines[1].index("0.12") + 4 == lines[2].index("10.00") + 5
    assert all(line == line.rstrip() for line in lines)


def test_what_is_not_finite_is_null_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has no NaN and no infinity, at whatever depth."""
    print_json({"a": [{"b": math.nan}, {"b": -math.inf}], "c": (1.5,)})
    assert json.loads(capsys.readouterr().out) == {"a": [{"b": None}, {"b": None}], "c": [1.5]}


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    """Stderr is not a terminal here."""
    with progress("work", total=3) as advance:
        for _ in range(3):
            advance(note="x")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["[/x] hello", "[red]hi[/red] :smile: [b]", "[[", '["[sos]", "yes"]'])
def test_a_table_shows_text_as_somebody_wrote_it(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """What looks like markup is neither obeyed nor a fault."""
    show([Table([{"note": text}])])
    assert capsys.readouterr().out.split("\n")[1] == text


@pytest.mark.parametrize("module", ["zoo.cli", "ensemble.cli"])
def test_the_commands_know_their_version(capsys: pytest.CaptureFixture[str], module: str) -> None:
    """That of the distribution, which both belong to."""
    importlib.import_module(module).run(["--version"])
    assert capsys.readouterr().out.strip() == version("zoo-ensemble")
