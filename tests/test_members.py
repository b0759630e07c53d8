"""Members: of whatever kind and origin, their outputs are those of the models run alone, in the user's order."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ensemble
import zoo
from zoo import _files

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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the plans of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    assert members.about[0] == ensemble.outputs.About(parameters=zoo.count_parameters(spec()))
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
    assert about == ensemble.outputs.About(entry.parameters, "", f"d@{entry.id}")


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
