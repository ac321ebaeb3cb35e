"""2:4: of each four consecutive weights along the inputs the two of smaller score go, and runtimes find them in files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.errors import InputError
from pathlift.pruning import NofM, to_semi_structured


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3))


def blocks(weight: Tensor) -> Tensor:
    """The weights of each output in fours along its inputs, tap by tap."""
    return weight.movedim(1, -1).reshape(-1, 4)


def test_two_of_four_along_the_inputs_are_those_of_larger_score() -> None:
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    for model, shape in ((layers(), (64,)), (convolutions, (8, 3, 3))):
        pruned, report = pathlift.prune(model, shape, criterion="magnitude", selection="2:4")
        assert isinstance(pruned, nn.Module)
        cut = 0
        for name, mask in report.masks.items():
            weight = model.get_parameter(name).detach()
            if weight.shape[1] % 4:
                assert bool(mask.all()) and not NofM(2, 4).holds(weight)
                continue
            cut += 1
            kept, size = blocks(mask), blocks(weight).abs()
            assert bool((kept.sum(1) == 2).all())
            assert bool((size.where(kept, torch.inf).amin(1) >= size.where(~kept, 0.0).amax(1)).all())
            assert NofM(2, 4).holds(pruned.get_parameter(name)) and not NofM(2, 4).holds(weight)
        assert cut == 2


def test_the_pattern_is_that_of_blocks_and_not_of_their_number() -> None:
    law = NofM(2, 4)
    assert law.holds(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    assert not law.holds(torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    assert not law.holds(torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
    assert not law.holds(torch.zeros(4, 6)), "six inputs are no blocks of four"
    assert law.holds(torch.stack([torch.eye(4), torch.zeros(4, 4)], -1)), "taps of a kernel lie beside each other"


def test_without_an_accelerator_it_is_said_what_is_missing() -> None:
    model = layers()
    with pytest.raises(InputError, match="selection='2:4'"):
        to_semi_structured(model)
    pruned, _ = pathlift.prune(model, (64,), criterion="magnitude", selection="2:4")
    with pytest.raises(InputError, match="CUDA"):
        to_semi_structured(pruned)
    assert type(pruned[0].weight) is nn.Parameter


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured tensors are on CUDA alone")
def test_linear_layers_become_semi_structured_and_give_the_same() -> None:
    pruned, _ = pathlift.prune(layers(), (64,), criterion="magnitude", selection="2:4")
    model = pruned.cuda().half()
    sparse, names = to_semi_structured(model)
    assert names == ("0.weight",) and type(model[0].weight) is nn.Parameter
    x = torch.randn(32, 64, device="cuda", dtype=torch.half)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-2, atol=1e-2)


def test_onnx_files_have_the_pattern_as_plain_weights(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    made = torch.Generator().manual_seed(0)
    for transposed in (0, 1):
        weight = torch.randn((3, 8) if transposed else (8, 3), generator=made)
        info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 8), ("y", 3))]
        node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=transposed)
        graph = helper.make_graph([node], "g", info[:1], info[1:], [numpy_helper.from_array(weight.numpy(), "w")])
        path = tmp_path / f"model{transposed}.onnx"
        program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        path.write_bytes(program.SerializeToString())
        pruned, _ = pathlift.prune(pathlift.load_model(str(path)), (8,), criterion="magnitude", selection="2:4")
        pathlift.save(pruned, tmp_path / f"pruned{transposed}.onnx")
        stored = onnx.load(tmp_path / f"pruned{transposed}.onnx").graph.initializer
        written = torch.tensor(numpy_helper.to_array(next(tensor for tensor in stored if tensor.name == "w")))
        assert NofM(2, 4).holds(written if transposed else written.T)
        assert int((written != 0).sum()) == 12
