"""Measure, compare and prune ReLU networks without being fooled by their rescaling symmetry.

Everything stands on the path-lifting Φ(θ) of a network: `path_norm`, `path_metric` and `path_magnitude` are unchanged by
every neuron-wise rescaling and are computed in about one forward pass each.

The names at the top are in `pathlift.public`; further ones are in their packages, which are there without an import:
`pathlift.pruning`, `pathlift.rescaling`, `pathlift.metric`, `pathlift.lipschitz`, `pathlift.certification`,
`pathlift.consequences`, `pathlift.storage`, `pathlift.errors`. All is loaded when a name is first asked for:
``pathlift --help`` need not wait for PyTorch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlift.public import *  # noqa: F403

__version__ = "0.2.0"


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """Load the public names when one that is not there yet is asked for."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        public = import_module("pathlift.public")
        names = public.__all__
        vars(self).update({own: getattr(public, own) for own in names}, __all__=names)
        try:
            return vars(self)[name]
        except KeyError:
            raise AttributeError(f"module 'pathlift' has no attribute '{name}'") from None

    def __dir__(self) -> list[str]:
        """Return all names, the public ones too."""
        return sorted({*vars(self), *self.__all__})


sys.modules[__name__].__class__ = _Package
