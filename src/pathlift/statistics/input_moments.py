"""What one weight tensor multiplies: mean and second moment of its inputs, and what errors of its rows do (mathematics §9).

A weight is seen as (groups, rows, columns): a row makes one channel above, and its columns are the entries of that row in the
tensor's own memory order, channels below before taps. With u the inputs of a row, over inputs and positions above,

    mean = E u,    second = H = E u·uᵀ,    H[(i,t),(j,t')] = F[t, t']·(m_i·m_j + 1[i=j]·v_i·R[t, t']),

a change Δ of the rows costs E‖ΔR‖² ≈ Σ_o g(o)·Δ_oᵀ H Δ_o. F is the share of positions at which both taps read a neuron: zero
padding holds none. Where a batch norm follows, what it knows is put in (`pathlift.statistics.conditioned`). What was measured
on data is shrunk towards that, as far as it is chance (`pathlift.statistics.shrinkage`), and what it is known up to is on the
diagonal of H (`pathlift.statistics.measure.floor_of`).

Quantisation and compensated pruning stand on this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathlift.edges.pattern import Layout
from pathlift.errors import InputError, NumericalError, nearest
from pathlift.graph.axes import Piece, channel_axes
from pathlift.graph.expressions import Expression, Normalisation, StateTensor
from pathlift.graph.layers import Connection, Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.statistics.cholesky import factored_from_behind_, mirrored_
from pathlift.statistics.conditioned import conditioned_covariance, conditioned_mean
from pathlift.statistics.covariances import Lag, Lags
from pathlift.statistics.measure import Seen
from pathlift.statistics.model import ActivationModel
from pathlift.statistics.shrinkage import shrunk
from pathlift.statistics.transfer import Apart, Reads, Weighted

FLOOR = 1e-3
"""Eigenvalues of a second moment whose diagonal is 1 are at least this."""

ROWS = 256
"""Rows of second moments that are worked on together."""

SINGLE = 1024
"""Columns up to which covariances are float64, and their eigenvalues are lifted one by one. Wider ones are float32, in half of
the memory and a fraction of the time, and all eigenvalues are lifted, towards those of the diagonal. float32 mistakes the least
eigenvalue by no more than 3e-5 (2304 columns of rank 600), a thirtieth of `FLOOR`."""

RANGE = 80
"""Binary exponents up to which variances are held in float32, and down to their negative: twice that is not asked of it."""

LARGEST = 1 << 28
"""Entries of all second moments of a weight that are given at once."""


@dataclass(frozen=True, eq=False)
class InputMoments:
    """What one weight tensor multiplies.

    Attributes:
        name: The weight.
        mean: E u, float64, shape (groups, columns).
        sensitivity: g, float64, shape (groups, rows).
        following: The bias, or the running mean of the batch norm, that takes a shift of the outputs: a change Δ of the rows
            shifts them by Δ·mean, which is subtracted from a bias and added to a running mean. None where there is neither.
        variance: The running variance of the batch norm that reads the outputs; None where there is none.
        depth: Through how many other weights its inputs were propagated since something was known of them, at most: 0 right
            behind inputs and batch norms, and where data were measured.
        uses: For each use of the weight: (groups, ins) means and variances of its channels, correlation of taps, and reads.
    """

    name: str
    mean: Tensor
    sensitivity: Tensor
    following: str | None
    variance: str | None
    depth: int
    _piece: Piece
    _uses: tuple[_Use, ...]
    _told: tuple[Tensor, Tensor] | None = None
    """The weight and the variances of its rows, (groups, rows), where a batch norm follows."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, rows and columns."""
        groups, rows = self.sensitivity.shape
        return groups, rows, self.mean.shape[1]

    @property
    def diagonal(self) -> Tensor:
        """E u², shape (groups, columns)."""
        return torch.stack([use.diagonal() for use in self._uses]).mean(0)

    @property
    def noise(self) -> Tensor | None:
        """What E u² is known up to, shape (groups, columns), which is on the diagonal of H; None where nothing was measured."""
        floors = [use.seen.floor / len(self._uses) for use in self._uses if use.seen is not None]
        return torch.stack(floors).sum(0) if floors else None

    @property
    def second(self) -> Tensor:
        """H of all groups, float64, shape (groups, columns, columns).

        Raises:
            InputError: It has more than `LARGEST` entries: ask for blocks of columns.
        """
        groups, _, columns = self.shape
        if groups * columns**2 > LARGEST:
            raise InputError(
                f"The second moments of '{self.name}' are {groups} matrices of {columns}² entries. Ask for blocks of columns "
                "(covariance)."
            )
        return self.covariance() + self.mean[:, :, None] * self.mean[:, None, :]

    def blocks(self, columns: slice = slice(None), *, centred: bool = False) -> Tensor:
        """Return H of all groups as it was measured or propagated, whatever its eigenvalues, or the covariance H − m·mᵀ.

        Args:
            columns: Which columns.
            centred: The covariance.

        Returns:
            float64, shape (groups, columns, columns).
        """
        block = self._second(columns, slice(None))
        return _centred(block, self._propagated_mean()[:, columns]) if centred else block

    def _second(self, columns: slice, groups: slice) -> Tensor:
        """H before anything is said of it by a batch norm behind the weight, in memory of its own."""
        blocks = [use.second(columns, groups) for use in self._uses]
        return blocks[0] if len(blocks) == 1 else torch.stack(blocks).mean(0)

    def _propagated_mean(self) -> Tensor:
        """E u before anything is said of it by a batch norm behind the weight."""
        return torch.stack([use.first() for use in self._uses]).mean(0)

    def second_of(self, group: int, columns: slice = slice(None)) -> Tensor:
        """Return H of one group, for all columns or a block of them: positive definite wherever inputs are not constant.

        Args:
            group: The group.
            columns: Which columns.

        Returns:
            float64, shape (columns, columns).
        """
        mean = self.mean[group, columns]
        return self.covariance(columns, slice(group, group + 1))[0] + mean[:, None] * mean

    def covariance(self, columns: slice = slice(None), groups: slice = slice(None)) -> Tensor:
        """Return C = H − m·mᵀ.

        With D its diagonal, the eigenvalues of D^(−1/2) C D^(−1/2) are at least `FLOOR`, which no rescaling changes. Inputs
        that are constant have rows and columns of zeros, those of which that was seen on data what they are known up to.

        Args:
            columns: Which columns; what a batch norm says is put in where it is about all of them.
            groups: Which groups.

        Returns:
            Shape (groups, columns, columns), float64; of more than `SINGLE` columns float32, where that holds the range.
        """
        covariance = self._covariance(columns, groups)
        covariance.diagonal(dim1=1, dim2=2).clamp_(min=0.0)
        covariance = positive(covariance)
        if self._told is None or covariance.shape[2] < self.shape[2]:
            return covariance
        weight, variance = self._told
        return positive(conditioned_covariance(covariance, self.split(weight)[groups].to(covariance.dtype), variance[groups]))

    def _covariance(self, columns: slice, groups: slice) -> Tensor:
        """H − m·mᵀ before anything is said of it by a batch norm behind the weight, in memory of its own."""
        mean = self._propagated_mean()
        diagonal = (self.diagonal - mean**2)[groups, columns]
        kind = torch.float64 if diagonal.shape[1] <= SINGLE or not _within(diagonal) else torch.float32
        blocks = (use.second(columns, groups, mean, kind) for use in self._uses)
        covariance = next(blocks)
        for block in blocks:
            covariance += block
        return covariance if len(self._uses) == 1 else covariance.div_(len(self._uses))

    def correlations(self, columns: slice = slice(None)) -> Tensor:
        """Return the correlations of what it multiplies as they are known without measuring windows.

        Args:
            columns: Which columns.

        Returns:
            float64, shape (groups, columns, columns), positive definite; 0 beside and on the diagonal of what is constant.
        """
        everything = slice(None)
        known = [use.correlations(columns, everything) for use in self._uses]
        return known[0] if len(known) == 1 else torch.stack(known).mean(0)

    def split(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as (groups, rows, columns)."""
        return self._piece.blocks(tensor).flatten(2)

    def join(self, blocks: Tensor, tensor: Tensor) -> Tensor:
        """Undo `split`.

        Args:
            blocks: Shape (groups, rows, columns).
            tensor: What stands in elements of the parameter that are in no block.

        Returns:
            A tensor of the weight's shape.
        """
        return self._piece.put(blocks, tensor)


@dataclass(frozen=True, eq=False)
class _Use:
    """One place at which a weight stands."""

    mean: Tensor
    variance: Tensor
    correlation: Tensor
    transfer: Weighted
    lags: Lags | None
    seen: Seen | None

    def first(self) -> Tensor:
        """E u, (groups, columns)."""
        if self.seen is not None:
            return self.seen.mean
        return torch.einsum("gi,t->git", self.mean, self.transfer.reads.single.to(self.mean.device)).flatten(1)

    def diagonal(self) -> Tensor:
        """E u², (groups, columns)."""
        if self.seen is not None:
            return self.seen.diagonal
        return self.transfer.squares(self.mean, self.variance, self.correlation)

    def second(self, columns: slice, groups: slice, centre: Tensor | None = None, kind: torch.dtype = torch.float64) -> Tensor:
        """E u·uᵀ of some columns of some groups, (groups, columns, columns), in memory of its own.

        Where it was seen on data, shrunk towards what is known without windows, and with what E u² is known up to on its
        diagonal, so that nothing is fitted to chance.

        Args:
            columns: Which columns.
            groups: Which groups.
            centre: m of all columns of all groups; m·mᵀ is subtracted, before numbers become float32.
            kind: The type.

        Returns:
            The matrices.
        """
        if self.seen is not None:
            covariance, variance = (part[groups, columns, columns] for part in (self.seen.covariance, self.seen.variance))
            second, _ = shrunk(covariance, variance, self.correlations(columns, groups))
            second.diagonal(dim1=1, dim2=2).add_(self.seen.floor[groups, columns])
            mean = self.seen.mean[groups, columns]
            second += mean[:, :, None] * mean[:, None, :]
            return (second if centre is None else _centred(second, centre[groups, columns])).to(kind)
        taps = len(self.transfer.reads.together)
        start, stop, _ = columns.indices(self.mean.shape[1] * taps)
        ins = slice(start // taps, math.ceil(stop / taps))  # of these channels all taps
        middle = None if centre is None else centre[groups, ins.start * taps : ins.stop * taps]
        if self.lags is None:
            second = self._propagated(ins, groups)
            second = (second if middle is None else _centred(second, middle)).to(kind)
        else:
            second = self._correlated(self.lags, ins, groups, middle, kind)
        within = slice(start - ins.start * taps, stop - ins.start * taps)
        return second if within == slice(0, second.shape[1]) else second[:, within, within].clone()

    def correlations(self, columns: slice, groups: slice) -> Tensor:
        """Return correlations by the moments of channels and what propagation says of their correlations.

        Args:
            columns: Which columns.
            groups: Which groups.

        Returns:
            float64, shape (groups, columns, columns); rows and columns of what is constant are 0.
        """
        propagated = replace(self, seen=None)
        covariance = propagated.second(columns, groups, propagated.first())
        covariance.diagonal(dim1=1, dim2=2).clamp_(min=0.0)
        covariance = positive(covariance)
        size = covariance.diagonal(dim1=1, dim2=2).sqrt()
        unit = torch.where(size > 0, 1.0 / size, 0.0)
        return covariance.mul_(unit[:, :, None]).mul_(unit[:, None, :])

    def _propagated(self, ins: slice, groups: slice) -> Tensor:
        """H of some channels, all of which are independent of each other."""
        squares, independent, common = (form.to(self.mean.device) for form in self.transfer.reads.forms())
        mean, variance, rho = self.mean[groups, ins], self.variance[groups, ins], self.correlation[groups, ins]
        out = torch.einsum("gi,gj,ts->gitjs", mean, mean, squares)
        within = (variance * (1.0 - rho))[..., None, None] * independent + (variance * rho)[..., None, None] * common
        index = torch.arange(mean.shape[1], device=mean.device)
        out[:, index, :, index] += within.transpose(0, 1)
        size = mean.shape[1] * len(independent)
        return out.reshape(-1, size, size)

    def _correlated(self, lags: Lags, ins: slice, groups: slice, centre: Tensor | None, kind: torch.dtype) -> Tensor:
        """H[(i,t),(j,t')] = F[t, t']·(m_i·m_j + K_λ[i, j]) with λ the distance of what the taps read."""
        mean, deviation = self.mean[groups, ins], self.variance[groups, ins].sqrt()
        count, wide = mean.shape
        reads, taps = self.transfer.reads, len(self.transfer.reads.together)
        channels = torch.arange(self.mean.numel(), device=mean.device).reshape(self.mean.shape)[groups, ins]
        outer, product = (x[:, :, None] * x[:, None, :] for x in (deviation, mean))
        out = torch.zeros(count, wide, taps, wide, taps, dtype=kind, device=mean.device)
        middle = None if centre is None else centre.reshape(count, wide, taps)
        for lag, pairs in _by_distance(reads).items():
            if lag is None:
                known = torch.zeros_like(product)  # these taps read no neuron at one and the same position
            else:
                near, factor = lags.known(lag)
                correlation = lags.entries(near, channels[:, :, None], channels[:, None, :]).double() * factor
                known = correlation * outer + product
            for first, second, share in pairs:
                part = share * known
                if middle is not None:
                    part -= middle[:, :, None, first] * middle[:, None, :, second]
                out[:, :, first, :, second] = part
        return out.reshape(count, wide * taps, wide * taps)


def _by_distance(reads: Reads) -> dict[Lag | None, list[tuple[int, int, float]]]:
    """Return the pairs of taps and how often both read a neuron, by the distance of these; None: never."""
    pairs: dict[Lag | None, list[tuple[int, int, float]]] = {}
    for first, shares in enumerate(reads.together.tolist()):
        for second, share in enumerate(shares):
            lag = () if reads.lags is None else tuple(reads.lags[first, second].tolist())
            pairs.setdefault(lag if share > 0.0 else None, []).append((first, second, share))
    return pairs


def _within(diagonal: Tensor) -> bool:
    """Whether float32 holds matrices of this diagonal, and products of their entries."""
    there = diagonal[diagonal > 0]
    return not len(there) or 2.0**-RANGE <= float(there.min()) <= float(there.max()) <= 2.0**RANGE


def _centred(second: Tensor, mean: Tensor) -> Tensor:
    """Turn H into H − m·mᵀ, in its place."""
    for start in range(0, second.shape[1], ROWS):
        rows = slice(start, start + ROWS)
        second[:, rows] -= mean[:, rows, None] * mean[:, None, :]
    return second


def positive(matrices: Tensor, single: int = SINGLE) -> Tensor:
    """Return the nearest matrices of the same kind whose eigenvalues, for the unit diagonal, are at least `FLOOR`.

    Up to ``single`` columns; wider ones keep their diagonal, and all that lies beside it shrinks by one factor, in their place.

    Args:
        matrices: Symmetric, with diagonals that are not negative, (groups, columns, columns).
        single: Number of columns up to which eigenvalues are lifted one by one.

    Returns:
        The matrices themselves where nothing had to be lifted, or where they were changed in their place.

    Raises:
        NumericalError: An entry is NaN or infinite.
    """
    ends = torch.stack(torch.aminmax(matrices)) if matrices.numel() else matrices
    if not bool(torch.isfinite(ends).all()):
        raise NumericalError("The second moments of what a layer is multiplied by leave the range of float64.")
    if matrices.shape[1] > single:
        for matrix in matrices:
            _flatten(matrix)
        return matrices
    size = matrices.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
    unit = torch.where(size > 0, 1.0 / size, 0.0)
    scaled = (matrices * unit[:, :, None]).mul_(unit[:, None, :])
    scaled.diagonal(dim1=1, dim2=2).copy_(torch.where(size > 0, scaled.diagonal(dim1=1, dim2=2), 1.0))
    ones = scaled.diagonal(dim1=1, dim2=2).clone()
    scaled.diagonal(dim1=1, dim2=2).sub_(FLOOR)
    failed = torch.linalg.cholesky_ex(scaled).info != 0
    if not bool(failed.any()):
        return matrices
    scaled.diagonal(dim1=1, dim2=2).copy_(ones)
    lifted = _lifted(scaled[failed])
    matrices = matrices.clone()
    matrices[failed] = (lifted + lifted.mT) / 2 * size[failed][:, :, None] * size[failed][:, None, :]
    return matrices


def _flatten(matrix: Tensor) -> None:
    """Shrink what lies beside the diagonal of one matrix until no eigenvalue is too small, in its place.

    Whether C with all but its diagonal D times f has eigenvalues of at least `FLOOR`, relative to D, is whether
    C + ((1 − `FLOOR`)/f − 1)·D is positive definite.
    """
    share, diagonal = 0.0, matrix.diagonal().clone()
    there = diagonal > 0
    while share < 1.0:
        mirrored_(matrix, torch.where(there, diagonal * ((1.0 - FLOOR) / (1.0 - share)), 1.0))
        if factored_from_behind_(matrix):
            break
        share = min(1.0, max(FLOOR, 2.0 * share))
    mirrored_(matrix, diagonal)
    if share:
        matrix.mul_(1.0 - share)
        matrix.diagonal().copy_(diagonal)


def _lifted(scaled: Tensor) -> Tensor:
    try:
        eigenvalues, vectors = torch.linalg.eigh(scaled)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # LAPACK may not converge where many eigenvalues are equal
        for matrix in scaled:
            _flatten(matrix)
        return scaled
    lifted: Tensor = (vectors * eigenvalues.clamp(min=FLOOR)[:, None, :]) @ vectors.mT
    return lifted


def input_moments(model: ActivationModel, name: str) -> InputMoments:
    """Return what a weight tensor multiplies.

    A weight that stands at several places has the mean of their moments, and the sum of their sensitivities.

    Args:
        model: What is known of the activations of the network.
        name: A parameter.

    Returns:
        The moments.

    Raises:
        InputError: The parameter is no weight of rows and columns.
    """
    network = model.network
    name = network.aliases.get(name, name)
    if name not in network.state:
        raise InputError(f"The network has no parameter '{name[:100]}'.{nearest(name[:100], network.parameters)}")
    piece = _piece(network, name)
    uses, rows, following, variances, depths = [], [], [], [], []
    for layer, position, connection in _places(network, name):
        transfer = dict(enumerate(model.propagation.bundles(layer))).get(position)
        if isinstance(transfer, Apart):
            raise InputError(
                f"'{name}' multiplies neurons of '{connection.source}' that have a scale of their own at every position: it "
                "has no moments of its own."
            )
        if not isinstance(transfer, Weighted):
            raise InputError(
                f"'{name}' acts element by element on the layer '{connection.source}': it has no rows of several columns."
            )
        if piece.layout.shape != transfer.pattern.weight.shape or _size(piece) != piece.layout.shape:
            raise InputError(f"'{name}' is only a part of what the layer '{layer.name}' multiplies by.")
        below = model.steps[connection.source].moments
        mean, variance, rho = (transfer.per_channel(x) for x in (below.mean, below.variance, below.correlation))
        uses.append(
            _Use(
                mean,
                variance,
                rho,
                transfer,
                _fitting(model.lags(layer.name, connection.source), transfer),
                model.seen.get((layer.name, connection.source)),
            )
        )
        depths.append(0 if below.source == "data" else model.propagation.depth[connection.source])
        rows.append(_of_rows(transfer.pattern.above, model.sensitivity[layer.name], layer))
        following.append(_following(network, layer, rows[-1].numel()))
        variances.append(_variance(network, layer, rows[-1].numel()))
    mean = torch.stack([use.first() for use in uses]).mean(0)
    target, running = (names[0] if len(set(names)) == 1 else None for names in (following, variances))
    moments = InputMoments(name, mean, torch.stack(rows).sum(0), target, running, max(depths), piece, tuple(uses))
    layer, _, connection = next(_places(network, name))
    if len(uses) > 1 or model.steps[connection.source].moments.source == "data":
        return moments
    return _conditioned(model, moments, layer)


def _conditioned(model: ActivationModel, moments: InputMoments, layer: Layer) -> InputMoments:
    """Put in what a batch norm says that reads the layer and nothing else does."""
    network, (groups, count, _) = model.network, moments.shape
    norm = _norm_above(network, layer) if len(layer.connections) == 1 else None
    if norm is None or norm.mean is None or norm.variance is None:
        return moments
    known = model.propagation.evaluated(norm.mean, 0.0, 2).reshape(-1)
    variance = model.steps[layer.name].moments.variance.reshape(-1).expand(known.shape)
    if known.numel() != groups * count or layer.nonlinearity is not None:
        return moments
    for bias in layer.biases:
        placed = model.propagation.placed(bias).reshape(-1)
        if placed.numel() not in {1, known.numel()}:
            return moments
        known = known - placed
    rows = moments.split(network.state[moments.name].detach()).double()
    known, variance = known.reshape(groups, count), variance.reshape(groups, count)
    spread = (moments.diagonal - moments.mean**2).clamp(min=0.0)
    mean = conditioned_mean(moments.mean, spread, rows, known, variance)
    return replace(moments, mean=mean, _told=(network.state[moments.name].detach(), variance))


def _fitting(lags: Lags | None, transfer: Weighted) -> Lags | None:
    """Return correlations where they are those of what a weight multiplies: its channels, at the distances of its taps."""
    groups, _, ins, _ = transfer.pattern.weight.shape
    dims = 0 if transfer.reads.lags is None else transfer.reads.lags.shape[2]
    return lags if lags is not None and len(lags.space) == dims and lags.channels == groups * ins else None


def _piece(network: Network, name: str) -> Piece:
    axes = channel_axes(network, [name])[name]
    if axes.conflict:
        raise InputError(f"{axes.conflict}.")
    if not axes.pieces:
        raise InputError(f"'{name}' is no weight of edges: it has no rows and columns.")
    if len(axes.pieces) > 1:
        raise InputError(f"'{name}' is taken apart: {len(axes.pieces)} operators read a part of it each.")
    return axes.pieces[0]


def _size(piece: Piece) -> tuple[int, ...]:
    return piece.layout.shape if piece.indices is None else tuple(piece.indices.shape)


def _places(network: Network, name: str) -> Iterator[tuple[Layer, int, Connection]]:
    for layer in network.layers:
        for position, connection in enumerate(layer.connections):
            if connection.weight is not None and name in connection.weight.requires:
                yield layer, position, connection
        if any(name in bias.weight.requires for bias in layer.biases):
            raise InputError(f"'{name}' is a bias, or makes one, in the layer '{layer.name}': it has no rows and columns.")


def _of_rows(above: Layout, sensitivity: Tensor, layer: Layer) -> Tensor:
    """Return the sum of sensitivities over the positions of each row."""
    full = sensitivity.expand(layer.shape)
    return above.split(full * (sensitivity.numel() / full.numel())).sum(2)


def _following(network: Network, layer: Layer, rows: int) -> str | None:
    """Return the name of the bias or running mean that takes a shift of a layer."""
    for bias in layer.biases:
        if _is_parameter(network, bias.weight) and bias.weight.shape == (rows,):
            return bias.weight.score_name
    return None if (norm := _norm_above(network, layer)) is None else _vector(network, norm.mean, rows)


def _variance(network: Network, layer: Layer, rows: int) -> str | None:
    """Return the name of the running variance of the batch norm that reads a layer."""
    return None if (norm := _norm_above(network, layer)) is None else _vector(network, norm.variance, rows)


def _norm_above(network: Network, layer: Layer) -> Normalisation | None:
    """Return the batch norm that alone reads a layer."""
    readers = [other for other in network.layers for connection in other.connections if connection.source == layer.name]
    return readers[0].normalisation() if len(readers) == 1 and layer.name not in network.outputs else None


def _vector(network: Network, expression: Expression, rows: int) -> str | None:
    """Return the name of a parameter or buffer with one number for each row."""
    if isinstance(expression, StateTensor) and network.state[expression.name].shape == (rows,):
        return expression.name
    return None


def _is_parameter(network: Network, weight: WeightTensor) -> bool:
    names: Sequence[str] = network.parameters
    return isinstance(weight.expression, StateTensor) and weight.expression.name in names
