"""Data movement: views, slices, concatenations, padding, shuffles, and operators that do nothing in eval mode.

Every neuron above is one neuron below (or a constant), so the rule replays the operator itself on whatever travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pathlift.edges import Identity, Move, Overlap, Scale
from pathlift.edges.movement import Spatial
from pathlift.network import Apply, Concat, Start, Term
from pathlift.rules.base import MOVEMENTS, Activation, Call, Forbidden, Layer, Refusal, Static, Walled, rule

VIEWS = [
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "mT", "adjoint", "ravel", "expand", "broadcast_to", "slice",
    "select", "narrow", "diagonal", "unfold",
]  # fmt: skip
"""Operators that only view a contiguous tensor."""

REPLAYED = [
    *VIEWS, "repeat", "tile", "repeat_interleave", "roll", "flip", "fliplr", "flipud", "rot90", "im2col", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "tril", "triu",
]  # fmt: skip
"""Operators that are replayed on path activations exactly as they stand."""

SAME = ["contiguous", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "to", "_to_copy", "type_as", "positive"]
RESHAPED_LIKE = {"view_as": "reshape", "reshape_as": "reshape", "expand_as": "expand"}
SPLITS = ["split", "split_with_sizes", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit"]
INDEXED = ["index", "index_select", "gather", "take_along_dim"]

MOVEMENTS.update(REPLAYED, SAME, RESHAPED_LIKE, SPLITS, INDEXED, ("getitem", "cat", "stack", "concat", "pad"))


def replay(call: Call, key: str) -> Callable[[Tensor], Tensor]:
    """Return the call as a function of one of its arguments, the others fixed.

    Args:
        call: The call; none of the other arguments may depend on the input.
        key: Schema name of the free argument.

    Returns:
        The function.
    """
    fixed = {name: _fixed(call, name, value) for name, value in call.args.items() if name != key}
    target = call.target

    def function(x: Tensor) -> Any:
        return target(**{key: x}, **fixed)

    return function


def _fixed(call: Call, name: str, value: Any) -> Any:
    if isinstance(value, Activation):
        call.refuse(f"its argument '{name}' depends on the input.", "Indices and sizes must be constants.")
    if isinstance(value, Forbidden):
        raise Refusal(value.reason, value.advice)
    if isinstance(value, Static):
        return call.builder.bake(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_fixed(call, name, item) for item in value)
    return value


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


@rule(*REPLAYED)
def move(call: Call) -> Layer:
    """The operator replayed on the path activations."""
    key = _first(call)
    if call.name in ("view", "_unsafe_view"):
        if "dtype" in call.args:
            call.refuse("it reads the bits of a tensor as another type.", "Convert with .to(dtype).")
        shape = call.shape
        # strides of path activations may differ
        return call.moved(call.source(key), lambda x: x.reshape(shape), spatial="view")
    source = call.source(key)
    return call.moved(source, replay(call, key), spatial=_spatial(call, len(source.shape)))


@rule(*INDEXED)
def index(call: Call) -> Layer:
    """Indexing with constant indices."""
    key = _first(call)
    return call.moved(call.source(key), replay(call, key))


@rule(*SPLITS)
def split(call: Call) -> tuple[Layer, ...]:
    """Pieces of a tensor: one layer each."""
    key = _first(call)
    source, function = call.source(key), replay(call, key)
    layers = []
    for place, piece in enumerate(call.result):

        def take(x: Tensor, place: int = place) -> Tensor:
            out: Tensor = function(x)[place]
            return out

        layers.append(call.moved(source, take, piece.shape, spatial="view"))
    return tuple(layers)


@rule(*SAME)
def same(call: Call) -> Layer:
    """The same neurons: copies, casts between floating-point types, layout changes."""
    return call.layer(Term(call.source(_first(call)).name, Identity()))


@rule(*RESHAPED_LIKE)
def reshaped_like(call: Call) -> Layer:
    """A reshape to the shape of another tensor, of which only the shape is used."""
    shape, expand = call.shape, call.name == "expand_as"
    return call.moved(call.source("self"), lambda x: x.expand(shape) if expand else x.reshape(shape), spatial="view")


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
def dropout(call: Call) -> Layer | tuple[Layer | Forbidden, ...]:
    """Dropout in eval mode is the identity."""
    if call.args["train"]:
        call.refuse(
            "it draws a random mask although the model is in eval mode.",
            "Pass training=self.training to the functional dropout, or use nn.Dropout.",
        )
    source = call.source(_first(call))
    layer = call.layer(Term(source.name, Identity()), shape=source.shape)
    if call.name == "native_dropout":
        return layer, Forbidden("it reads a dropout mask.", "Do not use the mask.")
    return layer


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Layer | Walled:
    """Padding: reflected, replicated and wrapped borders are edges, a constant border is a bias, −inf is no neuron."""
    source, fill = call.source("self"), call.args.get("value")
    if call.args.get("mode", "constant") != "constant":
        return call.moved(source, replay(call, "self"), spatial=tuple(range(-(len(call.args["pad"]) // 2), 0)))
    sizes = [int(size) for size in call.args["pad"]]
    if fill == -math.inf and min(sizes) >= 0:
        reason = "it reads a border of −inf, which only max-pooling may do."
        return Walled(reason, "Pad with zeros, or let max-pooling pad.", source, tuple(sizes[::2]), tuple(sizes[1::2]))
    if fill is not None and not math.isfinite(fill):
        call.refuse(f"it pads with {fill}.", "Pad with finite numbers, or with −inf before max-pooling.")

    def zero_pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, sizes)

    starts: tuple[Start, ...] = ()
    if fill:
        border = Static(Apply(_border, (source.shape, sizes, float(fill), call.result.device)), call.result)
        starts = call.bias(border)
    return call.layer(Term(source.name, Move(zero_pad, tuple(range(-(len(sizes) // 2), 0)))), starts=starts)


def _border(shape: tuple[int, ...], sizes: list[int], value: float, device: torch.device) -> Tensor:
    return torch.nn.functional.pad(torch.zeros(shape, dtype=torch.float64, device=device), sizes, value=value)


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
def cat(call: Call) -> Layer:
    """Concatenation; parameters and constants among the pieces become neurons with a bias."""
    if call.name in ("hstack", "vstack", "dstack"):
        call.refuse(f"torch.{call.name} has no rule.", "Write it as torch.cat.")
    pieces = [call.as_activation(value) for value in call.args["tensors"]]
    pieces = [piece for piece in pieces if piece.shape != (0,)]  # legacy empty tensors are skipped by torch.cat
    dim = int(call.args["dim"]) % len(call.shape)
    edges = Move(lambda x: x.unsqueeze(dim), "view") if call.name == "stack" else Identity()
    sizes = tuple(1 if call.name == "stack" else piece.shape[dim] for piece in pieces)
    return call.layer(*(Term(piece.name, edges) for piece in pieces), concat=Concat(dim, sizes))


@rule("col2im")
def fold(call: Call) -> Layer:
    """Fold: overlapping blocks add up."""
    source = call.source("self")
    options = {key: call.args[key] for key in ("kernel_size", "dilation", "padding", "stride")}
    edges = Overlap(replay(call, "self"), lambda y: torch.ops.aten.im2col(y, **options))
    return call.layer(Term(source.name, edges))


@rule("where")
def where(call: Call) -> Layer:
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
def masked_fill(call: Call) -> Layer:
    """Constant positions overwritten by a constant."""
    if not isinstance(call.args["mask"], Static):
        call.refuse("its mask depends on the input.", "Use a constant mask.")
    return _chosen(call, call.args["mask"], "value", "self")


def _chosen(call: Call, mask: Static, when_true: str, when_false: str) -> Layer:
    terms: tuple[Term, ...] = ()
    starts: tuple[Start, ...] = ()
    for key, sign in ((when_true, True), (when_false, False)):
        chosen = Static(Apply(_indicator, (mask.expression, sign)), mask.fake)
        value = call.args[key]
        if isinstance(value, Activation):
            terms += (Term(value.name, Scale(), call.weight(chosen)),)
        else:
            static = call.static(key)
            assert static is not None
            shape = torch.broadcast_shapes(mask.shape, static.shape)
            product = Static(Apply(_masked, (mask.expression, sign, static.expression)), torch.empty(shape, device="meta"))
            starts += call.bias(product)
    return call.layer(*terms, starts=starts)


def _indicator(mask: Tensor, sign: bool) -> Tensor:
    return (mask.bool() == sign).double()


def _masked(mask: Tensor, sign: bool, value: Tensor | float) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=mask.device)
    return torch.where(mask.bool() == sign, value, torch.zeros_like(value))


@rule("slice_scatter", "select_scatter", "diagonal_scatter")
def scatter(call: Call) -> Layer:
    """One slice of a tensor replaced: what an assignment to x[…] becomes in the exported graph."""
    base, patch = call.as_activation(call.args["self"]), call.as_activation(call.args["src"])
    fixed = {name: value for name, value in call.args.items() if name not in ("self", "src")}
    target, patch_shape, base_shape = call.target, patch.shape, base.shape

    def keep(x: Tensor) -> Tensor:
        out: Tensor = target(x, x.new_zeros(patch_shape), **fixed)
        return out

    def place(x: Tensor) -> Tensor:
        out: Tensor = target(x.new_zeros(base_shape), x, **fixed)
        return out

    return call.layer(Term(base.name, Move(keep)), Term(patch.name, Move(place)))


@rule("index_put")
def index_put(call: Call) -> Layer:
    """Assignment at constant indices."""
    indices = _fixed(call, "indices", call.args["indices"])
    base, patch = call.as_activation(call.args["self"]), call.as_activation(call.args["values"])
    accumulate, base_shape, patch_shape = bool(call.args["accumulate"]), base.shape, patch.shape

    def keep(x: Tensor) -> Tensor:
        return x if accumulate else torch.index_put(x, indices, x.new_zeros(patch_shape))

    def place(x: Tensor) -> Tensor:
        return torch.index_put(x.new_zeros(base_shape), indices, x, accumulate)

    if accumulate:
        call.refuse("it accumulates at indices.", "Use an assignment without repeated indices.")
    return call.layer(Term(base.name, Move(keep)), Term(patch.name, Move(place)))


@rule("copy", "fill")
def copy(call: Call) -> Layer:
    """A tensor overwritten as a whole: only what is written counts."""
    value = call.args["src" if call.name == "copy" else "value"]
    patch = call.as_activation(value if not isinstance(value, (int, float)) else call.number(value))
    shape = call.shape
    return call.moved(patch, lambda x: x.expand(shape), spatial="view")
