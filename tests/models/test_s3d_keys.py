"""The public Kinetics S3D's keys, put together from the layers of torchvision's net, come back as torchvision's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.video import s3d
from torchvision.models.video.s3d import SepInceptionBlock3D, TemporalSeparableConv
from torchvision.ops.misc import Conv3dNormActivation

from sidestream.models import create_model
from sidestream.models.conv3d_zoo import map_s3d_keys


def public_keys(net: nn.Module) -> dict[str, Tensor]:
    """As the authors' file names them: ``base`` in the same order, ``conv_s`` in space and ``conv_t`` in time."""
    state = {}
    for number, layer in enumerate(net.features):
        for name, tensor in _named(layer):
            state[f"base.{number}.{name}"] = tensor
    state["fc.0.weight"], state["fc.0.bias"] = net.classifier[1].weight, net.classifier[1].bias
    return state


def _named(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(layer, TemporalSeparableConv):
        for kind, part in zip("st", layer, strict=True):
            yield from ((f"conv_{kind}.{n}", t) for n, t in part[0].state_dict().items())
            yield from ((f"bn_{kind}.{n}", t) for n, t in part[1].state_dict().items())
    elif isinstance(layer, Conv3dNormActivation):
        yield from ((f"conv.{n}", t) for n, t in layer[0].state_dict().items())
        yield from ((f"bn.{n}", t) for n, t in layer[1].state_dict().items())
    elif isinstance(layer, SepInceptionBlock3D):
        for branch in range(4):
            part = getattr(layer, f"branch{branch}")
            parts = [part] if isinstance(part, Conv3dNormActivation) else list(part)
            for number, inner in enumerate(parts):
                yield from ((f"branch{branch}.{number}.{n}", t) for n, t in _named(inner))


def test_every_tensor_finds_its_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = s3d(num_classes=7)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    given = public_keys(net)
    mapped = map_s3d_keys(given)
    assert mapped.keys() == net.state_dict().keys()
    assert all(mapped[key] is not None and torch.equal(mapped[key], value) for key, value in net.state_dict().items())
    assert len({id(value) for value in mapped.values()}) == len(given)
    save_file({key: value.detach().clone() for key, value in given.items()}, tmp_path / "s3d.safetensors")
    for name in ("s3d", "s3d_causal"):
        model = create_model(name, num_classes=7, weights=tmp_path / "s3d.safetensors")
        assert all(torch.equal(model.net.state_dict()[key], value) for key, value in net.state_dict().items())


def test_torchvisions_own_keys_stay() -> None:
    state = s3d(num_classes=2).state_dict()
    assert map_s3d_keys(state).keys() == state.keys()
