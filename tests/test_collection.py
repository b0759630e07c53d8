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

pytestmark = pytest.mark.usefixtures("own_cache")

CLASSES = ("a", "b", "c", "d")


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
    with pytest.raises(TypeError, match="as tensors, arrays or tables, got str"):
        ensemble.collect(members, ["x"])


@pytest.mark.parametrize("kind", [tuple, list])
def test_batches_of_one_or_two_parts(kind: type, members: ensemble.Members) -> None:
    """(x,) is x and (x, y) has labels, as a loader gives them; of any other batch it is said what was expected."""
    x, y = torch.randn(5, 30), torch.randint(0, 4, (5,))
    expected = ensemble.collect(members, [x]).probabilities
    assert torch.equal(ensemble.collect(members, [kind((x,))]).probabilities, expected)
    assert torch.equal(ensemble.collect(members, DataLoader(TensorDataset(x), batch_size=5)).probabilities, expected)
    assert torch.equal(ensemble.collect(members, [kind((x, y))]).require_labels(), y)
    wanted = r"expected batches of inputs, or of \(inputs,\) or \(inputs, labels\), as tensors, arrays or tables, got"
    for batch, came in (
        (kind((x, y, torch.ones(5))), rf"a {kind.__name__} of 3 \(Tensor, Tensor, Tensor\) as batch 0"),
        (kind(()), rf"a {kind.__name__} of 0 \(\) as batch 0"),
        ({"x": x, "y": y}, r"a dict with \['x', 'y'\] as batch 0"),
        (kind(("x", y)), rf"a {kind.__name__} of 2 \(str, Tensor\) as batch 0"),
        (None, "NoneType as batch 0"),
    ):
        with pytest.raises(TypeError, match=f"{wanted} {came}"):
            ensemble.collect(members, [batch])
    with pytest.raises(ValueError, match="5 labels, one per row of batch 1, got 4"):
        ensemble.collect(members, [(x, y), (x, y[:4])])
    with pytest.raises(ValueError, match="labels with every batch or with none, got 1 of 2 with labels"):
        ensemble.collect(members, [(x, y), x])
    for pair in ((x, y), (x.numpy(), y.numpy()), (dict.fromkeys(members.names, x), y)):
        with pytest.raises(TypeError, match=r"got one pair of inputs and labels; give it as a batch: \[\(x, y\)\]"):
            ensemble.collect(members, pair)
    assert ensemble.collect(members, (x, x)).shape[1] == 10  # two batches


def test_nan_is_refused_by_name(members: ensemble.Members, frames: zoo.FrameSet) -> None:
    """A member whose weights are broken is named, with a frame; also piece by piece."""
    modules = {member.name: member.module for member in members}
    with torch.no_grad():
        list(modules["b"].parameters())[-1].fill_(torch.nan)
    specs = {member.name: member.spec for member in members}
    with pytest.raises(ValueError, match=r"finite logits from 'b', got NaN or infinity; check its weights"):
        ensemble.from_modules(modules, classes=CLASSES, specs=specs, plan="loop")
    loose = {member.name: ensemble.run.Member(member.name, CLASSES, member.make) for member in members}
    x = torch.randn(9, 30)
    with pytest.raises(ValueError, match=r"finite logits from 'b', got NaN or infinity; check its weights"):
        ensemble.collect(ensemble.Members(loose.values()), x)
    x[3, 5] = torch.nan
    whole = ensemble.Members([loose["a"]])
    with pytest.raises(ValueError, match="from member 'a', got NaN at frame 3"):
        ensemble.collect(whole, x)
    with pytest.raises(ValueError, match="from member 'a', got NaN at frame 3"):
        next(ensemble.run.predictions(whole, x))


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
