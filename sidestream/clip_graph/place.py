"""Where time lies in a tensor of a clip's graph, and how frames are taken out of it and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Axis ``axis`` has the size ``before * T * after``: time alone (1, 1), or folded with others, as in (B * T)."""

    axis: int
    before: int = 1
    after: int = 1

    @property
    def is_alone(self) -> bool:
        return self.before == self.after == 1

    def unfolded(self, value: Tensor, num: int) -> Tensor:
        """With time as an axis of its own, at ``axis + 1``."""
        return value.unflatten(self.axis, (self.before, num, self.after))

    def frame(self, value: Tensor, n: int, num: int) -> Tensor:
        """Frame ``n`` of ``num``; the axis stays, with the size ``before * after``."""
        if self.is_alone:
            return value.narrow(self.axis, n, 1)
        return self.unfolded(value, num).select(self.axis + 1, n).flatten(self.axis, self.axis + 1)

    def frames(self, value: Tensor, num: int) -> list[Tensor]:
        return [self.frame(value, n, num) for n in range(num)]

    def joined(self, frames: Sequence[Tensor]) -> Tensor:
        """Frames to the tensor they come from."""
        if self.is_alone:
            return torch.cat(list(frames), dim=self.axis)
        apart = [f.unflatten(self.axis, (self.before, 1, self.after)) for f in frames]
        return torch.cat(apart, dim=self.axis + 1).flatten(self.axis, self.axis + 2)

    def repeated(self, frame: Tensor, num: int) -> Tensor:
        """A value of ``num`` frames that are all ``frame``."""
        return frame if num == 1 else self.joined([frame] * num)

    @property
    def is_squeezed(self) -> bool:
        """Whether a frame on a wire has no such axis; the first axis, that of the batch, stays."""
        return self.is_alone and self.axis > 0

    def to_wire(self, frame: Tensor) -> Tensor:
        return frame.squeeze(self.axis) if self.is_squeezed else frame

    def from_wire(self, frame: Tensor) -> Tensor:
        return frame.unsqueeze(self.axis) if self.is_squeezed else frame

    def to_clip(self, value: Tensor, num: int) -> Tensor:
        """Frames as on a wire, in a row along axis 1."""
        return torch.stack([self.to_wire(f) for f in self.frames(value, num)], dim=1)

    def from_clip(self, clip: Tensor) -> Tensor:
        return self.joined([self.from_wire(f) for f in clip.unbind(1)])


def places(shape: Sequence[int], num: int, longer: Sequence[int], longer_num: int) -> Iterator[Place]:
    """Where time can lie in a tensor of this shape that has ``longer`` for more frames."""
    if len(shape) != len(longer):
        return
    differ = [n for n, (a, b) in enumerate(zip(shape, longer)) if a != b]
    if len(differ) != 1:
        return
    (axis,) = differ
    folded, rest = divmod(longer[axis], longer_num)
    if rest or shape[axis] != folded * num:
        return
    for before in range(1, folded + 1):
        if folded % before == 0:
            yield Place(axis, before, folded // before)
