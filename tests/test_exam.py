"""The admission exam: usable answers pass whatever their form, the others are refused with the model's name."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import ensemble
import zoo
from zoo.checkpoint import decode, encode, examine, logits_of

OWN = torch.Generator()
ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def linear(outputs: int = 2) -> nn.Linear:
    """The same each time."""
    torch.manual_seed(0)
    return nn.Linear(3, outputs)


class Says(nn.Module):
    """A linear layer whose answer a function changes."""

    def __init__(self, change: Callable[[Tensor, Tensor], Any], outputs: int = 2) -> None:
        super().__init__()
        self.layer, self.change, self.calls = linear(outputs), change, 0

    def forward(self, x: Tensor) -> Any:
        """`change(logits, x)`."""
        self.calls += 1
        return self.change(self.layer(x), x)


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "one output": (lambda: linear(1), r"got \(6, 1\)"),
    "a vector": (lambda: Says(lambda y, x: y[:, 0]), r"got \(6,\)"),
    "one row for all": (lambda: Says(lambda y, x: y[:1]), r"got \(1, 2\)"),
    "classes first": (lambda: Says(lambda y, x: y.T), r"got \(2, 6\)"),
    "one more axis": (lambda: Says(lambda y, x: y[..., None]), r"got \(6, 2, 1\)"),
    "a row without its axis": (lambda: Says(lambda y, x: y.squeeze(0)), r"for inputs \(1, 3\), got \(2,\)"),
    "a tuple": (lambda: Says(lambda y, x: (y, x)), "a tuple of 2; give the tensor among them with output="),
    "a dictionary": (lambda: Says(lambda y, x: {"logits": y}), r"a dict with \['logits'\]"),
    "nothing": (lambda: Says(lambda y, x: None), "got NoneType"),
    "an array": (lambda: Says(lambda y, x: y.numpy()), "got ndarray"),
    "classes instead of logits": (lambda: Says(lambda y, x: (y > 0).long()), "as floats, got a tensor of torch.int64"),
    "complex numbers": (lambda: Says(lambda y, x: y.to(torch.complex64)), "torch.complex64"),
    "a sparse tensor": (lambda: Says(lambda y, x: y.to_sparse()), "torch.sparse_coo"),
    "no memory": (lambda: Says(lambda y, x: y.to("meta")), "on the meta device"),
    "NaN": (lambda: Says(lambda y, x: y / 0 * 0), "NaN or infinity"),
    "infinity": (lambda: Says(lambda y, x: y.exp() * torch.inf), "NaN or infinity"),
    "no class at all": (lambda: Says(lambda y, x: torch.full_like(y, -torch.inf)), "NaN or infinity"),
    "dropout in evaluation": (lambda: Says(lambda y, x: functional.dropout(y, 0.5)), "random in evaluation"),
    "NumPy's noise": (lambda: Says(lambda y, x: y + np.random.standard_normal()), "random in evaluation"),  # noqa: NPY002
    "seldom another answer": (lambda: Says(lambda y, x: y + (torch.rand(()) < 0.5)), "random in evaluation"),
    "its own generator": (
        lambda: Says(lambda y, x: y + torch.randn(y.shape, generator=OWN)),
        "random in evaluation",
    ),
    "a state": (lambda: (model := Says(lambda y, x: y * model.calls)), "keeps a state"),
    "an error of its own": (lambda: linear(2).double(), r"from 'a' to inputs \(6, 3\) of torch.float32, got Runtime"),
    "no single row": (lambda: Says(lambda y, x: y if len(x) > 1 else 1 / 0), "got ZeroDivisionError"),
    "a lazy layer": (lambda: nn.Sequential(nn.LazyLinear(2)), r"lazy layers in 'a': '0' \(LazyLinear\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_answers_are_refused_by_name(fault):
    """The message names the model and what came."""
    make, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message) as refusal:
        examine(make(), ROWS, 2, name="a")
    assert "'a'" in str(refusal.value)


USABLE: dict[str, Callable[[], Any]] = {
    "a module": linear,
    "a function": lambda: linear().forward,
    "an object with logits": lambda: Says(lambda y, x: SimpleNamespace(logits=y, loss=None)),
    "half precision": lambda: Says(lambda y, x: y.bfloat16()),
    "a class of probability zero": lambda: Says(lambda y, x: torch.stack([y[:, 0], y[:, 0] - torch.inf], dim=1)),
    "noise in a row of small logits": lambda: Says(lambda y, x: y * (x[:, :1] != ROWS[-1, 0]) + 1e-7 * len(x)),
    "equal logits": lambda: Says(lambda y, x: torch.zeros_like(y)),
    "a random number without consequence": lambda: Says(lambda y, x: y + 0 * torch.rand(())),
    "a wide model": lambda: nn.Sequential(
        *[layer for _ in range(20) for layer in (nn.LazyLinear(500), nn.Tanh())], nn.LazyLinear(2)
    ),
    "logits in double precision": lambda: Says(lambda y, x: y.double()),
    "a batch norm with statistics": lambda: nn.Sequential(linear(), nn.BatchNorm1d(2)),
}


@pytest.mark.parametrize("kind", USABLE)
def test_usable_answers_pass_and_leave_no_trace(kind):
    """Modes, rows and all generators are as before, and the logits are the model's."""
    model = USABLE[kind]()
    if isinstance(model, nn.Module):
        model(ROWS)
        model.train()
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    before = ROWS.clone()
    exam = examine(model, ROWS, 2, name="a")
    assert exam.logits.shape == (6, 2)
    assert not exam.writes_input
    assert not exam.needs_whole_batch
    assert torch.equal(ROWS, before)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    assert not isinstance(model, nn.Module) or all(part.training for part in model.modules())


def test_each_part_of_a_model_keeps_its_mode():
    """Also where a frozen part was in evaluation mode, and where the model cannot answer."""
    model = nn.Sequential(linear(3), nn.Dropout(), linear(1)).train()
    model[1].eval()
    with pytest.raises(ValueError, match="got"):
        examine(model, ROWS, 2, name="a")
    assert [part.training for part in model.modules()] == [True, True, False, True]


@pytest.mark.parametrize("write", [Tensor.relu_, Tensor.abs_, lambda x: x.detach().add_(1), lambda x: x.data.mul_(2)])
def test_a_model_that_writes_into_its_input_is_reported(write):
    """Also where these rows do not change by it; the rows themselves are copies."""
    rows = ROWS.abs()
    exam = examine(Says(lambda y, x: (write(x), y)[1]), rows, 2, name="a")
    assert exam.writes_input
    assert torch.equal(rows, ROWS.abs())
    assert torch.equal(exam.logits, linear()(rows))


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(2, track_running_stats=False)),  # refuses a single row
        lambda: Says(lambda y, x: y - y.mean(0)),
        lambda: Says(lambda y, x: y + torch.arange(len(y))[:, None]),
        lambda: Says(lambda y, x: functional.softmax(y, dim=0)),
    ],
)
def test_answers_that_depend_on_the_other_rows_are_reported(model):
    """They can be run whole."""
    assert examine(model(), ROWS, 2, name="a").needs_whole_batch


def test_models_that_differ_only_in_an_attribute_have_other_records():
    """Equal weights are not yet the same model."""
    cold, hot = (Says(lambda y, x, t=t: y / t + x[:, :2]) for t in (1, 10))
    same = Says(lambda y, x: y / 1 + x[:, :2])
    cold, hot, same = (examine(model, ROWS, 2, name="a").record["digest"] for model in (cold, hot, same))
    assert cold == same != hot


def test_no_rows_are_refused():
    """There is nothing to see."""
    with pytest.raises(ValueError, match="at least one row"):
        examine(linear(), ROWS[:0], 2, name="a")


# ---- what is registered is what answers


class Made(nn.Module):
    """A linear layer, whatever `set_up` adds, and a forward pass."""

    def __init__(self, set_up: Callable[[Any], Any], answer: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        set_up(self)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        """`answer(self, x)`."""
        return self.answer(self, x)


def chain(*layers: nn.Module, tie: bool = False) -> nn.Sequential:
    """Three to two by way of the layers; where tied, the first two share a weight."""
    net = nn.Sequential(*layers, nn.Linear(4, 2))
    if tie:
        net[1].weight = net[0].weight
    return net


def window(net: nn.Module) -> nn.Module:
    """With a buffer that is in no state_dict."""
    net.register_buffer("window", torch.full((4,), 7.0), persistent=False)
    net.register_forward_pre_hook(lambda module, given: (given[0] * module.window[:3],))
    return net


def renamed(module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
    """A hook that gives entries of a state_dict other names."""
    for name in list(state):
        state[f"own_{name}"] = state.pop(name)


def hooked(net: nn.Module, hook: Callable[..., None]) -> nn.Module:
    """With a hook on its state_dict."""
    net._register_state_dict_hook(hook)
    return net


class Extra(nn.Linear):
    """State that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        """A setting."""
        return {"setting": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Nothing to set."""


def constant(values: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A model that multiplies its input by a constant of its builder's, which a closure holds."""

    def make() -> nn.Module:
        held = values()
        return Made(lambda m: None, lambda m, x: m.layer(x * held))

    return make


def attribute(values: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Likewise, as a plain attribute."""
    return lambda: Made(lambda m: setattr(m, "held", values()), lambda m, x: m.layer(x * m.held))


def buffer(values: Callable[[], Tensor], *, persistent: bool) -> Callable[[], nn.Module]:
    """Likewise, as a buffer."""
    return lambda: Made(
        lambda m: m.register_buffer("held", values(), persistent=persistent), lambda m, x: m.layer(x * m.held)
    )


def transposed() -> nn.Module:
    """Two layers of one memory, read across."""
    net = chain(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4))
    net[1].weight = nn.Parameter(net[0].weight.data.t())
    return net


def flipped(weight: Tensor) -> nn.Parameter:
    """The same values, column by column in memory."""
    return nn.Parameter(weight.detach().t().contiguous().t())


HALVES = torch.arange(6.0).reshape(2, 3)
three = partial(torch.linspace, 1, 2, 3)
KEPT: dict[str, Callable[[], nn.Module]] = {
    "a plain tensor": attribute(three),
    "a tensor in a closure": constant(three),
    "tensors in a list": lambda: Made(lambda m: setattr(m, "held", [three()]), lambda m, x: m.layer(x * m.held[0])),
    "a tensor of the program": attribute(lambda: HALVES[1]),
    "a NumPy array": buffer(lambda: torch.from_numpy(np.ones(3, np.float32) * 2), persistent=False),
    "a buffer in no state_dict": buffer(three, persistent=False),
    "a drawn buffer in the state_dict": buffer(lambda: torch.randn(3), persistent=True),
    "a drawn permutation": lambda: Made(
        lambda m: m.register_buffer("order", torch.randperm(3)), lambda m, x: m.layer(x[:, m.order])
    ),
    "two buffers in one memory": lambda: Made(
        lambda m: [m.register_buffer(name, row) for name, row in zip("ab", HALVES.clone(), strict=True)],
        lambda m, x: m.layer(x * m.a + m.b),
    ),
    "no value, no element, one element": lambda: Made(
        lambda m: [m.register_buffer(n, t) for n, t in (("a", None), ("b", torch.ones(0)), ("c", torch.tensor(3)))],
        lambda m, x: m.layer(x) * m.c,
    ),
    "a mask": buffer(lambda: torch.tensor([True, False, True]), persistent=True),
    "tied weights": lambda: chain(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4), tie=True),
    "tied weights and a window": lambda: window(chain(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4), tie=True)),
    "a layer used twice": lambda: chain(*[nn.Linear(3, 3)] * 2, nn.Linear(3, 4)),
    "tied and transposed": transposed,
    "a view of a weight": lambda: Made(
        lambda m: setattr(m, "row", m.layer.weight[:1]), lambda m, x: m.layer(x) + x @ m.row.t()
    ),
    "a transposed parameter": lambda: Made(
        lambda m: setattr(m, "w", nn.Parameter(torch.randn(2, 3).t())), lambda m, x: x @ m.w
    ),
    "channels last": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 3)),
        nn.Conv2d(1, 4, (1, 3)).to(memory_format=torch.channels_last),
        nn.Conv2d(4, 2, 1).to(memory_format=torch.channels_last),
        nn.Flatten(),
    ),
    "weight_norm by a hook": lambda: chain(nn.utils.weight_norm(nn.Linear(3, 4))),
    "spectral_norm by a hook": lambda: chain(nn.utils.spectral_norm(nn.Linear(3, 4))),
    "weight_norm": lambda: chain(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))),
    "spectral_norm": lambda: chain(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))),
    "overflow far from the probe": lambda: Made(lambda m: None, lambda m, x: (20 * m.layer(x)).exp() - 1),
    "an answer with logits": lambda: Made(lambda m: None, lambda m, x: SimpleNamespace(logits=m.layer(x))),
}
DRAWN = {
    "a drawn tensor": attribute(lambda: torch.randn(3)),
    "a drawn tensor in a closure": constant(lambda: torch.randn(3)),
    "a drawn buffer": buffer(lambda: torch.randn(3), persistent=False),
    "NumPy's draw": constant(lambda: np.random.standard_normal()),  # noqa: NPY002
    "Python's draw": attribute(random.random),
}
UNKEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "extra state": (lambda: Extra(3, 2), "_extra_state: dict, which is no tensor"),
    "names of a hook": (lambda: hooked(nn.Linear(3, 2), renamed), "own_weight: .*made by a hook"),
    "values of a hook": (
        lambda: hooked(nn.Linear(3, 2), lambda m, state, *_: state.update({n: t * 2 for n, t in state.items()})),
        "weight: .*made by a hook",
    ),
    "complex numbers": (buffer(lambda: torch.ones(3, dtype=torch.complex64), persistent=True), "held of torch.complex"),
    "a sparse buffer": (
        lambda: Made(lambda m: m.register_buffer("held", torch.eye(3).to_sparse()), lambda m, x: m.layer(x)),
        "held: a quantised, sparse",
    ),
    "repeated memory": (
        lambda: Made(lambda m: setattr(m, "gain", nn.Parameter(torch.ones(1).expand(2))), lambda m, x: m.layer(x)),
        "gain: elements that share one place",
    ),
    "a lazy layer": (lambda: nn.Sequential(nn.LazyLinear(2)), r"lazy layers in .*'0' \(LazyLinear\)"),
    **{kind: (make, "answer as the one in hand, but") for kind, make in DRAWN.items()},
}
ALTERED: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "activation": (lambda m: m.__setitem__(2, nn.Tanh()), r"'2' is Tanh\(\) instead of ReLU\(\)"),
    "activation alike near zero": (lambda m: m.__setitem__(2, nn.ReLU6()), r"'2' is ReLU6\(\)"),
    "form of GELU": (lambda m: m.__setitem__(4, nn.GELU("tanh")), r"'4' is GELU\(approximate='tanh'\)"),
    "epsilon": (lambda m: setattr(m[1], "eps", 1e-3), "'1' is BatchNorm1d.*eps=0.001"),
    "softmax at the end": (lambda m: m.append(nn.Softmax(-1)), r"'6' is Softmax\(dim=-1\) instead of nothing"),
    "hook": (lambda m: m[0].register_forward_hook(lambda m, given, y: y.abs()), "as hook instead of"),
    "forward": (lambda m: setattr(m, "forward", lambda x: m[5](m[:3](x))), "'forward' is .*lambda"),
}


def layered() -> nn.Sequential:
    """A network that is altered after it was built."""
    first = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU()
    return nn.Sequential(*first, nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], nn.Module]], zoo.Spec]:
    """Register an architecture of (3 -> 2); the table is as before after the test."""
    monkeypatch.setattr("zoo.models.architectures.ARCHITECTURES", {})

    def enter(make: Callable[[], nn.Module]) -> zoo.Spec:
        def examined(inputs: int, classes: int) -> nn.Module:
            return make()

        zoo.architecture(examined)
        return zoo.Spec("examined", features=3, context=0, classes=2)

    return enter


def says(module: nn.Module) -> Tensor:
    """Its logits."""
    return examine(module, ROWS, 2, name="a").logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KEPT)
def test_what_is_registered_is_what_answers(kind, entered, tmp_path):
    """Loaded alone and as members of an ensemble, whatever the builder makes beside the parameters."""
    spec = entered(KEPT[kind])
    registry = zoo.Registry(tmp_path / "registry.json")
    models = [zoo.build(spec, seed=seed) for seed in (0, 1)]
    for name, model in zip("ab", models, strict=True):
        registry.register(name, model, spec=spec, classes=["no", "yes"])
        assert torch.equal(says(registry.load(name)), says(model))
    assert registry.verify(probe=True) == []
    if kind != "an answer with logits":
        found = ensemble.load(registry, "*").log_probabilities(ROWS)
        wanted = torch.stack([says(model).log_softmax(-1) for model in models])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", UNKEPT)
def test_what_tensors_alone_cannot_hold_is_refused_by_name(kind, entered, tmp_path):
    """Nothing is registered, nothing left on the disk."""
    make, message = UNKEPT[kind]
    spec = entered(make)
    with pytest.raises(ValueError, match=message):
        zoo.Registry(tmp_path / "registry.json").register("m", make(), spec=spec, classes=["no", "yes"])
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("kind", ALTERED)
def test_a_module_changed_after_it_was_built_is_refused(kind, entered):
    """The message names what differs from the architecture."""
    alter, message = ALTERED[kind]
    spec = entered(layered)
    model = zoo.build(spec, seed=0)
    alter(model)
    with pytest.raises(zoo.CheckpointError, match=message):
        zoo.Checkpoint.from_module(model, spec, ["no", "yes"])


def test_changes_without_consequence_are_none(entered):
    """Dropout, which is not active, weights in another order in memory, a layer trained further."""
    spec = entered(lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)))
    model = zoo.build(spec, seed=0)
    model[1], model[2] = nn.Identity(), nn.ReLU(inplace=True)
    model[0].weight, model[3].weight = flipped(model[0].weight), flipped(model[3].weight)
    model.requires_grad_(False)
    kept = zoo.Checkpoint.from_module(model, spec, ["no", "yes"]).to_module()
    torch.testing.assert_close(says(kept), says(model), rtol=1e-5, atol=1e-6)  # another order of sums


def test_tied_weights_with_two_values_are_refused_by_name(entered):
    """What the model would be is not what the tensors say."""
    spec = entered(KEPT["tied weights"])
    model = zoo.build(spec, seed=0)
    model[1].weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(zoo.CheckpointError, match=r"0\.weight and 1\.weight: one tensor, with different values"):
        zoo.Checkpoint.from_module(model, spec, ["no", "yes"])


def test_an_architecture_that_is_defined_again_counts_as_it_is_now(entered, tmp_path):
    """Also where only something that its builder calls has changed: no tensor is broadcast, none left out."""
    sizes = {"gain": 1}

    def make() -> nn.Module:
        return Made(
            lambda m: setattr(m, "gain", nn.Parameter(torch.ones(sizes["gain"]))), lambda m, x: m.layer(x) * m.gain
        )

    spec = entered(make)
    registry = zoo.Registry(tmp_path / "registry.json")
    old = zoo.Checkpoint.from_module(zoo.build(spec, seed=0), spec, ["no", "yes"])
    registry.register("old", old)
    sizes["gain"] = 2
    uses = [
        old.to_module,
        lambda: registry.load("old"),
        lambda: registry.stacked(["old"]),
        lambda: ensemble.load(registry, "old"),
        lambda: registry.register("again", old),
        lambda: zoo.checkpoint.restore(zoo.build(spec), old.tensors),
    ]
    for use in uses:
        with pytest.raises(zoo.CheckpointError, match=r"gain: expected shape \(2,\), got \(1,\)"):
            use()
    registry.register("new", zoo.build(spec, seed=0), spec=spec, classes=["no", "yes"])
    assert registry.load("new").gain.shape == (2,)


def test_answers_over_the_whole_batch_are_measured_over_the_whole_batch(entered, tmp_path, monkeypatch, frames):
    """As they were when the recorded figure was measured, however many frames there are."""
    monkeypatch.setattr("zoo.training.step._AT_ONCE", 256)
    more = frames.features.repeat(3, 1)  # 414 frames
    frames = zoo.FrameSet(more, frames.labels.repeat(3), torch.tensor([0, len(more)]), frames.classes)
    entered(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    spec = zoo.Spec("examined", features=6, context=0, classes=4)
    model = zoo.build(spec, seed=0).eval()
    loss = functional.cross_entropy(model(zoo.windows(frames, torch.arange(len(frames)), 0)), frames.labels)
    metrics = {"valid/loss": {"value": loss.item(), "frames": frames.fingerprint}}
    registry = zoo.Registry(tmp_path / "registry.json")
    registry.register("m", model, spec=spec, classes=frames.classes, metrics=metrics)
    (row,) = registry.measure("m", frames)
    assert row["measured"] == pytest.approx(loss.item(), rel=1e-6)


def test_a_wrapped_model_is_registered_without_its_wrapper(entered, tmp_path):
    """Where it is asked for; without that, the refusal names the prefix and the option."""
    spec = entered(lambda: nn.Linear(3, 2))
    registry = zoo.Registry(tmp_path / "registry.json")
    for name, wrapped in {
        "parallel": nn.DataParallel(linear()),
        "compiled": torch.compile(linear()),
        "nested": nn.ModuleDict({"net": nn.Sequential(linear())}),
    }.items():
        with pytest.raises(zoo.CheckpointError, match=r"begin with '.*strip it with strip_prefix=True"):
            registry.register(name, wrapped, spec=spec, classes=["no", "yes"])
        registry.register(name, wrapped, spec=spec, classes=["no", "yes"], strip_prefix=True)
        assert torch.equal(says(registry.load(name)), says(linear()))


def test_what_cannot_answer_is_not_registered(tmp_path, monkeypatch):
    """Neither as a module nor as a checkpoint; nothing is left on the disk."""

    def pair_for_test(inputs: int, classes: int) -> nn.Module:
        return Says(lambda y, x: (y, x), classes)

    monkeypatch.setattr("zoo.models.architectures.ARCHITECTURES", {})
    zoo.architecture(pair_for_test)
    spec = zoo.Spec("pair_for_test", features=3, context=0, classes=2)
    module = zoo.build(spec, seed=0)
    checkpoint = zoo.Checkpoint(spec, module.state_dict(), ("a", "b"))
    for model in (module, checkpoint):
        with pytest.raises(zoo.CheckpointError, match=r"'pair_for_test'.* got a tuple of 2.*ANSWERS"):
            zoo.Registry(tmp_path / "registry.json").register("m", model, spec=spec, classes=["a", "b"])
    assert [*tmp_path.iterdir()] == []


# ---- at random, out of a grammar with faults in it

PARTS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda n: nn.Linear(n, n),
    "norm": nn.BatchNorm1d,
    "norm without statistics": lambda n: nn.BatchNorm1d(n, track_running_stats=False),
    "relu": lambda n: nn.ReLU(),
    "gelu": lambda n: nn.GELU(),
    "writes": lambda n: nn.ReLU(inplace=True),
    "dropout": lambda n: nn.Dropout(0.5),
    "drawn in evaluation": lambda n: Then(lambda x: functional.dropout(x, 0.5)),
    "weight_norm": lambda n: nn.utils.weight_norm(nn.Linear(n, n)),
    "spectral_norm": lambda n: nn.utils.spectral_norm(nn.Linear(n, n)),
    "parametrised": lambda n: nn.utils.parametrizations.weight_norm(nn.Linear(n, n)),
    "a constant": lambda n: Then(lambda x, held=None: x * held, torch.linspace(1, 2, n)),
    "a drawn constant": lambda n: Then(lambda x, held=None: x + held, torch.randn(n)),
    "a kept constant": lambda n: Then(lambda x, held=None: x - held, nn.Parameter(torch.randn(n))),
    "extra state": lambda n: Extra(n, n),
    "a name of a hook": lambda n: hooked(nn.Linear(n, n), renamed),
    "lazy": lambda n: nn.LazyLinear(n),
    "complex": lambda n: Then(lambda x, held=None: (x * held).abs(), nn.Parameter(torch.ones(n, dtype=torch.cfloat))),
    "transposed": lambda n: Then(lambda x, held=None: x @ held, nn.Parameter(torch.randn(n, n).t())),
}
ENDS: dict[str, Callable[[Tensor], Any]] = {
    "logits": lambda y: y,
    "an object": lambda y: SimpleNamespace(logits=y),
    "a tuple": lambda y: (y, y),
    "one column": lambda y: y[:, :1],
    "a vector": lambda y: y.sum(dim=1),
    "squeezed": Tensor.squeeze,
    "classes": lambda y: y.argmax(dim=1),
    "probabilities": lambda y: y.softmax(dim=1),
    "not finite": lambda y: y / y.new_zeros(()),
    "over the batch": lambda y: y - y.mean(dim=0),
}
CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "none": lambda m: None,
    "frozen": lambda m: m.requires_grad_(False),
    "trained": lambda m: [p.data.add_(0.1) for p in m.parameters() if p.is_floating_point()],
    "a layer": lambda m: m.__setitem__(0, nn.Tanh()),
    "a hook": lambda m: m[0].register_forward_hook(lambda module, given, y: y + 1),
    "a tie": lambda m: m[0]._parameters.update(weight=m[-2].weight) if "weight" in m[0]._parameters else None,
    "half": lambda m: m.half(),
    "NaN": lambda m: next(m.parameters()).data.fill_(torch.nan),
    "a wrapper": lambda m: nn.Sequential(m),
}


class Then(nn.Module):
    """A function with a tensor of its own: a parameter, or a plain attribute."""

    def __init__(self, function: Callable[..., Any], held: Tensor | None = None) -> None:
        super().__init__()
        self.function, self.held = function, held

    def forward(self, x: Tensor) -> Any:
        """What the function makes of it."""
        return self.function(x) if self.held is None else self.function(x, self.held)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(st.sampled_from([*PARTS]), max_size=4),
    repeated=st.booleans(),
    end=st.sampled_from(["logits"] * 5 + [*ENDS]),
    change=st.sampled_from(["none"] * 5 + [*CHANGES]),
    seed=st.integers(0, 3),
)
def test_a_random_model_is_refused_or_comes_back_as_it_was(parts, repeated, end, change, seed):
    """On other rows than those of the probe, near and far; no error of any other kind."""

    def drawn_at_random(inputs: int, classes: int) -> nn.Module:
        body = [PARTS[part](3) for part in parts]
        return nn.Sequential(*body, *(body if repeated else []), nn.Linear(3, 2), Then(ENDS[end]))

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr("zoo.models.architectures.ARCHITECTURES", {})
        zoo.architecture(drawn_at_random)
        spec = zoo.Spec("drawn_at_random", features=3, context=0, classes=2)
        try:
            model = zoo.build(spec, seed=seed)
            CHANGES[change](model)
            kept = zoo.Checkpoint.from_module(model, spec, ["no", "yes"])
            again = decode(encode(kept)).to_module()
        except ValueError:  # and no other error
            return
        for rows in (ROWS, 100 * ROWS):
            answers = [logits_of(module.eval()(rows.clone()), rows, 2, "a") for module in (model, again)]
            torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4 * float(answers[0].abs().max()))
