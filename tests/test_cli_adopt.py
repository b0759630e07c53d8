"""`zoo adopt`: files that were saved elsewhere become models of a registry, all together, and what is said of them."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.models.architectures import ARCHITECTURES

TOLD = "--activation gelu --normalisation mean_std --context 1 --classes phonemes"
STUDENT = """
import torch
from torch import nn
import zoo


class Network(nn.Module):
    def __init__(self, n_in, n_out, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_in, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, n_out))

    def forward(self, x):
        return self.body(x)


class Plain(Network):
    pass


@zoo.architecture
def network(inputs, classes, *, width=8):
    return Network(inputs, classes, width)
"""


def model(seed: int, *widths: int) -> nn.Module:
    """A model of a notebook: windows of 3 frames of 27 features to 40 classes."""
    torch.manual_seed(seed)
    sizes, layers = (81, *widths), []
    for inputs, outputs in zip(sizes, widths, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 40)).eval()


@pytest.fixture
def notebook(home: Path) -> Path:
    """A folder with three files that can be adopted, and two that cannot; the working folder is `home`."""
    folder = home / "notebook"
    (folder / "runs").mkdir(parents=True)
    torch.save(model(0, 8).state_dict(), folder / "first.pth")
    torch.save({"model_state_dict": nn.DataParallel(model(1, 8, 6)).state_dict(), "epoch": 3}, folder / "best (2).pt")
    torch.save({"state_dict": model(2, 8).state_dict(), "val_acc": 91.0}, folder / "runs" / "last.ckpt")
    torch.save(model(3, 8), folder / "whole.pth")
    (folder / "cut.pth").write_bytes((folder / "first.pth").read_bytes()[:-100])
    (folder / "._first.pth").write_bytes(b"of a Mac")
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Architectures of a student's file are forgotten."""
    monkeypatch.setattr("zoo.models.architectures.GIVEN", [])
    monkeypatch.delitem(sys.modules, "student", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("Network", "Plain", "network"):
        monkeypatch.setitem(ARCHITECTURES, name, None)
        monkeypatch.delitem(ARCHITECTURES, name)


def test_a_folder_is_adopted_in_one_command(command, notebook) -> None:
    """Bad files are named, the others go in under their own names; the exit code says that some did not."""
    found = command(f"zoo adopt notebook {TOLD} --registry new.json", code=1)
    assert "3 of 5 files adopted in new.json" in found.out
    assert re.search(r"notebook/cut.pth: the file is truncated", found.out)
    assert re.search(r"notebook/whole.pth: .*\n +import torch.*\n +torch.save\(load\('notebook/whole.pth'", found.out)
    registry = zoo.Registry("new.json")
    assert registry.list() == ["best-2", "first", "last"]
    x = torch.randn(9, 81)
    for name, one in (("first", model(0, 8)), ("best-2", model(1, 8, 6)), ("last", model(2, 8))):
        torch.testing.assert_close(registry.load(name)(x), one(x), rtol=1e-4, atol=1e-5)
    assert registry.get("last").note == "adopted; its file says val_acc 0.9100"
    assert command("ensemble evaluate --corpus corpus --valid dev --test test --registry new.json", code=0)


def test_all_or_none(command, notebook) -> None:
    """One bad file, and nothing is registered; without it, everything is."""
    assert (
        "nothing was registered" in command(f"zoo adopt notebook {TOLD} --registry new.json --all-or-none", code=1).out
    )
    assert not Path("new.json").exists()
    (notebook / "cut.pth").unlink()
    (notebook / "whole.pth").unlink()
    assert "3 of 3" in command(f"zoo adopt notebook {TOLD} --registry new.json --all-or-none", code=0).out


def test_a_file_that_the_registry_refuses_leaves_the_others(command, notebook) -> None:
    """The same weights with other classes; with --all-or-none nothing is registered then."""
    command(f"zoo adopt notebook/first.pth {TOLD} --registry new.json", code=0)
    other = TOLD.replace("phonemes", " ".join(reversed(zoo.PHONEMES)))
    for flag, models in (("--all-or-none", ["first"]), ("", ["first", "last"])):
        found = command(f"zoo adopt notebook/first.pth notebook/runs {other} --registry new.json {flag}", code=1)
        assert "first.pth: 'first' has these weights already, with the classes" in found.out
        assert zoo.Registry("new.json").list() == models


def test_missing_flags_are_named_together(command, notebook) -> None:
    """Before anything is written; what is given is not asked for."""
    line = command("zoo adopt notebook --registry new.json", code=2).err
    assert all(flag in line for flag in ("--activation", "--context", "--features", "--normalisation", "--classes"))
    assert "--batchnorm" not in line  # the numbers of nn.Sequential tell
    line = command("zoo adopt notebook --activation gelu --features 27 --registry new.json", code=2).err
    assert ("--activation (" in line, "--features (" in line, "--normalisation (" in line) == (False, False, True)
    assert not Path("new.json").exists()


def test_the_place_of_batchnorm_is_asked_for(command, home) -> None:
    """By the name of the model whose attributes do not tell."""
    torch.save(
        nn.ModuleDict({"fc": nn.Linear(81, 8), "bn": nn.BatchNorm1d(8), "out": nn.Linear(8, 40)}).state_dict(),
        "named.pth",
    )
    assert (
        "--batchnorm (before or after the activation, of named)" in command(f"zoo adopt named.pth {TOLD}", code=2).err
    )
    assert (
        command(f"zoo adopt named.pth {TOLD} --batchnorm after --json", code=0).data["adopted"][0]["spec"]["options"][
            "batchnorm"
        ]
        is False
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("zoo adopt", "expected files or folders to adopt"),
        ("zoo adopt nowhere", "got 'nowhere', which does not exist"),
        ("zoo adopt corpus", "expected files .pt, .pth"),
        (f"zoo adopt notebook {TOLD} --save x", "expected a single file with --save, got 5"),
        (f"zoo adopt notebook {TOLD} --activation glu", "activation"),
        (f"zoo adopt notebook {TOLD} --architecture mpl", "did you mean 'mlp'"),
        (f"zoo adopt notebook {TOLD} --option width=3", "--option only with a class of your own"),
        (f"zoo adopt notebook {TOLD} --try", "expected frames to try settings on"),
        (f"zoo adopt notebook {TOLD} --import student.py:Networ", "student.py 'Networ'; did you mean 'Network'"),
        ("zoo adopt notebook --activation gelu --import student.py:Network", "--option for the activation of Network"),
        ("zoo adopt notebook --import student.py:Network --import student.py:Plain", "classes Network, Plain"),
    ],
)
def test_wrong_usage_is_refused_before_the_work(command, notebook, line, words) -> None:
    """On one line."""
    Path("student.py").write_text(STUDENT)
    found = command(line, code=2)
    assert words in found.err
    assert found.err.count("\n") == 1


def test_accuracy_stands_beside_what_the_file_says(command, home) -> None:
    """A file that a registry's model was saved to, with its own accuracy; and one with another."""
    registry = zoo.Registry()
    state = registry.load("other").state_dict()
    frames = zoo.read_corpus("corpus", "dev")
    accuracy = registry.get("other").metrics["valid/accuracy"]["value"]
    torch.save({"model": state, "valid_acc": 100 * accuracy}, "right.pth")
    torch.save({"model": state, "valid_acc": 0.99}, "wrong.pth")
    told = "--activation relu --normalisation mean_std --classes phonemes --corpus corpus --valid dev"
    found = command(f"zoo adopt right.pth wrong.pth {told}", code=0)
    assert f"{accuracy:.4f}  valid_acc {accuracy:.4f}" in found.out
    assert f"wrong.pth: accuracy {accuracy:.4f}, but its file says 0.9900" in found.out
    assert "right.pth: accuracy" not in found.out
    assert "the same weights are in right.pth, wrong.pth" in found.out
    metric = registry.get("right").metrics["valid/accuracy"]
    assert (metric["value"], metric["frames"]) == (accuracy, frames.fingerprint)


def test_try_finds_what_was_not_told(command, home) -> None:
    """Activation and normalisation of a trained model, by its accuracy."""
    train, valid = zoo.sample_corpus("train").select(torch.arange(40)), zoo.read_corpus("corpus", "test")
    spec = zoo.Spec("mlp", 27, 1, 40, normalisation="z_score", options={"widths": (32,), "activation": "tanh"})
    trained = zoo.train(spec, zoo.Recipe(epochs=3, learning_rate=1e-2, batch_size=256), train, valid)
    torch.save(
        {"model": trained.to_module().state_dict(), "val_acc": trained.metrics["valid/accuracy"]["value"]}, "a.pth"
    )
    found = command("zoo adopt a.pth --classes phonemes --corpus corpus --valid test --try --json", code=0).data
    (row,) = found["adopted"]
    assert row["spec"] == trained.spec.to_dict() | {"options": row["spec"]["options"]}
    assert row["spec"]["options"]["activation"] == "tanh"
    assert row["tried"][0]["accuracy"] == row["accuracy"] == row["stated"]["accuracy"]


def test_try_says_when_nothing_fits(command, home) -> None:
    """A model that was never trained."""
    torch.save(model(0, 8).state_dict(), "a.pth")
    found = command("zoo adopt a.pth --classes phonemes --corpus corpus --valid test --try", code=1)
    assert "no more than from the most frequent class" in found.out


@pytest.mark.parametrize("imported", ["student.py:Network", "student.py:network", "student.py --architecture network"])
def test_a_class_of_ones_own(command, home, imported) -> None:
    """As it stands; later commands need it again, and say so."""
    Path("student.py").write_text(STUDENT)
    code: dict[str, Any] = {"__name__": "elsewhere"}
    exec(STUDENT.replace("@zoo.architecture", ""), code)
    own = code["Network"](81, 40, 16).eval()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in own.state_dict().items()}}, "mine.pth")
    told = "--option width=16 --normalisation mean_std --features 27 --context 1 --classes phonemes"
    found = command(f"zoo adopt mine.pth --import {imported} {told}", code=0)
    assert "commands that run these models need --import FILE.py:" in found.out
    x = torch.randn(5, 81)
    torch.testing.assert_close(zoo.Registry().load("mine")(x), own(x))


def test_names_come_from_files(command, home) -> None:
    """Two of one name take the folder's; a name that none can have is asked for; the same file twice is one."""
    for path in ("a/best.pth", "b/best.pth", "a/con.pth"):
        Path(path).parent.mkdir(exist_ok=True)
        torch.save(model(len(path), 8).state_dict(), path)
    found = command(f"zoo adopt a b a/best.pth {TOLD} --registry new.json", code=1)
    assert zoo.Registry("new.json").list() == ["a-best", "b-best"]
    assert "a/con.pth: the name 'con' is reserved" in found.out
    assert "2 of 3 files" in found.out
    command(f"zoo adopt a/con.pth {TOLD} --save x --registry new.json", code=0)
    again = command(f"zoo adopt a/con.pth {TOLD} --save x --registry new.json --json", code=0).data
    assert again["adopted"][0]["saved"] == "x@1"


def test_an_interrupt_leaves_nothing(command, notebook, monkeypatch) -> None:
    """All are registered together, at the end."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    real = zoo.Registry.register
    monkeypatch.setattr(
        zoo.Registry, "register", lambda self, name, one: stop() if name == "last" else real(self, name, one)
    )
    found = command(f"zoo adopt notebook {TOLD} --registry new.json", code=130)
    assert found.err == "error: interrupted; nothing was adopted\n"
    assert not Path("new.json").exists()


def test_the_registry_itself_points_to_the_command(command, notebook) -> None:
    """`zoo register` still reads no torch file."""
    found = command("zoo register a notebook/first.pth", code=2)
    assert "zoo adopt" in found.err
