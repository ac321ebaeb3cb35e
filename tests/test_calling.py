"""Models take their inputs one after the other, by keyword, or in containers; and whoever draws is given a seed or a source."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.pruning import Batch


class Nested(nn.Module):
    """Takes a pair of inputs in a tuple, and one in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, pair: tuple[Tensor, Tensor], *, scale: None = None, extra: dict[str, list[Tensor]]) -> Tensor:
        x, y = pair
        return self.last(torch.relu(self.first(x) + 2 * self.second(y) - self.first(extra["more"][0])))


class Flat(nn.Module):
    """The same function of its inputs one after the other."""

    def __init__(self, nested: nn.Module) -> None:
        super().__init__()
        self.nested = nested

    def forward(self, more: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.nested((x, y), extra={"more": [more]})


SHAPES = {"extra": {"more": [(4,)]}, "pair": ((4,), (3,))}
FLAT = ((4,), (4,), (3,))


def as_taken(more: Any, x: Any, y: Any) -> dict[str, Any]:
    return {"pair": (x, y), "extra": {"more": [more]}}  # in another order than `SHAPES`


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Nested()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model, other


@pytest.fixture
def x() -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return tuple(torch.randn((6, *shape), generator=made) for shape in FLAT)  # type: ignore[return-value]


def test_keywords_and_containers_are_read_as_the_model_takes_them(models: tuple[nn.Module, nn.Module]) -> None:
    model, other = models
    network = pathlift.capture(model, SHAPES)
    assert pathlift.path_norm(network).value == pathlift.path_norm(Flat(model), FLAT).value
    assert pathlift.check_support(model, SHAPES).supported
    metric = pathlift.path_metric(model, other, SHAPES)
    flat = pathlift.path_metric(Flat(model), Flat(other), FLAT)
    assert (metric.lower, metric.upper) == (flat.lower, flat.upper)
    assert pathlift.path_metric(network, other).lower == metric.lower


def test_examples_in_containers_will_do(models: tuple[nn.Module, nn.Module], x: tuple[Tensor, Tensor, Tensor]) -> None:
    assert pathlift.path_norm(models[0], as_taken(*x)).value == pathlift.path_norm(models[0], SHAPES).value


@pytest.mark.hunt
def test_samples_come_in_the_same_containers(models: tuple[nn.Module, nn.Module], x: tuple[Tensor, Tensor, Tensor]) -> None:
    model, other = models
    network = pathlift.capture(model, SHAPES)
    samples, flat, flat_other = as_taken(*x), Flat(model), Flat(other)
    expected = pathlift.lipschitz_bound(flat, flat_other, x)
    assert torch.equal(pathlift.lipschitz_bound(model, other, samples), expected)
    assert torch.equal(pathlift.lipschitz_bound(network, other, samples), expected)
    assert ((model(**samples) - other(**samples)).abs() <= expected).all()
    assert torch.equal(pathlift.lipschitz.gradient_norms(model, samples), pathlift.lipschitz.gradient_norms(flat, x))
    for batches in (samples, [samples, samples]):
        expected = pathlift.lipschitz.expected_bound(flat, flat_other, [x])
        torch.testing.assert_close(pathlift.lipschitz.expected_bound(model, other, batches), expected)


def test_scores_of_data_in_containers(models: tuple[nn.Module, nn.Module], x: tuple[Tensor, Tensor, Tensor]) -> None:
    model, y = models[0], torch.arange(6) % 2
    for criterion in ("wanda", "snip", "fisher"):
        halves = [Batch(as_taken(*(part[:3] for part in x)), y[:3]), Batch(as_taken(*(part[3:] for part in x)), y[3:])]
        _, report = pathlift.prune(model, SHAPES, 0.5, criterion, data=halves)
        _, expected = pathlift.prune(Flat(model), FLAT, 0.5, criterion, data=Batch(x, y))
        assert {f"nested.{name}" for name in report.masks} == set(expected.masks)
        assert all(torch.equal(mask, expected.masks[f"nested.{name}"]) for name, mask in report.masks.items())
    assert [len(batch) for batch in Batch(as_taken(*x), y).split(4)] == [4, 2]
    with pytest.raises(pathlift.InputError, match="5 inputs and 6 targets"):
        Batch(as_taken(x[0][:5], *x[1:]), y)


def test_paths_of_a_model_with_keywords(models: tuple[nn.Module, nn.Module], x: tuple[Tensor, Tensor, Tensor]) -> None:
    one = as_taken(*(part[:1] for part in x))
    lifting = pathlift.path_lifting(models[0], SHAPES, one)
    torch.testing.assert_close(lifting.reconstruction().float(), models[0](**one)[0].detach())


def test_a_certificate_of_a_model_called_by_keyword() -> None:
    class ByKeyword(nn.Linear):
        def forward(self, *, image: Tensor) -> Tensor:
            return super().forward(image)

    model, image = ByKeyword(3, 2), torch.randn(4, 3)
    plain = nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    margins = pathlift.certify(plain, image, pathlift.Relative(1e-3)).margin
    assert torch.equal(pathlift.certify(model, {"image": image}, pathlift.Relative(1e-3)).margin, margins)
    batches = [{"image": image[:2]}, ({"image": image[2:]}, torch.zeros(2))]
    assert torch.equal(pathlift.certify(model, batches, pathlift.Relative(1e-3)).margin, margins)
    assert torch.equal(
        pathlift.attack(model, {"image": image}, radius=0.1).margin, pathlift.attack(plain, image, radius=0.1).margin
    )


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("inputs is empty", {}),
        ("cannot run on inputs of shape", {"pair": ((4,), (3,))}),
        (r"inputs\['pair'\]\[1\] must be a shape .* found 3", {"pair": ((4,), 3), "extra": {"more": [(4,)]}}),
        (r"inputs\[0\] is empty", [[]]),
        (r"inputs\['extra'\]\['more'\] is empty", {"extra": {"more": {}}}),
        ("found the key 1", {1: (4,)}),
        ("every size must be an integer", {"pair": ("a", "b")}),
    ],
)
def test_wrong_containers_of_inputs(models: tuple[nn.Module, nn.Module], words: str, given: Any) -> None:
    with pytest.raises(pathlift.InputError, match=words):
        pathlift.capture(models[0], given)


def test_tuples_with_names_are_refused(models: tuple[nn.Module, nn.Module]) -> None:
    class Pair(NamedTuple):
        x: tuple[int, ...]
        y: tuple[int, ...]

    with pytest.raises(pathlift.InputError, match=r"inputs\['pair'\] is a Pair, whose names would be lost"):
        pathlift.capture(models[0], {"pair": Pair((4,), (3,)), "extra": {"more": [(4,)]}})


def test_containers_without_end_are_refused(models: tuple[nn.Module, nn.Module]) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(pathlift.InputError, match="found a list of length 1"):
        pathlift.capture(models[0], endless)


def test_samples_in_other_containers_are_refused(models: tuple[nn.Module, nn.Module], x: tuple[Tensor, Tensor, Tensor]) -> None:
    network, (more, first, second) = pathlift.capture(models[0], SHAPES), x
    expected = r"takes its inputs as \{'extra': \{'more': \[tensor\]\}, 'pair': \(tensor, tensor\)\}, found "
    for found in (first, x, {"pair": (first,)}, {"pair": (first, second), "extra": more}):
        with pytest.raises(pathlift.InputError, match=expected):
            pathlift.lipschitz_bound(network, models[1], found)
    in_order = pathlift.capture(Flat(models[0]), FLAT)
    with pytest.raises(pathlift.InputError, match=r"inputs as \(tensor, tensor, tensor\), found \{'x': tensor, .*"):
        pathlift.lipschitz_bound(in_order, Flat(models[1]), {"x": first, "y": second, "more": more})
    with pytest.raises(pathlift.InputError, match="has 3 inputs, found 1 tensors"):
        pathlift.lipschitz_bound(in_order, Flat(models[1]), first)
    with pytest.raises(pathlift.InputError, match="every input needs the same number"):
        pathlift.lipschitz_bound(network, models[1], as_taken(more[:2], first, second))


# ------------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.hunt
def test_a_number_is_a_seed_wherever_something_is_drawn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    groups, x = pathlift.symmetries(model, (4,)), torch.randn(5, 4)
    data = Batch(x, torch.arange(5) % 3)
    other = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    metric = pathlift.path_metric(model, other, (4,))
    calls = {
        "randomize": lambda g: groups.randomize(generator=g).factors,
        "attack": lambda g: pathlift.attack(model, x, pathlift.Relative(0.3), 0.1, steps=1, generator=g).margin,
        "prune": lambda g: pathlift.prune(model, (4,), 0.5, "random", generator=g, steps=3)[1].masks["0.weight"],
        "prune by a loss": lambda g: pathlift.prune(model, (4,), 0.5, "obd", data=data, generator=g)[1].masks["0.weight"],
        "estimate": lambda g: torch.tensor(metric.estimate(8, generator=g).sampled.value),  # type: ignore[union-attr]
        "load_model": lambda g: (
            pathlift.load_model("torch.nn:Linear", arguments={"in_features": 4, "out_features": 9}, generator=g).weight
        ),
    }
    before = torch.get_rng_state()
    for name, call in calls.items():
        seeded = call(7)
        assert torch.equal(seeded, call(7)) and torch.equal(seeded, call(torch.Generator().manual_seed(7))), name
        assert any(not torch.equal(seeded, call(seed)) for seed in range(4)), name
        source = torch.Generator().manual_seed(7)
        assert torch.equal(call(source), seeded) and not torch.equal(
            source.get_state(), torch.Generator().manual_seed(7).get_state()
        )
    assert torch.equal(before, torch.get_rng_state())


def test_samples_made_in_inference_mode_are_taken_within_containers(models: tuple[nn.Module, nn.Module]) -> None:
    with torch.inference_mode():
        samples = as_taken(*(torch.ones((2, *shape)) for shape in FLAT))
    network = pathlift.capture(models[0], SHAPES)
    norms = pathlift.lipschitz.gradient_norms(network, samples)
    assert torch.equal(norms, pathlift.lipschitz.gradient_norms(network, as_taken(*(torch.ones((2, *s)) for s in FLAT))))
