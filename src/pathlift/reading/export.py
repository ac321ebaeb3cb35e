"""From a frozen model to a graph of ATen operators without mutation, by `torch.export`.

The exporter keeps in-place operators as they were written. Where nothing else looks at the memory that such an operator
overwrites, reading it as its out-of-place form is the same; otherwise the exporter's own functionalisation, which is
slower, removes it.
"""

from __future__ import annotations

import gc
import io
import logging
import operator
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from pathlift.errors import InputError, Problem, UnsupportedModelError

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


def export_graph(view: nn.Module, examples: tuple[Tensor, ...]) -> ExportedProgram:
    """Export a frozen view without in-place operators.

    Args:
        view: What `frozen_view` returned.
        examples: One example per input, batch size 1.

    Returns:
        The exported program; every in-place operator left in it may be read as its out-of-place form.

    Raises:
        InputError: The model itself cannot run on such an input.
        UnsupportedModelError: The model runs but its graph cannot be captured.
    """
    try:
        with _quiet(), _without_collector(), torch.no_grad():
            program = torch.export.export(view, examples, strict=False)
            if _mutates_shared_memory(program.graph):
                program = program.run_decompositions({})
    except Exception as error:
        _raise_if_model_fails(view, examples, error)
        raise UnsupportedModelError((_explain(error),)) from error
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings and logs: what matters of them comes back as an error of ours."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector: tracing makes many small objects that live on, and scanning them doubles its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _raise_if_model_fails(view: nn.Module, examples: tuple[Tensor, ...], cause: Exception) -> None:
    """Tell a model that cannot run on this input from one that cannot be exported: run it on tensors without data."""
    shapes = ", ".join(str(tuple(example.shape)) for example in examples)
    try:
        with _quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            view(*(mode.from_tensor(example) for example in examples))
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        if type(error) in (RuntimeError, TypeError, ValueError, IndexError, AssertionError) and not _is_dynamic(error):
            raise InputError(
                f"The model cannot run on inputs of shape {shapes} (batch dimension first): {_first_line(error)}"
            ) from cause
    except Exception:
        return  # the exporter's own reason says more


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
    order = {node: place for place, node in enumerate(graph.nodes)}
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
    for place, argument in enumerate(schema.arguments):
        if (argument.alias_info is not None or (maybe and place == 0)) and place < len(node.args):
            value = node.args[place]
            if isinstance(value, fx.Node):
                return value
    return None


def _is_inplace(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
