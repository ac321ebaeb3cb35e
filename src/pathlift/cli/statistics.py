"""The command ``statistics``: what activations look like, without data or on some, and what errors of them do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Optional

import typer

import pathlift
from pathlift.cli.common import (
    MEASURE,
    Device,
    InputMean,
    InputVariance,
    Json,
    Key,
    Limit,
    ModelArg,
    ModelName,
    Seed,
    Shape,
    Trust,
    Until,
    Weights,
    app,
    captured,
    check_data,
    check_unmeasured,
    declared_inputs,
    out,
    print_json,
    print_table,
    working,
)
from pathlift.cli.tables import Column

if TYPE_CHECKING:
    from torch import Tensor


@app.command(rich_help_panel=MEASURE)
def statistics(
    model: ModelName,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Measure on data: digits, fashion-mnist, or a file with inputs 'x'.", metavar="DATA"),
    ] = None,
    limit: Limit = None,
    correlation: Annotated[
        float, typer.Option(help="Correlation of two taps of one channel where nothing is known.", metavar="X")
    ] = 0.5,
    channels: Annotated[bool, typer.Option("--channels", help="Propagate covariances of all channels, too.")] = False,
    input_mean: InputMean = None,
    input_variance: InputVariance = None,
    weights: Weights = None,
    shape: Shape = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    model_arg: ModelArg = None,
    trust: Trust = False,
    key: Key = None,
    until: Until = None,
) -> None:
    """Mean, variance, activity and output sensitivity of every layer; and how far batch norms say otherwise."""
    samples = check_data(data, limit)
    declared = declared_inputs("activation_statistics", input_mean, input_variance)
    check_unmeasured(declared, data)
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key, until=until)
    x: Tensor | None = None
    if data is not None:
        from pathlift.storage.data import load_data

        x, _ = load_data(data, network.graph.examples[0][0][1:], samples)
        x = x.to(network.graph.examples[0][1])
    with working("computing statistics"):
        activations = pathlift.activation_statistics(
            network,
            data=x,
            correlation=correlation,
            correlations="channels" if channels else "taps",
            input_mean=declared.mean,
            input_variance=declared.variance,
        )
    if as_json:
        layers = [layer.to_dict() for layer in activations.layers]
        print_json({
            "model": model,
            "source": activations.source,
            "shift": activations.shift,
            "spread": activations.spread,
            "layers": layers,
        })
        return
    _print(model, activations)


COLUMNS = (
    Column("layer", kind="name"),
    Column("operator", kind="words"),
    Column("channels"),
    Column("|mean|", "{:.3g}".format),
    Column("deviation", "{:.3g}".format),
    Column("correlation", "{:.2f}".format),
    Column("active", lambda share: "" if share is None else f"{share:.1%}"),
    Column("sensitivity", "{:.3g}".format),
)


def _print(model: str, activations: pathlift.statistics.ActivationStatistics) -> None:
    rows = [
        (
            layer.module or layer.name,
            layer.operator,
            len(layer.mean),
            float(layer.mean.abs().median()),
            float(layer.variance.sqrt().median()),
            float(layer.correlation.mean()),
            None if layer.activity is None else float(layer.activity.mean()),
            float(layer.sensitivity.median()),
        )
        for layer in activations.layers
    ]
    print_table(f"{model}: activations, from {activations.source}", COLUMNS, rows)
    out.print("medians over channels; correlation and active: means")
    if not math.isnan(activations.shift):
        out.print(
            f"batch norms say otherwise by {activations.shift:.3g} deviations in the mean, "
            f"by a factor of 2^{activations.spread:.3g} in the variance (medians)"
        )
