"""The guard of image models travels with them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sidestream.errors import LayoutError
from sidestream.models.guard import guard_frames


def test_a_guarded_model_can_be_pickled_and_copied_and_stays_guarded() -> None:
    model = guard_frames(nn.Conv2d(3, 2, 1), "a net")
    frame_BCHW = torch.rand(1, 3, 4, 4)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(frame_BCHW), model(frame_BCHW))
        with pytest.raises(LayoutError, match=r"a net was given the shape \(1, 4, 4, 3\).*permute"):
            other(frame_BCHW.movedim(1, -1))
