"""Rules by the names that a command line gives them; what has to be fitted is fitted on validation outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import zoo
    from ensemble.cli.sources import Spoken
    from ensemble.judge.significance import CrossFit
    from ensemble.outputs import MemberOutputs
    from ensemble.rules.table import Rule

FOUR = ("majority", "maximum", "mean", "weighted")


def named_rules(names: Iterable[str], valid: MemberOutputs) -> dict[str, Rule]:
    """Name -> rule.

    Raises:
        ValueError: unknown name.
    """
    from ensemble.fit import FITTERS
    from ensemble.rules import get_rule

    refuse_unknown(names)
    return {name: FITTERS[name](valid) if name in FITTERS else get_rule(name) for name in names}


def rule_names() -> list[str]:
    """All that can be named as a rule."""
    from ensemble.fit import FITTERS
    from ensemble.rules import list_rules

    return [*FITTERS, *list_rules()]


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
    from ensemble.rules import Among, rule_from_json

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
