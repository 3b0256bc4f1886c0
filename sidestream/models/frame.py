"""Frame by frame: an image model on every frame of a clip or stream; it sees no motion, and answers at once.

The lower bound of the families: whatever a clip model gains, it gains over this. Names are offered for a few image
models; ``frame_by_frame`` makes one of any other.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import takewhile
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from sidestream.errors import LayoutError, ModelError
from sidestream.models import efficientnet_lite, timm_zoo, torchvision_zoo
from sidestream.models.clip_layout import as_stream_of, check_clip
from sidestream.models.info import ModelInfo, attach_info, info_of
from sidestream.models.weights import KeyMap
from sidestream.nn.combine import Chain, PerFrame

NUM_FRAMES = 8
NAMES: dict[str, tuple[ModuleType, str]] = {
    "frame_resnet50": (torchvision_zoo, "resnet50"),
    "frame_vit_b_16": (timm_zoo, "vit_base_patch16_224"),
    "frame_efficientnet_lite0": (efficientnet_lite, "efficientnet_lite0"),
}
"""Name -> library of the image model, its name there."""


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    library, inner = NAMES[name]
    return replace(_as_clip(library.info(inner)), name=name, library="sidestream")


def build(name: str, num_classes: int | None) -> nn.Module:
    library, inner = NAMES[name]
    return FrameByFrame(library.build(inner, num_classes))


def build_default(name: str) -> nn.Module:
    library, inner = NAMES[name]
    return FrameByFrame(library.build_default(inner))


def key_map(name: str) -> KeyMap:
    library, inner = NAMES[name]
    return library.key_map(inner)


def frame_by_frame(model: nn.Module) -> FrameByFrame:
    """``model``, an image model (frame_BCHW -> logits), on every frame of a clip; what is known of it comes along."""
    wrapped = FrameByFrame(model).train(model.training)
    if (own := info_of(model)) is not None:
        attach_info(wrapped, _as_clip(own))
    return wrapped


class FrameByFrame(nn.Module):
    """Image model on each frame: ``clip_BTCHW`` -> logits (B, num_classes), the mean over the frames.

    Any number of frames from one on; ``net``: frame_BCHW -> logits (B, num_classes).

    Raises ``LayoutError`` for other axes, and for other sizes where ``net`` takes one only.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.classifier, self.num_features, self.stride_px = maps_of(net)

    @property
    def weights_target(self) -> nn.Module:
        """The net whose keys a weights file has."""
        return self.net

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits of every frame (B, T, num_classes): the clip form of ``streaming``."""
        check_frames("the image model", self.net, clip_BTCHW)
        return PerFrame(self.net)(clip_BTCHW)

    def streaming(self) -> Chain:
        """The model on a stream, its parameters shared: logits (B, num_classes) of every frame, at once."""
        return as_stream_of(self, Chain(PerFrame(self.net)))

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps of every frame before they are pooled, (B, T, num_features, H', W'); patch tokens as maps for ViTs."""
        check_frames("the image model", self.net, clip_BTCHW)
        return PerFrame(FrameMaps(self.net))(clip_BTCHW)

    def streaming_features(self) -> Chain:
        """``features`` on a stream: maps (B, num_features, H', W') of every frame, at once."""
        return as_stream_of(self, Chain(PerFrame(FrameMaps(self.net))))


class FrameMaps(nn.Module):
    """The maps of an image model before they are pooled: ``frame_BCHW`` -> (B, num_features, H', W').

    For timm's models and torchvision's ResNets. Raises ``ModelError`` for others.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        if maps_of(net)[1] is None:
            raise ModelError(f"no maps are known of a {type(net).__name__}; take a model of timm or a ResNet")
        is_timm = hasattr(net, "forward_features")
        trunk = takewhile(lambda child: child[0] != "avgpool", net.named_children())
        self.net = net if is_timm else nn.Sequential(OrderedDict(trunk))

    def forward(self, frame_BCHW: Tensor) -> Tensor:
        net: Any = self.net
        if isinstance(net, nn.Sequential):
            return net(frame_BCHW)
        answer = net.forward_features(frame_BCHW)
        if answer.ndim == 3:  # tokens, after those that stand for no patch
            sides = zip(frame_BCHW.shape[-2:], net.patch_embed.patch_size, strict=True)
            grid = [-(-side // patch) for side, patch in sides]
            return answer[:, net.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        return answer.movedim(-1, 1) if getattr(net, "output_fmt", "NCHW") == "NHWC" else answer


def check_frames(family: str, net: nn.Module, clip_BTCHW: Tensor, *, min_frames: int = 1) -> None:
    """``check_clip``, and ``LayoutError`` for frames of another size than the one that ``net`` takes, if it is one."""
    check_clip(family, clip_BTCHW, min_frames=min_frames)
    wanted = _fixed_size(net)
    if wanted is not None and tuple(clip_BTCHW.shape[-2:]) != wanted:
        height, width = clip_BTCHW.shape[-2:]
        raise LayoutError(
            f"{family} ({type(net).__name__}) was given frames of {height} x {width} pixels; it takes exactly "
            f"{wanted[0]} x {wanted[1]}: resize or crop them"
        )


def _fixed_size(net: Any) -> tuple[int, int] | None:
    """(height, width) of the vision transformers of timm and torchvision that check it themselves."""
    patches: Any = getattr(net, "patch_embed", None)
    if getattr(patches, "strict_img_size", False) and getattr(patches, "img_size", None) is not None:
        return int(patches.img_size[0]), int(patches.img_size[1])
    side = getattr(net, "image_size", None)
    return (side, side) if isinstance(side, int) else None


def maps_of(net: nn.Module) -> tuple[str | None, int | None, int | None]:
    """(dotted name of the classifier under "net.", channels of ``FrameMaps``, width of their cells in pixels)."""
    from torchvision.models import ResNet

    linears = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    classifier = f"net.{linears[-1]}" if linears else None
    if isinstance(net, ResNet):
        return "net.fc", net.fc.in_features, 32  # type: ignore[return-value]
    stages: Any = getattr(net, "feature_info", None)
    if hasattr(net, "forward_features") and isinstance(stages, list) and stages:
        return classifier, int(net.num_features), int(stages[-1]["reduction"])  # type: ignore[arg-type]
    return classifier, None, None


def _as_clip(image: ModelInfo) -> ModelInfo:
    if image.task != "image":
        raise ModelError(f"{image.name} is a {image.task} model; frame by frame runs a model that classifies images")
    spec = image.input_spec.replace(layout="BTCHW", num_frames=NUM_FRAMES, min_frames=1)
    return replace(image, task="clip", input_spec=spec)
