"""Models by name, weights from files, results to files: what the command line needs.

A model is named ``torchvision:resnet18``, ``timm:resnet50``, ``package.module:factory``, or is a ``.onnx`` or ``.pt2`` file.
Weights are read with safetensors or ``torch.load(weights_only=True)``; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pathlift.arguments import public
from pathlift.errors import InputError, MismatchError, name_differences, nearest, told
from pathlift.output import check_outputs, tensor_writer, write_outputs
from pathlift.storage.checkpoints import check_unfolding, load_plain
from pathlift.storage.onnx import input_shapes, read_onnx
from pathlift.storage.packages import package

DEFAULT_SHAPE = (3, 224, 224)

DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
})  # fmt: skip
"""What a state-dict may hold."""


@public
def load_model(
    name: str,
    weights: Path | None = None,
    seed: int = 0,
    arguments: Mapping[str, object] | None = None,
    *,
    trust: bool = False,
) -> nn.Module:
    """Build a model from its name.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory`` (a callable, or a module object), or the path of
            an ``.onnx`` or ``.pt2`` file.
        weights: A state-dict file to load into it.
        seed: Seed of the random initial weights when there is no such file.
        arguments: Keyword arguments of the builder, such as ``num_classes``.
        trust: Load a ``.pt2`` file too. PyTorch runs code from it, as from a Python module: whoever wrote it can do anything.

    Returns:
        The model.

    Raises:
        InputError: The name is not known, a package is missing, a file cannot be read or is not trusted, or the builder fails.
        MismatchError: The weights are those of another model.
    """
    try:
        torch.manual_seed(seed)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"The seed must be a whole number of at most 64 bits, found {seed!r}.") from error
    suffix = Path(name).suffix.lower()
    if suffix in {".onnx", ".pt2"}:
        if arguments:
            raise InputError(f"'{name}' is a file, which takes no arguments; found {', '.join(arguments)}.")
        model = read_onnx(Path(name)) if suffix == ".onnx" else _from_export(Path(name), trust=trust)
    else:
        library, _, entry = name.partition(":")
        if not all(library.split(".")) or not entry or {os.sep, os.altsep} & set(library):
            raise InputError(
                f"'{name}' names no model. Expected torchvision:NAME, timm:NAME, package.module:factory, or a .onnx or .pt2 "
                "file."
            )
        if Path(library).is_file():
            raise InputError(f"'{library}' is a file. Name the module in it: {Path(library).stem}:{entry}.")
        model = _built(name, _builder(library, entry), arguments or {})
    if weights is not None:
        _load_into(model, weights)
    return model


@public
def default_shape(name: str) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """Return the input shape that a named model expects.

    Args:
        name: As for `load_model`.

    Returns:
        Shape without the batch dimension; a tuple of shapes for an ``.onnx`` file with several inputs.

    Raises:
        InputError: The model's name does not tell.
    """
    if Path(name).suffix.lower() == ".onnx":
        return input_shapes(Path(name))
    library, _, entry = name.partition(":")
    if library == "torchvision":
        return (3, 299, 299) if entry == "inception_v3" else DEFAULT_SHAPE
    if library == "timm":
        timm = package("timm", "timm")
        config = timm.get_pretrained_cfg(entry)
        return DEFAULT_SHAPE if config is None else tuple(config.input_size)
    raise InputError(f"The input shape of '{name}' is not known. Give it with --shape, for example --shape 3,224,224.")


@public
def load_state(path: Path) -> dict[str, Tensor]:
    """Read a state-dict from a file, without ever running code from it or unfolding it beyond its size.

    Args:
        path: A ``.safetensors`` file, or a file written by ``torch.save``.

    Returns:
        Name to tensor: dense, with values, of a dtype of `DTYPES`.

    Raises:
        InputError: The file is missing, unreadable, malicious or holds something else than such tensors by name.
    """
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        found: object = _read(path)
    except InputError as error:
        raise InputError(f"'{path}' cannot be read as a state-dict: {error}") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"'{path}' is not a plain state-dict: it holds code or objects, which are never loaded. "
            "Save model.state_dict() with torch.save or safetensors."
        ) from error
    except Exception as error:  # the bytes of a stranger: whatever reading them raises, they cannot be read
        raise InputError(f"'{path}' cannot be read as a state-dict: {told(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"'{path}' holds no mapping from names to tensors. Save model.state_dict().")
    for name, value in found.items():
        _check_plain(path, str(name), value)
    return {str(name): value for name, value in found.items()}


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    return load_plain(path)


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is no array of numbers."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        raise InputError(f"'{name}' in '{path}' has no values: it was saved on the meta device.")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise InputError(f"'{name}' in '{path}' is no dense tensor ({layout}). Save it with .to_dense().")
    if tensor.dtype not in DTYPES:
        expected = "floating-point numbers of 16, 32 or 64 bits, whole numbers or truth values"
        raise InputError(f"'{name}' in '{path}' has dtype {kind}; expected {expected}. Convert it, with .float() say.")
    try:
        check_unfolding(tensor.untyped_storage().nbytes(), tensor.nbytes)
    except InputError as error:
        raise InputError(f"'{name}' in '{path}' cannot be read: {error}") from error


@public
def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, all or nothing; a file that is there is replaced.

    Args:
        tensors: Name to tensor.
        path: Where.

    Raises:
        InputError: The file cannot be written.
    """
    check_outputs({"The file": path}, replace=True)
    write_outputs({path: tensor_writer(tensors)}, replace=True)


def _builder(library: str, entry: str) -> Callable[..., object] | nn.Module:
    if library == "torchvision":
        return _torchvision_builder(entry)
    return _timm_builder(entry) if library == "timm" else _factory(library, entry)


def _torchvision_builder(entry: str) -> Callable[..., object]:
    models = package("torchvision.models", "vision")
    if entry not in models.list_models():
        raise InputError(f"torchvision has no model '{entry}'.{nearest(entry, models.list_models())}")
    builder: Callable[..., object] = models.get_model_builder(entry)
    fixed: dict[str, object] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        fixed["weights_backbone"] = None  # detection and segmentation download it otherwise
    if entry in {"googlenet", "inception_v3"}:
        fixed["init_weights"] = False
    return partial(builder, **fixed)


def _timm_builder(entry: str) -> Callable[..., object]:
    timm = package("timm", "timm")
    if not timm.is_model(entry):
        raise InputError(f"timm has no model '{entry}'.{nearest(entry, timm.list_models())}")
    return partial(timm.create_model, entry, pretrained=False)


def _factory(module: str, entry: str) -> Callable[..., object] | nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: object = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"The module '{module}' cannot be imported: {told(error)}") from error
    try:
        found = operator.attrgetter(entry)(found)
    except AttributeError as error:
        raise InputError(f"The module '{module}' has no '{entry}'.") from error
    except (Exception, SystemExit) as error:  # a lazy attribute of the module
        raise InputError(f"'{module}:{entry}' cannot be read: {told(error)}") from error
    if not isinstance(found, nn.Module) and not callable(found):
        expected = "not a torch.nn.Module or a function that makes one"
        raise InputError(f"'{module}:{entry}' is a {type(found).__name__}, {expected}.")
    return found


def _built(name: str, builder: Callable[..., object] | nn.Module, arguments: Mapping[str, object]) -> nn.Module:
    """Call what makes a model; whatever goes wrong in it is told in one sentence."""
    if isinstance(builder, nn.Module):
        if arguments:
            raise InputError(f"'{name}' is a model already, which takes no arguments; found {', '.join(arguments)}.")
        return builder
    _check_arguments(name, builder, arguments)
    try:
        model = builder(**arguments)
    except (Exception, SystemExit) as error:
        raise InputError(f"'{name}' cannot be built: {told(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"'{name}' gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _check_arguments(name: str, builder: Callable[..., object], arguments: Mapping[str, object]) -> None:
    try:
        signature = inspect.signature(builder)
    except (TypeError, ValueError):  # a builtin; calling it will tell
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InputError(
            f"'{name}' cannot be called: {error}. Give its arguments as --model-arg NAME=VALUE, or name a "
            "function that needs none."
        ) from error


def _from_export(path: Path, *, trust: bool) -> nn.Module:
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    if not trust:
        raise InputError(
            f"'{path}' is a program, not only weights: PyTorch runs code from such a file while it loads it, and whoever wrote "
            "the file can do anything here. If you trust it, say so: --trust, in Python trust=True."
        )
    try:
        module: nn.Module = torch.export.load(path).module()
    except Exception as error:
        raise InputError(f"'{path}' is not a readable exported program: {told(error)}") from error
    return module


def _load_into(model: nn.Module, path: Path) -> None:
    state = load_state(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in state.items():
        if name in own and not is_lazy(own[name]) and own[name].shape != tensor.shape:
            raise MismatchError(
                f"'{name}' has shape {tuple(tensor.shape)} in '{path}' and {tuple(own[name].shape)} in the model. If the model "
                "can be built with other sizes, say so: --model-arg num_classes=10, for example."
            )
    missing, surplus = [name for name in own if name not in state], [name for name in state if name not in own]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or surplus:
        difference = name_differences(missing, surplus, "the model")
        raise MismatchError(f"'{path}' does not fit the model. {difference}.")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise MismatchError(f"'{path}' does not fit the model: {' '.join(str(error).split())}") from error
