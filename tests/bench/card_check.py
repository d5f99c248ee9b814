"""What a guided step of SD1.5 takes on this card, technique by technique, in one process and one table.

Nothing is read from a disk or a network: weights are drawn on the card. Every part is tried by itself, and what was
found is in OUT/card.json and OUT/card.txt after each line. --cpu: a toy model, to see that the script runs.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench.step_profile import rows, summed
from torch import Tensor, nn

from ldmcli.bench import StepClock, wait
from ldmcli.checkpoints.load import on_meta
from ldmcli.config import UNetConfig
from ldmcli.networks.attention import ATTENTIONS, set_attention
from ldmcli.networks.unet import UNet
from ldmcli.speed.cuda import fused as layers
from ldmcli.speed.cuda import kernels
from ldmcli.speed.cuda.graph import CudaRecorder
from ldmcli.speed.cuda.kernels import group_norm_silu, kernels_work

NHWC, NCHW = torch.channels_last, torch.contiguous_format
SECONDS = 0.8  # for which a step is repeated
PARTS = ("env", "kernels", "steps", "techniques", "profile", "gn", "batch", "compile")
KERNELS = {"group norm": "group_norm_silu", "gate": "geglu", "sum": "add_bias_residual", "layer norm": "add_and_norm"}
_TOY = UNetConfig(block_channels=(32, 64), attention=(1, 1), heads=(2, 2), context_dim=16, norm_groups=8)
_NORMS = (
    *((channels, 64) for channels in (320, 640, 960)), *((channels, 32) for channels in (640, 960, 1920)),
    *((channels, size) for size in (16, 8) for channels in (1280, 2560)),
)  # fmt: skip


class Notes:
    """What was found, by line, in a folder; and whether there is time for another."""

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._seconds, self._began = folder, seconds, time.monotonic()
        self._log = (folder / "card.txt").open("a")
        self.found: dict[str, dict[str, Any]] = {}

    @property
    def late(self) -> bool:
        """Whether no further line is to be begun."""
        return time.monotonic() - self._began > self._seconds

    def say(self, text: str) -> None:
        """Tell a line."""
        for file in (sys.stdout, self._log):
            print(f"[{time.monotonic() - self._began:6.1f}] {text}", file=file, flush=True)

    def note(self, name: str, **values: Any) -> None:
        """Keep values under a name."""
        self.found[name] = values
        (self.folder / "card.json").write_text(json.dumps(self.found))
        told = (f"{key} {v:.4g}" if isinstance(v, float) else f"{key} {v}" for key, v in values.items())
        self.say(f"{name}: {', '.join(told)}")

    @contextlib.contextmanager
    def tried(self, name: str) -> Iterator[None]:
        """What fails inside the block is noted, and no more."""
        try:
            yield
        except Exception as error:
            self.note(name, failed=repr(error)[:500])
            traceback.print_exc(file=self._log)


def by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """What one of this program's kernels computes, by torch."""

    def call(*values: Any, **settings: Any) -> Any:
        with mock.patch.object(kernels, "DEVICES", set()):
            return function(*values, **settings)

    return call


class Card:
    """The parts, each a method of its name."""

    def __init__(self, notes: Notes, device: torch.device) -> None:
        self.notes, self.device, self.cuda = notes, device, device.type == "cuda"
        self.half = torch.float16 if self.cuda else torch.float32
        self.config, self.size = (UNetConfig(), 64) if self.cuda else (_TOY, 8)
        self._right: Tensor | None = None
        self._recorder = CudaRecorder(device)

    def env(self) -> None:
        """The card, its libraries, and its best rates."""
        if not self.cuda:
            self.notes.note("env", torch=torch.__version__)
            return
        import triton

        p = torch.cuda.get_device_properties(self.device)
        self.notes.note("env", card=p.name, sms=p.multi_processor_count, gb=p.total_memory / 1e9,
                        torch=torch.__version__, cudnn=torch.backends.cudnn.version(),
                        triton=triton.__version__)  # fmt: skip
        a = torch.randn(8192, 8192, device=self.device, dtype=self.half)
        self.notes.note("matmul 8192", tflops=2 * 8192**3 / self.milliseconds(lambda: a @ a)[0] / 1e9)
        b = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        c = torch.empty_like(b)
        self.notes.note("copy 1 GiB", tb_s=2 * (1 << 30) / self.milliseconds(lambda: c.copy_(b))[0] / 1e9)

    def kernels(self) -> None:
        """Whether this program's own kernels work, and how long they take to compile."""
        began = time.monotonic()
        self.notes.note("kernels", works=kernels_work(self.device, self.half), seconds=time.monotonic() - began)

    def steps(self) -> None:
        """A step as torch has it, as it is drawn, and with each attention."""
        self.variant("nchw eager", layout=NCHW, fused=False, graph=False)
        self.variant("nchw graph", layout=NCHW, fused=False)
        self.variant("nhwc graph", fused=False)
        self.variant("fused eager", graph=False)
        self.variant("fused graph")
        for name in ("flash", "cudnn", "efficient") if self.cuda else ("math",):
            self.variant(f"fused graph {name}", attention=name)

    def techniques(self) -> None:
        """A step without one technique each."""
        for name, kernel in KERNELS.items():
            with mock.patch.object(layers, kernel, by_torch(getattr(kernels, kernel))):
                self.variant(f"without {name}")

    def batch(self) -> None:
        """Several pictures at once."""
        for batch in (4, 16) if self.cuda else (2,):
            self.variant(f"fused graph, {batch} at once", batch=batch)

    def compile(self) -> None:
        """torch.compile, as it comes and searching for the fastest kernels."""
        tuned = {"max_autotune": True, "coordinate_descent_tuning": True}
        self.variant("compile default graph", fused=False, compiled={})
        self.variant("compile max-autotune graph", fused=False, compiled=tuned)

    def profile(self) -> None:
        """Kernels of an eager fused step, by name and by kind: those of the graph, without its gaps."""
        step = self.step_of(self.unet_of(self.half, NHWC, fused=True))
        for _ in range(3):
            step()
        wait(str(self.device))
        activity = torch.profiler.ProfilerActivity.CUDA if self.cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            for _ in range(3):
                step()
            wait(str(self.device))
        found = summed(rows(profiler, cuda=self.cuda), 3, 0.0)
        kinds = {kind: f"{1e6 * work['seconds']:.0f} us" for kind, work in found["kinds"].items()}
        self.notes.note("profile", **kinds)
        lines = [f"{1e6 * taken:9.1f} us {calls:6.1f}x {name}" for name, taken, calls in found["longest"]]
        (self.notes.folder / "kernels.txt").write_text("\n".join(lines))
        for line in lines[:25]:
            self.notes.say(line[:120])

    def gn(self) -> None:
        """The norm kernels by shape, in a graph of 20, beside the time that the bytes they must move take at 3 TB/s."""
        for c, s in _NORMS if self.cuda else _NORMS[-2:]:
            if self.notes.late:
                return
            with self.notes.tried(f"gn {c} {s}"):
                x = torch.randn(2, c, s, s, device=self.device, dtype=self.half).contiguous(memory_format=NHWC)
                w = torch.randn(c, device=self.device, dtype=self.half)

                def run(x: Tensor = x, w: Tensor = w) -> Tensor:
                    return [group_norm_silu(x, 32, w, w, 1e-5) for _ in range(20)][-1]

                ms = self.milliseconds(self.graphed(run), 0.1)[0]
                self.notes.note(f"gn {c} {s}", us=1e3 * ms / 20, floor_us=3 * x.nbytes / 3e6)

    def variant(
        self, name: str, *, layout: torch.memory_format = NHWC, fused: bool = True, graph: bool = True,
        attention: str = "sdpa", batch: int = 1, compiled: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Note what a step takes in one way, and its error beside float32."""
        if self.notes.late:
            self.notes.say(f"{name}: no time")
            return
        with self.notes.tried(name), torch.inference_mode():
            unet = self.unet_of(self.half, layout, fused)
            set_attention(unet, ATTENTIONS[attention])
            call = unet if compiled is None else torch.compile(unet, dynamic=False, options=compiled)
            step = self.step_of(unet, batch, layout, call)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            began = time.monotonic()
            out = step()
            wait(str(self.device))
            first = time.monotonic() - began
            error = self.error(out) if batch == 1 else -1.0
            ms, low, high = self.milliseconds(self.graphed(step) if graph else step)
            peak = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.cuda else 0.0
            self.notes.note(name, ms=ms, low=low, high=high, its=1e3 / ms, samples_per_s=2e3 * batch / ms,
                            first_s=first, error=error, peak_gb=peak)  # fmt: skip
        gc.collect()

    def unet_of(self, dtype: torch.dtype, layout: torch.memory_format = NCHW, fused: bool = False) -> nn.Module:
        """The U-Net with weights that are the same every time."""
        unet = on_meta(lambda: UNet(self.config)).to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for name, p in unet.named_parameters():
                p.normal_(generator=generator).mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
                if p.ndim == 1 and name.endswith("weight"):
                    p.add_(1)
        unet = unet.requires_grad_(False).eval().to(self.half).to(dtype).to(memory_format=layout)
        return layers.fuse(unet) if fused else unet

    def step_of(
        self, unet: Any, batch: int = 1, layout: torch.memory_format = NHWC, call: Any = None
    ) -> Callable[[], Tensor]:
        """A guided step on fixed inputs."""
        generator = torch.Generator(self.device).manual_seed(1)
        dtype, size = unet.conv_in.weight.dtype, self.size
        latents = torch.randn(batch, 4, size, size, generator=generator, device=self.device)
        context = torch.randn(2 * batch, 77, self.config.context_dim, generator=generator, device=self.device)
        keys_values = unet.project_context(context.to(self.half).to(dtype))
        when = unet.embed_time(torch.tensor([500.0], device=self.device))

        def step() -> Tensor:
            x = torch.cat([latents, latents]).to(dtype, memory_format=layout)
            negative, positive = (call or unet)(x, when, keys_values).float().chunk(2)
            return negative + 7.5 * (positive - negative)

        return step

    def graphed(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        """What replays the step, recorded as a CUDA graph on a GPU."""
        if not self.cuda:
            return step
        for _ in range(3):
            self._recorder.warm(step)
        return self._recorder.record(step).replay

    def milliseconds(self, run: Callable[[], object], share: float = 1.0) -> tuple[float, float, float]:
        """Median, low and high of groups of runs, by the device's clock."""
        for _ in range(3):
            run()
        times: list[float] = []
        began, calls = time.monotonic(), 5 if self.cuda else 1
        while (time.monotonic() - began < share * SECONDS and len(times) < 60) or len(times) < 3:
            clock = StepClock(str(self.device))
            clock.tick()
            for _ in range(calls):
                run()
            clock.tick()
            times += [1e3 * taken / calls for taken in clock.seconds()]
        return statistics.median(times), min(times), max(times)

    def error(self, out: Tensor) -> float:
        """How far a step's output is from that of plain float32."""
        if self._right is None:
            torch.backends.cudnn.allow_tf32 = False
            self._right = self.step_of(self.unet_of(torch.float32), layout=NCHW)().double()
            torch.backends.cudnn.allow_tf32 = True
        return float((out.double() - self._right).norm() / self._right.norm())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print the table of steps."""
    parser = argparse.ArgumentParser(prog="python -m bench.card_check", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default="env,kernels,steps,profile,gn", help=f"with commas: {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=80, help="after which no further line is begun")
    parser.add_argument("--cpu", action="store_true", help="a toy model, to see that the script runs")
    o = parser.parse_args(arguments)
    notes = Notes(o.out, o.seconds)
    card = Card(notes, torch.device("cpu" if o.cpu else "cuda:0"))
    for part in o.parts.split(","):
        notes.say(f"== {part}")
        with notes.tried(part), torch.inference_mode():
            getattr(card, part)()
    for name, v in notes.found.items():
        if "its" in v:
            notes.say(f"{name:36} {v['ms']:8.3f} ms {v['its']:7.1f} it/s  error {v['error']:.2e}")
    return int(any("failed" in values for values in notes.found.values()))


if __name__ == "__main__":
    sys.exit(main())
