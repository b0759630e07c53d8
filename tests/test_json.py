"""Strict JSON: one text per value, and every ambiguous text refused for its reason."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo import CheckpointError, RegistryError
from zoo._json import RefusalError, TextError, canonical, depth, parse_integers, parse_strictly
from zoo.signature import SignatureError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # halves of surrogate pairs are refused
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_json_there_and_back_is_the_same(value: object) -> None:
    """One text per value, and that text gives the value."""
    text = canonical(value)
    assert parse_strictly(text) == value
    assert canonical(parse_strictly(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1,]", "SYNTAX"),
        ("\ufeff[]", "SYNTAX"),
        ("[" * 100_000, "DEPTH"),
        ('{"a":1,"\\u0061":2}', "DUPLICATE_KEY"),
        ("[1e400]", "NUMBER_RANGE"),
        ("[NaN]", "NUMBER_RANGE"),
        ("[9223372036854775808]", "NUMBER_RANGE"),
        ("[" + "9" * 5000 + "]", "NUMBER_RANGE"),
    ],
)
def test_what_two_readers_may_read_differently_is_refused(text: str, reason: str) -> None:
    """By one word that tells the kind."""
    with pytest.raises(TextError, match=r".") as refused:
        parse_strictly(text)
    assert refused.value.reason == reason


@pytest.mark.parametrize("text", ["[1.0]", "[-0]", "[1e2]"])
def test_where_integers_are_expected_no_other_number_passes(text: str) -> None:
    """Not even minus zero, which some readers take for a float."""
    with pytest.raises(TextError, match="integers only"):
        parse_integers(text)
    assert parse_integers("[0,-1]") == [0, -1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": "\ud800"}])
def test_what_no_text_can_hold_is_never_written(value: object) -> None:
    """Numbers that are not finite, and half of a surrogate pair."""
    with pytest.raises(ValueError, match=r"JSON compliant|surrogate pair"):
        canonical(value)


@pytest.mark.parametrize("kind", [TextError, CheckpointError, RegistryError, SignatureError])
def test_a_refusal_reaches_another_process_as_it_is(kind: type[RefusalError]) -> None:
    """Copies are made as processes hand exceptions on; what is added to the message stands around it."""
    error = kind("DISK", "it is full")
    for one, message in ((copy.copy(error), "it is full"), (error.about("a@1", "; stop"), "a@1: it is full; stop")):
        assert (type(one), one.reason, one.message) == (kind, "DISK", message)
        assert str(one).removesuffix(" [DISK]") == message


def test_depth_counts_levels() -> None:
    """Up to one more than asked for, however deep the value is."""
    deep: object = 1
    for _ in range(1000):
        deep = [deep]
    assert (depth(1), depth([]), depth({"a": [[]]}), depth(deep, most=3)) == (0, 1, 3, 4)
