"""Weights on disk, in whatever files people have: read a tensor at a time, written a shard at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pathlift.arguments import public
from pathlift.errors import InputError, nearest
from pathlift.storage import sizes
from pathlift.storage.downloads import check_downloaded
from pathlift.storage.present import check_present
from pathlift.storage.quantized import Quantized, dequantized, quantized_in
from pathlift.storage.torch_file import TorchFile

if TYPE_CHECKING:
    from typing_extensions import Self

SHARD_BYTES = 1 << 26
"""A shard is written when it holds this much."""

SMALL_BYTES = 1 << 20
"""Tensors up to this size are copied out of their file."""

INDEX = ".safetensors.index.json"
"""How the name of the index of several files of safetensors ends."""

WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""How the names of files of weights end."""

USUAL = ("model.safetensors", "pytorch_model.bin")
"""The file of weights in a folder that has others beside it."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

PROGRAMS = (".onnx", ".pt2")
"""Files of whole models."""

ONLY_SCALED = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types of numbers that are weights only together with scales."""


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read from its file when asked for and not kept. No code in a file is run.

    Weights that torchao or `quantize` wrote as whole numbers or eight-bit floating-point numbers with scales, into a file of
    safetensors, are there as what they stand for.

    Attributes:
        path: The file or folder.
        device: Where the tensors are put.
        key: Which of the things in the file they are: the keys that led to them, with dots between; empty if it holds no other.
        specs: Tensors without memory, of the same names, shapes and dtypes.
    """

    @public
    def __init__(self, path: str | Path, device: torch.device | str = "cpu", key: str | None = None) -> None:
        """Read names, shapes and dtypes; no tensor is read.

        Args:
            path: A ``.safetensors`` file; a file of ``torch.save`` (``.pt``, ``.pth``, ``.ckpt``, ``.bin``); an index
                (``….index.json``) of several; or a folder with either.
            device: Where the tensors are put.
            key: Where a file holds several sets of weights: ``"model_ema"``, ``"networks.generator"``. Where it holds one, the
                beginning of the names to take, without its dot.

        Raises:
            InputError: A file is missing or damaged, holds no weights, or several sets of them and no key says which; or two
                files have a tensor of one name.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> weights, average = ({"0.weight": torch.full((1, 2), value)} for value in (1.0, 2.0))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = Path(folder, "run.ckpt")
            ...     torch.save({"epoch": 3, "model": weights, "model_ema": average}, file)
            ...     checkpoint = Checkpoint(file, key="model_ema")
            ...     list(checkpoint), checkpoint["0.weight"].tolist()
            (['0.weight'], [[2.0, 2.0]])
        """
        self.path = Path(path)
        self.device = torch.device(device)
        self.key = ""
        self.specs: dict[str, Tensor] = {}
        self._files: dict[str, tuple[_SafetensorsFile | TorchFile, str]] = {}
        wanted = _weight_map(self.path)
        paths = list(dict.fromkeys(wanted.values())) if wanted is not None else _files(self.path)
        alone = len(paths) == 1
        for file_path in paths:
            file = _opened(file_path, key if alone else None)
            self.key = file.key if alone and isinstance(file, TorchFile) else ""
            for name, spec in file.specs.items():
                if wanted is not None and wanted.get(name) != file_path:
                    continue
                if name in self._files:
                    first = self._files[name][0].path.name
                    raise InputError(f"'{name}' is in '{first}' and in '{file_path.name}' of '{self.path}'.")
                self._files[name], self.specs[name] = (file, name), spec
        missing = sorted(set(wanted or ()) - set(self._files))
        if missing:
            raise InputError(f"'{self.path}' promises {missing[0]!r} in '{(wanted or {})[missing[0]]}', which lacks it.")
        if key is not None and key != self.key and not self.key.startswith(f"{key}."):
            self._keep(key)

    def _keep(self, key: str) -> None:
        """Keep the tensors whose names begin with the key, or with what is left of it, and call them by the rest."""
        first = f"{key.removeprefix(f'{self.key}.') if self.key else key}."
        chosen = {name.removeprefix(first): name for name in self._files if name.startswith(first)}
        if not chosen:
            beginnings = dict.fromkeys(name.partition(".")[0] for name in self._files)
            raise InputError(f"'{self.path}' holds no weights under the key '{key}'.{nearest(key, beginnings)}")
        self._files = {short: self._files[name] for short, name in chosen.items()}
        self.specs = {short: self.specs[name] for short, name in chosen.items()}
        self.key = key

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor. A large one of safetensors keeps its file mapped; a small one is copied, so that it does not."""
        file, stored_name = self._files[name]
        return file.read(stored_name, self.device)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name; nothing is read."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """Iterate over names."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._files)

    def __repr__(self) -> str:
        """Return a one-line summary."""
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"


def checkpoint_paths(path: Path) -> list[Path]:
    """Return the checkpoints that a path leads to.

    Args:
        path: A file; or a folder, which may be one checkpoint (an index, or files that have no tensor of one name) or several.

    Returns:
        The path itself when it is one checkpoint; otherwise the files of weights in the folder, in their natural order.

    Raises:
        InputError: The folder holds no weights, or a file in it is damaged.
    """
    if not path.is_dir() or _index(path) is not None:
        return [path]
    files = _natural(path, WEIGHTS)
    names: set[str] = set()
    for file in files if not any(file.name in USUAL for file in files) else ():
        specs = _opened(file, None).specs
        if not names.isdisjoint(specs):
            return files
        names.update(specs)
    return [path]


def _natural(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder in the order in which people count: epoch 2 before epoch 10."""
    files = [file for file in folder.iterdir() if file.suffix in suffixes and not file.name.startswith(".") and file.is_file()]

    def parts(file: Path) -> list[tuple[int, str]]:
        split = re.split(r"([0-9]+)", file.name)
        return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(split)]

    return sorted(files, key=lambda file: (parts(file), file.name))


def _index(path: Path) -> Path | None:
    """Return the index of several files, if there is one."""
    if not path.is_dir():
        return path if path.name.endswith(".index.json") else None
    indices = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.bin.index.json"))
    if len(indices) > 1:
        raise InputError(f"'{path}' has {len(indices)} indices; name one: {', '.join(file.name for file in indices)}.")
    return indices[0] if indices else None


def _weight_map(path: Path) -> dict[str, Path] | None:
    """Return which file has which tensor, if there is an index."""
    index = _index(path)
    if index is None:
        return None
    try:
        with index.open("rb") as opened:
            text = opened.read(sizes.HEADER_BYTES + 1)
        if len(text) > sizes.HEADER_BYTES:
            raise ValueError(f"it has more than {sizes.HEADER_BYTES:,} bytes")
        entries = json.loads(text)["weight_map"]
        files = {str(name): Path(file).name for name, file in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"'{index}' is not a readable index with a weight_map: {error}") from error
    strange = next((file for file in files.values() if not file.isprintable()), None)
    if strange is not None:
        raise InputError(f"'{index}' names a file {strange!r}, which is no name.")
    return {name: index.parent / file for name, file in files.items()}


def _files(path: Path) -> list[Path]:
    """Return the files of one checkpoint without an index."""
    if not path.is_dir():
        return [path]
    usual = [path / name for name in USUAL if (path / name).is_file()]
    files = usual[:1] or _natural(path, (".safetensors",)) or _natural(path, WEIGHTS)
    if not files:
        raise InputError(f"'{path}' holds no .safetensors file, and no other file of weights ({', '.join(WEIGHTS[1:])}).")
    return files


def _opened(path: Path, key: str | None) -> _SafetensorsFile | TorchFile:
    """Open a file by what it is: safetensors begin with the length of a header in JSON."""
    check_present(path)
    check_downloaded(path)
    if path.suffix.lower() in PROGRAMS:
        raise InputError(f"'{path}' is a model, not a file of weights: take the state_dict() of pathlift.load_model('{path}').")
    with path.open("rb") as file:
        beginning = file.read(9)
    return _SafetensorsFile(path) if path.suffix == ".safetensors" or beginning[8:] == b"{" else TorchFile(path, key)


class _SafetensorsFile:
    """One file of safetensors; quantised tensors are there by the names and in the types of what they stand for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored, metadata = _specs(path)
        try:
            self.quantized = quantized_in(metadata)
            values = {name: own.checked(name, stored) for name, own in self.quantized.items()}
        except InputError as error:
            raise InputError(f"'{path}' cannot be read: {error}") from error
        parts = {part for own in self.quantized.values() for part in own.parts}
        self.specs = {name: spec for name, spec in stored.items() if name not in parts} | values
        eight_bits = next((name for name, spec in self.specs.items() if spec.dtype in ONLY_SCALED), None)
        if eight_bits is not None:
            raise InputError(f"'{path}' holds {eight_bits!r} in {stored[eight_bits].dtype}, and does not say what scales it.")

    def read(self, name: str, device: torch.device) -> Tensor:
        own = self.quantized.get(name)
        try:
            with safe_open(self.path, "pt", device=str(device)) as file:
                tensor: Tensor = file.get_tensor(name) if own is None else _values(own, file)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(f"'{name}' cannot be read from '{self.path}': {error}") from error
        return tensor.clone() if own is None and tensor.nbytes <= SMALL_BYTES else tensor


def _values(own: Quantized, file: Any) -> Tensor:
    integers, scale, *zero_point = (file.get_tensor(part) for part in own.parts)
    return dequantized(integers, scale, zero_point[0] if zero_point else None, own.block).to(own.dtype)


def _specs(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors without memory, of the shapes and dtypes of those in a file, and the metadata of the file."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            if len(names) > sizes.MOST_TENSORS:
                raise InputError(f"'{path}' holds {len(names):,} tensors, more than {sizes.MOST_TENSORS:,}.")
            slices = {name: file.get_slice(name) for name in names}
            described = {name: (piece.get_shape(), piece.get_dtype()) for name, piece in slices.items()}
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"'{path}' cannot be read as safetensors: {error}") from error
    unknown = {kind for _, kind in described.values()} - set(_DTYPES)
    if unknown:
        raise InputError(f"'{path}' holds tensors of type {', '.join(sorted(unknown))}, which is not supported.")
    try:
        specs = {name: torch.empty(shape, dtype=_DTYPES[kind], device="meta") for name, (shape, kind) in described.items()}
    except (TypeError, RuntimeError) as error:  # sizes beyond 64 bits
        raise InputError(f"'{path}' holds a tensor of a shape that cannot be.") from error
    return specs, metadata


class ShardWriter:
    """A folder of safetensors files with an index, written as tensors come; there is nothing there until it is whole.

    Use it as a context manager: leaving it without an error puts the folder in its place.
    """

    def __init__(self, target: str | Path) -> None:
        """Choose the folder.

        Args:
            target: Where; must not exist yet.

        Raises:
            InputError: It exists, or the folder that it would be in does not.
        """
        self.target = Path(target)
        if self.target.exists():
            raise InputError(f"'{self.target}' exists already; scores are written to a new folder.")
        if not self.target.absolute().parent.is_dir():
            raise InputError(f"The folder '{self.target.absolute().parent}' does not exist.")
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        self.restart()

    def restart(self) -> None:
        """Forget what has been added."""
        self.waiting: dict[str, Tensor] = {}
        self.index: dict[str, str] = {}
        self.bytes = 0
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it may be written later.

        Args:
            name: Its name.
            tensor: The tensor.
        """
        plain = tensor.detach().contiguous().cpu()
        alone = plain.untyped_storage().nbytes() == plain.nbytes
        self.waiting[name] = plain if alone else plain.clone()  # a file shares no memory
        if sum(waiting.nbytes for waiting in self.waiting.values()) >= SHARD_BYTES:
            self._flush()

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name was added."""
        return name in self.waiting or name in self.index

    def _flush(self) -> None:
        file = f"scores-{len(set(self.index.values())) + 1:05d}.safetensors"
        try:
            self.partial.mkdir(exist_ok=True)
            save_file(self.waiting, self.partial / file)
        except (OSError, SafetensorError) as error:
            reason = str(error).split(" at path ", maxsplit=1)[0].replace(str(self.partial), str(self.target))
            raise InputError(f"'{self.target}' cannot be written: {reason}") from error
        self.bytes += sum(tensor.nbytes for tensor in self.waiting.values())
        self.index |= dict.fromkeys(self.waiting, file)
        self.waiting = {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Put the folder in its place, or remove it after an error."""
        try:
            if kind is None:
                if self.waiting:
                    self._flush()
                self.partial.mkdir(exist_ok=True)
                described = {"metadata": {"total_size": self.bytes}, "weight_map": self.index}
                (self.partial / f"scores{INDEX}").write_text(json.dumps(described, indent=1))
                os.replace(self.partial, self.target)
        except OSError as problem:
            raise InputError(f"'{self.target}' cannot be written: {problem}") from problem
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
