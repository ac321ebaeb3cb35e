"""A model as the theory sees it: layers of neurons, edges between them, and expressions for their weights (mathematics §1)."""

from pathlift.graph import arguments as arguments
