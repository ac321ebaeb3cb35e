"""Measure, compare and prune ReLU networks without being fooled by their rescaling symmetry.

Everything stands on the path-lifting Φ(θ) of a network: `path_norm`, `path_metric` and `path_magnitude` are unchanged by
every neuron-wise rescaling and are computed in about one forward pass each.

The names at the top are in `pathlift.public`; further ones are in their packages (`PACKAGES`), which are there without an
import: `pathlift.pruning`, say. All is loaded when a name is first asked for:
``pathlift --help`` need not wait for PyTorch.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pathlift.version import VERSION

if TYPE_CHECKING:
    from pathlift.public import *  # noqa: F403

__version__ = VERSION

PACKAGES = (
    "certification", "consequences", "errors", "lipschitz", "metric", "pruning", "quantisation", "report", "rescaling",
    "statistics", "storage",
)  # fmt: skip
"""Rooms with further public names."""

APART = ("cli", "experiments", "hugging_face", "lightning")
"""Rooms that may need an extra: a missing name is not looked for in these."""


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """Load the public names when one that is not there yet is asked for."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        public = import_module("pathlift.public")
        vars(self).update({listed: getattr(public, listed) for listed in public.__all__}, __all__=public.__all__)
        if name in vars(self):
            return vars(self)[name]
        rooms = [room.name for room in iter_modules(self.__path__) if not room.name.startswith("_")]
        packages = [f"pathlift.{room}" for room in rooms if room not in APART]
        lives = [package for package in packages if name in getattr(import_module(package), "__all__", ())]
        advice = "".join(f"; it lives in {room}: from {room} import {name}" for room in lives[:1])
        raise AttributeError(f"module 'pathlift' has no attribute '{name}'{advice}", name=name, obj=self)

    def __dir__(self) -> list[str]:
        """Return the public names, the packages with further ones, and what every module has; not what this file imports."""
        return sorted({*self.__all__, *PACKAGES, *(name for name in vars(self) if name.startswith("__"))})


sys.modules[__name__].__class__ = _Package
