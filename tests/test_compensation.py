"""The weights that stay make up for those that go (mathematics §9): least squares over masks, without data and with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import pathlift
from cases import Residual, Tied, perceptron
from pathlift.compensation import compensated, least_squares
from pathlift.compensation.damping import damped
from pathlift.compensation.update import blocks_of
from pathlift.errors import InputError
from pathlift.pruning import Batch
from pathlift.reference import Probe
from pathlift.rescaling import with_state
from pathlift.statistics import activation_model, input_moments, measure
from pathlift.statistics.model import DOUBT

pytestmark = pytest.mark.filterwarnings("ignore:No path runs through")


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model in eval mode with random weights and statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        for name, tensor in model.state_dict().items():
            if "running" in name:
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model.eval()


def convolutions() -> nn.Module:
    """A batch norm, a bias in front of a kink, a depthwise convolution, a linear layer."""
    first = (nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    second = (nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 3, 1))
    return nn.Sequential(*first, *second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))


def mixed(count: int, *shape: int, seed: int = 1) -> Tensor:
    """Samples with a mean, and with neighbours that are alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
    return 0.4 + x + x.roll(1, -1)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def problem(groups: int, rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, columns, dtype=torch.float64, generator=generator)
    root = torch.randn(groups, columns, columns, dtype=torch.float64, generator=generator)
    keep = torch.rand(groups, rows, columns, generator=generator) > (
        0.2 + 0.6 * torch.rand(groups, rows, 1, generator=generator)
    )
    keep[0, 0] = False
    keep[-1, -1] = True
    return weight, keep, root @ root.mT + 0.1 * torch.eye(columns, dtype=torch.float64)


# ---- least squares over masks


@pytest.mark.parametrize("sizes", [(1, 12, 7), (3, 4, 5), (1, 1, 1), (5, 1, 9)])
def test_no_other_weights_in_the_same_places_change_the_outputs_less(sizes: tuple[int, int, int]) -> None:
    weight, keep, moment = problem(*sizes, seed=sum(sizes))
    rows = least_squares(weight, keep, moment, damping=0.0)
    assert bool((rows[~keep] == 0).all())
    slope = (rows - weight) @ moment
    assert float(slope[keep].abs().max()) < 1e-10 * float(moment.abs().max() * weight.abs().max())
    assert torch.equal(rows[keep.all(2)], weight[keep.all(2)])


def test_rows_with_one_mask_are_fitted_as_each_alone() -> None:
    weight, keep, moment = problem(1, 9, 6, seed=3)
    keep[:] = keep[0, 3]
    together = least_squares(weight, keep, moment)
    for row in range(9):
        alone = least_squares(weight[:, row : row + 1], keep[:, row : row + 1], moment)
        assert torch.allclose(alone[0, 0], together[0, row], rtol=1e-12, atol=1e-14)


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight, keep, moment = problem(2, 6, 5, seed=4)
    diagonal = torch.diag_embed(moment.diagonal(dim1=1, dim2=2))
    assert torch.allclose(least_squares(weight, keep, diagonal), torch.where(keep, weight, 0.0), rtol=1e-14)


def test_inputs_that_have_changed_are_fitted_as_well() -> None:
    """v is the least-squares fit of w·u by v·ũ, as `torch.linalg.lstsq` has it on the samples."""
    weight, keep, _ = problem(1, 6, 5, seed=5)
    before = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    now = before + 0.3 * before.roll(1, 1)
    rows = least_squares(weight, keep, (now.T @ now / 200)[None], (now.T @ before / 200)[None], damping=0.0)
    for row, stays in zip(range(6), keep[0], strict=True):
        if bool(stays.any()):
            fitted = torch.linalg.lstsq(now[:, stays], before @ weight[0, row]).solution
            assert torch.allclose(rows[0, row, stays], fitted, rtol=1e-9)


def test_rescaled_columns_and_rows_give_the_rescaled_result_bit_for_bit() -> None:
    weight, keep, moment = problem(2, 6, 5, seed=6)
    column = torch.tensor([1.0, 2.0**20, 2.0**-13, 2.0**300, 2.0**-200], dtype=torch.float64)
    row = torch.tensor([2.0, 1.0, 2.0**-30, 4.0, 2.0**11, 1.0], dtype=torch.float64)[:, None]
    plain = least_squares(weight, keep, moment)
    moved = least_squares(weight * row / column, keep, moment * column[:, None] * column)
    assert torch.equal(moved, plain * row / column)


def test_inputs_that_are_always_zero_leave_their_weights_alone() -> None:
    weight, keep, moment = problem(1, 4, 5, seed=7)
    moment[:, 2] = 0.0
    moment[:, :, 2] = 0.0
    rows = least_squares(weight, keep, moment)
    assert torch.equal(rows[..., 2], torch.where(keep, weight, 0.0)[..., 2])
    others = [0, 1, 3, 4]
    assert torch.allclose(
        rows[..., others], least_squares(weight[..., others], keep[..., others], moment[:, others][:, :, others])
    )


def test_a_moment_that_is_no_moment_is_refused() -> None:
    with pytest.raises(pathlift.NumericalError, match="positive semi-definite"):
        damped(torch.tensor([[[1.0, 100.0], [100.0, 1.0]]]), 0.0)


def test_blocks_of_columns_cover_all_and_are_narrow_where_there_are_many_rows() -> None:
    for rows, columns in ((512, 4608), (4096, 25088), (1, 9), (10, 20_000)):
        blocks = blocks_of(rows, columns)
        assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
        assert (blocks[0].start, blocks[-1].stop) == (0, columns)
    assert len(blocks_of(512, 4608)) == 1 < len(blocks_of(4096, 25088))


# ---- whole networks


@pytest.mark.one_in(2)
@pytest.mark.parametrize("data", [None, mixed(40, 2, 6, 6)], ids=["no data", "data"])
def test_masks_are_those_without_an_update_and_the_model_is_left_alone(data: Tensor | None) -> None:
    model = drawn(convolutions)
    before = copy.deepcopy(model.state_dict())
    _, plain = pathlift.prune(model, (2, 6, 6), 0.5)
    pruned, report = pathlift.prune(model, (2, 6, 6), 0.5, update="compensate", data=data)
    assert all(torch.equal(mask, report.masks[name]) for name, mask in plain.masks.items())
    state = pruned.state_dict()
    assert all(bool((state[name][~mask] == 0).all()) for name, mask in report.masks.items())
    assert report.updated is not None and plain.updated is None
    assert report.updated.statistics == ("batch norm" if data is None else "data") and not report.updated.left
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    assert changed <= {*report.masks, *report.updated.corrected} and "1.running_var" in changed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    network, again = pathlift.prune(pathlift.capture(model, (2, 6, 6)), amount=0.5, update="compensate", data=data)
    assert all(torch.equal(network.state[name], state[name]) for name in network.state)
    assert again.log10_cost == report.log10_cost


@pytest.mark.parametrize("data", [None, mixed(10, 2, 6, 6)], ids=["no data", "data"])
def test_where_nothing_goes_nothing_changes(data: Tensor | None) -> None:
    model = drawn(convolutions)
    pruned, report = pathlift.prune(model, (2, 6, 6), 0.0, update="compensate", data=data)
    assert same(model, pruned) and report.log10_cost == -math.inf


@pytest.mark.one_in(3)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_move_less_than_by_the_masks_alone(seed: int) -> None:
    """With data everywhere; without, over inputs of the statistics that it takes them to have."""
    model, x = drawn(lambda: perceptron(12, 16, 12, 4), seed), mixed(400, 12, seed=seed)
    gaussian = torch.randn(2000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def moved(samples: Tensor, **options: object) -> float:
        pruned, _ = pathlift.prune(model, (12,), 0.5, "magnitude", **options)  # type: ignore[call-overload]
        return float((pruned(samples) - model(samples)).detach().square().mean())

    assert moved(x, update="compensate", data=x) < 0.7 * moved(x)
    assert moved(gaussian, update="compensate") < 0.9 * moved(gaussian)


@pytest.mark.parametrize("criterion", ["lamp", "output_error"])
def test_inputs_of_another_size_are_weights_of_another_size(criterion: str) -> None:
    model = drawn(lambda: perceptron(12, 16, 12, 4))
    other = copy.deepcopy(model)
    first = next(iter(dict(model.named_parameters())))
    other.get_parameter(first).data *= 64
    options = {"amount": 0.5, "criterion": criterion, "update": "compensate"}
    told = {"input_mean": torch.full((12,), 0.5 * 64, dtype=torch.float64), "input_variance": 64.0**2}
    pruned, report = pathlift.prune(model, (12,), **options, **told)  # type: ignore[call-overload]
    expected, other_report = pathlift.prune(other, (12,), **options, input_mean=0.5)  # type: ignore[call-overload]
    pruned.get_parameter(first).data *= 64
    assert same(pruned, expected)
    assert all(torch.equal(mask, other_report.masks[name]) for name, mask in report.masks.items())
    untold, without = pathlift.prune(model, (12,), **options)  # type: ignore[call-overload]
    untold.get_parameter(first).data *= 64
    assert not same(untold, pruned)
    assert criterion == "lamp" or not all(torch.equal(mask, without.masks[name]) for name, mask in report.masks.items())
    with pytest.raises(pathlift.InputError, match="input_mean must have shape"):
        pathlift.prune(model, (12,), 0.5, input_mean=torch.ones(77))


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_fitted_better_where_it_is_told_what_inputs_look_like(seed: int) -> None:
    model = drawn(lambda: perceptron(12, 16, 12, 4), seed)
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = torch.randn(12, dtype=torch.float64, generator=generator), torch.linspace(0.1, 3, 12, dtype=torch.float64)
    samples = mean + deviation * torch.randn(2000, 12, dtype=torch.float64, generator=generator)

    def moved(**told: object) -> float:
        pruned, _ = pathlift.prune(model, (12,), 0.5, "magnitude", update="compensate", **told)  # type: ignore[call-overload]
        return float((pruned(samples) - model(samples)).detach().square().mean())

    assert moved(input_mean=mean, input_variance=deviation**2) < 0.9 * moved()


@pytest.mark.usefixtures("all_there_is")
def test_one_layer_is_fitted_to_the_data_as_well_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of each output stays, and the error is that of the best row with these zeros, but for the damping.

    That is, where these samples are taken to be all that there are.
    """
    monkeypatch.setattr(measure, "RARE", 0.0)
    model, x = drawn(lambda: nn.Sequential(nn.Linear(8, 5))), mixed(300, 8)
    pruned, report = pathlift.prune(model, (8,), 0.5, "magnitude", update="compensate", data=x)
    off = (pruned(x) - model(x)).detach()
    assert float(off.mean(0).abs().max()) < 1e-12
    centred, wanted = x - x.mean(0), model(x).detach()
    for row, stays in enumerate(report.masks["0.weight"]):
        fitted = torch.linalg.lstsq(centred[:, stays], (wanted - wanted.mean(0))[:, row]).solution
        best = (centred[:, stays] @ fitted - (wanted - wanted.mean(0))[:, row]).square().mean()
        plain = (x[:, ~stays] @ model[0].weight[row, ~stays].detach()).var(correction=0)
        assert float(best) - 1e-12 <= float(off[:, row].square().mean()) <= float(best + 0.05 * plain) + 1e-12


def test_the_mean_of_a_linear_layer_is_kept_where_it_is_known() -> None:
    """By the mean that propagation says, doubts included, outputs have the same mean before and after."""
    model = drawn(lambda: perceptron(6, 5, 3))
    network = pathlift.capture(model, (6,))
    report = pathlift.prune(network, amount=0.5, criterion="magnitude", scope="2.weight", update="compensate")
    state = report[0].state
    mean = input_moments(activation_model(network, correlations="channels", doubt=DOUBT), "2.weight").mean[0]
    before, after = (weights["2.weight"] @ mean + weights["2.bias"] for weights in (model.state_dict(), state))
    assert torch.allclose(before, after, rtol=1e-12)


def test_a_layer_of_which_nothing_goes_makes_up_for_those_below() -> None:
    model, x = drawn(lambda: perceptron(10, 8, 3)), mixed(300, 10)
    scores = {"0.weight": torch.rand(8, 10), "2.weight": torch.ones(3, 8) + 1}
    first, alone = pathlift.prune(model, (10,), 0.5, scores, scope="0.weight", update="compensate", data=x)
    amount = 40 / 104
    both, report = pathlift.prune(model, (10,), amount, scores, update="compensate", data=x)
    assert torch.equal(report.masks["0.weight"], alone.masks["0.weight"]) and bool(report.masks["2.weight"].all())
    assert torch.equal(first.state_dict()["2.weight"], model.state_dict()["2.weight"])
    assert not torch.equal(both.state_dict()["2.weight"], model.state_dict()["2.weight"])
    errors = [float((pruned(x) - model(x)).detach().square().mean()) for pruned in (first, both)]
    assert errors[1] < errors[0]


def test_batch_norms_see_on_the_data_what_they_saw_before() -> None:
    model, x = drawn(convolutions), mixed(50, 2, 6, 6)
    pruned, _ = pathlift.prune(model, (2, 6, 6), 0.6, update="compensate", data=x)
    before, after = (net[0](x).detach().transpose(0, 1).flatten(1) for net in (model, pruned))
    shift = pruned[1].running_mean - model[1].running_mean
    assert torch.allclose(shift, after.mean(1) - before.mean(1), atol=1e-12)
    ratio = after.var(1) / before.var(1)
    assert torch.allclose(pruned[1].running_var, torch.where(ratio > 0, model[1].running_var * ratio, model[1].running_var))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("data", [None, mixed(60, 2, 6, 6)], ids=["no data", "data"])
def test_the_update_of_a_rescaled_network_is_the_rescaled_update(data: Tensor | None) -> None:
    """Bit for bit under powers of two; batch norms are left out, whose running variances do not go along."""
    layers = (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model = drawn(lambda: nn.Sequential(*layers))
    groups = pathlift.symmetries(model, (2, 6, 6))
    state = groups.randomize((1, 128, 2.0**-5), torch.Generator().manual_seed(1))
    options = {"update": "compensate", "data": data}
    plain, _ = pathlift.prune(model, (2, 6, 6), 0.5, **options)
    moved, _ = pathlift.prune(with_state(model, state), (2, 6, 6), 0.5, **options)
    back = pathlift.symmetries(plain, (2, 6, 6)).rescale(state.factors)
    assert any(not torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(back[name], tensor) for name, tensor in moved.state_dict().items())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("data", [None, mixed(20, 1, 4, 4)], ids=["no data", "data"])
def test_the_path_metric_is_enclosed_and_no_bound_13_is_claimed(data: Tensor | None) -> None:
    model = drawn(Residual, 3)
    pruned, report = pathlift.prune(model, (1, 4, 4), 0.4, update="compensate", data=data)
    probe = Probe(model, torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    paths, theirs = (probe.dag(net.state_dict()).paths() for net in (model, pruned))
    exact = sum(abs(float(p.phi) - float(q.phi)) for p, q in zip(paths, theirs, strict=True))
    metric = report.path_metric
    assert not metric.exact and metric.lower * (1 - 1e-12) <= exact <= metric.upper * (1 + 1e-12)
    assert report.log10_cost == metric.log10_upper and report.bound == math.inf
    _, plain = pathlift.prune(model, (1, 4, 4), 0.4)
    assert plain.path_metric.exact and plain.path_metric.log10_upper == plain.log10_cost <= plain.log10_bound
    assert "path-metric" in str(report) and "bound (13)" in str(plain) and "bound (13)" not in str(report)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("selection", ["2:4", "channels", "per_output", "erk"])
@pytest.mark.parametrize("data", [None, mixed(40, 8)], ids=["no data", "data"])
def test_any_selection_can_be_made_up_for(selection: str, data: Tensor | None) -> None:
    model, amount = drawn(lambda: perceptron(8, 8, 8, 4)), None if selection == "2:4" else 0.5
    pruned, report = pathlift.prune(model, (8,), amount, "magnitude", selection=selection, update="compensate", data=data)
    state = pruned.state_dict()
    assert all(bool((state[name][~mask] == 0).all()) for name, mask in report.masks.items())
    assert report.sparsity > 0.3
    x = mixed(400, 8) if data is not None else torch.randn(400, 8, dtype=torch.float64)
    plain, _ = pathlift.prune(model, (8,), amount, "magnitude", selection=selection)
    off, without = (float((net(x) - model(x)).detach().square().mean()) for net in (pruned, plain))
    assert off < without


def test_the_mean_of_a_removed_channel_goes_into_the_next_bias() -> None:
    pytest.importorskip("torch_pruning")
    model, x = drawn(lambda: perceptron(6, 8, 3)), mixed(200, 6)
    smaller, report = pathlift.prune(
        model, (6,), 0.4, selection="channels", scope=["0.weight", "2.weight"], shrink=True, update="compensate", data=x
    )
    assert report.shrunk is not None and report.shrunk.channels_removed > 0
    assert float((smaller(x) - model(x)).detach().mean(0).abs().max()) < 1e-12


def test_a_weight_at_two_places_is_fitted_to_what_it_multiplies_at_both() -> None:
    model, x = drawn(Tied), mixed(200, 3)
    for data in (None, x):
        pruned, report = pathlift.prune(model, (3,), 0.4, update="compensate", data=data)
        assert report.updated is not None and report.updated.weights == ("first.weight",)
        assert pruned.second.weight is pruned.first.weight
        assert bool((pruned.first.weight[~report.masks["first.weight"]] == 0).all())
        assert not torch.equal(pruned.first.weight, torch.where(report.masks["first.weight"], model.first.weight, 0.0))


def test_what_has_no_rows_is_only_pruned_and_named_and_a_pruned_bias_stays_pruned() -> None:
    model, x = drawn(lambda: perceptron(6, 8, 3)), mixed(50, 6)
    scores = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    for data in (None, x):
        pruned, report = pathlift.prune(model, (6,), 0.5, scores, scope="*", update="compensate", data=data)
        assert report.updated is not None and set(report.updated.left) == {"0.bias", "2.bias"}
        assert all(bool((pruned.state_dict()[name][~mask] == 0).all()) for name, mask in report.masks.items())
        assert not {"0.bias", "2.bias"} & set(report.updated.corrected)


@pytest.mark.parametrize("deviations", [7.5, 20.0, 30.0])
def test_nothing_leans_on_a_neuron_that_stands_still(deviations: float) -> None:
    model = drawn(lambda: perceptron(6, 40, 20)).float()
    model[0].bias.data[2] = -deviations * model[0].weight.data[2].norm()
    masks = {"2.weight": torch.rand(20, 40, generator=torch.Generator().manual_seed(0)) > 0.4}
    masks["2.weight"][:, 2] = True
    state = compensated(pathlift.capture(model, (6,)), masks).network.state["2.weight"]
    assert torch.equal(state[:, 2], model[2].weight[:, 2])
    assert bool((state[:, 3:] != model[2].weight[:, 3:])[masks["2.weight"][:, 3:]].all())


@pytest.mark.parametrize("data", [None, mixed(50, 6).float()], ids=["no data", "data"])
def test_a_weight_that_would_leave_the_range_of_its_type_is_only_pruned_and_named(data: Tensor | None) -> None:
    model = drawn(lambda: perceptron(6, 8, 3)).float()
    model[0].weight.data[1] = 2.0**-90 * model[0].weight.data[0]
    model[0].bias.data[1] = 2.0**-90 * model[0].bias.data[0]
    model[2].weight.data[:, 0] = 2.0**60
    masks = {"2.weight": torch.ones(3, 8, dtype=torch.bool)}
    masks["2.weight"][:, 0] = False  # only the second neuron could make up for it, with 2^150
    update = compensated(pathlift.capture(model, (6,)), masks, None if data is None else [data])
    assert "beyond the range of torch.float32" in update.left["2.weight"]
    assert torch.equal(update.network.state["2.weight"], torch.where(masks["2.weight"], model[2].weight, 0.0))
    assert torch.equal(update.network.state["2.bias"], model[2].bias)


@pytest.mark.hunt
def test_data_come_in_one_tensor_in_batches_and_from_a_loader() -> None:
    model, x, y = drawn(lambda: perceptron(6, 8, 3)), mixed(30, 6), torch.arange(30) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    forms: list[object] = [x, Batch(x, y), list(x.split(7)), iter(x.split(11)), loader, DataLoader(TensorDataset(x), 9)]
    first, *others = (pathlift.prune(model, (6,), 0.5, update="compensate", data=data)[0] for data in forms)
    for other in others:
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    by_loss = [pathlift.prune(model, (6,), 0.5, "snip", data=data)[1].masks for data in (Batch(x, y), loader)]
    assert all(torch.equal(mask, by_loss[1][name]) for name, mask in by_loss[0].items())


class TwoInputs(nn.Module):
    """Two inputs, by position or in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.last(torch.relu(self.first(x) + self.second(y)))
        return z


class Named(TwoInputs):
    @override
    def forward(self, both: dict[str, Tensor]) -> Tensor:  # type: ignore[override]  # a dictionary in place of two tensors
        return super().forward(both["x"], both["y"])


@pytest.mark.parametrize("criterion", ["wanda", "path_magnitude_data", "magnitude"])
def test_several_inputs_come_as_the_model_takes_them_with_classes_or_without(criterion: str) -> None:
    torch.manual_seed(0)
    model, x, y, classes = TwoInputs(), torch.randn(24, 4), torch.randn(24, 3), torch.zeros(24, dtype=torch.int64)
    named = Named()
    named.load_state_dict(model.state_dict())
    pairs = TensorDataset(x, y)
    by_name = [({"x": first, "y": second},) for first, second in zip(x.split(8), y.split(8), strict=True)]
    forms: list[tuple[nn.Module, Any, Any]] = [
        (model, ((4,), (3,)), [(x, y)]),
        (model, ((4,), (3,)), DataLoader(pairs, 9)),
        (model, ((4,), (3,)), Batch((x, y), classes)),
        (model, ((4,), (3,)), [((x, y), classes)]),
        (named, ({"x": (4,), "y": (3,)},), by_name),
        (named, ({"x": (4,), "y": (3,)},), [by_name[0], *(({"y": given["y"], "x": given["x"]},) for (given,) in by_name[1:])]),
        (named, ({"x": (4,), "y": (3,)},), [(given[0], classes[:8]) for given in by_name]),
    ]
    made = [
        pathlift.prune(net, shape, 0.5, criterion, data=given, update="compensate")[0].state_dict()
        for net, shape, given in forms
    ]
    for other in made[1:]:
        assert all(torch.equal(tensor == 0, made[0][name] == 0) for name, tensor in other.items())
        assert all(torch.allclose(tensor, made[0][name], rtol=1e-5, atol=1e-7) for name, tensor in other.items())
    with pytest.raises(InputError, match=r"2 inputs, found 1 tensors. In a list of batches, each is a tuple"):
        pathlift.prune(model, ((4,), (3,)), 0.5, criterion, data=(x, x), update="compensate")
    with pytest.raises(InputError, match="2 inputs, found 3 tensors"):
        pathlift.prune(model, ((4,), (3,)), 0.5, criterion, data=[(x, y, classes)], update="compensate")
    with pytest.raises(InputError, match="looks at a loss"):
        pathlift.prune(model, ((4,), (3,)), 0.5, "snip", data=[(x, y)])
    assert pathlift.prune(model, ((4,), (3,)), 0.5, "snip", data=[((x, y), classes)])[1].amount == 0.5
    with pytest.raises(InputError, match="data is empty"):
        pathlift.pruning.CRITERIA["wanda"].scores(pathlift.capture(model, ((4,), (3,))), [])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"update": "finetune"}, "update must be one of none, compensate"),
        ({"update": None}, "update"),
        ({"data": torch.zeros(3, 5)}, r"shape \(3, 5\)"),
        ({"data": [torch.zeros(3, 6), torch.zeros(3, 5)]}, "different kinds"),
        ({"data": [torch.zeros(3, 6), Batch(torch.zeros(3, 6), torch.zeros(3))]}, "different kinds"),
        ({"data": []}, "no batch"),
        ({"data": [torch.full((2, 6), math.nan)]}, "NaN"),
        ({"data": ["x"]}, "data"),
        ({"data": 3}, "data"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(pathlift.InputError, match=told):
        pathlift.prune(drawn(lambda: perceptron(6, 8, 3)), (6,), 0.5, **{"update": "compensate"} | options)  # type: ignore[call-overload]


def test_an_empty_stream_of_data_is_refused_by_the_room_itself() -> None:
    network = pathlift.capture(drawn(lambda: perceptron(6, 8, 3)), (6,))
    with pytest.raises(pathlift.InputError, match="no batch"):
        compensated(network, {"0.weight": torch.ones(8, 6, dtype=torch.bool)}, [])


# ---- the criterion


def test_output_error_is_the_least_error_with_one_weight_less_times_the_sensitivity() -> None:
    network = pathlift.capture(drawn(convolutions), (2, 6, 6))
    scores = pathlift.pruning.CRITERIA["output_error"].scores(network)
    model = activation_model(network, correlations="channels", running="none", doubt=DOUBT)
    for name in ("0.weight", "3.weight", "9.weight"):
        moments = input_moments(model, name)
        weight, score = (moments.split(tensor.detach()) for tensor in (network.state[name], scores[name]))
        moment = moments.blocks(centred=True)
        damping = 0.05 * torch.diag_embed(moment.diagonal(dim1=1, dim2=2))
        for column in range(weight.shape[2]):
            keep = torch.ones(weight.shape, dtype=torch.bool)
            keep[..., column] = False
            change = least_squares(weight, keep, moment) - weight
            least = ((change @ (moment + damping)) * change).sum(2) * moments.sensitivity
            assert torch.allclose(least, score[..., column], rtol=1e-6)


def test_a_linear_layer_along_the_last_of_many_dimensions_is_fitted() -> None:
    """What is known of channels and space below says nothing of the numbers that it multiplies."""
    model = drawn(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)))
    pruned, report = pathlift.prune(model, (1, 3, 2, 4), 0.4, "magnitude", update="compensate")
    assert report.updated is not None and "3.weight" in report.updated.weights
    assert all(bool((pruned.state_dict()[name][~mask] == 0).all()) for name, mask in report.masks.items())
