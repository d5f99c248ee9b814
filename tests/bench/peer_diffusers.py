"""diffusers as a contender: the pipeline as its documentation has it, with DDIM."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import serving
from bench.job import Job

from ldmcli.bench import wait
from ldmcli.stopwatch import Stopwatch, process_age


def load(job: Job) -> Any:
    """The pipeline of a diffusers folder, laid out as the job says."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    folder = Path(job.model)
    more: dict[str, Any] = {}
    if "safety_checker" in json.loads((folder / "model_index.json").read_text()):
        more["safety_checker"] = None
    names = [path.name for path in (folder / "unet").glob("diffusion_pytorch_model*.safetensors*")]
    if names and all(".fp16" in name for name in names):
        more["variant"] = "fp16"
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[job.dtype]
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **more)
    config = pipe.scheduler.config
    # from_config would take its own class's default for a spacing that the file does not name.
    spacing = config.get("timestep_spacing", "leading")
    pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing=spacing, clip_sample=False)
    pipe = pipe.to(job.device)
    if job.settings.get("channels_last"):
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if job.settings.get("compile"):
        compile_networks(pipe, job)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compile_networks(pipe: Any, job: Job) -> None:
    """Put torch.compile around the U-Net, and on a GPU around the VAE's decoder too, as diffusers' documentation does
    there: searching for the fastest kernels, which takes minutes."""
    import torch

    if job.on_gpu:
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
        pipe.vae.decoder = torch.compile(pipe.vae.decoder, mode="max-autotune", fullgraph=True)
    else:
        pipe.unet = torch.compile(pipe.unet)


def arguments(pipe: Any, job: Job, steps: int) -> dict[str, Any]:
    """What the pipeline is called with; each picture's noise is drawn by a CPU generator of its own, in float32."""
    import torch

    channels, factor = pipe.unet.config.in_channels, pipe.vae_scale_factor
    shape = (1, channels, job.height // factor, job.width // factor)
    seeds = range(job.seed, job.seed + job.batch_size)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return {
        "prompt": job.prompt,
        "num_images_per_prompt": job.batch_size,
        "negative_prompt": job.negative_prompt or None,
        "width": job.width,
        "height": job.height,
        "num_inference_steps": steps,
        "guidance_scale": job.guidance_scale,
        "latents": noise.to(pipe.device, pipe.unet.dtype),
    }


def tokens(pipe: Any, prompt: str) -> list[list[int]]:
    """The prompt's token ids for each text encoder."""
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    return [
        each(prompt, padding="max_length", max_length=each.model_max_length, truncation=True).input_ids
        for each in tokenizers
        if each is not None
    ]


class Diffusers(serving.Serving):
    """The warm pipeline of a job."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(job.threads)
        self.job = job
        self.pipe = load(job)

    def greet(self) -> dict[str, Any]:
        import importlib.metadata

        return {
            "versions": {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "torch")},
            "device": self.job.device,
            "dtype": self.job.dtype,
            "threads": self.job.threads,
            "tokens": tokens(self.pipe, self.job.prompt),
        }

    def pictures(self, steps: int, prompt: str, on_step: serving.OnStep, *, decode: bool) -> Iterable[Any]:
        def after(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(tensors["latents"])
            return tensors

        call = arguments(self.pipe, self.job, steps) | {"prompt": prompt, "callback_on_step_end": after}
        images = self.pipe(**call, output_type="pil" if decode else "latent").images
        return images if decode else ()


def cold(job: Job, output: str) -> dict[str, Any]:
    """From nothing to a PNG file, as a plain user's script."""
    import diffusers
    import torch

    watch = Stopwatch(lambda: wait(job.device))
    torch.set_num_threads(job.threads)
    kind = json.loads((Path(job.model) / "model_index.json").read_text())["_class_name"]
    getattr(diffusers, kind)  # imported when it is first looked up
    watch.add("imports", process_age())
    with watch.phase("weights"):
        pipe = load(job)
    stamps = [time.perf_counter()]  # before the text encoder, after it, after the last step
    set_timesteps = pipe.scheduler.set_timesteps

    def after_text(*settings: Any, **more: Any) -> None:
        stamps.append(time.perf_counter())
        set_timesteps(*settings, **more)

    def after(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        watch.mark("first_step")
        stamps[2:] = [time.perf_counter()]
        return tensors

    pipe.scheduler.set_timesteps = after_text
    image = pipe(**arguments(pipe, job, job.steps), callback_on_step_end=after).images[0]
    stamps.append(time.perf_counter())
    for name, before, then in zip(("text", "denoise", "vae"), stamps, stamps[1:], strict=False):
        watch.add(name, then - before)
    with watch.phase("png"):
        image.save(output)
    return watch.report()


if __name__ == "__main__":
    serving.main(Diffusers, cold)
