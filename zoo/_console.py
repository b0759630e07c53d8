"""What both commands share: tables and JSON on stdout, progress and errors on stderr, exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cyclopts import App, CycloptsError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zoo._names import own_version


def run_app(app: App, arguments: Sequence[str] | None = None) -> int:
    """Run a command line to its end and return its exit code.

    0: fine. 1: the command answered "no" (it returned 1). 2: wrong usage, or an error, told in one line.
    130: interrupted. 141: whoever read the output has gone.
    """
    app.suppress_keyboard_interrupt = False  # it would say nothing
    app.version = own_version
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(str(error) or type(error).__name__)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails to flush at its end
        return 141
    except (ValueError, TypeError, LookupError, OSError, ImportError, TimeoutError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    except RecursionError:
        return _fail("expected plain data, got something nested too deep")
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished before is kept", code=130)
    return result if isinstance(result, int) else 0


def print_json(data: Any) -> None:
    """One JSON document on stdout; NaN and infinity have no place in it."""
    print(json.dumps(data, indent=1, allow_nan=False))


def print_table(
    rows: Sequence[Mapping[str, Any]], *, title: str = "", formats: Mapping[str, str] | None = None
) -> None:
    """Rows of one set of columns on stdout, numbers to the right.

    Args:
        rows: column name -> value; None prints as an empty cell.
        title: a line above.
        formats: column name -> format specification, such as ".2f".
    """
    columns = list(rows[0]) if rows else []
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        numeric = any(isinstance(row[column], int | float) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[column], (formats or {}).get(column, "")) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)  # a pipe has no width to fold to
    with console.capture() as drawn:
        console.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr for what takes over a second; nothing is drawn where stderr is not a terminal.

    Yields:
        `advance(steps=1, note="")`: call it as the work goes on.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(steps: float = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note)

        yield advance


def _cell(value: Any, specification: str) -> Text:
    """As it stands: what looks like markup is text that somebody wrote."""
    return Text("" if value is None else format(value, specification))


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
