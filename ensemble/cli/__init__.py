"""The command `ensemble`: combine trained models, and judge whether the combination is better."""

from __future__ import annotations

from ensemble.cli import distil, evaluate, fit, predict
from zoo._console import command_line

COMMANDS = (
    *(evaluate.evaluate, evaluate.compare, evaluate.diversity),
    *(fit.fit, fit.select, distil.distil),
    *(predict.predict, predict.export, predict.collect, predict.plan),
)
RENAMED = {"predict --partition": "--test"}  # former spelling -> what to write now

run = command_line(
    "ensemble", "Run trained models as one, combine them, and judge whether it is really better.", COMMANDS, RENAMED
)
