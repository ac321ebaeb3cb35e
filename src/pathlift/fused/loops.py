"""Loops over the weights of a linear layer that read them once, as numba compiles them; without it they are plain Python.

All take the same: w, v: (rows, columns), contiguous, of fewer or as many digits as the tracks x, y; ``pivot``, which `compared`
alone asks for; out: (results, rows or columns). Each does the rows, or the columns, from ``first`` to ``last``, so that threads
can share the work. The sum of a row is split up in a way that depends on its length
alone, and rows go by fours from 0: so a result is the same, bit for bit, with however many threads.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Array: TypeAlias = Any
"""A NumPy array; numba gives its elements their types."""


def single(w: Array, _v: Array, x: Array, _y: Array, _pivot: bool, out: Array, first: int, last: int) -> None:
    """out[0, r] = Σ_i |w[r, i]|·x[i], four rows at a time: x is read a quarter as often."""
    kind = x.dtype.type
    row = first
    while row + 4 <= last:
        a = b = c = d = kind(0)
        for i in range(w.shape[1]):
            a += kind(abs(w[row, i])) * x[i]
            b += kind(abs(w[row + 1, i])) * x[i]
            c += kind(abs(w[row + 2, i])) * x[i]
            d += kind(abs(w[row + 3, i])) * x[i]
        out[0, row], out[0, row + 1], out[0, row + 2], out[0, row + 3] = a, b, c, d
        row += 4
    while row < last:
        a = kind(0)
        for i in range(w.shape[1]):
            a += kind(abs(w[row, i])) * x[i]
        out[0, row] = a
        row += 1


def double(w: Array, _v: Array, x: Array, y: Array, _pivot: bool, out: Array, first: int, last: int) -> None:
    """out[0, r] = Σ_i |w[r, i]|·x[i] and out[1, r] = Σ_i |w[r, i]|·y[i], two rows at a time."""
    kind = x.dtype.type
    row = first
    while row + 2 <= last:
        a = b = c = d = kind(0)
        for i in range(w.shape[1]):
            upper, lower = kind(abs(w[row, i])), kind(abs(w[row + 1, i]))
            a += upper * x[i]
            b += lower * x[i]
            c += upper * y[i]
            d += lower * y[i]
        out[0, row], out[0, row + 1], out[1, row], out[1, row + 1] = a, b, c, d
        row += 2
    while row < last:
        a = c = kind(0)
        for i in range(w.shape[1]):
            a += kind(abs(w[row, i])) * x[i]
            c += kind(abs(w[row, i])) * y[i]
        out[0, row], out[1, row] = a, c
        row += 1


def compared(w: Array, v: Array, x: Array, y: Array, pivot: bool, out: Array, first: int, last: int) -> None:
    """Σ_i |w|·x, Σ_i below·y and Σ_i above·x into out[0], out[1] and out[2].

    With ``pivot``, below is the pivot of w and v and above is |w| − below (mathematics §4); without, |v| and |w − v|.
    """
    kind = x.dtype.type
    for row in range(first, last):
        a = b = c = kind(0)
        for i in range(w.shape[1]):
            one, other = kind(w[row, i]), kind(v[row, i])
            size, along = abs(one), other if one > 0 else -other
            if pivot:
                below = kind(0) if along <= 0 else min(along, size)  # in this order NaN stays NaN
                above = size - below
            else:
                below, above = abs(other), abs(one - other)
            a += size * x[i]
            b += below * y[i]
            c += above * x[i]
        out[0, row], out[1, row], out[2, row] = a, b, c


def back(w: Array, v: Array, x: Array, y: Array, _pivot: bool, out: Array, first: int, last: int) -> None:
    """v[r, i] = |w[r, i]|·x[i]·y[r], and Σ_r |w[r, i]|·y[r] added to out[0, i], four rows at a time."""
    rows = w.shape[0]
    row = 0
    while row + 4 <= rows:
        e, f, g, h = y[row], y[row + 1], y[row + 2], y[row + 3]
        for i in range(first, last):
            a, b, c, d = abs(w[row, i]), abs(w[row + 1, i]), abs(w[row + 2, i]), abs(w[row + 3, i])
            out[0, i] += (a * e + b * f) + (c * g + d * h)
            v[row, i] = a * x[i] * e
            v[row + 1, i] = b * x[i] * f
            v[row + 2, i] = c * x[i] * g
            v[row + 3, i] = d * x[i] * h
        row += 4
    while row < rows:
        for i in range(first, last):
            a = abs(w[row, i])
            out[0, i] += a * y[row]
            v[row, i] = a * x[i] * y[row]
        row += 1
