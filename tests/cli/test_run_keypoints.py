"""``run`` with a model that answers keypoints: the JSON is the model's own, and the video has them where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidestream.cli import main
from sidestream.models import create_model, info_of
from sidestream.types import Frame
from sidestream.video import SyntheticVideo, prepare, read, write
from sidestream.video.overlay import COLOURS

SIZE_PX = (120, 160)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = create_model("keypoint_cnn", num_classes=4)
    for module in model.modules():  # maps with a clear largest cell
        if isinstance(module, torch.nn.Conv2d) and module.out_channels == 4:
            torch.nn.init.normal_(module.weight, std=1.0)
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_keypoints_are_written_and_drawn(tmp_path: Path, weights: Path) -> None:
    clip = write(tmp_path / "c.mp4", iter(SyntheticVideo(seed=2, num_frames=5, size_px=SIZE_PX)), crf=0)
    out, record = tmp_path / "o.mp4", tmp_path / "o.jsonl"
    command = ["run", str(clip), "--model", "keypoint_cnn", "--weights", str(weights), "--num-classes", "4"]
    flags = ["--stages", "3", "--executor", "threads", "--out", str(out), "--json", str(record)]
    assert main([*command, *flags]) == 0
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(5))

    model = create_model("keypoint_cnn", num_classes=4, weights=weights)
    spec = info_of(model).input_spec.replace(layout="BCHW", num_frames=1, min_frames=None)
    frames, drawn = read(clip), read(out)
    assert drawn.num_frames == 5
    for line, rgb_HWC, shown_HWC in zip(lines, frames.rgb_THWC, drawn.rgb_THWC, strict=True):
        frame_BCHW = prepare(Frame(rgb_HWC, 0, 0.0), spec)
        with torch.no_grad():
            maps_PHW = model(frame_BCHW[:, None])[0, 0]
        for map_HW, (x, y) in zip(maps_PHW, line["points_px"], strict=True):
            row, column = divmod(int(map_HW.argmax()), map_HW.shape[1])
            # by hand: the frame is stretched to 112 x 112; the mean of the cells around the largest one's
            across, down = 4 * SIZE_PX[1] / 112, 4 * SIZE_PX[0] / 112
            assert x == pytest.approx((column + 0.5) * across, abs=2.5 * across)
            assert y == pytest.approx((row + 0.5) * down, abs=2.5 * down)
        best = max(range(4), key=lambda n: line["scores"][n])
        x, y = (round(each) for each in line["points_px"][best])
        around = shown_HWC[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].float().mean((0, 1))
        before = rgb_HWC[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].float().mean((0, 1))
        wanted = torch.tensor(COLOURS[0]).float()
        assert (around - wanted).norm() < (before - wanted).norm()


def test_a_model_with_other_answers_is_still_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "synthetic:frames=2", "--model", "conv_autoencoder_small", "--weights", "random"]
    assert main(command) in (1, 2)
    assert "not with classes of a frame or keypoints" in capsys.readouterr().err
