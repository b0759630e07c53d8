"""What objects show of themselves: in a notebook, in a terminal, and while a long call runs."""

import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import ensemble
import zoo
from zoo import logs
from zoo._notebook import Table, html, shortened

HOSTILE = "<script>alert('&')</script>"
SMALL = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})


def shown(tmp_path: Path) -> dict[str, Any]:
    """One of everything that shows itself, with names that are markup."""
    names = (HOSTILE, "b", "c")
    members = ensemble.from_modules({name: torch.nn.Linear(3, 2) for name in names}, classes=[HOSTILE, "yes"])
    rows = torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0)).softmax(-1)
    outputs = ensemble.MemberOutputs.from_probabilities(
        dict(zip(names, rows, strict=True)), labels=[0, 1] * 20, groups=torch.arange(40) // 4, classes=[HOSTILE, "yes"]
    )
    fit = ensemble.fit_weights(outputs)
    registry = zoo.Registry(tmp_path / "registry.json")
    registry.register("a", zoo.build(SMALL, seed=0), spec=SMALL, classes=["no", "yes"], metrics={HOSTILE: 0.5})
    return {
        "report": ensemble.evaluate(outputs, {"mean": ensemble.mean, f"{HOSTILE} rule": fit.rule}, baseline=HOSTILE),
        "members": members,
        "outputs": outputs,
        "fit": fit,
        "selection": ensemble.select(outputs, torch.inf),
        "table": registry.table(),
    }


def test_names_are_text_and_the_only_script_is_our_own(tmp_path: Path) -> None:
    """In every object's HTML, which is small."""
    objects = shown(tmp_path)
    for name, value in objects.items():
        text = value._repr_html_()
        assert text.count("<script>") == text.count("</script>") == 1, name
        assert "&lt;script&gt;" in text or HOSTILE not in str(value), name
        assert len(text) < 30_000, name


def test_every_object_says_in_a_terminal_what_matters(tmp_path: Path) -> None:
    """On a few lines, without the arrays inside."""
    objects = shown(tmp_path)
    for name, value in objects.items():
        assert len(repr(value).splitlines()) < 20, name
        assert "tensor(" not in repr(value), name
    assert repr(objects["report"]).startswith(f"Report: {objects['report'].conclusion}\n")
    assert repr(objects["outputs"]).startswith(
        "MemberOutputs: 3 members, 40 frames of 10 recordings, 2 classes, labels"
    )
    assert objects["fit"].conclusion in repr(objects["fit"])
    assert objects["selection"].conclusion in repr(objects["selection"])
    assert repr(objects["members"]) == f"Members({HOSTILE}, b, c)"


def test_a_report_shows_its_tables_with_intervals_and_its_notes(tmp_path: Path) -> None:
    """As rounded as on the page; columns that nothing is known of are left out."""
    report = shown(tmp_path)["report"]
    text = report._repr_html_()
    row = report.rules.iloc[0]
    assert f"{100 * row['gain_low']:+.2f} to {100 * row['gain_high']:+.2f}" in text
    assert f"{row['accuracy']:.2%}" in text
    assert all(word in text for word in ("log-loss", "calibration error", "report.page()"))
    assert "microseconds" not in text
    assert len(re.findall("<li>", text)) == len(report.notes) > 0


@pytest.mark.parametrize("rules", [{}, {"mean": ensemble.mean}])
def test_a_report_without_frames_shows_itself_too(rules: dict[str, ensemble.Rule]) -> None:
    """No rules, no recordings, no figures."""
    outputs = ensemble.MemberOutputs.from_probabilities({"a": torch.ones(0, 2)}, labels=torch.zeros(0).long())
    report = ensemble.evaluate(outputs, rules)
    assert "nan to" not in report._repr_html_() + repr(report)


def test_a_table_of_the_registry_is_a_table_like_any_other(tmp_path: Path) -> None:
    """Only how it is shown differs, and that is of its content as it is now; copies and pickles are plain."""
    table = shown(tmp_path)["table"]
    assert type(table) is pd.DataFrame
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(table)), table)
    assert "zoo-view" not in table[table["name"] == "a"]._repr_html_()
    assert "<style" not in table._repr_html_()
    table["note"] = ["one's own"]
    assert "one&#x27;s own" in table._repr_html_()
    assert "0 versions" in zoo.registry.Snapshot().table()._repr_html_()


def test_long_tables_and_lists_are_cut_and_say_so() -> None:
    """After 60 rows and 20 names."""
    text = html("Many", tables=[Table([{"n": number} for number in range(1000)])])
    assert text.count("<tr>") == 61
    assert "940 more" in text
    assert shortened([f"m{number}" for number in range(30)]).endswith("m19, and 10 more")
    assert html("None", tables=[Table([])]).count("<table") == 0
    text = html("Empty", tables=[Table([{"n": 1, "nothing": None}, {"n": None, "nothing": None}])])
    assert ("<th" in text, "nothing" in text) == (True, False)


BARS = """
from zoo import logs
logs._BETWEEN = -1.0
for _ in range(3):
    with logs.bar("<epochs>", total=2) as outer:
        with logs.bar("steps") as inner:
            inner(5, "going well")
        outer()
with logs.bar("<epochs>", total=2) as outer:
    outer()
    raise KeyboardInterrupt
"""


def test_the_bar_shows_how_far_the_work_is() -> None:
    """In a notebook: one place per bar that is open at a time, in use again by the next, and empty at the end."""
    why = "needs nbclient, nbformat and ipykernel: pip install 'zoo-ensemble[dev]'"
    nbclient, nbformat = (pytest.importorskip(name, reason=why) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel", reason=why)
    heard: list[str] = []

    class Client(nbclient.NotebookClient):  # type: ignore[misc]  # it has no types
        def process_message(self, message: Any, cell: Any, cell_index: int) -> Any:
            heard.append(message["content"].get("data", {}).get("text/html", ""))
            return super().process_message(message, cell, cell_index)

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BARS)])
    Client(book, timeout=60, allow_errors=True).execute()
    assert any('<progress value="1" max="2"></progress> &lt;epochs&gt; 1 of 2 in 0 s' in text for text in heard)
    assert any("<progress></progress> steps 5 in 0 s going well" in text for text in heard)
    shown = [output for output in book.cells[0].outputs if output.output_type == "display_data"]
    assert [output.data["text/html"] for output in shown] == ["", ""]


def test_outside_a_notebook_the_bar_is_a_line_in_a_terminal_or_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr, and wiped at the end."""
    monkeypatch.setattr(logs, "_BETWEEN", -1.0)
    with logs.bar("frames", total=4) as advance:
        advance(2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with logs.bar("frames", total=4) as advance:
        advance(2)
    shown = capsys.readouterr().err
    assert "frames 2 of 4 in 0 s, 0 s left" in shown
    assert shown.endswith("\r\x1b[K")
