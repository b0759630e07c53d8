"""Members trained together are members trained alone; what a stack of them computes, and what it refuses."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ensemble
import zoo
from ensemble.run import Processes
from ensemble.run.cotraining import TrainingStack, fastest, measure_together, stacked_group
from zoo import FrameSet, Recipe, Spec
from zoo.models.architectures import ARCHITECTURES
from zoo.models.blocks import Dropout
from zoo.search import searched
from zoo.training.optimisers import rows
from zoo.training.step import Batches, Stepper, losses

SPEC = Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 2, "dropout": 0.2})
RECIPE = Recipe(epochs=4, batch_size=28, learning_rate=0.01, mask_features=1)  # 5 steps an epoch, 20 in all


def apart(found: zoo.Checkpoint, alone: zoo.Checkpoint) -> float:
    """Largest difference of any weight or statistic."""
    return max(float((found.tensors[n].double() - t.double()).abs().max()) for n, t in alone.tensors.items())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimiser": "sam", "learning_rate": 0.05},
        {"optimiser": "adam_sgd", "switch_epoch": 2},
        {"clip_norm": 0.3, "l1": 1e-3, "label_smoothing": 0.1, "accumulate": 2},
        {"ema": 0.9},
        {"swa_from": 2},
        {"schedule": "plateau", "every": 1, "fraction": 0.6},
        {"weight_decay": 0.1, "optimiser": "adamw", "schedule": "one_cycle"},
    ],
    ids=str,
)
@pytest.mark.parametrize("own_order", [False, True])
def test_together_is_apart(fields: dict[str, Any], own_order: bool, frames: FrameSet) -> None:
    """After 20 steps within 1e-4, dropout and masks included, by the recipe that each checkpoint carries."""
    recipe = replace(RECIPE, **fields)
    together = ensemble.cotrain(SPEC, recipe, frames, frames, seeds=[3, 5, 8], own_order=own_order, together=3)
    for seed, found in zip([3, 5, 8], together, strict=True):
        own = Recipe.from_dict(found.recipe or {})
        assert (own.seed, own.data_seed) == (seed, seed if own_order else recipe.data_seed)
        alone = zoo.train(SPEC, own, frames, frames)
        assert apart(found, alone) < 1e-4
        assert found.metrics["valid/accuracy"]["value"] == pytest.approx(alone.metrics["valid/accuracy"]["value"])


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "momentum", "rmsprop"])
def test_each_member_may_have_its_own_rate_and_decay(optimiser: str, frames: FrameSet) -> None:
    """As vectors, decoupled or in the gradient as the optimiser has it."""
    found = ensemble.cotrain(
        SPEC,
        replace(RECIPE, optimiser=optimiser),
        frames,
        frames,
        seeds=range(3),
        learning_rates=[0.01, 0.02, 0.005],
        weight_decays=[0.0, 0.1, 0.01],
        together=3,
    )
    for one, rate, decay in zip(found, [0.01, 0.02, 0.005], [0.0, 0.1, 0.01], strict=True):
        own = Recipe.from_dict(one.recipe or {})
        assert (own.learning_rate, own.weight_decay) == (rate, decay)
        assert apart(one, zoo.train(SPEC, own, frames, frames)) < 1e-4


def test_each_member_stops_early_by_itself(frames: FrameSet) -> None:
    """One member's rate is almost zero: its best epoch is its first, the other continues."""
    records: list[list[Any]] = []
    recipe = replace(RECIPE, epochs=5, patience=1, monitor="valid/loss")
    found = ensemble.cotrain(
        SPEC, recipe, frames, frames, seeds=range(2), learning_rates=[1e-9, 0.01], together=2, on_epoch=records.append
    )
    losses = [[record[m]["valid/loss"] for record in records] for m in range(2)]
    assert len(records) > 2
    for m, one in enumerate(found):
        alone = zoo.train(SPEC, Recipe.from_dict(one.recipe or {}), frames, frames)
        assert apart(one, alone) < 1e-4
        assert one.metrics["valid/loss"]["value"] in losses[m]


def test_a_stopped_run_resumes_with_the_same_groups(frames: FrameSet, tmp_path: Path) -> None:
    """Members 0 and 1 together, then 2 alone; stopped in between, the end is the same to the bit."""
    whole = ensemble.cotrain(SPEC, RECIPE, frames, frames, seeds=range(3), together=2)

    def stop(records: list[Any]) -> None:
        if records[0]["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensemble.cotrain(SPEC, RECIPE, frames, frames, seeds=range(3), together=2, directory=tmp_path, on_epoch=stop)
    again = ensemble.cotrain(SPEC, RECIPE, frames, frames, seeds=range(3), directory=tmp_path)
    assert [one.digest for one in again] == [one.digest for one in whole]
    assert sorted(path.name for path in tmp_path.glob("members-*")) == ["members-000", "members-002"]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("folds", "count"), [(0, 1), (2, 4)])
def test_workers_train_the_members_with_the_same_bits(folds: int, count: int, frames: FrameSet, tmp_path: Path) -> None:
    """Sets of two and one, on all frames or on folds, by one process or four; the same call again trains nothing."""
    settings: dict[str, Any] = {"seeds": range(3), "together": 2, "folds": folds}
    plain = [one.digest for one in ensemble.cotrain(SPEC, RECIPE, frames, frames, **settings)]
    how: dict[str, Any] = {"workers": Processes(count), "directory": tmp_path}
    assert [one.digest for one in ensemble.cotrain(SPEC, RECIPE, frames, frames, **settings, **how)] == plain
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("epoch-*")}
    again = ensemble.cotrain(SPEC, RECIPE, frames, frames, **settings, directory=tmp_path)
    assert [one.digest for one in again] == plain
    assert times == {file: file.stat().st_mtime_ns for file in times}
    assert len(times) == 3 * max(folds, 1)
    with pytest.raises(ValueError, match="no on_epoch beside workers"):
        ensemble.cotrain(SPEC, RECIPE, frames, frames, workers=Processes(2), on_epoch=print)


def test_the_group_is_chosen_by_measurement(frames: FrameSet) -> None:
    """The sizes measured include one; a larger one must be clearly faster."""
    found = measure_together(SPEC, [replace(RECIPE, seed=seed, order_seed=0) for seed in range(4)], frames)
    assert {1, 2} <= set(found) <= {1, 2, 4}
    assert all(seconds > 0 for seconds in found.values())
    assert fastest({1: 1.0, 2: 0.97, 4: 0.96}) == 1
    assert fastest({1: 1.0, 2: 0.6, 4: 0.5, 8: 0.7}) == 4


def unmeasured(*args: Any, **settings: Any) -> float:
    """Stands in for a measurement that must not be made."""
    raise AssertionError("this training is too short to be measured")


@pytest.mark.parametrize(("limit", "sizes"), [(1_000_000, [3]), (552, [2, 1]), (551, [1, 1, 1])])
def test_a_short_training_is_not_measured(
    limit: int, sizes: list[int], frames: FrameSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many together as the limit of parameters allows; one has 276."""
    assert zoo.count_parameters(SPEC) == 276
    monkeypatch.setattr("zoo.training.seconds_per_step", unmeasured)
    monkeypatch.setattr("ensemble.run.cotraining._HELD", limit)
    records: list[list[Any]] = []
    ensemble.cotrain(SPEC, replace(RECIPE, epochs=1), frames, frames, seeds=range(3), on_epoch=records.append)
    assert [len(record) for record in records] == sizes


@pytest.mark.parametrize(
    ("epochs", "step", "measured"),
    [
        (100, 0.01, False),  # 20 s of training against 2 of measuring
        (100, 0.03, True),  # 59 s against 2.1
        (4, 1.0, False),  # 79 s against 40, as each size takes five steps at least
    ],
)
def test_measuring_takes_a_small_share_of_the_training(
    epochs: int, step: float, measured: bool, frames: FrameSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 members, 5 steps an epoch: sizes 1, 2 and 4, and 1 again, of half a second each."""
    sizes: list[int] = []

    def seconds(group: zoo.training.Group, *args: Any, **settings: Any) -> float:
        sizes.append(group.members)
        return step * group.members

    monkeypatch.setattr("zoo.training.seconds_per_step", seconds)
    monkeypatch.setattr("zoo.training.train_group", lambda *args, **settings: [])
    ensemble.cotrain(SPEC, replace(RECIPE, epochs=epochs), frames, frames, seeds=range(4))
    assert sizes == ([1, 1, 2, 4, 1] if measured else [1] * (epochs > 5))


def test_members_that_cannot_be_together_are_trained_one_after_another(frames: FrameSet) -> None:
    """A layer that cannot be stacked is no error."""

    @zoo.architecture
    def with_layernorm(inputs: int, classes: int, *, width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.Linear(width, classes))

    spec = Spec("with_layernorm", features=6, context=1, classes=4)
    found = ensemble.cotrain(spec, RECIPE, frames, frames, seeds=range(2))
    for seed, one in enumerate(found):
        assert one.digest == zoo.train(spec, replace(RECIPE, seed=seed, order_seed=0), frames, frames).digest


def test_wrong_numbers_are_refused(frames: FrameSet) -> None:
    """Of seeds, of rates and of members together; and rates that the optimiser cannot have."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seeds": []}, "at least one member, each with a seed"),
        ({"seeds": [1, 2], "learning_rates": [0.1]}, "learning_rates for 2 seeds, got 1"),
        ({"seeds": [1], "together": 0}, "at least 1 member together"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            ensemble.cotrain(SPEC, RECIPE, frames, frames, **arguments)
    with pytest.raises(ValueError, match=r"adam_sgd .* share one learning rate"):
        ensemble.cotrain(
            SPEC, replace(RECIPE, optimiser="adam_sgd"), frames, frames, seeds=[1, 2], learning_rates=[1e-2, 1e-3]
        )


def test_a_member_that_diverges_keeps_its_best_and_the_others_go_on(
    frames: FrameSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second epoch on the first member's loss is NaN: its weights are those of its first epoch."""
    calls = iter(range(100))  # five steps and an evaluation in the first epoch

    def poisoned(*args: Any) -> Any:
        found = losses(*args)
        return found if next(calls) < 6 else found * torch.tensor([[float("nan")], [1.0]])

    one, other = ensemble.cotrain(SPEC, replace(RECIPE, epochs=1), frames, frames, seeds=[3, 5], together=2)
    monkeypatch.setattr("zoo.training.step.losses", poisoned)
    found = ensemble.cotrain(
        SPEC, replace(RECIPE, epochs=3), frames, frames, seeds=[3, 5], together=2, directory=tmp_path
    )
    assert found[0].digest == one.digest
    assert found[1].digest != other.digest
    assert {path.name for path in tmp_path.glob("members-000/epoch-0003*")} == {"epoch-0003-001.safetensors"}


@pytest.mark.usefixtures("processes")
def test_a_study_trains_equal_specs_together(frames: FrameSet, tmp_path: Path) -> None:
    """Each draw has a seed of its own and is what training it alone would give; order and losses are kept."""
    wider = replace(SPEC, options={**SPEC.options, "width": 16})
    recipe = replace(RECIPE, epochs=2, seed=7, order_seed=1)
    found = ensemble.run.train_alike([SPEC, wider, SPEC], recipe, frames, frames)
    assert [one.spec for one in found if one] == [SPEC, wider, SPEC]
    for one, seed in zip(found, (7, 7, 8), strict=True):
        assert one is not None
        assert apart(one, zoo.train(one.spec, replace(recipe, seed=seed), frames, frames)) < 1e-4
    by_two = ensemble.run.train_alike(
        [SPEC, wider, SPEC], recipe, frames, frames, workers=Processes(2), folder=tmp_path
    )
    kept = ensemble.run.train_alike([SPEC, wider, SPEC], recipe, frames, frames, folder=tmp_path)
    assert [one and one.digest for one in found] == [one and one.digest for one in by_two]
    assert [one and one.digest for one in found] == [one and one.digest for one in kept]
    assert len([*tmp_path.glob("[!r]*")]) == 2
    trials = zoo.search.halving([SPEC, wider] * 2, recipe, frames, frames, factor=2, trainer=ensemble.run.train_alike)
    assert sorted(trial.epochs for trial in trials) == [1, 1, 2, 2]


def test_a_study_goes_on_without_those_that_diverge(frames: FrameSet) -> None:
    """At such a rate no member learns; each gets None, and the study continues."""
    wild = replace(RECIPE, optimiser="sgd", learning_rate=1e6)
    steep = replace(SPEC, options={**SPEC.options, "batchnorm": False})
    assert ensemble.run.train_alike([steep, steep], wild, frames, frames) == [None, None]


def models(architecture: str, members: int = 3, **options: object) -> list[nn.Module]:
    """Members of a spec that differ in their seeds."""
    spec = zoo.Spec(architecture, features=4, context=1, classes=5, options=options)
    return [zoo.build(spec, seed=seed) for seed in range(members)]


@pytest.mark.parametrize("architecture", searched())
@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_stack_computes_and_learns_what_its_members_do(architecture: str, batchnorm: bool, shared: bool) -> None:
    """In train mode: logits, gradients of every parameter and running statistics, for shared and own inputs."""
    alone = models(architecture, batchnorm=batchnorm, activation="gelu", dropout=0.3)
    stack = TrainingStack(alone)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    own = x if shared else torch.stack([x, x + 1, x - 1])
    stack.reseed([10, 11, 12])
    together = stack(own)
    together.square().sum().backward()
    state = stack.body.state_dict()
    gradients = {name: p.grad for name, p in stack.body.named_parameters()}
    for m, model in enumerate(alone):
        torch.manual_seed(10 + m)
        logits = model(own if shared else own[m])
        torch.testing.assert_close(together[m], logits, rtol=1e-4, atol=1e-5)
        logits.square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name].view(3, -1)[m].view_as(p), p.grad, rtol=1e-3, atol=1e-4)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name].view(3, -1)[m].view_as(tensor), tensor, rtol=1e-4, atol=1e-5)


def test_an_architecture_of_ones_own_goes_together_where_its_layers_do() -> None:
    """Any module around layers that are known; here with a sum in between."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)
            self.last = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.left(x)) * self.right(x))  # type: ignore[no-any-return]

    alone = [Sum() for _ in range(2)]
    x = torch.randn(3, 4)
    torch.testing.assert_close(TrainingStack(alone)(x), torch.stack([model(x) for model in alone]))


@pytest.mark.parametrize("kind", [nn.Dropout, Dropout])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_members_with_either_dropout_drop_what_each_drops_alone(kind: type[nn.Dropout], p: float) -> None:
    """That of torch in a module of one's own, and that of the built-in architectures."""
    alone = [nn.Sequential(nn.Linear(4, 9), kind(p), nn.Linear(9, 2)) for _ in range(2)]
    stack, x = TrainingStack(alone), torch.randn(5, 4)
    stack.reseed([1, 2])
    for seed, model, together in zip((1, 2), alone, stack(x), strict=True):
        torch.manual_seed(seed)
        torch.testing.assert_close(together, model(x))


class Own(nn.Module):
    """A layer with a parameter that cannot be stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Mixing(nn.Module):
    """Expects (B, features) as its input, which is not so in a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Softmax over the wrong axis."""
        return self.layer(x).softmax(dim=1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 3), nn.GELU())], r"model\.1 is ReLU"),
        ([nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 4))], r"model\.0 is Linear"),
        ([nn.Sequential(nn.Linear(3, 3), Own()) for _ in range(2)], r"cannot stack model\.1, a Own"),
        ([Mixing(), Mixing()], "one after another"),
        ([nn.Identity()], "begin with a Linear"),
    ],
)
def test_what_cannot_be_together_is_refused(members: list[nn.Module], words: str) -> None:
    """Other structures, layers that cannot be stacked, and outputs that differ."""
    with pytest.raises(ValueError, match=words):
        TrainingStack(members)


def frozen_first(trained: bool = False) -> nn.Module:
    """A model whose first layer is to stay as it is."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))
    model[0].requires_grad_(trained)
    return model


def test_frozen_layers_stay_frozen(frames: FrameSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when each member is trained alone, with every layer, statistic and average; and the others learn."""
    monkeypatch.setattr("zoo.models.architectures.ARCHITECTURES", dict(ARCHITECTURES))

    @zoo.architecture
    def reservoir(inputs: int, classes: int) -> nn.Module:
        return frozen_first()

    spec = zoo.Spec("reservoir", features=6, context=0, classes=4)
    for fields in ({}, {"l2": 0.1}, {"optimiser": "sam"}, {"ema": 0.9, "clip_norm": 0.1}):
        recipe = zoo.Recipe.from_dict({"epochs": 2, "batch_size": 32} | fields)
        together = ensemble.cotrain(
            spec, recipe, frames, frames, seeds=[0, 1], weight_decays=[0, 0] if fields else [0, 0.1], together=2
        )
        for seed, one in enumerate(together):
            before = zoo.build(spec, seed=seed).state_dict()
            assert torch.equal(one.tensors["0.weight"], before["0.weight"])
            assert torch.equal(one.tensors["0.bias"], before["0.bias"])
            assert not torch.equal(one.tensors["2.weight"], before["2.weight"])
            assert apart(one, zoo.train(spec, zoo.Recipe.from_dict(one.recipe or {}), frames, frames)) < 1e-4


class Spare(nn.Module):
    """Has a layer that the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.used(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "momentum", "sam"])
def test_parameters_without_a_gradient_are_treated_as_alone(
    optimiser: str, frames: FrameSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decays and penalties of any kind reach them together exactly where they do alone."""
    monkeypatch.setattr("zoo.models.architectures.ARCHITECTURES", dict(ARCHITECTURES))

    @zoo.architecture
    def roomy(inputs: int, classes: int) -> nn.Module:
        return Spare()

    spec = zoo.Spec("roomy", features=6, context=0, classes=4)
    for fields in ({}, {"l1": 0.1, "clip_norm": 0.1}):
        recipe = zoo.Recipe.from_dict({"epochs": 2, "batch_size": 32, "optimiser": optimiser} | fields)
        for one in ensemble.cotrain(spec, recipe, frames, frames, seeds=[0, 1], weight_decays=[0, 0.1], together=2):
            assert apart(one, zoo.train(spec, zoo.Recipe.from_dict(one.recipe or {}), frames, frames)) < 1e-4


def tied() -> nn.Module:
    """Two layers with one weight."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    """A layer that is changed by a hook."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[0].register_forward_hook(doubled)
    return model


def doubled(layer: nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
    """Twice the output."""
    return 2 * output


def scaled_gradient() -> nn.Module:
    """A weight whose gradient is changed by a hook."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[0].weight.register_hook(halved)
    return model


def halved(gradient: torch.Tensor) -> torch.Tensor:
    """Half of it."""
    return gradient / 2


def normed() -> nn.Module:
    """A weight that a hook makes of two others."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
    return model


class Drawing(nn.Sequential):
    """Drops units by a function and not by a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return nn.functional.dropout(super().forward(x), 0.5, self.training)  # type: ignore[no-any-return]


class Scaled(nn.Sequential):
    """Has a number of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__(nn.Linear(6, 6))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scaled in training."""
        x = super().forward(x)
        return x * self.scale if self.training else x


class Pair(nn.Sequential):
    """Answers with two tensors."""

    def forward(self, x: torch.Tensor) -> Any:
        """The output and the input."""
        return super().forward(x), x


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([frozen_first(), frozen_first(trained=True)], "the tensors of '0' are .*True.* instead of .*False"),
        ([tied(), tied()], r"2\.weight has another name as well"),
        ([hooked(), hooked()], "hooks of '0' would not run"),
        ([scaled_gradient(), scaled_gradient()], "hooks of '0' would not run"),
        ([normed(), normed()], "train them one after another"),
        ([Drawing(nn.Linear(6, 6)), Drawing(nn.Linear(6, 6))], "draw random numbers in training"),
        ([Scaled(1.0), Scaled(2.0)], r"'scale' of '' is 2\.0 instead of 1\.0"),
        ([nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None)) for _ in range(2)], "cannot stack model.1"),
        ([Pair(nn.Linear(6, 6)), Pair(nn.Linear(6, 6))], "answer .* with a tensor"),
    ],
)
def test_what_a_stack_would_lose_is_refused(members: list[nn.Module], words: str) -> None:
    """Frozen layers, names of one tensor, hooks, random numbers, attributes; and the models stay as they are."""
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in members]
    with pytest.raises(ValueError, match=words):
        TrainingStack(members)
    for model, state in zip(members, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_what_cannot_be_stacked_is_trained_one_by_one(frames: FrameSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what cannot be kept is refused before the first epoch, whatever is to be stepped together."""
    monkeypatch.setattr("zoo.models.architectures.ARCHITECTURES", dict(ARCHITECTURES))

    @zoo.architecture
    def bound(inputs: int, classes: int) -> nn.Module:
        return nn.Sequential(tied(), nn.Linear(6, classes))

    @zoo.architecture
    def pairs(inputs: int, classes: int) -> nn.Module:
        return Pair(nn.Linear(inputs, classes))

    spec, recipe = zoo.Spec("bound", features=6, context=0, classes=4), zoo.Recipe(epochs=2, batch_size=32)
    for one in ensemble.cotrain(spec, recipe, frames, frames, seeds=[0, 1]):
        assert torch.equal(one.tensors["0.0.weight"], one.tensors["0.2.weight"])
        alone = zoo.train(spec, zoo.Recipe.from_dict(one.recipe or {}), frames, frames)
        assert one.digest == alone.digest
    for together in (None, 1, 2):
        with pytest.raises(ValueError, match=r"from 'pairs' .* got a tuple of 2"):
            ensemble.cotrain(
                zoo.Spec("pairs", features=6, context=0, classes=4), recipe, frames, frames, together=together
            )


def test_memory_that_runs_out_ends_the_measuring(frames: FrameSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of the sizes before are compared."""

    def seconds(group: zoo.training.Group, *arguments: object, **settings: object) -> float:
        if group.members > 2:
            raise torch.OutOfMemoryError("none left")
        return 1.0

    monkeypatch.setattr(zoo.training, "seconds_per_step", seconds)
    recipes = [replace(RECIPE, seed=seed) for seed in range(8)]
    assert measure_together(SPEC, recipes, frames) == {1: 1.0, 2: 0.5}


def test_one_member_that_diverges_does_not_hold_up_the_others_in_float16(frames: FrameSet) -> None:
    """Its NaN is in no gradient that decides whether a step is taken."""
    recipes = [zoo.Recipe(batch_size=32, seed=seed, precision="float16", order_seed=0) for seed in (0, 1)]
    group = stacked_group(SPEC, recipes)
    stepper = Stepper(group, "cpu")
    weight = group.module.get_parameter("0.0.weight")
    rows(weight, 2)[1].data.fill_(torch.nan)
    before = rows(weight, 2)[0].clone()
    [batch] = next(Batches(frames, SPEC, recipes).epoch(1))
    scale = stepper.scaler.get_scale()
    stepper.step([batch], torch.tensor([0.01, 0.01]))
    assert not torch.equal(rows(weight, 2)[0], before)
    assert stepper.scaler.get_scale() == scale
    assert rows(weight, 2)[0].isfinite().all()
