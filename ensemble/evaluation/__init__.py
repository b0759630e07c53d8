"""How good are the members and the rules, and is the gain real? The only door to pandas.

`tally` walks over the frames and keeps sums, `tables` makes tables of them, `verdict` is `evaluate`, `choice`
is `choose`. Nothing is fitted here.
"""

from ensemble.evaluation.choice import Choice, choose
from ensemble.evaluation.verdict import Report, evaluate

__all__ = ["Choice", "Report", "choose", "evaluate"]
