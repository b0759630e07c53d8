"""The benchmarks that others are asked to run end, and leave what they measured."""

from pathlib import Path

import pytest
import torch
from pretend_cuda import PretendedCuda

gpu = pytest.importorskip("benchmarks.gpu", reason="the benchmarks are not beside the tests")


def test_a_machine_without_a_card_is_told_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "expected a CUDA device" in err
    assert not [*tmp_path.iterdir()]


def test_every_table_of_a_card_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended one, at tiny sizes: all sections, none failed, and what the machine is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with PretendedCuda(monkeypatch):
        code = gpu.main(["--quick", "--out", str(tmp_path / "out")])
    [file] = (tmp_path / "out").iterdir()
    text = file.read_text(encoding="utf-8")
    assert code == 0, text
    assert [name for name in gpu.TABLES if f"## {name}\n" not in text] == ["tests"]
    assert "Failed" not in text
    assert "| compute capability | 8.0 |" in text
    assert f"torch-{torch.__version__.partition('+')[0]}" in file.name


def test_a_table_that_fails_is_said_and_the_others_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1; a table whose time is up says so too."""

    def broken(setting: object) -> object:
        raise RuntimeError("no such kernel")
        yield

    def slow(setting: object) -> object:
        yield from ({"b": number} for number in range(1000))

    monkeypatch.setattr(gpu, "TABLES", {"broken": broken, "slow": slow})
    with PretendedCuda(monkeypatch):
        assert gpu.main(["--quick", "--out", str(tmp_path), "--minutes", "0"]) == 1
    [file] = tmp_path.iterdir()
    text = file.read_text(encoding="utf-8")
    assert "Failed: RuntimeError: no such kernel" in text
    assert "The time was up: rows are missing." in text
    assert "| 0 |" in text
    assert "| 999 |" not in text
