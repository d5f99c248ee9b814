"""Which of cuDNN's ways computes a convolution: the one it guesses to be the fastest, or the one found by trying."""

import contextlib
from collections.abc import Iterator

import torch

# Steps from which on trying pays. It takes about half a second in all for some forty shapes, and gains 0.2 to 0.45 ms
# in a step of SD1.5: estimates, not measured.
PAYS = 2000


@contextlib.contextmanager
def chosen_for(device: torch.device, steps: int) -> Iterator[None]:
    """Inside, a GPU's convolutions are computed in the way that suits a job of so many steps in all.

    To be entered before the thread's first convolution: cuDNN's plans are kept for each thread, however they were made.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or (device.type == "cuda" and steps >= PAYS)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
