"""A program of ONNX with layers of PyTorch in it, so that channels can be followed and cut; and the smaller program.

Torch-Pruning knows layers. Each node that reads its weights as one of them does (Conv, ConvTranspose, Gemm, MatMul,
BatchNormalization, PRelu, an Add or Mul of one number per channel) becomes that layer in a copy of the module; weights that
are shared, or come in another way, stay what they are and hold their channels. What was cut goes back to the tensors of the
file; a flattening to a size that is written down then takes what there is, and a depthwise convolution has fewer groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from pathlift.errors import InputError
from pathlift.reading.examples import Examples
from pathlift.storage.onnx.module import OnnxModule, Operator
from pathlift.storage.onnx.names import Path
from pathlift.storage.onnx.operators import OPERATORS
from pathlift.storage.onnx.program import Node
from pathlift.storage.onnx.write import smaller_source

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Step:
    """What makes a layer of PyTorch a node: it computes what the node does, with the tensors of the layer."""

    compute: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        return self.compute(x)


@dataclass(frozen=True)
class Layer:
    """A node as a layer.

    Attributes:
        node: The node.
        module: The layer.
        value: Name of the activation that it reads.
        tensors: Name of a tensor of the layer to that of the file.
        transposed: Whether its weight is the transpose of that of the file.
    """

    node: Node
    module: nn.Module
    value: str
    tensors: Mapping[str, str]
    transposed: bool = False

    def tensor(self, key: str, module: nn.Module) -> Tensor:
        """Return a tensor of a module like this layer, as the file has it."""
        tensor: Tensor = getattr(module, key).detach()
        return tensor.T if key == "weight" and self.transposed else tensor


class _Reader:
    """Finds the layers of a program."""

    def __init__(self, module: OnnxModule, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take the module and the shapes of its activations."""
        self.program, self.shapes = module.program, shapes
        self.state = module.state_dict()
        nodes = [node for part in self.program.all() for node in part.nodes]
        self.uses = Counter(name for node in nodes for name in node.inputs)
        self.uses.update(name for part in self.program.all() for name in part.outputs)
        self.made = {name: node for node in self.program.nodes for name in node.outputs if name}

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor that nothing else reads."""
        path = self.program.tensors.get(name)
        return self.state[".".join(path)] if path is not None and self.uses[name] == 1 else None

    def source(self, name: str) -> tuple[str, bool]:
        """Follow a weight through Identity and Transpose to its tensor; say whether it was transposed."""
        node, turned = self.made.get(name), False
        while node is not None and node.kind in {"Identity", "Transpose"} and self.uses[name] == 1:
            if node.kind == "Transpose" and tuple(node.get("perm", (1, 0))) != (1, 0):
                break
            turned ^= node.kind == "Transpose"
            name = node.inputs[0]
            node = self.made.get(name)
        return name, turned

    def layer(self, node: Node) -> Layer | None:
        """Return a node as a layer; None where it is none."""
        if len(node.outputs) != 1:
            return None
        if node.kind in {"Conv", "ConvTranspose"}:
            return self._convolution(node)
        if node.kind in {"Gemm", "MatMul"}:
            return self._linear(node)
        if node.kind == "BatchNormalization":
            return self._batch_norm(node)
        if node.kind in {"PRelu", "Add", "Mul"}:
            return self._by_channel(node)
        return None

    def _convolution(self, node: Node) -> Layer | None:
        x, name, *rest = node.inputs
        weight, bias = self.tensor(name), self.tensor(rest[0]) if rest and rest[0] else None
        if weight is None or (rest and rest[0] and bias is None) or not 3 <= weight.dim() <= 5:
            return None
        kinds, groups = (CONV if node.kind == "Conv" else CONV_TRANSPOSE)[weight.dim() - 3], node.get("group", 1)
        first, second = weight.shape[0], weight.shape[1] * groups
        sizes = (second, first) if node.kind == "Conv" else (first, second)
        made: Any = _layer(kinds, *sizes, tuple(weight.shape[2:]), groups=groups, bias=bias is not None)
        made.compute = lambda x: OPERATORS[node.kind](node, x, made.weight, made.bias)
        names = {"weight": name} | ({"bias": rest[0]} if bias is not None else {})
        return self._filled(Layer(node, made, x, names))

    def _linear(self, node: Node) -> Layer | None:
        x, given, *rest = node.inputs
        name, turned = self.source(given)
        weight, bias = self.tensor(name), self.tensor(rest[0]) if rest and rest[0] else None
        plain = node.get("alpha", 1.0) == node.get("beta", 1.0) == 1.0 and not node.get("transA", 0)
        if weight is None or weight.dim() != 2 or not plain or name == x:
            return None
        transposed = bool(node.get("transB", 0)) == turned
        rows, columns = weight.shape[::-1] if transposed else weight.shape
        if rest and rest[0] and (bias is None or tuple(bias.shape) != (rows,)):
            return None
        made: Any = _layer(nn.Linear, columns, rows, bias=bias is not None)
        made.compute = lambda x: F.linear(x, made.weight, made.bias)
        names = {"weight": name} | ({"bias": rest[0]} if bias is not None else {})
        return self._filled(Layer(node, made, x, names, transposed))

    def _batch_norm(self, node: Node) -> Layer | None:
        x, *names = node.inputs
        tensors = [self.tensor(name) for name in names]
        sizes = [tensor.numel() for tensor in tensors if tensor is not None]
        if len(sizes) < len(tensors):
            return None
        made: Any = _layer(nn.BatchNorm1d, sizes[0], eps=node.get("epsilon", 1e-5))
        made.compute = lambda x: _normed(made, x)
        keys = ("weight", "bias", "running_mean", "running_var")
        return self._filled(Layer(node, made, x, dict(zip(keys, names, strict=True))))

    def _by_channel(self, node: Node) -> Layer | None:
        """Return a PRelu, or a sum or product with one number per channel: a batch norm without statistics."""
        x, name = node.inputs if node.inputs[1] in self.program.tensors else node.inputs[::-1]
        tensor, shape = self.tensor(name), self.shapes.get(x)
        if tensor is None or shape is None or (node.kind == "PRelu" and x != node.inputs[0]):
            return None
        sizes = (*(1,) * (len(shape) - tensor.dim()), *tensor.shape)
        if len(shape) < 2 or len(sizes) != len(shape) or tensor.numel() != sizes[1] or sizes[1] != shape[1] or sizes[1] == 1:
            return None
        if node.kind == "PRelu":
            made: Any = _layer(nn.PReLU, sizes[1])
            made.compute = lambda x: F.prelu(x, made.weight)
        else:
            made = _layer(nn.BatchNorm1d, sizes[1], eps=0.0)
            made.compute = lambda x: _normed(made, x)
        return self._filled(Layer(node, made, x, {"bias" if node.kind == "Add" else "weight": name}))

    def _filled(self, layer: Layer) -> Layer:
        """Put the tensors of the file into a layer."""
        with torch.no_grad():
            for key, name in layer.tensors.items():
                tensor = self.tensor(name)
                assert tensor is not None
                layer.module.to(tensor)
                stored = layer.tensor(key, layer.module)
                stored.copy_(tensor.reshape(stored.shape))
        return layer


def _layer(kind: type[nn.Module], *sizes: Any, **options: Any) -> nn.Module:
    """Make a layer that is a node."""
    made: nn.Module = type(kind.__name__, (_Step, kind, Operator), {})(*sizes, **options)
    return made.eval()


def _normed(layer: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)


class Layered:
    """A program with layers in it.

    Attributes:
        model: A copy of the module in which they stand.
        weights: Path of a layer to the name of its weight in the module, and whether that is the transpose of the layer's.
    """

    def __init__(self, module: OnnxModule, examples: Examples) -> None:
        """Find the layers.

        Args:
            module: What was read; not changed.
            examples: Its inputs.

        Raises:
            InputError: A node has the name of a tensor.
        """
        self._module = module
        program, state = module.program, module.state_dict()
        shapes, self._flattenings = _observed(module, examples)
        reader = _Reader(module, shapes)
        self._layers = {layer.node.path: layer for node in program.nodes if (layer := reader.layer(node)) is not None}
        nodes = tuple(
            replace(node, inputs=(self._layers[node.path].value,)) if node.path in self._layers else node
            for node in program.nodes
        )
        rest = replace(program, nodes=nodes).ending_at(program.outputs)
        paths = [path for part in rest.all() for path in part.tensors.values()]
        self.model = OnnxModule(
            rest, module.inputs, module.nodes, _tensors(module, {path: state[".".join(path)] for path in paths})
        )
        self.model.samples = module.samples
        for path, layer in self._layers.items():
            _put(self.model, path, layer.module)
        self.weights = {
            ".".join(path): (".".join(program.tensors[layer.tensors["weight"]]), layer.transposed)
            for path, layer in self._layers.items()
            if "weight" in layer.tensors
        }

    def smaller(self) -> OnnxModule:
        """Return the program with the tensors that its layers have now."""
        module, program, state = self._module, self._module.program, self._module.state_dict()
        tensors = {path: state[".".join(path)] for part in program.all() for path in part.tensors.values()}
        groups: dict[str, int] = {}
        for layer in self._layers.values():
            for key, name in layer.tensors.items():
                path = program.tensors[name]
                old, new = tensors[path], layer.tensor(key, layer.module)
                if new.numel() != old.numel():
                    shape = new.shape if new.dim() == old.dim() else [size if size == 1 else -1 for size in old.shape]
                    tensors[path] = new.reshape(shape).to(old)
            if isinstance(layer.module, _ConvNd) and layer.node.get("group", 1) > 1:
                groups[layer.node.outputs[0]] = layer.module.groups
        nodes = tuple(_smaller_node(node, self._flattenings, groups) for node in program.nodes)
        rest = replace(program, nodes=nodes).ending_at(program.outputs)
        smaller = OnnxModule(rest, module.inputs, module.nodes, _tensors(module, tensors))
        smaller.samples, smaller.held = module.samples, module.held
        if module.onnx_source:
            smaller.onnx_source = smaller_source(module.onnx_source, self._flattenings, groups)
        return smaller.train(module.training)


def _smaller_node(node: Node, flattenings: Collection[str], groups: Mapping[str, int]) -> Node:
    """Return a node without the numbers of channels that it writes down."""
    if node.outputs[0] in flattenings:
        return replace(node, kind="Flatten", inputs=node.inputs[:1], settings={"axis": 1})
    if node.outputs[0] in groups:
        return replace(node, settings={**node.settings, "group": groups[node.outputs[0]]})
    return node


def _tensors(module: OnnxModule, values: Mapping[Path, Tensor]) -> dict[Path, Tensor]:
    """Copy tensors; those that are parameters of a module become parameters."""
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    tensors: dict[Path, Tensor] = {}
    for path, value in values.items():
        wanted, copy = trainable.get(".".join(path)), value.detach().clone(memory_format=torch.contiguous_format)
        tensors[path] = copy if wanted is None else nn.Parameter(copy, requires_grad=wanted)
    return tensors


def _put(model: nn.Module, path: Path, layer: nn.Module) -> None:
    """Put a layer into the place of a node, with all that stands below that."""
    parent = model.get_submodule(".".join(path[:-1]))
    before = parent.get_submodule(path[-1])
    names = [*before._modules, *before._parameters, *before._buffers]
    taken = next((name for name in names if hasattr(layer, name)), None)
    if taken is not None:
        raise InputError(f"Below the node '{'.'.join(path)}' of the file stands '{taken}', as a tensor of the layer is called.")
    layer._modules.update(before._modules)
    layer._parameters.update(before._parameters)
    layer._buffers.update(before._buffers)
    parent._modules[path[-1]] = layer


def _observed(module: OnnxModule, examples: Examples) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Run a module; return the shapes of its activations, and what a Reshape makes that is a Flatten of a size written down."""
    shapes: dict[str, tuple[int, ...]] = {}
    flattenings: set[str] = set()

    def note(operator: nn.Module, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        assert isinstance(operator, Operator)
        assert operator.node is not None
        node = operator.node
        for name, value in (*zip(node.inputs, inputs, strict=False), *zip(node.outputs, results, strict=False)):
            if isinstance(value, Tensor):
                shapes[name] = tuple(value.shape)
        if node.kind == "Reshape" and isinstance(inputs[0], Tensor) and isinstance(inputs[1], np.ndarray):
            x, sizes, result = inputs[0], inputs[1], results[0]
            if x.dim() >= 2 and len(sizes) == 2 and sizes[1] > 0 and result.shape[0] == x.shape[0]:
                flattenings.add(node.outputs[0])

    hooks = [child.register_forward_hook(note) for child in module.modules() if isinstance(child, Operator) and child.node]
    try:
        with torch.no_grad():
            examples.run(module)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes, flattenings
