"""Architectures that nobody tuned for: every rescaling leaves outputs, path-norm and shares as they are, and is found again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pathlift

torchvision = pytest.importorskip("torchvision")
SIZE = 64
NAMES = [
    "torchvision:resnet18", "torchvision:resnext50_32x4d", "torchvision:densenet121", "torchvision:googlenet",
    "torchvision:shufflenet_v2_x0_5", "torchvision:squeezenet1_1", "torchvision:mnasnet0_5", "torchvision:mobilenet_v2",
    "torchvision:regnet_x_400mf", "torchvision:inception_v3", "torchvision:fcn_resnet50",
    "timm:hrnet_w18_small", "timm:dla34", "timm:repvgg_a0", "timm:res2net50_14w_8s", "timm:nasnetalarge",
]  # fmt: skip


class UNet(nn.Module):
    """Down by pooling, up by transposed convolution and by interpolation, concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.LeakyReLU(0.1))
        self.down3 = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.PReLU(16))
        self.up2 = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.mix2 = nn.Sequential(nn.Conv2d(32, 8, 3, padding=1), nn.ReLU())
        self.up1 = nn.Upsample(scale_factor=2, mode="bilinear")
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(one)
        three = self.up2(self.down3(two))
        return self.head(torch.cat([self.up1(self.mix2(torch.cat([two, three], 1))), one], 1))


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    library, _, entry = name.partition(":")
    torch.manual_seed(0)
    size = 128 if "inception" in name else SIZE
    if library == "timm":
        timm = pytest.importorskip("timm")
        options = {"stem_size": 12, "num_features": 480} if entry == "nasnetalarge" else {}
        model = timm.create_model(entry, pretrained=False, **options)
    elif entry.startswith("fcn"):
        model = torchvision.models.get_model(entry, weights=None, weights_backbone=None)
    else:
        options = {"init_weights": False} if entry in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(entry, weights=None, **options)
    return with_statistics(model), (3, size, size)


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return torch.cat([part.flatten() for part in (out.values() if isinstance(out, dict) else [out])])


def check(model: nn.Module, shape: tuple[int, ...]) -> None:
    network = pathlift.capture(model, shape)
    groups = pathlift.symmetries(network)
    x = torch.randn(1, *shape)
    before, norm, shares = run(model, x), pathlift.path_norm(network), pathlift.path_magnitude(network)
    generator = torch.Generator().manual_seed(0)
    up_and_down = torch.where(torch.arange(len(groups)) % 2 == 0, 2.0**12, 2.0**-12)  # as far apart as float32 holds
    states = [
        groups.randomize((1, 128, 4096), generator),
        groups.rescale(up_and_down),
        groups.randomize(generator=generator, sigma=2.0),
    ]
    for state, exact in zip(states, (True, True, False), strict=True):
        other = pathlift.rescaling.with_state(model, state)
        after = run(other, x)
        assert float((after - before).abs().max()) <= (0.0 if exact else 1e-5) * float(before.abs().max())
        rescaled = pathlift.capture(other, shape)
        other_norm = pathlift.path_norm(rescaled)
        assert abs(other_norm.log10 - norm.log10) < 1e-6
        if state is states[0]:  # nothing wider than float32, which would go to float64
            assert other_norm.value == norm.value
        other_shares = pathlift.path_magnitude(rescaled) if state is not states[1] else shares
        for name, share in shares.items():  # a shift β − μ·s may cancel, and then carries the rounding of its rescaling
            slack = 1e-30 if exact else max(1e-30, 1e-4 * float(share.max()))
            torch.testing.assert_close(other_shares[name].double(), share.double(), rtol=1e-5, atol=slack)
        answer = pathlift.equivalent(groups, state)
        assert answer, answer.mismatch
        torch.testing.assert_close(answer.factors, state.factors, rtol=1e-4, atol=0)


@pytest.mark.hunt
@pytest.mark.hunt_one_in(8)
@pytest.mark.parametrize("name", NAMES)
def test_no_rescaling_of_a_known_architecture_is_seen(name: str) -> None:
    check(*build(name))


@pytest.mark.hunt
def test_no_rescaling_of_a_u_net_is_seen() -> None:
    torch.manual_seed(0)
    check(with_statistics(UNet()), (3, 16, 16))


@pytest.mark.hunt
def test_shares_keep_every_bit_where_float32_suffices() -> None:
    model, shape = build("torchvision:resnet18")
    groups = pathlift.symmetries(model, shape)
    other = pathlift.rescaling.with_state(model, groups.randomize((0.25, 1, 4), torch.Generator().manual_seed(1)))
    before, after = pathlift.path_magnitude(model, shape), pathlift.path_magnitude(other, shape)
    assert all(torch.equal(before[name], after[name]) for name in before)
