"""Inputs by name for the command line: a file of tensors, or data that ships with a package.

Nothing is downloaded: ``digits`` comes with scikit-learn, ``fashion-mnist`` with Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.storage.checkpoints import WEIGHTS
from pathlift.storage.models import load_state
from pathlift.storage.packages import package
from pathlift.storage.present import check_present

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


def load_data(name: str, shape: Sequence[int], limit: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Read inputs, and their classes where they are known.

    Args:
        name: ``digits``, ``fashion-mnist``, or a .safetensors or .pt file with a tensor ``x`` and perhaps ``y``.
        shape: Input shape without batch dimension.
        limit: Only the first samples; None for all.

    Returns:
        Inputs (samples, *shape) in float32 or as they are in the file, pixels in [0, 1]; classes (samples,) or None.

    Raises:
        InputError: The name is not known, a package or file is missing, the data does not have this shape, or there is not
            one class for each input.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 sample, found {limit}.")
    check_name(name)
    y: Tensor | None
    if name == "digits":
        x, y = handwritten_digits()
    elif name == "fashion-mnist":
        x, y = fashion_mnist("t10k")
    else:
        tensors = load_state(Path(name))
        if "x" not in tensors:
            raise InputError(f"'{name}' holds {', '.join(sorted(tensors)[:5])}; expected inputs under the name 'x'.")
        x, y = tensors["x"], tensors.get("y")
    if x.dim() == 0 or len(x) == 0 or x[0].numel() != math.prod(shape):
        raise InputError(
            f"'{name}' has inputs of shape {tuple(x.shape[1:])}, which do not fill the input shape {tuple(shape)}."
        )
    if not x.dtype.is_floating_point:
        raise InputError(f"The inputs in '{name}' have dtype {x.dtype}; expected floating-point numbers.")
    if y is not None and (y.shape != (len(x),) or y.dtype.is_floating_point):
        kind = f"shape {tuple(y.shape)} and dtype {str(y.dtype).removeprefix('torch.')}"
        raise InputError(f"'{name}' has classes 'y' of {kind}; expected one whole number for each of {len(x)} inputs.")
    return x.reshape(len(x), *shape)[:limit], None if y is None else y[:limit]


def check_name(name: str, *others: str) -> None:
    """Refuse what names no data, before a model is built for it.

    Args:
        name: As for `load_data`.
        others: What is known besides.

    Raises:
        InputError: It is neither the name of data that ship with a package, nor that of a file that is there.
    """
    known = ("digits", "fashion-mnist", *others)
    if name in known:
        return
    if Path(name).suffix not in WEIGHTS:
        raise InputError(f"--data '{name}' is not known. Expected {', '.join(known)}, or a .safetensors or .pt file.")
    check_present(Path(name))


def handwritten_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits.

    Returns:
        Pixels in [0, 1], float32, shape (1797, 64), and classes.

    Raises:
        InputError: scikit-learn is missing.
    """
    digits = package("sklearn.datasets", "demo").load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def fashion_mnist(part: str) -> tuple[Tensor, Tensor]:
    """Read Fashion-MNIST from its IDX files.

    Args:
        part: ``train`` or ``t10k``.

    Returns:
        Pixels in [0, 1], float32, shape (samples, 784), and classes.

    Raises:
        InputError: A file is missing or damaged.
    """
    contents = []
    for file, header in ((f"{part}-images-idx3-ubyte", 16), (f"{part}-labels-idx1-ubyte", 8)):
        packed = FASHION_MNIST / f"{file}.gz"
        if not packed.is_file():
            raise InputError(f"There is no file '{packed}'. Install Debian's package dataset-fashion-mnist.")
        try:
            contents.append(torch.frombuffer(bytearray(gzip.decompress(packed.read_bytes())[header:]), dtype=torch.uint8))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(f"'{packed}' is damaged: {error}") from error
    images, labels = contents
    if len(images) % len(labels):
        raise InputError(f"'{FASHION_MNIST}' is damaged: {len(images)} pixels are not those of {len(labels)} pictures.")
    return images.reshape(len(labels), -1).float() / 255, labels.long()
