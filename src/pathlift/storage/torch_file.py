"""Files that ``torch.save`` wrote: which tensors they hold, each read when it is asked for. No code in them is ever run.

Such a file is a pickle and, beside it, the bytes of storages; a tensor is a call in the pickle that names a storage, where in
it the tensor begins, and its shape and strides. Both of PyTorch's formats are read: archives, and the one before them.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pathlift.arguments.kinds import DTYPES
from pathlift.errors import InputError, one_line
from pathlift.storage import sizes
from pathlift.storage.pickles import Call, read_pickle
from pathlift.storage.sizes import check_unfolding

MAGIC = 0x1950A86A20F9469CFC6C
"""The first thing in a file of the old format."""

PROTOCOL = 1001
"""The second."""

CHUNK = 1 << 22
"""Bytes that are read at a time."""

KEYS = (
    "state_dict", "model_state_dict", "model", "net", "network", "model_ema", "ema", "ema_state_dict", "state_dict_ema",
    "params_ema", "params", "generator", "weights", "module",
)  # fmt: skip
"""Where training scripts put weights, beside other things."""

OF_TRAINING = ("optim", "sched")
"""Parts of the keys under which tensors are no weights."""

SETTINGS = ("argparse.", "collections.", "datetime.", "numpy.", "omegaconf.", "pathlib.")
"""Where the names of classes begin whose objects lie beside weights, and are left out."""

DEEPEST = 3
"""How many keys lead to weights at most."""

STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64, "Untyped": torch.uint8, "QUInt8": torch.quint8,
    "QInt8": torch.qint8, "QInt32": torch.qint32, "QUInt4x2": torch.quint4x2, "QUInt2x4": torch.quint2x4,
}  # fmt: skip
"""Classes of storages, without the word Storage, and what these hold."""


@dataclass(frozen=True)
class Storage:
    """Bytes that tensors lie in.

    Attributes:
        key: Its name in the file.
        dtype: What it holds.
        start: Where it begins in the storage of that name, in bytes.
    """

    key: str
    dtype: torch.dtype
    start: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        storage: In which storage.
        dtype: What it holds.
        offset: Its first element.
        shape: Its shape.
        stride: Its strides.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes when it is laid out in full."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements of the storage from its first to its last one."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return 1 + last if all(self.shape) else 0


class NoTensorError(InputError):
    """Says why what stands in the place of a tensor is no array of numbers; the sentence has no subject yet."""


class TorchFile:
    """The weights in a file that ``torch.save`` wrote.

    Attributes:
        path: The file.
        key: The keys that led to the weights, with dots between them; empty when the file holds nothing else.
        specs: Tensors without memory, of the shapes and dtypes of those in the file.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        """Find the weights; none is read.

        Args:
            path: The file.
            key: Which, when there are several.

        Raises:
            InputError: The file is damaged, or holds no weights, or several sets of them and no key says which.
        """
        self.path = path
        self.records: dict[str, _Record] = {}
        self.swapped = False
        self.sound: set[str] = set()
        try:
            with path.open("rb") as file:
                archived = file.read(4) == b"PK\3\4"
            content = self._read_archive() if archived else self._read_old()
        except InputError as error:
            raise InputError(f"'{path}' cannot be read as a state-dict: {error}") from error
        except Exception as error:  # the bytes of a stranger: whatever reading them raises, they cannot be read
            raise InputError(f"'{path}' cannot be read as a state-dict: {one_line(error)}") from error
        self.key, weights = _chosen(path, content, key)
        if len(weights) > sizes.MOST_TENSORS:
            raise InputError(f"'{path}' holds {len(weights):,} tensors, more than {sizes.MOST_TENSORS:,}.")
        self.tensors = {name: self._placed(name, value) for name, value in weights.items()}
        self.specs = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in self.tensors.items()
        }

    def read(self, name: str, device: torch.device) -> Tensor:
        """Read a tensor.

        Args:
            name: Its name.
            device: Where it is put.

        Returns:
            The tensor, with memory of its own.

        Raises:
            InputError: The file cannot be read any more, or the tensor is damaged.
        """
        tensor = self.tensors[name]
        record = self.records[tensor.storage.key]
        begin = tensor.storage.start + tensor.offset * tensor.dtype.itemsize
        data = torch.empty(tensor.span * tensor.dtype.itemsize, dtype=torch.uint8, device="cpu")
        try:
            with self.path.open("rb") as file:
                start = record.begin(file)
                if tensor.storage.key not in self.sound:
                    record.check(file, start)
                    self.sound.add(tensor.storage.key)
                file.seek(start + begin)
                if file.readinto(data.numpy().data) != len(data):
                    raise InputError("it ends too early.")
        except (OSError, InputError, struct.error) as error:
            raise InputError(f"'{name}' cannot be read from '{self.path}': {error}") from error
        if self.swapped:
            data = data.reshape(-1, tensor.dtype.itemsize).flip(-1).reshape(-1)
        flat = data != 0 if tensor.dtype is torch.bool else data.view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride).contiguous().to(device)

    def _read_archive(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            entries = archive.infolist()
            check_unfolding(self.path.stat().st_size, sum(entry.file_size for entry in entries))
            program = next((entry.filename for entry in entries if entry.filename.endswith("data.pkl")), None)
            names = {entry.filename for entry in entries}
            if program is None:
                raise InputError("it is an archive that torch.save did not write.")
            folder = program.removesuffix("data.pkl")
            if f"{folder}constants.pkl" in names:
                raise InputError("it is a program of TorchScript. Save the weights of its model: model.state_dict().")
            if f"{folder}byteorder" in names:
                self.swapped = archive.read(f"{folder}byteorder") == b"big"
            for entry in entries:
                if entry.filename.startswith(f"{folder}data/"):
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise InputError("its tensors are compressed, which torch.save never does.")
                    key = entry.filename.removeprefix(f"{folder}data/")
                    self.records[key] = _Record(entry.file_size, entry.header_offset, entry.CRC)
            return read_pickle(io.BytesIO(archive.read(program)), _storage)

    def _read_old(self) -> Any:
        size = self.path.stat().st_size
        if size < 2:
            raise InputError("it is no file of weights.")
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            stream: Any = mapped
            storages: dict[str, Storage] = {}

            def persistent(saved: Any) -> Storage:
                storage = _old_storage(saved)
                storages.setdefault(storage.key, replace(storage, start=0))
                return storage

            if read_pickle(stream, _storage) != MAGIC or read_pickle(stream, _storage) != PROTOCOL:
                raise InputError("torch.save did not write it. Write it with torch.save or safetensors.")
            read_pickle(stream, _storage)  # of what machine it comes; the bytes are in one order on all
            content = read_pickle(stream, persistent)
            for key in read_pickle(stream, _storage):
                if key not in storages:
                    raise InputError(f"it is damaged: there is no tensor in the storage {str(key)[:60]!r}.")
                (count,) = struct.unpack("<q", mapped.read(8))
                length = count * storages[key].dtype.itemsize
                if count < 0 or mapped.tell() + length > size:
                    raise InputError("it is damaged: it ends too early.")
                self.records[key] = _Record(length, mapped.tell())
                mapped.seek(length, io.SEEK_CUR)
            return content

    def _placed(self, name: str, value: object) -> StoredTensor:
        """Return where a tensor lies, once it is sure that it lies there."""
        try:
            tensor = _tensor(value)
            if tensor is None:
                raise NoTensorError(f"is no tensor: it {_no_tensor(value)}.")
            _check_dtype(tensor.dtype)
            record = self.records.get(tensor.storage.key)
            begin = tensor.storage.start + tensor.offset * tensor.dtype.itemsize
            numbers = (tensor.offset, *tensor.shape, *tensor.stride, begin)
            if len(tensor.shape) != len(tensor.stride) or min(numbers) < 0 or max(numbers) >= 1 << 63 or len(tensor.shape) > 64:
                raise NoTensorError("cannot be read: it has a shape that cannot be.")
            if record is None or begin + tensor.span * tensor.dtype.itemsize > record.size:
                raise NoTensorError("cannot be read: it is larger than what is stored of it.")
            check_unfolding(record.size, tensor.bytes)
        except NoTensorError as error:
            raise InputError(f"'{name}' in '{self.path}' {error}") from error
        except InputError as error:
            raise InputError(f"'{name}' in '{self.path}' cannot be read: {error}") from error
        except (TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise InputError(f"'{name}' in '{self.path}' cannot be read: it is damaged.") from error
        return tensor


@dataclass(frozen=True)
class _Record:
    """Bytes in a file: what an archive says about them, or where they begin."""

    size: int
    offset: int
    checksum: int | None = None

    def begin(self, file: IO[bytes]) -> int:
        """Return where they begin; in an archive, behind a header of their own."""
        if self.checksum is None:
            return self.offset
        file.seek(self.offset)
        name, extra = struct.unpack("<26x2H", file.read(30))
        return self.offset + 30 + int(name) + int(extra)

    def check(self, file: IO[bytes], start: int) -> None:
        """Compare them with their checksum."""
        if self.checksum is None:
            return
        file.seek(start)
        checksum, left = 0, self.size
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
        if left or checksum != self.checksum:
            raise InputError("it is damaged, since its checksum is another one.")


def _storage(saved: Any) -> Storage:
    """Read a reference to a storage: ("storage", class, key, device, count)."""
    kind, cls, key, _, _ = saved
    name = cls.name.rpartition(".")[2].removesuffix("Storage")
    if kind not in {"storage", b"storage"} or name not in STORAGES:
        raise ValueError("a reference to no storage")
    return Storage(str(key), STORAGES[name])


def _old_storage(saved: Any) -> Storage:
    """Read a reference of the old format, which may be to a part of a storage: (key, first, count)."""
    *reference, part = saved
    storage = _storage(reference)
    if part is None:
        return storage
    _, first, _ = part
    return replace(storage, start=first * storage.dtype.itemsize)


def _tensor(value: object) -> StoredTensor | None:
    """Return what a call in a pickle says about a tensor, None when it makes something else."""
    if not isinstance(value, Call):
        return None
    arguments = value.arguments
    match value.name:
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            return _tensor(arguments[0])
        case "torch._tensor._rebuild_from_type_v2":
            return _tensor(Call(arguments[0], arguments[2]))
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3":
            storage, offset, shape, stride = arguments[:4]
            dtype = storage.dtype
            if value.name.endswith("v3"):
                dtype = getattr(torch, arguments[6].name.removeprefix("torch."))
                _check_dtype(dtype)
            return StoredTensor(storage, dtype, offset, _sizes(shape), _sizes(stride))
        case "torch._utils._rebuild_sparse_tensor":
            layout = str(arguments[0].arguments[0]).removeprefix("torch.")[:30]
            raise NoTensorError(f"is no dense tensor ({layout}). Save it with .to_dense().")
        case "torch._utils._rebuild_nested_tensor":
            raise NoTensorError("is no dense tensor (nested). Save it with .to_dense().")
        case "torch._utils._rebuild_meta_tensor_no_storage":
            raise NoTensorError("has no values: it was saved on the meta device.")
        case "torch._utils._rebuild_qtensor":
            _check_dtype(arguments[0].dtype)
    return None


def _sizes(value: Any) -> tuple[int, ...]:
    """Return a shape, which may have been written as a torch.Size."""
    sizes = value.arguments[0] if isinstance(value, Call) and value.name == "torch.Size" else value
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(size, int) for size in sizes):
        raise ValueError("no shape")
    return tuple(sizes)


def _check_dtype(dtype: object) -> None:
    if dtype not in DTYPES:
        kind = str(dtype).removeprefix("torch.")[:60]
        expected = "floating-point numbers of 16, 32 or 64 bits, whole numbers or truth values"
        raise NoTensorError(f"has dtype {kind}; expected {expected}. Convert it, with .float() say.")


def load_plain(path: Path) -> object:
    """Read all that ``torch.save`` wrote, on the CPU; no code in the file is run, and it is not unfolded beyond its size.

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
    content: object = torch.load(path, map_location="cpu", weights_only=True)
    return content


# ---- which of the things in a file are its weights


def _chosen(path: Path, content: object, key: str | None) -> tuple[str, dict[str, object]]:
    """Return the keys that lead to the weights, and what stands under their names."""
    _check_module(path, content)
    sets = dict(_sets(content, set()))
    likely = [keys for keys in sets if keys.rpartition(".")[2] in KEYS or _of_a_module(sets[keys])] or list(sets)
    if key is not None:  # it may lead to a mapping, or past one: names may begin with the rest of it
        within = [keys for keys in sets if keys == key or key.startswith(f"{keys}.")]
        likely = sorted(within, key=len)[-1:] or [keys for keys in sets if keys.startswith(f"{key}.")] or likely
    if len(likely) > 1:
        several = ", ".join(f"'{keys}' ({len(sets[keys])} tensors)" for keys in likely[:8])
        raise InputError(
            f"'{path}' holds several sets of weights: {several}. Choose one: --key {likely[-1]}, in Python "
            f"Checkpoint(path, key={likely[-1]!r})."
        )
    if likely:
        return likely[0], sets[likely[0]]
    for name, value in _entries(content):
        _check_module(path, value, f" under '{name}'")
        if isinstance(value, Call):
            raise InputError(f"'{path}' holds no weights, {_no_tensor(value)}. Save model.state_dict().")
    raise InputError(f"'{path}' holds no mapping from names to tensors. Save model.state_dict().")


def _check_module(path: Path, value: object, where: str = "") -> None:
    """Refuse a module that was saved whole."""
    if isinstance(value, Call) and isinstance(value.state, dict) and {"_parameters", "_modules"} <= value.state.keys():
        raise InputError(
            f"'{path}' holds a whole module{where} ({value.name[:100]}): code or objects, which are never loaded. Where its "
            "class can be imported, save its weights alone: torch.save(model.state_dict(), …)."
        )


def _no_tensor(value: object) -> str:
    while isinstance(value, Call) and not value.name:
        value = value.function
    what = f" ({value.name[:100]})" if isinstance(value, Call) else ""
    return f"holds code or objects{what}, which are never loaded"


def _entries(value: object) -> Iterator[tuple[str, object]]:
    """Iterate over what stands under names in a dictionary, or in an object of a class made after it."""
    entries = value.entries if isinstance(value, Call) else value
    if isinstance(entries, dict):
        yield from ((name, entry) for name, entry in entries.items() if isinstance(name, str))


def _sets(content: object, seen: set[int], keys: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, object]]]:
    """Iterate over the mappings from names to tensors, by the keys that lead to them; each once."""
    seen.add(id(content))
    entries = dict(_entries(content))
    if any(_is_tensor(value) for value in entries.values()):
        yield ".".join(keys), {name: value for name, value in entries.items() if _is_weight(value)}
    if len(keys) < DEEPEST:
        for name, value in entries.items():
            if id(value) not in seen and name.isprintable() and not any(word in name.lower() for word in OF_TRAINING):
                yield from _sets(value, seen, (*keys, name))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Call) and value.name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_"))


def _is_weight(value: object) -> bool:
    """Whether something is a tensor, or stands where one should: no number or setting beside the weights."""
    return isinstance(value, Call) and not value.name.startswith(SETTINGS) and not value.entries


def _of_a_module(entries: Mapping[str, object]) -> bool:
    """Whether names look like those of a module's parameters."""
    return any("." in name or name in {"weight", "bias"} for name in entries)
