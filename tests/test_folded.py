"""The members and the rule as one module: it answers as the ensemble does, and so does its ONNX file."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import ensemble
import zoo
import zoo.onnx
from ensemble.rules import RULES, BayesVote, Cascade, Chain, ClasswiseMean, LogPool, Stacked, Temperature, declared
from ensemble.run.folded import Folded
from zoo import FrameSet


def spec(context: int, **change: Any) -> zoo.Spec:
    """A small residual network."""
    fields = {"features": 6, "context": context, "classes": 4, "options": {"width": 8, "depth": 1}}
    return zoo.Spec(**({"architecture": "basic"} | fields | change))


@pytest.fixture
def members(tmp_path: Path) -> ensemble.Members:
    """Five members: two and two of one structure and of different contexts, mixed in order, and one other."""
    registry = zoo.Registry(tmp_path / "members.json")
    other = spec(2, architecture="mlp", options={"widths": (5,), "activation": "gelu", "batchnorm": False})
    for number, one in enumerate((spec(1), spec(3), spec(1), other, spec(3))):
        registry.register(f"m{number}", zoo.build(one, seed=number), spec=one, classes=[*"abcd"])
    return ensemble.load(registry, "m*")


def fitted() -> dict[str, ensemble.Rule]:
    """Every kind of rule with numbers, over five members and four classes."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Any:
        return torch.rand(*shape, generator=generator).tolist()

    calibrated = Chain((Temperature(tuple(numbers(5))), ensemble.mean, Temperature(1.5)))
    tables = [BayesVote(numbers(5, 4, 4), numbers(4)), Stacked(numbers(4, 5, 4), numbers(4))]
    return {
        "weighted": ensemble.WeightedMean(numbers(5)),
        "class-wise": ClasswiseMean(numbers(5), numbers(4, 5)),
        "log pool": LogPool(numbers(5)),
        "calibrated": calibrated,
        "bayes vote": tables[0],
        "stacked": tables[1],
        "power": partial(ensemble.rules.power_mean, power=0.05),
    }


def test_every_rule_in_one_file(members: ensemble.Members, frames: FrameSet, tmp_path: Path) -> None:
    """All continuous rules of the table and all fitted ones, at batches of 1, 7 and all frames."""
    rules = {name: rule for name, rule in {**RULES, **fitted()}.items() if declared(rule).continuous}
    assert [name for name in RULES if name not in rules] == ["borda"]
    model = Folded(members, lambda p: torch.cat([rule(p) for rule in rules.values()]))
    file = zoo.onnx.write(model, tmp_path / "r.onnx", contract={"input": {"kind": "windows"}}, columns=42).path
    session = onnxruntime.InferenceSession(file)
    x = zoo.windows(frames, torch.arange(len(frames)), 3)
    for count in (1, 7, len(frames)):
        came = session.run(["probabilities"], {"windows": x[:count].numpy()})[0].reshape(len(rules), count, 4)
        wanted = members.log_probabilities(x[:count]).exp()
        for name, rows in zip(rules, came, strict=True):
            np.testing.assert_allclose(rows, rules[name](wanted), atol=1e-5, err_msg=name)


def test_features_in(members: ensemble.Members, frames: FrameSet, tmp_path: Path) -> None:
    """From raw features of a recording, whatever the members' contexts; and each member's probabilities."""
    final = ensemble.Ensemble(members, ensemble.WeightedMean([1, 2, 3, 4, 5]))
    final.to_onnx(tmp_path / "e.onnx", with_windows=True, each=True)
    session = onnxruntime.InferenceSession(tmp_path / "e.onnx")
    for recording in range(frames.recordings):
        one = frames.select(torch.tensor([recording]))
        probabilities, best, each = session.run(None, {"features": one.features.numpy()})
        np.testing.assert_allclose(probabilities, final.predict_proba(one), atol=1e-6)
        np.testing.assert_allclose(each, ensemble.collect(members, one).probabilities, atol=1e-6)
        assert [final.classes_[index] for index in best] == final.predict(one).tolist()


def test_members_prepared_in_different_ways(frames: FrameSet, tmp_path: Path) -> None:
    """They share no windows, so that only the raw features can be the input."""
    specs = {"a": spec(1), "b": spec(2, normalisation="none")}
    made = {name: zoo.build(one, seed=1) for name, one in specs.items()}
    final = ensemble.Ensemble(ensemble.from_modules(made, classes=[*"abcd"], specs=specs), ensemble.mean)
    with pytest.raises(ValueError, match=r"share one input, .*; export them with windows, from the raw features"):
        final.to_onnx(tmp_path / "e.onnx")
    final.to_onnx(tmp_path / "e.onnx", with_windows=True)
    one = frames.select(torch.tensor([0]))
    rows = onnxruntime.InferenceSession(tmp_path / "e.onnx").run(None, {"features": one.features.numpy()})[0]
    np.testing.assert_allclose(rows, final.predict_proba(one), atol=1e-6)


def test_classes_in_another_order(tmp_path: Path) -> None:
    """A member whose outputs stand in another order is lined up by name, as everywhere."""
    modules = {name: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)) for name in "ab"}
    members = ensemble.from_modules(modules, classes={"a": ["x", "y", "z"], "b": ["z", "x", "y"]})
    final = ensemble.Ensemble(members, ensemble.mean)
    final.to_onnx(tmp_path / "e.onnx")
    x = torch.randn(9, 3)
    rows = onnxruntime.InferenceSession(tmp_path / "e.onnx").run(None, {"inputs": x.numpy()})[0]
    np.testing.assert_allclose(rows, final.predict_proba(x), atol=1e-6)


def test_members_without_influence_stay_out(members: ensemble.Members, tmp_path: Path) -> None:
    """The file holds those of positive weight only, and says which."""
    final = ensemble.Ensemble(members, ensemble.WeightedMean([0, 1, 0, 0, 3], members=members.names))
    whole = ensemble.Ensemble(members, ensemble.mean).to_onnx(tmp_path / "whole.onnx")
    written = final.to_onnx(tmp_path / "e.onnx")
    known = json.loads(Path(f"{written.path}.json").read_text())
    assert [member["name"] for member in known["members"]] == ["m1", "m4"]
    assert known["rule"]["weights"] == [0.25, 0.75]
    assert written.size < whole.size
    x = torch.randn(5, 42)
    rows = onnxruntime.InferenceSession(written.path).run(None, {"windows": x.numpy()})[0]
    np.testing.assert_allclose(rows, final.predict_proba(x), atol=1e-6)


class Odd(nn.Module):
    """A model that is no chain of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Divides by its input's norm."""
        return self.last(self.first(x) / x.norm(dim=1, keepdim=True))


def test_members_that_do_not_fold(tmp_path: Path) -> None:
    """One line says which, why, and what can be exported."""
    final = ensemble.Ensemble(ensemble.from_modules({"odd": Odd()}, classes="xyz"), ensemble.mean)
    words = r"cannot export \['odd'\] as matrix products: .*; models of Linear, BatchNorm1d, activations and sums can"
    with pytest.raises(ValueError, match=words):
        final.to_onnx(tmp_path / "e.onnx")
    assert not list(tmp_path.iterdir())


def test_a_rule_that_cannot_be_traced(members: ensemble.Members, tmp_path: Path) -> None:
    """A rule of the user's own that looks at its values is refused in one line."""
    final = ensemble.Ensemble(members, lambda p: p[0] if float(p[0, 0, 0]) > 0.5 else p[1])
    with pytest.raises(ValueError, match=r"cannot write the rule .*: it is not in the table"):
        final.to_onnx(tmp_path / "e.onnx")


def test_a_rule_whose_result_jumps(members: ensemble.Members, tmp_path: Path) -> None:
    """Ranks of nearly equal probabilities, and cascades, are refused with the reason, alone and inside other rules."""
    mean, borda = ensemble.mean, ensemble.rules.borda
    named = Cascade(ensemble.WeightedMean([1, 2, 3, 4, 5], members=members.names[::-1]))
    inside = Chain((borda, Temperature(2.0))), ensemble.abstaining(borda)
    for rule, title in [(borda, "borda"), (Cascade(mean), "Cascade"), (named, "Cascade"), (inside[0], "Chain")]:
        with pytest.raises(ValueError, match=rf"got {title}, whose result jumps .* rounding alone; export mean, maj"):
            ensemble.Ensemble(members, rule).to_onnx(tmp_path / "e.onnx")
    assert not declared(inside[1]).continuous
    p = torch.rand(5, 30, 4).softmax(-1)
    moved = (borda(p) - borda(p * (1 + 1e-6 * torch.randn(p.shape)))).abs().amax()
    assert moved < 1e-5  # of random members hardly any two classes are that near to each other
    p[..., 1] = p[..., 0]
    assert (borda(p) - borda(p * (1 + 1e-6 * torch.randn(p.shape)))).abs().amax() > 1e-2
    assert not list(tmp_path.glob("e.onnx*"))


def test_the_bundled_ensemble(tmp_path: Path, command: Callable[..., Any]) -> None:
    """`ensemble export`: contexts of 12 and 20, a file little larger than the weights, and equal classes."""
    registry = zoo.Registry(Path(__file__).parents[1] / "registry.json")
    file = tmp_path / "e.onnx"
    home = zoo.Registry(tmp_path / "registry.json")
    for name in ("cylinder-a", "cylinder-b", "pyramid-a"):
        home.register(name, registry.checkpoint(name))
    members = ensemble.load(home, ["cylinder-a", "cylinder-b", "pyramid-a"])
    final = ensemble.Ensemble(members, ensemble.WeightedMean([0.5, 0.2, 0.3]))
    home.register_ensemble("final", final)
    outcome = command("ensemble export final --json", file, "--registry", home.path, code=0)
    assert outcome.data["agreement"]["moved"] < 1e-5
    assert outcome.data["agreement"]["changed"] == 0
    assert outcome.data["bytes"] < 1.1 * 4 * sum(home.get(name).parameters for name in members.names)
