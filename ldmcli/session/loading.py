"""A model's parts read to their device, beside one another, while the first prompts are encoded."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldmcli.background import in_background
from ldmcli.checkpoints.load import load_conditioner, load_text_encoders, load_unet, load_vae, on_meta
from ldmcli.checkpoints.source import ModelSource, with_prediction_type
from ldmcli.conditioning.condition_encoder import ConditionEncoder
from ldmcli.conditioning.pairs import pairs
from ldmcli.conditioning.prompts import PromptEncoder
from ldmcli.config import UNDECIDED, ImageEmbeddingConfig, TinyVAEConfig
from ldmcli.errors import LdmError
from ldmcli.fitting import FittedRequest
from ldmcli.networks.taesd import TinyVAE
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import Autoencoder, autoencoder_of
from ldmcli.pipeline.pipeline import DiffusionModel, Pipeline
from ldmcli.pipeline.steering import Networks, Steerers, encoder_dtype
from ldmcli.session.opened import Opened
from ldmcli.session.steering_sources import is_picture
from ldmcli.speed.offload import Stage
from ldmcli.speed.policy import Runtime
from ldmcli.stopwatch import Stopwatch

if TYPE_CHECKING:
    from ldmcli.checkpoints.control_source import ControlSource
    from ldmcli.checkpoints.ip_adapter_source import IPAdapterSource
    from ldmcli.checkpoints.source import PartSource
    from ldmcli.conditioning.image_embedding import ImageEmbeddings
    from ldmcli.conditioning.image_encoder import ImageEncoder
    from ldmcli.networks.ip_adapter import IPAdapter
    from ldmcli.pipeline.controlling import Network
    from ldmcli.steering_config import ImageEncoderConfig
    from ldmcli.upscaling.upscaler import Upscaler, UpscalerFile


def load(
    opened: Opened,
    runtime: Runtime,
    *,
    unet: UNet | None = None,
    first: Sequence[FittedRequest] = (),
    stopwatch: Stopwatch | None = None,
) -> Pipeline:
    """Read all parts: threads read U-Nets and VAE while the prompts of the requests that are drawn `first` are encoded.
    `unet` is the model's where it had to be read to know what the model is.

    With `low_vram` all are read to host memory first. Raises LdmError where one is larger than the device's.
    """
    stopwatch = Stopwatch() if stopwatch is None else stopwatch
    stage = Stage(runtime.device, narrow=runtime.low_vram)
    with _sharing_the_processor():
        sources = [(opened.model, unet), (opened.refiner, None)]
        reading = [(source, _read_unet(source, own, runtime, stage)) for source, own in sources if source]
        skeletons = functools.partial(_skeletons, opened, runtime, first)
        kernels = in_background(lambda: runtime.try_kernels(skeletons), "try kernels")
        vae = in_background(lambda: _load_vae(opened, runtime, stage.home), "read VAE")
        read_encoder = functools.partial(_load_encoder, opened, runtime, stage)
        encodes = any(request.encodes or request.model_reads in ("mask", "masked") for request in first)
        vae_encoder = in_background(read_encoder, "read VAE encoder") if encodes else None
        networks = _steerers(opened, runtime, stage)
        steering = in_background(lambda: _read_networks(networks, first), "read what steers")
        prompts = []
        for source, _ in reading:
            with stopwatch.phase("weights"):
                encoder = _encoders(opened, source, runtime, stage)
            with stopwatch.phase("text"):
                for request in (request for request in first if not request.loras):  # else merging comes first
                    with contextlib.suppress(LdmError):  # what is wrong with it shows when it is drawn
                        pairs(source.config, encoder, [request])
            prompts.append(encoder)
        with stopwatch.phase("weights"):
            kernels.result()
            models = [
                _model(source, runtime, stage, future.result(), encoder)
                for (source, future), encoder in zip(reading, prompts, strict=True)
            ]
            decoder = runtime.prepare(vae.result())
            stage.add(decoder)
            steering.result()
    kept = functools.lru_cache(1)(functools.partial(_load_upscaler, runtime))
    pipeline = Pipeline(
        runtime,
        models[0],
        decoder,
        read_encoder,
        lambda name: kept(opened.hires_upscaler(name)),
        networks,
        models[1] if opened.refiner else None,
        stopwatch=stopwatch,
        stage=stage,
        embeddings=_embeddings(opened, runtime, networks, stage),
    )
    if vae_encoder:
        pipeline.take_encoder(vae_encoder.result())
    return pipeline


def settle(opened: Opened, runtime: Runtime) -> tuple[Opened, UNet | None]:
    """With the model's prediction type found out where only its U-Net can tell; then also that U-Net."""
    source = opened.model
    if source.config.schedule.prediction_type != UNDECIDED:
        return opened, None
    stage = Stage(runtime.device, narrow=runtime.low_vram)
    unet = load_unet(source, stage.home, runtime.dtype)
    stage.add(unet)
    stage.bring(unet)
    found = probed_prediction_type(unet)
    stage.clear()
    return dataclasses.replace(opened, model=with_prediction_type(source, found)), unet


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
    return "v_prediction" if float((output - latents[:, : output.shape[1]]).float().mean()) < -1 else "epsilon"


@contextlib.contextmanager
def _sharing_the_processor() -> Iterator[None]:
    """Inside the block this thread computes with half of its threads: others read weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)  # those that read have set it for all threads to come


def _read_unet(source: ModelSource, own: UNet | None, runtime: Runtime, stage: Stage) -> "Future[UNet]":
    def read() -> UNet:
        torch.set_num_threads(1)  # of this thread: each that reads does so beside others
        return own or load_unet(source, stage.home, runtime.dtype)

    return in_background(read, "read U-Net")


def _load_vae(opened: Opened, runtime: Runtime, device: torch.device) -> Autoencoder | TinyVAE:
    torch.set_num_threads(1)
    vae = opened.vae or opened.model.part("vae")
    return load_vae(vae, device, runtime.vae_dtype(vae.config), encoder=False)


def _skeletons(
    opened: Opened, runtime: Runtime, first: Sequence[FittedRequest]
) -> list[tuple[nn.Module, torch.dtype, Sequence[int]]]:
    """The first U-Net and the decoder on meta, their number types, and the pixels of their largest maps."""
    config, vae = opened.model.config.unet, (opened.vae or opened.model.part("vae")).config
    image = [request.width * request.height for request in first]
    latents = [pixels // vae.factor**2 for pixels in image]
    parts: list[tuple[nn.Module, torch.dtype, Sequence[int]]] = [
        (on_meta(lambda: UNet(config)), runtime.dtype, latents)
    ]
    if not isinstance(vae, TinyVAEConfig):
        parts.append((on_meta(lambda: autoencoder_of(vae).decoder), runtime.vae_dtype(vae), image))
    return parts


def _load_encoder(opened: Opened, runtime: Runtime, stage: Stage) -> Autoencoder:
    """The encoding half of the autoencoder, which pictures are read with."""
    part = opened.encoder
    encoder = load_vae(part, stage.home, runtime.vae_dtype(part.config), decoder=False)
    assert isinstance(encoder, Autoencoder)
    return runtime.prepare(encoder)


def _load_upscaler(runtime: Runtime, file: "UpscalerFile") -> "Upscaler":
    from ldmcli.upscaling.upscaler import Upscaler

    return Upscaler(file, runtime)


def _steerers(opened: Opened, runtime: Runtime, stage: Stage) -> Steerers:
    """The networks that requests may name, none of them read yet."""
    sources, home = opened.steering, stage.home

    def control(source: "ControlSource") -> "Network":
        from ldmcli.checkpoints.load_control import load_control

        return runtime.prepare(load_control(source, opened.model.part("unet"), home, runtime.dtype))

    def ip_adapter(source: "IPAdapterSource") -> "IPAdapter":
        from ldmcli.checkpoints.load_ip_adapter import load_ip_adapter

        return load_ip_adapter(source.part, home, runtime.dtype)

    def image_encoder(source: "PartSource[ImageEncoderConfig]") -> "ImageEncoder":
        from ldmcli.checkpoints.load_ip_adapter import load_image_encoder

        return load_image_encoder(source, home, encoder_dtype(runtime))

    return Steerers(
        Networks(sources.control, control, stage, runtime.dtype),
        Networks(sources.ip_adapter, ip_adapter, stage, runtime.dtype),
        Networks(lambda path: sources.image_encoder(Path(path)), image_encoder, stage, encoder_dtype(runtime)),
        lambda name: str(sources.ip_adapter(name).encoder.path),
    )


def _read_networks(networks: Steerers, first: Sequence[FittedRequest]) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(LdmError):  # what is wrong with one shows when it is drawn
        for name in dict.fromkeys(control.net for request in first for control in request.controls):
            networks.controls.named(name)
        for name in dict.fromkeys(prompt.adapter for request in first for prompt in request.image_prompts):
            networks.adapters.named(name)
            networks.encoders.named(networks.encoder_of(name))


def _encoders(opened: Opened, source: ModelSource, runtime: Runtime, stage: Stage) -> PromptEncoder | ConditionEncoder:
    if "text" not in source.config.conditions:
        network = load_conditioner(source, stage.home, runtime.text_dtype)
        if network is not None:
            stage.add(network)
        return ConditionEncoder(source.config, network, _map_of, stage.bring)
    encoders = load_text_encoders(source, stage.home, runtime.text_dtype)
    for encoder in encoders:
        stage.add(encoder.model)
    return PromptEncoder([dataclasses.replace(encoder, bring=stage.bring) for encoder in encoders], opened.words)


def _embeddings(opened: Opened, runtime: Runtime, networks: Steerers, stage: Stage) -> "ImageEmbeddings | None":
    """What makes embeddings ready to be read, where the model reads any."""
    config = opened.model.config
    if not isinstance(config.conditioner, ImageEmbeddingConfig):
        return None
    from ldmcli.conditioning.image_embedding import ImageEmbeddings

    def read(request: FittedRequest) -> torch.Tensor:
        assert request.image_embedding is not None
        if not is_picture(request.image_embedding):
            from ldmcli.checkpoints.image_embedding_file import read_embedding

            return read_embedding(request, allow_pickle=opened.spec.allow_pickle)
        from ldmcli.pipeline.image_prompting import features_of

        encoder = str(opened.steering.embedder().path)
        return features_of(networks, stage, encoder, request.image_embedding, "embedding").float()

    assert config.noising is not None
    noiser: Any = load_conditioner(opened.model, runtime.device, torch.float32)
    return ImageEmbeddings(config.unet, noiser, config.noising, read, runtime.device)


def _map_of(request: FittedRequest) -> Any:
    from ldmcli.images.class_map import map_of

    return map_of(request)


def _model(
    source: ModelSource, runtime: Runtime, stage: Stage, unet: UNet, prompts: PromptEncoder | ConditionEncoder
) -> DiffusionModel:
    unet = runtime.prepare(unet)
    stage.add(unet)
    call = graphs = None
    if runtime.compile:
        from ldmcli.speed.compiled import compiled

        call = compiled(unet, runtime.device)
    if runtime.cuda_graph:
        from ldmcli.speed.cuda.graph import CudaRecorder, Graphs

        graphs = Graphs(CudaRecorder(runtime.device), [unet])
    return DiffusionModel(source.config, runtime, unet, prompts, call, graphs)
