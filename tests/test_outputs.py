"""Members' outputs: what they refuse, and what stays with them."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ensemble
from ensemble.judge.tables import tally
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
    with pytest.raises(ValueError, match="for each of 3 classes from member 'a', got 2 columns"):
        make({"a": [[1.0, 0.0]]}, classes=["x", "y", "z"])
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
    with pytest.raises(ValueError, match=r"sum 1\.02.* were rounded, .*renormalise=True"):
        make({"a": (1.02 * logits.softmax(-1)).to(kind)})
    with pytest.raises(ValueError, match="apply softmax"):
        make({"a": logits.to(kind)})


def test_blocks_walk_over_all_frames() -> None:
    """The pieces put together are the probabilities."""
    p = torch.rand(10, 3).softmax(-1)
    outputs = ensemble.MemberOutputs.from_probabilities({"a": p, "b": p})
    pieces = list(outputs.blocks(4))
    assert [where for where, _ in pieces] == [slice(0, 4), slice(4, 8), slice(8, 10)]
    torch.testing.assert_close(torch.cat([piece for _, piece in pieces], dim=1), outputs.probabilities)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_pass_over_many_frames_needs_the_memory_of_a_few_blocks() -> None:
    """Blocks of 5 MB, between which smaller things are kept: the memory of one is used again for the next."""
    M, C, frames = 8, 40, 200_000
    rows = torch.full((M, 1, C), 1 / C).log().expand(M, frames, C)  # 256 MB if they were held
    labels, groups = torch.zeros(frames, dtype=torch.int64), torch.arange(frames) // 1000
    outputs = ensemble.MemberOutputs(rows, [*"abcdefgh"], [*map(str, range(C))], labels, groups)
    tally(outputs.at(torch.arange(9000)), {})
    before = own_memory()
    tally(outputs, {})
    assert own_memory() - before < 100e6


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


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


# Members that abstain, and parts of outputs

ABSTAINING = {"a": [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], "b": [[0.7, 0.3], [math.nan, math.nan], [0.6, 0.4]]}


def test_abstentions_pass_where_they_are_declared() -> None:
    """A row of NaN stays one; everything else is as usual."""
    outputs = ensemble.MemberOutputs.from_probabilities(ABSTAINING, labels=[0, 1, 0], abstain=True)
    assert outputs.abstain
    assert outputs.log_probabilities.isnan().all(dim=-1).tolist() == [[False] * 3, [False, True, False]]
    blocks = list(outputs.blocks(2))
    assert [(where.start, where.stop) for where, _ in blocks] == [(0, 2), (2, 3)]


def test_abstentions_that_are_not_declared_are_refused_by_name() -> None:
    """The message names the member, the frame and the way out."""
    with pytest.raises(ValueError, match=r"member 'b', .* at frame 1 .*if it abstains there, declare abstain=True"):
        ensemble.MemberOutputs.from_probabilities(ABSTAINING)


def test_part_of_a_row_is_no_abstention() -> None:
    """A single NaN, or a wrong sum, is refused also where members may abstain."""
    for row, cause in (([math.nan, 0.5], "part of a row is NaN"), ([0.5, 0.4], "renormalise=True")):
        with pytest.raises(ValueError, match=rf"from member 'c', .* at frame 0 .*{cause}"):
            ensemble.MemberOutputs.from_probabilities({"c": [row]}, abstain=True)


def test_blocks_can_refuse_declared_abstentions() -> None:
    """For a caller that cannot deal with them."""
    outputs = ensemble.MemberOutputs.from_probabilities(ABSTAINING, abstain=True)
    with pytest.raises(ValueError, match="from member 'b', got NaN at frame 1; use frames where no member abstains"):
        list(outputs.blocks(1, nan="refuse"))


@pytest.mark.parametrize("frames", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_a_part_has_its_own_frames_and_fingerprint(frames: torch.Tensor) -> None:
    """By index in that order, or by mask; labels, groups and the declaration are kept."""
    outputs = ensemble.MemberOutputs.from_probabilities(ABSTAINING, labels=[0, 1, 0], groups=[5, 5, 7], abstain=True)
    part = outputs.at(frames)
    assert torch.equal(part.log_probabilities, outputs.log_probabilities[:, frames])
    assert part.groups is not None
    assert part.groups.tolist() == torch.tensor([5, 5, 7])[frames].tolist()
    assert part.fingerprint != outputs.fingerprint
    assert part.abstain
    assert outputs.subset(["b"]).abstain
    assert ensemble.MemberOutputs.from_probabilities({"a": ABSTAINING["a"]}).at(frames).labels is None


@pytest.mark.parametrize(
    "given", [torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[0.5, 0.5]]]), torch.zeros(1, 1, 2).int()]
)
def test_what_is_no_log_probability_is_noticed_at_the_first_frame(given: torch.Tensor) -> None:
    """Logits, probabilities and integers; half precision, abstentions and certainty are all right."""
    with pytest.raises(
        ValueError, match=r"for logits take log_softmax\(-1\), for probabilities use from_probabilities"
    ):
        ensemble.MemberOutputs(given, ("a",), ("x", "y"))
    for logs in ([0.0, -math.inf], [math.nan, math.nan], [math.log(0.3), math.log(0.7)]):
        for kind in (torch.float64, torch.float16, torch.bfloat16):
            assert ensemble.MemberOutputs(torch.tensor([[logs]]).to(kind), ("a",), ("x", "y")).shape == (1, 1, 2)


@pytest.mark.parametrize(
    "function",
    sorted(
        {
            function
            for package in (ensemble, ensemble.fit, ensemble.judge, ensemble.selection, ensemble.judge.diversity)
            for function in (getattr(package, name) for name in dir(package))
            if inspect.isfunction(function)
            and function.__name__[0] != "_"
            and "(outputs: 'MemberOutputs" in str(inspect.signature(function))
        },
        key=lambda function: function.__name__,
    ),
    ids=lambda function: function.__name__,
)
def test_what_is_no_outputs_is_refused_by_name(function: Callable[..., Any]) -> None:
    """An array of probabilities, in every public function that takes the outputs of members."""
    needed = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    rest = {each.name: ensemble.mean for each in needed[1:]}
    with pytest.raises(TypeError, match=r"expected MemberOutputs, got ndarray of shape \(2, 3, 4\); .*from_probab"):
        function(np.full((2, 3, 4), 0.25), **rest)
