"""Examples in docstrings, pages and `examples/` do what they say."""

import doctest
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Outcome

import ensemble
import zoo

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [page for page in (README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))) if page.exists()]
MODULES = sorted(
    module.name
    for package in (zoo, ensemble)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not module.name.endswith("__main__")
)


def module_named(name: str) -> object:
    """The module, imported."""
    __import__(name)
    return sys.modules[name]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `>>>` in the packages, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(module_named(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not failed


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a new clone is: the registry, its blobs, and a corpus in the HW1P2 layout; and what users bring."""
    if not README.exists():
        pytest.skip("no README beside the tests")
    folder = tmp_path_factory.mktemp("clone")
    for name in ("registry.json", "checkpoints", "examples"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for partition in ("train", "valid", "test"):
        frames = zoo.sample_corpus(partition)
        few = frames.select(torch.arange(0, frames.recordings, 40))
        zoo.data.corpus.write_corpus(few, folder / "my-corpus", partition)
    bring(folder)
    return folder


def bring(folder: Path) -> None:
    """What `docs/your-models.md` starts from: a notebook's checkpoints, a class, predictions, a corpus of sounds."""
    (folder / "notebook").mkdir()
    for file, name in {"first": "mlp-a", "second": "pyramid-a", "third": "inverted-a"}.items():
        entry = zoo.Registry(folder / "registry.json").get(name)
        tensors = zoo.Registry(folder / "registry.json").load(entry).state_dict()
        saved = {"epoch": 3, "model_state_dict": {f"model.{key}": value for key, value in tensors.items()}}
        torch.save(saved, folder / "notebook" / f"{file}.pth")
    page = [page for page in PAGES if page.name == "your-models.md"]
    source = next(block.values[0] for block in blocks("python", pages=page) if "# student.py" in block.values[0])
    (folder / "student.py").write_text(source, encoding="utf-8")
    names: dict[str, type[torch.nn.Module]] = {}
    exec(source, names)
    torch.save(names["Network"](27 * 5, 40, width=32).state_dict(), folder / "student.pth")

    generator = np.random.default_rng(0)
    labels = pd.DataFrame({"id": [f"img-{row:04d}" for row in range(300)], "label": generator.integers(3, size=300)})
    classes = ["one", "two", "three"]
    for model, sharp in {"forest": 2.0, "linear": 1.5, "net": 1.0}.items():
        logits = sharp * np.eye(3)[labels["label"]] + generator.normal(size=(300, 3))
        rows = pd.DataFrame(np.exp(logits), labels["id"], classes)
        rows = rows.div(rows.sum(axis=1), axis=0)[generator.permutation(classes)]
        for part, some in {"oof": rows[:200], "test": rows[200:]}.items():
            (folder / part).mkdir(exist_ok=True)
            some.sample(frac=1, random_state=1).to_csv(folder / part / f"{model}.csv")
    labels["label"], labels["writer"] = np.array(classes)[labels["label"]], labels.index // 10
    labels[:200].to_csv(folder / "train.csv", index=False)

    (folder / "sounds.txt").write_text("quiet\nspeech\nmusic\n", encoding="utf-8")
    for partition, recordings in {"train": 6, "valid": 3, "test": 3}.items():
        truth = torch.from_numpy(generator.integers(3, size=recordings * 10)).repeat_interleave(10)
        features = torch.from_numpy(generator.normal(size=(len(truth), 13))).float() + truth[:, None]
        starts = torch.arange(recordings + 1) * 100
        frames = zoo.FrameSet(features, truth, starts, ("quiet", "speech", "music"))
        zoo.write_corpus(frames, folder / "sounds", partition)


@pytest.fixture
def home(clone: Path, tmp_path: Path) -> Path:
    """A copy of that folder, so that no example depends on what another one has registered."""
    return shutil.copytree(clone, tmp_path / "home")


def blocks(*languages: str, pages: list[Path] = PAGES) -> list[object]:
    """Fenced blocks of these languages, "" for none, each called after its page and line."""
    fence = re.compile(rf"^```({'|'.join(languages)})\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in fence.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[2], id=f"{page.name}:{line}"))
    return found


def lines_of(parameters: list[object]) -> list[str]:
    """The lines of blocks, those that end with a backslash joined."""
    text = "\n".join(parameter.values[0] for parameter in parameters)
    return re.sub(r" *\\\n *", " ", text).splitlines()


def test_the_two_commands_of_the_readme_are_those_that_ci_runs() -> None:
    """Installing needs the network, so `.ci/run` takes the second one out of the README and runs it."""
    lines = [line for line in lines_of(blocks("bash", pages=[README])) if "-m venv" in line] if README.exists() else []
    assert [line.rsplit("/", 1)[1] for line in lines] == ["ensemble evaluate", "pytest"] or not README.exists()


RUN_BLOCKS = r"""
import re, sys
text = open(sys.argv[1], encoding="utf-8").read()
for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
    lines_above = "\n" * (text.count("\n", 0, match.start()) + 1)  # so that a traceback names the page's line
    exec(compile(lines_above + match[1], sys.argv[1], "exec"), {"__name__": "__main__"})
"""


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", pages=[page])], ids=lambda page: page.name)
def test_python_on_the_pages_runs(page: Path, home: Path) -> None:
    """Each block with names of its own, in the folder of a new clone; one interpreter per page."""
    run([sys.executable, "-c", RUN_BLOCKS, str(page)], home)


@pytest.mark.parametrize("block", [b for b in blocks("bash") if "-m venv" not in b.values[0]])
def test_commands_on_the_pages_run(block: str, home: Path) -> None:
    """Each block as one shell script, with the commands of this environment."""
    run(["bash", "-euc", block], home)


ADDED = [
    "midrange",
    "gated",
    "hourglass",
    "squared_relu",
    "nadamw",
    "square_root",
    "peak",
    "jaccard_distance",
    "balanced_accuracy",
    "collision",
]
WITH_ORACLE = ["test_each_optimiser_walks_as_torchs", "test_each_schedule_is_torchs", "pair_equals_the_loop"]


def test_the_shared_laws_hold_for_what_contributing_adds(home: Path) -> None:
    """One module with one of each thing, through the public decorators; what needs an oracle of its own is left out."""
    module = "\n\n".join(block.values[0] for block in blocks("python", pages=[ROOT / "CONTRIBUTING.md"]))
    (home / "additions.py").write_text(module, encoding="utf-8")
    kinds = [
        "architectures",
        "pooling",
        "table",
        "optimisers",
        "schedules",
        "normalisation",
        "diversity",
        "metrics",
        "rejection",
        "frames",
        "loop",
        "cotraining",
    ]
    files = [str(ROOT / "tests" / f"test_{kind}.py") for kind in kinds]
    wanted = f"({' or '.join(ADDED)}) and not ({' or '.join(WITH_ORACLE)})"
    report = run([sys.executable, "-m", "pytest", "-v", "-n0", "-padditions", "-k", wanted, *files], home)
    assert [name for name in ADDED if name not in report] == []


def options_by_command() -> dict[str, set[str]]:
    """Command, such as "zoo train" -> the options that the pages give it anywhere."""
    found: dict[str, set[str]] = {}
    for line in lines_of(blocks("bash", "")):
        if match := re.match(r"(?:zoo|ensemble) [a-z]+", line):
            found.setdefault(match[0], set()).update(re.findall(r"(?<= )--[a-z-]+", line.partition(" # ")[0]))
    return found


@pytest.mark.parametrize(("words", "options"), options_by_command().items())
def test_options_on_the_pages_exist(words: str, options: set[str], command: Callable[..., Outcome]) -> None:
    """Commands that take too long to run here at least have the options that the pages give them."""
    assert options <= set(re.findall(r"--[a-z-]+", command(f"{words} --help").out))


EXAMPLES = {
    "any_classifier.py": "--epochs 2 --trees 10",
    "combine_runs.py": "runs --registry runs.json --epochs 1 --fraction 0.1",
    "many_members.py": "--members 4 --max-members 2 --epochs 1 --fraction 0.1",
    "ship_ensemble.py": "--members cylinder-a basic-a",
    "train_zoo.py": "--registry zoo.json --only mlp* --epochs 1 --fraction 0.1",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, home: Path) -> None:
    """Each example with small settings, in the folder of a new clone; those without have tests of their own."""
    assert run([sys.executable, f"examples/{name}", *EXAMPLES[name].split()], home)


def test_the_tour_runs_from_checkpoints_to_the_verdict(home: Path) -> None:
    """Every cell of the notebook, in a kernel of its own; it is committed without what the cells print."""
    why = "needs nbclient, nbformat and ipykernel: pip install 'zoo-ensemble[dev]'"
    nbclient, nbformat = (pytest.importorskip(name, reason=why) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel", reason=why)
    tour = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    nbclient.NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(home / "examples")}}).execute()
    shown = [output.get("data", {}).get("text/html", "") for cell in cells for output in cell.outputs]
    assert sum("<zoo-view>" in text for text in shown) == 6
    assert any("<b>Better. " in text for text in shown)
    assert (home / "examples" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_every_example_is_run() -> None:
    """A new example needs its line above."""
    elsewhere = {"consume.py", "synthesise.py"}
    assert {*EXAMPLES} | elsewhere == {path.name for path in ROOT.glob("examples/*.py")} or not README.exists()
    assert [path.name for path in ROOT.glob("examples/*.ipynb")] == ["tour.ipynb"] or not README.exists()


def run(command: list[str], folder: Path) -> str:
    """What a command prints; it must succeed. The commands `zoo` and `ensemble` are this interpreter's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
