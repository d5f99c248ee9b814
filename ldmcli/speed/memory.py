"""How much memory a picture needs at the least, and how much there is."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ldmcli.errors import UsageError

if TYPE_CHECKING:
    from ldmcli.config import ModelConfig, VAEConfig

# In errors without a class of their own: of torch's CPU allocator, of the CUDA runtime and of its libraries.
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
_MANY_TIMES, _LARGE, _SEVERAL = 16, 1024**2, 256**2  # times the usual number of pixels, and pixels
_TILED = 12 + 3  # bytes of a pixel that are in memory at once however it is decoded: as float32 and as uint8


def check_memory(vae: "VAEConfig", width: int, height: int, *, tiled: bool = False) -> None:
    """Refuse a size (pixels) that this machine's memory cannot hold, before any weight is read. `tiled`: decoded, or
    encoded, by networks/tiling.py. Raises UsageError.

    The bound is low on purpose, for 2-byte numbers: what passes may still not fit, what is refused never would.
    """
    channels = vae.block_channels
    widest = channels[min(1, len(channels) - 1)]
    # The decoder's last level holds its input and its output at once, the first of them as wide as the level before.
    needed = width * height * (_TILED if tiled else 2 * (widest + channels[0]))
    available = host_memory()
    if available and needed > available:
        cure = "" if tiled else ", or try --vae-tiling"
        raise UsageError(
            f"a picture of {width}×{height} would need at least {gib(needed)} of memory, and this machine has "
            f"{gib(available)}; ask for a smaller one{cure}."
        )


def large(config: "ModelConfig", width: int, height: int) -> str:
    """What to say of a size that can be drawn, but hardly is meant; "" of others."""
    usual, asked = config.default_size**2, width * height
    if asked < max(_MANY_TIMES * usual, _SEVERAL):
        return ""
    times = f"{width}×{height} has {asked // usual} times the pixels that the model was made for"
    if asked < _LARGE:
        if config.unet.reads not in ("", "mask"):  # a picture says how large things are
            return ""
        return f"{times}, which shows more things, not larger ones; --upscale makes a usual size larger"
    return f"{times}, and takes very long and much memory; a usual size made larger by --upscale does not"


def host_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's limit if lower; 0 if unknown."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("MemTotal:", "SwapTotal:"))))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            limits.append(int(Path(name).read_text()))
    return min(limits, default=0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a GPU's or the machine's memory did not suffice."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch
    return isinstance(error, MemoryError) or named or any(words in str(error) for words in _OUT_OF_MEMORY)


def gib(size: int) -> str:
    """A size in bytes, in words."""
    return f"{size / 2**30:,.1f} GiB"
