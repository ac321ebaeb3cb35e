"""What every network is checked for about its rescaling symmetries."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, nn

import pathlift
from agreement import outputs, perturbed
from pathlift.reference import Probe


def dimension_by_paths(model: nn.Module, inputs: tuple[Tensor, ...], limit: int = 30_000) -> int:
    """Dimension of the diagonal directions that leave Φ as it is: log-scales of weights that add up to 0 on every path.

    Weights on no path have no say. The paths come from the reference, which knows nothing of edge maps.
    """
    paths = Probe(model, *inputs).dag().paths(limit)
    counts = {tuple(sorted(Counter(path.labels).items())) for path in paths if path.phi != 0}
    columns = {label: column for column, label in enumerate(sorted({label for row in counts for label, _ in row}))}
    matrix = torch.zeros(len(counts), len(columns), dtype=torch.float64)
    for row, row_counts in enumerate(counts):
        for label, count in row_counts:
            matrix[row, columns[label]] = count
    rank = int(torch.linalg.matrix_rank(matrix)) if matrix.numel() else 0
    return len(columns) - rank


def counted(model: nn.Module) -> bool:
    """Whether paths tell all: a batch norm without parameters has a running mean, which scales but is no weight of a path."""
    return all(module.affine for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


def assert_comparisons_invariant(
    model: nn.Module, groups: pathlift.rescaling.Symmetries, inputs: tuple[Tensor, ...], generator: torch.Generator
) -> None:
    """Check that metrics and bounds of a pair do not see a rescaling of both networks."""
    first = groups.randomize((1, 128, 4096), generator)
    theirs = perturbed(model, "moved")
    second = pathlift.symmetries(theirs, inputs).rescale(first.factors)
    network, other = groups.network, pathlift.capture(pathlift.rescaling.with_state(model, first), inputs)
    for q in (1, 2):
        moments = 0 if q == 1 else None  # high moments lose digits
        before = pathlift.path_metric(network, theirs, q=q, moments=moments)
        after = pathlift.path_metric(other, second, q=q, moments=moments)
        for one, two in ((before.lower, after.lower), (before.upper, after.upper)):
            assert math.isclose(one, two, rel_tol=1e-6, abs_tol=1e-9 * before.upper)
    if len(inputs) == 1:
        pairs = ((network, theirs), (other, second))
        bounds = [pathlift.lipschitz_bound(*pair, inputs[0], kind="per_input") + 0 for pair in pairs]
        torch.testing.assert_close(bounds[1], bounds[0], rtol=1e-6, atol=1e-9 * float(bounds[0].max()))


def assert_symmetric(model: nn.Module, inputs: tuple[Tensor, ...], generator: torch.Generator) -> pathlift.rescaling.Symmetries:
    """Check that random factors leave outputs, norm, shares and metric as they are, and can be found again."""
    network = pathlift.capture(model, inputs)
    groups = pathlift.symmetries(network)
    scale = [4 * x for x in inputs]
    before = outputs(model, tuple(scale))
    for state in (groups.randomize((1, 128, 4096), generator), groups.randomize(generator=generator, sigma=2.0)):
        other = pathlift.rescaling.with_state(model, state)
        torch.testing.assert_close(outputs(other, tuple(scale)), before, rtol=1e-9, atol=1e-9 * float(before.abs().max()))
        assert torch.allclose(groups.rescale(state.factors)[name], state[name]) if (name := next(iter(state), None)) else True
        rescaled = pathlift.capture(other, inputs)
        norm, other_norm = pathlift.path_norm(network), pathlift.path_norm(rescaled)
        assert abs(norm.log10 - other_norm.log10) < 1e-9 or norm.value == other_norm.value
        shares, other_shares = pathlift.path_magnitude(network), pathlift.path_magnitude(rescaled)
        for name in shares:
            torch.testing.assert_close(other_shares[name], shares[name], rtol=1e-8, atol=1e-12)
        answer = pathlift.equivalent(groups, state)
        assert answer, answer.mismatch
        torch.testing.assert_close(answer.factors, state.factors, rtol=1e-8, atol=0)
    return groups
