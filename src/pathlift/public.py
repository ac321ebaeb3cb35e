"""The names at the top of pathlift: what most people need. The rest is in its package, `pathlift.pruning.Batch` say.

`pathlift` itself gives them; importing this file loads PyTorch.
"""

from pathlift import consequences as consequences
from pathlift import report as report
from pathlift.certification import Absolute, Pruned, Relative, Rounding, attack, certify
from pathlift.errors import InputError, MismatchError, NumericalError, PathliftError, UnsupportedModelError
from pathlift.graph.network import Network
from pathlift.kernel import path_kernel
from pathlift.lifting import path_lifting
from pathlift.lipschitz import lipschitz_bound
from pathlift.magnitude import path_magnitude, unit_path_magnitude
from pathlift.metric import path_metric
from pathlift.norm import log_path_norm, path_norm
from pathlift.pruning import prune
from pathlift.quantisation import quantize
from pathlift.reading import capture, check_support
from pathlift.rescaling import align, equivalent, symmetries
from pathlift.saving import save
from pathlift.statistics import activation_statistics, synthetic_inputs
from pathlift.storage import load_model
from pathlift.streaming import path_metrics, path_norms, stream

__all__ = [
    "Absolute",
    "InputError",
    "MismatchError",
    "Network",
    "NumericalError",
    "PathliftError",
    "Pruned",
    "Relative",
    "Rounding",
    "UnsupportedModelError",
    "activation_statistics",
    "align",
    "attack",
    "capture",
    "certify",
    "check_support",
    "equivalent",
    "lipschitz_bound",
    "load_model",
    "log_path_norm",
    "path_kernel",
    "path_lifting",
    "path_magnitude",
    "path_metric",
    "path_metrics",
    "path_norm",
    "path_norms",
    "prune",
    "quantize",
    "save",
    "stream",
    "symmetries",
    "synthetic_inputs",
    "unit_path_magnitude",
]
