"""The guard of image models travels with them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

from sidestream.errors import LayoutError
from sidestream.models import create_model
from sidestream.models.clip_border import ClipBorder
from sidestream.models.guard import SizeRule, guard_frames


def test_a_guarded_model_can_be_pickled_and_copied_and_stays_guarded() -> None:
    model = guard_frames(nn.Conv2d(3, 2, 1), "a net")
    frame_BCHW = torch.rand(1, 3, 4, 4)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(frame_BCHW), model(frame_BCHW))
        with pytest.raises(LayoutError, match=r"a net was given the shape \(1, 4, 4, 3\).*permute"):
            other(frame_BCHW.movedim(1, -1))


@pytest.mark.parametrize(
    ("rule", "taken", "refused", "message"),
    [
        (SizeRule(), [(1, 1), (7, 9)], [], ""),
        (SizeRule(only_px=(8, 6)), [(8, 6)], [(6, 8), (8, 8)], "it takes 8 x 6 only: resize"),
        (SizeRule(multiple_of_px=(4, 3)), [(4, 3), (8, 9)], [(3, 4), (8, 8), (9, 9)], "it takes multiples of 4 x 3"),
        (SizeRule(least_px=5), [(5, 5), (6, 99)], [(4, 5), (99, 4)], "it needs 5 x 5 or more"),
    ],
)
def test_sizes(rule: SizeRule, taken: list[tuple[int, int]], refused: list[tuple[int, int]], message: str) -> None:
    model = guard_frames(nn.Conv2d(3, 2, 1), "a net", rule)
    for size in taken:
        assert model(torch.rand(1, 3, *size)).shape[2:] == size
    for height, width in refused:
        with pytest.raises(LayoutError, match=f"a net was given {height} x {width} pixels; {message}"):
            model(torch.rand(1, 3, height, width))


def test_clips_of_another_length_than_the_net_takes() -> None:
    border = ClipBorder(nn.Conv3d(3, 2, 1), min_frames=2, only_frames=4)
    assert border(torch.rand(1, 4, 3, 8, 8)).shape == (1, 2, 4, 8, 8)
    for num_frames, message in ((1, "needs 2 or more"), (3, "takes clips of 4 only"), (5, "takes clips of 4 only")):
        with pytest.raises(LayoutError, match=f"Conv3d was given {num_frames} frames; it {message}"):
            border(torch.rand(1, num_frames, 3, 8, 8))


def test_a_vision_transformer_says_which_size_it_takes() -> None:
    with torch.device("meta"):
        model = create_model("timm/deit_tiny_patch16_224")
        with pytest.raises(LayoutError, match="was given 96 x 128 pixels; it takes 224 x 224 only"):
            model(torch.rand(1, 3, 96, 128))
        assert create_model("torchvision/vit_h_14")(torch.rand(1, 3, 518, 518)).shape == (1, 1000)


def test_the_least_clip_of_torchvisions_s3d_is_the_least_that_its_last_pooling_takes() -> None:
    """Its own forward takes 13 frames of 209 px, and no frame and no pixel less; ours says so."""
    with torch.device("meta"):  # shapes only
        bare, ours = torchvision.models.video.s3d(), create_model("torchvision/s3d", weights=None)
        assert bare(torch.zeros(1, 3, 13, 209, 209)).shape == ours(torch.zeros(1, 13, 3, 209, 209)).shape == (1, 400)
        for num_frames, size, needs in ((12, 209, "13 or more"), (13, 208, "209 x 209 or more")):
            with pytest.raises(RuntimeError, match="smaller than kernel size"):
                bare(torch.zeros(1, 3, num_frames, size, size))
            with pytest.raises(LayoutError, match=f"it needs {needs}"):
                ours(torch.zeros(1, num_frames, 3, size, size))
