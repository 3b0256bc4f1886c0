"""The check of converted stages: whatever kind of difference a runtime may have, it is found; sound nets pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sidestream.circuit.cut import cut
from sidestream.circuit.stage import Link, Stage, Stages, Values
from sidestream.engine.backends import check as check_module
from sidestream.engine.backends import compile_stages
from sidestream.engine.backends.check import check, excused
from sidestream.engine.backends.probes import probes
from sidestream.engine.backends.rounding import Rounded, distance
from sidestream.engine.backends.tensors import Runtime, TensorModule, draw_plan
from sidestream.errors import BackendError

FAST = ["onnxruntime", "openvino"]


@pytest.fixture(autouse=True)
def _time_for_all_inputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A busy machine tries no fewer inputs here, and one thread repeats itself to the bit."""
    monkeypatch.setattr(check_module, "BUDGET_SECONDS", 1e9)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_stage(module: nn.Module, *example: object, name: str = "part") -> Stage:
    module.eval()

    def step(inputs: Values, state: object) -> tuple[Values, object]:
        with torch.no_grad():
            answer = module(*inputs)
        return tuple(answer) if isinstance(answer, tuple) else (answer,), state

    fresh = tuple(value.clone() if isinstance(value, Tensor) else value for value in example)
    with torch.no_grad():
        num_outputs = len(pytree.tree_leaves(module(*fresh)))
    return Stage(name, step, len(example), num_outputs, module=module, example_inputs=example)


def on(backend: str, stage: Stage, **options: object) -> Stage:
    links = [Link(0, n, 1, n) for n in range(stage.num_inputs)] + [Link(1, n, 2, n) for n in range(stage.num_outputs)]
    in_spec = pytree.tree_structure((tuple(range(stage.num_inputs)), {}))
    out_spec = pytree.tree_structure(tuple(range(stage.num_outputs)))
    return compile_stages(Stages((stage,), tuple(links), in_spec, out_spec), backend, **options)[0]


class Function(nn.Module):
    def __init__(self, function: Callable[..., object], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def checked(
    module: nn.Module | Callable[..., object],
    example: Sequence[Tensor],
    spoiled: Callable[[list[Tensor]], Sequence[Tensor]],
) -> None:
    """Check a pretended runtime for ``module``: the module itself, but for what ``spoiled`` makes of it."""
    stage = make_stage(module if isinstance(module, nn.Module) else Function(module), *example)
    check(draw_plan(stage, "pretended"), "pretended", spoiled)


def eager(function: Callable[..., Tensor]) -> Runtime:
    return lambda tensors: [function(*tensors).clone(memory_format=torch.contiguous_format)]


IMAGE = noise(1, 2, 4, 6)
ROWS = noise(5, 6)
MASK = noise(5, 6, seed=1) > 0
BYTES = torch.tensor([3, 1, 2], dtype=torch.uint8)
NUMBERS = torch.tensor([0, 3, 7, 2, 5, 3])

SPOILED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Callable[..., Tensor], str]] = {
    "large": (torch.tanh, (ROWS,), lambda x: x.clamp(-9, 9) * 0 + torch.where(x > 20, 0.9, x.tanh()), "scaled by 30"),
    "negative": (torch.abs, (ROWS.abs(),), lambda x: x, "noise like its example"),
    "all negative": (lambda x: x * 2, (ROWS,), lambda x: x * 2 + (x < 0).all(), "moved far down"),
    "far below zero": (F.logsigmoid, (ROWS,), lambda x: torch.log(torch.sigmoid(x)), "moved far down"),
    "zeros": (lambda x: x.sign(), (ROWS,), lambda x: torch.where(x >= 0, 1.0, -1.0), "zeros"),
    "ties": (torch.round, (ROWS,), lambda x: torch.floor(x + 0.5), "halves"),
    "one value": (lambda x: x - x.mean(), (ROWS + 3,), lambda x: x - x.mean() + (x.std() == 0), "zeros"),
    "NaN": (torch.log, (ROWS.abs() + 1,), lambda x: x.log().nan_to_num(nan=0.0), "negated"),
    "infinite": (torch.reciprocal, (ROWS,), lambda x: x.reciprocal().clamp(-3e38, 3e38), "zeros"),
    "its sign": (torch.reciprocal, (ROWS,), lambda x: torch.where(x == 0, -torch.inf, 1 / x), "zeros"),
    "mask True": (
        lambda x, m: x.masked_fill(m, 0),
        (ROWS, MASK),
        lambda x, m: x.masked_fill(m & ~m.all(), 0),
        "all True",
    ),
    "mask False": (lambda x, m: x * m, (ROWS, MASK), lambda x, m: x * m + ~m.any(), "all False"),
    "masked row": (
        lambda x, m: x.masked_fill(m, -torch.inf).softmax(1),
        (ROWS, MASK),
        lambda x, m: x.masked_fill(m, -torch.inf).softmax(1).nan_to_num(),
        "rows all True and rows all False",
    ),
    "overflow": (lambda n: n + 100, (BYTES,), lambda n: (n.int() + 100).clamp(0, 255).to(torch.uint8), "numbers"),
    "all the greatest": (lambda n: n * 2, (NUMBERS,), lambda n: n * 2 + (n > 6).all(), "all the greatest"),
    "all the least": (lambda n: n * 2, (NUMBERS,), lambda n: n * 2 + (n == 0).all(), "all the least"),
    "order": (lambda n: n.cumsum(0), (NUMBERS,), lambda n: n.cumsum(0) + (n[0] != 0), "permuted"),
    "argmax of ties": (
        lambda n: n.argmax(0),
        (NUMBERS,),
        lambda n: n.numel() - 1 - n.flip(0).argmax(0),
        "all the least",
    ),
    "channels-last": (
        lambda x: x * 2,
        (IMAGE,),
        lambda x: x * 2 if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last) else x,
        "channels-last",
    ),
    "strided": (lambda x: x * 2, (ROWS,), lambda x: x.as_strided(x.shape, (6, 1)) * 2, "strided"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_every_kind_of_difference_is_found(kind: str) -> None:
    module, example, runtime, told = SPOILED[kind]
    with pytest.raises(BackendError, match=f"stage 'part': its output 0 .* on inputs: .*{told}|inputs: .*{told}"):
        checked(module, example, eager(runtime))
    checked(module, example, eager(module))
    stage = make_stage(Function(module), *example)
    check(draw_plan(stage, "pretended"), "pretended", eager(runtime), level="once")  # the example shows none of these
    check(draw_plan(stage, "pretended"), "pretended", eager(lambda *tensors: torch.zeros(1)), level="off")


def test_an_answer_that_is_written_again_is_found() -> None:
    memory = torch.empty(5, 6)

    def reused(tensors: list[Tensor]) -> list[Tensor]:
        return [memory.copy_(tensors[0] * 2)]

    with pytest.raises(BackendError, match="used again"):
        checked(lambda x: x * 2, (ROWS,), reused)


def test_a_runtime_that_remembers_is_found() -> None:
    calls: list[int] = []

    def counts(tensors: list[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [tensors[0] * 2 + (len(calls) > 9)]

    with pytest.raises(BackendError, match="on inputs"):
        checked(lambda x: x * 2, (ROWS,), counts)


def test_a_number_that_depends_on_the_frame_is_found() -> None:
    with pytest.raises(BackendError, match="its output 1 is"):
        checked(lambda x: (x * 2, float(x.sum())), (ROWS,), eager(lambda x: x * 2))


@pytest.mark.parametrize("backend", FAST)
def test_a_stage_of_numbers_alone_is_checked_too(backend: str) -> None:
    with pytest.raises(BackendError, match="its output 1 is"):
        on(backend, make_stage(Function(lambda x: (x, float(x.sum()))), ROWS))
    assert on(backend, make_stage(Function(lambda x: (x, x.shape[0])), ROWS)).backend == backend


def test_the_cost_is_bounded() -> None:
    runs = {"eager": 0, "runtime": 0}

    def in_eager(x: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        runs["eager"] += 1
        return x * mask + numbers.sum()

    def in_runtime(tensors: list[Tensor]) -> list[Tensor]:
        runs["runtime"] += 1
        return [tensors[0] * tensors[1] + tensors[2].sum()]

    checked(in_eager, (ROWS, MASK, NUMBERS), in_runtime)
    assert runs["eager"] <= 2 + 13 + 1  # two for the plan, and one that makes the stage of this test
    assert runs["runtime"] <= 16


def test_inputs_on_which_eager_fails_are_skipped() -> None:
    def picky(x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and float(x.min()) < -50:
            raise ValueError("too low")
        return x * 2

    checked(picky, (ROWS,), lambda tensors: [tensors[0] * 2 + (tensors[0] < -50)])


def test_probes_stay_within_the_examples_whole_numbers() -> None:
    numbers = torch.tensor([[3, 9], [4, 4]])
    seen = torch.stack([inputs[1] for _, inputs in probes((ROWS, numbers, 0.5))])
    assert (int(seen.min()), int(seen.max())) == (3, 9)
    for _, inputs in probes((ROWS, numbers, 0.5)):
        assert inputs[0].shape == ROWS.shape
        assert inputs[2] == 0.5
    image = IMAGE.to(memory_format=torch.channels_last)
    assert all(inputs[0].stride() == image.stride() for _, inputs in probes((image,)))


def test_rounding_moves_what_it_can_move_and_nothing_else() -> None:
    with Rounded(0, 1e-6) as mode:
        made = torch.zeros(4) * 3
        scaled = torch.ones(4) * 3
        view = scaled.view(2, 2)
    assert torch.equal(made, torch.zeros(4))
    assert 0 < float((scaled - 3).abs().max()) <= 4e-6
    assert torch.equal(view.flatten(), scaled)
    assert mode.moved(NUMBERS) is NUMBERS
    edge = torch.tensor([torch.inf, torch.finfo(torch.float32).max])
    assert torch.equal(mode.moved(edge).isinf(), edge.isinf())


def test_ill_conditioned_nets_are_not_refused_for_rounding() -> None:
    """Float64 stands for a runtime that rounds otherwise: chaotic, cancelling, and discrete nets are all excused."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64)

    def attention(x: Tensor) -> Tensor:
        y = x @ weight.to(x.dtype)
        return (y @ y.mT).softmax(-1) @ y

    def argmax(x: Tensor) -> Tensor:
        return (x @ weight.to(x.dtype)).round(decimals=5).argmax(-1)

    def normed(x: Tensor) -> Tensor:
        y = x @ weight.to(x.dtype) + 1
        return (y - y.mean()) / (y.std() + 1e-9)

    def logistic(x: Tensor) -> Tensor:
        x = x.sigmoid()
        for _ in range(60):
            x = 3.9 * x * (1 - x)
        return x

    for net in (attention, argmax, normed, logistic):

        def runtime(tensors: list[Tensor], net: Callable[[Tensor], Tensor] = net) -> list[Tensor]:
            answer = net(tensors[0].double())
            return [answer.float() if answer.is_floating_point() else answer]

        checked(net, (noise(8, 64),), runtime)


def test_as_many_may_be_wrong_as_rounding_moves() -> None:
    moved = torch.tensor([0.0, 0.0, torch.inf, 0.0])
    assert excused(torch.tensor([torch.inf, 0, 0, 0]), moved, 0.0)
    assert not excused(torch.tensor([torch.inf, torch.inf, 0, 0]), moved, 0.0)
    assert not excused(torch.tensor([torch.inf, 0, 0, 0]), torch.full((4,), 1e-3), 1e-3)
    assert excused(torch.full((4,), 1e-2), torch.full((4,), 1e-3), 1e-3)


def test_distance_of_what_is_not_finite() -> None:
    nan, inf = torch.nan, torch.inf
    answer = torch.tensor([nan, nan, inf, inf, -inf, 1.0])
    expected = torch.tensor([nan, 1.0, inf, -inf, -inf, 3.0])
    assert distance(answer, expected).tolist() == [0.0, inf, 0.0, inf, 0.0, 2.0]
    assert distance(torch.tensor([1, 2]), torch.tensor([1, 3])).tolist() == [0.0, inf]


def test_the_check_leaves_everything_as_it_was() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.LogSoftmax(1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.set_rng_state(state)
    example = IMAGE.clone()
    stage = make_stage(module, example)
    checked(module, (example,), lambda tensors: [module(tensors[0])])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(example, IMAGE)
    assert all(torch.equal(value, before[name]) for name, value in stage.module.state_dict().items())


class Noisy(nn.Module):
    """Draws, from torch's own generator or from one of its own."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.generator = torch.Generator() if own else None

    def forward(self, x: Tensor) -> Tensor:
        return (
            x + 1e-5 * torch.randn(x.shape, generator=self.generator)
            if self.generator is None
            else (x + torch.randn(x.shape, generator=self.generator))
        )


@pytest.mark.parametrize("own", [False, True])
def test_a_stage_that_draws_is_refused(own: bool) -> None:
    state = torch.get_rng_state()
    with pytest.raises(BackendError, match="draws random numbers"):
        draw_plan(make_stage(Noisy(own), ROWS), "pretended")
    if own:
        assert torch.equal(torch.get_rng_state(), state)


class Counts(nn.Module):
    """Writes to a buffer, openly or behind the version counter's back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("spread", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "batch norm":
            return F.batch_norm(x, self.seen, self.spread, training=True)
        if self.how == "data":
            self.seen.data.add_(1)
        elif self.how == "replaced":
            self.seen = self.seen + 1
        else:
            self.seen += 1
        return x * 2


@pytest.mark.parametrize("how", ["in place", "data", "replaced", "batch norm"])
def test_a_stage_that_writes_to_its_buffers_is_refused_and_left_as_it_was(how: str) -> None:
    stage = make_stage(Counts(how), ROWS)
    seen = stage.module.seen
    before = seen.clone()
    with pytest.raises(BackendError, match="writes to its own 'seen'"):
        draw_plan(stage, "pretended")
    assert stage.module.seen is seen
    assert torch.equal(seen, before)


def test_a_stage_that_changes_its_input_is_refused() -> None:
    with pytest.raises(BackendError, match="changes its inputs in place"):
        draw_plan(make_stage(Function(lambda x: x.add_(1) * 2), ROWS.clone()), "pretended")


def test_a_shift_by_a_tensor_is_refused_by_name() -> None:
    by = torch.tensor([1, 2, 0, 3, 1, 1])
    for backend in FAST:
        with pytest.raises(BackendError, match=r"a shift by a tensor.*bitwise_right_shift"):
            on(backend, make_stage(Function(torch.bitwise_right_shift), NUMBERS, by))
        on(backend, make_stage(Function(lambda n: torch.bitwise_left_shift(n, 2)), NUMBERS))
    with pytest.raises(BackendError, match="below zero"):
        on("openvino", make_stage(Function(lambda n: torch.bitwise_right_shift(n, 1)), NUMBERS))
    plan = draw_plan(make_stage(Function(torch.bitwise_right_shift), NUMBERS, by), "inductor")
    assert TensorModule(plan)(NUMBERS, by)[0].shape == (6,)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


QKV = tuple(noise(1, 2, 5, 8, seed=seed) for seed in (1, 2, 3))
SOME = torch.ones(1, 1, 5, 5).tril() > 0
WRONG: dict[str, tuple[Callable[..., object], tuple[Tensor, ...], str]] = {
    "attention with a row all masked": (sdpa, (*QKV, SOME), "onnxruntime openvino"),
    "logsigmoid": (F.logsigmoid, (ROWS,), "onnxruntime openvino"),
    "logaddexp": (torch.logaddexp, (ROWS, noise(5, 6, seed=7)), "onnxruntime openvino"),
    "atan2 at zeros": (torch.atan2, (ROWS, noise(5, 6, seed=7)), "onnxruntime openvino"),
    "topk of equals": (lambda n: n.topk(2)[1], (torch.tensor([1, 4, 2, 9, 5]),), "onnxruntime openvino"),
}


@pytest.mark.parametrize(("kind", "backend"), [(k, b) for k, (_, _, on_) in WRONG.items() for b in on_.split()])
def test_operators_that_differ_are_refused(kind: str, backend: str) -> None:
    function, example, _ = WRONG[kind]
    with pytest.raises(BackendError, match=r"cannot run stage 'part': its output 0 .* on inputs: (?!its example;)"):
        on(backend, make_stage(Function(function), *example))


def test_what_the_example_does_not_show_passes_once_and_may_stay_in_eager(caplog: pytest.LogCaptureFixture) -> None:
    stage = make_stage(nn.LogSigmoid(), ROWS)
    assert on("onnxruntime", stage, check="once").backend == "onnxruntime"
    with caplog.at_level(logging.WARNING):
        assert on("onnxruntime", stage, on_unsupported="eager") is stage
    assert "'part' stays in eager" in caplog.text
    assert "on inputs: its example " in caplog.text


def real_model(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "vit_tiny":
        return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=50), noise(1, 3, 64, 64)
    if name == "swin_tiny":
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=112, num_classes=50)
        return model, noise(1, 3, 112, 112)
    if name == "efficientnet_lite0":
        return timm.create_model(name, num_classes=50), noise(1, 3, 96, 96)
    return getattr(torchvision.models, name)(num_classes=50), noise(1, 3, 96, 96)


@pytest.mark.slow
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "vit_tiny", "efficientnet_lite0", "swin_tiny"])
def test_real_models_are_not_refused(name: str, num_stages: int, backend: str) -> None:
    model, example = real_model(name)
    stages = compile_stages(cut(model.eval(), example, num_stages=num_stages), backend)
    assert [stage.backend for stage in stages] == [backend] * num_stages


def test_an_unknown_check_is_named() -> None:
    with pytest.raises(BackendError, match="check = 'twice'"):
        on("eager", make_stage(nn.ReLU(), ROWS), check="twice")
