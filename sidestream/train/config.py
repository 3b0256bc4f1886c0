"""``TrainConfig``: everything that decides a run, saved with it as ``config.json``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from sidestream.errors import InputError

CHOICES: dict[str, tuple[int | str, ...]] = {
    "task": ("clip", "frame", "autoencode", "future", "keypoints"),
    "feedback": ("own", "random", "direct"),
    "schedule": ("cosine", "constant"),
    "precision": ("no", "bf16", "fp16"),
    "device": ("auto", "cpu"),
    "skips": ("none", "add", "concat", "projection"),
    "target": ("answered", "newest"),
    "keep": ("graph", "inputs", "inputs and weights"),
    "executor": ("inline", "threads"),
    "loss_delay": (0, 1),
    "distill_frame": ("oldest", "newest"),
}
DEPTH_PARALLEL = ("exact", "sideways")
"""Rules that train a net's stages side by side; the fields from ``update`` on are theirs."""
ON_CIRCUITS = (*DEPTH_PARALLEL, "unrolled")
"""Rules whose nets are circuits, which answer every frame, late."""
RULES_OF: dict[str, tuple[str, ...]] = {
    "update": DEPTH_PARALLEL,
    "keep": ("exact",),
    "loss_delay": ("sideways",),
    "executor": DEPTH_PARALLEL,
    "state_ticks": DEPTH_PARALLEL,
    "num_stages": DEPTH_PARALLEL,
    "target": ON_CIRCUITS,
    "bptt_frames": ("backprop",),
    "wiring": ON_CIRCUITS,
    "feedback_wire": ("unrolled",),
    "teacher": ("unrolled",),
    "distill": ("unrolled",),
    "distill_frame": ("unrolled",),
}
"""Options that mean something to some rules only: given with another one they would be passed over."""
BUILT_IN = ("backprop", *ON_CIRCUITS)
PLAIN_WIRING = "parallel"
"""That of a circuit for which none is named."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. Rates and counts are those of one update; ``batch_size`` is per process.

    Raises ``InputError`` for a value that makes no sense.
    """

    epochs: int = 20
    batch_size: int = 16
    rule: str = "backprop"
    """Who computes the gradients: a name in ``train.rules.RULES``."""
    task: str = "clip"
    """"clip": the loss of the clip's logits; "frame": of every frame's (``model.answers``), each with the clip's
    label, and their mean is what is evaluated; "autoencode", "future" and "keypoints": maps for every frame, see
    ``train.tasks``."""
    optimizer: str = "sgd"
    """Any class of torch.optim by name, in any case: "sgd" (with Nesterov's momentum), "adamw", "rmsprop" ..."""
    lr: float = 0.01
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """For optimisers that take it (SGD, RMSprop)."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for the optimiser, plain numbers."""
    schedule: str = "cosine"
    warmup_epochs: float = 1.0
    clip_norm: float | None = None
    """Longest gradient, all parameters of an optimiser together: the whole net's under "backprop" and "unrolled", each
    stage's under the others."""
    label_smoothing: float = 0.0
    accumulate: int = 1
    """Batches whose gradients are averaged for one update; what is left at the end of an epoch is divided by it too."""
    seed: int = 0
    freeze_norms: bool = False
    """Batch norms keep the running statistics that they begin with, and normalise by them: for weights to start from,
    and for rules under which a norm sees the few pictures of one tick."""
    precision: str = "no"
    device: str = "auto"
    num_workers: int = 2
    patience: int | None = None
    """Stop early after so many epochs without a better test accuracy, behind an epoch that was evaluated."""
    evaluate_every: int = 1
    """Epochs; the last one is always evaluated."""
    checkpoint_minutes: float = 5.0
    """A checkpoint is written when so much time has passed, after every epoch, and at the end."""
    tensorboard: bool = False
    skips: str = "none"
    """Other than "none": the net is made one whose stages also read the stage before the last, one frame newer
    (``train.with_skips``). For all rules."""
    update: int | str = "clip"
    """When stages are updated: once per "clip" (batch of clips), every "tick", or every N ticks with a gradient."""
    target: str = "answered"
    """Of the frame that the answer is about, or of the "newest"; every frame has its clip's label."""
    loss_delay: int = 0
    """Sideways: 1 takes the loss one tick after the last stage."""
    keep: str = "graph"
    """Exact: what a stage keeps until the gradient is back."""
    executor: str = "inline"
    """"inline" or "threads": who fires the stages. The same numbers, to the bit."""
    feedback: str = "own"
    """By which weights gradients go back: the layers' "own"; fixed "random" ones (feedback alignment); or straight
    from the loss to every stage, over fixed random ones ("direct" feedback alignment)."""
    state_ticks: int = 0
    """Exact, sideways: over how many ticks a gradient crosses the state of a stage."""
    bptt_frames: int | None = None
    """Backprop: of a model that streams, the gradient goes back over so many frames at most, and every so many frames
    there is an update (truncated BPTT); None: over the whole clip."""
    horizon: int = 1
    """Task "future": how many frames after the newest one that it has seen lies the one that the net is to draw."""
    diagnose: int = 0
    """Compare the rule's gradients with the true ones in every so many batches (``train.diagnose``); 0: never."""
    num_stages: int | None = None
    """Stages of equal cost that the net is cut into; None: one per layer where the net says which (VGG-8), else 4."""
    wiring: str | None = None
    """Unrolled, and exact and sideways on nets of blocks (par_densenet, par_inception): how the stages are wired, by
    name (``circuit.wiring.wire``), also when the net is evaluated; None: "parallel"."""
    feedback_wire: bool = False
    """Unrolled: the last answer goes back into an early stage (par_densenet, par_inception)."""
    teacher: str | None = None
    """Unrolled: weights of the sequential net, to start from and to distil from."""
    distill: float = 0.0
    """Unrolled: weight of the distance to the activations of the sequential net; 0: no distillation."""
    distill_frame: str = "oldest"
    """Unrolled: a stage is compared with the teacher's on the "oldest" or "newest" frame that it has seen."""

    @property
    def wired(self) -> str:
        """The wiring by name."""
        return self.wiring or PLAIN_WIRING

    @property
    def answers_task(self) -> str:
        """What the evaluation asks for: depth-parallel rules take the loss of every frame, whatever ``task`` says."""
        return "frame" if self.rule in ON_CIRCUITS and self.task == "clip" else self.task

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, choices))}")
        for name in ("epochs", "batch_size", "accumulate", "evaluate_every", "horizon"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in (
            "weight_decay",
            "momentum",
            "warmup_epochs",
            "seed",
            "num_workers",
            "checkpoint_minutes",
            "state_ticks",
            "diagnose",
            "distill",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr is {self.lr}; give a number above 0")
        if self.warmup_epochs > self.epochs:
            raise InputError(
                f"warmup_epochs is {self.warmup_epochs:g}, but there are {self.epochs} epochs: the rate never reaches "
                "lr; give at most as many"
            )
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is {self.label_smoothing}; give 0 or more, below 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm is {self.clip_norm}; give a number above 0, or None")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience is {self.patience}; give 1 or more, or None")
        if not (self.update in ("clip", "tick") or (type(self.update) is int and self.update >= 1)):
            raise InputError(f"update is {self.update!r}; expected 'clip', 'tick' or a number of ticks from 1 on")
        if self.bptt_frames is not None and self.bptt_frames < 1:
            raise InputError(f"bptt_frames is {self.bptt_frames}; give 1 or more, or None for the whole clip")
        if self.distill and self.teacher is None:
            raise InputError(f"distill is {self.distill}, but there is no teacher; give its weights file")
        if self.num_stages is not None and self.num_stages < 2:
            raise InputError(f"num_stages is {self.num_stages}; give 2 or more: a single stage has no depth to share")

        self._check_known()

    def _check_known(self) -> None:
        """Raises ``InputError`` for options that this rule or task would pass over."""
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        for name, rules in RULES_OF.items():
            value = getattr(self, name)
            if self.rule in BUILT_IN and self.rule not in rules and value != defaults[name]:
                known = f"only {', '.join(map(repr, rules))} {'knows' if len(rules) == 1 else 'know'} it"
                raise InputError(f"{name}={value!r} with the rule {self.rule!r}; {known}")
        if self.task != "future" and self.horizon != 1:
            raise InputError(f"horizon={self.horizon} with the task {self.task!r}; only 'future' knows it")

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises ``InputError`` for a name that there is not."""
        known = {each.name for each in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise InputError(f"unknown training options {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return cls(**values)
