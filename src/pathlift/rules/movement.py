"""Data movement: views, slices, concatenations, padding, shuffles, and operators that do nothing in eval mode.

Every neuron above is one neuron below (or a constant), so the rule replays the operator itself on whatever travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pathlift.edges import Identity, Move, Overlap
from pathlift.edges.movement import Spatial
from pathlift.graph.expressions import FunctionCall
from pathlift.graph.layers import Bias, Concat, Connection
from pathlift.rules.base import MOVEMENTS, Activation, Call, Draft, Forbidden, Refusal, Static, Walled, rule
from pathlift.rules.replay import Operator, Replay, replayed

VIEWS = [
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "mT", "mH", "matrix_H", "adjoint", "ravel", "expand",
    "broadcast_to", "slice", "select", "narrow", "diagonal", "linalg_diagonal", "unfold", "atleast_1d",
    "atleast_2d", "atleast_3d", "real",
]  # fmt: skip
"""Operators that only view a contiguous tensor."""

REPLAYED = [
    *VIEWS, "repeat", "tile", "repeat_interleave", "roll", "flip", "fliplr", "flipud", "rot90", "im2col", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "tril", "triu", "diag", "diag_embed", "diagflat", "view_copy", "permute_copy",
    "transpose_copy", "expand_copy", "slice_copy", "select_copy", "unsqueeze_copy", "squeeze_copy", "t_copy", "_reshape_copy",
]  # fmt: skip
"""Operators that are replayed on path activations exactly as they stand."""

SAME = [
    "contiguous", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "to", "_to_copy", "type_as", "positive",
    "resolve_conj", "resolve_neg", "requires_grad", "alias_copy", "detach_copy",
]  # fmt: skip
RESHAPED_LIKE = {"view_as": "reshape", "reshape_as": "reshape", "expand_as": "expand"}
SPLITS = [
    "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_split",
    "unsafe_split_with_sizes", "unsafe_chunk",
]  # fmt: skip
INDEXED = ["index", "index_select", "gather", "take_along_dim", "take", "_unsafe_index"]
STACKS = {"stack": 0, "hstack": 1, "column_stack": 1, "vstack": 0, "row_stack": 0, "dstack": 2}
"""Operators that join tensors which they may have to give another dimension first: the dimension along which they join."""

MOVEMENTS.update(REPLAYED, SAME, RESHAPED_LIKE, SPLITS, INDEXED, STACKS, ("getitem", "cat", "concat", "concatenate", "pad"))

Made: TypeAlias = "Draft | Forbidden | tuple[Draft | Forbidden, ...]"


def replay(call: Call, key: str, *zeros: str, without: tuple[str, ...] = ()) -> Replay:
    """Return the call as a function of one of its arguments, the others fixed.

    Args:
        call: The call; none of the other arguments may depend on the input.
        key: Schema name of the free argument.
        zeros: Activations among the arguments that are taken to be 0.
        without: Arguments that are left out.

    Returns:
        The function.
    """
    named = (key, *zeros, *without)
    fixed = {name: _fixed(call, name, value) for name, value in call.args.items() if name not in named}
    return Replay(operator_of(call), key, fixed, {name: call.args[name].shape for name in zeros})


def operator_of(call: Call) -> Operator:
    """Return the operator of a call, out of place."""
    try:
        return Operator.of(call.target)
    except LookupError as error:
        return call.refuse(f"{error}.", "Use the form of the operator that returns its result.")


def _fixed(call: Call, name: str, value: Any) -> Any:
    if isinstance(value, Activation):
        call.refuse(f"its argument '{name}' depends on the input.", "Indices and sizes must be constants.")
    if isinstance(value, Forbidden):
        raise Refusal(value.reason, value.advice)
    if isinstance(value, Static):
        return call.builder.bake(value)
    if isinstance(value, (list, tuple)):
        items = tuple(_fixed(call, name, item) for item in value)
        return _without_masks(items) if name == "indices" else items
    return value


def _without_masks(indices: tuple[Tensor | int | None, ...]) -> tuple[Tensor | int | None, ...]:
    """Spell boolean masks among indices out as the positions that they choose."""
    spelled: list[Tensor | int | None] = []
    for index in indices:
        mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        spelled.extend(index.nonzero(as_tuple=True) if isinstance(index, Tensor) and mask else (index,))
    return tuple(spelled)


def moves_walls(make: Callable[[Call], Made]) -> Callable[[Call], Made]:
    """Let a movement carry an argument with −inf in constant places: the places move as the neurons do."""

    @wraps(make)
    def carried(call: Call) -> Made:
        key = _first(call)
        value = call.args[key]
        if not isinstance(value, Walled):
            return make(call)
        inner = replace(call, args={**call.args, key: value.inside})
        made, wall = make(inner), replay(inner, key)(value.wall.double())
        if isinstance(made, tuple):
            return tuple(walled(call, part, border) for part, border in zip(made, wall, strict=True))
        return walled(call, made, wall)

    return carried


def walled(call: Call, layer: Draft | Forbidden, wall: Tensor) -> Draft | Walled:
    """Return a layer with −inf in constant places, where nothing leads to.

    Args:
        call: The call that makes it.
        layer: The layer, with zeros there.
        wall: Not 0 where −inf stands, of the layer's shape.

    Returns:
        The layer itself when there is no such place.
    """
    assert isinstance(layer, Draft)
    if not bool(wall.any()):
        return layer
    return Walled(
        "it reads a border of −inf, which only a maximum may do.",
        "Pad with zeros, or let max-pooling pad.",
        call.builder.add(layer),
        wall.bool(),
    )


def _spatial(call: Call, rank: int) -> Spatial:
    """Return how an operator treats space, see `pathlift.edges.movement`."""
    if call.name in VIEWS:
        return "view"
    if call.name.startswith(("reflection_pad", "replication_pad")):
        return tuple(range(-int(call.name[-2]), 0))
    if call.name.startswith(("upsample_nearest", "_upsample_nearest")):
        return tuple(range(2, rank))
    if call.name in ("roll", "flip") and call.args["dims"]:
        dims = call.args["dims"]
        return tuple([dims] if isinstance(dims, int) else dims)
    return (1,) if call.name in ("channel_shuffle", "native_channel_shuffle") else None


def _first(call: Call) -> str:
    return next(iter(call.args))


@rule(*REPLAYED, walls=True)
@moves_walls
def move(call: Call) -> Draft:
    """The operator replayed on the path activations."""
    key = _first(call)
    if call.name in ("view", "_unsafe_view"):
        if "dtype" in call.args:
            call.refuse("it reads the bits of a tensor as another type.", "Convert with .to(dtype).")
        # strides of path activations may differ
        return call.moved(call.source(key), replayed("aten::reshape", shape=call.shape), spatial="view")
    source = call.source(key)
    return call.moved(source, replay(call, key), spatial=_spatial(call, len(source.shape)))


@rule(*INDEXED)
def index(call: Call) -> Draft:
    """Indexing with constant indices."""
    key = _first(call)
    return call.moved(call.source(key), replay(call, key))


@rule(*SPLITS, walls=True)
@moves_walls
def split(call: Call) -> tuple[Draft, ...]:
    """Pieces of a tensor: one layer each."""
    key = _first(call)
    source, function = call.source(key), replay(call, key)
    return tuple(
        call.moved(source, replace(function, piece=number), piece.shape, "view") for number, piece in enumerate(call.result)
    )


@rule("broadcast_tensors")
def broadcast_tensors(call: Call) -> tuple[Draft, ...]:
    """Every tensor expanded to the shape that all have in common; constants become neurons with a bias."""
    pieces = [call.as_activation(value) for value in call.args["tensors"]]
    shape = tuple(call.result[0].shape)
    return tuple(call.moved(piece, replayed("aten::expand", size=shape), shape, "view") for piece in pieces)


@rule("meshgrid")
def meshgrid(call: Call) -> tuple[Draft, ...]:
    """Each vector laid along a dimension of its own."""
    pieces = [call.as_activation(value) for value in call.args["tensors"]]
    order = list(range(len(pieces)))
    if call.args.get("indexing", "ij") == "xy" and len(pieces) > 1:
        order[:2] = [1, 0]
    layers = []
    for piece, dim, out in zip(pieces, order, call.result, strict=True):
        line = tuple(math.prod(piece.shape) if axis == dim else 1 for axis in range(len(pieces)))
        vector = call.builder.add(call.moved(piece, replayed("aten::reshape", shape=line), line, "view"))
        layers.append(call.moved(vector, replayed("aten::expand", size=tuple(out.shape)), out.shape, "view"))
    return tuple(layers)


@rule(*SAME, walls=True)
@moves_walls
def same(call: Call) -> Draft:
    """The same neurons: copies, casts between floating-point types, layout changes."""
    return call.layer(Connection(call.source(_first(call)).name, Identity()))


@rule(*RESHAPED_LIKE)
def reshaped_like(call: Call) -> Draft:
    """A reshape to the shape of another tensor, of which only the shape is used."""
    if call.name == "expand_as":
        return call.moved(call.source("self"), replayed("aten::expand", size=call.shape), spatial="view")
    return call.moved(call.source("self"), replayed("aten::reshape", shape=call.shape), spatial="view")


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
def dropout(call: Call) -> Draft | tuple[Draft | Forbidden, ...]:
    """Dropout in eval mode is the identity."""
    if call.args["train"]:
        call.refuse(
            "it draws a random mask although the model is in eval mode.",
            "Pass training=self.training to the functional dropout, or use nn.Dropout.",
        )
    source = call.source(_first(call))
    layer = call.layer(Connection(source.name, Identity()), shape=source.shape)
    if call.name == "native_dropout":
        return layer, Forbidden("it reads a dropout mask.", "Do not use the mask.")
    return layer


@rule("pad", "constant_pad_nd", walls=True)
def pad(call: Call) -> Draft | Walled:
    """Padding: reflected, replicated and wrapped borders are edges, a constant border is a bias, −inf is no neuron."""
    value, fill = call.args["self"], call.args.get("value")
    sizes = tuple(int(size) for size in call.args["pad"])
    if isinstance(value, Walled):
        inner = replace(call, args={**call.args, "self": value.inside})
        if call.args.get("mode", "constant") != "constant":
            return walled(call, pad_of(inner, sizes, fill), replay(inner, "self")(value.wall.double()))
        wall = torch.nn.functional.pad(value.wall.double(), sizes, value=float(fill == -math.inf))
    else:
        inner, wall = call, None
        if fill == -math.inf:
            wall = torch.nn.functional.pad(torch.zeros(call.source("self").shape), sizes, value=1.0)
    layer = pad_of(inner, sizes, None if fill == -math.inf else fill)
    return layer if wall is None else walled(call, layer, wall)


def pad_of(call: Call, sizes: tuple[int, ...], fill: float | None) -> Draft:
    """Return a padded activation, the border being a number, zero when there is none, or edges.

    Args:
        call: The call, with the activation as its argument 'self'.
        sizes: Widths before and behind, last dimension first.
        fill: The number.

    Returns:
        The layer.
    """
    source, spatial = call.source("self"), tuple(range(-(len(sizes) // 2), 0))
    if call.args.get("mode", "constant") != "constant":
        return call.moved(source, replay(call, "self"), spatial=spatial)
    if fill is not None and not math.isfinite(fill):
        call.refuse(f"it pads with {fill}.", "Pad with finite numbers, or with −inf before max-pooling.")
    biases: tuple[Bias, ...] = ()
    if fill:
        border = Static(FunctionCall(_border, (source.shape, sizes, float(fill), call.result.device)), call.result)
        biases = call.bias(border)
    return call.layer(Connection(source.name, Move(replayed("aten::constant_pad_nd", pad=sizes), spatial)), biases=biases)


def _border(shape: tuple[int, ...], sizes: tuple[int, ...], value: float, device: torch.device) -> Tensor:
    return torch.nn.functional.pad(torch.zeros(shape, dtype=torch.float64, device=device), sizes, value=value)


@rule("cat", "concat", "concatenate", walls=True)
def cat(call: Call) -> Draft | Walled:
    """Concatenation; parameters and constants among the pieces become neurons with a bias."""
    values = list(call.args["tensors"])
    walls = [value.wall if isinstance(value, Walled) else None for value in values]
    pieces = [call.as_activation(value.inside if isinstance(value, Walled) else value) for value in values]
    dim = int(call.args["dim"]) % len(call.shape)
    layer = _joined(call, pieces, dim)
    if all(wall is None for wall in walls):
        return layer
    parts = [torch.zeros(piece.shape).bool() if wall is None else wall for piece, wall in zip(pieces, walls, strict=True)]
    return walled(call, layer, torch.cat([part for part in parts if part.shape != (0,)], dim))


def _joined(call: Call, pieces: list[Activation], dim: int) -> Draft:
    pieces = [piece for piece in pieces if piece.shape != (0,)]  # legacy empty tensors are skipped by torch.cat
    sizes = tuple(piece.shape[dim] for piece in pieces)
    return call.layer(*(Connection(piece.name, Identity()) for piece in pieces), concat=Concat(dim, sizes))


@rule(*STACKS)
def stack(call: Call) -> Draft:
    """Tensors joined along a dimension that some of them do not have yet."""
    pieces = [call.as_activation(value) for value in call.args["tensors"]]
    rank = len(call.shape)
    dim = int(call.args["dim"]) % rank if call.name == "stack" else min(STACKS[call.name], rank - 1)
    shapes = [_widened(call.name, piece.shape, dim) for piece in pieces]
    raised = [
        piece
        if piece.shape == shape
        else call.builder.add(call.moved(piece, replayed("aten::reshape", shape=shape), shape, "view"))
        for piece, shape in zip(pieces, shapes, strict=True)
    ]
    return _joined(call, raised, dim)


def _widened(name: str, shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Return the shape that a piece takes before it is joined along ``dim``."""
    if name == "stack":
        return (*shape[:dim], 1, *shape[dim:])
    if name == "hstack":
        return shape or (1,)
    if name == "column_stack":
        return shape if len(shape) > 1 else (math.prod(shape), 1)
    least = Operator("aten::atleast_3d" if name == "dstack" else "aten::atleast_2d")
    return tuple(least(torch.empty(shape, device="meta")).shape)


@rule("col2im")
def fold(call: Call) -> Draft:
    """Fold: overlapping blocks add up."""
    source = call.source("self")
    options = {key: call.args[key] for key in ("kernel_size", "dilation", "padding", "stride")}
    edges = Overlap(replay(call, "self"), replayed("aten::im2col", **options))
    return call.layer(Connection(source.name, edges))
