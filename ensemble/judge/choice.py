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
        name: the rule's name, or the single member's.
        rule: the rule itself; for a single member, the `WeightedMean` that gives it all the weight.
        behind: each candidate's distance from the best on these frames, in accuracy or nats.
        error: the standard error of that distance, from resampled recordings; NaN for fewer than two.
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
    mostly agree are compared by the frames where they differ. On a single recording, whose spread is unknown, the best
    single member is chosen.

    Args:
        outputs: with labels, of frames that no rule was fitted on; otherwise fitted rules look better than they are.
        rules: name -> rule, in order of preference, from simple to elaborate.
        by: the measure to compare by.
        replicates: number of resamples behind the standard errors.
        seed: of the resampling.

    Raises:
        ValueError: no labels, no frames, an unknown measure, or a rule with the name of a member.

    Example:
        >>> from ensemble import mean
        >>> p, q = [[0.9, 0.1], [0.2, 0.8]], [[0.8, 0.2], [0.4, 0.6]]
        >>> outputs = MemberOutputs.from_probabilities({"a": p, "b": q}, labels=[0, 1])
        >>> choose(outputs, {"mean": mean}).name  # both members are always right: no rule is needed
        'a'

    References:
        Breiman et al., "Classification and regression trees", 1984, section 3.4.3 (one standard error).
    """
    if by not in ("accuracy", "log_loss"):
        msg = f"expected to choose by 'accuracy' or 'log_loss', got {by!r}"
        raise ValueError(msg)
    if taken := [name for name in rules if name in outputs.members]:
        msg = f"expected names for rules that no member has, got {taken}; the best member is a candidate already"
        raise ValueError(msg)
    sums, members = tally(outputs, rules), len(outputs.members)
    if sums.frames == 0:
        msg = "expected frames to choose on, got none"
        raise ValueError(msg)
    single = best(sums, range(members), by=by)
    candidates = [single, *range(members, members + len(rules))]
    goods = (sums.right if by == "accuracy" else -sums.loss)[candidates].T  # (G, 1 + R)
    means = goods.sum(axis=0) / sums.frames
    top = int(means.argmax())
    resampled = cluster_bootstrap(goods, sums.sizes, replicates=replicates, seed=seed)
    behind, error = means[top] - means, (resampled[:, [top]] - resampled).std(axis=0)
    chosen = int(np.argmax(~(behind > error)))  # the single member where the errors are NaN
    alone = WeightedMean(np.eye(members)[single], outputs.fingerprint, members=outputs.members)
    names = [outputs.members[single], *rules]
    return Choice(
        names[chosen],
        [alone, *rules.values()][chosen],
        dict(zip(names, behind.tolist(), strict=True)),
        dict(zip(names, error.tolist(), strict=True)),
    )
