"""The frames that a report keeps: from every recording its share, the same whatever the order and the parts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ensemble
from ensemble.judge import excerpt
from ensemble.judge.excerpt import sampling_keys
from ensemble.judge.tables import tally


def outputs(groups, *, members=2, classes=3):
    """Random outputs with labels; the log-probabilities of a frame tell which frame it is."""
    generator = torch.Generator().manual_seed(len(groups))
    logs = torch.randn(members, len(groups), classes, generator=generator).log_softmax(-1)
    labels = torch.randint(classes, (len(groups),), generator=generator)
    names = tuple(f"m{i}" for i in range(members))
    return ensemble.MemberOutputs(logs, names, tuple("abc"[:classes]), labels=labels, groups=torch.as_tensor(groups))


lengths = st.dictionaries(st.integers(0, 2**40), st.integers(1, 40), min_size=1, max_size=12)


@given(lengths, st.integers(1, 200))
def test_each_recording_gives_its_share_to_the_frame(sizes, wanted):
    """Of n frames in N, K n / N rounded up or down, at any size K of the sample that no tie decides."""
    groups = np.repeat(list(sizes), list(sizes.values()))
    keys = sampling_keys(groups)
    assert ((keys > 0) & (keys < 1)).all()
    threshold = np.sort(keys)[min(wanted, len(keys)) - 1]
    for number, size in sizes.items():
        taken = int((keys[groups == number] <= threshold).sum())
        assert threshold * size - 1 <= taken <= threshold * size + 1


@given(lengths, st.randoms())
def test_keys_do_not_depend_on_order_or_parts(sizes, random):
    """Recordings in another order, interleaved, or one at a time: a frame keeps its key."""
    groups = np.repeat(list(sizes), list(sizes.values()))
    keys = sampling_keys(groups)
    mixed = groups.tolist()
    random.shuffle(mixed)
    mixed, found = np.array(mixed), sampling_keys(np.array(mixed))
    for number in sizes:
        own = keys[groups == number]
        assert np.array_equal(own, sampling_keys(groups[groups == number]))
        assert np.array_equal(own, found[mixed == number])


def test_frames_of_the_sample_are_scattered_over_a_recording():
    """Not its first ones, nor every third: positions of a half are spread as random ones are."""
    keys = sampling_keys(np.zeros(1000, dtype=np.int64))
    places = np.sort(np.argsort(keys)[:500])
    assert 450 < places.mean() < 550
    assert 3 <= len(set(np.diff(places).tolist())) < 20


def test_a_sample_of_everything_is_everything():
    """Few frames are all kept, in their order, with what every rule makes of them."""
    every = outputs([5, 5, 9, 9, 9])
    kept = tally(every, {"mean": ensemble.mean}).excerpts[0]
    assert torch.allclose(kept.outputs.log_probabilities, every.log_probabilities, rtol=0, atol=0.0002)
    assert torch.equal(kept.outputs.labels, every.labels)
    assert torch.allclose(kept.rules["mean"], every.probabilities.mean(dim=0))


@pytest.mark.parametrize(("members", "frames"), [(2, 2500), (32, 2048), (200, 500)])
def test_the_sample_is_smaller_for_more_members(members, frames):
    """A page holds frames times members."""
    kept = tally(outputs(np.arange(4000) // 10, members=members), {}).excerpts[0]
    assert kept.outputs.shape == (members, frames, 3)


def test_the_first_of_a_sample_are_a_sample() -> None:
    """Of each recording its share to the frame, in the order that they had."""
    kept = tally(outputs(np.arange(4000) // 100), {"mean": ensemble.mean}).excerpts[0].first(400)
    assert kept.outputs.shape[1] == len(kept.keys) == len(kept.rules["mean"]) == 400
    assert (np.abs(kept.recordings[2] - 10) <= 1).all()
    assert (np.diff(kept.outputs.groups) >= 0).all()
    assert torch.allclose(kept.rules["mean"], kept.outputs.probabilities.mean(dim=0), atol=1e-4)


def test_recordings_are_whole_and_few():
    """Every frame of each, in time, until 1,600 frames; the same ones in whatever order they come."""
    groups = np.repeat(np.arange(30), 200)
    every = outputs(groups)
    kept = tally(every, {}).excerpts[1].outputs
    assert np.unique(kept.groups, return_counts=True)[1].tolist() == [200] * 8
    order = torch.from_numpy(np.argsort(groups % 7, kind="stable"))
    again = tally(every.at(order), {}).excerpts[1].outputs
    assert torch.equal(again.log_probabilities, kept.log_probabilities)


def test_one_long_recording_is_cut_and_single_frames_are_left_out():
    """At least something of the first recording; nothing where frames have no recordings."""
    assert tally(outputs([4] * 2000), {}).excerpts[1].outputs.shape[1] == 1600
    assert tally(outputs(np.arange(50)), {}).excerpts[1].outputs.shape[1] == 0
    assert tally(outputs(np.arange(0)), {}).excerpts[1].outputs.shape[1] == 0


@given(st.lists(st.floats(-40, 0), min_size=1))
def test_codes_round_to_the_nearest_and_what_they_hold_is_kept(values):
    """Within the steps that are promised; coding what was decoded, in float32 too, changes nothing."""
    logs = np.array(values)
    codes = excerpt.encode(logs)
    found = excerpt.decode(codes)
    known = logs > np.log(2.0**-52)
    assert (np.abs(found - logs)[known] <= 0.00002 + 0.00004 * -logs[known]).all()
    assert (codes[logs < -36.1] == excerpt.ZERO).all()
    assert np.array_equal(excerpt.encode(found.astype(np.float32).astype(np.float64)), codes)
    assert (np.diff(codes[np.argsort(-logs)].astype(int)) >= 0).all()


def test_abstentions_and_zeros_have_codes_of_their_own():
    """NaN comes back as NaN, minus infinity as such."""
    logs = np.array([np.nan, -np.inf, 0.0])
    assert excerpt.encode(logs).tolist() == [excerpt.ABSENT, excerpt.ZERO, 0]
    assert np.array_equal(excerpt.decode(excerpt.encode(logs)), logs, equal_nan=True)
