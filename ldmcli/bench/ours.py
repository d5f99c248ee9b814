"""This program as a contender: the pipeline of `ldm txt2img`, warm, in a process of its own."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.bench.clocks import StepClock, memory
from ldmcli.bench.parity import keep
from ldmcli.bench.task import Job
from ldmcli.bench.worker import Answers, serve

if TYPE_CHECKING:
    from ldmcli.spec import GenerationRequest


def main() -> None:
    """Answer the bench; the first argument is a Job in JSON."""
    job = Job.from_json(sys.argv[1])
    serve(lambda: _answers(job))


def _answers(job: Job) -> Answers:
    contender = Ours(job)
    return {"greet": contender.greet, "draw": contender.draw, "compare": contender.compare, "memory": contender.memory}


class Ours:
    """The warm pipeline of a job."""

    def __init__(self, job: Job) -> None:
        import torch

        from ldmcli.checkpoints.source import open_model
        from ldmcli.pipeline import load_pipeline, settled
        from ldmcli.speed.cpu.heap import keep_freed_memory
        from ldmcli.speed.policy import choose_runtime

        self.task = task = job.task
        keep_freed_memory()  # as `ldm txt2img` does
        torch.set_num_threads(task.threads)
        self.runtime = choose_runtime(task.device, task.dtype, task.attention, task.tuning)
        source = dataclasses.replace(open_model(Path(task.model)), half=self.runtime.half)
        self.source, unet = settled(source, self.runtime)
        self.pipeline = load_pipeline(self.source, self.runtime, unet=unet, tile_vae=task.tile_vae)
        self.device = str(self.runtime.device)

    def greet(self) -> dict[str, Any]:
        """What it is and computes with; `weights` in bytes: those of the whole model in memory, with a VAE's encoder,
        which is not read."""
        import torch

        import ldmcli
        from ldmcli.speed.policy import choose_runtime

        cuda = self.device.startswith("cuda")
        return {
            "versions": {"ldmcli": ldmcli.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
            **self.runtime.to_dict(),
            "threads": torch.get_num_threads(),
            "weights": self._weights(),
            "tokens": self._tokens(),
            "bf16_native": choose_runtime("cpu").dtype == torch.bfloat16,
            "gpu": torch.cuda.get_device_name(self.runtime.device) if cuda else None,
            "gpu_free": torch.cuda.mem_get_info(self.runtime.device)[0] if cuda else None,
        }

    def _weights(self) -> int:
        total = 0
        for part in self.source.parts:
            text = part.startswith("text_encoder")
            vae = self.runtime.vae_dtype(self.source.config.vae)
            dtype = self.runtime.text_dtype if text else vae if part == "vae" else self.runtime.dtype
            keys = self.source.keys(part)
            total += sum(math.prod(file.tensors[key].shape) for key, file in keys.items()) * dtype.itemsize
        return total

    def _tokens(self) -> list[list[int]]:
        from ldmcli.conditioning.chunks import tokenize

        return [list(tokenize(each, self.task.prompt).chunks[0].ids) for each in self.source.tokenizers]

    def draw(self, steps: int, *, prompt: str, decode: bool = True) -> dict[str, Any]:
        """Draw the pictures; `seconds` from prompt to PNG data, and those of each step but the first. Without `decode`
        the steps alone."""
        from ldmcli.images.png import encode_png

        clock = StepClock(self.device)
        started = time.perf_counter()
        _, pictures = self.drawn(steps, clock.tick, prompt, decode=decode)
        size = sum(len(encode_png(pixels, {})) for pixels in pictures)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "steps": clock.seconds(), "png": size}

    def compare(self, steps: int, file: str, *, decode: bool = True) -> dict[str, Any]:
        """Draw them once and leave final latents and pixels in `file`, an .npz."""
        import numpy as np

        latents, pictures = self.drawn(steps, lambda: None, self.task.prompt, decode=decode)
        keep(file, latents.float().cpu().numpy(), np.stack(pictures) if decode else None)
        return {}

    def memory(self) -> dict[str, int]:
        """Peaks in bytes."""
        return memory(self.device)

    def drawn(self, steps: int, on_step: Callable[[], object], prompt: str, *, decode: bool) -> tuple[Any, list[Any]]:
        """Final latents (pictures, channels, height, width) and each picture's pixels; of the latter none without
        `decode`."""
        import torch

        kept: list[Any] = []
        whole = type(self.pipeline).decode

        def keep(latents: Any) -> Any:
            kept.append(latents)
            return whole(self.pipeline, latents) if decode else latents.new_zeros(len(latents), 3, 1, 1)

        self.pipeline.decode = keep  # type: ignore[method-assign]
        try:
            pictures = self.pipeline.draw(self._requests(steps, prompt), on_step)
        finally:
            del self.pipeline.decode
        return torch.cat(kept), pictures if decode else []

    def _requests(self, steps: int, prompt: str) -> "list[GenerationRequest]":
        """One request for each picture that is drawn at once."""
        from ldmcli.spec import GenerationRequest

        task = self.task
        names = ("negative_prompt", "width", "height", "guidance_scale", "sampler")
        settings = {name: getattr(task, name) for name in names}
        seeds = range(task.seed, task.seed + task.batch_size)
        return [GenerationRequest(prompt, **settings, seed=seed, steps=steps) for seed in seeds]
