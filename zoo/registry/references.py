"""Names, digests and references: what may stand in the file, and how a version is pointed at.

cylinder-a            a model's newest version, an ensemble, or an alias
cylinder-a@3          its version number 3
cylinder-a@1f2e3d4c5b6a, 1f2e3d4c5b6a    the version with this content
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

MOST_LETTERS = 96
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_RESERVED = re.compile(r"latest|none|null|sha256|v[0-9]+", re.ASCII)
_DEVICE = re.compile(r"con|prn|aux|nul|(?:com|lpt)[0-9]", re.ASCII)  # files no Windows machine can make
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)


class RegistryError(ValueError):
    """Something that the registry refuses; `reason` is one word of what is wrong.

    The text of the file: REGISTRY_ENCODING, REGISTRY_JSON, REGISTRY_DEPTH, DUPLICATE_KEY, NUMBER_RANGE,
    CONTROL_CHARACTER, NOT_A_REGISTRY, SCHEMA_TYPE, SCHEMA_TOO_NEW, UNKNOWN_KEY, MISSING_KEY, FIELD_TYPE, NAME,
    NAME_COLLISION, ID, DIGEST, VERSION_NUMBER, DANGLING.
    What is asked of it: UNKNOWN, SPEC, EXISTS, HELD, CLASSES, ARGUMENT, CONFLICT, LOCKED, NO_REGISTRY, LINK.
    The disk: DISK (nothing has changed), NOT_DURABLE (changed, but a power cut may undo it).
    A blob: MISSING, NOT_A_FILE, BLOB_SIZE, BLOB_DIGEST, BLOB, PROBE, METRICS.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{message} [{reason}]")
        self.reason = reason


@dataclass(frozen=True)
class Reference:
    """A reference taken apart: a name, and the number or id of a version, or neither."""

    name: str
    number: int | None = None
    id: str | None = None


def check_name(name: object) -> None:
    """Refuse what cannot name a model, an ensemble or an alias, here or on another system.

    Raises:
        RegistryError: NAME.

    Example:
        >>> check_name("cylinder-a")
        >>> check_name("../x")
        Traceback (most recent call last):
        zoo.registry.references.RegistryError: expected a name of ASCII letters, digits, '.', '_' and '-', at most \
96, that begins and ends with a letter or digit, got '../x' [NAME]
    """
    _check_text(name if isinstance(name, str) else f"{name!r}, which is no text")


@lru_cache(maxsize=200_000)
def _check_text(name: str) -> None:
    if len(name) > MOST_LETTERS or not _NAME.fullmatch(name) or ".." in name:
        raise RegistryError(
            "NAME",
            f"expected a name of ASCII letters, digits, '.', '_' and '-', at most {MOST_LETTERS}, that begins and "
            f"ends with a letter or digit, got {name[:120]!r}",
        )
    if _RESERVED.fullmatch(name.casefold()) or _DEVICE.fullmatch(name.casefold().partition(".")[0]):
        raise RegistryError("NAME", f"the name {name!r} is reserved; choose another, such as {'my-' + name!r}")


def check_digest(digest: object) -> None:
    """Refuse what is not `sha256:` and 64 lower-case hex digits.

    Raises:
        RegistryError: DIGEST.
    """
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise RegistryError("DIGEST", f"expected 'sha256:' and 64 hex digits, got {str(digest)[:90]!r}")


def is_id(text: str) -> bool:
    """Whether a text has the form of a version's id."""
    return _ID.fullmatch(text) is not None


def parse_reference(text: str) -> Reference:
    """The parts of a reference.

    Raises:
        RegistryError: NAME, or ARGUMENT where what follows the @ is neither a number nor an id.

    Example:
        >>> parse_reference("cylinder-a@3")
        Reference(name='cylinder-a', number=3, id=None)
    """
    name, at, version = str(text).partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if is_id(version):
        return Reference(name, id=version)
    if re.fullmatch(r"[1-9][0-9]{0,8}", version, re.ASCII):
        return Reference(name, number=int(version))
    raise RegistryError("ARGUMENT", f"expected NAME, NAME@NUMBER or NAME@ID (12 hex digits), got {str(text)[:120]!r}")
