"""Products of an activation with one parameter or constant that are no plain matrix product, as explicit einsums."""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch

from pathlift.edges import AxisMap, Contraction, Move, Reduce
from pathlift.graph.layers import Connection
from pathlift.rules.affine import BILINEAR, active_factor
from pathlift.rules.base import Activation, Call, Draft, Static, rule
from pathlift.rules.order import constant
from pathlift.rules.replay import replayed


def _product(call: Call, keys: Sequence[str], first: str, second: str, out: str, shape: Sequence[int] | None = None) -> Draft:
    """Return the einsum of two arguments, exactly one of which is an activation."""
    values = [call.args[key] for key in keys]
    active = active_factor(call, values)
    source, weight = values[active], call.static(keys[1 - active])
    assert weight is not None
    x, w = (first, second) if active == 0 else (second, first)
    return call.layer(Connection(source.name, Contraction(f"{x},{w}->{out}"), call.weight(weight, "weight")), shape=shape)


def _letters(count: int, skip: int = 0) -> str:
    return string.ascii_letters[skip : skip + count]


@rule("inner")
def inner(call: Call) -> Draft:
    """Σ_k a[…, k]·b[…, k]."""
    ranks = [len(call.args[key].shape) for key in ("self", "other")]
    if not all(ranks):
        call.refuse("one of its arguments is a number.", "Write it as a product.")
    a, b = _letters(ranks[0] - 1), _letters(ranks[1] - 1, ranks[0])
    return _product(call, ("self", "other"), f"{a}Z", f"{b}Z", a + b)


@rule("outer", "ger")
def outer(call: Call) -> Draft:
    """a[i]·b[j]."""
    return _product(call, ("self", "vec2"), "a", "b", "ab")


@rule("vdot")
def vdot(call: Call) -> Draft:
    """Σ_k a[k]·b[k]."""
    return _product(call, ("self", "other"), "a", "a", "")


@rule("tensordot")
def tensordot(call: Call) -> Draft:
    """A product summed over pairs of dimensions."""
    ranks = [len(call.args[key].shape) for key in ("self", "other")]
    pairs = [[int(dim) % rank for dim in call.args[key]] for key, rank in zip(("dims_self", "dims_other"), ranks, strict=True)]
    first, second = list(_letters(ranks[0])), list(_letters(ranks[1], ranks[0]))
    for here, there in zip(*pairs, strict=True):
        second[there] = first[here]
    free = [letter for dim, letter in enumerate(first) if dim not in pairs[0]]
    free += [letter for dim, letter in enumerate(second) if dim not in pairs[1]]
    return _product(call, ("self", "other"), "".join(first), "".join(second), "".join(free))


@rule("kron")
def kron(call: Call) -> Draft:
    """The Kronecker product: an outer product, its dimensions joined in pairs."""
    shapes = [tuple(call.args[key].shape) for key in ("self", "other")]
    rank = max(len(shape) for shape in shapes)
    wide = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    missing = [rank - len(shape) for shape in shapes]
    a, b = _letters(rank)[missing[0] :], _letters(rank, rank)[missing[1] :]
    pairs = [(dim, side) for dim in range(rank) for side in (0, 1)]
    out = "".join((_letters(rank), _letters(rank, rank))[side][dim] for dim, side in pairs if dim >= missing[side])
    shape = [wide[side][dim] for dim, side in pairs if dim >= missing[side]]
    product = call.builder.add(_product(call, ("self", "other"), a, b, out, shape))
    return call.moved(product, replayed("aten::reshape", shape=call.shape), spatial="view")


@rule("bilinear")
def bilinear(call: Call) -> Draft:
    """Σ_ij a[…, i]·W[k, i, j]·b[…, j] + c[k] with one activation among a, b and a constant weight; two steps."""
    active = [key for key in ("input1", "input2", "weight") if isinstance(call.args[key], Activation)]
    if len(active) != 1 or active == ["weight"]:
        call.refuse(*BILINEAR)
    (key,) = active
    other = "input2" if key == "input1" else "input1"
    source, static, weight = call.source(key), call.static(other), call.static("weight")
    assert static is not None
    assert weight is not None
    batch = _letters(len(source.shape) - 1)
    x, y = ("I", "J") if key == "input1" else ("J", "I")
    pairs = Contraction(f"{batch}{x},{batch}{y}->{batch}IJ")
    size = (weight.shape[1], weight.shape[2])
    product = call.layer(Connection(source.name, pairs, call.weight(static)), shape=(*source.shape[:-1], *size))
    joined = Contraction(f"{batch}IJ,KIJ->{batch}K")
    connection = Connection(call.builder.add(product).name, joined, call.weight(weight, "weight"))
    return call.layer(connection, biases=call.bias(call.static("bias"), name="bias"))


@rule("linalg_multi_dot", "chain_matmul")
def multi_dot(call: Call) -> Draft:
    """A product of matrices, one of which is an activation: one step for each other factor, from the inside out."""
    values = list(call.args["tensors" if "tensors" in call.args else "matrices"])
    active = active_factor(call, values)
    source, layer = values[active], None
    for static in values[active + 1 :]:
        layer = _times(call, source, static, "ab"[2 - len(source.shape) :], "bc"[: len(static.shape)])
        source = call.builder.add(layer)
    for static in reversed(values[:active]):
        layer = _times(call, source, static, "bc"[: len(source.shape)], "ab"[2 - len(static.shape) :])
        source = call.builder.add(layer)
    assert layer is not None
    return layer


def _times(call: Call, source: Activation, static: Static, x: str, w: str) -> Draft:
    out = "".join(sorted(set(x) ^ set(w)))
    sizes = {**dict(zip(x, source.shape, strict=True)), **dict(zip(w, static.shape, strict=True))}
    edges = Contraction(f"{x},{w}->{out}")
    return call.layer(Connection(source.name, edges, call.weight(static, "weight")), shape=[sizes[letter] for letter in out])


@rule("cumsum", "diff")
def along_a_line(call: Call) -> Draft:
    """Running sums, and differences of neighbours: a constant matrix along one dimension."""
    source = call.source("self")
    if call.args.get("prepend") is not None or call.args.get("append") is not None:
        call.refuse("it joins another tensor to its input.", "Use torch.cat for that step.")
    if not source.shape:
        call.refuse("its input is a number.", "Give it a vector.")
    dim = int(call.args["dim"]) % len(source.shape)
    identity = torch.eye(source.shape[dim], dtype=torch.float64)
    matrix = identity.cumsum(0) if call.name == "cumsum" else torch.diff(identity, n=int(call.args["n"]), dim=0)
    return call.layer(Connection(source.name, AxisMap(dim, matrix), call.weight(constant(matrix, call.result.device))))


@rule("trace")
def trace(call: Call) -> Draft:
    """The sum of a diagonal."""
    source = call.source("self")
    size = min(source.shape)
    line = call.builder.add(call.moved(source, replayed("aten::diagonal"), (size,)))
    return call.layer(Connection(line.name, Reduce((0,), keepdim=False)))


@rule("block_diag")
def block_diag(call: Call) -> Draft:
    """Matrices along the diagonal of a larger one: the sum of each, padded with zeros."""
    connections, row, column = [], 0, 0
    rows, columns = call.shape
    for value in call.args["tensors"]:
        piece = call.as_activation(value)
        shape = ((1,) * (2 - len(piece.shape)) + piece.shape)[-2:]
        matrix = call.builder.add(call.moved(piece, replayed("aten::reshape", shape=shape), shape, "view"))
        pad = (column, columns - column - shape[1], row, rows - row - shape[0])
        connections.append(Connection(matrix.name, Move(replayed("aten::constant_pad_nd", pad=pad))))
        row, column = row + shape[0], column + shape[1]
    return call.layer(*connections)
