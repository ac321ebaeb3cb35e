"""What the arguments of a report may be."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pathlift.arguments import declare
from pathlift.arguments.common import done_of_all
from pathlift.arguments.kinds import Kind, anything, batch, collection, either, flag, number, text, whole
from pathlift.graph.arguments import other
from pathlift.pruning import Batch

one_or_several = either(
    "a module, a captured Network, a state-dict or a file of weights, or a list of such",
    ((list, tuple), collection("networks of the same architecture", other)), (object, other),
)  # fmt: skip


def none_or_several(what: str, each: Kind) -> Kind:
    """A list or tuple, which may be empty."""
    filled = collection(what, each)

    def checked(name: str, value: Any) -> list[Any]:
        return [] if isinstance(value, (list, tuple)) and not value else list(filled(name, value))

    return checked


declare(__name__, {
    "Report.data": either("a tensor of inputs, or a Batch", (Tensor, batch), (Batch, anything)),
    "Report.other": one_or_several,
    "Report.progress": done_of_all,
    "title": text("a line of text", 1),
    "names": collection("names of the other networks", text("a name", 1)),
    "amounts": none_or_several("shares in [0, 1)", number("a share in [0, 1)", lambda v: 0 <= v < 1)),
    "Report.bits": none_or_several("whole numbers from 2 to 8", whole("a whole number from 2 to 8", lambda v: 2 <= v <= 8)),
    "Report.samples": whole("0 or at least 2 paths", lambda v: v == 0 or v >= 2),
    "command": text("a command line"),
    "Report.save.overwrite": flag,
})  # fmt: skip
