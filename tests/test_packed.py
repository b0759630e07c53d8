"""Members' outputs as bytes and back."""

from pathlib import Path

import pytest
import torch

from ensemble import MemberOutputs
from ensemble.outputs.packed import pack, speakers, unpack

OUTPUTS = MemberOutputs.from_probabilities(
    {"a": [[0.9, 0.1], [0.2, 0.8]], "é": [[0.5, 0.5], [0.4, 0.6]]},
    labels=["yes", "no"],
    classes=["no", "yes"],
    groups=[3, 5],
)


def test_what_was_packed_is_unpacked() -> None:
    """Every field, and equal outputs give equal bytes."""
    again = unpack(pack(OUTPUTS))
    assert torch.equal(again.log_probabilities, OUTPUTS.log_probabilities)
    assert torch.equal(again.labels, OUTPUTS.labels)
    assert torch.equal(again.groups, OUTPUTS.groups)
    assert (again.members, again.classes, again.fingerprint) == (OUTPUTS.members, OUTPUTS.classes, OUTPUTS.fingerprint)
    assert pack(again) == pack(OUTPUTS)


def test_declared_abstentions_stay_declared() -> None:
    """And outputs packed before there were any say nothing of them."""
    silent = MemberOutputs.from_probabilities({"a": [[0.5, 0.5], [torch.nan, torch.nan]]}, abstain=True)
    again = unpack(pack(silent))
    assert again.abstain
    assert torch.equal(again.log_probabilities.isnan(), silent.log_probabilities.isnan())
    assert not unpack(pack(OUTPUTS)).abstain


def test_outputs_without_labels_stay_without() -> None:
    """None is not an empty tensor."""
    silent = MemberOutputs(OUTPUTS.log_probabilities, OUTPUTS.members, OUTPUTS.classes)
    assert unpack(pack(silent)).labels is None


@pytest.mark.parametrize("data", [b"", b"hello, world", pack(OUTPUTS)[:-5], bytes(64)])
def test_other_bytes_are_refused(data: bytes) -> None:
    """Nothing but what `pack` wrote."""
    with pytest.raises(ValueError, match="expected members' outputs as written by"):
        unpack(data)


def test_who_spoke_is_read_from_the_head_alone(tmp_path: Path) -> None:
    """References by member, "" where none was given; another file is refused."""
    file = tmp_path / "valid.safetensors"
    file.write_bytes(pack(OUTPUTS, {"a": "a@0123456789ab"})[:-5])
    assert speakers(file) == {"a": "a@0123456789ab", "é": ""}
    file.write_bytes(b"hello, world")
    with pytest.raises(ValueError, match="expected members' outputs as written by"):
        speakers(file)
