"""What an expression of parameters can be over a box: the interval holds all of it, and little else, operator by operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from pathlift.graph.expressions import FunctionCall, StateTensor
from pathlift.graph.interval import Interval, NoIntervalError
from pathlift.passes.intervals import OPERATIONS, Ranges


class Call(NamedTuple):
    """An operator by its name, what it computes of the arguments that vary, and their shapes; those in ``positive`` are > 0."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    positive: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.args} {self.kwargs}"


ONE, TWO = ((3, 4),), ((3, 4), (3, 4))
norm, weight_norm = torch.linalg.vector_norm, torch._weight_norm
CALLS = (
    *(Call(name, getattr(torch, name), TWO) for name in ("add", "sub", "mul", "maximum", "minimum")),
    *(Call(name, getattr(torch, name), TWO, kwargs={"alpha": -1.5}) for name in ("add", "sub", "rsub")),
    Call("div", torch.div, TWO, positive=(1,)),
    *(Call(name, getattr(torch, name), ONE) for name in ("neg", "abs", "square", "exp", "sigmoid", "tanh", "relu")),
    *(Call(name, getattr(torch, name), ONE, positive=(0,)) for name in ("sqrt", "rsqrt", "log", "reciprocal")),
    *(Call("pow", torch.pow, ONE, (exponent,)) for exponent in (1, 2, 3, 4, 5)),
    *(Call("pow", torch.pow, ONE, (exponent,), positive=(0,)) for exponent in (-1, 0.5, -0.5)),
    *(Call(name, getattr(torch, name), ONE, args) for name in ("sum", "mean") for args in ((), (1,), ((0, 1),), ((0,), True))),
    *(Call("linalg_vector_norm", norm, ONE, args) for args in ((), (1,), (2, 0), (math.inf, (1,), True), (1, (0, 1)))),
    *(Call("norm", torch.norm, ONE, args) for args in (("fro",), (1,), (2, 1, True))),
    *(Call("norm_except_dim", torch.norm_except_dim, ONE, (2, dim)) for dim in (0, 1, -1)),
    *(Call("_weight_norm", weight_norm, ((3, 4), shape), (dim,)) for dim, shape in ((0, (3, 1)), (1, (1, 4)))),
    *(Call(name, getattr(torch, name), ONE, (0,), options) for name in ("var", "std") for options in ({}, {"correction": 0})),
    *(Call(name, getattr(torch, name), ONE, (1, False, True)) for name in ("var", "std")),
    *(Call(name, getattr(torch, name), ONE, (1, True)) for name in ("amax", "amin")),
    Call("max", torch.max, ONE),
    Call("min", torch.min, ONE),
    *(Call("clamp", torch.clamp, ONE, args) for args in ((-0.5, 0.5), (None, 0.5))),
    Call("clamp", torch.clamp, ONE, kwargs={"min": 0.1}),
    Call("clamp_max", torch.clamp_max, ONE, (0.1,)),
    Call("matmul", torch.matmul, ((3, 4), (4, 2))),
    Call("linear", F.linear, ((3, 4), (2, 4), (2,))),
    Call("addmm", torch.addmm, ((3, 2), (3, 4), (4, 2)), kwargs={"beta": 0.5, "alpha": -2.0}),
    *(Call(name, getattr(torch, name), ONE, (number,)) for name in ("add", "sub", "mul", "div") for number in (0.1, -1.3, 3)),
    Call("where", lambda x, y: torch.where(MASK, x, y), TWO),
    Call("masked_fill", lambda x: x.masked_fill(MASK, 0.3), ONE),
)
MASK = torch.tensor([[True, False, True, True]] * 2 + [[False, True, False, True]])
FIRST = {"where": (MASK,)}
LAST = {"masked_fill": (MASK, 0.3)}


def drawn(call: Call, width: float, generator: torch.Generator) -> list[Interval]:
    """A box for each argument that varies, some of its intervals across 0."""
    boxes = []
    for number, shape in enumerate(call.shapes):
        low = torch.randn(shape, generator=generator, dtype=torch.float64)
        low = low.abs() + 0.1 if number in call.positive else low
        boxes.append(Interval(low, low + width * torch.rand(shape, generator=generator, dtype=torch.float64)))
    return boxes


def enclosed(call: Call, boxes: list[Interval]) -> Interval:
    ranges = Ranges({}, {}, arithmetic=False)
    found = ranges.operator(call.name, *FIRST.get(call.name, ()), *boxes, *LAST.get(call.name, call.args), **call.kwargs)
    assert isinstance(found, Interval)
    return found


@pytest.mark.one_in(2)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_interval_holds_every_value_and_is_that_value_where_nothing_varies(call: Call) -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (0.0, 0.2, 3.0):
        for _ in range(4):
            boxes = drawn(call, width, generator)
            interval = enclosed(call, boxes)
            for _ in range(10):
                shares = [torch.rand(box.low.shape, generator=generator, dtype=torch.float64) for box in boxes]
                shares = [share.round() if float(share.flatten()[0]) < 0.7 else share for share in shares]
                points = [box.low + share * (box.high - box.low) for box, share in zip(boxes, shares, strict=True)]
                value = call.function(*points, *call.args, **call.kwargs)
                assert interval.low.shape == value.shape
                assert bool(((interval.low <= value) & (value <= interval.high)).all())
                if width == 0.0:
                    torch.testing.assert_close(interval.high - interval.low, torch.zeros_like(value), rtol=0.0, atol=1e-11)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("call", [call for call in CALLS if call.name not in FIRST | LAST], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_interval_holds_what_the_model_computes_in_its_own_type(call: Call, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (*(1.0,) * 20, 2.0**-60):
        state = {str(n): (size * box.low).to(dtype) for n, box in enumerate(drawn(call, 0.0, generator))}
        inputs = tuple(StateTensor(name) for name in state)
        expression = FunctionCall(getattr(torch, call.name, call.function), (*inputs, *call.args), call.kwargs, dtype)
        if getattr(expression.function, "__name__", "") not in OPERATIONS:
            return
        found = Ranges(state, dict(state), arithmetic=True).enclosed(expression)
        value = call.function(*state.values(), *call.args, **call.kwargs).double()
        assert bool(((found.low <= value) & (value <= found.high)).all())


@pytest.mark.parametrize("name", ["sqrt", "rsqrt", "reciprocal", "exp", "log", "sigmoid", "tanh"])
def test_no_processor_rounds_a_function_further_than_its_interval(name: str) -> None:
    """Vectors of some libraries are off by more than half a unit in the last place, roots by three quarters."""
    state = {"x": torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 8}
    expression = FunctionCall(getattr(torch, name), (StateTensor("x"),), {}, torch.float32)
    found, value = Ranges(state, dict(state), arithmetic=True).enclosed(expression), getattr(torch, name)(state["x"]).double()
    assert bool(((found.low <= value) & (value <= found.high)).all())


def test_a_divisor_that_may_be_0_bounds_nothing() -> None:
    ranges = Ranges({}, {}, arithmetic=False)
    one = Interval(torch.ones(3), torch.ones(3).clone())
    for low, high in ((-1.0, 2.0), (0.0, 2.0), (-1.0, 0.0)):
        found = ranges.operator("div", one, Interval(torch.full((3,), low).double(), torch.full((3,), high).double()))
        assert bool((found.low.isinf() & found.high.isinf()).all())


@pytest.mark.parametrize(
    ("name", "args"), [("pow", (2.5,)), ("pow", (-3,)), ("linalg_vector_norm", (3,)), ("max", (1,)), ("erf", ())]
)
def test_what_has_no_interval_is_refused(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(NoIntervalError):
        Ranges({}, {}, arithmetic=False).operator(name, *drawn(CALLS[0], 1.0, torch.Generator())[:1], *args)


def test_a_number_is_rounded_to_the_type_that_it_is_put_into() -> None:
    low = torch.tensor([1.0, 2.0])
    expression = FunctionCall(torch.masked_fill, (StateTensor("w"), torch.tensor([True, False]), 0.1), {}, torch.float32)
    found = Ranges({"w": low}, {"w": low + 1}, arithmetic=True).enclosed(expression)
    for number in (0.1, float(torch.tensor(0.1))):
        assert float(found.low[0]) <= number <= float(found.high[0])


def test_an_einsum_of_two_tensors_is_a_product_of_intervals_and_no_other_has_one() -> None:
    boxes = drawn(Call("matmul", torch.matmul, ((3, 4), (4, 2))), 0.5, torch.Generator().manual_seed(0))
    ranges = Ranges({}, {}, arithmetic=False)
    found, product = ranges.operator("einsum", "ij,jk->ik", boxes), ranges.operator("matmul", *boxes)
    torch.testing.assert_close(found.low, product.low)
    torch.testing.assert_close(found.high, product.high)
    for several in (boxes[:1], [*boxes, boxes[1]]):
        with pytest.raises(NoIntervalError):
            ranges.operator("einsum", "", several)
