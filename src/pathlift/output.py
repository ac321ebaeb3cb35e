"""Results to files: looked at before anything is computed, written all or nothing, never over a file by accident.

`check_outputs` refuses what could not be written while nothing is lost yet; `write_outputs` is the one way to a file.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pathlift.errors import InputError, PathliftError

if TYPE_CHECKING:
    from torch import Tensor

Writer = Callable[[Path], object]
"""Writes one result to the path that it is given."""

TENSORS = (".safetensors",)
"""Names of files of tensors end so."""

MODELS = (".safetensors", ".pt", ".onnx", ".pt2")
"""Names of files that a model is written to end so: state-dicts and programs."""


def check_outputs(
    outputs: Mapping[str, Path | None],
    *,
    suffixes: Sequence[str] = TENSORS,
    inputs: Mapping[str, Path | str | None] | None = None,
    replace: bool = False,
) -> None:
    """Refuse files that cannot, or must not, be written, before anything is computed for them.

    Args:
        outputs: Option to the file that it names; None where it is not given.
        suffixes: What the names must end in; empty for a folder that does not exist yet.
        inputs: Option to what is read: where an output is one of these, the message says so.
        replace: Whether a file that exists may be replaced.

    Raises:
        InputError: A name has another ending, its folder is missing or cannot be written to, or the file exists.
    """
    given = {option: path for option, path in outputs.items() if path is not None}
    for option, path in given.items():
        if suffixes and path.suffix not in suffixes:
            raise InputError(f"{option} must end in {' or '.join(suffixes)}, found '{path}'.")
        _check_folder(option, path)
        if _exists(option, path):
            _check_existing(option, path, inputs or {}, replace=replace and bool(suffixes))
    if len({_target(path) for path in given.values()}) < len(given):
        raise InputError(f"{' and '.join(given)} name the same file, '{next(iter(given.values()))}'. Give two names.")


def check_folder_of_results(option: str, folder: Path, mark: str) -> None:
    """Refuse a folder of results that cannot be made, or that holds something else, before anything is computed for it.

    Args:
        option: The option that names it.
        folder: The folder; those above it may be missing too.
        mark: A file that a folder of such results has; it may then be gone on with.

    Raises:
        InputError: No folder can be made there, or it holds other files.
    """
    target = _target(folder)
    above = next(ancestor for ancestor in (target, *target.parents) if os.path.lexists(ancestor))
    if not above.is_dir():
        raise InputError(f"{option} '{folder}' lies under '{above.name}', which is a file and not a folder.")
    _check_folder(option, above / "results")
    if above == target and not (target / mark).is_file() and any(not entry.name.startswith(".") for entry in target.iterdir()):
        raise InputError(f"{option} '{folder}' holds other files. Give a new folder, or that of an experiment to go on with.")


def write_outputs(writers: Mapping[Path, Writer], *, replace: bool) -> None:
    """Write files so that either all of them are there in the end or none is touched.

    Each is written beside its place under another name; only when all are complete they are moved. A link is followed.

    Args:
        writers: Path to what writes it.
        replace: Whether files that exist may be replaced.

    Raises:
        InputError: A file exists, or cannot be written.
    """
    partial = {path: _target(path).with_name(f".pathlift-{secrets.token_hex(6)}") for path in writers}
    try:
        for path, writer in writers.items():
            _write(path, partial[path], writer)
        for path in writers:
            if _exists("The output", path):
                _check_existing("The output", path, {}, replace=replace)
        for path, complete in partial.items():
            _move(path, complete)
    finally:
        for left in partial.values():
            left.unlink(missing_ok=True)


def tensor_writer(tensors: Mapping[str, Tensor]) -> Writer:
    """Return what writes tensors to a safetensors file.

    Args:
        tensors: Name to tensor; those that share memory are written apart.

    Returns:
        The writer.
    """
    from safetensors.torch import save_file  # what is only looked at must not wait for PyTorch

    return lambda path: save_file(_separate(tensors), path)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, each with memory of its own, as the format asks."""
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in taken or plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _write(path: Path, partial: Path, writer: Writer) -> None:
    try:
        with partial.open("xb"):
            before = _target(path)
            mode = stat.S_IMODE((before if before.exists() else partial).stat().st_mode)
        writer(partial)
        partial.chmod(mode)  # some writers make files that nobody else can read
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror or type(error).__name__}.") from error
    except PathliftError:
        raise
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:  # a full disk; tensors that are not plain memory
        reason = str(error).split(" at path ", maxsplit=1)[0].replace(str(partial), str(path))
        raise InputError(f"'{path}' cannot be written: {reason}") from error


def _move(path: Path, complete: Path) -> None:
    try:
        os.replace(complete, _target(path))
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror}.") from error


def _target(path: Path) -> Path:
    """Follow links."""
    return Path(os.path.realpath(path))


def _exists(option: str, path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option} '{path}' is no name for a file: {reason}.") from error
    return True


def _check_folder(option: str, path: Path) -> None:
    """Refuse a file whose folder is missing, is none, or takes no files."""
    folder = _target(path).parent  # where a link leads
    shown = path.parent if folder == _target(path.parent) else folder
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except (OSError, ValueError) as error:
        above = next(ancestor for ancestor in (folder, *folder.parents) if os.path.lexists(ancestor))
        if not above.is_dir():
            raise InputError(f"{option} '{path}' lies under '{above.name}', which is a file and not a folder.") from error
        if above != folder:
            raise InputError(f"{option} '{path}' lies in the folder '{shown}', which does not exist. Make it first.") from error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option} '{path}' lies in the folder '{shown}', where no file can be made: {reason}.") from error


def _check_existing(option: str, path: Path, inputs: Mapping[str, Path | str | None], *, replace: bool) -> None:
    """Refuse to write over what is no plain file, and over a plain file unless that is wanted."""
    if path.is_dir():
        raise InputError(f"{option} '{path}' is a folder that exists already. Give another name.")
    if not path.is_file():
        raise InputError(f"{option} '{path}' is no plain file. Give the name of a file.")
    if replace:
        return
    source = next((name for name, read in inputs.items() if read is not None and _same(path, read)), None)
    what = "exists already" if source is None else f"is the file that {source} reads"
    raise InputError(
        f"{option} '{path}' {what}. Give another name, or say that it may be replaced: --force, in Python overwrite=True."
    )


def _same(path: Path, other: Path | str) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return False
