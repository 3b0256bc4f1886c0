"""The two operators of feedback alignment: ordinary forward, and a backward in which other weights stand for W.

Custom operators, not ``torch.autograd.Function``: ``torch.export`` writes the forward of such a function into the
graph and drops its backward without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

Gradients = tuple[Tensor | None, ...]


def project(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
    """``F.linear(x, weight, bias)``; backward, the gradient of x is over ``feedback``."""
    return torch.ops.sidestream.feedback_linear(x, weight, bias, feedback)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """``aten.convolution``, also without the batch axis; backward, the gradient of x is over ``feedback``."""
    has_batch = x.dim() == weight.dim()
    answer = torch.ops.sidestream.feedback_convolution(
        x if has_batch else x.unsqueeze(0),
        weight,
        bias,
        feedback,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
    )
    return answer if has_batch else answer.squeeze(0)


@torch.library.custom_op(
    "sidestream::feedback_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor feedback) -> Tensor",
)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, feedback = inputs
    ctx.save_for_backward(x, feedback)


def _linear_back(ctx: Any, grad: Tensor) -> Gradients:
    x, feedback = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)
    return (
        grad @ feedback if wants_x else None,
        rows.T @ x.reshape(-1, x.shape[-1]) if wants_weight else None,
        rows.sum(0) if wants_bias else None,
        None,
    )


_linear.register_autograd(_linear_back, setup_context=_keep_linear)

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"


@torch.library.custom_op(
    "sidestream::feedback_convolution",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor feedback, {_GEOMETRY}) -> Tensor",
)
def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, *geometry: Any) -> Tensor:
    return torch.ops.aten.convolution(x, weight, bias, *geometry)


@_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, *geometry: Any) -> Tensor:
    return torch.ops.aten.convolution(x, weight, bias, *geometry)


def _keep_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, feedback, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, feedback)
    ctx.bias_sizes = None if bias is None else list(bias.shape)


def _convolution_back(ctx: Any, grad: Tensor) -> Gradients:
    x, weight, feedback = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    back = torch.ops.aten.convolution_backward
    grad_x = grad_weight = grad_bias = None
    if wants_x:
        grad_x = back(grad, x, feedback, None, *ctx.geometry, [True, False, False])[0]
    if wants_weight or wants_bias:
        mask = [False, wants_weight, wants_bias]
        _, grad_weight, grad_bias = back(grad, x, weight, ctx.bias_sizes, *ctx.geometry, mask)
    return (grad_x, grad_weight, grad_bias, *[None] * (1 + len(ctx.geometry)))


_convolution.register_autograd(_convolution_back, setup_context=_keep_convolution)


@register_flop_formula(torch.ops.sidestream.feedback_linear)
def _(x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    count = 2 * weight[1]
    for size in out_shape:
        count *= size
    return count


@register_flop_formula(torch.ops.sidestream.feedback_convolution)
def _(
    x: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    feedback: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return conv_flop_count(list(x), list(weight), list(out_shape), transposed=transposed)
