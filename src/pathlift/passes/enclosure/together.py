"""What the neurons before kinks can do together: a bound by squares (mathematics §5).

The chord above each |z| is dear where many signs are unknown: it pays for every neuron as if it were at the end of its own
interval, and all cannot be there at once, as the same weights move them. Here parabolas take the place of chords (`parabolas`),

    |z| ≤ κ·z² + 1/(4κ)   for all z and κ > 0,

so a functional Σ a(v)·y(v) of a layer is at least a linear one less Σ_v q(v)·(z(v) − c(v))², with c the centres of `forms`:
z − c = G·ε + e, |ε_i| ≤ 1. The linear one goes backwards, through kinks with parabolas of their own, which add to the squares,
and becomes a number less bᵀ·ε, with the same symbols (`Symbols`). With Q = diag(q) and any numbers S_i > 0, S₀ > 0

    bᵀ·ε + ‖Q^½·G·ε‖² ≤ S₀ + (bᵀ·ε)²/(4·S₀) + ‖Q^½·G·ε‖² ≤ S₀ + λ·Σ_i S_i·ε_i² ≤ S₀ + λ·Σ_i S_i,

λ the largest eigenvalue of R·S⁻¹·Rᵀ with the rows R = (Q^½·G; bᵀ/(2·√S₀)): the dual of the semidefinite relaxation of the left
side's maximum over the cube (Nesterov, 1998). What is linear and what is square are seldom at their worst at once. e is paid by
‖Q^½·(G·ε + e)‖² ≤ (1 + t)·‖Q^½·G·ε‖² + (1 + 1/t)·‖Q^½·e‖² with t > 0, and ‖Q^½·e‖ is bounded layer by layer:
(Σ_u w(u)·e(u))² ≤ (Σ_u |w(u)|)·Σ_u |w(u)|·e(u)². κ, S, t and the lines below all kinks are chosen by ascent; whatever they
are, the bound holds.

An example: n neurons z_v = Σ_i H_vi·ε_i with H a Hadamard matrix of n rows. Each z_v may reach n, so chords bound Σ|z_v| by n²;
‖z‖² = n·‖ε‖² ≤ n², so Σ|z_v| ≤ √n·‖z‖ ≤ n^1.5: parabolas find that. Another: ε₂ − ε₁ + |ε₁ + ε₂| is 2 at most, and 4 if both
parts are taken at their worst. Squares find 2·√2, with κ = 1/√8, S₀ = 1/√2 and S₁ = S₂ = 1/√2.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pathlift.budget import Clock
from pathlift.graph.layers import Layer
from pathlift.passes.enclosure.forms import forms, symbols
from pathlift.passes.enclosure.kinks import last_kinks, paid_by_chords
from pathlift.passes.enclosure.parabolas import Parabolas
from pathlift.passes.enclosure.relaxation import Relaxation, Symbols
from pathlift.passes.enclosure.substitution import handed_down

STEPS = 60
"""Steps of the ascent over parabolas."""

HOPE = 0.76
"""The part of what chords pay that parabolas can save, at most, by experience: functionals that need more are not tried."""


def raised(
    relaxation: Relaxation, functionals: Mapping[str, Tensor], bounds: Tensor, *, constant: Tensor, clock: Clock
) -> Tensor:
    """Raise lower bounds of functionals plus constants that are not positive, the lowest first, until one stays too low.

    Args:
        relaxation: What is known of one sample.
        functionals: Layer name to coefficients, (1, functionals, *shape).
        bounds: Lower bounds, constants included, (1, functionals).
        constant: Added to each functional, (1, functionals).
        clock: Bounds stay as they are when its time is up.

    Returns:
        Lower bounds, (1, functionals), none of them lower.
    """
    top = last_kinks(relaxation)
    missing = bounds <= 0
    if top is None or not bool(missing.any()) or clock.over():
        return bounds
    above, left = handed_down(relaxation, functionals, top.name, {})
    if top.name not in left or bool((missing & (bounds + HOPE * paid_by_chords(relaxation, top, left) <= 0)).any()):
        return bounds  # one that stays too low is enough for the rest to be of no use
    kept = symbols_below(relaxation, top)
    if kept is None:
        return bounds
    bounds = bounds.clone()
    for row in bounds[0].argsort().tolist():
        if clock.over() or not bool(missing[0, row]):
            break
        own = {name: a[:, row : row + 1] for name, a in left.items()}
        parabolas = Parabolas(relaxation, kept, own, float(above[0, row] + constant[0, row]))
        bounds[0, row] = max(float(bounds[0, row]), parabolas.raised(clock, steps=STEPS))
        if not bool(bounds[0, row] > 0):
            break
    return bounds


def symbols_below(relaxation: Relaxation, top: Layer) -> Symbols | None:
    """Return the symbols of all layers before one, in forward order, with their forms; None where these are too large."""
    names = [layer.name for layer in relaxation.network.layers]
    known = forms(relaxation, relaxation.network.layers[names.index(top.name) - 1])
    return None if known is None else symbols(relaxation, known)
