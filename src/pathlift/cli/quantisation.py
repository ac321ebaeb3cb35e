"""The commands ``quantize`` and ``bits``: round weights to grids and write them as integers; bits that an error asks for."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Optional

import typer

import pathlift
from pathlift.cli.common import (
    ANSWER,
    CHANGE,
    MEASURE,
    SYNTHETIC,
    Device,
    Force,
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
    check_options,
    check_unmeasured,
    check_used,
    declared_inputs,
    inputs_of,
    known,
    out,
    print_json,
    print_table,
    progress_bar,
    scientific,
    working,
)
from pathlift.cli.tables import Column
from pathlift.errors import InputError
from pathlift.output import TENSORS, check_outputs, write_outputs

ROUNDINGS = ("compensated", "nearest", "towards_zero", "away", "stochastic", "balanced")
"""The names in `pathlift.quantisation.rounding.ROUNDINGS`, for the help."""

RANGES = ("mse", "minmax", "expected", "lp")
"""The names in `pathlift.quantisation.ranges.RANGES`, for the help."""

GAUGES = ("none", "equalised", "balanced", "optimal")
"""The names in `pathlift.quantisation.gauge.GAUGES`, for the help."""

CORRECTIONS = ("mean", "variance", "none")
"""What may take up the mean of what rounding changes, for the help."""


def _one_of(names: tuple[str, ...], what: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=f"{what}: {', '.join(names)}.", metavar="NAME", autocompletion=known(*names)
    )
    return option


@app.command(rich_help_panel=CHANGE)
def quantize(
    model: ModelName,
    bits: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="2 to 8, bf16, fp8_e4m3, fp8_e5m2; or PATTERN=BITS, repeated or with commas, the first that matches a tensor "
            "or module; BITS may be float.  [default: 8]",
            metavar="BITS",
        ),
    ] = None,
    ends: Annotated[Optional[str], typer.Option(help="Bits of the first and the last layer.", metavar="BITS")] = None,  # noqa: UP045
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Bits of a weight on average (4.5), or of all parameters and buffers (3.2MB); --bits is then the most.",
            metavar="X",
        ),
    ] = None,
    granularity: Annotated[
        str, typer.Option(help="One scale for each channel, for the tensor, or for so many input channels.", metavar="NAME|N")
    ] = "channel",
    rounding: Annotated[str, _one_of(ROUNDINGS, "How to round")] = "compensated",
    range: Annotated[str, _one_of(RANGES, "How far grids reach")] = "mse",  # noqa: A002 - the word of the field
    affine: Annotated[bool, typer.Option("--affine", help="Grids of whole numbers with a zero point.")] = False,
    correction: Annotated[
        Optional[str],  # noqa: UP045
        _one_of(CORRECTIONS, "What biases and batch norms take up"),
    ] = None,
    gauge: Annotated[str, _one_of(GAUGES, "Rescale first, by powers of two")] = "none",
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Measure activations on data: digits, fashion-mnist, a file with inputs 'x', or synthetic: 32 inputs that are "
            "made from the model's batch norms.",
            metavar="DATA",
        ),
    ] = None,
    limit: Limit = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Layer after layer on --data: each makes up for those before it.")
    ] = False,
    input_mean: InputMean = None,
    input_variance: InputVariance = None,
    activations: Annotated[
        bool, typer.Option("--activations", help="Whole numbers of 8 bits for activations, too, in the file of --onnx.")
    ] = False,
    weights: Weights = None,
    shape: Shape = None,
    out_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--out",
            help="Write integers, scales and zero points to a .safetensors file, as torchao reads it.",
            metavar="FILE",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    onnx_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--onnx", help="Write an .onnx file with integer weights.", metavar="FILE", rich_help_panel=ANSWER),
    ] = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
) -> None:
    """Quantise the weights of a network; print what became of each tensor, and how far the function can have moved."""
    read = {"MODEL": model, "--weights": weights, "--data": data}
    check_outputs({"--out": out_file}, suffixes=TENSORS, inputs=read, replace=force)
    check_outputs({"--onnx": onnx_file}, suffixes=(".onnx",), inputs=read, replace=force)
    check_used({"--activations": activations}, "--onnx", there=onnx_file is not None)
    check_used({"--sequential": sequential}, "--data", there=data is not None)
    chosen, most = _bits(bits or ["8"]), None if budget is None else _budget(budget)
    last, scale = None if ends is None else _number(ends), _number(granularity)
    check_options(
        "quantize", bits=chosen, ends=last, granularity=scale, rounding=rounding, range=range, correction=correction,
        gauge=gauge, budget=most,
    )  # fmt: skip
    samples = check_data(data, limit, synthetic=True)
    declared = declared_inputs("quantize", input_mean, input_variance)
    if gauge == "none":  # others are chosen without data
        check_unmeasured(declared, None if data == SYNTHETIC else data)
    from pathlift.quantisation.activations import activation_ranges
    from pathlift.quantisation.onnx import onnx_writer
    from pathlift.quantisation.report import report_writer
    from pathlift.saving import check_extra

    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key, until=until)
    check_extra(network, onnx_file)
    seen = None if data is None else inputs_of(network, data, samples, declared, seed)
    with progress_bar() as bar:
        task = bar.add_task("quantising", total=None)
        quantized, report = pathlift.quantize(
            network,
            bits=chosen,
            granularity=scale,
            rounding=rounding,
            range=range,
            affine=affine,
            ends=last,
            correction=correction,
            gauge=gauge,
            budget=most,
            data=seen,
            sequential=sequential,
            input_mean=declared.mean,
            input_variance=declared.variance,
            generator=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    with working("writing files"):
        writers = {} if out_file is None else {out_file: report_writer(report)}
        if onnx_file is not None:
            ranges = None
            if activations and seen is not None:
                ranges = activation_ranges(quantized, data=seen)
            elif activations:
                ranges = activation_ranges(quantized, input_mean=declared.mean, input_variance=declared.variance)
            writers[onnx_file] = onnx_writer(quantized, report, activations=ranges)
        write_outputs(writers, replace=force)
    metric = report.path_metric
    if as_json:
        print_json({
            "model": model,
            "rounding": report.rounding,
            "sequential": report.sequential,
            "range": report.range,
            "granularity": report.granularity,
            "gauge": report.gauge.name,
            "statistics": report.statistics,
            "bits": report.bits,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "expected_error": report.expected_error,
            "expected_output_change": report.expected_output_change,
            "output_change": report.output_change,
            "output_size": report.output_size,
            "log10_path_norm": report.log10_path_norm,
            "exact": metric.exact,
            "log10_lower": metric.log10_lower,
            "log10_upper": metric.log10_upper,
            "batch_norms": report.batch_norms,
            "corrected": list(report.corrected),
            "tensors": {str(row.pop("name")): row for row in report.table()},
            "written": {str(path): path.stat().st_size for path in writers},
        })
        return
    _print(model, report)
    for path in writers:
        out.print(f"written: {path} ({path.stat().st_size:,} bytes)")


@app.command(rich_help_panel=MEASURE)
def bits(
    model: ModelName,
    tolerance: Annotated[
        float, typer.Option(help="Largest path-metric that is allowed, as a share of the path-norm.", metavar="X")
    ] = 0.01,
    weights: Weights = None,
    shape: Shape = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    key: Key = None,
) -> None:
    """How many bits the weights need, guaranteed: rounding towards zero moves no more of the path-norm than --tolerance."""
    check_options("bits_needed", tolerance=tolerance)
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key, until=until)
    with working("rounding to more and more bits"):
        needed = pathlift.quantisation.bits_needed(network, tolerance)
    if as_json:
        print_json({
            "model": model,
            "bits": needed.bits,
            "tolerance": needed.tolerance,
            "log10_path_norm": needed.log10_path_norm,
            "tried": [{"bits": count, "log10_relative": log10} for count, log10 in needed.log10_relative.items()],
            "published": needed.published,
        })
        return
    print_table(
        f"{model}: path-metric of rounding towards zero, as a share of the path-norm",
        (Column("bits"), Column("share", scientific, raw=lambda log10: 10**log10)),
        list(needed.log10_relative.items()),
    )
    most = max(needed.log10_relative)
    out.print(f"path-norm                       {scientific(needed.log10_path_norm)}")
    out.print(f"bits for {tolerance:<22.6g} {needed.bits if needed.bits is not None else f'more than {most}'}")
    if needed.published is not None:
        out.print(f"by the bound of the literature  {needed.published}")


def _bits(texts: list[str]) -> int | str | dict[str, int | str | None]:
    """Read --bits: one number or format, or patterns with one each."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    if len(parts) == 1 and "=" not in parts[0]:
        return _number(parts[0])
    patterns: dict[str, int | str | None] = {}
    for part in parts:
        pattern, sign, value = part.rpartition("=")
        if not sign or not pattern or pattern in patterns:
            raise InputError(f"--bits must be one number or format, or different PATTERN=BITS, found '{','.join(texts)}'.")
        patterns[pattern] = None if value == "float" else _number(value)
    return patterns


UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
"""Units of bytes."""


def _budget(text: str) -> float | pathlift.quantisation.Bytes:
    """Read --budget."""
    matched = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kMG]?B)?", text.strip())
    value = 0.0 if matched is None else float(matched[1]) * (UNITS[matched[2]] if matched[2] else 1.0)
    if matched is None or (matched[2] and value < 1):
        raise InputError(f"--budget must be bits of a weight on average, 4.5, or bytes, 3.2MB; found '{text}'.")
    return pathlift.quantisation.Bytes(math.floor(value)) if matched[2] else value


def _number(text: str) -> int | str:
    """Read a whole number, or leave a word."""
    return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text


COLUMNS = (
    Column("tensor", kind="name"),
    Column("format", kind="words"),
    Column("weights", "{:,}".format),
    Column("bytes", "{:,}".format),
    Column("largest step", "{:.4g}".format),
    Column("clipped", "{:,}".format),
    Column("relative change", "{:.4f}".format),
    Column("share of expected error", "{:.4f}".format),
    Column("share of path-norm", "{:.4f}".format),
)


def _print(model: str, report: pathlift.quantisation.QuantizeReport) -> None:
    rows = [
        tuple(row[key] for key in (
            "name", "format", "weights", "bytes", "step", "clipped", "relative_error", "share_of_expected_error", "path_share",
        ))
        for row in report.table()
    ]  # fmt: skip
    gauge = "" if report.gauge.name == "none" else f", gauge {report.gauge.name}"
    scale = f"{'each ' if report.granularity in {'channel', 'tensor'} else ''}{report.granularity}"
    order = ", sequential" if report.sequential else ""
    print_table(
        f"{model}: {report.bits:.3g} bits a weight, {report.rounding}{order}, a scale for {scale}{gauge}", COLUMNS, rows
    )
    out.print(f"bytes before                    {report.bytes_before:,}")
    out.print(f"bytes after, bits packed        {report.bytes_after:,}")
    out.print(f"batch norms, kept               {report.batch_norms}")
    out.print(f"path-norm                       {scientific(report.log10_path_norm)}")
    metric = report.path_metric
    if metric.exact:
        out.print(f"path-metric, exact              {scientific(metric.log10_upper)}")
    else:
        out.print(f"path-metric, between            {scientific(metric.log10_lower)} and {scientific(metric.log10_upper)}")
    out.print(f"expected change of outputs      {report.expected_output_change:.2g} of their size, a rough model")
    if report.output_change is not None:
        out.print(f"change of outputs on the data   {report.output_change:.4g}, of {report.output_size:.4g}")
    out.print(f"statistics of activations       {report.statistics}")
