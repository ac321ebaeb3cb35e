"""Every public name of pathlift, as `pathlift` itself gives them; importing it loads PyTorch."""

from pathlift.attack import Attack, attack
from pathlift.bounds import LipschitzBound, MetricBound, lipschitz_bound, path_metric_bounds
from pathlift.bounds.moments import InputLipschitz, expected_bound, gradient_norms, input_lipschitz
from pathlift.certify import Certificate, certify
from pathlift.checkpoint import Checkpoint
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
from pathlift.generalisation import GeneralisationBound, generalisation_bound
from pathlift.kernel import PathKernel, path_kernel
from pathlift.metric import Estimate, PathMetric, Step, path_metric
from pathlift.network import Network
from pathlift.passes.magnitude import PathMagnitude, path_magnitude, unit_path_magnitude
from pathlift.passes.norm import PathNorm, log_path_norm, path_norm
from pathlift.pruning import CRITERIA, Batch, PruneReport, apply_masks, load_masks, prune, save_masks
from pathlift.reading import SupportReport, capture, check_support
from pathlift.reference import PathLifting, path_lifting
from pathlift.sharpness import Sharpness, box_path_metric, sharpness
from pathlift.streaming import path_metrics, path_norms, stream
from pathlift.symmetry import (
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
from pathlift.tolerance import Absolute, Pruned, Relative, Rounding, Tolerance

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
