"""What the activations of a network look like, without data: means, variances, correlations, sensitivities (mathematics §9)."""

from pathlift.statistics.input_moments import InputMoments, input_moments
from pathlift.statistics.model import ActivationModel, activation_model

__all__ = ["ActivationModel", "InputMoments", "activation_model", "input_moments"]
