"""Every argument of every public function is used or refused (`pathlift.arguments`); what memory cannot hold is said."""

from __future__ import annotations

import inspect
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathlift
import pathlift.pruning
from habit import LONGER
from lines import LINES, MODEL, commands, ended, files, tries
from pathlift.arguments import declare, public
from pathlift.arguments.kinds import shown
from pathlift.arguments.registry import DECLARED, kind_of
from pathlift.errors import shortage
from pathlift.rescaling import training
from rooms import imports
from wrong import ACCELERATED, CALLS, FAIR, VALUES, World, arguments, fair, run, surface, tried

FUNCTIONS = surface()
EACH = 4 * LONGER
"""Wrong values that are tried for each argument, drawn from a seed; `make search` tries many more."""

LINES_EACH = 6 * EACH
"""Bad lines that are tried for each command."""

SLOW = {"capture", "check_support", "path_lifting", "certify"}
"""Functions of which a few arguments are enough when not hunting."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        yield World(Path(folder))
        os.chdir(before)


# ------------------------------------------------------------------------------------------------------- nothing forgotten


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_every_public_function_is_declared(name: str) -> None:
    for argument in arguments(FUNCTIONS[name]):
        kind_of(name, argument, may_be_none=False)
        fair(name, argument, FUNCTIONS[name], 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_stands_behind_the_door(name: str) -> None:
    made = FUNCTIONS[name]
    function = made.__init__ if inspect.isclass(made) else made  # type: ignore[misc]
    assert hasattr(function, "__wrapped__"), f"write @public above {name}"


def test_nothing_is_declared_that_no_function_has() -> None:
    known = {argument for name in FUNCTIONS for argument in arguments(FUNCTIONS[name])}
    known |= {f"{name}.{argument}" for name in FUNCTIONS for argument in arguments(FUNCTIONS[name])}
    for declared in DECLARED.values():
        assert set(declared.kinds) <= known
        assert {f"{name}.{argument}" for name, argument in (*declared.needed, *declared.excluded)} <= known
    assert set(CALLS) <= set(FUNCTIONS)
    assert set(FAIR) <= known


def house() -> dict[str, set[str]]:
    """Return what each module loads when it alone is imported: the modules that it imports, and the packages around them."""
    imported = imports()
    loaded = {}
    for module in imported:
        reached, rest = set(), [module]
        while rest:
            name = rest.pop()
            if name in imported and name not in reached:
                reached.add(name)
                rest += [*imported[name], name.rpartition(".")[0]]
        loaded[module] = reached
    return loaded


@pytest.mark.hunt
def test_whoever_imports_a_function_has_the_declarations_of_its_arguments() -> None:
    """Not only those who import all of pathlift: the room that declares an argument stands below the function's own."""
    loaded = house()
    for name, made in FUNCTIONS.items():
        module = (made.__init__ if inspect.isclass(made) else made).__module__  # type: ignore[misc]
        for argument in arguments(made):
            rooms = {room: declared.kinds for room, declared in DECLARED.items()}
            (room,) = [r for r, kinds in rooms.items() if f"{name}.{argument}" in kinds] or [
                r for r in rooms if argument in rooms[r]
            ]
            assert room in loaded[module], f"{module} does not import {room}, which declares '{argument}' of {name}"


def test_an_argument_that_is_declared_twice_is_an_error_at_import() -> None:
    kinds = DECLARED["pathlift.norm"].kinds
    declare("pathlift.norm", kinds)  # a module may be loaded anew
    with pytest.raises(ValueError, match=r"'q' is declared in pathlift.norm and again in pathlift.other"):
        declare("pathlift.other", {"q": kinds["q"]})
    assert "pathlift.other" not in DECLARED


def test_an_argument_that_nobody_declared_is_an_error_at_the_first_call() -> None:
    @public
    def function(model: object, surprise: int) -> None:
        """Do nothing."""

    with pytest.raises(LookupError, match=r"'surprise' of .*function is declared by none of .*pathlift.norm"):
        function(None, 1)


# ----------------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ACCELERATED])
def test_a_right_call_is_answered(world: World, name: str) -> None:
    run(FUNCTIONS[name], CALLS[name](world))


@pytest.mark.one_in(36)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_value_ends_in_an_error_of_pathlift_or_in_the_right_answer(world: World, name: str) -> None:
    drawn = random.Random(name)
    for argument in arguments(FUNCTIONS[name]):
        for label in drawn.sample(list(VALUES), min(len(VALUES), EACH if name not in SLOW or LONGER > 1 else 2)):
            ending = tried(world, name, FUNCTIONS[name], argument, label)
            assert ending.how in {"refused", "answered"}, f"{ending.call}: {ending.how}, {ending.text[:500]}"


@pytest.mark.parametrize("label", VALUES)
def test_any_value_can_be_said_in_a_few_words(label: str) -> None:
    assert len(shown(VALUES[label]())) < 200


def test_numbers_of_numpy_are_numbers(world: World) -> None:
    norm = pathlift.path_norm(world.network, q=np.float32(2))
    assert norm == pathlift.path_norm(world.network, q=2) and type(norm.q) is float
    tolerance = pathlift.Rounding(np.int64(8), step=np.float64(0.5))
    assert tolerance == pathlift.Rounding(8) and type(tolerance.bits) is int


# -------------------------------------------------------------------------------------------------------- what is refused


def refused(words: str, function: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(pathlift.InputError, match=words) as caught:
        function(*args, **kwargs)
    assert len(str(caught.value)) < 600


def test_exchanged_arguments_are_named(world: World) -> None:
    refused(
        "x must be .*, found a Relative. It would do for 'tolerance'",
        pathlift.certify,
        world.network,
        pathlift.Relative(0.1),
        world.x,
    )
    refused("tolerance must be .* It would do for 'x'", pathlift.attack, world.network, world.x, world.x)


def test_a_call_that_does_not_fit_is_an_error_of_pathlift_and_a_type_error(world: World) -> None:
    for call in (
        lambda: pathlift.path_norm(),  # type: ignore[call-arg]
        lambda: pathlift.path_norm(world.network, radios=3),  # type: ignore[call-arg]
        lambda: pathlift.Relative(),  # type: ignore[call-arg]
        lambda: pathlift.attack(world.network, world.x, None, 0.0, 10),  # type: ignore[misc]
    ):
        with pytest.raises(pathlift.errors.CallError) as caught:
            call()
        assert isinstance(caught.value, TypeError)
    with pytest.raises(pathlift.errors.CallError, match="Did you mean 'radius'"):
        pathlift.attack(world.network, world.x, radios=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if {"model", "inputs"} <= set(arguments(FUNCTIONS[name]))])
def test_inputs_beside_a_network_are_refused_by_every_function(world: World, name: str) -> None:
    given = {"model": world.network, **CALLS[name](world), "inputs": (4,)}
    if isinstance(given["model"], pathlift.Network):
        refused("leave out 'inputs'", FUNCTIONS[name], **given)
        if name in {"align", "equivalent", "rescaling_distance"}:
            refused("leave out 'inputs'", FUNCTIONS[name], **{**given, "model": world.groups})


def test_an_argument_that_would_have_no_effect_is_refused(world: World) -> None:
    refused("generator has no effect without estimate", pathlift.path_metric, world.network, world.state, generator=3)
    refused("sigma has no effect beside choices", world.groups.randomize, [1.0, 2.0], sigma=3.0)
    for name in ("input_mean", "input_variance", "correlation"):
        told = {name: 0.25, "data": world.x}
        refused(f"{name} has no effect beside data", pathlift.activation_statistics, world.network, **told)
    run(pathlift.path_metric, {"model": world.network, "other": world.state, "generator": 0})  # as it is anyway


def test_a_path_is_the_checkpoints_that_it_leads_to(world: World) -> None:
    (found,) = pathlift.path_norms(world.network, str(world.weights))
    assert found.value == pathlift.path_norm(pathlift.rescaling.with_state(world.model, world.state), (4,)).value
    assert pathlift.path_kernel(world.weights, model=world.network).cosine.shape == (1, 1)
    refused("others must be modules, state-dicts or files", pathlift.path_metrics, world.network, world.state)
    refused("models must be", pathlift.path_kernel, world.network, model=world.network)
    refused("no file 'weights'", lambda: next(iter(pathlift.path_norms(world.network, "weights"))))


def test_a_batch_where_a_number_is_meant_is_not_written_out(world: World) -> None:
    words = r"samples must be a positive whole number, found a tensor of shape \(200, 4\)"
    refused(words, pathlift.consequences.generalisation_bound, world.network, samples=torch.randn(200, 4))


def test_constants_of_loss_and_data_may_have_any_size(world: World) -> None:
    plain = pathlift.consequences.generalisation_bound(world.network, samples=100)
    for size in (5e-324, 1e-100, 1e100, 1e308):
        bound = pathlift.consequences.generalisation_bound(world.network, samples=100, loss_lipschitz=size)
        for name in ("log10_theorem", "log10_sharpened", "log10_covering"):
            assert getattr(bound, name) == pytest.approx(getattr(plain, name) + float(np.log10(size)), abs=1e-6)


def test_an_optimiser_of_other_parameters_is_refused_at_once(world: World) -> None:
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)
    for call in (
        lambda: training.path_sgd(other, world.network),
        lambda: training.rescale_after_steps(other, world.groups, pathlift.rescaling.Symmetries.balance),
    ):
        refused("trains none of the network's parameters", call)


def test_a_radius_beyond_the_range_of_float32_still_has_a_bound(world: World) -> None:
    bound = pathlift.lipschitz_bound(world.network, world.state, world.x, radius=1e60)
    assert bool(torch.isfinite(bound).all()) and float(bound.min()) > 1e50


def test_scores_of_another_shape_are_not_spread_over_a_mask() -> None:
    method = pathlift.pruning.ScorePruning(0.5)
    refused("t has shape", method.compute_mask, torch.ones(1, 4), torch.ones(2, 4))


def test_a_state_of_something_else_does_not_go_into_a_model(world: World) -> None:
    for prefix in ("other.", "encoder.0."):
        with pytest.raises(pathlift.MismatchError, match="does not fit the model"):
            pathlift.rescaling.with_state(world.model, {prefix + name: weight for name, weight in world.state.items()})
    pathlift.rescaling.with_state(
        world.model, {"module." + name: weight for name, weight in world.state.items()}
    )  # only a wrapper's


class Constant(nn.Module):
    """The same logits for any input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0, 4.0]]))

    def forward(self, _: Tensor) -> Tensor:
        return self.weight * 2


def test_logits_that_depend_on_no_input_still_have_an_answer_for_each() -> None:
    model, x = Constant(), torch.ones(3, 4)
    for reach, stays in ((0.1, True), (0.9, False)):
        found, search = (call(model, x, pathlift.Relative(reach)) for call in (pathlift.certify, pathlift.attack))
        assert found.certified.tolist() == [stays] * 3 and search.changed.tolist() == [not stays] * 3
    assert pathlift.lipschitz.gradient_norms(model, x).tolist() == [[0.0] * 3] * 3


class Read(nn.Module):
    """A model that takes a number out of its input and computes with it."""

    def __init__(self, use: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(4, 3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layer(x), x.sum().item())


@pytest.mark.parametrize(
    "use",
    [
        lambda y, number: y * number,
        lambda y, number: y / number,
        lambda y, number: y * (number + 1.0),
        lambda y, number: torch.add(y, y, alpha=number),
        lambda y, number: nn.functional.leaky_relu(y, number),
    ],
)
def test_a_number_that_is_read_from_the_input_is_refused_where_it_is_read(use: Callable[[Tensor, float], Tensor]) -> None:
    with pytest.raises(pathlift.UnsupportedModelError, match="item") as caught:
        pathlift.path_norm(Read(use), (4,))
    assert len(caught.value.problems) == 1


def test_no_order_makes_a_norm_vanish() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    network = pathlift.capture(model, (2,))
    top = pathlift.path_norm(network, q=float("inf")).log10
    for q in (300.0, 1000.0, 10_000.0, 1e30):
        try:
            assert abs(pathlift.path_norm(network, q=q).log10 - top) < 0.01
        except pathlift.PathliftError:
            continue


def test_moments_of_small_inputs_do_not_vanish() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    network, other = pathlift.capture(model, (2,)), {name: weight * 1.1 for name, weight in model.state_dict().items()}
    x = torch.tensor([[1e-3, 2e-3], [3e-3, 0.0], [2e-3, 1e-3]])
    with torch.no_grad():
        changed = (model(x) - pathlift.rescaling.with_state(model, other)(x)).abs().double()
    for q in (1.0, 2.0, 40.0, 200.0, 1000.0):
        mean = float(changed.amax() * ((changed / changed.amax()) ** q).mean() ** (1 / q))
        found = float(pathlift.lipschitz.expected_bound(network, other, [x[:1], x[1:]], q=q))
        assert mean <= found <= 1.01 * float(pathlift.lipschitz_bound(network, other, x, kind="per_input").max())


def test_distances_of_high_order_do_not_vanish() -> None:
    model = nn.Linear(2, 1, bias=False)
    near = {"weight": model.weight.detach() + 1e-5}
    network = pathlift.capture(model, (2,))
    assert float(pathlift.rescaling.rescaling_distance(network, near, p=100.0)) == pytest.approx(1e-5, rel=0.05)


def test_inputs_whose_powers_vanish_have_no_shares() -> None:
    network = pathlift.capture(nn.Linear(2, 1), (2,))
    with pytest.raises(pathlift.NumericalError, match="smaller q"):
        pathlift.path_magnitude(network, x=torch.full((1, 2), 1e-10), q=60.0)


def test_whole_numbers_for_weights_are_what_the_model_would_load() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    ones = {name: torch.ones_like(own) for name, own in model.state_dict().items()}
    whole = {name: own.long() for name, own in ones.items()}
    network = pathlift.capture(model, (2,))
    assert pathlift.rescaling.rescaling_distance(network, whole) == pathlift.rescaling.rescaling_distance(network, ones)


def test_nan_is_refused_where_paths_are_listed_and_gradients_taken() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    model[0].weight.data[0, 0] = torch.nan
    for call in (
        lambda: pathlift.path_lifting(model, (2,)),
        lambda: pathlift.lipschitz.gradient_norms(model, torch.ones(1, 2)),
    ):
        with pytest.raises(pathlift.NumericalError):
            call()


# --------------------------------------------------------------------------------------------------------- command lines


def test_every_command_has_a_right_line() -> None:
    assert set(commands()) == set(LINES)


@pytest.mark.one_in(18)
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("command", LINES)
def test_a_bad_command_line_ends_in_one_sentence(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    own = [line for line in tries() if line[0] == command]
    for line in random.Random(command).sample(own, min(len(own), LINES_EACH)):
        end = ended(*line)
        assert end.how in {"refused", "answered"}, f"{end.line}: {end.how}, {end.text}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("norm torch.nn:Linear --q 0.5", "--q must be a number"),
        ("statistics torch.nn:Linear --correlation 3", "pathlift: --correlation must be"),
        ("statistics torch.nn:Linear --input-mean 1,2", "pathlift: --input-mean must have shape (4,), found (2,)"),
        ("shrink torch.nn:Linear --amount 3", "pathlift: --amount must be"),
        ("report torch.nn:Linear --prune 0.5,2 --out none_yet.html", "pathlift: an item of --prune must be"),
        ("certify torch.nn:Linear --data data.safetensors --relative -1", "pathlift: --relative must be"),
        ("certify torch.nn:Linear --data data.safetensors --prune 2", "pathlift: --prune must be"),
        ("certify torch.nn:Linear --data data.safetensors --bits 8 --per layer", "pathlift: --per must be"),
        ("metric torch.nn:Linear " + "x" * 5000, "name must be torchvision:NAME"),
        ("rescale torch.nn:Linear --p 3", "--p has no effect without --to balanced"),
        ("rescale torch.nn:Linear --to random --p 3", "--p has no effect without --to balanced"),
        ("rescale torch.nn:Linear --to balanced --choices 1,2", "--choices has no effect without --to random"),
    ],
)
def test_what_a_bad_command_line_says(line: str, words: str) -> None:
    end = ended("", "", [*line.split(), *MODEL[1:]], "")
    assert end.how == "refused" and words in end.text


# ------------------------------------------------------------------------------------------------ what memory cannot hold


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4398046511104 bytes."
            ),
            "4 TiB",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1536 bytes."), "1.5 KiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"), "2.00 GiB"),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"), "7.45 GiB"),
        (RuntimeError("unable to mmap 1048576 bytes from file </x>: Cannot allocate memory (12)"), "1 MiB"),
        (OSError(12, "Cannot allocate memory"), "does not tell"),
        (MemoryError(), "does not tell"),
    ],
)
def test_a_lack_of_memory_is_known_and_says_how_much_was_asked_for(error: Exception, amount: str) -> None:
    found = shortage(error, "path_norm")
    assert isinstance(found, MemoryError) and amount in str(found)
    with pytest.raises(pathlift.PathliftError) as wrapped:  # what runs in between may have another name for it
        raise pathlift.UnsupportedModelError((pathlift.errors.Problem("", "export", "", "no", ""),)) from error
    assert amount in str(shortage(wrapped.value, "path_norm"))


def test_other_errors_are_no_lack_of_memory() -> None:
    for error in (RuntimeError("shapes differ"), OSError(2, "no"), ValueError("not enough memory"), pathlift.InputError("x")):
        assert shortage(error, "path_norm") is None


def test_an_interrupt_in_a_callback_stays_one(world: World) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pathlift.certify(world.network, world.x, pathlift.Relative(0.01), progress=stop)


LIMITED = """
import resource
import torch
from torch import nn
import pathlift
import pathlift.pruning

torch.set_num_threads(1)
def network(width):
    layers = [nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)]
    return pathlift.capture(nn.Sequential(*layers), (4,))
large, small, near = network(2000), network(3), pathlift.Relative(0.1)
x, y = torch.ones(4, 4), torch.zeros(4, dtype=torch.long)
CALLS = {
    "path_norm": lambda own: pathlift.path_norm(own, q=2),
    "path_norms": lambda own: list(pathlift.path_norms(own, [own], q=2)),
    "path_magnitude": lambda own: pathlift.path_magnitude(own),
    "certify": lambda own: pathlift.certify(own, x, near),
    "attack": lambda own: pathlift.attack(own, x, near),
    "prune": lambda own: pathlift.prune(own, amount=0.5),
    "lipschitz_bound": lambda own: pathlift.lipschitz_bound(own, near, x),
    "balance": lambda own: pathlift.symmetries(own).balance(),
    "sharpness": lambda own: pathlift.consequences.sharpness(own, x, y, 0.1),
}
for call in CALLS.values():
    call(small)  # loads what they need
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), -1))
for name, call in CALLS.items():
    try:
        call(large)
        print(name, "answered")
    except pathlift.errors.OutOfMemoryError as error:
        print(name, "refused", error)
    except BaseException as error:
        print(name, "bare", type(error).__name__, error)
"""


@pytest.mark.hunt
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space are those of Linux")
def test_a_call_that_memory_cannot_hold_says_how_much_it_asked_for() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 9 and done.returncode == 0, done.stdout + done.stderr[-2000:]
    for line in lines:
        assert re.search(r" refused \w+.*needs more memory than there is: it asked for [\d.]+ [KMG]iB", line), line
