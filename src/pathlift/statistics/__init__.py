"""What the activations of a network look like, also without data: mean, variance, correlations, sensitivity (mathematics §9).

In reading order: `kinks` (piecewise linear functions of a Gaussian), `transfer` (how moments go along edges), `propagation`
(the way forward), `covariances` and `correlated` (the same with correlations between channels), `measure` (data instead),
`sensitivity` (the way back), `model` (all of it), `input_moments` (what one weight multiplies, for quantisation and pruning,
with `cholesky` for wide ones), `synthetic` (data that are made from batch norms), `api` (what users call).
"""

from pathlift.statistics import arguments as arguments
from pathlift.statistics.api import ActivationStatistics, LayerStatistics, activation_statistics
from pathlift.statistics.input_moments import InputMoments as InputMoments
from pathlift.statistics.input_moments import input_moments as input_moments
from pathlift.statistics.model import ActivationModel as ActivationModel
from pathlift.statistics.model import activation_model as activation_model
from pathlift.statistics.synthetic import synthetic_inputs

__all__ = ["ActivationStatistics", "LayerStatistics", "activation_statistics", "synthetic_inputs"]
