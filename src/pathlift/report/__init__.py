"""What a network is, on one page: `Report` gathers the numbers of all rooms, draws them and writes them down.

`layers` and `costs` gather, `figures` draws, `page` writes.
"""

from pathlift.report import arguments as arguments
from pathlift.report.costs import Compared, PruningCost, QuantisationCost
from pathlift.report.gather import Report
from pathlift.report.layers import LayerShare, Scores

__all__ = ["Compared", "LayerShare", "PruningCost", "QuantisationCost", "Report", "Scores"]
