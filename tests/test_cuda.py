"""Every path that runs on CUDA, on pretended devices: the values of the CPU, from memory that is where it should be."""

import inspect
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretend_cuda import PretendedCuda
from test_cli import ARGUMENTS
from torch import Tensor, nn

import ensemble
import zoo
from ensemble.run import Members, _engine
from ensemble.run._engine import Batch, Form, Group, Plan, forms, plan
from ensemble.run._engine.plan import Agreement
from ensemble.run.cotraining import TrainingStack, fold_of, stacked_group
from ensemble.run.stack import Stack
from zoo._names import usable_device
from zoo.cli.options import Fields, recipe_from
from zoo.training.optimisers import OPTIMISERS
from zoo.training.step import Batch as TrainingBatch
from zoo.training.step import Batches, Scorer, Stepper

pytestmark = pytest.mark.usefixtures("own_cache")

SPEC = zoo.Spec("basic", features=6, context=2, classes=4, options={"width": 16, "depth": 1})
REAL = torch.cuda.is_available()
DEVICES = ["cuda", "cuda:1", *[pytest.param("real", marks=pytest.mark.gpu)] * REAL]
FORMS = [Form(kind, 64, precision) for kind in ("folded", "replay", "overlap") for precision in _engine.forms.DTYPES]
FORMS += [Form("stack", 64), Form("loop", 64)]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    """Two devices, of which the first is the current one."""
    with PretendedCuda(monkeypatch) as mode:
        yield mode


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each of them; and a real one, where there is one."""
    if request.param == "real":
        return "cuda"
    request.getfixturevalue("pretended")
    return str(request.param)


class Tf32:
    """The user's settings of TF32, for all backends, for CUDA and for its products."""

    def __init__(self) -> None:
        self.all: Any = [torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul]

    def choose(self, setting: str) -> None:
        """Switch it on in one place; "medium" is torch's older interface."""
        if setting == "medium":
            torch.set_float32_matmul_precision("medium")
        elif setting != "none":
            self.all[["all", "cuda", "matmul"].index(setting)].fp32_precision = "tf32"

    def own(self) -> list[str]:
        """The three settings themselves, found by changing those that they may follow."""
        found = [self.all[0].fp32_precision]
        for place in (1, 2):
            seen = []
            for value in ("ieee", "tf32"):
                self.all[place - 1].fp32_precision = value
                seen.append(self.all[place].fp32_precision)
            found.append("none" if len(set(seen)) > 1 else seen[0])
        for place in (2, 1, 0):
            self.all[place].fp32_precision = found[place]
        return found

    def legacy(self) -> str:
        """What the older interface says, if it says anything."""
        try:
            return str(torch.get_float32_matmul_precision())
        except RuntimeError:
            return "mixed"


@pytest.fixture
def tf32() -> Iterator[Tf32]:
    """Nothing is set, before and after."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("older torch")
    yield (settings := Tf32())
    torch.set_float32_matmul_precision("highest")
    for setting in settings.all:
        setting.fp32_precision = "none"


def named(count: int = 3) -> dict[str, nn.Module]:
    """Small models."""
    return {f"m{seed}": zoo.build(SPEC, seed=seed).eval() for seed in range(count)}


def members(device: str, count: int = 3, classes: str = "abcd", **options: str) -> Members:
    """Their members."""
    specs = dict.fromkeys(named(count), SPEC)
    return ensemble.from_modules(named(count), classes=classes, specs=specs, device=device, **options)


def group(device: str, **wishes: str) -> Group:
    """A group of three on a device."""
    modules = [module.to(device) for module in named().values()]
    place = usable_device(device)
    return Group(lambda: modules, Stack(modules).eval(), place, [*"012"], classes=4, features=6, **wishes)  # type: ignore[arg-type]


def near(atol: float = 1e-5) -> dict[str, float]:
    """Pretended devices compute on the CPU: equal bits. Others sum in another order."""
    return {"rtol": 0, "atol": atol if REAL else 0}


def states() -> list[Tensor]:
    """The random states of the CPU and of all devices."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, range(torch.cuda.device_count()))]


def moved(frames: zoo.FrameSet, device: str) -> zoo.FrameSet:
    """All parts of a frame set on a device."""
    assert frames.labels is not None
    parts = (frames.features, frames.labels, frames.starts)
    features, labels, starts = (part.to(device) for part in parts)
    return zoo.FrameSet(features, labels, starts, frames.classes, frames.names)


def test_a_device_always_carries_its_index(frames: zoo.FrameSet, pretended: PretendedCuda) -> None:
    """So that what is there already is known to be there, and stays there when the current device changes."""
    assert usable_device("cuda") == usable_device("auto") == torch.device("cuda:0")
    with torch.cuda.device(1):
        assert usable_device("cuda") == usable_device("auto") == torch.device("cuda:1")
    there = frames.to("cuda")
    assert there.to("cuda") is there.to("cuda:0") is there


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_75", "sm_80"], (7, 5), True),
        (["sm_75", "sm_80"], (8, 6), True),
        (["sm_75", "sm_80"], (9, 0), False),
        (["sm_75", "sm_80", "compute_80"], (9, 0), True),
        (["sm_75", "sm_90a"], (9, 0), True),
        (["sm_75", "sm_86"], (8, 0), False),
        (["sm_75", "compute_75"], (6, 0), False),
        (["gfx90a"], (9, 0), True),
        ([], (6, 0), True),
    ],
)
def test_a_card_that_torch_was_not_built_for_is_refused(
    architectures: list[str], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the door, in one line; "auto" takes the CPU."""
    with PretendedCuda(monkeypatch, capability=capability):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
        assert usable_device("auto").type == ("cuda" if runs else "cpu")
        if runs:
            assert usable_device("cuda").index == 0
            return
        with pytest.raises(ValueError, match=r"built for \(sm_75, .* compute capability .*; use 'cpu'"):
            usable_device("cuda")


def taking_a_device() -> set[str]:
    """Public functions, classes and methods with a device among their arguments, or among `options` that they pass on.

    Found in the packages' lists of public names.
    """
    found = set()
    for top in (zoo, ensemble):
        root = Path(str(top.__file__)).parent
        for file in root.rglob("__init__.pyi"):
            package = import_module(".".join(file.parent.relative_to(root.parent).parts))
            for name in package.__all__:
                public = getattr(package, name)
                own = vars(public) if isinstance(public, type) else ()
                methods = {f"{name}.{key}": getattr(public, key) for key in own}
                for key, function in ({name: public} | methods).items():
                    if callable(function) and "._" not in key and _takes_a_device(function):
                        found.add(f"{top.__name__}.{key}")
    return found


def _takes_a_device(function: Callable[..., object]) -> bool:
    try:
        arguments = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a class of Python's own
        return False
    return "device" in arguments or (
        "options" in arguments and arguments["options"].kind is inspect.Parameter.VAR_KEYWORD
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> zoo.Registry:
    """Three members and an ensemble of them; beside it one of each as a folder."""
    home = tmp_path_factory.mktemp("kept")
    registry = zoo.Registry(home / "registry.json")
    for name, model in named().items():
        registry.register(name, model, spec=SPEC, classes=[*"abcd"])
    registry.register_ensemble("all", ensemble.Ensemble(ensemble.load(registry, "m*"), ensemble.mean))
    for name in ("m0", "all"):
        zoo.export(registry, name, home / name)
    return registry


def checkpoints() -> list[zoo.Checkpoint]:
    """Of the members."""
    return [zoo.Checkpoint.from_module(model, SPEC, "abcd") for model in named().values()]


def crossed(device: str, x: Tensor) -> Tensor:
    """The answers of two folds' members to the windows that each was not trained on."""
    frames = zoo.FrameSet(torch.zeros(len(x), 6), None, torch.tensor([0, 1, len(x)]), ("a", "b", "c", "d"))
    outside = [frames.select((fold_of(frames, 2) != k).nonzero().flatten()).fingerprint for k in range(2)]
    folds = [replace(one, trained_on=known) for one, known in zip(checkpoints(), outside, strict=False)]
    teacher = ensemble.run.cross_fitted(folds, frames, folds=2, device=device)
    return teacher.predict(x, torch.arange(len(x)))


ENTRIES: dict[
    str, Callable[[zoo.Registry, str, Tensor], Tensor]
] = {  # registry, device, windows there -> answers there
    "zoo.FrameSet.to": lambda home, device, x: (
        zoo.FrameSet(x.cpu(), None, torch.tensor([0, len(x)]), ("a",)).to(device).features
    ),
    "zoo.build": lambda home, device, x: zoo.build(SPEC, seed=0, device=device).eval()(x),
    "zoo.Checkpoint.to_module": lambda home, device, x: checkpoints()[0].to_module(device)(x),
    "zoo.Registry.load": lambda home, device, x: home.load("m0", device=device)(x),
    "zoo.from_pretrained": lambda home, device, x: zoo.from_pretrained(home.path.parent / "m0", device=device)(x),
    "zoo.single_group": lambda home, device, x: zoo.training.single_group(SPEC, zoo.Recipe(), device).forward(x),
    "ensemble.Members": lambda home, device, x: Members([*members("cpu")], device=device).log_probabilities(x),
    "ensemble.from_modules": lambda home, device, x: members(device).log_probabilities(x),
    "ensemble.load": lambda home, device, x: ensemble.load(home, "m*", device=device).log_probabilities(x),
    "ensemble.from_checkpoints": lambda home, device, x: ensemble.run.from_checkpoints(
        dict(zip("abc", checkpoints(), strict=True)), device=device
    ).log_probabilities(x),
    "ensemble.load_ensemble": lambda home, device, x: ensemble.load_ensemble(
        home, "all", device=device
    ).members.log_probabilities(x),
    "ensemble.from_pretrained": lambda home, device, x: ensemble.from_pretrained(
        home.path.parent / "all", device=device
    ).members.log_probabilities(x),
    "ensemble.cross_fitted": lambda home, device, x: crossed(device, x),
}


def test_the_table_has_every_public_name_that_takes_a_device() -> None:
    """A new one needs its line there, with which it is run and refused."""
    assert {*ENTRIES} == taking_a_device()


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_takes_a_device_answers_there(entry: str, device: str, kept: zoo.Registry) -> None:
    """As on the CPU; what is public comes from the packages' lists."""
    x = torch.randn(5, SPEC.inputs, generator=torch.Generator().manual_seed(0))
    found = ENTRIES[entry](kept, device, x.to(usable_device(device)))
    assert found.device == usable_device(device)
    torch.testing.assert_close(found.cpu(), ENTRIES[entry](kept, "cpu", x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("entry", ENTRIES)
def test_other_accelerators_are_refused(entry: str, kept: zoo.Registry) -> None:
    """In one line, before anything fails within."""
    for other in ("mps", "xpu"):
        with pytest.raises(ValueError, match=f"^expected 'cpu' or a CUDA device, got '{other}'.*; use 'cpu'$"):
            ENTRIES[entry](kept, other, torch.zeros(5, SPEC.inputs))


def test_features_on_other_devices_are_refused() -> None:
    """That are there already."""
    with pytest.raises(ValueError, match="expected features on the CPU or a CUDA device, got meta"):
        zoo.FrameSet(torch.zeros(3, 2, device="meta"), None, torch.tensor([0, 3]), ("a", "b"))
    with pytest.raises(ValueError, match="expected 'cpu' or a CUDA device, got 'meta'"):
        usable_device("meta")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms_agree(frames: zoo.FrameSet, device: str, form: Form) -> None:
    """Also for another batch than the one by which a graph was captured."""
    one = group(device)
    for scale in (1, 2, 3):
        batch = Batch.of(zoo.data.stretch(replace(frames, features=frames.features * scale).to(device), 2, "none"))
        with torch.inference_mode():
            expected = torch.stack([module(batch.windows).softmax(-1) for module in one.modules])
            found = one.log_probabilities(form, batch).exp()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if form.precision == "float32" else 2e-2)


def test_graphs_are_captured_where_the_members_are(frames: zoo.FrameSet, device: str, pretended: PretendedCuda) -> None:
    """On a stream of their own, so that other threads may go on meanwhile."""
    batch = Batch.of(zoo.data.stretch(frames.to(device), 2))
    with torch.inference_mode():
        group(device).log_probabilities(Form("replay", 64), batch)
    (capture,) = pretended.captures
    assert capture.device == usable_device(device)
    assert (capture.own_stream, capture.error_mode) == (True, "thread_local")
    assert capture.calls


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("where", ["memory", "store"])
def test_collecting(frames: zoo.FrameSet, device: str, count: int, precision: str, where: str, tmp_path: Path) -> None:
    """Outputs on the CPU, complete when they are given back, wherever frames, labels and boundaries are."""
    cache = None if where == "memory" else tmp_path / "store"
    expected = ensemble.collect(members("cpu", count), frames)
    spread = members(device, count, precision=precision)
    spread.step = 32  # several pieces
    for given in (frames, frames.to(device), moved(frames, device)):
        found = ensemble.collect(spread, given, cache)
        atol = 1e-5 if precision == "float32" else 1e-2
        torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=0, atol=atol)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.groups, expected.groups)
        assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("classes", ["abcd", "dbca"])
def test_what_is_on_the_device_is_scored(frames: zoo.FrameSet, device: str, classes: str) -> None:
    """Labels may be anywhere; so may what outputs are made of, and batches of a loader."""
    several, there = members(device, classes=classes), moved(frames, device)
    final = ensemble.Ensemble(several, ensemble.WeightedMean([1, 2, 3]))
    assert final.score(there) == final.score(frames)
    own = torch.tensor([classes.index(name) for name in frames.classes])[frames.labels].to(device)
    assert torch.equal(ensemble.collect(several, there).labels, own.cpu())
    assert final.score(frames) == final.score(frames, own)
    x = torch.randn(20, SPEC.inputs, device=device)
    values = several.log_probabilities(x)
    outputs = ensemble.MemberOutputs(values, several.names, several.classes, own[:20], own[:20])
    rows = dict(zip(several.names, values.exp(), strict=True))
    given = ensemble.MemberOutputs.from_probabilities(rows, labels=own[:20], groups=own[:20])
    batches = ensemble.collect(several, [(x[:12], own[:12]), (x[12:], own[12:20])])
    for found in (outputs, given, batches):
        assert found.probabilities.device == found.labels.device == torch.device("cpu")
        torch.testing.assert_close(found.probabilities, values.exp().cpu())
        assert len(ensemble.evaluate(found, {"mean": ensemble.mean}).rules) == 1


@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("setting", ["none", "matmul", "cuda", "all", "medium"])
def test_tf32_comes_and_goes(frames: zoo.FrameSet, device: str, setting: str, precision: str, tf32: Tf32) -> None:
    """Whatever the user set, by either interface of torch, products use it where it is wanted, and it comes back."""
    tf32.choose(setting)
    before, legacy, seen = tf32.own(), tf32.legacy(), []
    batch = Batch.of(zoo.data.stretch(frames.to(device), 2))
    with torch.inference_mode():
        for _ in group(device).pieces(Form("folded", 64, precision), batch):
            assert tf32.own() == before
        with forms.products(tf32=precision == "tf32"):
            seen.append(torch.backends.cuda.matmul.fp32_precision == "tf32")
    assert seen == [precision == "tf32"]
    assert (tf32.own(), tf32.legacy()) == (before, legacy)


def test_tf32_is_not_looked_at_on_the_cpu(frames: zoo.FrameSet, tf32: Tf32, monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is another program's affair, and reading it by torch's older interface can raise."""
    tf32.choose("matmul")
    monkeypatch.delattr(forms, "products")
    ensemble.collect(members("cpu"), frames)
    assert tf32.own() == ["none", "none", "tf32"]


def test_the_older_interface_serves_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.9 there is no other."""
    matmul = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    with forms.products(tf32=False):
        assert not matmul.allow_tf32
    assert matmul.allow_tf32


@pytest.mark.parametrize(
    ("capability", "fast"),
    [((6, 0), ["float16"]), ((7, 5), ["float16"]), ((8, 0), ["tf32", "bfloat16"]), ((12, 0), ["tf32", "bfloat16"])],
)
def test_a_card_without_bfloat16_gets_float16(
    capability: tuple[int, int], fast: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would emulate bfloat16 there, and says that it is supported."""
    with PretendedCuda(monkeypatch, capability=capability):
        assert _engine.fast_types(torch.device("cuda:1")) == fast


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_training_takes_bfloat16_where_the_card_multiplies_in_it(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "auto"; float16, which needs its gradients scaled, is left to those who ask for it."""
    with PretendedCuda(monkeypatch, capability=capability):
        assert recipe_from(None, Fields(precision="auto"), "cuda").precision == chosen


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_what_is_measured_on_a_card_agrees(
    frames: zoo.FrameSet, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "auto" every form of the card's own types is tried, and what is chosen keeps to the rule."""
    monkeypatch.setattr(_engine, "_WORTH", 0)
    monkeypatch.setattr(plan, "_BUDGET", 60.0)
    expected = ensemble.collect(members("cpu"), frames).probabilities
    with PretendedCuda(monkeypatch, capability=capability):
        several = members("cuda:1", precision="auto")
        found = ensemble.collect(several, frames).probabilities
        rows = [row for row in several.plan() if row["moved"] is not None]
    assert float((found - expected).abs().max()) <= 0.01
    narrow = {"float16"} if capability < (8, 0) else {"tf32", "bfloat16"}
    assert {row["precision"] for row in rows} == {"float32"} | narrow
    assert {row["form"] for row in rows} == {"overlap", "folded", "replay", "loop"}
    assert all(row["moved"] <= 0.01 for row in rows)


def test_an_overflow_in_float16_is_seen(frames: zoo.FrameSet, device: str) -> None:
    """On a frame that no comparison saw: the batch is run again, and all later ones, in a type that holds it."""
    one, features = group(device, precision="auto"), frames.features.clone()
    features[77, :] = 1e5
    batch = Batch.of(zoo.data.stretch(replace(frames, features=features).to(device), 2, "none"))
    one.plans[256, batch.overlaps] = Plan(Form("folded", 64, "float16"), "agreed before")
    found = torch.full((3, len(frames), 4), torch.nan, device=device)

    def write(members: slice, rows: slice, logits: Tensor) -> None:
        found[members, rows] = logits.softmax(-1, dtype=torch.float32)

    with torch.inference_mode():
        one.run(batch, write)
        expected = torch.stack([module(batch.windows).softmax(-1) for module in one.modules])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert "float16" not in {form.precision for form in one.candidates(batch)}


def test_an_exact_form_is_always_tried(frames: zoo.FrameSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the time for trying is used up by faster types, none of which agrees in the end."""
    monkeypatch.setattr(plan, "_BUDGET", -1.0)
    tried: list[Form] = []

    def run(form: Form, count: int) -> Tensor:
        tried.append(form)
        return torch.zeros(1, count, 2)

    wanted = [Form("folded", 64, "bfloat16"), Form("folded", 32, "bfloat16"), Form("folded", 64), Form("loop", 64)]
    plan.try_all(wanted, run, frames=64, compare=lambda form, values: Agreement(0.0, 0.0, near=True))
    assert set(tried) == {wanted[0], wanted[2], wanted[3]}


def test_a_plan_belongs_to_a_kind_of_card(pretended: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members on the CPU ask for no card, which would initialise CUDA."""
    files = {plan.file_of(torch.device("cuda", index), frames=64) for index in (0, 1)}
    assert len(files | {plan.file_of(torch.device("cpu"), frames=64)}) == 3
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "one kind")
    assert len({plan.file_of(torch.device("cuda", index), frames=64) for index in (0, 1)}) == 1
    monkeypatch.delattr(torch.cuda, "get_device_name")
    assert plan.file_of(torch.device("cpu"), frames=64)


def test_a_form_is_timed_on_its_device(frames: zoo.FrameSet, device: str, pretended: PretendedCuda) -> None:
    """The host waits for that device, not for the current one."""
    values = torch.zeros(1, 64, 2, device=device)
    pretended.waits.clear()
    plan.attempt(Form("loop", 64), lambda form, count: values, 64, lambda form, values: Agreement(0.0, 0.0, near=True))
    assert {where for *_, what, where in pretended.waits if what == "synchronize"} == {usable_device(device)}


def test_costs_are_measured_on_the_device(frames: zoo.FrameSet, device: str, pretended: PretendedCuda) -> None:
    """The clock is read when it has finished; memory is its own account, 5,000 bytes of 1,000 where pretended."""
    modules = {name: zoo.build(SPEC, seed=seed) for seed, name in enumerate("ab")}
    specs = dict.fromkeys(modules, SPEC)
    members = ensemble.from_modules(modules, classes=frames.classes, specs=specs, device=device)
    rules = {"mean": ensemble.mean, "cascade": ensemble.rules.Cascade(ensemble.mean)}
    pretended.waits.clear()
    costs = ensemble.run.measure_costs(members, frames, rules, repeats=1)
    assert [*costs] == ["a", "b", "mean", "cascade"]
    assert {cost.memory for cost in costs.values()} == {4000}
    assert all(cost.microseconds >= 0 for cost in costs.values())
    timed = [
        where for file, _, what, where in pretended.waits.elements() if (file, what) == ("run/costs.py", "synchronize")
    ]
    assert timed == [usable_device(device)] * 2 * 4  # before and after three runs and a rule


@pytest.mark.parametrize("where", ["memory", "store"])
def test_waits_in_collecting(
    frames: zoo.FrameSet, device: str, pretended: PretendedCuda, where: str, tmp_path: Path
) -> None:
    """A piece more costs one wait, for the piece before it, while its own work is under way."""
    several, there = members(device), frames.to(device)
    counts = []
    for step in (138, 46):
        several.step = step
        ensemble.collect(several, there)  # plans are made
        pretended.waits.clear()
        ensemble.collect(several, there, None if where == "memory" else tmp_path / str(step))
        counts.append(Counter(what for _, _, what, _ in pretended.waits.elements()))
    looks = Counter({"cuda to cpu": 2})  # whether modules that somebody else has too were changed
    assert counts[1] - counts[0] - looks == Counter(event=2)


def test_waits_in_predicting(frames: zoo.FrameSet, pretended: PretendedCuda) -> None:
    """A piece more, 32,768 frames by default, costs four.

    One to know that it has no NaN before the rule sees it, one to look whether modules that somebody else has too were
    changed, and two for its results: the rows, and how many members were asked.
    """
    final, counts = ensemble.Ensemble(members("cuda:1"), ensemble.mean), []
    for step in (138, 46):
        final.members.step = step
        final.predict_proba(frames.to("cuda:1"))  # plans are made
        pretended.waits.clear()
        final.predict_proba(frames.to("cuda:1"))
        counts.append(Counter(what for _, _, what, _ in pretended.waits.elements()))
    assert counts[1] - counts[0] == {"tolist": 2, "cuda to cpu": 2, "__setitem__ between devices": 4}


@pytest.mark.parametrize("count", [250, 1000])
def test_waits_in_scoring(device: str, pretended: PretendedCuda, count: int) -> None:
    """Two for the results of all members, however many batches there are: the sums are on the device."""
    features, labels = torch.randn(count, 6), torch.randint(4, (count,))
    frames = zoo.FrameSet(features, labels, torch.tensor([0, count]), tuple("abcd"))
    model, members = zoo.build(SPEC, seed=0).eval(), 64  # in batches of 256
    expected = Scorer(frames, SPEC)(lambda x: model(x)[None])
    scorer, there = Scorer(frames.to(device), SPEC), zoo.build(SPEC, seed=0).eval().to(device)
    pretended.waits.clear()
    found = scorer(lambda x: there(x).expand(members, -1, -1), members)
    assert pretended.waits.total() == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.expand(members))


@pytest.mark.parametrize("padding", ["recording", "corpus"])
@pytest.mark.parametrize("normalisation", ["none", "mean", "mean_std", "z_score", "min_max"])
def test_windows(frames: zoo.FrameSet, device: str, normalisation: str, padding: str) -> None:
    """The CPU's, of frames whose features alone are on the device, or all their parts."""
    every = torch.arange(len(frames))
    expected = zoo.windows(frames, every, 2, normalisation, padding)
    for there in (frames.to(device), moved(frames, device)):
        found = zoo.windows(there, every, 2, normalisation, padding)
        assert found.device == there.features.device
        torch.testing.assert_close(found.cpu(), expected, **near())
        stretch = zoo.data.stretch(there, 2, normalisation, padding).windows()
        torch.testing.assert_close(stretch.cpu(), expected, **near())
        assert there.fingerprint == frames.fingerprint


RECIPES: list[dict[str, Any]] = [
    *({"precision": kind, "clip_norm": 1.0, "accumulate": 2} for kind in ("bfloat16", "float16")),
    {"ema": 0.9, "l1": 1e-3, "clip_value": 0.5},
    {"swa_from": 1, "label_smoothing": 0.1},
    {"mask_time": 2, "mask_features": 2, "fraction": 0.5},
    {"schedule": "plateau", "patience": 2, "monitor": "valid/loss"},
]
TRAININGS = [("cuda", changes) for changes in RECIPES[:2]] + [("cuda:1", changes) for changes in RECIPES]
TRAININGS += [("cuda:1", {"optimiser": name}) for name in OPTIMISERS]


@pytest.mark.parametrize(("device", "changes"), TRAININGS, ids=str, indirect=["device"])
def test_training(frames: zoo.FrameSet, device: str, changes: dict[str, Any]) -> None:
    """Learns what the CPU learns, alone and co-trained, and leaves all random states as they were."""
    recipe = zoo.Recipe(**{"epochs": 2, "batch_size": 32, "learning_rate": 0.01} | changes)

    def work(data: zoo.FrameSet) -> list[zoo.Checkpoint]:
        together = ensemble.cotrain(SPEC, recipe, data, data, seeds=range(2), together=2)
        return [zoo.train(SPEC, recipe, data, data), *together]

    before, expected = states(), work(frames)
    for one, other in zip(work(frames.to(device)), expected, strict=True):
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], **near(1e-3))
    assert all(map(torch.equal, before, states()))


def test_labels_left_on_the_cpu_are_noticed(
    frames: zoo.FrameSet, pretended: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that is planted here in training, then in scoring."""
    there, other = frames.to("cuda:1"), "same device, but found cpu, cuda:1"

    def planted(*parts: Tensor, **more: Tensor) -> TrainingBatch:
        made = TrainingBatch(*parts, **more)
        return replace(made, labels=made.labels.cpu())

    with monkeypatch.context() as some:
        some.setattr("zoo.training.step.Batch", planted)
        for work in (zoo.train, lambda *given: ensemble.cotrain(*given, seeds=range(2), together=2)):
            with pytest.raises(RuntimeError, match=other):
                work(SPEC, zoo.Recipe(epochs=1, batch_size=32), there, there)
    scorer, model = Scorer(there, SPEC), zoo.build(SPEC, seed=0, device="cuda:1")
    scorer._labels = scorer._labels.cpu()
    with pytest.raises(RuntimeError, match=other):
        scorer(lambda x: model(x)[None])


@pytest.mark.parametrize("wrong", ["cpu", "cuda:0"])
def test_a_generator_of_another_device_is_noticed(pretended: PretendedCuda, wrong: str) -> None:
    """A fault that is planted here in the dropout of co-trained members."""
    spec, x = replace(SPEC, options={**SPEC.options, "dropout": 0.2}), torch.zeros(3, SPEC.inputs, device="cuda:1")
    stack = TrainingStack([zoo.build(spec, seed=seed, device="cuda:1") for seed in range(2)])
    stack(x)
    stack.generators[1] = torch.Generator(wrong)
    with pytest.raises(RuntimeError, match=f"Expected a 'cuda:1' device type for generator but found '{wrong}'"):
        stack(x)


def test_statistics_of_any_batchnorm_are_where_the_members_are(pretended: PretendedCuda) -> None:
    """Of one without parameters, too."""
    norm = nn.BatchNorm1d(4, affine=False)
    models = [nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)).to("cuda:1") for _ in range(2)]
    stack = TrainingStack(models)
    stack(torch.randn(5, 3).to("cuda:1"))
    assert {tensor.device for tensor in stack.state_dict().values()} == {torch.device("cuda:1")}


@pytest.mark.parametrize("device", ["cuda:1"], indirect=True)
@pytest.mark.parametrize(
    "changes", [{"temperature": 2.0, "hard_weight": 0.5}, {"mix_up": 0.3, "mask_time": 2}], ids=str
)
@pytest.mark.parametrize("classes", ["abcd", "dbca"])
def test_training_with_a_teacher(frames: zoo.FrameSet, device: str, changes: dict[str, Any], classes: str) -> None:
    """From the members' own device, of other context and classes' order, with frames without labels."""
    recipe = zoo.Recipe(**{"epochs": 2, "batch_size": 32, "learning_rate": 0.01} | changes)
    spec, more = replace(SPEC, context=1), replace(frames.select(torch.tensor([0, 4])), labels=None)

    def work(where: str) -> list[zoo.Checkpoint]:
        teacher = ensemble.run.teacher_of(
            ensemble.Ensemble(members(where, classes=classes, plan="loop"), ensemble.mean)
        )
        lesson: Any = {"teacher": teacher, "unlabelled": [more.to(where)]}
        data = frames.to(where)
        together = ensemble.cotrain(spec, recipe, data, data, seeds=range(2), together=2, own_order=True, **lesson)
        return [zoo.train(spec, recipe, data, data, **lesson), *together]

    expected, before = work("cpu"), states()
    for one, other in zip(work(device), expected, strict=True):
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], **near(1e-3))
    assert all(map(torch.equal, before, states()))


@pytest.mark.parametrize("device", ["cuda:1"], indirect=True)
def test_cross_fitted_and_stored_teachers(frames: zoo.FrameSet, device: str) -> None:
    """On a device as on the CPU."""

    def work(where: str) -> list[zoo.Checkpoint]:
        data, recipe = frames.to(where), zoo.Recipe(epochs=2, batch_size=32)
        folds = ensemble.cotrain(SPEC, recipe, data, data, seeds=[0], folds=2)
        crossed = ensemble.run.cross_fitted(folds, data, folds=2, device=where, plan="loop")
        answers = crossed.predict(zoo.windows(data, torch.arange(len(data)), 2), torch.arange(len(data)))
        stored = zoo.training.Teacher.stored(answers, [data], top=2)
        mixed = replace(recipe, mix_up=0.3)
        return [zoo.train(SPEC, own, data, data, teacher=t) for own, t in ((mixed, crossed), (recipe, stored))]

    for one, other in zip(work(device), work("cpu"), strict=True):
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], **near(1e-3))


@pytest.mark.parametrize("changes", [{}, {"optimiser": "adagrad"}, {"precision": "float16"}], ids=str)
def test_a_killed_run_goes_on(frames: zoo.FrameSet, device: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """To the same weights, with the device's own random numbers for dropout."""
    spec = replace(SPEC, options={**SPEC.options, "dropout": 0.2})
    recipe, there = zoo.Recipe(**{"epochs": 3, "batch_size": 32} | changes), frames.to(device)
    whole = zoo.train(spec, recipe, there, there)

    def kill(record: Mapping[str, Any]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.train(spec, recipe, there, there, directory=tmp_path, on_epoch=kill)
    assert zoo.train(spec, recipe, there, there, directory=tmp_path).digest == whole.digest


MORE = {  # commands that work in several ways
    "zoo verify": "--metrics --corpus corpus --valid test",
    "zoo adopt": f"{ARGUMENTS['zoo adopt'].replace('--activation relu', '--try')} --corpus corpus --valid test",
}
UNLIKE = (  # from run to run; and as two members are equal, weights go to either
    "second|per_step|microseconds|created|blob|^id$|fingerprint|digest|sha256|weight|^(low|high|included)$"
)


def unlike(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two answers differ in their parts, or in figures by more than 0.001."""
    if isinstance(one, dict) and one.keys() == other.keys():
        return [each for k in one if not re.search(UNLIKE, k) for each in unlike(one[k], other[k], f"{where}.{k}")]
    if isinstance(one, list) and len(one) == len(other):
        return [each for k, pair in enumerate(zip(one, other, strict=True)) for each in unlike(*pair, f"{where}[{k}]")]
    same = one == pytest.approx(other, abs=1e-3) if isinstance(one, float) else type(one) is type(other)
    return [] if same and not isinstance(one, dict | list) else [f"{where}: {one} and {other}"]


@pytest.mark.parametrize("device", ["cuda:1"], indirect=True)
def test_commands(device: str, command: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that take `--device` run there, with the CPU's results."""
    torch.save(zoo.Registry().load("cylinder-a").state_dict(), "saved.pth")
    lines = [f"{name} {arguments}" for table in (ARGUMENTS, MORE) for name, arguments in table.items()]
    shutil.copytree(home, home / "other", ignore=shutil.ignore_patterns("other"))
    for line in [line for line in lines if "--device" in command(f"{' '.join(line.split()[:2])} --help").out]:
        found = []
        for place, where in ((home, device), (home / "other", "cpu")):
            monkeypatch.chdir(place)
            found.append(command(f"{line} --device {where} --json"))
        assert (found[0].code, found[0].err) == (found[1].code, found[1].err)
        assert unlike(found[0].data, found[1].data) == [], line


@pytest.mark.parametrize("device", ["cuda:1"], indirect=True)
def test_members_on_a_device_are_exported(frames: zoo.FrameSet, device: str, tmp_path: Path) -> None:
    """From the CPU, also where the frames to compare on are on the device."""
    pytest.importorskip("onnxruntime")
    final = ensemble.Ensemble(members(device, classes="dbca"), ensemble.mean)
    exported = final.to_onnx(tmp_path / "final.onnx", frames=moved(frames, device))
    assert exported.agreement.changed == 0


def test_a_set_is_sent_to_another_process(device: str) -> None:
    """With its device."""
    several = members(device)
    assert pickle.loads(pickle.dumps(several)).device == several.device == usable_device(device)


STEPS: list[tuple[dict[str, Any], int]] = [
    *(({"optimiser": name}, 0) for name in OPTIMISERS if name != "adam_sgd"),
    ({"optimiser": "adam_sgd"}, 1),  # whether a member switches is decided on the host, from this step's numbers
    ({"mask_time": 2, "mask_features": 2, "mix_up": 0.3}, 0),
    ({"clip_norm": 1.0, "clip_value": 0.5, "l1": 1e-3, "accumulate": 2, "precision": "bfloat16"}, 0),
    ({"precision": "float16"}, 0),
    ({"precision": "float16", "optimiser": "rmsprop"}, 1),  # torch's scaler asks the host whether the step is taken
]


@pytest.mark.parametrize(("changes", "waits"), STEPS, ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_waits_in_a_step(
    frames: zoo.FrameSet, pretended: PretendedCuda, changes: dict[str, Any], waits: int, own: bool
) -> None:
    """None but those that are justified above; also where members have their own order, rates and decays."""
    recipes = [zoo.Recipe(batch_size=16, seed=seed, **changes) for seed in ((0, 1) if own else (0,))]
    if own and OPTIMISERS[recipes[0].optimiser].proportional:
        recipes[1] = replace(recipes[1], order_seed=9, learning_rate=0.02, weight_decay=0.1)
    there, rates = frames.to("cuda:1"), torch.tensor([recipe.learning_rate for recipe in recipes], dtype=torch.float64)
    stepper = Stepper(stacked_group(SPEC, recipes, "cuda:1"), "cuda:1")
    for number, batches in enumerate(Batches(there, SPEC, recipes).epoch(1)):
        if number in (2, 3):
            pretended.waits.clear()
        stepper.step(batches, rates)
        if number in (2, 3):
            assert pretended.waits.total() == waits, pretended.waits


@pytest.mark.parametrize("device", ["cuda:1"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "taught"),
    [
        ({}, False),
        ({"optimiser": "adagrad"}, False),
        ({"mask_time": 2, "mask_features": 2}, False),
        ({"ema": 0.9}, False),
        ({"temperature": 2.0, "hard_weight": 0.5}, True),
        ({"mix_up": 0.3, "mask_time": 2}, True),
    ],
    ids=str,
)
def test_waits_in_training(
    frames: zoo.FrameSet,
    device: str,
    pretended: PretendedCuda,
    changes: dict[str, Any],
    taught: bool,
    tmp_path: Path,
) -> None:
    """A step more costs no wait, in a resumed run too: masks and mixing are drawn and sent for many steps at once."""
    there, found = frames.to(device), []
    kept = {f"m{k}": zoo.Checkpoint.from_module(zoo.build(SPEC, seed=k), SPEC, [*"dbca"]) for k in range(3)}
    teacher = ensemble.run.teacher_of(
        ensemble.Ensemble(ensemble.run.from_checkpoints(kept, device=device), ensemble.mean)
    )
    lesson: Any = {"teacher": teacher, "unlabelled": [there.select(torch.tensor([0]))]} if taught else {}

    def kill(record: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    for batch_size in (138, 46):  # one step an epoch, or three
        work = SPEC, zoo.Recipe(**{"epochs": 2, "batch_size": batch_size} | changes), there, there
        with pytest.raises(KeyboardInterrupt):
            zoo.train(*work, directory=tmp_path / str(batch_size), on_epoch=kill, **lesson)
        pretended.waits.clear()
        zoo.train(*work, directory=tmp_path / str(batch_size), **lesson)
        found.append(pretended.waits.total())
    assert found[1] == found[0]
