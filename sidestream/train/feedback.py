"""Other backward weights for any rule: ``TrainConfig.feedback`` on the model that is trained.

"random": ``nn.feedback_alignment`` on the model itself, which rules then train as any other. "direct": the engine's
``DirectFeedback`` for rules on a circuit; here, for plain backprop on clips, by hooks behind the layers of the net.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.stage import Stage
from sidestream.errors import InputError
from sidestream.nn.feedback_alignment import with_random_feedback, without_random_feedback
from sidestream.nn.feedback_weights import Draw, ErrorFeedback, check_dense
from sidestream.train.config import TrainConfig


def give_feedback(model: nn.Module, config: TrainConfig) -> None:
    """Random backward weights, from the run's seed, where they are asked for. In place; before the model is cut."""
    if config.feedback == "random":
        with_random_feedback(model, seed=config.seed)


def take_feedback(model: nn.Module, config: TrainConfig) -> None:
    """The model's own backward again, after a run."""
    if config.feedback == "random":
        without_random_feedback(model)


def direct_feedback(
    model: nn.Module, config: TrainConfig, frame_BCHW: Tensor | None = None
) -> Callable[[], AbstractContextManager[None]]:
    """A context for the forward pass: inside, layers are given B e, over random B from the run's seed, if asked for.

    ``frame_BCHW``: what the first layer will be given; with it, matrices that are too large are refused at once.
    """
    if config.feedback != "direct":
        return nullcontext
    hooks = DirectHooks(model, Draw(config.seed))
    if frame_BCHW is not None:
        check_direct(stages_of(hooks.modules, frame_BCHW).stages)
    return hooks.around_forward


def check_direct(stages: Sequence[Stage]) -> None:
    """Raises ``InputError`` where the feedback weights to a stage, dense matrices, would be too large.

    ``stages``: tried out on an example, as those of nets that were cut or built of layers are.
    """
    counts: list[int] = []
    for stage in stages:
        example: Any = (stage.example_inputs or (None,))[0]
        if stage.output_bytes is None or not isinstance(example, Tensor):
            return
        counts.append(stage.output_bytes[0] // example.element_size() // len(example))
    for number, count in enumerate(counts[:-1], start=1):
        check_dense(f"stage {number}", count, counts[-1])


class DirectHooks:
    """Direct feedback alignment between the ``depth_modules()`` of a net, on whatever it is called with.

    What a module puts out has B e as its gradient, e being the gradient in the output of the last one, and none from
    the modules that read it. The modules must work in a row, once each in a pass, and must not mix what stands along
    the first axis. Raises ``InputError`` for models that do not say what their modules are.
    """

    def __init__(self, model: nn.Module, draw: Draw) -> None:
        modules: Any = getattr(model, "depth_modules", None)
        if modules is None:
            raise InputError(
                f"{type(model).__name__} does not say what its layers are (depth_modules()), or has skips between "
                "them, so backprop cannot give them direct feedback; take a net such as vgg8 or simple_cnn without "
                "skips, feedback='random', or for skips the rules 'exact' and 'sideways'"
            )
        self.modules: list[nn.Module] = modules()
        self._feedback = ErrorFeedback(draw)

    @contextmanager
    def around_forward(self) -> Iterator[None]:
        """Inside, passes are recorded so that they will go back directly."""
        made: dict[int, Tensor] = {}
        numbered = enumerate(self.modules, start=1)
        handles = [m.register_forward_hook(functools.partial(self._after, number, made)) for number, m in numbered]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after(self, number: int, made: dict[int, Tensor], module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or len(made) != number - 1:
            what = f"gave {type(output).__name__}" if not isinstance(output, Tensor) else f"came after {len(made)}"
            raise InputError(f"layer {number} {what}; direct feedback takes layers in a row that give one tensor each")
        if number < len(self.modules):
            made[number] = output
            return output.detach()
        outputs = tuple(made.values())
        made.clear()
        return _Direct.apply(self._feedback, output, *outputs)


class _Direct(torch.autograd.Function):
    """The answer as it is; back, its gradient e for the answer, and B e for every output before."""

    @staticmethod
    def forward(ctx: Any, feedback: ErrorFeedback, answer: Tensor, *outputs: Tensor) -> Tensor:
        ctx.feedback = feedback
        ctx.shaped = [output.new_empty(1).expand(output.shape) for output in outputs]
        return answer.view_as(answer)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        names = [f"stage {number}, output 0" for number in range(1, len(ctx.shaped) + 1)]
        sent = [ctx.feedback.cotangent(name, like, error) for name, like in zip(names, ctx.shaped, strict=True)]
        return None, error, *sent
