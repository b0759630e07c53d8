"""Rules as plain data and back, by name from a table: nothing is imported or run from a file."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from ensemble.rules.abstaining import Abstaining
from ensemble.rules.fitted import BayesVote, Chain, ClasswiseMean, LogPool, Stacked, Temperature, WeightedMean
from ensemble.rules.table import RULES, Rule, get_rule

_FITTED: Mapping[str, type[Any]] = {
    kind.__name__: kind for kind in (WeightedMean, ClasswiseMean, LogPool, Temperature, BayesVote, Stacked)
}


def rule_to_json(rule: Rule) -> dict[str, Any]:
    """A rule as plain data: its name in the table, and its numbers.

    Settings bound by `functools.partial` are kept: `partial(ensemble.rules.power_mean, power=2)`.

    Raises:
        ValueError: the rule is neither in the table nor one of the fitted rules.

    Example:
        >>> rule_to_json(LogPool([0.5, 0.25]))
        {'rule': 'LogPool', 'weights': [0.5, 0.25], 'fingerprint': ''}
    """
    if isinstance(rule, Chain):
        return {"rule": "Chain", "steps": [rule_to_json(step) for step in rule.steps]}
    if isinstance(rule, Abstaining):
        return {"rule": "Abstaining", "of": rule_to_json(rule.rule)}
    if type(rule) in _FITTED.values():
        held = {field.name: _lists(getattr(rule, field.name)) for field in fields(cast(Any, rule))}
        return {"rule": type(rule).__name__} | held
    function, options = (rule.func, rule.keywords) if isinstance(rule, functools.partial) else (rule, {})
    for name, known in RULES.items():
        if known is function:
            return {"rule": name, **options}
    msg = f"cannot write the rule {rule!r}: it is not in the table; put @ensemble.rule above its function"
    raise ValueError(msg)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def rule_from_json(data: Mapping[str, Any]) -> Rule:
    """The rule that `rule_to_json` wrote.

    Raises:
        ValueError: the name is unknown, or the numbers do not fit the rule.

    Example:
        >>> rule_from_json({"rule": "LogPool", "weights": [0.5, 0.25]})
        LogPool(weights=(0.5, 0.25), fingerprint='')
    """
    if not isinstance(data, Mapping):
        msg = f"expected a rule as names and values, got {str(data)[:60]}"
        raise ValueError(msg)  # it comes from a file
    options = {key: value for key, value in data.items() if key != "rule"}
    name = str(data.get("rule"))
    try:
        if name == "Chain":
            return Chain(tuple(rule_from_json(step) for step in _only("steps", options)))
        if name == "Abstaining":
            return Abstaining(rule_from_json(_only("of", options)))
        if name in _FITTED:
            return cast(Rule, _FITTED[name](**options))
        return _bound(get_rule(name), options)
    except TypeError as error:
        msg = f"expected the rule {name} with {_known(name)}, got {str(options)[:80]}"
        raise ValueError(msg) from error


def _bound(function: Rule, options: Mapping[str, Any]) -> Rule:
    """A rule of the table with its settings; TypeError where it has no such settings."""
    inspect.signature(function).bind(None, **options)
    return functools.partial(function, **options) if options else function


def _only(key: str, options: Mapping[str, Any]) -> Any:
    if set(options) != {key}:
        raise TypeError(key)
    return options[key]


def _known(name: str) -> str:
    if name in _FITTED:
        return f"some of {sorted(field.name for field in fields(_FITTED[name]))}"
    inner = {"Chain": "steps", "Abstaining": "of"}.get(name)
    return f"{inner!r}" if inner else f"some of {list(inspect.signature(get_rule(name)).parameters)[1:]}"
