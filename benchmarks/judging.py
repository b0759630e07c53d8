"""What to believe of a report: coverage of intervals, optimism of choices, ties, temperatures.

Takes the members of a registry and what they say about the bundled corpus, or about one in the HW1P2 layout, and
treats the judged recordings as the whole world: samples of them are drawn whose true gain is then known.

    python benchmarks/judging.py --registry registry.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import ensemble
import zoo

Floats = NDArray[np.float64]
_ONLY_AS_MANY = 40  # recordings in a sample
_TRIED = ("log_mean", "majority", "maximum", "mean", "median", "minimum", "power_mean", "product")


def main() -> None:
    """Print the four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", default="registry.json")
    parser.add_argument("--corpus", help="folder with the partitions valid and test; the bundled speech if left out")
    parser.add_argument("--trials", type=int, default=400)
    given = parser.parse_args()
    members = ensemble.load(zoo.Registry(given.registry), ["*"])

    def said(partition: str) -> ensemble.MemberOutputs:
        frames = zoo.sample_corpus(partition) if given.corpus is None else zoo.read_corpus(given.corpus, partition)
        return ensemble.collect(members, frames)

    valid, test = said("valid"), said("test")
    for title, rows in (
        ("coverage of nominal 95 % intervals of the mean's gain", coverage(valid, test, given.trials)),
        ("what a choice promises where it was made, and what it keeps", list(optimism(test, given.trials // 20))),
        ("who breaks ties of the majority", list(ties(test))),
        ("log-loss with temperatures fitted on valid, judged on test", list(temperatures(valid, test))),
    ):
        print(f"\n{title}")
        zoo.print_table(rows)


def coverage(valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs, trials: int) -> list[dict[str, object]]:
    """How often intervals from samples of recordings hold the gain over all of them."""
    single = ensemble.evaluate(valid, {}, replicates=1).baseline
    labels = test.require_labels()
    right = test.probabilities.mean(dim=0).argmax(dim=1) == labels
    alone = test.subset([single]).probabilities[0].argmax(dim=1) == labels
    gain = (right.double() - alone.double()).numpy()
    groups, truth = _recordings(test), float(gain.mean())
    rng, hits, widths = np.random.default_rng(0), np.zeros(3), np.zeros(3)
    for _ in range(trials):
        picks = rng.integers(len(groups), size=_ONLY_AS_MANY)
        values = np.concatenate([gain[groups[pick]] for pick in picks])
        where = np.repeat(np.arange(_ONLY_AS_MANY), [len(groups[pick]) for pick in picks])
        for row, found in enumerate(
            (
                ensemble.bootstrap_interval(values, np.arange(len(values)), replicates=200),
                ensemble.bootstrap_interval(values, where, replicates=1000),
                ensemble.t_interval(values, where),
            )
        ):
            hits[row] += found.low <= truth <= found.high
            widths[row] += 100 * (found.high - found.low)
    names = ("bootstrap of frames", "bootstrap of recordings", "Student's t of recordings")
    return [
        {"interval": name, "covers": round(hit / trials, 3), "width, points": round(width / trials, 2)}
        for name, hit, width in zip(names, hits, widths, strict=True)
    ]


def optimism(test: ensemble.MemberOutputs, trials: int) -> Iterator[dict[str, object]]:
    """Choose or fit on one half of the recordings, judge on both halves; means over random halves."""
    sums: dict[str, list[tuple[float, float]]] = {}
    rng = np.random.default_rng(0)
    groups = _recordings(test)
    for _ in range(trials):
        halves = [_part(test, groups, half) for half in np.array_split(rng.permutation(len(groups)), 2)]
        for here, there in (halves, halves[::-1]):  # both ways, so that easy halves cancel out
            for what, pair in _promised_and_kept(here, there).items():
                sums.setdefault(what, []).append(pair)
    for what, pairs in sums.items():
        promised, kept = np.mean(pairs, axis=0)
        yield {"chosen": what, "promised": round(promised, 3), "kept": round(kept, 3)}


def _promised_and_kept(here: ensemble.MemberOutputs, there: ensemble.MemberOutputs) -> dict[str, tuple[float, float]]:
    """Choices and weights made here, judged here and there."""
    rules = {name: ensemble.get_rule(name) for name in _TRIED}
    rules["weighted"] = ensemble.WeightedMean(tuple(ensemble.fit_weights(here).weights))
    first, second = (ensemble.evaluate(half, rules, replicates=1) for half in (here, there))
    assert first.best is not None
    chosen = {
        "best single member, accuracy %": (first.baseline, "accuracy", 100),
        f"best of {len(rules)} rules, accuracy %": (first.best, "accuracy", 100),
        "fitted weights, accuracy %": ("weighted", "accuracy", 100),
        "fitted weights, log-loss nats": ("weighted", "log_loss", 1),
    }
    tables = [pd.concat([report.members, report.rules]).set_index("name") for report in (first, second)]
    return {
        what: (scale * float(tables[0][column][name]), scale * float(tables[1][column][name]))
        for what, (name, column, scale) in chosen.items()
    }


def ties(test: ensemble.MemberOutputs) -> Iterator[dict[str, object]]:
    """The majority with ties to the higher mean, and with ties to the lowest class index as elsewhere."""
    for count in range(2, len(test.members) + 1):
        part = test.subset(test.members[:count])
        p, labels = part.probabilities, part.require_labels()
        votes = torch.nn.functional.one_hot(p.argmax(dim=-1), p.shape[-1]).sum(dim=0)
        lowest = (votes.argmax(dim=-1) == labels).double().mean()
        ours = (ensemble.majority(p).argmax(dim=-1) == labels).double().mean()
        yield {
            "members": count,
            "ties %": round(100 * ensemble.tie_rate(p), 2),
            "to the mean %": round(100 * float(ours), 2),
            "to the lowest index %": round(100 * float(lowest), 2),
        }


def temperatures(valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs) -> Iterator[dict[str, object]]:
    """Rules as they come, and with one temperature after them."""
    rules = {"mean": ensemble.mean, "log_mean": ensemble.log_mean, "product": ensemble.product}
    rules |= {"majority": ensemble.majority, "maximum": ensemble.maximum}
    warm: dict[str, ensemble.Rule] = {}
    found: dict[str, float] = {}
    for name, rule in rules.items():
        fit = ensemble.fit_temperature(valid, rule=rule)
        assert isinstance(fit.value, float)
        warm[name] = ensemble.Chain((rule, ensemble.Temperature(fit.value)))
        found[name] = fit.value
    before, after = (ensemble.evaluate(test, part, replicates=1).rules.set_index("name") for part in (rules, warm))
    for name, value in found.items():
        cold, tempered = before.loc[name], after.loc[name]
        yield {
            "rule": name,
            "temperature": round(value, 3),
            "log-loss before": round(cold["log_loss"], 4),
            "log-loss after": round(tempered["log_loss"], 4),
            "calibration error before": round(cold["calibration_error"], 4),
            "calibration error after": round(tempered["calibration_error"], 4),
        }


def _recordings(outputs: ensemble.MemberOutputs) -> list[NDArray[np.int64]]:
    """Frames of each recording."""
    assert outputs.groups is not None
    groups = outputs.groups.numpy()
    return [np.flatnonzero(groups == group) for group in np.unique(groups)]


def _part(
    outputs: ensemble.MemberOutputs, groups: list[NDArray[np.int64]], picks: NDArray[np.int64]
) -> ensemble.MemberOutputs:
    frames = torch.from_numpy(np.concatenate([groups[pick] for pick in picks]))
    assert outputs.groups is not None
    return ensemble.MemberOutputs(
        outputs.log_probabilities[:, frames],
        outputs.members,
        outputs.classes,
        labels=outputs.require_labels()[frames],
        groups=outputs.groups[frames],
    )


if __name__ == "__main__":
    main()
