"""Rules: functions from what M members say, (M, N, C) probabilities, to one distribution per frame, (N, C).

A rule is any callable of that shape whose rows sum to one, so argmax, log-loss and calibration serve every
rule alike. Rules without numbers are functions under `@rule`, in `voting` and `pooling`; rules with numbers are
frozen dataclasses in `fitted`; `abstaining` prepares either for members that abstain. Nothing is fitted here.
"""

from ensemble.rules.abstaining import Abstaining, abstaining, abstentions
from ensemble.rules.fitted import BayesVote, Chain, ClasswiseMean, LogPool, Stacked, Temperature, WeightedMean
from ensemble.rules.pooling import log_mean, maximum, mean, median, minimum, power_mean, product, trimmed_mean
from ensemble.rules.saved import rule_from_json, rule_to_json
from ensemble.rules.table import RULES, Rule, get_rule, list_rules, rule
from ensemble.rules.voting import borda, majority, tie_rate

__all__ = [
    "RULES",
    "Abstaining",
    "BayesVote",
    "Chain",
    "ClasswiseMean",
    "LogPool",
    "Rule",
    "Stacked",
    "Temperature",
    "WeightedMean",
    "abstaining",
    "abstentions",
    "borda",
    "get_rule",
    "list_rules",
    "log_mean",
    "majority",
    "maximum",
    "mean",
    "median",
    "minimum",
    "power_mean",
    "product",
    "rule",
    "rule_from_json",
    "rule_to_json",
    "tie_rate",
    "trimmed_mean",
]
