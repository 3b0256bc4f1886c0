"""TSM: against torchvision's nets with the shift put in by hand, and against itself on streams."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import Bottleneck

from contract import assert_equal, check_streaming_layer
from sidestream.errors import LayoutError, ModelError, WeightsError
from sidestream.models import create_model, input_spec_of, list_models, model_info, save_weights
from sidestream.models.tsm import NAMES, TSM, map_keys

IMAGE_NETS = {"resnet50": torchvision.models.resnet50, "mobilenet_v2": torchvision.models.mobilenet_v2}


class Shifted(nn.Module):
    """A convolution behind the shift of the paper's figure 1, channel by channel; clips lie frame after frame."""

    def __init__(self, net: nn.Module, num_frames: int, is_online: bool) -> None:
        super().__init__()
        self.net, self.num_frames, self.is_online = net, num_frames, is_online

    def forward(self, x: Tensor) -> Tensor:
        fold = x.shape[1] // 8
        shifted = x.clone()
        for n in range(len(x)):
            t = n % self.num_frames
            for c in range(2 * fold):
                if self.is_online:
                    source = t - 1 if c < fold else t
                else:
                    source = t + 1 if c < fold else t - 1
                shifted[n, c] = x[n - t + source, c] if 0 <= source < self.num_frames else 0.0
        return self.net(shifted)


def shifted_by_hand(net: nn.Module, num_frames: int, is_online: bool) -> nn.Module:
    twin = copy.deepcopy(net)
    for block in list(twin.modules()):
        if isinstance(block, Bottleneck):
            block.conv1 = Shifted(block.conv1, num_frames, is_online)
        elif isinstance(block, InvertedResidual) and block.use_res_connect:
            block.conv[0] = Shifted(block.conv[0], num_frames, is_online)
    return twin


def random_clip(num_frames: int, size_px: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (2, num_frames, 3, size_px, size_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def tiny_resnet() -> nn.Module:
    """Two groups of three blocks in all, 16 channels inside."""
    net = torchvision.models.ResNet(Bottleneck, [2, 1, 1, 1], width_per_group=16)
    net.layer3, net.layer4, net.fc = nn.Sequential(), nn.Sequential(), nn.Linear(512, 5)
    return net


def tiny_mobilenet() -> nn.Module:
    setting = [[1, 16, 1, 1], [2, 16, 3, 2], [2, 24, 2, 2]]
    net = torchvision.models.MobileNetV2(inverted_residual_setting=setting, dropout=0.0)
    net.features[-1] = nn.Conv2d(24, 8, 1)
    net.classifier[1] = nn.Linear(8, 5)
    return net


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_equals_the_image_net_with_shifts_put_in_by_hand(name: str) -> None:
    torch.manual_seed(0)
    image_model, is_online = NAMES[name]
    model = create_model(name, num_classes=7)
    image_net = IMAGE_NETS[image_model](num_classes=7).eval()
    image_net.load_state_dict(model.net.state_dict())
    clip_BTCHW = random_clip(3)
    flat = shifted_by_hand(image_net, 3, is_online)(clip_BTCHW.flatten(0, 1))
    assert_equal(model.answers(clip_BTCHW), flat.unflatten(0, (2, 3)))
    assert_equal(model(clip_BTCHW), flat.unflatten(0, (2, 3)).mean(1))
    assert not torch.equal(flat, image_net(clip_BTCHW.flatten(0, 1)))  # the shift is felt


@pytest.mark.parametrize("is_online", [False, True])
@pytest.mark.parametrize(("make_net", "num_shifts"), [(tiny_resnet, 3), (tiny_mobilenet, 3)])
def test_stream_equals_clip(make_net, num_shifts: int, is_online: bool) -> None:
    torch.manual_seed(0)
    stream = TSM(make_net(), is_online=is_online).double().eval().streaming()
    assert stream.delay_ticks == (0 if is_online else num_shifts)
    field = num_shifts + 1 if is_online else 2 * num_shifts + 1
    clip_BTCHW = random_clip(6, 16, torch.float64)
    check_streaming_layer(stream, clip_BTCHW, is_causal=is_online, receptive_field=field)


@torch.no_grad()
def test_clip_form_and_stream_share_their_parameters() -> None:
    torch.manual_seed(0)
    model = TSM(tiny_mobilenet()).eval()
    stream, clip_BTCHW = model.streaming(), random_clip(4)
    before = model.answers(clip_BTCHW)
    model.net.classifier[1].bias += 1.0
    assert_equal(stream(clip_BTCHW), model.answers(clip_BTCHW))
    torch.testing.assert_close(model.answers(clip_BTCHW), before + 1.0)
    assert {id(p) for p in stream.parameters()} == {id(p) for p in model.parameters()}
    twin = copy.deepcopy(model)
    twin.net.classifier[1].bias += 1.0  # of the copy only, and felt by its clip form
    torch.testing.assert_close(twin.answers(clip_BTCHW), model.answers(clip_BTCHW) + 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_promised_of_a_name_holds(name: str) -> None:
    spec = model_info(name).input_spec
    model = create_model(name, num_classes=3)
    stream = model.streaming()
    assert name in list_models("*tsm*")
    assert (spec.layout, spec.num_frames, spec.min_frames) == ("BTCHW", 8, 1)
    assert spec.causal == name.endswith("online")
    assert spec.delay_ticks == stream.delay_ticks
    assert input_spec_of(stream).layout == "BCHW"


@torch.no_grad()
def test_weights_of_the_image_model_load_strictly(tmp_path) -> None:
    image_net = torchvision.models.mobilenet_v2(num_classes=4)
    save_file(image_net.state_dict(), tmp_path / "image.safetensors")
    model = create_model("tsm_mobilenet_v2", num_classes=4, weights=tmp_path / "image.safetensors")
    again = create_model(
        "tsm_mobilenet_v2_online", num_classes=4, weights=save_weights(model, tmp_path / "clip.safetensors")
    )
    for key, value in image_net.state_dict().items():
        assert torch.equal(model.net.state_dict()[key], value), key
        assert torch.equal(again.net.state_dict()[key], value), key
    with pytest.raises(WeightsError, match=r"classifier\.1\.weight \(file \(4, 1280\), model \(5, 1280\)\)"):
        create_model("tsm_mobilenet_v2", num_classes=5, weights=tmp_path / "image.safetensors")


def test_keys_of_the_authors_files_are_mapped_one_by_one() -> None:
    net = tiny_resnet()
    theirs = {f"base_model.{k}": v for k, v in shifted_by_hand(net, 8, False).state_dict().items()}
    for part in ("weight", "bias"):
        theirs[f"new_fc.{part}"] = theirs.pop(f"base_model.fc.{part}")
    assert "base_model.layer1.0.conv1.net.weight" in theirs
    assert {k: v.shape for k, v in map_keys(theirs).items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert map_keys(net.state_dict()).keys() == net.state_dict().keys()


@torch.no_grad()
def test_takes_other_lengths_and_sizes() -> None:
    model = TSM(tiny_resnet()).eval()
    for num_frames, size_px in ((1, 32), (5, 48)):
        answer = model(random_clip(num_frames, size_px))
        assert answer.shape == (2, 5)
        assert answer.isfinite().all()


def test_wrong_clips_and_nets_are_refused() -> None:
    model = TSM(tiny_mobilenet()).eval()
    with pytest.raises(LayoutError, match=r"\(2, 3, 4, 32, 32\); expected \(B, T, 3, H, W\).*use transpose\(1, 2\)"):
        model(random_clip(4).transpose(1, 2))
    with pytest.raises(LayoutError, match="0 frames; it needs 1 or more"):
        model(random_clip(4)[:, :0])
    with pytest.raises(LayoutError, match=r"\(2, 3, 32, 32\)"):
        model(random_clip(4)[:, 0])
    with pytest.raises(ModelError, match="no place for shifts in a Linear"):
        TSM(nn.Linear(3, 3))
