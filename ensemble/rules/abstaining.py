"""Members that abstain, by a row of NaN: what a rule makes of those who speak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensemble.rules.among import Among
from ensemble.rules.fitted import BayesVote, Chain, ClasswiseMean, LogPool, Stacked, Temperature, WeightedMean
from ensemble.rules.table import Rule, members_first, on_arrays


def abstentions(probabilities: Tensor) -> Tensor:
    """(M,) int64: on how many frames each member abstains, that is, has a NaN in its row."""
    return members_first(probabilities).isnan().any(dim=-1).sum(dim=-1)


def abstaining(rule: Rule) -> Rule:
    """The same rule, for members that may abstain on a frame by a row of NaN.

    - A rule of the table combines those who speak as if there were no others.
    - `WeightedMean` renormalises the weights of those who speak.
    - Other rules with numbers per member hear, in a silent member's place, the mean of those who speak.
    - Where nobody speaks, all classes are equal.

    `evaluate` does this by itself for outputs that declare abstentions.

    Args:
        rule: where nobody abstains, it answers as before.

    Example:
        >>> from ensemble import mean
        >>> p = torch.tensor([[[0.9, 0.1], [0.7, 0.3]], [[torch.nan, torch.nan], [0.1, 0.9]]])
        >>> abstaining(mean)(p)
        tensor([[0.9000, 0.1000],
                [0.4000, 0.6000]])
    """
    match rule:
        case Abstaining() | Temperature():  # a temperature hands NaN on to the next step of its chain
            return rule
        case WeightedMean():
            return replace(rule, abstain=True)
        case Among():
            return replace(rule, rule=abstaining(rule.rule))
        case Chain():
            return Chain(tuple(abstaining(step) for step in rule.steps))
    return Abstaining(rule)


@dataclass(frozen=True)
class Abstaining:
    """What `abstaining` makes of a rule that cannot do with NaN itself."""

    rule: Rule

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        return on_arrays(self._combine)(probabilities)

    @property
    def fingerprint(self) -> str:
        """Of the frames that the rule was fitted on."""
        return str(getattr(self.rule, "fingerprint", ""))

    def _combine(self, probabilities: Tensor) -> Tensor:
        silent = probabilities.isnan().any(dim=-1)  # (M, N)
        if not silent.any():
            return self.rule(probabilities)
        numbered = isinstance(self.rule, BayesVote | ClasswiseMean | LogPool | Stacked)
        combine: Callable[..., Tensor] = _filled_in if numbered else _by_number_of_speakers
        rows = combine(self.rule, probabilities, silent)
        return rows.masked_fill(silent.all(dim=0)[:, None], 1 / rows.shape[-1])


def _by_number_of_speakers(rule: Rule, probabilities: Tensor, silent: Tensor) -> Tensor:
    """Line up those who speak, in their order; frames with as many speakers are combined together."""
    order = silent.int().argsort(dim=0, stable=True)  # (M, N)
    lined_up = probabilities.gather(0, order[..., None].expand_as(probabilities))
    speakers = (~silent).sum(dim=0)  # (N,)
    rows = torch.empty_like(probabilities[0])
    for count in range(1, len(probabilities) + 1):
        frames = speakers == count
        if frames.any():
            rows[frames] = rule(lined_up[:count, frames])
    return rows


def _filled_in(rule: Rule, probabilities: Tensor, silent: Tensor) -> Tensor:
    """Every member says something: the silent ones what the others say on the mean."""
    mean = WeightedMean((1.0,) * len(probabilities), abstain=True)(probabilities)
    return rule(torch.where(silent[..., None], mean, probabilities))
