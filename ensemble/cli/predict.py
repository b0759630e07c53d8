"""Commands that run members: predict, collect, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import ensemble
import zoo
from ensemble.cli.options import Collection, Precision, Source
from zoo import _files
from zoo._console import Answer, Table, progress
from zoo.cli.options import Corpus, Device, RegistryFile, read_partition, require_writable


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
    try:
        final = ensemble.load_ensemble(home, name, device=device, precision=precision)
    except zoo.RegistryError as error:
        if error.reason != "UNKNOWN":
            raise
        members = ensemble.load(home, name, device=device, precision=precision)  # a model is an ensemble of one
        final = ensemble.Ensemble(members, ensemble.mean)
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
