"""State in places that no module registers is refused by its name; what a model fills in, keeps or lends stays its own;
what was changed after the cut, or runs in another mode, is followed or refused."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import queue
import random
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from circuit import hidden_places
from torch import Tensor, nn

from sidestream import pipelined
from sidestream.circuit.cut import cut
from sidestream.engine import run
from sidestream.errors import CircuitError, CutError, SidestreamError

COUNT = itertools.count()
TABLE: Any = weakref.WeakKeyDictionary()
ITEM = nn.Module()
MANY = [0] * 2000
SOURCE = random.Random(3)
PART = functools.partial(lambda items: items.append(0) or len(items), [])
SCALE = 1.0
FOUND: dict[str, Tensor] = {}


def frames_of(count: int = 6, *shape: int) -> list[Tensor]:
    return list(torch.rand(count, 1, *(shape or (4,)), generator=torch.Generator().manual_seed(0)))


def bump(thing: Any) -> int:
    thing.n = getattr(thing, "n", 0) + 1
    return thing.n


def up(table: Any, key: Any) -> int:
    table[key] = table.get(key, 0) + 1
    return table[key]


def longer(items: Any) -> int:
    items.append(0)
    return len(items)


def taken_and_put(items: queue.Queue[int]) -> int:
    items.put(items.get() + 1)
    return items.queue[0]


class Remembers(nn.Module):
    """Every ninth answer is another one."""

    ids = itertools.count()
    turns = itertools.cycle(range(9))

    def __init__(self, how: Callable[[Any], int]) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.register_buffer("buffer", torch.zeros(2))
        self.queue: queue.Queue[int] = queue.Queue()
        self.queue.put(0)
        self.table, self.items, self.maps = collections.UserDict(), collections.UserList(), collections.ChainMap({})
        self.local, self.objects = threading.local(), [*(object() for _ in range(2001)), [0]]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * (3.0 if self.how(self) % 9 == 0 else 1.0))


PLACES: dict[str, Callable[[Any], int]] = {
    "the global COUNT": lambda m: next(COUNT),
    "Remembers.ids": lambda m: next(m.ids),
    "Remembers.turns": lambda m: next(m.turns),
    "the global TABLE": lambda m: up(TABLE, m),
    "the global ITEM": lambda m: bump(ITEM),
    "the global MANY": lambda m: up_first(MANY),
    "the global SOURCE": lambda m: int(SOURCE.random() * 9),
    "the global PART": lambda m: PART(),
    "queue": lambda m: taken_and_put(m.queue),
    "table": lambda m: up(m.table, "n"),
    "items": lambda m: longer(m.items),
    "maps": lambda m: up(m.maps, "n"),
    "local.n": lambda m: bump(m.local),
    "a.weight.n": lambda m: bump(m.a.weight),
    "buffer.n": lambda m: bump(m.buffer),
    r"objects\[2001\]": lambda m: longer(m.objects[-1]),
    "the global STORE of circuit.hidden_places.count": lambda m: hidden_places.STORE.up(),
    "the global STORE of circuit.hidden_places.n": lambda m: bump(hidden_places.STORE),
    "Tracker.count": lambda m: hidden_places.Tracker.up(),
    "the global COUNTER": lambda m: next(hidden_places.COUNTER),
    "the global NUMBER": lambda m: hidden_places.up(),
}


def up_first(items: list[int]) -> int:
    items[0] += 1
    return items[0]


@pytest.mark.parametrize("place", PLACES)
def test_state_in_a_place_that_no_module_registers_is_refused_by_name(place: str) -> None:
    with pytest.raises(CutError, match=place):
        cut(Remembers(PLACES[place]).eval(), frames_of()[0], num_stages=2, costs="uniform")


class HooksItself(nn.Module):
    """Its first call registers a hook."""

    ready = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.a.register_forward_hook(lambda m, i, o: o * 2)
            self.b.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
            self.ready = True
        return self.b(self.a(x))


@torch.no_grad()
def test_hooks_that_the_first_call_registers_are_not_left_behind() -> None:
    model, frames = HooksItself().eval(), frames_of()
    twin = copy.deepcopy(model)
    stages = cut(model, frames[0], num_stages=2, costs="uniform")
    assert (len(model.a._forward_hooks), len(model.b._forward_pre_hooks), model.ready) == (0, 0, False)
    for _ in range(2):
        outputs = list(run(pipelined(stages), frames))
        assert all(o.value.equal(twin(f)) for o, f in zip(outputs, frames, strict=True))
        assert model(frames[0]).equal(twin(frames[0]))  # whose hooks are there now


class WritesDown(nn.Module):
    """A hook writes what a layer answers into a global table, and forward reads it in the same call (MiDaS)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.net[0].register_forward_hook(lambda m, i, o: FOUND.__setitem__("first", o))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + FOUND["first"]


@torch.no_grad()
def test_what_is_written_before_it_is_read_is_no_state_in_a_global_either() -> None:
    model, frames = WritesDown().eval(), frames_of()
    outputs = list(run(pipelined(cut(model, frames[0], num_stages=2, costs="uniform")), frames))
    assert all(o.value.equal(model(f)) for o, f in zip(outputs, frames, strict=True))


class RareBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        drawn = random.random() + np.random.rand()
        return x if self.training and drawn < 0.01 else x + self.b(x)


def test_a_generator_of_python_is_refused_in_training_and_let_be_where_it_changes_nothing() -> None:
    with pytest.raises(CutError, match="draws random numbers from the generator of the module random"):
        cut(RareBranch().train(), frames_of()[0], num_stages=1)
    model, frames = RareBranch().eval(), frames_of()
    state = random.getstate(), np.random.get_state()[1].tolist()
    outputs = list(run(pipelined(cut(model, frames[0], num_stages=1)), frames))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state
    with torch.no_grad():
        assert all(o.value.equal(model(f)) for o, f in zip(outputs, frames, strict=True))


class Keeps(nn.Module):
    """Its first call computes something from the weights, and keeps it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.b, self.how, self.cache = nn.Parameter(torch.rand(4)), nn.Linear(4, 4), how, {}

    @functools.cached_property
    def once(self) -> Tensor:
        return self.w.exp()

    @functools.lru_cache  # noqa: B019
    def cached(self) -> Tensor:
        return self.w.exp()

    @functools.lru_cache  # noqa: B019
    def places(self, count: int) -> Tensor:
        return torch.arange(float(count))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "dict":
            if "w" not in self.cache:
                self.cache["w"] = self.w.exp()
            return self.b(x * self.cache["w"])
        if self.how == "attribute":
            if not hasattr(self, "kept"):
                self.kept = self.w.exp()
            return self.b(x * self.kept)
        if self.how == "property":
            return self.b(x * self.once)
        return self.b(x * (self.cached() if self.how == "cache" else self.w * self.places(4)))


@pytest.mark.parametrize("how", ["dict", "attribute", "property", "cache"])
@torch.no_grad()
def test_weights_that_change_under_what_was_computed_from_them_are_refused(how: str) -> None:
    model, x = Keeps(how).eval(), frames_of()[0]
    stages = cut(model, x, num_stages=1)
    assert next(iter(run(pipelined(stages), [x]))).value.equal(copy.deepcopy(model)(x))
    assert not model.cache
    assert "once" not in vars(model)
    for change in (lambda: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}), None):
        (change or (lambda: model.w.mul_(2)))()
        with pytest.raises(CircuitError, match="keeps values that its first call computed from its weights"):
            run(pipelined(stages), [x])
    again = cut(model, x, num_stages=1)
    assert next(iter(run(pipelined(again), [x]))).value.equal(copy.deepcopy(model)(x))


@torch.no_grad()
def test_weights_are_followed_where_what_was_kept_does_not_depend_on_them() -> None:
    model, x = Keeps("places").eval(), frames_of()[0]
    stages = cut(model, x, num_stages=1)
    versions = [p._version for p in model.parameters()]
    cut(model, x, num_stages=1)
    assert [p._version for p in model.parameters()] == versions  # trying out other weights leaves no trace
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert next(iter(run(pipelined(stages), [x]))).value.equal(model(x))


class Takes(nn.Module):
    """Uses what lies in attributes of every kind."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self._scale, self.template, self.config = 1.0, [torch.ones(4)], types.SimpleNamespace(s=1.0)
        self.act, self.table, self.array, self.numbers = torch.tanh, {"s": 1.0}, np.ones(2), [1.0, 2.0]
        self.handle = self.b.register_forward_hook(lambda m, i, o: o * 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = self._scale * self.config.s * self.table["s"] * float(self.array[0]) * self.numbers[1] * self.factor
        return self.b(self.act(self.a(x)) * self.template[0] * scale * SCALE)

    def exchange_hook(self) -> None:
        self.handle.remove()
        self.b.register_forward_hook(lambda m, i, o: o * 3)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "_scale": lambda m, patch: setattr(m, "_scale", 2.0),
    "template": lambda m, patch: setattr(m, "template", [torch.rand(4)]),
    "template, in place": lambda m, patch: m.template[0].mul_(2),
    "config": lambda m, patch: setattr(m.config, "s", 2.0),
    "act": lambda m, patch: setattr(m, "act", torch.relu),
    "table": lambda m, patch: m.table.update(s=2.0),
    "array": lambda m, patch: m.array.__setitem__(0, 3.0),
    "numbers": lambda m, patch: m.numbers.__setitem__(1, 7.0),
    "hooks of module 'b'": lambda m, patch: m.exchange_hook(),
    "Takes.factor": lambda m, patch: patch.setattr(Takes, "factor", 2.0),
    "SCALE": lambda m, patch: patch.setitem(globals(), "SCALE", 2.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_graph_took_over_and_was_changed_since_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Takes().eval(), frames_of()[0]
    circuit = pipelined(cut(model, x, num_stages=2, costs="uniform"))
    list(run(circuit, [x]))
    CHANGES[name](model, monkeypatch)
    with pytest.raises(CircuitError, match=name.split(",")[0]):
        run(circuit, [x])


class MovingAverage(nn.Module):
    """MoCo's and BYOL's key encoder follows the query encoder in forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for q, k in zip(self.q.parameters(), self.k.parameters(), strict=True):
                if self.how == "replaced":
                    k.data = k.data * 0.9 + q.data * 0.1
                else:
                    (k.data if self.how == "data" else k).mul_(0.9).add_(q, alpha=0.1)
        return self.q(x), self.k(x)


@pytest.mark.parametrize("how", ["replaced", "data", "in place"])
@pytest.mark.parametrize("trains", [True, False])
def test_a_forward_that_writes_to_its_parameters_is_refused_and_leaves_them_alone(how: str, trains: bool) -> None:
    model = MovingAverage(how).train(trains)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CutError, match=r"writes to its parameter 'k\.weight'"):
        cut(model, frames_of()[0], num_stages=1)
    assert all(v.equal(before[k]) and not v.is_inference() for k, v in model.state_dict().items())


class Lazy(nn.Module):
    """A buffer that is None until the first call; ``float`` keeps the module whole."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = self.h * 0.5 + x if float(x.mean()) > -9 else x
        return self.h


class TwoNames(Lazy):
    """A buffer that a list names too."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.zeros(1, 4)
        self.caches = [self.h]

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > -9:
            self.caches[0].mul_(0.5).add_(x)
        return self.caches[0] * 1


def around(middle: nn.Module) -> nn.Sequential:
    net = nn.Sequential()
    net.a, net.middle, net.b = nn.Linear(4, 4), middle, nn.Linear(4, 4)
    return net.eval()


@torch.no_grad()
def test_a_buffer_that_is_none_at_first_is_the_state_of_a_run() -> None:
    model, frames = around(Lazy()), frames_of()
    twin = copy.deepcopy(model)
    wanted = [twin(frame) for frame in frames]
    stages = cut(model, frames[0], cut=("middle", "b"))
    for circuit in (pipelined(stages), pipelined(copy.deepcopy(stages))):
        for executor in ("inline", "threads", "sequential"):
            outputs = list(run(circuit, frames, executor=executor))
            assert all(o.value.equal(w) for o, w in zip(outputs, wanted, strict=True))
            assert model.middle.h is None
        with pytest.raises(CircuitError, match="stages with state"):
            run(circuit, frames, executor="frame-parallel")


def test_a_buffer_of_a_module_kept_whole_that_has_another_name_is_refused() -> None:
    with pytest.raises(CutError, match=r"the buffer 'h' of TwoNames.* is also the attribute 'middle\.caches\[0\]'"):
        cut(around(TwoNames()), frames_of()[0], cut=("middle", "b"))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.a, self.rnn = nn.Linear(8, 8), kind(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.a(x))[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("runs", [True, False])
def test_autocast_around_the_cut_or_the_run_is_exact_or_refused(kind: type, cuts: bool, runs: bool) -> None:
    model, frames = Recurrent(kind).eval(), frames_of(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=cuts):
        circuit = pipelined(cut(model, frames[0], num_stages=1))
    with torch.autocast("cpu", torch.bfloat16, enabled=runs), torch.no_grad():
        try:
            found = [o.value.clone() for o in run(circuit, frames, executor="sequential", num_threads=1)]
        except SidestreamError as error:
            assert cuts != runs
            assert "autocast" in str(error)  # noqa: PT017
            return
        torch.set_num_threads(1)
        wanted = [model(frame) for frame in frames]
        assert all(f.dtype == w.dtype and f.equal(w) for f, w in zip(found, wanted, strict=True))


def test_a_recurrent_net_is_cut_for_training() -> None:
    model, frames = Recurrent(nn.LSTM).train(), frames_of(3, 5, 8)
    assert len(cut(model, frames[0], num_stages=1)) == 1


class Forwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(lambda t: self.a(t).tanh(), (x,), (torch.ones_like(x),))[1]


def test_forward_mode_is_refused_and_the_process_is_as_it_was() -> None:
    with pytest.raises(CutError, match="differentiates forwards"):
        cut(Forwards().eval(), frames_of()[0], num_stages=1)
    torch.func.jvp(torch.sin, (torch.rand(2),), (torch.rand(2),))
    assert len(cut(nn.Sequential(nn.Linear(4, 4)).eval(), frames_of()[0], num_stages=1)) == 1


@pytest.mark.filterwarnings("ignore")
def test_torchscript_inside_is_refused_by_name() -> None:
    part = torch.jit.trace(nn.Linear(4, 4).eval(), torch.rand(1, 4), check_trace=False)
    with pytest.raises(CutError, match=r"module 'middle' of Sequential is compiled TorchScript"):
        cut(around(part), frames_of()[0], num_stages=1)


class AsDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a": self.a(x), "more": [x * 2, (x + 1,)]}


@torch.no_grad()
def test_a_graph_module_that_answers_with_a_dict() -> None:
    model, frames = torch.fx.symbolic_trace(AsDict().eval()), frames_of()
    for output, frame in zip(run(pipelined(cut(model, frames[0], num_stages=1)), frames), frames, strict=True):
        wanted = AsDict.forward(model, frame)
        assert type(output.value) is dict
        assert output.value["a"].equal(wanted["a"])
        assert output.value["more"][1][0].equal(frame + 1)


class Sum(nn.Module):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return parts[0] + parts[1]


def test_a_model_whose_only_argument_is_a_list_is_fed_lists() -> None:
    frames = frames_of()
    items = [[a, b] for a, b in zip(frames, frames[::-1], strict=True)]
    outputs = list(run(pipelined(cut(Sum().eval(), items[0], num_stages=1)), items))
    assert all(o.value.equal(a + b) for o, (a, b) in zip(outputs, items, strict=True))
