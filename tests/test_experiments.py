"""The lottery experiment: what it trains, that it can be killed anywhere, and how it says what is wrong."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pathlift.errors import InputError
from pathlift.experiments import lottery, report, store, training
from pathlift.experiments.datasets import load
from pathlift.experiments.settings import Lottery
from pathlift.experiments.settings import lottery as settings_of
from pathlift.experiments.sweep import Here, Processes, Ray, backend_of

TINY = settings_of(
    "digits", seeds=1, epochs=3, rewind=1, limit=192, width=4, blocks=(1, 1), levels=(0.5, 0.8), threads=1, samples=32,
    criteria=("magnitude", "path_magnitude", "snip", "wanda"),
)  # fmt: skip
SMALLER = replace(TINY, criteria=("magnitude", "path_magnitude"), levels=(0.6,))


def numbers(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lottery")
    return folder, lottery.run(TINY, folder, Here())


@pytest.mark.hunt
def test_invariant_criteria_choose_the_same_ticket_after_a_rescaling(finished):
    _, rows = finished
    masks = {(row["criterion"], row["rescaled"], row["level"]): row["mask"] for row in rows if row["criterion"] != "dense"}
    for name in TINY.criteria:
        for level in TINY.levels:
            assert (masks[name, False, level] == masks[name, True, level]) == (name != "magnitude")


@pytest.mark.hunt
def test_tickets_start_from_the_rewound_weights_and_keep_their_zeros(finished):
    folder, rows = finished
    files = lottery.Folder(folder)
    digest = next(row["mask"] for row in rows if row["criterion"] == "path_magnitude" and row["level"] == 0.8)
    masks = store.read_checkpoint(files.masks(0) / f"{digest}.pt")
    data = load(TINY)
    model = lottery.build(TINY, data.shape, data.classes, 0)
    model.load_state_dict(store.read_checkpoint(files.dense(0) / "rewind.pt")["model"])
    again = training.Run(TINY, data, 0, folder / "again", masks).launch(model, TINY.rewind)
    assert again == next(row["history"] for row in rows if row.get("mask") == digest)
    parameters = dict(model.named_parameters())
    assert all(not bool(parameters[name][~mask].any()) for name, mask in masks.items())
    assert len(again) == TINY.epochs - TINY.rewind


@pytest.mark.hunt
def test_table_figure_and_file(finished, tmp_path):
    _, rows = finished
    report.figure(rows, TINY.rewind, 0.5, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 1000
    read = list(csv.DictReader(report.as_csv(rows).splitlines()))
    assert len(read) == len(rows) == 1 + 2 * len(TINY.criteria) * len(TINY.levels)
    headers, lines = report.table(rows, "accuracy")
    assert len(lines) == 2 * len(TINY.criteria) and {len(line) for line in lines} == {len(headers)} == {1 + len(TINY.levels)}
    assert report.mean_and_deviation([0.5, 0.7]) == "60.0 ± 14.1"
    assert report.mean_and_deviation([0.5]) == "50.0"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What one process finds that nothing disturbs."""
    return numbers(lottery.run(SMALLER, tmp_path_factory.mktemp("undisturbed"), Here()))


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.hunt
def test_ended_before_or_after_any_write_it_goes_on_to_the_same_numbers(undisturbed, tmp_path, monkeypatch):
    real = store.write
    for index in range(200):
        left = index // 2

        def dying(path: Path, content: bytes, late: bool = bool(index % 2)) -> None:
            nonlocal left
            left -= 1
            if left < 0 and not late:
                raise Killed
            real(path, content)
            if left < 0:
                raise Killed

        monkeypatch.setattr(store, "write", dying)
        shutil.rmtree(tmp_path / "cut", ignore_errors=True) if index == 0 else None
        try:
            rows = numbers(lottery.run(SMALLER, tmp_path / "cut", Here()))
            break
        except Killed:
            continue
    assert rows == undisturbed
    assert index > 8
    assert not list((tmp_path / "cut").rglob("*.partial"))


@pytest.mark.hunt
def test_kill_nine_at_random_moments(tmp_path):
    """In processes of their own, as a user runs it; nothing is lost, counted twice or different."""
    command = [
        sys.executable, "-m", "pathlift", "experiment", "lottery", "--data", "digits", "--out", str(tmp_path), "--seeds", "1",
        "--epochs", "3", "--rewind", "1", "--limit", "192", "--width", "4", "--levels", "0.5", "--threads", "1",
        "--criteria", "magnitude,path_magnitude", "--json",
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        before = len(list(tmp_path.rglob("*.json")))
        deadline = time.monotonic() + 90
        while len(list(tmp_path.rglob("*.json"))) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(float(torch.rand((), generator=generator)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=200)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    settings = Lottery(**{
        key: tuple(v) if isinstance(v, list) else v for key, v in store.read_json(tmp_path / "settings.json").items()
    })
    again = lottery.run(settings, tmp_path / "undisturbed", Here())
    for one, two in zip(rows, csv.DictReader(report.as_csv(again).splitlines()), strict=True):
        assert {key: one[key] for key in one if key != "seconds"} == {key: two[key] for key in two if key != "seconds"}


def test_a_full_disk_keeps_what_was_there(tmp_path):
    store.write(tmp_path / "result.json", b"earlier")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(InputError, match="cannot be written: File too large"):
            store.write(tmp_path / "result.json", b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_bytes() == b"earlier"


def test_damaged_files_are_named(finished, tmp_path):
    folder, _ = finished
    for name, spoil in {
        "seed0/dense/result.json": lambda content: content[:20],
        "seed0/masks.json": lambda _: b"[]",
    }.items():
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(spoil((copy / name).read_bytes()))
        with pytest.raises(InputError, match=r"damaged.*Delete it"):
            lottery.run(TINY, copy, Here())
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder, copy)
    rewind = copy / "seed0" / "dense" / "rewind.pt"
    rewind.write_bytes(rewind.read_bytes()[:200])
    shutil.rmtree(copy / "seed0" / "tickets")
    with pytest.raises(InputError, match=r"rewind.pt' is damaged"):
        lottery.run(TINY, copy, Here())


def test_a_folder_holds_one_experiment_and_one_process(finished):
    folder, rows = finished
    with pytest.raises(InputError, match=r"holds an experiment with epochs = 3, found 4"):
        lottery.run(replace(TINY, epochs=4), folder, Here())
    with store.only_one(folder), pytest.raises(InputError, match="at work"):
        lottery.run(TINY, folder, Here())
    assert lottery.run(TINY, folder, Here()) == rows


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("no data set", {"data": "mnist"}),
        ("epochs must be at least 1", {"data": "digits", "epochs": 0}),
        ("rewind must be", {"data": "digits", "rewind": 12}),
        ("cannot be shared", {"data": "digits", "batch": 63, "devices": 2}),
        ("at least one criterion", {"data": "digits", "criteria": ()}),
        (r"\[0, 1\)", {"data": "digits", "levels": (1.5,)}),
        ("Did you mean 'synflow'", {"data": "digits", "criteria": ("sinflow",)}),
    ],
)
def test_malformed_settings(message, changes):
    with pytest.raises(InputError, match=message):
        settings_of(**changes)


def test_missing_data_and_backends():
    with pytest.raises(InputError, match="--root"):
        load(settings_of("imagenet"))
    with pytest.raises(InputError, match="no folders"):
        load(settings_of("imagenet", root="/nowhere"))
    with pytest.raises(InputError, match="CIFAR-10 is not in"):
        load(settings_of("cifar10", root="/nowhere"))
    with pytest.raises(InputError, match="no backend"):
        backend_of("slurm", 1)
    with pytest.raises(InputError, match="jobs"):
        backend_of("processes", 0)


def test_learning_rates():
    cosine = replace(TINY, epochs=10, warmup=0.1, rate=0.4)
    assert training.rate(cosine, 0.5) == pytest.approx(0.2)
    assert training.rate(cosine, 1.0) == pytest.approx(0.4)
    assert training.rate(cosine, 5.5) == pytest.approx(0.2)
    assert training.rate(cosine, 10.0) == pytest.approx(0.0, abs=1e-9)
    paper = settings_of("imagenet")
    assert [training.rate(paper, epoch) for epoch in (0, 29.9, 30, 60, 85)] == pytest.approx([0.1, 0.1, 0.01, 1e-3, 1e-4])


@pytest.mark.hunt
def test_an_image_folder_takes_the_same_way_as_imagenet(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            (tmp_path / part / kind).mkdir(parents=True)
            for index in range(4):
                pixels = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / kind / f"{index}.png")
    settings = settings_of(
        "imagenet", root=str(tmp_path), model="resnet", width=4, blocks=(1, 1), stem_stride=4, epochs=2, rewind=1, batch=4,
        levels=(0.5,), criteria=("path_magnitude",), accelerator="cpu", milestones=(1,),
    )  # fmt: skip
    rows = lottery.run(settings, tmp_path / "out", Here())
    assert [row["criterion"] for row in rows] == ["dense", "path_magnitude", "path_magnitude"]
    assert rows[1]["mask"] == rows[2]["mask"] and len(rows[1]["history"]) == 1


@pytest.mark.hunt
def test_processes_find_what_one_process_finds(undisturbed, tmp_path):
    assert numbers(lottery.run(SMALLER, tmp_path, Processes(2))) == undisturbed


@pytest.mark.hunt
def test_ray_finds_what_one_process_finds(undisturbed, tmp_path):
    pytest.importorskip("ray")
    backend = Ray()
    try:
        assert numbers(lottery.run(SMALLER, tmp_path, backend)) == undisturbed
    finally:
        backend.ray.shutdown()


@pytest.mark.hunt
def test_an_error_in_a_process_is_the_error_of_the_experiment(tmp_path):
    with pytest.raises(InputError, match="no folders"):
        lottery.run(settings_of("imagenet", root=str(tmp_path / "none")), tmp_path, Processes(2))


@pytest.mark.hunt
def test_two_processes_train_one_network(tmp_path):
    """DDP under torchrun: both ranks go through the same epochs, the first one writes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pathlift",
        "experiment", "lottery", "--data", "digits", "--out", str(tmp_path), "--seeds", "1", "--epochs", "2", "--rewind", "1",
        "--limit", "192", "--width", "4", "--levels", "0.5", "--criteria", "path_magnitude", "--devices", "2", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["criterion"] for row in rows] == ["dense", "path_magnitude", "path_magnitude"]
    assert done.stdout.count('"folder"') == 1
