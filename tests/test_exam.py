"""The admission exam: usable answers pass whatever their form, the others are refused with the model's name."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zoo
from zoo.checkpoint import examine

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
