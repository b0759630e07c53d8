"""The order of imports, one door per dependency, and no code taken from data."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ensemble
import zoo

ORDER = {
    "zoo": "_files _json _names data models checkpoint logs training registry search exchange _console cli",
    "ensemble": "outputs rules judge fit selection run cli",
}
DOORS = {
    "torchaudio": {"zoo.data.audio"},
    "torch.func": {"ensemble.run.stack"},
    "filelock": {"zoo.registry.transaction"},
    "safetensors": {"zoo.checkpoint", "ensemble.outputs.store"},
    "matplotlib": {"ensemble.judge.plots", "zoo.search.pictures"},
    "wandb": {"zoo.logs"},
    "soundfile": {"zoo.data.audio"},
    "huggingface_hub": {"zoo.exchange"},
    "cyclopts": {"zoo._console", "zoo.cli.options", "ensemble.cli.options"},
    "rich": {"zoo._console"},
}
BORDER = {"run", "cli"}  # of ensemble: what may import zoo
SHARED = {"_console", "_files", "_names"}  # of zoo: machinery that both packages use


def sources() -> list[Path]:
    """Every module of both packages."""
    return [path for package in (zoo, ensemble) for path in sorted(Path(package.__path__[0]).rglob("*.py"))]


def module(path: Path) -> str:
    """The dotted name of a file; a package's `__init__` is the package."""
    package = zoo if Path(zoo.__path__[0]) in path.parents else ensemble
    parts = path.relative_to(Path(package.__path__[0]).parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports at run time, wherever the statement stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def height(package: str, rest: str) -> int:
    """Of a module in its package's order; the package itself and `__main__` stand above all."""
    first, order = rest.split(".")[0], ORDER[package].split()
    if first in ("", "__main__"):
        return len(order)
    assert first in order, f"{package}.{first} has no place in the order of imports"
    return order.index(first)


@pytest.mark.parametrize("path", sources(), ids=module)
def test_imports_point_down(path: Path) -> None:
    """A module imports only what stands below it; zoo never ensemble; ensemble enters zoo by public modules."""
    package, _, own = module(path).partition(".")
    for name in imports(path):
        owner, _, target = name.partition(".")
        if owner == package and target and target.split(".")[0] != own.split(".")[0]:
            assert height(package, target) < height(package, own), f"{package}.{own} imports {name}"
        elif owner in ORDER and owner != package:
            assert package == "ensemble", f"zoo.{own} imports {name}"
            assert own.split(".")[0] in BORDER, f"ensemble.{own} imports {name}"
            private = [part for part in target.split(".") if part.startswith("_")]
            assert set(private) <= SHARED, f"{name} is not public"


@pytest.mark.parametrize("path", sources(), ids=module)
def test_each_dependency_has_one_door(path: Path) -> None:
    """Only the modules named in DOORS speak to that library."""
    for library, doors in DOORS.items():
        if any(name == library or name.startswith(library + ".") for name in imports(path)):
            assert module(path) in doors, f"{module(path)} imports {library}"


CODE_FROM_TEXT = (
    r"torch\.load\(|\bpickle\.[a-zA-Z]|import pickle|import_module|runpy|__import__|(?<![\w.])(?:eval|exec)\("
)
IMPORT_OPTION = "importlib.import_module(path.stem if is_file else target)"  # of `--import`, which a person types


@pytest.mark.parametrize("path", sources(), ids=module)
def test_no_code_comes_from_data(path: Path) -> None:
    """No unpickling, no evaluation of text, no import by a computed name, except what the person names by --import."""
    text = path.read_text(encoding="utf-8")
    if module(path) == "zoo._console":
        assert text.count(IMPORT_OPTION) == 1
        text = text.replace(IMPORT_OPTION, "")
    assert not re.findall(CODE_FROM_TEXT, text)


def test_only_the_command_line_imports_by_name() -> None:
    """`import_own` is called where `--import` is read and nowhere else."""
    calls = [
        module(path) for path in sources() for _ in re.findall(r"\bimport_own\(", path.read_text(encoding="utf-8"))
    ]
    assert calls == ["zoo._console"] * 2  # its definition and the call


PUBLIC = ["zoo", "zoo.data", "zoo.models", "zoo.search", "zoo.training"]
PUBLIC += ["ensemble", "ensemble.fit", "ensemble.judge", "ensemble.rules", "ensemble.run", "ensemble.selection"]


MODULES = ["ensemble.outputs.store", "ensemble.judge.page", "zoo.data.normalisation"]


@pytest.mark.parametrize("name", MODULES)
def test_a_bare_import_reaches_the_public_modules(name: str) -> None:
    """Whatever was imported before, they are attributes of their packages."""
    code = f"import zoo, ensemble; assert {name}.__name__ == {name!r}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves(name: str) -> None:
    """What a package's list of names says is there; anything else is an AttributeError. 40 names at the top."""
    package = functools.reduce(getattr, name.split(".")[1:], {"zoo": zoo, "ensemble": ensemble}[name.split(".")[0]])
    assert len(package.__all__) <= 40
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="attribute"):
        package.nothing  # noqa: B018
