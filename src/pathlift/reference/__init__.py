"""The reference: explicit neurons, every path listed, float64 or exact rationals. Shares no code with the fast passes."""

from pathlift.reference import arguments as arguments
from pathlift.reference.dag import Bias, Dag, Edge, Neuron, Path, State
from pathlift.reference.lifting import PathLifting, path_lifting
from pathlift.reference.probe import Probe, dag_of

__all__ = ["Bias", "Dag", "Edge", "Neuron", "Path", "PathLifting", "Probe", "State", "dag_of", "path_lifting"]
