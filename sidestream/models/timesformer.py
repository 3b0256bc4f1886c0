"""TimeSformer: a vision transformer over the patches of a clip, with the five attention schemes of the paper.

Bertasius, Wang, Torresani, "Is Space-Time Attention All You Need for Video Understanding?" (ICML 2021), section 3 and
figure 2. "space", "joint" and "divided" take the weights of transformers' TimesformerForVideoClassification.

    scheme          steps of a block
    space           space                     no time at all; the class tokens of the frames are averaged at the end
    joint           joint
    divided         time, space
    local_global    local, global             "sparse local-global"
    axial           time, width, height

Differs from the paper, as the authors' code does: the class token takes part only in a block's last step. The paper
leaves open how the steps of the last two schemes are joined: here as those of "divided", each with layers of its own,
which is what the paper's numbers of parameters (table 1) say.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from sidestream.errors import ModelError, WeightsError
from sidestream.models.clip_layout import check_clip
from sidestream.models.info import ModelInfo
from sidestream.models.timesformer_blocks import Block
from sidestream.models.timesformer_embedding import Embedding, Size
from sidestream.models.weights import KeyMap, StateDict
from sidestream.types import InputSpec

SCHEMES: dict[str, tuple[str, ...]] = {
    "space": ("space",),
    "joint": ("joint",),
    "divided": ("time", "space"),
    "local_global": ("local", "global"),
    "axial": ("time", "width", "height"),
}
"""Scheme -> attention steps of a block (``timesformer_blocks``)."""
CAUSAL = "timesformer_divided_causal"


def names() -> list[str]:
    return [*(f"timesformer_{scheme}" for scheme in SCHEMES), CAUSAL]


def info(name: str) -> ModelInfo:
    spec = InputSpec(
        resize_px=224,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
        layout="BTCHW",
        num_frames=8,
        min_frames=1,
        frame_step=32,
        causal=name == CAUSAL,
    )
    return ModelInfo(name, "sidestream", "clip", spec, 400)


def build(name: str, num_classes: int | None) -> nn.Module:
    if name == CAUSAL:
        from sidestream.models.timesformer_causal import CausalTimeSformer

        return CausalTimeSformer(num_classes or 400)
    return TimeSformer(num_classes or 400, scheme=name.removeprefix("timesformer_"))


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return map_keys


class TimeSformer(nn.Module):
    """Space-time transformer: ``clip_BTCHW`` -> logits (B, num_classes).

    Any number of frames from one on, and any height and width divisible by the patch: where they are not those of
    ``size``, the embeddings are stretched to the nearest entry, as in the authors' code.

    Raises ``LayoutError`` for other axes and sizes, ``ModelError`` for an unknown scheme.
    """

    classifier = "head"

    def __init__(self, num_classes: int = 400, *, scheme: str = "divided", size: Size | None = None) -> None:
        super().__init__()
        if scheme not in SCHEMES:
            raise ModelError(f"{scheme = } is unknown; TimeSformer has {', '.join(SCHEMES)}")
        self.scheme, self.size = scheme, size or Size()
        dim = self.size.dim
        self.embedding = Embedding(self.size, has_times=scheme != "space")
        self.blocks = nn.ModuleList(Block(SCHEMES[scheme], dim, self.size.num_heads) for _ in range(self.size.depth))
        self.num_features, self.stride_px = dim, self.size.patch_px
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self._begin()

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        class_BKD, _ = self.tokens(clip_BTCHW)
        return self.head(self.norm(class_BKD.mean(1)))

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps of every frame after the last norm, without the class token: (B, T, D, H / patch, W / patch)."""
        return self.norm(self.tokens(clip_BTCHW)[1]).movedim(-1, 2)

    def tokens(self, clip_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """After all blocks, before the last norm: class tokens (B, 1, D), or for "space" (B, T, D), and patches
        (B, T, H / patch, W / patch, D)."""
        check_clip("TimeSformer", clip_BTCHW)
        class_BKD, patches_BTHWD = self.embedding(clip_BTCHW)
        if self.scheme != "space":
            class_BKD, patches_BTHWD = class_BKD[:, :1], self.embedding.add_times(patches_BTHWD)
        for block in self.blocks:
            class_BKD, patches_BTHWD = block(class_BKD, patches_BTHWD)
        return class_BKD, patches_BTHWD

    def _begin(self) -> None:
        """Fresh weights as in the authors' code: all but the last step of the later blocks add nothing yet."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.embedding.class_11D, std=0.02)
        nn.init.trunc_normal_(self.embedding.places_1ND, std=0.02)
        for block in list(self.blocks)[1:]:
            for step in list(block.steps)[:-1]:  # type: ignore[arg-type]
                nn.init.zeros_(step.mix.weight)  # type: ignore[union-attr,arg-type]


# What becomes of the keys of transformers' files, one rule after the other. Our own keys fit none of them.
_TRANSFORMERS = (
    (r"^classifier\.", "head."),
    (r"^timesformer\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "embedding.patches."),
    (r"^embeddings\.cls_token$", "embedding.class_11D"),
    (r"^embeddings\.position_embeddings$", "embedding.places_1ND"),
    (r"^embeddings\.time_embeddings$", "embedding.times_1TD"),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.temporal_layernorm\.", ".steps.0.norm."),
    (r"\.temporal_attention\.attention\.qkv\.", ".steps.0.attention.qkv."),
    (r"\.temporal_attention\.output\.dense\.", ".steps.0.attention.proj."),
    (r"\.temporal_dense\.", ".steps.0.mix."),
    (r"\.layernorm_before\.", ".steps.LAST.norm."),
    (r"\.attention\.attention\.qkv\.", ".steps.LAST.attention.qkv."),
    (r"\.attention\.output\.dense\.", ".steps.LAST.attention.proj."),
    (r"\.layernorm_after\.", ".norm."),
    (r"\.intermediate\.dense\.", ".mlp.0."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.2."),
)


def map_keys(state: StateDict) -> StateDict:
    """The keys of transformers' TimesformerForVideoClassification as ours; ours are given back unchanged."""
    last = "1" if any(".temporal_dense." in key for key in state) else "0"
    return {_renamed(key).replace("LAST", last): value for key, value in state.items()}


def _renamed(key: str) -> str:
    for pattern, replacement in _TRANSFORMERS:
        key = re.sub(pattern, replacement, key)
    return key
