"""Signatures: what was signed verifies, everything else is refused by name, and an independent client agrees."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import zoo
from zoo.signature import SignatureError, read_bundle, sign, verify

VECTORS = Path(__file__).parents[2] / "shared/data/oms/test-vectors/v1.0"


def written(folder: Path, key: Any, name: str = "maker", password: str = "") -> tuple[Path, Path]:
    """Files of a private and a public key."""
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    secret = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key on P-256."""
    (tmp_path / "keys").mkdir()
    return written(tmp_path / "keys", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def home(tmp_path: Path) -> zoo.Registry:
    """A registry of two models."""
    found = zoo.Registry(tmp_path / "home" / "registry.json")
    spec = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})
    for seed in (0, 1):
        found.register(f"m{seed}", zoo.build(spec, seed=seed), spec=spec, classes=["no", "yes"])
    return found


@pytest.fixture
def folder(home: zoo.Registry, tmp_path: Path) -> Path:
    """An exported model."""
    return zoo.export(home, "m0", tmp_path / "exported")


def test_a_registry(home: zoo.Registry, keys: tuple[Path, Path]) -> None:
    """The file and every blob it names; other files beside it are nobody's business."""
    (home.path.parent / "notes.txt").write_text("mine")
    signed = sign(home, keys[0])
    blobs = {f"checkpoints/sha256/{entry.sha256}.safetensors": entry.sha256 for entry in home.entries()}
    assert {name: sha256 for name, sha256 in signed.files.items() if name != "registry.json"} == blobs
    assert signed.signature == Path(f"{home.path}.sig")
    (home.path.parent / "more.txt").write_text("mine too")
    assert verify(home, keys[1]).files == signed.files


def test_a_folder_and_a_file(folder: Path, keys: tuple[Path, Path]) -> None:
    """All files of a folder, however deep; or one file, whatever lies beside it."""
    (folder / "deep").mkdir()
    (folder / "deep" / "é.bin").write_bytes(b"\0" * 3)
    signed = sign(folder, keys[0])
    assert sorted(signed.files) == ["README.md", "config.json", "deep/é.bin", "model.safetensors"]
    assert verify(folder, keys[1]).at == signed.at
    one = sign(folder / "config.json", keys[0])
    assert one.signature == folder / "config.json.sig"
    assert list(verify(folder / "config.json", keys[1]).files) == ["config.json"]


def _added_below(root: Path) -> None:
    (root / "d").mkdir()
    (root / "d" / "x").touch()


def _linked(root: Path) -> None:
    (root / "README.md").rename(root.parent / "away")
    (root / "README.md").symlink_to(root.parent / "away")


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a changed file": ("CHANGED", lambda root: (root / "config.json").write_text("{}")),
    "a missing file": ("MISSING", lambda root: (root / "README.md").unlink()),
    "an added file": ("ADDED", lambda root: (root / "more.bin").touch()),
    "an added file below": ("ADDED", _added_below),
    "a file replaced by a link": ("LINK", _linked),
    "a link to the signature": ("LINK", lambda root: (root / "x").symlink_to(root / "model.sig")),
    "a linked folder": ("LINK", lambda root: (root / "x").symlink_to(root.parent)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_signed(change: str, folder: Path, keys: tuple[Path, Path]) -> None:
    """Each is refused by its reason, with the name of the file."""
    sign(folder, keys[0])
    reason, act = CHANGES[change]
    act(folder)
    with pytest.raises(SignatureError, match=r"expected .* got .*(README|config|more|d/x|'x')") as caught:
        verify(folder, keys[1])
    assert caught.value.reason == reason


def test_a_registry_changed_after_it_was_signed(home: zoo.Registry, keys: tuple[Path, Path]) -> None:
    """A new version, a blob that nobody names, a blob that is gone, and a blob behind a link."""
    sign(home, keys[0])
    text = home.path.read_bytes()
    home.alias("best", "m0@1")
    with pytest.raises(SignatureError, match=r"registry\.json"):
        verify(home, keys[1])
    home.path.write_bytes(text)
    stray = home.blobs.folder / "stray.safetensors"
    stray.write_bytes(b"")
    with pytest.raises(SignatureError, match=r"got also \['checkpoints/sha256/stray\.safetensors'\]"):
        verify(home, keys[1])
    stray.unlink()
    blob = home.blobs.path(home.get("m0").sha256)
    blob.rename(blob.parent.parent.parent / "away")
    with pytest.raises(SignatureError, match=f"got none at .*{blob.name}"):
        verify(home, keys[1])
    blob.symlink_to(blob.parent.parent.parent / "away")
    with pytest.raises(SignatureError, match=f"links or devices at .*{blob.name}"):
        verify(home, keys[1])


def test_a_registry_with_a_damaged_blob_is_not_signed(home: zoo.Registry, keys: tuple[Path, Path]) -> None:
    """Nobody vouches for a blob that is not what the registry recorded."""
    blob = home.blobs.path(home.get("m0").sha256)
    blob.chmod(0o644)
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    with pytest.raises(SignatureError, match="run `zoo verify`"):
        sign(home, keys[0])
    assert not Path(f"{home.path}.sig").exists()


def test_an_older_state_put_back(home: zoo.Registry, keys: tuple[Path, Path]) -> None:
    """It is signed, and refused by a caller who demands a later time."""
    at = sign(home, keys[0]).at
    assert at is not None
    verify(home, keys[1], not_before=at)
    verify(home, keys[1], not_before=(at - timedelta(days=1)).replace(tzinfo=None))
    with pytest.raises(SignatureError, match="expected a signature not before") as caught:
        verify(home, keys[1], not_before=at + timedelta(seconds=1))
    assert caught.value.reason == "OLD"


def test_another_key(folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Another key is refused, also where the bundle does not say whose it is."""
    _, other = written(tmp_path, ec.generate_private_key(ec.SECP256R1()), "other")
    sign(folder, keys[0])
    with pytest.raises(SignatureError, match="got one by another key") as caught:
        verify(folder, other)
    assert caught.value.reason == "SIGNATURE"
    changed(folder, lambda bundle: bundle["verificationMaterial"].update(publicKey={"rawBytes": "AA=="}))
    verify(folder, keys[1])  # as older bundles are
    with pytest.raises(SignatureError, match="got another key or content"):
        verify(folder, other)


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a bundle in place."""
    bundle = json.loads((folder / "model.sig").read_text())
    change(bundle)
    (folder / "model.sig").write_text(json.dumps(bundle))


def restated(folder: Path, private: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Sign a changed statement anew, as somebody with the key could."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    bundle = json.loads((folder / "model.sig").read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    payload = json.dumps(statement).encode()
    encoded = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    signed = key.sign(encoded, ec.ECDSA(hashes.SHA256()))
    bundle["dsseEnvelope"]["signatures"] = [{"sig": base64.b64encode(signed).decode()}]
    (folder / "model.sig").write_text(json.dumps(bundle))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update(predicateType="https://example.com/other"), "PREDICATE"),
        (lambda s: s.update(_type="other"), "PREDICATE"),
        (lambda s: s["predicate"]["serialization"].update(method="shards", shard_size=1), "PREDICATE"),
        (lambda s: s["predicate"]["serialization"].update(allow_symlinks=True), "PREDICATE"),
        (lambda s: s["predicate"].update(resources=[]), "BUNDLE"),
        (lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]), "BUNDLE"),
        (lambda s: s["predicate"]["resources"][0].update(name="../README.md"), "BUNDLE"),
        (lambda s: s["predicate"]["resources"][0].update(name="/etc/passwd"), "BUNDLE"),
        (lambda s: s["predicate"]["resources"][0].update(digest="zz"), "BUNDLE"),
        (lambda s: s["subject"][0]["digest"].update(sha256="00"), "BUNDLE"),
        (lambda s: s.pop("predicate"), "BUNDLE"),
        (lambda s: s["predicate"]["resources"][0].update(annotations=3), "BUNDLE"),
        (lambda s: s["predicate"]["resources"][0].update(annotations={"signed_at": "soon"}), "BUNDLE"),
    ],
)
def test_statements_that_are_none(
    change: Callable[[dict[str, Any]], Any], reason: str, folder: Path, keys: tuple[Path, Path]
) -> None:
    """A wrong statement is refused although the right key signed it."""
    sign(folder, keys[0])
    restated(folder, keys[0], lambda statement: None)
    verify(folder, keys[1])
    restated(folder, keys[0], change)
    with pytest.raises(SignatureError) as caught:
        verify(folder, keys[1])
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"mediaType": "application/json"}',
        '{"mediaType": "application/vnd.dev.sigstore.bundle+json", "dsseEnvelope": {}}',
        '{"mediaType": "application/vnd.dev.sigstore.bundle+json", "verificationMaterial": {}, "dsseEnvelope": {}}',
        '{"a": 1, "a": 2}',
    ],
)
def test_files_that_are_no_signature(text: str, folder: Path, keys: tuple[Path, Path]) -> None:
    """Each is refused as such, in one line."""
    (folder / "model.sig").write_text(text)
    with pytest.raises(SignatureError, match="expected a signature in the format of OpenSSF Model Signing") as caught:
        verify(folder, keys[1])
    assert caught.value.reason == "BUNDLE"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["payload", "payloadType", "signatures"])
def test_every_part_of_the_envelope_counts(part: str, folder: Path, keys: tuple[Path, Path]) -> None:
    """Without it, or with another value, nothing verifies."""
    sign(folder, keys[0])
    changed(folder, lambda bundle: bundle["dsseEnvelope"].pop(part))
    with pytest.raises(SignatureError, match="expected a signature in the format"):
        verify(folder, keys[1])


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_curves(curve: ec.EllipticCurve, folder: Path, tmp_path: Path) -> None:
    """The three curves of the format, and encrypted keys with their password only."""
    private, public = written(tmp_path, ec.generate_private_key(curve), password="secret")
    sign(folder, private, password="secret")
    verify(folder, public)
    for wrong in (None, "guess"):
        with pytest.raises(SignatureError, match=r"private key") as caught:
            sign(folder, private, password=wrong)
        assert caught.value.reason == "KEY"


def test_keys_of_other_kinds(folder: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """RSA, another curve, a public key where a private one is expected, no file."""
    rsa_key, rsa_public = written(tmp_path, rsa.generate_private_key(65537, 2048), "rsa")
    odd, _ = written(tmp_path, ec.generate_private_key(ec.SECP256K1()), "odd")
    for private in (rsa_key, odd, keys[1], tmp_path / "absent"):
        with pytest.raises(SignatureError) as caught:
            sign(folder, private)
        assert caught.value.reason == "KEY"
    sign(folder, keys[0])
    for public in (rsa_public, keys[0], tmp_path / "absent"):
        with pytest.raises(SignatureError) as caught:
            verify(folder, public)
        assert caught.value.reason == "KEY"


def client(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The independent client of the format."""
    pytest.importorskip("model_signing", reason="needs the package model-signing")
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def test_an_independent_client_verifies_ours(folder: Path, home: zoo.Registry, keys: tuple[Path, Path]) -> None:
    """A folder, a registry among other files, and a file; and it refuses a changed one."""
    (home.path.parent / "notes.txt").write_text("mine")
    places: list[tuple[Path, Path]] = [(folder, sign(folder, keys[0]).signature)]
    places.append((home.path.parent, sign(home, keys[0]).signature))
    for place, signature in places:
        done = client("verify", "key", place, "--signature", signature, "--public_key", keys[1])
        assert done.returncode == 0, done.stdout + done.stderr
    (folder / "config.json").write_text("{}")
    done = client("verify", "key", folder, "--signature", places[0][1], "--public_key", keys[1])
    assert done.returncode != 0


def test_we_verify_those_of_an_independent_client(folder: Path, keys: tuple[Path, Path]) -> None:
    """Which says no time, so that none can be demanded."""
    signature = folder / "model.sig"
    done = client("sign", "key", folder, "--signature", signature, "--private_key", keys[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(folder, keys[1]).at is None
    with pytest.raises(SignatureError, match="one that does not say when it was made"):
        verify(folder, keys[1], not_before=datetime(2026, 1, 1, tzinfo=UTC))
    (folder / "config.json").write_text("{}")
    with pytest.raises(SignatureError, match=r"others at \['config\.json'\]"):
        verify(folder, keys[1])


@pytest.mark.skipif(not VECTORS.exists(), reason="needs the specification's test vectors")
@pytest.mark.parametrize("file", sorted(VECTORS.rglob("*.json")), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_vectors_of_the_specification(file: Path, folder: Path, keys: tuple[Path, Path]) -> None:
    """The valid ones are read, each of the others is refused for what is wrong with it."""
    from zoo.signature import _statement

    kind = file.parent.name
    if kind == "invalid":
        with pytest.raises(SignatureError) as caught:
            read_bundle(file)
        assert caught.value.reason == "BUNDLE"
        return
    payload, signed, _ = read_bundle(file)
    assert signed
    if kind == "invalid-payload":
        with pytest.raises(SignatureError) as caught:
            _statement(payload, file)
        assert caught.value.reason == "PREDICATE"
        return
    files, ignored, _ = _statement(payload, file)
    assert list(files) == ["signme-1", "signme-2"]
    assert "ignore-me" in ignored


def test_commands(home: zoo.Registry, folder: Path, keys: tuple[Path, Path], command: Callable[..., Any]) -> None:
    """`zoo sign` and `zoo verify --key`: exit code 1 where the answer is no, 2 where the question is wrong."""
    where = ("--registry", home.path)
    assert len(command("zoo sign --json --key", keys[0], *where, code=0).data["files"]) == 3
    answer = command("zoo verify --json --key", keys[1], *where, code=0).data
    assert answer["signed"] is True
    assert answer["checked"] == 2
    late = command("zoo verify --json --not-before 2100-01-01 --key", keys[1], *where, code=1)
    assert late.data["reason"] == "OLD"
    command("zoo sign", folder, "--key", keys[0], code=0)
    assert "4 files" not in command("zoo verify --place", folder, "--key", keys[1], code=0).out
    (folder / "config.json").write_text("{}")
    found = command("zoo verify --json --place", folder, "--key", keys[1], code=1)
    assert found.data["reason"] == "CHANGED"
    assert "config.json" in found.err
    assert "expected --key with --place" in command("zoo verify --place", folder, code=2).err
    assert "got 2026-11-01" in command("zoo verify --not-before 2026-11-01", *where, code=2).err
    assert "private key" in command("zoo sign --key", keys[1], *where, code=2).err
