"""Commands that run members: predict, collect, plan."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App

import zoo
from ensemble.cli.saving import require_place
from ensemble.cli.sources import Source, chosen_device, frames_of
from zoo import _console, _files

if TYPE_CHECKING:
    from ensemble.run.combined import Ensemble


def add_to(app: App) -> None:
    """Add these commands to `app`."""
    app.command(predict)
    app.command(collect)
    app.command(plan)


def predict(
    name: str,
    *,
    output: Path,
    corpus: Path | None = None,
    partition: str = "test",
    form: Literal["frames", "submission"] = "frames",
    registry: Path | None = None,
    device: str = "auto",
) -> None:
    """Write the predicted phoneme of every frame as CSV.

    Example: ensemble predict final --corpus my-corpus --partition test --output submission.csv --form submission

    Args:
        name: an ensemble or a model in the registry.
        output: the CSV file; it appears when it is complete, and an existing one is replaced.
        corpus: folder in the HW1P2 layout; the bundled synthesised speech if left out.
        partition: the part of the corpus to predict; it needs no transcripts.
        form: "frames" writes recording, frame, label, probability; "submission" the course's id, label.
        registry: the registry's file; else $ZOO_REGISTRY, else registry.json in this folder.
        device: cpu, cuda, or auto for cuda where there is one.
    """
    require_place(output)
    frames = frames_of(corpus, partition)
    final = _voice(zoo.Registry(registry), name, chosen_device(device))
    probabilities = final.predict_proba(frames)
    best = probabilities.argmax(axis=1)
    labels = [final.classes_[index] for index in best]
    if form == "submission":
        rows: Iterable[tuple[object, ...]] = [("id", "label"), *enumerate(labels)]
    else:
        rows = _located(frames, labels, probabilities.max(axis=1))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    _files.write(output, table.getvalue().encode())
    print(f"{len(labels):,} frames of {frames.recordings:,} recordings written to {output}")


def collect(
    folder: Path,
    source: Source = Source(),  # noqa: B008 - frozen
) -> None:
    """Write the members' outputs on both partitions, to judge them later without any model.

    A run that was killed goes on where it was, and members whose outputs are there are not run again.

    Example: ensemble collect outputs --corpus my-corpus --valid dev --test test; ensemble evaluate --outputs outputs

    Args:
        folder: made if need be; each partition becomes a folder in it, in place of outputs on other frames.
    """
    from ensemble.outputs.store import StoreError, remove_outputs, write_outputs

    partitions = (source.valid, source.test)
    if source.outputs is None and source.cache is None:
        source = replace(source, cache=folder)
        try:
            spoken = source.spoken(*partitions)
        except StoreError:  # outputs of something else
            for partition in partitions:
                remove_outputs(folder / partition)
            spoken = source.spoken(*partitions)
    else:
        spoken = source.spoken(*partitions)
        for partition, one in zip(partitions, spoken, strict=True):
            write_outputs(folder / partition, one.outputs)
    print(f"{len(spoken[0].references)} members over {source.valid!r} and {source.test!r} kept in {folder}")


def plan(source: Source = Source(), *, frames: int = 65_536) -> None:  # noqa: B008 - frozen
    """Measure how each group of equal members runs fastest on this machine, and say why.

    Example: ensemble plan --members "cyl*" --precision auto

    Args:
        frames: how many frames of the test partition to measure on, at most.
    """
    from ensemble.run.collecting import predictions

    members, whole = source.load(), source.frames(source.test)
    recordings = int((whole.starts[1:] <= max(frames, int(whole.starts[1]))).sum())
    for _ in predictions(members, whole.select(whole.starts.new_tensor(range(recordings)))):
        pass
    formats = {"x loop": ".2f", "moved": ".1e", "changed": ".4f"}
    _console.print_table(members.plan(), title="plan", formats=formats)


def _voice(registry: zoo.Registry, name: str, device: str) -> Ensemble:
    """An ensemble, or a model as an ensemble of one."""
    from ensemble.rules.pooling import mean
    from ensemble.run.combined import Ensemble, load_ensemble
    from ensemble.run.loading import load

    try:
        return load_ensemble(registry, name, device=device)
    except zoo.RegistryError as error:
        if error.reason != "UNKNOWN":
            raise
    return Ensemble(load(registry, name, device=device), mean)


def _located(frames: zoo.FrameSet, labels: list[str], certainty: Iterable[float]) -> Iterator[tuple[object, ...]]:
    """Rows that say where each label stands: the recording's name, and the frame within it from 0."""
    yield ("recording", "frame", "label", "probability")
    inside = (index - int(frames.starts[group]) for index, group in enumerate(frames.groups.tolist()))
    for group, frame, label, probability in zip(frames.groups.tolist(), inside, labels, certainty, strict=True):
        yield (frames.names[group], frame, label, f"{probability:.6f}")
