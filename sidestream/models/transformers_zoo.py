"""ViViT and VideoMAE: the video classifiers of the package transformers, behind the border that all clip models share.

Arnab et al., "ViViT: A Video Vision Transformer" (ICCV 2021), model 1 (joint space-time attention) with tubelets of
2 x 16 x 16. Tong et al., "VideoMAE" (NeurIPS 2022): the encoder, fine-tuned, answers from the mean of its tokens.

Both have embeddings for one number of frames and one size. transformers does not check the frames, and stretches
embeddings only over space and for square grids; here anything else than what the net was made for is refused.

ViViT's input spec is that of the authors' training, values rgb * 2 - 1. transformers' ``VivitImageProcessor`` has the
same mean and std, but applies them to values that are in [-1, 1] already, unless ``do_normalize=False`` is given.
VideoMAE's is the ImageNet mean and std, with which transformers' own pre-training loss reads the pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import LayoutError, MissingExtraError, ModelError, WeightsError
from sidestream.models.clip_layout import check_clip
from sidestream.models.info import ModelInfo
from sidestream.models.labels import kinetics400_labels
from sidestream.models.weights import KeyMap, StateDict
from sidestream.types import InputSpec

_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 16}
NAMES: dict[str, tuple[str, str, dict[str, int]]] = {
    "vivit_b_16x2": ("Vivit", "google/vivit-b-16x2-kinetics400", {}),
    "videomae_small": ("VideoMAE", "MCG-NJU/videomae-small-finetuned-kinetics", _SMALL),
    "videomae_base": ("VideoMAE", "MCG-NJU/videomae-base-finetuned-kinetics", {}),
    "videomae_large": ("VideoMAE", "MCG-NJU/videomae-large-finetuned-kinetics", _LARGE),
}
"""Name -> family in transformers, repository of its Kinetics-400 weights, what differs from the family's base model."""
_HALF = (0.5, 0.5, 0.5)
_SPECS = {
    "Vivit": InputSpec(resize_px=256, mean=_HALF, std=_HALF, layout="BTCHW", num_frames=32, frame_step=2, causal=False),
    "VideoMAE": InputSpec(resize_px=224, layout="BTCHW", num_frames=16, frame_step=4, causal=False),
}
# Family -> parts of keys in published files, and what newer versions of transformers call them.
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "Vivit": (
        ("vivit.encoder.layer.", "vivit.layers."),
        (".attention.attention.query.", ".attention.q_proj."),
        (".attention.attention.key.", ".attention.k_proj."),
        (".attention.attention.value.", ".attention.v_proj."),
        (".attention.output.dense.", ".attention.o_proj."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
    ),
    "VideoMAE": (
        (".attention.attention.q_bias", ".attention.attention.query.bias"),
        (".attention.attention.v_bias", ".attention.attention.value.bias"),
    ),
}


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    family, repository, _ = NAMES[name]
    return ModelInfo(name, "sidestream", "clip", _SPECS[family], 400, kinetics400_labels(), repository)


def build(name: str, num_classes: int | None) -> nn.Module:
    family, _, changes = NAMES[name]
    return ClipTransformer(classifier_net(family, num_labels=num_classes or 400, **changes))


def build_default(name: str) -> nn.Module:
    """From the hub of Hugging Face, or its cache; every tensor must be there."""
    family, repository, _ = NAMES[name]
    net, found = _class(family, "ForVideoClassification").from_pretrained(repository, output_loading_info=True)
    if wrong := {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys}:
        raise WeightsError(f"the weights of {repository} do not fit {name}: {wrong}; update the package transformers")
    return ClipTransformer(net)


def key_map(name: str) -> KeyMap:
    return lambda state: map_keys(state, NAMES[name][0])


def classifier_net(family: str, **config: Any) -> nn.Module:
    """transformers' own net with random weights; ``config``: what differs from the family's base model.

    Raises ``MissingExtraError`` where transformers is not installed.
    """
    return _class(family, "ForVideoClassification")(_class(family, "Config")(**config))


def map_keys(state: StateDict, family: str) -> StateDict:
    """Keys of transformers' files, older or newer, as those of the version that is installed."""
    return {_renamed(key, family): value for key, value in state.items()}


class ClipTransformer(nn.Module):
    """A video classifier of transformers: ``clip_BTCHW`` -> logits (B, num_classes), as transformers computes them.

    ``net``: a ``VivitForVideoClassification`` or ``VideoMAEForVideoClassification``. It reads exactly the number of
    frames and the size of its config, and answers whole clips; it has no streaming form.

    Raises ``LayoutError`` for any other clip, ``ModelError`` for another net.
    """

    classifier = "net.classifier"

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        config: Any = getattr(net, "config", None)
        if getattr(config, "model_type", None) not in ("vivit", "videomae") or not hasattr(net, "classifier"):
            raise ModelError(
                f"ClipTransformer was given a {type(net).__name__}; expected VivitForVideoClassification or "
                "VideoMAEForVideoClassification"
            )
        self.net = net
        self.num_frames = int(config.num_frames)
        self.size_px = _pair(config.image_size)
        tubelet = config.tubelet_size  # ViViT's has three axes, VideoMAE's is the number of frames
        frames, *patch = (tubelet, *_pair(config.patch_size)) if isinstance(tubelet, int) else tubelet
        self.grid = (self.num_frames // frames, self.size_px[0] // patch[0], self.size_px[1] // patch[1])
        """(steps in time, rows, columns) of tokens."""
        self.num_features, self.stride_px = int(config.hidden_size), patch[0]

    @property
    def weights_target(self) -> nn.Module:
        """The net whose keys a weights file has."""
        return self.net

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        self._check(clip_BTCHW)
        return self.net(pixel_values=clip_BTCHW).logits

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """The last hidden states as maps, without ViViT's class token: (B, T / tubelet, D, H / patch, W / patch)."""
        self._check(clip_BTCHW)
        tokens_BND = self.net.base_model(pixel_values=clip_BTCHW).last_hidden_state  # type: ignore[union-attr,operator]
        num_patches = self.grid[0] * self.grid[1] * self.grid[2]
        return tokens_BND[:, -num_patches:].unflatten(1, self.grid).movedim(-1, 2)

    def _check(self, clip_BTCHW: Tensor) -> None:
        family = type(self.net).__name__.removesuffix("ForVideoClassification")
        check_clip(family, clip_BTCHW)
        num_frames, size_px = int(clip_BTCHW.shape[1]), tuple(clip_BTCHW.shape[-2:])
        if num_frames != self.num_frames:
            raise LayoutError(
                f"{family} was given {num_frames} frames; it takes exactly {self.num_frames}, for which it has "
                "embeddings: pick as many from the clip"
            )
        if size_px != self.size_px:
            raise LayoutError(
                f"{family} was given frames of {size_px[0]} x {size_px[1]} pixels; it takes exactly "
                f"{self.size_px[0]} x {self.size_px[1]}, for which it has embeddings: resize or crop them"
            )


def _class(family: str, suffix: str) -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers", f"the model family {family!r}") from error
    return getattr(transformers, family + suffix)


def _renamed(key: str, family: str) -> str:
    rules = _RENAMED[family] if _reads_new_keys(family) else [pair[::-1] for pair in reversed(_RENAMED[family])]
    for given, wanted in rules:
        key = key.replace(given, wanted)
    return key


@cache
def _reads_new_keys(family: str) -> bool:
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.random.fork_rng(devices=[]):  # to look at keys changes no later random number
        keys = classifier_net(family, **sizes, image_size=16, num_frames=2).state_dict()
    return any(_RENAMED[family][0][1] in key for key in keys)


def _pair(side: int | Sequence[int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
