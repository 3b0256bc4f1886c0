"""Feedback alignment: against matrices written out, autograd with B = W, and cut stages."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import pipelined
from sidestream.engine import run
from sidestream.engine.rules.exact import Exact
from sidestream.errors import InputError, ModelError
from sidestream.nn.conv3d import CausalConv3d
from sidestream.nn.feedback_alignment import (
    alignment_degrees,
    own_feedback,
    with_random_feedback,
    without_random_feedback,
)

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
"""float64; sums in another order."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(num_layers: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n in range(num_layers):
        layers += [nn.Linear(4 + n, 5 + n), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))


def use_own_weights_as_feedback(net: nn.Module) -> None:
    for layer in net.modules():
        if hasattr(layer, "feedback_weight"):
            layer.feedback_weight.copy_(layer.weight.detach())


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_a_perceptron_against_matrices(num_layers: int) -> None:
    """d_K = e; d_i = (d_(i+1) B_(i+1)) * (1 - h_i^2); dW_i = d_i^T h_(i-1), db_i = sum of d_i."""
    net = with_random_feedback(mlp(num_layers), seed=3)
    linears = [layer for layer in net if isinstance(layer, nn.Linear)]
    x, target = noise(6, 4), noise(6, 4 + num_layers, seed=1)
    loss = 0.5 * ((net(x) - target) ** 2).sum()
    with torch.no_grad():
        h, made = x, []
        for n, layer in enumerate(linears):
            made.append(h)
            h = h @ layer.weight.T + layer.bias
            h = h if n == num_layers - 1 else torch.tanh(h)
        delta, expected = h - target, []
        for n in reversed(range(num_layers)):
            expected = [delta.T @ made[n], delta.sum(0), *expected]
            delta = (delta @ linears[n].feedback_weight) * (1 - made[n] ** 2)
    for name, found, wanted in zip(dict(net.named_parameters()), gradients(net, loss), expected, strict=True):
        torch.testing.assert_close(found, wanted, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


def conv_matrix(weight: Tensor, size: tuple[int, int], stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """The convolution as a matrix (out, in), entry by entry from its definition."""
    num_out, in_per_group, kh, kw = weight.shape
    height, width = size
    out_h, out_w = ((n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in ((height, kh), (width, kw)))
    matrix = torch.zeros(num_out, out_h, out_w, in_per_group * groups, height, width, dtype=weight.dtype)
    for o in range(num_out):
        first = o // (num_out // groups) * in_per_group
        for i in range(in_per_group):
            for y in range(out_h):
                for x in range(out_w):
                    for a in range(kh):
                        for b in range(kw):
                            r, c = y * stride - padding + a * dilation, x * stride - padding + b * dilation
                            if 0 <= r < height and 0 <= c < width:
                                matrix[o, y, x, first + i, r, c] = weight[o, i, a, b]
    return matrix.flatten(3).flatten(0, 2)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 1), (1, 1, 1, 2), (2, 2, 2, 2), (3, 1, 1, 4)]
)
def test_convolutions_against_matrices(stride: int, padding: int, dilation: int, groups: int) -> None:
    torch.manual_seed(1)
    conv1 = nn.Conv2d(3, 4, 3, padding=1).double()
    conv2 = nn.Conv2d(4, 8, (3, 2), stride, padding, dilation, groups).double()
    net = with_random_feedback(nn.Sequential(conv1, nn.Tanh(), conv2), seed=1)
    x = noise(2, 3, 7, 6)
    out = net(x)
    e = noise(*out.shape, seed=5)
    found = gradients(net, (out * e).sum())
    with torch.no_grad():
        h = torch.tanh(
            x.flatten(1) @ conv_matrix(conv1.weight, (7, 6), 1, 1, 1, 1).T + conv1.bias.repeat_interleave(42)
        )
        back = e.flatten(1) @ conv_matrix(conv2.feedback_weight, (7, 6), stride, padding, dilation, groups)
        d1 = (back * (1 - h**2)).view(2, 4, 7, 6)
    weight1, weight2 = (w.detach().clone().requires_grad_() for w in (conv1.weight, conv2.weight))
    ordinary1 = torch.autograd.grad((F.conv2d(x, weight1, None, 1, 1) * d1).sum(), weight1)[0]
    maps = F.conv2d(h.view(2, 4, 7, 6), weight2, None, stride, padding, dilation, groups)
    ordinary2 = torch.autograd.grad((maps * e).sum(), weight2)[0]
    expected = [ordinary1, d1.sum((0, 2, 3)), ordinary2, e.sum((0, 2, 3))]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear, no bias, more axes": (lambda: nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "linear, one vector": (lambda: nn.Linear(5, 3), (5,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2), (2, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, False), (2, 4, 9, 8)),
    "conv2d, no batch": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), (2, 4, 9, 8)),
    "conv2d, same, odd sums": (lambda: nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3)), (2, 4, 9, 8)),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 8)),
    "conv2d, circular": (lambda: nn.Conv2d(4, 6, 3, 2, padding=(1, 2), padding_mode="circular"), (2, 4, 9, 8)),
    "conv2d, reflect, same": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 3), (1, 2, 2), (1, 0, 1), groups=2), (2, 2, 4, 7, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 5, 6)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 4, (1, 2, 2), (1, 2, 2)), (2, 2, 3, 4, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", LAYERS)
class TestEveryLayer:
    def layer(self, kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
        torch.manual_seed(0)
        make, shape = LAYERS[kind]
        layer = make().double()
        own = copy.deepcopy(layer)
        return with_random_feedback(layer), own, noise(*shape).requires_grad_()

    def test_forward_is_the_same_to_the_bit(self, kind: str) -> None:
        layer, own, x = self.layer(kind)
        assert torch.equal(layer(x), own(x))
        assert layer.state_dict().keys() == own.state_dict().keys()
        assert [n for n, _ in layer.named_parameters()] == [n for n, _ in own.named_parameters()]

    def test_own_weights_as_feedback_are_autograd(self, kind: str) -> None:
        layer, own, x = self.layer(kind)
        use_own_weights_as_feedback(layer)
        out = layer(x)
        seed = noise(*out.shape, seed=2)
        found = torch.autograd.grad(out, [x, *layer.parameters()], seed)
        expected = torch.autograd.grad(own(x), [x, *own.parameters()], seed)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **TIGHT)

    def test_only_the_gradient_of_the_input_is_over_the_feedback(self, kind: str) -> None:
        """It is that of the same layer with B in the place of W."""
        layer, own, x = self.layer(kind)
        other = copy.deepcopy(own)
        other.weight.data = layer.feedback_weight.clone()
        out = layer(x)
        seed = noise(*out.shape, seed=2)
        found = torch.autograd.grad(out, [x, *layer.parameters()], seed)
        expected = torch.autograd.grad(own(x), [x, *own.parameters()], seed)
        over_feedback = torch.autograd.grad(other(x), x, seed)[0]
        torch.testing.assert_close(found[0], over_feedback, **TIGHT)
        assert not torch.allclose(found[0], expected[0])
        for a, b in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, b, **TIGHT)


def test_transposed_convolutions_take_an_output_size() -> None:
    layer = nn.ConvTranspose2d(2, 3, 3, 2).double()
    x = noise(1, 2, 4, 4)
    expected = layer(x, output_size=(10, 10))
    assert torch.equal(with_random_feedback(layer)(x, output_size=(10, 10)), expected)


class TestDraw:
    def test_the_seed_and_the_name_decide(self) -> None:
        a, b, c = (with_random_feedback(mlp(3, seed=n), seed=s) for n, s in ((0, 1), (5, 1), (0, 2)))
        for n in (0, 2, 4):
            assert torch.equal(a[n].feedback_weight, b[n].feedback_weight)
            assert not torch.equal(a[n].feedback_weight, c[n].feedback_weight)
        same_shape = with_random_feedback(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
        assert not torch.equal(same_shape[0].feedback_weight, same_shape[1].feedback_weight)

    def test_the_same_numbers_in_both_precisions(self) -> None:
        one, two = with_random_feedback(mlp(2)), with_random_feedback(mlp(2).float())
        assert two[0].feedback_weight.dtype == torch.float32
        assert torch.equal(one[0].feedback_weight.float(), two[0].feedback_weight)

    @pytest.mark.parametrize(
        ("layer", "num_outputs"),
        [(nn.Linear(300, 400), 400), (nn.Conv2d(64, 96, 5, groups=2), 48 * 25), (nn.ConvTranspose2d(64, 96, 5), 2400)],
    )
    def test_the_default_is_uniform_with_nøklands_bound(self, layer: nn.Module, num_outputs: int) -> None:
        feedback = with_random_feedback(layer).feedback_weight
        bound = 1 / math.sqrt(num_outputs)
        assert 0.99 * bound < feedback.abs().max() <= bound
        assert feedback.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(feedback.mean()) < 0.02 * bound

    def test_normal_and_a_scale_of_ones_own(self) -> None:
        normal = with_random_feedback(nn.Linear(300, 400), distribution="normal", scale=0.5).feedback_weight
        assert normal.std().item() == pytest.approx(0.5, rel=0.02)
        assert normal.abs().max() > 1.5
        uniform = with_random_feedback(nn.Linear(300, 400), scale=0.5).feedback_weight
        assert 0.499 < uniform.abs().max() <= 0.5

    @pytest.mark.parametrize("wrong", [{"distribution": "cauchy"}, {"scale": 0.0}, {"scale": math.nan}])
    def test_refuses_others(self, wrong: dict) -> None:
        with pytest.raises(InputError, match=next(iter(wrong))):
            with_random_feedback(nn.Linear(2, 2), **wrong)


def test_it_is_the_module_itself_and_can_be_undone_and_redone() -> None:
    net, x = mlp(3), noise(2, 4)
    parameters, state = list(net.parameters()), net.state_dict()
    plain = gradients(net, net(x).sum())
    assert with_random_feedback(net) is net
    first = gradients(net, net(x).sum())
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert not torch.allclose(first[0], plain[0])
    net.load_state_dict(state)
    twin = copy.deepcopy(net)
    assert torch.equal(gradients(twin, twin(x).sum())[0], first[0])
    with own_feedback(net):
        assert torch.equal(gradients(net, net(x).sum())[0], plain[0])
    assert torch.equal(gradients(net, net(x).sum())[0], first[0])
    with_random_feedback(net, seed=9)
    assert not torch.allclose(gradients(net, net(x).sum())[0], first[0])
    without_random_feedback(net)
    assert {type(m) for m in net} == {nn.Linear, nn.Tanh}
    assert not list(net.buffers())
    assert torch.equal(gradients(net, net(x).sum())[0], plain[0])


def test_autocast() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    own, x = copy.deepcopy(net), torch.randn(2, 3, 8, 8)
    with_random_feedback(net)
    use_own_weights_as_feedback(net)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = net(x), own(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    for a, b in zip(gradients(net, found.float().sum()), gradients(own, expected.float().sum()), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def conv_net() -> nn.Sequential:
    torch.manual_seed(2)
    convs = [nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, 2, groups=2), nn.Tanh()]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize("costs", ["flops", "measured", "parameters"])
def test_a_cut_model_keeps_its_feedback(costs: str) -> None:
    net, x = with_random_feedback(conv_net().double(), seed=4), noise(2, 3, 9, 9)
    stages = cut(net, x, num_stages=3, costs=costs)
    assert len(stages) == 3
    values = (x,)
    for stage in stages:
        values = stage.step.with_gradients(values, None)[0]
    found, expected = gradients(net, values[0].square().sum()), gradients(net, net(x).square().sum())
    with own_feedback(net):
        plain = gradients(net, net(x).square().sum())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    assert not torch.allclose(found[0], plain[0])
    assert torch.equal(stages(x), net(x))


def test_operations_are_counted_as_without() -> None:
    """In the forward pass: what stages are balanced by."""
    counts = []
    for net in (conv_net(), with_random_feedback(conv_net())):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(torch.randn(2, 3, 9, 9))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 2 * (2 * 81 * 6 * 27)


@pytest.mark.parametrize("is_cut", [False, True])
def test_the_exact_rule_takes_it_as_it_is(is_cut: bool) -> None:
    net = with_random_feedback(conv_net().double(), seed=4)
    pairs = [(noise(2, 3, 9, 9, seed=n), noise(2, 2, seed=50 + n)) for n in range(6)]
    modules = [net[:2], net[2:4], net[4:]]
    stages = cut(net, pairs[0][0], num_stages=3, costs="flops") if is_cut else stages_of(modules, pairs[0][0])
    rule = Exact(F.mse_loss, update="manual")
    list(run(pipelined(stages), pairs, rule=rule))
    expected = gradients(net, torch.stack([F.mse_loss(net(x), y) for x, y in pairs]).mean())
    owned = {id(p): rule.gradients(n)[k] for n, s in enumerate(stages, 1) for k, p in s.module.named_parameters()}
    for p, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(owned[id(p)], gradient, **TIGHT)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.attend = nn.MultiheadAttention(4, 1)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Attending(), "'attend' .MultiheadAttention"),
        (nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.LSTM(2, 2)}), "'b' .LSTM"),
        (nn.Sequential(Scaled(2, 2)), "'0' .Scaled. is a layer of its own kind, derived from Linear"),
        (nn.Sequential(CausalConv3d(2, 2, 3)), "'0' .CausalConv3d"),
        (nn.Sequential(nn.ReLU()), "no linear or convolution layer"),
    ],
)
def test_what_is_refused_and_left_alone(module: nn.Module, says: str) -> None:
    with pytest.raises(InputError, match=says):
        with_random_feedback(module)
    assert not list(module.buffers())


def test_a_sliding_form_is_refused() -> None:
    with pytest.raises(ModelError, match="random feedback has no sliding form"):
        CausalConv3d.from_torch(with_random_feedback(nn.Conv3d(2, 2, 3)))


def test_training_aligns_the_weights_with_the_feedback() -> None:
    """Lillicrap et al.'s finding: the angle between W and B falls below 90 degrees, and the loss falls with it.

    A linear map is learned by a net of two linear layers; B of the second is unrelated to its W at the beginning.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 10, bias=False))
    for layer in net:
        nn.init.uniform_(layer.weight, -0.05, 0.05)
    with_random_feedback(net, scale=0.5)
    teacher = torch.randn(10, 20) / math.sqrt(20)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses, before = [], alignment_degrees(net)["1"]
    for _ in range(400):
        x = torch.randn(32, 20)
        loss = F.mse_loss(net(x), x @ teacher.T)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = alignment_degrees(net)["1"]
    assert 80 < before < 100
    assert after < 60
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])


def test_the_angle_is_that_between_the_matrices() -> None:
    layer = with_random_feedback(nn.Linear(2, 1))
    layer.weight.data, layer.feedback_weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, math.sqrt(3)]])
    assert alignment_degrees(layer)[""] == pytest.approx(60, abs=1e-4)
    assert functools.reduce(lambda a, b: a + b, alignment_degrees(nn.ReLU()).values(), 0) == 0
