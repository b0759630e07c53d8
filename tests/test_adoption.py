"""Checkpoints saved elsewhere: what is found in files, what is read off shapes, and that the answers stay the same."""

import argparse
import pickle
import warnings
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import zoo
from zoo.checkpoint.adoption import Chain, chain_of, checkpoint_by_name, read_foreign
from zoo.models.architectures import ARCHITECTURES, architecture_of
from zoo.models.blocks import ACTIVATIONS


def shaken(module: nn.Module) -> nn.Module:
    """The module in eval mode, with statistics of BatchNorm as training leaves them."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
    return module.eval()


def layers(
    *sizes: int, order: str = "lbad", activation: type[nn.Module] = nn.GELU, bias: bool = True
) -> list[nn.Module]:
    """Hidden layers of l(inear), b(atchnorm), a(ctivation), d(ropout) in this order, and a last Linear."""
    made: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        kinds = {"b": nn.BatchNorm1d(outputs), "a": activation(), "d": nn.Dropout(0.1)}
        made += [nn.Linear(inputs, outputs, bias=bias) if letter == "l" else kinds[letter] for letter in order]
    return [*made, nn.Linear(*sizes[-2:])]


class Net(nn.Module):
    """A class of a notebook, which keeps its layers in an attribute."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.model(x)


def saved(folder: Path, data: Any) -> Path:
    """A file with this data, as `torch.save` writes it."""
    torch.save(data, folder / "saved.pth")
    return folder / "saved.pth"


def checkpoint_of(chain: Chain, *, activation: str = "gelu", **told: Any) -> zoo.Checkpoint:
    """The checkpoint of a chain, of windows of one frame."""
    names = [str(index) for index in range(chain.classes)]
    return chain.checkpoint(names, activation=activation, features=chain.inputs, normalisation="none", **told)


def assert_same(checkpoint: zoo.Checkpoint, module: nn.Module) -> None:
    """Equal up to the rounding of float32: a bias moves into BatchNorm, or BatchNorm into a Linear."""
    x = torch.randn(40, checkpoint.spec.inputs)
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.to_module()(x), module(x), rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    order=st.sampled_from(["la", "lad", "lba", "lbad", "lab", "labd", "ldba"]),
    bias=st.booleans(),
    ends=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    wrapper=st.sampled_from([Net, nn.DataParallel, AveragedModel, nn.Identity]),
)
def test_the_checkpoint_answers_as_the_module(tmp_path_factory, sizes, activation, order, bias, ends, dtype, wrapper):
    """Whatever layers a sequence is made of, and whatever is around it."""
    hidden = layers(6, *sizes, 5, order=order, activation=ACTIVATIONS[activation].layer, bias=bias)
    first, last = [nn.BatchNorm1d(6)] * ends[0], [nn.BatchNorm1d(5, affine=False)] * ends[1]
    module = shaken(nn.Sequential(*first, *hidden, *last)).to(dtype)
    state = module.state_dict() if wrapper is nn.Identity else wrapper(module).state_dict()
    chain = chain_of(read_foreign(saved(tmp_path_factory.mktemp("files"), state)))
    place = ("before" if order.index("b") < order.index("a") else "after") if "b" in order else ""
    assert chain.place in ("", place)
    assert_same(checkpoint_of(chain, activation=activation, place=place), module.float())


@pytest.mark.parametrize(
    ("order", "batchnorm", "place", "asks"),
    [
        ("la", False, "", False),
        ("lba", True, "before", False),
        ("lbad", True, "before", False),
        ("lab", False, "after", False),  # folded: `mlp` has none behind the activation
        ("labd", False, "", True),  # the same numbers as of "ldba"
    ],
)
def test_the_spec_is_read_off_shapes_and_numbers(tmp_path, order, batchnorm, place, asks) -> None:
    """Widths and BatchNorm; and where it stands, as far as the numbers of an nn.Sequential tell."""
    chain = chain_of(read_foreign(saved(tmp_path, nn.Sequential(*layers(6, 8, 7, 5, order=order)).state_dict())))
    assert (chain.inputs, chain.widths, chain.classes) == (6, (8, 7), 5)
    assert (chain.place, chain.asks_place, chain.architectures) == (place, asks, ("mlp",))
    spec = checkpoint_of(chain, place="after" if asks else "").spec
    assert (spec.options["widths"], spec.options["batchnorm"], spec.options["activation"]) == (
        (8, 7),
        batchnorm,
        "gelu",
    )


def test_a_bias_in_front_of_batchnorm_goes_into_its_mean(tmp_path) -> None:
    """By hand: w x + b with mean m is w x with mean m - b."""
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 2))
    model[0].bias.data.fill_(3.0)
    model[1].running_mean.fill_(5.0)
    tensors = checkpoint_of(chain_of(read_foreign(saved(tmp_path, model.state_dict())))).tensors
    assert tensors["0.1.running_mean"].item() == 2.0
    assert "0.0.bias" not in tensors


class Apart(nn.Module):
    """Layers of one kind after the other, the last layer first, as a person may write them down."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.out = nn.Linear(widths[1], 3)
        self.fc1, self.fc2 = nn.Linear(4, widths[0]), nn.Linear(*widths)
        self.bn1, self.bn2 = map(nn.BatchNorm1d, widths)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.bn1(self.fc1(x)))
        return self.out(torch.relu(self.bn2(self.fc2(x))))


@pytest.mark.parametrize("widths", [(8, 7), (8, 8)])
@pytest.mark.parametrize("safetensors", [False, True])
def test_layers_may_be_made_in_another_order(tmp_path, widths, safetensors) -> None:
    """Their shapes allow one order alone; safetensors sorts by name."""
    model = shaken(Apart(widths))
    path = saved(tmp_path, model.state_dict())
    if safetensors:
        save_file(model.state_dict(), path)
    chain = chain_of(read_foreign(path))
    assert chain.asks_place
    assert_same(checkpoint_of(chain, activation="relu", place="before"), model)


class Lists(nn.Module):
    """Hidden layers in a list, norms in another, an output layer that a sorted file has in front of them."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes[:-1])])
        self.norms = nn.ModuleList(map(nn.BatchNorm1d, sizes[1:-1]))
        self.head = nn.Linear(*sizes[-2:])

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(torch.relu(layer(x)))
        return self.head(x)


@pytest.mark.parametrize("safetensors", [False, True])
def test_lists_of_layers_are_read_in_the_order_of_their_numbers(tmp_path, safetensors) -> None:
    """Shapes alone allow several orders of 3 to 3, 3 to 8, 8 to 3."""
    model = shaken(Lists(6, 3, 3, 8, 3, 5))
    path = saved(tmp_path, model.state_dict())
    if safetensors:
        save_file(model.state_dict(), path)
    chain = chain_of(read_foreign(path))
    assert chain.asks_place
    assert_same(checkpoint_of(chain, activation="relu", place="after"), model)


def test_a_norm_that_could_follow_two_layers_is_refused(tmp_path) -> None:
    """As many hidden units as classes, and BatchNorm made after the last layer: it may be that of either."""
    named = {"fc1": nn.Linear(6, 5), "fc2": nn.Linear(5, 5), "bn1": nn.BatchNorm1d(5)}
    with pytest.raises(zoo.CheckpointError, match="which layers the BatchNorm bn1 follow"):
        chain_of(read_foreign(saved(tmp_path, nn.ModuleDict(named).state_dict())))
    model = shaken(nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 5), nn.BatchNorm1d(5)))
    assert_same(checkpoint_of(chain_of(read_foreign(saved(tmp_path, model.state_dict())))), model)


@pytest.mark.parametrize("order", ["lba", "la"])
def test_numbers_are_sorted_as_numbers(tmp_path, order) -> None:
    """Twelve layers, so that "10" stands before "2" in a file that is sorted by name."""
    model = shaken(nn.Sequential(*layers(6, *[8] * 12, 5, order=order)))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert_same(checkpoint_of(chain_of(read_foreign(tmp_path / "a.safetensors"))), model)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "cylinder", "diamond"])
@pytest.mark.parametrize("batchnorm", [True, False])
def test_built_in_architectures_are_read_off(tmp_path, name, batchnorm) -> None:
    """Residual blocks with a projection have shapes of their own; `basic` looks like layers of one width."""
    options = {"width": 8, "depth": 2 if name == "cylinder" else 3, "batchnorm": batchnorm}
    model = shaken(zoo.build(zoo.Spec(name, 6, 0, 5, options=options), seed=0))
    chain = chain_of(read_foreign(saved(tmp_path, nn.DataParallel(model).state_dict())))
    could_be = {"basic": ("mlp", "basic"), "cylinder": ("mlp",), "diamond": ("mlp",), "bottleneck": ("bottleneck",)}
    assert chain.architectures == could_be[name]
    assert chain.asks_architecture == (name == "basic")
    told = {"architecture": name if chain.asks_architecture else "", "place": "before" if chain.asks_place else ""}
    assert_same(checkpoint_of(chain, activation="relu", **told), model)


def test_layers_of_one_width_may_be_residual_blocks(tmp_path) -> None:
    """It is asked unless they stand in one nn.Sequential with their activations, where nothing goes around a layer."""
    model = zoo.build(zoo.Spec("basic", 6, 0, 5, options={"width": 8, "depth": 2, "batchnorm": False}), seed=0).eval()
    state = dict(
        zip([f"{n}.{k}" for n in range(6) for k in ("weight", "bias")], model.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="expected mlp or basic for tensors of these shapes, got ''"):
        checkpoint_of(chain_of(read_foreign(saved(tmp_path, model.state_dict()))))
    for pattern in ("layers.{}", "fc{}", "{}.fc", "block{}.0"):
        named = {f"{pattern.format(name.split('.')[0])}.{name.split('.')[1]}": t for name, t in state.items()}
        chain = chain_of(read_foreign(saved(tmp_path, named)))
        assert (chain.architectures, chain.asks_architecture) == (("mlp", "basic"), True), pattern
        assert_same(checkpoint_of(chain, activation="relu", architecture="basic"), model)
    apart = {f"net.{2 * int(name.split('.')[0])}.{name.split('.')[1]}": t for name, t in state.items()}
    chain = chain_of(read_foreign(saved(tmp_path, apart)))
    assert not chain.asks_architecture
    assert checkpoint_of(chain).spec.architecture == "mlp"


def training() -> tuple[nn.Module, dict[str, Any]]:
    """A model and its optimiser's state after a step."""
    model = Net(nn.Sequential(*layers(6, 8, 5)))
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimiser.step()
    return model.eval(), optimiser.state_dict()


MODEL, OPTIMISER = training()
STATE = MODEL.state_dict()
SAVED: dict[str, tuple[Any, str, float | None]] = {  # what is saved, the key of its tensors, the accuracy it states
    "bare": (STATE, "", None),
    "with numbers beside": ({**STATE, "epoch": 3, "val_acc": 0.5}, "", 0.5),
    "course": (
        {"epoch": 3, "model_state_dict": STATE, "optimizer_state_dict": OPTIMISER, "val_acc": 87.5},
        "model_state_dict",
        0.875,
    ),
    "state_dict": (
        {"state_dict": STATE, "best_acc_epoch": "seven", "valid_accuracy": np.float64(0.25)},
        "state_dict",
        0.25,
    ),
    "model": ({"model": STATE, "optimizer": OPTIMISER, "acc": torch.tensor(0.75), "train_acc": 0.9}, "model", 0.75),
    "parallel": ({"net": nn.DataParallel(MODEL).state_dict()}, "net", None),
    "compiled": ({f"_orig_mod.{name}": tensor for name, tensor in STATE.items()}, "", None),
    "averaged": (AveragedModel(MODEL).state_dict(), "", None),
    "nested": (
        {"checkpoint": {"network": STATE, "optimiser": OPTIMISER}, "history": [0.1, 0.2]},
        "checkpoint.network",
        None,
    ),
    "in a list": ([STATE, OPTIMISER, 7], "0", None),
    "ema beside": ({"model": STATE, "ema": STATE, "scaler": {"scale": 65536.0}}, "model", None),
    "ema of another name": ({"mlp": STATE, "mlp_ema": STATE}, "mlp", None),
    "parts": ({str(index): layer.state_dict() for index, layer in enumerate(MODEL.model)}, "", None),
    "parameters": ({name: nn.Parameter(t) if t.is_floating_point() else t for name, t in STATE.items()}, "", None),
    "objects beside": (
        {"model": STATE, "args": argparse.Namespace(a=1), "path": Path("a"), "counts": defaultdict(list, a=[1])},
        "model",
        None,
    ),
    "more objects beside": (
        {
            "model": STATE,
            "confusion": np.ones((2, 2)),
            "recent": deque([1.0], maxlen=3),
            "when": datetime(2026, 1, 1, tzinfo=UTC),
            "grid": np.array(["a"], dtype=object),
            "optimiser_class": torch.optim.Adam,
            "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)]), 1),
            "frame": pandas.DataFrame({"a": [1]}),
        },
        "model",
        None,
    ),
    "random state beside": ({"model": STATE, "rng": torch.get_rng_state(), "losses": torch.zeros(9, 2)}, "model", None),
    "lightning": (
        {
            "epoch": 2,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {**STATE, "criterion.weight": torch.ones(5)},
            "callbacks": {
                "ModelCheckpoint{'monitor': 'val_acc'}": {"monitor": "val_acc", "best_model_score": torch.tensor(0.625)}
            },
            "optimizer_states": [OPTIMISER],
            "lr_schedulers": [],
            "hyper_parameters": {"width": 8},
        },
        "state_dict",
        0.625,
    ),
}


@pytest.mark.parametrize("case", SAVED)
def test_tensors_are_found_in_what_people_save(tmp_path, case) -> None:
    """The model's alone, whatever stands beside them; with the accuracy that the file states of held-out data."""
    data, key, accuracy = SAVED[case]
    foreign = read_foreign(saved(tmp_path, data))
    assert foreign.key == key
    assert (foreign.accuracy or (None, None))[1] == accuracy
    assert_same(checkpoint_of(chain_of(foreign)), MODEL)


def test_what_is_left_is_named(tmp_path) -> None:
    """By its first name beside the tensors; with the kind of what is not read."""
    data = {"run": {"model": STATE, "optim": OPTIMISER}, "args": argparse.Namespace(a=1), "acc": np.float32(0.5)}
    foreign = read_foreign(saved(tmp_path, data))
    assert foreign.left == ("run.optim", "args (argparse.Namespace)", "acc")
    assert (foreign.prefix, foreign.converted) == ("model.", ())


def test_a_key_chooses_among_several_models(tmp_path) -> None:
    """At any level, also within the names of one state."""
    other = shaken(Net(nn.Sequential(*layers(6, 8, 5))))
    path = saved(tmp_path, {"model": STATE, "ema": {"module": other.state_dict()}})
    assert_same(checkpoint_of(chain_of(read_foreign(path, key="ema.module"))), other)
    both = {
        **{f"student.{k}": v for k, v in STATE.items()},
        **{f"teacher.{k}": v for k, v in other.state_dict().items()},
    }
    assert_same(checkpoint_of(chain_of(read_foreign(saved(tmp_path, both), key="teacher"))), other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path, dtype) -> None:
    """And it is said."""
    model = Net(nn.Sequential(*layers(6, 8, 5))).eval().to(dtype)
    foreign = read_foreign(saved(tmp_path, model.state_dict()))
    assert foreign.converted == (str(dtype).removeprefix("torch."),)
    assert_same(checkpoint_of(chain_of(foreign)), model.float())


def test_counters_of_batchnorm_may_be_missing_or_int32(tmp_path) -> None:
    """They change nothing in evaluation."""
    model = shaken(nn.Sequential(*layers(6, 8, 5)))
    for state in (
        {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name},
        {name: tensor.int() if "num_batches" in name else tensor for name, tensor in model.state_dict().items()},
    ):
        assert_same(checkpoint_of(chain_of(read_foreign(saved(tmp_path, state)))), model)


OTHER = {
    "LayerNorm": nn.LayerNorm(8),
    "PReLU": nn.PReLU(),
    "BatchNorm without statistics": nn.BatchNorm1d(8, track_running_stats=False),
    "convolution": nn.Conv1d(8, 8, 3),
    "recurrent": nn.LSTM(8, 8),
    "attention": nn.MultiheadAttention(8, 2),
    "weight that a hook makes": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_layers_need_their_class(tmp_path, kind) -> None:
    """The message names the tensor, what it seems to be, and the way out."""
    state = nn.Sequential(nn.Linear(6, 8), OTHER[kind], nn.Linear(8, 5)).state_dict()
    with pytest.raises(zoo.CheckpointError, match=rf"1\..*{kind}.*--import FILE.py:CLASS"):
        chain_of(read_foreign(saved(tmp_path, state)))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a.weight": torch.ones(3, 4)}, "2 to 1000 Linear layers, got 1"),
        ({"a.weight": torch.ones(3, 4), "b.weight": torch.ones(3, 4)}, "in no way"),
        ({"0.weight": torch.ones(4, 4), "1.weight": torch.ones(4, 4), "3.weight": torch.ones(4, 4)}, "no activation"),
        ({"a.weight": torch.ones(3, 4), "a.bias": torch.ones(1), "b.weight": torch.ones(2, 3)}, "a.weight"),
        ({"a.weight": torch.ones(3, 4), "b.weight": torch.ones(2, 3), "scale": torch.ones(4)}, "scale"),
        ({"a.weight": torch.ones(3, 4, dtype=torch.int8), "b.weight": torch.ones(2, 3)}, "torch.int8"),
        ({**nn.Sequential(*layers(6, 8, 8, 8, 5)).state_dict(), "1.running_mean": torch.ones(9)}, "1.weight"),
    ],
)
def test_what_the_shapes_do_not_allow_is_refused(tmp_path, state, words) -> None:
    """Nothing is guessed."""
    with pytest.raises(zoo.CheckpointError, match=words):
        chain_of(read_foreign(saved(tmp_path, state)))


def test_names_without_numbers_do_not_tell_the_order_in_a_sorted_file(tmp_path) -> None:
    """Two layers of one shape could be swapped."""
    model = nn.ModuleDict(
        {"stem": nn.Linear(6, 8), "rest": nn.Linear(8, 8), "also": nn.Linear(8, 8), "z": nn.Linear(8, 5)}
    )
    assert chain_of(read_foreign(saved(tmp_path, model.state_dict()))).widths == (8, 8, 8)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(zoo.CheckpointError, match="in more than one way"):
        chain_of(read_foreign(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"best": STATE, "last": STATE}, "choose one by its key: 'best', 'last'"),
        ({"generator": STATE, "model": {"a.weight": torch.ones(2, 2)}}, "choose one by its key: 'generator', 'model'"),
        ({"epoch": 3, "optimizer": OPTIMISER}, "none among epoch, optimizer"),
        ([], "none among list"),
        ({**STATE, "model._extra_state": None}, "tensors alone .* NoneType as 'model._extra_state'"),
        ({"a.weight": torch.ones(2, 2).to_sparse()}, "_rebuild_sparse_tensor .sparse"),
        ({"a.weight": torch.ones(2, 2, dtype=torch.complex64)}, "complex64"),
        ({"a.weight": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)}, "_rebuild_qtensor"),
        ({"a.weight": torch.empty(2, 2, device="meta")}, "meta"),
        ({"a.weight": torch.ones(1).expand(1000, 1000)}, "repeats some of them"),
        (
            {"a": {"weight": STATE["model.0.weight"]}, "a.weight": STATE["model.0.weight"]},
            "one tensor of each name|one model",
        ),
    ],
)
def test_a_file_of_other_content_is_refused(tmp_path, data, words) -> None:
    """By name, before any of it is used."""
    with pytest.raises(zoo.CheckpointError, match=words):
        read_foreign(saved(tmp_path, data), key="" if "one model" in words else None)


def test_many_names_for_one_tensor_do_not_fill_the_memory(tmp_path) -> None:
    """A file of a megabyte could stand for terabytes."""
    one = torch.ones(512, 512)
    with pytest.raises(zoo.CheckpointError, match="expected tensors of about the file's"):
        read_foreign(saved(tmp_path, {f"{index}.weight": one for index in range(200)}))


def test_data_that_hold_themselves_end(tmp_path) -> None:
    """A list of lists, each twice in the next; and a dictionary in itself."""
    nested: Any = [torch.ones(2, 2)]
    for _ in range(40):
        nested = [nested, nested]
    circle: dict[str, Any] = {"a.weight": torch.ones(2, 2)}
    circle["again"] = circle
    for data in (nested, circle):
        with pytest.raises(zoo.CheckpointError, match="200,000 values in 60 levels"):
            read_foreign(saved(tmp_path, data))


def write_module(path: Path) -> None:
    torch.save(MODEL, path)


def write_module_inside(path: Path) -> None:
    torch.save({"epoch": 3, "args": argparse.Namespace(a=1), "model": MODEL}, path)


def write_old_module(path: Path) -> None:
    torch.save(MODEL, path, _use_new_zipfile_serialization=False)


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": np.ones(3)}))


def write_program(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but files of it are around
        torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).save(path)


def write_system_call(path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            import os

            return os.system, ("touch ran",)

    torch.save({"model": STATE, "x": Hostile()}, path)


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (write_module, "torch.save(load('m.pth', weights_only=False).state_dict(), 'm-tensors.pth')"),
        (write_module_inside, "torch.save(load('m.pth', weights_only=False)['model'].state_dict(), 'm-tensors.pth')"),
        (write_old_module, "torch.save(load('m.pth', weights_only=False).state_dict(), 'm-tensors.pth')"),
        (write_pickle, "torch.save(load(open('m.pth', 'rb')).state_dict(), 'm-tensors.pth')"),
        (write_program, "torch.save(load('m.pth').state_dict(), 'm-tensors.pth')"),
        (write_system_call, "torch.save(load('m.pth', weights_only=False).state_dict(), 'm-tensors.pth')"),
    ],
)
def test_what_only_code_can_read_is_refused_with_the_two_lines(
    tmp_path, monkeypatch, write: Callable[[Path], None], line: str
) -> None:
    """That convert it; no code in it is run."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m.pth")
    with pytest.raises(zoo.CheckpointError) as refused:
        read_foreign("m.pth")
    assert refused.value.reason == "PICKLE"
    assert [text.strip() for text in refused.value.message.splitlines()[-1:]] == [line]
    assert not Path("ran").exists()


def test_the_two_lines_convert_it(tmp_path, monkeypatch) -> None:
    """They run as they are printed."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": nn.Sequential(*layers(6, 8, 5))}, "m.pth")
    with pytest.raises(zoo.CheckpointError) as refused:
        read_foreign("m.pth")
    exec("\n".join(line.strip() for line in refused.value.message.splitlines()[1:]))
    assert chain_of(read_foreign("m-tensors.pth")).widths == (8,)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("old", [False, True])
def test_a_truncated_file_is_refused(tmp_path, share, old) -> None:
    """Wherever it was cut, in either of torch's formats."""
    path = tmp_path / "m.pth"
    torch.save(STATE, path, _use_new_zipfile_serialization=not old)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(zoo.CheckpointError):
        read_foreign(path)


@settings(max_examples=30, deadline=None)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8), old=st.booleans())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, places, old) -> None:
    """Never another error."""
    path = tmp_path_factory.mktemp("files") / "m.pth"
    torch.save({"model": STATE, "epoch": 3}, path, _use_new_zipfile_serialization=not old)
    data = bytearray(path.read_bytes())
    for place, value in places:
        data[int(place * (len(data) - 1))] = value
    path.write_bytes(data)
    with suppress(ValueError):
        checkpoint_of(chain_of(read_foreign(path)))


def test_old_files_of_tensors_are_read(tmp_path) -> None:
    """As torch wrote them before its files were archives."""
    torch.save({"model": STATE}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    assert_same(checkpoint_of(chain_of(read_foreign(tmp_path / "m.pth"))), MODEL)


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path) -> None:
    """`torch.save` compresses nothing."""
    with zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(zoo.CheckpointError, match="got 10,000,000"):
        read_foreign(tmp_path / "m.pth")


@pytest.mark.parametrize("largest", [101, 10**8])
def test_a_tensor_larger_than_its_record_is_refused(tmp_path, largest) -> None:
    """Its numbers would be read from beyond the end of the memory."""
    torch.save({"a.weight": torch.ones(10, 10)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        for name in whole.namelist():
            number = b"J" + largest.to_bytes(4, "little")  # of elements in the storage, and of rows
            data = whole.read(name).replace(b"Kd", number).replace(b"K\nK\n\x86", number + b"K\x01\x86")
            archive.writestr(name, data)
    with pytest.raises(zoo.CheckpointError, match="DAMAGED"):
        read_foreign(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "at least 8 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!doctype html><html></html>", "HTML page"),
        (b"PK\x03\x04" + b"\0" * 40, "truncated or damaged"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, content, words) -> None:
    """Whatever its name says."""
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(zoo.CheckpointError, match=words):
        read_foreign(tmp_path / "m.pth")


def test_own_checkpoints_and_missing_files_are_refused(tmp_path, registry) -> None:
    """The first by the command that takes them."""
    with pytest.raises(zoo.CheckpointError, match="zoo register"):
        read_foreign(registry.blobs.path(registry.get("a").sha256))
    with pytest.raises(zoo.CheckpointError, match="cannot read"):
        read_foreign(tmp_path / "nowhere.pth")
    with pytest.raises(zoo.CheckpointError, match="got a folder"):
        read_foreign(tmp_path)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"features": 4}, "such as 2, 6"),
        ({"features": 12}, "such as 2, 6"),
        ({"place": "after"}, "expected before"),
        ({"architecture": "basic"}, "expected mlp"),
        ({"activation": "glu"}, "unknown activation"),
        ({"classes": ["a"]}, "at least 2|5 classes"),
        ({"classes": list("aabcd")}, "different names"),
        ({"normalisation": "std"}, "unknown normalisation"),
    ],
)
def test_what_is_told_must_fit(tmp_path, told, words) -> None:
    """Sizes and names."""
    chain = chain_of(read_foreign(saved(tmp_path, STATE)))
    given = {"classes": list("abcde"), "activation": "gelu", "features": 2, "normalisation": "none", **told}
    with pytest.raises(ValueError, match=words):
        chain.checkpoint(given.pop("classes"), **given)


def test_not_finite_weights_are_refused(tmp_path) -> None:
    """Also those that float32 cannot hold."""
    state = {name: tensor.double() for name, tensor in STATE.items()}
    state["model.0.weight"] = state["model.0.weight"] * 1e60
    with pytest.raises(zoo.CheckpointError, match="finite"):
        checkpoint_of(chain_of(read_foreign(saved(tmp_path, state))))


class Own(nn.Module):
    """A class that shapes alone do not give."""

    def __init__(
        self, size: int, labels: int, hidden: Any = (4,), scale: float = 2.0, norm: Any = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.first = nn.Linear(size, hidden[0])
        self.norm, self.bn, self.scale = norm(hidden[0]), nn.BatchNorm1d(hidden[0]), scale
        self.last = nn.Linear(hidden[0], labels)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.last(torch.relu(self.bn(self.norm(self.first(x))))) * self.scale


@pytest.fixture
def own_class() -> Any:
    """`Own` as an architecture."""
    yield architecture_of(Own)
    del ARCHITECTURES["Own"]


def test_a_class_of_ones_own_is_taken_as_it_stands(tmp_path, own_class) -> None:
    """With any prefix, half precision, without counters, with tensors of a loss beside them."""
    spec = zoo.Spec("Own", 6, 0, 5, options={"hidden": [7], "scale": 3.0})
    assert dict(spec.options) == {"hidden": (7,), "labels": None, "scale": 3.0, "size": None}
    model = shaken(Own(6, 5, [7], 3.0)).half().float()
    state = {
        f"module.net.{name}": tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    del state["module.net.bn.num_batches_tracked"]
    state["module.criterion.weight"] = torch.ones(5)
    checkpoint = checkpoint_by_name(read_foreign(saved(tmp_path, state)), spec, "abcde")
    assert_same(checkpoint, model)
    inside = {name.removeprefix("first."): tensor for name, tensor in model.first.state_dict().items()}
    with pytest.raises(zoo.CheckpointError, match="one prefix with which the names fit"):
        checkpoint_by_name(read_foreign(saved(tmp_path, inside)), spec, "abcde")


def test_a_prefix_may_be_the_models(tmp_path, own) -> None:
    """The inner module was saved, the class has it in an attribute."""
    net = own(
        ARCHITECTURES,
        "outer",
        "from torch import nn\n\n\n@zoo.architecture\ndef outer(inputs, classes):\n"
        "    return nn.Sequential(nn.ModuleDict({'inner': nn.Linear(inputs, classes)})['inner'])\n",
    )
    inner = nn.Linear(6, 5)
    checkpoint = checkpoint_by_name(read_foreign(saved(tmp_path, inner.state_dict())), zoo.Spec(net, 6, 0, 5), "abcde")
    assert_same(checkpoint, inner)


def test_several_models_that_fit_are_refused(tmp_path, own_class) -> None:
    """Nothing is chosen by chance."""
    state = {f"{name}.{key}": tensor for name in ("a", "b") for key, tensor in Own(6, 5).state_dict().items()}
    with pytest.raises(zoo.CheckpointError, match=r"got '[ab]\.' and '[ab]\.'"):
        checkpoint_by_name(read_foreign(saved(tmp_path, state)), zoo.Spec("Own", 6, 0, 5), "abcde")


def test_subclasses_of_dict_are_read_as_dicts(tmp_path) -> None:
    """An OrderedDict, and one of a library that is not installed here."""
    path = saved(tmp_path, {"state_dict": OrderedDict(STATE), "hyper": defaultdict(int, width=8)})
    assert read_foreign(path).left == ("hyper",)
