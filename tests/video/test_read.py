"""``read`` against PyAV's own plain loop, pixel by pixel, and against what is known of real clips."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video.plain_decode import plain_decode

from sidestream.errors import InputError, SourceError
from sidestream.video import SyntheticVideo, read, write


def test_equals_a_plain_decode_of_our_own_clip(own_clip: Path) -> None:
    rgb, times = plain_decode(own_clip)
    clip = read(own_clip)
    assert np.array_equal(clip.rgb_THWC.numpy(), rgb)
    assert clip.pts_seconds == pytest.approx(times, abs=1e-12)
    assert clip.num_corrupt_packets == 0


@pytest.mark.parametrize("name", ["flipping_a_pancake.mkv", "nasa_13013.mp4", "unordered.mov", "video_0.mov"])
def test_equals_a_plain_decode_of_real_clips(data_dir: Path, name: str) -> None:
    rgb, times = plain_decode(data_dir / "clips" / name)
    clip = read(data_dir / "clips" / name)
    assert np.array_equal(clip.rgb_THWC.numpy(), rgb)
    assert clip.pts_seconds == pytest.approx(times, abs=1e-9)


def test_packed_b_frames_come_in_order_at_an_even_rate(data_dir: Path) -> None:
    """An AVI whose presentation times go 1, 2, 4, 3: the pictures are in order, and so must the times be."""
    path = data_dir / "clips" / "v_ApplyEyeMakeup_g01_c01.avi"
    with av.open(str(path)) as container:
        rgb = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    clip = read(path)
    assert np.array_equal(clip.rgb_THWC.numpy(), rgb)
    assert clip.pts_seconds == pytest.approx([i / 25 for i in range(164)], abs=1e-9)


def test_frame_counts_of_jhmdb(data_dir: Path) -> None:
    """One decoded frame per frame of the data set, for every 9th of its 928 clips."""
    index = json.loads((data_dir / "jhmdb" / "index.json").read_text())
    names = sorted(index)[::9]
    counts = {name: read(data_dir / "jhmdb" / "videos" / f"{name}.mp4").num_frames for name in names}
    assert counts == {name: index[name]["frames"] for name in names}


@pytest.mark.slow
def test_frame_counts_of_all_of_jhmdb(data_dir: Path) -> None:
    index = json.loads((data_dir / "jhmdb" / "index.json").read_text())
    counts = {name: read(data_dir / "jhmdb" / "videos" / f"{name}.mp4").num_frames for name in index}
    assert counts == {name: each["frames"] for name, each in index.items()}
    assert sum(counts.values()) == 31_838


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_clips_come_out_upright(data_dir: Path, degrees: int) -> None:
    """A keyboard filmed with the phone held four ways, its letters upright (looked at once) when turned clockwise.

    numpy's rot90 on PyAV's own frames is the twin.
    """
    path = data_dir / "clips" / f"video_{degrees}.mov"
    stored, _ = plain_decode(path)
    clip = read(path)
    assert clip.rgb_THWC.is_contiguous()
    assert np.array_equal(clip.rgb_THWC.numpy(), np.rot90(stored, k=-degrees // 90, axes=(1, 2)))
    assert clip.rgb_THWC.shape[1:3] == ((320, 568) if degrees % 180 == 0 else (568, 320))


def test_window_takes_half_open_stretches(long_clip: Path) -> None:
    whole = read(long_clip)
    parts = [read(long_clip, start_seconds=a, end_seconds=b) for a, b in ((0, 3.2), (3.2, 7.01), (7.01, None))]
    assert sum((part.pts_seconds for part in parts), ()) == whole.pts_seconds
    assert torch.equal(torch.cat([part.rgb_THWC for part in parts]), whole.rgb_THWC)
    assert read(long_clip, start_seconds=2.0, max_frames=7).pts_seconds == whole.pts_seconds[50:57]


def test_window_errors(own_clip: Path) -> None:
    with pytest.raises(SourceError, match=r"no frame from 100.0 to None s; its last is at 1.96"):
        read(own_clip, start_seconds=100.0)
    with pytest.raises(InputError, match="0 <= start < end"):
        read(own_clip, start_seconds=2.0, end_seconds=1.0)
    with pytest.raises(InputError, match="which has no end to read to"):
        read("camera:0")


def test_sound_is_in_step_with_the_pictures(own_clip: Path) -> None:
    """The sound of the synthetic video comes back: same samples (AAC keeps tones well), same start."""
    truth = SyntheticVideo(seed=5, num_frames=50, size_px=(96, 128)).sound(0.0, 2.0).samples_CN
    sound = read(own_clip, with_sound=True).sound
    assert sound is not None
    assert (sound.sample_rate_hz, sound.samples_CN.shape[0], sound.samples_CN.dtype) == (16000, 2, torch.float32)
    assert abs(sound.start_seconds) < 1e-6
    got, want = sound.samples_CN[:, :32000].double(), truth.double()
    best = max(range(-20, 21), key=lambda lag: float((got.roll(lag, 1) * want).sum()))
    assert best == 0
    assert float((got * want).sum() / (got.norm() * want.norm())) > 0.98


def test_sound_of_a_window_is_the_same_stretch_of_the_whole(own_clip: Path) -> None:
    whole = read(own_clip, with_sound=True).sound
    part = read(own_clip, start_seconds=0.52, end_seconds=1.2, with_sound=True).sound
    assert whole is not None
    assert part is not None
    assert part.start_seconds == pytest.approx(0.52, abs=1 / 16000)
    assert torch.equal(part.samples_CN, whole.samples_CN[:, round(0.52 * 16000) : round(1.2 * 16000)])


def test_sound_that_starts_late_says_so(tmp_path: Path) -> None:
    from sidestream.types import Sound

    video = SyntheticVideo(seed=1, num_frames=25, size_px=(32, 32))
    late = Sound(video.sound(0, 0.5).samples_CN, 16000, start_seconds=0.4)
    path = write(tmp_path / "late.mkv", video, sound=late)
    sound = read(path, with_sound=True).sound
    assert sound is not None
    assert sound.start_seconds == pytest.approx(0.4, abs=0.03)  # the AAC coder may begin up to a block early


def test_gif_and_folder(data_dir: Path) -> None:
    from PIL import Image, ImageSequence

    path = next((data_dir / "i3d_kinetics400").glob("*.gif"))
    with Image.open(path) as gif:
        expected = np.stack([np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(gif)])
    assert np.array_equal(read(path).rgb_THWC.numpy(), expected)
    folder = data_dir / "davis" / "JPEGImages" / "480p" / "car-shadow"
    clip = read(folder)
    assert clip.rgb_THWC.shape == (40, 480, 854, 3)
    assert clip.pts_seconds[-1] == pytest.approx(39 / 25)
    assert np.array_equal(clip.rgb_THWC[7].numpy(), np.asarray(Image.open(folder / "00007.jpg")))


@pytest.mark.parametrize(
    "pixel_format",
    ["gray", "yuva420p", "yuv420p10le", "bgra", "yuv444p", "gray10le"],
)  # fmt: skip
@pytest.mark.parametrize("size", [(31, 45), (48, 64)])
def test_all_pixel_formats_become_rgb(tmp_path: Path, pixel_format: str, size: tuple[int, int]) -> None:
    """A flat colour in a lossless file comes back within rounding, whatever the format, odd sizes too."""
    colour = (90, 90, 90) if pixel_format.startswith("gray") else (180, 90, 40)
    rgb = np.broadcast_to(np.array(colour, dtype=np.uint8), (*size, 3)).copy()
    path = tmp_path / "flat.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = (*size, pixel_format)
        for _ in range(3):
            picture = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pixel_format)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    clip = read(path)
    assert clip.rgb_THWC.shape == (3, *size, 3)
    assert clip.rgb_THWC.dtype == torch.uint8
    assert clip.rgb_THWC.is_contiguous()
    assert (clip.rgb_THWC.int() - torch.tensor(colour)).abs().max() <= 3  # two 8-bit conversions


def test_variable_frame_rate_is_kept_exactly(tmp_path: Path) -> None:
    """Ticks of 1/1000 s at odd distances; the times are read off the ticks that were written."""
    ticks = [100, 133, 150, 290, 291, 1000, 1007, 3000]
    path = tmp_path / "vfr.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, tick in enumerate(ticks):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * number, np.uint8), format="rgb24")
            picture.pts, picture.time_base = tick, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    clip = read(path)
    assert clip.pts_seconds == pytest.approx([(tick - 100) / 1000 for tick in ticks], abs=1e-9)
    assert clip.rgb_THWC[:, 32, 32, 0].tolist() == pytest.approx([20 * n for n in range(8)], abs=3)


def test_a_change_of_size_is_refused_by_read_and_streamed(tmp_path: Path) -> None:
    from PIL import Image

    from sidestream.video import stream

    for number, size in enumerate([(20, 10), (20, 10), (30, 16)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    with pytest.raises(SourceError, match=r"changes its size from \(10, 20\) to \(16, 30\) at 0.080 s"):
        read(tmp_path)
    assert [frame.size_px for frame in stream(tmp_path)] == [(10, 20), (10, 20), (16, 30)]
