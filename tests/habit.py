"""How long a search is: the one number that makes all of them longer."""

from __future__ import annotations

import os

LONGER = int(os.environ.get("PATHLIFT_SEARCH", "1"))
"""How many times as many random cases as usual; `make search` sets it."""
