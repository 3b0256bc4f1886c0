"""C3D: eight 3x3x3 convolutions, five poolings, two hidden fully connected layers.

Tran, Bourdev, Fergus, Torresani, Paluri, "Learning Spatiotemporal Features with 3D Convolutional Networks" (ICCV
2015), figure 3 and section 3.2. All convolutions pad by one; pool1 does not pool over time, the others halve it. The
fifth pooling pads height and width by one, as the authors' net does to come from 7 x 7 to 4 x 4 places. The names of
the layers are those of the public PyTorch ports (``conv3a.weight``, ``fc6.weight``).

Differs from the paper: other sizes than 112 x 112 are brought to the 4 x 4 places of fc6 by adaptive average pooling
(at 96 to 127 pixels nothing changes); clips longer than 16 frames answer once for every 16, and those answers are
averaged; frames are RGB, normalised as torchvision's video nets want them, not the difference from a mean clip.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

Triple = tuple[int, int, int]
"""Time, height, width."""
# Name; channels of a convolution, or of a pooling None; kernel (= stride) and padding of a pooling.
TRUNK: tuple[tuple[str, int | None, Triple, Triple], ...] = (
    ("conv1", 64, (3, 3, 3), (1, 1, 1)),
    ("pool1", None, (1, 2, 2), (0, 0, 0)),
    ("conv2", 128, (3, 3, 3), (1, 1, 1)),
    ("pool2", None, (2, 2, 2), (0, 0, 0)),
    ("conv3a", 256, (3, 3, 3), (1, 1, 1)),
    ("conv3b", 256, (3, 3, 3), (1, 1, 1)),
    ("pool3", None, (2, 2, 2), (0, 0, 0)),
    ("conv4a", 512, (3, 3, 3), (1, 1, 1)),
    ("conv4b", 512, (3, 3, 3), (1, 1, 1)),
    ("pool4", None, (2, 2, 2), (0, 0, 0)),
    ("conv5a", 512, (3, 3, 3), (1, 1, 1)),
    ("conv5b", 512, (3, 3, 3), (1, 1, 1)),
)
POOLED_PX = 4
"""Places of the last maps that fc6 reads, in height and in width."""


class C3DLayers(nn.Module):
    """The layers of C3D by the names that weights files use; ``models.conv3d_net`` puts them in a row.

    ``width``: factor on all channels, the fully connected layers' too. ``dropout``: behind fc6 and fc7.
    """

    def __init__(self, num_classes: int = 400, *, width: float = 1.0, dropout: float = 0.5) -> None:
        super().__init__()
        num_channels = 3
        for name, channels, kernel, padding in TRUNK:
            if channels is None:
                self.add_module(name, nn.MaxPool3d(kernel, padding=padding))
                continue
            wide = max(1, round(channels * width))
            self.add_module(name, nn.Conv3d(num_channels, wide, kernel, padding=padding))
            num_channels = wide
        self.pool5 = nn.MaxPool3d(2, padding=(0, 1, 1))
        num_hidden = max(1, round(4096 * width))
        self.num_features = num_channels
        self.fc6 = nn.Linear(num_channels * POOLED_PX**2, num_hidden)
        self.fc7 = nn.Linear(num_hidden, num_hidden)
        self.fc8 = nn.Linear(num_hidden, num_classes)
        self.dropout = nn.Dropout(dropout)

    def trunk(self) -> Iterator[nn.Module]:
        """Modules on (B, C, T, H, W), up to the last convolution's ReLU."""
        for name, channels, *_ in TRUNK:
            yield self.get_submodule(name)
            if channels is not None:
                yield nn.ReLU(inplace=True)

    def classifier(self) -> nn.Sequential:
        """Maps (B, C, H, W) of one step behind pool5 -> logits (B, num_classes)."""
        hidden = [self.fc6, nn.ReLU(inplace=True), self.dropout, self.fc7, nn.ReLU(inplace=True), self.dropout]
        return nn.Sequential(nn.AdaptiveAvgPool2d(POOLED_PX), nn.Flatten(), *hidden, self.fc8)
