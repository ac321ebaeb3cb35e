"""A study: what its file may say, that it can be killed anywhere, and that its numbers are those of the functions."""

from __future__ import annotations

import html.parser
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import pathlift
from pathlift.errors import InputError
from pathlift.experiments import store
from pathlift.experiments.sweep import Here, Processes, Ray
from pathlift.results import Result
from pathlift.storage.models import save_tensors
from pathlift.study import functions, networks, page, table
from pathlift.study.zoo import read_zoo
from plain import run

pytest.importorskip("yaml")

NETS = """
from torch import nn
def mlp(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
def curved():
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3), nn.GELU(), nn.Linear(3, 3))
def broken():
    raise RuntimeError("no <b>such</b> luck")
"""
ZOO = """
functions:
  - path_norm
  - path_norm: {q: 2}
  - prune: {amount: 0.5, criterion: magnitude}
models:
  - {model: "zoonets:mlp", shape: [4], about: {accuracy: 0.5}}
  - {model: "zoonets:mlp", shape: [4], arguments: {width: 16}, seed: [1, 2]}
  - {model: "zoonets:curved", shape: [4]}
  - {model: "zoonets:broken", shape: [4]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "zoonets.py").write_text(NETS)
    (tmp_path / "zoo.yaml").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> page.Study:
    """What one process finds that nothing disturbs."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "zoonets.py").write_text(NETS)
    (folder / "zoo.yaml").write_text(ZOO)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        subjects = read_zoo(folder / "zoo.yaml")
        return page.Study("zoo", subjects, table.run(subjects, folder / "out", Here()), "pathlift study zoo.yaml")


def zoo(text: str) -> Any:
    Path("zoo.yaml").write_text(text)
    return read_zoo(Path("zoo.yaml"))


def numbers(rows: list[table.Row]) -> list[table.Row]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def test_its_numbers_are_those_of_the_functions(here: Path, study: page.Study) -> None:
    rows = study.rows
    assert [row["outcome"] for row in rows] == ["measured"] * 3 + ["refused", "failed"]
    for row, width, seed in zip(rows, (8, 16, 16), (0, 1, 2), strict=False):
        model = pathlift.load_model("zoonets:mlp", arguments={"width": width}, generator=seed)
        norm = pathlift.path_norm(model, (4,), q=2)
        assert row["path_norm(q=2)/log10"] == norm.log10 and row["seed"] == seed and row["depth"] == 2
        report = pathlift.prune(model, (4,), 0.5, "magnitude")[1]
        assert row["prune(amount=0.5, criterion=magnitude)/mass_kept"] == report.mass_kept
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert rows[0]["about/accuracy"] == 0.5 and "about/accuracy" not in rows[1]
    assert rows[3]["operators"] == "gelu ×2" and rows[3]["reason"] and "path_norm/log10" not in rows[3]
    assert rows[4]["reason"] == "'zoonets:broken' cannot be built: RuntimeError: no <b>such</b> luck"


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.hunt
def test_killed_before_or_after_any_write_it_goes_on_to_the_same_numbers(
    here: Path, study: page.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = read_zoo(here / "zoo.yaml")
    asked: list[str] = []
    real, numbers_of = store.write, functions.Call.numbers
    monkeypatch.setattr(functions.Call, "numbers", lambda call, network: asked.append(call.label) or numbers_of(call, network))
    late = False

    def dying(path: Path, content: bytes) -> None:
        nonlocal late
        late = not late
        if path.parent.name == "networks" and late:
            raise Killed
        real(path, content)
        if path.parent.name == "networks":
            raise Killed

    monkeypatch.setattr(store, "write", dying)
    deaths = 0
    while any(networks.left(subject, here / "out") for subject in subjects[:-1]):
        with pytest.raises(Killed):
            table.run(subjects[:-1], here / "out", Here())
        deaths += 1
    monkeypatch.setattr(store, "write", real)
    assert deaths >= 10 and len(asked) < 2 * deaths
    before = len(asked)
    assert numbers(table.run(subjects, here / "out", Here())) == numbers(study.rows) and len(asked) == before


@pytest.mark.hunt
def test_what_is_added_is_all_that_is_computed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.run(read_zoo(here / "zoo.yaml"), here / "out", Here())
    more = zoo(ZOO.replace("  - path_norm\n", "  - path_norm\n  - symmetries\n"))
    numbers_of, asked = functions.Call.numbers, []
    monkeypatch.setattr(functions.Call, "numbers", lambda call, network: asked.append(call.label) or numbers_of(call, network))
    rows = table.run(more, here / "out", Here())
    assert asked == ["symmetries"] * 3 and rows[1]["symmetries/dimension"] == 16 and rows[1]["path_norm/log10"] is not None


@pytest.mark.hunt
def test_another_file_of_weights_is_another_network(here: Path) -> None:
    text = "functions: [path_norm]\nmodels: [{model: 'zoonets:mlp', shape: [4], weights: w}]\n"
    Path("w").mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        save_tensors(pathlift.load_model("zoonets:mlp", generator=seed).state_dict(), Path(f"w/{name}.safetensors"))
    first = table.run(zoo(text), here / "out", Here())
    assert [row["weights"] for row in first] == ["w/a.safetensors", "w/b.safetensors"] and first[0]["seed"] is None
    save_tensors(pathlift.load_model("zoonets:mlp", generator=3).state_dict(), Path("w/a.safetensors"))
    second = table.run(zoo(text), here / "out", Here())
    assert second[0]["path_norm/log10"] != first[0]["path_norm/log10"] and second[1] == first[1]


@pytest.mark.hunt
def test_a_function_that_refuses_a_network_says_why(here: Path) -> None:
    save_tensors({"x": torch.rand(3, 5)}, Path("data.safetensors"))
    calls = "functions: [path_norm, {certify: {x: data.safetensors, radius: 0.1}}]\n"
    (row,) = table.run(zoo(f"{calls}models: [{{model: 'zoonets:mlp', shape: [4]}}]\n"), here / "out", Here())
    assert row["outcome"] == "measured" and row["path_norm/log10"] is not None
    assert "do not fill the input shape" in row["certify(x=data.safetensors, radius=0.1)/reason"]
    save_tensors({"x": torch.rand(3, 4)}, Path("data.safetensors"))
    (row,) = table.run(zoo(f"{calls}models: [{{model: 'zoonets:mlp', shape: [4]}}]\n"), here / "out", Here())
    assert 0 <= row["certify(x=data.safetensors, radius=0.1)/share"] <= 1


NORM = "functions: [path_norm]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the keys functions, models; found None"),
        ("functions: [path_norm]", "the key 'models' is missing"),
        ("functions: [a: {]", "is no YAML"),
        ("functions: [path_norm]\nmodel: [a:b]", "there is no key 'model'. Did you mean 'models'?"),
        ("functions: [path_norm]\nfunctions: [prune]\nmodels: [a:b]", "line 1: the key 'functions' is there twice"),
        ("functions: []\nmodels: [a:b]", "functions must be a list that is not empty"),
        ("functions: [path_nrom]\nmodels: [a:b]", "there is no function 'path_nrom'. Did you mean 'path_norm'?"),
        ("functions: [path_norm: {p: 2}]\nmodels: [a:b]", "path_norm has no option 'p'."),
        ("functions: [path_norm: {q: 0.5}]\nmodels: [a:b]", "q of path_norm must be"),
        ("functions: [path_norm: {q: two}]\nmodels: [a:b]", "q of path_norm must be"),
        ("functions: [path_norm: {inputs: [4]}]\nmodels: [a:b]", "path_norm has no option 'inputs'"),
        ("functions: [path_metric]\nmodels: [a:b]", "path_metric needs the option 'other'"),
        ("functions: [path_metric: {other: none.pt}]\nmodels: [a:b]", "other of path_metric must be a file"),
        ("functions: [certify: {x: none.pt}]\nmodels: [a:b]", "There is no file 'none.pt'"),
        ("functions: [certify: {x: 3}]\nmodels: [a:b]", "x of certify must be digits"),
        ("functions: [path_norm, path_norm]\nmodels: [a:b]", "path_norm is there twice"),
        ("functions: [[path_norm]]\nmodels: [a:b]", "expected a function"),
        (f"{NORM}models: [3]", "model 1: expected the keys model"),
        (f"{NORM}models: ['zoonets:mlp', {{weight: a}}]", "model 2: there is no key 'weight'. Did you mean 'weights'?"),
        (f"{NORM}models: [{{weights: a}}]", "model 1: the key 'model' is missing"),
        (f"{NORM}models: [{{model: 'zoonets:mlp', weights: none.pt}}]", "there is no file 'none.pt'"),
        (f"{NORM}models: [{{model: 'zoonets:mlp', shape: [0]}}]", "shape must be a list of positive whole numbers"),
        (f"{NORM}models: [{{model: 'zoonets:mlp', shape: 4}}]", "shape must be a list"),
        (f"{NORM}models: [{{model: 'zoonets:mlp', seed: -1}}]", "seed must be a whole number"),
        (f"{NORM}models: [{{model: 'zoonets:mlp', seed: 1, weights: zoo.yaml}}]", "seed has no effect beside weights"),
        (f"{NORM}models: [{{model: 'zoonets:mlp', key: a}}]", "key has no effect without weights"),
        (f"{NORM}models: [{{model: 'zoonets:mlp', about: {{year: [1]}}}}]", "about: 'year' must be a number or a word"),
        (f"{NORM}models: [{{model: 'zoonets:mlp', about: {{year: 2020-01-01}}}}]", "about: 'year' must be a number or a word"),
        (f"{NORM}models: ['zoonets:mlp', 'zoonets:mlp']", "model 2: 'zoonets:mlp' is there twice"),
        (f"{NORM}models: ['torchvision:resnet81']", "torchvision has no model 'resnet81'. Did you mean"),
        (f"{NORM}models: ['torchvision:zzz*']", "torchvision has no model that 'zzz*' fits"),
        (f"{NORM}models: ['zoonets:*']", "a * stands for models of torchvision or timm only"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_one_sentence_with_its_place(text: str, message: str, here: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(InputError) as refused:
        zoo(text)
    said = str(refused.value)
    assert said.startswith("'zoo.yaml'") and message in said and "\n" not in said


def test_a_star_and_a_list_of_seeds_are_many_networks(here: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    named = [subject.name for subject in zoo(f"{NORM}models: ['torchvision:vgg*_bn', {{model: 'a:b', seed: [0, 7]}}]")]
    assert named == [f"torchvision:{name}" for name in models.list_models(include="vgg*_bn")] + ["a:b", "a:b (seed 7)"]


def test_every_function_of_a_model_is_in_the_catalogue_or_has_a_reason_not_to_be() -> None:
    apart = {"align", "check_support", "path_lifting"}  # gives weights; is in every row; for tiny networks
    rooms = ("public", "consequences", "lipschitz", "metric", "pruning", "quantisation", "rescaling", "statistics")
    numbers: set[str] = set()
    for room in rooms:
        module = import_module(f"pathlift.{room}")
        for name in module.__all__:
            function = inspect.unwrap(getattr(module, name)) if inspect.isfunction(getattr(module, name)) else None
            if function is not None and next(iter(inspect.signature(function).parameters), "") == "model":
                kind = eval(function.__annotations__["return"], vars(import_module(function.__module__)))
                numbers |= {name} if isinstance(kind, type) and issubclass(kind, (Result, float)) else set()
    assert numbers - apart == set(functions.FUNCTIONS) - {"prune", "quantize"}  # which return a network beside it
    assert apart <= numbers


# ---- the table and the page


def test_the_table_has_every_number(study: page.Study, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [dict(row) for row in study.rows]
    rows[0]["about/year"], rows[1]["about/year"] = 2016, "unknown"
    table.write_parquet(rows, tmp_path / "t.parquet")
    read = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert [row["about/year"] for row in read] == ["2016", "unknown", None, None, None]
    for row, back in zip(rows, read, strict=True):
        assert {name: back[name] for name in row if name != "about/year"} == {n: v for n, v in row.items() if n != "about/year"}


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]


@pytest.mark.hunt
def test_the_page_is_whole_and_safe(study: page.Study) -> None:
    pytest.importorskip("matplotlib")
    text = page.written(study)
    read = Page()
    read.feed(text)
    assert read.tags.count("svg") == 6 and "<b>such" not in text
    assert all(address.startswith("#") for address in read.addresses)
    assert "no &lt;b&gt;such&lt;/b&gt; luck" in text and "gelu ×2" in text and "zoonets:mlp (seed 2)" in text


def test_a_rank_correlation_is_that_of_the_ranks() -> None:
    assert page.rank_correlation([(1, 10), (2, 100), (3, 1000)]) == pytest.approx(1)
    assert page.rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    ties = page.rank_correlation([(1, 1), (1, 2), (2, 3), (3, 3)])
    x, y = torch.tensor([1.5, 1.5, 3, 4]), torch.tensor([1, 2, 3.5, 3.5])
    assert ties == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))


# ---- the command, and where it runs


@pytest.mark.parametrize(
    "options",
    [
        ("--cluster", "slurm"), ("--jobs", "0"), ("--address", "auto"), ("--cluster", "ray", "--jobs", "2"),
        ("--out", "zoonets.py"), ("--out", "."),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_option_is_one_sentence(options: tuple[str, ...], here: Path) -> None:
    pytest.importorskip("pyarrow")
    done = run("study", "zoo.yaml", *options)
    assert done.code == 2 and done.stderr.startswith("pathlift: ") and done.stderr.count("\n") == 1, done
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["zoo.yaml", "zoonets.py"]


def test_without_pyarrow_it_says_which_extra_to_install(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    done = run("study", "zoo.yaml")
    assert done.code == 2 and "pip install 'pathlift[study]'" in done.stderr and not (here / "study").exists()


@pytest.mark.hunt
@pytest.mark.parametrize("where", ["processes", "ray"])
def test_processes_and_ray_find_what_one_process_finds(
    where: str, here: Path, study: page.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, expected = read_zoo(here / "zoo.yaml"), numbers(study.rows)
    if where == "processes":
        assert numbers(table.run(subjects, here / "processes", Processes(2), threads=1)) == expected
        return
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(here), prepend=":")
    backend = Ray()
    try:
        assert numbers(table.run(subjects, here / "ray", backend, threads=1)) == expected
    finally:
        backend.ray.shutdown()


def test_a_picture_has_no_more_groups_than_it_tells_apart() -> None:
    models = [
        "timm:a",
        "timm:b",
        "torchvision:a",
        "torchvision:b",
        "lite.nets:A",
        "lite.others:B",
        "one:f",
        "two:f",
        "c:/a.onnx",
        "b.pt2",
    ]
    rows = [{"model": model, "depth": 1, "number": 2.0} for model in models]
    groups = page.points(rows, "depth", "number")
    assert {name: len(pairs) for name, pairs in groups.items()} == {"timm": 2, "torchvision": 2, "lite": 2, "others": 4}
    assert set(page.points(rows[-2:], "depth", "number")) == {"files"}
