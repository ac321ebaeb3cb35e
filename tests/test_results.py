"""Every result is of one kind: a line, a table in a notebook, a dictionary for JSON, pickled and copied, no accidental bool."""

from __future__ import annotations

import copy
import dataclasses
import functools
import html.parser
import io
import json
import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.graph.calling import leaves
from pathlift.results import LINE, Result, plain
from process import FUNCTIONS, METHODS, PUBLIC, World

MODELS = (pathlift.Network, pathlift.storage.Checkpoint, pathlift.pruning.Batch)
"""What a call gives to be handed to another one: no results."""

TRUE_OR_FALSE = {"SupportReport", "Equivalence", "PathMagnitude", "RescaledState", "BalancedState"}
"""Those of which `bool` says what their documentation says: a verdict, or whether they hold anything."""


def inside(value: object) -> list[object]:
    """Return every object of a class of pathlift in what a call returned; what models are made of is not looked into."""
    if isinstance(value, MODELS):
        return []
    own = [value] if type(value).__module__.startswith("pathlift") else []
    if isinstance(value, pathlift.rescaling.Symmetries):
        return [*own, *inside(value.families), *inside(value.pinned)]
    if isinstance(value, (list, tuple)):
        return [*own, *(other for item in value for other in inside(item))]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        return [*own, *(other for name in names for other in inside(getattr(value, name)))]
    return own


def compensated(world: World) -> Any:
    """Pruning whose report says how the weights that stay make up for the others."""
    return pathlift.prune(world.network, amount=0.5, update="compensate")


@functools.cache
def results() -> dict[str, Any]:
    """One result of each class, by the name of the class."""
    torch.manual_seed(0)
    world = World()
    found: dict[str, Any] = {}
    for call in (*(FUNCTIONS | METHODS).values(), compensated):
        for value in inside(call(world)):
            found.setdefault(type(value).__name__, value)
    return found


def classes() -> list[str]:
    """Every class of results that pathlift names, and those that results are made of."""
    kinds = {name: kind for name, kind in PUBLIC.items() if isinstance(kind, type)}
    return sorted({*(name for name, kind in kinds.items() if issubclass(kind, Result)), "SupportReport", "Problem"})


def test_every_result_of_a_public_function_is_a_result() -> None:
    strangers = [name for name, value in results().items() if not isinstance(value, Result)]
    assert not strangers
    assert set(classes()) == set(results())


@pytest.mark.parametrize("name", classes())
def test_a_result_prints_as_one_line(name: str) -> None:
    line = repr(results()[name])
    assert line.startswith(f"{name}(") and line.endswith(")")
    assert "\n" not in line and len(line) <= LINE == 200


@pytest.mark.parametrize("name", classes())
def test_a_result_becomes_json_and_comes_back(name: str) -> None:
    result = results()[name]
    written = result.to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == written and len(written) > 0
    assert all(not isinstance(value, Tensor) for value in written.values())
    for key, value in vars(result).items():
        if isinstance(value, (float, int, str, bool)) and not key.startswith("_"):
            assert type(value)(written[key]) == value or value != value, key
        if isinstance(value, Tensor) and not key.startswith("_"):
            numbers = torch.tensor([float(word) for word in leaves(written[key])], dtype=torch.float64).reshape(value.shape)
            assert torch.equal(numbers.nan_to_num(), value.double().nan_to_num()), key


class Tags(html.parser.HTMLParser):
    """Counts what is opened and not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tables += tag == "table"
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", classes())
def test_a_result_is_a_small_table_in_a_notebook(name: str) -> None:
    text = results()[name]._repr_html_()
    tags = Tags(text)
    assert tags.tables >= 1 and not tags.open and name in text
    assert len(text) < 20_000


def pickled(result: Result) -> Any:
    return pickle.loads(pickle.dumps(result))


@pytest.mark.parametrize("name", classes())
@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, pickled])
def test_a_result_is_pickled_and_copied(name: str, make: Any) -> None:
    result = results()[name]
    made = make(result)
    if isinstance(made, Result):
        assert type(made) is type(result) and str(made.to_dict()) == str(result.to_dict())
    else:  # a state-dict pickles as one, for torch.load(…, weights_only=True)
        assert isinstance(result, dict) and type(made) is OrderedDict
        assert all(torch.equal(made[key], value) for key, value in result.items())


@pytest.mark.parametrize("name", classes())
def test_a_result_cannot_be_changed(name: str) -> None:
    result = results()[name]
    if isinstance(result, (dict, Tensor)):
        pytest.skip("a state-dict, or a tensor, with what it knows of itself")
    for key in vars(result):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, key, None)


@pytest.mark.parametrize("name", classes())
def test_a_result_is_true_or_false_where_that_means_something(name: str) -> None:
    result = results()[name]
    if name in TRUE_OR_FALSE:
        assert "Return" in (type(result).__bool__.__doc__ or "")
        assert isinstance(bool(result), bool)
        return
    with pytest.raises(TypeError, match=f"{name} is neither true nor false|{name} speaks of 3 samples"):
        bool(result)


def test_bool_of_one_sample_is_its_verdict_and_that_of_several_is_refused() -> None:
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    certificate = pathlift.certify(model, x[:1])
    assert bool(certificate) is bool(certificate.certified)
    search = pathlift.attack(model, x[:1], pathlift.Relative(0.0), steps=1)
    assert bool(search) is bool(search.changed) is False
    for several in (pathlift.certify(model, x), pathlift.attack(model, x, pathlift.Relative(0.1), steps=1)):
        with pytest.raises(TypeError, match=r"2 samples.*\.all\(\)"):
            bool(several)


def test_bool_of_a_verdict_and_of_a_mapping() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert bool(pathlift.check_support(model, (2,))) and not bool(pathlift.check_support(nn.GELU(), (2,)))
    assert bool(pathlift.equivalent(model, model, (2,)))
    assert bool(pathlift.path_magnitude(model, (2,)))


@pytest.mark.parametrize("name", classes())
def test_a_result_gives_a_logger_flat_numbers_with_keys_that_stay(name: str) -> None:
    result = results()[name]
    found = result.scalars()
    assert all(type(value) is float for value in found.values())
    assert result.scalars("val/") == {f"val/{key}": value for key, value in found.items()} or any(
        v != v for v in found.values()
    )
    for key, value in vars(result).items():
        if isinstance(value, (bool, int, float)) and not key.startswith("_") and key in result.to_dict():
            assert found[key] == float(value) or value != value, key


def test_the_numbers_of_a_logger_are_these() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    norm = pathlift.path_norm(model, (2,))
    keys = (
        "value", "log10", "log10_scale", "q", "input_part", "bias_part", "log10_input_part", "log10_bias_part",
        "per_output/mean",
    )  # fmt: skip
    assert tuple(norm.scalars()) == keys
    metric = pathlift.path_metric(model, {n: w + 0.1 for n, w in model.state_dict().items()}, (2,), estimate=5, generator=0)
    assert metric.scalars()["exact"] == float(metric.exact) and metric.scalars("a/")["a/lower"] == metric.lower
    if metric.sampled is not None:
        assert metric.scalars()["sampled/samples"] == 5.0
    many = pathlift.certify(nn.Linear(2, 2), torch.ones(3, 2))
    one = pathlift.certify(nn.Linear(2, 2), torch.ones(1, 2))
    assert many.scalars().keys() == one.scalars().keys() >= {"share", "margin/mean", "certified/mean"}


ROWS = {
    "PruneReport": lambda result: len(result.tensors),
    "QuantizeReport": lambda result: len(result.tensors),
    "ShrinkReport": lambda result: len(result.layers),
    "ActivationStatistics": lambda result: len(result.layers),
    "SupportReport": lambda result: len(result.problems),
    "Symmetries": lambda result: len(result.families),
    "Certificate": lambda result: len(result.margin),
    "CertifiedRadius": lambda result: len(result.radius),
    "Attack": lambda result: len(result.margin),
    "LayerStatistics": lambda result: len(result.mean),
    "PathKernel": lambda result: result.cosine.numel(),
    "LipschitzBound": lambda result: result.bounds.numel(),
    "InputLipschitz": lambda result: len(result.per_output),
    "PathLifting": len,
    "PathMagnitude": len,
    "RescaledState": len,
    "BalancedState": len,
    "BitsNeeded": lambda result: len(result.log10_relative),
}
"""Results that are lists, and how long they are; any other is one row."""


@pytest.mark.parametrize("name", classes())
def test_a_result_is_the_rows_of_a_table(name: str) -> None:
    result = results()[name]
    rows = result._records()
    assert len(rows) == ROWS.get(name, lambda _: 1)(result)
    assert all(row.keys() == rows[0].keys() for row in rows) or name in {"SupportReport", "ActivationStatistics"}
    assert all(isinstance(value, (bool, int, float, str)) for row in rows for value in row.values())


def test_a_table_says_what_the_result_says() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    shares = pathlift.path_magnitude(model, (2,))
    for row, (name, tensor) in zip(shares._records(), shares.items(), strict=True):
        assert (row["name"], row["entries"], row["shape"]) == (name, tensor.numel(), "×".join(map(str, tensor.shape)))
        assert row["sum"] == pytest.approx(float(tensor.double().sum()), rel=1e-12)
        assert row["largest"] == float(tensor.max())
    certificate = pathlift.certify(model, torch.randn(4, 2))
    rows = certificate._records()
    assert [row["sample"] for row in rows] == [0, 1, 2, 3]
    assert [row["margin"] for row in rows] == certificate.margin.tolist()
    kernel = pathlift.path_kernel([model, model.state_dict()], (2,))
    assert [(row["network"], row["other"]) for row in kernel._records()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    _, report = pathlift.prune(model, (2,), 0.5)
    assert [row["name"] for row in report._records()] == ["0.weight", "2.weight"]
    assert [row["kept"] for row in report._records()] == [tensor.kept for tensor in report.tensors]


def test_a_table_of_pandas_has_these_rows() -> None:
    pandas = pytest.importorskip("pandas")
    report = results()["PruneReport"]
    frame = report.to_frame()
    assert isinstance(frame, pandas.DataFrame) and frame.to_dict("records") == report._records()


@pytest.mark.parametrize(("module", "extra", "call"), [("pandas", "frames", "to_frame"), ("matplotlib", "plots", "plot")])
def test_a_package_that_is_missing_is_named_with_its_extra(
    module: str, extra: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.pyplot", raising=False)
    with pytest.raises(pathlift.InputError, match=rf"pip install 'pathlift\[{extra}\]'"):
        getattr(results()["PruneReport"], call)()


PICTURES = {
    "PathMagnitude", "PathMetric", "PathKernel", "Certificate", "CertifiedRadius", "PruneReport", "QuantizeReport",
    "BitsNeeded",
}  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", classes())
def test_a_result_draws_itself_where_a_picture_says_more(name: str) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    ax = figure.Figure(layout="constrained").add_subplot()
    if name not in PICTURES:
        with pytest.raises(pathlift.InputError, match=f"{name} has no picture"):
            results()[name].plot(ax)
        return
    assert results()[name].plot(ax) is ax
    ax.figure.draw_without_rendering()
    assert (ax.get_xlabel() and ax.get_ylabel()) or name == "PathMetric"
    assert ax.has_data() and not [text for text in ax.get_xticklabels() if len(text.get_text()) > 40]


def test_a_picture_of_its_own_is_a_figure_of_pyplot() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ax = results()["PruneReport"].plot()
    assert pyplot.fignum_exists(ax.figure.number)
    pyplot.close(ax.figure)


@pytest.mark.hunt
def test_large_results_stay_short() -> None:
    """A report on many large tensors is a line, and its table is cut off."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(30)))
    _, report = pathlift.prune(model, (64,), 0.5)
    assert len(repr(report)) <= LINE
    assert repr(report).startswith("PruneReport(criterion='relative_path_magnitude', sparsity=0.5")
    assert len(report._repr_html_()) < 20_000 and "and 10 more" in report._repr_html_()
    assert len(repr(pathlift.path_magnitude(model, (64,)))) <= LINE
    problem = pathlift.errors.Problem("a.b", "aten.gelu", "model.py:3", "reason " * 100, "advice")
    assert len(repr(problem)) <= LINE and repr(problem).endswith("…)")


def test_numbers_that_are_not_finite_are_words_that_float_reads() -> None:
    bound = pathlift.metric.MetricBound("x", "y", "lower", -math.inf, invariant=True)
    words = {"name": "x", "reference": "y", "side": "lower", "log10": "-inf", "invariant": True, "reason": ""}
    assert bound.to_dict() == words == json.loads(json.dumps(words, allow_nan=False))
    values = {"tensor": torch.tensor([[math.inf, 1.0], [math.nan, -0.5]]), "within": (bound, [-math.inf])}
    assert plain(values) == {"tensor": [["inf", 1.0], ["nan", -0.5]], "within": [words, ["-inf"]]}
    assert all(float(word) == value for word, value in (("inf", math.inf), ("-inf", -math.inf)))


def test_every_result_of_networks_without_paths_is_json() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    nothing = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    huge = {name: torch.full_like(value, 1e38) for name, value in model.state_dict().items()}
    empty, x = pathlift.rescaling.with_state(model, nothing), torch.ones(1, 2)
    found = [
        pathlift.path_norm(empty, (2,)),
        pathlift.path_metric(empty, nothing, (2,)),
        pathlift.path_metric(model, huge, (2,)),
        *pathlift.metric.path_metric_bounds(empty, nothing, (2,)),
        pathlift.certify(pathlift.rescaling.with_state(model, huge), x),
        pathlift.lipschitz_bound(model, huge, x),
        pathlift.path_kernel([nothing, nothing], (2,), model=model),
    ]
    texts = [json.dumps(result.to_dict(), allow_nan=False) for result in found]
    assert sum("inf" in text for text in texts) >= 4


def test_names_are_escaped_in_a_table() -> None:
    problem = pathlift.errors.Problem("<b>", "op & co", "", "a < b", "")
    text = problem._repr_html_()
    assert "<b>" not in text and "&lt;b&gt;" in text and "op &amp; co" in text


def test_what_is_not_there_is_left_out_of_the_dictionary() -> None:
    """Bounds per output neuron are for q = 1."""
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    assert "log10_upper_per_output" in pathlift.path_metric(model, other, (2,)).to_dict()
    assert "log10_upper_per_output" not in pathlift.path_metric(model, other, (2,), q=2).to_dict()


def test_results_go_into_a_data_frame_row_by_row() -> None:
    """A list of dictionaries with the same keys, as data frames take it."""
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    rows = [bound.to_dict() for bound in pathlift.metric.path_metric_bounds(model, other, (2,))]
    assert len({tuple(row) for row in rows}) == 1 and all(isinstance(row["log10"], float) for row in rows)


def test_states_are_mappings_that_torch_loads_as_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    state = pathlift.symmetries(model, (2,)).normalize()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    model.load_state_dict(state)
    assert isinstance(state, dict) and isinstance(pathlift.path_magnitude(model, (2,)), Mapping)
    flat = copy.copy(state)
    assert type(flat) is type(state) and torch.equal(flat.factors, state.factors) and flat["0.weight"] is state["0.weight"]
