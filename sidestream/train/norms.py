"""Batch norms that keep their statistics while everything else is trained (``TrainConfig.freeze_norms``)."""

from __future__ import annotations

from torch import nn

from sidestream.errors import InputError


def to_train_mode(net: nn.Module, *, freeze_norms: bool) -> nn.Module:
    """``net`` in train mode; with ``freeze_norms`` its batch norms stay in eval mode, where they normalise by their
    running statistics and leave them as they are. Their weights and biases are trained like any others.

    Raises ``InputError`` where ``freeze_norms`` finds none.
    """
    net.train()
    if not freeze_norms:
        return net
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        raise InputError("freeze_norms, but the net has no batch norm that keeps statistics; leave it out")
    for norm in norms:
        norm.eval()
    return net
