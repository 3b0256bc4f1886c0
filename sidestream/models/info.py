"""What is known about a model besides its layers: name, library, what it wants to be fed, what its answers mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sidestream.errors import ModelError
from sidestream.types import InputSpec

if TYPE_CHECKING:
    from torch import nn

Task = Literal["image", "clip", "segmentation", "keypoints", "masks", "pictures"]


@dataclass(frozen=True)
class ModelInfo:
    """What a name stands for; ``create_model`` hangs one on every model it makes."""

    name: str
    """The full name, ``library/model`` (or a bare one for Sidestream's own models)."""
    library: str
    """"sidestream", "torchvision" or "timm"."""
    task: Task
    """"image" and "clip": one vector of class logits; "segmentation": logits per pixel in a dict;
    "keypoints", "masks" and "pictures": maps for every step in time of a clip."""
    input_spec: InputSpec
    num_classes: int
    labels: tuple[str, ...] | None = None
    """One label per class, where known."""
    default_weights: str | None = None
    """What ``weights="default"`` loads; None where the library has no weights for this model."""

    def with_classes(self, num_classes: int | None, labels: tuple[str, ...] | None) -> ModelInfo:
        """The same model with another head: known labels stay only while their number still fits."""
        count = self.num_classes if num_classes is None else num_classes
        if labels is None and self.labels is not None and len(self.labels) == count:
            labels = self.labels
        if labels is not None and len(labels) != count:
            raise ModelError(
                f"{self.name} answers {count} classes, but {len(labels)} labels were given; "
                "give one label per class, in the order of the model's outputs"
            )
        return replace(self, num_classes=count, labels=labels)


def attach_info(model: nn.Module, info: ModelInfo) -> nn.Module:
    """Hang ``info`` on ``model`` (an attribute; no parameter, no buffer, not in the state dict)."""
    model.sidestream_info = info  # type: ignore[assignment]
    return model


def info_of(model: nn.Module) -> ModelInfo | None:
    """The info that ``create_model`` hung on ``model``; None for a model that was made elsewhere."""
    info = getattr(model, "sidestream_info", None)
    return info if isinstance(info, ModelInfo) else None


def input_spec_of(model: nn.Module) -> InputSpec | None:
    """What ``model`` wants to be fed, where known; None for a model that was made elsewhere."""
    info = info_of(model)
    return None if info is None else info.input_spec


def labels_of(model: nn.Module) -> tuple[str, ...] | None:
    """One label per class of ``model``, where known."""
    info = info_of(model)
    return None if info is None else info.labels
