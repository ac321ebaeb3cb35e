"""Grids and rounding of matrices: membership, order, balance, and compensated rounding against its definition (§9)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pathlift.compensation.correction import quadratic
from pathlift.errors import InputError, NumericalError
from pathlift.quantisation.compensated import UnitFactor, compensated
from pathlift.quantisation.formats import FLOATS, Format, format_of
from pathlift.quantisation.grids import Grid
from pathlift.quantisation.ranges import RANGES, grid_of
from pathlift.quantisation.rounding import away, balanced, stochastic, towards_zero

FORMATS = [format_of(bits, affine=affine) for bits in range(2, 9) for affine in (False, True)] + [format_of(n) for n in FLOATS]


def name_of(form: Format) -> str:
    return f"{form.name}{'-affine' if form.affine else ''}"


def weights(seed: int = 0, shape: tuple[int, int, int] = (2, 3, 12)) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[0, 0, 0] = 0.0
    return drawn.float().double()


def all_values(grid: Grid, like: Tensor) -> Tensor:
    """Every value of each element's grid, along a new last axis."""
    integers = torch.arange(grid.format.low, grid.format.high + 1, dtype=torch.int32)
    return torch.stack([grid.values(torch.full(like.shape, int(q), dtype=torch.int32)) for q in integers], -1)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 2])
@pytest.mark.parametrize("form", [form for form in FORMATS if form.name != "bf16"], ids=name_of)
def test_neighbours_are_the_nearest_values_of_the_grid_on_both_sides(form, granularity):
    weight = weights()
    grid = grid_of(weight, form, granularity, "mse", taps=3)
    values = all_values(grid, weight)
    below = grid.below(weight)
    outside = weight < values.amin(-1)
    largest = torch.where(values <= weight[..., None], values, -torch.inf).amax(-1)
    assert torch.equal(grid.values(below), torch.where(outside, values.amin(-1), largest))
    smallest = torch.where(values >= weight[..., None], values, torch.inf).amin(-1)
    above = grid.values(grid.above(weight, below))
    assert torch.equal(above, torch.where(weight > values.amax(-1), values.amax(-1), smallest))
    distance = (values - weight[..., None]).abs().amin(-1)
    assert torch.equal((grid.values(grid.nearest(weight)) - weight).abs(), distance)


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_rounding_towards_zero_and_away_from_it_is_ordered(form):
    weight = weights()
    grid = grid_of(weight, form, "channel", "minmax")
    less = grid.values(towards_zero(weight, grid))
    assert bool((less.abs() <= weight.abs()).all()) and bool((less * weight >= 0).all())
    more = grid.values(away(weight, grid))
    assert bool((more * weight >= 0).all())
    if not form.affine:  # an affine grid that has 0 may end before the largest weight
        assert bool((more.abs() >= weight.abs()).all())


def test_bfloat16_grids_are_what_pytorch_rounds_to():
    weight = weights()
    grid = grid_of(weight, format_of("bf16"), "channel", "mse")
    assert torch.equal(grid.values(grid.nearest(weight)), weight.float().bfloat16().double())


def test_stochastic_rounding_is_right_on_average_and_goes_by_its_seed():
    weight = torch.full((1, 1, 20000), 0.3)
    grid = Grid(format_of(4), torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int32), 20000)
    draws = [stochastic(weight.double(), grid, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert set(draws[0].unique().tolist()) == {0, 1}
    assert abs(float(draws[0].double().mean()) - 0.3) < 4 * (0.21 / 20000) ** 0.5


@pytest.mark.parametrize("rule", RANGES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 2])
def test_a_range_scales_with_its_weights_and_the_better_rules_are_better(rule, affine, granularity):
    weight, importance = weights(), torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) ** 4
    form = format_of(3, affine=affine)
    grid = grid_of(weight, form, granularity, rule, importance, taps=3)
    double = grid_of(weight * 8, form, granularity, rule, importance * 2, taps=3)
    assert torch.equal(double.scale, grid.scale * 8) and torch.equal(double.zero, grid.zero)

    def error(which: Grid) -> float:
        off = (which.values(which.nearest(weight)) - weight).abs()
        measure = {"mse": off**2, "lp": off**2.4, "expected": off**2 * importance[:, None]}
        return float(measure.get(rule, torch.zeros(1)).sum())

    assert error(grid) <= error(grid_of(weight, form, granularity, "minmax", taps=3))


def test_a_group_has_as_many_input_channels_as_divide_theirs():
    weight = weights(shape=(1, 2, 12))
    assert grid_of(weight, format_of(4), 3, "minmax", taps=2).scale.shape == (1, 2, 2)
    assert grid_of(weight, format_of(4), 4, "minmax", taps=2).scale.shape == (1, 2, 2)
    assert grid_of(weight, format_of(4), 100, "minmax", taps=2).scale.shape == (1, 2, 1)


@pytest.mark.parametrize("affine", [False, True])
def test_balanced_rounding_leaves_half_a_step_in_each_kernel_and_channel(affine):
    weight = weights(shape=(2, 4, 5 * 9))
    grid = grid_of(weight, format_of(6, affine=affine), "channel", "minmax")
    integers = balanced(weight, grid, 9)
    errors = integers - weight / grid.scale.double() - grid.zero
    assert bool((errors.abs() < 1.0 + 1e-9).all())
    assert bool((errors.reshape(2, 4, 5, 9).sum(3).abs() <= 1.5 + 1e-9).all())  # half, and one entry that the channel moved
    assert bool((errors.sum(2).abs() <= 0.5 + 1e-9).all())
    nearest = grid.nearest(weight) - weight / grid.scale.double() - grid.zero
    assert bool((nearest.sum(2).abs() > 0.5).any())


def one_after_another(row: Tensor, grid: Grid, moment: Tensor) -> Tensor:
    """Optimal brain quantisation by its definition: round an entry, then minimise Δᵀ H Δ over all that are left."""
    current, done = row.clone(), []
    for column in range(len(row)):
        value = grid.values(grid.nearest(current.reshape(1, 1, -1)))[0, 0, column]
        done.append(column)
        left = [other for other in range(len(row)) if other not in done]
        change = current - row
        change[column] = value - row[column]
        if left:
            fixed = moment[left][:, done] @ change[done]
            change[left] = -torch.linalg.solve(moment[left][:, left], fixed)
        current = row + change
    return current


@pytest.mark.parametrize("seed", range(6))
def test_compensated_rounding_is_optimal_brain_quantisation_in_order(seed):
    drawn = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 3, 6, generator=drawn, dtype=torch.float64)
    root = torch.randn(2, 6, 9, generator=drawn, dtype=torch.float64)
    moment = root @ root.mT
    grid = grid_of(weight, format_of(3), "channel", "minmax")
    rounded = grid.values(compensated(weight, grid, moment, 0.0, again=0))
    for group, row in itertools.product(range(2), range(3)):
        cell = Grid(grid.format, grid.scale[group : group + 1, row : row + 1], grid.zero[group : group + 1, row : row + 1], 6)
        assert torch.allclose(rounded[group, row], one_after_another(weight[group, row], cell, moment[group]), atol=1e-9)


def test_compensated_rounding_is_better_than_nearest_on_average():
    drawn = torch.Generator().manual_seed(7)
    weight = torch.randn(20, 5, 24, generator=drawn, dtype=torch.float64)
    root = torch.randn(20, 24, 12, generator=drawn, dtype=torch.float64)
    moment = root @ root.mT
    grid = grid_of(weight, format_of(3), "channel", "minmax")
    cost, plain = (
        quadratic(grid.values(q) - weight, moment) for q in (compensated(weight, grid, moment), grid.nearest(weight))
    )
    assert float((plain / cost).log().mean()) > 0.5


def test_no_rounding_is_better_than_the_best_of_all():
    drawn = torch.Generator().manual_seed(7)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.int32)[None]
    ratios = []
    for _ in range(20):
        weight = torch.randn(1, 1, 4, generator=drawn, dtype=torch.float64)
        root = torch.randn(1, 4, 4, generator=drawn, dtype=torch.float64)
        moment = root @ root.mT
        grid = grid_of(weight, format_of(2, affine=True), "channel", "minmax")
        cost = quadratic(grid.values(compensated(weight, grid, moment, 0.0)) - weight, moment)
        best = quadratic(grid.values(every) - weight, moment).min()
        assert best <= cost * (1 + 1e-12)
        ratios.append(float(cost / best))
    assert sorted(ratios)[10] < 2  # most are not far from it


def test_compensated_rounding_does_not_see_a_rescaling_of_columns():
    drawn = torch.Generator().manual_seed(1)
    root = torch.randn(1, 70, 50, generator=drawn, dtype=torch.float64)  # of low rank: damping decides
    factor = torch.exp2(torch.randint(-20, 20, (70,), generator=drawn).double())
    moment = root @ root.mT
    rescaled = moment / factor[:, None] / factor
    everything = slice(0, 70)
    own, other = (UnitFactor(each, 0.01).part(everything, everything).triu() for each in (moment, rescaled))
    assert torch.equal(other, own * factor / factor[:, None])


def test_a_column_that_is_never_active_is_rounded_to_nearest():
    weight = weights(shape=(1, 2, 4))
    moment = torch.zeros(1, 4, 4)
    moment[0, :2, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    grid = grid_of(weight, format_of(3), "channel", "minmax")
    assert torch.equal(compensated(weight, grid, moment)[:, :, 2:], grid.nearest(weight)[:, :, 2:])


def test_what_is_no_grid_and_no_second_moment_is_refused():
    with pytest.raises(InputError, match="2 to 8 bits, found 1"):
        format_of(1)
    with pytest.raises(InputError, match="Did you mean 'fp8_e4m3'"):
        format_of("fp8_e4m")
    with pytest.raises(InputError, match="float32 does not hold the step"):
        grid_of(weights() * 1e-60, format_of(4), "channel", "minmax")
    with pytest.raises(NumericalError, match="positive semi-definite"):
        UnitFactor(torch.tensor([[[1.0, 100.0], [100.0, 1.0]]]), 0.01)
