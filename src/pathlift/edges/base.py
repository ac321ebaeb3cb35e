"""The interface of an edge map: what every kind of edges between two layers can do.

A map knows its edges u → v and, for each, the number k of the weight that stands on it. Everything else follows:

    sum       out[v] = Σ_{u→v} x[u]·w[k]                        path-norm, path-metric: any pass that adds up paths
    each      `sum` of several x with the same w                tracks that travel alike
    sums      Σ_j of x_j with weights of their own, for each i  tracks that travel into each other
    max       out[v] = max_{u→v} x[u]·w[k]                      the path-norm for q = ∞
    adjoint   below[u] = Σ_{u→v} g[v]·w[k]                      the transpose of `sum` in x …
              share[k] = w[k]·Σ_{edges of k} x[u]·g[v]          … and in w, times w: what goes through each weight
    gap       out[v] = Σ_{u→v} |x[u]·w[k] − ratio·y[u]·z[k]|    the distance of two stars of edges
    gathered  G[k] = Σ_{edges of k} x[u]·g[v]                   `adjoint` of many g at once, without the factor w[k] …
    returned  below[u] = Σ_{u→v} g[v]·w[k]                      … and where each g has weights of its own
    pattern   k, u and v of all edges                           rescaling groups
    compact   the map between tensors that store equal positions once

Example: `Dense` with w = [[1, 2], [0, 3]] joins u_0, u_1 to v_0, v_1. For x = (5, 7): sum is (1·5 + 2·7, 0·5 + 3·7) =
(19, 21), max is (14, 21). For g = (1, 10), adjoint sends g·w = (1, 32) below, and to the weights w ⊙ (g ⊗ x) =
[[5, 14], [0, 210]]: its sum 229 is g·out, because every path crosses one of the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges.axis import Axis, full_axes
from pathlift.edges.pattern import Pattern
from pathlift.edges.weights import Bundle, Entry, Weights, add_scaled, computed
from pathlift.precision import recordable


@dataclass(frozen=True)
class Compact:
    """An edge map between compact tensors.

    Attributes:
        edges: The map.
        axes: Axes of its result.
        weight: What becomes of the weight tensor, None when it stays as it is.
    """

    edges: Edges
    axes: tuple[Axis, ...]
    weight: Callable[[Tensor], Tensor] | None = None


class Edges(ABC):
    """A bilinear map (x, w) ↦ out.

    Attributes:
        fresh: `sum` returns new memory, never a view of x.
        chooses: It is not bilinear.
        single: Each neuron above has one antecedent, to which one weight belongs: out[v] is a product of two numbers.
    """

    fresh: bool = True
    chooses: bool = False
    single: bool = False

    @abstractmethod
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """Return Σ_u x[u]·w[k(u→v)] for every neuron v above.

        Args:
            x: Values of the neurons below.
            w: The weights; None means that every edge weighs 1.

        Returns:
            Values of the neurons above.
        """

    def each(self, xs: Sequence[Tensor], w: Weights) -> list[Tensor]:
        """Apply `sum` to several tensors of one shape with the same weights, which are computed once.

        Args:
            xs: Values of the neurons below.
            w: The weights.

        Returns:
            Values of the neurons above.
        """
        ready = computed(w.full())
        return [self.sum(x, ready) for x in xs]

    def sums(self, xs: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        """Apply the map to several tracks at once: out_i = Σ_j factor_ij · sum(x_j, w_ij).

        Args:
            xs: Track to values of the neurons below, all of one shape; a track that is not there is 0.
            bundle: The weights.
            factors: Numbers by entry; entries without one are left out.

        Returns:
            Track to values of the neurons above, new memory.
        """
        above: dict[int, Tensor] = {}
        for (to, source), weight in bundle.full():
            if (to, source) in factors:
                add_scaled(above, to, self.sum(xs[source], computed(weight)), factors[to, source])
        return above

    @abstractmethod
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """Return max_u x[u]·w[k(u→v)] for non-negative x and w (0 where there is no edge).

        Args:
            x: Values of the neurons below, non-negative.
            w: The weights, non-negative; None means that every edge weighs 1.

        Returns:
            Values of the neurons above.
        """

    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        """Return Σ_u |x[u]·w[k(u→v)] − ratio[v]·y[u]·z[k(u→v)]| for every neuron v above, edge by edge.

        Args:
            x: Values of the neurons below.
            w: Their weights; 1 where the edges have none.
            y: Other values of the neurons below.
            z: Other weights.
            ratio: One number per neuron above.

        Returns:
            Values of the neurons above.

        Raises:
            NotImplementedError: The map has several antecedents per neuron and no list of them.
        """
        raise NotImplementedError(type(self).__name__)

    def largest(self, x: Tensor) -> Tensor:
        """Return the largest antecedent of each neuron above, for values of any sign.

        Args:
            x: Values of the neurons below.

        Returns:
            Values of the neurons above.
        """
        return self.antecedents(x).amax(0)

    def antecedents(self, x: Tensor) -> Tensor:
        """Lay the antecedents of each neuron above side by side, for values of any sign; weights are not looked at.

        Only the maps of pooling operators have it.

        Args:
            x: Values of the neurons below.

        Returns:
            Shape (antecedents, *shape of the neurons above); −inf where a neuron has fewer.

        Raises:
            NotImplementedError: The map belongs to no pooling operator.
        """
        raise NotImplementedError(type(self).__name__)

    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        """Tell which weight stands on which edge (`pathlift.edges.pattern`); for maps that a parameter can weigh.

        Args:
            below: Shape of the neurons below.
            weight: Shape of the weight.

        Returns:
            The pattern.

        Raises:
            NotImplementedError: Only constants can be the weights of this map.
        """
        raise NotImplementedError(type(self).__name__)

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """Return the same map between compact tensors (`pathlift.edges.axis`).

        Its law: with E the expansion of a compact tensor, E(compact(x)) = map(E(x)) for every x, whatever the weights are.

        Args:
            axes: Axes of the neurons below.
            out: Full shape of the neurons above.
            weight: Shape of the weight, None when there is none.

        Returns:
            The compact map, or the dimensions that have to be full for there to be one. When all dimensions are full, a
            map may always return itself.
        """
        del weight
        compact = frozenset(dim for dim, axis in enumerate(axes) if axis.classes is not None)
        return compact or Compact(self, full_axes(out))

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Go back from the neurons above: to those below, and to the weights.

        Args:
            x: Values of the neurons below in the forward pass.
            w: The weights of the forward pass.
            g: One number per neuron above.
            below: Whether the first result is wanted.
            share: Whether the second result is wanted.

        Returns:
            Σ_v g[v]·w[k(u→v)] per neuron u below, and w[k]·Σ_{edges of k} x[u]·g[v] per weight k; None for what was not
            wanted.
        """
        with torch.inference_mode(False), torch.enable_grad():
            values = recordable(x).detach().requires_grad_()
            weight = None if w is None else recordable(w.full()).detach().requires_grad_()
            out = self.sum(values, None if weight is None else computed(weight))
            wanted = ([values] if below else []) + ([weight] if share and weight is not None else [])
            slopes = list(torch.autograd.grad(out, wanted, g))
        to_below = slopes.pop(0) if below else None
        to_weight = slopes.pop(0) * weight.detach() if share and weight is not None else None
        return to_below, to_weight

    def gathered(self, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        """Add up x[u]·g[v] over the edges of each weight, for several functionals g of each sample.

        Args:
            x: Values of the neurons below, (samples, *below).
            w: A weight tensor; only the shape counts.
            g: One number per neuron above, or per neuron that the values above are repeated to, (samples, functionals, *above).

        Returns:
            Σ_{edges of k} x[u]·g[v] per weight k, (samples, functionals, *w.shape).
        """
        return self.gatherer(x, w)(g)

    def gatherer(self, x: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
        """Return `gathered` as a function of g, which may be the same for all samples, (1, functionals, *above)."""

        def gathered(g: Tensor) -> Tensor:
            def of_sample(values: Tensor, rows: Tensor) -> Tensor:
                _, pull, *_ = torch.func.vjp(lambda weight: self.sum(values, computed(weight)).expand(g.shape[2:]), w)
                out: Tensor = torch.vmap(lambda row: pull(row)[0])(rows)
                return out

            found: Tensor = torch.vmap(of_sample)(x, g.expand(len(x), *g.shape[1:]))
            return found

        return gathered

    def returned(self, below: Sequence[int], w: Tensor, g: Tensor) -> Tensor:
        """Go back to the neurons below with several functionals g of each sample, each through weights of its own.

        Args:
            below: Shape of the neurons below.
            w: The weights, (samples, functionals, *shape of the weight).
            g: One number per neuron above, or per neuron that the values above are repeated to, (samples, functionals, *above).

        Returns:
            Σ_{u→v} g[v]·w[k(u→v)] per neuron u below, (samples, functionals, *below).
        """
        blank = w.new_zeros(tuple(below))

        def of_row(weight: Tensor, row: Tensor) -> Tensor:
            _, pull, *_ = torch.func.vjp(lambda x: self.sum(x, computed(weight)).expand(g.shape[2:]), blank)
            out: Tensor = pull(row)[0]
            return out

        returned: Tensor = torch.vmap(of_row)(w.flatten(0, 1), g.flatten(0, 1)).unflatten(0, g.shape[:2])
        return returned
