"""The pages in `docs/` are complete and true; `.ci/run` builds the site of them."""

import functools
import json
import re
import runpy
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ensemble
import zoo
from zoo.checkpoint.header import read_header

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = [
    name
    for top in (zoo, ensemble)
    for name in (
        top.__name__,
        *(f"{top.__name__}.{key}" for key in top.__all__ if isinstance(getattr(top, key), ModuleType)),
    )
]

PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md")))
    if path.exists()
]
FILES = {"zoo.driver"}  # of git's configuration

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="no docs beside the tests")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_package_has_its_page_in_the_reference(package: str) -> None:
    """The page takes the names from the package itself, so only the page can be missing."""
    assert f".. automodule:: {package}\n" in (DOCS / "api" / f"{package}.md").read_text(encoding="utf-8")
    assert re.search(rf"^{package}$", (DOCS / "api" / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_citation_names_the_version_and_the_licence_of_the_project() -> None:
    """One release, one number: CITATION.cff says what pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation


# ---- names


def code_on(page: str) -> str:
    """A page's inline code and fenced blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES)
def test_names_on_the_pages_exist(page: str) -> None:
    """What a page calls `zoo.x.y` or `ensemble.x.y` can be reached after a bare import of the package."""
    names = set(re.findall(r"(?<![\w./-])((?:zoo|ensemble)(?:\.[A-Za-z_]\w*)+)", code_on(page)))
    for name in names - FILES:
        first, *rest = name.split(".")
        functools.reduce(getattr, rest, {"zoo": zoo, "ensemble": ensemble}[first])


@pytest.mark.parametrize("page", PAGES)
def test_files_on_the_pages_exist(page: str) -> None:
    """Files and folders that a page names in `code`, from the root of the repository."""
    paths = set(re.findall(r"(?<![\w/-])((?:zoo|ensemble|tests|docs|examples|benchmarks)/[\w./-]*\w)", code_on(page)))
    assert [path for path in paths if not (ROOT / path).exists()] == []


# ---- design


def test_the_front_house_is_about_5000_lines() -> None:
    """The files that the page on design asks a newcomer to read, in the table of that section."""
    text = (
        (DOCS / "design.md").read_text(encoding="utf-8").partition("## What to read")[2].partition("machine rooms")[0]
    )
    files = re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.MULTILINE)
    assert f"in {len(files)} files" in text
    assert 4300 <= sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files) <= 5600


def test_the_drawing_of_the_house_names_every_package_in_the_order_of_imports() -> None:
    """Each package and module of the first level, lowest first, as `test_house.py` holds it; private ones apart."""
    text = (DOCS / "design.md").read_text(encoding="utf-8").partition("## The house")[2].partition("```\n")[2]
    drawn = re.findall(r"^  (\w+)", text.partition("```")[0], flags=re.MULTILINE)
    order = runpy.run_path(str(Path(__file__).with_name("test_house.py")))["ORDER"]
    assert drawn == [name for names in order.values() for name in names.split() if not name.startswith("_")]


# ---- formats


def fields(section: str) -> set[str]:
    """What stands in the first column of a section's tables, up to the next heading."""
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    body = text.partition(f"\n{section}\n")[2]
    assert body, f"formats.md has no section {section!r}"
    return set(re.findall(r"^\| `([^`]+)` \|", body.partition("\n##")[0], flags=re.MULTILINE))


SPEC = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})
FRAMES = zoo.FrameSet(torch.randn(64, 2), torch.arange(64) % 2, torch.tensor([0, 32, 64]), ("no", "yes"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch that has ended."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    zoo.train(SPEC, zoo.Recipe(epochs=1, batch_size=16), FRAMES, FRAMES, directory=folder)
    return folder


@pytest.fixture(scope="module")
def registry(run_folder: Path) -> zoo.Registry:
    """A registry in which every optional field is present: a model, its average, an ensemble and an alias."""
    registry = zoo.Registry(run_folder.parent / "registry.json")
    first = registry.register("a", run_folder / "epoch-0001.safetensors", note="small", tags=["tiny"], licence="MIT")
    registry.register("a", zoo.build(SPEC, seed=1), spec=SPEC, classes=FRAMES.classes, parents=[first.id], note="b")
    members = ensemble.load(registry, ["a@1"])
    fit = ensemble.fit_weights(ensemble.collect(members, FRAMES))
    final = ensemble.Ensemble(members, ensemble.WeightedMean(fit.weights, fit.fingerprint))
    extra = {"weights": [1.0], "temperatures": [1.0]}
    registry.register_ensemble("final", {**final.to_json(), **extra}, note="best", tags=["tiny"], licence="MIT")
    registry.alias("best", "a@1")
    registry.alias("best", "a@2")
    return registry


def test_the_page_on_formats_lists_the_fields_of_the_registry(registry: zoo.Registry) -> None:
    """Top, version and ensemble; every field stands in the file, and no other."""
    text = json.loads(registry.path.read_text(encoding="utf-8"))
    versions = text["models"]["a"]["versions"].values()
    found = {*text}.union(*versions, *text["ensembles"].values())
    assert found == fields("## The registry: `registry.json`")
    assert {key for alias in text["aliases"].values() for key in alias} == {"model", "version", "before"}


def test_the_page_on_formats_lists_the_fields_of_a_checkpoint(registry: zoo.Registry) -> None:
    """One metadata key, its fields, and those of the spec inside."""
    metadata = read_header(registry.blobs.read(registry.get("a@1"))).metadata
    assert list(metadata) == ["zoo"]
    about = json.loads(metadata["zoo"])
    assert {*about} == fields("## The checkpoint: `<digest>.safetensors`")
    assert {*about["spec"]} == fields("### The spec")


def test_the_page_on_formats_lists_the_files_of_a_run(run_folder: Path) -> None:
    """The three files, and the parts of the state."""
    listed = fields("## Run folder: `zoo train --directory`")
    files = {re.sub("0007", "0001", name) for name in listed if "." in name}
    assert {path.name for path in run_folder.iterdir()} == files
    header = read_header((run_folder / "state.safetensors").read_bytes())
    assert {*header.metadata} == {"run"}
    assert {*json.loads(header.metadata["run"])} == listed - {name for name in listed if "." in name}
    assert {name.partition(".")[0] for name in header.pieces} <= {"live", "best", "average", "optimiser", "vectors"}


def test_the_page_on_formats_lists_the_files_and_fields_of_a_store(registry: zoo.Registry, tmp_path: Path) -> None:
    """The four files, and the description whose inner fields stand in its second column."""
    ensemble.collect(ensemble.load(registry, ["a@1"]), FRAMES, cache=tmp_path)
    listed = fields("## Store of outputs: `collect(..., cache=folder)`, `ensemble collect`")
    assert {path.name for path in tmp_path.iterdir()} == {name for name in listed if "." in name}
    description = json.loads((tmp_path / "outputs.json").read_text(encoding="utf-8"))
    assert {*description} == {name for name in listed if "." not in name}
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    collected = description["collected"]["members"][0]
    for inner in (*description["contents"], *description["collected"], *collected, *collected["about"]):
        assert f"`{inner}`" in text.partition("| `contents` |")[2].partition("\n## ")[0]


def test_the_page_on_formats_lists_what_mapped_frames_hold(tmp_path: Path) -> None:
    """The arrays and the metadata of a partition's file."""
    zoo.write_corpus(FRAMES, tmp_path, "p")
    zoo.read_corpus(tmp_path, "p", classes=FRAMES.classes, mapped=True)
    header = read_header((tmp_path / "p.frames.safetensors").read_bytes())
    listed = fields("## Frames of a partition: `read_corpus(..., mapped=...)`, `--mapped FOLDER`")
    assert listed == {*header.pieces, *header.metadata}


def test_the_page_on_formats_lists_the_files_and_fields_of_a_run_in_shards(
    registry: zoo.Registry, tmp_path: Path
) -> None:
    """What any of the tasks writes is listed, and all that is listed is written by one of them."""
    members, rules, shards = ensemble.load(registry, ["a@1"]), {"mean": ensemble.mean}, ensemble.run.shards
    shards.tally(members, FRAMES, rules, folder=tmp_path / "tally")
    shards.judge(members, FRAMES, rules, most=32, folder=tmp_path / "judge")
    assert {path.name for path in (tmp_path / "judge").iterdir()} == {"outputs", "shards"}
    found, arrays = set(), set()
    for folder in (tmp_path / "tally", tmp_path / "judge" / "shards"):
        assert {path.name for path in folder.iterdir()} == {"run.json", "000000.shard"}
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert {*run} == {"about", "forms"}
        found |= {*run["about"]}
        header = read_header((folder / "000000.shard").read_bytes())
        arrays |= {re.sub(r"^sums\..*", "sums.METRIC", name) for name in (*header.pieces, *header.metadata)}
    of = json.loads(header.metadata["of"])
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text.partition("| `of` |")[2].partition("\n")[0] for name in of)
    only_outputs = {"rows", "type"}  # of `shards` in a store that several processes fill
    assert fields("## Folder of shards: `--run`") - only_outputs == found | {"run.json", "NNNNNN.shard"}
    assert fields("### Tally: `NNNNNN.shard`") == arrays


def test_the_page_on_formats_lists_the_fields_of_exported_folders(registry: zoo.Registry, tmp_path: Path) -> None:
    """A model's three files and an ensemble's, with the fields of both descriptions."""
    model, final = zoo.export(registry, "a@1", tmp_path / "model"), zoo.export(registry, "final", tmp_path / "final")
    assert {path.name for path in model.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert {path.name for path in final.iterdir()} == {"config.json", "members", "README.md"}
    found = {key for folder in (model, final) for key in json.loads((folder / "config.json").read_text("utf-8"))}
    assert found == fields("## Exported folder: `zoo export`")
