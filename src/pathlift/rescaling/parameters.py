"""How parameters scale when weights do (mathematics §7): which weights are free, and what the others ask for.

A weight on the edge u → v scales by 2^(s(v) − s(u)), a bias of v by 2^s(v). Each is a sum of products of parameters
(`pathlift.rescaling.monomials`), and scales by 2^x when every product of it does. Is that a condition on s?

Owners. A parameter that occurs in a single product of the whole network *owns* it: whatever the rest of the product does,
the owner can be chosen such that the product scales as it has to, and nothing else notices. So the product asks for nothing
and can be crossed out, which may leave another parameter with a single occurrence. A weight tensor all of whose products
get an owner is *free*. Any other gets a label per element (how it scales) and one equation for each product: label = Σ
degree·(label of the factor).

Worked example, a batch norm with the running mean μ from u to v: the weight s = γ·c has the product (γ), the bias t = β −
μ·s the products (β) and (μ, γ). γ occurs twice, β and μ once. β owns (β), μ owns (μ, γ); once these are crossed out γ
occurs once and owns (γ). All is free: γ scales by s(v) − s(u) because s does, β by s(v), and μ by what makes (μ, γ) scale
as t: s(v) − (s(v) − s(u)) = s(u).

Counterexample, a matrix that is used as W and as its transpose: (W) is the product of two weight tensors, so W owns
neither. Each W_ij gets a label, the label of both weights where it stands, which ties s at both places: s(v_i) − s(u_j) =
s(v'_j) − s(u'_i).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pathlift.edges.pattern import Layout
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.rescaling.monomials import CONSTANT, Factor, Product, factors, products
from pathlift.rescaling.relations import Relations, Solution
from pathlift.rescaling.scaling import NO_CLASS, Scaling
from pathlift.rescaling.shared_weights import WeightedEdges, ends


class ParameterScales:
    """The parameters of one network: owners, and labels for what has none.

    Attributes:
        products: Weight tensor to its products; those that are no sum of products are missing.
        free: Weight tensors that scale freely, to the one factor that they are, None for a product or sum of several.
        labels: Weight tensor to labels for how its elements scale, of its shape, for those that were asked for.
    """

    def __init__(self, network: Network, relations: Relations) -> None:
        """Find the owners.

        Args:
            network: The network.
            relations: Where labels and equations are put.
        """
        self.network, self.relations = network, relations
        self.products: dict[WeightTensor, tuple[Product, ...]] = {}
        self.labels: dict[WeightTensor, Tensor] = {}
        self._derived: dict[str, str] = {}
        self._occurrences: dict[str, int] = {}
        self._elements: dict[str, Tensor] = {}
        self._read()
        owners = self._owners()
        self.free: dict[WeightTensor, Factor | None] = {}
        self._definitions: list[tuple[WeightTensor, Product, Factor]] = []
        for weight, several in self.products.items():
            if all((weight, product) in owners for product in several):
                alone = len(several) == 1 and len(several[0]) == 1
                self.free[weight] = owners[weight, several[0]] if alone else None
                self._definitions += [] if alone else [(weight, product, owners[weight, product]) for product in several]

    def _read(self) -> None:
        """Write all weight tensors as sums of products; parameters of any other kind of weight must not scale."""
        for weight in self.network.weights:
            several = products(self.network, weight)
            if several is None:
                self._derived.update(dict.fromkeys(weight.requires & set(self.network.parameters), weight.label))
            else:
                self.products[weight] = several
                for factor in factors(several):
                    self._occurrences[factor.name] = self._occurrences.get(factor.name, 0) + 1

    def _owners(self) -> dict[tuple[WeightTensor, Product], Factor]:
        """Give products their owners, round by round; a constant has none."""
        pending = {(weight, product) for weight, several in self.products.items() for product in several if product}
        owners: dict[tuple[WeightTensor, Product], Factor] = {}
        while owned := {pair: owner for pair in pending if (owner := self._owner(pair[1])) is not None}:
            owners.update(owned)
            for pair in owned:
                pending.discard(pair)
                for factor in pair[1]:
                    self._occurrences[factor.name] -= 1
        return owners

    def _owner(self, product: Product) -> Factor | None:
        """Return the factor of a product whose parameter occurs nowhere else; each of its elements once, too."""
        for factor in product:
            once = self._occurrences[factor.name] == 1 and factor.name not in self._derived
            if once and (factor.index is None or len(torch.unique(factor.index)) == factor.index.numel()):
                return factor
        return None

    def constant(self, weight: WeightTensor) -> bool:
        """Whether a weight tensor does not scale."""
        return self.products.get(weight, CONSTANT) == CONSTANT

    def labels_of(self, weight: WeightTensor) -> Tensor:
        """Return labels for how the elements of a weight tensor scale.

        Args:
            weight: A weight tensor that scales.

        Returns:
            Labels of its shape: new ones if it is free, and otherwise tied to those of its parameters.
        """
        if weight in self.labels:
            return self.labels[weight]
        several = self.products[weight]
        shape = torch.Size(weight.shape)
        alone = several[0][0] if len(several) == 1 and len(several[0]) == 1 else None
        if weight not in self.free and alone is not None and alone.degree == 1:
            labels = self._labels_of_factor(alone)
        else:
            labels = self.relations.new(shape.numel()).reshape(shape)
            if weight not in self.free:
                for product in several:
                    parts = [self._labels_of_factor(factor) for factor in product]
                    self.relations.equation([labels, *parts], [1, *(-factor.degree for factor in product)])
        self.labels[weight] = labels.reshape(shape)
        return self.labels[weight]

    def _labels_of_factor(self, factor: Factor) -> Tensor:
        """Return one label per element of a parameter, where the factor reads them."""
        if factor.name not in self._elements:
            shape = self.network.state[factor.name].shape
            self._elements[factor.name] = self.relations.new(shape.numel()).reshape(shape)
            if factor.name in self._derived:
                self.relations.reason = f"the derived weight '{self._derived[factor.name]}'"
                self.relations.fix(self._elements[factor.name])
        elements = self._elements[factor.name]
        return elements if factor.index is None else elements.reshape(-1)[factor.index]

    def define_owners(self, uses: Mapping[WeightTensor, Sequence[WeightedEdges]]) -> None:
        """Write down how the owners scale of products of several factors, and of sums.

        Args:
            uses: The edges on which each weight tensor stands, all labelled.
        """
        for weight, product, owner in self._definitions:
            scale = self._labels_of_factor(owner)
            labels, signs = [self.labels_of(weight), scale], [1, -owner.degree]
            for factor in product:
                if factor is not owner:
                    for part, sign in self._scale_of(factor, uses):
                        labels.append(part)
                        signs.append(-factor.degree * sign)
            self.relations.equation(labels, signs)

    def _scale_of(self, factor: Factor, uses: Mapping[WeightTensor, Sequence[WeightedEdges]]) -> list[tuple[Tensor, int]]:
        """Return how a factor scales, as labels and signs: as the ends of the edges on which it stands, if it does."""
        for weight, itself in self.free.items():
            if itself is not None and itself.name == factor.name and itself.index is None:
                if weight not in uses:
                    break
                edges = uses[weight][0]
                layout = edges.pattern.weight
                above, below = (layout.join(part.expand(layout.shape)).reshape(weight.shape) for part in ends(edges))
                return [(above, itself.degree), (below, -itself.degree)]
        return [(self._labels_of_factor(factor), 1)]

    def scalings(self, solution: Solution, weights: Mapping[WeightTensor, Scaling]) -> dict[str, Scaling]:
        """Return how each parameter scales that does: as the weight that it is, or by labels of its own.

        Args:
            solution: The solution of all relations.
            weights: How the weights scale.

        Returns:
            Parameter (or buffer that moves along) to its scaling.
        """
        made: dict[str, Scaling] = {}
        for weight, factor in self.free.items():
            if factor is not None and weight in weights:
                above, below = weights[weight].above, weights[weight].below
                if factor.degree < 0:
                    above, below = below, above
                made[factor.name] = Scaling(above, below, weights[weight].layout, factor.index, factor.degree < 0)
        for name, labels in self._elements.items():
            layout = Layout.plain(labels.shape)
            made[name] = Scaling(solution.classes[labels.reshape(layout.shape)], NO_CLASS, layout)
        return {name: scaling for name, scaling in made.items() if scaling.moves}
