"""``stream``: files, folders, the synthetic source, the policies and replay in real time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video.plain_decode import plain_decode

from sidestream.clock import ManualClock, WallClock
from sidestream.errors import InputError, SourceError
from sidestream.types import Frame
from sidestream.video import SyntheticVideo, read, stream


def arrival(frame: Frame) -> float:
    """When it arrived; a frame of a stream always knows."""
    assert frame.arrived_at_seconds is not None
    return frame.arrived_at_seconds


def test_a_file_gives_every_frame_once_in_order(own_clip: Path) -> None:
    rgb, times = plain_decode(own_clip)
    with stream(own_clip) as frames:
        info = frames.info
        got = list(frames)
        stats = frames.stats
    assert (info.width, info.height, info.frame_rate, info.is_live) == (128, 96, 25.0, False)
    assert info.duration_seconds == pytest.approx(2.0, abs=0.05)
    assert np.array_equal(np.stack([f.rgb_HWC.numpy() for f in got]), rgb)
    assert [f.index for f in got] == list(range(50))
    assert [f.pts_seconds for f in got] == pytest.approx(times, abs=1e-12)
    assert (stats.num_frames, stats.num_dropped, stats.num_corrupt_packets, stats.num_reconnects) == (50, 0, 0, 0)


def test_info_is_after_rotation(data_dir: Path) -> None:
    info = stream(data_dir / "clips" / "video_90.mov").info
    assert (info.width, info.height) == (320, 568)


def test_arrival_is_read_from_the_clock(own_clip: Path) -> None:
    clock = ManualClock(100.0)
    frames = stream(own_clip, clock=clock)
    assert next(frames).arrived_at_seconds == 100.0
    clock.advance(3.0)
    assert next(frames).arrived_at_seconds == 103.0


def test_max_frames_loop_and_frame_rate(own_clip: Path) -> None:
    with stream(own_clip, loop=True, max_frames=120) as frames:
        assert frames.info.duration_seconds is None
        got = list(frames)
    assert [f.index for f in got] == list(range(120))
    assert [f.pts_seconds for f in got] == pytest.approx([i / 25 for i in range(120)], abs=1e-9)
    assert torch.equal(got[3].rgb_HWC, got[53].rgb_HWC)
    slow = list(stream(own_clip, frame_rate=10.0, max_frames=5))
    assert [f.pts_seconds for f in slow] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_replay_on_a_still_clock_is_simulated_exactly(own_clip: Path) -> None:
    """A reader that takes 0.11 s a frame at 25 frames/s: at time t the newest due frame is floor(25 t)."""
    clock, seen = ManualClock(7.0), []
    with stream(own_clip, real_time=True, clock=clock) as frames:
        for frame in frames:
            seen.append((frame.index, clock.now() - 7.0))
            assert frame.arrived_at_seconds == pytest.approx(7.0 + frame.pts_seconds)
            clock.advance(0.11)
        stats = frames.stats
    assert [index for index, _ in seen] == [min(49, int(25 * at + 1e-6)) for _, at in seen]
    assert stats.num_frames + stats.num_dropped == 50
    assert stats.num_frames == len(seen)
    assert seen[-1][0] == 49


def test_replay_without_loss_waits_for_due_frames_and_drops_none(own_clip: Path) -> None:
    clock = ManualClock()
    indices = []
    for frame in stream(own_clip, real_time=True, policy="lossless", clock=clock):
        assert clock.now() >= arrival(frame)
        indices.append(frame.index)
        clock.advance(0.1)
    assert indices == list(range(50))


def test_replay_bounded_keeps_the_newest_few(own_clip: Path) -> None:
    clock, indices = ManualClock(), []
    with stream(own_clip, real_time=True, policy="bounded:3", clock=clock) as frames:
        for frame in frames:
            indices.append(frame.index)
            clock.advance(0.4)
        assert frames.stats.num_dropped == 50 - len(indices) > 0
    assert indices[0] == 0
    assert indices[1] == 8  # ten more are due at 0.4 s: 1..10; the newest three wait
    assert indices[-3:] == [47, 48, 49]


def test_replay_on_the_wall_clock_keeps_time(own_clip: Path) -> None:
    clock = WallClock()
    with stream(own_clip, real_time=True, clock=clock, max_frames=10) as frames:
        delays = [clock.now() - arrival(frame) for frame in frames]
    assert min(delays) >= -1e-3  # never before it is due
    with stream(own_clip, real_time=True, clock=clock) as frames:
        next(frames)
        time.sleep(0.5)
        later = [next(frames), next(frames)]
        assert later[-1].index >= 11
        assert frames.stats.num_dropped >= 9


@pytest.mark.parametrize("policy", ["newest", "bounded:4"])
def test_closing_ends_the_reader_thread(own_clip: Path, policy: str) -> None:
    frames = stream(own_clip, policy=policy, loop=True)
    next(frames)
    assert any(t.name == "sidestream-reader" for t in threading.enumerate())
    frames.close()
    frames.close()
    assert not any(t.name == "sidestream-reader" for t in threading.enumerate())
    assert list(frames) == []


def test_a_folder_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1, 33):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"f{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "f5.png").write_bytes(b"\x89PNG broken")
    with stream(tmp_path, frame_rate=10) as frames:
        got = list(frames)
        assert frames.stats.num_corrupt_packets == 1
        assert frames.info.frame_rate == 10
    assert [int(f.rgb_HWC[0, 0, 0]) for f in got] == [1, 2, 10, 33]
    assert [f.pts_seconds for f in got] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [f.pts_seconds for f in stream(tmp_path)][1] == pytest.approx(0.04)


def test_images_of_every_kind_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 77).save(tmp_path / "1.png")
    Image.new("RGBA", (5, 4), (10, 20, 30, 40)).save(tmp_path / "2.png")
    Image.fromarray(np.full((4, 5), 77 * 256 + 5, np.uint16)).save(tmp_path / "3.png")
    Image.new("P", (5, 4), 0).save(tmp_path / "4.bmp")
    turned = Image.new("RGB", (5, 4), (9, 9, 9))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "5.jpg", exif=exif)
    frames = list(stream(tmp_path))
    assert [f.rgb_HWC[0, 0].tolist() for f in frames[:3]] == [[77] * 3, [10, 20, 30], [77] * 3]
    assert [f.size_px for f in frames] == [(4, 5)] * 4 + [(5, 4)]
    assert all(f.rgb_HWC.dtype == torch.uint8 and f.rgb_HWC.is_contiguous() for f in frames)


def test_the_synthetic_source_is_the_synthetic_video() -> None:
    video = SyntheticVideo(seed=3, num_frames=20, size_px=(48, 64), frame_rate=10.0, num_objects=2, speed=2.0)
    frames = list(stream("synthetic:seed=3,seconds=2,size=48x64,fps=10,objects=2,speed=2"))
    assert len(frames) == 20
    assert all(torch.equal(f.rgb_HWC, g.rgb_HWC) and f.pts_seconds == g.pts_seconds for f, g in zip(frames, video))
    assert frames[4].truth is not None
    endless = stream("synthetic:size=32x32")
    assert endless.info.duration_seconds is None
    assert [next(endless).index for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    "source", ["synthetic:colour=red", "synthetic:seed=x", "synthetic:size=1x1", "synthetic:fps=0", "synthetic:size=3"]
)
def test_synthetic_options_that_do_not_fit(source: str) -> None:
    with pytest.raises(SourceError, match="synthetic"):
        stream(source)


@pytest.mark.parametrize(
    "wrong", [{"policy": "all"}, {"frame_rate": 0}, {"max_frames": 0}, {"colour": "red"}, {"frame_rate": float("nan")}]
)
def test_options_that_do_not_fit(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        stream("synthetic", **wrong)  # type: ignore[arg-type]


def test_a_name_with_a_colon_or_a_percent_is_a_file(
    own_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("take:1.mp4", "50%d.mp4", "spaced name é.mp4"):
        Path(name).write_bytes(own_clip.read_bytes())
        assert read(name, max_frames=3).num_frames == 3
