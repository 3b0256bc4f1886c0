"""par-DenseNet and par-Inception: equal to public nets, one set of weights in every wiring, ages, clocks, feedback."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidestream.circuit.ages import ages, information_latency_ticks, latency_ticks
from sidestream.circuit.net_stages import net_circuit, stages_of_net
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel, pipelined, sequential, with_periods
from sidestream.engine.run import run
from sidestream.engine.unroll import reason_for_ticks, unroll
from sidestream.errors import LayoutError, ModelError, WeightsError
from sidestream.models import create_model
from sidestream.models.depth_net import DepthNet, answer_as_maps
from sidestream.models.i3d import I3D
from sidestream.models.parallel_densenet import ParDenseNet, densenet_keys
from sidestream.models.parallel_inception import ParInception
from sidestream.models.pretrained import from_pretrained, save_pretrained
from sidestream.models.weights import load_weights, save_weights
from sidestream.nn.steppable import step_through

KINDS = ["densenet", "inception"]


def net_of(kind: str, *, points: int = 0, feedback: bool = False) -> DepthNet:
    """Tiny, in float64, with batch norms that do something and feedback that is felt."""
    torch.manual_seed(0)
    if kind == "densenet":
        net: DepthNet = ParDenseNet(3, stages=(3, 2), growth=2, stem=4, bottleneck=2, num_layers=1)
    else:
        net = ParInception(3, width=1 / 32)
    net.num_inner = 3
    if points:
        net.with_dense_head(points)
    if feedback:
        net.add_feedback()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(m.weight, 0.7, 1.5)
    for name, p in net.named_parameters():
        if "feedback" in name or (points and name.startswith("head") and p.ndim > 1):
            nn.init.normal_(p, std=0.5)
    return net.double().eval()


def clip_of(num_frames: int = 12, size_px: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, num_frames, 3, size_px, size_px, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_densenet_is_torchvisions_on_every_frame() -> None:
    from torchvision.models import DenseNet

    torch.manual_seed(0)
    public = DenseNet(growth_rate=4, block_config=(4, 2, 2, 4), num_init_features=8, bn_size=2, num_classes=5)
    net = ParDenseNet(5, stages=(2, 1, 1, 2), growth=4, stem=8, bottleneck=2, num_pools=3)
    for m in public.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
    net.load_state_dict(densenet_keys((2, 1, 1, 2))(public.state_dict()))
    clip = torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([public.eval()(x) for x in clip.unbind(1)], 1)
    torch.testing.assert_close(net.eval().answers(clip), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(clip), expected.mean(1), rtol=1e-4, atol=1e-5)
    assert net.stride_px == 32


@torch.no_grad()
def test_inception_has_the_layers_of_the_causal_i3d() -> None:
    """The same keys and shapes; the first unit, which is the same but for its stride, answers as it on every second."""
    torch.manual_seed(0)
    causal = I3D(3, width=1 / 32, is_causal=True).double().eval()
    net = net_of("inception")
    net.load_state_dict(causal.state_dict())
    clip = clip_of(8).transpose(1, 2)
    own, strided = net.get_submodule("Conv3d_1a_7x7")(clip), causal.get_submodule("Conv3d_1a_7x7")(clip)
    torch.testing.assert_close(own[:, :, ::2], strided)
    x = own
    for name in list(dict(causal.named_children()))[1:-1]:
        x = net.get_submodule(name)(x)
    torch.testing.assert_close(net.features(clip.transpose(1, 2)).transpose(1, 2), x)
    torch.testing.assert_close(net.answers(clip.transpose(1, 2)), net.get_submodule("logits")(x))


@pytest.mark.parametrize(
    ("kind", "points", "feedback"),
    [("densenet", 0, False), ("densenet", 2, True), ("inception", 2, False), ("inception", 0, True)],
)
@torch.no_grad()
def test_one_set_of_weights_in_every_wiring(kind: str, points: int, feedback: bool) -> None:
    """Sequential == the clip form == the stream; pipelined, parallel with equalised skips, semi-parallel: shifted."""
    net, clip = net_of(kind, points=points, feedback=feedback), clip_of(12)
    expected = net.answers(clip)
    assert expected.shape == (1, 12, *((points, 8, 8) if points else (3,)))
    streamed, _ = step_through(net.streaming(), clip)
    torch.testing.assert_close(streamed, expected, rtol=1e-9, atol=1e-12)
    found = unroll(net_circuit(net, clip[:, 0], "sequential"), clip)
    torch.testing.assert_close(found.answers, expected, rtol=1e-9, atol=1e-12)
    own = {p.data_ptr() for p in net.parameters()}
    circuits = {name: net_circuit(net, clip[:, 0], name) for name in ("pipelined", "parallel", "semi-parallel:2")}
    for circuit in circuits.values():
        assert {p.data_ptr() for s in circuit.stages for p in s.module.parameters()} == own
    if feedback:
        return  # what is fed back is older then: another function
    circuits["parallel"] = parallel(stages_of_net(net, clip[:, 0]), equalise_skips=True)
    for name, circuit in circuits.items():
        shift = 1 if name.startswith("semi") else circuit.num_stages - 1
        assert latency_ticks(circuit) == information_latency_ticks(circuit) == shift
        answers = unroll(circuit, clip, drain=False).answers
        torch.testing.assert_close(answers, expected[:, : 12 - shift], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feedback", [False, True])
@torch.no_grad()
def test_the_machine_answers_the_same_and_ways_agree(kind: str, feedback: bool) -> None:
    net, clip = net_of(kind, feedback=feedback), clip_of(11)
    circuit = net_circuit(net, clip[:, 0], "parallel")
    assert (reason_for_ticks(circuit) is None) != feedback
    found = unroll(circuit, clip)
    for n, output in enumerate(run(circuit, clip.unbind(1), executor="inline")):
        torch.testing.assert_close(found.answers[:, n], output.value.clone(), rtol=1e-9, atol=1e-12)
    by_ticks = unroll(circuit, clip, way="ticks")
    torch.testing.assert_close(found.answers, by_ticks.answers, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_ways_agree(kind: str) -> None:
    net, clip = net_of(kind), clip_of(11)
    circuit = net_circuit(net, clip[:, 0], "parallel")
    rows = []
    for way in ("ticks", "stages"):
        answers = unroll(circuit, clip, way=way, drain=False).answers  # type: ignore[arg-type]
        rows.append(torch.autograd.grad(answers.square().sum(), list(net.parameters())))
    for (name, _), a, b in zip(net.named_parameters(), *rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=name)


def test_ages_of_the_dense_connections() -> None:
    """Stages 1 2 3 | 4 5; 4 reads 1, 2 and 3, 5 reads 4; one tick per wire: by enumeration of the paths."""
    circuit = net_circuit(net_of("densenet"), clip_of(1)[:, 0], "parallel")
    reads = {1: (0,), 2: (1,), 3: (1, 2), 4: (1, 2, 3), 5: (4,)}
    assert {n: tuple(w.source for w in circuit.wires_into(n)) for n in reads} == reads

    @cache
    def paths(n: int) -> frozenset[int]:
        return frozenset({0}) if n < 2 else frozenset(a + 1 for m in reads[n] for a in paths(m))

    assert [set(a) for a in ages(circuit)[1:-1]] == [set(paths(n)) for n in reads]
    assert set(ages(circuit)[-1]) == {2, 3, 4}
    assert (latency_ticks(circuit), information_latency_ticks(circuit)) == (4, 2)
    fresh = net_circuit(net_of("densenet"), clip_of(1)[:, 0], "semi-parallel:2:fresh")
    assert latency_ticks(fresh) == 1


@pytest.mark.parametrize("name", ["par_densenet", "par_densenet_tiny", "par_inception_quarter"])
def test_named_nets_have_the_latencies_that_are_documented(name: str) -> None:
    num_stages, newest = {"par_densenet": (14, 4), "par_densenet_tiny": (8, 3), "par_inception_quarter": (10, 9)}[name]
    net: Any = create_model(name, num_classes=3)
    circuit = net_circuit(net, torch.zeros(1, 3, 32, 32), "parallel")
    assert circuit.num_stages == num_stages
    assert latency_ticks(circuit) == num_stages - 1
    assert information_latency_ticks(circuit) == newest
    assert latency_ticks(net_circuit(net, torch.zeros(1, 3, 32, 32), "semi-parallel:5")) == 4


def counted(circuit: Circuit) -> tuple[Circuit, list[int]]:
    """The circuit with stages that count how often they are called."""
    calls = [0] * circuit.num_stages

    def counting(number: int, step: Any) -> Any:
        def called(inputs: Any, state: Any) -> Any:
            calls[number] += 1
            return step(inputs, state)

        return called

    stages = tuple(replace(s, step=counting(n, s.step)) for n, s in enumerate(circuit.stages))
    return circuit.replace(stages=stages), calls


@torch.no_grad()
def test_clocks_do_the_work_of_their_periods() -> None:
    """In N ticks stage i computes N / p_i times, so N sum c_i / p_i in all (N: a multiple of the periods)."""
    net, clip = net_of("densenet"), clip_of(16)
    periods = (1, 1, 2, 4, 4)
    plain = sequential(stages_of_net(net, clip[:, 0]))
    circuit, calls = counted(with_periods(plain, periods))
    answers = unroll(circuit, clip, way="ticks").answers
    assert calls == [16 // p for p in periods]
    expected = net.answers(clip)
    for t in range(16):  # the last stage holds what it made in every fourth tick
        torch.testing.assert_close(answers[:, t], expected[:, t - t % 4], rtol=1e-9, atol=1e-12)
    parallel_circuit, calls = counted(with_periods(pipelined(stages_of_net(net, clip[:, 0])), periods))
    for _ in run(parallel_circuit, clip.unbind(1), executor="inline"):
        pass
    assert calls == [16 // p for p in periods]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wiring", ["sequential", "parallel"])
@torch.no_grad()
def test_feedback_is_felt_and_causal(kind: str, wiring: str) -> None:
    """NaN in frame 10: no answer before the tick in which it can arrive changes; later ones are poisoned for good."""
    net, clip = net_of(kind, points=2, feedback=True), clip_of(14)
    circuit = net_circuit(net, clip[:, 0], wiring)
    whole = unroll(circuit, clip, drain=False)
    poisoned = clip.clone()
    poisoned[:, 10] = float("nan")
    seen = unroll(circuit, poisoned, drain=False)
    first = 10 + information_latency_ticks(circuit)
    for n, tick in enumerate(whole.ticks):
        if tick < first:
            torch.testing.assert_close(seen.answers[:, n], whole.answers[:, n], rtol=0, atol=0)
        elif wiring == "sequential":
            assert seen.answers[:, n].isnan().any()
    plain = net_of(kind, points=2)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "feedback" not in k})
    without = unroll(net_circuit(plain, clip[:, 0], wiring), clip, drain=False).answers
    assert not torch.allclose(without[:, -1], whole.answers[:, -1], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_feedback_begins_as_the_net_without_and_is_a_concatenation(kind: str) -> None:
    net, clip = net_of(kind), clip_of(5)
    before = net.answers(clip)
    net.add_feedback()
    torch.testing.assert_close(net.answers(clip), before, rtol=1e-9, atol=1e-12)
    assert net.double().no_answer(clip).shape == (1, 3)
    block = net.depth_blocks()[net.feedback_into - 1]
    assert block.reads_answer
    assert sum(b.reads_answer for b in net.depth_blocks()) == 1


@torch.no_grad()
def test_feedback_into_a_dense_stage_is_a_wider_first_convolution() -> None:
    net = net_of("densenet", feedback=True)
    stage: Any = net.get_submodule("stages.1")
    x, answer = torch.randn(2, 6, 8, 8).double(), torch.randn(2, 3).double()
    layer = stage.layers[0]
    wide = torch.cat([layer.conv1.weight, stage.feedback.weight], 1)
    maps = answer.softmax(1)[:, :, None, None].expand(-1, -1, 8, 8)
    inner = F.conv2d(torch.cat([F.relu(layer.norm1(x)), maps], 1), wide)
    torch.testing.assert_close(stage(x, answer), layer.conv2(F.relu(layer.norm2(inner))))


@pytest.mark.parametrize(
    ("name", "points"), [("par_densenet_tiny", 0), ("par_densenet_tiny", 2), ("par_inception_quarter", 0)]
)
@torch.no_grad()
def test_weights_with_feedback_load_by_name(name: str, points: int, tmp_path: Path) -> None:
    """They make the net one with feedback; files that do not fit leave it as it was; a saved model comes back too."""
    made: dict[str, Any] = {"num_classes": points or 3, "head": "keypoints" if points else "classes"}
    net: Any = create_model(name, **made)
    plain_file = save_weights(net, tmp_path / "plain.safetensors")
    net.add_feedback()
    nn.init.normal_(net.fed_module.feedback.weight)
    file = save_weights(net, tmp_path / "fed.safetensors")
    clip = torch.randn(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = net.answers(clip)
    found: Any = create_model(name, weights=file, **made)
    assert found.has_feedback
    assert found.answers(clip).equal(expected)
    assert not create_model(name, weights=plain_file, **made).answers(clip).equal(expected)  # type: ignore[operator]
    other: Any = create_model(name, **{**made, "num_classes": 5})
    before = other.answers(clip)
    with pytest.raises(WeightsError, match="of another shape"):
        load_weights(other, file)
    assert not other.has_feedback
    assert other.answers(clip).equal(before)
    with pytest.raises(WeightsError, match=r"1 missing: .*feedback\.weight"):
        load_weights(found, plain_file)
    saved: Any = from_pretrained(save_pretrained(net, tmp_path / "saved"))
    assert saved.answers(clip).equal(expected)


@torch.no_grad()
def test_heat_maps_go_in_with_a_peak_of_one() -> None:
    maps = torch.randn(2, 3, 4, 4)
    found = answer_as_maps(maps, torch.zeros(2, 1, 4, 4))
    soft = maps.flatten(2).softmax(2)
    torch.testing.assert_close(found.flatten(2), soft / soft.amax(2, keepdim=True))
    assert answer_as_maps(torch.zeros(1, 3, 1, 1), torch.zeros(2, 1, 5, 6)).equal(torch.ones(2, 3, 5, 6))


def test_refusals() -> None:
    with pytest.raises(LayoutError, match="needs 8 px"):
        net_of("densenet")(clip_of(2, 4))
    with pytest.raises(LayoutError, match="multiples of 8"):
        net_of("densenet", points=2)(clip_of(2, 20))
    with pytest.raises(LayoutError, match="no maps without"):
        net_of("densenet", feedback=True).features(clip_of(2))
    with pytest.raises(ModelError, match="give 1 or more"):
        ParDenseNet(3, growth=0)
    with pytest.raises(ModelError, match="factor above 0"):
        ParInception(3, width=0)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "feedback"), [("densenet", False), ("densenet", True), ("inception", False)])
def test_maps_that_would_not_lie_on_the_frame_are_refused_in_every_form(kind: str, feedback: bool) -> None:
    net = net_of(kind, points=2, feedback=feedback)
    wrong = torch.rand(1, 3, net.stride_px, net.stride_px * 3 // 2, dtype=torch.float64)
    message = f"was given frames of {net.stride_px} x {net.stride_px * 3 // 2} px; it takes multiples of"
    with pytest.raises(LayoutError, match=message):
        net.answers(wrong[:, None])
    stream = net.streaming()
    with pytest.raises(LayoutError, match=message):
        stream.step(wrong, stream.init_state(wrong))
    with pytest.raises(LayoutError, match=message):
        stream(wrong[:, None])
    with pytest.raises(LayoutError, match=message):
        net_circuit(net, wrong, "parallel")
    right = torch.rand(1, 3, net.stride_px, net.stride_px * 2, dtype=torch.float64)
    answer, _ = stream.step(right, stream.init_state(right))
    torch.testing.assert_close(answer, net.answers(right[:, None])[:, 0])
    small = torch.rand(1, 3, net.stride_px // 2, net.stride_px, dtype=torch.float64)
    classes = net_of(kind, feedback=feedback)
    with pytest.raises(LayoutError, match="px or more"):
        classes.streaming()(small[:, None])
