"""A report says what the functions of the library say, on a page that is whole, safe and needs nothing else."""

from __future__ import annotations

import html.parser
import json
import math
import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.results import LINE
from plain import run

pytest.importorskip("matplotlib")
from pathlift.report import Report
from pathlift.report.page import rendered

SHAPE = (1, 4, 4)
EVIL = "<script>alert(1)</script>"


class Residual(nn.Module):
    """A convolution, a branch around a convolution, batch norms, one dead channel and one scale of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).relu().mean((2, 3)))


def residual() -> nn.Module:
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        model.branch[1].weight[1] = 0.0
        model.branch[0].weight[0] = 0.0
    return model


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return residual()


@pytest.fixture(scope="module")
def others(model: nn.Module) -> list[dict[str, Tensor]]:
    """The same function in another gauge, and another function."""
    rescaled = dict(pathlift.symmetries(model, SHAPE).randomize(generator=0))
    farther = {name: value * 1.1 if "weight" in name else value for name, value in model.state_dict().items()}
    farther["stem.0.weight"] = farther["stem.0.weight"] * torch.linspace(0.5, 1.5, 27).reshape(3, 1, 3, 3)
    return [rescaled, farther]


@pytest.fixture(scope="module")
def report(model: nn.Module, others: list[dict[str, Tensor]]) -> Report:
    made = torch.Generator().manual_seed(0)
    data = pathlift.pruning.Batch(torch.randn(20, *SHAPE, generator=made), torch.arange(20) % 2)
    return Report(
        model, SHAPE, others, data=data, title=f"a {EVIL} $x$", names=("first", EVIL, "third $"), amounts=(0.3,), bits=(4,),
        command=f"pathlift report {EVIL}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Report:
    return Report(nn.Linear(2, 2), (2,), amounts=(), bits=())


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return report.html()


# ---- the numbers


def test_its_numbers_are_those_of_the_functions(report: Report, model: nn.Module) -> None:
    norm, shares = pathlift.path_norm(model, SHAPE), pathlift.path_magnitude(model, SHAPE)
    assert report.supported and report.problems == () and report.notes == ()
    assert report.log10_path_norm == norm.log10 and report.outputs == 2 and report.inputs == (SHAPE,)
    assert report.from_inputs == pytest.approx(norm.input_part / norm.value)
    assert report.parameters == sum(weight.numel() for weight in model.parameters())
    layers = {layer.module: layer for layer in report.layers}
    assert list(layers) == ["stem.0", "stem.1", "branch.0", "branch.1", "head"]
    for module, layer in layers.items():
        assert layer.share == pytest.approx(float(shares[f"{module}.weight"].double().sum()))
    assert [layer.operator for layer in report.layers] == ["conv2d", "batch_norm", "conv2d", "batch_norm", "linear"]
    assert report.groups == len(pathlift.symmetries(model, SHAPE))
    assert layers["branch.0"].sparsity == pytest.approx(1 / 3) and layers["stem.0"].sparsity == 0
    assert layers["branch.0"].dead == 2 and layers["branch.0"].channels == 3  # no weights; no scale behind it
    assert layers["branch.1"].zero_scales == 1 and layers["stem.1"].zero_scales == 0 and layers["head"].zero_scales is None
    assert report.scores is not None
    assert sum(report.scores.counts) + report.scores.zeros == sum(share.numel() for share in shares.values())
    assert report.scores.zeros == sum(int((share == 0).sum()) for share in shares.values())


def test_in_a_perceptron_every_path_that_has_started_runs_through_every_layer() -> None:
    found = Report(perceptron(), (4,), amounts=(), bits=())
    for layer in found.layers:
        assert layer.share == pytest.approx(layer.before)
    assert found.layers[-1].before is not None and found.layers[-1].before + found.layers[-1].starts == pytest.approx(1.0)


class Flat(nn.Module):
    """A perceptron that is one module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.names = [name.replace(".", "_") for name, _ in net.named_parameters()]
        for name, parameter in zip(self.names, net.parameters(), strict=True):
            setattr(self, name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        weights = [getattr(self, name) for name in self.names]
        while len(weights) > 2:
            x = torch.relu(nn.functional.linear(x, *weights[:2]))
            del weights[:2]
        return nn.functional.linear(x, *weights)


def test_layers_that_one_module_makes_are_told_apart() -> None:
    net = perceptron()
    expected = Report(net, (4,), amounts=(), bits=()).layers
    layers = Report(Flat(net), (4,), amounts=(), bits=()).layers
    assert [layer.module for layer in layers] == [f"{layer.module}_weight" for layer in expected]
    for one, other in zip(expected, layers, strict=True):
        assert replace(one, module="") == replace(other, module="")


def test_paths_that_start_at_constants_are_told_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 3))
    found = Report(model, (4,), amounts=(), bits=())
    assert found.from_constants > 0.1 and found.from_inputs + found.from_biases + found.from_constants == pytest.approx(1.0)
    assert all(layer.before is None for layer in found.layers)
    norm = pathlift.path_norm(model, (4,))
    constants = 6 * model[2].weight.detach().abs().sum()
    assert found.from_constants == pytest.approx(float(constants) / norm.value, rel=1e-4)
    assert "at constants" in found.html()


def test_past_a_branch_runs_what_does_not_run_through_it(report: Report) -> None:
    branch = {layer.module: layer for layer in report.layers}["branch.0"]
    assert branch.before is not None
    assert 0 < branch.share < branch.before <= 1.0 + 1e-6


@torch.no_grad()
def test_imbalance_is_that_of_the_worst_channel_and_balancing_takes_it_away() -> None:
    model = perceptron()
    first, _ = Report(model, (4,), amounts=(), bits=()).layers
    coming = model[0].weight.double().square().sum(1) + model[0].bias.double().square()
    going = model[2].weight.double().square().sum(0)
    assert first.imbalance == pytest.approx(float(((coming - going).abs() / (coming + going)).max()))
    assert first.imbalance_balanced == pytest.approx(0.0, abs=1e-9)


def test_networks_are_compared_by_kernel_metric_and_accuracy(
    report: Report, model: nn.Module, others: list[dict[str, Tensor]]
) -> None:
    assert report.kernel is not None
    assert report.kernel.cosine.tolist() == pathlift.path_kernel([model, *others], SHAPE).cosine.tolist()
    assert float(report.kernel.cosine[0, 1]) == pytest.approx(1.0) and float(report.kernel.cosine[0, 2]) < 1.0
    assert [each.name for each in report.compared] == [EVIL, "third $"]
    metric = pathlift.path_metric(model, others[1], SHAPE)
    assert (report.compared[1].metric.lower, report.compared[1].metric.upper) == (metric.lower, metric.upper)
    assert report.compared[0].accuracy == report.accuracy
    assert report.compared[1].log10_relative == pytest.approx(metric.log10_upper - report.log10_path_norm)


def test_accuracy_is_that_of_the_model(report: Report, model: nn.Module) -> None:
    x = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert report.accuracy == pytest.approx(float((model(x).argmax(1) == torch.arange(20) % 2).double().mean()))


def test_prices_are_those_of_pruning_and_rounding(report: Report, model: nn.Module) -> None:
    criterion = pathlift.pruning.CRITERIA["relative_path_magnitude"]
    _, pruned = pathlift.prune(model, SHAPE, 0.3, criterion, steps=1)
    (price,) = report.pruning
    assert price.mass_kept == pytest.approx(pruned.mass_kept)
    assert price.log10_relative == pytest.approx(pruned.log10_cost - pruned.log10_path_norm)
    assert price.kept == tuple(tensor.kept / tensor.weights for tensor in pruned.tensors)
    (rounded,) = report.quantisation
    _, found = pathlift.quantize(model, SHAPE, 4, rounding="nearest", range="minmax", moments=0, correction="none")
    assert rounded.bits == 4 and rounded.bytes_after == found.bytes_after < rounded.bytes_before
    assert rounded.errors == tuple(tensor.relative_error for tensor in found.tensors)
    assert rounded.log10_lower <= rounded.log10_upper


def test_what_cannot_be_computed_is_a_note_and_not_silence() -> None:
    found = Report(nn.Sequential(nn.BatchNorm1d(3)).eval(), (3,), amounts=(0.5,), bits=(8,))
    assert found.pruning == found.quantisation == () and len(found.notes) == 2
    text = found.html()
    assert all(note.split(".")[0] in text for note in found.notes)


@pytest.mark.hunt
def test_a_network_without_paths_has_a_page() -> None:
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    found = Report(model, (3,), dict(model.state_dict()), amounts=(0.5,), bits=(8,))
    assert found.log10_path_norm == -math.inf and "NaN" not in found.html()


def test_a_model_outside_the_theory_has_a_page_with_source_lines() -> None:
    found = Report(nn.Sequential(nn.Linear(3, 3), nn.GELU()), (3,))
    text = found.html()
    assert not found.supported and found.problems[0].op == "aten.gelu.default"
    assert "outside the theory" in text and "aten.gelu.default" in text and found.problems[0].where in text


def test_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(pathlift.InputError, match="expected"):
        Report(perceptron(), (4,), data=torch.ones(2, 5), amounts=(), bits=())


def test_wrong_numbers_of_names_are_refused() -> None:
    with pytest.raises(pathlift.InputError, match="names must be 1"):
        Report(perceptron(), (4,), names=("a", "b"))


# ---- the page


class Elements(html.parser.HTMLParser):
    """Reads a page: elements that are open, attributes, and what stands in scripts."""

    EMPTY = ("meta", "link", "img", "br", "wbr", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_a_page_is_whole_and_its_links_lead_somewhere(page: str) -> None:
    read = Elements(page)
    assert not read.open and read.counts["h1"] == 1 and read.counts["svg"] == 9
    names = [value for name, value in read.attributes if name == "id"]
    assert len(set(names)) == len(names)
    targets = [value.removeprefix("#") for name, value in read.attributes if name == "href" and not value.startswith("data:")]
    targets += re.findall(r"url\(#([^)]+)\)", page)
    assert targets and set(targets) <= set(names)


def test_a_page_loads_nothing(page: str) -> None:
    visible = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(r"https?:|//[a-z]|@import|<link|<img|<iframe|\bsrc=", visible)
    assert len(page) < 3_000_000


@pytest.mark.hunt
def test_names_are_words_wherever_they_stand(report: Report, page: str) -> None:
    assert EVIL not in page and page.count("<script") == page.count("</script>") == 2
    assert "&lt;script&gt;alert(1)" in page
    model = nn.Sequential()
    model.add_module(EVIL.replace(".", ""), nn.Linear(2, 2))
    model.add_module("</svg><b>$\\frac$", nn.Linear(2, 2))
    for made in (Report(model, (2,), amounts=(0.5,), bits=(8,)), Report(nn.Sequential(model, nn.GELU()), (2,))):
        text = made.html()
        assert not Elements(text).open and text.count("<script") == 2 and "<b>$" not in text
    for result in (*report.layers, *report.compared, *report.pruning, report):
        assert EVIL not in result._repr_html_()


def test_long_names_break_and_copy_as_they_are() -> None:
    template = '{% from "macros.html" import broken %}{{ broken(name) }}'
    long = "/features/features.0/very_long_name_of_a_node/Conv"
    shown = rendered(template, name=long)
    assert shown.replace("<wbr>", "") == long and max(map(len, shown.split("<wbr>"))) < 12
    assert rendered(template, name="</a&b_c>") == "&lt;/<wbr>a&amp;b_<wbr>c&gt;"


@pytest.mark.hunt
def test_all_numbers_are_in_the_page_as_json(report: Report, page: str) -> None:
    numbers = json.loads(Elements(page).scripts[0])
    assert numbers == report.to_dict() == json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert numbers["layers"][0]["module"] == "stem.0" and numbers["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_page_works_without_scripts_and_in_the_dark_and_on_paper(page: str) -> None:
    without = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert all(word in without for word in ("stem.0", "30 %", "third $", "batch_norm"))
    for rule in ("prefers-color-scheme: dark", "@media print", "currentColor", 'lang="en"', ":focus-visible"):
        assert rule in page
    assert "#010203" not in page


@pytest.mark.hunt
def test_the_same_report_is_the_same_page(small: Report) -> None:
    assert pickle.loads(pickle.dumps(small)).html() == small.html()


def test_a_report_is_a_result(report: Report) -> None:
    for result in (report, report.layers[0], report.scores, report.compared[0], report.pruning[0], report.quantisation[0]):
        assert result is not None
        assert repr(result).startswith(f"{type(result).__name__}(") and len(repr(result)) <= LINE
        assert "<table>" in result._repr_html_()
        assert all(type(value) is float for value in result.scalars().values())
    assert len(report._records()) == len(report.layers) and report.scalars()["log10_path_norm"] == report.log10_path_norm
    with pytest.raises(AttributeError):
        report.title = "another"  # type: ignore[misc]


def test_a_report_draws_its_flow(report: Report) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    ax = figure.Figure().add_subplot()
    assert report.plot(ax) is ax and ax.get_ylabel() == "share of the path-norm"


def test_settings_of_matplotlib_stay_as_they_are(small: Report) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    small.html()
    assert dict(matplotlib.rcParams) == before


# ---- files and the command


@pytest.mark.hunt
def test_a_page_is_not_written_over_another(small: Report, tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    small.save(file)
    with pytest.raises(pathlift.InputError, match="exists already"):
        small.save(file)
    small.save(file, overwrite=True)
    with pytest.raises(pathlift.InputError, match=r"must end in \.html"):
        small.save(tmp_path / "a.txt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.hunt
def test_the_command_writes_a_page_and_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import exact

    monkeypatch.chdir(tmp_path)
    exact.write(tmp_path)
    line = ("report", "exact:net", "--shape", "4", "--weights", "trained.safetensors", "--prune", "0.5", "--bits", "none")
    done = run(*line, "--other", "half.safetensors", "--other", "rescaled.safetensors", "--out", "page.html")
    assert done.code == 0 and "page.html" in done.stdout and not done.stderr
    text = Path("page.html").read_text()
    numbers = json.loads(Elements(text).scripts[0])
    assert numbers["checkpoints"] == ["trained", "half", "rescaled"] and len(numbers["pruning"]) == 1
    assert numbers["command"].startswith("pathlift report exact:net --shape 4") and "exact:net with trained" in text
    again = run(*line, "--out", "page.html")
    assert again.code == 2 and "exists already" in again.stderr and Path("page.html").read_text() == text
    assert run(*line, "--out", "page.html", "--force").code == 0


def test_the_command_writes_a_page_on_a_refused_model_and_says_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("report", "exact:unsupported", "--shape", "4", "--json")
    assert done.code == 1 and json.loads(done.stdout)["supported"] is False
    assert "aten.gelu.default" in Path("report.html").read_text()
