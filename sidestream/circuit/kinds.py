"""Kinds of things that a walk over a model meets: what cannot change, what is not looked into, what may hold state."""

from __future__ import annotations

import array
import enum
import functools
import random
import types
import weakref
from collections import deque
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidestream.circuit.code_names import is_near, is_of_containers

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.memory_format)
OPAQUE = (type, types.ModuleType, types.BuiltinFunctionType, torch.jit.ScriptModule)
VALUES = (np.generic, Decimal, Fraction, enum.Enum)
"""Values that cannot change, beside the plain ones."""
CACHE = type(functools.lru_cache(lambda: None))
SOURCES = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_GLOBALS = (Tensor, np.ndarray, CACHE, *SOURCES, nn.Module, functools.partial, bytearray, array.array, weakref.ref)
"""What is looked at wherever the model's code names it."""


def may_hold_state(value: Any, table: dict[str, Any]) -> bool:
    """Whether a global in ``table``, or an attribute of a class, is looked into."""
    if isinstance(value, (list, dict, set, deque, tuple, *_GLOBALS)):
        return True
    is_iterator = isinstance(value, Iterator) and type(value).__module__ == "itertools"
    return is_iterator or is_of_containers(type(value)) or is_near(type(value).__module__, table)
