"""``prepare`` against torchvision's transforms, its errors, and the way back for points and boxes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidestream.errors import LayoutError
from sidestream.types import Clip, Frame, InputSpec
from sidestream.video import SyntheticVideo, prepare, prepare_boxes, prepare_points, unprepare_boxes, unprepare_points

SPECS = [
    InputSpec((224, 224), 256),
    InputSpec((224, 224), 256, interpolation="bicubic"),
    InputSpec((112, 112), None),
    InputSpec((100, 180), None, interpolation="bicubic"),
    InputSpec((160, 120), 171, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7)),
    InputSpec((96, 96), 96),
]
SIZES = [(240, 320), (321, 243), (97, 131), (96, 96)]


def torchvision_twin(pixels: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode, v2

    mode = InterpolationMode(spec.interpolation)
    steps = [v2.Resize(spec.resize_px or list(spec.size_px), interpolation=mode, antialias=True)]
    steps += [
        v2.CenterCrop(list(spec.size_px)),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(spec.mean, spec.std),
    ]
    return v2.Compose(steps)(pixels)


def frame_of(size: tuple[int, int]) -> Frame:
    torch.manual_seed(0)
    rough = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    smooth = SyntheticVideo(seed=1, size_px=size).frame(3).rgb_HWC
    return Frame(torch.where(torch.rand(*size, 1) < 0.3, rough, smooth), 0, 0.0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", SIZES)
def test_frame_equals_torchvision_on_bytes(size: tuple[int, int], spec: InputSpec) -> None:
    """Both resize whole levels; the float arithmetic behind differs in order: a few units in the last place."""
    frame = frame_of(size)
    got = prepare(frame, spec)
    expected = torchvision_twin(frame.rgb_HWC.permute(2, 0, 1)[None], spec)
    assert got.shape == (1, 3, *spec.size_px)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", SIZES)
def test_tensor_equals_torchvision_on_floats(size: tuple[int, int], spec: InputSpec) -> None:
    """The same float kernel on both sides."""
    image = frame_of(size).image_BCHW
    torch.testing.assert_close(prepare(image, spec), torchvision_twin(image, spec), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_and_floats_differ_by_rounding_only(spec: InputSpec) -> None:
    """Bytes are rounded to whole levels after each of two passes: below 1.5 levels where nothing is clipped."""
    given = frame_of((240, 320))
    frame = Frame(given.rgb_HWC // 3 + 85, 0, 0.0)  # bicubic overshoots by less than the room that this leaves
    difference = (prepare(frame, spec) - prepare(frame.image_BCHW, spec)).abs()
    assert float((difference * torch.tensor(spec.std).view(3, 1, 1) * 255).max()) < 1.5


def test_clip_and_batches_are_frames_in_a_row() -> None:
    spec = InputSpec((64, 64), 72)
    clip = SyntheticVideo(seed=1, num_frames=6, size_px=(100, 140)).clip()
    got = prepare(clip, spec)
    assert got.shape == (1, 6, 3, 64, 64)
    for number in range(6):
        one = prepare(Frame(clip.rgb_THWC[number], 0, 0.0), spec)
        assert torch.equal(got[:, number], one)
    batch = torch.rand(2, 3, 3, 100, 140)
    assert torch.equal(prepare(batch, spec)[1, 2][None], prepare(batch[1, 2][None], spec))
    assert torch.equal(prepare(clip.video_BTCHW, spec)[0], prepare(clip.video_BTCHW[0], spec))


def test_input_is_not_modified() -> None:
    frame = frame_of((96, 96))
    before, image = frame.rgb_HWC.clone(), frame.image_BCHW
    kept = image.clone()
    prepare(frame, InputSpec((96, 96), 96))
    prepare(image, InputSpec((96, 96), 96))
    prepare(Clip(frame.rgb_HWC[None], (0.0,)), InputSpec((96, 96), None))
    assert torch.equal(frame.rgb_HWC, before)
    assert torch.equal(image, kept)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (torch.rand(1, 240, 320, 3), "channels seem to be last"),
        (torch.rand(1, 4, 240, 320), "it has 4 channels"),
        (torch.rand(1, 1, 240, 320), "it has 1 channels"),
        (torch.rand(3, 240, 320), "it has 3 axes"),
        (torch.randint(0, 255, (1, 3, 240, 320), dtype=torch.uint8), r"torch.uint8 .* write pixels.float\(\) / 255"),
        (torch.rand(1, 3, 240, 320) * 255, "with values from 0.* to 25"),
        (torch.rand(1, 3, 240, 320) - 0.5, "do not normalise"),
        (torch.full((1, 3, 240, 320), torch.nan), "with values from nan"),
        (torch.rand(1, 3, 0, 320), "holds no pixel"),
        ("clip.mp4", "was given str"),
        (Frame(torch.rand(4, 4, 3), 0, 0.0), "expected torch.uint8"),
        (Clip(torch.zeros(1, 4, 4, 1, dtype=torch.uint8), (0.0,)), "expected torch.uint8 with 3 channels last"),
    ],
)
def test_wrong_inputs_say_what_was_given_and_expected(wrong: object, why: str) -> None:
    with pytest.raises(LayoutError, match=why) as caught:
        prepare(wrong, InputSpec())  # type: ignore[arg-type]
    assert "expected" in str(caught.value)


def test_specs_that_cannot_work() -> None:
    with pytest.raises(LayoutError, match="smaller than the crop"):
        prepare(frame_of((96, 96)), InputSpec((224, 224), 128))
    with pytest.raises(LayoutError, match="use 'bilinear' or 'bicubic'"):
        prepare(frame_of((96, 96)), InputSpec(interpolation="nearest"))


sizes = st.tuples(st.integers(32, 900), st.integers(32, 900))


@given(sizes, st.none() | st.integers(64, 300), st.tuples(st.integers(16, 64), st.integers(16, 64)))
def test_points_and_boxes_go_there_and_back(size: tuple[int, int], resize: int | None, crop: tuple[int, int]) -> None:
    spec = InputSpec(crop, resize)
    points = torch.rand(4, 5, 2, dtype=torch.float64) * 900
    torch.testing.assert_close(unprepare_points(prepare_points(points, size, spec), size, spec), points)
    boxes = torch.rand(3, 4, dtype=torch.float64) * 200
    torch.testing.assert_close(prepare_boxes(unprepare_boxes(boxes, size, spec), size, spec), boxes)


@pytest.mark.parametrize("spec", SPECS[:5])
@pytest.mark.parametrize("size", [(240, 320), (321, 243)])
def test_a_spot_is_found_where_it_was(size: tuple[int, int], spec: InputSpec) -> None:
    """Independent of the arithmetic: a bright spot goes through the pixels, its centre back through the points."""
    for x, y in ((size[1] * 0.4, size[0] * 0.55), (size[1] * 0.6, size[0] * 0.4)):
        rows, columns = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
        spot = torch.exp(-((columns - x) ** 2)[None, :] / 50 - ((rows - y) ** 2)[:, None] / 50)
        flat = spec.replace(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        seen = prepare(spot.expand(1, 3, *size), flat)[0, 0]
        seen = seen.clamp(min=0.01) - 0.01
        centre = torch.tensor([
            float((seen.sum(0) * (torch.arange(spec.size_px[1]) + 0.5)).sum() / seen.sum()),
            float((seen.sum(1) * (torch.arange(spec.size_px[0]) + 0.5)).sum() / seen.sum()),
        ])  # fmt: skip
        found = unprepare_points(centre[None], size, spec)[0]
        assert found.tolist() == pytest.approx([x, y], abs=0.15)
