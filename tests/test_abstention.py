"""Members that abstain, declared and not; and parts of outputs."""

import math

import pytest
import torch

from ensemble import MemberOutputs

SPOKEN = {"a": [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], "b": [[0.7, 0.3], [math.nan, math.nan], [0.6, 0.4]]}


def test_abstentions_pass_where_they_are_declared() -> None:
    """A row of NaN stays one; all else is as without."""
    outputs = MemberOutputs.from_probabilities(SPOKEN, labels=[0, 1, 0], abstain=True)
    assert outputs.abstain
    assert outputs.log_probabilities.isnan().all(dim=-1).tolist() == [[False] * 3, [False, True, False]]
    blocks = list(outputs.checked_blocks(2, abstain=True))
    assert [(where.start, where.stop) for where, _ in blocks] == [(0, 2), (2, 3)]


def test_abstentions_that_are_not_declared_are_refused_by_name() -> None:
    """The message names the member, the frame and the way out."""
    with pytest.raises(ValueError, match=r"member 'b', .* at frame 1 .*if it abstains there, declare abstain=True"):
        MemberOutputs.from_probabilities(SPOKEN)


def test_half_a_row_is_no_abstention() -> None:
    """A single NaN, or a wrong sum, is refused also where members may abstain."""
    for row in ([math.nan, 0.5], [0.5, 0.4]):
        with pytest.raises(ValueError, match=r"from member 'c', .* at frame 0 .*apply softmax"):
            MemberOutputs.from_probabilities({"c": [row]}, abstain=True)


def test_walking_where_all_must_speak() -> None:
    """Blocks refuse a declared abstention too where the reader cannot do with it."""
    outputs = MemberOutputs.from_probabilities(SPOKEN, abstain=True)
    with pytest.raises(ValueError, match="from member 'b', got NaN at frame 1; use frames where no member abstains"):
        list(outputs.checked_blocks(1))


@pytest.mark.parametrize("frames", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_a_part_has_its_own_frames_and_fingerprint(frames: torch.Tensor) -> None:
    """By index in that order, or by mask; labels, groups and the declaration go along."""
    outputs = MemberOutputs.from_probabilities(SPOKEN, labels=[0, 1, 0], groups=[5, 5, 7], abstain=True)
    part = outputs.at(frames)
    assert torch.equal(part.log_probabilities, outputs.log_probabilities[:, frames])
    assert part.groups is not None
    assert part.groups.tolist() == torch.tensor([5, 5, 7])[frames].tolist()
    assert part.fingerprint != outputs.fingerprint
    assert part.abstain
    assert outputs.subset(["b"]).abstain
    assert MemberOutputs.from_probabilities({"a": SPOKEN["a"]}).at(frames).labels is None
