"""The command ``experiment lottery``: appendix D as one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from pathlift.cli.common import Json, app, out, print_json, progress_bar
from pathlift.errors import InputError
from pathlift.output import check_folder_of_results

experiments = typer.Typer(help="Experiments of the paper.")
app.add_typer(experiments, name="experiment")


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} must be numbers separated by commas, found '{text}'.") from None


@experiments.command()
def lottery(
    data: Annotated[str, typer.Option(help="digits, fashion-mnist, cifar10, or imagenet (folders train/CLASS, val/CLASS).")],
    folder: Annotated[Optional[Path], typer.Option("--out", help="Folder of the results; by default out/lottery-DATA.")] = None,  # noqa: UP045
    root: Annotated[Optional[str], typer.Option(help="Where cifar10 or imagenet lie.")] = None,  # noqa: UP045
    model: Annotated[Optional[str], typer.Option(help="resnet, or a model by name.")] = None,  # noqa: UP045
    criteria: Annotated[Optional[str], typer.Option(help="Names separated by commas.")] = None,  # noqa: UP045
    levels: Annotated[Optional[str], typer.Option(help="Shares to prune, e.g. 0.4,0.8.")] = None,  # noqa: UP045
    seeds: Annotated[Optional[int], typer.Option(help="Number of runs.")] = None,  # noqa: UP045
    epochs: Annotated[Optional[int], typer.Option(help="Length of training.")] = None,  # noqa: UP045
    rewind: Annotated[Optional[int], typer.Option(help="Epoch to rewind to.")] = None,  # noqa: UP045
    width: Annotated[Optional[int], typer.Option(help="Channels of the first stage of resnet.")] = None,  # noqa: UP045
    batch: Annotated[Optional[int], typer.Option(help="Samples per step.")] = None,  # noqa: UP045
    rate: Annotated[Optional[float], typer.Option(help="Largest learning rate.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(help="Use only the first samples.")] = None,  # noqa: UP045
    rescale: Annotated[Optional[bool], typer.Option(help="Also prune the rescaled network.")] = None,  # noqa: UP045
    finetune: Annotated[Optional[bool], typer.Option(help="Rewind and train what was pruned.")] = None,  # noqa: UP045
    accelerator: Annotated[Optional[str], typer.Option(help="cpu, cuda, auto.")] = None,  # noqa: UP045
    devices: Annotated[Optional[int], typer.Option(help="Devices that train one network (DDP).")] = None,  # noqa: UP045
    precision: Annotated[Optional[str], typer.Option(help="Of training, e.g. 32-true, bf16-mixed.")] = None,  # noqa: UP045
    threads: Annotated[Optional[int], typer.Option(help="CPU threads per job.")] = None,  # noqa: UP045
    jobs: Annotated[int, typer.Option(help="Trainings at a time, in processes of their own.")] = 1,
    backend: Annotated[str, typer.Option(help="processes, or ray.")] = "processes",
    address: Annotated[Optional[str], typer.Option(help="Of a Ray cluster; without it one is started here.")] = None,  # noqa: UP045
    gpus: Annotated[float, typer.Option(help="GPUs that a job on Ray takes.")] = 0,
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
    dense = report.mean_and_deviation([row["accuracy"] for row in rows if row["criterion"] == "dense"])
    names = f"{data}, {settings.model}, {settings.seeds} seeds, dense {dense} %"
    if settings.finetune:
        out.print(report.table(rows, "accuracy", f"Test accuracy (%) after finetuning: {names}"))
    out.print(report.table(rows, "one_shot", f"Test accuracy (%) of the pruned network itself: {names}"))
    out.print(f"results.csv{', figure.png' if settings.finetune else ''} and settings.json are in {target}")
