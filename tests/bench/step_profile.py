"""What a step spends its time on: the GPU's kernels, or torch's operations on a CPU, summed by kinds of work."""

import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from bench.contenders import PROMPT

from ldmcli.bench import drawn, wait

if TYPE_CHECKING:
    from bench.ours import Ours

BEFORE, STEPS = 2, 4  # steps of the run before those that are profiled, and of those
# NVIDIA's profiling library is to stay between two profiles: CUDA graphs do not survive its leaving.
ENVIRONMENT = {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}

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
KINDS = ("convolution", "matrix product", "attention", "norm", "elementwise", "copy, layout", "other")


def kind_of(name: str) -> str:
    """Which of KINDS a kernel or operation of this name is."""
    lower = name.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, lower)), "other")


def summed(rows: Iterable[tuple[str, float, int]], steps: int, seconds: float) -> dict[str, Any]:
    """The profile of so many steps that took `seconds` in all; `rows` are names with their seconds and calls in all.

    Values are for one step: `step` its seconds, `kinds` seconds and calls by KINDS, `idle` the seconds in which none of
    them ran, and `longest` the [name, seconds, calls] that took longest.
    """
    rows = sorted(rows, key=lambda row: row[1], reverse=True)
    kinds = {kind: {"seconds": 0.0, "calls": 0.0} for kind in KINDS}
    for name, taken, calls in rows:
        of_kind = kinds[kind_of(name)]
        of_kind["seconds"] += taken / steps
        of_kind["calls"] += calls / steps
    busy = sum(of_kind["seconds"] for of_kind in kinds.values())
    longest = [[name, taken / steps, calls / steps] for name, taken, calls in rows[:40]]
    return {"step": seconds / steps, "kinds": kinds, "idle": max(0.0, seconds / steps - busy), "longest": longest}


def profile(ours: "Ours") -> dict[str, Any]:
    """Draw with a session that is warm, and profile some steps in the middle: what `summed` tells."""
    import torch

    cuda = ours.job.on_gpu
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    if cuda:  # kernels inside a CUDA graph show only if the profiling library was there when it was recorded
        with torch.profiler.profile(activities=[activity]):
            torch.zeros(1, device=ours.job.device).add_(1)
            wait(ours.job.device)
    requests = ours.requests(BEFORE + STEPS, PROMPT)
    list(drawn(ours.session, requests, lambda _: None, decode=False))  # in which a graph is recorded
    profiler, times = torch.profiler.profile(activities=[activity]), []

    def on_step(progress: Any) -> None:
        if progress.done == BEFORE:
            wait(ours.job.device)
            profiler.start()
            times.append(time.perf_counter())
        elif progress.done == BEFORE + STEPS:
            wait(ours.job.device)
            times.append(time.perf_counter())
            profiler.stop()

    list(drawn(ours.session, requests, on_step, decode=False))
    return summed(rows(profiler, cuda=cuda), STEPS, times[1] - times[0])


def rows(profiler: Any, *, cuda: bool) -> Iterator[tuple[str, float, int]]:
    """Each kernel's or operation's name, own seconds and calls."""
    import torch

    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    for event in profiler.key_averages():
        if event.device_type == device and not event.is_user_annotation:
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            yield event.key, own / 1e6, event.count
