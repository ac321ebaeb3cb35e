"""ONNX files as PyTorch modules: an interpreter of the file's graph, without any code made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from pathlift.errors import InputError, told
from pathlift.storage.onnx.file import load_program
from pathlift.storage.onnx.graph import build, declared_inputs
from pathlift.storage.onnx.module import OnnxModule
from pathlift.storage.onnx.trial import compare, mark_batch
from pathlift.storage.onnx.write import save
from pathlift.storage.packages import MissingPackageError

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
    module = build(load_program(path))
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
    inputs = _read(path, lambda: declared_inputs(load_program(path, weights=False).graph))
    shapes = []
    for own in inputs:
        if not own.sizes or not own.shape or None in own.shape[1:]:
            sizes = f"has the sizes ({', '.join(map(str, own.sizes))})" if own.sizes else "has no sizes"
            raise InputError(
                f"The input {own.name!r} of '{path}' {sizes} there, which leaves some open. Give them without the first, the "
                "batch, with --shape, for example --shape 3,224,224."
            )
        shapes.append(tuple(size for size in own.shape[1:] if size is not None))
    return shapes[0] if len(shapes) == 1 else tuple(shapes)


def _read(path: Path, work: Callable[[], Read]) -> Read:
    """Read something from a file; whatever that raises becomes one sentence."""
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        return work()
    except MissingPackageError:
        raise
    except InputError as error:
        raise InputError(f"'{path}' cannot be read as ONNX: {error}") from error
    except Exception as error:  # the bytes of a stranger: whatever reading them raises, they cannot be read
        raise InputError(f"'{path}' cannot be read as ONNX: {told(error)}") from error


__all__ = ["OnnxModule", "input_shapes", "read_onnx", "save"]
