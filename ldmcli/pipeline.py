"""Requests to pictures: the one path that every command walks."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldmcli.checkpoints.load import load_text_encoder, load_unet, load_vae
from ldmcli.checkpoints.source import ModelSource
from ldmcli.config import ModelConfig
from ldmcli.errors import LdmError
from ldmcli.models.unet import UNet
from ldmcli.models.vae import AutoencoderKL
from ldmcli.request import GenerationRequest, fit_to_model
from ldmcli.runtime.policy import Runtime
from ldmcli.sampling.denoiser import Denoiser, as_noise_prediction
from ldmcli.sampling.guidance import guided
from ldmcli.sampling.noise import SeededNoise
from ldmcli.sampling.samplers import SAMPLERS
from ldmcli.sampling.schedule import Schedule, Step
from ldmcli.text.clip import ClipTextEncoder

if TYPE_CHECKING:
    import numpy as np

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Pipeline:
    """A model's parts on their device. Requests drawn together must agree in all but prompts and seed."""

    config: ModelConfig
    runtime: Runtime
    unet: UNet
    vae: AutoencoderKL
    text_encoder: ClipTextEncoder

    @torch.inference_mode()
    def draw(
        self, requests: Sequence[GenerationRequest], on_step: Callable[[], object] = lambda: None
    ) -> "list[np.ndarray]":
        """The pictures, each (height, width, 3) uint8, in order. `on_step` is called after every sampling step.

        Raises LdmError when the U-Net gives numbers that are not finite, or the VAE does so in float32 too.
        """
        settings = self._settings(requests)
        # 1. Prompts to context: the negative prompts' half first where there is guidance.
        guide = settings.guidance_scale != 1
        prompts = [r.negative_prompt for r in requests if guide] + [r.prompt for r in requests]
        context = self.encode_prompts(prompts)
        # 2. Seeds to noise.
        noise = SeededNoise([r.seed for r in requests], self._latent_shape(settings), self.runtime.device)
        # 3. The model, the prompts and the guidance make a denoiser.
        steps = Schedule(self.config.schedule).steps(settings.steps)
        denoise = self._denoiser(steps, context)
        if guide:
            denoise = guided(denoise, settings.guidance_scale)
        # 4. The sampler walks from noise to latents.
        latents = noise()
        sample = SAMPLERS[settings.sampler]
        for after_step in sample(denoise, latents, steps, noise, eta=settings.eta):
            latents = after_step
            on_step()
        if not latents.isfinite().all():
            raise LdmError(f"the U-Net gave numbers that are not finite; {self._cure()}.")
        # 5. Latents to pixels, one picture at a time: the decoder needs more memory than all before.
        return [to_pixels(self.decode(one)) for one in latents.split(1)]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Context (len(prompts), tokens, width) in the U-Net's dtype; equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        states = self.text_encoder.encode([self.text_encoder.tokenizer(prompt) for prompt in distinct])
        return states[[distinct.index(prompt) for prompt in prompts]].to(self.runtime.dtype)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (1, 3, height, width) in about -1…1 for scaled latents; repeated in float32 if 16 bits overflow."""
        latents = latents / self.config.vae.scaling_factor
        images = self._decode_as(latents, next(self.vae.parameters()).dtype)
        if not images.isfinite().all() and self.runtime.half:
            _log.warning("the VAE overflowed in 16 bits; decoding in float32")
            self.vae.float()
            images = self._decode_as(latents, torch.float32)
        if not images.isfinite().all():
            raise LdmError("the VAE gave numbers that are not finite; its weights may be damaged.")
        return images

    def _decode_as(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        return self.vae.decode(latents.to(dtype, memory_format=torch.channels_last)).float()

    def _denoiser(self, steps: Sequence[Step], context: Tensor) -> Denoiser:
        """The U-Net for these steps and prompts; what does not depend on the latents is computed here, once."""
        timesteps = torch.tensor([step.timestep for step in steps], device=self.runtime.device)
        embeddings = self.unet.embed_time(timesteps)
        keys_values = self.unet.project_context(context)

        def denoise(latents: Tensor, step: Step) -> Tensor:
            inputs = latents.to(self.runtime.dtype, memory_format=torch.channels_last)
            output = self.unet(inputs, embeddings[step.index : step.index + 1], keys_values).float()
            return as_noise_prediction(output, latents, step, self.config.schedule.prediction_type)

        return denoise

    def _latent_shape(self, settings: GenerationRequest) -> tuple[int, int, int]:
        assert settings.width is not None
        assert settings.height is not None
        factor = self.config.vae.factor
        return self.config.unet.in_channels, settings.height // factor, settings.width // factor

    def _settings(self, requests: Sequence[GenerationRequest]) -> GenerationRequest:
        """What the requests have in common, sizes filled in."""
        common = {dataclasses.replace(r, prompt="", negative_prompt="", seed=0) for r in requests}
        if len(common) != 1:
            raise ValueError("requests drawn together must agree in all but prompts and seed")
        return fit_to_model(common.pop(), self.config)

    def _cure(self) -> str:
        return "try --dtype fp32" if self.runtime.half else "its weights may be damaged"


def load_pipeline(source: ModelSource, runtime: Runtime) -> Pipeline:
    """Read all parts of a model to the runtime's device and dtype."""
    unet = load_unet(source, runtime.device, runtime.dtype)
    vae = load_vae(source, runtime.device, runtime.dtype)
    for module in (unet, vae):
        runtime.prepare(module)
    text_encoder = load_text_encoder(source, runtime.device, runtime.text_dtype)
    return Pipeline(source.config, runtime, unet, vae, text_encoder)


def to_pixels(image: Tensor) -> "np.ndarray":
    """One image (1, 3, height, width) in about -1…1 as (height, width, 3) uint8, rounded to nearest."""
    pixels = (image[0] / 2 + 0.5).clamp(0, 1).mul(255).round()
    return pixels.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
