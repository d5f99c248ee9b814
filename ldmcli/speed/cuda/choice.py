"""Which tensors go to this program's own kernels. Triton itself is imported when the first of them does."""

import contextlib
import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

DEVICES = {"cuda"}  # the tests add "cpu", for Triton's interpreter
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take x together with the other tensors, which may be of other number types."""
    tensors = [x, *(other for other in others if other is not None)]
    if x.device.type not in DEVICES or not x.numel() or any(t.device != x.device for t in tensors):
        return False
    if any(t.dtype not in DTYPES for t in tensors) or (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    ):
        return False
    return code() is not None


def is_map(x: Tensor) -> bool:
    """Whether x is a feature map (batch, channels, height, width) that lies channels last in memory."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: x's, inside."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def code() -> ModuleType | None:
    """The kernels themselves; None where there is no Triton."""
    try:
        return importlib.import_module("ldmcli.speed.cuda.device_code")
    except ImportError:
        return None
