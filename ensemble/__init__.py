"""Run many models as one, combine what they say, and judge whether the combination is better.

Names are resolved on first use (PEP 562), so `ensemble --help` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemble.outputs import MemberOutputs

__all__ = [
    "MemberOutputs",
]


def __getattr__(name: str) -> Any:
    match name:
        case "MemberOutputs":
            from ensemble import outputs

            return getattr(outputs, name)
    msg = f"module 'ensemble' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
