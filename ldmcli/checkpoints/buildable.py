"""Whether a configuration describes networks that can be built and run at all.

It comes from a file of any origin: what passes here divides evenly, builds in bounded time and gives finite numbers.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ldmcli.config import (
    COSINE,
    ClassesConfig,
    ImageEmbeddingConfig,
    LayoutConfig,
    MapConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    cosine_betas,
)
from ldmcli.errors import BadDataError
from ldmcli.spec import MAX_SIZE, MAX_TRAINING_STEPS

_MAX_LAYERS = 128  # of one kind in one place; the deepest known models have 32
_MAX_DIMENSION = 1 << 24
_MAX_VAE_LEVELS = 8
_TOKENS = range(3, 4097)  # begin and end marks and something between them; CLIP reads 77
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu")
_TRAINING_STEPS = range(2, MAX_TRAINING_STEPS + 1)
_BETAS = (1e-6, 0.999)  # below, float32 cannot tell 1 - beta from 1
_PLANES = 3  # of a picture
_APART = "they are not of one model"
_MAX_DECAY = 80.0  # -log ᾱ at the noisiest step, which float32 still holds; Stable Diffusion has 5.4


def check_buildable(config: ModelConfig, shown: str) -> None:
    """Raise BadDataError saying what is wrong with the model that `shown` names, if anything is."""
    fault = next(_faults(config), None)
    if fault:
        raise BadDataError(f"{shown}: {fault}.")


def betas_of(schedule: ScheduleConfig) -> Sequence[float]:
    """The betas; NaN where a start or an end below 0 has no square root."""
    if schedule.betas is not None:
        return schedule.betas
    if schedule.beta_schedule == COSINE:
        return cosine_betas(schedule.training_steps)
    power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
    if schedule.beta_start < 0 or schedule.beta_end < 0:
        return [math.nan]
    start, end = schedule.beta_start**power, schedule.beta_end**power
    stride = (end - start) / (schedule.training_steps - 1)
    return [(start + i * stride) ** (1 / power) for i in range(schedule.training_steps)]


def check_autoencoder(vae: VAEConfig, shown: str) -> None:
    """Raise BadDataError saying what is wrong with the autoencoder that `shown` names, if anything is."""
    fault = next(_vae_faults(vae), None)
    if fault:
        raise BadDataError(f"{shown}: {fault}.")


def _faults(config: ModelConfig) -> Iterator[str]:
    unet, vae, texts = config.unet, config.vae, config.text_encoders
    if isinstance(config.conditioner, TextEncoderConfig):
        texts = (*texts, config.conditioner)
    yield from _size_faults("U-Net", unet, unet.layers_per_block)
    for text in texts:
        yield from _size_faults("text encoder", text, text.layers)
    if isinstance(config.conditioner, ClassesConfig | MapConfig):
        yield from _size_faults(f"encoder of a {config.conditioner.kind}", config.conditioner, 1)
        if config.conditioner.classes < 1:
            yield f"the encoder of a {config.conditioner.kind} knows no class"
    yield from _norm_faults("U-Net", unet)
    for name, eps in (("U-Net", unet.norm_eps), *(("text encoder", text.norm_eps) for text in texts)):
        if not 0 < eps < 1:
            yield f"the {name}'s norm_eps is {eps:g}, not between 0 and 1"
    yield from _unet_faults(unet)
    yield from _vae_faults(vae)
    for text in texts:
        yield from _text_faults(text)
    for schedule in (config.schedule, config.noising):
        yield from _schedule_faults(schedule) if schedule else ()
    yield from _fit_faults(config)


def _size_faults(name: str, part: Any, layers: int) -> Iterator[str]:
    # Shapes with a 0 among them may say anything else without a byte of data; torch's sizes have 64 bits.
    values = (value if isinstance(value, tuple) else (value,) for value in dataclasses.astuple(part))
    largest = max(number for numbers in values for number in numbers if isinstance(number, int))
    if largest > _MAX_DIMENSION:
        yield f"the {name} has a dimension of {largest}, more than {_MAX_DIMENSION}"
    if not 1 <= layers <= _MAX_LAYERS:
        yield f"the {name} has {layers} layers in one place; 1 to {_MAX_LAYERS} can be run"


def _norm_faults(name: str, net: UNetConfig | VAEConfig) -> Iterator[str]:
    uneven = [width for width in net.block_channels if width < 1 or width % net.norm_groups]
    if uneven:
        yield f"the {name}'s {uneven[0]} channels do not divide into {net.norm_groups} norm groups"


def _unet_faults(unet: UNetConfig) -> Iterator[str]:
    if unet.reads == "unknown":
        yield f"the U-Net takes {unet.in_channels} latent channels and gives {unet.out_channels}"
    if unet.context_dim and not any(unet.attention):
        yield "no level of the U-Net attends to the text"
    deepest = max(*unet.attention, unet.middle_attention)
    if deepest > _MAX_LAYERS:
        yield f"the U-Net has {deepest} transformer layers in one place, more than {_MAX_LAYERS}"
    # The middle, which has the last level's channels and heads, always attends.
    depths = (*unet.attention[:-1], 1)
    for channels, heads, depth in zip(unet.block_channels, unet.heads, depths, strict=True):
        if depth and channels % heads:
            yield f"the U-Net's {channels} channels do not divide into {heads} attention heads"
    if min(unet.pooled_dim, unet.added_number_dim) < 0 or (unet.added_numbers and unet.pooled_dim < 1):
        yield "the U-Net's added conditioning has no room for a pooled prompt"
    if unet.freq_shift >= unet.block_channels[0] // 2:
        yield f"the U-Net's freq_shift {unet.freq_shift:g} is not below half its {unet.block_channels[0]} channels"


def _vae_faults(vae: VAEConfig) -> Iterator[str]:
    yield from _size_faults("VAE", vae, vae.layers_per_block)
    yield from _norm_faults("VAE", vae)
    if vae.latent_channels < 1:
        yield "the VAE's latents have no channels"
    if (vae.in_channels, vae.out_channels) != (3, 3):
        yield f"the VAE's pictures have {vae.in_channels} and {vae.out_channels} channels, not red, green and blue"
    if not 1 <= len(vae.block_channels) <= _MAX_VAE_LEVELS:
        yield f"the VAE has {len(vae.block_channels)} levels; 1 to {_MAX_VAE_LEVELS} can be run"
    if not 0 < vae.scaling_factor < math.inf:
        yield f"the VAE's scaling_factor is {vae.scaling_factor:g}, which is not above 0"


def _text_faults(text: TextEncoderConfig) -> Iterator[str]:
    if text.head_dim is None and text.hidden_size % text.heads:
        yield f"the text encoder's width {text.hidden_size} does not divide into {text.heads} attention heads"
    if text.layers <= text.skipped_layers:
        yield f"the text encoder has {text.layers} layers, not enough to read one before the last"
    if text.max_length not in _TOKENS:
        yield f"the text encoder reads {text.max_length} tokens; {_TOKENS[0]} to {_TOKENS[-1]} can be run"
    if text.activation not in ACTIVATIONS:
        yield f"the text encoder's hidden_act is none of {', '.join(ACTIVATIONS)}"


def _schedule_faults(schedule: ScheduleConfig) -> Iterator[str]:
    steps, (low, high) = schedule.training_steps, _BETAS
    if steps not in _TRAINING_STEPS:
        yield f"the schedule has {steps} training steps; {_TRAINING_STEPS[0]} to {_TRAINING_STEPS[-1]} can be run"
        return
    betas = betas_of(schedule)
    if not all(low <= beta <= high for beta in betas):
        yield f"the schedule's betas are not all from {low:g} to {high:g}"
    elif -sum(math.log1p(-beta) for beta in betas) > _MAX_DECAY:
        yield "the schedule's betas leave nothing of the picture long before the last step"


def _fit_faults(config: ModelConfig) -> Iterator[str]:
    """What keeps the parts from fitting together."""
    unet, vae, texts = config.unet, config.vae, config.text_encoders
    width, pooled = sum(text.hidden_size for text in texts), texts[-1].projection_dim or 0 if texts else 0
    writes = "the text encoder writes" if len(texts) == 1 else "the text encoders write"
    if isinstance(config.conditioner, ImageEmbeddingConfig):
        pooled = config.conditioner.hidden_size
    if isinstance(config.conditioner, LayoutConfig | ClassesConfig):
        width, writes = config.conditioner.hidden_size, f"the {config.conditioner.kind} encoder writes"
    if unet.context_dim != width:
        yield f"the U-Net reads contexts of width {unet.context_dim}, {writes} {width}; {_APART}"
    if unet.pooled_dim not in (0, pooled):
        what = "pooled prompts" if unet.reads_sizes else "embeddings"
        writes = "the text encoder writes" if unet.reads_sizes else "its normalizer scales"
        yield f"the U-Net reads {what} of width {unet.pooled_dim}, {writes} {pooled}; {_APART}"
    if len({text.max_length for text in texts}) > 1:
        yield "the text encoders read different numbers of tokens"
    if (
        isinstance(config.conditioner, MapConfig)
        and unet.in_channels - unet.out_channels != config.conditioner.channels
    ):
        yield f"the U-Net takes {unet.in_channels} channels, which are not its latents and those of the map; {_APART}"
    planes = {"low_res": _PLANES, "masked": unet.out_channels + 1}.get(unet.reads)
    if planes is not None and unet.in_channels - unet.out_channels != planes:
        yield f"the U-Net takes {unet.in_channels} channels, not its {unet.out_channels} latents' and {planes} more"
    if unet.classes and config.noising is None:
        yield "the U-Net reads class labels that no request here gives"
    if unet.out_channels != vae.latent_channels:
        yield f"the U-Net takes {unet.out_channels} latent channels, the VAE has {vae.latent_channels}; {_APART}"
    if config.default_size > MAX_SIZE:
        yield f"its own picture size {config.default_size} is over {MAX_SIZE}"
