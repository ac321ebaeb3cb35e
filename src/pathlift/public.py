"""Every public name of pathlift, as `pathlift` itself gives them; importing it loads PyTorch."""

from pathlift.certification.attacks import Attack, attack
from pathlift.certification.certificates import Certificate, certify
from pathlift.certification.tolerances import Absolute, Pruned, Relative, Rounding
from pathlift.consequences.flatness import Sharpness, box_path_metric, sharpness
from pathlift.consequences.generalisation import GeneralisationBound, generalisation_bound
from pathlift.errors import (
    CallError,
    InputError,
    MismatchError,
    NumericalError,
    OutOfMemoryError,
    OutOfTimeError,
    PathliftError,
    PathliftWarning,
    Problem,
    UnsupportedModelError,
)
from pathlift.graph.network import Network
from pathlift.kernel import PathKernel, path_kernel
from pathlift.lifting import PathLifting, path_lifting
from pathlift.lipschitz.bound import LipschitzBound, MetricBound, lipschitz_bound, path_metric_bounds
from pathlift.lipschitz.expected import InputLipschitz, expected_bound, gradient_norms, input_lipschitz
from pathlift.magnitude import PathMagnitude, path_magnitude, unit_path_magnitude
from pathlift.metric.metric import Estimate, PathMetric, Step, path_metric
from pathlift.norm import PathNorm, log_path_norm, path_norm
from pathlift.passes.box import Tolerance
from pathlift.pruning import CRITERIA, Batch, PruneReport, apply_masks, load_masks, prune, save_masks
from pathlift.reading import SupportReport, capture, check_support
from pathlift.rescaling import (
    BalancedState,
    Equivalence,
    RescaledState,
    Symmetries,
    align,
    equivalent,
    rescaling_distance,
    symmetries,
    with_state,
)
from pathlift.storage.checkpoints import Checkpoint
from pathlift.streaming import path_metrics, path_norms, stream

__all__ = [
    "CRITERIA",
    "Absolute",
    "Attack",
    "BalancedState",
    "Batch",
    "CallError",
    "Certificate",
    "Checkpoint",
    "Equivalence",
    "Estimate",
    "GeneralisationBound",
    "InputError",
    "InputLipschitz",
    "LipschitzBound",
    "MetricBound",
    "MismatchError",
    "Network",
    "NumericalError",
    "OutOfMemoryError",
    "OutOfTimeError",
    "PathKernel",
    "PathLifting",
    "PathMagnitude",
    "PathMetric",
    "PathNorm",
    "PathliftError",
    "PathliftWarning",
    "Problem",
    "PruneReport",
    "Pruned",
    "Relative",
    "RescaledState",
    "Rounding",
    "Sharpness",
    "Step",
    "SupportReport",
    "Symmetries",
    "Tolerance",
    "UnsupportedModelError",
    "align",
    "apply_masks",
    "attack",
    "box_path_metric",
    "capture",
    "certify",
    "check_support",
    "equivalent",
    "expected_bound",
    "generalisation_bound",
    "gradient_norms",
    "input_lipschitz",
    "lipschitz_bound",
    "load_masks",
    "log_path_norm",
    "path_kernel",
    "path_lifting",
    "path_magnitude",
    "path_metric",
    "path_metric_bounds",
    "path_metrics",
    "path_norm",
    "path_norms",
    "prune",
    "rescaling_distance",
    "save_masks",
    "sharpness",
    "stream",
    "symmetries",
    "unit_path_magnitude",
    "with_state",
]
