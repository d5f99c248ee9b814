"""What a step spends its time on, by kinds of work: the GPU's kernels, or torch's operations on a CPU, summed."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ldmcli.bench.ours import Ours
from ldmcli.bench.task import Job
from ldmcli.errors import LdmError

_BEFORE = 2  # steps of the run before those that are profiled
_STEPS = 4
_LISTED = 40  # of the kernels that take longest

# Kinds of work by the names of kernels and operations, in lower case; the first that fits counts. So attention comes
# before the products that it is made of, and what inductor names by the operations it replaced goes by its template.
_KINDS = (
    ("copy, layout", r"nchwtonhwc|nhwctonchw|tensortransform|memcpy|memset"),
    ("elementwise", r"triton_poi_"),
    ("norm", r"triton_(red|per)_"),
    ("attention", r"flash|fmha|attention|attn|sdpa|mem_eff|softmax"),
    ("convolution", r"conv(?!ert)|[fdw](prop|grad)|winograd"),
    (
        "matrix product",
        r"gemm|gemv|cutlass|nvjet|matmul|splitk|cublas|triton_(tem|mm)|\b(add|b|badd)?b?mm\b|\blinear\b|_linear_",
    ),
    ("norm", r"norm|moments|welford|computefusedparams"),
    ("copy, layout", r"copy|clone|transpose|permute|contiguous|\bcat\b|catarray|upsample|pad|fill|index|gather|empty|"
                     r"resize|_to_copy|to_dense|reorder|aten::(to|view|reshape|as_strided|select|slice|expand|chunk)\b"),
    ("elementwise", r"elementwise|pointwise|silu|gelu|sigmoid|residual|bias|\bgate\b|add_rows|functor|"
                    r"aten::_?(add|sub|mul|div)_?\b"),
)  # fmt: skip
OTHER = "other"
KINDS = ("convolution", "matrix product", "attention", "norm", "elementwise", "copy, layout", OTHER)


def kind_of(name: str) -> str:
    """Which of KINDS a kernel or operation of this name is."""
    lower = name.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, lower)), OTHER)


def summed(rows: Iterable[tuple[str, float, int]], steps: int, seconds: float) -> dict[str, Any]:
    """The profile of so many steps that took `seconds` in all; `rows` are names with their seconds and calls in all.

    Values are for one step: `step` the seconds of all of it, `kinds` seconds and calls by KINDS, `idle` the seconds in
    which none of them ran, and `longest` the [name, kind, seconds, calls] that took longest.
    """
    rows = sorted(rows, key=lambda row: row[1], reverse=True)
    kinds = {kind: {"seconds": 0.0, "calls": 0.0} for kind in KINDS}
    for name, taken, calls in rows:
        of_kind = kinds[kind_of(name)]
        of_kind["seconds"] += taken / steps
        of_kind["calls"] += calls / steps
    busy = sum(of_kind["seconds"] for of_kind in kinds.values())
    return {
        "step": seconds / steps,
        "kinds": kinds,
        "idle": max(0.0, seconds / steps - busy),
        "longest": [[name, kind_of(name), taken / steps, calls / steps] for name, taken, calls in rows[:_LISTED]],
    }


def profile(job: Job) -> dict[str, Any]:
    """Draw with a pipeline that is warm, and profile some steps in the middle: what `summed` tells. Raises LdmError as
    loading and drawing do."""
    import torch

    cuda = job.device.startswith("cuda")
    if cuda:
        _wake_profiler(job.device)
    ours = Ours(job)
    ours.drawn(_BEFORE + _STEPS, lambda: None, job.task.prompt, decode=False)  # in which a graph is recorded
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    window = _Window(torch.profiler.profile(activities=[kind]), torch.cuda.synchronize if cuda else lambda: None)
    ours.drawn(_BEFORE + _STEPS, window.on_step, job.task.prompt, decode=False)
    rows = list(_rows(window.profiler, cuda=cuda))
    if not rows:
        raise LdmError("the profiler saw no kernel of the GPU; NVIDIA's driver may keep its counters from this user.")
    return summed(rows, _STEPS, window.seconds)


class _Window:
    """Some steps of a run, profiled."""

    def __init__(self, profiler: Any, wait: Callable[[], object]) -> None:
        self.profiler = profiler
        self.seconds = 0.0
        self._wait = wait
        self._done = 0
        self._begun = 0.0

    def on_step(self) -> None:
        """A step has been handed to the device."""
        self._done += 1
        if self._done == _BEFORE:
            self._wait()
            self.profiler.start()
            self._begun = time.perf_counter()
        elif self._done == _BEFORE + _STEPS:
            self._wait()
            self.seconds = time.perf_counter() - self._begun
            self.profiler.stop()


def _wake_profiler(device: str) -> None:
    """NVIDIA's profiling library sees the kernels inside a CUDA graph only if it was there when that was recorded."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize()


def _rows(profiler: Any, *, cuda: bool) -> Iterator[tuple[str, float, int]]:
    """Each kernel's or operation's name, own seconds and calls."""
    import torch

    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    for event in profiler.key_averages():
        if event.device_type == device and not event.is_user_annotation:
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            yield event.key, own / 1e6, event.count
