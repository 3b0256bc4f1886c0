"""Device, precision and processes: what accelerate decides, and the seeds of every batch."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sidestream.data.sampling import random_generator
from sidestream.errors import InputError
from sidestream.train.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An ``Accelerator`` as the configuration wants it; one of an earlier run in this program does not matter.

    Raises ``InputError`` for "fp16" where there is no GPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it remembers the precision of the last run, and refuses another one
    made = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
    )
    if config.precision == "fp16" and made.scaler is None:  # which passes updates over that are not finite
        raise InputError(
            f"precision='fp16' on {made.device.type!r}, where gradients are not scaled; use 'bf16' or 'no'"
        )
    return made


def gather_objects(accelerator: Accelerator) -> Any:
    """A function that joins lists of all processes; None where there is one process."""
    if accelerator.num_processes == 1:
        return None
    from accelerate.utils import gather_object

    return gather_object


def seed_all(*numbers: int) -> None:
    """Seed torch (all devices), NumPy and Python from these numbers, so that dropout is a function of them."""
    seed = int(random_generator(*numbers).integers(2**32))
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
