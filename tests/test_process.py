"""What happens around a call: the state of the process, threads, copies, interrupts, memory (CONTRIBUTING, house rules)."""

from __future__ import annotations

import ast
import copy
import functools
import gc
import hashlib
import inspect
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import pathlift
from habit import LONGER
from pathlift.cli.pruning import CRITERIA
from pathlift.reading.quiet import WARNINGS
from process import (
    CALLS,
    CIRCUMSTANCES,
    FUNCTIONS,
    INTERNAL,
    METHODS,
    PUBLIC,
    ROOMS,
    SHAPE,
    World,
    contents,
    differences,
    interrupted,
    live_tensors,
    process_wide,
    small_model,
    state_of_the_process,
    storages,
)


def in_python(code: str, *options: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, *options, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------------------ imports


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["--version"], []])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['pathlift', *%r]\n"
        "from pathlift.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert in_python(code % (arguments,))


def test_the_help_names_every_criterion() -> None:
    assert CRITERIA.split(", ") == list(pathlift.pruning.CRITERIA)


@pytest.mark.hunt
def test_names_come_when_they_are_asked_for_and_files_do_not_hide_them() -> None:
    code = (
        "import sys, pathlift\n"
        "assert 'torch' not in sys.modules\n"
        "import pkgutil\n"
        "for file in pkgutil.iter_modules(pathlift.__path__):\n"
        "    if file.name not in ('__main__', 'lightning', 'hugging_face'): __import__(f'pathlift.{file.name}')\n"
        "from types import ModuleType\n"
        "print([name for name in pathlift.__all__ if isinstance(getattr(pathlift, name), ModuleType)])\n"
        "public = {name for name in dir(pathlift) if not name.startswith('_')}\n"
        "assert public == {*pathlift.__all__, *pathlift.PACKAGES} and not hasattr(pathlift, 'nonsense')\n"
        "from pathlift import *\n"
        "assert path_norm is pathlift.path_norm"
    )
    assert in_python(code) == "[]"


# ------------------------------------------------------------------------------------------------------- around every call

SEARCH = LONGER > 1
"""Whether all pairs are tried, instead of some of them."""


@functools.cache
def network() -> pathlift.Network:
    return World().network


@functools.cache
def plain(name: str) -> object:
    return outcome(name, network())


def outcome(name: str, own: pathlift.Network | None = None) -> object:
    """What a call gives on fresh arguments."""
    world = World(own or network())  # its files are read for some results
    return contents(CALLS[name](world))


def chosen(share: int, place: int = 0) -> list[str]:
    """Every call in a search, else one of so many, others at each place."""
    return list(CALLS) if SEARCH else list(CALLS)[place % share :: share]


def test_every_public_function_and_method_is_tried() -> None:
    assert {name for name, value in PUBLIC.items() if inspect.isfunction(value)} == set(FUNCTIONS)
    classes = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
    methods = {
        f"{name}.{key}"
        for name, own in classes.items()
        for key, value in vars(own).items()
        if not key.startswith("_") and inspect.isfunction(value)
    }
    assert methods - INTERNAL <= set(METHODS)


@pytest.mark.hunt
@pytest.mark.hunt_one_in(3)
@pytest.mark.parametrize("around", CIRCUMSTANCES)
def test_a_call_gives_the_same_bits_or_is_refused_whatever_is_around_it(around: str) -> None:
    refused = []
    for name in chosen(7, list(CIRCUMSTANCES).index(around)):
        if (name == "load_model" and around.startswith("default dtype")) or (name in STEPS and around == "a fake mode"):
            continue  # whoever builds a model there, or takes a step of training, gets what PyTorch makes of it
        world = World(network())
        kept = [own.clone() for own in world.tensors()]
        with CIRCUMSTANCES[around]():
            before = state_of_the_process()
            try:
                found = CALLS[name](world)
            except pathlift.PathliftError:
                refused.append(name)
            assert not differences(before, state_of_the_process()), name
        assert all(torch.equal(one, two) for one, two in zip(kept, world.tensors(), strict=True)), name
        if around == "medium precision" and name.startswith("certify"):
            continue  # the forward pass that it speaks of rounds otherwise
        assert name in refused or contents(found) == plain(name), name
        assert outcome(name) == plain(name), f"{name}, afterwards"
    assert set(refused) <= REFUSED.get(around, set()), refused


STEPS = {"keep_masks", "MaskHandle.remove"}
"""Calls around which a step of training is taken."""

REFUSED = {"a fake mode": set(CALLS), "saved tensors elsewhere": {"attack", "certify", "certify a rounding"}}
"""What cannot be done there, and says so."""


def test_items_of_an_iterator_do_not_depend_on_what_is_around_them() -> None:
    world = World(network())
    right = [contents(own) for own in pathlift.path_norms(network(), [world.near, world.file, world.near])]
    drawn = pathlift.path_norms(network(), [world.near, world.file, world.near])
    found = [next(drawn)]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(next(drawn))
    with torch.inference_mode(), torch.device("meta"):
        found.append(next(drawn))
    assert [contents(own) for own in found] == right


class Dense(nn.Module):
    """Convolutions that each read all that was made before, in sizes far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 * number, 3, 3, padding=1) for number in range(1, 7))
        with torch.no_grad():
            for number, own in enumerate(self.parameters()):
                own *= 10.0 ** (number * 7 % 11 - 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x.relu()).relu()], 1)
        return x.mean((2, 3))


def test_inside_of_what_torch_compiles() -> None:
    """Dynamo draws all items of a generator at once; each weight of a stream lies in the memory of the one before."""
    torch.manual_seed(0)
    captured = pathlift.capture(Dense(), (3, 9, 8))
    other = {name: own * (torch.rand(own.shape) > 0.3) for name, own in captured.state.items()}

    def numbers() -> list[object]:
        metric = pathlift.path_metric(captured, other)
        norms = [norm.value for norm in pathlift.path_norms(captured, [other, other])]
        scores = [contents(share) for share in pathlift.path_magnitude(captured).values()]
        return [metric.lower, metric.upper, pathlift.path_norm(captured).value, *norms, *scores]

    compiled = torch.compile(numbers, backend="eager")
    assert numbers() == compiled() == compiled()


def test_what_a_network_remembers_is_of_no_inference_mode() -> None:
    model = small_model()
    with torch.inference_mode():
        fresh = pathlift.capture(model, SHAPE)
        groups = pathlift.rescaling.Symmetries(fresh)
        assert (len(groups), groups.families, groups.pinned) != (0, (), ())
        for name in ("path_norm", "path_metric", "certify", "sharpness"):
            CALLS[name](World(fresh))
    for name in ("path_norm", "path_metric", "certify", "sharpness", "Symmetries.balance"):
        assert outcome(name, fresh) == plain(name)


def test_a_model_sees_the_default_device_of_the_caller() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.ones(3)

    with torch.device("meta"):
        model = Shifted(2, 3)
        assert pathlift.check_support(model, (2,)).supported


# ------------------------------------------------------------------------------------------------------------------ threads


def together(works: list[Callable[[], object]], times: int) -> list[object]:
    """Call functions so many times, each in its own thread, all at once."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> list[object]:
        start.wait()
        return [work() for _ in range(times)]

    with ThreadPoolExecutor(len(works)) as pool:
        return [own for several in pool.map(run, works) for own in several]


def test_threads_capture_at_once_and_leave_the_process_as_it_was() -> None:
    models = [small_model(0), small_model(0), small_model(1), nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))]
    shapes: list[tuple[int, ...]] = [SHAPE, SHAPE, SHAPE, (4,)]
    works = [lambda m=m, s=s: contents(pathlift.path_norm(m, s)) for m, s in zip(models, shapes, strict=True)]
    right = [work() for work in works]
    before = state_of_the_process()
    found = together(works, 20 if SEARCH else 2)
    assert not differences(before, state_of_the_process())
    assert found == [own for own in right for _ in range(len(found) // len(right))]


@pytest.mark.hunt
def test_threads_call_at_once_on_one_network() -> None:
    worlds = [(name, World(network())) for name in chosen(12, 3) for _ in range(2)]
    for name, _ in worlds:
        plain(name)
    before = state_of_the_process()
    found = together([lambda own=own: contents(CALLS[own[0]](own[1])) for own in worlds], 1)
    assert found == [plain(name) for name, _ in worlds]
    changed = differences(before, state_of_the_process())
    assert not changed, changed


@pytest.mark.hunt
def test_paths_are_written_out_by_several_threads_at_once() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, width)) for width in (1, 2, 1, 2)]
    right = [pathlift.path_lifting(model, (3,)).names for model in models]
    assert together([lambda own=own: pathlift.path_lifting(own, (3,)).names for own in models], 2) == [
        r for r in right for _ in range(2)
    ]


def test_another_thread_hears_its_warnings_logs_and_errors_while_a_model_is_traced(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    handler, logger, model = Handler(), logging.getLogger("torch.heard_in_a_test"), small_model()  # no other test turns it off
    logger.setLevel(logging.WARNING)
    pathlift.capture(model, SHAPE)  # PyTorch sets up its own loggers when it traces for the first time
    flags = (process_wide(), sys.stderr)
    over, said, changed = threading.Event(), 0, dict[str, object]()

    def talk() -> None:
        nonlocal said
        while not over.is_set():
            said += 1
            warnings.warn(f"warned {said}", UserWarning, stacklevel=1)
            logger.warning("logged")
            print("printed", file=sys.stderr)
            now = process_wide()
            mine = [own for own in now.pop("warning filters") if own is not WARNINGS]
            changed.update(differences({**flags[0], "warning filters": mine}, {**now, "warning filters": mine}))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger.addHandler(handler)
        flags = (process_wide(), sys.stderr)
        thread = threading.Thread(target=talk)
        thread.start()
        try:
            for _ in range(20 if SEARCH else 3):
                pathlift.capture(model, SHAPE)
        finally:
            over.set()
            thread.join()
            logger.removeHandler(handler)
    assert said > 10
    assert not changed, changed
    assert sum(str(own.message).startswith("warned") for own in caught) == said
    assert heard.count("logged") == said
    assert capfd.readouterr().err.count("printed") == said


# ------------------------------------------------------------------------------------------------------------------- copies

NO_COPY = {"stream", "to_torch_prune"}
"""A network on disk reads the files of its own folder; PyTorch copies no module that it prunes."""


@pytest.mark.one_in(4)
@pytest.mark.parametrize("part", range(4))
def test_results_and_arguments_survive_pickle_and_deepcopy(part: int) -> None:
    for name in list(CALLS)[part::4]:
        if not SEARCH and name.startswith("prune by"):
            continue
        world = World(network())
        found = CALLS[name](world)
        if isinstance(found, (pathlift.Network, pathlift.rescaling.Symmetries)):
            assert contents(copy.deepcopy(found)) == plain(name), name
        elif name not in NO_COPY:
            assert contents(copy.deepcopy(found)) == plain(name), name
            again = pickle.loads(pickle.dumps(found))
            if isinstance(found, pathlift.rescaling.RescaledState):
                again, found = dict(again), dict(found)
            assert contents(again) == contents(found), name


@pytest.mark.parametrize("name", ["balance", "condition", "equalize", "normalize", "randomize", "rescale", "weight_factors"])
def test_states_are_read_with_weights_only(name: str, tmp_path: Path) -> None:
    state = METHODS[f"Symmetries.{name}"](World(network()))
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert contents(dict(again)) == contents(dict(state))


@pytest.mark.parametrize("name", ["load_masks", "path_magnitude", "unit_path_magnitude", "from_torch_prune"])
def test_tensors_by_name_are_read_with_weights_only(name: str, tmp_path: Path) -> None:
    state = CALLS[name](World(network()))
    torch.save(dict(state), tmp_path / "state.pt")
    assert contents(torch.load(tmp_path / "state.pt", weights_only=True)) == contents(dict(state))


# ------------------------------------------------------------------------------------------------------------- other processes


@pytest.mark.hunt
def test_no_public_function_checks_its_arguments_by_an_assert() -> None:
    for file in Path(pathlift.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            marks = getattr(function, "decorator_list", ())
            if not any(isinstance(own, ast.Name) and own.id == "public" for own in marks):
                continue
            given = {own.arg for own in (*function.args.args, *function.args.kwonlyargs)} - {"self"}
            asserts = [own for own in ast.walk(function) if isinstance(own, ast.Assert)]
            named = {own.id for check in asserts for own in ast.walk(check) if isinstance(own, ast.Name)}
            assert not given & named, (file.name, function.name)


@pytest.mark.skipif(not SEARCH, reason="compiles all of PyTorch anew")
def test_python_without_asserts_gives_the_same() -> None:
    code = (
        "import sys, hashlib; sys.path.insert(0, %r)\n"
        "from process import *\n"
        "assert not sys.flags.optimize or not __debug__\n"
        "net = World().network\n"
        "worlds = {name: World(net) for name in %r}\n"
        "print([hashlib.sha256(repr(contents(CALLS[name](own))).encode()).hexdigest() for name, own in worlds.items()])"
    )
    names = chosen(20, 1)
    found = in_python(code % (str(Path(__file__).parent), names), "-O")
    assert found == str([hashlib.sha256(repr(plain(name)).encode()).hexdigest() for name in names])


def forked(work: Callable[[], object]) -> None:
    """Call a function in a forked child, which may take a minute."""
    child = os.fork()
    if child == 0:
        done = 1
        try:
            signal.alarm(60)
            work()
            done = 0
        finally:
            os._exit(done)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.hunt
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_captures_and_computes_while_other_threads_of_the_parent_do() -> None:
    model, right = small_model(), plain("path_norm of a module")
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            pathlift.path_norm(model, SHAPE)

    def child() -> None:
        assert contents(pathlift.path_norm(model, SHAPE, q=2)) == right
        assert outcome("path_norm") == plain("path_norm")

    plain("path_norm")
    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10 if SEARCH else 2):
            forked(child)
    finally:
        over.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.hunt
@pytest.mark.parametrize("part", range(4))
def test_an_interrupt_at_any_line_comes_out_and_leaves_everything_as_it_was(part: int) -> None:
    draw = random.Random(part)
    for name in chosen(36, 2 + 9 * part):
        CALLS[name](World(network()))  # what follows from the graph alone is computed once
        first = World(network())
        lines = interrupted(lambda name=name, world=first: CALLS[name](world), 0)
        for line in sorted({1, *(draw.randint(1, lines) for _ in range(2 * LONGER))}):
            world = World(network())
            kept = [own.clone() for own in world.tensors()]
            before = state_of_the_process()
            assert interrupted(lambda name=name, world=world: CALLS[name](world), line) == -1, (name, line)
            assert not differences(before, state_of_the_process()), (name, line)
            assert all(torch.equal(one, two) for one, two in zip(kept, world.tensors(), strict=True)), (name, line)
        assert outcome(name) == plain(name), name


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """A shell that starts its jobs in the background lets them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="there are no such signals on this system")
def test_ctrl_c_while_a_model_is_traced(ctrl_c_interrupts: None) -> None:
    model, draw = small_model(), random.Random(1)
    right = contents(pathlift.capture(model, SHAPE))
    begun = time.monotonic()
    pathlift.capture(model, SHAPE)
    usual = time.monotonic() - begun
    before, kept = state_of_the_process(), [own.clone() for own in model.state_dict().values()]
    for _ in range(60 if SEARCH else 3):
        came = False
        timer = threading.Timer(draw.random() * usual, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        try:
            timer.start()
            while True:
                pathlift.capture(model, SHAPE)
        except KeyboardInterrupt:
            came = True
        assert came
        timer.join()
        assert not differences(before, state_of_the_process())
        assert contents(pathlift.capture(model, SHAPE)) == right
    assert all(torch.equal(one, two) for one, two in zip(kept, model.state_dict().values(), strict=True))


# -------------------------------------------------------------------------------------------------------------------- memory

HOLDERS = {"capture", "stream", "symmetries", "Symmetries.at", "capture of a Network"}
"""Results that are there to hold a network."""

SHARED = {"Batch.split", "importance_scores"}
"""Results that hand on parts of their arguments."""


@pytest.mark.hunt
def test_a_result_holds_no_more_than_it_shows() -> None:
    for name in CALLS:
        if name in HOLDERS or (not SEARCH and name.startswith("prune by")):
            continue
        world = World(network())
        state = dict(world.network.state)
        arguments = storages((world.model, world.other, world.x, world.y, world.near, world.masks, state))
        found = CALLS[name](world)
        if isinstance(found, tuple) and isinstance(found[0], pathlift.Network):  # what its graph knows is there to be held
            found = (dict(found[0].state), *found[1:])
        held = storages(found)
        assert name in SHARED or not held.keys() & arguments.keys(), name
        for own in held.values():
            assert name in SHARED or own.untyped_storage().nbytes() <= 2 * own.nbytes + 64, (name, own.shape)


@pytest.mark.hunt
def test_captures_leave_nothing_behind() -> None:
    names = ["capture", "check_support", "path_norm of a module", "symmetries"]

    def once() -> None:
        world = World()
        for name in names:
            CALLS[name](world)

    for _ in range(2):
        once()
    tensors, objects = live_tensors(), len(gc.get_objects())
    times = 100 if SEARCH else 3
    for _ in range(times):
        once()
    assert live_tensors() <= tensors  # what another test left may go meanwhile
    assert len(gc.get_objects()) - objects < 60 * times  # four captures


@pytest.mark.parametrize("room", [room for room in ROOMS if room])
def test_a_name_that_lives_in_a_package_is_pointed_to(room: str) -> None:
    for name in set(import_module(f"pathlift{room}").__all__) - set(pathlift.__all__):
        with pytest.raises(AttributeError, match=rf"no attribute '{name}'; it lives in pathlift\.\w+: from pathlift\."):
            getattr(pathlift, name)
    assert not hasattr(pathlift, "path_nrom")
