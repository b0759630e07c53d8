"""Run many models as one, combine what they say, and judge whether the combination is better.

Names are resolved on first use (PEP 562), so `ensemble --help` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemble.calibration import (
        PoolTemperatures,
        TemperatureFit,
        brier_score,
        expected_calibration_error,
        fit_bayes_vote,
        fit_pool_temperatures,
        fit_stacked,
        fit_temperature,
        murphy,
    )
    from ensemble.combined import Ensemble, load_ensemble
    from ensemble.cotraining import cotrain, train_alike
    from ensemble.evaluation import (
        Choice,
        Report,
        choose,
        evaluate,
    )
    from ensemble.members import Member, Members, collect, from_modules, load
    from ensemble.outputs import MemberOutputs
    from ensemble.rules import (
        BayesVote,
        Chain,
        ClasswiseMean,
        LogPool,
        Rule,
        Stacked,
        Temperature,
        WeightedMean,
        abstaining,
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
    from ensemble.selection import (
        Contributions,
        GreedySelection,
        Selection,
        contributions,
        greedy,
        pareto_front,
        select,
    )
    from ensemble.significance import (
        Interval,
        bonferroni,
        bootstrap_interval,
        cluster_bootstrap,
        cochran_q,
        holm,
        mcnemar,
        mcnemar_exact,
        right_and_wrong,
        t_interval,
    )
    from ensemble.stack import Stack
    from ensemble.weights import (
        ClasswiseFit,
        CrossFit,
        LogLinearFit,
        SimplexFit,
        WeightFit,
        WeightIntervals,
        bootstrap_weights,
        cross_fit,
        fit_class_weights,
        fit_log_linear,
        fit_simplex_weights,
        fit_weights,
    )

__all__ = [
    "BayesVote",
    "Chain",
    "Choice",
    "ClasswiseFit",
    "ClasswiseMean",
    "Contributions",
    "CrossFit",
    "Ensemble",
    "GreedySelection",
    "Interval",
    "LogLinearFit",
    "LogPool",
    "Member",
    "MemberOutputs",
    "Members",
    "PoolTemperatures",
    "Report",
    "Rule",
    "Selection",
    "SimplexFit",
    "Stack",
    "Stacked",
    "Temperature",
    "TemperatureFit",
    "WeightFit",
    "WeightIntervals",
    "WeightedMean",
    "abstaining",
    "abstentions",
    "bonferroni",
    "bootstrap_interval",
    "bootstrap_weights",
    "borda",
    "brier_score",
    "choose",
    "cluster_bootstrap",
    "cochran_q",
    "collect",
    "contributions",
    "cotrain",
    "cross_fit",
    "evaluate",
    "expected_calibration_error",
    "fit_bayes_vote",
    "fit_class_weights",
    "fit_log_linear",
    "fit_pool_temperatures",
    "fit_simplex_weights",
    "fit_stacked",
    "fit_temperature",
    "fit_weights",
    "from_modules",
    "get_rule",
    "greedy",
    "holm",
    "list_rules",
    "load",
    "load_ensemble",
    "log_mean",
    "majority",
    "maximum",
    "mcnemar",
    "mcnemar_exact",
    "mean",
    "median",
    "minimum",
    "murphy",
    "pareto_front",
    "power_mean",
    "product",
    "right_and_wrong",
    "rule",
    "rule_from_json",
    "rule_to_json",
    "select",
    "t_interval",
    "tie_rate",
    "train_alike",
    "trimmed_mean",
]


def __getattr__(name: str) -> Any:
    match name:
        case "cotrain" | "train_alike":
            from ensemble import cotraining

            return getattr(cotraining, name)
        case "Ensemble" | "load_ensemble":
            from ensemble import combined

            return getattr(combined, name)
        case "Stack":
            from ensemble import stack

            return getattr(stack, name)
        case "Member" | "Members" | "collect" | "from_modules" | "load":
            from ensemble import members

            return getattr(members, name)
        case "MemberOutputs":
            from ensemble import outputs

            return getattr(outputs, name)
        case (
            "BayesVote"
            | "Chain"
            | "ClasswiseMean"
            | "LogPool"
            | "Rule"
            | "Stacked"
            | "Temperature"
            | "WeightedMean"
            | "abstaining"
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
        case "Choice" | "Report" | "choose" | "evaluate":
            from ensemble import evaluation

            return getattr(evaluation, name)
        case (
            "Interval"
            | "bonferroni"
            | "bootstrap_interval"
            | "cluster_bootstrap"
            | "cochran_q"
            | "holm"
            | "mcnemar"
            | "mcnemar_exact"
            | "right_and_wrong"
            | "t_interval"
        ):
            from ensemble import significance

            return getattr(significance, name)
        case (
            "ClasswiseFit"
            | "CrossFit"
            | "LogLinearFit"
            | "SimplexFit"
            | "WeightFit"
            | "WeightIntervals"
            | "bootstrap_weights"
            | "cross_fit"
            | "fit_class_weights"
            | "fit_log_linear"
            | "fit_simplex_weights"
            | "fit_weights"
        ):
            from ensemble import weights

            return getattr(weights, name)
        case (
            "PoolTemperatures"
            | "TemperatureFit"
            | "brier_score"
            | "expected_calibration_error"
            | "fit_bayes_vote"
            | "fit_pool_temperatures"
            | "fit_stacked"
            | "fit_temperature"
            | "murphy"
        ):
            from ensemble import calibration

            return getattr(calibration, name)
        case "Contributions" | "GreedySelection" | "Selection" | "contributions" | "greedy" | "pareto_front" | "select":
            from ensemble import selection

            return getattr(selection, name)
    msg = f"module 'ensemble' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
