"""Stages made by hand: one module per stage, in a row, or each also reading what the stage before the last wrote.

    stages = stages_of(modules, frame_BCHW)                       # in a row: stage i reads stage i - 1
    stages = stages_of(modules, frame_BCHW, skips="add")          # from stage 3 on: stages i - 1 and i - 2

``parallel(stages)`` is then a Skip-Sideways net (Malinowski et al., CVPR 2021): a skip brings a newer frame than the
trunk, so deep stages see several frames at once. ``pipelined(stages)``, ``sequential(stages)`` and ``stages(frame)``
are the residual net on one frame. The wiring follows the paper's first figure; how it joins the two values where
their shapes differ is not known to us.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sidestream.circuit.calls import perturbed
from sidestream.circuit.hidden import Watched
from sidestream.circuit.measure import num_bytes
from sidestream.circuit.memory import Snapshot, is_of_hook, kept
from sidestream.circuit.stage import Link, Stage, Stages, State, Values
from sidestream.errors import CutError
from sidestream.nn.steppable import Steppable

SKIPS = ("none", "add", "concat", "projection")


@dataclass(frozen=True, eq=False)
class ModuleStep:
    """``step`` of a stage that is a module without memory: called on the inputs, in the caller's gradient mode."""

    module: nn.Module

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        answer = self.module(*inputs)
        return (tuple(answer) if isinstance(answer, tuple | list) else (answer,)), state


class Joined(nn.Module):
    """A module behind the place where trunk and skip meet: ``forward(trunk, skip)``, both B, C, ... ."""

    def __init__(self, module: nn.Module, how: str, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.module, self.how, self.projection = module, how, projection

    def forward(self, trunk: Tensor, skip: Tensor) -> Any:
        if self.how == "add":
            return self.module(trunk + skip)
        skip = _fitted(skip, trunk)
        if self.how == "concat":
            return self.module(torch.cat([trunk, skip], dim=1))
        return self.module(trunk + (skip if self.projection is None else self.projection(skip)))


def stages_of(
    modules: Sequence[nn.Module],
    example: Tensor,
    *,
    skips: str = "none",
    names: Sequence[str] | None = None,
    name: str = "model",
    input_spec: Any = None,
) -> Stages:
    """One stage per module, with the modules' own parameters. ``example``: what the first one is fed, B, C, ... .

    ``skips``: "none" for a row; otherwise stage i >= 3 works on the outputs of stages i - 1 and i - 2, joined by
    "add" (of the same shape), "concat" (along axis 1: the module's first layer must take that many channels, see
    ``widened``), or "projection" (the skip goes through a 1 x 1 convolution, or a linear layer, to the trunk's
    channels where they differ; these new parameters are the stage's). "concat" and "projection" shrink the skip to
    the trunk's height and width by average pooling. ``names``: of the stages; default: the modules' class names.

    Modules see one frame at a time and keep no memory (cut a ``Chain`` of streaming layers with ``cut``). They are
    taken in the mode that they are in. Raises CutError for modules that do not fit, or change their input in place.
    """
    if skips not in SKIPS:
        raise CutError(f"{skips = }; expected one of {', '.join(SKIPS)}")
    if not modules:
        raise CutError("no modules were given; give one per stage")
    made: list[Any] = [example]
    stages: list[Stage] = []
    links = [Link(0, 0, 1, 0)]
    for number, module in enumerate(modules, start=1):
        title = names[number - 1] if names is not None else f"{number}:{type(module).__name__}"
        inputs: Values = (made[-1],)
        if skips != "none" and number >= 3:
            inputs = (made[-1], made[-2])
            links.append(Link(number - 2, 0, number, 1))
            module = _joined(module, skips, made[-1], made[-2], f"stage {number} ({title})")
        stage, outputs = _stage(module, title, inputs)
        stages.append(stage)
        made.append(outputs[0])
        links.append(Link(number, 0, number + 1, 0))
    in_spec = pytree.tree_structure(((example,), {}))
    out_spec = pytree.tree_structure(made[-1])
    return Stages(tuple(stages), tuple(links), in_spec, out_spec, name, input_spec, ((example,), {}))


def stage_of(module: nn.Module, inputs: Values, *, name: str | None = None) -> Stage:
    """One stage of a circuit that is wired by hand: ``module(*inputs)`` gives a tensor or a tuple of tensors."""
    return _stage(module, name or type(module).__name__, inputs)[0]


def widened(module: nn.Module, num_more: int) -> nn.Module:
    """``module`` itself, its first convolution or linear layer replaced by one with ``num_more`` inputs more.

    Weights of the inputs that it had are kept (parameters are new objects); those of the new ones are as the layer
    initialises them. For ``skips="concat"``.
    """
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        wide = _wide(layer, num_more)
        if not path:
            return wide
        parent, _, key = path.rpartition(".")
        setattr(module.get_submodule(parent), key, wide)
        return module
    raise CutError(f"{type(module).__name__} has no Conv2d or Linear layer to widen by {num_more}")


def _wide(layer: nn.Conv2d | nn.Linear, num_more: int) -> nn.Module:
    has_bias = layer.bias is not None
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    wide: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Linear):
        wide = nn.Linear(layer.in_features + num_more, layer.out_features, has_bias, **like)
    elif layer.groups != 1:
        raise CutError(f"a convolution in {layer.groups} groups cannot be widened; put one in one group before it")
    else:
        wide = nn.Conv2d(
            layer.in_channels + num_more,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            bias=has_bias,
            padding_mode=layer.padding_mode,
            **like,
        )
    with torch.no_grad():
        wide.weight[:, : layer.weight.shape[1]] = layer.weight
        if layer.bias is not None and wide.bias is not None:
            wide.bias.copy_(layer.bias)
    return wide.train(layer.training)


def _stage(module: nn.Module, name: str, inputs: Values) -> tuple[Stage, Values]:
    if isinstance(module, Steppable):
        raise CutError(f"stage {name!r} is a streaming layer with a state; make a Chain of such layers and cut(chain)")
    step = ModuleStep(module)
    plain = Stage(name, step, len(inputs), 0, module=module, example_inputs=inputs)
    with kept(module):
        outputs = _tried(module, name, step, inputs)
        watched = Watched(replace(plain, num_outputs=len(outputs), output_bytes=tuple(num_bytes(v) for v in outputs)))
        remembers = _remembers(watched, inputs)
    if remembers:
        warnings.warn(
            f"stage {name!r} keeps state outside of its buffers, which all runs share and which a run that ends early "
            "leaves ahead of its answers; register it as a buffer (self.register_buffer)",
            stacklevel=4,
        )
    stage = watched.declared()
    is_hidden = stage.hides_state or remembers or any(map(_has_running_statistics, module.modules()))
    return replace(stage, hides_state=is_hidden), outputs


def _remembers(watched: Watched, inputs: Values) -> bool:
    """Try the stage in the mode that it is in: whether it keeps something that is no buffer, which no run can have of
    its own."""
    step, snapshots = watched.watching().step, []
    for seed in range(3):
        try:
            with torch.no_grad():
                step(perturbed(inputs, seed=seed), None)
        except (RuntimeError, ValueError):  # a batch norm in train mode that sees one value, say: it will say so itself
            return False
        snapshots.append(Snapshot(watched.stage.module))
    return not all(is_of_hook(path) for path in snapshots[1].changed(snapshots[2]))


def _tried(module: nn.Module, name: str, step: Callable[..., Any], inputs: Values) -> Values:
    """The outputs on noise like the example, in eval mode."""
    modes = [(m, m.training) for m in module.modules()]
    inputs = tuple(_noise_like(value) for value in inputs)
    given = tuple(value.clone() for value in inputs)
    shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
    try:
        for m, _ in modes:
            m.training = False
        with torch.no_grad():
            outputs, _ = step(given, None)
    except (RuntimeError, ValueError) as error:
        raise CutError(f"stage {name!r} cannot work on inputs of shape {shapes}: {error}") from error
    finally:
        for m, mode in modes:
            m.training = mode
    if not all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True)):
        raise CutError(f"stage {name!r} changes its input in place; use inplace=False in its first layer")
    if not all(isinstance(value, Tensor) for value in outputs):
        raise CutError(f"stage {name!r} gave {[type(v).__name__ for v in outputs]}; expected tensors")
    return tuple(outputs)


def _noise_like(value: Tensor) -> Tensor:
    """Zeros would hide a ReLU in place."""
    if not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats


def _joined(module: nn.Module, how: str, trunk: Tensor, skip: Tensor, where: str) -> Joined:
    if how == "add" and trunk.shape != skip.shape:
        raise CutError(
            f"{where} would add a trunk of shape {tuple(trunk.shape)} and a skip of shape {tuple(skip.shape)}; "
            "use skips='projection' or 'concat' where shapes differ"
        )
    projection: nn.Module | None = None
    channels = skip.shape[1], trunk.shape[1]
    if how == "projection" and channels[0] != channels[1]:
        like: dict[str, Any] = {"device": trunk.device, "dtype": trunk.dtype}
        if trunk.dim() == 4:
            projection = nn.Conv2d(*channels, 1, bias=False, **like)
        else:
            projection = nn.Linear(*channels, bias=False, **like)
    return Joined(module, how, projection).train(module.training)


def _fitted(skip: Tensor, trunk: Tensor) -> Tensor:
    """The skip in the trunk's height and width."""
    if skip.dim() == trunk.dim() and skip.shape[2:] == trunk.shape[2:]:
        return skip
    if skip.dim() == 4 and trunk.dim() == 2:
        return F.adaptive_avg_pool2d(skip, 1).flatten(1)
    if skip.dim() == 4 and trunk.dim() == 4:
        return F.adaptive_avg_pool2d(skip, (trunk.shape[2], trunk.shape[3]))
    raise CutError(f"a skip of shape {tuple(skip.shape)} cannot join a trunk of shape {tuple(trunk.shape)}")
