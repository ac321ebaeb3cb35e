"""Sets of networks around one, predictions that none of them changes, and the search for one that does (mathematics §5)."""

from pathlift.certification import arguments as arguments
from pathlift.certification.attacks import Attack, attack
from pathlift.certification.certificates import Certificate, certify
from pathlift.certification.radii import CertifiedRadius, certified_radius
from pathlift.certification.tolerances import Absolute, Pruned, Relative, Rounding
from pathlift.passes.box import Tolerance

__all__ = [
    "Absolute",
    "Attack",
    "Certificate",
    "CertifiedRadius",
    "Pruned",
    "Relative",
    "Rounding",
    "Tolerance",
    "attack",
    "certified_radius",
    "certify",
]
