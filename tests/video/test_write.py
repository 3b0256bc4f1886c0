"""``write`` and ``VideoWriter``: read back with PyAV's plain loop; times, odd sizes, interruptions, failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video.plain_decode import plain_decode

from sidestream.errors import LayoutError, WriteError
from sidestream.types import Clip, Sound
from sidestream.video import SyntheticVideo, VideoWriter, read, write


def grey_frames(num_frames: int, size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    return [np.full((*size, 3), 20 + 4 * number, np.uint8) for number in range(num_frames)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_pictures_and_times_come_back(tmp_path: Path, suffix: str) -> None:
    frames = grey_frames(30)
    path = write(tmp_path / f"a{suffix}", frames, frame_rate=25)
    rgb, times = plain_decode(path)
    assert np.abs(rgb.astype(int) - np.stack(frames).astype(int)).max() <= 4
    tick = 0.001 if suffix in (".mkv", ".webm") else 1e-9  # Matroska counts milliseconds
    assert times == pytest.approx([number / 25 for number in range(30)], abs=tick)
    assert os.listdir(tmp_path) == [path.name]
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("vp9" if suffix == ".webm" else "h264", "yuv420p")


def test_colours_come_back(tmp_path: Path) -> None:
    colours = [(200, 60, 40), (30, 90, 220), (20, 200, 60), (250, 250, 250), (5, 5, 5)]
    frames = [np.broadcast_to(np.array(c, np.uint8), (32, 32, 3)) for c in colours]
    rgb, _ = plain_decode(write(tmp_path / "c.mp4", frames, frame_rate=5, crf=10))
    assert np.abs(rgb[:, 16, 16].astype(int) - np.array(colours)).max() <= 5


@pytest.mark.parametrize("rate", [25.0, 24.0, 30000 / 1001, 32.0, 10.0, 59.94, 7.5])
def test_a_steady_rate_stays_steady(tmp_path: Path, rate: float) -> None:
    _, times = plain_decode(write(tmp_path / "r.mp4", grey_frames(12), frame_rate=rate))
    assert times == pytest.approx([number / rate for number in range(12)], abs=1e-5)


def test_variable_times_are_kept(tmp_path: Path) -> None:
    wanted = [0.0, 0.033, 0.05, 0.19, 0.191, 0.9, 0.907, 2.9]
    clip = Clip(torch.from_numpy(np.stack(grey_frames(8))), tuple(wanted))
    _, times = plain_decode(write(tmp_path / "v.mp4", clip, frame_rate=30))
    assert times == pytest.approx(wanted, abs=1 / 90_000)
    later = Clip(clip.rgb_THWC, tuple(seconds + 5 for seconds in wanted))
    assert read(write(tmp_path / "w.mp4", later)).pts_seconds == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("size", [(49, 65), (48, 65), (49, 64), (1, 1)])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = grey_frames(3, size)
    rgb, _ = plain_decode(write(tmp_path / "o.mp4", frames, frame_rate=25, crf=5))
    assert rgb.shape == (3, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert np.abs(rgb.astype(int) - np.array([20, 24, 28])[:, None, None, None]).max() <= 4


def test_frames_keep_their_own_times_and_sound_goes_along(tmp_path: Path) -> None:
    video = SyntheticVideo(seed=2, num_frames=30, size_px=(48, 64), frame_rate=10)
    path = write(tmp_path / "s.mp4", video, frame_rate=10, sound=video.sound(0, 3, 44100))
    with av.open(str(path)) as container:
        track = container.streams.audio[0]
        assert (track.codec_context.name, track.rate, track.channels) == ("aac", 44100, 2)
        assert float(track.duration * track.time_base) == pytest.approx(3.0, abs=0.05)
    _, times = plain_decode(path)
    assert times == pytest.approx([number / 10 for number in range(30)], abs=1e-9)


def test_sound_before_time_0_is_cut_off(tmp_path: Path) -> None:
    samples = torch.zeros(1, 16000)
    samples[0, 12000:] = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(4000) / 16000)
    path = write(tmp_path / "n.mp4", grey_frames(25), frame_rate=25, sound=Sound(samples, 16000, start_seconds=-0.5))
    sound = read(path, with_sound=True).sound
    assert sound is not None
    loud = torch.nonzero(sound.samples_CN[0].abs() > 0.2)[0].item() / 16000 + sound.start_seconds
    assert loud == pytest.approx(0.25, abs=0.01)


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    for wrong in (ValueError, SystemExit):
        with pytest.raises(wrong), VideoWriter(tmp_path / "x.mp4", frame_rate=25) as writer:
            writer.add(grey_frames(1)[0])
            assert os.listdir(tmp_path) == ["x.part.mp4"]
            raise wrong
        assert os.listdir(tmp_path) == []


def test_an_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError), VideoWriter(path, frame_rate=25) as writer:
        writer.add(grey_frames(1)[0])
        raise ValueError
    assert path.read_bytes() == b"old"
    write(path, grey_frames(2), frame_rate=25)
    assert len(plain_decode(path)[1]) == 2


def test_keyboard_interrupt_finishes_the_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "x.mp4", frame_rate=25) as writer:
        for frame in grey_frames(10):
            writer.add(frame)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x.mp4"]
    assert len(plain_decode(tmp_path / "x.mp4")[1]) == 10
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "y.mp4", frame_rate=25):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x.mp4"]


def test_an_interruption_inside_add_loses_no_frame(tmp_path: Path) -> None:
    """Most of the time goes into the encoder, so that is where it strikes."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    picture = SyntheticVideo(seed=1, size_px=(240, 320)).frame(0)
    try:
        for trial in range(12):
            path = tmp_path / f"{trial}.mp4"
            with pytest.raises(KeyboardInterrupt), VideoWriter(path, frame_rate=25) as writer:
                writer.add(picture.rgb_HWC)
                signal.setitimer(signal.ITIMER_REAL, 0.02 + 0.003 * trial)
                while True:
                    writer.add(picture.rgb_HWC)
            _, times = plain_decode(path)
            assert times == pytest.approx([number / 25 for number in range(len(times))], abs=1e-6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(90)
def test_ctrl_c_in_a_real_process_leaves_a_playable_file(tmp_path: Path) -> None:
    program = """
        import sys, time
        from sidestream.video import VideoWriter, stream
        with VideoWriter(sys.argv[1], frame_rate=25) as writer:
            for frame in stream("synthetic:size=64x80"):
                writer.add(frame)
                if frame.index == 20:
                    print("running", flush=True)
                time.sleep(0.005)
    """
    path = tmp_path / "x.mp4"
    arguments = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    with subprocess.Popen(arguments, stdout=-1, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert os.listdir(tmp_path) == ["x.mp4"]
    _, times = plain_decode(path)
    assert len(times) > 20
    assert times == pytest.approx([number / 25 for number in range(len(times))], abs=1e-6)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for path, why in [
        (tmp_path / "a.xyz", "suffix '.xyz' is not known"),
        (tmp_path / "a", "suffix '' is not known"),
        (tmp_path / "no" / "a.mp4", "does not exist"),
    ]:
        with pytest.raises(WriteError, match=why):
            write(path, grey_frames(2), frame_rate=25)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(WriteError, match="it is a folder"):
        VideoWriter(tmp_path / "folder.mp4", frame_rate=25)
    with pytest.raises(WriteError, match="choose a place that may be written"):
        VideoWriter("/proc/a.mp4", frame_rate=25)
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_no_frame_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="no frame was added"):
        write(tmp_path / "a.mp4", [], frame_rate=25)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (np.zeros((4, 4, 3), np.float32), "give uint8 RGB"),
        (np.zeros((3, 48, 64), np.uint8), "give uint8 RGB"),
        (np.zeros((10, 10, 3), np.uint8), "resize it first"),
    ],
)
def test_wrong_frames(tmp_path: Path, wrong: np.ndarray, why: str) -> None:
    with pytest.raises(LayoutError, match=why), VideoWriter(tmp_path / "a.mp4", frame_rate=25) as writer:
        writer.add(grey_frames(1)[0])
        writer.add(wrong)
    assert os.listdir(tmp_path) == []


def test_times_must_grow(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", frame_rate=25) as writer:
        writer.add(grey_frames(1)[0], 1.0)
        with pytest.raises(LayoutError, match="is not after the last frame"):
            writer.add(grey_frames(1)[0], 0.5)
