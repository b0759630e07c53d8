"""Rules: functions from M members' probabilities, (M, N, C), to one distribution per frame, (N, C).

A rule is any callable of that shape whose rows sum to one, so argmax, log-loss and calibration serve every
rule alike. Rules without numbers are functions in `pooling`; rules with numbers are frozen dataclasses in `fitted`;
`table` has the interfaces and the tables. Nothing is fitted here.
"""

import lazy_loader

from ensemble.rules import cascade, fitted, pooling  # noqa: F401 - they enter their rules into the tables

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
