"""Capture a model once as a `Network`: freeze, export, lower by the operators' rules (SPEC §1).

The user's module is only read. A model outside the theory is refused before any number is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pathlift.errors import InputError, Problem, UnsupportedModelError
from pathlift.network import Network
from pathlift.reading.examples import Inputs, example_tensors
from pathlift.reading.export import export_graph
from pathlift.reading.freeze import frozen_view
from pathlift.reading.lower import Lowered, lower


@dataclass(frozen=True)
class SupportReport:
    """Whether a model lies inside the theory, and every reason why not.

    Attributes:
        supported: True when `capture` succeeds.
        problems: Every operator outside the theory, in the order of execution; empty when supported.
        operators: Number of operator calls that were looked at.
    """

    supported: bool
    problems: tuple[Problem, ...]
    operators: int

    def __bool__(self) -> bool:
        """Return `supported`."""
        return self.supported

    def __str__(self) -> str:
        """Return one line per problem."""
        if self.supported:
            return f"supported ({self.operators} operators)"
        return "not supported:\n" + "\n".join(f"  - {problem}" for problem in self.problems)


def _lowered(model: nn.Module, inputs: Inputs) -> Lowered:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
    examples = example_tensors(model, inputs)
    view = frozen_view(model)
    return lower(export_graph(view, examples), view, examples)


def capture(model: nn.Module | Network, inputs: Inputs | None = None) -> Network:
    """Capture a model as a typed, immutable graph of neurons.

    Works for any model that `torch.export` can trace and whose operators all have a rule. The model is traced in eval
    mode on a frozen view; the model itself is not changed. The result shares the parameters' memory with the model.

    Args:
        model: Any module; a Network is returned as it is.
        inputs: An input shape without the batch dimension, such as ``(3, 224, 224)``, or an example tensor with it, or a
            tuple of either for a model with several inputs.

    Returns:
        The network. Every function of pathlift accepts it in place of ``(model, inputs)``.

    Raises:
        UnsupportedModelError: An operator lies outside the theory, or the exporter cannot capture the model; every
            problem is listed with module, operator, source line and advice.
        InputError: ``inputs`` is malformed, or the model cannot run on such an input.

    Example:
        >>> from torch import nn
        >>> capture(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), (2,))
        Network(4 nodes, 4 weight tensors, 4 parameters)
    """
    if isinstance(model, Network):
        return model
    if inputs is None:
        raise InputError("inputs is missing: give an input shape such as (3, 224, 224), or an example tensor.")
    lowered = _lowered(model, inputs)
    if lowered.network is None:
        raise UnsupportedModelError(lowered.problems)
    return lowered.network


def check_support(model: nn.Module, inputs: Inputs) -> SupportReport:
    """Tell whether a model lies inside the theory; list every operator that does not.

    Needs no weights: a model on the meta device will do.

    Args:
        model: Any module.
        inputs: As for `capture`.

    Returns:
        The report. An unsupported model is reported, never raised.

    Raises:
        InputError: ``inputs`` is malformed, or the model cannot run on such an input.

    Example:
        >>> from torch import nn
        >>> report = check_support(nn.Sequential(nn.Linear(2, 3), nn.GELU()), (2,))
        >>> report.supported, report.problems[0].op, report.problems[0].module
        (False, 'aten.gelu.default', '1')
    """
    try:
        lowered = _lowered(model, inputs)
    except UnsupportedModelError as error:
        return SupportReport(False, error.problems, 0)
    return SupportReport(lowered.network is not None, lowered.problems, lowered.operators)


__all__ = ["Inputs", "SupportReport", "capture", "check_support"]
