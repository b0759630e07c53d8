"""Commands that run members: predict, export, collect, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import ensemble
import zoo
from ensemble.cli.options import Collection, Precision, Source
from zoo import _files
from zoo._console import Answer, Table, progress
from zoo.cli.entries import exported
from zoo.cli.options import (
    Classes,
    Corpus,
    Device,
    FilePrecision,
    RegistryFile,
    class_names,
    read_partition,
    require_writable,
)


def predict(
    name: str,
    /,
    *,
    output: Path,
    corpus: Corpus = None,
    test: str = "test",
    form: Literal["frames", "submission"] = "frames",
    registry: RegistryFile = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> Answer:
    """Write the predicted phoneme of every frame to a CSV file.

    Example: ensemble predict final --corpus my-corpus --test test --output submission.csv --form submission

    Args:
        name: an ensemble or a model in the registry.
        output: the CSV file; it appears when it is complete, and replaces an existing one.
        test: partition to predict; it needs no transcripts.
        form: "frames" writes recording, frame, label, probability; "submission" writes id, label as in HW1P2.
    """
    import numpy as np
    import pandas as pd

    require_writable(output)
    frames, home = read_partition(corpus, test), zoo.Registry(registry)
    final = _loaded(home, name, device=device, precision=precision)
    with progress(f"predicting {len(frames):,} frames"):
        probabilities = final.predict_proba(frames)
    table = pd.DataFrame({"label": np.asarray(final.classes_)[probabilities.argmax(axis=1)]})
    if form == "frames":
        groups = frames.groups.numpy()
        table.insert(0, "recording", np.asarray(frames.names)[groups])
        table.insert(1, "frame", np.arange(len(frames)) - frames.starts.numpy()[groups])
        table["probability"] = probabilities.max(axis=1)
    text = table.to_csv(index=form == "submission", index_label="id", float_format="%.6f", lineterminator="\n")
    _files.write(output, text.encode())
    data = {"name": name, "output": str(output), "frames": len(frames), "recordings": frames.recordings}
    return Answer(data, [f"{len(frames):,} frames of {frames.recordings:,} recordings written to {output}"])


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
    corpus: Corpus = None,
    classes: Classes = (),
    valid: str = "valid",
    test: str = "test",
    registry: RegistryFile = None,
) -> Answer:
    """Write an ensemble as one ONNX file, which runs without this package, or as a folder for the hub.

    Before an ONNX file appears, onnxruntime runs it on the validation frames, and it is compared with the ensemble; a
    JSON file of the same name beside it says what a consumer has to know. A folder holds the members, such a file, and
    a model card with the results on the test partition. Needs the extra `ship`.

    Example: ensemble export final final.onnx --with-windows; ensemble export final final-folder

    Args:
        name: an ensemble in the registry; for a file also a model.
        place: a file that ends in .onnx, which replaces an existing one; otherwise a new or empty folder.
        with_windows: the file takes the raw features of a recording instead of normalised windows.
        each: the file gives every member's probabilities too.
        most_changed: refuse a file that gives more than this fraction of the frames another class.
        use: for the card of a folder: what the model is meant for, and what not.
        valid: partition on which the file is compared with the ensemble.
        test: partition whose results stand in the card of a folder.
    """
    home = zoo.Registry(registry)
    if place.suffix == ".onnx":
        require_writable(place)
        final = _loaded(home, name)
        frames = read_partition(corpus, valid, class_names(classes) or final.members.classes)
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
    frames, judged = (read_partition(corpus, part, known) for part in (valid, test))
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
        if source.cache is not None or source.outputs is not None:
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
    members, whole = collection.members, read_partition(source.corpus, source.test)
    recordings = int((whole.starts[1:] <= max(frames, int(whole.starts[1]))).sum())
    with progress("measuring"):
        for _ in ensemble.run.predictions(members, whole.select(whole.starts.new_tensor(range(recordings)))):
            pass
    rows = [dict(row) for row in members.plan()]
    return Answer(rows, [Table(rows, title="plan", formats={"x loop": ".2f", "moved": ".1e", "changed": ".4f"})])
