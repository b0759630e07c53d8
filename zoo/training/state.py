"""The folder of a run: one file with its whole state, and a checkpoint for each epoch."""

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
State = tuple[Mapping[str, Tensor], Mapping[str, Any]]  # all that the coming epochs depend on: tensors, and plain data


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run; the state file is replaced whole, so a killed run leaves its last whole epoch.

    Args:
        path: the folder, made where it is missing.
        identity: plain data that says which run this is; the folder of another run is refused.
        keep: number of epoch checkpoints to keep, 0 for all.
    """

    path: Path
    identity: Mapping[str, Any]
    keep: int

    def read(self) -> State | None:
        """The state after the last whole epoch; None if there is none.

        Raises:
            ValueError: the folder holds another run, or its state is damaged.
        """
        path = self.path / _STATE
        if not path.exists():
            return None
        try:
            data = _files.read(path)
            header = checkpoint.verify_bytes(data)
            about = json.loads(header.metadata[_KEY])
            tensors = checkpoint.tensors_of(data, header)
        except (CheckpointError, KeyError, ValueError, OSError) as error:
            msg = f"cannot resume from {path}: {error}; remove it to start anew"
            raise ValueError(msg) from error
        self._refuse_other(_current(about["identity"]))
        return {name: tensor.clone() for name, tensor in tensors.items()}, about["plain"]

    def write(self, epoch: int, checkpoints: Mapping[str, Checkpoint], state: State) -> None:
        """Write the epoch's checkpoints and, last, the state.

        Args:
            epoch: its number, from 1.
            checkpoints: by the suffix of the file's stem, "" for a single model.
            state: after this epoch.

        Raises:
            OSError: the disk refused; the state of the epoch before is still there.
        """
        tensors, plain = state
        text = json.dumps({"identity": self.identity, "plain": plain}, allow_nan=False)
        try:
            _files.make_folders(self.path)
            for suffix, one in checkpoints.items():
                _files.write(self.path / f"epoch-{epoch:04}{suffix}.safetensors", checkpoint.encode(one))
            _files.write(self.path / _STATE, checkpoint.pack(tensors, {_KEY: text}))
        except OSError as error:
            last = f"the run can be resumed from epoch {epoch - 1}" if epoch > 1 else "no epoch has been written yet"
            msg = f"cannot write epoch {epoch} to {self.path}: {error.strerror}; {last}"
            raise OSError(error.errno, msg) from error
        for path in self.path.glob("epoch-*.safetensors"):
            if self.keep and int(path.name[6:10]) <= epoch - self.keep:
                path.unlink(missing_ok=True)

    def _refuse_other(self, other: Mapping[str, Any]) -> None:
        mine = json.loads(json.dumps(self.identity))
        if other == mine:
            return
        pairs = [(other["spec"], mine["spec"]), *zip(other["recipes"], mine["recipes"], strict=False)]
        details = [
            f"{name}: {old.get(name)!r} there, {value!r} now"
            for old, new in pairs
            for name, value in new.items()
            if value != old.get(name)
        ]
        reason = "; ".join(details) or "other frames or another number of members"
        msg = f"{self.path} holds another run ({reason}); choose another directory"
        raise ValueError(msg)


def _current(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """An identity in its current form; it used to hold one recipe, and lists of what members had of their own."""
    if "members" not in identity:
        return identity
    recipe, (seeds, orders, rates, decays) = identity["recipe"], identity["members"]
    recipes = [dict(recipe) for _ in seeds]
    for m, own in enumerate(recipes):
        if len(seeds) > 1:
            own["seed"] = seeds[m]
        for name, values in (("order_seed", orders), ("learning_rate", rates), ("weight_decay", decays)):
            if values:
                own[name] = values[m % len(values)]
    rest = {key: value for key, value in identity.items() if key not in ("recipe", "members")}
    return rest | {"recipes": recipes}
