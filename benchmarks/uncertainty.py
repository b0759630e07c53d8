"""What an ensemble does not know: which frames to reject, and how often sets of classes hold the true one.

Runs the members of a registry on the bundled corpus, and draws made-up recordings that differ strongly.

    python -m benchmarks.uncertainty [--pictures docs/pictures]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

import ensemble
import zoo
from ensemble.fit import fit_prediction_sets
from ensemble.judge.rejection import REJECTION_SCORES, Evidence
from zoo import _console

Floats = NDArray[np.float64]
_RECORDINGS = (9, 11, 15, 19, 30, 49, 99, 199)


def main() -> None:
    """Print the tables, or write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", type=Path, default=Path("registry.json"))
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write the pictures of docs/uncertainty.md here"
    )
    given = parser.parse_args()
    valid, test = collected(given.registry)
    if given.pictures is not None:
        write_pictures(given.pictures, valid, test)
        return
    for title, rows in (
        ("entropy of the members' mean on test, nats", split(test)),
        ("which frames to reject, on test", rejection(valid, test)),
        ("thresholds for a risk of 5 % of the mean, chosen on valid, on test", thresholds(valid, test)),
        ("sets of the mean, fitted on valid, judged on test", sets(valid, test)),
        ("sets to cover 90 %, of made-up recordings: coverage of new ones, per cent", simulation()),
        ("sets to cover 90 %, fitted on some of the 22 voices of valid and test", voices(valid, test)),
    ):
        print(f"\n{title}")
        _console.show([_console.Table([*rows])])


def collected(registry: Path) -> tuple[ensemble.MemberOutputs, ensemble.MemberOutputs]:
    """Outputs of all members on the bundled speech, to fit on and to judge on."""
    members = ensemble.load(zoo.Registry(registry), ["*"])
    valid, test = (ensemble.collect(members, zoo.sample_corpus(part)) for part in ("valid", "test"))
    return valid, test


def write_pictures(folder: Path, valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs) -> None:
    """The pictures of docs/uncertainty.md."""
    drawn = {
        "risk-coverage": ensemble.judge.risk_coverage(test, ensemble.mean, replicates=1).figure(),
        "sets-by-class": fit_prediction_sets(valid, ensemble.mean, 0.9).judge(test).figure(),
        "sets-simulated": picture([*simulation()]),
    }
    folder.mkdir(exist_ok=True)
    for name, ax in drawn.items():
        ax.get_figure(root=True).savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")


def split(test: ensemble.MemberOutputs) -> Iterator[dict[str, object]]:
    """Mean parts of the uncertainty, of all frames and of those where the mean is right and wrong."""
    parts = ensemble.judge.uncertainty(test.probabilities)
    right = ensemble.mean(test.probabilities).argmax(dim=1) == test.require_labels()
    for name, frames in (("all", right | True), ("right", right), ("wrong", ~right)):
        means = {part: float(getattr(parts, part)[frames].mean()) for part in ("total", "aleatoric", "epistemic")}
        yield {"frames": name} | {part: round(value, 3) for part, value in means.items()}


def thresholds(valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs) -> Iterator[dict[str, object]]:
    """What a score's threshold keeps of other frames, and at what risk."""
    rows = ensemble.mean(test.probabilities)
    wrong = (rows.argmax(dim=1) != test.require_labels()).numpy()
    assert test.groups is not None
    for row in ensemble.judge.risk_coverage(valid, ensemble.mean).scores.to_dict("records"):
        kept = (REJECTION_SCORES[row["name"]](Evidence(rows, test.probabilities)) >= row["threshold"]).numpy()
        risk = ensemble.judge.bootstrap_interval(wrong[kept], test.groups.numpy()[kept])
        yield {
            "score": row["name"],
            "threshold": f"{row['threshold']:.4f}",
            "kept, %": f"{100 * kept.mean():.1f}",
            "risk, %": _interval(risk.estimate, risk.low, risk.high),
        }


def rejection(valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs) -> Iterator[dict[str, object]]:
    """Every score, for a few rules."""
    rules: dict[str, ensemble.Rule] = {
        "mean": ensemble.mean,
        "majority": ensemble.majority,
        "calibrated": ensemble.fit.calibrated(valid),
    }
    for rule, given in rules.items():
        found = ensemble.judge.risk_coverage(test, given)
        for row in found.scores.to_dict("records"):
            yield {
                "rule": rule,
                "score": f"{row['name']}{' (best)' * (row['name'] == found.best)}",
                "AURC": f"{row['aurc']:.4f}",
                "AUGRC": f"{row['augrc']:.4f}",
                "above the best": f"{row['behind']:.4f} ({row['behind_low']:.4f} to {row['behind_high']:.4f})",
                "coverage at 5 % risk, %": _interval(*(row[f"coverage{end}"] for end in ("", "_low", "_high"))),
            }


def sets(valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs) -> Iterator[dict[str, object]]:
    """Both scores at three coverages."""
    for coverage in (0.9, 0.95, 0.98):
        for score in ("lac", "aps"):
            found = fit_prediction_sets(valid, ensemble.mean, coverage, score=score).judge(test)
            mean, classes = found.recordings, found.classes
            yield {
                "asked, %": round(100 * coverage),
                "score": score,
                "covers, %": _interval(mean.estimate, mean.low, mean.high),
                "classes in a set": f"{found.size.estimate:.2f}",
                "one class, %": f"{100 * found.single:.1f}",
                "none, %": f"{100 * found.empty:.1f}",
                "least covered phoneme, %": f"{100 * classes['coverage'].min():.1f}",
            }


def simulation(trials: int = 400) -> Iterator[dict[str, object]]:
    """Coverage of new recordings by sets that were fitted on K, and by those that take all frames as exchangeable.

    The log-odds of the true class are the recording's own effect plus a spread within, each of standard deviation one
    (or the second .2); where long recordings are easier, their length is 20 exp(effect) frames.
    """
    generator = np.random.default_rng(0)
    for K in _RECORDINGS:
        row: dict[str, object] = {"recordings": K}
        for title, within, easier in (("any length", 0.2, False), ("long ones easier", 1.0, True)):
            covered = np.array([_one_trial(generator, K, within, easier) for _ in range(trials)])
            for name, values in zip(("ours", "naive"), covered.T, strict=True):
                error = 100 * values.std() / math.sqrt(trials)
                row[f"{name}, {title}"] = f"{100 * values.mean():.1f} +- {2 * error:.1f}"
        yield row


def _one_trial(generator: np.random.Generator, recordings: int, within: float, easier: bool) -> list[float]:
    """Mean coverage of 30 new recordings, ours and naive."""

    def draw(count: int) -> tuple[Floats, NDArray[np.int64]]:
        effect, other = generator.normal(size=(2, count))
        frames = np.clip(20 * np.exp(effect if easier else other), 2, 200).astype(int)
        groups = np.repeat(np.arange(count), frames)
        p = 1 / (1 + np.exp(-effect[groups] - within * generator.normal(size=len(groups))))
        return np.stack([p, 1 - p], axis=1), groups

    rows, groups = draw(recordings)
    fitting = ensemble.MemberOutputs.from_probabilities({"a": rows}, labels=np.zeros(len(rows), int), groups=groups)
    rows, groups = draw(30)
    return _coverages(fitting, rows, groups, np.zeros(len(rows), int))[:2]


def _coverages(
    fitting: ensemble.MemberOutputs, rows: Floats, groups: NDArray[np.int64], labels: NDArray[np.int64]
) -> list[float]:
    """By recording, of sets that are fitted with the groups and without them; then the mean sizes of both."""
    found = [fit_prediction_sets(each, ensemble.mean).sets(rows) for each in (fitting, replace(fitting, groups=None))]
    _, where, frames = np.unique(groups, return_inverse=True, return_counts=True)
    held = [np.bincount(where, each[np.arange(len(rows)), labels]) / frames for each in found]
    return [float(each.mean()) for each in held] + [float(each.sum(axis=1).mean()) for each in found]


def voices(
    valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs, trials: int = 100
) -> Iterator[dict[str, object]]:
    """Fitted on K voices drawn from 22 that no member was trained on, judged on the others; groups are voices."""
    rows = torch.cat([ensemble.mean(each.probabilities) for each in (valid, test)]).numpy()
    labels = torch.cat([valid.require_labels(), test.require_labels()]).numpy()
    frames = [zoo.sample_corpus(part) for part in ("valid", "test")]
    names = np.concatenate([np.array(each.names)[each.groups.numpy()] for each in frames])
    voice = np.unique([name.rpartition("-")[0] for name in names], return_inverse=True)[1]
    generator = np.random.default_rng(0)
    for K in (9, 11, 15):
        found = []
        for _ in range(trials):
            fit = np.isin(voice, generator.permutation(22)[:K])
            fitting = ensemble.MemberOutputs.from_probabilities(
                {"mean": rows[fit]}, labels=labels[fit], groups=voice[fit]
            )
            found.append(_coverages(fitting, rows[~fit], voice[~fit], labels[~fit]))
        ours, naive, size, naive_size = np.mean(found, axis=0)
        yield {
            "voices": K,
            "ours, %": f"{100 * ours:.1f}",
            "classes": f"{size:.2f}",
            "naive, %": f"{100 * naive:.1f}",
            "naive classes": f"{naive_size:.2f}",
        }


def picture(rows: list[dict[str, object]]) -> Any:
    """Coverage of new recordings against the number of recordings fitted on."""
    ax = Figure(figsize=(6.4, 4.2)).add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    K = np.array([int(str(row["recordings"])) for row in rows])
    ax.fill_between(K, 90, 90 + 200 / (K + 1), color="#0b6e99", alpha=0.12, linewidth=0, label="guaranteed")
    ax.axhline(90, color="#999999", linewidth=1, linestyle="--")
    styles = {"ours": ("#0b6e99", "sets by recording"), "naive": ("#b4632f", "frames as exchangeable")}
    for name, (colour, words) in styles.items():
        for title, dash in (("any length", "-"), ("long ones easier", ":")):
            mean, error = np.array([str(row[f"{name}, {title}"]).split(" +- ") for row in rows], dtype=float).T
            ax.errorbar(
                K, mean, error, color=colour, linestyle=dash, marker="o", markersize=3, label=f"{words}, {title}"
            )
    ax.set_xscale("log")
    ax.set_xticks(K, [*map(str, K)])
    ax.minorticks_off()
    ax.set_ylim(50, 101)
    ax.set_xlabel("recordings fitted on")
    ax.set_ylabel("frames of a new recording covered, per cent")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def _interval(estimate: float, low: float, high: float) -> str:
    return f"{100 * estimate:.1f} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main()
