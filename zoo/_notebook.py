"""What objects show of themselves in a notebook: a headline, lines of text, tables; and what a long call shows.

Text and tables go in, HTML comes out; everything in it that is not markup of this file is escaped. A script moves it
into a shadow root, where no style of the notebook reaches it, and from where none reaches the notebook. Where scripts
do not run (untrusted notebooks, GitHub) the same plain tables stay in the open: there is no style that could leak.
A declarative shadow root would not do: what notebooks insert as `innerHTML` gets none, and its content stays hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

_MOST_ROWS = 60
_STYLE = (
    "div{all:initial;color:inherit;display:block;font:13px/1.5 system-ui,sans-serif;overflow-x:auto}"
    "p{margin:.2em 0}b{font-size:14px}ul{margin:.2em 0;padding-left:1.4em}"
    "table{font:inherit;color:inherit;border-collapse:collapse;margin:.6em 0;font-variant-numeric:tabular-nums}"
    "caption{text-align:left;font-weight:600;padding:.2em .6em .2em 0}"
    "th,td{padding:.15em .6em;text-align:left;font-weight:400;white-space:nowrap;border-bottom:1px solid #8884}"
    "thead th{font-weight:600;white-space:normal;vertical-align:bottom;border-bottom-color:currentColor}"
    ".n{text-align:right}"
)
_SCRIPT = (
    'for(const host of document.querySelectorAll("zoo-view"))if(!host.shadowRoot){'
    'const style=document.createElement("style");style.textContent="' + _STYLE + '";'
    'host.attachShadow({mode:"open"}).append(style,...host.childNodes)}'
)


@dataclass(frozen=True)
class Table:
    """Rows of one set of columns, where None is an empty cell; `formats` are specifications such as ".2f"."""

    rows: Sequence[Mapping[str, Any]]
    title: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, bool]:
        """Name of each column -> whether its cells are numbers, which stand to the right."""
        names = self.rows[0] if self.rows else ()
        return {name: any(isinstance(row[name], int | float) for row in self.rows) for name in names}

    def texts(self, row: Mapping[str, Any]) -> list[str]:
        """The cells of a row as they are shown."""
        return ["" if cell is None else format(cell, self.formats.get(key, "")) for key, cell in row.items()]


def html(headline: str, lines: Sequence[str] = (), tables: Sequence[Table] = (), notes: Sequence[str] = ()) -> str:
    """For `_repr_html_`: the headline, a paragraph per line, the tables that have rows, and a list of notes."""
    parts = [f"<p><b>{escape(headline)}</b></p>", *(f"<p>{escape(line)}</p>" for line in lines)]
    parts += [_table(table) for table in tables if table.rows]
    if notes:
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")
    return f"<zoo-view><div>{''.join(parts)}</div></zoo-view><script>{_SCRIPT}</script>"


def shortened(names: Sequence[str], most: int = 20) -> str:
    """The first names, and how many are left out."""
    return ", ".join(names[:most]) + (f", and {len(names) - most:,} more" if len(names) > most else "")


def _table(table: Table) -> str:
    """The first rows, and how many are left out; columns without any content are left out too."""
    kept = [name for name in table.columns if any(row[name] is not None for row in table.rows)]
    table = Table([{name: row[name] for name in kept} for row in table.rows], table.title, table.formats)
    marks = ['class="n" ' if numeric else "" for numeric in table.columns.values()]
    heads = [f'<th {mark}scope="col">{escape(name)}</th>' for mark, name in zip(marks, table.columns, strict=True)]
    rows = []
    for row in table.rows[:_MOST_ROWS]:
        first, *rest = (escape(text) for text in table.texts(row))
        cells = [f"<td {mark}>{text}</td>".replace(" >", ">") for mark, text in zip(marks[1:], rest, strict=True)]
        rows.append(f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>')
    more = f"<p>{len(table.rows) - _MOST_ROWS:,} more</p>" if len(table.rows) > _MOST_ROWS else ""
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    return f"<table>{caption}{head}<tbody>{''.join(rows)}</tbody></table>{more}"


def gauge(title: str, done: float, total: float | None, note: str) -> str:
    """A progress bar with its figures beside it."""
    share = "" if total is None else f' value="{min(done, total):g}" max="{total:g}"'
    return f"<progress{share}></progress> {escape(title)} {escape(note)}"


class Displays:
    """Places below the cell that runs in a notebook, whose content may change.

    Places that are free again are used again by the same cell, so that a thousand epochs leave no thousand lines.
    """

    def __init__(self) -> None:
        self._cell: object = None
        self._free: list[Any] = []

    def open(self) -> tuple[Callable[[str], None], Callable[[], None]] | None:
        """What shows some HTML there, and what clears and frees the place; None outside a notebook."""
        shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if getattr(shell, "kernel", None) is None:
            return None
        from IPython.display import HTML, display  # it is there: this is its kernel

        if self._cell != (cell := (id(shell), shell.execution_count)):
            self._cell, self._free = cell, []
        place = self._free.pop() if self._free else display(HTML(""), display_id=True)

        def close() -> None:
            place.update(HTML(""))
            self._free.append(place)

        return lambda text: place.update(HTML(text)), close
