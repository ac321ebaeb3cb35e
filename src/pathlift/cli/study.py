"""The command ``study``: many networks and any of the functions, one table and one page."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from pathlift.cli.common import (
    ANSWER,
    MEASURE,
    Json,
    Trust,
    app,
    known,
    manner,
    out,
    print_json,
    print_rows,
    progress_bar,
    working,
)
from pathlift.errors import InputError
from pathlift.output import check_folder_of_results, write_outputs

RUNNING = "Where it runs"
CLUSTERS = "local", "ray"


@app.command(rich_help_panel=MEASURE)
def study(
    zoo: Annotated[Path, typer.Argument(metavar="ZOO", help="A YAML file with the keys functions and models.")],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the results.", metavar="FOLDER", rich_help_panel=ANSWER)
    ] = Path("study"),
    cluster: Annotated[
        str, typer.Option(help="local or ray.", metavar="NAME", autocompletion=known(*CLUSTERS), rich_help_panel=RUNNING)
    ] = "local",
    jobs: Annotated[
        int, typer.Option(help="Networks at a time on this machine, in processes.", metavar="N", rich_help_panel=RUNNING)
    ] = 1,
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of a Ray cluster; without it one is started here.", metavar="ADDRESS", rich_help_panel=RUNNING),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Ask many networks many things. Run it again to go on where it was killed, or with more in the file."""
    if cluster not in CLUSTERS:
        raise InputError(f"--cluster must be local or ray, found '{cluster}'.")
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, found {jobs}.")
    if cluster == "ray" and jobs > 1:
        raise InputError("--jobs has no effect on a cluster, which has its own number of CPUs: leave it out.")
    if address is not None and cluster != "ray":
        raise InputError("--address has no effect without --cluster ray: leave it out.")
    from pathlift.storage.packages import package

    for needed in ("yaml", "pyarrow", "matplotlib"):
        package(needed, "study")
    from pathlift.experiments.sweep import backend_of
    from pathlift.study import page, table
    from pathlift.study.zoo import read_zoo

    with working(f"reading {zoo}"):
        subjects = read_zoo(zoo)
    check_folder_of_results("--out", folder, table.MARK)
    jobs = min(jobs, len(subjects))
    backend = backend_of("ray" if cluster == "ray" else "processes", jobs, address=address)
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 1 if cluster == "ray" else None
    with progress_bar() as bar:
        task = bar.add_task("networks", total=len(subjects))
        rows = table.run(
            subjects, folder, backend, threads=threads, trust=trust,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    with working("drawing"):
        made = page.Study(zoo.stem, subjects, rows, f"pathlift {shlex.join(sys.argv[1:])}")
        parquet, html = folder / "study.parquet", folder / "study.html"
        text = page.written(made)
        table.write_parquet(rows, parquet)
        write_outputs({html: lambda path: path.write_text(text, encoding="utf-8")}, replace=True)
    if as_json:
        networks = [
            {"network": subject.name}
            | {key: row[key] for key in ("model", "weights", "outcome", "reason", "parameters", "depth")}
            for subject, row in zip(subjects, rows, strict=True)
        ]
        print_json({"zoo": str(zoo), "table": str(parquet), "page": str(html), **made.counts, "networks": networks})
        return
    lines = [(outcome, f"{count:,}") for outcome, count in made.counts.items()]
    print_rows(f"{zoo}: {len(rows):,} network{'s' * (len(rows) > 1)}", [*lines, ("table", str(parquet)), ("page", str(html))])
    if not manner.csv:
        for name, row in made.rows_of("failed"):
            out.print(f"{name} failed: {row['reason']}", markup=False)
