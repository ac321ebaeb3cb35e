"""The file for `pathlift study` with every classifier of torchvision and timm that docs/coverage.md lists as supported.

    $ python benchmarks/zoo.py > zoo.yaml
    $ pathlift study zoo.yaml --out zoo

Small models come first, inputs are 64×64 where the model takes any size: `docs/study.md` has what came out.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from coverage import on_meta

COVERAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
FIXED = ("inception_v3",)
"""Models of torchvision that need larger inputs."""


def supported(library: str) -> list[str]:
    section = COVERAGE.read_text().partition(f"## {library}: classification\n")[2]
    listed = re.search(r"^Supported \(\d+\): (.*)$", section, re.MULTILINE)
    assert listed is not None
    return re.findall(r"`([^`]+)`", listed[1])


def main() -> None:
    warnings.simplefilter("ignore")
    entries = []
    for library in ("torchvision", "timm"):
        for name in supported(library):
            model, _ = on_meta(f"{library}/classification/{name}")
            cost = sum(1 for _ in model.modules()) + sum(parameter.numel() for parameter in model.parameters()) / 2e5
            fixed = name in FIXED or bool(getattr(model, "default_cfg", {}).get("fixed_input_size"))
            shape = "" if fixed else ", shape: [3, 64, 64]"
            entries.append((cost, f'  - {{model: "{library}:{name}"{shape}}}'))
    print("functions: [path_norm]\nmodels:")
    print("\n".join(line for _, line in sorted(entries)))


if __name__ == "__main__":
    main()
