"""Any clip model as an exact stream, or a refusal with the place."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from clip_graph.nets import NETS, REFUSED, Causal, Everything, Recurrent, Refused, TwoRates
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sidestream as ss
from contract import assert_equal, check_streaming_layer
from sidestream.circuit.segment import shapes_of
from sidestream.errors import LayoutError, ModelError
from sidestream.nn.steppable import step_through
from sidestream.types import NOTHING


def clip_of(num_frames: int, *, streams: int = 2, px: int = 12, seed: int = 1, dtype: Any = torch.float64) -> Tensor:
    shape = (streams, num_frames, 3, px, px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net_of(name: str, dtype: Any = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    net = NETS[name]().to(dtype).eval()
    for value in net.state_dict().values():
        if value.ndim == 1 and value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)  # norms that hide nothing
    return net


@cache
def made(name: str) -> tuple[nn.Module, Any]:
    """A net and its stream; not to be changed."""
    net = net_of(name)
    return net, ss.to_stream(net, clip_of(8))


@pytest.mark.parametrize("name", NETS)
def test_keeps_the_streaming_contract(name: str) -> None:
    _, stream = made(name)
    check_streaming_layer(stream, clip_of(13, seed=2), is_causal=stream.delay_ticks == 0)


@pytest.mark.parametrize("num_frames", [4, 8, 9, 12, 23])
@pytest.mark.parametrize("name", NETS)
def test_answers_are_the_models_on_clips_of_any_length(name: str, num_frames: int) -> None:
    (net, stream), clip = made(name), clip_of(num_frames, seed=4)
    with torch.no_grad():
        expected = net(clip)
        answers, _ = step_through(stream, clip, and_finish=True)
    if expected.ndim == answers.ndim:
        torch.testing.assert_close(answers, expected, rtol=1e-9, atol=1e-11)
    else:
        torch.testing.assert_close(answers[:, -1], expected, rtol=1e-9, atol=1e-11)


DELAYS = {
    "everything": (6, 2),  # 2 of the stem, 1 of the shift, 2 of the dilation, 1 of the kernel with the stride
    "causal": (0, 1),
    "shift in place": (1, 1),
    "lstm": (0, 1),
    "over time 1d": (2, 2),
    "differences": (1, 1),
    "attention in a frame": (0, 1),
    "two rates": (5, 4),  # one slow frame, that is four, and the newest fast mean of its step: 3 + 2
}


@pytest.mark.parametrize("name", DELAYS)
def test_delay_and_rate_follow_from_the_graph(name: str) -> None:
    _, stream = made(name)
    assert (stream.delay_ticks, stream.period_ticks) == DELAYS[name]


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_torchvisions_nets_say_what_their_hand_made_twins_say(name: str) -> None:
    from torchvision.models import get_model

    from sidestream.models.conv3d_net import Conv3dNet

    torch.manual_seed(0)
    net, clip = get_model(name, weights=None).eval(), clip_of(10, streams=1, px=32, dtype=torch.float32)
    stream, twin = ss.to_stream(net, clip[:, :6].transpose(1, 2), layout="BCTHW"), Conv3dNet(net).streaming()
    assert (stream.delay_ticks, stream.period_ticks) == (twin.delay_ticks, twin.period_ticks)
    with torch.no_grad():
        answers, _ = step_through(stream, clip, and_finish=True)
        each, _ = step_through(twin, clip, and_finish=True)
        means = each.cumsum(1) / torch.arange(1, each.shape[1] + 1).view(1, -1, 1)
        torch.testing.assert_close(answers, means, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(answers[:, -1], net(clip.transpose(1, 2)), rtol=1e-4, atol=1e-5)


def _hub(name: str) -> tuple[nn.Module, Tensor]:
    hub = pytest.importorskip("pytorchvideo.models.hub")
    clip = torch.rand(1, 3, {"c2d_r50": 8, "x3d_xs": 4}.get(name, 8), 224, 224)
    return getattr(hub, name)(pretrained=False).eval(), clip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["c2d_r50", "i3d_r50", "slow_r50"])
def test_pytorchvideos_nets(name: str) -> None:
    net, clip = _hub(name)
    longer = torch.rand(1, 3, 13, 224, 224)
    stream = ss.to_stream(net, clip, layout="BCTHW")
    with torch.no_grad():
        for given in (clip, longer):
            answers, _ = step_through(stream, given.transpose(1, 2), and_finish=True)
            torch.testing.assert_close(answers[:, -1], net(given), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_torchvisions_s3d() -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    net, clip = get_model("s3d", weights=None).eval(), torch.rand(1, 3, 16, 224, 224)
    answers, _ = step_through(ss.to_stream(net, clip, layout="BCTHW"), clip.transpose(1, 2), and_finish=True)
    with torch.no_grad():
        torch.testing.assert_close(answers[:, -1], net(clip), rtol=1e-3, atol=1e-5)


class OneClip(nn.Module):
    """pytorchvideo's SlowFast, which takes a list of two clips, on one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, clip_BCTHW: Tensor) -> Tensor:
        return self.net([clip_BCTHW[:, :, ::4], clip_BCTHW])


@pytest.mark.slow
def test_pytorchvideos_slowfast_whose_head_takes_one_length_only() -> None:
    slowfast = pytest.importorskip("pytorchvideo.models.slowfast")
    torch.manual_seed(0)
    net = slowfast.create_slowfast(model_depth=50, head_pool_kernel_sizes=((4, 1, 1), (16, 1, 1)), model_num_class=7)
    net, clip = OneClip(net).eval(), torch.rand(1, 3, 16, 32, 32)
    stream = ss.to_stream(net, clip, layout="BCTHW")
    with torch.no_grad():
        for given in (clip, clip.flip(2)):
            answers, _ = step_through(stream, given.transpose(1, 2), and_finish=True)
            torch.testing.assert_close(answers[:, -1], net(given), rtol=1e-3, atol=1e-5)
    with pytest.raises(RuntimeError):  # and its pooling is what it was
        net(torch.rand(1, 3, 32, 32, 32))


def test_x3d_is_refused_at_its_squeeze_and_excitation() -> None:
    x3d = pytest.importorskip("pytorchvideo.models.x3d")
    net = x3d.create_x3d(input_clip_length=4, input_crop_size=32, model_num_class=5, depth_factor=0.5).eval()
    with pytest.raises(ModelError, match=r"norm_b.*squeeze_excitation\.py.*SlidingWindow"):
        ss.to_stream(net, torch.rand(1, 3, 4, 32, 32), layout="BCTHW")


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_step_form_is_refused_with_the_place(name: str) -> None:
    mix, said = REFUSED[name]
    net = Refused(mix).double().eval()
    with pytest.raises(ModelError, match=f"(?s)({said})") as refusal:
        ss.to_stream(net, clip_of(8))
    if said not in ("more for more frames",):
        assert "nets.py:" in str(refusal.value), "the line of the model's code"
        assert "SlidingWindow" in str(refusal.value)


@pytest.mark.slow
def test_a_video_transformer_is_refused() -> None:
    net = ss.create_model("videomae_small").eval()
    with pytest.raises(ModelError, match=r"SlidingWindow|number of frames"):
        ss.to_stream(net, torch.rand(1, 16, 3, 224, 224))


class Counting(nn.Module):
    """Answers with how often it was called, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        self.calls += 1
        return clip_BTCHW.mean((1, 3, 4)) + self.calls


def test_a_model_that_writes_to_buffers_is_refused_and_is_as_it_was() -> None:
    net = Counting().eval()
    with pytest.raises(ModelError, match="buffer 'calls'"):
        ss.to_stream(net, clip_of(8))
    assert net.calls == 0


def test_norms_over_the_clip_are_refused() -> None:
    for norm in (nn.InstanceNorm3d(3), nn.GroupNorm(1, 3), nn.BatchNorm3d(3, track_running_stats=False)):
        net = nn.Sequential(norm, nn.Conv3d(3, 2, 3)).double().eval()
        with pytest.raises(ModelError, match="mixes frames"):
            ss.to_stream(net, clip_of(8).transpose(1, 2), layout="BCTHW")


def test_wrong_input_is_refused() -> None:
    net, clip = net_of("causal"), clip_of(8)
    with pytest.raises(ModelError, match="training mode"):
        ss.to_stream(copy.deepcopy(net).train(), clip)
    with pytest.raises(LayoutError, match="BCTHW"):
        ss.to_stream(net, clip.transpose(1, 2))
    with pytest.raises(LayoutError, match="one letter per axis"):
        ss.to_stream(net, clip, layout="TBCHW")
    with pytest.raises(LayoutError, match="axes"):
        ss.to_stream(net, clip[0])
    with pytest.raises(LayoutError, match="1 frame"):
        ss.to_stream(net, clip[:, :1])
    with pytest.raises(LayoutError, match="list"):
        ss.to_stream(net, [clip, clip])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="mean_over"):
        ss.to_stream(net, clip, mean_over=0)
    stream = ss.to_stream(net, clip)
    with pytest.raises(LayoutError, match="was made for"):
        stream.step(clip[:1, 0], stream.init_state(clip[:, 0]))
    with pytest.raises(LayoutError, match="too short"):
        ss.to_stream(net_of("over time 1d"), clip)(clip[:, :1])


def test_a_mean_over_the_newest_frames() -> None:
    net, clip = net_of("attention in a frame"), clip_of(9)
    stream = ss.to_stream(net, clip_of(4), mean_over=4)
    answers, state = step_through(stream, clip)
    with torch.no_grad():
        for n in range(9):
            expected = net(clip[:, max(0, n - 3) : n + 1])
            torch.testing.assert_close(answers[:, n], expected, rtol=1e-9, atol=1e-11)
    assert sum(leaf.numel() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)) == 4 * 2 * 3


@pytest.mark.parametrize("name", NETS)
def test_memory_is_bounded_and_ticks_are_of_few_kinds(name: str) -> None:
    stream, clip = made(name)[1], clip_of(1)
    state, kinds, sizes = stream.init_state(clip[:, 0]), [], []
    for _ in range(80):
        _, state = stream.step(clip[:, 0], state)
        kinds.append(shapes_of(state))
        sizes.append(sum(leaf.numel() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)))
    assert all(kind in kinds[:48] for kind in kinds[48:])
    assert max(sizes[40:]) == max(sizes[24:40])


def test_parameters_are_the_models_own_and_it_is_as_it_was() -> None:
    net = net_of("lstm")
    before, keys = {k: v.clone() for k, v in net.state_dict().items()}, set(vars(net.recur))
    stream = ss.to_stream(net, clip_of(8))
    assert {id(p) for p in stream.parameters()} == {id(p) for p in net.parameters()}
    assert set(vars(net.recur)) == keys
    assert_equal(dict(net.state_dict()), before)
    clip = clip_of(6)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
        answers, _ = step_through(stream, clip)
        torch.testing.assert_close(answers[:, -1], net(clip), rtol=1e-9, atol=1e-11)
    apart = copy.deepcopy(stream)
    with torch.no_grad():
        next(iter(apart.parameters())).zero_()
        assert_equal(step_through(stream, clip)[0], answers)


def test_a_frame_that_its_owner_changes_afterwards() -> None:
    stream, clip = made("everything")[1], clip_of(12)
    expected, _ = step_through(stream, clip, and_finish=True)
    state, answers = stream.init_state(clip[:, 0]), []
    for frame in clip.unbind(1):
        mine = frame.clone()
        answer, state = stream.step(mine, state)
        mine.fill_(float("nan"))
        if answer is not NOTHING:
            answers.append(answer.clone())
            answer.fill_(float("nan"))
    answers += [a.clone() for a in stream.finish(state)]
    assert_equal(torch.stack(answers, dim=1), expected)


@cache
def single(make: Any) -> Any:
    torch.manual_seed(0)
    return ss.to_stream(make().eval(), clip_of(8, streams=1, dtype=torch.float32))


class HandedOn(nn.Module):
    """An operation whose result lies in the memory of the frame, before what is remembered."""

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        x = clip_BTCHW.diagonal(dim1=3, dim2=4)
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1) + clip_BTCHW.mean(4)


def test_frames_and_answers_that_operations_hand_on_are_copied() -> None:
    clip = clip_of(7)
    stream = ss.to_stream(HandedOn().eval(), clip_of(8))
    expected, state, answers = HandedOn()(clip), stream.init_state(clip[:, 0]), []
    for frame in clip.unbind(1):
        mine = frame.clone()
        answer, state = stream.step(mine, state)
        mine.fill_(float("nan"))
        if answer is not NOTHING:
            answers.append(answer.clone())
            answer.fill_(float("nan"))
    answers += [a.clone() for a in stream.finish(state)]
    torch.testing.assert_close(torch.stack(answers, dim=1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("num_stages", "executor"), [(1, "inline"), (2, "threads"), (5, "threads"), (5, "inline"), (2, "sequential")]
)
@pytest.mark.parametrize("make", [Everything, Causal, TwoRates, Recurrent])
def test_cut_and_run(make: Any, num_stages: int, executor: str) -> None:
    clip, stream = clip_of(11, streams=1, dtype=torch.float32), single(make)
    expected, _ = step_through(stream, clip, and_finish=True)
    num_stages = min(num_stages, len(stream.layers))  # a net without a joint is one layer
    circuit = ss.pipelined(ss.cut(stream, clip[:, 0], num_stages=num_stages, costs="uniform"))
    found = [o.value.clone() for o in ss.run(circuit, list(clip.unbind(1)), executor=executor)]
    torch.testing.assert_close(torch.stack(found, dim=1), expected, rtol=1e-5, atol=1e-6)
