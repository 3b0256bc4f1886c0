"""The first promise, on kinds of models: the answers of a cut model are the model's, or there is an error.

Each row is a small model of a kind that failed once. ``check_exact`` runs it against the plain model: several frames
in a row, in several cuts, on every executor, twice, side by side, and after a run that ended early.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import random
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import sidestream as ss
from contract import assert_equal
from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.stage import Link, Stage, Stages
from sidestream.errors import CircuitError, CutError, LayoutError, SidestreamError
from sidestream.nn.combine import Chain, PerFrame

SIZE = (1, 3, 8, 8)


def frames_of(count: int = 6, size: tuple[int, ...] = SIZE, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator) for _ in range(count)]


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())


class Net(nn.Module):
    """A body, something in the middle (``between``), a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(conv(), conv()), nn.Sequential(conv(), conv())
        self.make()

    def make(self) -> None:
        """What else it holds."""

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.between(self.body(x)))


def made(kind: type[nn.Module], *, train: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return kind().train(train)


def plain_answers(model: nn.Module, frames: list[Any]) -> list[Any]:
    """The model's own, from the state that it has; the model is not touched."""
    twin, answers = copy.deepcopy(model), []
    with torch.inference_mode():
        for frame in frames:
            args = copy.deepcopy(frame) if isinstance(frame, tuple) else (frame.clone(),)
            answers.append(pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, twin(*args)))
    return answers


def check_exact(
    make: Callable[[], nn.Module], frames: list[Any], example: Any = None, most_stages: int = 3, **options: Any
) -> None:
    """The sentence of this file, for a model that can be cut."""
    expected = plain_answers(make(), frames)
    for num_stages in range(1, most_stages + 1):
        model = make()
        before = copy.deepcopy(model.state_dict())
        random_state = torch.get_rng_state()
        if "cut" in options:
            if num_stages > 1:
                break
            stages = ss.cut(model, frames[0] if example is None else example, costs="uniform", **options)
        else:
            stages = ss.cut(
                model, frames[0] if example is None else example, num_stages=num_stages, costs="uniform", **options
            )
        assert torch.equal(torch.get_rng_state(), random_state)
        executors = ["inline", "threads", "sequential"] + ([] if stages.is_stateful else ["frame-parallel"])
        for executor in executors:
            assert_run(stages, frames, expected, executor)
        with pytest.raises(CircuitError) if stages.is_stateful else nothing_raised():
            list(ss.run(ss.pipelined(stages), frames, executor="frame-parallel"))
        if num_stages == most_stages:
            assert_run(stages, frames, expected, "auto")
        circuit = ss.pipelined(stages)
        early = ss.run(circuit, frames, executor="threads")
        next(early), next(early)
        other = ss.run(circuit, frames, executor="threads")  # side by side with the first
        assert_equal(next(other).value, expected[0], "a second run beside the first")
        early.close()
        rest = [o.value for o in other]
        assert_equal(rest, expected[1:], "the second run after the first one ended early")
        assert_run(stages, frames, expected, "threads")
        assert_equal(dict(model.state_dict()), dict(before), "the model's own buffers")


class nothing_raised:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


def assert_run(stages: Any, frames: list[Any], expected: list[Any], executor: str) -> None:
    outputs = list(
        ss.run(ss.pipelined(stages), frames, executor=executor, num_threads=1 if executor == "sequential" else 2)
    )
    assert [o.frame_index for o in outputs] == list(range(len(frames)))
    if executor != "auto":  # which may choose several threads inside of an operator
        for output in outputs:
            assert_equal(output.value, expected[output.frame_index], f"{executor}, frame {output.frame_index}")
    else:
        for output in outputs:
            leaves = zip(
                pytree.tree_leaves(output.value), pytree.tree_leaves(expected[output.frame_index]), strict=True
            )
            for a, b in leaves:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- state in buffers: exact


class WritesBuffer(Net):
    def make(self) -> None:
        self.register_buffer("h", torch.zeros(SIZE))

    def between(self, x: Tensor) -> Tensor:
        self.h.mul_(0.5).add_(x)
        return self.h * 1.0


class AssignsBuffer(WritesBuffer):
    def between(self, x: Tensor) -> Tensor:
        self.h = 0.5 * self.h + x
        return self.h


class AnswersWithBuffer(WritesBuffer):
    def forward(self, x: Tensor) -> Any:
        self.h.copy_(self.body(x))
        return self.head(self.h), self.h


class AnswersWithView(WritesBuffer):
    def forward(self, x: Tensor) -> Any:
        self.h.copy_(self.body(x))
        return {"part": self.h[:, :1], "head": self.head(self.h), "flat": self.h.flatten(1)}


class AnswersWithOldAndNew(WritesBuffer):
    def forward(self, x: Tensor) -> Any:
        old = self.h.clone()
        self.h = self.body(x)
        return old, self.head(self.h), self.h


class TwoBuffersOneMemory(Net):
    """A buffer that is a view of another."""

    def make(self) -> None:
        self.register_buffer("whole", torch.zeros(2, *SIZE))
        self.register_buffer("newest", self.whole[0])

    def between(self, x: Tensor) -> Tensor:
        self.whole[1].copy_(self.whole[0])
        self.newest.copy_(x)
        return self.whole.sum(0)


class Ring(Net):
    """The last three frames, at a position that moves."""

    def make(self) -> None:
        self.register_buffer("ring", torch.zeros(3, *SIZE[1:]))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    def between(self, x: Tensor) -> Tensor:
        self.ring.index_copy_(0, self.at.reshape(1), x)
        self.at.add_(1).remainder_(3)
        return self.ring.mean(0, keepdim=True)


class ReadAtBothEnds(WritesBuffer):
    """The state is read at the start and written at the end."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x) + self.h)
        self.h = y
        return y * 2


class TwoStates(Net):
    """One state in the body, one behind the head."""

    def make(self) -> None:
        self.register_buffer("a", torch.zeros(SIZE))
        self.register_buffer("b", torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[0](x)
        self.a = torch.tanh(self.a + x)
        x = self.head(self.body[1](self.a))
        self.b.mul_(0.9).add_(x)
        return self.b + 1


class NormWithoutCounter(Net):
    def make(self) -> None:
        self.norm = nn.BatchNorm2d(3)
        self.norm.num_batches_tracked = None
        self.norm.train()

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm.running_mean.view(1, 3, 1, 1)

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        if hasattr(self, "norm"):
            self.norm.train()
        return self


class FunctionalNorm(Net):
    """``F.batch_norm(training=True)`` writes its statistics without a version bump."""

    def make(self) -> None:
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def between(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.mean, self.variance, training=True)
        return x + self.mean.view(1, 3, 1, 1)


class FunctionalInstanceNorm(FunctionalNorm):
    def between(self, x: Tensor) -> Tensor:
        x = F.instance_norm(x, self.mean, self.variance, use_input_stats=True)
        return x + self.mean.view(1, 3, 1, 1)


class NestedCell(nn.Module):
    """A recurrent cell that assigns its state, inside of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(64, 64)
        self.register_buffer("h", torch.zeros(3, 64))

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(x.reshape(3, 64), self.h)
        return self.h.view(SIZE)


class AssignsInside(Net):
    def make(self) -> None:
        self.inner = nn.Sequential(NestedCell(), NestedCell())

    def between(self, x: Tensor) -> Tensor:
        return self.inner(x)


class AnswersWithTheOld(WritesBuffer):
    """The name moves on; the answer is the memory that it left."""

    def forward(self, x: Tensor) -> Any:
        old, self.h = self.h, self.body(x)
        return old, self.head(self.h)


class Swaps(Net):
    def make(self) -> None:
        self.register_buffer("a", torch.zeros(SIZE))
        self.register_buffer("b", torch.ones(SIZE))

    def between(self, x: Tensor) -> Tensor:
        self.a, self.b = self.b, self.a + x
        return self.a * 1.0


class OnlyCounts(Net):
    """A stage that reads no frame, but goes with them."""

    def make(self) -> None:
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        self.count = (self.count + 1) % 3
        return self.count, self.head(self.body(x)), self.count * 2


class KeysAndValues(nn.Module):
    """Attention over the last frames, kept in a window."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("window", torch.zeros(1, 4, 8))
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        x = self.query(x.flatten()[:8].view(1, 1, 8))
        self.window = torch.cat([self.window[:, 1:], x], dim=1)
        self.num_seen = self.num_seen + 1
        return self.out(F.scaled_dot_product_attention(x, self.window, self.window)), self.num_seen


class BufferWithGaps(Net):
    """A buffer that does not lie densely in memory."""

    def make(self) -> None:
        self.register_buffer("h", torch.zeros(1, 3, 8, 16)[..., ::2])

    def between(self, x: Tensor) -> Tensor:
        self.h.mul_(0.5).add_(x)
        return self.h.mean((2, 3), keepdim=True) + x


class TrainedNorm(Net):
    """A batch norm in train mode: the statistics of a stream are its own."""

    def make(self) -> None:
        self.norm = nn.BatchNorm2d(3)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm.running_var.view(1, 3, 1, 1)

    def train(self, mode: bool = True) -> Net:
        return super().train(True)


STATES = [
    AssignsInside,
    AnswersWithTheOld,
    Swaps,
    OnlyCounts,
    KeysAndValues,
    BufferWithGaps,
    TrainedNorm,
    WritesBuffer,
    AssignsBuffer,
    AnswersWithBuffer,
    AnswersWithView,
    AnswersWithOldAndNew,
    TwoBuffersOneMemory,
    Ring,
    ReadAtBothEnds,
    TwoStates,
    NormWithoutCounter,
    FunctionalNorm,
    FunctionalInstanceNorm,
]


@pytest.mark.parametrize("kind", STATES, ids=lambda kind: kind.__name__)
def test_state_in_buffers_is_exact_and_each_run_has_its_own(kind: type[nn.Module]) -> None:
    check_exact(functools.partial(made, kind), frames_of())


def test_a_state_that_is_assigned_leaves_the_rest_of_the_model_to_be_cut() -> None:
    """It was written at the very end of the graph, which made one stage of everything behind."""
    stages = ss.cut(made(AssignsBuffer), frames_of()[0], num_stages=4, costs="uniform")
    assert [stage.is_stateful for stage in stages].count(True) == 1


# --- state anywhere else: refused, by name


class InTensor(Net):
    hidden: Any = None

    def between(self, x: Tensor) -> Tensor:
        self.hidden = x if self.hidden is None else 0.5 * self.hidden + x
        return self.hidden


class InPlainTensor(Net):
    def make(self) -> None:
        self.memory = torch.zeros(SIZE)

    def between(self, x: Tensor) -> Tensor:
        self.memory.mul_(0.5).add_(x)
        return self.memory + 0


class InList(Net):
    def make(self) -> None:
        self.past: list[Tensor] = []

    def between(self, x: Tensor) -> Tensor:
        self.past = [*self.past[-2:], x]
        return torch.stack(self.past).mean(0)


class InListInPlace(InList):
    def between(self, x: Tensor) -> Tensor:
        self.past.append(x)
        return self.past[0] + x


class InDeque(Net):
    def make(self) -> None:
        self.past: deque[Tensor] = deque(maxlen=2)

    def between(self, x: Tensor) -> Tensor:
        self.past.append(x)
        return self.past[0] + x


class InDict(Net):
    def make(self) -> None:
        self.cache: dict[str, Any] = {}

    def between(self, x: Tensor) -> Tensor:
        x = x + self.cache.get("x", 0)
        self.cache["x"] = x
        return x


class Box:
    def __init__(self) -> None:
        self.value: Any = 0.0


class InObject(Net):
    def make(self) -> None:
        self.box = Box()

    def between(self, x: Tensor) -> Tensor:
        self.box.value = self.box.value + x
        return self.box.value


class InSlots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = 0.0


class InObjectWithSlots(InObject):
    def make(self) -> None:
        self.box = InSlots()


class InCounter(Net):
    count = 0

    def between(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * 3 if self.count % 5 == 0 else x


class InNestedList(Net):
    def make(self) -> None:
        self.state: Any = {"layers": [torch.zeros(SIZE), 0]}

    def between(self, x: Tensor) -> Tensor:
        self.state["layers"][0] = self.state["layers"][0] * 0.5 + x
        return self.state["layers"][0]


class InClass(Net):
    shared: ClassVar[list[float]] = [0.0]

    def between(self, x: Tensor) -> Tensor:
        InClass.shared[0] += 1.0
        return x * InClass.shared[0]


COUNTED = {"frames": 0}


class InGlobal(Net):
    def between(self, x: Tensor) -> Tensor:
        COUNTED["frames"] += 1
        return x * COUNTED["frames"]


def counting() -> Callable[[], int]:
    count = 0

    def count_up() -> int:
        nonlocal count
        count += 1
        return count

    return count_up


class InClosure(Net):
    def make(self) -> None:
        self.count_up = counting()

    def between(self, x: Tensor) -> Tensor:
        return x * self.count_up()


class InParameter(Net):
    def make(self) -> None:
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        self.scale.data.mul_(0.9)
        return x * self.scale


class FirstFrame(Net):
    """Remembers the first frame, which every answer needs."""

    first: Any = None

    def between(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.detach()
        return x - self.first


ELSEWHERE = [
    (InTensor, "'hidden'"),
    (InPlainTensor, "'memory'"),
    (InList, "'past"),
    (InListInPlace, "past"),
    (InDeque, "past"),
    (InDict, r"cache\['x'\]"),
    (InObject, "box.value"),
    (InObjectWithSlots, "box.value"),
    (InCounter, "'count'"),
    (InNestedList, r"state\['layers'\]\[0\]"),
    (InClass, "shared"),
    (InGlobal, "COUNTED"),
    (InClosure, "count"),
    (InParameter, "writes to its parameter 'scale'"),
    (FirstFrame, "assigns 'first'"),
]


@pytest.mark.parametrize(("kind", "name"), ELSEWHERE, ids=lambda value: getattr(value, "__name__", None))
def test_state_outside_of_buffers_is_refused_by_name_and_the_model_left_as_it_was(
    kind: type[nn.Module], name: str
) -> None:
    model, frames = made(kind), frames_of()
    expected = plain_answers(made(kind), frames)
    counted, shared = dict(COUNTED), list(InClass.shared)
    with pytest.raises(CutError, match=name) as error:
        ss.cut(model, torch.rand(SIZE), num_stages=2)
    assert "buffer" in str(error.value)
    assert (counted, shared) == (COUNTED, InClass.shared)
    with torch.inference_mode():
        assert_equal([model(f.clone()) for f in frames] if kind not in (InGlobal, InClass) else expected, expected)
    COUNTED.update(counted)
    InClass.shared[:] = shared


class Scratch(Net):
    """Attributes that forward writes before it reads them are no state (RAFT keeps its pyramid so)."""

    pyramid: Any = ()

    def between(self, x: Tensor) -> Tensor:
        self.pyramid = [x, F.avg_pool2d(x, 2)]
        self.size = x.shape[-1]
        return self.pyramid[0] + F.interpolate(self.pyramid[1], size=self.size)


class FilledInOnce(Net):
    """A grid that the first call makes, the same whatever the frame."""

    grid: Any = None

    def between(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.linspace(-1, 1, x.shape[-1])
        return x + self.grid


@functools.lru_cache
def cached_grid(size: int) -> Tensor:
    return torch.linspace(0, 1, size)


class CachedGrid(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * cached_grid(x.shape[-1])


@pytest.mark.parametrize("kind", [Scratch, FilledInOnce, CachedGrid], ids=lambda kind: kind.__name__)
def test_attributes_without_memory_are_exact_and_left_as_they_were(kind: type[nn.Module]) -> None:
    check_exact(functools.partial(made, kind), frames_of())
    model = made(kind)
    before = dict(vars(model))
    ss.cut(model, torch.rand(SIZE), num_stages=2)
    assert dict(vars(model)) == before
    assert type(cached_grid(8)) is Tensor
    with torch.inference_mode():
        assert_equal(model(frames_of()[0]), plain_answers(made(kind), frames_of())[0])


# --- state in places that are easily overlooked: every fifth answer is another one


def k(count: Any) -> float:
    return 3.0 if int(count) % 5 == 0 else 1.0


class Counts(Net):
    def start(self) -> Any:
        raise NotImplementedError

    def count(self) -> Any:
        raise NotImplementedError

    def make(self) -> None:
        self.memory: Any = self.start()

    def between(self, x: Tensor) -> Tensor:
        return x * k(self.count())


class InNumpyScalar(Counts):
    def start(self) -> Any:
        return np.int64(0)

    def count(self) -> Any:
        self.memory += 1
        return self.memory


class InDecimal(InNumpyScalar):
    def start(self) -> Any:
        return Decimal(0)


class InTupleKeys(Counts):
    def start(self) -> Any:
        return {("a", 0): 0, ("b", 0): 7}

    def count(self) -> Any:
        self.memory["a", 0] += 1
        return self.memory["a", 0]


class InSetOfTuples(Counts):
    def start(self) -> Any:
        return {("count", 0)}

    def count(self) -> Any:
        ((_, n),) = self.memory
        self.memory = {("count", n + 1)}
        return n + 1


class InOrder(Counts):
    """Which key comes first."""

    def start(self) -> Any:
        return OrderedDict.fromkeys(range(5))

    def count(self) -> Any:
        first = next(iter(self.memory))
        self.memory.move_to_end(first)
        return first


class PrivateSlots:
    __slots__ = ("__count",)

    def __init__(self) -> None:
        self.__count = 0

    def count_up(self) -> int:
        self.__count += 1
        return self.__count


class InPrivateSlots(Counts):
    def start(self) -> Any:
        return PrivateSlots()

    def count(self) -> Any:
        return self.memory.count_up()


class InPointer(Counts):
    """Which of several lists an attribute names."""

    def start(self) -> Any:
        self.pool = [[n] for n in range(5)]
        return self.pool[0]

    def count(self) -> Any:
        self.memory = self.pool[(self.memory[0] + 1) % 5]
        return self.memory[0]


class InActiveModule(Counts):
    """Which of several modules an attribute names."""

    def start(self) -> Any:
        self.experts = nn.ModuleList(nn.Identity() for _ in range(5))
        self.numbers = {id(expert): n for n, expert in enumerate(self.experts)}
        return None

    def make(self) -> None:
        self.start()
        object.__setattr__(self, "active", self.experts[0])

    def count(self) -> Any:
        n = (self.numbers[id(self.active)] + 1) % 5
        object.__setattr__(self, "active", self.experts[n])
        return n


class InTrainingFlags(Counts):
    def start(self) -> Any:
        self.bits = nn.ModuleList(nn.Identity() for _ in range(3))

    def count(self) -> Any:
        n = sum(2**i * bit.training for i, bit in enumerate(self.bits)) + 1
        for i, bit in enumerate(self.bits):
            bit.training = bool(n >> i & 1)
        return n % 5


class InObjectArray(Counts):
    def start(self) -> Any:
        return np.array([Box()], dtype=object)

    def count(self) -> Any:
        self.memory[0].value += 1
        return self.memory[0].value


class InBytes(Counts):
    def start(self) -> Any:
        return bytearray(1)

    def count(self) -> Any:
        self.memory[0] += 1
        return self.memory[0]


class InIterator(Counts):
    def start(self) -> Any:
        return itertools.count()

    def count(self) -> Any:
        return next(self.memory)


class InCycle(InIterator):
    def start(self) -> Any:
        return itertools.cycle(range(5))


class InGenerator(InIterator):
    def start(self) -> Any:
        return (n for n in range(10_000))


class InClassObject(Counts):
    box = Box()

    def start(self) -> Any:
        return None

    def count(self) -> Any:
        self.box.value += 1
        return self.box.value


STATE = Box()


class InGlobalObject(InClassObject):
    box = Box()

    def count(self) -> Any:
        STATE.value += 1
        return STATE.value


OVERLOOKED = [
    InNumpyScalar,
    InDecimal,
    InTupleKeys,
    InSetOfTuples,
    InOrder,
    InPrivateSlots,
    InPointer,
    InActiveModule,
    InTrainingFlags,
    InObjectArray,
    InBytes,
    InIterator,
    InCycle,
    InGenerator,
    InClassObject,
    InGlobalObject,
]


@pytest.mark.parametrize("kind", OVERLOOKED, ids=lambda kind: kind.__name__)
def test_state_in_odd_places_is_refused_and_put_back(kind: type[nn.Module]) -> None:
    model = made(kind)
    values = STATE.value, InClassObject.box.value
    with pytest.raises(CutError, match="keeps state outside of its buffers"):
        ss.cut(model, torch.rand(SIZE), num_stages=1, costs="uniform")
    assert values == (STATE.value, InClassObject.box.value)
    if kind not in (InGenerator, InClassObject, InGlobalObject):  # nothing puts it back; looked at above
        twin, one = made(kind), torch.ones(1)
        with torch.inference_mode():
            assert [float(model.between(one)) for _ in range(6)] == [float(twin.between(one)) for _ in range(6)]


class Writes(nn.Module):
    """Writes to a buffer of another module."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = [owner]

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > -1e9:
            self.owner[0].h.mul_(0.5).add_(x)
        return x + self.owner[0].h


def test_a_module_that_stays_whole_and_writes_elsewhere_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.register_buffer("h", torch.zeros(SIZE))
    net.stem, net.middle, net.head = conv(), Writes(net), conv()
    with pytest.raises(CutError, match=r"writes to the buffer 'h' from a module that does not own it"):
        ss.cut(net.eval(), torch.rand(SIZE), cut=("middle", "head"))


class OpaqueConv(nn.Module):
    """A buffer that hangs on a convolution of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.conv.register_buffer("h", torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > -1e9:
            self.conv.h.mul_(0.5).add_(x)
        return self.conv(self.conv.h)


def test_buffers_on_torchs_modules_inside_of_a_module_that_stays_whole() -> None:
    check_exact(functools.partial(around, OpaqueConv), frames_of(), cut=("head", "tail"))


def test_tied_weights_that_are_untied_after_the_cut_are_refused() -> None:
    model, frame = made(Pair), torch.rand(SIZE)
    model.b[0].weight = model.a[0].weight
    stages = ss.cut(model, (frame, frame), num_stages=2, costs="uniform")
    tied = nn.Parameter(torch.rand(3, 3, 3, 3))
    model.a[0].weight = model.b[0].weight = tied
    with torch.no_grad():
        assert_equal(stages(frame, frame), model(frame, frame))
    model.a[0].weight = nn.Parameter(torch.rand(3, 3, 3, 3))
    with pytest.raises(CircuitError, match="were one tensor at the cut and are several now"):
        stages(frame, frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.double(), "was replaced after the cut"),
        (lambda m: setattr(m.body[0][0].weight, "data", torch.rand(4, 3, 3, 3)), "was replaced after the cut"),
        (lambda m: m.body.append(nn.Tanh()), "another class, forward or children"),
        (lambda m: setattr(m.body[0][1], "forward", torch.sigmoid), "another class, forward or children"),
        (lambda m: setattr(m.body[0][1], "__class__", nn.Sigmoid), "another class, forward or children"),
    ],
)
def test_other_changes_after_the_cut_are_refused(change: Callable[[nn.Module], Any], message: str) -> None:
    model = made(Net)
    stages = ss.cut(model, torch.rand(SIZE), num_stages=2, costs="uniform")
    change(model)
    with pytest.raises(CircuitError, match=message):
        stages(torch.rand(SIZE))


def test_a_hook_for_all_modules_after_the_cut_is_refused() -> None:
    stages = ss.cut(made(Net), torch.rand(SIZE), num_stages=2, costs="uniform")
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, answer: None)
    try:
        with pytest.raises(CircuitError, match="hooks"):
            stages(torch.rand(SIZE))
    finally:
        handle.remove()


def test_the_mode_of_a_module_that_stays_whole_counts() -> None:
    torch.manual_seed(0)
    model, x = Attending(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)).eval(), torch.rand(1, 5, 8)
    stages = ss.cut(model, x, num_stages=2, costs="uniform")
    model.train()
    with pytest.raises(CircuitError, match="MultiheadAttention that is kept whole was cut in eval mode"):
        stages(x)
    model.eval()
    stages(x)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return ()


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Nothing(), torch.rand(2), "answers with nothing"),
        (nn.Identity(), torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]), "nested tensor"),
        (nn.Identity(), torch.rand(2, device="meta"), "without values"),
    ],
)
def test_inputs_and_answers_that_no_stage_can_take_are_refused(model: Any, example: Any, message: str) -> None:
    with pytest.raises(CutError, match=message):
        ss.cut(model.eval(), example, num_stages=1)


def test_arguments_in_another_order_are_refused_in_one_line() -> None:
    x = torch.rand(SIZE)
    stages = ss.cut(made(Pair), {"x": x, "y": x}, num_stages=1, costs="uniform")
    with pytest.raises(LayoutError, match="same arguments, in the same order") as error:
        stages(y=x, x=x)
    assert "\n" not in str(error.value)


class Masked(nn.Module):
    """Torch's own encoder and decoder, with masks that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        return self.head(self.decoder(x, self.encoder(x, mask=mask), tgt_mask=mask))


def test_causal_masks_of_torchs_encoder_and_decoder() -> None:
    check_exact(functools.partial(made, Masked), frames_of(size=(1, 5, 8)))


def test_a_cut_while_the_same_model_runs() -> None:
    """Tracing puts other things into the model for a moment; who runs meanwhile must not meet them."""

    def attending() -> nn.Module:
        torch.manual_seed(0)
        return Attending(nn.MultiheadAttention(8, 2, batch_first=True)).eval()

    for make, size in ((functools.partial(made, AssignsInside), SIZE), (attending, (1, 5, 8))):
        model, frames, failures = make(), frames_of(6, size), []
        expected = plain_answers(model, frames)
        stages, is_done = ss.cut(model, frames[0], num_stages=2, costs="uniform"), threading.Event()

        def keep_running(stages: Any = stages, frames: Any = frames, expected: Any = expected) -> None:
            try:
                while not is_done.is_set():  # noqa: B023
                    assert_run(stages, frames, expected, "threads")
            except BaseException as error:
                failures.append(error)  # noqa: B023

        worker = threading.Thread(target=keep_running)
        worker.start()
        for _ in range(4):
            ss.cut(model, frames[0], num_stages=3, costs="uniform")
        is_done.set()
        worker.join()
        assert failures == []


# --- the example


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.a(x) - scale * self.b(y)


def test_one_tensor_for_two_arguments_of_the_example() -> None:
    x = torch.rand(SIZE)
    pairs = list(zip(frames_of(seed=1), frames_of(seed=2)))
    for example in ((x, x), (x, x[:]), (x, x.view(SIZE)), (x, x.permute(0, 1, 3, 2))):
        check_exact(functools.partial(made, Pair), pairs, example=example)


def test_numbers_of_the_example_may_be_nan_and_keep_their_type() -> None:
    x = torch.rand(SIZE)
    stages = ss.cut(made(Pair), (x, x, float("nan")), num_stages=2)
    assert stages(x, x, float("nan")).isnan().all()
    stages = ss.cut(made(Pair), (x, x, 2), num_stages=2)
    for wrong in (2.0, True, 3):
        with pytest.raises(LayoutError, match="given"):
            stages(x, x, wrong)


class LooksAtLayout(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.is_contiguous() else x * 3


class ViewsContiguous(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.contiguous().view(1, 3, 64).tanh().view(SIZE))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], dim=3)[..., :8],
    "odd offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("kind", [LooksAtLayout, ViewsContiguous, Net], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("of_example", LAYOUTS)
def test_frames_are_laid_out_like_the_example(kind: type[nn.Module], of_example: str) -> None:
    lay_out = LAYOUTS[of_example]
    example = lay_out(torch.rand(SIZE))
    try:
        stages = ss.cut(made(kind), example, num_stages=2, costs="uniform")
    except CutError:
        return
    frames = frames_of(5)
    like = [torch.empty_strided(SIZE, example.stride()).copy_(f) for f in frames]
    expected = plain_answers(made(kind), like)
    given = [other(f) for other, f in zip(LAYOUTS.values(), frames)]
    for executor in ("inline", "threads", "frame-parallel"):
        assert_run(stages, given, expected, executor)


def test_a_source_may_write_every_frame_into_the_same_memory() -> None:
    frames = frames_of(20)
    expected = plain_answers(made(Net), frames)
    stages = ss.cut(made(Net), frames[0], num_stages=3, costs="uniform")

    def reused() -> Iterator[Tensor]:
        memory = torch.empty(SIZE)
        for frame in frames:
            yield memory.copy_(frame)

    for executor in ("inline", "threads", "sequential", "frame-parallel"):
        outputs = list(ss.run(ss.pipelined(stages), reused(), executor=executor, num_threads=2))
        if executor == "sequential":
            torch.testing.assert_close([o.value for o in outputs], expected)
        else:
            assert_equal([o.value for o in outputs], expected, executor)


# --- paths that are taken only while a model is traced


class AsksForTracing(Net):
    ask: Callable[[], bool] = staticmethod(torch.compiler.is_compiling)

    def between(self, x: Tensor) -> Tensor:
        return x * 2 if self.ask() else x * 3


class AsksForExport(AsksForTracing):
    ask = staticmethod(torch.compiler.is_exporting)


class AsksForGradients(AsksForTracing):
    ask = staticmethod(torch.is_grad_enabled)


class AsksForInference(AsksForTracing):
    ask = staticmethod(torch.is_inference_mode_enabled)


@pytest.mark.parametrize("kind", [AsksForTracing, AsksForExport, AsksForInference], ids=lambda kind: kind.__name__)
def test_another_path_while_tracing_is_refused_with_its_place(kind: type[nn.Module]) -> None:
    with pytest.raises(CutError, match=r"first at .*takes another path while it is traced"):
        ss.cut(made(kind), torch.rand(SIZE), num_stages=2, costs="uniform")


def test_the_path_without_gradients_is_the_one_that_runs() -> None:
    check_exact(functools.partial(made, AsksForGradients), frames_of())


class FrozenBody(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


class Checkpointed(Net):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(x)


class CheckpointedAnew(Checkpointed):
    reentrant = False


class HalfPrecisionInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.body(x)
        return self.head(x.float())


@pytest.mark.parametrize(
    "kind", [FrozenBody, Checkpointed, CheckpointedAnew, HalfPrecisionInside], ids=lambda kind: kind.__name__
)
def test_regions_are_exact_and_open(kind: type[nn.Module]) -> None:
    check_exact(functools.partial(made, kind), frames_of())
    stages = ss.cut(made(kind), torch.rand(SIZE), num_stages=4, costs="uniform")
    assert any("body" in stage.name and "head" not in stage.name for stage in stages)
    names = [stage.name for stage in ss.cut(made(kind), torch.rand(SIZE), cut=("body.1", "head"), costs="uniform")]
    assert len(names) == 3


def test_a_model_that_turns_gradients_off_inside_is_not_trained_as_if_it_did_not() -> None:
    pairs = [(f, torch.zeros(SIZE)) for f in frames_of(3)]
    stages = ss.cut(made(FrozenBody), pairs[0][0], num_stages=2, costs="uniform")
    with pytest.raises(SidestreamError, match="turns gradients on or off inside"):
        list(ss.run(ss.pipelined(stages), pairs, rule=ss.Exact(F.mse_loss), executor="inline"))


# --- the caller's modes, and the process


def test_autocast_around_run_is_the_same_on_every_executor() -> None:
    frames = frames_of(4)
    stages = ss.cut(made(Net), frames[0], num_stages=2, costs="uniform")
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_answers(made(Net), frames)
        for executor in ("inline", "threads", "sequential", "frame-parallel"):
            assert_run(stages, frames, expected, executor)
    assert expected[0].dtype == torch.bfloat16
    running = ss.run(ss.pipelined(stages), frames, executor="inline")
    with torch.autocast("cpu", torch.bfloat16):  # begun outside of it
        assert_equal([o.value for o in running], plain_answers_without_autocast(frames))


def plain_answers_without_autocast(frames: list[Tensor]) -> list[Tensor]:
    with torch.autocast("cpu", enabled=False):
        return plain_answers(made(Net), frames)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_cut_in_any_gradient_mode(mode: Any) -> None:
    frames = frames_of(3)
    with mode():
        stages = ss.cut(made(FrozenBody), torch.rand(SIZE), num_stages=3, costs="uniform")
    assert_run(stages, frames, plain_answers(made(FrozenBody), frames), "threads")


def test_a_cut_under_autocast_is_the_model_under_autocast() -> None:
    frames = frames_of(3)
    with torch.autocast("cpu", torch.bfloat16):
        stages = ss.cut(made(Net), torch.rand(SIZE), num_stages=3, costs="uniform")
        for executor in ("inline", "threads"):
            assert_run(stages, frames, plain_answers(made(Net), frames), executor)


def test_a_model_that_ran_in_inference_mode_before() -> None:
    for kind in (FilledInOnce, AssignsBuffer, WritesBuffer):
        model, frames = made(kind), frames_of(4)
        with torch.inference_mode():
            model(frames[0].clone())  # a grid, a state: now tensors of inference mode
        twin = made(kind)
        with torch.inference_mode():
            twin(frames[0].clone())
            expected = [twin(f.clone()).clone() for f in frames]
        stages = ss.cut(model, torch.rand(SIZE), num_stages=2, costs="uniform")
        assert_run(stages, frames, expected, "threads")


# --- whole modules


class OpaqueSmooth(nn.Module):
    """A running mean, faster where the frame changes much: a branch on values, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        fast = float((x - self.mean).abs().mean()) > 0.3
        self.mean.mul_(0.2 if fast else 0.8).add_(x * (0.8 if fast else 0.2))
        return self.mean.clone()


class OpaqueAssigned(OpaqueSmooth):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + x if float(x.mean()) > 0.0 else x
        return self.mean


class OpaqueRarely(OpaqueSmooth):
    """Writes on some frames only."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > 0.1:
            self.mean.copy_(x)
        return self.mean + x


class OpaqueWorkspace(OpaqueSmooth):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.copy_(x * 2 if float(x.mean()) > 0.5 else x)
        return self.mean


class OpaqueCounter(nn.Module):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * 3 if self.count % 5 == 0 and float(x.abs().max()) > 0 else x * 1


def around(middle: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.stem, net.middle, net.head, net.tail = nn.Identity(), middle(), conv(), conv()
    return net.eval()


@pytest.mark.parametrize(
    "middle", [OpaqueSmooth, OpaqueAssigned, OpaqueRarely, OpaqueWorkspace], ids=lambda kind: kind.__name__
)
def test_modules_that_stay_whole_keep_their_buffers_apart(middle: type[nn.Module]) -> None:
    frames = [f - 0.5 * (n % 2) for n, f in enumerate(frames_of(12))]
    check_exact(functools.partial(around, middle), frames, cut=("head", "tail"))


def test_a_counter_in_a_module_that_stays_whole_is_refused() -> None:
    with pytest.raises(CutError, match=r"middle\.count"):
        ss.cut(around(OpaqueCounter), torch.rand(SIZE), cut=("head", "tail"))


class ThreeAnswers(nn.MultiheadAttention):
    """Attention that answers with one thing more."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:  # type: ignore[override]
        answer, weights = super().forward(query, key, value)
        return answer, weights, query.mean()


class CountingAttention(nn.MultiheadAttention):
    """Attention with a memory in a buffer."""

    def __init__(self) -> None:
        super().__init__(8, 2, batch_first=True)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:  # type: ignore[override]
        self.seen += 1
        answer, weights = super().forward(query, key, value)
        return answer * self.seen, weights


class Attending(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(8, 8), attention, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        answer, *rest = self.attention(x, x, x)
        return (self.last(answer), *rest)


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "torch's own": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "three answers": lambda: ThreeAnswers(8, 2, batch_first=True),
    "with a buffer": CountingAttention,
}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_and_its_subclasses(attention: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Attending(ATTENTIONS[attention]()).eval()

    check_exact(make, frames_of(size=(1, 5, 8)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=is_padding))


def test_padding_masks_of_a_transformer_encoder() -> None:
    masks = [torch.arange(5).expand(2, 5) >= torch.tensor([[5], [n]]) for n in (3, 1, 2, 4, 3, 2)]
    check_exact(functools.partial(made, Encoder), list(zip(frames_of(size=(2, 5, 8)), masks)), most_stages=2)


class SparseBuffer(Net):
    def make(self) -> None:
        self.register_buffer("matrix", torch.eye(8).mul(0.5).to_sparse(), persistent=False)

    def between(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.matrix, x.reshape(24, 8).t()).t().reshape(SIZE)


class Mapped(Net):
    """``vmap`` opens something that it closes later: no stage may begin between."""

    def between(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda channel: (channel * channel.sum()).tanh() + channel.mean())(x[0])[None]


class Constant(Net):
    def forward(self, x: Tensor) -> Any:
        return {"answer": [self.head(self.body(x)), None, 3], "frame": x, "grid": torch.arange(3) * 2.0}


class InPlaceOnView(Net):
    def between(self, x: Tensor) -> Tensor:
        x[:, 1:] = x[:, 1:].relu_()
        x.transpose(2, 3)[..., 0].add_(1.0)
        return x.add_(x.flip(2))


class OldWeightNorm(Net):
    """Hooks that make the weight anew in each call."""

    def make(self) -> None:
        nn.utils.spectral_norm(self.body[0][0])


class Parametrized(Net):
    def make(self) -> None:
        nn.utils.parametrizations.weight_norm(self.body[0][0])
        nn.utils.parametrizations.spectral_norm(self.head[0][0])


class SequenceNet(nn.Module):
    def __init__(self, recurrent: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.recurrent, self.last = nn.Linear(8, 8), recurrent(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.recurrent(self.first(x))
        return self.last(answer[0] if isinstance(answer, tuple) else answer)


class TwiceLSTM(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0] * 2


PLAIN = [SparseBuffer, Mapped, Constant, InPlaceOnView, OldWeightNorm, Parametrized]


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_odd_but_stateless_models_are_exact(kind: type[nn.Module]) -> None:
    check_exact(functools.partial(made, kind), frames_of())


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN, TwiceLSTM], ids=lambda kind: kind.__name__)
def test_torchs_recurrent_modules_and_subclasses(recurrent: type[nn.Module]) -> None:
    check_exact(functools.partial(made, functools.partial(SequenceNet, recurrent)), frames_of(size=(1, 5, 8)))


class OwnGenerator(Net):
    def make(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def between(self, x: Tensor) -> Tensor:
        return x + torch.rand(SIZE, generator=self.generator)


class ByTheClock(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * float(time.perf_counter_ns() % 1013)


class PythonsRandom(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * random.random()


class Grows(Net):
    def make(self) -> None:
        self.register_buffer("all", torch.zeros(0, 3, 8, 8))

    def between(self, x: Tensor) -> Tensor:
        self.all = torch.cat([self.all, x])
        return self.all.mean(0, keepdim=True)


class ThroughNumpy(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.numpy() * 2)


class NotReady(Net):
    def make(self) -> None:
        self.lazy = nn.LazyConv2d(3, 1)

    def between(self, x: Tensor) -> Tensor:
        return self.lazy(x)


class FailsOnTheExample(Net):
    def between(self, x: Tensor) -> Tensor:
        return x.view(5, 7)


REFUSED = [
    (OwnGenerator, "'generator'"),
    (ByTheClock, "does not answer the same frame twice alike"),
    (PythonsRandom, "PythonsRandom draws random numbers from the generator of the module random"),
    (Grows, r"'all' of Grows is \(0, 3, 8, 8\).*assigns .*keeps its shape"),
    (ThroughNumpy, r"cannot be traced at .*x\.numpy\(\)"),
    (NotReady, r"'lazy\.weight' is not initialised yet .*call the model once"),
    (FailsOnTheExample, r"fails on the example at .*view\(5, 7\)"),
]


@pytest.mark.parametrize(("kind", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_what_cannot_be_exact_is_refused_in_one_line(kind: type[nn.Module], message: str) -> None:
    model, example = made(kind), torch.rand(SIZE)
    random_states = torch.get_rng_state(), random.getstate()
    with pytest.raises(CutError, match=message) as error:
        ss.cut(model, example, num_stages=2)
    assert "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]


def test_a_detector_is_refused_with_the_place_of_its_code() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    with pytest.raises(CutError, match=r"cannot be traced at .*torchvision.*\.py:\d+"):
        ss.cut(model, ([torch.rand(3, 64, 64)],), num_stages=2)


def test_raft_with_one_picture_for_both_arguments() -> None:
    """Its pyramid is kept in an attribute, which each call writes before it reads it."""
    raft = pytest.importorskip("torchvision").models.optical_flow.raft_small
    torch.manual_seed(0)
    model, picture = raft(weights=None).eval(), torch.rand(1, 3, 128, 128)
    pairs = [(torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)) for _ in range(2)]
    with torch.inference_mode():
        expected = [model(a, b, num_flow_updates=2) for a, b in pairs]
    stages = ss.cut(model, {"image1": picture, "image2": picture, "num_flow_updates": 2}, num_stages=3, costs="uniform")
    given = [{"image1": a, "image2": b, "num_flow_updates": 2} for a, b in pairs]
    for executor in ("threads", "frame-parallel"):
        assert_run(stages, given, expected, executor)


# --- streams of layers, and stages by hand


class ForgetfulNorm(nn.Module):
    """A running mean in a buffer, where layers of a stream should have a state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x)
        return x - self.mean


class Keeps(nn.Module):
    last: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x, self.last = x - self.last, x
        return x


def stages_by_hand(middle: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return stages_of([conv().eval(), middle().eval(), conv().eval()], frames_of()[0])


def stream_of(middle: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    chain = Chain(PerFrame(conv()), PerFrame(middle()), PerFrame(conv())).eval()
    return ss.cut(chain, frames_of()[0], num_stages=3, costs="uniform")


@pytest.mark.parametrize("make", [stages_by_hand, stream_of], ids=lambda make: make.__name__)
def test_buffers_of_layers_and_of_stages_by_hand(make: Callable[..., Any]) -> None:
    frames = frames_of()
    expected = plain_answers(around_it(ForgetfulNorm), frames)
    stages = make(ForgetfulNorm)
    for executor in ("inline", "threads", "sequential", "threads"):
        assert_run(stages, frames, expected, executor)
    with pytest.raises(CircuitError, match="stages with state"):
        ss.run(ss.pipelined(stages), frames, executor="frame-parallel")
    draws = make(lambda: nn.Dropout(0.5))
    assert not any(stage.draws for stage in draws)  # in eval mode it does not


def around_it(middle: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(), middle(), conv()).eval()


def test_attributes_of_layers_are_refused_and_of_stages_by_hand_keep_frames_in_order() -> None:
    with pytest.raises(CutError, match=r"'1\.module\.last'"):
        stream_of(Keeps)
    with pytest.warns(UserWarning, match="'2:Keeps' keeps state outside of its buffers"):
        stages = stages_by_hand(Keeps)
    with pytest.raises(CircuitError, match="stages with state"):
        ss.run(ss.pipelined(stages), frames_of(), executor="frame-parallel")
    assert_run(stages, frames_of(), plain_answers(around_it(Keeps), frames_of()), "threads")


def test_a_stage_with_state_that_reads_nothing_is_refused() -> None:
    stage = Stage("counts", lambda inputs, state: ((torch.tensor(state),), state + 1), 0, 1, init_state=lambda: 0)
    other = Stage("passes", lambda inputs, state: (inputs, state), 1, 1)
    spec = pytree.tree_structure(((torch.zeros(1),), {}))
    stages = Stages((stage, other), (Link(0, 0, 2, 0), Link(1, 0, 3, 0)), spec, pytree.tree_structure(0))
    with pytest.raises(CircuitError, match="keeps state but reads nothing"):
        ss.pipelined(stages)


# --- many cuts


def test_cuts_in_several_threads_are_right_and_leave_the_process_as_it_was() -> None:
    frames, failures = frames_of(3), []
    expected = plain_answers(made(Net), frames)
    models, stderr = [made(Net) for _ in range(4)], sys.stderr

    def cut_and_run(model: nn.Module) -> None:
        try:
            for _ in range(3):
                stages = ss.cut(model, frames[0], num_stages=2, costs="uniform")
                assert_run(stages, frames, expected, "threads")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=cut_and_run, args=(model,)) for model in models]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert sys.stderr is stderr


def test_sixty_cuts_in_a_row() -> None:
    model, frames = made(AssignsBuffer), frames_of(3)
    expected, before = plain_answers(model, frames), copy.deepcopy(model.state_dict())
    num_objects = 0
    for n in range(60):
        stages = ss.cut(model, frames[0], num_stages=2, costs="uniform")
        if n == 20:
            del stages
            gc.collect()
            num_objects = len(gc.get_objects())
    del stages
    gc.collect()
    assert len(gc.get_objects()) < 1.02 * num_objects
    assert_equal(dict(model.state_dict()), dict(before))
    assert_run(ss.cut(model, frames[0], num_stages=2), frames, expected, "threads")


# --- what else a user may hand over


def test_compiled_and_exported_models_are_the_models_that_they_were() -> None:
    frames = frames_of(3)
    expected = plain_answers(made(Net), frames)
    exported = torch.export.export(made(Net), (frames[0],))
    for model in (torch.compile(made(Net)), exported, exported.module()):
        stages = ss.cut(model, frames[0], num_stages=3, costs="uniform")
        assert_run(stages, frames, expected, "threads")


@pytest.mark.parametrize("thing", [lambda x: x, "resnet50", torch.nn.functional.relu, nn.Conv2d])
def test_what_is_no_module_is_refused(thing: Any) -> None:
    with pytest.raises(CutError, match=r"give an nn\.Module"):
        ss.cut(thing, torch.rand(SIZE))


class Draws(Net):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


def test_random_numbers_are_drawn_in_the_models_order_or_refused() -> None:
    frames = frames_of(4)
    stages = ss.cut(made(Draws), frames[0], num_stages=2, costs="uniform")
    twin = made(Draws)
    torch.manual_seed(3)
    with torch.inference_mode():
        expected = [twin(f) for f in frames]
    for executor in ("sequential", "auto"):
        torch.manual_seed(3)
        outputs = ss.run(ss.pipelined(stages), frames, executor=executor, num_threads=1)
        assert_equal([o.value for o in outputs], expected, executor)
    for executor in ("threads", "frame-parallel", "inline"):
        with pytest.raises(CircuitError, match="draws random numbers"):
            ss.run(ss.pipelined(stages), frames, executor=executor)


# --- a model that is changed after the cut


def test_weights_that_are_replaced_after_the_cut_are_taken_over() -> None:
    frames = frames_of(3)
    model, other = made(Net), made(Net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    stages = ss.cut(model, frames[0], num_stages=3, costs="uniform")
    model.load_state_dict(other.state_dict(), assign=True)
    assert_run(stages, frames, plain_answers(other, frames), "threads")
    model.head[0][0].weight = nn.Parameter(torch.ones_like(model.head[0][0].weight))
    assert_run(stages, frames, plain_answers(model, frames), "threads")
    model.head[0][0].weight = nn.Parameter(torch.ones(2, 3, 3, 3))
    with pytest.raises(CircuitError, match=r"'head\.0\.0\.weight' was replaced"):
        ss.run(ss.pipelined(stages), frames)


def test_modules_and_hooks_that_are_replaced_after_the_cut_are_refused() -> None:
    model = made(Net)
    stages = ss.cut(model, torch.rand(SIZE), num_stages=3, costs="uniform")
    kept, model.body[0] = model.body[0], conv()
    with pytest.raises(CircuitError, match=r"module 'body\.0.*' of the model was replaced"):
        stages(torch.rand(SIZE))
    model.body[0] = kept
    handle = model.head[1][0].register_forward_hook(lambda module, given, answer: answer * 2)
    with pytest.raises(CircuitError, match=r"hooks of module 'head\.1\.0' were added"):
        stages(torch.rand(SIZE))
    handle.remove()
    stages(torch.rand(SIZE))


class Scaled(Net):
    def make(self) -> None:
        self.scale, self.offset, self.size = 2.0, torch.ones(1), 0

    def between(self, x: Tensor) -> Tensor:
        self.size = x.shape[-1]
        return x * self.scale + self.offset


def test_numbers_and_tensors_in_attributes_that_change_after_the_cut_are_refused() -> None:
    model, frame = made(Scaled), torch.rand(SIZE)
    stages = ss.cut(model, frame, num_stages=1, costs="uniform")
    with torch.inference_mode():
        expected = model(frame)  # assigns its size, which is no change
    assert_equal(stages(frame), expected)
    for change, back in (
        (lambda: setattr(model, "scale", 3.0), lambda: setattr(model, "scale", 2.0)),
        (lambda: setattr(model, "offset", torch.zeros(1)), None),
    ):
        change()
        with pytest.raises(CircuitError, match=r"'(scale|offset)' of the model was changed after the cut"):
            stages(frame)
        if back is not None:
            back()
            assert_equal(stages(frame), expected)
    stages = ss.cut(model, frame, num_stages=1, costs="uniform")
    model.offset.add_(1.0)  # type: ignore[operator, union-attr]
    with pytest.raises(CircuitError, match="'offset' of the model was changed"):
        ss.run(ss.pipelined(stages), [frame])


def test_a_replaced_module_without_weights_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1), nn.Linear(4, 4)).eval()
    stages = ss.cut(model, torch.rand(1, 4), num_stages=2, costs="uniform")
    model[1].negative_slope = 0.5
    with pytest.raises(CircuitError, match=r"'1\.negative_slope' of the model was changed"):
        stages(torch.rand(1, 4))
    model[1] = nn.ReLU()
    with pytest.raises(CircuitError, match="module '1' of the model was replaced"):
        stages(torch.rand(1, 4))


def test_hooks_that_change_values_are_part_of_the_cut_and_hooks_with_a_memory_are_refused() -> None:
    def doubled() -> nn.Module:
        model = made(Net)
        model.body.register_forward_hook(lambda module, given, answer: answer * 2)
        return model

    check_exact(doubled, frames_of())
    model, kept = made(Net), []
    model.body.register_forward_hook(lambda module, given, answer: kept.append(answer))
    with pytest.raises(CutError, match="kept"):
        ss.cut(model, torch.rand(SIZE), num_stages=2)
    assert kept == []
