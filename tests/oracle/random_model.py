"""Small Stable Diffusion 1 models for diffusers, with random weights that make every part matter."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,  # not PNDM's own, but SD1.5's file says it for the other samplers
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

SMALL_VAE = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 96,
    "scaling_factor": 0.18215,
}

SMALL_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}


def random_pipeline(
    *,
    unet: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """diffusers' StableDiffusionPipeline shaped as SD1, only narrower; the arguments replace single settings.

    Its noise prediction has a standard deviation of about 1, its images span the whole range.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**SMALL_VAE | (vae or {})),
        text_encoder=CLIPTextModel(CLIPTextConfig(**SMALL_TEXT | (text or {}))),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(
            **{
                "block_out_channels": (32, 64, 64, 128),
                "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                "attention_head_dim": 8,  # diffusers' word for the number of heads
                "layers_per_block": 2,
                "cross_attention_dim": 64,
                # 2×2 at the coarsest level: of 32 groups with fewer numbers, a norm turns rounding into noise.
                "sample_size": 12,
            }
            | (unet or {})
        ),
        scheduler=PNDMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    randomise_pipeline(pipeline, ("vae", "text_encoder", "unet"), seed)
    return pipeline


def clip_tokenizer(**settings: Any) -> Any:
    """transformers' tokenizer with CLIP's own vocabulary."""
    from transformers import CLIPTokenizer

    from ldmcli.conditioning.tokenizer import clip_vocabulary

    vocabulary = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary.ids, merges=vocabulary.merges, model_max_length=77, **settings)


def randomise_pipeline(pipeline: Any, parts: tuple[str, ...], seed: int) -> None:
    """Random weights for these parts, in this order; predictions and pictures get the size of a trained model's."""
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        module = getattr(pipeline, part)
        randomise(module, generator)
        module.requires_grad_(False).eval()
    pipeline.unet.conv_out.weight.mul_(1.8)
    pipeline.vae.decoder.conv_out.weight.mul_(1.5)
    pipeline.set_progress_bar_config(disable=True)


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep a signal's size; norms near 1 and biases near 0, but none equal to its initial value."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, device=generator.device)
            if weight.ndim > 1:
                is_table = name.endswith(("token_embedding.weight", "position_embedding.weight"))
                weight.copy_(noise if is_table else noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(0.1 * noise + float(name.endswith("weight")))


def with_channels(pipeline: Any, channels: int, seed: int = 3) -> Any:
    """The pipeline with another random U-Net, of so many input channels."""
    other = copy.copy(pipeline)
    other.unet = type(pipeline.unet).from_config(pipeline.unet.config, in_channels=channels)
    randomise(other.unet, torch.Generator().manual_seed(seed))
    other.unet.requires_grad_(False).eval().conv_out.weight.mul_(1.8)
    return other


def save(pipeline: Any, folder: Path) -> Path:
    """The pipeline as a diffusers folder."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
