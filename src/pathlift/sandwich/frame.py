"""Two networks in one gauge that depends on neither's: bounds compare weights one by one, Φ does not (SPEC §4, "Gauge").

θ' is brought into the gauge of θ by medians of log-ratios, which follow a rescaling of either side exactly. Then both are
rescaled alike, so that the path activations of θ grow evenly with depth: what is computed for (θ, λ∘θ') or (λ∘θ, θ') is
what is computed for (θ, θ'), up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges.base import PAIR_ELEMENTS
from pathlift.network import LazyState, Leaf, Network, StateTensor, widen
from pathlift.passes.programs import Values
from pathlift.symmetry.fit import Pair, scaled
from pathlift.symmetry.gauges import even
from pathlift.symmetry.tying import Scaling, Tied, tied

STILL = 1e-9
"""log₂ factors up to this are taken to be 0, so that weights that are equal stay equal."""

SAMPLE = 1 << 11
"""Weights of a tensor that are looked at to choose g."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""The multiples of this number spread most evenly over the unit circle."""


class _Gauged(LazyState):
    """A state that is rescaled when it is read, in float64 where it is."""

    def __init__(self, network: Network, state: Mapping[str, Tensor], scales: Tensor) -> None:
        self.state = state
        self.scales = scales
        self.network = network

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        tensor, scaling = self.state[name].detach().to(self.network.device), tied(self.network).scalings.get(name)
        if scaling is None:
            return tensor
        return tensor.double() * torch.exp2(scaled(scaling, self.scales, tensor)).to(tensor.device)

    def __iter__(self) -> Iterator[str]:
        """Iterate over names."""
        return iter(self.state)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.state)

    def dtype(self, name: str) -> torch.dtype:
        """See `LazyState.dtype`."""
        return torch.float64 if name in tied(self.network).scalings else self.state[name].dtype


@dataclass(frozen=True, eq=False)
class Frame:
    """Two networks in one gauge; their weights are made when they are read, and never all at once.

    Attributes:
        network: The compact graph.
        tied: Its symmetries.
        states: θ and θ' as they were given, by canonical name.
        scales: log₂ factors by class, for each.
        values: Leaf to weights in the common gauge, for each, float64.
        changed: The leaves where they differ, and all biases: what is compared weight by weight.
        flips: Whether the sign of a weight differs.
    """

    network: Network
    tied: Tied
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    scales: tuple[Tensor, Tensor]
    values: tuple[Values, Values]
    changed: frozenset[Leaf]
    flips: bool

    def parts(self, leaf: Leaf) -> tuple[Tensor, ...]:
        """Return what the weights of a leaf are made of, without copies of plain parameters; see `joined`."""
        scaling = self._plain(leaf)
        if scaling is None:
            return tuple(side[leaf].double() for side in self.values)
        assert isinstance(leaf.expression, StateTensor)
        name = leaf.expression.name
        raw = [widen(state[name].detach()).to(self.network.device) for state in self.states]
        factors: list[Tensor] = []
        for scales in self.scales:
            for classes, sign in ((scaling.above, 1.0), (scaling.below, -1.0)):
                factor = torch.exp2(sign * scales[classes]).to(self.network.device)
                factors.append(scaling.join(factor, raw[0].shape))
        return (*raw, *factors)

    def _plain(self, leaf: Leaf) -> Scaling | None:
        if not isinstance(leaf.expression, StateTensor):
            return None
        scaling = self.tied.scalings.get(leaf.expression.name)
        if scaling is None or scaling.index is not None or scaling.layout.shape[0] != 1:
            return None
        return scaling

    @staticmethod
    def joined(*parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return θ and θ' in the common gauge from parts, or from the same slice of all parts."""
        if len(parts) == 2:
            return parts[0], parts[1]
        first, second, up, down, other_up, other_down = parts
        return first * (up * down), second * (other_up * other_down)

    def sample(self, leaf: Leaf) -> tuple[Tensor, Tensor]:
        """Return some of the weights of a leaf, float64: evenly spread, and over the rows and columns too."""
        parts = self.parts(leaf)
        count = parts[0].numel()
        index = torch.arange(min(count, SAMPLE), device=parts[0].device)
        if count > SAMPLE:
            index = ((index.double() * GOLDEN).frac() * count).long()
        where = torch.unravel_index(index, parts[0].shape)
        return self.joined(*(part[where].double() for part in parts))


def frame(network: Network, compared: Pair) -> Frame:
    """Bring two networks into one gauge.

    Args:
        network: The network as captured, with θ.
        compared: θ and θ'.

    Returns:
        Both.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    compact, relations, state = network.compact, tied(network), compared.other
    apart = torch.where(compared.rough.abs() < STILL, 0.0, compared.rough)
    mine = relations.solution.scales(even(network, relations))
    theirs = mine - relations.solution.scales(apart)
    values = (
        compact.values(_Gauged(network, network.state, mine)),
        compact.values(_Gauged(network, state, theirs)),
    )
    plain = Frame(compact, relations, (network.state, state), (mine, theirs), values, frozenset(), False)
    changed, flips = {start.weight for node in compact.nodes for start in node.starts if start.weight.scalar is None}, False
    for leaf in compact.leaves:
        if leaf.scalar is None:
            own = _difference(plain, leaf)
            changed |= {leaf} if own[0] else set()
            flips = flips or own[1]
    return Frame(compact, relations, (network.state, state), (mine, theirs), values, frozenset(changed), flips)


def _difference(plain: Frame, leaf: Leaf) -> tuple[bool, bool]:
    """Return whether the weights of a leaf differ, and whether a sign does; factors are positive."""
    first, second, *factors = plain.parts(leaf)
    up, down, other_up, other_down = factors or [torch.ones((), device="cpu")] * 4
    different = not (torch.equal(up, other_up) and torch.equal(down, other_down))
    pairs = zip(first.reshape(-1).split(PAIR_ELEMENTS), second.reshape(-1).split(PAIR_ELEMENTS), strict=True)
    for one, two in pairs:
        if one.dtype == two.dtype and torch.equal(one, two):
            continue
        different = True
        if bool((one.sign() * two.sign()).amin() < 0):
            return True, True
    return different, False
