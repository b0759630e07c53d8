"""Members: of whatever kind and origin, their outputs are those of the models run alone, in the user's order."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ensemble
import zoo
from zoo import _files

pytestmark = pytest.mark.usefixtures("own_cache")

CLASSES = ("a", "b", "c", "d")
ARCHITECTURES = zoo.list_architectures(["basic", "bottleneck", "*cylinder", "diamond", "mlp", "*pyramid"])


def spec(architecture: str = "cylinder", context: int = 2, **fields: str) -> zoo.Spec:
    """A small spec over frames of 6 features."""
    options = {"widths": [8, 6]} if architecture == "mlp" else {"width": 8}
    return zoo.Spec(architecture, features=6, context=context, classes=4, options=options, **fields)


def members_of(specs: dict[str, zoo.Spec], **wishes: str) -> tuple[dict[str, nn.Module], ensemble.Members]:
    """Models of these specs, and the members they make."""
    modules = {name: zoo.build(each, seed=seed).eval() for seed, (name, each) in enumerate(specs.items())}
    return modules, ensemble.from_modules(modules, classes=CLASSES, specs=specs, **wishes)  # type: ignore[arg-type]


def alone(modules: dict[str, nn.Module], specs: dict[str, zoo.Spec], frames: zoo.FrameSet) -> Tensor:
    """The slow obvious way: every model by itself over its own windows, (M, N, C) probabilities."""
    with torch.inference_mode():
        logits = [
            modules[name](
                zoo.windows(frames, torch.arange(len(frames)), each.context, each.normalisation, each.padding)
            )
            for name, each in specs.items()
        ]
    return torch.stack(logits).softmax(-1)


@pytest.fixture
def registry(tmp_path: Path) -> zoo.Registry:
    """Three models, one of them in two versions, and an alias."""
    registry = zoo.Registry(tmp_path / "registry.json")
    for name, seed, architecture in (
        ("c-1", 0, "cylinder"),
        ("d", 1, "diamond"),
        ("c-2", 2, "cylinder"),
        ("d", 3, "diamond"),
    ):
        each = spec(architecture)
        registry.register(name, zoo.build(each, seed=seed), spec=each, classes=CLASSES)
    registry.alias("best", "d@1")
    return registry


@pytest.mark.parametrize("plan", ["auto", "loop", "stack"])
def test_members_of_all_kinds_give_what_they_give_alone(plan: str, frames: zoo.FrameSet) -> None:
    """Every architecture, three contexts, four ways of preparing frames, mixed, in the user's order."""
    ways = ({}, {"normalisation": "none"}, {"normalisation": "z_score"}, {"padding": "corpus"})
    specs = {
        f"{architecture}-{context}-{number}": spec(architecture, context, **ways[number])
        for number in range(len(ways))
        for context in (3, 0, 2)
        for architecture in ARCHITECTURES
    }
    modules, members = members_of(specs, plan=plan)
    outputs = ensemble.collect(members, frames)
    assert outputs.members == tuple(specs)
    torch.testing.assert_close(outputs.probabilities, alone(modules, specs, frames), rtol=0, atol=1e-5)
    assert torch.equal(outputs.require_labels(), frames.labels)
    assert torch.equal(outputs.groups, frames.groups)
    assert outputs.fingerprint == frames.fingerprint


@pytest.mark.parametrize("count", [1, 2, 100])
def test_any_number_of_members(count: int, frames: zoo.FrameSet) -> None:
    """One member is itself; a hundred are a hundred."""
    specs = {f"m{index}": spec() for index in range(count)}
    modules, members = members_of(specs)
    torch.testing.assert_close(
        ensemble.collect(members, frames).probabilities, alone(modules, specs, frames), rtol=0, atol=1e-5
    )


def test_equal_members_run_as_one_group_in_any_order(frames: zoo.FrameSet) -> None:
    """Interleaved kinds are grouped, and answer in their own places."""
    specs = {"a": spec(), "b": spec("diamond"), "c": spec(), "d": spec("diamond")}
    modules, members = members_of(specs)
    found = ensemble.collect(members, frames).probabilities
    torch.testing.assert_close(found, alone(modules, specs, frames), rtol=0, atol=1e-5)
    assert [row["group"] for row in members.plan()] == ["a and 1 more", "b and 1 more"]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_inputs_as_a_tensor(count: int) -> None:
    """Windows of the largest context; smaller contexts see the middle. No frames are no error."""
    specs = {"wide": spec(context=3), "narrow": spec(context=1)}
    modules, members = members_of(specs)
    x = torch.randn(count, 42)
    outputs = ensemble.collect(members, x)
    assert outputs.shape == (2, count, 4)
    expected = torch.stack([modules["wide"](x), modules["narrow"](x[:, 12:30])]).softmax(-1)
    torch.testing.assert_close(outputs.probabilities, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type(dtype: torch.dtype, frames: zoo.FrameSet) -> None:
    """Inputs follow the weights; the outputs are float32 all the same."""
    modules = {name: zoo.build(spec(), seed=seed).eval().to(dtype) for seed, name in enumerate("ab")}
    members = ensemble.from_modules(modules, classes=CLASSES, specs=dict.fromkeys(modules, spec()))
    found = ensemble.collect(members, frames).probabilities
    x = zoo.windows(frames, torch.arange(len(frames)), 2).to(dtype)
    expected = torch.stack([module(x).float().softmax(-1) for module in modules.values()])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 if dtype.itemsize == 2 else 1e-5)


class Recurrent(nn.Module):
    """vmap has no rule for this, and the loop needs none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, 3) -> (B, 4)."""
        return self.layer(x)[0][:, -1]  # type: ignore[no-any-return]


def test_foreign_modules_of_any_kind(caplog: pytest.LogCaptureFixture) -> None:
    """What vmap takes is stacked, what it cannot take runs in a loop, and the plan says why."""
    torch.manual_seed(0)
    convolutions = {
        f"c{i}": nn.Sequential(nn.Conv1d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)) for i in (0, 1)
    }
    x = torch.randn(6, 3, 5)
    members = ensemble.from_modules(convolutions, classes=CLASSES)
    expected = torch.stack([module(x) for module in convolutions.values()]).softmax(-1)
    torch.testing.assert_close(members.log_probabilities(x).exp(), expected, rtol=0, atol=1e-5)
    assert members.plan()[0]["form"] == "stack"
    head, first = repr(members.plan()).splitlines()[:2]
    assert head.split()[:2] == ["group", "frames"]
    assert first.split()[:4] == ["c0", "and", "1", "more"]

    recurrent = {"r0": Recurrent(), "r1": Recurrent()}
    x = torch.randn(6, 5, 3)
    members = ensemble.from_modules(recurrent, classes=CLASSES)
    expected = torch.stack([module(x) for module in recurrent.values()]).softmax(-1)
    torch.testing.assert_close(members.log_probabilities(x).exp(), expected, rtol=0, atol=1e-5)
    (line,) = caplog.messages
    assert line.startswith("2 members run one by one: ")
    assert "\n" not in line


def test_modules_that_must_not_be_stacked_run_apart() -> None:
    """ReLU with GELU, deeper with shallower: four groups, right answers."""
    torch.manual_seed(0)
    modules = {
        "relu": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)),
        "gelu": nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4)),
        "flat": nn.Sequential(nn.Linear(3, 4)),
        "deep": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
    }
    members = ensemble.from_modules(modules, classes=CLASSES)
    x = torch.randn(7, 3)
    expected = torch.stack([module(x) for module in modules.values()]).softmax(-1)
    torch.testing.assert_close(members.log_probabilities(x).exp(), expected, rtol=0, atol=1e-5)
    assert {row["group"] for row in members.plan() if row["chosen"]} == set(modules)


def test_classes_are_aligned_by_name(frames: zoo.FrameSet) -> None:
    """A member with its classes in another order has its columns put in the first one's; labels too."""
    modules = {"a": zoo.build(spec(), seed=0).eval(), "b": zoo.build(spec(), seed=1).eval()}
    other = ("d", "b", "a", "c")
    specs = dict.fromkeys(modules, spec())
    plain = ensemble.collect(ensemble.from_modules(modules, classes=CLASSES, specs=specs), frames)
    found = ensemble.collect(ensemble.from_modules(modules, classes={"a": CLASSES, "b": other}, specs=specs), frames)
    torch.testing.assert_close(found.probabilities[0], plain.probabilities[0])
    torch.testing.assert_close(found.probabilities[1], plain.probabilities[1][:, [2, 1, 3, 0]])
    turned = ensemble.collect(ensemble.from_modules(modules, classes=other, specs=specs), frames)
    names = [other[label] for label in turned.require_labels()]
    assert names == [frames.classes[label] for label in frames.labels]  # type: ignore[union-attr]


def test_automatic_precision_stays_near(frames: zoo.FrameSet) -> None:
    """Whatever it takes, no probability moves by more than 0.01."""
    specs = {f"m{index}": spec() for index in range(4)}
    modules, members = members_of(specs, precision="auto")
    found = ensemble.collect(members, frames).probabilities
    torch.testing.assert_close(found, alone(modules, specs, frames), rtol=0, atol=0.01)


def test_what_is_known_of_members() -> None:
    """Names, parameters, specs and digests, in order; a digest changes with the weights."""
    modules, members = members_of({"a": spec(), "b": spec("diamond")})
    assert members.names == ("a", "b")
    parameters = zoo.count_parameters(spec())
    buffers = sum(buffer.nbytes for buffer in modules["a"].buffers())
    assert members.about[0] == ensemble.outputs.About(parameters, size=4 * parameters + buffers)
    assert ensemble.collect(members, torch.zeros(2, 30)).about == members.about
    assert ensemble.collect(members, [torch.zeros(2, 30)]).about == members.about
    assert [member.spec for member in members] == [spec(), spec("diamond")]
    before = members.digests
    with torch.no_grad():
        next(modules["a"].parameters()).add_(1)
    specs = {"a": spec(), "b": spec("diamond")}
    after = ensemble.from_modules(modules, classes=CLASSES, specs=specs).digests
    assert before[0] != after[0]
    assert before[1] == after[1]
    assert members.subset(["b"]).names == ("b",)
    with pytest.raises(ValueError, match=r"no member named \['z'\]; there are \['a', 'b'\]"):
        members.subset(["z"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"modules": {}}, "at least one member, got none"),
        ({"classes": {"a": CLASSES}}, r"none for \['b'\]"),
        ({"classes": {"a": CLASSES, "b": ("a", "b", "c", "x")}}, r"\['x'\] only in 'b' and \['d'\] only in 'a'"),
        ({"precision": "float8"}, "expected precision 'float32' or 'auto', got 'float8'"),
        ({"plan": "fast"}, "expected plan 'auto' or 'loop' or 'stack', got 'fast'"),
    ],
    ids=["none", "nameless", "other classes", "precision", "plan"],
)
def test_wrong_members_are_refused(arguments: dict[str, object], words: str) -> None:
    """The message names what came and what was expected."""
    modules = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)}
    with pytest.raises(ValueError, match=words):
        ensemble.from_modules(**({"modules": modules, "classes": CLASSES} | arguments))  # type: ignore[arg-type]


def test_a_device_that_does_not_exist_is_refused() -> None:
    """By its name, with those that do."""
    with pytest.raises(ValueError, match="expected a device such as 'cpu', 'cuda', 'cuda:1' or 'auto', got 'moon'"):
        ensemble.from_modules({"a": nn.Linear(2, 2)}, classes=["x", "y"], device="moon")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    """Nothing falls back to the CPU silently."""
    with pytest.raises(ValueError, match="got 'cuda', but torch finds no CUDA device; use 'cpu'"):
        ensemble.from_modules({"a": nn.Linear(3, 4)}, classes=CLASSES, device="cuda")


def test_wrong_inputs_are_refused(frames: zoo.FrameSet) -> None:
    """Frames without a spec, of other features or classes; inputs of another length; mixed preparations."""
    foreign = ensemble.from_modules({"a": nn.Linear(3, 4)}, classes=CLASSES)
    with pytest.raises(ValueError, match="a spec for member 'a' to prepare frames by, got none"):
        ensemble.collect(foreign, frames)
    _, members = members_of({"a": spec()})
    with pytest.raises(ValueError, match=r"inputs \(B, 30\) .* got \(2, 31\)"):
        ensemble.collect(members, torch.zeros(2, 31))
    narrow = zoo.FrameSet(frames.features[:, :3].clone(), None, frames.starts, frames.classes)
    with pytest.raises(ValueError, match="frames of 6 features for member 'a', got 3"):
        ensemble.collect(members, narrow)
    renamed = zoo.FrameSet(frames.features, None, frames.starts, ("a", "b", "c", "x"))
    with pytest.raises(ValueError, match=r"\['d'\] only in the members and \['x'\] only in the frames"):
        ensemble.collect(members, renamed)
    _, mixed = members_of({"a": spec(), "b": spec(normalisation="none")})
    with pytest.raises(ValueError, match=r"share one input, got 'a' .* and 'b' .* collect over a FrameSet"):
        ensemble.collect(mixed, torch.zeros(2, 30))


def test_members_from_a_registry(registry: zoo.Registry, frames: zoo.FrameSet) -> None:
    """Names, wildcards, aliases, versions, each model once, in the order asked for; answers as loaded singly."""
    members = ensemble.load(registry, ["best", "c-*", "d", "c-1"])
    assert members.names == ("d@1", "c-1", "c-2", "d@2")
    assert members.digests[1] == registry.get("c-1").sha256
    modules = {name: registry.load(name) for name in members.names}
    specs = {name: registry.get(name).spec for name in members.names}
    torch.testing.assert_close(
        ensemble.collect(members, frames).probabilities, alone(modules, specs, frames), rtol=0, atol=1e-5
    )
    assert ensemble.load(registry, "d").names == ("d",)
    (about,) = ensemble.load(registry, "d").about
    entry = registry.get("d")
    assert about == ensemble.outputs.About(entry.parameters, "", f"d@{entry.id}", entry.bytes)


def test_the_registry_is_read_once(registry: zoo.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many references there are; and not at all for entries that were looked up before."""
    snapshot, reads = zoo.Registry.snapshot, []
    monkeypatch.setattr(zoo.Registry, "snapshot", lambda self: reads.append(1) or snapshot(self))
    members = ensemble.load(registry, ["best", "c-*", "d", "c-1"])
    assert len(reads) == 1
    again = ensemble.load(registry, [snapshot(registry).get(about.reference) for about in members.about])
    assert again.names == members.names
    assert len(reads) == 1


def test_the_file_of_the_registry_is_opened_once(registry: zoo.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight names are eight blobs, and one reading of what the names mean."""
    checkpoint = registry.checkpoint("d")
    names = [registry.register(f"eight-{index}", checkpoint).name for index in range(8)]
    opened: list[str] = []

    class Counting(_files.System):
        def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
            opened.append(path.name)
            return super().open(path, flags, mode)

    monkeypatch.setattr(_files, "system", Counting())
    assert ensemble.load(registry, names).names == tuple(names)
    assert opened.count(registry.path.name) == 1


def test_a_loaded_model_is_one_of_the_stack(registry: zoo.Registry) -> None:
    """Its module is in evaluation mode and shares the stack's memory: weights are held once."""
    first, second = list(ensemble.load(registry, "c-*"))
    assert not first.module.training
    one, other = (next(member.module.parameters()) for member in (first, second))
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_what_a_registry_does_not_have(registry: zoo.Registry) -> None:
    """Neither a wildcard nor a name is passed over silently."""
    with pytest.raises(ValueError, match=r"that match 'x\*', got none; the registry has \['c-1', 'c-2', 'd'\]"):
        ensemble.load(registry, ["c-1", "x*"])
    with pytest.raises(ValueError, match="c-3"):
        ensemble.load(registry, ["c-3"])


def test_a_changed_blob_is_refused(registry: zoo.Registry) -> None:
    """Every byte that gets into a stack has been hashed."""
    blob = next(path for path in registry.path.parent.rglob("*.safetensors") if registry.get("c-1").sha256 in path.name)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(ValueError, match="c-1"):
        ensemble.load(registry, "*")


class Function(nn.Module):
    """A Linear layer and what a model does with its input and its logits."""

    def __init__(self, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable[[Tensor], Any] = lambda y: y):
        super().__init__()
        self.linear, self.before, self.after = nn.Linear(3, 2), before, after

    def forward(self, x: Tensor) -> Any:
        """(B, 3) -> whatever `after` makes of (B, 2)."""
        return self.after(self.linear(self.before(x)))


def normalised(*, kept: bool) -> nn.Module:
    """BatchNorm with or without running statistics."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=kept), nn.Linear(4, 2))


UNUSABLE = {
    "one column": (nn.Linear(3, 1), r"expected logits \(8, 2\) from 'bad' .* got \(8, 1\)"),
    "more columns": (nn.Linear(3, 5), r"from 'bad' .* got \(8, 5\)"),
    "vector": (Function(after=lambda y: y[:, 0]), r"from 'bad' .* got \(8,\)"),
    "one row": (Function(after=lambda y: y[:1]), r"from 'bad' .* got \(1, 2\)"),
    "sequence": (Function(after=lambda y: y[:, None]), r"from 'bad' .* got \(8, 1, 2\)"),
    "tuple": (Function(after=lambda y: (y, y)), "from 'bad' .* got a tuple of 2; give .* output="),
    "dict": (Function(after=lambda y: {"scores": y}), r"from 'bad' .* got a dict with \['scores'\]"),
    "predictions": (Function(after=lambda y: y.argmax(1, keepdim=True).expand(-1, 2)), "from 'bad' .* as floats"),
    "NaN": (Function(after=lambda y: y * torch.nan), "finite logits from 'bad', got NaN or infinity"),
    "dropout": (Function(lambda x: nn.functional.dropout(x, 0.5)), "same answers from 'bad' to the same rows"),
    "noise": (Function(after=lambda y: y + torch.randn_like(y)), "same answers from 'bad' to the same rows"),
    "batch statistics": (normalised(kept=False), "to each row by itself from 'bad', got others for a row alone than"),
    "softmax over rows": (Function(after=lambda y: y.softmax(0)), "to each row by itself from 'bad'"),
    "standardised": (Function(lambda x: (x - x.mean(0)) / x.std(0, correction=0)), "to each row by itself from 'bad'"),
    "raises": (
        Function(lambda x: x @ x),
        r"an answer from 'bad' to inputs \(8, 3\) of torch.float32, got RuntimeError",
    ),
}


@pytest.mark.parametrize("plan", ["auto", "loop"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "among others"])
@pytest.mark.parametrize("case", UNUSABLE)
def test_a_model_whose_answers_cannot_be_used_is_refused(case: str, beside: bool, plan: str) -> None:
    """By name, before anything is returned, whether it could be stacked or not, over tensors, batches and arrays."""
    bad, words = UNUSABLE[case]
    modules = {"good": nn.Linear(3, 2), "bad": bad} if beside else {"bad": bad}
    x = torch.randn(600, 3)
    for run in (
        lambda members: members.log_probabilities(x),
        lambda members: ensemble.collect(members, [x]),
        lambda members: ensemble.Ensemble(members, ensemble.mean).predict_proba(x.double().numpy()),
    ):
        with pytest.raises(ValueError, match=words):
            run(ensemble.from_modules(modules, classes=["n", "y"], plan=plan))


def test_a_model_with_a_spec_is_asked_at_once() -> None:
    """The form of its inputs is declared, so nothing need be waited for."""
    each = spec(context=0)
    with pytest.raises(ValueError, match=r"expected logits \(4, 4\) from 'b' .* got \(4, 3\)"):
        ensemble.from_modules(
            {"a": nn.Linear(6, 4), "b": nn.Linear(6, 3)}, classes=CLASSES, specs={"a": each, "b": each}
        )


@pytest.mark.parametrize("count", [1, 2, 9])
def test_normalisation_with_statistics_is_no_reason_to_refuse(count: int) -> None:
    """Small first batches are asked as they are, and larger ones again."""
    modules = {name: normalised(kept=True).eval() for name in "ab"}
    members = ensemble.from_modules(modules, classes=["n", "y"])
    for x in (torch.randn(count, 3), torch.randn(600, 3)):
        expected = torch.stack([module(x) for module in modules.values()]).softmax(-1)
        torch.testing.assert_close(members.log_probabilities(x).exp(), expected, rtol=0, atol=1e-5)
    late = ensemble.from_modules({"a": normalised(kept=False)}, classes=["n", "y"])
    with pytest.raises(ValueError, match="'a'"):
        late.log_probabilities(torch.randn(600, 3))


def scribble(x: Tensor) -> Tensor:
    """Overwrite the input."""
    return x.mul_(0.5)


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "inplace": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)),
    "mul_": lambda: Function(scribble),
    "mask": lambda: Function(lambda x: x.masked_fill_(x < 0, 0)),
    "index": lambda: Function(lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(7.0)) if len(x) < 0 else x),
}


@pytest.mark.parametrize("plan", ["auto", "loop", "stack"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_model_that_writes_into_its_input_gets_its_own(writer: str, plan: str) -> None:
    """The other members and the caller see the inputs as they were, in one group or several, time after time."""
    modules = {"w1": WRITERS[writer](), "b": nn.Linear(3, 2), "w2": WRITERS[writer]()}
    members = ensemble.from_modules(modules, classes=["n", "y"], plan=plan)
    for rows in (4, 700, 4):
        x = torch.randn(rows, 3)
        kept = x.clone()
        expected = torch.stack([module(x.clone()) for module in modules.values()]).softmax(-1)
        torch.testing.assert_close(members.log_probabilities(x).exp(), expected, rtol=0, atol=1e-5)
        assert torch.equal(x, kept)


@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "inputs", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8, torch.uint8]
)
def test_inputs_are_cast_to_the_type_of_the_weights(weights: torch.dtype, inputs: torch.dtype) -> None:
    """Any numbers are taken by any weights."""
    modules = {name: nn.Linear(3, 2).to(weights) for name in "ab"}
    x = torch.randint(0, 5, (6, 3)).to(inputs)
    members = ensemble.from_modules(modules, classes=["n", "y"])
    expected = torch.stack([module(x.to(weights)).float() for module in modules.values()]).softmax(-1)
    atol = 0.02 if weights.itemsize == 2 else 1e-5
    torch.testing.assert_close(members.log_probabilities(x).exp(), expected, rtol=0, atol=atol)
    if inputs != torch.bfloat16:
        torch.testing.assert_close(members.log_probabilities(x.numpy()).exp(), expected, rtol=0, atol=atol)


def test_integers_stay_integers_for_a_model_that_takes_them() -> None:
    """An embedding looks up positions; a pixel may be divided by 255 in the model."""
    lookup = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    one_hot = Function(lambda x: nn.functional.one_hot(x[:, 0], 3).float())
    x = torch.randint(0, 3, (700, 3))
    for module in (lookup, one_hot, Function(lambda x: x / 255)):
        members = ensemble.from_modules({"a": module}, classes=["n", "y"])
        torch.testing.assert_close(members.log_probabilities(x)[0].exp(), module(x).softmax(-1), rtol=0, atol=1e-5)


class Holder:
    """What a model of another library returns."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_logits_are_found_where_it_is_said(tmp_path: Path) -> None:
    """In `.logits` by themselves, elsewhere by a declared function; such models are stacked like others."""
    plain = Function()
    x, expected = torch.randn(5, 3), None
    wrapped = {
        "plain": (plain, None),
        "object": (Function(after=Holder), None),
        "tuple": (Function(after=lambda y: (y, "more")), lambda answer: answer[0]),
        "dict": (Function(after=lambda y: {"scores": y}), lambda answer: answer["scores"]),
        "sequence": (Function(after=lambda y: y[:, None]), lambda answer: answer.squeeze(1)),
        "one": (Function(after=lambda y: y[:, :1]), lambda answer: torch.cat([-answer, answer], dim=1)),
    }
    for module, _ in wrapped.values():
        module.load_state_dict(plain.state_dict())
    members = ensemble.from_modules(
        {name: module for name, (module, _) in wrapped.items()},
        classes=["n", "y"],
        output={name: output for name, (_, output) in wrapped.items() if output},
    )
    found = members.log_probabilities(x).exp()
    expected = plain(x).softmax(-1)
    torch.testing.assert_close(found[:5], expected.expand(5, -1, -1), rtol=0, atol=1e-5)
    one = plain(x)[:, :1]
    torch.testing.assert_close(found[5], torch.cat([-one, one], dim=1).softmax(-1), rtol=0, atol=1e-5)
    pairs = {name: Function(after=pair) for name in "ab"}
    both = ensemble.from_modules(pairs, classes=["n", "y"], output=first)
    expected = torch.stack([module(x)[0] for module in pairs.values()]).softmax(-1)
    torch.testing.assert_close(both.log_probabilities(x).exp(), expected, rtol=0, atol=1e-5)
    assert both.groups[0][0].stack is not None
    with pytest.raises(ValueError, match=r"output= of models among \['a', 'b'\], got \['c'\]"):
        ensemble.from_modules(pairs, classes=["n", "y"], output={"c": first})


def pair(y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and something else."""
    return y, y + 1


def first(answer: tuple[Tensor, Tensor]) -> Tensor:
    """The logits in a pair."""
    return answer[0]


class Routed(nn.Linear):
    """Looks up, outside itself, what it does with rows above a threshold."""

    outside: ClassVar[WeakKeyDictionary[nn.Module, float]] = WeakKeyDictionary()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> (B, 2)."""
        return torch.where(x[:, :1] > 5, super().forward(x) * self.outside.get(self, 1.0), super().forward(x))


@pytest.mark.parametrize("place", [0, 300, 599])
def test_a_stack_is_compared_on_rows_of_the_whole_batch(place: int, caplog: pytest.LogCaptureFixture) -> None:
    """A difference that a few rows in the middle or at the end show makes the members run one by one."""
    modules = {"a": Routed(3, 2), "b": Routed(3, 2)}
    Routed.outside[modules["b"]] = 3.0
    members = ensemble.from_modules(modules, classes=["n", "y"])
    assert members.groups[0][0].stack is not None
    x = torch.randn(600, 3).clamp(max=4)
    x[max(0, place - 5) : place + 6, 0] = 9
    expected = torch.stack([module(x) for module in modules.values()]).softmax(-1)
    torch.testing.assert_close(members.log_probabilities(x).exp(), expected, rtol=0, atol=1e-5)
    assert "members run one by one" in caplog.messages[-1]
    with pytest.raises(ValueError, match=r"expected .* agree|to give together what they give alone"):
        ensemble.from_modules(modules, classes=["n", "y"], plan="stack").log_probabilities(x)


def test_models_that_differ_in_an_attribute_run_one_by_one() -> None:
    """Functions, tensors, lists, floats: the first one's are not used for all."""
    x = torch.randn(6, 3)
    for one, other in (
        (torch.relu, torch.tanh),
        (lambda x: x * 2, lambda x: x * 3),
        (partial(torch.mul, other=2), partial(torch.mul, other=3)),
        (torch.ones(3).mul, torch.zeros(3).mul),
        (Scale([1.0, 2.0, 3.0]), Scale([3.0, 2.0, 1.0])),
        (Scale(torch.ones(3)), Scale(torch.zeros(3))),
    ):
        modules = {"a": Function(one), "b": Function(other)}
        expected = torch.stack([module(x) for module in modules.values()]).softmax(-1)
        members = ensemble.from_modules(modules, classes=["n", "y"])
        torch.testing.assert_close(members.log_probabilities(x).exp(), expected, rtol=0, atol=1e-5)
        assert len(members.groups) == 2


class Scale(nn.Module):
    """Factors that are neither parameters nor buffers."""

    def __init__(self, factors: Any) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> the same."""
        return x * torch.as_tensor(self.factors)


@pytest.mark.parametrize("plan", ["auto", "loop"])
@pytest.mark.parametrize(
    "change",
    [
        lambda module: nn.init.zeros_(module[0].weight),
        lambda module: setattr(module[0], "weight", nn.Parameter(torch.zeros(3, 3))),
        lambda module: setattr(module[0].weight, "data", torch.zeros(3, 3)),
        lambda module: module.__setitem__(1, nn.Tanh()),
        lambda module: module.train(),
        lambda module: module[0].requires_grad_(False) and setattr(module[1], "negative_slope", 5.0),
    ],
    ids=["written", "replaced", "data", "layer", "train", "attribute"],
)
def test_a_module_that_was_changed_is_refused(change: Callable[[nn.Sequential], object], plan: str) -> None:
    """A stack holds what it was; members made again hold what it is."""
    modules = {name: nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(), nn.Linear(3, 2)) for name in "ab"}
    x = torch.randn(5, 3)
    members = ensemble.from_modules(modules, classes=["n", "y"], plan=plan)
    members.log_probabilities(x)
    members.log_probabilities(x)
    change(modules["b"])
    with pytest.raises(ValueError, match=r"expected 'b' as it was when it became a member, .* make the members again"):
        members.log_probabilities(x)
    again = ensemble.from_modules(modules, classes=["n", "y"], plan=plan)
    expected = torch.stack([module(x) for module in modules.values()]).softmax(-1)
    torch.testing.assert_close(again.log_probabilities(x).exp(), expected, rtol=0, atol=1e-5)


def test_what_a_model_keeps_for_itself_is_no_change() -> None:
    """A counter of calls, in an attribute or a buffer, is the model's own affair."""

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    members = ensemble.from_modules({"a": Counting(3, 2), "b": Counting(3, 2)}, classes=["n", "y"])
    for rows in (3, 3, 300, 3):
        assert members.log_probabilities(torch.randn(rows, 3)).shape == (2, rows, 2)


def test_classes_are_text() -> None:
    """Numbers and NumPy's text as names are the same names as text."""
    for classes in (range(2), np.array(["0", "1"]), [b"0", b"1"], torch.arange(2)):
        members = ensemble.from_modules({"a": nn.Linear(3, 2)}, classes=classes)  # type: ignore[arg-type]
        assert members.classes == ("0", "1")


@pytest.mark.parametrize("what", [nn.Linear, {"weight": torch.zeros(2, 3)}, torch.relu, None, "model.pt"])
def test_what_is_no_module_is_refused(what: object) -> None:
    """With what came, and the ways in for others."""
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module for 'a', got .*see from_estimators"):
        ensemble.from_modules({"a": what}, classes=["n", "y"])  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"lazy layers in 'a': .*LazyLinear"):
        ensemble.from_modules({"a": nn.Sequential(nn.LazyLinear(2))}, classes=["n", "y"])


class Grown(nn.Module):
    """A model out of parts that are right, and parts at which a model is refused."""

    def __init__(self, parts: list[str], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parts = parts
        self.layers = nn.ModuleDict()
        for place, part in enumerate(parts):
            if part in GROWN:
                self.layers[str(place)] = GROWN[part](seed)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        """(B, 3) -> (B, 2), or what a fault makes of it."""
        for layer in self.layers.values():
            x = layer(x)
        y = self.head(x)
        for part in self.parts:
            y = FAULTS[part](y) if part in FAULTS else y
        return y


GROWN: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda seed: nn.Linear(3, 3),
    "norm": lambda seed: nn.BatchNorm1d(3),
    "layer norm": lambda seed: nn.LayerNorm(3),
    "relu": lambda seed: nn.ReLU(),
    "written relu": lambda seed: nn.ReLU(inplace=True),
    "slope": lambda seed: nn.LeakyReLU(0.1 + seed),
    "dropout": lambda seed: nn.Dropout(0.5),
    "list": lambda seed: Scale([1.0, 2.0, 1.0 + seed]),
    "tensor": lambda seed: Scale(torch.ones(3) * (1 + seed)),
    "function": lambda seed: Applied(lambda x: x * (1 + seed)),
    "shared function": lambda seed: Applied(torch.tanh),
    "writing function": lambda seed: Applied(scribble),
    "statistics of the rows": lambda seed: nn.BatchNorm1d(3, track_running_stats=False),
    "noise": lambda seed: Applied(lambda x: nn.functional.dropout(x, 0.5)),
}
FAULTS: dict[str, Callable[[Any], Any]] = {
    "column": lambda y: y[:, :1],
    "vector": lambda y: y[:, 0],
    "sum": lambda y: y.sum(0, keepdim=True),
    "tuple": lambda y: (y,),
    "classes": lambda y: y.long(),
    "object": Holder,
}
REFUSED = {*FAULTS, "noise", "statistics of the rows"} - {"object"}


class Applied(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> the same."""
        return self.function(x)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from([*GROWN]), max_size=4),
    fault=st.sampled_from(["", "", "", *FAULTS]),
    count=st.integers(1, 3),
    rows=st.integers(2, 400),
    weights=st.sampled_from([torch.float32, torch.float64]),
    inputs=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64]),
    plan=st.sampled_from(["auto", "loop"]),
)
def test_any_models_are_answered_rightly_or_refused_by_name(
    parts: list[str], fault: str, count: int, rows: int, weights: torch.dtype, inputs: torch.dtype, plan: str
) -> None:
    """What comes back is what each model gives alone; what cannot be used is refused, and nothing else is."""
    models = {f"m{seed}": Grown([*parts, fault], seed).to(weights).eval() for seed in range(count)}
    x = (torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)) * 3).to(inputs)
    kept = x.clone()
    members = ensemble.from_modules(models, classes=["n", "y"], plan=plan)
    if REFUSED & {*parts, fault}:
        with pytest.raises(ValueError, match="'m0'"):
            members.log_probabilities(x)
    else:
        answers = [model(x.clone().to(weights)) for model in models.values()]
        expected = torch.stack([getattr(answer, "logits", answer).float() for answer in answers]).softmax(-1)
        torch.testing.assert_close(members.log_probabilities(x).exp(), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(members.log_probabilities(x[:2]).exp(), expected[:, :2], rtol=0, atol=2e-5)
    assert torch.equal(x, kept)
