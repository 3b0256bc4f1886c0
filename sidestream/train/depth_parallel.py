"""The rules "exact" and "sideways" as training steps: a batch of clips goes through the circuit frame by frame.

B clips are B independent streams: every wire carries a batch, a clip of T frames makes T ticks, and each answer is
compared with the label of its clip. With ``update="clip"`` the stages gather, and the loop steps their optimisers once
per batch; otherwise every stage steps its own, while the clip runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sidestream.circuit.ages import latency_ticks, mixes_ages
from sidestream.circuit.wire import Circuit
from sidestream.engine import run
from sidestream.engine.rules.direct import DirectFeedback
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.place import parameters_of
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.rules.training import Observer, StageGradient, TrainingRule
from sidestream.errors import InputError, StageError
from sidestream.models.depth_net import DepthNet
from sidestream.nn.feedback_alignment import own_feedback
from sidestream.train.config import TrainConfig
from sidestream.train.diagnose import gradient_errors
from sidestream.train.diagnostics import NUM_CLIPS, stage_records
from sidestream.train.feedback import check_direct, give_feedback
from sidestream.train.gradient_bound import row_of
from sidestream.train.gradient_error import GradientError
from sidestream.train.predictive import LiveNet, newest
from sidestream.train.rules import MakeOptimizer, Metrics, NotFinite, StepContext, Update, check_finite
from sidestream.train.skip_net import SkipNet
from sidestream.train.stages import circuit_of, ticks_to_learn
from sidestream.train.tasks import IGNORED, Task
from sidestream.train.undisturbed import undisturbed
from sidestream.types import NOTHING


class DepthParallel:
    """One ``TrainStep`` for both rules.

    Raises ``InputError`` for nets that are not frame by frame, clips shorter than the pipeline, and options that do
    not go together.
    """

    def __init__(self, context: StepContext, kind: Literal["exact", "sideways"]) -> None:
        check_options(context.config, context.model)
        if context.example_BTCHW is None:
            raise InputError(f"the rule {kind!r} needs an example: StepContext(..., example_BTCHW=a batch of clips)")
        self._config, self._kind, self._task = context.config, kind, context.task
        self._batch_size, num_frames = context.example_BTCHW.shape[:2]
        self._state_ticks = min(context.config.state_ticks, num_frames)
        self._frame_1CHW = context.example_BTCHW[:1, 0]
        give_feedback(context.model, context.config)
        self._circuit, self._takes_any_batch = circuit_of(
            context.model,
            context.example_BTCHW[:, 0],
            context.config.num_stages,
            wiring=context.config.wired,
        )
        self._model = context.model
        if context.config.diagnose and context.config.feedback == "random" and not self._takes_any_batch:
            raise InputError(
                f"diagnose={context.config.diagnose} with feedback='random' on a net that is cut: its stages have no "
                "other backward to compare with; take a net that says what its layers are, such as vgg8"
            )
        if context.config.feedback == "direct":
            check_direct(self._circuit.stages)
        if context.config.state_ticks and all(stage.init_state is None for stage in self._circuit.stages):
            raise InputError(
                f"state_ticks={context.config.state_ticks} with {type(context.model).__name__}, no stage of which has "
                "a state that a gradient could cross; leave it out"
            )
        if not any(parameters_of(self._circuit.stages)):
            raise InputError("there is no parameter to train; set requires_grad on those that are to be trained")
        self._task.align(self._circuit)
        check_length(self._circuit, num_frames, kind, context.config)
        self._groups = [own for own in parameters_of(self._circuit.stages) if own]
        self._rule: TrainingRule = self._make_rule(None)
        self._rule.attach(self._circuit)  # refuses what it cannot train

    @property
    def circuit(self) -> Circuit:
        return self._circuit

    def make_optimizers(self, make: MakeOptimizer) -> list[Optimizer]:
        """One per stage that has parameters."""
        if self._config.update == "clip":
            return [make(own.values()) for own in self._groups]
        self._rule = self._make_rule(make)
        self._rule.attach(self._circuit)
        return [optimizer for optimizer in self._rule.optimizers if optimizer is not None]

    def step(self, clip_BTCHW: Tensor, labels_B: Tensor, update: Update) -> Metrics:
        num_clips = len(labels_B)
        clip_BTCHW, labels_B = self._filled(clip_BTCHW, labels_B)
        loss_sum, answers_sum, num_answers = 0.0, torch.zeros(()), 0
        try:
            pairs = _pairs(clip_BTCHW, labels_B, self._task)
            for answer in run(self._circuit, pairs, rule=self._rule, executor=self._config.executor):
                if answer.loss is not None:
                    loss_sum, num_answers = loss_sum + answer.loss, num_answers + 1
                if self._task.measures_training and answer.value is not NOTHING:
                    answers_sum = answers_sum + answer.value.detach()
        except StageError as error:
            if isinstance(error.__cause__, NotFinite):
                raise NotFinite(str(error.__cause__)) from error
            raise
        if self._config.update == "clip":
            self._hand_over()
            update(range(len(self._groups)))
        else:
            _check_weights(self._groups)
        more: Metrics = {}
        if self._task.measures_training:
            more = self._task.train_metrics(answers_sum[:num_clips], labels_B[:num_clips])
        return {"loss": torch.tensor(loss_sum / max(1, num_answers)), **more}

    def judged(self, net: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        """What evaluations look at: a net of blocks as its circuit runs (as under "unrolled"), others as they are."""
        if not isinstance(self._model, DepthNet) or self._config.num_stages is not None:
            return net, task
        return LiveNet(self._model, self._frame_1CHW, self._config.wired), newest(task)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside optimisers and weights: gradients gathered since the stages' last steps."""
        if self._config.update == "clip":
            return {}
        stages = self._rule.state_dict()["stages"]
        return {"stages": [{k: v for k, v in stage.items() if k != "optimizer"} for stage in stages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After ``make_optimizers``."""
        if not state:
            return
        own = self._rule.state_dict()
        stages = [{**a, **b} for a, b in zip(own["stages"], state["stages"], strict=True)]
        self._rule.load_state_dict({**own, "stages": stages})

    def diagnose(self, clip_BTCHW: Tensor, labels_B: Tensor) -> list[dict[str, Any]]:
        """How wrong the gradients on the first of these clips are, a record per stage (``train.diagnose``).

        Weights, optimisers and random numbers are left as they were. Nothing is said of clips with a loss that is NaN.
        """
        clip_BTCHW, labels_B = self._filled(clip_BTCHW[:NUM_CLIPS], labels_B[:NUM_CLIPS])
        own = [optimizer for optimizer in self._rule.optimizers if optimizer is not None]
        of = {id(p): optimizer for optimizer in own for group in optimizer.param_groups for p in group["params"]}
        loss = functools.partial(_loss, task=self._task)
        targets = [each for each in self._task.fed_targets(clip_BTCHW, labels_B) if each is not NOTHING]
        frames = list(clip_BTCHW.unbind(1))[: len(targets)]

        def rule(_: Any, *, observe: Observer, optimizers: Any, **__: Any) -> TrainingRule:
            return self._make_rule(optimizers, observe)

        def errors(**options: Any) -> list[GradientError]:
            shared: dict[str, Any] = {"rule": rule, "target": self._config.target}
            shared["truth"] = functools.partial(own_feedback, self._model)
            return gradient_errors(self._circuit, frames, targets, loss, **shared, **options)

        is_plain = self._config.feedback == "own" and self._config.target == "answered"
        try:
            frozen = errors(bounds=is_plain and row_of(self._circuit) is not None, state_ticks=self._state_ticks)
            if not own or any(stage.init_state is not None for stage in self._circuit.stages):
                return stage_records(frozen)
            with undisturbed(self._circuit, own):
                return stage_records(frozen, errors(optimizers=lambda parameters: of[id(next(iter(parameters)))]))
        except StageError:
            return []

    def _make_rule(self, make: MakeOptimizer | None, observe: Observer | None = None) -> TrainingRule:
        config = self._config
        options: dict[str, Any] = {
            "optimizers": None if make is None else lambda parameters: make(parameters),
            "update": "manual" if config.update == "clip" else config.update,
            "max_norm": None if config.update == "clip" else config.clip_norm,
            "target": config.target,
            "observe": observe or _check_gradient,
        }
        loss = functools.partial(_loss, task=self._task)
        if config.feedback == "direct":
            keep = config.keep if self._kind == "exact" else "nothing"
            return DirectFeedback(loss, keep=keep, loss_delay=config.loss_delay, seed=config.seed, **options)
        if self._kind == "exact":
            return Exact(loss, keep=config.keep, state_ticks=self._state_ticks, **options)
        return Sideways(loss, loss_delay=config.loss_delay, state_ticks=self._state_ticks, **options)

    def _hand_over(self) -> None:
        """Add the clip's mean gradients to ``.grad``."""
        for number, stage in enumerate(parameters_of(self._circuit.stages), start=1):
            found = self._rule.gradients(number)
            for name, gradient in found.items():
                p = stage[name]
                share = gradient / self._config.accumulate if self._config.accumulate > 1 else gradient
                p.grad = share if p.grad is None else p.grad + share
        self._rule.zero_gradients()

    def _filled(self, clip_BTCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """For stages that take one size of batch, a short one is filled up with its own clips, without labels."""
        missing = self._batch_size - len(labels_B)
        if self._takes_any_batch or missing <= 0:
            return clip_BTCHW, labels_B
        again = torch.arange(missing, device=labels_B.device) % len(labels_B)
        filling = torch.full_like(labels_B[again], IGNORED)
        return torch.cat([clip_BTCHW, clip_BTCHW[again]]), torch.cat([labels_B, filling])


def check_options(config: TrainConfig, model: nn.Module) -> None:
    """Raises ``InputError`` for options that do not go with depth-parallel rules, or with each other."""
    if config.precision != "no":
        raise InputError(f"precision={config.precision!r} with the rule {config.rule!r}; it trains in float32: 'no'")
    if config.accumulate > 1 and config.update != "clip":
        raise InputError(f"accumulate={config.accumulate} with update={config.update!r}; it goes with update='clip'")
    if config.num_stages is not None and isinstance(model, SkipNet):
        raise InputError(f"num_stages={config.num_stages} with skips, where every layer is a stage; leave one out")
    if config.rule == "exact" and config.keep == "graph" and config.update != "clip":
        raise InputError(
            f"update={config.update!r} changes weights that a kept graph still needs; use update='clip', or "
            "keep='inputs' or 'inputs and weights'"
        )
    is_net_of_blocks = isinstance(model, DepthNet) and config.num_stages is None
    if config.wiring is not None and not is_net_of_blocks:
        raise InputError(
            f"wiring={config.wiring!r} on {type(model).__name__}"
            f"{'' if config.num_stages is None else f' cut into {config.num_stages} stages'}; the rule "
            f"{config.rule!r} wires par_densenet and par_inception by name, in their own stages, and pipelines others"
        )
    if isinstance(model, DepthNet) and model.has_feedback:
        raise InputError(
            f"{type(model).__name__} is fed its last answer; the rule {config.rule!r} goes back over no feedback wire: "
            "take the rule 'unrolled', or weights of a net without feedback"
        )
    if config.feedback == "direct" and config.rule == "exact" and config.keep == "inputs and weights":
        raise InputError("keep='inputs and weights' with feedback='direct'; it keeps a 'graph', or 'inputs'")
    if config.feedback == "direct" and config.state_ticks:
        raise InputError(f"state_ticks={config.state_ticks} with feedback='direct', which crosses no state; give 0")
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    if config.executor == "threads" and drops:
        raise InputError(
            "the net has dropout, whose random numbers would depend on which thread is first, so that the run could "
            "not be resumed exactly; use executor='inline', or dropout 0"
        )


def check_length(circuit: Circuit, num_frames: int, kind: str, config: TrainConfig) -> None:
    """Raises ``InputError`` for clips in which not every stage gets a gradient (exact: that are never answered).

    In a row of K, exact needs K frames, and sideways 2 K - 1; with direct feedback all stages have a gradient from tick
    K on. A circuit whose skips mix ages is fed the last frame until all are answered, so K frames are enough there.
    """
    latency = latency_ticks(circuit)
    least = latency + 1
    if kind == "sideways":
        drain = latency if mixes_ages(circuit) else 0
        is_direct = config.feedback == "direct"
        least = latency + 2 if is_direct else max(least, ticks_to_learn(circuit, config.loss_delay) - drain)
    if num_frames < least:
        K = circuit.num_stages
        need = f"{K} stages need" if K > 1 else "1 stage needs"
        raise InputError(
            f"a clip of {num_frames} frame{'s' * (num_frames > 1)} is too short for the pipeline: under {kind!r}, "
            f"{need} {least} or more ({circuit.wiring}); give longer clips (num_frames), or fewer stages"
        )


def _pairs(clip_BTCHW: Tensor, labels_B: Tensor, task: Task) -> Iterator[tuple[Tensor, Any]]:
    return zip(clip_BTCHW.unbind(1), task.fed_targets(clip_BTCHW, labels_B), strict=True)


def _loss(answer: Any, target: Any, *, task: Task) -> Tensor:
    loss = task.frame_loss(answer, target)
    check_finite(loss)
    return loss


def _check_gradient(seen: StageGradient) -> None:
    """Before anything is updated with it."""
    norm = torch.nn.utils.get_total_norm(list(seen.gradients.values()))
    if not torch.isfinite(norm):
        raise NotFinite(f"the length of the gradient of stage {seen.stage} in tick {seen.tick} is {float(norm)}")


def _check_weights(groups: list[dict[str, nn.Parameter]]) -> None:
    for own in groups:
        for name, p in own.items():
            if not torch.isfinite(p).all():
                raise NotFinite(f"the weights {name!r} are no longer finite")
