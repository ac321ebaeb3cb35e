"""Pruning criteria: functions of a network that score each weight, the larger the more it matters (mathematics §6).

One file per kind of knowledge: the weights alone, the paths, the activations on data, a loss.
"""

from pathlift.pruning.criteria.activations import wanda
from pathlift.pruning.criteria.loss import Batch, fisher, grasp, loss_sensitivity, snip
from pathlift.pruning.criteria.paths import balanced_magnitude, path_magnitude_scores, relative_path_magnitude, synflow
from pathlift.pruning.criteria.surgeon import output_error
from pathlift.pruning.criteria.weights import magnitude, random_scores

__all__ = [
    "Batch",
    "balanced_magnitude",
    "fisher",
    "grasp",
    "loss_sensitivity",
    "magnitude",
    "output_error",
    "path_magnitude_scores",
    "random_scores",
    "relative_path_magnitude",
    "snip",
    "synflow",
    "wanda",
]
