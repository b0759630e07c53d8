"""Models and ensembles as plain folders, and on the Hugging Face hub.

A model's folder has the files that users of the hub know: `config.json`, `model.safetensors` and a model card
`README.md`. An ensemble's has its own `config.json` and card, and such a folder for every member. Only `push`, `pull`,
and `from_pretrained` with the name of a repository use the network; they need the extra `hub`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, ModuleType
from typing import Any
from uuid import uuid4

from torch import nn

from zoo import _files
from zoo._json import TextError, parse_strictly
from zoo._names import checked
from zoo.checkpoint import Checkpoint, decode, foreign, pack
from zoo.checkpoint.header import CheckpointError, read_header
from zoo.models.spec import Spec
from zoo.registry import Registry
from zoo.registry.load import tensors
from zoo.registry.transaction import disk_errors
from zoo.registry.types import EnsembleEntry, Entry, RegistryError

_REPOSITORY = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
_CONFIG, _WEIGHTS, _CARD, _MEMBERS = "config.json", "model.safetensors", "README.md", "members"


@checked
def export(
    registry: Registry,
    reference: str,
    folder: str | Path,
    *,
    card: str = "",
    more: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write a version or an ensemble as a folder, whole or not at all; the folder must be empty or not exist.

    Args:
        registry: where it is.
        reference: a version or an ensemble.
        folder: a new or empty folder.
        card: Markdown to add to the model card, such as results and the intended use.
        more: further files by name, such as an ONNX file.

    Raises:
        RegistryError: the reference is unknown, a blob is damaged, the folder is in use, or it cannot be written.
    """
    place = Path(folder).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RegistryError("ARGUMENT", f"expected a new or empty folder, got {folder}")
    if place.exists() and place.samefile(Path.cwd()):  # it is replaced, so our working folder would no longer exist
        raise RegistryError("ARGUMENT", f"expected a new folder other than the working folder, got {folder}")
    staging = place.with_name(f".{place.name}.{uuid4().hex}{_files.TEMPORARY}")
    with ExitStack() as stack, disk_errors(f"cannot write {folder}"):
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        _files.make_folders(staging)
        _export(registry, reference, staging, card)
        for name, data in more.items():
            _files.write(staging / name, data)
        if place.exists():
            place.rmdir()
        _files.system.rename(staging, place)
        _files.sync_folder(place.parent)
    return Path(folder)


def import_folder(registry: Registry, folder: str | Path, *, name: str | None = None) -> Entry | EnsembleEntry:
    """Register the model or ensemble in a folder that has the files of `export`, by default under its exported name.

    The members of an ensemble keep their names. A model that is registered already is not written again.

    Raises:
        RegistryError: there is no such folder, or its config is of another kind.
        CheckpointError: the weights are malformed or do not fit the config.
    """
    folder = Path(folder)
    config = _config(folder)
    name = name or str(config.get("name") or folder.name)
    if "members" not in config:
        return registry.register(name, _model(folder, config))
    for member in config["members"]:
        if not isinstance(member, str) or Path(member).name != member or not (folder / _MEMBERS / member).is_dir():
            raise RegistryError("ARGUMENT", f"expected folders inside {folder / _MEMBERS}, got {str(member)[:80]!r}")
    with registry.transaction():
        members = [import_folder(registry, folder / _MEMBERS / member) for member in config["members"]]
        ids = [member.id for member in members if isinstance(member, Entry)]
        registry.register_ensemble(name, {**config["ensemble"], "members": ids})
    return registry.get_ensemble(name)


def from_pretrained(source: str | Path, *, device: str = "cpu") -> nn.Module:
    """The model in a folder, in eval mode; what is not a folder is downloaded from the hub.

    Raises:
        RegistryError: there is neither a folder nor a repository of that name, or it holds an ensemble.
        CheckpointError: the weights are malformed or do not fit the config.
    """
    if not Path(source).is_dir():
        with TemporaryDirectory() as temporary:
            return from_pretrained(_downloaded(str(source), temporary), device=device)
    config = _config(Path(source))
    if "members" in config:
        raise RegistryError("ARGUMENT", f"{source} holds an ensemble; use ensemble.from_pretrained")
    return _model(Path(source), config).to_module(device)


@checked
def push(registry: Registry, reference: str, repository: str, *, private: bool = True) -> str:
    """Upload a version or an ensemble to the hub and return the address of the commit.

    Raises:
        ImportError: the extra `hub` is not installed. Otherwise as `export`.
    """
    api = _hub().HfApi()
    with TemporaryDirectory() as temporary:
        folder = export(registry, reference, Path(temporary) / "export")
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {reference}"))


def pull(
    registry: Registry, repository: str, *, name: str | None = None, revision: str | None = None
) -> Entry | EnsembleEntry:
    """Download a model or an ensemble from the hub and register it; nothing that is downloaded is run.

    Raises:
        ImportError: the extra `hub` is not installed.
        RegistryError: UNKNOWN where it cannot be downloaded. Otherwise as `import_folder`.
    """
    with TemporaryDirectory() as temporary:
        return import_folder(registry, _downloaded(repository, temporary, revision), name=name)


def _hub() -> ModuleType:
    """The hub's client, an optional package."""
    try:
        import huggingface_hub
    except ImportError as error:
        msg = "expected the package huggingface_hub to reach the hub; install zoo-ensemble[hub]"
        raise ImportError(msg) from error
    return huggingface_hub  # type: ignore[no-any-return, unused-ignore]  # untyped where it is not installed


def _downloaded(repository: str, folder: str, revision: str | None = None) -> Path:
    if not _REPOSITORY.fullmatch(repository):
        raise RegistryError("UNKNOWN", f"expected an existing folder, or OWNER/NAME on the hub, got {repository!r}")
    hub, wanted = _hub(), [f"**{name}" for name in (_CONFIG, _WEIGHTS, _CARD)]
    try:
        return Path(hub.snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # every error of the hub's client is one of these
        reason = " ".join(str(error).split())
        message = f"{repository!r} is not a folder here, and was not downloaded from the hub: {reason}"
        raise RegistryError("UNKNOWN", message) from error


def _export(registry: Registry, reference: str, folder: Path, card: str) -> None:
    now = registry.snapshot()
    entry = now.find(reference)
    if isinstance(entry, Entry):
        _export_model(registry, entry, folder, card)
        return
    members = {f"{index:03}-{member.name}": member for index, member in enumerate(map(now.get, entry.members))}
    for name, member in members.items():
        _files.make_folders(folder / _MEMBERS / name)
        _export_model(registry, member, folder / _MEMBERS / name)
    about = {key: value for key, value in entry.to_json().items() if key not in ("name", "members", "created")}
    config = {"model_type": "zoo-ensemble", "name": entry.name, "members": [*members], "ensemble": about}
    _write(folder, config, "ensemble", _ensemble_card(entry, members.values()) + card, entry.licence)


def _export_model(registry: Registry, entry: Entry, folder: Path, card: str = "") -> None:
    data = registry.blobs.read(entry)
    found = tensors(entry, data)  # refuses a blob that differs from what was registered
    metadata = {**read_header(data).metadata, "format": "pt"}  # without which other tools do not open it
    _files.write(folder / _WEIGHTS, pack(found, metadata))
    config = {
        "model_type": "zoo",
        "name": entry.name,
        "architectures": [entry.architecture],
        "spec": entry.spec_data,
        "id2label": {str(index): name for index, name in enumerate(entry.classes)},
        "label2id": {name: index for index, name in enumerate(entry.classes)},
        "about": {key: value for key, value in entry.to_json().items() if key not in ("spec", "classes", "blob")},
    }
    _write(folder, config, entry.architecture, _card(entry) + card, entry.licence)


def _write(folder: Path, config: Mapping[str, Any], tag: str, card: str, licence: str) -> None:
    """The config, and the card below the lines that the hub reads."""
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    known = f"license: {json.dumps(licence.lower())}\n" if licence else ""  # the hub's own identifiers, such as "mit"
    head = f"---\nlibrary_name: zoo-ensemble\n{known}tags: [frame-classification, {tag}]\n---\n# {config['name']}\n\n"
    card += f"\n**Licence.** {licence or 'Not stated.'}\n"
    _files.write(folder / _CONFIG, text.encode())
    _files.write(folder / _CARD, (head + card).encode())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = parse_strictly(_read(path).decode("utf-8"))
    except (TextError, UnicodeDecodeError) as error:
        raise RegistryError("ARGUMENT", f"{path} is {error}") from error
    kinds = {"members": list, "ensemble": dict} if isinstance(config, dict) and "members" in config else {"spec": dict}
    if not isinstance(config, dict) or not all(isinstance(config.get(key), kind) for key, kind in kinds.items()):
        raise RegistryError("ARGUMENT", f"expected the config of a zoo model or ensemble in {path}, got another")
    return config


def _model(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a folder; weights without our metadata are checked against the config."""
    data = _read(folder / _WEIGHTS)
    try:
        spec = Spec.from_dict(config["spec"])
        classes = [str(config["id2label"][str(index)]) for index in range(spec.classes)]
    except (ValueError, TypeError, LookupError) as error:
        raise RegistryError("ARGUMENT", f"cannot use the spec and classes of {folder / _CONFIG}: {error}") from error
    if "zoo" not in read_header(data).metadata:
        return foreign(data, spec, classes)
    found = decode(data)
    if found.spec != spec or list(found.classes) != classes:
        raise CheckpointError(
            "SPEC", f"the spec or the classes in {folder / _WEIGHTS} and in {_CONFIG} beside it differ"
        )
    return found


def _read(path: Path) -> bytearray:
    with disk_errors(f"expected a folder with {_CONFIG} and {_WEIGHTS}"):
        return _files.read(path)


def _card(entry: Entry) -> str:
    spec, table = entry.spec_data, "None were recorded."
    options = ", ".join(f"{key} {value}" for key, value in spec["options"].items())
    if entry.metrics:
        table = "| metric | value |\n|---|---|"
        for name, metric in entry.metrics.items():
            table += f"\n| {name} | {metric['value']:.4g} {metric.get('unit', '')}".rstrip() + " |"
    return f"""\
A classifier of single frames: `{entry.architecture}` with {entry.parameters:,} parameters ({options}).

**Input.** {spec["features"]} features per frame, the frame with {spec["context"]} neighbours on each side \
({(2 * spec["context"] + 1) * spec["features"]} values), normalised by `{spec["normalisation"]}`, zeros beyond the \
ends of each {spec["padding"]}.

**Output.** Logits of {len(entry.classes)} classes: {", ".join(entry.classes)}.

**Metrics.**

{table}

**Origin.** {entry.kind}, version {entry.number}, id `{entry.id}`, {entry.created}. {entry.note}

```python
import zoo

model = zoo.from_pretrained("this folder")
```
"""


def _ensemble_card(entry: EnsembleEntry, members: Collection[Entry]) -> str:
    rows = "\n".join(f"| {member.reference} | {member.architecture} | {member.parameters:,} |" for member in members)
    return f"""\
{len(members)} models combined by one rule, {sum(member.parameters for member in members):,} parameters.

| member | architecture | parameters |
|---|---|---|
{rows}

**Rule.** `{json.dumps(entry.rule)}`. {entry.note}

`zoo import` registers the members and the ensemble; `ensemble.load_ensemble` then loads it.
"""
