"""`Folded`: the members of an ensemble and its rule as one plain module, which an exporter can trace.

In go the members' inputs, or the raw features of one recording; out come probabilities and classes. Members of one
structure are one batched product per layer: the engine's folded form, and proven right in the same way, by comparison
with the members run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ensemble.rules.fitted import rule_for
from ensemble.rules.table import Rule, declared
from ensemble.run._engine.dense import Affine, Dense
from ensemble.run.members import Members, preparation
from zoo.data.frames import FrameSet
from zoo.onnx import Exported, Recording, input_contract, probe, write


def export(
    members: Members,
    rule: Rule,
    path: str | Path,
    *,
    with_windows: bool,
    each: bool,
    precision: str,
    frames: FrameSet | None,
    most_changed: float,
) -> Exported:
    """Write members and a rule as an ONNX file; see `Ensemble.to_onnx`."""
    rule = rule_for(rule, members.names)
    if not rule.continuous:
        msg = f"expected a rule that another runtime can repeat, got {rule.title}, whose result jumps on many frames "
        why = "where probabilities differ by rounding alone"
        raise ValueError(f"{msg}{why}; export mean, majority or a weighted mean, and of a Cascade the rule inside it")
    if (used := rule.used) is not None and len(used) < len(members):
        rule, members = rule.restricted(used), members.subset([members.names[place] for place in used])
    model, spec = Folded(members, rule, with_windows=with_windows, each=each), next(iter(members.widest), None)
    compared = None
    if frames is not None:
        if spec is None:
            msg = f"expected no frames for members without specs, which take inputs only, got {len(frames)}"
            raise ValueError(msg)
        compared = probe(frames, spec, members.classes, with_windows=with_windows)
    columns = spec.features if spec and with_windows else members.inputs
    if columns is None:
        msg = "expected members that declare the length of their inputs by a spec or a first Linear layer"
        raise ValueError(msg)
    known = [(member.name, member.about.reference, member.digest) for member in members]
    contract = {
        "classes": list(members.classes),
        "input": input_contract(spec, columns, with_windows=with_windows),
        "members": [dict(zip(("name", "reference", "sha256"), one, strict=True)) for one in known],
        "rule": rule.to_json(),
        "fitted_on": list(filter(None, rule.fingerprints)),
    }
    return write(
        model,
        path,
        contract=contract,
        columns=columns,
        precision=precision,
        probe=compared,
        most_changed=most_changed,
        members=each,
    )


class Folded(nn.Module):
    """Members and a rule: inputs -> probabilities (N, C), classes (N,), and each member's probabilities (M, N, C).

    Args:
        members: M members.
        rule: a rule over them, by position.
        with_windows: the input is the raw features (T, F) of one recording; otherwise it is (N, inputs), windows of
            the largest context.
        each: whether to give the members' probabilities too.

    Raises:
        ValueError: members that do not fold into matrix products, or whose inputs are prepared in different ways.
    """

    def __init__(self, members: Members, rule: Rule, *, with_windows: bool = False, each: bool = False) -> None:
        super().__init__()
        self.rule, self.each = declared(rule), each
        widest = {preparation(spec): spec for spec in members.widest}
        foreign = [member.name for member in members if member.spec is None]
        if with_windows and foreign:
            msg = f"expected members with specs, whose windows are known, got {foreign} without; leave with_windows out"
            raise ValueError(msg)
        if not with_windows and len(widest) + bool(foreign) > 1:
            msg = f"expected members that share one input, got {members.names} prepared in different ways"
            raise ValueError(f"{msg}; export them with windows, from the raw features")
        self.prepare = nn.ModuleList()
        self.parts = nn.ModuleList()
        self.reads: list[int] = []
        self.places: list[int] = []
        for spec in widest.values() if with_windows else [None]:
            self.prepare.append(Recording(spec.context, spec.normalisation) if spec else nn.Identity())
        for group, places in members.groups:
            if group.dense is None:
                names = [members.names[place] for place in places]
                msg = f"cannot export {names} as matrix products: {group.why}"
                raise ValueError(f"{msg}; models of Linear, BatchNorm1d, activations and sums can be exported")
            spec = list(members)[places[0]].spec
            cut = (widest[preparation(spec)].context - spec.context) * spec.features if spec else 0
            orders = [members.orders[place] for place in places]
            self.parts.append(_Part(group.dense, cut, [None if order is None else order.cpu() for order in orders]))
            self.reads.append(list(widest).index(preparation(spec)) if with_windows else 0)
            self.places += places

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, inputs), or (T, F) -> probabilities, classes, and where asked the members' probabilities."""
        inputs = [prepare(x) for prepare in self.prepare]
        found = torch.cat([part(inputs[source]) for part, source in zip(self.parts, self.reads, strict=True)])
        if self.places != sorted(self.places):
            found = found[[self.places.index(place) for place in range(len(self.places))]]
        probabilities = self.rule.of_logs(found)
        answer = probabilities, probabilities.argmax(-1)
        return (*answer, found.exp()) if self.each else answer


class _Part(nn.Module):
    """Members of one structure: inputs of the widest window -> log-probabilities (m, N, C) in one order of classes."""

    def __init__(self, dense: Dense, cut: int, orders: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.cut, self.steps, self.orders = cut, dense.steps, orders
        self.layers = nn.ModuleDict(
            {
                step.target: _Layer(step.operation, first=step is dense.steps[0])
                for step in dense.steps
                if isinstance(step.operation, Affine)
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (m, N, C)."""
        values = dict.fromkeys(self.steps[0].sources, x[:, self.cut : x.shape[1] - self.cut])
        for step in self.steps:
            operation = self.layers[step.target] if isinstance(step.operation, Affine) else step.operation
            values[step.target] = operation(*(values[name] for name in step.sources))
        rows = values[self.steps[-1].target].log_softmax(-1)
        if all(order is None for order in self.orders):
            return rows
        return torch.stack(
            [row if order is None else row[:, order] for row, order in zip(rows, self.orders, strict=True)]
        )


class _Layer(nn.Module):
    """A Linear layer of m members, its weights lying as a runtime multiplies by them."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Affine, *, first: bool) -> None:
        super().__init__()
        members, outputs, inputs = layer.weight.shape
        weight, bias = layer.weight.mT, layer.bias[:, None]  # (m, inputs, outputs), (m, 1, outputs)
        if first:  # all members read one input: one product
            weight, bias = layer.weight.reshape(-1, inputs).t(), layer.bias.flatten()
        self.register_buffer("weight", weight.cpu().contiguous())  # a file is written from there
        self.register_buffer("bias", bias.cpu().contiguous())
        self.members, self.outputs, self.first = members, outputs, first

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) where it is the first layer, else (m, N, inputs) -> (m, N, outputs)."""
        product = x @ self.weight + self.bias
        if not self.first:
            return product
        return product.reshape(product.shape[0], self.members, self.outputs).transpose(0, 1)
