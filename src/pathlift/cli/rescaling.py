"""The commands ``rescale`` and ``equivalent``: rescaling symmetries of a network."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Annotated, Optional

import typer
from rich.markup import escape
from rich.table import Table

import pathlift
from pathlift.cli.common import (
    Device,
    Force,
    Json,
    Key,
    ModelArg,
    ModelName,
    OtherKey,
    OutModel,
    Seed,
    Shape,
    Trust,
    Weights,
    app,
    captured,
    check_used,
    out,
    print_json,
    print_rows,
    second_network,
    working,
)
from pathlift.errors import InputError
from pathlift.output import MODELS, check_outputs, write_outputs


class Target(str, Enum):
    """Where to go in the orbit."""

    random = "random"
    normal = "normal"
    balanced = "balanced"
    equalized = "equalized"
    conditioned = "conditioned"


@app.command()
def rescale(
    model: ModelName,
    weights: Weights = None,
    shape: Shape = None,
    to: Annotated[Optional[Target], typer.Option(help="Which representative; without it only the groups are shown.")] = None,  # noqa: UP045
    choices: Annotated[Optional[str], typer.Option(help="With --to random: factors to draw from, e.g. 1,128,4096.")] = None,  # noqa: UP045
    sigma: Annotated[float, typer.Option(help="With --to random and no --choices: standard deviation of log factors.")] = 1.0,
    p: Annotated[float, typer.Option(help="With --to balanced: the l^p norm that becomes smallest.")] = 2.0,
    out_file: OutModel = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
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
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key)
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
        out.print(f"written to {out_file}")


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

    table = Table(title=f"{model}: {len(groups):,} rescaling groups", title_justify="left", box=None, padding=(0, 2))
    table.add_column("groups", justify="right", no_wrap=True)
    table.add_column("λ multiplies", overflow="fold")
    table.add_column("λ divides", overflow="fold")
    for family in groups.families:
        sides = (escape(axes_text(family.multiplied)), escape(axes_text(family.divided)))
        table.add_row(f"{len(family.groups):,}", *sides)
    out.print(table)
    if groups.pinned:
        pinned = Table(title="pinned at 1", title_justify="left", box=None, padding=(0, 2))
        pinned.add_column("channels", justify="right")
        pinned.add_column("module")
        pinned.add_column("by")
        for pin in groups.pinned:
            pinned.add_row(f"{len(pin.channels):,}", pin.module, pin.reason)
        out.print(pinned)


@app.command()
def equivalent(
    model: ModelName,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="A file of weights, or a second model by name.")],
    weights: Weights = None,
    shape: Shape = None,
    tolerance: Annotated[Optional[float], typer.Option(help="Relative difference of a weight that counts as rounding.")] = None,  # noqa: UP045
    as_json: Json = False,
    seed: Seed = 0,
    other_seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the second model's random weights.")] = 1,
    device: Device = "cpu",
    model_arg: ModelArg = None,
    trust: Trust = False,
    key: Key = None,
    other_key: OtherKey = None,
) -> None:
    """Tell whether two networks are rescalings of each other. Exit status 1 when they are not."""
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key)
    with working("comparing modulo rescaling"):
        second = second_network(other, other_seed, model_arg, trust=trust, key=other_key)
        equivalence = pathlift.equivalent(network, second, tolerance=tolerance)
    factors = equivalence.factors
    if as_json:
        print_json({
            "model": model,
            "other": other,
            "equivalent": bool(equivalence),
            "mismatch": equivalence.mismatch,
            "tolerance": equivalence.tolerance,
            "factors": None if factors is None else factors.tolist(),
        })
    elif factors is not None:
        span = f", factors {float(factors.min()):.4g} … {float(factors.max()):.4g}" if len(factors) else ""
        out.print(f"equivalent: a rescaling by {len(factors):,} factors leads from {model} to {other}{span}")
    else:
        out.print(f"not equivalent: {equivalence.mismatch}", markup=False, highlight=False)
    raise typer.Exit(0 if equivalence else 1)
