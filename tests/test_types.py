"""Names, digests and references; entries and snapshots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zoo.registry.types import (
    Reference,
    RegistryError,
    check_digest,
    check_name,
    parse_reference,
)

CORPUS = Path(__file__).parents[2] / "shared" / "corpus" / "registry.json"
CASES = json.loads(CORPUS.read_text()) if CORPUS.exists() else {"names": [], "digests": [], "registry_texts": []}
ID = "0123456789ab"


def answer(check, value) -> str:
    """OK, or the reason of the typed error; any other error goes on."""
    try:
        check(value)
    except RegistryError as error:
        return error.reason
    return "OK"


needs_corpus = pytest.mark.skipif(not CASES["names"], reason="the collection of inputs is not here")


names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,12}[a-z0-9])?", fullmatch=True).filter(
    lambda n: answer(check_name, n) == "OK"
)


@needs_corpus
@pytest.mark.parametrize("case", CASES["names"], ids=lambda case: case["why"])
def test_each_name_of_the_collection_gets_its_answer(case):
    """What may name a model on one system may name it on all."""
    assert answer(check_name, case["input"]) == case["required"]


@needs_corpus
@pytest.mark.parametrize("case", CASES["digests"], ids=lambda case: case["why"])
def test_each_digest_of_the_collection_gets_its_answer(case):
    """One algorithm, one spelling."""
    assert answer(check_digest, case["input"]) == case["required"]


@given(st.text(max_size=100))
@example("v1")
@example("com5.x")
@example("NONE")
def test_a_name_that_passes_is_safe_everywhere(name):
    """It is its own reference, its own file name, and ASCII."""
    if answer(check_name, name) == "OK":
        assert name.isascii()
        assert Path(name).name == name
        assert parse_reference(name) == Reference(name)


@given(names, st.integers(1, 999_999_999))
def test_references_come_apart_as_they_were_put_together(name, number):
    """Name and number, or name and id."""
    assert parse_reference(f"{name}@{number}") in (Reference(name, number=number), Reference(name, id=str(number)))
    assert parse_reference(f"{name}@{ID}") == Reference(name, id=ID)
