"""What reading a model costs, and that the check of what was read refuses none of the covered models (`docs/coverage.md`).

Models have random weights and run on the CPU, where a capture is checked (on the meta device it is not). Printed are the
seconds of a capture, those of one forward pass of the model (batch 1) and their ratio. `--before FOLDER` adds another
version of pathlift (the folder that holds its package), which takes turns with this one in a process of its own; without
it nothing but this version is measured. Small models come first; `--families` takes the smallest of each family of timm.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from support import build, on_meta
from torch import nn

import pathlift
from pathlift.errors import PathliftError

Answer = dict[str, object]
"""What a worker says about one model: `shape`, and `capture` and `forward` in seconds, or `refused`."""


class Worker:
    """A process that measures with one version of pathlift."""

    def __init__(self, package: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env=os.environ | {"PYTHONPATH": str(package)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, key: str, size: int | None) -> Answer:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([key, size]), file=self.process.stdin, flush=True)
        answer: Answer = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work() -> None:
    """Answer questions from the standard input until it ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pathlift.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (3, 8, 8))
    for line in sys.stdin:
        key, size = json.loads(line)
        print(json.dumps(measure(key, size)), flush=True)
        gc.collect()


def measure(key: str, size: int | None) -> Answer:
    torch.manual_seed(0)
    model, shape = build(key)
    assert isinstance(shape, tuple)
    if size is not None:
        shape = (*shape[:-2], size, size)
    x = torch.randn(1, *shape)
    model.eval()
    try:
        with torch.no_grad():
            model(x)
            start = time.perf_counter()
            model(x)
            forward = time.perf_counter() - start
        start = time.perf_counter()
        pathlift.capture(model, shape)
        return {"shape": shape, "capture": time.perf_counter() - start, "forward": forward}
    except PathliftError as error:
        return {"shape": shape, "refused": str(error)}
    except Exception as error:  # a size that the model does not take; or a crash, which this command is to find
        return {"shape": shape, "refused": f"{type(error).__name__}: {error}"}


def supported(page: Path) -> list[str]:
    """Return the models that a page of `support.py` lists as supported."""
    keys = []
    for library, group, names in re.findall(r"^## (\w+): (\w+)\n\nSupported \(\d+\): (.*)\.$", page.read_text(), re.MULTILINE):
        keys += [f"{library}/{group}/{name}" for name in re.findall(r"`(\w+)`", names)]
    return keys


def parameters(key: str) -> int:
    return sum(own.numel() for own in on_meta(key)[0].parameters())


def family(key: str) -> str:
    library, _, name = key.split("/")
    if library != "timm":
        return key
    import timm

    beginning = re.match(r"[a-z_]*?(?=v?\d|$)(v\d)?", name)
    return f"{timm.model_entrypoint(name).__module__} {beginning.group() if beginning else name}"


def smallest_first(keys: list[str], *, families: bool) -> list[str]:
    keys = sorted(keys, key=parameters)
    return list({family(key): key for key in reversed(keys)}.values())[::-1] if families else keys


def row(key: str, answers: dict[str, list[Answer]]) -> tuple[str, dict[str, float]]:
    """Return a line of the table, and the ratio of captures to a forward pass for each version."""
    first = answers["after"][0]
    refused = [f"{version}: {own[0]['refused']}" for version, own in answers.items() if "refused" in own[0]]
    assert isinstance(first["shape"], list)
    cells = [key.removeprefix("torchvision/"), "×".join(map(str, first["shape"]))]
    if refused:
        return "| " + " | ".join([*cells, "REFUSED", *refused]).replace("\n", " ") + " |", {}
    forward = min(float(str(answer["forward"])) for own in answers.values() for answer in own)
    seconds = {version: min(float(str(answer["capture"])) for answer in own) for version, own in answers.items()}
    ratios = {version: own / forward for version, own in seconds.items()}
    cells += [f"{own:.2f}" for own in seconds.values()]
    if "before" in seconds:
        cells.append(f"{seconds['after'] / seconds['before']:.2f}")
        ratios["after / before"] = seconds["after"] / seconds["before"]
    cells += [f"{forward:.3f}", f"{ratios['after']:.0f}"]
    return "| " + " | ".join(cells) + " |", ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="folder with another version of the package")
    parser.add_argument("--only", default="torchvision/", help="only models whose key contains this text")
    parser.add_argument("--page", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--size", type=int, help="height and width of the inputs, where not the model's own")
    parser.add_argument("--rounds", type=int, default=2, help="the fastest counts")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return
    keys = smallest_first([key for key in supported(args.page) if args.only in key], families=args.families)
    packages = {"before": args.before} if args.before else {}
    workers = {version: Worker(own) for version, own in (packages | {"after": Path(pathlift.__file__).parents[1]}).items()}
    columns = ["model", "input", *(f"{version}, s" for version in workers)]
    columns += [*(["after / before"] if args.before else []), "forward, s", "after / forward"]
    print("| " + " | ".join(columns) + " |\n| --- | --- |" + " ---: |" * (len(columns) - 2), flush=True)
    ratios: dict[str, list[float]] = {}
    for key in keys:
        answers: dict[str, list[Answer]] = {version: [] for version in workers}
        for _ in range(args.rounds):
            for version, worker in workers.items():
                answers[version].append(worker.ask(key, args.size))
        line, found = row(key, answers)
        print(line, flush=True)
        for what, ratio in found.items():
            ratios.setdefault(what, []).append(ratio)
    for worker in workers.values():
        worker.close()
    medians = ", ".join(
        f"{what if '/' in what else f'capture {what} / forward'} {statistics.median(own):.2f}" for what, own in ratios.items()
    )
    print(f"\n{len(keys)} models; medians: {medians}")


if __name__ == "__main__":
    main()
