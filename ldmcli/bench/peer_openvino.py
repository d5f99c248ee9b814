"""OpenVINO as a contender: diffusers' networks converted with static shapes, and nothing else beside numpy.

`prepare` converts, outside the clocks; token ids, noise and noise levels are written down with the networks, so that
the process that draws (`serve`, `cold`) imports neither torch nor diffusers: OpenVINO at its best.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldmcli.bench.clocks import StepClock
from ldmcli.bench.parity import keep
from ldmcli.bench.peer_diffusers import arguments, load, phases, tokens
from ldmcli.bench.task import Job
from ldmcli.bench.worker import Answers, serve
from ldmcli.stopwatch import Stopwatch, process_peak

_FEWEST_STEPS = 8  # noise levels are written down for runs of up to so many steps, or as many as the task has


def main() -> None:
    """`serve JOB`, `cold JOB PATH` or `prepare JOB`, the job in JSON."""
    kind, job = sys.argv[1], Job.from_json(sys.argv[2])
    if kind == "prepare":
        _prepare(job)
    elif kind == "cold":
        _cold(job, sys.argv[3])
    else:
        serve(lambda: _answers(job))


# ---- conversion ----


def _prepare(job: Job) -> None:
    """Convert the model of the job into its `prepared` folder."""
    import numpy as np
    import torch

    task, folder = job.task, Path(job.prepared)
    pipe = load(Job(task, job.name))  # float32
    texts = [text for text in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if text is not None]
    batch = 2 if task.guided else 1
    prompts = [task.negative_prompt, task.prompt][-batch:]
    ids = [np.array(each) for each in zip(*(tokens(pipe, prompt) for prompt in prompts), strict=True)]
    for i, text in enumerate(texts):
        _convert(folder / f"text_{i}.xml", _text_module(text, xl=len(texts) > 1), torch.from_numpy(ids[i]))
    noise = arguments(pipe, task, 1)["latents"]
    width = sum(text.config.hidden_size for text in texts)
    inputs = [noise.expand(batch, -1, -1, -1).clone(), torch.tensor(1.0), torch.zeros(batch, ids[0].shape[1], width)]
    sizes = torch.tensor([[task.height, task.width, 0, 0, task.height, task.width]] * batch, dtype=torch.float32)
    if len(texts) > 1:
        inputs += [torch.zeros(batch, texts[-1].config.projection_dim), sizes]
    _convert(folder / "unet.xml", _unet_module(pipe.unet), *inputs)
    # Converting runs the network, and the decoder is slow: on a corner of the latents.
    _convert(folder / "vae.xml", _vae_module(pipe.vae), noise[:, :, :8, :8].clone(), shapes=[tuple(noise.shape)])
    timesteps = {}
    for steps in range(1, max(task.steps, _FEWEST_STEPS) + 1):
        pipe.scheduler.set_timesteps(steps)
        timesteps[f"timesteps_{steps}"] = pipe.scheduler.timesteps.numpy()
    settings = {
        "prediction_type": pipe.scheduler.config.prediction_type,
        "texts": len(texts),
        "zero_negative": bool(pipe.config.get("force_zeros_for_empty_prompt")) and not task.negative_prompt,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    levels = pipe.scheduler.alphas_cumprod.numpy()
    last = float(pipe.scheduler.final_alpha_cumprod)
    arrays: dict[str, Any] = {"noise": noise.numpy(), "sizes": sizes.numpy(), "levels": levels, "last": last}
    arrays |= timesteps | {f"ids_{i}": each for i, each in enumerate(ids)}
    np.savez(folder / "constants.npz", allow_pickle=False, **arrays)


def _convert(path: Path, module: Any, *inputs: Any, shapes: list[tuple[int, ...]] | None = None) -> None:
    """One network to OpenVINO's format, for these inputs' shapes alone, or for `shapes` in place of them."""
    import openvino
    import torch

    with torch.no_grad():
        static = [tuple(i.shape) for i in inputs] if shapes is None else shapes
        model = openvino.convert_model(module.eval(), example_input=inputs, input=static)
    openvino.save_model(model, path, compress_to_fp16=False)


def _module(forward: Callable[..., Any], holder: Any) -> Any:
    """A module of `holder`'s weights that computes `forward`."""
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.holder = holder

    Wrapped.forward = forward
    return Wrapped()


def _text_module(text: Any, *, xl: bool) -> Any:
    text.config._attn_implementation = "eager"

    def plain(self: Any, ids: Any) -> Any:
        return self.holder(ids)[0]

    def states(self: Any, ids: Any) -> Any:
        found = self.holder(ids, output_hidden_states=True)
        return found.hidden_states[-2], found[0]

    return _module(states if xl else plain, text)


def _unet_module(unet: Any) -> Any:
    def plain(self: Any, latents: Any, timestep: Any, context: Any) -> Any:
        return self.holder(latents, timestep, context, return_dict=False)[0]

    def added(self: Any, latents: Any, timestep: Any, context: Any, pooled: Any, sizes: Any) -> Any:
        more = {"text_embeds": pooled, "time_ids": sizes}
        return self.holder(latents, timestep, context, added_cond_kwargs=more, return_dict=False)[0]

    return _module(added if unet.config.addition_embed_type else plain, unet)


def _vae_module(vae: Any) -> Any:
    scale = vae.config.scaling_factor

    def decode(self: Any, latents: Any) -> Any:
        return self.holder.decode(latents / scale, return_dict=False)[0]

    return _module(decode, vae)


# ---- drawing ----


def _answers(job: Job) -> Answers:
    contender = _OpenVINO(job)
    return {"greet": contender.greet, "draw": contender.draw, "compare": contender.compare, "memory": contender.memory}


class _OpenVINO:
    def __init__(self, job: Job) -> None:
        import numpy as np
        import openvino

        self.job = job
        folder = Path(job.prepared)
        self.settings = json.loads((folder / "settings.json").read_text())
        self.constants = np.load(folder / "constants.npz")
        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": {"bf16": "bf16"}.get(job.dtype, "f32"),
            "INFERENCE_NUM_THREADS": job.task.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        names = [*(f"text_{i}" for i in range(self.settings["texts"])), "unet", "vae"]
        self.networks = {name: core.compile_model(folder / f"{name}.xml", "CPU", options) for name in names}

    def greet(self) -> dict[str, Any]:
        """What it is and computes with; `weights` in bytes, in memory."""
        import openvino

        size = sum(path.stat().st_size for path in Path(self.job.prepared).glob("*.bin"))
        ids = [self.constants[f"ids_{i}"][-1].tolist() for i in range(self.settings["texts"])]
        return {
            "versions": {"openvino": openvino.__version__},
            "device": "cpu",
            "dtype": self.job.dtype,
            "threads": self.job.task.threads,
            "weights": size // 2 if self.job.dtype == "bf16" else size,
            "tokens": ids,
        }

    def draw(self, steps: int, *, prompt: str, decode: bool = True) -> dict[str, Any]:
        """Draw the picture; `seconds` from tokens to PNG data, and those of each step but the first. Without `decode`
        the steps alone. Whatever the `prompt`, the tokens are those written down: they take as long."""
        clock = StepClock("cpu")
        data = io.BytesIO()
        started = time.perf_counter()
        latents = self.denoised(self.encoded(), steps, clock.tick)
        if decode:
            self.image(latents).save(data, "PNG")
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "steps": clock.seconds(), "png": len(data.getvalue())}

    def compare(self, steps: int, file: str, *, decode: bool = True) -> dict[str, Any]:
        """Draw it once and leave final latents and pixels in `file`, an .npz."""
        import numpy as np

        latents = self.denoised(self.encoded(), steps, lambda: None)
        keep(file, latents, np.asarray(self.image(latents)) if decode else None)
        return {}

    def memory(self) -> dict[str, int]:
        """Peaks in bytes."""
        return {"host": process_peak()}

    def encoded(self) -> list[Any]:
        """What the U-Net reads beside latents and timestep: the context, and for XL pooled prompts and sizes."""
        import numpy as np

        outputs = [self._run(f"text_{i}", self.constants[f"ids_{i}"]) for i in range(self.settings["texts"])]
        context = np.concatenate([found[0] for found in outputs], axis=-1)
        pooled = [outputs[-1][1]] if len(outputs) > 1 else []
        if self.settings["zero_negative"] and len(context) > 1:
            for each in (context, *pooled):
                each[0] = 0
        return [context, *pooled, *([self.constants["sizes"]] if pooled else [])]

    def denoised(self, conditions: list[Any], steps: int, on_step: Callable[[], None]) -> Any:
        """The latents after so many steps of DDIM with guidance, eta 0 (Song, Meng & Ermon 2020)."""
        import numpy as np

        latents, levels, task = self.constants["noise"], self.constants["levels"], self.job.task
        stride = len(levels) // steps
        for timestep in self.constants[f"timesteps_{steps}"]:
            inputs = np.repeat(latents, 2, axis=0) if task.guided else latents
            output = self._run("unet", inputs, np.array(timestep, np.float32), *conditions)[0]
            if task.guided:
                output = output[:1] + task.guidance_scale * (output[1:] - output[:1])
            level = float(levels[timestep])
            previous = float(levels[timestep - stride]) if timestep >= stride else float(self.constants["last"])
            denoised, noise = self._split(latents, output, level)
            latents = np.asarray(previous**0.5 * denoised + (1 - previous) ** 0.5 * noise, np.float32)
            on_step()
        return latents

    def image(self, latents: Any) -> Any:
        """The picture, as Pillow's."""
        import numpy as np
        from PIL import Image

        pixels = self._run("vae", latents)[0][0].transpose(1, 2, 0)
        return Image.fromarray((np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8))

    def _split(self, latents: Any, output: Any, level: float) -> tuple[Any, Any]:
        """The predicted image and noise."""
        signal, spread = level**0.5, (1 - level) ** 0.5
        if self.settings["prediction_type"] == "epsilon":
            return (latents - spread * output) / signal, output
        if self.settings["prediction_type"] == "v_prediction":
            return signal * latents - spread * output, signal * output + spread * latents
        return output, (latents - signal * output) / spread

    def _run(self, name: str, *inputs: Any) -> list[Any]:
        results = self.networks[name](list(inputs))
        return [results[i] for i in range(len(self.networks[name].outputs))]


def _cold(job: Job, output: str) -> None:
    """From nothing to a PNG file; prints when what was done, in seconds of each phase."""
    stamps = {"start": time.monotonic()}

    def stamp(name: str) -> None:
        stamps.setdefault(name, time.monotonic())

    import openvino  # noqa: F401
    from PIL import Image  # noqa: F401

    stamp("imports")
    contender = _OpenVINO(job)
    stamp("weights")
    conditions = contender.encoded()
    stamp("text")
    watch = Stopwatch()

    def on_step() -> None:
        stamp("first_step")
        watch.mark("first_step")

    latents = contender.denoised(conditions, job.task.steps, on_step)
    stamp("denoise")
    image = contender.image(latents)
    stamp("vae")
    image.save(output)
    stamp("png")
    print(json.dumps({"phases": dict(phases(stamps)), "first_step_at": stamps["first_step"], "peaks": watch.peaks}))
