"""What the words of a breeding command mean, and how its results are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo._console import print_json, print_table
from zoo.cli.keeping import spec_data
from zoo.training.recipe import Recipe

if TYPE_CHECKING:
    from zoo.checkpoint import Checkpoint
    from zoo.data.frames import FrameSet
    from zoo.logs import Log
    from zoo.models.spec import Spec
    from zoo.registry import Registry
    from zoo.search.sample import Samples

_CONTEXT = 20  # frames on each side where nothing else is said, as in the lecture
_FEATURES = 27  # per frame of the home task, for which specs are drawn
_SIZES = ("width", "narrow", "widths", "depth")


# ---- from words to values


def recipe_of(base: Recipe, flags: Recipe) -> Recipe:
    """The recipe with the fields that were given as flags in place of its own."""
    given = {name: value for name, value in vars(flags).items() if value is not None}
    return replace(base, **given)


def frames_of(corpus: Path | None, partition: str) -> FrameSet:
    """A partition of a corpus, or of the bundled one."""
    from zoo.data.corpus import read_corpus, sample_corpus

    return sample_corpus(partition) if corpus is None else read_corpus(corpus, partition)


def spec_of(
    text: str | None, context: int | None, option: tuple[str, ...], frames: FrameSet, base: Spec | None = None
) -> Spec:
    """The spec that `text` names, or `base`, with the context and the options that are given in place of its own."""
    found = _named(text, frames, base)
    return replace(
        found,
        context=found.context if context is None else context,
        options={**found.options, **options_of(option)},
    )


def _named(text: str | None, frames: FrameSet, base: Spec | None) -> Spec:
    """A whole spec as it is written; an architecture for these frames, or in place of that of `base`."""
    from zoo.models.spec import Spec

    if text is None:
        if base is None:
            msg = "expected --spec with an architecture or a spec, or --from with a registered model"
            raise ValueError(msg)
        return base
    if text.lstrip().startswith("{") or Path(text).suffix in (".json", ".toml"):
        return Spec.from_dict(spec_data(text))
    if base is None:
        return Spec(text, frames.features.shape[1], _CONTEXT, len(frames.classes))
    return base if text == base.architecture else replace(base, architecture=text, options={})


def options_of(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE with the value as JSON where it is JSON, else as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            msg = f"expected an option as NAME=VALUE, got {pair!r}"
            raise ValueError(msg)
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def recorded(registry: Registry, reference: str) -> tuple[Spec, Recipe]:
    """Spec and recipe of a registered model."""
    entry = registry.get(reference)
    if entry.recipe is None:
        msg = f"expected a model with a recipe, but {entry.reference} has none; give --spec and --recipe"
        raise ValueError(msg)
    return entry.spec, Recipe.from_dict(entry.recipe)


def log_of(wandb: str | None, tensorboard: Path | None) -> Log:
    """All trackers that were asked for."""
    from zoo.logs import Several, TensorBoard, Wandb

    project: list[Log] = [] if wandb is None else [Wandb(wandb)]
    return Several(*project, *([] if tensorboard is None else [TensorBoard(tensorboard)]))


def checkpoints_of(registry: Registry, sources: tuple[str, ...]) -> list[Checkpoint]:
    """Those of all sources: of a run's folder in the order of its epochs, of a file, or of a name in the registry.

    Raises:
        ValueError: fewer than two, of which there is no mean.
    """
    found = [one for source in sources for one in _checkpoints_at(registry, source)]
    if len(found) < 2:
        msg = (
            f"expected at least 2 checkpoints to average, got {len(found)} from {' '.join(sources) or 'no source'}; "
            f"a run keeps its last epoch alone, zoo train --keep 0 keeps all of them and --keep 5 the last five"
        )
        raise ValueError(msg)
    return found


def _checkpoints_at(registry: Registry, source: str) -> list[Checkpoint]:
    from zoo.checkpoint import read

    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("epoch-*.safetensors"))
        if not files:
            msg = f"expected epoch-*.safetensors in {path}, found none; train with --keep 0 to keep every epoch"
            raise ValueError(msg)
        return [read(file) for file in files]
    return [read(path)] if path.is_file() else [registry.checkpoint(source)]


@dataclass(frozen=True)
class Draw:
    """What `zoo search` draws at random: the words of its flags.

    Args:
        budget: parameters of a model, or of all members together.
        members: of an ensemble; 0 for single models.
        count: of single models.
        architectures: names or wildcards; the built-in ones if empty.
        contexts: to choose from.
        options: fixed ones.
        seed: of the draw.
    """

    budget: int
    members: int
    count: int
    architectures: tuple[str, ...]
    contexts: tuple[int, ...]
    options: Mapping[str, Any]
    seed: int

    def specs(self) -> list[Spec]:
        """Specs under the budget: for an ensemble, or single ones."""
        from zoo.search.sample import random_budget, random_members

        settings: dict[str, Any] = {
            "architectures": self.architectures or None,
            "contexts": self.contexts,
            "options": self.options,
            "seed": self.seed,
        }
        if self.members:
            return random_members(self.budget, self.members, **settings)
        return list(islice(random_budget(self.budget, **settings), self.count))

    def samples(self, count: int) -> Samples:
        """Many draws of an mlp, layer by layer, for a picture.

        Raises:
            ValueError: a draw of something else.
        """
        from zoo.search.sample import draw_many

        if self.members or not set(self.architectures) <= {"mlp"} or len(self.contexts) != 1:
            msg = (
                f"--picture is of single models of architecture mlp and one context, got --members {self.members}, "
                f"architectures {self.architectures} and contexts {self.contexts}; leave the others out"
            )
            raise ValueError(msg)
        inputs = (2 * self.contexts[0] + 1) * _FEATURES
        per_unit = 2 if self.options.get("batchnorm", True) else 1
        return draw_many(count, self.budget, inputs=inputs, per_unit=per_unit, seed=self.seed)


# ---- from values to words


def tell_specs(specs: list[Spec], as_json: bool) -> None:
    """A table of specs with their parameters, or JSON."""
    from zoo.models.spec import fast_count

    counts = [fast_count(spec) for spec in specs]
    if as_json:
        print_json(
            {
                "specs": [
                    {"spec": spec.to_dict(), "parameters": count} for spec, count in zip(specs, counts, strict=True)
                ],
                "parameters": sum(counts),
            }
        )
        return
    rows = [
        {
            "architecture": spec.architecture,
            "context": spec.context,
            "parameters": count,
            "options": " ".join(f"{key}={spec.options[key]}" for key in _SIZES if key in spec.options),
        }
        for spec, count in zip(specs, counts, strict=True)
    ]
    total = {"architecture": "together", "context": None, "parameters": sum(counts), "options": ""}
    print_table([*rows, total], formats={"parameters": ","})


def tell_metrics(checkpoint: Checkpoint, as_json: bool) -> None:
    """The figures of a checkpoint."""
    metrics: Mapping[str, Any] = {name: figure["value"] for name, figure in checkpoint.metrics.items()}
    if as_json:
        print_json(dict(metrics))
    else:
        print_table([metrics], formats=dict.fromkeys(metrics, ".4f"))


def cell(value: Any) -> Any:
    """None for what pandas calls missing."""
    return None if value is None or value != value else value


def save_picture(axes: Any, path: Path) -> None:
    """Write the figure that axes belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=150)
    print(f"wrote {path}", file=sys.stderr)
