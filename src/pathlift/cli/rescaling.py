"""The commands ``rescale`` and ``equivalent``: rescaling symmetries of a network."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Annotated, Optional

import typer

import pathlift
from pathlift.cli.common import (
    CHANGE,
    COMPARE,
    Device,
    Force,
    Json,
    Key,
    ModelArg,
    ModelName,
    OtherKey,
    Others,
    OtherSeed,
    OutModel,
    Seed,
    Shape,
    Trust,
    Until,
    Weights,
    app,
    captured,
    check_options,
    check_used,
    each_other,
    manner,
    out,
    print_json,
    print_rows,
    print_table,
    second_network,
    working,
)
from pathlift.cli.tables import Column
from pathlift.errors import InputError
from pathlift.output import MODELS, check_outputs, write_outputs


class Target(str, Enum):
    """Where to go in the orbit."""

    random = "random"
    normal = "normal"
    balanced = "balanced"
    equalized = "equalized"
    conditioned = "conditioned"


@app.command(rich_help_panel=CHANGE)
def rescale(
    model: ModelName,
    weights: Weights = None,
    shape: Shape = None,
    to: Annotated[
        Optional[Target],  # noqa: UP045
        typer.Option(help="Which representative; without it only the groups are shown."),
    ] = None,
    choices: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --to random: factors to draw from, e.g. 1,128,4096.", metavar="X,X,…"),
    ] = None,
    sigma: Annotated[
        float, typer.Option(help="With --to random and no --choices: standard deviation of log factors.", metavar="X")
    ] = 1.0,
    p: Annotated[float, typer.Option(help="With --to balanced: the l^p norm that becomes smallest.", metavar="P")] = 2.0,
    out_file: OutModel = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
) -> None:
    """Rescaling groups of a network; with --to, other weights of the same function."""
    if out_file is not None and to is None:
        raise InputError("--out needs --to: random, normal, balanced, equalized or conditioned.")
    drawing = {"--choices": choices is not None, "--sigma": sigma != 1.0}
    check_used(drawing, "--to random", there=to is Target.random)
    check_used({"--p": p != 2.0}, "--to balanced", there=to is Target.balanced)
    check_outputs({"--out": out_file}, suffixes=MODELS, inputs={"MODEL": model, "--weights": weights}, replace=force)
    from pathlift.saving import check_extra, model_writer

    drawn = _choices(choices)
    check_options("Symmetries.randomize", choices=drawn, sigma=sigma)
    check_options("Symmetries.balance", p=p)
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key, until=until)
    check_extra(network, out_file)
    with working("finding the groups"):
        groups = pathlift.symmetries(network)
    made: pathlift.rescaling.RescaledState | None = None
    if to is not None:
        with working(f"rescaling to the {to.value} representative"):
            made = _made(groups, to, drawn, sigma, p, seed)
        if out_file is not None:
            with working(f"writing {out_file}"):
                rescaled = dataclasses.replace(network, state={**network.state, **made})
                write_outputs({out_file: model_writer(rescaled, out_file.suffix)}, replace=force)
    if as_json:
        print_json({
            "model": model,
            "groups": len(groups),
            "families": [
                {"groups": len(family.groups), "multiplied": list(family.multiplied), "divided": list(family.divided)}
                for family in groups.families
            ],
            "pinned": [{"module": pin.module, "channels": len(pin.channels), "reason": pin.reason} for pin in groups.pinned],
            "to": None if to is None else to.value,
            "factors": None if made is None else made.factors.tolist(),
            "out": None if out_file is None else str(out_file),
        })
        return
    if made is None:
        _print_groups(model, groups)
        return
    rows = _changes(network, made)
    if isinstance(made, pathlift.rescaling.BalancedState):
        rows += [
            ("largest imbalance of a group (0 at the optimum)", f"{made.imbalance:.1e}"),
            ("Newton steps", str(made.steps)),
        ]
        rows += [("groups without paths, left as they are", f"{len(made.left):,}")] if made.left else []
    print_rows(f"{model}, {to.value if to else ''} representative", [("rescaling groups", f"{len(groups):,}"), *rows])
    if out_file is not None:
        out.print(f"written: {out_file}")


def _choices(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--choices must be numbers separated by commas, found '{text}'.") from None


def _made(
    groups: pathlift.rescaling.Symmetries, to: Target, choices: list[float] | None, sigma: float, p: float, seed: int
) -> pathlift.rescaling.RescaledState:
    import torch

    if to is Target.random:
        return groups.randomize(choices, torch.Generator().manual_seed(seed), sigma=sigma)
    if to is Target.normal:
        return groups.normalize()
    if to is Target.balanced:
        return groups.balance(p)
    return groups.equalize() if to is Target.equalized else groups.condition()


def _changes(network: pathlift.Network, made: pathlift.rescaling.RescaledState) -> list[tuple[str, str]]:
    """Return what the rescaling did to the weights."""
    norms = [
        float(sum(state[name].double().square().sum() for name in network.parameters if name in state)) ** 0.5
        for state in (network.state, made)
    ]
    factors = made.factors
    rows = [("‖θ‖₂ before", f"{norms[0]:.6g}"), ("‖θ‖₂ after", f"{norms[1]:.6g}")]
    if len(factors):
        rows += [("factors", f"{float(factors.min()):.4g} … {float(factors.max()):.4g}")]
    return rows


def _print_groups(model: str, groups: pathlift.rescaling.Symmetries) -> None:
    from pathlift.rescaling.families import axes_text

    free = [(len(family.groups), axes_text(family.multiplied), axes_text(family.divided), "") for family in groups.families]
    pinned = [(len(pin.channels), pin.module, pin.reason) for pin in groups.pinned]
    columns = (Column("groups"), Column("λ multiplies", kind="name"), Column("λ divides", kind="name"))
    if manner.csv:
        rows = [*free, *((channels, module, "", reason) for channels, module, reason in pinned)]
        print_table("", (*columns, Column("pinned by")), rows)
        return
    print_table(f"{model}: {len(groups):,} rescaling groups", columns, [row[:3] for row in free])
    if pinned:
        names = (Column("channels", "{:,}".format), Column("module", kind="name"), Column("by", kind="words"))
        print_table("pinned at 1", names, pinned)


@app.command(rich_help_panel=COMPARE)
def equivalent(
    model: ModelName,
    others: Others,
    weights: Weights = None,
    shape: Shape = None,
    tolerance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Relative difference of a weight that counts as rounding.", metavar="X"),
    ] = None,
    as_json: Json = False,
    seed: Seed = 0,
    other_seed: OtherSeed = 1,
    device: Device = "cpu",
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    key: Key = None,
    other_key: OtherKey = None,
) -> None:
    """Tell whether networks are rescalings of the first. Exit status 1 when one is not."""
    check_options("equivalent", tolerance=tolerance)
    names = each_other(others)
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key, until=until)
    equivalences: dict[str, pathlift.rescaling.Equivalence] = {}
    for name in names:
        with working(f"comparing modulo rescaling with {name}"):
            second = second_network(name, other_seed, model_arg, trust=trust, key=other_key)
            equivalences[name] = pathlift.equivalent(network, second, tolerance=tolerance)
    if as_json:
        records = [{"other": name, **_record(equivalence)} for name, equivalence in equivalences.items()]
        print_json({"model": model, **(records[0] if len(records) == 1 else {"others": records})})
    elif manner.csv or len(equivalences) > 1:
        columns = (
            Column("network", kind="name"),
            Column("equivalent", kind="words"),
            Column("factors"),
            Column("smallest", _shortened),
            Column("largest", _shortened),
            Column("mismatch", kind="words"),
        )
        print_table(f"rescalings of {model}", columns, [(name, *_verdict(answer)) for name, answer in equivalences.items()])
    for name, answer in () if as_json or len(equivalences) > 1 else equivalences.items():
        _, count, least, most, mismatch = _verdict(answer)
        if answer:
            span = f", factors {least:.4g} … {most:.4g}" if count else ""
            out.print(f"equivalent: a rescaling by {count:,} factors leads from {model} to {name}{span}", markup=False)
        else:
            out.print(f"not equivalent: {mismatch}", markup=False)
    raise typer.Exit(0 if all(equivalences.values()) else 1)


def _record(equivalence: pathlift.rescaling.Equivalence) -> dict[str, object]:
    factors = equivalence.factors
    return {
        "equivalent": bool(equivalence),
        "mismatch": equivalence.mismatch,
        "tolerance": equivalence.tolerance,
        "factors": None if factors is None else factors.tolist(),
    }


def _verdict(equivalence: pathlift.rescaling.Equivalence) -> tuple[str, int, float | None, float | None, str]:
    factors = equivalence.factors
    if factors is None:
        return "no", 0, None, None, equivalence.mismatch or ""
    extremes = (float(factors.min()), float(factors.max())) if len(factors) else (None, None)
    return "yes", len(factors), *extremes, ""


def _shortened(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.4g}"
