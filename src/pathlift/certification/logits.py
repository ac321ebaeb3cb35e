"""What a certificate and an attack are about: one vector of logits for each sample."""

from __future__ import annotations

from pathlift.errors import Problem, UnsupportedModelError
from pathlift.graph.network import Network


def logits_of(network: Network) -> str:
    """Return the output layer, which must hold one vector of at least two logits for each sample.

    Args:
        network: The graph.

    Returns:
        Its name.

    Raises:
        UnsupportedModelError: The network has other outputs.
    """
    name = network.outputs[0]
    layer = network.layer[name]
    if len(network.outputs) == 1 and len(layer.shape) == 2 and layer.shape[0] == 1 and layer.shape[1] > 1:
        return name
    shapes = ", ".join(str(network.layer[output].shape) for output in network.outputs)
    reason = "A certificate is about the arg-max of one vector of logits per sample, two at least; this model returns "
    reason += f"{len(network.outputs)} output{'s' if len(network.outputs) > 1 else ''} of shape {shapes}."
    advice = (
        "Wrap the model so that it returns a tensor of shape (batch, classes), or stop at the layer that makes one (until=)."
    )
    raise UnsupportedModelError((Problem("", "output", "", reason, advice),))
