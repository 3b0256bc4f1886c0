"""Small changes to source code, one at a time: which there are in a file, and which a seed chooses.

    comparison      < and <=, > and >=, == and !=, is and is not, in and not in: each for the other
    arithmetic      + and -: each for the other
    choice          max and min, any and all, and and or: each for the other; a ``not`` dropped
    constant        True and False: each for the other; a number plus 1
    statement       left out: a call, an assignment to an attribute or an item, +=, raise, break, continue

What is no computation stays as it is: names given to constants, defaults of arguments, texts of errors, annotations,
decorators, ``__repr__``, what draws with matplotlib. A place is chosen by the hash of its text and the seed, so that a
change elsewhere in the file changes no choice.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPARISONS: tuple[tuple[type[ast.cmpop], type[ast.cmpop]], ...] = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
)
OTHER: dict[type[ast.AST], type[Any]] = {a: b for pair in COMPARISONS for a, b in (pair, pair[::-1])}
OTHER |= {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.And: ast.Or, ast.Or: ast.And}
OTHER_CALL = {"max": "min", "min": "max", "any": "all", "all": "any"}
UNTOUCHED_FIELDS = {"annotation", "returns", "decorator_list", "defaults", "kw_defaults", "type_params"}
UNTOUCHED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
MOST_LETTERS = 100


@dataclass(frozen=True)
class Mutation:
    """One change; its name says where and what, without a line number."""

    path: str
    """Of the file in the package, as "nn/shift.py"."""
    name: str
    apply: Callable[[], str]
    """The source of the file with this change."""


def mutations(path: str, source: str) -> list[Mutation]:
    """Every change to one file, in order."""
    tree = ast.parse(source)
    seen: Counter[str] = Counter()
    found = []
    for scope, node, new, parent, put in _places(tree, ""):
        text = f"{path}, {scope or 'top'}: {_told(node, new, parent, put)}"
        seen[text] += 1
        name = text if seen[text] == 1 else f"{text} (no. {seen[text]})"
        found.append(Mutation(path, name, _applied(tree, node, new, put)))
    return found


def choose(package: Path, files: Sequence[str], seed: int, count: int) -> list[Mutation]:
    """``count`` changes to these files of the package, by seed."""
    every = [m for path in files for m in mutations(path, (package / path).read_text(encoding="utf-8"))]
    return sorted(every, key=lambda m: hashlib.sha256(f"{seed} {m.name}".encode()).digest())[:count]


Put = Callable[[ast.AST], None]
Place = tuple[str, ast.AST, ast.AST, ast.AST, Put]
"""The function it is in, a node, another one for it, the node around it, and what puts one there."""


def _places(node: ast.AST, scope: str) -> Iterator[Place]:
    for name, value in ast.iter_fields(node):
        for n, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or name in UNTOUCHED_FIELDS or _is_no_computation(node, child):
                continue
            put = _putter(node, name, n if isinstance(value, list) else None)
            for new in _variants(child):
                yield scope, child, new, node, put
            if not isinstance(child, UNTOUCHED):
                inside = child.name if isinstance(child, ast.ClassDef | ast.FunctionDef) else ""
                yield from _places(child, f"{scope}.{inside}".strip("."))


def _is_no_computation(parent: ast.AST, node: ast.AST) -> bool:
    """A name given to a constant or a field, what only type checkers read, and what is only shown."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return isinstance(parent, ast.Module | ast.ClassDef)
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if not isinstance(node, ast.FunctionDef):
        return False
    draws = any(isinstance(n, ast.ImportFrom) and (n.module or "").startswith("matplotlib") for n in ast.walk(node))
    return draws or node.name in ("__repr__", "extra_repr")


def _putter(parent: ast.AST, name: str, n: int | None) -> Put:
    def put(node: ast.AST) -> None:
        if n is None:
            setattr(parent, name, node)
        else:
            getattr(parent, name)[n] = node

    return put


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    if type(node) in OTHER:
        yield OTHER[type(node)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Name) and node.id in OTHER_CALL and isinstance(node.ctx, ast.Load):
        yield ast.Name(OTHER_CALL[node.id], ast.Load())
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif _may_be_left_out(node):
        yield ast.Pass()


def _may_be_left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Break | ast.Continue)


def _told(node: ast.AST, new: ast.AST, parent: ast.AST, put: Put) -> str:
    """The change, with what is around it where that is short."""
    if isinstance(parent, ast.expr | ast.Return | ast.Assign | ast.AugAssign | ast.Expr):
        before = ast.unparse(parent)
        put(new)
        after = ast.unparse(parent)
        put(node)
        if len(before) <= MOST_LETTERS:
            return f"{before} -> {after}"
    texts = [" ".join(ast.unparse(n).split()) or type(n).__name__ for n in (node, new)]
    return " -> ".join(text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + " ..." for text in texts)


def _applied(tree: ast.AST, node: ast.AST, new: ast.AST, put: Put) -> Callable[[], str]:
    def apply() -> str:
        put(new)
        text = ast.unparse(ast.fix_missing_locations(tree))
        put(node)
        return text

    return apply
