"""diffusers as a contender: `StableDiffusionPipeline` (or XL's) as its documentation has it, with DDIM.

`serve` is the warm worker, `cold` the whole script a plain user would write, with time stamps. Neither imports more of
ldmcli than a few small modules.
"""

import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmcli.bench.clocks import StepClock, memory
from ldmcli.bench.parity import keep
from ldmcli.bench.task import Job, Task
from ldmcli.bench.worker import Answers, serve
from ldmcli.stopwatch import Stopwatch


def main() -> None:
    """`serve JOB` or `cold JOB PATH`, the job in JSON."""
    kind, job = sys.argv[1], Job.from_json(sys.argv[2])
    if kind == "cold":
        _cold(job, sys.argv[3])
    else:
        serve(lambda: _answers(job))


def load(job: Job) -> Any:
    """The pipeline of a diffusers folder, with DDIM, laid out as the job says."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    folder = Path(job.task.model)
    more: dict[str, Any] = {}
    if "safety_checker" in json.loads((folder / "model_index.json").read_text()):
        more["safety_checker"] = None
    if _only_fp16(folder / "unet"):
        more["variant"] = "fp16"
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[job.dtype]
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **more)
    config = pipe.scheduler.config
    # from_config would take its own class's defaults for what the file does not say.
    spacing = config.get("timestep_spacing", "leading")
    pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing=spacing, clip_sample=False)
    pipe = pipe.to(job.device)
    if job.channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if job.compiled:
        _compile(pipe, job.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _compile(pipe: Any, device: str) -> None:
    """Put torch.compile around the U-Net, and on a GPU around the VAE's decoder too, as diffusers' documentation has it
    there: searching for the fastest kernels, which takes minutes."""
    import torch

    if device.startswith("cuda"):
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
        pipe.vae.decoder = torch.compile(pipe.vae.decoder, mode="max-autotune", fullgraph=True)
    else:
        pipe.unet = torch.compile(pipe.unet)


def arguments(pipe: Any, task: Task, steps: int) -> dict[str, Any]:
    """What to call the pipeline with. Each picture's noise is that of its own CPU generator in float32, whatever the
    number type."""
    import torch

    channels, factor = pipe.unet.config.in_channels, pipe.vae_scale_factor
    shape = (1, channels, task.height // factor, task.width // factor)
    seeds = range(task.seed, task.seed + task.batch_size)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return {
        "prompt": task.prompt,
        "num_images_per_prompt": task.batch_size,
        "negative_prompt": task.negative_prompt or None,
        "width": task.width,
        "height": task.height,
        "num_inference_steps": steps,
        "guidance_scale": task.guidance_scale,
        "latents": noise.to(pipe.device, pipe.unet.dtype),
    }


def tokens(pipe: Any, prompt: str) -> list[list[int]]:
    """The prompt's token ids, for each text encoder."""
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    return [
        each(prompt, padding="max_length", max_length=each.model_max_length, truncation=True).input_ids
        for each in tokenizers
        if each is not None
    ]


def _only_fp16(part: Path) -> bool:
    """Whether a part's weights are there as the variant fp16 alone."""
    names = [path.name for path in part.glob("diffusion_pytorch_model*.safetensors*")]
    return bool(names) and all(".fp16" in name for name in names)


def _answers(job: Job) -> Answers:
    contender = _Diffusers(job)
    return {"greet": contender.greet, "draw": contender.draw, "compare": contender.compare, "memory": contender.memory}


class _Diffusers:
    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(job.task.threads)
        self.job = job
        self.pipe = load(job)

    def greet(self) -> dict[str, Any]:
        """What it is and computes with; `weights` in bytes, in memory."""
        import importlib.metadata

        import torch

        modules = [each for each in self.pipe.components.values() if isinstance(each, torch.nn.Module)]
        return {
            "versions": {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "torch")},
            "device": self.job.device,
            "dtype": self.job.dtype,
            "threads": torch.get_num_threads(),
            "weights": sum(p.nbytes for module in modules for p in module.parameters()),
            "tokens": tokens(self.pipe, self.job.task.prompt),
        }

    def draw(self, steps: int, *, prompt: str, decode: bool = True) -> dict[str, Any]:
        """Draw the pictures; `seconds` from prompt to PNG data, and those of each step but the first. Without `decode`
        the steps alone."""
        clock = StepClock(self.job.device)
        data = io.BytesIO()
        started = time.perf_counter()
        images = self._drawn(steps, "pil" if decode else "latent", lambda _: clock.tick(), prompt)
        for image in images if decode else ():
            image.save(data, "PNG")
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "steps": clock.seconds(), "png": len(data.getvalue())}

    def compare(self, steps: int, file: str, *, decode: bool = True) -> dict[str, Any]:
        """Draw them once and leave final latents and pixels in `file`, an .npz."""
        import numpy as np

        latents: list[Any] = []
        images = self._drawn(steps, "pil" if decode else "latent", latents.append, self.job.task.prompt)
        keep(file, latents[-1].float().cpu().numpy(), np.stack(images) if decode else None)
        return {}

    def memory(self) -> dict[str, int]:
        """Peaks in bytes."""
        return memory(self.job.device)

    def _drawn(self, steps: int, output_type: str, on_step: Any, prompt: str) -> Any:
        def after(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(tensors["latents"])
            return tensors

        call = arguments(self.pipe, self.job.task, steps) | {"prompt": prompt}
        return self.pipe(**call, output_type=output_type, callback_on_step_end=after).images


def _cold(job: Job, output: str) -> None:
    """From nothing to a PNG file; prints when what was done, in seconds of each phase."""
    stamps = {"start": time.monotonic()}

    def stamp(name: str) -> None:
        stamps.setdefault(name, time.monotonic())

    import diffusers
    import torch

    torch.set_num_threads(job.task.threads)
    kind = json.loads((Path(job.task.model) / "model_index.json").read_text())["_class_name"]
    getattr(diffusers, kind)  # imported when it is first looked up
    stamp("imports")
    pipe = load(job)
    stamp("weights")
    set_timesteps, last, watch = pipe.scheduler.set_timesteps, 0.0, Stopwatch()

    def after_text(*settings: Any, **more: Any) -> None:
        stamp("text")
        set_timesteps(*settings, **more)

    def after(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal last
        if "first_step" not in stamps:
            _wait(job.device)
        stamp("first_step")
        watch.mark("first_step")
        last = time.monotonic()
        return tensors

    pipe.scheduler.set_timesteps = after_text
    image = pipe(**arguments(pipe, job.task, job.task.steps), callback_on_step_end=after).images[0]
    stamp("vae")
    image.save(output)
    stamp("png")
    stamps["denoise"] = last
    print(json.dumps({"phases": dict(phases(stamps)), "first_step_at": stamps["first_step"], "peaks": watch.peaks}))


def phases(stamps: dict[str, float]) -> Iterator[tuple[str, float]]:
    """The time from each stamp to the next, in the order in which things happen."""
    before = stamps["start"]
    for name in ("imports", "weights", "text", "denoise", "vae", "png"):
        yield name, stamps[name] - before
        before = stamps[name]


def _wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
