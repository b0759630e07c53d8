"""A model or an ensemble as a plain folder, in and out; the hub.

A model's folder is what users of Hugging Face know: `config.json`, `model.safetensors` and a model card
`README.md`. An ensemble's has its own `config.json` and card, and such a folder for every member. Only `push`
and `pull`, and `from_pretrained` on a name that is no folder, use the network, with the extra `hub`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from uuid import uuid4

from torch import nn

from zoo import _files
from zoo._json import TextError, parse_strictly
from zoo.checkpoint import Checkpoint, decode, foreign
from zoo.checkpoint.header import CheckpointError, read_header
from zoo.models.spec import Spec
from zoo.registry import Registry
from zoo.registry.load import tensors
from zoo.registry.types import EnsembleEntry, Entry, RegistryError

_REPOSITORY = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
_CONFIG, _WEIGHTS, _CARD, _MEMBERS = "config.json", "model.safetensors", "README.md", "members"


def export(registry: Registry, reference: str, folder: str | Path) -> Path:
    """Write a version or an ensemble as a folder, whole or not at all.

    Args:
        registry: where it is kept.
        reference: of a version, or the name of an ensemble.
        folder: where to; it must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        RegistryError: unknown, damaged, the folder is in use, or the disk refused.
    """
    place = Path(folder).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RegistryError("ARGUMENT", f"expected a new or empty folder, got {folder}")
    if place == Path.cwd():  # it is replaced, and whoever stands in it would stand in a folder that is gone
        raise RegistryError(
            "ARGUMENT", f"expected a folder other than the one you are in, got {folder}; name a new one"
        )
    staging = place.with_name(f".{place.name}.{uuid4().hex}{_files.TEMPORARY}")
    try:
        _files.make_folders(staging)
        _export(registry, reference, staging)
        if place.exists():
            place.rmdir()
        _files.system.rename(staging, place)
        _files.sync_folder(place.parent)
    except OSError as error:
        raise RegistryError("DISK", f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Path(folder)


def import_folder(registry: Registry, folder: str | Path, *, name: str | None = None) -> Entry | EnsembleEntry:
    """Register what a folder holds; a model that is there already is not written twice.

    Args:
        registry: where to keep it.
        folder: made by `export`, or holding the same files.
        name: under which; the exported name if left out. Members of an ensemble keep theirs.

    Raises:
        RegistryError: no such folder, or a config that is not ours.
        CheckpointError: weights that are malformed or do not fit.
    """
    folder = Path(folder)
    config = _config(folder)
    name = name or str(config.get("name") or folder.name)
    if "members" not in config:
        return registry.register(name, _model(folder, config))
    with registry.transaction():
        members = [import_folder(registry, folder / _MEMBERS / place) for place in _places(folder, config["members"])]
        ids = [member.id for member in members if isinstance(member, Entry)]
        registry.register_ensemble(name, {**config["ensemble"], "members": ids})
    return registry.get_ensemble(name)


def from_pretrained(source: str | Path, *, device: str = "cpu") -> nn.Module:
    """The model of a folder in eval mode; a source that is no folder is fetched from the hub.

    Raises:
        RegistryError: neither a folder nor fetched; or a folder of an ensemble.
        CheckpointError: weights that are malformed or do not fit.
    """
    if Path(source).is_dir():
        folder = Path(source)
        config = _config(folder)
        if "members" in config:
            raise RegistryError("ARGUMENT", f"{folder} holds an ensemble; import it into a registry to use it")
        return _model(folder, config).to_module(device)
    with TemporaryDirectory() as temporary:
        return from_pretrained(_fetched(str(source), temporary), device=device)


def push(registry: Registry, reference: str, repository: str, *, private: bool = True) -> str:
    """Upload a version or an ensemble to the hub; the address of the commit.

    Raises:
        ImportError: without the extra `hub`.
        RegistryError: as `export`.
    """
    api = _hub().HfApi()
    with TemporaryDirectory() as temporary:
        folder = export(registry, reference, Path(temporary) / "export")
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {reference}"))


def pull(
    registry: Registry, repository: str, *, name: str | None = None, revision: str | None = None
) -> Entry | EnsembleEntry:
    """Fetch a model or an ensemble from the hub and register it; nothing fetched is ever run.

    Raises:
        ImportError: without the extra `hub`.
        RegistryError: UNKNOWN where the hub does not give it.
        RegistryError, CheckpointError: as `import_folder`.
    """
    with TemporaryDirectory() as temporary:
        return import_folder(registry, _fetched(repository, temporary, revision), name=name)


def _hub() -> ModuleType:
    """The hub's client, which only these functions need."""
    try:
        import huggingface_hub
    except ImportError as error:
        msg = "expected the package huggingface_hub to reach the hub; install zoo-ensemble[hub]"
        raise ImportError(msg) from error
    return huggingface_hub  # type: ignore[no-any-return, unused-ignore]  # untyped where it is not installed


def _fetched(repository: str, folder: str, revision: str | None = None) -> Path:
    if not _REPOSITORY.fullmatch(repository):
        raise RegistryError("UNKNOWN", f"expected a folder that is there, or OWNER/NAME on the hub, got {repository!r}")
    wanted = [f"**{name}" for name in (_CONFIG, _WEIGHTS, _CARD)]
    hub = _hub()
    try:
        return Path(hub.snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # what the hub's client raises is one of these
        message = f"{repository!r} is no folder here, and was not fetched from the hub: {' '.join(str(error).split())}"
        raise RegistryError("UNKNOWN", message) from error


def _export(registry: Registry, reference: str, folder: Path) -> None:
    if reference in registry.list_ensembles() or registry.aliases().get(reference) in registry.list_ensembles():
        _export_ensemble(registry, registry.get_ensemble(reference), folder)
    else:
        _export_model(registry, registry.get(reference), folder)


def _export_model(registry: Registry, entry: Entry, folder: Path) -> None:
    data = registry.blobs.read(entry)
    tensors(entry, data)  # refuses what is not as registered
    _files.write(folder / _WEIGHTS, data)
    labels = {str(index): name for index, name in enumerate(entry.classes)}
    config = {
        "model_type": "zoo",
        "name": entry.name,
        "architectures": [entry.architecture],
        "spec": entry.spec_data,
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
        "about": {key: value for key, value in entry.to_json().items() if key not in ("spec", "classes", "blob")},
    }
    _write_json(folder / _CONFIG, config)
    _files.write(folder / _CARD, _card(entry).encode())


def _export_ensemble(registry: Registry, entry: EnsembleEntry, folder: Path) -> None:
    members = [registry.get(member) for member in entry.members]
    places = [f"{index:03}-{member.name}" for index, member in enumerate(members)]
    for place, member in zip(places, members, strict=True):
        _files.make_folders(folder / _MEMBERS / place)
        _export_model(registry, member, folder / _MEMBERS / place)
    about = {key: value for key, value in entry.to_json().items() if key not in ("name", "members", "created")}
    _write_json(
        folder / _CONFIG, {"model_type": "zoo-ensemble", "name": entry.name, "members": places, "ensemble": about}
    )
    _files.write(folder / _CARD, _ensemble_card(entry, members).encode())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = parse_strictly(bytes(_files.read(path)).decode("utf-8"))
    except OSError as error:
        raise RegistryError("DISK", f"expected a folder with {_CONFIG} and {_WEIGHTS}: {error}") from error
    except (TextError, UnicodeDecodeError) as error:
        raise RegistryError("ARGUMENT", f"{path} is {error}") from error
    ensemble = isinstance(config, dict) and isinstance(config.get("members"), list)
    if ensemble and isinstance(config.get("ensemble"), dict):
        return dict(config)
    if not isinstance(config, dict) or not isinstance(config.get("spec"), dict) or "members" in config:
        raise RegistryError("ARGUMENT", f"expected a zoo model's or ensemble's {path}, got another")
    return config


def _places(folder: Path, members: list[Any]) -> list[str]:
    """Names of the members' folders, each directly inside `members`."""
    for place in members:
        if not isinstance(place, str) or Path(place).name != place or not (folder / _MEMBERS / place).is_dir():
            raise RegistryError("ARGUMENT", f"expected folders inside {folder / _MEMBERS}, got {str(place)[:80]!r}")
    return list(members)


def _model(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """The folder's checkpoint; a file that lost our metadata is checked against the config."""
    path = folder / _WEIGHTS
    try:
        data = _files.read(path)
    except OSError as error:
        raise RegistryError("DISK", f"expected weights in {path}: {error}") from error
    try:
        spec = Spec.from_dict(config["spec"])
        labels = config["id2label"]
        classes = [str(labels[str(index)]) for index in range(spec.classes)]
    except (ValueError, TypeError, LookupError) as error:
        raise RegistryError("ARGUMENT", f"cannot use the spec and classes of {folder / _CONFIG}: {error}") from error
    if "zoo" not in read_header(data).metadata:
        return foreign(data, spec, classes)
    found = decode(data)
    if found.spec != spec or list(found.classes) != classes:
        raise CheckpointError("SPEC", f"{path} has another spec or other classes than {_CONFIG} beside it")
    return found


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    _files.write(path, (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _card(entry: Entry) -> str:
    spec = entry.spec_data
    options = ", ".join(f"{key} {value}" for key, value in spec["options"].items())
    return f"""---
library_name: zoo-ensemble
tags: [frame-classification, {entry.architecture}]
---
# {entry.name}

A classifier of single frames: `{entry.architecture}` with {entry.parameters:,} parameters ({options}).

**Input.** {spec["features"]} features per frame, the frame with {spec["context"]} neighbours on each side \
({(2 * spec["context"] + 1) * spec["features"]} values), normalised by `{spec["normalisation"]}`, zeros beyond the \
ends of each {spec["padding"]}.

**Output.** Logits of {len(entry.classes)} classes: {", ".join(entry.classes)}.

**Metrics.**

{_metrics(entry)}

**Origin.** {entry.kind}, version {entry.number}, id `{entry.id}`, {entry.created}. {entry.note}

```python
import zoo

model = zoo.from_pretrained("this folder")
```
"""


def _ensemble_card(entry: EnsembleEntry, members: list[Entry]) -> str:
    rows = "\n".join(f"| {member.reference} | {member.architecture} | {member.parameters:,} |" for member in members)
    return f"""---
library_name: zoo-ensemble
tags: [frame-classification, ensemble]
---
# {entry.name}

{len(members)} models that decide together, {sum(member.parameters for member in members):,} parameters.

| member | architecture | parameters |
|---|---|---|
{rows}

**Rule.** `{json.dumps(entry.rule)}`. {entry.note}

`zoo import` registers the members and the ensemble; `ensemble.load_ensemble` then makes it ready to run.
"""


def _metrics(entry: Entry) -> str:
    rows = [
        f"| {name} | {metric['value']:.4g} {metric.get('unit', '')}".rstrip() + " |"
        for name, metric in entry.metrics.items()
    ]
    return "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "None were recorded."
