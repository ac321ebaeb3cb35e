"""Products with |W| by loops that read W once: the same numbers as PyTorch's, to rounding, and only where they are safe."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pathlift
from pathlift import fused
from pathlift.edges.contraction import Dense
from pathlift.edges.gathered import GatheredConvolution
from pathlift.edges.weights import Bundle, Weights
from pathlift.fused import Recipe
from pathlift.metric import exact
from pathlift.passes.programs import ALL, ORDERED, PIVOT, TELESCOPING, Through

SHAPES = [(1, 1), (4, 17), (7, 33), (10, 70)]
TYPES = sorted(fused.WIDTHS, key=str)


def _plain(loop: Callable[..., None]) -> Callable[..., None]:
    return loop


@pytest.fixture(params=["plain Python", "numba"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let loops take tensors of any size, and list those that ran."""
    if request.param == "numba":
        pytest.importorskip("numba")
    run = fused._run
    ran: list[str] = []

    def noted(loop: Callable[..., None], arguments: Any, count: int) -> None:
        ran.append(loop.__name__)
        run(loop, arguments, count)

    monkeypatch.setattr(fused, "LEAST", 0)
    monkeypatch.setattr(fused, "SHARE", 8)
    monkeypatch.setattr(fused, "_run", noted)
    if request.param == "plain Python":
        monkeypatch.setattr(fused, "_numba", object)
        monkeypatch.setattr(fused, "_compiled", _plain)
        monkeypatch.setattr(fused, "parallel_region", lambda: None)
    with torch.no_grad():
        yield ran


def drawn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers of both signs, zeros, rows of zeros and numbers with few digits left among them."""
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    values[torch.rand(shape, generator=generator) < 0.2] = 0.0
    values[torch.rand(shape, generator=generator) < 0.1] *= torch.finfo(dtype).tiny / 8
    if len(shape) == 2 and shape[0] > 2:
        values[1] = 0.0
    return values.to(dtype)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, length: int) -> None:
    kind = torch.finfo(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=(length + 4) * kind.eps, atol=(length + 4) * kind.tiny)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("stored", "dtype"), TYPES)
def test_one_track(shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype, loops: list[str]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weight, x = drawn(shape, stored, generator), drawn((1, shape[1]), dtype, generator).abs()
    g = drawn((1, shape[0]), dtype, generator).abs()
    out = Dense().sum(x, Weights((weight,), torch.abs, dtype))
    size = weight.double().abs()
    close(out, x.double() @ size.T, dtype, shape[1])
    below, shares = Dense().adjoint(x, Weights((weight,), torch.abs, dtype), g, below=True, share=True)
    assert below is not None and shares is not None
    close(below, g.double() @ size, dtype, shape[0])
    assert torch.equal(shares, weight.abs().to(dtype) * x * g.T)  # in this order, for the guards of the way back
    assert loops == ["several", "back"]


@pytest.mark.parametrize("count", [2, 5, 9])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("stored", "dtype"), TYPES)
def test_several_rows_and_positions(
    shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype, count: int, loops: list[str]
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weight, xs = drawn(shape, stored, generator), [drawn((count, shape[1]), dtype, generator).abs() for _ in range(2)]
    weights, size = Weights((weight,), torch.abs, dtype), weight.double().abs()
    for x, out in zip(xs, Dense().each(xs, weights), strict=True):
        close(out, x.double() @ size.T, dtype, shape[1])
    assert loops == ["several"]
    table, line = torch.arange(count)[:, None], Weights((weight[..., None],), torch.abs, dtype)
    convolution = GatheredConvolution([table], [count], groups=1, transposed=False)
    for x, out in zip(xs, convolution.each([x.T.contiguous()[None] for x in xs], line), strict=True):
        close(out[0], size @ x.T.double(), dtype, shape[1])
    assert loops == ["several"] * 2


def test_where_positions_are_too_many_or_groups_more_than_one(loops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FEW", 8)
    for count, groups in ((9, 1), (4, 2)):
        convolution = GatheredConvolution([torch.arange(count)[:, None]], [count], groups=groups, transposed=False)
        weights = Weights((torch.ones(6, 4 // groups, 1),), torch.abs, torch.float32)
        assert torch.equal(convolution.sum(torch.ones(1, 4, count), weights), torch.full((1, 6, count), 4.0 / groups))
    assert loops == []


@pytest.mark.parametrize(("stored", "dtype"), TYPES)
@pytest.mark.parametrize("through", [PIVOT, ORDERED, TELESCOPING])
def test_two_tracks(stored: torch.dtype, dtype: torch.dtype, through: Through, loops: list[str]) -> None:
    for shape in SHAPES:
        for known in ((0,), (1,), (0, 1)):
            _compare(shape, stored, dtype, through, known, loops)


def _compare(
    shape: tuple[int, int],
    stored: torch.dtype,
    dtype: torch.dtype,
    through: Through,
    known: tuple[int, ...],
    loops: list[str],
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    first, second = (drawn(shape, stored, generator) for _ in range(2))
    if through is ORDERED:
        second = first * torch.randint(0, 2, shape, generator=generator)
    tracks = {track: drawn((1, shape[1]), dtype, generator).abs() for track in known}
    keys = [key for key in ALL if key[1] in known]
    factors = {key: 2.0**-number for number, key in enumerate(keys)}

    def entries(*values: Tensor) -> Any:
        return zip(ALL, through.all(*values), strict=True)

    def sums(recipe: Recipe | None) -> dict[int, Tensor]:
        bundle = Bundle((first, second), keys, entries, dtype, overwrites=True, recipe=recipe)
        return Dense().sums(tracks, bundle, factors)

    loops.clear()
    by_torch = sums(None)
    assert loops == []
    by_loops = sums(through.recipe)
    assert len(loops) == 1
    assert by_loops.keys() == by_torch.keys()
    for track, out in by_loops.items():
        close(out, by_torch[track].double(), dtype, 3 * shape[1])


@pytest.mark.parametrize(("stored", "dtype"), TYPES)
def test_which_of_two_networks_has_more(stored: torch.dtype, dtype: torch.dtype, loops: list[str]) -> None:
    """As PyTorch finds it, for pairs that are equal, ordered either way, or not, in one entry or many, also among tiny ones."""
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        first = drawn(shape, stored, generator)
        pairs = [first.clone(), -first, first / 2, first * 2, torch.zeros_like(first), drawn(shape, stored, generator)]
        for factor in (0.5, 2.0, -1.0, 0.0, torch.nan):
            pairs.append(first.clone())
            pairs[-1].view(-1)[-1] *= factor
        for second in pairs:
            for a, b in ((first, second.to(dtype)), (second, first)):
                found = exact._differs(a, b)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(fused, "suits", lambda *_: False)
                    assert exact._differs(a, b) == found or bool(torch.isnan(b).any() | torch.isnan(a).any())
                assert found[2] == (not torch.equal(a.double(), b.double()))
    assert set(loops) == {"sides"}


def test_nothing_to_do(loops: list[str]) -> None:
    for rows, columns in ((0, 4), (5, 0), (0, 0)):
        w, x, g = torch.ones(rows, columns), torch.ones(columns), torch.ones(rows)
        assert torch.equal(fused.product(w, x[None]), torch.zeros(1, rows))
        assert torch.equal(fused.back(w, x, g, torch.ones(rows, columns)), torch.zeros(columns))
        for recipe in Recipe:
            for out in fused.products(recipe, (w, w), {0: x, 1: x}).values():
                assert torch.equal(out, torch.zeros(rows))


def test_on_the_threads_of_pytorch(loops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop gives the same bits in a region of PyTorch's threads, where there is one, and on Python's."""
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    for stored, dtype in TYPES:
        w, v = (drawn((37, 129), stored, generator) for _ in range(2))
        x, y, g = (drawn((size,), dtype, generator).abs() for size in (129, 129, 37))

        def results(w: Tensor = w, v: Tensor = v, x: Tensor = x, y: Tensor = y, g: Tensor = g) -> list[Tensor]:
            shares = torch.empty(w.shape, dtype=x.dtype)
            many = [fused.products(recipe, (w, v), {0: x, 1: y}) for recipe in Recipe]
            return [
                torch.tensor(fused.sides(w, v)),
                fused.product(w, torch.stack([x, y])),
                fused.back(w, x, g, shares),
                shares,
                *(out for each in many for out in each.values()),
            ]

        try:
            torch.set_num_threads(2)
            in_region = results()
            with monkeypatch.context() as patch:
                patch.setattr(fused, "parallel_region", lambda: None)
                by_python = results()
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(one, other) for one, other in zip(in_region, by_python, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad: float, loops: list[str]) -> None:
    for where in range(4):
        tensors = [torch.ones(6, 9), torch.ones(6, 9), torch.ones(9), torch.ones(9)]
        tensors[where].view(-1)[-1] = bad
        w, v, x, y = tensors
        w[0], v[1] = -1.0, -1.0
        assert where in {1, 3} or not torch.isfinite(fused.product(w, x[None])[0, -1])
        for recipe in (Recipe.PIVOT, Recipe.TELESCOPING):
            sums = fused.products(recipe, (w, v), {0: x, 1: y})
            hidden = bad == torch.inf and where == 1 and recipe is Recipe.PIVOT  # the smaller of |w| and ∞ is |w|
            assert hidden or not all(torch.isfinite(out[-1]) for out in sums.values())
        shares = torch.empty(6, 9)
        assert torch.isfinite(fused.back(w, x, torch.ones(6), shares)[-1]) or where == 0
        assert torch.isfinite(shares[-1, -1]) or where in {0, 2}


def test_the_same_bits_with_any_number_of_threads(loops: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    w, v = (drawn((37, 129), torch.float32, generator) for _ in range(2))
    x, y, g = torch.rand(129), torch.rand(129), torch.rand(37)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            shares = torch.empty(37, 129)
            many = [fused.products(recipe, (w, v), {0: x, 1: y}) for recipe in Recipe]
            results.append([
                torch.tensor(fused.sides(w, v)),
                fused.product(w, torch.stack([x, y])),
                fused.back(w, x, g, shares),
                shares,
                *(o for each in many for o in each.values()),
            ])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _Kind(Tensor):
    pass


def test_only_plain_tensors_where_nobody_looks(loops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.ones(4, 6), torch.ones(6)
    assert fused.suits((weight,), (x,))
    assert fused.suits((nn.Parameter(weight),), (x,))
    wrong = {
        "another type": (weight.half(), x.half()),
        "fewer digits in the tracks": (weight.double(), x),
        "not contiguous": (torch.ones(6, 4).T, x),
        "a part": (torch.ones(4, 8)[:, :6], x),
        "no values": (weight.to("meta"), x.to("meta")),
        "sparse": (weight.to_sparse(), x),
        "a subclass": (weight.as_subclass(_Kind), x),
    }
    assert [name for name, (w, each) in wrong.items() if fused.suits((w,), (each,))] == []
    with torch.enable_grad():
        assert not fused.suits((weight,), (x,))
    with _Dispatch():
        assert not fused.suits((weight,), (x,))
    inside: list[bool] = []

    def watched(values: Tensor) -> Tensor:
        inside.append(fused.suits((weight,), (values,)))
        return Dense().sum(values[None], Weights((weight,), torch.abs, torch.float32))[0]

    assert torch.equal(torch.vmap(watched)(torch.ones(3, 6)), torch.full((3, 4), 6.0))
    torch.jit.trace(watched, x, check_trace=False)
    make_fx(watched)(x)
    assert len(inside) == 3 and not any(inside)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused.suits((weight,), (x,))


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 90), nn.ReLU(), nn.Linear(90, 100))


def test_whole_passes(loops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = perceptron()
    network = pathlift.capture(model, (9,))
    smaller = {name: torch.where(value.abs() < 0.03, 0.0, value) for name, value in model.state_dict().items()}
    others = {name: value * torch.linspace(0.9, 1.1, value.numel()).view_as(value) for name, value in smaller.items()}

    def all_passes() -> list[Any]:
        metrics = [pathlift.path_metric(network, other, moments=moments) for other, moments in ((smaller, None), (others, 0))]
        ends = [end for metric in metrics for end in (metric.lower, metric.upper)]
        norm = pathlift.path_norm(network)
        return [[norm.value, norm.input_part, norm.bias_part, *ends], *pathlift.path_magnitude(network).values()]

    with_loops = all_passes()
    assert set(loops) >= {"several", "compared", "back"}
    assert [str(one) for one in all_passes()] == [str(one) for one in with_loops]
    monkeypatch.setattr(fused, "_numba", lambda: None)
    for one, other in zip(with_loops, all_passes(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0.0)


def test_a_weight_that_is_not_finite_is_refused(loops: list[str]) -> None:
    for bad in (torch.nan, torch.inf):
        model, other = perceptron(), perceptron()
        with torch.no_grad():
            other[4].weight[3, 3] = bad
        for pair in ((model, other), (other, model)):
            with pytest.raises(pathlift.NumericalError, match="finite"):
                pathlift.path_metric(*pair, (9,), moments=0)
        for function in (pathlift.path_norm, pathlift.path_magnitude):
            with pytest.raises(pathlift.NumericalError, match="finite"):
                function(other, (9,))


def test_threads_at_once(loops: list[str]) -> None:
    network = pathlift.capture(perceptron(), (9,))
    norm = pathlift.path_norm(network).value
    values: list[float] = []
    threads = [threading.Thread(target=lambda: values.append(pathlift.path_norm(network).value)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == [norm] * 4


def test_without_numba_or_with_one_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    fused._numba.cache_clear()
    try:
        monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
        assert fused._numba() is None
        fused._numba.cache_clear()
        monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: object())
        with pytest.warns(UserWarning, match="numba is installed but does not load"):
            assert fused._numba() is None
        assert not fused.suits((torch.ones(1024, 1024),), (torch.ones(1024),))
    finally:
        fused._numba.cache_clear()


PROGRAM = """
import os, torch, pathlift.fused as fused
torch.set_grad_enabled(False)
torch.set_num_threads(2)
w, x = torch.randn(2048, 1024), torch.rand(1024)
assert fused.suits((w,), (x,))
before = fused.product(w, x[None])
torch.testing.assert_close(before[0], w.abs() @ x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(fused.product(w, x[None]), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.hunt
def test_a_fork_and_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    import os

    nowhere = tmp_path / "file"
    nowhere.write_text("")
    package = Path(pathlift.__file__).parent
    for folder in (None, nowhere):  # NUMBA_CACHE_DIR inside of a file: no cache
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(package.parent), *filter(None, sys.path)]))
        if folder is not None:
            environment |= {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": str(folder / "x")}
        subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], env=environment, check=True, timeout=300)
