"""A `Report` as one self-contained HTML page: the explorer.

The tables are HTML; the figures, and what one can switch, drag and point at, are made by `page.js` from the numbers
that are packed here. No request goes anywhere, and the page's own policy forbids the browser to make one. Names of
members, classes and rules come from outside: they reach the page escaped, and the script as text.

Needs jinja2, which comes with the extra `report`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from ensemble.judge.diversity import plane
from ensemble.judge.excerpt import ABSENT, FINEST, PER_LOG, ZERO, Excerpt, encode
from ensemble.judge.metrics import METRICS, get_metric
from ensemble.judge.reliability import bin_sums, calibration_error
from ensemble.outputs import LEAST

try:
    import jinja2
except ImportError as error:
    msg = "expected jinja2 for pages, found none; install it with: pip install 'zoo-ensemble[report]'"
    raise ImportError(msg) from error

Floats = NDArray[np.float64]

_HOME = Path(__file__).parent
_MOST_MEMBERS, _MOST_CLASSES, _MOST_PAIRS = 64, 60, 100  # shown by the figures, or by the table of pairs
_MOST_RULES = 4  # shown on whole recordings
_MOST_CODES = 180_000  # of the sample, 16 bits each: half a megabyte of text

_Style = tuple[float, str]  # a number is multiplied by the first, and formatted by the second
_TEXT, _PERCENT, _POINTS, _NUMBER, _WHOLE = (0, ""), (100, ".2f"), (100, "+.2f"), (1, ".4f"), (1, ",.0f")
_COLUMNS: dict[str, tuple[str, _Style]] = {  # column of a report's table -> heading, style of its cells
    "calibration_error": ("calibration error %", _PERCENT),
    "parameters": ("parameters", _WHOLE),
    "bytes": ("weights MB", (1e-6, ".2f")),
    "microseconds": ("\u00b5s per frame", (1, ".2f")),
    "memory": ("memory MB", (1e-6, ".1f")),
    "gain": ("gain", _POINTS),
    "gain_low": ("from", _POINTS),
    "gain_high": ("to", _POINTS),
    "mean_gain": ("over mean", _POINTS),
    "mean_gain_low": ("from", _POINTS),
    "mean_gain_high": ("to", _POINTS),
    "loss_gain": ("gain, nats", (1, "+.4f")),
    "loss_gain_low": ("from", (1, "+.4f")),
    "loss_gain_high": ("to", (1, "+.4f")),
    "fitted_here": ("fitted here", _TEXT),
    "fitted_on_training": ("fitted on training frames", _TEXT),
    "optimism": ("optimism nats", _NUMBER),
    "optimism_accuracy": ("optimism points", _POINTS),
    "frames": ("frames", _WHOLE),
    "baseline_accuracy": ("single %", _PERCENT),
    "rule_accuracy": ("rule %", _PERCENT),
    "oracle": ("some member %", _PERCENT),
    "confused_with": ("taken for", _TEXT),
    "confused_share": ("share %", _PERCENT),
    "trust": ("best member", _TEXT),
    "trust_f1": ("its F1 %", _PERCENT),
    "taken_for": ("taken for", _TEXT),
    "share": ("share %", _PERCENT),
    "baseline_share": ("single %", _PERCENT),
    "first": ("first", _TEXT),
    "second": ("second", _TEXT),
    "disagreement": ("disagreement %", _PERCENT),
    "double_fault": ("both wrong %", _PERCENT),
    "q_statistic": ("Q", _NUMBER),
}
_GAIN = ("gain", "gain_low", "gain_high")
_RULES_ONLY = ("mean_gain", "loss_gain", "optimism", "fitted_")  # how the columns of the second table of rules begin


def page(report: Any, *, title: str = "Is the ensemble better?") -> str:
    """A `Report`, whose module stands above this one, as HTML text: one file that needs nothing else."""
    script, style = (_short((_HOME / name).read_text(encoding="utf-8")) for name in ("page.js", "page.css"))
    unit = get_metric(report.metric).unit
    farthest = report.pairs.sort_values("disagreement", ascending=False, kind="stable").head(_MOST_PAIRS)
    further = [name for name in report.rules.columns if name.startswith(("name", *_RULES_ONLY))]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string((_HOME / "page.html.jinja").read_text(encoding="utf-8")).render(
        title=title,
        report=report,
        conclusion=report.conclusion,
        metric=get_metric(report.metric),
        leaders=_leaderboard(report),
        tables={
            "rules": _table(report.rules[further].dropna(axis=1, how="all"), gain=_gain(unit)),
            "classes": _table(report.classes, first="class"),
            "mistakes": _table(report.confusions, first="class"),
            "pairs": _table(farthest),
        },
        most_rules=_MOST_RULES,
        pairs_left_out=len(report.pairs) - len(farthest),
        data=_json(_data(report)) if report.frames else "",
        style=style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return text.lstrip()


def _short(text: str) -> str:
    """A script or a style without indentation and without lines that are comments."""
    return re.sub(r"^ +|^ *//.*\n", "", text, flags=re.MULTILINE)


def _gain(unit: str) -> _Style:
    """The style of gains in a metric of this unit."""
    return _POINTS if unit == "%" else (1, "+.4f")


def _table(table: pd.DataFrame, *, first: str = "name", gain: _Style = _POINTS) -> dict[str, Any]:
    """Headings and rows of text, each with whether it is a number. `first` is the heading of the column `name`."""
    columns = _COLUMNS | {"name": (first, _TEXT)}
    for name, metric in METRICS.items():
        columns[name] = (f"{metric.title} {metric.unit}".strip(), _PERCENT if metric.unit == "%" else _NUMBER)
    for name in [name for name in columns if name.removeprefix("mean_") in _GAIN]:
        columns[name] = (columns[name][0], gain)
    shown = [str(name) for name in table.columns]
    styled = [columns.get(name, (name.replace("_", " "), _NUMBER)) for name in shown]
    rows = [
        [(_cell(value, style), style is not _TEXT) for value, (_, style) in zip(row, styled, strict=True)]
        for row in table.to_numpy(object)
    ]
    return {"heads": [(head, style is not _TEXT) for head, style in styled], "rows": rows}


def _cell(value: Any, style: _Style) -> str:
    """Empty where the value is missing or False."""
    if pd.isna(value) or value is False:
        return ""
    scale, form = style
    return "yes" if value is True else format(scale * value, form) if form else str(value)


def _leaderboard(report: Any) -> dict[str, Any]:
    """Members and rules in one table, the best by the metric first, with where on a common axis their gains lie."""
    shown = [name for name in report.members.columns if name != "abstained" and not name.startswith("gain")]
    both = pd.concat([report.members, report.rules[[name for name in report.rules if name in report.members]]])
    both = both.assign(rule=np.arange(len(both)) >= len(report.members)).reset_index(drop=True)
    metric = get_metric(report.metric)
    both = both.iloc[np.argsort(-metric.goods(both[report.metric].to_numpy(float)), kind="stable")]
    table = _table(both[shown].dropna(axis=1, how="all"))
    ends = both[list(_GAIN)].to_numpy(float)
    least, most = (np.nan_to_num(function(np.append(ends[np.isfinite(ends)], 0.0))) for function in (np.min, np.max))
    percent = 4 + 92 * (ends - least) / (most - least or 1.0)
    same = both["name"].eq(report.baseline) & ~both["rule"]
    gains = [
        [_cell(math.nan if own else value, _gain(metric.unit)) for value in row]
        for own, row in zip(same, ends, strict=True)
    ]
    marks = [
        " ".join(
            ["rule" if row.rule else "member"]
            + ["best"] * (row.rule and row.name == report.best)
            + ["baseline"] * (not row.rule and row.name == report.baseline)
        )
        for row in both[["name", "rule"]].rename_axis("place").reset_index().itertuples(index=False)
    ]
    zero = 4 + 92 * (0.0 - least) / (most - least or 1.0)
    places = [[None if math.isnan(value) else f"{value:.2f}%" for value in row] for row in percent]
    return {
        "heads": table["heads"],
        "rows": list(zip(table["rows"], gains, places, marks, strict=True)),
        "zero": f"{zero:.2f}%",
    }


def _json(data: Any) -> str:
    """JSON that no script element ends in, whatever the names hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _packed(numbers: Any) -> list[Any]:
    """Whole numbers from 0 as [bits of each, Base64 of the least type that holds them, little end first]."""
    array = np.asarray(numbers)
    bits = next(bits for bits in (8, 16, 32) if array.size == 0 or array.max() < 2**bits)
    return [bits, base64.b64encode(array.astype(f"<u{bits // 8}").tobytes()).decode()]


def _rounded(values: Any, digits: int = 6) -> list[Any]:
    """Numbers with this many digits after the point, None where one is missing."""
    array = np.asarray(values, dtype=float)
    return [None if not math.isfinite(value) else round(value, digits) for value in array.tolist()]


def _data(report: Any) -> dict[str, Any]:
    """What the script works on: the numbers of members and rules, the sample, whole recordings, confusions, bins."""
    shown, classes = _shown_members(report), _shown_classes(report)
    M, R = len(report.members), len(report.rules)
    answers = [*shown, *range(M, M + R)]
    tables = [report.members.iloc[shown], report.rules]
    return {
        "classes": list(report.classes["name"]),
        "members": [str(name) for name in tables[0]["name"]],
        "rules": [str(name) for name in report.rules["name"]],
        "membersLeftOut": M - len(shown),
        "baseline": report.baseline,
        "best": report.best,
        "frames": report.frames,
        "recordings": report.recordings,
        "columns": {  # of members, then of rules
            str(name): _rounded(pd.concat([table.get(name, pd.Series(np.nan, table.index)) for table in tables]))
            for name in report.members.columns
            if name != "name" and report.members[name].notna().any()
        },
        "weights": {rule: _rounded([known[m] for m in tables[0]["name"]]) for rule, known in report.weights.items()},
        "sample": _sample(report.sample, shown),
        "bins": _bins(report, answers),
        "confusion": _confusion(report, classes),
        "byClass": {
            "frames": report.classes["frames"].tolist(),
            "right": _packed(np.diagonal(report.confusion[answers], axis1=1, axis2=2)),
            "oracle": _rounded(report.classes["oracle"]),
            "shown": [place for place in classes if report.classes["frames"].iloc[place]],
        },
        "map": _map(report, shown),
        "whole": _whole(report.whole, _best(report, report.rules, _MOST_RULES), shown),
    }


def _shown_members(report: Any) -> list[int]:
    """All members, or of very many the best ones by the metric; the baseline in any case."""
    return sorted({*_best(report, report.members, _MOST_MEMBERS), _judged(report)["baseline"]})


def _best(report: Any, table: pd.DataFrame, most: int) -> list[int]:
    """Of many rows those that are best by the metric, ascending."""
    values = get_metric(report.metric).goods(table[report.metric].to_numpy(float))
    return sorted(np.argsort(-values, kind="stable")[:most].tolist())


def _shown_classes(report: Any) -> list[int]:
    """All classes, or of very many those with the most mistakes of the best rule, or of the baseline."""
    judged = report.confusion[[*_judged(report).values()][-1]]
    wrong = report.classes["frames"].to_numpy() - np.diagonal(judged)
    return sorted(np.argsort(-wrong, kind="stable")[:_MOST_CLASSES].tolist())


def _judged(report: Any) -> dict[str, int]:
    """The baseline and the best rule, or the baseline alone, with their places in `confusion`."""
    rules = report.rules["name"].tolist()
    baseline = {"baseline": report.members["name"].tolist().index(report.baseline)}
    return baseline if report.best is None else baseline | {"best": len(report.members) + rules.index(report.best)}


def _sample(sample: Excerpt, shown: Sequence[int]) -> dict[str, Any]:
    """Per frame of the sample the classes that some weighted mean may prefer, and what each member gives them.

    Of a sample that would be too long, the first frames.
    """
    codes, kept = _coded(sample, shown)
    total = sum(map(len, kept)) * len(shown)
    if total > _MOST_CODES:
        sample = sample.first(len(kept) * _MOST_CODES // total)
        codes, kept = _coded(sample, shown)
    truth, (numbers, where, _) = sample.outputs.require_labels().numpy(), sample.recordings
    picked = [codes[:, frame, each].T for frame, each in enumerate(kept)]  # (K, M) each
    scores = []
    for rows in sample.rules.values():
        found = rows.double().numpy()
        own = found[np.arange(len(truth)), truth]
        loss = -np.log(np.maximum(own, LEAST)).mean() if len(own) else math.nan
        scores.append(_rounded([(found.argmax(axis=1) == truth).mean() if len(own) else math.nan, loss]))
    return {
        "frames": len(truth),
        "recordings": len(numbers),
        "t": _rounded([special.stdtrit(len(numbers) - 1, 0.975)], 9)[0] if len(numbers) > 1 else None,
        "coding": {"zero": ZERO, "absent": ABSENT, "finest": FINEST, "perLog": PER_LOG},
        "abstains": bool((codes == ABSENT).any()),
        "truth": _packed(truth),
        "recording": _packed(where),
        "count": _packed([len(each) for each in kept]),
        "candidates": _packed(np.concatenate([*kept, np.zeros(0, np.int64)])),
        "codes": _packed(np.concatenate([*picked, np.zeros((0, len(shown)), np.uint16)])),
        "rules": scores,
    }


def _coded(sample: Excerpt, shown: Sequence[int]) -> tuple[NDArray[np.uint16], list[NDArray[np.int64]]]:
    """(M, N, C) codes of the members shown, and the contenders of each frame."""
    truth = sample.outputs.require_labels().numpy()
    codes = encode(sample.outputs.log_probabilities[list(shown)].numpy())
    return codes, [contenders(codes[:, frame], int(truth[frame])) for frame in range(len(truth))]


def contenders(codes: NDArray[np.uint16], truth: int) -> NDArray[np.int64]:
    """The true class, and all classes that can be the top class of a weighted mean on one frame, ascending.

    The mean of C probabilities that sum to one is at least 1/C for the top class, so some member gives it that much;
    and there is no class that each member gives at least as much, and that comes first where all give the same.

    Args:
        codes: (M, C) of the members' probabilities, the higher the less probable.
        truth: the true class.
    """
    answered = codes[:, 0] != ABSENT
    least = codes[answered].min(axis=0, initial=ABSENT)
    possible = np.flatnonzero(least <= encode(np.array(-math.log(codes.shape[1]))) + 1)
    kept: list[int] = []
    left = possible[np.lexsort((possible, codes[:, possible].sum(axis=0, dtype=np.int64)))]
    while left.size:  # the first is behind none of those left
        kept.append(int(left[0]))
        left = left[~(codes[:, left[:1]] <= codes[:, left]).all(axis=0)]
    return np.array(sorted({*kept, truth}), dtype=np.int64)


def _bins(report: Any, answers: Sequence[int]) -> dict[str, Any]:
    """Frames, confidence and accuracy per bin of each answer: of all frames, and calibrated on the sample."""
    names = [*report.members["name"], *report.rules["name"]]
    size = len(report.reliability) // max(len(names), 1)
    bins = {name: report.reliability[name].to_numpy(float).reshape(len(names), size) for name in
            ("frames", "confidence", "accuracy")}  # fmt: skip
    outputs, members = report.sample.outputs, len(report.members)
    numbers, where, _ = report.sample.recordings
    rules = list(report.sample.rules.values())
    after: list[Any] = [None] * len(answers)
    if len(numbers) > 1:
        for place, answer in enumerate(answers):
            logs = outputs.log_probabilities[answer].exp() if answer < members else rules[answer - members]
            after[place] = _calibrated(logs.double().numpy(), outputs.require_labels().numpy(), where)
    return {name: [_rounded(each[answer], 4) for answer in answers] for name, each in bins.items()} | {"after": after}


def _calibrated(rows: Floats, truth: NDArray[np.int64], where: NDArray[np.int64]) -> dict[str, Any] | None:
    """Bins with a temperature that is fitted on the other half of the recordings; log-losses before and after."""
    known = ~np.isnan(rows).any(axis=1)
    logs, truth, odd = np.log(np.maximum(rows[known], LEAST)), truth[known], where[known] % 2 == 1
    if odd.all() or not odd.any():
        return None
    sharpness = np.where(odd, _sharpness(logs[~odd], truth[~odd]), _sharpness(logs[odd], truth[odd]))
    calibrated = special.softmax(logs * sharpness[:, None], axis=1)
    found = {}
    for name, each in (("before", np.exp(logs)), ("after", calibrated)):
        top = each.argmax(axis=1)
        sums = bin_sums(np.minimum(each.max(axis=1), 1.0), top == truth)
        loss = -np.log(np.maximum(each[np.arange(len(truth)), truth], LEAST)).mean()
        found[name] = [round(calibration_error(sums), 6), round(float(loss), 6)]
    frames, confidence, right = sums
    with np.errstate(invalid="ignore"):
        bins = {"frames": frames.tolist(), "confidence": _rounded(confidence / frames, 4),
                "accuracy": _rounded(right / frames, 4)}  # fmt: skip
    return found | bins | {"temperature": round(float(np.mean(1 / sharpness)), 4)}


def _sharpness(logs: Floats, truth: NDArray[np.int64]) -> float:
    """One over the temperature of least log-loss, by Newton's method inside a shrinking bracket; the loss is convex."""
    low, high, sharpness = 0.02, 50.0, 1.0
    own = logs[np.arange(len(truth)), truth].mean()
    for _ in range(25):
        weights = special.softmax(logs * sharpness, axis=1)
        mean = (weights * logs).sum(axis=1)
        slope, curvature = mean.mean() - own, ((weights * logs**2).sum(axis=1) - mean**2).mean()
        low, high = (low, sharpness) if slope > 0 else (sharpness, high)
        step = sharpness - slope / curvature if curvature > 0 else math.inf
        previous, sharpness = sharpness, step if low < step < high else math.sqrt(low * high)
        if abs(sharpness - previous) < 1e-6:
            break
    return sharpness


def _confusion(report: Any, classes: Sequence[int]) -> dict[str, Any]:
    """Frames by true and predicted class, of the baseline and the best rule, for the classes shown."""
    some = np.ix_(classes, classes)
    judged = _judged(report)
    return {
        "shown": list(classes),
        "answers": [getattr(report, name) for name in judged],
        "frames": [_packed(report.confusion[place][some]) for place in judged.values()],
    }


def _map(report: Any, shown: Sequence[int]) -> dict[str, Any]:
    """Members in the plane, and how often exactly one of two is right, in steps of 1/65,535."""
    M = len(report.members)
    squares = np.zeros((M, M))
    squares[np.triu_indices(M, k=1)] = report.pairs["disagreement"].to_numpy(float) if M > 1 else ()
    squares = (squares + squares.T)[np.ix_(shown, shown)]
    places, share = plane(squares)
    return {
        "x": _rounded(places[:, 0]),
        "y": _rounded(places[:, 1]),
        "share": round(share, 4),
        "disagreement": _packed(np.round(np.nan_to_num(squares) * 65_535)),
    }


def _whole(whole: Excerpt, rules: Sequence[int], shown: Sequence[int]) -> dict[str, Any]:
    """Of a few whole recordings the true classes, and each answer's top class and confidence: rules, then members."""
    outputs = whole.outputs
    numbers, _, sizes = whole.recordings
    every = [*whole.rules.values()]
    rows = [*(every[r].double().numpy() for r in rules),
            *(outputs.log_probabilities[m].double().exp().numpy() for m in shown)]  # fmt: skip
    top, sure = [], []
    for each in rows:
        absent = np.isnan(each).any(axis=1)
        top.append(np.where(absent, len(outputs.classes), np.nan_to_num(each).argmax(axis=1)))
        sure.append(np.round(255 * np.nan_to_num(each).max(axis=1, initial=0)).clip(0, 255))
    return {
        "rules": list(rules),
        "numbers": numbers.tolist(),
        "sizes": sizes.tolist(),
        "truth": _packed(outputs.require_labels().numpy()),
        "top": _packed(np.array(top)),
        "confidence": _packed(np.array(sure)),
    }
