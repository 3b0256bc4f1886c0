"""The slow twin that the decoding tests compare with: PyAV's own loop, no code of ours."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def plain_decode(path: Path) -> tuple[np.ndarray, list[float]]:
    """Pixels (T, H, W, 3) and times from the first frame."""
    with av.open(str(path)) as container:
        frames = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return np.stack([rgb for _, rgb in frames]), [seconds - frames[0][0] for seconds, _ in frames]
