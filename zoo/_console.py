"""The machinery of both command lines: answers as tables or JSON, errors on one line, exit codes, progress.

A command returns an `Answer` and prints nothing itself, so `--json` is the same for all of them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnusedCliTokensError,
    ValidationError,
)

from zoo._names import own_version, unknown
from zoo._notebook import Table as Table


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Args:
        data: for programs: plain data, printed as one JSON document with `--json`.
        shown: for people: tables and lines of text, printed without `--json`.
        code: the exit code, 1 where the answer is no.
    """

    data: Any
    shown: Sequence[Table | str]
    code: int = 0


def command_line(
    name: str, help: str, commands: Iterable[Callable[..., Answer]], renamed: Mapping[str, str]
) -> Callable[..., int]:
    """A function that runs a command line (by default this process's) to its end and returns its exit code.

    Each of `commands` becomes a command of its name, with `--json` and `--import`. `renamed` has for a former spelling
    ("search", or "search --budget") what to write now.

    0: success. 1: the command's answer is no. 2: wrong usage, or an error, on one line of stderr.
    130: interrupted. 141: the reader of the output has gone.
    """
    app = _app(name, help, commands).meta

    def run(arguments: Sequence[str] | None = None) -> int:
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        try:
            _check_renamed(arguments, renamed)
            code: int = app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails to flush its end
            return 141
        except KeyboardInterrupt as interrupt:
            code, message = 130, str(interrupt) or "interrupted; what was finished before is saved"
        except RecursionError:
            code, message = 2, "expected plain data, got something nested too deep"
        except CycloptsError as error:
            code, message = 2, _wrong_usage(error)
        except (ValueError, TypeError, LookupError, OSError, ImportError, MemoryError) as error:
            code, message = 2, str(error) or type(error).__name__
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return code

    return run


def _wrong_usage(error: CycloptsError) -> str:
    """What cyclopts refuses, in the form of all other messages."""
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}; --help shows what the command takes"
    if isinstance(error, CoercionError) and error.token and error.target_type in (int, float) and error.argument:
        kind = "a whole number" if error.target_type is int else "a number"
        return f"expected {kind} for {error.token.keyword or error.argument.name}, got {error.token.value!r}"
    if isinstance(error, ValidationError) and error.argument:
        return f"{error.exception_message} for {error.argument.name}"
    if isinstance(error, MissingArgumentError) and error.argument:
        return f"expected a value for {error.keyword or error.argument.name}, got none"
    return str(error)


def _check_renamed(arguments: Sequence[str], renamed: Mapping[str, str]) -> None:
    """Refuse a former spelling of a command or of one of its options."""
    command = next((word for word in arguments if word in {spelling.split()[0] for spelling in renamed}), "")
    for spelling in (command, *(f"{command} {word.partition('=')[0]}" for word in arguments if word.startswith("--"))):
        if spelling in renamed:
            msg = f"{spelling.rpartition(' ')[2]} has a new name: use {renamed[spelling]}"
            raise ValueError(msg)


def _app(name: str, help: str, commands: Iterable[Callable[..., Answer]]) -> App:
    def shown(default: Any) -> str | None:
        if default is None or default is False or default in ((), "", math.inf):
            return None
        return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)

    def number(_: Any, value: Any) -> None:
        """Refuse NaN, which is above no bound and below none."""
        if isinstance(value, float) and math.isnan(value):
            raise ValueError("expected a number, got nan,")

    parameter = Parameter(negative=(), show_default=shown, validator=number)
    app = App(name=name, help=help, version=own_version, default_parameter=parameter)
    for command in commands:
        app.command(command, name=command.__name__.rstrip("_"))

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        json: bool = False,
        import_: tuple[str, ...] = (),
    ) -> int:
        """Run a command.

        Args:
            tokens: the command and its own arguments.
            json: print one JSON document in place of tables.
            import_: a Python module or file with your own architectures, rules, optimisers, ...; student.py:Network
                also makes an architecture of the class Network in it; may be repeated.
        """
        with redirect_stdout(sys.stderr) if json else nullcontext():  # where libraries may print, from threads even
            for target in import_:
                import_own(target)
            answer = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        if not isinstance(answer, Answer):  # --help and --version print by themselves
            return 0
        if json:
            print_json(answer.data)
        else:
            show(answer.shown)
        return answer.code

    app.meta.group_parameters = Group("All commands", sort_key=99)
    app.suppress_keyboard_interrupt = app.meta.suppress_keyboard_interrupt = False  # cyclopts would exit silently
    return app


def import_own(target: str) -> None:
    """Import a module or a .py file that the person named with `--import`; the only import of a name given as text.

    With `:NAME` behind it, the class (or function) of that name becomes an architecture. The file's folder, or the
    working folder for a module, is searched after everything that is installed.
    """
    place, colon, name = target.rpartition(":")
    target = place if colon else target
    path = Path(target)
    is_file = path.suffix == ".py"
    folder = str(path.parent.resolve() if is_file else Path.cwd())
    if is_file and not path.is_file():
        msg = f"expected a Python file or the name of a module after --import, got {target!r}, which does not exist"
        raise ImportError(msg)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(path.stem if is_file else target)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        msg = f"cannot import {target!r}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        raise ImportError(msg) from error
    if is_file and not path.samefile(getattr(module, "__file__", None) or os.devnull):  # a built-in one has none
        msg = f"expected a file whose name no other module has, got {target!r}: {path.stem} is {module}; rename it"
        raise ImportError(msg)
    if colon:
        from zoo.models.architectures import GIVEN, architecture_of  # which need torch

        if not callable(model := getattr(module, name, None)) or not hasattr(model, "__name__"):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            raise ImportError(unknown(f"class in {target}", name, own))
        GIVEN.append(architecture_of(model))


def print_json(data: Any) -> None:
    """One JSON document on stdout; what is not a finite number becomes null, as JSON has no NaN and no infinity."""

    def finite(data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: finite(value) for key, value in data.items()}
        if isinstance(data, list | tuple):
            return [finite(value) for value in data]
        return None if isinstance(data, float) and not math.isfinite(data) else data

    print(json.dumps(finite(data), indent=1, allow_nan=False))


def show(parts: Iterable[Table | str]) -> None:
    """Tables, with numbers to the right, and lines of text on stdout; a table without rows is left out."""
    from rich import table  # not needed where a program reads JSON
    from rich.console import Console
    from rich.text import Text  # what looks like markup is text too

    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)  # a pipe has no width to fold to
    for part in parts:
        if isinstance(part, str):
            print(part)
        elif part.rows:
            drawing = table.Table(
                title=part.title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
            )
            for column, numeric in part.columns.items():
                drawing.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
            for row in part.rows:
                drawing.add_row(*map(Text, part.texts(row)))
            with console.capture() as drawn:
                console.print(drawing)
            print("\n".join(line.rstrip() for line in drawn.get().splitlines()))


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr for what takes over a second; nothing is drawn where stderr is not a terminal.

    Yields:
        `advance(steps=1, note="")`, to be called as the work goes on.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counts = () if total is None else (MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts)
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(steps: float = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note)

        yield advance
