"""Models back into files: programs (``.onnx``, ``.pt2``), and state-dicts under the model's own names.

What was read from an ``.onnx`` file goes back as the same graph with other weights; any other module is exported by PyTorch, in
evaluation mode. A program that was written is read again and run, and must give the outputs of the model.
"""

from __future__ import annotations

import io
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from pathlift.arguments import declare, public
from pathlift.arguments.kinds import file, flag, plain_tensor
from pathlift.errors import InputError, NumericalError, one_line
from pathlift.graph.network import Network
from pathlift.output import MODELS, Writer, check_outputs, tensor_writer, write_outputs
from pathlift.precision import full_precision, switches_as_they_were
from pathlift.reading import Inputs, verify
from pathlift.reading.examples import Examples, examples_of
from pathlift.reading.export import sources_forgotten
from pathlift.reading.freeze import check_modules, cloned, run_copy
from pathlift.reading.live import LiveState
from pathlift.reading.quiet import quiet
from pathlift.reading.second import named_tensors
from pathlift.reading.turns import in_turn
from pathlift.rescaling.states import state_of
from pathlift.storage.onnx import OnnxModule
from pathlift.storage.onnx.program import array_of, declared_inputs
from pathlift.storage.onnx.trial import CannotRunError, coarsest, declared_shapes, disagreement, has_runtime, run_file
from pathlift.storage.onnx.write import program_with
from pathlift.storage.packages import package

LOG = logging.getLogger("pathlift")

declare(__name__, {"save.path": file, "overwrite": flag})

LARGEST = (1 << 31) - 1
"""Bytes of an ONNX file that is one message."""

SEED = 20250
"""Of the inputs on which outputs are compared."""


@public
def save(model: nn.Module | Network, path: Path | str, inputs: Inputs | None = None, *, overwrite: bool = False) -> None:
    """Write a model to a file, all or nothing.

    A model that was read from an ``.onnx`` file goes back into one as the same graph: names, metadata and version of the
    standard are kept, only the weights are others. Any other model is exported by PyTorch as it is in evaluation mode, for any
    number of samples where PyTorch can. What was written is run (an ``.onnx`` file where onnxruntime is installed) on random
    inputs, and has to give the outputs of the model.

    Args:
        model: A module, or a captured `Network`: the model that it was captured from, with the weights that the network has
            now. Not changed.
        path: Where, by its ending: ``.onnx``, ``.pt2`` (for `torch.export.load`), or, for a state-dict under the model's own
            names, ``.safetensors`` or ``.pt``.
        inputs: As for `capture`; a Network knows them, and state-dicts and models from ``.onnx`` files need none.
        overwrite: Replace a file that exists.

    Raises:
        InputError: The file cannot be written or exists already, an extra is missing, or PyTorch cannot export the model.
        MismatchError: The model that a Network was captured from is another one now.
        NumericalError: What was written gives other outputs than the model; nothing is left of it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(nn.Linear(2, 3), f"{folder}/model.pt")
        ...     sorted(torch.load(f"{folder}/model.pt"))
        ['bias', 'weight']
    """
    path = Path(path)
    check_outputs({"The file": path}, suffixes=MODELS, replace=overwrite)
    check_extra(model, path)
    write_outputs({path: model_writer(model, path.suffix, inputs)}, replace=overwrite)


def model_writer(model: nn.Module | Network, suffix: str, inputs: Inputs | None = None) -> Writer:
    """Return what writes a model; all that can be refused without a file is refused now.

    Args:
        model: See `save`.
        suffix: How the name of the file ends.
        inputs: See `save`.

    Returns:
        The writer. It raises a `NumericalError` when what it wrote gives other outputs than the model.

    Raises:
        InputError: See `save`.
    """
    if suffix in {".safetensors", ".pt"}:
        state = _state_dict(model)
        return tensor_writer(_tensors(state)) if suffix == ".safetensors" else _pickled(state)
    if suffix == ".onnx":
        return onnx_file(model, inputs).writer()
    module = _module_of(model)
    return _export(module, _needed_examples(model, module, inputs), suffix).writer()


def onnx_file(model: nn.Module | Network, inputs: Inputs | None = None, opset: int | None = None) -> Program:
    """Make an ONNX file of a model, for `save` and for those that go on with it.

    Args:
        model: See `save`.
        inputs: See `save`.
        opset: Version of the standard for what PyTorch exports; None: its own choice.

    Returns:
        The file.

    Raises:
        InputError: See `save`.
    """
    module = _module_of(model)
    if isinstance(module, OnnxModule):
        return _same_graph(module, _examples(model, module, inputs))
    return _export(module, _needed_examples(model, module, inputs), ".onnx", opset)


def check_extra(model: nn.Module | Network, path: Path | None) -> None:
    """Refuse to write an ``.onnx`` file without the packages that write it, before anything is computed.

    Args:
        model: See `save`.
        path: Where, or None.

    Raises:
        MissingPackageError: One is missing.
    """
    if path is not None and path.suffix == ".onnx":
        package("onnx", "onnx")
        origin = model.origin if isinstance(model, Network) else None
        if not isinstance(origin.root if isinstance(origin, LiveState) else model, OnnxModule):
            package("onnxscript", "onnx")


# ---- state-dicts


def _state_dict(model: nn.Module | Network) -> Mapping[str, Any]:
    if isinstance(model, nn.Module):
        state = model.state_dict()
    elif _has_model(model):
        state = _module(model).state_dict()
    else:  # it came from another process, or its weights lie on disk
        state = state_of(model)
    _check_plain({name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)})
    on_cpu = OrderedDict((name, value.cpu() if isinstance(value, Tensor) else value) for name, value in state.items())
    vars(on_cpu)["_metadata"] = getattr(state, "_metadata", {})  # versions, which some modules ask for
    return on_cpu


def _check_plain(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no arrays of numbers, or have no values."""
    for name, tensor in tensors.items():
        plain_tensor(f"'{name}'", tensor)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    other = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise InputError(f"'{other}' of the state-dict is no tensor, and .safetensors holds nothing else: write it to .pt.")
    return dict(state)


def _pickled(state: Mapping[str, Any]) -> Writer:
    content = io.BytesIO()  # PyTorch does not survive a disk that is full
    torch.save(state, content)
    return lambda path: path.write_bytes(content.getbuffer())


# ---- the model of a network


def _module_of(model: nn.Module | Network) -> nn.Module:
    """Return a module that can be exported."""
    module = _module(model) if isinstance(model, Network) else model
    check_modules(module)
    _check_plain(named_tensors(module))
    return module


def _has_model(network: Network) -> bool:
    origin = network.origin
    return isinstance(origin, LiveState) and origin.device.type != "meta"


def _module(network: Network) -> nn.Module:
    """Return a copy of the model that a network was captured from, with the weights of the network."""
    if not _has_model(network):
        lost = "is not known in a copy or another process" if network.origin is None else "has no values"
        raise InputError(
            f"The model that the network was captured from {lost}: give the model itself with its weights. The weights alone "
            "can be written to .safetensors or .pt."
        )
    origin = network.origin
    assert isinstance(origin, LiveState)
    captured = replace(network, state=origin)
    verify(captured)
    made = cloned(origin.root)
    held = named_tensors(made)
    for name, tensor in captured.named(network.state).items():
        if held[name].dtype == tensor.dtype:
            with torch.no_grad():
                held[name].copy_(tensor)
        else:
            held[name].data = tensor.detach().to(held[name].device, copy=True)
    return made


def _needed_examples(model: nn.Module | Network, module: nn.Module, inputs: Inputs | None) -> Examples:
    examples = _examples(model, module, inputs)
    if examples is None:
        raise InputError("inputs is missing: PyTorch exports a model by running it. Give an input shape, or a Network.")
    return examples


def _examples(model: nn.Module | Network, module: nn.Module, inputs: Inputs | None) -> Examples | None:
    """Return examples of the inputs; None where they are not known."""
    if isinstance(model, Network):
        tensors = tuple(torch.zeros(shape, dtype=dtype, device=model.device) for shape, dtype in model.graph.examples)
        return Examples(tensors, model.graph.form)
    if inputs is None and isinstance(module, OnnxModule):
        inputs = _declared(module)
    return None if inputs is None else examples_of(module, inputs)


def _declared(module: OnnxModule) -> tuple[tuple[int, ...], ...] | None:
    """Return the shapes that a file declares for its inputs; None if it leaves some open."""
    shapes = declared_shapes(module, 1)
    return tuple(shape[1:] for shape in shapes) if shapes is not None and all(shapes) else None


# ---- programs


@dataclass(frozen=True)
class _Trial:
    """A model and random inputs, to compare a file with.

    Attributes:
        model: The model.
        inputs: Its inputs.
    """

    model: nn.Module
    inputs: Examples

    def check(self, outputs: Sequence[Tensor | None], kind: str) -> None:
        """Refuse outputs of a file that are not those of the model.

        Args:
            outputs: What the file gives, None for what is no tensor.
            kind: How its name ends.

        Raises:
            NumericalError: They differ by more than rounding explains.
        """
        with full_precision():
            right = _run(cloned(self.model), self.inputs)
            unit = coarsest(tensor.dtype for tensor in (*named_tensors(self.model).values(), *self.inputs.tensors, *right))
            moved = _run(*self._moved(unit))
        different = disagreement(right, outputs, moved, unit)
        if different is not None:
            raise NumericalError(
                f"The {kind} file that was written gives other outputs than the model, off by {different[1]:.2g} of the "
                "largest; nothing of it is left."
            )

    def _moved(self, unit: float) -> tuple[nn.Module, Examples]:
        """Return the model and its inputs with every number moved by a unit of rounding or so."""
        draws = torch.Generator().manual_seed(SEED)

        def near(tensor: Tensor) -> Tensor:
            factors = 1 + unit * torch.randn(tensor.shape, generator=draws)
            return (tensor * factors.to(tensor.device)).to(tensor.dtype) if tensor.is_floating_point() else tensor

        made = cloned(self.model)
        with torch.no_grad():
            for tensor in named_tensors(made).values():
                tensor.copy_(near(tensor))
        return made, replace(self.inputs, tensors=tuple(map(near, self.inputs.tensors)))


def _trial(module: nn.Module, examples: Examples, sizes: Sequence[int]) -> _Trial:
    """Draw inputs.

    Args:
        module: The model, in evaluation mode.
        examples: Inputs of batch size 1.
        sizes: Number of samples of each.

    Returns:
        The model and the inputs.
    """
    draws = torch.Generator().manual_seed(SEED)
    tensors = tuple(
        torch.randn((size, *example.shape[1:]), generator=draws).to(example)
        for size, example in zip(sizes, examples.tensors, strict=True)
    )
    return _Trial(module, replace(examples, tensors=tensors))


def _run(model: nn.Module, inputs: Examples) -> list[Tensor]:
    """Run a model; return the tensors that it returns."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        returned = inputs.run(model)
    return [tensor.detach().cpu() for tensor in pytree.tree_leaves(returned) if isinstance(tensor, Tensor)]


def _evaluating(module: nn.Module) -> nn.Module:
    """Return a copy with memory of its own, in evaluation mode; no method of the user's is called."""
    made = cloned(module)
    for child in made.modules():
        vars(child)["training"] = False
    return made


@dataclass(frozen=True)
class Program:
    """A file that is to be written.

    Attributes:
        suffix: How its name ends.
        content: Its bytes.
        names: Names of parameters and buffers to those of the tensors in its graph, where they are others.
        trial: What to compare it with; None where no inputs are known.
        exported: PyTorch has made it: it must run. One that was read goes back as it came, whatever runs it.
    """

    suffix: str
    content: bytes
    names: Mapping[str, str]
    trial: _Trial | None
    exported: bool

    def writer(self) -> Writer:
        """Return what writes it. It raises a `NumericalError` when what it wrote gives other outputs than the model."""

        def write(path: Path) -> None:
            path.write_bytes(self.content)
            if self.trial is None:
                return
            if self.suffix == ".onnx":
                _compare_with_runtime(path, self.trial, exported=self.exported)
            else:
                inputs = self.trial.inputs
                outputs = in_turn(lambda: _outputs_of_program(path, inputs), inputs.tensors[0].device)
                self.trial.check(outputs, self.suffix)

        return write


def _same_graph(module: OnnxModule, examples: Examples | None) -> Program:
    """Make the program of a file with the weights that its module has now."""
    if not module.onnx_source:
        raise InputError("The network ends within the graph of its file (until=): capture all of it to write it to .onnx.")
    content = _message(program_with(module))
    names = {".".join(path): name for part in module.program.all() for name, path in part.tensors.items()}
    if examples is None:
        return Program(".onnx", content, names, None, exported=False)
    sizes = [(declared.shape or (None,))[0] or module.samples or 2 for declared in module.inputs]
    return Program(".onnx", content, names, _trial(_evaluating(module), examples, sizes), exported=False)


def _message(program: Any) -> bytes:
    """Return the bytes of a ``ModelProto``."""
    size = program.ByteSize()
    if size > LARGEST:
        raise InputError(f"The model takes {size:,} bytes, more than one ONNX file holds: write it to .pt2 or .safetensors.")
    content: bytes = program.SerializeToString()
    return content


def _export(module: nn.Module, examples: Examples, suffix: str, opset: int | None = None) -> Program:
    """Make what PyTorch exports."""
    made = _evaluating(module)
    device = examples.tensors[0].device
    try:
        run_copy(made, examples)
    except Exception as error:  # the user's code
        shapes = ", ".join(str(tuple(example.shape)) for example in examples.tensors)
        raise InputError(
            f"The model cannot run on inputs of shape {shapes} (batch dimension first): {_reason(error)}"
        ) from error

    def exported() -> tuple[bytes, int]:
        with sources_forgotten(), quiet("torch"), torch.random.fork_rng(devices=[]), torch.no_grad():
            program, batch = _program(made, examples)
            try:
                return _onnx(program, opset) if suffix == ".onnx" else _pt2(program), batch
            except InputError:
                raise
            except Exception as error:  # PyTorch's exporter raises errors of any kind
                raise InputError(f"PyTorch cannot write the model to {suffix}: {_reason(error)}") from error

    content, batch = in_turn(exported, device)
    if batch == 1:
        LOG.info("PyTorch exports this model for one sample at a time only.")
    return Program(suffix, content, {}, _trial(made, examples, [batch] * len(examples.tensors)), exported=True)


def _program(module: nn.Module, examples: Examples) -> tuple[ExportedProgram, int]:
    """Export a model for any number of samples, or for one where PyTorch cannot; and how many it was exported with."""
    failure: Exception | None = None
    for batch in (2, 1):
        tensors = [example.new_zeros((batch, *example.shape[1:])) for example in examples.tensors]
        given = examples.form.filled(tensors)
        args, keywords = ((), given) if isinstance(given, dict) else (given, {})
        shapes = torch.export.ShapesCollection() if batch > 1 else None
        for tensor in tensors if shapes is not None else ():
            shapes[tensor] = {0: torch.export.Dim("batch")}  # type: ignore[index]
        try:
            with switches_as_they_were():
                return torch.export.export(module, args, keywords, dynamic_shapes=shapes, strict=False), batch
        except Exception as error:  # PyTorch's exporter raises errors of any kind
            failure = error
    assert failure is not None
    raise InputError(f"PyTorch cannot export the model: {_reason(failure)}") from failure


def _reason(error: Exception) -> str:
    return one_line(error)[:300]


def _onnx(program: ExportedProgram, opset: int | None) -> bytes:
    """Return an ONNX file of an exported program; nothing is folded, so that weights keep their names."""
    written = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False, opset_version=opset)
    assert written is not None
    return _message(written.model_proto)


def _pt2(program: ExportedProgram) -> bytes:
    content = io.BytesIO()  # PyTorch does not survive a disk that is full
    torch.export.save(program, content)
    return content.getvalue()


def _outputs_of_program(path: Path, inputs: Examples) -> list[Tensor]:
    with sources_forgotten(), quiet("torch"):
        return _run(torch.export.load(path).module(), inputs)


def _compare_with_runtime(path: Path, trial: _Trial, *, exported: bool) -> None:
    """Compare an ONNX file with the model where onnxruntime is installed; by onnx's own evaluator where that cannot run it."""
    if not has_runtime():
        return
    declared = declared_inputs(package("onnx", "onnx").load(str(path)).graph)
    tensors = (tensor.cpu() for tensor in trial.inputs.tensors)
    given = {value.name: array_of(tensor, value.dtype) for value, tensor in zip(declared, tensors, strict=True)}
    try:
        outputs = run_file(path, given, slow=True)
    except CannotRunError as error:
        reason = _reason(error).replace(f"{path} ", "")
        if exported:
            raise NumericalError(f"The .onnx file that was written cannot be run: {reason}") from error
        LOG.info("What was written is not compared with the model: %s", reason)  # nor could what was read be run
        return
    trial.check(outputs, ".onnx")


__all__ = ["model_writer", "save"]
