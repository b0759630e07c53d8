"""Which members to combine: under a budget, greedily, and what each of them contributes."""

from ensemble.selection.budget import Selection, pareto_front, select
from ensemble.selection.contribution import Contributions, contributions
from ensemble.selection.stepwise import GreedySelection, greedy

__all__ = [
    "Contributions",
    "GreedySelection",
    "Selection",
    "contributions",
    "greedy",
    "pareto_front",
    "select",
]
