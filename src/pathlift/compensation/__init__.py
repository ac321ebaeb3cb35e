"""What rounding or pruning takes from a network is made up for by what stays (mathematics §9).

In reading order: `damping` (second moments that can be inverted), `least_squares` (weights that stay), `correction` (biases and
batch norms), `update` (one weight, by moments), `sequential` (all of them with data, layer by layer), `api` (a whole network).
"""

from pathlift.compensation.api import compensated as compensated
from pathlift.compensation.correction import corrections as corrections
from pathlift.compensation.least_squares import least_squares as least_squares
from pathlift.compensation.update import Update as Update
