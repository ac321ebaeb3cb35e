"""The pages that are made from the package: reference, command line, gallery, the table of models."""

from __future__ import annotations

import ast
import html
import importlib
import re
from pathlib import Path

import api
import made

ROOT = Path(__file__).parents[2]

HEADS = {
    "pruning": "Criteria, selections, masks and their price.",
    "rescaling": "Groups, gauges, equivalence and alignment; what keeps a gauge during training.",
    "metric": "The path-metric, its bounds and estimates.",
    "lipschitz": "Bounds on what networks compute.",
    "certification": "Tolerances, certificates and attacks.",
    "consequences": "Sharpness and generalisation.",
    "quantisation": "Reports, files, ranges of activations, bits that an error asks for.",
    "report": "One page on a network.",
    "storage": "Weights in files, models by name, data.",
}


def runs(path: str) -> bool:
    """Whether the blocks of a page are run: the older pages describe long runs by their commands."""
    return path not in {"benchmarks.md", "reproduction.md", "reading.md", "support.md", "mathematics.md", "changelog.md"}


def refusals() -> str:
    """Return the table of operators that are known to lie outside the theory, from the rules themselves."""
    source = (ROOT / "src" / "pathlift" / "rules" / "outside.py").read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    rows = [[ast.literal_eval(argument) for argument in call.args] for call in calls]
    lines = [f"| {' '.join(f'`{name}`' for name in names.split())} | {reason} | {advice} |" for reason, advice, names in rows]
    return "\n".join(["| operators | reason | what to do |", "| --- | --- | --- |", *lines])


def entry(path: str) -> str:
    """Return a block of the reference."""
    return f"::: {path}\n"


def reference() -> dict[str, str]:
    """Make the pages of the reference: every public name, and every type that their signatures mention."""
    classes, aliases = api.types()
    results = [path for path in classes if _is_result(path)]
    others = [path for path in classes if path not in results and not path.rpartition(".")[2].startswith("_")]
    names = api.top()
    pages = {
        "pathlift": [
            "# pathlift\n",
            "The names at the top: `pathlift.NAME`.\n",
            *(entry(f"pathlift.public.{name}") for name in names),
        ],
        "results": [
            "# Results\n",
            "What functions return: one line in a terminal, a table in a notebook, and `.to_dict()` is ready for JSON. "
            "`.scalars(prefix)` is what a logger takes, `.to_frame()` a data frame of pandas (extra `frames`); `.plot(ax)` "
            "draws it (extra `plots`), where a picture says more than numbers.\n",
            *map(entry, results),
        ],
        "arguments": [
            "# Types\n",
            "What signatures mention beside results: first what arguments may be, then what a captured network consists of.\n",
            *map(entry, aliases),
            *map(entry, others),
        ],
    }
    for room in api.PACKAGES:
        lines = [f"# pathlift.{room}\n", f"{HEADS[room]}\n"]
        above = [name for name in importlib.import_module(f"pathlift.{room}").__all__ if name in names]
        if above:
            lines.append(f"At the top: {', '.join(f'[`{name}`](pathlift.md#pathlift.public.{name})' for name in above)}.\n")
        lines += [entry(f"pathlift.{room}.{name}") for name in api.package(room)]
        if room == "rescaling":
            lines += ["## Training\n", *(entry(f"pathlift.rescaling.training.{name}") for name in api.TRAINING)]
            lines += [entry("pathlift.lightning.RescaleCallback"), entry("pathlift.lightning.PathNormLogger")]
        if room == "pruning":
            lines += [entry("pathlift.pruning.torch_pruning.PathMagnitudeImportance")]
            lines += [entry("pathlift.lightning.PruneCallback")]
        pages[room] = lines
    return {f"reference/{name}.md": "\n".join(lines) for name, lines in pages.items()}


def _is_result(path: str) -> bool:
    from pathlift.results import Result

    module, _, name = path.rpartition(".")
    return issubclass(getattr(importlib.import_module(module), name), Result)


def gallery(printed: dict[str, str]) -> dict[str, str]:
    """Make the gallery from the examples and what they printed."""
    lines = [
        "# Gallery\n",
        "Each of these was run when this site was built, on data that ships with scikit-learn: handwritten digits and two "
        "photographs. The scripts are in `examples/`.\n",
    ]
    for name, options in made.EXAMPLES.items():
        source = (ROOT / "examples" / f"{name}.py").read_text()
        words = re.match(r'"""(.*?)"""', source, re.DOTALL)
        assert words is not None
        title, _, rest = words[1].partition("\n\n")
        command = " ".join(["python", f"examples/{name}.py", *options])
        lines += [f"## {title.strip().removesuffix('.').replace(chr(10), ' ')}\n"]
        lines += [
            _prose(rest),
            f"```text\n$ {command}\n{printed[name].strip()}\n```\n",
            f"![{title.split('.')[0]}](gallery/{name}.png)\n",
        ]
        lines += [f'??? note "examples/{name}.py"\n', *(f"    {line}" for line in f"```python\n{source}```".splitlines()), ""]
    return {"gallery.md": "\n".join(lines)}


def _prose(text: str) -> str:
    """Return the words of a docstring without its indented commands."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("    ")).strip() + "\n"


def coverage(markdown: str) -> str:
    """Turn the lists of models into one table that can be searched; the summary stays."""
    head, *sections = re.split(r"^## ", markdown, flags=re.MULTILINE)
    rows = []
    for section in sections:
        title, _, body = section.partition("\n")
        supported = re.search(r"^Supported \(\d+\): (.*)$", body, re.MULTILINE)
        names = re.findall(r"`([^`]+)`", supported[1]) if supported else []
        rows += [(title, name, "supported", "") for name in names]
        rows += [(title, *row) for row in _refused(body)]
    cells = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"{head}\n"
        '<input id="models-filter" type="search" placeholder="resnet supported" aria-label="Show models with these words">\n\n'
        f'<p><span id="models-count">{len(rows)}</span> of {len(rows)} models</p>\n\n'
        '<div class="md-typeset__scrollwrap"><table id="models"><thead><tr><th>library: group</th><th>model</th>'
        f"<th>verdict</th><th>operators outside the theory</th></tr></thead><tbody>\n{cells}\n</tbody></table></div>\n"
    )


def _refused(body: str) -> list[tuple[str, str, str]]:
    found = re.findall(r"^\| `([^`]+)` \| (.*?) \|$", body, re.MULTILINE)
    return [(name, "refused", operators) for name, operators in found]
