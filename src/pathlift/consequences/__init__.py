"""What follows from the path-norm and the path-metric for training: flatness and generalisation (mathematics §7)."""

from pathlift.consequences import arguments as arguments
from pathlift.consequences.flatness import Sharpness, box_path_metric, sharpness
from pathlift.consequences.generalisation import GeneralisationBound, generalisation_bound

__all__ = [
    "GeneralisationBound",
    "Sharpness",
    "box_path_metric",
    "generalisation_bound",
    "sharpness",
]
