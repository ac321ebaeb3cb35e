"""Constant choices: masks, and assignments to constant places of a tensor, in and out of order.

What is written and what is kept are two movements of one layer each; places that are written to twice are refused, unless
what is written adds up.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pathlift.edges import Identity, Move, Overlap, Scale
from pathlift.graph.expressions import Constant, FunctionCall
from pathlift.graph.layers import Bias, Connection, scalar_weight
from pathlift.rules.base import Activation, Call, Draft, Static, Walled, expansion, rule
from pathlift.rules.movement import replay, walled
from pathlift.rules.replay import Operator, Replay, replayed


@rule("where")
def where(call: Call) -> Draft | Walled:
    """A choice by a constant mask."""
    if "self" not in call.args:
        call.refuse("torch.where(condition) returns indices.", "Use constant indices.")
    if not isinstance(call.args["condition"], Static):
        call.refuse(
            "its condition depends on the input (data-dependent selection).",
            "Use ReLU, torch.maximum or torch.clamp, or a constant mask.",
        )
    return _chosen(call, call.args["condition"], "self", "other")


@rule("masked_fill")
def masked_fill(call: Call) -> Draft | Walled:
    """Constant positions overwritten by a constant."""
    if not isinstance(call.args["mask"], Static):
        call.refuse("its mask depends on the input.", "Use a constant mask.")
    return _chosen(call, call.args["mask"], "value", "self")


def _chosen(call: Call, mask: Static, when_true: str, when_false: str) -> Draft | Walled:
    connections: tuple[Connection, ...] = ()
    biases: tuple[Bias, ...] = ()
    wall: Tensor | None = None
    for key, sign in ((when_true, True), (when_false, False)):
        chosen = Static(FunctionCall(_indicator, (mask.expression, sign)), torch.empty(mask.shape, device="meta"))
        value = call.args[key]
        if isinstance(value, Activation):
            connections += (Connection(value.name, Scale(), call.weight(chosen)),)
            continue
        static = call.static(key)
        assert static is not None
        if _number(static) == -math.inf:
            wall = (call.builder.bake(mask).bool() == sign).expand(call.shape).cpu()
            continue
        shape = torch.broadcast_shapes(mask.shape, static.shape)
        product = Static(FunctionCall(_masked, (mask.expression, sign, static.expression)), torch.empty(shape, device="meta"))
        biases += call.bias(product)
    layer = call.layer(*connections, biases=biases)
    return layer if wall is None else walled(call, layer, wall)


def _number(static: Static) -> float | None:
    """Return the value of a constant number of the graph, None for anything else."""
    if not isinstance(static.expression, Constant):
        return None
    value = static.expression.value
    if isinstance(value, Tensor):
        return float(value) if value.dim() == 0 and not value.is_meta else None
    return float(value)


def _indicator(mask: Tensor, sign: bool) -> Tensor:
    return (mask.bool() == sign).double()


def _masked(mask: Tensor, sign: bool, value: Tensor | float) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=mask.device)
    return torch.where(mask.bool() == sign, value, torch.zeros_like(value))


PATCHES = {
    "slice_scatter": "src", "select_scatter": "src", "diagonal_scatter": "src",
    "index_put": "values", "_unsafe_index_put": "values", "index_copy": "source", "index_add": "source",
    "index_fill": "value", "scatter": "src", "scatter_add": "src", "scatter_reduce": "src", "put": "source",
}  # fmt: skip
"""Operators that write into a tensor: the argument that is written."""

NOT_A_SUM = "It combines what it writes with what is there in another way than by a sum."


@rule(*PATCHES)
def patched(call: Call) -> Draft:
    """Constant places of a tensor replaced, or added to: what an assignment to x[…] becomes in the exported graph."""
    key = "value" if "value" in call.args else PATCHES[call.name]
    call = _plain(call, key)
    if not isinstance(call.args[key], (Activation, Static)):
        return _filled(call, key)
    base, patch = call.as_activation(call.args["self"]), call.as_activation(call.args[key])
    call = replace(call, args={**call.args, "self": base, key: patch})
    if call.name == "slice_scatter":  # ends beyond the tensor are spelled out: they overflow elsewhere
        dim, bounds = int(call.args["dim"]), [call.args[name] for name in ("start", "end", "step")]
        start, end, step = slice(*bounds).indices(base.shape[dim])
        call = replace(call, args={**call.args, "start": start, "end": end, "step": step})
    summed, alpha = _adds(call), float(call.args.get("alpha", 1))
    write = replay(call, key, "self", without=("alpha",))
    if call.name == "scatter" and summed:
        fixed = {name: value for name, value in write.fixed.items() if name != "reduce"}
        write = replace(write, operator=Operator("aten::scatter_add"), fixed=fixed)
    back = _read_back(call, write)
    written = patch.shape
    if back is not None:
        patch = _spread(call, patch, back)
        written = written if call.name.endswith("index_put") else patch.shape
    if summed:
        assert back is not None
        weight = None if alpha == 1.0 else scalar_weight(alpha)
        return call.layer(Connection(base.name, Identity()), Connection(patch.name, Overlap(write, back), weight))
    if back is not None and not _written_once(write, back, written):
        call.refuse(
            "it writes several values to one place: which of them stays is left open by PyTorch.",
            "Use indices without repetition.",
        )
    keep = replace(write, key="self", zeros={key: patch.shape})
    if back is not None and not _written_once(write, back, patch.shape):
        return call.layer(Connection(base.name, Move(keep)), _last_written(call, patch, write))
    return call.layer(Connection(base.name, Move(keep)), Connection(patch.name, Move(write)))


def _plain(call: Call, key: str) -> Call:
    """Refuse options that nothing here knows."""
    args = dict(call.args)
    known = {"self", key, "dim", "index", "indices", "accumulate", "alpha", "start", "end", "step", "dim1", "dim2", "offset"}
    known |= {"reduce", "include_self"}
    unknown = sorted(set(args) - known)
    if unknown:
        call.refuse(f"its option '{unknown[0]}' has no rule.", "Write it as an assignment to an index.")
    if args.get("reduce", "sum") not in ("sum", "add") or not args.get("include_self", True):
        call.refuse(NOT_A_SUM, "Only assignments and sums at constant indices are covered.")
    return call


def _adds(call: Call) -> bool:
    return call.name in ("index_add", "scatter_add") or "reduce" in call.args or bool(call.args.get("accumulate", False))


def _filled(call: Call, key: str) -> Draft:
    """Constant places overwritten by one number."""
    if "reduce" in call.args:
        call.refuse(NOT_A_SUM, "Only assignments and sums at constant indices are covered.")
    base = call.as_activation(call.args["self"])
    fill = float(call.args[key])
    if not math.isfinite(fill):
        call.refuse(f"it writes {fill}.", "Write finite numbers; torch.where and masked_fill take −inf before a maximum.")
    call = replace(call, args={**call.args, "self": base, key: 0.0})
    keep = replay(call, "self")
    written = replace(keep, fixed={**keep.fixed, key: fill})
    biases = call.bias(Static(FunctionCall(_filling, (written, base.shape, call.result.device)), call.result)) if fill else ()
    return call.layer(Connection(base.name, Move(keep)), biases=biases)


def _filling(written: Replay, shape: tuple[int, ...], device: torch.device) -> Tensor:
    out: Tensor = written(torch.zeros(shape, dtype=torch.float64, device=device))
    return out


def _read_back(call: Call, write: Replay) -> Replay | None:
    """Return what reads the places that are written to, None for operators that never write to a place twice."""
    fixed: dict[str, Any] = dict(write.fixed)
    if call.name in ("index_put", "_unsafe_index_put"):
        return replayed("aten::index.Tensor", indices=fixed["indices"])
    if call.name in ("index_copy", "index_add"):
        return replayed("aten::index_select", dim=fixed["dim"], index=fixed["index"])
    if call.name in ("scatter", "scatter_add", "scatter_reduce"):
        return replayed("aten::gather", dim=fixed["dim"], index=fixed["index"])
    return replayed("aten::take", index=fixed["index"]) if call.name == "put" else None


def _spread(call: Call, patch: Activation, back: Replay) -> Activation:
    """Give what is written the shape of the places that it is written to."""
    shape = tuple(back(torch.zeros(call.args["self"].shape)).shape)
    if patch.shape == shape:
        return patch
    if call.name.endswith("index_put"):
        return call.builder.add(call.layer(Connection(patch.name, expansion(shape)), shape=shape))
    movement = replayed("aten::reshape", shape=shape)
    if call.name.startswith("scatter"):  # it reads the corner of a larger tensor
        widths = [width for extent, size in zip(patch.shape, shape, strict=True) for width in (size - extent, 0)]
        movement = replayed("aten::constant_pad_nd", pad=tuple(reversed(widths)))
    return call.builder.add(call.moved(patch, movement, shape))


def _written_once(write: Replay, back: Replay, shape: tuple[int, ...]) -> bool:
    """Whether every element of that shape can be read wherever it was written: no other one took its place."""
    numbers = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)
    return bool((back(write(numbers)) == numbers).all())


def _last_written(call: Call, patch: Activation, write: Replay) -> Connection:
    """Where one value is written to a place several times: a movement that reads it once, also when it is transposed."""
    count = math.prod(patch.shape)
    numbered = write(torch.arange(1, count + 1, dtype=torch.float64).reshape(patch.shape))
    numbers = numbered.long().reshape(-1).to(call.result.device)
    flat = call.builder.add(call.moved(patch, replayed("aten::reshape", shape=(count,)), (count,)))
    padded = call.builder.add(call.moved(flat, replayed("aten::constant_pad_nd", pad=(1, 0)), (count + 1,)))
    read = replayed("aten::index_select", dim=0, index=numbers)
    chosen = call.builder.add(call.moved(padded, read, tuple(numbers.shape)))
    return Connection(chosen.name, Move(replayed("aten::reshape", shape=tuple(numbered.shape))))


@rule("copy", "fill", "zero")
def copy(call: Call) -> Draft:
    """A tensor overwritten as a whole: only what is written counts."""
    value = 0.0 if call.name == "zero" else call.args["src" if call.name == "copy" else "value"]
    patch = call.as_activation(value if not isinstance(value, (int, float)) else call.number(value))
    return call.layer(Connection(patch.name, expansion(call.shape)))
