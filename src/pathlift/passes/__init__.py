"""Passes: what travels through a graph, given its weights and an input (mathematics §3–§5, §8).

A **track** is a number per neuron that obeys a linear recursion over the edges; the path activation A of the path-norm is one,
with the weights |θ|. A **program** is one or several tracks beside each other, and says what each edge makes of them. A pass
carries a program **forward**, from the inputs to the outputs. The way **backward** carries G(v), the sum of the weights of all
paths from v to an output, so that A(v)·G(v) is the mass of the paths through v:

    ones or |x| ──▶ A of the first layer ──▶ … ──▶ A of the last layer ──▶ ‖Φ‖₁        forward (`propagate`)
                              ×                            ×                 │
      shares ◀── A·G ◀── G of the first layer ◀── … ◀── G of the last layer ◀┘          backward (`backward`)

Numbers are **kept in range** between any two layers: a tensor has an exponent of its own (`scaled`); where float32 does not
suffice a pass begins anew in float64, and where that does not, with an exponent for each neuron (`wide`).

In reading order:

- `tracks`: what a program is; `propagate`: the forward pass over any graph, and who may write into whose buffer;
- `programs`: the path-norm and the difference of two networks;
- `products`: programs of many tracks that are functions of the same θ and θ'; `characters` (moments, affinities), `squares`
  (ℓ², Hellinger), `differences` (pivot, dual, moments anew);
- `backward`: the way back, for scores; `scaled`, `wide`: the range of numbers;
- `rounding`: how far a computed number can be from the exact one; `rounded`: what a pass brings to the outputs, rounded up;
- `forward`: the network as it really runs; `deviation`: how far two networks can move apart on an input;
- `intervals`: what an expression of parameters can be over a box; `box`: the box of all weights; `enclosure`: all that a
  network can compute over a box of weights and a ball of inputs.

Passes are pure functions of a network, its values and an input. They capture nothing, read no file, and hold no function for
users.
"""
