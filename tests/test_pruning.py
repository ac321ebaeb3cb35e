"""Pruning: what a mask costs, how weights are chosen, and what is refused (mathematics §6)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import pathlift
from agreement import RTOL, close, outputs, randomised, samples
from cases import Residual, Tied, perceptron
from habit import LONGER
from networks import networks, over
from pathlift import prune
from pathlift.pruning import NofM, ScorePruning, apply_masks, from_torch_prune, importance_scores, to_torch_prune
from pathlift.pruning.scope import prunable
from pathlift.pruning.selection import (
    SELECTIONS,
    keep_largest,
    kept_of,
    select_channels,
    select_erk,
    select_lamp,
    select_per_output,
)

pytestmark = pytest.mark.filterwarnings("ignore:No path runs through")


def lifted(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    return pathlift.path_lifting(model, shape).phi


def check_costs(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    """Drift ≤ max(‖x‖, 1)·joint cost, joint cost = ‖Φ(θ) − Φ(θ')‖₁ by enumeration, joint cost ≤ bound (13)."""
    model = randomised(model, weights)
    network = pathlift.capture(model, shape)
    if not prunable(network):
        return
    amount = (0.2, 0.5, 0.8)[weights % 3]
    pruned, report = prune(model, shape, amount, "path_magnitude", scope=prunable(network))
    assert report.sparsity <= amount + 1e-9
    assert close(report.cost, float((lifted(model, shape) - lifted(pruned, shape)).abs().sum()))
    assert report.cost <= report.bound * (1 + RTOL)
    assert close(report.mass_kept * 10**report.log10_path_norm, 10**report.log10_path_norm_left)
    x = samples(shape)
    size = torch.stack([own.flatten(1).abs().amax(1) for own in x]).amax(0).clamp(min=1.0)
    drift = (outputs(model, x) - outputs(pruned, x)).abs().sum(1)
    assert bool((drift <= size * report.cost * (1 + RTOL) + 1e-12).all())


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(6 * LONGER))
def test_drift_joint_cost_and_bound_are_in_order_on_random_networks(part):
    over(networks(), 400, part, check_costs)


@pytest.mark.hunt
def test_costs_of_the_network_with_shared_and_of_that_with_residual_weights():
    for make, shape in ((Residual, (1, 3, 3)), (Tied, (3,))):
        for seed in range(3):
            check_costs(make(), shape, seed)


def test_bound_is_exact_for_weights_of_one_layer():
    """Additivity: no path holds two weights of one layer, so the path-magnitudes of what goes add up to the joint cost."""
    model = randomised(perceptron(3, 4, 2), 1)
    _, report = prune(model, (3,), 0.5, scope="2.weight")
    assert close(report.cost, report.bound)
    _, both = prune(model, (3,), 0.5)
    assert both.cost < both.bound * (1 - 1e-6)


@pytest.mark.hunt
def test_one_weight_a_round_is_greedy_on_the_path_metric():
    """Each round removes the weight that adds least to ‖Φ(θ) − Φ(θ')‖₁, which is what one finds by trying all."""
    model = randomised(perceptron(2, 3, 2), 3)
    whole = lifted(model, (2,))
    network = pathlift.capture(model, (2,))
    names = prunable(network)
    masks = {name: torch.ones_like(network.state[name], dtype=torch.bool) for name in names}
    for left in range(11, 5, -1):
        tries = []
        for name in names:
            for place in masks[name].nonzero().tolist():
                other = {key: mask.clone() for key, mask in masks.items()}
                other[name][tuple(place)] = False
                tries.append((float((whole - lifted(apply_masks(model, other), (2,))).abs().sum()), name, other))
        masks = min(tries, key=lambda entry: entry[0])[2]
        _, report = prune(
            model, (2,), 1 - left / 12, steps=1, criterion=lambda _, m=masks: {k: v.double() for k, v in m.items()}
        )
        assert all(torch.equal(report.masks[name], masks[name]) for name in names)
        # the same choice from path-magnitudes scored anew after each single weight
        pruned, costs = network, []
        for _ in range(12 - left):
            scores = pathlift.path_magnitude(pruned)
            flat = torch.cat([torch.where(pruned.state[n] != 0, scores[n], torch.inf).reshape(-1) for n in names])
            costs.append(float(flat.min()) * 10**scores.log10_path_norm)
            gone = int(flat.argmin())
            alive = torch.cat([pruned.state[n].reshape(-1) != 0 for n in names])
            alive[gone] = False
            parts = alive.split([network.state[n].numel() for n in names])
            pruned, _ = prune(
                network,
                amount=1 - float(alive.sum()) / 12,
                criterion=dict(
                    zip(names, (p.view_as(network.state[n]).double() for p, n in zip(parts, names, strict=True)), strict=True)
                ),
            )
        assert all(torch.equal(pruned.state[name] != 0, masks[name]) for name in names)
        assert close(sum(costs), report.cost)  # the costs of single steps add up to the joint cost


@pytest.mark.hunt
@pytest.mark.parametrize("q", [1, 2, 3.5])
def test_path_magnitude_of_any_order_on_data_by_enumeration(q):
    """The share of the mean over samples of Σ_p |Φ_p·x[p₀]|^q that is gone without the weight."""
    model = randomised(perceptron(2, 2, 2), 5)
    x = torch.randn(4, 2, dtype=torch.float64)

    def whole(own: nn.Module) -> float:
        lifting = pathlift.path_lifting(own, (2,), x=torch.ones(1, 2, dtype=torch.float64))
        biases = [1.0 if not inside else None for inside in lifting.starts_at_input.tolist()]
        powers = x.abs().pow(q).mean(0)
        sizes = [
            value if value is not None else float(powers[int(name.partition("[")[2].partition("]")[0].split(",")[-1])])
            for value, name in zip(biases, lifting.names, strict=True)
        ]
        return float((lifting.phi.abs().pow(q) * torch.tensor(sizes, dtype=torch.float64)).sum())

    shares = pathlift.path_magnitude(model, (2,), q=q, x=x)
    assert math.isclose(10**shares.log10_path_norm, whole(model), rel_tol=1e-9)
    for name, share in shares.items():
        for place in itertools.product(*map(range, share.shape)):
            mask = torch.ones_like(share, dtype=torch.bool)
            mask[place] = False
            lost = 1 - whole(apply_masks(model, {name: mask})) / whole(model)
            assert math.isclose(float(share[place]), lost, abs_tol=1e-9)


# ---- selection

tensors = st.lists(
    st.lists(st.sampled_from([-math.inf, -2.5, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3e38, math.inf]), min_size=1, max_size=9),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tensors, st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]))
def test_keep_largest_is_a_stable_sort(values, share, dtype):
    scores = [torch.tensor(own, dtype=dtype) for own in values]
    flat = torch.cat(scores) + 0.0
    keep = int(share * len(flat))
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[torch.sort(flat, descending=True, stable=True).indices[:keep]] = True
    assert torch.equal(torch.cat(keep_largest(scores, keep)), expected)


def scores_of(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return {f"layer{k}": torch.rand(shape, generator=generator).square() for k, shape in enumerate(shapes)}


@pytest.mark.parametrize("name", ["global", "per_layer", "lamp", "erk"])
@pytest.mark.parametrize("amount", [0.0, 0.37, 0.9, 0.999])
def test_selections_prune_what_was_asked_for_and_keep_the_largest_of_each_tensor(name, amount):
    scores = scores_of((8, 4, 3, 3), (5, 8), (40,))
    masks = SELECTIONS[name](scores, amount)
    total = sum(score.numel() for score in scores.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert 0 <= kept - kept_of(total, amount) < (3 if name == "per_layer" else 1)
    for key, mask in masks.items():
        if 0 < int(mask.sum()) < mask.numel():
            assert float(scores[key][mask].min()) >= float(scores[key][~mask].max())


def test_lamp_is_what_its_definition_says():
    scores = scores_of((6, 5), (3, 4), (20,))
    relative = {
        name: torch.stack([value**2 / score[score >= value].square().sum() for value in score.reshape(-1)]).view(score.shape)
        for name, score in scores.items()
    }
    expected = SELECTIONS["global"](relative, 0.6)
    assert all(torch.equal(expected[name], mask) for name, mask in select_lamp(scores, 0.6).items())
    assert all(bool(mask.any()) for mask in select_lamp(scores, 0.94).values())  # one weight of each tensor stays


def test_erk_keeps_shares_in_proportion_of_sides_to_volume():
    scores = scores_of((64, 32, 3, 3), (32, 16, 3, 3))
    masks = select_erk(scores, 0.9)
    first, second = (float(mask.float().mean()) for mask in masks.values())
    assert math.isclose(first / second, ((64 + 32 + 6) / (64 * 32 * 9)) / ((32 + 16 + 6) / (32 * 16 * 9)), rel_tol=0.01)
    assert all(
        bool(mask.all())
        for mask in select_erk(
            scores_of(
                (2, 2),
            ),
            0.0,
        ).values()
    )


def test_n_of_m_per_output_and_channels():
    scores = scores_of((4, 8, 3, 3), (6, 3), (4, 4))
    masks = NofM(2, 4)(scores, 0.5)
    blocks = masks["layer0"].movedim(1, -1).reshape(-1, 4)
    assert bool((blocks.sum(1) == 2).all())
    best = scores["layer0"].movedim(1, -1).reshape(-1, 4)
    assert float(torch.where(blocks, best, math.inf).min(1).values.sub(torch.where(blocks, 0, best).max(1).values).min()) >= 0
    assert bool(masks["layer1"].all())  # three inputs: no block of four
    rows = select_per_output({"w": scores["layer0"]}, 0.5)["w"]
    assert bool((rows.flatten(1).sum(1) == 36).all())
    whole = select_channels(scores, 0.4)
    assert all(bool((mask.flatten(1).all(1) | ~mask.flatten(1).any(1)).all()) for mask in whole.values())
    sums = torch.cat([score.flatten(1).sum(1) for score in scores.values()])
    gone = torch.cat([~mask.flatten(1).any(1) for mask in whole.values()])
    assert float(sums[gone].max()) <= float(sums[~gone].min()) and bool(gone.any())


# ---- prune and its report


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def test_rounds_only_remove_and_end_at_the_amount():
    model = residual()
    seen: list[dict[str, Tensor]] = []

    def watching(network: pathlift.Network) -> dict[str, Tensor]:
        seen.append({name: network.state[name] != 0 for name in prunable(network)})
        return dict(pathlift.path_magnitude(network))

    _, report = prune(model, (1, 3, 3), 0.75, watching, steps=5)
    assert len(seen) == 5
    total = sum(mask.numel() for mask in report.masks.values())
    for k, masks in enumerate([*seen, report.masks]):
        assert sum(int(mask.sum()) for mask in masks.values()) == kept_of(total, 1 - 0.25 ** (k / 5))
    for one, two in itertools.pairwise([*seen, report.masks]):
        assert all(bool((one[name] | ~two[name]).all()) for name in two)


def test_collapsed_layers_are_named():
    model = residual()
    names = prunable(pathlift.capture(model, (1, 3, 3)))
    scores = {n: torch.full_like(dict(model.named_parameters())[n], float(k > 0)) for k, n in enumerate(names)}
    amount = scores[names[0]].numel() / sum(share.numel() for share in scores.values())
    pruned, report = prune(model, (1, 3, 3), amount, scores)
    assert names[0] in report.collapsed and report.mass_kept < 1
    assert report.collapsed == tuple(
        name for name in names if not float(pathlift.path_magnitude(pruned, (1, 3, 3))[name].sum())
    )
    assert "collapsed" in str(report)


def test_a_network_is_pruned_to_a_network_and_the_first_is_left_alone():
    network = pathlift.capture(residual(), (1, 3, 3))
    before = {name: tensor.clone() for name, tensor in network.state.items()}
    pruned, report = prune(network, amount=0.5)
    assert isinstance(pruned, pathlift.Network)
    assert all(torch.equal(network.state[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(pruned.state[name] != 0, (before[name] != 0) & mask) for name, mask in report.masks.items())


def test_scope_by_type_and_pattern():
    model = residual()
    everything = set(prune(model, (1, 3, 3), 0.5)[1].masks)
    convolutions = set(prune(model, (1, 3, 3), 0.5, scope=nn.Conv2d)[1].masks)
    assert convolutions == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} & everything
    first = min(everything)
    assert set(prune(model, (1, 3, 3), 0.5, scope=f"!{first}")[1].masks) == everything - {first}
    assert all(name.endswith("bias") for name in prune(perceptron(3, 3, 2), (3,), 0.5, scope="*.bias")[1].masks)


def test_masks_in_files_and_in_torch_prune(tmp_path: Path):
    model = residual()
    pruned, report = prune(model, (1, 3, 3), 0.6)
    pathlift.pruning.save_masks(report.masks, tmp_path / "masks.safetensors")
    loaded = pathlift.pruning.load_masks(tmp_path / "masks.safetensors")
    again = apply_masks(model, loaded)
    x = torch.randn(2, 1, 3, 3)
    assert torch.equal(again(x), pruned(x))
    carried = to_torch_prune(model, report.masks)
    assert torch.equal(carried(x), pruned(x)) and torch_prune.is_pruned(carried)
    found = from_torch_prune(carried)
    assert found.keys() == report.masks.keys() and all(torch.equal(found[n], m) for n, m in report.masks.items())


def test_our_criteria_as_a_method_of_torch_prune():
    model = residual()
    expected = prune(model, (1, 3, 3), 0.6, "path_magnitude")[1].masks
    scores = {name: pathlift.path_magnitude(model, (1, 3, 3))[name] for name in expected}
    keyed = importance_scores(model, scores)
    torch_prune.global_unstructured(list(keyed), pruning_method=ScorePruning, importance_scores=keyed, amount=0.6)
    assert all(torch.equal(mask, expected[name]) for name, mask in from_torch_prune(model).items())
    layer = nn.Linear(4, 4)
    ScorePruning.apply(layer, "weight", 0.5, importance_scores=torch.arange(16.0).view(4, 4))
    assert layer.weight_mask.tolist() == [[0.0] * 4] * 2 + [[1.0] * 4] * 2
    ScorePruning.apply(layer, "weight", 0.5, importance_scores=-torch.arange(16.0).view(4, 4))  # of what is left
    assert layer.weight_mask.tolist() == [[0.0] * 4] * 2 + [[1.0] * 4] + [[0.0] * 4]


def nan_scores(network: pathlift.Network) -> dict[str, Tensor]:
    return {name: torch.full_like(network.state[name], math.nan) for name in network.parameters}


def derived() -> nn.Module:
    model = perceptron(3, 3, 2)
    parametrizations.weight_norm(model[0])
    return model


def spoiled() -> nn.Module:
    model = perceptron(3, 3, 2)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("error", "message", "make", "arguments"),
    [
        (pathlift.InputError, r"\[0, 1\)", None, {"amount": 1.0}),
        (pathlift.InputError, r"\[0, 1\)", None, {"amount": -0.1}),
        (pathlift.InputError, r"\[0, 1\)", None, {"amount": math.nan}),
        (pathlift.InputError, "how much", None, {"amount": None}),
        (pathlift.InputError, "Did you mean 'magnitude'", None, {"criterion": "magnitudes"}),
        (pathlift.InputError, "Did you mean 'global'", None, {"selection": "globl"}),
        (pathlift.InputError, "0 < n < m", None, {"selection": "4:4"}),
        (pathlift.InputError, "2:4 sparsity", None, {"selection": "2:4", "amount": 0.4}),
        (pathlift.InputError, "multiple of 4", None, {"selection": "2:4", "amount": None}),
        (pathlift.InputError, "looks at data", None, {"criterion": "snip"}),
        (pathlift.InputError, "looks at data", None, {"criterion": "wanda"}),
        (pathlift.InputError, "a loss", None, {"criterion": "obd", "data": X}),
        (pathlift.InputError, "one number", None, {
            "criterion": "snip", "data": pathlift.pruning.Batch(X, Y, lambda out, y: out.sum(1))}),
        (pathlift.InputError, "data holds no batch", None, {"criterion": "snip", "data": []}),
        (pathlift.InputError, "shape", None, {"criterion": "wanda", "data": torch.randn(4, 5)}),
        (pathlift.InputError, "steps", None, {"steps": 0}),
        (pathlift.InputError, "computed anew", None, {"steps": 2, "criterion": {}}),
        (pathlift.InputError, "no score for", None, {"criterion": {"x": torch.zeros(1)}}),
        (pathlift.InputError, "has shape", None, {
            "criterion": {"0.weight": torch.zeros(1), "2.weight": torch.zeros(1)}}),
        (pathlift.InputError, "holds NaN", None, {"criterion": nan_scores}),
        (pathlift.InputError, "Nothing that can be pruned", None, {"scope": "layer9.*"}),
        (pathlift.InputError, "Nothing that can be pruned", None, {"scope": nn.Conv2d}),
        (pathlift.InputError, "nothing in the scope", None, {"scope": "!*"}),
        (pathlift.InputError, "batch norm", lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), {"scope": "1.*"}),
        (pathlift.InputError, "remove_parametrizations", derived, {}),
        (pathlift.InputError, "nothing to prune", nn.ReLU, {}),
        (pathlift.NumericalError, "0.weight", spoiled, {"criterion": "magnitude"}),
        (pathlift.UnsupportedModelError, "sigmoid", lambda: nn.Sequential(nn.Linear(3, 2), nn.Sigmoid(), nn.Linear(2, 2)), {}),
    ],
)  # fmt: skip
def test_bad_input(error, message, make, arguments):
    model = perceptron(3, 3, 2) if make is None else make()
    with pytest.raises(error, match=message):
        prune(model, (3,), **{"amount": 0.5, **arguments})


def test_a_batch_has_a_target_for_each_input():
    with pytest.raises(pathlift.InputError, match="4 inputs and 3 targets"):
        pathlift.pruning.Batch(X, Y[:3])


def test_masks_of_another_model_are_refused():
    masks = prune(perceptron(3, 3, 2), (3,), 0.5)[1].masks
    with pytest.raises(pathlift.MismatchError, match="no parameter"):
        apply_masks(nn.Linear(3, 2), masks)
    with pytest.raises(pathlift.MismatchError, match="has shape"):
        apply_masks(perceptron(3, 4, 2), masks)
    with pytest.raises(pathlift.InputError, match="other values"):
        apply_masks(perceptron(3, 3, 2), {"0.weight": torch.full((3, 3), 0.5)})
    with pytest.raises(pathlift.InputError, match="no masks"):
        from_torch_prune(perceptron(3, 3, 2))
    with pytest.raises(pathlift.InputError, match="needs the module"):
        prune(pathlift.capture(perceptron(3, 3, 2), (3,)), amount=0.5, scope=nn.Linear)
    for q in (0.5, math.inf, True):
        with pytest.raises(pathlift.InputError, match="q must be"):
            pathlift.path_magnitude(perceptron(3, 3, 2), (3,), q=q)


def test_a_shared_weight_is_masked_wherever_it_is_used():
    model = Tied().eval()
    pruned, report = prune(model, (3,), 0.5)
    shared = dict(pruned.named_parameters())
    assert all(
        torch.equal(shared[name] != 0, (dict(model.named_parameters())[name] != 0) & m) for name, m in report.masks.items()
    )
    assert len(list(pruned.parameters())) == len(list(model.parameters()))
