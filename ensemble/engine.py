"""Members that compute alike, run together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble.stack import Stack


class Group:
    """Modules that run together: one `Stack` where they can, a loop where they cannot.

    Args:
        names: of the members.
        modules: of the members, in evaluation mode.
        stack: the same members stacked, or None.
        why: the reason for the loop where there is no stack.
    """

    def __init__(self, names: Sequence[str], modules: Sequence[nn.Module], stack: Stack | None, why: str = "") -> None:
        self.names, self.modules, self.stack, self.why = tuple(names), list(modules), stack, why

    def __call__(self, x: Tensor) -> Tensor:
        """(B, ...) -> (M, B, C) logits."""
        if self.stack is not None:
            return self.stack(x)  # type: ignore[no-any-return]  # Module is untyped
        return torch.stack([module(x) for module in self.modules])
