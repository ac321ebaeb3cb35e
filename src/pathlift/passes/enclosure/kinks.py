"""Kinks with parabolas above them: y ≤ mid·z + half·|z| and |z| ≤ κ·z² + 1/(4κ); see `together`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges.unit import Identity
from pathlift.graph.layers import Layer, Slopes
from pathlift.passes.enclosure.lines import Lines
from pathlift.passes.enclosure.relaxation import Bend, Relaxation


@dataclass(frozen=True)
class Kinks:
    """The kinks of one layer that may have parabolas.

    Attributes:
        source: The layer that the nonlinearity reads.
        least: The slope left of 0.
        half: Half of what the slope rises by.
        inside: Which kinks, (1, *shape) bool.
        places: The same, numbers in the flat layer, (kinks,).
        centre: Of the form of what is read, (1, *shape).
    """

    source: str
    least: float
    half: float
    inside: Tensor
    places: Tensor
    centre: Tensor

    def bend(self, curve: Tensor, share: Tensor) -> Bend:
        """Return parabolas y ≤ mid·z + half·(κ·z² + 1/(4κ)) that take the part 1 − w of the place of the chord.

        Args:
            curve: log κ, (1, *shape).
            share: The logit of w, (1, *shape).

        Returns:
            What stands above the nonlinearity.
        """
        part, kappa, c = torch.where(self.inside, share.sigmoid(), 1.0), curve.exp(), self.centre
        bent = (1 - part) * self.half
        slope = (1 - part) * (self.least + self.half) + 2 * bent * kappa * c
        return Bend(part, slope, bent * (0.25 / kappa - kappa * c * c), bent * kappa)


def last_kinks(relaxation: Relaxation) -> Layer | None:
    """Return the last layer with a nonlinearity, where it is a convex one with kinks of which some may be crossed.

    Args:
        relaxation: What is known of one sample.

    Returns:
        The layer; None where parabolas are of no use.
    """
    for layer in reversed(relaxation.network.layers):
        if layer.nonlinearity is not None:
            return layer if has_parabolas(relaxation, layer) else None
    return None


def has_parabolas(relaxation: Relaxation, layer: Layer) -> bool:
    """Whether a layer is a convex nonlinearity of one layer with kinks of which some may be crossed."""
    if not isinstance(layer.nonlinearity, Slopes) or layer.name not in relaxation.free:
        return False
    connection = layer.connections[0]
    same = isinstance(connection.edges, Identity) and relaxation.network.layer[connection.source].shape == layer.shape
    return same and connection.weight is None


def paid_by_chords(relaxation: Relaxation, top: Layer, functionals: Mapping[str, Tensor]) -> Tensor:
    """Return what the chords above the last kinks cost functionals that were handed down to them, (1, functionals)."""
    lines, where = relaxation.lines[top.name], relaxation.free[top.name].where
    assert isinstance(lines, Lines)
    heights = torch.where(where, lines.upper, 0.0).unsqueeze(1)
    paid = functionals[top.name].clamp(max=0.0).abs() * heights
    return paid.reshape(*paid.shape[:2], -1).sum(2)
