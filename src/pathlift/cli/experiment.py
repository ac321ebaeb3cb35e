"""The command ``experiment lottery``: appendix D as one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from pathlift.cli.common import ANSWER, Commands, Json, app, manner, out, print_json, print_table, progress_bar
from pathlift.cli.tables import Column
from pathlift.errors import InputError
from pathlift.output import check_folder_of_results

experiments = Commands(help="Experiments of the paper.")
app.add_typer(experiments, name="experiment", rich_help_panel="Reproduce the paper")

TRAINING, RUNNING = "Training", "Where it runs"


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} must be numbers separated by commas, found '{text}'.") from None


@experiments.command()
def lottery(
    data: Annotated[
        str,
        typer.Option(help="digits, fashion-mnist, cifar10, or imagenet (folders train/CLASS, val/CLASS).", metavar="DATA"),
    ],
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--out", help="Folder of the results; by default out/lottery-DATA.", metavar="FOLDER", rich_help_panel=ANSWER
        ),
    ] = None,
    root: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where cifar10 or imagenet lie.", metavar="FOLDER"),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="resnet, or a model by name.", metavar="MODEL"),
    ] = None,
    criteria: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Names separated by commas.", metavar="NAME,…"),
    ] = None,
    levels: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Shares to prune, e.g. 0.4,0.8.", metavar="X,X,…"),
    ] = None,
    seeds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Number of runs.", metavar="N"),
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Length of training.", metavar="N", rich_help_panel=TRAINING),
    ] = None,
    rewind: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Epoch to rewind to.", metavar="N", rich_help_panel=TRAINING),
    ] = None,
    width: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Channels of the first stage of resnet.", metavar="N", rich_help_panel=TRAINING),
    ] = None,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Samples per step.", metavar="N", rich_help_panel=TRAINING),
    ] = None,
    rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Largest learning rate.", metavar="X", rich_help_panel=TRAINING),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Use only the first samples.", metavar="N"),
    ] = None,
    rescale: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Also prune the rescaled network."),
    ] = None,
    finetune: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Rewind and train what was pruned."),
    ] = None,
    accelerator: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="cpu, cuda, auto.", metavar="NAME", rich_help_panel=RUNNING),
    ] = None,
    devices: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Devices that train one network (DDP).", metavar="N", rich_help_panel=RUNNING),
    ] = None,
    precision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of training, e.g. 32-true, bf16-mixed.", metavar="NAME", rich_help_panel=RUNNING),
    ] = None,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="CPU threads per job.", metavar="N", rich_help_panel=RUNNING),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(help="Trainings at a time, in processes of their own.", metavar="N", rich_help_panel=RUNNING),
    ] = 1,
    backend: Annotated[
        str,
        typer.Option(help="processes, or ray.", metavar="NAME", rich_help_panel=RUNNING),
    ] = "processes",
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of a Ray cluster; without it one is started here.", metavar="ADDRESS", rich_help_panel=RUNNING),
    ] = None,
    gpus: Annotated[
        float,
        typer.Option(help="GPUs that a job on Ray takes.", metavar="N", rich_help_panel=RUNNING),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Train, rescale, prune by every criterion and level, rewind, finetune. Run it again to go on where it was killed."""
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, found {jobs}.")
    from pathlift.experiments.settings import lottery as settings_of

    settings = settings_of(
        data,
        root=root,
        model=model,
        criteria=None if criteria is None else tuple(name.strip().replace("-", "_") for name in criteria.split(",")),
        levels=_numbers(levels, "--levels"),
        seeds=seeds,
        epochs=epochs,
        rewind=rewind,
        width=width,
        batch=batch,
        rate=rate,
        limit=limit,
        rescale=rescale,
        finetune=finetune,
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        threads=threads,
    )
    if settings.devices > 1 and (jobs > 1 or backend != "processes"):
        raise InputError("Several devices train one network at a time: leave --jobs and --backend out.")
    target = folder or Path("out") / f"lottery-{data}"
    check_folder_of_results("--out", target, "settings.json")
    from pathlift.experiments import lottery as experiment  # need the extra
    from pathlift.experiments import report, store, sweep

    with progress_bar() as shown:
        tasks: dict[str, int] = {}

        def progress(what: str, done: int, count: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=count)
            shown.update(shown.task_ids[tasks[what]], completed=done)

        runner = sweep.backend_of(backend, jobs, address=address, gpus=gpus, cpus=settings.threads)
        rows = experiment.run(settings, target, runner, progress)
    if not experiment.first_rank():
        return
    store.write(target / "results.csv", report.as_csv(rows).encode())
    if settings.finetune:
        level = min(settings.levels, key=lambda candidate: abs(candidate - 0.4))
        report.figure(rows, settings.rewind, level, target / "figure.png")
    if as_json:
        print_json({"folder": str(target), "settings": settings.record(), "rows": rows})
        return
    if manner.csv:
        columns = tuple(map(Column, report.COLUMNS))
        cells = [[" ".join(v) if isinstance(v, list) else v for v in map(row.get, report.COLUMNS)] for row in rows]
        print_table("", columns, cells)
        return
    dense = report.mean_and_deviation([row["accuracy"] for row in rows if row["criterion"] == "dense"])
    names = f"{data}, {settings.model}, {settings.seeds} seeds, dense {dense} %"
    tables = {"accuracy": "after finetuning"} if settings.finetune else {}
    for what, words in (*tables.items(), ("one_shot", "of the pruned network itself")):
        headers, lines = report.table(rows, what)
        columns = (Column(headers[0], kind="name"), *map(Column, headers[1:]))
        print_table(f"Test accuracy (%) {words}: {names}", columns, lines)
    out.print(f"results.csv{', figure.png' if settings.finetune else ''} and settings.json are in {target}", markup=False)
