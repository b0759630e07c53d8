"""Examples in docstrings, README and `examples/` do what they say."""

import doctest
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ensemble
import zoo

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
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
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a new clone is: the registry, its blobs, and a corpus in the HW1P2 layout."""
    if not README.exists():
        pytest.skip("no README beside the tests")
    folder = tmp_path_factory.mktemp("home")
    for name in ("registry.json", "checkpoints", "examples"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for partition in ("train", "valid", "test"):
        frames = zoo.sample_corpus(partition)
        few = frames.select(zoo.data.frames.torch.arange(0, frames.recordings, 40))
        zoo.data.corpus.write_corpus(few, folder / "my-corpus", partition)
    return folder


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language in the README."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_two_commands_of_the_readme_are_those_that_ci_runs() -> None:
    """Installing needs the network, so `.ci/run` takes the second one out of the README and runs it."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if "-m venv" in line]
    assert [line.rsplit("/", 1)[1] for line in lines] == ["ensemble evaluate", "pytest"] or not README.exists()


@pytest.mark.parametrize("block", blocks("python"))
def test_python_in_the_readme_runs(block: str, home: Path) -> None:
    """Each block by itself, in a new interpreter, in the folder of a new clone."""
    run([sys.executable, "-c", block], home)


@pytest.mark.parametrize("block", [b for b in blocks("bash") if "-m venv" not in b])
def test_commands_in_the_readme_run(block: str, home: Path) -> None:
    """Each block as one shell script, with the commands of this environment."""
    run(["bash", "-euc", block], home)


def run(command: list[str], folder: Path) -> None:
    """Run to success; the commands `zoo` and `ensemble` are this interpreter's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
