"""One report on a network: capture it, ask every room, keep the numbers."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

import pathlift.drawing as drawing
from pathlift.arguments import public
from pathlift.errors import InputError, NumericalError, PathliftError, Problem, UnsupportedModelError
from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.kernel import PathKernel, path_kernel
from pathlift.magnitude import path_magnitude, unit_path_magnitude
from pathlift.norm import PathNorm, path_norm
from pathlift.output import check_outputs, write_outputs
from pathlift.passes.forward import feed_of
from pathlift.precision import without_autocast
from pathlift.pruning import Batch
from pathlift.reading import Inputs, capture
from pathlift.reading.second import Other
from pathlift.report import figures, page
from pathlift.report.costs import Compared, PruningCost, QuantisationCost, accuracy, compared_with, pruned_by, quantised_to
from pathlift.report.findings import Findings
from pathlift.report.layers import LayerShare, Scores, from_biases, histogram, layers_of
from pathlift.rescaling import Symmetries, symmetries
from pathlift.rescaling.gauges import out_of_balance

AMOUNTS = (0.3, 0.5, 0.7)
BITS = (8, 6, 4)
SAMPLES = 400
"""Paths that are sampled for the estimate of each path-metric."""

ROUNDING = 1e-5
"""What shares that add up to 1 may be off by: they are summed in the precision of the model."""

PAGES = (".html", ".htm")


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Report(Findings):
    """What a network is, as numbers and as a page; a model outside the theory has a report as well.

    What it knows is in the attributes of `pathlift.report.findings.Findings`.
    """

    @public
    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module | Network,
        inputs: Inputs | None = None,
        other: Other | Sequence[Other] | None = None,
        *,
        data: Tensor | Batch | None = None,
        until: str | None = None,
        title: str | None = None,
        names: Sequence[str] | None = None,
        amounts: Sequence[float] = AMOUNTS,
        bits: Sequence[int] = BITS,
        samples: int = SAMPLES,
        command: str = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Gather everything; nothing of the model changes.

        Args:
            model: A module, or a captured `Network`. One outside the theory is reported, never raised.
            inputs: As for `capture`; not needed for a Network.
            other: Another network of the same architecture, its state-dict or a file of it; or a list of such, in their order.
            data: Inputs, to quantise by; with classes (`pathlift.pruning.Batch`) also to measure accuracies on.
            until: As for `capture`.
            title: Name of the network; that of its class when None.
            names: Of this network and the others, as many as there are.
            amounts: Shares of the weights that pruning would take; empty to leave it out.
            bits: Bits of a weight that quantisation would leave, 2 to 8; empty to leave it out.
            samples: Paths to sample for an estimate of each path-metric; 0 for none.
            command: What made the report, for the page.
            progress: Called after each step with its number and that of all.

        Raises:
            InputError: An argument is malformed.
            MismatchError: Another network has other parameters.
            NumericalError: A weight is NaN or infinite.
        """
        others = _listed(other)
        if names is not None and len(names) != 1 + len(others):
            raise InputError(f"names must be {1 + len(others)}, of this network and the others; found {len(names)}.")
        named = tuple(names or ("this network", *(_named(each, number) for number, each in enumerate(others, 2))))
        made = title or (type(model).__name__ if isinstance(model, nn.Module) else "a captured network")
        gathered = _Gathering(made, named, command)
        with without_autocast():
            try:
                network = capture(model, inputs, until)
            except UnsupportedModelError as error:
                gathered.problems = error.problems
            else:
                gathered.run(network, others, data, tuple(amounts), tuple(bits), samples, progress)
        vars(self).update(vars(gathered))

    @property
    def parts(self) -> int:
        """Number of modules with weights."""
        return len(self.layers)

    @public
    def html(self) -> str:
        """Return the report as one page that needs nothing else: no network, no scripts.

        Returns:
            HTML.

        Raises:
            InputError: matplotlib is not installed.
        """
        return page.written(self, figures.drawn(self))

    @public
    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Write the page to a file, all or nothing.

        Args:
            path: A file that ends in ``.html``.
            overwrite: Whether a file that is there is replaced.

        Raises:
            InputError: The file cannot be written, or matplotlib is not installed.
        """
        file = Path(path)
        check_outputs({"path": file}, suffixes=PAGES, replace=overwrite)
        text = self.html()
        write_outputs({file: lambda target: target.write_text(text, encoding="utf-8")}, replace=overwrite)

    @override
    def _draw(self, ax: drawing.Picture) -> None:
        figures.flow(self, ax)


def _listed(other: Other | Sequence[Other] | None) -> list[Other]:
    if other is None:
        return []
    return list(other) if isinstance(other, (list, tuple)) else [cast("Other", other)]


def _named(other: Other, number: int) -> str:
    return Path(other).stem if isinstance(other, (str, Path)) else f"network {number}"


class _Gathering:
    """What is known so far."""

    def __init__(self, title: str, checkpoints: tuple[str, ...], command: str) -> None:
        self.title, self.supported = title, False
        self.problems: tuple[Problem, ...] = ()
        self.inputs: tuple[tuple[int, ...], ...] = ()
        self.outputs = self.parameters = self.groups = 0
        self.log10_path_norm = self.from_inputs = self.from_biases = self.from_constants = math.nan
        self.left_off: tuple[str, ...] = ()
        self.layers: tuple[LayerShare, ...] = ()
        self.scores: Scores | None = None
        self.accuracy: float | None = None
        self.checkpoints = checkpoints
        self.kernel: PathKernel | None = None
        self.compared: tuple[Compared, ...] = ()
        self.pruning: tuple[PruningCost, ...] = ()
        self.quantisation: tuple[QuantisationCost, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.command, self.versions = command, page.versions() | {"Python": platform.python_version()}

    def run(
        self,
        network: Network,
        others: Sequence[Other],
        data: Tensor | Batch | None,
        amounts: tuple[float, ...],
        bits: tuple[int, ...],
        samples: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Ask every room."""
        classes = data if isinstance(data, Batch) else None
        x = data.x if isinstance(data, Batch) else data
        if x is not None:
            feed_of(network, x)  # do they fit?
        steps: list[Callable[[], None]] = [
            lambda: self._measure(network),
            lambda: setattr(self, "accuracy", accuracy(network, classes)),
        ]
        if others:
            steps.append(lambda: self._relate(network, others))
            steps += [
                lambda name=name, each=each: self._compare(network, name, each, samples, classes)  # type: ignore[misc]
                for name, each in zip(self.checkpoints[1:], others, strict=True)
            ]
        steps.append(lambda: self._prune(network, amounts, classes))
        if bits:
            steps.append(lambda: self._quantise(network, bits, x, classes))
        for number, step in enumerate(steps, 1):
            step()
            if progress is not None:
                progress(number, len(steps))

    def _measure(self, network: Network) -> None:
        norm = path_norm(network)
        shares = path_magnitude(network)
        self.supported = True
        self.inputs = tuple(tuple(shape[1:]) for shape, _ in network.graph.examples)
        self.outputs = norm.per_output.numel()
        self.parameters = sum(network.state[name].numel() for name in network.parameters)
        self.log10_path_norm, self.left_off = norm.log10, network.left_off
        self.from_inputs, self.from_biases = _share_of_inputs(norm), from_biases(network, shares)
        rest = 1.0 - self.from_inputs - self.from_biases if norm.log10 > -math.inf else 0.0
        self.from_constants = rest if rest > ROUNDING else 0.0
        self.scores = histogram(shares)
        groups = symmetries(network)
        self.groups = len(groups)
        units, imbalances = unit_path_magnitude(network), self._imbalances(groups)
        self.layers = layers_of(network, shares, units, imbalances, self.from_inputs, constants=self.from_constants > 0)

    def _imbalances(self, groups: Symmetries) -> dict[str, tuple[float, float]]:
        """Return the largest imbalance of a channel of each module, as it is and balanced."""
        try:
            factors = groups.balance().factors
        except (InputError, NumericalError) as error:
            self._note("the balanced representative", error)
            return {}
        still = torch.zeros(len(groups), dtype=torch.float64, device="cpu")
        ends = [out_of_balance(groups.network, groups.constraints, logs) for logs in (still, torch.log2(factors))]
        found: dict[str, tuple[float, float]] = {}
        for module in groups.constraints.channels:
            numbers = [group for group in groups.channel_groups(module) if group is not None]
            if numbers:
                found[module] = float(ends[0][numbers].max()), float(ends[1][numbers].max())
        return found

    def _relate(self, network: Network, others: Sequence[Other]) -> None:
        self.kernel = path_kernel([network, *others])

    def _compare(self, network: Network, name: str, other: Other, samples: int, data: Batch | None) -> None:
        self.compared += (compared_with(network, name, other, samples, self.log10_path_norm, data),)

    def _prune(self, network: Network, amounts: tuple[float, ...], data: Batch | None) -> None:
        try:
            self.pruning = pruned_by(network, amounts, data)
        except InputError as error:
            self._note("pruning", error)

    def _quantise(self, network: Network, bits: Sequence[int], x: Samples | None, data: Batch | None) -> None:
        try:
            self.quantisation = quantised_to(network, bits, x, data)
        except (InputError, NumericalError) as error:
            self._note("quantisation", error)

    def _note(self, what: str, error: PathliftError) -> None:
        self.notes += (f"Not computed: {what}. {error}",)


def _share_of_inputs(norm: PathNorm) -> float:
    return 10 ** (norm.log10_input_part - norm.log10) if norm.log10 > -math.inf else 0.0
