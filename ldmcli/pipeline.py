"""Requests to pictures: the one path that every command walks."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldmcli.background import in_background
from ldmcli.checkpoints.load import load_text_encoder, load_unet, load_vae
from ldmcli.checkpoints.source import ModelSource, with_prediction_type
from ldmcli.checkpoints.stored_text import Remembered, remembered, stored_encoders
from ldmcli.conditioning.encoder import ClipTextEncoder
from ldmcli.conditioning.prompt_cache import PromptCache
from ldmcli.conditioning.prompts import PromptEncoder, TextEncoder
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.config import UNDECIDED, ModelConfig, TextEncoderConfig
from ldmcli.diffusion import DiffusionModel, conditions
from ldmcli.errors import NotFiniteError
from ldmcli.images.pixels import rounded, to_pixels
from ldmcli.networks.taesd import TinyVAE
from ldmcli.networks.tiling import decode_tiled
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.sampling.noise import SeededNoise
from ldmcli.sampling.samplers import SAMPLERS
from ldmcli.sampling.schedule import Schedule, Step
from ldmcli.spec import GenerationRequest, fit_to_model
from ldmcli.speed.compiled import compile_calls
from ldmcli.speed.cpu.heap import give_back_free_memory
from ldmcli.speed.handover import Delivery, Sideline
from ldmcli.speed.offload import Stage
from ldmcli.speed.policy import Runtime
from ldmcli.stopwatch import Stopwatch

if TYPE_CHECKING:
    import numpy as np

    from ldmcli.checkpoints.vae_source import VAESource

_log = logging.getLogger(__name__)
_COMPUTING = ("forward", "project_context", "embed_time", "embed_added")  # what a U-Net is asked for


@dataclasses.dataclass(frozen=True)
class Begun:
    """Pictures that a device was asked for. `delivery` brings whether all latents are finite, whether each picture is,
    and each picture's pixels."""

    latents: Tensor
    vae_dtype: torch.dtype
    delivery: Delivery


@dataclasses.dataclass
class Pipeline:
    """A model's parts on their device, and maybe a refiner for the end of the way. Requests drawn together must agree
    in all but prompts and seed."""

    runtime: Runtime
    model: DiffusionModel
    vae: AutoencoderKL | TinyVAE
    refiner: DiffusionModel | None = None
    tile_vae: bool = False
    stopwatch: Stopwatch = dataclasses.field(default_factory=Stopwatch)
    stage: Stage = dataclasses.field(default_factory=Stage)
    _sideline: Sideline = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._sideline = Sideline(self.runtime.device)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    @torch.inference_mode()
    def draw(
        self, requests: Sequence[GenerationRequest], on_step: Callable[[], object] = lambda: None
    ) -> "list[np.ndarray]":
        """The pictures, each (height, width, 3) uint8, in order. `on_step` is called after every sampling step.

        Raises NotFiniteError when the U-Net gives numbers that are not finite, or the VAE does so in float32 too.
        """
        latents = self._denoised(requests, on_step)
        if not latents.isfinite().all():
            raise self._not_finite()
        # One picture at a time: the decoder needs more memory than all before.
        if self.runtime.device.type == "cpu":
            give_back_free_memory()
        with self.stopwatch.phase("vae"):
            return [to_pixels(self.decode(one)) for one in latents.split(1)]

    @property
    def works_ahead(self) -> bool:
        """Whether a device computes by itself what it was asked for, so that it pays to `begin` the next pictures
        before these are finished. Where parts come and go, each waits for the one before."""
        return self.runtime.device.type == "cuda" and not self.stage.narrow

    @torch.inference_mode()
    def begin(self, requests: Sequence[GenerationRequest], on_step: Callable[[], object] = lambda: None) -> Begun:
        """Ask the device for what `draw` gives, and wait for none of it; `finish` does. As much memory is needed as by
        `draw`, when this is called, however many were begun before. Raises what asking raises."""
        self._encode_ahead(requests)
        latents = self._denoised(requests, on_step)
        dtype = next(self.vae.parameters()).dtype
        with self.stopwatch.phase("vae"):
            sound, pixels = [latents.isfinite().all()], []
            for one in latents.split(1):
                image = self._decode_as(one / self.vae.config.scaling_factor, dtype)
                sound.append(image.isfinite().all())
                pixels.append(rounded(image))
            # The sampler's own may be written to by the steps of the next pictures.
            return Begun(latents.clone(), dtype, Delivery([torch.stack(sound), *pixels]))

    @torch.inference_mode()
    def finish(self, begun: Begun) -> "list[np.ndarray]":
        """What `draw` gives, bit for bit, and raises, for pictures that were begun; they are finished in that order."""
        with self.stopwatch.phase("vae"):
            sound, *pixels = begun.delivery.wait()
            whole, *each = sound.tolist()
            if not whole:
                raise self._not_finite()
            pictures = []
            for one, good, found in zip(begun.latents.split(1), each, pixels, strict=True):
                # Once a picture has overflowed 16 bits, all after it are decoded in 32.
                same = next(self.vae.parameters()).dtype == begun.vae_dtype
                pictures.append(found.numpy() if good and same else to_pixels(self.decode(one)))
            return pictures

    def _denoised(self, requests: Sequence[GenerationRequest], on_step: Callable[[], object]) -> Tensor:
        """The latents (len(requests), channels, height, width) that the pictures are decoded from."""
        requests = self._fitted(requests)
        settings = requests[0]
        # 1. Where the steps sit on the noise schedule.
        assert settings.sampler is not None
        assert settings.steps is not None
        schedule = Schedule(self.config.schedule)
        steps = schedule.steps(settings.steps, settings.sampler, settings.schedule)
        # 2. Seeds to noise.
        noise = SeededNoise([r.seed for r in requests], self._latent_shape(settings), self.runtime.device)
        latents = noise() * schedule.first_scale(steps, settings.sampler, settings.schedule)
        # 3. The sampler walks from noise to latents, led by one model or by two in turn.
        sample = SAMPLERS[settings.sampler]
        for model, stage in self._stages(steps, settings):
            # Prompts and guidance make a denoiser of the model.
            with self.stopwatch.phase("text"), self._sideline.reading():
                denoise = model.denoiser(requests, steps)
            with self.stopwatch.phase("denoise"):
                self.stopwatch.mark("ready")
                for after_step in sample(denoise, latents, stage, noise, eta=settings.eta):
                    latents = after_step
                    self.stopwatch.mark("first_step")
                    on_step()
        return latents

    def _encode_ahead(self, requests: Sequence[GenerationRequest]) -> None:
        """Have prompts encoded beside what the device still does. What is wrong with them shows when they are used."""
        if not self.works_ahead:
            return

        def encode() -> None:
            for model in self.models():
                conditions(model.config, model.prompts, self._fitted(requests))

        with self.stopwatch.phase("text"), contextlib.suppress(Exception):
            self._sideline.run(encode)

    def models(self) -> list[DiffusionModel]:
        """The model, and the refiner if there is one."""
        return [model for model in (self.model, self.refiner) if model]

    def offload(self) -> None:
        """From now on hold only the part at work on the device, the others in host memory."""
        for model in self.models():
            model.free_graphs()
        tuning = dataclasses.replace(self.runtime.tuning, low_vram=True, graph=False)
        self.runtime = dataclasses.replace(self.runtime, tuning=tuning)
        self.model = dataclasses.replace(self.model, runtime=self.runtime)
        if self.refiner:
            self.refiner = dataclasses.replace(self.refiner, runtime=self.runtime)
        self.stage.make_narrow()

    def alike(self, requests: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        """The requests in groups that can be drawn together: with contexts of one length. In the order of each group's
        first; prompts padded to their neighbours' length would make a picture depend on its batch."""
        groups: dict[tuple[int, int], list[GenerationRequest]] = {}
        for request in requests:
            groups.setdefault(self.model.chunks(request), []).append(request)
        return list(groups.values())

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 inside the block: numbers of 16 bits can overflow where the same weights, widened, do not.
        Memory doubles there; afterwards all is as it was."""
        models = self.models()
        before, vae_dtype = self.runtime, next(self.vae.parameters()).dtype
        wide = dataclasses.replace(before, dtype=torch.float32)
        self.stage.clear()  # what is converted on the device would be there twice
        try:
            self.runtime = wide
            self.vae.float()
            for model in models:
                model.runtime = wide
                model.unet.float()
            yield
        finally:
            self.stage.clear()
            self.runtime = before
            self.vae.to(vae_dtype)
            for model in models:
                model.runtime = before
                model.unet.to(before.dtype)

    def _stages(
        self, steps: Sequence[Step], settings: GenerationRequest
    ) -> Iterator[tuple[DiffusionModel, Sequence[Step]]]:
        """Which model takes which steps: the refiner those below a share of the noise schedule, as an ensemble of
        experts (Podell et al. 2023, section 2.5; Balaji et al. 2022)."""
        if self.refiner is None or settings.refiner_start is None:
            yield self.model, steps
            return
        last = self.config.schedule.training_steps
        cut = round(last - settings.refiner_start * last)
        first = [step for step in steps if step.timestep >= cut]
        for model, stage in ((self.model, first), (self.refiner, steps[len(first) :])):
            if stage:
                yield model, stage

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (1, 3, height, width) in about -1…1 for scaled latents; repeated in float32 if 16 bits overflow."""
        latents = latents / self.vae.config.scaling_factor
        images = self._decode_as(latents, next(self.vae.parameters()).dtype)
        if not images.isfinite().all() and self.runtime.half:
            _log.warning("the VAE overflowed in 16 bits; decoding in float32")
            self.stage.clear()
            self.vae.float()
            images = self._decode_as(latents, torch.float32)
        if not images.isfinite().all():
            raise NotFiniteError("the VAE gave numbers that are not finite; its weights may be damaged.")
        return images

    def _decode_as(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        self.stage.bring(self.vae)
        latents = latents.to(dtype, memory_format=torch.channels_last)
        return (decode_tiled(self.vae, latents) if self.tile_vae else self.vae.decode(latents)).float()

    def _latent_shape(self, settings: GenerationRequest) -> tuple[int, int, int]:
        assert settings.width is not None
        assert settings.height is not None
        factor = self.config.vae.factor
        return self.config.unet.in_channels, settings.height // factor, settings.width // factor

    def _fitted(self, requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """The requests with the model's own settings filled in, once they are seen to be alike."""
        common = {dataclasses.replace(r, prompt="", negative_prompt="", seed=0) for r in requests}
        if len(common) != 1:
            raise ValueError("requests drawn together must agree in all but prompts and seed")
        return [fit_to_model(request, self.config) for request in requests]

    def _not_finite(self) -> NotFiniteError:
        cure = "try --dtype fp32" if self.runtime.half else "its weights may be damaged"
        return NotFiniteError(f"the U-Net gave numbers that are not finite; {cure}.")


def load_pipeline(
    source: ModelSource,
    runtime: Runtime,
    *,
    vae: "VAESource | None" = None,
    refiner: ModelSource | None = None,
    unet: UNet | None = None,
    tile_vae: bool = False,
    first: Sequence[GenerationRequest] = (),
    memory: Remembered | None = None,
    stopwatch: Stopwatch | None = None,
) -> Pipeline:
    """Read all parts of a model to the runtime's device and dtype: with another `vae` than its own, with a refiner's
    U-Net and text encoder, or with its U-Net as it was read before.

    Threads read U-Nets and VAE while the prompts of the requests that are drawn `first` are encoded. The text encoders
    are not read where `memory` has what they make of those; without any such requests they are read now.

    With `low_vram` all are read to host memory first. Raises LdmError where one is larger than the device's.
    """
    memory = remembered(enabled=False) if memory is None else memory
    stopwatch = Stopwatch() if stopwatch is None else stopwatch
    stage = Stage(runtime.device, narrow=runtime.tuning.low_vram)
    with _sharing_the_processor(memory):
        models = [
            _Loading(one, runtime, stage, own) for one, own in ((source, unet), (refiner, None)) if one is not None
        ]
        decoder = in_background(lambda: _load_vae(source, runtime, vae, stage.home), "read VAE")
        for model in models:
            model.encode(first, memory, stopwatch)
        with stopwatch.phase("weights"):
            loaded = [model.result() for model in models]
            loaded_vae = decoder.result()
            runtime.prepare(loaded_vae)
            stage.add(loaded_vae)
    second = loaded[1] if refiner is not None else None
    return Pipeline(runtime, loaded[0], loaded_vae, second, tile_vae, stopwatch, stage)


@contextlib.contextmanager
def _sharing_the_processor(memory: Remembered) -> Iterator[None]:
    """Inside the block this thread computes with half of its threads, and weights are not hashed: others read them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    memory.hashes.may_read.clear()
    try:
        yield
    finally:
        memory.hashes.may_read.set()
        torch.set_num_threads(threads)  # those that read have set it for all threads to come


class _Loading:
    """A U-Net with its text encoders on their way."""

    def __init__(self, source: ModelSource, runtime: Runtime, stage: Stage, unet: UNet | None = None) -> None:
        self._source, self._runtime, self._stage = source, runtime, stage
        self._unet = in_background(lambda: unet or _load_unet(source, runtime, stage.home), "read U-Net")
        self._prompts: PromptEncoder | None = None

    def encode(self, requests: Sequence[GenerationRequest], memory: Remembered, stopwatch: Stopwatch) -> None:
        """Encode the prompts of these requests; if there are none, read the text encoders."""
        source, runtime, stage = self._source, self._runtime, self._stage

        def load(text: TextEncoderConfig, tokenizer: ClipTokenizer) -> TextEncoder:
            with stopwatch.phase("weights"):
                encoder = load_text_encoder(source, text, tokenizer, stage.home, runtime.text_dtype)
            if isinstance(encoder, ClipTextEncoder):
                stage.add(encoder.model, encoder, "encode")
            return encoder

        with stopwatch.phase("text"):
            stored = stored_encoders(source, load, runtime.device, runtime.text_dtype, memory)
            self._prompts = PromptCache(stored)
            for request in requests:
                conditions(source.config, self._prompts, [request])
            if not requests:
                for encoder in stored.encoders:
                    encoder.load()

    def result(self) -> DiffusionModel:
        """The model, once all of it is there."""
        assert self._prompts is not None
        unet = self._unet.result()
        self._runtime.prepare(unet)
        if self._runtime.tuning.compiled:
            compile_calls(unet, self._runtime.device)
        self._stage.add(unet, unet, *_COMPUTING)
        return DiffusionModel(self._source.config, self._runtime, unet, self._prompts)


def _load_unet(source: ModelSource, runtime: Runtime, device: torch.device) -> UNet:
    torch.set_num_threads(1)  # of this thread: each that reads does so beside others
    return load_unet(source, device, runtime.dtype)


def _load_vae(
    source: ModelSource, runtime: Runtime, other: "VAESource | None", device: torch.device
) -> AutoencoderKL | TinyVAE:
    torch.set_num_threads(1)
    if other is None:
        return load_vae(source, device, runtime.vae_dtype(source.config.vae), encoder=False)
    from ldmcli.checkpoints.vae_source import load_vae_from

    return load_vae_from(other, device, runtime.vae_dtype(other.config))


def settled(source: ModelSource, runtime: Runtime) -> tuple[ModelSource, UNet | None]:
    """The source with its prediction type found out where only its U-Net can tell; then with that U-Net."""
    if source.config.schedule.prediction_type != UNDECIDED:
        return source, None
    stage = Stage(runtime.device, narrow=runtime.tuning.low_vram)
    unet = load_unet(source, stage.home, runtime.dtype)
    stage.bring(unet)
    found = probed_prediction_type(unet)
    stage.clear()
    _log.info("%s: prediction type %s, as its network answers; --prediction-type would override", source.name, found)
    return with_prediction_type(source, found), unet


@torch.inference_mode()
def probed_prediction_type(unet: UNet) -> str:
    """`epsilon` or `v_prediction`, by what a U-Net makes of a constant at the noisiest step: one that predicts v
    answers with about minus the image that it expects, one that predicts noise with about its input. Source: the same
    test in AUTOMATIC1111's web UI."""
    weight = unet.conv_in.weight
    half = torch.full((1,), 0.5, device=weight.device, dtype=weight.dtype)
    latents = half.expand(1, unet.config.in_channels, 8, 8).contiguous(memory_format=torch.channels_last)
    context = unet.project_context(half.expand(1, 2, unet.config.context_dim))
    output = unet(latents, unet.embed_time(torch.tensor([999.0], device=weight.device)), context)
    return "v_prediction" if float((output - latents).float().mean()) < -1 else "epsilon"
