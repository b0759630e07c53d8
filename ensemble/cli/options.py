"""Options that several commands share, and what they stand for: members, frames, rules by name, saved ensembles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import filter as matching
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

import ensemble
import zoo
from zoo._console import Answer, progress
from zoo.cli.options import (
    Classes,
    Corpus,
    Device,
    Mapped,
    Names,
    RegistryFile,
    class_names,
    flag_fields,
    read_partition,
    require_folders,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ensemble.judge.tables import Tally
    from ensemble.outputs.predictions import Predictions
    from zoo.registry import Snapshot
    from zoo.workers import Workers

    Judging = Callable[
        [Mapping[str, ensemble.Rule], str], tuple[ensemble.MemberOutputs | Tally, ensemble.MemberOutputs]
    ]

Paths = Annotated[tuple[Path, ...], Parameter(consume_multiple=True)]
Precision = Annotated[
    Literal["float32", "auto"],
    Parameter(help="float32, which is exact, or auto, a narrower type where it is faster and a probe agrees."),
]

#: options of `Source` that say on which frames members run, and how
_RUNNING = ("corpus", "mapped", "device", "precision", "cache", "sample", "jobs", "ray", "run")


@flag_fields
@dataclass(frozen=True)
class Source:
    """Members and frames.

    Args:
        members: names, wildcards or aliases in the registry; a saved ensemble stands for its members; all models if
            left out.
        valid: partition on which rules are fitted and the best single member is chosen.
        test: partition on which members and rules are judged.
        cache: folder that stores the members' outputs, so that nothing is computed twice.
        sample: most frames of a partition whose outputs are kept. Of more, rules are fitted on a fixed sample of this
            size; members and rules are judged on all frames all the same.
        jobs: processes that run the members, shard by shard; the results are the same to the last digit.
        ray: actors of a Ray cluster do, the one that $RAY_ADDRESS names, otherwise one on this machine (needs the extra
            `ray`).
        run: folder in which the results of shards are kept, so that the same command goes on from them; on a cluster,
            one that all machines see.
        outputs: folder written by `ensemble collect`, in place of registry, corpus and models.
        predictions: files of probabilities (.npy, .npz, .csv, .parquet), one per member, or folders of them, in place
            of the same. A partition's files lie in a folder of its name, or have it before or after their own name, as
            oof_net.csv; without such names, all files are of one set. Where only one set has labels, rules are fitted
            on every other recording of it and judged on the others.
        labels: FILE:COLUMN, or a column of the predictions.
        ids: column that names the rows in these files; by default one called id, or without a name.
        groups: column of each row's recording, in these files or that of the labels; or FILE:COLUMN.
        renormalise: divide each row of the predictions by its sum, where they were rounded or are per cent.
    """

    members: Names = ("*",)
    registry: RegistryFile = None
    corpus: Corpus = None
    mapped: Mapped = None
    classes: Classes = ()
    valid: str = "valid"
    test: str = "test"
    device: Device = "auto"
    precision: Precision = "float32"
    cache: Path | None = None
    sample: int = 2_000_000
    jobs: int = 1
    ray: bool = False
    run: Path | None = None
    outputs: Path | None = None
    predictions: Paths = ()
    labels: str | None = None
    ids: str | None = None
    groups: str | None = None
    renormalise: bool = False

    def __post_init__(self) -> None:
        if self.outputs is not None and self.predictions:
            msg = "expected either --outputs or --predictions, got both"
            raise ValueError(msg)
        for name in ("labels", "ids", "groups", "renormalise"):
            if getattr(self, name) and not self.predictions:
                msg = f"expected --{name} beside --predictions, got none; a corpus and stored outputs have their own"
                raise ValueError(msg)
        if self.stored:
            kind = "outputs" if self.outputs is not None else "predictions"
            self.refuse(*_RUNNING, where=f"beside --{kind}, for which no member runs")
        if self.cache is not None:
            self.refuse("sample", where="beside --cache, which keeps the outputs on all frames")
            self.refuse("run", where="beside --cache, which goes on by itself from the shards that it has")
        if self.ray and self.jobs != 1:
            msg = "expected either --jobs or --ray, got both"
            raise ValueError(msg)
        if min(self.jobs, self.sample) < 1:
            msg = f"expected --jobs and --sample of 1 or more, got {self.jobs} and {self.sample}"
            raise ValueError(msg)
        if self.outputs is not None and self.classes:
            msg = "expected no --classes beside --outputs, which know their classes"
            raise ValueError(msg)

    def refuse(self, *names: str, where: str) -> None:
        """Refuse options that were given where they cannot act."""
        if given := [f"--{name}" for name in names if getattr(self, name) != getattr(Source, name)]:
            msg = f"expected no {' or '.join(given)} {where}"
            raise ValueError(msg)

    @property
    def stored(self) -> bool:
        """Whether outputs are read in place of being computed."""
        return self.outputs is not None or bool(self.predictions)


class Collection:
    """What a `Source` stands for: the members' outputs, partition by partition, and the versions that gave them."""

    def __init__(self, source: Source) -> None:
        require_folders(source.cache, source.run)
        self.source = source
        self.registry = zoo.Registry(source.registry)
        self.seconds: float | None = None  # that the members ran on the last partition; None for stored outputs
        self.fitted, self.judged = repr(source.valid), repr(source.test)  # the frames of either kind, in words
        self._read: dict[str, Predictions] = {}
        self._few: zoo.FrameSet | None = None  # of the last partition, to measure on

    @cached_property
    def now(self) -> Snapshot:
        """The registry's content, read once."""
        return self.registry.snapshot()

    @cached_property
    def versions(self) -> dict[str, zoo.Entry]:
        """Name -> version of each member in the registry."""
        saved = self.ensembles(self.source.members)
        wanted = [id for name in self.source.members for id in (saved[name].members if name in saved else [name])]
        return ensemble.run.versions(self.now, wanted)

    @cached_property
    def members(self) -> ensemble.Members:
        """The members, hash-checked and ready to run."""
        source = self.source
        return ensemble.load(self.registry, self.versions.values(), device=source.device, precision=source.precision)

    @property
    def names(self) -> Iterable[str]:
        """Names of the members, known before any of them runs."""
        return self.outputs(self.source.valid).members if self.source.stored else self.versions

    def ensembles(self, names: Iterable[str]) -> dict[str, zoo.EnsembleEntry]:
        """The saved ensembles, or aliases of one, among these names; none where there is no registry."""
        names = [name for name in names if not set(name) & set("*?[") and name not in rule_names()]
        if not names or (self.source.stored and not self.registry.path.exists()):
            return {}
        known, aliases = self.now.list_ensembles(), self.now.aliases()
        return {name: self.now.get_ensemble(name) for name in names if aliases.get(name, name) in known}

    @cached_property
    def workers(self) -> Workers | None:
        """Who runs the members; None for this process."""
        cuda = self.members.device.type == "cuda"
        if self.source.ray:
            return ensemble.run.Ray(gpus=int(cuda))
        if self.source.jobs > 1 and cuda:
            msg = "expected --jobs 1 on a CUDA device, which one process keeps busy; --ray takes one for each actor"
            raise ValueError(msg)
        return ensemble.run.Processes(self.source.jobs) if self.source.jobs > 1 else None

    def frames(self, partition: str) -> zoo.FrameSet:
        """The frames of a partition, for the members."""
        source, classes = self.source, class_names(self.source.classes)
        return read_partition(source.corpus, partition, classes or self.members.classes, mapped=source.mapped)

    def outputs(
        self, partition: str, *, cache: Path | None = None, labelled: bool = True, sampled: bool = False
    ) -> ensemble.MemberOutputs:
        """The members' outputs on a partition, with labels unless these are not needed.

        They are stored in `cache`, or in the source's cache; otherwise, if `sampled`, of many frames only a sample is.
        """
        if self.source.predictions:
            found = self.predictions(partition)
            if labelled:
                self._require_labels(found, partition)
            outputs = self._chosen(found.outputs, "the predictions")
        elif self.source.outputs is not None:
            from ensemble.outputs.store import read_outputs

            outputs = self._chosen(read_outputs(self.source.outputs / partition), str(self.source.outputs))
        else:
            frames = self.frames(partition)
            if cache is None and self.source.cache is not None:
                cache = self.source.cache / partition
            outputs = self._run(partition, frames, cache, sampled=sampled)
        if labelled:
            outputs.require_labels()
        return outputs

    def _run(
        self, partition: str, frames: zoo.FrameSet, cache: Path | None, *, sampled: bool
    ) -> ensemble.MemberOutputs:
        """Have the members run, and look at the time."""
        began, most = time.perf_counter(), self.source.sample if sampled else len(frames)
        if cache is not None:
            shared: dict[str, Any] = {"workers": self.workers, "progress": progress}
            fill = None if self.workers is None else ensemble.run.shards.filling(frames, **shared)
            outputs = ensemble.collect(self.members, frames, cache=cache, fill=fill, progress=progress)
        else:
            how = self._how(f"{partition}-outputs")
            outputs = ensemble.run.shards.sample(self.members, frames, most=most, **how)
            if outputs.shape[1] < len(frames) and partition == self.source.valid:
                self.fitted = f"a sample of {outputs.shape[1]:,} of the {len(frames):,} frames of {partition!r}"
        self._ran(frames, began)
        return outputs

    def _how(self, name: str) -> dict[str, Any]:
        """Who runs the members, and where results are kept."""
        folder = None if self.source.run is None else self.source.run / name
        return {"workers": self.workers, "folder": folder, "progress": progress}

    def _ran(self, frames: zoo.FrameSet, began: float) -> None:
        self.seconds = time.perf_counter() - began
        first = int((frames.starts < self.members.step).sum())  # the recordings that hold so many frames
        few = frames.select(frames.starts.new_tensor(range(min(first, frames.recordings))))
        self._few = replace(few, features=few.features.clone())  # the others may be let go of

    def require_measurable(self, flag: str) -> None:
        """Refuse before the work to measure costs where no member runs."""
        if self.source.stored:
            msg = f"expected models whose costs can be measured beside {flag}, got outputs or predictions"
            raise ValueError(f"{msg} that were stored")

    def costs(self, rules: Mapping[str, ensemble.Rule]) -> dict[str, ensemble.outputs.Cost]:
        """What each member and each rule costs on this machine; after `outputs`, on its first frames."""
        assert self._few is not None  # the commands refuse stored outputs before
        return ensemble.run.measure_costs(self.members, self._few, rules, progress=progress)

    @cached_property
    def _separate(self) -> bool:
        """Whether there is a set of its own to judge on; of predictions, one whose labels are known."""
        test = self.source.test
        if not self.source.predictions:
            return True
        return bool(self._files[test]) and not self.one_set and self.predictions(test).outputs.labels is not None

    @cached_property
    def _files(self) -> dict[str, dict[str, Path]]:
        """Partition -> member -> file of predictions."""
        source, labels = self.source, self.source.labels or ""
        beside = [Path(each) for each in (labels, labels.rpartition(":")[0]) if each and Path(each).is_file()]
        return prediction_files(source.predictions, (source.valid, source.test), without=next(iter(beside), None))

    @property
    def one_set(self) -> bool:
        """Whether both partitions are the same files of predictions."""
        valid, test = self.source.valid, self.source.test
        return bool(self.source.predictions) and self._files[valid] == self._files[test]

    def shown(self) -> ensemble.MemberOutputs:
        """Outputs with labels to look at, where nothing is fitted: those of the test partition, or of the only set."""
        return self.outputs(self.source.test if self._separate else self.source.valid)

    def both(self) -> tuple[ensemble.MemberOutputs, ensemble.MemberOutputs]:
        """Outputs to fit on and outputs to judge on, both with labels: the two partitions.

        Where only one set of predictions has labels, or both partitions are one set, these are its two halves.
        """
        valid, test = self.source.valid, self.source.test
        if self._separate:
            return self.outputs(valid), self.outputs(test)
        self._require_labels(self.predictions(valid), valid)
        self.fitted, self.judged = f"half of {valid!r}", f"the other half of the recordings of {valid!r}"
        first, second = (self._chosen(half.outputs, "the predictions") for half in self.predictions(valid).halves())
        return first, second

    def fitting_and_judging(self) -> tuple[ensemble.MemberOutputs, Judging]:
        """Outputs to fit on, and what judges rules by a metric: on outputs, or on more frames than those are kept of.

        The latter gives what `ensemble.evaluate` takes, and outputs on the same frames, or on a sample of them.
        """
        source = self.source
        if source.stored or source.cache is not None:
            valid, test = self.both()
            return valid, lambda rules, metric: (test, test)
        frames = self.frames(source.test)
        if frames.labels is None:
            msg = f"expected frames with labels to judge on, got {source.test!r} without: it needs transcripts"
            raise ValueError(msg)
        valid = self.outputs(source.valid, sampled=True)

        def judging(
            rules: Mapping[str, ensemble.Rule], metric: str
        ) -> tuple[ensemble.MemberOutputs | Tally, ensemble.MemberOutputs]:
            if len(frames) <= source.sample:
                outputs = self._run(source.test, frames, None, sampled=True)
                return outputs, outputs
            began, how = time.perf_counter(), self._how(f"{source.test}-judged")
            found = ensemble.run.shards.judge(self.members, frames, rules, metric=metric, most=source.sample, **how)
            self._ran(frames, began)
            return found

        return valid, judging

    def _require_labels(self, found: Predictions, partition: str) -> None:
        if found.outputs.labels is None:
            if self.source.labels is None:
                msg = f"expected labels of the predictions of {partition!r}, got none; --labels FILE:COLUMN tells them"
                raise ValueError(msg)
            where = f"{self.source.labels!r} of the predictions of {partition!r}"
            msg = (
                f"expected labels in {where}, got none of the ids {[*found.ids[:3]]}, ...; name the file and the column"
            )
            raise ValueError(msg)

    def predictions(self, partition: str) -> Predictions:
        """The files of predictions of a partition, read once."""
        from ensemble.outputs.predictions import read_predictions

        if (found := self._read.get(partition)) is None:
            source = self.source
            files = self._files[partition]
            if not files:
                msg = f"expected predictions of {partition!r} in {[*map(str, source.predictions)]}, got none"
                raise ValueError(f"{msg}; --valid and --test name those that there are{_folders(source.predictions)}")
            found = self._read[partition] = read_predictions(
                files,
                labels=source.labels,
                ids=source.ids,
                groups=source.groups,
                classes=class_names(source.classes) or None,
                renormalise=source.renormalise,
                by_id=partition != source.valid and not self.one_set,
            )
        return found

    def _chosen(self, outputs: ensemble.MemberOutputs, where: str) -> ensemble.MemberOutputs:
        """Those of the members that match; for a saved ensemble, of the versions it was saved with."""
        saved, positions = self.ensembles(self.source.members), by_version(outputs)
        chosen: dict[str, None] = {}
        for name in self.source.members:
            if name in saved:
                chosen |= {outputs.members[positions[id]]: None for id in saved[name].members if id in positions}
            else:
                chosen |= dict.fromkeys(matching(outputs.members, name))
        if not chosen:
            msg = f"expected members that match {[*self.source.members]}, got none; {where} has {[*outputs.members]}"
            raise ValueError(msg)
        return outputs if [*chosen] == [*outputs.members] else outputs.subset([*chosen])

    def saved_rules(self, names: Iterable[str], outputs: ensemble.MemberOutputs) -> dict[str, ensemble.Rule]:
        """Name -> rule of each saved ensemble, over exactly the versions that it was saved with."""
        positions = by_version(outputs)
        rules: dict[str, ensemble.Rule] = {}
        for name, entry in self.ensembles(names).items():
            if missing := [id for id in entry.members if id not in positions]:
                remedy = "collect the outputs again" if "" in positions else "name it with --members"
                msg = f"expected all members of the ensemble {name!r} among those judged"
                raise ValueError(f"{msg}, got none with the ids {missing}; {remedy}")
            if entry.classes != outputs.classes:
                msg = f"expected the classes in the order of the ensemble {name!r}"
                raise ValueError(f"{msg}; name it first, or alone, with --members")
            rule = ensemble.rules.rule_from_json(entry.rule)
            rules[name] = ensemble.rules.Among(rule, tuple(positions[id] for id in entry.members))
        return rules

    def require_savable(self, name: str | None) -> None:
        """Refuse before the work a result that `saved` could not register after it.

        The name may be taken, a version unknown or gone, or the members may have their classes in different orders.
        """
        if name is None:
            return
        if self.source.predictions:
            msg = "expected members of a registry to save them, got files of predictions"
            raise ValueError(f"{msg}; `ensemble predict RULE --predictions ...` fits a rule and applies it")
        now, folder = self.now, self.source.outputs
        taken = {other.casefold(): other for other in (*rule_names(), *now.list(), *now.aliases())}.get(name.casefold())
        if taken is not None:
            msg = "expected a name for the ensemble that no rule, model or alias has"
            raise ValueError(f"{msg}, got {name!r}, the name of {taken!r}")
        if folder is None:
            entries = self.versions
        else:
            stored = self.outputs(self.source.valid)
            references = {member: about.reference for member, about in zip(stored.members, stored.about, strict=True)}
            if unknown := [member for member, reference in references.items() if not reference]:
                msg = f"expected outputs in {folder} that record the versions of their members"
                raise ValueError(f"{msg}, got none for {unknown}; collect again")
            try:
                entries = {member: now.get(reference) for member, reference in references.items()}
            except zoo.RegistryError as error:
                msg = f"expected the versions of these outputs in {self.registry.path}, got: {error}; collect again"
                raise ValueError(msg) from error
        first = next(iter(entries))
        if other := [member for member, entry in entries.items() if entry.classes != entries[first].classes]:
            msg = f"expected members with their classes in one order, got another than that of {first!r} in {other}"
            remedy = f"register these again with the rows of their output layer in the order of {first!r}"
            raise ValueError(f"{msg}; to save them together {remedy}")

    def saved(self, answer: Answer, name: str | None, rule: ensemble.Rule, outputs: ensemble.MemberOutputs) -> Answer:
        """The answer, once the rule and the members that influence it are registered, in the judged versions."""
        if name is None:
            return answer
        whole, used = ensemble.rules.rule_for(rule, outputs.members), tuple(range(len(outputs.members)))
        if (positions := whole.used) is not None:
            whole, used = whole.restricted(positions), positions
        entries = [self.now.get(outputs.about[position].reference) for position in used]
        members = ensemble.load(self.registry, entries)
        self.registry.register_ensemble(name, ensemble.Ensemble(members, whole))
        parameters = sum(entry.parameters for entry in entries)
        line = f"saved as {name!r}: {len(entries)} of {len(outputs.members)} members, {parameters:,} parameters"
        return Answer(answer.data | {"saved": name}, [*answer.shown, line])


def prediction_files(
    paths: Iterable[Path], partitions: tuple[str, str], *, without: Path | None = None
) -> dict[str, dict[str, Path]]:
    """Partition -> member -> file: those with its name as their folder's, or before or after their own.

    Where no partition is named in any file, all files are of both, except `without`. A `ValueError` for a path that
    does not exist, a folder without such files, and two files of one member.
    """
    from ensemble.outputs.predictions import READERS

    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            folders = [path / name for name in dict.fromkeys(partitions) if (path / name).is_dir()] or [path]
            inside = [file for folder in folders for file in sorted(folder.iterdir())]
            files = [file for file in inside if file.suffix in READERS and not file.name.startswith(".")]
        else:
            files = [path] if path.is_file() else []
        if not files:
            msg = f"expected files of predictions ({', '.join(READERS)}) in {str(path)!r}, got none"
            raise ValueError(msg + _folders([path]))
        found |= dict.fromkeys(files)
    marks = [(file, _marked(file, partitions)) for file in found]
    if not any(mark for _, mark in marks):
        everywhere = [(file, file.stem) for file in found if without is None or not file.samefile(without)]
        return dict.fromkeys(partitions, _one_each(everywhere))
    return {
        each: _one_each([(file, mark[1]) for file, mark in marks if mark and mark[0] == each]) for each in partitions
    }


def _one_each(files: Iterable[tuple[Path, str]]) -> dict[str, Path]:
    """Member -> file."""
    members: dict[str, Path] = {}
    for file, name in files:
        if name in members:
            msg = f"expected one file per member, got {str(members[name])!r} and {str(file)!r}, both of {name!r}"
            raise ValueError(msg)
        members[name] = file
    return members


def _marked(file: Path, partitions: Iterable[str]) -> tuple[str, str] | None:
    """The partition that a file names, and the member."""
    names = ((each, _unmarked(file, each)) for each in partitions)
    return next(((each, name) for each, name in names if name is not None), None)


def _folders(paths: Iterable[Path]) -> str:
    there = sorted({each.name for path in paths if path.is_dir() for each in path.iterdir() if each.is_dir()})
    return f"; folders there: {', '.join(there)}" if there else ""


def _unmarked(file: Path, partition: str) -> str | None:
    """The name of the member in that of a file of this partition; None for a file of another."""
    stem = file.stem
    if stem == partition:
        return file.parent.name
    if file.parent.name == partition:
        return stem
    for mark in "_-.":
        if stem.startswith(partition + mark):
            return stem.removeprefix(partition + mark)
        if stem.endswith(mark + partition):
            return stem.removesuffix(mark + partition)
    return None


def by_version(outputs: ensemble.MemberOutputs) -> dict[str, int]:
    """Id of a version -> position of the member; members of unknown version share the id ""."""
    return {about.reference.partition("@")[2]: position for position, about in enumerate(outputs.about)}


def recordings(outputs: ensemble.MemberOutputs) -> NDArray[np.int64]:
    """(N,): the recording of each frame."""
    assert outputs.groups is not None  # filled in when made
    return outputs.groups.numpy()


def applied(rule: ensemble.Rule, outputs: ensemble.MemberOutputs) -> Tensor:
    """(N, C) probabilities of a rule over all members."""
    import torch

    pieces = [rows for _, _, rows in ensemble.rules.combined(rule, outputs)]
    return torch.cat(pieces) if pieces else torch.empty(0, len(outputs.classes))


def rule_names() -> list[str]:
    """Every name of a rule, fitted or not."""
    return [*ensemble.fit.FITTERS, *ensemble.list_rules()]


def require_rules(names: Iterable[str], others: Iterable[str] = ()) -> None:
    """Refuse before the work a name of no rule, unless it is one of the others."""
    known = [*(others := [*others]), *rule_names()]
    for name in names:
        if name not in known:
            raise ValueError(ensemble.rules.no_such("member or rule" if others else "rule", name, known))


def require_coverage(sets: float | None) -> None:
    """Refuse before the work what sets cannot cover."""
    if sets is not None and not 0 < sets < 1:
        msg = f"expected a coverage between 0 and 1 for --sets, for instance 0.9, got {sets:g}"
        raise ValueError(msg)


def named_rules(
    names: Sequence[str], valid: ensemble.MemberOutputs, *, others: Sequence[str] = ()
) -> dict[str, ensemble.Rule]:
    """Name -> rule, fitted on `valid` where it has numbers; those of `others` are left out."""
    fitters = ensemble.fit.FITTERS
    wanted = [name for name in names if name not in others]
    return {name: fitters[name](valid) if name in fitters else ensemble.get_rule(name) for name in wanted}
