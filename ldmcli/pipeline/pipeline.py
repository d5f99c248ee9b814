"""Requests to latents and pixels: the one path that every picture takes, and the chain of wrappers on it."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldmcli.config import ModelConfig
from ldmcli.errors import NotFiniteError
from ldmcli.fitting import FittedRequest
from ldmcli.hires import LATENT
from ldmcli.networks.taesd import TinyVAE
from ldmcli.networks.vae import Autoencoder, Posterior
from ldmcli.pipeline.diffusion import DiffusionModel
from ldmcli.pipeline.enlarging import ReadUpscaler, enlarged_latents, enlarged_pixels
from ldmcli.pipeline.previewing import Seen, linear_images
from ldmcli.pipeline.starting import Earlier, Starter, as_image, canvases_of
from ldmcli.pipeline.steering import Steerers
from ldmcli.sampling.noise import SeededNoise
from ldmcli.sampling.registry import SAMPLERS
from ldmcli.sampling.schedule import Schedule, Step
from ldmcli.speed.cpu.heap import give_back_free_memory
from ldmcli.speed.offload import Stage
from ldmcli.speed.policy import Runtime
from ldmcli.stopwatch import Stopwatch

if TYPE_CHECKING:
    from ldmcli.adapters.adapter import Use
    from ldmcli.conditioning.image_embedding import ImageEmbeddings
    from ldmcli.images.canvas import Canvas

_log = logging.getLogger(__name__)

# Steps done, latents, which it may write to, and what they are predicted to become, which none are at the beginning.
OnStep = Callable[[int, Tensor, Tensor | None], object]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a device was asked for, and may still be at work on: `latents` (batch, channels, height, width), of each
    picture its `pixels` (height, width, 3) uint8, and whether its latents and its image are `finite` (batch, 2). Where
    there are `canvases`, a picture's pixels are to be put into its own."""

    latents: Tensor
    pixels: Sequence[Tensor]
    finite: Tensor
    canvases: "Sequence[Canvas]" = ()


@dataclasses.dataclass
class Pipeline:
    """A model's parts on their device, and maybe a refiner for the end of the way."""

    runtime: Runtime
    model: DiffusionModel
    vae: Autoencoder | TinyVAE
    read_encoder: Callable[[], Autoencoder]
    read_upscaler: ReadUpscaler
    networks: Steerers
    refiner: DiffusionModel | None = None
    embeddings: "ImageEmbeddings | None" = None
    tile_vae: bool = False
    stopwatch: Stopwatch = dataclasses.field(default_factory=Stopwatch)
    stage: Stage = dataclasses.field(default_factory=Stage)
    _encoder: Autoencoder | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def models(self) -> list[DiffusionModel]:
        """The model, and the refiner if there is one."""
        return [model for model in (self.model, self.refiner) if model]

    def adapt(self, uses: "Sequence[Use]") -> None:
        """Have the weights be the model's with these adapters merged, each into those of model and refiner that read
        text of the width it was trained with; where nothing tells, the model's. Raises BadDataError."""
        if not uses and not any(model.merger for model in self.models):
            return
        usual = self.config.unet.context_dim
        with self.stopwatch.phase("weights"):
            for model in self.models:
                width = model.config.unet.context_dim
                model.adapt([use for use in uses if (use.adapter.context_width or usual) == width], self.stage)

    @torch.inference_mode()
    def draw(self, requests: Sequence[FittedRequest], on_step: OnStep = lambda *_: None) -> Drawn:
        """Ask the device for pictures of requests that agree in all but prompts, seed and pictures, and wait for none
        of it but what a second pass enlarges as pixels."""
        canvases = canvases_of(requests)
        first, *later = zip(*(request.passes for request in requests), strict=True)
        latents = self._sampled(first, canvases, on_step)
        if later:
            second, done = later[0], first[0].steps_taken

            def later_step(now: int, latents: Tensor, denoised: Tensor | None) -> None:
                if now:
                    on_step(done + now, latents, denoised)

            latents = self._sampled(second, [], later_step, self._enlarged(latents, second[0]))
        # 4. The autoencoder decodes them.
        return dataclasses.replace(self._decoded(latents), canvases=canvases)

    def _sampled(
        self,
        requests: Sequence[FittedRequest],
        canvases: "Sequence[Canvas]",
        on_step: OnStep,
        earlier: Earlier | None = None,
    ) -> Tensor:
        """The latents of one pass; of one that goes on with an `earlier` pass's, those enlarged."""
        settings = requests[0]
        # 1. Where the steps sit on the noise schedule; seeds and pictures to the latents they start from.
        schedule = Schedule(self.config.schedule)
        steps = schedule.steps(settings.steps, settings.sampler, settings.schedule)
        taken = steps[len(steps) - settings.steps_taken :]
        factor, channels = self.vae.config.factor, self.vae.config.latent_channels
        shape = channels, settings.height // factor, settings.width // factor
        noise = SeededNoise([request.seed for request in requests], shape, self.runtime.device)
        scale = schedule.first_scale(steps, settings.sampler, settings.schedule)
        vectors = self.embeddings(requests, noise) if self.embeddings else None
        starter = Starter(self._encoded, self._modes, self.runtime.device, self.config.noising)
        start = starter.start(settings, canvases, noise, taken, scale, earlier)
        steering = None
        if settings.is_steered and taken:
            from ldmcli.pipeline.controlling import steering_of

            with self.stopwatch.phase("weights"):
                steering = steering_of(requests, canvases, taken, self.networks, self.stage, self.config)
        latents, done = start.latents, 0
        on_step(done, latents, None)
        for model, part in self._stages(taken, settings):
            # 2. Prompts and guidance make a denoiser of the model, once for all its steps.
            with self.stopwatch.phase("text"):
                steers = steering if model is self.model else None
                denoise = model.denoiser(requests, steps, self.stage, start.channels, vectors, steers)
                if start.kept:
                    denoise = start.kept.beside(denoise, taken[0])
                denoise = seen = Seen(denoise)
            # 3. The sampler walks from noise to latents.
            with self.stopwatch.phase("denoise"):
                self.stopwatch.mark("ready")
                sampler = functools.partial(SAMPLERS[settings.sampler], walk=schedule.walk(settings.sampler))
                for latents in sampler(denoise, latents, part, noise, eta=settings.eta):  # noqa: B020
                    self.stopwatch.mark("first_step")
                    done += 1
                    if start.kept:
                        latents.copy_(start.kept.at(latents, taken[done] if done < len(taken) else None))
                    on_step(done, latents, seen.denoised)
        return latents

    def _enlarged(self, latents: Tensor, second: FittedRequest) -> Earlier:
        """What a first pass drew in the size of the second, whose settings are `second`'s."""
        if second.hires_upscaler == LATENT:
            larger = enlarged_latents(latents, second, self.vae.config.factor)
            return lambda noise: larger
        images = [self._enlarged_image(one, second) for one in latents.split(1)]
        return lambda noise: self._encoded(torch.cat(images), noise())

    def _enlarged_image(self, latents: Tensor, second: FittedRequest) -> Tensor:
        """The image (1, 3, height, width) in -1…1 that latents (1, …) decode to, enlarged. Not finite where they are
        not."""
        if not latents.isfinite().all():
            return torch.full((1, 3, second.height, second.width), torch.nan, device=latents.device)
        with self.stopwatch.phase("vae"):
            image = self._decode_as(latents, next(self.vae.parameters()).dtype)
            pixels = rounded(image) if image.isfinite().all() else self.decode(latents)
        larger = enlarged_pixels(pixels.cpu().numpy(), second, self.read_upscaler)
        return as_image(torch.tensor(larger, device=latents.device)[None])

    def _encoded(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """The latents of pictures (batch, 3, height, width) in -1…1 that `noise` stands for in their posteriors."""
        drawn = [each.at(own) for each, own in zip(self._posteriors(pictures), noise.split(1), strict=True)]
        assert self._encoder is not None
        return self._encoder.config.scaled(torch.cat(drawn))

    def _modes(self, pictures: Tensor) -> Tensor:
        """The likeliest latents of pictures, as the autoencoder has them: not scaled."""
        return torch.cat([each.mean for each in self._posteriors(pictures)])

    def _posteriors(self, pictures: Tensor) -> "list[Posterior]":
        """What the autoencoder makes of pictures (batch, 3, height, width) in -1…1: one at a time, as in decoding."""
        if self._encoder is None:
            with torch.inference_mode(False):  # weights of that mode cannot be converted outside it
                self.take_encoder(self.read_encoder())
        encoder = self._encoder
        assert encoder is not None
        self.stage.bring(encoder)
        dtype = next(encoder.parameters()).dtype
        encode = encoder.encode
        if self.tile_vae:
            from ldmcli.networks.tiling import encode_tiled

            encode = functools.partial(encode_tiled, encoder)
        with self.stopwatch.phase("vae"):
            return [encode(one.to(dtype, memory_format=torch.channels_last)) for one in pictures.split(1)]

    def take_encoder(self, encoder: Autoencoder) -> None:
        """Read pictures with this half of an autoencoder from now on."""
        self._encoder = encoder.to(next(self.vae.parameters()).dtype) if not self.runtime.half else encoder
        self.stage.add(encoder)

    def _stages(
        self, steps: Sequence[Step], settings: FittedRequest
    ) -> Iterator[tuple[DiffusionModel, Sequence[Step]]]:
        """Which model takes which steps: the refiner those below a share of the noise schedule, as an ensemble of
        experts (Podell et al. 2023, section 2.5; Balaji et al. 2022)."""
        last = self.config.schedule.training_steps
        cut = round(last - settings.refiner_start * last)
        first = [step for step in steps if self.refiner is None or step.timestep >= cut]
        for model, part in ((self.model, first), (self.refiner, steps[len(first) :])):
            if model and part:
                yield model, part

    def _decoded(self, latents: Tensor) -> Drawn:
        if self.runtime.device.type == "cpu":
            give_back_free_memory()
        dtype = next(self.vae.parameters()).dtype
        pixels, finite = [], [latents.isfinite().flatten(1).all(1)]
        with self.stopwatch.phase("vae"):
            # One picture at a time: the decoder needs more memory than all before.
            images_finite = []
            for one in latents.split(1):
                image = self._decode_as(one, dtype)
                images_finite.append(image.isfinite().all())
                pixels.append(rounded(image))
            finite.append(torch.stack(images_finite))
        # The sampler's own latents may be written to by the steps of the next pictures.
        return Drawn(latents.clone(), pixels, torch.stack(finite, dim=1))

    @torch.inference_mode()
    def preview(self, denoised: Tensor) -> list[Tensor]:
        """About the pixels (height, width, 3) uint8, on the host, of latents (batch, …): one for each latent where a
        linear map is known for these; else decoded, as by TAESD."""
        found = linear_images(denoised, self.vae.config.scaling_factor)
        if found is None:
            dtype = next(self.vae.parameters()).dtype
            return [rounded(self._decode_as(one, dtype).nan_to_num()).cpu() for one in denoised.split(1)]
        return [rounded(one.nan_to_num()).cpu() for one in found.split(1)]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """The pixels (height, width, 3) uint8 of latents (1, …) whose decoding overflowed 16 bits, from now on decoded
        in float32. Raises NotFiniteError where that does not help."""
        dtype = next(self.vae.parameters()).dtype
        if dtype != torch.float32 and self.runtime.half:
            _log.warning("the VAE overflowed in 16 bits; decoding in float32")
            self.stage.clear()
            self.vae.float()
        image = self._decode_as(latents, next(self.vae.parameters()).dtype)
        if not image.isfinite().all():
            raise NotFiniteError("the VAE gave numbers that are not finite; its weights may be damaged.")
        return rounded(image)

    def _decode_as(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Images (1, 3, height, width) in about -1…1."""
        self.stage.bring(self.vae)
        latents = self.vae.config.unscaled(latents).to(dtype, memory_format=torch.channels_last)
        if not self.tile_vae:
            return self.vae.decode(latents).float()
        from ldmcli.networks.tiling import decode_tiled

        return decode_tiled(self.vae, latents).float()

    def offload(self) -> None:
        """From now on hold only the part at work on the device, the others in host memory. Adapters are to be merged
        again."""
        self.adapt([])  # copies of the base would stay on the device
        self.runtime = dataclasses.replace(self.runtime, low_vram=True, cuda_graph=False)
        for model in self.models:
            model.free_graphs()
            model.graphs, model.runtime = None, self.runtime
        self.stage.make_narrow()

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 inside the block: numbers of 16 bits can overflow where the same weights, widened, do not.
        Memory doubles there; afterwards all is as it was."""
        before, vae_dtype = self.runtime, next(self.vae.parameters()).dtype
        self.stage.clear()  # what is converted on the device would be there twice
        try:
            self._convert(dataclasses.replace(before, dtype=torch.float32), torch.float32)
            yield
        finally:
            self.stage.clear()
            self._convert(before, vae_dtype)

    def _convert(self, runtime: Runtime, vae_dtype: torch.dtype) -> None:
        self.runtime = runtime
        self.vae.to(vae_dtype)
        if self._encoder:
            self._encoder.to(vae_dtype)
        for model in self.models:
            model.runtime = runtime
            model.unet.to(runtime.dtype)
        self.networks.convert(runtime)


def rounded(image: Tensor) -> Tensor:
    """One image (1, 3, height, width) in about -1…1 as (height, width, 3) uint8, rounded to nearest; on its device."""
    pixels = (image[0] / 2 + 0.5).clamp(0, 1).mul(255).round()
    return pixels.to(torch.uint8).permute(1, 2, 0).contiguous()
