"""Commands that run members: predict, export, collect, plan."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ensemble
import zoo
from ensemble.cli.evaluate import interval, weights_in
from ensemble.cli.options import (
    Collection,
    Source,
    named_rules,
    recordings,
    require_coverage,
    require_rules,
    rule_names,
)
from zoo import _files
from zoo._console import Answer, Table, progress
from zoo.cli.entries import exported
from zoo.cli.options import (
    Classes,
    Corpus,
    FilePrecision,
    Mapped,
    RegistryFile,
    class_names,
    read_partition,
    require_folders,
    require_writable,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class _Found:
    """What a rule says about frames."""

    #: (M, b, C) probabilities of the members, of which a cascade has none but its own; (b, C) of the rule
    blocks: Iterable[tuple[Tensor, Tensor]]
    frames: int
    members: tuple[str, ...]
    classes: tuple[str, ...]
    places: Mapping[str, NDArray[Any]]  #: columns that tell where each frame is
    rule: ensemble.Rule
    valid: Callable[[], ensemble.MemberOutputs]  #: the members' outputs to fit sets on
    line: Mapping[str, Any]  #: what else is known


def predict(
    name: str,
    /,
    *,
    output: Path,
    source: Source = Source(),
    form: Literal["frames", "submission", "probabilities"] | None = None,
    uncertainty: bool = False,
    sets: float | None = None,
    cascade: str = "",
) -> Answer:
    """Write the predicted class of every frame, or all probabilities, to a CSV or Parquet file.

    A rule with numbers is fitted on the validation partition, and applied to the members' outputs on the other.

    Example: ensemble predict final --corpus my-corpus --test test --output submission.csv --form submission

    Args:
        name: an ensemble or a model in the registry, or a rule; with --outputs or --predictions also a member.
        output: the file, .csv or .parquet; it appears when it is complete, and replaces an existing one.
        form: "frames", the default, writes recording, frame, label, probability; "submission", the default for
            --predictions, writes id, label as in HW1P2; "probabilities" has a column for each class in place of the
            label. Predictions keep their ids in every form, and the names of both columns.
        uncertainty: add the entropy of the members' mean in nats, total, and its two parts: aleatoric, which the
            members agree on, and epistemic, by which they disagree. Empty where every member abstains.
        sets: add the set of the classes that are possible, with blanks between them: for this fraction of a new
            recording's frames the true class is among them. Fitted on the validation partition, which needs 9
            recordings for 0.9, and 99 for 0.99.
        cascade: ask further members only about frames whose class they can change, with "exact"; or with the loss of
            accuracy that you accept, such as 0.001, by a threshold fitted on the validation partition.
    """
    import numpy as np

    require_writable(output)
    require_coverage(sets)
    extra = uncertainty or sets is not None
    if extra and form == "submission":
        msg = "expected --form frames or probabilities beside --uncertainty and --sets, got submission, of two columns"
        raise ValueError(msg)
    loss = _accepted(cascade)
    if cascade and (uncertainty or source.stored):
        other = (
            "--uncertainty, which needs all members" if uncertainty else "stored outputs, which are all there already"
        )
        raise ValueError(f"expected --cascade where members run that need not, got it beside {other}")
    source.refuse("sample", where="for `predict`, which needs the outputs on all frames")
    collection = Collection(source)
    found = (
        _combined(collection, name)
        if source.stored
        else _run(collection, name, loss, every=uncertainty, sets=sets is not None)
    )
    if sets is not None and (blank := next((each for each in found.classes if len(each.split()) != 1), None)):
        msg = f"expected names of classes without blanks, which stand between those of a set, got {blank!r}"
        raise ValueError(msg)
    fitted = None if sets is None else ensemble.fit.fit_prediction_sets(found.valid(), found.rule, sets)
    probabilities, parts = _rows(found, uncertainty=uncertainty)
    form = form or ("submission" if source.predictions and not extra else "frames")
    places, label = found.places, "label"
    ids: Mapping[str, NDArray[Any]] = {"id": np.arange(found.frames)}
    if source.predictions:
        known = collection.predictions(source.test)
        ids, label = {known.id_column: np.array(known.ids)}, known.label_column
        places = ids
    columns: list[tuple[str, NDArray[Any]]] = [*(ids if form == "submission" else places).items()]
    if form == "probabilities":
        columns += zip(found.classes, probabilities.T, strict=True)
    else:
        columns += [(label, np.array(found.classes)[probabilities.argmax(axis=1)])]
    if form == "frames":
        columns += [("probability", probabilities.max(axis=1))]
    columns += parts.items()
    held = None if fitted is None else fitted.sets(probabilities)
    if held is not None:
        columns += [("set", np.array([" ".join(np.array(found.classes)[row]) for row in held], dtype=object))]
    _write(output, columns, precision="%.9g" if form == "probabilities" or uncertainty else "%.6f")
    data: dict[str, Any] = {"name": name, "output": str(output), "frames": found.frames, "form": form, **found.line}
    recordings = f" of {data['recordings']:,} recordings" if "recordings" in data else ""
    weights = ", ".join(f"{member} {weight:.3f}" for member, weight in data.get("weights", {}).items() if weight > 0)
    shown = [f"weights: {weights}"] if weights else []
    if uncertainty:
        data["uncertainty"] = {part: float(np.nanmean(values)) for part, values in parts.items()}
        shown.append(f"uncertainty, nats: {', '.join(f'{part} {v:.4f}' for part, v in data['uncertainty'].items())}")
    if fitted is not None and held is not None:
        size = float(held.sum(axis=1).mean())
        data["sets"] = {"coverage": fitted.coverage, "threshold": fitted.threshold, "recordings": fitted.recordings}
        data["sets"] |= {"size": size, "notes": list(fitted.notes)}
        shown.append(
            f"sets to cover {sets:g}, fitted on {fitted.recordings:,} recordings: {size:.2f} classes on average"
        )
        shown += [f"note: {note}" for note in fitted.notes]
    if "asked" in data:
        shown.append(f"{data['asked']:.1%} of the members were asked about a frame, on average")
    if "loss" in data:
        ends = interval(data["loss_low"], data["loss_high"])
        shown.append(f"loss of accuracy against asking all, on {source.valid!r}: {data['loss']:+.4f} ({ends})")
    return Answer(data, [*shown, f"{found.frames:,} frames{recordings} written to {output}"])


def _accepted(cascade: str) -> float | None:
    """The accepted loss of `--cascade`: None for no cascade, 0 for an exact one."""
    if cascade in ("", "exact"):
        return 0.0 if cascade else None
    try:
        loss = float(cascade)
    except ValueError:
        loss = 0.0
    if not 0 < loss < 1:
        msg = f"expected --cascade exact, or an accepted loss of accuracy such as 0.001, got {cascade!r}"
        raise ValueError(msg)
    return loss


def _run(collection: Collection, name: str, loss: float | None, *, every: bool, sets: bool) -> _Found:
    """By the models of a registry over a corpus: all of them, or where `every` is not asked those of a cascade."""
    import numpy as np

    source, running = collection.source, ("cache", "jobs", "ray", "run")
    if name in rule_names():
        outputs: Callable[[], ensemble.MemberOutputs] = cache(partial(collection.outputs, source.valid))
        fitted = name in ensemble.fit.FITTERS
        if not (fitted or sets or loss):
            source.refuse(*running, where=f"for {name!r}, for which nothing is fitted: its members run in this process")
        rule = named_rules([name], outputs())[name] if fitted else ensemble.get_rule(name)
        final = ensemble.Ensemble(collection.members, rule)
    else:
        source.refuse("members", *running, where=f"for {name!r}, which has members of its own and runs in this process")
        final = loaded(collection.registry, name, device=source.device, precision=source.precision)

        def outputs() -> ensemble.MemberOutputs:
            return ensemble.collect(final.members, read(source.valid), progress=progress)

    def read(partition: str) -> zoo.FrameSet:
        classes = class_names(source.classes) or final.members.classes
        return read_partition(source.corpus, partition, classes, mapped=source.mapped)

    if loss is not None and ensemble.rules.declared(final.rule).sparing:
        raise ValueError(f"expected a rule over all members beside --cascade, got {name!r}, which is a cascade itself")
    frames = read(source.test)
    rule, line = final.rule, dict[str, Any](recordings=frames.recordings)
    if loss is not None and loss > 0:
        bought = ensemble.fit.fit_cascade(outputs(), rule, loss=loss)
        rule, ends = bought.rule, bought.loss
        line |= {"loss": ends.estimate, "loss_low": ends.low, "loss_high": ends.high}
    elif loss is not None:
        rule = ensemble.rules.Cascade(rule)
    whole = ensemble.rules.rule_for(rule, final.members.names)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        if every or not whole.sparing:
            for logs in ensemble.run.predictions(final.members, frames):
                yield logs.exp().cpu(), whole.of_logs(logs).cpu()
            return
        asked = 0
        for rows, counts in ensemble.run.answers(final.members, frames, whole):
            asked += int(counts.sum())
            yield rows[None].cpu(), rows.cpu()
        line["asked"] = asked / len(final.members) / len(frames)

    groups = frames.groups.numpy()
    return _Found(
        blocks(),
        len(frames),
        final.members.names,
        final.members.classes,
        {"recording": np.array(frames.names)[groups], "frame": np.arange(len(frames)) - frames.starts.numpy()[groups]},
        rule,
        outputs,
        line,
    )


def _combined(collection: Collection, name: str) -> _Found:
    """The same out of outputs or predictions that are read."""
    import numpy as np

    source = collection.source
    outputs = collection.outputs(source.test, labelled=False)
    saved = collection.saved_rules([name], outputs)
    require_rules([name], [*outputs.members, *saved])

    @cache
    def valid() -> ensemble.MemberOutputs:
        if collection.one_set:
            msg = f"expected predictions of {source.test!r} beside those of {source.valid!r}, got one set of files"
            raise ValueError(f"{msg}; what is fitted on one is applied to the other")
        return collection.outputs(source.valid)

    line: dict[str, Any] = {}
    if name in outputs.members:
        rule: ensemble.Rule = ensemble.WeightedMean(
            tuple(float(member == name) for member in outputs.members), outputs.fingerprint, members=outputs.members
        )
    else:
        fitted = name in ensemble.fit.FITTERS
        rule = (saved or named_rules([name], valid() if fitted else outputs))[name]
        if weights := weights_in({name: rule}, valid() if fitted else outputs):
            line["weights"] = weights
        line["fitted_on"] = ensemble.rules.declared(rule).fingerprint
    groups = recordings(outputs)
    _, starts, number = np.unique(groups, return_index=True, return_inverse=True)
    return _Found(
        ((members, rows) for _, members, rows in ensemble.rules.combined(rule, outputs)),
        len(groups),
        outputs.members,
        outputs.classes,
        {"recording": groups, "frame": np.arange(len(groups)) - starts[number]},
        rule,
        valid,
        line,
    )


def _rows(found: _Found, *, uncertainty: bool) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float64]]]:
    """(N, C) probabilities of the rule, and the columns of uncertainty, over the members that influence the rule."""
    import numpy as np

    used = ensemble.rules.rule_for(found.rule, found.members).used
    members = slice(None) if used is None else list(used)
    rows = np.empty((found.frames, len(found.classes)), dtype=np.float32)
    parts = {part: np.empty(found.frames) for part in ("total", "aleatoric", "epistemic")} if uncertainty else {}
    start = 0
    with progress(f"predicting {found.frames:,} frames"):
        for probabilities, combined in found.blocks:
            where = slice(start, start := start + len(combined))
            rows[where] = combined
            split = ensemble.judge.uncertainty(probabilities[members]) if parts else None
            for part, values in parts.items():
                values[where] = getattr(split, part)
    return rows, parts


def _write(path: Path, columns: Sequence[tuple[str, NDArray[Any]]], *, precision: str) -> None:
    """Write a table whose columns have distinct names: CSV, or Parquet where the path ends so."""
    import pandas as pd

    names = [name for name, _ in columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        msg = f"expected columns of distinct names, got {twice} more than once; rename these classes with --classes"
        raise ValueError(msg)
    table = pd.DataFrame(dict(columns))
    if path.suffix != ".parquet":
        _files.write(path, table.to_csv(index=False, float_format=precision, lineterminator="\n").encode())
        return
    buffer = io.BytesIO()
    try:
        table.to_parquet(buffer, index=False)
    except ImportError as error:
        msg = f"{path} needs a writer of Parquet files: pip install zoo-ensemble[parquet], or write a .csv"
        raise ValueError(msg) from error
    _files.write(path, buffer.getvalue())


def export(
    name: str,
    place: Path,
    /,
    *,
    with_windows: bool = False,
    each: bool = False,
    precision: FilePrecision = "float32",
    most_changed: float = 0.01,
    use: str = "",
    licence: str = "",
    corpus: Corpus = None,
    mapped: Mapped = None,
    classes: Classes = (),
    valid: str = "valid",
    test: str = "test",
    registry: RegistryFile = None,
) -> Answer:
    """Write an ensemble as one ONNX file, which runs without this package, or as a folder for the hub.

    Before an ONNX file appears, onnxruntime runs it on the validation frames, and it is compared with the ensemble; a
    JSON file beside it, `FILE.json`, says what a consumer has to know. A folder holds the members, such a file, and
    a model card with the results on the test partition. Needs the extra `ship`.

    Example: ensemble export final final.onnx --with-windows; ensemble export final final-folder

    Args:
        name: an ensemble in the registry; for a file also a model.
        place: a file that ends in .onnx, which replaces an existing one; otherwise a new or empty folder.
        with_windows: the file takes the raw features of a recording instead of normalised windows.
        each: the file gives every member's probabilities too.
        most_changed: refuse a file that gives more than this fraction of the frames another class.
        use: for the card of a folder: what the model is meant for, and what not.
        licence: under which licence it may be used, such as Apache-2.0; kept in the registry.
        valid: partition on which the file is compared with the ensemble.
        test: partition whose results stand in the card of a folder.
    """
    home, one_file = zoo.Registry(registry), place.suffix == ".onnx"
    if one_file and (use or licence):
        raise ValueError(f"expected --use and --licence with a folder, whose card holds them, got the file {place}")
    if not one_file and (with_windows or each or precision != "float32"):
        raise ValueError(f"expected --with-windows, --each and --precision with a file .onnx, got the folder {place}")
    if one_file:
        require_writable(place)
        final = loaded(home, name)
        frames = read_partition(corpus, valid, class_names(classes) or final.members.classes, mapped=mapped)
        with progress(f"writing {place}, and comparing it on {len(frames):,} frames"):
            written = final.to_onnx(
                place,
                with_windows=with_windows,
                each=each,
                precision=precision,
                frames=frames,
                most_changed=most_changed,
            )
        return exported(name, written)
    final = ensemble.load_ensemble(home, name)
    known = class_names(classes) or final.members.classes
    frames, judged = (read_partition(corpus, part, known, mapped=mapped) for part in (valid, test))
    with progress("judging the ensemble for its card"):
        best = ensemble.judge.best_member(ensemble.collect(final.members, frames))
        report = ensemble.evaluate(ensemble.collect(final.members, judged), {name: final.rule}, baseline=best)
    with progress(f"writing {place}"), home.transaction():  # a folder that fails leaves the registry as it was
        if licence:
            home.annotate(name, licence=licence)
        ensemble.run.export_folder(home, name, place, report=report, use=use, frames=frames)
    return Answer({"exported": name, "folder": str(place), "report": report.to_json()}, [f"{name} written to {place}"])


def loaded(home: zoo.Registry, name: str, **options: Any) -> ensemble.Ensemble:
    """A saved ensemble; a model is an ensemble of one."""
    try:
        return ensemble.load_ensemble(home, name, **options)
    except zoo.RegistryError as error:
        if error.reason != "UNKNOWN":
            raise
        return ensemble.Ensemble(ensemble.load(home, name, **options), ensemble.mean)


def collect(folder: Path, /, *, source: Source = Source()) -> Answer:
    """Store the members' outputs on both partitions, to judge them later without any model.

    An interrupted run is continued where it stopped.

    Example: ensemble collect outputs --corpus my-corpus --valid dev --test test; ensemble evaluate --outputs outputs

    Args:
        folder: folder for the outputs; each partition becomes a folder in it and replaces an earlier one of that name.
    """
    from ensemble.outputs.store import StoreError, remove_outputs, write_outputs

    source.refuse("sample", where="for `collect`, which stores the outputs on all frames")
    source.refuse("run", where="for `collect`, which goes on by itself from the shards that it has")
    require_folders(folder)
    collection, partitions = Collection(source), (source.valid, source.test)
    for partition in partitions:
        place = folder / partition
        if source.cache is not None or source.stored:
            outputs = collection.outputs(partition)
            write_outputs(place, outputs)
            continue
        try:
            outputs = collection.outputs(partition, cache=place)
        except StoreError:  # it holds outputs of something else
            remove_outputs(place)
            outputs = collection.outputs(partition, cache=place)
    members = list(outputs.members)
    data = {"folder": str(folder), "partitions": [*partitions], "members": members}
    line = f"outputs of {len(members)} members on {source.valid!r} and {source.test!r} stored in {folder}"
    return Answer(data, [line])


def plan(*, source: Source = Source(), frames: int = 65_536) -> Answer:
    """Measure how each group of equal members runs fastest on this machine, and explain the choice.

    Example: ensemble plan --members "cyl*" --precision auto

    Args:
        frames: largest number of frames of the test partition to measure on.
    """
    unused = ("outputs", "predictions", "cache", "sample", "jobs", "ray", "run")
    source.refuse(*unused, where="for `plan`, which measures the members in this process")
    if frames < 1:
        raise ValueError(f"expected --frames of 1 or more, got {frames}")
    collection = Collection(source)
    members, whole = collection.members, read_partition(source.corpus, source.test, mapped=source.mapped)
    recordings = int((whole.starts[1:] <= max(frames, int(whole.starts[1]))).sum())
    with progress("measuring"):
        for _ in ensemble.run.predictions(members, whole.select(whole.starts.new_tensor(range(recordings)))):
            pass
    rows = [dict(row) for row in members.plan()]
    return Answer(rows, [Table(rows, title="plan", formats={"x loop": ".2f", "moved": ".1e", "changed": ".4f"})])
