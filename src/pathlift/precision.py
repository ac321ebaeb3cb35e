"""What a call computes does not depend on what stands around it: regions of the caller, and products in fewer digits.

PyTorch may round the factors of a float32 product to TF32 or bfloat16: on CUDA for convolutions by default, elsewhere when
`torch.set_float32_matmul_precision` or `torch.backends` say so. That is three digits, too few for a bound. A region of autocast
rounds the same way; one of inference mode makes tensors that no later call could differentiate; and a default device puts new
tensors beside the network.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.forks import in_child


def _switches() -> list[tuple[Any, str, tuple[str | bool, ...]]]:
    """Return every switch that lets a float32 product be rounded: where it is, its name, and the values that do not."""
    backends: Any = torch.backends
    with_cuda = torch.cuda.is_initialized()  # as long as it is not, no tensor is there
    if hasattr(backends.mkldnn, "matmul"):  # since torch 2.9
        holders = [backends.mkldnn.conv, backends.mkldnn.matmul]
        holders += [backends.cudnn.conv, backends.cuda.matmul] if with_cuda else []
        return [(holder, "fp32_precision", ("ieee", "none")) for holder in holders]
    convolution = [(backends.cudnn, "allow_tf32", (False,))] if with_cuda else []
    return [*convolution, (_MATMUL, "precision", ("highest",))]


class _Matmul:
    """The one switch for matrix products of earlier versions, on any device."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


_MATMUL = _Matmul()


class _Guard:
    """Which passes are under way, and how the switches that they had to turn were before.

    The switches belong to the process. One that is right is not touched, and one that somebody else turned meanwhile is left.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside: list[object] = []
        self.closed = False
        self.before: list[tuple[Any, str, Any]] = []

    def enter(self, who: object) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.closed)
            self.inside.append(who)
            wrong = self._wrong()
            self.before += [(holder, name, value) for holder, name, value, _ in wrong]
            for holder, name, _, exact in wrong:
                setattr(holder, name, exact)

    def _wrong(self) -> list[tuple[Any, str, Any, str | bool]]:
        switches = [(holder, name, getattr(holder, name), exact) for holder, name, exact in _switches()]
        return [(holder, name, value, exact[0]) for holder, name, value, exact in switches if value not in exact]

    def leave(self, who: object) -> None:
        with self.changed:
            if who in self.inside:
                self.inside.remove(who)
            while self.before and not self.inside:
                holder, name, value = self.before[-1]
                if any(known is holder and getattr(holder, key) == exact[0] for known, key, exact in _switches()):
                    setattr(holder, name, value)
                self.before.pop()
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.inside and not self.closed)
            self.closed = True

    def open(self) -> None:
        with self.changed:
            self.closed = False
            self.changed.notify_all()


_GUARD = _Guard()


@in_child
def _afresh() -> None:
    _GUARD.changed = threading.Condition()
    _GUARD.inside, _GUARD.closed = [], False
    _GUARD.leave(None)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 numbers in float32 inside; the switches are put back when the last thread leaves."""
    who = object()
    try:
        _GUARD.enter(who)
        with without_autocast():
            yield
    finally:
        _GUARD.leave(who)


@contextmanager
def switches_as_they_were() -> Iterator[None]:
    """Wait until no pass is under way, and let none begin: PyTorch's tracer cannot stand the switches as passes need them.

    While it traces it turns others itself, for all threads, that change the last digits of a pass.
    """
    _GUARD.close()
    try:
        yield
    finally:
        _GUARD.open()


def factor_units(device: str) -> tuple[float, float]:
    """Tell how far the factors of float32 convolutions and matrix products are rounded, as the switches stand outside a pass.

    Args:
        device: Type of the device.

    Returns:
        A relative error for convolutions and one for matrix products; 0 where factors are used as they are.
    """
    backends: Any = torch.backends
    before = {(id(holder), name): value for holder, name, value in _GUARD.before} if _GUARD.inside else {}
    if hasattr(backends.mkldnn, "matmul"):
        holders = (
            (backends.mkldnn.conv, backends.mkldnn.matmul) if device == "cpu" else (backends.cudnn.conv, backends.cuda.matmul)
        )
        modes = [before.get((id(holder), "fp32_precision"), holder.fp32_precision) for holder in holders]
    else:
        conv = "tf32" if device != "cpu" and backends.cudnn.allow_tf32 else "ieee"
        modes = [conv, {"highest": "ieee", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]]
    first, second = ({"tf32": 2.0**-10, "bf16": 2.0**-8}.get(mode, 0.0) for mode in modes)
    return first, second


def without_autocast() -> ExitStack:
    """Return a region in which PyTorch casts nothing by itself, whatever region the call stands in."""
    stack = ExitStack()
    for kind in ("cpu", "cuda", "mps", "xpu"):
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


_outside: ContextVar[torch.device | None] = ContextVar("_outside", default=None)


def default_device() -> torch.device:
    """Return the default device of the caller, whom `plainly` does not follow: a model's forward pass may need it."""
    return _outside.get() or torch.get_default_device()


@contextmanager
def plainly() -> Iterator[None]:
    """Compute as if the caller stood in no region: of autocast, inference mode or a default device.

    Inside inference mode no gradient is recorded, as there; results are plain tensors all the same.

    Raises:
        InputError: A mode makes other tensors than PyTorch's plain ones, which have values.
    """
    with without_autocast() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        device = torch.get_default_device()
        if device.type != "cpu":
            before = _outside.set(default_device())
            stack.callback(_outside.reset, before)
            stack.enter_context(torch.device("cpu"))
        made = type(torch.empty(0))
        if made is not Tensor:
            raise InputError(
                f"A mode around this call makes every tensor a {made.__name__}, which has no values to compute with. Call it "
                "outside of that mode, and of what is traced or compiled."
            )
        yield


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Write numbers into a tensor of the caller's, who may have made it in inference mode.

    Args:
        tensor: Where.
        values: What, of the same shape.
    """
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.copy_(values)


def recordable(value: Any) -> Any:
    """Return an argument with plain tensors in the place of those that were made in inference mode: no gradient passes these.

    Args:
        value: A tensor, or a list or tuple of tensors; all else is returned as it is.

    Returns:
        The same values.
    """
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in {list, tuple} and any(isinstance(item, Tensor) and item.is_inference() for item in value):
        return type(value)(map(recordable, value))
    return value
