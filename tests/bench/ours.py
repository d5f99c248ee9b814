"""This program as a contender: a Session, warm, in a process of its own."""

import dataclasses
import io
import sys
import time
from pathlib import Path
from typing import Any

from bench import serving
from bench.job import Job
from bench.parity import keep
from ldmcli.bench import StepClock, drawn, memory
from ldmcli.session import Session
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec
from ldmcli.speed.cpu.heap import keep_freed_memory
from ldmcli.speed.cpu.threads import choose_threads


class Ours:
    """The warm session of a job: see serving.Drawing."""

    def __init__(self, job: Job) -> None:
        runtime = RuntimeSpec(device=job.device, dtype=job.dtype, threads=job.threads, **job.settings)
        keep_freed_memory()  # as the commands that draw do
        self.job = job
        self.session = Session(ModelSpec(job.model), runtime)
        self.device = str(self.session.runtime.device)

    def greet(self) -> dict[str, Any]:
        import torch

        import ldmcli
        from ldmcli.checkpoints.source import open_model
        from ldmcli.conditioning.chunks import tokenize
        from ldmcli.speed.policy import cpu_has_bf16

        tokenizers = open_model(Path(self.job.model)).tokenizers
        config, cuda = self.session.config, self.device.startswith("cuda")
        return {
            "versions": {"ldmcli": ldmcli.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
            **self.session.runtime.to_dict(),
            "threads": choose_threads(self.job.threads, config.unet, pictures=self.job.batch_size),
            "tokens": [list(tokenize(each, self.job.prompt).chunks[0].ids) for each in tokenizers],
            "bf16_native": cpu_has_bf16(),
            "gpu": torch.cuda.get_device_name(self.device) if cuda else None,
            "free": torch.cuda.mem_get_info(self.device)[0] if cuda else None,
        }

    def fit(self, **given: Any) -> dict[str, Any]:
        """Size and guidance of a request in which they may be left open, by the model."""
        fitted = self.session.fit(GenerationRequest(self.job.prompt, sampler="ddim", **given))
        return {name: getattr(fitted, name) for name in ("width", "height", "guidance_scale", "steps")}

    def draw(self, steps: int, *, prompt: str, decode: bool = True) -> dict[str, Any]:
        from PIL import Image

        clock, data = StepClock(self.device), io.BytesIO()
        started = time.perf_counter()
        for picture in drawn(self.session, self.requests(steps, prompt), clock.on_step, decode=decode):
            Image.fromarray(picture.pixels()).save(data, "PNG")
        return {"seconds": time.perf_counter() - started, "steps": clock.seconds(), "png": len(data.getvalue())}

    def compare(self, steps: int, file: str, *, decode: bool = True) -> dict[str, Any]:
        import numpy as np

        latents: list[Any] = []

        def on_step(progress: Any) -> None:
            if progress.done == progress.steps:
                latents.append(progress.latents.float().cpu().numpy().copy())

        pictures = drawn(self.session, self.requests(steps, self.job.prompt), on_step, decode=decode)
        pixels = [picture.pixels() for picture in pictures]
        keep(file, np.concatenate(latents), np.stack(pixels) if decode else None)
        return {}

    def memory(self) -> dict[str, int]:
        return memory(self.device)

    def floor(self) -> dict[str, Any]:
        """The floor under the job's times (ldmcli.bench)."""
        import torch

        from ldmcli.bench import floor

        job, runtime = self.job, self.session.runtime
        torch.set_num_threads(choose_threads(job.threads, self.session.config.unet, pictures=job.batch_size))
        return floor(self.session.config, job.width, job.height, steps=job.steps, guided=job.guided,
                     batch_size=job.batch_size, dtype=runtime.dtype, device=runtime.device)  # fmt: skip

    def profile(self) -> dict[str, Any]:
        """What a step spends its time on (step_profile.py)."""
        from bench.step_profile import profile

        return profile(self)

    def requests(self, steps: int, prompt: str) -> list[GenerationRequest]:
        """One request for each picture that is drawn at once."""
        job = self.job
        first = GenerationRequest(
            prompt, job.negative_prompt, seed=job.seed, steps=steps, width=job.width, height=job.height,
            guidance_scale=job.guidance_scale, sampler="ddim",
        )  # fmt: skip
        return [dataclasses.replace(first, seed=job.seed + i) for i in range(job.batch_size)]


def cold_words(job: Job, output: str, *more: str) -> list[str]:
    """What is typed after `ldm` to draw the job's picture into a file, its times told."""
    words = [f"--{name.replace('_', '-')}={getattr(job, name)}" for name in
             ("model", "negative_prompt", "seed", "steps", "width", "height", "guidance_scale", "dtype", "device")]  # fmt: skip
    if job.threads:
        words.append(f"--threads={job.threads}")
    for name, value in job.settings.items():
        if not isinstance(value, bool):
            words.append(f"--{name.replace('_', '-')}={value}")
        elif name == "cuda_graph":
            words += [] if value else ["--no-cuda-graph"]
        else:
            words += [f"--{name.replace('_', '-')}"] if value else []
    return ["txt2img", *words, "--sampler=ddim", f"--output={output}", "--json", *more, "--", job.prompt]


if __name__ == "__main__":
    serving.main(Ours)
