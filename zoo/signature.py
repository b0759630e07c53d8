"""Signatures over registries, exported folders and single files, in the format of OpenSSF Model Signing 1.0.

Hashes show damage, not origin: whoever may write both the registry and its blobs can replace a model. A signature says
who vouches for the files, to everybody who has the public key. It is a detached file (a Sigstore bundle that holds a
DSSE envelope around an in-toto statement) which other tools verify too, such as `model_signing verify key`.

The format has no freshness: an older signed state, put back whole, is still signed. So a statement of ours records when
it was made, and a caller can demand a time. Needs the extra `sign`.

References:
    OpenSSF, "Model Signing specification 1.0", 2026; Secure Systems Lab, "DSSE protocol 1.0".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from zoo import _files
from zoo._json import RefusalError, TextError, parse_strictly
from zoo.registry import Registry

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_IGNORED = (".git", ".gitattributes", ".github", ".gitignore")  # at the root, by the specification
_SUFFIX, _INSIDE = ".sig", "model.sig"
_SIGNED = "signed_at"  # annotation of the first file
_MOST_BYTES = 256 * 2**20  # of a bundle
_CHUNK = 2**20
_METHODS = {  # what a bundle's verification material must hold, by its method
    "publicKey": lambda held: any(isinstance(held.get(name), str) for name in ("hint", "rawBytes")),
    "x509CertificateChain": lambda held: all(
        isinstance(each, dict) and each.get("rawBytes") for each in held.get("certificates") or [None]
    ),
    "certificate": lambda held: isinstance(held.get("rawBytes"), str),
}


class SignatureError(RefusalError):
    """What was signed is not what is there, or was not signed by that key; `reason` says in one word why.

    KEY: the key cannot be used. BUNDLE: not a signature in this format. PREDICATE: it states something else. SIGNATURE:
    made with another key, or changed. CHANGED, MISSING, ADDED, LINK: a file is not as signed. OLD: made before the time
    demanded. UNREADABLE: the disk refused.
    """

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Signed:
    """What a signature covers.

    Args:
        signature: the file of the signature.
        files: path of each file below the signed folder -> sha256.
        at: when it was made, in UTC; None where the signer did not say.
    """

    signature: Path
    files: Mapping[str, str]
    at: datetime | None


def sign(
    place: Registry | Path | str, key: Path | str, *, signature: Path | str | None = None, password: str | None = None
) -> Signed:
    """Sign a registry (its file and every blob it names), a folder (every file in it), or a file.

    Args:
        place: what to sign.
        key: file of an unencrypted or encrypted private key, PEM; elliptic curve P-256, P-384 or P-521.
        signature: where to write; by default `registry.json.sig` beside a registry, `model.sig` in a folder, and the
            file's name with `.sig` beside a file.
        password: of an encrypted key.

    Raises:
        SignatureError: KEY; LINK; MISSING: a blob is not there; CHANGED: a blob is not what the registry recorded;
            UNREADABLE.
        ImportError: the extra `sign` is not installed.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    target = _Target.of(place, signature)
    private = _private_key(Path(key), password)
    now = datetime.now(UTC).replace(microsecond=0)
    found = {name: _hash_of(target.root / name) for name in target.wanted()}
    if wrong := [name for name, sha256 in target.recorded.items() if found[name] != sha256]:
        _refuse("CHANGED", f"expected the blobs that {place!r} recorded, got others at {wrong}; run `zoo verify`")
    resources: list[dict[str, Any]] = [
        {"name": name, "digest": found[name], "algorithm": "sha256"} for name in sorted(found)
    ]
    resources[0]["annotations"] = {_SIGNED: now.isoformat()}
    root = hashlib.sha256(b"".join(bytes.fromhex(found[name]) for name in sorted(found))).hexdigest()
    ignored = sorted({*_IGNORED, *target.ignored()})
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": target.name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE,
        "predicate": {"resources": resources, "serialization": serialization},
    }
    payload = json.dumps(statement).encode()
    signed = private.sign(_encoded(payload), ECDSA(_hash_for(private.public_key())))
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": _fingerprint(private.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD,
            "signatures": [{"sig": base64.b64encode(signed).decode(), "keyid": ""}],
        },
    }
    try:
        _files.write(target.signature, (json.dumps(bundle, indent=2) + "\n").encode())
    except OSError as error:
        _refuse("UNREADABLE", f"cannot write {target.signature}: {error}", error)
    return Signed(target.signature, found, now)


def verify(
    place: Registry | Path | str,
    key: Path | str,
    *,
    signature: Path | str | None = None,
    not_before: datetime | None = None,
) -> Signed:
    """Check that a registry, folder or file is exactly what the owner of a key signed.

    The registry's file and its blobs, or all files of a folder, must be those that were signed: none changed, added,
    missing, or replaced by a link. Beside a registry other files may stand; among its blobs none may.

    Args:
        place: what was signed.
        key: file of the public key, PEM.
        signature: where it is; by default where `sign` puts it.
        not_before: refuse a statement made before this time, such as an older signed state that was put back, or one
            that does not say when it was made.

    Raises:
        SignatureError: with the reason, and the names of the files.
        ImportError: the extra `sign` is not installed.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    target = _Target.of(place, signature)
    public = _public_key(Path(key))
    payload, signed, hint = read_bundle(target.signature)
    if hint not in ("", _fingerprint(public)):
        _refuse("SIGNATURE", f"expected a signature by the key in {key}, got one by another key, {hint[:16]}...")
    try:
        public.verify(signed, _encoded(payload), ECDSA(_hash_for(public)))
    except InvalidSignature:
        _refuse("SIGNATURE", f"expected {target.signature} signed by the key in {key}, got another key or content")
    stated, ignored, at = _statement(payload, target.signature)
    if not_before is not None and (at is None or at < _aware(not_before)):
        came = "one that does not say when it was made" if at is None else f"one of {at.isoformat()}"
        _refuse("OLD", f"expected a signature not before {not_before.isoformat()}, got {came}")
    there = dict(target.there(ignored))
    if linked := sorted(name for name, mode in there.items() if not stat.S_ISREG(mode)):
        _refuse("LINK", f"expected plain files, got links or devices at {linked[:5]}")
    if missing := sorted(set(stated) - set(there)):
        _refuse("MISSING", f"expected all signed files in {target.root}, got none at {missing[:5]}")
    if added := sorted(set(there) - set(stated)):
        _refuse("ADDED", f"expected only signed files in {target.root}, got also {added[:5]}")
    if changed := [name for name, sha256 in stated.items() if _hash_of(target.root / name) != sha256]:
        _refuse("CHANGED", f"expected the files that were signed, got others at {changed[:5]}")
    if unsigned := sorted(set(target.wanted()) - set(stated)):
        _refuse(
            "MISSING", f"expected a signature over every blob that the registry names, got none over {unsigned[:5]}"
        )
    return Signed(target.signature, stated, at)


@dataclass(frozen=True)
class _Target:
    """The files that a signature is about, below one folder."""

    root: Path
    name: str
    signature: Path
    scope: tuple[str, ...]  # files and folders below the root; () for everything in it
    registry: Registry | None = None

    @classmethod
    def of(cls, place: Registry | Path | str, signature: Path | str | None) -> _Target:
        """What is signed at a place, and where its signature is by default."""
        if isinstance(place, Registry):
            path, blobs = place.path, place.blobs.folder
            beside = Path(signature or f"{path}{_SUFFIX}")
            scope = (path.name, PurePosixPath(blobs.relative_to(path.parent)).parts[0])
            return cls(path.parent, path.parent.resolve().name, beside, scope, place)
        place = Path(place)
        if place.is_dir():
            return cls(place, place.resolve().name, Path(signature or place / _INSIDE), ())
        return cls(place.parent, place.name, Path(signature or f"{place}{_SUFFIX}"), (place.name,))

    @cached_property
    def recorded(self) -> dict[str, str]:
        """Path of each blob that the registry names -> the sha256 that it recorded."""
        if self.registry is None:
            return {}
        home, entries = self.registry, self.registry.snapshot().versions()
        paths = ((home.blobs.path(entry.sha256).relative_to(self.root), entry.sha256) for entry in entries)
        return {path.as_posix(): sha256 for path, sha256 in paths}

    def wanted(self) -> list[str]:
        """The files to sign: the registry's and its blobs, or all that is there."""
        if self.registry is not None:
            return [self.registry.path.name, *sorted(self.recorded)]
        there = dict(self.there(_IGNORED))
        if linked := sorted(name for name, mode in there.items() if not stat.S_ISREG(mode)):
            _refuse("LINK", f"expected plain files to sign, got links or devices at {linked[:5]}")
        if not there:
            _refuse("MISSING", f"expected at least one file to sign at {self.root / ''.join(self.scope)}, got none")
        return sorted(there)

    def ignored(self) -> set[str]:
        """Paths beside the signed files that another verifier has to leave out: the signature, and other files."""
        own = {self.signature.name} if _place(self.signature).parent == self.root.resolve() else set()
        if self.registry is None:
            return own
        wanted = set(self.wanted())
        beside = {path.name for path in self.root.iterdir() if path.name not in self.scope}
        return own | beside | (dict(self.there(())).keys() - wanted)

    def there(self, ignored: Collection[str]) -> Iterator[tuple[str, int]]:
        """Path below the root and mode of every file, link and device in scope, but for the signature."""
        own = _place(self.signature)
        pending = [self.root / name for name in self.scope] or [*self.root.iterdir()]
        while pending:
            path = pending.pop()
            name = path.relative_to(self.root).as_posix()
            if name in ignored or _place(path) == own:
                continue
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(mode):
                pending += path.iterdir()
            else:
                yield name, mode


def read_bundle(path: Path) -> tuple[bytes, bytes, str]:
    """The payload, the signature over it, and the fingerprint of the key ("" if there is none), from a bundle.

    All three signing methods of the specification are recognised; only `key` can be verified here.

    Raises:
        SignatureError: BUNDLE: another structure than the specification requires; UNREADABLE.
    """
    try:
        text = bytes(_files.read(path)).decode("utf-8") if path.lstat().st_size <= _MOST_BYTES else ""
        bundle = parse_strictly(text)
    except OSError as error:
        _refuse("UNREADABLE", f"cannot read the signature {path}: {error}", error)
    except (TextError, UnicodeDecodeError) as error:
        _refuse("BUNDLE", f"expected a signature in the format of OpenSSF Model Signing at {path}: {error}", error)
    wrong = f"expected a signature in the format of OpenSSF Model Signing at {path}, got"
    held = bundle if isinstance(bundle, dict) else {}
    if not str(held.get("mediaType")).startswith("application/vnd.dev.sigstore.bundle"):
        _refuse("BUNDLE", f"{wrong} the media type {held.get('mediaType')!r}")
    material, envelope = held.get("verificationMaterial"), held.get("dsseEnvelope")
    if not isinstance(material, dict) or not isinstance(envelope, dict):
        _refuse("BUNDLE", f"{wrong} none of its own parts verificationMaterial and dsseEnvelope")
    method = next((name for name in _METHODS if isinstance(material.get(name), dict)), None)
    if method is None or not _METHODS[method](material[method]):
        _refuse("BUNDLE", f"{wrong} no public key and no certificate")
    if method == "certificate" and not material.get("tlogEntries"):
        _refuse("BUNDLE", f"{wrong} a keyless signature without an entry of a transparency log")
    signatures = envelope.get("signatures")
    one = signatures[0] if isinstance(signatures, list) and signatures else None
    if envelope.get("payloadType") != _PAYLOAD or not isinstance(one, dict):
        _refuse("BUNDLE", f"{wrong} an envelope of the type {envelope.get('payloadType')!r}, or without a signature")
    try:
        payload, signed = (
            base64.b64decode(str(text or "!"), validate=True) for text in (envelope.get("payload"), one.get("sig"))
        )
    except binascii.Error as error:
        _refuse("BUNDLE", f"{wrong} a payload or a signature that is not base64", error)
    if method != "publicKey":
        return payload, signed, method
    return payload, signed, str(material[method].get("hint") or "")


def _statement(payload: bytes, path: Path) -> tuple[dict[str, str], tuple[str, ...], datetime | None]:
    """Files and hashes, ignored paths, and the time, from a signed payload; SignatureError PREDICATE or BUNDLE."""
    try:
        stated = parse_strictly(payload.decode("utf-8"))
        kinds = stated["_type"], stated["predicateType"]
        if kinds != (_STATEMENT, _PREDICATE):
            _refuse("PREDICATE", f"expected a statement of the type {_PREDICATE} in {path}, got {kinds[1]}")
        resources, how = stated["predicate"]["resources"], stated["predicate"]["serialization"]
        if how["method"] != "files" or how["hash_type"] != "sha256" or how["allow_symlinks"] is not False:
            _refuse("PREDICATE", f"expected whole files by sha256 without links in {path}, got {str(how)[:120]}")
        files = {str(resource["name"]): str(resource["digest"]) for resource in resources}
        ignored = tuple(str(name) for name in how.get("ignore_paths", ()))
        times = [resource.get("annotations", {}).get(_SIGNED) for resource in resources]
        at = next((_aware(datetime.fromisoformat(time)) for time in times if time), None)
        root = hashlib.sha256(b"".join(bytes.fromhex(files[name]) for name in files)).hexdigest()
        sound = root == stated["subject"][0]["digest"]["sha256"] and all(map(_canonical, files))
        if not sound or not files or len(files) != len(resources):
            _refuse("BUNDLE", f"expected each file once, by its path below the signed folder, in {path}")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, SignatureError):
            raise
        _refuse("BUNDLE", f"expected a statement with files and hashes in {path}: {error!r}"[:300], error)
    return files, (*_IGNORED, *ignored), at


def _aware(time: datetime) -> datetime:
    """A time without a zone is in UTC."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _place(path: Path) -> Path:
    """Where a name stands, whatever it points to."""
    return path.parent.resolve() / path.name


def _canonical(name: str) -> bool:
    """Whether a path is relative, and leads nowhere else."""
    return bool(name) and not name.startswith("/") and all(part not in ("", ".", "..") for part in name.split("/"))


def _encoded(payload: bytes) -> bytes:
    """The pre-authentication encoding of DSSE: what is signed."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with _files.opened(path, follow=False) as (file, _):
            while chunk := _files.read_some(file, _CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        _refuse("MISSING", f"expected a file at {path}, got none", error)
    except _files.NotRegularError as error:
        _refuse("LINK", str(error), error)
    except OSError as error:
        _refuse("UNREADABLE", f"cannot read {path}: {error}", error)
    return digest.hexdigest()


def _private_key(path: Path, password: str | None) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    secret = None if password is None else password.encode()
    key: EllipticCurvePrivateKey = _key(
        path, "private", lambda data: load_pem_private_key(data, secret), EllipticCurvePrivateKey
    )
    _hash_for(key.public_key())
    return key


def _public_key(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key: EllipticCurvePublicKey = _key(path, "public", load_pem_public_key, EllipticCurvePublicKey)
    return key


def _key(path: Path, what: str, load: Callable[[bytes], object], kind: Any) -> Any:
    """The key of this kind in a PEM file."""
    try:
        key = load(path.read_bytes())
    except TypeError as error:  # a password is missing, or there is nothing to decrypt
        _refuse("KEY", f"cannot read the {what} key {path}: {error}", error)
    except (OSError, ValueError) as error:
        _refuse("KEY", f"expected a {what} key in PEM at {path}, got: {error}", error)
    if not isinstance(key, kind):
        _refuse("KEY", f"expected an elliptic curve key at {path}, got another kind")
    return key


def _hash_for(key: EllipticCurvePublicKey) -> Any:
    """The hash that goes with a curve."""
    from cryptography.hazmat.primitives import hashes

    known: dict[str, Any] = {"secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512}
    if key.curve.name not in known:
        _refuse("KEY", f"expected a key on P-256, P-384 or P-521, got {key.curve.name}")
    return known[key.curve.name]()


def _fingerprint(key: EllipticCurvePublicKey) -> str:
    """The sha256 of a public key's PEM text, by which bundles name it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _refuse(reason: str, message: str, cause: BaseException | None = None) -> NoReturn:
    raise SignatureError(reason, message) from cause
