"""The command ``quantize``: round weights to grids, write them as integers, and say what that costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Optional

import typer

import pathlift
from pathlift.cli.common import (
    CHANGE,
    Device,
    Force,
    Json,
    Key,
    ModelArg,
    ModelName,
    Seed,
    Shape,
    Trust,
    Weights,
    app,
    built,
    check_data,
    out,
    print_json,
    print_table,
    progress_bar,
    scientific,
    working,
)
from pathlift.cli.tables import Column
from pathlift.errors import InputError
from pathlift.output import check_outputs

ROUNDINGS = "compensated, nearest, towards_zero, away, stochastic, balanced"
"""The names in `pathlift.quantisation.rounding.ROUNDINGS`, for the help."""

RANGES = "mse, minmax, expected, lp"
"""The names in `pathlift.quantisation.ranges.RANGES`, for the help."""


@app.command(rich_help_panel=CHANGE)
def quantize(
    model: ModelName,
    bits: Annotated[str, typer.Option(help="2 to 8, bf16, fp8_e4m3, fp8_e5m2, or PATTERN=BITS with commas.")] = "8",
    ends: Annotated[Optional[str], typer.Option(help="Bits of the first and the last layer.")] = None,  # noqa: UP045
    granularity: Annotated[
        str, typer.Option(help="One scale for each: channel, tensor, or so many input channels.")
    ] = "channel",
    rounding: Annotated[str, typer.Option(help=f"One of {ROUNDINGS}.")] = "compensated",
    ranges: Annotated[str, typer.Option("--range", help=f"One of {RANGES}.")] = "mse",
    affine: Annotated[bool, typer.Option("--affine", help="Grids of whole numbers with a zero point.")] = False,
    correction: Annotated[Optional[str], typer.Option(help="mean, variance, or none.")] = None,  # noqa: UP045
    gauge: Annotated[str, typer.Option(help="Round in this gauge: none, equalised, balanced, optimal.")] = "none",
    budget: Annotated[
        str | None, typer.Option(help="Bits of a weight on average (4.5), or bytes (3.2MB); --bits is the most.")
    ] = None,
    data: Annotated[Optional[str], typer.Option(help="Inputs to measure on: digits, fashion-mnist, or a file.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option(help="Only the first samples of --data.")] = 256,
    weights: Weights = None,
    shape: Shape = None,
    out_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="Write integers, scales and zero points to a .safetensors file, as torchao reads it."),
    ] = None,
    onnx_file: Annotated[Optional[Path], typer.Option("--onnx", help="Write an .onnx file with integer weights.")] = None,  # noqa: UP045
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
) -> None:
    """Quantise the weights of a network; print what became of each tensor, and how far the function can have moved."""
    check_outputs({"--out": out_file}, inputs={"--weights": weights}, replace=force)
    check_outputs({"--onnx": onnx_file}, suffixes=(".onnx",), inputs={"MODEL": model}, replace=force)
    check_data(data, limit)
    allowed = None if budget is None else _budget(budget)
    chosen, last = _bits(bits), None if ends is None else _number(ends)
    module, sizes = built(model, weights, shape, seed, device, model_arg, trust=trust, key=key)
    seen = None
    if data is not None:
        from pathlift.storage.data import load_data

        seen, _ = load_data(data, sizes, limit)  # type: ignore[arg-type]
    with progress_bar() as bar:
        task = bar.add_task("quantising", total=None)
        quantized, report = pathlift.quantize(
            module,
            sizes,
            chosen,
            granularity=_number(granularity),
            rounding=rounding,
            range=ranges,
            affine=affine,
            ends=last,
            correction=correction,
            gauge=gauge,
            budget=allowed,
            data=seen,
            generator=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    written = [str(path) for path in (out_file, onnx_file) if path is not None]
    if out_file is not None:
        report.save(out_file)
    if onnx_file is not None:
        with working("writing the ONNX file"):
            pathlift.quantisation.save_onnx(quantized, report, onnx_file, sizes)
    if as_json:
        print_json({
            "model": model,
            "rounding": report.rounding,
            "range": report.range,
            "granularity": report.granularity,
            "bits": report.bits,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "expected_error": report.expected_error,
            "log10_path_norm": report.log10_path_norm,
            "log10_path_metric": [report.path_metric.log10_lower, report.path_metric.log10_upper],
            "tensors": report.table(),
            "written": written,
        })
        return
    _print(model, report)
    if written:
        out.print(f"written: {', '.join(written)}")


def _bits(text: str) -> int | str | dict[str, int | str | None]:
    """Read --bits: one number or format, or patterns with one each."""
    if "=" not in text:
        return _number(text)
    pairs = [part.strip().rpartition("=") for part in text.split(",")]
    return {pattern: None if value == "float" else _number(value) for pattern, _, value in pairs}


def _budget(text: str) -> float | pathlift.quantisation.Bytes:
    """Read --budget."""
    matched = re.fullmatch(r"([\d.]+)\s*([kMG]?B)?", text.strip())
    try:
        if matched is None:
            raise ValueError
        value = float(matched[1])
    except ValueError:
        raise InputError(f"--budget must be bits of a weight on average, 4.5, or bytes, 3.2MB; found '{text}'.") from None
    if matched[2] is None:
        return value
    return pathlift.quantisation.Bytes(int(value * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[matched[2]]))


def _number(text: str) -> int | str:
    """Read a whole number; anything else is a name, which the library knows or refuses."""
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) else text


COLUMNS = (
    Column("tensor", kind="name"),
    Column("format", kind="words"),
    Column("weights", "{:,}".format),
    Column("bytes", "{:,}".format),
    Column("relative change", "{:.4f}".format),
    Column("share of expected error", "{:.4f}".format),
    Column("of the path-norm", "{:.4f}".format),
)


def _print(model: str, report: pathlift.quantisation.QuantizeReport) -> None:
    rows = [
        (row.name, row.format, row.weights, row.bytes, row.relative_error, said["share_of_expected_error"], row.path_share)
        for row, said in zip(report.tensors, report.table(), strict=True)
    ]
    title = f"{model}: {report.bits:.3g} bits a weight, {report.rounding}, a scale for each {report.granularity}"
    print_table(title, COLUMNS, rows)
    out.print(f"bytes before, and after         {report.bytes_before:,}, {report.bytes_after:,}")
    out.print(f"path-norm                       {scientific(report.log10_path_norm)}")
    metric = report.path_metric
    if metric.exact:
        out.print(f"path-metric, exact              {scientific(metric.log10_upper)}")
    else:
        out.print(f"path-metric, between            {scientific(metric.log10_lower)} and {scientific(metric.log10_upper)}")
    out.print(f"expected error, an estimate     {report.expected_error:.4g}")
