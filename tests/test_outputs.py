"""Members' outputs: what they refuse, and what stays with them."""

import dataclasses

import pytest
import torch

import ensemble
from ensemble.outputs import About


def test_outputs_are_checked_when_made() -> None:
    """Rows that do not sum to one, repeated names and labels that do not fit are refused."""
    make = ensemble.MemberOutputs.from_probabilities
    with pytest.raises(ValueError, match=r"sum to one from member 'a', got a row with sum 1.2"):
        make({"a": [[0.6, 0.6]]})
    with pytest.raises(ValueError, match=r"one shape from all members, got .* from 'a' and .* from 'b'"):
        make({"a": [[1.0, 0.0]], "b": [[1.0, 0.0, 0.0]]})
    with pytest.raises(ValueError, match="labels from 0 to 1, got 2 to 2"):
        make({"a": [[1.0, 0.0]]}, labels=[2])
    with pytest.raises(ValueError, match=r"labels of shape \(1,\)"):
        make({"a": [[1.0, 0.0]]}, labels=[0, 1])
    with pytest.raises(ValueError, match=r"distinct class names, got \['x'\]"):
        make({"a": [[1.0, 0.0]]}, classes=["x", "x"])
    with pytest.raises(ValueError, match="at least one member"):
        make({})


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8])
def test_labels_and_groups_are_of_any_integer_type(kind: torch.dtype) -> None:
    """Also small unsigned ones; their values are still checked."""
    make = ensemble.MemberOutputs.from_probabilities
    numbers = torch.tensor([1, 0]).to(kind)
    outputs = make({"a": [[0.5, 0.5], [1.0, 0.0]]}, labels=numbers, groups=numbers.numpy())
    assert outputs.require_labels().tolist() == [1, 0]
    assert outputs.groups is not None
    assert outputs.groups.tolist() == [1, 0]
    with pytest.raises(ValueError, match="labels from 0 to 1, got 3 to 3"):
        make({"a": [[1.0, 0.0]]}, labels=torch.tensor([3]).to(kind))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_are_as_right_as_their_type(kind: torch.dtype) -> None:
    """What rounding takes from the sum is restored; logits are still refused."""
    logits = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    make = ensemble.MemberOutputs.from_probabilities
    outputs = make({"a": logits.to(kind).softmax(-1)}, labels=[0] * 200)
    torch.testing.assert_close(outputs.probabilities.sum(-1), torch.ones(1, 200), rtol=0, atol=1e-6)
    ensemble.evaluate(outputs, {"mean": ensemble.mean})
    with pytest.raises(ValueError, match="apply softmax"):
        make({"a": (1.02 * logits.softmax(-1)).to(kind)})


def test_blocks_walk_over_all_frames() -> None:
    """The pieces put together are the probabilities."""
    p = torch.rand(10, 3).softmax(-1)
    outputs = ensemble.MemberOutputs.from_probabilities({"a": p, "b": p})
    pieces = list(outputs.blocks(4))
    assert [where for where, _ in pieces] == [slice(0, 4), slice(4, 8), slice(8, 10)]
    torch.testing.assert_close(torch.cat([piece for _, piece in pieces], dim=1), outputs.probabilities)


@pytest.mark.parametrize("array", [torch.full((2, 5, 4), 0.25).numpy(), torch.full((2, 5, 4), 0.25)])
def test_one_array_of_all_members_is_answered_with_how_to_name_them(array: object) -> None:
    """A report needs the members' names."""
    with pytest.raises(TypeError, match=r"member name to \(N, C\) probabilities, got .* of shape .*\[?2, 5, 4.*; give"):
        ensemble.MemberOutputs.from_probabilities(array)  # type: ignore[arg-type]  # that is the mistake


def test_what_is_known_of_members_stays_with_them() -> None:
    """By name when made, unknown where nothing is given; kept for other frames, and with its member in a subset."""
    p, known = [[0.9, 0.1], [0.2, 0.8]], About(parameters=7, trained_on="f" * 64, reference="b@012345678901")
    outputs = ensemble.MemberOutputs.from_probabilities({"a": p, "b": p}, about={"b": known})
    assert outputs.about == (About(), known)
    assert outputs.parameters == {"b": 7}
    assert outputs.at(torch.tensor([1])).about == outputs.about
    assert outputs.subset(["b", "a"]).about == (known, About())
    with pytest.raises(ValueError, match=r"only members \['a', 'b'\] in `about`, got \['c'\]"):
        ensemble.MemberOutputs.from_probabilities({"a": p, "b": p}, about={"c": known})
    with pytest.raises(ValueError, match="what is known of 2 members in `about`, got 1"):
        dataclasses.replace(outputs, about=(known,))
