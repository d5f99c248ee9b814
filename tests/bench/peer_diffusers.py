"""diffusers as a contender: the pipeline as its documentation has it, with DDIM."""

import importlib.metadata
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import serving
from bench.contenders import Job

from ldmcli.bench import wait


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
        # On a GPU the decoder too, searching for the fastest kernels, which takes minutes: as diffusers documents it.
        how = {"mode": "max-autotune", "fullgraph": True} if job.on_gpu else {}
        pipe.unet = torch.compile(pipe.unet, **how)
        if job.on_gpu:
            pipe.vae.decoder = torch.compile(pipe.vae.decoder, **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(pipe: Any, job: Job) -> Any:
    """The first latents; each picture's are drawn by a CPU generator of its own, in float32."""
    import torch

    shape = (1, pipe.unet.config.in_channels, job.height // pipe.vae_scale_factor, job.width // pipe.vae_scale_factor)
    seeds = range(job.seed, job.seed + job.batch_size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def tokens(pipe: Any, prompt: str) -> list[list[int]]:
    """The prompt's token ids for each text encoder."""
    found = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    return [
        each(prompt, padding="max_length", max_length=each.model_max_length, truncation=True).input_ids
        for each in found
        if each is not None
    ]


class Diffusers(serving.Serving):
    """The warm pipeline of a job."""

    def __init__(self, job: Job) -> None:
        import torch

        super().__init__(job)
        self.watch.settle = lambda: wait(job.device)
        torch.set_num_threads(job.threads)
        self.pipe = load(job)

    def greet(self) -> dict[str, Any]:
        return {
            "versions": {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "torch")},
            **{name: getattr(self.job, name) for name in ("device", "dtype", "threads")},
            "tokens": tokens(self.pipe, self.job.prompt),
        }

    def pictures(self, steps: int, prompt: str, on_step: serving.OnStep, *, decode: bool) -> Iterable[Any]:
        """What is done before the scheduler is asked for its timesteps counts as the text encoder's."""
        stamps, job = [time.perf_counter()], self.job
        set_timesteps = self.pipe.scheduler.set_timesteps

        def after_text(*settings: Any, **more: Any) -> None:
            stamps.append(time.perf_counter())
            set_timesteps(*settings, **more)

        def after_step(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(tensors["latents"])
            stamps[2:] = [time.perf_counter()]
            return tensors

        self.pipe.scheduler.set_timesteps = after_text
        try:
            images = self.pipe(
                prompt, negative_prompt=job.negative_prompt or None, num_images_per_prompt=job.batch_size,
                width=job.width, height=job.height, num_inference_steps=steps, guidance_scale=job.guidance_scale,
                latents=noise(self.pipe, job).to(self.pipe.device, self.pipe.unet.dtype),
                callback_on_step_end=after_step, output_type="pil" if decode else "latent",
            ).images  # fmt: skip
        finally:
            self.pipe.scheduler.set_timesteps = set_timesteps
        stamps.append(time.perf_counter())
        for name, before, then in zip(("text", "denoise", "vae"), stamps, stamps[1:], strict=False):
            self.watch.add(name, then - before)
        return images if decode else ()


def imports(job: Job) -> None:
    """The pipeline's class, whose module is imported when it is first looked up, and torch."""
    import diffusers

    getattr(diffusers, json.loads((Path(job.model) / "model_index.json").read_text())["_class_name"])


if __name__ == "__main__":
    serving.main(Diffusers, imports)
