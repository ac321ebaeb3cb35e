"""Sets of networks around one, predictions that none of them changes, and the search for one that does (mathematics §5)."""

from pathlift.certification import arguments as arguments
