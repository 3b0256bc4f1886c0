"""The clip form of a model stays that of the parameters and layers that the model has, whoever changed them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV2

from sidestream.models.c3d import C3DLayers
from sidestream.models.conv3d_net import Conv3dNet
from sidestream.models.timesformer_causal import CausalTimeSformer
from sidestream.models.timesformer_embedding import Size
from sidestream.models.tsm import TSM


def c3d() -> nn.Module:
    return Conv3dNet(C3DLayers(5, width=1 / 32))


def tsm() -> nn.Module:
    return TSM(MobileNetV2(5, width_mult=0.1), is_online=True)


def timesformer() -> nn.Module:
    return CausalTimeSformer(5, size=Size(dim=16, depth=2, num_heads=2, patch_px=16, size_px=(32, 32), num_frames=4))


MODELS = [c3d, tsm, timesformer]
ANSWERS = [lambda model, clip: model(clip), lambda model, clip: model.features(clip)]


def random_clip() -> Tensor:
    return torch.randn(1, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def lively(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make().eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not name.endswith("running_var"):
            nn.init.normal_(value, std=0.1)
    return model


def assigned(model: nn.Module, wanted: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(wanted).state_dict(), assign=True)
    return model


def filled_from_nothing(model: nn.Module, wanted: nn.Module) -> nn.Module:
    empty = model.to("meta").to_empty(device="cpu")
    empty.load_state_dict(wanted.state_dict())
    return empty


def copied(model: nn.Module, wanted: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(wanted.state_dict())
    return other


def pickled(model: nn.Module, wanted: nn.Module) -> nn.Module:
    other = pickle.loads(pickle.dumps(model))
    other.load_state_dict(wanted.state_dict())
    return other


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("change", [assigned, filled_from_nothing, copied, pickled])
@torch.no_grad()
def test_new_parameters_are_used(make: Any, change: Any) -> None:
    wanted, clip = lively(make, 1), random_clip()
    for answers in ANSWERS:
        model, expected = lively(make, 2), answers(wanted, clip)
        before = answers(model, clip)
        assert not torch.allclose(before, expected)
        assert torch.equal(answers(change(model, wanted), clip), expected)


@pytest.mark.parametrize("make", MODELS)
def test_a_functional_call_uses_the_parameters_given(make: Any) -> None:
    model, wanted, clip = lively(make, 1), lively(make, 2), random_clip()
    before = model(clip)
    given = {name: p.detach().clone().requires_grad_() for name, p in wanted.named_parameters()}
    state = given | dict(wanted.named_buffers())
    answer = torch.func.functional_call(model, state, (clip,))
    assert torch.equal(answer, wanted(clip))
    gradients = torch.autograd.grad(answer.sum(), list(given.values()), allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in gradients) > len(given) / 2
    assert torch.equal(model(clip), before)


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_a_new_classifier_is_used(make: Any) -> None:
    model, clip = lively(make, 1), random_clip()
    name = str(model.classifier)
    name += ".1" if isinstance(model.get_submodule(name), nn.Sequential) else ""
    old = model.get_submodule(name)
    new = nn.Linear(old.in_features, 3)  # type: ignore[arg-type]
    new.weight.copy_(old.weight[:3])  # type: ignore[index]
    new.bias.copy_(old.bias[:3] + 1)  # type: ignore[index]
    before = model(clip)
    model.set_submodule(name, new)
    torch.testing.assert_close(model(clip), before[:, :3] + 1)


@pytest.mark.parametrize("is_training", [False, True])
def test_a_stream_leaves_the_modes_of_the_model_alone(is_training: bool) -> None:
    model = tsm().train(is_training)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train(not is_training)
    stream: Any = model.streaming()  # type: ignore[operator]
    assert stream.training == is_training
    assert all(norm.training != is_training for norm in norms)
