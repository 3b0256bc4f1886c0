"""Equal to the bit: what is the same, and what only looks so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sidestream.circuit.same import same, same_leaf

NAN = float("nan")
X = torch.tensor([1.0, NAN, -0.5])
SAME: list[tuple[Any, Any]] = [
    (NAN, float("nan")),
    (X, X.clone()),
    (torch.eye(2).to_sparse(), torch.eye(2).to_sparse()),
    (np.array([1.0, NAN]), np.array([1.0, NAN])),
    ((1, "a", None), (1, "a", None)),
    ({"x": [X, 2]}, {"x": [X.clone(), 2]}),
]
OTHER: list[tuple[Any, Any]] = [
    (NAN, 1.0),
    (1.0, NAN),
    (1, 1.0),
    (True, 1),
    (X, X + 1),
    (X, torch.tensor([1.0, 2.0, -0.5])),
    (torch.tensor([1.0, 2.0, -0.5]), X),
    (X, X.double()),
    (X, X[:2]),
    (X, 1.0),
    (torch.eye(2), torch.eye(2).to_sparse()),
    (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()),
    (np.array([1.0]), np.array([1])),
    ((1, 2), [1, 2]),
    ({"x": 1}, {"y": 1}),
    (object(), object()),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_the_same(a: Any, b: Any) -> None:
    assert same(a, b)
    assert same(b, a)


@pytest.mark.parametrize(("a", "b"), OTHER)
def test_not_the_same(a: Any, b: Any) -> None:
    assert not same(a, b)
    assert not same(b, a)


def test_what_cannot_be_compared_is_the_same_only_as_itself() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no")

    odd = Odd()
    assert same_leaf(odd, odd)
    assert not same_leaf(odd, Odd())
