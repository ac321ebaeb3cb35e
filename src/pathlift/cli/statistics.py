"""The command ``statistics``: what activations look like, without data or on some, and what errors of them do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import pathlift
from pathlift.cli.common import (
    Device,
    Json,
    Key,
    ModelArg,
    ModelName,
    Seed,
    Shape,
    Trust,
    Weights,
    app,
    captured,
    number,
    out,
    print_json,
    working,
)

if TYPE_CHECKING:
    from torch import Tensor


@app.command()
def statistics(
    model: ModelName,
    data: Annotated[str | None, typer.Option(help="Measure on data: digits, fashion-mnist, or a file with inputs 'x'.")] = None,
    limit: Annotated[int, typer.Option(help="Only the first samples of --data.")] = 256,
    correlation: Annotated[float, typer.Option(help="Correlation of two taps of one channel where nothing is known.")] = 0.5,
    channels: Annotated[bool, typer.Option("--channels", help="Propagate covariances of all channels, too.")] = False,
    weights: Weights = None,
    shape: Shape = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    model_arg: ModelArg = None,
    trust: Trust = False,
    key: Key = None,
) -> None:
    """Mean, variance, activity and output sensitivity of every layer; and how far batch norms say otherwise."""
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key)
    x: Tensor | None = None
    if data is not None:
        from pathlift.storage.data import load_data

        x, _ = load_data(data, network.graph.examples[0][0][1:], limit)
        x = x.to(network.graph.examples[0][1])
    with working("computing statistics"):
        found = pathlift.activation_statistics(
            network, data=x, correlation=correlation, correlations="channels" if channels else "taps"
        )
    if as_json:
        layers = [layer.to_dict() for layer in found.layers]
        print_json({
            "model": model,
            "source": found.source,
            "shift": number(found.shift),
            "spread": number(found.spread),
            "layers": layers,
        })
        return
    _print(model, found)


def _print(model: str, found: pathlift.statistics.ActivationStatistics) -> None:
    table = Table(title=f"{model}: activations, from {found.source}", title_justify="left", box=None, padding=(0, 2))
    for header in ("layer", "operator", "channels", "|mean|", "deviation", "correlation", "active", "sensitivity", "from"):
        table.add_column(header, justify="left" if header in {"layer", "operator", "from"} else "right", no_wrap=True)
    for layer in found.layers:
        active = "" if layer.activity is None else f"{float(layer.activity.mean()):.1%}"
        table.add_row(
            layer.module or layer.name,
            layer.operator,
            str(len(layer.mean)),
            f"{float(layer.mean.abs().median()):.3g}",
            f"{float(layer.variance.sqrt().median()):.3g}",
            f"{float(layer.correlation.mean()):.2f}",
            active,
            f"{float(layer.sensitivity.median()):.3g}",
            layer.source,
        )
    out.print(table)
    out.print("medians over channels; correlation and active: means")
    if not math.isnan(found.shift):
        out.print(
            f"batch norms say otherwise by {found.shift:.3g} deviations in the mean, by a factor of 2^{found.spread:.3g} in "
            "the variance (medians)"
        )
