"""Windows against the slow obvious loop; frame sets that are refused."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo import FrameSet, windows
from zoo.data.frames import PADDINGS, prepared, stretch
from zoo.data.normalisation import NORMALISATIONS


def normalised(frames: FrameSet, name: str) -> np.ndarray:
    """Every frame with the scale and shift of its recording, one after another."""
    affine = NORMALISATIONS[name](frames.features, frames.starts)
    if affine is None:
        return frames.features.numpy()
    scale, shift = (part.expand(frames.recordings, -1).numpy() for part in affine)
    recordings = np.searchsorted(frames.starts.numpy(), np.arange(len(frames)), side="right") - 1
    return np.stack([frames.features[t].numpy() * scale[u] + shift[u] for t, u in enumerate(recordings)])


def slow_windows(frames: FrameSet, context: int, normalisation: str, padding: str) -> np.ndarray:
    """Pad each recording (or the whole) with zeros, then cut one window per frame."""
    values = normalised(frames, normalisation)
    bounds = frames.starts.tolist() if padding == "recording" else [0, len(frames)]
    rows = []
    for start, stop in pairwise(bounds):
        padded = np.pad(values[start:stop], ((context, context), (0, 0)))
        rows += [padded[t : t + 2 * context + 1].ravel() for t in range(stop - start)]
    return np.stack(rows)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("normalisation", sorted(NORMALISATIONS))
@pytest.mark.parametrize("context", [0, 1, 9, 200])
def test_windows_are_those_of_the_slow_loop(frames: FrameSet, context: int, normalisation: str, padding: str) -> None:
    """For any order of centres, by `windows` and by `stretch`, with contexts longer than a recording."""
    expected = slow_windows(frames, context, normalisation, padding)
    centres = torch.randperm(len(frames), generator=torch.Generator().manual_seed(1))
    for rows in (
        windows(frames, centres, context, normalisation, padding),
        stretch(frames, context, normalisation, padding).windows(centres),
    ):
        assert rows.dtype == torch.float32
        np.testing.assert_allclose(rows.numpy(), expected[centres], atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    context=st.integers(0, 15),
    padding=st.sampled_from(PADDINGS),
    data=st.data(),
)
def test_a_stretch_of_any_corpus_has_the_windows_of_its_frames(
    lengths: list[int], context: int, padding: str, data: st.DataObject
) -> None:
    """Wherever it starts and stops, inside a recording or at its ends."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    frames = FrameSet(torch.randn(int(starts[-1]), 2), None, starts, ("a", "b"))
    start = data.draw(st.integers(0, len(frames)))
    stop = data.draw(st.integers(start, len(frames)))
    fast = stretch(frames, context, "mean_std", padding, start=start, stop=stop).windows()
    slow = windows(frames, torch.arange(start, stop), context, "mean_std", padding)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("normalisation", sorted(NORMALISATIONS))
def test_mapped_frames_have_the_windows_of_others_to_the_bit(
    frames: FrameSet, normalisation: str, padding: str
) -> None:
    """For frames in any order, and for slices that begin and end within recordings."""
    every, mapped = (prepared(each, 9, normalisation, padding) for each in (frames, replace(frames, mapped=True)))
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(1))
    for which in (order, slice(0, 50), slice(50, 131), slice(131, 500), order[:0]):
        assert torch.equal(mapped(which), every(which))
    with pytest.raises(ValueError, match="unknown padding"):
        prepared(replace(frames, mapped=True), 9, normalisation, "zeros")


def test_the_windows_of_a_stretch_share_its_memory(frames: FrameSet) -> None:
    """The view of all windows points into the rows: no window is copied."""
    piece = stretch(frames, 3)
    assert piece.view.data_ptr() == piece.rows.data_ptr()
    assert len(piece.rows) == len(frames) + 3 * (frames.recordings + 1)


def test_the_fingerprint_changes_with_everything_that_is_judged(frames: FrameSet) -> None:
    """A feature, a label, the end of a recording, a class name; but not the names of recordings."""
    features, labels, starts = frames.features.clone(), frames.labels.clone(), frames.starts.clone()
    features[3, 2] += 1
    labels[5] = (labels[5] + 1) % 4
    starts[2] -= 1
    starts[1] -= 1
    others = [
        FrameSet(features, frames.labels, frames.starts, frames.classes),
        FrameSet(frames.features, labels, frames.starts, frames.classes),
        FrameSet(frames.features, None, frames.starts, frames.classes),
        FrameSet(frames.features, frames.labels, starts, frames.classes),
        FrameSet(frames.features, frames.labels, frames.starts, ("a", "b", "c", "e")),
    ]
    assert len({frames.fingerprint, *(other.fingerprint for other in others)}) == 6
    renamed = FrameSet(frames.features, frames.labels, frames.starts, frames.classes, tuple("vwxyz"))
    assert renamed.fingerprint == frames.fingerprint


def test_selected_recordings_keep_their_frames_and_names(frames: FrameSet) -> None:
    """Recordings 4 and 1, in that order."""
    some = frames.select(torch.tensor([4, 1]))
    assert some.names == ("4", "1")
    assert some.starts.tolist() == [0, 30, 31]
    assert torch.equal(some.features, frames.features[[*range(108, 138), 40]])
    assert some.groups.tolist() == [0] * 30 + [1]
    with pytest.raises(ValueError, match="at least one frame"):
        frames.select(torch.arange(0))


def test_neighbouring_recordings_share_the_memory(frames: FrameSet) -> None:
    """A shard of mapped frames is mapped; others are copied."""
    mapped = replace(frames, mapped=True)
    shard, copy = mapped.select(torch.arange(1, 4)), mapped.select(torch.tensor([1, 3]))
    assert shard.features.data_ptr() == frames.features[40].data_ptr()
    assert torch.equal(shard.features, frames.features[40:108])
    assert shard.starts.tolist() == [0, *(frames.starts[2:5] - 40).tolist()]
    assert (shard.names, shard.mapped, copy.mapped) == (("1", "2", "3"), True, False)
    assert copy.features.data_ptr() != frames.features[40].data_ptr()


def frame_set(**changes: object) -> FrameSet:
    """Three frames with some part replaced."""
    parts: dict[str, object] = {
        "features": torch.zeros(3, 2),
        "labels": torch.tensor([0, 1, 0]),
        "starts": torch.tensor([0, 2, 3]),
        "classes": ("a", "b"),
    }
    return FrameSet(**{**parts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": torch.zeros(3, 2, dtype=torch.float64)}, r"\(T, F\) float32"),
        ({"features": torch.zeros(6)}, r"\(T, F\) float32"),
        ({"features": torch.tensor([[0.0, 0], [0, torch.nan], [0, 0]])}, "NaN or infinity at frame 1"),
        ({"labels": torch.tensor([0, 1])}, r"labels \(3,\) int64"),
        ({"labels": torch.tensor([0, 2, 0])}, "labels from 0 to 1, got 0 to 2"),
        ({"starts": torch.tensor([0, 3, 3])}, "starts .* rising from 0 to 3"),
        ({"starts": torch.tensor([0, 2])}, "starts .* rising from 0 to 3"),
        ({"starts": torch.tensor([1, 3])}, "starts .* rising from 0 to 3"),
        ({"names": ("one",)}, "expected 2 recording names, got 1"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes: dict[str, object], words: str) -> None:
    """A frame set is complete and consistent once it is made."""
    with pytest.raises(ValueError, match=words):
        frame_set(**changes)


def test_impossible_windows_are_refused(frames: FrameSet) -> None:
    """Unknown names, negative contexts, centres and bounds outside."""
    some = torch.tensor([0])
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        windows(frames, some, 1, "meen")
    with pytest.raises(ValueError, match="unknown padding"):
        windows(frames, some, 1, "mean", "zeros")
    with pytest.raises(ValueError, match="context of at least 0"):
        windows(frames, some, -1)
    with pytest.raises(IndexError, match="centres from 0 to 137, got 138"):
        windows(frames, torch.tensor([138]), 1)
    with pytest.raises(ValueError, match="stretch within 0 to 138"):
        stretch(frames, 1, start=5, stop=200)


def test_no_centres_give_no_windows(frames: FrameSet) -> None:
    """An empty batch keeps its width."""
    none: Tensor = torch.arange(0)
    assert windows(frames, none, 2).shape == (0, 30)
    assert stretch(frames, 2, start=4, stop=4).windows().shape == (0, 30)


def test_frames_without_labels_need_no_classes() -> None:
    """Features alone are a frame set; an index of a class is only checked where there are labels."""
    assert FrameSet(torch.zeros(3, 2), None, torch.tensor([0, 3]), ()).labels is None


def most_allocated(work: Callable[[], object]) -> int:
    """The largest piece of memory, in bytes, that torch allocates in this call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        work()
    return max(event.cpu_memory_usage for event in profiled.events())


def test_checking_the_features_needs_no_memory_of_their_size() -> None:
    """A corpus just fits into memory: not even a mask of it is made."""
    features, starts = torch.zeros(10_000, 20), torch.tensor([0, 10_000])
    assert most_allocated(lambda: FrameSet(features, None, starts, ("a", "b"))) < 1000


OWN = sorted(name for name, each in NORMALISATIONS.items() if each.__module__ == "zoo.data.normalisation")


@pytest.mark.parametrize("normalisation", OWN)  # a user's function sees all features at once, and may copy them
def test_nothing_of_the_size_of_mapped_frames_is_made(normalisation: str) -> None:
    """Neither for statistics over all of them, nor for windows, nor for the fingerprint."""
    starts = torch.arange(0, 200_001, 50_000)
    frames = FrameSet(torch.zeros(200_000, 40), None, starts, (), mapped=True)

    def work() -> object:
        made = prepared(frames, 1, normalisation)
        return made(slice(0, 100)), made(torch.arange(100)), frames.fingerprint

    assert most_allocated(work) < 0.7 * frames.features.nbytes  # a block in float64
