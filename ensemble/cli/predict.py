"""Commands that run members: predict, collect, plan."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import ensemble
import zoo
from ensemble.cli.options import NO_SOURCE, Collection, Precision, Source, require_writable
from zoo import _files
from zoo._console import Answer, Table, progress
from zoo.cli.options import Corpus, Device, RegistryFile, read_partition


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
    require_writable(output)
    frames = read_partition(corpus, test)
    final = _ensemble(zoo.Registry(registry), name, device, precision)
    with progress(f"predicting {len(frames):,} frames"):
        probabilities = final.predict_proba(frames)
    labels = [final.classes_[index] for index in probabilities.argmax(axis=1)]
    if form == "submission":
        rows: Iterable[tuple[object, ...]] = [("id", "label"), *enumerate(labels)]
    else:
        rows = _located(frames, labels, probabilities.max(axis=1))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _files.write(output, text.getvalue().encode())
    data = {"name": name, "output": str(output), "frames": len(labels), "recordings": frames.recordings}
    return Answer(data, [f"{len(labels):,} frames of {frames.recordings:,} recordings written to {output}"])


def collect(folder: Path, /, *, source: Source = NO_SOURCE) -> Answer:
    """Store the members' outputs on both partitions, to judge them later without any model.

    An interrupted run is continued where it stopped.

    Example: ensemble collect outputs --corpus my-corpus --valid dev --test test; ensemble evaluate --outputs outputs

    Args:
        folder: folder for the outputs; each partition becomes a folder in it and replaces an earlier one of that name.
    """
    collection, partitions = Collection(source), (source.valid, source.test)
    for partition in partitions:
        outputs = _stored(collection, partition, folder / partition)
    members = list(outputs.members)
    return Answer(
        {"folder": str(folder), "partitions": [*partitions], "members": members},
        [f"outputs of {len(members)} members on {source.valid!r} and {source.test!r} stored in {folder}"],
    )


def plan(*, source: Source = NO_SOURCE, frames: int = 65_536) -> Answer:
    """Measure how each group of equal members runs fastest on this machine, and explain the choice.

    Example: ensemble plan --members "cyl*" --precision auto

    Args:
        frames: largest number of frames of the test partition to measure on.
    """
    collection = Collection(source)
    members, whole = collection.members, collection.frames(source.test)
    recordings = int((whole.starts[1:] <= max(frames, int(whole.starts[1]))).sum())
    with progress("measuring"):
        for _ in ensemble.run.predictions(members, whole.select(whole.starts.new_tensor(range(recordings)))):
            pass
    rows = [dict(row) for row in members.plan()]
    return Answer(rows, [Table(rows, title="plan", formats={"x loop": ".2f", "moved": ".1e", "changed": ".4f"})])


def _stored(collection: Collection, partition: str, folder: Path) -> ensemble.MemberOutputs:
    """A partition's outputs in a folder that now holds these and no others."""
    from ensemble.outputs.store import StoreError, remove_outputs, write_outputs

    if collection.source.cache is None and collection.source.outputs is None:
        try:
            return collection.timed_outputs(partition, cache=folder)[0]
        except StoreError:  # it holds outputs of something else
            remove_outputs(folder)
            return collection.timed_outputs(partition, cache=folder)[0]
    outputs = collection.outputs(partition)
    write_outputs(folder, outputs)
    return outputs


def _ensemble(registry: zoo.Registry, name: str, device: str, precision: Precision) -> ensemble.Ensemble:
    """An ensemble, or a model as an ensemble of one."""
    try:
        return ensemble.load_ensemble(registry, name, device=device, precision=precision)
    except zoo.RegistryError as error:
        if error.reason != "UNKNOWN":
            raise
    return ensemble.Ensemble(ensemble.load(registry, name, device=device, precision=precision), ensemble.mean)


def _located(frames: zoo.FrameSet, labels: list[str], certainty: Iterable[float]) -> Iterator[tuple[object, ...]]:
    """One row for each frame: its recording, its number in the recording from 0, its label and probability."""
    yield ("recording", "frame", "label", "probability")
    inside = (index - int(frames.starts[group]) for index, group in enumerate(frames.groups.tolist()))
    for group, frame, label, probability in zip(frames.groups.tolist(), inside, labels, certainty, strict=True):
        yield (frames.names[group], frame, label, f"{probability:.6f}")
