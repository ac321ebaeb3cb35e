"""Recurrent layers with ReLU, unrolled over time: ReLU layers whose weights every step shares (mathematics §1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pathlift.edges import Dense, Identity
from pathlift.graph.expressions import FunctionCall
from pathlift.graph.layers import Concat, Connection, Slopes
from pathlift.rules.base import Activation, Call, Draft, Forbidden, Refusal, Static, rule
from pathlift.rules.replay import replayed


@dataclass(frozen=True)
class _Cell:
    """The weights of one layer in one direction, and the names of their roles."""

    input_weight: Static
    hidden_weight: Static
    biases: tuple[Static | None, ...]
    suffix: str


@rule("rnn_relu")
def recurrent(call: Call) -> tuple[Draft, ...]:
    """All layers, directions and steps: h ← ReLU(U x + b + V h + c); the states over time, and the last of each layer."""
    if "batch_sizes" in call.args:
        call.refuse("it reads a packed sequence, whose lengths are data.", "Give it a tensor of one length per batch.")
    if call.args["train"] and call.args["dropout"]:
        call.refuse("it draws a random mask between its layers.", "Put the module in eval mode.")
    source, both, layers = call.source("input"), bool(call.args["bidirectional"]), int(call.args["num_layers"])
    time = 1 if call.args["batch_first"] else 0
    if time == 0 and source.shape[0] == 1 and source.shape[1] > 1:
        call.refuse(
            "it takes the batch dimension for time: its input should be (time, batch, features).",
            "Use batch_first=True, or transpose the input first.",
        )
    sequence = [_select(call, source, time, step) for step in range(source.shape[time])]
    cells = _cells(call, (2 if both else 1) * layers, both)
    states = _initial(call, "hx", len(cells))
    last: list[Activation] = []
    for layer in range(layers):
        directions = []
        for cell, start in list(zip(cells, states, strict=True))[layer * (1 + both) : (layer + 1) * (1 + both)]:
            turned = cell.suffix.endswith("_reverse")
            steps = _run(call, cell, sequence[::-1] if turned else sequence, start)
            last.append(steps[-1])
            directions.append(steps[::-1] if turned else steps)
        sequence = [_side_by_side(call, step, 1) for step in zip(*directions, strict=True)]
    over_time = [_raised(call, state, time) for state in sequence]
    ends = [_raised(call, state, 0) for state in last]
    return _joined(call, over_time, time), _joined(call, ends, 0)


@rule("rnn_relu_cell")
def recurrent_cell(call: Call) -> Draft:
    """One step."""
    source, weights = call.args["input"], [call.static(key) for key in ("w_ih", "w_hh")]
    assert weights[0] is not None
    assert weights[1] is not None
    cell = _Cell(weights[0], weights[1], (call.static("b_ih"), call.static("b_hh")), "")
    (state,) = _initial(call, "hx", 1, stacked=False)
    before = call.builder.add(_affine(call, cell, call.as_activation(source), state))
    return _relu(call, before)


def _cells(call: Call, count: int, both: bool) -> list[_Cell]:
    values = list(call.args["params"])
    for value in values:
        if isinstance(value, Activation):
            call.refuse("its weights depend on the input.", "Path-liftings need parameters or constants as weights.")
    size = 4 if call.args["has_biases"] else 2
    cells = []
    for number in range(count):
        input_weight, hidden_weight, *biases = values[number * size : (number + 1) * size]
        suffix = f"_l{number // 2}{'_reverse' if number % 2 else ''}" if both else f"_l{number}"
        cells.append(_Cell(input_weight, hidden_weight, tuple(biases), suffix))
    return cells


def _initial(call: Call, key: str, count: int, *, stacked: bool = True) -> list[Activation | None]:
    """Return the states before the first step, None for zeros."""
    value = call.args[key]
    if isinstance(value, Forbidden):
        raise Refusal(value.reason, value.advice)
    if isinstance(value, Static) and _is_zero(value):
        return [None] * count
    states = call.as_activation(value)
    return [_select(call, states, 0, number) for number in range(count)] if stacked else [states]


def _is_zero(static: Static) -> bool:
    """Whether a tensor is made of zeros, as for a state that was not given."""
    function = static.expression.function if isinstance(static.expression, FunctionCall) else None
    name = getattr(function, "name", None)
    return (name() if callable(name) else name) in ("aten::zeros", "aten::zeros_like", "aten::new_zeros")


def _run(call: Call, cell: _Cell, sequence: Sequence[Activation], state: Activation | None) -> list[Activation]:
    states = []
    for source in sequence:
        state = call.builder.add(_relu(call, call.builder.add(_affine(call, cell, source, state))))
        states.append(state)
    return states


def _affine(call: Call, cell: _Cell, source: Activation, state: Activation | None) -> Draft:
    """U x + b + V h + c."""
    suffix = cell.suffix
    connections = [Connection(source.name, Dense(), call.weight(cell.input_weight, f"weight_ih{suffix}"))]
    if state is not None:
        connections.append(Connection(state.name, Dense(), call.weight(cell.hidden_weight, f"weight_hh{suffix}")))
    biases = [
        start
        for bias, role in zip(cell.biases, ("bias_ih", "bias_hh"), strict=False)
        for start in call.bias(bias, name=f"{role}{suffix}")
    ]
    return call.layer(*connections, biases=tuple(biases), shape=(*source.shape[:-1], cell.input_weight.shape[0]))


def _relu(call: Call, below: Activation) -> Draft:
    return call.layer(Connection(below.name, Identity()), shape=below.shape, nonlinearity=Slopes(1.0, 0.0))


def _select(call: Call, source: Activation, dim: int, index: int) -> Activation:
    shape = source.shape[:dim] + source.shape[dim + 1 :]
    return call.builder.add(call.moved(source, replayed("aten::select.int", dim=dim, index=index), shape, "view"))


def _raised(call: Call, source: Activation, dim: int) -> Activation:
    shape = (*source.shape[:dim], 1, *source.shape[dim:])
    return call.builder.add(call.moved(source, replayed("aten::unsqueeze", dim=dim), shape, "view"))


def _side_by_side(call: Call, pieces: Sequence[Activation], dim: int) -> Activation:
    return pieces[0] if len(pieces) == 1 else call.builder.add(_joined(call, pieces, dim))


def _joined(call: Call, pieces: Sequence[Activation], dim: int) -> Draft:
    sizes = tuple(piece.shape[dim] for piece in pieces)
    shape = [*pieces[0].shape]
    shape[dim] = sum(sizes)
    return call.layer(*(Connection(piece.name, Identity()) for piece in pieces), shape=shape, concat=Concat(dim, sizes))
