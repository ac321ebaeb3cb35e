"""What the activations of a network look like, without data: means, variances, correlations, sensitivities (mathematics §9)."""

from pathlift.statistics import arguments as arguments
from pathlift.statistics.api import ActivationStatistics, LayerStatistics, activation_statistics
from pathlift.statistics.input_moments import InputMoments, input_moments
from pathlift.statistics.model import ActivationModel, activation_model

__all__ = [
    "ActivationModel",
    "ActivationStatistics",
    "InputMoments",
    "LayerStatistics",
    "activation_model",
    "activation_statistics",
    "input_moments",
]
