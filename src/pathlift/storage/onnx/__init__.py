"""ONNX files as PyTorch modules: an interpreter of the file's graph, without any code made from it."""

from __future__ import annotations

from pathlib import Path

from pathlift.errors import InputError, told
from pathlift.storage.onnx.file import load_program
from pathlift.storage.onnx.graph import build
from pathlift.storage.onnx.module import OnnxModule
from pathlift.storage.packages import MissingPackageError


def read_onnx(path: Path) -> OnnxModule:
    """Read a program.

    Args:
        path: The file.

    Returns:
        A module that computes it; its parameters, buffers and children have the names of the file.

    Raises:
        InputError: There is no such file, it is damaged, or it holds what is not read.
    """
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        return build(load_program(path))
    except MissingPackageError:
        raise
    except InputError as error:
        raise InputError(f"'{path}' cannot be read as ONNX: {error}") from error
    except Exception as error:  # the bytes of a stranger: whatever reading them raises, they cannot be read
        raise InputError(f"'{path}' cannot be read as ONNX: {told(error)}") from error


__all__ = ["OnnxModule", "read_onnx"]
