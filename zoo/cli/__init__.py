"""The command `zoo`: make and keep single models."""

from __future__ import annotations

from zoo._console import command_line
from zoo.cli import entries, train, upkeep
from zoo.cli.adopt import adopt

COMMANDS = (
    *(entries.list_, entries.show, entries.diff, entries.register, adopt),
    *(entries.alias, entries.tag, entries.note, entries.remove),
    *(entries.export, entries.import_, entries.push, entries.pull),
    *(upkeep.verify, upkeep.sign, upkeep.load, upkeep.gc, upkeep.recover, upkeep.merge),
    *(train.train, train.average, train.runs, train.search, train.picture, train.study),
)
RENAMED = {  # former spelling -> what to write now
    "search --budget": "--max-parameters",
    "search --draw-seed": "--seed",
    "search --picture": "`zoo picture FILE`",
    "search --samples": "`zoo picture FILE --samples`",
    "search --register": "`zoo study --save NAME`",
    **dict.fromkeys((f"search --{flag}" for flag in ("study", "optuna", "journal", "best")), "`zoo study`"),
    **dict.fromkeys((f"search --{flag}" for flag in ("recipe", "corpus", "train", "valid")), "`zoo study`"),
    **{f"search --{flag}": f"`zoo study --{flag}`" for flag in ("jobs", "ray", "run")},  # it draws; the study trains
    "train --name": "`zoo train NAME`",
    "import --name": "--save",
    "pull --name": "--save",
    "verify --partition": "--valid",
}

run = command_line(
    "zoo", "Make and keep trained frame classifiers: train, search, register, verify.", COMMANDS, RENAMED
)
