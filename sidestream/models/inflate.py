"""2D weights in 3D nets: an image model's convolutions, repeated over time, so that a still clip answers as a frame.

Carreira, Zisserman (CVPR 2017), section 2.4: a kernel of K frames holds the 2D kernel K times, divided by K. Away from
the clip's first and last frames, whose padding is not part of the still, the inflated net then equals the 2D net.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sidestream.errors import WeightsError
from sidestream.models.weights import KeyMap, StateDict, load_state, loadable

_BLOCKS = {
    "conv1": "Conv3d_1a_7x7", "conv2": "Conv3d_2b_1x1", "conv3": "Conv3d_2c_3x3", "inception3a": "Mixed_3b",
    "inception3b": "Mixed_3c", "inception4a": "Mixed_4b", "inception4b": "Mixed_4c", "inception4c": "Mixed_4d",
    "inception4d": "Mixed_4e", "inception4e": "Mixed_4f", "inception5a": "Mixed_5b", "inception5b": "Mixed_5c",
}  # fmt: skip
_BRANCHES = {
    "branch1": "b0", "branch2.0": "b1a", "branch2.1": "b1b", "branch3.0": "b2a", "branch3.1": "b2b", "branch4.1": "b3b",
}  # fmt: skip


def inflate(weight_OIHW: Tensor, num_frames: int) -> Tensor:
    """The 2D kernel as one of ``num_frames`` frames, (O, I, num_frames, H, W): on a still it answers the same."""
    if weight_OIHW.ndim != 4 or num_frames < 1:
        raise WeightsError(
            f"cannot inflate a weight of shape {tuple(weight_OIHW.shape)} to {num_frames = }; "
            "give the 4 axes of a 2D convolution, and 1 frame or more"
        )
    return weight_OIHW.unsqueeze(2).repeat(1, 1, num_frames, 1, 1) / num_frames


def inflate_model(
    model: nn.Module, state_2d: Mapping[str, Tensor], *, key_map: KeyMap | None = None, fresh: tuple[str, ...] = ()
) -> nn.Module:
    """Load an image model's state dict into its twin in 3D, strictly, and give that back.

    ``key_map``: from the image model's keys to those of ``model`` (``googlenet_keys`` for I3D).
    ``fresh``: beginnings of keys that are left as they are in ``model``, as ``("logits.",)`` for other classes.

    Raises ``WeightsError`` for keys or shapes that do not fit; the model is then unchanged.
    """
    own = loadable(model).state_dict()
    given = dict(state_2d) if key_map is None else key_map(dict(state_2d))
    inflated = {key: _fitted(value, own.get(key)) for key, value in given.items() if not key.startswith(fresh)}
    kept = {key: value for key, value in own.items() if key.startswith(fresh)}
    load_state(model, inflated | kept, origin="the image model")
    return model


def googlenet_keys(state: StateDict) -> StateDict:
    """torchvision's GoogLeNet (Inception-v1 with batch norm) -> I3D; its auxiliary heads are left out."""
    return {
        _i3d_key(key): value[:, :, None, None] if key == "fc.weight" else value
        for key, value in state.items()
        if not key.startswith(("aux1.", "aux2."))
    }


def _i3d_key(key: str) -> str:
    block, _, rest = key.partition(".")
    if block == "fc":
        return f"logits.conv3d.{rest}"
    if block not in _BLOCKS or "." not in rest:
        return key
    *branch, kind, leaf = rest.split(".")
    unit = [_BRANCHES.get(".".join(branch), ".".join(branch))] if branch else []
    return ".".join([_BLOCKS[block], *unit, "conv3d" if kind == "conv" else kind, leaf])


def _fitted(value: Tensor, own: Tensor | None) -> Tensor:
    """Inflated, where the 3D net has a kernel with one more axis."""
    if own is not None and value.ndim == 4 and own.ndim == 5:
        return inflate(value, own.shape[2])
    return value
