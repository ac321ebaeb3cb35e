"""The definitions, slow and obviously correct: explicit neurons, every path listed, float64 or exact rationals.

Imports PyTorch and nothing of pathlift: the fast passes, and the capture of models, are tested against it.
"""

from pathlift.reference.calls import ProbeError
from pathlift.reference.dag import Bias, Dag, Edge, Neuron, Path, State, TooManyPathsError
from pathlift.reference.probe import Probe, dag_of

__all__ = ["Bias", "Dag", "Edge", "Neuron", "Path", "Probe", "ProbeError", "State", "TooManyPathsError", "dag_of"]
