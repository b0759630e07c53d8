"""What every test shares: one thread per worker, small frames, and a way to run a command line."""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, MutableMapping
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # also in the programs that tests start: the workers share the cores
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch
from torch import Tensor

import ensemble
import zoo
from zoo import FrameSet
from zoo.registry.register import Prepared, prepare

torch.set_num_threads(1)


def some_outputs(
    M: int = 5, N: int = 300, C: int = 4, seed: int = 0, decimals: int | None = None
) -> ensemble.MemberOutputs:
    """Of members that are more often right than not; probabilities rounded to few decimals make ties."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, C, N)
    rows = {}
    for m in range(M):
        logits = generator.normal(0, 1.0, (N, C))
        logits[np.arange(N), labels] += generator.uniform(0.3, 1.5)
        p = np.exp(1.5 * logits)
        p /= p.sum(axis=1, keepdims=True)
        if decimals is not None:
            p = np.round(p, decimals)
            p[:, -1] += 1 - p.sum(axis=1)
            p = np.maximum(p, 0)
            p /= p.sum(axis=1, keepdims=True)
        rows[f"m{m}"] = p
    return ensemble.MemberOutputs.from_probabilities(rows, labels=labels)


def random_rows(members: int, frames: int, classes: int, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    """(M, N, C) random distributions in float64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(members, frames, classes, generator=generator, dtype=torch.float64) * scale).softmax(-1)


def overconfident_outputs(
    members: int = 3, frames: int = 600, classes: int = 4, *, seed: int = 0
) -> ensemble.MemberOutputs:
    """Members that know something and are too sure of it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (frames,), generator=generator)
    hint = torch.nn.functional.one_hot(labels, classes) * 2.0
    rows = (torch.randn(members, frames, classes, generator=generator) * 2 + hint).softmax(-1)
    return ensemble.MemberOutputs.from_probabilities({f"m{i}": row for i, row in enumerate(rows)}, labels=labels)


def nats(rows: Tensor, labels: Tensor) -> float:
    """Mean log-loss."""
    return -rows[torch.arange(len(labels)), labels].double().log().mean().item()


def recorded_outputs(
    M: int = 5, N: int = 600, C: int = 4, seed: int = 0, recording: int = 20
) -> ensemble.MemberOutputs:
    """Of members that find the same frames hard, in recordings of so many frames."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, C, N)
    shared = generator.normal(0, 1.5, N)
    rows = {}
    for m in range(M):
        logits = generator.normal(0, 1.0, (N, C))
        logits[np.arange(N), labels] += generator.uniform(0.8, 1.8) + shared
        p = np.exp(1.5 * logits)
        rows[f"m{m}"] = p / p.sum(axis=1, keepdims=True)
    return ensemble.MemberOutputs.from_probabilities(rows, labels=labels, groups=np.arange(N) // recording)


@pytest.fixture(scope="session")
def processes() -> None:
    """Worker processes are forked from one that has loaded what each of them would load."""
    needed = ["ensemble.run.shards", "ensemble.run.cotraining", "zoo.search.study"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", *needed])
    forkserver.ensure_running()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan of the user is read or written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def frames() -> FrameSet:
    """Five recordings of 1 to 60 frames, 6 features, 4 classes; the first features tell the class."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 40, 1, 60, 7, 30])
    labels = torch.randint(0, 4, (138,), generator=generator)
    features = torch.randn(138, 6, generator=generator) + torch.nn.functional.one_hot(labels, 6) * 2
    return FrameSet(features, labels, lengths.cumsum(0), ("a", "b", "c", "d"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[MutableMapping[str, Any], str, str], str]:
    """Import a module of the user's that enters `name` into a table; the table is as before after the test."""

    def enter(table: MutableMapping[str, Any], name: str, source: str) -> str:
        monkeypatch.setitem(table, name, None)
        monkeypatch.delitem(table, name)
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / f"users_{name}.py").write_text(f"import zoo\n\n\n{source}")
        sys.modules.pop(f"users_{name}", None)
        import_module(f"users_{name}")
        return name

    return enter


class Outcome(NamedTuple):
    """Of a command line: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The JSON document that is all of stdout."""
        return json.loads(self.out)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line of either tool: words in one text, further words (with blanks in them) after it.

    Where a `code` is given, that is the exit code that it must have.
    """

    def run(line: str, *more: object, code: int | None = None) -> Outcome:
        tool, *words = line.split()
        capsys.readouterr()
        found = Outcome(import_module(f"{tool}.cli").run([*words, *map(str, more)]), *capsys.readouterr())
        assert code in (None, found.code), found.err
        return found

    return run


SMALL = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})


def checkpoint(seed: int) -> zoo.Checkpoint:
    """Of such a model."""
    return zoo.Checkpoint.from_module(zoo.build(SMALL, seed=seed), SMALL, ["no", "yes"])


@pytest.fixture(scope="session")
def prepared() -> list[Prepared]:
    """What the registrations of six models put on the disk."""
    return [prepare(f"model-{seed}", checkpoint(seed)) for seed in range(6)]


@pytest.fixture
def two_models(tmp_path: Path, prepared: list[Prepared]) -> zoo.Registry:
    """A registry of the first two of them."""
    registry = zoo.Registry(tmp_path / "registry.json")
    for index in (0, 1):
        registry.add(f"model-{index}", prepared[index])
    return registry


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> zoo.Registry:
    """Two versions of `a`, in the place where commands look."""
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "registry.json"))
    registry = zoo.Registry()
    for seed in (0, 1):
        model = zoo.build(SMALL, seed=seed)
        registry.register("a", model, spec=SMALL, classes=["no", "yes"], metrics={"accuracy": seed / 2})
    return registry


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registry of three small trained members, and a corpus in the HW1P2 layout."""
    home = tmp_path_factory.mktemp("home")
    registry = zoo.Registry(home / "registry.json")
    train, valid, test = (zoo.sample_corpus(part) for part in ("train", "valid", "test"))
    train, valid, test = (f.select(torch.arange(n)) for f, n in ((train, 40), (valid, 12), (test, 12)))
    for seed, (name, context) in enumerate([("cylinder-a", 2), ("cylinder-b", 2), ("other", 1)]):
        spec = zoo.Spec("cylinder", features=27, context=context, classes=40, options={"width": 32, "depth": 1})
        registry.register(name, zoo.train(spec, zoo.Recipe(epochs=1, seed=seed), train, valid))
    for name, frames in (("dev", valid), ("test", test), ("single", test.select(torch.arange(1)))):
        zoo.write_corpus(frames, home / "corpus", name)
    zoo.write_corpus(
        FrameSet(test.features, None, test.starts, test.classes, test.names), home / "corpus", "unlabelled"
    )
    return home


@pytest.fixture
def home(_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder as the working folder: registry.json, corpus/{dev,test,single,unlabelled}."""
    shutil.copytree(_trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_REGISTRY", raising=False)
    return tmp_path
