"""Image encoder + recurrent network: one state runs along the frames, each frame gives class logits.

Donahue et al., "Long-term Recurrent Convolutional Networks" (CVPR 2015), for features and LSTM or GRU; Shi et al.
(NeurIPS 2015) and Ballas et al. (ICLR 2016) for maps and ConvLSTM or ConvGRU. All are causal and answer every frame.

Back-propagation through time: over a clip, call it and go backward. Truncated: go through the stream in chunks, and
cut the state between them:

    stream = model.streaming()
    state = stream.init_state(clip_BTCHW[:, 0])
    for chunk_BTCHW in clip_BTCHW.split(16, dim=1):
        answers_BTN, state = step_through(stream, chunk_BTCHW, detach_state(state))
        loss(answers_BTN).backward()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.errors import WeightsError
from sidestream.models.clip_layout import as_stream_of, check_clip
from sidestream.models.info import ModelInfo
from sidestream.models.recurrent_encoder import image_encoder
from sidestream.models.weights import KeyMap
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.recurrent import GRU, LSTM, ConvGRU, ConvLSTM
from sidestream.nn.steppable import Steppable
from sidestream.types import InputSpec

Cell = Literal["lstm", "gru", "convlstm", "convgru"]

CELLS: dict[Cell, Callable[[int, int], Steppable]] = {
    "lstm": LSTM,
    "gru": GRU,
    "convlstm": ConvLSTM,
    "convgru": ConvGRU,
}
"""Cell -> layer of (input channels, hidden channels)."""
HIDDEN_SIZE: dict[Cell, int] = {"lstm": 512, "gru": 512, "convlstm": 256, "convgru": 256}
NAMES: dict[str, Cell] = {"cnn_lstm": "lstm", "cnn_gru": "gru", "cnn_convlstm": "convlstm", "cnn_convgru": "convgru"}


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    spec = InputSpec(resize_px=256, layout="BTCHW", num_frames=16, min_frames=1, frame_step=2, causal=True)
    return ModelInfo(name, "sidestream", "clip", spec, 400)


def build(name: str, num_classes: int | None) -> nn.Module:
    return ImageRecurrent(num_classes or 400, cell=NAMES[name])


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return dict


class ImageRecurrent(nn.Module):
    """Image encoder, recurrent cell, linear classifier: ``clip_BTCHW`` -> logits (B, num_classes) of the last frame.

    The last frame's answer is the one that has seen the whole clip; ``answers`` has those of all frames. Any number
    of frames from one on.

    ``backbone``: a model of torchvision or timm by name (``"resnet18"``, ``"timm/vit_tiny_patch16_224"``), with
    random weights and without its head, or a module of your own: frame_BCHW -> features (B, D), or for the
    convolutional cells maps (B, C, H', W'). ``cell``: "lstm" and "gru" read features, "convlstm" and "convgru" maps,
    whose hidden map is averaged over space. ``hidden_size``: None for 512 (features) or 256 (maps).

    Raises ``LayoutError`` for other axes, ``ModelError`` for a backbone that does not give what the cell reads.
    """

    classifier = "head"
    stride_px = 32

    def __init__(
        self,
        num_classes: int = 400,
        *,
        backbone: str | nn.Module = "resnet18",
        cell: Cell = "lstm",
        hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        self.reads_maps = cell in ("convlstm", "convgru")
        hidden_size = hidden_size or HIDDEN_SIZE[cell]
        self.backbone, num_channels = image_encoder(backbone, as_maps=self.reads_maps)
        self.cell = CELLS[cell](num_channels, hidden_size)
        self.num_features = hidden_size
        self.head = nn.Linear(hidden_size, num_classes)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW)[:, -1]

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits of every frame (B, T, num_classes), each from the frames up to it: the clip form of ``streaming``."""
        hidden_BTX = self._hidden(clip_BTCHW)
        return self.head(hidden_BTX.mean((-2, -1)) if self.reads_maps else hidden_BTX)

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Hidden maps of every frame, (B, T, num_features, H', W'); 1 x 1 for the cells that read features."""
        hidden_BTX = self._hidden(clip_BTCHW)
        return hidden_BTX if self.reads_maps else hidden_BTX[..., None, None]

    def streaming_features(self) -> Chain:
        """``features`` on a stream."""
        as_maps = () if self.reads_maps else (PerFrame(nn.Unflatten(1, (self.num_features, 1, 1))),)
        return as_stream_of(self, Chain(PerFrame(self.backbone), self.cell, *as_maps))

    def _hidden(self, clip_BTCHW: Tensor) -> Tensor:
        check_clip("the recurrent model", clip_BTCHW)
        return self.cell(self.backbone(clip_BTCHW.flatten(0, 1)).unflatten(0, clip_BTCHW.shape[:2]))

    def streaming(self) -> Chain:
        """The model on a stream, its parameters shared: logits (B, num_classes) of every frame, at once.

        Use it in eval mode if the backbone has batch norms: they work frame by frame.
        """
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten()) if self.reads_maps else ()
        chain = Chain(PerFrame(self.backbone), self.cell, PerFrame(nn.Sequential(*pool, self.head)))
        return as_stream_of(self, chain)


def detach_state(state: Any) -> Any:
    """The same state (or any tree of tensors) cut from its past: no gradient flows back through it. A new value."""
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)
