"""The user's model is only ever read: a snapshot to the bit before and after each call, also one that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pathlift
from cases import Residual, Tied


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a call could change: bits, versions, addresses, gradients, modes, hooks, attributes."""
    found: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        found[name] = (
            tensor.detach().clone(), tensor._version, tensor.data_ptr(), id(tensor), tensor.requires_grad, tensor.dtype,
            None if tensor.grad is None else (tensor.grad.clone(), id(tensor.grad)), tensor.is_leaf,
        )  # fmt: skip
    for name, module in model.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if "hooks" in key and hasattr(value, "keys")}
        found[f"module {name}"] = (id(module), type(module), module.training, hooks, sorted(vars(module)))
    return found


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
    if isinstance(before, (tuple, list)):
        return len(before) == len(after) and all(same(b, a) for b, a in zip(before, after, strict=True))
    return bool(before == after)


def parametrised() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    parametrizations.weight_norm(model[0])
    prune.random_unstructured(model[3], "weight", 0.5)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (1, 3, 3)),
    "tied": (Tied, (3,)),
    "parametrised": (parametrised, (1, 3, 3)),
}


def another(model: nn.Module) -> dict[str, Tensor]:
    """Other parameters for the same model."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor * 1.1 - 0.05 if name in named else tensor for name, tensor in model.state_dict().items()}


CALLS: dict[str, Callable[[nn.Module, tuple[int, ...]], object]] = {
    "capture": pathlift.capture,
    "check_support": pathlift.check_support,
    "path_norm": pathlift.path_norm,
    "path_norm q = 2": lambda m, s: pathlift.path_norm(m, s, q=2),
    "parts": lambda m, s: pathlift.path_norm(m, s).bias_part,
    "path_magnitude": pathlift.path_magnitude,
    "path_norms": lambda m, s: list(pathlift.path_norms(m, [m, m.state_dict()], s)),
    "path_metrics": lambda m, s: list(pathlift.path_metrics(m, [m, m.state_dict()], s)),
    "path_metric in full": lambda m, s: pathlift.path_metric(m, another(m), s, moments=4, tighten=2, estimate=9),
    "path_kernel": lambda m, s: pathlift.path_kernel([m, m.state_dict()], s),
    "path_magnitude on data": lambda m, s: pathlift.path_magnitude(m, s, q=2, x=torch.ones(2, *s)),
    "prune": lambda m, s: pathlift.prune(m, s, 0.5, scope="*"),
    "apply_masks": lambda m, s: pathlift.pruning.apply_masks(m, {n: torch.ones_like(p) > 0 for n, p in m.named_parameters()}),
    **{
        f"criterion {name}": lambda m, s, own=own: own.scores(
            pathlift.capture(m, s), pathlift.pruning.Batch(torch.ones(2, *s), torch.zeros(2).long())
        )
        for name, own in pathlift.pruning.CRITERIA.items()
        if own.needs != "nothing" or name in {"synflow", "balanced_magnitude"}
    },
    "unit_path_magnitude": pathlift.unit_path_magnitude,
    "path_metric": lambda m, s: pathlift.path_metric(m, {k: v * 0.5 for k, v in m.state_dict().items()}, s),
    "path_metric with itself": lambda m, s: pathlift.path_metric(m, m, s, q=2),
    "path_metric_bounds": lambda m, s: pathlift.metric.path_metric_bounds(
        m, {k: v * 0.5 for k, v in m.state_dict().items()}, s
    ),
    "lipschitz_bound": lambda m, s: pathlift.lipschitz_bound(m, m, torch.ones(2, *s)),
    "input_lipschitz": pathlift.lipschitz.input_lipschitz,
    "gradient_norms": lambda m, s: pathlift.lipschitz.gradient_norms(m, torch.ones(2, *s)),
    "certify": lambda m, s: pathlift.certify(m, torch.ones(2, *s), None, 0.1),
    "attack": lambda m, s: pathlift.attack(m, torch.ones(2, *s), None, 0.1),
    "sharpness": lambda m, s: pathlift.consequences.sharpness(m, torch.ones(2, *s), torch.zeros(2, dtype=torch.long), 0.1),
    "symmetries": lambda m, s: str(pathlift.symmetries(m, s)),
    "rescale": lambda m, s: pathlift.symmetries(m, s).randomize((1, 2)),
    "normalize": lambda m, s: pathlift.symmetries(m, s).normalize(),
    "balance": lambda m, s: pathlift.symmetries(m, s).balance(),
    "equalize": lambda m, s: pathlift.symmetries(m, s).equalize(),
    "condition": lambda m, s: pathlift.symmetries(m, s).condition(),
    "equivalent": lambda m, s: pathlift.equivalent(m, m, s),
    "align": lambda m, s: pathlift.align(m, {k: v * 0.5 for k, v in m.state_dict().items()}, s),
    "rescaling_distance": lambda m, s: pathlift.rescaling.rescaling_distance(m, m, s),
    "with_state": lambda m, s: pathlift.rescaling.with_state(m, m.state_dict()),
    "path_lifting": lambda m, s: pathlift.path_lifting(m, s),
}


@pytest.mark.one_in(26)
@pytest.mark.hunt_one_in(3)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_every_bit_of_the_model(call: str, name: str, training: bool) -> None:
    make, shape = MODELS[name]
    model = make().train(training)
    model(torch.ones(2, *shape)).sum().backward()  # gradients that must survive
    next(model.children()).train(not training)  # a mixed mode that must survive
    seen: list[int] = []
    handle = model.register_full_backward_hook(lambda *args: seen.append(1))
    before = snapshot(model)
    CALLS[call](model, shape)
    assert same(before, snapshot(model))
    assert not seen
    handle.remove()


def test_requires_grad_and_global_state_stay() -> None:
    model = Residual()
    model.conv1.weight.requires_grad_(False)
    generator, enabled = torch.get_rng_state(), torch.is_grad_enabled()
    pathlift.path_magnitude(model, (1, 3, 3))
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.is_grad_enabled() == enabled
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.requires_grad


class Interrupting(Residual):
    """Raises in the middle of its forward pass."""

    error: type[BaseException] = RuntimeError

    def forward(self, x: Tensor) -> Tensor:
        self.counter = getattr(self, "counter", 0) + 1
        y = self.bn1(self.conv1(x))
        raise self.error("in the middle")
        return y


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupt_in_the_middle_of_tracing_leaves_the_model(error: type[BaseException]) -> None:
    model = Interrupting().train()
    model.error = error
    before = snapshot(model)
    with pytest.raises((error, pathlift.PathliftError)):
        pathlift.path_norm(model, (1, 3, 3))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("call", ["path_norm", "path_magnitude", "path_metric"])
def test_an_interrupt_in_the_middle_of_a_pass_leaves_the_model(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlift.edges.gathered import GatheredConvolution

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    model = Residual().train()
    before = snapshot(model)
    monkeypatch.setattr(GatheredConvolution, "sum", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CALLS[call](model, (1, 3, 3))
    assert same(before, snapshot(model))


def test_a_refused_model_is_left_alone() -> None:
    model = nn.Sequential(Residual(), nn.GELU()).train()
    before = snapshot(model)
    with pytest.raises(pathlift.UnsupportedModelError):
        pathlift.path_norm(model, (1, 3, 3))
    assert same(before, snapshot(model))


def test_scores_do_not_share_memory_with_the_model() -> None:
    model = Residual()
    scores = pathlift.path_magnitude(model, (1, 3, 3))
    before = copy.deepcopy(model.state_dict())
    for score in scores.values():
        score.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
