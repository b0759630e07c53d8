"""`Ledger`: the content of one registry's file, read as it is now, changed at once or within a transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.registry import protocol
from zoo.registry.changes import Change, all_of
from zoo.registry.document import Document
from zoo.registry.references import RegistryError

First = Callable[[], object]


def _nothing() -> None:
    """Nothing is to be done first."""


class Ledger:
    """Holds what was last read, which is compared with the disk and never trusted, and what a transaction collected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = protocol.NOTHING
        self._pending: tuple[Document, list[tuple[Change, First]]] | None = None

    @property
    def collecting(self) -> bool:
        """Whether a transaction is open."""
        return self._pending is not None

    def document(self) -> Document:
        """The content of the file now, or a RegistryError; within a transaction, as it will be."""
        if self._pending is not None:
            return self._pending[0]
        raw = protocol.read_raw(self.path, create=False) or b""
        self._seen = protocol.snapshot(raw, self._seen)
        return self._seen[1]

    def commit(self, change: Change, *, timeout: float, create: bool = False, first: First = _nothing) -> Document:
        """The content after the change, which a transaction makes later, perhaps on other content than now.

        Args:
            change: pure.
            timeout: seconds to wait for the lock.
            create: whether a missing file counts as an empty registry.
            first: what is done under the lock before the change is made.
        """
        if self._pending is not None:
            document, collected = self._pending
            self._pending = (change(document), collected)
            collected.append((change, first))
            return self._pending[0]

        def prepared(document: Document) -> Document:
            first()
            return change(document)

        self._seen = protocol.commit(self.path, prepared, timeout=timeout, create=create, seen=self._seen)
        return self._seen[1]

    @contextmanager
    def transaction(self, *, timeout: float) -> Iterator[None]:
        """As `Registry.transaction`."""
        if self._pending is not None:
            raise RegistryError("ARGUMENT", "a transaction is open already; transactions do not nest")
        known = self.document() if self.path.exists() else Document()
        self._pending = (known, [])
        try:
            yield
            pending, collected = self._pending
        finally:
            self._pending = None

        def first() -> None:
            for _, prepare in collected:
                prepare()

        def change(document: Document) -> Document:  # others may have committed
            return pending if document == known else all_of(document, [change for change, _ in collected])

        if collected:
            self.commit(change, timeout=timeout, create=True, first=first)
