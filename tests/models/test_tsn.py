"""TSN: which frames it takes, in evaluation and in training, and what it makes of their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidestream.errors import LayoutError, ModelError, WeightsError
from sidestream.models import create_model, input_spec_of, list_models, model_info, save_weights
from sidestream.models.tsn import TSN, middle_frames


def numbered_clip(num_clips: int, num_frames: int, size_px: int = 4) -> Tensor:
    """Every pixel of frame n of clip b is 100 b + n."""
    numbers_BT = 100.0 * torch.arange(num_clips)[:, None] + torch.arange(num_frames)
    return numbers_BT[..., None, None, None].expand(-1, -1, 3, size_px, size_px)


def numbers(picked_BSCHW: Tensor) -> list[list[int]]:
    return [[int(n) for n in row] for row in picked_BSCHW[:, :, 0, 0, 0]]


class Mean(nn.Module):
    """Frame -> two logits: its mean, and the negative of it."""

    def forward(self, frame_BCHW: Tensor) -> Tensor:
        mean_B = frame_BCHW.mean((1, 2, 3))
        return torch.stack([mean_B, -mean_B], 1)


def tsn(num_segments: int, **options: Any) -> TSN:
    return TSN(backbone=Mean(), num_segments=num_segments, **options).eval()


@pytest.mark.parametrize(
    ("num_frames", "num_segments", "expected"),
    [
        (9, 3, [1, 4, 7]),
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (16, 4, [2, 6, 10, 14]),
        (10, 3, [1, 5, 8]),
        (5, 1, [2]),
        (1, 1, [0]),
    ],
)
def test_the_middle_frame_of_each_segment(num_frames: int, num_segments: int, expected: list[int]) -> None:
    assert middle_frames(num_frames, num_segments) == expected
    assert numbers(tsn(num_segments).pick(numbered_clip(2, num_frames))) == [expected, [100 + n for n in expected]]


def test_middle_frames_are_those_of_real_arithmetic() -> None:
    """The frame in which the middle of a segment lies, for every length; never the same frame twice."""
    for num_segments in range(1, 12):
        for num_frames in range(num_segments, 60):
            width = num_frames / num_segments
            assert middle_frames(num_frames, num_segments) == [
                int(width * i + width / 2 + 1e-9) for i in range(num_segments)
            ]
            assert len(set(middle_frames(num_frames, num_segments))) == num_segments


def test_consensus_is_the_mean_or_the_maximum_of_the_segments() -> None:
    clip_BTCHW = numbered_clip(2, 9)
    assert tsn(3).segments(clip_BTCHW)[:, :, 0].tolist() == [[1, 4, 7], [101, 104, 107]]
    assert tsn(3)(clip_BTCHW).tolist() == [[4, -4], [104, -104]]
    assert tsn(3, consensus="max")(clip_BTCHW).tolist() == [[7, -1], [107, -101]]


def test_gradient_of_the_mean_reaches_the_taken_frames_evenly() -> None:
    clip_BTCHW = numbered_clip(1, 9).clone().requires_grad_()
    tsn(3)(clip_BTCHW)[0, 0].backward()
    per_frame = clip_BTCHW.grad.sum((0, 2, 3, 4))  # type: ignore[union-attr]
    torch.testing.assert_close(per_frame, torch.tensor([0, 1, 0, 0, 1, 0, 0, 1, 0]) / 3)


def test_in_training_frames_are_random_within_their_segments() -> None:
    def picks(seed: int) -> list[list[int]]:
        model = tsn(3, generator=torch.Generator().manual_seed(seed)).train()
        return numbers(model.pick(numbered_clip(500, 9)))

    rows = [[n - 100 * b for n in row] for b, row in enumerate(picks(0))]
    for segment in range(3):
        taken = [row[segment] for row in rows]
        counts = [taken.count(3 * segment + n) for n in range(3)]
        assert sum(counts) == 500  # none outside of the segment
        assert min(counts) > 120  # of 167 expected; 4 standard deviations below
    assert len({tuple(row) for row in rows}) == 27  # segments, and clips, are drawn apart
    assert picks(0) == picks(0)
    assert picks(0) != picks(1)


def test_training_takes_uneven_segments_where_eval_does() -> None:
    model = tsn(4, generator=torch.Generator().manual_seed(0)).train()
    rows = numbers(model.pick(numbered_clip(300, 10)))
    for segment in range(4):  # 2.5 frames each: a frame may belong to two
        taken = {row[segment] - 100 * b for b, row in enumerate(rows)}
        assert taken == set(range(int(2.5 * segment), -(-5 * (segment + 1) // 2)))


def test_without_a_generator_torchs_own_seed_counts() -> None:
    model, clip_BTCHW = tsn(3).train(), numbered_clip(20, 30)
    with torch.random.fork_rng(devices=[]):
        found = []
        for _ in range(2):
            torch.manual_seed(5)
            found.append(numbers(model.pick(clip_BTCHW)))
    assert found[0] == found[1]
    assert numbers(model.eval().pick(clip_BTCHW)) == numbers(model.pick(clip_BTCHW))


def test_wrong_clips_and_options_are_refused() -> None:
    with pytest.raises(LayoutError, match="TSN was given 2 frames; it needs 3 or more"):
        tsn(3)(numbered_clip(1, 2))
    with pytest.raises(LayoutError, match=r"expected \(B, T, 3, H, W\).*transpose"):
        tsn(3)(numbered_clip(1, 9).transpose(1, 2))
    with pytest.raises(ModelError, match="num_segments=0"):
        tsn(0)
    with pytest.raises(ModelError, match='consensus=\'median\'; expected 1 segment or more, and "mean" or "max"'):
        tsn(2, consensus="median")
    with pytest.raises(ModelError, match="'r3d_18' does not classify images"):
        TSN(backbone="r3d_18")


@torch.no_grad()
def test_a_backbone_by_name_is_the_image_model_on_each_frame() -> None:
    model = TSN(4, backbone="timm/test_resnet", num_segments=2).eval()
    clip_BTCHW = torch.randn(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = (model.net(clip_BTCHW[:, 1]) + model.net(clip_BTCHW[:, 4])) / 2
    assert expected.shape == (2, 4)
    torch.testing.assert_close(model(clip_BTCHW), expected)
    maps = torch.stack([model.net.forward_features(clip_BTCHW[:, n]) for n in (1, 4)], 1)  # type: ignore[operator]
    torch.testing.assert_close(model.features(clip_BTCHW), maps)
    assert maps.shape[2] == model.num_features
    assert TSN(4, backbone="timm/test_resnet").training  # as every new module


@torch.no_grad()
def test_the_named_model_takes_the_weights_of_the_image_model(tmp_path: Any) -> None:
    image = create_model("torchvision/resnet50", num_classes=400)
    file = save_weights(image, tmp_path / "image.safetensors")
    model = create_model("tsn_resnet50", weights=file)
    assert "tsn_resnet50" in list_models("tsn*")
    clip_BTCHW = torch.randn(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    frames = [image(clip_BTCHW[:, n]) for n in middle_frames(9, 8)]
    torch.testing.assert_close(model(clip_BTCHW), torch.stack(frames).mean(0), atol=1e-5, rtol=1e-4)
    authors = {f"base_model.{k}".replace("base_model.fc.", "new_fc."): v for k, v in image.state_dict().items()}
    torch.save({"state_dict": {f"module.{key}": value for key, value in authors.items()}}, tmp_path / "authors.pth")
    again = create_model("tsn_resnet50", weights=tmp_path / "authors.pth")
    assert torch.equal(again(clip_BTCHW), model(clip_BTCHW))
    assert input_spec_of(model) == model_info("tsn_resnet50").input_spec
    assert (model_info("tsn_resnet50").input_spec.min_frames, model_info("tsn_resnet50").input_spec.causal) == (
        8,
        False,
    )
    with pytest.raises(WeightsError, match="no default weights"):
        create_model("tsn_resnet50", weights="default")


@torch.no_grad()
def test_compiles_and_exports() -> None:
    model = TSN(4, backbone="timm/test_resnet", num_segments=2).eval()
    clip_BTCHW = torch.randn(1, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(model, (clip_BTCHW,)).module()
    torch.testing.assert_close(exported(clip_BTCHW), model(clip_BTCHW))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(clip_BTCHW), model(clip_BTCHW))
