"""The page in a browser: alone from a disk, with Python's numbers, by keyboard, for everybody, at any width.

Needs Chromium, and of the extra `dev` playwright to drive it and axe-core, which comes with axe-playwright-python.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import ensemble

WHY = "needs playwright and axe-playwright-python: pip install 'zoo-ensemble[dev]'"
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=WHY)
playwright = pytest.importorskip("playwright.sync_api", reason=WHY)

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium")

ROUNDED = np.array([0.00501, 0.0000501, 0.00501, 0.00501, 0.00501, 0.0000501, 0.0000501, 0.0000501])  # as it is shown

HOSTILE = "</script><img/src=x/onerror=alert(1)//aNameWithoutAnyBlankThatIsFarTooLongForAPhone>"
RULES = {
    "mean": ensemble.mean,
    "constructor": ensemble.majority,
    "fitted": ensemble.WeightedMean([3, 1, 0], members=("m1", HOSTILE, "mean")),
    "__proto__": ensemble.maximum,
    "m1": ensemble.rules.median,
}


def judged(*, abstain: bool = False) -> ensemble.Report:
    """Three members, with a hostile name and with that of a rule, on 40 recordings; classes with such names too."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.repeat_interleave(torch.arange(40), torch.arange(2, 42))
    labels = torch.randint(5, (len(groups),), generator=generator)
    hint = torch.nn.functional.one_hot(labels, 5) * 2.0
    rows = (torch.randn(3, len(groups), 5, generator=generator) + hint).softmax(-1)
    if abstain:
        rows[0, ::3] = torch.nan
        rows[:, 5] = torch.nan
    return ensemble.evaluate(
        ensemble.MemberOutputs.from_probabilities(
            dict(zip((HOSTILE, "m1", "mean"), rows, strict=True)),
            labels=labels,
            groups=groups,
            classes=["<b>AA", "AE", "AH", "'\"&", HOSTILE],
            abstain=abstain,
            about={name: ensemble.outputs.About(parameters=count) for name, count in ((HOSTILE, 100), ("m1", 2000))},
        ),
        RULES,
        baseline="m1",
        replicates=50,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests of this file that run in one process."""
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on the disk."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(judged().page(), encoding="utf-8")
    return file


@pytest.fixture
def opened(browser: Any, place: Path) -> Iterator[Callable[..., Any]]:
    """Open the page, or another one; what the browser asks for and says is in `.asked` and `.said`."""
    contexts = []

    def visit(*, text: str = "", width: int = 1400, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: page.said.append(dialog.message) or dialog.dismiss())
        file = place
        if text:
            file = place.with_name("other.html")
            file.write_text(text, encoding="utf-8")
        page.goto(file.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()


def test_the_page_asks_for_nothing_and_says_nothing(opened) -> None:
    """One file, whatever its names hold."""
    page = opened(offline=True)
    page.mouse.wheel(0, 5000)
    page.wait_for_timeout(100)
    assert [url for url in page.asked if not url.startswith("file:///")] == []
    assert len(page.asked) == 1
    assert page.said == []
    assert page.locator("img").count() == 0
    assert page.locator(f"text={HOSTILE}").count() > 3
    assert page.evaluate("document.documentElement.dataset.ready") is not None


def shown(page: Any) -> list[float]:
    """Accuracy, log-loss, and the gains in both with their ends, as the page shows them."""
    names = ("accuracy", "loss", "gain", "gain-low", "gain-high", "loss-gain", "loss-gain-low", "loss-gain-high")
    return [float(page.locator(f"#mix-{name}").inner_text()) for name in names]


def expected(report: ensemble.Report, weights: list[float]) -> list[float]:
    """The same of a weighted mean on the sample, in Python."""
    outputs, index = report.sample.outputs, torch.arange(report.sample.outputs.shape[1])

    def scored(weights: list[float]) -> np.ndarray:
        rows = ensemble.WeightedMean(weights, abstain=outputs.abstain)(outputs.probabilities.double())
        return np.stack([(rows.argmax(-1) == outputs.labels).double(), rows[index, outputs.labels].clamp(2**-52).log()])

    own, single = scored(weights), scored([0, 1, 0])
    found = [100 * own[0].mean(), -own[1].mean()]
    for scale, gain in zip((100, 1), own - single, strict=True):
        interval = ensemble.judge.t_interval(gain, outputs.groups)
        found += [scale * interval.estimate, scale * interval.low, scale * interval.high]
    return found


def assert_close(page: Any, report: ensemble.Report, weights: list[float]) -> None:
    """The page shows what Python gives, to the digits that it shows."""
    assert (np.abs(np.array(shown(page)) - expected(report, weights)) <= ROUNDED).all(), (shown(page), weights)


def test_a_mix_has_the_numbers_that_python_gives(opened) -> None:
    """To four digits: of subsets that are switched, of weights that are dragged, of a rule's weights, of one member."""
    report, page = judged(), opened()
    boxes, sliders = page.locator("#mix input[type=checkbox]"), page.locator("#mix input[type=range]")
    outputs = report.sample.outputs
    for clicked, on in ((0, "011"), (1, "001"), (0, "101"), (1, "111")):
        boxes.nth(clicked).click()
        weights = [float(each) for each in on]
        assert_close(page, report, weights)
        some = outputs.subset([name for name, weight in zip(outputs.members, weights, strict=True) if weight])
        row = ensemble.evaluate(some, {"mean": ensemble.mean}, replicates=1).rules.iloc[0]
        assert page.locator("#mix-accuracy").inner_text() == f"{100 * row['accuracy']:.2f}"
        assert page.locator("#mix-loss").inner_text() == f"{row['log_loss']:.4f}"
    sliders.nth(2).fill("0.25")
    assert_close(page, report, [1, 1, 0.25])
    page.get_by_role("button", name="As fitted").click()
    assert_close(page, report, [1, 3, 0])
    assert page.get_by_text("The sample is all 860 frames").is_visible()
    exact = pd.concat([report.members[1:2], report.rules])  # the baseline, then the rules
    rows = [[cell.inner_text() for cell in row.locator("td").all()] for row in page.locator(".answer tbody tr").all()]
    assert [row[1] for row in rows] == [f"{100 * value:.2f}" for value in exact["accuracy"]]
    assert [row[3] for row in rows] == [f"{value:.4f}" for value in exact["log_loss"]]
    of_sample = ensemble.evaluate(outputs, RULES, baseline="m1", replicates=1)
    assert [row[0] for row in rows] == [
        f"{100 * value:.2f}" for value in pd.concat([of_sample.members[1:2], of_sample.rules])["accuracy"]
    ]
    page.get_by_role("button", name="Only m1").click()
    assert shown(page)[2:] == [0] * 6
    boxes.nth(1).click()
    assert page.locator("#mix-accuracy").inner_text() == "-"
    assert page.said == []


def test_members_that_abstain_are_left_out_of_a_mix(opened) -> None:
    """Where everybody does, the classes are equally probable."""
    report = judged(abstain=True)
    page = opened(text=report.page())
    assert_close(page, report, [1, 1, 1])
    page.locator("#mix input[type=checkbox]").nth(2).click()
    assert_close(page, report, [1, 1, 0])
    assert page.said == []


def test_the_keyboard_reaches_and_moves_everything(opened) -> None:
    """Tab alone visits whatever can be operated; arrows move through every figure and say what they find."""
    page = opened()
    for summary in page.locator("summary").all():
        summary.press("Enter")
    every = "a, button, select, input, summary, [tabindex='0']"
    page.evaluate(f'[...document.querySelectorAll("{every}")].forEach((each, place) => each.dataset.place = place)')
    visible = "filter(each => each.checkVisibility()).map(each => each.dataset.place)"
    reachable = page.evaluate(f'[...document.querySelectorAll("{every}")].{visible}')
    visited, last = set(), "document.activeElement.dataset.place"
    for _ in range(len(reachable) + 2):
        page.keyboard.press("Tab")
        visited.add(page.evaluate(last))
    assert set(reachable) - visited == set()
    for part in ("size", "difference", "calibration", "confusion", "classes", "recordings"):
        readout, figure = page.locator(f"#{part} .readout").first, page.locator(f"#{part} [role=application]")
        figure.focus()
        said = set()
        for key in ("ArrowRight", "ArrowDown", "End", "ArrowLeft", "Home"):
            page.keyboard.press(key)
            said.add(readout.inner_text())
        assert len(said) > 1, part
    page.get_by_role("button", name="Next mistake").press("Enter")
    said = page.locator("#recordings .readout").inner_text()
    assert re.search(r"true (.*); .* says (.*) with", said)[1] != re.search(r" says (.*) with", said)[1]
    head = page.locator("#leaderboard thead button", has_text="log-loss")
    head.focus()
    column = [cell.inner_text() for cell in page.locator("#leaderboard tbody tr td:nth-child(3)").all()]
    for key, order in (("Enter", "descending"), ("Space", "ascending")):
        page.keyboard.press(key)
        found = [cell.inner_text() for cell in page.locator("#leaderboard tbody tr td:nth-child(3)").all()]
        assert found == sorted(column, key=float, reverse=order == "descending")
        assert page.locator("#leaderboard th[aria-sort]").get_attribute("aria-sort") == order


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_everybody_can_use_it_and_it_fits(opened, scheme: str, width: int) -> None:
    """No serious or critical violation of axe-core's rules; nothing is wider than the window, details open too."""
    page = opened(width=width, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    found = axe.Axe().run(page).response["violations"]
    grave = [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]
    assert grave == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    wide = """[...document.querySelectorAll("body *")].filter(each => !each.closest(".strip, caption, .skip")
        && (each.getBoundingClientRect().right > innerWidth + 1 || each.matches(".table")
        && each.scrollWidth > each.clientWidth + 1)).map(each => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []


def test_figures_say_what_they_cannot_show(opened) -> None:
    """A point beyond the axis has an arrow; where cells are small, only some classes are named, in every view."""
    report = judged()
    rules = report.rules.assign(log_loss=[0.5, 0.5, 0.5, 0.5, 99.0], parameters=[10, 30, 90, 300, 9000])
    page = opened(text=replace(report, rules=rules).page())
    assert page.locator("#size text", has_text="\u2191").all_text_contents() == ["m1 \u2191"]
    labels = page.locator("#confusion text")
    page.locator("#confusion .plot").evaluate("plot => { plot.style.width = '100px' }")
    page.wait_for_timeout(100)
    counts = []
    for view in ("0", "difference"):
        page.locator("#confusion select").select_option(view)
        counts.append(labels.count())
    assert counts[0] == counts[1] < 10
    page.locator("#recordings [role=application]").press("End")
    assert re.match(r"Frame (\d+) of \1:", page.locator("#recordings .readout").inner_text())


def test_without_a_script_the_tables_are_there(opened) -> None:
    """As where a server forbids scripts."""
    page = opened(java_script_enabled=False, width=360)
    assert page.locator("#leaderboard tbody tr").count() == 8
    assert page.locator("#leaderboard tbody tr").first.is_visible()


def test_a_print_has_everything(opened) -> None:
    """Details are opened, and what serves the screen alone is left out."""
    page = opened()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert not page.locator("nav").is_visible()
    assert page.pdf()[:4] == b"%PDF"


IN_A_NOTEBOOK = """<!doctype html><style>
table, td, th, p, b, div { color: red; font-size: 40px; border: 9px solid green; text-transform: uppercase }
</style><body><table id="own"><tr><td>the notebook's</td></tr></table><main></main><script>
for (const text of %s) {  // as notebooks do: what innerHTML holds of scripts is made again, and runs then
  const cell = document.createElement("section");
  cell.innerHTML = text;
  document.querySelector("main").append(cell);
  for (const old of cell.querySelectorAll("script")) {
    const script = document.createElement("script");
    script.textContent = old.textContent;
    old.replaceWith(script);
  }
}</script>"""


def test_what_objects_show_in_a_notebook_keeps_its_style_and_gives_none_away(opened) -> None:
    """Inserted as notebooks do, twice; names that are markup are text; without scripts the same text is there."""
    report = judged()
    texts = [report._repr_html_(), report._repr_html_()]
    page = opened(text=IN_A_NOTEBOOK % json.dumps(texts).replace("</", "<\\/"))
    assert page.said == []
    style = "element => [getComputedStyle(element).fontSize, getComputedStyle(element).textTransform]"
    assert page.locator("#own td").evaluate(style) == ["40px", "uppercase"]
    assert page.locator("zoo-view td").first.evaluate(style) == ["13px", "none"]
    assert page.evaluate("[...document.querySelectorAll('zoo-view')].map(view => !!view.shadowRoot)") == [True, True]
    assert page.locator("zoo-view img").count() == 0
    inside = page.locator("zoo-view div").first.inner_text()
    assert HOSTILE in inside
    plain = opened(text=texts[0], java_script_enabled=False)
    assert plain.locator("zoo-view div").inner_text().split() == inside.split()
