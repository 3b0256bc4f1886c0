"""``undisturbed``: look at a net in training, with its own rule and optimisers, and leave everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from sidestream.circuit.wire import Circuit


@contextmanager
def undisturbed(circuit: Circuit, optimizers: Sequence[Optimizer] = ()) -> Iterator[None]:
    """Inside, dropout is off. Afterwards weights, gradients, buffers, optimisers and random numbers are, to the bit,
    what they were before. (Dropout in a model that was cut is in its graph and stays on.)"""
    modules = [stage.module for stage in circuit.stages if stage.module is not None]
    parameters = [p for module in modules for p in module.parameters()]
    kept = [*parameters, *(b for module in modules for b in module.buffers())]
    drops = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    modes = [m.training for m in drops]
    values, gradients = [t.detach().clone() for t in kept], [p.grad for p in parameters]
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    devices = sorted({t.device.index or 0 for t in kept if t.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            for parameter in parameters:
                parameter.grad = None
            for drop in drops:
                drop.training = False
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(kept, values, strict=True):
                    tensor.copy_(value)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for drop, mode in zip(drops, modes, strict=True):
                drop.training = mode
            for optimizer, state in zip(optimizers, states, strict=True):
                optimizer.load_state_dict(state)
