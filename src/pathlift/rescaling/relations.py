"""Unknown log-scales tied by linear equations, and their general solution (mathematics §7).

A neuron v has an unknown s(v), the logarithm of what its activation is multiplied with. An unknown goes by a label, a
positive integer; label 0 stands for a neuron that is not there, label 1 for the scale 0 of inputs and outputs. Nearly
all equations say that two unknowns are equal, and are worked off as they come. The rest (a weight that is used twice, a
map whose antecedents differ from place to place) is kept as rows of a linear system and eliminated exactly at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from pathlift.budget import running

NOTHING, FIXED = 0, 1
SEARCH = "The search for rescaling groups"
"""What is unfinished when its time is up."""


class Classes:
    """Classes of equal labels; the smallest label of a class stands for it.

    Each label points to a smaller one of its class, and those that are looked up are pointed at the smallest: the work is
    about linear in the labels that are looked up, whatever the number of all labels.
    """

    def __init__(self) -> None:
        """Start with the two labels that have a meaning."""
        self._root = torch.arange(1024, device="cpu")
        self.count = 2

    def grow(self, count: int) -> None:
        """Make room for further labels.

        Args:
            count: How many.
        """
        self.count += count
        if self.count > len(self._root):
            more = torch.arange(len(self._root), max(2 * len(self._root), self.count), device="cpu")
            self._root = torch.cat([self._root, more])

    def find(self, labels: Tensor) -> Tensor:
        """Return the smallest label of each label's class."""
        root = self._root[labels]
        while True:
            further = self._root[root]
            if torch.equal(further, root):
                return root
            self._root[labels] = root = further

    def join(self, first: Tensor, second: Tensor) -> None:
        """Join classes pair by pair.

        Args:
            first: Labels, shape (pairs,).
            second: Labels, shape (pairs,).
        """
        while len(first):
            first, second = self.find(first), self.find(second)
            apart = first != second
            first, second = first[apart], second[apart]
            low, high = torch.minimum(first, second), torch.maximum(first, second)
            self._root.scatter_reduce_(0, high, low, "amin")
            self.find(high)


def components(count: int, first: Tensor, second: Tensor) -> Tensor:
    """Number the connected components of a graph.

    Args:
        count: Number of nodes.
        first: One end of each edge.
        second: The other.

    Returns:
        The component of each node, numbered in the order of their first nodes.
    """
    classes = Classes()
    classes.grow(max(count - classes.count, 0))
    classes.join(first, second)
    nodes = torch.arange(count, device="cpu")
    root = classes.find(nodes)
    return (torch.cumsum(root == nodes, 0) - 1)[root]


@dataclass(frozen=True, eq=False)
class Solution:
    """The general solution: s = B·g, one free number g per group.

    Attributes:
        classes: Class of each label; class 0 has the scale 0.
        count: Number of classes, class 0 included.
        dimension: Number of groups.
        rows: Classes, one per non-zero entry of B.
        columns: Groups, one per non-zero entry of B.
        entries: The non-zero entries of B, float64.
    """

    classes: Tensor
    count: int
    dimension: int
    rows: Tensor
    columns: Tensor
    entries: Tensor

    @cached_property
    def plain(self) -> bool:
        """Whether each class has the scale of one group: B is a matrix of zeros and ones with one 1 per row."""
        once = torch.bincount(self.rows, minlength=self.count)
        return bool((once[1:] == 1).all()) and bool((self.entries == 1).all())

    def without(self, groups: Tensor) -> Solution:
        """Return the same with some groups held at scale 0.

        Args:
            groups: bool by group.

        Returns:
            The solution; the groups stay numbered as they were.
        """
        kept = ~groups[self.columns]
        return replace(self, rows=self.rows[kept], columns=self.columns[kept], entries=self.entries[kept])

    def scales(self, free: Tensor) -> Tensor:
        """Return B·g.

        Args:
            free: g, float64, shape (groups,).

        Returns:
            s by class, shape (classes,).
        """
        out = torch.zeros(self.count, dtype=torch.float64, device="cpu")
        return out.index_add_(0, self.rows, self.entries * free[self.columns])

    def pulled_back(self, scales: Tensor) -> Tensor:
        """Return Bᵀ·s.

        Args:
            scales: By class, float64.

        Returns:
            Shape (groups,).
        """
        out = torch.zeros(self.dimension, dtype=torch.float64, device="cpu")
        return out.index_add_(0, self.columns, self.entries * scales[self.rows])

    def pulled_back_magnitude(self, scales: Tensor) -> Tensor:
        """Return |B|²ᵀ·s, the diagonal of Bᵀ·diag(s)·B."""
        out = torch.zeros(self.dimension, dtype=torch.float64, device="cpu")
        return out.index_add_(0, self.columns, self.entries**2 * scales[self.rows])


class Relations:
    """The unknowns and everything that ties them."""

    def __init__(self) -> None:
        """Start without unknowns."""
        self.classes = Classes()
        self.apart = Classes()  # the same without what only label 1 joins, to tell later why a channel is fixed
        self.reasons: list[tuple[Tensor, str]] = []
        self.rows: list[tuple[Tensor, Tensor]] = []  # labels and coefficients
        self.ties = 0
        self.neurons: list[Tensor] = []
        self.reason = ""

    def new(self, count: int) -> Tensor:
        """Return labels of new unknowns."""
        first = self.classes.count
        self.classes.grow(count)
        self.apart.grow(count)
        return torch.arange(first, first + count, device="cpu")

    def find(self, labels: Tensor) -> Tensor:
        """Return the label that stands for each label's class."""
        return self.classes.find(labels)

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Make unknowns equal pair by pair; pairs with a neuron that is not there say nothing.

        Args:
            first: Labels of any shape.
            second: Labels, broadcasting against the first.
        """
        first, second = torch.broadcast_tensors(self.find(first), self.find(second))
        apart = (first != second) & (first > NOTHING) & (second > NOTHING)
        first, second = first[apart], second[apart]
        if not len(first):
            return
        fixed = (first == FIXED) | (second == FIXED)
        if bool(fixed.any()):
            self.reasons.append((torch.unique(torch.maximum(first[fixed], second[fixed])), self.reason))
        self.ties += len(first)
        self.apart.join(first[~fixed], second[~fixed])
        self.classes.join(first, second)

    def fix(self, labels: Tensor) -> None:
        """Give unknowns the scale 0, for `reason`."""
        self.tie(labels, torch.tensor(FIXED, device="cpu"))

    def equation(self, labels: Sequence[Tensor], signs: Sequence[int]) -> None:
        """Add equations Σ_j signs[j]·s(labels[j]) = 0; those that name a neuron that is not there are left out.

        Args:
            labels: Labels of any shapes that broadcast, one tensor per summand.
            signs: Their coefficients.
        """
        joined = torch.stack([part.reshape(-1) for part in torch.broadcast_tensors(*labels)], 1)
        joined = joined[(joined > NOTHING).all(1)]
        self._keep(joined, torch.tensor(signs, dtype=torch.int16, device="cpu").expand(joined.shape))

    def _keep(self, ids: Tensor, signs: Tensor) -> None:
        """Work off equations, and keep those that are more than an equality."""
        reason, self.reason = self.reason, "equations between scales that leave it no freedom"
        ids, signs = self._worked_off(ids, signs)
        self.reason = reason
        if len(ids):
            self.rows.append((ids, signs))

    def why_fixed(self) -> Callable[[Tensor], list[str]]:
        """Return a function that tells for labels of scale 0 what fixes them, "" for others."""
        known: dict[int, str] = {}
        for labels, reason in self.reasons:
            for label in self.apart.find(labels).tolist():
                known.setdefault(label, reason)
        return lambda labels: [known.get(label, "") for label in self.apart.find(labels.clamp(min=0)).tolist()]

    def solve(self) -> Solution:
        """Return the general solution; unknowns that no neuron has a part in get the scale 0."""
        rows = self._simplified()
        seen = [torch.unique(part) for part in self.neurons]
        neurons = torch.unique(self.find(torch.cat(seen))) if seen else torch.zeros(0, dtype=torch.long, device="cpu")
        neurons = neurons[neurons > FIXED]
        pivots = _eliminated(rows, set(neurons.tolist())) if rows else {}
        free = neurons[~torch.isin(neurons, torch.tensor(list(pivots), dtype=torch.long, device="cpu"))] if pivots else neurons
        column_of = {label: column for column, label in enumerate(free.tolist())} if pivots else {}
        bound = [label for label, right in pivots.items() if any(other in column_of for other in right)]
        used = torch.cat([free, torch.tensor(bound, dtype=torch.long, device="cpu")]).sort().values
        number = torch.zeros(self.classes.count, dtype=torch.long, device="cpu")
        number[used] = torch.arange(1, len(used) + 1, device="cpu")
        entries = [
            (int(number[label]), column_of[other], float(value))
            for label in bound
            for other, value in pivots[label].items()
            if other in column_of
        ]
        rows_of, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
        return Solution(
            number[self.find(torch.arange(self.classes.count, device="cpu"))],
            len(used) + 1,
            len(free),
            torch.cat([number[free], torch.tensor(rows_of, dtype=torch.long, device="cpu")]),
            torch.cat([torch.arange(len(free), device="cpu"), torch.tensor(columns, dtype=torch.long, device="cpu")]),
            torch.cat([
                torch.ones(len(free), dtype=torch.float64, device="cpu"),
                torch.tensor(values, dtype=torch.float64, device="cpu"),
            ]),
        )

    def _simplified(self) -> list[dict[int, Fraction]]:
        """Work off all rows that come down to an equality, to and fro through the layers; return the others."""
        ties = -1
        while ties != self.ties:
            ties, blocks, self.rows = self.ties, reversed(self.rows), []
            for block in blocks:
                running().check(SEARCH)
                self._keep(*block)
        if not self.rows:
            return []
        width = max(ids.shape[1] for ids, _ in self.rows)
        ids, signs = (
            torch.cat([torch.nn.functional.pad(row[part].long(), (0, width - row[part].shape[1])) for row in self.rows])
            for part in (0, 1)
        )
        unique = torch.unique(torch.cat([ids, signs], 1), dim=0)
        return [
            {int(label): Fraction(int(sign)) for label, sign in zip(row[:width], row[width:], strict=True) if sign}
            for row in unique.tolist()
        ]

    def _worked_off(self, ids: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Tie what rows come down to when they are equalities; return the other rows."""
        while len(ids):
            ids, signs = self._collected(ids, signs)
            count = (signs != 0).sum(1)
            equal = (count == 2) & (signs.sum(1) == 0)
            rest = (count > 1) & ~equal
            single, pairs = ids[count == 1].amax(1), ids[equal].sort(1).values[:, -2:]
            ids, signs = ids[rest], signs[rest]
            if not len(single) and not len(pairs):
                break
            self.fix(single)
            self.tie(pairs[:, 0], pairs[:, 1])
        return ids, signs

    def _collected(self, ids: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Replace labels by their classes and add up what stands at the same class."""
        ids, order = self.find(ids).sort(1)
        signs = signs.gather(1, order)
        signs = torch.where(ids <= FIXED, 0, signs)
        for column in range(1, ids.shape[1]):
            same = ids[:, column] == ids[:, column - 1]
            signs[:, column] += torch.where(same, signs[:, column - 1], 0)
            signs[:, column - 1] = torch.where(same, 0, signs[:, column - 1])
        return torch.where(signs == 0, 0, ids), signs


def _eliminated(rows: list[dict[int, Fraction]], neurons: set[int]) -> dict[int, dict[int, Fraction]]:
    """Solve rows exactly.

    Returns:
        For each label that the others determine: how; labels that are not neurons are determined first.
    """
    pivots: dict[int, dict[int, Fraction]] = {}
    order: list[int] = []
    for row in rows:
        running().check(SEARCH)
        reduced: dict[int, Fraction] = {}  # the row in labels that are not determined yet
        pending = dict(row)
        while pending:
            label, value = pending.popitem()
            for other, factor in (pivots[label] if label in pivots else {label: Fraction(1)}).items():
                target = reduced if other not in pivots else pending
                target[other] = target.get(other, Fraction(0)) + value * factor
                if not target[other]:
                    del target[other]
        if not reduced:
            continue
        pivot = max(reduced, key=lambda label: (label not in neurons, label))
        value = reduced.pop(pivot)
        pivots[pivot] = {label: -entry / value for label, entry in reduced.items()}
        order.append(pivot)
    for pivot in reversed(order):
        running().check(SEARCH)
        right: dict[int, Fraction] = {}
        for label, value in pivots[pivot].items():
            for other, factor in (pivots[label] if label in pivots else {label: Fraction(1)}).items():
                right[other] = right.get(other, Fraction(0)) + value * factor
        pivots[pivot] = {label: value for label, value in right.items() if value}
    return pivots
