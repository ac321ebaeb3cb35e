"""Loops over the weights of a linear layer that read them once, as numba compiles them; without it they are plain Python.

All take the same: w, v: (rows, columns), contiguous, of fewer or as many digits as the tracks x, y; ``pivot``, which `compared`
alone asks for; out: (results, rows or columns). Each does the rows, or the columns, from ``first`` to ``last``, so that threads
can share the work. The sum of a row is split up in a way that depends on its length alone, and rows go by fours from 0: so a
result is the same, bit for bit, with however many threads.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Array: TypeAlias = Any
"""A NumPy array; numba gives its elements their types."""


def several(w: Array, _v: Array, x: Array, _y: Array, _pivot: bool, out: Array, first: int, last: int) -> None:
    """out[p, r] = Σ_i |w[r, i]|·x[p, i], four rows and p at a time, as far as that goes: each is read a quarter as often."""
    kind, columns, count = x.dtype.type, w.shape[1], len(x)
    row = first
    while row + 4 <= last:
        p = 0
        while p + 4 <= count:
            ae = af = ag = ah = be = bf = bg = bh = ce = cf = cg = ch = de = df = dg = dh = kind(0)
            for i in range(columns):
                a, b, c, d = kind(abs(w[row, i])), kind(abs(w[row + 1, i])), kind(abs(w[row + 2, i])), kind(abs(w[row + 3, i]))
                e, f, g, h = x[p, i], x[p + 1, i], x[p + 2, i], x[p + 3, i]
                ae, af, ag, ah = ae + a * e, af + a * f, ag + a * g, ah + a * h
                be, bf, bg, bh = be + b * e, bf + b * f, bg + b * g, bh + b * h
                ce, cf, cg, ch = ce + c * e, cf + c * f, cg + c * g, ch + c * h
                de, df, dg, dh = de + d * e, df + d * f, dg + d * g, dh + d * h
            out[p, row], out[p + 1, row], out[p + 2, row], out[p + 3, row] = ae, af, ag, ah
            out[p, row + 1], out[p + 1, row + 1], out[p + 2, row + 1], out[p + 3, row + 1] = be, bf, bg, bh
            out[p, row + 2], out[p + 1, row + 2], out[p + 2, row + 2], out[p + 3, row + 2] = ce, cf, cg, ch
            out[p, row + 3], out[p + 1, row + 3], out[p + 2, row + 3], out[p + 3, row + 3] = de, df, dg, dh
            p += 4
        while p < count:
            ae = be = ce = de = kind(0)
            for i in range(columns):
                e = x[p, i]
                ae, be = ae + kind(abs(w[row, i])) * e, be + kind(abs(w[row + 1, i])) * e
                ce, de = ce + kind(abs(w[row + 2, i])) * e, de + kind(abs(w[row + 3, i])) * e
            out[p, row], out[p, row + 1], out[p, row + 2], out[p, row + 3] = ae, be, ce, de
            p += 1
        row += 4
    while row < last:
        for p in range(count):
            ae = kind(0)
            for i in range(columns):
                ae += kind(abs(w[row, i])) * x[p, i]
            out[p, row] = ae
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
            a += size * x[0, i]
            b += below * y[0, i]
            c += above * x[0, i]
        out[0, row], out[1, row], out[2, row] = a, b, c


def sides(w: Array, v: Array, _x: Array, _y: Array, _pivot: bool, out: Array, first: int, last: int) -> None:
    """out[·, r]: whether in row r some |w| > |m|, with m the pivot of w and v, some |v| > |m|, and some w ≠ v."""
    for row in range(first, last):
        above = below = different = False
        for i in range(w.shape[1]):
            a, b = w[row, i], v[row, i]
            above |= ((a > 0) & (a > b)) | ((a < 0) & (a < b))
            below |= ((b > 0) & (b > a)) | ((b < 0) & (b < a))
            different |= a != b
        out[0, row], out[1, row], out[2, row] = above, below, different


def back(w: Array, v: Array, x: Array, y: Array, _pivot: bool, out: Array, first: int, last: int) -> None:
    """v[r, i] = |w[r, i]|·x[i]·y[r], and Σ_r |w[r, i]|·y[r] added to out[i], four rows at a time; x, y and out have one row."""
    rows = w.shape[0]
    row = 0
    while row + 4 <= rows:
        e, f, g, h = y[0, row], y[0, row + 1], y[0, row + 2], y[0, row + 3]
        for i in range(first, last):
            a, b, c, d = abs(w[row, i]), abs(w[row + 1, i]), abs(w[row + 2, i]), abs(w[row + 3, i])
            out[0, i] += (a * e + b * f) + (c * g + d * h)
            v[row, i] = a * x[0, i] * e
            v[row + 1, i] = b * x[0, i] * f
            v[row + 2, i] = c * x[0, i] * g
            v[row + 3, i] = d * x[0, i] * h
        row += 4
    while row < rows:
        for i in range(first, last):
            a = abs(w[row, i])
            out[0, i] += a * y[0, row]
            v[row, i] = a * x[0, i] * y[0, row]
        row += 1
