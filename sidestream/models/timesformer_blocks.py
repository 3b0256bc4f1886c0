"""TimeSformer's block: one or several attention steps over parts of a clip, then a small network per token.

A clip's tokens are patches_BTHWD (T frames of H x W patches) and class tokens_BKD: one for the clip (K = 1) or one
for each frame (K = T). A step shares the patches out among groups and attends inside each:

    step     a patch sees
    time     the same place in all frames
    space    its frame
    joint    all patches
    width    its row of its frame
    height   its column of its frame
    local    the nearest H/2 x W/2 places in all frames
    global   every second frame, row and column, counted from its own

In the last step of a block the class token takes part: it is copied into every group, as key and query, and what the
copies answer is averaged (as the authors' code does for divided attention).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Areas = list[tuple[Tensor, Tensor]]
"""Groups of patches by number: (those that look, those that are seen). Each patch looks in one group."""

GROUPINGS = {
    "time": "b t h w d -> b (h w) t d",
    "space": "b t h w d -> b t (h w) d",
    "joint": "b t h w d -> b 1 (t h w) d",
    "width": "b t h w d -> b (t h) w d",
    "height": "b t h w d -> b (t w) h d",
}
"""Steps whose groups are slices of the clip: (B, groups, patches, D)."""


def local_areas(num_frames: int, num_rows: int, num_columns: int) -> Areas:
    """Windows of T x H/2 x W/2 (rounded up) around each patch, moved inwards at the edges so that all are full."""
    number_THW = torch.arange(num_frames * num_rows * num_columns).reshape(num_frames, num_rows, num_columns)
    areas = []
    for rows, seen_rows in _windows(num_rows):
        for columns, seen_columns in _windows(num_columns):
            areas.append((number_THW[:, rows, columns].flatten(), number_THW[:, seen_rows, seen_columns].flatten()))
    return areas


def global_areas(num_frames: int, num_rows: int, num_columns: int) -> Areas:
    """The 8 grids of stride 2 in time, height and width (fewer where an axis has only one place)."""
    number_THW = torch.arange(num_frames * num_rows * num_columns).reshape(num_frames, num_rows, num_columns)
    grids = [number_THW[t::2, y::2, x::2].flatten() for t in range(2) for y in range(2) for x in range(2)]
    return [(grid, grid) for grid in grids if len(grid)]


SPARSE: dict[str, Callable[[int, int, int], Areas]] = {"local": local_areas, "global": global_areas}


class Attention(nn.Module):
    """Multi-head self-attention, (B, groups, N, D) inside each group; the same parameters as nn.TemporalAttention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_BGND: Tensor) -> Tensor:
        answer_RND = self.merge(F.scaled_dot_product_attention(*self.heads(tokens_BGND.flatten(0, 1))))
        return answer_RND.unflatten(0, tokens_BGND.shape[:2])

    def heads(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, num_heads, N, D / num_heads)."""
        parts = self.qkv(tokens_BND).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return q, k, v

    def merge(self, heads: Tensor) -> Tensor:
        return self.proj(heads.transpose(1, 2).flatten(2))


class Step(nn.Module):
    """One attention step of a block: what is added to the class tokens (None where they take no part) and patches.

    ``has_mix``: one more linear layer on what is added to the patches; every step but the last of a block has it.
    """

    def __init__(self, kind: str, dim: int, num_heads: int, *, has_mix: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, num_heads)
        self.mix = nn.Linear(dim, dim) if has_mix else nn.Identity()

    def forward(self, class_BKD: Tensor | None, patches_BTHWD: Tensor) -> tuple[Tensor | None, Tensor]:
        class_BKD = None if class_BKD is None else self.norm(class_BKD)
        attend = self._sparse if self.kind in SPARSE else self._grouped
        added_BKD, added_BTHWD = attend(class_BKD, self.norm(patches_BTHWD))
        return added_BKD, self.mix(added_BTHWD)

    def _grouped(self, class_BKD: Tensor | None, patches_BTHWD: Tensor) -> tuple[Tensor | None, Tensor]:
        there, back = GROUPINGS[self.kind].split(" -> ")
        tokens_BGND = rearrange(patches_BTHWD, f"{there} -> {back}")
        if class_BKD is not None:
            copies_BG1D = class_BKD.expand(-1, tokens_BGND.shape[1], -1).unsqueeze(2)
            tokens_BGND = torch.cat([copies_BG1D, tokens_BGND], dim=2)
        answer_BGND = self.attention(tokens_BGND)
        added_BKD = None
        if class_BKD is not None:
            copies_BGD, answer_BGND = answer_BGND[:, :, 0], answer_BGND[:, :, 1:]
            added_BKD = copies_BGD.mean(1, keepdim=True) if class_BKD.shape[1] == 1 else copies_BGD
        sizes = dict(zip("thw", patches_BTHWD.shape[1:4], strict=True))
        return added_BKD, rearrange(answer_BGND, f"{back} -> {there}", **sizes)

    def _sparse(self, class_B1D: Tensor | None, patches_BTHWD: Tensor) -> tuple[Tensor | None, Tensor]:
        sizes = patches_BTHWD.shape[1:4]
        areas = [(o.to(patches_BTHWD.device), s.to(patches_BTHWD.device)) for o, s in SPARSE[self.kind](*sizes)]
        q, k, v = self.attention.heads(patches_BTHWD.flatten(1, 3))
        own = None if class_B1D is None else self.attention.heads(class_B1D)
        answers = []
        for looking, seen in areas:
            parts = q[:, :, looking], k[:, :, seen], v[:, :, seen]
            if own is not None:
                parts = tuple(torch.cat(pair, dim=2) for pair in zip(own, parts, strict=True))  # type: ignore[assignment]
            answers.append(F.scaled_dot_product_attention(*parts))
        added_B1D = None
        if own is not None:
            added_B1D = self.attention.merge(torch.stack([a[:, :, :1] for a in answers]).mean(0))
            answers = [a[:, :, 1:] for a in answers]
        order = torch.cat([looking for looking, _ in areas]).argsort()
        added_BND = self.attention.merge(torch.cat(answers, dim=2)[:, :, order])
        return added_B1D, added_BND.unflatten(1, sizes)


class Block(nn.Module):
    """Attention steps, then the network per token; each reads what is normed and adds to it."""

    def __init__(self, steps: tuple[str, ...], dim: int, num_heads: int) -> None:
        super().__init__()
        last = len(steps) - 1
        self.steps = nn.ModuleList(Step(kind, dim, num_heads, has_mix=n < last) for n, kind in enumerate(steps))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, class_BKD: Tensor, patches_BTHWD: Tensor) -> tuple[Tensor, Tensor]:
        *first, last = self.steps
        for step in first:
            patches_BTHWD = patches_BTHWD + step(None, patches_BTHWD)[1]
        return self.end(last, class_BKD, patches_BTHWD)

    def end(self, last: nn.Module, class_BKD: Tensor, patches_BTHWD: Tensor) -> tuple[Tensor, Tensor]:
        """The last step, in which the class token takes part, and the network per token."""
        added_BKD, added_BTHWD = last(class_BKD, patches_BTHWD)
        class_BKD, patches_BTHWD = class_BKD + added_BKD, patches_BTHWD + added_BTHWD
        class_BKD = class_BKD + self.mlp(self.norm(class_BKD))
        return class_BKD, patches_BTHWD + self.mlp(self.norm(patches_BTHWD))


def _windows(num_places: int) -> list[tuple[slice, slice]]:
    """(places that look, places they see) along one axis: windows of half the axis, rounded up."""
    width = -(-num_places // 2)
    first_seen = [min(max(place - width // 2, 0), num_places - width) for place in range(num_places)]
    starts = sorted(set(first_seen))
    looking = [[place for place, first in enumerate(first_seen) if first == start] for start in starts]
    return [(slice(l[0], l[-1] + 1), slice(s, s + width)) for l, s in zip(looking, starts, strict=True)]  # noqa: E741
