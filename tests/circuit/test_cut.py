"""What a cut promises beside equal numbers: names, sharing, no hidden change, clear errors."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contract import assert_equal, check_cut
from sidestream.circuit.cut import cut
from sidestream.circuit.stage import SOURCE, Link, Stages
from sidestream.circuit.wiring import pipelined
from sidestream.errors import CutError, LayoutError


class Small(nn.Module):
    """A stem, two blocks with a skip over the second, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.block2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 4)
        self.idle = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.stem(x))
        return self.head((x + self.block2(x)).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


X = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# --- names, fields, links


def test_a_circuit_is_printed_without_its_weights_and_pictures(model: nn.Module) -> None:
    text = repr(pipelined(cut(model, X, num_stages=3)))
    assert "tensor(" not in text
    assert "Conv2d" not in text
    assert text.count("Stage(name=") == 3


def test_stages_begin_at_the_named_modules(model: nn.Module) -> None:
    stages = cut(model, X, cut=("block1", "block2.1", "head"), name="small", input_spec="spec")
    assert [s.name for s in stages] == ["stem.0-stem.2", "block1.0-block2.0", "block2.1-mean", "head"]
    assert (stages.name, stages.input_spec) == ("small", "spec")
    assert set(stages.links) == {
        Link(SOURCE, 0, 1, 0),
        Link(1, 0, 2, 0),
        Link(2, 1, 3, 0),
        Link(2, 0, 3, 1),
        Link(3, 0, 4, 0),
        Link(4, 0, 5, 0),
    }
    check_cut(stages, model, X)


def test_a_skip_goes_straight_from_its_maker_to_its_reader(model: nn.Module) -> None:
    stages = cut(model, X, cut=("block2", "block2.1", "head"), costs="uniform")
    readers = [link.target for link in stages.links if (link.source, link.output) == (1, 0)]
    assert readers == [2, 3], "block1's answer goes to block2 and past it, not through it"
    check_cut(stages, model, X)


def test_fields_tell_what_was_recorded(model: nn.Module) -> None:
    stages = cut(model, X, num_stages=3)
    for stage in stages:
        outputs = stage.module(*stage.example_inputs)
        assert (stage.num_inputs, stage.num_outputs) == (len(stage.example_inputs), len(outputs))
        assert stage.output_bytes == tuple(o.nbytes for o in outputs)
        assert stage.cost_seconds is not None
        assert 0 < stage.cost_seconds < 1
        assert not stage.is_stateful
    assert stages.example == ((X,), {})
    assert stages.name == "Small"
    assert [s.cost_seconds for s in cut(model, X, num_stages=3, costs="parameters")] == [None] * 3


def test_measured_costs_balance(model: nn.Module) -> None:
    """Two layers that cost a hundred times as much as each of the others must not share a stage."""
    dear = [nn.Conv2d(3, 64, 5, padding=2), nn.Conv2d(64, 3, 5, padding=2)]
    deep = nn.Sequential(*dear, *[nn.ReLU() for _ in range(10)]).eval()
    first, second = cut(deep, torch.rand(1, 3, 64, 64), num_stages=2)
    assert first.name == "0"
    assert second.name.startswith("1-")


@pytest.mark.parametrize("costs", ["measured", "parameters", "flops", "uniform"])
def test_every_way_to_weigh_gives_the_same_answers(model: nn.Module, costs: str) -> None:
    check_cut(cut(model, X, num_stages=3, costs=costs), model, X)


def test_flops_and_given_costs_put_the_boundary_where_they_say() -> None:
    wide = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)).eval()
    x = torch.rand(1, 4)
    assert [s.name for s in cut(wide, x, num_stages=2, costs="flops")] == ["0-1", "2-3"]
    assert [s.name for s in cut(wide, x, num_stages=2, costs=[9, 1, 1, 1])] == ["0", "1-3"]
    with pytest.raises(CutError, match="2 costs were given for 4 nodes"):
        cut(wide, x, num_stages=2, costs=[1, 2])


@pytest.mark.parametrize(("widths", "names"), [((4, 999, 4), ["0", "1-3"]), ((999, 4, 4), ["0-1", "2-3"])])
def test_of_two_cuts_as_even_the_one_that_carries_less_is_taken(widths: tuple[int, ...], names: list[str]) -> None:
    """A chain: each value crosses one cut only, the one before its reader."""
    chain = nn.Sequential(*(nn.Linear(a, b) for a, b in zip((4, *widths), (*widths, 4), strict=True))).eval()
    stages = cut(chain, torch.rand(1, 4), num_stages=2, costs=[50, 1, 50, 1] if widths[0] == 4 else [50, 1, 49, 1])
    assert [s.name for s in stages] == names


def test_auto_counts_stages_by_workers() -> None:
    deep = nn.Sequential(*[nn.Linear(4, 4) for _ in range(32)]).eval()
    counts = [len(cut(deep, torch.rand(1, 4), costs="uniform", num_workers=n)) for n in (1, 2, 4)]
    assert counts == [1, 4, 8]


def test_a_model_without_operations_is_one_stage() -> None:
    stages = cut(nn.Identity().eval(), X, num_stages=1, costs="uniform")
    assert torch.equal(stages(X), X)
    with pytest.raises(CutError, match="too few for num_stages = 2"):
        cut(nn.Identity(), X, num_stages=2, costs="uniform")


# --- parameters and memory


def test_parameters_are_shared_and_keep_their_names(model: nn.Module) -> None:
    stages = cut(model, X, num_stages=3, costs="uniform")
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    seen = set()
    for stage in stages:
        for name, tensor in [*stage.module.named_parameters(), *stage.module.named_buffers()]:
            assert tensor is own[name]
            seen.add(name)
    assert set(own) - seen == {"idle.weight", "idle.bias", "stem.1.num_batches_tracked"}
    with torch.no_grad():
        before = stages(X)
        model.head.weight.mul_(2.0)  # type: ignore[operator, union-attr]
        assert not torch.equal(stages(X), before)
        assert torch.equal(stages(X), model(X))


def test_tensors_replaced_in_a_stage_are_seen(model: nn.Module) -> None:
    stages = cut(model, X, num_stages=3, costs="uniform")
    state = {name: torch.rand_like(v) if v.is_floating_point() else v for name, v in model.state_dict().items()}
    for stage in stages:
        own = {name: state[name].clone() for name in stage.module.state_dict()}
        stage.module.load_state_dict(own, assign=True)
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(stages(X), model(X))


def test_tied_parameters_stay_one_tensor() -> None:
    layer = nn.Linear(4, 4)
    tied = nn.Sequential(layer, nn.ReLU(), layer).eval()
    first, second = cut(tied, torch.rand(1, 4), num_stages=2, costs=[1, 1, 2])
    assert next(first.module.parameters()) is next(second.module.parameters()) is layer.weight


class _PeakMemory(TorchDispatchMode):
    """The most bytes of operation results that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.alive += leaf.nbytes
                weakref.finalize(leaf, self._freed, leaf.nbytes)
        self.peak = max(self.peak, self.alive)
        return out

    def _freed(self, num_bytes: int) -> None:
        self.alive -= num_bytes


def test_dead_values_are_freed_inside_of_a_stage() -> None:
    deep = nn.Sequential(*[nn.Tanh() for _ in range(20)]).eval()
    x = torch.rand(1, 1000)
    (stage,) = cut(deep, x, num_stages=1, costs="uniform")
    gc.collect()
    with _PeakMemory() as memory:
        outputs, _ = stage.step((x,), None)
        assert memory.peak <= 2 * x.nbytes, "a value that nobody reads any more was kept"
        assert memory.alive == x.nbytes
        del outputs
        assert memory.alive == 0, "the stage keeps something between ticks"


# --- in-place operations


class ChangesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return (x + 1).relu() * x


class ChangesAView(nn.Module):
    """A later operation changes memory through a view while the whole is read again."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        part = y[:, :1].sin_()
        z = y.cos() * 2
        part.add_(z[:, :1])
        return y + z


class LongWayInPlace(nn.Module):
    """The trunk is changed in place at the end of a long branch, block after block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(12)]) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.exp()
        for block in self.blocks:
            x += block(x)
        return x


class ChangesViewOfInput(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x[:, 0] = 0.5
        return {"x": x, "double": x * 2}


@pytest.mark.parametrize(
    ("make", "most_stages"), [(ChangesItsInput, 3), (ChangesAView, 2), (LongWayInPlace, 8), (ChangesViewOfInput, 2)]
)
def test_in_place_operations_stay_inside(make: type[nn.Module], most_stages: int) -> None:
    model = make().eval()
    with torch.no_grad():
        expected = model(X.clone())
    for num_stages in range(1, most_stages + 1):
        example = X.clone()
        stages = cut(model, example, num_stages=num_stages, costs="uniform")
        assert torch.equal(example, X), "the cut changed the example"
        given = X.clone()
        assert_equal(stages(given), expected)
        assert_equal(stages(given), expected)
        assert torch.equal(given, X), "the caller's input was changed"
        _assert_no_stage_changes_its_inputs(stages)


def test_memory_that_is_changed_late_through_a_view_is_kept_together() -> None:
    with pytest.raises(CutError, match="has 2 places where a stage can begin, too few for num_stages = 3"):
        cut(ChangesAView().eval(), X, num_stages=3, costs="uniform")


def _assert_no_stage_changes_its_inputs(stages: Stages) -> None:
    for stage in stages:
        inputs = tuple(v.clone() for v in stage.example_inputs or ())
        stage.step(inputs, None)
        for given, kept in zip(inputs, stage.example_inputs or (), strict=True):
            assert torch.equal(given, kept), f"{stage.name} changes its input"


def test_a_stage_may_begin_at_an_in_place_module(model: nn.Module) -> None:
    stages = cut(model, X, cut=("stem.2", "block2.1"))
    check_cut(stages, model, X)
    _assert_no_stage_changes_its_inputs(stages)


def test_cut_between_two_readers_of_changed_memory_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Tanh(), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.second(y[:, :1])
            return y * 2

    with pytest.raises(CutError, match=r"no stage can begin at 'second'.*changes in place"):
        cut(Two().eval(), X, cut=("second",))


def test_cutting_does_not_change_a_model_in_training(model: nn.Module) -> None:
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    stages = cut(model, X, num_stages=3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_equal(dict(model.state_dict()), before)
    state = stages.init_state()
    for x in (X, X + 1):  # the running statistics of a stream are its own
        answer, state = stages.step(state, x)
        with torch.no_grad():
            assert_equal(dict(model.state_dict()), before)
            assert torch.equal(answer, model(x))
        before = {k: v.clone() for k, v in model.state_dict().items()}
    assert not torch.equal(before["stem.1.running_mean"], torch.zeros(8))


def test_cutting_works_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        x = torch.rand(1, 3, 16, 16)
        stages = cut(model, x, num_stages=3)
        assert torch.equal(stages(x), model(x))


def test_gradients_flow_through_the_stage_modules(model: nn.Module) -> None:
    stages = cut(model, X, num_stages=3, costs="uniform")
    model(X).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    values: dict[tuple[int, int], Any] = {(SOURCE, 0): X}
    for number, stage in enumerate(stages, start=1):
        links = sorted((k for k in stages.links if k.target == number), key=lambda k: k.input)
        outputs = stage.module(*[values[k.source, k.output] for k in links])
        values |= {(number, n): value for n, value in enumerate(outputs)}
    values[3, 0].square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-7)


# --- what cannot be cut


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": ("blok2",)}, r"no module 'blok2'; the nearest names are 'block2'"),
        ({"cut": ("block2", "block1")}, r"no stage can begin at 'block1': it runs before 'block2'"),
        ({"cut": ("block1", "block1.0")}, r"'block1.0': it begins at 'block1'"),
        ({"cut": ("stem",)}, r"'stem': it begins at the start of the model"),
        ({"cut": ("idle",)}, r"'idle': the model never calls that module"),
        ({"cut": ("block1",), "num_stages": 4}, r"1 names .* make 2 stages, but num_stages = 4"),
        ({"num_stages": 0}, r"num_stages = 0 is not a number of stages"),
        ({"num_stages": "many"}, r"num_stages = 'many' is not a number of stages"),
        (
            {"num_stages": 500, "costs": "uniform"},
            r"has \d+ places where a stage can begin, too few for num_stages = 500",
        ),
        ({"costs": "guessed"}, r"costs='guessed' is unknown; choose one of measured, parameters, flops, uniform"),
    ],
)
def test_wrong_requests(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        cut(model, X, **options)


def test_other_shapes_and_types_are_refused_at_the_source(model: nn.Module) -> None:
    stages = cut(model, X, num_stages=3, costs="uniform")
    with pytest.raises(LayoutError, match=r"'x' was given as a tensor of shape \(1, 3, 20, 20\).*\(1, 3, 16, 16\)"):
        stages(torch.rand(1, 3, 20, 20))
    with pytest.raises(LayoutError, match=r"torch.float64, but the model was cut for .*torch.float32"):
        stages(X.double())
    with pytest.raises(LayoutError, match=r"given as list"):
        stages.stages[0].step(([1],), None)
    with pytest.raises(LayoutError, match="same arguments"):
        stages(X, X)


class Flagged(nn.Module):
    def forward(self, x: Tensor, flip: bool = False, scale: float = 1.0) -> Tensor:
        return -x if flip else x * scale


def test_constants_of_the_example_are_part_of_the_cut() -> None:
    stages = cut(Flagged().eval(), (X, True, 2.0), num_stages=1, costs="uniform")
    assert torch.equal(stages(X, True, 2.0), -X)
    with pytest.raises(LayoutError, match=r"cut with the argument True, but was given False"):
        stages(X, False, 2.0)


class Chooses(nn.Module):
    """Code that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


class ChoosesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.body, self.head = nn.Linear(4, 4), Chooses(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, offset: float = 0.0) -> dict[str, Tensor]:
        x = self.gate(self.stem(x) + offset)
        return {"y": self.head(self.body(x).relu())}


class ChoosesOutside(ChoosesInside):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.stem(x)
        if x.max() > 0.5:
            x = self.body(x)
        return self.head(x)


def test_a_model_that_cannot_be_traced_names_the_place_and_the_way_out() -> None:
    with pytest.raises(
        CutError, match=r"ChoosesInside cannot be traced at .*test_cut\.py:\d+ \(if x\.sum\(\) > 0:\).*dotted names"
    ):
        cut(ChoosesInside().eval(), torch.rand(1, 4), num_stages=2)


@pytest.mark.parametrize("names", [("gate",), ("body",), ("gate", "body", "head")])
def test_named_cuts_keep_untraceable_modules_opaque(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = ChoosesInside().eval()
    stages = cut(model, torch.rand(1, 4), cut=names)
    assert len(stages) == len(names) + 1
    for x in (torch.full((1, 4), 5.0), torch.full((1, 4), -5.0), torch.rand(1, 4)):
        check_cut(stages, model, x)


def test_values_that_steer_the_outermost_code_cannot_be_cut() -> None:
    with pytest.raises(
        CutError, match=r"traced at .*test_cut\.py:\d+ \(if x\.max\(\) > 0\.5:\), outside of any submodule"
    ):
        cut(ChoosesOutside().eval(), torch.rand(1, 4), cut=("body",))


def test_errors_are_one_line(model: nn.Module) -> None:
    for broken, example in ((ChoosesInside().eval(), torch.rand(1, 4)), (model, torch.rand(1, 5, 16, 16))):
        with pytest.raises(CutError) as error:
            cut(broken, example, num_stages=2)
        assert "\n" not in str(error.value)
