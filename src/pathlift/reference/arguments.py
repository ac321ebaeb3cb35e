"""What may be asked of a listed path-lifting."""

from __future__ import annotations

from pathlift.arguments import declare
from pathlift.arguments.kinds import module, positive_count

declare(__name__, {"path_lifting.model": module, "limit": positive_count})
