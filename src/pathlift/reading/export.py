"""From a frozen model to a graph of ATen operators without mutation, by `torch.export`.

The exporter keeps in-place operators as they were written. Where nothing else looks at the memory that such an operator
overwrites, reading it as its out-of-place form is the same; otherwise the exporter's own functionalisation, which is
slower, removes it.
"""

from __future__ import annotations

import linecache
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from pathlift.errors import InputError, Problem, UnsupportedModelError
from pathlift.precision import switches_as_they_were
from pathlift.reading.examples import Examples
from pathlift.reading.quiet import quiet

_MAY_ALIAS = ("dropout", "feature_dropout", "alpha_dropout", "type_as", "atleast_1d", "atleast_2d", "atleast_3d")
"""Operators that can return their argument itself although their schema does not say so."""

_PLAIN_WORDS = (
    (
        r"data-dependent|GuardOnDataDependent|Could not guard|\.item\(\)|_local_scalar_dense|nonzero|DynamicOutputShape",
        "Its control flow or a tensor shape depends on the values of the data.",
        "Rewrite that branch so that it does not look at activations (torch.where on constants, fixed shapes).",
    ),
    (
        r"autograd\.Function|torch\.jit|ScriptMethod|script",
        "It calls compiled or custom code that the exporter cannot look into.",
        "Use the plain PyTorch form of that function.",
    ),
)


READERS: Mapping[Any, Callable[[Any], Any]] = {
    Tensor.item: lambda array: array.item(),
    Tensor.tolist: lambda array: array.tolist(),
    Tensor.numpy: lambda array: array.copy(),
    Tensor.__array__: lambda array: array.copy(),
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.__complex__: complex,
    Tensor.__index__: operator.index,
}
"""Methods that take the numbers of a tensor into Python, and what they give for an array."""


@dataclass(frozen=True)
class Exported:
    """A traced model.

    Attributes:
        program: The graph; every in-place operator left in it may be read as its out-of-place form.
        baked: Names of buffers whose numbers the model took into Python: they are part of the graph.
    """

    program: ExportedProgram
    baked: frozenset[str]


class _TraceMode(TorchFunctionMode):
    """What a trace has to know of the attributes and methods that leave no operator in a graph.

    ``.data`` is read as ``.detach()``. The numbers of a buffer are handed to Python as they are, once it has turned out that
    the trace cannot do without (``bake``).
    """

    def __init__(self, view: nn.Module, *, bake: bool) -> None:
        super().__init__()
        self.view = view
        self.bake = bake
        self.buffers = dict(view.named_buffers())
        self.arrays = {name: _array(tensor) for name, tensor in self.buffers.items() if not tensor.is_meta} if bake else {}
        self.baked: set[str] = set()
        self.asked = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a call, or let it be."""
        del types
        if function == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if function in READERS:
            name = next((buffer for buffer, tensor in self.view.named_buffers() if tensor is args[0]), None)
            self.asked = self.asked or name is not None
            if name in self.arrays:
                self.baked.add(name)
                return READERS[function](self.arrays[name])
        return function(*args, **(kwargs or {}))


def _array(tensor: Tensor) -> Any:
    """Return the numbers of a tensor as an array of NumPy's."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def export_graph(view: nn.Module, examples: Examples, runs: Callable[[], None]) -> Exported:
    """Export a frozen view without in-place operators.

    Args:
        view: What `frozen_view` returned.
        examples: One example per input, batch size 1.
        runs: Runs the model itself on such an input; called only when it cannot be exported, to tell the reason.

    Returns:
        The exported program.

    Raises:
        InputError: The model itself cannot run on such an input.
        UnsupportedModelError: The model runs but its graph cannot be captured.
        KeyboardInterrupt: As it came, also when the exporter wrapped it.
    """
    mode = _TraceMode(view, bake=False)
    try:
        try:
            exported = _exported(view, examples, mode)
            if not (mode.asked and _chooses_sizes(exported.program.graph)):
                return exported
        except Exception:
            if not mode.asked:
                raise
        return _exported(view, examples, _TraceMode(view, bake=True))
    except Exception as error:
        if _interrupted(error):
            raise KeyboardInterrupt from error
        raise_if_model_fails(examples, error, runs, examples.unlike(view))
        raise UnsupportedModelError((_explain(error),)) from error


def _exported(view: nn.Module, examples: Examples, mode: _TraceMode) -> Exported:
    given = examples.form.filled(examples.tensors)
    args, keywords = ((), given) if isinstance(given, dict) else (given, {})
    with switches_as_they_were(), quiet("torch"), torch.no_grad(), mode:
        program = torch.export.export(view, args, keywords, strict=False)
    with switches_as_they_were(), quiet("torch"), torch.no_grad():
        _inline_regions(program.graph_module)
        if _mutates_shared_memory(program.graph):
            program = program.run_decompositions({})
    return Exported(program, frozenset(mode.baked))


@contextmanager
def sources_forgotten() -> Iterator[None]:
    """Forget the sources of the graphs that are made inside: PyTorch keeps each for the lines of a traceback, for ever."""
    kept: dict[str, str] = fx.graph_module._loader.eval_cache
    known = set(kept)
    try:
        yield
    finally:
        for name in kept.keys() - known:
            kept.pop(name, None)
            linecache.cache.pop(name, None)


REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Calls of a part of the graph under another gradient mode or in autocast, and the place of that part among their arguments."""


def _inline_regions(module: fx.GraphModule) -> None:
    """Put the operators of regions of another gradient mode, or of autocast, in their places: the function is the same."""
    inlined = False
    while regions := [node for node in module.graph.nodes if getattr(node.target, "__name__", "") in REGIONS]:
        for node in regions:
            _inline(module, node, REGIONS[node.target.__name__])
        inlined = True
    if inlined:
        module.graph.eliminate_dead_code()
        module.recompile()


def _inline(module: fx.GraphModule, call: fx.Node, index: int) -> None:
    holder = call.args[index]
    assert isinstance(holder, fx.Node)
    inner = module.get_submodule(str(holder.target))
    assert isinstance(inner, fx.GraphModule)
    given = iter(call.args[index + 1 :])
    known: dict[fx.Node, Any] = {}
    result: Any = ()
    with module.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], known.__getitem__)
            else:
                known[node] = module.graph.node_copy(node, known.__getitem__)
                if node.op == "get_attr":
                    known[node].target = f"{holder.target}.{node.target}"
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(result[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(call)


def _chooses_sizes(graph: fx.Graph) -> bool:
    """Whether a number that a tensor holds became a size or a condition."""
    return any(isinstance(node.meta.get("val"), (int, torch.SymInt, torch.SymBool)) for node in graph.nodes)


def _interrupted(error: BaseException | None) -> bool:
    """Whether the exporter wrapped a Ctrl-C into an error of its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


FEWER = "Give all inputs as the model takes them, in a tuple or a dictionary; in a list of batches, each is one: [(a, b)]"
"""What to do when a call has too few arguments."""


def raise_if_model_fails(examples: Examples, cause: Exception, runs: Callable[[], None], unlike: str) -> None:
    """Tell a model that cannot run on this input from one that cannot be exported: run it.

    Args:
        examples: The input.
        cause: What has been raised.
        runs: Runs a copy of the model.
        unlike: What is to be said of the input beside the model.

    Raises:
        InputError: The model cannot.
    """
    shapes = ", ".join(str(tuple(example.shape)) for example in examples.tensors)
    try:
        with quiet("torch"):
            runs()
    except Exception as error:
        if not _is_dynamic(error):  # on the meta device no model can look at its data
            few = FEWER if "required positional argument" in str(error) else ""
            words = f"The model cannot run on inputs of shape {shapes} (batch dimension first): {_first_line(error)}"
            raise InputError(". ".join(part.rstrip(".") for part in (words, few, unlike) if part) + ".") from cause


def _is_dynamic(error: Exception) -> bool:
    return re.search(_PLAIN_WORDS[0][0], f"{type(error).__name__} {error}") is not None


def _explain(error: Exception) -> Problem:
    text = f"{type(error).__name__}: {error}"
    for pattern, reason, advice in _PLAIN_WORDS:
        if re.search(pattern, text):
            return Problem("", "export", "", f"{reason} The exporter says: {_first_line(error)}", advice)
    return Problem(
        "",
        "export",
        "",
        f"The exporter cannot capture its graph: {type(error).__name__}: {_first_line(error)}",
        "Make the model pass torch.export.export(model, example, strict=False) first.",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _mutates_shared_memory(graph: fx.Graph) -> bool:
    """Whether an in-place operator writes to memory that is read later under another name.

    Args:
        graph: Graph of ATen operators as the exporter traced it.

    Returns:
        False when every in-place operator may be read as its out-of-place form.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    root: dict[fx.Node, fx.Node] = {}
    members: dict[fx.Node, list[fx.Node]] = {}
    writes: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        target = _aliased_argument(node)
        base = root[target] if target is not None else node
        root[node] = base
        members.setdefault(base, []).append(node)
        if target is not None and _is_inplace(node):
            writes.append((node, target))
    for node, target in writes:
        base = root[node]
        if base.op == "placeholder":
            return True
        if target is not base and any(not _is_inplace(alias) for alias in _chain(target, base)):
            return True  # writes through a view: the base changes too
        for alias in members[base]:
            if order[alias] < order[node] and any(order[user] > order[node] for user in alias.users):
                return True
    return False


def _chain(node: fx.Node, base: fx.Node) -> Iterator[fx.Node]:
    """Walk from an alias down to the node that owns the memory, without it."""
    while node is not base:
        yield node
        below = _aliased_argument(node)
        if below is None:
            return
        node = below


def _aliased_argument(node: fx.Node) -> fx.Node | None:
    """Return the argument whose memory the node's result may share."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    shares = any(result.alias_info is not None for result in schema.returns)
    maybe = getattr(node.target, "__name__", "").split(".")[0] in _MAY_ALIAS
    if not shares and not maybe:
        return None
    for index, argument in enumerate(schema.arguments):
        if (argument.alias_info is not None or (maybe and index == 0)) and index < len(node.args):
            value = node.args[index]
            if isinstance(value, fx.Node):
                return value
    return None


def _is_inplace(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
