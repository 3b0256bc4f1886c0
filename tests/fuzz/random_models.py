"""Random models from a seed: a program of statements over the tensors made so far, each tried as it is written."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace

import torch

from fuzz.layouts import LAYOUTS
from fuzz.pool import Pool, fill
from fuzz.program import STRUCTURES, Input, Line, Program
from fuzz.state_statements import STATE
from fuzz.statements import DEFAULT, FEATURES

_SHAPES = ((1, 4, 6, 6), (1, 4, 6, 6), (1, 3, 8, 8), (1, 6, 4, 4), (2, 4, 5, 5), (1, 8), (2, 6), (1, 5, 8), (3, 4, 6))
_FREQUENT = {"writes": 3.0, "views": 2.0, "pointwise": 1.5, "attention": 0.25, "recurrent layers": 0.25, "linear": 0.7}
"""How often a feature is taken, where it is not 1."""


def random_program(seed: int, features: Iterable[str] = DEFAULT) -> Program:
    """A program; the same for the same seed and features."""
    rng = random.Random(seed)
    features = set(features)
    if rng.random() < 0.35:  # many models have no state; only these run frame-parallel
        features -= set(STATE)
    if rng.random() < 0.2:
        features -= {"writes", "buffer writes"}
    inputs = _inputs(rng, features)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pool = Pool(rng, features)
        pool.model.train(is_training := "training" in features and rng.random() < 0.15)
        generator = torch.Generator().manual_seed(seed)
        for given in inputs:
            pool.add_input(given.name, given.value(generator, given.layout))
        lines = _lines(rng, pool, features)
        leaves = _leaves(rng, pool, features, _unread(lines))
    return Program(
        seed=seed,
        inputs=inputs,
        lines=tuple(lines),
        leaves=tuple(leaves),
        structure="single" if len(leaves) == 1 and rng.random() < 0.8 else rng.choice(list(STRUCTURES)[1:]),
        setup=pool.setup,
        calling=rng.choice(("positional",) * 4 + ("keyword", "nested")),
        is_training=is_training,
        is_frozen="gradients" not in features or rng.random() < 0.6,
        num_frames=rng.randint(5, 8),
        layouts=_frame_layouts(rng, features),
    )


def _inputs(rng: random.Random, features: set[str]) -> tuple[Input, ...]:
    shape = rng.choice(_SHAPES)
    inputs: list[Input] = []
    for n in range(rng.choice((1, 1, 1, 2, 2, 3))):
        kind = rng.choice(("float",) * 5 + ("long", "bool", "double")) if n and "other types" in features else "float"
        layout = rng.choice(list(LAYOUTS)) if "layouts" in features and rng.random() < 0.4 else "contiguous"
        own = shape if rng.random() < 0.7 else rng.choice(_SHAPES)
        is_same = n > 0 and "aliased example" in features and rng.random() < 0.2
        inputs.append(replace(inputs[0], name=f"x{n}", same_as="x0") if is_same else Input(f"x{n}", own, kind, layout))
    return tuple(inputs)


def _frame_layouts(rng: random.Random, features: set[str]) -> tuple[str, ...]:
    if "layouts" not in features or rng.random() < 0.4:
        return ("contiguous",)
    return tuple(rng.choices(list(LAYOUTS), k=rng.randint(1, 4)))


def _lines(rng: random.Random, pool: Pool, features: set[str]) -> list[Line]:
    names = [name for name in FEATURES if name in features]
    weights = [_FREQUENT.get(name, 1.0) * rng.choice((0.3, 1.0, 1.0, 2.0)) for name in names]
    lines: list[Line] = []
    wanted, region = rng.randint(3, 22), 0
    for _ in range(20 * wanted):
        if len(lines) >= wanted:
            break
        if "no_grad" in features and rng.random() < 0.06:
            region = 0 if region else len(lines) + 1
        feature = rng.choices(names, weights)[0]
        if (line := _line(pool, rng.choice(FEATURES[feature]))) is not None:
            lines.append(Line(line, region, feature))
    return lines


def _line(pool: Pool, statement: str) -> str | None:
    """The statement with its blanks filled, when it runs on the live values."""
    shapes, setup = dict(pool.shapes), dict(pool.setup)
    filled = fill(pool, statement)
    if filled is not None:
        code, attributes = filled
        try:
            for name, line in attributes.items():
                pool.attach(name, line)
                if name in pool.model._modules:
                    pool.model._modules[name].train(pool.model.training)
            if pool.attempt(code):
                return code
        except Exception:  # the attribute cannot be made like that
            pass
    for name in pool.setup.keys() - setup.keys():  # what was made for this statement alone
        for place in (pool.model._modules, pool.model._buffers, pool.model._parameters):
            place.pop(name, None)
    pool.setup, pool.shapes = setup, shapes
    return None


def _unread(lines: list[Line]) -> list[str]:
    """The values that no later statement reads."""
    text = "\n".join(line.code for line in lines)
    return [name for name in dict.fromkeys(re.findall(r"\bv\d+\b", text)) if len(re.findall(rf"\b{name}\b", text)) == 1]


def _leaves(rng: random.Random, pool: Pool, features: set[str], unread: list[str]) -> list[str]:
    """Expressions of the answer: values that nobody reads (or their work would not show), late ones, odd ones."""
    names = list(pool.values)
    leaves = [names[-1 - min(int(rng.expovariate(0.4)), len(names) - 1)] for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if rng.random() < 0.7:
        leaves += rng.sample(unread, min(len(unread), rng.randint(1, 5)))
    if "odd answers" in features and rng.random() < 0.5:
        leaves += [_odd_leaf(rng, pool) for _ in range(rng.randint(1, 2))]
    rng.shuffle(leaves)
    return leaves


def _odd_leaf(rng: random.Random, pool: Pool) -> str:
    buffers = [f"self.{name}" for name in pool.shapes]
    inputs = list(pool.inputs)
    names = [name for name, _ in pool.model.named_parameters() if not re.search(r"\.\d", name)]
    parameters = [f"self.{name}" for name in names]
    rows = [name for name, value in pool.values.items() if value.dim() > 0]
    options: list[list[str]] = [
        inputs,
        [f"{name}[:1]" for name in inputs],
        [f"{name}.mT" for name in inputs],
        buffers,
        buffers,
        [f"{name}[..., :1]" for name in buffers if pool.shapes[name[5:]][0]],
        [f"{name}.detach()" for name in buffers],
        [f"{name}[:1]" for name in rows],
        ["torch.ones(2)", "torch.arange(3)"],
        ["None", "3", "True", f"{inputs[0]}.shape[-1]", "0.5"],
        parameters[:3],
        list(pool.values),
    ]
    chosen = rng.choice(options)
    return rng.choice(chosen or inputs)
