"""What crosses a call: every public function with one cheap call of it, circumstances, and the state of the process."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import importlib
import itertools
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pathlift
from pathlift import pruning, storage
from pathlift.rescaling import training

SHAPE = (1, 4, 4)


def _names(module: str) -> dict[str, Any]:
    room = importlib.import_module(module)
    return {name: getattr(room, name) for name in room.__all__}


def small_model(seed: int = 0) -> nn.Module:
    """A convolution, a batch norm with statistics, a pooling and a linear layer, in eval mode."""
    made = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype.is_floating_point:
                tensor.copy_(torch.rand(tensor.shape, generator=made) + (0.5 if "var" in name else -0.4))
    return model.eval().float()


class World:
    """Fresh arguments for one call."""

    def __init__(self, network: pathlift.Network | None = None) -> None:
        self.model = small_model()
        self.other = small_model(1)
        if network is not None:  # captured once for many worlds
            self.model = network.state.root
        self.network = pathlift.capture(self.model, SHAPE) if network is None else network
        self.groups = pathlift.symmetries(self.network)
        made = torch.Generator().manual_seed(2)
        self.x = torch.rand((3, *SHAPE), generator=made)
        self.y = torch.tensor([0, 2, 1])
        self.near = {
            name: tensor * 1.03125 if tensor.dtype.is_floating_point else tensor
            for name, tensor in self.model.state_dict().items()
        }
        self.far = {name: tensor.clone() for name, tensor in self.other.state_dict().items()}
        self.one = self.x[:1].clone()
        self.trained = copy.deepcopy(self.model)
        for parameter in self.trained.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.masks = {"0.weight": torch.arange(18).reshape(2, 1, 3, 3) % 2 == 0}
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.file = self.folder / "weights.safetensors"
        save_file({name: tensor.clone() for name, tensor in self.other.state_dict().items()}, self.file)

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(3)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def tensors(self) -> list[Tensor]:
        """Everything that a call may read and not change."""
        states = (*self.model.state_dict().values(), *self.other.state_dict().values(), *self.near.values())
        return [*states, *self.masks.values(), self.x, self.y]


def _saved(world: World) -> object:
    pathlift.pruning.save_masks(world.masks, world.folder / "masks.safetensors")
    return (world.folder / "masks.safetensors").read_bytes()


def _loaded(world: World) -> object:
    pathlift.pruning.save_masks(world.masks, world.folder / "masks.safetensors")
    return pathlift.pruning.load_masks(world.folder / "masks.safetensors")


def _rounding_loaded(world: World) -> object:
    _, report = pathlift.quantize(world.network, bits=4, moments=0)
    report.save(world.folder / "rounded.safetensors", overwrite=True)
    return pathlift.quantisation.load_quantized(world.folder / "rounded.safetensors")


def _onnx_written(world: World) -> object:
    quantized, report = pathlift.quantize(world.model, SHAPE, 4, moments=0)
    pathlift.quantisation.save_onnx(quantized, report, world.folder / "rounded.onnx", SHAPE, overwrite=True)
    return (world.folder / "rounded.onnx").exists()


def _streamed(world: World) -> object:
    network = pathlift.stream(world.network, weights=world.file)
    folder = tempfile.mkdtemp(dir=world.folder)
    return pathlift.path_norm(network), pathlift.path_magnitude(network, out=f"{folder}/scores"), network


def _step(world: World, use: Callable[[torch.optim.Optimizer, nn.Module], object]) -> object:
    """One step of training; what became of the weights."""
    model = world.trained
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    use(optimizer, model)
    optimizer.step()
    return model.state_dict(), [memory["momentum_buffer"].tolist() for memory in optimizer.state.values()]


def _kept(world: World, optimizer: torch.optim.Optimizer, model: nn.Module) -> pruning.MaskHandle:
    with torch.no_grad():
        model[0].weight.mul_(world.masks["0.weight"])
    return pruning.keep_masks(optimizer, world.masks, model)


def _shrunk(world: World) -> object:
    """One channel that nothing reads goes, an output whose weights are 0 stays."""
    mask = torch.arange(24, device="cpu").reshape(3, 8) % 8 >= 4
    mask[1] = False
    return pruning.shrink(pruning.apply_masks(world.model, {"5.weight": mask}), SHAPE)


def _refused(call: Callable[[], object]) -> str:
    try:
        call()
    except pathlift.InputError as error:
        return str(error)
    raise AssertionError("this should have been refused")


def _regularised(world: World) -> object:
    regulariser = pathlift.log_path_norm(world.network, world.model)
    return regulariser.detach()  # whether it can be differentiated is for the caller's mode to say


def _prune(criterion: str, **options: Any) -> Callable[[World], object]:
    def call(world: World) -> object:
        needs = pathlift.pruning.CRITERIA[criterion].needs
        data = {"nothing": None, "inputs": world.x}.get(needs, pathlift.pruning.Batch(world.x, world.y))
        made = {"generator": world.generator} | options
        return pathlift.prune(world.network, amount=0.5, criterion=criterion, data=data, **made)

    return call


ROOMS = (
    "", ".certification", ".consequences", ".kernel", ".lifting", ".lipschitz", ".magnitude", ".metric", ".norm", ".pruning",
    ".quantisation",
    ".rescaling", ".statistics", ".storage",
)  # fmt: skip
PUBLIC = {name: value for room in ROOMS for name, value in _names(f"pathlift{room}").items()}
"""All that users find, at the top and in the packages."""

FUNCTIONS: dict[str, Callable[[World], object]] = {
    "activation_ranges": lambda w: pathlift.quantisation.activation_ranges(w.network, data=w.x),
    "activation_statistics": lambda w: pathlift.activation_statistics(w.network, correlations="channels"),
    "align": lambda w: pathlift.align(w.network, w.groups.randomize(generator=w.generator)),
    "apply_masks": lambda w: pathlift.pruning.apply_masks(w.model, w.masks),
    "attack": lambda w: pathlift.attack(w.network, w.x, pathlift.Relative(0.1), 0.01, steps=2, generator=w.generator),
    "box_path_metric": lambda w: pathlift.consequences.box_path_metric(w.network, r=0.1),
    "layer_sensitivities": lambda w: pathlift.quantisation.layer_sensitivities(w.network, data=w.x),
    "bits_needed": lambda w: pathlift.quantisation.bits_needed(w.network, 0.1),
    "capture": lambda w: pathlift.capture(w.model, SHAPE),
    "certify": lambda w: pathlift.certify(w.network, w.x, pathlift.Relative(1e-3)),
    "certified_radius": lambda w: pathlift.certification.certified_radius(w.network, w.x, radii=[0.001, 0.01, 0.1]),
    "check_support": lambda w: pathlift.check_support(nn.Sequential(w.model, nn.GELU()), SHAPE),
    "equivalent": lambda w: pathlift.equivalent(w.network, w.groups.randomize(generator=w.generator)),
    "expected_bound": lambda w: pathlift.lipschitz.expected_bound(w.network, w.near, [w.x]),
    "generalisation_bound": lambda w: pathlift.consequences.generalisation_bound(w.network, samples=100),
    "gradient_norms": lambda w: pathlift.lipschitz.gradient_norms(w.network, w.x),
    "input_lipschitz": lambda w: pathlift.lipschitz.input_lipschitz(w.network),
    "lipschitz_bound": lambda w: pathlift.lipschitz_bound(w.network, w.near, w.x),
    "default_shape": lambda w: storage.default_shape("torchvision:resnet18"),
    "from_torch_prune": lambda w: pruning.from_torch_prune(pruning.to_torch_prune(w.model, w.masks)),
    "importance_scores": lambda w: list(pruning.importance_scores(w.model, w.weights()).values()),
    "keep_masks": lambda w: _step(w, lambda o, m: _kept(w, o, m)),
    "load_masks": _loaded,
    "load_model": lambda w: pathlift.load_model("torch.nn:Linear", arguments={"in_features": 2, "out_features": 3}),
    "load_quantized": _rounding_loaded,
    "load_state": lambda w: storage.load_state(w.file),
    "log_path_norm": _regularised,
    "path_kernel": lambda w: pathlift.path_kernel([w.network, w.near, w.file]),
    "path_lifting": lambda w: pathlift.path_lifting(w.model, SHAPE, w.one),
    "path_magnitude": lambda w: pathlift.path_magnitude(w.network),
    "path_metric": lambda w: pathlift.path_metric(w.network, w.far, moments=2, tighten=2, estimate=4),
    "path_metric_bounds": lambda w: pathlift.metric.path_metric_bounds(w.network, w.far),
    "path_metrics": lambda w: list(pathlift.path_metrics(w.network, [w.near, w.file])),
    "path_norm": lambda w: pathlift.path_norm(w.network),
    "path_norms": lambda w: list(pathlift.path_norms(w.network, [w.near, w.file], q=2)),
    "prune": _prune("relative_path_magnitude"),
    "quantize": lambda w: pathlift.quantize(w.network, bits=4, moments=0, data=w.x, sequential=True),
    "synthetic_inputs": lambda w: pathlift.synthetic_inputs(w.network, count=2, steps=2, generator=w.generator),
    "rescaling_distance": lambda w: pathlift.rescaling.rescaling_distance(w.groups, w.groups.normalize()),
    "save": lambda w: (pathlift.save(w.network, w.folder / "m.pt"), (w.folder / "m.pt").read_bytes())[1],
    "save_masks": _saved,
    "save_onnx": _onnx_written,
    "save_tensors": lambda w: storage.save_tensors(w.near, w.folder / "near.safetensors"),
    "sharpness": lambda w: pathlift.consequences.sharpness(w.network, w.x, w.y, 0.1, steps=2),
    "shrink": _shrunk,
    "stream": _streamed,
    "symmetries": lambda w: pathlift.symmetries(w.network),
    "to_semi_structured": lambda w: _refused(lambda: pruning.to_semi_structured(w.model)),  # its layers have no 2:4 weights
    "to_torch_prune": lambda w: pruning.to_torch_prune(w.model, w.masks),
    "unit_path_magnitude": lambda w: pathlift.unit_path_magnitude(w.network),
    "with_state": lambda w: pathlift.rescaling.with_state(w.model, w.far),
}
"""One call of each function of `PUBLIC`."""

METHODS: dict[str, Callable[[World], object]] = {
    "Symmetries.at": lambda w: w.groups.at(w.network.state),
    "Symmetries.balance": lambda w: w.groups.balance(),
    "Symmetries.channel_groups": lambda w: w.groups.channel_groups("0"),
    "Symmetries.condition": lambda w: w.groups.condition(),
    "Symmetries.equalize": lambda w: w.groups.equalize(),
    "Symmetries.normalize": lambda w: w.groups.normalize(),
    "Symmetries.randomize": lambda w: w.groups.randomize(generator=w.generator),
    "Symmetries.rescale": lambda w: w.groups.rescale([2.0] * len(w.groups)),
    "Symmetries.weight_factors": lambda w: w.groups.weight_factors([2.0] * len(w.groups)),
    "PathMetric.tighten": lambda w: pathlift.path_metric(w.network, w.far).tighten(2),
    "PathMetric.estimate": lambda w: pathlift.path_metric(w.network, w.far).estimate(4),
    "PathKernel.coordinates": lambda w: pathlift.path_kernel([w.network, w.near, w.file]).coordinates(),
    "Criterion.scores": lambda w: pruning.CRITERIA["wanda"].scores(w.network, w.x),
    "MaskHandle.remove": lambda w: _step(w, lambda o, m: _kept(w, o, m).remove()),
    "NofM.holds": lambda w: pruning.NofM(2, 4).holds(torch.eye(4, device="cpu")),
    "NofM.fits": lambda w: pruning.NofM(2, 4).fits(torch.ones(4, 4, device="cpu")),
    "ScorePruning.compute_mask": lambda w: pruning.ScorePruning(0.5).compute_mask(
        w.one[0, 0, 0], torch.ones_like(w.one[0, 0, 0])
    ),
    "PathLifting.reconstruction": lambda w: pathlift.path_lifting(w.model, SHAPE, w.one).reconstruction(),
    "Absolute.intervals": lambda w: pathlift.Absolute(0.1).intervals(w.network),
    "Pruned.intervals": lambda w: pathlift.Pruned(0.1).intervals(w.network),
    "Relative.intervals": lambda w: pathlift.Relative(0.1).intervals(w.network),
    "QuantizeReport.save": lambda w: _rounding_loaded(w),
    "QuantizeReport.table": lambda w: pathlift.quantize(w.network, bits=4, moments=0)[1].table(),
    "SameGrid.intervals": lambda w: pathlift.quantize(w.network, bits=4, moments=0)[1].tolerance.intervals(w.network),
    "Rounding.grid": lambda w: pathlift.Rounding(8).grid(w.network),
    "Tolerance.grid": lambda w: pathlift.Relative(0.1).grid(w.network),
    "SameGrid.grid": lambda w: pathlift.quantize(w.network, bits=4, moments=0)[1].tolerance.grid(w.network),
    "Rounding.intervals": lambda w: pathlift.Rounding(8).intervals(w.network),
    "GeneralisationBound.vacuous": lambda w: pathlift.consequences.generalisation_bound(w.network, samples=100).vacuous(1.0),
    "Batch.split": lambda w: list(pathlift.pruning.Batch(w.x, w.y).split(2)),
    "Checkpoint": lambda w: pathlift.storage.Checkpoint(w.file),
}
"""One call of each public method of the classes of `PUBLIC`."""

INTERNAL = {
    "Tolerance.intervals",
    "Batch.loss",
    "Network.named",
    "Network.remembered",
    "Network.memory",
    "Network.kind_of",
    "Network.values",
    "Network.with_memory_of_its_own",
    "Criterion.selection",
}
"""Methods that another of these calls, or that have no work of their own."""

OPTIONS: dict[str, Callable[[World], object]] = {
    "capture of a Network": lambda w: pathlift.capture(w.network),
    "path_norm of a module": lambda w: pathlift.path_norm(w.model, SHAPE, q=2),
    "path_magnitude at x": lambda w: pathlift.path_magnitude(w.network, x=w.x),
    "save a program": lambda w: pathlift.save(w.network, w.folder / "m.pt2"),
    "path_metric q=2": lambda w: pathlift.path_metric(w.network, w.near, q=2),
    "certify a rounding": lambda w: pathlift.certify(w.network, w.x, pathlift.Rounding(8), 0.01),
    "training.path_sgd": lambda w: _step(w, lambda o, m: training.path_sgd(o, pathlift.capture(m, SHAPE))),
    "training.rescale_after_steps": lambda w: _step(
        w, lambda o, m: training.rescale_after_steps(o, pathlift.symmetries(m, SHAPE), pathlift.rescaling.Symmetries.balance)
    ),
    "prune with an update": _prune("lamp", update="compensate"),
    "prune with an update by data": _prune("wanda", update="compensate"),
    **{f"prune by {name}": _prune(name, steps=2 if name == "synflow" else None) for name in pathlift.pruning.CRITERIA},
}
"""Further calls, that run other code."""

CALLS = FUNCTIONS | METHODS | OPTIONS


# --------------------------------------------------------------------------------------------------------- what was found


def contents(value: Any, inside: bool = False) -> Any:
    """Return all that a result shows, as plain values that are equal when every bit is; no tensor may be of inference mode."""
    if isinstance(value, Tensor):
        assert not value.is_inference(), "a tensor of inference mode came out"
        numbers = None if value.is_meta else value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), numbers, value.requires_grad
    if isinstance(value, pathlift.Network):
        return repr(value), contents(dict(value.state)), value.graph.examples, [weight.label for weight in value.weights]
    if isinstance(value, nn.Module):
        return contents(value.state_dict()), [module.training for module in value.modules()]
    if isinstance(value, pathlift.rescaling.Symmetries):
        return str(value), repr(value)
    if isinstance(value, pathlift.storage.Checkpoint):
        return contents(dict(value))
    if isinstance(value, Mapping):
        held = [
            (name, contents(attribute))
            for name, attribute in getattr(value, "__dict__", {}).items()
            if not name.startswith("_")
        ]
        return [(key, contents(item)) for key, item in value.items()], held
    if isinstance(value, (list, tuple, type({}.values()))):
        return [contents(item) for item in value]
    if isinstance(value, pathlift.metric.Step):
        return [contents(getattr(value, field.name)) for field in dataclasses.fields(value) if field.name != "seconds"]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += [] if inside else [name for name, attribute in vars(type(value)).items() if isinstance(attribute, property)]
        return [(name, contents(_shown(value, name), True)) for name in names]
    return getattr(value, "__qualname__", None) or repr(value)


def _shown(value: object, name: str) -> object:
    try:
        return getattr(value, name)
    except AttributeError:  # a property that this result has not
        return None


# ------------------------------------------------------------------------------------------------------------ circumstances


class _Function(TorchFunctionMode):
    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def switched(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def _numpy() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield


def _dtype(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: switched(torch.get_default_dtype, torch.set_default_dtype, dtype)


CIRCUMSTANCES: dict[str, Callable[[], Any]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype float64": _dtype(torch.float64),
    "default dtype float16": _dtype(torch.float16),
    "default dtype bfloat16": _dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "default device set to meta": lambda: switched(lambda: None, torch.set_default_device, "meta"),
    "deterministic algorithms": lambda: switched(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "medium precision": lambda: switched(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "anomaly detection": torch.autograd.detect_anomaly,
    "warnings as errors": _errors,
    "numpy raises": _numpy,
    "a function mode": _Function,
    "a dispatch mode": _Dispatch,
    "a fake mode": FakeTensorMode,
    "saved tensors elsewhere": torch.autograd.graph.save_on_cpu,
}
"""What a caller may have around a call."""


# ------------------------------------------------------------------------------------------------------ state of the process


def backends() -> dict[str, Any]:
    """Every switch of PyTorch's backends that can be read here."""
    switches: Any = torch.backends
    values = {
        f"{part}.{name}": getattr(getattr(switches, part), name)
        for part, name in itertools.product(("cudnn", "mkldnn"), ("enabled", "deterministic", "allow_tf32"))
        if hasattr(getattr(switches, part), name)
    }
    for dotted in ("cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul", "cudnn.rnn"):
        with contextlib.suppress(AttributeError):
            first, second = dotted.split(".")
            values[dotted] = getattr(getattr(switches, first), second).fp32_precision
    return values


def process_wide() -> dict[str, Any]:
    """The state that all threads share, and that no call may change even while it runs."""
    known = logging.Logger.manager.loggerDict
    loggers = [logging.getLogger(), *(logger for logger in known.values() if isinstance(logger, logging.Logger))]
    loggers = [logger for logger in loggers if logger.name != "torch.__trace"]  # gives up a handler with its first words
    return {
        "default dtype": torch.get_default_dtype(),
        "stdout": id(sys.stdout),
        "stderr": id(sys.stderr),
        "warning filters": list(warnings.filters),
        "showwarning": id(warnings.showwarning),
        "loggers": {
            logger.name: (logger.level, logger.disabled, logger.propagate, list(map(id, logger.handlers)))
            for logger in loggers
            if (logger.level or logger.handlers or logger.disabled or not logger.propagate)
            and logger.name != "torch.__trace"  # its first words
        },
        "logging": logging.root.manager.disable,
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)},
        "environment": dict(os.environ),
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_debug()),
        "recursion": sys.getrecursionlimit(),
        "folder": os.getcwd(),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook),
        "anomaly": torch.is_anomaly_enabled(),
        "interval": sys.getswitchinterval(),
    }


def generators() -> dict[str, Any]:
    """The states of the sources of random numbers."""
    return {"torch": torch.get_rng_state().tolist(), "python": random.getstate(), "numpy": str(np.random.get_state())}  # noqa: NPY002


def own_thread() -> dict[str, Any]:
    """The state that each thread has for itself."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "device": str(torch.get_default_device()),
        "trace": (sys.gettrace(), sys.getprofile()),
        "modes": torch.utils._python_dispatch._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "numpy": np.geterr(),
        "flush": torch.tensor([1e-42]).mul(1.0).item() if torch.get_default_device().type == "cpu" else None,
    }


def state_of_the_process() -> dict[str, Any]:
    """All of it."""
    return (
        process_wide()
        | generators()
        | own_thread()
        | {"backends": backends(), "precision": torch.get_float32_matmul_precision()}
    )


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What has changed; loggers that PyTorch made meanwhile are no change."""
    changed = {name: (value, after[name]) for name, value in before.items() if value != after[name]}
    if "loggers" in changed:
        one, two = changed.pop("loggers")
        changed |= {name: (value, two.get(name)) for name, value in one.items() if value != two.get(name)}
    return changed


# ------------------------------------------------------------------------------------------------------------------- memory


def storages(value: object) -> dict[int, Tensor]:
    """Find every tensor that an object keeps alive, by the address of its storage; classes and modules are not looked into."""
    tensors: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType)):
            continue
        seen.add(id(item))
        if isinstance(item, types.FunctionType):
            waiting += [item.__closure__, item.__defaults__, item.__dict__]
            continue
        if isinstance(item, Tensor) and not item.is_meta and item.numel():
            tensors[item.untyped_storage().data_ptr()] = item
        waiting += gc.get_referents(item)
    return tensors


def live_tensors() -> int:
    """How many tensors there are."""
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


# --------------------------------------------------------------------------------------------------------------- interrupts


def interrupted(work: Callable[[], object], line: int) -> int:
    """Call a function and raise KeyboardInterrupt when this thread is about to run its so many-th line of pathlift.

    Args:
        work: The function.
        line: Which line; 0 only counts.

    Returns:
        The number of lines when the function came to its end first, −1 after the interrupt.
    """
    count = 0
    inside = str(Path(pathlift.__file__).parent)

    def trace(frame: types.FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(inside):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return -1
    finally:
        sys.settrace(before)
    return count
