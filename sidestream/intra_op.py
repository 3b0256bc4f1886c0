"""How many threads torch uses inside of an operator."""

from __future__ import annotations

import torch


def use_one_thread() -> None:
    """One from now on in the thread that calls, whatever other threads set later.

    A thread of torch takes over the number that was set last, anywhere, when it first needs one; so it is asked here
    before it is told.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
