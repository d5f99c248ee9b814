"""OpenVINO as a contender: diffusers' networks of a model with one text encoder, converted with static shapes.

`prepare` converts outside the clocks. Token ids, noise and noise levels are written down with the networks, so that the
process that draws imports neither torch nor diffusers: OpenVINO at its best.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import serving
from bench.contenders import Job


def prepare(job: Job) -> None:
    """Convert the job's model into its `prepared` folder."""
    import dataclasses

    import numpy as np
    import torch
    from bench.peer_diffusers import load, noise, tokens

    folder = Path(job.prepared)
    pipe = load(dataclasses.replace(job, dtype="fp32", device="cpu"))
    if getattr(pipe, "text_encoder_2", None) is not None:
        sys.exit("models with two text encoders are not converted")
    pipe.text_encoder.config._attn_implementation = "eager"
    prompts = [job.prompt] if job.guidance_scale == 1 else [job.negative_prompt, job.prompt]
    ids, latents = np.array([tokens(pipe, prompt)[0] for prompt in prompts]), noise(pipe, job)
    context = torch.zeros(len(prompts), ids.shape[1], pipe.text_encoder.config.hidden_size)
    inputs = latents.expand(len(prompts), -1, -1, -1).clone(), torch.tensor(1.0), context
    _convert(folder / "text.xml", pipe.text_encoder, lambda text, ids: text(ids)[0], torch.from_numpy(ids))
    _convert(folder / "unet.xml", pipe.unet, lambda unet, *inputs: unet(*inputs, return_dict=False)[0], *inputs)
    scale = pipe.vae.config.scaling_factor
    # Converting runs the network, and the decoder is slow: on a corner of the latents.
    _convert(folder / "vae.xml", pipe.vae, lambda vae, latents: vae.decode(latents / scale, return_dict=False)[0],
             latents[:, :, :8, :8].clone(), shapes=[tuple(latents.shape)])  # fmt: skip
    arrays = {"ids": ids, "noise": latents.numpy(), "levels": pipe.scheduler.alphas_cumprod.numpy()}
    for steps in {*range(1, serving.PARITY_STEPS + 2), job.steps}:
        pipe.scheduler.set_timesteps(steps)
        arrays[f"timesteps_{steps}"] = pipe.scheduler.timesteps.numpy()
    arrays |= {"last": pipe.scheduler.final_alpha_cumprod.numpy(), "type": pipe.scheduler.config.prediction_type}
    np.savez(folder / "constants.npz", allow_pickle=False, **arrays)


def _convert(
    path: Path, network: Any, call: Callable[..., Any], *inputs: Any, shapes: list[tuple[int, ...]] | None = None
) -> None:
    """Write `call(network, *inputs)` in OpenVINO's format, for these inputs' shapes alone, or for `shapes`."""
    import openvino
    import torch

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *inputs: Any) -> Any:
            return call(self.network, *inputs)

    with torch.no_grad():
        static = [tuple(i.shape) for i in inputs] if shapes is None else shapes
        model = openvino.convert_model(Called().eval(), example_input=inputs, input=static)
    openvino.save_model(model, path, compress_to_fp16=False)


class OpenVINO(serving.Serving):
    """The compiled networks of a job. Whatever the prompt, the tokens are those written down: they take as long."""

    def __init__(self, job: Job) -> None:
        import numpy as np
        import openvino

        super().__init__(job)
        folder = Path(job.prepared)
        self.constants = np.load(folder / "constants.npz")
        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": {"bf16": "bf16"}.get(job.dtype, "f32"),
            "INFERENCE_NUM_THREADS": job.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        names = ("text", "unet", "vae")
        self.networks = {name: core.compile_model(folder / f"{name}.xml", "CPU", options) for name in names}

    def greet(self) -> dict[str, Any]:
        import openvino

        return {
            "versions": {"openvino": openvino.__version__},
            **{name: getattr(self.job, name) for name in ("device", "dtype", "threads")},
            "tokens": [self.constants["ids"][-1].tolist()],
        }

    def pictures(self, steps: int, prompt: str, on_step: serving.OnStep, *, decode: bool) -> Iterable[Any]:
        import numpy as np
        from PIL import Image

        with self.watch.phase("text"):
            context = self._run("text", self.constants["ids"])
        with self.watch.phase("denoise"):
            latents = self._denoised(context, steps, on_step)
        if not decode:
            return []
        with self.watch.phase("vae"):
            pixels = self._run("vae", latents)[0].transpose(1, 2, 0)
            return [Image.fromarray((np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8))]

    def _denoised(self, context: Any, steps: int, on_step: serving.OnStep) -> Any:
        """The latents after so many steps of DDIM with guidance, eta 0 (Song, Meng & Ermon 2020)."""
        import numpy as np

        latents, levels = self.constants["noise"], self.constants["levels"]
        stride = len(levels) // steps
        for timestep in self.constants[f"timesteps_{steps}"]:
            inputs = np.repeat(latents, len(context), axis=0)
            output = self._run("unet", inputs, np.array(timestep, np.float32), context)
            if len(context) > 1:
                output = output[:1] + self.job.guidance_scale * (output[1:] - output[:1])
            level = float(levels[timestep])
            previous = float(levels[timestep - stride] if timestep >= stride else self.constants["last"])
            signal, spread = level**0.5, (1 - level) ** 0.5
            noise = signal * output + spread * latents if self.constants["type"] == "v_prediction" else output
            image = (latents - spread * noise) / signal
            latents = np.asarray(previous**0.5 * image + (1 - previous) ** 0.5 * noise, np.float32)
            on_step(latents)
        return latents

    def _run(self, name: str, *inputs: Any) -> Any:
        return self.networks[name](list(inputs))[0]


def imports(_: Job) -> None:
    """What drawing needs."""
    import openvino  # noqa: F401
    from PIL import Image  # noqa: F401


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Job(**json.loads(sys.argv[2])))
    else:
        serving.main(OpenVINO, imports)
