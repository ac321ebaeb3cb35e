"""How far two networks of one architecture, or all networks of a set, can differ on an input (mathematics §4, §5).

| what | file: function |
| --- | --- |
| the bound on each output, by any of nine ways | `bound`: `lipschitz_bound` |
| Theorem 4.1 (5), Theorem B.1 (15) | `outputs`: `theorem_4_1`; for weights of any signs `pivot` |
| equation (2), Corollary G.1 | `perceptron`: `equation_2`, `corollary_g1` |
| the bound in expectation over data | `expected`: `expected_bound` |
| the Lipschitz constant in the input | `expected`: `input_lipschitz` |
"""

from pathlift.lipschitz import arguments as arguments
from pathlift.lipschitz.bound import LipschitzBound, lipschitz_bound
from pathlift.lipschitz.expected import InputLipschitz, expected_bound, gradient_norms, input_lipschitz

__all__ = [
    "InputLipschitz",
    "LipschitzBound",
    "expected_bound",
    "gradient_norms",
    "input_lipschitz",
    "lipschitz_bound",
]
