"""The stages of a net that is trained by depth: one per layer where it says which they are, else cut by cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.ages import lags_of
from sidestream.circuit.balance import balanced
from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.cut import cut
from sidestream.circuit.net_stages import net_circuit
from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import pipelined
from sidestream.errors import InputError
from sidestream.models import info_of
from sidestream.models.depth_net import DepthNet
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.steppable import Steppable
from sidestream.report.flops import counting_flops
from sidestream.train.skip_net import SkipNet
from sidestream.types import NOTHING

NUM_STAGES = 4


def circuit_of(
    model: nn.Module, frame_BCHW: Tensor, num_stages: int | None = None, *, wiring: str = "pipelined"
) -> tuple[Circuit, bool]:
    """``model`` as a circuit whose stages work side by side, and whether it takes batches of any size.

    A net with ``depth_modules()`` has one stage per module, a ``SkipNet`` its own circuit, and a ``DepthNet``
    (par_densenet) its blocks, wired by name (``wiring``; no other net is asked). Every other net that reads single
    frames is cut into ``num_stages`` stages of equal cost (by operations, so that a resumed run cuts at the same
    places), which take batches of the size of ``frame_BCHW`` only. So is the stream of a model whose layers carry a
    state from frame to frame, between those layers; each clip begins with a fresh state. The parameters are the
    model's own. Raises ``InputError`` for models that have no stream, or one that looks ahead, and for a single stage.
    """
    if isinstance(model, SkipNet):
        return model.circuit(), True
    if isinstance(model, DepthNet) and num_stages is None:
        return net_circuit(model, frame_BCHW, wiring), True
    modules: Any = getattr(model, "depth_modules", None)
    if modules is not None and num_stages is None:
        layers = modules()
        check_depth(len(layers), model)
        return pipelined(stages_of(layers, frame_BCHW, name=type(model).__name__)), True
    net = frame_net(model)
    if isinstance(net, Chain):
        return pipelined(_cut_stream(net, frame_BCHW, num_stages, model)), False
    was_training = net.training
    if not was_training:
        net.train()
    with torch.no_grad():
        stages: Stages = cut(net, frame_BCHW, num_stages=num_stages or NUM_STAGES, costs="flops")
    if not was_training:
        net.eval()
    return pipelined(stages), False


def frame_net(model: nn.Module) -> nn.Module:
    """The part of ``model`` that reads one frame at a time, or a ``Chain`` where its stream carries a state.

    Raises ``InputError``, with the reason, for models without a stream, and for streams that look ahead.
    """
    name, info = type(model).__name__, info_of(model)
    if info is not None and info.input_spec.layout == "BCHW":
        return model
    advice = "train it with the rule 'backprop'"
    if not hasattr(model, "streaming"):
        raise InputError(f"{name} reads whole clips at once, so it cannot be trained frame by frame; {advice}")
    chain: Any = model.streaming()  # type: ignore[operator]
    layers = chain.layers if isinstance(chain, Chain) else (chain,)
    if chain.delay_ticks:
        raise InputError(
            f"the stream of {name} looks ahead, so that it answers {chain.delay_ticks} frames late, and depth-parallel "
            f"rules train causal layers only; {advice}, or take the causal variant of the net"
        )
    if not all(isinstance(layer, PerFrame) for layer in layers):
        return Chain(*layers)
    modules: list[Any] = [layer.module for layer in layers]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def check_depth(num_stages: int, model: nn.Module) -> None:
    """Raises ``InputError`` for a single stage."""
    if num_stages < 2:
        raise InputError(
            f"{type(model).__name__} has {num_stages} stage; depth-parallel training needs 2 or more: give a deeper "
            "net, or use the rule 'backprop'"
        )


def ticks_to_learn(circuit: Circuit, loss_delay: int = 0) -> int:
    """Ticks until every stage has had a gradient under Sideways; 2 K - 1 in a row.

    The loss is taken in the first tick that has an answer; a cotangent is a tick later with the stages that are read,
    and waits there for the next tick in which they answer (those that answer every p ticks only).
    """
    lags, ticks = lags_of(circuit), dict[int, int]()
    for number in reversed(range(1, circuit.num_stages + 1)):
        readers = [ticks[w.target] for w in circuit.wires_from(number) if w.target in ticks]
        first = max(readers) + 1 if readers else lags[number] + loss_delay
        ticks[number] = first + (lags[number] - first) % circuit.stages[number - 1].period_ticks
    return max(ticks.values()) + 1


def _cut_stream(chain: Chain, frame_BCHW: Tensor, num_stages: int | None, model: nn.Module) -> Stages:
    """``chain`` between its layers, into ``num_stages`` or at most 4; never before one that changes its input."""
    layers = dict(_flat(chain))
    with torch.no_grad(), _in_eval_mode(chain):
        values = [frame_BCHW]
        for layer in layers.values():
            values.append(layer.blank(values[-1]))
        costs = [_flops(layer, value) for layer, value in zip(layers.values(), values)]
        parts = list(layers.values())
        forbidden = [n for n in range(1, len(parts)) if _writes_input(parts[n:], values[n])]
    most = len(parts) - len(forbidden)
    count = num_stages or min(NUM_STAGES, most)
    check_depth(min(count, most), model)
    if count > most:
        raise InputError(f"num_stages is {count}, but the stream of {type(model).__name__} has {most} parts to part")
    boundaries = balanced(costs, [1.0] * len(costs), count, num_workers=1, forbidden=forbidden)
    names = list(layers)
    return cut(chain, frame_BCHW, cut=tuple(names[n] for n in boundaries), costs="uniform", name=type(model).__name__)


def _flat(chain: Chain, prefix: str = "") -> Iterator[tuple[str, Steppable]]:
    """Layers by dotted name, as ``cut`` knows them: chains inside of the chain opened."""
    for n, layer in enumerate(chain.layers):
        if isinstance(layer, Chain):
            yield from _flat(layer, f"{prefix}{n}.")
        else:
            yield f"{prefix}{n}", layer


def _flops(layer: Steppable, value: Any) -> float:
    """Operations of a step that answers, and one for those that are not counted (pooling, norms)."""
    with counting_flops() as counter:
        layer.blank(value)
    return 1.0 + counter.get_total_flops()


def _writes_input(layers: list[Steppable], value: Any) -> bool:
    """Whether the first of these layers changes its input in place, or one behind it through a view of it."""
    leaves, spec = pytree.tree_flatten(value)
    # zeros would hide a ReLU in place
    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) for x in leaves]
    given = [x.clone() for x in noise]
    x = pytree.tree_unflatten(given, spec)
    for layer in layers:
        x, _ = layer.step(x, layer.init_state(x))
        if not all(torch.equal(a, b) for a, b in zip(given, noise, strict=True)):
            return True
        memory = {each.untyped_storage().data_ptr() for each in given}
        if x is NOTHING or not memory & {each.untyped_storage().data_ptr() for each in pytree.tree_leaves(x)}:
            return False
    return False


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """So that trying layers teaches nothing to a batch norm, and draws no random numbers."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode
