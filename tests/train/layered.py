"""A net of layers and a training step on it, outside of the loop, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sidestream.train import RULES, StepContext, TrainConfig
from sidestream.train.answering import Answering
from sidestream.train.rules import TrainStep

NUM_CLASSES = 4


class Layered(nn.Module):
    """Convolutions of one shape and a head; the smallest net with ``depth_modules``."""

    def __init__(self, num_layers: int = 4, *, width: int = 4, batch_norm: bool = False) -> None:
        super().__init__()
        convs = [_conv(3 if n == 0 else width, width, batch_norm) for n in range(num_layers - 1)]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_CLASSES))
        self.net = nn.Sequential(*convs, head)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        return self.net(clip_BTCHW.flatten(0, 1)).unflatten(0, clip_BTCHW.shape[:2])

    def depth_modules(self) -> list[nn.Module]:
        return list(self.net)


def _conv(before: int, after: int, batch_norm: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), *([nn.BatchNorm2d(after)] if batch_norm else []), nn.Tanh()
    )


def layered(seed: int = 0, **options: Any) -> Layered:
    torch.manual_seed(seed)
    return Layered(**options).double()


def random_clip(num_clips: int = 3, num_frames: int = 9, size_px: int = 8) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(7)
    clip_BTCHW = torch.randn(num_clips, num_frames, 3, size_px, size_px, generator=chance, dtype=torch.float64)
    return clip_BTCHW, torch.randint(NUM_CLASSES, (num_clips,), generator=chance)


def still_clip(num_clips: int = 3, num_frames: int = 9) -> tuple[Tensor, Tensor]:
    clip_BTCHW, labels_B = random_clip(num_clips, num_frames)
    return clip_BTCHW[:, :1].expand_as(clip_BTCHW).contiguous(), labels_B


def step_of(model: nn.Module, example_BTCHW: Tensor, rule: str, **options: Any) -> TrainStep:
    config = TrainConfig(rule=rule, task="frame", **options)
    context = StepContext(model, Answering(model, "frame"), config, lambda loss: loss.backward(), example_BTCHW)
    return RULES[rule](context)


def gradients_of(
    model: nn.Module, clip_BTCHW: Tensor, labels_B: Tensor, rule: str, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients by parameter, and the metrics, of one step that updates once per clip."""
    step = step_of(model, clip_BTCHW, rule, **options)
    optimizers = step.make_optimizers(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    asked: list[int] = []
    metrics = step.step(clip_BTCHW, labels_B, asked.extend)
    assert asked == list(range(len(optimizers)))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found, metrics
