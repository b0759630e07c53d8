"""`Ledger`: the content of one registry's file, read as it is now, changed at once or within a transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.registry import protocol
from zoo.registry.changes import Change, all_of
from zoo.registry.document import Document
from zoo.registry.references import RegistryError

Ensure = Callable[[Document], object]


def _nothing(_: Document) -> None:
    """Nothing is to be seen to."""


class Ledger:
    """Holds what was last read, which is compared with the disk and never trusted, and what a transaction collected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = protocol.NOTHING
        self._pending: tuple[Document, list[tuple[Change, Ensure]]] | None = None

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

    def commit(self, change: Change, *, timeout: float, create: bool = False, ensure: Ensure = _nothing) -> Document:
        """The content after the change, which a transaction makes later, perhaps on other content than now.

        Args:
            change: pure.
            timeout: seconds to wait for the lock.
            create: whether a missing file counts as an empty registry.
            ensure: what is seen to under the lock, given the content that will be, before it is written.
        """
        if self._pending is not None:
            document, collected = self._pending
            self._pending = (change(document), collected)
            collected.append((change, ensure))
            return self._pending[0]

        def prepared(document: Document) -> Document:
            new = change(document)
            ensure(new)
            return new

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

        def ensured(new: Document) -> None:
            for _, ensure in collected:
                ensure(new)

        def change(document: Document) -> Document:  # others may have committed
            return pending if document == known else all_of(document, [change for change, _ in collected])

        if collected:
            self.commit(change, timeout=timeout, create=True, ensure=ensured)
