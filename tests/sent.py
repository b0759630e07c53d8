"""What tests send to other processes, which import this module: jobs, models that kill their process, and frames."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ensemble
import zoo

CLASSES = ("x", "y", "z")


def some_frames(count: int = 3000, *, seed: int = 0) -> zoo.FrameSet:
    """Recordings of 1 to 120 frames with five features."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 120, (200,), generator=generator).cumsum(0)
    starts = torch.cat([torch.tensor([0]), lengths[lengths < count], torch.tensor([count])])
    features = 2 * torch.randn(count, 5, generator=generator) + 1
    labels = torch.randint(3, (count,), generator=generator)
    return zoo.FrameSet(features, labels, starts, CLASSES, tuple(f"rec-{n}" for n in range(len(starts) - 1)))


def squares(folder: Path | None = None) -> Callable[[int], int]:
    """A job: the square of a number; every start of a worker and of an item leaves a file."""

    def square(number: int) -> int:
        if folder is not None:
            (folder / f"{number}-{time.monotonic_ns()}").touch()
        return number * number

    return square


def dying(folder: Path, deaths: int) -> Callable[[int], int]:
    """The same, but item 3 kills its worker some times."""
    square = squares(folder)

    def work(number: int) -> int:
        found = square(number)
        if number == 3 and len([*folder.glob("3-*")]) <= deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return work


def unable() -> Callable[[int], int]:
    """A job that cannot begin."""
    msg = "expected something, got nothing"
    raise ValueError(msg)


def failing() -> Callable[[int], int]:
    """A job whose items have an error."""

    def work(number: int) -> int:
        msg = f"expected a smaller number than {number}"
        raise KeyError(msg) if number == 2 else ValueError(msg)

    return work


def threads() -> Callable[[int], int]:
    """A job: the number of threads of its process."""
    return lambda number: torch.get_num_threads()


def locks() -> Callable[[int], object]:
    """A job whose results cannot be sent."""
    return lambda number: threading.Lock()


class Mortal(torch.nn.Module):
    """A model that at some frame, once for a file, kills its process, or writes its number there and hangs."""

    def __init__(self, file: Path, *, hangs: bool = False) -> None:
        super().__init__()
        self.layer, self.file, self.hangs = torch.nn.Linear(5, 3), file, hangs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 5) -> (B, 3)."""
        if (x == 77).any() and self.file.exists():
            self.file.unlink()
            if not self.hangs:
                os.kill(os.getpid(), signal.SIGKILL)
            self.file.with_suffix(".pid").write_text(f"{os.getpid()} {os.getppid()}")
            time.sleep(1000)
        return self.layer(x)


def mortal(file: Path, *, hangs: bool = False) -> tuple[ensemble.Members, zoo.FrameSet]:
    """A member, and frames on one of which it dies."""
    frames = some_frames(3000)
    frames.features[1500, 0] = 77  # in no batch in which forms are chosen
    spec = zoo.Spec("cylinder", 5, 0, 3, "none", options={"width": 8, "depth": 1})
    torch.manual_seed(0)
    modules = {"a": Mortal(file, hangs=hangs)}
    members = ensemble.run.from_modules(modules, classes=CLASSES, specs={"a": spec}, plan="loop")
    members.step = 256
    return members, frames
