"""Collecting: from members and frames, inputs or batches to outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ensemble
import zoo
from zoo.logs import Advance

CLASSES = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the plans of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def members() -> ensemble.Members:
    """Two models over windows of 5 frames of 6 features."""
    spec = zoo.Spec("cylinder", features=6, context=2, classes=4, options={"width": 8})
    modules = {name: zoo.build(spec, seed=seed).eval() for seed, name in enumerate("ab")}
    return ensemble.from_modules(modules, classes=CLASSES, specs=dict.fromkeys(modules, spec))


def alone(members: ensemble.Members, x: Tensor) -> Tensor:
    """The slow obvious way: (M, B, C) probabilities, one model after the other."""
    with torch.inference_mode():
        return torch.stack([member.module(x) for member in members]).softmax(-1)


def test_batches_from_a_loader(members: ensemble.Members) -> None:
    """Pairs carry labels, bare inputs do not; the order is the loader's."""
    x, y = torch.randn(11, 30), torch.randint(0, 4, (11,))
    outputs = ensemble.collect(members, DataLoader(TensorDataset(x, y), batch_size=4))
    torch.testing.assert_close(outputs.probabilities, alone(members, x), rtol=0, atol=1e-5)
    assert torch.equal(outputs.require_labels(), y)
    assert ensemble.collect(members, [x]).labels is None
    assert ensemble.collect(members, []).shape == (2, 0, 4)
    with pytest.raises(ValueError, match="batches, which have no fingerprint"):
        ensemble.collect(members, [x], cache="anywhere")
    with pytest.raises(TypeError, match="as tensors, got str"):
        ensemble.collect(members, ["x"])


def test_nan_is_refused_by_name(members: ensemble.Members, frames: zoo.FrameSet) -> None:
    """A member whose weights are broken is named, with a frame; also piece by piece."""
    modules = {member.name: member.module for member in members}
    with torch.no_grad():
        list(modules["b"].parameters())[-1].fill_(torch.nan)
    specs = {member.name: member.spec for member in members}
    broken = ensemble.from_modules(modules, classes=CLASSES, specs=specs, plan="loop")
    with pytest.raises(ValueError, match="from member 'b', got NaN at frame 0"):
        ensemble.collect(broken, frames)
    with pytest.raises(ValueError, match="from member 'b', got NaN at frame 0"):
        next(ensemble.run.predictions(broken, frames))


class Recorder(nn.Module):
    """Remembers the largest batch that it has seen."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) -> the same."""
        self.seen = max(self.seen, len(x))
        return x


def test_memory_is_bounded_by_the_step() -> None:
    """However many inputs come, no model ever sees more than a step of them at once."""
    module = Recorder()
    members = ensemble.from_modules({"r": module}, classes=CLASSES, plan="loop")
    ensemble.collect(members, torch.zeros(3 * members.step + 1, 4))
    assert 0 < module.seen <= members.step


def test_progress_is_reported(members: ensemble.Members, frames: zoo.FrameSet, tmp_path: Path) -> None:
    """Frame by frame in memory, shard by shard into a store; all of them in the end."""
    shown: list[tuple[str, float | None]] = []
    done: list[float] = []

    @contextmanager
    def progress(title: str, total: float | None = None) -> Iterator[Advance]:
        shown.append((title, total))
        yield lambda steps=1, note="": done.append(steps)

    ensemble.collect(members, frames, progress=progress)
    assert (shown, sum(done)) == ([("frames", 138)], 138)
    ensemble.collect(members, frames, cache=tmp_path / "store", progress=progress)
    assert (shown[1:], sum(done)) == ([("shards", 1)], 139)
