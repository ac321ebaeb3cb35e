"""Wrong values for every argument of every public function, and what may be answered to them.

`CALLS` has one right call of each function, `FAIR` says which values of an argument have an answer. Everything else must be
refused with a `PathliftError`; so must what is fair here and still does not fit (the path of no file, say).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import fractions
import importlib
import importlib.util
import inspect
import io
import math
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pathlift
from pathlift.consequences import generalisation_bound
from pathlift.graph.compact import compacted
from pathlift.graph.network import CompactNetwork
from pathlift.pruning import Batch, NofM, ScorePruning
from pathlift.rescaling import Symmetries

# ------------------------------------------------------------------------------------------------------------ the surface

MODULES = (
    "pathlift",
    "pathlift.certification",
    "pathlift.consequences",
    "pathlift.lipschitz",
    "pathlift.metric",
    "pathlift.pruning",
    "pathlift.quantisation",
    "pathlift.report",
    "pathlift.rescaling",
    "pathlift.statistics",
    "pathlift.storage",
    "pathlift.kernel",
    "pathlift.lifting",
    "pathlift.magnitude",
    "pathlift.norm",
    "pathlift.rescaling.training",
    "pathlift.lightning",
    "pathlift.hugging_face",
    "pathlift.pruning.torch_pruning",
)
"""Where users find functions."""

MADE = {
    "Compared", "LayerShare", "PruningCost", "QuantisationCost", "Scores",
    "ActivationStatistics", "BitsNeeded", "GaugeChoice", "LayerStatistics", "QuantizeReport", "QuantizedTensor", "SameGrid",
    "Attack", "BalancedState", "Certificate", "CertifiedRadius", "ChannelsLeft", "Equivalence", "Estimate", "Family",
    "GeneralisationBound",
    "InputLipschitz", "LipschitzBound", "MaskHandle", "MetricBound", "Network", "PathKernel", "PathLifting", "PathMagnitude",
    "PathMetric", "PathNorm", "Pinned", "Problem", "PruneReport", "PrunedTensor", "RescaledState", "Sharpness", "ShrinkReport",
    "ShrunkLayer", "Step", "SupportReport", "Tolerance", "WeightUpdate",
}  # fmt: skip
"""Classes that the library makes and hands out: users do not construct them, or only subclasses."""

STEPS = {
    "Network.remembered": "keeps what follows from the graph",
    "Network.memory": "what passes remember",
    "RescaleCallback.on_train_start": "called by Lightning",
    "PathNormCallback.on_log": "called by the Trainer of Hugging Face",
    "RescaleCallback.on_train_begin": "called by the Trainer of Hugging Face",
    "RescaleCallback.on_train_end": "called by the Trainer of Hugging Face",
    "MaskCallback.on_train_begin": "called by the Trainer of Hugging Face",
    "PathNormLogger.on_train_start": "called by Lightning",
    "PathNormLogger.on_train_batch_end": "called by Lightning",
    "PathNormLogger.on_train_end": "called by Lightning",
    "PruneCallback.on_train_epoch_start": "called by Lightning",
    "PruneCallback.on_train_end": "called by Lightning",
    "PruneCallback.on_exception": "called by Lightning",
    "MaskCallback.on_train_start": "called by Lightning",
    "MaskCallback.on_train_end": "called by Lightning",
    "MaskCallback.on_exception": "called by Lightning",
    "MaskHandle.remove": "takes no argument",
    "PathMagnitudeImportance.__call__": "called by Torch-Pruning",
    "one_line": "a text for messages",
    "package": "imports one of the packages that extras bring",
}
"""Functions that users do not call, and why they are there."""


ACCELERATED = {"to_semi_structured"}
"""Functions that are answered on an accelerator alone."""


def surface() -> dict[str, Callable[..., Any]]:
    """Return every public function, constructor and method that takes arguments, by name."""
    functions: dict[str, Callable[..., Any]] = {}
    for module in MODULES:
        try:
            file = importlib.import_module(module)
        except pathlift.InputError:  # a package of an extra is missing
            continue
        defined = [name for name, value in vars(file).items() if getattr(value, "__module__", "").startswith(module)]
        for name in getattr(file, "__all__", [name for name in defined if not name.startswith("_")]):
            value = getattr(file, name)
            if inspect.isclass(value) and issubclass(value, (BaseException, Warning)):
                continue
            if inspect.isclass(value):
                if name not in MADE and "__init__" in vars(value):
                    functions[name] = value
                fields = getattr(value, "__dataclass_fields__", {})  # a function may be the default of one
                methods = [(key, member) for key, member in vars(value).items() if inspect.isfunction(member) and key[0] != "_"]
                methods = [
                    (key, member)
                    for key, member in methods
                    if key not in fields and not hasattr(member, "__isabstractmethod__")
                ]
                functions |= {
                    f"{name}.{key}": member for key, member in methods if len(inspect.signature(member).parameters) > 1
                }
            elif inspect.isfunction(value):
                functions[name] = value
    return {name: function for name, function in functions.items() if name not in STEPS}


def arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments of a function."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


# ------------------------------------------------------------------------------------------------------------ right calls


class World:
    """What right calls are made of; each is built when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    @cached_property
    def network(self) -> pathlift.Network:
        return pathlift.capture(self.model, (4,))

    @cached_property
    def normalised(self) -> pathlift.Network:
        return pathlift.capture(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval(), (4,))

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return {name: weight.detach() * 1.5 for name, weight in self.model.state_dict().items()}

    @cached_property
    def unordered(self) -> dict[str, Tensor]:
        """Weights that are larger in some places and smaller in others."""
        return {
            name: weight * torch.linspace(0.5, 1.5, weight.numel()).reshape(weight.shape) for name, weight in self.state.items()
        }

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        return {"0.weight": torch.ones(5, 4, dtype=torch.bool)}

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        return {name: weight.abs() for name, weight in self.state.items()}

    @cached_property
    def groups(self) -> Symmetries:
        return pathlift.symmetries(self.network)

    @cached_property
    def rounded(self) -> tuple[nn.Module, Any]:
        return pathlift.quantize(self.model, (4,), 4, moments=0)

    @cached_property
    def stored_rounding(self) -> Path:
        self.rounded[1].save(self.folder / "stored_rounding.safetensors")
        return self.folder / "stored_rounding.safetensors"

    @cached_property
    def report(self) -> pathlift.report.Report:
        return pathlift.report.Report(self.network, amounts=(), bits=())

    @cached_property
    def pruned(self) -> nn.Module:
        return pathlift.pruning.to_torch_prune(self.model, self.masks)

    @cached_property
    def weights(self) -> Path:
        save_file(self.state, self.folder / "weights.safetensors")
        return self.folder / "weights.safetensors"

    @cached_property
    def stored_masks(self) -> Path:
        pathlift.pruning.save_masks(self.masks, self.folder / "masks.safetensors")
        return self.folder / "masks.safetensors"

    @property
    def x(self) -> Tensor:
        return torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 1.0, -1.0]])

    @property
    def y(self) -> Tensor:
        return torch.tensor([0, 2])

    @cached_property
    def trained(self) -> dict[str, Any]:
        """A model of its own, which these functions change."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        network = pathlift.capture(model, (4,))
        groups = pathlift.symmetries(network)
        return {
            "model": model,
            "network": network,
            "groups": groups,
            "optimizer": torch.optim.SGD(model.parameters(), 0.1),
            "state": groups.balance(),
        }


def _some(mapping: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: mapping[name] for name in names}


CALLS: dict[str, Callable[[World], dict[str, Any]]] = {
    "Absolute": lambda w: {"r": 0.1},
    "Absolute.intervals": lambda w: {"self": pathlift.Absolute(0.1), "network": w.network},
    "Batch": lambda w: {"x": w.x, "y": w.y},
    "Batch.split": lambda w: {"self": Batch(w.x, w.y), "size": 1},
    "Checkpoint": lambda w: {"path": w.weights},
    "Criterion": lambda w: {"name": "own", "what": "of mine", "score": lambda network, data, generator: w.scores},
    "Criterion.scores": lambda w: {"self": pathlift.pruning.CRITERIA["wanda"], "network": w.network, "data": w.x},
    "GeneralisationBound.vacuous": lambda w: {"self": generalisation_bound(w.network, samples=9), "loss_range": 1.0},
    "MaskCallback": lambda w: {"masks": w.masks},
    "Network.kind_of": lambda w: {"self": w.network, "name": "0.weight"},
    "Network.named": lambda w: {"self": w.network, "state": w.state},
    "Network.values": lambda w: {"self": w.network, "state": w.state},
    "NofM": lambda w: {"n": 2, "m": 4},
    "NofM.holds": lambda w: {"self": NofM(2, 4), "weight": torch.ones(4, 4)},
    "NofM.fits": lambda w: {"self": NofM(2, 4), "score": torch.ones(4, 4)},
    "PathKernel.coordinates": lambda w: {"self": pathlift.path_kernel([w.network, w.state]), "dimensions": 2},
    "PathMetric.estimate": lambda w: {"self": pathlift.path_metric(w.network, w.unordered), "samples": 3},
    "PathMetric.tighten": lambda w: {"self": pathlift.path_metric(w.network, w.unordered), "steps": 1},
    "PathMagnitudeImportance": lambda w: {"model": w.model, "inputs": (4,)},
    "PathNormLogger": lambda w: {"inputs": (4,)},
    "PruneCallback": lambda w: {"inputs": (4,), "amounts": (0.5,)},
    "Pruned": lambda w: {"amount": 0.1},
    "Pruned.intervals": lambda w: {"self": pathlift.Pruned(0.1), "network": w.network},
    "Relative": lambda w: {"r": 0.1},
    "Relative.intervals": lambda w: {"self": pathlift.Relative(0.1), "network": w.network},
    "RescaleCallback": lambda w: {"inputs": (4,)},
    "Report": lambda w: {"model": w.network, "other": w.state, "amounts": (), "bits": (), "samples": 0},
    "Report.save": lambda w: {"self": w.report, "path": w.folder / "report.html", "overwrite": True},
    "Rounding": lambda w: {"bits": 8},
    "Rounding.grid": lambda w: {"self": pathlift.Rounding(8), "network": w.network},
    "Tolerance.grid": lambda w: {"self": pathlift.Relative(0.1), "network": w.network},
    "SameGrid.grid": lambda w: {"self": w.rounded[1].tolerance, "network": w.network},
    "Rounding.intervals": lambda w: {"self": pathlift.Rounding(8), "network": w.network},
    "ScorePruning": lambda w: {"amount": 0.5},
    "ScorePruning.compute_mask": lambda w: {"self": ScorePruning(0.5), "t": torch.ones(4), "default_mask": torch.ones(4)},
    "Bytes": lambda w: {"count": 100},
    "QuantizeReport.save": lambda w: {"self": w.rounded[1], "path": w.folder / "rounded.safetensors"},
    "SameGrid.intervals": lambda w: {"self": w.rounded[1].tolerance, "network": w.network},
    "Symmetries": lambda w: {"network": w.network},
    "Symmetries.at": lambda w: {"self": w.groups, "state": w.state},
    "Symmetries.balance": lambda w: {"self": w.groups, "p": 2.0},
    "Symmetries.condition": lambda w: {"self": w.groups},
    "Symmetries.equalize": lambda w: {"self": w.groups},
    "Symmetries.channel_groups": lambda w: {"self": w.groups, "module": "0"},
    "Symmetries.randomize": lambda w: {"self": w.groups, "generator": torch.Generator().manual_seed(0)},
    "Symmetries.rescale": lambda w: {"self": w.groups, "factors": [1.0, 2.0, 4.0, 0.5, 8.0]},
    "Symmetries.weight_factors": lambda w: {"self": w.groups, "factors": [1.0, 2.0, 4.0, 0.5, 8.0]},
    "activation_statistics": lambda w: {"model": w.network, "data": w.x},
    "synthetic_inputs": lambda w: {"model": w.normalised, "count": 2, "steps": 1},
    "align": lambda w: {"model": w.network, "other": w.state},
    "apply_masks": lambda w: {"model": w.model, "masks": w.masks},
    "attack": lambda w: {"model": w.network, "x": w.x, "tolerance": pathlift.Relative(0.1), "steps": 1},
    "activation_ranges": lambda w: {"model": w.network, "data": w.x},
    "bits_needed": lambda w: {"model": w.network, "tolerance": 0.1},
    "box_path_metric": lambda w: {"model": w.network, "r": 0.1},
    "capture": lambda w: {"model": w.model, "inputs": (4,)},
    "certify": lambda w: {"model": w.network, "x": w.x, "tolerance": pathlift.Relative(0.01)},
    "certified_radius": lambda w: {"model": w.network, "x": w.x, "radii": [0.01, 0.1]},
    "check_support": lambda w: {"model": w.model, "inputs": (4,)},
    "default_shape": lambda w: {"name": "torchvision:resnet18"},
    "equivalent": lambda w: {"model": w.network, "other": w.state},
    "expected_bound": lambda w: {"model": w.network, "other": w.state, "batches": w.x},
    "from_torch_prune": lambda w: {"model": w.pruned},
    "generalisation_bound": lambda w: {"model": w.network, "samples": 100},
    "gradient_norms": lambda w: {"model": w.network, "x": w.x},
    "importance_scores": lambda w: {"model": w.model, "scores": w.scores},
    "input_lipschitz": lambda w: {"model": w.network},
    "keep_masks": lambda w: {**_some(w.trained, "optimizer", "model"), "masks": w.masks},
    "layer_sensitivities": lambda w: {"model": w.network, "bits": 4, "data": w.x},
    "lipschitz_bound": lambda w: {"model": w.network, "other": w.state, "x": w.x},
    "load_masks": lambda w: {"path": w.stored_masks},
    "load_model": lambda w: {"name": "torch.nn:Flatten"},
    "load_quantized": lambda w: {"path": w.stored_rounding},
    "load_state": lambda w: {"path": w.weights},
    "log_path_norm": lambda w: {"network": w.network, "weights": w.model},
    "path_kernel": lambda w: {"models": [w.network, w.state]},
    "path_lifting": lambda w: {"model": w.model, "inputs": (4,)},
    "path_magnitude": lambda w: {"model": w.network},
    "path_metric": lambda w: {"model": w.network, "other": w.state},
    "path_metric_bounds": lambda w: {"model": w.network, "other": w.state},
    "path_metrics": lambda w: {"model": w.network, "others": [w.state]},
    "path_norm": lambda w: {"model": w.network},
    "path_norms": lambda w: {"model": w.network, "others": [w.state]},
    "path_sgd": lambda w: _some(w.trained, "optimizer", "network"),
    "prune": lambda w: {"model": w.network, "amount": 0.5, "criterion": "wanda", "data": w.x},
    "quantize": lambda w: {"model": w.network, "bits": 4, "data": w.x, "moments": 0},
    "rescale_after_steps": lambda w: {**_some(w.trained, "optimizer", "groups"), "gauge": Symmetries.balance},
    "rescale_in_place": lambda w: _some(w.trained, "groups", "state"),
    "rescaling_distance": lambda w: {"model": w.network, "other": w.state},
    "save": lambda w: {"model": w.network, "path": w.folder / "saved.pt", "overwrite": True},
    "save_masks": lambda w: {"masks": w.masks, "path": w.folder / "written.safetensors"},
    "save_onnx": lambda w: {
        "quantized": w.rounded[0], "report": w.rounded[1], "path": w.folder / "rounded.onnx", "inputs": (4,),
        "overwrite": True,
    },
    "save_tensors": lambda w: {"tensors": w.state, "path": w.folder / "written.safetensors"},
    "sharpness": lambda w: {"model": w.network, "x": w.x, "y": w.y, "r": 0.1, "steps": 1},
    "shrink": lambda w: {"model": w.model, "inputs": (4,)},
    "stream": lambda w: {"model": w.network, "weights": w.weights},
    "symmetries": lambda w: {"model": w.network},
    "to_semi_structured": lambda w: {"model": w.model},
    "to_torch_prune": lambda w: {"model": w.model, "masks": w.masks},
    "unit_path_magnitude": lambda w: {"model": w.network},
    "with_state": lambda w: {"model": w.model, "state": w.state},
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- wrong values


class Shy:
    """An object that cannot be written down."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Almost:
    """An object that can be made a number."""

    def __float__(self) -> float:
        return 0.5

    def __index__(self) -> int:
        return 2


def _nested(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


def _state_with(change: Callable[[Tensor], Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return {name: change(weight.detach()) for name, weight in model.state_dict().items()}


def _model_with(change: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
    return model


def _quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def _poisoned(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, math.nan)


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "−1": lambda: -1,
    "0": lambda: 0,
    "1": lambda: 1,
    "2": lambda: 2,
    "−0.5": lambda: -0.5,
    "0.5": lambda: 0.5,
    "1.5": lambda: 1.5,
    "NaN": lambda: math.nan,
    "inf": lambda: math.inf,
    "−inf": lambda: -math.inf,
    "2^70": lambda: 2**70,
    "−2^70": lambda: -(2**70),
    "10^400": lambda: 10**400,
    "10^5000": lambda: 10**5000,
    "1e308": lambda: 1e308,
    "5e-324": lambda: 5e-324,
    "complex": lambda: 1 + 2j,
    "NumPy int": lambda: np.int64(2),
    "NumPy float": lambda: np.float32(0.5),
    "NumPy NaN": lambda: np.float64("nan"),
    "NumPy bool": lambda: np.bool_(True),
    "NumPy array": lambda: np.ones((2, 4), dtype=np.float32),
    "NumPy number in an array": lambda: np.array(0.5),
    "Decimal": lambda: decimal.Decimal("0.5"),
    "Fraction": lambda: fractions.Fraction(1, 2),
    "almost a number": Almost,
    "date": lambda: dt.datetime(2020, 1, 1),
    "empty string": lambda: "",
    "word": lambda: "nonsense",
    "number in words": lambda: "0.5",
    "1 MB string": lambda: "x" * 1_000_000,
    "NUL": lambda: "a\0b",
    "bytes": lambda: b"abc",
    "bytearray": lambda: bytearray(b"abc"),
    "missing file": lambda: Path("/nowhere/at/all.safetensors"),
    "folder": lambda: Path("/"),
    "file in /dev": lambda: Path("/dev/null"),
    "empty list": list,
    "empty tuple": tuple,
    "empty dict": dict,
    "empty set": set,
    "list of None": lambda: [None],
    "list of ints": lambda: [1, 2],
    "list of strings": lambda: ["a", "b"],
    "list of NaN": lambda: [math.nan] * 5,
    "list of 2^70": lambda: [2**70],
    "list of bools": lambda: [True] * 5,
    "list of lists of numbers": lambda: [[1.0, 1.0, 1.0, 1.0]],
    "deep list": lambda: _nested(2000),
    "shape of 0": lambda: (0,),
    "shape of −1": lambda: (-1,),
    "huge shape": lambda: (2**31, 2**31, 4),
    "set of ints": lambda: {1, 2},
    "range": lambda: range(3),
    "iterator": lambda: iter([1, 2, 3]),
    "dict of ints": lambda: {"a": 1},
    "dict with int keys": lambda: {1: torch.ones(2)},
    "dict with a long name": lambda: {"x" * 1_000_000: torch.ones(2)},
    "dict of another model": lambda: {"other.weight": torch.ones(3, 3)},
    "dict of None": lambda: _state_with(lambda _: None),
    "dict of lists": lambda: _state_with(lambda t: t.tolist()),
    "dict of NaN": lambda: _state_with(_poisoned),
    "dict of inf": lambda: _state_with(lambda t: torch.full_like(t, math.inf)),
    "dict of complex": lambda: _state_with(lambda t: t.to(torch.complex64)),
    "dict of ints in tensors": lambda: _state_with(lambda t: torch.ones_like(t, dtype=torch.int64)),
    "dict of float8": lambda: _state_with(lambda t: t.to(torch.float8_e4m3fn)),
    "dict of meta": lambda: _state_with(lambda t: t.to("meta")),
    "dict of sparse": lambda: _state_with(lambda t: t.to_sparse()),
    "dict of quantised": lambda: _state_with(_quantised),
    "dict of nested": lambda: _state_with(lambda t: torch.nested.nested_tensor([t])),
    "dict of scalars": lambda: _state_with(lambda t: t.sum()),
    "dict of empty tensors": lambda: _state_with(lambda t: t[:0]),
    "object": object,
    "object without repr": Shy,
    "Ellipsis": lambda: ...,
    "NotImplemented": lambda: NotImplemented,
    "exception": lambda: ValueError("x"),
    "function of nothing": lambda: lambda: None,
    "function of five": lambda: lambda a, b, c, d, e: None,
    "function": lambda: lambda *args: None,
    "class": lambda: int,
    "class of modules": lambda: nn.Linear,
    "a Python module": lambda: math,
    "another model": lambda: nn.Linear(7, 7),
    "no model": lambda: nn.Module(),
    "lazy model": lambda: nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 3)),
    "model of width 0": lambda: nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3)),
    "model of NaN": lambda: _model_with(_poisoned),
    "complex model": lambda: _model_with(lambda t: t.to(torch.complex64)),
    "float8 model": lambda: _model_with(lambda t: t.to(torch.float8_e4m3fn)),
    "meta model": lambda: _model_with(lambda t: t.to("meta")),
    "sparse model": lambda: _model_with(lambda t: t.to_sparse()),
    "quantised model": lambda: _model_with(_quantised),
    "network of another model": lambda: pathlift.capture(nn.Linear(7, 7), (7,)),
    "compact network": lambda: compacted(pathlift.capture(nn.Conv2d(1, 1, 3), (1, 8, 8))),
    "dtype": lambda: torch.float32,
    "device": lambda: torch.device("cpu"),
    "meta device": lambda: torch.device("meta"),
    "missing device": lambda: "cuda:99",
    "word for a device": lambda: "gpu",
    "generator": torch.Generator,
    "tolerance": lambda: pathlift.Relative(0.1),
    "batch": lambda: Batch(torch.ones(2, 4), torch.tensor([0, 1])),
    "optimiser of others": lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1),
    "scalar tensor": lambda: torch.tensor(0.5),
    "vector": lambda: torch.ones(5),
    "inputs": lambda: torch.ones(2, 4),
    "inputs of float64": lambda: torch.ones(2, 4, dtype=torch.float64),
    "inputs of bfloat16": lambda: torch.ones(2, 4, dtype=torch.bfloat16),
    "inputs of ints": lambda: torch.ones(2, 4, dtype=torch.int64),
    "inputs of bools": lambda: torch.ones(2, 4, dtype=torch.bool),
    "inputs of complex numbers": lambda: torch.ones(2, 4, dtype=torch.complex64),
    "inputs of float8": lambda: torch.ones(2, 4).to(torch.float8_e5m2),
    "quantised inputs": lambda: _quantised(torch.ones(2, 4)),
    "sparse inputs": lambda: torch.ones(2, 4).to_sparse(),
    "sparse rows": lambda: torch.ones(2, 4).to_sparse_csr(),
    "nested inputs": lambda: torch.nested.nested_tensor([torch.ones(4), torch.ones(4)]),
    "meta inputs": lambda: torch.ones(2, 4, device="meta"),
    "no inputs": lambda: torch.ones(0, 4),
    "inputs of no size": lambda: torch.ones(2, 0),
    "inputs of NaN": lambda: torch.full((2, 4), math.nan),
    "inputs of inf": lambda: torch.full((2, 4), math.inf),
    "inputs of another shape": lambda: torch.ones(2, 7),
    "tuple of inputs": lambda: (torch.ones(2, 4),),
    "two inputs": lambda: [torch.ones(2, 4), torch.ones(2, 4)],
    "list of wrong inputs": lambda: [torch.ones(2, 4), "x"],
    "classes": lambda: torch.tensor([0, 2]),
    "class too high": lambda: torch.tensor([0, 3]),
    "class below 0": lambda: torch.tensor([0, -1]),
    "one class": lambda: torch.tensor([0]),
    "classes as floats": lambda: torch.tensor([0.0, 2.0]),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- what may be answered

Fair = Callable[[Any], bool]


def real(value: Any) -> bool:
    """Whether a value is a number that is not a truth value."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating, fractions.Fraction)):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and abs(int(value)) < 2**63


def _between(low: float, high: float, *, whole_only: bool = False) -> Fair:
    kind = whole if whole_only else real
    return lambda v: kind(v) and low <= float(v) <= high


LARGEST = 1.8e308
least_zero, positive, share = _between(0, LARGEST), _between(5e-324, LARGEST), _between(0, 1 - 1e-16)
count, positive_count = _between(0, 2**63, whole_only=True), _between(1, 2**63, whole_only=True)


FLOATS = (torch.float64, torch.float32, torch.bfloat16)


def dense(value: Any, *kinds: torch.dtype) -> bool:
    """Whether a value is a dense tensor with values, of some types."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided or value.is_meta:
        return False
    return value.dtype in (kinds or (*FLOATS, torch.int64, torch.bool))


def plain(value: Any, shape: tuple[int, ...] | None = None) -> bool:
    """Whether a value is a dense tensor of finite numbers."""
    good = dense(value, *FLOATS, torch.int64) and bool(value.isfinite().all())
    return good and (shape is None or tuple(value.shape) == shape)


def x_like(value: Any) -> bool:
    return plain(value, (2, 4)) or (isinstance(value, (tuple, list)) and len(value) == 1 and plain(value[0], (2, 4)))


def state_like(value: Any) -> bool:
    good = isinstance(value, Mapping) and set(value) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    return good and all(plain(tensor) and tensor.numel() for tensor in value.values())


def nothing(value: Any) -> bool:
    return isinstance(value, dict) and not value


def tensors_like(value: Any) -> bool:
    """Whether a value is a mapping from names to dense tensors, whatever they hold."""
    return isinstance(value, dict) and all(isinstance(name, str) and dense(tensor) for name, tensor in value.items())


def two_samples(value: Any) -> bool:
    """Whether a value is a dense tensor of two samples, whatever it holds: that is looked at when it is used."""
    return dense(value) and value.dim() > 0 and len(value) == 2 and value.numel() > 0


def named_like(value: Any) -> bool:
    """Whether a value has the names and shapes of a state, whatever its tensors hold."""
    shapes = {"0.weight": (5, 4), "0.bias": (5,), "2.weight": (3, 5), "2.bias": (3,)}
    return tensors_like(value) and {name: tuple(tensor.shape) for name, tensor in value.items()} == shapes


def float_like(value: Any) -> bool:
    return named_like(value) and all(tensor.is_floating_point() for tensor in value.values())


def ranked_like(value: Any) -> bool:
    return named_like(value) and not any(bool(tensor.isnan().any()) for tensor in value.values())


def of_shapes(value: Any) -> bool:
    """Whether a value is a model of the shapes at hand, whatever it holds."""
    return isinstance(value, nn.Sequential) and named_like(dict(value.state_dict())) if not _lazy(value) else False


def _lazy(value: Any) -> bool:
    return isinstance(value, nn.Module) and any(map(torch.nn.parameter.is_lazy, value.parameters()))


def never(_: Any) -> bool:
    return False


def callback(_: int) -> Fair:
    return lambda v: inspect.isfunction(v) and v.__code__.co_flags & inspect.CO_VARARGS > 0


def shape_like(value: Any) -> bool:
    """Whether a value is an example of the inputs of the model at hand."""
    if isinstance(value, (tuple, list)):
        return len(value) == 1 and isinstance(value[0], Tensor) and shape_like(value[0])
    return isinstance(value, Tensor) and sizes_like(value) and value.dtype == torch.float32 and tuple(value.shape) == (2, 4)


def network_like(value: Any) -> bool:
    """Whether a value is a network with one entry per neuron."""
    return isinstance(value, pathlift.Network) and not isinstance(value, CompactNetwork)


def sizes_like(value: Any) -> bool:
    """Whether a value is a shape, or a tensor that can be an example."""
    if isinstance(value, Tensor):
        good = not value.is_nested and value.layout == torch.strided and value.dtype in FLOATS
        return good and value.dim() > 0 and value.numel() > 0
    if not isinstance(value, (tuple, list, range)) or not len(value):
        return False
    return all(whole(size) and size > 0 for size in value) or all(
        isinstance(size, Tensor) and sizes_like(size) for size in value
    )


def least_zeros(value: Any) -> bool:
    """Whether a value is a list of numbers that are not negative."""
    return isinstance(value, (tuple, list, range)) and len(value) > 0 and all(map(least_zero, value))


FAIR: dict[str, Fair] = {
    "model": network_like,
    "log_path_norm.weights": state_like,
    "capture.model": of_shapes,
    "check_support.model": lambda v: isinstance(v, nn.Module),
    "importance_scores.model": of_shapes,
    "keep_masks.model": lambda v: v is None or of_shapes(v),
    "shrink.model": of_shapes,
    "to_semi_structured.model": never,
    "prune.update": never,
    "prune.data": lambda v: (
        plain(v, (2, 4))
        or isinstance(v, Batch)
        or (isinstance(v, list) and len(v) > 0 and all(plain(own, (2, 4)) or isinstance(own, Batch) for own in v))
    ),
    "prune.shrink": lambda v: isinstance(v, (bool, np.bool_)),
    "apply_masks.model": of_shapes,
    "to_torch_prune.model": of_shapes,
    "PathMagnitudeImportance.model": lambda v: isinstance(v, nn.Module),
    "network": network_like,
    "groups": never,
    "inputs": never,
    "capture.inputs": shape_like,
    "check_support.inputs": sizes_like,
    "shrink.inputs": shape_like,
    "path_lifting.inputs": shape_like,
    "PathMagnitudeImportance.inputs": sizes_like,
    "RescaleCallback.inputs": sizes_like,
    "PathNormLogger.inputs": sizes_like,
    "PruneCallback.inputs": sizes_like,
    "RescaleCallback.module": lambda v: isinstance(v, str) and len(v) < 5000,
    "PathNormLogger.module": lambda v: isinstance(v, str) and len(v) < 5000,
    "PruneCallback.module": lambda v: isinstance(v, str) and len(v) < 5000,
    "prefix": lambda v: isinstance(v, str) and len(v) < 5000,
    "PruneCallback.amounts": lambda v: (
        isinstance(v, (list, tuple)) and len(v) > 0 and all(map(share, v)) and list(v) == sorted(v)
    ),
    "PruneCallback.criterion": never,
    "first": count,
    "until": never,
    "other": state_like,
    "expected_bound.other": lambda v: state_like(v) or isinstance(v, pathlift.certification.Tolerance),
    "lipschitz_bound.other": lambda v: state_like(v) or isinstance(v, pathlift.certification.Tolerance),
    "tolerance": lambda v: v is None or state_like(v) or isinstance(v, pathlift.certification.Tolerance),
    "equivalent.tolerance": least_zero,
    "models": never,
    "others": lambda v: isinstance(v, (list, tuple, set)) and not v,
    "state": state_like,
    "Network.named.state": float_like,
    "Network.values.state": float_like,
    "Symmetries.at.state": float_like,
    "with_state.state": named_like,
    "with_state.model": of_shapes,
    "weights": never,
    "x": x_like,
    "certify.x": lambda v: x_like(v) or (isinstance(v, list) and len(v) == 2 and all(plain(own, (2, 4)) for own in v)),
    "certified_radius.x": lambda v: x_like(v) or (isinstance(v, list) and len(v) == 2 and all(plain(own, (2, 4)) for own in v)),
    "attack.x": lambda v: plain(v, (2, 4)),
    "sharpness.x": lambda v: plain(v, (2, 4)),
    "batches": lambda v: x_like(v) or (isinstance(v, list) and len(v) == 2 and all(plain(own, (2, 4)) for own in v)),
    "y": lambda v: plain(v, (2,)) and v.dtype == torch.int64 and int(v.min()) >= 0 and int(v.max()) <= 2,
    "q": lambda v: real(v) and (1 <= v <= 1000 or v == math.inf),
    "p": _between(1, 100),
    "r": _between(0, 1),
    "Absolute.r": least_zero,
    "Relative.r": least_zero,
    "radius": least_zero,
    "radii": lambda v: least_zeros(v) or (plain(v) and v.dim() == 1 and len(v) > 0 and bool((v >= 0).all())),
    "sigma": least_zero,
    "amount": share,
    "Pruned.amount": _between(0, 1),
    "Symmetries.balance.p": _between(5e-324, 100),
    "path_metric.q": lambda v: real(v) and v in (1, 2),
    "path_metrics.q": lambda v: real(v) and v in (1, 2),
    "expected_bound.q": _between(1, 1000),
    "log_path_norm.q": _between(1, 1000),
    "path_magnitude.q": _between(1, 1000),
    "bits": _between(2, 64, whole_only=True),
    "per": never,
    "quantize.bits": lambda v: whole(v) and 2 <= v <= 8,
    "layer_sensitivities.bits": lambda v: whole(v) and 2 <= v <= 8,
    "layer_sensitivities.data": lambda v: x_like(v) or (isinstance(v, list) and all(plain(own, (2, 4)) for own in v)),
    "layer_sensitivities.correction": never,
    "layer_sensitivities.progress": callback(2),
    "granularity": positive_count,
    "rounding": never,
    "quantize.gauge": never,
    "range": never,
    "affine": lambda v: isinstance(v, (bool, np.bool_)),
    "ends": lambda v: v is None or (whole(v) and 2 <= v <= 8),
    "correction": lambda v: v is None,
    "budget": lambda v: v is None or (real(v) and v >= 2),
    "Bytes.count": positive_count,
    "quantize.data": lambda v: v is None or x_like(v) or (isinstance(v, list) and all(plain(own, (2, 4)) for own in v)),
    "quantize.moments": lambda v: v is None or (whole(v) and int(v) in (0, 2, 4, 6, 8)),
    "quantize.progress": callback(2),
    "sequential": lambda v: isinstance(v, (bool, np.bool_)),
    "synthetic_inputs.count": positive_count,
    "synthetic_inputs.progress": callback(2),
    "bits_needed.tolerance": positive,
    "quantized": never,
    "report": never,
    "save_onnx.inputs": sizes_like,
    "save_onnx.activations": lambda v: v is None,
    "activation_ranges.data": lambda v: (
        v is None or x_like(v) or (isinstance(v, list) and all(plain(batch, (2, 4)) for batch in v))
    ),
    "deviations": positive,
    "Report.other": lambda v: (
        v is None or state_like(v) or (isinstance(v, (list, tuple)) and len(v) > 0 and all(map(state_like, v)))
    ),
    "Report.data": lambda v: v is None or plain(v, (2, 4)) or isinstance(v, Batch),
    "title": lambda v: v is None or (isinstance(v, str) and 0 < len(v) < 5000),
    "names": lambda v: isinstance(v, (list, tuple, set)) and len(v) == 2 and all(isinstance(own, str) and own for own in v),
    "amounts": lambda v: isinstance(v, (list, tuple)) and all(map(share, v)),
    "Report.bits": lambda v: isinstance(v, (list, tuple)) and all(whole(own) and 2 <= own <= 8 for own in v),
    "Report.samples": lambda v: whole(v) and v >= 0 and v != 1,
    "Report.progress": callback(2),
    "command": lambda v: isinstance(v, str) and len(v) < 5000,
    "step": least_zero,
    "steps": count,
    "restarts": count,
    "splits": count,
    "prune.steps": positive_count,
    "Criterion.steps": positive_count,
    "samples": positive_count,
    "input_bound": positive,
    "loss_lipschitz": positive,
    "loss_range": positive,
    "moments": lambda v: whole(v) and int(v) in (0, 2, 4, 6, 8),
    "path_metric_bounds.moments": lambda v: whole(v) and int(v) in (2, 4, 6, 8),
    "tighten": count,
    "ratio": lambda v: real(v) and v >= 1,
    "seconds": lambda v: v is None or (real(v) and v >= 0),
    "estimate": lambda v: whole(v) and int(v) != 1 and v >= 0,
    "confidence": lambda v: real(v) and 0 < v < 1,
    "limit": positive_count,
    "dimensions": _between(1, 2, whole_only=True),
    "every": positive_count,
    "size": positive_count,
    "n": lambda v: whole(v) and v in (1, 2, 3),
    "m": lambda v: whole(v) and v > 2,
    "choices": lambda v: (isinstance(v, (list, tuple)) and len(v) > 0 and all(map(positive, v))) or plain(v, (5,)),
    "factors": lambda v: plain(v, (5,)) or nothing(v),
    "kind": never,
    "needs": never,
    "name": never,
    "Criterion.name": lambda v: isinstance(v, str) and len(v) < 5000,
    "what": lambda v: isinstance(v, str) and len(v) < 5000,
    "module": never,
    "masks": nothing,
    "MaskCallback.masks": lambda v: nothing(v) or tensors_like(v),
    "apply_masks.masks": lambda v: nothing(v) or (state_like(v) and all(bool((own == 1).all()) for own in v.values())),
    "to_torch_prune.masks": lambda v: nothing(v) or (state_like(v) and all(bool((own == 1).all()) for own in v.values())),
    "save_masks.masks": lambda v: tensors_like(v) and all(bool(((own == 0) | (own == 1)).all()) for own in v.values()),
    "scores": lambda v: nothing(v) or ranked_like(v),
    "score": dense,
    "weight": dense,
    "Criterion.score": callback(3),
    "t": lambda v: plain(v, (4,)),
    "default_mask": lambda v: plain(v, (4,)),
    "prune.criterion": ranked_like,
    "Pruned.criterion": lambda v: tensors_like(v) and not any(bool(own.isnan().any()) for own in v.values()),
    "selection": never,
    "Criterion.selection": callback(2),
    "propagated": lambda v: v is None or callback(2)(v),
    "scope": lambda v: v is None,
    "invariant": lambda v: isinstance(v, (bool, np.bool_)),
    "bounded": lambda v: isinstance(v, (bool, np.bool_)),
    "loss": never,
    "Batch.loss": lambda v: isinstance(v, nn.Module) or callback(2)(v),
    "Batch.x": lambda v: two_samples(v) or (isinstance(v, (list, tuple)) and len(v) > 0 and all(map(two_samples, v))),
    "Batch.y": two_samples,
    "activation_statistics.data": lambda v: (
        x_like(v) or (isinstance(v, list) and len(v) == 2 and all(plain(own, (2, 4)) for own in v))
    ),
    "input_mean": lambda v: (real(v) and math.isfinite(v)) or plain(v, (4,)) or plain(v, ()),
    "input_variance": lambda v: least_zero(v) or ((plain(v, (4,)) or plain(v, ())) and bool((v >= 0).all())),
    "correlation": _between(0, 1),
    "correlations": never,
    "data": lambda v: plain(v, (2, 4)) or isinstance(v, Batch),
    "path": never,
    "key": never,
    "save.path": never,
    "save.model": lambda v: isinstance(v, (nn.Module, pathlift.Network)),
    "overwrite": lambda v: isinstance(v, (bool, np.bool_)),
    "save_masks.path": never,
    "save_tensors.path": lambda v: isinstance(v, str) and 0 < len(v) < 100 and v.isprintable(),
    "out": lambda v: isinstance(v, str) and 0 < len(v) < 100 and v.isprintable(),
    "tensors": tensors_like,
    "arguments": nothing,
    "trust": lambda v: isinstance(v, (bool, np.bool_)),
    "device": lambda v: isinstance(v, torch.device) and v.type == "cpu",
    "generator": lambda v: whole(v) or isinstance(v, torch.Generator),
    "path_metric.generator": lambda v: whole(v) and v == 0,  # any other has no effect without an estimate
    "PathMetric.estimate.samples": lambda v: whole(v) and v >= 2,
    "optimizer": never,
    "gauge": callback(1),
    "progress": callback(1),
}  # fmt: skip
"""Whether an argument's value may be answered. None is fair where it is the default."""

if importlib.util.find_spec("transformers") is not None:
    CALLS["PathNormCallback"] = lambda w: {"inputs": (4,)}
    FAIR["PathNormCallback.inputs"] = sizes_like
    FAIR["PathNormCallback.module"] = lambda v: isinstance(v, str) and len(v) < 5000

UNUSED = {"Checkpoint.path": "a folder of none is refused, an empty file too"}


def fair(name: str, argument: str, function: Callable[..., Any], value: Any) -> bool:
    """Whether a value has an answer."""
    if value is None and inspect.signature(function).parameters[argument].default is None:
        return True
    test = FAIR.get(f"{name}.{argument}", FAIR.get(argument))
    assert test is not None, f"no word on what may be answered for {name}.{argument}"
    return bool(test(value))


# ------------------------------------------------------------------------------------------------------------ the outcome


@dataclass(frozen=True)
class Ending:
    """How a call ended: ``refused``, ``answered``, ``wrong`` (answered although there is no answer), ``bare`` or ``late``."""

    call: str
    how: str
    text: str


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _said(error: Exception) -> str:
    with contextlib.suppress(Exception):
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__}, whose message cannot be written"


def run(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Call a function and exhaust what it yields."""
    answer = function(**given)
    return list(answer) if inspect.isgenerator(answer) else answer


def tried(world: World, name: str, function: Callable[..., Any], argument: str, label: str, seconds: int = 20) -> Ending:
    """Call a function with one wrong value."""
    call = f"{name}({argument}={label})"
    given, value = CALLS[name](world), VALUES[label]()
    allowed = fair(name, argument, function, VALUES[label]())
    given[argument] = value
    try:
        with _limited(seconds), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            answer = run(function, given)
    except pathlift.PathliftError as error:
        text = _said(error)
        return Ending(call, "refused" if len(text) < 1500 else "long", text)
    except TimeoutError:
        return Ending(call, "late", f"no end in {seconds} s")
    except Exception as error:
        return Ending(call, "bare", _said(error))
    return Ending(call, "answered" if allowed else "wrong", str(type(answer)))


def main() -> None:
    """Cross every argument with every value, and count how the calls end."""
    endings: dict[str, list[Ending]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        world = World(Path(folder))
        for name, function in surface().items():
            if name not in CALLS:
                print("no call of", name)
                continue
            try:
                run(function, CALLS[name](world))
            except Exception as error:
                print("the right call fails:", name, type(error).__name__, error)
                continue
            for argument in arguments(function):
                for label in VALUES:
                    ending = tried(world, name, function, argument, label)
                    if ending.how in {"wrong", "bare", "late", "long"}:
                        print(f"{ending.how:8} {ending.call}: {ending.text[:200]}", flush=True)
                    endings.setdefault(ending.how, []).append(ending)
    print({how: len(lines) for how, lines in endings.items()}, "of", sum(map(len, endings.values())))


if __name__ == "__main__":
    main()
