"""Our path-norm against the authors' own code (agonon/pathnorm-pytorch), which is not part of this project.

Fetch their `pathnorm.py` yourself and run `python benchmarks/authors.py --pathnorm PATH/TO/pathnorm.py`. Both compute the
ℓ¹ path-norm of torchvision models with random weights and random batch-norm statistics, in float64, on one image.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import types
from pathlib import Path

import torch
import torchvision
from torch import nn

import pathlift

MODELS = (
    *("alexnet", "densenet121", "googlenet", "inception_v3", "mnasnet1_0", "mobilenet_v2", "regnet_x_400mf", "resnet18"),
    *("resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "vgg11"),
    *("vgg16", "vgg19_bn", "wide_resnet50_2"),
)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval().double()


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("pathnorm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["pathnorm"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pathnorm", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=MODELS)
    args = parser.parse_args()
    theirs = load(args.pathnorm)
    print("| model | pathlift, log10 | authors, log10 | relative difference | time, authors / pathlift |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in args.models:
        shape = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
        model = build(name)
        network = pathlift.capture(model, shape)
        pathlift.path_norm(network)
        start = time.perf_counter()
        mine = pathlift.path_norm(network)
        middle = time.perf_counter()
        try:
            value = float(theirs.compute_path_norm(model, input_shape=shape))
        except Exception as error:  # their refusals are part of the table
            print(f"| {name} | {mine.log10:.9f} | refused: {type(error).__name__} | | |", flush=True)
            continue
        end = time.perf_counter()
        reference = torch.tensor(value, dtype=torch.float64)
        difference = abs(mine.value - value) / value
        speed = (end - middle) / (middle - start)
        print(f"| {name} | {mine.log10:.9f} | {float(reference.log10()):.9f} | {difference:.1e} | {speed:.1f} |", flush=True)


if __name__ == "__main__":
    main()
