"""`Among`: a rule over some of the members that are judged together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ensemble.rules.table import Rule


@dataclass(frozen=True)
class Among:
    """What a rule says of some of the members, such as those of a saved ensemble among all.

    Args:
        rule: over these members.
        places: theirs among all, in the rule's order.
    """

    rule: Rule
    places: tuple[int, ...]

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine those of (M, N, C) into (N, C)."""
        return self.rule(probabilities[list(self.places)])

    @property
    def fingerprint(self) -> str:
        """Of the frames that the rule was fitted on."""
        return str(getattr(self.rule, "fingerprint", ""))
