"""What a run leaves in its directory: one file with its whole state, and a checkpoint for each epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo import _files, checkpoint
from zoo.checkpoint import Checkpoint
from zoo.checkpoint.header import CheckpointError

_STATE = "state.safetensors"
_KEY = "run"


@dataclass(frozen=True)
class Journal:
    """A run's directory; the file with the state is replaced whole, so a kill leaves the epoch before.

    Args:
        directory: made where it is not there.
        identity: plain data that says which run this is; another run's directory is refused.
        keep: epoch checkpoints that stay, 0 for all.
    """

    directory: Path
    identity: Mapping[str, Any]
    keep: int

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and plain data of the last whole epoch; None where the run has none.

        Raises:
            ValueError: the directory holds another run, or its state is damaged.
        """
        path = self.directory / _STATE
        if not path.exists():
            return None
        try:
            data = _files.read(path)
            header = checkpoint.verify_bytes(data)
            about = json.loads(header.metadata[_KEY])
            tensors = checkpoint.tensors_of(data, header)
        except (CheckpointError, KeyError, ValueError, OSError) as error:
            msg = f"cannot go on from {path}: {error}; remove it to start anew"
            raise ValueError(msg) from error
        self._refuse_other(about["identity"])
        return {name: tensor.clone() for name, tensor in tensors.items()}, about["plain"]

    def write(
        self, epoch: int, checkpoints: Mapping[str, Checkpoint], tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
    ) -> None:
        """Leave the epoch's checkpoints and, last, the state.

        Args:
            epoch: its number, from 1.
            checkpoints: by an ending for the file's name, "" for a single model.
            tensors: of the state.
            plain: the rest of the state, JSON.

        Raises:
            OSError: the disk refused; the state of the epoch before is still there.
        """
        text = json.dumps({"identity": self.identity, "plain": plain}, allow_nan=False)
        try:
            _files.make_folders(self.directory)
            for ending, one in checkpoints.items():
                _files.write(self.directory / f"epoch-{epoch:04}{ending}.safetensors", checkpoint.encode(one))
            _files.write(self.directory / _STATE, checkpoint.pack(tensors, {_KEY: text}))
        except OSError as error:
            last = f"the run can go on from epoch {epoch - 1}" if epoch > 1 else "no epoch is there yet"
            msg = f"cannot write epoch {epoch} to {self.directory}: {error.strerror}; {last}"
            raise OSError(error.errno, msg) from error
        self._prune(epoch)

    def _prune(self, epoch: int) -> None:
        for path in self.directory.glob("epoch-*.safetensors"):
            if self.keep and int(path.name[6:10]) <= epoch - self.keep:
                path.unlink(missing_ok=True)

    def _refuse_other(self, other: Mapping[str, Any]) -> None:
        mine = json.loads(json.dumps(self.identity))
        if other != mine:
            differing = [key for key in mine if mine[key] != other.get(key)]
            details = [
                f"{name}: {other[key].get(name)!r} there, {value!r} now"
                for key in differing
                if isinstance(mine[key], dict) and isinstance(other.get(key), dict)
                for name, value in mine[key].items()
                if value != other[key].get(name)
            ]
            msg = (
                f"{self.directory} holds another run: it differs in {', '.join(differing)} "
                f"({'; '.join(details) or 'other frames or seeds'}); choose another directory"
            )
            raise ValueError(msg)
