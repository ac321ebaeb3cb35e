"""How far two networks of one architecture, or all networks of a set, can differ on an input (SPEC §4, §5)."""

from pathlift.lipschitz import arguments as arguments
