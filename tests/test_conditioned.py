"""What a batch norm says of what the weight before it multiplies, and rounding that stands on it (mathematics §9)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.quantisation.compensated import DAMPING, compensated, compensated_in_range
from pathlift.quantisation.formats import format_of
from pathlift.quantisation.ranges import grid_of
from pathlift.statistics import activation_model, input_moments
from pathlift.statistics.conditioned import MOST, SWEEPS, conditioned_covariance, conditioned_mean
from pathlift.statistics.covariances import COLOURS


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(columns: int, seed: int = 0) -> Tensor:
    factor = drawn(2, columns, columns, seed=seed)
    return factor @ factor.mT / columns + 0.1 * torch.eye(columns, dtype=torch.float64)


def variances(rows: Tensor, c: Tensor) -> Tensor:
    return ((rows @ c) * rows).sum(2)


def divergence(true: Tensor, model: Tensor) -> Tensor:
    """KL(N(0, true) ‖ N(0, model)) of each group."""
    ratio = torch.linalg.solve(model, true)
    return (ratio.diagonal(dim1=1, dim2=2).sum(1) - torch.logdet(ratio) - len(true[0])) / 2


def test_one_row_gets_its_variance_and_nothing_that_is_uncorrelated_with_it_changes() -> None:
    c, row, wanted = covariance(5), drawn(2, 1, 5, seed=1), torch.tensor([[3.0], [0.2]], dtype=torch.float64)
    found = conditioned_covariance(c, row, wanted)
    torch.testing.assert_close(variances(row, found), wanted)
    other = drawn(2, 1, 5, seed=2)
    other -= (other @ c @ row.mT) / variances(row, c)[:, :, None] * row  # wᵀ C other = 0
    torch.testing.assert_close(variances(other, found), variances(other, c))


@pytest.mark.parametrize("count", [3, 9])
def test_variances_of_rows_bring_a_covariance_nearer_to_the_truth(count: int) -> None:
    true, rough, rows = covariance(6, seed=3), covariance(6, seed=4), drawn(2, count, 6, seed=5)
    found = conditioned_covariance(rough, rows, variances(rows, true))
    assert bool((divergence(true, found) < divergence(true, rough)).all())
    same = conditioned_covariance(true, rows, variances(rows, true))
    torch.testing.assert_close(same, true)


@pytest.mark.parametrize("count", [64, 160])
def test_rows_are_believed_one_after_the_other_where_pixels_are_nearly_alike(count: int) -> None:
    line = 0.96 ** (torch.arange(7.0, dtype=torch.float64)[:, None] - torch.arange(7.0, dtype=torch.float64)).abs()
    pixels = torch.kron(torch.tensor(COLOURS, dtype=torch.float64), torch.kron(line, line))
    rows, wanted = 0.03 * drawn(1, count, 147), torch.ones(1, count, dtype=torch.float64)
    plain = pixels.clone()
    for row in [*rows[0]] * SWEEPS:
        sent = plain @ row
        now = row @ sent
        plain += ((1.0 / now).clamp(1 / MOST, MOST) - 1.0) / now * torch.outer(sent, sent)
    found = conditioned_covariance(pixels[None].clone(), rows, wanted)[0]
    assert (found - plain).norm() < 1e-9 * plain.norm()


def test_the_space_of_rows_and_that_of_columns_give_the_same_covariance() -> None:
    c, rows = covariance(6), drawn(2, 4, 6, seed=1)
    wanted = variances(rows, covariance(6, seed=7))
    silent = torch.cat([rows, drawn(2, 4, 6, seed=2)], 1)
    padded = torch.cat([wanted, torch.zeros(2, 4, dtype=torch.float64)], 1)
    torch.testing.assert_close(conditioned_covariance(c, rows, wanted), conditioned_covariance(c, silent, padded))


@pytest.mark.parametrize("count", [3, 8])
def test_what_rows_say_moves_along_with_a_rescaling_bit_for_bit(count: int) -> None:
    c, rows, mean = covariance(6), drawn(2, count, 6, seed=1), drawn(2, 6, seed=2)
    wanted, known = variances(rows, covariance(6, seed=3)), drawn(2, count, seed=4)
    inward = torch.exp2(torch.arange(6, dtype=torch.float64) - 3.0)
    outward = torch.exp2(torch.arange(count, dtype=torch.float64) * 2.0 - 5.0)
    moved = rows / inward * outward[:, None]
    torch.testing.assert_close(
        conditioned_covariance(c * inward[:, None] * inward, moved, wanted * outward**2),
        conditioned_covariance(c, rows, wanted) * inward[:, None] * inward,
        rtol=0.0, atol=0.0,
    )  # fmt: skip
    spread = c.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(
        conditioned_mean(mean * inward, spread * inward**2, moved, known * outward, wanted * outward**2),
        conditioned_mean(mean, spread, rows, known, wanted) * inward,
        rtol=0.0, atol=0.0,
    )  # fmt: skip


def test_means_of_rows_bring_a_mean_nearer_to_the_truth() -> None:
    true, rows, c = drawn(2, 6, seed=1), drawn(2, 4, 6, seed=2), covariance(6)
    rough = true + 0.3 * drawn(2, 6, seed=3)
    known, variance = (rows @ true[:, :, None])[:, :, 0], variances(rows, c)
    found = conditioned_mean(rough, c.diagonal(dim1=1, dim2=2), rows, known, variance)
    assert bool(((found - true).square().sum(1) < (rough - true).square().sum(1)).all())
    off = ((rows @ (found - true)[:, :, None])[:, :, 0].square() / variance).mean()
    assert float(off) < 1e-2
    torch.testing.assert_close(conditioned_mean(true, c.diagonal(dim1=1, dim2=2), rows, known, variance), true)


@pytest.mark.parametrize("correlations", ["taps", "channels"])
def test_the_variance_of_a_depthwise_layer_is_the_one_its_batch_norm_knows(correlations: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU()
    ).double()
    norm = model[4]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
    network = pathlift.capture(model.eval(), (3, 8, 8))
    plain = input_moments(activation_model(network, correlations=correlations), "3.weight")  # type: ignore[arg-type]
    rows = plain.split(network.state["3.weight"]).double()
    wanted = variances(rows, plain.covariance()) * torch.tensor([[0.8], [1.25], [1.0], [1.1]], dtype=torch.float64)
    norm.running_var = wanted.reshape(-1)
    told = input_moments(
        activation_model(pathlift.capture(model, (3, 8, 8)), correlations=correlations),  # type: ignore[arg-type]
        "3.weight",
    )
    torch.testing.assert_close(variances(rows, told.covariance()), wanted, rtol=0.005, atol=0.0)  # eigenvalues are lifted
    torch.testing.assert_close(told.second, told.covariance() + told.mean[:, :, None] * told.mean[:, None, :])
    torch.testing.assert_close(told.second_of(2), told.second[2])


@pytest.mark.parametrize("correlations", ["taps", "channels"])
def test_a_batch_norm_says_nothing_of_what_was_measured(correlations: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).double().eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean = torch.full((4,), 9.0, dtype=torch.float64)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64) + torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    network = pathlift.capture(model, (3, 8, 8))
    found = input_moments(activation_model(network, [x], correlations=correlations), "0.weight")  # type: ignore[arg-type]
    torch.testing.assert_close(found.mean[0], x.mean((0, 2, 3)))


def test_a_batch_norm_that_is_not_that_of_the_weight_says_nothing_of_means() -> None:
    torch.manual_seed(0)
    rows, mean = torch.randn(1, 6, 6, dtype=torch.float64), torch.rand(1, 6, dtype=torch.float64)
    spread = torch.ones(1, 6, dtype=torch.float64)
    known, variance = (rows @ mean[:, :, None])[:, :, 0] + 0.1, rows.square().sum(2)
    sound = conditioned_mean(mean, spread, rows[:, 1:], known[:, 1:], variance[:, 1:])
    rows[:, 0] *= 1e-3  # without its batch norm
    variance[:, 0] *= 1e-6
    torch.testing.assert_close(conditioned_mean(mean, spread, rows, known, variance), sound)


def cost(weight: Tensor, grid: pathlift.quantisation.grids.Grid, integers: Tensor, c: Tensor) -> Tensor:
    change = grid.values(integers) - weight
    return variances(change, c + DAMPING * torch.diag_embed(c.diagonal(dim1=1, dim2=2)))


@pytest.mark.parametrize("columns", [9, 70])
def test_looking_again_and_trying_ranges_never_cost_more(columns: int) -> None:
    weight, c = drawn(2, 5, columns, seed=1), covariance(columns)
    grid = grid_of(weight, format_of(3), "channel", "mse")
    once, again = compensated(weight, grid, c, again=0), compensated(weight, grid, c)
    better, chosen = compensated_in_range(weight, grid, c)
    slack = 1.0 + 1e-9
    assert bool((cost(weight, grid, again, c) <= slack * cost(weight, grid, once, c)).all())
    assert bool((cost(weight, better, chosen, c) <= slack * cost(weight, grid, again, c)).all())
    assert not torch.equal(once, again)
    assert torch.equal(better.scale, grid.scale) == (columns == 70)
    assert int(chosen.max()) <= 3
    assert int(chosen.min()) >= -4
