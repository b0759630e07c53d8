"""An ensemble as a folder for the hub, with an ONNX file and a card that says how good it is; and back."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import zoo
from ensemble.judge.report import Report
from ensemble.rules.pooling import mean
from ensemble.rules.table import rule_from_json
from ensemble.run.combined import Ensemble, load_ensemble
from ensemble.run.folded import export
from ensemble.run.members import load
from zoo._names import checked
from zoo.data.frames import FrameSet


@checked
def export_folder(
    registry: zoo.Registry,
    name: str,
    folder: str | Path,
    *,
    report: Report | None = None,
    use: str = "",
    frames: FrameSet | None = None,
) -> Path:
    """Write a saved ensemble as a folder for the hub: members, `model.onnx` with its JSON file, and a model card.

    Args:
        registry: where it is.
        name: of the ensemble.
        folder: a new or empty folder; whole or not there.
        report: its figures become tables of the card.
        use: what the model is meant for, and what not; a paragraph of the card.
        frames: frames on which the ONNX file is compared with the ensemble.

    Raises:
        ValueError: as `zoo.export` and `Ensemble.to_onnx`.
    """
    entry = registry.snapshot().get_ensemble(name)
    members = load(registry, entry.members)
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.onnx"
        rule = rule_from_json(entry.rule)
        export(
            members, rule, file, with_windows=True, each=False, precision="float32", frames=frames, most_changed=0.01
        )
        more = {path.name: path.read_bytes() for path in (file, Path(f"{file}.json"))}
    return zoo.export(registry, name, folder, card=card(report, use), more=more)


def card(report: Report | None, use: str) -> str:
    """What a model card says beyond the entry of a registry: the intended use, and results with their intervals."""
    parts = [f"\n**Intended use.** {use or 'Not stated by the maker.'}\n"]
    parts += ["\n`model.onnx` takes the raw features of a recording and needs an ONNX runtime only.\n"]
    if report is not None:
        shown = {"name": "model", "accuracy": "accuracy", "log_loss": "log-loss, nats", "parameters": "parameters"}
        rows = [dict(row) | {"gain": ""} for row in report.members.to_dict("records")]
        for row in report.rules.to_dict("records"):
            interval = f"{row['gain']:+.4f} ({row['gain_low']:+.4f} .. {row['gain_high']:+.4f})"
            rows.append(dict(row) | {"name": f"**{row['name']}**", "gain": interval})
        heads = [*shown.values(), f"gain over {report.baseline}, 95 % interval"]
        lines = [heads, ["---"] * len(heads)]
        lines += [[*(_cell(row.get(key)) for key in shown), row["gain"]] for row in rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        groups = f" of {report.recordings:,} recordings" if report.recordings else ""
        parts += [f"\n**Results** on {report.frames:,} frames{groups}.\n\n{table}\n"]
        parts += [f"\n{note}\n" for note in report.notes]
    return "".join(parts)


def _cell(value: Any) -> str:
    """A number in a table: integers whole, others with four digits, nothing where it is unknown."""
    if value is None or value != value:
        return ""
    return str(value) if isinstance(value, str) else f"{value:,.0f}" if value == int(value) else f"{value:.4f}"


def from_pretrained(source: str | Path, **options: Any) -> Ensemble:
    """The ensemble or the model in a folder that was exported, or in a repository of the hub, as a classifier.

    Every file of weights is checked; nothing in the folder is run, and its ONNX file is not read. A model becomes an
    ensemble of one.

    Args:
        source: a folder, or OWNER/NAME on the hub (needs the extra `hub`).
        options: those of `load`.

    Raises:
        ValueError: neither a folder nor a repository, or files that do not fit together.
    """
    with TemporaryDirectory() as temporary:
        registry = zoo.Registry(Path(temporary) / "registry.json")
        folder = Path(source).is_dir()
        entry = zoo.import_folder(registry, source) if folder else zoo.pull(registry, str(source))
        if isinstance(entry, zoo.EnsembleEntry):
            return load_ensemble(registry, entry.name, **options)
        return Ensemble(load(registry, [entry], **options), mean)
