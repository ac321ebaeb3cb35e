"""Share of inputs certified and CPU seconds, beside auto_LiRPA on the same networks and sets (`benchmarks/certificates.py`).

Networks: ReLU perceptrons and a convolutional network with batch norm on scikit-learn's digits, a convolutional network
with batch norm on Fashion-MNIST (where Debian's package dataset-fashion-mnist is installed). ``--lirpa PATH`` names a
checkout of Verified-Intelligence/auto_LiRPA, which is not part of this project; it takes weight perturbations of linear
layers only. Interval arithmetic alone, on the same set, is what bounds over all quantised networks do (Dang et al., AISTATS
2025). ``attacked`` is the share of inputs whose class a sign-gradient search changed within the set: no method can
certify more than the rest.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pathlift
from pathlift import Relative, Rounding
from pathlift.certification import Tolerance
from pathlift.certification.certificates import box_of
from pathlift.certification.logits import logits_of
from pathlift.passes.enclosure import Enclosure
from pathlift.passes.forward import feed_of, forward
from pathlift.passes.rounding import Arithmetic
from pathlift.storage.data import FASHION_MNIST, load_data

SETS: tuple[tuple[str, Tolerance | None, float], ...] = (
    ("12 bits", Rounding(12), 0.0),
    ("10 bits", Rounding(10), 0.0),
    ("8 bits", Rounding(8), 0.0),
    ("±0.5 %", Relative(0.005), 0.0),
    ("±1 %", Relative(0.01), 0.0),
    ("±2 %", Relative(0.02), 0.0),
    ("radius 0.005", None, 0.005),
    ("radius 0.01", None, 0.01),
    ("radius 0.02", None, 0.02),
)


@dataclass(frozen=True)
class Subject:
    """A trained network and its test inputs."""

    name: str
    model: nn.Module
    x: Tensor
    accuracy: float


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for below, above in itertools.pairwise(widths):
        layers += [nn.Linear(below, above), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(size: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for below, above, step in ((1, 8, stride), (8, 16, 2), (16, 16, 1)):
        layers += [nn.Conv2d(below, above, 3, step, 1, bias=False), nn.BatchNorm2d(above), nn.ReLU()]
        size = (size + step - 1) // step
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * size * size, 10))


def trained(name: str, model: nn.Module, data: tuple[Tensor, Tensor], train: int, epochs: int, samples: int) -> Subject:
    x, y = data
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, test = order[:train], order[train:]
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(epochs):
        for batch in fit[torch.randperm(len(fit))].split(32):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x[test]).argmax(1) == y[test]).double().mean())
    return Subject(name, model, x[test][:samples], accuracy)


def subjects(samples: int, only: str) -> list[Subject]:
    torch.manual_seed(0)
    flat, y = load_data("digits", (64,))
    assert y is not None
    images = flat.reshape(-1, 1, 8, 8)
    widths = ((64, 64, 10), (64, 64, 64, 10), (64, 128, 128, 128, 10))
    plans = [("digits " + "-".join(map(str, w)), perceptron(*w), (flat, y), 1297, 30, samples) for w in widths]
    plans.append(("digits conv+BN", convolutional(8, 1), (images, y), 1297, 15, samples))
    if FASHION_MNIST.is_dir():
        photos, labels = load_data("fashion-mnist", (1, 28, 28))
        assert labels is not None
        plans.append(("Fashion-MNIST conv+BN", convolutional(28, 2), (photos, labels), 8000, 6, min(samples, 100)))
    return [trained(*plan) for plan in plans if only in plan[0]]


def timed(run: Callable[[], float | None]) -> tuple[float | None, float]:
    start = time.process_time()
    found = run()
    return found, time.process_time() - start


def one_by_one(network: pathlift.Network, x: Tensor, tolerance: Tolerance | None, radius: float, splits: int) -> str:
    """Return the certified share, and the median and the largest seconds of single inputs, as a cell."""
    runs = [
        timed(lambda: pathlift.certify(network, one, tolerance, radius, splits=splits).share)  # noqa: B023
        for one in x.split(1)
    ]
    share, seconds = sum(found or 0.0 for found, _ in runs) / len(runs), sorted(time for _, time in runs)
    middle, mean = seconds[len(seconds) // 2], sum(seconds) / len(seconds)
    return f"{share:.1%} (median {middle:.2f} s, mean {mean:.2f}, max {seconds[-1]:.1f})"


def intervals(network: pathlift.Network, x: Tensor, tolerance: Tolerance | None, radius: float) -> float:
    """Return the share that interval arithmetic alone certifies: one logit at its lowest above all others at their highest."""
    feed = feed_of(network, x)
    enclosure = Enclosure(network, box_of(network, tolerance), feed, radius, Arithmetic(network), refine=False)
    logits = enclosure.intervals[logits_of(network)]
    low, high = logits.low.flatten(1), logits.high.flatten(1)
    predicted = forward(network, network.values(), feed, torch.float64)[logits_of(network)].flatten(1).argmax(1, keepdim=True)
    above = low.gather(1, predicted) - high.scatter(1, predicted, -torch.inf).amax(1, keepdim=True)
    return float((above > 0).double().mean())


def lirpa(subject: Subject, tolerance: Tolerance | None, radius: float) -> float | None:
    """The certified share by auto_LiRPA's CROWN; None where it does not take the set."""
    import numpy as np
    from auto_LiRPA import BoundedModule, BoundedParameter, BoundedTensor
    from auto_LiRPA.perturbations import PerturbationLpNorm

    class WeightBox(PerturbationLpNorm):  # type: ignore[misc]
        """An elementwise interval of a weight: the library's own takes the first axis of a weight for the batch."""

        def concretize_matrix(self, x: Tensor, rows: Tensor, sign: float, constraints: None = None) -> Tensor:
            middle, reach = (self.x_L + self.x_U).reshape(-1) / 2, (self.x_U - self.x_L).reshape(-1) / 2
            if not isinstance(rows, Tensor):  # the identity
                return (middle + sign * reach)[None]
            rows = rows.reshape(*rows.shape[:2], -1)
            return rows @ middle + sign * (rows.abs() @ reach)

    model, x = copy.deepcopy(subject.model), subject.x
    if tolerance is not None:
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            return None
        network = pathlift.capture(subject.model, x[:1])
        for name, (low, high) in tolerance.intervals(network).items():
            module = model.get_submodule(name.rpartition(".")[0])
            ball = WeightBox(norm=np.inf, eps=0.0, x_L=low.float(), x_U=high.float())
            setattr(module, name.rpartition(".")[2], BoundedParameter(getattr(module, name.rpartition(".")[2]).data, ball))
    options = {"sparse_intermediate_bounds": tolerance is None}
    bounded = BoundedModule(model, torch.zeros_like(x), device="cpu", bound_opts=options)
    inputs = BoundedTensor(x, PerturbationLpNorm(norm=np.inf, eps=radius))
    predicted = bounded(inputs).argmax(1)
    eye = torch.eye(10)
    rows = (eye[predicted].unsqueeze(1) - eye)[predicted.unsqueeze(1) != torch.arange(10)].view(len(x), 9, 10)
    low, _ = bounded.compute_bounds(x=(inputs,), C=rows, method="CROWN", bound_upper=False)
    return float((low.amin(1) > 0).double().mean())


def _limited(args: tuple[Subject, Tolerance | None, float, int, list[str]]) -> tuple[float | None, float] | str:
    """Run the peer in a process of its own with a memory limit; its second run counts, as the first one sets things up."""
    subject, tolerance, radius, gigabytes, path = args
    sys.path[:0] = path
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    warnings.simplefilter("ignore")
    try:
        lirpa(subject, tolerance, radius)
        return timed(lambda: lirpa(subject, tolerance, radius))
    except (RuntimeError, MemoryError) as error:
        if "memory" in str(error) or isinstance(error, MemoryError):
            return f"over {gigabytes} GiB"
        raise


def peer(subject: Subject, tolerance: Tolerance | None, radius: float, path: str | None) -> tuple[float | None, float] | str:
    if path is None:
        return (None, 0.0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_limited, ((subject, tolerance, radius, 16, path.split(":")),))


def cell(found: tuple[float | None, float] | str) -> str:
    if isinstance(found, str):
        return found
    return "–" if found[0] is None else f"{found[0]:.1%} ({found[1]:.2f} s)"


def pairs(subject: Subject, splits: int, console: Console) -> None:
    """Tell on which inputs quantised copies provably agree with the network they were made of, over balls of inputs."""
    title = f"{subject.name}, {len(subject.x)} test inputs: a quantised copy and its original give one class on the whole ball"
    table = Table(title=title, title_justify="left")
    for header in ("bits", "radius", "certified", "at most (attack)", "median difference", "seconds an input"):
        table.add_column(header, justify="right")
    for bits in (8, 6):
        copied, _ = pathlift.quantize(subject.model, subject.x[:1], bits)
        for radius in (0.0, 0.005, 0.01):
            start = time.process_time()
            certificate = pathlift.certify(subject.model, subject.x, copied, radius, splits=splits)
            seconds = (time.process_time() - start) / len(subject.x)
            searches = [pathlift.attack(subject.model, subject.x, other, radius).changed for other in (copied, None)]
            most = 1 - float((searches[0] | searches[1]).double().mean())
            assert certificate.difference is not None
            row = (f"{certificate.share:.0%}", f"{most:.0%}", f"{float(certificate.difference.median()):.3f}", f"{seconds:.2f}")
            table.add_row(str(bits), f"{radius:g}", *row)
    console.print(table)


def resnet(seconds: float, console: Console) -> None:
    """Bound how far the margin of a ResNet-18 of CIFAR size can shrink, whatever that says, within a time limit."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    with torch.no_grad():
        for _ in range(10):  # running means and variances
            model(torch.randn(16, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    network = pathlift.capture(model.eval(), x)
    table = Table(title=f"ResNet-18, 3×32×32, random weights, one input, seconds={seconds:g}", title_justify="left")
    for header in ("set", "margin", "bound", "seconds", "peak GiB"):
        table.add_column(header, justify="left" if header == "set" else "right")
    for name, tolerance, radius in (("radius 1e-4", None, 1e-4), ("±0.01 %", Relative(1e-4), 0.0)):
        start, clock = time.process_time(), time.monotonic()
        certificate = pathlift.certify(network, x, tolerance, radius, seconds=seconds)
        spent = f"{time.process_time() - start:.0f} of CPU, {time.monotonic() - clock:.0f} on the wall"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        table.add_row(name, f"{float(certificate.margin):.2g}", f"{float(certificate.bound):.2g}", spent, f"{peak:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--lirpa", help="a checkout of auto_LiRPA, and folders of packages it needs, joined by colons")
    parser.add_argument("--no-attack", action="store_true")
    parser.add_argument("--single", action="store_true", help="one input at a time, with the seconds of each")
    parser.add_argument("--splits", type=int, default=0, help="cut the set of an input at kinks so many times, at most")
    parser.add_argument("--pairs", action="store_true", help="quantised copies against their originals instead")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--sets", nargs="+", choices=[name for name, *_ in SETS], help="these sets alone")
    parser.add_argument("--resnet", type=float, metavar="SECONDS", help="a ResNet-18 of CIFAR size instead, with a time limit")
    args = parser.parse_args()
    console = Console(width=140)
    if args.resnet is not None:
        resnet(args.resnet, console)
        return
    for subject in subjects(args.samples, args.only):
        if args.pairs:
            pairs(subject, args.splits, console)
            continue
        network = pathlift.capture(subject.model, subject.x[:1])
        pathlift.certify(network, subject.x[:2], Relative(0.5), 0.1)  # touch the code first
        title = f"{subject.name}, accuracy {subject.accuracy:.1%}, {len(subject.x)} test inputs"
        table = Table(title=title, title_justify="left")
        for header in ("set", "pathlift", "intervals", "auto_LiRPA", "at most (attack)"):
            table.add_column(header, justify="left" if header == "set" else "right")
        ours: tuple[float | None, float] | str
        for name, tolerance, radius in SETS:
            if args.sets and name not in args.sets:
                continue
            if args.single:
                ours = one_by_one(network, subject.x, tolerance, radius, args.splits)
            else:
                run = functools.partial(pathlift.certify, network, subject.x, tolerance, radius, splits=args.splits)
                ours = timed(lambda: run().share)  # noqa: B023
            theirs = peer(subject, tolerance, radius, args.lirpa)
            most = (
                None
                if args.no_attack
                else 1 - float(pathlift.attack(network, subject.x, tolerance, radius).changed.double().mean())
            )
            plain = timed(functools.partial(intervals, network, subject.x, tolerance, radius))
            table.add_row(name, cell(ours), cell(plain), cell(theirs), "–" if most is None else f"{most:.1%}")
        console.print(table)
    console.print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
