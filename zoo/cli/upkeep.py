"""Commands on a whole registry: verify, sign, load, gc, recover, merge."""

from __future__ import annotations

import os
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from zoo._console import Answer, Table, progress
from zoo.cli.entries import versions
from zoo.cli.options import Classes, Corpus, Device, Mapped, RegistryFile, read_partition

if TYPE_CHECKING:
    from zoo.signature import Signed


def verify(
    *names: str,
    fast: bool = False,
    probe: bool = False,
    metrics: bool = False,
    corpus: Corpus = None,
    mapped: Mapped = None,
    device: Device = "auto",
    classes: Classes = (),
    valid: str = "valid",
    key: Path | None = None,
    place: Path | None = None,
    signature: Path | None = None,
    not_before: datetime | None = None,
    registry: RegistryFile = None,
) -> Answer:
    """Check every blob against the registry; exit code 1 if something is wrong.

    The blob of an unknown architecture is checked, but no model is built from it; --import makes it known. With --key,
    the signature of the registry, or of the folder or file at --place, is checked first.

    Example: zoo verify --probe; zoo verify --key maker.pub --not-before 2026-11-01

    Args:
        names: names or wildcards; everything if left out.
        fast: check sizes and headers only; nothing is hashed.
        probe: also run each model on a fixed batch and compare with its outputs at registration.
        metrics: also evaluate each model again and compare with the metrics recorded on the same frames.
        valid: partition for --metrics.
        key: public key (PEM) of whoever signed; needs the extra `sign`.
        place: a signed folder or file to check in place of the registry.
        signature: file of the signature, where it is not at its usual place.
        not_before: date or time (UTC) before which the signature must not have been made.
    """
    from zoo.registry.load import known

    home = zoo.Registry(registry)
    if key is None and (given := [one for one in (place, signature, not_before) if one is not None]):
        raise ValueError(f"expected --key with --place, --signature or --not-before, got {given[0]} without")
    signed = None if key is None else _vouched(place or home, key, signature, not_before)
    if signed is not None and (place is not None or signed.code):
        return signed
    entries = home.entries(names or "*")
    if names and not entries:  # a typing error must not pass for a clean result
        raise ValueError(f"nothing matches {' '.join(names)} in {home.path}; it has {', '.join(home.list())}")
    problems: list[dict[str, str]] = []
    measured: list[dict[str, Any]] = []
    sound: list[zoo.Entry] = []
    with progress("verifying", total=len(entries)) as advance:
        for entry, problem in home.verified(names or "*", fast=fast, probe=probe):
            advance(note=entry.reference)
            if problem is None:
                sound.append(entry)
            else:
                problems.append({"version": entry.reference, "reason": problem.reason, "message": problem.message})
    foreign = [] if fast else [entry for entry in sound if not known(entry)]
    if metrics:
        built = [entry for entry in sound if entry not in foreign]
        tables = {entry.classes for entry in built}
        own = tables.pop() if len(tables) == 1 else ()
        frames = read_partition(corpus, valid, classes, own, mapped=mapped).to(device)
        with progress("evaluating", total=len(built)) as advance:
            for entry in built:
                measured += home.measure(entry, frames)
                advance(note=entry.reference)
    wrong = [row for row in measured if not row["agrees"]]
    shown: list[Table | str] = [
        Table(measured, formats={"recorded": ".4f", "measured": ".4f"}),
        Table(problems),
        f"{len(entries)} versions checked, {len(problems)} damaged" + f", {len(wrong)} metrics differ" * metrics,
    ]
    if foreign:
        unknown = ", ".join(sorted({entry.architecture for entry in foreign}))
        shown.append(
            f"{len(foreign)} not built, only their bytes are checked: unknown architecture {unknown}; "
            "name the file that defines it with --import"
        )
    data = {
        "checked": len(entries),
        "problems": problems,
        "metrics": measured,
        "not_built": [entry.reference for entry in foreign],
    }
    if signed is not None:
        shown, data = [*shown, *signed.shown], data | signed.data
    return Answer(data, shown, code=1 if problems or wrong else 0)


def _vouched(what: zoo.Registry | Path, key: Path, signature: Path | None, not_before: datetime | None) -> Answer:
    """What a signature covers; exit code 1 where another key made it, or the files are not those that were signed."""
    from zoo.signature import SignatureError, verify

    try:
        return _signed(verify(what, key, signature=signature, not_before=not_before), "verified")
    except SignatureError as error:
        if error.reason in ("KEY", "UNREADABLE"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return Answer({"signed": False, "reason": error.reason, "message": str(error)}, [], code=1)


def sign(
    place: Path | None = None, /, *, key: Path, signature: Path | None = None, registry: RegistryFile = None
) -> Answer:
    """Sign the registry and every blob it names, or a folder or file, with your private key (needs the extra `sign`).

    The signature is a file in the format of OpenSSF Model Signing 1.0, which other tools verify too. The password of
    an encrypted key is read from $ZOO_KEY_PASSWORD.

    Example: zoo sign --key maker.key; zoo sign final.onnx --key maker.key

    Args:
        place: a folder or file; the registry if left out.
        key: private key in PEM, on the curve P-256, P-384 or P-521, as `openssl ecparam -name prime256v1 -genkey`
            writes it.
        signature: where to write it; by default registry.json.sig, model.sig in a folder, or FILE.sig.
    """
    from zoo import signature as signatures

    password = os.environ.get("ZOO_KEY_PASSWORD")
    return _signed(
        signatures.sign(place or zoo.Registry(registry), key, signature=signature, password=password), "signed"
    )


def _signed(found: Signed, done: str) -> Answer:
    """What a signature covers."""
    at = found.at and found.at.isoformat()
    data = {"signed": True, "signature": str(found.signature), "signed_at": at, "files": dict(found.files)}
    return Answer(data, [f"{len(found.files)} files {done} by {found.signature}, made {at or 'at an unknown time'}"])


def load(reference: str, /, *, registry: RegistryFile = None) -> Answer:
    """Check that a model loads: hash, shapes, values.

    Example: zoo load cylinder-a

    Args:
        reference: NAME, NAME@NUMBER, NAME@ID or an alias.
    """
    home = zoo.Registry(registry)
    entry = home.get(reference)
    shapes = {name: list(tensor.shape) for name, tensor in home.load(entry).state_dict().items()}
    data = {"version": entry.reference, "sha256": entry.sha256, "tensors": shapes}
    rows = [{"tensor": name, "shape": " x ".join(map(str, shape))} for name, shape in shapes.items()]
    line = f"{entry.reference} loads: {entry.parameters:,} parameters, sha256 {entry.sha256}"
    return Answer(data, [Table(rows), line])


def gc(*, dry_run: bool = False, registry: RegistryFile = None) -> Answer:
    """Remove blobs and temporary files that nothing refers to, if they are older than a day.

    Example: zoo gc --dry-run

    Args:
        dry_run: only print what would be removed.
    """
    paths = [str(path) for path in zoo.Registry(registry).collect_garbage(dry_run=dry_run)]
    done = "would be removed" if dry_run else "removed"
    return Answer({"would_remove" if dry_run else "removed": paths}, [*paths, f"{len(paths)} files {done}"])


def recover(*, registry: RegistryFile = None) -> Answer:
    """Rebuild a lost registry from the metadata in its blobs; warnings on stderr name what is left out.

    Example: zoo recover
    """
    home = zoo.Registry(registry)
    before = {entry.id for entry in home.entries()} if home.path.exists() else set()
    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always")
        entries = home.recover()
    known = sum(entry.id in before for entry in entries)
    for warning in left_out:
        print(f"warning: {warning.message}", file=sys.stderr)
    data = {"recovered": [entry.to_json() for entry in entries]}
    return Answer(data, [versions(entries), f"{len(entries) - known} versions recovered, {known} were there already"])


def merge(base: Path, ours: Path, theirs: Path, /) -> Answer:
    """Merge two versions of a registry file into OURS; on a conflict nothing is written and the exit code is 1.

    Git can run it: `git config merge.zoo.driver 'zoo merge %O %A %B'`, and `registry.json merge=zoo` in
    .gitattributes.

    Example: zoo merge base.json ours.json theirs.json

    Args:
        base: the common ancestor; an empty file stands for none.
        ours: one side; the result is written here.
        theirs: the other side.
    """
    from zoo.registry.merge import merge_files

    for path in (base, ours, theirs):
        if not path.exists():
            raise FileNotFoundError(f"expected a registry file to merge, got {str(path)!r}, which does not exist")
    try:
        merge_files(base, ours, theirs)
    except zoo.RegistryError as error:
        if error.reason not in ("CONFLICT", "DANGLING", "NAME_COLLISION"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return Answer({"merged": None, "conflict": str(error)}, [], code=1)
    return Answer({"merged": str(ours), "conflict": None}, [])
