"""Run many models as one, combine what they say, and judge whether the combination is better.

Names are resolved on first use (PEP 562), so `ensemble --help` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemble.outputs import MemberOutputs
    from ensemble.rules import (
        LogPool,
        Rule,
        WeightedMean,
        abstentions,
        borda,
        get_rule,
        list_rules,
        log_mean,
        majority,
        maximum,
        mean,
        median,
        minimum,
        power_mean,
        product,
        rule,
        rule_from_json,
        rule_to_json,
        tie_rate,
        trimmed_mean,
    )

__all__ = [
    "LogPool",
    "MemberOutputs",
    "Rule",
    "WeightedMean",
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


def __getattr__(name: str) -> Any:
    match name:
        case "MemberOutputs":
            from ensemble import outputs

            return getattr(outputs, name)
        case (
            "LogPool"
            | "Rule"
            | "WeightedMean"
            | "abstentions"
            | "borda"
            | "get_rule"
            | "list_rules"
            | "log_mean"
            | "majority"
            | "maximum"
            | "mean"
            | "median"
            | "minimum"
            | "power_mean"
            | "product"
            | "rule"
            | "rule_from_json"
            | "rule_to_json"
            | "tie_rate"
            | "trimmed_mean"
        ):
            from ensemble import rules

            return getattr(rules, name)
    msg = f"module 'ensemble' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
