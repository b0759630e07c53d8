"""Batches of frames, one step on them, and scores against scikit-learn."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

import zoo
from zoo import FrameSet, Recipe, Spec
from zoo.training import step
from zoo.training.step import Batches, Scorer, check_recipes, losses

SPEC = Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 2, "dropout": 0.2})


def test_every_frame_comes_once_an_epoch_in_an_order_of_seed_and_epoch(frames: FrameSet) -> None:
    """Shuffled by the order's seed alone; a last single frame is left out."""
    numbered = FrameSet(torch.arange(138.0)[:, None].repeat(1, 6), frames.labels, frames.starts, frames.classes)
    spec = replace(SPEC, context=0, normalisation="none", options={"width": 8})

    def order(epoch: int, seed: int) -> list[float]:
        feed = Batches(numbered, spec, [Recipe(batch_size=32, seed=seed)])
        return [value for step in feed.epoch(epoch) for batch in step for value in batch.windows[:, 0].tolist()]

    assert sorted(order(1, 0)) == list(range(138))
    assert order(1, 0) == order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    steps = Batches(numbered, spec, [Recipe(batch_size=137)]).epoch(1)
    assert sum(batch.count for step in steps for batch in step) == 137


def test_masks_blank_the_windows_only_in_training(frames: FrameSet) -> None:
    """A run of features is zero in a masked window, everything else as it was."""
    plain, masked = (
        next(Batches(frames, SPEC, [Recipe(batch_size=32, mask_features=m)]).epoch(1))[0].windows for m in (0, 2)
    )
    changed = masked != plain
    assert changed.any()
    assert (masked[changed] == 0).all()
    assert (changed.view(32, 3, 6).any(1).sum(1) <= 2).all()


@pytest.mark.parametrize(
    "changes", [{}, {"fraction": 0.5, "swa_from": 1}, {"mask_time": 1, "mask_features": 2, "accumulate": 2}], ids=str
)
def test_mapped_frames_train_the_same_model(frames: FrameSet, changes: dict[str, object]) -> None:
    """To the bit, and it is evaluated and averaged on them alike."""
    mapped, recipe = replace(frames, mapped=True), Recipe(epochs=2, batch_size=32, **changes)
    alike = [zoo.train(SPEC, recipe, each, each) for each in (frames, mapped)]
    assert alike[0].digest == alike[1].digest
    assert alike[0].metrics == alike[1].metrics
    means = [zoo.average(alike, frames=each, valid=each) for each in (frames, mapped)]
    assert (means[0].digest, means[0].metrics) == (means[1].digest, means[1].metrics)


def test_members_of_one_order_share_their_windows(frames: FrameSet) -> None:
    """(B, inputs) where the seeds of the order are equal, (M, B, inputs) where they differ."""
    recipes = [Recipe(batch_size=32, seed=seed, order_seed=7) for seed in (0, 1)]
    [shared] = next(Batches(frames, SPEC, recipes).epoch(1))
    assert (shared.windows.shape, shared.labels.shape) == ((32, 18), (32,))
    own = [replace(recipe, order_seed=None) for recipe in recipes]
    [apart] = next(Batches(frames, SPEC, own).epoch(1))
    assert (apart.windows.shape, apart.labels.shape) == ((2, 32, 18), (2, 32))
    for m, recipe in enumerate(own):
        [alone] = next(Batches(frames, SPEC, [recipe]).epoch(1))
        assert torch.equal(apart.windows[m], alone.windows)


def test_recipes_of_one_group_differ_in_four_fields_only() -> None:
    """Seeds, rate and decay; with an optimiser whose steps are not proportional to the rate, seeds only."""
    one = Recipe(optimiser="momentum", schedule="plateau")
    check_recipes([one, replace(one, seed=1, order_seed=2, learning_rate=0.1, weight_decay=0.2)])
    with pytest.raises(ValueError, match=r"may differ in seed, order_seed, .*, not in epochs, momentum"):
        check_recipes([one, replace(one, epochs=2, momentum=0.5)])
    with pytest.raises(ValueError, match="at least one member"):
        check_recipes([])
    other = Recipe(optimiser="adam_sgd")
    check_recipes([other, replace(other, seed=1)])
    for wrong in ([other, replace(other, learning_rate=0.1)], [replace(other, schedule="plateau")] * 2):
        with pytest.raises(ValueError, match=r"adam_sgd .* share one learning rate"):
            check_recipes(wrong)


@pytest.mark.parametrize(("name", "gradients"), [("momentum", 1), ("sam", 2)])
def test_an_optimiser_declares_how_many_gradients_it_takes(
    name: str, gradients: int, frames: FrameSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each calls the loss once a batch."""
    calls: list[int] = []
    monkeypatch.setattr(step, "losses", lambda *args: calls.append(1) or losses(*args))
    group = zoo.training.single_group(SPEC, Recipe(batch_size=32, optimiser=name))
    stepper = step.Stepper(group, "cpu")
    stepper.step(next(Batches(frames, SPEC, group.recipes).epoch(1)), torch.tensor([0.1]))
    assert len(calls) == gradients
    counts = [t for name, t in group.module.state_dict().items() if name.endswith("num_batches_tracked")]
    assert [int(t) for t in counts] == [1, 1]  # the second gradient leaves no trace in the statistics


def test_the_figures_are_scikit_learns(frames: FrameSet) -> None:
    """Accuracy and log loss over all frames, for two members at once."""
    spec = zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 8})
    models = [zoo.build(spec, seed=seed).eval() for seed in (0, 1)]
    scorer = Scorer(frames, spec)
    accuracy, loss = scorer(lambda x: torch.stack([model(x) for model in models]), members=2)
    windows = zoo.windows(frames, torch.arange(len(frames)), 1)
    for m, model in enumerate(models):
        p = model(windows).softmax(1).detach().double()
        assert float(accuracy[m]) == accuracy_score(frames.labels, p.argmax(1))
        assert float(loss[m]) == pytest.approx(log_loss(frames.labels, p / p.sum(1, keepdim=True)), rel=1e-5)
    figures = scorer.metrics(accuracy[0], loss[0])
    assert figures["valid/loss"] == {
        "value": float(loss[0]),
        "unit": "nats",
        "n": 138,
        "frames": frames.fingerprint,
    }


def test_each_member_may_have_labels_of_its_own() -> None:
    """(M, B) labels, by hand: a uniform guess costs ln 2 whatever the label, a sure one nothing or 20."""
    logits = torch.tensor([[[0.0, 0.0]], [[20.0, 0.0]]])
    found = losses(logits, torch.tensor([[1], [1]]))
    torch.testing.assert_close(found, torch.tensor([[0.6931472], [20.0]]))
    assert losses(logits, torch.tensor([0]))[1].item() == pytest.approx(0, abs=1e-6)
