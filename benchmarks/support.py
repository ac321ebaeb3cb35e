"""Which models of torchvision and timm lie inside the theory: writes docs/coverage.md (`make coverage`).

Models are built on the meta device where their constructors allow it, so no weights are downloaded or even allocated.
Each is given to `check_support`; nothing else decides. A model that crashes is listed as a crash.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import warnings
from collections import Counter
from pathlib import Path

import torch

import pathlift

SECONDS = 150
SHAPES = {"segmentation": (3, 224, 224), "video": (3, 16, 112, 112), "optical_flow": ((3, 128, 128), (3, 128, 128))}
VIDEO_SHAPES = {"mvit": (3, 16, 224, 224), "s3d": (3, 16, 224, 224), "swin3d": (3, 16, 112, 112)}


def torchvision_names() -> list[str]:
    import torchvision.models as models

    names = []
    for group in ("classification", "segmentation", "detection", "optical_flow", "video"):
        module = models if group == "classification" else getattr(models, group)
        names += [f"torchvision/{group}/{name}" for name in models.list_models(module=module)]
    return names


def timm_names() -> list[str]:
    import timm

    return [f"timm/classification/{name}" for name in timm.list_models(pretrained=False)]


def build(key: str) -> tuple[torch.nn.Module, object]:
    library, group, name = key.split("/")
    if library == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
        size = model.default_cfg.get("input_size", (3, 224, 224))
        return model, tuple(
            model.default_cfg.get("test_input_size", size) if model.default_cfg.get("fixed_input_size") else size
        )
    import torchvision

    options: dict[str, object] = {"weights": None}
    if group in {"segmentation", "detection"}:
        options["weights_backbone"] = None
    if name in {"inception_v3", "googlenet"}:
        options["init_weights"] = False
    model = torchvision.models.get_model(name, **options)
    if group == "detection":
        return model.backbone, (3, 300, 300) if name.startswith("ssd") else (3, 224, 224)
    if group == "video":
        return model, next((s for prefix, s in VIDEO_SHAPES.items() if name.startswith(prefix)), SHAPES["video"])
    size = 299 if name == "inception_v3" else 224
    return model, SHAPES.get(group, (3, size, size))


def on_meta(key: str) -> tuple[torch.nn.Module, object]:
    try:
        with torch.device("meta"):
            return build(key)
    except Exception:  # constructors that compute with tensors need real ones
        return build(key)


def look(key: str) -> dict[str, object]:
    def expired(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, expired)
    signal.alarm(SECONDS)
    try:
        model, shape = on_meta(key)
        report = pathlift.check_support(model, shape)
        kinds = Counter(problem.op for problem in report.problems)
        first = report.problems[0].reason if report.problems else ""
        return {
            "key": key,
            "outcome": "supported" if report.supported else "refused",
            "operators": report.operators,
            "problems": dict(kinds.most_common()),
            "reason": first,
        }
    except Exception as error:  # the point of this command is to find these
        return {
            "key": key,
            "outcome": "crash",
            "operators": 0,
            "problems": {},
            "reason": f"{type(error).__name__}: {error}"[:300],
        }
    finally:
        signal.alarm(0)


def page(rows: list[dict[str, object]]) -> str:
    lines = [
        "# Which models are covered",
        "",
        "Made by `make coverage`: `check_support` on every model of torchvision and timm, without weights. A refused model",
        "is listed with the operators that lie outside the theory and how often it calls them. Detection models are their",
        "backbones; the heads select boxes by score, which depends on the data.",
        "",
        "Without weights nothing is run. `python benchmarks/capture.py` gives supported models random weights, so that a",
        "capture is compared with the model itself: none is refused (all of torchvision; 130 of timm, every family).",
        "",
        f"Versions: torch {torch.__version__.split('+')[0]}, " + ", ".join(_versions()) + ".",
        "",
        "| library | group | models | supported | refused | crashed |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    groups = sorted({tuple(str(row["key"]).split("/")[:2]) for row in rows}, reverse=True)
    for library, group in groups:
        own = [row for row in rows if str(row["key"]).startswith(f"{library}/{group}/")]
        counts = Counter(row["outcome"] for row in own)
        lines.append(f"| {library} | {group} | {len(own)} | {counts['supported']} | {counts['refused']} | {counts['crash']} |")
    for library, group in groups:
        own = [row for row in rows if str(row["key"]).startswith(f"{library}/{group}/")]
        good = sorted(str(row["key"]).split("/")[2] for row in own if row["outcome"] == "supported")
        bad = [row for row in own if row["outcome"] != "supported"]
        lines += [
            "",
            f"## {library}: {group}",
            "",
            f"Supported ({len(good)}): " + ", ".join(f"`{name}`" for name in good) + ".",
        ]
        if bad:
            lines += ["", "| refused | operators outside the theory |", "| --- | --- |"]
        for row in sorted(bad, key=lambda row: str(row["key"])):
            assert isinstance(row["problems"], dict)
            kinds = ", ".join(f"{op.removeprefix('aten.')} ×{count}" for op, count in list(row["problems"].items())[:6])
            if row["outcome"] == "crash" or "export" in row["problems"]:
                kinds = str(row["reason"]).replace("|", "/").replace("\n", " ")[:220]
            lines.append(f"| `{str(row['key']).split('/')[2]}` | {kinds} |")
    return "\n".join(lines) + "\n"


def _versions() -> list[str]:
    from importlib.metadata import version

    return [f"{name} {version(name).split('+')[0]}" for name in ("torchvision", "timm")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument("--only", default="", help="only models whose key contains this text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--raw", type=Path, help="one JSON object per model: what is already there is not repeated")
    args = parser.parse_args()
    keys = [key for key in (*torchvision_names(), *timm_names()) if args.only in key]
    rows: list[dict[str, object]] = []
    if args.raw and args.raw.exists():
        rows = [json.loads(line) for line in args.raw.read_text().splitlines()]
    done = {row["key"] for row in rows}
    todo = [key for key in keys if key not in done]
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=50) as pool:
        for row in pool.imap_unordered(look, todo):
            rows.append(row)
            print(f"{len(rows)}/{len(keys)} {row['key']}: {row['outcome']}", flush=True)
            if args.raw:
                with args.raw.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    _, mark, kept = args.out.read_text().partition("\n## ONNX files\n") if args.out.is_file() else ("", "", "")
    args.out.write_text(page(rows).rstrip("\n") + "\n" + mark + kept)


if __name__ == "__main__":
    main()
