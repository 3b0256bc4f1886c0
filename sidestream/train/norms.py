"""Batch norms that keep their statistics while everything else is trained (``TrainConfig.freeze_norms``)."""

from __future__ import annotations

from torch import nn


def to_train_mode(net: nn.Module, *, freeze_norms: bool) -> nn.Module:
    """``net`` in train mode; with ``freeze_norms`` its batch norms stay in eval mode, where they normalise by their
    running statistics and leave them as they are. Their weights and biases are trained like any others."""
    net.train()
    if freeze_norms:
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    return net
