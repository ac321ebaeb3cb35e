"""Matrix products in full precision, by either library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pathlift
from pathlift.edges import product
from pathlift.precision import full_precision


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(1, 2000, 1500), (300, 700, 49), (64, 576, 144), (513, 33, 257), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products(onednn: bool, shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "ONEDNN", onednn and product.ONEDNN)
    monkeypatch.setattr(product, "LARGE", 1)
    rows, inner, columns = shape
    torch.manual_seed(0)
    first, second = torch.rand(rows, inner, dtype=dtype), torch.rand(inner, columns, dtype=dtype)
    exact = first.double() @ second.double()
    error = inner * torch.finfo(dtype).eps
    for one in (first, first.T.contiguous().T):
        for two in (second, second.T.contiguous().T):
            with torch.no_grad():
                assert torch.allclose(product.product(one, two).double(), exact, rtol=error, atol=0.0)
                turned = product.turned_product(one.T, two)
            assert turned.is_contiguous()
            assert torch.allclose(turned.double(), exact, rtol=error, atol=0.0)


def test_gradients_go_through() -> None:
    first, second = torch.rand(200, 200, requires_grad=True), torch.rand(200, 200)
    product.product(first, second).sum().backward()
    assert first.grad is not None
    torch.testing.assert_close(first.grad, second.sum(1).expand(200, 200))


class Switches(TorchDispatchMode):
    """Records what products may be rounded to while they run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        backends: Any = torch.backends
        if func in (torch.ops.aten.mm.default, torch.ops.aten.convolution.default):
            places = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
            self.seen.add(tuple(place.fp32_precision for place in places))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="switches of torch 2.9")
def test_no_product_is_rounded_whatever_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # without CUDA its switches are left alone
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = torch.rand(2, 3, 8, 8)
    smaller = {name: weight / 2 for name, weight in model.state_dict().items()}
    network = pathlift.capture(model, (3, 8, 8))
    torch.set_float32_matmul_precision("medium")
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        with Switches() as switches:
            pathlift.path_norm(network)
            pathlift.path_magnitude(network)
            pathlift.lipschitz_bound(network, smaller, x)
            with pytest.raises(pathlift.NumericalError):
                pathlift.path_norm(replace(network, state={**network.state, "0.bias": torch.full((8,), torch.nan)}))
        after = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(switches.seen) == 1
    assert set(*switches.seen) <= {"ieee", "none"}
    assert before == after == ("medium", True, True)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="switches of torch 2.9")
def test_nested_passes_put_the_switches_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    convolutions: Any = torch.backends.cudnn.conv
    before = convolutions.fp32_precision, torch.backends.cudnn.allow_tf32
    with full_precision():
        with full_precision():
            assert convolutions.fp32_precision == "ieee"
        assert convolutions.fp32_precision == "ieee"
    assert (convolutions.fp32_precision, torch.backends.cudnn.allow_tf32) == before


def test_a_batch_of_products_is_one_product_and_warns_of_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    x, weight = torch.randn(3, 40, 640), torch.randn(640, 500)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.vmap(lambda sample: product.product(sample, weight))(x), x @ weight, rtol=1e-4, atol=1e-4
        )
    assert capfd.readouterr().err == ""
