"""A file appears whole or not at all."""

import os
from pathlib import Path

import pytest

from zoo.files import whole_file


def test_a_finished_file_replaces_the_old_one_with_usual_permissions(tmp_path: Path) -> None:
    """Content as written, mode as the umask says, nothing else in the folder."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    old = os.umask(0o027)
    with whole_file(path) as file:
        file.write("né")
    os.umask(old)
    assert path.read_text(encoding="utf-8") == "né"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """Also when the error is an interrupt."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with whole_file(path, "wb") as file:
            file.write(b"half")
            raise KeyboardInterrupt("now")

    with pytest.raises(KeyboardInterrupt, match="now"):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
