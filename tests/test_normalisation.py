"""Every normalisation against NumPy in float64, the laws of the table, and one of the user's own."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from zoo import FrameSet, windows
from zoo.data import normalisation as module
from zoo.data.normalisation import NORMALISATIONS, Affine, normalisation


def by_numpy(frames: FrameSet) -> dict[str, np.ndarray]:
    """Every recording normalised separately."""
    whole = frames.features.double().numpy()
    pieces = np.split(whole, frames.starts[1:-1].numpy())
    return {
        "none": whole,
        "mean": np.concatenate([p - p.mean(0) for p in pieces]),
        "mean_std": np.concatenate([(p - p.mean(0)) / np.where(p.std(0) > 0, p.std(0), 1) for p in pieces]),
        "z_score": (whole - whole.mean(0)) / whole.std(0),
        "min_max": (whole - whole.min(0)) / (whole.max(0) - whole.min(0)),
    }


@pytest.mark.parametrize("name", ["none", "mean", "mean_std", "z_score", "min_max"])
def test_a_normalisation_is_that_of_numpy(frames: FrameSet, name: str) -> None:
    """Applied to every frame, over recordings of several lengths, one of a single frame."""
    rows = windows(frames, torch.arange(len(frames)), 0, name).numpy()
    np.testing.assert_allclose(rows, by_numpy(frames)[name], atol=2e-5)


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_a_normalisation_gives_a_finite_scale_and_shift_in_float32(frames: FrameSet, name: str) -> None:
    """One row for each recording, or one for all; or None."""
    affine = NORMALISATIONS[name](frames.features, frames.starts)
    for part in affine or ():
        assert part.dtype == torch.float32
        assert part.shape in ((frames.recordings, 6), (1, 6))
        assert part.isfinite().all()
    assert frames.affine(name) is frames.affine(name)


def test_a_constant_feature_becomes_zero_and_not_nan() -> None:
    """Also where its mean cannot be held exactly in float32."""
    features = torch.full((50, 2), 0.1)
    features[:, 1] = torch.randn(50)
    frames = FrameSet(features, None, torch.tensor([0, 50]), ("a", "b"))
    for name in ("mean_std", "z_score", "min_max"):
        rows = windows(frames, torch.arange(50), 0, name)
        assert rows.isfinite().all()
        assert rows[:, 0].abs().max() < 1e-6


@pytest.mark.parametrize("block", [1, 7, 49, 50, 65_536])
def test_statistics_are_the_same_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means far from zero included; the last block may have one frame."""
    monkeypatch.setattr(module, "_BLOCK", block)
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1e-3, 1e3]) + 1000
    scale, shift = NORMALISATIONS["z_score"](features, torch.tensor([0, 20, 50]))
    wide = features.double().numpy()
    np.testing.assert_allclose(scale[0], 1 / wide.std(0), rtol=1e-6)
    np.testing.assert_allclose(shift[0], -wide.mean(0) / wide.std(0), rtol=1e-6)


MAGNITUDES = [10.0**exponent for exponent in (-45, -42, -40, -39, -38, -37, -30, 0, 30, 37)]


@pytest.mark.parametrize("name", [*NORMALISATIONS, "peak"])
def test_finite_features_have_finite_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any magnitude down to the smallest, constant or not, alone or around another value."""
    monkeypatch.setitem(NORMALISATIONS, "peak", peak)
    noise = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    columns = [noise * size for size in MAGNITUDES] + [noise * size + 1 for size in MAGNITUDES]
    columns += [torch.full((40, 1), value) for value in (0.0, 1e-41, 0.1, -1e38)]
    columns.append(torch.eye(40)[:, :1] * 1e-39)  # all zero but one
    features = torch.cat(columns, dim=1)
    frames = FrameSet(features, None, torch.tensor([0, 1, 25, 40]), ("a", "b"))  # in the first, all are constant
    for rows in (windows(frames, torch.arange(40), 1, name), zoo.data.stretch(frames, 1, name).windows()):
        assert rows.isfinite().all()
        if name in ("mean_std", "z_score", "min_max"):
            assert not rows[3:20, 25:][:, :4].any(), "features near 1e-39 are constant"


def peak(features: Tensor, starts: Tensor) -> Affine:
    """Divide by the largest magnitude, as CONTRIBUTING.md shows it: 1 / 0 for a feature that is always zero."""
    scale = 1 / features.abs().amax(dim=0, keepdim=True)
    return scale, torch.zeros_like(scale)


ANSWERS: dict[str, object] = {
    "no tensors": (1.0, 0.0),
    "one tensor": torch.ones(1, 6),
    "float64": (torch.ones(1, 6, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)),
    "scale and shift of different sizes": (torch.ones(1, 6), torch.zeros(5, 6)),
    "a row too many": (torch.ones(6, 6), torch.zeros(6, 6)),
    "a number per frame": (torch.ones(138, 6), torch.zeros(138, 6)),
    "a number per feature": (torch.ones(6), torch.zeros(6)),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_normalisation_that_answers_with_something_else_is_refused(
    frames: FrameSet, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    """Broadcast, it would scale by the numbers of another recording."""
    monkeypatch.setitem(NORMALISATIONS, "odd", named("odd", lambda features, starts: answer))
    with pytest.raises(ValueError, match=r"normalisation 'odd' a scale and a shift, both float32 \(1, 6\) or \(5, 6\)"):
        windows(frames, torch.arange(3), 1, "odd")


def test_a_scale_that_is_not_finite_is_refused_for_a_feature_that_varies(
    frames: FrameSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no constant, so zero in its place would hide a mistake; the message says which feature."""
    scale = torch.ones(5, 6)
    scale[2, 3] = torch.nan
    monkeypatch.setitem(NORMALISATIONS, "odd", named("odd", lambda features, starts: (scale, scale * 0)))
    with pytest.raises(ValueError, match="'odd', got nan and nan for feature 3 of the frames 41 to 100, which varies"):
        frames.affine("odd")


def named(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """The function with that name."""
    function.__name__ = name
    return function


def test_a_normalisation_of_ones_own_is_one_function(monkeypatch: pytest.MonkeyPatch, frames: FrameSet) -> None:
    """Its name goes into a spec, and windows and stretches apply it; a name of another module's is refused."""
    monkeypatch.setitem(NORMALISATIONS, "peak", NORMALISATIONS["none"])  # taken away again after the test
    monkeypatch.delitem(NORMALISATIONS, "peak")

    @normalisation
    def peak(features: Tensor, starts: Tensor) -> Affine:
        """Divide by the greatest magnitude."""
        scale = 1 / features.abs().amax(dim=0, keepdim=True)
        return scale, torch.zeros_like(scale)

    def mean(features: Tensor, starts: Tensor) -> None:
        """The name of another one."""

    with pytest.raises(ValueError, match=r"'mean' is already registered by zoo\.data\.normalisation\.mean; choose"):
        normalisation(mean)
    spec = zoo.Spec("mlp", features=6, context=1, classes=4, normalisation="peak")
    expected = frames.features / frames.features.abs().amax(dim=0)
    for rows in (
        windows(frames, torch.arange(len(frames)), 1, spec.normalisation),
        zoo.data.stretch(frames, 1, spec.normalisation).windows(),
    ):
        torch.testing.assert_close(rows[:, 6:12], expected)


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_windows_and_stretches_apply_a_normalisation_to_every_frame(frames: FrameSet, name: str) -> None:
    """`features * scale + shift` of the frame's recording, or of all."""
    affine = NORMALISATIONS[name](frames.features, frames.starts) or (torch.ones(1, 6), torch.zeros(1, 6))
    scale, shift = (part.expand(frames.recordings, 6)[frames.groups] for part in affine)
    centres = torch.arange(len(frames))
    for rows in (windows(frames, centres, 0, name), zoo.data.stretch(frames, 0, name).windows()):
        torch.testing.assert_close(rows, frames.features * scale + shift, rtol=0, atol=1e-5)


def test_a_normalisation_of_a_users_module_obeys_the_laws_of_the_others(
    frames: FrameSet, own: Callable[..., str]
) -> None:
    """One row for each recording: finite, in float32, and applied to the frames of that recording."""
    source = (
        "from zoo.data.normalisation import normalisation\n\n\n@normalisation\n"
        "def first_frame(features, starts):\n"
        "    first = features[starts[:-1]]\n    return first * 0 + 1, -first\n"
    )
    name = own(NORMALISATIONS, "first_frame", source)
    test_a_normalisation_gives_a_finite_scale_and_shift_in_float32(frames, name)
    test_windows_and_stretches_apply_a_normalisation_to_every_frame(frames, name)
    assert not windows(frames, frames.starts[:-1], 0, name).any()
    assert zoo.Spec.from_dict(zoo.Spec("mlp", 6, 1, 4, normalisation=name).to_dict()).normalisation == name


def test_windows_leave_the_raw_features_as_they_were(frames: FrameSet) -> None:
    """Frames are normalised in a copy, whatever the normalisation."""
    before = frames.features.clone()
    for name in NORMALISATIONS:
        windows(frames, torch.arange(len(frames)), 2, name, "corpus")
        zoo.data.stretch(frames, 2, name)
    assert torch.equal(frames.features, before)
