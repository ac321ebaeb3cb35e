"""Models by name, weights from files, results to files: what the command line needs.

A model is named ``torchvision:resnet18``, ``timm:resnet50``, ``hf:folder``, ``package.module:factory``, or is a ``.onnx`` or
``.pt2`` file.
Weights are read without running code; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import json
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pathlift.arguments import public
from pathlift.arguments.common import Randomness, source_of
from pathlift.errors import InputError, MismatchError, name_differences, nearest, one_line
from pathlift.output import check_outputs, tensor_writer, write_outputs
from pathlift.storage.checkpoints import Checkpoint
from pathlift.storage.names import BESIDE, bare, fit
from pathlift.storage.onnx import input_shapes, read_onnx
from pathlift.storage.packages import package
from pathlift.storage.programs import Shapes, program_inputs, read_program
from pathlift.storage.sizes import HEADER_BYTES

DEFAULT_SHAPE = (3, 224, 224)

FOLDER = "hf:"
"""What the name of a folder begins with that transformers wrote."""


@public
def load_model(
    name: str,
    weights: Path | str | Checkpoint | None = None,
    *,
    arguments: Mapping[str, object] | None = None,
    generator: Randomness = 0,
    trust: bool = False,
    key: str | None = None,
) -> nn.Module:
    """Build a model from its name.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory`` (a callable, or a module object), the path of an
            ``.onnx`` or ``.pt2`` file, or ``hf:FOLDER``: a folder with the ``config.json`` of an image classifier of
            transformers, and its weights.
        weights: A file or folder of weights to load into it, see `Checkpoint`, or one that is open.
        arguments: Keyword arguments of the builder, such as ``num_classes``.
        generator: Source of randomness of the initial weights, on the CPU, or a seed.
        trust: Load a ``.pt2`` file too. PyTorch runs code from it, as from a Python module: whoever wrote it can do anything.
        key: Which of several sets of weights in the file, see `Checkpoint`.

    Returns:
        The model.

    Raises:
        InputError: The name is not known, a package is missing, a file cannot be read or is not trusted, or the builder fails.
        MismatchError: The weights are those of another model.
    """
    if key is not None and weights is None and not name.startswith(FOLDER):
        raise InputError("key has no effect without weights: leave it out.")
    if key is not None and isinstance(weights, Checkpoint):
        raise InputError("key has no effect with a Checkpoint, which has its own: leave it out.")
    with _drawing_from(source_of(generator)):
        return _loaded(name, weights, arguments or {}, trust=trust, key=key)


@contextmanager
def _drawing_from(source: torch.Generator) -> Iterator[None]:
    """Let PyTorch draw from a generator on the CPU, as modules do when they are made, and then from its own as before."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(source.get_state())
        yield
        source.set_state(torch.get_rng_state())


def _loaded(
    name: str, weights: Path | str | Checkpoint | None, arguments: Mapping[str, object], *, trust: bool, key: str | None
) -> nn.Module:
    suffix = Path(name).suffix.lower()
    if suffix in {".onnx", ".pt2"}:
        if arguments:
            raise InputError(f"'{name}' is a file, which takes no arguments; found {', '.join(arguments)}.")
        model = read_onnx(Path(name)) if suffix == ".onnx" else read_program(Path(name), trust=trust)
    elif name.startswith(FOLDER):
        folder = Path(name.removeprefix(FOLDER))
        model = _from_folder(folder, arguments)
        hollow = any(parameter.is_meta for parameter in model.parameters())
        weights = folder if weights is None and not hollow else weights
    else:
        library, _, entry = name.partition(":")
        if not all(library.split(".")) or not entry or {os.sep, os.altsep} & set(library):
            raise InputError(
                f"'{name}' names no model. Expected torchvision:NAME, timm:NAME, hf:FOLDER, package.module:factory, or a .onnx "
                "or .pt2 file."
            )
        if Path(library).is_file():
            raise InputError(f"'{library}' is a file. Name the module in it: {Path(library).stem}:{entry}.")
        model = _built(name, _builder(library, entry), arguments)
    if weights is not None:
        checkpoint = weights if isinstance(weights, Checkpoint) else Checkpoint(weights, key=key)
        _load_into(model, checkpoint, "num_labels" if name.startswith(FOLDER) else "num_classes")
    return model


@public
def default_shape(name: str) -> Shapes:
    """Return the input shape that a named model expects. Nothing in a file is run.

    Args:
        name: As for `load_model`.

    Returns:
        Shape without the batch dimension; for a file with several inputs their shapes, in the containers that it takes.

    Raises:
        InputError: The model's name does not tell.
    """
    suffix = Path(name).suffix.lower()
    if suffix in {".onnx", ".pt2"}:
        return input_shapes(Path(name)) if suffix == ".onnx" else program_inputs(Path(name))
    library, _, entry = name.partition(":")
    if library == "torchvision":
        return (3, 299, 299) if entry == "inception_v3" else DEFAULT_SHAPE
    if library == "timm":
        timm = package("timm", "timm")
        config = timm.get_pretrained_cfg(entry)
        return DEFAULT_SHAPE if config is None else tuple(config.input_size)
    if name.startswith(FOLDER) and (shape := _shape_of_folder(Path(name.removeprefix(FOLDER)))) is not None:
        return shape
    raise InputError(f"The input shape of '{name}' is not known. Give it with --shape, for example --shape 3,224,224.")


@public
def load_state(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read a state-dict from a file, without ever running code from it or unfolding it beyond its size.

    Args:
        path: A file or folder of weights, see `Checkpoint`.
        key: Which of several sets of weights in it, see `Checkpoint`.

    Returns:
        Name to tensor: dense, with values, of floating-point numbers of at most 64 bits, whole numbers or truth values.

    Raises:
        InputError: The file is missing, unreadable, malicious or holds something else than such tensors by name.
    """
    checkpoint = Checkpoint(path, key=key)
    if not checkpoint:
        raise InputError(f"'{path}' holds no mapping from names to tensors. Save model.state_dict().")
    return {name: checkpoint[name] for name in checkpoint}


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
        named: object = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"The module '{module}' cannot be imported: {one_line(error)}") from error
    try:
        named = operator.attrgetter(entry)(named)
    except AttributeError as error:
        raise InputError(f"The module '{module}' has no '{entry}'.") from error
    except (Exception, SystemExit) as error:  # a lazy attribute of the module
        raise InputError(f"'{module}:{entry}' cannot be read: {one_line(error)}") from error
    if not isinstance(named, nn.Module) and not callable(named):
        expected = "not a torch.nn.Module or a function that makes one"
        raise InputError(f"'{module}:{entry}' is a {type(named).__name__}, {expected}.")
    return named


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
        raise InputError(f"'{name}' cannot be built: {one_line(error)}") from error
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


def _from_folder(folder: Path, arguments: Mapping[str, object]) -> nn.Module:
    """Build an image classifier of transformers by what its folder says: no code in it is run, nothing is downloaded."""
    transformers = package("transformers", "transformers")
    _settings(folder / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **arguments)
        config.return_dict = False
        model: nn.Module = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"'{FOLDER}{folder}' cannot be built as an image classifier of transformers: {one_line(error)}"
        ) from error
    return model


def _settings(file: Path) -> dict[str, object]:
    if not file.is_file():
        raise InputError(f"There is no file '{file}', which tells what the model is.")
    try:
        with file.open("rb") as opened:
            settings = json.loads(opened.read(HEADER_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{file}' is damaged: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise InputError(f"'{file}' is damaged: it holds no JSON object.")
    return settings


def _shape_of_folder(folder: Path) -> tuple[int, ...] | None:
    """Return the shape of the pictures that a folder of transformers speaks of."""
    config, preparation = _settings(folder / "config.json"), folder / "preprocessor_config.json"
    prepared = _settings(preparation) if preparation.is_file() else {}
    size = prepared.get("crop_size") or prepared.get("size") or config.get("image_size")
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = [size.get("height", edge), size.get("width", edge)]
    sizes = [config.get("num_channels", 3), *(size if isinstance(size, list) else [size, size])]
    shape = tuple(size for size in sizes if isinstance(size, int) and size > 0)
    return shape if len(shape) == len(sizes) else None


def _load_into(model: nn.Module, checkpoint: Checkpoint, classes: str) -> None:
    path = checkpoint.path
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    fitting = fit(tensors, checkpoint.specs, tensors.get, model)
    recipes = fitting.recipes
    given = {name: recipe(checkpoint.specs) for name, recipe in recipes.items()}
    _check_sizes(path, tensors, given, classes)
    shared = {id(tensors[name]) for name in given if name in tensors}
    missing = [name for name in tensors if id(tensors[name]) not in shared and name.rpartition(".")[2] not in BESIDE]
    surplus = [name for name in given if name not in tensors and bare(name).rpartition(".")[2] not in BESIDE]
    if missing or surplus:
        difference = name_differences(missing, surplus, "the model")
        raise MismatchError(f"'{path}' does not fit the model. {difference}.{_choice(missing, surplus, fitting.prefix)}")
    fitting.tell(path)
    try:
        model.load_state_dict({name: recipe(checkpoint) for name, recipe in recipes.items() if name in tensors}, strict=False)
    except RuntimeError as error:
        raise MismatchError(f"'{path}' does not fit the model: {' '.join(str(error).split())}") from error


def _check_sizes(path: Path, tensors: Mapping[str, Tensor], given: Mapping[str, Tensor], classes: str) -> None:
    """Refuse tensors of other shapes; where only a last layer has another size, say which number of classes would do."""
    wrong = [
        name for name, tensor in given.items()
        if name in tensors and not is_lazy(tensors[name]) and tensors[name].shape != tensor.shape
    ]  # fmt: skip
    if not wrong:
        return
    name = wrong[0]
    first, second = given[name].shape, tensors[name].shape
    message = f"'{name}' has shape {tuple(first)} in '{path}' and {tuple(second)} in the model."
    layers = {name.rpartition(".")[0] for name in wrong}
    if len(layers) == 1 and first and all(given[name].shape[1:] == tensors[name].shape[1:] for name in wrong):
        message += (
            f" The layer '{layers.pop()}' has {first[0]} outputs in the file and {second[0]} in the model: if they "
            f"are classes, build the model so: --model-arg {classes}={first[0]}."
        )
    else:
        message += f" If the model can be built with other sizes, say so: --model-arg {classes}=10, for example."
    raise MismatchError(message)


def _choice(missing: list[str], surplus: list[str], prefix: str) -> str:
    """Say how to choose when the names of the model are there behind one beginning, and others beside them."""
    beginnings = {name[: -len(missing[0])] for name in surplus if missing and name.endswith(f".{missing[0]}")}
    fitting = [first for first in sorted(beginnings) if all(first + name in surplus for name in missing)]
    if prefix and not missing:
        fitting = [prefix]
    if not fitting:
        return ""
    return f" If those are meant whose names begin with {' or '.join(fitting)}, say so: --key {fitting[0].rstrip('.')}."
