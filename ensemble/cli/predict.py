"""Commands that run members: predict, export, collect, plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ensemble
import zoo
from ensemble.cli.evaluate import weights_in
from ensemble.cli.options import Collection, Source, applied, named_rules, recordings, require_rules, rule_names
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
    require_writable,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    _Found = tuple[NDArray[np.float32], tuple[str, ...], dict[str, NDArray[Any]], dict[str, Any]]


def predict(
    name: str,
    /,
    *,
    output: Path,
    source: Source = Source(),
    form: Literal["frames", "submission", "probabilities"] | None = None,
) -> Answer:
    """Write the predicted class of every frame, or all probabilities, to a CSV file.

    A rule with numbers is fitted on the validation partition, and applied to the members' outputs on the other.

    Example: ensemble predict final --corpus my-corpus --test test --output submission.csv --form submission

    Args:
        name: an ensemble or a model in the registry, or a rule; with --outputs or --predictions also a member.
        output: the CSV file; it appears when it is complete, and replaces an existing one.
        form: "frames", the default, writes recording, frame, label, probability; "submission", the default for
            --predictions, writes id, label as in HW1P2; "probabilities" has a column for each class in place of the
            label. Predictions keep their ids in every form, and the names of both columns.
    """
    import numpy as np
    import pandas as pd

    require_writable(output)
    collection = Collection(source)
    probabilities, classes, places, line = (_combined if source.stored else _run)(collection, name)
    form = form or ("submission" if source.predictions else "frames")
    ids, label = {"id": np.arange(len(probabilities))}, "label"
    if source.predictions:
        known = collection.predictions(source.test)
        ids, label = {known.id_column: np.array(known.ids)}, known.label_column
        places = ids
    if form == "probabilities":
        columns = places | dict(zip(classes, probabilities.T, strict=True))
    else:
        columns = (ids if form == "submission" else places) | {label: np.array(classes)[probabilities.argmax(axis=1)]}
    if form == "frames":
        columns["probability"] = probabilities.max(axis=1)
    precision = "%.9g" if form == "probabilities" else "%.6f"
    _files.write(
        output, pd.DataFrame(columns).to_csv(index=False, float_format=precision, lineterminator="\n").encode()
    )
    data: dict[str, Any] = {"name": name, "output": str(output), "frames": len(probabilities), "form": form} | line
    recordings = f" of {data['recordings']:,} recordings" if "recordings" in data else ""
    weights = ", ".join(f"{member} {weight:.3f}" for member, weight in data.get("weights", {}).items() if weight > 0)
    shown = [f"{len(probabilities):,} frames{recordings} written to {output}"]
    return Answer(data, [*([f"weights: {weights}"] if weights else []), *shown])


def _run(collection: Collection, name: str) -> _Found:
    """By the models of a registry over a corpus: (N, C), the classes, where each frame is, and what else is known."""
    import numpy as np

    source, home = collection.source, collection.registry
    if name in rule_names():
        fitted = name in ensemble.fit.FITTERS
        rule = named_rules([name], collection.outputs(source.valid))[name] if fitted else ensemble.get_rule(name)
        final = ensemble.Ensemble(collection.members, rule)
    else:
        final = _loaded(home, name, device=source.device, precision=source.precision)
    classes = class_names(source.classes) or final.members.classes
    frames = read_partition(source.corpus, source.test, classes, mapped=source.mapped)
    with progress(f"predicting {len(frames):,} frames"):
        probabilities = final.predict_proba(frames)
    groups = frames.groups.numpy()
    places = {
        "recording": np.array(frames.names)[groups],
        "frame": np.arange(len(frames)) - frames.starts.numpy()[groups],
    }
    return probabilities, final.members.classes, places, {"recordings": frames.recordings}


def _combined(collection: Collection, name: str) -> _Found:
    """The same out of outputs or predictions that are read."""
    import numpy as np

    source = collection.source
    outputs = collection.outputs(source.test, labelled=False)
    saved = collection.saved_rules([name], outputs)
    require_rules([name], [*outputs.members, *saved])
    more: dict[str, Any] = {}
    if name in outputs.members:
        probabilities = outputs.subset([name]).probabilities[0]
    else:
        fitted = name in ensemble.fit.FITTERS
        if fitted and collection.one_set:
            msg = f"expected predictions of {source.test!r} beside those of {source.valid!r}, got one set of files"
            raise ValueError(f"{msg}; {name!r} is fitted on one and applied to the other")
        rules = saved or named_rules([name], collection.outputs(source.valid) if fitted else outputs)
        if weights := weights_in(rules, collection.outputs(source.valid) if fitted else outputs):
            more = {"weights": weights}
        probabilities = applied(rules[name], outputs)
        more["fitted_on"] = ensemble.rules.declared(rules[name]).fingerprint
    groups = recordings(outputs)
    _, starts, number = np.unique(groups, return_index=True, return_inverse=True)
    places = {"recording": groups, "frame": np.arange(len(groups)) - starts[number]}
    return probabilities.numpy(), outputs.classes, places, more


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
        final = _loaded(home, name)
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
    if licence:
        home.annotate(name, licence=licence)
    final = ensemble.load_ensemble(home, name)
    known = class_names(classes) or final.members.classes
    frames, judged = (read_partition(corpus, part, known, mapped=mapped) for part in (valid, test))
    with progress("judging the ensemble for its card"):
        best = ensemble.judge.best_member(ensemble.collect(final.members, frames))
        report = ensemble.evaluate(ensemble.collect(final.members, judged), {name: final.rule}, baseline=best)
    with progress(f"writing {place}"):
        ensemble.run.export_folder(home, name, place, report=report, use=use, frames=frames)
    return Answer({"exported": name, "folder": str(place), "report": report.to_json()}, [f"{name} written to {place}"])


def _loaded(home: zoo.Registry, name: str, **options: Any) -> ensemble.Ensemble:
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
    collection = Collection(source)
    members, whole = collection.members, read_partition(source.corpus, source.test, mapped=source.mapped)
    recordings = int((whole.starts[1:] <= max(frames, int(whole.starts[1]))).sum())
    with progress("measuring"):
        for _ in ensemble.run.predictions(members, whole.select(whole.starts.new_tensor(range(recordings)))):
            pass
    rows = [dict(row) for row in members.plan()]
    return Answer(rows, [Table(rows, title="plan", formats={"x loop": ".2f", "moved": ".1e", "changed": ".4f"})])
