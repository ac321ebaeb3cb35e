"""Weights on disk: read a tensor at a time, written a shard at a time (safetensors, one file or several with an index)."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pathlift.arguments import public
from pathlift.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

SHARD_BYTES = 1 << 26
"""A shard is written when it holds this much."""

SMALL_BYTES = 1 << 20
"""Tensors up to this size are copied out of their file."""

SPARE_BYTES = 1 << 26
"""A file may unfold to this much more than it has."""

HEADER_BYTES = 100_000_000
"""An index has at most this much, as has the header of a file of safetensors."""

MOST_TENSORS = 1 << 16
"""A file has at most so many tensors."""

INDEX = ".safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def check_unfolding(size: int, whole: int) -> None:
    """Refuse a file that would take far more memory than it has bytes.

    Args:
        size: Its bytes.
        whole: What is to be read from it, in bytes.

    Raises:
        InputError: That is more than its bytes and `SPARE_BYTES`.
    """
    if whole > size + SPARE_BYTES:
        raise InputError(f"{size:,} bytes unfold to {whole:,}, which no file of weights does.")


def load_plain(path: Path) -> object:
    """Read what ``torch.save`` wrote, on the CPU; no code in the file is run, and it is not unfolded beyond its size.

    Args:
        path: The file.

    Returns:
        Tensors and numbers in containers.

    Raises:
        InputError: It unfolds to much more than it has. Whatever PyTorch raises where it cannot read the file goes through.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_unfolding(path.stat().st_size, sum(entry.file_size for entry in archive.infolist()))
    found: object = torch.load(path, map_location="cpu", weights_only=True)
    return found


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each mapped into memory when asked for and not kept.

    Attributes:
        path: The file or folder.
        device: Where the tensors are put.
    """

    @public
    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Read names, shapes and dtypes; no tensor is read.

        Args:
            path: A ``.safetensors`` file, an index (``….safetensors.index.json``) of several, or a folder with either.
            device: Where the tensors are put.

        Raises:
            InputError: A file is missing or damaged, or two files have a tensor of one name.
        """
        self.path = Path(path)
        self.device = torch.device(device)
        self.files: dict[str, Path] = {}
        self.specs: dict[str, Tensor] = {}
        wanted = _weight_map(self.path)
        for file in dict.fromkeys(wanted.values()) if wanted is not None else _files(self.path):
            for name, spec in _specs(file).items():
                if wanted is not None and wanted.get(name) != file:
                    continue
                if name in self.files:
                    raise InputError(f"'{name}' is in '{self.files[name].name}' and in '{file.name}' of '{self.path}'.")
                self.files[name], self.specs[name] = file, spec
        missing = sorted(set(wanted or ()) - set(self.files))
        if missing:
            raise InputError(f"'{self.path}' promises {missing[0]!r} in '{(wanted or {})[missing[0]]}', which lacks it.")

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor. A large one keeps its file mapped; a small one is copied, so that it does not."""
        try:
            with safe_open(self.files[name], "pt", device=str(self.device)) as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(f"'{name}' cannot be read from '{self.files[name]}': {error}") from error
        return tensor.clone() if tensor.nbytes <= SMALL_BYTES else tensor

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name; nothing is read."""
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        """Iterate over names."""
        return iter(self.files)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.files)

    def __repr__(self) -> str:
        """Return a one-line summary."""
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"


def _weight_map(path: Path) -> dict[str, Path] | None:
    """Return which file has which tensor, if there is an index."""
    found = sorted(path.glob(f"*{INDEX}")) if path.is_dir() else [path] if path.name.endswith(INDEX) else []
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f"'{path}' has {len(found)} indices; name one: {', '.join(file.name for file in found)}.")
    try:
        with found[0].open("rb") as opened:
            text = opened.read(HEADER_BYTES + 1)
        if len(text) > HEADER_BYTES:
            raise ValueError(f"it has more than {HEADER_BYTES:,} bytes")
        entries = json.loads(text)["weight_map"]
        files = {str(name): Path(file).name for name, file in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"'{found[0]}' is not a readable index with a weight_map: {error}") from error
    strange = next((file for file in files.values() if not file.isprintable()), None)
    if strange is not None:
        raise InputError(f"'{found[0]}' names a file {strange!r}, which is no name.")
    return {name: found[0].parent / file for name, file in files.items()}


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"'{path}' holds no .safetensors file.")
    return files


def _specs(path: Path) -> dict[str, Tensor]:
    """Return tensors without memory, of the shapes and dtypes of those in a file."""
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            if len(names) > MOST_TENSORS:
                raise InputError(f"'{path}' holds {len(names):,} tensors, more than {MOST_TENSORS:,}.")
            slices = {name: file.get_slice(name) for name in names}
            described = {name: (own.get_shape(), own.get_dtype()) for name, own in slices.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"'{path}' cannot be read as safetensors: {error}") from error
    unknown = {kind for _, kind in described.values()} - set(_DTYPES)
    if unknown:
        raise InputError(f"'{path}' holds tensors of type {', '.join(sorted(unknown))}, which is not supported.")
    try:
        return {name: torch.empty(shape, dtype=_DTYPES[kind], device="meta") for name, (shape, kind) in described.items()}
    except (TypeError, RuntimeError) as error:  # sizes beyond 64 bits
        raise InputError(f"'{path}' holds a tensor of a shape that cannot be.") from error


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
        own = tensor.detach().contiguous().cpu()
        self.waiting[name] = own if own.untyped_storage().nbytes() == own.nbytes else own.clone()  # a file shares no memory
        if sum(own.nbytes for own in self.waiting.values()) >= SHARD_BYTES:
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
        self.bytes += sum(own.nbytes for own in self.waiting.values())
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
