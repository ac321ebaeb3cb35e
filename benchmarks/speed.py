"""Path-norm against a forward pass, path-magnitude against forward+backward: ratios from one run (`make bench`).

All contestants of a network take turns within each round, so that a noisy machine hits them alike. Printed are the ratio
of the minima, and the median ratio with its quartiles. Beside it stand two floors: a product of every weight with a vector,
`torch.mv`, which nothing that multiplies weights can beat, and a plain copy of the weights, which scores are as large as.
`--cpu` counts the time of the process instead of the clock's, for a machine that does other work. `--products` compares ways to
multiply |W| for the linear layers of AlexNet and VGG-16 instead. Capture is timed apart. Peak memory is what each contestant
adds to the process, measured in processes of their own. `--device cuda` runs the same on a GPU, `--batch 128` gives the
model's own passes a batch; the path-norm needs none. `--pathnorm FILE` adds the authors' code (fetched apart), and scores as
SynFlow computes them.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from unet import UNet

import pathlift
from pathlift.edges.contraction import Dense
from pathlift.edges.weights import Bundle, Weights
from pathlift.passes.programs import ALL, PIVOT

CASES = (
    *("resnet18@224", "resnet50@224", "vgg16@224", "alexnet@224", "densenet121@224", "vgg16@512", "resnet18@512"),
    *("unet@1024", "fcn_resnet50@1024"),
)

Runs = dict[str, Callable[[], object]]


def build(name: str, device: str = "cpu") -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    if name == "unet":
        return UNet().eval().to(device)
    options = {"weights_backbone": None} if name.startswith("fcn") else {}
    return torchvision.models.get_model(name, weights=None, **options).eval().to(device)


def split(case: str) -> tuple[str, tuple[int, int, int]]:
    name, _, size = case.partition("@")
    return name, (3, int(size or 224), int(size or 224))


def whole(output: Tensor | dict[str, Tensor]) -> Tensor:
    return (output["out"] if isinstance(output, dict) else output).sum()


def floors(parameters: list[Tensor]) -> Runs:
    matrices = [own.reshape(len(own), -1) if own.dim() > 1 else own.reshape(1, -1) for own in parameters]
    vectors = [torch.rand(own.shape[1], dtype=own.dtype, device=own.device) for own in matrices]
    copies = [torch.empty_like(own) for own in parameters]
    return {
        "torch.mv": lambda: [torch.mv(own, vector) for own, vector in zip(matrices, vectors, strict=True)],
        "copy": lambda: [copy.copy_(own) for copy, own in zip(copies, parameters, strict=True)],
    }


def products(rows: int, columns: int) -> Runs:
    """Ways to multiply the weights of a linear layer: PyTorch's, ours, and what each is measured against."""
    weight, other, x = torch.randn(rows, columns), torch.randn(rows, columns), torch.rand(1, columns)
    g, y, known = torch.rand(1, rows), torch.rand(1, columns), torch.empty(rows, columns)
    weights = Weights((weight,), torch.abs, torch.float32)

    def pair() -> object:
        factors = dict.fromkeys(ALL, 1.0)
        entries = lambda *values: dict(zip(ALL, PIVOT.all(*values), strict=True))  # noqa: E731
        bundle = Bundle((weight, other), ALL, entries, torch.float32, overwrites=True, recipe=PIVOT.recipe)
        return Dense().sums({0: x, 1: y}, bundle, factors)

    return {
        "torch.mv": lambda: torch.mv(weight, x[0]),
        "|W|·a": lambda: Dense().sum(x, weights),
        "|W|·a, |M|·d + (|W|−|M|)·a": pair,
        "copy into given memory": lambda: known.copy_(weight),
        "|W|·a·g and |W|ᵀ·g, new memory": lambda: Dense().adjoint(x, weights, g, below=True, share=True),
    }


def synflow(model: nn.Module, ones: Tensor) -> None:
    """One round of SynFlow by autograd, as its authors do it: |θ| in place of θ, ones, forward, backward, signs back."""
    signs = [own.detach().sign() for own in model.parameters()]
    with torch.no_grad():
        for own in model.parameters():
            own.abs_()
    model.zero_grad(set_to_none=True)
    whole(model(ones)).backward()
    for own, sign in zip(model.parameters(), signs, strict=True):
        if own.grad is not None:
            (own.grad * own).abs_()
        own.detach().mul_(sign)


def contestants(case: str, device: str = "cpu", batch: int = 1, theirs: object | None = None) -> Runs:
    name, shape = split(case)
    model = build(name, device)
    network = pathlift.capture(model, shape)
    x = torch.randn(batch, *shape, device=device)
    parameters = [own.detach() for own in model.parameters()]
    pruned = {
        key: torch.where(own.abs() < own.abs().float().mean() / 2, 0, own) if own.dim() > 1 else own
        for key, own in model.state_dict().items()
    }

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        whole(model(x)).backward()

    runs: Runs = {
        "forward": forward,
        "path-norm": lambda: pathlift.path_norm(network),
        "forward+backward": both,
        "scores": lambda: pathlift.path_magnitude(network),
        "path-metric": lambda: pathlift.path_metric(network, pruned),
        **floors(parameters),
    }
    if theirs is not None:
        other = copy.deepcopy(model)
        runs["SynFlow by autograd"] = lambda: synflow(other, torch.ones(1, *shape, device=device))
        try:
            theirs.compute_path_norm(other, input_shape=shape)  # type: ignore[attr-defined]
        except ValueError:
            return runs  # a model that they refuse
        runs["authors' path-norm"] = lambda: theirs.compute_path_norm(other, input_shape=shape)  # type: ignore[attr-defined]
    return runs


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def race(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    for run in runs.values():
        run()
        if rounds > 5:
            run()
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(seconds(run, clock))
    return times


def capture_seconds(case: str) -> float:
    name, shape = split(case)
    model = build(name)
    pathlift.capture(nn.Linear(2, 2), (2,))
    return seconds(lambda: pathlift.capture(model, shape))


def _peak_kib() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0])


def _peak(args: tuple[str, str]) -> float:
    """Peak resident memory that a contestant adds, in MiB."""
    case, key = args
    name, _ = split(case)
    run = contestants(case)[key]
    with torch.no_grad():  # touch the code first, with small networks
        build(name)(torch.zeros(1, 3, 64, 64))
        small = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(8 * 10 * 10, 8))
        pathlift.path_magnitude(small, (3, 64, 64))
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kib()
    run()
    return (_peak_kib() - before) / 1024


def peaks(case: str) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    keys = ("forward", "path-norm", "forward+backward", "scores")
    with context.Pool(1, maxtasksperchild=1) as pool:
        return dict(zip(keys, pool.map(_peak, [(case, key) for key in keys], chunksize=1), strict=True))


def ratio(times: dict[str, list[float]], one: str, other: str) -> tuple[float, list[float]]:
    rounds = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return min(times[one]) / min(times[other]), statistics.quantiles(rounds, n=4)


def compared(times: dict[str, list[float]], one: str, other: str) -> list[str]:
    best, (low, median, high) = ratio(times, one, other)
    return [f"{best:.2f}", f"{median:.2f} [{low:.2f}, {high:.2f}]"]


def tables(rounds: int, args: argparse.Namespace) -> tuple[Table, Table]:
    title = f"float32, {args.device}, batch {args.batch}, {args.threads} threads, {rounds} interleaved rounds"
    speed = Table(title=title, title_justify="left")
    headers = ("network", "path-norm / forward", "median [quartiles]", "scores / (fwd+bwd)", "median [quartiles]")
    headers += ("metric / norm", "mv, ms", "path-norm / mv", "scores / copy", "capture")
    if args.pathnorm:
        headers += ("authors' path-norm / forward", "SynFlow / (fwd+bwd)")
    memory = Table(title="peak memory added, MiB", title_justify="left")
    for table, names in ((speed, headers), (memory, ("network", "weights", *PEAKS))):
        for header in names:
            table.add_column(header, justify="left" if header == "network" else "right", no_wrap=header == "network")
    return speed, memory


PEAKS = ("forward", "path-norm", "forward+backward", "scores")


def main() -> None:
    from authors import load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="a third of them above 512²")
    parser.add_argument("--networks", nargs="*", default=CASES, help="NAME@SIZE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pathnorm", type=Path, help="the authors' pathnorm.py")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="time of the process; with --threads 1")
    parser.add_argument("--products", action="store_true", help="the linear layers alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=190)
    clock = time.process_time if args.cpu else time.perf_counter
    if args.products:
        for rows, columns in ((4096, 9216), (4096, 25088)):
            with torch.no_grad():
                times = race(products(rows, columns), args.rounds, clock)
            best = {key: f"{1000 * min(several):.1f}" for key, several in times.items()}
            console.print(f"{rows}×{columns}, ms:", *(f"{key} {value};" for key, value in best.items()))
        return
    theirs = load(args.pathnorm) if args.pathnorm else None
    speed, memory = tables(args.rounds, args)
    for case in args.networks:
        large = split(case)[1][1] > 512
        runs = contestants(case, args.device, args.batch, theirs)
        times = race(runs, max(3, args.rounds // 3) if large else args.rounds, clock)
        cells = [*compared(times, "path-norm", "forward"), *compared(times, "scores", "forward+backward")]
        cells += [compared(times, "path-metric", "path-norm")[0], f"{1000 * min(times['torch.mv']):.1f}"]
        cells += [
            compared(times, "path-norm", "torch.mv")[0],
            compared(times, "scores", "copy")[0],
            f"{capture_seconds(case):.2f} s",
        ]
        if theirs is not None:
            known = "authors' path-norm" in times
            cells += [compared(times, "authors' path-norm", "forward")[0] if known else "refused"]
            cells += [compared(times, "SynFlow by autograd", "forward+backward")[0]]
        speed.add_row(case, *cells)
        console.print(case, *cells, style="dim")
        if not args.no_memory and args.device == "cpu":
            weights = sum(own.numel() for own in build(split(case)[0]).parameters()) / 2**18
            memory.add_row(case, f"{weights:.0f}", *(f"{value:.0f}" for value in peaks(case).values()))
        del runs
    console.print(speed)
    if memory.rows:
        console.print(memory)


if __name__ == "__main__":
    main()
