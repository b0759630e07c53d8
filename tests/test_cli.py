"""What holds for every command of both tools: help, JSON, one line per error, `--import`, former spellings."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import ensemble.cli
import zoo
import zoo.cli
from zoo.models.architectures import ARCHITECTURES

COMMANDS = [
    f"{tool} {function.__name__.rstrip('_')}"
    for tool, cli in (("zoo", zoo.cli), ("ensemble", ensemble.cli))
    for function in cli.COMMANDS
]
OLD = [f"{tool} {old}" for tool, cli in (("zoo", zoo.cli), ("ensemble", ensemble.cli)) for old in cli.RENAMED]
MINE = """
import torch, zoo, ensemble

@zoo.architecture
def mine(inputs, classes, *, width=4):
    return torch.nn.Linear(inputs, classes)

@ensemble.rule
def favourite(probabilities):
    return probabilities[0]
"""


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_explains_itself_by_an_example(command, line):
    """`--help` shows one, with the flags that every command has."""
    out = command(f"{line} --help", code=0).out
    tool, name = line.split()
    assert f"Usage: {line}" in out
    assert f"{tool} {name}" in out.split("Example:", 1)[1]
    assert "--json" in out
    assert "--import" in out


@pytest.mark.parametrize("line", COMMANDS)
def test_work_on_frames_is_done_on_a_device(command, line):
    """A GPU where there is one; a file is written from the CPU, and compared there."""
    out = command(f"{line} --help").out
    if "--corpus" in out and "export" not in line:
        assert "--device" in out
        assert "[default: auto]" in " ".join(out.partition("--device")[2].split())


@pytest.mark.parametrize("line", COMMANDS)
def test_a_corpus_may_be_mapped_wherever_one_is_read(command, line):
    """One flag, with the corpus or not at all."""
    out = command(f"{line} --help").out
    assert ("--corpus" in out) == ("--mapped" in out)


@pytest.mark.parametrize("tool", ["zoo", "ensemble"])
def test_help_lists_every_command(command, tool):
    """With and without the word."""
    assert command(f"{tool} --help", code=0).out == command(tool, code=0).out
    for line in COMMANDS:
        name = line.removeprefix(f"{tool} ")
        assert line == name or f" {name} " in command(tool).out


TRAINED = "--corpus corpus --train dev --valid test --epochs 1"
JUDGED = "--corpus corpus --valid dev --test test"
ARGUMENTS = {
    "zoo list": "",
    "zoo show": "other",
    "zoo diff": "other cylinder-a",
    "zoo register": "again {blob}",
    "zoo adopt": "saved.pth --activation relu --features 27 --normalisation mean_std --classes phonemes",
    "zoo alias": "best other",
    "zoo tag": "other small",
    "zoo note": "other text",
    "zoo remove": "other",
    "zoo verify": "",
    "zoo sign": "--key maker.key",
    "zoo load": "other",
    "zoo gc": "",
    "zoo recover": "--registry lost.json",
    "zoo export": "other folder",
    "zoo import": "exported",
    "zoo push": "other me/other",
    "zoo pull": "me/other",
    "zoo merge": "registry.json registry.json registry.json",
    "zoo train": f"a --spec cylinder --option width=8 {TRAINED}",
    "zoo average": "mean cylinder-a cylinder-b --corpus corpus --train dev --valid test",
    "zoo runs": "runs",
    "zoo search": "--draws 1",
    "zoo picture": "draws.png --samples 10",
    "zoo study": f"--draws 1 --max-parameters 60_000 --contexts 1 {TRAINED} --save found",
    "ensemble evaluate": JUDGED,
    "ensemble compare": f"mean other {JUDGED}",
    "ensemble fit": f"{JUDGED} --save final",
    "ensemble select": f"{JUDGED} --save small --front",
    "ensemble diversity": JUDGED,
    "ensemble distil": f"other --spec basic --option width=8 {TRAINED} --students 1 --save student",
    "ensemble predict": "other --corpus corpus --output frames.csv",
    "ensemble export": "other other.onnx --corpus corpus --valid dev",
    "ensemble collect": f"outputs {JUDGED}",
    "ensemble plan": f"{JUDGED} --frames 100",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_json_is_all_of_stdout(command, home, monkeypatch, line):
    """One document whatever else a command does; a new command needs its line above."""
    registry = zoo.Registry()
    blob = registry.blobs.path(registry.get("other").sha256)
    zoo.export(registry, "other", "exported")
    torch.save(registry.load("other").state_dict(), "saved.pth")
    key = ec.generate_private_key(ec.SECP256R1())
    Path("maker.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/log.jsonl").write_text('{"run": "a", "config": {}}\n')
    monkeypatch.setattr("zoo.push", lambda *_, **__: "address")
    monkeypatch.setattr("zoo.pull", lambda home, *_, **__: home.get("other"))
    found = command(f"{line} {ARGUMENTS[line].format(blob=blob)} --json")
    assert found.code in (0, 1)
    assert isinstance(found.data, dict | list)
    assert found.err == ""


@pytest.mark.parametrize("line", OLD)
def test_a_former_spelling_is_answered_with_the_new_one(command, line):
    """One line, exit code 2."""
    found = command(line.replace(" ", " --import own.py ", 1), "x", code=2)
    assert found.err.startswith(f"error: {line.split()[-1]} has a new name: use ")
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ensemble evalute", "evaluate"),
        ("zoo lst", "list"),
        ("zoo list --regstry x", "--registry"),
        ("zoo show", "expected a value for REFERENCE, got none"),
        ("zoo train m cylinder", "unexpected argument 'cylinder'"),
        ("zoo train m --epochs x", "expected a whole number for --epochs, got 'x'"),
        ("zoo merge a b c", "registry file to merge, got 'a'"),
        ("zoo tag other", "expected tags for other, got none"),
        ("zoo picture nowhere/x.png", "no such folder"),
        ("zoo average m a b --picture nowhere/x.png", "no such folder"),
        (
            "zoo train m --directory broken.py",
            "expected a folder, or the path of a new one, got 'broken.py': 'broken.py' is none",
        ),
        ("zoo train m --tensorboard broken.py", "got 'broken.py'"),
        ("zoo study --run broken.py/deep/er", "got 'broken.py/deep/er': 'broken.py' is none"),
        ("ensemble collect broken.py", "got 'broken.py'"),
        ("ensemble evaluate --cache broken.py", "got 'broken.py'"),
        ("ensemble predict mean --output x.csv --run broken.py", "got 'broken.py'"),
        ("ensemble distil other --save x --directory broken.py", "got 'broken.py'"),
        ("zoo show other --json=maybe", "json"),
        ("zoo list --import", "--import"),
        ("zoo list --import nowhere.py", "nowhere.py"),
        ("zoo list --import no_such_module", "no_such_module"),
        ("zoo list --import json.py", "rename it"),
        ("zoo list --import sys.py", "rename it"),
        ("zoo list --import broken.py", "broken.py, line 2"),
        ("zoo list --import broken.py", "NameError: name 'wrong' is not defined"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(command, home, line, words):
    """No traceback, and nothing on stdout."""
    Path("broken.py").write_text("\nwrong")
    for name in ("json.py", "sys.py"):
        Path(name).touch()
    found = command(line, code=2)
    assert words in found.err
    assert (found.err.count("\n"), found.out) == (1, "")


def test_a_file_of_ones_own_is_imported_on_request(command, home, monkeypatch):
    """Its architectures and rules are known to the command; without the request they are not."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own.py").write_text(MINE)
    corpus = "--corpus corpus --train dev --valid test"
    assert "mine" in command(f"zoo train a --spec mine --epochs 1 {corpus}", code=2).err
    trained = command(f"zoo train a --spec mine --epochs 1 {corpus} --import own.py --json", code=0).data
    assert trained["spec"]["architecture"] == "mine"
    where = "--corpus corpus --valid dev --test test"
    found = command(f"ensemble --import own evaluate {where} --rules favourite --json", code=0).data
    assert found["rules"][0]["accuracy"] == found["members"][0]["accuracy"]
    ARCHITECTURES.pop("mine")
    ensemble.rules.table.RULES.pop("favourite")
    sys.modules.pop("own")


@pytest.mark.parametrize("package", ["zoo", "ensemble"])
def test_packages_run_as_modules_and_help_does_not_wait_for_torch(package):
    """`python -m zoo --help` names its commands without importing torch, scikit-learn or pandas."""
    code = f"""
import runpy, sys
sys.argv = [{package!r}, "--help"]
try:
    runpy.run_module({package!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
heavy = sorted({{"torch", "sklearn", "pandas"}} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_listing_does_not_wait_for_torch(home):
    """Nor for scikit-learn or pandas."""
    code = """
import sys
from zoo.cli import run
assert run(["list"]) == 0
heavy = sorted({"torch", "sklearn", "pandas"} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cylinder-a" in done.stdout


@pytest.mark.parametrize(
    "line", ["zoo list", "zoo show other", "ensemble evaluate --members cyl* other --corpus corpus --valid dev"]
)
def test_the_registry_is_read_once(command, home, monkeypatch, line):
    """However many models a command needs."""
    counted: list[Path] = []
    read = zoo._files.read
    monkeypatch.setattr("zoo._files.read", lambda path, *more: counted.append(path) or read(path, *more))
    command(line, code=0)
    assert len([path for path in counted if Path(path).name == "registry.json"]) == 1
