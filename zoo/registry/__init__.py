"""`Registry`: models and ensembles by name, in one readable file beside a folder of checkpoints.

What the file holds is in `types`, its text in `text`, what may change in `changes`, the order in which a change reaches
the disk in `transaction`. Every refusal is a `RegistryError` (or a `CheckpointError`, for what is inside a blob) whose
`reason` is one word. For single checks there are `check_name(name)`, `check_digest("sha256:...")` and `parse(bytes)`.
Torch is imported only with a model.
"""

from __future__ import annotations

import builtins  # for `builtins.list`, since the class has a method of that name
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from zoo._names import Patterns
from zoo.registry import changes
from zoo.registry.blobs import Blobs, collect_garbage
from zoo.registry.text import parse
from zoo.registry.transaction import RegistryFile
from zoo.registry.types import EnsembleEntry, Entry, Problem, RegistryError, Snapshot, check_digest, check_name, is_id

if TYPE_CHECKING:
    import torch
    from torch import nn

    from zoo.checkpoint import Checkpoint
    from zoo.data.frames import FrameSet
    from zoo.models.spec import Spec
    from zoo.registry.register import Model, Prepared

__all__ = [
    "EnsembleEntry",
    "Entry",
    "Problem",
    "Registry",
    "RegistryError",
    "Snapshot",
    "check_digest",
    "check_name",
    "parse",
]

Given = ParamSpec("Given")
T = TypeVar("T")


def _now(question: Callable[Concatenate[Snapshot, Given], T]) -> Callable[Concatenate[Registry, Given], T]:
    """A method of the registry that reads its file and puts a question to the snapshot."""

    @wraps(question)
    def answer(self: Registry, /, *args: Given.args, **more: Given.kwargs) -> T:
        return question(self.snapshot(), *args, **more)

    return answer


class Registry:
    """A file of names and a folder of checkpoints; the object itself holds nothing but the path.

    Reading takes no lock and sees the file as it is now; `snapshot` reads once and answers many questions. Each change
    is one atomic step, or one for a whole `transaction`. References are `name` (its newest version), `name@3`,
    `name@id`, an id, or an alias; where a version's content is wanted, its `Entry` does as well.

    Args:
        path: the file; by default $ZOO_REGISTRY, else `registry.json` in the working folder. The first
            registration creates it.
        timeout: seconds to wait while another process changes the file.

    Example:
        >>> import tempfile, zoo
        >>> spec = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     registry = Registry(f"{folder}/registry.json")
        ...     entry = registry.register("small", zoo.build(spec, seed=0), spec=spec, classes=["no", "yes"])
        ...     registry.list(), entry.reference, registry.load("small@1").training
        (['small'], 'small@1', False)
    """

    def __init__(self, path: str | Path | None = None, *, timeout: float = 60.0) -> None:
        self.path = Path(path or os.environ.get("ZOO_REGISTRY") or "registry.json")
        self.timeout = timeout
        self.blobs = Blobs(self.path)
        self._file = RegistryFile(self.path, timeout)

    def __repr__(self) -> str:
        return f"Registry({str(self.path)!r})"

    # ---- reading: the questions of a snapshot, answered from the file as it is now

    def snapshot(self) -> Snapshot:
        """The content of the file at this moment, read once; within a transaction, as it will be."""
        return self._file.snapshot()

    list = _now(Snapshot.list)
    entries = _now(Snapshot.entries)
    get = _now(Snapshot.get)
    get_ensemble = _now(Snapshot.get_ensemble)
    list_ensembles = _now(Snapshot.list_ensembles)
    aliases = _now(Snapshot.aliases)
    table = _now(Snapshot.table)

    def checkpoint(self, version: str | Entry) -> Checkpoint:
        """A version's checkpoint; its file is read once, hashed, and those bytes are used without a copy.

        Raises:
            RegistryError: UNKNOWN; a blob that is missing or not what was registered.
            CheckpointError: right bytes that do not fit, such as an architecture changed since.
        """
        from zoo.registry.load import checkpoint

        entry = self._entry(version)
        return checkpoint(entry, self.blobs.read(entry))

    def load(self, version: str | Entry, *, device: torch.device | str = "cpu") -> nn.Module:
        """A version as a model in eval mode, whole and checked; the errors of `checkpoint`."""
        return self.checkpoint(version).to_module(device)

    def stacked(self, versions: Sequence[str | Entry]) -> dict[str, torch.Tensor]:
        """Parameters and buffers of M versions of one spec by name, each (M, ...); the errors of `checkpoint`.

        Each blob is read and hashed once, straight into its place.
        """
        from zoo.registry.load import stacked

        get = self.snapshot().get if any(isinstance(version, str) for version in versions) else self._entry
        return stacked(self.blobs, [get(version) if isinstance(version, str) else version for version in versions])

    def diff(self, first: str | Entry, second: str | Entry) -> dict[str, Any]:
        """How two versions differ: about, spec, recipe, classes, metrics, tensors; equal parts are empty."""
        from zoo.registry.load import difference

        return difference(self.blobs, self._entry(first), self._entry(second))

    def measure(self, version: str | Entry, frames: FrameSet) -> builtins.list[dict[str, Any]]:
        """Metrics recorded on these very frames, measured again on their device.

        The rows have version, metric, recorded, measured and agrees.
        """
        from zoo.registry.load import measured_again

        entry = self._entry(version)
        return measured_again(entry, self.checkpoint(entry), frames)

    def _entry(self, version: str | Entry) -> Entry:
        return self.get(version) if isinstance(version, str) else version

    # ---- changing

    def register(
        self,
        name: str,
        model: Model,
        *,
        spec: Spec | None = None,
        classes: Sequence[str] | None = None,
        metrics: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        parents: Sequence[str] | None = None,
        kind: str | None = None,
        trained_on: str | None = None,
        note: str | None = None,
        tags: Iterable[str] = (),
        licence: str = "",
        strip_prefix: bool | str = False,
    ) -> Entry:
        """Register a model under a name, as its next version; the same weights again are the same version.

        Registering the same weights again repairs a version whose blob is damaged or missing. If the model answers
        otherwise than when it was registered, its code has changed, and it is refused. Arguments that are not listed
        here are as in `Checkpoint`; None keeps what a checkpoint has.

        Args:
            name: the model's name.
            model: a `Checkpoint`, a live module, or the path of a safetensors file, which is checked and written anew.
            spec: what the model computes; needed with a module or a foreign file.
            classes: names of the classes; likewise.
            metrics: name -> number, or `{"value", "unit", "n", "frames"}`.
            parents: references to the versions it was averaged or distilled from.
            tags: short words.
            licence: under which licence the model may be used, such as "Apache-2.0".
            strip_prefix: of a foreign file, what to cut off the names of its tensors, such as "module."; of a module
                in a wrapper, where it is; True finds it.

        Returns:
            The entry. Within a transaction its number may still move if others register the same name.

        Raises:
            RegistryError: a name that is invalid or taken, the disk, the lock.
            CheckpointError: weights that do not fit the spec, NaN, infinity, a negative variance; a live model that
                answers otherwise than the one made of its spec and weights, or not as a classifier does.
        """
        from zoo.registry import register

        check_name(name)
        if parents is not None:
            get = self.snapshot().get
            parents = [get(parent).id for parent in changes.strings_of("parents", parents)]
        about = {"metrics": changes.metrics_of(metrics), "recipe": recipe, "parents": parents, "kind": kind}
        about |= {"trained_on": trained_on, "note": note}
        checkpoint = register.checkpoint_of(model, spec, classes, strip_prefix=strip_prefix, **about)
        return self.add(name, register.prepare(name, checkpoint, tags=tags, licence=licence))

    def check_nameable(self, name: str) -> None:
        """Refuse (NAME, NAME_COLLISION, DISK) what would let no model be registered, before hours of work."""
        known = self._file.snapshot(create=True)
        if name not in known.models:
            changes.check_new(known, name)
        self._file.check_changeable()

    def add(self, name: str, prepared: Prepared) -> Entry:
        """Register what `register.prepare` made: write the blob, then the record; see `transaction`."""
        from zoo.registry import register
        from zoo.registry.load import problem_of

        self._file.check_changeable()
        id, record, sha256 = prepared.id, prepared.record, self.blobs.put(prepared.data)
        data = b"" if self._file.collecting else prepared.data  # a transaction cannot hold all of them in memory

        def change(draft: Snapshot) -> None:
            if is_id(name) and name not in draft.models:
                changes.check_new(draft, name)
            if changes.add_version(draft, name, id, record):
                return
            register.check_code(draft.entry(name, id), record)
            if problem_of(self.blobs, draft.entry(name, id)):
                changes.change_blob(draft, name, id, record)

        def ensure(draft: Snapshot) -> None:
            if name in draft.models and id in draft.models[name].versions:
                self.blobs.put_back(sha256, data)

        return self._file.commit(change, create=True, ensure=ensure).entry(name, id)

    def register_ensemble(
        self, name: str, ensemble: Any, *, note: str = "", tags: Iterable[str] = (), licence: str = ""
    ) -> EnsembleEntry:
        """Register an ensemble: its members by id, its rule and numbers.

        `ensemble` is plain data with `members` (references) and `rule`, and where known `classes`, `weights`,
        `temperatures`, `fitted_on`; or an object whose `to_json()` gives it.

        Raises:
            RegistryError: a member is not registered, or has other classes, or the name is taken.
        """
        if not isinstance(ensemble, Mapping):
            if not callable(getattr(ensemble, "to_json", None)):
                msg = f"expected plain data or an object with to_json(), got {str(ensemble)[:80]!r}"
                raise RegistryError("ARGUMENT", msg)
            ensemble = ensemble.to_json()
        more = {"note": note or ensemble.get("note"), "tags": changes.tags_of(tags) or ensemble.get("tags")}
        more["licence"] = licence or ensemble.get("licence")
        record = changes.ensemble_record(self.snapshot(), {**ensemble, **more})
        return self._file.commit(lambda draft: changes.add_ensemble(draft, name, record)).get_ensemble(name)

    def alias(self, name: str, target: str, *, expect: str | None = None) -> None:
        """Make an alias point to a version or an ensemble; it remembers what it pointed to before.

        `expect` is what it must point to now, else nothing is changed; "" if it must not exist yet.

        Raises:
            RegistryError: UNKNOWN target, NAME_COLLISION, CONFLICT where it points elsewhere than expected; ARGUMENT.
        """
        self._file.commit(changes.move_alias(self.snapshot(), name, target, expect))

    def alias_back(self, name: str, *, expect: str | None = None) -> None:
        """Make an alias point again to what it pointed to before, as `alias`; UNKNOWN where it remembers nothing."""
        self._file.commit(changes.move_alias(self.snapshot(), name, None, expect))

    def annotate(
        self,
        reference: str,
        *,
        note: str | None = None,
        licence: str | None = None,
        tags: Iterable[str] | None = None,
        add_tags: Iterable[str] = (),
        drop_tags: Iterable[str] = (),
        metrics: Mapping[str, Any] | None = None,
    ) -> Entry | EnsembleEntry:
        """Change the note, licence, tags or metrics of a version; or of an ensemble, which has no metrics.

        Arguments that are left out change nothing, and keep what others have changed meanwhile. `note` and `licence`
        replace the present text ("" removes it), `tags` replaces all tags; `add_tags` are added, `drop_tags` removed.
        `metrics` are added; one of the same name is replaced.

        Raises:
            RegistryError: UNKNOWN; ARGUMENT for malformed tags or metrics.
        """
        entry = self.snapshot().find(reference)
        id = entry.id if isinstance(entry, Entry) else ""
        new: dict[str, Any] = {
            "note": note,
            "licence": licence,
            "tags": None if tags is None else changes.tags_of(tags),
            "add": changes.tags_of(add_tags),
            "drop": changes.tags_of(drop_tags),
            "metrics": changes.metrics_of(metrics) or {},
        }
        content = self._file.commit(partial(changes.annotate, name=entry.name, id=id, **new))
        return content.entry(entry.name, id) if id else content.get_ensemble(entry.name)

    def remove(self, reference: str, *, force: bool = False) -> builtins.list[str]:
        """Remove an ensemble, an alias or a version (a bare name is its newest, `name@*` all of them).

        Blobs stay until `collect_garbage`. `force` removes also the ensembles and aliases that hold it, which are
        returned; without it they raise a RegistryError (HELD).
        """
        removed = changes.pinned_all(self.snapshot(), reference)
        held: builtins.list[str] = []

        def change(draft: Snapshot) -> None:
            held[:] = changes.remove(draft, removed, force=force)

        self._file.commit(change)
        return held

    def transaction(self) -> AbstractContextManager[None]:
        """Collect changes and commit them together at the end, or none of them after an exception.

        Blobs are written at once; no lock is held meanwhile, so others may commit in between.
        """
        return self._file.transaction()

    # ---- upkeep

    def verify(
        self, include: Patterns = "*", exclude: Patterns = (), *, fast: bool = False, probe: bool = False
    ) -> builtins.list[Problem]:
        """Check the blobs of the models that match; what is wrong with them, an empty list if nothing is.

        `fast` checks only sizes and headers and hashes nothing; `probe` also runs each model on the probe batch and
        compares its outputs with those at registration.
        """
        return [problem for _, problem in self.verified(include, exclude, fast=fast, probe=probe) if problem]

    def verified(
        self, include: Patterns = "*", exclude: Patterns = (), *, fast: bool = False, probe: bool = False
    ) -> Iterator[tuple[Entry, Problem | None]]:
        """As `verify`, one version after another, with its problem or None; for showing progress."""
        from zoo.registry.load import problem_of

        for entry in self.entries(include, exclude):
            yield entry, problem_of(self.blobs, entry, fast=fast, probe=probe)

    def collect_garbage(self, *, dry_run: bool = False, older_than: float = 86_400.0) -> builtins.list[Path]:
        """Remove temporary files and blobs that no version refers to, under the lock; returns their paths.

        Files younger than `older_than` seconds stay: they may belong to a registration in progress. `dry_run` only
        returns the paths. Where the registry cannot be read, nothing is removed, and it raises.
        """
        return collect_garbage(self.path, self.blobs, timeout=self.timeout, dry_run=dry_run, older_than=older_than)

    def recover(self) -> builtins.list[Entry]:
        """Rebuild a lost registry from the metadata in its blobs; returns their versions, by the age of the blobs.

        Numbers follow the age of the blobs; aliases, ensembles and tags are not in blobs and stay lost. Versions
        that are still registered stay as they are. One warning lists what cannot be recovered. A file that is there
        but cannot be read raises: move it away first.
        """
        from zoo.registry import register

        found, left_out = register.recover(self.blobs, partial(self._file.commit, create=True))
        if left_out:
            warnings.warn("these blobs could not be recovered:\n" + "\n".join(left_out), stacklevel=2)
        return found
