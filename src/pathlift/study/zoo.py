"""The file that says which networks a study looks at and what it asks of them (YAML)."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathlift.arguments.kinds import text, whole
from pathlift.errors import InputError, nearest
from pathlift.storage.checkpoints import checkpoint_paths
from pathlift.storage.packages import package
from pathlift.study.functions import Call, call_of, stamps_of
from pathlift.version import VERSION

LIBRARIES = {"torchvision": ("torchvision.models", "vision"), "timm": ("timm", "timm")}
"""Where a * in the name of a model stands for whatever fits: the module that lists models, and its extra."""

KEYS = ("model", "weights", "key", "seed", "shape", "arguments", "until", "functions", "about")
"""What may be said of a model."""

SEED = whole("a whole number from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63)

LARGEST = 2**20
"""Bytes of a file, at most: a list of models is never longer."""


@dataclass(frozen=True)
class Subject:
    """One network, and what is asked of it.

    Attributes:
        model: Its name, as on the command line.
        calls: What is asked.
        weights: A file of weights; None for random ones.
        key: Which of several sets of weights in the file.
        seed: Of random weights.
        shape: Of the input, or of several, without the batch dimension; None for what the name tells.
        arguments: Of what builds the model.
        until: Where to stop reading.
        about: What is known of the network, for the table: an accuracy, a year.
    """

    model: str
    calls: tuple[Call, ...]
    weights: str | None = None
    key: str | None = None
    seed: int = 0
    shape: tuple[Any, ...] | None = None
    arguments: Mapping[str, Any] | None = None
    until: str | None = None
    about: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The network in a word: its model, with weights and seed where they are given."""
        parts = [self.weights] if self.weights else [f"seed {self.seed}"] if self.seed else []
        return " ".join([self.model, *(f"({part})" for part in parts)])

    @property
    def digest(self) -> str:
        """What the file of its results is called: another network, file of weights or version of pathlift has another."""
        said: list[object] = [VERSION, self.model, self.key, self.seed, self.shape, self.arguments, self.until]
        said += [None if path is None else [path, *stamps_of(Path(path))] for path in (self.weights, self.model)]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def read_zoo(path: Path) -> tuple[Subject, ...]:
    """Read a zoo file.

    Args:
        path: The file.

    Returns:
        The networks, in their order.

    Raises:
        InputError: It cannot be read, or something in it is not what it may be; said of the first such thing, with its place.
    """
    with _said_of(f"'{path}'"):
        content = _keys(_loaded(path), known=("functions", "models"), needed=("functions", "models"))
        calls = _calls(content["functions"])
        subjects: dict[str, Subject] = {}
        for number, entry in enumerate(_list("models", content["models"]), 1):
            with _said_of(f"model {number}"):
                for subject in _subjects(entry, calls):
                    if subject.digest in subjects:
                        raise InputError(f"'{subject.name}' is there twice. Leave one out, or give another seed.")
                    subjects[subject.digest] = subject
    return tuple(subjects.values())


@contextmanager
def _said_of(place: str) -> Iterator[None]:
    """Put before an error where it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error.__cause__


def _loaded(path: Path) -> Any:
    """Read YAML; a key that stands twice in a mapping is refused, of which YAML itself would keep the last."""
    yaml = package("yaml", "study")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [name for number, name in enumerate(names) if name in names[:number]]
            if twice:
                raise InputError(f"line {node.start_mark.line + 1}: the key {twice[0]!r} is there twice.")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            return mapping

    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # a name with a zero byte in it is the latter
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(text) > LARGEST:
        raise InputError(f"it has more than {LARGEST:,} bytes, and is no list of models.")
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"it is no YAML: {' '.join(str(error).split()):.300}") from error


def _keys(value: object, known: Sequence[str], needed: Sequence[str]) -> Mapping[str, Any]:
    """Return a mapping whose keys are known."""
    if not isinstance(value, Mapping):
        raise InputError(f"expected the keys {', '.join(known)}; found {value!r:.80}.")
    for key in value:
        if key not in known:
            raise InputError(f"there is no key {key!r:.80}.{nearest(str(key), known)}")
    for key in needed:
        if key not in value:
            raise InputError(f"the key '{key}' is missing.")
    return value


def _list(key: str, value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{key} must be a list that is not empty, found {value!r:.80}.")
    return value


def _calls(value: object) -> tuple[Call, ...]:
    calls = tuple(map(call_of, _list("functions", value)))
    labels = [call.label for call in calls]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise InputError(f"{twice[0]} is there twice.")
    return calls


def _subjects(entry: object, calls: tuple[Call, ...]) -> Iterator[Subject]:
    """Return each network that an entry stands for: of every model that its name fits, every file of weights, every seed."""
    given = {"model": entry} if isinstance(entry, str) else _keys(entry, known=KEYS, needed=("model",))
    kinds: Mapping[str, Callable[[str, Any], Any]] = {
        "model": text("the name of a model", 1), "key": text("a name", 1), "until": text("a name", 1), "shape": _shape,
        "arguments": _named_values, "about": _named_values,
    }  # fmt: skip
    values = {key: kinds[key](key, value) for key, value in given.items() if key in kinds}
    own = _calls(given["functions"]) if "functions" in given else calls
    paths = _paths(given["weights"]) if "weights" in given else []
    files: list[str | None] = [str(file) for path in paths for file in checkpoint_paths(path)]
    seeds = given.get("seed", 0)
    if "seed" in given and "weights" in given:
        raise InputError("seed has no effect beside weights: leave it out.")
    if "key" in given and "weights" not in given:
        raise InputError("key has no effect without weights: leave it out.")
    for model in _models(values.pop("model")):
        for file in files or [None]:
            for seed in seeds if isinstance(seeds, list) else [seeds]:
                yield Subject(model, own, file, seed=SEED("seed", seed), **values)


def _models(name: str) -> list[str]:
    """Return the models that a name stands for."""
    library, _, pattern = name.partition(":")
    if library not in LIBRARIES:
        if "*" in name:
            raise InputError(f"'{name}': a * stands for models of torchvision or timm only.")
        return [name]
    listed = package(*LIBRARIES[library]).list_models()
    if "*" in pattern:
        models = fnmatch.filter(listed, pattern)
        if not models:
            raise InputError(f"{library} has no model that '{pattern}' fits.")
        return [f"{library}:{model}" for model in models]
    if pattern.partition(".")[0] not in listed:
        raise InputError(f"{library} has no model '{pattern}'.{nearest(pattern, listed)}")
    return [name]


def _paths(value: object) -> list[Path]:
    """Return one path or several, which are there."""
    paths = [Path(text("weights: a path", 1)("weights", each)) for each in (value if isinstance(value, list) else [value])]
    for path in paths:
        if not path.exists():
            raise InputError(f"there is no file '{path}'.")
    return paths


def _shape(name: str, value: object) -> tuple[Any, ...]:
    """Return the shape of an input, or those of several."""
    lists = value if isinstance(value, list) and value and all(isinstance(each, list) for each in value) else [value]
    sizes = tuple(tuple(each) if isinstance(each, list) else () for each in lists)
    if not all(shape and all(type(size) is int and size > 0 for size in shape) for shape in sizes):
        raise InputError(f"{name} must be a list of positive whole numbers, or of such lists, found {value!r:.80}.")
    return sizes if lists is value else sizes[0]


def _named_values(name: str, value: object) -> Mapping[str, Any]:
    """Return words and numbers by name."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name} must be values by name, found {value!r:.80}.")
    for key, each in value.items():
        if not isinstance(each, (str, int, float, bool, type(None), list)) or (name == "about" and isinstance(each, list)):
            raise InputError(f"{name}: '{key}' must be a number or a word, found {each!r:.80}.")
    return value
