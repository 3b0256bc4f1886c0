"""A model as one flat graph: torch.export for any model, symbolic tracing around opaque parts as the way out."""

from __future__ import annotations

import inspect
import linecache
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from sidestream.circuit.assignments import assignments_written
from sidestream.circuit.opaque import keeping_whole, restore_calls
from sidestream.circuit.regions import open_regions
from sidestream.errors import CutError

_TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
_OWN_FOLDER = str(Path(__file__).parent) + os.sep
_FORWARD_MODE = {"_jvp_increment_nesting", "_jvp_decrement_nesting", "_make_dual", "_unpack_dual", "_enter_dual_level"}
_SHAPE_ASSERTS = {torch.ops.aten._assert_tensor_metadata.default}


@dataclass(frozen=True)
class Traced:
    """A graph whose placeholders are the leaves of ``(args, kwargs)`` and whose output is a flat tuple."""

    module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    """Leaves of the example, one per placeholder."""


def plain_model(model: Any) -> nn.Module:
    """The module that is cut: what was compiled or exported, unwrapped. CutError for what is no module."""
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    while isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # torch.compile(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CutError(f"{type(model).__name__} is compiled TorchScript, which cannot be cut; give the Python module")
    if not isinstance(model, nn.Module):
        name = getattr(model, "__name__", type(model).__name__)
        raise CutError(f"the model is {name!r}, a {type(model).__name__}; give an nn.Module (put it into its forward)")
    scripted = [name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        raise CutError(
            f"module {scripted[0]!r} of {type(model).__name__} is compiled TorchScript, which cannot be cut; put the "
            "Python module in its place"
        )
    return model


def trace_exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """The graph of ``torch.export``; CutError names the line of the model that cannot be exported.

    A model in eval mode is traced as it runs, without gradients.
    """
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    try:
        grads = torch.set_grad_enabled(model.training)
        with quiet(), keeping_whole(model) as calls, assignments_written(model), grads:
            program = torch.export.export(model, args, kwargs, strict=False)
        module = program.module(check_guards=False)
    except CutError:
        raise
    except Exception as error:
        said = one_line(error)
        if "constant's list" in said:
            said = "it takes .data of a buffer or parameter, which no graph shows (write x.detach(), or x itself)"
        if "Expected FakeTensor" in said:  # so torch before 2.14
            said = "it holds what no graph can, as one that differentiates forwards (torch.func.jvp) does"
        raise CutError(
            f"{type(model).__name__} cannot be traced at {place_of(error)}: {said}; "
            "cut it at submodules by their dotted names instead: cut(model, example, cut=('layer2', ...)), "
            "which keeps what happens inside of submodules opaque"
        ) from error
    graph = module.graph
    if duals := [node for node in graph.nodes if getattr(node.target, "__name__", "") in _FORWARD_MODE]:
        raise CutError(
            f"{type(model).__name__} differentiates forwards inside (torch.func.jvp or forward-mode AD, at "
            f"{duals[0].name}), which stages cannot run; compute it by torch.func.vjp, or outside of the model"
        )
    num_inputs = len(graph.find_nodes(op="placeholder"))
    if program.call_spec.in_spec != in_spec or num_inputs != len(leaves):
        raise CutError(
            f"the export of {type(model).__name__} takes {num_inputs} values where the example has {len(leaves)}; "
            "give keyword arguments in the order of the model's own signature"
        )
    graph.set_codegen(fx.graph.CodeGen())
    restore_calls(module, calls)
    open_regions(module)
    for node in reversed(graph.nodes):
        if node.target in _SHAPE_ASSERTS:
            graph.erase_node(node)
    return Traced(module, in_spec, _usual(program.call_spec.out_spec), tuple(leaves))


def _usual(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """The structure with dicts and lists instead of torch.fx's own immutable ones, which its modules do not answer."""

    def usual(value: Any) -> Any:
        if isinstance(value, immutable_dict) or type(value) is dict:
            return {key: usual(item) for key, item in value.items()}
        if isinstance(value, immutable_list) or type(value) in (list, tuple):
            return (tuple if type(value) is tuple else list)(map(usual, value))
        return value

    return pytree.tree_structure(usual(pytree.tree_unflatten(list(range(spec.num_leaves)), spec)))


def trace_around(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> Traced:
    """The graph of ``torch.fx`` with the modules ``names``, and every module it cannot look into, as single nodes."""
    opaque = set(names)
    while True:
        tracer = _OpaqueTracer(opaque)
        try:
            graph, arguments = _symbolic_graph(tracer, model, args, kwargs)
            break
        except Exception as error:
            if not tracer.inside:
                raise CutError(
                    f"{type(model).__name__} cannot be traced at {place_of(error)}, outside of any submodule: "
                    f"{one_line(error)}; move that code into a submodule of its own, which is then kept opaque"
                ) from error
            opaque.add(tracer.inside)
    output = graph.find_nodes(op="output")[0]
    leaves, out_spec = pytree.tree_flatten(_plain(output.args[0]))
    output.args = (tuple(leaves),)
    module = fx.GraphModule(model, graph)
    return Traced(module, pytree.tree_flatten((args, kwargs))[1], out_spec, arguments)


class _OpaqueTracer(fx.Tracer):
    """A tracer that does not look into the modules ``opaque`` and remembers where it failed."""

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.inside = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.inside = self.inside or self.path_of_module(m)
            raise


def _symbolic_graph(
    tracer: fx.Tracer, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fx.Graph, tuple[Any, ...]]:
    """The graph, with a placeholder for each given argument in order, and those arguments."""
    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs).arguments
    if any(not isinstance(value, torch.Tensor) for value in given.values()):
        raise CutError("an opaque cut takes models whose arguments are plain tensors, but the example holds others")
    defaults = {n: p.default for n, p in signature.parameters.items() if n not in given}
    graph = tracer.trace(model, concrete_args=defaults or None)
    for node in graph.find_nodes(op="placeholder"):
        if str(node.target) not in given:
            _erase_with_readers(graph, node)  # read by tracing's own assertion of the default only
    return graph, tuple(given.values())


def _plain(value: Any) -> Any:
    """The structure without torch.fx's own immutable lists and dicts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return tuple(_plain(item) for item in value) if type(value) is tuple else value


def _erase_with_readers(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_readers(graph, user)
    graph.erase_node(node)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the partial graphs that a failing export prints: the error itself says what matters."""
    loggers = [
        logging.getLogger(f"torch.{name}") for name in ("fx.experimental.symbolic_shapes", "_subclasses.fake_tensor")
    ]
    levels, stderr = [logger.level for logger in loggers], sys.stderr
    for logger, level in zip(loggers, (logging.ERROR, logging.CRITICAL)):
        logger.setLevel(level)
    sys.stderr = mute = _MuteHere(stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.stderr is mute:
            sys.stderr = stderr
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


class _MuteHere:
    """Standard error that drops what this thread writes, and lets other threads' text through."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def place_of(error: BaseException) -> str:
    """File, line and text of the innermost frame of the model's own code that led to the error."""
    chain: BaseException | None = error
    place = "an unknown place"
    while chain is not None:
        for frame in traceback.extract_tb(chain.__traceback__):
            if not frame.filename.startswith((_TORCH_FOLDER, _OWN_FOLDER, "<")):
                text = linecache.getline(frame.filename, frame.lineno or 0).strip()
                place = f"{frame.filename}:{frame.lineno} ({text})" if text else f"{frame.filename}:{frame.lineno}"
        chain = chain.__cause__ or chain.__context__
    return place


def one_line(error: BaseException) -> str:
    """The first line of what the error says, 200 characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[0])[:200] if lines else type(error).__name__
