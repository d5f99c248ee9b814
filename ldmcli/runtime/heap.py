"""Where memory comes from on a CPU."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_KEPT = 96 << 20  # bytes: a U-Net's largest pieces are kept, those of a VAE given back
_ALL = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what is freed for what is asked for next.

    A step of a U-Net asks for gigabytes, in pieces of some megabytes, and frees them again. The C library would give
    each back to the kernel and have it cleared anew: of a step of Stable Diffusion 1.x on two cores, 0.8 of 28 seconds
    of their time; now 0.1, for some hundred megabytes more. Does nothing with another C library than glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _ALL)
