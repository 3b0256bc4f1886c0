"""Models of torchvision by name: image and clip classification, semantic segmentation.

Differs from torchvision in three places: clip models read B,T,C,H,W; the auxiliary heads of googlenet and
inception_v3, which only training uses, are left out (also from files); and these two always turn the usual ImageNet
normalisation into the one of their weights (``transform_input``), so that one input spec holds for any weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from sidestream.models.clip_border import ClipBorder
from sidestream.models.guard import ANY_SIZE, SizeRule
from sidestream.models.info import ModelInfo, Task
from sidestream.models.weights import KeyMap, drop_keys, rename_keys
from sidestream.types import InputSpec

# name prefix: (frames, source frames per step) with which torchvision scored its weights (15 or 7.5 of 30 frames/s)
_CLIP_SAMPLING = {"s3d": (128, 2), "mvit": (16, 4), "swin3d": (32, 2), "": (16, 2)}
_NO_AUX = {"aux_logits": False, "init_weights": False, "transform_input": True}
# name prefix: arguments that the library's own constructor needs besides num_classes
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": _NO_AUX,
    "inception_v3": _NO_AUX,
    "fcn_": {"weights_backbone": None, "aux_loss": True},
    "deeplabv3_": {"weights_backbone": None, "aux_loss": True},
    "lraspp_": {"weights_backbone": None},
    "vit_h_14": {"image_size": 518},  # of its default weights, as its input spec has it
}
# name prefix: what the library's clip models do not take
_CLIP_LIMITS: dict[str, dict[str, Any]] = {
    "mvit": {"sizes": SizeRule(only_px=(224, 224)), "only_frames": 16},
    "s3d": {"sizes": SizeRule(least_px=209), "min_frames": 13},  # a last pooling of 2 x 7 x 7 behind rounded strides
}
# name prefix: what becomes of the keys of the library's published files
_KEY_MAPS: dict[str, KeyMap] = {
    "googlenet": drop_keys("aux1.", "aux2."),
    "inception_v3": drop_keys("AuxLogits."),
    "densenet": rename_keys(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
}


def names() -> list[str]:
    return list(_tasks())


def info(name: str) -> ModelInfo:
    task = _tasks()[name]
    weights = _default_weights(name)
    labels = None if weights is None else tuple(weights.meta["categories"])
    return ModelInfo(
        name=f"torchvision/{name}",
        library="torchvision",
        task=task,
        input_spec=_input_spec(name, task, weights),
        num_classes=len(labels) if labels else 1000,
        labels=labels,
        default_weights=None if weights is None else str(weights),
    )


def build(name: str, num_classes: int | None) -> nn.Module:
    from torchvision.models import get_model

    head = {} if num_classes is None else {"num_classes": num_classes}
    return _bordered(name, get_model(name, weights=None, **head, **_by_prefix(_ARGUMENTS, name, {})))


def build_default(name: str) -> nn.Module:
    from torchvision.models import get_model

    no_aux = {"aux_logits": False} if _by_prefix(_ARGUMENTS, name, None) is _NO_AUX else {}
    return _bordered(name, get_model(name, weights=_default_weights(name), progress=False, **no_aux))


def key_map(name: str) -> KeyMap:
    return _by_prefix(_KEY_MAPS, name, dict)


def sizes(model: nn.Module, spec: InputSpec) -> SizeRule:
    """The sizes that an image model takes."""
    return SizeRule(only_px=spec.size_px) if type(model).__name__ in ("VisionTransformer", "MaxVit") else ANY_SIZE


def _bordered(name: str, net: nn.Module) -> nn.Module:
    return ClipBorder(net, **_by_prefix(_CLIP_LIMITS, name, {})) if _tasks()[name] == "clip" else net


@cache
def _tasks() -> dict[str, Task]:
    """Name -> task of every model that is offered."""
    from torchvision import models

    modules: dict[Task, Any] = {"image": models, "clip": models.video, "segmentation": models.segmentation}
    return {name: task for task, module in modules.items() for name in models.list_models(module=module)}


def _default_weights(name: str) -> Any:
    from torchvision.models import get_model_weights

    members = get_model_weights(name)
    return members.DEFAULT if len(members) else None


def _input_spec(name: str, task: Task, weights: Any) -> InputSpec:
    """From the transform that torchvision publishes with the weights (the usual ImageNet one where there are none)."""
    spec = InputSpec(resize_px=256) if weights is None else _from_transform(weights.transforms())
    if task != "clip":
        return spec
    num_frames, frame_step = _by_prefix(_CLIP_SAMPLING, name, None)
    return spec.replace(layout="BTCHW", num_frames=num_frames, frame_step=frame_step, causal=False)


def _from_transform(transform: Any) -> InputSpec:
    # Clip transforms that resize to a fixed height and width keep the aspect ratio here: the shorter side counts.
    resize_px = min(transform.resize_size)
    crop_px = getattr(transform, "crop_size", None)
    size_px = (resize_px, resize_px) if crop_px is None else (crop_px[0], crop_px[-1])
    return InputSpec(
        size_px=size_px,
        resize_px=None if crop_px is None else resize_px,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
    )


def _by_prefix(table: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for prefix, value in table.items() if name.startswith(prefix)), default)
