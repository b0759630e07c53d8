"""`choose`: the simplest rule that the frames cannot tell from the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ensemble.judge.significance import cluster_bootstrap
from ensemble.judge.tables import best, tally
from ensemble.outputs import MemberOutputs
from ensemble.rules.fitted import WeightedMean
from ensemble.rules.table import Rule


@dataclass(frozen=True)
class Choice:
    """What `choose` chose, and how the candidates compare.

    Args:
        name: name of the rule, or of the single member.
        rule: the rule itself; a single member is a `WeightedMean` with one weight.
        behind: distance of each candidate from the best on these frames, in accuracy or nats.
        error: standard error of that distance, resampled over recordings; NaN for fewer than two.
    """

    name: str
    rule: Rule
    behind: dict[str, float]
    error: dict[str, float]


def choose(
    outputs: MemberOutputs,
    rules: Mapping[str, Rule],
    *,
    by: Literal["accuracy", "log_loss"] = "accuracy",
    replicates: int = 1000,
    seed: int = 0,
) -> Choice:
    """The first candidate within one standard error of the best: a single member before any rule.

    The distance from the best is paired frame by frame and resampled over recordings, so that candidates which
    mostly agree are compared by the frames where they differ. One recording has no spread to judge a distance by:
    the best single member is chosen there.

    Args:
        outputs: with labels; frames that no rule was fitted on, or fitted rules look better than they are.
        rules: from simple to elaborate; the order is the order of preference.
        by: the measure to compare by.
        replicates: number of resamples behind the standard errors.
        seed: seed of the resampling.

    Raises:
        ValueError: no labels, no frames, an unknown measure, or a rule with the name of a member.

    Example:
        >>> from ensemble import mean
        >>> p, q = [[0.9, 0.1], [0.2, 0.8]], [[0.8, 0.2], [0.4, 0.6]]
        >>> outputs = MemberOutputs.from_probabilities({"a": p, "b": q}, labels=[0, 1])
        >>> choose(outputs, {"mean": mean}).name  # both always right: no rule is needed
        'a'

    References:
        Breiman et al., "Classification and regression trees", 1984, section 3.4.3 (one standard error).
    """
    if by not in ("accuracy", "log_loss"):
        msg = f"expected to choose by 'accuracy' or 'log_loss', got {by!r}"
        raise ValueError(msg)
    if taken := [name for name in rules if name in outputs.members]:
        msg = f"expected names for rules that no member has, got {taken}; every member is a candidate already"
        raise ValueError(msg)
    sums, members = tally(outputs, rules), len(outputs.members)
    if sums.frames == 0:
        msg = "expected frames to choose on, got none"
        raise ValueError(msg)
    best_single = best(sums, range(members), by=by)
    candidates = [best_single, *range(members, members + len(rules))]
    goods = (sums.right if by == "accuracy" else -sums.loss)[candidates].T  # (G, 1 + R)
    totals = goods.sum(axis=0) / sums.frames
    first = int(totals.argmax())
    resampled = cluster_bootstrap(goods, sums.sizes, replicates=replicates, seed=seed)
    error = (resampled[:, [first]] - resampled).std(axis=0)
    behind = totals[first] - totals
    chosen = int(np.argmax(~(behind > error)))  # no distance exceeds NaN
    alone = WeightedMean(np.eye(members)[best_single], outputs.fingerprint, members=outputs.members)
    names = [outputs.members[best_single], *rules]
    return Choice(
        names[chosen],
        [alone, *rules.values()][chosen],
        dict(zip(names, behind.tolist(), strict=True)),
        dict(zip(names, error.tolist(), strict=True)),
    )
