"""The order of imports, one door per dependency, and no code taken from data."""

import ast
import re
from pathlib import Path

import pytest

import ensemble
import zoo

LEVELS = {
    "zoo": [
        {"about", "names", "durable", "canonical", "devices"},
        {"blocks", "frames", "audio", "recipe", "logs", "norms", "terminal"},
        {"architectures", "corpus"},
        {"spec"},
        {"checkpoint", "search", "judging"},
        {"training", "averaging", "registry"},
        {"exchange", "pictures", "study"},
        {"cli"},
    ],
    "ensemble": [
        {"outputs", "rules", "stack", "brood"},
        {"engine", "weights", "calibration", "diversity", "significance"},
        {"members", "selection", "evaluation", "cotraining"},
        {"plots", "combined"},
        {"report"},
        {"cli"},
    ],
}
DOORS = {
    "torchaudio": {"zoo.audio"},
    "torch.func": {"ensemble.stack"},
    "filelock": {"zoo.registry"},
    "safetensors": {"zoo.checkpoint", "ensemble.outputs"},
    "matplotlib": {"ensemble.plots", "zoo.pictures"},
    "wandb": {"zoo.logs"},
    "soundfile": {"zoo.audio"},
}
BORDER = {"members", "cotraining", "combined", "cli"}


def sources() -> list[Path]:
    """Every module of both packages."""
    return [path for package in (zoo, ensemble) for path in sorted(Path(package.__path__[0]).rglob("*.py"))]


def room(path: Path) -> tuple[str, str]:
    """Package and module of a file; a subpackage counts as one module, `__init__` as ''."""
    package = "zoo" if Path(zoo.__path__[0]) in path.parents else "ensemble"
    parts = path.relative_to(Path({"zoo": zoo, "ensemble": ensemble}[package].__path__[0])).with_suffix("").parts
    return package, "" if parts[0].startswith("__") else parts[0]


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


def level(package: str, module: str) -> int:
    """Height of a module in its package."""
    heights = [index for index, names in enumerate(LEVELS[package]) if module in names]
    assert heights, f"{package}.{module} has no place in the order of imports"
    return heights[0]


@pytest.mark.parametrize("path", sources(), ids=lambda path: "/".join(path.parts[-3:]))
def test_imports_point_down(path: Path) -> None:
    """A module imports only what stands below it; zoo never ensemble; ensemble enters zoo by the front door."""
    package, module = room(path)
    if not module:
        return
    for name in imports(path):
        owner, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if owner == package and target and target != module:
            assert level(package, target) < level(package, module), f"{module} imports {name}"
        elif owner in LEVELS and owner != package:
            assert package == "ensemble", f"zoo.{module} imports {name}"
            assert module in BORDER, f"ensemble.{module} imports {name}"
            assert not target or target in zoo.__all__, f"{name} is not a public name"


@pytest.mark.parametrize("path", sources(), ids=lambda path: "/".join(path.parts[-3:]))
def test_each_dependency_has_one_door(path: Path) -> None:
    """Only the modules named in DOORS speak to that library."""
    package, module = room(path)
    for library, doors in DOORS.items():
        if any(name == library or name.startswith(library + ".") for name in imports(path)):
            assert f"{package}.{module}" in doors, f"{package}.{module} imports {library}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: "/".join(path.parts[-3:]))
def test_no_code_comes_from_data(path: Path) -> None:
    """No unpickling, no evaluation of text, no import by a computed name."""
    text = path.read_text(encoding="utf-8")
    assert not re.findall(
        r"torch\.load\(|\bpickle\.[a-zA-Z]|import pickle|import_module|__import__|(?<![\w.])(?:eval|exec)\(", text
    )


@pytest.mark.parametrize("path", sources(), ids=lambda path: "/".join(path.parts[-3:]))
def test_no_module_holds_two_concepts(path: Path) -> None:
    """Files stay under 400 lines."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


@pytest.mark.parametrize("package", [zoo, ensemble])
def test_every_public_name_resolves_and_is_typed(package: object) -> None:
    """`__all__`, the static imports for type checkers and the run-time table name the same things."""
    tree = ast.parse(Path(package.__file__).read_text())  # type: ignore[attr-defined]
    block = next(node for node in tree.body if isinstance(node, ast.If))
    named = {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert named == set(package.__all__)  # type: ignore[attr-defined]
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018
