"""What follows from the path-norm and the path-metric for training: flatness and generalisation (mathematics §7)."""

from pathlift.consequences import arguments as arguments
