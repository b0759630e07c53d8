"""`Registry`: models and ensembles by name, in one readable file beside a folder of checkpoints.

The order in which a registration touches the disk is in `protocol`; what may stand in the file in
`document` and `schema`; what a name may be in `references`. Every refusal is a `RegistryError` (or a
`CheckpointError`, of what is inside a blob) whose `reason` is one word. For single checks there are
`check_name(name)`, `check_digest("sha256:...")` and `parse(bytes)`. Torch is imported only with a model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo._names import Patterns, matching
from zoo.registry import changes, entries, notes, upkeep
from zoo.registry.blobs import Blobs
from zoo.registry.clock import now
from zoo.registry.document import Document, parse
from zoo.registry.entries import EnsembleEntry, Entry
from zoo.registry.ledger import Ledger
from zoo.registry.references import RegistryError, check_digest, check_name
from zoo.registry.upkeep import Problem

if TYPE_CHECKING:
    import pandas
    import torch
    from torch import nn

    from zoo.checkpoint import Checkpoint
    from zoo.data.frames import FrameSet
    from zoo.models.spec import Spec
    from zoo.registry.intake import Model, Parcel

__all__ = [
    "EnsembleEntry",
    "Entry",
    "Problem",
    "Registry",
    "RegistryError",
    "check_digest",
    "check_name",
    "parse",
]

Names = list[str]  # aliases, since the class has a method of the name `list`
Entries = list[Entry]
Problems = list[Problem]
Paths = list[Path]
Rows = list[dict[str, Any]]


class Registry:
    """A file of names and a folder of checkpoints; the object itself holds nothing but the path.

    Reading takes no lock and sees the file as it is now. Each change is one atomic step, or one for a whole
    `transaction`. References are `name` (its newest version), `name@3`, `name@id`, an id, or an alias.

    Args:
        path: of the file; else $ZOO_REGISTRY, else `registry.json` in the working folder. A missing one is
            made by the first registration.
        timeout: seconds that a change waits while another process changes the file.

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
        self._ledger = Ledger(self.path)

    def __repr__(self) -> str:
        return f"Registry({str(self.path)!r})"

    # ---- reading

    def document(self) -> Document:
        """The content of the file now, or a RegistryError; within a transaction, as it will be."""
        return self._ledger.document()

    def list(self, include: Patterns = "*", exclude: Patterns = ()) -> Names:
        """Sorted names of the models; shell wildcards, one or several, in both."""
        models = self.document().models
        return matching(sorted(name for name, model in models.items() if model["versions"]), include, exclude)

    def entries(self, include: Patterns = "*", exclude: Patterns = ()) -> Entries:
        """All versions of the models whose names match, by name and number."""
        names = set(self.list(include, exclude))
        return [entry for entry in entries.entries(self.document()) if entry.name in names]

    def get(self, reference: str) -> Entry:
        """The version that a reference points to.

        Raises:
            RegistryError: UNKNOWN, with the names that come near.
        """
        return entries.resolve(self.document(), reference)

    def get_ensemble(self, name: str) -> EnsembleEntry:
        """The ensemble of a name or an alias; RegistryError where there is none."""
        return entries.resolve_ensemble(self.document(), name)

    def list_ensembles(self, include: Patterns = "*", exclude: Patterns = ()) -> Names:
        """Sorted names of the ensembles."""
        return matching(sorted(self.document().ensembles), include, exclude)

    def aliases(self) -> dict[str, str]:
        """Alias -> what it points to: `name@number`, or the name of an ensemble."""
        return {name: entries.pointed(fields) for name, fields in sorted(self.document().aliases.items())}

    def table(self, include: Patterns = "*", exclude: Patterns = ()) -> pandas.DataFrame:
        """One row per version: name, number, id, architecture, parameters, a column per metric, created."""
        import pandas

        rows = entries.rows(self.entries(include, exclude))
        return pandas.DataFrame(rows, columns=None if rows else ["name", "number", "id", "architecture", "parameters"])

    def checkpoint(self, reference: str) -> Checkpoint:
        """A version's checkpoint; its file is read once, hashed, and those bytes are used without a copy.

        Raises:
            RegistryError: UNKNOWN; a blob that is missing or not what was registered.
            CheckpointError: right bytes that do not fit, such as an architecture changed since.
        """
        from zoo.registry import reading

        return reading.checkpoint(self.blobs, self.get(reference))

    def load(self, reference: str, *, device: torch.device | str = "cpu") -> nn.Module:
        """A version as a model in eval mode, all of it or the errors of `checkpoint`."""
        return self.checkpoint(reference).to_module(device)

    def stacked(self, references: Sequence[str]) -> dict[str, torch.Tensor]:
        """Parameters and buffers of M versions of one spec by name, each (M, ...); the errors of `checkpoint`.

        Each blob is read and hashed once, straight into its place.
        """
        from zoo.registry import stacking

        document = self.document()
        return stacking.stacked(self.blobs, [entries.resolve(document, reference) for reference in references])

    def diff(self, first: str, second: str) -> dict[str, Any]:
        """How two versions differ: about, spec, recipe, classes, metrics, tensors; equal parts are empty."""
        from zoo.registry.difference import difference

        return difference(self.blobs, self.get(first), self.get(second))

    def measure(self, reference: str, frames: FrameSet) -> Rows:
        """Metrics recorded on these very frames, measured again: version, metric, recorded, measured, agrees."""
        from zoo.registry.measuring import compare

        return compare(self.get(reference), self.checkpoint(reference), frames)

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
    ) -> Entry:
        """Keep a model under a name, as its next version; the same weights again are the same version.

        Args:
            name: of the model.
            model: a `Checkpoint`, a live module, or the path of a safetensors file, which is checked and
                written anew.
            spec: needed with a module or a foreign file.
            classes: names of the classes; needed as `spec`.
            metrics: name -> number, or `{"value", "unit", "n", "frames"}`.
            recipe: plain data.
            parents: references of what it was averaged or distilled from.
            kind: trained, averaged or imported.
            trained_on: fingerprint of the training frames.
            note: free text.
            tags: short words.

        A version whose blob is damaged or missing is mended by registering the same weights again.

        Returns:
            The entry. Within a transaction its number may still move if others register the same name.

        Raises:
            RegistryError: a name that cannot be or is taken, the disk, the lock.
            CheckpointError: weights that do not fit the spec, NaN, infinity, a negative variance.
        """
        from zoo.registry import intake

        check_name(name)
        if parents is not None:
            parents = [self.get(parent).id for parent in notes.texts_of("parents", parents)]
        about = {"metrics": notes.metrics_of(metrics), "recipe": recipe, "parents": parents, "kind": kind}
        about |= {"trained_on": trained_on, "note": note}
        checkpoint = intake.checkpoint_of(model, spec, classes, **about)
        return self.deposit(name, intake.parcel(name, checkpoint, tags=tags))

    def deposit(self, name: str, parcel: Parcel) -> Entry:
        """The disk's share of `register`: the blob, then the line; see `protocol`."""
        self.blobs.put(parcel.data)
        id, fields, sha256 = parcel.id, parcel.fields, parcel.sha256
        data = b"" if self._ledger.collecting else parcel.data  # nobody has room for all of them
        document = self._commit(
            lambda document: upkeep.deposited(document, self.blobs, name, id, fields),
            create=True,
            ensure=lambda new: upkeep.ensure_blob(new, self.blobs, name, id, sha256, data),
        )
        return entries.version(document, name, id)

    def register_ensemble(self, name: str, ensemble: Any, *, note: str = "", tags: Iterable[str] = ()) -> EnsembleEntry:
        """Keep an ensemble: its members by id, its rule and numbers.

        Args:
            name: of the ensemble.
            ensemble: plain data with `members` (references) and `rule`, and where known `classes`, `weights`,
                `temperatures`, `fitted_on`; or an object whose `to_json()` gives it.
            note: free text.
            tags: short words.

        Raises:
            RegistryError: a member is not here, or has other classes, or the name is taken.
        """
        data = dict(ensemble if isinstance(ensemble, Mapping) else notes.json_of(ensemble))
        data |= {key: value for key, value in (("note", note), ("tags", notes.tags_of(tags))) if value}
        fields = entries.ensemble_fields(self.document(), data, now())
        document = self._commit(lambda document: changes.add_ensemble(document, name, fields))
        return entries.resolve_ensemble(document, name)

    def alias(self, name: str, target: str, *, expect: str | None = None) -> None:
        """Let an alias point to a version or an ensemble; it remembers what it pointed to before.

        Args:
            name: of the alias.
            target: a reference, or the name of an ensemble.
            expect: what it must point to now, else nothing is changed; "" where it must not exist yet.

        Raises:
            RegistryError: UNKNOWN target, NAME_COLLISION, CONFLICT where it points elsewhere than expected; ARGUMENT.
        """
        self._commit(changes.move_alias(self.document(), name, target, expect))

    def alias_back(self, name: str, *, expect: str | None = None) -> None:
        """Let an alias point again to what it pointed to before.

        Args:
            name: of the alias.
            expect: as of `alias`.

        Raises:
            RegistryError: UNKNOWN where it remembers nothing; CONFLICT as `alias`.
        """
        self._commit(changes.move_alias_back(self.document(), name, expect))

    def annotate(
        self,
        reference: str,
        *,
        note: str | None = None,
        tags: Iterable[str] | None = None,
        add_tags: Iterable[str] = (),
        drop_tags: Iterable[str] = (),
        metrics: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Say more of a version; what is left out stays, and so does what others say meanwhile.

        Args:
            reference: of the version.
            note: in place of its note; "" takes it off.
            tags: in place of all its tags.
            add_tags: to put on.
            drop_tags: to take off.
            metrics: to add to its own, or in place of those of the same name.

        Raises:
            RegistryError: UNKNOWN; ARGUMENT for what are no tags or metrics.
        """
        entry = self.get(reference)
        said = notes.Notes(
            note,
            tags=None if tags is None else notes.tags_of(tags),
            add=notes.tags_of(add_tags),
            drop=notes.tags_of(drop_tags),
            metrics=notes.metrics_of(metrics) or {},
        )
        document = self._commit(lambda document: changes.annotate(document, entry, said))
        return entries.version(document, entry.name, entry.id)

    def remove(self, reference: str, *, force: bool = False) -> Names:
        """Remove a version, an ensemble or an alias; the blob stays until `collect_garbage`.

        Args:
            reference: a version (a bare name is its newest, `name@*` all of them), an ensemble, an alias.
            force: remove also the ensembles and aliases that hold it.

        Returns:
            The ensembles and aliases that held it.

        Raises:
            RegistryError: UNKNOWN; HELD, naming what holds it.
        """
        gone = entries.all_pinned(self.document(), reference)
        held: Names = []

        def change(document: Document) -> Document:
            held[:] = changes.holders(document, gone)
            return changes.remove(document, gone, force=force)

        self._commit(change)
        return held

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Collect changes and commit them once at the end; after an exception, none of them.

        Blobs are written at once; no lock is held meanwhile, so others may commit in between.
        """
        with self._ledger.transaction(timeout=self.timeout):
            yield

    # ---- keeping

    def verify(
        self, include: Patterns = "*", exclude: Patterns = (), *, fast: bool = False, probe: bool = False
    ) -> Problems:
        """What is wrong with the blobs; an empty list where nothing is.

        Args:
            include: names of models, shell wildcards.
            exclude: names to leave out.
            fast: look at sizes and headers only, hash nothing.
            probe: also run each model on the probe batch and compare with what it said at registration.
        """
        return [problem for _, problem in self.verified(include, exclude, fast=fast, probe=probe) if problem]

    def verified(
        self, include: Patterns = "*", exclude: Patterns = (), *, fast: bool = False, probe: bool = False
    ) -> Iterator[tuple[Entry, Problem | None]]:
        """As `verify`, one version after another, to show progress."""
        return upkeep.verified(self.blobs, self.entries(include, exclude), fast=fast, probe=probe)

    def collect_garbage(self, *, dry_run: bool = False, older_than: float = 86_400.0) -> Paths:
        """Remove temporary files and blobs that no version points to; under the lock.

        Args:
            dry_run: only tell.
            older_than: seconds; what is younger may belong to a registration under way, and stays.

        Returns:
            The files removed, or that would be.

        Raises:
            RegistryError: the registry does not parse; then nothing is touched.
        """
        return upkeep.collect_garbage(
            self.path, self.blobs, timeout=self.timeout, dry_run=dry_run, older_than=older_than
        )

    def recover(self) -> Entries:
        """Rebuild a lost registry from what its blobs say of themselves.

        Numbers follow the age of the blobs; aliases, ensembles and tags are not in blobs and stay lost. Versions
        that the registry has already stay as they are. What cannot be recovered is told in one warning.

        Returns:
            The versions that the blobs hold, each once, by the age of their blobs.

        Raises:
            RegistryError: the file is there and does not parse: move it away first.
        """
        from zoo.registry import rescue

        found, left_out = rescue.rebuild(self.blobs, partial(self._commit, create=True))
        if left_out:
            warnings.warn("what these blobs hold was left out:\n" + "\n".join(left_out), stacklevel=2)
        return found

    def _commit(self, change: changes.Change, **how: Any) -> Document:
        return self._ledger.commit(change, timeout=self.timeout, **how)
