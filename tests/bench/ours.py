"""This program as a contender: a Session, warm, in a process of its own."""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench import serving
from bench.contenders import Job

from ldmcli.bench import drawn
from ldmcli.images.encode import encode_pixels
from ldmcli.session import Session
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec
from ldmcli.speed.cpu.heap import keep_freed_memory
from ldmcli.speed.cpu.threads import choose_threads

if TYPE_CHECKING:
    import numpy as np


class Drawn:
    """A picture (height, width, 3) uint8 that is encoded as the commands do."""

    def __init__(self, pixels: "np.ndarray") -> None:
        self.pixels = pixels

    def save(self, file: IO[bytes], kind: str) -> None:
        assert kind == "PNG"
        file.write(encode_pixels(self.pixels, {}))

    def __array__(self, *kind: Any, **more: Any) -> "np.ndarray":
        return self.pixels


class Ours(serving.Serving):
    """The warm session of a job."""

    def __init__(self, job: Job) -> None:
        keep_freed_memory()  # as the commands that draw do
        runtime = RuntimeSpec(device=job.device, dtype=job.dtype, threads=job.threads, **job.settings)
        self.session = Session(ModelSpec(job.model), runtime)
        self.threads = choose_threads(job.threads, self.session.config.unet, pictures=job.batch_size)
        super().__init__(dataclasses.replace(job, device=str(self.session.runtime.device)))

    def greet(self) -> dict[str, Any]:
        """As others do; and what the others are given: the size and guidance of the model, if the job has none."""
        import torch

        import ldmcli
        from ldmcli.checkpoints.source import open_model
        from ldmcli.conditioning.chunks import tokenize
        from ldmcli.speed.policy import cpu_has_bf16

        tokenizers = open_model(Path(self.job.model)).tokenizers
        fitted, cuda = self.session.fit(self.requests(self.job.steps, self.job.prompt)[-1]), self.job.on_gpu
        return {
            "versions": {"ldmcli": ldmcli.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
            **self.session.runtime.to_dict(),
            "threads": self.threads,
            "tokens": [list(tokenize(each, self.job.prompt).chunks[0].ids) for each in tokenizers],
            "bf16_native": cpu_has_bf16(),
            "fitted": {name: getattr(fitted, name) for name in ("width", "height", "guidance_scale")},
            "gpu": torch.cuda.get_device_name(self.job.device) if cuda else None,
            "free": torch.cuda.mem_get_info(self.job.device)[0] if cuda else None,
        }

    def pictures(self, steps: int, prompt: str, on_step: serving.OnStep, *, decode: bool) -> Iterable[Any]:
        def step(progress: Any) -> None:
            if progress.done:
                on_step(progress.latents)

        found = drawn(self.session, self.requests(steps, prompt), step, decode=decode)
        return (Drawn(picture.pixels()) for picture in found) if decode else list(found)

    def floor(self) -> dict[str, Any]:
        """The floor under the job's times (ldmcli.bench)."""
        import torch

        from ldmcli.bench import floor

        torch.set_num_threads(self.threads)
        session, fitted = self.session, self.session.fit(self.requests(self.job.steps, self.job.prompt)[0])
        return floor(session.config, fitted, self.job.batch_size, session.runtime.dtype, session.runtime.device)

    def profile(self) -> dict[str, Any]:
        """What a step spends its time on (step_profile.py)."""
        from bench.step_profile import profile

        return profile(self)

    def requests(self, steps: int, prompt: str) -> list[GenerationRequest]:
        """One request for each picture that is drawn at once."""
        fields = ("negative_prompt", "seed", "width", "height", "guidance_scale")
        given = {name: getattr(self.job, name) for name in fields}
        first = GenerationRequest(prompt, steps=steps, sampler="ddim", **given)
        return [dataclasses.replace(first, seed=self.job.seed + i) for i in range(self.job.batch_size)]


def cold_words(job: Job, output: str) -> list[str]:
    """What is typed after `ldm` to draw the job's picture into a file, its times told."""
    words = dataclasses.asdict(job) | dict(job.settings) | {"sampler": "ddim", "output": output}
    for name in ("name", "prompt", "batch_size", "settings", "prepared"):
        del words[name]
    for name in ("cuda_graph", "cache"):  # which are there unless they are turned off
        words[f"no_{name}"] = not words.pop(name, True)
    typed = {f"--{n.replace('_', '-')}": v for n, v in words.items() if v is not None and v is not False}
    return ["txt2img", "--json", *(n if v is True else f"{n}={v}" for n, v in typed.items()), "--", job.prompt]


if __name__ == "__main__":
    serving.main(Ours)
