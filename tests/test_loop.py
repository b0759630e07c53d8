"""The training loop: it learns, it can be stopped anywhere and resumed from its folder, and its errors are clear."""

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import ensemble
import zoo
from zoo import FrameSet, Recipe, Spec, TrainingError, _files, checkpoint, train
from zoo.checkpoint import CheckpointError, read
from zoo.logs import JsonLines
from zoo.models.architectures import ARCHITECTURES
from zoo.training import step as training_steps
from zoo.training.recipe import keywords
from zoo.training.schedules import SCHEDULES
from zoo.training.step import forward_of, losses

SPEC = Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 2, "dropout": 0.2})
PLAIN = Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 1, "batchnorm": False})
QUICK = Recipe(epochs=3, batch_size=32, learning_rate=0.01)


ACTING = {"milestones": (1,), "every": 1}  # within three epochs


class StopError(Exception):
    """Raised from on_epoch to stop a run."""


def interrupted(recipe: Recipe, frames: FrameSet, directory: Path, after: int, spec: Spec = SPEC) -> None:
    """Train, and stop after some epochs."""

    def report(record: Any) -> None:
        if record["epoch"] == after:
            raise StopError

    with pytest.raises(StopError):
        train(spec, recipe, frames, frames, directory=directory, on_epoch=report)


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": name} | {field: value for field, value in ACTING.items() if field in keywords(entry.function)}
        for name, entry in sorted(SCHEDULES.items())
    ]
    + [
        {"ema": 0.9},
        {"swa_from": 2},
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"accumulate": 2, "clip_norm": 0.1, "clip_value": 0.05, "l1": 1e-3, "l2": 1e-3},
        {"fraction": 0.5, "label_smoothing": 0.1, "mask_time": 1, "warmup": 1.5},
        {"optimiser": "adam_sgd", "switch_epoch": 1},
    ],
    ids=str,
)
def test_every_field_resumes_to_the_bit(fields: dict[str, Any], frames: FrameSet, tmp_path: Path) -> None:
    """Every kind of state is in the epoch's file; and the field has an effect."""
    recipe = Recipe.from_dict(QUICK.to_dict() | fields)
    whole = train(SPEC, recipe, frames, frames)
    interrupted(recipe, frames, tmp_path, 2)
    assert train(SPEC, recipe, frames, frames, directory=tmp_path).digest == whole.digest
    if fields.get("schedule") not in ("constant", "plateau"):
        assert whole.digest != train(SPEC, QUICK, frames, frames).digest


SCRIPT = """
import sys
sys.path[:0] = {path!r}
import torch, zoo
torch.set_num_threads(1)
frames = zoo.sample_corpus("valid").select(torch.arange(4))
zoo.train(zoo.Spec.from_dict({spec!r}), zoo.Recipe.from_dict({recipe!r}), frames, frames, directory={directory!r})
"""


def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """SIGKILL some time after the third epoch; then the same run again."""
    frames = zoo.sample_corpus("valid").select(torch.arange(4))
    spec = Spec("cylinder", features=27, context=1, classes=40, options={"width": 16, "depth": 1, "dropout": 0.2})
    recipe = Recipe(epochs=30, batch_size=64, schedule="cosine", ema=0.9)
    script = SCRIPT.format(
        path=sys.path, spec=spec.to_dict(), recipe=recipe.to_dict(), directory=str(tmp_path / "killed")
    )
    running = subprocess.Popen([sys.executable, "-c", script])
    while running.poll() is None and not list(tmp_path.glob("killed/epoch-0003*")):
        os.sched_yield()
    running.kill()
    assert running.wait() == -signal.SIGKILL
    again = train(spec, recipe, frames, frames, directory=tmp_path / "killed")
    assert again.digest == train(spec, recipe, frames, frames).digest


def test_the_best_epoch_is_returned_with_its_figures(frames: FrameSet) -> None:
    """Not the last one; the metrics are those of on_epoch, with what they were measured on."""
    records: list[Any] = []
    recipe = replace(QUICK, epochs=6, learning_rate=0.3)
    found = train(SPEC, recipe, frames, frames, on_epoch=records.append)
    best = max(record["valid/accuracy"] for record in records)
    assert found.metrics["valid/accuracy"] == {
        "value": best,
        "unit": "fraction",
        "n": len(frames),
        "frames": frames.fingerprint,
    }
    logits = found.to_module()(zoo.windows(frames, torch.arange(len(frames)), 1))
    assert float((logits.argmax(1) == frames.labels).double().mean()) == best
    assert found.trained_on == frames.fingerprint
    assert Recipe.from_dict(found.recipe or {}) == recipe


def test_the_monitor_may_be_the_loss(frames: FrameSet) -> None:
    """Then the epoch of the least loss counts."""
    losses: list[float] = []
    recipe = replace(QUICK, epochs=5, learning_rate=0.3, monitor="valid/loss")
    found = train(SPEC, recipe, frames, frames, on_epoch=lambda record: losses.append(record["valid/loss"]))
    assert found.metrics["valid/loss"]["value"] == min(losses)


def test_training_is_plain_gradient_descent(frames: FrameSet) -> None:
    """One epoch of one batch equals the step written by hand: windows, cross-entropy, gradient."""
    recipe = Recipe(epochs=1, batch_size=1000, optimiser="sgd", learning_rate=0.5, l1=0.01, l2=0.1, label_smoothing=0.1)
    found = train(PLAIN, recipe, frames, frames)
    model = zoo.build(PLAIN, seed=0)
    loss = functional.cross_entropy(
        model(zoo.windows(frames, torch.arange(len(frames)), 1)), frames.labels, label_smoothing=0.1
    )
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    loss = loss + sum(0.01 * w.abs().sum() + 0.05 * w.square().sum() for w in weights)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found.tensors[name], (parameter - 0.5 * parameter.grad).detach(), rtol=1e-5, atol=1e-6
        )


def test_accumulated_batches_are_one_large_batch(frames: FrameSet) -> None:
    """Without BatchNorm, two halves averaged are the whole."""
    even = frames.select(torch.tensor([0, 2]))  # 100 frames
    small = train(PLAIN, replace(QUICK, batch_size=50, accumulate=2), even, even)
    large = train(PLAIN, replace(QUICK, batch_size=100), even, even)
    for name, tensor in small.tensors.items():
        torch.testing.assert_close(tensor, large.tensors[name], rtol=1e-4, atol=1e-5)


def test_clipping_bounds_the_step(frames: FrameSet) -> None:
    """Plain SGD at rate 1 moves by no more than the norm, and no entry by more than the value."""
    before = zoo.build(PLAIN, seed=0).state_dict()
    for field, bound in (("clip_norm", 0.01), ("clip_value", 0.001)):
        recipe = Recipe.from_dict(
            {"epochs": 1, "batch_size": 1000, "optimiser": "sgd", "learning_rate": 1.0, field: bound}
        )
        after = train(PLAIN, recipe, frames, frames).tensors
        moves = torch.cat([(after[name] - before[name]).flatten() for name in before])
        measured = moves.norm() if field == "clip_norm" else moves.abs().max()
        assert float(measured) == pytest.approx(bound, rel=1e-3)


def test_swa_is_the_mean_of_the_epochs(frames: FrameSet, tmp_path: Path) -> None:
    """From the first epoch on, weight by weight; training itself continues from the weights as they were."""
    train(PLAIN, replace(QUICK, keep=0), frames, frames, directory=tmp_path / "plain")
    epochs = [read(tmp_path / "plain" / f"epoch-{number:04}.safetensors") for number in (1, 2, 3)]
    train(PLAIN, replace(QUICK, keep=0, swa_from=1), frames, frames, directory=tmp_path / "swa")
    found = read(tmp_path / "swa" / "epoch-0003.safetensors")
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, torch.stack([epoch.tensors[name] for epoch in epochs]).mean(dim=0))


def test_patience_stops_and_plateau_lowers(frames: FrameSet) -> None:
    """With a rate of zero nothing improves after the first epoch."""
    records: list[Any] = []
    recipe = Recipe(epochs=9, batch_size=32, learning_rate=0.0, patience=2, schedule="plateau", every=1)
    train(PLAIN, recipe, frames, frames, on_epoch=records.append)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    rates: list[float] = []
    recipe = Recipe(epochs=4, batch_size=32, learning_rate=1e-9, schedule="plateau", every=1, final_rate=0.05)
    train(PLAIN, recipe, frames, frames, on_epoch=lambda record: rates.append(record["learning_rate"]))
    torch.testing.assert_close(rates, [1e-9, 1e-9, 1e-10, 5e-11])


def test_the_callers_random_state_is_left_alone(frames: FrameSet) -> None:
    """Dropout draws from the run's own seed."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = train(SPEC, QUICK, frames, frames)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert train(SPEC, QUICK, frames, frames).digest == first.digest


def test_accelerators_are_not_reseeded(frames: FrameSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.manual_seed` would; nothing gives them their state back."""
    monkeypatch.delattr(torch, "manual_seed")
    train(SPEC, QUICK, frames, frames)
    ensemble.cotrain(SPEC, QUICK, frames, frames, seeds=[0, 1])


@pytest.mark.parametrize(
    ("good", "words"), [(7, "in epoch 2 .*the best epoch before is 1"), (0, "in epoch 1 .*no whole epoch before")]
)
def test_divergence_is_one_clear_line_and_the_best_is_kept(
    good: int, words: str, frames: FrameSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some good steps of five an epoch the loss is NaN; the error carries the epoch before."""
    steps = iter(range(100))
    monkeypatch.setattr(
        training_steps, "losses", lambda *args: losses(*args) * (1 if next(steps) < good else float("nan"))
    )
    with pytest.raises(TrainingError, match=f"no longer finite {words}.*lower the learning rate") as caught:
        train(SPEC, QUICK, frames, frames)
    assert [one is None for one in caught.value.checkpoints] == [good == 0]


def test_weights_that_overflow_are_divergence_too(frames: FrameSet) -> None:
    """BatchNorm can hide it from the loss."""
    recipe = Recipe(epochs=3, batch_size=32, optimiser="sgd", learning_rate=1e6, l2=1e6)
    with pytest.raises(TrainingError, match="the loss or a weight is no longer finite"):
        train(SPEC, recipe, frames, frames)


@pytest.fixture
def own() -> Iterator[Callable[[Callable[[int, int], nn.Module]], Spec]]:
    """Enters a builder (inputs, classes) -> module as an architecture; its spec."""
    before = dict(ARCHITECTURES)

    def enter(build: Callable[[int, int], nn.Module]) -> Spec:
        def brought(inputs: int, classes: int) -> nn.Module:
            return build(inputs, classes)

        brought.__name__ = build.__name__
        zoo.architecture(brought)
        return Spec(build.__name__, features=6, context=0, classes=4, normalisation="none")

    yield enter
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


Enter = Callable[[Callable[[int, int], nn.Module]], Spec]


class Centred(nn.Module):
    """Replaces a buffer by another in training, and shrinks a weight by giving it new memory."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, classes)
        self.register_buffer("mean", torch.zeros(inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the distance to the running mean."""
        if self.training:
            self.mean = self.mean * 0.5 + 0.5 * x.mean(dim=0)
            self.layer.weight.data = self.layer.weight.data.mul(0.999)
        return self.layer(x - self.mean)  # type: ignore[no-any-return]


def tied(inputs: int, classes: int) -> nn.Module:
    """Two layers with one weight."""
    model = nn.Sequential(nn.Linear(inputs, inputs), nn.Tanh(), nn.Linear(inputs, inputs), nn.Linear(inputs, classes))
    model[2].weight = model[0].weight
    return model


def twice(inputs: int, classes: int) -> nn.Module:
    """One layer under two names."""
    layer = nn.Linear(inputs, inputs)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(inputs, classes))


def transposed(inputs: int, classes: int) -> nn.Module:
    """A weight that is not contiguous, and one with gaps."""
    model = nn.Sequential(nn.Linear(inputs, inputs), nn.Linear(inputs, classes))
    model[0].weight = nn.Parameter(model[0].weight.detach().t())
    model[1].weight = nn.Parameter(torch.randn(classes, 2 * inputs)[:, ::2])
    return model


def spare(inputs: int, classes: int) -> nn.Module:
    """A parameter that the logits do not depend on."""
    model = nn.Sequential(nn.Linear(inputs, classes))
    model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    return model


def writing(inputs: int, classes: int) -> nn.Module:
    """Changes its input in place."""
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(inputs, classes))


def frozen(inputs: int, classes: int) -> nn.Module:
    """A layer that is not to be trained."""
    model = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes))
    model[0].requires_grad_(False)
    return model


def double(inputs: int, classes: int) -> nn.Module:
    """Weights of another type than the frames."""
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, classes)).double()


def normed(inputs: int, classes: int) -> nn.Module:
    """Weights that hooks make of others before each call."""
    model = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
        nn.utils.spectral_norm(model[2])
    return model


class Answer(nn.Linear):
    """Answers with an object that has logits."""

    def forward(self, x: torch.Tensor) -> Any:
        """The logits inside."""
        return SimpleNamespace(logits=super().forward(x))


class Turned(Centred):
    """Gives its weight memory that is not contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        if self.training:
            self.layer.weight.data = self.layer.weight.data.t().contiguous().t()
        return super().forward(x)


class Counting(nn.Linear):
    """Counts in an attribute and in a buffer that is in no `state_dict`; both matter in training only."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, classes)
        self.calls = 0
        self.register_buffer("mean", torch.zeros(inputs), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits that grow with the calls and with the mean of the input."""
        if self.training:
            self.calls += 1
            self.mean = self.mean * 0.5 + x.mean(dim=0)
            x = x * (1 + 0.01 * self.calls) + self.mean
        return super().forward(x)


BROUGHT = [Counting, Centred, tied, twice, transposed, spare, writing, frozen, double, normed, Answer, Turned]


@pytest.mark.parametrize(
    "fields",
    [{}, {"ema": 0.9}, {"swa_from": 2}, {"optimiser": "sam", "l2": 0.01}, {"clip_norm": 0.1, "l1": 0.01}],
    ids=str,
)
@pytest.mark.parametrize("build", BROUGHT)
def test_what_is_evaluated_is_what_is_kept(
    build: Any, fields: dict[str, Any], own: Enter, frames: FrameSet, tmp_path: Path
) -> None:
    """Whatever a model does with its tensors: the loss of the checkpoint is the recorded one, and a run resumes."""
    spec, recipe = own(build), Recipe.from_dict({"epochs": 3, "batch_size": 32, "learning_rate": 0.01} | fields)
    whole = train(spec, recipe, frames, frames)
    windows = zoo.windows(frames, torch.arange(len(frames)), 0, "none")
    with torch.no_grad():
        logits = forward_of(whole.to_module())(windows)[0]
    loss = float(functional.cross_entropy(logits.float(), frames.labels))
    assert loss == pytest.approx(whole.metrics["valid/loss"]["value"], rel=1e-5)
    interrupted(recipe, frames, tmp_path, 2, spec)
    assert train(spec, recipe, frames, frames, directory=tmp_path).digest == whole.digest
    first = zoo.build(spec, seed=0)
    for name, parameter in first.named_parameters():
        assert torch.equal(whole.tensors[name], parameter) != parameter.requires_grad or name == "unused"


class Hidden(nn.Linear):
    """Keeps what decides its answers where no checkpoint looks, and lets it change in some step of the training."""

    def __init__(self, inputs: int, classes: int, *, after: int) -> None:
        super().__init__(inputs, classes)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits that are larger after some steps."""
        self.steps += self.training
        return super().forward(x) * (2 if self.steps > self.after else 1)


@pytest.mark.parametrize(("after", "epochs"), [(2, 1), (12, 3)])
def test_a_model_with_a_hidden_state_is_refused(after: int, epochs: int, own: Enter, frames: FrameSet) -> None:
    """After the first epoch if it shows by then, else at the end; 5 steps are an epoch."""
    seen: list[Any] = []

    def hidden(inputs: int, classes: int) -> nn.Module:
        return Hidden(inputs, classes, after=after)

    with pytest.raises(CheckpointError, match="'steps' is a tensor in no state_dict"):
        train(own(hidden), replace(QUICK, monitor="valid/loss"), frames, frames, on_epoch=seen.append)
    assert len(seen) == epochs - (epochs == 1)


def test_what_depends_on_the_batch_is_evaluated_as_one(own: Enter, frames: FrameSet) -> None:
    """BatchNorm without statistics, and more frames than are evaluated at once otherwise."""

    def batchwise(inputs: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, classes))

    many = FrameSet(
        frames.features.repeat(130, 1), frames.labels.repeat(130), torch.tensor([0, 138 * 130]), frames.classes
    )
    with pytest.warns(UserWarning, match="'batchwise' to a frame depend on the other frames"):
        found = train(own(batchwise), replace(QUICK, epochs=1), frames, many)
    logits = found.to_module()(zoo.windows(many, torch.arange(len(many)), 0, "none")).detach()
    loss = float(functional.cross_entropy(logits, many.labels))
    assert loss == pytest.approx(found.metrics["valid/loss"]["value"], rel=1e-5)


def test_penalties_reach_what_the_logits_do_not(own: Enter, frames: FrameSet) -> None:
    """By hand: plain SGD at rate 0.1 with l1 = 0.5 and l2 = 1 takes 1 to 1 - 0.1 * (0.5 + 1)."""
    recipe = Recipe(epochs=1, batch_size=1000, optimiser="sgd", learning_rate=0.1, l1=0.5, l2=1.0)
    torch.testing.assert_close(train(own(spare), recipe, frames, frames).tensors["unused"], torch.full((3, 3), 0.85))


@pytest.mark.parametrize("name", ["ema", "sam"])
def test_tied_weights_are_averaged_and_stepped_once(name: str, own: Enter, frames: FrameSet) -> None:
    """The same model with one name for its weight gives the same."""

    class Once(nn.Module):
        def __init__(self, inputs: int, classes: int) -> None:
            super().__init__()
            model = tied(inputs, classes)
            self.first, self.last = model[0], model[3]
            self.bias = model[2].bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.first(x))
            return self.last(functional.linear(x, self.first.weight, self.bias))  # type: ignore[no-any-return]

    fields: dict[str, Any] = {"ema": 0.9} if name == "ema" else {"optimiser": "sam"}
    recipe = Recipe.from_dict({"epochs": 2, "batch_size": 32, "learning_rate": 0.01} | fields)
    two, one = (train(own(build), recipe, frames, frames) for build in (tied, Once))
    torch.testing.assert_close(two.tensors["0.weight"], one.tensors["first.weight"])
    assert torch.equal(two.tensors["0.weight"], two.tensors["2.weight"])


@pytest.mark.parametrize("optimiser", ["sgd", "sam"])
def test_a_model_that_changes_its_input_learns_as_one_that_does_not(
    optimiser: str, own: Enter, frames: FrameSet
) -> None:
    """SAM asks it twice about one batch."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    class Double(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * 2)

    recipe, before = replace(QUICK, optimiser=optimiser), frames.features.clone()
    one, two = (train(own(build), recipe, frames, frames) for build in (Doubled, Double))
    assert one.digest == two.digest
    assert one.metrics == two.metrics
    assert torch.equal(frames.features, before)


def views(inputs: int, classes: int) -> nn.Module:
    """Two parameters that share memory."""
    model = nn.Sequential(nn.Linear(inputs, inputs), nn.Linear(inputs, classes))
    model[1].weight = nn.Parameter(model[0].weight.detach()[:classes])
    return model


class Further(nn.Linear):
    """An entry in the `state_dict` that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        """Anything."""
        return {"calls": 0}

    def set_extra_state(self, state: Any) -> None:
        """Take it."""


class Replaced(nn.Linear):
    """Puts another parameter in the place of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same logits."""
        if self.training:
            self.weight = nn.Parameter(self.weight.detach())
        return super().forward(x)


class Growing(Centred):
    """Puts a buffer of another shape in the place of one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        if self.training:
            self.mean = self.mean.expand(2, -1)[0][None]
        return self.layer(x - self.mean)  # type: ignore[no-any-return]


class Attached(Centred):
    """Assigns a buffer together with the graph that it was computed by."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.layer.weight[0] + x
        if self.training:
            self.mean = self.mean * 0.5 + x.mean(dim=0)
        return self.layer(x - self.mean)  # type: ignore[no-any-return]


class Auxiliary(nn.Linear):
    """Answers with more than the logits in training."""

    def forward(self, x: torch.Tensor) -> Any:
        """Logits."""
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class Short(nn.Linear):
    """Answers with fewer logits in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return super().forward(x)[:, : 3 if self.training else None]


class Detached(nn.Linear):
    """Logits without gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return super().forward(x).detach()


class Pair(nn.Linear):
    """Answers with more than the logits."""

    def forward(self, x: torch.Tensor) -> Any:
        """Logits and inputs."""
        return super().forward(x), x


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (views, "0.weight and 1.weight of 'views' share memory"),
        (Further, "_extra_state"),
        (Replaced, "weight of 'Replaced' would not be trained"),
        (Growing, "expected mean of 'Growing' to stay"),
        (lambda *sizes: frozen(*sizes).requires_grad_(False), "got none that requires a gradient"),
        (Attached, "mean of 'Attached' would take gradients through earlier steps"),
        (Auxiliary, "expected a tensor of logits from a Auxiliary, got a tuple"),
        (Short, r"expected logits \(32, 4\) from 'Short' in training, got \(32, 3\)"),
        (Detached, "depend on its parameters, got a constant"),
        (Pair, r"expected logits \(4, 4\) from 'Pair' .* got a tuple of 2"),
    ],
)
def test_a_model_that_cannot_be_kept_is_refused(build: Any, words: str, own: Enter, frames: FrameSet) -> None:
    """The message names the tensor."""
    with pytest.raises(ValueError, match=words):
        train(own(build), QUICK, frames, frames)


def test_without_a_finite_loss_on_the_validation_frames_nothing_is_returned(frames: FrameSet) -> None:
    """Features whose products overflow: the message says where; a run that is resumed says it again."""
    huge = FrameSet(frames.features.sign() * 3e38, frames.labels, frames.starts, frames.classes)
    with pytest.raises(TrainingError, match=r"validation frames was NaN or infinite .*\(seed 0\).*'none'") as caught:
        train(replace(PLAIN, normalisation="none"), QUICK, frames, huge)
    assert caught.value.checkpoints == (None,)


def test_a_run_of_a_model_with_other_tensors_is_not_resumed(own: Enter, frames: FrameSet, tmp_path: Path) -> None:
    """The code has changed since, under the same name; nothing is broadcast into place."""
    sizes = [2, 1]

    def changing(inputs: int, classes: int) -> nn.Module:
        model = nn.Linear(inputs, classes)
        model.register_buffer("scale", torch.ones(sizes[0]))
        return model

    spec = own(changing)
    train(spec, QUICK, frames, frames, directory=tmp_path)
    sizes[0] = 1
    with pytest.raises(ValueError, match=r"other tensors \(live\.scale, best\.scale\)"):
        train(spec, QUICK, frames, frames, directory=tmp_path)


def test_settings_that_never_acted_do_not_make_another_run(frames: FrameSet, tmp_path: Path) -> None:
    """A folder of an older version, which recorded them, is resumed by the recipe without them."""
    whole = train(SPEC, QUICK, frames, frames)
    interrupted(QUICK, frames, tmp_path, 2)
    rewritten(tmp_path, QUICK.to_dict() | {"swa_from": 9, "momentum": 0.5, "milestones": [2]}, [[0], [], [], []])
    assert train(SPEC, QUICK, frames, frames, directory=tmp_path).digest == whole.digest


def test_frames_that_do_not_fit_are_refused(frames: FrameSet) -> None:
    """Sizes, classes, labels, masks: each named."""
    unlabelled = FrameSet(frames.features, None, frames.starts, frames.classes)
    other = FrameSet(frames.features, frames.labels, frames.starts, ("a", "b", "d", "c"))
    cases = [
        (SPEC, QUICK, unlabelled, "valid frames with labels"),
        (SPEC, QUICK, other, "same classes in the same order"),
        (replace(SPEC, features=5), QUICK, frames, "of 5 features and 4 classes"),
        (SPEC, replace(QUICK, mask_time=9), frames, "within a window of 3 frames"),
    ]
    for spec, recipe, valid, words in cases:
        with pytest.raises(ValueError, match=words):
            train(spec, recipe, frames, valid)
    with pytest.raises(ValueError, match="at least two frames"):
        train(SPEC, QUICK, frames.select(torch.tensor([1])), frames)


def test_the_runs_own_log_gets_each_epoch_once(frames: FrameSet, tmp_path: Path) -> None:
    """Also where it is given as the log."""
    log = tmp_path / "log.jsonl"
    train(SPEC, QUICK, frames, frames, directory=tmp_path, log=JsonLines(log))
    assert len(log.read_text().splitlines()) == 1 + QUICK.epochs


class FullDisk(_files.System):
    """A disk that is full from some file on."""

    def __init__(self, files: int) -> None:
        self.left = files

    def write(self, file: int, data: memoryview) -> int:
        """Refuse when no file is left."""
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file, data)


def test_a_full_disk_leaves_the_epoch_before(frames: FrameSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says so, and with room again the run ends like an uninterrupted one."""
    monkeypatch.setattr(_files, "system", FullDisk(3))
    with pytest.raises(OSError, match=r"cannot write epoch 2 .*No space left.*resumed from epoch 1"):
        train(SPEC, QUICK, frames, frames, directory=tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp"))
    resumed = train(SPEC, QUICK, frames, frames, directory=tmp_path)
    assert resumed.digest == train(SPEC, QUICK, frames, frames).digest


def test_epochs_are_pruned_and_logged(frames: FrameSet, tmp_path: Path) -> None:
    """The newest `keep` stay; the log has a line of settings and one an epoch, also after a resumption."""
    interrupted(replace(QUICK, keep=2), frames, tmp_path, 2)
    train(SPEC, replace(QUICK, keep=2), frames, frames, directory=tmp_path)
    assert [path.name[6:10] for path in sorted(tmp_path.glob("epoch-*"))] == ["0002", "0003"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["config"]["recipe"]["keep"] == 2
    assert [line["step"] for line in lines[1:]] == [1, 2, 3]


def test_another_runs_directory_is_refused(frames: FrameSet, tmp_path: Path) -> None:
    """The message says in which field they differ; a damaged state is refused too."""
    train(SPEC, QUICK, frames, frames, directory=tmp_path)
    with pytest.raises(ValueError, match=r"another run.*learning_rate: 0\.01 there, 0\.02 now"):
        train(SPEC, replace(QUICK, learning_rate=0.02), frames, frames, directory=tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="remove it to start anew"):
        train(SPEC, QUICK, frames, frames, directory=tmp_path)


def rewritten(directory: Path, recipe: dict[str, Any], members: list[list[Any]]) -> None:
    """Write a run's identity in its former shape: one recipe, and lists of the values that members had of their own."""
    path = directory / "state.safetensors"
    data = path.read_bytes()
    header = checkpoint.verify_bytes(data)
    about = json.loads(header.metadata["run"])
    del about["identity"]["recipes"]
    about["identity"] |= {"recipe": recipe, "members": members}
    path.write_bytes(checkpoint.pack(checkpoint.tensors_of(data, header), {"run": json.dumps(about)}))


def test_a_folder_of_the_version_before_is_resumed(frames: FrameSet, tmp_path: Path) -> None:
    """That of a single model, and that of members with seeds, orders, rates and decays of their own."""
    whole = train(SPEC, QUICK, frames, frames)
    interrupted(QUICK, frames, tmp_path, 2)
    rewritten(tmp_path, QUICK.to_dict(), [[0], [], [], []])
    assert train(SPEC, QUICK, frames, frames, directory=tmp_path).digest == whole.digest
    seeds, rates, decays = [3, 5], [0.01, 0.02], [0.0, 0.1]
    for own_order in (False, True):
        folder = tmp_path / str(own_order)
        some = {"seeds": seeds, "own_order": own_order, "learning_rates": rates, "weight_decays": decays, "together": 2}
        before = ensemble.cotrain(SPEC, QUICK, frames, frames, directory=folder, **some)
        rewritten(folder / "members-000", QUICK.to_dict(), [seeds, seeds if own_order else [0], rates, decays])
        again = ensemble.cotrain(SPEC, QUICK, frames, frames, directory=folder, **some)
        assert [one.digest for one in again] == [one.digest for one in before]
        with pytest.raises(ValueError, match=r"another run \(weight_decay: 0\.1 there, 0\.2 now\)"):
            ensemble.cotrain(SPEC, QUICK, frames, frames, directory=folder, **some | {"weight_decays": [0.0, 0.2]})


@pytest.mark.parametrize(("batch_size", "accumulate"), [(32, 1), (32, 2), (128, 2), (200, 1)])
def test_only_whole_steps_are_timed(frames: FrameSet, batch_size: int, accumulate: int) -> None:
    """The last step of an epoch has the frames that are left, here 10 of 138, which would take the least time."""
    recipe, seen = Recipe(batch_size=batch_size, accumulate=accumulate), []
    group = zoo.training.single_group(PLAIN, recipe)
    counted = replace(group, forward=lambda x: seen.append(len(x)) or group.forward(x))
    zoo.training.seconds_per_step(counted, frames, patience=0)
    sums = {sum(seen[at : at + accumulate]) for at in range(0, len(seen), accumulate)}
    assert sums == {min(batch_size * accumulate, len(frames))}
