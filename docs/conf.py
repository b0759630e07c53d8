"""The site: `sphinx-build -W docs site`. Nothing here needs the network.

The reference is made from the docstrings and from each package's list of public names, so it cannot go stale. A name is
explained once: on the page of `zoo` or `ensemble` if it is shown there, else on the page of its own package.
"""

import builtins
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))

import ensemble
import zoo
from benchmarks import judging, uncertainty

project = "zoo-ensemble"
author = "the zoo-ensemble authors"
html_theme = "furo"
html_title = "zoo-ensemble"
html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
default_role = "literal"  # docstrings write `name`, as Markdown does
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are explained with their class, and once
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}

ROOT = Path(__file__).parents[1]
TOPS: dict[str, ModuleType] = {"zoo": zoo, "ensemble": ensemble}


def explained_elsewhere(package: str, name: str, thing: object) -> str:
    """The page that explains a thing in place of this package's: the top's, or that of the package which made it."""
    top, _, inner = package.partition(".")
    made_in = ".".join(str(getattr(thing, "__module__", "")).split(".")[:2])
    for page in (top, made_in) if inner else ():
        module = TOPS.get(page) or getattr(TOPS[top], page.partition(".")[2], None)
        if page != package and getattr(module, name, None) is thing:
            return page
    return ""


def skip(app: Sphinx, kind: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what another page has, and what other libraries explain; None leaves the choice to Sphinx."""
    package = app.env.current_document.docname.removeprefix("api/")
    shown = kind == "module" and explained_elsewhere(package, name.rpartition(".")[2], thing)
    made_elsewhere = getattr(thing, "__code__", None) and "sklearn" in thing.__code__.co_filename
    return True if shown or made_elsewhere else None


def add_other_names(app: Sphinx, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Name at the top of a package's page what it does not explain: constants, and what another page has."""
    if kind != "module":
        return
    things = {key: getattr(thing, key) for key in getattr(thing, "__all__", ())}
    constants = [
        f"`{key}`" for key, value in things.items() if not callable(value) and not isinstance(value, ModuleType)
    ]
    if constants:
        lines += ["", f"Constants and types: {', '.join(constants)}."]
    pages = {key: explained_elsewhere(name, key, value) for key, value in things.items()}
    for page in sorted({*pages.values()} - {""}):
        links = [f":py:obj:`{key} <{page}.{key}>`" for key in pages if pages[key] == page]
        lines += ["", f"Explained on the page of :doc:`{page}`: {', '.join(links)}."]


def leave_builtins_alone(app: Sphinx, page: nodes.document) -> None:
    """A type such as `bytes` is Python's own, whatever attributes of that name there are."""
    for link in [*page.findall(pending_xref)]:
        if link.get("reftype") == "class" and hasattr(builtins, link["reftarget"]):
            link.replace_self(link.children)


def draw(app: Sphinx) -> None:
    """Draw the pictures of the pages where one is missing; delete the folder to draw them anew."""
    folder = Path(app.srcdir) / "pictures"
    pages = "".join(page.read_text(encoding="utf-8") for page in Path(app.srcdir).glob("*.md"))
    if not all((folder / name).exists() for name in re.findall(r"\bpictures/([\w-]+\.\w+)", pages)):
        valid, test = uncertainty.collected(ROOT / "registry.json")
        uncertainty.write_pictures(folder, valid, test)
        judging.write_pictures(folder, valid, test)


def setup(app: Sphinx) -> None:
    """Connect the hooks."""
    app.connect("builder-inited", draw)
    app.connect("doctree-read", leave_builtins_alone)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", add_other_names)
