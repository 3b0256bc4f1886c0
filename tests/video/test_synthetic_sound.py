"""The sound of the synthetic video: tones at the class's pitch, on the right side, clicks when it bounces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidestream.errors import InputError
from sidestream.video import SyntheticVideo
from sidestream.video.synthetic_sound import CLICK_SECONDS, tone_hz

RATE = 16000


def single(seed: int, **options: object) -> SyntheticVideo:
    return SyntheticVideo(seed=seed, num_objects=1, **options)  # type: ignore[arg-type]


def test_stretches_join_without_a_seam() -> None:
    video = SyntheticVideo(seed=4)
    whole = video.sound(0.0, 4.0).samples_CN
    parts = [video.sound(a, b) for a, b in ((0.0, 1.3), (1.3, 2.7), (2.7, 4.0))]
    assert torch.equal(torch.cat([part.samples_CN for part in parts], dim=1), whole)
    assert parts[1].start_seconds == pytest.approx(1.3, abs=1 / RATE)
    assert whole.shape == (2, 4 * RATE)
    assert whole.dtype == torch.float32
    assert float(whole.abs().max()) <= 1.0


@pytest.mark.parametrize("seed", range(6))
def test_the_loudest_pitch_is_that_of_the_class(seed: int) -> None:
    video = single(seed)
    mono = video.sound(0.0, 4.0).samples_CN.sum(0).numpy()
    spectrum = np.abs(np.fft.rfft(mono * np.hanning(mono.size)))
    assert np.argmax(spectrum) * RATE / mono.size == pytest.approx(tone_hz(video.shapes[0].label), abs=1.0)


def test_louder_on_the_side_where_the_object_is() -> None:
    video = single(2, speed=2.0)
    samples = video.sound(0.0, 6.0).samples_CN.numpy()
    for index in range(0, 140, 5):
        seconds = index / 25
        x = float(video.frame(index).truth.keypoints_NP2_px[0, 0, 0])
        around = samples[:, int(seconds * RATE) : int((seconds + 0.02) * RATE)]
        left, right = np.sqrt((around**2).mean(axis=1))
        assert np.degrees(np.arctan2(right, left)) == pytest.approx(90 * x / 320, abs=3)


def test_a_click_at_every_bounce_of_the_picture() -> None:
    """Bounces found in the picture (the centre turns round) against energy above every tone."""
    video = single(3, speed=3.0, frame_rate=200.0)
    centres = torch.stack([video.frame(i).truth.keypoints_NP2_px[0, 0] for i in range(800)]).double().numpy()
    turned = np.diff(np.sign(np.diff(centres, axis=0)), axis=0) != 0
    bounces = (np.flatnonzero(turned.any(axis=1)) + 1) / 200.0
    mono = video.sound(0.0, 4.0).samples_CN.sum(0).numpy()
    spectrum = np.fft.rfft(mono)
    spectrum[: int(2000 * 4.0)] = 0
    loud = np.abs(np.fft.irfft(spectrum, mono.size)) > 0.1
    times = np.flatnonzero(loud) / RATE
    times = times[(times > 0.1) & (times < 3.9)]  # the transform is periodic, the sound is not
    assert len(bounces) > 3
    for at in bounces:
        assert ((times > at - 0.012) & (times < at + 0.012)).any(), f"no click at {at}"
    for at in times:
        assert np.abs(bounces - at).min() < CLICK_SECONDS + 0.01, f"a click at {at} without a bounce"


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="makes no sense"):
        single(0).sound(2.0, 1.0)
