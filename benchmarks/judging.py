"""How far to trust a report: coverage of intervals, optimism of choices, ties, temperatures.

Runs the members of a registry on the bundled corpus, or on one in the HW1P2 layout, and treats the judged recordings as
the whole population: samples are drawn from it, so that the true gain is known.

    python -m benchmarks.judging --registry registry.json

How many frames one core runs members over and counts, with three rules (docs/scale.md), is printed by

    python -m benchmarks.judging --rate

Two more need no registry: how much memory it takes to judge a store, beyond the store itself (of synthetic members, in
a temporary folder), and how long all pairs of 500 members take:

    python -m benchmarks.judging --memory 1000000
    python -m benchmarks.judging --pairs

The pictures and the example page of docs/judging.md are written by

    python -m benchmarks.judging --pictures docs/pictures
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import ensemble
import ensemble.judge.diversity
import zoo
from benchmarks.contenders import Setting, models_of, paired
from ensemble.judge import best_member
from ensemble.outputs.store import Contents, Store
from zoo import _console

Floats = NDArray[np.float64]
_SAMPLE = 40  # recordings
_TRIED = ("log_mean", "majority", "maximum", "mean", "median", "minimum", "power_mean", "product")


def main() -> None:
    """Print the four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", default="registry.json")
    parser.add_argument("--corpus", help="folder with the partitions valid and test; the bundled speech if left out")
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--memory", type=int, metavar="FRAMES", help="judge 32 members of 40 classes from a store")
    parser.add_argument("--rate", action="store_true", help="run and count frames on one core")
    parser.add_argument("--pairs", action="store_true", help="every pairwise measure of 500 members, 100,000 frames")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the pictures of docs/judging.md here")
    given = parser.parse_args()
    if given.memory or given.pairs:
        _console.show([_console.Table([memory(given.memory)] if given.memory else [pairs()])])
        return
    members = ensemble.load(zoo.Registry(given.registry), ["*"])
    if given.rate:
        _console.show([_console.Table(list(rates(members)))])
        return

    def collected(partition: str) -> ensemble.MemberOutputs:
        frames = zoo.sample_corpus(partition) if given.corpus is None else zoo.read_corpus(given.corpus, partition)
        return ensemble.collect(members, frames)

    valid, test = collected("valid"), collected("test")
    if given.pictures is not None:
        write_pictures(given.pictures, valid, test)
        return
    for title, rows in (
        ("coverage of nominal 95 % intervals of the mean's gain", coverage(valid, test, given.trials)),
        ("figures where a choice was made, and on other recordings", list(optimism(test, given.trials // 20))),
        ("two ways to break ties of the majority", list(ties(test))),
        ("log-loss with temperatures fitted on valid, judged on test", list(temperatures(valid, test))),
    ):
        print(f"\n{title}")
        _console.show([_console.Table(rows)])


def write_pictures(folder: Path, valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs) -> None:
    """The pictures of docs/judging.md, and report.html, the page of the table there."""
    rules = {name: ensemble.get_rule(name) for name in ("majority", "maximum", "mean", "log_mean", "product", "median")}
    rules["weighted"] = ensemble.fit_weights(valid).rule
    report = ensemble.evaluate(test, rules, baseline=best_member(valid))
    folder.mkdir(exist_ok=True)
    for name in ("gains", "map"):
        figure = report.figure(name).get_figure(root=True)
        assert figure is not None
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
    (folder / "report.html").write_text(report.page(), encoding="utf-8")


def coverage(valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs, trials: int) -> list[dict[str, object]]:
    """How often intervals from samples of recordings contain the gain over all recordings."""
    single = best_member(valid)
    labels = test.require_labels()
    right = test.probabilities.mean(dim=0).argmax(dim=1) == labels
    alone = test.subset([single]).probabilities[0].argmax(dim=1) == labels
    gain = (right.double() - alone.double()).numpy()
    groups, truth = _recordings(test), float(gain.mean())
    rng, hits, widths = np.random.default_rng(0), np.zeros(3), np.zeros(3)
    for _ in range(trials):
        picks = rng.integers(len(groups), size=_SAMPLE)
        values = np.concatenate([gain[groups[pick]] for pick in picks])
        where = np.repeat(np.arange(_SAMPLE), [len(groups[pick]) for pick in picks])
        for row, found in enumerate(
            (
                ensemble.judge.bootstrap_interval(values, np.arange(len(values)), replicates=200),
                ensemble.judge.bootstrap_interval(values, where, replicates=1000),
                ensemble.judge.t_interval(values, where),
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
    """Choose or fit on one half of the recordings and judge on both halves; means over random halves."""
    sums: dict[str, list[tuple[float, float]]] = {}
    rng = np.random.default_rng(0)
    groups = _recordings(test)
    for _ in range(trials):
        halves = [_part(test, groups, half) for half in np.array_split(rng.permutation(len(groups)), 2)]
        for here, there in (halves, halves[::-1]):  # both ways, so that the difficulty of the halves cancels out
            for what, pair in _here_and_there(here, there).items():
                sums.setdefault(what, []).append(pair)
    for what, pairs in sums.items():
        here, there = np.mean(pairs, axis=0)
        yield {"chosen": what, "where chosen": round(here, 3), "elsewhere": round(there, 3)}


def _here_and_there(here: ensemble.MemberOutputs, there: ensemble.MemberOutputs) -> dict[str, tuple[float, float]]:
    """Choices and weights made here, judged here and there."""
    rules = {name: ensemble.get_rule(name) for name in _TRIED}
    rules["weighted"] = ensemble.fit_weights(here).rule
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
            "ties %": round(100 * ensemble.rules.tie_rate(p), 2),
            "to the mean %": round(100 * float(ours), 2),
            "to the lowest index %": round(100 * float(lowest), 2),
        }


def temperatures(valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs) -> Iterator[dict[str, object]]:
    """Rules as they are, and with one temperature after them."""
    rules = {"mean": ensemble.mean, "log_mean": ensemble.log_mean, "product": ensemble.product}
    rules |= {"majority": ensemble.majority, "maximum": ensemble.maximum}
    warm: dict[str, ensemble.Rule] = {}
    found: dict[str, float] = {}
    for name, rule in rules.items():
        fit = ensemble.fit.fit_temperature(valid, rule=rule)
        assert isinstance(fit.value, float)
        warm[name] = ensemble.rules.Chain((rule, ensemble.rules.Temperature(fit.value)))
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


def rates(registered: ensemble.Members, repeats: int = 5) -> Iterator[dict[str, object]]:
    """Seconds to run and to count the bundled test recordings on one core, the median of some; each after a first."""
    torch.set_num_threads(1)
    frames, rules = (
        zoo.sample_corpus("test"),
        {name: ensemble.get_rule(name) for name in ("majority", "mean", "log_mean")},
    )
    setting = Setting(torch.device("cpu"), quick=False, ceilings={})
    wide = models_of((8, 512, 4), setting, "float32")[1]
    for name, members in {"those registered": registered, "8 cylinders of 512 x 4": wide}.items():
        own = replace(frames, classes=members.classes)
        (taken,) = paired([partial(ensemble.run.shards.tally, members, own, rules)], repeats=repeats)
        rate = f"{len(members) * len(own) / taken:,.0f}"
        yield {"members": name, "frames": len(own), "seconds": round(taken, 2), "members x frames/s": rate}


def memory(frames: int, *, members: int = 32, classes: int = 40) -> dict[str, object]:
    """Peak anonymous memory while a float16 store is judged, and the speed; on Linux."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (frames,), generator=generator)
    names = tuple(f"m{index}" for index in range(members))
    contents = Contents("synthetic", frames, tuple(map(str, range(classes))), "float32", "float16")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), contents)
        store.add(names)
        for shard in range(store.shards):
            start, stop = store.frames(shard)
            hint = 2 * torch.nn.functional.one_hot(labels[start:stop], classes)
            for name in names:
                noise = torch.randn(stop - start, classes, generator=generator)
                store.put([name], start, (noise + hint).log_softmax(-1).unsqueeze(0))
            store.finish(names, shard)
        outputs = ensemble.MemberOutputs(
            store.read(names), names, contents.classes, labels, torch.arange(frames) // 300, contents.fingerprint
        )
        rules = {name: ensemble.get_rule(name) for name in ("majority", "maximum", "mean", "log_mean")}
        before = _anonymous()
        with _Peak() as peak:
            report = ensemble.evaluate(outputs, rules)
    return {
        "members": members,
        "frames": frames,
        "store, GB": round(outputs.log_probabilities.nbytes / 1e9, 2),
        "anonymous before, GB": round(before, 2),
        "at peak, GB": round(peak.most, 2),
        "frames/s": round(report.frames_per_second),
    }


class _Peak:
    """Peak anonymous memory while a block runs, sampled a hundred times a second."""

    def __init__(self) -> None:
        self.most, self._over = 0.0, threading.Event()
        self._watch = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.most = max(self.most, _anonymous())

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()


def _anonymous() -> float:
    """GB of this process that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


def pairs(members: int = 500, frames: int = 100_000) -> dict[str, object]:
    """Seconds for all measures of all pairs, the best of three."""
    right = np.random.default_rng(0).random((members, frames), dtype=np.float32) < 0.8
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        joint = ensemble.judge.diversity.Joint.of(right)
        for measure in ensemble.judge.diversity.PAIR_MEASURES.values():
            measure(joint)
        seconds.append(time.perf_counter() - began)
    measures = len(ensemble.judge.diversity.PAIR_MEASURES)
    return {"members": members, "frames": frames, "measures": measures, "seconds": round(min(seconds), 2)}


def _recordings(outputs: ensemble.MemberOutputs) -> list[NDArray[np.int64]]:
    """Frames of each recording."""
    assert outputs.groups is not None
    groups = outputs.groups.numpy()
    return [np.flatnonzero(groups == group) for group in np.unique(groups)]


def _part(
    outputs: ensemble.MemberOutputs, groups: list[NDArray[np.int64]], picks: NDArray[np.int64]
) -> ensemble.MemberOutputs:
    return outputs.at(torch.from_numpy(np.concatenate([groups[pick] for pick in picks])))


if __name__ == "__main__":
    main()
