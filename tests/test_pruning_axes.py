"""Pruning goes along the axes on which a weight's edges lie, and moved weights are scored at their own places (§6)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pathlift
from cases import WithParameters
from pathlift import prune
from pathlift.errors import PathliftWarning
from pathlift.pruning import Batch, criteria
from pathlift.pruning.selection import kept_of, select_lamp


@dataclass(frozen=True)
class Single:
    """One layer with a parameter ``weight``, and the dimensions (batch included) that count its channels."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    channels: tuple[int, int] = (1, 1)
    """Of the result and of the input."""


SINGLE = {
    "linear": Single(lambda: nn.Linear(4, 3, bias=False), (4,)),
    "convolution": Single(lambda: nn.Conv2d(4, 3, (2, 1), bias=False), (4, 3, 2)),
    "grouped": Single(lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False), (4, 3, 3)),
    "depthwise": Single(lambda: nn.Conv1d(3, 6, 2, groups=3, bias=False), (3, 4)),
    "transposed": Single(lambda: nn.ConvTranspose2d(4, 3, (1, 2), bias=False), (4, 2, 2)),
    "grouped transposed": Single(lambda: nn.ConvTranspose1d(8, 6, 2, stride=2, groups=2, bias=False), (8, 3)),
    "transposed in space": Single(lambda: nn.ConvTranspose3d(2, 3, (1, 2, 1), bias=False), (2, 2, 1, 2)),
    "product from the right": Single(lambda: WithParameters(lambda x, w: x @ w, weight=(4, 3)), (4,)),
    "product from the left": Single(lambda: WithParameters(lambda x, w: w @ x, weight=(3, 4)), (4, 2)),
    "einsum": Single(lambda: WithParameters(lambda x, w: torch.einsum("bct,cd->bdt", x, w), weight=(4, 3)), (4, 2)),
    "linear of a transpose": Single(lambda: WithParameters(lambda x, w: F.linear(x, w.t()), weight=(4, 3)), (4,)),
    "slice": Single(lambda: WithParameters(lambda x, w: F.linear(x, w[1:4, ::2]), weight=(5, 8)), (4,)),
    "reordered": Single(lambda: WithParameters(lambda x, w: F.linear(x, w[[2, 0, 1]].detach().flip(1)), weight=(3, 4)), (4,)),
    "moved convolution": Single(
        lambda: WithParameters(lambda x, w: F.conv1d(x, w.permute(2, 0, 1).double().to(x)), weight=(4, 2, 3)), (4, 3)
    ),
    "cast on the way": Single(
        lambda: WithParameters(lambda x, w: F.linear(x, w.clone().to(torch.bfloat16).to(x).t()), weight=(4, 3)), (4,)
    ),
}


def weight_of(model: nn.Module) -> nn.Parameter:
    return dict(model.named_parameters())["weight"]


def roles(single: Single, model: nn.Module) -> list[list[tuple[int, int]]]:
    """For each element of the weight the (output, input) channels that it joins, by running the layer on unit vectors."""
    weight, (above, below) = weight_of(model), single.channels
    count = single.shape[below - 1]
    found = []
    with torch.no_grad():
        for index in range(weight.numel()):
            weight.zero_()
            weight.view(-1)[index] = 1
            joined = []
            for channel in range(count):
                x = torch.zeros(1, *single.shape)
                x.select(below, channel).fill_(1.0)
                out = model(x)
                joined += [(int(spot), channel) for spot in out.movedim(above, 0).flatten(1).any(1).nonzero()[:, 0]]
            found.append(joined)
    return found


def scored(name: str, seed: int) -> tuple[Single, nn.Module, Tensor, list[tuple[int, int] | None]]:
    """A layer with random weights, scores without ties, and the one pair of channels that each element joins, if any."""
    single = SINGLE[name]
    model = single.make()
    joined = roles(single, model)
    assert all(len(own) <= 1 for own in joined)
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight_of(model).copy_(torch.rand(weight_of(model).shape, generator=made) + 0.1)
    scores = torch.rand(weight_of(model).shape, generator=made)
    return single, model, scores, [own[0] if own else None for own in joined]


def places_by(channel: int, joined: list[tuple[int, int] | None]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for index, pair in enumerate(joined):
        if pair is not None:
            found.setdefault(pair[channel], []).append(index)
    return [found[key] for key in sorted(found)]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SINGLE)
def test_selections_by_channel_follow_the_neurons(name, seed):
    single, model, scores, joined = scored(name, seed)
    flat, rows = scores.reshape(-1), places_by(0, joined)
    read = [place for row in rows for place in row]

    kept = prune(model, single.shape, 0.5, {"weight": scores}, selection="per_output")[1].masks["weight"].reshape(-1)
    for row in rows:
        best = sorted(row, key=lambda place: float(flat[place]), reverse=True)[: kept_of(len(row), 0.5)]
        assert sorted(best) == [place for place in row if bool(kept[place])]

    sums = [float(flat[row].double().sum()) for row in rows]
    room = len(flat) - kept_of(len(flat), 0.4)
    given = torch.full_like(flat, 9.0).index_put((torch.tensor(read),), flat[read]).view(scores.shape)
    whole = prune(model, single.shape, 0.4, {"weight": given}, selection="channels")[1].masks["weight"].reshape(-1)
    gone = sorted(range(len(rows)), key=sums.__getitem__)[: room // len(rows[0])]
    for number, row in enumerate(rows):
        assert bool(whole[row].any()) == bool(whole[row].all()) == (number not in gone)


@pytest.mark.parametrize("name", [name for name in SINGLE if name != "depthwise"])
def test_blocks_of_n_of_m_run_along_the_input_channels(name):
    single, model, scores, joined = scored(name, 3)
    flat = scores.reshape(-1)
    kept = prune(model, single.shape, None, {"weight": scores}, selection="1:2")[1].masks["weight"].reshape(-1)
    with torch.no_grad():  # the tap of an element: what the layer gives for an impulse, but for its channels
        weight, taps = weight_of(model), []
        for place, pair in enumerate(joined):
            weight.zero_()
            weight.view(-1)[place] = 1
            x = torch.zeros(1, *single.shape)
            x.select(single.channels[1], pair[1] if pair else 0).copy_(
                torch.arange(1.0, x.select(1, 0).numel() + 1).view_as(x.select(1, 0))
            )
            taps.append(None if pair is None else tuple(model(x).select(single.channels[0], pair[0]).reshape(-1).tolist()))
    lines: dict[object, list[tuple[int, int]]] = {}
    for place, pair in enumerate(joined):
        if pair is not None:
            lines.setdefault((pair[0], taps[place]), []).append((pair[1], place))
    for line in lines.values():
        order = [place for _, place in sorted(line)]
        for first, second in zip(order[::2], order[1::2], strict=True):
            assert bool(kept[first]) == (float(flat[first]) >= float(flat[second])) != bool(kept[second])


@pytest.mark.parametrize("name", SINGLE)
def test_relative_path_magnitude_is_relative_to_the_channels_of_the_neurons(name):
    single, model, _, joined = scored(name, 4)
    network = pathlift.capture(model, single.shape)
    shares = pathlift.path_magnitude(network, q=2)["weight"].double().reshape(-1)
    found = criteria.relative_path_magnitude(network)["weight"].double().reshape(-1)
    for index, pair in enumerate(joined):
        if pair is None:
            assert float(found[index]) == 0
            continue
        into, out_of = (
            sum(float(shares[other]) for other, own in enumerate(joined) if own and own[side] == pair[side]) for side in (0, 1)
        )
        assert math.isclose(float(found[index]), math.sqrt(float(shares[index]) / math.sqrt(into * out_of)), rel_tol=1e-5)


@pytest.mark.one_in(5, first=1)
@pytest.mark.parametrize("selection", ["channels", "per_output", "erk", "lamp", "2:4", "global"])
@pytest.mark.parametrize("criterion", ["path_magnitude", "relative_path_magnitude", "magnitude"])
def test_a_transposed_layer_is_pruned_as_the_plain_one_with_swapped_axes(criterion, selection):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    other = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 1, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 8, 1)
    )

    def swapped(weight: Tensor, groups: int) -> Tensor:
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    groups = {"0": 2, "2": 1, "4": 1}
    with torch.no_grad():
        for key, count in groups.items():
            other.get_submodule(key).weight.copy_(swapped(plain.get_submodule(key).weight, count))
            other.get_submodule(key).bias.copy_(plain.get_submodule(key).bias)
    amount = None if selection == "2:4" else 0.4
    options = {"selection": selection, "steps": 1}
    first, second = (prune(model, (4, 2, 2), amount, criterion, **options)[1].masks for model in (plain, other))
    for key, count in groups.items():
        assert torch.equal(swapped(first[f"{key}.weight"], count), second[f"{key}.weight"])


@pytest.mark.hunt
def test_permuted_channels_are_pruned_by_permuted_masks():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 1))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    state = model.state_dict()
    moved = {
        **state,
        "0.weight": state["0.weight"][order],
        "0.bias": state["0.bias"][order],
        "2.weight": state["2.weight"][order],
    }
    twin = nn.Sequential(nn.Conv2d(2, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 1))
    twin.load_state_dict(moved)
    for selection in ("channels", "per_output", "lamp", "erk"):
        first, second = (prune(own, (2, 4, 4), 0.5, "path_magnitude", selection=selection)[1].masks for own in (model, twin))
        assert torch.equal(first["0.weight"][order], second["0.weight"])
        assert torch.equal(first["2.weight"][order], second["2.weight"])
        assert torch.equal(first["4.weight"], second["4.weight"])


def test_parts_of_one_parameter_are_matrices_of_their_own():
    """A projection that is cut in three has three times as many rows; each part is read by other neurons."""

    def cut(x: Tensor, weight: Tensor) -> Tensor:
        one, two, three = weight.chunk(3)
        return F.linear(F.linear(x, one).relu() + F.linear(x, two), three)

    model = WithParameters(cut, weight=(12, 4))
    rows = prune(model, (4,), 0.5, "magnitude", selection="per_output")[1].masks["weight"]
    assert rows.sum(1).tolist() == [2] * 12


@pytest.mark.parametrize("selection", ["channels", "per_output", "2:4"])
def test_a_weight_and_its_transpose_have_no_channels_in_common(selection):
    model = WithParameters(lambda x, w: (x @ w).relu() @ w.t(), weight=(4, 8))
    with pytest.raises(pathlift.InputError, match=r"'weight' has two roles.*Leave it out"):
        prune(model, (4,), None if selection == "2:4" else 0.5, "magnitude", selection=selection)
    report = prune(model, (4,), 0.5)[1]
    shares = pathlift.path_magnitude(model, (4,), q=2)["weight"]
    expected = (shares / (shares.sum(1, keepdim=True) * shares.sum(0, keepdim=True)).sqrt()).sqrt()
    assert torch.allclose(criteria.relative_path_magnitude(pathlift.capture(model, (4,)))["weight"], expected, rtol=1e-4)
    assert report.masks["weight"].sum() == 16


def test_a_bias_a_scale_and_a_slope_have_an_output_channel_for_each_element():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.PReLU(3), nn.Conv2d(3, 2, 1))
    scores = {"0.bias": torch.tensor([3.0, 1.0, 2.0]), "1.weight": torch.tensor([0.5, 4.0, 5.0])}
    masks = prune(model, (2, 2, 2), 0.34, scores, selection="channels", scope=["0.bias", "1.weight"])[1].masks
    assert masks["0.bias"].tolist() == [True, False, True] and masks["1.weight"].tolist() == [False, True, True]


# ---- moved weights: scores at the parameter's own places

GAINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "detached": lambda g, w: g.detach(),
    "expanded like another": lambda g, w: g.expand_as(w[0, :1]),
    "cast like another": lambda g, w: g.type_as(w),
    "narrow and back": lambda g, w: g.to(torch.float16).to(w.dtype),
    "to integers and back": lambda g, w: g.to(torch.int32).to(w.dtype),
    "copied and joined": lambda g, w: torch.cat([g.clone(), g.detach()])[:1],
}


@pytest.mark.parametrize("how", GAINS)
def test_shares_of_a_gain_whatever_the_forward_pass_does_with_it(how):
    """It lies on every path, and the weights 1 and 3 share the paths out 1 to 3."""
    model = WithParameters(lambda x, w, g: F.linear(x, w) * GAINS[how](g, w), weight=(1, 2), gain=(1,))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 3.0]]))
        model.gain.fill_(2.0)
    scores = pathlift.path_magnitude(model, (2,))
    assert torch.allclose(scores["weight"], torch.tensor([[0.25, 0.75]]))
    share = scores["gain" if how != "to integers and back" else "gain.derived"]  # rounded: another weight than the parameter
    assert torch.allclose(share, torch.ones(1))
    with torch.no_grad():  # what is gone without it is everything
        model.gain.zero_()
    assert pathlift.path_norm(model, (2,)).value == 0


def test_an_element_that_is_moved_about_keeps_its_own_share():
    """Each element set to 0 by itself, and the path-norm taken again; also one that is read twice and one never."""
    order = torch.tensor([2, 0, 0, 3])
    model = WithParameters(lambda x, w, h: ((x + w[order].detach()) @ h).relu(), weight=(5,), head=(4, 1))
    with torch.no_grad():
        model.weight.abs_().add_(0.5)
    shares, whole = pathlift.path_magnitude(model, (4,))["weight"], pathlift.path_norm(model, (4,)).value
    for index in range(5):
        kept = model.weight.detach().clone()
        with torch.no_grad():
            model.weight[index] = 0
        assert math.isclose(float(shares[index]), 1 - pathlift.path_norm(model, (4,)).value / whole, abs_tol=1e-6)
        with torch.no_grad():
            model.weight.copy_(kept)


def test_a_weight_that_is_divided_by_is_never_set_to_zero():
    model = WithParameters(lambda x, w, t: F.linear(x, w) / t, weight=(2, 3), temperature=(2,))
    with pytest.raises(pathlift.InputError, match="Nothing that can be pruned"):
        prune(model, (3,), 0.5, scope="temperature")
    assert set(prune(model, (3,), 0.5)[1].masks) == {"weight"}


# ---- selections and rounds

lists = st.lists(
    st.lists(st.sampled_from([-math.inf, 0.0, 1e-30, 0.25, 0.5, 1.0, 1.0, 3.0]), min_size=1, max_size=8), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lists, st.floats(0, 0.99))
def test_lamp_with_ties_is_the_sorted_definition(values, amount):
    """What is not gone already is ranked by score² over the sum of score² of those not smaller, in sorted order."""
    scores = {str(index): torch.tensor(own) for index, own in enumerate(values)}
    alive = sum(int((own > -math.inf).sum()) for own in scores.values())
    keep = kept_of(sum(map(len, values)), amount)
    ranked = []
    for name, own in scores.items():
        ordered = sorted((v for v in own.double().tolist() if v > -math.inf), reverse=True)
        top = max(ordered[0], torch.finfo(torch.float64).tiny) if ordered else 1.0
        total = 0.0
        for value in ordered:
            total += (value / top) ** 2
            ranked.append((-((value / top) ** 2 / total if total else 0.0), name))
    counts = dict.fromkeys(scores, 0)
    for _, name in sorted(ranked, key=lambda entry: (entry[0], int(entry[1])))[:keep]:
        counts[name] += 1
    masks = select_lamp(scores, amount)
    for name, own in scores.items():
        kept = int((masks[name] & (own > -math.inf)).sum())
        assert kept == counts[name] or keep > alive
        gone = ~masks[name] & (own > -math.inf)
        assert not bool(masks[name].any()) or not bool(gone.any()) or float(own[masks[name]].min()) >= float(own[gone].max())


def test_lamp_ranks_scores_whose_squares_vanish():
    """Relative scores 1e-200 and 1e-210 of two tensors: the second goes, whatever the order of the tensors."""
    one, two = (torch.tensor([1.0, small], dtype=torch.float64) for small in (1e-200, 1e-210))
    for scores in ({"a": one, "b": two}, {"b": two, "a": one}):
        masks = select_lamp(scores, 0.25)
        assert masks["a"].tolist() == [True, True] and masks["b"].tolist() == [True, False]


def test_what_is_gone_stays_gone_also_among_weights_without_paths():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        model[2].weight[:, 2:] = 0
    seen: list[dict[str, Tensor]] = []

    def watching(network: pathlift.Network) -> dict[str, Tensor]:
        seen.append({name: network.state[name] != 0 for name in ("0.weight", "2.weight")})
        return {name: torch.zeros_like(network.state[name]) for name in network.parameters}

    for selection in ("lamp", "erk", "channels", "per_output", "per_layer"):
        seen.clear()
        prune(model, (4,), 0.9, watching, selection=selection, steps=5)
        for one, two in itertools.pairwise(seen):
            assert all(not bool((two[name] & ~one[name]).any()) for name in one)


def test_progress_is_told_after_each_round_and_n_of_m_takes_one():
    told: list[tuple[int, int]] = []
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    report = prune(model, (4,), 0.5, progress=lambda *where: told.append(where))[1]
    assert told == [(k, 10) for k in range(1, 11)] and report.criterion == "relative_path_magnitude"
    assert prune(model, (4,), selection="2:4")[1].sparsity == 0.5
    with pytest.raises(pathlift.InputError, match="steps must be 1"):
        prune(model, (4,), selection="2:4", steps=2)


def test_a_criterion_that_empties_layers_says_so_and_the_default_does_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 4))
    with pytest.warns(PathliftWarning, match=r"0\.weight.*relative_path_magnitude"):
        report = prune(model, (16,), 0.97, "path_magnitude")[1]
    assert report.collapsed and "relative_path_magnitude" in str(report)
    assert not prune(model, (16,), 0.97)[1].collapsed


# ---- range


def test_a_branch_far_below_the_other_is_pruned_by_its_own_measure():
    """Shares of 1e-50 are nothing beside 1, and all there is in their channels: no branch is emptied first."""
    torch.manual_seed(0)
    model = WithParameters(
        lambda x, a, b, c: F.linear(x, a).relu() + F.linear(F.linear(x, b).relu(), c), a=(6, 6), b=(6, 6), c=(6, 6)
    )
    with torch.no_grad():
        model.c.mul_(1e-25)
    report = prune(model, (6,), 0.5)[1]
    assert not report.collapsed
    assert all(8 <= int(mask.sum()) <= 28 for mask in report.masks.values())


def test_the_bound_of_small_shares_is_not_rounded_to_zero():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1e-30]]))
        model[2].weight.copy_(torch.tensor([[1.0, 1e-30]]))
    report = prune(model, (1,), 0.5, "path_magnitude")[1]
    assert math.isclose(report.log10_cost, -60, abs_tol=1e-5)
    assert math.isclose(report.log10_bound, -60 + math.log10(2), abs_tol=1e-5)


def test_synflow_adds_up_magnitudes_of_subtracted_branches():
    model = WithParameters(lambda x, a, b: (x @ a).relu() - (-(x @ b)).relu(), a=(2, 1), b=(2, 1))
    network = pathlift.capture(model, (2,))
    flow, shares = criteria.synflow(network), pathlift.path_magnitude(network)
    assert all(torch.allclose(flow[name], shares[name]) and bool((flow[name] > 0).all()) for name in ("a", "b"))


def test_synflow_lets_the_largest_antecedent_through():
    """Of |2x| and |3x|, the larger: the other weight scores nothing; a constant among them counts as one more."""
    model = WithParameters(lambda x, a, b, h: torch.maximum(x * a, x * b).relu() @ h, a=(1,), b=(1,), h=(1, 1))
    with torch.no_grad():
        for own, value in ((model.a, 2.0), (model.b, -3.0), (model.h, 5.0)):
            own.fill_(value)
    flow = criteria.synflow(pathlift.capture(model, (1,)))
    assert [round(float(flow[name]), 6) for name in "abh"] == [0.0, 1.0, 1.0]


@pytest.mark.hunt
def test_synflow_at_any_depth():
    """A chain of 300 layers whose path-norm leaves float64: one weight of each layer is 64 times smaller, and goes first."""
    layers = []
    for index in range(300):
        weight = torch.full((4, 4), 100.0)
        weight[index % 4, 3 * index % 4] /= 64
        layers.append(nn.Linear(4, 4, bias=False))
        layers[-1].weight.data = weight
    masks = prune(nn.Sequential(*layers), (4,), 1 / 16, "synflow", steps=1)[1].masks
    for index, mask in enumerate(masks.values()):
        assert (~mask).nonzero().tolist() == [[index % 4, 3 * index % 4]]


@pytest.mark.parametrize("name", ["fisher", "wanda", "snip"])
@pytest.mark.parametrize("size", [2.0**-80, 2.0**80])
def test_scores_of_tiny_and_huge_weights_keep_their_order(name, size):
    """All scores of a layer times one power of two: the masks of each layer stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    batch = Batch(torch.randn(5, 3), torch.randn(5, 2), lambda out, y: (out * y).sum())
    data = batch.x if name == "wanda" else batch
    right = prune(model, (3,), 0.5, name, data=data, selection="per_layer")[1].masks
    with torch.no_grad():
        model[0].weight.mul_(size)
    found = prune(model, (3,), 0.5, name, data=data, selection="per_layer")[1].masks
    assert all(torch.equal(found[key], mask) for key, mask in right.items())


def test_scores_inside_an_autocast_region():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    right, masks = pathlift.path_magnitude(model, (1, 8, 8)), prune(model, (1, 8, 8), 0.5)[1].masks
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, inside = pathlift.path_magnitude(model, (1, 8, 8)), prune(model, (1, 8, 8), 0.5)[1].masks
    assert all(torch.allclose(found[name], share) for name, share in right.items())
    assert all(torch.equal(inside[name], mask) for name, mask in masks.items())


# ---- what is asked for


def test_a_scope_of_modules_is_what_they_hold():
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), inner, nn.ReLU(), nn.Linear(8, 2))
    assert set(prune(model, (4,), 0.5, scope=[model[0]])[1].masks) == {"0.weight"}
    assert set(prune(model, (4,), 0.5, scope=inner)[1].masks) == {"2.0.weight", "2.2.weight"}
    assert set(prune(model, (4,), 0.5, scope=[model, "!4.*"])[1].masks) == {"0.weight", "2.0.weight", "2.2.weight"}
    network = pathlift.capture(model, (4,))
    for scope, message in (
        ([nn.Linear(4, 8)], "no part of the model"),
        ([model[1]], "Nothing that can be pruned"),
        ([], "at least one"),
        ([3], "name pattern"),
        (7, "name patterns"),
    ):
        with pytest.raises(pathlift.InputError, match=message):
            prune(model, (4,), 0.5, scope=scope)
    with pytest.raises(pathlift.InputError, match="needs the module"):
        prune(network, amount=0.5, scope=[model[0]])


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("criterion must be", {"criterion": None}),
        ("criterion must be", {"criterion": 3}),
        ("gives a mapping", {"criterion": lambda network: None}),
        ("must be a tensor", {"criterion": {"0.weight": [1.0], "2.weight": [1.0]}}),
        ("tensor of real numbers", {"criterion": lambda network: {n: network.state[n] + 0j for n in network.parameters}}),
        ("selection must be", {"selection": 4}),
        ("no bool mask", {"selection": lambda scores, amount: {}}),
        ("one number.*NoneType", {"criterion": "snip", "data": Batch(X, Y, lambda out, y: None)}),
        ("loss fails", {"criterion": "fisher", "data": Batch(X, Y + 7)}),
        ("of these data is nan", {"criterion": "grasp", "data": Batch(X, Y, lambda out, y: out.sum() * math.nan)}),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused(message, arguments):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(pathlift.InputError, match=message):
        prune(model, (3,), **{"amount": 0.5, **arguments})


def test_batches_and_masks_are_checked_where_they_are_made(tmp_path):
    with pytest.raises(pathlift.InputError, match=r"x\[0\] must be a tensor"):
        Batch([1.0], Y)
    with pytest.raises(pathlift.InputError, match="loss must be"):
        Batch(X, Y, None)
    with pytest.raises(pathlift.InputError, match="other values"):
        pathlift.pruning.save_masks({"w": torch.tensor([0.5])}, tmp_path / "masks.safetensors")


@pytest.mark.parametrize("how", [lambda w: w.t(), lambda w: w, lambda w: w.view(4, 4)], ids=["transposed", "same", "viewed"])
def test_parameters_that_share_memory_are_pruned_as_one(how: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight.data = how(model[0].weight.data)
    pruned, report = prune(model, (4,), 0.5)
    alone, _ = prune(pathlift.capture(model, (4,)), amount=0.5)
    assert [int((weight == 0).sum()) for weight in pruned.parameters()] == [8, 8]
    assert torch.equal(pruned[2].weight, how(pruned[0].weight))
    assert pathlift.path_norm(pruned, (4,)).value == pytest.approx(pathlift.path_norm(alone).value)
    assert report.sparsity == 0.5
