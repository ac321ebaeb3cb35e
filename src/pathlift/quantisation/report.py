"""What became of each weight tensor, and what it costs: expected, and guaranteed (mathematics §4, §9).

Three kinds of numbers that must not be confused. The expected error is a model of the activations: it ranks and chooses, and
is mostly several times too large, since errors are taken to be alike at all positions. The output change was seen on a few
inputs, where there were data. The path-metric holds for every input (Theorem 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from typing_extensions import override

import pathlift.drawing as drawing
from pathlift.arguments import public
from pathlift.metric.metric import PathMetric
from pathlift.output import Writer, check_outputs, write_outputs
from pathlift.quantisation.files import quantized_writer
from pathlift.quantisation.gauge import GaugeChoice
from pathlift.quantisation.same_grid import SameGrid
from pathlift.quantisation.tensors import QuantizedTensor
from pathlift.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class QuantizeReport(
    Result,
    line=("rounding", "bits", "granularity", "bytes_before", "bytes_after", "expected_output_change", "path_metric"),
    shows=(
        "rounding", "sequential", "granularity", "range", "gauge", "statistics", "bits", "bytes_before", "bytes_after",
        "expected_error", "squared_outputs", "expected_output_change", "output_change", "output_size", "log10_path_norm",
        "path_metric", "batch_norms", "corrected", "tensors",
    ),
    rows=("tensors",),
):  # fmt: skip
    """What was rounded and what it costs.

    Attributes:
        rounding: How.
        sequential: Whether each layer makes up for those below, on data.
        granularity: What has a scale of its own.
        range: How far the grids reach.
        gauge: In which gauge, and how good it is.
        statistics: Where the statistics of the activations came from.
        tensors: What became of each tensor, in the model's order.
        squared_outputs: E‖R‖², the sum of the squares of the outputs, by the model of the activations.
        output_change: Root of the mean square, over some inputs of the data and all outputs, of what quantising changes, in
            the outputs' own units; None without data.
        output_size: The same of the outputs themselves.
        log10_path_norm: log₁₀ ‖Φ(θ)‖₁ of the model.
        path_metric: ‖Φ(θ) − Φ(θ')‖₁ between the model and the quantised one: exact for rounding towards zero, else enclosed.
            The outputs change by at most max(‖x‖_∞, 1) times that where no weight changes its sign (Theorem 4.1);
            `pathlift.lipschitz_bound` is for any.
        batch_norms: Number of batch norms; they are kept in floating point, and none is folded into a weight.
        corrected: Biases and running means that took up the mean of what rounding changes.
        bytes_before: Bytes of all parameters and buffers.
        bytes_after: The same with quantised weights packed to their bits.
    """

    rounding: str
    sequential: bool
    granularity: str
    range: str
    gauge: GaugeChoice
    statistics: str
    tensors: tuple[QuantizedTensor, ...]
    squared_outputs: float
    output_change: float | None
    output_size: float | None
    log10_path_norm: float
    path_metric: PathMetric
    batch_norms: int
    corrected: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    _others: Mapping[str, Tensor]

    @property
    def bits(self) -> float:
        """Bits of a weight, averaged over all that were rounded."""
        weights = sum(tensor.weights for tensor in self.tensors)
        return sum(tensor.weights * tensor.bits for tensor in self.tensors) / weights

    @property
    def expected_error(self) -> float:
        """Sum of the expected errors of all tensors; an estimate that ranks."""
        return math.fsum(tensor.expected_error for tensor in self.tensors)

    @property
    def expected_output_change(self) -> float:
        """Root of the expected error over E‖R‖², both by the model of the activations: an estimate, no bound.

        Mostly two to three times too large; 0 where nothing is expected to change, inf where no output is expected to be
        other than 0.
        """
        if self.expected_error == 0:
            return 0.0
        return math.sqrt(self.expected_error / self.squared_outputs) if self.squared_outputs > 0 else math.inf

    @property
    def integers(self) -> dict[str, Tensor]:
        """Name to integers."""
        return {tensor.name: tensor.integers for tensor in self.tensors}

    @property
    def scales(self) -> dict[str, Tensor]:
        """Name to scales."""
        return {tensor.name: tensor.scale for tensor in self.tensors}

    @property
    def zero_points(self) -> dict[str, Tensor]:
        """Name to zero points."""
        return {tensor.name: tensor.zero_point for tensor in self.tensors}

    @property
    def tolerance(self) -> SameGrid:
        """Every rounding to the same grids: for `certify` and `lipschitz_bound`, of the quantised network or the model."""
        return SameGrid(self.tensors)

    def table(self) -> list[dict[str, object]]:
        """Return one dictionary for each tensor, for a data frame."""
        columns = (
            "name",
            "format",
            "weights",
            "bytes",
            "step",
            "clipped",
            "expected_error",
            "relative_error",
            "path_share",
            "propagated",
        )
        total = self.expected_error
        return [
            {column: getattr(tensor, column) for column in columns}
            | {"share_of_expected_error": tensor.expected_error / total if total > 0 else 0.0}
            for tensor in self.tensors
        ]

    @override
    def _draw(self, ax: drawing.Picture) -> None:
        names = [tensor.name for tensor in self.tensors]
        drawing.bars_by_layer(ax, names, [tensor.relative_error for tensor in self.tensors], "relative error of the weights")
        bits = ax.twinx()
        bits.plot([tensor.bits for tensor in self.tensors], "s", color=drawing.ORANGE, markersize=5)
        bits.set(ylabel="bits of a weight (squares)", ylim=(0, 1.15 * max(tensor.bits for tensor in self.tensors)))

    def __str__(self) -> str:
        """Return a few lines of text."""
        lines = [
            f"{self.rounding}, {self.bits:.3g} bits a weight, {self.granularity}: {self.bytes_before:,} bytes before, "
            f"{self.bytes_after:,} after",
            f"  ‖Φ(θ)‖₁ 10^{self.log10_path_norm:.3f}, path-metric 10^{self.path_metric.log10_lower:.3f} to "
            f"10^{self.path_metric.log10_upper:.3f}",
        ]
        lines += [f"  {tensor.name}: {tensor.format}, {tensor.weights:,} weights" for tensor in self.tensors]
        return "\n".join(lines)

    @public
    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the quantised network to a safetensors file that torchao reads, all or nothing; see `load_quantized`.

        Whole numbers are ``…_weight_qdata``, ``…_weight_scale`` and ``…_weight_zero_point`` with the metadata of
        ``torchao.prototype.safetensors``, everything else under its own name.

        Args:
            path: A file that ends in ``.safetensors``.
            overwrite: Replace a file that exists.

        Raises:
            InputError: The file cannot be written, or exists already.
        """
        path = Path(path)
        check_outputs({"The file": path}, replace=overwrite)
        write_outputs({path: report_writer(self)}, replace=overwrite)


def report_writer(report: QuantizeReport) -> Writer:
    """Return what writes the file of `QuantizeReport.save`."""
    return quantized_writer(report.tensors, report._others)
