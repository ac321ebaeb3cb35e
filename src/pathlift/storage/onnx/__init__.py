"""ONNX files as PyTorch modules: an interpreter of the file's graph, without any code made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from pathlift.errors import InputError, one_line
from pathlift.storage.downloads import check_downloaded
from pathlift.storage.onnx.file import constants, flattened, load_program, name_of, read_weights
from pathlift.storage.onnx.module import RESERVED, OnnxModule
from pathlift.storage.onnx.program import declared_inputs, read_program, source_of
from pathlift.storage.onnx.trial import compare, mark_batch
from pathlift.storage.packages import MissingPackageError
from pathlift.storage.present import check_present

Read = TypeVar("Read")


def read_onnx(path: Path, *, check: bool | None = None) -> OnnxModule:
    """Read a program.

    Args:
        path: The file.
        check: Whether to compare its outputs on random inputs with those of onnxruntime, or of onnx's own evaluator, which is
            slow, where that is not installed. None compares them if onnxruntime is there.

    Returns:
        A module that computes it; its parameters, buffers and children have the names of the file.

    Raises:
        InputError: There is no such file, it is damaged, it holds what is not read, or its outputs are others.
    """
    return _read(path, lambda: _checked(path, check=check))


def _checked(path: Path, *, check: bool | None) -> OnnxModule:
    proto = load_program(path)
    flat = flattened(proto)
    read_weights(flat, path)
    if flat is not proto:
        read_weights(proto, path)
    program, weights = read_program(flat, RESERVED)
    nodes = {name_of(node): tuple(filter(None, node.output)) for node in flat.graph.node}
    module = OnnxModule(program, declared_inputs(flat.graph), nodes, weights)
    names = {name for part in program.all() for name in part.tensors}
    stored = proto if names <= {name for name, *_ in constants(proto.graph)} else flat  # else they lie within functions
    module.onnx_source = source_of(stored, names)
    mark_batch(module)
    if check is not False and torch.get_default_device().type == "cpu":
        compare(module, path, always=check is True)
    return module


def input_shapes(path: Path) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """Return the shapes of the inputs that a file declares.

    Args:
        path: The file.

    Returns:
        The shape of its input without the batch dimension, or a tuple of them if it has several.

    Raises:
        InputError: It leaves a size open, or is no file to read.
    """
    inputs = _read(path, lambda: declared_inputs(flattened(load_program(path)).graph))
    shapes = []
    single = next((declared.name for declared in inputs if declared.sizes == ()), None)
    if single is not None:
        raise InputError(
            f"The input {single!r} of '{path}' is one number for all samples of a batch. Export the model with a constant in "
            "its place."
        )
    for declared in inputs:
        if not declared.sizes or not declared.shape or None in declared.shape[1:]:
            sizes = f"has the sizes ({', '.join(map(str, declared.sizes))})" if declared.sizes else "has no sizes"
            raise InputError(
                f"The input {declared.name!r} of '{path}' {sizes} there, which leaves some open. Give them without the first, "
                "the batch, with --shape, for example --shape 3,224,224."
            )
        shapes.append(tuple(size for size in declared.shape[1:] if size is not None))
    return shapes[0] if len(shapes) == 1 else tuple(shapes)


def _read(path: Path, work: Callable[[], Read]) -> Read:
    """Read something from a file; whatever that raises becomes one sentence."""
    check_present(path)
    check_downloaded(path)
    try:
        return work()
    except MissingPackageError:
        raise
    except InputError as error:
        raise InputError(f"'{path}' cannot be read as ONNX: {error}") from error
    except Exception as error:  # the bytes of a stranger: whatever reading them raises, they cannot be read
        raise InputError(f"'{path}' cannot be read as ONNX: {one_line(error)}") from error


__all__ = ["OnnxModule", "input_shapes", "read_onnx"]
