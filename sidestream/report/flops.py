"""A counter of floating-point operations that knows the fused operators of the CPU too.

``torch.utils.flop_counter`` knows operators by name, and what is fused into one that it does not know counts as 0. The
attention and LSTM kernels of the CPU and the products of a matrix and a vector are counted here, and the fused fast
path of torch's own attention layers is switched off while counting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Counts what runs inside: ``counter.get_total_flops()``; a multiply-add is 2. Causal attention counts in full."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False, custom_mapping=_also_counted())
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _also_counted() -> dict[Any, Callable[..., int]]:
    """Operators that do matrix products and that torch's counter does not know (in every version)."""
    formulas = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
        "mkldnn_rnn_layer": _lstm_flops,
        "mv": _matrix_vector_flops,
        "addmv": lambda _, *shapes, **options: _matrix_vector_flops(*shapes, **options),
    }
    return {getattr(torch.ops.aten, name): f for name, f in formulas.items() if hasattr(torch.ops.aten, name)}


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Every query times every key, and the values weighed. Shapes: (B, heads, tokens, width)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _lstm_flops(input_shape: Sequence[int], from_input: Any, from_hidden: Any, *_: Any, **__: Any) -> int:
    """One layer over a sequence: the two products of each step. Shapes: (T, B, I), (gates * H, I), (gates * H, H)."""
    num_steps = input_shape[0] * input_shape[1]
    return 2 * num_steps * (from_input[0] * from_input[1] + from_hidden[0] * from_hidden[1])


def _matrix_vector_flops(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)
