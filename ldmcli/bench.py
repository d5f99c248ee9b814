"""How long this program's own pictures take, from a cold start, warm and by the step, beside the machine's floor.

Comparisons with other programs are in tests/bench. Importing this imports nothing heavy: a process counts the memory
peak of the one that started it as its own.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ldmcli
from ldmcli.errors import LdmError, printable
from ldmcli.speed.memory import host_memory
from ldmcli.stopwatch import process_peak

if TYPE_CHECKING:
    import torch

    from ldmcli.config import ModelConfig
    from ldmcli.fitting import FittedRequest
    from ldmcli.session import Session
    from ldmcli.session.picture import Picture
    from ldmcli.session.session import Progress
    from ldmcli.spec import GenerationRequest

PHASES = ("imports", "weights", "text", "denoise", "vae", "png", "rest")
_log = logging.getLogger(__name__)
_WARM_UP = 4  # steps before any is timed: in so many a GPU's are recorded as a graph
_TIMED_STEPS = 4  # where pictures are not asked for
_SECONDS = 1.0  # for which each product of the floor is repeated


def measure(
    session: "Session", request: "FittedRequest", words: Sequence[str], clocks: Sequence[str], runs: int, batch: int
) -> dict[str, Any]:
    """Every sample of the clocks, as plain JSON values; `batch` pictures are drawn at once, but by a cold start one.

    `words` make `ldm txt2img` draw the same request. Its cold start with --no-cache counts apart, and alone where the
    session keeps nothing. Raises LdmError as drawing does.
    """
    contenders, floor_ = {"ldm": new_record()}, None
    if "cold" in clocks:  # before anything heavy is imported here
        contenders |= time_cold(words, runs, cached=session.runtime_spec.cache)
    if {"image", "step"} & set(clocks):
        time_warm(session, request, contenders["ldm"], clocks, runs, batch)
        floor_ = floor(session.config, request, batch, session.runtime.dtype, session.runtime.device)
    task = {**request.to_dict(), "batch_size": batch, **session.runtime.to_dict()}
    about = {"model": session.name, "ldmcli": ldmcli.__version__, "task": task, "machine": machine()}
    return {**about, "floor": floor_, "contenders": contenders}


def new_record() -> dict[str, Any]:
    """What is measured of one program: seconds by clock, each cold start's phases, bytes of memory by place."""
    return {"samples": defaultdict(list), "phases": [], "peaks": defaultdict(list)}


def time_cold(words: Sequence[str], runs: int, *, cached: bool) -> dict[str, dict[str, Any]]:
    """Records of `ldm txt2img WORDS` in new processes, with --no-cache and, if `cached`, without."""
    variants = {"ldm": [], "ldm --no-cache": ["--no-cache"]} if cached else {"ldm --no-cache": ["--no-cache"]}
    records = {name: new_record() for name in variants}
    for i in range(-1, runs):  # the first warms the page cache
        for name, more in variants.items():
            seconds, reported = _cold_start([*more, *words])
            if i >= 0:
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
                note_cold(records[name], seconds, peak, reported)
                _log.info("cold, round %d of %d: %s %.2f s", i + 1, runs, name, seconds)
    return records


def note_cold(record: dict[str, Any], seconds: float, peak: int, reported: dict[str, Any]) -> None:
    """Note a cold start: its wall time, its peak in bytes, and the phases, marks and peaks of its JSON line."""
    record["samples"]["cold"].append(seconds)
    record["samples"]["first_step"].append(reported["marks"]["first_step"])
    record["peaks"]["cold"].append(peak)
    record["peaks"]["first_step"].append(reported["peaks"]["first_step"])
    record["phases"].append({**reported["phases"], "rest": seconds - sum(reported["phases"].values())})


def _cold_start(words: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """Seconds from just before a new process starts until it has ended, and its JSON line. Raises LdmError with its own
    words and exit code where it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LDM_", "_LDM_"))}
    root = str(Path(ldmcli.__file__).parent.parent)
    code = f"import sys; sys.path.append({root!r}); from ldmcli.cli import main; main()"
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as folder:
        command = [sys.executable, "-P", "-c", code, "txt2img", "--json", f"--output={folder}/picture.png", *words]
        started = time.monotonic()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=False)
        seconds = time.monotonic() - started
    if done.returncode:
        lines = done.stderr.decode(errors="backslashreplace").strip().splitlines() or ["ldm txt2img failed."]
        error = LdmError(printable(lines[-1]).removeprefix("ldm: error: "))
        error.exit_code = max(done.returncode, 1)
        raise error
    return seconds, json.loads(done.stdout.splitlines()[-1])


def time_warm(
    session: "Session", request: "FittedRequest", record: dict[str, Any], clocks: Sequence[str], runs: int, batch: int
) -> None:
    """Note the times of images, each a batch from prompt to PNG data, and of their steps, in this process."""
    from ldmcli.images.encode import encode_pixels
    from ldmcli.speed.cpu.heap import keep_freed_memory

    keep_freed_memory()  # as the commands that draw do
    device, image = str(session.runtime.device), "image" in clocks
    steps = request.steps if image else min(request.steps, _TIMED_STEPS) + 1
    for i in range(-1, runs):
        # Another prompt each time: one that was seen before need not be encoded.
        prompt, count = (f"{i + 1} {request.prompt}", steps) if i >= 0 else (request.prompt, _WARM_UP)
        alike = dataclasses.replace(request.recorded, prompt=prompt, steps=count)
        clock, started = StepClock(device), time.perf_counter()
        requests = [dataclasses.replace(alike, seed=request.seed + k) for k in range(batch)]
        for picture in drawn(session, requests, clock.on_step, decode=image):
            encode_pixels(picture.pixels(), {})
        seconds = time.perf_counter() - started
        if i >= 0:
            if image:
                record["samples"]["image"].append(seconds)
            if "step" in clocks and (times := clock.seconds()):
                record["samples"]["step"] += times
            _log.info("warm, round %d of %d: %.2f s", i + 1, runs, seconds)
    for where, size in memory(device).items():
        record["peaks"][where].append(size)


class _Enough(Exception):
    """All steps are done."""


def drawn(
    session: "Session",
    requests: "Sequence[GenerationRequest]",
    on_step: "Callable[[Progress], object]",
    *,
    decode: bool,
) -> "Iterator[Picture]":
    """Pictures that are drawn at once; without `decode` the steps alone are taken, and there are none."""

    def step(progress: "Progress") -> None:
        on_step(progress)
        if not decode and progress.done == progress.steps:
            raise _Enough

    with contextlib.suppress(_Enough):
        yield from session.draw(requests, batch_size=len(requests), on_step=step)


class StepClock:
    """When each step ended; on a GPU by events in its current stream, so that the loop waits for nothing."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._cuda = device.startswith("cuda")
        self._marks: list[Any] = []

    def on_step(self, progress: "Progress") -> None:
        """Note that a step has ended, for `Session.draw`, which also calls at the beginning."""
        if progress.done:
            self.tick()

    def tick(self) -> None:
        """Note that a step has ended."""
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(torch.device(self._device)))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """The time of each step but the first, whose begin is not known and which has more to do."""
        wait(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [before.elapsed_time(after) / 1000 if self._cuda else after - before for before, after in pairs]


def wait(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(torch.device(device))


def memory(device: str) -> dict[str, int]:
    """Peaks of this process, in bytes: `host`, and on a GPU `gpu_allocated` and `gpu_reserved`."""
    held = {"host": process_peak()}
    if device.startswith("cuda"):
        import torch

        held["gpu_allocated"] = torch.cuda.max_memory_allocated(torch.device(device))
        held["gpu_reserved"] = torch.cuda.max_memory_reserved(torch.device(device))
    return held


# ---- the floor ----


def floor(
    config: "ModelConfig", request: "FittedRequest", batch: int, dtype: "torch.dtype", device: "torch.device"
) -> dict[str, Any]:
    """The least seconds of a `step` and of an `image` (a batch of them) if convolutions, matrix products and attention
    of U-Net and VAE all ran at the best rate that is measured now; of a step also by `kinds` of work.

    Convolutions count as they are written: by fewer multiplications (speed/cpu/winograd.py) they may come out below.
    """
    samples = batch * (2 if request.guidance_scale != 1 else 1)
    kinds, decoding = work(config, request.width, request.height, samples)
    size = 8192 if device.type == "cuda" else 2048
    rates = {f"linear {size}→{size}, {size} rows": rate((size, size), (size,), dtype, device)}
    for i, c in enumerate(config.unet.block_channels[:2]):  # where most of a step's work is
        h, w = (max(1, side // config.vae.factor >> i) for side in (request.height, request.width))
        rates[f"conv 3×3 {c}→{c}, {samples}×{h}×{w}"] = rate((c, c, 3, 3), (samples, h, w), dtype, device)
        rates[f"linear {c}→{8 * c}, {samples * h * w} rows"] = rate((8 * c, c), (samples * h * w,), dtype, device)
    best = max(rates, key=rates.__getitem__)
    step = sum(kinds.values())
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "flops_per_second": rates[best],
        "product": best,
        "all": rates,
        "step": step / rates[best],
        "image": (request.steps * step + batch * decoding) / rates[best],
        "kinds": {kind: flops / rates[best] for kind, flops in kinds.items()},
    }


def work(config: "ModelConfig", width: int, height: int, samples: int) -> tuple[dict[str, int], int]:
    """Floating-point operations, two for each multiplication with its addition: of a U-Net step of so many samples by
    kinds of work, and of decoding one picture. Networks are built on the meta device: no number is computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ldmcli.checkpoints.load import on_meta
    from ldmcli.networks.attention import math_attention, set_attention
    from ldmcli.networks.unet import UNet
    from ldmcli.networks.vae import autoencoder_of

    unet, vae = on_meta(lambda: UNet(config.unet)), on_meta(lambda: autoencoder_of(config.vae))
    for network in (unet, vae):
        set_attention(network, math_attention)  # two plain products, which a counter knows in every version of torch
    shape = config.unet.in_channels, height // config.vae.factor, width // config.vae.factor
    latents = torch.empty(samples, *shape, device="meta")
    context = torch.empty(samples, config.text_encoders[0].max_length, config.unet.context_dim, device="meta")
    time_embedding = torch.empty(1, 4 * config.unet.block_channels[0], device="meta")
    with torch.no_grad():
        keys_values = unet.project_context(context)
        with FlopCounterMode(display=False) as step:
            unet(latents, time_embedding, keys_values)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(latents[:1, : config.vae.latent_channels])
    counts = step.get_flop_counts()["Global"]
    convolution, attention = (counts.get(op, 0) for op in (torch.ops.aten.convolution, torch.ops.aten.bmm))
    products = step.get_total_flops() - convolution - attention
    kinds = {"convolution": convolution, "matrix product": products, "attention": attention}
    return kinds, decoding.get_total_flops()


def rate(weight: tuple[int, ...], rows: tuple[int, ...], dtype: "torch.dtype", device: "torch.device") -> float:
    """Operations per second of a linear layer (out, in) over `rows`, or of a convolution (out, in, 3, 3) over (batch,
    height, width): the best of about a second, so that the work of other programs hardly shows."""
    import torch
    from torch.nn import functional as F
    from torch.utils.benchmark import Timer

    w = torch.randn(weight, device=device).div_(math.prod(weight[1:]) ** 0.5).to(dtype)
    batch, *size = rows
    x = torch.randn(batch, weight[1], *size, device=device).to(dtype)
    product: Callable[..., torch.Tensor] = F.linear
    if size:
        x, w = (each.contiguous(memory_format=torch.channels_last) for each in (x, w))
        product = functools.partial(F.conv2d, padding=1)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        product(x, w)
        timer = Timer("product(x, w)", globals=locals(), num_threads=torch.get_num_threads())
        best = min(timer.blocked_autorange(min_run_time=_SECONDS).times)
    return 2 * math.prod(rows) * math.prod(weight) / best


# ---- the report ----


def machine() -> dict[str, Any]:
    """What times depend on beside the programs."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(":")[2].strip() if names else platform.machine()
    return {"cpu": cpu, "cpus": len(os.sched_getaffinity(0)), "memory": host_memory(), "kernel": platform.release()}


def shown_seconds(seconds: float) -> str:
    """With three digits or so: 12.3 s, 1.23 s, 12.3 ms."""
    return f"{seconds * 1000:.3g} ms" if seconds < 0.1 else f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def shown_size(size: float) -> str:
    """In GB, or in MB where it is less than one."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def report(found: dict[str, Any]) -> str:
    """What `measure` found, for a terminal."""
    task, where, floor_ = found["task"], found["machine"], found["floor"] or {}
    at_once = f", {task['batch_size']} at once" if task["batch_size"] > 1 else ""
    lines = [
        f"{found['model']}: {task['width']}×{task['height']}, {task['steps']} steps of {task['sampler']}, guidance "
        f"{task['guidance_scale']:g}{at_once}, {task['dtype']} on {task['device']}",
        f"ldm {found['ldmcli']}, torch {task['torch']}; {where['cpu']}, {where['cpus']} CPUs",
    ]
    for name, record in found["contenders"].items():
        peaks = {where: shown_size(max(sizes)) for where, sizes in record["peaks"].items()}
        for clock in ("cold", "image", "step"):
            samples = record["samples"].get(clock)
            if not samples:
                continue
            median = statistics.median(samples)
            notes = [f"{len(samples)} × {shown_seconds(min(samples))}–{shown_seconds(max(samples))}"]
            if clock == "cold":
                first = statistics.median(record["samples"]["first_step"])
                phases = {phase: statistics.median(p.get(phase, 0.0) for p in record["phases"]) for phase in PHASES}
                notes += [f"first step after {shown_seconds(first)}, peak {peaks['cold']}"]
                notes += [", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items())]
            else:
                notes += [f"{task['batch_size'] / median:.3g} a second, {median / floor_[clock]:.2f} × floor"]
            lines.append(f"{f'{clock}, {name}':22} {shown_seconds(median):>8}  {'; '.join(notes)}")
        if "host" in peaks:
            names = {"host": "memory", "gpu_allocated": "GPU", "gpu_reserved": "GPU, reserved"}
            lines.append("peak, warm: " + ", ".join(f"{names[w]} {peaks[w]}" for w in names if w in peaks))
    if floor_:
        best = f"{floor_['flops_per_second'] / 1e9:,.0f} GFLOP/s ({floor_['product']})"
        lines.append(
            f"floor: {shown_seconds(floor_['step'])} a step, {shown_seconds(floor_['image'])} an image; {best}"
        )
    return "\n".join(lines)
