"""All that a report has to say, as numbers and words."""

from __future__ import annotations

from dataclasses import dataclass

from pathlift.errors import Problem
from pathlift.kernel import PathKernel
from pathlift.report.costs import Compared, PruningCost, QuantisationCost
from pathlift.report.layers import LayerShare, Scores
from pathlift.results import Result


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Findings(Result, line=("title", "supported", "parameters", "log10_path_norm", "problems"), rows=("layers",)):
    """What a report says of a network; of a model outside the theory, `problems` and nothing else.

    Attributes:
        title: Name of the network.
        supported: Whether the model lies inside the theory.
        problems: Every reason why not.
        inputs: Shapes of the inputs, without the batch dimension.
        outputs: Number of output neurons.
        parameters: Number of parameters.
        log10_path_norm: log₁₀ ‖Φ(θ)‖₁; NaN where nothing is known.
        from_inputs: Share of it whose paths start at inputs.
        from_biases: Share of it whose paths start at biases.
        from_constants: Share of it whose paths start at constants, such as the 6 of ReLU6.
        left_off: Activations at the end that are no part of the network.
        layers: What there is to say of each module with weights, from the inputs to the outputs.
        scores: Histogram of the path-magnitudes of all weights.
        groups: Number of rescaling groups.
        accuracy: On the data, when there are some with classes.
        checkpoints: Names of this network and of the others.
        kernel: Cosines and distances of their path-liftings.
        compared: How far each of the others is.
        pruning: What pruning would cost.
        quantisation: What quantisation would cost.
        notes: What could not be computed, and why.
        command: The command line that made the report.
        versions: Of the packages that computed it.
    """

    title: str
    supported: bool
    problems: tuple[Problem, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: int
    parameters: int
    log10_path_norm: float
    from_inputs: float
    from_biases: float
    from_constants: float
    left_off: tuple[str, ...]
    layers: tuple[LayerShare, ...]
    scores: Scores | None
    groups: int
    accuracy: float | None
    checkpoints: tuple[str, ...]
    kernel: PathKernel | None
    compared: tuple[Compared, ...]
    pruning: tuple[PruningCost, ...]
    quantisation: tuple[QuantisationCost, ...]
    notes: tuple[str, ...]
    command: str
    versions: dict[str, str]
