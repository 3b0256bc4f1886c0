"""I3D: against the net written out in plain torch, the golden logits of the reference, and itself on streams."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from contract import assert_equal, check_streaming_layer
from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import pipelined
from sidestream.engine.run import run
from sidestream.errors import LayoutError, WeightsError
from sidestream.models import create_model, info_of, input_spec_of, labels_of, list_models, save_weights
from sidestream.models.i3d import DELAY_TICKS, I3D, MIN_FRAMES
from sidestream.models.i3d_layers import MaxPool, Mixed, Sliding, Unit
from sidestream.nn.steppable import step_through
from sidestream.types import NOTHING
from sidestream.video import prepare, read

StateDict = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> Path:
    if not (data_dir / "i3d_kinetics400").is_dir():
        pytest.skip(f"{data_dir / 'i3d_kinetics400'} does not exist")
    return data_dir / "i3d_kinetics400"


@pytest.fixture(scope="module")
def weights(folder: Path) -> Path:
    return folder / "i3d_rgb_kinetics400_piergiaj_keys.pt"


@pytest.fixture(scope="module")
def raw(weights: Path) -> StateDict:
    """The file as it is."""
    return torch.load(weights, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def trained(weights: Path) -> Any:
    return create_model("i3d", weights=weights)


@pytest.fixture
def one_thread() -> Any:
    """Kernels may sum in another order on another number of threads; the engine uses one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def narrow(num_classes: int = 5, *, is_causal: bool = False) -> I3D:
    """An eighth of the channels, float64, weights and statistics that show every mistake."""
    generator = torch.Generator().manual_seed(4)
    net = I3D(num_classes, width=1 / 8, is_causal=is_causal).double().eval()
    for name, value in net.state_dict().items():
        if value.ndim == 5:
            fan_in = value[0].numel()
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * (2 / fan_in) ** 0.5)
        elif name.endswith(("weight", "running_var")):
            value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5)
        elif value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.2)
    return net


def moving_clip(num_frames: int, size_px: tuple[int, int], *, num_streams: int = 1) -> Tensor:
    shape = (num_streams, num_frames, 3, *size_px)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1


@pytest.fixture(scope="module")
def real_clip(folder: Path) -> Any:
    return read(folder / "v_CricketShot_g04_c01_rgb.gif")


def small(real_clip: Any, num_frames: int, size_px: tuple[int, int] = (64, 64)) -> Tensor:
    """The first frames of the real clip, small."""
    spec = create_spec().replace(size_px=size_px, resize_px=None)
    return prepare(real_clip, spec)[:, :num_frames]


def create_spec() -> Any:
    from sidestream.models import model_info

    return model_info("i3d").input_spec


# The slow twin: Inception-v1 from a state dict, with TensorFlow's rule for 'SAME' as its guide states it.


def same(x: Tensor, kernel: Any, stride: Any, value: float = 0.0) -> Tensor:
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), start=2):
        size = x.shape[axis]
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        before, after = list(x.shape), list(x.shape)
        before[axis], after[axis] = total // 2, total - total // 2
        x = torch.cat([x.new_full(before, value), x, x.new_full(after, value)], dim=axis)
    return x


def unit(x: Tensor, state: StateDict, key: str, stride: int = 1) -> Tensor:
    weight = state[f"{key}.conv3d.weight"]
    x = F.conv3d(same(x, weight.shape[2:], (stride,) * 3), weight, stride=stride)
    parts = ("running_mean", "running_var", "weight", "bias")
    mean, var, gain, shift = (state[f"{key}.bn.{part}"].reshape(-1, 1, 1, 1) for part in parts)
    return ((x - mean) / (var + 1e-3).sqrt() * gain + shift).clamp(min=0)


def pool(x: Tensor, kernel: Any, stride: Any) -> Tensor:
    return F.max_pool3d(same(x, kernel, stride, float("-inf")), kernel, stride)


def mixed(x: Tensor, state: StateDict, key: str) -> Tensor:
    branches = [
        unit(x, state, f"{key}.b0"),
        unit(unit(x, state, f"{key}.b1a"), state, f"{key}.b1b"),
        unit(unit(x, state, f"{key}.b2a"), state, f"{key}.b2b"),
        unit(pool(x, (3, 3, 3), (1, 1, 1)), state, f"{key}.b3b"),
    ]
    return torch.cat(branches, dim=1)


def slow_twin(clip_BTCHW: Tensor, state: StateDict) -> Tensor:
    """Logits over time (B, T', classes)."""
    x = unit(clip_BTCHW.movedim(2, 1), state, "Conv3d_1a_7x7", stride=2)
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, state, "Conv3d_2b_1x1"), state, "Conv3d_2c_3x3")
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = mixed(mixed(x, state, "Mixed_3b"), state, "Mixed_3c")
    x = pool(x, (3, 3, 3), (2, 2, 2))
    for letter in "bcdef":
        x = mixed(x, state, f"Mixed_4{letter}")
    x = pool(x, (2, 2, 2), (2, 2, 2))
    x = mixed(mixed(x, state, "Mixed_5b"), state, "Mixed_5c")
    x = F.avg_pool3d(x, (2, min(7, x.shape[3]), min(7, x.shape[4])), stride=1)
    x = F.conv3d(x, state["logits.conv3d.weight"], state["logits.conv3d.bias"])
    return x.mean((3, 4)).transpose(1, 2)


@pytest.mark.parametrize("num_frames", [9, 10, 13, 16, 23, 32, 48, 64, 79])
@torch.no_grad()
def test_equals_the_plain_net_at_any_length(num_frames: int) -> None:
    net = narrow()
    clip_BTCHW = moving_clip(num_frames, (33, 48), num_streams=2)
    expected = slow_twin(clip_BTCHW, net.state_dict())
    assert expected.shape == (2, -(-num_frames // 8) - 1, 5)
    assert expected.std() > 0.01
    torch.testing.assert_close(net.answers(clip_BTCHW), expected, rtol=1e-10, atol=1e-12)  # float64, order of sums
    torch.testing.assert_close(net(clip_BTCHW), expected.mean(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size_px", [(1, 1), (31, 95), (112, 57), (224, 230), (257, 193)])
@torch.no_grad()
def test_equals_the_plain_net_at_any_size(size_px: tuple[int, int]) -> None:
    net, clip_BTCHW = narrow(), moving_clip(9, size_px)
    expected = slow_twin(clip_BTCHW, net.state_dict())
    torch.testing.assert_close(net.answers(clip_BTCHW), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_frames", [32, 48, 64, 79])
@torch.no_grad()
def test_trained_weights_equal_the_plain_net(trained: Any, raw: StateDict, real_clip: Any, num_frames: int) -> None:
    """In float64, where only mistakes differ."""
    clip_BTCHW = small(real_clip, num_frames, (48, 64)).double()
    expected = slow_twin(clip_BTCHW, {key: value.double() for key, value in raw.items()})
    assert expected.abs().max() > 3  # real logits, not zeros
    answers = copy.deepcopy(trained).double().answers(clip_BTCHW)
    torch.testing.assert_close(answers, expected, rtol=1e-10, atol=1e-10)


def test_every_key_of_the_file_is_used(raw: StateDict, trained: Any) -> None:
    own = trained.state_dict()
    assert {k for k in own if not k.endswith("num_batches_tracked")} == raw.keys()
    assert all(torch.equal(own[key], value) for key, value in raw.items())


@torch.no_grad()
def test_golden_logits_of_the_reference(folder: Path, trained: Any, real_clip: Any) -> None:
    """All 400 logits of the reference (JAX) model on the 79 frames of the clip."""
    golden = torch.from_numpy(np.load(folder / "golden_cricket_gif_logits.npy")).reshape(-1)
    clip_BTCHW = prepare(real_clip, input_spec_of(trained))
    assert clip_BTCHW.shape == (1, 79, 3, 224, 224)
    torch.testing.assert_close(clip_BTCHW, real_clip.rgb_THWC.permute(0, 3, 1, 2)[None] / 255 * 2 - 1)
    logits_1N = trained(clip_BTCHW)
    torch.testing.assert_close(logits_1N[0], golden, rtol=0, atol=1e-4)  # float32 on other kernels
    best = int(logits_1N.argmax())
    assert labels_of(trained)[best] == "playing cricket"
    assert float(logits_1N.softmax(1)[0, best]) == pytest.approx(0.98856, abs=1e-5)


def test_labels_are_those_of_the_weights(folder: Path) -> None:
    lines = (folder / "label_map_k400.txt").read_text().splitlines()
    assert info_of(create_model("i3d")).labels == tuple(lines)


def test_by_name(tmp_path: Path) -> None:
    assert list_models("i3d*")[:2] == ["i3d", "i3d_causal"]
    model = create_model("i3d", num_classes=7)
    again = create_model("i3d_causal", num_classes=7, weights=save_weights(model, tmp_path / "seven.safetensors"))
    assert_equal(again.state_dict(), model.state_dict())
    assert info_of(model).labels is None
    spec = input_spec_of(model)
    assert (spec.layout, spec.num_frames, spec.min_frames, spec.causal) == ("BTCHW", 64, MIN_FRAMES, False)
    assert spec.delay_ticks == DELAY_TICKS == model.streaming().delay_ticks
    assert input_spec_of(again).delay_ticks == 0 == again.streaming().delay_ticks
    streaming_spec = input_spec_of(model.streaming())
    assert (streaming_spec.layout, streaming_spec.num_frames, streaming_spec.delay_ticks) == ("BCHW", 1, DELAY_TICKS)
    with pytest.raises(WeightsError, match="i3d has no default weights; give a local"):
        create_model("i3d", weights="default")
    with pytest.raises(WeightsError, match=r"of another shape: logits\.conv3d\.weight \(file \(7, 1024, 1, 1, 1\)"):
        create_model("i3d", weights=tmp_path / "seven.safetensors")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 3, 32, 32), r"given 8 frames; it needs 9 or more"),
        ((1, 3, 16, 32, 32), r"shape \(1, 3, 16, 32, 32\); expected \(B, T, 3, H, W\); .*use transpose\(1, 2\)"),
        ((1, 3, 32, 32), r"expected \(B, T, 3, H, W\)"),
    ],
)
def test_wrong_clips_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        narrow()(torch.zeros(shape, dtype=torch.float64))


# Streams.

LAYERS: list[Any] = [
    pytest.param(lambda c: Unit(3, 4, Sliding((7, 7, 7), (2, 2, 2), c)), id="stem"),
    pytest.param(lambda c: Unit(3, 4, Sliding((3, 3, 3), (1, 1, 1), c)), id="unit"),
    pytest.param(lambda c: MaxPool(Sliding((3, 3, 3), (2, 2, 2), c)), id="pool 3, stride 2"),
    pytest.param(lambda c: MaxPool(Sliding((2, 2, 2), (2, 2, 2), c)), id="pool 2, stride 2"),
    pytest.param(lambda c: Mixed(3, (2, 3, 4, 2, 3, 2), Sliding((3, 3, 3), (1, 1, 1), c)), id="mixed"),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("make", LAYERS)
def test_layers_keep_the_streaming_contract(make: Any, is_causal: bool) -> None:
    torch.manual_seed(1)
    layer = make(is_causal).double().eval()
    streaming, clip_BTCHW = layer.streaming(), moving_clip(8, (6, 6), num_streams=2)
    check_streaming_layer(streaming, clip_BTCHW, is_causal=is_causal)
    expected = layer(clip_BTCHW.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(streaming(clip_BTCHW), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("is_causal", "num_frames"), [(False, 88), (True, 24), (True, 21)])
@torch.no_grad()
def test_stream_equals_clip_on_every_answer(is_causal: bool, num_frames: int) -> None:
    """Frame by frame, each answer in its promised tick, the edges of the clip included."""
    net = narrow(is_causal=is_causal)
    stream, clip_BTCHW = net.streaming(), moving_clip(num_frames, (24, 16))
    assert (stream.delay_ticks, stream.period_ticks) == (0 if is_causal else 62, 8)
    expected, answers, ticks, state = net.answers(clip_BTCHW), [], [], stream.init_state(clip_BTCHW[:, 0])
    for tick, frame_BCHW in enumerate(clip_BTCHW.unbind(1)):
        answer, state = stream.step(frame_BCHW, state)
        if answer is not NOTHING:
            answers.append(answer)
            ticks.append(tick)
    assert ticks == list(range(stream.delay_ticks, num_frames, 8))
    whole = torch.stack([*answers, *stream.finish(state)], dim=1)
    assert whole.shape == expected.shape == (1, -(-num_frames // 8) - (not is_causal), 5)
    assert (expected[:, 1:] - expected[:, :-1]).abs().max() > 1e-3  # answers that differ from each other
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stream(clip_BTCHW), expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_trained_stream_equals_the_clip(trained: Any, real_clip: Any) -> None:
    clip_BTCHW = small(real_clip, 72)
    expected = trained.answers(clip_BTCHW)
    answers, _ = step_through(trained.streaming(), clip_BTCHW, and_finish=True)
    # float32: convolutions over one frame and over many sum in another order, through 20 layers; logits reach 27
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=5e-4)


def test_parameters_are_shared_not_copied() -> None:
    net = narrow()
    assert {id(p) for p in net.parameters()} == {id(p) for p in net.streaming().parameters()}
    assert {id(b) for b in net.buffers()} == {id(b) for b in net.streaming().buffers()}
    assert not net.streaming().training


@pytest.mark.parametrize("is_causal", [False, True])
@torch.no_grad()
def test_what_an_answer_may_see(is_causal: bool) -> None:
    """NaN from a frame on leaves the answers alone that were due before it, and reaches the one due at it."""
    net, num_frames = narrow(is_causal=is_causal), 80
    delay, clip_BTCHW = net.streaming().delay_ticks, moving_clip(num_frames, (16, 16))
    sound = net.answers(clip_BTCHW)
    for number in range(sound.shape[1]):
        newest = 8 * number + delay
        if newest >= num_frames:
            break
        poisoned = clip_BTCHW.clone()
        poisoned[:, newest + 1 :] = float("nan")
        assert torch.equal(net.answers(poisoned)[:, : number + 1], sound[:, : number + 1])
        poisoned[:, newest] = float("nan")
        assert net.answers(poisoned)[:, number].isnan().all()
    assert is_causal or number == 3


@torch.no_grad()
def test_causal_variant_has_the_same_weights_and_other_answers() -> None:
    plain, causal, clip_BTCHW = narrow(), narrow(is_causal=True), moving_clip(32, (32, 32))
    assert_equal(causal.state_dict(), plain.state_dict())
    assert causal.answers(clip_BTCHW).shape == (1, 4, 5)
    assert not torch.allclose(causal(clip_BTCHW), plain(clip_BTCHW), rtol=1e-3)


@torch.no_grad()
def test_pipelined_stream_equals_stepping_by_hand_to_the_bit(trained: Any, real_clip: Any, one_thread: None) -> None:
    clip_BTCHW = small(real_clip, 72)
    frames, stream = list(clip_BTCHW.unbind(1)), trained.streaming()
    by_hand, _ = step_through(stream, clip_BTCHW, and_finish=True)
    assert by_hand.shape == (1, 8, 400)
    stages = cut(stream, frames[0], num_stages=4)
    assert len(stages) == 4
    circuit = pipelined(stages)
    for executor, num_threads in (("inline", None), ("threads", 2), ("threads", 4)):
        outputs = list(run(circuit, frames, executor=executor, num_threads=num_threads))
        assert_equal([o.value for o in outputs], list(by_hand.unbind(1)), executor)
        assert [o.frame_index for o in outputs] == [8 * n for n in range(8)]


@torch.no_grad()
def test_a_stream_costs_an_eighth_of_the_sliding_window() -> None:
    """At the same answer rate: one every 8 frames, from 64 frames anew each time or from the state."""
    net, clip_BTCHW = narrow(), moving_clip(64, (32, 32))
    with FlopCounterMode(display=False) as window:
        net(clip_BTCHW)
    stream = net.streaming()
    _, state = step_through(stream, clip_BTCHW)
    with FlopCounterMode(display=False) as eight_frames:
        answers, _ = step_through(stream, clip_BTCHW[:, :8], state)
    assert answers.shape[1] == 1
    assert eight_frames.get_total_flops() == pytest.approx(window.get_total_flops() / 8, rel=0.02)
