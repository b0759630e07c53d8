"""Make and keep single models: architectures, frames, training, a registry of checkpoints.

Names are resolved on first use (PEP 562), so listing a registry does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.architectures import architecture, list_architectures
    from zoo.audio import mask, mfcc, mfcc_file, read_audio, resample
    from zoo.averaging import average, losses_along
    from zoo.checkpoint import Checkpoint, CheckpointError
    from zoo.corpus import PHONEMES, CorpusError, read_corpus, sample_corpus, write_corpus
    from zoo.devices import usable_device
    from zoo.durable import write as write_file
    from zoo.exchange import export, from_pretrained, import_folder, pull, push
    from zoo.frames import FrameSet, Stretch, stretch, windows
    from zoo.logs import JsonLines, Log, TensorBoard, Wandb, read_runs
    from zoo.pictures import plot_depths, plot_line, plot_samples, plot_widths
    from zoo.recipe import Recipe
    from zoo.registry import EnsembleEntry, Entry, Registry, RegistryError
    from zoo.search import Samples, draw_many, fast_count, grid, random_budget, random_grid, random_members
    from zoo.spec import Spec, build, count_parameters
    from zoo.study import Trial, free_dead, halving, optuna_study, optuna_trials, trials_table
    from zoo.terminal import print_json, print_table, progress, run_app
    from zoo.training import Group, TrainingError, seconds_per_step, single, train, train_group

__all__ = [
    "PHONEMES",
    "Checkpoint",
    "CheckpointError",
    "CorpusError",
    "EnsembleEntry",
    "Entry",
    "FrameSet",
    "Group",
    "JsonLines",
    "Log",
    "Recipe",
    "Registry",
    "RegistryError",
    "Samples",
    "Spec",
    "Stretch",
    "TensorBoard",
    "TrainingError",
    "Trial",
    "Wandb",
    "architecture",
    "average",
    "build",
    "count_parameters",
    "draw_many",
    "export",
    "fast_count",
    "free_dead",
    "from_pretrained",
    "grid",
    "halving",
    "import_folder",
    "list_architectures",
    "losses_along",
    "mask",
    "mfcc",
    "mfcc_file",
    "optuna_study",
    "optuna_trials",
    "plot_depths",
    "plot_line",
    "plot_samples",
    "plot_widths",
    "print_json",
    "print_table",
    "progress",
    "pull",
    "push",
    "random_budget",
    "random_grid",
    "random_members",
    "read_audio",
    "read_corpus",
    "read_runs",
    "resample",
    "run_app",
    "sample_corpus",
    "seconds_per_step",
    "single",
    "stretch",
    "train",
    "train_group",
    "trials_table",
    "usable_device",
    "windows",
    "write_corpus",
    "write_file",
]


def __getattr__(name: str) -> Any:
    match name:
        case "architecture" | "list_architectures":
            from zoo import architectures

            return getattr(architectures, name)
        case "average" | "losses_along":
            from zoo import averaging

            return getattr(averaging, name)
        case "Checkpoint" | "CheckpointError":
            from zoo import checkpoint

            return getattr(checkpoint, name)
        case "mask" | "mfcc" | "mfcc_file" | "read_audio" | "resample":
            from zoo import audio

            return getattr(audio, name)
        case "PHONEMES" | "CorpusError" | "read_corpus" | "sample_corpus" | "write_corpus":
            from zoo import corpus

            return getattr(corpus, name)
        case "usable_device":
            from zoo import devices

            return devices.usable_device
        case "write_file":
            from zoo import durable

            return durable.write
        case "export" | "from_pretrained" | "import_folder" | "pull" | "push":
            from zoo import exchange

            return getattr(exchange, name)
        case "FrameSet" | "Stretch" | "stretch" | "windows":
            from zoo import frames

            return getattr(frames, name)
        case "JsonLines" | "Log" | "TensorBoard" | "Wandb" | "read_runs":
            from zoo import logs

            return getattr(logs, name)
        case "Trial" | "free_dead" | "halving" | "optuna_study" | "optuna_trials" | "trials_table":
            from zoo import study

            return getattr(study, name)
        case "plot_depths" | "plot_line" | "plot_samples" | "plot_widths":
            from zoo import pictures

            return getattr(pictures, name)
        case "Recipe":
            from zoo import recipe

            return getattr(recipe, name)
        case "Group" | "TrainingError" | "seconds_per_step" | "single" | "train" | "train_group":
            from zoo import training

            return getattr(training, name)
        case "EnsembleEntry" | "Entry" | "Registry" | "RegistryError":
            from zoo import registry

            return getattr(registry, name)
        case "Samples" | "draw_many" | "fast_count" | "grid" | "random_budget" | "random_grid" | "random_members":
            from zoo import search

            return getattr(search, name)
        case "Spec" | "build" | "count_parameters":
            from zoo import spec

            return getattr(spec, name)
        case "print_json" | "print_table" | "progress" | "run_app":
            from zoo import terminal

            return getattr(terminal, name)
    msg = f"module 'zoo' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
