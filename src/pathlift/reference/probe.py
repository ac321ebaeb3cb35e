"""From a small PyTorch model to an explicit `Dag`, by probing the operators themselves.

No operator's wiring is written down here. An affine operator's edges are found by feeding it unit vectors, in its
activations and in its parameters; the antecedents of a maximum by raising one element at a time. Only the names of the
non-linear operators are listed. Afterwards the Dag must reproduce the operator on random numbers, else it is refused.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from pathlift.errors import InputError
from pathlift.reading.freeze import frozen_view
from pathlift.reference.dag import Bias, Dag, Edge, Label, Neuron

SLOPES = {"relu", "leaky_relu", "rrelu", "abs", "threshold"}
CLAMPS = {"relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max"}
LARGEST = {"max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices"}
LARGEST |= {"max_pool3d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"}
LARGEST |= {"amax", "max", "maximum", "fmax"}
SMALLEST = {"amin", "min", "minimum", "fmin"}
MOVES = {"view", "reshape", "t", "transpose", "permute", "slice", "select", "cat", "unsqueeze", "squeeze", "expand"}
MOVES |= {"clone", "contiguous", "detach", "alias", "flatten", "numpy_T", "_unsafe_view", "narrow", "stack"}
FAR = 1e30
SCALES = (1.0, 1e-12, 1e-6, 1e4, 1e9)
"""How far from 0 an operator is asked whether it is affine, or homogeneous."""
NONE = -1
"""In place of the number of a neuron: there is none."""


def _cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Tensor:
    h = h + 0 * x[..., :1]  # a constant state is made of neurons too
    return torch.relu(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))


def _unrolled(
    x: Tensor,
    start: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """A recurrent network with ReLU, step by step."""
    assert not train or not dropout
    steps = list((x.transpose(0, 1) if batch_first else x).unbind(0))
    size, directions = 4 if has_biases else 2, 2 if bidirectional else 1
    last = []
    for layer in range(num_layers):
        runs = []
        for direction in range(directions):
            place = layer * directions + direction
            h, states = start[place], []
            for step in reversed(steps) if direction else steps:
                h = _cell(step, h, *params[place * size : (place + 1) * size])
                states.append(h)
            last.append(h)
            runs.append(states[::-1] if direction else states)
        steps = [torch.cat(pieces, -1) for pieces in zip(*runs, strict=True)]
    return torch.stack(steps, 1 if batch_first else 0), torch.stack(last)


UNROLLED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.rnn_relu.input: _unrolled,
    torch.ops.aten.rnn_relu_cell.default: _cell,
}


class _Labelled:
    """A tensor of parameters or constants: its value, and for each element which parameter it is."""

    def __init__(self, value: Any, labels: list[Label] | None = None) -> None:
        self.value = value
        self.labels = labels


def dag_of(model: nn.Module, *examples: Tensor) -> Dag:
    """Build the explicit graph of a small model.

    Args:
        model: The model; not changed.
        examples: Example inputs with batch size 1.

    Returns:
        The graph, with float64 weights. Input neurons come first, in the order of the inputs' elements.

    Raises:
        InputError: An operator is not affine where it should be.
    """
    return Probe(model, *examples).dag()


class Probe:
    """A small model, exported once; `dag` writes it out for its own weights or any others."""

    def __init__(self, model: nn.Module, *examples: Tensor) -> None:
        """Export a copy of the model.

        Args:
            model: The model; not changed.
            examples: Example inputs with batch size 1.
        """
        twin = frozen_view(model)[0].double()
        with torch.no_grad():
            program = torch.export.export(twin, tuple(example.double() for example in examples), strict=False)
            recurrent = any(node.target in UNROLLED for node in program.graph.nodes)
            if recurrent or any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions(dict(UNROLLED))
        self.program = program
        self.names = _canonical_names(twin)

    @torch.no_grad()
    def dag(self, state: Mapping[str, Tensor] | None = None) -> Dag:
        """Write the network out neuron by neuron.

        Args:
            state: Parameters and buffers to use in place of the model's own.

        Returns:
            The graph.
        """
        self.neurons: list[Neuron] = []
        self.env: dict[fx.Node, Any] = {}
        own = {name: tensor.double() for name, tensor in (state or {}).items() if tensor.dtype.is_floating_point}
        self._walk(self.program, {**self.program.state_dict, **self.program.constants, **own})
        return Dag(tuple(self.neurons), tuple(self.outputs))

    def _walk(self, program: torch.export.ExportedProgram, state: Mapping[str, Any]) -> None:
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind == InputKind.USER_INPUT:
                    self.env[node] = self._new(node.meta["val"].shape, lambda name: Neuron(name, "input"), node.name)
                    continue
                value = state[str(spec.target)]
                labels: list[Label] | None = None
                if spec.kind == InputKind.PARAMETER:
                    name = self.names[str(spec.target)]
                    labels = [(name, index) for index in range(value.numel())]
                self.env[node] = _Labelled(value, labels)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
        by_name = {node.name: node for node in program.graph.nodes}
        self.outputs: list[int] = []
        for spec in program.graph_signature.output_specs:
            if spec.kind != OutputKind.USER_OUTPUT:
                continue
            value = self.env[by_name[spec.arg.name]]
            if isinstance(value, _Labelled):
                value = self._constants(value, "output")
            if bool((value == NONE).any()):
                raise InputError("the output contains −inf.")
            self.outputs.extend(int(v) for v in value.reshape(-1))

    def _new(self, shape: Any, make: Callable[[str], Neuron], prefix: str) -> Tensor:
        count = int(torch.Size(shape).numel())
        first = len(self.neurons)
        for index in range(count):
            self.neurons.append(make(f"{prefix}[{index}]"))
        return torch.arange(first, first + count).reshape(shape)

    def _constants(self, value: _Labelled, prefix: str) -> Tensor:
        """Make neurons without edges, whose bias is a parameter or constant."""
        flat = value.value.double().reshape(-1)
        first = len(self.neurons)
        for index, number in enumerate(flat.tolist()):
            label = value.labels[index] if value.labels else None
            self.neurons.append(Neuron(f"{prefix}[{index}]", "identity", biases=(Bias(number, label),)))
        return torch.arange(first, first + flat.numel()).reshape(value.value.shape)

    # ---- one operator

    def _call(self, node: fx.Node) -> Any:
        if node.meta.get("val") is None:
            return None  # an assertion of the exporter
        args: Any = fx.node.map_arg(node.args, lambda n: self.env[n])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: self.env[n])
        if node.target is operator.getitem:
            container = args[0].value if isinstance(args[0], _Labelled) else args[0]
            piece = container[args[1]]
            return _Labelled(piece) if isinstance(args[0], _Labelled) else piece
        name = getattr(node.target, "__name__", "").split(".")[0]
        leaves = _leaves((args, kwargs))
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return self._static(node, name, args, kwargs)
        if name == "aminmax":
            dim, keepdim = kwargs.get("dim"), kwargs.get("keepdim", False)
            both = [(torch.ops.aten.amin.default, True), (torch.ops.aten.amax.default, False)]
            dims = [] if dim is None else [dim]
            return tuple(self._pool(node, _Operator(own, (args[0], dims, keepdim), {}), smallest=low) for own, low in both)
        op = _Operator(node.target, args, kwargs)
        if name == "hardsigmoid":
            line = self._affine(node, _Operator(_sixth, (args[0],), {}))
            return self._clamp(node, _Operator(torch.ops.aten.clamp.default, (line, 0.0, 1.0), {}))
        if name == "prelu":
            return self._prelu(node, args[0], args[1])
        if name in SLOPES:
            return self._slopes(node, op)
        if name in CLAMPS:
            return self._clamp(node, op)
        if name in LARGEST or name in SMALLEST:
            return self._pool(node, op, smallest=name in SMALLEST)
        if name in {"batch_norm", "_native_batch_norm_legit_no_training"}:
            normalised = self._batch_norm(node, op, args[0])
            return normalised if name == "batch_norm" else (normalised,)
        if name == "div" and isinstance(args[1], _Labelled):
            inverse = _Labelled(1.0 / torch.as_tensor(args[1].value, dtype=torch.float64), args[1].labels)
            op = _Operator(torch.ops.aten.mul.Tensor, (args[0], inverse), {})
        return self._affine(node, op)

    def _static(self, node: fx.Node, name: str, args: Any, kwargs: Any) -> _Labelled:
        value = _function(node)(*_plain(args), **_plain(kwargs))
        labelled = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, _Labelled) and leaf.labels]
        if not labelled:
            return _Labelled(value)
        if name in MOVES:
            return _Labelled(value, self._moved_labels(node, args, kwargs))
        scaled = name == "neg" or (name in {"mul", "div"} and not isinstance(args[1], _Labelled))
        if scaled:
            return _Labelled(value, labelled[0].labels)
        # A derived weight is named after the module that owns it: the module in which it is used.
        user = next(iter(node.users))
        while user.target not in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default) and user.users:
            user = next(iter(user.users))
        stack = user.meta.get("nn_module_stack") or {}
        path = [entry[0] for entry in stack.values()][-1] if stack else ""
        label = f"{path}.weight" if path else "weight"
        if isinstance(value, Tensor):
            return _Labelled(value, [(label, index) for index in range(value.numel())])
        return _Labelled(value)

    def _moved_labels(self, node: fx.Node, args: Any, kwargs: Any) -> list[Label]:
        table: list[Label] = [None]

        def numbered(leaf: Any) -> Any:
            if not isinstance(leaf, _Labelled):
                return leaf
            if not isinstance(leaf.value, Tensor) or not leaf.labels:
                return torch.zeros_like(leaf.value, dtype=torch.float64) if isinstance(leaf.value, Tensor) else leaf.value
            first = len(table)
            table.extend(leaf.labels)
            return torch.arange(first, len(table), dtype=torch.float64).reshape(leaf.value.shape)

        moved = _function(node)(*_map(args, numbered), **_map(kwargs, numbered))
        return [table[int(index)] for index in moved.reshape(-1)]

    def _slopes(self, node: fx.Node, op: _Operator) -> Tensor:
        ids = op.activations[0]
        if bool((ids == NONE).any()):
            raise InputError(f"{node.target} reads a border of −inf.")
        plus, minus = (_at_one(op, ids, sign) for sign in (1.0, -1.0))
        for far in (2.0, *SCALES):
            if max(abs(_at_one(op, ids, far) - far * plus), abs(_at_one(op, ids, -far) - far * minus)) > 1e-12 * far:
                raise InputError(f"{node.target} is not positively homogeneous.")
        gain = max(1.0, abs(plus), abs(minus))
        slopes = (plus / gain, 0.0 - minus / gain)
        flat = ids.reshape(-1).tolist()
        first = len(self.neurons)
        for index, below in enumerate(flat):
            self.neurons.append(Neuron(f"{node.name}[{index}]", "slopes", (Edge(below, gain),), slopes=slopes))
        return torch.arange(first, first + len(flat)).reshape(ids.shape)

    def _prelu(self, node: fx.Node, ids: Tensor, weight: _Labelled) -> Tensor:
        """Two neurons x⁺ and (−x)⁺ with outgoing edges 1 and −a."""
        shape = [1] * ids.dim()
        if ids.dim() > 1:
            shape[1] = -1
        else:
            shape[0] = -1
        index_of = torch.arange(weight.value.numel()).reshape(shape).expand(ids.shape).reshape(-1).tolist()
        flat, outs = ids.reshape(-1).tolist(), []
        for index, (below, which) in enumerate(zip(flat, index_of, strict=True)):
            label = weight.labels[which] if weight.labels else None
            name, first = f"{node.name}[{index}]", len(self.neurons)
            self.neurons.append(Neuron(f"{name}+", "slopes", (Edge(below, 1.0),)))
            self.neurons.append(Neuron(f"{name}-", "slopes", (Edge(below, -1.0),)))
            slope = -float(weight.value.reshape(-1)[which])
            self.neurons.append(Neuron(name, "identity", (Edge(first, 1.0), Edge(first + 1, slope, label))))
            outs.append(first + 2)
        return torch.tensor(outs).reshape(ids.shape)

    def _clamp(self, node: fx.Node, op: _Operator) -> Tensor:
        ids = op.activations[0]
        name = getattr(op.target, "__name__", "").split(".")[0]
        ends = {"relu6": (0.0, 6.0)}.get(name) or tuple(op.argument(key) for key in ("min", "min_val", "max", "max_val"))
        low, high = ends if len(ends) == 2 else (_first(ends[:2]), _first(ends[2:]))
        if name == "hardtanh":
            low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
        below, above = ([bias_of(end, ids.shape, index) for index in range(ids.numel())] for end in (low, high))
        outs = []
        for index, source in enumerate(ids.reshape(-1).tolist()):
            biases = [bias for bias in (below[index], above[index]) if bias is not None]
            lower = None if below[index] is None else 0
            upper = None if above[index] is None else len(biases) - 1
            outs.append(len(self.neurons))
            edges = (Edge(source, 1.0),)
            self.neurons.append(Neuron(f"{node.name}[{index}]", "clamp", edges, tuple(biases), low=lower, high=upper))
        return torch.tensor(outs).reshape(ids.shape)

    def _pool(self, node: fx.Node, op: _Operator, *, smallest: bool) -> Any:
        sign = -1.0 if smallest else 1.0
        rest = [torch.full(ids.shape, -sign, dtype=torch.float64) for ids in op.activations]
        constants = op.static_operands()
        hidden = op.with_statics([torch.full_like(c.value.double(), -sign) for c in constants])
        template = hidden(*rest)[0]
        edges: list[list[Edge]] = [[] for _ in range(template.numel())]
        biases: list[list[Bias]] = [[] for _ in range(template.numel())]
        for place, ids in enumerate(op.activations):
            for index, below in enumerate(ids.reshape(-1).tolist()):
                if below == NONE:
                    continue
                raised = [r.clone() for r in rest]
                raised[place].view(-1)[index] = sign
                for out in torch.nonzero(hidden(*raised)[0].reshape(-1) == sign).reshape(-1).tolist():
                    edges[out].append(Edge(below, 1.0))
        for place, constant in enumerate(constants):
            for index, number in enumerate(constant.value.double().reshape(-1).tolist()):
                raised_constants = [torch.full_like(c.value.double(), -sign) for c in constants]
                raised_constants[place].view(-1)[index] = sign
                label = constant.labels[index] if constant.labels else None
                for out in torch.nonzero(op.with_statics(raised_constants)(*rest)[0].reshape(-1) == sign).reshape(-1).tolist():
                    biases[out].append(Bias(number, label))
        first = len(self.neurons)
        for index, (incoming, own) in enumerate(zip(edges, biases, strict=True)):
            k = len(incoming) + len(own) if smallest else 1
            self.neurons.append(Neuron(f"{node.name}[{index}]", "pool", tuple(incoming), tuple(own), k=k))
        ids = torch.arange(first, first + template.numel()).reshape(template.shape)
        return (ids, None) if op.returns_tuple else ids

    def _batch_norm(self, node: fx.Node, op: _Operator, ids: Tensor) -> Tensor:
        """Identity neurons with edge weight s and bias t, named after the module's weight and bias."""
        shift = op(torch.zeros(ids.shape, dtype=torch.float64))[0]
        scale = op(torch.ones(ids.shape, dtype=torch.float64))[0] - shift
        channel = torch.arange(ids.shape[1]).reshape([1, -1] + [1] * (ids.dim() - 2)).expand(ids.shape).reshape(-1)
        weight, bias = (argument.labels if isinstance(argument, _Labelled) else None for argument in op.args[1:3])
        outs = []
        for index, below in enumerate(ids.reshape(-1).tolist()):
            c = int(channel[index])
            edge = Edge(below, float(scale.reshape(-1)[index]), weight[c] if weight else None)
            own = Bias(float(shift.reshape(-1)[index]), bias[c] if bias else None)
            outs.append(len(self.neurons))
            self.neurons.append(Neuron(f"{node.name}[{index}]", "identity", (edge,), (own,)))
        return torch.tensor(outs).reshape(ids.shape)

    def _affine(self, node: fx.Node, op: _Operator) -> Any:
        zeros = [torch.zeros(ids.shape, dtype=torch.float64) for ids in op.activations]
        labelled = op.labelled()
        blank = [torch.zeros(item.value.shape, dtype=torch.float64) for item in labelled]
        off = op.with_labelled(blank)
        base = off.flat(*zeros)
        if bool(torch.isneginf(base).any()) or any(bool((ids == NONE).any()) for ids in op.activations):
            return self._walled(node, op, base)
        edges: list[list[Edge]] = [[] for _ in range(base.numel())]
        biases: list[list[Bias]] = [[] for _ in range(base.numel())]
        for out in torch.nonzero(base).reshape(-1).tolist():
            biases[out].append(Bias(float(base[out])))
        constants = []
        for place, ids in enumerate(op.activations):
            rows = [off.flat(*_with_unit(zeros, place, index)) - base for index in range(ids.numel())]
            constants.append(torch.stack(rows))
            below = ids.reshape(-1).tolist()
            for index, out in torch.nonzero(constants[place]).tolist():
                edges[out].append(Edge(below[index], float(constants[place][index, out])))
        for which, item in enumerate(labelled):
            self._affine_in(op, which, item, blank, zeros, base, constants, edges, biases)
        first = len(self.neurons)
        for index, (incoming, own) in enumerate(zip(edges, biases, strict=True)):
            self.neurons.append(Neuron(f"{node.name}[{index}]", "identity", tuple(incoming), tuple(own)))
        self._verify(node, op, edges, biases)
        found, start = [], first
        for shape in op.shapes:
            count = int(shape.numel())
            found.append(torch.arange(start, start + count).reshape(shape))
            start += count
        return tuple(found) if op.returns_tuple else found[0]

    def _walled(self, node: fx.Node, op: _Operator, base: Tensor) -> Any:
        """Neurons moved about, among which −inf stands in some places: no neurons there, which only a maximum may read."""
        shift = 2.0  # 0 is a zero that the operator brings in, 1 is −inf
        moved = op.flat(*(ids.double() + shift for ids in op.activations))
        double = op.flat(*(2 * (ids.double() + shift) for ids in op.activations))
        there = ~torch.isneginf(base)
        if bool((base[there] != 0).any()) or not torch.equal(double[there], 2 * moved[there]):
            raise InputError(f"{node.target} reads a border of −inf, and does more than to move it.")
        found = torch.where(there & (moved != shift + NONE), moved - shift, NONE).long()
        for place in (there & (moved == 0)).nonzero().reshape(-1).tolist():
            found[place] = len(self.neurons)
            self.neurons.append(Neuron(f"{node.name}[{place}]", "identity"))
        pieces = [
            part.reshape(shape) for part, shape in zip(found.split([s.numel() for s in op.shapes]), op.shapes, strict=True)
        ]
        return tuple(pieces) if op.returns_tuple else pieces[0]

    def _affine_in(
        self,
        op: _Operator,
        which: int,
        item: _Labelled,
        blank: list[Tensor],
        zeros: list[Tensor],
        base: Tensor,
        constants: list[Tensor],
        edges: list[list[Edge]],
        biases: list[list[Bias]],
    ) -> None:
        """Find the edges and biases that carry the elements of one parameter: f(unit of x, unit of the parameter)."""
        numbers = item.value.reshape(-1).tolist()
        labels = item.labels or [None] * len(numbers)
        units = torch.eye(len(numbers), dtype=torch.float64).reshape(len(numbers), *item.value.shape)

        def run(x: list[Tensor], w: Tensor) -> Tensor:
            return op.with_labelled([*blank[:which], w, *blank[which + 1 :]]).flat(*x)

        alone = torch.vmap(lambda w: run(zeros, w))(units)
        for index, out in torch.nonzero(alone - base).tolist():
            biases[out].append(Bias(float(alone[index, out] - base[out]) * numbers[index], labels[index]))
        for place, ids in enumerate(op.activations):
            basis = torch.eye(ids.numel(), dtype=torch.float64).reshape(ids.numel(), *ids.shape)

            def at(w: Tensor, x: Tensor, place: int = place) -> Tensor:
                return run([*zeros[:place], x, *zeros[place + 1 :]], w)

            full = torch.vmap(torch.vmap(at, in_dims=(None, 0)), in_dims=(0, None))(units, basis)
            slopes = full - alone[:, None] - constants[place]
            below = ids.reshape(-1).tolist()
            for index, position, out in torch.nonzero(slopes).tolist():
                weight = float(slopes[index, position, out]) * numbers[index]
                edges[out].append(Edge(below[position], weight, labels[index]))

    def _verify(self, node: fx.Node, op: _Operator, edges: list[list[Edge]], biases: list[list[Bias]]) -> None:
        for scale in SCALES:
            self._verify_at(scale, node, op, edges, biases)

    def _verify_at(self, scale: float, node: fx.Node, op: _Operator, edges: list[list[Edge]], biases: list[list[Bias]]) -> None:
        value = scale * torch.randn(len(self.neurons), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        truth = op.flat(*(value[ids] for ids in op.activations)).tolist()  # a neuron that is read twice is one number
        for out, (incoming, own) in enumerate(zip(edges, biases, strict=True)):
            mine = sum(float(value[e.source]) * float(e.weight) for e in incoming) + sum(float(b.value) for b in own)
            if not abs(mine - truth[out]) <= 1e-9 * max(scale, abs(truth[out])) + 1e-14:
                raise InputError(f"{node.target} is not affine in its activations.")


def _at_one(op: _Operator, ids: Tensor, value: float) -> float:
    """Return what an operator that acts element by element makes of a number."""
    return float(op(torch.full(ids.shape, value, dtype=torch.float64))[0].reshape(-1)[0])


class _Operator:
    """A call as a function of its activations, with its parameters replaceable."""

    def __init__(self, target: Any, args: Any, kwargs: Any) -> None:
        self.target, self.args, self.kwargs = target, args, kwargs
        self.activations = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.replaced: dict[int, Tensor] = {}
        result = self._run([torch.zeros(ids.shape, dtype=torch.float64) for ids in self.activations])
        self.returns_tuple = isinstance(result, (tuple, list))
        self.shapes = [r.shape for r in (result if self.returns_tuple else [result])]

    def __call__(self, *x: Tensor) -> list[Tensor]:
        result = self._run(list(x))
        return list(result) if self.returns_tuple else [result]

    def flat(self, *x: Tensor) -> Tensor:
        return torch.cat([part.reshape(-1).double() for part in self(*x)])

    def labelled(self) -> list[_Labelled]:
        return [leaf for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, _Labelled) and leaf.labels]

    def static_operands(self) -> list[_Labelled]:
        leaves = [leaf for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, _Labelled)]
        return [leaf for leaf in leaves if isinstance(leaf.value, Tensor) and leaf.value.dtype.is_floating_point]

    def with_labelled(self, values: list[Tensor]) -> _Operator:
        return self._with(self.labelled(), values)

    def with_statics(self, values: list[Tensor]) -> _Operator:
        return self._with(self.static_operands(), values)

    def _with(self, items: list[_Labelled], values: list[Tensor]) -> _Operator:
        twin = copy.copy(self)
        twin.replaced = {id(item): value for item, value in zip(items, values, strict=True)}
        return twin

    def argument(self, key: str) -> Any:
        names = [argument.name for argument in self.target._schema.arguments]
        if key not in names:
            return None
        place = names.index(key)
        return self.args[place] if place < len(self.args) else self.kwargs.get(key)

    def _run(self, x: list[Tensor]) -> Any:
        queue = list(x)

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return queue.pop(0)
            if isinstance(leaf, _Labelled):
                return self.replaced.get(id(leaf), leaf.value)
            return leaf

        return self.target(*_map(self.args, fill), **_map(self.kwargs, fill))


def _sixth(x: Tensor) -> Tensor:
    return x / 6 + 0.5


def _first(values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def bias_of(end: Any, shape: torch.Size, index: int) -> Bias | None:
    """Return one end of a clamp at one neuron.

    Args:
        end: A number, or a tensor that broadcasts.
        shape: Shape of the neurons.
        index: Which neuron.

    Returns:
        The bias, None for no end.
    """
    value = end.value if isinstance(end, _Labelled) else end
    if value is None:
        return None
    tensor = torch.as_tensor(value, dtype=torch.float64)
    number = float(tensor.expand(shape).reshape(-1)[index])
    if abs(number) == float("inf"):
        return None
    places = torch.arange(tensor.numel()).reshape(tensor.shape).expand(shape).reshape(-1)
    return Bias(number, end.labels[int(places[index])] if isinstance(end, _Labelled) and end.labels else None)


def _function(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _with_unit(zeros: list[Tensor], place: int, index: int) -> list[Tensor]:
    unit = torch.zeros_like(zeros[place])
    unit.view(-1)[index] = 1.0
    return [*zeros[:place], unit, *zeros[place + 1 :]]


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return (
            type(value)(_map(item, function) for item in value)
            if type(value) in (list, tuple)
            else tuple(_map(item, function) for item in value)
        )
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return function(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _map(value, found.append)
    return found


def _plain(value: Any) -> Any:
    return _map(value, lambda leaf: leaf.value if isinstance(leaf, _Labelled) else leaf)


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Shared parameters go by their first name."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
