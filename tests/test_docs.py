"""The pages in `docs/` are complete and true; `.ci/run` builds the site of them."""

import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import ensemble
import zoo

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
