"""The house: which module may import which, how many there are, and who may use which library."""

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import ensemble
import zoo

ORDER = {
    "zoo": "_files _json _names _notebook logs workers data models checkpoint training registry search exchange onnx "
    "signature _console cli",
    "ensemble": "outputs rules judge fit selection run cli",
}
DOORS = {  # library -> the modules that may import it
    "IPython": {"zoo._notebook"},
    "cyclopts": {"zoo._console", "zoo.cli", "ensemble.cli"},
    "cryptography": {"zoo.signature"},
    "huggingface_hub": {"zoo.exchange"},
    "jinja2": {"ensemble.judge.page"},
    "matplotlib": {"ensemble.judge.plots", "zoo.search.pictures"},
    "msgspec": {"ensemble.judge.tables", "ensemble.outputs.store", "zoo.registry"},
    "onnx": {"zoo.onnx"},
    "onnxruntime": {"zoo.onnx"},
    "onnxscript": {"zoo.onnx"},
    "optuna": {"zoo.search.study"},
    "pandas": {
        "ensemble.cli.predict",
        "ensemble.judge",
        "ensemble.outputs.predictions",
        "ensemble.run.members",
        "zoo.logs",
        "zoo.registry",
    },
    "ray": {"zoo.workers"},
    "rich": {"zoo._console"},
    "safetensors": {"zoo.checkpoint", "zoo.data.packed", "ensemble.judge.tables", "ensemble.outputs.store"},
    "soundfile": {"zoo.data.audio"},
    "torch.func": {"ensemble.run.stack"},
    "torchaudio": {"zoo.data.audio"},
    "wandb": {"zoo.logs"},
}
BORDER = {"run", "cli"}  # of ensemble: what may import zoo
SHARED = {"_console", "_files", "_names", "_notebook"}  # of zoo: machinery that both packages use
EVERYWHERE = "zoo._notebook"  # what the rest of ensemble may import of zoo: text in, text out
PUBLIC = ["zoo", "zoo.data", "zoo.models", "zoo.search", "zoo.training"]
PUBLIC += ["ensemble", "ensemble.fit", "ensemble.judge", "ensemble.rules", "ensemble.run", "ensemble.selection"]
TESTED_WITH = {"tables": "report"}  # tables are what a report is made of
MOST_FILES, MOST_NAMES = 111, 40  # 95, and what came after: ways in and out, distillation, scale, uncertainty
CODE_FROM_TEXT = (
    r"torch\.load\(|\bpickle\.[a-zA-Z]|import pickle|import_module|runpy|__import__|(?<![\w.])(?:eval|exec)\("
)
ALLOWED = {  # module -> the one line of it that may: the import of `--import`, which a person types; tensors alone
    "zoo._console": "importlib.import_module(path.stem if is_file else target)",
    "zoo.checkpoint.adoption": 'torch.load(file, map_location="cpu", weights_only=True)',
}


def dotted(path: Path) -> str:
    """The name of a module by its file; a package's `__init__` is the package."""
    package = zoo if Path(zoo.__path__[0]) in path.parents else ensemble
    parts = path.relative_to(Path(package.__path__[0]).parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    dotted(path): path for package in (zoo, ensemble) for path in sorted(Path(package.__path__[0]).rglob("*.py"))
}


@functools.cache
def imports(name: str) -> frozenset[str]:
    """All modules and names that a module imports, wherever the statement stands, for types alone included."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own_imports(name: str) -> Iterator[str]:
    """The modules of this project that a module imports."""
    for target in imports(name):
        module = target if target in SOURCES else target.rpartition(".")[0]
        if module in SOURCES and module != name:
            yield module


def height(package: str, rest: str) -> int:
    """Of a module in its package's order; the package itself and `__main__` stand above all."""
    first, order = rest.split(".")[0], ORDER[package].split()
    if first in ("", "__main__"):
        return len(order)
    assert first in order, f"{package}.{first} has no place in the order of imports"
    return order.index(first)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name: str) -> None:
    """A module imports only what stands below it; zoo never ensemble; ensemble enters zoo by public modules."""
    package, _, own = name.partition(".")
    for target in imports(name):
        owner, _, rest = target.partition(".")
        if owner == package and rest and rest.split(".")[0] != own.split(".")[0]:
            assert height(package, rest) < height(package, own), f"{name} imports {target}"
        elif owner in ORDER and owner != package:
            assert package == "ensemble", f"{name} imports {target}"
            assert own.split(".")[0] in BORDER or target.startswith(EVERYWHERE), f"{name} imports {target}"
            assert {part for part in rest.split(".") if part.startswith("_")} <= SHARED, f"{target} is not public"


def test_no_imports_run_in_a_circle() -> None:
    """Inside packages too, and where an import serves types alone."""
    graph = {name: set(own_imports(name)) for name in SOURCES}
    while free := {name for name, targets in graph.items() if not targets & set(graph)}:
        graph = {name: targets for name, targets in graph.items() if name not in free}
    assert not graph, f"in a circle, or above one: {sorted(graph)}"


@pytest.mark.parametrize("name", SOURCES)
def test_each_library_has_one_door(name: str) -> None:
    """Only the modules named in DOORS, and the modules of packages named there, speak to that library."""
    for library, doors in DOORS.items():
        if any(target == library or target.startswith(library + ".") for target in imports(name)):
            assert any(name == door or name.startswith(door + ".") for door in doors), f"{name} imports {library}"


@pytest.mark.parametrize("name", SOURCES)
def test_no_code_comes_from_data(name: str) -> None:
    """No unpickling, no evaluation of text, no import by a computed name, except in two places, once each."""
    text = SOURCES[name].read_text(encoding="utf-8")
    if name in ALLOWED:
        assert text.count(ALLOWED[name]) == 1
        text = text.replace(ALLOWED[name], "")
    assert not re.findall(CODE_FROM_TEXT, text)


def test_only_the_command_line_imports_by_name() -> None:
    """`import_own` is called where `--import` is read and nowhere else."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in SOURCES.items()}
    calls = [name for name, text in texts.items() for _ in re.findall(r"\bimport_own\(", text)]
    assert calls == ["zoo._console"] * 2  # its definition and the call


def test_the_house_stays_small() -> None:
    """Few modules, with names that tell them apart; a command's module is named after its command."""
    assert len(SOURCES) <= MOST_FILES
    rooms = [name for name in SOURCES if ".cli" not in name and not name.endswith("__main__")]
    shared = [last for last, count in Counter(name.split(".")[-1] for name in rooms).items() if count > 1]
    assert not shared, f"two modules share the name {shared}"


def test_each_module_has_its_test_file() -> None:
    """`test_<module>.py`, `test_cli_<module>.py` for a command; or that of its package or room, as `test_engine.py`."""
    for name, path in SOURCES.items():
        if "attach_stub" in path.read_text(encoding="utf-8") or name.endswith("__main__"):
            continue
        package, last = [part.lstrip("_") for part in name.split(".")[-2:]]
        own = f"cli_{last}" if package == "cli" else TESTED_WITH.get(last, last)
        files = [Path(__file__).with_name(f"test_{file}.py") for file in (own, package)]
        assert any(file.exists() for file in files), f"{name} has no test file"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves(name: str) -> None:
    """What a package's list of names holds is there; anything else is an AttributeError. 40 names at the top."""
    package = functools.reduce(getattr, name.split(".")[1:], {"zoo": zoo, "ensemble": ensemble}[name.split(".")[0]])
    assert len(package.__all__) <= MOST_NAMES
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="attribute"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["ensemble.outputs.store", "ensemble.judge.page", "zoo.data.normalisation"])
def test_a_bare_import_reaches_the_public_modules(name: str) -> None:
    """Whatever was imported before, they are attributes of their packages."""
    code = f"import zoo, ensemble; assert {name}.__name__ == {name!r}"
    subprocess.run([sys.executable, "-c", code], check=True)
