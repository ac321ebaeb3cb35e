"""Models by name, weights from files, results to files: what the command line needs.

A model is named ``torchvision:resnet18``, ``timm:resnet50``, ``package.module:factory``, or is a ``.onnx`` or ``.pt2`` file.
Weights are read with safetensors or ``torch.load(weights_only=True)``; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pathlift.errors import InputError, MismatchError, name_differences, nearest

DEFAULT_SHAPE = (3, 224, 224)


def load_model(name: str, weights: Path | None = None, seed: int = 0) -> nn.Module:
    """Build a model from its name.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory`` (a callable without arguments, or a module
            object), or the path of an ``.onnx`` or ``.pt2`` file.
        weights: A state-dict file to load into it.
        seed: Seed of the random initial weights when there is no such file.

    Returns:
        The model.

    Raises:
        InputError: The name is not known, a package is missing, or a file cannot be read.
    """
    torch.manual_seed(seed)
    suffix = Path(name).suffix.lower()
    if suffix == ".onnx":
        model = _from_onnx(Path(name))
    elif suffix == ".pt2":
        model = _from_export(Path(name))
    else:
        library, colon, entry = name.partition(":")
        if not colon or not entry:
            raise InputError(
                f"'{name}' names no model. Expected torchvision:NAME, timm:NAME, package.module:factory, or a .onnx or .pt2 "
                "file."
            )
        if library == "torchvision":
            model = _from_torchvision(entry)
        elif library == "timm":
            model = _from_timm(entry)
        else:
            model = _from_factory(library, entry)
    if weights is not None:
        _load_into(model, weights)
    return model


def default_shape(name: str) -> tuple[int, ...]:
    """Return the input shape that a named model expects.

    Args:
        name: As for `load_model`.

    Returns:
        Shape without the batch dimension.

    Raises:
        InputError: The model's name does not tell.
    """
    library, _, entry = name.partition(":")
    if library == "torchvision":
        return (3, 299, 299) if entry == "inception_v3" else DEFAULT_SHAPE
    if library == "timm":
        timm = package("timm", "timm")
        config = timm.get_pretrained_cfg(entry)
        return DEFAULT_SHAPE if config is None else tuple(config.input_size)
    raise InputError(f"The input shape of '{name}' is not known. Give it with --shape, for example --shape 3,224,224.")


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a state-dict from a file, without ever running code from it.

    Args:
        path: A ``.safetensors`` file, or a file written by ``torch.save``.

    Returns:
        Name to tensor.

    Raises:
        InputError: The file is missing, unreadable, malicious or holds something else than tensors by name.
    """
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        if path.suffix == ".safetensors":
            found: object = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"'{path}' is not a plain state-dict: it holds code or objects, which are never loaded. "
            "Save model.state_dict() with torch.save or safetensors."
        ) from error
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        OSError,
        UnicodeDecodeError,
        AttributeError,
    ) as error:
        reason = next(iter(str(error).splitlines()), "the file ends too early")
        raise InputError(f"'{path}' cannot be read as a state-dict: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"'{path}' holds no mapping from names to tensors. Save model.state_dict().")
    return {str(name): value for name, value in found.items()}


def check_target(path: Path | None) -> None:
    """Refuse a file that `save_tensors` would not write, before anything is computed for it.

    Args:
        path: Where; None for nowhere.

    Raises:
        InputError: It is no .safetensors file.
    """
    if path is not None and path.suffix != ".safetensors":
        raise InputError(f"--out must end in .safetensors, found '{path}'.")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, all or nothing.

    Args:
        tensors: Name to tensor.
        path: Where.

    Raises:
        InputError: The file cannot be written.
    """
    check_target(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"'{path}' cannot be written: {error}") from error


def package(name: str, extra: str) -> types.ModuleType:
    """Import a package that comes with an extra.

    Args:
        name: The module.
        extra: Which extra of pathlift brings it.

    Returns:
        The module.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = name.partition(".")[0]
        raise InputError(f"The package '{missing}' is not installed. Run: pip install 'pathlift[{extra}]'") from error


def _from_torchvision(entry: str) -> nn.Module:
    models = package("torchvision.models", "vision")
    if entry not in models.list_models():
        raise InputError(f"torchvision has no model '{entry}'.{nearest(entry, models.list_models())}")
    options: dict[str, object] = {"weights": None}
    builder = models.get_model_builder(entry)
    if "init_weights" in builder.__code__.co_varnames or entry in {"googlenet", "inception_v3"}:
        options["init_weights"] = False
    model: nn.Module = models.get_model(entry, **options)
    return model


def _from_timm(entry: str) -> nn.Module:
    timm = package("timm", "timm")
    if not timm.is_model(entry):
        raise InputError(f"timm has no model '{entry}'.{nearest(entry, timm.list_models())}")
    model: nn.Module = timm.create_model(entry, pretrained=False)
    return model


def _from_factory(module: str, entry: str) -> nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: object = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"The module '{module}' cannot be imported: {error}") from error
    for part in entry.split("."):
        if not hasattr(found, part):
            raise InputError(f"The module '{module}' has no '{entry}'.")
        found = getattr(found, part)
    model = found if isinstance(found, nn.Module) else found() if callable(found) else None
    if not isinstance(model, nn.Module):
        raise InputError(f"'{module}:{entry}' gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _from_onnx(path: Path) -> nn.Module:
    onnx2torch = package("onnx2torch", "onnx")
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        model: nn.Module = onnx2torch.convert(str(path))
    except Exception as error:
        raise InputError(f"'{path}' cannot be converted from ONNX: {type(error).__name__}: {error}") from error
    return model


def _from_export(path: Path) -> nn.Module:
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        module: nn.Module = torch.export.load(path).module()
    except Exception as error:
        raise InputError(f"'{path}' is not a readable exported program: {type(error).__name__}: {error}") from error
    return module


def _load_into(model: nn.Module, path: Path) -> None:
    state = load_state(path)
    own = model.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].shape != tensor.shape:
            raise MismatchError(
                f"'{name}' has shape {tuple(tensor.shape)} in '{path}' and {tuple(own[name].shape)} in the model."
            )
    missing, surplus = [name for name in own if name not in state], [name for name in state if name not in own]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or surplus:
        difference = name_differences(missing, surplus, "the model")
        raise MismatchError(f"'{path}' does not fit the model. {difference}.")
    model.load_state_dict(state, strict=False)
