"""The functions that a study can ask of every network: each by its name, with options that a file can hold."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathlift.arguments.registry import check_together, kind_of
from pathlift.certification import attack, certify
from pathlift.consequences import box_path_metric, generalisation_bound, sharpness
from pathlift.errors import InputError, nearest
from pathlift.graph.network import Network
from pathlift.lipschitz import input_lipschitz, lipschitz_bound
from pathlift.magnitude import path_magnitude, unit_path_magnitude
from pathlift.metric import path_metric
from pathlift.norm import path_norm
from pathlift.pruning import Batch, prune
from pathlift.quantisation import bits_needed, quantize
from pathlift.rescaling import equivalent, rescaling_distance, symmetries
from pathlift.results import Result
from pathlift.statistics import activation_statistics
from pathlift.storage.data import check_name, load_data

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        path_norm, path_magnitude, unit_path_magnitude, path_metric, equivalent, rescaling_distance, symmetries, prune,
        quantize, bits_needed, activation_statistics, input_lipschitz, lipschitz_bound, certify, attack, sharpness,
        generalisation_bound, box_path_metric,
    )
}  # fmt: skip
"""By name; what they return are numbers."""

HEADLINES = {
    "path_norm": "log10", "path_metric": "log10_upper", "prune": "mass_kept", "quantize": "path_metric/log10_upper",
    "certify": "share",
}  # fmt: skip
"""The number of a function that is drawn; of the others it is the first."""

GIVEN = ("model", "inputs", "progress")
"""Arguments that the study itself gives, or that a file cannot hold."""

DATA = ("x", "y", "data")
"""Arguments that are inputs, by the name of a file or of data that ship with a package; y are the classes of x."""


@dataclass(frozen=True)
class Call:
    """One function with its options.

    Attributes:
        name: Of the function.
        options: Its arguments, as the file has them.
    """

    name: str
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The function as columns of the table are called: with its options, where it has some."""
        given = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}({given})" if given else self.name

    @property
    def key(self) -> str:
        """What its answer is kept under: another one when a file that it names has changed."""
        states = [stamps_of(Path(self.options[name])) for name in ("other", "x", "data") if name in self.options]
        return f"{self.label} {states}" if any(states) else self.label

    def numbers(self, network: Network) -> dict[str, float]:
        """Call the function.

        Args:
            network: The network.

        Returns:
            What its result gives a logger, by name.

        Raises:
            PathliftError: What the function raises.
        """
        answer = FUNCTIONS[self.name](network, **self._arguments(network))
        result = next((part for part in answer if isinstance(part, Result)), None) if isinstance(answer, tuple) else answer
        return result.scalars() if isinstance(result, Result) else {"value": float(answer)}

    def _arguments(self, network: Network) -> dict[str, Any]:
        """Return the options with their data."""
        arguments = dict(self.options)
        for name in ("x", "data"):
            if name in arguments:
                shape, _ = network.graph.examples[0]
                x, y = load_data(arguments[name], shape[1:])
                x = x.to(network.device)
                arguments[name] = Batch(x, y) if name == "data" and y is not None else x
                if "y" in inspect.signature(FUNCTIONS[self.name]).parameters:
                    if y is None:
                        raise InputError(f"{self.name} needs classes 'y' beside the inputs of '{self.options[name]}'.")
                    arguments["y"] = y
        return arguments


def stamps_of(path: Path) -> list[int]:
    """Return the size and the time of a file, or of those in a folder.

    Args:
        path: The file or folder.

    Returns:
        Numbers; none where nothing is there.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return [number for file in files for number in (file.stat().st_size, file.stat().st_mtime_ns)]


def call_of(value: object) -> Call:
    """Read one function: its name, or its name and its options.

    Args:
        value: As it stands in a file: ``path_norm`` or ``{path_norm: {q: 2}}``.

    Returns:
        The call.

    Raises:
        InputError: There is no such function or option, an option is missing or is not what it may be.
    """
    options: Any = None
    if isinstance(value, Mapping) and len(value) == 1:
        ((value, options),) = value.items()
    if not isinstance(value, str) or not isinstance(options, (Mapping, type(None))):
        raise InputError(f"expected a function, such as path_norm or path_norm: {{q: 2}}, found {value!r:.80}.")
    if value not in FUNCTIONS:
        raise InputError(f"there is no function '{value}'.{nearest(value, FUNCTIONS)}")
    call = Call(value, dict(options or {}))
    _check(call)
    return call


def _check(call: Call) -> None:
    function = FUNCTIONS[call.name]
    parameters = {name: each for name, each in inspect.signature(function).parameters.items() if name not in (*GIVEN, "y")}
    for name, value in call.options.items():
        if name not in parameters:
            raise InputError(f"{call.name} has no option '{name}'.{nearest(str(name), parameters)}")
        if name in DATA:
            if not isinstance(value, str):
                raise InputError(f"{name} of {call.name} must be digits, fashion-mnist or a file, found {value!r:.80}.")
            check_name(value)
        elif name == "other":
            if not isinstance(value, str) or not Path(value).exists():
                raise InputError(f"other of {call.name} must be a file of weights that is there, found {value!r:.80}.")
        else:
            kind_of(function.__name__, name, may_be_none=parameters[name].default is None)(f"{name} of {call.name}", value)
    missing = [name for name, each in parameters.items() if each.default is each.empty and name not in call.options]
    if missing:
        raise InputError(f"{call.name} needs the option '{missing[0]}'.")
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    check_together(function.__name__, call.options, defaults)
    try:
        json.dumps(call.options)
    except (TypeError, ValueError) as error:
        raise InputError(f"the options of {call.name} must be numbers, words and lists of them: {error}.") from error


def headline(call: Call, numbers: Mapping[str, float]) -> str | None:
    """Return which number of a call is drawn.

    Args:
        call: The call.
        numbers: What it gave.

    Returns:
        The name of the number; None where there is none.
    """
    wanted = HEADLINES.get(call.name)
    return wanted if wanted in numbers else next(iter(numbers), None)
