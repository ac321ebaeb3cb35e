"""Edge maps one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from typing_extensions import override

from pathlift.edges.base import Edges
from pathlift.edges.weights import Bundle, Entry, Weights


class Chain(Edges):
    """Edge maps one after the other, of which at most one carries the weight.

    The maps around it have edges that weigh 1: they expand a compact tensor, say, or choose its classes. So the chain is
    bilinear in x and the one weight, as a map has to be.
    """

    def __init__(self, *links: Edges, weighted: int) -> None:
        """Describe the map.

        Args:
            links: The maps, first to last.
            weighted: Which one has the weight.
        """
        self.links = links
        self.weighted = weighted
        self.fresh = any(link.fresh for link in links)
        self.chooses = any(link.chooses for link in links)

    def _weighed(self, w: Weights | None) -> Iterator[tuple[Edges, Weights | None]]:
        """Yield the maps, each with the weight that it carries."""
        for number, link in enumerate(self.links):
            yield link, w if number == self.weighted else None

    @override
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        for link, weight in self._weighed(w):
            x = link.sum(x, weight)
        return x

    @override
    def each(self, xs: Sequence[Tensor], w: Weights) -> list[Tensor]:
        for number, link in enumerate(self.links):
            xs = link.each(xs, w) if number == self.weighted else [link.sum(x, None) for x in xs]
        return list(xs)

    @override
    def sums(self, xs: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        """Weights are computed as the map that carries them asks for them."""
        tracks = dict(xs)
        for number, link in enumerate(self.links):
            if number == self.weighted:
                tracks = link.sums(tracks, bundle, factors)
            else:
                tracks = {track: link.sum(x, None) for track, x in tracks.items()}
        return tracks

    @override
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        for link, weight in self._weighed(w):
            x = link.max(x, weight)
        return x

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the values between the maps once more, and take g back through them."""
        values = [x]
        for link, weight in list(self._weighed(w))[:-1]:
            values.append(link.sum(values[-1], weight))
        to_weight: Tensor | None = None
        for number, (link, weight) in reversed(list(enumerate(self._weighed(w)))):
            carries = number == self.weighted
            to_below, shares = link.adjoint(values[number], weight, g, below=below or number > 0, share=share and carries)
            to_weight = shares if carries else to_weight
            if to_below is None:
                return None, to_weight
            g = to_below
        return g, to_weight
