"""Channels that go for good: the smaller network is the masked one, in its outputs and in its path-norm."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.errors import InputError, PathliftError
from pathlift.experiments.networks import resnet
from pathlift.pruning import apply_masks, shrink
from pathlift.storage.onnx import OnnxModule
from plain import run

pytest.importorskip("torch_pruning")

SHAPE = (2, 8, 8)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor values that nothing was zero in before, statistics and shifts of batch norms among them."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype.is_floating_point:
                spread = torch.randn(tensor.shape, generator=made) * 0.4
                tensor.copy_(spread.abs() + 0.5 if name.endswith("running_var") else spread)
    return model.eval()


class Joined(nn.Module):
    """Pieces laid side by side, each read at its own place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x).relu()
        joined = self.norm(torch.cat([first, self.second(first)], 1)).relu()
        return self.head(joined.mean((2, 3)))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.PReLU(6),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 6, 2, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)
    )


def residual() -> nn.Module:
    return resnet(2, 3, width=4, blocks=(1, 1), stem_stride=1)


MODELS = [plain, depthwise, transposed, residual, Joined]


def unread(model: nn.Module, reads: str, channels: list[int], span: int = 1) -> nn.Module:
    """Set the weights to 0 that read some channels."""
    weight = model.get_parameter(reads)
    columns = [channel * span + index for channel in channels for index in range(span)]
    with torch.no_grad():
        weight[:, columns] = 0
    return model


def same(one: nn.Module, other: nn.Module, shape: tuple[int, ...] = SHAPE) -> float:
    """Two networks give the same on random inputs, and have the same path-norm, whose logarithm is returned."""
    x = torch.randn(4, *shape)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), one.eval()(x), rtol=1e-4, atol=1e-5)
    norms = [pathlift.path_norm(model, shape).log10 for model in (one, other)]
    assert norms[0] == pytest.approx(norms[1], abs=1e-5)
    return norms[1]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("amount", [0.3, 0.6])
def test_pruning_with_shrink_gives_the_masked_network_in_fewer_weights(make: Callable[[], nn.Module], amount: float) -> None:
    model = randomised(make())
    before = copy.deepcopy(model.state_dict())
    smaller, report = pathlift.prune(model, SHAPE, amount, "path_magnitude", selection="channels", shrink=True)
    assert same(apply_masks(model, report.masks), smaller) == pytest.approx(report.log10_path_norm_left, abs=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    shrunk = report.shrunk
    assert shrunk is not None and 0 < report.sparsity <= amount
    assert shrunk.parameters == sum(weight.numel() for weight in smaller.parameters()) < shrunk.parameters_before
    assert shrunk.multiply_adds < shrunk.multiply_adds_before and shrunk.bytes < shrunk.bytes_before
    # every weight that was masked lay in a channel that went, and nothing else of the weights in scope went
    kept = sum(weight.numel() for name, weight in smaller.named_parameters() if name in report.masks)
    assert kept == sum(int(mask.sum()) for mask in report.masks.values())


@pytest.mark.hunt
def test_rounds_score_what_the_rounds_before_left_and_what_is_gone_stays_gone() -> None:
    model = randomised(residual())
    smaller, report = pathlift.prune(
        model, SHAPE, 0.5, "path_magnitude", selection="channels", shrink=True, steps=3, scope="!*.fc*"
    )
    same(apply_masks(model, report.masks), smaller)
    assert 0.2 < report.sparsity <= 0.5


@pytest.mark.one_in(4)
@pytest.mark.parametrize("seed", range(4))
def test_random_networks_and_random_scores(seed: int) -> None:
    model = randomised(MODELS[seed](), seed)
    amount = float(torch.rand((), generator=torch.Generator().manual_seed(seed))) * 0.8
    smaller, report = pathlift.prune(model, SHAPE, amount, "random", selection="channels", shrink=True, generator=seed)
    same(apply_masks(model, report.masks), smaller)
    assert report.sparsity <= amount


def test_channels_that_nothing_reads_go_and_what_only_they_read_goes_with_them() -> None:
    model = unread(randomised(plain()), "3.weight", [1, 4])
    smaller, report = shrink(model, SHAPE)
    assert smaller[0].out_channels == 6 and smaller[1].num_features == 6 and smaller[3].in_channels == 6
    assert [(layer.name, layer.before, layer.after) for layer in report.layers] == [("0", 8, 6)]
    same(model, smaller)
    chain = randomised(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)))
    unread(chain, "4.weight", [0, 1, 2])
    with torch.no_grad():
        chain[2].weight[3, 2:] = 0
    smaller, _ = shrink(chain, (3,))
    assert (smaller[0].out_features, smaller[2].out_features) == (2, 1)
    same(chain, smaller, (3,))


def test_channels_that_are_zero_go_whatever_reads_them() -> None:
    model = randomised(plain())
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 0
        model[1].weight[2] = model[1].bias[2] = 0
        model[7].weight[5] = model[7].bias[5] = 0
    smaller, _ = shrink(model, SHAPE)
    assert smaller[0].out_channels == 7 and smaller[7].out_features == 6
    same(model, smaller)


def test_a_channel_that_puts_out_a_constant_stays_and_is_named() -> None:
    model = randomised(plain())
    with torch.no_grad():
        model[0].weight[2] = 0
    smaller, report = shrink(model, SHAPE)
    assert smaller[0].out_channels == 8
    assert [(left.name, left.channels) for left in report.left] == [("0", (2,))] and "constant" in report.left[0].reason
    same(model, smaller)


def test_channels_of_a_residual_stream_go_only_together() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head((x + self.inner(x)).relu())

    model = unread(randomised(Stream()), "head.weight", [1, 2])
    unread(model, "inner.weight", [2, 3])
    with torch.no_grad():
        model.stem.weight[4] = model.stem.bias[4] = 0
        model.inner.weight[0] = model.inner.bias[0] = 0
    smaller, report = shrink(model, (3,))
    assert [(layer.name, layer.before, layer.after) for layer in report.layers] == [("stem", 5, 4), ("inner", 5, 4)]
    assert {(left.name, left.channels, left.reason) for left in report.left} == {
        ("stem", (4,), "tied to channels that 'inner' makes"), ("inner", (0,), "tied to channels that 'stem' makes")
    }  # fmt: skip
    same(model, smaller, (3,))


@pytest.mark.hunt
def test_channels_tied_to_a_grouped_convolution_stay_with_a_reason() -> None:
    model = randomised(nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(),
        nn.Conv2d(5, 3, 1),
    ))  # fmt: skip
    unread(model, "6.weight", [1])
    with torch.no_grad():
        model[0].weight[3] = model[0].bias[3] = 0
    smaller, report = shrink(model, SHAPE)
    assert (smaller[0].out_channels, smaller[2].out_channels, smaller[4].out_channels) == (4, 6, 4)
    assert ("0", (3,)) in [(left.name, left.channels) for left in report.left] and "groups" in report.left[0].reason
    same(model, smaller)
    smaller, report = pathlift.prune(model, SHAPE, 0.5, "magnitude", selection="channels", shrink=True)
    assert (smaller[0].out_channels, smaller[2].out_channels) == (4, 6) and smaller[4].out_channels < 5
    same(apply_masks(model, report.masks), smaller)


def test_outputs_stay_and_a_layer_keeps_a_channel() -> None:
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)))
    with torch.no_grad():
        model[2].weight.zero_()
    smaller, _ = shrink(model, (3,))
    assert smaller[0].out_features == 1 and smaller[2].out_features == 5
    same(model, smaller, (3,))


def test_tiny_weights_count_as_what_they_are() -> None:
    """What underflows in a product of path activations is no zero."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e30], [1e-30]]))
        model[2].weight.copy_(torch.tensor([[1e-30, 1e-30]]))
    assert shrink(model, (1,))[0][0].out_features == 2


def test_modes_trainable_and_data_are_those_of_the_model() -> None:
    model = randomised(plain()).train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    x = torch.randn(3, *SHAPE)
    tensors = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
    smaller, _ = pathlift.prune(model, x[:1], 0.3, "magnitude", selection="channels", shrink=True)
    assert model.training and not model[1].training and smaller.training and not smaller[1].training
    assert [weight.requires_grad for weight in smaller.parameters()] == [weight.requires_grad for weight in model.parameters()]
    assert all(
        id(weight) == tensors[name][0] and torch.equal(weight, tensors[name][1]) for name, weight in model.named_parameters()
    )
    assert not {weight.data_ptr() for weight in smaller.parameters()} & {weight.data_ptr() for weight in model.parameters()}
    smaller(x).sum().backward()


@pytest.mark.hunt
def test_what_cannot_be_shrunk_is_refused_with_a_reason() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu().mean((2, 3)).view(-1, 4))

    model = unread(randomised(Fixed()), "second.weight", [1])
    with pytest.raises(InputError, match="number of channels"):
        shrink(model, SHAPE)
    network = pathlift.capture(plain().eval(), SHAPE)
    with pytest.raises(InputError, match="Network"):
        pathlift.prune(network, amount=0.5, selection="channels", shrink=True)
    with pytest.raises(InputError, match="channels"):
        pathlift.prune(plain(), SHAPE, 0.5, selection="global", shrink=True)
    with pytest.raises(InputError, match="channels"):
        pathlift.prune(plain(), SHAPE, 0.5, shrink=True)
    with pytest.raises(PathliftError):
        shrink(nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 1)), (2,))
    with pytest.raises(InputError, match="no channel"):
        pathlift.prune(plain(), SHAPE, 0.5, selection="channels", shrink=True, scope="0.weight")
    with pytest.raises(InputError, match="no channel that can go: Torch-Pruning removes channels of modules"):
        pathlift.prune(OneModule(), (4,), 0.5, selection="channels", shrink=True)


class OneModule(nn.Module):
    """Layers that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.relu(nn.functional.linear(x, self.first)), self.second)


def test_tensors_that_two_layers_share_stay() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    model[2].weight = model[0].weight
    unread(model, "4.weight", [0, 1])
    smaller, _ = shrink(model, (4,))
    assert smaller[0].weight is smaller[2].weight and smaller[2].weight.shape == (4, 4)
    same(model, smaller, (4,))


def exported(model: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE) -> OnnxModule:
    """Export a model and read it back."""
    pytest.importorskip("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (torch.randn(1, *shape),), str(path), dynamo=False, do_constant_folding=False,
            input_names=["x"], dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
    read = pathlift.load_model(str(path))
    assert isinstance(read, OnnxModule)
    return read


@pytest.mark.hunt
@pytest.mark.parametrize("make", MODELS)
def test_a_model_read_from_onnx_loses_channels_as_the_module_does(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    read = exported(randomised(make()), tmp_path / "m.onnx")
    before = {name: tensor.clone() for name, tensor in read.state_dict().items()}
    smaller, report = pathlift.prune(read, SHAPE, 0.5, selection="channels", shrink=True)
    assert report.shrunk is not None
    assert report.shrunk.channels_removed > 0 and report.shrunk.parameters < report.shrunk.parameters_before
    assert report.shrunk.multiply_adds < report.shrunk.multiply_adds_before
    same(apply_masks(read, report.masks), smaller)
    assert smaller.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in read.state_dict().items())
    pathlift.save(smaller, tmp_path / "small.onnx")
    again = pathlift.load_model(str(tmp_path / "small.onnx"))
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in smaller.state_dict().items()
    }
    same(smaller, again)
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "m.onnx").stat().st_size


HABITS = (
    "Gemm",
    "Gemm transB",
    "MatMul",
    "Transpose",
    "written sizes",
    "computed sizes",
    "listed as inputs",
    "two readers",
    "branches",
)


@pytest.mark.hunt
@pytest.mark.parametrize("habit", HABITS)
def test_channels_go_whatever_the_habits_of_an_exporter(habit: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, arrays = onnx.helper, onnx.numpy_helper
    draws = torch.Generator().manual_seed(3)
    shapes = {
        "c": (5, 2, 1, 1), "s": (5,), "t": (5,), "mean": (5,), "var": (5,), "d": (5, 1, 3, 3), "plus": (5, 1, 1),
        "slope": (5, 1, 1), "w1": (20, 6), "b1": (6,), "w2": (6, 3), "b2": (1, 3),
    }  # fmt: skip
    held = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    held["var"] = held["var"].abs() + 0.5
    held["c"][1], held["t"][1], held["plus"][1] = 0, 0, 0
    held["mean"][1] = 0
    held["w1"].view(5, 4, 6)[3] = 0
    held["w2"][2] = 0
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "c"], ["h1"], name="conv"), node("BatchNormalization", ["h1", "s", "t", "mean", "var"], ["h2"]),
        node("Relu", ["h2"], ["h3"]), node("Conv", ["h3", "d"], ["h4"], group=5, name="depthwise"),
        node("Add", ["plus", "h4"], ["h5"]), node("PRelu", ["h5", "slope"], ["h6"]), node("Reshape", ["h6", "sizes"], ["f"]),
    ]  # fmt: skip
    turned = []
    if habit == "MatMul":
        nodes += [node("MatMul", ["f", "w1"], ["m1"], name="first"), node("Add", ["m1", "b1"], ["m2"])]
    elif habit == "Gemm transB":
        nodes.append(node("Gemm", ["f", "w1", "b1"], ["m2"], transB=1, name="first"))
        turned = ["w1"]
    elif habit == "Transpose":
        nodes += [node("Transpose", ["w1"], ["w1t"]), node("Gemm", ["f", "w1t", "b1"], ["m2"], name="first")]
        turned = ["w1"]
    else:
        nodes.append(node("Gemm", ["f", "w1", "b1"], ["m2"], name="first"))
    nodes += [node("Relu", ["m2"], ["m3"]), node("MatMul", ["m3", "w2"], ["m4"], name="last"), node("Add", ["m4", "b2"], ["y"])]
    stored = {name: (tensor.T if name in turned else tensor).contiguous().numpy() for name, tensor in held.items()}
    tensors = [arrays.from_array(array, name) for name, array in stored.items()]
    sizes = [-1, 20] if habit == "written sizes" else [0, -1]
    if habit == "computed sizes":
        nodes[:0] = [
            node("Constant", [], ["row"], value_ints=[20]), node("Shape", ["x"], ["n"], end=1),
            node("Concat", ["n", "row"], ["sizes"], axis=0),
        ]  # fmt: skip
    else:
        nodes.insert(0, node("Constant", [], ["sizes"], value_ints=sizes))
    flattening = next(own for own in nodes if own.op_type == "Reshape")
    flattening.attribute.extend([helper.make_attribute("allowzero", 1)] if habit == "written sizes" else [])
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in
            (("x", ["n", 2, 4, 4]), ("y", ["n", 3]), ("h4", ["n", 5, 2, 2]))]  # fmt: skip
    inputs = info[:1]
    if habit == "listed as inputs":
        listed = ((name, onnx.TensorProto.FLOAT, array.shape) for name, array in stored.items())
        inputs = [*inputs, *(helper.make_tensor_value_info(*one) for one in listed)]
    if habit == "two readers":
        nodes.append(node("Relu", ["m3"], ["unused"]))
    if habit == "branches":
        value = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)
        branch = helper.make_graph([node("Relu", ["m2"], ["z"])], "then", [], [value])
        other = helper.make_graph([node("Neg", ["m2"], ["z"])], "else", [], [value])
        place = next(index for index, one in enumerate(nodes) if "m3" in one.output)
        nodes[place] = node("If", ["yes"], ["m3"], then_branch=branch, else_branch=other)
        tensors.append(arrays.from_array(torch.tensor(True).numpy(), "yes"))
    graph = helper.make_graph(nodes, "g", inputs, info[1:2], tensors, value_info=info[2:])
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(program, tmp_path / "m.onnx")
    read, shape = pathlift.load_model(str(tmp_path / "m.onnx")), (2, 4, 4)
    smaller, report = shrink(read, shape)
    assert {layer.name: (layer.before, layer.after) for layer in report.layers} == {
        "conv": (5, 3), "depthwise": (5, 3), "first": (6, 5)}  # fmt: skip
    same(read, smaller, shape)
    assert not read.get_parameter("c")[1].any()
    pathlift.save(smaller, tmp_path / "small.onnx")
    same(read, pathlift.load_model(str(tmp_path / "small.onnx")), shape)
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)


@pytest.mark.hunt
def test_the_command_shrinks_a_program_of_onnx(tmp_path: Path) -> None:
    read = exported(randomised(plain()), tmp_path / "m.onnx")
    small = tmp_path / "small.onnx"
    done = run("shrink", str(tmp_path / "m.onnx"), "--shape", "2,8,8", "--amount", "0.4", "--out", str(small), "--json")
    assert done.code == 0, done
    smaller, report = pathlift.prune(read, SHAPE, 0.4, selection="channels", shrink=True)
    assert report.shrunk is not None
    assert json.loads(done.stdout)["parameters"] == report.shrunk.parameters < report.shrunk.parameters_before
    x = torch.randn(3, *SHAPE)
    session = pytest.importorskip("onnxruntime").InferenceSession(small, providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), smaller(x).detach())


def test_sizes_that_are_written_into_a_program_of_onnx_refuse_it(tmp_path: Path) -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.second(x.view(-1, 2, 2, 8, 8).transpose(1, 2).reshape(-1, 4, 8, 8)).mean((2, 3))

    read = exported(unread(randomised(Shuffled()), "second.weight", [1]), tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"number of channels|cannot cut|cannot follow"):
        shrink(read, SHAPE)


def test_a_weight_that_two_nodes_read_keeps_its_channels(tmp_path: Path) -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    model[2].weight = model[0].weight
    unread(model, "4.weight", [0, 1])
    read = exported(model, tmp_path / "m.onnx", (4,))
    smaller, report = shrink(read, (4,))
    assert not report.layers
    same(read, smaller, (4,))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_pruning"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("pathlift.pruning.t")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match=r"pip install 'pathlift\[torch-pruning\]'"):
        shrink(plain().eval(), SHAPE)


def test_the_result_is_one_line_a_dictionary_and_pickles() -> None:
    _, report = shrink(unread(randomised(plain()), "3.weight", [1, 4]), SHAPE)
    assert "\n" not in repr(report) and len(repr(report)) <= 200 and "multiply_adds" in repr(report)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0] == {"name": "0", "before": 8, "after": 6}
    assert pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.parameters = 3  # type: ignore[misc]


def test_multiply_adds_are_counted_by_hand() -> None:
    model = unread(randomised(plain()), "3.weight", [1, 4])
    _, report = shrink(model, SHAPE)

    def count(first: int) -> int:
        return 64 * first * 2 * 9 + 9 * 6 * first * 9 + 6 * 7 + 7 * 3

    assert (report.multiply_adds_before, report.multiply_adds) == (count(8), count(6))


CHANNELS = ("shrink", "cases:Residual", "--shape", "1,3,3")


@pytest.mark.hunt
def test_the_command_writes_a_program_that_is_the_smaller_network(tmp_path) -> None:
    path = tmp_path / "small.pt2"
    done = run(*CHANNELS, "--amount", "0.4", "--criterion", "magnitude", "--out", str(path))
    assert done.code == 0 and "multiply-adds" in done.stdout and str(path) in done.stdout, done
    model = pathlift.load_model("cases:Residual")
    smaller, report = pathlift.prune(model, (1, 3, 3), 0.4, "magnitude", selection="channels", shrink=True)
    loaded = pathlift.load_model(str(path), trust=True)
    for batch in (1, 5):
        x = torch.randn(batch, 1, 3, 3)
        torch.testing.assert_close(loaded(x), smaller.eval()(x))
    assert report.shrunk is not None
    said = json.loads(run(*CHANNELS, "--amount", "0.4", "--criterion", "magnitude", "--json").stdout)
    assert said["multiply_adds"] == report.shrunk.multiply_adds and said["layers"] == report.shrunk.to_dict()["layers"]


@pytest.mark.hunt
def test_the_command_writes_weights_and_takes_masked_ones(tmp_path) -> None:
    model = pathlift.load_model("cases:Residual")
    _, report = pathlift.prune(model, (1, 3, 3), 0.4, "magnitude", selection="channels", shrink=True)
    masked, path = tmp_path / "masked.safetensors", tmp_path / "small.safetensors"
    pathlift.storage.save_tensors(apply_masks(model, report.masks).state_dict(), masked)
    done = run(*CHANNELS, "--weights", str(masked), "--out", str(path))
    assert done.code == 0, done
    sizes = {name: tuple(tensor.shape) for name, tensor in pathlift.storage.load_state(path).items()}
    smaller, _ = pathlift.prune(model, (1, 3, 3), 0.4, "magnitude", selection="channels", shrink=True)
    assert sizes == {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--out", "small.txt"), "--out must end in .safetensors"),
        (("--criterion", "magnitude"), "has no effect without --amount"),
        (("--amount", "0.5", "--criterion", "snip"), "looks at data"),
        (("--amount", "1.5"), "share"),
    ],
)
def test_the_command_refuses_bad_input_in_one_sentence(args: tuple[str, ...], words: str) -> None:
    done = run(*CHANNELS, *args)
    assert done.code == 2 and words in done.stderr, done


def _normalised(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[2])


def _masked(model: nn.Module) -> None:
    torch.nn.utils.prune.l1_unstructured(model[2], "weight", 0.2)


def _within(model: nn.Module) -> None:
    model.register_parameter("larger", nn.Parameter(torch.randn(8, 6)))
    model[2].weight = nn.Parameter(model.larger.data[:5])


@pytest.mark.parametrize("change", [_normalised, _masked, _within])
def test_layers_whose_weights_are_no_parameters_of_their_own_stay_and_others_go(change: Callable[[nn.Module], None]) -> None:
    model = randomised(nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)
    ))  # fmt: skip
    change(model)
    unread(unread(model, "4.weight", [0, 1]), "6.weight", [3])
    before = [name for name, _ in model.named_parameters()]
    smaller, report = shrink(model, (3,))
    assert [(layer.name, layer.before, layer.after) for layer in report.layers] == [("4", 4, 3)]
    assert [name for name, _ in smaller.named_parameters()] == before
    same(model, smaller, (3,))


class Shuffled(nn.Module):
    """Channels of two groups are shuffled, and each half goes its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise, self.last = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        x = self.grouped(self.first(x).relu()).relu()
        kept, other = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2).chunk(2, 1)
        return self.last(torch.cat([kept, self.depthwise(other).relu()], 1).mean((2, 3)))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
        ),
        Shuffled(),
    ],
    ids=["transposed", "shuffled"],
)
def test_channels_of_groups_stay_and_are_named(model: nn.Module) -> None:
    model = randomised(model)
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        first.weight[3] = first.bias[3] = 0
    smaller, report = shrink(model, (3, 6, 6))
    assert any(left.channels == (3,) and "groups" in left.reason for left in report.left)
    same(model, smaller, (3, 6, 6))
