"""Stage back ends: every one gives eager's answers, from several threads, and its old answers stay valid."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.stage import Link, Stage, Stages, Values
from sidestream.engine.backends import (
    BACKENDS,
    available_backends,
    compile_stages,
    cut_for_backend,
    rebalance,
    registry,
)
from sidestream.errors import BackendError, LayoutError, MissingExtraError

FAST = ["onnxruntime", "openvino"]
SLOW = pytest.param("inductor", marks=pytest.mark.slow)
TOLERANCE = 3e-5
"""Of the largest absolute output, float32: fused kernels and folded batch norms sum in another order."""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_stage(module: nn.Module, *example, name: str = "part") -> Stage:
    module.eval()

    def step(inputs: Values, state):
        with torch.no_grad():
            answer = module(*inputs)
        return tuple(answer) if isinstance(answer, tuple) else (answer,), state

    num_outputs = len(step(example, None)[0])
    return Stage(name, step, len(example), num_outputs, module=module, example_inputs=example)


def alone(stage: Stage) -> Stages:
    """A model of one stage: the source feeds it, and its outputs are the answer."""
    links = [Link(0, n, 1, n) for n in range(stage.num_inputs)] + [Link(1, n, 2, n) for n in range(stage.num_outputs)]
    in_spec = pytree.tree_structure((tuple(range(stage.num_inputs)), {}))
    return Stages((stage,), tuple(links), in_spec, pytree.tree_structure(tuple(range(stage.num_outputs))))


def on(backend: str, stage: Stage, **options) -> Stage:
    return compile_stages(alone(stage), backend, **options)[0]


def with_real_statistics(model: nn.Module, image_BCHW: Tensor) -> nn.Module:
    """Batch norms that have seen data: random ones let activations die out, and then any answer is near eager's."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.cat([image_BCHW, image_BCHW.flip(-1)]))
    return model.eval()


def assert_close(answers: Values, expected: Values, tolerance: float = TOLERANCE) -> None:
    assert len(answers) == len(expected)
    for answer, value in zip(answers, expected, strict=True):
        assert answer.shape == value.shape
        assert answer.dtype == value.dtype
        largest = value.abs().max()
        assert largest > 1e-3, "an answer of zeros proves nothing"
        assert (answer - value).abs().max() <= tolerance * largest


def an_image(size_px: int = 224, seed: int = 0) -> Tensor:
    return torch.randn(1, 3, size_px, size_px, generator=torch.Generator().manual_seed(seed))


class Dense(nn.Module):
    """The middle of a dense block: four branches come in, and all of them and a new one go out."""

    def __init__(self) -> None:
        super().__init__()
        model = with_real_statistics(torchvision.models.densenet121(), an_image())
        layers = [layer for name, layer in model.features.denseblock2.named_children()]
        self.layers = nn.ModuleList(layers[3:6])

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        kept = list(features)
        for layer in self.layers:
            kept.append(layer(kept))
        return (*kept, torch.cat(kept, 1))


def dense_stage() -> Stage:
    torch.manual_seed(0)
    features = [torch.randn(1, channels, 28, 28) for channels in (128, 32, 32, 32)]
    return make_stage(Dense(), *features, name="denseblock2.part")


def image_stage(name: str) -> Stage:
    torch.manual_seed(0)
    if name == "vit_tiny":
        return make_stage(timm.create_model("vit_tiny_patch16_224", num_classes=50, depth=4), an_image(), name=name)
    model = getattr(torchvision.models, name)(num_classes=50)
    return make_stage(with_real_statistics(model, an_image()), an_image(), name=name)


def small_stage(name: str = "small") -> Stage:
    """Convolution, batch norm, gate and a skip: some milliseconds, and something to fuse."""
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish(), nn.Conv2d(16, 8, 3))
    return make_stage(body, an_image(64), name=name)


class Odd(nn.Module):
    """Everything a wire can carry: strided, whole-number, truth and scalar tensors, numbers, None, passed through."""

    def forward(self, x, factor, skip, mask, index, nothing):
        y = torch.where(mask, x * factor, x)
        made = (y, y.argmax(1), mask.logical_not(), x.transpose(1, 2), index + 1, x.sum())
        return (*made, skip, 7, nothing, y)


ODD_EXAMPLE = (
    an_image(8).transpose(2, 3),
    0.5,
    torch.randn(2, generator=torch.Generator().manual_seed(3)),
    an_image(8, 1) > 0,
    torch.tensor(3),
    None,
)


def test_every_back_end_is_listed_and_here() -> None:
    assert available_backends() == {"eager": None, "inductor": None, "onnxruntime": None, "openvino": None}


def test_eager_is_the_stage_itself() -> None:
    stages = alone(small_stage())
    assert compile_stages(stages, "eager")[0] is stages[0]


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("onnxruntime", "mobilenet_v3_small"),
        ("openvino", "resnet18"),
        ("onnxruntime", "vit_tiny"),
        ("openvino", "vit_tiny"),
        pytest.param("onnxruntime", "resnet18", marks=pytest.mark.slow),
        pytest.param("openvino", "mobilenet_v3_small", marks=pytest.mark.slow),
        pytest.param("inductor", "resnet18", marks=pytest.mark.slow),
        pytest.param("inductor", "mobilenet_v3_small", marks=pytest.mark.slow),
        pytest.param("inductor", "vit_tiny", marks=pytest.mark.slow),
    ],
)
def test_a_whole_model_answers_as_eager(backend: str, name: str) -> None:
    stage = image_stage(name)
    other = on(backend, stage)
    for seed in (1, 2):
        frame = (an_image(seed=seed),)
        assert_close(other.step(frame, None)[0], stage.step(frame, None)[0])


@pytest.mark.parametrize("backend", [*FAST, SLOW])
def test_a_cut_inside_a_dense_block_answers_as_eager(backend: str) -> None:
    stage = dense_stage()
    other = on(backend, stage)
    features = tuple(torch.randn_like(value) for value in stage.example_inputs)
    answers = other.step(features, None)[0]
    assert_close(answers, stage.step(features, None)[0])
    for passed, given in zip(answers, features, strict=False):
        assert passed is given


@pytest.mark.parametrize("backend", [*FAST, SLOW])
def test_odd_values_answer_as_eager(backend: str) -> None:
    stage = make_stage(Odd(), *ODD_EXAMPLE)
    inputs = (an_image(8, 5).transpose(2, 3), 0.5, torch.ones(2), an_image(8, 6) > 0, torch.tensor(11), None)
    answers = on(backend, stage).step(inputs, None)[0]
    for answer, expected in zip(answers, stage.step(inputs, None)[0], strict=True):
        if isinstance(expected, Tensor):
            assert answer.dtype == expected.dtype
            # a sum over 192 numbers in another order; everything else is exact
            torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 if expected.dim() == 0 else 0)
        else:
            assert answer == expected
    assert answers[6] is inputs[2]


def test_inductor_answers_as_eager_from_other_threads() -> None:
    stage = make_stage(nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(1, 8))
    other = on("inductor", stage)
    assert other.backend == "inductor"
    frames = [(torch.randn(1, 8),) for _ in range(20)]
    second = on("inductor", make_stage(nn.Sequential(nn.Linear(8, 4), nn.Sigmoid()), torch.randn(1, 8)))
    assert second.step(frames[0], None)[0][0].shape == (1, 4)
    assert_same_from_two_threads([other, other.twin()], frames)
    for frame in frames:
        assert_close(other.step(frame, None)[0], stage.step(frame, None)[0])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("twin", [False, True])
def test_two_threads_answer_as_one(backend: str, twin: bool) -> None:
    stage = on(backend, small_stage())
    assert_same_from_two_threads(
        [stage, stage.twin() if twin else stage], [(an_image(64, seed),) for seed in range(50)]
    )


def assert_same_from_two_threads(stages: list[Stage], frames: list[Values]) -> None:
    serial = [stages[0].step(frame, None)[0][0].clone() for frame in frames]
    answers: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(n: int) -> None:
        start.wait()
        torch.set_num_threads(1)
        answers[n] = [stages[n].step(frame, None)[0][0] for frame in frames]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in answers:
        assert len(mine) == len(frames)
        for answer, expected in zip(mine, serial, strict=True):
            assert torch.equal(answer, expected)


def test_an_openvino_twin_has_its_own_model() -> None:
    stage = on("openvino", small_stage())
    twin = stage.twin()
    assert twin is not stage
    assert twin.step is not stage.step
    assert twin.twin().step is not twin.step


@pytest.mark.parametrize("backend", FAST)
def test_old_answers_and_inputs_stay_valid(backend: str) -> None:
    stage = on(backend, small_stage())
    frames = [(an_image(64, seed),) for seed in range(6)]
    kept = [stage.step(frame, None)[0][0] for frame in frames]
    snapshots = [answer.clone() for answer in kept]
    for seed in range(20):
        stage.step((an_image(64, 100 + seed),), None)[0][0].fill_(float("nan"))
    for seed, (answer, snapshot) in enumerate(zip(kept, snapshots, strict=True)):
        assert torch.equal(answer, snapshot)
        assert torch.equal(frames[seed][0], an_image(64, seed))
        assert torch.equal(stage.step(frames[seed], None)[0][0], snapshot)
    assert len({answer.data_ptr() for answer in kept}) == len(kept)


@pytest.mark.parametrize("backend", FAST)
def test_inputs_that_are_views_are_read_right(backend: str) -> None:
    stage = small_stage()
    other = on(backend, stage)
    wide = torch.randn(1, 3, 64, 130)
    for view in (wide[..., ::2][..., :64], an_image(64).to(memory_format=torch.channels_last), an_image(64).mT):
        assert_close(other.step((view,), None)[0], stage.step((view,), None)[0])


@pytest.mark.parametrize("backend", FAST)
def test_a_stage_that_only_hands_through(backend: str) -> None:
    image = an_image(8)
    stage = on(backend, make_stage(nn.Identity(), image))
    assert stage.step((image,), None)[0][0] is image


def test_bfloat16_is_near_and_only_on_demand() -> None:
    stage = small_stage()
    frame = (an_image(64, 1),)
    expected = stage.step(frame, None)[0]
    rounded = on("openvino", stage, precision="bfloat16").step(frame, None)[0]
    # eight bits of mantissa: some 1/256 per layer; on a processor without bfloat16 the answer is float32's
    assert_close(rounded, expected, tolerance=0.1)


def test_more_threads_inside_a_stage_answer_the_same() -> None:
    stage = small_stage()
    frame = (an_image(64, 1),)
    for backend in FAST:
        assert_close(on(backend, stage, num_threads=2).step(frame, None)[0], stage.step(frame, None)[0])


def test_progress_names_every_stage() -> None:
    told: list[tuple[int, int, str]] = []
    compile_stages(alone(small_stage("first")), "onnxruntime", on_progress=lambda *told_now: told.append(told_now))
    assert told == [(0, 1, "first"), (1, 1, "model")]


@pytest.mark.parametrize("backend", FAST)
def test_other_inputs_than_the_example_are_refused(backend: str) -> None:
    stage = on(backend, small_stage())
    with pytest.raises(LayoutError, match=r"stage 'small' was given a tensor of shape \(1, 3, 32, 32\)"):
        stage.step((an_image(32),), None)
    with pytest.raises(LayoutError, match="type float64"):
        stage.step((an_image(64).double(),), None)
    odd = on(backend, make_stage(Odd(), *ODD_EXAMPLE))
    with pytest.raises(LayoutError, match=r"was given 0.25, but the stage was converted for 0.5"):
        odd.step((ODD_EXAMPLE[0], 0.25, *ODD_EXAMPLE[2:]), None)


class Unexportable(nn.Module):
    """Which way it goes depends on the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x - 1


def test_what_cannot_be_converted_is_named() -> None:
    stage = make_stage(Unexportable(), an_image(8), name="layer9")
    with pytest.raises(BackendError, match=r"'onnxruntime' cannot run stage 'layer9'.*on_unsupported='eager'"):
        on("onnxruntime", stage)
    with pytest.raises(BackendError, match="without example inputs"):
        on("openvino", replace(small_stage(), example_inputs=None))
    with pytest.raises(BackendError, match=r"no nn\.Module"):
        on("openvino", replace(small_stage(), module=None))
    with pytest.raises(BackendError, match="float64"):
        on("openvino", make_stage(nn.ReLU(), an_image(8).double()))


def test_what_cannot_be_converted_may_stay_in_eager(caplog: pytest.LogCaptureFixture) -> None:
    stage = make_stage(Unexportable(), an_image(8), name="layer9")
    with caplog.at_level(logging.WARNING):
        kept = on("onnxruntime", stage, on_unsupported="eager")
    assert kept is stage
    assert "layer9" in caplog.text


def test_a_stage_with_state_but_no_stream_to_try_is_refused_or_stays_in_eager(caplog: pytest.LogCaptureFixture) -> None:
    """Made by hand, without an example of the whole model; those of a chain are in ``test_backends_stateful``."""
    stage = replace(small_stage("memory"), init_state=lambda: 0)
    with pytest.raises(BackendError, match="cannot run stage 'memory': it carries state"):
        on("openvino", stage)
    with caplog.at_level(logging.WARNING):
        assert on("openvino", stage, on_unsupported="eager") is stage
    assert "'memory' stays in eager: " in caplog.text


def test_a_wrong_conversion_is_refused() -> None:
    stage = small_stage()
    wrong = nn.Sequential(stage.module, nn.ReLU()).eval()

    def step(inputs: Values, state):
        return (stage.module(*inputs),), state

    class Lying(nn.Module):
        """Adds one where it is exported, and not where it runs."""

        def forward(self, x: Tensor) -> Tensor:
            y = wrong[0](x)
            return y + 1 if torch.compiler.is_exporting() else y

    with pytest.raises(BackendError, match="differs from eager by"):
        on("onnxruntime", replace(stage, module=Lying(), step=step))


def test_wrong_choices_are_named() -> None:
    stage = small_stage()
    with pytest.raises(BackendError, match="unknown back end 'tensorrt'; known: eager, inductor"):
        on("tensorrt", stage)
    with pytest.raises(BackendError, match="no precision 'bfloat16'"):
        on("onnxruntime", stage, precision="bfloat16")
    with pytest.raises(BackendError, match="on_unsupported = 'skip'"):
        on("eager", stage, on_unsupported="skip")
    with pytest.raises(BackendError, match="num_threads = 0"):
        on("eager", stage, num_threads=0)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(BACKENDS["openvino"], missing=lambda: "openvino")
    monkeypatch.setitem(registry.BACKENDS, "openvino", gone)
    with pytest.raises(MissingExtraError, match=r"pip install 'sidestream\[openvino\]'"):
        on("openvino", small_stage())
    assert available_backends()["openvino"] == "openvino is not installed; pip install 'sidestream[openvino]'"


def test_rescaled_costs_add_up_to_what_each_stage_takes() -> None:
    scaled = rebalance.rescaled([1.0, 3.0, 2.0, 0.0, 0.0], [2, 1, 2], [8.0, 1.0, 3.0])
    assert scaled == [2.0, 6.0, 1.0, 1.5, 1.5]


def test_a_tick_is_the_dearest_stage_or_a_workers_share() -> None:
    first = replace(small_stage(), cost_seconds=0.004)
    stages = alone(first)
    assert rebalance.tick_seconds(stages, 2) == 0.004
    assert rebalance.tick_seconds(stages, 1) == 0.004
    assert rebalance.total_seconds(stages) == 0.004


def test_a_cut_for_a_back_end_moves_towards_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten equal layers; a pretended runtime needs four times as long for the last five."""
    layers = [nn.Linear(16, 16) for _ in range(10)]
    slow = {id(layer.weight) for layer in layers[5:]}

    def pretended(stages: Stages) -> Stages:
        def cost(stage: Stage) -> float:
            return sum(
                4.0 if id(p) in slow else 1.0 for n, p in stage.module.named_parameters() if n.endswith("weight")
            )

        return stages.with_stages(tuple(replace(stage, cost_seconds=cost(stage)) for stage in stages))

    monkeypatch.setattr(rebalance, "timed", pretended)
    monkeypatch.setattr(rebalance, "compile_stages", lambda stages, backend, check: stages)
    cut = rebalance.cut
    monkeypatch.setattr(rebalance, "cut", lambda *args, **options: cut(*args, **{"costs": "uniform", **options}))
    model, example = nn.Sequential(*layers).eval(), torch.randn(1, 16)
    stages = rebalance.cut_for_backend(model, example, "pretended", num_stages=2, num_workers=2, rounds=4)
    # 25 in all: the best boundary is after seven layers, 13 and 12; an even number of layers gives 5 and 20
    assert [stage.cost_seconds for stage in stages] == [13.0, 12.0]
    assert torch.equal(stages(example), model(example))


def test_a_real_cut_for_a_back_end_answers_as_the_model() -> None:
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4)]
    model = with_real_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), *body), an_image(64))
    stages = cut_for_backend(model, an_image(64), "onnxruntime", num_stages=2, num_workers=2, rounds=1)
    assert [stage.backend for stage in stages] == ["onnxruntime"] * 2
    assert all(stage.cost_seconds and stage.cost_seconds > 0 for stage in stages)
    with torch.no_grad():
        assert_close((stages(an_image(64, 1)),), (model(an_image(64, 1)),))
