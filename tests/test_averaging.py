"""Averages of checkpoints and of a run's weights, and BatchNorm's statistics for them."""

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import nn

import zoo
from zoo import Checkpoint, FrameSet, Spec, average
from zoo.training import losses_along
from zoo.training.averaging import METHODS, RunningAverage, reestimate

SPEC = Spec("cylinder", features=6, context=1, classes=4, options={"width": 5, "depth": 1})


def checkpoint(value: float, classes: Sequence[str] = ("a", "b", "c", "d")) -> Checkpoint:
    """All floating weights of one value; the count of batches is its integer."""
    tensors = {
        name: torch.full_like(t, int(value) if name.endswith("tracked") else value)
        for name, t in zoo.build(SPEC, seed=0).state_dict().items()
    }
    return Checkpoint(SPEC, tensors, tuple(classes))


def fresh(seed: int) -> Checkpoint:
    """Random weights."""
    return Checkpoint.from_module(zoo.build(SPEC, seed=seed), SPEC, "abcd")


def test_the_mean_of_1_2_3_4_is_2_and_a_half() -> None:
    """Integers are the first's, not rounded means."""
    found = average([checkpoint(value) for value in (1, 2, 3, 4)])
    for name, tensor in found.tensors.items():
        assert (tensor == (1 if name.endswith("tracked") else 2.5)).all()
    assert found.kind == "averaged"
    assert len(found.parents) == 4


def test_a_moving_average_weighs_the_newest_most() -> None:
    """By hand with decay one half: 1, then 1.5, then 2.25."""
    found = average([checkpoint(value) for value in (1, 2, 3)], method="ema", decay=0.5)
    assert found.tensors["1.weight"].unique().tolist() == [2.25]


@pytest.mark.parametrize("method", METHODS)
def test_identical_checkpoints_average_to_themselves(method: str, frames: FrameSet) -> None:
    """To the bit, whatever the method."""
    one = fresh(0)
    assert average([one, one, one], method=method, valid=frames).digest == one.digest


def test_the_order_does_not_matter_to_the_plain_mean() -> None:
    """Except for rounding."""
    some = [fresh(seed) for seed in range(4)]
    forth, back = average(some), average(some[::-1])
    for name, tensor in forth.tensors.items():
        torch.testing.assert_close(tensor, back.tensors[name])


def test_statistics_are_estimated_anew_on_the_frames(frames: FrameSet) -> None:
    """They are the mean and variance of what the averaged first layer gives in one batch."""
    found = average([fresh(seed) for seed in range(3)], frames=frames)
    windows = zoo.windows(frames, torch.arange(len(frames)), 1)
    hidden = windows @ found.tensors["0.0.weight"].T
    torch.testing.assert_close(found.tensors["0.1.running_mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.tensors["0.1.running_var"], hidden.var(0), rtol=1e-4, atol=1e-5)
    assert found.tensors["0.1.num_batches_tracked"] == 0


def test_a_greedy_soup_is_never_worse_than_its_best_ingredient(frames: FrameSet) -> None:
    """Its parents are those that it took, the best first."""
    recipe = zoo.Recipe(epochs=3, batch_size=32, learning_rate=0.02)
    trained = [zoo.train(SPEC, zoo.Recipe.from_dict(recipe.to_dict() | {"seed": s}), frames, frames) for s in range(4)]
    soup = average([fresh(9), *trained], method="greedy", valid=frames, frames=frames)
    best = max(trained, key=lambda one: one.metrics["valid/accuracy"]["value"])
    assert soup.metrics["valid/accuracy"]["value"] >= best.metrics["valid/accuracy"]["value"]
    assert soup.parents[0] == best.digest
    assert fresh(9).digest not in soup.parents


def test_the_line_begins_and_ends_at_the_checkpoints(frames: FrameSet) -> None:
    """Its ends have the losses of the two, with statistics of the same frames."""
    first, last = fresh(0), fresh(1)
    positions, losses = losses_along(first, last, frames, points=3)
    assert positions.tolist() == [0, 0.5, 1]
    for end, loss in ((first, losses[0]), (last, losses[2])):
        alone = average([end], frames=frames, valid=frames)
        assert float(loss) == pytest.approx(alone.metrics["valid/loss"]["value"], rel=1e-5)


def test_what_cannot_be_averaged_is_refused(frames: FrameSet) -> None:
    """Nothing, other classes, other specs, no frames to choose by."""
    with pytest.raises(ValueError, match="at least one checkpoint"):
        average([])
    with pytest.raises(ValueError, match="cannot average checkpoint 1 with checkpoint 0: classes"):
        average([checkpoint(1), checkpoint(1, ("a", "b", "d", "c"))])
    with pytest.raises(ValueError, match=r"pass valid="):
        average([checkpoint(1)], method="greedy")
    with pytest.raises(ValueError, match="uniform, ema, greedy"):
        average([checkpoint(1)], method="soup")
    with pytest.raises(ValueError, match="decay from 0 to below 1"):
        average([checkpoint(1)], method="ema", decay=1.0)
    with pytest.raises(ValueError, match="at least 2 points"):
        losses_along(checkpoint(1), checkpoint(2), frames, points=1)


def test_statistics_become_the_mean_over_the_batches() -> None:
    """Means of batch means and variances, with nothing left of what was there."""
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(99)
    batches = [torch.randn(8, 2, generator=torch.Generator().manual_seed(i)) + i for i in range(3)]
    reestimate(norm, batches)
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert norm.num_batches_tracked == 3
    assert norm.momentum == 0.1
    assert not norm.training


def test_dropout_stays_off_while_statistics_are_estimated() -> None:
    """The whole batch arrives."""
    module = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(1))
    reestimate(module, [torch.tensor([[1.0], [3.0]])])
    assert module[1].running_mean.item() == 2


def test_a_module_without_batchnorm_is_left_as_it_is() -> None:
    """No batch is even looked at."""
    reestimate(nn.Linear(1, 1), iter(lambda: 1 / 0, None))


def test_the_average_of_a_run_follows_its_weights() -> None:
    """By hand with one weight, 0 at first, then 2, then 5: ema rises from a decay of 2/11, swa is the mean."""
    module = nn.Linear(1, 1, bias=False)
    live = module.state_dict()
    live["weight"].zero_()
    ema, swa = (RunningAverage(lambda: live, ema=e, swa_from=s) for e, s in ((0.9, 0), (0.0, 2)))
    for number, value in enumerate((2.0, 5.0), start=1):
        live["weight"].fill_(value)
        for average_ in (ema, swa):
            average_.add_step()
            average_.add_epoch(number)
    first = 2 * 9 / 11
    assert ema.tensors["weight"].item() == pytest.approx(first + (5 - first) * 9 / 12)
    assert swa.tensors["weight"].item() == 5
    with ema.in_place(module, []):
        assert module.weight.item() == pytest.approx(first + (5 - first) * 9 / 12)
    assert module.weight.item() == 5


def test_without_an_average_the_weights_stay_in_place() -> None:
    """Neither steps nor epochs change anything, and no copy is held."""
    module = nn.Linear(2, 2)
    before = deepcopy(module.state_dict())
    off = RunningAverage(module.state_dict, ema=0.0, swa_from=0)
    off.add_step()
    off.add_epoch(1)
    assert not off.tensors
    with off.in_place(module, []):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name])
