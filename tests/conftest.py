"""What every test shares: one thread per worker, small frames, and a way to run a command line."""

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # also in the programs that tests start: the workers share the cores
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

import zoo
from zoo import FrameSet

torch.set_num_threads(1)


@pytest.fixture
def frames() -> FrameSet:
    """Five recordings of 1 to 60 frames, 6 features, 4 classes; the first features tell the class."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 40, 1, 60, 7, 30])
    labels = torch.randint(0, 4, (138,), generator=generator)
    features = torch.randn(138, 6, generator=generator) + torch.nn.functional.one_hot(labels, 6) * 2
    return FrameSet(features, labels, lengths.cumsum(0), ("a", "b", "c", "d"))


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
    """Run a command line of either tool: words in one text, further words (with blanks in them) after it."""

    def run(line: str, *more: object) -> Outcome:
        tool, *words = line.split()
        capsys.readouterr()
        code = import_module(f"{tool}.cli").run([*words, *map(str, more)])
        return Outcome(code, *capsys.readouterr())

    return run


SMALL = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> zoo.Registry:
    """Two versions of `a`, in the place where commands look."""
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "registry.json"))
    registry = zoo.Registry()
    for seed in (0, 1):
        model = zoo.build(SMALL, seed=seed)
        registry.register("a", model, spec=SMALL, classes=["no", "yes"], metrics={"accuracy": seed / 2})
    return registry
