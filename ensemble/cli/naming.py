"""Rules by the names that a command line gives them; what has to be fitted is fitted on validation outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import zoo
    from ensemble.cli.sources import Spoken
    from ensemble.judge.significance import CrossFit
    from ensemble.outputs import MemberOutputs
    from ensemble.rules.fitted import WeightedMean
    from ensemble.rules.table import Rule

FOUR = ("majority", "maximum", "mean", "weighted")


def weighted(valid: MemberOutputs) -> WeightedMean:
    """The mean with weights of least log-loss."""
    from ensemble.fit.weighted import fit_weights
    from ensemble.rules.fitted import WeightedMean

    found = fit_weights(valid)
    return WeightedMean(tuple(found.weights), fingerprint=found.fingerprint)


def calibrated(valid: MemberOutputs) -> Rule:
    """The weighted mean, then one temperature."""
    from ensemble.fit.temperature import fit_temperature
    from ensemble.rules.fitted import Chain, Temperature

    pool = weighted(valid)
    found = fit_temperature(valid, rule=pool)
    return Chain((pool, Temperature(found.value, fingerprint=found.fingerprint)))


def log_pool(valid: MemberOutputs) -> Rule:
    """The weighted geometric mean."""
    from ensemble.fit.loglinear import fit_log_linear
    from ensemble.rules.fitted import LogPool

    found = fit_log_linear(valid)
    return LogPool(tuple(found.weights), fingerprint=found.fingerprint)


def bayes_vote(valid: MemberOutputs) -> Rule:
    """Votes weighed by each member's confusion matrix."""
    from ensemble.fit.fusion import fit_bayes_vote

    return fit_bayes_vote(valid)


def stacked(valid: MemberOutputs) -> Rule:
    """Logistic regression on the members' log-probabilities."""
    from ensemble.fit.fusion import fit_stacked

    return fit_stacked(valid)


def auto(valid: MemberOutputs) -> Rule:
    """The simplest of single member, mean and weighted mean within one standard error of the best.

    Weights are fitted on half of the recordings and the choice is made on the other half; what was
    chosen is then fitted on all.
    """
    from ensemble.judge.choice import choose
    from ensemble.rules.fitted import WeightedMean
    from ensemble.rules.pooling import mean

    fitting, choosing = _halves(valid)
    choice = choose(choosing, {"mean": mean, "weighted": weighted(fitting)})
    if choice.name == "weighted":
        return weighted(valid)
    if isinstance(choice.rule, WeightedMean):  # a single member
        return replace(choice.rule, fingerprint=valid.fingerprint)
    return choice.rule


FITTED: dict[str, Callable[[MemberOutputs], Rule]] = {
    "weighted": weighted,
    "calibrated": calibrated,
    "log_pool": log_pool,
    "bayes_vote": bayes_vote,
    "stacked": stacked,
    "auto": auto,
}


def named_rules(names: Iterable[str], valid: MemberOutputs) -> dict[str, Rule]:
    """Name -> rule.

    Raises:
        ValueError: unknown name.
    """
    from ensemble.rules.table import get_rule

    refuse_unknown(names)
    return {name: FITTED[name](valid) if name in FITTED else get_rule(name) for name in names}


def rule_names() -> list[str]:
    """All that can be named as a rule."""
    from ensemble.rules.table import list_rules

    return [*FITTED, *list_rules()]


def refuse_unknown(names: Iterable[str], *, members: Iterable[str] = ()) -> None:
    """Before anything is fitted.

    Raises:
        ValueError: a name is neither a rule's nor one of the members'; the message has all that are.
    """
    from ensemble.rules.table import no_such

    known = [*members, *rule_names()]
    for name in names:
        if name not in known:
            raise ValueError(no_such("member or rule" if members else "rule", name, known))


def saved_rules(ensembles: Mapping[str, zoo.EnsembleEntry], spoken: Spoken) -> dict[str, Rule]:
    """Name -> the rule of a saved ensemble, over the very versions it was saved with.

    Raises:
        ValueError: one of them did not speak, or the ensemble has its classes in another order.
    """
    from ensemble.rules.among import Among
    from ensemble.rules.saved import rule_from_json

    places = {spoken.references[name].partition("@")[2]: place for place, name in enumerate(spoken.outputs.members)}
    rules: dict[str, Rule] = {}
    for name, entry in ensembles.items():
        if missing := [id for id in entry.members if id not in places]:
            msg = f"expected all members of the ensemble {name!r} among those judged, got none with the ids {missing}"
            told = all(spoken.references.values())
            raise ValueError(f"{msg}; {'name it with --members' if told else 'collect the outputs again'}")
        if tuple(entry.fields["classes"]) != spoken.outputs.classes:
            msg = f"expected the classes in the order of the ensemble {name!r}; name it first, or alone, with --members"
            raise ValueError(msg)
        rules[name] = Among(rule_from_json(entry.rule), tuple(places[id] for id in entry.members))
    return rules


def cross_fits(rules: Iterable[str], valid: MemberOutputs) -> dict[str, CrossFit]:
    """For the weighted mean, what its weights are worth on recordings that they were not fitted on."""
    from ensemble.fit.crossfit import cross_fit

    recordings = len(np.unique(np.asarray(valid.groups)))
    if "weighted" not in rules or recordings < 2:
        return {}
    return {"weighted": cross_fit(valid, folds=min(5, recordings))}


def _halves(outputs: MemberOutputs) -> tuple[MemberOutputs, MemberOutputs]:
    """Every other recording, and the rest."""
    assert outputs.groups is not None  # filled in when made
    distinct, number = np.unique(outputs.groups.numpy(), return_inverse=True)
    if len(distinct) < 2:
        msg = f"expected validation frames of two recordings or more for 'auto', got {len(distinct)}; name a rule"
        raise ValueError(msg)
    odd = outputs.groups.new_tensor(number) % 2 == 1
    return outputs.at(~odd), outputs.at(odd)
