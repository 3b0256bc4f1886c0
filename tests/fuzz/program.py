"""A random model as data: its inputs, its lines of code and its answer; printed and built as Python source."""

from __future__ import annotations

import inspect
import itertools
import linecache
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz import parts
from fuzz.layouts import in_layout

_ATTRIBUTE = re.compile(r"self\.([A-Za-z_]\w*)")
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Input:
    """One tensor that the model is called with, and the memory layout that the example has it in."""

    name: str
    shape: tuple[int, ...]
    kind: str = "float"
    layout: str = "contiguous"
    same_as: str = ""
    """The name of an input whose tensor this one is too."""

    def value(self, generator: torch.Generator, layout: str) -> Tensor:
        """A random tensor of this shape and type, in a layout by name."""
        if self.kind == "long":
            values = torch.randint(0, 4, self.shape, generator=generator)
        elif self.kind == "bool":
            values = torch.rand(self.shape, generator=generator) > 0.5
        else:
            dtype = torch.float64 if self.kind == "double" else torch.float32
            values = torch.randn(self.shape, generator=generator, dtype=dtype)
        return in_layout(values, layout)


@dataclass(frozen=True)
class Line:
    """A statement of ``forward``; lines in a row with the same region stand in one ``with torch.no_grad():``."""

    code: str
    region: int = 0
    feature: str = ""


@dataclass(frozen=True)
class Program:
    """A model: what it is called with, what it does, what it answers."""

    seed: int
    inputs: tuple[Input, ...]
    lines: tuple[Line, ...]
    leaves: tuple[str, ...]
    """The expressions of the answer."""
    structure: str = "tuple"
    """How the answer holds them: one of ``STRUCTURES``."""
    setup: Mapping[str, str] = field(default_factory=dict)
    """The line of ``__init__`` for each attribute."""
    calling: str = "positional"
    """"positional", "keyword", or "nested" (one dict of all inputs)."""
    is_training: bool = False
    is_frozen: bool = True
    num_frames: int = 6
    layouts: tuple[str, ...] = ("contiguous",)
    """Layouts of the frames, in turn."""

    def replace(self, **changes: Any) -> Program:
        return replace(self, **changes)

    @property
    def attributes(self) -> list[str]:
        """The attributes that the code reads or writes, in the order in which they were made."""
        text = "\n".join([*(line.code for line in self.lines), *self.leaves])
        used = set(_ATTRIBUTE.findall(text))
        return [name for name in self.setup if name in used]


STRUCTURES: dict[str, Callable[[Sequence[str]], str]] = {
    "single": lambda leaves: leaves[0],
    "tuple": lambda leaves: f"({', '.join(leaves)},)",
    "list": lambda leaves: f"[{', '.join(leaves)}]",
    "dict": lambda leaves: "{" + ", ".join(f'"a{n}": {leaf}' for n, leaf in enumerate(leaves)) + "}",
    "nested": lambda leaves: f'{{"first": ({", ".join(leaves)},), "rest": [{leaves[0]}, {{"again": {leaves[-1]}}}]}}',
}


def source(program: Program) -> str:
    """The class of the model as Python source."""
    attributes = program.attributes
    lines = ["class Model(nn.Module):"]
    if attributes:
        lines += ["    def __init__(self):", "        super().__init__()"]
        lines += [f"        {program.setup[name]}" for name in attributes]
        lines += [""]
    names = [given.name for given in program.inputs]
    arguments = "given" if program.calling == "nested" else ", ".join(names)
    lines += [f"    def forward(self, {arguments}):"]
    if program.calling == "nested":
        lines += [f'        {name} = given["{name}"]' for name in names]
    region = 0
    for line in program.lines:
        if line.region and line.region != region:
            lines += ["        with torch.no_grad():"]
        region = line.region
        lines += [f"{'            ' if region else '        '}{line.code}"]
    lines += [f"        return {STRUCTURES[program.structure](program.leaves)}"]
    return "\n".join(lines) + "\n"


def namespace() -> dict[str, Any]:
    """What the code of a model may use."""
    return {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor, **vars(parts)}


def build(program: Program) -> nn.Module:
    """The model, with weights from the program's seed."""
    text = source(program)
    name = f"model_{program.seed}_{next(_NUMBERS)}.py"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names = namespace()
    exec(compile(text, name, "exec"), names)
    with torch.random.fork_rng():
        torch.manual_seed(program.seed)
        model: nn.Module = names["Model"]()
    linecache.cache.pop(f"model_{program.seed}_{next(_NUMBERS) - 200}.py", None)
    model.requires_grad_(not program.is_frozen)
    return model.train(program.is_training)


def example(program: Program) -> Any:
    """What the model is cut with."""
    generator = torch.Generator().manual_seed(program.seed)
    return _call(program, _values(program, generator, itertools.repeat("")))


def frames(program: Program) -> list[Any]:
    """What the model is fed: other values, in layouts of their own."""
    generator = torch.Generator().manual_seed(program.seed + 1_000_003)
    turns = itertools.cycle(program.layouts)
    return [_call(program, _values(program, generator, turns)) for _ in range(program.num_frames)]


def _values(program: Program, generator: torch.Generator, layouts: Iterator[str]) -> list[Tensor]:
    """One tensor for each input, in the next of the layouts (empty: in its own)."""
    values: dict[str, Tensor] = {}
    for given in program.inputs:
        same = values.get(given.same_as)
        values[given.name] = given.value(generator, next(layouts) or given.layout) if same is None else same
    return list(values.values())


def _call(program: Program, values: list[Tensor]) -> Any:
    names = [given.name for given in program.inputs]
    if program.calling == "keyword":
        return dict(zip(names, values, strict=True))
    if program.calling == "nested":
        return (dict(zip(names, values, strict=True)),)
    return values[0] if len(values) == 1 else tuple(values)


def report(program: Program) -> str:
    """Everything that is needed to see the failure again, for people."""
    given = ", ".join(
        f"{i.name}: {i.kind}{list(i.shape)} {i.layout}{f' (is {i.same_as})' * bool(i.same_as)}" for i in program.inputs
    )
    mode = f"{'training' if program.is_training else 'evaluation'}, {'frozen' if program.is_frozen else 'not frozen'}"
    return (
        f"# seed {program.seed}; {program.calling} inputs {given}; {mode}; {program.num_frames} frames, "
        f"layouts {', '.join(program.layouts)}\n{_parts_of(program)}{source(program)}"
    )


def _parts_of(program: Program) -> str:
    """The source of the ready blocks that the program uses."""
    text = " ".join(program.setup[name] for name in program.attributes)
    classes = [c for name, c in vars(parts).items() if isinstance(c, type) and re.search(rf"\b{name}\(", text)]
    own = {base: None for c in classes for base in reversed(c.__mro__) if base.__module__ == parts.__name__}
    return "".join(f"{inspect.getsource(c)}\n" for c in own)
